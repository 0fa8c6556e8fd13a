"""pytest on the pretended GPU (tools/gpu_pretend.py calls it with -p plugin): Triton's launchers are what
tests/engine/gpu/emulated.py states of them, and what a real device would mind fails the test.
"""

from __future__ import annotations

from collections.abc import Iterator

import emulate
import pytest


@pytest.fixture(autouse=True)
def _pretended_gpu() -> Iterator[None]:
    emulate.complaints()
    with emulate.stated_kernels():
        yield
    if found := emulate.complaints():
        pytest.fail("the pretended GPU minds:\n" + "\n".join(found[:8]), pytrace=False)
