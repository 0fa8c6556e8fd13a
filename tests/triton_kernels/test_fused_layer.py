"""The fused layer in Triton against float64: every branch of the kernel, every kind of tile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_case import Case, Inputs, Outputs, check_outputs, make, merged, oracle
from triton_case import (
    DEVICE,
    STORED,
    close,
    each_dtype,
    guarded,
    nchw,
    need_kernels,
    poisoned,
)

need_kernels()

from fastphi.triton_kernels import fused_layer, tiles  # noqa: E402

CASES = {
    "16 channels": Case(3, 16, 16, (16,), 16),
    "32 channels, 20×20": Case(1, 20, 20, (32,), 32),
    "64 channels, 10×10": Case(1, 10, 10, (64,), 64),
    "64 to 128, odd batch": Case(3, 8, 8, (64,), 128),
    "two sources": Case(3, 8, 8, (32, 16), 64),
    "two sources, first far larger": Case(2, 6, 4, (16, 32), 24, (1e2, 1e-9)),
    "two sources, second far larger": Case(2, 4, 6, (16, 16), 40, (1e-9, 1e2)),
    "channels between the steps": Case(2, 4, 4, (48,), 96),
    "channels padded by a whole step": Case(1, 3, 4, (96,), 32),
    "odd channels": Case(2, 10, 6, (12,), 20),
    "odd channels, two sources": Case(1, 4, 4, (36, 52), 36),
    "one pixel": Case(3, 1, 1, (16,), 16),
    "2×2": Case(1, 2, 2, (20,), 52),
    "3×5": Case(2, 3, 5, (16,), 32),
    "one column": Case(2, 7, 1, (12,), 12),
}
# too slow in the interpreter with the small tiles of fp32
WIDE = {
    "256 channels": Case(1, 4, 4, (128,), 256),
    "512 channels": Case(5, 2, 2, (512,), 512),
    "256 and 256 channels": Case(1, 4, 4, (256, 256), 128),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def launch(x: Inputs, **options) -> Outputs:
    n, h, w, c1 = x.r.shape
    c_out, dtype = len(x.weight), x.r.dtype
    c_in = (c1,) if x.r2 is None else (c1, x.r2.shape[3])
    slots = fused_layer.partials_per_image(c_in, c_out, h, w, dtype, DEVICE)
    boxes = fused_layer.sums_per_image(c_in, c_out, h, w, dtype, DEVICE)
    even = h % 2 == 0 and w % 2 == 0
    out = Outputs(
        poisoned(n, h, w, c_out, dtype=dtype),
        poisoned(n, h // 2, w // 2, c_out, dtype=dtype) if even else None,
        poisoned(n, slots, 3),
        poisoned(n, boxes, c_out),
    )
    packed = guarded(fused_layer.pack_weight(x.weight, c1 if x.r2 is not None else None, dtype))
    options = dict(bias=x.bias, gamma=x.gamma) | out._asdict() | options
    fused_layer.fused_layer_fwd(x.r, x.s, packed, r2=x.r2, s2=x.s2, **options)
    return out


@each_case
@each_dtype
def test_values(case, dtype):
    x = make(case, dtype)
    check_outputs(x, launch(x))


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_values_of_wide_layers(case, dtype):
    x = make(case, dtype)
    check_outputs(x, launch(x))


@pytest.mark.parametrize(
    "name", ["64 to 128, odd batch", "two sources", "channels between the steps"]
)
@pytest.mark.parametrize("dtype", [torch.float16], ids=["fp16"])
def test_values_by_pointers(name, dtype, monkeypatch):
    """What an sm_80 GPU runs."""
    monkeypatch.setattr(fused_layer, "capability", lambda device: 80)
    x = make(CASES[name], dtype)
    assert not tiles.tile(CASES[name].c_in, CASES[name].c_out, 8, 8, dtype, 80).descriptors
    check_outputs(x, launch(x))


@pytest.mark.parametrize("name", ["two sources", "odd channels"])
def test_tf32(name):
    """Each factor cut to 10 bits: up to 2e-3 of a product."""
    x = make(CASES[name], torch.float32)
    y = F.relu(x.gamma.double().cpu()[:, None, None] * oracle(x))
    close(nchw(launch(x, precision="tf32").r_out), y, 2e-3)


@each_dtype
def test_without_norm_bias_or_relu(dtype):
    x = make(Case(2, 4, 4, (16,), 16), dtype)
    z = oracle(x._replace(bias=torch.zeros_like(x.bias)))
    out = launch(x, bias=None, gamma=None, relu=False, partials=None, sums=None, pooled=None)
    for i in range(2):
        close(nchw(out.r_out)[i], z[i], STORED[dtype])
    for other in (out.partials, out.sums, out.pooled):
        assert other.isnan().all(), "not given, but written"


@pytest.mark.parametrize("only", ["partials", "sums", "pooled"])
def test_one_output_alone_is_what_it_is_among_others(only):
    x = make(Case(3, 8, 8, (16,), 16), torch.float16)
    among = launch(x)._asdict()[only]
    others = {name: None for name in Outputs._fields if name != only}
    assert torch.equal(launch(x, **others)._asdict()[only], among)


@pytest.mark.parametrize(
    "case",
    [Case(7, 8, 8, (16,), 32), Case(18, 4, 2, (16, 16), 16), Case(5, 6, 6, (12,), 20)],
    ids=["boxes of some images", "two sources", "odd channels"],
)
@each_dtype
def test_bits_do_not_depend_on_company(case, dtype):
    x = make(case, dtype)
    whole = launch(x)
    for i in (0, 1, case.n - 1):
        alone = Inputs(*(v if v is None else v[i : i + 1] for v in x[:4]), *x[4:])
        for name, tensor in launch(alone)._asdict().items():
            assert torch.equal(tensor[0], whole._asdict()[name][i]), name
    assert all(torch.equal(a, b) for a, b in zip(launch(x), whole, strict=True))


def test_a_large_mean_does_not_cancel():
    """mean 1000 std: Σz² − (Σz)²/n in fp32 would be left with one digit."""
    x = make(Case(1, 8, 8, (16,), 16), torch.float32)
    x = x._replace(bias=torch.full_like(x.bias, 1000 * float(x.s)), s=x.s)
    z = oracle(x)
    n, _, m2 = merged(launch(x).partials)
    assert abs((m2 / n).sqrt() - z.std(correction=0)) <= 2e-4 * z.std(correction=0)


@each_dtype
def test_a_nan_is_not_hidden_and_stays_within_its_reach(dtype):
    x = make(Case(2, 5, 6, (16,), 16), dtype)
    x.r[0, 1, 2, 3] = torch.nan
    reach = torch.zeros(2, 16, 5, 6, dtype=torch.bool)
    reach[0, :, 0:3, 1:4] = True
    assert torch.equal(nchw(launch(x).r_out).isnan(), reach)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs need a GPU")
def test_graph_replay_equals_eager():
    x = make(Case(5, 16, 16, (64,), 128), torch.bfloat16)
    want = launch(x)  # compiles, which a capture must not
    packed = fused_layer.pack_weight(x.weight, None, x.r.dtype)
    got = Outputs(*(torch.full_like(t, torch.nan) for t in want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_layer.fused_layer_fwd(x.r, x.s, packed, x.bias, x.gamma, **got._asdict())
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_errors_say_what_came_and_what_was_expected():
    x = make(Case(2, 4, 3, (16,), 16), torch.float16)
    packed = fused_layer.pack_weight(x.weight, None, x.r.dtype)
    out = poisoned(2, 4, 3, 16, dtype=torch.float16)

    def call(*args, **options):
        defaults = dict(r=x.r, s=x.s, weight=packed, bias=x.bias, gamma=x.gamma, r_out=out)
        fused_layer.fused_layer_fwd(**(defaults | options))

    for message, options in {
        r"s has shape \(1,\), expected \(2,\)": dict(s=x.s[:1]),
        r"weight .* has shape \(16, 16, 3, 3\), expected \(16, 144\)": dict(weight=x.weight),
        "bias is float64, expected float32": dict(bias=x.bias.double()),
        "r2 and s2 belong together, got only r2": dict(r2=x.r),
        "r_out is float32, expected float16": dict(r_out=out.float()),
        "pooled needs even height and width, got 4×3": dict(pooled=out),
        r"partials has shape \(2, 3\), expected": dict(partials=poisoned(2, 3)),
        "nothing to write": dict(r_out=None),
        "precision is 'fp8', expected 'ieee' or 'tf32'": dict(precision="fp8"),
        "r has strides .* dense": dict(r=x.r.transpose(1, 2).contiguous().transpose(1, 2)),
    }.items():
        with pytest.raises(ValueError, match="fused_layer_fwd: " + message):
            call(**options)
    with pytest.raises(ValueError, match="split is 16, expected between 1 and 15"):
        fused_layer.pack_weight(x.weight, 16, torch.float16)


def test_an_empty_batch_launches_nothing():
    x = make(Case(2, 4, 4, (16,), 16), torch.float16)
    empty = Inputs(x.r[:0], x.s[:0], None, None, *x[4:])
    assert launch(empty).r_out.shape == (0, 4, 4, 16)
