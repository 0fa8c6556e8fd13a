// Launchers of the convolution engine: packing, splitting into units, merging partial results in
// fixed order.
#include "conv.h"

#include <cmath>
#include <vector>

#include "../launch.h"
#include "../winograd/conv.h"

namespace fastphi {

namespace {

i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }

template <class T>
i64 panels_of(i64 outputs) {
  return divide_up(outputs, 2 * kernels<T>().lanes);
}

// packed(o, (t, c)) for all taps and channels. Read channel by channel, whose taps are neighbours.
template <class T>
void pack(const T* weight, i64 outputs, i64 taps, i64 channels, WeightStrides at, T* packed) {
  const i64 lanes = kernels<T>().lanes, k = taps * channels;
  parallel(panels_of<T>(outputs), 2 * lanes * k, [&](i64 begin, i64 end) {
    for (i64 panel = begin; panel < end; ++panel) {
      const i64 start = panel * 2 * lanes, width = std::min(2 * lanes, outputs - start);
      const i64 padded = divide_up(width, lanes) * lanes;
      for (i64 c = 0; c < channels; ++c)
        for (i64 t = 0; t < taps; ++t) {
          const T* from = weight + at.first + start * at.output + c * at.channel + t * at.tap;
          T* to = packed + start * k + (t * channels + c) * padded;
          for (i64 o = 0; o < width; ++o) to[o] = from[o * at.output];
          for (i64 o = width; o < padded; ++o) to[o] = 0;
        }
    }
  });
}

// Sets panels and where the weights of the sources lie in their pack.
template <class T>
void bind_weights(ConvJob<T>& job, const T* packed) {
  job.panels = panels_of<T>(job.cout);
  i64 channels = 0;
  for (int s = 0; s < job.sources; ++s) channels += job.source[s].channels;
  job.winograd = winograd_serves<T>(channels) ? packed : nullptr;
  for (int s = 0; s < job.sources; ++s) {
    job.source[s].packed = packed;
    packed += packed_size<T>(job.cout, 9 * job.source[s].channels);
  }
}

template <class T>
i64 units_per_image(const ConvJob<T>& job) {
  return (job.winograd ? Strips(job.h, job.w).per_image : job.h) * job.panels;
}

template <class T>
void run_conv(const ConvJob<T>& job) {
  if constexpr (sizeof(T) == sizeof(float))
    if (job.winograd) return run_winograd(job);
  const auto& k = kernels<T>();
  i64 channels = 0;
  for (int s = 0; s < job.sources; ++s) channels = std::max(channels, job.source[s].channels);
  const i64 steps = job.w * 18 * channels;
  parallel(job.panels * job.n * job.h, steps, [&](i64 begin, i64 end) {
    Buffer<T> scratch(scratch_size(k, job.w, channels));
    k.conv(job, begin, end, scratch);
  });
}

}  // namespace

template <class T>
i64 packed_size(i64 outputs, i64 k) {
  const i64 lanes = kernels<T>().lanes;
  return divide_up(outputs, lanes) * lanes * k;
}

template <class T>
i64 conv_packed_size(i64 outputs, i64 c1, i64 c2) {
  return (winograd_serves<T>(c1 + c2) ? WINO_POINTS : 9) * packed_size<T>(outputs, c1 + c2);
}

template <class T>
void pack_conv(const T* weight, i64 cout, i64 c1, i64 c2, T* packed) {
  const i64 cin = c1 + c2;
  if constexpr (sizeof(T) == sizeof(float))
    if (winograd_serves<T>(cin))
      return pack_winograd(weight, cout, cin, {cin * 9, 9, 1, 0}, packed);
  pack(weight, cout, 9, c1, {cin * 9, 9, 1, 0}, packed);
  if (c2) pack(weight, cout, 9, c2, {cin * 9, 9, 1, c1 * 9}, packed + packed_size<T>(cout, 9 * c1));
}

