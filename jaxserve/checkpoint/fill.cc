// Memory filled with rows of a file, in which NaN is looked for while they are in the cache.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kPiece = 512 << 10;  // well within a core's own cache
constexpr int64_t kShort = 16 << 10;   // a call to read costs more than to copy so little out of the mapping

// 0, or why it ended early: errno, or -1 for the file's end. `*done` bytes are there then.
int64_t read_whole(int file, char* target, int64_t bytes, int64_t place, int64_t* done) {
  for (*done = 0; *done < bytes;) {
    const ssize_t count = pread(file, target + *done, bytes - *done, place + *done);
    if (count == 0) return -1;
    if (count < 0 && errno != EINTR) return errno;
    if (count > 0) *done += count;
  }
  return 0;
}

// The highest of the numbers without their signs, as bits: those of NaN are above infinity's. `use` is given each, too.
template <typename Bits, typename Use>
uint32_t highest(const char* memory, int64_t bytes, Use use) {
  Bits found = 0;
  for (int64_t at = 0; at + static_cast<int64_t>(sizeof(Bits)) <= bytes; at += sizeof(Bits)) {
    Bits number;
    std::memcpy(&number, memory + at, sizeof(Bits));
    use(at, number);
    found = std::max<Bits>(found, number & static_cast<Bits>(static_cast<Bits>(~0u) >> 1));
  }
  return found;
}

// Of numbers of 2 or 4 bytes; 0 for any others.
uint32_t highest(const char* memory, int64_t bytes, int64_t number_bytes) {
  const auto no_use = [](int64_t, auto) {};
  if (number_bytes == 2) return highest<uint16_t>(memory, bytes, no_use);
  return number_bytes == 4 ? highest<uint32_t>(memory, bytes, no_use) : 0;
}

// The same while they are copied: in vectors, as the string instructions behind memcpy are slow on many CPUs.
uint32_t copy(char* __restrict target, const char* __restrict source, int64_t bytes, int64_t number_bytes) {
  const auto store = [target](int64_t at, auto number) { std::memcpy(target + at, &number, sizeof number); };
  if (number_bytes == 2) return highest<uint16_t>(source, bytes, store);
  if (number_bytes == 4) return highest<uint32_t>(source, bytes, store);
  std::memcpy(target, source, bytes);
  return 0;
}

}  // namespace

extern "C" {

struct Rows {
  int64_t file;
  const char* mapped;  // the first row in the file's mapping
  int64_t place;       // the same as an offset in the file; told back: where reading failed
  char* target;        // where the first row belongs
  int64_t count, bytes, source_stride, target_stride;  // rows, the length of each, and from one to the next
  int64_t number_bytes, infinity;                      // 2 or 4, with infinity's bits; no NaN is looked for in others
  int64_t has_nan;                                     // told back
};

// As `read_whole`.
static int64_t fill(Rows* rows) {
  uint32_t most = 0;
  for (int64_t row = 0; row < rows->count; ++row) {
    const int64_t first = row * rows->source_stride;
    char* target = rows->target + row * rows->target_stride;
    if (rows->bytes <= kShort) {
      most = std::max(most, copy(target, rows->mapped + first, rows->bytes, rows->number_bytes));
      continue;
    }
    for (int64_t at = 0; at < rows->bytes; at += kPiece) {
      const int64_t piece = std::min(kPiece, rows->bytes - at);
      int64_t done = 0;
      if (const int64_t failure = read_whole(rows->file, target + at, piece, rows->place + first + at, &done)) {
        rows->place += first + at + done;
        return failure;
      }
      most = std::max(most, highest(target + at, piece, rows->number_bytes));
    }
  }
  rows->has_nan = most > rows->infinity;
  return 0;
}

// Fills `rows[0]` to `rows[count - 1]`; the index of the first that failed, with why as of `read_whole`, or `count`.
int64_t jaxserve_fill(Rows* rows, int64_t count, int64_t* failure) {
  for (int64_t index = 0; index < count; ++index)
    if ((*failure = fill(rows + index)) != 0) return index;
  return count;
}
}
