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

constexpr i64 HALF = 16 * BF16_BLOCK;

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

  // Of each of `count` units, out (32 positions, 32 outputs) = sum over blocks and taps of
  // a (32 positions, 32) b (32, 32). Two units share the weights of a block while these are in the
  // first-level cache, their sums waiting there meanwhile. beside() is called for every product:
  // vector work that the processor does while the matrix unit multiplies. The last unit's sums are
  // stored by the next call, or by store().
  template <class Beside>
  void multiply(const Operand* units, int count, const i64* taps, i64 n_taps, i64 blocks,
                i64 stride, const bf16* b, Beside& beside) {
    asm volatile("" ::: "memory");  // the loads below do not tell the compiler what they read
    for (i64 block = 0; block < blocks; ++block, b += n_taps * BF16_PAIRED)
      for (int u = 0; u < count; ++u) {
        const bf16* a = units[u].a + block * stride;
        load(a + taps[0], b);
        if (block == 0 || count > 1)
          turn(block > 0 ? units[u].out : nullptr, units[u].out);
        else
          multiply_add();
        beside();
        for (i64 t = 1; t < n_taps; ++t) {
          load(a + taps[t], b + t * BF16_PAIRED);
          multiply_add();
          beside();
        }
      }
  }

  void store() {
    if (!sums_) return;
    _tile_stored(0, sums_, 128);
    _tile_stored(1, sums_ + 16, 128);
    _tile_stored(2, sums_ + 16 * 32, 128);
    _tile_stored(3, sums_ + 16 * 32 + 16, 128);
    sums_ = nullptr;
  }

 private:
  static void load(const bf16* a, const bf16* b) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(5, a + HALF, 64);
    _tile_loadd(7, b + HALF, 64);
  }

  static void multiply_add() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // As multiply_add, from one unit's sums to another's, tile by tile, so that the matrix unit need
  // not wait until all are stored. from: sums to go on with, or null for zeros.
  void turn(const float* from, float* to) {
#define FASTPHI_TURN(tile, at, positions, weights)  \
  if (sums_) _tile_stored(tile, sums_ + (at), 128); \
  if (from) {                                       \
    _tile_loadd(tile, from + (at), 128);            \
  } else {                                          \
    _tile_zero(tile);                               \
  }                                                 \
  _tile_dpbf16ps(tile, positions, weights)
    FASTPHI_TURN(0, 0, 4, 6);
    FASTPHI_TURN(1, 16, 4, 7);
    FASTPHI_TURN(2, 16 * 32, 5, 6);
    FASTPHI_TURN(3, 16 * 32 + 16, 5, 7);
#undef FASTPHI_TURN
    sums_ = to;
  }

  float* sums_ = nullptr;  // where the tiles' sums belong, or null
};

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
