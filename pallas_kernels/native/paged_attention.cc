// Attention of each sequence's newest tokens over its own pages, in bf16 or float32.
//
// A thread takes one KV head of a few tokens of one sequence at a time and reads its keys and values once, page by
// page, under a running softmax. Pages lie in memory as [pages, kv_heads, page_size, head_dim], so that a page's keys
// of one head are one stretch; while they are multiplied, the page's values are fetched, and meanwhile the next page's
// keys.
//
// Sequences whose first pages are the same, those of a shared prefix, attend to these together, and then each to its
// own (as Hydragen does, arXiv:2402.05099): such a page is read once, and there are queries enough to fill tiles.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "attention_amx.h"
#include "parallel.h"
#include "softmax.h"
#include "vectors.h"

namespace native {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kLeastBytes = 32 * 1024;  // of keys and values, that a thread takes at a time
constexpr int64_t kKeyCost = 8;  // what it takes to read a key and a value, in what it takes to attend to them once
constexpr int64_t kTileQueries = 16;  // of one head, from which on they attend in tiles where there are some
constexpr int64_t kTogether = 64;     // query vectors of one head, of sequences that share pages

struct Shape {
  int64_t heads, kv_heads, head_dim, value_dim, page_size, pages, max_pages;
  int64_t window;         // 0: all positions
  float scale, soft_cap;  // soft_cap 0: none

  // The scores that a query's products with keys make.
  Floats score(Floats product) const {
    const Floats x = multiply(product, broadcast(scale));
    if (!soft_cap) return x;
    const Floats cap = broadcast(soft_cap), one = broadcast(1), two = broadcast(2);  // tanh(x) = 1 - 2 / (e^2x + 1)
    const Floats grown = exponential(smaller(multiply(two, divide(x, cap)), broadcast(80)));
    return multiply(cap, subtract(one, divide(two, add(grown, one))));
  }
};

template <typename T>
struct Arrays {
  const T *q, *k_pages, *v_pages;  // q [tokens, heads, head_dim]
  const int32_t* page_table;
  const float* sinks;  // or null
  T* out;              // [tokens, heads, value_dim]
};

// Tokens of one sequence, from flat index `start` on, the first at `position`.
struct Queries {
  int64_t row, start, count, position;
};

// Queries that attend in one go. The first pages of their sequences, as many as are `shared`, are the same.
struct Together {
  std::vector<Queries> members;
  int64_t shared = 0;

  int64_t tokens() const {
    int64_t sum = 0;
    for (const Queries& some : members) sum += some.count;
    return sum;
  }
};

// What one thread works in. Its query vectors are those of one KV head, each token's one after the other.
template <typename T>
struct Worker {
  using Query = typename Operand<T>::Number;
  using Weight = typename Values<T>::Weight;

  const Shape& shape;
  const Arrays<T>& arrays;
  const int64_t group, width;  // width: keys of a page, with room for whole registers
  int64_t vectors = 0;
  std::vector<const Query*> q;
  Scratch<Query> prepared;     // what `q` points into, unless queries are used as they lie
  Scratch<float> scores;       // [vectors, width]
  Scratch<Weight> weights;     // [vectors, width]
  Scratch<float> accumulated;  // [vectors, value_dim]
  Softmax softmax;             // [vectors]
  std::optional<TileAttention<T>> tiles;

  // For up to `most` tokens of a head at a time.
  Worker(const Shape& s, const Arrays<T>& a, int64_t most)
      : shape(s), arrays(a), group(s.heads / s.kv_heads), width((s.page_size + 31) / 16 * 16),
        q((most * group + 15) / 16 * 16),
        prepared(Operand<T>::kPrepared ? q.size() * Operand<T>::stride(s.head_dim) : 0),
        scores(q.size() * width), weights(q.size() * width), accumulated(q.size() * s.value_dim), softmax(q.size()) {
    if (most * group >= kTileQueries && TileAttention<T>::suits(s.head_dim, s.value_dim, s.page_size))
      tiles.emplace(s.head_dim, s.value_dim, s.page_size, q.size());
  }

