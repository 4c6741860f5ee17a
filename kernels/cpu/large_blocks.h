// Memory for the norm's largest outputs, used again instead of given back.
//
// glibc maps every block of 32 MiB and more afresh and unmaps it when it is freed. The system must clear such
// pages first, which takes as long as a third of the norm that fills them. So freed blocks wait here for the
// next call, up to kKeptBytes of them. (Smaller blocks malloc keeps by itself.)
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "huge_pages.h"

namespace rmsq {

class LargeBlocks {
   public:
    static constexpr int64_t kFrom = 32 << 20;  // bytes

    // Never destroyed: tensors may outlive static objects.
    static LargeBlocks& instance() {
        static LargeBlocks* const blocks = new LargeBlocks;
        return *blocks;
    }

    // Memory of at least `bytes`, aligned to 2 MiB, its contents arbitrary.
    void* take(int64_t bytes) {
        const int64_t size = block_size(bytes);
        const std::lock_guard<std::mutex> lock(mutex_);
        for (size_t i = free_.size(); i-- > 0;) {
            if (free_[i].size != size) continue;
            void* const memory = free_[i].memory;
            free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
            return memory;
        }
        void* const memory = std::aligned_alloc(kHugePage, static_cast<size_t>(size));
        if (!memory) throw std::bad_alloc();
        ask_for_huge_pages(memory, size);
        return memory;
    }

    // Keep what take(bytes) returned for later; free the longest unused beyond kKeptBytes.
    void give_back(void* memory, int64_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back({memory, block_size(bytes)});
        int64_t kept = 0;
        for (const Block& block : free_) kept += block.size;
        while (kept > kKeptBytes) {
            kept -= free_.front().size;
            std::free(free_.front().memory);
            free_.erase(free_.begin());
        }
    }

   private:
    static constexpr int64_t kHugePage = 2 << 20;
    static constexpr int64_t kKeptBytes = 256 << 20;

    static int64_t block_size(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

    struct Block {
        void* memory;
        int64_t size;
    };
    std::mutex mutex_;
    std::vector<Block> free_;  // longest unused first
};

}  // namespace rmsq
