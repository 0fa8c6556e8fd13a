"""What computes: the engines behind one seam. Whoever needs numbers from a network comes in by `runner`
or `pick`; an engine knows sizes and parameters (`network`), no file, no model class, no command.

seam: what an engine supplies, which there are, which one serves a call. contract: which calls are for
the modules themselves. ops: the compiled operators;
op_rules: what torch is told about them. cpu, gpu: an engine each. The plain one is `fastphi.reference`.
"""

from fastphi.engine.seam import (
    BACKENDS,
    ENGINES,
    Engine,
    Ops,
    Runner,
    frozen,
    pick,
    plain_mode,
    runner,
    serving,
)

__all__ = [
    "BACKENDS",
    "ENGINES",
    "Engine",
    "Ops",
    "Runner",
    "frozen",
    "pick",
    "plain_mode",
    "runner",
    "serving",
]
