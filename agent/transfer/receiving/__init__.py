"""Lanes at the destination and what they bring: large files, parts used again, what is asked for once more."""
