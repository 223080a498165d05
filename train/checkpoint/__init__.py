"""Checkpoints: saved, found, loaded."""
