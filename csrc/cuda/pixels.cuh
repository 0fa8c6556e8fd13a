// Eight pixels of an image as one thread reads and writes them: in 16-byte words (8-byte ones where
// a run of bytes is no multiple of 16), neighbouring threads at neighbouring addresses.
#pragma once

#include "../pixel.h"

namespace fastphi {

constexpr int GROUP = 8;  // pixels: 16 bytes of bfloat16 in a plane

template <int BYTES>
struct Word {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// By name: a plain assignment of a word is taken apart where the compiler knows its elements.
__device__ __forceinline__ void store_word(void* memory, uint4 w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(memory)),
               "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
               : "memory");
}

__device__ __forceinline__ void store_word(void* memory, uint2 w) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(memory)), "r"(w.x),
               "r"(w.y)
               : "memory");
}

// A run of COUNT elements in registers. Its address in memory must be a multiple of a word.
template <class T, int COUNT>
struct Run {
  static constexpr int BYTES = COUNT * static_cast<int>(sizeof(T));
  static constexpr int WORD = BYTES % 16 == 0 ? 16 : 8;
  static_assert(BYTES % WORD == 0, "whole words");
  using W = typename Word<WORD>::type;

  T x[COUNT];

  // Through the read-only cache: nobody may write there while the kernel runs.
  __device__ __forceinline__ void load(const T* memory) {
    W words[BYTES / WORD];
#pragma unroll
    for (int i = 0; i < BYTES / WORD; ++i) words[i] = __ldg(reinterpret_cast<const W*>(memory) + i);
    memcpy(x, words, BYTES);
  }

  __device__ __forceinline__ void store(T* memory) const {
    W words[BYTES / WORD];
    memcpy(words, x, BYTES);
#pragma unroll
    for (int i = 0; i < BYTES / WORD; ++i)
      store_word(memory + i * (COUNT * WORD / BYTES), words[i]);
  }
};

// Values by channel and pixel of the group that starts at `pixel`.
template <int C>
struct Pixels {
  float v[C][GROUP];

  // (H, W, C)
  template <class T>
  __device__ __forceinline__ void load_packed(const T* image, int pixel, int) {
    Run<T, C * GROUP> run;
    run.load(image + static_cast<i64>(pixel) * C);
#pragma unroll
    for (int i = 0; i < C * GROUP; ++i) v[i % C][i / C] = to_float(run.x[i]);
  }

  // (C, H, W)
  template <class T>
  __device__ __forceinline__ void load_planar(const T* image, int pixel, int pixels) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      Run<T, GROUP> run;
      run.load(image + static_cast<i64>(c) * pixels + pixel);
#pragma unroll
      for (int i = 0; i < GROUP; ++i) v[c][i] = to_float(run.x[i]);
    }
  }

  template <class T>
  __device__ __forceinline__ void store_packed(T* image, int pixel, int) const {
    Run<T, C * GROUP> run;
#pragma unroll
    for (int i = 0; i < C * GROUP; ++i) put(v[i % C][i / C], &run.x[i]);
    run.store(image + static_cast<i64>(pixel) * C);
  }

  template <class T>
  __device__ __forceinline__ void store_planar(T* image, int pixel, int pixels) const {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      Run<T, GROUP> run;
#pragma unroll
      for (int i = 0; i < GROUP; ++i) put(v[c][i], &run.x[i]);
      run.store(image + static_cast<i64>(c) * pixels + pixel);
    }
  }
};

// Whether every group of every image of these starts at a multiple of a word.
inline bool whole_groups(int pixels, const void* a, const void* b) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return pixels % GROUP == 0 && aligned(a) && aligned(b);
}

// f(Out{}), Out being the element type of an output.
template <class F>
void with_output(Dtype to, const F& f) {
  to == Dtype::BFLOAT16 ? f(Bf16{}) : f(float{});
}

}  // namespace fastphi
