// A wish to the system about memory that has not been written yet.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace rmsq {

// Let page faults bring 2 MiB at a time where the system can. Failing is no error.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

}  // namespace rmsq