  // Scores of `VECTORS` queries and keys [begin, end) of a page; fetches `ahead`, where as much lies.
  template <int VECTORS, bool AHEAD>
  void score(int64_t vector, const T* keys, int64_t begin, int64_t end, const T* ahead) {
    constexpr int kKeys = kLanes / VECTORS;
    const int64_t dim = shape.head_dim, step = kVectorBytes / sizeof(T);
    for (int64_t key = begin; key < end; key += kKeys) {
      Floats acc[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) acc[i] = broadcast(0);
      const T* rows[kKeys];
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) rows[i] = keys + std::min(key + i, end - 1) * dim;
      for (int64_t d = 0; d < dim; d += step) {
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) {
          if constexpr (AHEAD) _mm_prefetch(ahead + (key + i) * dim + d, _MM_HINT_T1);
          const auto k = load(rows[i] + d);
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v)
            acc[v * kKeys + i] = multiply_add(acc[v * kKeys + i], k, Operand<T>::load(q[vector + v] + d));
        }
      }
      float found[kLanes];
      store(found, sums(acc));
      for (int v = 0; v < VECTORS; ++v)
        std::memcpy(&scores[(vector + v) * width + key - begin], found + v * kKeys, kKeys * sizeof(float));
    }
  }

  // Turns the scores of keys [begin, end), whose first is at `position`, into weights under the softmax so far.
  void weigh(int64_t vector, int64_t position, int64_t count) {
    float* const s = &scores[vector * width];
    const int64_t first = std::max<int64_t>(softmax.first_visible[vector] - position, 0);
    const int64_t last = std::min<int64_t>(softmax.last_visible[vector] - position, count - 1);
    Floats top = broadcast(kMasked);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats x = select(within(i, first, last), shape.score(load(s + i)), broadcast(kMasked));
      store(s + i, x);
      top = larger(top, x);
    }
    const float now_largest = std::max(softmax.largest[vector], largest_of(top));
    Floats sum = broadcast(0);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats grown = exponential(subtract(load(s + i), broadcast(now_largest)));
      const Floats weights_here = select(within(i, first, last), grown, broadcast(0));
      sum = add(sum, weights_here);
      Values<T>::store_weights(&weights[vector * width + i], weights_here);
    }
    softmax.shrink[vector] = std::exp(softmax.largest[vector] - now_largest);
    softmax.weight[vector] = softmax.weight[vector] * softmax.shrink[vector] + sum_of(sum);
    softmax.largest[vector] = now_largest;
  }

  // Adds the weighted values of keys [begin, end) to `VECTORS` accumulators; fetches `ahead`, where as much lies.
  template <int VECTORS, bool AHEAD>
  void add_values(int64_t vector, const T* values, int64_t begin, int64_t end, const T* ahead) {
    constexpr int kBlock = 2 * kLanes;                             // dimensions
    constexpr int kBlocks = (VECTORS <= 2 ? 4 : 2) * kLanes / 16;  // that are summed up together
    constexpr int kKeys = Values<T>::kKeys;
    const int64_t dim = shape.value_dim;
    auto some = [&](int64_t d, auto blocks_constant) {
      constexpr int kHere = decltype(blocks_constant)::value;
      Floats acc[VECTORS][kHere][2];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const Floats by = broadcast(softmax.shrink[vector + v]);
#pragma GCC unroll 8
        for (int i = 0; i < 2 * kHere; ++i)
          acc[v][i / 2][i % 2] = multiply(by, load(&accumulated[(vector + v) * dim + d + kLanes * i]));
      }
      for (int64_t key = begin; key < end; key += kKeys) {
        const T* const first = values + key * dim + d;
        const T* const second = key + 1 < end ? first + dim : nullptr;
#pragma GCC unroll 4
        for (int b = 0; b < kHere; ++b) {
          if constexpr (AHEAD) {
            const T* const there = ahead + key * dim + d + kBlock * b;
            for (int i = 0; i < kKeys; ++i) _mm_prefetch(there + i * dim, _MM_HINT_T1);
            if (kBlock * sizeof(T) > 64) _mm_prefetch(there + 16, _MM_HINT_T1);
          }
          typename Values<T>::Vector block[2];
          Values<T>::load_block(first + kBlock * b, second ? second + kBlock * b : nullptr, block);
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) {
            const auto by = Values<T>::weight(&weights[(vector + v) * width + key - begin]);
            acc[v][b][0] = multiply_add(acc[v][b][0], block[0], by);
            acc[v][b][1] = multiply_add(acc[v][b][1], block[1], by);
          }
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 8
        for (int i = 0; i < 2 * kHere; ++i)
          store(&accumulated[(vector + v) * dim + d + kLanes * i], acc[v][i / 2][i % 2]);
    };
    int64_t d = 0;
    for (; d + kBlock * kBlocks <= dim; d += kBlock * kBlocks) some(d, std::integral_constant<int, kBlocks>{});
    for (; d < dim; d += kBlock) some(d, std::integral_constant<int, 1>{});
  }

  // `each<VECTORS>(vector)` for the query vectors from `vector` on and before `end`, in fours and what is left.
  template <typename Each>
  void in_groups(int64_t vector, int64_t end, const Each& each) {
    for (; vector + 4 <= end; vector += 4) each(std::integral_constant<int, 4>{}, vector);
    if (vector + 2 <= end) each(std::integral_constant<int, 2>{}, vector), vector += 2;
    if (vector < end) each(std::integral_constant<int, 1>{}, vector);
  }

  // A page of one head of `all`, which is k_pages or v_pages: page `index` of the sequence in `row`.
  const T* page(const T* all, int64_t row, int64_t index, int64_t head, int64_t dim) const {
    const int32_t id = arrays.page_table[row * shape.max_pages + std::min(index, shape.max_pages - 1)];
    return all + (std::clamp<int64_t>(id, 0, shape.pages - 1) * shape.kv_heads + head) * shape.page_size * dim;
  }

  const T* keys_of(const Queries& queries, int64_t index, int64_t head) const {
    return page(arrays.k_pages, queries.row, index, head, shape.head_dim);
  }

  int64_t oldest(const Queries& queries) const {
    return shape.window ? std::max<int64_t>(0, queries.position - shape.window + 1) : 0;
  }

  // The first keys that `run` would read.
  const T* first_keys(const Together& together, int64_t head) const {
    const Queries& first = together.members.front();
    return keys_of(first, oldest(first) / shape.page_size, head);
  }

  // Attends, and fetches `next`, the keys of what this thread does then.
  void run(const Together& together, int64_t head, const T* next) {
    vectors = 0;
    for (const Queries& some : together.members) take(some, head);
    if (tiles && vectors >= kTileQueries) {
      tiles->take(q, vectors);
      std::fill(softmax.last_visible.begin() + vectors, softmax.last_visible.end(), -1);  // lanes without a query
    }
    std::fill(accumulated.begin(), accumulated.end(), 0.0f);
    const auto& members = together.members;
    for (int64_t index = 0; index < together.shared; ++index)
      attend(members.front(), head, index, 0, vectors, keys_of(members.front(), index + 1, head));
    int64_t vector = 0;
    for (size_t member = 0; member < members.size(); ++member) {
      const Queries& some = members[member];
      const int64_t end = vector + some.count * group;
      const int64_t last = (some.position + some.count + shape.page_size - 1) / shape.page_size;
      const T* const after = member + 1 < members.size() ? keys_of(members[member + 1], together.shared, head) : next;
      for (int64_t index = std::max(together.shared, oldest(some) / shape.page_size); index < last; ++index)
        attend(some, head, index, vector, end, index + 1 < last ? keys_of(some, index + 1, head) : after);
      give(some, head, vector);
      vector = end;
    }
  }

  // Adds the query vectors of some tokens to those there are, with nothing attended to yet.
  void take(const Queries& queries, int64_t head) {
    for (int64_t i = 0; i < queries.count * group; ++i, ++vectors) {
      const int64_t h = head * group + i % group, token = i / group;
      const T* const given = arrays.q + ((queries.start + token) * shape.heads + h) * shape.head_dim;
      Query* const room = prepared.data() + vectors * Operand<T>::stride(shape.head_dim);
      q[vectors] = Operand<T>::prepare(given, shape.head_dim, room);
      const int64_t last = queries.position + token;
      softmax.last_visible[vectors] = last;
      softmax.first_visible[vectors] = shape.window ? std::max<int64_t>(0, last - shape.window + 1) : 0;
      softmax.largest[vectors] = arrays.sinks ? arrays.sinks[h] : kMasked;
      softmax.weight[vectors] = arrays.sinks ? 1 : 0;
    }
  }

  // Query vectors [first, last) attend to page `index` of the sequence of `queries`; `then` is fetched.
  void attend(const Queries& queries, int64_t head, int64_t index, int64_t first, int64_t last, const T* then) {
    const int64_t size = shape.page_size, length = queries.position + queries.count;
    const int64_t begin = std::max<int64_t>(0, oldest(queries) - index * size);
    const int64_t end = std::min(size, length - index * size);
    const T* const keys = keys_of(queries, index, head);
    const T* const values = page(arrays.v_pages, queries.row, index, head, shape.value_dim);
    if (tiles && last - first == vectors && vectors >= kTileQueries) {
      auto score = [&](Floats product) { return shape.score(product); };
      tiles->attend(keys, values, begin, end, index * size, score, softmax, accumulated.data());
      return;
    }
    in_groups(first, last, [&](auto count, int64_t v) {
      constexpr int kVectors = decltype(count)::value;
      v > first ? score<kVectors, false>(v, keys, begin, end, values)
                : score<kVectors, true>(v, keys, begin, end, values);
    });
    for (int64_t v = first; v < last; ++v) weigh(v, index * size + begin, end - begin);
    in_groups(first, last, [&](auto count, int64_t v) {
      constexpr int kVectors = decltype(count)::value;
      v > first ? add_values<kVectors, false>(v, values, begin, end, then)
                : add_values<kVectors, true>(v, values, begin, end, then);
    });
  }

  // Writes what some tokens, whose vectors start at `vector`, have attended to.
  void give(const Queries& queries, int64_t head, int64_t vector) {
    for (int64_t i = 0; i < queries.count * group; ++i, ++vector) {
      const int64_t h = head * group + i % group;
      T* const to = arrays.out + ((queries.start + i / group) * shape.heads + h) * shape.value_dim;
      const Floats by = broadcast(1 / std::max(softmax.weight[vector], 1e-30f));
      for (int64_t d = 0; d < shape.value_dim; d += 2 * kLanes) {
        const float* const from = &accumulated[vector * shape.value_dim + d];
        Values<T>::store(to + d, multiply(by, load(from)), multiply(by, load(from + kLanes)));
      }
    }
  }
};

