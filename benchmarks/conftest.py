"""pytest benchmarks/ [--benchmark-json FILE] [--results FILE]

Without pytest-benchmark, and in tools/gpu_first.py, a fixture of the same name runs each case once; the
times, which are the suites' own (support.py), are those of --results all the same.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path[1:1] = [str(HERE.parent / "tests/engine/gpu"), str(HERE.parent / "tools")]

import gpu_lines  # noqa: E402
import support  # noqa: E402


def pytest_addoption(parser) -> None:
    parser.addoption("--results", type=Path, help="JSON, written after every case")
    parser.addoption("--batch", type=int, action="append", help="only cases of so many images")
    parser.addoption("--way", action="append", help="only these ways, such as ours")


def pytest_collection_modifyitems(config, items) -> None:
    """A case that has no batch, or is of no one way, stays."""
    for option, name in (("--batch", "n"), ("--way", "way")):
        wanted = config.getoption(option)
        if wanted:
            items[:] = [
                item
                for item in items
                if getattr(item, "callspec", None) is None
                or item.callspec.params.get(name, wanted[0]) in wanted
            ]


@pytest.fixture(scope="session")
def results(request) -> support.Results:
    """Where tools/gpu_first.py runs it, each case is a line of its file as well."""
    also = gpu_lines.append if gpu_lines.wanted() else None
    return support.Results(request.config.getoption("--results"), also)


@pytest.fixture(scope="session")
def peaks(results) -> dict[str, float]:
    """What the GPU can do, measured in this run; or in an earlier step of the same one (gpu_first.py)."""
    lines = gpu_lines.read(os.environ["FASTPHI_LINES"]) if gpu_lines.wanted() else []
    earlier = next(gpu_lines.of_kind(lines, "peaks"), None)
    found = support.peaks() if earlier is None else earlier
    results.put(peaks=found)
    return found


if importlib.util.find_spec("pytest_benchmark") is None or gpu_lines.wanted():

    @pytest.fixture
    def benchmark() -> Any:
        def pedantic(call, **options):
            return call()

        return SimpleNamespace(pedantic=pedantic, extra_info={}, group=None)


@pytest.fixture
def timed(benchmark, results) -> Callable[..., dict[str, Any]]:
    """timed(case, call): times a call, or takes `times`, fills in the case and keeps it."""

    def run(
        case: dict[str, Any], call: Callable[[], Any], times: Any = None, **options: Any
    ) -> dict[str, Any]:
        on_gpu = case.get("device", "cuda") == "cuda"
        if times is None:
            times = (support.gpu_times if on_gpu else support.wall_times)(call, **options)
        found = case | {"seconds": support.summary(times)}
        if "images" in case:
            found["images_per_second"] = case["images"] / found["seconds"]["median"]
        if "bound" in case:
            found["percent_of_bound"] = 100 * case["bound"] / found["seconds"]["median"]
        results.add(found)
        if not benchmark.extra_info:  # of the first that a test times
            benchmark.extra_info.update(found)

            def once():
                call()
                if on_gpu:
                    torch.cuda.synchronize()

            benchmark.pedantic(once, rounds=3)
        return found

    return run


@pytest.fixture
def in_turn(benchmark, results) -> Callable[..., None]:
    """in_turn(case, calls, ...): times every way, round by round in turn, and keeps a case of each. A
    way that is a text instead of a call is kept as absent, with the text as the reason.
    """

    def run(
        case: dict[str, Any],
        calls: dict[str, Callable[[], Any] | str],
        extra: dict[str, dict[str, Any]] | None = None,
        difference: Callable[..., dict[str, list[float]]] = dict,
        **options: Any,
    ) -> None:
        case = case | {"device": "cpu"}
        for way, call in calls.items():
            if isinstance(call, str):
                results.add(case | {"way": way, "absent": call})
        there = {way: call for way, call in calls.items() if not isinstance(call, str)}
        for way, times in difference(support.in_turn(there, **options)).items():
            found = case | {"way": way, "seconds": support.summary(times)}
            results.add(found | (extra or {}).get(way, {}))
            benchmark.extra_info[way] = found["seconds"]["median"]
        benchmark.extra_info |= case
        benchmark.pedantic(next(iter(there.values())), rounds=1)

    return run
