"""A daemon's part: orders and sessions, whose turn it is, where tasks write, what is remembered and told."""
