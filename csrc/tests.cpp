// Tests of the core against simple loops. `make sanitize` runs them under the sanitizers.
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
  explicit State(std::int32_t lanes) : row_to_lane(lanes), lane_to_row(lanes), exit_layer(lanes), n(lanes) {
    std::iota(row_to_lane.begin(), row_to_lane.end(), 0);
    lane_to_row = row_to_lane;
  }

  // Allocates exactly the documented number of moves, so that AddressSanitizer reports one too many. Returns used moves.
  Ints exit(const Mask& mask, std::int32_t layer) {
    Ints moves(3 * n, -7);
    const std::int32_t before = n;
    n = adadiff::exit_rows({nullptr, nullptr, mask.data(), nullptr}, row_to_lane.data(), lane_to_row.data(),
                           exit_layer.data(), moves.data(), n, static_cast<std::int32_t>(row_to_lane.size()), layer);
    const std::int32_t rest = n == before ? -7 : -1;  // not written if no row exits
    CHECK(std::all_of(moves.begin() + 3 * (before - n), moves.end(), [rest](std::int32_t value) { return value == rest; }));
    moves.resize(3 * (before - n));
    return moves;
  }

  bool operator==(const State& other) const {
    return row_to_lane == other.row_to_lane && lane_to_row == other.lane_to_row && exit_layer == other.exit_layer &&
           n == other.n;
  }

  Ints row_to_lane, lane_to_row, exit_layer;
  std::int32_t n;
};

// One exit from the identity, compared with a pairing computed by two lists.
void check_pairing(const Mask& mask) {
  const auto n = static_cast<std::int32_t>(mask.size());
  const auto after = static_cast<std::int32_t>(std::count(mask.begin(), mask.end(), 0));
  Ints exiting, from_above, expected;
  for (std::int32_t r = 0; r < n; ++r) {
    if (mask[r]) exiting.push_back(r);
    if (!mask[r] && r >= after) from_above.push_back(r);
  }
  for (std::size_t k = 0; k < exiting.size(); ++k) {
    const std::int32_t source = k < from_above.size() ? from_above[k] : -1;
    CHECK((exiting[k] < after) == (source >= 0));
    expected.insert(expected.end(), {exiting[k], exiting[k], source});
  }
  State state(n);
  CHECK(state.exit(mask, 3) == expected);
  CHECK(state.n == after);
  for (std::int32_t l = 0; l < n; ++l) {
    CHECK(state.exit_layer[l] == (mask[l] ? 3 : 0));
    CHECK((state.lane_to_row[l] < after) == !mask[l]);
    CHECK(state.row_to_lane[state.lane_to_row[l]] == l);
  }
}

