// The kernels, compiled once per instruction set. The including file defines
//   FASTPHI_ISA           name of the set, and of the table of kernels
//   FASTPHI_VECTOR_BYTES  bytes of a vector register
//   FASTPHI_BLOCK         most pixels of a register tile (see micro.h)
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace fastphi {
namespace {

#include "micro.h"
#include "panels.h"
#include "conv_kernel.h"
#include "upsample_kernel.h"
#include "gradient_kernels.h"
#include "winograd_kernel.h"
#include "winograd_input.h"
#include "winograd_output.h"
#include "winograd_weight.h"

template <class T>
constexpr Kernels<T> table(const char* isa) {
  return {isa,          Vec<T>::LANES,   BLOCK,           BLOCK * 2 * Vec<T>::LANES,
          conv<T>,      upsample_fwd<T>, upsample_bwd<T>, weight_grad<T>,
          layer_grad<T>};
}

}  // namespace

#define FASTPHI_CAT(a, b) a##b
#define FASTPHI_TABLE(prefix, isa) FASTPHI_CAT(prefix, isa)
#define FASTPHI_TEXT(x) #x
#define FASTPHI_NAME(x) FASTPHI_TEXT(x)
extern const Kernels<float> FASTPHI_TABLE(float_,
                                          FASTPHI_ISA) = table<float>(FASTPHI_NAME(FASTPHI_ISA));
extern const Kernels<double> FASTPHI_TABLE(double_,
                                           FASTPHI_ISA) = table<double>(FASTPHI_NAME(FASTPHI_ISA));
extern const WinogradKernels FASTPHI_TABLE(winograd_, FASTPHI_ISA) = {
    winograd_pack,   winograd_input,   winograd_output,
    winograd_spread, winograd_weights, winograd_taps};

}  // namespace fastphi
