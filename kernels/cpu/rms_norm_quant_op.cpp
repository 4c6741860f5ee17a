// torch.ops.neuron_rmsq.rms_norm_quant.cpu and add_rms_norm_quant.cpu: checks, memory, threads.
#include "rms_norm_quant.h"

#include <tuple>

#include "quantize_op.h"

namespace {

using rmsq::Buffer;
using rmsq::check_dtype;
using rmsq::Dtype;
using rmsq::kPair;
using rmsq::OptionalTensor;
using rmsq::raise_value_error;
using rmsq::Rows;
using rmsq::scalar_type;
using rmsq::ScalarType;
using rmsq::shape_text;
using rmsq::Tensor;

// Rows are shared out among threads in pieces of at least this many elements: a piece takes a few
// microseconds, about what waking a thread costs.
constexpr int64_t kElementsPerTask = 1 << 15;

void check_number(const char* name, double number) {
    if (!(number >= 0) || std::isinf(number)) {
        raise_value_error(name, ": expected a finite number >= 0, got ", number);
    }
}

// Check everything that both ops take; returns the work with its numbers, all but the addresses.
rmsq::RmsNormQuant check(
    const Tensor& hidden, const OptionalTensor& weight, double eps, const Tensor* residual,
    double lower_bound, const OptionalTensor& static_scale, double fp8_max) {
    const auto sizes = hidden.sizes();
    if (sizes.size() < 2 || sizes.back() < 1) {
        raise_value_error("hidden: expected rank >= 2 and H >= 1, got shape ", shape_text(hidden));
    }
    rmsq::RmsNormQuant work{};
    work.dtype = check_dtype("hidden", scalar_type(hidden));
    work.H = sizes.back();
    if (residual) {
        if (!residual->sizes().equals(sizes)) {
            raise_value_error(
                "residual: expected shape ", shape_text(hidden), " (hidden's), got ", shape_text(*residual));
        }
        if (scalar_type(*residual) != scalar_type(hidden)) {
            raise_value_error("residual: expected hidden's dtype");
        }
    }
    if (weight) {
        check_dtype("weight", scalar_type(*weight));
        if (weight->dim() != 1 || weight->size(0) != work.H) {
            raise_value_error(
                "weight: expected shape [", work.H, "] (H of hidden), got ", shape_text(*weight));
        }
    }
    check_number("eps", eps);
    check_number("lower_bound", lower_bound);
    rmsq::check_fp8_max(fp8_max);
    work.static_scale = rmsq::check_static_scale(static_scale);
    work.eps = static_cast<float>(eps);
    work.lower_bound = static_cast<float>(lower_bound);
    work.fp8_max = static_cast<float>(fp8_max);
    return work;
}

// The weight as the kernel reads it, and what keeps its memory alive.
struct WeightMemory {
    std::optional<Rows> row;
    Buffer lanes;
};

// A weight of hidden's dtype is read as it is; another's is put into fp32, in the order of hidden's lanes
// (lanes.h).
WeightMemory place_weight(const OptionalTensor& weight, rmsq::RmsNormQuant& work) {
    WeightMemory memory;
    if (!weight) return memory;
    memory.row = rmsq::to_rows(*weight);
    const Dtype dtype = check_dtype("weight", scalar_type(*weight));
    if (dtype == work.dtype) {
        work.weight = memory.row->data;
        return memory;
    }
    memory.lanes = rmsq::make_buffer(work.H);
    for (int64_t start = 0; start < work.H; start += kPair) {
        float elements[kPair] = {};
        rmsq::widen(memory.row->data, dtype, start, std::min(kPair, work.H - start), elements);
        for (int64_t i = 0; i < kPair; ++i) {
            const int64_t lane = work.dtype == Dtype::bf16 ? i % 2 * 16 + i / 2 : i;
            memory.lanes[start + lane] = elements[i];
        }
    }
    work.lane_weight = memory.lanes.get();
    return memory;
}

Tensor run(
    const Tensor& hidden, const OptionalTensor& weight, double eps, const Tensor* residual,
    OptionalTensor* residual_out, double lower_bound, const OptionalTensor& static_scale, double fp8_max) {
    rmsq::RmsNormQuant work = check(hidden, weight, eps, residual, lower_bound, static_scale, fp8_max);
    std::vector<int64_t> sizes(hidden.sizes().begin(), hidden.sizes().end());
    if (residual) {
        *residual_out =
            rmsq::new_output(sizes, scalar_type(hidden), static_cast<int64_t>(hidden.element_size()));
        work.residual_out = static_cast<char*>((*residual_out)->data_ptr());
    }
    if (!static_scale) sizes.back() += rmsq::kScaleBytes;
    Tensor out = rmsq::new_output(sizes, ScalarType::Byte, 1);
    const int64_t T = hidden.numel() / work.H;
    if (T == 0) return out;
    work.out = static_cast<uint8_t*>(out.data_ptr());

    const Rows hidden_rows = rmsq::to_rows(hidden);
    work.hidden = hidden_rows.data;
    work.hidden_stride = hidden_rows.stride;
    std::optional<Rows> residual_rows;
    if (residual) {
        residual_rows = rmsq::to_rows(*residual);
        work.residual = residual_rows->data;
        work.residual_stride = residual_rows->stride;
    }
    const WeightMemory weight_memory = place_weight(weight, work);
    const int64_t grain = std::max<int64_t>(1, kElementsPerTask / work.H);
    rmsq::share_rows(RMSQ_KERNEL(rms_norm_quant_rows), work, T, work.H, grain);
    return out;
}

Tensor rms_norm_quant(
    const Tensor& hidden, OptionalTensor weight, double eps, double lower_bound, OptionalTensor static_scale,
    double fp8_max) {
    return run(hidden, weight, eps, nullptr, nullptr, lower_bound, static_scale, fp8_max);
}

std::tuple<Tensor, Tensor> add_rms_norm_quant(
    const Tensor& hidden, OptionalTensor weight, double eps, const Tensor& residual, double lower_bound,
    OptionalTensor static_scale, double fp8_max) {
    OptionalTensor residual_out;
    Tensor out = run(hidden, weight, eps, &residual, &residual_out, lower_bound, static_scale, fp8_max);
    return {std::move(out), *std::move(residual_out)};
}

STABLE_TORCH_LIBRARY_IMPL(neuron_rmsq, CPU, m) {
    m.impl("rms_norm_quant.cpu", TORCH_BOX(&rms_norm_quant));
    m.impl("add_rms_norm_quant.cpu", TORCH_BOX(&add_rms_norm_quant));
}

}  // namespace
