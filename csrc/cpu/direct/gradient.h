// weight_grad: d_W[tap][ci][co] = sum over pixels of s r d; layer_grad: dz from the gradients of
// r_out and s_out.
//
// weight_grad is a product A^T B with the pixels as its sum: 18*Cin*Cout*pixels FLOPs; a block of
// pixels (its r and d fit the second-level cache) serves all units of a thread before the next.
// layer_grad is one pass: d_r and z read, dz written. Included by isa/body.h inside an
// anonymous namespace.

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
