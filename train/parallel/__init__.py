"""Processes of a run: ranks and groups, gradient all-reduce, failures."""
