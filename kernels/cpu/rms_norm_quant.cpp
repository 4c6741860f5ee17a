// Add + RMSNorm + FP8 quantization, one row at a time: one read of hidden (and residual), one write of the
// packed row (and residual_out). The numbers are those of vllm_neuron_rmsq/reference.py:
//
//     x     = hidden [+ residual]
//     y     = x * rsqrt(mean(x²) + eps) * gamma        no weight: y = x
//     y     = clip(y, ±lower_bound)                    only when lower_bound > 0
//     scale = max(max|y| / R, 1e-6)
//     code  = to_fp8_nearest_even(clip(y / scale, ±R))
//
// Let z = x * gamma. rsqrt(...) cancels out of the codes: y / scale = z * R / max|z|. So one sweep over the
// row finds Σx² and max|z| and leaves z in a buffer that stays in the cache, and a second one over that
// buffer writes the codes (quantize_by_product). Where something else decides (the floor 1e-6, a lower bound
// in force, a given scale, numbers at the ends of fp32's range) the row is done over as the formula has it
// (quantize_by_formula).
#include "rms_norm_quant.h"

#include "quantize.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

// Squares are summed in fp32 over this many pairs, and those sums in fp64: relative error below 2^-21.
constexpr int64_t kPairsPerSum = 16;

enum class Weight { none, same_dtype, lane_order };

// Where 32 elements of one row are read and written.
struct Place {
    const char* hidden;
    const char* residual;
    const char* weight;
    char* residual_out;

    template <Dtype D, Weight W, bool kResidual> Place at(int64_t pair) const {
        const int64_t offset = pair * kPair * kBytes<D>;
        return {
            hidden + offset, kResidual ? residual + offset : nullptr,
            W == Weight::none         ? nullptr
            : W == Weight::lane_order ? weight + pair * kPair * 4
                                      : weight + offset,
            kResidual ? residual_out + offset : nullptr};
    }
};

// The last, partial pair of a row, filled up with zeros, which change neither a sum nor a peak.
template <Dtype D, Weight W, bool kResidual> struct Tail {
    static constexpr int64_t kSize = kPair * kBytes<D>;
    char hidden[kSize] = {0}, residual[kSize] = {0}, weight[kPair * 4] = {0}, residual_out[kSize];
    size_t bytes;

    Tail(const Place& place, int64_t elements) : bytes(static_cast<size_t>(elements * kBytes<D>)) {
        memcpy(hidden, place.hidden, bytes);
        if (kResidual) memcpy(residual, place.residual, bytes);
        if (W == Weight::same_dtype) memcpy(weight, place.weight, bytes);
        if (W == Weight::lane_order) memcpy(weight, place.weight, sizeof weight);
    }
    Place place() { return {hidden, residual, weight, residual_out}; }
};

template <Dtype D, bool kResidual> Pair load_x(const Place& place) {
    const Pair x = load_pair<D>(place.hidden);
    if constexpr (!kResidual) return x;
    const Pair r = load_pair<D>(place.residual);
    return {x.a + r.a, x.b + r.b};
}

template <Dtype D, Weight W> Pair load_weight(const Place& place) {
    return load_pair<W == Weight::same_dtype ? D : Dtype::fp32>(place.weight);
}

// Call function(place, pair number) for every pair of the row.
template <Dtype D, Weight W, bool kResidual, class Function>
void for_each_pair(const Place& row, int64_t begin, int64_t end, int64_t H, Function function) {
    const int64_t whole = end * kPair <= H ? end : H / kPair;
    for (int64_t i = begin; i < whole; ++i) function(row.at<D, W, kResidual>(i), i);
    if (whole < end) {
        const Place place = row.at<D, W, kResidual>(whole);
        Tail<D, W, kResidual> tail(place, H - whole * kPair);
        function(tail.place(), whole);
        if (kResidual) memcpy(place.residual_out, tail.residual_out, tail.bytes);
    }
}

struct Sums {
    float squares;  // Σx², Inf where fp32 cannot hold it
    float peak;     // max|z|, NaN if one was
};

// The one sweep over the row's memory: z into `buffer`, x into residual_out.
template <Dtype D, Weight W, bool kResidual> Sums sweep(const Place& row, int64_t H, float* buffer) {
    const int64_t pairs = pairs_in(H);
    Totals totals_a = no_totals(), totals_b = no_totals();
    Lanes peak_a = splat(0), peak_b = splat(0);
    for (int64_t start = 0; start < pairs; start += kPairsPerSum) {
        const int64_t end = start + kPairsPerSum < pairs ? start + kPairsPerSum : pairs;
        Lanes squares_a = splat(0), squares_b = splat(0);
        for_each_pair<D, W, kResidual>(row, start, end, H, [&](const Place& place, int64_t i) {
            const Pair x = load_x<D, kResidual>(place);
            if constexpr (kResidual) store_pair<D>(place.residual_out, x);
            Pair z = x;
            if constexpr (W != Weight::none) {
                const Pair weight = load_weight<D, W>(place);
                z = {x.a * weight.a, x.b * weight.b};
                squares_a = fma(x.a, x.a, squares_a);
                squares_b = fma(x.b, x.b, squares_b);
            }
            peak_a = peak(peak_a, z.a);
            peak_b = peak(peak_b, z.b);
            store(buffer + i * kPair, z.a);
            store(buffer + i * kPair + 16, z.b);
        });
        if constexpr (W != Weight::none) {
            add_to(totals_a, squares_a);
            add_to(totals_b, squares_b);
        }
    }
    double lanes[kPair], squares = 0;
    store(lanes, totals_a);
    store(lanes + 16, totals_b);
    for (int64_t i = 0; i < kPair; ++i) squares += lanes[i];
    return {
        squares <= kLargest ? static_cast<float>(squares) : as_float(kExponentBits), largest(peak_a, peak_b)};
}

