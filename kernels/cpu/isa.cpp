// Which instruction-set level runs, and the C functions through which Python asks, chooses and counts. And
// which sources the library is of: digest.py.
#include "isa.h"

#include <atomic>
#include <cstring>

#include "counts.h"

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

rmsq::Isa best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) {
        return rmsq::Isa::avx512_bf16;
    }
    if (avx512) return rmsq::Isa::avx512;
    if (avx2) return rmsq::Isa::avx2;
#endif
    return rmsq::Isa::portable;
}

std::atomic<rmsq::Isa> in_force{best()};

// Python looks for it in the file, before it is loaded.
[[gnu::used]] const char sources[] = RMSQ_SOURCES;

}  // namespace

rmsq::Isa rmsq::isa() { return in_force.load(std::memory_order_relaxed); }

extern "C" {

// Name of the best level this machine has.
[[gnu::visibility("default")]] const char* rmsq_best_isa() { return kNames[static_cast<int>(best())]; }

// Name of the level in force.
[[gnu::visibility("default")]] const char* rmsq_isa() { return kNames[static_cast<int>(rmsq::isa())]; }

// Put a level in force; "auto" is the best. Returns 0, or 1 when the machine lacks it or no level has that
// name.
[[gnu::visibility("default")]] int rmsq_set_isa(const char* name) {
    if (std::strcmp(name, "auto") == 0) {
        in_force = best();
        return 0;
    }
    for (int level = 0; level <= static_cast<int>(best()); ++level) {
        if (std::strcmp(name, kNames[level]) == 0) {
            in_force = static_cast<rmsq::Isa>(level);
            return 0;
        }
    }
    return 1;
}

// Rows this process has quantized, and how many of them were invalid.
[[gnu::visibility("default")]] void rmsq_counts(int64_t* rows, int64_t* invalid) {
    *rows = rmsq::counts().rows.load(std::memory_order_relaxed);
    *invalid = rmsq::counts().invalid.load(std::memory_order_relaxed);
}
}
