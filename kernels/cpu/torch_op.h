// What the ops need from torch, through its stable C++ interface (torch/csrc/stable). Not for kernel sources.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "huge_pages.h"

namespace rmsq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Threads come from torch's own pool, so that whoever pinned it (vLLM does, per rank) pins this too:
// parallel_for(begin, end, grain_size, f(begin, end)) and get_num_threads(), as at:: has them.
using torch::stable::get_num_threads;
using torch::stable::parallel_for;

// Raise ValueError in Python (pybind11's translation of std::invalid_argument) with the parts as its text.
template <class... Parts>
[[noreturn]] void raise_value_error(const Parts&... parts) {
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

// From this size on an allocation is fresh memory from the system, and writing it first meets a page fault every
// 4 KiB, which takes longer than the kernels' work: ask for huge pages, as torch does with THP_MEM_ALLOC_ENABLE.
constexpr int64_t kHugePagesFrom = 4 << 20;

// Those of a contiguous tensor.
inline std::vector<int64_t> contiguous_strides(const int64_t* sizes, int64_t dim) {
    std::vector<int64_t> strides(dim, 1);
    for (int64_t d = dim - 2; d >= 0; --d) strides[d] = strides[d + 1] * (sizes[d + 1] > 0 ? sizes[d + 1] : 1);
    return strides;
}

// A new contiguous CPU tensor, uninitialized. (torch::stable::empty goes through the dispatcher by name, which
// takes longer than a whole row's work.)
inline Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype) {
    const std::vector<int64_t> strides = contiguous_strides(sizes, dim);
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dim, sizes, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
    Tensor tensor(handle);
    const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    if (bytes >= kHugePagesFrom) ask_for_huge_pages(tensor.data_ptr(), bytes);
    return tensor;
}

}  // namespace rmsq
