// What every operation needs before it can compute: threads that share out the work, and scratch memory.
//
// This header is for the drivers (linear.cpp, lstm.cpp and others), which are compiled alike. The unit of a level must not
// include it (kernels.h says why).
#pragma once

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#include "kernels.h"

namespace meprop {

// The least work that is worth a thread, in entries that are read and in multiply-adds.
constexpr int64_t kEntriesPerThread = 1 << 13;
constexpr int64_t kProductsPerThread = 1 << 16;

// The uses of scratch. Each use has a block of its own.
enum Use {
  kCandidates,
  kMagnitudes,
  kScores,
  kValues,
  kIndices,
  kBias,
  kStarts,
  kPlaces,
  kSourceRows,
  kSourceValues,
  kPacked,
  kPackedInputs,
  kPadded,
  kOffsets,
  kSums,
  kEarlier,
  kGateGradients,
  kGradOutput,
  kGradCells,
  kHits,
  kLastRows,
  kSharedSums,
  kBases,
  kWeightBase,
  kFactors,
  kKeyCounts,
  kAllChannels,
  kUsedInputs,
  kInputPlaces,
  kUsedOutputs,
  kOutputPlaces,
  kEntryPlaces,
  kKeys,
  kFound,
  kParts,
  kSamples,
  kEntryStarts,
  kEntryStates,
  kEntryGroups,
  kEntryValues,
  kEntryIndices,
  kRowStarts,
  kEntryShared,
  kStepInputs,
  kStepOutputs,
  kSharedInputs,
  kRowSteps,
  kAllOutputs,
  kDense,
  kLeftOut,
  kTiles,
  kUses
};

constexpr int64_t kLargestKept = 4 << 20;

// The blocks of one calling thread. They are kept from call to call. Memory that is fresh from the system costs a page
// fault per 4 KB, which takes longer than the work of a small layer.
class Blocks {
 public:
  ~Blocks() {
    for (Block& block : blocks_) std::free(block.data);
  }

  // Gives back the blocks that are too large to keep. Page faults cost little beside the work of such large layers.
  void trim() {
    for (Block& block : blocks_) {
      if (block.bytes <= kLargestKept) continue;
      std::free(block.data);
      block = {};
    }
  }

  // Returns `bytes` of uninitialised memory on a cache-line boundary, or null. The former block of the use is given
  // back if it is too small.
  void* take(Use use, int64_t bytes) {
    Block& block = blocks_[use];
    if (bytes > block.bytes || block.data == nullptr) {
      std::free(block.data);
      const int64_t rounded = (bytes / 64 + 1) * 64;
      block.data = std::aligned_alloc(64, static_cast<size_t>(rounded));
      block.bytes = block.data != nullptr ? rounded : 0;
    }
    return block.data;
  }

 private:
  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  Block blocks_[kUses];
};

inline thread_local Blocks blocks;

// Trims at the end of an operation, however it ends.
struct TrimAtEnd {
  ~TrimAtEnd() { blocks.trim(); }
};

// `count` uninitialised elements for one use. They are valid until the same use is asked for again. They are null if
// there is no memory.
template <class T>
class Scratch {
 public:
  Scratch(Use use, int64_t count) {
    int64_t bytes = 0;
    if (__builtin_mul_overflow(count, static_cast<int64_t>(sizeof(T)), &bytes) || bytes > INT64_MAX - 64) return;
    data_ = static_cast<T*>(blocks.take(use, bytes));
  }
  explicit operator bool() const { return data_ != nullptr; }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

// Whether a matrix of these sizes can be addressed, so that the offset of its last element in bytes fits.
template <class T>
bool fits(int64_t rows, int64_t columns, int64_t ld) {
  int64_t elements = 0, bytes = 0;
  return rows >= 0 && columns >= 0 && ld >= 0 && !__builtin_mul_overflow(rows, std::max(ld, columns), &elements) &&
         !__builtin_mul_overflow(elements, static_cast<int64_t>(sizeof(T)), &bytes);
}

inline bool forked = false;
[[maybe_unused]] inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// How the threads of a team wait for one another is told to ThreadSanitizer, which cannot see it in OpenMP's runtime.
#ifdef __SANITIZE_THREAD__
inline char forks;                   // of all teams
inline thread_local char* meetings;  // of the thread's team: two for its waits in turn, and one for its end
inline thread_local int turn;
inline void arrive() { __tsan_release(meetings + turn); }
inline void depart() { __tsan_acquire(meetings + turn), turn ^= 1; }
#else
inline void arrive() {}
inline void depart() {}
#endif

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Rows are shared out in at most kRowBlocks blocks. Sums over rows are formed in each block first, then over the
// blocks. So they do not depend on the number of threads.
constexpr int64_t kRowBlocks = 32, kLeastRowsPerBlock = 8;

inline int64_t rows_per_block(int64_t rows) { return std::max(kLeastRowsPerBlock, (rows + kRowBlocks - 1) / kRowBlocks); }

// The threads that run one operation, as one of them sees it. OpenMP may give fewer than were asked for.
struct Team {
  int id, size;

  // This thread's equal part of [0, count), in multiples of `grain`.
  Range part(int64_t count, int64_t grain = 1) const {
    const int64_t grains = (count + grain - 1) / grain;
    return {grains * id / size * grain, std::min(count, grains * (id + 1) / size * grain)};
  }

  // This thread's part of the rows, in whole blocks.
  Range row_part(int64_t rows) const { return part(rows, rows_per_block(rows)); }

  // Returns when all threads of the team have come here.
  void wait() const {
    if (size == 1) return;
    arrive();
#pragma omp barrier
    depart();
  }
};

// The number of threads that are worth waking for so many entries to read and multiply-adds to do.
inline int team_size(int threads, int64_t entries, int64_t products) {
  if (forked) return 1;
  return static_cast<int>(std::clamp<int64_t>(entries / kEntriesPerThread + products / kProductsPerThread, 1, threads));
}

#ifndef __SANITIZE_THREAD__
template <class Body>
void run_team(int threads, Body body) {
  if (threads == 1) return body(Team{0, 1});
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads()});
}
#else
// Not looked at itself: the threads are handed their variables after the last moment at which that can be told.
template <class Body>
__attribute__((no_sanitize("thread"))) void run_team(int threads, Body body) {
  if (threads == 1) return body(Team{0, 1});
  char places[3];
  __tsan_release(&forks);
#pragma omp parallel num_threads(threads)
  {
    __tsan_acquire(&forks);
    meetings = places, turn = 0;
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
    __tsan_release(places + 2);
  }
  __tsan_acquire(places + 2);
}
#endif

// Large outputs are mostly fresh from the system, which costs a page fault per 4 KB. Larger pages make it one per 2 MB.
void prefer_large_pages(void* data, size_t bytes);

}  // namespace meprop
