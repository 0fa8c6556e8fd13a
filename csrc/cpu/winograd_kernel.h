// winograd: the convolution of conv_kernel.h by F(4x4, 3x3), a quarter of its multiplications.
//
//   y = A^T [ sum_c (G g_c G^T) . (B^T d_c B) ] A      (csrc/README.md)
//
// for every tile of 4x4 output pixels, d_c being the 6x6 input pixels round it. Three steps per
// block of tiles, which stays in the second-level cache: winograd_input writes B^T d B as 36
// matrices (tile, c), one per point; winograd_output multiplies each with its weights (c, panel)
// by the register tiles of micro.h, transforms back and does the epilogue on 4x4 pixels that are
// in registers. Per layer: 4.5*C*Cout*pixels FLOPs and about 250 vector operations per tile and
// vector of channels on either side; bytes: r read 2.25 times from the caches, outputs written
// once, 144*C*Cout bytes of weights per block of tiles.
//
// What a tile's numbers go through depends on its place in the image alone: pixels outside of the
// image are read from a row of zeros. Included by kernels_body.h inside an anonymous namespace.

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

// Pixels of a 6x6 patch: lanes from channel c on.
struct PlainPatch {
  const float* at[WINO_POINTS];
  template <bool FULL>
  FVec get(int pixel, i64 c, i64 count) const {
    return load_lanes<FULL>(at[pixel] + c, count);
  }
};

struct ScaledPatch {
  const float* at[WINO_POINTS];
  float scale;
  template <bool FULL>
  FVec get(int pixel, i64 c, i64 count) const {
    return scale * load_lanes<FULL>(at[pixel] + c, count);
  }
};

// dz of gradient_kernels.h, computed where it is read
struct GradPatch {
  const float *at[WINO_POINTS], *d[WINO_POINTS];  // at: z
  const float* gamma;
  float factor, mean, coefficient;
  template <bool FULL>
  FVec get(int pixel, i64 c, i64 count) const {
    const FVec z = load_lanes<FULL>(at[pixel] + c, count), zero = {};
    const FVec g = gamma ? load_lanes<FULL>(gamma + c, count) : splat(1.0f);
    const FVec through = (factor * g) * load_lanes<FULL>(d[pixel] + c, count);
    return (g * z > zero ? through : zero) + coefficient * (z - mean);
  }
};

// A vector of channels of B^T d B: out[point * pitch].
template <bool FULL, class Patch>
inline void transform_vector(const Patch& patch, i64 c, i64 count, float* out, i64 pitch) {
  FVec columns[36], rows[6];
#pragma GCC unroll 6
  for (int x = 0; x < 6; ++x) {
    FVec in[6];
#pragma GCC unroll 6
    for (int y = 0; y < 6; ++y) in[y] = patch.template get<FULL>(y * 6 + x, c, count);
    winograd_input_1d(in, 1, columns + x, 6);
  }
#pragma GCC unroll 6
  for (int y = 0; y < 6; ++y) {
    winograd_input_1d(columns + y * 6, 1, rows, 1);
#pragma GCC unroll 6
    for (int x = 0; x < 6; ++x) store(out + (y * 6 + x) * pitch, rows[x]);
  }
}

// B^T d B of one tile: out[point * pitch + c], c < channels; up to a vector beyond is overwritten.
template <class Patch>
void transform_patch(const Patch& patch, i64 channels, float* out, i64 pitch) {
  i64 c = 0;
  for (; c + FLANES <= channels; c += FLANES)
    transform_vector<true>(patch, c, FLANES, out + c, pitch);
  if (c < channels) transform_vector<false>(patch, c, channels - c, out + c, pitch);
}

