// Transposed 2x2 convolution, stride 2, and its gradient to the input: rows of 1x1 products, no
// borders. 8*Cin*Cout FLOPs per input pixel; bytes: the small side once per panel, the large side
// once. Included by isa/body.h inside an anonymous namespace.

// A row of 1x1 products: pixel p of the row starts at a + p*stride.
template <class T>
void plain_row(const T* a, i64 w, i64 stride, i64 runs, i64 run_stride, i64 len, const T* b,
               const Panel<T>& panel, T* products) {
  const Split split(w);
  for (i64 i = 0; i < split.count; ++i) {
    const i64 x0 = split.start(i), p = split.start(i + 1) - x0;
    with_size<BLOCK>(p, panel.nv,
                     TileCall<T>{a + x0 * stride, stride, runs, run_stride, len, b,
                                 products + x0 * panel.lanes, panel.lanes, T(1), false});
  }
}

// out[n, 2y+i, 2x+j, co] = sum_ci r[n, y, x, ci] W[ci, co, i, j]: four 1x1 products, columns (tap,
// panel). A few rows go through all of them before the next: what is written is then in a near
// cache until it is whole.
template <class T>
void upsample_fwd(const UpsampleJob<T>& job, i64 begin, i64 end, i64 columns_begin, i64 columns_end,
                  T* scratch) {
  constexpr i64 TOGETHER = 8;
  const i64 tap_size = job.cin * ((job.cout + Vec<T>::LANES - 1) / Vec<T>::LANES) * Vec<T>::LANES;
  for (i64 first = begin; first < end; first += TOGETHER)
    for (i64 column = columns_begin; column < columns_end; ++column) {
      const i64 tap = column / job.panels;
      const Panel<T> panel(column % job.panels, job.cout);
      const T* b = panel.weights(job.packed + tap * tap_size, job.cin);
      for (i64 row = first; row < min_of(first + TOGETHER, end); ++row) {
        plain_row(job.in + row * job.w * job.cin, job.w, job.cin, 1, 0, job.cin, b, panel, scratch);
        const i64 pixel = (2 * row + tap / 2) * 2 * job.w + tap % 2;
        copy_out(scratch, job.w, panel, job.out + pixel * job.cout + panel.start, 2 * job.cout);
      }
    }
}

// d_r[n, y, x, ci] = sum_{i,j,co} d_out[n, 2y+i, 2x+j, co] W[ci, co, i, j]: two runs of 2*cout
// values
template <class T>
void upsample_bwd(const UpsampleJob<T>& job, i64 begin, i64 end, T* scratch) {
  const i64 rows = job.n * job.h;
  for (i64 unit = begin; unit < end; ++unit) {
    const i64 row = unit % rows;
    const Panel<T> panel(unit / rows, job.cin);
    const T* b = panel.weights(job.packed, 4 * job.cout);
    const i64 line = 2 * job.w * job.cout;
    plain_row(job.in + 2 * row * line, job.w, 2 * job.cout, 2, line, 2 * job.cout, b, panel,
              scratch);
    copy_out(scratch, job.w, panel, job.out + row * job.w * job.cin + panel.start, job.cin);
  }
}
