"""Who repeats the captured iterations of a match on a GPU: the host, which looks at a flag ("poll"), or
the device by itself ("while": a WHILE node of CUDA 12.4, csrc/graph). The same numbers either way.

The choice is a table's, loop.json, written from measurements by tools/gpu_report.py and empty
until there are some: then the host. FASTPHI_MATCH_LOOP asks for one of them by name.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).parent / "loop.json"
FORMS = ("poll", "while")


@cache
def table() -> dict[str, Any]:
    """{"machine": what measured it, or None; "rows": [{"capability": [9, 0], "images": 64, "poll":
    seconds, "while": seconds}]}, a row for each batch that was measured."""
    return json.loads(TABLE.read_text())


def faster(n: int, capability: list[int], rows: list[dict[str, Any]]) -> str:
    """The form that took less time for the largest measured batch of at most n images, or for the
    smallest one; "poll" where nothing was measured."""
    here = sorted(
        (row for row in rows if row["capability"] == capability), key=lambda row: row["images"]
    )
    if not here:
        return "poll"
    row = next((row for row in reversed(here) if row["images"] <= n), here[0])
    return min(FORMS, key=lambda form: row[form])


def missing() -> str | None:
    """Why there is no loop on the device here, or None."""
    try:
        from fastphi import _graph  # type: ignore[attr-defined]
    except ImportError as error:
        return (
            f"fastphi._graph cannot be imported ({error}); it is built where nvcc, a CUDA torch and"
            " pybind11 are found"
        )
    if (version := _graph.driver_version()) < 12040:
        have = f"{version // 1000}.{version % 1000 // 10}" if version else "none"
        return f"WHILE nodes need a driver of CUDA 12.4 or later, this one is of {have}"
    return None


def chosen(n: int, device: torch.device) -> str:
    """The form for batches of n images. RuntimeError where one is asked for that is not to be had,
    ValueError where what is asked for is none."""
    wanted = os.environ.get("FASTPHI_MATCH_LOOP")
    if wanted is not None:
        if wanted not in FORMS:
            raise ValueError(f"FASTPHI_MATCH_LOOP: expected poll or while, got {wanted!r}")
        if wanted == "while" and (reason := missing()) is not None:
            raise RuntimeError(f"FASTPHI_MATCH_LOOP=while: {reason}")
        return wanted
    rows = table()["rows"]
    if not rows or device.type != "cuda" or missing() is not None:
        return "poll"
    return faster(n, list(torch.cuda.get_device_capability(device)), rows)


def on_device(n: int, device: torch.device) -> Any:
    """The class that puts a captured graph in a loop on the device, or None: the host repeats it."""
    if chosen(n, device) == "poll":
        return None
    from fastphi import _graph  # type: ignore[attr-defined]

    return _graph.WhileGraph


def text() -> str:
    """What `fastphi doctor` says."""
    if (asked := os.environ.get("FASTPHI_MATCH_LOOP")) is not None:
        return f"{asked}, as FASTPHI_MATCH_LOOP asks"
    rows = table()["rows"]
    if not rows:
        return "poll (the host looks at a flag; a loop on the device was not measured yet)"
    each = (
        f"{row['images']}: {faster(row['images'], row['capability'], rows)}"
        for row in sorted(rows, key=lambda row: row["images"])
    )
    said = f"by number of images, measured on {table()['machine']['gpu']}: {', '.join(each)}"
    return said if (reason := missing()) is None else f"poll ({reason}; {said})"
