// What launchers share: torch's thread pool (so torch.set_num_threads counts, and no second pool
// fights for the cores) and uninitialised buffers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__)
#include <unistd.h>
#endif

#include "kernels.h"

namespace fastphi {

constexpr size_t HUGE_PAGE = size_t{1} << 21;

// Asks for 2 MB pages where there are any: fresh memory costs a fault per page, which for a layer
// of few channels is as much as its arithmetic, and the processor prefetches within a page only.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE,
                  last = (start + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(i64 size) { reserve(size); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr, other.size_ = 0;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }

  // At least `size` elements; their values are undefined.
  void reserve(i64 size) {
    if (size <= size_) return;
    std::free(data_);
    const size_t wanted = static_cast<size_t>(size) * sizeof(T);
    const size_t page = wanted < HUGE_PAGE / 16 ? 64 : HUGE_PAGE;  // what is large gets whole pages
    const size_t bytes = (wanted + page - 1) / page * page;
    data_ = static_cast<T*>(std::aligned_alloc(page, bytes));
    size_ = data_ ? size : 0;
    if (!data_) throw std::bad_alloc();
    prefer_huge_pages(data_, bytes);
  }
  operator T*() const { return data_; }
  T* get() const { return data_; }
  i64 size() const { return size_; }
  void zero() { std::memset(data_, 0, size_ * sizeof(T)); }

 private:
  T* data_ = nullptr;
  i64 size_ = 0;
};

// Bytes of a core's own cache.
inline i64 cache_size() {
  constexpr i64 USUAL = i64{1} << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const i64 size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return size > 0 ? size : USUAL;
#else
  return USUAL;
#endif
}

// Elements of working memory that a thread keeps from call to call; more is given back.
constexpr i64 MOST_KEPT = i64{1} << 26;

// A thread's buffer number SLOT, for one user at a time: like a fresh one, without its page faults.
template <class T, int SLOT>
class KeptBuffer {
 public:
  explicit KeptBuffer(i64 size) { memory().reserve(size); }
  ~KeptBuffer() {
    if (memory().size() > MOST_KEPT) memory() = Buffer<T>();
  }
  KeptBuffer(const KeptBuffer&) = delete;
  KeptBuffer& operator=(const KeptBuffer&) = delete;
  operator T*() const { return memory(); }
  T* get() const { return memory(); }

 private:
  static Buffer<T>& memory() {
    thread_local Buffer<T> buffer;
    return buffer;
  }
};

// f(begin, end) over [0, n), on one thread where there is less than `work` scalar steps each to
// share.
template <class F>
void parallel(i64 n, i64 steps_each, const F& f) {
  constexpr i64 WORTH_A_THREAD = 32768;
  if (n > 0)
    torch::stable::parallel_for(0, n,
                                std::max<i64>(1, WORTH_A_THREAD / std::max<i64>(1, steps_each)), f);
}

}  // namespace fastphi
