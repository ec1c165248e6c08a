// Products of rows in bf16 with a weight that lies as checkpoints have it, with float32 sums. The weight is bf16, or of
// eight bits that become bf16 on their way to the registers.
//
// Up to kDotRows rows, of those that are not padding: dot products along the contiguous axis; the weight passes through
// the registers once, at the speed of the memory. More rows: a vector's lanes are rows, each element of a weight is
// broadcast to them, and no sum crosses lanes; the arithmetic is what takes time there.

#include <cstring>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace native {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 16;          // outputs that are worked on together
constexpr int64_t kAhead = 32 * 1024;   // bytes of weight between what is multiplied and what is fetched
constexpr int64_t kChunk = 128 * 1024;  // least bytes of weight that a thread takes at a time

using Rows = Operand<bf16>;
constexpr int64_t kStep = kVectorBytes / sizeof(bf16);

// `ROWS` rows of x times `OUTS` rows of w, ROWS * OUTS <= kLanes. From `ahead` on it fetches what `FETCH` of those take.
template <int ROWS, int OUTS, int FETCH, typename W>
inline void dot_tile(const Rows::Number* x, const W* w, int64_t in, float* y, int64_t out, const char* ahead) {
  Floats acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc[i] = broadcast(0);
  const int64_t stride = Rows::stride(in);
  auto step = [&](int64_t k, auto load_x, auto load_w) {
    decltype(load_x(x)) xs[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) xs[r] = load_x(x + r * stride + k);
#pragma GCC unroll 16
    for (int o = 0; o < OUTS; ++o) {
      if (o < FETCH) _mm_prefetch(ahead + (k * FETCH + o * kStep) * sizeof(W), _MM_HINT_T1);
      const auto ws = load_w(w + o * in + k);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r * OUTS + o] = multiply_add(acc[r * OUTS + o], xs[r], ws);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= in; k += kStep)
    step(k, [](const Rows::Number* from) { return Rows::load(from); }, [](const W* from) { return load(from); });
  if (const int64_t left = in - k; left)
    step(k, [left](const Rows::Number* from) { return Rows::load_first(from, left); },
         [left](const W* from) { return load_first(from, left); });
  float found[kLanes];
  store(found, sums(acc));
  for (int r = 0; r < ROWS; ++r) std::memcpy(y + r * out, found + r * OUTS, OUTS * sizeof(float));
}

// `ROWS` rows of x times `outs` rows of w.
template <int ROWS, bool AHEAD, typename W>
void dot_rows(const Rows::Number* x, const W* w, int64_t in, float* y, int64_t out, int64_t outs) {
  constexpr int kOuts = kLanes / ROWS;
  int64_t o = 0;
  for (; o + kOuts <= outs; o += kOuts) {
    const W* const from = w + o * in;
    dot_tile<ROWS, kOuts, AHEAD ? kOuts : 0>(x, from, in, y + o, out, reinterpret_cast<const char*>(from) + kAhead);
  }
  for (; o < outs; ++o) dot_tile<ROWS, 1, 0>(x, w + o * in, in, y + o, out, nullptr);
}

#ifdef NATIVE_AVX512
template <bool AHEAD>
const bf16* as_bf16(const bf16* from, int64_t, Scratch<bf16>&) {
  return from;
}

// `count` numbers in `room`, for what reads them more than once.
template <bool AHEAD, typename Byte>
const bf16* as_bf16(const Byte* from, int64_t count, Scratch<bf16>& room) {
  if (static_cast<int64_t>(room.size()) < count + kStep) room.resize(count + kStep);
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    if constexpr (AHEAD) _mm_prefetch(reinterpret_cast<const char*>(from + i) + kAhead, _MM_HINT_T1);
    _mm512_store_si512(&room[i], (__m512i)load(from + i));
  }
  if (i < count) _mm512_store_si512(&room[i], (__m512i)load_first(from + i, count - i));
  return room.data();
}

// Eight rows of x times `outs` rows of w, of which four at a time stay in the first cache for both halves of x.
template <bool AHEAD, typename W>
void dot_eight(const Rows::Number* x, const W* w, int64_t in, float* y, int64_t out, int64_t outs) {
  static thread_local Scratch<bf16> widened;
  const int64_t stride = Rows::stride(in);
  int64_t o = 0;
  for (; o + 4 <= outs; o += 4) {
    const W* const from = w + o * in;
    const bf16* const four = as_bf16<false>(from, 4 * in, widened);
    for (int half = 0; half < 2; ++half) {
      const char* const ahead = reinterpret_cast<const char*>(from + half * 2 * in) + kAhead;
      dot_tile<4, 4, AHEAD ? sizeof(W) : 0>(x + half * 4 * stride, four, in, y + half * 4 * out + o, out, ahead);
    }
  }
  for (; o < outs; ++o)
    for (int half = 0; half < 2; ++half)
      dot_tile<4, 1, 0>(x + half * 4 * stride, w + o * in, in, y + half * 4 * out + o, out, nullptr);
}
#endif

