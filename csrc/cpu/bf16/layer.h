// The layer: epilogues beside products, and the first layer. Included by bf16/amx.cpp.

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
    const float count = static_cast<float>(pixels), lanes = static_cast<float>(width);
    const __m512 share = _mm512_set1_ps(1 / count), all = _mm512_set1_ps(count);
    const __mmask16 own[2] = {static_cast<__mmask16>((1 << min_of(width, 16)) - 1),
                              static_cast<__mmask16>((1 << (width > 16 ? width - 16 : 0)) - 1)};
    __m512 mean[2], m2[2];
    for (int v = 0; v < 2; ++v)
      mean[v] = _mm512_maskz_mov_ps(own[v], _mm512_fmadd_ps(sum[v], share, first[v]));
    const float centre = _mm512_reduce_add_ps(_mm512_add_ps(mean[0], mean[1])) / lanes;
    for (int v = 0; v < 2; ++v) {
      const __m512 d = _mm512_sub_ps(mean[v], _mm512_set1_ps(centre));
      const __m512 within = _mm512_fnmadd_ps(_mm512_mul_ps(sum[v], share), sum[v], squares[v]);
      m2[v] = _mm512_maskz_mov_ps(own[v], _mm512_fmadd_ps(_mm512_mul_ps(all, d), d, within));
    }
    out[0] = count * lanes, out[1] = centre;
    out[2] = _mm512_reduce_add_ps(_mm512_add_ps(m2[0], m2[1]));
  }
};

// The epilogue of the unit computed last, in slices beside the products of the next. It is begun
// with a unit, once the unit's sums are stored, and takes rows until it is done.
template <class Epilogue>
class Later {
 public:
  template <class Job>
  explicit Later(const Job& job) : epilogue_(job) {}

  // `steps` calls of this object are to come
  void add(const typename Epilogue::Unit& unit, i64 steps) {
    unit_ = unit, state_ = WAITS;
    rows_ = steps * SLICE >= BF16_UNIT ? SLICE : (BF16_UNIT + steps - 1) / steps;
    every_ = wait_ = steps * rows_ / BF16_UNIT;
  }
  void operator()() {
    if (state_ == DONE || --wait_ > 0) return;
    wait_ = every_;
    slice(rows_);
  }
  void flush() {
    if (state_ != DONE) slice(BF16_UNIT);
  }

 private:
  static constexpr i64 SLICE = 4;  // rows, at least
  enum { WAITS, BEGUN, DONE };

  void slice(i64 rows) {
    if (state_ == WAITS) epilogue_.begin(unit_), state_ = BEGUN;
    epilogue_.rows(rows);
    if (epilogue_.done()) epilogue_.finish(), state_ = DONE;
  }

  Epilogue epilogue_;
  typename Epilogue::Unit unit_;
  int state_ = DONE;
  i64 rows_ = 0, every_ = 0, wait_ = 0;
};

// The next panel's weights on their way to the second-level cache while units are multiplied by
// this one's: a few lines each step, where the processor would fetch them all in the first unit.
class Ahead {
 public:
  void begin(const bf16* weights, i64 bytes, i64 units) {
    constexpr i64 LINES = BF16_PAIRED * sizeof(bf16) / 64;  // of a step
    at_ = reinterpret_cast<const char*>(weights), end_ = at_ + bytes;
    each_ = min_of((LINES + units - 1) / units, MOST) * 64;
  }
  void operator()() {
    if (at_ >= end_) return;
    for (i64 i = 0; i < each_; i += 64) _mm_prefetch(at_ + i, _MM_HINT_T1);
    at_ += each_;
  }

 private:
  static constexpr i64 MOST = 8;
  const char *at_ = nullptr, *end_ = nullptr;
  i64 each_ = 0;
};

