"""Tables (markdown) of what gpu_first.py found, and what the package takes from it.

    python3 tools/gpu_report.py out/gpu/results.jsonl [out/gpu/again-results.jsonl]     # prints them
    … --readme     the rows of README's "What has run on which GPU"
    … --choices    fastphi/engine/gpu/library.json (layers that cuDNN serves) and loop.json (who repeats a
                   match's iterations), by what was faster
    … --steps OUT  what each step took, as JSON

Of several files a later one's word counts. What a pretended GPU said goes neither into the README nor into
the choices.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_lines

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
LIBRARY = ROOT / "fastphi/engine/gpu/library.json"
LOOP = ROOT / "fastphi/engine/gpu/loop.json"
BEGIN, END = "<!-- gpu_report.py: begin -->", "<!-- gpu_report.py: end -->"
BY = 1.03  # a layer goes to cuDNN where that is faster by more than this factor
Found = dict[str, Any]


def gather(lines: list[gpu_lines.Line]) -> Found:
    """{"machine", "peaks", "cases", "values", "tests", "steps", "absent", "loaded", "call"}: of each thing
    the last word."""
    found: Found = {"machine": {}, "peaks": {}, "call": {}, "doctor": ""}
    latest: dict[tuple[Any, ...], Found] = {}
    for line in lines:
        kind = line["kind"]
        if kind in ("machine", "peaks"):
            found[kind] = found[kind] | {k: v for k, v in line.items() if k not in ("step", "kind")}
        elif kind == "doctor":
            found["doctor"] = line["said"]
        elif kind == "call":
            found["call"] = line
        else:
            names = ("step", "kind", "what", "way", "images", "test", "assembler", "draws")
            # an outcome that came after replaces the one before, and is put where that one was
            latest[tuple(str(line.get(name)) for name in names)] = line
    for kind in ("case", "value", "test", "step", "absent", "loaded"):
        found[f"{kind}s"] = [line for line in latest.values() if line["kind"] == kind]
    return found


def text(lines: list[gpu_lines.Line]) -> str:
    """Everything: the machine, the steps, tests that failed, values under both ptxas, times."""
    found = gather(lines)
    parts = [f"# fastphi on {found['machine'].get('gpu', 'a GPU that said nothing')}", ""]
    parts += [machine_line(found), "", f"Compiled libraries: {found['call'].get('libraries', '?')}"]
    parts += ["", "## Steps", "", *_steps(found), "", "## Tests", "", *_tests(found)]
    parts += ["", "## Values, and their bits under both ptxas", "", *_values(found)]
    cases: dict[str, list[Found]] = {}
    for case in found["cases"]:
        cases.setdefault(_kind_of(case), []).append(case)
    for kind, chosen in cases.items():
        parts += ["", f"## {kind}", "", *TABLES.get(kind, _network)(found | {"cases": chosen})]
    if found["absents"]:
        rows = [[a["what"], a["way"], a["why"]] for a in found["absents"]]
        parts += ["", "## Not measured", "", *_grid(("what", "way", "why"), rows)]
    if found["doctor"]:
        parts += ["", "## fastphi doctor", "", "```", found["doctor"], "```"]
    return "\n".join(parts) + "\n"


def _kind_of(case: Found) -> str:
    """Which table a case belongs to: the first word of its step, the batch left out."""
    return case["step"].split()[0].rstrip(",")


def machine_line(found: Found) -> str:
    known = {k: v for k, v in found["machine"].items() if not isinstance(v, list)}
    line = ", ".join(f"{key} {value}" for key, value in known.items()) or "machine not recorded"
    if peaks := found["peaks"]:
        line += (
            f"; measured here: {peaks['flops'] / 1e12:.0f} TFLOP/s bf16 matrix product,"
            f" {peaks['bytes_per_second'] / 1e12:.2f} TB/s copy"
        )
        if "l2_bytes_per_second" in peaks:
            line += f", {peaks['l2_bytes_per_second'] / 1e12:.2f} TB/s from L2"
    return line


def _steps(found: Found) -> list[str]:
    rows = [[s["step"], s["said"], s["seconds"]] for s in found["steps"]]
    lines = _grid(("step", "said", "s"), rows)
    for loaded in found["loadeds"]:
        stale = "" if loaded["fits"] else "; of other sources of the kernels: they compile anew"
        lines += [
            "",
            f"{loaded['kernels']} kernels by ptxas {loaded['version']} ({loaded['assembler']}) loaded in"
            f" {loaded['seconds']} s, {len(loaded['failed'])} not at all{stale}",
        ]
    return lines


def _tests(found: Found) -> list[str]:
    """A row for each step, then each error."""
    count: dict[str, dict[str, int]] = {}
    for test in found["tests"]:
        each = count.setdefault(test["step"], {})
        each[test["outcome"]] = each.get(test["outcome"], 0) + 1
    outcomes = ("passed", *gpu_lines.FAILED, "skipped")
    rows = [[step, *(each.get(o, 0) for o in outcomes)] for step, each in count.items()]
    lines = _grid(("step", *outcomes), rows)
    for test in found["tests"]:
        if test["outcome"] in gpu_lines.FAILED:
            title = f"### {test['step']}: {test['test']}, {test['outcome']}"
            lines += ["", title, "", "```", test.get("why", ""), "```"]
    return lines


def _values(found: Found) -> list[str]:
    """Relative errors against float64, and whether both ptxas made the same bits."""
    grouped: dict[str, dict[str, Found]] = {}
    for value in found["values"]:
        grouped.setdefault(value["what"], {})["newer" if "newer" in value["step"] else "own"] = (
            value
        )
    rows = []
    for what, by in grouped.items():
        own, newer = by.get("own"), by.get("newer")
        same = "–"
        if own and newer:
            same = "the same" if own["bits"] == newer["bits"] else "DIFFER"
        repeats = all(value["repeats"] for value in by.values())
        errors = [_show(value and value["error"], ".1e") for value in (own, newer)]
        rows.append([what, *errors, same, "yes" if repeats else "NO"])
    return _grid(("value", "error, own ptxas", "newer ptxas", "bits", "repeats"), rows)


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


TABLES = {
    "layers": _layers,
    "extract": _extract,
    "memory": _memory,
    "guidance": _matches,
    "loops": _matches,
    "training": _train,
}


# --- what the package takes from it -------------------------------------------------------------------


def library_table(found: Found, by: float = BY) -> Found:
    """Layers that go to cuDNN and our epilogue: from the smallest batch on from which that is faster, by
    more than a factor `by`, at every batch that was measured."""
    layers: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for case in found["cases"]:
        if case.get("layer") == "fused":
            key = (tuple(case["c_in"]), case["c_out"], case["size"])
            ways = layers.setdefault(key, {}).setdefault(case["images"], {})
            ways[case["way"]] = case["seconds"]["median"]
    rows = []
    for (c_in, c_out, size), batches in layers.items():
        row: Found | None = None
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


def loop_table(found: Found) -> Found:
    """Seconds of each form of a match's loop, of all the works that both were timed on, by batch."""
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


