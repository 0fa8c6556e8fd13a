// The layer: epilogues beside products, and the first layer. Included by bf16_body.h.

// Sum and sum of squares of a unit's z, per lane, of differences to the first value: nothing
// cancels, as it would with z itself.
struct Moments {
  __m512 first[2], sum[2], squares[2];
  void start(int v, __m512 z) { first[v] = z, sum[v] = squares[v] = _mm512_setzero_ps(); }
  void add(int v, __m512 z) {
    const __m512 d = _mm512_sub_ps(z, first[v]);
    sum[v] = _mm512_add_ps(sum[v], d);
    squares[v] = _mm512_fmadd_ps(d, d, squares[v]);
  }
  // (count, mean, M2) of `pixels` values in each of the first `width` lanes
  void finish(i64 pixels, i64 width, float* out) const {
    const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(pixels));
    const __mmask16 lanes[2] = {static_cast<__mmask16>((1 << min_of(width, 16)) - 1),
                                static_cast<__mmask16>((1 << (width > 16 ? width - 16 : 0)) - 1)};
    __m512 mean[2];
    float total = 0, m2 = 0;
    for (int v = 0; v < 2; ++v) {
      mean[v] = _mm512_fmadd_ps(sum[v], share, first[v]);
      total += _mm512_mask_reduce_add_ps(lanes[v], mean[v]);
    }
    const float centre = total / static_cast<float>(width);
    for (int v = 0; v < 2; ++v) {
      const __m512 d = _mm512_sub_ps(mean[v], _mm512_set1_ps(centre));
      const __m512 own = _mm512_fnmadd_ps(_mm512_mul_ps(sum[v], share), sum[v], squares[v]);
      const __m512 between = _mm512_mul_ps(_mm512_set1_ps(static_cast<float>(pixels)), d);
      m2 += _mm512_mask_reduce_add_ps(lanes[v], _mm512_fmadd_ps(between, d, own));
    }
    out[0] = static_cast<float>(pixels * width), out[1] = centre, out[2] = m2;
  }
};

// Units to multiply together: few weights stay in the first-level cache by themselves; of many, a
// block does.
inline i64 together(i64 blocks) { return blocks <= 2 ? 1 : blocks < 16 ? 2 : GROUP; }

// Epilogues of the units computed last, in slices beside the products of the next. An epilogue is
// begun with a unit and takes rows until it is done.
template <class Epilogue>
class Later {
 public:
  template <class Job>
  explicit Later(const Job& job) : epilogue_(job) {}

  void add(const typename Epilogue::Unit* units, int count) {
    for (int u = 0; u < count; ++u) units_[u] = units[u];
    next_ = 0, count_ = count, begun_ = false;
  }
  // `steps` calls of this object are to come
  void expect(i64 steps) { every_ = wait_ = count_ ? steps * SLICE / (count_ * BF16_UNIT) : steps; }
  void operator()() {
    if (--wait_ > 0) return;
    wait_ = every_;
    slice();
  }
  void flush() {
    while (next_ < count_) slice();
  }

 private:
  static constexpr i64 SLICE = 2;  // rows

  void slice() {
    if (next_ == count_) return;
    if (!begun_) epilogue_.begin(units_[next_]);
    epilogue_.rows(SLICE);
    begun_ = !epilogue_.done();
    if (begun_) return;
    epilogue_.finish();
    ++next_;
  }

  Epilogue epilogue_;
  typename Epilogue::Unit units_[GROUP];
  int next_ = 0, count_ = 0;
  bool begun_ = false;
  i64 every_ = 1, wait_ = 1;
};

// Products of one or two sources to r_out, statistics and sums, some rows at a time.
// MORE: z or sums are wanted, or r_out is not.
template <bool TWO, bool MORE>
class LayerEpilogue {
 public:
  struct Unit {
    i64 n, panel, unit;
    const float* products;  // (sources, 32, 32)
    float scale[2];
  };
  explicit LayerEpilogue(const Bf16Layer& job) : job_(job), plane_(job.plane) {}

