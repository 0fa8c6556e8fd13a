"""Measurements of the paper, one file per property. They take any (N, C) arrays."""
