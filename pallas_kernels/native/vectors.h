// bf16 and float32 in the widest registers that the CPU multiplies bf16 in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace native {

template <typename T>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kCacheLine{64};

  AlignedAllocator() = default;
  template <typename U>
  AlignedAllocator(const AlignedAllocator<U>&) {}

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kCacheLine)); }
  void deallocate(T* at, size_t) { ::operator delete(at, kCacheLine); }
  bool operator==(const AlignedAllocator&) const { return true; }
  bool operator!=(const AlignedAllocator&) const { return false; }
};

// Memory to work in, from the start of a cache line on: a vector that lies across two of them takes twice as long.
template <typename T>
using Scratch = std::vector<T, AlignedAllocator<T>>;

// Two vectors of values that belong to 2 * kLanes of a head's dimensions, and what weighs them.
template <typename T>
struct Values;

}  // namespace native

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define NATIVE_AVX512
#include "avx512.h"
#else
#include "avx2.h"
#endif

namespace native {

template <>
struct Values<float> {
  static constexpr int kKeys = 1;
  using Vector = Floats;
  using Weight = float;

  static void load_block(const float* first, const float*, Floats (&block)[2]) {
    block[0] = load(first);
    block[1] = load(first + kLanes);
  }

  static Floats weight(const float* weights) { return broadcast(*weights); }

  static void store_weights(float* to, Floats weights) { native::store(to, weights); }

  static void store(float* to, Floats low, Floats high) {
    native::store(to, low);
    native::store(to + kLanes, high);
  }
};

}  // namespace native
