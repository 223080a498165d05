"""Bytes on disk become a `Batch` on a device: index, order, draws, reader, DALI graph, loader."""