// Where the pixels of the tile at (y, x) lie in image n of `image` (N, h >> shift, w >> shift, c);
// `outside` stands for those beyond the border.
inline void find_patch(const float* image, const ConvJob<float>& job, i64 n, i64 y, i64 x, i64 c,
                       int shift, const float* outside, const float** at) {
  const i64 line = (job.w >> shift) * c;
  const float* const base = image + n * (job.h >> shift) * line;
  i64 column[6];
  for (i64 j = 0; j < 6; ++j) column[j] = ((x - 1 + j) >> shift) * c;
  for (i64 i = 0; i < 6; ++i) {
    const float* const row = base + ((y - 1 + i) >> shift) * line;
    for (i64 j = 0; j < 6; ++j) at[i * 6 + j] = row + column[j];
  }
  if (y > 0 && x > 0 && y + 5 <= job.h && x + 5 <= job.w) return;
  for (i64 i = 0; i < 6; ++i)
    for (i64 j = 0; j < 6; ++j) {
      const bool below = y - 1 + i >= 0 && y - 1 + i < job.h;
      if (!below || x - 1 + j < 0 || x - 1 + j >= job.w) at[i * 6 + j] = outside;
    }
}

inline void transform_grad_tile(const ConvJob<float>& job, i64 n, i64 y, i64 x, float* out,
                                i64 pitch, const float* zeros, const float* means) {
  const GradInput<float>& grad = *job.grad;
  const i64 c = job.source[0].channels;
  GradPatch patch;
  find_patch(job.source[0].r, job, n, y, x, c, 0, means, patch.at);
  if (grad.spread == Spread::IMAGE)
    for (i64 i = 0; i < WINO_POINTS; ++i)
      patch.d[i] = patch.at[i] == means ? zeros : grad.d + n * c;
  else
    find_patch(grad.d, job, n, y, x, c, grad.spread == Spread::POOL, zeros, patch.d);
  patch.factor = grad.spread == Spread::POOL ? 0.25f : 1.0f;
  patch.gamma = grad.gamma;
  patch.mean = grad.coefficient ? grad.mean[n] : 0.0f;
  patch.coefficient = grad.coefficient ? grad.coefficient[n] : 0.0f;
  transform_patch(patch, c, out, pitch);
}

// Tiles of strips [first, last) to v[point * pitch + tile * depth + c]. scratch: 2 * (channels + a
// vector).
void winograd_input(const ConvJob<float>& job, i64 first, i64 last, float* v, i64 pitch, i64 depth,
                    float* scratch) {
  const Strips strips(job.h, job.w);
  float *zeros = scratch, *means = scratch;
  i64 widest = 0;
  for (int s = 0; s < job.sources; ++s) widest = max_of(widest, job.source[s].channels);
  std::memset(zeros, 0, widest * sizeof(float));
  if (job.grad) means = zeros + widest + FLANES;
  for (i64 strip = first; strip < last; ++strip) {
    const i64 n = strip / strips.per_image;
    const i64 y = strips.y(strip), x0 = strips.x(strip), tiles = strips.tiles(strip);
    if (job.grad)
      for (i64 c = 0; c < widest; ++c) means[c] = job.grad->coefficient ? job.grad->mean[n] : 0.0f;
    for (i64 tile = 0; tile < tiles; ++tile, v += depth) {
      const i64 x = x0 + WINO_TILE * tile;
      if (job.grad) {
        transform_grad_tile(job, n, y, x, v, pitch, zeros, means);
        continue;
      }
      float* out = v;
      for (int s = 0; s < job.sources; out += job.source[s++].channels) {
        const Source<float>& source = job.source[s];
        if (job.sources == 1) {
          PlainPatch patch;
          find_patch(source.r, job, n, y, x, source.channels, 0, zeros, patch.at);
          transform_patch(patch, source.channels, out, pitch);
        } else {  // two scalars: they cannot wait for the output
          ScaledPatch patch;
          find_patch(source.r, job, n, y, x, source.channels, 0, zeros, patch.at);
          patch.scale = source.scale ? source.scale[n] : 1.0f;
          transform_patch(patch, source.channels, out, pitch);
        }
      }
    }
  }
}

// The state of an epilogue over a strip: lane-wise statistics, sums and dots of a panel.
struct StripState {
  FVec mean[2] = {}, m2[2] = {}, sum[2] = {}, dot[2] = {};
  float count = 0;  // pixels so far
};

// One vector of channels of a panel in the epilogue of one tile.
struct TileOut {
  i64 pixel, channel, lanes;  // of the tile's first pixel; first channel; channels that count
  i64 vh, vw;                 // pixels of the tile that lie in the image
  FVec scale, bias, gamma;
};

