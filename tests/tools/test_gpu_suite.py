"""The tools round the GPU's measurements, without a GPU: tables, the table of cuDNN's layers, arguments.

The numbers here are made up: they are no figures of any machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import gpu_library_table  # noqa: E402
import gpu_loop_table  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_tables  # noqa: E402
import support  # noqa: E402

from fastphi.config import UNetConfig  # noqa: E402
from fastphi.engine.gpu import loop as gpu_loop  # noqa: E402

MACHINE = {"gpu": "made up", "capability": [9, 0]}


def layer(c_in: list[int], n: int, way: str, seconds: float) -> dict:
    return {
        "what": f"fused {c_in}", "way": way, "images": n, "kind": "fused", "c_in": c_in, "c_out": 64,
        "size": 64, "flops": 1e9, "percent_of_bound": 50.0,
        "seconds": {"median": seconds, "p10": seconds, "p90": seconds, "min": seconds, "rounds": 3},
    }  # fmt: skip


def layers() -> dict:
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
    peaks = {"flops": 1e12, "bytes_per_second": 1e12}
    return {"machine": MACHINE, "peaks": peaks, "cases": cases, "ended": "stopped after 9 s"}


@pytest.mark.parametrize("part", list(gpu_suite.PARTS))
def test_tables_of_nothing(part):
    for found in ({}, {"machine": {}, "cases": [], "ended": "it broke"}):
        assert gpu_tables.text(part, found).startswith(f"## {part}\n")


def test_table_of_layers():
    text = gpu_tables.text("layers", layers())
    assert "1 TFLOP/s bf16 matrix product" in text and "stopped after 9 s" in text
    line = next(row for row in text.splitlines() if row.startswith("| fused [64] | 8 |"))
    assert line.split(" | ")[2:] == [
        *("2000.00", "50 %", "50 %", "1000.00", "100 %", "0.50×", "3000.00", "1.50× |")
    ]
    assert "| fused [512] | 8 | – | – | – % |" in text


def test_table_of_a_network():
    def case(way, seconds):
        return layer([64], 8, way, seconds) | {"what": "phi", "relative_error": 0.001}

    found = {"cases": [case("ours", 1e-3), case("eager", 3e-3)], "peaks": {"flops": 1e12}}
    found["peaks"]["bytes_per_second"] = 1e12
    text = gpu_tables.text("phi", found)
    assert "| phi | 8 | eager | 3.000 | 3.000 | – | 33 % | 3.00× | 1.0e-03 |" in text


def test_tests_that_fail_are_shown():
    found = {"passed": 3, "failed": {"test_it": "because"}, "skipped": {"no": 2}, "finished": False}
    text = gpu_tables.text("kernels", found)
    assert "3 passed, 1 failed, 2 skipped" in text and "because" in text and "its end" in text


def test_layers_go_to_cudnn_from_the_batch_on_from_which_it_is_faster(tmp_path):
    table = gpu_library_table.table(layers(), by=1.03)
    (row,) = table["rows"]
    assert (row["c_in"], row["from_batch"], row["capability"]) == ([128], 8, [9, 0])
    committed = json.loads(gpu_library_table.TABLE.read_text())
    assert committed.keys() == table.keys()


def test_the_loop_of_a_match_is_the_one_that_measured_faster(monkeypatch):
    """A batch between those that were measured is the lower one's; without a measurement the host polls."""

    def case(n, loop, seconds):
        return layer([64], n, "ours", seconds) | {"what": "match to 1 %", "loop": loop}

    times = [(1, 2e-3, 1e-3), (8, 2e-3, 1e-3), (64, 1e-3, 2e-3)]
    cases = [
        case(n, form, t) for n, *both in times for form, t in zip(gpu_loop.FORMS, both, strict=True)
    ]
    cases += [case(256, "poll", 1e-3), layer([64], 1, "eager", 1e-9)]
    made = gpu_loop_table.table({"machine": MACHINE, "cases": cases})
    assert [row["images"] for row in made["rows"]] == [1, 8, 64]
    found = [gpu_loop.faster(n, [9, 0], made["rows"]) for n in (1, 4, 8, 32, 64, 512)]
    assert found == ["while"] * 4 + ["poll"] * 2
    assert gpu_loop.faster(1, [8, 0], made["rows"]) == gpu_loop.faster(1, [9, 0], []) == "poll"
    assert json.loads(gpu_loop_table.TABLE.read_text()).keys() == made.keys()
    monkeypatch.setattr(gpu_loop, "table", lambda: made)
    assert "made up: 1: while, 8: while, 64: poll" in gpu_loop.text()


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


def test_the_outcomes_of_tests_are_written_as_they_come(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='not now')\ndef test_none(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_report", "-p", "no:cacheprovider"]
    path = tmp_path / "found.json"
    wrong, finished = gpu_suite.run(
        [*command, str(tmp_path / "test_some.py")], 60, FASTPHI_REPORT=str(path)
    )
    assert "ended with 1" in wrong and finished
    found = json.loads(path.read_text())
    assert found["passed"] == 1 and found["finished"] and sum(found["skipped"].values()) == 1
    assert "assert 1 == 2" in next(iter(found["failed"].values()))


def test_a_part_that_takes_too_long_is_stopped():
    wrong, finished = gpu_suite.run([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert "stopped after 1 s" in wrong and not finished


def test_an_unknown_part_is_named():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/gpu_suite.py", "all"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "'all'" in done.stderr and "layers" in done.stderr


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
