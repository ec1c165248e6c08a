// Weights in four bits: two numbers a byte, the first in its lower half, -8 to 7 each. One of a group of neighbours is
// `(number - zero) * scale`: the scale is for sums of products with few rows, and for the numbers, in bf16 where there
// is AVX-512, with many.
#pragma once

#include <algorithm>
#include <array>

#include "vectors.h"

namespace native {
namespace {

#ifdef NATIVE_AVX512
// What the 16 numbers of a group become, twice over: a half byte finds it, whatever its neighbour's lowest bit is.
using Decoded = __m512i;

inline Decoded decoded(float scale, float zero) {
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const __m512 values = _mm512_mul_ps(_mm512_sub_ps(numbers, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values));
}

// `decoded` with a scale of one, ready for every zero: to look it up takes a third of the time.
inline const Decoded& decoded_integers(int8_t zero) {
  static const auto all = [] {
    std::array<Decoded, 32> found;
    for (int i = 0; i < 32; ++i) found[i] = decoded(1, i < 16 ? i : i - 32);
    return found;
  }();
  return all[zero & 31];
}

// 32 numbers of one group.
inline __m512bh decode(const uint8_t* pairs, const Decoded& values) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)));
  return (__m512bh)_mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), values);
}

constexpr int64_t kByFours = 128;  // numbers, which groups of as many or several times as many are decoded by

// Of every four neighbours the first, then the second, the third and the fourth: a shift and a look-up for each vector.
// Rows of x are in the same order.
inline void decode_by_fours(const uint8_t* pairs, const Decoded& values, __m512bh (&numbers)[4]) {
  const __m512i words = _mm512_loadu_si512(pairs);
  numbers[0] = (__m512bh)_mm512_permutexvar_epi16(words, values);
  numbers[1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values);
  numbers[2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), values);
  numbers[3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), values);
}

inline void order_by_fours(const bf16* from, bf16* to) {
  const __m512i fours = _mm512_setr_epi32(0x40000, 0xC0008, 0x140010, 0x1C0018, 0x240020, 0x2C0028, 0x340030, 0x3C0038,
                                          0x40000, 0xC0008, 0x140010, 0x1C0018, 0x240020, 0x2C0028, 0x340030, 0x3C0038);
  const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32);
  const __m512i c = _mm512_loadu_si512(from + 64), d = _mm512_loadu_si512(from + 96);
  for (int j = 0; j < 4; ++j) {
    const __m512i places = _mm512_add_epi16(fours, _mm512_set1_epi16(j));
    const __m512i early = _mm512_permutex2var_epi16(a, places, b), late = _mm512_permutex2var_epi16(c, places, d);
    _mm512_storeu_si512(to + 32 * j, _mm512_mask_mov_epi32(early, 0xFF00, late));
  }
}

inline void store_wide(bf16* to, __m512bh numbers) { _mm512_storeu_si512(to, (__m512i)numbers); }

inline bf16 number_of(int half, const Decoded& values) {
  alignas(64) bf16 all[32];
  _mm512_store_si512(all, values);
  return all[half];
}

using Wide = bf16;  // what a number becomes that is multiplied with many rows
#else
struct Decoded {
  Floats scale, zero;  // of numbers from 0 to 15
};

inline Decoded decoded(float scale, float zero) { return {broadcast(scale), broadcast(zero + 8)}; }

inline Decoded decoded_integers(int8_t zero) { return decoded(1, zero); }

inline Floats number_of(__m256i halves, const Decoded& values) {
  const __m256i numbers = _mm256_and_si256(_mm256_xor_si256(halves, _mm256_set1_epi32(8)), _mm256_set1_epi32(15));
  return multiply(subtract(_mm256_cvtepi32_ps(numbers), values.zero), values.scale);
}

// 16 numbers of one group.
inline Pair decode(const uint8_t* pairs, const Decoded& values) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs)));
  return {number_of(bytes, values), number_of(_mm256_srli_epi32(bytes, 4), values)};
}

inline void store_wide(float* to, const Pair& numbers) {
  const Floats low = _mm256_unpacklo_ps(numbers.even, numbers.odd), high = _mm256_unpackhi_ps(numbers.even, numbers.odd);
  store(to, _mm256_permute2f128_ps(low, high, 0x20));
  store(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

inline float number_of(int half, const Decoded& values) {
  return _mm256_cvtss_f32(number_of(_mm256_set1_epi32(half), values));
}

using Wide = float;
#endif

constexpr int64_t kInt4Ahead = 16 * 1024;  // bytes of weight between what is decoded and what is fetched

constexpr int64_t kNumbers = kVectorBytes / sizeof(bf16);  // that are decoded at once

struct Int4 {
  const uint8_t* pairs;  // [out, in / 2]
  const float* scales;   // [out, groups]
  const int8_t* zeros;
  int64_t in, groups;

  int64_t group() const { return in / groups; }

  const uint8_t* pairs_of(int64_t o, int64_t k) const { return pairs + (o * in + k) / 2; }

  // `count` numbers of a row from `first` on.
  void widen(int64_t o, int64_t first, int64_t count, Wide* to) const {
    const int64_t size = group(), last = first + count;
    for (int64_t k = first; k < last;) {
      const int64_t own = o * groups + k / size, end = std::min((k / size + 1) * size, last);
      const Decoded values = decoded(scales[own], zeros[own]);
#ifdef NATIVE_AVX512
      for (; size % kByFours == 0 && k < end; k += kByFours) {
        __m512bh numbers[4];
        _mm_prefetch(reinterpret_cast<const char*>(pairs_of(o, k)) + kInt4Ahead, _MM_HINT_T1);
        decode_by_fours(pairs_of(o, k), values, numbers);
        for (int i = 0; i < 4; ++i) store_wide(to + (k - first) + 32 * i, numbers[i]);
      }
#endif
      for (; k % 2 == 0 && k + kNumbers <= end; k += kNumbers)
        store_wide(to + (k - first), decode(pairs_of(o, k), values));
      for (; k < end; ++k) to[k - first] = number_of(*pairs_of(o, k) >> k % 2 * 4 & 15, values);
    }
  }

#ifdef NATIVE_AVX512
  // As `Plain` has them. Nothing is fetched while rows are multiplied, as `widen` does it itself.
  static constexpr int kFetched = 0;

  const bf16* rows(int64_t o, int64_t outs, Scratch<bf16>& room) const {
    if (static_cast<int64_t>(room.size()) < outs * in) room.resize(outs * in);
    for (int64_t i = 0; i < outs; ++i) widen(o + i, 0, in, &room[i * in]);
    return room.data();
  }

  const char* next(int64_t, int64_t) const { return nullptr; }
#endif
};

}  // namespace
}  // namespace native
