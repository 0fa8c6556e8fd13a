// Pixels of 32 channels: conversions, and where they lie. Included by bf16_body.h.

constexpr i64 PRODUCTS = BF16_UNIT * BF16_BLOCK;
// Between the sums of two units, so that those stored last and those loaded next do not lie at the
// same place of a page: the processor would take one for the other, and wait.
constexpr i64 ASIDE = 512;
constexpr i64 GROUP = 4;  // units computed together, at most

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

inline __m512 load_bf16(const bf16* p) {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
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

// A position and its row and column, the border's counted.
struct Pixel {
  i64 m, y, x, pitch;
  Pixel(const Bf16Plane& p, i64 m) : m(m), y(m / p.pitch), x(m % p.pitch), pitch(p.pitch) {}
  void operator++() {
    ++m;
    if (++x == pitch) x = 0, ++y;
  }
};

// Where the image itself begins: position 0.
inline i64 inside(const Bf16Plane& p) { return tap_at(p, 1, 1); }