// The queries, together where sequences begin with the same pages and fewer are read for it. With a window none are: by
// then most have left a shared prefix behind.
std::vector<Together> with_shared_pages(const Shape& shape, const int32_t* page_table, std::vector<Queries> queries) {
  const int64_t group = shape.heads / shape.kv_heads;
  auto pages = [&](const Queries& some) { return page_table + some.row * shape.max_pages; };
  auto whole = [&](const Queries& some) {  // pages before the first query's, which others may have too
    if (shape.window || some.position < 0 || some.count * group >= kTileQueries) return int64_t{0};
    return std::min(some.position / shape.page_size, shape.max_pages);
  };
  std::stable_sort(queries.begin(), queries.end(), [&](const Queries& a, const Queries& b) {
    return std::lexicographical_compare(pages(a), pages(a) + whole(a), pages(b), pages(b) + whole(b));
  });
  std::vector<Together> all;
  for (const Queries& some : queries) {
    if (!all.empty() && (all.back().tokens() + some.count) * group <= kTogether) {
      Together& last = all.back();
      const int32_t* const first = pages(last.members.front());
      const int64_t most = std::min(last.shared, whole(some)), count = last.members.size();
      const int64_t same = std::mismatch(first, first + most, pages(some)).first - first;
      if (same && count * same >= (count - 1) * last.shared) {
        last.members.push_back(some);
        last.shared = same;
        continue;
      }
    }
    all.push_back({{some}, whole(some)});
  }
  return all;
}

