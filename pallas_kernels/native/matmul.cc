// Products of rows in bf16 with a weight that lies as checkpoints have it, with float32 sums. The weight is bf16, or of
// eight or four bits that become bf16 on their way to the registers.
//
// Up to kDotRows rows, of those that are not padding: dot products along the contiguous axis; the weight passes through
// the registers once, at the speed of the memory. More rows: a vector's lanes are rows, each element of a weight is
// broadcast to them, and no sum crosses lanes; the arithmetic is what takes time there.

#include <cstring>
#include <vector>

#include "int4.h"
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

// As many rows of x times as many of w as there are sums to hold. `BY_FOURS`: x is in the order of `decode_by_fours`. One
// row of w comes after the other, for a single stream from memory; the sums of its groups depend on no earlier ones.
template <int ROWS, int OUTS, bool BY_FOURS>
inline void int4_tile(const Rows::Number* x, const Int4& w, int64_t first, float* y, int64_t out) {
  constexpr int kVectors = BY_FOURS ? 4 : 1;
  const int64_t stride = Rows::stride(w.in), group = w.group();
  Floats acc[kLanes] = {};
  for (int o = 0; o < OUTS; ++o) {
    Floats totals[ROWS];
    for (int r = 0; r < ROWS; ++r) totals[r] = broadcast(0);
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t own = (first + o) * w.groups + g;
      const Decoded& values = decoded_integers(w.zeros[own]);
      const Floats scale = broadcast(w.scales[own]);
      for (int64_t k = g * group; k < (g + 1) * group; k += kVectors * kNumbers) {
        const uint8_t* const pairs = w.pairs_of(first + o, k);
        _mm_prefetch(reinterpret_cast<const char*>(pairs) + kInt4Ahead, _MM_HINT_T1);
        decltype(Rows::load(x)) ws[kVectors];
        if constexpr (BY_FOURS)
          decode_by_fours(pairs, values, ws);
        else
          ws[0] = decode(pairs, values);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          Floats sum = broadcast(0);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            sum = multiply_add(sum, Rows::load(x + r * stride + k + v * kNumbers), ws[v]);
          totals[r] = multiply_add(totals[r], sum, scale);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) acc[r * OUTS + o] = totals[r];
  }
  float found[kLanes];
  store(found, sums(acc));
  for (int r = 0; r < ROWS; ++r) std::memcpy(y + r * out, found + r * OUTS, OUTS * sizeof(float));
}

constexpr int kInt4Rows = 4;  // of x, up to which it is dot products that a weight of four bits is decoded for

