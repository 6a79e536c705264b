// The score of one layer's UEM with one output per token; formula in adadiff_kernels/residual_uem/reference.py.
// No Python, no Torch: pointers, sizes and strides. Bad arguments throw std::invalid_argument before anything is
// written.
#pragma once

#include <cstdint>

namespace adadiff {

struct bfloat16 {
  std::uint16_t bits;
};

// u[r] = mean over tokens t >= num_prefix_tokens of sigmoid(weight . y[r, t] + offset[row_to_lane[r] * offset_stride])
//
//   y       [n][tokens][channels]  float or bfloat16
//   weight  float[channels]
//   offset  float, one for each of num_lanes lanes, offset_stride elements apart (0: one shared by all)
//   row_to_lane  int32[n]
//   u       float[n]               out
//
// Sums are taken in one fixed order, so u[r] depends on row r alone. Runs on the calling thread: y, just written by the
// block before, is still in the cache.
template <typename Element>
void uem_score(const Element* y, std::int64_t n, std::int64_t tokens, std::int64_t channels,
               std::int64_t num_prefix_tokens, const float* weight, const float* offset, std::int64_t offset_stride,
               std::int32_t num_lanes, const std::int32_t* row_to_lane, float* u);

// Whether any row's u is below its lane's limit, or any row's limit is +inf: some row may exit. NaN is never below.
bool any_below(const float* u, std::int64_t n, const float* limit, const std::int32_t* row_to_lane);

}  // namespace adadiff
