// Sixteen lanes in two 256-bit registers; see lanes.h.
#pragma once

#include <immintrin.h>

#include "dtype.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

struct Lanes { __m256 v[2]; };
struct Totals { __m256d v[4]; };

inline Lanes load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void store(float* p, Lanes x) {
    _mm256_storeu_ps(p, x.v[0]);
    _mm256_storeu_ps(p + 8, x.v[1]);
}
inline Lanes splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline Lanes operator+(Lanes x, Lanes y) {
    return {{_mm256_add_ps(x.v[0], y.v[0]), _mm256_add_ps(x.v[1], y.v[1])}};
}
inline Lanes operator*(Lanes x, Lanes y) {
    return {{_mm256_mul_ps(x.v[0], y.v[0]), _mm256_mul_ps(x.v[1], y.v[1])}};
}
inline Lanes operator/(Lanes x, Lanes y) {
    return {{_mm256_div_ps(x.v[0], y.v[0]), _mm256_div_ps(x.v[1], y.v[1])}};
}
inline Lanes fma(Lanes x, Lanes y, Lanes z) {
    return {{_mm256_fmadd_ps(x.v[0], y.v[0], z.v[0]), _mm256_fmadd_ps(x.v[1], y.v[1], z.v[1])}};
}
inline __m256 clip(__m256 x, __m256 limit) {
    return _mm256_max_ps(_mm256_min_ps(x, limit), _mm256_sub_ps(_mm256_setzero_ps(), limit));
}
inline Lanes clip(Lanes x, Lanes limit) { return {{clip(x.v[0], limit.v[0]), clip(x.v[1], limit.v[1])}}; }

inline Lanes clamp(Lanes x, Lanes low, Lanes high) {
    return {
        {_mm256_max_ps(_mm256_min_ps(x.v[0], high.v[0]), low.v[0]),
         _mm256_max_ps(_mm256_min_ps(x.v[1], high.v[1]), low.v[1])}};
}

inline __m256 power_of_eighths(__m256 x) {
    const __m256i k = _mm256_castps_si256(x);
    const __m256i eighths = _mm256_load_si256(reinterpret_cast<const __m256i*>(kEighths));
    const __m256i eighth = _mm256_permutevar8x32_epi32(eighths, k);
    return _mm256_castsi256_ps(_mm256_add_epi32(eighth, _mm256_slli_epi32(k, 20)));
}
inline Lanes power_of_eighths(Lanes x) { return {{power_of_eighths(x.v[0]), power_of_eighths(x.v[1])}}; }

inline __m256 peak(__m256 x, __m256 y) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(kMagnitudeBits));
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(x), magnitude));
}
inline Lanes peak(Lanes x, Lanes y) { return {{peak(x.v[0], y.v[0]), peak(x.v[1], y.v[1])}}; }

inline Totals no_totals() {
    return {{_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()}};
}
inline void add_to(Totals& totals, Lanes x) {
    for (int i = 0; i < 2; ++i) {
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v[i]));
        const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[i], 1));
        totals.v[2 * i] = _mm256_add_pd(totals.v[2 * i], low);
        totals.v[2 * i + 1] = _mm256_add_pd(totals.v[2 * i + 1], high);
    }
}
inline void store(double* p, Totals totals) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, totals.v[i]);
}

struct Pair { Lanes a, b; };

template <Dtype D> inline Pair load_pair(const void* p) {
    Pair x;
    for (int i = 0; i < 2; ++i) {
        if constexpr (D == Dtype::bf16) {
            const __m256i words = _mm256_loadu_si256(static_cast<const __m256i*>(p) + i);
            x.a.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
            x.b.v[i] = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff0000)));
        } else if constexpr (D == Dtype::fp16) {
            x.a.v[i] = _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p) + i));
            x.b.v[i] = _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p) + 2 + i));
        } else {
            x.a.v[i] = _mm256_loadu_ps(static_cast<const float*>(p) + 8 * i);
            x.b.v[i] = _mm256_loadu_ps(static_cast<const float*>(p) + 16 + 8 * i);
        }
    }
    return x;
}

// To nearest even, the words in the high halves; finite values only.
inline __m256i bf16_in_high_half(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

template <Dtype D> inline void store_pair(void* p, Pair x) {
    for (int i = 0; i < 2; ++i) {
        if constexpr (D == Dtype::bf16) {
            const __m256i a = _mm256_srli_epi32(bf16_in_high_half(x.a.v[i]), 16);
            const __m256i words = _mm256_blend_epi16(a, bf16_in_high_half(x.b.v[i]), 0xaa);
            _mm256_storeu_si256(static_cast<__m256i*>(p) + i, words);
        } else if constexpr (D == Dtype::fp16) {
            __m128i* halves = static_cast<__m128i*>(p);
            _mm_storeu_si128(halves + i, _mm256_cvtps_ph(x.a.v[i], _MM_FROUND_TO_NEAREST_INT));
            _mm_storeu_si128(halves + 2 + i, _mm256_cvtps_ph(x.b.v[i], _MM_FROUND_TO_NEAREST_INT));
        } else {
            _mm256_storeu_ps(static_cast<float*>(p) + 8 * i, x.a.v[i]);
            _mm256_storeu_ps(static_cast<float*>(p) + 16 + 8 * i, x.b.v[i]);
        }
    }
}

inline __m256i to_codes(__m256 q) {
    const __m256i bits = _mm256_castps_si256(q);
    const __m256i power = _mm256_max_epu32(
        _mm256_and_si256(bits, _mm256_set1_epi32(kExponentBits)), _mm256_set1_epi32(kSmallestExponent));
    const __m256 absolute = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(kMagnitudeBits)));
    const __m256i sum =
        _mm256_castps_si256(_mm256_fmadd_ps(_mm256_castsi256_ps(power), _mm256_set1_ps(kAddend), absolute));
    const __m256i magnitude = _mm256_add_epi32(sum, _mm256_srli_epi32(sum, 20));
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
    return _mm256_or_si256(_mm256_and_si256(magnitude, _mm256_set1_epi32(0x7f)), sign);
}

template <Dtype D> inline void store_codes(uint8_t* p, Pair q) {
    const __m256i a0 = to_codes(q.a.v[0]), a1 = to_codes(q.a.v[1]);
    const __m256i b0 = to_codes(q.b.v[0]), b1 = to_codes(q.b.v[1]);
    __m256i codes;  // packing works on each half of a register by itself: put the halves in order afterwards
    if constexpr (D == Dtype::bf16) {
        const __m256i words0 = _mm256_or_si256(a0, _mm256_slli_epi32(b0, 8));
        const __m256i words1 = _mm256_or_si256(a1, _mm256_slli_epi32(b1, 8));
        codes = _mm256_permute4x64_epi64(_mm256_packus_epi32(words0, words1), _MM_SHUFFLE(3, 1, 2, 0));
    } else {
        const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(a0, a1), _mm256_packus_epi32(b0, b1));
        codes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), codes);
}

}  // namespace
}  // namespace RMSQ_ISA
}  // namespace rmsq
