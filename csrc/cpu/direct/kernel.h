// conv: z = s conv3x3(r, W) + s2 conv3x3(r2, W2) + b, epilogue r_out = ReLU(gamma z) and the
// statistics of z; and the gradient to the input, h = convT(dz), epilogue d_r = s h, d_s = sum h r.
//
// For one output row and one panel of at most two vectors of output channels the products go to a
// scratch row that stays in the first-level cache, and the epilogue reads it there. A tile's input
// is three runs of 3*C contiguous values per pixel, one per kernel row; rows outside of the image
// are left out of the sum, columns outside of it come from a zero-bordered copy of the tile's
// neighbourhood.
//
// Per layer at least: 18*C*Cout*pixels FLOPs; bytes: r read once, r_out (and z) written once,
// weights once per thread. The weights of a panel (9*C*2 vectors: 73 kB at C = 64) stream from the
// second-level cache, 2 vectors per 2*P multiply-adds. Included by isa/body.h inside an
// anonymous namespace.

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
                                 products + x0 * panel.lanes, panel.lanes, scale, add});
  }
}

template <class T>
inline T sum_lanes(typename Vec<T>::type v) {
  T sum = 0;
  for (i64 i = 0; i < Vec<T>::LANES; ++i) sum += v[i];
  return sum;
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

// Adds the bias to products (w, lanes), of which `width` channels count: mean and sum of squared
// deviations. The lanes beyond hold zeros.
template <class T>
void unit_statistics(T* products, i64 w, const Panel<T>& panel, const typename Vec<T>::type* bias,
                     T* mean_and_m2) {
  constexpr i64 V = Vec<T>::LANES;
  typename Vec<T>::type sum = {}, m2 = {};
  for (i64 x = 0; x < w; ++x)
    for (i64 j = 0; j < panel.nv; ++j) {
      T* p = products + (x * panel.nv + j) * V;
      const auto z = load(p) + bias[j];
      store(p, z);
      sum += z;
    }
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

// z = products + bias, its statistics, r_out = ReLU(gamma z)
template <class T>
void layer_epilogue(const ConvJob<T>& job, i64 row, i64 index, const Panel<T>& panel, T* products) {
  constexpr i64 V = Vec<T>::LANES;
  typename Vec<T>::type bias[2], gamma[2];
  load_parameter(job.bias, panel, T(0), bias);
  load_parameter(job.gamma, panel, T(1), gamma);
  if (job.stats) {
    unit_statistics(products, job.w, panel, bias, job.stats + (row * job.panels + index) * 2);
    bias[0] = bias[1] = typename Vec<T>::type{};  // it is in them
  }
  const typename Vec<T>::type zero = {};
  i64 at = row * job.w * job.cout + panel.start;
  for (i64 x = 0; x < job.w; ++x, at += job.cout)
    for (i64 j = 0; j < panel.nv; ++j) {
      const auto z = load(products + (x * panel.nv + j) * V) + bias[j], r = gamma[j] * z;
      const i64 lanes = min_of(V, panel.width - j * V);
      if (job.z) store_first(job.z + at + j * V, z, lanes);
      if (job.r_out)  // keeps NaN, as torch's ReLU does
        store_first(job.r_out + at + j * V, job.relu ? (r < zero ? zero : r) : r, lanes);
    }
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

// Units are numbered row by row where the weights are few: what is written is then whole pixels,
// one after the other, which takes memory half as long as every other line (first layer of 64
// channels: 3.9 -> 2.4 % of an extraction). Else panel by panel: a thread uses a panel's weights
// for all its rows before the next.
template <class T>
void conv(const ConvJob<T>& job, i64 begin, i64 end, T* scratch) {
  constexpr i64 FEW = i64{1} << 18;  // bytes
  i64 channels = 0;
  for (int s = 0; s < job.sources; ++s) channels += job.source[s].channels;
  const bool by_row = 9 * channels * job.cout * static_cast<i64>(sizeof(T)) <= FEW;
  const i64 rows = job.n * job.h;
  T* patch = scratch + job.w * 2 * Vec<T>::LANES;
  for (i64 unit = begin; unit < end; ++unit) {
    const i64 index = by_row ? unit % job.panels : unit / rows;
    const i64 row = by_row ? unit / job.panels : unit % rows;
    const Panel<T> panel(index, job.cout);
    for (int s = 0; s < job.sources; ++s)
      conv_row(job, job.source[s], row / job.h, row % job.h, panel, s > 0, scratch, patch);
    if (job.dot_with)
      dgrad_epilogue(job, row, index, panel, scratch);
    else
      layer_epilogue(job, row, index, panel, scratch);
  }
}
