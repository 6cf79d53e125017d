"""One run of a transfer as its parts know it, and how far it has come."""
