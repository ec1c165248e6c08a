// Attention of many queries to a page in AMX's tiles.
//
// A page's keys, as they lie, times packed queries give scores whose columns are queries: the softmax has one query in
// each lane and no sum crosses lanes. Two keys' weights make a pair, pairs are transposed to rows, and those times the
// page's packed values are added to what is accumulated, whose dimensions come in the order of `Values<bf16>`.
#pragma once

#include <cstdint>
#include <vector>

#include "softmax.h"
#include "tiles_amx.h"
#include "vectors.h"

namespace native {
namespace {

// No tiles: for other numbers, and CPUs that have none.
template <typename T>
struct TileAttention {
  static constexpr bool suits(int64_t, int64_t, int64_t) { return false; }
  TileAttention(int64_t, int64_t, int64_t, int64_t) {}
  void take(const std::vector<const typename Operand<T>::Number*>&, int64_t) {}
  template <typename Score>
  void attend(const T*, const T*, int64_t, int64_t, int64_t, const Score&, Softmax&, float*) {}
};

#ifdef __AMX_BF16__
template <>
class TileAttention<bf16> {
 public:
  static bool suits(int64_t head_dim, int64_t value_dim, int64_t page_size) {
    return head_dim % kTileDepth == 0 && value_dim % kTileDepth == 0 && page_size % kTileDepth == 0 &&
           tiles_are_allowed();
  }

  // For up to `queries` at a time, a multiple of 16.
  TileAttention(int64_t head_dim, int64_t value_dim, int64_t page_size, int64_t queries)
      : dim_(head_dim), value_dim_(value_dim), size_(page_size), queries_(head_dim / 2 * queries),
        scores_(page_size * queries), weights_(queries * page_size), values_(page_size / 2 * value_dim) {}

  // The queries that what follows is about: the first `count`.
  void take(const std::vector<const bf16*>& q, int64_t count) {
    lanes_ = (count + 15) / 16 * 16;
    pack_lanes([&](int64_t lane) { return lane < count ? q[lane] : nullptr; }, lanes_, dim_, queries_.data());
  }

  // Attends to keys [begin, end) of a page, whose key 0 is at `position`. `score` makes scores of products.
  template <typename Score>
  void attend(const bf16* keys, const bf16* values, int64_t begin, int64_t end, int64_t position, const Score& score,
              Softmax& softmax, float* accumulated) {
    const int64_t depth = (end + kTileDepth - 1) / kTileDepth * kTileDepth;
    tile_products<false>(keys, dim_, queries_.data(), lanes_, dim_, scores_.data(), lanes_, depth, lanes_);
    for (int64_t lane = 0; lane < lanes_; lane += 16) {
      const auto first = _mm512_loadu_si512(&softmax.first_visible[lane]);
      const auto last = _mm512_loadu_si512(&softmax.last_visible[lane]);
      const bool all =
          _mm512_reduce_max_epi32(first) <= position && position + depth - 1 <= _mm512_reduce_min_epi32(last);
      all ? weigh<true>(lane, depth, position, score, softmax) : weigh<false>(lane, depth, position, score, softmax);
    }
    for (int64_t lane = 0; lane < lanes_; ++lane)
      if (const float by = softmax.shrink[lane]; by != 1)
        for (int64_t d = 0; d < value_dim_; d += kLanes) {
          float* const at = accumulated + lane * value_dim_ + d;
          store(at, multiply(broadcast(by), load(at)));
        }
    pack_values(values, begin, end, depth);
    tile_products<true>(weights_.data(), size_, values_.data(), value_dim_, depth, accumulated, value_dim_, lanes_,
                        value_dim_);
  }

 private:
  // Turns the scores of 16 queries into rows of weights under the softmax so far.
  template <bool ALL_VISIBLE, typename Score>
  void weigh(int64_t lane, int64_t depth, int64_t position, const Score& score, Softmax& softmax) {
    const __m512i first = _mm512_loadu_si512(&softmax.first_visible[lane]);
    const __m512i last = _mm512_loadu_si512(&softmax.last_visible[lane]);
    const Floats masked = broadcast(kMasked);
    float* const scores = &scores_[lane];
    const Floats largest = load(&softmax.largest[lane]);
    Floats now_largest = largest;
    for (int64_t key = 0; key < depth; ++key) {
      Floats x = score(load(scores + key * lanes_));
      if (!ALL_VISIBLE) {
        const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(position + key));
        x = select(_mm512_cmp_epi32_mask(at, first, _MM_CMPINT_NLT) & _mm512_cmp_epi32_mask(at, last, _MM_CMPINT_LE), x,
                   masked);
      }
      store(scores + key * lanes_, x);
      now_largest = larger(now_largest, x);
    }
    Floats sum = broadcast(0);
    auto weight = [&](int64_t key) {
      const Floats x = load(scores + key * lanes_);
      Floats grown = exponential(subtract(x, now_largest));
      if (!ALL_VISIBLE) grown = select(_mm512_cmp_ps_mask(x, masked, _CMP_NEQ_OQ), grown, broadcast(0));
      sum = add(sum, grown);
      return grown;
    };
    for (int64_t key = 0; key < depth; key += 32) {
      __m512i pairs[16], rows[16];
      for (int i = 0; i < 16; ++i) {
        const Floats even = weight(key + 2 * i), odd = weight(key + 2 * i + 1);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // the even key's, then the odd one's
        pairs[i] = _mm512_permutexvar_epi16(interleaved(), both);
      }
      transpose(pairs, rows);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(&weights_[(lane + i) * size_ + key], rows[i]);
    }
    const Floats shrink = exponential(subtract(largest, now_largest));
    store(&softmax.shrink[lane], shrink);
    store(&softmax.weight[lane], multiply_add(sum, load(&softmax.weight[lane]), shrink));
    store(&softmax.largest[lane], now_largest);
  }

  // 0, 16, 1, 17, ...
  static __m512i interleaved() {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
  }

  // Values of two keys become pairs; zeros where nothing may be read.
  void pack_values(const bf16* values, int64_t begin, int64_t end, int64_t depth) {
    auto row = [&](int64_t key) { return begin <= key && key < end ? values + key * value_dim_ : nullptr; };
    for (int64_t key = 0; key < depth; key += 2) {
      const bf16 *const even = row(key), *const odd = row(key + 1);
      uint32_t* const to = &values_[key / 2 * value_dim_];
      for (int64_t d = 0; d < value_dim_; d += 32) {
        const __m512i a = even ? _mm512_loadu_si512(even + d) : _mm512_setzero_si512();
        const __m512i b = odd ? _mm512_loadu_si512(odd + d) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + d, _mm512_unpacklo_epi16(a, b));
        _mm512_storeu_si512(to + d + 16, _mm512_unpackhi_epi16(a, b));
      }
    }
  }

  const int64_t dim_, value_dim_, size_;
  int64_t lanes_ = 0;          // queries, up to the next multiple of 16
  Scratch<uint32_t> queries_;  // [head_dim / 2, lanes], pairs of dimensions
  Scratch<float> scores_;      // [keys, lanes]
  Scratch<bf16> weights_;      // [lanes, keys]
  Scratch<uint32_t> values_;   // [keys / 2, value_dim], pairs of keys
};
#endif

}  // namespace
}  // namespace native
