// Tests of the core against loops that are too simple to be wrong. Run under the sanitizers by `make sanitize`.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "active_set.h"
#include "philox.h"
#include "tests.h"
#include "uem_score.h"

namespace {

bool raises(const std::function<void()>& call, const std::string& part) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return std::string(error.what()).find(part) != std::string::npos;
  }
  return false;
}

struct State {
  explicit State(std::int32_t lanes) : lane(lanes), row(lanes), exit_layer(lanes), n(lanes) {
    std::iota(lane.begin(), lane.end(), 0);
    row = lane;
  }

  // Exactly as many pairs as promised, so that one too many is seen by AddressSanitizer.
  Ints leave(const Mask& mask, std::int32_t layer) {
    Ints swaps(2 * (n / 2), -1);
    const auto result = adadiff::leave(mask.data(), lane.data(), row.data(), exit_layer.data(), swaps.data(),
                                       n, static_cast<std::int32_t>(lane.size()), layer);
    n = result.after;
    swaps.resize(2 * result.swaps);
    return swaps;
  }

  bool operator==(const State& other) const {
    return lane == other.lane && row == other.row && exit_layer == other.exit_layer && n == other.n;
  }

  Ints lane, row, exit_layer;
  std::int32_t n;
};

// One leave from the identity, with the pairing done by two lists.
void check_pairing(const Mask& mask) {
  const auto n = static_cast<std::int32_t>(mask.size());
  const auto after = static_cast<std::int32_t>(std::count(mask.begin(), mask.end(), 0));
  Ints down, up, expected;
  for (std::int32_t r = 0; r < n; ++r) {
    if (mask[r] && r < after) down.push_back(r);
    if (!mask[r] && r >= after) up.push_back(r);
  }
  CHECK(down.size() == up.size());
  for (std::size_t k = 0; k < down.size(); ++k) {
    expected.push_back(down[k]);
    expected.push_back(up[k]);
  }
  State state(n);
  CHECK(state.leave(mask, 3) == expected);
  CHECK(state.n == after);
  for (std::int32_t l = 0; l < n; ++l) {
    CHECK(state.exit_layer[l] == (mask[l] ? 3 : 0));
    CHECK((state.row[l] < after) == !mask[l]);
    CHECK(state.lane[state.row[l]] == l);
  }
}

void test_patterns() {
  for (int n : {0, 1, 2, 3, 63, 64, 65}) {
    check_pairing(Mask(n, 0));
    check_pairing(Mask(n, 1));
    if (n == 0) continue;
    Mask first(n, 0), last(n, 0), alternating(n), all_but_first(n, 255), all_but_last(n, 255);
    first[0] = last[n - 1] = 1;
    all_but_first[0] = all_but_last[n - 1] = 0;
    for (int r = 0; r < n; ++r) alternating[r] = r % 2;
    for (const auto& mask : {first, last, alternating, all_but_first, all_but_last}) check_pairing(mask);
  }
  State empty(0);
  CHECK(adadiff::leave(nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0, 1).after == 0);
}

// Repeated leaves with padded rows that travel along: every lane's bytes stay with it, and the rows
// that have left lie by exit layer, the earliest last.
void test_random_runs() {
  std::mt19937 random(7);
  for (int run = 0; run < 300; ++run) {
    const int lanes = static_cast<int>(random() % 67);
    const std::int64_t row_bytes = run % 3 ? random() % 40 : 4090 + random() % 13;  // around one block
    const std::int64_t stride_bytes = row_bytes + random() % 5;
    std::vector<unsigned char> data(lanes * stride_bytes, 0xAA);
    for (int l = 0; l < lanes; ++l) {
      std::fill_n(data.begin() + l * stride_bytes, row_bytes, static_cast<unsigned char>(l));
    }
    State state(lanes);
    Ints left(lanes, 0);
    for (int layer = 1; layer <= 13; ++layer) {
      Mask mask(state.n);
      const unsigned share = random() % 5;
      for (int r = 0; r < state.n; ++r) {
        mask[r] = random() % 4 < share && random() % 2;
        if (mask[r]) left[state.lane[r]] = layer;
      }
      const Ints swaps = state.leave(mask, layer);
      adadiff::swap_rows(data.data(), row_bytes, stride_bytes, lanes, swaps.data(), swaps.size() / 2);
      CHECK(state.exit_layer == left);
      for (int r = state.n; r + 1 < lanes; ++r) CHECK(left[state.lane[r]] >= left[state.lane[r + 1]]);
      for (int l = 0; l < lanes; ++l) {
        const auto row = data.begin() + state.row[l] * stride_bytes;
        CHECK(state.lane[state.row[l]] == l);
        CHECK((state.row[l] < state.n) == (left[l] == 0));
        CHECK(std::all_of(row, row + row_bytes, [l](unsigned char byte) { return byte == l; }));
        CHECK(std::all_of(row + row_bytes, row + stride_bytes, [](unsigned char byte) { return byte == 0xAA; }));
      }
    }
  }
}

