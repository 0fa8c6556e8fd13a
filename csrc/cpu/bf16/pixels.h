// Pixels of 32 channels: conversions, and where they lie. Included by bf16/amx.cpp.

constexpr i64 PRODUCTS = BF16_UNIT * BF16_BLOCK;
// Between the sums of two units, so that those stored last and those loaded next do not lie at the
// same place of a page: the processor would take one for the other, and wait.
constexpr i64 ASIDE = 512;
inline i64 min_of(i64 a, i64 b) { return a < b ? a : b; }

// Where in a block a tap's tile begins, relative to its position.
inline i64 tap_at(const Bf16Plane& p, i64 i, i64 j) {
  return (i * p.pitch + j * p.fold) * BF16_BLOCK;
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

inline __m512 relu(__m512 x) {                   // keeps NaN, as torch's does
  return _mm512_max_ps(_mm512_setzero_ps(), x);  // the second where either is NaN
}

// A position: row y of part f, column x, at m.
struct Position {
  i64 y, f, x, m;
  i64 row(const Bf16Plane& p) const { return f * p.rows + y; }  // of the image
};

inline Position pixel(const Bf16Plane& p, i64 row, i64 x) {
  const i64 f = p.fold == 1 ? 0 : row / p.rows, y = row - f * p.rows;
  return {y, f, x, y * p.pitch + x * p.fold + f};
}

// Positions in the order in which they are computed.
struct Walk : Position {
  Walk() = default;
  Walk(const Bf16Plane& p, i64 i) {
    const i64 row = p.aligned ? p.w * p.fold : p.pitch;
    y = i / row, m = i - y * row;
    x = p.fold == 1 ? m : m / p.fold, f = m - x * p.fold;
    m += y * p.pitch;
  }
  void step(const Bf16Plane& p) {
    ++m;
    if (++f < p.fold) return;
    f = 0;
    if (++x < (p.aligned ? p.w : p.pitch)) return;
    x = 0, ++y;
    if (p.aligned) m += p.fold;
  }
};

// Where the second tile of the unit that begins there is, relative to the first.
inline i64 second_tile(const Bf16Plane& p, const Position& at) {
  const bool ends = p.aligned && at.x * p.fold + BF16_TILE == p.w * p.fold;
  return (BF16_TILE + (ends ? p.fold : 0)) * BF16_BLOCK;
}

// A pixel's 32 channels to its place, and where its part ends to the next part's border as well;
// zeros where a row ends.
inline void put(const Bf16Plane& p, bf16* block, const Position& at, __m512i value) {
  bf16* to = block + (p.pitch + p.fold + at.m) * BF16_BLOCK;
  _mm512_storeu_si512(to, value);
  if (at.x == p.w - 1) _mm512_storeu_si512(to + p.fold * BF16_BLOCK, _mm512_setzero_si512());
  if (p.fold == 1) return;
  const i64 part = (p.rows * p.pitch - 1) * BF16_BLOCK;
  if (at.y == 0 && at.f > 0) _mm512_storeu_si512(to + part, value);
  if (at.y == p.rows - 1 && at.f < p.fold - 1) _mm512_storeu_si512(to - part, value);
}

// Where the image itself begins: position 0.
inline i64 inside(const Bf16Plane& p) { return tap_at(p, 1, 1); }