def readme_row(found: Found) -> str:
    """A GPU's row of README's table."""
    tests = [test["outcome"] for test in found["tests"]]
    failed = sum(tests.count(outcome) for outcome in gpu_lines.FAILED)
    times = {
        (case["what"], case["way"], case["images"]): _median(case)
        for case in found["cases"]
        if case["step"] in ("network", "compiled", "guidance", "training")
    }
    said = []
    for what, n in (
        ("phi", 256),
        ("denoise", 256),
        ("guidance iteration", 64),
        ("training step", 512),
    ):
        ours = times.get((what, "ours", n))
        if ours is None:
            continue
        peers = [
            f"{seconds / ours:.2f}× {way}"
            for (other, way, count), seconds in times.items()
            if seconds is not None and way != "ours" and (other, count) == (what, n)
        ]
        name = {"phi": "φ"}.get(what, what)
        beside = f" ({', '.join(peers)})" if peers else ""
        said.append(f"{name} of {n}: {1e6 * ours / n:.1f} µs an image{beside}")
    machine = found["machine"]
    built = f"{machine['gpu']}; torch {machine['torch']}, Triton {machine['triton']}"
    cells = (
        built,
        found["call"].get("libraries", "–"),
        f"{tests.count('passed')} passed, {failed} failed, {tests.count('skipped')} skipped",
        "; ".join(said) or "–",
    )
    return "| " + " | ".join(cells) + " |"


def with_row(readme: str, row: str) -> str:
    """README with a GPU's row between the marks, in place of the row of the same GPU and versions."""
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"gpu_report.py: README.md has no {BEGIN} … {END}")
    before, rest = readme.split(BEGIN)
    inside, after = rest.split(END)
    lines = [line for line in inside.strip().splitlines() if line]
    head, rows = lines[:2], lines[2:]
    name = row.split("|")[1]
    rows = [line for line in rows if line.split("|")[1] not in (name, " none yet ")]
    return f"{before}{BEGIN}\n" + "\n".join([*head, *rows, row]) + f"\n{END}{after}"


def steps_of(calls: list[list[gpu_lines.Line]]) -> Found:
    """What each step took, and how its tests ended."""
    found: list[Found] = []
    for lines in calls:
        tests: dict[str, dict[str, int]] = {}
        for (step, _), outcome in gpu_lines.outcomes(lines).items():
            each = tests.setdefault(step, {})
            each[outcome] = each.get(outcome, 0) + 1
        steps = [
            {name: s[name] for name in ("step", "said", "seconds")} | tests.get(s["step"], {})
            for s in gpu_lines.of_kind(lines, "step")
        ]
        end = next(gpu_lines.of_kind(lines, "end"), {})
        found.append({"seconds": end.get("seconds"), "steps": steps})
    gathered = gather([line for lines in calls for line in lines])
    made = {"machine": gathered["machine"], "calls": found}
    if pretended(gathered):
        made = {"note": "a rehearsal on the pretended GPU: the host's seconds, no GPU's"} | made
    return made


def pretended(found: Found) -> bool:
    return found["machine"].get("gpu", "").startswith("pretended")


def write(path: Path, made: Found) -> None:
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="results.jsonl of one machine, in turn")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--choices", action="store_true")
    parser.add_argument("--steps", type=Path)
    options = parser.parse_args()
    if there := [str(path) for path in options.files if not path.exists()]:
        parser.error(f"there is no {', '.join(there)}")
    calls = [gpu_lines.read(path) for path in options.files]
    lines = [line for call in calls for line in call]
    found = gather(lines)
    if options.steps:
        write(options.steps, steps_of(calls))
    gpu = found["machine"].get("gpu")
    if (options.readme or options.choices) and (gpu is None or pretended(found)):
        parser.error(f"--readme, --choices: expected what a GPU said, got {gpu or 'no machine'}")
    if options.choices:
        for path, made in ((LIBRARY, library_table(found)), (LOOP, loop_table(found))):
            write(path, made)
    if options.readme:
        README.write_text(with_row(README.read_text(), readme_row(found)))
        print(README)
    if not (options.readme or options.choices or options.steps):
        print(text(lines))


if __name__ == "__main__":
    main()