template <int ROWS, bool BY_FOURS>
void int4_rows(const Rows::Number* x, const Int4& w, int64_t begin, int64_t end, float* y, int64_t out) {
  constexpr int kOuts = kLanes / ROWS;
  int64_t o = begin;
  for (; o + kOuts <= end; o += kOuts) int4_tile<ROWS, kOuts, BY_FOURS>(x, w, o, y + o, out);
  for (; o < end; ++o) int4_tile<ROWS, 1, BY_FOURS>(x, w, o, y + o, out);
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

const Rows::Number* prepared_rows(const bf16* given, int64_t rows, int64_t in) {
  static thread_local Scratch<Rows::Number> prepared;
  const int64_t stride = Rows::stride(in);
  if (Rows::kPrepared) prepared.resize(rows * stride);
  const Rows::Number* const x = Rows::prepare(given, in, prepared.data());
  for (int64_t r = 1; r < rows; ++r) Rows::prepare(given + r * in, in, prepared.data() + r * stride);
  return x;
}

template <typename W>
void few_rows(ffi::ThreadPool& pool, const bf16* given, int64_t rows, const W* w, int64_t in, int64_t out,
              float* y) {
  const Rows::Number* const x = prepared_rows(given, rows, in);
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

// A weight whose numbers lie one by one, for many rows.
template <typename W>
struct Plain {
  const W* numbers;
  int64_t in;

  // Bytes of a number, as many as which are fetched for each that is multiplied.
  static constexpr int kFetched = sizeof(W);

#ifdef NATIVE_AVX512
  const bf16* rows(int64_t o, int64_t outs, Scratch<bf16>& room) const {
    return as_bf16<false>(numbers + o * in, outs * in, room);
  }

  // What to fetch while those rows are multiplied. Of what was widened all has been read.
  const char* next(int64_t o, int64_t outs) const {
    const int64_t read = sizeof(W) == sizeof(bf16) ? kAhead : outs * in;
    return reinterpret_cast<const char*>(numbers + o * in) + read;
  }
#else
  void widen(int64_t o, int64_t first, int64_t count, float* to) const { convert(numbers + o * in + first, count, to); }
#endif
};

template <typename W>
void multiply_by(const void* weight, ffi::ThreadPool& pool, const bf16* x, int64_t rows, int64_t in, int64_t out,
                 float* y) {
  const W* const numbers = static_cast<const W*>(weight);
  if (are_few(rows, in)) return few_rows(pool, x, rows, numbers, in, out, y);
  many_rows(pool, x, rows, Plain<W>{numbers, in}, in, out, y);
}

template <bool BY_FOURS>
void few_int4_rows(ffi::ThreadPool& pool, const Rows::Number* x, int64_t rows, const Int4& w, int64_t out, float* y) {
  constexpr decltype(&int4_rows<1, BY_FOURS>) kByRows[kInt4Rows] = {int4_rows<1, BY_FOURS>, int4_rows<2, BY_FOURS>,
                                                                    int4_rows<3, BY_FOURS>, int4_rows<4, BY_FOURS>};
  const int64_t blocks = (out + kBlock - 1) / kBlock, block_bytes = kBlock * w.in / 2;
  parallel_for(pool, blocks, std::max<int64_t>(1, kChunk / block_bytes), [&](int64_t begin, int64_t end) {
    kByRows[rows - 1](x, w, begin * kBlock, std::min(end * kBlock, out), y, out);
  });
}

void multiply_by(const Int4& w, ffi::ThreadPool& pool, const bf16* x, int64_t rows, int64_t out, float* y) {
  const bool few = rows <= (takes_tiles(w.in) ? kInt4Rows / 2 : kInt4Rows) && w.group() % kNumbers == 0;
#ifdef NATIVE_AVX512
  if (w.group() % kByFours == 0) {
    static thread_local Scratch<bf16> ordered;
    if (static_cast<int64_t>(ordered.size()) < rows * w.in) ordered.resize(rows * w.in);
    for (int64_t k = 0; k < rows * w.in; k += kByFours) order_by_fours(x + k, &ordered[k]);
    if (few) return few_int4_rows<true>(pool, ordered.data(), rows, w, out, y);
    x = ordered.data();
  }
#endif
  if (!few) return many_rows(pool, x, rows, w, w.in, out, y);
  few_int4_rows<false>(pool, prepared_rows(x, rows, w.in), rows, w, out, y);
}

// The rows that are multiplied; the products of the others are there already.
int64_t begin_product(const ffi::BufferR2<ffi::BF16>& x, ffi::ResultBufferR2<ffi::F32>& y) {
  const int64_t out = y->dimensions()[1];
  const int64_t rows = without_padding(static_cast<const bf16*>(x.untyped_data()), x.dimensions()[0], x.dimensions()[1]);
  std::fill(y->typed_data() + rows * out, y->typed_data() + y->element_count(), 0.0f);
  return rows;
}

ffi::Error matmul_nk(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> x, ffi::AnyBuffer weight,
                     ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t in = x.dimensions()[1], out = weight.dimensions()[0];
  const int64_t rows = begin_product(x, y);
  if (!rows) return ffi::Error::Success();
  decltype(&multiply_by<bf16>) run;
  switch (weight.element_type()) {
    case ffi::BF16: run = multiply_by<bf16>; break;
    case ffi::S8: run = multiply_by<int8_t>; break;
    case ffi::F8E4M3FN: run = multiply_by<fp8>; break;
    default: return ffi::Error::InvalidArgument("a weight is bfloat16, int8 or float8_e4m3fn");
  }
  run(weight.untyped_data(), pool, static_cast<const bf16*>(x.untyped_data()), rows, in, out, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error matmul_nk_int4(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> x, ffi::BufferR2<ffi::U8> weight,
                          ffi::BufferR2<ffi::F32> scale, ffi::BufferR2<ffi::S8> zero,
                          ffi::ResultBufferR2<ffi::F32> y) {
  const Int4 w{weight.typed_data(), scale.typed_data(), zero.typed_data(), x.dimensions()[1], scale.dimensions()[1]};
  const int64_t rows = begin_product(x, y);
  if (!rows) return ffi::Error::Success();
  multiply_by(w, pool, static_cast<const bf16*>(x.untyped_data()), rows, weight.dimensions()[0], y->typed_data());
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_matmul_nk_int4, native::matmul_nk_int4,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::U8>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::S8>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
