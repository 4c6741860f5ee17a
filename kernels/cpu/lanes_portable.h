// Sixteen lanes in a plain array, whose loops compilers vectorize; see lanes.h.
#pragma once

#include <math.h>

#include "dtype.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

struct Lanes { float v[16]; };
struct Totals { double v[16]; };

template <class Function> inline Lanes each(Function function) {
    Lanes x;
    for (int i = 0; i < 16; ++i) x.v[i] = function(i);
    return x;
}

inline Lanes load(const float* p) {
    return each([&](int i) { return p[i]; });
}
inline void store(float* p, Lanes x) { memcpy(p, x.v, sizeof x.v); }
inline Lanes splat(float x) {
    return each([&](int) { return x; });
}
inline Lanes operator+(Lanes x, Lanes y) {
    return each([&](int i) { return x.v[i] + y.v[i]; });
}
inline Lanes operator*(Lanes x, Lanes y) {
    return each([&](int i) { return x.v[i] * y.v[i]; });
}
inline Lanes operator/(Lanes x, Lanes y) {
    return each([&](int i) { return x.v[i] / y.v[i]; });
}
inline Lanes fma(Lanes x, Lanes y, Lanes z) {
    return each([&](int i) { return fmaf(x.v[i], y.v[i], z.v[i]); });
}
inline Lanes clip(Lanes x, Lanes limit) {
    return each([&](int i) {
        const float below = x.v[i] < limit.v[i] ? x.v[i] : limit.v[i];
        return below > -limit.v[i] ? below : -limit.v[i];
    });
}

inline Lanes clamp(Lanes x, Lanes low, Lanes high) {
    return each([&](int i) {
        const float below = x.v[i] < high.v[i] ? x.v[i] : high.v[i];
        return below > low.v[i] ? below : low.v[i];
    });
}

inline Lanes power_of_eighths(Lanes x) {
    return each([&](int i) {
        const uint32_t k = as_bits(x.v[i]);
        return as_float(kEighths[k & 7] + (k << 20));
    });
}

inline Lanes peak(Lanes x, Lanes y) {
    return each([&](int i) {
        const int32_t magnitude = static_cast<int32_t>(as_bits(y.v[i]) & kMagnitudeBits);
        const int32_t largest = static_cast<int32_t>(as_bits(x.v[i]));
        return as_float(static_cast<uint32_t>(largest > magnitude ? largest : magnitude));
    });
}

inline Totals no_totals() { return {{0}}; }
inline void add_to(Totals& totals, Lanes x) {
    for (int i = 0; i < 16; ++i) totals.v[i] += x.v[i];
}
inline void store(double* p, Totals totals) { memcpy(p, totals.v, sizeof totals.v); }

struct Pair { Lanes a, b; };

template <Dtype D> inline Pair load_pair(const void* p) {
    typename Element<D>::word words[kPair];
    memcpy(words, p, sizeof words);
    Pair x;
    for (int i = 0; i < 16; ++i) {
        if constexpr (D == Dtype::bf16) {
            x.a.v[i] = widen_bf16(words[2 * i]);
            x.b.v[i] = widen_bf16(words[2 * i + 1]);
        } else if constexpr (D == Dtype::fp16) {
            x.a.v[i] = widen_fp16(words[i]);
            x.b.v[i] = widen_fp16(words[16 + i]);
        } else {
            x.a.v[i] = as_float(words[i]);
            x.b.v[i] = as_float(words[16 + i]);
        }
    }
    return x;
}

template <Dtype D> inline void store_pair(void* p, Pair x) {
    typename Element<D>::word words[kPair];
    for (int i = 0; i < 16; ++i) {
        if constexpr (D == Dtype::bf16) {
            words[2 * i] = round_to_bf16(x.a.v[i]);
            words[2 * i + 1] = round_to_bf16(x.b.v[i]);
        } else if constexpr (D == Dtype::fp16) {
            words[i] = round_to_fp16(x.a.v[i]);
            words[16 + i] = round_to_fp16(x.b.v[i]);
        } else {
            words[i] = as_bits(x.a.v[i]);
            words[16 + i] = as_bits(x.b.v[i]);
        }
    }
    memcpy(p, words, sizeof words);
}

inline uint8_t to_code(float q) {
    const uint32_t bits = as_bits(q), exponent = bits & kExponentBits;
    const float power = as_float(exponent > kSmallestExponent ? exponent : kSmallestExponent);
    const uint32_t sum = as_bits(power * kAddend + as_float(bits & kMagnitudeBits));
    return static_cast<uint8_t>(((sum + (sum >> 20)) & 0x7f) | (bits >> 24 & 0x80));
}

template <Dtype D> inline void store_codes(uint8_t* p, Pair q) {
    for (int i = 0; i < 16; ++i) {
        p[D == Dtype::bf16 ? 2 * i : i] = to_code(q.a.v[i]);
        p[D == Dtype::bf16 ? 2 * i + 1 : 16 + i] = to_code(q.b.v[i]);
    }
}

}  // namespace
}  // namespace RMSQ_ISA
}  // namespace rmsq
