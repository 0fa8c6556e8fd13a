"""What captures leave behind, on a GPU (or a pretended one): the process as it was, and nothing shared."""

from __future__ import annotations

import gc
import logging

import gpu_case
import pytest
import torch

import fastphi
from fastphi.engine.gpu import capture
from fastphi.engine.gpu import runner as gpu
from fastphi.unet import UNet

pytestmark = [*gpu_case.marks(), pytest.mark.usefixtures("exact_products")]

DEVICE = torch.device("cuda", 0)


def network(seed: int = 0) -> UNet:
    return gpu_case.network(gpu_case.CONFIG, seed, "cuda").to(DEVICE).requires_grad_(False)


def images(n: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, gpu_case.SIZE, gpu_case.SIZE, generator=generator).to(DEVICE)


def breaks_a_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()


@pytest.fixture
def broken(monkeypatch):
    """Captures of plans fail, in the middle."""
    launch = gpu.Plan._launch

    def some(self):
        for i, one in enumerate(self.launches):
            one()
            if i == 3:
                breaks_a_capture()

    monkeypatch.setattr(gpu.Plan, "_launch", some)
    monkeypatch.setattr(capture, "_told", [])
    yield
    monkeypatch.setattr(gpu.Plan, "_launch", launch)


def test_a_failed_capture_costs_the_graph_alone(broken, monkeypatch, caplog):
    """The same values without it; stream, collector, generators and later captures are as before."""
    model, x, stream = network(), images(3), torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, "fastphi"):
        found, phi = model(x), model.phi(x)
    said = [r.message for r in caplog.records if "could not be captured" in r.message]
    assert len(said) == 1 and "launches one by one" in said[0]
    assert torch.cuda.current_stream() == stream and gc.isenabled()
    noise = torch.randn(5, device=DEVICE)  # torch's generators are in no capture
    assert noise.isfinite().all()
    monkeypatch.undo()
    whole = network()
    assert torch.equal(whole(x), found) and torch.equal(whole.phi(x), phi)
    runner = gpu.GPURunner(whole)
    runner.denoise(images(5))
    (plan,) = runner._plans.values()
    assert plan.graph is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = torch.randn(4, device=DEVICE) + x.sum()
    graph.replay()
    assert made.isfinite().all()


def test_a_stream_of_our_own_is_nobody_elses():
    mine = capture._stream(DEVICE)
    assert capture._stream(DEVICE) is mine
    others = {torch.cuda.Stream().cuda_stream for _ in range(70)}  # torch has 32
    assert mine.cuda_stream not in others
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        network()(images(2))
        assert torch.cuda.current_stream() == side


def test_a_callers_graph_shares_nothing_with_calls_outside():
    """It is replayed in one stream while the model is called in another, and neither waits."""
    model, x, y = network(), images(4), images(4, seed=2)
    want, other = model(x), model(y)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model(x)
        again = model(y)  # a second call in the same graph
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(side):
            graph.replay()
        assert torch.equal(model(y), other) and torch.equal(model(x), want)
    torch.cuda.synchronize()
    assert torch.equal(out, want) and torch.equal(again, other)


def test_two_graphs_of_a_caller_share_nothing():
    model, x, y = network(), images(4), images(4, seed=2)
    want, other = model.phi(x), model.phi(y)
    graphs, outs = [], []
    for batch in (x, y):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.no_grad(), torch.cuda.graph(graphs[-1]):
            outs.append(model.phi(batch))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(3):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(outs[0], want) and torch.equal(outs[1], other)


def test_a_callers_graph_lives_on_when_the_weights_move():
    """It answers as the model did when it was captured, though the model now has parameters elsewhere."""
    model, x = network(), images(2)
    want = model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model(x)
    model.double().float()  # other memory, the same values
    model(x)
    torch.cuda.empty_cache()
    graph.replay()
    assert torch.equal(out, want)


def test_a_batch_that_shrinks_is_captured_a_few_times():
    model = network()
    runner, x = gpu.GPURunner(model), images(64)
    whole = runner.denoise(x)
    captures, real = [], capture.captured

    def counted(*args, **options):
        captures.append(1)
        return real(*args, **options)

    from fastphi.engine.gpu import plan as gpu_plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_plan, "captured", counted)
        for n in range(63, 0, -1):
            assert torch.equal(runner.denoise(x[:n]), whole[:n])
    assert len(captures) <= 20


def test_a_capture_that_broke_once_is_made_at_the_next_use(monkeypatch):
    """As where another thread waited for the device meanwhile."""
    from fastphi.engine.gpu import plan as gpu_plan

    real, calls = capture.captured, []

    def once(*args, **options):
        calls.append(1)
        return real(*args, **options) if len(calls) > 1 else None

    monkeypatch.setattr(gpu_plan, "captured", once)
    runner, x = gpu.GPURunner(network()), images(3)
    first = runner.denoise(x)
    (plan,) = runner._plans.values()
    assert plan.graph is not None and len(calls) == 2
    assert torch.equal(runner.denoise(x), first) and len(calls) == 2


@gpu_case.counted
def test_what_a_call_asks_of_the_device():
    """A launch for each layer and up-sampling; of φ, one more for the means of all blocks."""
    model, x = network(), images(2)
    config = model.config
    encoder = sum(config.enc_layers) + config.mid_layers
    every = encoder + sum(config.dec_layers) + config.blocks
    for call, nodes in ((model, every), (model.phi, encoder + 1)):
        with torch.no_grad(), fastphi.frozen(model):
            call(x)
            gpu_case.counts()
            call(x)
        found = gpu_case.counts()
        assert found["replayed nodes"] == nodes and found["graph launch"] == 1, found
        # the image in, the result out
        assert found.get("emulated", 0) + found.get("kernel", 0) == 2, found
        assert not any("pageable" in what or "synchron" in what for what in found), found
