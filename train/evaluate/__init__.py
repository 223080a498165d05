"""Tests of trained networks: `python -m train.evaluate`."""
