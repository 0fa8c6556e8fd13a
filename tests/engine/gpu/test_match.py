"""Guidance and reconstruction on a GPU at full size: gradients, graphs, company, streams, threads,
interrupts, memory.

What a kernel or a plan computes by itself is also tested without a GPU, in test_triton_*.py.
"""

from __future__ import annotations

import functools
import gc
import threading

import gpu_case
import pytest
import torch

import fastphi
from fastphi import reference, targets
from fastphi.engine.gpu import match as gpu_match
from fastphi.engine.gpu import runner as gpu
from fastphi.unet import UNet

pytestmark = [*gpu_case.marks(), pytest.mark.usefixtures("exact_products")]

DEVICE = torch.device("cuda", 0)
CONFIG, SIZE, BF16 = gpu_case.CONFIG, gpu_case.SIZE, torch.bfloat16
TOLERANCE = 0.3  # of the loss: such images stop after some updates, not all after as many


@functools.cache
def network() -> UNet:
    return gpu_case.network(CONFIG, 0, "cuda").to(DEVICE).requires_grad_(False)


def case(n: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, φ* of others, equal weights."""
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.rand(2, n, 3, SIZE, SIZE, generator=generator).to(DEVICE)
    with torch.no_grad():
        width = CONFIG.channels[-1]
        return x, network().phi(other), torch.full((width,), 1 / width, device=DEVICE)


def match(runner, x, target, weight, max_iter=12, tolerance=TOLERANCE, low=True):
    with torch.autocast("cuda", BF16, enabled=low):
        return runner.match(x, target, weight, 0.01, max_iter, tolerance)


def same(found, want) -> None:
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


# bfloat16: some 2^-8 per layer, forward and backward, and ReLUs that fall the other way: 0.23 at most in
# such a network on test_emulated.py's kernels, as of PyTorch's autocast. In float32 1e-5.


@pytest.mark.parametrize("low, tolerance", [(False, 1e-3), (True, 0.25)], ids=["fp32", "bf16"])
def test_gradient_against_float64(low, tolerance):
    x, target, weight = case(3)
    with torch.autocast("cuda", BF16, enabled=low):
        found = gpu_case.gradient_to_image(gpu.GPURunner(network()), x, target, weight)
    want = gpu_case.exact_gradient(network(), x, target, weight)
    for a, b in zip(found.double(), want, strict=True):
        assert float((a - b).norm() / b.norm()) <= tolerance


def test_agrees_with_the_reference_in_float64():
    x, target, weight = case(2)
    found = match(gpu.GPURunner(network()), x, target, weight, 5, 0.0, low=False)
    double = (t.double() for t in (x, target, weight))
    want = reference.ReferenceRunner(gpu_case.exact(network())).match(*double, 0.01, 5, 0.0)
    torch.testing.assert_close(found[1].double(), want[1], rtol=1e-2, atol=0)
    assert (found[0] - want[0]).abs().mean() < 1e-3  # Adam magnifies where a gradient is near 0


def test_replay_equals_eager_launches():
    x, target, weight = case(5)
    runner = gpu.GPURunner(network())
    match(runner, x, target, weight)
    (plan,) = runner._plans.values()
    assert plan.graph is not None
    results = []
    for run in (plan.run, lambda: [launch() for launch in plan.launches]):
        plan.start(x, target, weight, 0.01, 100, 0.0)
        for _ in range(3):
            run()
        results.append([t.clone() for t in (plan.x, plan.m, plan.v, plan.losses, plan.updates)])
    same(*results)


def test_a_loop_on_the_device_gives_the_same(monkeypatch):
    pytest.importorskip("fastphi._graph", reason="fastphi._graph is not built (pybind11)")
    given = case(6)
    want = match(gpu.GPURunner(network()), *given)
    monkeypatch.setenv("FASTPHI_MATCH_LOOP", "while")
    runner = gpu.GPURunner(network())
    for _ in range(2):
        same(match(runner, *given), want)
    (plan,) = runner._plans.values()
    assert plan.on_device is not None


def test_bits_do_not_depend_on_company():
    x, target, weight = case(70)
    whole = match(gpu.GPURunner(network()), x, target, weight)
    assert len(set(whole[2].tolist())) > 1, "else nobody stopped before others"
    for rows in (slice(0, 1), slice(3, 9), slice(40, 70)):
        part = match(gpu.GPURunner(network()), x[rows], target[rows], weight)
        same(part, [whole[0][rows], whole[1][:, rows], whole[2][rows], whole[3][rows]])


def test_streams_and_threads():
    """Matches of several sizes at once, each thread on a stream of its own."""
    runner, wrong = gpu.GPURunner(network()), []
    cases = [case(n, seed=n) for n in (1, 2, 5)]
    want = [match(gpu.GPURunner(network()), *given) for given in cases]
    torch.cuda.synchronize()

    def work(given, expected):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(4):
                    same(match(runner, *given), expected)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_interrupt_leaves_the_process_usable(monkeypatch):
    monkeypatch.setenv("FASTPHI_MATCH_LOOP", "poll")  # where there is something to interrupt
    given = case(8)
    runner = gpu.GPURunner(network())
    want = match(runner, *given)
    run, calls = gpu_match.MatchPlan.run, []

    def interrupted(plan):
        calls.append(run(plan))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu_match.MatchPlan, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        match(runner, *given, tolerance=0.0)
    monkeypatch.undo()
    same(match(runner, *given), want)


def test_a_callers_graph_is_refused():
    given = case(2)
    runner = gpu.GPURunner(network())
    match(runner, *given)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            given[0].add(1)  # torch warns of empty graphs
            match(runner, *given)


def test_replays_in_flat_memory_that_goes_with_the_runner():
    given = case(4)  # by the shared network, which keeps a plan for as many images
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    runner = gpu.GPURunner(network())
    match(runner, *given)
    held = torch.cuda.memory_allocated()
    for _ in range(60):
        match(runner, *given, tolerance=0.0)
    assert torch.cuda.memory_allocated() == held > before
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


@pytest.mark.parametrize("form", ["schedule", "adaptive"])
def test_reconstruction_end_to_end(form):
    """An image has the same bits whoever is made with it."""
    x, _, _ = case(3)
    options = dict(form=form, max_iter=6, samples=[5, 9, 2])
    options |= dict(sigmas=(1.0, 0.1, 4)) if form == "schedule" else dict(max_steps=4)
    with torch.autocast("cuda", BF16):
        whole = fastphi.reconstruct(
            network(), targets.from_images(network(), x, draws=2), **options
        )
        alone = fastphi.reconstruct(
            network(),
            targets.from_images(network(), x[1:2], draws=2, ids=[1]),
            **(options | dict(samples=[9])),
        )
    assert whole.images.is_cuda and whole.images.isfinite().all()
    assert whole.updates.shape == (4, 3) and (whole.updates > 0).any()
    assert torch.equal(alone.images[0], whole.images[1])


@gpu_case.counted
@pytest.mark.parametrize("form", ["schedule", "adaptive"])
def test_a_sampling_step_copies_no_pageable_memory(form):
    """Which waits for all that the device has to do, and cannot be captured."""
    x, _, _ = case(3)
    made = targets.from_images(network(), x, draws=3).with_channels([1, 2, 5])
    options = dict(sigmas=(1.0, 0.1, 3)) if form == "schedule" else dict(max_steps=3)
    steps: list[dict[str, int]] = []

    def callback(info):
        steps.append(gpu_case.counts())

    with torch.autocast("cuda", BF16):
        fastphi.reconstruct(network(), made, form=form, max_iter=3, callback=callback, **options)
    for found in steps[1:]:  # what a first step makes is made
        assert found.get("graph launch", 0) >= 2, found
        assert not [what for what in found if what.startswith("copy") and "pageable" in what], found


@gpu_case.counted
def test_draws_of_few_images_go_together():
    x, _, _ = case(2)
    made = targets.from_images(network(), x, draws=20)
    made.phi(0.5)
    gpu_case.counts()
    found = made.phi(0.5)
    assert gpu_case.counts()["graph launch"] == 1
    alone = torch.cat(
        [targets.from_images(network(), x[i : i + 1], draws=20, ids=[i]).phi(0.5) for i in (0, 1)]
    )
    assert torch.equal(found, alone)
