// Products in AMX's tiles: 16 rows of 32 numbers in bf16 times 16 columns, with float32 sums.
#pragma once

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "vectors.h"

namespace native {
namespace {

constexpr int64_t kTileDepth = 32;  // numbers of a row

#ifdef __AMX_BF16__
// Whether the operating system lets this process use tiles. The first call asks it to.
bool tiles_are_allowed() {
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  return allowed;
}

// Eight whole tiles for the calling thread while this lives; what it had before comes back, others rely on theirs.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    Config whole;
    for (int tile = 0; tile < 8; ++tile) whole.row_bytes[tile] = 64, whole.rows[tile] = 16;
    _tile_loadconfig(&whole);
  }
  ~Tiles() { _tile_loadconfig(&before_); }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Config before_;
};

// c = a b, or c += a b, of 16 * M rows and 16 * N columns. a has rows of `depth` numbers, b's rows are pairs of
// neighbours, strides count elements.
template <int M, int N, bool ADD>
inline void tile_product(const bf16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth, float* c,
                         int64_t c_stride) {
  const int64_t a_bytes = a_stride * sizeof(bf16), b_bytes = b_stride * sizeof(uint32_t);
  const int64_t c_bytes = c_stride * sizeof(float);
  float* const low = c + 16 * c_stride;
  if constexpr (ADD) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (N > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (M > 1) _tile_loadd(2, low, c_bytes);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, low + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (M > 1) _tile_zero(2);
    if constexpr (M > 1 && N > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    const uint32_t* const pairs = b + k / 2 * b_stride;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, pairs, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, pairs + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (N > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (M > 1) _tile_stored(2, low, c_bytes);
  if constexpr (M > 1 && N > 1) _tile_stored(3, low + 16, c_bytes);
}

// `tile_product` of `rows` and `columns`, multiples of 16.
template <bool ADD>
void tile_products(const bf16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth, float* c,
                   int64_t c_stride, int64_t rows, int64_t columns) {
  auto here = [&](auto m, auto n, int64_t i, int64_t j) {
    tile_product<decltype(m)::value, decltype(n)::value, ADD>(a + i * a_stride, a_stride, b + j, b_stride, depth,
                                                              c + i * c_stride + j, c_stride);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  auto row_of_tiles = [&](auto m, int64_t i) {
    int64_t j = 0;
    for (; j + 32 <= columns; j += 32) here(m, two, i, j);
    if (j < columns) here(m, one, i, j);
  };
  int64_t i = 0;
  for (; i + 32 <= rows; i += 32) row_of_tiles(two, i);
  if (i < rows) row_of_tiles(one, i);
}
#else
constexpr bool tiles_are_allowed() { return false; }

struct Tiles {};
#endif

}  // namespace
}  // namespace native
