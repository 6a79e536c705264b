#include "active_set.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace adadiff {
namespace {

// Small enough for the first-level cache, large enough for memcpy at full speed.
constexpr std::int64_t kBlockBytes = 4096;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

void swap_bytes(unsigned char* a, unsigned char* b, std::int64_t bytes) {
  alignas(64) unsigned char block[kBlockBytes];
  for (std::int64_t done = 0; done < bytes; done += kBlockBytes) {
    const auto size = static_cast<std::size_t>(std::min(kBlockBytes, bytes - done));
    std::memcpy(block, a + done, size);
    std::memcpy(a + done, b + done, size);
    std::memcpy(b + done, block, size);
  }
}

}  // namespace

Leave leave(const std::uint8_t* mask, std::int32_t* lane, std::int32_t* row, std::int32_t* exit_layer,
            std::int32_t* swaps, std::int32_t n, std::int32_t lanes, std::int32_t layer) {
  require(n >= 0, "leave: n must be 0 or more");
  require(n <= lanes, "leave: n must be at most lanes");
  require(layer >= 1, "leave: layer must be 1 or more");
  require(mask || n == 0, "leave: mask is null");
  require((lane && row && exit_layer) || lanes == 0, "leave: lane, row or exit_layer is null");
  require(swaps || n < 2, "leave: swaps is null");

  std::int32_t after = n;
  for (std::int32_t r = 0; r < n; ++r) {
    const std::int32_t l = lane[r];
    require(l >= 0 && l < lanes && row[l] == r, "leave: lane and row are not each other's inverse");
    require(exit_layer[l] == 0, "leave: a running lane has already left");
    after -= mask[r] != 0;
  }
  if (n < lanes) {
    const std::int32_t last = lane[n];
    require(last >= 0 && last < lanes && row[last] == n, "leave: lane and row are not each other's inverse");
    require(exit_layer[last] <= layer, "leave: a lane has already left at a later layer");
  }

  std::int32_t k = 0;
  std::int32_t kept = after;
  for (std::int32_t r = 0; r < n; ++r) {
    if (!mask[r]) continue;
    const std::int32_t leaving = lane[r];
    exit_layer[leaving] = layer;
    if (r >= after) continue;
    while (mask[kept]) ++kept;
    swaps[2 * k] = r;
    swaps[2 * k + 1] = kept;
    ++k;
    ++kept;
  }
  // The loop above reads `lane` by the old rows, so the rows change only now.
  for (std::int32_t i = 0; i < k; ++i) {
    const std::int32_t a = swaps[2 * i], b = swaps[2 * i + 1];
    std::swap(lane[a], lane[b]);
    row[lane[a]] = a;
    row[lane[b]] = b;
  }
  return {after, k};
}

void swap_rows(void* data, std::int64_t row_bytes, std::int64_t stride_bytes, std::int64_t rows,
               const std::int32_t* pairs, std::int64_t k) {
  require(row_bytes >= 0 && rows >= 0 && k >= 0, "swap_rows: row_bytes, rows and k must be 0 or more");
  require(row_bytes <= stride_bytes, "swap_rows: rows overlap: row_bytes is larger than stride_bytes");
  require(rows == 0 || stride_bytes <= std::numeric_limits<std::int64_t>::max() / rows,
          "swap_rows: rows * stride_bytes overflows");
  require(pairs || k == 0, "swap_rows: pairs is null");
  require(data || k == 0 || row_bytes == 0, "swap_rows: data is null");

  std::vector<bool> named(static_cast<std::size_t>(k ? rows : 0));
  for (std::int64_t i = 0; i < 2 * k; ++i) {
    require(pairs[i] >= 0 && pairs[i] < rows, "swap_rows: pairs name a row outside [0, rows)");
    const auto r = static_cast<std::size_t>(pairs[i]);
    require(!named[r], "swap_rows: pairs name a row twice");
    named[r] = true;
  }
  if (row_bytes == 0) return;

  auto* bytes = static_cast<unsigned char*>(data);
  for (std::int64_t i = 0; i < k; ++i) {
    swap_bytes(bytes + pairs[2 * i] * stride_bytes, bytes + pairs[2 * i + 1] * stride_bytes, row_bytes);
  }
}

}  // namespace adadiff
