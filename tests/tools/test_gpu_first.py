"""The tools round a GPU's first minutes, without a GPU: steps that hang or crash, the second call, the
bundle, tables and what the package takes from them.

The numbers here are made up: they are no figures of any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import gpu_first  # noqa: E402
import gpu_lines  # noqa: E402
import gpu_report  # noqa: E402
import support  # noqa: E402

from fastphi.config import UNetConfig  # noqa: E402
from fastphi.engine.gpu import loop as gpu_loop  # noqa: E402

MACHINE = {"gpu": "made up", "capability": [9, 0], "torch": "2.11", "triton": "3.6.0"}


# --- steps --------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path, monkeypatch) -> gpu_first.Out:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("FASTPHI_LINES", "FASTPHI_STEP"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever is set
    monkeypatch.setattr(gpu_first, "HOME", home)
    return gpu_first.Out(tmp_path / "out", None, tmp_path)


def step(tmp_path, text: str, **options) -> gpu_first.Step:
    file = tmp_path / "test_some.py"
    file.write_text("import os, signal, time, pytest\n" + text)
    return gpu_first.Step("some", options.pop("limit", 60), (str(file),), **options)


def found(out: gpu_first.Out) -> tuple[dict[str, str], dict]:
    lines = gpu_lines.read(out.lines)
    tests = {test.split("::")[1]: how for (_, test), how in gpu_lines.outcomes(lines).items()}
    return tests, next(gpu_lines.of_kind(lines, "step"))


def test_what_hangs_crashes_or_fails_costs_only_itself(tmp_path, out):
    text = """
