"""Benchmarks against other data loaders: `python -m tools.bench`."""
