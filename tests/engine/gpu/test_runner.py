"""The GPU engine on a GPU at full size: values, graphs, streams, threads, memory, extraction.

What a kernel or a plan computes by itself is also tested without a GPU, in test_triton_*.py.
"""

from __future__ import annotations

import functools
import gc
import threading

import gpu_case
import numpy as np
import pytest
import torch

import fastphi
from fastphi import reference
from fastphi.config import UNetConfig
from fastphi.engine.gpu import runner as gpu
from fastphi.phi.store import Writer
from fastphi.unet import UNet

pytestmark = [*gpu_case.marks(), pytest.mark.usefixtures("exact_products")]

DEVICE = torch.device("cuda", 0)
CONFIG, SIZE = gpu_case.CONFIG, gpu_case.SIZE
# Relative, in the 2-norm, of an image: see test_interpreted_runner.py. The sums are longer here.
FP32, TF32 = 3e-6, 1e-2


def make(config: UNetConfig = CONFIG, seed: int = 0) -> UNet:
    return gpu_case.network(config, seed, backend="cuda").to(DEVICE)


@functools.cache
def network() -> UNet:
    """Shared: its weights stay as they are."""
    return make().requires_grad_(False)


def images(n: int, seed: int = 1, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=generator).to(DEVICE)


def in_bf16(call, x: torch.Tensor):
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        return call(x)


@functools.cache
def exact() -> reference.ReferenceRunner:
    """The reference of the shared network, in float64."""
    double = UNet(CONFIG).double().to(DEVICE)
    double.load_state_dict(network().state_dict())
    return reference.ReferenceRunner(double.eval())


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Each image by itself; NaN is never near."""
    assert got.shape == want.shape
    for a, b in zip(got.double(), want, strict=True):
        error = float((a - b).norm() / b.norm())
        assert error <= tolerance, f"{error:.2e} > {tolerance:.0e}"


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, tolerance", [("ieee", FP32), ("tf32", TF32)])
def test_full_size_against_float64(precision, tolerance):
    torch.backends.cudnn.conv.fp32_precision = precision
    model, x = network(), images(5)
    near(model(x), exact().denoise(x.double()), tolerance)
    for block, want in exact().block_means(x.double()).items():
        near(model.block_means(x)[block], want, tolerance)


def test_bf16_against_float64():
    """Relative error at most 2e-2, the cosine of φ at least 0.9995."""
    model, x = network(), images(5)
    near(in_bf16(model, x), exact().denoise(x.double()), 2e-2)
    found, want = in_bf16(model.block_means, x), exact().block_means(x.double())
    for block in want:
        near(found[block], want[block], 2e-2)
    cosine = torch.nn.functional.cosine_similarity(found["mid"].double(), want["mid"])
    assert cosine.min() >= 0.9995


@pytest.mark.parametrize("size", [8, 80], ids=str)
def test_other_sizes(size):
    """80: levels of 20×20 and 10×10, which no tile divides; 8: a middle block of one pixel."""
    model, x = network(), images(3, size=size)
    near(model(x), exact().denoise(x.double()), FP32)
    near(in_bf16(model, x), exact().denoise(x.double()), 2e-2)


def test_bits_do_not_depend_on_company():
    """1, some, one launch's worth and more than that."""
    model, x = network(), images(300)
    whole, means = in_bf16(model, x), in_bf16(model.phi, x)
    for rows in (slice(0, 1), slice(3, 20), slice(290, 300), slice(40, 296)):
        assert torch.equal(in_bf16(model, x[rows]), whole[rows])
        assert torch.equal(in_bf16(model.phi, x[rows]), means[rows])


# --- graphs ------------------------------------------------------------------------------------------


def test_replay_equals_eager_launches_and_writes_every_value(monkeypatch):
    """With all the memory of the plan poisoned before both."""
    memory: list[torch.Tensor] = []
    new = gpu.Plan._new

    def poisoned(self, shape, dtype):
        memory.append(new(self, shape, dtype))
        return memory[-1].fill_(torch.nan)

    monkeypatch.setattr(gpu.Plan, "_new", poisoned)
    runner, x = gpu.GPURunner(network()), images(5)
    want = in_bf16(runner.denoise, x)
    (plan,) = runner._plans.values()
    assert plan.graph is not None and plan.image is memory[0]
    results = []
    for run in (plan.run, lambda: [launch() for launch in plan.launches]):
        for tensor in memory[1:]:
            tensor.fill_(torch.nan)
        run()
        results.append(plan.denoised.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], want)


