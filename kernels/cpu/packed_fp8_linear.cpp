// Packed FP8 rows times an FP8 weight at one instruction-set level; the contract is in the header.
//
// A block of 32 outputs goes through three steps, of which the first two differ between levels
// (packed_fp8_linear_bf16.h, packed_fp8_linear_fp32.h):
//     stage   the weight as the tile reads it. With AVX-512 BF16 these are the codes themselves: the tile
//             converts them in registers, on ports that the multiplications leave idle. Elsewhere converting
//             costs as much as several rows, so a chunk is converted to bf16 in L1 and serves all rows.
//     tile    up to kTileRows rows by the block's outputs, sums in registers. Where blocks of the weight have
//             scales, the sum of kScaledPairs pairs is scaled and added to those before.
//     finish  scales, bias, rounding
#include "packed_fp8_linear.h"

#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include "packed_fp8_linear_bf16.h"
#else
#include "packed_fp8_linear_fp32.h"
#endif

namespace rmsq {
namespace RMSQ_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows lie an odd number of cache lines apart, so that those of a tile never compete for the same L1 sets.
int64_t unit_stride(int64_t H) { return round_up(round_up(H, 64) / 2 * kUnitsPerPair, 32) + 16; }

// tile<rows>, where rows <= kRows.
template <int kRows>
void tile_of(
    int64_t rows, const Staged* weight, int64_t pairs, const Unit* units, int64_t stride, float* sums,
    const float* scales) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return tile_of<kRows - 1>(rows, weight, pairs, units, stride, sums, scales);
    }
    tile<kRows>(weight, pairs, units, stride, sums, scales);
}

// Sums of `rows` rows, from `units` on, by the outputs of a block, into `sums`, [rows, kBlockOutputs].
void sum_block(const PackedFp8Linear& linear, int64_t block, const Unit* units, int64_t rows, float* sums) {
    alignas(64) Staged buffer[kStageBuffer + 1];
    const int64_t pairs = linear.pairs, stride = unit_stride(linear.H);
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const uint8_t* codes = linear.weight + block * pairs * kPairCodes;
    const int64_t scale_row = block * kBlockOutputs / kScaledFeatures * linear.scale_columns;
    memset(sums, 0, rows * kBlockOutputs * sizeof *sums);
    for (int64_t p = 0; p < pairs; p += kChunkPairs) {
        const int64_t chunk = smaller(kChunkPairs, pairs - p);
        const Staged* staged = stage(codes + p * kPairCodes, chunk, buffer);
        const float* scales = nullptr;
        if (linear.scale_columns > 0) scales = linear.weight_scale + scale_row + p / kScaledPairs;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t start = rows * t / tiles, end = rows * (t + 1) / tiles;
            const Unit* first_unit = units + start * stride + p * kUnitsPerPair;
            float* first_sum = sums + start * kBlockOutputs;
            tile_of<kTileRows>(end - start, staged, chunk, first_unit, stride, first_sum, scales);
        }
    }
}

// Scale, shift and round one row of a block, and write as many outputs as there are.
void finish_row(
    const PackedFp8Linear& linear, const float* sums, int64_t row, const float* scales, const float* bias,
    int64_t output, int64_t count) {
    float row_scale = linear.static_scale;
    if (row_scale == 0) {
        memcpy(&row_scale, linear.packed + row * linear.packed_stride + linear.H, sizeof row_scale);
    }
    float values[kBlockOutputs];
    for (int n = 0; n < kBlockOutputs; ++n) values[n] = sums[n] * row_scale * scales[n];
    if (linear.bias != nullptr) {
        for (int n = 0; n < kBlockOutputs; ++n) values[n] += bias[n];
    }
    const int64_t at = row * linear.N + output;
    if (linear.out_dtype == Dtype::fp32) {
        memcpy(static_cast<float*>(linear.out) + at, values, count * sizeof *values);
        return;
    }
    uint16_t halves[kBlockOutputs];
    if (linear.out_dtype == Dtype::bf16) {
        for (int n = 0; n < kBlockOutputs; ++n) halves[n] = round_to_bf16(values[n]);
    } else {
        for (int n = 0; n < kBlockOutputs; ++n) halves[n] = round_to_fp16(values[n]);
    }
    memcpy(static_cast<uint16_t*>(linear.out) + at, halves, count * sizeof *halves);
}

// Rows row .. row+rows-1 of a block of outputs, from their sums.
void finish_block(
    const PackedFp8Linear& linear, int64_t block, const float* sums, int64_t row, int64_t rows) {
    const int64_t output = block * kBlockOutputs, count = smaller(kBlockOutputs, linear.N - output);
    float scales[kBlockOutputs] = {}, bias[kBlockOutputs] = {};
    if (linear.one_scale || linear.scale_columns > 0) {
        for (int64_t n = 0; n < count; ++n) scales[n] = linear.one_scale ? *linear.weight_scale : 1;
    } else {
        memcpy(scales, linear.weight_scale + output, count * sizeof *scales);
    }
    if (linear.bias != nullptr) widen(linear.bias, linear.bias_dtype, output, count, bias);
    for (int64_t r = 0; r < rows; ++r) {
        finish_row(linear, sums + r * kBlockOutputs, row + r, scales, bias, output, count);
    }
}

}  // namespace

int64_t activation_row_bytes(int64_t H) { return unit_stride(H) * sizeof(Unit); }

void expand_activations(const PackedFp8Linear& linear, int64_t first, int64_t last) {
    Unit* units = static_cast<Unit*>(linear.activations);
    const int64_t stride = unit_stride(linear.H);
    for (int64_t row = first; row < last; ++row) {
        expand_row(linear.packed + row * linear.packed_stride, linear.H, units + row * stride);
    }
}

void multiply_items(const PackedFp8Linear& linear, int64_t first, int64_t last) {
    alignas(64) float sums[kGroupRows * kBlockOutputs];
    for (int64_t item = first; item < last; ++item) {
        const int64_t block = item / linear.groups, group = item % linear.groups;
        const int64_t row = linear.T * group / linear.groups, end = linear.T * (group + 1) / linear.groups;
        const Unit* units = static_cast<const Unit*>(linear.activations) + row * unit_stride(linear.H);
        sum_block(linear, block, units, end - row, sums);
        finish_block(linear, block, sums, row, end - row);
    }
}

}  // namespace RMSQ_ISA
}  // namespace rmsq
