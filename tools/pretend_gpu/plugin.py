"""pytest on the pretended GPU (tools/gpu_pretend.py calls it with -p plugin): Triton's launchers are what
tests/engine/gpu/emulated.py states of them, and what a real device would mind fails the test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import emulate
import pytest

CANNOT = (  # a test's id: why it cannot pass here
    (r"test_spatial_mean.*bf16", "the CPU's operator takes no bfloat16"),
    (
        r"triton_kernels.*(test_errors_say|test_bad_arguments|test_an_empty_batch)",
        "launchers are stated, and look at no argument",
    ),
    ("test_rows_that_are_not_there", "the CPU's operator looks at the rows, the GPU's writes NaN"),
    ("test_tensors_on_two_devices_are_named", "the CPU's operator sees one memory"),
    ("test_under_torch_compile", "Inductor's kernels have no values here"),
    (
        "test_precision.py",
        "it trains the paper's network: bfloat16's numbers are test_emulated.py's",
    ),
)

MEANT = {"test_a_failed_capture": "breaks the capture of stream"}  # what it minds, and should


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for pattern, reason in CANNOT:
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=f"on the pretended GPU: {reason}"))


@pytest.fixture(autouse=True)
def _pretended_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    emulate.complaints()
    with emulate.stated_kernels():
        yield
    meant = next((words for name, words in MEANT.items() if name in request.node.name), None)
    found = [c for c in emulate.complaints() if meant is None or meant not in c]
    if found:
        pytest.fail("the pretended GPU minds:\n" + "\n".join(found[:8]), pytrace=False)
