// Algorithm 2 on a batch, round any encoder: its losses, its stop for each image, Adam on the
// pixels. An Encoder<T> has image(j), the j-th image (H, W, C), to fill, and after backward its
// gradient; forward(n, phi) -> phi (n, C); backward(n, d_phi).
#pragma once

#include <cmath>
#include <vector>

#include "../arguments.h"
#include "interrupt.h"
#include "launch.h"
#include "network.h"

namespace fastphi {
namespace {

struct Adam {
  double lr, beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
};

// As torch.optim.Adam: x -= lr/(1 - b1^t) * m / (sqrt(v)/sqrt(1 - b2^t) + eps), t = 1 for the
// first. x, m, v: (C, pixels); gradient: (pixels, C).
template <class T>
void adam_step(const Adam& adam, i64 t, i64 c, i64 pixels, const T* gradient, T* x, T* m, T* v) {
  const T step = static_cast<T>(adam.lr / (1 - std::pow(adam.beta1, t)));
  const T root = static_cast<T>(std::sqrt(1 - std::pow(adam.beta2, t)));
  const T b1 = static_cast<T>(1 - adam.beta1), b2 = static_cast<T>(adam.beta2),
          b2c = static_cast<T>(1 - adam.beta2);
  const T eps = static_cast<T>(adam.eps);
  for (i64 k = 0; k < c; ++k)
    for (i64 p = 0; p < pixels; ++p) {
      const i64 i = k * pixels + p;
      const T g = gradient[p * c + k];
      m[i] += b1 * (g - m[i]);
      v[i] = b2 * v[i] + b2c * g * g;
      x[i] -= step * (m[i] / (std::sqrt(v[i]) / root + eps));
    }
}

// What comes from Python, and is written: see match_steps in fastphi/engine/cpu/runner.py.
struct MatchTensors {
  const Tensor &x, &m, &v, &losses, &updates, &active, &target, &weight;

  void check(i64 c, i64 start, i64 steps) const {
    const i64 n = x.sizes()[0];
    check_shape(m, "m", shape_of(x), &x);
    check_shape(v, "v", shape_of(x), &x);
    check_tensor(losses, "losses", 2, &x);
    const i64 max_iter = losses.sizes()[0] - 1;
    check_shape(losses, "losses", {max_iter + 1, n}, &x);
    check_shape(target, "target", {n, c}, &x);
    check_shape(weight, "weight", {c}, &x);
    fastphi::check(updates, "updates", Device::CPU, x, {ScalarType::Long}, {n});
    fastphi::check(active, "active", Device::CPU, x, {ScalarType::Bool}, {n});
    STD_TORCH_CHECK(
        0 <= start && 0 <= steps && start <= max_iter + 1 && steps <= max_iter + 1 - start,
        "start, steps: expected a part of the ", max_iter + 1, " rows of losses, got ", start, ", ",
        steps);
  }
};

// The state of Algorithm 2 on a batch.
template <class T>
struct Match {
  Match(const MatchTensors& t, double tolerance)
      : n(t.x.sizes()[0]),
        image_channels(t.x.sizes()[1]),
        pixels(t.x.sizes()[2] * t.x.sizes()[3]),
        c(t.weight.numel()),
        x(mutable_data<T>(t.x)),
        m(mutable_data<T>(t.m)),
        v(mutable_data<T>(t.v)),
        losses(mutable_data<T>(t.losses)),
        updates(mutable_data<i64>(t.updates)),
        active(mutable_data<bool>(t.active)),
        target(data<T>(t.target)),
        weight(data<T>(t.weight)),
        tolerance(tolerance),
        max_iter(t.losses.sizes()[0] - 1) {}

  // Iterations [start, start + steps) of what is left, `chunk` images at a time; fewer where Ctrl-C
  // was pressed. Returns the one to go on with.
  template <class Encoder>
  i64 run(i64 start, i64 steps, i64 chunk, Encoder& encoder, const Adam& adam) {
    const Interrupt interrupt;
    const i64 end = std::min(start + steps, max_iter + 1);
    Buffer<T> phi(chunk * c);
    for (i64 t = start; t < end; ++t) {
      if (interrupt.seen()) return t;
      std::vector<i64> left;
      for (i64 i = 0; i < n; ++i)
        if (active[i]) left.push_back(i);
      if (left.empty()) break;
      const i64 count = static_cast<i64>(left.size());
      for (i64 i = 0; i < count; i += chunk)
        step(t, left.data() + i, std::min(chunk, count - i), encoder, adam, phi);
    }
    return end;
  }

 private:
  i64 n, image_channels, pixels, c;
  T *x, *m, *v;     // (N, C, H, W)
  T* losses;        // (max_iter + 1, N)
  i64* updates;     // (N,)
  bool* active;     // (N,)
  const T* target;  // (N, c)
  const T* weight;  // (c,)
  double tolerance;
  i64 max_iter;

  i64 size() const { return image_channels * pixels; }

  // L_i(x) into row t and the image's further part in it; phi becomes d_phi. phi: (c,)
  void judge(i64 t, i64 i, T* phi) {
    double loss = 0;
    for (i64 k = 0; k < c; ++k) {
      const double d = static_cast<double>(phi[k]) - target[i * c + k];
      loss += weight[k] * d * d;
      phi[k] = static_cast<T>(2 * weight[k] * d);
    }
    losses[t * n + i] = static_cast<T>(loss);
    const bool stop = tolerance > 0 && losses[t * n + i] <= tolerance * losses[i];
    active[i] = !stop && t < max_iter;
  }

  // Iteration t of the k images `which`, all of them active.
  template <class Encoder>
  void step(i64 t, const i64* which, i64 k, Encoder& encoder, const Adam& adam, T* phi) {
    for (i64 j = 0; j < k; ++j)
      image_to_nhwc(x + which[j] * size(), image_channels, pixels, encoder.image(j));
    encoder.forward(k, phi);
    bool any = false;
    for (i64 j = 0; j < k; ++j) {
      judge(t, which[j], phi + j * c);
      any = any || active[which[j]];
    }
    if (!any) return;
    encoder.backward(k, phi);
    parallel(k, 20 * size(), [&](i64 begin, i64 end) {
      for (i64 j = begin; j < end; ++j) {
        const i64 i = which[j], at = i * size();
        if (!active[i]) continue;
        adam_step(adam, t + 1, image_channels, pixels, encoder.image(j), x + at, m + at, v + at);
        updates[i] = t + 1;
      }
    });
  }
};

}  // namespace
}  // namespace fastphi
