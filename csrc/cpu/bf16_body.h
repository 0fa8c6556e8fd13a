// The bfloat16 kernels round a product of tiles (tile_32, tile_16): epilogues, the first and the
// last layer, up-sampling, pooling. Included by bf16_amx.cpp and bf16_avx512.cpp inside an
// anonymous namespace.

constexpr i64 PRODUCTS = BF16_UNIT * BF16_BLOCK;

inline i64 min_of(i64 a, i64 b) { return a < b ? a : b; }

// Where in a block a tap's tile begins, relative to its position.
inline i64 tap_at(const Bf16Plane& p, i64 i, i64 j) {
  return (i * p.pitch + j * (p.copy ? p.copy : 1)) * BF16_BLOCK;
}

struct Taps {
  i64 at[9];
  explicit Taps(const Bf16Plane& p) {
    for (i64 t = 0; t < 9; ++t) at[t] = tap_at(p, t / 3, t % 3);
  }
};

inline __m512i to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline __m512 from_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

inline __m512 relu(__m512 x) {  // keeps NaN, as torch's does
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLT_UQ), x);
}

// A pixel's 32 channels to its place or places, and zeros where a row ends; m = y * pitch + x.
inline void put(const Bf16Plane& p, bf16* block, i64 m, i64 x, __m512i value) {
  const __m512i zero = _mm512_setzero_si512();
  bf16* at = block + (m + p.pitch) * BF16_BLOCK;
  if (!p.copy) {
    _mm512_storeu_si512(at + BF16_BLOCK, value);
    if (x == p.w - 1) _mm512_storeu_si512(at + 2 * BF16_BLOCK, zero);
    return;
  }
  _mm512_storeu_si512(at + BF16_BLOCK, x == p.w - 1 ? zero : value);
  at += p.copy * BF16_BLOCK;
  _mm512_storeu_si512(at, value);
  at += p.copy * BF16_BLOCK;
  _mm512_storeu_si512(at - BF16_BLOCK, x == 0 ? zero : value);
}

// Where the image itself begins: position 0.
inline i64 inside(const Bf16Plane& p) { return tap_at(p, 1, 1); }

// Sum and sum of squares of a unit's z, per lane, of differences to the first value: nothing
// cancels, as it would with z itself.
struct Moments {
  __m512 first[2], sum[2], squares[2];
  void start(int v, __m512 z) { first[v] = z, sum[v] = squares[v] = _mm512_setzero_ps(); }
  void add(int v, __m512 z) {
    const __m512 d = _mm512_sub_ps(z, first[v]);
    sum[v] = _mm512_add_ps(sum[v], d);
    squares[v] = _mm512_fmadd_ps(d, d, squares[v]);
  }
  // (count, mean, M2) of `pixels` values in each of the first `width` lanes
  void finish(i64 pixels, i64 width, float* out) const {
    const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(pixels));
    const __mmask16 lanes[2] = {static_cast<__mmask16>((1 << min_of(width, 16)) - 1),
                                static_cast<__mmask16>((1 << (width > 16 ? width - 16 : 0)) - 1)};
    __m512 mean[2];
    float total = 0, m2 = 0;
    for (int v = 0; v < 2; ++v) {
      mean[v] = _mm512_fmadd_ps(sum[v], share, first[v]);
      total += _mm512_mask_reduce_add_ps(lanes[v], mean[v]);
    }
    const float centre = total / static_cast<float>(width);
    for (int v = 0; v < 2; ++v) {
      const __m512 d = _mm512_sub_ps(mean[v], _mm512_set1_ps(centre));
      const __m512 own = _mm512_fnmadd_ps(_mm512_mul_ps(sum[v], share), sum[v], squares[v]);
      const __m512 between = _mm512_mul_ps(_mm512_set1_ps(static_cast<float>(pixels)), d);
      m2 += _mm512_mask_reduce_add_ps(lanes[v], _mm512_fmadd_ps(between, d, own));
    }
    out[0] = static_cast<float>(pixels * width), out[1] = centre, out[2] = m2;
  }
};

