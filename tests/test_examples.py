"""Every example runs, in its reduced form, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("[0-9]_*.py"))


def test_there_are_four_in_the_order_of_the_paper():
    assert [path.stem for path in SCRIPTS] == ["1_denoise", "2_phi", "3_clusters", "4_reconstruct"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run = subprocess.run(
        [sys.executable, script, "--reduced", "--out", tmp_path],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / f"{script.stem}.png").stat().st_size > 10_000
