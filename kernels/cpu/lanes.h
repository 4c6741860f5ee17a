// Sixteen fp32 lanes, on whatever the instruction-set level being compiled has: one 512-bit register, two of
// 256 bits, or a plain array that compilers vectorize. The same operations in the same order and the same
// rounding on each, so that every level computes the same bits.
//
// Each lanes_<registers>.h has
//     Lanes           16 fp32: load, store, splat, + * /, fma(x, y, z) = x * y + z rounded once
//     clip, clamp     into ±limit; into [low, high]
//     peak            largest magnitude; by bits, so that NaN counts as larger than anything
//     power_of_eighths    2^(k/8) of the whole number k, -1008..1023, in the low bits of each lane
//     Totals          16 fp64 sums of Lanes
//     Pair            32 elements: load_pair, store_pair of a dtype, store_codes (FP8)
//
// Elements are read 32 at a time, as a Pair of Lanes. Which element sits in which lane depends on the dtype:
// bf16 pairs hold the even elements in `a` and the odd ones in `b` (both widen in one instruction), the
// others hold the first sixteen in `a` and the rest in `b`.
//
// store_pair rounds to nearest even, and to bf16 only finite values right.
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

template <Dtype> struct Element;
template <> struct Element<Dtype::bf16> { using word = uint16_t; };
template <> struct Element<Dtype::fp16> { using word = uint16_t; };
template <> struct Element<Dtype::fp32> { using word = uint32_t; };

template <Dtype D> constexpr int64_t kBytes = sizeof(typename Element<D>::word);

// Rounding an fp32 q, |q| <= 448, to an FP8 code (bias 7, 3 mantissa bits), to nearest even. Let 2^e be q's
// power of two, but at least 2^-6, the smallest normal number. Adding 2^e * 2^20 to |q| leaves it a mantissa
// whose unit is 2^(e-3), that of the code: the addition rounds, and the low bits of the sum are the code's
// mantissa with its leading one. The sum's own exponent, 8 * (e + 147) in a code's terms, should count as
// 8 * (e + 6): 19 * 2^e, that is 152 units more, make the two agree modulo 256. So the code's magnitude is
// the low byte of sum + (sum >> 20). (2^e times kAddend is exact, hence the same with and without a fused
// multiply-add.)
constexpr uint32_t kSmallestExponent = 121u << 23;
constexpr float kAddend = 0x1p20f + 19;

// For power_of_eighths: the bits of 2^(j/8), j = k % 8, less j << 20, so that adding k << 20 adds k / 8,
// rounded down, to the exponent. Twice over, for those who look up four bits.
alignas(64) constexpr uint32_t kEighths[16] = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};

}  // namespace
}  // namespace RMSQ_ISA
}  // namespace rmsq

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif
