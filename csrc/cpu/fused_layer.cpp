// The fused layer: conv 3x3, norm and ReLU with the division by the standard deviation deferred.
//   z = s conv3x3(r, W[:, :C1]) + s2 conv3x3(r2, W[:, C1:]) + b
//   with gamma: r_out = ReLU(gamma z), s_out = 1/(std(z) + eps); without: r_out = ReLU(z) or z,
//   s_out = 1.
// r (N, H, W, C1), s (N,), r2 (N, H, W, C2), s2 (N,), weight (Cout, C1 + C2, 3, 3), bias, gamma
// (Cout,). Backward (derived in csrc/README.md):
//   dz = [m gamma d_r_out] - d_s_out s_out^2 (z - mean)/(n std), m = 1[gamma z > 0]
//   h = convT(dz), d_r = s h, d_s = sum h r; d_weight = (s r) * dz; d_bias = sum dz; d_gamma = sum
//   m d_r_out
//   z
#include "../operators.h"
#include "direct/conv.h"
#include "launch.h"
#include "winograd/conv.h"

namespace fastphi {

namespace {

enum Slot { PACKED, GRADIENT };  // of a thread's kept buffers

struct Sizes {
  i64 n, h, w, c1, c2, cout;
};

Sizes check_layer(const Tensor& r, const Tensor& s, const OptionalTensor& r2,
                  const OptionalTensor& s2, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& gamma) {
  check_tensor(r, "r", 4);
  check_not_empty(r, "r");
  const Shape shape = shape_of(r);
  Sizes z{shape[0], shape[1], shape[2], shape[3], 0, 0};
  check_shape(s, "s", {z.n}, &r);
  STD_TORCH_CHECK(r2.has_value() == s2.has_value(), "r2, s2: expected both or neither");
  if (r2) {
    check_tensor(*r2, "r2", 4, &r);
    check_not_empty(*r2, "r2");
    z.c2 = r2->sizes()[3];
    check_shape(*r2, "r2", {z.n, z.h, z.w, z.c2}, &r);
    check_shape(*s2, "s2", {z.n}, &r);
  }
  check_tensor(weight, "weight", 4, &r);
  z.cout = weight.sizes()[0];
  check_shape(weight, "weight", {z.cout, z.c1 + z.c2, 3, 3}, &r);
  check_not_empty(weight, "weight");
  if (bias) check_shape(*bias, "bias", {z.cout}, &r);
  if (gamma) check_shape(*gamma, "gamma", {z.cout}, &r);
  return z;
}

template <class T>
void fill(Tensor& t, T value) {
  std::fill_n(mutable_data<T>(t), t.numel(), value);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_layer_fwd(
    Tensor r, Tensor s, OptionalTensor r2, OptionalTensor s2, Tensor weight, OptionalTensor bias,
    OptionalTensor gamma, double eps, bool relu) {
  const Sizes k = check_layer(r, s, r2, s2, weight, bias, gamma);
  Tensor r_out = new_tensor(r, {k.n, k.h, k.w, k.cout}), z = new_tensor(r, {k.n, k.h, k.w, k.cout});
  Tensor s_out = new_tensor(s, {k.n}), mean = new_tensor(s, {k.n}), std = new_tensor(s, {k.n});
  dispatch(r, [&](auto t) {
    using T = decltype(t);
    KeptBuffer<T, PACKED> packed(conv_packed_size<T>(k.cout, k.c1, k.c2));
    pack_conv<T>(data<T>(weight), k.cout, k.c1, k.c2, packed);
    ConvJob<T> job{};
    job.n = k.n, job.h = k.h, job.w = k.w, job.cout = k.cout;
    job.sources = r2 ? 2 : 1;
    job.source[0] = {data<T>(r), data<T>(s), nullptr, k.c1};
    if (r2) job.source[1] = {data<T>(*r2), data<T>(*s2), nullptr, k.c2};
    job.bias = data<T>(bias), job.gamma = data<T>(gamma), job.relu = relu;
    job.z = mutable_data<T>(z), job.r_out = mutable_data<T>(r_out);
    for (T* out : {job.z, job.r_out}) prefer_huge_pages(out, z.numel() * sizeof(T));
    if (gamma) {
      launch_layer_fwd<T>(job, packed, eps, mutable_data<T>(mean), mutable_data<T>(std),
                          mutable_data<T>(s_out), nullptr);
    } else {
      launch_layer_fwd<T>(job, packed, eps, nullptr, nullptr, nullptr, nullptr);
      fill(s_out, T(1)), fill(mean, T(0)), fill(std, T(0));
    }
  });
  return {r_out, s_out, z, mean, std};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_layer_bwd(
    Tensor d_r_out, Tensor d_s_out, Tensor r, Tensor s, OptionalTensor r2, OptionalTensor s2,
    Tensor weight, OptionalTensor gamma, Tensor z, Tensor s_out, Tensor mean, Tensor std, bool relu,
    bool need_input, bool need_weight) {
  const Sizes k = check_layer(r, s, r2, s2, weight, std::nullopt, gamma);
  const Shape out_shape{k.n, k.h, k.w, k.cout};
  check_shape(d_r_out, "d_r_out", out_shape, &r);
  check_shape(d_s_out, "d_s_out", {k.n}, &r);
  check_shape(z, "z", out_shape, &r);
  check_shape(s_out, "s_out", {k.n}, &r);
  check_shape(mean, "mean", {k.n}, &r);
  check_shape(std, "std", {k.n}, &r);
  auto wanted = [&](bool want, const Shape& shape) {
    return new_tensor(r, want ? shape : Shape{0});
  };
  Tensor d_r = wanted(need_input, shape_of(r)), d_s = wanted(need_input, {k.n});
  Tensor d_r2 = wanted(need_input && r2, {k.n, k.h, k.w, k.c2}),
         d_s2 = wanted(need_input && r2, {k.n});
  Tensor d_weight = wanted(need_weight, shape_of(weight)), d_bias = wanted(need_weight, {k.cout});
  Tensor d_gamma = wanted(need_weight && gamma, {k.cout});
  dispatch(r, [&](auto t) {
    using T = decltype(t);
    Buffer<T> coefficient(k.n);
    if (gamma)
      norm_coefficients<T>(k.n, k.h * k.w * k.cout, data<T>(d_s_out), data<T>(s_out), data<T>(std),
                           coefficient);
    const i64 cin = k.c1 + k.c2;
    if constexpr (sizeof(T) == sizeof(float))
      if (winograd_serves_backward<T>(cin, k.cout)) {
        GradInput<T> grad{data<T>(d_r_out), Spread::PIXEL, data<T>(gamma), data<T>(mean),
                          gamma ? coefficient.get() : nullptr};
        grad.relu = relu;
        WinogradBackward job{};
        job.n = k.n, job.h = k.h, job.w = k.w, job.cout = k.cout;
        job.z = data<T>(z), job.grad = &grad;
        job.sources = r2 ? 2 : 1;
        job.source[0] = {data<T>(r), data<T>(s), nullptr, k.c1};
        if (r2) job.source[1] = {data<T>(*r2), data<T>(*s2), nullptr, k.c2};
        job.need_input = need_input, job.need_weight = need_weight, job.input_scaled = true;
        KeptBuffer<T, PACKED> packed(need_input ? winograd_packed_size(k.c1, k.cout) +
                                                      winograd_packed_size(k.c2, k.cout)
                                                : 0);
        if (need_input) {
          pack_winograd_transposed(data<T>(weight), k.cout, cin, job.sources, job.source, packed);
          job.d_r[0] = mutable_data<T>(d_r), job.d_s[0] = mutable_data<T>(d_s);
          job.d_r[1] = mutable_data<T>(d_r2), job.d_s[1] = mutable_data<T>(d_s2);
        }
        if (need_weight) {
          job.d_weight = mutable_data<T>(d_weight), job.d_bias = mutable_data<T>(d_bias);
          job.d_gamma = gamma ? mutable_data<T>(d_gamma) : nullptr;
        }
        return run_winograd_backward(job);
      }
    KeptBuffer<T, GRADIENT> dz(k.n * k.h * k.w * k.cout);
    LayerGradJob<T> grad{};
    grad.n = k.n, grad.h = k.h, grad.w = k.w, grad.c = k.cout;
    grad.d_r = data<T>(d_r_out), grad.z = data<T>(z), grad.gamma = data<T>(gamma), grad.relu = relu;
    grad.mean = data<T>(mean), grad.dz = dz;
    if (gamma) grad.coefficient = coefficient;
    launch_layer_grad(grad, need_weight ? mutable_data<T>(d_bias) : nullptr,
                      need_weight && gamma ? mutable_data<T>(d_gamma) : nullptr);
    auto source_gradients = [&](const Tensor& r, const Tensor& s, i64 c0, i64 c, Tensor& d_r,
                                Tensor& d_s) {
      if (need_input) {
        KeptBuffer<T, PACKED> packed(conv_packed_size<T>(c, k.cout, 0));
        pack_conv_transposed<T>(data<T>(weight), k.cout, cin, c0, c0 + c, packed);
        launch_layer_dgrad<T>({k.n, k.h, k.w, k.cout, c, dz, nullptr, packed, data<T>(r),
                               data<T>(s), mutable_data<T>(d_r), mutable_data<T>(d_s)});
      }
      if (need_weight) {
        WeightGradJob<T> job{};
        job.n = k.n, job.h = k.h, job.w = k.w, job.cin = c, job.cout = k.cout, job.taps = 9;
        job.r = data<T>(r), job.scale = data<T>(s), job.d = dz;
        launch_weight_grad(job, cin, c0, mutable_data<T>(d_weight));
      }
    };
    source_gradients(r, s, 0, k.c1, d_r, d_s);
    if (r2) source_gradients(*r2, *s2, k.c1, k.c2, d_r2, d_s2);
  });
  return {d_r, d_s, d_r2, d_s2, d_weight, d_bias, d_gamma};
}

}  // namespace fastphi