template <typename T>
void attend(ffi::ThreadPool& pool, const Shape& shape, const Arrays<T>& arrays, std::vector<Queries> queries) {
  const std::vector<Together> some = with_shared_pages(shape, arrays.page_table, std::move(queries));
  int64_t most = 0, read = 0;
  const int64_t heads = shape.kv_heads, group = shape.heads / heads, together = some.size();
  // An item is one head of queries that attend together: all queries of a head come after each other, and pages that
  // several of them read, those of a shared prefix or of one long prompt, stay in the second cache meanwhile. Items
  // cost very different times, so that they are shared out by what they cost.
  std::vector<int64_t> costs;
  for (const Together& item : some) {
    const int64_t tokens = item.tokens(), shared = item.shared * shape.page_size;
    int64_t cost = shared * (kKeyCost + tokens * group);
    read += shared;
    for (const Queries& own : item.members) {
      const int64_t keys = (shape.window ? std::min(own.position, shape.window) : own.position) + own.count - shared;
      cost += std::max<int64_t>(keys, 1) * (kKeyCost + own.count * group);
      read += keys;
    }
    most = std::max(most, tokens);
    costs.push_back(cost);
  }
  std::vector<int64_t> starts{0};
  for (int64_t item = 0; item < heads * together; ++item) starts.push_back(starts.back() + costs[item % together]);
  const int64_t bytes = heads * read * (shape.head_dim + shape.value_dim) * sizeof(T);
  const double share = static_cast<double>(kLeastBytes) / std::max<int64_t>(bytes, 1);
  const int64_t smallest = std::max(1.0, starts.back() * share);
  parallel_for(pool, starts.back(), smallest, [&](int64_t begin, int64_t end) {
    auto item_at = [&](int64_t cost) {
      return std::lower_bound(starts.begin(), starts.end() - 1, cost) - starts.begin();
    };
    const int64_t first = item_at(begin), last = item_at(end);
    if (first == last) return;
    Worker<T> worker(shape, arrays, most);
    std::optional<Tiles> registers;
    if (worker.tiles) registers.emplace();
    for (int64_t item = first; item < last; ++item) {
      const int64_t then = std::min(item + 1, last - 1);
      worker.run(some[item % together], item / together, worker.first_keys(some[then % together], then / together));
    }
  });
}

