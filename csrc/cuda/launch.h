// Every launcher of the CUDA kernels: grid, dtypes, stream, the empty case. They allocate nothing
// and wait for nothing, so they can be captured in a graph. Returned: what the launch said.
// Pointers are dense device memory, checked by operators.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include "../content.h"
#include "../match.h"
#include "../pixel.h"
#include "../statistics.h"

namespace fastphi {

constexpr i64 MAX_GRID_Y = 65535;  // of CUDA; whoever puts images on y walks on in a loop

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// out: (n, size) float32, row i from (sample[i], draw[i])
cudaError_t launch_noise_normal(i64 n, i64 size, uint64_t seed, const i64* sample, uint32_t stream,
                                const i64* draw, float* out, cudaStream_t cuda_stream);

cudaError_t launch_noisy_image(const NoisyImages& a, Dtype in, Dtype out, cudaStream_t stream);

// image: (n, channels, pixels), out: (n, pixels, channels); and back
cudaError_t launch_image_to_nhwc(i64 n, int channels, int pixels, const void* image, Dtype in,
                                 void* out, Dtype to, cudaStream_t stream);
cudaError_t launch_image_to_nchw(i64 n, int channels, int pixels, const void* image, Dtype in,
                                 void* out, Dtype to, cudaStream_t stream);

// partials: (n, slots, 3); s, mean, std: (n)
cudaError_t launch_combine_moments(i64 n, int slots, const float* partials, float eps, float* s,
                                   float* mean, float* std, cudaStream_t stream);

// to: of means, float32 or bfloat16
cudaError_t launch_combine_means(const Means& a, Dtype to, cudaStream_t stream);

// r: (n, pixels, channels) float32 or bfloat16 -> means: (n, channels) of the same dtype; sums:
// (n, spatial_mean_slots, channels) float32, workspace
int spatial_mean_slots(int pixels, int channels);
cudaError_t launch_spatial_mean_fwd(i64 n, int pixels, int channels, const void* r, Dtype dtype,
                                    float* sums, void* means, cudaStream_t stream);

// sums: (parts.n, CONTENT_LANES)
cudaError_t launch_weights_content(const ContentParts& parts, i64* sums, cudaStream_t stream);

cudaError_t launch_match_loss(const MatchLoss& a, cudaStream_t stream);
cudaError_t launch_match_adam(const MatchAdam& a, Dtype image, cudaStream_t stream);

// active: (n), remaining: (1)
cudaError_t launch_match_remaining(i64 n, const int32_t* active, int32_t* remaining,
                                   cudaStream_t stream);

}  // namespace fastphi
