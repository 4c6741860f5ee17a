// What kernel sources and ops agree on: element types, a few sizes, and the conversions between the element
// types and fp32, one number at a time.
//
// The functions are in an unnamed namespace, so that each source has its own: none that was compiled with
// AVX-512 flags can be the copy that the linker keeps for everyone (isa.h). They have no branches, so that
// compilers turn loops over them into vector code.
#pragma once

#include <stdint.h>
#include <string.h>

namespace rmsq {

enum class Dtype { bf16, fp16, fp32 };

constexpr int64_t kScaleBytes = 4;  // at the end of a packed row
constexpr int64_t kPair = 32;       // elements that the row kernels take at a time (lanes.h)

namespace {

constexpr uint32_t kExponentBits = 0x7f800000;
constexpr uint32_t kMagnitudeBits = 0x7fffffff;

inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline bool is_finite(float value) { return (as_bits(value) & kExponentBits) != kExponentBits; }

inline float widen_bf16(uint16_t word) { return as_float(static_cast<uint32_t>(word) << 16); }

inline float widen_fp16(uint16_t word) {
    const uint32_t magnitude = (word & 0x7fffu) << 13, sign = (word & 0x8000u) << 16;
    // A subnormal is the mantissa of a number with 2^-14's exponent, less 2^-14.
    const float subnormal = as_float(magnitude + (113u << 23)) - 0x1p-14f;
    uint32_t bits = magnitude < (1u << 23) ? as_bits(subnormal) : magnitude + (112u << 23);
    bits = magnitude >= (31u << 23) ? magnitude | kExponentBits : bits;  // Inf, NaN
    return as_float(bits | sign);
}

// To nearest, ties to even; NaN becomes the quiet NaN without a sign.
inline uint16_t round_to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & kMagnitudeBits) > kExponentBits ? 0x7fc0 : rounded);
}

// To nearest, ties to even; NaN becomes the quiet NaN of its sign.
inline uint16_t round_to_fp16(float value) {
    const uint32_t bits = as_bits(value), magnitude = bits & kMagnitudeBits;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Adding 0.5 rounds at fp16's last subnormal place, 2^-24.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    uint32_t word = magnitude < (113u << 23) ? subnormal : normal;
    word = magnitude >= 0x477ff000 ? 0x7c00 : word;  // 65520, halfway to what would be the next number
    word = magnitude > kExponentBits ? 0x7e00 : word;
    return static_cast<uint16_t>(word | (bits >> 16 & 0x8000));
}

// Elements [start, start + count) of `from`, in fp32.
inline void widen(const void* from, Dtype dtype, int64_t start, int64_t count, float* to) {
    if (dtype == Dtype::fp32) {
        memcpy(to, static_cast<const char*>(from) + start * 4, static_cast<size_t>(count) * sizeof *to);
        return;
    }
    const char* bytes = static_cast<const char*>(from) + start * 2;
    for (int64_t i = 0; i < count; ++i) {
        uint16_t word;
        memcpy(&word, bytes + 2 * i, sizeof word);
        to[i] = dtype == Dtype::bf16 ? widen_bf16(word) : widen_fp16(word);
    }
}

}  // namespace
}  // namespace rmsq
