"""The data loaders for training and evaluation."""
