#include "philox.h"

#include <stdexcept>

namespace adadiff {
namespace {

constexpr std::int64_t kWords = std::int64_t{1} << 32;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

}  // namespace

void philox(const std::int64_t* seeds, const std::int64_t* steps, std::int64_t n, std::int64_t stream,
            std::int64_t blocks, std::int64_t* words) {
  require(n >= 0, "philox: n must be 0 or more");
  require(blocks >= 0 && blocks <= kWords, "philox: blocks must lie in [0, 2^32]");
  require(stream >= 0 && stream < kWords, "philox: stream must lie in [0, 2^32)");
  require((seeds && steps && words) || n == 0 || blocks == 0, "philox: a pointer is null");
  for (std::int64_t i = 0; i < n; ++i) {
    require(seeds[i] >= 0, "philox: seeds must lie in [0, 2^63)");
    require(steps[i] >= 0 && steps[i] < kWords, "philox: steps must lie in [0, 2^32)");
  }
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t block = 0; block < blocks; ++block, words += 4) {
      auto c0 = static_cast<std::uint32_t>(block), c1 = static_cast<std::uint32_t>(steps[i]);
      auto c2 = static_cast<std::uint32_t>(stream), c3 = std::uint32_t{0};
      auto k0 = static_cast<std::uint32_t>(seeds[i]), k1 = static_cast<std::uint32_t>(seeds[i] >> 32);
      for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53} * c0, b = std::uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
        c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
        c1 = static_cast<std::uint32_t>(b);
        c3 = static_cast<std::uint32_t>(a);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
      }
      words[0] = c0;
      words[1] = c1;
      words[2] = c2;
      words[3] = c3;
    }
  }
}

}  // namespace adadiff