def test_good(): pass
def test_hangs(): time.sleep(60)
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="not now")
def test_none(): pass
"""
    gpu_first.run(step(tmp_path, text, each=2.0), out, time.monotonic() + 60)
    tests, end = found(out)
    assert tests == {
        "test_good": "passed",
        "test_hangs": "stopped",
        "test_crashes": "died",
        "test_bad": "failed",
        "test_none": "skipped",
    }
    assert end["said"] == "done"
    why = {line["outcome"]: line["why"] for line in gpu_lines.read(out.lines) if "why" in line}
    assert "stopped after 2 s" in why["stopped"] and "ended with -11" in why["died"]
    assert "assert 1 == 2" in why["failed"] and why["skipped"].endswith("not now")


def test_a_step_ends_at_its_limit(tmp_path, out):
    start = time.monotonic()
    slow = step(tmp_path, "def test_slow(): time.sleep(60)", limit=8.0)
    gpu_first.run(slow, out, start + 60)
    tests, end = found(out)
    assert tests == {"test_slow": "stopped"} and end["said"] == "no time was left"
    assert time.monotonic() - start < 20


def test_a_step_without_time_is_not_begun(tmp_path, out):
    gpu_first.run(step(tmp_path, "def test_it(): pass"), out, time.monotonic() + 1)
    tests, end = found(out)
    assert not tests and end["said"] == "not begun: no time was left"


def test_a_file_that_cannot_be_imported_is_said(tmp_path, out):
    gpu_first.run(step(tmp_path, "import no_such_module"), out, time.monotonic() + 60)
    lines = gpu_lines.read(out.lines)
    (line,) = gpu_lines.of_kind(lines, "test")
    assert line["outcome"] == "failed" and "no_such_module" in line["why"]
    assert next(gpu_lines.of_kind(lines, "step"))["said"] == "ended with 2"


def test_a_line_that_was_cut_short_is_none(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"kind": "end", "step": ""}\n{"kind": "te')
    assert [line["kind"] for line in gpu_lines.read(path)] == ["end"]


def lines_of(step: str, said: str, **tests: str) -> list[dict]:
    found = [{"step": step, "kind": "test", "test": t, "outcome": o} for t, o in tests.items()]
    return [*found, {"step": step, "kind": "step", "said": said, "seconds": 1.0}]


def test_the_second_call_runs_what_failed_and_what_is_missing_and_loops_before_other_times(
    tmp_path,
):
    path = tmp_path / "results.jsonl"
    earlier = [
        *lines_of("load", "done"),
        *lines_of("values", "done", a="passed", b="died"),
        *lines_of("peaks", "done", c="passed"),
        *lines_of("network", "no time was left", d="passed", e="stopped"),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in earlier))
    planned = [(step.name, pick) for step, pick in gpu_first.plan(path, [])]
    assert planned[:3] == [
        ("load", "missing"),
        ("values", "failed"),
        ("values, newer ptxas", "missing"),
    ]
    alone = planned.index(("loops", "missing"))
    assert planned[alone + 1] == ("network", "failed") and planned[-1][0] == "memcheck"
    assert ("network", "missing") in planned and ("peaks", "missing") not in planned
    assert ("values", "missing") not in planned and ("extract", "missing") in planned
    first = [step.name for step, _ in gpu_first.plan(None, [])]
    assert first[:2] == ["load", "values"] and "loops" not in first


def test_failed_tests_run_again_with_their_error_in_full(tmp_path, out):
    long = "x" * 9000
    text = f"def test_good(): pass\ndef test_bad(): raise ValueError('begin {long} end')\n"
    chosen = step(tmp_path, text)
    gpu_first.run(chosen, out, time.monotonic() + 60)
    again = gpu_first.Out(tmp_path / "again", out.lines, tmp_path)
    gpu_first.run(chosen, again, time.monotonic() + 60, "failed")
    first, second = (gpu_lines.read(each.lines) for each in (out, again))
    assert [line["outcome"] for line in gpu_lines.of_kind(first, "test")] == ["passed", "failed"]
    (line,) = gpu_lines.of_kind(second, "test")
    assert line["outcome"] == "failed" and f"begin {long} end" in line["why"]
    assert "begin" in next(line["why"] for line in first if "why" in line)
    assert long not in next(line["why"] for line in first if "why" in line)


def test_an_unknown_step_is_named():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/gpu_first.py", "--only", "all"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "'all'" in done.stderr and "layers 256" in done.stderr


# --- the bundle ---------------------------------------------------------------------------------------


def bundle(tmp_path, csrc: str) -> Path:
    folder = tmp_path / "bundle"
    (folder / gpu_first.LIBRARIES).mkdir(parents=True)
    library = folder / gpu_first.LIBRARIES / "_cpu.abi3.so"
    library.write_bytes(b"library")
    files = {str(library.relative_to(folder)): {"sha256": hashlib.sha256(b"library").hexdigest()}}
    made = {"files": files, "sources": gpu_first.sources() | {"csrc": csrc}}
    (folder / gpu_first.MANIFEST).write_text(json.dumps(made))
    return folder


def test_a_damaged_or_stale_bundle_does_not_serve(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_first, "HOME", tmp_path)
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert "there is no" in gpu_first.unpack(tmp_path / "none")
    made = bundle(tmp_path, "of other sources")
    assert "csrc/ has changed" in gpu_first.unpack(made)
    (made / gpu_first.LIBRARIES / "_cpu.abi3.so").write_bytes(b"other")
    with pytest.raises(SystemExit, match="_cpu.abi3.so is not what manifest.json says"):
        gpu_first.unpack(made)


# --- tables -------------------------------------------------------------------------------------------


def layer(c_in: list[int], n: int, way: str, seconds: float) -> dict:
    return {
        "step": "layers 256", "kind": "case", "what": f"fused {c_in}", "way": way, "images": n,
        "layer": "fused", "c_in": c_in, "c_out": 64, "size": 64, "flops": 1e9, "percent_of_bound": 50.0,
        "seconds": {"median": seconds, "p10": seconds, "p90": seconds, "min": seconds, "rounds": 3},
    }  # fmt: skip


def line(kind: str, step: str = "", **values) -> dict:
    return {"step": step, "kind": kind} | values


def layers() -> list[dict]:
    ours, bare, library = "ours", "cuDNN bare", "cuDNN + epilogue"
    cases = [
        *(layer([64], n, way, t) for n in (1, 8) for way, t in ((ours, 2e-3), (bare, 1e-3))),
        *(layer([64], n, library, 3e-3) for n in (1, 8)),  # never faster
        layer([128], 1, ours, 1e-3),
        layer([128], 1, library, 2e-3),
        layer([128], 8, ours, 2e-3),
        layer([128], 8, library, 1e-3),
        layer([128], 64, ours, 4e-3),
        layer([128], 64, library, 1e-3),
        layer([256], 8, ours, 1e-3),
        layer([256], 8, library, 0.99e-3),  # by too little
        layer([512], 8, library, 1e-3),  # ours not measured
    ]
    peaks = line("peaks", flops=1e12, bytes_per_second=1e12)
    stopped = line("step", "layers 256", said="no time was left", seconds=9.0)
    return [line("machine", "load", **MACHINE), peaks, *cases, stopped]


def test_tables_of_nothing():
    for lines in ([], [line("call", libraries="of .dev")], [line("machine", **MACHINE)]):
        assert gpu_report.text(lines).startswith("# fastphi on ")


def test_table_of_layers():
    text = gpu_report.text(layers())
    assert "1 TFLOP/s bf16 matrix product" in text and "no time was left | 9.0" in text
    row = next(row for row in text.splitlines() if row.startswith("| fused [64] | 8 |"))
    assert row.split(" | ")[2:] == [
        *("2000.00", "50 %", "50 %", "1000.00", "100 %", "0.50×", "3000.00", "1.50× |")
    ]
    assert "| fused [512] | 8 | – | – | – % |" in text


def test_table_of_a_network():
    def case(way, seconds):
        made = {"step": "network", "what": "phi", "relative_error": 0.001}
        return layer([64], 8, way, seconds) | made

    peaks = line("peaks", flops=1e12, bytes_per_second=1e12)
    text = gpu_report.text([peaks, case("ours", 1e-3), case("eager", 3e-3)])
    assert "| phi | 8 | eager | 3.000 | 3.000 | – | 33 % | 3.00× | 1.0e-03 |" in text


def test_tests_that_fail_are_shown_and_a_later_word_counts():
    first = [
        line("test", "values", test="a", outcome="died", why="because"),
        line("test", "values", test="b", outcome="failed", why="therefore"),
    ]
    again = [line("test", "values", test="a", outcome="passed")]
    assert "because" in gpu_report.text(first)
    text = gpu_report.text(first + again)
    assert "| values | 1 | 1 | 0 | 0 | 0 |" in text
    assert "because" not in text and "therefore" in text


def test_bits_of_two_assemblers_are_compared():
    def value(what, step, bits):
        return line("value", step, what=what, error=1e-3, bits=bits, repeats=True)

    steps = ("values", "values, newer ptxas")
    lines = [value("denoise", step, "ab") for step in steps]
    lines += [value("phi", step, bits) for step, bits in zip(steps, ("ab", "cd"), strict=True)]
    text = gpu_report.text(lines)
    assert "| denoise | 1.0e-03 | 1.0e-03 | the same | yes |" in text
    assert "| phi | 1.0e-03 | 1.0e-03 | DIFFER | yes |" in text


def test_layers_go_to_cudnn_from_the_batch_on_from_which_it_is_faster():
    table = gpu_report.library_table(gpu_report.gather(layers()))
    (row,) = table["rows"]
    assert (row["c_in"], row["from_batch"], row["capability"]) == ([128], 8, [9, 0])
    committed = json.loads(gpu_report.LIBRARY.read_text())
    assert committed.keys() == table.keys()


def test_the_loop_of_a_match_is_the_one_that_measured_faster(monkeypatch):
    """A batch between those that were measured is the lower one's; without a measurement the host polls."""

    def case(n, loop, seconds):
        made = {"step": "loops", "what": "match to 1 %", "way": f"ours, {loop}", "loop": loop}
        return layer([64], n, "ours", seconds) | made

    times = [(1, 2e-3, 1e-3), (8, 2e-3, 1e-3), (64, 1e-3, 2e-3)]
    cases = [
        case(n, form, t) for n, *both in times for form, t in zip(gpu_loop.FORMS, both, strict=True)
    ]
    cases += [case(256, "poll", 1e-3), layer([64], 1, "eager", 1e-9)]
    made = gpu_report.loop_table(gpu_report.gather([line("machine", **MACHINE), *cases]))
    assert [row["images"] for row in made["rows"]] == [1, 8, 64]
    found = [gpu_loop.faster(n, [9, 0], made["rows"]) for n in (1, 4, 8, 32, 64, 512)]
    assert found == ["while"] * 4 + ["poll"] * 2
    assert gpu_loop.faster(1, [8, 0], made["rows"]) == gpu_loop.faster(1, [9, 0], []) == "poll"
    assert json.loads(gpu_report.LOOP.read_text()).keys() == made.keys()
    monkeypatch.setattr(gpu_loop, "table", lambda: made)
    assert "made up: 1: while, 8: while, 64: poll" in gpu_loop.text()


