// Operator layer: argument checks that name the argument, allocation, dispatch over dtypes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace fastphi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + ")";
}

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// Its memory is there: a storage may have been resized below what the tensor needs.
inline void check_storage(const Tensor& t, const char* name) {
  int64_t bytes = 0, offset = 0, last = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  if (t.numel() == 0) return;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.sizes()[d] - 1) * t.strides()[d];
  const int64_t needed = (offset + last + 1) * static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(bytes >= needed, name, ": its storage has ", bytes, " bytes, and shape ",
                  text(shape_of(t)), " needs ", needed);
}

// A dense CPU tensor of one of the engine's dtypes and, where `like` is given, of the same dtype as
// it.
inline void check_tensor(const Tensor& t, const char* name, int64_t dims,
                         const Tensor* like = nullptr) {
  STD_TORCH_CHECK(t.device().type() == torch::headeronly::DeviceType::CPU, name,
                  ": expected a CPU tensor (the compiled engine runs on the CPU)");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
                  name, ": expected float32 or float64, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(!like || t.scalar_type() == like->scalar_type(), name, ": expected ",
                  like ? torch::headeronly::toString(like->scalar_type()) : "",
                  " like the first argument, got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got shape ",
                  text(shape_of(t)));
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor; call .contiguous()");
  check_storage(t, name);
}

inline void check_shape(const Tensor& t, const char* name, const Shape& shape,
                        const Tensor* like = nullptr) {
  check_tensor(t, name, static_cast<int64_t>(shape.size()), like);
  STD_TORCH_CHECK(shape_of(t) == shape, name, ": expected shape ", text(shape), ", got ",
                  text(shape_of(t)));
}

inline void check_not_empty(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() > 0, name, ": expected no empty dimension, got shape ",
                  text(shape_of(t)));
}

inline Tensor new_tensor(const Tensor& like, const Shape& shape) {
  return torch::stable::new_empty(like, shape);
}

// f(T{}) with T = float or double
template <class F>
auto dispatch(const Tensor& t, const F& f) {
  return t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* data(const OptionalTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace fastphi
