"""The GPU engine (triton_kernels, csrc/cuda, csrc/graph). For the seam.

runner: a prepared model; pack: its weights; plan: the launches of a network, in a graph per batch size;
match, iteration, loop: the guidance loop and the graph that replays it; ops, layer, ends: the same
kernels under autograd; library: which layers cuDNN does. *.json: what was measured faster.
"""

from fastphi.engine.gpu.ops import GPUOps
from fastphi.engine.gpu.runner import GPURunner, missing, refuses

__all__ = ["GPUOps", "GPURunner", "missing", "refuses"]
