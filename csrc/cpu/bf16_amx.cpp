// The bfloat16 kernels on AMX: a tile product is 16 positions x 16 outputs x 32 channels, 16 cycles
// of the matrix unit; two tiles of positions by two of weights fill the four tiles of sums.
// setup.py compiles this file with -mamx-tile -mamx-bf16 ...; elsewhere than on x86-64 it is empty.
#if defined(__x86_64__)
#include <cstring>
#include <immintrin.h>

#include "bf16.h"

namespace fastphi {
namespace {

#include "bf16_operand.h"

// Tiles 0-3: sums, 4-5: positions, 6-7: weights; each of 16 rows of 64 bytes. Configured for the
// life of the object, on this thread.
class Tiles {
 public:
  Tiles() {
    alignas(64) unsigned char config[64] = {1};  // palette
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

constexpr i64 HALF = 16 * BF16_BLOCK;

inline void load_sums(const float* sums) {
  _tile_loadd(0, sums, 128);
  _tile_loadd(1, sums + 16, 128);
  _tile_loadd(2, sums + 16 * 32, 128);
  _tile_loadd(3, sums + 16 * 32 + 16, 128);
}

inline void store_sums(float* sums) {
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 16 * 32, 128);
  _tile_stored(3, sums + 16 * 32 + 16, 128);
}

// Of each of `count` units, out (32 positions, 32 outputs) = sum over blocks and taps of
// a (32 positions, 32) b (32, 32). Two units share the weights of a block while these are in the
// first-level cache, their sums waiting there meanwhile. beside() is called for every product:
// vector work that the processor does while the matrix unit multiplies.
template <class Beside>
void multiply(const Operand* units, int count, const i64* taps, i64 n_taps, i64 blocks, i64 stride,
              const bf16* b, Beside& beside) {
  asm volatile("" ::: "memory");  // the loads below do not tell the compiler what they read
  for (i64 block = 0; block < blocks; ++block, b += n_taps * BF16_PAIRED)
    for (int u = 0; u < count; ++u) {
      const bf16* a = units[u].a + block * stride;
      if (block == 0 || count > 1) {
        if (block > 0) {
          load_sums(units[u].out);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
      }
      for (i64 t = 0; t < n_taps; ++t) {
        const bf16 *at = a + taps[t], *w = b + t * BF16_PAIRED;
        _tile_loadd(4, at, 64);
        _tile_loadd(6, w, 64);
        _tile_loadd(5, at + HALF, 64);
        _tile_loadd(7, w + HALF, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        beside();
      }
      if (block == blocks - 1 || count > 1) store_sums(units[u].out);
    }
}

// out (32 positions, 16 outputs)
void tile_16(const bf16* a, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
             float* out) {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(2);
  for (i64 block = 0; block < blocks; ++block, a += stride)
    for (i64 t = 0; t < count; ++t, b += HALF) {
      const bf16* at = a + taps[t];
      _tile_loadd(6, b, 64);
      _tile_loadd(4, at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, at + HALF, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
  _tile_stored(0, out, 64);
  _tile_stored(2, out + 16 * 16, 64);
}

#include "bf16_body.h"

}  // namespace

extern const Bf16Kernels bf16_amx = {layer, image, upsample, pool, dgrad, grad_input};

}  // namespace fastphi
#endif
