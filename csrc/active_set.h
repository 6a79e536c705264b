// Compaction on the CPU: which lanes run and in which row each lies (one permutation of the lanes, changed in place),
// and the row copies that follow from it. compaction.h holds the algorithm, which a GPU runs as well.
// No Python, no Torch: pointers, sizes and strides. Bad arguments throw std::invalid_argument before anything changes.
#pragma once

#include <cstdint>

namespace adadiff {

// Which rows exit after a layer: those whose mask is nonzero and whose u is below the threshold of their lane. A
// threshold of +inf needs no u; NaN is never below. A null criterion is skipped; if all are null, every row exits.
struct ExitTest {
  const float* u = nullptr;                // [n] by row
  const float* threshold = nullptr;        // [num_lanes] by lane
  const std::uint8_t* mask = nullptr;      // [n] by row
  const std::int32_t* partner = nullptr;   // [num_lanes] the lane with which a lane exits or stays, itself if none
};

// Lanes exit after `layer` (1 or more, and no earlier than the last layer after which a lane exited).
//
//   row_to_lane  int32[num_lanes]
//   lane_to_row  int32[num_lanes]   its inverse
//   exit_layer   int32[num_lanes]   by lane, 0 while it runs
//   moves        int32[n][3]        out: an exiting row, its lane, and the row that takes its place (-1: none), in row
//                                   order, then rows of -1; not written if no row exits
//
// Returns the new count. Rows [0, n) run before; afterwards rows [0, count) run, and rows [count, n) have exited after
// `layer`. The k-th exiting row below the new count changes places with the k-th remaining row at or above it, both
// counted upwards: no smaller set of swaps keeps the running rows contiguous.
std::int32_t exit_rows(const ExitTest& test, std::int32_t* row_to_lane, std::int32_t* lane_to_row,
                       std::int32_t* exit_layer, std::int32_t* moves, std::int32_t n, std::int32_t num_lanes,
                       std::int32_t layer);

// The row copies after exit_rows: for each of k moves (row, lane, source), saved[lane] = rows[row]; then rows[row] =
// rows[source] where source is not -1. Moves end at the first whose row is -1.
//
//   rows   [num_rows]   rows of row_bytes contiguous bytes, rows_stride bytes apart
//   saved  [num_lanes]  likewise, saved_stride bytes apart; shares no memory with rows
void settle_rows(const std::int32_t* moves, std::int64_t k, void* rows, std::int64_t num_rows, std::int64_t rows_stride,
                 void* saved, std::int64_t num_lanes, std::int64_t saved_stride, std::int64_t row_bytes);

}  // namespace adadiff