def test_a_gpus_row_in_the_readme():
    phi = {"step": "network", "what": "phi", "images": 256}
    lines = [
        line("call", libraries="of .dev"),
        line("machine", **MACHINE),
        line("test", "values", test="a", outcome="passed"),
        layer([64], 256, "ours", 256e-6) | phi,
        layer([64], 256, "eager", 512e-6) | phi,
    ]
    row = gpu_report.readme_row(gpu_report.gather(lines))
    assert "φ of 256: 1.0 µs an image (2.00× eager)" in row and "1 passed, 0 failed" in row
    readme = gpu_report.README.read_text()
    once = gpu_report.with_row(readme, row)
    assert row in once and once.count("none yet") < readme.count("none yet") + 1
    assert gpu_report.with_row(once, row) == once  # the same GPU's row is replaced
    rest = readme.split(gpu_report.BEGIN)[0], readme.split(gpu_report.END)[1]
    assert (once.split(gpu_report.BEGIN)[0], once.split(gpu_report.END)[1]) == rest


@pytest.mark.parametrize("option", ["--readme", "--choices"])
def test_a_pretended_gpus_figures_go_nowhere(option, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line("machine", **MACHINE | {"gpu": "pretended H100"})) + "\n")
    command = [sys.executable, ROOT / "tools/gpu_report.py", path, option]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "expected what a GPU said, got pretended H100" in done.stderr


