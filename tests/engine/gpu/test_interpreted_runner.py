"""The GPU engine's runner against the float64 reference: every block, part of a batch, kind of network.

Without a GPU its plans are walked launch by launch in Triton's interpreter; graphs, streams and full
size are test_runner.py's.
"""

from __future__ import annotations

import functools
import logging

import gpu_case
import numpy as np
import pytest
import torch
from triton_case import DEVICE, INTERPRETED, need_kernels

import fastphi
from fastphi import engine, noise, reference
from fastphi.config import UNetConfig
from fastphi.engine import ops, seam
from fastphi.engine.gpu import library as gpu_library
from fastphi.engine.gpu import runner as gpu
from fastphi.phi import chunk as phi_chunk
from fastphi.phi import extraction
from fastphi.unet import UNet

need_kernels()
if (reason := ops.missing() if INTERPRETED else gpu.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("exact_products")

SMALL = UNetConfig(channels=(16, 24, 32), dec_layers=(2, 3), enc_layers=(2, 1), mid_layers=2)
NETWORKS = {
    "small": (SMALL, (2, 3, 16, 16)),
    # grey, odd channels, no bias but for the up-sampling's, which ends the deferral; not square
    "odd": (
        UNetConfig(
            channels=(12, 20, 36),
            image_channels=1,
            bias=False,
            upsample_bias=True,
            residual=True,
            enc_layers=(1, 2),
            mid_layers=1,
            dec_layers=(2, 1),
        ),
        (1, 1, 8, 12),
    ),
    # four colours; one pooling
    "tiny": (
        UNetConfig(channels=(16, 16), image_channels=4, dec_layers=2, mid_layers=1),
        (3, 4, 6, 4),
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)

# Relative error in the 2-norm. fp32: of a sum of some hundred products, through some ten layers.
# bf16: inputs, weights and every stored activation are rounded to 8 bits (2^-9 each, unbiased);
# means over space average most of that away.
FP32, BF16_IMAGE, BF16_MEANS = 1e-6, 1e-2, 7e-3


@functools.cache
def network(name: str, seed: int = 0) -> UNet:
    return gpu_case.network(NETWORKS[name][0], seed).to(DEVICE)


def images(name: str, seed: int = 1, n: int | None = None) -> torch.Tensor:
    shape = NETWORKS[name][1]
    shape = shape if n is None else (n, *shape[1:])
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact(model: UNet) -> reference.ReferenceRunner:
    """The reference of the same weights, in float64 on the CPU."""
    return reference.ReferenceRunner(gpu_case.exact(model).cpu())


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Each image by itself."""
    got = got.double().cpu()
    assert got.shape == want.shape
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), f"{(a - b).norm() / b.norm():.2e}"


# --- values ----------------------------------------------------------------------------------------


@each_network
def test_denoise(name):
    model, x = network(name), images(name)
    got = gpu.GPURunner(model).denoise(x)
    assert got.dtype == torch.float32 and got.is_contiguous()
    near(got, exact(model).denoise(x.double().cpu()), FP32)


@each_network
def test_every_block_to_stop_at(name):
    """The same bits wherever the network stops."""
    model, x = network(name), images(name)
    runner, want = gpu.GPURunner(model), exact(model).block_means(x.double().cpu())
    whole = runner.block_means(x)
    assert list(whole) == list(model.config.block_names)
    for block, means in whole.items():
        assert means.dtype == torch.float32
        near(means, want[block], FP32)
    for i, until in enumerate(model.config.block_names):
        part = runner.block_means(x, until=until)
        assert list(part) == list(model.config.block_names[: i + 1])
        assert all(torch.equal(part[block], whole[block]) for block in part), until


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_low_precision(name):
    """Whichever way bfloat16 is asked for: by the images' dtype, or by autocast."""
    model, x = network(name), images(name)
    runner, want = gpu.GPURunner(model), exact(model)
    low = x.bfloat16()
    means = runner.block_means(low)
    denoised = runner.denoise(low)
    assert denoised.dtype == torch.bfloat16
    near(denoised, want.denoise(low.double().cpu()), BF16_IMAGE)
    for block, values in want.block_means(low.double().cpu()).items():
        assert means[block].dtype == torch.float32
        near(means[block], values, BF16_MEANS)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        same = runner.block_means(low.float())
        assert runner.denoise(x).dtype == torch.float32
        assert runner.denoise(x.double()).dtype == torch.float64
    assert all(torch.equal(same[block], means[block]) for block in means)


def test_tf32():
    """Factors with 10 bits, where torch's convolutions may have such."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    model, x = network("tiny"), images("tiny")
    near(gpu.GPURunner(model).denoise(x), exact(model).denoise(x.double().cpu()), 4e-3)


# --- noise made on the device ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_noisy_block_means_are_the_means_of_noisy_images(kind):
    model, sigma, stream = network("tiny"), 0.3, noise.stream("extract", 5)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4, 4), np.uint8)
    stored = torch.from_numpy(pixels).to(DEVICE)
    clean = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous() / 255
    rows, ids, draws = [2, 0, 2], [7, 5, 7], [0, 1, 3]
    z = noise.normal(3, ids, stream, draws, (4, 6, 4))
    x = (clean[rows] + sigma * z).to(DEVICE)
    runner = gpu.GPURunner(model)
    counters = [torch.tensor(v, device=DEVICE) for v in (rows, ids, draws)]
    got = runner.noisy_block_means(
        stored if kind == "uint8" else clean.to(DEVICE),
        counters[0], sigma, 3, counters[1], stream, counters[2], until="mid",
    )  # fmt: skip
    want = runner.block_means(x, until="mid")
    assert list(got) == list(want)
    assert all(torch.equal(got[block], want[block]) for block in want)


# --- what may not matter -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parts_of_a_batch_have_the_bits_of_the_whole(dtype, monkeypatch):
    model, x = network("tiny"), images("tiny", n=5).to(dtype)
    runner = gpu.GPURunner(model)
    whole, means = runner.denoise(x), runner.block_means(x, until="mid")
    monkeypatch.setattr(gpu, "CHUNK", 2 * 6 * 4)  # 2 + 2 + 1
    parts = gpu.GPURunner(model)
    assert torch.equal(parts.denoise(x), whole)
    for block, values in parts.block_means(x, until="mid").items():
        assert torch.equal(values, means[block])
    assert sorted(plan.n for plan in parts._plans.values()) == [1, 1, 2, 2]


def test_views_and_gradients_of_the_input_do_not_matter():
    model, x = network("tiny"), images("tiny")
    runner = gpu.GPURunner(model)
    view = x.flip(3).clone(memory_format=torch.channels_last).flip(3).requires_grad_()
    got = runner.denoise(view)
    assert torch.equal(got, runner.denoise(x)) and not got.requires_grad and got.is_contiguous()


def test_no_images_make_none():
    model = network("tiny")
    runner, none = gpu.GPURunner(model), images("tiny")[:0]
    assert runner.denoise(none).shape == none.shape
    assert runner.block_means(none, until="mid")["mid"].shape == (0, 16)


# --- weights, memory, modes --------------------------------------------------------------------------


def test_changed_weights_are_seen_and_stay_where_graphs_read_them():
    model, x = network("tiny", seed=3), images("tiny")
    runner = gpu.GPURunner(model)
    before = runner.denoise(x)
    (packed,) = runner._packed.values()
    places = [t.data_ptr() for t in packed._tensors()]
    with torch.no_grad():  # as an optimizer does
        torch._foreach_mul_(list(model.parameters()), 1.25)
    after = runner.denoise(x)
    assert not torch.equal(before, after)
    near(after, exact(model).denoise(x.double().cpu()), FP32)
    assert [t.data_ptr() for t in packed._tensors()] == places
    assert list(runner._packed.values()) == [packed] and len(runner._plans) == 1


def test_a_first_call_in_inference_mode_leaves_nothing_that_cannot_be_written():
    model, x = network("tiny", seed=4), images("tiny")
    runner = gpu.GPURunner(model)
    with torch.inference_mode():
        runner.block_means(x, until="enc1")
    with torch.no_grad():
        model.enc1[0].weight.mul_(2)
    means = runner.block_means(x, until="enc1")
    near(means["enc1"], exact(model).block_means(x.double().cpu(), "enc1")["enc1"], FP32)


def test_few_plans_are_kept_and_one_that_is_let_go_frees_its_memory(monkeypatch):
    import gc
    import weakref

    monkeypatch.setattr(gpu, "KEPT", 2)
    model, x = network("tiny"), images("tiny")
    runner = gpu.GPURunner(model)
    runner.denoise(x[:1])
    (first,) = map(weakref.ref, runner._plans.values())
    gc.disable()
    try:
        for n in (2, 3):
            runner.block_means(x[:n], until="enc1")
        assert first() is None, "in a cycle: its memory would wait for the garbage collector"
    finally:
        gc.enable()
    assert [plan.n for plan in runner._plans.values()] == [2, 3]


def test_few_plans_serve_every_batch():
    """Up to 8 images exactly as many, beyond at most a quarter more."""
    for n in range(1, 300):
        room = gpu.capacity(n)
        assert n <= room <= max(8, 1.25 * n) and gpu.capacity(room) == room
    assert [gpu.capacity(n) for n in (8, 16, 64, 256)] == [8, 16, 64, 256]
    assert len({gpu.capacity(n) for n in range(1, 65)}) == 20


@pytest.mark.parametrize("until", [None, "mid", "dec2"])
def test_nothing_is_read_before_it_is_written(until, monkeypatch):
    """All the memory of a plan poisoned but for its images: the same bits."""
    memory: list[torch.Tensor] = []
    new = gpu.Plan._new

    def kept(self, shape, dtype):
        memory.append(new(self, shape, dtype))
        return memory[-1]

    monkeypatch.setattr(gpu.Plan, "_new", kept)
    model, x = network("small"), images("small", n=1)[:, :, :8, :8]
    runner = gpu.GPURunner(model)
    want = {"image": runner.denoise(x)} if until is None else runner.block_means(x, until)
    (plan,) = runner._plans.values()
    assert memory[0] is plan.image
    for tensor in memory[1:]:
        tensor.fill_(torch.nan)
    plan.run()
    found = {"image": plan.denoised} if until is None else plan.means
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["small", "odd"])
def test_layers_that_a_library_convolves(name, monkeypatch):
    """By a table that names them; the library's results are rounded to bfloat16 once more."""
    config, (n, _, height, width) = NETWORKS[name]
    here = list(torch.cuda.get_device_capability()) if DEVICE.type == "cuda" else None
    levels = [(c, height >> i) for i, c in enumerate(config.channels)]
    rows = [
        dict(capability=here, c_in=c_in, c_out=c, size=size, from_batch=batch)
        for c, size in levels
        for c_in, batch in (([c], 1), ([c, c], 2))
    ]
    monkeypatch.setattr(gpu_library, "table", lambda: {"machine": {"gpu": "some"}, "rows": rows})
    model, x = network(name), images(name)[:, :, :, :height].bfloat16()
    x = torch.nn.functional.pad(x, (0, height - x.shape[3]))
    calls: list[int] = []
    layer = gpu_library.layer_fwd
    monkeypatch.setattr(
        gpu_library, "layer_fwd", lambda *a, **k: (calls.append(len(a[2])), layer(*a, **k))
    )
    runner = gpu.GPURunner(model)
    want, found = exact(model), runner.denoise(x)
    near(found, want.denoise(x.double().cpu()), 1.5 * BF16_IMAGE)
    assert 1 in calls and (2 in calls) == (n >= 2)
    for block, means in runner.block_means(x).items():
        near(means, want.block_means(x.double().cpu())[block], BF16_MEANS)
    assert "from batch 2" in gpu_library.text()


# --- behind the seam ---------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    """The engine "cuda" serves here, on whatever device the kernels run."""
    ours = next(e for e in engine.ENGINES if e.name == "cuda")
    refuses = lambda config, device, dtype: gpu.refuses_network(config, dtype)  # noqa: E731
    here = engine.Engine("cuda", ours.what, DEVICE.type, ours.ops, ours.runner, refuses)
    monkeypatch.setattr(seam, "ENGINES", (here, *(e for e in engine.ENGINES if e is not ours)))


@pytest.mark.usefixtures("served")
def test_the_model_calls_the_runner(caplog):
    model, x = network("tiny"), images("tiny")
    with torch.no_grad(), caplog.at_level(logging.WARNING, "fastphi"):
        assert engine.pick(model, x).name == "cuda"
        assert isinstance(engine.runner(model, x), gpu.GPURunner)
        near(model(x), exact(model).denoise(x.double().cpu()), FP32)
        near(model.phi(x), exact(model).block_means(x.double().cpu(), "mid")["mid"], FP32)
    assert not caplog.records


@pytest.mark.usefixtures("served")
def test_rows_that_a_batch_leaves_empty_are_numbers(monkeypatch):
    """Nine images run in a plan for ten; fresh memory is poisoned here."""
    model, x = network("tiny"), images("tiny").repeat(3, 1, 1, 1)
    new = gpu.Plan._new
    monkeypatch.setattr(gpu.Plan, "_new", lambda *a: new(*a).fill_(3e38))
    runner = engine.runner(model, next(model.parameters()))
    runner._plans.clear()  # the network is other tests', too
    means = runner.block_means(x)
    (plan,) = runner._plans.values()
    assert plan.n == 10 and not plan.image[9].any()
    assert all(mean.isfinite().all() for mean in (*means.values(), *plan.means.values()))


@pytest.mark.usefixtures("served")
def test_extraction_decodes_and_draws_on_the_device(tmp_path):
    """As the reference extracts; to the same bits however it is cut up, and when it goes on."""
    pixels = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    packed = fastphi.pack(tmp_path / "images.npy", tmp_path / "pack", size=8)
    model, options = network("small"), dict(sigmas=[0.0, 0.4], draws=3, blocks=["enc2", "mid"])
    job = extraction._job(model, packed, None, options["blocks"], 3, 0, None)
    assert job.on_device and phi_chunk.read(job, np.array([0, 2]))[0].dtype == torch.uint8
    store = fastphi.extract(model, packed, **options)
    plain = UNet(model.config, backend="reference")
    plain.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})
    want = fastphi.extract(plain, packed, **options)
    for sigma in (0.0, 0.4):
        for block in options["blocks"]:
            near(
                torch.tensor(store.array(sigma, block)),
                torch.tensor(want.array(sigma, block)).double(),
                FP32,
            )
    pieces = fastphi.extract(
        model, packed, tmp_path / "phi", batch=2, **options | {"sigmas": [0.4]}
    )
    assert pieces.sigmas == (0.4,)
    pieces = fastphi.extract(model, packed, tmp_path / "phi", batch=1, **options)
    for sigma in (0.0, 0.4):
        np.testing.assert_array_equal(pieces.array(sigma), store.array(sigma))
    assert pieces.manifest["engine"] == "cuda"
