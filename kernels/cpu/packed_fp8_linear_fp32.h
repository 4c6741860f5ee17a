// The tile without AVX-512 BF16: fp32 multiply-adds of 16, 8 or 4 lanes. See packed_fp8_linear.cpp.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "packed_fp8_linear.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

// An activation unit is one fp32; the staged weight is bf16, in the order of the codes.
using Unit = float;
using Staged = uint16_t;
constexpr int64_t kUnitsPerPair = 2;
constexpr int64_t kChunkPairs = kScaledPairs;
constexpr int64_t kStageBuffer = kChunkPairs * kPairCodes;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int64_t kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int64_t kTileRows = 6;
#else
constexpr int kLanes = 4;
constexpr int64_t kTileRows = 6;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

template <class Vector> Vector load(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

Floats multiply_add(Floats a, Floats b, Floats sum) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_NEON)
    return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + sum;
#endif
}

#if defined(__AVX2__)

// The low and the high byte in bf16 of the magnitudes below 16, subnormals among them. The bf16 of a larger
// one is its bits moved left by 4, plus 120 in the exponent.
alignas(16) constexpr uint8_t kSmallLow[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60,
                                               0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0};
alignas(16) constexpr uint8_t kSmallHigh[16] = {0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c,
                                                0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c};

#endif

// bf16 of 64 codes, in their order.
void to_bf16(const uint8_t* codes, uint16_t* bf16) {
#if defined(__AVX512F__)
    const __m512i small_low = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kSmallLow));
    const __m512i small_high = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kSmallHigh));
    // Unpacking works on each 16 bytes by itself: put beforehand in one what is to end up in one.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(codes));
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi8(0x7f));
    const __mmask64 small = _mm512_cmplt_epi8_mask(magnitude, _mm512_set1_epi8(16));
    const __mmask64 nan = _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(0x7f));
    __m512i low = _mm512_and_si512(_mm512_slli_epi16(code, 4), _mm512_set1_epi8(-16));
    low = _mm512_mask_shuffle_epi8(low, small, small_low, magnitude);
    __m512i high = _mm512_and_si512(_mm512_srli_epi16(magnitude, 4), _mm512_set1_epi8(7));
    high = _mm512_add_epi8(high, _mm512_set1_epi8(0x3c));
    high = _mm512_mask_shuffle_epi8(high, small, small_high, magnitude);
    high = _mm512_mask_mov_epi8(high, nan, magnitude);
    high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(-128), 0xf8);  // high | (code & 0x80)
    _mm512_storeu_si512(bf16, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(bf16 + 32, _mm512_unpackhi_epi8(low, high));
#elif defined(__AVX2__)
    const __m256i small_low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kSmallLow));
    const __m256i small_high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kSmallHigh));
    for (int i = 0; i < 64; i += 32) {
        const __m256i code = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i*)(codes + i)), 0xd8);
        const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi8(0x7f));
        const __m256i small = _mm256_cmpgt_epi8(_mm256_set1_epi8(16), magnitude);
        const __m256i nan = _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7f));
        __m256i low = _mm256_and_si256(_mm256_slli_epi16(code, 4), _mm256_set1_epi8(-16));
        low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(small_low, magnitude), small);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(magnitude, 4), _mm256_set1_epi8(7));
        high = _mm256_add_epi8(high, _mm256_set1_epi8(0x3c));
        high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(small_high, magnitude), small);
        high = _mm256_or_si256(_mm256_or_si256(high, nan), _mm256_and_si256(code, _mm256_set1_epi8(-128)));
        _mm256_storeu_si256((__m256i*)(bf16 + i), _mm256_unpacklo_epi8(low, high));
        _mm256_storeu_si256((__m256i*)(bf16 + i + 16), _mm256_unpackhi_epi8(low, high));
    }
#else
    for (int i = 0; i < 64; ++i) {
        const uint32_t magnitude = codes[i] & 0x7f;
        const float normal = as_float((magnitude << 20) + (120u << 23));
        // Read as a normal number a subnormal is (1 + f/8) * 2^-7; it means f/8 * 2^-6.
        const float subnormal = normal + normal - 0x1p-6f;
        const uint32_t bits = as_bits(magnitude < 8 ? subnormal : normal);
        bf16[i] = (magnitude == 0x7f ? 0x7fc0 : bits >> 16) | (codes[i] & 0x80) << 8;
    }
#endif
}

void expand_row(const uint8_t* codes, int64_t H, Unit* units) {
    for (int64_t h = 0; h < H; h += 64) {
        uint8_t some[64] = {};
        memcpy(some, codes + h, H - h < 64 ? H - h : 64);
        uint16_t bf16[64];
        to_bf16(some, bf16);
        for (int i = 0; i < 64; ++i) units[h + i] = as_float((uint32_t)bf16[i] << 16);
    }
}

const Staged* stage(const uint8_t* codes, int64_t pairs, Staged* buffer) {
    for (int64_t p = 0; p < pairs; ++p) {
        __builtin_prefetch(codes + p * kPairCodes + kPrefetchBytes, 0, 2);
        to_bf16(codes + p * kPairCodes, buffer + p * kPairCodes);
    }
    return buffer;
}

// `scales` is null, or has the one of the chunk; `fresh`: the sums are to start at zero.
template <int kRows>
void tile(
    const Staged* weight, int64_t pairs, const Unit* units, int64_t stride, float* sums, const float* scales,
    bool fresh) {
    // Enough sums to keep the multipliers busy, few enough to stay in registers.
    constexpr int kVectors = kRows > 3 || kLanes == 16 ? 2 : 4;
    for (int64_t n = 0; n < kBlockOutputs; n += kVectors * kLanes) {
        Floats sum[kRows][kVectors] = {};
        for (int r = 0; r < kRows && scales == nullptr && !fresh; ++r) {
            memcpy(sum[r], sums + r * kBlockOutputs + n, sizeof sum[r]);
        }
        for (int64_t p = 0; p < pairs; ++p) {
            Floats even[kVectors], odd[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                const Words both = load<Words>(weight + p * kPairCodes + 2 * (n + v * kLanes));
                even[v] = (Floats)(both << 16);
                odd[v] = (Floats)(both & 0xffff0000);
            }
            // The second of a pair comes first, as in vdpbf16ps.
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
                const Floats unit = units[r * stride + 2 * p + 1] - Floats{};
                for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(unit, odd[v], sum[r][v]);
            }
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
                const Floats unit = units[r * stride + 2 * p] - Floats{};
                for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(unit, even[v], sum[r][v]);
            }
        }
        for (int r = 0; r < kRows && scales != nullptr; ++r) {
            Floats before[kVectors] = {};
            if (!fresh) memcpy(before, sums + r * kBlockOutputs + n, sizeof before);
            for (int v = 0; v < kVectors; ++v) sum[r][v] = before[v] + sum[r][v] * *scales;
        }
        for (int r = 0; r < kRows; ++r) memcpy(sums + r * kBlockOutputs + n, sum[r], sizeof sum[r]);
    }
}

}  // namespace
}  // namespace RMSQ_ISA
}  // namespace rmsq
