"""Measurements of the paper, one file per property. They take any (N, C) arrays.

Every function returns a small frozen dataclass with what was measured, its controls, `numbers()` as
JSON values, `plot(ax=...)`, and `shown` where the paper makes a claim. Nothing prints or writes.

No rows are held that are not asked for (`rows`): φ of a million images is read from its memory map a chunk
at a time, and what takes a sample of many rows says how many in its docstring and its numbers.

Dead channels, whose value is the same (0, as a rule) for every image, are part of what is measured:

- PR per image, local dimension: d counts them; they add nothing to the sums. A row of zeros gives NaN.
- Statistics of a channel (selectivity, kurtosis, spatial sparsity, dimension, tuning, correlation across
  noise): NaN for it, and left out of quartiles, of the dip test and of rank correlations. `Selectivity`
  counts the nearly dead ones (`faint`), which have numbers and mean little.
- Cosines, neighbours, clusters, subspaces' overlap, probe, divergence: a channel of zeros changes nothing.
- The Gaussian control has them too: constant there, not brought to life by rounding.

Tested channel by channel in tests/analysis/test_dead_channels.py.
"""
