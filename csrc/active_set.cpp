#include "active_set.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "compaction.h"

namespace adadiff {
namespace {

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

}  // namespace

std::int32_t exit_rows(const ExitTest& test, std::int32_t* row_to_lane, std::int32_t* lane_to_row,
                       std::int32_t* exit_layer, std::int32_t* moves, std::int32_t n, std::int32_t num_lanes,
                       std::int32_t layer) {
  require(n >= 0, "exit_rows: n must be 0 or more");
  require(n <= num_lanes, "exit_rows: n must be at most num_lanes");
  require(num_lanes <= compaction::kMaxLanes, "exit_rows: num_lanes must be at most 32768");
  require(layer >= 1, "exit_rows: layer must be 1 or more");
  require(!test.u || test.threshold, "exit_rows: u needs threshold");
  require((row_to_lane && lane_to_row && exit_layer) || num_lanes == 0,
          "exit_rows: row_to_lane, lane_to_row or exit_layer is null");
  require(moves || n == 0, "exit_rows: moves is null");
  const auto is_inverse = [&](std::int32_t row) {
    const std::int32_t lane = row_to_lane[row];
    return lane >= 0 && lane < num_lanes && lane_to_row[lane] == row;
  };
  for (std::int32_t r = 0; r < n; ++r) {
    require(is_inverse(r), "exit_rows: row_to_lane and lane_to_row are not each other's inverse");
    require(exit_layer[row_to_lane[r]] == 0, "exit_rows: a running lane has exited already");
  }
  if (n < num_lanes) {
    require(is_inverse(n), "exit_rows: row_to_lane and lane_to_row are not each other's inverse");
    require(exit_layer[row_to_lane[n]] <= layer, "exit_rows: a lane has exited after a later layer");
  }

  for (std::int32_t r = 0; test.partner && r < n; ++r) {
    const std::int32_t partner = test.partner[row_to_lane[r]];
    require(partner >= 0 && partner < num_lanes, "exit_rows: partner names a lane outside [0, num_lanes)");
    require(lane_to_row[partner] >= 0, "exit_rows: row_to_lane and lane_to_row are not each other's inverse");
  }

  // Runs the threads of a block one after another.
  compaction::State state{n, 0, 0};
  std::uint64_t word = 0;
  compaction::Arguments a{};
  a.row_to_lane = row_to_lane;
  a.lane_to_row = lane_to_row;
  a.exit_layer = exit_layer;
  a.state = &state;
  a.u = test.u;
  a.threshold = test.threshold;
  a.mask = test.mask;
  a.partner = test.partner;
  a.moves = moves;
  a.word = &word;
  a.bound = n;
  a.num_lanes = num_lanes;
  a.layer = layer;
  std::int32_t first = 0;
  while (first < n && !compaction::exits(a, n, first)) ++first;
  if (first == n) return n;
  const std::int32_t threads = std::max<std::int32_t>(1, (n + compaction::kGroup - 1) / compaction::kGroup);
  std::vector<compaction::Thread> thread(static_cast<std::size_t>(threads));
  compaction::Shared shared;
  for (std::int32_t i = 0; i < threads; ++i) thread[i] = compaction::decide(a, shared, i, threads);
  for (const auto& t : thread) compaction::add_up(shared, t, threads);
  for (auto& t : thread) compaction::count(a, shared, t, threads);
  for (const auto& t : thread) compaction::list(a, shared, t);
  for (const auto& t : thread) compaction::exchange(a, shared, t, threads);
  return state.count;
}

void settle_rows(const std::int32_t* moves, std::int64_t k, void* rows, std::int64_t num_rows, std::int64_t rows_stride,
                 void* saved, std::int64_t num_lanes, std::int64_t saved_stride, std::int64_t row_bytes) {
  require(k >= 0 && num_rows >= 0 && num_lanes >= 0 && row_bytes >= 0,
          "settle_rows: k, num_rows, num_lanes and row_bytes must be 0 or more");
  require(row_bytes <= rows_stride && row_bytes <= saved_stride,
          "settle_rows: rows overlap: row_bytes is larger than a stride");
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  require(num_rows == 0 || rows_stride <= most / num_rows, "settle_rows: num_rows * rows_stride overflows");
  require(num_lanes == 0 || saved_stride <= most / num_lanes, "settle_rows: num_lanes * saved_stride overflows");
  require(moves || k == 0, "settle_rows: moves is null");

  std::vector<bool> row_named(static_cast<std::size_t>(k ? num_rows : 0));
  std::vector<bool> lane_named(static_cast<std::size_t>(k ? num_lanes : 0));
  const auto name = [](std::vector<bool>& named, std::int32_t index) {
    require(index >= 0 && static_cast<std::size_t>(index) < named.size(),
            "settle_rows: moves name a row or lane outside");
    require(!named[static_cast<std::size_t>(index)], "settle_rows: moves name a row or lane twice");
    named[static_cast<std::size_t>(index)] = true;
  };
  std::int64_t used = 0;
  for (; used < k && moves[3 * used] != -1; ++used) {
    const std::int32_t* move = moves + 3 * used;
    name(row_named, move[0]);
    name(lane_named, move[1]);
    if (move[2] != -1) name(row_named, move[2]);
  }
  require((rows && saved) || used == 0 || row_bytes == 0, "settle_rows: rows or saved is null");
  if (row_bytes == 0) return;

  const auto size = static_cast<std::size_t>(row_bytes);
  auto* from = static_cast<unsigned char*>(rows);
  auto* to = static_cast<unsigned char*>(saved);
  for (const std::int32_t* move = moves; move != moves + 3 * used; move += 3) {
    std::memcpy(to + move[1] * saved_stride, from + move[0] * rows_stride, size);
    if (move[2] != -1) std::memcpy(from + move[0] * rows_stride, from + move[2] * rows_stride, size);
  }
}

}  // namespace adadiff