def test_a_callers_graph():
    """First a call outside of it, of any number of images of that size, or an error that says so."""
    model, x = make(seed=5), images(3)
    graph = torch.cuda.CUDAGraph()
    for _ in range(2):  # weights not packed; packed, but no such size
        with pytest.raises(RuntimeError, match="call the model once with such a batch first"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                x.add(1)  # torch warns of empty graphs
                in_bf16(model, x)
        in_bf16(model, images(1, size=SIZE // 2))
    in_bf16(model, x[:1])
    want = in_bf16(model, x)
    other = images(3, seed=2)
    after = in_bf16(model, other)
    place = x.clone()
    with torch.no_grad(), torch.cuda.graph(graph), torch.autocast("cuda", torch.bfloat16):
        out = model(place)
    for source, result in ((x, want), (other, after)):
        place.copy_(source)
        graph.replay()
        assert torch.equal(out, result)


# --- who else is there ---------------------------------------------------------------------------------


def test_streams_share_a_plan():
    """Calls on two streams, none waited for: each finds its own images, not the other's."""
    model = network()
    batches = [images(32, seed=s) for s in range(6)]
    want = [in_bf16(model.phi, x) for x in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found = []
    for i in range(24):
        with torch.cuda.stream(streams[i % 2]):
            found.append(in_bf16(model.phi, batches[i % 6]))
    torch.cuda.synchronize()
    assert all(torch.equal(phi, want[i % 6]) for i, phi in enumerate(found))


def test_threads_share_a_model():
    """Plans made while others run; each thread on a stream of its own."""
    model = make(seed=6)
    batches = [images(n, seed=n) for n in (1, 2, 5, 9)]
    wrong: list[object] = []

    def work(x):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                first = in_bf16(model.phi, x)
                for _ in range(20):
                    if not torch.equal(in_bf16(model.phi, x), first):
                        wrong.append(len(x))
        except Exception as error:
            wrong.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(x,)) for x in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    twin = network_like(model)
    assert all(torch.equal(in_bf16(model.phi, x), in_bf16(twin.phi, x)) for x in batches)


def network_like(model: UNet) -> UNet:
    """Another model of the same weights."""
    twin = UNet(model.config, backend="cuda").to(DEVICE)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def test_weights_change_while_work_is_under_way():
    """Calls before the change have the old ones, calls after it the new ones; nothing is waited for."""
    model, x = make(seed=7), images(64)
    twin = network_like(model)
    with torch.no_grad():
        torch._foreach_mul_(list(twin.parameters()), 1.5)
    old, new = in_bf16(model.phi, x), in_bf16(twin.phi, x)
    found = [in_bf16(model.phi, x) for _ in range(10)]
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.5)
    found += [in_bf16(model.phi, x) for _ in range(3)]
    assert all(torch.equal(phi, old) for phi in found[:10])
    assert all(torch.equal(phi, new) for phi in found[10:])


def test_a_model_that_goes_gives_its_memory_back():
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model, x = make(seed=8), images(16)
    in_bf16(model, x)
    held = torch.cuda.memory_allocated()
    del model, x
    gc.collect()
    torch.cuda.empty_cache()
    assert held > before and torch.cuda.memory_allocated() <= before + (1 << 20)


# --- extraction ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(3).integers(0, 256, (150, SIZE, SIZE, 3), np.uint8)
    np.save(folder / "images.npy", pixels)
    return fastphi.pack(folder / "images.npy", folder / "pack", size=SIZE)


def test_extraction_is_the_cpus(packed):
    """Few images, as the CPU is slow; the noise is the same."""
    model = network()
    twin = UNet(CONFIG)
    twin.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})
    options = dict(sigmas=[0.0, 0.5], draws=2, blocks="all", indices=[0, 149, 7])
    want = fastphi.extract(twin.eval(), packed, **options)
    found = fastphi.extract(model, packed, **options)
    low = fastphi.extract(model, packed, dtype=torch.bfloat16, **options)
    for sigma in (0.0, 0.5):
        for block in want.blocks:
            expected = torch.tensor(want.array(sigma, block)).double()
            near(torch.tensor(found.array(sigma, block)), expected, 2 * FP32)
            near(torch.tensor(low.array(sigma, block)), expected, 2e-2)


def test_extraction_goes_on_where_it_stopped_to_the_same_bits(packed, tmp_path, monkeypatch):
    model, options = network(), dict(sigmas=[0.0, 0.3], draws=20, dtype=torch.bfloat16)
    whole = fastphi.extract(model, packed, batch=64, **options)
    write, calls = Writer.write, []

    def stops(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(Writer, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        fastphi.extract(model, packed, tmp_path / "phi", batch=40, **options)
    monkeypatch.undo()
    store = fastphi.PhiStore(tmp_path / "phi")
    assert sum(map(len, store.missing().values())) == 300 - 80
    store = fastphi.extract(model, packed, tmp_path / "phi", batch=33, **options)
    for sigma in (0.0, 0.3):
        np.testing.assert_array_equal(store.array(sigma), whole.array(sigma))
