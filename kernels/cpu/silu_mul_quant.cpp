// SiLU of the gate times up + FP8 quantization, one row at a time: one read of gate and up, one write of the
// packed row. The numbers are those of vllm_neuron_rmsq/reference.py:
//
//     y     = gate / (1 + exp(-gate)) * up
//     scale = max(max|y| / R, 1e-6)
//     code  = to_fp8_nearest_even(clip(y / scale, ±R))
//
// One sweep over the row finds max|y| and leaves y in a buffer that stays in the cache, a second one over
// that buffer writes the codes (quantize.h).
#include "silu_mul_quant.h"

#include "quantize.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

// How far ahead of their use gate and up are asked for, and how much of the next row while this one's codes
// are written. The processor's own prefetching starts anew with every page, and every row is two runs of
// pages.
constexpr int64_t kPrefetchBytes = 1024;

// 2 exp(-r) for |r| <= ln(2)/16 as a polynomial, from the constant on: the one of degree 3 whose largest
// relative error is least (Remez' algorithm, in 50 digits), 2^-25.7; 2^-24.6 with its coefficients rounded to
// fp32.
constexpr float kTwiceExp[] = {2.0f, -2.0f, 0x1.000a40p+0f, -0x1.554d22p-2f};

// gate / (1 + exp(-gate)). The relative error is below 2^-22, of which every fp32 gate was tried; below
// -88.73, where exp(-gate) leaves fp32, the result is 0, as the formula has it.
//
// Let n be -gate / (ln(2)/8) rounded to a whole number and r = gate + n ln(2)/8, taken in two steps because
// one fp32 ln(2) is too coarse: exp(-gate) = 2^(n/8) exp(-r) = 2^((n-8)/8) * 2 exp(-r). Adding 1.5 * 2^23 - 8
// rounds to a whole number and leaves n - 8 in the low bits. That is why the polynomial is twice exp:
// 2^((n-8)/8) is a normal number even where the result overflows.
inline Lanes silu(Lanes gate) {
    constexpr float kRound = 0x1.8p23f - 8;
    constexpr float kEighthsOfE = 0x1.715476p+3f;                     // 8 / ln(2)
    constexpr float kHigh = 0x1.62e430p-4f, kLow = -0x1.05c610p-32f;  // their sum is ln(2)/8
    // Beyond these exp(-gate) is Inf, or nothing beside 1.
    const Lanes x = clamp(gate, splat(-89), splat(86));
    const Lanes rounded = fma(x, splat(-kEighthsOfE), splat(kRound));
    const Lanes n = rounded + splat(-kRound);
    const Lanes r = fma(n, splat(kLow), fma(n, splat(kHigh), x));
    Lanes twice_exp = splat(kTwiceExp[3]);
    for (int i = 2; i >= 0; --i) twice_exp = fma(twice_exp, r, splat(kTwiceExp[i]));
    return gate / fma(twice_exp, power_of_eighths(rounded), splat(1));
}

// The one sweep over the row's memory: y into `buffer`. Returns max|y|, NaN if one was.
template <Dtype D> float sweep(const char* gate, const char* up, int64_t I, float* buffer) {
    Lanes peak_a = splat(0), peak_b = splat(0);
    const auto step = [&](const char* gate, const char* up, float* y) {
        const Pair g = load_pair<D>(gate), u = load_pair<D>(up);
        const Lanes a = silu(g.a) * u.a, b = silu(g.b) * u.b;
        peak_a = peak(peak_a, a);
        peak_b = peak(peak_b, b);
        store(y, a);
        store(y + 16, b);
    };
    constexpr int64_t kPairBytes = kPair * kBytes<D>;
    const int64_t whole = I / kPair;
    for (int64_t i = 0; i < whole; ++i) {
        __builtin_prefetch(gate + i * kPairBytes + kPrefetchBytes);
        __builtin_prefetch(up + i * kPairBytes + kPrefetchBytes);
        step(gate + i * kPairBytes, up + i * kPairBytes, buffer + i * kPair);
    }
    if (whole * kPair < I) {
        // Filled up with zeros, which do not change a peak.
        char last_gate[kPairBytes] = {0}, last_up[kPairBytes] = {0};
        const size_t bytes = static_cast<size_t>((I - whole * kPair) * kBytes<D>);
        memcpy(last_gate, gate + whole * kPairBytes, bytes);
        memcpy(last_up, up + whole * kPairBytes, bytes);
        step(last_gate, last_up, buffer + whole * kPair);
    }
    return largest(peak_a, peak_b);
}

template <Dtype D>
int64_t quantize_rows(const SiluMulQuant& work, int64_t begin, int64_t end, float* buffer) {
    const bool dynamic = !(work.static_scale > 0);
    const int64_t I = work.I, out_bytes = I + (dynamic ? kScaleBytes : 0);
    int64_t invalid = 0;
    for (int64_t index = begin; index < end; ++index) {
        const char* gate = work.gate_up + index * work.gate_up_stride;
        uint8_t* out = work.out + index * out_bytes;
        const float peak = sweep<D>(gate, gate + I * kBytes<D>, I, buffer);
        for (int64_t byte = 0; byte < kPrefetchBytes; byte += 64) {
            __builtin_prefetch(gate + work.gate_up_stride + byte);
            __builtin_prefetch(gate + work.gate_up_stride + I * kBytes<D> + byte);
        }
        float scale = peak / work.fp8_max;
        if (dynamic && product_is_exact(peak, scale)) {
            quantize_by_product<D>(out, I, work.fp8_max, peak, buffer);
        } else if (is_finite(peak)) {
            scale = quantize_by_division<D>(out, I, work.fp8_max, peak, kLargest, work.static_scale, buffer);
        } else {
            scale = write_invalid_row(out, I, !dynamic);
            ++invalid;
        }
        if (dynamic) memcpy(out + I, &scale, kScaleBytes);
    }
    return invalid;
}

}  // namespace

int64_t silu_mul_quant_rows(const SiluMulQuant& work, int64_t begin, int64_t end, float* scratch) {
    switch (work.dtype) {
        case Dtype::bf16: return quantize_rows<Dtype::bf16>(work, begin, end, scratch);
        case Dtype::fp16: return quantize_rows<Dtype::fp16>(work, begin, end, scratch);
        case Dtype::fp32: return quantize_rows<Dtype::fp32>(work, begin, end, scratch);
    }
    __builtin_unreachable();
}

}  // namespace RMSQ_ISA
}  // namespace rmsq
