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

// a and b in turn, lane by lane: of the first halves, of the second halves.
inline void zip(FVec a, FVec b, FVec* out) {
#if defined(__clang__)
  for (i64 i = 0; i < FLANES; ++i) {
    out[i / (FLANES / 2)][2 * i % FLANES] = a[i];
    out[i / (FLANES / 2)][2 * i % FLANES + 1] = b[i];
  }
#else
  typedef int Lanes __attribute__((vector_size(FASTPHI_VECTOR_BYTES)));
  Lanes first{}, second{};
#pragma GCC unroll 16
  for (int i = 0; i < FLANES; ++i) {
    first[i] = i / 2 + i % 2 * FLANES;
    second[i] = first[i] + FLANES / 2;
  }
  out[0] = __builtin_shuffle(a, b, first), out[1] = __builtin_shuffle(a, b, second);
#endif
}

// `rows` rows of `columns` numbers, at most a vector of either, to columns: out[column * pitch].
inline void transpose(const float* from, i64 row_pitch, i64 rows, i64 columns, float* out,
                      i64 pitch) {
  FVec a[FLANES], b[FLANES];
  if (rows == FLANES && columns == FLANES)
    for (i64 i = 0; i < FLANES; ++i) a[i] = load(from + i * row_pitch);
  else
    for (i64 i = 0; i < FLANES; ++i)
      a[i] = i < rows ? load_lanes<false>(from + i * row_pitch, columns) : FVec{};
#pragma GCC unroll 4
  for (i64 step = 1; step < FLANES; step *= 2) {
#pragma GCC unroll 8
    for (i64 i = 0; i < FLANES / 2; ++i) zip(a[i], a[i + FLANES / 2], b + 2 * i);
#pragma GCC unroll 16
    for (i64 i = 0; i < FLANES; ++i) a[i] = b[i];
  }
  for (i64 i = 0; i < columns; ++i) store(out + i * pitch, a[i]);
}

// The taps of some outputs and channels, taps[channel][tap][output], zeros where there are no
// outputs. Either lie the taps of an output's channels in one run, or those of a channel's outputs,
// backwards.
inline void gather_taps(const float* from, const WeightStrides& at, i64 outputs, i64 lanes,
                        i64 channels, float (*taps)[9][2 * FLANES]) {
  for (i64 o = 0; o < lanes; o += FLANES) {
    const i64 rows = max_of(0, min_of(FLANES, outputs - o));
    if (at.tap == 1)
      for (i64 i = 0; i < 9 * channels; i += FLANES)
        transpose(from + o * at.output + i, at.output, rows, min_of(FLANES, 9 * channels - i),
                  &taps[0][0][o] + i * 2 * FLANES, 2 * FLANES);
    else
      for (i64 c = 0; c < channels; ++c)
        for (i64 i = 0; i < 9; i += FLANES)
          transpose(from + o * at.output + c * at.channel - 8 + i, at.output, rows,
                    min_of(FLANES, 9 - i), &taps[c][8 - i][o], -2 * FLANES);
  }
}

// Panels [begin, end) of G g G^T: packed[panel][point][channel][lanes]. Some channels at a time:
// what goes to a point is written in one run, since the points lie far apart.
void winograd_pack(const float* weight, i64 outputs, i64 channels, const WeightStrides& at,
                   i64 begin, i64 end, float* packed) {
  constexpr i64 STEP = 2 * FLANES, TOGETHER = 8;
  float taps[TOGETHER][9][STEP], made[WINO_POINTS][TOGETHER * STEP];
  for (i64 index = begin; index < end; ++index) {
    const Panel<float> panel(index, outputs);
    for (i64 c0 = 0; c0 < channels; c0 += TOGETHER) {
      const i64 count = min_of(TOGETHER, channels - c0);
      const float* from = weight + at.first + panel.start * at.output + c0 * at.channel;
      gather_taps(from, at, panel.width, panel.lanes, count, taps);
      float* const to = packed + panel.start * WINO_POINTS * channels + c0 * panel.lanes;
      for (i64 c = 0; c < count; ++c)
        for (i64 o = 0; o < panel.lanes; o += FLANES) {
          const i64 here = c * panel.lanes + o;
          winograd_weight(&taps[c][0][o], STEP, &made[0][here], TOGETHER * STEP);
          // what the next channels will be written to, on its way meanwhile
          for (i64 point = 0; point < WINO_POINTS; ++point)
            __builtin_prefetch(to + (point * channels + count) * panel.lanes + here, 1);
        }
      for (i64 point = 0; point < WINO_POINTS; ++point)
        std::memcpy(to + point * channels * panel.lanes, made[point],
                    count * panel.lanes * sizeof(float));
    }
  }
}
