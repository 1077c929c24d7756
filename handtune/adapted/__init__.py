"""A base with what runs have stored for it: to generate, predict, reward, train on, and both merged into one."""