// f(i) for those of the 16 pixels that lie in the image; FULL: all do.
template <bool FULL, class F>
inline void for_pixels(const TileOut& t, const F& f) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (FULL || (i / 4 < t.vh && i % 4 < t.vw)) f(i);
}

// Adds the statistics of a tile to those of the strip, lane by lane (Chan's update).
template <bool FULL>
inline void add_statistics(const FVec* z, const TileOut& t, float before, FVec& mean, FVec& m2) {
  const float pixels = FULL ? 16.0f : static_cast<float>(t.vh * t.vw);
  FVec sum[2] = {}, squares[2] = {};  // two chains each: an addition takes four cycles
  for_pixels<FULL>(t, [&](int i) { sum[i % 2] += z[i]; });
  const FVec here = (sum[0] + sum[1]) * (1.0f / pixels);
  for_pixels<FULL>(t, [&](int i) {
    const FVec d = z[i] - here;
    squares[i % 2] += d * d;
  });
  const FVec delta = here - mean;
  mean += delta * (pixels / (before + pixels));
  m2 += (squares[0] + squares[1]) + (delta * delta) * (before * pixels / (before + pixels));
}

template <bool FULL>
inline void pool_tile(const ConvJob<float>& job, const TileOut& t, const FVec* r) {
  const i64 c = job.cout, y = t.pixel / job.w, x = t.pixel % job.w;  // y: rows of all images
  float* const pool = job.pool + (y / 2 * (job.w / 2) + x / 2) * c + t.channel;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int y2 = i / 2, x2 = i % 2, k = y2 * 8 + x2 * 2;
    const FVec mean = ((r[k] + r[k + 1]) + (r[k + 4] + r[k + 5])) * 0.25f;
    if (FULL || (2 * y2 < t.vh && 2 * x2 < t.vw))
      store_lanes<FULL>(pool + (y2 * (job.w / 2) + x2) * c, mean, t.lanes);
  }
}

template <bool FULL>
inline void winograd_layer_epilogue(const ConvJob<float>& job, const TileOut& t, FVec* z, int j,
                                    StripState& state) {
  const i64 c = job.cout, line = job.w * c, at = t.pixel * c + t.channel;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) z[i] = t.scale * z[i] + t.bias;
  if (job.stats) add_statistics<FULL>(z, t, state.count, state.mean[j], state.m2[j]);
  if (job.z)
    for_pixels<FULL>(
        t, [&](int i) { store_lanes<FULL>(job.z + at + i / 4 * line + i % 4 * c, z[i], t.lanes); });
  if (job.relu) {
    const FVec zero = {};
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      z[i] *= t.gamma;
      z[i] = zero > z[i] ? zero : z[i];  // keeps NaN, as torch's ReLU does
    }
  } else if (job.gamma) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) z[i] *= t.gamma;
  }
  if (job.r_out)
    for_pixels<FULL>(t, [&](int i) {
      store_lanes<FULL>(job.r_out + at + i / 4 * line + i % 4 * c, z[i], t.lanes);
    });
  if (job.sums) for_pixels<FULL>(t, [&](int i) { state.sum[j] += z[i]; });
  if (job.pool) pool_tile<FULL>(job, t, z);
}

// r_out = out_scale * h, dot = sum h * dot_with
template <bool FULL>
inline void winograd_dgrad_epilogue(const ConvJob<float>& job, const TileOut& t, FVec* h, int j,
                                    StripState& state) {
  const i64 c = job.cout, line = job.w * c, at = t.pixel * c + t.channel;
  FVec dot[2] = {};
  for_pixels<FULL>(t, [&](int i) {
    const i64 here = at + i / 4 * line + i % 4 * c;
    dot[i % 2] += h[i] * load_lanes<FULL>(job.dot_with + here, t.lanes);
    store_lanes<FULL>(job.r_out + here, t.scale * h[i], t.lanes);
  });
  state.dot[j] += dot[0] + dot[1];
}