void test_leave_errors() {
  const Mask mask{1, 0, 0, 1};
  Ints swaps(4, -1);
  const auto refuses = [&](State state, std::int32_t n, std::int32_t layer, const std::string& part) {
    const State before = state;
    const bool raised = raises(
        [&] {
          adadiff::leave(mask.data(), state.lane.data(), state.row.data(), state.exit_layer.data(),
                         swaps.data(), n, static_cast<std::int32_t>(state.lane.size()), layer);
        },
        part);
    return raised && state == before && swaps == Ints(4, -1);
  };
  const State good(4);
  CHECK(refuses(good, -1, 1, "n must be 0 or more"));
  CHECK(refuses(good, 5, 1, "at most lanes"));
  CHECK(refuses(good, 4, 0, "layer must be 1 or more"));
  for (std::int32_t lane : {-1, 2, 4}) {
    State bad(4);
    bad.lane[3] = lane;
    CHECK(refuses(bad, 4, 1, "not each other's inverse"));
    CHECK(refuses(bad, 3, 1, "not each other's inverse"));
  }
  State twice(4);
  twice.exit_layer[2] = 1;
  CHECK(refuses(twice, 4, 2, "already left"));
  State later(4);
  later.exit_layer[3] = 5;
  CHECK(refuses(later, 3, 4, "later layer"));

  State null(4);
  const auto refuses_null = [&](int which, const std::string& part) {
    return raises(
        [&] {
          adadiff::leave(which == 0 ? nullptr : mask.data(), which == 1 ? nullptr : null.lane.data(),
                         which == 2 ? nullptr : null.row.data(), which == 3 ? nullptr : null.exit_layer.data(),
                         which == 4 ? nullptr : swaps.data(), 4, 4, 1);
        },
        part);
  };
  const char* names[] = {"mask", "lane", "row", "exit_layer", "swaps"};
  for (int which = 0; which < 5; ++which) CHECK(refuses_null(which, names[which]));
  CHECK(null == State(4));
}

void test_swap_errors() {
  const std::vector<unsigned char> before{0, 1, 2, 3, 4, 5};
  auto data = before;
  const auto refuses = [&](const Ints& pairs, std::int64_t row_bytes, std::int64_t stride_bytes,
                           std::int64_t rows, const std::string& part) {
    return raises(
               [&] {
                 adadiff::swap_rows(data.data(), row_bytes, stride_bytes, rows, pairs.data(), pairs.size() / 2);
               },
               part) &&
           data == before;
  };
  CHECK(refuses({0, 1}, -1, 2, 3, "0 or more"));
  CHECK(refuses({0, 1}, 2, 2, -1, "0 or more"));
  CHECK(refuses({0, 1}, 3, 2, 3, "overlap"));
  CHECK(refuses({0, 1}, 2, std::numeric_limits<std::int64_t>::max() / 2, 3, "overflow"));
  CHECK(refuses({0, 3}, 2, 2, 3, "outside"));
  CHECK(refuses({0, 1, -1, 2}, 2, 2, 3, "outside"));
  CHECK(refuses({0, 1}, 2, 2, 0, "outside"));
  CHECK(refuses({0, 1, 2, 0}, 2, 2, 3, "twice"));
  CHECK(refuses({1, 1}, 2, 2, 3, "twice"));
  const Ints pair{0, 1};
  CHECK(raises([&] { adadiff::swap_rows(data.data(), 2, 2, 3, pair.data(), -1); }, "0 or more"));
  CHECK(raises([&] { adadiff::swap_rows(nullptr, 2, 2, 3, pair.data(), 1); }, "data is null"));
  CHECK(raises([&] { adadiff::swap_rows(data.data(), 2, 2, 3, nullptr, 1); }, "pairs is null"));
  adadiff::swap_rows(nullptr, 0, 0, 0, nullptr, 0);
  adadiff::swap_rows(nullptr, 0, 0, 3, pair.data(), 1);
  CHECK(data == before);
}

