// Which instruction set runs: the best that the processor has, or FASTPHI_ISA. Decided once per
// process.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace fastphi {

extern const Kernels<float> float_plain;
extern const Kernels<double> double_plain;
extern const WinogradKernels winograd_plain;
#if defined(__x86_64__)
extern const Kernels<float> float_avx2, float_avx512;
extern const Kernels<double> double_avx2, double_avx512;
extern const WinogradKernels winograd_avx2, winograd_avx512;
#endif

namespace {

struct Choice {
  const char* name;
  bool runs_here;
  const Kernels<float>* f;
  const Kernels<double>* d;
  const WinogradKernels* winograd;
};

// Best first.
std::vector<Choice> choices() {
  std::vector<Choice> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = fma && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl");
  all.push_back({"avx512", wide, &float_avx512, &double_avx512, &winograd_avx512});
  all.push_back({"avx2", fma, &float_avx2, &double_avx2, &winograd_avx2});
#endif
  all.push_back({"plain", true, &float_plain, &double_plain, &winograd_plain});
  return all;
}

Choice choose() {
  const char* wanted = std::getenv("FASTPHI_ISA");
  std::string names;
  for (const Choice& c : choices()) {
    names += (names.empty() ? "" : ", ") + std::string(c.name);
    if (wanted && *wanted && std::string(wanted) != c.name) continue;
    if (c.runs_here) return c;
    if (wanted && *wanted)
      throw std::runtime_error(std::string("FASTPHI_ISA: this processor does not have ") + wanted +
                               "; unset the variable to use what it has");
  }
  throw std::runtime_error("FASTPHI_ISA: expected one of " + names + "; got '" + wanted + "'");
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *chosen().f;
}

template <>
const Kernels<double>& kernels<double>() {
  return *chosen().d;
}

const WinogradKernels& winograd_kernels() { return *chosen().winograd; }

std::string isa_in_use() { return chosen().name; }

std::string isas_compiled() {
  std::string names;
  for (const Choice& c : choices()) names += (names.empty() ? "" : " ") + std::string(c.name);
  return names;
}

}  // namespace fastphi
