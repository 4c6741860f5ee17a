#include "rmsnorm_quant.h"
#include "torch_op.h"

namespace {

rmsq::Tensor rms_norm_quant(
    const rmsq::Tensor& hidden, std::optional<rmsq::Tensor> weight, std::optional<rmsq::Tensor> static_scale,
    double eps, double lower_bound, double fp8_max) {
    if (hidden.dim() < 2) rmsq::raise_value_error("hidden: expected rank >= 2, got shape ", rmsq::shape_text(hidden));
    std::vector<int64_t> sizes(hidden.sizes().begin(), hidden.sizes().end());
    sizes.back() += 4;
    RMSQ_KERNEL(rms_norm_quant_rows)();
    return rmsq::empty(sizes.data(), sizes.size(), aoti_torch_dtype_uint8());
}

STABLE_TORCH_LIBRARY_IMPL(neuron_rmsq, CPU, m) {
    m.impl("rms_norm_quant.cpu", TORCH_BOX(&rms_norm_quant));
}

}  // namespace
