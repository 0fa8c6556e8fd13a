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

// out (P positions from FIRST on, NV * 16 outputs, row) = sum over blocks and taps of
// a (P, 32) b (32, NV * 16)
template <int FIRST, int P, int NV>
void tile(const Operand& unit, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
          bool back, float* out) {
  __m512 sums[P][NV] = {};
  for (i64 k = 0; k < blocks; ++k) {
    const i64 block = back ? blocks - 1 - k : k;
    const bf16* weights_of = b + block * count * NV * 512;
    for (i64 t = 0; t < count; ++t, weights_of += NV * 512) {
      const bf16* at = unit.a + block * stride + taps[t];
      const bf16* second = at + unit.second - BF16_TILE * BF16_BLOCK;
      for (i64 pair = 0; pair < 16; ++pair) {
        __m512bh weights[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
          weights[v] = (__m512bh)_mm512_loadu_si512(weights_of + v * 512 + pair * 32);
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p) {
          int two;
          const bf16* from = FIRST + p < BF16_TILE ? at : second;
          std::memcpy(&two, from + (FIRST + p) * BF16_BLOCK + 2 * pair, sizeof two);
          const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) sums[p][v] = _mm512_dpbf16_ps(sums[p][v], weights[v], both);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(out + (FIRST + p) * NV * 16 + v * 16, sums[p][v]);
}

// 32 positions in registers: 11 + 11 + 10, two vectors of sums each
template <int NV>
void tiles(const Operand& unit, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
           bool back, float* out) {
  tile<0, 11, NV>(unit, taps, count, blocks, stride, b, back, out);
  tile<11, 11, NV>(unit, taps, count, blocks, stride, b, back, out);
  tile<22, 10, NV>(unit, taps, count, blocks, stride, b, back, out);
}

// out (32 positions, 32 outputs) = sum over blocks and taps of a (32 positions, 32) b (32, 32), the
// blocks in order, or `back`. beside() is for processors with a unit to work beside.
struct Tiles {
  ~Tiles() {}  // nothing to set up
  template <class Beside>
  void multiply(const Operand& unit, const i64* taps, i64 n_taps, i64 blocks, i64 stride,
                const bf16* b, bool back, float* out, Beside&) {
    tiles<2>(unit, taps, n_taps, blocks, stride, b, back, out);
  }
  void store() {}
};

// out (32 positions, 16 outputs)
void tile_16(const Operand& unit, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
             float* out) {
  tiles<1>(unit, taps, count, blocks, stride, b, false, out);
}

#include "bf16_body.h"

}  // namespace

extern const Bf16Kernels bf16_avx512 = {layer, image, upsample, pool, dgrad, grad_input};

}  // namespace fastphi
#endif
