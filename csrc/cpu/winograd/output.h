// winograd_output: the products, A^T m A, and the epilogue of a layer or of a gradient on the 4x4
// pixels in registers. Included by isa/body.h inside an
// anonymous namespace, after winograd/kernel.h.

// The state of an epilogue over a strip: lane-wise statistics, sums and dots of a panel.
struct StripState {
  FVec mean[2] = {}, m2[2] = {}, sum[2] = {}, dot[2] = {};
  float count = 0;  // pixels so far
};

// One vector of channels of a panel in the epilogue of one tile.
struct TileOut {
  i64 pixel, channel, lanes;  // of the tile's first pixel; first channel; channels that count
  i64 vh, vw;                 // pixels of the tile that lie in the image
  FVec scale, bias, gamma;
};

// f(i) for those of the 16 pixels that lie in the image; FULL: all do.
template <bool FULL, class F>
inline void for_pixels(const TileOut& t, const F& f) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (FULL || (i / 4 < t.vh && i % 4 < t.vw)) f(i);
}

// Adds the statistics of a tile to those of the strip, lane by lane (Chan's update).
template <bool FULL>
inline void add_statistics(const FVec* z, const TileOut& t, float before, FVec& mean, FVec& m2) {
  const float pixels = FULL ? 16.0f : static_cast<float>(t.vh * t.vw);
  FVec sum[2] = {}, squares[2] = {};  // two chains each: an addition takes four cycles
  for_pixels<FULL>(t, [&](int i) { sum[i % 2] += z[i]; });
  const FVec here = (sum[0] + sum[1]) * (1.0f / pixels);
  for_pixels<FULL>(t, [&](int i) {
    const FVec d = z[i] - here;
    squares[i % 2] += d * d;
  });
  const FVec delta = here - mean;
  mean += delta * (pixels / (before + pixels));
  m2 += (squares[0] + squares[1]) + (delta * delta) * (before * pixels / (before + pixels));
}

template <bool FULL>
inline void pool_tile(const ConvJob<float>& job, const TileOut& t, const FVec* r) {
  const i64 c = job.cout, y = t.pixel / job.w, x = t.pixel % job.w;  // y: rows of all images
  float* const pool = job.pool + (y / 2 * (job.w / 2) + x / 2) * c + t.channel;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int y2 = i / 2, x2 = i % 2, k = y2 * 8 + x2 * 2;
    const FVec mean = ((r[k] + r[k + 1]) + (r[k + 4] + r[k + 5])) * 0.25f;
    if (FULL || (2 * y2 < t.vh && 2 * x2 < t.vw))
      store_lanes<FULL>(pool + (y2 * (job.w / 2) + x2) * c, mean, t.lanes);
  }
}

template <bool FULL>
inline void winograd_layer_epilogue(const ConvJob<float>& job, const TileOut& t, FVec* z, int j,
                                    StripState& state) {
  const i64 c = job.cout, line = job.w * c, at = t.pixel * c + t.channel;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) z[i] = t.scale * z[i] + t.bias;
  if (job.stats) add_statistics<FULL>(z, t, state.count, state.mean[j], state.m2[j]);
  if (job.z)
    for_pixels<FULL>(
        t, [&](int i) { store_lanes<FULL>(job.z + at + i / 4 * line + i % 4 * c, z[i], t.lanes); });
  if (job.relu) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) z[i] = relu(t.gamma * z[i]);
  } else if (job.gamma) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) z[i] *= t.gamma;
  }
  if (job.r_out)
    for_pixels<FULL>(t, [&](int i) {
      store_lanes<FULL>(job.r_out + at + i / 4 * line + i % 4 * c, z[i], t.lanes);
    });
  if (job.sums) for_pixels<FULL>(t, [&](int i) { state.sum[j] += z[i]; });
  if (job.pool) pool_tile<FULL>(job, t, z);
}

// r_out = out_scale * h, dot = sum h * dot_with, or of what it makes
template <bool FULL>
inline void winograd_dgrad_epilogue(const ConvJob<float>& job, const TileOut& t, FVec* h, int j,
                                    StripState& state) {
  const i64 c = job.cout, line = job.w * c, at = t.pixel * c + t.channel;
  FVec dot[2] = {};
  for_pixels<FULL>(t, [&](int i) {
    const i64 here = at + i / 4 * line + i % 4 * c;
    const FVec with = load_lanes<FULL>(job.dot_with + here, t.lanes);
    dot[i % 2] += h[i] * (job.dot_raw ? relu(t.gamma * with) : with);
    store_lanes<FULL>(job.r_out + here, t.scale * h[i], t.lanes);
  });
  state.dot[j] += dot[0] + dot[1];
}

