// bf16 and float32 in the registers of AVX2, which multiplies float32 only: bf16 is the upper half of one.
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

namespace native {

using bf16 = uint16_t;  // its bits
enum fp8 : uint8_t {};  // the bits of an e4m3: four bits of exponent, three of mantissa, no infinity
using Floats = __m256;
using Mask = __m256;  // all bits of a lane, or none

constexpr int kLanes = 8;  // of Floats
constexpr int kVectorBytes = 32;
constexpr int64_t kDotRows = 4;  // of x, up to which a product is dot products

// Sixteen numbers in bf16: those of even places and those of odd ones. Nothing has to move for that.
struct Pair {
  Floats even, odd;
};

inline Pair split(__m256i bits) {
  return {(__m256)_mm256_slli_epi32(bits, 16), (__m256)_mm256_and_si256(bits, _mm256_set1_epi32(0xFFFF0000))};
}

inline Pair load(const bf16* from) { return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }

// The first `count` numbers, and zeros.
inline Pair load_first(const bf16* from, int64_t count) {
  bf16 some[16] = {};
  std::memcpy(some, from, count * sizeof(bf16));
  return load(some);
}

// Of eight numbers in the lower bytes of 32-bit lanes.
inline Floats widened(const int8_t*, __m256i bytes) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 24), 24));
}

inline Floats widened(const fp8*, __m256i bytes) {
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(bytes, _mm256_set1_epi32(0x80)), 24);
  const __m256i rest = _mm256_slli_epi32(_mm256_and_si256(bytes, _mm256_set1_epi32(0x7F)), 20);
  const __m256i normal = _mm256_add_epi32(rest, _mm256_set1_epi32(120 << 23));  // biases of 127 and 7
  const Floats small = _mm256_mul_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_ps(1.0f / 512));
  const Floats is_small = (Floats)_mm256_cmpgt_epi32(_mm256_set1_epi32(1 << 23), rest);  // without an exponent
  const Floats number = _mm256_blendv_ps((Floats)normal, _mm256_permutevar8x32_ps(small, bytes), is_small);
  return _mm256_or_ps(number, (Floats)sign);
}

template <typename Byte>
inline Pair load(const Byte* from) {
  static_assert(sizeof(Byte) == 1);
  const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return {widened(from, _mm256_and_si256(both, _mm256_set1_epi32(0xFF))), widened(from, _mm256_srli_epi32(both, 16))};
}

template <typename Byte>
inline Pair load_first(const Byte* from, int64_t count) {
  static_assert(sizeof(Byte) == 1);
  Byte some[16] = {};
  std::memcpy(some, from, count);
  return load(some);
}

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }

inline void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }

inline Floats broadcast(float x) { return _mm256_set1_ps(x); }

inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }

inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }

inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }

inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }

inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }

inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }

// acc + a * b
inline Floats multiply_add(Floats acc, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, acc); }

inline Floats multiply_add(Floats acc, Pair a, Pair b) {
  return multiply_add(multiply_add(acc, a.even, b.even), a.odd, b.odd);
}

// The sums of 8 vectors, in order.
inline Floats sums(const Floats (&v)[8]) {
  const Floats low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const Floats high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

inline float sum_of(Floats v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float largest_of(Floats v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// Which of the integers from `begin` on, one a lane, are from `first` to `last`.
inline Mask within(int64_t begin, int64_t first, int64_t last) {
  const __m256i key = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(begin));
  const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), key);
  const __m256i behind = _mm256_cmpgt_epi32(key, _mm256_set1_epi32(last));
  return (Mask)_mm256_xor_si256(_mm256_or_si256(before, behind), _mm256_set1_epi32(-1));
}

// `v` where the mask is set, `otherwise` where it is not.
inline Floats select(Mask mask, Floats v, Floats otherwise) { return _mm256_blendv_ps(otherwise, v, mask); }

// e to the power of x within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2, by its Taylor series. What is
// too small for a normal number is zero.
inline Floats exponential(Floats x) {
  const Floats least = broadcast(-87.0f);
  const Mask normal = _mm256_cmp_ps(x, least, _CMP_GE_OQ);
  x = larger(x, least);
  const Floats n = _mm256_round_ps(multiply(x, broadcast(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  Floats r = _mm256_fnmadd_ps(n, broadcast(0.693359375f), x);  // ln(2) in two parts, the first one short
  r = _mm256_fnmadd_ps(n, broadcast(-2.12194440e-4f), r);
  Floats sum = broadcast(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = multiply_add(broadcast(coefficient), sum, r);
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(normal, multiply(sum, (Floats)exponent));
}

// To the nearest bf16, even on a tie; in the upper halves.
inline __m256i rounded(Floats v) {
  const __m256i bits = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
}

// A row of T that is multiplied with many others: float32 as it lies, bf16 as float32 in the order of `Pair`.
template <typename T>
struct Operand;

template <>
struct Operand<float> {
  using Number = float;

  static constexpr bool kPrepared = false;

  static constexpr int64_t stride(int64_t count) { return count; }

  static const float* prepare(const float* from, int64_t, float*) { return from; }

  static Floats load(const float* from) { return native::load(from); }
};

template <>
struct Operand<bf16> {
  using Number = float;

  static constexpr bool kPrepared = true;

  // Numbers from one row to the next: whole vectors.
  static constexpr int64_t stride(int64_t count) { return (count + 15) / 16 * 16; }

  // `count` numbers of a row, in `room`, with zeros behind them.
  static const float* prepare(const bf16* from, int64_t count, float* room) {
    for (int64_t i = 0; i < count; i += 16) {
      const Pair pair = count - i < 16 ? native::load_first(from + i, count - i) : native::load(from + i);
      native::store(room + i, pair.even);
      native::store(room + i + 8, pair.odd);
    }
    return room;
  }

  static Pair load(const float* from) { return {native::load(from), native::load(from + 8)}; }

  static Pair load_first(const float* from, int64_t) { return load(from); }
};

// The dimensions come in the order of `Pair`, which `store` undoes.
template <>
struct Values<bf16> {
  static constexpr int kKeys = 1;
  using Vector = Floats;
  using Weight = float;

  static void load_block(const bf16* first, const bf16*, Floats (&block)[2]) {
    const Pair pair = load(first);
    block[0] = pair.even;
    block[1] = pair.odd;
  }

  static Floats weight(const float* weights) { return broadcast(*weights); }

  static void store_weights(float* to, Floats weights) { native::store(to, weights); }

  static void store(bf16* to, Floats even, Floats odd) {
    const __m256i upper = _mm256_and_si256(rounded(odd), _mm256_set1_epi32(0xFFFF0000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_or_si256(_mm256_srli_epi32(rounded(even), 16), upper));
  }
};

}  // namespace native
