// Sixteen fp32 lanes, on whatever the instruction-set level being compiled has: one 512-bit register, two of
// 256 bits, or a plain array that compilers vectorize. The same operations in the same order and the same
// rounding on each, so that every level computes the same bits.
//
// Elements are read 32 at a time, as a Pair of Lanes. Which element sits in which lane is a matter of the
// dtype: bf16 pairs hold the even elements in `a` and the odd ones in `b` (both widen in one instruction),
// the others hold the first sixteen in `a` and the rest in `b`.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "rms_norm_quant.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

constexpr int64_t kPair = 32;

template <Dtype> struct Element;
template <> struct Element<Dtype::bf16> { using word = uint16_t; };
template <> struct Element<Dtype::fp16> { using word = uint16_t; };
template <> struct Element<Dtype::fp32> { using word = uint32_t; };

inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// Rounding an fp32 q, |q| <= 448, to an FP8 code (bias 7, 3 mantissa bits), to nearest even. Let 2^e be q's
// power of two, but at least 2^-6, the smallest normal number. Adding 2^e * 2^20 to |q| leaves it a mantissa
// whose unit is 2^(e-3), that of the code: the addition rounds, and the low bits of the sum are the code's
// mantissa with its leading one. The sum's own exponent, 8 * (e + 147) in a code's terms, should count as
// 8 * (e + 6): 19 * 2^e, that is 152 units more, make the two agree modulo 256. So the code's magnitude is the low
// byte of sum + (sum >> 20). (2^e times kAddend is exact, hence the same with and without a fused multiply-add.)
constexpr uint32_t kExponent = 0x7f800000;
constexpr uint32_t kSmallestExponent = 121u << 23;
constexpr float kAddend = 0x1p20f + 19;

#if defined(__AVX512F__)

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

// Largest magnitude; by bits, so that NaN counts as larger than anything.
inline Lanes peak(Lanes x, Lanes y) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(y.v), _mm512_set1_epi32(0x7fffffff));
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
// For store_codes: where the lowest and the highest bytes of all elements' lanes are; bytes 64 and up are the b's.
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
        return {{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))},
                {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000)))}};
    } else if constexpr (D == Dtype::fp16) {
        const __m256i* halves = static_cast<const __m256i*>(p);
        return {{_mm512_cvtph_ps(_mm256_loadu_si256(halves))}, {_mm512_cvtph_ps(_mm256_loadu_si256(halves + 1))}};
    } else {
        const float* floats = static_cast<const float*>(p);
        return {load(floats), load(floats + 16)};
    }
}

