// The bfloat16 kernels on AMX: a tile product is 16 positions x 16 outputs x 32 channels, 16 cycles
// of the matrix unit; two tiles of positions by two of weights fill the four tiles of sums.
// setup.py compiles this file with -mamx-tile -mamx-bf16 ...; elsewhere than on x86-64 it is empty.
#if defined(__x86_64__)
#include <cstring>
#include <immintrin.h>

#include "kernels.h"

namespace fastphi {
namespace {

// A unit's 32 positions in the first block of its source: 16, and 16 more at a + second.
struct Operand {
  const bf16* a;
  i64 second;
};

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

  // out (32 positions, 32 outputs) = sum over blocks and taps of a (32 positions, 32) b (32, 32),
  // the blocks in order, or `back`. beside() is called for every product: vector work that the
  // processor does while the matrix unit multiplies. The sums are stored by the next call, or by
  // store().
  template <class Beside>
  void multiply(const Operand& unit, const i64* taps, i64 n_taps, i64 blocks, i64 stride,
                const bf16* b, bool back, float* out, Beside& beside) {
    asm volatile("" ::: "memory");  // the loads below do not tell the compiler what they read
    for (i64 k = 0; k < blocks; ++k) {
      const i64 block = back ? blocks - 1 - k : k;
      const bf16 *a = unit.a + block * stride, *weights = b + block * n_taps * BF16_PAIRED;
      for (i64 t = 0; t < n_taps; ++t, weights += BF16_PAIRED) {
        load(a + taps[t], unit.second, weights);
        if (k == 0 && t == 0)
          turn(out);
        else
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
  static void load(const bf16* a, i64 second, const bf16* b) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(5, a + second, 64);
    _tile_loadd(7, b + HALF, 64);
  }

  static void multiply_add() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // As multiply_add, for the first product of a unit: the sums of the last one are stored tile by
  // tile, so that the matrix unit need not wait until all are.
  void turn(float* to) {
#define FASTPHI_TURN(tile, at, positions, weights)  \
  if (sums_) _tile_stored(tile, sums_ + (at), 128); \
  _tile_zero(tile);                                 \
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

// out (32 positions, 16 outputs). Taps by turns to two pairs of sums: a product waits for the last
// one to the same sums longer than it takes.
void tile_16(const Operand& unit, const i64* taps, i64 count, i64 blocks, i64 stride, const bf16* b,
             float* out) {
  alignas(64) float more[BF16_UNIT * 16];
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const bf16* a = unit.a;
  for (i64 block = 0; block < blocks; ++block, a += stride)
    for (i64 t = 0; t < count; ++t, b += HALF) {
      const bf16* at = a + taps[t];
      _tile_loadd(6, b, 64);
      _tile_loadd(4, at, 64);
      _tile_loadd(5, at + unit.second, 64);
      if (t % 2) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
      } else {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
  _tile_stored(0, out, 64);
  _tile_stored(1, out + 16 * 16, 64);
  _tile_stored(2, more, 64);
  _tile_stored(3, more + 16 * 16, 64);
  for (i64 i = 0; i < BF16_UNIT * 16; i += 16)
    _mm512_store_ps(out + i, _mm512_add_ps(_mm512_load_ps(out + i), _mm512_load_ps(more + i)));
}

// the kernels round these products
#include "pixels.h"
#include "layer.h"
#include "levels.h"
#include "grad.h"

}  // namespace

extern const Bf16Kernels bf16_amx = {layer, image, upsample, pool, dgrad, grad_input};

}  // namespace fastphi
#endif
