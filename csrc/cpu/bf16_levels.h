// What lies between the layers: up-sampling, pooling; and the last layer. Included by bf16_body.h.

void image(const Bf16Image& job, i64 begin, i64 end) {
  alignas(64) float products[BF16_UNIT * 16];
  const Tiles tiles;
  const Taps taps(job.plane);
  const Bf16Plane& plane = job.plane;
  const i64 units = bf16_units(plane), stride = plane.block * BF16_BLOCK, c = job.channels;
  for (i64 i = begin; i < end; ++i) {
    const i64 n = i / units, start = i % units * BF16_UNIT;
    const bf16* a = job.source.r + n * job.source.blocks * stride + start * BF16_BLOCK;
    tile_16(a, taps.at, 9, job.source.blocks, stride, job.packed, products);
    float* out = job.out + n * c * plane.h * plane.w;
    const float s = job.source.scale[n];
    const float* p = products;
    for (Pixel at(plane, start); at.m < min_of(start + BF16_UNIT, plane.positions); ++at, p += 16)
      if (at.x < plane.w)
        for (i64 k = 0; k < c; ++k)
          out[(at.y * plane.w + at.x) * job.pixel + k * job.channel] =
              s * (p[k] + p[c + k]) + job.bias[k];
  }
}

class UpsampleEpilogue {
 public:
  struct Unit {
    i64 n, tap, panel, unit;
    const float* products;  // (32, 32)
  };
  explicit UpsampleEpilogue(const Bf16Upsample& job) : job_(job), at_(job.plane, 0) {}

  void begin(const Unit& unit) {
    const i64 start = unit.unit * BF16_UNIT, panel = unit.panel * BF16_BLOCK;
    at_ = Pixel(job_.plane, start), end_ = min_of(start + BF16_UNIT, job_.plane.positions);
    tap_ = unit.tap, next_ = unit.products;
    block_ = job_.out + (unit.n * job_.panels + unit.panel) * job_.to.block * BF16_BLOCK;
    s_ = _mm512_set1_ps(job_.bias ? job_.source.scale[unit.n] : 1);
    for (int v = 0; v < 2; ++v)
      bias_[v] = job_.bias ? _mm512_loadu_ps(job_.bias + panel + v * 16) : _mm512_setzero_ps();
  }
  bool done() const { return at_.m == end_; }
  void rows(i64 count) {
    for (const i64 end = min_of(at_.m + count, end_); at_.m < end; ++at_, next_ += BF16_BLOCK) {
      if (at_.x >= job_.plane.w) continue;
      const i64 x = 2 * at_.x + tap_ % 2, m = (2 * at_.y + tap_ / 2) * job_.to.pitch + x;
      put(job_.to, block_, m, x,
          to_bf16(_mm512_fmadd_ps(s_, _mm512_load_ps(next_), bias_[0]),
                  _mm512_fmadd_ps(s_, _mm512_load_ps(next_ + 16), bias_[1])));
    }
  }
  void finish() const {}

 private:
  const Bf16Upsample& job_;
  Pixel at_;
  i64 end_, tap_;
  const float* next_;
  bf16* block_;
  __m512 s_, bias_[2];
};

void upsample(const Bf16Upsample& job, i64 begin, i64 end) {
  alignas(64) float products[2][PRODUCTS];
  Tiles tiles;
  const i64 units = bf16_units(job.plane), stride = job.plane.block * BF16_BLOCK;
  const i64 centre = inside(job.plane), blocks = job.source.blocks;
  Later<UpsampleEpilogue> later(job);
  for (i64 i = begin; i < end; ++i) {
    const i64 unit = i % units, tap = i / units % 4, panel = i / units / 4 % job.panels;
    const i64 n = i / units / 4 / job.panels;
    const bf16* image = job.source.r + n * blocks * stride;
    const Operand operand{image + unit * BF16_UNIT * BF16_BLOCK, products[i % 2]};
    later.expect(blocks);
    tiles.multiply(&operand, 1, &centre, 1, blocks, stride,
                   job.packed + (tap * job.panels + panel) * blocks * BF16_PAIRED, later);
    later.flush();
    const UpsampleEpilogue::Unit done{n, tap, panel, unit, products[i % 2]};
    later.add(&done, 1);
  }
  tiles.store();
  later.flush();
}

void pool(const Bf16Pool& job, i64 begin, i64 end) {
  const Bf16Plane &plane = job.plane, &to = job.to;
  const __m512 quarter = _mm512_set1_ps(0.25f);
  for (i64 i = begin; i < end; ++i) {
    const bf16* from = job.r + i * plane.block * BF16_BLOCK + inside(plane);
    bf16* block = job.out + i * to.block * BF16_BLOCK;
    for (i64 y = 0; y < to.h; ++y)
      for (i64 x = 0; x < to.w; ++x) {
        const bf16* p = from + (2 * y * plane.pitch + 2 * x) * BF16_BLOCK;
        __m512 mean[2];
        for (int v = 0; v < 2; ++v) {
          auto at = [&](i64 k) { return load_bf16(p + k * BF16_BLOCK + v * 16); };
          const __m512 top = _mm512_add_ps(at(0), at(1)),
                       bottom = _mm512_add_ps(at(plane.pitch), at(plane.pitch + 1));
          mean[v] = _mm512_mul_ps(quarter, _mm512_add_ps(top, bottom));
        }
        put(to, block, y * to.pitch + x, x, to_bf16(mean[0], mean[1]));
      }
  }
}
