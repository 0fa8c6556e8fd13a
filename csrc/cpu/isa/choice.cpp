// Which instruction set runs: the best that the processor has, or FASTPHI_ISA. Decided once per
// process. amx is avx512 with kernels for bfloat16.
#include "choice.h"

#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "../bf16/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastphi {

extern const Kernels<float> float_plain;
extern const Kernels<double> double_plain;
extern const WinogradKernels winograd_plain;
#if defined(__x86_64__)
extern const Kernels<float> float_avx2, float_avx512;
extern const Kernels<double> double_avx2, double_avx512;
extern const WinogradKernels winograd_avx2, winograd_avx512;
extern const Bf16Kernels bf16_amx;
#endif

namespace {

struct Choice {
  const char* name;
  bool runs_here;
  const Kernels<float>* f;
  const Kernels<double>* d;
  const WinogradKernels* winograd;
  const Bf16Kernels* bf16;  // or null: no bfloat16
};

#if defined(__x86_64__)
// Whether the processor has AMX with bfloat16, and the system lets this process use its registers:
// Linux wants to be asked, once per process, since they make each thread's saved state 8 kB larger.
bool amx_runs_here() {
#if defined(__linux__)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // of leaf 7's edx
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;              // ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & AMX_BF16) && (d & AMX_TILE) && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
#else
  return false;
#endif
}
#endif

// Best first.
std::vector<Choice> choices() {
  std::vector<Choice> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = fma && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl");
  // beside the tiles: AVX512_BF16, by which the kernels round what they store
  const bool tiles = wide && __builtin_cpu_supports("avx512bf16") && amx_runs_here();
  auto avx512 = [&](const char* name, bool runs_here, const Bf16Kernels* bf16) {
    all.push_back({name, runs_here, &float_avx512, &double_avx512, &winograd_avx512, bf16});
  };
  avx512("amx", tiles, &bf16_amx);
  avx512("avx512", wide, nullptr);
  all.push_back({"avx2", fma, &float_avx2, &double_avx2, &winograd_avx2, nullptr});
#endif
  all.push_back({"plain", true, &float_plain, &double_plain, &winograd_plain, nullptr});
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

const Bf16Kernels* bf16_kernels() { return chosen().bf16; }

std::string isa_in_use() { return chosen().name; }

std::string isas_compiled() {
  std::string names;
  for (const Choice& c : choices()) names += (names.empty() ? "" : " ") + std::string(c.name);
  return names;
}

}  // namespace fastphi
