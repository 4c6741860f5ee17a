// Sixteen lanes in one 512-bit register; see lanes.h.
#pragma once

#include <immintrin.h>

#include "dtype.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

struct Lanes { __m512 v; };
struct Totals { __m512d v[2]; };

inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x.v); }
inline Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes operator+(Lanes x, Lanes y) { return {_mm512_add_ps(x.v, y.v)}; }
inline Lanes operator*(Lanes x, Lanes y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline Lanes operator/(Lanes x, Lanes y) { return {_mm512_div_ps(x.v, y.v)}; }
inline Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
inline Lanes clip(Lanes x, Lanes limit) {
    const __m512 low = _mm512_sub_ps(_mm512_setzero_ps(), limit.v);
    return {_mm512_max_ps(_mm512_min_ps(x.v, limit.v), low)};
}

inline Lanes clamp(Lanes x, Lanes low, Lanes high) {
    return {_mm512_max_ps(_mm512_min_ps(x.v, high.v), low.v)};
}

inline Lanes power_of_eighths(Lanes x) {
    const __m512i k = _mm512_castps_si512(x.v);
    const __m512i eighth = _mm512_permutexvar_epi32(k, _mm512_load_si512(kEighths));
    return {_mm512_castsi512_ps(_mm512_add_epi32(eighth, _mm512_slli_epi32(k, 20)))};
}

inline Lanes peak(Lanes x, Lanes y) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(y.v), _mm512_set1_epi32(kMagnitudeBits));
    return {_mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(x.v), magnitude))};
}

inline Totals no_totals() { return {{_mm512_setzero_pd(), _mm512_setzero_pd()}}; }
inline void add_to(Totals& totals, Lanes x) {
    const __m256 high = _mm512_extractf32x8_ps(x.v, 1);
    totals.v[0] = _mm512_add_pd(totals.v[0], _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    totals.v[1] = _mm512_add_pd(totals.v[1], _mm512_cvtps_pd(high));
}
inline void store(double* p, Totals totals) {
    _mm512_storeu_pd(p, totals.v[0]);
    _mm512_storeu_pd(p + 8, totals.v[1]);
}

struct Pair { Lanes a, b; };

#if defined(__AVX512VBMI__)
// For store_codes: where the lowest and the highest bytes of all elements are; bytes 64 and up are b's.
struct Bytes { uint8_t at[64]; };
template <Dtype D> constexpr Bytes code_bytes() {
    Bytes bytes{};
    for (int i = 0; i < 32; ++i) {
        const int lane = D == Dtype::bf16 ? i / 2 : i % 16, in_b = D == Dtype::bf16 ? i % 2 : i / 16;
        bytes.at[i] = static_cast<uint8_t>(in_b * 64 + lane * 4);
        bytes.at[32 + i] = static_cast<uint8_t>(in_b * 64 + lane * 4 + 3);
    }
    return bytes;
}
template <Dtype D> constexpr Bytes kCodeBytes = code_bytes<D>();
#endif

template <Dtype D> inline Pair load_pair(const void* p) {
    if constexpr (D == Dtype::bf16) {
        const __m512i words = _mm512_loadu_si512(p);
        return {
            {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000)))}};
    } else if constexpr (D == Dtype::fp16) {
        const __m256i* halves = static_cast<const __m256i*>(p);
        return {
            {_mm512_cvtph_ps(_mm256_loadu_si256(halves))}, {_mm512_cvtph_ps(_mm256_loadu_si256(halves + 1))}};
    } else {
        const float* floats = static_cast<const float*>(p);
        return {load(floats), load(floats + 16)};
    }
}

template <Dtype D> inline void store_pair(void* p, Pair x) {
    if constexpr (D == Dtype::bf16) {
        // To nearest even; finite values only. The cut-off half rounds up when above 0x8000, or equal to it
        // and the kept half odd.
        const __m512i a = _mm512_castps_si512(x.a.v), b = _mm512_castps_si512(x.b.v);
        const __m512i kept = _mm512_mask_mov_epi16(_mm512_srli_epi32(a, 16), 0xaaaaaaaa, b);
        const __m512i cut = _mm512_mask_mov_epi16(a, 0xaaaaaaaa, _mm512_slli_epi32(b, 16));
        // cut | kept & 1
        const __m512i sticky = _mm512_ternarylogic_epi32(cut, kept, _mm512_set1_epi16(1), 0xf8);
        const __mmask32 up = _mm512_cmpgt_epu16_mask(sticky, _mm512_set1_epi16(-0x8000));
        _mm512_storeu_si512(p, _mm512_mask_add_epi16(kept, up, kept, _mm512_set1_epi16(1)));
    } else if constexpr (D == Dtype::fp16) {
        __m256i* halves = static_cast<__m256i*>(p);
        _mm256_storeu_si256(halves, _mm512_cvtps_ph(x.a.v, _MM_FROUND_TO_NEAREST_INT));
        _mm256_storeu_si256(halves + 1, _mm512_cvtps_ph(x.b.v, _MM_FROUND_TO_NEAREST_INT));
    } else {
        store(static_cast<float*>(p), x.a);
        store(static_cast<float*>(p) + 16, x.b);
    }
}

// The sum that rounds q to a code, with q's sign.
inline __m512i code_sum(Lanes q) {
    const __m512 sign_and_exponent = _mm512_and_ps(q.v, _mm512_castsi512_ps(_mm512_set1_epi32(0xff800000)));
    // The larger magnitude, with the first one's sign.
    const __m512 power = _mm512_range_ps(sign_and_exponent, _mm512_set1_ps(0x1p-6f), 3);
    return _mm512_castps_si512(_mm512_fmadd_ps(power, _mm512_set1_ps(kAddend), q.v));
}

template <Dtype D> inline void store_codes(uint8_t* p, Pair q) {
    const __m512i a = code_sum(q.a), b = code_sum(q.b);
    const __m512i magnitude_a = _mm512_add_epi32(a, _mm512_srli_epi32(a, 20));
    const __m512i magnitude_b = _mm512_add_epi32(b, _mm512_srli_epi32(b, 20));
#if defined(__AVX512VBMI__)
    // The magnitudes are in the sums' lowest bytes, the signs in their highest: all of the former into the
    // low half of a register, in the order of the elements, all of the latter into the high half.
    const __m512i bytes =
        _mm512_permutex2var_epi8(magnitude_a, _mm512_loadu_si512(kCodeBytes<D>.at), magnitude_b);
    const __m256i codes = _mm256_ternarylogic_epi32(
        _mm256_set1_epi8(0x7f), _mm512_castsi512_si256(bytes), _mm512_extracti64x4_epi64(bytes, 1), 0xca);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), codes);
#else
    const __m512i mask = _mm512_set1_epi32(0x7f);
    const __m512i codes_a = _mm512_ternarylogic_epi32(mask, magnitude_a, _mm512_srli_epi32(a, 24), 0xca);
    const __m512i codes_b = _mm512_ternarylogic_epi32(mask, magnitude_b, _mm512_srli_epi32(b, 24), 0xca);
    if constexpr (D == Dtype::bf16) {
        const __m512i words = _mm512_or_si512(codes_a, _mm512_slli_epi32(codes_b, 8));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
    } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes_a));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm512_cvtepi32_epi8(codes_b));
    }
#endif
}

}  // namespace
}  // namespace RMSQ_ISA
}  // namespace rmsq
