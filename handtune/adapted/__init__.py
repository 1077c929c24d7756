"""A base with what runs have stored for it: to generate, to predict, to reward, and both merged into one checkpoint."""
