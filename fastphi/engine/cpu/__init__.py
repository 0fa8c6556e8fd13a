"""The CPU engine (csrc/cpu): for the seam. runner: its ops and its runner; bf16: weights in bfloat16."""

from fastphi.engine.cpu.runner import CPUOps, CPURunner, ops_refuse, refuses, remark

__all__ = ["CPUOps", "CPURunner", "ops_refuse", "refuses", "remark"]
