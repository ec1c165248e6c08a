// Work on the threads that XLA runs the program on.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include <immintrin.h>

#include "xla/ffi/api/ffi.h"

namespace native {

// Calls `work(begin, end)` on pieces of [0, count) until all are done. The caller takes part, and needs no other
// thread to come to an end: threads of the pool that are late, or busy, leave the pieces to it. Pieces are a share of
// what is left, and never below `smallest` items: large ones read memory in long streams, small ones come last and
// even out.
template <typename Work>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, int64_t smallest, const Work& work) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), count / std::max<int64_t>(smallest, 1));
  if (threads <= 1) {
    work(int64_t{0}, count);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();  // a helper may look at it after the caller has left
  auto run = [shared, count, smallest, threads, &work] {
    int64_t begin = shared->next.load(std::memory_order_relaxed);
    while (begin < count) {
      const int64_t end = std::min(count, begin + std::max(smallest, (count - begin) / (2 * threads)));
      if (!shared->next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      work(begin, end);
      shared->done.fetch_add(end - begin, std::memory_order_release);
      begin = shared->next.load(std::memory_order_relaxed);
    }
  };
  for (int64_t helper = 1; helper < threads; ++helper) { auto copy = run; pool.Schedule(std::move(copy)); }
  run();
  while (shared->done.load(std::memory_order_acquire) < count) _mm_pause();
}

}  // namespace native
