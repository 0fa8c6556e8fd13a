// The bfloat16 engine: how activations lie in memory, and what its kernels are asked to do. Sums,
// statistics, scalars and images are float32; activations and weights bfloat16, in two parts,
// rounded and what rounding took, where nothing averages that out: image and weights of the first
// layer, and weights of the last. Included by files compiled for other processors: nothing here may
// emit code.
//
// Channels come in blocks of 32 (zeros beyond the last), so that 16 pixels of a block are one tile
// of AMX, rows of 64 bytes one after the other, and any 3x3 tap of them is the same tile elsewhere:
//   r (N, blocks, plane.block, 32)
// A unit of work is 32 positions of an image, two tiles, by a panel of 32 output channels. What a
// unit computes depends on the layer and the image's size alone.
#pragma once

#include "../kernels.h"

namespace fastphi {

using bf16 = uint16_t;  // the bits

constexpr i64 BF16_BLOCK = 32;                // channels of a block, outputs of a panel
constexpr i64 BF16_UNIT = 32;                 // positions of a unit
constexpr i64 BF16_PAIRED = 2 * 16 * 16 * 2;  // weights of a panel, block and tap: (half, pair,
                                              // output, 2)

// Where the pixels of an image lie within a block. Of an image that is not folded, pixel (y, x) is
// at m = y * pitch + x, and (y + i - 1, x + j - 1) that its tap (i, j) reads at m + i * pitch + j,
// zeros round the image included: one zero serves as the right border of a row and the left of the
// next. A tile is 16 pixels of a row. Where rows are no multiple of 16 but `fold` rows are, the
// image is folded: parts of `rows` rows lie beside each other, pixel by pixel,
//   row y of part f, column x at m = y * pitch + x * fold + f, pitch = (w + 1) * fold,
// each between the rows next to it, its neighbours' or zeros. Where that fails too, tiles take
// all positions as they come, those between two rows as well.
struct Bf16Plane {
  i64 h, w;
  i64 fold, rows, pitch;
  bool aligned;   // tiles are within rows
  i64 block;      // positions of a block in memory
  i64 positions;  // to compute: the pixels, or all
};

constexpr i64 BF16_TILE = 16;  // positions

// A unit's last positions may lie beyond its image, and the last image's beyond the memory that is
// computed: read, and not used.
constexpr i64 BF16_SLACK = BF16_UNIT * BF16_BLOCK;

static inline Bf16Plane bf16_plane(i64 h, i64 w) {
  i64 fold = 1;
  while (fold < BF16_TILE && (w * fold % BF16_TILE || h % fold)) fold *= 2;
  const bool aligned = w * fold % BF16_TILE == 0 && h % fold == 0;
  if (!aligned) fold = 1;
  const i64 rows = h / fold, pitch = (w + 1) * fold;
  return {
      h, w, fold, rows, pitch, aligned, (rows + 2) * pitch + fold, aligned ? h * w : h * pitch - 1};
}

static inline i64 bf16_units(const Bf16Plane& p) {
  return (p.positions + BF16_UNIT - 1) / BF16_UNIT;
}

struct Bf16Source {
  const bf16* r;
  const float* scale;  // (N,)
  i64 blocks;
};

// A layer: z = s conv3x3(r, W) + s2 conv3x3(r2, W2) + b, r_out = ReLU(gamma z) or ReLU(z).
struct Bf16Layer {
  i64 n, cout, panels;
  Bf16Plane plane;
  i64 span;  // units that a thread computes of all panels before it goes on
  int sources;
  Bf16Source source[2];
  const bf16* packed;  // (panels, blocks of all sources, 9) of BF16_PAIRED
  // Instead of sources, in the first layer: (2, N, H + 2, W + 2, C), zeros round each image,
  // rounded and what rounding took. packed is then (panels, 3 * bf16_first_blocks(C)) of
  // BF16_PAIRED.
  const bf16* image;
  i64 image_channels, n_images;  // n_images: from one part of the images to the other
  const float* bias;             // (panels * 32)
  const float* gamma;            // (panels * 32) or null: no norm
  bf16* r_out;                   // or null: nobody reads it
  bf16* z;                       // (N, blocks, plane.block, 32), the pixels alone, or null
  float* stats;  // (N, panels, units, 3): count, mean, sum of squared deviations; or null
  float* sums;   // (N, units, panels * 32): sum of r_out; or null
};

// How a gradient goes back through a layer: dz = m gamma d + coefficient (z - mean), m = 1[gamma z
// > 0]. d is there for each pixel, for each of the pool's, or for all of an image (Spread).
struct Bf16GradInput {
  i64 n, blocks;
  Bf16Plane plane, d_plane;  // d_plane: the pool's, or the same
  Spread spread;
  const bf16* d;         // (N, blocks, d_plane.block, 32), the pixels alone
  const float* d_image;  // instead (N, blocks * 32)
  const bf16* z;
  const float* gamma;        // (blocks * 32) or null for 1
  const float* mean;         // (N,)
  const float* coefficient;  // (N,) or null without norm
  bf16* dz;
};

// And through its convolution: h = convT(dz), d_r = scale h, dots = sum h r of a unit.
struct Bf16Dgrad {
  i64 n, panels;
  Bf16Plane plane;
  Bf16Source source;   // dz; its scale is that of d_r
  const bf16* packed;  // as a layer's, of the rotated kernel
  const bf16* r;       // the layer's input
  bf16* d_r;           // the pixels alone
  float* dots;         // (N, panels, units)
};

// The last layer: out (N, C, H, W) = s conv3x3(r, W) + b. Its weights in two parts, rounded and
// what rounding took, fill the 16 columns of a tile: packed (blocks, 9, pair, 16, 2).
struct Bf16Image {
  i64 n, channels;
  Bf16Plane plane;
  Bf16Source source;
  const bf16* packed;
  const float* bias;
  float* out;  // pixel p, channel c at p * pixel + c * channel
  i64 pixel, channel;
};

constexpr i64 BF16_IMAGE_CHANNELS = 8;  // at most

// Blocks of 32 that hold a pixel's 3x3 neighbourhood in the first layer: a kernel's rows in one, or
// one each.
static inline i64 bf16_first_blocks(i64 channels) { return 9 * channels <= BF16_BLOCK ? 1 : 3; }

// Transposed 2x2: out[2y + i][2x + j] = W[i][j] r[y][x]; with a bias times s, plus the bias. Units
// are (panel, some taps, image, unit of the small plane, one of these taps): their weights of a
// panel stay in the first-level cache.
struct Bf16Upsample {
  i64 n, panels;
  Bf16Plane plane, to;
  Bf16Source source;
  const bf16* packed;  // (tap, panels, blocks) of BF16_PAIRED
  const float* bias;   // (panels * 32) or null
  bf16* out;
};

struct Bf16Pool {
  i64 n, blocks;
  Bf16Plane plane, to;
  const bf16* r;
  bf16* out;
};

struct Bf16Kernels {
  // panels [p0, p1) of units [begin, end) of all images
  void (*layer)(const Bf16Layer&, i64 p0, i64 p1, i64 begin, i64 end);
  void (*image)(const Bf16Image&, i64 begin, i64 end);           // (image, unit)
  void (*upsample)(const Bf16Upsample&, i64 begin, i64 end);     // as Bf16Upsample
  void (*pool)(const Bf16Pool&, i64 begin, i64 end);             // (image, block)
  void (*dgrad)(const Bf16Dgrad&, i64 begin, i64 end);           // units of all images
  void (*grad_input)(const Bf16GradInput&, i64 begin, i64 end);  // (image, block)
};

// Of the form in use, or null: this processor, or FASTPHI_ISA, has none (isa/choice.cpp).
const Bf16Kernels* bf16_kernels();

}  // namespace fastphi
