"""The plain form of every op and loop: the truth that everything faster is tested against.

It follows the paper (arXiv 2506.01912) line by line, runs in any floating dtype on any device
(float64 for the oracle), and is never optimised. Activations are NCHW; nothing is deferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# --- ops ------------------------------------------------------------------------------------------


def std_norm(z: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """γ_c z / (std(z) + ε): one image's std over all of C, H, W, biased; no mean is subtracted.

    z: (N, C, H, W); gamma: (C,).
    """
    std = z.std(dim=(1, 2, 3), keepdim=True, correction=0)
    return gamma[:, None, None] * z / (std + eps)


def layer_norm(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """The textbook form: γ_c (z − mean)/√(var + ε) + β_c over all of C, H, W."""
    mean = z.mean(dim=(1, 2, 3), keepdim=True)
    var = z.var(dim=(1, 2, 3), keepdim=True, correction=0)
    return gamma[:, None, None] * (z - mean) / (var + eps).sqrt() + beta[:, None, None]


def spatial_mean(y: Tensor) -> Tensor:
    """ā: (N, C, H, W) -> (N, C)."""
    return y.mean(dim=(2, 3))


_LOW = (torch.bfloat16, torch.float16)


@torch.fx.wrap  # a symbolic trace has no dtype to look at
def _lowered(h: Tensor, weight: Tensor) -> Tensor:
    """h in the dtype of low-precision weights: behind a norm it is float32."""
    return h.to(weight.dtype) if weight.dtype in _LOW else h


@torch.fx.wrap
def _widened(z: Tensor) -> Tensor:
    """Statistics of low-precision activations are taken in float32."""
    return z.float() if z.dtype in _LOW else z


class ReferenceOps:
    """The ops of the seam (see `fastphi.engine.Ops`) on plain NCHW tensors, any dtype."""

    def network(self, model: object, x: Tensor) -> None:
        return None

    def from_image(self, x: Tensor) -> Tensor:
        return x

    def to_image(self, h: Tensor) -> Tensor:
        return h

    def layer(
        self,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        eps: float,
        relu: bool = True,
        skip: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        z = F.conv2d(_lowered(h, weight), weight, bias, padding=1)
        if gamma is not None:
            z = _widened(z)
            z = std_norm(z, gamma, eps) if beta is None else layer_norm(z, gamma, beta, eps)
        return F.relu(z) if relu else z

    def upsample(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose2d(_lowered(h, weight), weight, bias, stride=2)

    def pool(self, h: Tensor) -> Tensor:
        return F.avg_pool2d(h, 2)

    def mean(self, h: Tensor) -> Tensor:
        return spatial_mean(h)


class ReferenceRunner:
    """The runner of the seam, one image at a time: so a result never depends on who shares the batch
    (library convolutions choose their algorithm by batch size)."""

    vouched: object | None = None  # it packs nothing: all the same to it
    seen: list[Tensor] | None = None

    def __init__(self, model) -> None:
        self.model = model

    @torch.no_grad()
    def denoise(self, x: Tensor) -> Tensor:
        return torch.cat([self.model.walk(None, x[i : i + 1]) for i in range(len(x))])

    @torch.no_grad()
    def block_means(self, x: Tensor, until: str | None = None) -> dict[str, Tensor]:
        rows = [self.model.walk_means(None, x[i : i + 1], until) for i in range(len(x))]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def match(
        self, x: Tensor, target: Tensor, weight: Tensor, lr: float, max_iter: int, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def phi(image: Tensor) -> Tensor:
            return self.model.walk_means(None, image, "mid")["mid"]

        rows = [
            match_one(phi, x[i : i + 1], target[i : i + 1], weight, lr, max_iter, tolerance)
            for i in range(len(x))
        ]
        images, losses, updates, converged = zip(*rows, strict=True)
        table = torch.full((max_iter + 1, len(x)), torch.nan, dtype=x.dtype, device=x.device)
        for i, column in enumerate(losses):
            table[: len(column), i] = torch.tensor(column, dtype=x.dtype)
        device = x.device
        return (
            torch.cat(images),
            table,
            torch.tensor(updates, device=device),
            torch.tensor(converged, device=device),
        )


# --- loops ----------------------------------------------------------------------------------------


def match_one(
    phi: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    lr: float = 0.01,
    max_iter: int = 100,
    tolerance: float = 0.01,
) -> tuple[Tensor, list[float], int, bool]:
    """Algorithm 2 for one image x (1, C, H, W): Adam on the pixels of L = Σ_c w_c (φ_c(x) − φ*_c)².

    Stops without a further update once L <= tolerance · L(first) (tolerance 0: never).
    Returns x, the losses before each update and the last one, the number of updates, converged.
    """
    x = x.detach().clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    losses: list[float] = []
    for t in range(max_iter + 1):
        with torch.enable_grad():
            leaf = x.requires_grad_(True)
            loss = (weight * (phi(leaf) - target) ** 2).sum()
            (g,) = torch.autograd.grad(loss, leaf)
        x = x.detach()
        losses.append(loss.item())
        if tolerance > 0 and losses[-1] <= tolerance * losses[0]:
            return x, losses, t, True
        if t < max_iter:
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            denominator = (v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8
            x = x - lr * (m / (1 - 0.9 ** (t + 1))) / denominator
    return x, losses, max_iter, False


def schedule(first: float = 1.0, last: float = 0.03, steps: int = 100) -> list[float]:
    """σ of the schedule form (§2.3): linspace(1, 0.03, 100)."""
    return (
        [first + (last - first) * i / (steps - 1) for i in range(steps)] if steps > 1 else [first]
    )


def reconstruct_schedule(
    denoise: Callable[[Tensor], Tensor],
    match: Callable[[Tensor, float], Tensor],
    noise: Callable[[int], Tensor],
    mean: Tensor,
    sigmas: Sequence[float],
) -> Tensor:
    """Algorithm 1, schedule form. noise(k): standard normal of step k; match(x, σ): Algorithm 2."""
    x = mean
    for k, sigma in enumerate(sigmas):
        x = x + sigma * noise(k)
        x = match(x, sigma)
        x = denoise(x)
    return x


def reconstruct_adaptive(
    denoise: Callable[[Tensor], Tensor],
    match: Callable[[Tensor, float], Tensor],
    noise: Callable[[int], Tensor],
    mean: Tensor,
    sigma_0: float,
    sigma_last: float = 0.01,
    h0: float = 0.01,
    beta: float = 0.01,
    fixed_h: bool = False,
    max_steps: int = 100_000,
) -> tuple[Tensor, int]:
    """Algorithm 1, adaptive form (Kadkhodaie & Simoncelli 2021), for one image (1, C, H, W).

    match may return its argument unchanged: then this is the unconditional sampler.
    Returns denoised(x) and the number of steps.
    """
    x = mean + sigma_0 * noise(0)
    sigma = sigma_0
    for t in range(1, max_steps + 1):
        x = match(x, sigma)
        f = x - denoise(x)
        sigma = float((f.double() ** 2).mean().sqrt())
        if sigma < sigma_last:
            return x - f, t - 1
        h = h0 if fixed_h else h0 * t / (1 + h0 * (t - 1))
        gamma = (max((1 - beta * h) ** 2 - (1 - h) ** 2, 0.0)) ** 0.5 * sigma
        x = x - h * f + gamma * noise(t)
    return denoise(x), max_steps


def extract_phi(
    block_means: Callable[[Tensor], dict[str, Tensor]],
    x: Tensor,
    noise: Callable[[int], Tensor],
    sigma: float,
    draws: int,
) -> dict[str, Tensor]:
    """E_z[ā(x + σz)] over `draws` noise draws (§2.2), summed in the order of the draws, in float64."""
    total: dict[str, Tensor] = {}
    for d in range(draws):
        for name, a in block_means(x + sigma * noise(d)).items():
            total[name] = total.get(name, 0) + a.double()
    return {name: (a / draws).to(x.dtype) for name, a in total.items()}


# --- counter-based noise --------------------------------------------------------------------------


def philox(
    seed: int, block: np.ndarray, draw: np.ndarray, stream: int, sample: np.ndarray
) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (block, draw, stream, sample).

    The counters broadcast; returns (..., 4) words of 32 bits, as uint64.
    """
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [np.asarray(v).astype(np.uint64) & mask for v in (block, draw, stream, sample)]
    c = [np.array(v) for v in np.broadcast_arrays(*c)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> shift) ^ c[1] ^ np.uint64(k0),
            p1 & mask,
            (p0 >> shift) ^ c[3] ^ np.uint64(k1),
            p0 & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1)


