// Weights in the order in which the kernels read them, Winograd's transformed (direct/conv.h): done
// once per model by the runner, and again where they have changed.
#include <cstring>
#include <set>

#include "../operators.h"
#include "direct/conv.h"
#include "launch.h"

namespace fastphi {

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
  check_storage(x, "x");
  Tensor out = new_tensor(x, shape_of(x));
  const size_t bytes = x.numel() * x.element_size();
  prefer_huge_pages(out.mutable_data_ptr(), bytes);
  if (bytes) std::memcpy(out.mutable_data_ptr(), x.const_data_ptr(), bytes);
  return out;
}

// Tensors that are read whole again and again, moved into large pages by the system, which keeps
// their addresses and every bit: in a virtual machine a page that is not in the tables' cache costs
// about a microsecond, so 13,000 small ones of the default network's weights as much as a layer.
// Once per tensor: moving takes some milliseconds per page. What the system cannot move stays.
void move_to_large_pages(std::vector<Tensor> tensors) {
#if defined(__linux__)
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, Linux 6.1 and later
  std::set<uintptr_t> pages;
  for (const Tensor& t : tensors) {
    check_storage(t, "tensors");
    STD_TORCH_CHECK(t.device().type() == torch::headeronly::DeviceType::CPU && t.is_contiguous(),
                    "tensors: expected dense CPU tensors");
    const auto first = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const uintptr_t last = first + t.numel() * t.element_size();
    for (uintptr_t page = first / HUGE_PAGE; page * HUGE_PAGE < last; ++page) pages.insert(page);
  }
  for (const uintptr_t page : pages)
    madvise(reinterpret_cast<void*>(page * HUGE_PAGE), HUGE_PAGE, COLLAPSE);
#else
  (void)tensors;
#endif
}

}  // namespace fastphi
