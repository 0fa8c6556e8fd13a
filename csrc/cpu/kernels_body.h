// The kernels, compiled once per instruction set. The including file defines
//   FASTPHI_ISA           name of the set, and of the table of kernels
//   FASTPHI_VECTOR_BYTES  bytes of a vector register
//   FASTPHI_BLOCK         most pixels of a register tile (see micro.h)
//
// conv: z = s conv3x3(r, W) + s2 conv3x3(r2, W2) + b, epilogue r_out = ReLU(gamma z) and the
// statistics of z. For one output row and one panel of at most 2 vectors of output channels the
// products go to a scratch row that stays in the first-level cache, and the epilogue reads it
// there. A tile's input is three runs of 3*C contiguous values per pixel, one per kernel row; rows
// outside of the image are left out of the sum, columns outside of it come from a zero-bordered
// copy of the tile's neighbourhood.
//
// Per layer at least: 18*C*Cout*pixels FLOPs; bytes: r and r_out once, weights once per thread. The
// weights of a panel (9*C*2 vectors: 73 kB at C = 64) stream from the second-level cache, 2 vectors
// per P*2 multiply-adds. Measured distances to that bound: csrc/README.md.

#include <cstring>

#include "kernels.h"

namespace fastphi {
namespace {

#include "micro.h"

constexpr i64 BLOCK = FASTPHI_BLOCK;

inline i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
inline i64 max_of(i64 a, i64 b) { return a > b ? a : b; }

// [0, n) cut into nearly equal pieces of at most BLOCK: no short tail wastes a tile.
struct Split {
  i64 count, base, rest;
  explicit Split(i64 n) : count((n + BLOCK - 1) / BLOCK), base(n / count), rest(n % count) {}
  i64 start(i64 i) const { return i * base + min_of(i, rest); }
};

// Calls f with P and NV as compile-time numbers.
template <int P, class F>
inline void with_size(i64 p, i64 nv, const F& f) {
  if constexpr (P > 0) {
    if (p != P) return with_size<P - 1>(p, nv, f);
    if (nv == 2)
      f.template call<P, 2>();
    else
      f.template call<P, 1>();
  }
}

template <class T>
struct TileCall {
  const T* a;
  i64 stride, runs, run_stride, len;
  const T* b;
  T* out;
  T scale;
  bool add;
  template <int P, int NV>
  void call() const {
    tile<T, P, NV>(a, stride, runs, run_stride, len, b, out, scale, add);
  }
};

template <class T>
struct PixelsCall {
  const T* a;
  i64 stride_a, row_stride_a;
  const T* d;
  i64 stride_d, row_stride_d, rows, len;
  T scale;
  T* out;
  template <int P, int NV>
  void call() const {
    tile_pixels<T, P, NV>(a, stride_a, row_stride_a, d, stride_d, row_stride_d, rows, len, scale,
                          out);
  }
};

// A panel: output channels [start, start + width), in nv vectors; packed panels lie one after the
// other.
template <class T>
struct Panel {
  i64 start, width, nv, lanes;
  Panel(i64 index, i64 cout) {
    constexpr i64 V = Vec<T>::LANES;
    start = index * 2 * V;
    width = min_of(cout - start, 2 * V);
    nv = width > V ? 2 : 1;
    lanes = nv * V;
  }
  const T* weights(const T* packed, i64 k) const { return packed + start * k; }
};

// Copies columns [x0 - 1, x0 + p + 1) of rows [y0, y0 + rows) of an image, zeros outside of [0, w).
template <class T>
void copy_patch(const T* image, i64 w, i64 c, i64 x0, i64 p, i64 y0, i64 rows, T* patch) {
  const i64 first = max_of(x0 - 1, 0), last = min_of(x0 + p + 1, w);
  const i64 left = first - (x0 - 1), right = x0 + p + 1 - last;
  for (i64 row = 0; row < rows; ++row, patch += (p + 2) * c) {
    std::memset(patch, 0, left * c * sizeof(T));
    std::memcpy(patch + left * c, image + ((y0 + row) * w + first) * c,
                (last - first) * c * sizeof(T));
    std::memset(patch + (left + last - first) * c, 0, right * c * sizeof(T));
  }
}

// products (w, lanes) (+)= scale * conv3x3(one row of one source)
template <class T>
void conv_row(const ConvJob<T>& job, const Source<T>& s, i64 n, i64 y, const Panel<T>& panel,
              bool add, T* products, T* patch) {
  const i64 c = s.channels, first = max_of(0, 1 - y), last = min_of(3, job.h + 1 - y);
  const T* image = s.r + n * job.h * job.w * c;
  const T* b = panel.weights(s.packed, 9 * c) + first * 3 * c * panel.lanes;
  const T scale = s.scale ? s.scale[n] : T(1);
  const Split split(job.w);
  for (i64 i = 0; i < split.count; ++i) {
    const i64 x0 = split.start(i), p = split.start(i + 1) - x0;
    const i64 y0 = y - 1 + first;
    const T* a = image + (y0 * job.w + x0 - 1) * c;
    i64 run_stride = job.w * c;
    if (x0 == 0 || x0 + p == job.w) {
      copy_patch(image, job.w, c, x0, p, y0, last - first, patch);
      a = patch;
      run_stride = (p + 2) * c;
    }
    with_size<BLOCK>(p, panel.nv,
                     TileCall<T>{a, c, last - first, run_stride, 3 * c, b,
                                 products + x0 * panel.lanes, scale, add});
  }
}

template <class T>
inline T sum_lanes(typename Vec<T>::type v) {
  T sum = 0;
  for (i64 i = 0; i < Vec<T>::LANES; ++i) sum += v[i];
  return sum;
}

// Mean and sum of squared deviations of products (w, lanes), of which `width` channels count. The
// lanes beyond hold zeros.
template <class T>
void unit_statistics(const T* products, i64 w, const Panel<T>& panel, T* mean_and_m2) {
  constexpr i64 V = Vec<T>::LANES;
  typename Vec<T>::type sum = {}, m2 = {};
  for (i64 i = 0; i < w * panel.nv; ++i) sum += load(products + i * V);
  const T mean = sum_lanes<T>(sum) / T(w * panel.width);
  typename Vec<T>::type counts[2];
  for (i64 j = 0; j < 2; ++j)
    for (i64 i = 0; i < V; ++i) counts[j][i] = j * V + i < panel.width ? T(1) : T(0);
  for (i64 x = 0; x < w; ++x)
    for (i64 j = 0; j < panel.nv; ++j) {
      const auto d = (load(products + (x * panel.nv + j) * V) - splat(mean)) * counts[j];
      m2 += d * d;
    }
  mean_and_m2[0] = mean;
  mean_and_m2[1] = sum_lanes<T>(m2);
}

// out[x*pitch + j] = products[x][j], j < width
template <class T>
void copy_out(const T* products, i64 w, const Panel<T>& panel, T* out, i64 pitch) {
  constexpr i64 V = Vec<T>::LANES;
  for (i64 x = 0; x < w; ++x)
    for (i64 j = 0; j < panel.nv; ++j) {
      const T* from = products + (x * panel.nv + j) * V;
      T* to = out + x * pitch + j * V;
      if (j * V + V <= panel.width)
        store(to, load(from));
      else
        for (i64 i = 0; i < panel.width - j * V; ++i) to[i] = from[i];
    }
}

// A panel's slice of a per-channel parameter, zeros beyond the panel.
template <class T>
void load_parameter(const T* parameter, const Panel<T>& panel, T missing,
                    typename Vec<T>::type out[2]) {
  constexpr i64 V = Vec<T>::LANES;
  for (i64 j = 0; j < 2; ++j)
    for (i64 i = 0; i < V; ++i)
      out[j][i] = j * V + i >= panel.width ? T(0)
                  : parameter              ? parameter[panel.start + j * V + i]
                                           : missing;
}

// z = products + bias, its statistics, r_out = ReLU(gamma z)
template <class T>
void layer_epilogue(const ConvJob<T>& job, i64 row, i64 index, const Panel<T>& panel, T* products) {
  constexpr i64 V = Vec<T>::LANES;
  const i64 offset = row * job.w * job.cout + panel.start;
  typename Vec<T>::type parameter[2];
  if (job.bias) {
    load_parameter(job.bias, panel, T(0), parameter);
    for (i64 x = 0; x < job.w; ++x)
      for (i64 j = 0; j < panel.nv; ++j) {
        T* p = products + (x * panel.nv + j) * V;
        store(p, load(p) + parameter[j]);
      }
  }
  if (job.stats)
    unit_statistics(products, job.w, panel, job.stats + (row * job.panels + index) * 2);
  if (job.z) copy_out(products, job.w, panel, job.z + offset, job.cout);
  if (!job.r_out) return;
  if (job.gamma || job.relu) {
    load_parameter(job.gamma, panel, T(1), parameter);
    const typename Vec<T>::type zero = {};
    for (i64 x = 0; x < job.w; ++x)
      for (i64 j = 0; j < panel.nv; ++j) {
        T* p = products + (x * panel.nv + j) * V;
        const auto r = parameter[j] * load(p);
        store(p, job.relu ? (r < zero ? zero : r) : r);  // keeps NaN, as torch's ReLU does
      }
  }
  copy_out(products, job.w, panel, job.r_out + offset, job.cout);
}

// r_out = out_scale * h, dots = sum h * dot_with
template <class T>
void dgrad_epilogue(const ConvJob<T>& job, i64 row, i64 index, const Panel<T>& panel, T* products) {
  constexpr i64 V = Vec<T>::LANES;
  const i64 offset = row * job.w * job.cout + panel.start;
  typename Vec<T>::type dot = {};
  const auto scale = splat(job.out_scale[row / job.h]);
  for (i64 x = 0; x < job.w; ++x)
    for (i64 j = 0; j < panel.nv; ++j) {
      T* p = products + (x * panel.nv + j) * V;
      const T* r = job.dot_with + offset + x * job.cout + j * V;
      const auto h = load(p);
      typename Vec<T>::type rv = {};
      if (j * V + V <= panel.width)
        rv = load(r);
      else
        for (i64 i = 0; i < panel.width - j * V; ++i) rv[i] = r[i];
      dot += h * rv;
      store(p, scale * h);
    }
  job.dots[row * job.panels + index] = sum_lanes<T>(dot);
  copy_out(products, job.w, panel, job.r_out + offset, job.cout);
}

template <class T>
void conv(const ConvJob<T>& job, i64 begin, i64 end, T* scratch) {
  const i64 rows = job.n * job.h;
  T* patch = scratch + job.w * 2 * Vec<T>::LANES;
  for (i64 unit = begin; unit < end; ++unit) {
    const i64 index = unit / rows, row = unit % rows;
    const Panel<T> panel(index, job.cout);
    for (int s = 0; s < job.sources; ++s)
      conv_row(job, job.source[s], row / job.h, row % job.h, panel, s > 0, scratch, patch);
    if (job.dot_with)
      dgrad_epilogue(job, row, index, panel, scratch);
    else
      layer_epilogue(job, row, index, panel, scratch);
  }
}

// A row of 1x1 products: pixel p of the row starts at a + p*stride.
template <class T>
void plain_row(const T* a, i64 w, i64 stride, i64 runs, i64 run_stride, i64 len, const T* b,
               const Panel<T>& panel, T* products) {
  const Split split(w);
  for (i64 i = 0; i < split.count; ++i) {
    const i64 x0 = split.start(i), p = split.start(i + 1) - x0;
    with_size<BLOCK>(p, panel.nv,
                     TileCall<T>{a + x0 * stride, stride, runs, run_stride, len, b,
                                 products + x0 * panel.lanes, T(1), false});
  }
}

// out[n, 2y+i, 2x+j, co] = sum_ci r[n, y, x, ci] W[ci, co, i, j]: four 1x1 products
template <class T>
void upsample_fwd(const UpsampleJob<T>& job, i64 begin, i64 end, T* scratch) {
  const i64 rows = job.n * job.h;
  const i64 tap_size = job.cin * ((job.cout + Vec<T>::LANES - 1) / Vec<T>::LANES) * Vec<T>::LANES;
  for (i64 unit = begin; unit < end; ++unit) {
    const i64 tap = unit / rows / job.panels, row = unit % rows;
    const Panel<T> panel(unit / rows % job.panels, job.cout);
    const T* b = panel.weights(job.packed + tap * tap_size, job.cin);
    plain_row(job.in + row * job.w * job.cin, job.w, job.cin, 1, 0, job.cin, b, panel, scratch);
    const i64 pixel = (2 * row + tap / 2) * 2 * job.w + tap % 2;
    copy_out(scratch, job.w, panel, job.out + pixel * job.cout + panel.start, 2 * job.cout);
  }
}

// d_r[n, y, x, ci] = sum_{i,j,co} d_out[n, 2y+i, 2x+j, co] W[ci, co, i, j]: two runs of 2*cout
// values
template <class T>
void upsample_bwd(const UpsampleJob<T>& job, i64 begin, i64 end, T* scratch) {
  const i64 rows = job.n * job.h;
  for (i64 unit = begin; unit < end; ++unit) {
    const i64 row = unit % rows;
    const Panel<T> panel(unit / rows, job.cin);
    const T* b = panel.weights(job.packed, 4 * job.cout);
    const i64 line = 2 * job.w * job.cout;
    plain_row(job.in + 2 * row * line, job.w, 2 * job.cout, 2, line, 2 * job.cout, b, panel,
              scratch);
    copy_out(scratch, job.w, panel, job.out + row * job.w * job.cin + panel.start, job.cin);
  }
}

// Sums of at most ~96 pixels in registers, of 32 such in T, and of those in double: the error does
// not grow with the number of pixels. A block of pixels never spans images.
template <class T>
void weight_grad(const WeightGradJob<T>& job, i64 begin, i64 end) {
  constexpr i64 PIXELS = 96, FOLD = 32, SIZE = BLOCK * 2 * Vec<T>::LANES;
  const i64 rows = max_of(1, PIXELS / job.w), per_image = (job.h + rows - 1) / rows;
  const Split split(job.cin);
  for (i64 block = 0; block < job.n * per_image; ++block) {
    const i64 n = block / per_image, top = block % per_image * rows,
              bottom = min_of(top + rows, job.h);
    const bool fold = block % FOLD == FOLD - 1 || block == job.n * per_image - 1;
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 ci = unit % split.count, tap = unit / split.count % job.taps;
      const Panel<T> panel(unit / split.count / job.taps, job.cout);
      const i64 c0 = split.start(ci), p = split.start(ci + 1) - c0;
      T* partial = job.partial + unit * SIZE;
      PixelsCall<T> call{};
      call.scale = job.scale ? job.scale[n] : T(1);
      call.out = partial;
      call.stride_a = job.cin;
      call.row_stride_a = job.w * job.cin;
      if (job.taps == 9) {
        const i64 ky = tap / 3, kx = tap % 3;
        const i64 y0 = max_of(top, 1 - ky), y1 = min_of(bottom, job.h + 1 - ky);
        const i64 x0 = max_of(0, 1 - kx), x1 = min_of(job.w, job.w + 1 - kx);
        call.rows = y1 - y0;
        call.len = x1 - x0;
        call.a = job.r + ((n * job.h + y0 + ky - 1) * job.w + x0 + kx - 1) * job.cin + c0;
        call.d = job.d + ((n * job.h + y0) * job.w + x0) * job.pitch + panel.start;
        call.stride_d = job.pitch;
        call.row_stride_d = job.w * job.pitch;
      } else {
        call.rows = bottom - top;
        call.len = job.w;
        call.a = job.r + (n * job.h + top) * job.w * job.cin + c0;
        call.d = job.d +
                 ((n * job.h + top) * 4 * job.w + tap / 2 * 2 * job.w + tap % 2) * job.pitch +
                 panel.start;
        call.stride_d = 2 * job.pitch;
        call.row_stride_d = 4 * job.w * job.pitch;
      }
      with_size<BLOCK>(p, panel.nv, call);
      if (!fold) continue;
      double* total = job.total + unit * SIZE;
      for (i64 i = 0; i < SIZE; ++i) {
        total[i] += partial[i];
        partial[i] = 0;
      }
    }
  }
}

// dz = [m gamma d_r] + coefficient (z - mean), m = 1[gamma z > 0]; d_bias = sum dz, d_gamma = sum m
// d_r z
template <class T>
void layer_grad(const LayerGradJob<T>& job, i64 begin, i64 end) {
  const i64 per_image = bands(job.h), c = job.c;
  for (i64 unit = begin; unit < end; ++unit) {
    const i64 n = unit / per_image, top = unit % per_image * BAND;
    const i64 first = (n * job.h + top) * job.w, pixels = (min_of(top + BAND, job.h) - top) * job.w;
    const T k = job.coefficient ? job.coefficient[n] : T(0),
            mean = job.coefficient ? job.mean[n] : T(0);
    T* __restrict d_bias = job.d_bias ? job.d_bias + unit * c : nullptr;
    T* __restrict d_gamma = job.d_gamma ? job.d_gamma + unit * c : nullptr;
    if (d_bias) std::memset(d_bias, 0, c * sizeof(T));
    if (d_gamma) std::memset(d_gamma, 0, c * sizeof(T));
    for (i64 x = first; x < first + pixels; ++x) {
      const T* __restrict d_r = job.d_r + x * c;
      const T* __restrict z = job.z + x * c;
      T* __restrict dz = job.dz + x * c;
      const bool relu = job.relu;
      if (const T* __restrict gamma = job.gamma) {
        for (i64 i = 0; i < c; ++i) {
          const T d = !relu || gamma[i] * z[i] > 0 ? d_r[i] : T(0);
          dz[i] = gamma[i] * d + k * (z[i] - mean);
          if (d_gamma) d_gamma[i] += d * z[i];
        }
      } else {
        for (i64 i = 0; i < c; ++i) dz[i] = !relu || z[i] > 0 ? d_r[i] : T(0);
      }
      if (d_bias)
        for (i64 i = 0; i < c; ++i) d_bias[i] += dz[i];
    }
  }
}

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

}  // namespace fastphi
