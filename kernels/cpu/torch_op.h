// What the ops need from torch, through its stable C++ interface (torch/csrc/stable). Not for kernel sources.
//
// torch brings only plain CPU tensors to the ops: sparse ones, and calls with a tensor of another device, go
// elsewhere.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "dtype.h"
#include "huge_pages.h"

namespace rmsq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Threads come from torch's own pool, so that whoever pinned it (vLLM does, per rank) pins this too:
// parallel_for(begin, end, grain_size, f(begin, end)) and get_num_threads(), as at:: has them.
using torch::stable::get_num_threads;
#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer does not see how OpenMP's threads wait for each other, and would call each hand-over a
// race: the work after the caller, and the caller after all of the work.
template <class Work> void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
    char called, done;
    __tsan_release(&called);
    torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
        __tsan_acquire(&called);
        work(first, last);
        __tsan_release(&done);
    });
    __tsan_acquire(&done);
}
#else
using torch::stable::parallel_for;
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Raise ValueError in Python (pybind11's translation of std::invalid_argument) with the parts as its text.
template <class... Parts> [[noreturn]] void raise_value_error(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::invalid_argument(text.str());
}

inline std::string shape_text(const Tensor& tensor) {
    std::ostringstream text;
    text << '[';
    for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
    text << ']';
    return text.str();
}

// Quicker than the tensor's own scalar_type(), which asks torch to translate the number it has.
inline ScalarType scalar_type(const Tensor& tensor) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
    return static_cast<ScalarType>(type);
}

// nullopt for types that no kernel takes.
inline std::optional<Dtype> to_dtype(ScalarType type) {
    switch (type) {
        case ScalarType::BFloat16: return Dtype::bf16;
        case ScalarType::Half: return Dtype::fp16;
        case ScalarType::Float: return Dtype::fp32;
        default: return std::nullopt;
    }
}

inline Dtype check_dtype(const char* name, ScalarType type) {
    const auto dtype = to_dtype(type);
    if (!dtype) raise_value_error(name, ": expected dtype torch.bfloat16, torch.float16 or torch.float32");
    return *dtype;
}

// A tensor of any rank >= 1 as rows, its last dimension, a fixed number of bytes apart.
struct Rows {
    Tensor tensor;  // keeps the memory alive
    const char* data;
    int64_t stride;
};

// The tensor itself where its leading dimensions collapse into one, else a contiguous copy of it.
inline Rows to_rows(const Tensor& tensor) {
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

// From this size on an allocation is fresh memory from the system, and writing it first meets a page fault
// every 4 KiB, which takes longer than the kernels' work: ask for huge pages, as torch does with
// THP_MEM_ALLOC_ENABLE.
constexpr int64_t kHugePagesFrom = 4 << 20;

// Strides, in elements, that a contiguous tensor of these sizes has.
inline std::vector<int64_t> contiguous_strides(const int64_t* sizes, int64_t dim) {
    std::vector<int64_t> strides(dim, 1);
    for (int64_t d = dim - 2; d >= 0; --d)
        strides[d] = strides[d + 1] * (sizes[d + 1] > 0 ? sizes[d + 1] : 1);
    return strides;
}

// A new contiguous CPU tensor, uninitialized. (torch::stable::empty goes through the dispatcher by name,
// which takes longer than a whole row's work.)
inline Tensor empty(const int64_t* sizes, int64_t dim, ScalarType type) {
    const std::vector<int64_t> strides = contiguous_strides(sizes, dim);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        dim, sizes, strides.data(), static_cast<int32_t>(type), aoti_torch_device_type_cpu(), 0, &handle));
    Tensor tensor(handle);
    const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    if (bytes >= kHugePagesFrom) ask_for_huge_pages(tensor.data_ptr(), bytes);
    return tensor;
}

}  // namespace rmsq
