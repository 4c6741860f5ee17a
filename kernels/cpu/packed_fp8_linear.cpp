// Packed FP8 rows times an FP8 weight at one instruction-set level; the contract is in the header.
//
// A block of 32 outputs goes through three steps, of which the first two differ between levels:
//     stage   the weight as the tile reads it. With AVX-512 BF16 these are the codes themselves: the tile
//             converts them in registers, on ports that the multiplications leave idle. Elsewhere converting
//             costs as much as several rows, so a chunk is converted to bf16 in L1 and serves all rows.
//     tile    up to kTileRows rows by the block's outputs, sums in registers
//     finish  scales, bias, rounding
#include "packed_fp8_linear.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

using rmsq::FloatType;
using rmsq::kBlockOutputs;
using rmsq::kGroupRows;
using rmsq::PackedLinear;

constexpr int64_t kPairCodes = 2 * kBlockOutputs;  // of a pair, in a block

// How far ahead of its use the weight is asked for, into the second-level cache: far enough for memory, near
// enough to be there still. (The processor itself fetches from there to the first level.)
constexpr int64_t kPrefetchBytes = 8192;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

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

void expand_row(const uint8_t* codes, int64_t hidden, Unit* units) {
    const Converter converter;
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t h = 0; h < hidden; h += 64) {
        const __mmask64 present = ~0ull >> (64 - smaller(64, hidden - h));
        const __m512i some = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(present, codes + h));
        __m512i first, second;
        converter.convert(some, first, second);
        _mm512_store_si512(units + h / 2, first);
        _mm512_store_si512(units + h / 2 + 16, second);
    }
}

const Staged* stage(const uint8_t* codes, int64_t, Staged*) { return codes; }

template <int kRows>
void tile(const Staged* weight, int64_t pairs, const Unit* units, int64_t stride, float* sums) {
    // The converter leaves outputs 0-3, 8-11, ... in one vector and 4-7, 12-15, ... in the other.
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
    __m512 sum[kRows][2];
    for (int r = 0; r < kRows; ++r) {
        const __m512 first = _mm512_load_ps(sums + r * kBlockOutputs);
        const __m512 second = _mm512_load_ps(sums + r * kBlockOutputs + 16);
        sum[r][0] = _mm512_permutex2var_ps(first, even, second);
        sum[r][1] = _mm512_permutex2var_ps(first, odd, second);
    }
    const Converter converter;
    for (int64_t p = 0; p < pairs; ++p, weight += kPairCodes) {
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
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int r = 0; r < kRows; ++r) {
        _mm512_store_ps(sums + r * kBlockOutputs, _mm512_permutex2var_ps(sum[r][0], low, sum[r][1]));
        _mm512_store_ps(sums + r * kBlockOutputs + 16, _mm512_permutex2var_ps(sum[r][0], high, sum[r][1]));
    }
}

#else

// An activation unit is one fp32; the staged weight is bf16, in the order of the codes.
using Unit = float;
using Staged = uint16_t;
constexpr int64_t kUnitsPerPair = 2;
constexpr int64_t kChunkPairs = 64;
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

template <class Vector>
Vector load(const void* from) {
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

void expand_row(const uint8_t* codes, int64_t hidden, Unit* units) {
    for (int64_t h = 0; h < hidden; h += 64) {
        uint8_t some[64] = {};
        memcpy(some, codes + h, smaller(64, hidden - h));
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

template <int kRows>
void tile(const Staged* weight, int64_t pairs, const Unit* units, int64_t stride, float* sums) {
    // Enough sums to keep the multipliers busy, few enough to stay in registers.
    constexpr int kVectors = kRows > 3 || kLanes == 16 ? 2 : 4;
    for (int64_t n = 0; n < kBlockOutputs; n += kVectors * kLanes) {
        Floats sum[kRows][kVectors];
        for (int r = 0; r < kRows; ++r) memcpy(sum[r], sums + r * kBlockOutputs + n, sizeof sum[r]);
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
        for (int r = 0; r < kRows; ++r) memcpy(sums + r * kBlockOutputs + n, sum[r], sizeof sum[r]);
    }
}

#endif

// Rows lie an odd number of cache lines apart, so that those of a tile never compete for the same L1 sets.
int64_t unit_stride(int64_t hidden) { return round_up(round_up(hidden, 64) / 2 * kUnitsPerPair, 32) + 16; }

template <int kRows>
void tile_of(int64_t rows, const Staged* weight, int64_t pairs, const Unit* units, int64_t stride,
             float* sums) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return tile_of<kRows - 1>(rows, weight, pairs, units, stride, sums);
    }
    tile<kRows>(weight, pairs, units, stride, sums);
}

// The rounding functions have no branches, so that loops over them become vector code.

uint16_t round_to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

uint16_t round_to_fp16(float value) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Adding 0.5 rounds at fp16's last subnormal place, 2^-24.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520, halfway to what would be the next number
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return half | (bits >> 16 & 0x8000);
}

