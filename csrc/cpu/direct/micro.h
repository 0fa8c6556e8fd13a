// Register tiles: the two inner loops that all convolutions here are made of.
//
//   tile         out[p][j] (+)= scale * sum_{run,k} a[p*stride + run*run_stride + k] * b[k][j]
//   tile_pixels  out[p][j] (+)= scale * sum_{row,x} a[.. + p] * d[.. + j]
//
// p < P pixels (or input channels) by j < NV vectors of output channels are held in registers; per
// step of the sum: P broadcasts, NV vector loads, P*NV multiply-adds. P = 12, NV = 2 fills 24 of
// AVX-512's 32 registers and asks 14 loads for 24 multiply-adds (two of each per cycle: arithmetic
// decides). The order of the sum is that of k and is the same for every P and NV: an element's
// value does not depend on the tile it falls into.
//
// Included by isa/body.h inside an anonymous namespace; needs FASTPHI_VECTOR_BYTES.

template <class T>
struct Vec {
  static constexpr i64 LANES = FASTPHI_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(FASTPHI_VECTOR_BYTES)));
  typedef T loose __attribute__((vector_size(FASTPHI_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <class T>
inline typename Vec<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vec<T>::loose*>(p);
}

template <class T>
inline void store(T* p, typename Vec<T>::type v) {
  *reinterpret_cast<typename Vec<T>::loose*>(p) = v;
}

template <class T>
inline typename Vec<T>::type splat(T x) {
  return x - typename Vec<T>::type{};
}

// a: (P pixels, stride) x (runs, run_stride) x (len contiguous); b: (runs*len, NV*LANES); out: (P,
// out_stride) x (NV*LANES)
// AHEAD, lines per step: meanwhile len * step values from `ahead` on are brought into the
// second-level cache. Spread over all tiles that share b: faster than memory delivers, prefetches
// stall the loads.
// ON: goes on with what is in out, to the same bits as one sum; scale and add do not count.
template <class T, int P, int NV, int AHEAD, bool ON>
void tile(const T* __restrict a, i64 stride, i64 runs, i64 run_stride, i64 len,
          const T* __restrict b, T* __restrict out, i64 out_stride, T scale, bool add,
          const T* ahead, i64 step) {
  constexpr i64 V = Vec<T>::LANES;
  constexpr int BASES = (P + 2) / 3;  // a pointer for every three pixels
  typename Vec<T>::type acc[P][NV] = {};
  if constexpr (ON) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[p][j] = load(out + p * out_stride + j * V);
  }
  for (i64 run = 0; run < runs; ++run) {
    const T* base[BASES];
#pragma GCC unroll 4
    for (int q = 0; q < BASES; ++q) {
      base[q] = a + run * run_stride + 3 * q * stride;
      // Else the compiler makes one pointer and P offsets of it, keeps some of them in vector
      // registers, and fetches them through the port that multiplies: 5 to 10 % slower.
      asm("" : "+r"(base[q]));
    }
    for (i64 k = 0; k < len; ++k, b += NV * V) {
      if constexpr (AHEAD > 0) __builtin_prefetch(ahead, 0, 2);
      if constexpr (AHEAD > 1) __builtin_prefetch(ahead + step / 2, 0, 2);
      ahead += step;
      typename Vec<T>::type bv[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) bv[j] = load(b + j * V);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const auto av = splat(base[p / 3][p % 3 * stride]);
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[p][j] += av * bv[j];
      }
#pragma GCC unroll 4
      for (int q = 0; q < BASES; ++q) ++base[q];
    }
  }
  const auto sv = splat(scale);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      T* o = out + p * out_stride + j * V;
      store(o, ON ? acc[p][j] : add ? load(o) + sv * acc[p][j] : sv * acc[p][j]);
    }
}

// a: (rows, row_stride_a) x (len, stride_a) x (P contiguous); d: likewise x (NV*LANES); out: (P,
// NV*LANES)
template <class T, int P, int NV>
void tile_pixels(const T* __restrict a, i64 stride_a, i64 row_stride_a, const T* __restrict d,
                 i64 stride_d, i64 row_stride_d, i64 rows, i64 len, T scale, T* __restrict out,
                 bool add) {
  constexpr i64 V = Vec<T>::LANES;
  typename Vec<T>::type acc[P][NV] = {};
  const T* ahead = out + FASTPHI_BLOCK * NV * V;  // where the next tile's sums lie, mostly
  for (i64 row = 0; row < rows; ++row) {
    const T* ap = a + row * row_stride_a;
    const T* dp = d + row * row_stride_d;
    for (i64 x = 0; x < len; ++x, ap += stride_a, dp += stride_d) {
      __builtin_prefetch(ahead, 1), ahead += V;
      typename Vec<T>::type dv[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) dv[j] = load(dp + j * V);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const auto av = splat(ap[p]);
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[p][j] += av * dv[j];
      }
    }
  }
  const auto sv = splat(scale);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      T* o = out + (p * NV + j) * V;
      store(o, add ? load(o) + sv * acc[p][j] : sv * acc[p][j]);
    }
}
