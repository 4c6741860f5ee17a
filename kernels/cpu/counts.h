// How many rows this process has quantized, for whoever watches a server. A call adds once, whatever its
// size; an invalid row, which should never occur, costs one more. Not for kernel sources.
#pragma once

#include <atomic>
#include <cstdint>

namespace rmsq {

struct Counts {
    std::atomic<int64_t> rows{0};
    std::atomic<int64_t> invalid{0};  // of these: rows that held NaN or Inf, or exceeded fp32's range
};

inline Counts& counts() {
    static Counts counts;
    return counts;
}

}  // namespace rmsq