template <class T>
void pack_conv_transposed(const T* weight, i64 cout, i64 cin, i64 c0, i64 c1, T* packed) {
  const WeightStrides rotated{9, cin * 9, -1, c0 * 9 + 8};
  if constexpr (sizeof(T) == sizeof(float))
    if (winograd_serves<T>(cout)) return pack_winograd(weight, c1 - c0, cout, rotated, packed);
  pack(weight, c1 - c0, 9, cout, rotated, packed);
}

template <class T>
void pack_upsample(const T* weight, i64 cin, i64 cout, bool transposed, T* packed) {
  if (transposed) return pack(weight, cin, 4, cout, {cout * 4, 4, 1, 0}, packed);
  for (i64 tap = 0; tap < 4; ++tap)
    pack(weight, cout, 1, cin, {4, cout * 4, 0, tap}, packed + tap * packed_size<T>(cout, cin));
}

namespace {

// Merged as (count, mean, M2) in the order of the units: sum z^2 - (sum z)^2/n cancels.
template <class T>
void merge_statistics(const ConvJob<T>& job, T eps, T* mean, T* std, T* s_out) {
  const Strips strips(job.h, job.w);
  const i64 units = units_per_image(job), panel_width = 2 * kernels<T>().lanes;
  for (i64 n = 0; n < job.n; ++n) {
    double count = 0, m = 0, m2 = 0;
    for (i64 u = n * units; u < (n + 1) * units; ++u) {
      const i64 pixels = job.winograd ? strips.pixels(u / job.panels) : job.w;
      const i64 width = std::min(panel_width, job.cout - u % job.panels * panel_width);
      const double more = static_cast<double>(pixels * width), delta = job.stats[2 * u] - m;
      count += more;
      m += delta * more / count;
      m2 += job.stats[2 * u + 1] + delta * delta * more * (count - more) / count;
    }
    const double deviation = std::sqrt(m2 / count);
    mean[n] = static_cast<T>(m);
    std[n] = static_cast<T>(deviation);
    s_out[n] = static_cast<T>(1 / (deviation + eps));
  }
}

// means (N, cout) of the strips' sums, added in double and in order.
template <class T>
void merge_sums(const ConvJob<T>& job, T* means) {
  const i64 strips = Strips(job.h, job.w).per_image;
  for (i64 n = 0; n < job.n; ++n)
    for (i64 c = 0; c < job.cout; ++c) {
      double sum = 0;
      for (i64 strip = n * strips; strip < (n + 1) * strips; ++strip)
        sum += job.sums[strip * job.cout + c];
      means[n * job.cout + c] = static_cast<T>(sum / static_cast<double>(job.h * job.w));
    }
}

}  // namespace

template <class T>
void launch_layer_fwd(ConvJob<T> job, const T* packed, T eps, T* mean, T* std, T* s_out, T* means) {
  bind_weights(job, packed);
  const i64 units = job.n * units_per_image(job);
  Buffer<T> stats(std ? 2 * units : 0), sums;
  if (means && job.winograd) sums.reserve(job.n * Strips(job.h, job.w).per_image * job.cout);
  job.stats = std ? stats.get() : nullptr;
  job.sums = means && job.winograd ? sums.get() : nullptr;
  run_conv(job);
  if (std) merge_statistics(job, eps, mean, std, s_out);
  if (job.sums) merge_sums(job, means);
  if (job.winograd) return;
  if (job.pool) launch_avg_pool_fwd(job.n, job.h, job.w, job.cout, job.r_out, job.pool);
  if (means) launch_spatial_mean_fwd(job.n, job.h, job.w, job.cout, job.r_out, means);
}

template <class T>
void launch_layer_dgrad(const DgradJob<T>& d) {
  ConvJob<T> job{};
  job.n = d.n, job.h = d.h, job.w = d.w, job.cout = d.c;
  job.sources = 1;
  job.source[0] = {d.input, nullptr, nullptr, d.cout};
  job.grad = d.grad, job.r_out = d.d_r, job.dot_with = d.r, job.out_scale = d.scale;
  job.dot_raw = d.raw, job.gamma = d.gamma;
  bind_weights(job, d.packed);
  const i64 units = units_per_image(job);
  Buffer<T> dots(d.d_s ? d.n * units : 0);
  job.dots = d.d_s ? dots.get() : nullptr;
  run_conv(job);
  if (d.d_s) sum_units<T>(dots, d.n, units, d.d_s);
}

