// bf16 and float32 in the registers of AVX-512, whose products of bf16 need no conversion (AVX512-BF16).
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

namespace native {

using bf16 = uint16_t;  // its bits
enum fp8 : uint8_t {};  // the bits of an e4m3: four bits of exponent, three of mantissa, no infinity
using Floats = __m512;
using Mask = __mmask16;

constexpr int kLanes = 16;  // of Floats
constexpr int kVectorBytes = 64;
constexpr int64_t kDotRows = 8;  // of x, up to which a product is dot products; half of it beside AMX's tiles

inline __m512bh load(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

inline __m512bh load(const bf16* from, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, from); }

inline __mmask32 first_of(int64_t count) { return (__mmask32)((1ull << count) - 1); }

// The first `count` numbers, and zeros.
inline __m512bh load_first(const bf16* from, int64_t count) { return load(from, first_of(count)); }

// Of 32 numbers, each of which bf16 holds exactly.
inline __m512bh widened(const int8_t*, __m256i bytes) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return _mm512_cvtne2ps_pbh(high, low);
}

inline __m512bh widened(const fp8*, __m256i bytes) {
  const __m512i bits = _mm512_cvtepu8_epi16(bytes);
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(bits, _mm512_set1_epi16(0x80)), 8);
  const __m512i rest = _mm512_slli_epi16(_mm512_and_si512(bits, _mm512_set1_epi16(0x7F)), 4);
  const __m512i normal = _mm512_add_epi16(rest, _mm512_set1_epi16(120 << 7));  // biases of 127 and 7
  const __m512i small = _mm512_castsi128_si512(  // 0 to 7 times 2^-9, of those without an exponent
      _mm_setr_epi16(0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60));
  const __mmask32 is_small = _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(1 << 7));
  const __m512i index = _mm512_and_si512(bits, _mm512_set1_epi16(7));
  return (__m512bh)_mm512_or_si512(sign, _mm512_mask_permutexvar_epi16(normal, is_small, index, small));
}

template <typename Byte>
inline __m512bh load(const Byte* from) {
  static_assert(sizeof(Byte) == 1);
  return widened(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

template <typename Byte>
inline __m512bh load_first(const Byte* from, int64_t count) {
  static_assert(sizeof(Byte) == 1);
  return widened(from, _mm256_maskz_loadu_epi8(first_of(count), from));
}

inline void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }

inline Floats broadcast(float x) { return _mm512_set1_ps(x); }

inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }

inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }

inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }

inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }

inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }

inline float sum_of(Floats v) { return _mm512_reduce_add_ps(v); }

inline float largest_of(Floats v) { return _mm512_reduce_max_ps(v); }

// Which of the integers from `begin` on, one a lane, are from `first` to `last`.
inline Mask within(int64_t begin, int64_t first, int64_t last) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i key = _mm512_add_epi32(lanes, _mm512_set1_epi32(begin));
  return _mm512_cmp_epi32_mask(key, _mm512_set1_epi32(first), _MM_CMPINT_NLT) &
         _mm512_cmp_epi32_mask(key, _mm512_set1_epi32(last), _MM_CMPINT_LE);
}

// `v` where the mask is set, `otherwise` where it is not.
inline Floats select(Mask mask, Floats v, Floats otherwise) { return _mm512_mask_mov_ps(otherwise, mask, v); }

// acc + a * b; in bf16 each float32 takes the products of two neighbours.
inline __m512 multiply_add(__m512 acc, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(acc, a, b); }

inline __m512 multiply_add(__m512 acc, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, acc); }

// The sums of 16 vectors, in order.
inline __m512 sums(const __m512 (&v)[16]) {
  __m512 pairs[8], fours[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    fours[i] = _mm512_add_ps(_mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xEE));
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x44),
                                   _mm512_shuffle_f32x4(fours[0], fours[1], 0xEE));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x44),
                                    _mm512_shuffle_f32x4(fours[2], fours[3], 0xEE));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
}

// 16 vectors of 16, rows to columns.
inline void transpose(const __m512i (&rows)[16], __m512i (&columns)[16]) {
  __m512i pairs[16], fours[16];  // fours[4 * i + j]: columns j, 4 + j, 8 + j, 12 + j of rows 4 * i to 4 * i + 3
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xDD);
    const __m512i later_even = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512i later_odd = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xDD);
    columns[j] = _mm512_shuffle_i32x4(even, later_even, 0x88);
    columns[8 + j] = _mm512_shuffle_i32x4(even, later_even, 0xDD);
    columns[4 + j] = _mm512_shuffle_i32x4(odd, later_odd, 0x88);
    columns[12 + j] = _mm512_shuffle_i32x4(odd, later_odd, 0xDD);
  }
}

// Rows of bf16 as lanes: `[(count + 1) / 2, lanes]` pairs of a row's neighbours, zeros in lanes whose row is null.
template <typename RowAt>
void pack_lanes(const RowAt& row_at, int64_t lanes, int64_t count, uint32_t* packed) {
  for (int64_t first = 0; first < lanes; first += 16)
    for (int64_t k = 0; k < count; k += 32) {
      const __mmask32 mask = count - k < 32 ? (1u << (count - k)) - 1 : ~0u;
      __m512i rows[16], columns[16];
      for (int i = 0; i < 16; ++i) {
        const bf16* const row = row_at(first + i);
        rows[i] = row ? (__m512i)load(row + k, mask) : __m512i{};
      }
      transpose(rows, columns);
      for (int i = 0; i < 16 && k / 2 + i < (count + 1) / 2; ++i)
        _mm512_storeu_si512(packed + (k / 2 + i) * lanes + first, columns[i]);
    }
}

// e to the power of x within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2, by its Taylor series.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln(2) in two parts, the first one short
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(sum, n);
}

// A row of T that is multiplied with many others: here as it lies.
template <typename T>
struct Operand {
  using Number = T;

  static constexpr bool kPrepared = false;

  // Numbers from one row to the next.
  static constexpr int64_t stride(int64_t count) { return count; }

  // `count` numbers of a row, in `room` if they have to be prepared.
  static const Number* prepare(const T* from, int64_t, Number*) { return from; }

  static auto load(const Number* from) { return native::load(from); }

  static auto load_first(const Number* from, int64_t count) { return native::load_first(from, count); }
};

// Two keys at a time, whose values are interleaved: the dimensions come in another order, which `store` undoes.
template <>
struct Values<bf16> {
  static constexpr int kKeys = 2;
  using Vector = __m512bh;
  using Weight = bf16;

  static void load_block(const bf16* first, const bf16* second, __m512bh (&block)[2]) {
    const __m512i a = _mm512_loadu_si512(first), b = second ? _mm512_loadu_si512(second) : _mm512_setzero_si512();
    block[0] = (__m512bh)_mm512_unpacklo_epi16(a, b);
    block[1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
  }

  static __m512bh weight(const bf16* weights) {
    int32_t both;
    std::memcpy(&both, weights, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
  }

  static void store_weights(bf16* to, __m512 weights) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(weights));
  }

  static void store(bf16* to, __m512 low, __m512 high) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_permutex2var_ps(low, second, high),
                                                         _mm512_permutex2var_ps(low, first, high)));
  }
};

}  // namespace native
