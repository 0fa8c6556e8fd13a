// winograd: the convolution of direct/kernel.h by F(4x4, 3x3), a quarter of its multiplications.
//
//   y = A^T [ sum_c (G g_c G^T) . (B^T d_c B) ] A      (csrc/README.md)
//
// for every tile of 4x4 output pixels, d_c being the 6x6 input pixels round it. Three steps per
// block of tiles, which stays in the second-level cache: winograd_input writes B^T d B as 36
// matrices (tile, c), one per point; winograd_output multiplies each with its weights (c, panel)
// by the register tiles of direct/micro.h, transforms back and does the epilogue on 4x4 pixels that
// are in registers. Per layer: 4.5*C*Cout*pixels FLOPs and about 250 vector operations per tile and
// vector of channels on either side; bytes: r read 2.25 times from the caches, outputs written
// once, 144*C*Cout bytes of weights per block of tiles.
//
// What a tile's numbers go through depends on its place in the image alone: pixels outside of the
// image are read from a row of zeros. Included by isa/body.h inside an anonymous namespace.

// The interpolation points are 0, +-P, +-Q, infinity. All numbers below are exact in float. Against
// the usual 1 and 2 these points have a third of the rounding error.
constexpr float WINO_P = 0.625f, WINO_Q = 1.5f;
constexpr float WINO_P2 = WINO_P * WINO_P, WINO_Q2 = WINO_Q * WINO_Q;
constexpr float WINO_P3 = WINO_P2 * WINO_P, WINO_Q3 = WINO_Q2 * WINO_Q;
static_assert(WINO_POINTS == 36, "two-dimensional points of F(4x4, 3x3)");

using FVec = Vec<float>::type;
constexpr i64 FLANES = Vec<float>::LANES;

// B^T x
inline void winograd_input_1d(const FVec* x, i64 step, FVec* out, i64 out_step) {
  const FVec x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step];
  const FVec even_p = x4 - WINO_Q2 * x2, odd_p = x3 - WINO_Q2 * x1;
  const FVec even_q = x4 - WINO_P2 * x2, odd_q = x3 - WINO_P2 * x1;
  out[0] = (x4 - (WINO_P2 + WINO_Q2) * x2) + (WINO_P2 * WINO_Q2) * x[0];
  out[out_step] = even_p + WINO_P * odd_p;
  out[2 * out_step] = even_p - WINO_P * odd_p;
  out[3 * out_step] = even_q + WINO_Q * odd_q;
  out[4 * out_step] = even_q - WINO_Q * odd_q;
  out[5 * out_step] = (x[5 * step] - (WINO_P2 + WINO_Q2) * x3) + (WINO_P2 * WINO_Q2) * x1;
}

// A^T x
inline void winograd_output_1d(const FVec* x, i64 step, FVec* out, i64 out_step) {
  const FVec sum_p = x[step] + x[2 * step], diff_p = x[step] - x[2 * step];
  const FVec sum_q = x[3 * step] + x[4 * step], diff_q = x[3 * step] - x[4 * step];
  out[0] = (x[0] + sum_p) + sum_q;
  out[out_step] = WINO_P * diff_p + WINO_Q * diff_q;
  out[2 * out_step] = WINO_P2 * sum_p + WINO_Q2 * sum_q;
  out[3 * out_step] = (x[5 * step] + WINO_P3 * diff_p) + WINO_Q3 * diff_q;
}

inline FVec relu(FVec x) {  // keeps NaN, as torch's does
  const FVec zero = {};
  return zero > x ? zero : x;
}

