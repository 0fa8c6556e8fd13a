// Spatial mean per channel: (N, H, W, C) -> (N, C); its gradient is d_mean/(HW) everywhere.
// A row is summed in the tensor's dtype, rows in double and in order: accurate at 512x512, and the
// same however the rows are shared among threads. One stream of pixels * C values.
#include "../operators.h"
#include "direct/conv.h"
#include "launch.h"

namespace fastphi {

template <class T>
void launch_spatial_mean_fwd(i64 n, i64 h, i64 w, i64 c, const T* r, T* out) {
  Buffer<T> sums(n * h * c);
  parallel(n * h, w * c, [&](i64 begin, i64 end) {
    for (i64 row = begin; row < end; ++row) {
      T* __restrict sum = sums + row * c;
      std::memset(sum, 0, c * sizeof(T));
      for (i64 x = 0; x < w; ++x) {
        const T* __restrict from = r + (row * w + x) * c;
        for (i64 i = 0; i < c; ++i) sum[i] += from[i];
      }
    }
  });
  parallel(n * c, h, [&](i64 begin, i64 end) {
    for (i64 u = begin; u < end; ++u) {
      double total = 0;
      for (i64 y = 0; y < h; ++y) total += sums[(u / c * h + y) * c + u % c];
      out[u] = static_cast<T>(total / static_cast<double>(h * w));
    }
  });
}

template void launch_spatial_mean_fwd(i64, i64, i64, i64, const float*, float*);
template void launch_spatial_mean_fwd(i64, i64, i64, i64, const double*, double*);

Tensor spatial_mean_fwd(Tensor r) {
  check_tensor(r, "r", 4);
  check_not_empty(r, "r");
  const Shape s = shape_of(r);
  Tensor out = new_tensor(r, {s[0], s[3]});
  dispatch(r, [&](auto t) {
    using T = decltype(t);
    launch_spatial_mean_fwd(s[0], s[1], s[2], s[3], data<T>(r), mutable_data<T>(out));
  });
  return out;
}

Tensor spatial_mean_bwd(Tensor d_mean, int64_t height, int64_t width) {
  check_tensor(d_mean, "d_mean", 2);
  STD_TORCH_CHECK(height > 0 && width > 0, "height, width: expected positive sizes, got ", height,
                  "x", width);
  const i64 n = d_mean.sizes()[0], c = d_mean.sizes()[1], pixels = height * width;
  Tensor d_r = new_tensor(d_mean, {n, height, width, c});
  dispatch(d_mean, [&](auto t) {
    using T = decltype(t);
    const T* from = data<T>(d_mean);
    T* to = mutable_data<T>(d_r);
    parallel(n * pixels, c, [&](i64 begin, i64 end) {
      for (i64 x = begin; x < end; ++x)
        for (i64 i = 0; i < c; ++i)
          to[x * c + i] = from[x / pixels * c + i] / static_cast<T>(pixels);
    });
  });
  return d_r;
}

}  // namespace fastphi
