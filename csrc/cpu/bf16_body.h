// The bfloat16 kernels round a product of tiles (Tiles::multiply, tile_16). Included by
// bf16_amx.cpp and bf16_avx512.cpp inside an anonymous namespace.
#include "bf16_pixels.h"
#include "bf16_layer.h"
#include "bf16_levels.h"
#include "bf16_grad.h"
