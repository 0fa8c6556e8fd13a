// Weights in the order in which the register tiles read them (conv.h): done once per model by the
// runner.
#include "../operators.h"
#include "conv.h"

namespace fastphi {

Tensor pack_conv_weights(Tensor weight, int64_t first, int64_t last, bool transposed) {
  check_tensor(weight, "weight", 4);
  const i64 cout = weight.sizes()[0], cin = weight.sizes()[1];
  check_shape(weight, "weight", {cout, cin, 3, 3});
  STD_TORCH_CHECK(0 <= first && first < last && last <= cin,
                  "first, last: expected a range of the ", cin, " input channels, got ", first,
                  ", ", last);
  const i64 c = last - first;
  Tensor out;
  dispatch(weight, [&](auto t) {
    using T = decltype(t);
    out = new_tensor(weight,
                     {transposed ? packed_size<T>(c, 9 * cout) : packed_size<T>(cout, 9 * c)});
    pack_conv<T>(data<T>(weight), cout, cin, first, last, transposed, mutable_data<T>(out));
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

}  // namespace fastphi
