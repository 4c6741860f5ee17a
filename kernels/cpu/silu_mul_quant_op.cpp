// torch.ops.neuron_rmsq.silu_mul_quant.cpu: checks, memory, threads.
#include "silu_mul_quant.h"

#include "quantize_op.h"

namespace {

using rmsq::OptionalTensor;
using rmsq::Tensor;

// Rows are shared out among threads in pieces of at least this many elements: a piece takes a few
// microseconds, about what waking a thread costs.
constexpr int64_t kElementsPerTask = 1 << 14;

// Check the arguments; returns the work with its numbers, all but the addresses.
rmsq::SiluMulQuant check(const Tensor& gate_up, const OptionalTensor& static_scale, double fp8_max) {
    const auto sizes = gate_up.sizes();
    if (sizes.size() < 2 || sizes.back() < 2 || sizes.back() % 2) {
        rmsq::raise_value_error(
            "gate_up: expected rank >= 2 and an even last dimension, got shape ", rmsq::shape_text(gate_up));
    }
    rmsq::SiluMulQuant work{};
    work.I = sizes.back() / 2;
    work.dtype = rmsq::check_dtype("gate_up", rmsq::scalar_type(gate_up));
    work.static_scale = rmsq::check_static_scale(static_scale);
    rmsq::check_fp8_max(fp8_max);
    work.fp8_max = static_cast<float>(fp8_max);
    return work;
}

Tensor silu_mul_quant(const Tensor& gate_up, OptionalTensor static_scale, double fp8_max) {
    rmsq::SiluMulQuant work = check(gate_up, static_scale, fp8_max);
    std::vector<int64_t> sizes(gate_up.sizes().begin(), gate_up.sizes().end());
    sizes.back() = work.I + (static_scale ? 0 : rmsq::kScaleBytes);
    Tensor out = rmsq::new_output(sizes, rmsq::ScalarType::Byte, 1);
    const int64_t T = gate_up.numel() / (2 * work.I);
    if (T == 0) return out;
    work.out = static_cast<uint8_t*>(out.data_ptr());
    const rmsq::Rows rows = rmsq::to_rows(gate_up);
    work.gate_up = rows.data;
    work.gate_up_stride = rows.stride;
    const int64_t grain = std::max<int64_t>(1, kElementsPerTask / work.I);
    rmsq::share_rows(RMSQ_KERNEL(silu_mul_quant_rows), work, T, work.I, grain);
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(neuron_rmsq, CPU, m) { m.impl("silu_mul_quant.cpu", TORCH_BOX(&silu_mul_quant)); }

}  // namespace
