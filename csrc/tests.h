// Shared by the test files. No framework: the first failure prints its line and ends the program.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(condition)                                              \
  do {                                                                \
    if (!(condition)) {                                               \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
      std::exit(1);                                                   \
    }                                                                 \
  } while (false)

using Ints = std::vector<std::int32_t>;
using Mask = std::vector<std::uint8_t>;

void test_compaction();
