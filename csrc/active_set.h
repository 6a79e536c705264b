// Who still runs, and where each lane lies: one permutation of the lanes, changed in place.
// No Python, no Torch: pointers, sizes and strides. Every function throws std::invalid_argument
// before it changes anything.
#pragma once

#include <cstdint>

namespace adadiff {

struct Leave {
  std::int32_t after;  // rows that still run
  std::int32_t swaps;  // pairs written
};

// Lets lanes leave at `layer` (1 or more, and no earlier than the last one at which somebody left).
//
//   mask        uint8[n]      by row: nonzero leaves
//   lane        int32[lanes]  row -> lane
//   row         int32[lanes]  lane -> row
//   exit_layer  int32[lanes]  by lane, 0 while it runs
//   swaps       int32[n/2][2] out: pairs of rows whose contents have to change places
//
// Rows [0, n) run; after the call rows [0, after) do, and rows [after, n) have left at `layer`.
// Pairing: the k-th leaving row below `after` changes places with the k-th kept row at or above it,
// both counted upwards. So the pairs are disjoint, and no set of swaps is smaller.
Leave leave(const std::uint8_t* mask, std::int32_t* lane, std::int32_t* row, std::int32_t* exit_layer,
            std::int32_t* swaps, std::int32_t n, std::int32_t lanes, std::int32_t layer);

// Exchanges whole rows in place. `data` holds `rows` rows of `row_bytes` contiguous bytes that start
// `stride_bytes` apart; `pairs` is int32[k][2], each row named at most once.
void swap_rows(void* data, std::int64_t row_bytes, std::int64_t stride_bytes, std::int64_t rows,
               const std::int32_t* pairs, std::int64_t k);

}  // namespace adadiff
