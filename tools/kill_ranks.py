"""Kill ranks at random moments until the work is done all the same, and compare the bits.

    python tools/kill_ranks.py extract sample reconstruct train --kills 50 --out kills.json

Each job is first done by one process (train: by two ranks, whose number its bits depend on), then by one,
two or four ranks at a time, of which one is killed with SIGKILL at a random moment, until a round ends by
itself. Written: how each rank of each round ended, after how many seconds, and that the bits are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COMMANDS = {
    "extract": "extract natural64-small {pack} {out} --sigmas 0.1 0.5 --draws 2 --batch 16",
    "sample": "sample natural64-small {out}/x.npz --count 24 --h0 0.03",
    "reconstruct": "reconstruct natural64-small {out}/x.npz --images {pack} --indices 1 2 3 4 5 6 "
    "--copies 2 --steps 25 --max-iter 5",
    "train": "train --data {pack} --out {out} --batch 8 --epochs 6 --checkpoint-every 20 "
    "--evaluate-every 200 --model.channels 16 32 48",
}


def start(command: list[str], ranks: int, launcher: bool) -> list[subprocess.Popen]:
    fastphi = [sys.executable, "-m", "fastphi", *command]
    if launcher:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        fastphi[:1] = [*torchrun, f"--nproc-per-node={ranks}"]
        return [subprocess.Popen(fastphi, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)]
    port = random.randrange(20000, 40000)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            fastphi,
            env=os.environ
            | where
            | {"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(ranks)},
            **quiet,
        )
        for r in range(ranks)
    ]


def children(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in found.read_text().split()] if found.exists() else []


def one_round(command: list[str], ranks: int, moment: float | None, launcher: bool) -> dict:
    """One start; after `moment` seconds a rank is killed, unless all have ended before."""
    began = time.monotonic()
    processes = start(command, ranks, launcher)
    killed = None
    while any(p.poll() is None for p in processes):
        if moment is not None and killed is None and time.monotonic() - began > moment:
            pids = children(processes[0]) if launcher else [p.pid for p in processes]
            if pids:
                killed = random.randrange(len(pids))
                os.kill(pids[killed], signal.SIGKILL)
                at = time.monotonic()
        time.sleep(0.05)
    codes = [p.wait() for p in processes]
    duration = round(time.monotonic() - began, 1)
    lines = (
        [] if launcher else [p.stderr.read().replace("\r", "\n").splitlines() for p in processes]
    )
    said = [
        s for own in lines for s in own if s.startswith("fastphi:") and ";" in s or "error" in s
    ]
    seconds = None if killed is None else round(time.monotonic() - at, 1)
    return {
        "ranks": ranks,
        "started": "torchrun" if launcher else "by hand",
        "killed": killed,
        "codes": codes,
        "seconds": duration,
        "ended_in": seconds,
        "said": said,
    }


def bits(out: Path) -> dict[str, bytes]:
    """What is compared: every array of a store or a result, and a trained model."""
    if (out / "x.npz").exists():
        with np.load(out / "x.npz") as archive:
            return {name: archive[name].tobytes() for name in archive.files if name != "header"}
    files = [p for p in out.iterdir() if p.suffix in (".npy", ".safetensors")]
    return {p.name: p.read_bytes() for p in sorted(files)}


def trial(name: str, pack: Path, kills: int, folder: Path) -> dict:
    def command(out: Path) -> list[str]:
        out.mkdir(exist_ok=True)
        return COMMANDS[name].format(pack=pack, out=out).split()

    whole = folder / f"{name}-whole"
    usual = one_round(command(whole), 2 if name == "train" else 1, None, False)
    assert not any(usual["codes"]), usual
    wanted, rounds, stores, same = bits(whole), [], 0, True
    while sum(r["killed"] is not None for r in rounds) < kills:
        out, ended = folder / f"{name}-{stores}", False
        while not ended:
            ranks = 2 if name == "train" else random.choice([1, 2, 2, 4])
            enough = sum(r["killed"] is not None for r in rounds) >= kills
            moment = None if enough else random.uniform(0.6, 1.4) * usual["seconds"]
            rounds.append(one_round(command(out), ranks, moment, random.random() < 0.3))
            print(name, rounds[-1], flush=True)
            ended = not any(rounds[-1]["codes"])
        same &= bits(out) == wanted
        stores += 1
        shutil.rmtree(out)
    return {"same_bits": same, "times_done": stores, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="+", choices=[*COMMANDS])
    parser.add_argument("--kills", type=int, default=50, help="in all, shared among the commands")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    each, found = -(-options.kills // len(options.commands)), {}
    with tempfile.TemporaryDirectory() as folder:
        images = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3), np.uint8)
        np.save(Path(folder) / "images.npy", images.repeat(8, 1).repeat(8, 2))
        pack = Path(folder) / "pack"
        make = [sys.executable, "-m", "fastphi", "pack", f"{folder}/images.npy", str(pack)]
        subprocess.run(make, check=True)
        for name in options.commands:
            found[name] = trial(name, pack, each, Path(folder))
            record = {"cores": os.cpu_count(), "trials": found}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
            print(name, "same bits:", found[name]["same_bits"])
    sys.exit(not all(trial["same_bits"] for trial in found.values()))


if __name__ == "__main__":
    main()
