// The kernels, compiled once per instruction set. The including file defines
//   FASTPHI_ISA           name of the set, and of the table of kernels
//   FASTPHI_VECTOR_BYTES  bytes of a vector register
//   FASTPHI_BLOCK         most pixels of a register tile (see direct/micro.h)
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

namespace fastphi {
namespace {

#include "../direct/micro.h"
#include "../direct/panels.h"
#include "../direct/kernel.h"
#include "../direct/upsample.h"
#include "../direct/gradient.h"
#include "../winograd/kernel.h"
#include "../winograd/input.h"
#include "../winograd/output.h"
#include "../winograd/weight.h"

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
