// From a row of fp32 numbers to FP8 codes and a scale: the last step of every kernel that makes packed rows.
//
//     scale = max(max|y| / R, 1e-6)
//     code  = to_fp8_nearest_even(clip(y / scale, ±R))
//
// Dimensions:
//     n: numbers in a row
// Rows wait in a buffer of n numbers rounded up to whole pairs, in the order of lanes.h.
#pragma once

#include <math.h>

#include "lanes.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

constexpr float kScaleFloor = 1e-6f;
constexpr uint32_t kNan = 0x7fc00000;
constexpr uint8_t kNanCode = 0x7f;
constexpr float kLargest = 3.402823466e38f;

// Where no product of quantize_by_product leaves the normal range.
constexpr float kLeastPeak = 0x1p-40f, kGreatestPeak = 0x1p40f;

inline int64_t pairs_in(int64_t n) { return (n + kPair - 1) / kPair; }

// Largest of 32 magnitudes, NaN if one is.
inline float largest(Lanes a, Lanes b) {
    float lanes[16];
    store(lanes, peak(a, b));
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) {
        if (as_bits(lanes[i]) > bits) bits = as_bits(lanes[i]);
    }
    return as_float(bits);
}

// Write a row's codes, quotients(i) giving y / scale of pair i. Inlined, for the compiler to keep what that
// captures in registers: for all it knows a store to `out` could change it in memory.
template <Dtype D, class Quotients>
[[gnu::always_inline]] inline void write_codes(uint8_t* out, int64_t n, Quotients quotients) {
    const int64_t whole = n / kPair;
    for (int64_t i = 0; i < whole; ++i) store_codes<D>(out + i * kPair, quotients(i));
    if (whole * kPair < n) {
        uint8_t padded[kPair];
        store_codes<D>(padded, quotients(whole));
        memcpy(out + whole * kPair, padded, static_cast<size_t>(n - whole * kPair));
    }
}

// Whether quantize_by_product gives a row's codes, `scale` being that of the largest magnitude `peak`: not
// where the floor is in force, and not at the ends of fp32's range.
inline bool product_is_exact(float peak, float scale) {
    return scale > kScaleFloor && is_finite(scale) && peak >= kLeastPeak && peak <= kGreatestPeak;
}

// y * R / peak, as exact as a division but quicker: R / peak as the sum of two fp32 numbers. Exactly on a tie
// between two codes, where inputs of few bits often fall, it is exact. So it is with the leading number alone
// when that is off by no more than 2^-25: a tie has so few bits that the product rounds back to it. Most rows
// are done by that.
template <Dtype D>
void quantize_by_product(uint8_t* out, int64_t n, float fp8_max, float peak, const float* buffer) {
    const double factor = static_cast<double>(fp8_max) / static_cast<double>(peak);
    const float leading = static_cast<float>(factor);
    const float rest = static_cast<float>(factor - static_cast<double>(leading));
    const Lanes high = splat(leading), low = splat(rest);
    if (fabsf(rest) <= leading * 0x1p-25f) {
        return write_codes<D>(out, n, [=](int64_t i) -> Pair {
            return {load(buffer + i * kPair) * high, load(buffer + i * kPair + 16) * high};
        });
    }
    write_codes<D>(out, n, [=](int64_t i) -> Pair {
        const Lanes a = load(buffer + i * kPair), b = load(buffer + i * kPair + 16);
        return {fma(a, high, a * low), fma(b, high, b * low)};
    });
}

// The formula step by step, for finite rows; numbers are clipped to ±bound first.
// Returns the scale: `static_scale`, or the row's own where that is 0.
template <Dtype D>
float quantize_by_division(
    uint8_t* out, int64_t n, float fp8_max, float peak, float bound, float static_scale,
    const float* buffer) {
    const float own = (peak < bound ? peak : bound) / fp8_max;
    const float scale = static_scale > 0 ? static_scale : own > kScaleFloor ? own : kScaleFloor;
    const auto quotient = [=](const float* y) {
        return clip(clip(load(y), splat(bound)) / splat(scale), splat(fp8_max));
    };
    write_codes<D>(out, n, [=](int64_t i) -> Pair {
        return {quotient(buffer + i * kPair), quotient(buffer + i * kPair + 16)};
    });
    return scale;
}

// An invalid row, one that holds NaN or Inf or exceeds fp32's range. Returns its scale.
inline float write_invalid_row(uint8_t* out, int64_t n, bool is_static) {
    memset(out, is_static ? kNanCode : 0, static_cast<size_t>(n));
    return as_float(kNan);
}

}  // namespace
}  // namespace RMSQ_ISA
}  // namespace rmsq