void test_patterns() {
  for (int n : {0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 1023, 1025}) {
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
  CHECK(adadiff::exit_rows({}, nullptr, nullptr, nullptr, nullptr, 0, 0, 1) == 0);
  CHECK(empty == State(0));
}

// Repeated exits with padded rows that are moved along: every running lane keeps its bytes, those of exited lanes are
// saved by lane, and exited lanes are ordered by exit layer in the permutation, the earliest last.
void test_random_runs() {
  std::mt19937 random(7);
  for (int run = 0; run < 300; ++run) {
    const int lanes = static_cast<int>(random() % 67);
    const std::int64_t row_bytes = run % 3 ? random() % 40 : 4090 + random() % 13;
    const std::int64_t rows_stride = row_bytes + random() % 5, saved_stride = row_bytes + random() % 5;
    const auto holds = [row_bytes](const unsigned char* row, std::int64_t stride, int value) {
      return std::all_of(row, row + row_bytes, [value](unsigned char byte) { return byte == value; }) &&
             std::all_of(row + row_bytes, row + stride, [](unsigned char byte) { return byte == 0xAA; });
    };
    std::vector<unsigned char> rows(lanes * rows_stride, 0xAA), saved(lanes * saved_stride, 0xAA);
    for (int l = 0; l < lanes; ++l) {
      std::fill_n(rows.begin() + l * rows_stride, row_bytes, static_cast<unsigned char>(l));
      std::fill_n(saved.begin() + l * saved_stride, row_bytes, static_cast<unsigned char>(0xFF));
    }
    State state(lanes);
    Ints exited(lanes, 0);
    for (int layer = 1; layer <= 13; ++layer) {
      Mask mask(state.n);
      const unsigned share = random() % 5;
      for (int r = 0; r < state.n; ++r) {
        mask[r] = random() % 4 < share && random() % 2;
        if (mask[r]) exited[state.row_to_lane[r]] = layer;
      }
      Ints moves = state.exit(mask, layer);
      if (run % 2) moves.insert(moves.end(), {-1, -1, -1});  // as from a device
      adadiff::settle_rows(moves.data(), moves.size() / 3, rows.data(), lanes, rows_stride, saved.data(), lanes,
                           saved_stride, row_bytes);
      CHECK(state.exit_layer == exited);
      for (int r = state.n; r + 1 < lanes; ++r) {
        CHECK(exited[state.row_to_lane[r]] >= exited[state.row_to_lane[r + 1]]);
      }
      for (int l = 0; l < lanes; ++l) {
        const int r = state.lane_to_row[l];
        CHECK(state.row_to_lane[r] == l);
        CHECK((r < state.n) == (exited[l] == 0));
        if (r < state.n) CHECK(holds(rows.data() + r * rows_stride, rows_stride, l));
        CHECK(holds(saved.data() + l * saved_stride, saved_stride, exited[l] ? l : 0xFF));
      }
    }
  }
}

void test_exit_errors() {
  const Mask mask{1, 0, 0, 1};
  Ints moves(12, -7);
  const auto refuses = [&](State state, std::int32_t n, std::int32_t layer, const std::string& part) {
    const State before = state;
    const bool raised = raises(
        [&] {
          adadiff::exit_rows({nullptr, nullptr, mask.data(), nullptr}, state.row_to_lane.data(),
                             state.lane_to_row.data(), state.exit_layer.data(), moves.data(), n, static_cast<std::int32_t>(state.row_to_lane.size()), layer);
        },
        part);
    return raised && state == before && moves == Ints(12, -7);
  };
  const State good(4);
  CHECK(refuses(good, -1, 1, "n must be 0 or more"));
  CHECK(refuses(good, 5, 1, "at most num_lanes"));
  CHECK(refuses(good, 4, 0, "layer must be 1 or more"));
  CHECK(refuses(State(32769), 4, 1, "at most 32768"));
  for (std::int32_t lane : {-1, 2, 4}) {
    State bad(4);
    bad.row_to_lane[3] = lane;
    CHECK(refuses(bad, 4, 1, "not each other's inverse"));
    CHECK(refuses(bad, 3, 1, "not each other's inverse"));
  }
  State twice(4);
  twice.exit_layer[2] = 1;
  CHECK(refuses(twice, 4, 2, "has exited already"));
  State later(4);
  later.exit_layer[3] = 5;
  CHECK(refuses(later, 3, 4, "later layer"));

  State null(4);
  const auto refuses_null = [&](int which, const std::string& part) {
    return raises(
        [&] {
          adadiff::exit_rows({}, which == 0 ? nullptr : null.row_to_lane.data(),
                             which == 1 ? nullptr : null.lane_to_row.data(),
                             which == 2 ? nullptr : null.exit_layer.data(), which == 3 ? nullptr : moves.data(), 4, 4, 1);
        },
        part);
  };
  const char* names[] = {"row_to_lane", "lane_to_row", "exit_layer", "moves"};
  for (int which = 0; which < 4; ++which) CHECK(refuses_null(which, names[which]));
  const float u[] = {0, 0, 0, 0};
  const auto refuses_test = [&](const adadiff::ExitTest& test, const std::string& part) {
    return raises(
        [&] {
          adadiff::exit_rows(test, null.row_to_lane.data(), null.lane_to_row.data(), null.exit_layer.data(), moves.data(),
                             4, 4, 1);
        },
        part);
  };
  CHECK(refuses_test({u, nullptr, nullptr, nullptr}, "u needs threshold"));
  for (const Ints& partner : {Ints{0, 1, 2, 4}, Ints{-1, 1, 2, 3}}) {
    CHECK(refuses_test({nullptr, nullptr, mask.data(), partner.data()}, "partner names a lane outside"));
  }
  CHECK(null == State(4) && moves == Ints(12, -7));
}

// Thresholds by lane (in other rows after the first exit), thresholds without u, masks, partners, and no criterion.
void test_exit_tests() {
  const float nan = NAN, inf = INFINITY;
  const std::vector<float> u{0.25f, 0.5f, nan, 0.75f, nan, inf}, threshold{0.5f, 0.5f, inf, -inf, 0.5f, inf};
  const auto exited = [&](const adadiff::ExitTest& test) {
    State state(6);
    Ints moves(18, -7);
    state.n = adadiff::exit_rows(test, state.row_to_lane.data(), state.lane_to_row.data(), state.exit_layer.data(),
                                 moves.data(), 6, 6, 2);
    CHECK(state.n == std::count(state.exit_layer.begin(), state.exit_layer.end(), 0));
    return state.exit_layer;
  };
  CHECK((exited({u.data(), threshold.data(), nullptr, nullptr}) == Ints{2, 0, 2, 0, 0, 2}));
  CHECK((exited({nullptr, threshold.data(), nullptr, nullptr}) == Ints{0, 0, 2, 0, 0, 2}));
  const Mask mask{0, 1, 1, 1, 0, 1};
  CHECK((exited({nullptr, nullptr, mask.data(), nullptr}) == Ints{0, 2, 2, 2, 0, 2}));
  CHECK((exited({u.data(), threshold.data(), mask.data(), nullptr}) == Ints{0, 0, 2, 0, 0, 2}));
  const Ints partner{2, 5, 0, 3, 4, 1};
  CHECK((exited({u.data(), threshold.data(), nullptr, partner.data()}) == Ints{2, 0, 2, 0, 0, 0}));
  CHECK((exited({}) == Ints{2, 2, 2, 2, 2, 2}));

  State state(6);
  Ints moves(18, -7);
  state.exit({1, 0, 0, 0, 0, 0}, 1);  // lane 5 takes row 0
  CHECK((state.row_to_lane == Ints{5, 1, 2, 3, 4, 0}));
  const std::vector<float> later{0.9f, 0.9f, 0.1f, 0.1f, 0.9f}, own{-inf, 0.5f, 0.5f, -inf, 1, 1};
  state.n = adadiff::exit_rows({later.data(), own.data(), nullptr, nullptr}, state.row_to_lane.data(),
                               state.lane_to_row.data(), state.exit_layer.data(), moves.data(), 5, 6, 2);
  CHECK((state.exit_layer == Ints{1, 0, 2, 0, 2, 2}));
}

void test_settle_errors() {
  const std::vector<unsigned char> before{0, 1, 2, 3, 4, 5};
  auto rows = before, saved = before;
  const auto refuses = [&](const Ints& moves, std::int64_t row_bytes, std::int64_t rows_stride,
                           std::int64_t saved_stride, std::int64_t num_rows, std::int64_t lanes,
                           const std::string& part) {
    return raises(
               [&] {
                 adadiff::settle_rows(moves.data(), moves.size() / 3, rows.data(), num_rows, rows_stride, saved.data(),
                                      lanes, saved_stride, row_bytes);
               },
               part) &&
           rows == before && saved == before;
  };
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  CHECK(refuses({0, 1, 2}, -1, 2, 2, 3, 3, "0 or more"));
  CHECK(refuses({0, 1, 2}, 2, 2, 2, -1, 3, "0 or more"));
  CHECK(refuses({0, 1, 2}, 2, 2, 2, 3, -1, "0 or more"));
  CHECK(refuses({0, 1, 2}, 3, 2, 3, 3, 3, "overlap"));
  CHECK(refuses({0, 1, 2}, 3, 3, 2, 3, 3, "overlap"));
  CHECK(refuses({0, 1, 2}, 2, most / 2, 2, 3, 3, "overflow"));
  CHECK(refuses({0, 1, 2}, 2, 2, most / 2, 3, 3, "overflow"));
  CHECK(refuses({3, 1, 2}, 2, 2, 2, 3, 3, "outside"));
  CHECK(refuses({0, 3, 2}, 2, 2, 2, 3, 3, "outside"));
  CHECK(refuses({0, 1, 3}, 2, 2, 2, 3, 3, "outside"));
  CHECK(refuses({0, 1, -2}, 2, 2, 2, 3, 3, "outside"));
  CHECK(refuses({0, -1, 2}, 2, 2, 2, 3, 3, "outside"));
  CHECK(refuses({0, 1, 2}, 2, 2, 2, 0, 3, "outside"));
  CHECK(refuses({0, 1, -1, 0, 2, -1}, 2, 2, 2, 3, 3, "twice"));
  CHECK(refuses({0, 1, -1, 2, 1, -1}, 2, 2, 2, 3, 3, "twice"));
  CHECK(refuses({0, 1, 0}, 2, 2, 2, 3, 3, "twice"));
  const Ints move{0, 1, 2}, unused{-1, 9, 9};
  CHECK(raises([&] { adadiff::settle_rows(move.data(), -1, rows.data(), 3, 2, saved.data(), 3, 2, 2); }, "0 or more"));
  CHECK(raises([&] { adadiff::settle_rows(move.data(), 1, nullptr, 3, 2, saved.data(), 3, 2, 2); }, "is null"));
  CHECK(raises([&] { adadiff::settle_rows(move.data(), 1, rows.data(), 3, 2, nullptr, 3, 2, 2); }, "is null"));
  CHECK(raises([&] { adadiff::settle_rows(nullptr, 1, rows.data(), 3, 2, saved.data(), 3, 2, 2); }, "moves is null"));
  adadiff::settle_rows(nullptr, 0, nullptr, 0, 0, nullptr, 0, 0, 0);
  adadiff::settle_rows(move.data(), 1, nullptr, 3, 0, nullptr, 3, 0, 0);
  adadiff::settle_rows(unused.data(), 1, nullptr, 3, 2, nullptr, 3, 2, 2);
  CHECK(rows == before && saved == before);
}

// The score against its formula in double, with channel counts around every step width of the dot product.
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
        float alone = NAN;  // bit for bit: a row does not depend on its neighbours
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
  CHECK(refuses(2, 3, 4, 1, 1, -1, good, "num_lanes must be 0 or more"));
  CHECK(refuses(2, 3, 4, 1, 1, 4, good, "outside [0, num_lanes)"));
  CHECK(refuses(2, 3, 4, 1, 1, 5, {0, -1}, "outside [0, num_lanes)"));
  const float* none = nullptr;
  CHECK(raises([&] { adadiff::uem_score(none, 2, 3, 4, 1, none, none, 1, 5, nullptr, nullptr); }, "null"));
  adadiff::uem_score(none, 0, 3, 4, 1, none, none, 1, 0, nullptr, nullptr);
}

