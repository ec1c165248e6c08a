// Products of many rows with AVX512-BF16: a vector's lanes are rows, pairs of a weight's elements are broadcast to
// them. Where there are AMX's tiles, those take what makes whole ones: 16 rows of the weight, as they lie, times 16
// lanes.
#pragma once

#include <optional>
#include <vector>

#include "parallel.h"
#include "tiles_amx.h"
#include "vectors.h"

namespace native {
namespace {

// 16 * VECTORS rows of x, packed, times `OUTS` rows of w. From `ahead` on it fetches `FETCH` bytes for each number of w.
template <int VECTORS, int OUTS, int FETCH>
inline void lane_tile(const uint32_t* packed, int64_t rows, const bf16* w, int64_t in, float* y, int64_t out,
                      const char* ahead) {
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
  for (int64_t pair = 0; pair < in / 2; ++pair) {
    if constexpr (FETCH > 0) {
      constexpr int kPairs = 32 / OUTS / FETCH;  // that a line of 64 bytes is for
      if (pair % kPairs == 0) _mm_prefetch(ahead + pair / kPairs * 64, _MM_HINT_T1);
    }
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

// Whether products over `in` numbers are those of whole tiles.
bool takes_tiles(int64_t in) { return in % kTileDepth == 0 && tiles_are_allowed(); }

#ifdef __AMX_BF16__
// 16 * VECTORS rows of x, packed, times 16 * OUT_TILES rows of w. Fetches nothing ahead: these CPUs' own prefetchers
// follow the rows of the weight, and lines that are asked for too early keep x from coming out of the second cache.
template <int VECTORS, int OUT_TILES>
inline void tile_of_outs(const uint32_t* packed, int64_t rows, const bf16* w, int64_t in, float* y, int64_t out) {
  constexpr int64_t kRows = 16 * VECTORS, kOuts = 16 * OUT_TILES;
  alignas(64) float found[kOuts][kRows];
  tile_product<OUT_TILES, VECTORS, false>(w, in, packed, kRows, in, found[0], kRows);
  for (int v = 0; v < VECTORS; ++v)
    for (int64_t o = 0; o < kOuts; o += 16) {
      __m512i outs[16], lanes[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) outs[i] = _mm512_load_si512(&found[o + i][16 * v]);
      transpose(outs, lanes);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (16 * v + i < rows) _mm512_storeu_si512(y + (16 * v + i) * out + o, lanes[i]);
    }
}

// 16 * VECTORS rows of x, packed, times those rows of w that make whole tiles: how many they are.
template <int VECTORS>
int64_t tile_block(const uint32_t* packed, int64_t rows, const bf16* w, int64_t in, float* y, int64_t out,
                   int64_t outs) {
  int64_t o = 0;
  for (; o + 32 <= outs; o += 32) tile_of_outs<VECTORS, 2>(packed, rows, w + o * in, in, y + o, out);
  if (o + 16 <= outs) tile_of_outs<VECTORS, 1>(packed, rows, w + o * in, in, y + o, out), o += 16;
  return o;
}
#else
template <int VECTORS>
int64_t tile_block(const uint32_t*, int64_t, const bf16*, int64_t, float*, int64_t, int64_t) {
  return 0;
}
#endif

template <int VECTORS, int FETCH>
void lane_block(const uint32_t* packed, int64_t rows, const bf16* w, int64_t in, float* y, int64_t out, int64_t outs,
                bool tiles, const char* ahead) {
  int64_t o = tiles ? tile_block<VECTORS>(packed, rows, w, in, y, out, outs) : 0;
  for (; o + 8 <= outs; o += 8)
    lane_tile<VECTORS, 8, FETCH>(packed, rows, w + o * in, in, y + o, out, ahead + o * in * FETCH);
  for (; o < outs; ++o) lane_tile<VECTORS, 1, 0>(packed, rows, w + o * in, in, y + o, out, ahead);
}

constexpr int64_t kTileChunk = 512 * 1024;  // bytes of weight that stay in the second cache for all rows

struct Panel {
  int64_t first, rows, lanes, offset;  // offset: where its packed rows begin
};

// Whether so many rows are a matter of dot products: of a weight that is read at the memory's speed.
bool are_few(int64_t rows, int64_t in) { return rows <= (takes_tiles(in) ? kDotRows / 2 : kDotRows); }

template <typename Weight>
void many_rows(xla::ffi::ThreadPool& pool, const bf16* x, int64_t rows, const Weight& weight, int64_t in, int64_t out,
               float* y) {
  static thread_local Scratch<uint32_t> packed;  // kept: fresh memory would cost a page fault every 4 KiB
  std::vector<Panel> panels;
  int64_t size = 0;
  const bool in_tiles = takes_tiles(in);
  const int64_t alone = !in_tiles && rows % 16 <= kDotRows ? rows % 16 : 0;  // not worth a vector's lanes: dot products
  for (int64_t r = 0; r < rows - alone; r += 32) {
    const int64_t here = std::min<int64_t>(32, rows - alone - r), lanes = here > 16 ? 32 : 16;
    panels.push_back({r, here, lanes, size});
    size += (in + 1) / 2 * lanes;
  }
  if (static_cast<int64_t>(packed.size()) < size) packed.resize(size);
  uint32_t* const lanes_of_x = packed.data();
  parallel_for(pool, panels.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pack_lanes([&](int64_t lane) { return lane < panels[i].rows ? x + (panels[i].first + lane) * in : nullptr; },
                 panels[i].lanes, in, lanes_of_x + panels[i].offset);
  });
  const int64_t blocks = (out + kBlock - 1) / kBlock, block_bytes = kBlock * in * sizeof(bf16);
  const int64_t together = std::max<int64_t>(in_tiles ? 2 : 1, (in_tiles ? kTileChunk : kChunk) / block_bytes);
  parallel_for(pool, blocks, std::max<int64_t>(1, kChunk / block_bytes), [&](int64_t begin, int64_t end) {
    static thread_local Scratch<bf16> widened;
    std::optional<Tiles> tiles;
    if (in_tiles) tiles.emplace();
    for (int64_t block = begin; block < end; block += together) {
      const int64_t o = block * kBlock, outs = std::min(std::min(together, end - block) * kBlock, out - o);
      const bf16* const w = weight.rows(o, outs, widened);
      const char* const later = weight.next(o, outs);
      bool ahead = block + together < end;
      for (const Panel& panel : panels) {
        auto run = panel.lanes == 32 ? (ahead ? lane_block<2, Weight::kFetched> : lane_block<2, 0>)
                                     : (ahead ? lane_block<1, Weight::kFetched> : lane_block<1, 0>);
        run(lanes_of_x + panel.offset, panel.rows, w, in, y + panel.first * out + o, out, outs, in_tiles, later);
        ahead = false;
      }
      const int64_t first = rows - alone;
      for (int64_t i = 0; alone && i < outs; i += kBlock)
        dot_block<false>(x + first * in, alone, w + i * in, in, y + first * out + o + i, out,
                         std::min(kBlock, outs - i));
    }
  });
}

}  // namespace
}  // namespace native
