"""Shared by the tests: tiny models, and the engines that can serve on this machine."""

from __future__ import annotations

import os
import zlib

# Before torch: threads that wait sleep. Spinning, they take the cores from each other for as long as
# anything else runs on them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402

from fastphi import engine  # noqa: E402
from fastphi.config import UNetConfig  # noqa: E402
from fastphi.unet import UNet  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="of the tests' random inputs")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """A test's draws are its own, whatever ran before it: one that fails does so alone too."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + request.config.getoption("seed"))


@pytest.fixture(autouse=True)
def _two_threads():
    """Small shapes: more threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact_products():
    """float32 products on a GPU as the float64 reference's are, not in tf32."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


@pytest.fixture(params=[e.name for e in engine.ENGINES if e.made_for(torch.device("cpu"))])
def backend(request) -> str:
    """Every engine for the CPU in turn; one that cannot serve here is skipped, saying why."""
    chosen = next(e for e in engine.ENGINES if e.name == request.param)
    reason = chosen.refuses(UNetConfig(), torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def make_model():
    """make_model(seed=0, backend="auto", dtype=torch.float32, **config): a small random UNet.

    Gains of both signs and biases other than 0, so that no term of the layer is invisible.
    """

    def make(seed=0, backend="auto", dtype=torch.float32, **config) -> UNet:
        config.setdefault("channels", (4, 6, 8))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = UNet(UNetConfig(**config), backend=backend).to(dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith(("bias", "beta")):
                        parameter.normal_(0, 0.1)
                    elif name.endswith("gamma"):
                        parameter.normal_(0.3, 1.0)
        return model.eval()

    return make
