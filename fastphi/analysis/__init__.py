"""Measurements of the paper, one file per property. They take any (N, C) arrays.

Every function returns a small frozen dataclass with what was measured, its controls, `numbers()` as
JSON values, `plot(ax=...)`, and `shown` where the paper makes a claim. Nothing prints or writes.
"""
