// winograd_weight: the gradient of the weights of a convolution by F(4x4, 3x3), a quarter of the
// multiplications of the sum over pixels in direct/gradient.h.
//
//   d_W[2 - k] = G^T [ sum_t (A x_t A^T) . (B^T dz_t B) ] G
//
// over all tiles t: x is the layer's input (4x4, the tile itself), dz the gradient of its output
// (6x6 round it). So the transform of dz is the one that the gradient of the input needs
// (winograd/backward.cpp), and that of x reads each pixel once. winograd_spread writes A x A^T as
// [point][tile][c]; winograd_weights multiplies the two by the register tile of direct/micro.h,
// BLOCK input channels by a panel, over a part's tiles. At the end winograd_taps goes back to nine
// taps. Per layer: 4.5*C*Cout*pixels FLOPs; 144*C*Cout bytes of products are written, and where
// there are several parts read again.
//
// Sums: a part's tiles in registers, parts in float, slices (winograd/backward.cpp) in float, all
// in order and cut by the images' number and size alone. Included by isa/body.h inside an anonymous
// namespace, after winograd/input.h.

constexpr i64 WEIGHT_SLOT = BLOCK * 2 * FLANES;  // products of a point, block and panel

// A x, the transpose of winograd_output_1d
inline void winograd_spread_1d(const FVec* x, i64 step, FVec* out, i64 out_step) {
  const FVec x0 = x[0], x1 = x[step], x2 = x[2 * step], x3 = x[3 * step];
  const FVec even_p = x0 + WINO_P2 * x2, odd_p = WINO_P * x1 + WINO_P3 * x3;
  const FVec even_q = x0 + WINO_Q2 * x2, odd_q = WINO_Q * x1 + WINO_Q3 * x3;
  out[0] = x0;
  out[out_step] = even_p + odd_p;
  out[2 * out_step] = even_p - odd_p;
  out[3 * out_step] = even_q + odd_q;
  out[4 * out_step] = even_q - odd_q;
  out[5 * out_step] = x3;
}

// G^T x: from six points to three taps, the transpose of winograd_weight_1d
inline void winograd_gather_1d(const FVec* x, i64 step, FVec* out, i64 out_step) {
  constexpr float OF_P = 1 / (2 * WINO_P2 * (WINO_P2 - WINO_Q2)),
                  OF_Q = 1 / (2 * WINO_Q2 * (WINO_Q2 - WINO_P2));
  const FVec sum_p = OF_P * (x[step] + x[2 * step]), diff_p = OF_P * (x[step] - x[2 * step]);
  const FVec sum_q = OF_Q * (x[3 * step] + x[4 * step]),
             diff_q = OF_Q * (x[3 * step] - x[4 * step]);
  out[0] = (1 / (WINO_P2 * WINO_Q2)) * x[0] + (sum_p + sum_q);
  out[out_step] = WINO_P * diff_p + WINO_Q * diff_q;
  out[2 * out_step] = x[5 * step] + (WINO_P2 * sum_p + WINO_Q2 * sum_q);
}

// A vector of channels of A x A^T of a tile: out[point * pitch]. pixel(i) is x's i-th of 16.
template <class Pixel>
inline void spread_vector(const Pixel& pixel, float* out, i64 pitch) {
  FVec columns[24], rows[6];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    FVec in[4];
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) in[y] = pixel(y * 4 + x);
    winograd_spread_1d(in, 1, columns + x, 4);
  }
#pragma GCC unroll 6
  for (int y = 0; y < 6; ++y) {
    winograd_spread_1d(columns + y * 4, 1, rows, 1);
#pragma GCC unroll 6
    for (int x = 0; x < 6; ++x) store(out + (y * 6 + x) * pitch, rows[x]);
  }
}

// A (scale r) A^T of a tile of one source, its pixels beyond the border being zeros; up to a vector
// beyond the last channel is overwritten.
template <bool RAW>
void spread_tile(const Source<float>& source, const float* first, i64 line, i64 vh, i64 vw,
                 float scale, float* out, i64 pitch) {
  const i64 c = source.channels;
  const FVec factor = splat(scale);
  const auto vectors = [&](auto full, auto whole, i64 at, i64 count) {
    constexpr bool FULL = decltype(full)::VALUE, WHOLE = decltype(whole)::VALUE;
    FVec g = factor;
    if (RAW && source.gamma) g *= load_lanes<FULL>(source.gamma + at, count);
    const auto pixel = [&](int i) {
      if (!WHOLE && (i / 4 >= vh || i % 4 >= vw)) return FVec{};
      const FVec r = g * load_lanes<FULL>(first + i / 4 * line + i % 4 * c + at, count);
      return RAW ? relu(r) : r;
    };
    spread_vector(pixel, out + at, pitch);
  };
  const auto channels = [&](auto whole) {
    i64 at = 0;
    for (; at + FLANES <= c; at += FLANES) vectors(Constant<true>{}, whole, at, FLANES);
    if (at < c) vectors(Constant<false>{}, whole, at, c - at);
  };
  if (vh * vw == 16)
    channels(Constant<true>{});
  else
    channels(Constant<false>{});
}

