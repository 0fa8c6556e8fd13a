// What a product of tiles is given. Included by bf16_amx.cpp and bf16_avx512.cpp inside an
// anonymous namespace.

// A unit's 32 positions in the first block of its source: 16, and 16 more at a + second.
struct Operand {
  const bf16* a;
  i64 second;
};
