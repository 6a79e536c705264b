// The partition of compaction.h on a GPU. `device` is an ordinal, `stream` a cudaStream_t as an integer, pointers point
// to device memory. Calls only queue work. Bad sizes and null pointers throw std::invalid_argument before anything is
// launched; CUDA errors throw std::runtime_error with CUDA's message.
#pragma once

#include <cstdint>

#include "compaction.h"

namespace adadiff::cuda {

// Queues one exit, run by one block of threads.
void compact(const compaction::Arguments& arguments, int device, std::uintptr_t stream);

// Queues the next tick: the first `count` lanes run again, and the tick number grows by one.
void start(std::int32_t* row_to_lane, std::int32_t* lane_to_row, std::int32_t* exit_layer, compaction::State* state,
           std::int32_t num_lanes, std::int32_t count, volatile std::uint64_t* word, int device, std::uintptr_t stream);

// A word of pinned host memory, in the form of compaction::pack, that `device` writes and the host reads. It must
// outlive every launch, and every captured graph, that writes to it.
class MappedWord {
 public:
  explicit MappedWord(int device);
  ~MappedWord();
  MappedWord(const MappedWord&) = delete;
  MappedWord& operator=(const MappedWord&) = delete;

  std::uint64_t read() const { return *host_; }
  std::uintptr_t device_address() const { return device_; }

  // Reads until the word is of `tick` and of `layer` or later; false after `seconds`.
  bool poll(std::int32_t tick, std::int32_t layer, double seconds) const;

 private:
  volatile std::uint64_t* host_ = nullptr;
  std::uintptr_t device_ = 0;
};

}  // namespace adadiff::cuda
