"""Generates a small data set and trains on it: `python -m tools.demo`."""
