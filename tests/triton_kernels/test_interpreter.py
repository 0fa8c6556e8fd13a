"""The Triton kernels without a GPU: their tests in a process of its own, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_case import INTERPRETED, interpreter_skip_reason, skip_reason

HERE = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(interpreter_skip_reason() is not None, reason=str(interpreter_skip_reason()))
def test_every_kernel_in_the_interpreter():
    kernels = [f for f in HERE.glob("test_*.py") if f.name != Path(__file__).name]
    engine = (HERE.parent / "engine/gpu").glob("test_interpreted_*.py")
    tests = sorted(str(f) for f in (*kernels, *engine))
    env = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # the sums are small
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout


WITHOUT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from fastphi.triton_kernels import (
    conv_bwd, first_layer, fused_layer, last_layer, missing, norm_bwd, pack_taps, upsample,
)
assert "pip install triton" in missing(), missing()
x = torch.zeros(1, 2, 2, 16)
for launch in (
    lambda: fused_layer.fused_layer_fwd(x, None, None, None, None),
    lambda: upsample.upsample_fwd(x, None, None, None, x),
    lambda: first_layer.first_layer_fwd(x, None, None, x),
    lambda: last_layer.last_layer_fwd(x, None, None, None, x),
    lambda: conv_bwd.conv_bwd(x, None, x),
    lambda: norm_bwd.norm_bwd(x, x, None, x),
    lambda: pack_taps.pack_taps(x, x),
):
    try:
        launch()
    except RuntimeError as error:
        assert "pip install triton" in str(error), error
    else:
        raise AssertionError("no error")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("fastphi.triton_kernels") is None, reason=str(skip_reason())
)
def test_without_triton_the_package_imports_and_launchers_say_what_is_missing():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
