// Products of many rows with AVX2: rows and weights become float32, each once for all that it is multiplied with.
//
// A vector's lanes are rows of x: 16 of them, or 8, are a panel, `[in, lanes]`. A thread takes some outputs, converts a
// part of their weights that stays in the second cache, and multiplies every panel with it, six outputs at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace native {
namespace {

constexpr int64_t kPanel = 16;       // rows of x
constexpr int64_t kOuts = 48;        // outputs whose weights are converted together
constexpr int64_t kDepth = 1024;     // of their inputs
constexpr int kTile = 6;             // outputs of a step: 6 * 2 sums, 2 vectors of x and one of a weight are in registers

// Adds the products of `depth` inputs of 8 * VECTORS rows and `OUTS` outputs to y; `first` ones replace what is there.
template <int VECTORS, int OUTS>
inline void lane_tile(const float* panel, int64_t rows, const float* w, int64_t depth, float* y, int64_t out,
                      bool first) {
  Floats acc[OUTS][VECTORS];
#pragma GCC unroll 8
  for (int o = 0; o < OUTS; ++o)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) acc[o][v] = broadcast(0);
  for (int64_t k = 0; k < depth; ++k) {
    Floats xs[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) xs[v] = load(panel + (k * VECTORS + v) * kLanes);
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; ++o) {
      const Floats ws = broadcast(w[o * kDepth + k]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) acc[o][v] = multiply_add(acc[o][v], xs[v], ws);
    }
  }
  alignas(32) float found[OUTS][kLanes * VECTORS];
  for (int o = 0; o < OUTS; ++o)
    for (int v = 0; v < VECTORS; ++v) store(&found[o][kLanes * v], acc[o][v]);
  for (int64_t r = 0; r < rows; ++r)
    for (int o = 0; o < OUTS; ++o) y[r * out + o] = first ? found[o][r] : y[r * out + o] + found[o][r];
}

template <int VECTORS>
void lane_block(const float* panel, int64_t rows, const float* w, int64_t depth, float* y, int64_t out, int64_t outs,
                bool first) {
  int64_t o = 0;
  for (; o + kTile <= outs; o += kTile)
    lane_tile<VECTORS, kTile>(panel, rows, w + o * kDepth, depth, y + o, out, first);
  for (; o + 2 <= outs; o += 2) lane_tile<VECTORS, 2>(panel, rows, w + o * kDepth, depth, y + o, out, first);
  if (o < outs) lane_tile<VECTORS, 1>(panel, rows, w + o * kDepth, depth, y + o, out, first);
}

float as_float(bf16 bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float number;
  std::memcpy(&number, &wide, sizeof number);
  return number;
}

// Rows of x as a panel, `[in, lanes]`, with zeros for rows that are not there.
void pack(const bf16* x, int64_t rows, int64_t lanes, int64_t in, float* panel) {
  if (rows < lanes) std::fill(panel, panel + in * lanes, 0.0f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < in; ++k) panel[k * lanes + r] = as_float(x[r * in + k]);
}

void convert(const bf16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = as_float(from[i]);
}

void convert(const int8_t* from, int64_t count, float* to) { std::copy(from, from + count, to); }

void convert(const fp8* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t some = std::min<int64_t>(8, count - i);
    alignas(32) float numbers[8];
    int64_t bytes = 0;
    std::memcpy(&bytes, from + i, some);
    store(numbers, widened(from, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes))));
    std::copy(numbers, numbers + some, to + i);
  }
}

constexpr bool takes_tiles(int64_t) { return false; }

bool are_few(int64_t rows, int64_t) { return rows <= kDotRows; }

template <typename Weight>
void many_rows(xla::ffi::ThreadPool& pool, const bf16* x, int64_t rows, const Weight& weight, int64_t in, int64_t out,
               float* y) {
  static thread_local Scratch<float> kept;  // fresh memory would cost a page fault every 4 KiB
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  if (static_cast<int64_t>(kept.size()) < panels * kPanel * in) kept.resize(panels * kPanel * in);
  float* const packed = kept.data();
  auto rows_of = [&](int64_t panel) { return std::min(kPanel, rows - panel * kPanel); };
  auto lanes_of = [&](int64_t panel) { return rows_of(panel) > kLanes ? kPanel : kLanes; };
  parallel_for(pool, panels, std::max<int64_t>(1, kChunk / (kPanel * in)), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      pack(x + panel * kPanel * in, rows_of(panel), lanes_of(panel), in, packed + panel * kPanel * in);
  });
  parallel_for(pool, (out + kOuts - 1) / kOuts, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch<float> weights(kOuts * kDepth);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t o = block * kOuts, outs = std::min(kOuts, out - o);
      for (int64_t k = 0; k < in; k += kDepth) {
        const int64_t depth = std::min(kDepth, in - k);
        for (int64_t i = 0; i < outs; ++i) weight.widen(o + i, k, depth, &weights[i * kDepth]);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t lanes = lanes_of(panel);
          const auto run = lanes == kPanel ? lane_block<2> : lane_block<1>;
          run(packed + panel * kPanel * in + k * lanes, rows_of(panel), weights.data(), depth,
              y + panel * kPanel * out + o, out, outs, !k);
        }
      }
    }
  });
}

}  // namespace
}  // namespace native
