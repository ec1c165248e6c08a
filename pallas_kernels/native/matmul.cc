// Products of a few rows with a weight that lies as checkpoints have it, in bf16 with float32 sums (AVX512-BF16).
//
// Up to kDotRows rows: dot products along the contiguous axis; the weight passes through the registers once, at the
// speed of the memory. More rows: a vector's lanes are rows, each pair of a weight's elements is broadcast to them, and
// no sum crosses lanes; the arithmetic is what takes time there.

#include <cstring>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace native {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kDotRows = 8;
constexpr int64_t kBlock = 16;         // outputs that are worked on together
constexpr int64_t kAhead = 32 * 1024;  // bytes of weight between what is multiplied and what is fetched
constexpr int64_t kChunk = 128 * 1024;  // least bytes of weight that a thread takes at a time

// `ROWS` rows of x times `OUTS` rows of w, ROWS * OUTS <= 16. Fetches from `ahead` on `FETCH` lines at each step.
template <int ROWS, int OUTS, int FETCH>
inline void dot_tile(const bf16* x, const bf16* w, int64_t in, float* y, int64_t out, const char* ahead) {
  __m512 acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
  auto step = [&](int64_t k, auto load_at) {
    __m512bh xs[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) xs[r] = load_at(x + r * in + k);
#pragma GCC unroll 16
    for (int o = 0; o < OUTS; ++o) {
      if (o < FETCH) _mm_prefetch(ahead + (k / 32 * FETCH + o) * 64, _MM_HINT_T1);
      const __m512bh ws = load_at(w + o * in + k);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r * OUTS + o] = multiply_add(acc[r * OUTS + o], xs[r], ws);
    }
  };
  int64_t k = 0;
  for (; k + 32 <= in; k += 32) step(k, [](const bf16* from) { return load(from); });
  if (k < in) {
    const __mmask32 mask = (1u << (in - k)) - 1;
    step(k, [mask](const bf16* from) { return load(from, mask); });
  }
  float found[16];
  _mm512_storeu_ps(found, sums(acc));
  for (int r = 0; r < ROWS; ++r) std::memcpy(y + r * out, found + r * OUTS, OUTS * sizeof(float));
}

// `ROWS` rows of x times `outs` rows of w.
template <int ROWS, bool AHEAD>
void dot_rows(const bf16* x, const bf16* w, int64_t in, float* y, int64_t out, int64_t outs) {
  constexpr int kOuts = 16 / ROWS;
  int64_t o = 0;
  for (; o + kOuts <= outs; o += kOuts) {
    const bf16* const from = w + o * in;
    dot_tile<ROWS, kOuts, AHEAD ? kOuts : 0>(x, from, in, y + o, out, reinterpret_cast<const char*>(from) + kAhead);
  }
  for (; o < outs; ++o) dot_tile<ROWS, 1, 0>(x, w + o * in, in, y + o, out, nullptr);
}

// Eight rows of x times `outs` rows of w, of which four at a time stay in the first cache for both halves of x.
template <bool AHEAD>
void dot_eight(const bf16* x, const bf16* w, int64_t in, float* y, int64_t out, int64_t outs) {
  int64_t o = 0;
  for (; o + 4 <= outs; o += 4)
    for (int half = 0; half < 2; ++half) {
      const bf16* const from = w + o * in;
      const char* const ahead = reinterpret_cast<const char*>(from + half * 2 * in) + kAhead;
      dot_tile<4, 4, AHEAD ? 2 : 0>(x + half * 4 * in, from, in, y + half * 4 * out + o, out, ahead);
    }
  for (; o < outs; ++o)
    for (int half = 0; half < 2; ++half)
      dot_tile<4, 1, 0>(x + half * 4 * in, w + o * in, in, y + half * 4 * out + o, out, nullptr);
}

template <bool AHEAD>
void dot_block(const bf16* x, int64_t rows, const bf16* w, int64_t in, float* y, int64_t out, int64_t outs) {
  if (rows == 8) return dot_eight<AHEAD>(x, w, in, y, out, outs);
  int64_t r = 0;
  auto take = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    if (rows - r < kRows) return;
    (AHEAD && !r ? dot_rows<kRows, true> : dot_rows<kRows, false>)(x + r * in, w, in, y + r * out, out, outs);
    r += kRows;
  };
  take(std::integral_constant<int, 4>{});
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

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

void few_rows(ffi::ThreadPool& pool, const bf16* x, int64_t rows, const bf16* w, int64_t in, int64_t out, float* y) {
  const int64_t blocks = (out + kBlock - 1) / kBlock, block_bytes = kBlock * in * sizeof(bf16);
  parallel_for(pool, blocks, std::max<int64_t>(1, kChunk / block_bytes), [&](int64_t begin, int64_t end) {
    const int64_t last_ahead = end - (kAhead + block_bytes - 1) / block_bytes;  // later ones fetch what others read
    for (int64_t block = begin; block < end; ++block) {
      const int64_t o = block * kBlock;
      (block < last_ahead ? dot_block<true> : dot_block<false>)(x, rows, w + o * in, in, y + o, out,
                                                                std::min(kBlock, out - o));
    }
  });
}

void many_rows(ffi::ThreadPool& pool, const bf16* x, int64_t rows, const bf16* w, int64_t in, int64_t out, float* y) {
  static thread_local std::vector<uint32_t> packed;  // kept: fresh memory would cost a page fault every 4 KiB
  std::vector<Panel> panels;
  int64_t size = 0;
  for (int64_t r = 0; r < rows; r += 32) {
    const int64_t here = std::min<int64_t>(32, rows - r), lanes = here > 16 ? 32 : 16;
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
    }
  });
}

ffi::Error matmul_nk(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> x, ffi::BufferR2<ffi::BF16> weight,
                     ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], in = x.dimensions()[1], out = weight.dimensions()[0];
  const auto run = rows <= kDotRows ? few_rows : many_rows;
  run(pool, static_cast<const bf16*>(x.untyped_data()), rows, static_cast<const bf16*>(weight.untyped_data()), in, out,
      y->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_matmul_nk, native::matmul_nk,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
