// Which lanes still run and in which row each lies: one permutation of the lanes, changed in place; and the moves of
// whole rows that follow from it. On the CPU; compaction.h holds the algorithm, which a GPU runs as well.
// No Python, no Torch: pointers, sizes and strides. Every function throws std::invalid_argument before it changes
// anything.
#pragma once

#include <cstdint>

namespace adadiff {

// Who exits after a layer: a row whose mask is nonzero, and whose u is below the threshold of its lane. An infinite
// threshold needs no u, and NaN is below nothing. What is null is not asked; if all are, everybody exits.
struct ExitTest {
  const float* u = nullptr;                // [n] by row
  const float* threshold = nullptr;        // [num_lanes] by lane
  const std::uint8_t* mask = nullptr;      // [n] by row
  const std::int32_t* partner = nullptr;   // [num_lanes] the lane with which a lane exits or stays, itself if none
};

// Lanes exit after `layer` (1 or more, and no earlier than the last layer after which somebody exited).
//
//   row_to_lane  int32[num_lanes]
//   lane_to_row  int32[num_lanes]   its inverse
//   exit_layer   int32[num_lanes]   by lane, 0 while it runs
//   moves        int32[n][3]        out: an exiting row, its lane, and the row that takes its place (-1: none), in the
//                                   order of the rows, then rows of -1; not written if nobody exits
//
// Rows [0, n) run; afterwards rows [0, returned) do, and rows [returned, n) exited after `layer`. The k-th exiting row
// below the new count changes places with the k-th remaining row at or above it, both counted upwards: no smaller set
// of swaps keeps the running rows together.
std::int32_t exit_rows(const ExitTest& test, std::int32_t* row_to_lane, std::int32_t* lane_to_row,
                       std::int32_t* exit_layer, std::int32_t* moves, std::int32_t n, std::int32_t num_lanes,
                       std::int32_t layer);

// What exit_rows asks of memory: for each of k moves (row, lane, source), saved[lane] = rows[row]; then rows[row] =
// rows[source] where source is not -1. Moves end at the first whose row is -1.
//
//   rows   [num_rows]   rows of row_bytes contiguous bytes, rows_stride bytes apart
//   saved  [num_lanes]  likewise, saved_stride bytes apart; shares no memory with rows
void settle_rows(const std::int32_t* moves, std::int64_t k, void* rows, std::int64_t num_rows, std::int64_t rows_stride,
                 void* saved, std::int64_t num_lanes, std::int64_t saved_stride, std::int64_t row_bytes);

}  // namespace adadiff
