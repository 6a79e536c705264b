// The partition of the rows after an exit, as the steps between the barriers of one block of threads. A GPU runs them
// in a kernel (compaction.cu); the CPU runs them for one thread after another (active_set.cpp), and so do the tests, in
// any order. Needs no CUDA headers.
//
// Rows [0, count) run. Each row is tested for exit; the k-th exiting row below the new count then changes places with
// the k-th remaining row at or above it, both counted upwards.
#pragma once

#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define ADADIFF_BOTH __host__ __device__ inline
#else
#define ADADIFF_BOTH inline
#endif

namespace adadiff::compaction {

using std::int32_t;

constexpr int32_t kThreads = 1024;  // most threads of the block
constexpr int32_t kGroup = 32;      // threads whose counts one thread adds up; also the most rows of one thread
constexpr int32_t kMaxLanes = kThreads * kGroup;
constexpr int32_t kFault = -1;      // count after a call whose bound was below it
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct State {
  int32_t count;  // rows that run, or kFault
  int32_t moved;  // rows that changed places so far
  int32_t tick;   // starts so far, modulo 2^16
};

// A row exits if its mask is true and its u is below the threshold of its lane. A threshold of +inf needs no u; NaN is
// never below. A null criterion is skipped; without mask and threshold every running row exits.
struct Arguments {
  int32_t* row_to_lane;         // [num_lanes]
  int32_t* lane_to_row;         // [num_lanes]
  int32_t* exit_layer;          // [num_lanes] by lane, 0 while it runs
  State* state;
  const float* u;               // [bound] by row, or null
  const float* threshold;       // [num_lanes] by lane, or null
  const std::uint8_t* mask;     // [bound] by row, or null
  const int32_t* partner;       // [num_lanes] the lane with which a lane exits or stays, itself if none; or null
  int32_t* moves;               // [bound][3] out: exiting row, its lane, the row that takes its place (-1: none);
                                // in row order, then rows of -1
  int32_t* snapshot;            // [num_lanes] out: lane_to_row afterwards; or null
  volatile std::uint64_t* word; // out: pack(tick, layer, count)
  int32_t bound;                // at least the rows that run, at most num_lanes
  int32_t num_lanes;            // at most kMaxLanes
  int32_t layer;                // 1 or more
};

// Shared memory of the block.
struct Shared {
  int32_t kept[kThreads + kThreads / kGroup];  // one unused word after each group: no bank conflicts in add_up
  int32_t group[kThreads / kGroup];            // remaining rows of each group
  int32_t below;                               // remaining rows below the new count
};

// One thread and its rows [begin, end), at most kGroup of them.
struct Thread {
  int32_t index, begin, end, running, tick;
  std::uint32_t exits;  // one bit for each row
  std::uint32_t kept;
  int32_t before;  // remaining rows before begin
  int32_t after;   // remaining rows of all threads: the new count
};

ADADIFF_BOTH std::uint64_t pack(int32_t tick, int32_t layer, int32_t count) {
  return static_cast<std::uint64_t>(tick & 0xFFFF) << 48 | static_cast<std::uint64_t>(layer & 0xFFFF) << 32 |
         static_cast<std::uint32_t>(count);
}

ADADIFF_BOTH int32_t bits(std::uint32_t word) {
#ifdef __CUDA_ARCH__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Loads do not wait for the count: rows at or above it are read, and the result is dropped.
ADADIFF_BOTH bool passes(const Arguments& a, int32_t running, int32_t lane, int32_t row) {
  if (row >= a.bound) return false;
  bool exits = true;
  if (a.mask) exits = a.mask[row] != 0;
  if (a.threshold) {
    const float threshold = a.threshold[lane];
    exits &= threshold == kInfinity || (a.u && a.u[row] < threshold);
  }
  return exits && row < running;
}

// Partners exit only together.
ADADIFF_BOTH bool exits(const Arguments& a, int32_t running, int32_t row) {
  const int32_t lane = a.row_to_lane[row];
  const bool own = passes(a, running, lane, row);
  if (!a.partner || row >= running) return own;
  const int32_t other = a.partner[lane];
  return own && passes(a, running, other, a.lane_to_row[other]);
}

ADADIFF_BOTH Thread decide(const Arguments& a, Shared& shared, int32_t index, int32_t threads) {
  const int32_t n = a.state->count;
  const int32_t rows = (a.bound + threads - 1) / threads;
  Thread t{};
  t.index = index;
  t.tick = a.state->tick;
  t.running = n > a.bound || n < 0 ? 0 : n;
  t.begin = index * rows < a.bound ? index * rows : a.bound;
  t.end = t.begin + rows < a.bound ? t.begin + rows : a.bound;
  for (int32_t r = t.begin; r < t.end; ++r) {
    const std::uint32_t bit = std::uint32_t{1} << (r - t.begin);
    if (exits(a, t.running, r)) {
      t.exits |= bit;
    } else if (r < t.running) {
      t.kept |= bit;
    }
  }
  shared.kept[index + index / kGroup] = bits(t.kept);
  return t;
}
// barrier: shared.kept is written

ADADIFF_BOTH void add_up(Shared& shared, const Thread& t, int32_t threads) {
  const int32_t first = t.index * kGroup;
  if (first >= threads) return;
  const int32_t end = first + kGroup < threads ? first + kGroup : threads;
  int32_t sum = 0;
  for (int32_t i = first; i < end; ++i) {
    int32_t& place = shared.kept[i + i / kGroup];
    const int32_t kept = place;
    place = sum;
    sum += kept;
  }
  shared.group[t.index] = sum;
}
// barrier: shared.kept holds the remaining rows before each thread in its group; shared.group is written

ADADIFF_BOTH void count(const Arguments& a, Shared& shared, Thread& t, int32_t threads) {
  for (int32_t g = 0; g * kGroup < threads; ++g) {
    if (g * kGroup == t.index / kGroup * kGroup) t.before = t.after;
    t.after += shared.group[g];
  }
  t.before += shared.kept[t.index + t.index / kGroup];
  if (t.begin <= t.after && t.after < t.end) {
    const std::uint32_t lower = (std::uint32_t{1} << (t.after - t.begin)) - 1;
    shared.below = t.before + bits(t.kept & lower);
  }
  if (t.index == 0) {
    const int32_t n = a.state->count == t.running ? t.after : kFault;
    a.state->count = n;
    *a.word = pack(t.tick, a.layer, n);
  }
}
// barrier: shared.below is written

// Move k belongs to the k-th exiting row. Those below the new count come first, and there are as many of them as there
// are remaining rows at or above it.
ADADIFF_BOTH void list(const Arguments& a, const Shared& shared, const Thread& t) {
  int32_t kept = t.before;
  for (int32_t r = t.begin; r < t.end; ++r) {
    const std::uint32_t bit = std::uint32_t{1} << (r - t.begin);
    if (t.exits & bit) {
      const int32_t lane = a.row_to_lane[r];
      int32_t* move = a.moves + 3 * (r - kept);
      move[0] = r;
      move[1] = lane;
      a.exit_layer[lane] = a.layer;
    } else if (t.kept & bit) {
      if (r >= t.after) a.moves[3 * (kept - shared.below) + 2] = r;
      ++kept;
    }
  }
}
// barrier: the moves are written, and no thread reads row_to_lane by the old rows any more

ADADIFF_BOTH void exchange(const Arguments& a, const Shared& shared, const Thread& t, int32_t threads) {
  const int32_t exiting = t.running - t.after;
  const int32_t filled = exiting ? t.after - shared.below : 0;
  for (int32_t k = t.index; k < a.bound; k += threads) {
    int32_t* move = a.moves + 3 * k;
    if (k >= exiting) move[0] = move[1] = -1;
    if (k >= filled) {
      move[2] = -1;
      continue;
    }
    const int32_t low = move[0], high = move[2];
    const int32_t exited = move[1], staying = a.row_to_lane[high];
    a.row_to_lane[low] = staying;
    a.row_to_lane[high] = exited;
    a.lane_to_row[staying] = low;
    a.lane_to_row[exited] = high;
  }
  if (t.index == 0) a.state->moved += 2 * filled;
}
// barrier, if there is a snapshot: lane_to_row is written

ADADIFF_BOTH void record(const Arguments& a, const Thread& t, int32_t threads) {
  if (!a.snapshot) return;
  for (int32_t lane = t.index; lane < a.num_lanes; lane += threads) a.snapshot[lane] = a.lane_to_row[lane];
}

// The first `count` lanes run again, in order; lanes beyond take no part. The word is written with layer 0.
ADADIFF_BOTH void start(int32_t* row_to_lane, int32_t* lane_to_row, int32_t* exit_layer, State* state,
                        int32_t num_lanes, int32_t count, volatile std::uint64_t* word, int32_t index,
                        int32_t threads) {
  for (int32_t lane = index; lane < num_lanes; lane += threads) {
    row_to_lane[lane] = lane_to_row[lane] = lane;
    exit_layer[lane] = 0;
  }
  if (index == 0) {
    *state = {count, 0, (state->tick + 1) & 0xFFFF};
    *word = pack(state->tick, 0, count);
  }
}

}  // namespace adadiff::compaction
