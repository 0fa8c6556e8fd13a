// Counter-based standard normal noise, one text for the CPU and the GPU: Philox4x32-10 with key =
// seed and counter = (element / 4, draw, stream, sample), then Box-Muller in float32 with every
// operation rounded on its own, so that every device gives the same bits (definition:
// fastphi/reference.py, noise_normal). Whoever includes this is compiled without contraction:
// -ffp-contract=off for C++, -fmad=false for CUDA; sqrt and / are rounded correctly by default.
#pragma once

#include <cmath>

#include "portable.h"

namespace fastphi {

struct Words {
  uint32_t x[4];
};

FASTPHI_INLINE Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  FASTPHI_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// Two words to two normals.
FASTPHI_INLINE void box_muller(uint32_t xa, uint32_t xb, float* z) {
  const float u = static_cast<float>(2 * (xa >> 9) + 1) * 0x1p-24f;
  const int32_t i = bits<int32_t>(u),
                e = (i - 0x3f3504f3) >> 23;  // u = m 2^e with m in [sqrt(1/2), sqrt(2))
  const float m = bits<float>(i - static_cast<int32_t>(static_cast<uint32_t>(e) << 23));
  const float s = (m - 1.0f) / (m + 1.0f), w = s * s;
  const float p =
      (((float(2.0 / 9) * w + float(2.0 / 7)) * w + float(2.0 / 5)) * w + float(2.0 / 3)) * w;
  const float log_u = static_cast<float>(e) * 0.693147180559945309f + (2.0f * s + s * p);
  const float r = sqrtf(-2.0f * log_u);
  const uint32_t octant = xb >> 29;
  const float a =
      static_cast<float>(2 * ((xb >> 6) & 0x7fffff) + 1) * float(0.78539816339744830962 * 0x1p-24);
  const float q = a * a;
  const float sn =
      a * (1.0f + q * (float(-1.0 / 6) + q * (float(1.0 / 120) +
                                              q * (float(-1.0 / 5040) + q * float(1.0 / 362880)))));
  const float cs =
      1.0f + q * (float(-1.0 / 2) +
                  q * (float(1.0 / 24) + q * (float(-1.0 / 720) + q * float(1.0 / 40320))));
  const float c = octant & 1 ? sn : cs, d = octant & 1 ? cs : sn;
  z[0] = r * (octant & 2 ? -c : c);
  z[1] = r * (octant & 4 ? -d : d);
}

// The counters of an image: all but the element. The ids are in [0, 2^32).
struct NoiseKey {
  uint64_t seed;
  uint32_t draw, stream, sample;
};

// Elements 4 * block ... 4 * block + 3 of an image, counted in C order over (C, H, W).
FASTPHI_INLINE void four_normals(const NoiseKey& key, uint32_t block, float* z) {
  const Words x = philox(key.seed, block, key.draw, key.stream, key.sample);
  box_muller(x.x[0], x.x[1], z);
  box_muller(x.x[2], x.x[3], z + 2);
}

}  // namespace fastphi
