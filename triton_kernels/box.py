"""What the kernels share: a program's box of pixels (images × rows × columns, all powers of two) is
the columns of its matrix products, a block of output channels the rows.

In that orientation both operands of a product stay in shared memory (under Triton 3.6 a box of
pixels that is the left operand goes through registers), the pixels of a quad to be pooled lie in
one thread's registers, and a thread holds few channels, so bias, gain and sums over space cost
little.
"""

from __future__ import annotations

from .support import jit, round_to_bf16, tl


@jit
def accumulate(
    acc,  # (BLOCK_N, pixels) fp32
    r,  # (N, H, W, C), descriptor or pointer
    weight,  # (rows, K), descriptor or pointer
    image,
    y0,
    x0,
    row,
    N,
    H,
    W,
    TAPS: tl.constexpr,  # 9 of a 3×3 convolution, or 1
    K: tl.constexpr,
    K_START: tl.constexpr,  # where this source begins in K
    C: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,  # of the weights: output channels
    MASK_ROWS: tl.constexpr,  # some blocks of rows reach beyond them
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + conv(r, W) of one source: a block of the weights' rows by the box; one loop over K."""
    M: tl.constexpr = TN * TH * TW
    BLOCKS: tl.constexpr = PADDED // BLOCK_K
    if not DESCRIPTORS:
        m = tl.arange(0, M)
        n, y, x = image + m // (TH * TW), y0 + m // TW % TH, x0 + m % TW
        k = tl.arange(0, BLOCK_K)
        row_k = (row + tl.arange(0, BLOCK_N))[:, None]
        # 64 bits for the part that grows with the batch, 32 within the box
        r += image.to(tl.int64) * H * W * C
        pixel = ((m // (TH * TW) * H + y) * W + x) * C
        weight += K_START
    for i in range(TAPS * BLOCKS):
        tap = i // BLOCKS
        c0 = i % BLOCKS * BLOCK_K
        if TAPS == 9:
            dy, dx = tap // 3 - 1, tap % 3 - 1
        else:
            dy, dx = 0, 0
        if DESCRIPTORS:
            a = r.load([image, y0 + dy, x0 + dx, c0]).reshape(M, BLOCK_K)
            b = weight.load([row, K_START + i * BLOCK_K])
        else:
            inside = (n < N) & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
            mask = inside[:, None]
            if C != PADDED:
                mask = mask & (c0 + k < C)[None, :]
            offset = pixel + ((dy * W + dx) * C + c0)
            a = tl.load(r + offset[:, None] + k[None, :], mask=mask, other=0.0)
            at = weight + row_k * K + (i * BLOCK_K + k)[None, :]
            b = tl.load(at, mask=row_k < ROWS, other=0.0) if MASK_ROWS else tl.load(at)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(b, a.trans(), acc, input_precision=PRECISION)
    return acc


@jit
def per_pixel(v, TN: tl.constexpr, PIXELS: tl.constexpr):
    """A number per image, (TN,), as a factor of (channels, TN·PIXELS)."""
    return tl.broadcast_to(v[:, None], (TN, PIXELS)).reshape(1, TN * PIXELS)


@jit
def channel_sums(x, TN: tl.constexpr, PIXELS: tl.constexpr):
    """(channels, TN·PIXELS) -> (channels, TN): sums over each image's pixels."""
    return tl.sum(x.reshape(x.shape[0], TN, PIXELS), axis=2)


@jit
def idle(active, image, N, TN: tl.constexpr):
    """Whether none of a program's images takes part. active: (N,) int32."""
    n = image + tl.arange(0, TN)
    return tl.max(tl.load(active + n, mask=n < N, other=0)) == 0


@jit
def load_channels(v, channel, COUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_N, 1) of a vector over the output channels."""
    co = channel + tl.arange(0, BLOCK_N)
    return tl.load(v + co, mask=co < COUT, other=0.0)[:, None]


@jit
def load_box(
    r,  # (N, H, W, C), descriptor or pointer
    image,
    y0,
    x0,
    channel,
    N,
    H,
    W,
    C: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """(BLOCK_N, TN·TH·TW) fp32; 0 for what of the box lies outside the tensor."""
    if DESCRIPTORS:
        value = r.load([image, y0, x0, channel]).reshape(TN * TH * TW, BLOCK_N)
    else:
        m = tl.arange(0, TN * TH * TW)
        n, y, x = m // (TH * TW), y0 + m // TW % TH, x0 + m % TW
        co = channel + tl.arange(0, BLOCK_N)
        r += image.to(tl.int64) * H * W * C
        mask = ((image + n < N) & (y < H) & (x < W))[:, None] & (co < C)[None, :]
        offset = ((n * H + y) * W + x) * C
        value = tl.load(r + offset[:, None] + co[None, :], mask=mask, other=0.0)
    return value.trans().to(tl.float32)


@jit
def store_box(
    out,  # (N, H, W, COUT), descriptor or pointer
    value,  # (BLOCK_N, TN·TH·TW)
    image,
    y0,
    x0,
    channel,
    N,
    H,
    W,
    COUT: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write what of the box lies inside the tensor."""
    if UPCAST:
        value = round_to_bf16(value)
    value = value.trans()
    if DESCRIPTORS:
        out.store([image, y0, x0, channel], value.to(out.dtype).reshape(TN, TH, TW, BLOCK_N))
    else:
        m = tl.arange(0, TN * TH * TW)
        n, y, x = m // (TH * TW), y0 + m // TW % TH, x0 + m % TW
        co = channel + tl.arange(0, BLOCK_N)
        out += image.to(tl.int64) * H * W * COUT
        mask = ((image + n < N) & (y < H) & (x < W))[:, None] & (co < COUT)[None, :]
        offset = ((n * H + y) * W + x) * COUT
        tl.store(out + offset[:, None] + co[None, :], value, mask=mask)


@jit
def store_outputs(
    z,  # (BLOCK_N, TN·TH·TW): what r_out is before rounding
    r_out,  # (N, H, W, COUT) or None
    pooled,  # (N, H/2, W/2, COUT) or None
    sums,  # (N, boxes, COUT) fp32 or None
    place,
    boxes,
    image,
    y0,
    x0,
    channel,
    N,
    H,
    W,
    COUT: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write those of a layer's outputs that are wanted."""
    if sums is not None:
        n = image + tl.arange(0, TN)
        co = channel + tl.arange(0, BLOCK_N)
        kept = z
        if MASKED:
            m = tl.arange(0, TN * TH * TW)
            kept = tl.where(((y0 + m // TW % TH < H) & (x0 + m % TW < W))[None, :], z, 0.0)
        at = co[:, None] + (n.to(tl.int64) * boxes + place)[None, :] * COUT
        mask = (co < COUT)[:, None] & (n < N)[None, :]
        tl.store(sums + at, channel_sums(kept, TN, TH * TW), mask=mask)
    if pooled is not None:
        quads = z.reshape(BLOCK_N, TN * TH // 2, 2, TW // 2, 2)
        mean4 = 0.25 * tl.sum(tl.sum(quads, axis=4), axis=2)
        mean4 = mean4.reshape(BLOCK_N, TN * TH * TW // 4)
        store_box(pooled, mean4, image, y0 // 2, x0 // 2, channel, N, H // 2, W // 2, COUT,
                  TN, TH // 2, TW // 2, BLOCK_N, DESCRIPTORS, UPCAST)  # fmt: skip
    if r_out is not None:
        store_box(r_out, z, image, y0, x0, channel, N, H, W, COUT, TN, TH, TW,
                  BLOCK_N, DESCRIPTORS, UPCAST)  # fmt: skip


@jit
def finish(
    z,  # (BLOCK_N, TN·TH·TW) fp32: scaled, with its bias
    gamma,  # (COUT,) fp32 or None
    r_out,  # as in store_outputs
    pooled,
    partials,  # (N, boxes·BLOCKS, 3) fp32 or None
    sums,
    place,
    boxes,
    block,
    BLOCKS: tl.constexpr,  # of channels
    image,
    y0,
    x0,
    channel,
    N,
    H,
    W,
    COUT: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,  # some boxes reach beyond the image
    RELU: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What a layer does with z: count, mean, M2 of the box; gain; ReLU; its outputs."""
    PIXELS: tl.constexpr = TH * TW
    if partials is not None:
        n = image + tl.arange(0, TN)
        m = tl.arange(0, TN * PIXELS)
        co = channel + tl.arange(0, BLOCK_N)
        inside = (co < COUT)[:, None] & ((y0 + m // TW % TH < H) & (x0 + m % TW < W))[None, :]
        count = (
            tl.minimum(H - y0, TH) * tl.minimum(W - x0, TW) * tl.minimum(COUT - channel, BLOCK_N)
        )
        count = count.to(tl.float32)
        kept = tl.where(inside, z, 0.0) if MASKED else z
        mean = tl.sum(channel_sums(kept, TN, PIXELS), axis=0) / count
        kept = z - per_pixel(mean, TN, PIXELS)
        kept = tl.where(inside, kept, 0.0) if MASKED else kept
        m2 = tl.sum(channel_sums(kept * kept, TN, PIXELS), axis=0)
        at = partials + (n.to(tl.int64) * (boxes * BLOCKS) + place * BLOCKS + block) * 3
        tl.store(at, tl.zeros((TN,), tl.float32) + count, mask=n < N)
        tl.store(at + 1, mean, mask=n < N)
        tl.store(at + 2, m2, mask=n < N)
    if gamma is not None:
        z *= load_channels(gamma, channel, COUT, BLOCK_N)
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    store_outputs(z, r_out, pooled, sums, place, boxes, image, y0, x0, channel, N, H, W, COUT,
                  TN, TH, TW, BLOCK_N, MASKED, DESCRIPTORS, UPCAST)  # fmt: skip
