"""Encoded bytes to normalised pixels: DALI, resize, mean and PCA colour jitter."""
