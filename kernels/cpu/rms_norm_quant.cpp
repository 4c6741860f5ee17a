// Add + RMSNorm + FP8 quantization, one row at a time: one read of hidden (and residual), one write of the
// packed row (and residual_out). The numbers are those of vllm_neuron_rmsq/reference.py:
//
//     x     = hidden [+ residual]
//     y     = x * rsqrt(mean(x²) + eps) * gamma        no weight: y = x
//     y     = clip(y, ±lower_bound)                    only when lower_bound > 0
//     scale = max(max|y| / R, 1e-6)
//     code  = to_fp8_nearest_even(clip(y / scale, ±R))
//
// Let z = x * gamma. rsqrt(...) cancels out of the codes: y / scale = z * R / max|z|. So one sweep over the row
// finds Σx² and max|z| and leaves z in a buffer that stays in the cache, and a second one over that buffer
// writes the codes (quantize_row). Where something else decides (the floor 1e-6, a lower bound in force, a given
// scale, numbers at the ends of fp32's range) the row is done over as the formula has it (quantize_by_formula).
#include "rms_norm_quant.h"

#include "lanes.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

constexpr float kScaleFloor = 1e-6f;
constexpr uint32_t kNan = 0x7fc00000;
constexpr uint8_t kNanCode = 0x7f;
constexpr float kLargest = 3.402823466e38f;

// Squares are summed in fp32 over this many pairs, and those sums in fp64: relative error below 2^-21.
constexpr int64_t kPairsPerSum = 16;

// Where no product of the short way to the codes leaves the normal range.
constexpr float kLeastPeak = 0x1p-40f, kGreatestPeak = 0x1p40f;

enum class Weight { none, same_dtype, lane_order };

template <Dtype D> constexpr int64_t kBytes = sizeof(typename Element<D>::word);

// Where 32 elements of one row are read and written.
struct Place {
    const char* hidden;
    const char* residual;
    const char* weight;
    char* residual_out;

