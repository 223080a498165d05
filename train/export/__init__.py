"""Publishes trained networks: `python -m train.export`."""