template <Dtype D> inline void store_pair(void* p, Pair x) {
    if constexpr (D == Dtype::bf16) {
        // To nearest even; finite values only. The cut-off half rounds up when above 0x8000, or equal to it and
        // the kept half odd.
        const __m512i a = _mm512_castps_si512(x.a.v), b = _mm512_castps_si512(x.b.v);
        const __m512i kept = _mm512_mask_mov_epi16(_mm512_srli_epi32(a, 16), 0xaaaaaaaa, b);
        const __m512i cut = _mm512_mask_mov_epi16(a, 0xaaaaaaaa, _mm512_slli_epi32(b, 16));
        const __m512i sticky = _mm512_ternarylogic_epi32(cut, kept, _mm512_set1_epi16(1), 0xf8);  // cut | kept & 1
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
    const __m512 power = _mm512_range_ps(sign_and_exponent, _mm512_set1_ps(0x1p-6f), 3);  // larger one, first's sign
    return _mm512_castps_si512(_mm512_fmadd_ps(power, _mm512_set1_ps(kAddend), q.v));
}

template <Dtype D> inline void store_codes(uint8_t* p, Pair q) {
    const __m512i a = code_sum(q.a), b = code_sum(q.b);
    const __m512i magnitude_a = _mm512_add_epi32(a, _mm512_srli_epi32(a, 20));
    const __m512i magnitude_b = _mm512_add_epi32(b, _mm512_srli_epi32(b, 20));
#if defined(__AVX512VBMI__)
    // The magnitudes are in the sums' lowest bytes, the signs in their highest: all of the former into the low half
    // of a register, in the order of the elements, all of the latter into the high half.
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

#elif defined(__AVX2__)

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

// Largest magnitude; by bits, so that NaN counts as larger than anything.
inline __m256 peak(__m256 x, __m256 y) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(0x7fffffff));
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

// Round to nearest even; finite values only.
inline __m256i round_to_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

template <Dtype D> inline void store_pair(void* p, Pair x) {
    for (int i = 0; i < 2; ++i) {
        if constexpr (D == Dtype::bf16) {
            const __m256i a = _mm256_srli_epi32(round_to_bf16(x.a.v[i]), 16);
            const __m256i words = _mm256_blend_epi16(a, round_to_bf16(x.b.v[i]), 0xaa);
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
        _mm256_and_si256(bits, _mm256_set1_epi32(kExponent)), _mm256_set1_epi32(kSmallestExponent));
    const __m256 absolute = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
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

#else

struct Lanes { float v[16]; };
struct Totals { double v[16]; };

template <class Function> inline Lanes each(Function function) {
    Lanes x;
    for (int i = 0; i < 16; ++i) x.v[i] = function(i);
    return x;
}

inline Lanes load(const float* p) { return each([&](int i) { return p[i]; }); }
inline void store(float* p, Lanes x) { memcpy(p, x.v, sizeof x.v); }
inline Lanes splat(float x) { return each([&](int) { return x; }); }
inline Lanes operator+(Lanes x, Lanes y) { return each([&](int i) { return x.v[i] + y.v[i]; }); }
inline Lanes operator*(Lanes x, Lanes y) { return each([&](int i) { return x.v[i] * y.v[i]; }); }
inline Lanes operator/(Lanes x, Lanes y) { return each([&](int i) { return x.v[i] / y.v[i]; }); }
inline Lanes fma(Lanes x, Lanes y, Lanes z) { return each([&](int i) { return fmaf(x.v[i], y.v[i], z.v[i]); }); }
inline Lanes clip(Lanes x, Lanes limit) {
    return each([&](int i) {
        const float below = x.v[i] < limit.v[i] ? x.v[i] : limit.v[i];
        return below > -limit.v[i] ? below : -limit.v[i];
    });
}

// Largest magnitude; by bits, so that NaN counts as larger than anything.
inline Lanes peak(Lanes x, Lanes y) {
    return each([&](int i) {
        const int32_t magnitude = static_cast<int32_t>(as_bits(y.v[i]) & 0x7fffffff);
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

inline float widen_fp16(uint16_t word) {
    const uint32_t magnitude = static_cast<uint32_t>(word & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(word & 0x8000) << 16;
    const uint32_t exponent = magnitude & 31u << 23;
    if (exponent == 31u << 23) return as_float(sign | (magnitude + (224u << 23)));  // Inf, NaN
    if (exponent != 0) return as_float(sign | (magnitude + (112u << 23)));
    // Subnormal: as the mantissa of a number with 2^-14's exponent, less 2^-14.
    const float value = as_float(magnitude + (113u << 23)) - as_float(113u << 23);
    return as_float(sign | as_bits(value));
}

inline uint16_t round_to_fp16(float x) {
    const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > kExponent) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= (143u << 23)) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and more
    if (magnitude < (113u << 23)) {  // below 2^-14: let an addition align and round the mantissa
        return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
    }
    const uint32_t rounded = magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | rounded >> 13);
}

template <Dtype D> inline Pair load_pair(const void* p) {
    typename Element<D>::word words[kPair];
    memcpy(words, p, sizeof words);
    if constexpr (D == Dtype::bf16) {
        return {each([&](int i) { return as_float(static_cast<uint32_t>(words[2 * i]) << 16); }),
                each([&](int i) { return as_float(static_cast<uint32_t>(words[2 * i + 1]) << 16); })};
    } else if constexpr (D == Dtype::fp16) {
        return {each([&](int i) { return widen_fp16(words[i]); }),
                each([&](int i) { return widen_fp16(words[16 + i]); })};
    } else {
        return {each([&](int i) { return as_float(words[i]); }), each([&](int i) { return as_float(words[16 + i]); })};
    }
}

// Round to nearest even; finite values only.
inline uint16_t round_to_bf16(float x) {
    const uint32_t bits = as_bits(x);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
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
    const uint32_t bits = as_bits(q), exponent = bits & kExponent;
    const float power = as_float(exponent > kSmallestExponent ? exponent : kSmallestExponent);
    const uint32_t sum = as_bits(power * kAddend + as_float(bits & 0x7fffffff));
    return static_cast<uint8_t>(((sum + (sum >> 20)) & 0x7f) | (bits >> 24 & 0x80));
}

template <Dtype D> inline void store_codes(uint8_t* p, Pair q) {
    for (int i = 0; i < 16; ++i) {
        p[D == Dtype::bf16 ? 2 * i : i] = to_code(q.a.v[i]);
        p[D == Dtype::bf16 ? 2 * i + 1 : 16 + i] = to_code(q.b.v[i]);
    }
}

#endif

}  // namespace
}  // namespace RMSQ_ISA
}  // namespace rmsq
