// Launchers of the convolution engine: packing, splitting into units, merging partial results in
// fixed order.
#include "conv.h"

#include <cmath>
#include <vector>

#include "launch.h"

namespace fastphi {

namespace {

i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }

template <class T>
i64 panels_of(i64 outputs) {
  return divide_up(outputs, 2 * kernels<T>().lanes);
}

// Where weights lie: output o, input channel c, tap t at o * output + c * channel + t * tap +
// first.
struct Strides {
  i64 output, channel, tap, first;
};

// packed(o, (t, c)) for all taps and channels. Read channel by channel, whose taps are neighbours.
template <class T>
void pack(const T* weight, i64 outputs, i64 taps, i64 channels, Strides at, T* packed) {
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

template <class T>
void run_conv(const ConvJob<T>& job, i64 channels) {
  const auto& k = kernels<T>();
  const i64 steps = job.w * 18 * channels;
  parallel(job.panels * job.n * job.h, steps, [&](i64 begin, i64 end) {
    Buffer<T> scratch(scratch_size(k, job.w, channels));
    k.conv(job, begin, end, scratch);
  });
}

// Sums (rows, c) partials over rows in double, in order.
template <class T>
void sum_rows(const T* partial, i64 rows, i64 c, T* out) {
  parallel(c, rows, [&](i64 begin, i64 end) {
    std::vector<double> sum(end - begin, 0.0);
    for (i64 row = 0; row < rows; ++row)
      for (i64 i = begin; i < end; ++i) sum[i - begin] += partial[row * c + i];
    for (i64 i = begin; i < end; ++i) out[i] = static_cast<T>(sum[i - begin]);
  });
}

}  // namespace

template <class T>
i64 packed_size(i64 outputs, i64 k) {
  const i64 lanes = kernels<T>().lanes;
  return divide_up(outputs, lanes) * lanes * k;
}

template <class T>
void pack_conv(const T* weight, i64 cout, i64 cin, i64 c0, i64 c1, bool transposed, T* packed) {
  if (transposed)
    pack(weight, c1 - c0, 9, cout, {9, cin * 9, -1, c0 * 9 + 8}, packed);
  else
    pack(weight, cout, 9, c1 - c0, {cin * 9, 9, 1, c0 * 9}, packed);
}

template <class T>
void pack_upsample(const T* weight, i64 cin, i64 cout, bool transposed, T* packed) {
  if (transposed) return pack(weight, cin, 4, cout, {cout * 4, 4, 1, 0}, packed);
  for (i64 tap = 0; tap < 4; ++tap)
    pack(weight, cout, 1, cin, {4, cout * 4, 0, tap}, packed + tap * packed_size<T>(cout, cin));
}

template <class T>
void launch_layer_fwd(ConvJob<T> job, T eps, T* mean, T* std, T* s_out) {
  job.panels = panels_of<T>(job.cout);
  Buffer<T> stats(std ? job.n * job.h * job.panels * 2 : 0);
  job.stats = std ? stats.get() : nullptr;
  run_conv(job, std::max(job.source[0].channels, job.sources > 1 ? job.source[1].channels : 0));
  if (!std) return;
  const i64 panel_width = 2 * kernels<T>().lanes;
  for (i64 n = 0; n < job.n; ++n) {
    // Merged as (count, mean, M2): sum z^2 - (sum z)^2/n cancels.
    double count = 0, m = 0, m2 = 0;
    for (i64 u = n * job.h * job.panels; u < (n + 1) * job.h * job.panels; ++u) {
      const double more = static_cast<double>(
          job.w * std::min(panel_width, job.cout - u % job.panels * panel_width));
      const double delta = stats[2 * u] - m;
      count += more;
      m += delta * more / count;
      m2 += stats[2 * u + 1] + delta * delta * more * (count - more) / count;
    }
    const double deviation = std::sqrt(m2 / count);
    mean[n] = static_cast<T>(m);
    std[n] = static_cast<T>(deviation);
    s_out[n] = static_cast<T>(1 / (deviation + eps));
  }
}

template <class T>
void launch_layer_dgrad(i64 n, i64 h, i64 w, i64 cout, i64 c, const T* dz, const T* packed,
                        const T* r, const T* scale, T* d_r, T* d_s) {
  ConvJob<T> job{};
  job.n = n, job.h = h, job.w = w, job.cout = c, job.panels = panels_of<T>(c);
  job.sources = 1;
  job.source[0] = {dz, nullptr, packed, cout};
  Buffer<T> dots(n * h * job.panels);
  job.r_out = d_r, job.dot_with = r, job.dots = dots, job.out_scale = scale;
  run_conv(job, cout);
  for (i64 i = 0; i < n; ++i) {
    double sum = 0;
    for (i64 u = i * h * job.panels; u < (i + 1) * h * job.panels; ++u) sum += dots[u];
    d_s[i] = static_cast<T>(sum);
  }
}

template <class T>
void launch_conv_transposed(i64 n, i64 h, i64 w, i64 cout, i64 c, const T* dz, const T* packed,
                            T* out) {
  ConvJob<T> job{};
  job.n = n, job.h = h, job.w = w, job.cout = c, job.panels = panels_of<T>(c);
  job.sources = 1;
  job.source[0] = {dz, nullptr, packed, cout};
  job.r_out = out;
  run_conv(job, cout);
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
  parallel(4 * job.panels * job.n * job.h, job.w * 2 * job.cin, [&](i64 begin, i64 end) {
    Buffer<T> scratch(scratch_size(k, job.w, 0));
    k.upsample_fwd(job, begin, end, scratch);
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
  template void pack_conv(const T*, i64, i64, i64, i64, bool, T*);                        \
  template void pack_upsample(const T*, i64, i64, bool, T*);                              \
  template void launch_layer_fwd(ConvJob<T>, T, T*, T*, T*);                              \
  template void launch_layer_dgrad(i64, i64, i64, i64, i64, const T*, const T*, const T*, \
                                   const T*, T*, T*);                                     \
  template void launch_conv_transposed(i64, i64, i64, i64, i64, const T*, const T*, T*);  \
  template void norm_coefficients(i64, i64, const T*, const T*, const T*, T*);            \
  template void launch_layer_grad(LayerGradJob<T>, T*, T*);                               \
  template void launch_weight_grad(WeightGradJob<T>, i64, i64, T*);                       \
  template void launch_upsample_fwd(UpsampleJob<T>);                                      \
  template void launch_upsample_bwd(UpsampleJob<T>);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastphi
