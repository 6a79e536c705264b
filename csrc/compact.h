// `leave` (active_set.h) for one block of GPU threads: the steps between its barriers, and nothing of CUDA. compact.cu
// runs them on a GPU; tests.cpp, thread after thread, against `leave`. What differs from `leave`: the number of rows
// that run is read from memory, the decision is taken here, and nothing is checked but that number.
#pragma once

#include <cstdint>

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

struct Arguments {
  int32_t* lane;                // [lanes] row -> lane
  int32_t* row;                 // [lanes] lane -> row
  int32_t* exit_layer;          // [lanes] by lane
  State* state;
  const float* u;               // [bound] by row, or null
  const float* threshold;       // [lanes] by lane; with u
  const std::uint8_t* mask;     // [bound] by row, or null
  const std::uint8_t* asked;    // [lanes] by lane, or null: everybody
  const int32_t* partner;       // [lanes] lane -> lane tied to it, itself if none; or null
  int32_t* pairs;               // [bound / 2][2] out: rows to exchange, -1 where there is no more
  volatile std::uint64_t* word; // out: pack(tick, layer, count)
  int32_t bound;                // of the rows that run; at most lanes
  int32_t lanes;                // at most kMaxLanes
  int32_t layer;                // 1 or more
  int32_t room;                 // -1; or rows from here on are parked: their exit layer is -layer
};

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
  bool does = row >= a.room;
  if (a.asked) does &= a.asked[lane] != 0;
  if (a.mask) does &= a.mask[row] != 0;
  if (a.u) does &= a.u[row] < a.threshold[lane];
  return does && row < running;
}

// Tied lanes leave if both may, and are parked if either must be.
ADADIFF_BOTH bool goes(const Arguments& a, int32_t running, int32_t row) {
  const int32_t lane = a.lane[row];
  const bool own = passes(a, running, lane, row);
  if (!a.partner || row >= running) return own;
  const int32_t other = a.partner[lane];
  const bool tied = passes(a, running, other, a.row[other]);
  return a.room >= 0 ? own || tied : own && tied;
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
  // Pair k: the k-th row to go below the new count, and the k-th kept one from there on.
  int32_t kept = t.before;
  for (int32_t r = t.begin; r < t.end; ++r) {
    const std::uint32_t bit = std::uint32_t{1} << (r - t.begin);
    if (t.goes & bit) {
      a.exit_layer[a.lane[r]] = a.room >= 0 ? -a.layer : a.layer;
      if (r < t.after) a.pairs[2 * (r - kept)] = r;
    } else if (t.kept & bit) {
      if (r >= t.after) a.pairs[2 * (kept - shared.below) + 1] = r;
      ++kept;
    }
  }
}
// barrier: the pairs, and no more reads of lane by the old rows

ADADIFF_BOTH void exchange(const Arguments& a, const Shared& shared, const Thread& t, int32_t threads) {
  const int32_t used = t.after < t.running ? t.after - shared.below : 0;
  for (int32_t k = t.index; k < a.bound / 2; k += threads) {
    if (k >= used) {
      a.pairs[2 * k] = a.pairs[2 * k + 1] = -1;
      continue;
    }
    const int32_t low = a.pairs[2 * k], high = a.pairs[2 * k + 1];
    const int32_t leaving = a.lane[low], staying = a.lane[high];
    a.lane[low] = staying;
    a.lane[high] = leaving;
    a.row[staying] = low;
    a.row[leaving] = high;
  }
  if (t.index == 0) a.state->moved += 2 * used;
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