# --- the loop's form, peers ---------------------------------------------------------------------------


def test_the_form_of_the_loop_can_be_asked_for(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("FASTPHI_MATCH_LOOP", "for")
    with pytest.raises(ValueError, match="FASTPHI_MATCH_LOOP: expected poll or while, got 'for'"):
        gpu_loop.chosen(1, cpu)
    monkeypatch.setenv("FASTPHI_MATCH_LOOP", "while")
    assert "FASTPHI_MATCH_LOOP asks" in gpu_loop.text()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="fastphi._graph cannot be imported|CUDA 12.4"):
            gpu_loop.chosen(1, cpu)
    monkeypatch.delenv("FASTPHI_MATCH_LOOP")
    assert gpu_loop.on_device(1, cpu) is None and gpu_loop.text().startswith("poll")


def test_the_layers_of_the_papers_network():
    """The work of an image, as it is known (csrc/README.md): 1.98 and 8.23 GFLOP."""
    config = UNetConfig()
    assert support.total_flops(config, 64, decoder=False) == pytest.approx(1.98e9, rel=2e-3)
    assert support.total_flops(config, 64, decoder=True) == pytest.approx(8.23e9, rel=1e-3)
    odd = UNetConfig(channels=(4, 6, 8), enc_layers=(1, 3), mid_layers=1, dec_layers=(2, 1))
    convolutions = sum(
        name.endswith("weight") for name, _ in support.network(odd).named_parameters()
    )
    assert sum(support.layers(odd, 16, decoder=True).values()) == convolutions


def test_the_peers_network_is_the_networks():
    model = support.network(UNetConfig(channels=(4, 6, 8)), backend="reference")
    x = support.images(2, model.config, 16, "cpu")
    for decoder, want in ((True, model(x)), (False, model.phi(x))):
        found = support.Plain(model, decoder=decoder)(x)
        assert support.relative_error(found, want) <= 1e-5
    assert torch.equal(x, support.images(2, model.config, 16, "cpu"))
