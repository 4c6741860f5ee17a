// The torch ops over the kernels of packed_fp8_linear.cpp: checks, memory, threads.
#include "packed_fp8_linear.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>

#include "torch_op.h"

namespace {

using rmsq::kBlockOutputs;
using rmsq::raise_value_error;
using rmsq::ScalarType;
using rmsq::shape_text;
using rmsq::Tensor;

constexpr int64_t kScaleBytes = 4;

// Bound of the scratch memory, or one row where that is more: further rows take another pass over the weight.
constexpr int64_t kScratchBytes = 8 << 20;

// Work that is worth a thread: a few microseconds of multiply-accumulates. Codes to convert: so many that the
// call is long enough not to feel a second start of the threads.
constexpr int64_t kThreadProducts = 1 << 18;
constexpr int64_t kThreadCodes = 1 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes between rows when all leading dimensions can be walked with one stride; nullopt when they cannot.
std::optional<int64_t> row_stride(const Tensor& packed) {
    const int64_t last = packed.dim() - 1;
    if (packed.stride(last) != 1) return std::nullopt;
    std::optional<int64_t> stride;
    int64_t rows = 1;
    for (int64_t d = last - 1; d >= 0; --d) {
        if (packed.size(d) == 1) continue;
        if (!stride) {
            stride = packed.stride(d);
        } else if (packed.stride(d) != *stride * rows) {
            return std::nullopt;
        }
        rows *= packed.size(d);
    }
    return stride.value_or(packed.size(last));
}

std::optional<rmsq::FloatType> float_type(ScalarType type) {
    switch (type) {
        case ScalarType::Float: return rmsq::FloatType::fp32;
        case ScalarType::BFloat16: return rmsq::FloatType::bf16;
        case ScalarType::Half: return rmsq::FloatType::fp16;
        default: return std::nullopt;
    }
}

Tensor prepack_fp8_weight(const Tensor& weight) {
    if (weight.scalar_type() != ScalarType::Byte) raise_value_error("weight: expected dtype torch.uint8");
    if (weight.dim() != 2 || weight.size(0) == 0 || weight.size(1) == 0) {
        raise_value_error("weight: expected shape [N, H], got ", shape_text(weight));
    }
    const int64_t outputs = weight.size(0), hidden = weight.size(1);
    const int64_t pairs = ceil_div(hidden, 2), pair_bytes = 2 * kBlockOutputs;
    const int64_t sizes[] = {ceil_div(outputs, kBlockOutputs), pairs, pair_bytes};
    Tensor prepacked = rmsq::empty(sizes, 3, aoti_torch_dtype_uint8());

    const auto* from = static_cast<const uint8_t*>(weight.data_ptr());
    auto* to = static_cast<uint8_t*>(prepacked.data_ptr());
    const int64_t step_n = weight.stride(0), step_h = weight.stride(1);
    rmsq::parallel_for(0, sizes[0], 1, [&](int64_t first, int64_t last) {
        std::memset(to + first * pairs * pair_bytes, 0, (last - first) * pairs * pair_bytes);
        for (int64_t n = first * kBlockOutputs; n < std::min(last * kBlockOutputs, outputs); ++n) {
            uint8_t* row = to + n / kBlockOutputs * pairs * pair_bytes + n % kBlockOutputs * 2;
            for (int64_t h = 0; h < hidden; ++h) {
                row[h / 2 * pair_bytes + h % 2] = from[n * step_n + h * step_h];
            }
        }
    });
    return prepacked;
}

Tensor packed_fp8_linear(
    Tensor packed, const Tensor& weight, Tensor weight_scale, std::optional<Tensor> bias, int64_t outputs,
    ScalarType out_dtype) {
    if (packed.scalar_type() != ScalarType::Byte) raise_value_error("packed: expected dtype torch.uint8");
    const int64_t rank = packed.dim();
    if (rank < 1 || packed.size(rank - 1) <= kScaleBytes) {
        raise_value_error("packed: expected shape [..., H + 4] with H >= 1, got ", shape_text(packed));
    }
    if (outputs < 1) raise_value_error("out_features: expected at least 1, got ", outputs);
    const int64_t hidden = packed.size(rank - 1) - kScaleBytes;
    const int64_t blocks = ceil_div(outputs, kBlockOutputs), pairs = ceil_div(hidden, 2);
    if (weight.scalar_type() != ScalarType::Byte || weight.dim() != 3 || weight.size(0) != blocks ||
        weight.size(1) != pairs || weight.size(2) != 2 * kBlockOutputs || !weight.is_contiguous()) {
        raise_value_error(
            "weight: expected what prepack_fp8_weight returns for [", outputs, ", ", hidden,
            "], contiguous uint8 [", blocks, ", ", pairs, ", ", 2 * kBlockOutputs, "], got shape ",
            shape_text(weight));
    }
    if (weight_scale.scalar_type() != ScalarType::Float || weight_scale.dim() != 1 ||
        (weight_scale.size(0) != outputs && weight_scale.size(0) != 1)) {
        raise_value_error(
            "weight_scale: expected shape [", outputs, "] or [1] of torch.float32, got shape ",
            shape_text(weight_scale));
    }
    const std::optional<rmsq::FloatType> out_type = float_type(out_dtype);
    if (!out_type) raise_value_error("out_dtype: expected torch.bfloat16, torch.float16 or torch.float32");
    std::optional<rmsq::FloatType> bias_type;
    if (bias) {
        bias_type = float_type(bias->scalar_type());
        if (!bias_type || bias->dim() != 1 || bias->size(0) != outputs) {
            raise_value_error(
                "bias: expected shape [", outputs, "] of bf16, fp16 or fp32, got shape ", shape_text(*bias));
        }
        if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    }
    if (!weight_scale.is_contiguous()) weight_scale = torch::stable::contiguous(weight_scale);
    std::optional<int64_t> stride = row_stride(packed);
    if (!stride) {
        packed = torch::stable::contiguous(packed);
        stride = packed.size(rank - 1);
    }

    std::vector<int64_t> sizes(packed.sizes().begin(), packed.sizes().end());
    sizes.back() = outputs;
    Tensor out = rmsq::empty(sizes.data(), rank, static_cast<int32_t>(out_dtype));
    const int64_t total = packed.numel() / packed.size(rank - 1);
    if (total == 0) return out;

    rmsq::PackedLinear linear = {};
    linear.row_stride = *stride;
    linear.hidden = hidden;
    linear.weight = static_cast<const uint8_t*>(weight.data_ptr());
    linear.outputs = outputs;
    linear.weight_scale = static_cast<const float*>(weight_scale.data_ptr());
    linear.one_scale = weight_scale.size(0) == 1;
    linear.bias = bias ? bias->data_ptr() : nullptr;
    linear.bias_type = bias_type.value_or(rmsq::FloatType::fp32);
    linear.out_type = *out_type;
    linear.blocks = blocks;
    linear.pairs = pairs;
    const int64_t row_bytes = RMSQ_KERNEL(activation_row_bytes)(hidden);
    const int64_t passes = ceil_div(total, std::max<int64_t>(1, kScratchBytes / row_bytes));
    const std::unique_ptr<void, decltype(&std::free)> scratch(
        std::aligned_alloc(64, ceil_div(total, passes) * row_bytes), &std::free);
    if (!scratch) throw std::bad_alloc();
    linear.activations = scratch.get();

    const auto expand = RMSQ_KERNEL(expand_activations);
    const auto multiply = RMSQ_KERNEL(packed_fp8_linear_items);
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t row = total * pass / passes;
        linear.rows = total * (pass + 1) / passes - row;
        linear.groups = ceil_div(linear.rows, rmsq::kGroupRows);
        linear.packed = static_cast<const uint8_t*>(packed.data_ptr()) + row * *stride;
        linear.out = static_cast<char*>(out.data_ptr()) + row * outputs * out.element_size();
        rmsq::parallel_for(0, linear.rows, ceil_div(kThreadCodes, hidden), [&](int64_t first, int64_t last) {
            expand(linear, first, last);
        });
        const int64_t item_products = ceil_div(linear.rows, linear.groups) * pairs * 2 * kBlockOutputs;
        const int64_t grain = ceil_div(kThreadProducts, item_products);
        rmsq::parallel_for(0, blocks * linear.groups, grain, [&](int64_t first, int64_t last) {
            multiply(linear, first, last);
        });
    }
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(neuron_rmsq, CPU, m) {
    m.impl("prepack_fp8_weight.cpu", TORCH_BOX(&prepack_fp8_weight));
    m.impl("packed_fp8_linear.cpu", TORCH_BOX(&packed_fp8_linear));
}

}  // namespace