void test_any_below() {
  constexpr float kAlways = INFINITY, kNever = -INFINITY;
  const auto any = [](std::vector<float> u, std::vector<float> limit, Ints lanes) {
    return adadiff::any_below(u.data(), static_cast<std::int64_t>(u.size()), limit.data(), lanes.data());
  };
  CHECK(!any({0.5f, 0.25f}, {0.25f, 0.1f, 0.5f}, {2, 0}));  // strictly below the limit of the row's own lane
  CHECK(any({0.5f, 0.2f}, {0.25f, 0.1f, 0.5f}, {2, 0}));
  CHECK(!any({NAN, 0.5f}, {0.9f, kNever}, {0, 1}));  // NaN is never below
  CHECK(any({0.5f, NAN}, {kNever, kAlways}, {0, 1}));  // but a limit of +inf needs no u
  CHECK(!any({}, {}, {}));
}

// The last word of our counters is 0, so only the all-zero one of Random123's known answers applies. The others are in
// tests/kernels/test_philox.py, against the same formula in Python.
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
  test_exit_errors();
  test_settle_errors();
  test_scores<float>();
  test_scores<adadiff::bfloat16>();
  test_score_errors();
  test_any_below();
  test_exit_tests();
  test_philox();
  test_compaction();
  std::puts("core: all tests passed");
}
