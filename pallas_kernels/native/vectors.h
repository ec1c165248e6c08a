// What the kernels share: bf16 and float32 in AVX-512 registers.
#pragma once

#include <cstdint>

#include <immintrin.h>

namespace native {

using bf16 = uint16_t;  // its bits

inline __m512bh load(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

inline __m512bh load(const bf16* from, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, from); }

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

}  // namespace native