// Products of one or two sources to r_out, statistics and sums, some rows at a time.
// NORM: with statistics and gain. MORE: z or sums are wanted, or r_out is not.
template <bool TWO, bool NORM, bool MORE>
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
    at_ = Walk(plane_, unit.unit * BF16_UNIT), pixels_ = 0;
    left_ = min_of(BF16_UNIT, plane_.positions - unit.unit * BF16_UNIT);
    block_ = job_.r_out
                 ? job_.r_out + (unit.n * job_.panels + unit.panel) * plane_.block * BF16_BLOCK
                 : nullptr;
    z_ = job_.z ? job_.z + (unit.n * job_.panels + unit.panel) * plane_.block * BF16_BLOCK +
                      inside(plane_)
                : nullptr;
    next_ = unit.products;
    const float* first = at_.x < plane_.w ? next_ : next_ + BF16_BLOCK;
    for (int v = 0; v < 2; ++v) {
      bias_[v] = _mm512_loadu_ps(job_.bias + panel + v * 16);
      if (NORM) gamma_[v] = _mm512_loadu_ps(job_.gamma + panel + v * 16);
      if (MORE) sums_[v] = _mm512_setzero_ps();
      if (NORM) moments_.start(v, z(first, v));
    }
  }

  bool done() const { return left_ == 0; }

  void rows(i64 count) {
    count = min_of(count, left_), left_ -= count;
    if (plane_.aligned && plane_.fold == 1)
      take<true>(count);
    else
      take<false>(count);
  }

  void finish() const {
    const i64 units = bf16_units(plane_), panels = job_.panels;
    const i64 n = unit_.n, panel = unit_.panel, unit = unit_.unit;
    if (NORM)
      moments_.finish(pixels_, min_of(job_.cout - panel * 32, 32),
                      job_.stats + ((n * panels + panel) * units + unit) * 3);
    if (MORE && job_.sums)
      for (int v = 0; v < 2; ++v)
        _mm512_storeu_ps(job_.sums + ((n * units + unit) * panels + panel) * 32 + v * 16, sums_[v]);
  }

 private:
  // PLAIN: neither folded nor positions between rows.
  template <bool PLAIN>
  void take(i64 count) {
    // in registers meanwhile
    const Bf16Plane& plane = plane_;
    const i64 w = plane.w;
    Moments moments = moments_;
    __m512 sums[2] = {sums_[0], sums_[1]};
    i64 x = at_.x, m = at_.m;
    const i64 border = plane.pitch + 1;
    bf16* const block = block_;
    const float* p = next_;
    for (; count > 0; --count, p += BF16_BLOCK) {
      if (PLAIN || at_.x < plane.w) {
        ++pixels_;
        __m512 of[2], r[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          of[v] = z(p, v);
          if (NORM) moments.add(v, of[v]);
          r[v] = relu(NORM ? _mm512_mul_ps(gamma_[v], of[v]) : of[v]);
          if (MORE) sums[v] = _mm512_add_ps(sums[v], r[v]);
        }
        if (MORE && z_)
          _mm512_storeu_si512(z_ + (PLAIN ? m : at_.m) * BF16_BLOCK, to_bf16(of[0], of[1]));
        if (!MORE || block) {
          const __m512i value = to_bf16(r[0], r[1]);
          if (PLAIN) {
            bf16* to = block + (border + m) * BF16_BLOCK;
            _mm512_storeu_si512(to, value);
            if (x == w - 1) _mm512_storeu_si512(to + BF16_BLOCK, _mm512_setzero_si512());
          } else {
            put(plane, block, at_, value);
          }
        }
      }
      if (PLAIN) {
        ++m;
        if (++x == w) x = 0, ++m;
      } else {
        at_.step(plane);
      }
    }
    moments_ = moments, sums_[0] = sums[0], sums_[1] = sums[1], next_ = p;
    if (PLAIN) at_.x = x, at_.m = m;
  }

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
  Walk at_;
  i64 left_, pixels_;
  bf16 *block_, *z_;
  const float* next_;
  __m512 bias_[2], gamma_[2], sums_[2];
  Moments moments_;
};

// A unit's 3x3 neighbourhoods, (part, block, 32 positions, 32), of the image and of its rest; ROWS
// of the kernel in a block. image: of the first part, the other is `part` further.
template <int ROWS>
void first_patches(const Bf16Layer& job, const bf16* image, i64 part, i64 unit, bf16* to) {
  const i64 c = job.image_channels, row = (job.plane.w + 2) * c, h = job.plane.h, w = job.plane.w;
  const __mmask32 own = ~__mmask32{0} >> (32 - 3 * c);
  Walk at(job.plane, unit * BF16_UNIT);
  for (i64 p = 0; p < BF16_UNIT; ++p, at.step(job.plane), to += BF16_BLOCK) {
    const bf16* pixel = image + min_of(at.row(job.plane), h - 1) * row + min_of(at.x, w - 1) * c;
#pragma GCC unroll 2
    for (i64 k = 0; k < 2; ++k, pixel += part)
#pragma GCC unroll 3
      for (i64 block = 0; block < 3 / ROWS; ++block) {
        const bf16* from = pixel + block * row;
        __m512i patch = _mm512_maskz_loadu_epi16(own, from);
      // each row's values to where they belong
#pragma GCC unroll 3
        for (i64 t = 1; t < ROWS; ++t)
          patch = _mm512_mask_loadu_epi16(patch, own << t * 3 * c, from + t * (row - 3 * c));
        _mm512_store_si512(to + (k * 3 + block) * BF16_UNIT * BF16_BLOCK, patch);
      }
  }
}

