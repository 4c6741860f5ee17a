// The tile with AVX-512 BF16: pairs of bf16 products by vdpbf16ps. See packed_fp8_linear.cpp.
#pragma once

#include <immintrin.h>

#include "packed_fp8_linear.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

// An activation unit is a pair of bf16.
using Unit = uint32_t;
using Staged = uint8_t;
constexpr int64_t kUnitsPerPair = 1;
constexpr int64_t kTileRows = 12;
constexpr int64_t kChunkPairs = 4096;
constexpr int64_t kStageBuffer = 0;

// The low and the high byte of each FP8 magnitude in bf16. All are normal numbers, zero or NaN; vdpbf16ps
// would take a subnormal bf16 for zero.
struct Magnitudes {
    alignas(64) uint8_t low[128];
    alignas(64) uint8_t high[128];

    constexpr Magnitudes() : low(), high() {
        for (int code = 0; code < 128; ++code) {
            const int exponent = code >> 3, fraction = code & 7;
            int bits = (exponent + 120) << 7 | fraction << 4;
            if (code == 127) {
                bits = 0x7fc0;
            } else if (exponent == 0) {
                const int leading = fraction >= 4 ? 2 : fraction >= 2 ? 1 : 0;
                bits = fraction == 0 ? 0 : (118 + leading) << 7 | ((fraction << (7 - leading)) & 0x7f);
            }
            low[code] = bits & 0xff;
            high[code] = bits >> 8;
        }
    }
};

constexpr Magnitudes kMagnitudes;

struct Converter {
    __m512i low0 = _mm512_load_si512(kMagnitudes.low), low1 = _mm512_load_si512(kMagnitudes.low + 64);
    __m512i high0 = _mm512_load_si512(kMagnitudes.high), high1 = _mm512_load_si512(kMagnitudes.high + 64);
    __m512i sign = _mm512_set1_epi8(-128);

    // bf16 of 64 codes: `first` has bytes 0-7 of each 16, `second` bytes 8-15.
    void convert(__m512i codes, __m512i& first, __m512i& second) const {
        const __m512i low = _mm512_permutex2var_epi8(low0, codes, low1);
        const __m512i magnitude = _mm512_permutex2var_epi8(high0, codes, high1);
        // magnitude | (codes & sign)
        const __m512i high = _mm512_ternarylogic_epi32(magnitude, codes, sign, 0xf8);
        first = _mm512_unpacklo_epi8(low, high);
        second = _mm512_unpackhi_epi8(low, high);
    }
};

void expand_row(const uint8_t* codes, int64_t H, Unit* units) {
    const Converter converter;
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t h = 0; h < H; h += 64) {
        const __mmask64 present = ~0ull >> (64 - (H - h < 64 ? H - h : 64));
        const __m512i some = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(present, codes + h));
        __m512i first, second;
        converter.convert(some, first, second);
        _mm512_store_si512(units + h / 2, first);
        _mm512_store_si512(units + h / 2 + 16, second);
    }
}

const Staged* stage(const uint8_t* codes, int64_t, Staged*) { return codes; }

// `scales` is null, or has one for each kScaledPairs; `fresh`: the sums are to start at zero.
template <int kRows>
void tile(
    const Staged* weight, int64_t pairs, const Unit* units, int64_t stride, float* sums, const float* scales,
    bool fresh) {
    // The converter leaves outputs 0-3, 8-11, ... in one vector and 4-7, 12-15, ... in the other.
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
    __m512 total[kRows][2];
    for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int r = 0; r < kRows && !fresh; ++r) {
        const __m512 first = _mm512_load_ps(sums + r * kBlockOutputs);
        const __m512 second = _mm512_load_ps(sums + r * kBlockOutputs + 16);
        total[r][0] = _mm512_permutex2var_ps(first, even, second);
        total[r][1] = _mm512_permutex2var_ps(first, odd, second);
    }
    const Converter converter;
    const int64_t step = scales == nullptr ? pairs : kScaledPairs;
    for (int64_t start = 0; start < pairs; start += step) {
        const int64_t end = start + step < pairs ? start + step : pairs;
        __m512 sum[kRows][2];
        for (int r = 0; r < kRows; ++r) {
            sum[r][0] = scales == nullptr ? total[r][0] : _mm512_setzero_ps();
            sum[r][1] = scales == nullptr ? total[r][1] : _mm512_setzero_ps();
        }
        for (int64_t p = start; p < end; ++p, weight += kPairCodes) {
            _mm_prefetch(reinterpret_cast<const char*>(weight) + kPrefetchBytes, _MM_HINT_T1);
            __m512i first, second;
            converter.convert(_mm512_loadu_si512(weight), first, second);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(units[r * stride + p]);
                sum[r][0] = _mm512_dpbf16_ps(sum[r][0], (__m512bh)first, pair);
                sum[r][1] = _mm512_dpbf16_ps(sum[r][1], (__m512bh)second, pair);
            }
        }
        const __m512 scale = _mm512_set1_ps(scales == nullptr ? 1 : scales[start / kScaledPairs]);
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < 2; ++v) {
                total[r][v] = scales == nullptr ? sum[r][v]
                                                : _mm512_add_ps(total[r][v], _mm512_mul_ps(sum[r][v], scale));
            }
        }
    }
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int r = 0; r < kRows; ++r) {
        _mm512_store_ps(sums + r * kBlockOutputs, _mm512_permutex2var_ps(total[r][0], low, total[r][1]));
        _mm512_store_ps(
            sums + r * kBlockOutputs + 16, _mm512_permutex2var_ps(total[r][0], high, total[r][1]));
    }
}

}  // namespace
}  // namespace RMSQ_ISA
}  // namespace rmsq
