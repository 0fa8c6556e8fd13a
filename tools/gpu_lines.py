"""What gpu_first.py's steps find, one JSON object a line, synced as it comes; and the pytest plugin (-p
gpu_lines) that writes the outcome of each test.

The environment says where: FASTPHI_LINES the file, FASTPHI_STEP the step, FASTPHI_NOW a file that names the
test in progress, which a process that dies cannot say any more. A test that has an outcome is not run
again: a step that died goes on with the rest. FASTPHI_AGAIN and FASTPHI_PICK: of an earlier file, the tests
that "failed" there, or those "missing".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
BROKEN = 70  # exit code of a process whose device answers nothing but errors
FAILED = ("failed", "stopped", "died")
CUT, WHOLE = 2000, 50_000  # characters of an error; of the first one, when failed tests run again


def append(kind: str, **found: Any) -> None:
    """A line, whole and on the disk when this returns."""
    line: Line = {"step": os.environ.get("FASTPHI_STEP", ""), "kind": kind} | found
    data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
    file = os.open(os.environ["FASTPHI_LINES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def wanted() -> bool:
    return "FASTPHI_LINES" in os.environ


def read(path: str | Path) -> list[Line]:
    """Those of a file; one that a loss of power cut short at the end is none."""
    if not Path(path).exists():
        return []
    *lines, _ = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def of_kind(lines: list[Line], kind: str) -> Iterator[Line]:
    return (line for line in lines if line["kind"] == kind)


def outcomes(lines: list[Line]) -> dict[tuple[str, str], str]:
    """(step, test) -> the last outcome."""
    return {(line["step"], line["test"]): line["outcome"] for line in of_kind(lines, "test")}


class Plugin:
    def __init__(self) -> None:
        self.step, self.now = os.environ["FASTPHI_STEP"], Path(os.environ["FASTPHI_NOW"])
        self.pick = os.environ.get("FASTPHI_PICK", "")
        self.errors = 0

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        done = outcomes(read(os.environ["FASTPHI_LINES"]))
        before = outcomes(read(os.environ["FASTPHI_AGAIN"])) if self.pick else {}

        def chosen(item: Any) -> bool:
            if (self.step, item.nodeid) in done:
                return False
            outcome = before.get((self.step, item.nodeid))
            if self.pick == "failed":
                return outcome in FAILED
            return outcome is None

        kept = [item for item in items if chosen(item)]
        if os.environ.get("FASTPHI_ONE_EACH"):  # a test with many parameters once
            first = {item.nodeid.split("[")[0]: item for item in reversed(kept)}
            kept = [item for item in kept if first[item.nodeid.split("[")[0]] is item]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.now.write_text(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "passed" and report.when != "call":
            return
        found: Line = {"test": report.nodeid, "outcome": report.outcome}
        found["seconds"] = round(report.duration, 2)
        if report.failed:
            self.errors += 1
            most = WHOLE if self.pick == "failed" and self.errors == 1 else CUT
            found["why"] = error(report.longrepr, most)
        elif report.skipped:
            found["why"] = str(report.longrepr[-1] if report.longrepr else "")[:300]
        append("test", **found)
        if report.failed and (why := broken()):
            append("broken", test=report.nodeid, why=why)
            os._exit(BROKEN)  # what is left is run in a new process

    def pytest_runtest_logfinish(self) -> None:
        self.now.write_text("")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            append("test", test=report.nodeid, outcome="failed", why=error(report.longrepr, CUT))


def error(longrepr: Any, most: int) -> str:
    """Its message, and the end of what pytest shows of it."""
    text = str(longrepr)
    crash = getattr(longrepr, "reprcrash", None)
    if len(text) <= most or crash is None:
        return text[-most:]
    return f"{crash.path}:{crash.lineno}: {crash.message[:500]}\n…\n{text[-most:]}"


def broken() -> str:
    """Why this process's device can do no more, or nothing."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)[:500]
    return ""


def pytest_configure(config: Any) -> None:
    if wanted():
        config.pluginmanager.register(Plugin(), "fastphi-lines")
