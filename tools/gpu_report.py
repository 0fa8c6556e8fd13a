"""A pytest plugin: outcomes of tests in a JSON file that is whole after each of them (gpu_suite.py)."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Report:
    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()
        self.found: dict[str, Any] = {
            "machine": {},
            "passed": 0,
            "failed": {},
            "skipped": {},
            "slowest": {},
            "finished": False,
        }

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.found["failed"][report.nodeid] = str(report.longrepr)[-3000:]
        elif report.skipped:
            reason = (
                report.longrepr[-1] if isinstance(report.longrepr, (tuple, list)) else "as expected"
            )
            skipped = self.found["skipped"]
            skipped[reason] = skipped.get(reason, 0) + 1
        elif report.when == "call":
            self.found["passed"] += 1
            slowest = self.found["slowest"] | {report.nodeid: round(report.duration, 2)}
            kept = sorted(slowest.items(), key=lambda item: -item[1])[:10]
            self.found["slowest"] = dict(kept)
        self.write()

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.found["failed"][report.nodeid] = str(report.longrepr)[-3000:]
            self.write()

    def pytest_sessionfinish(self) -> None:
        self.found["finished"] = True
        self.write()

    def write(self) -> None:
        self.found["seconds"] = round(time.monotonic() - self.start, 1)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(self.path)


def pytest_configure(config) -> None:
    path = os.environ.get("FASTPHI_REPORT")
    if path and not hasattr(config, "workerinput"):  # one of pytest-xdist's workers
        config.pluginmanager.register(Report(Path(path)), "fastphi-report")
