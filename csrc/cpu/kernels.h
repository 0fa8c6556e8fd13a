// What the kernels are asked to do. The kernel bodies (isa/body.h) are compiled once per
// instruction set and reached through one table of function pointers per element type, so this
// header includes nothing that could emit code: an inline function compiled for AVX-512 must never
// be the copy that the linker keeps for everyone.
//
// Activations are NHWC and dense. A unit of work is (panel of output channels, image row); its
// result does not depend on which other units share its thread or its batch.
#pragma once

#include <cstdint>

namespace fastphi {

using i64 = int64_t;

// One input of a convolution: true activation y = scale[n] * r.
template <class T>
struct Source {
  const T* r;       // (N, H, W, channels)
  const T* scale;   // (N,) or null for 1
  const T* packed;  // see direct/conv.h
  i64 channels;
  // Winograd's alone: r is the z that r was to be made of, ReLU(gamma z)
  bool raw;
  const T* gamma;  // (channels) or null for 1
};

// How the gradient of a layer's output reaches the pixels that the layer's convolution made.
enum class Spread {
  PIXEL,           // d (N, H, W, C): one value each
  POOL,            // d (N, H/2, W/2, C): a quarter of their pool's
  IMAGE,           // d (N, C): the same for all
  PIXEL_AND_POOL,  // d one value each, and a quarter of their pool's in d_pool
};

// Input of a gradient's convolution, dz = m gamma d + coefficient (z - mean), m = 1[gamma z > 0] (1
// without ReLU); z is source[0].r.
template <class T>
struct GradInput {
  const T* d;
  Spread spread;
  const T* gamma;        // (C,) or null for 1
  const T* mean;         // (N,)
  const T* coefficient;  // (N,) or null without norm
  // Winograd's alone
  const T* d_pool = nullptr;
  bool relu = true;
  T *bias = nullptr, *gain = nullptr;  // (strips, C): sums of dz and of m d z; or null
};

constexpr i64 WINO_POINTS = 36;  // of F(4x4, 3x3)
constexpr i64 WINO_TILE = 4;     // output pixels of a tile in either direction

// The tiles of an image in rows, the rows cut into nearly equal strips: the unit of partial results
// of a Winograd convolution. By height and width alone.
struct Strips {
  static constexpr i64 LONGEST = 16;  // tiles: a block of them is a few kB per channel
  i64 across, per_row, per_image;     // tiles of a row, strips of a row, strips of an image
  i64 h, w;
  Strips(i64 h, i64 w)
      : across((w + WINO_TILE - 1) / WINO_TILE),
        per_row((across + LONGEST - 1) / LONGEST),
        per_image(per_row * ((h + WINO_TILE - 1) / WINO_TILE)),
        h(h),
        w(w) {}
  i64 start(i64 strip) const { return strip % per_row * across / per_row; }
  i64 tiles(i64 strip) const {
    return (strip % per_row + 1) * across / per_row - strip % per_row * across / per_row;
  }
  i64 y(i64 strip) const { return strip % per_image / per_row * WINO_TILE; }  // of its first pixel
  i64 x(i64 strip) const { return start(strip) * WINO_TILE; }
  i64 before(i64 strip) const { return strip / per_row * across + start(strip); }  // tiles
  i64 pixels(i64 strip) const {
    const i64 bottom = y(strip) + WINO_TILE, right = x(strip) + tiles(strip) * WINO_TILE;
    return ((bottom < h ? bottom : h) - y(strip)) * ((right < w ? right : w) - x(strip));
  }
};

// Where weights lie: output o, input channel c, tap t at o * output + c * channel + t * tap +
// first.
struct WeightStrides {
  i64 output, channel, tap, first;
};

template <class T>
struct ConvJob {
  i64 n, h, w, cout, panels;
  int sources;  // 1 or 2
  Source<T> source[2];
  const T* bias;   // (cout) or null
  const T* gamma;  // (cout) or null: no norm
  bool relu;
  T* z;                // (N, H, W, cout) or null
  T* r_out;            // (N, H, W, cout) or null
  T* stats;            // (units, 2): mean and sum of squared deviations of a unit; or null
  const T* dot_with;   // (N, H, W, cout) or null: dgrad; dots receives sum(h * dot_with) of a unit
  bool dot_raw;        // Winograd's alone: sum(h * ReLU(gamma dot_with))
  T* dots;             // (units)
  const T* out_scale;  // (N,) or null: r_out = out_scale * h (dgrad)
  // Winograd's alone; its units are (strip, panel), those of the direct kernel (image row, panel)
  const T* winograd;         // packed weights of all sources, or null: the direct kernel runs
  bool fresh;                // winograd is not packed: transformed where it is used
  WeightStrides at;          // of fresh weights
  const GradInput<T>* grad;  // or null: the input is source[..].r
  T* pool;                   // (N, H/2, W/2, cout): 2x2 mean of r_out; or null
  T* sums;                   // (strips, cout): sum of r_out; or null
};

// Transposed 2x2 convolution, stride 2. Forward: input rows by columns (tap * panels + panel);
// backward units are (panel, input row).
template <class T>
struct UpsampleJob {
  i64 n, h, w, cin, cout, panels;  // h, w: of the small side
  const T* in;                     // forward (N, H, W, cin); backward d_out (N, 2H, 2W, cout)
  const T* packed;
  T* out;  // forward (N, 2H, 2W, cout); backward d_r (N, H, W, cin)
};

// d_weight[tap][ci][co] = sum over pixels of scale * r * d. Units are (panel of co, tap, block of
// ci).
template <class T>
struct WeightGradJob {
  i64 n, h, w, cin, cout, panels, blocks, taps;  // taps: 9 (3x3 conv) or 4 (2x2 transposed conv)
  const T* r;                                    // (N, H, W, cin)
  const T* scale;                                // (N,) or null
  const T* d;     // (N, H, W, pitch), or (N, 2H, 2W, pitch) for 4 taps
  i64 pitch;      // cout rounded up to whole vectors; what is beyond cout is zero
  T* partial;     // (units, unit_size) workspace, zero at the start
  double* total;  // (units, unit_size), zero at the start
};

template <class T>
struct LayerGradJob {
  i64 n, h, w, c;
  const T* d_r;          // (N, H, W, C)
  const T* z;            // (N, H, W, C)
  const T* gamma;        // (C,) or null
  const T* mean;         // (N,)
  const T* coefficient;  // (N,): dz += coefficient * (z - mean); null without norm
  bool relu;
  T* dz;       // (N, H, W, C)
  T* d_bias;   // (N, bands, C) or null
  T* d_gamma;  // (N, bands, C) or null
};

constexpr i64 BAND =
    8;  // rows of a LayerGradJob unit: keeps its partial sums small beside z itself

static constexpr i64 bands(i64 h) { return (h + BAND - 1) / BAND; }

template <class T>
struct Kernels {
  const char* isa;
  i64 lanes;      // of a vector; a panel is at most two vectors of output channels
  i64 max_block;  // most pixels (or input channels, for weight gradients) of a register tile
  i64 unit_size;  // elements of a WeightGradJob unit
  void (*conv)(const ConvJob<T>&, i64 begin, i64 end, T* scratch);
  void (*upsample_fwd)(const UpsampleJob<T>&, i64 begin, i64 end, i64 columns_begin,
                       i64 columns_end, T* scratch);
  void (*upsample_bwd)(const UpsampleJob<T>&, i64 begin, i64 end, T* scratch);
  void (*weight_grad)(const WeightGradJob<T>&, i64 begin, i64 end);
  void (*layer_grad)(const LayerGradJob<T>&, i64 begin, i64 end);  // units (n, band)
};

// The gradient of a Winograd convolution's weights: its input, and where it goes.
struct WinogradWeightJob {
  i64 n, h, w, cin, cout, panels;
  int sources;
  Source<float> source[2];
  float* d_weight;  // (cout, cin, 3, 3)
};

// Some tiles, transformed: the input as u[point * u_pitch + tile * u_depth + c], the gradient of
// the output likewise as v. A unit is `blocks` blocks of input channels by `panels` panels of
// outputs, numbered with the panels inside.
struct WeightPart {
  i64 tiles, u_depth, u_pitch, v_depth, v_pitch, blocks, panels;
  float *u, *v;
  bool add;  // to the products of the parts before
};

// Strips [first, last) and panels [begin, end), `group` panels at a time; their transformed input,
// v [point * pitch + tile * depth + c], and room for the products of a group.
struct WinogradPart {
  i64 first, last, begin, end, group, tiles, pitch, depth;
  const float* v;
  float* m;       // tiles * 36 numbers per output channel
  float* packed;  // room for FRESH channels of a panel, where weights are fresh
};

constexpr i64 FRESH = 64;  // channels of fresh weights that are transformed at a time

// The steps of a Winograd convolution and its gradients, float alone (winograd/kernel.h, weight.h).
struct WinogradKernels {
  void (*pack)(const float* weight, i64 outputs, i64 channels, const WeightStrides&, i64 begin,
               i64 end, float* packed);
  void (*input)(const ConvJob<float>&, i64 first, i64 last, float* v, i64 pitch, i64 depth,
                float* scratch);
  void (*output)(const ConvJob<float>&, const WinogradPart&);
  void (*spread)(const WinogradWeightJob&, i64 first, i64 last, float* u, i64 pitch, i64 depth);
  void (*weights)(const WinogradWeightJob&, const WeightPart&, i64 unit, float* m);
  void (*taps)(const WinogradWeightJob&, const WeightPart&, i64 unit, float* m, i64 slices,
               i64 size);
};

// Elements of the scratch that conv and upsample want: a unit's products and the widest edge patch.
template <class T>
static inline i64 scratch_size(const Kernels<T>& k, i64 w, i64 channels) {
  return w * 2 * k.lanes + 3 * (k.max_block + 2) * channels;
}

template <class T>
const Kernels<T>& kernels();  // of the instruction set in use (isa/choice.cpp)
const WinogradKernels& winograd_kernels();

}  // namespace fastphi
