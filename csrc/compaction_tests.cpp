// Runs the steps of compaction.h for one thread after another, in a new random order after each barrier, and compares
// with plain loops. A step that depended on another thread's work in the same step would differ.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "compaction.h"
#include "tests.h"

namespace {

namespace compaction = adadiff::compaction;

struct Block {
  template <typename Step>
  void each(Step step) {
    std::shuffle(order.begin(), order.end(), random);
    for (const std::int32_t index : order) step(index);
  }

  void run(const compaction::Arguments& a) {
    std::memset(&shared, 0x5A, sizeof shared);
    std::vector<compaction::Thread> t(order.size());
    const auto threads = static_cast<std::int32_t>(order.size());
    each([&](std::int32_t i) { t[i] = compaction::decide(a, shared, i, threads); });
    each([&](std::int32_t i) { compaction::add_up(shared, t[i], threads); });
    each([&](std::int32_t i) { compaction::count(a, shared, t[i], threads); });
    each([&](std::int32_t i) { compaction::list(a, shared, t[i]); });
    each([&](std::int32_t i) { compaction::exchange(a, shared, t[i], threads); });
    each([&](std::int32_t i) { compaction::record(a, t[i], threads); });
  }

  explicit Block(std::int32_t threads, unsigned seed) : order(threads), random(seed) {
    std::iota(order.begin(), order.end(), 0);
  }

  Ints order;
  std::mt19937 random;
  compaction::Shared shared;
};

struct Set {
  Set(std::int32_t lanes, Block& block) : Set(lanes, lanes, block) {}

  Set(std::int32_t lanes, std::int32_t count, Block& block)
      : row_to_lane(lanes, -7), lane_to_row(lanes, -7), exit_layer(lanes, -7), lanes(lanes), block(block) {
    block.each([&](std::int32_t i) {
      compaction::start(row_to_lane.data(), lane_to_row.data(), exit_layer.data(), &state, lanes, count, &word,
                        i,
                        static_cast<std::int32_t>(block.order.size()));
    });
  }

  // Allocates exactly the documented number of moves, so that AddressSanitizer reports one too many.
  Ints exit(compaction::Arguments a) {
    Ints moves(3 * a.bound, -7), snapshot(lanes, -7);
    a.row_to_lane = row_to_lane.data();
    a.lane_to_row = lane_to_row.data();
    a.exit_layer = exit_layer.data();
    a.state = &state;
    a.moves = moves.data();
    if (a.layer % 2) a.snapshot = snapshot.data();
    a.word = &word;
    a.num_lanes = lanes;
    block.run(a);
    CHECK(word == compaction::pack(state.tick, a.layer, state.count));
    CHECK(snapshot == (a.layer % 2 ? lane_to_row : Ints(lanes, -7)));
    return moves;
  }

  Ints row_to_lane, lane_to_row, exit_layer;
  std::int32_t lanes;
  Block& block;
  compaction::State state{-1, -1, 0xFFFF};
  volatile std::uint64_t word = 0;
};

// The same set kept in lists, one row at a time.
struct Lists {
  explicit Lists(std::int32_t lanes) : row_to_lane(lanes), exit_layer(lanes, 0), n(lanes) {
    std::iota(row_to_lane.begin(), row_to_lane.end(), 0);
  }

  // mask: by running row. Returns the moves, followed by rows of -1 up to bound.
  Ints exit(const Mask& mask, std::int32_t bound, std::int32_t layer) {
    Ints moves(3 * bound, -1), from_above;
    const auto after = static_cast<std::int32_t>(std::count(mask.begin(), mask.end(), 0));
    for (std::int32_t r = after; r < n; ++r) {
      if (!mask[r]) from_above.push_back(r);
    }
    std::int32_t k = 0;
    for (std::int32_t r = 0; r < n; ++r) {
      if (!mask[r]) continue;
      moves[3 * k] = r;
      moves[3 * k + 1] = row_to_lane[r];
      exit_layer[row_to_lane[r]] = layer;
      if (k < static_cast<std::int32_t>(from_above.size())) moves[3 * k + 2] = from_above[k];
      ++k;
    }
    for (std::size_t j = 0; j < from_above.size(); ++j) {
      std::swap(row_to_lane[moves[3 * j]], row_to_lane[from_above[j]]);
    }
    moved += 2 * static_cast<std::int32_t>(from_above.size());
    n = after;
    return moves;
  }

