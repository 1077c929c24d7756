"""A base with what runs have stored for it: one that generates, one that rewards, one to train on, and merged."""
