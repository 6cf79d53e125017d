"""Processes that receive beside a task's worker: their pool at the worker, and what runs over there."""
