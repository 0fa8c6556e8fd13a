// Weights in the order in which the kernels read them, Winograd's transformed (direct/conv.h): done
// once per model by the runner, and again where their stamp says that they have changed.
#include <algorithm>
#include <cstring>

#include "../operators.h"
#include "direct/conv.h"
#include "launch.h"

namespace fastphi {

namespace {

// Where value i of a tensor lies, in elements.
i64 place_of(const Tensor& p, i64 i) {
  i64 at = 0;
  for (i64 d = p.dim(); d-- > 0; i /= p.sizes()[d]) at += i % p.sizes()[d] * p.strides()[d];
  return at;
}

}  // namespace

Tensor pack_conv_weights(Tensor weight, int64_t own, bool transposed) {
  check_tensor(weight, "weight", 4);
  const i64 cout = weight.sizes()[0], cin = weight.sizes()[1];
  check_shape(weight, "weight", {cout, cin, 3, 3});
  STD_TORCH_CHECK(0 < own && own <= cin, "own: expected 1 to ", cin,
                  " input channels of the first source, got ", own);
  Tensor out;
  dispatch(weight, [&](auto t) {
    using T = decltype(t);
    out = new_tensor(weight, {transposed ? conv_packed_size<T>(cin, cout, 0)
                                         : conv_packed_size<T>(cout, own, cin - own)});
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * sizeof(T));
    const T* from = data<T>(weight);
    if (transposed)
      pack_conv_transposed<T>(from, cout, cin, 0, cin, mutable_data<T>(out));
    else
      pack_conv<T>(from, cout, own, cin - own, mutable_data<T>(out));
  });
  return out;
}

Tensor pack_upsample_weights(Tensor weight) {
  check_tensor(weight, "weight", 4);
  const i64 cin = weight.sizes()[0], cout = weight.sizes()[1];
  check_shape(weight, "weight", {cin, cout, 2, 2});
  Tensor out;
  dispatch(weight, [&](auto t) {
    using T = decltype(t);
    out = new_tensor(weight, {4 * packed_size<T>(cout, cin)});
    pack_upsample<T>(data<T>(weight), cin, cout, false, mutable_data<T>(out));
  });
  return out;
}

// A copy in large pages where there are any: weights come through in one long stream, and the
// processor prefetches within a page only.
Tensor in_large_pages(Tensor x) {
  STD_TORCH_CHECK(x.is_contiguous() && x.device().type() == torch::headeronly::DeviceType::CPU,
                  "x: expected a dense CPU tensor");
  Tensor out = new_tensor(x, shape_of(x));
  const size_t bytes = x.numel() * x.element_size();
  prefer_huge_pages(out.mutable_data_ptr(), bytes);
  std::memcpy(out.mutable_data_ptr(), x.const_data_ptr(), bytes);
  return out;
}

// A number that changes with the weights, from a few values of each tensor: an optimiser or an
// average that writes through `.data` leaves torch's own version counter as it was. All are fetched
// before any is looked at, since none of them is in a cache.
int64_t weights_stamp(std::vector<Tensor> parameters) {
  constexpr i64 SAMPLES = 16;
  struct Sample {
    const unsigned char* at;
    i64 size;
  };
  std::vector<Sample> samples;
  samples.reserve(parameters.size() * SAMPLES);
  for (const Tensor& p : parameters) {
    const i64 n = p.numel(), size = static_cast<i64>(p.element_size());
    const auto* bytes = static_cast<const unsigned char*>(p.const_data_ptr());
    const bool dense = p.is_contiguous();
    for (i64 k = 0; k < std::min(SAMPLES, n); ++k) {
      const i64 i = n > SAMPLES ? k * (n - 1) / (SAMPLES - 1) : k;
      samples.push_back({bytes + (dense ? i : place_of(p, i)) * size, std::min<i64>(size, 8)});
      __builtin_prefetch(samples.back().at);
    }
  }
  uint64_t stamp = 0;
  for (const Sample& sample : samples) {
    uint64_t value = 0;
    std::memcpy(&value, sample.at, sample.size);
    stamp = (stamp ^ value) * 0x9e3779b97f4a7c15u;  // Fibonacci hashing
    stamp ^= stamp >> 29;
  }
  return static_cast<int64_t>(stamp);
}

}  // namespace fastphi
