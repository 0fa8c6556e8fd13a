"""Fused GPU kernels in Triton, one file per op, under the names of `csrc/ops.cpp`.

None is written yet. The package imports without Triton, and stays so.
"""
