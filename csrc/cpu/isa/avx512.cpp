// The kernels in AVX-512: 32 registers of 64 bytes, of which a 12 x 2 tile takes 24.
// setup.py compiles this file with -mavx512f -mavx512dq ...; elsewhere than on x86-64 it is empty.
#if defined(__x86_64__)
#define FASTPHI_ISA avx512
#define FASTPHI_VECTOR_BYTES 64
#define FASTPHI_BLOCK 12
#include "body.h"
#endif