    template <Dtype D, Weight W, bool kResidual> Place at(int64_t pair) const {
        const int64_t offset = pair * kPair * kBytes<D>;
        return {hidden + offset, kResidual ? residual + offset : nullptr,
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
void for_each_pair(const Place& row, int64_t begin, int64_t end, int64_t width, Function function) {
    const int64_t whole = end * kPair <= width ? end : width / kPair;
    for (int64_t i = begin; i < whole; ++i) function(row.at<D, W, kResidual>(i), i);
    if (whole < end) {
        const Place place = row.at<D, W, kResidual>(whole);
        Tail<D, W, kResidual> tail(place, width - whole * kPair);
        function(tail.place(), whole);
        if (kResidual) memcpy(place.residual_out, tail.residual_out, tail.bytes);
    }
}

struct Sums {
    float squares;  // Σx², Inf where fp32 cannot hold it
    float peak;     // max|z|, NaN if one was
};

float largest(Lanes a, Lanes b) {
    float lanes[16];
    store(lanes, peak(a, b));
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) {
        if (as_bits(lanes[i]) > bits) bits = as_bits(lanes[i]);
    }
    return as_float(bits);
}

bool is_finite(float x) { return (as_bits(x) & kExponent) != kExponent; }

// The one sweep over the row's memory: z into `buffer`, x into residual_out.
template <Dtype D, Weight W, bool kResidual> Sums sweep(const Place& row, int64_t width, float* buffer) {
    const int64_t pairs = (width + kPair - 1) / kPair;
    Totals totals_a = no_totals(), totals_b = no_totals();
    Lanes peak_a = splat(0), peak_b = splat(0);
    for (int64_t start = 0; start < pairs; start += kPairsPerSum) {
        const int64_t end = start + kPairsPerSum < pairs ? start + kPairsPerSum : pairs;
        Lanes squares_a = splat(0), squares_b = splat(0);
        for_each_pair<D, W, kResidual>(row, start, end, width, [&](const Place& place, int64_t i) {
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
    return {squares <= kLargest ? static_cast<float>(squares) : as_float(kExponent), largest(peak_a, peak_b)};
}

// Write the row's codes, quotients(i) giving y / scale of pair i. Inlined, for the compiler to keep what that
// captures in registers: for all it knows a store to `out` could change it in memory.
template <Dtype D, class Quotients> [[gnu::always_inline]] inline void write_codes(uint8_t* out, int64_t width, Quotients quotients) {
    const int64_t whole = width / kPair;
    for (int64_t i = 0; i < whole; ++i) store_codes<D>(out + i * kPair, quotients(i));
    if (whole * kPair < width) {
        uint8_t padded[kPair];
        store_codes<D>(padded, quotients(whole));
        memcpy(out + whole * kPair, padded, static_cast<size_t>(width - whole * kPair));
    }
}

// z * R / peak, as exact as a division but quicker: R / peak as the sum of two fp32 numbers. Exactly on a tie between
// two codes, where inputs of few bits often fall, it is exact. So it is with the leading number alone when that is off
// by no more than 2^-25: a tie has so few bits that the product rounds back to it. Most rows are done by that.
template <Dtype D> void quantize_row(uint8_t* out, int64_t width, float fp8_max, float peak, const float* buffer) {
    const double factor = static_cast<double>(fp8_max) / static_cast<double>(peak);
    const float leading = static_cast<float>(factor);
    const float rest = static_cast<float>(factor - static_cast<double>(leading));
    const Lanes high = splat(leading), low = splat(rest);
    if (fabsf(rest) <= leading * 0x1p-25f) {
        return write_codes<D>(out, width, [=](int64_t i) -> Pair {
            return {load(buffer + i * kPair) * high, load(buffer + i * kPair + 16) * high};
        });
    }
    write_codes<D>(out, width, [=](int64_t i) -> Pair {
        const Lanes a = load(buffer + i * kPair), b = load(buffer + i * kPair + 16);
        return {fma(a, high, a * low), fma(b, high, b * low)};
    });
}

// The formula step by step. Returns the scale, or 0 when the row is not finite and no codes were written.
template <Dtype D, Weight W, bool kResidual>
float quantize_by_formula(const RmsNormQuant& work, const Place& row, uint8_t* out, float rstd, float* buffer) {
    const int64_t pairs = (work.width + kPair - 1) / kPair;
    Lanes peak_a = splat(0), peak_b = splat(0);
    for_each_pair<D, W, kResidual>(row, 0, pairs, work.width, [&](const Place& place, int64_t i) {
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
    const float own = (y_peak < bound ? y_peak : bound) / work.fp8_max;
    const float scale = work.static_scale > 0 ? work.static_scale : own > kScaleFloor ? own : kScaleFloor;
    write_codes<D>(out, work.width, [=, &work](int64_t i) -> Pair {
        const Lanes a = clip(load(buffer + i * kPair), splat(bound)), b = clip(load(buffer + i * kPair + 16), splat(bound));
        return {clip(a / splat(scale), splat(work.fp8_max)), clip(b / splat(scale), splat(work.fp8_max))};
    });
    return scale;
}

// residual_out of a row that holds NaN or Inf, which the sweep's rounding to bf16 takes for numbers.
inline void store_nonfinite_x(const Place& row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        uint16_t words[2];
        memcpy(&words[0], row.hidden + 2 * i, 2);
        memcpy(&words[1], row.residual + 2 * i, 2);
        const float hidden = as_float(static_cast<uint32_t>(words[0]) << 16);
        const uint32_t bits = as_bits(hidden + as_float(static_cast<uint32_t>(words[1]) << 16));
        const bool nan = (bits & 0x7fffffff) > kExponent;
        const uint16_t word = static_cast<uint16_t>((nan ? kNan : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        memcpy(row.residual_out + 2 * i, &word, 2);
    }
}

template <Dtype D, Weight W, bool kResidual>
void quantize_rows(const RmsNormQuant& work, int64_t begin, int64_t end, float* buffer) {
    const bool dynamic = !(work.static_scale > 0);
    const int64_t width = work.width, out_width = width + (dynamic ? 4 : 0);
    for (int64_t index = begin; index < end; ++index) {
        const Place row = {
            work.hidden + index * work.hidden_stride, kResidual ? work.residual + index * work.residual_stride : nullptr,
            W == Weight::lane_order ? reinterpret_cast<const char*>(work.lane_weight) : work.weight,
            kResidual ? work.residual_out + index * width * kBytes<D> : nullptr};
        uint8_t* out = work.out + index * out_width;
        const Sums sums = sweep<D, W, kResidual>(row, width, buffer);
        const float rstd = W == Weight::none ? 1.0f : 1.0f / sqrtf(sums.squares / static_cast<float>(width) + work.eps);
        const float norm_peak = sums.peak * rstd;
        const bool clips = work.lower_bound > 0 && !(norm_peak <= work.lower_bound);
        float scale = norm_peak / work.fp8_max;
        if (dynamic && !clips && is_finite(sums.squares) && scale > kScaleFloor && is_finite(scale) &&
            sums.peak >= kLeastPeak && sums.peak <= kGreatestPeak) {
            quantize_row<D>(out, width, work.fp8_max, sums.peak, buffer);
        } else {
            scale = 0;
            if (is_finite(sums.squares)) scale = quantize_by_formula<D, W, kResidual>(work, row, out, rstd, buffer);
            if (!(scale > 0)) {
                memset(out, dynamic ? 0 : kNanCode, static_cast<size_t>(width));
                scale = as_float(kNan);
                if constexpr (kResidual && D == Dtype::bf16) store_nonfinite_x(row, width);
            }
        }
        if (dynamic) memcpy(out + width, &scale, 4);
    }
}

template <Dtype D, Weight W> void choose_residual(const RmsNormQuant& work, int64_t begin, int64_t end, float* scratch) {
    work.residual ? quantize_rows<D, W, true>(work, begin, end, scratch)
                  : quantize_rows<D, W, false>(work, begin, end, scratch);
}

template <Dtype D> void choose_weight(const RmsNormQuant& work, int64_t begin, int64_t end, float* scratch) {
    if (work.lane_weight) return choose_residual<D, Weight::lane_order>(work, begin, end, scratch);
    if (work.weight) return choose_residual<D, Weight::same_dtype>(work, begin, end, scratch);
    choose_residual<D, Weight::none>(work, begin, end, scratch);
}

}  // namespace

void rms_norm_quant_rows(const RmsNormQuant& work, int64_t begin, int64_t end, float* scratch) {
    switch (work.dtype) {
        case Dtype::bf16: return choose_weight<Dtype::bf16>(work, begin, end, scratch);
        case Dtype::fp16: return choose_weight<Dtype::fp16>(work, begin, end, scratch);
        case Dtype::fp32: return choose_weight<Dtype::fp32>(work, begin, end, scratch);
    }
}

}  // namespace RMSQ_ISA
}  // namespace rmsq