template <bool FULL>
inline void winograd_tile_out(const ConvJob<float>& job, const TileOut& t, const float* m,
                              i64 m_pitch, int j, StripState& state) {
  FVec columns[24], z[16];
#pragma GCC unroll 6
  for (int x = 0; x < 6; ++x) {
    FVec in[6];
#pragma GCC unroll 6
    for (int y = 0; y < 6; ++y) in[y] = load(m + (y * 6 + x) * m_pitch);
    winograd_output_1d(in, 1, columns + x, 6);
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) winograd_output_1d(columns + y * 6, 1, z + y * 4, 1);
  if (job.dot_with)
    winograd_dgrad_epilogue<FULL>(job, t, z, j, state);
  else
    winograd_layer_epilogue<FULL>(job, t, z, j, state);
}

// What a strip leaves for the launcher: one mean and M2 per panel, sums per channel, one dot.
inline void finish_strip(const ConvJob<float>& job, i64 strip, i64 index, const Panel<float>& panel,
                         const StripState& state) {
  const i64 unit = strip * job.panels + index;
  if (job.stats) {
    float mean = 0, m2 = 0;
    for (i64 i = 0; i < panel.width; ++i) mean += state.mean[i / FLANES][i % FLANES];
    mean /= static_cast<float>(panel.width);
    for (i64 i = 0; i < panel.width; ++i) {
      const float d = state.mean[i / FLANES][i % FLANES] - mean;
      m2 += state.m2[i / FLANES][i % FLANES] + state.count * d * d;
    }
    job.stats[2 * unit] = mean, job.stats[2 * unit + 1] = m2;
  }
  if (job.dots) {
    float dot = 0;
    for (i64 i = 0; i < panel.width; ++i) dot += state.dot[i / FLANES][i % FLANES];
    job.dots[unit] = dot;
  }
  if (job.sums)
    for (i64 j = 0; j < panel.nv; ++j)
      store_lanes<false>(job.sums + strip * job.cout + panel.start + j * FLANES, state.sum[j],
                         min_of(FLANES, panel.width - j * FLANES));
}

// The products of one point and panel: m[tile * m_stride + j]. Meanwhile the weights that come
// next, `ahead`, are fetched.
inline void winograd_products(const float* v, i64 depth, i64 k, i64 tiles, const float* weights,
                              const float* ahead, const Panel<float>& panel, float* m,
                              i64 m_stride) {
  const Split split(tiles);
  const i64 step = (panel.lanes + split.count - 1) / split.count;
  for (i64 i = 0; i < split.count; ++i, ahead += k * step) {
    const i64 t0 = split.start(i), p = split.start(i + 1) - t0;
    with_size<BLOCK>(p, panel.nv,
                     TileCall<float>{v + t0 * depth, depth, 1, 0, k, weights, m + t0 * m_stride,
                                     m_stride, 1.0f, false, ahead, step});
  }
}

// A panel's products of strips [first, last), m[(tile * 36 + point) * lanes + j]: back, epilogue.
void winograd_finish(const ConvJob<float>& job, i64 first, i64 last, i64 index, const float* m) {
  const Strips strips(job.h, job.w);
  const Panel<float> panel(index, job.cout);
  FVec bias[2], gamma[2];
  load_parameter(job.bias, panel, 0.0f, bias);
  load_parameter(job.gamma, panel, 1.0f, gamma);
  for (i64 strip = first; strip < last; ++strip) {
    const i64 n = strip / strips.per_image, y = strips.y(strip);
    const float* scales = job.out_scale      ? job.out_scale
                          : job.sources == 1 ? job.source[0].scale
                                             : nullptr;
    const FVec scale = splat(scales ? scales[n] : 1.0f);
    const i64 vh = min_of(WINO_TILE, job.h - y);
    StripState state;
    for (i64 tile = 0; tile < strips.tiles(strip); ++tile, m += WINO_POINTS * panel.lanes) {
      const i64 x = strips.x(strip) + WINO_TILE * tile, vw = min_of(WINO_TILE, job.w - x);
      for (int j = 0; j < panel.nv; ++j) {
        const i64 lanes = min_of(FLANES, panel.width - j * FLANES);
        const TileOut t = {(n * job.h + y) * job.w + x,
                           panel.start + j * FLANES,
                           lanes,
                           vh,
                           vw,
                           scale,
                           bias[j],
                           gamma[j]};
        if (vh * vw == 16 && lanes == FLANES)
          winograd_tile_out<true>(job, t, m + j * FLANES, panel.lanes, j, state);
        else
          winograd_tile_out<false>(job, t, m + j * FLANES, panel.lanes, j, state);
      }
      state.count += static_cast<float>(vh * vw);
    }
    finish_strip(job, strip, index, panel, state);
  }
}

