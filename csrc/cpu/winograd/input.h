// winograd_input: B^T d B of the tiles of some strips; d is r, a scaled r of two sources, or r or a
// gradient made of z where it is read. Included by isa/body.h inside an
// anonymous namespace, after winograd/kernel.h.

// Pixels of a 6x6 patch: lanes from channel c on.
struct PlainPatch {
  const float* at[WINO_POINTS];
  template <bool FULL>
  FVec get(int pixel, i64 c, i64 count) const {
    return load_lanes<FULL>(at[pixel] + c, count);
  }
};

// ReLU(gamma z): the layer before has kept z alone
struct RawPatch {
  const float* at[WINO_POINTS];
  const float* gamma;
  template <bool FULL>
  FVec get(int pixel, i64 c, i64 count) const {
    const FVec g = gamma ? load_lanes<FULL>(gamma + c, count) : splat(1.0f);
    return relu(g * load_lanes<FULL>(at[pixel] + c, count));
  }
};

struct ScaledPatch {
  const float* at[WINO_POINTS];
  float scale;
  bool raw;
  const float* gamma;
  template <bool FULL>
  FVec get(int pixel, i64 c, i64 count) const {
    const FVec r = load_lanes<FULL>(at[pixel] + c, count);
    if (!raw) return scale * r;
    const FVec g = gamma ? load_lanes<FULL>(gamma + c, count) : splat(1.0f);
    return scale * relu(g * r);
  }
};

// Of the 6x6 pixels, the 4x4 of the tile itself.
constexpr bool in_tile(int pixel) {
  return pixel / 6 >= 1 && pixel / 6 <= 4 && pixel % 6 >= 1 && pixel % 6 <= 4;
}

// dz of direct/gradient.h, computed where it is read. SUMS: those of the tile's own pixels are
// added up. POOL: part of d comes from a pool.
template <bool SUMS, bool POOL>
struct GradPatch {
  const float *at[WINO_POINTS], *d[WINO_POINTS], *pool[WINO_POINTS];  // at: z
  const float* gamma;
  bool relu;
  float factor, mean, coefficient;
  mutable FVec bias[2], gain[2];  // two chains each: an addition takes four cycles
  template <bool FULL>
  FVec get(int pixel, i64 c, i64 count) const {
    const FVec z = load_lanes<FULL>(at[pixel] + c, count), zero = {};
    const FVec g = gamma ? load_lanes<FULL>(gamma + c, count) : splat(1.0f);
    FVec through = factor * load_lanes<FULL>(d[pixel] + c, count);
    if constexpr (POOL) through += 0.25f * load_lanes<FULL>(pool[pixel] + c, count);
    if (relu) through = g * z > zero ? through : zero;
    const FVec dz = g * through + coefficient * (z - mean);
    if (SUMS && in_tile(pixel)) {
      bias[pixel % 2] += dz;
      gain[pixel % 2] += through * z;
    }
    return dz;
  }
};

// A number that is known when compiling, as an argument.
template <auto V>
struct Constant {
  static constexpr auto VALUE = V;
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

// B^T dz B of a tile, and its sums to bias and gain (channels), if wanted.
template <bool SUMS, bool POOL>
void transform_grad_tile(const ConvJob<float>& job, i64 n, i64 y, i64 x, float* out, i64 pitch,
                         const float* zeros, const float* means, float* bias, float* gain) {
  const GradInput<float>& grad = *job.grad;
  const i64 channels = job.source[0].channels;
  GradPatch<SUMS, POOL> patch;
  find_patch(job.source[0].r, job, n, y, x, channels, 0, means, patch.at);
  if (grad.spread == Spread::IMAGE)
    for (i64 i = 0; i < WINO_POINTS; ++i)
      patch.d[i] = patch.at[i] == means ? zeros : grad.d + n * channels;
  else
    find_patch(grad.d, job, n, y, x, channels, grad.spread == Spread::POOL, zeros, patch.d);
  if (POOL) find_patch(grad.d_pool, job, n, y, x, channels, 1, zeros, patch.pool);
  patch.factor = grad.spread == Spread::POOL ? 0.25f : 1.0f;
  patch.gamma = grad.gamma, patch.relu = grad.relu;
  patch.mean = grad.coefficient ? grad.mean[n] : 0.0f;
  patch.coefficient = grad.coefficient ? grad.coefficient[n] : 0.0f;
  const auto vector = [&](auto full, i64 c, i64 count) {
    constexpr bool FULL = decltype(full)::VALUE;
    if (SUMS) patch.bias[0] = patch.bias[1] = patch.gain[0] = patch.gain[1] = FVec{};
    transform_vector<FULL>(patch, c, count, out + c, pitch);
    if (!SUMS) return;
    store_lanes<FULL>(bias + c, load_lanes<FULL>(bias + c, count) + (patch.bias[0] + patch.bias[1]),
                      count);
    store_lanes<FULL>(gain + c, load_lanes<FULL>(gain + c, count) + (patch.gain[0] + patch.gain[1]),
                      count);
  };
  i64 c = 0;
  for (; c + FLANES <= channels; c += FLANES) vector(Constant<true>{}, c, FLANES);
  if (c < channels) vector(Constant<false>{}, c, channels - c);
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
    float *bias = nullptr, *gain = nullptr;
    if (job.grad) {
      for (i64 c = 0; c < widest; ++c) means[c] = job.grad->coefficient ? job.grad->mean[n] : 0.0f;
      if (job.grad->bias) {
        bias = job.grad->bias + strip * widest, gain = job.grad->gain + strip * widest;
        std::memset(bias, 0, widest * sizeof(float)), std::memset(gain, 0, widest * sizeof(float));
      }
    }
    for (i64 tile = 0; tile < tiles; ++tile, v += depth) {
      const i64 x = x0 + WINO_TILE * tile;
      if (job.grad) {
        const bool pool = job.grad->spread == Spread::PIXEL_AND_POOL;
        const auto transform =
            bias ? (pool ? transform_grad_tile<true, true> : transform_grad_tile<true, false>)
                 : (pool ? transform_grad_tile<false, true> : transform_grad_tile<false, false>);
        transform(job, n, y, x, v, pitch, zeros, means, bias, gain);
        continue;
      }
      float* out = v;
      for (int s = 0; s < job.sources; out += job.source[s++].channels) {
        const Source<float>& source = job.source[s];
        if (source.raw && job.sources == 1) {
          RawPatch patch;
          find_patch(source.r, job, n, y, x, source.channels, 0, zeros, patch.at);
          patch.gamma = source.gamma;
          transform_patch(patch, source.channels, out, pitch);
        } else if (job.sources == 1) {
          PlainPatch patch;
          find_patch(source.r, job, n, y, x, source.channels, 0, zeros, patch.at);
          transform_patch(patch, source.channels, out, pitch);
        } else {  // two scalars: they cannot wait for the output
          ScaledPatch patch;
          find_patch(source.r, job, n, y, x, source.channels, 0, zeros, patch.at);
          patch.scale = source.scale ? source.scale[n] : 1.0f;
          patch.raw = source.raw, patch.gamma = source.gamma;
          transform_patch(patch, source.channels, out, pitch);
        }
      }
    }
  }
}
