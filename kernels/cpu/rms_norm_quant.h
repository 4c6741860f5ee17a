// What the op hands to the kernel: arguments it has checked.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace rmsq {

// T rows of H elements; strides in bytes, 1 element within a row, no alignment.
struct RmsNormQuant {
    int64_t H;
    Dtype dtype;         // of hidden, residual and residual_out
    const char* hidden;  // [T, H]
    int64_t hidden_stride;
    const char* residual;  // [T, H] or null
    int64_t residual_stride;
    const char* weight;  // [H] of `dtype`, or null
    const float*
        lane_weight;     // or: the weight in the order of lanes.h, zeros up to a multiple of 32; else null
    char* residual_out;  // [T, H] contiguous, or null
    uint8_t* out;        // [T, H + 4], or [T, H] when static, contiguous
    float eps, lower_bound, fp8_max;
    float static_scale;  // 0: each row gets its own
};

}  // namespace rmsq

// Normalize, quantize and pack rows begin .. end-1; `scratch`, H fp32 elements rounded up to a multiple of
// 32, is this call's alone. Returns how many of the rows are invalid.
RMSQ_DECLARE_KERNEL(
    int64_t rms_norm_quant_rows(const RmsNormQuant& work, int64_t begin, int64_t end, float* scratch))
