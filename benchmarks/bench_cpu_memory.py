"""Peak memory on a CPU beyond what a process holds with model, images and library ready: each way in a
process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cpu_peers
import pytest

PROGRAM = """
import resource, sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, {folder!r})
import cpu_peers, support, torch
from fastphi.config import UNetConfig

def held():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])

model = support.network(UNetConfig())
x = support.images({images}, model.config, 64, "cpu")
with torch.no_grad():
    try:
        call = cpu_peers.WAYS[{way!r}](model, {decoder}, x)
    except cpu_peers.Absent as reason:
        sys.exit(str(reason))
    before = held()
    call(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("what", ["phi", "denoise"])
@pytest.mark.parametrize("way", [name for name in cpu_peers.WAYS if name != "authors"])
def test_peak_memory(way: str, what: str, results) -> None:
    images = 64
    program = PROGRAM.format(
        folder=str(Path(__file__).parent), images=images, way=way, decoder=what == "denoise"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    case = {"what": f"memory of {what}", "images": images, "size": 64, "way": way}
    if run.returncode:
        results.add(case | {"absent": run.stderr.strip().splitlines()[-1]})
        pytest.skip(run.stderr.strip().splitlines()[-1])
    results.add(case | {"megabytes": int(run.stdout.split()[-1]) / 1024})
