// What the op hands to the kernel: arguments it has checked.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "isa.h"

namespace rmsq {

// T rows of I elements of gate, then I of up; strides in bytes, 1 element within a row, no alignment.
struct SiluMulQuant {
    int64_t I;
    Dtype dtype;
    const char* gate_up;  // [T, 2I]
    int64_t gate_up_stride;
    uint8_t* out;  // [T, I + 4], or [T, I] when static, contiguous
    float fp8_max;
    float static_scale;  // 0: each row gets its own
};

}  // namespace rmsq

// Activate, quantize and pack rows begin .. end-1; `scratch`, I fp32 elements rounded up to a multiple of 32,
// is this call's alone. Returns how many of the rows are invalid.
RMSQ_DECLARE_KERNEL(
    int64_t silu_mul_quant_rows(const SiluMulQuant& work, int64_t begin, int64_t end, float* scratch))
