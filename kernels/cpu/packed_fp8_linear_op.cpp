// torch.ops.neuron_rmsq.prepack_fp8_weight.cpu and packed_fp8_linear.cpu: checks, memory, threads.
#include "packed_fp8_linear.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "quantize_op.h"

namespace {

using rmsq::ceil_div;
using rmsq::kBlockOutputs;
using rmsq::kPairCodes;
using rmsq::OptionalTensor;
using rmsq::PackedFp8Linear;
using rmsq::raise_value_error;
using rmsq::scalar_type;
using rmsq::ScalarType;
using rmsq::shape_text;
using rmsq::Tensor;

// Bound of the scratch memory, or one row where that is more: further rows take another pass over the weight.
constexpr int64_t kScratchBytes = 8 << 20;

// Work that is worth a thread: a few microseconds of multiply-accumulates. Codes to convert: so many that the
// call is long enough not to feel a second start of the threads.
constexpr int64_t kThreadProducts = 1 << 18;
constexpr int64_t kThreadCodes = 1 << 20;

// A group of rows is multiplied by all blocks of the weight before the next one, so its activations should
// stay in the second-level cache: as many rows as take so many bytes, but so many that reading the weight for
// them costs little beside multiplying it.
constexpr int64_t kGroupBytes = 384 << 10;
constexpr int64_t kLeastGroupRows = 60;
// A thread should have so many items where there are rows enough: then all end at about one time.
constexpr int64_t kThreadItems = 4;

int64_t count_groups(int64_t T, int64_t blocks, int64_t row_bytes) {
    const int64_t rows = std::clamp(kGroupBytes / row_bytes, kLeastGroupRows, rmsq::kGroupRows);
    const int64_t wanted = ceil_div(kThreadItems * static_cast<int64_t>(rmsq::get_num_threads()), blocks);
    return std::max(ceil_div(T, rows), std::min(wanted, ceil_div(T, kLeastGroupRows)));
}

// One layout for all kinds of scale.
Tensor prepack_fp8_weight(const Tensor& weight, bool /*blocks*/) {
    if (scalar_type(weight) != ScalarType::Byte) raise_value_error("weight: expected dtype torch.uint8");
    if (weight.dim() != 2 || weight.size(0) == 0 || weight.size(1) == 0) {
        raise_value_error("weight: expected shape [N, H], got ", shape_text(weight));
    }
    const int64_t N = weight.size(0), H = weight.size(1);
    const int64_t blocks = ceil_div(N, kBlockOutputs), pairs = ceil_div(H, 2);
    const int64_t block_bytes = pairs * kPairCodes;
    const int64_t sizes[] = {blocks, pairs, kPairCodes};
    Tensor prepacked = rmsq::empty(sizes, 3, ScalarType::Byte);

    const auto* from = static_cast<const uint8_t*>(weight.data_ptr());
    auto* to = static_cast<uint8_t*>(prepacked.data_ptr());
    const int64_t step_n = weight.stride(0), step_h = weight.stride(1);
    rmsq::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
        std::memset(to + first * block_bytes, 0, (last - first) * block_bytes);
        for (int64_t n = first * kBlockOutputs; n < std::min(last * kBlockOutputs, N); ++n) {
            uint8_t* row = to + n / kBlockOutputs * block_bytes + n % kBlockOutputs * 2;
            for (int64_t h = 0; h < H; ++h) row[h / 2 * kPairCodes + h % 2] = from[n * step_n + h * step_h];
        }
    });
    return prepacked;
}