template <bool FULL>
inline void winograd_tile_out(const ConvJob<float>& job, const TileOut& t, const float* m,
                              i64 m_pitch, int j, StripState& state) {
  FVec columns[24], z[16];
#pragma GCC unroll 6
  for (int x = 0; x < 6; ++x) {
    FVec in[6];
#pragma GCC unroll 6
    for (int y = 0; y < 6; ++y) in[y] = load(m + (y * 6 + x) * m_pitch);
    winograd_output_1d(in, 1, columns + x, 6);
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) winograd_output_1d(columns + y * 6, 1, z + y * 4, 1);
  if (job.dot_with)
    winograd_dgrad_epilogue<FULL>(job, t, z, j, state);
  else
    winograd_layer_epilogue<FULL>(job, t, z, j, state);
}

// What a strip leaves for the launcher: one mean and M2 per panel, sums per channel, one dot.
inline void finish_strip(const ConvJob<float>& job, i64 strip, i64 index, const Panel<float>& panel,
                         const StripState& state) {
  const i64 unit = strip * job.panels + index;
  if (job.stats) {
    float mean = 0, m2 = 0;
    for (i64 i = 0; i < panel.width; ++i) mean += state.mean[i / FLANES][i % FLANES];
    mean /= static_cast<float>(panel.width);
    for (i64 i = 0; i < panel.width; ++i) {
      const float d = state.mean[i / FLANES][i % FLANES] - mean;
      m2 += state.m2[i / FLANES][i % FLANES] + state.count * d * d;
    }
    job.stats[2 * unit] = mean, job.stats[2 * unit + 1] = m2;
  }
  if (job.dots) {
    float dot = 0;
    for (i64 i = 0; i < panel.width; ++i) dot += state.dot[i / FLANES][i % FLANES];
    job.dots[unit] = dot;
  }
  if (job.sums)
    for (i64 j = 0; j < panel.nv; ++j)
      store_lanes<false>(job.sums + strip * job.cout + panel.start + j * FLANES, state.sum[j],
                         min_of(FLANES, panel.width - j * FLANES));
}

// Memory on its way to the second-level cache, a few lines at each call; every other one is asked
// for, its neighbour comes along.
class Fetch {
 public:
  // `size` numbers from `from` on, in about `calls` calls
  void begin(const float* from, i64 size, i64 calls) {
    at_ = from, end_ = from + size, each_ = (size / LINE + calls - 1) / calls * LINE;
  }
  void operator()() {
    for (const float* to = at_ + each_; at_ < to && at_ < end_; at_ += LINE)
      __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr i64 LINE = 32;
  const float *at_ = nullptr, *end_ = nullptr;
  i64 each_ = 0;
};

// A panel's channels of the pixels of some rows, on their way likewise.
class FetchPanel {
 public:
  void begin(const float* from, i64 pixels, i64 c, i64 calls) {
    at_ = from, left_ = pixels, c_ = c, each_ = (pixels + calls - 1) / calls;
  }
  void operator()() {
    for (i64 i = min_of(each_, left_); i > 0; --i, --left_, at_ += c_) {
      __builtin_prefetch(at_, 0, 2);
      if (FLANES > 8) __builtin_prefetch(at_ + FLANES, 0, 2);  // a panel is two lines
    }
  }

