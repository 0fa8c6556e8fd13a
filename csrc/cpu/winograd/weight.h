// winograd_weight: the gradient of the weights of a convolution by F(4x4, 3x3), a quarter of the
// multiplications of the sum over pixels in direct/gradient.h.
//
//   d_W = G^T [ sum_t (A dz_t A^T) . (B^T d_t B) ] G
//
// over all tiles t: d is the layer's input (6x6 round a tile), dz the gradient of its output (4x4).
// Three steps per part, some tiles: winograd_input writes B^T d B as [point][tile][c],
// winograd_spread A dz A^T as [point][panel][tile][lanes]; winograd_weights multiplies the two by
// the register tile of direct/micro.h, BLOCK input channels by a panel, over the part's tiles. The
// products of a unit, some blocks by some panels, stay in the second-level cache while the operands
// stream past them. At the end winograd_taps goes back to nine taps.
// Per layer: 4.5*C*Cout*pixels FLOPs; both operands are written once (9/4 of r and of dz) and read
// once per unit that wants them; 144*C*Cout bytes of products are written, and where there are
// several parts read again.
//
// Measured, 8 images, 2 threads (multiply-adds alone at 474 GFLOP/s): 64->64 @64 3.2 ms (1.3),
// 128->128 @32 3.7 (1.3), 256->256 @16 3.4 (1.3), 512->512 @8 3.5 (1.3); summed over pixels
// directly they took 8.2, 6.8, 7.7 and 12.2. Error against float64, largest element over largest:
// 9e-7 to 1.6e-6 (directly 2e-7).
//
// Sums: a part's tiles in registers, parts in float, slices (winograd/weight.cpp) in float, all in
// order and cut by the images' number and size alone. Included by isa/body.h inside an
// anonymous namespace, after winograd/kernel.h.

constexpr i64 WEIGHT_SLOT = WINO_POINTS * BLOCK * 2 * FLANES;  // products of a block and a panel

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

// A vector of channels of scale * A dz A^T: out[point * pitch]. FULL: vh x vw is 4x4.
template <bool FULL>
inline void spread_vector(const float* dz, i64 line, i64 c, i64 vh, i64 vw, i64 lanes, FVec scale,
                          float* out, i64 pitch) {
  FVec columns[24], rows[6];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    FVec in[4] = {};
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y)
      if (FULL || (y < vh && x < vw))
        in[y] = scale * load_lanes<FULL>(dz + y * line + x * c, lanes);
    winograd_spread_1d(in, 1, columns + x, 4);
  }
#pragma GCC unroll 6
  for (int y = 0; y < 6; ++y) {
    winograd_spread_1d(columns + y * 4, 1, rows, 1);
#pragma GCC unroll 6
    for (int x = 0; x < 6; ++x) store(out + (y * 6 + x) * pitch, rows[x]);
  }
}

// The tiles of strips [first, last) of dz to d; `at` tiles of the part come before them.
void winograd_spread(const WinogradWeightJob& job, i64 first, i64 last, i64 at,
                     const WeightPart& part) {
  const Strips strips(job.h, job.w);
  const i64 line = job.w * job.cout;
  for (i64 strip = first; strip < last; ++strip) {
    const i64 n = strip / strips.per_image, y = strips.y(strip);
    const FVec scale = splat(job.scale ? job.scale[n] : 1.0f);
    const i64 vh = min_of(WINO_TILE, job.h - y);
    for (i64 tile = 0; tile < strips.tiles(strip); ++tile, ++at) {
      const i64 x = strips.x(strip) + WINO_TILE * tile, vw = min_of(WINO_TILE, job.w - x);
      const float* const pixel = job.dz + ((n * job.h + y) * job.w + x) * job.cout;
      for (i64 index = 0; index < job.panels; ++index) {
        const Panel<float> panel(index, job.cout);
        float* const to = part.d + panel.start * part.tiles + at * panel.lanes;
        for (i64 j = 0; j < panel.nv; ++j) {
          const i64 lanes = min_of(FLANES, panel.width - j * FLANES);
          const float* const from = pixel + panel.start + j * FLANES;
          if (vh * vw == 16 && lanes == FLANES)
            spread_vector<true>(from, line, job.cout, vh, vw, lanes, scale, to + j * FLANES,
                                part.d_pitch);
          else
            spread_vector<false>(from, line, job.cout, vh, vw, lanes, scale, to + j * FLANES,
                                 part.d_pitch);
        }
      }
    }
  }
}

// G^T m G of a block of channels [c0, c0 + p) and a panel, into torch's layout.
inline void winograd_weight_back(const WinogradWeightJob& job, const Panel<float>& panel, i64 c0,
                                 i64 p, const float* m) {
  float taps[FLANES][BLOCK * 9];
  for (i64 j = 0; j < panel.nv; ++j) {
    for (i64 i = 0; i < p; ++i) {
      FVec columns[18], out[9];
#pragma GCC unroll 6
      for (int x = 0; x < 6; ++x) {
        FVec in[6];
#pragma GCC unroll 6
        for (int y = 0; y < 6; ++y)
          in[y] = load(m + ((y * 6 + x) * p + i) * panel.lanes + j * FLANES);
        winograd_gather_1d(in, 1, columns + x, 6);
      }
#pragma GCC unroll 3
      for (int y = 0; y < 3; ++y) winograd_gather_1d(columns + y * 6, 1, out + y * 3, 1);
      for (int tap = 0; tap < 9; ++tap)
        for (i64 lane = 0; lane < FLANES; ++lane) taps[lane][i * 9 + tap] = out[tap][lane];
    }
    const i64 lanes = min_of(FLANES, panel.width - j * FLANES);
    for (i64 lane = 0; lane < lanes; ++lane)
      std::memcpy(job.d_weight + ((panel.start + j * FLANES + lane) * job.cin + c0) * 9, taps[lane],
                  p * 9 * sizeof(float));
  }
}

// The blocks of channels and the panels of a unit, and where in its m their products lie.
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

// The products of a unit, m[point][channel][lanes] for each of its blocks and panels.
void winograd_weights(const WinogradWeightJob& job, const WeightPart& part, i64 unit, float* m) {
  for (i64 point = 0; point < WINO_POINTS; ++point)
    for_unit(job, part, unit, [&](const Panel<float>& panel, i64 c0, i64 p, i64 at) {
      const float* const v = part.v + point * part.v_pitch + c0;
      const float* const d = part.d + point * part.d_pitch + panel.start * part.tiles;
      float* const to = m + at + point * p * panel.lanes;
      with_size<BLOCK>(p, panel.nv,
                       PixelsCall<float>{v, part.depth, 0, d, panel.lanes, 0, 1, part.tiles, 1.0f,
                                         to, part.add});
    });
}

// The taps of a unit: its products in the slices, `pitch` apart, are added up in m, in order.
void winograd_taps(const WinogradWeightJob& job, const WeightPart& part, i64 unit, float* m,
                   i64 slices, i64 pitch) {
  for_unit(job, part, unit, [&](const Panel<float>& panel, i64 c0, i64 p, i64 at) {
    for (i64 i = 0; i < WINO_POINTS * p * panel.lanes; i += FLANES) {
      FVec sum = load(m + at + i);
      for (i64 slice = 1; slice < slices; ++slice) sum += load(m + at + i + slice * pitch);
      store(m + at + i, sum);
    }
    winograd_weight_back(job, panel, c0, p, m + at);
  });
}
