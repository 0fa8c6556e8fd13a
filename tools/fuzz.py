"""Run the fuzzing suites of tests/fuzz for some minutes, other cases each round; print what was tried.

Called by `make fuzz MINUTES=10`. --only: one suite. A round that fails ends
the run with its report, which names the seed: the same case again by
`FASTPHI_FUZZ=... pytest tests/fuzz --hypothesis-seed=...`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SUITES = {"gestures": 500, "hostile_ops": 5000, "bytes": 300}  # examples to a test in a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", choices=SUITES, action="append")
    parser.add_argument("--pytest", default=f"{sys.executable} -m pytest", help="how to call it")
    options = parser.parse_args()
    suites, end = options.only or list(SUITES), time.monotonic() + 60 * options.minutes
    total: Counter[str] = Counter()
    seed = int(time.time())
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        while time.monotonic() < end:
            for suite in suites:
                seed += 1
                command = [*options.pytest.split(), "-q", "-x", "-p", "no:cacheprovider"]
                command += ["--capture=sys"]  # a sanitizer writes past Python's streams
                command += [f"tests/fuzz/test_{suite}.py", f"--hypothesis-seed={seed}"]
                environment = os.environ | {
                    "FASTPHI_FUZZ": str(SUITES[suite]),
                    "FASTPHI_FUZZ_COUNTS": str(counts),
                }
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if counts.exists():
                    for line in counts.read_text().splitlines():
                        total.update(json.loads(line))
                    counts.unlink()
                said = ", ".join(f"{n:,} {what}" for what, n in total.items())
                print(f"{time.strftime('%H:%M')} {suite}: tried so far {said}", flush=True)
                if done.returncode:
                    print(done.stdout[-8000:], done.stderr[-8000:], f"seed {seed}", sep="\n")
                    sys.exit(1)


if __name__ == "__main__":
    main()
