// torch.ops.neuron_rmsq.rms_norm_quant.cpu and add_rms_norm_quant.cpu: check the arguments, share out the rows.
// (torch brings only plain CPU tensors here: sparse ones, and calls with a tensor of another device, go elsewhere.)
#include "rms_norm_quant.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "large_blocks.h"
#include "torch_op.h"

namespace {

using rmsq::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows are shared out among threads in pieces of at least this many elements: a piece takes a few microseconds,
// about what waking a thread costs.
constexpr int64_t kElementsPerTask = 1 << 15;

constexpr int64_t kScaleBytes = 4;

std::optional<rmsq::Dtype> to_dtype(int32_t dtype) {
    if (dtype == aoti_torch_dtype_bfloat16()) return rmsq::Dtype::bf16;
    if (dtype == aoti_torch_dtype_float16()) return rmsq::Dtype::fp16;
    if (dtype == aoti_torch_dtype_float32()) return rmsq::Dtype::fp32;
    return std::nullopt;
}

int32_t torch_dtype(const Tensor& tensor) {
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    return dtype;
}

rmsq::Dtype check_dtype(const char* name, const Tensor& tensor) {
    const auto dtype = to_dtype(torch_dtype(tensor));
    if (!dtype) rmsq::raise_value_error(name, ": expected dtype torch.bfloat16, torch.float16 or torch.float32");
    return *dtype;
}

// A [..., H] tensor as T rows of H elements, a fixed number of bytes apart.
struct Rows {
    Tensor tensor;  // keeps the memory alive
    const char* data;
    int64_t stride;
};

// The tensor itself where its leading dimensions collapse into one, else a contiguous copy of it.
Rows to_rows(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    const int64_t dim = static_cast<int64_t>(sizes.size()), width = sizes[dim - 1];
    const int64_t bytes = static_cast<int64_t>(tensor.element_size());
    bool collapses = strides[dim - 1] == 1 || width == 1;
    int64_t rows = 1, stride = width;
    for (int64_t d = dim - 2; d >= 0 && collapses; --d) {
        if (sizes[d] == 1) continue;
        if (rows == 1) {
            stride = strides[d];
        } else {
            collapses = strides[d] == stride * rows;
        }
        rows *= sizes[d];
    }
    if (collapses) return {tensor, static_cast<const char*>(tensor.data_ptr()), stride * bytes};
    Tensor copy = torch::stable::contiguous(tensor);
    const char* data = static_cast<const char*>(copy.data_ptr());
    return {std::move(copy), data, width * bytes};
}

template <class Word> float to_float(const char* p) {
    Word word;
    std::memcpy(&word, p, sizeof word);
    return static_cast<float>(word);
}

struct FreeMemory {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], FreeMemory>;

// Memory for H fp32 elements rounded up to whole pairs of lanes, on a cache line's boundary.
Buffer make_buffer(int64_t width) {
    const size_t bytes = static_cast<size_t>((width + 31) / 32 * 32) * sizeof(float);
    Buffer buffer(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!buffer) throw std::bad_alloc();
    return buffer;
}

// A weight of another dtype than hidden's, in fp32 and in the order of hidden's lanes (lanes.h).
Buffer to_lane_order(const char* weight, rmsq::Dtype dtype, int64_t width, rmsq::Dtype hidden_dtype) {
    Buffer lanes = make_buffer(width);
    for (int64_t i = 0; i < (width + 31) / 32 * 32; ++i) {
        const int64_t j = i % 32;
        const int64_t lane = hidden_dtype == rmsq::Dtype::bf16 ? j % 2 * 16 + j / 2 : j;
        float& element = lanes[i - j + lane];
        if (i >= width) {
            element = 0;
        } else if (dtype == rmsq::Dtype::bf16) {
            element = to_float<torch::headeronly::BFloat16>(weight + 2 * i);
        } else if (dtype == rmsq::Dtype::fp16) {
            element = to_float<torch::headeronly::Half>(weight + 2 * i);
        } else {
            element = to_float<float>(weight + 4 * i);
        }
    }
    return lanes;
}

// A new contiguous CPU tensor, uninitialized.
Tensor new_output(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype, int64_t element_size) {
    const int64_t dim = static_cast<int64_t>(sizes.size());
    int64_t bytes = element_size;
    for (const int64_t size : sizes) bytes *= size;
    if (bytes < rmsq::LargeBlocks::kFrom) return rmsq::empty(sizes.data(), dim, static_cast<int32_t>(dtype));
    return torch::stable::from_blob(
        rmsq::LargeBlocks::instance().take(bytes), sizes, rmsq::contiguous_strides(sizes.data(), dim),
        torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
        [bytes](void* memory) { rmsq::LargeBlocks::instance().give_back(memory, bytes); });
}

void check_number(const char* name, double number) {
    if (!(number >= 0) || std::isinf(number)) {
        rmsq::raise_value_error(name, ": expected a finite number >= 0, got ", number);
    }
}

Tensor run(
    const Tensor& hidden, const Tensor* residual, OptionalTensor* residual_out, const OptionalTensor& weight,
    const OptionalTensor& static_scale, double eps, double lower_bound, double fp8_max) {
    const int64_t dim = hidden.dim();
    const auto sizes = hidden.sizes();
    if (dim < 2 || sizes[dim - 1] < 1) {
        rmsq::raise_value_error("hidden: expected rank >= 2 and H >= 1, got shape ", rmsq::shape_text(hidden));
    }
    rmsq::RmsNormQuant work{};
    work.dtype = check_dtype("hidden", hidden);
    work.width = sizes[dim - 1];
    if (residual) {
        if (!(residual->sizes() == sizes)) {
            rmsq::raise_value_error(
                "residual: expected shape ", rmsq::shape_text(hidden), " (hidden's), got ", rmsq::shape_text(*residual));
        }
        if (to_dtype(torch_dtype(*residual)) != work.dtype) {
            rmsq::raise_value_error("residual: expected hidden's dtype");
        }
    }
    if (weight) {
        check_dtype("weight", *weight);
        if (weight->dim() != 1 || weight->size(0) != work.width) {
            rmsq::raise_value_error(
                "weight: expected shape [", work.width, "] (H of hidden), got ", rmsq::shape_text(*weight));
        }
    }
    if (static_scale) {
        if (static_scale->numel() != 1 || torch_dtype(*static_scale) != aoti_torch_dtype_float32()) {
            rmsq::raise_value_error(
                "static_scale: expected one torch.float32 element, got shape ", rmsq::shape_text(*static_scale));
        }
        work.static_scale = *static_cast<const float*>(static_scale->data_ptr());
        if (!(work.static_scale > 0) || std::isinf(work.static_scale)) {
            rmsq::raise_value_error("static_scale: expected a finite number > 0, got ", work.static_scale);
        }
    }
    check_number("eps", eps);
    check_number("lower_bound", lower_bound);
    if (fp8_max != 240 && fp8_max != 448) rmsq::raise_value_error("fp8_max: expected 240 or 448, got ", fp8_max);
    work.eps = static_cast<float>(eps);
    work.lower_bound = static_cast<float>(lower_bound);
    work.fp8_max = static_cast<float>(fp8_max);

    std::vector<int64_t> out_sizes(sizes.begin(), sizes.end());
    if (residual) {
        *residual_out = new_output(out_sizes, hidden.scalar_type(), static_cast<int64_t>(hidden.element_size()));
        work.residual_out = static_cast<char*>((*residual_out)->data_ptr());
    }
    if (!static_scale) out_sizes.back() += kScaleBytes;
    Tensor out = new_output(out_sizes, torch::headeronly::ScalarType::Byte, 1);
    const int64_t rows = hidden.numel() / work.width;
    if (rows == 0) return out;
    work.out = static_cast<uint8_t*>(out.data_ptr());

    const Rows hidden_rows = to_rows(hidden);
    work.hidden = hidden_rows.data;
    work.hidden_stride = hidden_rows.stride;
    std::optional<Rows> residual_rows;
    if (residual) {
        residual_rows = to_rows(*residual);
        work.residual = residual_rows->data;
        work.residual_stride = residual_rows->stride;
    }
    std::optional<Rows> weight_row;
    Buffer lane_weight;
    if (weight) {
        weight_row = to_rows(*weight);
        const rmsq::Dtype dtype = check_dtype("weight", *weight);
        if (dtype == work.dtype) {
            work.weight = weight_row->data;
        } else {
            lane_weight = to_lane_order(weight_row->data, dtype, work.width, work.dtype);
            work.lane_weight = lane_weight.get();
        }
    }

    const auto kernel = RMSQ_KERNEL(rms_norm_quant_rows);
    const auto share = [&](int64_t begin, int64_t end) {
        kernel(work, begin, end, make_buffer(work.width).get());
    };
    const int64_t grain = std::max<int64_t>(1, kElementsPerTask / work.width);
    if (rows <= grain) {
        share(0, rows);
    } else {
        rmsq::parallel_for(0, rows, grain, share);
    }
    return out;
}

Tensor rms_norm_quant(
    const Tensor& hidden, OptionalTensor weight, double eps, double lower_bound, OptionalTensor static_scale,
    double fp8_max) {
    return run(hidden, nullptr, nullptr, weight, static_scale, eps, lower_bound, fp8_max);
}

std::tuple<Tensor, Tensor> add_rms_norm_quant(
    const Tensor& hidden, OptionalTensor weight, double eps, const Tensor& residual, double lower_bound,
    OptionalTensor static_scale, double fp8_max) {
    OptionalTensor residual_out;
    Tensor out = run(hidden, &residual, &residual_out, weight, static_scale, eps, lower_bound, fp8_max);
    return {std::move(out), *std::move(residual_out)};
}

STABLE_TORCH_LIBRARY_IMPL(neuron_rmsq, CPU, m) {
    m.impl("rms_norm_quant.cpu", TORCH_BOX(&rms_norm_quant));
    m.impl("add_rms_norm_quant.cpu", TORCH_BOX(&add_rms_norm_quant));
}

}  // namespace