// Products (32, 32) of one or two sources, `scale` each, to r_out, statistics and sums.
template <bool TWO>
void epilogue(const Bf16Layer& job, i64 n, i64 panel, i64 unit, const float* products,
              const float* scale) {
  const Bf16Plane plane = job.plane;
  const i64 start = unit * BF16_UNIT, end = min_of(start + BF16_UNIT, plane.positions);
  const i64 units = bf16_units(plane);
  bf16* block =
      job.r_out ? job.r_out + (n * job.panels + panel) * plane.block * BF16_BLOCK : nullptr;
  __m512 bias[2], gamma[2], sums[2];
  Moments moments;
  for (int v = 0; v < 2; ++v) {
    bias[v] = _mm512_loadu_ps(job.bias + panel * 32 + v * 16);
    gamma[v] = job.gamma ? _mm512_loadu_ps(job.gamma + panel * 32 + v * 16) : _mm512_set1_ps(1);
    sums[v] = _mm512_setzero_ps();
  }
  const __m512 s = _mm512_set1_ps(scale[0]), s2 = _mm512_set1_ps(TWO ? scale[1] : 0);
  auto z_of = [&](const float* p, int v) {
    __m512 z = _mm512_fmadd_ps(s, _mm512_load_ps(p + v * 16), bias[v]);
    if (TWO) z = _mm512_fmadd_ps(s2, _mm512_load_ps(p + PRODUCTS + v * 16), z);
    return z;
  };
  i64 x = start % plane.pitch, pixels = 0;
  const float* p = products;
  const float* base = x < plane.w ? products : products + BF16_BLOCK;
  for (int v = 0; v < 2; ++v) moments.start(v, z_of(base, v));
  for (i64 m = start; m < end; ++m, ++x, p += BF16_BLOCK) {
    if (x == plane.pitch) x = 0;
    if (x == plane.w) continue;
    ++pixels;
    __m512 r[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m512 z = z_of(p, v);
      moments.add(v, z);
      r[v] = relu(_mm512_mul_ps(gamma[v], z));
      sums[v] = _mm512_add_ps(sums[v], r[v]);
    }
    if (block) put(plane, block, m, x, to_bf16(r[0], r[1]));
  }
  if (job.stats)
    moments.finish(pixels, min_of(job.cout - panel * 32, 32),
                   job.stats + ((n * job.panels + panel) * units + unit) * 3);
  if (job.sums)
    for (int v = 0; v < 2; ++v)
      _mm512_storeu_ps(job.sums + ((n * units + unit) * job.panels + panel) * 32 + v * 16, sums[v]);
}

// The first layer in float32. products (32, 32) of a unit: patch (positions, 9 * C) times weights
// (9 * C, 32).
template <int P>
void first_rows(const float* patch, i64 k, const float* weights, float* out) {
  __m512 sums[P][2] = {};
  for (i64 i = 0; i < k; ++i) {
    const __m512 w0 = _mm512_loadu_ps(weights + i * 32),
                 w1 = _mm512_loadu_ps(weights + i * 32 + 16);
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) {
      const __m512 x = _mm512_set1_ps(patch[p * k + i]);
      sums[p][0] = _mm512_fmadd_ps(x, w0, sums[p][0]);
      sums[p][1] = _mm512_fmadd_ps(x, w1, sums[p][1]);
    }
  }
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p) {
    _mm512_store_ps(out + p * 32, sums[p][0]);
    _mm512_store_ps(out + p * 32 + 16, sums[p][1]);
  }
}

void first_layer(const Bf16Layer& job, i64 p0, i64 p1, i64 begin, i64 end) {
  alignas(64) float products[PRODUCTS];
  float patch[BF16_UNIT * 9 * BF16_IMAGE_CHANNELS];
  const i64 units = bf16_units(job.plane), c = job.image_channels, row = (job.plane.w + 2) * c;
  for (i64 i = begin; i < end; ++i) {
    const i64 n = i / units, unit = i % units;
    const float* image = job.image + n * (job.plane.h + 2) * row;
    float* to = patch;
    for (i64 p = 0; p < BF16_UNIT; ++p) {
      const i64 m = min_of(unit * BF16_UNIT + p, job.plane.positions - 1);
      const i64 y = m / job.plane.pitch, x = min_of(m % job.plane.pitch, job.plane.w - 1);
      for (i64 t = 0; t < 3; ++t, to += 3 * c)
        std::memcpy(to, image + (y + t) * row + x * c, 3 * c * sizeof(float));
    }
    for (i64 panel = p0; panel < p1; ++panel) {
      const float* weights = job.first + panel * 9 * c * 32;
      first_rows<11>(patch, 9 * c, weights, products);
      first_rows<11>(patch + 11 * 9 * c, 9 * c, weights, products + 11 * 32);
      first_rows<10>(patch + 22 * 9 * c, 9 * c, weights, products + 22 * 32);
      const float one = 1;
      epilogue<false>(job, n, panel, unit, products, &one);
    }
  }
}

void layer(const Bf16Layer& job, i64 p0, i64 p1, i64 begin, i64 end) {
  if (job.image) return first_layer(job, p0, p1, begin, end);
  alignas(64) float products[2 * PRODUCTS];
  const Tiles tiles;
  const Taps taps(job.plane);
  const i64 units = bf16_units(job.plane), stride = job.plane.block * BF16_BLOCK;
  const i64 all = job.source[0].blocks + (job.sources > 1 ? job.source[1].blocks : 0);
  for (i64 panel = p0; panel < p1; ++panel)
    for (i64 i = begin; i < end; ++i) {
      const i64 n = i / units, unit = i % units;
      const bf16* b = job.packed + panel * all * 9 * BF16_PAIRED;
      float scale[2];
      for (int s = 0; s < job.sources; ++s) {
        const Bf16Source& from = job.source[s];
        const bf16* a = from.r + n * from.blocks * stride + unit * BF16_UNIT * BF16_BLOCK;
        tile_32(a, taps.at, 9, from.blocks, stride, b, products + s * PRODUCTS);
        b += from.blocks * 9 * BF16_PAIRED;
        scale[s] = from.scale[n];
      }
      if (job.sources > 1)
        epilogue<true>(job, n, panel, unit, products, scale);
      else
        epilogue<false>(job, n, panel, unit, products, scale);
    }
}