// Check the arguments; returns the sizes and dtypes that follow from them.
PackedFp8Linear check(
    const Tensor& packed, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
    const OptionalTensor& static_scale, int64_t N, ScalarType out_dtype) {
    if (scalar_type(packed) != ScalarType::Byte) raise_value_error("packed: expected dtype torch.uint8");
    const int64_t rank = packed.dim(), tail = static_scale ? 0 : rmsq::kScaleBytes;
    if (rank < 1 || packed.size(rank - 1) <= tail) {
        raise_value_error(
            "packed: expected shape [..., H", static_scale ? "" : " + 4", "] with H >= 1, got ",
            shape_text(packed));
    }
    if (N < 1) raise_value_error("out_features: expected at least 1, got ", N);
    PackedFp8Linear linear = {};
    linear.static_scale = rmsq::check_static_scale(static_scale);
    linear.H = packed.size(rank - 1) - tail;
    linear.N = N;
    linear.blocks = ceil_div(N, kBlockOutputs);
    linear.pairs = ceil_div(linear.H, 2);
    if (scalar_type(weight) != ScalarType::Byte || weight.dim() != 3 || weight.size(0) != linear.blocks ||
        weight.size(1) != linear.pairs || weight.size(2) != kPairCodes || !weight.is_contiguous()) {
        raise_value_error(
            "weight: expected what prepack_fp8_weight returns for [", N, ", ", linear.H,
            "], contiguous uint8 [", linear.blocks, ", ", linear.pairs, ", ", kPairCodes, "], got shape ",
            shape_text(weight));
    }
    const int64_t scale_rows = ceil_div(N, rmsq::kScaledFeatures);
    const int64_t scale_columns = ceil_div(linear.H, rmsq::kScaledFeatures);
    const int64_t scale_rank = weight_scale.dim(), scales = scale_rank > 0 ? weight_scale.size(0) : 0;
    const bool of_outputs = scale_rank == 1 && (scales == N || scales == 1);
    const bool of_blocks = scale_rank == 2 && scales == scale_rows && weight_scale.size(1) == scale_columns;
    if (scalar_type(weight_scale) != ScalarType::Float || !(of_outputs || of_blocks)) {
        raise_value_error(
            "weight_scale: expected shape [", N, "], [1] or (blocks of 128 x 128) [", scale_rows, ", ",
            scale_columns, "] of torch.float32, got shape ", shape_text(weight_scale));
    }
    linear.one_scale = of_outputs && scales == 1;
    linear.scale_columns = of_blocks ? scale_columns : 0;
    const auto rounded_to = rmsq::to_dtype(out_dtype);
    if (!rounded_to) raise_value_error("out_dtype: expected torch.bfloat16, torch.float16 or torch.float32");
    linear.out_dtype = *rounded_to;
    if (bias) {
        const auto dtype = rmsq::to_dtype(scalar_type(*bias));
        if (!dtype || bias->dim() != 1 || bias->size(0) != N) {
            raise_value_error(
                "bias: expected shape [", N, "] of bf16, fp16 or fp32, got shape ", shape_text(*bias));
        }
        linear.bias_dtype = *dtype;
    }
    return linear;
}

// Memory for the activations of as many of T rows as are multiplied in one pass, equally many in each.
struct Scratch {
    int64_t passes;
    std::unique_ptr<void, decltype(&std::free)> memory;

    Scratch(int64_t T, int64_t row_bytes)
        : passes(ceil_div(T, std::max<int64_t>(1, kScratchBytes / row_bytes))),
          memory(std::aligned_alloc(64, ceil_div(T, passes) * row_bytes), &std::free) {
        if (!memory) throw std::bad_alloc();
    }
};

// Multiply the rows of `linear`: expand them, then share out its blocks and groups among threads.
void multiply(const PackedFp8Linear& linear) {
    const auto expand = RMSQ_KERNEL(expand_activations);
    rmsq::parallel_for(0, linear.T, ceil_div(kThreadCodes, linear.H), [&](int64_t first, int64_t last) {
        expand(linear, first, last);
    });
    const auto multiply_items = RMSQ_KERNEL(multiply_items);
    const int64_t item_products = ceil_div(linear.T, linear.groups) * linear.pairs * kPairCodes;
    const int64_t grain = ceil_div(kThreadProducts, item_products);
    rmsq::parallel_for(0, linear.blocks * linear.groups, grain, [&](int64_t first, int64_t last) {
        multiply_items(linear, first, last);
    });
}

Tensor packed_fp8_linear(
    const Tensor& packed, const Tensor& weight, const Tensor& weight_scale, OptionalTensor bias,
    OptionalTensor static_scale, int64_t N, ScalarType out_dtype) {
    PackedFp8Linear linear = check(packed, weight, weight_scale, bias, static_scale, N, out_dtype);
    std::vector<int64_t> sizes(packed.sizes().begin(), packed.sizes().end());
    const int64_t T = packed.numel() / sizes.back();
    sizes.back() = N;
    Tensor out = rmsq::empty(sizes.data(), static_cast<int64_t>(sizes.size()), out_dtype);
    if (T == 0) return out;

    const rmsq::Rows rows = rmsq::to_rows(packed);
    const Tensor scale =
        weight_scale.is_contiguous() ? weight_scale : torch::stable::contiguous(weight_scale);
    if (bias && !bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    const int64_t row_bytes = RMSQ_KERNEL(activation_row_bytes)(linear.H);
    const Scratch scratch(T, row_bytes);
    linear.packed_stride = rows.stride;
    linear.weight = static_cast<const uint8_t*>(weight.data_ptr());
    linear.weight_scale = static_cast<const float*>(scale.data_ptr());
    linear.bias = bias ? bias->data_ptr() : nullptr;
    linear.activations = scratch.memory.get();
    for (int64_t pass = 0; pass < scratch.passes; ++pass) {
        const int64_t first = T * pass / scratch.passes, last = T * (pass + 1) / scratch.passes;
        linear.T = last - first;
        linear.groups = count_groups(linear.T, linear.blocks, row_bytes);
        linear.packed = reinterpret_cast<const uint8_t*>(rows.data) + first * rows.stride;
        linear.out =
            static_cast<char*>(out.data_ptr()) + first * N * static_cast<int64_t>(out.element_size());
        multiply(linear);
    }
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(neuron_rmsq, CPU, m) {
    m.impl("prepack_fp8_weight.cpu", TORCH_BOX(&prepack_fp8_weight));
    m.impl("packed_fp8_linear.cpu", TORCH_BOX(&packed_fp8_linear));
}

}  // namespace
