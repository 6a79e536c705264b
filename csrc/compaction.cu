#include "compaction_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace adadiff::cuda {
namespace {

using compaction::Arguments;
using compaction::kThreads;
using compaction::Shared;
using compaction::State;
using std::int32_t;

__global__ void __launch_bounds__(kThreads) compact_kernel(const Arguments a) {
  __shared__ Shared shared;
  const auto threads = static_cast<int32_t>(blockDim.x);
  compaction::Thread t = compaction::decide(a, shared, static_cast<int32_t>(threadIdx.x), threads);
  __syncthreads();
  compaction::add_up(shared, t, threads);
  __syncthreads();
  compaction::count(a, shared, t, threads);
  __syncthreads();
  compaction::list(a, shared, t);
  __syncthreads();
  compaction::exchange(a, shared, t, threads);
  __syncthreads();
  compaction::record(a, t, threads);
}

__global__ void __launch_bounds__(kThreads)
    start_kernel(int32_t* row_to_lane, int32_t* lane_to_row, int32_t* exit_layer, State* state, int32_t num_lanes,
                 int32_t count, volatile std::uint64_t* word) {
  compaction::start(row_to_lane, lane_to_row, exit_layer, state, num_lanes, count, word,
                    static_cast<int32_t>(threadIdx.x), static_cast<int32_t>(blockDim.x));
}

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// Makes a device current for the lifetime of the object.
class Current {
 public:
  explicit Current(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename... Parameters, typename... Values>
void launch(void (*kernel)(Parameters...), int32_t rows, int device, std::uintptr_t stream, Values... values) {
  static_assert((std::is_same_v<Parameters, Values> && ...), "the kernel's own types, since it is told addresses");
  const Current current(device);
  const int32_t threads = std::clamp((rows + 31) / 32 * 32, 32, kThreads);
  void* arguments[] = {&values...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(1), dim3(static_cast<unsigned>(threads)),
                         arguments, 0, reinterpret_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel");
}

}  // namespace

void compact(const Arguments& a, int device, std::uintptr_t stream) {
  require(a.num_lanes >= 0 && a.num_lanes <= compaction::kMaxLanes, "compact: num_lanes must lie in [0, 32768]");
  require(a.bound >= 0 && a.bound <= a.num_lanes, "compact: bound must lie in [0, num_lanes]");
  require(a.layer >= 1 && a.layer <= 0xFFFF, "compact: layer must lie in [1, 65535]");
  require((a.row_to_lane && a.lane_to_row && a.exit_layer) || a.num_lanes == 0,
          "compact: row_to_lane, lane_to_row or exit_layer is null");
  require(a.state && a.word, "compact: state or word is null");
  require(a.moves || a.bound == 0, "compact: moves is null");
  require(!a.u || a.threshold, "compact: u needs threshold");
  launch(compact_kernel, a.bound, device, stream, a);
}

void start(int32_t* row_to_lane, int32_t* lane_to_row, int32_t* exit_layer, State* state, int32_t num_lanes,
           int32_t count, volatile std::uint64_t* word, int device, std::uintptr_t stream) {
  require(num_lanes >= 0 && num_lanes <= compaction::kMaxLanes, "start: num_lanes must lie in [0, 32768]");
  require(count >= 0 && count <= num_lanes, "start: count must lie in [0, num_lanes]");
  require((row_to_lane && lane_to_row && exit_layer) || num_lanes == 0,
          "start: row_to_lane, lane_to_row or exit_layer is null");
  require(state && word, "start: state or word is null");
  launch(start_kernel, num_lanes, device, stream, row_to_lane, lane_to_row, exit_layer, state, num_lanes, count, word);
}

MappedWord::MappedWord(int device) {
  const Current current(device);
  // Loads the kernels now: loading is not allowed while a stream is being captured.
  cudaFuncAttributes loaded;
  check(cudaFuncGetAttributes(&loaded, compact_kernel), "cudaFuncGetAttributes");
  check(cudaFuncGetAttributes(&loaded, start_kernel), "cudaFuncGetAttributes");
  void* host = nullptr;
  void* mapped = nullptr;
  check(cudaHostAlloc(&host, sizeof(std::uint64_t), cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
  if (const cudaError_t error = cudaHostGetDevicePointer(&mapped, host, 0); error != cudaSuccess) {
    cudaFreeHost(host);
    check(error, "cudaHostGetDevicePointer");
  }
  host_ = static_cast<volatile std::uint64_t*>(host);
  *host_ = 0;
  device_ = reinterpret_cast<std::uintptr_t>(mapped);
}

MappedWord::~MappedWord() { cudaFreeHost(const_cast<std::uint64_t*>(host_)); }

bool MappedWord::poll(int32_t tick, int32_t layer, double seconds) const {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    for (int reads = 0; reads < 256; ++reads) {
      const std::uint64_t word = read();
      if (static_cast<int32_t>(word >> 48) == tick && static_cast<int32_t>(word >> 32 & 0xFFFF) >= layer) return true;
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace adadiff::cuda
