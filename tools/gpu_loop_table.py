"""Write fastphi/engine/gpu/loop.json from the matches that gpu_suite.py timed in both forms of the loop.

python tools/gpu_loop_table.py out/gpu/match.json [--out fastphi/engine/gpu/loop.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "fastphi/engine/gpu/loop.json"


def table(found: dict[str, Any]) -> dict[str, Any]:
    """The table of one run's cases. A form's seconds are of all the works that both were timed on."""
    works: dict[tuple[int, str], dict[str, float]] = {}
    for case in found["cases"]:
        if "loop" in case:
            key = (case["images"], case["what"])
            works.setdefault(key, {})[case["loop"]] = case["seconds"]["median"]
    batches: dict[int, dict[str, float]] = {}
    for (n, _), forms in works.items():
        if forms.keys() == {"poll", "while"}:
            total = batches.setdefault(n, dict.fromkeys(forms, 0.0))
            total |= {form: total[form] + seconds for form, seconds in forms.items()}
    capability = found["machine"]["capability"]
    rows = [{"capability": capability, "images": n} | batches[n] for n in sorted(batches)]
    return {"machine": found["machine"], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("match", type=Path)
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    made = table(json.loads(options.match.read_text()))
    options.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(f"{options.out}: {len(made['rows'])} batches")


if __name__ == "__main__":
    main()