  Ints lane_to_row() const {
    Ints rows(row_to_lane.size());
    for (std::size_t r = 0; r < rows.size(); ++r) rows[row_to_lane[r]] = static_cast<std::int32_t>(r);
    return rows;
  }

  bool are(const Set& set) const {
    return set.row_to_lane == row_to_lane && set.lane_to_row == lane_to_row() && set.exit_layer == exit_layer &&
           set.state.count == n && set.state.moved == moved;
  }

  Ints row_to_lane, exit_layer;
  std::int32_t n, moved = 0;
};

compaction::Arguments at(std::int32_t layer, std::int32_t bound) {
  compaction::Arguments a{};
  a.layer = layer;
  a.bound = bound;
  return a;
}

// One run: a few random exits, each with randomly chosen criteria (u, threshold, mask, partner).
void check_run(std::int32_t lanes, std::int32_t threads, std::mt19937& random) {
  Block block(threads, random());
  Set set(lanes, block);
  Lists lists(lanes);
  CHECK(lists.are(set) && set.state.tick == 0);
  CHECK(set.word == compaction::pack(0, 0, lanes));

  std::vector<float> threshold(lanes);
  Ints partner(lanes);
  std::iota(partner.begin(), partner.end(), 0);
  for (std::int32_t l = 0; l + 1 < lanes; l += 2) {
    if (random() % 2) std::swap(partner[l], partner[l + 1]);
  }
  for (std::int32_t layer = 1; layer <= 6; ++layer) {
    const std::int32_t n = lists.n, bound = n + static_cast<std::int32_t>(random() % (lanes - n + 1));
    const unsigned share = random() % 5;  // of 4 rows, how many exit on average
    std::vector<float> u(bound);
    Mask mask(bound);
    for (float& value : u) value = random() % 8 == 0 ? NAN : random() % 4 < share ? 0.25f : 0.75f;
    for (auto& value : mask) value = random() % 4 < share ? 1 + random() % 255 : 0;
    // 0.25 is not below itself; +inf lets a lane exit whatever u is, -inf never does
    for (float& value : threshold) value = random() % 4 ? 0.5f : random() % 4 ? 0.25f : INFINITY;
    for (float& value : threshold) value = random() % 8 ? value : -INFINITY;

    const unsigned way = random() % 8;
    compaction::Arguments a = at(layer, bound);
    if (way % 4 == 1) a.mask = mask.data();
    if (way % 4 >= 2) a.threshold = threshold.data();
    if (way % 4 == 2) a.u = u.data();
    if (way & 4) a.partner = partner.data();
    if (way % 4 == 0 && layer < 5) continue;  // every row exits
    const auto alone = [&](std::int32_t r) {
      if (a.mask) return mask[r] != 0;
      if (!a.threshold) return true;
      const float own = threshold[lists.row_to_lane[r]];
      return std::isinf(own) ? own > 0 : a.u && u[r] < own;
    };
    const Ints rows = lists.lane_to_row();
    Mask exiting(n);
    for (std::int32_t r = 0; r < n; ++r) {
      exiting[r] = alone(r);
      if (!a.partner) continue;
      const std::int32_t other = rows[partner[lists.row_to_lane[r]]];
      exiting[r] = exiting[r] && other < n && alone(other);
    }
    CHECK(set.exit(a) == lists.exit(exiting, bound, layer));
    CHECK(lists.are(set));
  }
}

void test_patterns_of_a_block() {
  for (const std::int32_t threads : {32, 64, 1024}) {
    for (const std::int32_t n : {0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 1023, 1024}) {
      if (n > 32 * threads) continue;
      for (int pattern = 0; pattern < 7; ++pattern) {
        Mask mask(n);
        for (std::int32_t r = 0; r < n; ++r) {
          const bool exits[] = {false, true, r == 0, r == n - 1, r > 0, r < n - 1, r % 2 == 0};
          mask[r] = exits[pattern];
        }
        Block block(threads, 3);
        Set set(n, block);
        Lists lists(n);
        compaction::Arguments a = at(2, n);
        a.mask = mask.data();
        CHECK(set.exit(a) == lists.exit(mask, n, 2));
        CHECK(lists.are(set));
      }
    }
  }
}

// By hand: three of rows 0 to 6 exit; then one pair of partners exits, and a pair of which one may not exit stays.
void test_moves_by_hand() {
  Block block(64, 5);
  Set set(7, block);
  const Mask mask{1, 0, 0, 0, 1, 0, 1};
  compaction::Arguments a = at(3, 7);
  a.mask = mask.data();
  Ints expected{0, 0, 5, 4, 4, -1, 6, 6, -1};
  expected.resize(21, -1);
  CHECK(set.exit(a) == expected);
  CHECK(set.state.count == 4 && set.state.moved == 2 && (set.exit_layer == Ints{3, 0, 0, 0, 3, 0, 3}));
  CHECK((set.row_to_lane == Ints{5, 1, 2, 3, 4, 0, 6}) && (set.lane_to_row == Ints{5, 1, 2, 3, 4, 0, 6}));
  // Lanes 5 and 1 are partners and both may exit; lane 2 may, but its partner 3 may not.
  const Ints partner{0, 5, 3, 2, 4, 1, 6};
  const Mask wanted{1, 1, 1, 0};
  a = at(4, 4);
  a.mask = wanted.data();
  a.partner = partner.data();
  CHECK((set.exit(a) == Ints{0, 5, 2, 1, 1, 3, -1, -1, -1, -1, -1, -1}));
  CHECK(set.state.count == 2 && (set.row_to_lane == Ints{2, 3, 5, 1, 4, 0, 6}));
}

// Lanes beyond the count of a start take no part: they are not tested for exit, and they stay where they are.
void test_fewer_lanes() {
  Block block(64, 5);
  for (const std::int32_t count : {0, 1, 3, 6}) {
    Set set(7, count, block);
    CHECK(set.state.count == count && set.word == compaction::pack(0, 0, count));
    Mask mask(7, 1);
    if (count) mask[0] = 0;
    compaction::Arguments a = at(1, 7);
    a.mask = mask.data();
    set.exit(a);
    CHECK(set.state.count == std::min(count, 1));
    for (std::int32_t lane = 0; lane < 7; ++lane) {
      CHECK(set.exit_layer[lane] == (lane > 0 && lane < count ? 1 : 0));
      if (lane >= count) CHECK(set.row_to_lane[lane] == lane);
    }
    set.exit(at(2, 7));
    CHECK(set.state.count == 0);
    for (std::int32_t lane = count; lane < 7; ++lane) CHECK(set.exit_layer[lane] == 0);
  }
}

// With a bound below the count nothing moves, and the count is kFault until the next start.
void test_faults() {
  Block block(32, 9);
  Set set(4, block);
  const Ints lanes = set.row_to_lane, exit_layer = set.exit_layer;
  CHECK(set.exit(at(1, 3)) == Ints(9, -1));
  CHECK(set.state.count == compaction::kFault && set.state.moved == 0);
  CHECK(set.exit(at(2, 4)) == Ints(12, -1));
  CHECK(set.state.count == compaction::kFault && set.row_to_lane == lanes && set.lane_to_row == lanes);
  CHECK(set.exit_layer == exit_layer);
}

}  // namespace

void test_compaction() {
  std::mt19937 random(13);
  test_patterns_of_a_block();
  for (int run = 0; run < 2000; ++run) {
    check_run(static_cast<std::int32_t>(random() % 140), run % 2 ? 32 : 96, random);
  }
  for (const std::int32_t lanes : {1023, 1025, 3000}) check_run(lanes, compaction::kThreads, random);
  check_run(compaction::kMaxLanes, compaction::kThreads, random);
  test_moves_by_hand();
  test_fewer_lanes();
  test_faults();
}
