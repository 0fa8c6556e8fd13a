"""Training of the denoiser (§2.1, Appendix A): a run is a `TrainConfig` and a folder.

trainer: the algorithm; step: one step of it; captured: the same on a GPU; average: of the weights. config:
its settings. record: a run between two steps; folder: what is saved of it, and how it goes on; log: what
is told of it. process: signals, several processes, the same bits.
"""

from fastphi.train.config import TrainConfig
from fastphi.train.trainer import Trainer, psnr

__all__ = ["TrainConfig", "Trainer", "psnr"]
