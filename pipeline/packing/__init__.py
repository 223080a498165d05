"""Writes an index's images as shuffled WebDataset shards of small JPEGs."""
