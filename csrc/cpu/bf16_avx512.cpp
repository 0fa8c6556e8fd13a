// The bfloat16 kernels on AVX512_BF16, where there is no AMX: a step multiplies a pair of channels
// of a position by that pair's 16 weights and adds both products to 16 sums.
// setup.py compiles this file with -mavx512bf16 ...; elsewhere than on x86-64 it is empty.
#if defined(__x86_64__)
#include <cstring>
#include <immintrin.h>

#include "bf16.h"

namespace fastphi {
namespace {

#include "bf16_operand.h"

// out (P positions, NV * 16 outputs, row) = sum over blocks and taps of a (P, 32) b (32, NV * 16)
template <int P, int NV>
void tile(const bf16* a, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
          float* out) {
  __m512 sums[P][NV] = {};
  for (i64 block = 0; block < blocks; ++block, a += stride)
    for (i64 t = 0; t < count; ++t, b += NV * 512) {
      const bf16* at = a + taps[t];
      for (i64 pair = 0; pair < 16; ++pair) {
        __m512bh weights[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
          weights[v] = (__m512bh)_mm512_loadu_si512(b + v * 512 + pair * 32);
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p) {
          int two;
          std::memcpy(&two, at + p * BF16_BLOCK + 2 * pair, sizeof two);
          const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) sums[p][v] = _mm512_dpbf16_ps(sums[p][v], weights[v], both);
        }
      }
    }
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(out + p * NV * 16 + v * 16, sums[p][v]);
}

// 32 positions in registers: 11 + 11 + 10, two vectors of sums each
template <int NV>
void tiles(const bf16* a, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
           float* out) {
  tile<11, NV>(a, taps, count, blocks, stride, b, out);
  tile<11, NV>(a + 11 * BF16_BLOCK, taps, count, blocks, stride, b, out + 11 * NV * 16);
  tile<10, NV>(a + 22 * BF16_BLOCK, taps, count, blocks, stride, b, out + 22 * NV * 16);
}

// Of each of `count` units, out (32 positions, 32 outputs) = sum over blocks and taps of
// a (32 positions, 32) b (32, 32). beside() is for processors with a unit to work beside.
struct Tiles {
  ~Tiles() {}  // nothing to set up
  template <class Beside>
  void multiply(const Operand* units, int count, const i64* taps, i64 n_taps, i64 blocks,
                i64 stride, const bf16* b, Beside&) {
    for (int u = 0; u < count; ++u)
      tiles<2>(units[u].a, taps, n_taps, blocks, stride, b, units[u].out);
  }
  void store() {}
};

// out (32 positions, 16 outputs)
void tile_16(const bf16* a, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
             float* out) {
  tiles<1>(a, taps, count, blocks, stride, b, out);
}

#include "bf16_body.h"

}  // namespace

extern const Bf16Kernels bf16_avx512 = {layer, image, upsample, pool, dgrad, grad_input};

}  // namespace fastphi
#endif
