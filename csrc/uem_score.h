// The score of one layer's UEM with one output a token; formula in adadiff_kernels/residual_uem.py.
// No Python, no Torch: pointers, sizes and strides. Throws std::invalid_argument before it writes.
#pragma once

#include <cstdint>

namespace adadiff {

struct bfloat16 {
  std::uint16_t bits;
};

// u[r] = mean over tokens t >= num_prefix_tokens of sigmoid(weight . y[r, t] + offset[lanes[r] * offset_stride])
//
//   y       [n][tokens][channels]  float or bfloat16
//   weight  float[channels]
//   offset  float, one for each of B lanes, `offset_stride` elements apart (0: one for all)
//   lanes   int32[n]               row -> lane
//   u       float[n]               out
//
// Sums are taken in one fixed order, so u[r] depends on row r alone. One thread: the rows of one block
// call are read from the cache into which the block has just written them.
template <typename Element>
void uem_score(const Element* y, std::int64_t n, std::int64_t tokens, std::int64_t channels,
               std::int64_t num_prefix_tokens, const float* weight, const float* offset, std::int64_t offset_stride,
               std::int32_t B, const std::int32_t* lanes, float* u);

}  // namespace adadiff
