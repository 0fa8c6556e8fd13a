// The kernels in what every processor of the platform has (SSE2 on x86-64, 16 registers of 16
// bytes).
#define FASTPHI_ISA plain
#define FASTPHI_VECTOR_BYTES 16
#define FASTPHI_BLOCK 4
#include "body.h"
