// The kernels in AVX2 and FMA: 16 registers of 32 bytes, of which a 6 x 2 tile takes 12.
// setup.py compiles this file with -mavx2 -mfma; elsewhere than on x86-64 it is empty.
#if defined(__x86_64__)
#define FASTPHI_ISA avx2
#define FASTPHI_VECTOR_BYTES 32
#define FASTPHI_BLOCK 6
#include "body.h"
#endif
