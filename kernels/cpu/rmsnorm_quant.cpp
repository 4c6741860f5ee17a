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
#include "rmsnorm_quant.h"

#include "lanes.h"

namespace rmsq {
namespace RMSQ_ISA {
namespace {

constexpr float kScaleFloor = 1e-6f;
constexpr uint32_t kNanScale = 0x7fc00000;
constexpr uint8_t kNanCode = 0x7f;
constexpr float kLargest = 3.402823466e38f;

// Squares are summed in fp32 over this many pairs, and those sums in fp64: relative error below 2^-21.
constexpr int64_t kPairsPerSum = 16;

// Where no product of the short way to the codes leaves the normal range.
constexpr float kLeastPeak = 0x1p-40f, kGreatestPeak = 0x1p40f;

enum class Weight { none, same_dtype, lane_order };

template <Dtype D, Weight W> struct Row {
    using word = typename Element<D>::word;
    static constexpr int64_t kBytes = kPair * sizeof(word);

    const RmsNormQuant& work;
    const char* hidden;
    const char* residual;
    char* residual_out;

    Row(const RmsNormQuant& w, int64_t index)
        : work(w),
          hidden(w.hidden + index * w.hidden_stride),
          residual(w.residual ? w.residual + index * w.residual_stride : nullptr),
          residual_out(w.residual_out ? w.residual_out + index * w.width * static_cast<int64_t>(sizeof(word)) : nullptr) {}

    // Pair number i; the last one of a row may be partial and is then filled up with zeros.
    static Pair load_elements(const char* row, int64_t i, int64_t width) {
        const int64_t left = width - i * kPair;
        if (left >= kPair) return load_pair<D>(row + i * kBytes);
        word padded[kPair] = {0};
        memcpy(padded, row + i * kBytes, static_cast<size_t>(left) * sizeof(word));
        return load_pair<D>(padded);
    }

    template <bool kResidual> Pair x(int64_t i) const {
        Pair x = load_elements(hidden, i, work.width);
        if constexpr (kResidual) {
            const Pair r = load_elements(residual, i, work.width);
            x = {x.a + r.a, x.b + r.b};
        }
        return x;
    }

    Pair weight(int64_t i) const {
        if constexpr (W == Weight::same_dtype) return load_elements(work.weight, i, work.width);
        return {load(work.lane_weight + i * kPair), load(work.lane_weight + i * kPair + 16)};
    }

    void store_x(int64_t i, Pair x) const {
        const int64_t left = work.width - i * kPair;
        if (left >= kPair) return store_pair<D>(residual_out + i * kBytes, x);
        word padded[kPair];
        store_pair<D>(padded, x);
        memcpy(residual_out + i * kBytes, padded, static_cast<size_t>(left) * sizeof(word));
    }
};

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
template <Dtype D, Weight W, bool kResidual> Sums sweep(const Row<D, W>& row, float* buffer) {
    const int64_t pairs = (row.work.width + kPair - 1) / kPair;
    Totals totals_a = no_totals(), totals_b = no_totals();
    Lanes peak_a = splat(0), peak_b = splat(0);
    for (int64_t start = 0; start < pairs; start += kPairsPerSum) {
        const int64_t end = start + kPairsPerSum < pairs ? start + kPairsPerSum : pairs;
        Lanes squares_a = splat(0), squares_b = splat(0);
        for (int64_t i = start; i < end; ++i) {
            const Pair x = row.template x<kResidual>(i);
            if constexpr (kResidual) row.store_x(i, x);
            Pair z = x;
            if constexpr (W != Weight::none) {
                const Pair weight = row.weight(i);
                z = {x.a * weight.a, x.b * weight.b};
                squares_a = fma(x.a, x.a, squares_a);
                squares_b = fma(x.b, x.b, squares_b);
            }
            peak_a = peak(peak_a, z.a);
            peak_b = peak(peak_b, z.b);
            store(buffer + i * kPair, z.a);
            store(buffer + i * kPair + 16, z.b);
        }
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

// Write the row's codes, `code(i)` giving the quotients of pair i.
template <Dtype D, class Quotients> void write_codes(uint8_t* out, int64_t width, Quotients quotients) {
    const int64_t whole = width / kPair;
    for (int64_t i = 0; i < whole; ++i) store_codes<D>(out + i * kPair, quotients(i));
    if (whole * kPair < width) {
        uint8_t padded[kPair];
        store_codes<D>(padded, quotients(whole));
        memcpy(out + whole * kPair, padded, static_cast<size_t>(width - whole * kPair));
    }
}

// z * R / peak, as exact as a division but quicker: R / peak as the sum of two fp32 numbers. (Exactly on a tie
// between two codes, where inputs of few bits often fall, it is exact.)
template <Dtype D> void quantize_row(uint8_t* out, int64_t width, float fp8_max, float peak, const float* buffer) {
    const double factor = static_cast<double>(fp8_max) / static_cast<double>(peak);
    const float leading = static_cast<float>(factor);
    const Lanes high = splat(leading), low = splat(static_cast<float>(factor - static_cast<double>(leading)));
    write_codes<D>(out, width, [&](int64_t i) -> Pair {
        const Lanes a = load(buffer + i * kPair), b = load(buffer + i * kPair + 16);
        return {fma(a, high, a * low), fma(b, high, b * low)};
    });
}

// The formula step by step. Returns the scale, or 0 when the row is not finite and no codes were written.
template <Dtype D, Weight W, bool kResidual>
float quantize_by_formula(const Row<D, W>& row, uint8_t* out, float rstd, float* buffer) {
    const RmsNormQuant& work = row.work;
    const int64_t pairs = (work.width + kPair - 1) / kPair;
    Lanes peak_a = splat(0), peak_b = splat(0);
    for (int64_t i = 0; i < pairs; ++i) {
        Pair y = row.template x<kResidual>(i);
        if constexpr (W != Weight::none) {
            const Pair weight = row.weight(i);
            y = {y.a * splat(rstd) * weight.a, y.b * splat(rstd) * weight.b};
        }
        peak_a = peak(peak_a, y.a);
        peak_b = peak(peak_b, y.b);
        store(buffer + i * kPair, y.a);
        store(buffer + i * kPair + 16, y.b);
    }
    float limit = largest(peak_a, peak_b);
    if (!is_finite(limit)) return 0;
    if (work.lower_bound > 0 && limit > work.lower_bound) limit = work.lower_bound;
    const float own = limit / work.fp8_max;
    const float scale = work.static_scale > 0 ? work.static_scale : own > kScaleFloor ? own : kScaleFloor;
    write_codes<D>(out, work.width, [&](int64_t i) -> Pair {
        const Lanes a = clip(load(buffer + i * kPair), splat(limit)), b = clip(load(buffer + i * kPair + 16), splat(limit));
        return {clip(a / splat(scale), splat(work.fp8_max)), clip(b / splat(scale), splat(work.fp8_max))};
    });
    return scale;
}

// residual_out of a row that holds NaN or Inf, which the sweep's rounding to bf16 takes for numbers.
template <Dtype D, Weight W> void store_nonfinite_x(const Row<D, W>& row) {
    if constexpr (D == Dtype::bf16) {
        for (int64_t i = 0; i < row.work.width; ++i) {
            uint16_t words[2];
            memcpy(&words[0], row.hidden + 2 * i, 2);
            memcpy(&words[1], row.residual + 2 * i, 2);
            const float x = as_float(static_cast<uint32_t>(words[0]) << 16) + as_float(static_cast<uint32_t>(words[1]) << 16);
            const uint32_t bits = as_bits(x);
            const uint32_t rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : kNanScale;
            const uint16_t word = static_cast<uint16_t>(rounded >> 16);
            memcpy(row.residual_out + 2 * i, &word, 2);
        }
    }
}

template <Dtype D, Weight W, bool kResidual>
void quantize_rows(const RmsNormQuant& work, int64_t begin, int64_t end, float* buffer) {
    const bool dynamic = !(work.static_scale > 0);
    const int64_t out_width = work.width + (dynamic ? 4 : 0);
    for (int64_t index = begin; index < end; ++index) {
        const Row<D, W> row(work, index);
        uint8_t* out = work.out + index * out_width;
        const Sums sums = sweep<D, W, kResidual>(row, buffer);
        const float rstd = W == Weight::none ? 1.0f : 1.0f / sqrtf(sums.squares / static_cast<float>(work.width) + work.eps);
        float scale = sums.peak * rstd / work.fp8_max;
        const bool clips = work.lower_bound > 0 && !(sums.peak * rstd <= work.lower_bound);
        if (dynamic && !clips && is_finite(sums.squares) && scale > kScaleFloor && is_finite(scale) &&
            sums.peak >= kLeastPeak && sums.peak <= kGreatestPeak) {
            quantize_row<D>(out, work.width, work.fp8_max, sums.peak, buffer);
        } else {
            scale = is_finite(sums.squares) ? quantize_by_formula<D, W, kResidual>(row, out, rstd, buffer) : 0;
            if (!(scale > 0)) {
                memset(out, dynamic ? 0 : kNanCode, static_cast<size_t>(work.width));
                scale = as_float(kNanScale);
                if constexpr (kResidual) store_nonfinite_x(row);
            }
        }
        if (dynamic) memcpy(out + work.width, &scale, 4);
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
