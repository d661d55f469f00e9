// The machine that kernels run on: an NVIDIA GPU through nvcc, or the processor through
// tests/cuda/emulate.h, which offers CUDA's own names. What has no name in CUDA C++ is here.
#pragma once

#ifndef __CUDACC__
#include "emulate.h"
#endif

namespace isopleth {

#ifdef __CUDACC__

#define DEVICE static __device__ __forceinline__
#define MEMBER __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
// A variable of the block: SHARED(float, tile, [32][4]).
#define SHARED(type, name, ...) __shared__ type name __VA_ARGS__
// The dynamic shared memory of the block, 128-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// 2ˣ to 2⁻²² of itself; 0 below 2⁻¹²⁶.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// BYTES (4 or 16) from global to shared memory, both aligned to as much; zeros if not `wanted`.
template <int BYTES> DEVICE void copy_async(void *to, const void *from, bool wanted) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(to);
    const int filled = wanted ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(filled) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(BYTES), "r"(filled)
                     : "memory");
}
// Closes a group of copies; waits until all but the last LEFT groups of this thread have arrived.
DEVICE void copies_close() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

#else

#define DEVICE static inline
#define MEMBER inline
#define UNROLL
#define NO_UNROLL
#define SHARED(type, name, ...)                                                                             \
    using name##_held = type __VA_ARGS__;                                                                   \
    name##_held &name = emulate::shared<name##_held>([] {})
#define DYNAMIC_SHARED(name) unsigned char *const name = (unsigned char *)emulate::dynamic_shared()

DEVICE float exp2_approx(float x) {
    const float y = emulate::spoiled(exp2f(x), 2.384e-7f);
    return y < 1.1754944e-38f ? 0.0f : y;
}
template <int BYTES> DEVICE void copy_async(void *to, const void *from, bool wanted) {
    emulate::copy_async(to, from, BYTES, wanted ? BYTES : 0);
}
DEVICE void copies_close() { emulate::copies_close(); }
template <int LEFT> DEVICE void copies_wait() { emulate::copies_wait(LEFT); }

#endif

} // namespace isopleth
