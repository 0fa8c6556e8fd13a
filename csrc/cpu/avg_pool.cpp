// 2x2 average pooling, stride 2: out[n, y, x, c] = mean of r[n, 2y+i, 2x+j, c]; its gradient is
// d_out/4. Two streams: (1 + 1/4) * pixels * C values read and written.
#include "../operators.h"
#include "direct/conv.h"
#include "launch.h"

namespace fastphi {

template <class T>
void launch_avg_pool_fwd(i64 n, i64 h, i64 w, i64 c, const T* r, T* out) {
  const i64 line = w / 2 * c;
  parallel(n * (h / 2), 4 * line, [&](i64 begin, i64 end) {
    for (i64 row = begin; row < end; ++row)
      for (i64 x = 0; x < w / 2; ++x) {
        const T* __restrict top = r + 2 * row * w * c + 2 * x * c;
        const T* __restrict bottom = top + w * c;
        T* __restrict to = out + row * line + x * c;
        for (i64 i = 0; i < c; ++i)
          to[i] = T(0.25) * ((top[i] + top[c + i]) + (bottom[i] + bottom[c + i]));
      }
  });
}

// h, w: of d_r
template <class T>
void launch_avg_pool_bwd(i64 n, i64 h, i64 w, i64 c, const T* d_out, T* d_r) {
  parallel(n * h, w * c, [&](i64 begin, i64 end) {
    for (i64 row = begin; row < end; ++row)
      for (i64 x = 0; x < w; ++x) {
        const T* __restrict from = d_out + (row / 2 * (w / 2) + x / 2) * c;
        T* __restrict to = d_r + (row * w + x) * c;
        for (i64 i = 0; i < c; ++i) to[i] = T(0.25) * from[i];
      }
  });
}

template void launch_avg_pool_fwd(i64, i64, i64, i64, const float*, float*);
template void launch_avg_pool_fwd(i64, i64, i64, i64, const double*, double*);
template void launch_avg_pool_bwd(i64, i64, i64, i64, const float*, float*);
template void launch_avg_pool_bwd(i64, i64, i64, i64, const double*, double*);

Tensor avg_pool_fwd(Tensor r) {
  check_tensor(r, "r", 4);
  const Shape s = shape_of(r);
  STD_TORCH_CHECK(s[1] % 2 == 0 && s[2] % 2 == 0, "r: expected even height and width, got shape ",
                  text(s));
  Tensor out = new_tensor(r, {s[0], s[1] / 2, s[2] / 2, s[3]});
  dispatch(r, [&](auto t) {
    using T = decltype(t);
    launch_avg_pool_fwd(s[0], s[1], s[2], s[3], data<T>(r), mutable_data<T>(out));
  });
  return out;
}

Tensor avg_pool_bwd(Tensor d_out) {
  check_tensor(d_out, "d_out", 4);
  const Shape s = shape_of(d_out);
  Tensor d_r = new_tensor(d_out, {s[0], 2 * s[1], 2 * s[2], s[3]});
  dispatch(d_out, [&](auto t) {
    using T = decltype(t);
    launch_avg_pool_bwd(s[0], 2 * s[1], 2 * s[2], s[3], data<T>(d_out), mutable_data<T>(d_r));
  });
  return d_r;
}

}  // namespace fastphi
