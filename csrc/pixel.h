// Pixels: element types, conversions and the noisy pixel, one text for the CPU and the GPU.
// Compiled without contraction, as noise.h: the product and the sum of a noisy pixel are rounded
// each.
#pragma once

#include "noise.h"

namespace fastphi {

enum class Dtype { UINT8, BFLOAT16, FLOAT32 };

struct Bf16 {
  uint16_t bits;
};

// A byte is a level of 255, x / 255.0f as fastphi/data/images.py computes it, without the division:
// 1/255 in two parts, one rounding at the end. Exact for each of the 256 (they are all tested). A
// division is 18 instructions on a GPU, and a call where the byte is 0.
FASTPHI_INLINE float to_float(uint8_t x) {
  constexpr float HIGH = 0x1.010102p-8f, LOW = -0x1.fdfdfep-33f;
  const float level = x;
  return fmaf(level, HIGH, level * LOW);
}
FASTPHI_INLINE float to_float(Bf16 x) { return bits<float>(uint32_t{x.bits} << 16); }
FASTPHI_INLINE float to_float(float x) { return x; }

FASTPHI_INLINE void put(float x, float* to) { *to = x; }

// Round to nearest even; NaN becomes torch's one.
FASTPHI_INLINE void put(float x, Bf16* to) {
  const uint32_t i = bits<uint32_t>(x);
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : (i + 0x7fffu + (i >> 16 & 1u)) >> 16);
}

FASTPHI_INLINE float noisy(float clean, float sigma, float z) { return clean + sigma * z; }

// Noisy images: out[i] = clean[rows[i]] + sigma[i] z_i. pixels = H * W, and channels * pixels is at
// most 2^30.
struct NoisyImages {
  i64 n, available;  // images made; images there are
  int channels, pixels;
  const void* images;  // uint8 (available, H, W, C) or float32 (available, C, H, W)
  const i64* rows;     // (n,) or null: image i is made of image i
  const float* sigma;  // (n,)
  uint64_t seed;
  uint32_t stream;
  const i64 *sample, *draw;  // (n,)
  void* out;                 // float32 or bfloat16 (n, H, W, C)
};

FASTPHI_INLINE NoiseKey noise_key(const NoisyImages& a, i64 i) {
  return {a.seed, static_cast<uint32_t>(a.draw[i]), a.stream, static_cast<uint32_t>(a.sample[i])};
}

// The image that output i is made of; -1 where there is none.
FASTPHI_INLINE i64 row_of(const NoisyImages& a, i64 i) {
  const i64 row = a.rows ? a.rows[i] : i;
  return row >= 0 && row < a.available ? row : -1;
}

// Place of a pixel and channel in one image: packed is (H, W, C), planar is (C, H, W).
FASTPHI_INLINE int packed_place(int pixel, int c, int channels, int) {
  return pixel * channels + c;
}
FASTPHI_INLINE int planar_place(int pixel, int c, int, int pixels) { return c * pixels + pixel; }

FASTPHI_INLINE float clean_pixel(const uint8_t* image, int pixel, int c, int channels, int pixels) {
  return to_float(image[packed_place(pixel, c, channels, pixels)]);
}

FASTPHI_INLINE float clean_pixel(const float* image, int pixel, int c, int channels, int pixels) {
  return image[planar_place(pixel, c, channels, pixels)];
}

// The four elements of noise block `block` (in C order over (C, H, W)) of output i.
template <class In, class Out>
FASTPHI_INLINE void noisy_four(const NoisyImages& a, i64 i, int block) {
  const int size = a.channels * a.pixels;
  const i64 row = row_of(a, i);
  const float sigma = a.sigma[i];
  const In* image = static_cast<const In*>(a.images) + (row < 0 ? 0 : row) * size;
  Out* out = static_cast<Out*>(a.out) + i * size;
  float z[4] = {0, 0, 0, 0};
  if (sigma != 0.0f) four_normals(noise_key(a, i), static_cast<uint32_t>(block), z);
  for (int j = 0; j < 4 && j < size - 4 * block; ++j) {
    const int e = 4 * block + j, c = e / a.pixels, pixel = e - c * a.pixels;
    float x =
        bits<float>(uint32_t{0x7fc00000});  // NaN: the GPU's answer to a row that is not there
    if (row >= 0) x = clean_pixel(image, pixel, c, a.channels, a.pixels);
    if (sigma != 0.0f) x = noisy(x, sigma, z[j]);
    put(x, out + packed_place(pixel, c, a.channels, a.pixels));
  }
}

}  // namespace fastphi
