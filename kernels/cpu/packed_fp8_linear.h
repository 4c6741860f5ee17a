// Packed FP8 rows times an FP8 weight: the pieces that are compiled for each instruction-set level.
//
// Dimensions:
//     T: rows (tokens)
//     H: input features, the contraction dimension; a "pair" is two neighbours along it, an odd H is padded
//     N: output features, in blocks of 32, the last padded with zeros
//
// Prepacked weight, uint8 [ceil(N/32), ceil(H/2), 64]: byte (n % 32) * 2 + h % 2 of [n / 32, h / 2] is
// weight[n, h]. Whoever computes a block of outputs reads its bytes once, in order, and finds a pair where
// vdpbf16ps wants it.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace rmsq {

constexpr int64_t kBlockOutputs = 32;
constexpr int64_t kPairCodes = 2 * kBlockOutputs;  // of a pair, in a block
constexpr int64_t kScaledFeatures = 128;           // side of a block of the weight with a scale of its own
constexpr int64_t kScaledPairs = kScaledFeatures / 2;

// How far ahead of its use the weight is asked for, into the second-level cache: far enough for memory, near
// enough to be there still. (The processor itself fetches from there to the first level.)
constexpr int64_t kPrefetchBytes = 8192;

// One thread takes at most this many rows of a block at a time.
constexpr int64_t kGroupRows = 240;

struct PackedFp8Linear {
    const uint8_t* packed;  // [T, H + 4]: codes, then the row's scale, at any alignment; or [T, H] codes
    int64_t packed_stride;  // bytes
    float static_scale;     // of every row, or 0 where each has its own
    int64_t T, H, N;
    int64_t blocks;             // ceil(N / kBlockOutputs)
    int64_t pairs;              // ceil(H / 2)
    int64_t groups;             // of rows, of at most kGroupRows each
    const uint8_t* weight;      // prepacked
    const float* weight_scale;  // [N], [1], or [ceil(N / 128), scale_columns]
    bool one_scale;
    int64_t scale_columns;  // ceil(H / 128) where blocks have scales, else 0
    const void* bias;       // [N] of bias_dtype, or null
    Dtype bias_dtype;
    void* out;  // [T, N] of out_dtype, contiguous
    Dtype out_dtype;
    void* activations;  // scratch of T * activation_row_bytes(H), aligned to 64, for expand_activations
};

}  // namespace rmsq

// Bytes of scratch that one row of activations takes.
RMSQ_DECLARE_KERNEL(int64_t activation_row_bytes(int64_t H))

// Convert the codes of rows [first, last) into `activations`.
RMSQ_DECLARE_KERNEL(void expand_activations(const PackedFp8Linear& linear, int64_t first, int64_t last))

// Compute items [first, last) of groups * blocks: item i is block i % blocks of the rows of group i / blocks.
//
//     out[t, n] = round(Σ_h value(packed[t, h]) * value(weight[n, h]) * scale[t] * weight_scale[n] + bias[n])
//
// The sum is one fp32 accumulator that takes the pairs in ascending order and the second of a pair first, as
// vdpbf16ps does; products of two FP8 values are exact in fp32. Where blocks have scales there is such a sum
// for each 128 of H, and another accumulator takes their products with the scales, each rounded, in ascending
// order. So a row gives the same bits in any batch, on any thread and at every level.
RMSQ_DECLARE_KERNEL(void multiply_items(const PackedFp8Linear& linear, int64_t first, int64_t last))
