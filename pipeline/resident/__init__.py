"""Decoded images kept in RAM or GPU memory."""
