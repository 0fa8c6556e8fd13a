"""What people write in their programs: changing it is a decision, not an accident."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastphi

NAMES = """MatchResult PackedImages PhiStore Reconstruction TrainingInfo UNet UNetConfig data engine
extract frozen load load_authors_checkpoint load_pretrained match_phi noise ops pack pretrained reconstruct
reference sample save targets train validate""".split()


def test_names_are_pinned():
    assert fastphi.__all__ == NAMES == dir(fastphi)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_documented(name):
    found = getattr(fastphi, name)
    assert isinstance(found, types.ModuleType) or callable(found)
    assert (inspect.getdoc(found) or "").strip()


def test_unknown_names():
    with pytest.raises(AttributeError, match="'fastphi' has no attribute 'sparkle'"):
        fastphi.sparkle  # noqa: B018


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            "extract",
            "model images out sigmas draws blocks seed batch workers indices progress",
        ),
        ("load", "path device dtype backend"),
        ("load_authors_checkpoint", "folder device dtype backend"),
        ("load_pretrained", "name device dtype backend"),
        ("save", "model path"),
        ("UNet", "config backend"),
        ("match_phi", "model x target lr max_iter tolerance channels zero_elsewhere"),
    ],
)
def test_arguments_are_pinned(call, expected):
    found = list(inspect.signature(getattr(fastphi, call)).parameters)
    assert found[: len(expected.split())] == expected.split()


def modules_after(line: str) -> set[str]:
    """Top-level modules loaded by a line of Python in a process of its own."""
    code = f"{line}\nimport sys; print(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    source = Path(fastphi.__file__).parents[1]
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_import_needs_torch_and_numpy_alone():
    """What is optional or heavy is loaded by who uses it."""
    loaded = modules_after("import fastphi; fastphi.UNet; fastphi.noise; fastphi.ops")
    assert {"fastphi", "torch", "numpy"} <= loaded
    others = "safetensors PIL tqdm tyro sklearn scipy matplotlib skimage tensorboard openTSNE"
    torchs_own = modules_after("import torch, numpy")
    assert not (loaded - torchs_own) & set(others.split())
    assert "torch" not in modules_after("import fastphi")  # not even that, until a name is used


def test_every_module_says_what_it_is_for():
    folder = Path(fastphi.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip(), path