void image(const Bf16Image& job, i64 begin, i64 end) {
  alignas(64) float products[BF16_UNIT * 16];
  const Tiles tiles;
  const Taps taps(job.plane);
  const Bf16Plane& plane = job.plane;
  const i64 units = bf16_units(plane), stride = plane.block * BF16_BLOCK, c = job.channels;
  for (i64 i = begin; i < end; ++i) {
    const i64 n = i / units, start = i % units * BF16_UNIT;
    const bf16* a = job.source.r + n * job.source.blocks * stride + start * BF16_BLOCK;
    tile_16(a, taps.at, 9, job.source.blocks, stride, job.packed, products);
    float* out = job.out + n * c * plane.h * plane.w;
    const float s = job.source.scale[n];
    for (i64 m = start; m < min_of(start + BF16_UNIT, plane.positions); ++m) {
      const i64 y = m / plane.pitch, x = m % plane.pitch;
      const float* p = products + (m - start) * 16;
      if (x < plane.w)
        for (i64 k = 0; k < c; ++k)
          out[(k * plane.h + y) * plane.w + x] = s * (p[k] + p[c + k]) + job.bias[k];
    }
  }
}

void upsample(const Bf16Upsample& job, i64 begin, i64 end) {
  alignas(64) float products[PRODUCTS];
  const Tiles tiles;
  const Bf16Plane &plane = job.plane, &to = job.to;
  const i64 units = bf16_units(plane), stride = plane.block * BF16_BLOCK;
  const i64 centre = inside(plane), blocks = job.source.blocks;
  for (i64 i = begin; i < end; ++i) {
    const i64 unit = i % units, n = i / units % job.n, panel = i / units / job.n % job.panels;
    const i64 tap = i / units / job.n / job.panels, start = unit * BF16_UNIT;
    const bf16* a = job.source.r + n * blocks * stride + start * BF16_BLOCK;
    tile_32(a, &centre, 1, blocks, stride,
            job.packed + (tap * job.panels + panel) * blocks * BF16_PAIRED, products);
    bf16* block = job.out + (n * job.panels + panel) * to.block * BF16_BLOCK;
    __m512 s = _mm512_set1_ps(1), bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (job.bias) {
      s = _mm512_set1_ps(job.source.scale[n]);
      for (int v = 0; v < 2; ++v) bias[v] = _mm512_loadu_ps(job.bias + panel * 32 + v * 16);
    }
    for (i64 m = start; m < min_of(start + BF16_UNIT, plane.positions); ++m) {
      const i64 y = 2 * (m / plane.pitch) + tap / 2, x = 2 * (m % plane.pitch) + tap % 2;
      const float* p = products + (m - start) * BF16_BLOCK;
      if (x < to.w)
        put(to, block, y * to.pitch + x, x,
            to_bf16(_mm512_fmadd_ps(s, _mm512_load_ps(p), bias[0]),
                    _mm512_fmadd_ps(s, _mm512_load_ps(p + 16), bias[1])));
    }
  }
}

void pool(const Bf16Pool& job, i64 begin, i64 end) {
  const Bf16Plane &plane = job.plane, &to = job.to;
  const __m512 quarter = _mm512_set1_ps(0.25f);
  for (i64 i = begin; i < end; ++i) {
    const bf16* from = job.r + i * plane.block * BF16_BLOCK + inside(plane);
    bf16* block = job.out + i * to.block * BF16_BLOCK;
    for (i64 y = 0; y < to.h; ++y)
      for (i64 x = 0; x < to.w; ++x) {
        const bf16* p = from + (2 * y * plane.pitch + 2 * x) * BF16_BLOCK;
        __m512 mean[2];
        for (int v = 0; v < 2; ++v) {
          auto at = [&](i64 k) {
            return from_bf16(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + k * BF16_BLOCK + v * 16)));
          };
          const __m512 top = _mm512_add_ps(at(0), at(1)),
                       bottom = _mm512_add_ps(at(plane.pitch), at(plane.pitch + 1));
          mean[v] = _mm512_mul_ps(quarter, _mm512_add_ps(top, bottom));
        }
        put(to, block, y * to.pitch + x, x, to_bf16(mean[0], mean[1]));
      }
  }
}