template <class T>
void sum_units(const T* partial, i64 n, i64 units, T* out) {
  for (i64 i = 0; i < n; ++i) {
    double sum = 0;
    for (i64 u = i * units; u < (i + 1) * units; ++u) sum += partial[u];
    out[i] = static_cast<T>(sum);
  }
}

template <class T>
void norm_coefficients(i64 n, i64 count, const T* d_s_out, const T* s_out, const T* std,
                       T* coefficient) {
  for (i64 i = 0; i < n; ++i) {
    const double s = s_out[i];
    coefficient[i] =
        std[i] == 0 ? T(0)
                    : static_cast<T>(-d_s_out[i] * s * s / (static_cast<double>(count) * std[i]));
  }
}

template <class T>
void sum_rows(const T* partial, i64 rows, i64 c, T* out) {
  parallel(c, rows, [&](i64 begin, i64 end) {
    std::vector<double> sum(end - begin, 0.0);
    for (i64 row = 0; row < rows; ++row)
      for (i64 i = begin; i < end; ++i) sum[i - begin] += partial[row * c + i];
    for (i64 i = begin; i < end; ++i) out[i] = static_cast<T>(sum[i - begin]);
  });
}

template <class T>
void launch_layer_grad(LayerGradJob<T> job, T* d_bias, T* d_gamma) {
  const i64 units = job.n * bands(job.h);
  Buffer<T> bias_rows(d_bias ? units * job.c : 0), gamma_rows(d_gamma ? units * job.c : 0);
  job.d_bias = d_bias ? bias_rows.get() : nullptr;
  job.d_gamma = d_gamma ? gamma_rows.get() : nullptr;
  parallel(units, BAND * job.w * job.c,
           [&](i64 begin, i64 end) { kernels<T>().layer_grad(job, begin, end); });
  if (d_bias) sum_rows(job.d_bias, units, job.c, d_bias);
  if (d_gamma) sum_rows(job.d_gamma, units, job.c, d_gamma);
}

template <class T>
void launch_grad_input(i64 n, i64 h, i64 w, i64 c, const T* z, const GradInput<T>& grad, T* dz) {
  Buffer<T> spread(grad.spread == Spread::PIXEL ? 0 : n * h * w * c);
  if (grad.spread == Spread::POOL) {
    launch_avg_pool_bwd<T>(n, h, w, c, grad.d, spread);
  } else if (grad.spread == Spread::IMAGE) {
    for (i64 pixel = 0; pixel < n * h * w; ++pixel)
      std::memcpy(spread + pixel * c, grad.d + pixel / (h * w) * c, c * sizeof(T));
  }
  LayerGradJob<T> job{};
  job.n = n, job.h = h, job.w = w, job.c = c;
  job.d_r = grad.spread == Spread::PIXEL ? grad.d : spread.get();
  job.z = z, job.gamma = grad.gamma, job.mean = grad.mean, job.coefficient = grad.coefficient;
  job.relu = true, job.dz = dz;
  launch_layer_grad<T>(job, nullptr, nullptr);
}

