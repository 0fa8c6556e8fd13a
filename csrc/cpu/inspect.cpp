// What the runner asks of tensors before it trusts what it has packed or is given: whether the
// weights are still the same, and whether an image's values are in range. One pass over memory
// each.
#include <algorithm>
#include <cstring>
#include <limits>

#include "../arguments.h"
#include "../operators.h"
#include "launch.h"

namespace fastphi {

namespace {

constexpr i64 PIECE = 1 << 18;  // bytes that one thread sums at a time
constexpr i64 LINE = 64, AHEAD = 512;
constexpr int STREAMS = 8;
constexpr uint64_t ODD = 0x9e3779b97f4a7c15u;

// acc = acc * odd + word, in STREAMS places at once: weights come from memory, which has more on
// its way the more streams are read. Odd numbers have inverses modulo 2^64: a change of one word
// always changes the sum.
uint64_t sum_of(const unsigned char* bytes, i64 size) {
  uint64_t acc[STREAMS];
  for (int s = 0; s < STREAMS; ++s) acc[s] = ODD * (2 * s + 1);
  const i64 each = size / STREAMS / LINE * LINE;
  for (i64 at = 0; at < each; at += LINE)
    for (int s = 0; s < STREAMS; ++s) {
      const unsigned char* const line = bytes + s * each + at;
      __builtin_prefetch(line + AHEAD, 0, 2);
      uint64_t words[LINE / 8];
      std::memcpy(words, line, sizeof words);
      for (const uint64_t word : words) acc[s] = acc[s] * ODD + word;
    }
  for (i64 at = STREAMS * each; at < size; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, std::min<i64>(8, size - at));
    acc[0] = acc[0] * ODD + word;
  }
  uint64_t all = static_cast<uint64_t>(size);
  for (const uint64_t lane : acc) all = (all ^ lane ^ lane >> 32) * ODD;
  return all;
}

}  // namespace

// A number of the whole content of dense tensors, in their order: what `.data`, numpy, dlpack or a
// fused optimiser change without telling torch's version counter changes it.
int64_t weights_checksum(std::vector<Tensor> parameters) {
  struct Piece {
    const unsigned char* at;
    i64 size;
  };
  std::vector<Piece> pieces;
  for (const Tensor& p : parameters) {
    check_storage(p, "parameters");
    STD_TORCH_CHECK(p.device().type() == torch::headeronly::DeviceType::CPU && p.is_contiguous(),
                    "parameters: expected dense CPU tensors");
    const auto* bytes = static_cast<const unsigned char*>(p.const_data_ptr());
    const i64 size = p.numel() * static_cast<i64>(p.element_size());
    for (i64 at = 0; at < size; at += PIECE)
      pieces.push_back({bytes + at, std::min(PIECE, size - at)});
  }
  std::vector<uint64_t> sums(pieces.size());
  parallel(static_cast<i64>(pieces.size()), PIECE / 8, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) sums[i] = sum_of(pieces[i].at, pieces[i].size);
  });
  return static_cast<int64_t>(sum_of(reinterpret_cast<const unsigned char*>(sums.data()),
                                     8 * static_cast<i64>(sums.size())));
}

// The sum that the GPU engine takes of its weights on the device (../content.h), here on the CPU.
void weights_content(std::vector<Tensor> parameters, Tensor sums) {
  i64* to = mutable_data<i64>(sums);
  for (const ContentParts& parts : check_weights_content(Device::CPU, parameters, sums))
    for (int i = 0; i < parts.n; ++i)
      for (int lane = 0; lane < CONTENT_LANES; ++lane)
        *to++ = static_cast<i64>(content_of_lane(parts.at[i], parts.bytes[i], lane));
}

namespace {

// A comparison with NaN is false, which leaves NaN out; as many at once as the compiler's four or
// two.
template <class T>
double largest_of(const T* at, i64 n) {
  constexpr int WIDTH = 32;
  T most[WIDTH] = {};
  const auto look = [&](int lane, T x) {
    const T v = x < 0 ? -x : x;
    most[lane] = v > most[lane] ? v : most[lane];
  };
  i64 i = 0;
  for (; i + WIDTH <= n; i += WIDTH)
    for (int lane = 0; lane < WIDTH; ++lane) look(lane, at[i + lane]);
  for (; i < n; ++i) look(0, at[i]);
  return static_cast<double>(*std::max_element(most, most + WIDTH));
}

// By the bits, whose order is that of the numbers.
double largest_of(const int16_t* at, i64 n) {
  int16_t most = 0;
  for (i64 i = 0; i < n; ++i) {
    const int16_t v = at[i] & std::numeric_limits<int16_t>::max();  // without its sign
    const int16_t number = v > int16_t{0x7f80} ? 0 : v;
    most = number > most ? number : most;
  }
  const int32_t bits = most << 16;
  float number;
  std::memcpy(&number, &bits, sizeof bits);
  return number;
}

}  // namespace

// max |x|, NaN left out
double largest_magnitude(Tensor x) {
  check_storage(x, "x");
  STD_TORCH_CHECK(x.device().type() == torch::headeronly::DeviceType::CPU,
                  "x: expected a CPU tensor");
  const Tensor dense = torch::stable::contiguous(x);
  const void* at = dense.const_data_ptr();
  const i64 n = dense.numel();
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return largest_of(static_cast<const double*>(at), n);
    case ScalarType::Float:
      return largest_of(static_cast<const float*>(at), n);
    case ScalarType::BFloat16:
      return largest_of(static_cast<const int16_t*>(at), n);
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

}  // namespace fastphi
