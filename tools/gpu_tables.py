"""Tables (markdown) of what gpu_suite.py wrote: python tools/gpu_tables.py out/gpu/*.json"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Found = dict[str, Any]


def text(part: str, found: Found) -> str:
    """A heading, the machine, and the part's table; whatever of it is there."""
    lines = [f"## {part}", "", _machine(found), ""]
    lines += TABLES.get(part, _network)(found)
    if found.get("ended"):
        lines += ["", f"Not complete: {found['ended']}."]
    return "\n".join(lines) + "\n"


def _machine(found: Found) -> str:
    known = {k: v for k, v in (found.get("machine") or {}).items() if not isinstance(v, list)}
    line = ", ".join(f"{key} {value}" for key, value in known.items()) or "machine not recorded"
    if peaks := found.get("peaks"):
        line += (
            f"; measured here: {peaks['flops'] / 1e12:.0f} TFLOP/s bf16 matrix product,"
            f" {peaks['bytes_per_second'] / 1e12:.2f} TB/s copy"
        )
    return line


def _grid(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    header, rows = list(header), [[str(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows or [["nothing measured"]]]


def _by_way(found: Found) -> dict[tuple[str, int], dict[str, Found]]:
    """(what, images) -> way -> case."""
    grouped: dict[tuple[str, int], dict[str, Found]] = {}
    for case in found.get("cases", []):
        grouped.setdefault((case["what"], case["images"]), {})[case["way"]] = case
    return grouped


def _median(case: Found | None) -> float | None:
    return None if case is None else case["seconds"]["median"]


def _show(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else format(value * scale, form)


def _ratio(peer: Found | None, ours: Found | None) -> str:
    a, b = _median(peer), _median(ours)
    return "–" if a is None or b is None else f"{a / b:.2f}×"


def _share(case: Found | None, found: Found) -> str:
    """Of the matrix product's rate."""
    seconds, peaks = _median(case), found.get("peaks")
    if case is None or seconds is None or not peaks or "flops" not in case:
        return "–"
    return f"{100 * case['flops'] / seconds / peaks['flops']:.0f} %"


def _layers(found: Found) -> list[str]:
    rows = []
    for (what, n), ways in _by_way(found).items():
        ours, bare, library = (ways.get(w) for w in ("ours", "cuDNN bare", "cuDNN + epilogue"))
        bound = None if ours is None else ours.get("percent_of_bound")
        rows.append(
            [
                what,
                n,
                _show(_median(ours), ".2f", 1e6),
                _share(ours, found),
                _show(bound, ".0f") + " %",
                _show(_median(bare), ".2f", 1e6),
                _share(bare, found),
                _ratio(bare, ours),
                _show(_median(library), ".2f", 1e6),
                _ratio(library, ours),
            ]
        )
    return _grid(
        ("layer", "images", "ours, µs", "of matmul", "of bound", "cuDNN bare, µs", "of matmul",
         "bare / ours", "cuDNN + epilogue, µs", "that / ours"), rows
    )  # fmt: skip


def _network(found: Found) -> list[str]:
    rows = []
    for (what, n), ways in _by_way(found).items():
        for way, case in ways.items():
            rows.append(
                [
                    what,
                    n,
                    way,
                    _show(_median(case), ".3f", 1e3),
                    _show(case["seconds"]["p90"], ".3f", 1e3),
                    _show(case.get("images_per_second"), ",.0f"),
                    _share(case, found),
                    _ratio(case, ways.get("ours")),
                    _show(case.get("relative_error"), ".1e"),
                ]
            )
    return _grid(
        (
            "work",
            "images",
            "way",
            "ms",
            "p90",
            "images/s",
            "of matmul",
            "ours is faster by",
            "error",
        ),
        rows,
    )


def _matches(found: Found) -> list[str]:
    """Of guidance: how many updates, too."""
    rows = []
    for (what, n), ways in _by_way(found).items():
        for way, case in ways.items():
            spread = [case.get(name) for name in ("mean_updates", "max_updates", "cv_updates")]
            rows.append(
                [
                    *(what, n, way, _show(_median(case), ".3f", 1e3), _share(case, found)),
                    _ratio(case, ways.get("ours")),
                    *(
                        _show(value, form)
                        for value, form in zip(spread, (".1f", ".0f", ".2f"), strict=True)
                    ),
                    _show(case.get("peak_bytes"), ",.0f", 2**-20),
                ]
            )
    return _grid(
        ("work", "images", "way", "ms", "of matmul", "ours is faster by", "updates", "at most",
         "their CV", "MiB at the peak"), rows
    )  # fmt: skip


def _train(found: Found) -> list[str]:
    rows = [
        [
            *(n, way, _show(_median(case), ".2f", 1e3), _share(case, found)),
            _ratio(case, ways.get("ours")),
            _show(case.get("images_per_second"), ",.0f"),
            _show(case.get("hours_for_1000_epochs_of_imagenet"), ".1f"),
            _show(case.get("peak_bytes"), ",.0f", 2**-20),
        ]
        for (_, n), ways in _by_way(found).items()
        for way, case in ways.items()
    ]
    return _grid(
        ("images", "way", "ms a step", "of matmul", "ours is faster by", "images/s",
         "h for 1000 epochs, calculated", "MiB at the peak"), rows
    )  # fmt: skip


def _extract(found: Found) -> list[str]:
    rows = [
        [
            case["way"],
            case["images"],
            case["draws"],
            _show(_median(case), ".1f"),
            _show(case["images_per_second"], ",.0f"),
            _show(case["percent_of_bound"], ".0f") + " %",
            _show(case["calculated_seconds_of_imagenet"], ".0f"),
        ]
        for case in found.get("cases", [])
    ]
    return _grid(
        ("way", "images", "draws", "s", "images/s", "of matmul", "s for 1.28 M images, calculated"),
        rows,
    )


def _memory(found: Found) -> list[str]:
    rows = [
        [case["what"], case["images"], case["way"], _show(case["peak_bytes"], ",.0f", 2**-20)]
        for case in found.get("cases", [])
    ]
    return _grid(("what", "images", "way", "MiB at the peak"), rows)


def _tests(found: Found) -> list[str]:
    failed, skipped = found.get("failed", {}), found.get("skipped", {})
    count = (found.get("passed", 0), len(failed), sum(skipped.values()))
    lines = ["{} passed, {} failed, {} skipped".format(*count) + f", {found.get('seconds', 0)} s"]
    lines += [f"- skipped {n}: {reason}" for reason, n in skipped.items()]
    for name, why in failed.items():
        lines += ["", f"### {name}", "", "```", why, "```"]
    if not found.get("finished") or not sum(count):
        lines += ["", "The run did not come to its end."]
    return lines


def _sanitizer(found: Found) -> list[str]:
    rows = [
        [tool, result["said"], result["seconds"]] for tool, result in found.get("tools", {}).items()
    ]
    return _grid(("tool", "said", "s"), rows)


def _build(found: Found) -> list[str]:
    return [found.get("said", "not built"), f"{found.get('seconds', 0)} s"]


TABLES: dict[str, Callable[[Found], list[str]]] = {
    "build": _build,
    "kernels": _tests,
    "engine": _tests,
    "sanitizer": _sanitizer,
    "layers": _layers,
    "extract": _extract,
    "memory": _memory,
    "match": _matches,
    "reconstruct": _matches,
    "train": _train,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        print(text(path.stem, json.loads(path.read_text())))


if __name__ == "__main__":
    main()
