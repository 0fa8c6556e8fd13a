// What the kernels are asked to do. The kernel bodies (kernels_body.h) are compiled once per
// instruction set and reached through one table of function pointers per element type, so this
// header includes nothing that could emit code: an inline function compiled for AVX-512 must never
// be the copy that the linker keeps for everyone.
//
// Activations are NHWC and dense. A unit of work is (panel of output channels, image row), numbered
// panel-major; a unit's result does not depend on which other units share its thread or its batch.
#pragma once

#include <cstdint>

namespace fastphi {

using i64 = int64_t;

// One input of a convolution: true activation y = scale[n] * r.
template <class T>
struct Source {
  const T* r;       // (N, H, W, channels)
  const T* scale;   // (N,) or null for 1
  const T* packed;  // see conv.h
  i64 channels;
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
  T* stats;            // (N*H, panels, 2): mean and sum of squared deviations of a unit; or null
  const T* dot_with;   // (N, H, W, cout) or null: dgrad; dots receives sum(h * dot_with) of a unit
  T* dots;             // (N*H, panels)
  const T* out_scale;  // (N,) or null: r_out = out_scale * h (dgrad)
};

// Transposed 2x2 convolution, stride 2. Units are (tap * panels + panel, input row) forward and
// (panel, input row) backward.
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
  void (*upsample_fwd)(const UpsampleJob<T>&, i64 begin, i64 end, T* scratch);
  void (*upsample_bwd)(const UpsampleJob<T>&, i64 begin, i64 end, T* scratch);
  void (*weight_grad)(const WeightGradJob<T>&, i64 begin, i64 end);
  void (*layer_grad)(const LayerGradJob<T>&, i64 begin, i64 end);  // units (n, band)
};

// Elements of the scratch that conv and upsample want: a unit's products and the widest edge patch.
template <class T>
static inline i64 scratch_size(const Kernels<T>& k, i64 w, i64 channels) {
  return w * 2 * k.lanes + 3 * (k.max_block + 2) * channels;
}

template <class T>
const Kernels<T>& kernels();  // of the instruction set in use (isa.cpp)

}  // namespace fastphi
