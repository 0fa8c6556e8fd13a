"""Each Triton kernel compiled for sm_90 and launched, on the pretended GPU's libraries alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_case

pytestmark = [*gpu_case.marks(), gpu_case.counted]

SCRIPT = Path(__file__).parents[3] / "tools" / "pretend_gpu" / "launches.py"


def kernels() -> set[str]:
    """The names of all there are: functions of the kernel files that end in `_kernel`."""
    from fastphi import triton_kernels

    files = Path(triton_kernels.__file__).parent.glob("*.py")
    names = (line.split("(")[0] for f in files for line in f.read_text().splitlines())
    return {n.removeprefix("def ") for n in names if n.startswith("def ") and n.endswith("_kernel")}


def test_every_kernel_is_compiled_and_launched():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["minded"]
    assert len(kernels()) >= 8
    launched = {name.removeprefix("triton:") for name in found["launched"]}
    missing = kernels() - launched
    assert not missing, f"{sorted(missing)} of {sorted(kernels())}"


def test_each_has_a_test_in_the_interpreter():
    """By its launcher, in tests/triton_kernels."""
    tests = "".join(
        f.read_text() for f in (SCRIPT.parents[2] / "tests/triton_kernels").glob("test_*.py")
    )
    for name in kernels():
        assert f".{name.removesuffix('_kernel')}(" in tests, name
