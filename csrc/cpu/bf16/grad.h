// The gradient to the input, as csrc/README.md derives it. Included by bf16/amx.cpp.

class DgradEpilogue {
 public:
  struct Unit {
    i64 n, panel, unit;
    const float* products;  // h (32, 32)
  };
  explicit DgradEpilogue(const Bf16Dgrad& job) : job_(job), plane_(job.plane) {}

  void begin(const Unit& unit) {
    unit_ = unit;
    at_ = Walk(plane_, unit.unit * BF16_UNIT);
    left_ = min_of(BF16_UNIT, plane_.positions - unit.unit * BF16_UNIT);
    block_ = (unit.n * job_.panels + unit.panel) * plane_.block * BF16_BLOCK + inside(plane_);
    next_ = unit.products;
    scale_ = _mm512_set1_ps(job_.source.scale[unit.n]);
    dot_ = _mm512_setzero_ps();
  }
  bool done() const { return left_ == 0; }
  void rows(i64 count) {
    count = min_of(count, left_), left_ -= count;
    for (; count > 0; --count, at_.step(plane_), next_ += BF16_BLOCK) {
      if (at_.x == plane_.w) continue;
      const i64 at = block_ + at_.m * BF16_BLOCK;
      const __m512 low = _mm512_load_ps(next_), high = _mm512_load_ps(next_ + 16);
      dot_ = _mm512_fmadd_ps(low, load_bf16(job_.r + at), dot_);
      dot_ = _mm512_fmadd_ps(high, load_bf16(job_.r + at + 16), dot_);
      _mm512_storeu_si512(job_.d_r + at,
                          to_bf16(_mm512_mul_ps(scale_, low), _mm512_mul_ps(scale_, high)));
    }
  }
  void finish() const {
    job_.dots[(unit_.n * job_.panels + unit_.panel) * bf16_units(plane_) + unit_.unit] =
        _mm512_reduce_add_ps(dot_);
  }

 private:
  const Bf16Dgrad& job_;
  const Bf16Plane plane_;
  Unit unit_;
  Walk at_;
  i64 left_, block_;
  const float* next_;
  __m512 scale_, dot_;
};

void dgrad(const Bf16Dgrad& job, i64 begin, i64 end) {
  alignas(64) float products[2][PRODUCTS + ASIDE];
  Tiles tiles;
  const Taps taps(job.plane);
  const i64 units = bf16_units(job.plane), stride = job.plane.block * BF16_BLOCK;
  const i64 blocks = job.source.blocks, weights = blocks * 9 * BF16_PAIRED;  // of a panel
  Later<DgradEpilogue> later(job);
  Ahead ahead;
  auto beside = [&] { ahead(), later(); };
  int turn = 0;
  for (i64 panel = 0; panel < job.panels; ++panel) {
    const bf16* b = job.packed + panel * weights;
    if (panel + 1 < job.panels) ahead.begin(b + weights, weights * sizeof(bf16), end - begin);
    for (i64 i = begin; i < end; ++i, turn ^= 1) {
      const i64 n = i / units, unit = i % units;
      const Walk at(job.plane, unit * BF16_UNIT);
      tiles.multiply(
          {job.source.r + n * blocks * stride + at.m * BF16_BLOCK, second_tile(job.plane, at)},
          taps.at, 9, blocks, stride, b, unit % 2, products[turn], beside);
      later.flush();
      later.add({n, panel, unit, products[turn]}, blocks * 9);
    }
  }
  tiles.store();
  later.flush();
}

void grad_input(const Bf16GradInput& job, i64 begin, i64 end) {
  const Bf16Plane &plane = job.plane, &from = job.d_plane;
  const __m512 zero = _mm512_setzero_ps();
  for (i64 i = begin; i < end; ++i) {
    const i64 n = i / job.blocks, block = i % job.blocks;
    const bf16* z = job.z + i * plane.block * BF16_BLOCK + inside(plane);
    const bf16* d = job.d ? job.d + i * from.block * BF16_BLOCK + inside(from) : nullptr;
    bf16* dz = job.dz + i * plane.block * BF16_BLOCK;
    const __m512 mean = _mm512_set1_ps(job.mean[n]);
    const __m512 coefficient = _mm512_set1_ps(job.coefficient ? job.coefficient[n] : 0);
    const __m512 share = _mm512_set1_ps(job.spread == Spread::POOL ? 0.25f : 1.0f);
    __m512 gamma[2], own[2], out[2];
    for (int v = 0; v < 2; ++v) {
      const i64 channel = block * BF16_BLOCK + v * 16;
      gamma[v] = job.gamma ? _mm512_loadu_ps(job.gamma + channel) : _mm512_set1_ps(1);
      own[v] = d ? zero : _mm512_loadu_ps(job.d_image + i * BF16_BLOCK + v * 16);
    }
    for (i64 y = 0; y < plane.h; ++y)
      for (Position to = pixel(plane, y, 0); to.x < plane.w; ++to.x, to.m += plane.fold) {
        const i64 m = to.m;
        const i64 at =
            (job.spread == Spread::POOL ? pixel(from, y / 2, to.x / 2).m : m) * BF16_BLOCK;
        for (int v = 0; v < 2; ++v) {
          const __m512 zv = load_bf16(z + m * BF16_BLOCK + v * 16);
          const __m512 dv = d ? _mm512_mul_ps(share, load_bf16(d + at + v * 16)) : own[v];
          const __mmask16 passes =
              _mm512_cmp_ps_mask(_mm512_mul_ps(gamma[v], zv), zero, _CMP_GT_OQ);
          out[v] = _mm512_maskz_mul_ps(passes, gamma[v], dv);
          if (job.coefficient)
            out[v] = _mm512_fmadd_ps(coefficient, _mm512_sub_ps(zv, mean), out[v]);
        }
        put(plane, dz, to, to_bf16(out[0], out[1]));
      }
  }
}
