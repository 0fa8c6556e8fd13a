// The sum of a tensor's bits that tells whether it has changed, one lane of it: the same on the CPU
// and on the GPU, to the bit.
#pragma once

#include <cstdint>

#include "portable.h"

namespace fastphi {

constexpr int CONTENT_LANES = 1024;
constexpr int CONTENT_PARTS = 128;  // tensors in one launch: they travel as its parameters

// bytes: a multiple of 2, on a boundary of 2
struct ContentParts {
  int n;
  const void* at[CONTENT_PARTS];
  i64 bytes[CONTENT_PARTS];
};

FASTPHI_INLINE uint64_t odd_number(i64 place) {
  return static_cast<uint64_t>(place) * 0x9e3779b97f4a7c15u | 1;
}

// Words l, l + CONTENT_LANES, ... of 32 bits (of 16 where the tensor is of halves that lie on no
// boundary of 4, or an odd number of them), each times an odd number of its place, modulo 2^64.
FASTPHI_INLINE uint64_t content_of_lane(const void* at, i64 bytes, int lane) {
  uint64_t sum = 0;
  if (bytes % 4 == 0 && reinterpret_cast<uintptr_t>(at) % 4 == 0) {
    const auto* words = static_cast<const uint32_t*>(at);
    for (i64 i = lane; i < bytes / 4; i += CONTENT_LANES) sum += words[i] * odd_number(i);
  } else {
    const auto* halves = static_cast<const uint16_t*>(at);
    for (i64 i = lane; i < bytes / 2; i += CONTENT_LANES) sum += halves[i] * odd_number(i);
  }
  return sum;
}

}  // namespace fastphi
