// The steps of compact.h on a GPU. `device` is an ordinal, `stream` a cudaStream_t of it as an integer. Pointers are the
// device's; nothing waits for it. std::invalid_argument for bad sizes or missing pointers, before anything is launched;
// std::runtime_error with CUDA's own words where CUDA refuses.
#pragma once

#include <cstdint>

#include "compact.h"

namespace adadiff::cuda {

// One leave, by one block.
void compact(const compact::Arguments& arguments, int device, std::uintptr_t stream);

// Everybody runs again, and the tick counts up.
void start(std::int32_t* lane, std::int32_t* row, std::int32_t* exit_layer, compact::State* state, std::int32_t lanes,
           volatile std::uint64_t* word, int device, std::uintptr_t stream);

// compact::pack in pinned host memory that `device` writes and the host reads. It must outlive every launch, and every
// captured graph, that writes to it.
class MappedWord {
 public:
  explicit MappedWord(int device);
  ~MappedWord();
  MappedWord(const MappedWord&) = delete;
  MappedWord& operator=(const MappedWord&) = delete;

  std::uint64_t read() const { return *host_; }
  std::uintptr_t device_address() const { return device_; }

  // Reads until the word is of `tick` and of `layer` or later; false where that took longer than `seconds`.
  bool poll(std::int32_t tick, std::int32_t layer, double seconds) const;

 private:
  volatile std::uint64_t* host_ = nullptr;
  std::uintptr_t device_ = 0;
};

}  // namespace adadiff::cuda