// The tiles of strips [first, last) of the input to u[point * pitch + tile * depth + c].
void winograd_spread(const WinogradWeightJob& job, i64 first, i64 last, float* u, i64 pitch,
                     i64 depth) {
  const Strips strips(job.h, job.w);
  for (i64 strip = first; strip < last; ++strip) {
    const i64 n = strip / strips.per_image, y = strips.y(strip);
    const i64 vh = min_of(WINO_TILE, job.h - y);
    for (i64 tile = 0; tile < strips.tiles(strip); ++tile, u += depth) {
      const i64 x = strips.x(strip) + WINO_TILE * tile, vw = min_of(WINO_TILE, job.w - x);
      float* out = u;
      for (int s = 0; s < job.sources; out += job.source[s++].channels) {
        const Source<float>& source = job.source[s];
        const i64 line = job.w * source.channels;
        const float* const pixel = source.r + (n * job.h + y) * line + x * source.channels;
        const auto spread = source.raw ? spread_tile<true> : spread_tile<false>;
        spread(source, pixel, line, vh, vw, source.scale ? source.scale[n] : 1.0f, out, pitch);
      }
    }
  }
}

// G^T m G of a block of channels [c0, c0 + p) and a panel, into torch's layout. m: [point * pitch]
inline void winograd_weight_back(const WinogradWeightJob& job, const Panel<float>& panel, i64 c0,
                                 i64 p, const float* m, i64 pitch) {
  float taps[FLANES][BLOCK * 9];
  for (i64 j = 0; j < panel.nv; ++j) {
    for (i64 i = 0; i < p; ++i) {
      FVec columns[18], out[9];
#pragma GCC unroll 6
      for (int x = 0; x < 6; ++x) {
        FVec in[6];
#pragma GCC unroll 6
        for (int y = 0; y < 6; ++y)
          in[y] = load(m + (y * 6 + x) * pitch + i * panel.lanes + j * FLANES);
        winograd_gather_1d(in, 1, columns + x, 6);
      }
#pragma GCC unroll 3
      for (int y = 0; y < 3; ++y) winograd_gather_1d(columns + y * 6, 1, out + y * 3, 1);
      for (int tap = 0; tap < 9; ++tap)
        for (i64 lane = 0; lane < FLANES; ++lane) taps[lane][i * 9 + 8 - tap] = out[tap][lane];
    }
    const i64 lanes = min_of(FLANES, panel.width - j * FLANES);
    for (i64 lane = 0; lane < lanes; ++lane)
      std::memcpy(job.d_weight + ((panel.start + j * FLANES + lane) * job.cin + c0) * 9, taps[lane],
                  p * 9 * sizeof(float));
  }
}

// The blocks of channels and the panels of a unit, and where in a point's products theirs lie.
template <class F>
inline void for_unit(const WinogradWeightJob& job, const WeightPart& part, i64 unit, const F& f) {
  const Split split(job.cin);
  const i64 across = (job.panels + part.panels - 1) / part.panels;
  const i64 block0 = unit / across * part.blocks, panel0 = unit % across * part.panels;
  const i64 block1 = min_of(block0 + part.blocks, split.count),
            panel1 = min_of(panel0 + part.panels, job.panels);
  i64 at = 0;
  for (i64 index = panel0; index < panel1; ++index)
    for (i64 block = block0; block < block1; ++block, at += WEIGHT_SLOT)
      f(Panel<float>(index, job.cout), split.start(block),
        split.start(block + 1) - split.start(block), at);
}

// The products of a unit, m[point][panel][block][channel][lanes], in the order in which they are
// made: one stream, which the processor prefetches.
void winograd_weights(const WinogradWeightJob& job, const WeightPart& part, i64 unit, float* m) {
  const i64 pitch = part.blocks * part.panels * WEIGHT_SLOT;
  for (i64 point = 0; point < WINO_POINTS; ++point)
    for_unit(job, part, unit, [&](const Panel<float>& panel, i64 c0, i64 p, i64 at) {
      const float* const u = part.u + point * part.u_pitch + c0;
      const float* const v = part.v + point * part.v_pitch + panel.start;
      with_size<BLOCK>(p, panel.nv,
                       PixelsCall<float>{u, part.u_depth, 0, v, part.v_depth, 0, 1, part.tiles,
                                         1.0f, m + point * pitch + at, part.add});
    });
}

// The taps of a unit: its products in the slices, `size` apart, are added up in m, in order.
void winograd_taps(const WinogradWeightJob& job, const WeightPart& part, i64 unit, float* m,
                   i64 slices, i64 size) {
  const i64 pitch = part.blocks * part.panels * WEIGHT_SLOT;
  for_unit(job, part, unit, [&](const Panel<float>& panel, i64 c0, i64 p, i64 at) {
    for (i64 point = 0; slices > 1 && point < WINO_POINTS; ++point)
      for (i64 i = 0; i < p * panel.lanes; i += FLANES) {
        float* const to = m + point * pitch + at + i;
        FVec sum = load(to);
        for (i64 slice = 1; slice < slices; ++slice) sum += load(to + slice * size);
        store(to, sum);
      }
    winograd_weight_back(job, panel, c0, p, m + at, pitch);
  });
}
