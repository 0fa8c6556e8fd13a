"""How much is tried, and the count of it: what the three suites share.

In `make test` the same few cases each time; by `make fuzz` others each time, EXAMPLES to a test, until
the minutes are over (tools/fuzz.py), with a count of what was tried, in FASTPHI_FUZZ_COUNTS.
"""

from __future__ import annotations

import atexit
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

LONG = int(os.environ.get("FASTPHI_FUZZ", "0"))  # examples to a test
tried: Counter[str] = Counter()


def some(short: int) -> Callable[[Any], Any]:
    """Settings of a test: `short` examples, the same ones each time, or LONG others."""
    return settings(
        max_examples=LONG or short,
        derandomize=not LONG,
        database=None,
        deadline=None,
        # what is found is made small by hand: shrinking takes the minutes of the others
        phases=(Phase.explicit, Phase.generate, *([] if LONG else [Phase.shrink])),
        suppress_health_check=list(HealthCheck),
    )


@atexit.register
def _write() -> None:
    if path := os.environ.get("FASTPHI_FUZZ_COUNTS"):
        with open(path, "a") as f:
            f.write(json.dumps(tried) + "\n")
