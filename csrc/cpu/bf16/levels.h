// What lies between the layers: up-sampling, pooling; and the last layer. Included by bf16/amx.cpp.

void image(const Bf16Image& job, i64 begin, i64 end) {
  alignas(64) float products[BF16_UNIT * 16];
  const Tiles tiles;
  const Taps taps(job.plane);
  const Bf16Plane& plane = job.plane;
  const i64 units = bf16_units(plane), stride = plane.block * BF16_BLOCK, c = job.channels;
  for (i64 i = begin; i < end; ++i) {
    const i64 n = i / units, start = i % units * BF16_UNIT;
    Walk at(plane, start);
    const bf16* a = job.source.r + n * job.source.blocks * stride + at.m * BF16_BLOCK;
    tile_16({a, second_tile(plane, at)}, taps.at, 9, job.source.blocks, stride, job.packed,
            products);
    float* out = job.out + n * c * plane.h * plane.w;
    const float s = job.source.scale[n];
    const i64 count = min_of(BF16_UNIT, plane.positions - start);
    for (const float* p = products; p < products + count * 16; p += 16, at.step(plane))
      if (at.x < plane.w)
        for (i64 k = 0; k < c; ++k)
          out[(at.row(plane) * plane.w + at.x) * job.pixel + k * job.channel] =
              s * (p[k] + p[c + k]) + job.bias[k];
  }
}

class UpsampleEpilogue {
 public:
  struct Unit {
    i64 n, tap, panel, unit;
    const float* products;  // (32, 32)
  };
  explicit UpsampleEpilogue(const Bf16Upsample& job)
      : job_(job), plain_(job.plane.aligned && job.plane.fold == 1 && job.to.fold == 1) {}

  void begin(const Unit& unit) {
    const i64 start = unit.unit * BF16_UNIT, panel = unit.panel * BF16_BLOCK;
    at_ = Walk(job_.plane, start), left_ = min_of(BF16_UNIT, job_.plane.positions - start);
    tap_ = unit.tap, next_ = unit.products;
    block_ = job_.out + (unit.n * job_.panels + unit.panel) * job_.to.block * BF16_BLOCK;
    s_ = _mm512_set1_ps(job_.bias ? job_.source.scale[unit.n] : 1);
    for (int v = 0; v < 2; ++v)
      bias_[v] = job_.bias ? _mm512_loadu_ps(job_.bias + panel + v * 16) : _mm512_setzero_ps();
  }
  bool done() const { return left_ == 0; }
  void rows(i64 count) {
    count = min_of(count, left_), left_ -= count;
    if (plain_) return plain(count);
    const Bf16Plane plane = job_.plane, to = job_.to;
    for (; count > 0; --count, at_.step(plane), next_ += BF16_BLOCK) {
      if (at_.x == plane.w) continue;
      put(to, block_, pixel(to, 2 * at_.row(plane) + tap_ / 2, 2 * at_.x + tap_ % 2), value(next_));
    }
  }
  void finish() const {}

 private:
  __m512i value(const float* p) const {
    return to_bf16(_mm512_fmadd_ps(s_, _mm512_load_ps(p), bias_[0]),
                   _mm512_fmadd_ps(s_, _mm512_load_ps(p + 16), bias_[1]));
  }
  // Neither image is folded, and no positions lie between rows: as above, one after the other.
  void plain(i64 count) {
    const i64 w = job_.plane.w, pitch = job_.to.pitch;
    const float* p = next_;
    i64 x = at_.x;
    bf16* to = block_ + ((2 * at_.y + tap_ / 2 + 1) * pitch + 2 * x + tap_ % 2 + 1) * BF16_BLOCK;
    for (; count > 0; --count, p += BF16_BLOCK, to += 2 * BF16_BLOCK) {
      _mm512_storeu_si512(to, value(p));
      if (++x < w) continue;
      if (tap_ % 2) _mm512_storeu_si512(to + BF16_BLOCK, _mm512_setzero_si512());
      x = 0, ++at_.y, to += 2 * (pitch - w) * BF16_BLOCK;
    }
    at_.x = x, next_ = p;
  }

  const Bf16Upsample& job_;
  const bool plain_;
  Walk at_;
  i64 left_, tap_;
  const float* next_;
  bf16* block_;
  __m512 s_, bias_[2];
};

void upsample(const Bf16Upsample& job, i64 begin, i64 end) {
  alignas(64) float products[2][PRODUCTS + ASIDE];
  Tiles tiles;
  const i64 units = bf16_units(job.plane), stride = job.plane.block * BF16_BLOCK;
  const i64 centre = inside(job.plane), blocks = job.source.blocks;
  const i64 taps = blocks <= 4 ? 4 : blocks <= 8 ? 2 : 1;  // whose weights fit together
  Later<UpsampleEpilogue> later(job);
  for (i64 i = begin; i < end; ++i) {
    const i64 unit = i / taps % units, n = i / taps / units % job.n;
    const i64 group = i / taps / units / job.n, panel = group * taps / 4;
    const i64 tap = group * taps % 4 + i % taps;
    const bf16* image = job.source.r + n * blocks * stride;
    const Walk at(job.plane, unit * BF16_UNIT);
    tiles.multiply({image + at.m * BF16_BLOCK, second_tile(job.plane, at)}, &centre, 1, blocks,
                   stride, job.packed + (tap * job.panels + panel) * blocks * BF16_PAIRED, unit % 2,
                   products[i % 2], later);
    later.flush();
    later.add({n, tap, panel, unit, products[i % 2]}, blocks);
  }
  tiles.store();
  later.flush();
}

// 32 channels of two pixels side by side, added to (channels 0-3, 8-11, ...; 4-7, 12-15, ...)
inline void add_pair(const bf16* left, const bf16* right, __m512 sums[2]) {
  const __m512bh quarters = (__m512bh)_mm512_set1_epi16(0x3e80);
  const __m512i a = _mm512_loadu_si512(left), b = _mm512_loadu_si512(right);
  sums[0] = _mm512_dpbf16_ps(sums[0], (__m512bh)_mm512_unpacklo_epi16(a, b), quarters);
  sums[1] = _mm512_dpbf16_ps(sums[1], (__m512bh)_mm512_unpackhi_epi16(a, b), quarters);
}

void pool(const Bf16Pool& job, i64 begin, i64 end) {
  const Bf16Plane plane = job.plane, to = job.to;
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  for (i64 i = begin; i < end; ++i) {
    const bf16* from = job.r + i * plane.block * BF16_BLOCK + inside(plane);
    bf16* block = job.out + i * to.block * BF16_BLOCK;
    for (i64 y = 0; y < to.h; ++y) {
      const bf16 *top = from + pixel(plane, 2 * y, 0).m * BF16_BLOCK,
                 *bottom = from + pixel(plane, 2 * y + 1, 0).m * BF16_BLOCK;
      const i64 pace = plane.fold * BF16_BLOCK;
      Position at = pixel(to, y, 0);
      for (; at.x < to.w; ++at.x, at.m += to.fold, top += 2 * pace, bottom += 2 * pace) {
        __m512 sums[2] = {};
        add_pair(top, top + pace, sums);
        add_pair(bottom, bottom + pace, sums);
        put(to, block, at, _mm512_permutexvar_epi64(order, to_bf16(sums[0], sums[1])));
      }
    }
  }
}
