#include "uem_score.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

// One binary for every x86-64: the loader picks the version with the widest vectors that the CPU supports. Not under
// the sanitizers, which are not yet initialised when the loader runs the resolver.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define ADADIFF_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ADADIFF_WIDEST
#endif
#define ADADIFF_INLINE inline __attribute__((always_inline))

namespace adadiff {
namespace {

// Vectors of eight numbers; where a register holds fewer, the compiler uses two.
constexpr std::int64_t kWide = 8;
using Floats = float __attribute__((vector_size(4 * kWide)));
using Words = std::uint32_t __attribute__((vector_size(4 * kWide)));
using Halves = std::uint16_t __attribute__((vector_size(2 * kWide)));
constexpr std::int64_t kStep = 4 * kWide;  // four running sums, so that additions do not wait for each other

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

template <typename To, typename From>
ADADIFF_INLINE void copy_bits(To& to, const From* from) {
  std::memcpy(&to, from, sizeof to);
}

ADADIFF_INLINE void load(Floats& to, const float* from) { copy_bits(to, from); }

ADADIFF_INLINE void load(Floats& to, const bfloat16* from) {
  Halves halves;
  copy_bits(halves, from);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  copy_bits(to, &words);
}

ADADIFF_INLINE float widen(float value) { return value; }

ADADIFF_INLINE float widen(bfloat16 value) {
  const std::uint32_t word = static_cast<std::uint32_t>(value.bits) << 16;
  float wide;
  copy_bits(wide, &word);
  return wide;
}

template <typename Element>
ADADIFF_INLINE float dot(const Element* y, const float* weight, std::int64_t channels) {
  Floats sums[4] = {}, a, b;
  std::int64_t d = 0;
  for (; d + kStep <= channels; d += kStep) {
    for (int k = 0; k < 4; ++k) {
      load(a, y + d + k * kWide);
      load(b, weight + d + k * kWide);
      sums[k] += a * b;
    }
  }
  for (; d + kWide <= channels; d += kWide) {
    load(a, y + d);
    load(b, weight + d);
    sums[0] += a * b;
  }
  const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float rest = 0;
  for (; d < channels; ++d) rest += widen(y[d]) * weight[d];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7])) + rest;
}

template <typename Element>
ADADIFF_INLINE void dot_rows(const Element* y, const float* weight, std::int64_t rows, std::int64_t channels,
                             float* out) {
  for (std::int64_t r = 0; r < rows; ++r) out[r] = dot(y + r * channels, weight, channels);
}

ADADIFF_WIDEST void dots(const float* y, const float* weight, std::int64_t rows, std::int64_t channels,
                         float* out) {
  dot_rows(y, weight, rows, channels, out);
}

ADADIFF_WIDEST void dots(const bfloat16* y, const float* weight, std::int64_t rows, std::int64_t channels,
                         float* out) {
  dot_rows(y, weight, rows, channels, out);
}

}  // namespace

template <typename Element>
void uem_score(const Element* y, std::int64_t n, std::int64_t tokens, std::int64_t channels,
               std::int64_t num_prefix_tokens, const float* weight, const float* offset, std::int64_t offset_stride,
               std::int32_t num_lanes, const std::int32_t* row_to_lane, float* u) {
  require(n >= 0, "uem_score: n must be 0 or more");
  require(channels >= 1, "uem_score: channels must be 1 or more");
  require(num_prefix_tokens >= 0 && num_prefix_tokens < tokens,
          "uem_score: num_prefix_tokens must leave at least one token");
  require(num_lanes >= 0, "uem_score: num_lanes must be 0 or more");
  require(offset_stride >= 0, "uem_score: offset_stride must be 0 or more");
  require((y && weight && offset && row_to_lane && u) || n == 0, "uem_score: a pointer is null");
  for (std::int64_t r = 0; r < n; ++r) {
    require(row_to_lane[r] >= 0 && row_to_lane[r] < num_lanes,
            "uem_score: row_to_lane names a lane outside [0, num_lanes)");
  }

  const std::int64_t patches = tokens - num_prefix_tokens;
  std::vector<float> scores(static_cast<std::size_t>(n ? patches : 0));
  for (std::int64_t r = 0; r < n; ++r) {
    dots(y + (r * tokens + num_prefix_tokens) * channels, weight, patches, channels, scores.data());
    const float own = offset[row_to_lane[r] * offset_stride];
    double sum = 0;
    for (const float score : scores) sum += 1 / (1 + std::exp(-(score + own)));
    u[r] = static_cast<float>(sum / static_cast<double>(patches));
  }
}

template void uem_score(const float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t, const float*,
                        const float*, std::int64_t, std::int32_t, const std::int32_t*, float*);
template void uem_score(const bfloat16*, std::int64_t, std::int64_t, std::int64_t, std::int64_t, const float*,
                        const float*, std::int64_t, std::int32_t, const std::int32_t*, float*);

bool any_below(const float* u, std::int64_t n, const float* limit, const std::int32_t* row_to_lane) {
  constexpr float kAlways = std::numeric_limits<float>::infinity();
  for (std::int64_t r = 0; r < n; ++r) {
    const float own = limit[row_to_lane[r]];
    if (u[r] < own || own == kAlways) return true;
  }
  return false;
}

}  // namespace adadiff
