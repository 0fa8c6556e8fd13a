"""A whole network with gradients in two calls (fastphi/engine/cpu/training.py): against the float64
reference, its bits whoever computes them, and what a user of torch.autograd does with it.
"""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch

from fastphi import reference
from fastphi.engine import cpu, ops
from fastphi.engine.cpu import training
from fastphi.unet import UNet

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))

# channel counts beside the vector's; all layers one; more levels than one
CONFIGS = {
    "multiples": dict(channels=(16, 32, 48), mid_layers=2, dec_layers=2),
    "odd": dict(channels=(20, 36, 52), image_channels=1, bias=False, residual=True, dec_layers=2),
    "one layer each": dict(channels=(17, 40), enc_layers=1, mid_layers=1, dec_layers=2),
    "deep": dict(channels=(16, 18, 33, 64), image_channels=4, enc_layers=(1, 3, 2), mid_layers=1),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# tiles cut by the border, one pixel high at the smallest level, and more than a strip
SIZES = [(2, 8, 24), (3, 40, 56), (1, 8, 136)]
# Largest error over largest element. Gradients: what a ReLU at 0 may differ by moves them more.
VALUE, GRADIENT = 1e-5, 2e-5


def images(model: UNet, n: int, h: int, w: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, model.config.image_channels, h, w, generator=generator)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    got, want = got.detach().double(), want.detach()
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
    assert got.shape == want.shape and error <= tolerance, f"{what}: {error:.2e} > {tolerance}"


def loss(model: UNet, x: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    out = model(x)
    return (out * (out.detach() + weight)).sum()


def gradients(model: UNet, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the image and of all parameters."""
    leaf = x.clone().requires_grad_()
    named = {"x": leaf, **dict(model.named_parameters())}
    return dict(zip(named, torch.autograd.grad(loss(model, leaf), [*named.values()]), strict=True))


def whole(model: UNet, x: torch.Tensor) -> bool:
    """Whether it is served at once."""
    nodes, names = [model(x).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(type(node).__name__)
            nodes += [n for n, _ in node.next_functions]
    return "_WholeBackward" in names


@each_config
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(make_model, config, size):
    model = make_model(**config)
    plain = make_model(backend="reference", **config).double()
    x = images(model, *size)
    assert whole(model, x)
    close(model(x), plain(x.double()), VALUE, "image")
    want = gradients(plain, x.double())
    for name, got in gradients(model, x).items():
        close(got, want[name], GRADIENT, name)


def test_the_full_network():
    """Where a ReLU's input is near 0 it falls the other way in any float32, which moves whole gradients
    by 1e-3 of their largest element (PyTorch's own by as much); so they are compared as one vector."""
    torch.manual_seed(0)
    model = UNet()
    plain = copy.deepcopy(model).double()
    plain.backend = "reference"
    x = images(model, 2, 64, 64)
    close(model(x), plain(x.double()), VALUE, "image")
    got, want = gradients(model, x), gradients(plain, x.double())
    away = sum(float((got[k].double() - want[k]).square().sum()) for k in want)
    assert away <= (1e-2) ** 2 * sum(float(g.square().sum()) for g in want.values())


@each_config
def test_it_is_the_runner_s_image_bit_for_bit(make_model, config):
    model = make_model(**config)
    x = images(model, 5, 24, 40)
    with torch.no_grad():
        want = model(x)
    assert torch.equal(model(x).detach(), want)


@each_config
def test_bits_depend_neither_on_threads_nor_on_company(make_model, config):
    model = make_model(**config)
    x = images(model, 5, 40, 56)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([model(x).detach(), *gradients(model, x).values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))

    def image_gradient(x):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        return leaf.grad

    assert torch.equal(image_gradient(x)[[3, 1]], image_gradient(x[[3, 1]]))


def test_weights_used_once_are_transformed_there_to_the_same_bits(make_model):
    """Few tiles: not packed; the same image among many: packed; the runner packs in either case."""
    model = make_model(channels=(16, 136), mid_layers=2, enc_layers=1, dec_layers=2)
    x = images(model, 18, 20, 12)  # 6 tiles each in the middle block

    def run(x):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        out.square().sum().backward()
        return out.detach(), leaf.grad

    with torch.no_grad():
        want = model(x)
    for part in (slice(0, 18), slice(3, 4), slice(4, 14)):
        out, grad = run(x[part])
        assert torch.equal(out, want[part])
        assert torch.equal(grad, run(x)[1][part])


def test_gradients_of_some_alone(make_model):
    """Of the image; of one parameter; of what is not frozen: as all together."""
    model = make_model(**CONFIGS["multiples"])
    x = images(model, 2, 16, 24)
    want = gradients(model, x)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss(model, leaf), leaf)
    assert torch.equal(got, want["x"])
    for name in ("enc1.0.weight", "mid.1.gamma", "up1.weight", "dec1.1.bias"):
        (got,) = torch.autograd.grad(loss(model, x), model.get_parameter(name))
        assert torch.equal(got, want[name])
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("dec"))
    loss(model, x).backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, want[name]) if name.startswith("dec") else p.grad is None


def test_second_derivatives(make_model):
    """create_graph: first by the engine's values, the second by plain PyTorch."""
    model = make_model(residual=True, **CONFIGS["multiples"])
    plain = copy.deepcopy(model).double()
    plain.backend = "reference"

    def penalty(m, x):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(m(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [leaf, *m.parameters()], allow_unused=True)

    x = images(model, 2, 8, 8)
    for got, want in zip(penalty(model, x), penalty(plain, x.double()), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            close(got, want, 1e-4, "second derivative")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_batched_gradients_are_those_one_by_one(make_model):
    model = make_model(**CONFIGS["odd"])
    x = images(model, 2, 8, 8).requires_grad_()
    out, rows = model(x), torch.eye(3, 2 * 64).view(3, *x.shape)
    ask = dict(outputs=out, inputs=[x, model.enc1[0].weight], retain_graph=True)
    together = torch.autograd.grad(grad_outputs=rows, is_grads_batched=True, **ask)
    for i, row in enumerate(rows):
        for all_rows, one in zip(
            together, torch.autograd.grad(grad_outputs=row, **ask), strict=True
        ):
            close(all_rows[i], one.double(), GRADIENT, "of a row")


def test_graphs_share_no_memory_and_give_it_back(make_model, monkeypatch):
    """Two graphs at a time, one of them gone back twice; then the next takes the first one's memory."""
    model = make_model(**CONFIGS["multiples"])
    x = images(model, 2, 16, 24)
    one, other = x.clone().requires_grad_(), x.flip(0).clone().requires_grad_()
    first, second = loss(model, one), loss(model, other)
    (g,) = torch.autograd.grad(first, one, retain_graph=True)
    (h,) = torch.autograd.grad(second, other)
    (again,) = torch.autograd.grad(first, one)
    assert torch.equal(g, again) and torch.equal(h, g.flip(0)) is False
    leaf = x.flip(0).clone().requires_grad_()
    assert torch.equal(h, torch.autograd.grad(loss(model, leaf), leaf)[0])

    taken: list[int] = []
    take = training.Memory.take

    def noted(self, kind, size):
        found = take(self, kind, size)
        taken.append(found.data_ptr())
        return found

    monkeypatch.setattr(training.Memory, "take", noted)
    del first, second
    gc.collect()
    for _ in range(3):
        model(x).sum().backward()
        model.zero_grad()
    assert len(set(taken[0::2])) == 1 and len(set(taken[1::2])) == 1, taken
    kept = [p.grad for p in model.parameters()]  # whoever holds a gradient keeps it
    model(x).sum().backward()
    held = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in held]
    model.zero_grad()
    model(2 * x).sum().backward()
    assert kept and all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_gradients_add_up(make_model):
    model = make_model(**CONFIGS["multiples"])
    x = images(model, 2, 16, 24)
    want = gradients(model, x)
    for _ in range(2):
        loss(model, x).backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, 2 * want[name])


def test_parameters_written_between_the_ways_are_an_error(make_model):
    model = make_model(**CONFIGS["multiples"])
    out = model(images(model, 1, 8, 8)).sum()
    with torch.no_grad():
        model.mid[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize(
    "config, dtype",
    [
        (dict(channels=(8, 16, 24)), torch.float32),  # sums over 8 channels
        (dict(channels=(16, 24), upsample_bias=True, dec_layers=2), torch.float32),
        (dict(channels=(16, 24), dec_layers=2), torch.float64),
    ],
)
def test_what_is_served_layer_by_layer(make_model, config, dtype):
    model = make_model(dtype=dtype, **config)
    assert not whole(model, images(model, 1, 8, 8).to(dtype))


def test_layer_by_layer_gives_the_same(make_model, monkeypatch):
    model = make_model(**CONFIGS["multiples"])
    x = images(model, 2, 16, 24)
    at_once = gradients(model, x)
    monkeypatch.setattr(cpu.CPUOps, "network", lambda *a: None)
    assert not whole(model, x)
    for name, want in gradients(model, x).items():
        close(at_once[name], want.double(), GRADIENT, name)


def test_other_parts_beside_do_not_count(make_model):
    model = make_model(**CONFIGS["multiples"])
    x = images(model, 1, 8, 8)
    want = gradients(model, x)
    model.head = torch.nn.Linear(48, 2)
    assert whole(model, x)
    model(x).sum().backward()
    assert model.head.weight.grad is None
    del model.head
    assert all(torch.equal(g, want[k]) for k, g in gradients(model, x).items())


def test_a_padded_and_a_strided_image(make_model):
    model = make_model(**CONFIGS["multiples"])
    x = images(model, 2, 16, 24)
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(gradients(model, strided)["x"], gradients(model, x)["x"])


# --- bad input ---


def arguments(model: UNet, x: torch.Tensor) -> dict:
    config, none = model.config, torch.empty(0)
    sizes = dict(
        channels=list(config.channels),
        enc_layers=list(config.enc_layers),
        mid_layers=config.mid_layers,
        dec_layers=list(config.dec_layers),
    )
    named = dict(model.named_parameters())
    layers = [n.removesuffix(".weight") for n in named if n.endswith(".weight")]
    parameters = [
        named.get(f"{at}.{kind}", none).detach()
        for at, kind in itertools.product(layers, ("weight", "bias", "gamma"))
    ]
    size = torch.ops.fastphi.unet_train_size(x, *sizes.values(), parameters)
    return dict(x=x, **sizes, eps=1e-6, parameters=parameters, kept=torch.empty(size))


def test_bad_arguments_are_named(make_model):
    model = make_model(**CONFIGS["multiples"])
    fwd, bwd = torch.ops.fastphi.unet_train_fwd, torch.ops.fastphi.unet_train_bwd
    good = arguments(model, images(model, 1, 8, 8))
    fwd(**good)
    less = good["parameters"][:-1]
    wrong = [good["parameters"][0][:1].clone(), *good["parameters"][1:]]
    for change, words in (
        (dict(x=good["x"].double()), "x: expected float32"),
        (dict(x=good["x"][:, :, :6]), "x: expected a contiguous tensor"),
        (dict(x=torch.rand(1, 3, 6, 8)), "x: height and width must be multiples of 4"),
        (dict(parameters=less), "packed: expected"),
        (dict(parameters=wrong), r"parameters\[0\]: expected shape"),
        (dict(kept=good["kept"][:-1]), "kept: expected shape"),
        (dict(channels=[8, 32, 48]), "expected"),
        (dict(dec_layers=[]), "expected"),
    ):
        with pytest.raises(RuntimeError, match=words):
            fwd(**good | change)
    back = dict(good, d_image=good["x"], need_image=True, gradients=torch.empty(0))
    for name in ("x", "eps"):
        back.pop(name)
    bwd(**back)
    for change, words in (
        (dict(gradients=torch.empty(7)), "gradients: expected shape"),
        (dict(kept=good["kept"][:-1]), "kept: expected shape"),
        (dict(d_image=good["x"][:, :2].contiguous()), "expected"),
    ):
        with pytest.raises(RuntimeError, match=words):
            bwd(**back | change)


def test_reference_is_not_asked(make_model):
    """Plain ops have no such call."""
    model = make_model(**CONFIGS["multiples"])
    assert reference.ReferenceOps().network(model, images(model, 1, 8, 8)) is None
