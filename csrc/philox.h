// Philox4x32-10; formula and source in adadiff_kernels/philox/reference.py. Bad arguments throw std::invalid_argument
// before anything is written.
#pragma once

#include <cstdint>

namespace adadiff {

// words[i][block] = the four words of counter (block, steps[i], stream, 0) under key (seeds[i] mod 2^32, seeds[i] >> 32)
//
//   seeds, steps  int64[n], in [0, 2^63) and [0, 2^32)
//   words         int64[n][blocks][4]  out, each in [0, 2^32)
void philox(const std::int64_t* seeds, const std::int64_t* steps, std::int64_t n, std::int64_t stream,
            std::int64_t blocks, std::int64_t* words);

}  // namespace adadiff