float widen_fp16(uint16_t half) {
    const uint32_t magnitude = (half & 0x7fff) << 13, sign = (half & 0x8000u) << 16;
    // A subnormal is the mantissa of a number with 2^-14's exponent, less 2^-14.
    const float subnormal = as_float(magnitude + (113u << 23)) - 0x1p-14f;
    uint32_t bits = magnitude < (1u << 23) ? as_bits(subnormal) : magnitude + (112u << 23);
    bits = magnitude >= (31u << 23) ? magnitude | 0x7f800000 : bits;
    return as_float(bits | sign);
}

void load_floats(const void* from, FloatType type, int64_t start, int64_t count, float* to) {
    if (type == FloatType::fp32) {
        memcpy(to, static_cast<const float*>(from) + start, count * sizeof *to);
        return;
    }
    const uint16_t* halves = static_cast<const uint16_t*>(from) + start;
    for (int64_t n = 0; n < count; ++n) {
        to[n] = type == FloatType::bf16 ? as_float(uint32_t{halves[n]} << 16) : widen_fp16(halves[n]);
    }
}

// Scale, shift and round one row of a block, and write as many outputs as there are.
void finish(const PackedLinear& linear, const float* sums, int64_t row, const float* scales,
            const float* bias, int64_t output, int64_t count) {
    float row_scale;
    memcpy(&row_scale, linear.packed + row * linear.row_stride + linear.hidden, sizeof row_scale);
    float values[kBlockOutputs];
    for (int n = 0; n < kBlockOutputs; ++n) values[n] = sums[n] * row_scale * scales[n];
    if (linear.bias != nullptr) {
        for (int n = 0; n < kBlockOutputs; ++n) values[n] += bias[n];
    }
    const int64_t at = row * linear.outputs + output;
    if (linear.out_type == FloatType::fp32) {
        memcpy(static_cast<float*>(linear.out) + at, values, count * sizeof *values);
        return;
    }
    uint16_t halves[kBlockOutputs];
    if (linear.out_type == FloatType::bf16) {
        for (int n = 0; n < kBlockOutputs; ++n) halves[n] = round_to_bf16(values[n]);
    } else {
        for (int n = 0; n < kBlockOutputs; ++n) halves[n] = round_to_fp16(values[n]);
    }
    memcpy(static_cast<uint16_t*>(linear.out) + at, halves, count * sizeof *halves);
}

}  // namespace

int64_t rmsq::RMSQ_ISA::activation_row_bytes(int64_t hidden) { return unit_stride(hidden) * sizeof(Unit); }

void rmsq::RMSQ_ISA::expand_activations(const PackedLinear& linear, int64_t first, int64_t last) {
    Unit* units = static_cast<Unit*>(linear.activations);
    const int64_t stride = unit_stride(linear.hidden);
    for (int64_t row = first; row < last; ++row) {
        expand_row(linear.packed + row * linear.row_stride, linear.hidden, units + row * stride);
    }
}

void rmsq::RMSQ_ISA::packed_fp8_linear_items(const PackedLinear& linear, int64_t first, int64_t last) {
    const int64_t pairs = linear.pairs, groups = linear.groups, stride = unit_stride(linear.hidden);
    for (int64_t item = first; item < last; ++item) {
        const int64_t block = item / groups, group = item % groups;
        const int64_t row = linear.rows * group / groups, rows = linear.rows * (group + 1) / groups - row;
        const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
        const uint8_t* codes = linear.weight + block * pairs * kPairCodes;
        const Unit* units = static_cast<const Unit*>(linear.activations) + row * stride;

        alignas(64) float sums[kGroupRows * kBlockOutputs];
        alignas(64) Staged buffer[kStageBuffer + 1];
        memset(sums, 0, rows * kBlockOutputs * sizeof *sums);
        for (int64_t p = 0; p < pairs; p += kChunkPairs) {
            const int64_t chunk = smaller(kChunkPairs, pairs - p);
            const Staged* staged = stage(codes + p * kPairCodes, chunk, buffer);
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t start = rows * t / tiles, end = rows * (t + 1) / tiles;
                const Unit* first_unit = units + start * stride + p * kUnitsPerPair;
                float* first_sum = sums + start * kBlockOutputs;
                tile_of<kTileRows>(end - start, staged, chunk, first_unit, stride, first_sum);
            }
        }

        const int64_t output = block * kBlockOutputs, count = smaller(kBlockOutputs, linear.outputs - output);
        float scales[kBlockOutputs] = {}, bias[kBlockOutputs] = {};
        if (linear.one_scale) {
            for (int64_t n = 0; n < count; ++n) scales[n] = *linear.weight_scale;
        } else {
            memcpy(scales, linear.weight_scale + output, count * sizeof *scales);
        }
        if (linear.bias != nullptr) load_floats(linear.bias, linear.bias_type, output, count, bias);
        for (int64_t r = 0; r < rows; ++r) {
            finish(linear, sums + r * kBlockOutputs, row + r, scales, bias, output, count);
        }
    }
}
