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
    const float* scales, bool fresh) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return tile_of<kRows - 1>(rows, weight, pairs, units, stride, sums, scales, fresh);
    }
    tile<kRows>(weight, pairs, units, stride, sums, scales, fresh);
}

// What turns sums into outputs, for a block of them.
struct Finish {
    int64_t output, count;  // the block's first output, and how many there are: fewer in the last block
    float scales[kBlockOutputs] = {}, bias[kBlockOutputs] = {};

    Finish(const PackedFp8Linear& linear, int64_t block)
        : output(block * kBlockOutputs), count(smaller(kBlockOutputs, linear.N - output)) {
        if (linear.one_scale || linear.scale_columns > 0) {
            for (int64_t n = 0; n < count; ++n) scales[n] = linear.one_scale ? *linear.weight_scale : 1;
        } else {
            memcpy(scales, linear.weight_scale + output, count * sizeof *scales);
        }
        if (linear.bias != nullptr) widen(linear.bias, linear.bias_dtype, output, count, bias);
    }
};

// Write the outputs of a row. Most blocks are whole: a copy of a known size takes one instruction.
template <class Output>
void write(const PackedFp8Linear& linear, const Finish& finish, int64_t row, const Output* outputs) {
    Output* to = static_cast<Output*>(linear.out) + row * linear.N + finish.output;
    if (finish.count == kBlockOutputs) {
        memcpy(to, outputs, kBlockOutputs * sizeof *outputs);
    } else {
        memcpy(to, outputs, finish.count * sizeof *outputs);
    }
}

// Scale, shift and round one row of a block, and write as many outputs as there are.
void finish_row(const PackedFp8Linear& linear, const Finish& finish, const float* sums, int64_t row) {
    float row_scale = linear.static_scale;
    if (row_scale == 0) {
        memcpy(&row_scale, linear.packed + row * linear.packed_stride + linear.H, sizeof row_scale);
    }
    float values[kBlockOutputs];
    for (int n = 0; n < kBlockOutputs; ++n) values[n] = sums[n] * row_scale * finish.scales[n];
    if (linear.bias != nullptr) {
        for (int n = 0; n < kBlockOutputs; ++n) values[n] += finish.bias[n];
    }
    if (linear.out_dtype == Dtype::fp32) return write(linear, finish, row, values);
    uint16_t halves[kBlockOutputs];
    if (linear.out_dtype == Dtype::bf16) {
        for (int n = 0; n < kBlockOutputs; ++n) halves[n] = round_to_bf16(values[n]);
    } else {
        for (int n = 0; n < kBlockOutputs; ++n) halves[n] = round_to_fp16(values[n]);
    }
    write(linear, finish, row, halves);
}

// Multiply rows [row, end) by a block of outputs.
void multiply_block(const PackedFp8Linear& linear, int64_t block, int64_t row, int64_t end) {
    alignas(64) float sums[kGroupRows * kBlockOutputs];
    alignas(64) Staged buffer[kStageBuffer + 1];
    const int64_t pairs = linear.pairs, stride = unit_stride(linear.H), rows = end - row;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const Unit* units = static_cast<const Unit*>(linear.activations) + row * stride;
    const uint8_t* codes = linear.weight + block * pairs * kPairCodes;
    const int64_t scale_row = block * kBlockOutputs / kScaledFeatures * linear.scale_columns;
    for (int64_t p = 0; p < pairs; p += kChunkPairs) {
        const int64_t chunk = smaller(kChunkPairs, pairs - p);
        const Staged* staged = stage(codes + p * kPairCodes, chunk, buffer);
        const float* scales = nullptr;
        if (linear.scale_columns > 0) scales = linear.weight_scale + scale_row + p / kScaledPairs;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = rows * t / tiles, last = rows * (t + 1) / tiles;
            const Unit* tile_units = units + first * stride + p * kUnitsPerPair;
            float* tile_sums = sums + first * kBlockOutputs;
            tile_of<kTileRows>(last - first, staged, chunk, tile_units, stride, tile_sums, scales, p == 0);
        }
    }
    const Finish finish(linear, block);
    for (int64_t r = 0; r < rows; ++r) finish_row(linear, finish, sums + r * kBlockOutputs, row + r);
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
    for (int64_t item = first; item < last; ++item) {
        const int64_t group = item / linear.blocks, block = item % linear.blocks;
        const int64_t row = linear.T * group / linear.groups, end = linear.T * (group + 1) / linear.groups;
        multiply_block(linear, block, row, end);
    }
}

}  // namespace RMSQ_ISA
}  // namespace rmsq