  void begin(const Unit& unit) {
    unit_ = unit;
    const i64 panel = unit.panel * BF16_BLOCK;
    m_ = unit.unit * BF16_UNIT, end_ = min_of(m_ + BF16_UNIT, plane_.positions);
    x_ = m_ % plane_.pitch, pixels_ = 0;
    block_ = job_.r_out
                 ? job_.r_out + (unit.n * job_.panels + unit.panel) * plane_.block * BF16_BLOCK
                 : nullptr;
    z_ = job_.z ? job_.z + (unit.n * job_.panels + unit.panel) * plane_.block * BF16_BLOCK +
                      inside(plane_)
                : nullptr;
    next_ = unit.products;
    const float* first = x_ < plane_.w ? next_ : next_ + BF16_BLOCK;
    for (int v = 0; v < 2; ++v) {
      bias_[v] = _mm512_loadu_ps(job_.bias + panel + v * 16);
      gamma_[v] = job_.gamma ? _mm512_loadu_ps(job_.gamma + panel + v * 16) : _mm512_set1_ps(1);
      sums_[v] = _mm512_setzero_ps();
      moments_.start(v, z(first, v));
    }
  }

  bool done() const { return m_ == end_; }

  void rows(i64 count) {
    // in registers meanwhile
    Moments moments = moments_;
    __m512 sums[2] = {sums_[0], sums_[1]};
    i64 m = m_, x = x_;
    const float* p = next_;
    for (const i64 end = min_of(m + count, end_); m < end; ++m, ++x, p += BF16_BLOCK) {
      if (x == plane_.pitch) x = 0;
      if (x == plane_.w) continue;
      ++pixels_;
      __m512 of[2], r[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        of[v] = z(p, v);
        moments.add(v, of[v]);
        r[v] = relu(_mm512_mul_ps(gamma_[v], of[v]));
        if (MORE) sums[v] = _mm512_add_ps(sums[v], r[v]);
      }
      if (MORE && z_) _mm512_storeu_si512(z_ + m * BF16_BLOCK, to_bf16(of[0], of[1]));
      if (!MORE || block_) put(plane_, block_, m, x, to_bf16(r[0], r[1]));
    }
    moments_ = moments, sums_[0] = sums[0], sums_[1] = sums[1], m_ = m, x_ = x, next_ = p;
  }

  void finish() const {
    const i64 units = bf16_units(plane_), panels = job_.panels;
    const i64 n = unit_.n, panel = unit_.panel, unit = unit_.unit;
    if (job_.stats)
      moments_.finish(pixels_, min_of(job_.cout - panel * 32, 32),
                      job_.stats + ((n * panels + panel) * units + unit) * 3);
    if (MORE && job_.sums)
      for (int v = 0; v < 2; ++v)
        _mm512_storeu_ps(job_.sums + ((n * units + unit) * panels + panel) * 32 + v * 16, sums_[v]);
  }

 private:
  __m512 z(const float* p, int v) const {
    const __m512 z =
        _mm512_fmadd_ps(_mm512_set1_ps(unit_.scale[0]), _mm512_load_ps(p + v * 16), bias_[v]);
    if (!TWO) return z;
    return _mm512_fmadd_ps(_mm512_set1_ps(unit_.scale[1]), _mm512_load_ps(p + PRODUCTS + v * 16),
                           z);
  }

  const Bf16Layer& job_;
  const Bf16Plane plane_;
  Unit unit_;
  i64 m_, end_, x_, pixels_;
  bf16 *block_, *z_;
  const float* next_;
  __m512 bias_[2], gamma_[2], sums_[2];
  Moments moments_;
};

// A unit's 3x3 neighbourhoods, (block, 32 positions, 32), of one part of the images; ROWS of the
// kernel in a block.
template <int ROWS>
void first_patches(const Bf16Layer& job, const bf16* image, i64 unit, bf16* to) {
  const i64 c = job.image_channels, row = (job.plane.w + 2) * c, h = job.plane.h, w = job.plane.w;
  const __mmask32 own = ~__mmask32{0} >> (32 - 3 * c);
  for (i64 block = 0; block < 3 / ROWS; ++block) {
    Pixel at(job.plane, unit * BF16_UNIT);
    for (i64 p = 0; p < BF16_UNIT; ++p, ++at, to += BF16_BLOCK) {
      const bf16* from = image + (min_of(at.y, h - 1) + block) * row + min_of(at.x, w - 1) * c;
      // whole vectors, zeros beyond: what is too much is overwritten by the next
#pragma GCC unroll 3
      for (i64 t = 0; t < ROWS; ++t)
        _mm512_storeu_si512(to + t * 3 * c, _mm512_maskz_loadu_epi16(own, from + t * row));
    }
  }
}

