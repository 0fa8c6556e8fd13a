"""The command line: one function per command, options from its signature, help from its text.

Errors a user can mend end with one line and exit code 2, Ctrl-C with 130; no half-written file stays.
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NoReturn

try:
    import tyro
    from tyro.conf import Positional, arg
except ModuleNotFoundError:
    sys.exit(
        "fastphi: error: the command line needs tyro (pip install tyro); the Python API does not"
    )

from fastphi.cli.samples import Backend, reconstruct, sample
from fastphi.cli.start import say
from fastphi.config import UNetConfig
from fastphi.support.interrupts import RESUMABLE, Interrupts, Stopped
from fastphi.support.world import Gone, World, told
from fastphi.train import TrainConfig


def pack(
    source: Positional[Path],
    out: Positional[Path],
    size: int = 64,
    color: bool = True,
    split: str = "train",
    key: str | None = None,
    workers: int = 0,
    allow_upscale: bool = False,
    bits: int | None = None,
) -> None:
    """Pack images into a uint8 memory map that training and extraction read.

    Args:
        source: a folder of images (a class per folder, or flat), of .tar or of .parquet files; a .zip,
            .npy or .npz; a .tar or .parquet, or a quoted pattern of them: "shards-{000..003}.tar".
        out: the folder to write. An interrupted pack goes on where it stopped.
        size: side in pixels, after a centre crop and area resampling.
        color: three channels; --no-color packs one, grey.
        split: which split of an .npz of encoded images, or of a folder of .parquet files.
        key: where images are: the array of an .npz, column of a .parquet, extension in a .tar.
        workers: decoding processes; 0 decodes in this one.
        allow_upscale: enlarge images smaller than `size` instead of skipping them.
        bits: bits in use in 16-bit grey PNG and TIFF, 9 to 16; default: as each file says.
    """
    from fastphi.data import pack as run

    packed = run(
        source,
        out,
        size=size,
        color=color,
        split=split,
        key=key,
        workers=workers,
        allow_upscale=allow_upscale,
        bits=bits,
    )
    print(f"{out}: {len(packed)} images of {packed.size} x {packed.size} x {packed.channels}")


@dataclass(frozen=True, kw_only=True)
class _TrainConfig(TrainConfig):
    """Without a default network: so that one count of layers goes for any number of resolutions."""

    model: UNetConfig = field()
    """Sizes of the network."""


def train(config: Annotated[_TrainConfig, arg(name="")]) -> None:
    """Train the denoiser (§2.1). The same command again resumes, to the same bits."""
    from fastphi.cli.start import find
    from fastphi.train import Trainer

    find(config.device)
    Trainer(config).run()
    say(f"{config.out}/model.safetensors")


def extract(
    model: Positional[Path],
    images: Positional[Path],
    out: Positional[Path],
    sigmas: tuple[float, ...] | None = None,
    draws: int = 20,
    all_blocks: bool = False,
    indices: tuple[int, ...] | None = None,
    seed: int = 0,
    batch: int = 64,
    workers: int = 1,
    device: str = "auto",
    dtype: Literal["auto", "bfloat16"] = "auto",
    backend: Backend = "auto",
    shard: str | None = None,
) -> None:
    """Extract φ = E_z[ā(x + σz)] of packed images into a φ store (§2.2). Resumes where it stopped.
    Processes that torchrun or srun starts share the work.

    Args:
        model: a checkpoint: .safetensors, a training folder, the authors' folder, or natural64-small.
        images: a folder written by `fastphi pack`.
        out: the φ store: one .npy per noise level and block, and a manifest.
        sigmas: noise levels, in units of images in [0, 1]; default: the authors' twenty.
        draws: noise draws per image and level (one at sigma 0).
        all_blocks: every block's means, not the middle block's alone.
        indices: only these images.
        seed: of the noise.
        batch: images at a time; the result does not depend on it.
        workers: processes; the result does not depend on them.
        device: cpu, cuda, cuda:N, or auto, a GPU where there is one.
        dtype: to compute in: auto is the model's own; bfloat16 is what GPUs, and CPUs with AMX, are
            fast in; other CPUs compute it in float32.
        backend: the engine; auto takes the fastest that can serve.
        shard: i/n: only the i-th of n equal runs of the images, i from 0, for n jobs (of a SLURM
            array: --shard $SLURM_ARRAY_TASK_ID/8) that write one store, in any order or at once.
    """
    import torch

    import fastphi
    from fastphi.cli.start import load

    part = _shard(shard)
    store = fastphi.extract(
        load(model, device, backend),
        images,
        out,
        sigmas=sigmas,
        draws=draws,
        blocks="all" if all_blocks else ("mid",),
        indices=indices,
        seed=seed,
        batch=batch,
        workers=workers,
        progress=True,
        dtype=torch.bfloat16 if dtype == "bfloat16" else None,
        shard=part,
        ranks=True,
    )
    if missing := sum(map(store.lacking, store.sigmas)):
        total = len(store) * len(store.sigmas)
        say(f"{out}: {total - missing} of {total} rows are there, the rest is other shards'")
        return
    say(f"{out}: phi of {len(store)} images at {len(store.sigmas)} noise level(s)")


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit()):
        raise ValueError(f"shard: expected i/n, as in 0/8, got {text!r}")
    return int(i), int(n)


def neighbours(
    store: Positional[Path],
    queries: Positional[tuple[int, ...]],
    sigma: float | None = None,
    k: int = 8,
    block: str = "mid",
    images: Path | None = None,
    picture: Path | None = None,
    out: Path | None = None,
) -> None:
    """Nearest neighbours in φ (cosine), as JSON; with --images in pixels too.

    Args:
        store: a φ store written by `fastphi extract`.
        queries: row numbers of the store whose neighbours are wanted.
        sigma: the noise level (default: the only one of the store, else the one nearest 0.5).
        k: neighbours per query, the query itself left out.
        block: whose means.
        images: the pack the store was made from.
        picture: a PNG to write: query, neighbours in φ, neighbours in pixels. Needs --images.
        out: a JSON file to write instead of printing.
    """
    from fastphi.cli.commands import neighbours_command

    found = neighbours_command(store, queries, sigma, k, block, images, picture)
    if World.here().rank == 0:
        _put(json.dumps(found, indent=2), out)


def analyze(
    model: Positional[Path],
    images: Positional[Path],
    out: Positional[Path],
    quick: bool = False,
    training: Path | None = None,
    limit: int | None = None,
    sigma: float | None = None,
    stages: tuple[str, ...] | None = None,
    seed: int = 0,
    device: str = "auto",
    backend: Backend = "auto",
) -> None:
    """Measure the paper's properties of φ on your images: report.html, figures, numbers.json, and
    explorer.html. The same command again goes on where it stopped.

    Args:
        model: a checkpoint: .safetensors, a training folder, the authors' folder, or natural64-small.
        images: a folder written by `fastphi pack`; labels, where it has them, are used.
        out: the folder to write.
        quick: fewer images, levels and samples: minutes on two cores, wider errors.
        training: the pack the model was trained on, to look for copies of it among samples.
        limit: images to use at most (default 2000; quick 500).
        sigma: the noise level of φ, in units of images in [0, 1] (default 0.2).
        stages: only these (sparsity, stability, ... as in numbers.json); others that were done are kept.
        seed: of noise, subsets and clusterings.
        device: cpu, cuda, cuda:N, or auto, a GPU where there is one.
        backend: the engine; auto takes the fastest that can serve.
    """
    from fastphi.cli.commands import analyze_command

    options = {"images": limit, "sigma": sigma, "seed": seed}
    analyze_command(
        model,
        images,
        out,
        quick=quick,
        training=training,
        stages=stages,
        device=device,
        backend=backend,
        options=options,
    )


def doctor(json_: Annotated[bool, arg(name="json")] = False) -> None:
    """Print versions, what was compiled, and which engine serves what.

    Args:
        json_: as JSON.
    """
    from fastphi.cli import doctor

    found = doctor.report()
    print(json.dumps(found, indent=2) if json_ else doctor.text(found))


def _put(text: str, out: Path | None) -> None:
    if out is None:
        print(text)
        return
    from fastphi.support import files

    with files.atomic_write(out) as temporary:
        temporary.write_text(text + "\n")


COMMANDS = (pack, train, extract, neighbours, reconstruct, sample, analyze, doctor)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `fastphi`. Exit codes: 2, an error; 75, stopped or without another rank, and the
    same command goes on; 130, Ctrl-C."""
    _make_printable()
    try:
        world = World.here()
    except ValueError as error:
        _end(error, f"error: {_one_line(error)}", 2)
    # of several ranks the first tells what there is to tell, and torch leaves it to us
    level = logging.WARNING if world.rank else logging.INFO
    logging.basicConfig(format="fastphi: %(message)s", level=level)
    if world.size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--version"]:
        import fastphi

        print(fastphi.__version__)
        return
    try:
        with Interrupts():
            if world.size > 1 and arguments[:1] in (["pack"], ["doctor"]):
                raise ValueError(f"{arguments[0]}: works in one process, {world.size} were started")
            with world.job(patience=120):
                _run(arguments)
    except KeyboardInterrupt as error:
        _end(error, "interrupted; run the same command again to go on", 130)
    except Stopped as error:
        _end(error, f"{error}; run the same command again to go on", RESUMABLE)
    except Gone as error:
        _end(error, f"{_one_line(error)}; run the same command again to go on", RESUMABLE)
    except MemoryError as error:
        _end(error, f"error: not enough memory ({_one_line(error)})", 2)
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("FASTPHI_TRACEBACK"):
            raise
        _end(error, f"error: {_one_line(error)}", 2)


def _end(error: BaseException, text: str, code: int) -> NoReturn:
    """Of several ranks one says it."""
    if told(error):
        print(f"fastphi: {text}", file=sys.stderr)
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


_WORDS = str.maketrans(
    {
        "φ": "phi",
        "σ": "sigma",
        "ā": "a",
        "∇": "grad ",
        "×": "x",
        "−": "-",
        "√": "sqrt ",
        "…": "...",
        "§": "sec. ",
        "²": "^2",
        "³": "^3",
        "γ": "gamma",
        "ε": "eps",
        "β": "beta",
    }
)


def _make_printable() -> None:
    """On a terminal that lacks a character (LANG=C), a word or a ? stands for it, not an error."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        text = error.object[error.start : error.end].translate(_WORDS)
        return text.encode("ascii", "replace").decode(), error.end

    codecs.register_error("fastphi", replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastphi")


def _run(arguments: list[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {command.__name__: command for command in COMMANDS},
        prog="fastphi",
        description="What a diffusion denoiser knows about images (arXiv 2506.01912).",
        args=arguments,
        sort_subcommands=False,
    )