template <class T>
void launch_weight_grad(WeightGradJob<T> job, i64 stride_in, i64 c0, T* d_weight) {
  const auto& k = kernels<T>();
  job.panels = panels_of<T>(job.cout);
  job.blocks = divide_up(job.cin, k.max_block);
  job.pitch = divide_up(job.cout, k.lanes) * k.lanes;
  const i64 units = job.panels * job.taps * job.blocks;
  const i64 pixels = job.n * job.h * job.w * (job.taps == 4 ? 4 : 1);

  Buffer<T> padded(job.pitch == job.cout ? 0 : pixels * job.pitch);
  if (job.pitch != job.cout) {
    parallel(pixels, job.pitch, [&](i64 begin, i64 end) {
      for (i64 x = begin; x < end; ++x) {
        std::memcpy(padded + x * job.pitch, job.d + x * job.cout, job.cout * sizeof(T));
        std::memset(padded + x * job.pitch + job.cout, 0, (job.pitch - job.cout) * sizeof(T));
      }
    });
    job.d = padded;
  }
  Buffer<T> partial(units * k.unit_size);
  Buffer<double> total(units * k.unit_size);
  partial.zero();
  total.zero();
  job.partial = partial, job.total = total;
  parallel(units, job.n * job.h * job.w * 24,
           [&](i64 begin, i64 end) { k.weight_grad(job, begin, end); });

  const i64 base = job.cin / job.blocks, rest = job.cin % job.blocks, lanes = k.lanes;
  parallel(units, k.unit_size, [&](i64 begin, i64 end) {
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 block = unit % job.blocks, tap = unit / job.blocks % job.taps;
      const i64 co0 = unit / job.blocks / job.taps * 2 * lanes,
                width = std::min(2 * lanes, job.cout - co0);
      const i64 row = divide_up(width, lanes) * lanes, ci0 = block * base + std::min(block, rest);
      for (i64 p = 0; p < base + (block < rest); ++p)
        for (i64 j = 0; j < width; ++j) {
          const i64 ci = ci0 + p, co = co0 + j;
          const i64 at =
              job.taps == 9 ? (co * stride_in + c0 + ci) * 9 + tap : (ci * job.cout + co) * 4 + tap;
          d_weight[at] = static_cast<T>(total[unit * k.unit_size + p * row + j]);
        }
    }
  });
}

template <class T>
void launch_upsample_fwd(UpsampleJob<T> job) {
  const auto& k = kernels<T>();
  job.panels = panels_of<T>(job.cout);
  const i64 rows = job.n * job.h, columns = 4 * job.panels;
  // Threads share the rows, so that each goes on with its own images; or, where these are few, the
  // weights.
  const bool by_row = rows * job.w >= job.cin;
  parallel(by_row ? rows : columns, job.w * 2 * job.cin, [&](i64 begin, i64 end) {
    Buffer<T> scratch(scratch_size(k, job.w, 0));
    if (by_row)
      k.upsample_fwd(job, begin, end, 0, columns, scratch);
    else
      k.upsample_fwd(job, 0, rows, begin, end, scratch);
  });
}

template <class T>
void launch_upsample_bwd(UpsampleJob<T> job) {
  const auto& k = kernels<T>();
  job.panels = panels_of<T>(job.cin);
  parallel(job.panels * job.n * job.h, job.w * 8 * job.cout, [&](i64 begin, i64 end) {
    Buffer<T> scratch(scratch_size(k, job.w, 0));
    k.upsample_bwd(job, begin, end, scratch);
  });
}

#define INSTANTIATE(T)                                                                    \
  template i64 packed_size<T>(i64, i64);                                                  \
  template i64 conv_packed_size<T>(i64, i64, i64);                                        \
  template void pack_conv(const T*, i64, i64, i64, T*);                                   \
  template void pack_conv_transposed(const T*, i64, i64, i64, i64, T*);                   \
  template void pack_upsample(const T*, i64, i64, bool, T*);                              \
  template void launch_layer_fwd(ConvJob<T>, const T*, T, T*, T*, T*, T*);                \
  template void launch_layer_dgrad(const DgradJob<T>&);                                   \
  template void norm_coefficients(i64, i64, const T*, const T*, const T*, T*);            \
  template void sum_rows(const T*, i64, i64, T*);                                         \
  template void sum_units(const T*, i64, i64, T*);                                        \
  template void launch_layer_grad(LayerGradJob<T>, T*, T*);                               \
  template void launch_grad_input(i64, i64, i64, i64, const T*, const GradInput<T>&, T*); \
  template void launch_weight_grad(WeightGradJob<T>, i64, i64, T*);                       \
  template void launch_upsample_fwd(UpsampleJob<T>);                                      \
  template void launch_upsample_bwd(UpsampleJob<T>);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastphi
