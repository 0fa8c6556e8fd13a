// The bfloat16 kernels on AMX: a tile product is 16 positions x 16 outputs x 32 channels, 16 cycles
// of the matrix unit; two tiles of positions by two of weights fill the four tiles of sums.
// setup.py compiles this file with -mamx-tile -mamx-bf16 ...; elsewhere than on x86-64 it is empty.
#if defined(__x86_64__)
#include <cstring>
#include <immintrin.h>

#include "bf16.h"

namespace fastphi {
namespace {

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

// out (32 positions, 32 outputs) = sum over blocks and taps of a (32 positions, 32) b (32, 32)
void tile_32(const bf16* a, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
             float* out) {
  constexpr i64 HALF = 16 * BF16_BLOCK;
  asm volatile("" ::: "memory");  // the loads below do not tell the compiler what they read
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (i64 block = 0; block < blocks; ++block, a += stride)
    for (i64 t = 0; t < count; ++t, b += BF16_PAIRED) {
      const bf16* at = a + taps[t];
      _tile_loadd(6, b, 64);
      _tile_loadd(4, at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + HALF, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, at + HALF, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 16 * 32, 128);
  _tile_stored(3, out + 16 * 32 + 16, 128);
}

// out (32 positions, 16 outputs)
void tile_16(const bf16* a, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
             float* out) {
  constexpr i64 HALF = 16 * BF16_BLOCK;
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

extern const Bf16Kernels bf16_amx = {layer, image, upsample, pool};

}  // namespace fastphi
#endif