 private:
  const float* at_ = nullptr;
  i64 left_ = 0, c_ = 0, each_ = 0;
};

// What a panel's epilogue will write or read, beside its products, and what the next strips' input
// will, beside all panels': lines that the nearest caches do not have, each of which would be
// waited for then.
class FetchPixels {
 public:
  // calls: of a panel
  FetchPixels(const ConvJob<float>& job, i64 first, i64 last, i64 calls)
      : job_(job),
        strips_(job.h, job.w),
        start_(pixel(first)),
        pixels_(pixel(last) - start_),
        calls_(calls) {
    const i64 next = min_of(2 * last - first, job.n * strips_.per_image);
    for (int s = 0; s < job.sources; ++s) add(job.source[s].r, last, next, job.source[s].channels);
    if (job.grad &&
        (job.grad->spread == Spread::PIXEL || job.grad->spread == Spread::PIXEL_AND_POOL))
      add(job.grad->d, last, next, job.source[0].channels);
  }
  void panel(i64 index) {
    const i64 at = start_ * job_.cout + index * 2 * FLANES;
    const float* const images[] = {job_.r_out, job_.z, job_.dot_with};
    for (int i = 0; i < 3; ++i)
      now_[i].begin(images[i] + (images[i] ? at : 0), images[i] ? pixels_ : 0, job_.cout, calls_);
  }
  void operator()() {
    for (FetchPanel& fetch : now_) fetch();
    for (int i = 0; i < count_; ++i) next_[i]();
  }

 private:
  // The first pixel of a strip's rows, of all images
  i64 pixel(i64 strip) const {
    return (strip / strips_.per_image * strips_.h + strips_.y(strip)) * strips_.w;
  }
  void add(const float* image, i64 first, i64 last, i64 c) {
    if (!image || first == last) return;
    const i64 start = pixel(first);
    next_[count_++].begin(image + start * c, (pixel(last) - start) * c, calls_ * job_.panels);
  }