// The score against its formula in double; channels around every width that the dot product steps by.
template <typename Element>
void test_scores() {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  for (int channels : {1, 7, 8, 9, 31, 32, 33, 64, 100, 256}) {
    const int n = 3, tokens = 6, num_prefix_tokens = channels % 3, B = 5;
    std::vector<Element> y(n * tokens * channels);
    std::vector<double> exact(y.size());
    for (std::size_t i = 0; i < y.size(); ++i) {
      float value = normal(random);
      std::uint32_t word;
      std::memcpy(&word, &value, sizeof word);
      word &= 0xFFFF0000u;  // a bfloat16 holds it exactly
      std::memcpy(&value, &word, sizeof value);
      exact[i] = value;
      if constexpr (sizeof(Element) == 2) {
        y[i].bits = static_cast<std::uint16_t>(word >> 16);
      } else {
        y[i] = value;
      }
    }
    std::vector<float> weight(channels), offset(2 * B), u(n, NAN);
    for (float& value : weight) value = normal(random) / std::sqrt(static_cast<float>(channels));
    for (float& value : offset) value = normal(random);
    const Ints lanes{4, 0, 2};
    for (std::int64_t stride : {0, 1, 2}) {
      adadiff::uem_score(y.data(), n, tokens, channels, num_prefix_tokens, weight.data(), offset.data(), stride, B,
                         lanes.data(), u.data());
      for (int r = 0; r < n; ++r) {
        double mean = 0;
        for (int t = num_prefix_tokens; t < tokens; ++t) {
          double score = offset[lanes[r] * stride];
          for (int d = 0; d < channels; ++d) score += exact[(r * tokens + t) * channels + d] * weight[d];
          mean += 1 / (1 + std::exp(-score)) / (tokens - num_prefix_tokens);
        }
        CHECK(std::abs(u[r] - mean) < 1e-6);
        float alone = NAN;  // bit for bit: a row does not see its neighbours
        adadiff::uem_score(y.data() + r * tokens * channels, 1, tokens, channels, num_prefix_tokens, weight.data(),
                           offset.data(), stride, B, lanes.data() + r, &alone);
        CHECK(std::memcmp(&alone, &u[r], sizeof alone) == 0);
      }
    }
  }
}

void test_score_errors() {
  const std::vector<float> y(2 * 3 * 4), weight(4), offset(5);
  std::vector<float> u{7, 7};
  const auto refuses = [&](std::int64_t n, std::int64_t tokens, std::int64_t channels, std::int64_t num_prefix_tokens,
                           std::int64_t stride, std::int32_t B, const Ints& lanes, const std::string& part) {
    return raises(
               [&] {
                 adadiff::uem_score(y.data(), n, tokens, channels, num_prefix_tokens, weight.data(), offset.data(),
                                    stride, B, lanes.data(), u.data());
               },
               part) &&
           u == std::vector<float>{7, 7};
  };
  const Ints good{4, 0};
  CHECK(refuses(-1, 3, 4, 1, 1, 5, good, "n must be 0 or more"));
  CHECK(refuses(2, 3, 0, 1, 1, 5, good, "channels must be 1 or more"));
  CHECK(refuses(2, 3, 4, 3, 1, 5, good, "at least one token"));
  CHECK(refuses(2, 3, 4, -1, 1, 5, good, "at least one token"));
  CHECK(refuses(2, 3, 4, 1, -1, 5, good, "offset_stride"));
  CHECK(refuses(2, 3, 4, 1, 1, -1, good, "B must be 0 or more"));
  CHECK(refuses(2, 3, 4, 1, 1, 4, good, "outside [0, B)"));
  CHECK(refuses(2, 3, 4, 1, 1, 5, {0, -1}, "outside [0, B)"));
  const float* none = nullptr;
  CHECK(raises([&] { adadiff::uem_score(none, 2, 3, 4, 1, none, none, 1, 5, nullptr, nullptr); }, "null"));
  adadiff::uem_score(none, 0, 3, 4, 1, none, none, 1, 0, nullptr, nullptr);
}

// Random123's known answers have counters of four free words; those here end in 0, so all zeros is the one of them.
// The others are in tests/kernels/test_philox.py, against the same formula in Python.
void test_philox() {
  const std::int64_t zero = 0;
  std::vector<std::int64_t> words(4, -1);
  adadiff::philox(&zero, &zero, 1, 0, 1, words.data());
  CHECK((words == std::vector<std::int64_t>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  adadiff::philox(nullptr, nullptr, 0, 0, 3, nullptr);
  const std::int64_t top = std::int64_t{1} << 32, minus = -1;
  const auto refuses = [&](const std::int64_t* seeds, const std::int64_t* steps, std::int64_t n, std::int64_t stream,
                           std::int64_t blocks, const std::string& part) {
    words.assign(4, -1);
    return raises([&] { adadiff::philox(seeds, steps, n, stream, blocks, words.data()); }, part) &&
           words == std::vector<std::int64_t>(4, -1);
  };
  CHECK(refuses(&zero, &zero, -1, 0, 1, "n must"));
  CHECK(refuses(&zero, &zero, 1, 0, -1, "blocks"));
  CHECK(refuses(&zero, &zero, 1, top, 1, "stream"));
  CHECK(refuses(&minus, &zero, 1, 0, 1, "seeds"));
  CHECK(refuses(&zero, &top, 1, 0, 1, "steps"));
  CHECK(refuses(nullptr, &zero, 1, 0, 1, "null"));
}

}  // namespace

int main() {
  test_patterns();
  test_random_runs();
  test_leave_errors();
  test_swap_errors();
  test_scores<float>();
  test_scores<adadiff::bfloat16>();
  test_score_errors();
  test_philox();
  test_compact();
  std::puts("core: all tests passed");
}
