"""Signals that end a run so that the same command goes on: at once, or at the end of what must be whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

# "Try again later" (EX_TEMPFAIL of sysexits.h): the exit code of a run that was stopped, or lost another
# rank, and goes on when the same command is given again. A script requeues on it.
RESUMABLE = 75

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []),
)


class Stopped(SystemExit):
    """A signal, SIGTERM or SIGUSR1, has ended the run: exit code 75."""

    def __init__(self, number: int) -> None:
        super().__init__(RESUMABLE)
        self.signal = signal.Signals(number).name

    def __str__(self) -> str:
        return f"stopped by {self.signal}"


class Interrupts:
    """Ctrl-C, SIGTERM and SIGUSR1: at once, but within `hold()` they wait for its end.

    SIGINT raises KeyboardInterrupt, the others Stopped. Outside the main thread, where Python delivers
    no signals, it does nothing. `ask()`: from then on the first signal raises nothing and is `asked`,
    for ranks that must end together; the second one raises.
    """

    def __init__(self) -> None:
        self._held = self._asks = False
        self._pending: int | None = None
        self.asked: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self._asks and self.asked is None:
            self.asked = number
        elif self._held:
            self._pending = number
        else:
            raise_for(number)

    def ask(self) -> None:
        self._asks = True

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
            number, self._pending = self._pending, None
        if number is not None:
            self._handle(number, None)


def raise_for(number: int) -> None:
    """What a signal of this number ends a run with."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)
