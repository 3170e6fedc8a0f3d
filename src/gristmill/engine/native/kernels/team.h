// What the threads of one parallel region share.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdlib>

#include "common.h"

namespace gristmill {

// Threads of one region wait for each other. They spin: a phase takes microseconds.
class Barrier {
    std::atomic<int> waiting{0}, round{0};

  public:
    void wait(int threads) {
        if (threads == 1) return;
        int now = round.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            waiting.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int turn = 0; round.load(std::memory_order_acquire) == now; turn++)
            if (turn < 1000)
                __builtin_ia32_pause();
            else
                sched_yield();  // somebody has no processor of its own
    }
};

// Memory that grows and is kept: fresh pages cost as much as a pass over them.
class Buffer {
    void* memory = nullptr;
    size_t size = 0;

  public:
    ~Buffer() { std::free(memory); }
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    template <class T>
    T* of(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = round_up(bytes + bytes / 4, 4096);
            memory = std::aligned_alloc(4096, size);
            if (!memory) std::abort();
        }
        return (T*)memory;
    }
};

}  // namespace gristmill