def _box_muller(xa: np.ndarray, xb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two words -> two normals; every float32 operation rounded on its own, in this order."""
    f = np.float32
    u = (2 * (xa >> np.uint64(9)) + np.uint64(1)).astype(np.float32) * f(2.0**-24)
    i = u.view(np.int32)
    e = (i - np.int32(0x3F3504F3)) >> np.int32(23)  # u = m 2^e with m in [√½, √2)
    m = (i - (e << np.int32(23))).view(np.float32)
    s = (m - f(1)) / (m + f(1))
    w = s * s
    p = (((f(2 / 9) * w + f(2 / 7)) * w + f(2 / 5)) * w + f(2 / 3)) * w
    log_u = e.astype(np.float32) * f(np.log(2)) + (f(2) * s + s * p)
    r = np.sqrt(f(-2) * log_u)
    octant = xb >> np.uint64(29)
    k = 2 * ((xb >> np.uint64(6)) & np.uint64(0x7FFFFF)) + np.uint64(1)
    a = k.astype(np.float32) * f(np.pi / 4 * 2.0**-24)
    q = a * a
    sin = a * (f(1) + q * (f(-1 / 6) + q * (f(1 / 120) + q * (f(-1 / 5040) + q * f(1 / 362880)))))
    cos = f(1) + q * (f(-1 / 2) + q * (f(1 / 24) + q * (f(-1 / 720) + q * f(1 / 40320))))
    swap = (octant & np.uint64(1)) == 1
    sin, cos = np.where(swap, cos, sin), np.where(swap, sin, cos)
    cos = np.where((octant & np.uint64(2)) != 0, -cos, cos)
    sin = np.where((octant & np.uint64(4)) != 0, -sin, sin)
    return r * cos, r * sin


def noise_normal(
    seed: int, sample: Tensor, stream: int, draw: Tensor, channels: int, height: int, width: int
) -> Tensor:
    """Standard normal (N, C, H, W) float32 from the counters; the bit contract of every engine."""
    n = channels * height * width
    block = np.arange((n + 3) // 4)[None, :]
    words = philox(seed, block, draw.numpy()[:, None], stream, sample.numpy()[:, None])
    z0, z1 = _box_muller(words[..., 0], words[..., 1])
    z2, z3 = _box_muller(words[..., 2], words[..., 3])
    z = np.stack([z0, z1, z2, z3], axis=-1).reshape(len(sample), -1)[:, :n]
    return torch.from_numpy(np.ascontiguousarray(z)).reshape(-1, channels, height, width)
