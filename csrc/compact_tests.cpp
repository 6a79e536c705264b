// The steps of compact.h run by threads one after the other, in an order drawn anew between barriers, against `leave`
// with a mask that plain loops make. A step that needed what another thread does in the same step would differ.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "active_set.h"
#include "compact.h"
#include "tests.h"

namespace {

namespace compact = adadiff::compact;

struct Block {
  template <typename Step>
  void each(Step step) {
    std::shuffle(order.begin(), order.end(), random);
    for (const std::int32_t index : order) step(index);
  }

  void run(const compact::Arguments& a) {
    std::memset(&shared, 0x5A, sizeof shared);
    std::vector<compact::Thread> t(order.size());
    const auto threads = static_cast<std::int32_t>(order.size());
    each([&](std::int32_t i) { t[i] = compact::decide(a, shared, i, threads); });
    each([&](std::int32_t i) { compact::add_up(shared, t[i], threads); });
    each([&](std::int32_t i) { compact::count(a, shared, t[i], threads); });
    each([&](std::int32_t i) { compact::list(a, shared, t[i]); });
    each([&](std::int32_t i) { compact::exchange(a, shared, t[i], threads); });
    each([&](std::int32_t i) { compact::record(a, t[i], threads); });
  }

  explicit Block(std::int32_t threads, unsigned seed) : order(threads), random(seed) {
    std::iota(order.begin(), order.end(), 0);
  }

  Ints order;
  std::mt19937 random;
  compact::Shared shared;
};

struct Set {
  Set(std::int32_t lanes, Block& block)
      : lane(lanes, -7), row(lanes, -7), exit_layer(lanes, -7), lanes(lanes), block(block) {
    block.each([&](std::int32_t i) {
      compact::start(lane.data(), row.data(), exit_layer.data(), &state, lanes, &word, i,
                     static_cast<std::int32_t>(block.order.size()));
    });
  }

  // Exactly as many moves as promised, so that one too many is seen by AddressSanitizer.
  Ints leave(compact::Arguments a) {
    Ints moves(3 * a.bound, -7), snapshot(lanes, -7);
    a.lane = lane.data();
    a.row = row.data();
    a.exit_layer = exit_layer.data();
    a.state = &state;
    a.moves = moves.data();
    if (a.layer % 2) a.snapshot = snapshot.data();
    a.word = &word;
    a.lanes = lanes;
    block.run(a);
    CHECK(word == compact::pack(state.tick, a.layer, state.count));
    CHECK(snapshot == (a.layer % 2 ? row : Ints(lanes, -7)));
    return moves;
  }

