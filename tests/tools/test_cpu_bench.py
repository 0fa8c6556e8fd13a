"""What make bench prints of what it measured (made-up figures)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import cpu_bench  # noqa: E402


def case(way: str, **values) -> dict:
    return {"what": "phi", "images": 8, "size": 64, "way": way, **values}


def seconds(median: float) -> dict:
    return {"median": median, "min": median / 2}


def test_table():
    found = {
        "machine": {"torch": "2.13", "threads": 2},
        "cases": [
            case("ours", seconds=seconds(0.01), flops=1e9, error=2e-7),
            case("peer", seconds=seconds(0.025)),
            case("other", absent="not installed (No module named 'other')"),
            case("ours bf16", seconds=seconds(0.004)),
            case("peer bf16", seconds=seconds(0.008)),
            case("ours", seconds=seconds(0.5), steps=5) | {"what": "guidance"},
        ],
    }
    lines = cpu_bench.text(found).splitlines()
    assert lines[0] == "torch 2.13, threads 2"
    assert lines[3] == "| | images | size | ours | peer | other | ours bf16 | peer bf16 |"
    assert lines[5] == (
        "| phi | 8 | 64 | 10 ms, 100 GFLOP/s, error 2e-07 | 25 ms, 2.50× (2.50×)"
        " | absent: not installed (No module named 'other') | 4 ms | 8 ms, 2.00× (2.00×) |"
    )
    assert lines[6] == "| guidance | 8 | 64 | 100 ms | – | – | – | – |"


def test_unknown_suites_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cpu_bench.py", "networks"])
    with pytest.raises(SystemExit, match="2"):
        cpu_bench.main()
    assert "suites: expected network, layers, memory; got networks" in capsys.readouterr().err
