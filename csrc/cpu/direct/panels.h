// What the kernels share: cutting rows into tiles and output channels into panels.
// Included by isa/body.h inside an anonymous namespace.

constexpr i64 BLOCK = FASTPHI_BLOCK;

inline i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
inline i64 max_of(i64 a, i64 b) { return a > b ? a : b; }

// [0, n) cut into nearly equal pieces of at most BLOCK: no short tail wastes a tile.
struct Split {
  i64 count, base, rest;
  explicit Split(i64 n) : count((n + BLOCK - 1) / BLOCK), base(n / count), rest(n % count) {}
  i64 start(i64 i) const { return i * base + min_of(i, rest); }
};

// Calls f with P and NV as compile-time numbers.
template <int P, class F>
inline void with_size(i64 p, i64 nv, const F& f) {
  if constexpr (P > 0) {
    if (p != P) return with_size<P - 1>(p, nv, f);
    if (nv == 2)
      f.template call<P, 2>();
    else
      f.template call<P, 1>();
  }
}

template <class T>
struct TileCall {
  const T* a;
  i64 stride, runs, run_stride, len;
  const T* b;
  T* out;
  i64 out_stride;
  T scale;
  bool add;
  const T* ahead = nullptr;  // values wanted next, or null; `step` for each of `len`
  i64 step = 0;
  bool on = false;  // see tile
  template <int P, int NV>
  void call() const {
    if (on)
      run<P, NV, 0, true>();
    else if (!ahead)
      run<P, NV, 0>();
    else if (step <= LINE)
      run<P, NV, 1>();
    else
      run<P, NV, 2>();
  }

 private:
  static constexpr i64 LINE = 64 / sizeof(T);
  template <int P, int NV, int AHEAD, bool ON = false>
  void run() const {
    tile<T, P, NV, AHEAD, ON>(a, stride, runs, run_stride, len, b, out, out_stride, scale, add,
                              ahead, AHEAD ? step : 0);
  }
};

template <class T>
struct PixelsCall {
  const T* a;
  i64 stride_a, row_stride_a;
  const T* d;
  i64 stride_d, row_stride_d, rows, len;
  T scale;
  T* out;
  bool add = true;
  template <int P, int NV>
  void call() const {
    tile_pixels<T, P, NV>(a, stride_a, row_stride_a, d, stride_d, row_stride_d, rows, len, scale,
                          out, add);
  }
};

// A panel: output channels [start, start + width), in nv vectors; packed panels lie one after the
// other.
template <class T>
struct Panel {
  i64 start, width, nv, lanes;
  Panel(i64 index, i64 cout) {
    constexpr i64 V = Vec<T>::LANES;
    start = index * 2 * V;
    width = min_of(cout - start, 2 * V);
    nv = width > V ? 2 : 1;
    lanes = nv * V;
  }
  const T* weights(const T* packed, i64 k) const { return packed + start * k; }
};

// The first `count` lanes of v.
template <class T>
inline void store_first(T* to, typename Vec<T>::type v, i64 count) {
  if (count == Vec<T>::LANES) return store(to, v);
  for (i64 i = 0; i < count; ++i) to[i] = v[i];
}

// out[x*pitch + j] = products[x][j], j < width
template <class T>
void copy_out(const T* products, i64 w, const Panel<T>& panel, T* out, i64 pitch) {
  constexpr i64 V = Vec<T>::LANES;
  for (i64 x = 0; x < w; ++x)
    for (i64 j = 0; j < panel.nv; ++j)
      store_first(out + x * pitch + j * V, load(products + (x * panel.nv + j) * V),
                  min_of(V, panel.width - j * V));
}
