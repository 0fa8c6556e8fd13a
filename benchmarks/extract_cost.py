"""What `extract` costs beside the network: a null model on null images.

    python benchmarks/extract_cost.py FOLDER [--plan 10000000] [--rows 200000] [--batch 64] [--pack PACK]

Plan: from the call of an extraction at 20 noise levels to its first image, and the memory it took: with the
store's files to be made, and again. Write: rows per second of φ (512 channels) into
a store of one level. Network: of the full network on a pack, the share of the time for which it waits for
images. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastphi
from fastphi import data, phi
from fastphi.phi import extraction


class NullImages(data.Images):
    """N images of zeros. stop: read none; when the first was asked for is kept."""

    mean = (0.0, 0.0, 0.0)
    sha256 = "0" * 64  # type: ignore[assignment]

    def __init__(self, n: int, size: int, stop: bool = False) -> None:
        self.n, self.shape, self.stop, self.asked = n, (3, size, size), stop, 0.0

    def __len__(self) -> int:
        return self.n

    def _read(self, indices: np.ndarray) -> Tensor:
        self.asked = self.asked or time.perf_counter()
        if self.stop:
            raise KeyboardInterrupt
        return torch.zeros(1).expand(len(indices), *self.shape)


class NullModel(fastphi.UNet):
    """Its φ is 0."""

    def block_means(self, x: Tensor, until: str | None = None) -> dict[str, Tensor]:
        return {until or "mid": x.new_zeros(len(x), self.config.channels[-1])}


def null_model(width: int) -> NullModel:
    return NullModel(fastphi.UNetConfig(channels=(width, width)), backend="reference")


def memory() -> float:
    """MB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plan(folder: Path, n: int, batch: int) -> dict[str, float]:
    model = null_model(1)
    levels = [(i + 1) / 20 for i in range(20)]
    model(torch.zeros(1, 3, 2, 2))
    found: dict[str, float] = {}
    for name in ("first", "again"):
        before, start = memory(), time.perf_counter()
        images = NullImages(n, 2, stop=True)
        try:
            phi.extract(model, images, folder / "plan", sigmas=levels, draws=1, batch=batch)
        except KeyboardInterrupt:
            found[f"{name} s"] = round(images.asked - start, 3)
        found[f"{name} MB"] = round(memory() - before, 1)
    return found


def write(folder: Path, n: int, batch: int) -> float:
    images = NullImages(n, 2)
    phi.extract(null_model(512), images, folder / "write", sigmas=[0.0], batch=batch)
    return round(n / (time.perf_counter() - images.asked))


def waits(model: fastphi.UNet, images: data.Images, batch: int) -> float:
    """Share of an extraction's time in which the network has no images yet."""
    waited, reads = 0.0, extraction.processes.prefetched

    def timed(*args, **kwargs):
        nonlocal waited
        reader = reads(*args, **kwargs)
        try:
            while True:
                start = time.perf_counter()
                item = next(reader, None)
                waited += time.perf_counter() - start
                if item is None:
                    return
                yield item
        finally:
            reader.close()

    extraction.processes.prefetched = timed
    start = time.perf_counter()
    phi.extract(model, images, sigmas=[0.5], draws=1, batch=batch)
    extraction.processes.prefetched = reads
    return waited / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plan", type=int, default=10**7)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pack", help="images for the full network")
    a = parser.parse_args()
    torch.set_grad_enabled(False)
    found: dict[str, object] = {"images": a.plan, "levels": 20, "batch": a.batch}
    found["plan"] = plan(a.folder, a.plan, a.batch)
    found["rows per second"] = write(a.folder, a.rows, a.batch)
    if a.pack:
        images = data.open_images(a.pack)
        few = torch.stack([images.batch([i])[0] for i in range(64)])
        phi.extract(fastphi.UNet(), few, sigmas=[0.5], draws=1)  # warm
        found["waits for images"] = round(waits(fastphi.UNet(), images, a.batch), 4)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
