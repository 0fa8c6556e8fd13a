// Transposed 2x2 convolution, stride 2, without bias (a bias ends the deferral of the norm,
// csrc/README.md):
//   out[n, 2y+i, 2x+j, co] = sum_ci r[n, y, x, ci] W[ci, co, i, j],  W (Cin, Cout, 2, 2).
// Each output pixel has one product of length Cin: 8*Cin*Cout FLOPs per input pixel. The gradients
// are d_r = sum_{i,j,co} d_out W and d_W = sum over pixels of r * d_out.
#include "../operators.h"
#include "direct/conv.h"
#include "launch.h"

namespace fastphi {

Tensor upsample_fwd(Tensor r, Tensor weight) {
  check_tensor(r, "r", 4);
  check_not_empty(r, "r");
  const Shape s = shape_of(r);
  check_tensor(weight, "weight", 4, &r);
  const i64 cout = weight.sizes()[1];
  check_shape(weight, "weight", {s[3], cout, 2, 2}, &r);
  check_not_empty(weight, "weight");
  Tensor out = new_tensor(r, {s[0], 2 * s[1], 2 * s[2], cout});
  dispatch(r, [&](auto t) {
    using T = decltype(t);
    Buffer<T> packed(4 * packed_size<T>(cout, s[3]));
    pack_upsample<T>(data<T>(weight), s[3], cout, false, packed);
    launch_upsample_fwd<T>(
        {s[0], s[1], s[2], s[3], cout, 0, data<T>(r), packed, mutable_data<T>(out)});
  });
  return out;
}

std::tuple<Tensor, Tensor> upsample_bwd(Tensor d_out, Tensor r, Tensor weight, bool need_input,
                                        bool need_weight) {
  check_tensor(r, "r", 4);
  check_not_empty(r, "r");
  const Shape s = shape_of(r);
  check_tensor(weight, "weight", 4, &r);
  const i64 cout = weight.sizes()[1];
  check_shape(weight, "weight", {s[3], cout, 2, 2}, &r);
  check_not_empty(weight, "weight");
  check_shape(d_out, "d_out", {s[0], 2 * s[1], 2 * s[2], cout}, &r);
  Tensor d_r = new_tensor(r, need_input ? s : Shape{0});
  Tensor d_weight = new_tensor(r, need_weight ? shape_of(weight) : Shape{0});
  dispatch(r, [&](auto t) {
    using T = decltype(t);
    if (need_input) {
      Buffer<T> packed(packed_size<T>(s[3], 4 * cout));
      pack_upsample<T>(data<T>(weight), s[3], cout, true, packed);
      launch_upsample_bwd<T>(
          {s[0], s[1], s[2], s[3], cout, 0, data<T>(d_out), packed, mutable_data<T>(d_r)});
    }
    if (need_weight) {
      WeightGradJob<T> job{};
      job.n = s[0], job.h = s[1], job.w = s[2], job.cin = s[3], job.cout = cout, job.taps = 4;
      job.r = data<T>(r), job.d = data<T>(d_out);
      launch_weight_grad(job, 0, 0, mutable_data<T>(d_weight));
    }
  });
  return {d_r, d_weight};
}

}  // namespace fastphi
