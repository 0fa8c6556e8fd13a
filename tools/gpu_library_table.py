"""Write fastphi/engine/gpu/library.json from the layers that gpu_suite.py timed.

    python tools/gpu_library_table.py out/gpu/layers.json [--out TABLE.json] [--by 1.03]

A layer goes to cuDNN and our epilogue from the smallest batch on from which that is faster, by more
than a factor --by, at every batch that was measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "fastphi/engine/gpu/library.json"


def table(found: dict[str, Any], by: float) -> dict[str, Any]:
    """The table of one run's cases."""
    layers: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for case in found["cases"]:
        if case["kind"] == "fused":
            key = (tuple(case["c_in"]), case["c_out"], case["size"])
            ways = layers.setdefault(key, {}).setdefault(case["images"], {})
            ways[case["way"]] = case["seconds"]["median"]
    rows = []
    for (c_in, c_out, size), batches in layers.items():
        row: dict[str, Any] | None = None
        for n in sorted(batches, reverse=True):
            ours, library = (batches[n].get(way) for way in ("ours", "cuDNN + epilogue"))
            if ours is None or library is None or ours <= by * library:
                break
            row = {
                "capability": found["machine"]["capability"],
                "c_in": list(c_in),
                "c_out": c_out,
                "size": size,
                "from_batch": n,
                "ours": ours,
                "library": library,
            }
        if row is not None:
            rows.append(row)
    return {"machine": found["machine"], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("layers", type=Path)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--by", type=float, default=1.03)
    options = parser.parse_args()
    made = table(json.loads(options.layers.read_text()), options.by)
    options.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(f"{options.out}: {len(made['rows'])} layers")


if __name__ == "__main__":
    main()
