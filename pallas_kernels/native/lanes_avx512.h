// Products of many rows with AVX512-BF16: a vector's lanes are rows, pairs of a weight's elements are broadcast to them.
#pragma once

#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace native {
namespace {

// 16 * VECTORS rows of x, packed, times `OUTS` rows of w.
template <int VECTORS, int OUTS, bool AHEAD>
inline void lane_tile(const uint32_t* packed, int64_t rows, const bf16* w, int64_t in, float* y, int64_t out) {
  __m512 acc[OUTS][VECTORS];
#pragma GCC unroll 16
  for (int o = 0; o < OUTS; ++o)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) acc[o][v] = _mm512_setzero_ps();
  auto step = [&](int64_t pair, auto weight_at) {
    __m512bh xs[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) xs[v] = (__m512bh)_mm512_loadu_si512(packed + (pair * VECTORS + v) * 16);
#pragma GCC unroll 16
    for (int o = 0; o < OUTS; ++o) {
      const __m512bh ws = (__m512bh)_mm512_set1_epi32(weight_at(w + o * in + 2 * pair));
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) acc[o][v] = _mm512_dpbf16_ps(acc[o][v], xs[v], ws);
    }
  };
  const char* ahead = reinterpret_cast<const char*>(w) + kAhead;
  for (int64_t pair = 0; pair < in / 2; ++pair) {
    if constexpr (AHEAD)
      if (pair % (16 / OUTS) == 0) _mm_prefetch(ahead + pair / (16 / OUTS) * 64, _MM_HINT_T1);
    step(pair, [](const bf16* from) {
      int32_t both;
      std::memcpy(&both, from, sizeof both);
      return both;
    });
  }
  if (in % 2) step(in / 2, [](const bf16* from) { return static_cast<int32_t>(*from); });
  alignas(64) float found[OUTS][16 * VECTORS];
  for (int o = 0; o < OUTS; ++o)
    for (int v = 0; v < VECTORS; ++v) _mm512_store_ps(&found[o][16 * v], acc[o][v]);
  for (int64_t r = 0; r < rows; ++r)
    for (int o = 0; o < OUTS; ++o) y[r * out + o] = found[o][r];
}

template <int VECTORS, bool AHEAD>
void lane_block(const uint32_t* packed, int64_t rows, const bf16* w, int64_t in, float* y, int64_t out, int64_t outs) {
  int64_t o = 0;
  for (; o + 8 <= outs; o += 8) lane_tile<VECTORS, 8, AHEAD>(packed, rows, w + o * in, in, y + o, out);
  for (; o < outs; ++o) lane_tile<VECTORS, 1, false>(packed, rows, w + o * in, in, y + o, out);
}

// Rows of x as lanes: `[(in + 1) / 2, lanes]` pairs of neighbours in a row, zeros in what is over.
void pack(const bf16* x, int64_t rows, int64_t lanes, int64_t in, uint32_t* packed) {
  for (int64_t r = 0; r < lanes; r += 16)
    for (int64_t k = 0; k < in; k += 32) {
      const __mmask32 mask = in - k < 32 ? (1u << (in - k)) - 1 : ~0u;
      __m512i from[16], to[16];
      for (int i = 0; i < 16; ++i) from[i] = r + i < rows ? (__m512i)load(x + (r + i) * in + k, mask) : __m512i{};
      transpose(from, to);
      for (int i = 0; i < 16 && k / 2 + i < (in + 1) / 2; ++i)
        _mm512_storeu_si512(packed + (k / 2 + i) * lanes + r, to[i]);
    }
}

struct Panel {
  int64_t first, rows, lanes, offset;  // offset: where its packed rows begin
};

void many_rows(xla::ffi::ThreadPool& pool, const bf16* x, int64_t rows, const bf16* w, int64_t in, int64_t out, float* y) {
  static thread_local std::vector<uint32_t> packed;  // kept: fresh memory would cost a page fault every 4 KiB
  std::vector<Panel> panels;
  int64_t size = 0;
  const int64_t alone = rows % 16 <= kDotRows ? rows % 16 : 0;  // not worth a vector's lanes: dot products
  for (int64_t r = 0; r < rows - alone; r += 32) {
    const int64_t here = std::min<int64_t>(32, rows - alone - r), lanes = here > 16 ? 32 : 16;
    panels.push_back({r, here, lanes, size});
    size += (in + 1) / 2 * lanes;
  }
  if (static_cast<int64_t>(packed.size()) < size) packed.resize(size);
  uint32_t* const lanes_of_x = packed.data();
  for (const Panel& panel : panels)
    pack(x + panel.first * in, panel.rows, panel.lanes, in, lanes_of_x + panel.offset);
  const int64_t blocks = (out + kBlock - 1) / kBlock, block_bytes = kBlock * in * sizeof(bf16);
  const int64_t together = std::max<int64_t>(1, kChunk / block_bytes);
  parallel_for(pool, blocks, together, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += together) {
      const int64_t o = block * kBlock, outs = std::min(std::min(together, end - block) * kBlock, out - o);
      bool ahead = block + together < end;
      for (const Panel& panel : panels) {
        auto run = panel.lanes == 32 ? (ahead ? lane_block<2, true> : lane_block<2, false>)
                                     : (ahead ? lane_block<1, true> : lane_block<1, false>);
        run(lanes_of_x + panel.offset, panel.rows, w + o * in, in, y + panel.first * out + o, out, outs);
        ahead = false;
      }
      const int64_t first = rows - alone;
      for (int64_t i = 0; alone && i < outs; i += kBlock)
        dot_block<false>(x + first * in, alone, w + (o + i) * in, in, y + first * out + o + i, out,
                         std::min(kBlock, outs - i));
    }
  });
}

}  // namespace
}  // namespace native
