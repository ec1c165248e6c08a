// What attention to one page after the other keeps of the pages before.
#pragma once

#include <cstdint>
#include <vector>

namespace native {
namespace {

constexpr float kMasked = -1e30f;  // finite: exp(kMasked - kMasked) is no NaN

// The softmax over the keys so far, of each query.
struct Softmax {
  std::vector<float> largest, weight, shrink;        // shrink: what earlier weights have to be multiplied with
  std::vector<int32_t> first_visible, last_visible;  // positions, both included

  explicit Softmax(int64_t queries)
      : largest(queries), weight(queries), shrink(queries), first_visible(queries), last_visible(queries) {}
};

}  // namespace
}  // namespace native
