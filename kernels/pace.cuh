// Time on the device: a warp's pace, where a copy must leave bandwidth to others.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace specgen {

__device__ __forceinline__ uint64_t global_nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// A warp's pace.
struct Pace {
    uint64_t picoseconds_per_kib;  // 0: no limit

    // Returns once a warp that began at `start` may move more than `moved` bytes.
    __device__ __forceinline__ void hold(uint64_t start, uint64_t moved) const {
        if (picoseconds_per_kib == 0) return;
        const uint64_t due = start + moved * picoseconds_per_kib / 1024 / 1000;
        while (global_nanoseconds() < due) __nanosleep(200);
    }
};

}  // namespace specgen