  Ints lane, row, exit_layer;
  std::int32_t lanes;
  Block& block;
  compact::State state{-1, -1, 0xFFFF};
  volatile std::uint64_t word = 0;
};

compact::Arguments at(std::int32_t layer, std::int32_t bound) {
  compact::Arguments a{};
  a.layer = layer;
  a.bound = bound;
  return a;
}

// What `leave` of active_set.h does, and the moves that make its result: bound rows of (row, lane, source).
Ints leave_on_host(const Mask& mask, Ints& lane, Ints& row, Ints& exit_layer, std::int32_t& n, std::int32_t bound,
                   std::int32_t layer) {
  const Ints before = lane;
  Ints pairs(2 * (n / 2)), moves(3 * bound, -1);
  const auto result = adadiff::leave(mask.data(), lane.data(), row.data(), exit_layer.data(), pairs.data(), n,
                                     static_cast<std::int32_t>(lane.size()), layer);
  std::int32_t k = 0;
  for (std::int32_t r = 0; r < n; ++r) {
    if (!mask[r]) continue;
    moves[3 * k] = r;
    moves[3 * k + 1] = before[r];
    if (k < result.swaps) moves[3 * k + 2] = pairs[2 * k + 1];
    ++k;
  }
  n = result.after;
  return moves;
}

// One run: a few layers of leaves, each decided at random and by another of the ways to decide.
void check_run(std::int32_t lanes, std::int32_t threads, std::mt19937& random) {
  Block block(threads, random());
  Set set(lanes, block);
  Ints lane = set.lane, row = set.row, exit_layer = set.exit_layer;  // changed by adadiff::leave
  std::int32_t n = lanes, moved = 0;
  CHECK(set.state.count == n && set.state.moved == 0 && set.state.tick == 0);
  CHECK(set.word == compact::pack(0, 0, n));
  for (std::int32_t l = 0; l < lanes; ++l) CHECK(lane[l] == l && row[l] == l && exit_layer[l] == 0);

  std::vector<float> threshold(lanes);
  Ints partner(lanes);
  std::iota(partner.begin(), partner.end(), 0);
  for (std::int32_t l = 0; l + 1 < lanes; l += 2) {
    if (random() % 2) std::swap(partner[l], partner[l + 1]);
  }
  for (std::int32_t layer = 1; layer <= 6; ++layer) {
    const std::int32_t bound = n + static_cast<std::int32_t>(random() % (lanes - n + 1));
    const unsigned share = random() % 5;  // of 4 that leave
    std::vector<float> u(bound);
    Mask mask(bound);
    for (float& value : u) value = random() % 8 == 0 ? NAN : random() % 4 < share ? 0.25f : 0.75f;
    for (auto& value : mask) value = random() % 4 < share ? 1 + random() % 255 : 0;
    // 0.25 is not below itself; infinity lets leave whatever u is, and minus infinity nobody
    for (float& value : threshold) value = random() % 4 ? 0.5f : random() % 4 ? 0.25f : INFINITY;
    for (float& value : threshold) value = random() % 8 ? value : -INFINITY;

    const unsigned way = random() % 8;
    compact::Arguments a = at(layer, bound);
    if (way % 4 == 1) a.mask = mask.data();
    if (way % 4 >= 2) a.threshold = threshold.data();
    if (way % 4 == 2) a.u = u.data();
    if (way & 4) a.partner = partner.data();
    if (way % 4 == 0 && layer < 5) continue;  // everybody
    const auto alone = [&](std::int32_t r) {
      if (a.mask) return mask[r] != 0;
      if (!a.threshold) return true;
      const float own = threshold[lane[r]];
      return std::isinf(own) ? own > 0 : a.u && u[r] < own;
    };
    Mask leaving(n);
    for (std::int32_t r = 0; r < n; ++r) {
      leaving[r] = alone(r);
      if (!a.partner) continue;
      const std::int32_t other = row[partner[lane[r]]];
      leaving[r] = leaving[r] && other < n && alone(other);
    }
    const Ints expected = leave_on_host(leaving, lane, row, exit_layer, n, bound, layer);
    for (std::int32_t k = 0; k < bound; ++k) moved += expected[3 * k + 2] < 0 ? 0 : 2;
    CHECK(set.leave(a) == expected);
    CHECK(set.lane == lane && set.row == row && set.exit_layer == exit_layer);
    CHECK(set.state.count == n && set.state.moved == moved);
  }
}

void test_patterns_of_a_block() {
  for (const std::int32_t threads : {32, 64, 1024}) {
    for (const std::int32_t n : {0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 1023, 1024}) {
      if (n > 32 * threads) continue;
      for (int pattern = 0; pattern < 7; ++pattern) {
        Mask mask(n);
        for (std::int32_t r = 0; r < n; ++r) {
          const bool leaves[] = {false, true, r == 0, r == n - 1, r > 0, r < n - 1, r % 2 == 0};
          mask[r] = leaves[pattern];
        }
        Block block(threads, 3);
        Set set(n, block);
        Ints lane = set.lane, row = set.row, exit_layer = set.exit_layer;
        std::int32_t after = n;
        const Ints expected = leave_on_host(mask, lane, row, exit_layer, after, n, 2);
        compact::Arguments a = at(2, n);
        a.mask = mask.data();
        CHECK(set.leave(a) == expected);
        CHECK(set.lane == lane && set.row == row && set.exit_layer == exit_layer && set.state.count == after);
      }
    }
  }
}

// By hand: of rows 0 to 6 the first and the fifth leave, then the one tied to another goes with it or not at all.
void test_moves_by_hand() {
  Block block(64, 5);
  Set set(7, block);
  const Mask mask{1, 0, 0, 0, 1, 0, 1};
  compact::Arguments a = at(3, 7);
  a.mask = mask.data();
  Ints expected{0, 0, 5, 4, 4, -1, 6, 6, -1};
  expected.resize(21, -1);
  CHECK(set.leave(a) == expected);
  CHECK(set.state.count == 4 && set.state.moved == 2 && (set.exit_layer == Ints{3, 0, 0, 0, 3, 0, 3}));
  CHECK((set.lane == Ints{5, 1, 2, 3, 4, 0, 6}) && (set.row == Ints{5, 1, 2, 3, 4, 0, 6}));
  // Lanes 5 and 1 are tied and both may leave; lane 2 is tied to 3, which may not.
  const Ints partner{0, 5, 3, 2, 4, 1, 6};
  const Mask wanted{1, 1, 1, 0};
  a = at(4, 4);
  a.mask = wanted.data();
  a.partner = partner.data();
  CHECK((set.leave(a) == Ints{0, 5, 2, 1, 1, 3, -1, -1, -1, -1, -1, -1}));
  CHECK(set.state.count == 2 && (set.lane == Ints{2, 3, 5, 1, 4, 0, 6}));
}

// A bound below the count: nothing moves, and the count says so until the next start.
void test_faults() {
  Block block(32, 9);
  Set set(4, block);
  const Ints lane = set.lane, exit_layer = set.exit_layer;
  CHECK(set.leave(at(1, 3)) == Ints(9, -1));
  CHECK(set.state.count == compact::kFault && set.state.moved == 0);
  CHECK(set.leave(at(2, 4)) == Ints(12, -1));
  CHECK(set.state.count == compact::kFault && set.lane == lane && set.row == lane && set.exit_layer == exit_layer);
}

}  // namespace

void test_compact() {
  std::mt19937 random(13);
  test_patterns_of_a_block();
  for (int run = 0; run < 2000; ++run) {
    check_run(static_cast<std::int32_t>(random() % 140), run % 2 ? 32 : 96, random);
  }
  for (const std::int32_t lanes : {1023, 1025, 3000}) check_run(lanes, compact::kThreads, random);
  check_run(compact::kMaxLanes, compact::kThreads, random);
  test_moves_by_hand();
  test_faults();
}
