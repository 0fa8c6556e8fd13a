"""A rank of the training on two GPUs of test_captured.py, which torchrun starts: ddp_on_gpus.py OUT.

On the pretended GPU (tools/pretend_gpu), which has no NCCL, the ranks talk by gloo.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch


def train(out: Path) -> None:
    import torch.distributed as dist

    from fastphi.config import UNetConfig
    from fastphi.train import TrainConfig, Trainer

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 8, 8, generator=generator)
    config = TrainConfig(
        out=out,
        model=UNetConfig(channels=(8, 16)),
        batch=8,
        epochs=2,
        holdout=0,
        device="cuda",
        amp="off",
    )
    trainer = Trainer(config, images)
    trainer.run(progress=False)
    place = next(trainer.model.parameters()).device
    if dist.is_initialized():
        assert place.index == dist.get_rank(), place
    if trainer.world.rank == 0:
        weights = {k: v.cpu() for k, v in trainer.model.state_dict().items()}
        torch.save(weights, out / "weights.pt")


def main() -> None:
    stated: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if torch.cuda.get_device_name(0).startswith("pretended"):
        import emulate
        import torch.distributed as dist

        dist.init_process_group("gloo")
        stated = emulate.stated_kernels()
    with stated:
        train(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
