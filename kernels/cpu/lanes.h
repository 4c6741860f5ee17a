// Sixteen fp32 lanes, on whatever the instruction-set level being compiled has: one 512-bit register, two of
// 256 bits, or a plain array that compilers vectorize. The same operations in the same order and the same
// rounding on each, so that every level computes the same bits.
//
// Each lanes_<registers>.h has
//     Lanes           16 fp32: load, store, splat, + * /, fma(x, y, z) = x * y + z rounded once
//     clip, clamp     into ±limit; into [low, high]
//     peak            largest magnitude; by bits, so that NaN counts as larger than anything
//     low_bits_to_exponent    2^(b - 127) of the low 8 bits b, 1..254, of each lane
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
