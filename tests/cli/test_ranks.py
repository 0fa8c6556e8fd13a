"""Jobs of two processes that torchrun starts: the bits of one process, from every room that has ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from study_case import TINY

import fastphi
from fastphi import checkpoint, targets
from fastphi.analysis.neighbours import nearest
from fastphi.data import MemoryImages
from fastphi.study import Study, material
from fastphi.support.world import World

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
ROOT = Path(fastphi.__file__).parents[1]


def torchrun(arguments: list[str], processes: int = 2) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def images() -> MemoryImages:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(64) % 4
    colour = torch.rand(4, 3, 1, 1, generator=generator)[labels]
    return MemoryImages(0.5 * colour + 0.5 * torch.rand(64, 3, 16, 16, generator=generator), labels)


def work(folder: Path, ranks: bool) -> None:
    """Every job, into the folder; called here and by each rank."""
    material.LEVEL_DRAWS = 2
    model, x = checkpoint.load(folder / "model.safetensors"), images()
    out = folder / ("ranks" if ranks else "one")
    fastphi.extract(model, x, out / "phi", sigmas=[0.2, 0.5], draws=2, batch=7, ranks=ranks)
    rows = fastphi.PhiStore(out / "phi").array(0.5)
    index, cosine = nearest(rows[:9], rows, 5, chunk=11, ranks=ranks)
    np.savez(out / f"near{World.here().rank}.npz", index=index, cosine=cosine)
    made = targets.from_images(model, x.batch([1, 2, 3]), copies=2, draws=1)
    options = {"max_iter": 2, "sigmas": (0.8, 0.1, 4), "ranks": ranks}
    got = fastphi.reconstruct(model, made, save=out / "made.npz", **options)
    assert len(got) == 6 and got.finished
    options = {"size": 16, "h0": 0.2, "max_steps": 9, "ranks": ranks}
    fastphi.sample(model, 5, save=out / "sampled.npz", **options)
    Study(model, x, out / "study", TINY, training=x, ranks=ranks).run()


SCRIPT = """
    import sys, warnings
    sys.path[:0] = [{tests!r}, {case!r}]
    from pathlib import Path
    import torch
    import test_ranks
    warnings.simplefilter("ignore")
    test_ranks.work(Path(sys.argv[1]), True)
"""


def test_two_ranks_give_the_bits_of_one_process(make_model, tmp_path):
    checkpoint.save(make_model(channels=(4, 6, 12)), tmp_path / "model.safetensors")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(SCRIPT).format(
            tests=str(Path(__file__).parent), case=str(Path(__file__).parents[1])
        )
    )
    done = torchrun([str(script), str(tmp_path)])
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)
    work(tmp_path, False)
    assert same(tmp_path / "ranks" / "near0.npz", tmp_path / "ranks" / "near1.npz")
    (tmp_path / "ranks" / "near1.npz").unlink()
    one, two = (sorted(files(tmp_path / name)) for name in ("one", "ranks"))
    assert one == two and any("stability" in name for name in one)
    for name in one:
        assert same(tmp_path / "one" / name, tmp_path / "ranks" / name), name


def files(folder: Path) -> list[str]:
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".npy", ".npz")]
    return [str(p) for p in found if p.name[0] != "."]


def same(a: Path, b: Path) -> bool:
    if a.suffix == ".npy":
        return a.read_bytes() == b.read_bytes()
    with np.load(a) as x, np.load(b) as y:
        return x.files == y.files and all(x[n].tobytes() == y[n].tobytes() for n in x.files)


def test_one_rank_tells_an_error(make_model, tmp_path):
    """That all of them meet, and that a command is not for several."""
    checkpoint.save(make_model(), tmp_path / "model.safetensors")
    np.save(tmp_path / "images.npy", np.zeros((3, 8, 8, 3), np.uint8))
    fastphi.data.pack(tmp_path / "images.npy", tmp_path / "pack", size=8)
    model, pack, out = (str(tmp_path / name) for name in ("model.safetensors", "pack", "out"))
    bad = torchrun(["-m", "fastphi", "extract", model, pack, out, "--draws", "0"])
    told = [line for line in bad.stderr.splitlines() if line.startswith("fastphi: error")]
    assert bad.returncode == 1 and len(told) == 1  # torchrun's own code
    assert "draws: expected an integer" in told[0] and not Path(out).exists()
    alone = torchrun(["-m", "fastphi", "pack", str(tmp_path / "images.npy"), out])
    assert "fastphi: error: pack: works in one process, 2 were started" in alone.stderr
