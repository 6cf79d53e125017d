"""Processes of an agent: how workers are started or forked, and what a daemon and a worker say to each other."""