  const ConvJob<float>& job_;
  const Strips strips_;
  const i64 start_, pixels_, calls_;
  FetchPanel now_[3];
  Fetch next_[3];
  int count_ = 0;
};

// The products of one point and panel: m[tile * m_stride + j]. Meanwhile the weights that come
// next, `ahead`, are fetched; beside() is called after each register tile.
template <class Beside>
inline void winograd_products(const float* v, i64 depth, i64 k, i64 tiles, const float* weights,
                              const float* ahead, const Panel<float>& panel, float* m, i64 m_stride,
                              Beside& beside) {
  const Split split(tiles);
  const i64 step = (panel.lanes + split.count - 1) / split.count;
  for (i64 i = 0; i < split.count; ++i, ahead += k * step) {
    const i64 t0 = split.start(i), p = split.start(i + 1) - t0;
    with_size<BLOCK>(p, panel.nv,
                     TileCall<float>{v + t0 * depth, depth, 1, 0, k, weights, m + t0 * m_stride,
                                     m_stride, 1.0f, false, ahead, step});
    beside();
  }
}

// A panel's products of strips [first, last), m[(tile * 36 + point) * lanes + j]: back, epilogue.
void winograd_finish(const ConvJob<float>& job, i64 first, i64 last, i64 index, const float* m) {
  const Strips strips(job.h, job.w);
  const Panel<float> panel(index, job.cout);
  FVec bias[2], gamma[2];
  load_parameter(job.bias, panel, 0.0f, bias);
  load_parameter(job.gamma, panel, 1.0f, gamma);
  for (i64 strip = first; strip < last; ++strip) {
    const i64 n = strip / strips.per_image, y = strips.y(strip);
    const float* scales = job.out_scale      ? job.out_scale
                          : job.sources == 1 ? job.source[0].scale
                                             : nullptr;
    const FVec scale = splat(scales ? scales[n] : 1.0f);
    const i64 vh = min_of(WINO_TILE, job.h - y);
    StripState state;
    for (i64 tile = 0; tile < strips.tiles(strip); ++tile, m += WINO_POINTS * panel.lanes) {
      const i64 x = strips.x(strip) + WINO_TILE * tile, vw = min_of(WINO_TILE, job.w - x);
      for (int j = 0; j < panel.nv; ++j) {
        const i64 lanes = min_of(FLANES, panel.width - j * FLANES);
        const TileOut t = {(n * job.h + y) * job.w + x,
                           panel.start + j * FLANES,
                           lanes,
                           vh,
                           vw,
                           scale,
                           bias[j],
                           gamma[j]};
        if (vh * vw == 16 && lanes == FLANES)
          winograd_tile_out<true>(job, t, m + j * FLANES, panel.lanes, j, state);
        else
          winograd_tile_out<false>(job, t, m + j * FLANES, panel.lanes, j, state);
      }
      state.count += static_cast<float>(vh * vw);
    }
    finish_strip(job, strip, index, panel, state);
  }
}

// Panels [begin, end) of the `tiles` tiles that v holds: m[(panel, tile, point, lanes)]. The panels
// take turns at each point, whose v stays in the nearest cache.
template <class Beside>
inline void winograd_multiply(const ConvJob<float>& job, const WinogradPart& part, i64 begin,
                              i64 end, Beside& beside) {
  i64 k = 0;
  for (int s = 0; s < job.sources; ++s) k += job.source[s].channels;
  const auto weights = [&](i64 index, i64 point) {
    const Panel<float> panel(index, job.cout);
    return job.winograd + (panel.start * WINO_POINTS + point * panel.lanes) * k;
  };
  for (i64 point = 0; point < WINO_POINTS; ++point) {
    beside.at(point);
    for (i64 index = begin; index < end; ++index) {
      const Panel<float> panel(index, job.cout);
      const float* ahead =
          index + 1 < end ? weights(index + 1, point) : weights(begin, (point + 1) % WINO_POINTS);
      winograd_products(
          part.v + point * part.pitch, part.depth, k, part.tiles, weights(index, point), ahead,
          panel,
          part.m + (index - begin) * part.tiles * WINO_POINTS * 2 * FLANES + point * panel.lanes,
          WINO_POINTS * panel.lanes, beside);
    }
  }
}

// Beside the products of a part whose panels share each point: its v is large, or another core has
// written it, and the next point's is fetched.
struct BesideShared {
  const WinogradPart& part;
  i64 calls;  // of a point
  Fetch next = {};
  void at(i64 point) {
    if (point + 1 < WINO_POINTS)
      next.begin(part.v + (point + 1) * part.pitch, part.tiles * part.depth, calls);
  }
  void operator()() { next(); }
};

// Beside those of a part whose panels come one after the other.
struct BesideApart {
  FetchPixels fetch;
  void at(i64) {}
  void operator()() { fetch(); }
};

// Weights that few tiles share, transformed some channels at a time where they are used: written
// beyond the second-level cache and read again they would cost more than their products.
void winograd_output_fresh(const ConvJob<float>& job, const WinogradPart& part) {
  const Split split(part.tiles);
  i64 channels = 0;
  for (int s = 0; s < job.sources; ++s) channels += job.source[s].channels;
  for (i64 index = part.begin; index < part.end; ++index) {
    const Panel<float> panel(index, job.cout);
    for (i64 c = 0; c < channels; c += FRESH) {
      const i64 k = min_of(FRESH, channels - c);
      WeightStrides at = job.at;
      at.first += c * at.channel;
      winograd_pack(job.winograd, job.cout, k, at, index, index + 1,
                    part.packed - panel.start * WINO_POINTS * k);
      for (i64 point = 0; point < WINO_POINTS; ++point)
        for (i64 i = 0; i < split.count; ++i) {
          const i64 t0 = split.start(i), p = split.start(i + 1) - t0;
          TileCall<float> call{part.v + point * part.pitch + t0 * part.depth + c,
                               part.depth,
                               1,
                               0,
                               k,
                               part.packed + point * k * panel.lanes,
                               part.m + (t0 * WINO_POINTS + point) * panel.lanes,
                               WINO_POINTS * panel.lanes,
                               1.0f,
                               false};
          call.on = c > 0;
          with_size<BLOCK>(p, panel.nv, call);
        }
    }
    winograd_finish(job, part.first, part.last, index, part.m);
  }
}

// Strips [first, last), whose tiles v holds, and panels [begin, end), `group` of them at a time:
// products, back, epilogue.
void winograd_output(const ConvJob<float>& job, const WinogradPart& part) {
  if (job.fresh) return winograd_output_fresh(job, part);
  const i64 calls = WINO_POINTS * Split(part.tiles).count;
  BesideApart apart{{job, part.first, part.last, calls}};
  for (i64 begin = part.begin; begin < part.end; begin += part.group) {
    const i64 end = min_of(part.end, begin + part.group);
    if (part.group > 1) {
      BesideShared shared{part, calls / WINO_POINTS * (end - begin)};
      winograd_multiply(job, part, begin, end, shared);
    } else {
      apart.fetch.panel(begin);
      winograd_multiply(job, part, begin, end, apart);
    }
    for (i64 index = begin; index < end; ++index)
      winograd_finish(job, part.first, part.last, index,
                      part.m + (index - begin) * part.tiles * WINO_POINTS * 2 * FLANES);
  }
}
