// What a product of tiles is given. Included by bf16_amx.cpp and bf16_avx512.cpp inside an
// anonymous namespace.

// A unit's positions in the first block of its source, and its sums (32 positions, 32 outputs).
struct Operand {
  const bf16* a;
  float* out;
};