// The first `count` lanes; those beyond are zero, and are not read or written. FULL: all of them.
template <bool FULL>
inline FVec load_lanes(const float* p, i64 count) {
  if constexpr (FULL) return load(p);
#if FASTPHI_VECTOR_BYTES == 64
  return (FVec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  FVec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
#endif
}

template <bool FULL>
inline void store_lanes(float* p, FVec v, i64 count) {
  if constexpr (FULL) return store(p, v);
#if FASTPHI_VECTOR_BYTES == 64
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#else
  std::memcpy(p, &v, count * sizeof(float));
#endif
}

// G g, with each row divided by the product of its point's distances to the others
inline void winograd_weight_1d(const FVec* g, i64 step, FVec* out, i64 out_step) {
  constexpr double P = WINO_P, Q = WINO_Q, P2 = P * P, Q2 = Q * Q;
  constexpr double OF_P = 1 / (2 * P2 * (P2 - Q2)), OF_Q = 1 / (2 * Q2 * (Q2 - P2));
  const FVec even_p = float(OF_P) * g[0] + float(OF_P * P2) * g[2 * step];
  const FVec even_q = float(OF_Q) * g[0] + float(OF_Q * Q2) * g[2 * step];
  out[0] = float(1 / (P2 * Q2)) * g[0];
  out[out_step] = even_p + float(OF_P * P) * g[step];
  out[2 * out_step] = even_p - float(OF_P * P) * g[step];
  out[3 * out_step] = even_q + float(OF_Q * Q) * g[step];
  out[4 * out_step] = even_q - float(OF_Q * Q) * g[step];
  out[5 * out_step] = g[2 * step];
}

// A vector of outputs of G g G^T: taps[tap * pitch], out[point * out_pitch].
inline void winograd_weight(const float* taps, i64 pitch, float* out, i64 out_pitch) {
  FVec g[9], half[18], row[6];
#pragma GCC unroll 9
  for (int tap = 0; tap < 9; ++tap) g[tap] = load(taps + tap * pitch);
#pragma GCC unroll 3
  for (int x = 0; x < 3; ++x) winograd_weight_1d(g + x, 3, half + x, 3);
#pragma GCC unroll 6
  for (int y = 0; y < 6; ++y) {
    winograd_weight_1d(half + 3 * y, 1, row, 1);
#pragma GCC unroll 6
    for (int x = 0; x < 6; ++x) store(out + (y * 6 + x) * out_pitch, row[x]);
  }
}

// Panels [begin, end) of G g G^T: packed[panel][point][channel][lanes]. Some
// channels at a time: those of an output are neighbours, in a line of the cache or in the next; and
// what goes to a point is written in one run, since the points lie far apart.
void winograd_pack(const float* weight, i64 outputs, i64 channels, const WeightStrides& at,
                   i64 begin, i64 end, float* packed) {
  constexpr i64 STEP = 2 * FLANES, TOGETHER = 8;
  float taps[TOGETHER][9][STEP] = {}, made[WINO_POINTS][TOGETHER * STEP];
  for (i64 index = begin; index < end; ++index) {
    const Panel<float> panel(index, outputs);
    if (panel.width < STEP) std::memset(taps, 0, sizeof taps);
    for (i64 c0 = 0; c0 < channels; c0 += TOGETHER) {
      const i64 count = min_of(TOGETHER, channels - c0);
      for (i64 o = 0; o < panel.width; ++o) {
        const float* from = weight + at.first + (panel.start + o) * at.output + c0 * at.channel;
        for (i64 c = 0; c < count; ++c)
          for (i64 tap = 0; tap < 9; ++tap) taps[c][tap][o] = from[c * at.channel + tap * at.tap];
      }
      for (i64 c = 0; c < count; ++c)
        for (i64 o = 0; o < panel.lanes; o += FLANES)
          winograd_weight(&taps[c][0][o], STEP, &made[0][c * panel.lanes + o], TOGETHER * STEP);
      float* const to = packed + panel.start * WINO_POINTS * channels + c0 * panel.lanes;
      for (i64 point = 0; point < WINO_POINTS; ++point)
        std::memcpy(to + point * channels * panel.lanes, made[point],
                    count * panel.lanes * sizeof(float));
    }
  }
}