template <bool AHEAD, typename W>
void dot_block(const Rows::Number* x, int64_t rows, const W* w, int64_t in, float* y, int64_t out, int64_t outs) {
#ifdef NATIVE_AVX512
  if (rows == 8) return dot_eight<AHEAD>(x, w, in, y, out, outs);
  if constexpr (sizeof(W) < sizeof(bf16)) {
    static thread_local Scratch<bf16> widened;
    if (rows > 4) return dot_block<false>(x, rows, as_bf16<AHEAD>(w, outs * in, widened), in, y, out, outs);
  }
#endif
  const int64_t stride = Rows::stride(in);
  int64_t r = 0;
  auto take = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    if (rows - r < kRows) return;
    (AHEAD && !r ? dot_rows<kRows, true, W> : dot_rows<kRows, false, W>)(x + r * stride, w, in, y + r * out, out, outs);
    r += kRows;
  };
  take(std::integral_constant<int, 4>{});
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace native

#ifdef NATIVE_AVX512
#include "lanes_avx512.h"
#else
#include "lanes_avx2.h"
#endif

namespace native {
namespace {

template <typename W>
void few_rows(ffi::ThreadPool& pool, const bf16* given, int64_t rows, const W* w, int64_t in, int64_t out,
              float* y) {
  static thread_local Scratch<Rows::Number> prepared;
  const int64_t stride = Rows::stride(in);
  if (Rows::kPrepared) prepared.resize(rows * stride);
  const Rows::Number* const x = Rows::prepare(given, in, prepared.data());
  for (int64_t r = 1; r < rows; ++r) Rows::prepare(given + r * in, in, prepared.data() + r * stride);
  const int64_t blocks = (out + kBlock - 1) / kBlock, block_bytes = kBlock * in * sizeof(W);
  parallel_for(pool, blocks, std::max<int64_t>(1, kChunk / block_bytes), [&](int64_t begin, int64_t end) {
    const int64_t last_ahead = end - (kAhead + block_bytes - 1) / block_bytes;  // later ones fetch what others read
    for (int64_t block = begin; block < end; ++block) {
      const int64_t o = block * kBlock;
      (block < last_ahead ? dot_block<true, W> : dot_block<false, W>)(x, rows, w + o * in, in, y + o, out,
                                                                std::min(kBlock, out - o));
    }
  });
}

// Rows of x without the last ones that are all zeros, as padding is: their products are zeros too.
int64_t without_padding(const bf16* x, int64_t rows, int64_t in) {
  auto is_zero = [](bf16 number) { return !number; };
  while (rows && std::all_of(x + (rows - 1) * in, x + rows * in, is_zero)) --rows;
  return rows;
}

template <typename W>
void multiply_by(const void* weight, ffi::ThreadPool& pool, const bf16* x, int64_t rows, int64_t in, int64_t out,
                 float* y) {
  const auto run = are_few(rows, in) ? few_rows<W> : many_rows<W>;
  run(pool, x, rows, static_cast<const W*>(weight), in, out, y);
}

ffi::Error matmul_nk(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> x, ffi::AnyBuffer weight,
                     ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t in = x.dimensions()[1], out = weight.dimensions()[0];
  const bf16* const from = static_cast<const bf16*>(x.untyped_data());
  const int64_t rows = without_padding(from, x.dimensions()[0], in);
  float* const to = y->typed_data();
  std::fill(to + rows * out, to + y->element_count(), 0.0f);
  if (!rows) return ffi::Error::Success();
  decltype(&multiply_by<bf16>) run;
  switch (weight.element_type()) {
    case ffi::BF16: run = multiply_by<bf16>; break;
    case ffi::S8: run = multiply_by<int8_t>; break;
    case ffi::F8E4M3FN: run = multiply_by<fp8>; break;
    default: return ffi::Error::InvalidArgument("a weight is bfloat16, int8 or float8_e4m3fn");
  }
  run(weight.untyped_data(), pool, from, rows, in, out, to);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_matmul_nk, native::matmul_nk,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
