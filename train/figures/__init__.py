"""Figures 3 and 4 of the paper: kernels, nearest neighbours."""
