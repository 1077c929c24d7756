"""A base with what runs have stored for it: one that generates, one that rewards, and the two merged into one."""