// The formula step by step. Returns the scale, or 0 when the row is not finite and no codes were written.
template <Dtype D, Weight W, bool kResidual>
float quantize_by_formula(
    const RmsNormQuant& work, const Place& row, uint8_t* out, float rstd, float* buffer) {
    const int64_t pairs = pairs_in(work.H);
    Lanes peak_a = splat(0), peak_b = splat(0);
    for_each_pair<D, W, kResidual>(row, 0, pairs, work.H, [&](const Place& place, int64_t i) {
        Pair y = load_x<D, kResidual>(place);
        if constexpr (kResidual) store_pair<D>(place.residual_out, y);
        if constexpr (W != Weight::none) {
            const Pair weight = load_weight<D, W>(place);
            y = {y.a * splat(rstd) * weight.a, y.b * splat(rstd) * weight.b};
        }
        peak_a = peak(peak_a, y.a);
        peak_b = peak(peak_b, y.b);
        store(buffer + i * kPair, y.a);
        store(buffer + i * kPair + 16, y.b);
    });
    const float y_peak = largest(peak_a, peak_b);
    if (!is_finite(y_peak)) return 0;
    const float bound = work.lower_bound > 0 ? work.lower_bound : kLargest;
    return quantize_by_division<D>(out, work.H, work.fp8_max, y_peak, bound, work.static_scale, buffer);
}

// residual_out of a row that holds NaN or Inf, which the sweep's rounding to bf16 takes for numbers.
inline void store_nonfinite_x(const Place& row, int64_t H) {
    for (int64_t i = 0; i < H; ++i) {
        uint16_t words[2];
        memcpy(&words[0], row.hidden + 2 * i, 2);
        memcpy(&words[1], row.residual + 2 * i, 2);
        const uint16_t word = round_to_bf16(widen_bf16(words[0]) + widen_bf16(words[1]));
        memcpy(row.residual_out + 2 * i, &word, 2);
    }
}

template <Dtype D, Weight W, bool kResidual>
int64_t quantize_rows(const RmsNormQuant& work, int64_t begin, int64_t end, float* buffer) {
    const bool dynamic = !(work.static_scale > 0);
    const int64_t H = work.H, out_bytes = H + (dynamic ? kScaleBytes : 0);
    int64_t invalid = 0;
    for (int64_t index = begin; index < end; ++index) {
        const Place row = {
            work.hidden + index * work.hidden_stride,
            kResidual ? work.residual + index * work.residual_stride : nullptr,
            W == Weight::lane_order ? reinterpret_cast<const char*>(work.lane_weight) : work.weight,
            kResidual ? work.residual_out + index * H * kBytes<D> : nullptr};
        uint8_t* out = work.out + index * out_bytes;
        const Sums sums = sweep<D, W, kResidual>(row, H, buffer);
        const float rstd =
            W == Weight::none ? 1.0f : 1.0f / sqrtf(sums.squares / static_cast<float>(H) + work.eps);
        const float norm_peak = sums.peak * rstd;
        const bool clips = work.lower_bound > 0 && !(norm_peak <= work.lower_bound);
        float scale = norm_peak / work.fp8_max;
        if (dynamic && !clips && is_finite(sums.squares) && product_is_exact(sums.peak, scale)) {
            quantize_by_product<D>(out, H, work.fp8_max, sums.peak, buffer);
        } else {
            scale = 0;
            if (is_finite(sums.squares)) {
                scale = quantize_by_formula<D, W, kResidual>(work, row, out, rstd, buffer);
            }
            if (!(scale > 0)) {
                scale = write_invalid_row(out, H, !dynamic);
                ++invalid;
                if constexpr (kResidual && D == Dtype::bf16) store_nonfinite_x(row, H);
            }
        }
        if (dynamic) memcpy(out + H, &scale, kScaleBytes);
    }
    return invalid;
}

template <Dtype D, Weight W>
int64_t choose_residual(const RmsNormQuant& work, int64_t begin, int64_t end, float* scratch) {
    return work.residual ? quantize_rows<D, W, true>(work, begin, end, scratch)
                         : quantize_rows<D, W, false>(work, begin, end, scratch);
}

template <Dtype D>
int64_t choose_weight(const RmsNormQuant& work, int64_t begin, int64_t end, float* scratch) {
    if (work.lane_weight) return choose_residual<D, Weight::lane_order>(work, begin, end, scratch);
    if (work.weight) return choose_residual<D, Weight::same_dtype>(work, begin, end, scratch);
    return choose_residual<D, Weight::none>(work, begin, end, scratch);
}

}  // namespace

int64_t rms_norm_quant_rows(const RmsNormQuant& work, int64_t begin, int64_t end, float* scratch) {
    switch (work.dtype) {
        case Dtype::bf16: return choose_weight<Dtype::bf16>(work, begin, end, scratch);
        case Dtype::fp16: return choose_weight<Dtype::fp16>(work, begin, end, scratch);
        case Dtype::fp32: return choose_weight<Dtype::fp32>(work, begin, end, scratch);
    }
    __builtin_unreachable();
}

}  // namespace RMSQ_ISA
}  // namespace rmsq
