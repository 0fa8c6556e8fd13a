"""Kill -9 a command at random moments, resume it, and compare what it wrote with an uninterrupted run.

    python tools/kill_resume.py --times 10 --compare model.safetensors -- fastphi train ... --out {out}

`{out}` in the command stands for the folder (or file) to write. One run is left alone; then each trial
starts in a fresh folder, is killed after a random share of the uninterrupted run's time, and resumed
until it ends. `--compare` names the files under {out} whose bytes must agree (none: {out} itself).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def digest(out: Path, names: list[str]) -> str:
    paths = [p for name in names for p in sorted(out.glob(name))] if names else [out]
    if not paths:
        raise SystemExit(f"nothing to compare under {out}")
    total = hashlib.sha256()
    for path in paths:
        total.update(path.relative_to(out.parent).name.encode() + path.read_bytes())
    return total.hexdigest()


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--compare", nargs="*", default=[], help="files under {out}; globs allowed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(sys.argv[1:split])
    command = sys.argv[split + 1 :]
    if not any("{out}" in word for word in command):
        parser.error("the command must contain {out}")
    rng = random.Random(arguments.seed)
    same = 0
    with tempfile.TemporaryDirectory() as scratch:

        def run(out: Path, limit: float | None) -> bool:
            words = [word.replace("{out}", str(out)) for word in command]
            process = subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            try:
                if process.wait(limit) != 0:
                    raise SystemExit(f"the command failed with {process.returncode}: {words}")
                return True
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its worker processes too
                process.wait()
                return False

        whole = Path(scratch) / "whole"
        start = time.perf_counter()
        run(whole, None)
        seconds = time.perf_counter() - start
        expected = digest(whole, arguments.compare)
        print(f"uninterrupted: {seconds:.1f} s, {expected[:12]}", flush=True)
        for trial in range(arguments.times):
            out = Path(scratch) / f"trial{trial}"
            moments = [rng.uniform(0.02, 0.98) * seconds]
            finished = run(out, moments[0])
            while not finished and len(moments) < 3:  # killed up to three times, then left to end
                moments.append(rng.uniform(0.1, 1.2) * seconds)
                finished = run(out, moments[-1])
            if not finished:
                run(out, None)
            agree = digest(out, arguments.compare) == expected
            same += agree
            kills = ", ".join(f"{m:.1f}" for m in moments)
            print(f"trial {trial}: killed after {kills} s: {'same bits' if agree else 'DIFFERENT'}")
            if out.is_dir():
                shutil.rmtree(out)
            else:
                out.unlink()
    print(f"{same} of {arguments.times} the same bits")
    sys.exit(same != arguments.times)


if __name__ == "__main__":
    main()