// As of 16 bits: rounded by rounded, then either's rest by the other rounded.
template <bool MORE>
void first_layer(const Bf16Layer& job, i64 p0, i64 p1, i64 begin, i64 end) {
  constexpr i64 PATCH = 3 * BF16_UNIT * BF16_BLOCK;
  using Epilogue = LayerEpilogue<false, false, MORE>;
  alignas(64) float products[2][PRODUCTS + ASIDE];
  alignas(64) bf16 patches[2][2 * PATCH];
  Tiles tiles;
  const i64 units = bf16_units(job.plane), blocks = bf16_first_blocks(job.image_channels);
  const i64 image = (job.plane.h + 2) * (job.plane.w + 2) * job.image_channels;
  i64 parts[9];
  for (i64 t = 0; t < 3 * blocks; ++t)
    parts[t] = (t % blocks) * BF16_UNIT * BF16_BLOCK + (t / blocks == 1 ? PATCH : 0);
  Later<Epilogue> later(job);
  int turn = 0;
  for (i64 i = begin; i < end; ++i) {
    const i64 n = i / units, unit = i % units;
    bf16* patch = patches[i % 2];
    (blocks == 1 ? first_patches<3> : first_patches<1>)(job, job.image + n * image,
                                                        job.n_images * image, unit, patch);
    for (i64 panel = p0; panel < p1; ++panel, turn ^= 1) {
      tiles.multiply({patch, BF16_TILE * BF16_BLOCK}, parts, 3 * blocks, 1, 0,
                     job.packed + panel * 3 * blocks * BF16_PAIRED, false, products[turn], later);
      later.flush();
      later.add({n, panel, unit, products[turn], {1, 0}}, 3 * blocks);
    }
  }
  tiles.store();
  later.flush();
}

// Every other unit goes through the weights backwards: those used last are still in the first-level
// cache.
template <bool TWO, bool MORE>
void layer_of(const Bf16Layer& job, i64 p0, i64 p1, i64 begin, i64 end) {
  using Epilogue = LayerEpilogue<TWO, true, MORE>;
  alignas(64) float products[2][(TWO ? 2 : 1) * PRODUCTS + ASIDE];
  Tiles tiles;
  const Taps taps(job.plane);
  const i64 units = bf16_units(job.plane), stride = job.plane.block * BF16_BLOCK;
  const i64 own = job.source[0].blocks, all = own + (TWO ? job.source[1].blocks : 0);
  const i64 weights = all * 9 * BF16_PAIRED;  // of a panel
  Later<Epilogue> later(job);
  Ahead ahead;
  auto beside = [&] { ahead(), later(); };
  int turn = 0;
  for (i64 first = begin; first < end; first += job.span) {
    const i64 last = min_of(first + job.span, end);
    for (i64 panel = p0; panel < p1; ++panel) {
      const bf16* b = job.packed + panel * weights;
      if (panel + 1 < p1) ahead.begin(b + weights, weights * sizeof(bf16), last - first);
      for (i64 i = first; i < last; ++i, turn ^= 1) {
        const i64 n = i / units, unit = i % units;
        const Walk at(job.plane, unit * BF16_UNIT);
        const i64 second = second_tile(job.plane, at);
        typename Epilogue::Unit done{n, panel, unit, products[turn], {}};
        for (int k = 0; k < (TWO ? 2 : 1); ++k) {
          const int s = TWO && unit % 2 ? 1 - k : k;
          const Bf16Source& from = job.source[s];
          const bf16* image = from.r + n * from.blocks * stride;
          done.scale[s] = from.scale[n];
          tiles.multiply({image + at.m * BF16_BLOCK, second}, taps.at, 9, from.blocks, stride,
                         b + s * own * 9 * BF16_PAIRED, unit % 2, products[turn] + s * PRODUCTS,
                         beside);
        }
        later.flush();
        later.add(done, all * 9);
      }
    }
  }
  tiles.store();
  later.flush();
}

void layer(const Bf16Layer& job, i64 p0, i64 p1, i64 begin, i64 end) {
  const bool two = job.sources > 1, more = job.z || job.sums || !job.r_out;
  const auto run = job.image ? (more ? first_layer<true> : first_layer<false>)
                   : two     ? (more ? layer_of<true, true> : layer_of<true, false>)
                             : (more ? layer_of<false, true> : layer_of<false, false>);
  run(job, p0, p1, begin, end);
}