ffi::Error run(ffi::ThreadPool& pool, const ffi::AnyBuffer& q, const ffi::AnyBuffer& k_pages,
               const ffi::AnyBuffer& v_pages, const ffi::BufferR2<ffi::S32>& page_table,
               const ffi::BufferR1<ffi::F32>& sinks, float scale, int64_t window, float soft_cap, ffi::AnyBuffer& out,
               const std::vector<Queries>& queries) {
  const auto qd = q.dimensions(), kd = k_pages.dimensions();
  const Shape shape{qd[qd.size() - 2], kd[1], kd[3], v_pages.dimensions()[3], kd[2], kd[0], page_table.dimensions()[1],
                    window, scale, soft_cap};
  auto with = [&](auto zero) {
    using T = decltype(zero);
    const Arrays<T> arrays{static_cast<const T*>(q.untyped_data()),
                           static_cast<const T*>(k_pages.untyped_data()),
                           static_cast<const T*>(v_pages.untyped_data()),
                           page_table.typed_data(),
                           sinks.element_count() ? sinks.typed_data() : nullptr,
                           static_cast<T*>(out.untyped_data())};
    attend(pool, shape, arrays, queries);
  };
  q.element_type() == ffi::BF16 ? with(bf16{}) : with(float{});
  return ffi::Error::Success();
}

ffi::Error paged_decode_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_pages,
                                  ffi::AnyBuffer v_pages, ffi::BufferR2<ffi::S32> page_table,
                                  ffi::BufferR1<ffi::S32> lengths, ffi::BufferR1<ffi::F32> sinks, float scale,
                                  int64_t window, float soft_cap, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t rows = q.dimensions()[0], count = q.dimensions()[1];
  std::vector<Queries> queries(rows);
  for (int64_t row = 0; row < rows; ++row)
    queries[row] = {row, row * count, count, lengths.typed_data()[row] - count};
  return run(pool, q, k_pages, v_pages, page_table, sinks, scale, window, soft_cap, *out, queries);
}

ffi::Error paged_prefill_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_pages,
                                   ffi::AnyBuffer v_pages, ffi::BufferR2<ffi::S32> page_table,
                                   ffi::BufferR2<ffi::S32> tiles, ffi::BufferR1<ffi::F32> sinks, float scale,
                                   int64_t window, float soft_cap, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t capacity = tiles.dimensions()[1];
  const int32_t* const t = tiles.typed_data();
  std::vector<Queries> queries;
  int64_t done = 0;
  auto zeros_until = [&](int64_t token) {  // tokens between the tiles are in none
    const int64_t bytes = out->size_bytes() / out->dimensions()[0];
    if (token > done) std::memset(static_cast<char*>(out->untyped_data()) + done * bytes, 0, (token - done) * bytes);
  };
  for (int64_t i = 0; i < capacity; ++i) {
    const Queries tile{t[i], t[capacity + i], t[2 * capacity + i], t[3 * capacity + i]};
    if (!tile.count) continue;
    zeros_until(tile.start);
    done = tile.start + tile.count;
    queries.push_back(tile);
  }
  zeros_until(out->dimensions()[0]);
  return run(pool, q, k_pages, v_pages, page_table, sinks, scale, window, soft_cap, *out, queries);
}

}  // namespace
}  // namespace native

#define ATTENTION(NAME, POSITIONS)                                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_##NAME, native::NAME,               \
                                xla::ffi::Ffi::Bind()                        \
                                    .Ctx<xla::ffi::ThreadPool>()             \
                                    .Arg<xla::ffi::AnyBuffer>()              \
                                    .Arg<xla::ffi::AnyBuffer>()              \
                                    .Arg<xla::ffi::AnyBuffer>()              \
                                    .Arg<xla::ffi::BufferR2<xla::ffi::S32>>() \
                                    .Arg<POSITIONS>()                        \
                                    .Arg<xla::ffi::BufferR1<xla::ffi::F32>>() \
                                    .Attr<float>("scale")                    \
                                    .Attr<int64_t>("window")                 \
                                    .Attr<float>("soft_cap")                 \
                                    .Ret<xla::ffi::AnyBuffer>())

ATTENTION(paged_decode_attention, xla::ffi::BufferR1<xla::ffi::S32>);
ATTENTION(paged_prefill_attention, xla::ffi::BufferR2<xla::ffi::S32>);
