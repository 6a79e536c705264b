// `leave` (active_set.h) for one block of GPU threads: the steps between its barriers, and nothing of CUDA. compact.cu
// runs them on a GPU; tests.cpp, thread after thread, against `leave`. What differs from `leave`: the number of rows
// that run is read from memory, the decision is taken here, and nothing is checked but that number.
#pragma once

#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define ADADIFF_BOTH __host__ __device__ inline
#else
#define ADADIFF_BOTH inline
#endif

namespace adadiff::compact {

using std::int32_t;

constexpr int32_t kThreads = 1024;           // of the block, at most
constexpr int32_t kGroup = 32;               // threads whose counts one thread adds up; rows a thread has at most
constexpr int32_t kMaxLanes = kThreads * kGroup;
constexpr int32_t kFault = -1;               // count: a bound was below the rows that ran

struct State {
  int32_t count;  // rows that run, or kFault
  int32_t moved;  // rows moved by swaps so far
  int32_t tick;   // starts so far, in 16 bits
};

// Who leaves: a row whose u is below the threshold of its lane, or whose threshold is infinity, u or not; a row with a
// true mask; everybody, where neither is given.
struct Arguments {
  int32_t* lane;                // [lanes] row -> lane
  int32_t* row;                 // [lanes] lane -> row
  int32_t* exit_layer;          // [lanes] by lane
  State* state;
  const float* u;               // [bound] by row, or null
  const float* threshold;       // [lanes] by lane, or null
  const std::uint8_t* mask;     // [bound] by row, or null
  const int32_t* partner;       // [lanes] lane -> lane tied to it, itself if none; or null
  int32_t* moves;               // [bound][3] out: a leaving row, its lane, and the row that takes its place, -1 if none;
                                // in the order of the rows, then rows of -1
  int32_t* snapshot;            // [lanes] out: row, as it is afterwards; or null
  volatile std::uint64_t* word; // out: pack(tick, layer, count)
  int32_t bound;                // of the rows that run; at most lanes
  int32_t lanes;                // at most kMaxLanes
  int32_t layer;                // 1 or more
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What the threads of the block share.
struct Shared {
  int32_t kept[kThreads + kThreads / kGroup];  // a gap after each group: one word a bank when groups are added up
  int32_t group[kThreads / kGroup];            // kept rows of each group
  int32_t below;                               // kept rows below the new count
};

// What a thread holds: rows [begin, end), no more than kGroup.
struct Thread {
  int32_t index, begin, end, running, tick;
  std::uint32_t goes;  // a bit for each row
  std::uint32_t kept;
  int32_t before;      // kept rows before begin
  int32_t after;       // kept rows of all threads: the new count
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

// NaN is below nothing, so it never leaves. Loads do not wait for the count: what lies beyond it is read in vain.
ADADIFF_BOTH bool passes(const Arguments& a, int32_t running, int32_t lane, int32_t row) {
  if (row >= a.bound) return false;
  bool does = true;
  if (a.mask) does = a.mask[row] != 0;
  if (a.threshold) {
    const float threshold = a.threshold[lane];
    does &= threshold == kInfinity || (a.u && a.u[row] < threshold);
  }
  return does && row < running;
}

// Tied lanes leave if both may.
ADADIFF_BOTH bool goes(const Arguments& a, int32_t running, int32_t row) {
  const int32_t lane = a.lane[row];
  const bool own = passes(a, running, lane, row);
  if (!a.partner || row >= running) return own;
  const int32_t other = a.partner[lane];
  return own && passes(a, running, other, a.row[other]);
}

ADADIFF_BOTH Thread decide(const Arguments& a, Shared& shared, int32_t index, int32_t threads) {
  const int32_t n = a.state->count;
  const int32_t tick = a.state->tick;
  const int32_t rows = (a.bound + threads - 1) / threads;
  Thread t{};
  t.index = index;
  t.tick = tick;
  t.running = n > a.bound || n < 0 ? 0 : n;
  t.begin = index * rows < a.bound ? index * rows : a.bound;
  t.end = t.begin + rows < a.bound ? t.begin + rows : a.bound;
  for (int32_t r = t.begin; r < t.end; ++r) {
    const std::uint32_t bit = std::uint32_t{1} << (r - t.begin);
    if (goes(a, t.running, r)) {
      t.goes |= bit;
    } else if (r < t.running) {
      t.kept |= bit;
    }
  }
  shared.kept[index + index / kGroup] = bits(t.kept);
  return t;
}
// barrier: shared.kept

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
// barrier: shared.kept, now before each thread in its group, and shared.group

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
// barrier: shared.below

ADADIFF_BOTH void list(const Arguments& a, const Shared& shared, const Thread& t) {
  // Move k: the k-th row to leave, and the k-th kept one from the new count on, if there is one. Rows that leave below
  // the new count come first, and are as many as those kept ones.
  int32_t kept = t.before;
  for (int32_t r = t.begin; r < t.end; ++r) {
    const std::uint32_t bit = std::uint32_t{1} << (r - t.begin);
    if (t.goes & bit) {
      const int32_t lane = a.lane[r];
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
// barrier: the moves, and no more reads of lane by the old rows

ADADIFF_BOTH void exchange(const Arguments& a, const Shared& shared, const Thread& t, int32_t threads) {
  const int32_t leaving = t.running - t.after;
  const int32_t filled = leaving ? t.after - shared.below : 0;
  for (int32_t k = t.index; k < a.bound; k += threads) {
    int32_t* move = a.moves + 3 * k;
    if (k >= leaving) move[0] = move[1] = -1;
    if (k >= filled) {
      move[2] = -1;
      continue;
    }
    const int32_t low = move[0], high = move[2];
    const int32_t gone = move[1], staying = a.lane[high];
    a.lane[low] = staying;
    a.lane[high] = gone;
    a.row[staying] = low;
    a.row[gone] = high;
  }
  if (t.index == 0) a.state->moved += 2 * filled;
}
// barrier: row, where there is a snapshot

ADADIFF_BOTH void record(const Arguments& a, const Thread& t, int32_t threads) {
  if (!a.snapshot) return;
  for (int32_t l = t.index; l < a.lanes; l += threads) a.snapshot[l] = a.row[l];
}

// Everybody runs again. The word says so with layer 0.
ADADIFF_BOTH void start(int32_t* lane, int32_t* row, int32_t* exit_layer, State* state, int32_t lanes,
                        volatile std::uint64_t* word, int32_t index, int32_t threads) {
  for (int32_t l = index; l < lanes; l += threads) {
    lane[l] = row[l] = l;
    exit_layer[l] = 0;
  }
  if (index == 0) {
    *state = {lanes, 0, (state->tick + 1) & 0xFFFF};
    *word = pack(state->tick, 0, lanes);
  }
}

}  // namespace adadiff::compact