// As of 16 bits: rounded by rounded, then either's rest by the other rounded.
void first_layer(const Bf16Layer& job, i64 p0, i64 p1, i64 begin, i64 end) {
  constexpr i64 PATCH = 3 * BF16_UNIT * BF16_BLOCK;
  alignas(64) float products[2][PRODUCTS + ASIDE];
  alignas(64) bf16 patches[2][2 * PATCH + BF16_BLOCK] = {};
  Tiles tiles;
  const i64 units = bf16_units(job.plane), blocks = bf16_first_blocks(job.image_channels);
  const i64 image = (job.plane.h + 2) * (job.plane.w + 2) * job.image_channels;
  i64 parts[9];
  for (i64 t = 0; t < 3 * blocks; ++t)
    parts[t] = (t % blocks) * BF16_UNIT * BF16_BLOCK + (t / blocks == 1 ? PATCH : 0);
  Later<LayerEpilogue<false, true>> later(job);
  int turn = 0;
  for (i64 i = begin; i < end; ++i) {
    const i64 n = i / units, unit = i % units;
    bf16* patch = patches[i % 2];
    for (i64 part = 0; part < 2; ++part)
      (blocks == 1 ? first_patches<3>
                   : first_patches<1>)(job, job.image + (part * job.n_images + n) * image, unit,
                                       patch + part * PATCH);
    for (i64 panel = p0; panel < p1; ++panel, turn ^= 1) {
      const Operand operand{patch, products[turn]};
      later.expect(3 * blocks);
      tiles.multiply(&operand, 1, parts, 3 * blocks, 1, 0,
                     job.packed + panel * 3 * blocks * BF16_PAIRED, later);
      later.flush();
      const LayerEpilogue<false, true>::Unit done{n, panel, unit, products[turn], {1, 0}};
      later.add(&done, 1);
    }
  }
  tiles.store();
  later.flush();
}

template <bool TWO, bool MORE>
void layer_of(const Bf16Layer& job, i64 p0, i64 p1, i64 begin, i64 end) {
  alignas(64) float products[2][GROUP][(TWO ? 2 : 1) * PRODUCTS + ASIDE];
  Tiles tiles;
  const Taps taps(job.plane);
  const i64 units = bf16_units(job.plane), stride = job.plane.block * BF16_BLOCK;
  const i64 all = job.source[0].blocks + (TWO ? job.source[1].blocks : 0);
  const i64 most = together(all);
  Later<LayerEpilogue<TWO, MORE>> later(job);
  int turn = 0;
  for (i64 first = begin; first < end; first += job.span)
    for (i64 panel = p0; panel < p1; ++panel)
      for (i64 i = first, last = min_of(first + job.span, end); i < last; i += most, turn ^= 1) {
        const int count = static_cast<int>(min_of(most, last - i));
        const bf16* b = job.packed + panel * all * 9 * BF16_PAIRED;
        typename LayerEpilogue<TWO, MORE>::Unit group[GROUP];
        for (int u = 0; u < count; ++u)
          group[u] = {(i + u) / units, panel, (i + u) % units, products[turn][u], {}};
        later.expect(all * 9 * count);
        for (int s = 0; s < (TWO ? 2 : 1); ++s) {
          const Bf16Source& from = job.source[s];
          Operand operands[GROUP];
          for (int u = 0; u < count; ++u) {
            const bf16* image = from.r + group[u].n * from.blocks * stride;
            operands[u] = {image + group[u].unit * BF16_UNIT * BF16_BLOCK,
                           products[turn][u] + s * PRODUCTS};
            group[u].scale[s] = from.scale[group[u].n];
          }
          tiles.multiply(operands, count, taps.at, 9, from.blocks, stride, b, later);
          b += from.blocks * 9 * BF16_PAIRED;
        }
        later.flush();
        later.add(group, count);
      }
  tiles.store();
  later.flush();
}

void layer(const Bf16Layer& job, i64 p0, i64 p1, i64 begin, i64 end) {
  if (job.image) return first_layer(job, p0, p1, begin, end);
  const bool two = job.sources > 1, more = job.z || job.sums || !job.r_out;
  const auto run = two ? (more ? layer_of<true, true> : layer_of<true, false>)
                       : (more ? layer_of<false, true> : layer_of<false, false>);
  run(job, p0, p1, begin, end);
}
