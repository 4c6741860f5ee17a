// What the ops that make packed rows share: checks of the arguments they have in common, memory for their
// outputs, threads. Not for kernel sources.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "counts.h"
#include "large_blocks.h"
#include "torch_op.h"

namespace rmsq {

inline void check_fp8_max(double fp8_max) {
    if (fp8_max != 240 && fp8_max != 448) raise_value_error("fp8_max: expected 240 or 448, got ", fp8_max);
}

// The given scale, or 0 where none is.
inline float check_static_scale(const OptionalTensor& static_scale) {
    if (!static_scale) return 0;
    if (static_scale->numel() != 1 || scalar_type(*static_scale) != ScalarType::Float) {
        raise_value_error(
            "static_scale: expected one torch.float32 element, got shape ", shape_text(*static_scale));
    }
    const float scale = *static_cast<const float*>(static_scale->data_ptr());
    if (!(scale > 0) || std::isinf(scale)) {
        raise_value_error("static_scale: expected a finite number > 0, got ", scale);
    }
    return scale;
}

struct FreeMemory {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], FreeMemory>;

// Memory for n fp32 elements rounded up to whole pairs, on a cache line's boundary.
inline Buffer make_buffer(int64_t n) {
    const size_t bytes = static_cast<size_t>(ceil_div(n, kPair) * kPair) * sizeof(float);
    Buffer buffer(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!buffer) throw std::bad_alloc();
    return buffer;
}

// A new contiguous CPU tensor, uninitialized.
inline Tensor new_output(const std::vector<int64_t>& sizes, ScalarType type, int64_t element_size) {
    const int64_t dim = static_cast<int64_t>(sizes.size());
    int64_t bytes = element_size;
    for (const int64_t size : sizes) bytes *= size;
    if (bytes < LargeBlocks::kFrom) return empty(sizes.data(), dim, type);
    return torch::stable::from_blob(
        LargeBlocks::instance().take(bytes), sizes, contiguous_strides(sizes.data(), dim),
        torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
        [bytes](void* memory) { LargeBlocks::instance().give_back(memory, bytes); });
}

// Call kernel(work, begin, end, scratch) for shares of T rows, `scratch` being n fp32 elements of the share's
// own and `grain` the least number of rows that is worth a thread. What it returns are invalid rows, counted.
template <class Kernel, class Work>
void share_rows(Kernel kernel, const Work& work, int64_t T, int64_t n, int64_t grain) {
    const auto share = [&](int64_t begin, int64_t end) {
        const int64_t invalid = kernel(work, begin, end, make_buffer(n).get());
        if (invalid) counts().invalid.fetch_add(invalid, std::memory_order_relaxed);
    };
    if (T <= grain) {
        share(0, T);
    } else {
        parallel_for(0, T, grain, share);
    }
    counts().rows.fetch_add(T, std::memory_order_relaxed);
}

}  // namespace rmsq