// Strips [first, last), whose `tiles` tiles v holds, and panels [begin, end): products, back,
// epilogue. The panels take turns at each point, whose v stays in the nearest cache. m: tiles * 36
// numbers per output channel.
void winograd_output(const ConvJob<float>& job, i64 first, i64 last, i64 begin, i64 end, i64 tiles,
                     const float* v, i64 pitch, i64 depth, float* m) {
  i64 k = 0;
  for (int s = 0; s < job.sources; ++s) k += job.source[s].channels;
  const i64 size = tiles * WINO_POINTS * 2 * FLANES;
  const auto weights = [&](i64 index, i64 point) {
    const Panel<float> panel(index, job.cout);
    return job.winograd + (panel.start * WINO_POINTS + point * panel.lanes) * k;
  };
  for (i64 point = 0; point < WINO_POINTS; ++point)
    for (i64 index = begin; index < end; ++index) {
      const Panel<float> panel(index, job.cout);
      const float* ahead =
          index + 1 < end ? weights(index + 1, point) : weights(begin, (point + 1) % WINO_POINTS);
      winograd_products(v + point * pitch, depth, k, tiles, weights(index, point), ahead, panel,
                        m + (index - begin) * size + point * panel.lanes,
                        WINO_POINTS * panel.lanes);
    }
  for (i64 index = begin; index < end; ++index)
    winograd_finish(job, first, last, index, m + (index - begin) * size);
}

// G g, with each row divided by the product of its point's distances to the others
inline void winograd_weight_1d(const double* g, i64 step, double* out, i64 out_step) {
  constexpr double P = WINO_P, Q = WINO_Q, P2 = P * P, Q2 = Q * Q;
  constexpr double OF_P = 1 / (2 * P2 * (P2 - Q2)), OF_Q = 1 / (2 * Q2 * (Q2 - P2));
  const double g0 = g[0], g1 = g[step], g2 = g[2 * step];
  out[0] = g0 * (1 / (P2 * Q2));
  out[out_step] = (g0 + P2 * g2 + P * g1) * OF_P;
  out[2 * out_step] = (g0 + P2 * g2 - P * g1) * OF_P;
  out[3 * out_step] = (g0 + Q2 * g2 + Q * g1) * OF_Q;
  out[4 * out_step] = (g0 + Q2 * g2 - Q * g1) * OF_Q;
  out[5 * out_step] = g2;
}

// Panels [begin, end) of G g G^T: packed[panel][point][channel][lanes], computed in double.
void winograd_pack(const float* weight, i64 outputs, i64 channels, const WeightStrides& at,
                   i64 begin, i64 end, float* packed) {
  for (i64 index = begin; index < end; ++index) {
    const Panel<float> panel(index, outputs);
    float* to = packed + panel.start * WINO_POINTS * channels;
    for (i64 c = 0; c < channels; ++c) {
      double g[9][2 * FLANES] = {}, half[18][2 * FLANES], u[36][2 * FLANES];
      const float* from = weight + at.first + panel.start * at.output + c * at.channel;
      for (i64 o = 0; o < panel.width; ++o)
        for (i64 tap = 0; tap < 9; ++tap) g[tap][o] = from[o * at.output + tap * at.tap];
      constexpr i64 STEP = 2 * FLANES;
      for (i64 x = 0; x < 3; ++x)
        for (i64 o = 0; o < STEP; ++o)
          winograd_weight_1d(&g[x][o], 3 * STEP, &half[x][o], 3 * STEP);
      for (i64 y = 0; y < 6; ++y)
        for (i64 o = 0; o < STEP; ++o)
          winograd_weight_1d(&half[3 * y][o], STEP, &u[6 * y][o], STEP);
      for (i64 point = 0; point < WINO_POINTS; ++point)
        for (i64 o = 0; o < panel.lanes; ++o)
          to[(point * channels + c) * panel.lanes + o] = static_cast<float>(u[point][o]);
    }
  }
}
