// What lets one text compile as C++ (the CPU's operators) and as CUDA (the GPU's kernels).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTPHI_INLINE __host__ __device__ __forceinline__
#else
#define FASTPHI_INLINE inline
#endif

#ifdef __CUDA_ARCH__
#define FASTPHI_UNROLL _Pragma("unroll")
#else
#define FASTPHI_UNROLL
#endif

namespace fastphi {

using i64 = int64_t;

template <class To, class From>
FASTPHI_INLINE To bits(From x) {
  To y;
  static_assert(sizeof x == sizeof y, "same size");
  memcpy(&y, &x, sizeof y);
  return y;
}

}  // namespace fastphi
