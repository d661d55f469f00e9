// What a warp does with its tensor cores, and one thread with narrow numbers: an NVIDIA GPU of compute
// capability 8.0 or later through PTX, or the processor through tests/cuda/tensor_cores.h.
//
// Source: PTX ISA 9.0, sections on mma.m16n8k16, mma.m16n8k8, ldmatrix and cvt.
#pragma once
#include "machine.h"
#include <cstdint>
#ifndef __CUDACC__
#include "tensor_cores.h"
#endif

namespace isopleth {

#ifdef __CUDACC__

// Two numbers in bf16, to nearest, the first in the lower half.
DEVICE uint32_t bf16_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// A number in tf32, to nearest: an f32 whose 13 last bits are 0.
DEVICE uint32_t tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// log₂ x to 2⁻²² of itself, or 2⁻²² where x is near 1.
DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// √x to 2⁻²³ of itself, 0 where x is not normal.
DEVICE float root_approx(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// c += a b: c 16 × 8 in f32, a 16 × 16 and b 16 × 8 in bf16.
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b: c 16 × 8 in f32, a 16 × 8 and b 8 × 8 in tf32.
DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes: the rows of number i are where lanes 8 i to 8 i + 7 say; lane l
// gets word l % 4 of row l / 4 of each.
DEVICE void ldmatrix4(uint32_t (&r)[4], const uint32_t *row) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// The first two of those only, from lanes 0 to 15.
DEVICE void ldmatrix2(uint32_t (&r)[4], const uint32_t *row) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
}

#else

DEVICE uint32_t bf16_pair(float low, float high) {
    return emulate::bf16(low) | emulate::bf16(high) << 16;
}
DEVICE uint32_t tf32(float x) { return emulate::tf32(x); }
DEVICE float log2_approx(float x) {
    const float y = log2f(x);
    return fabsf(y) < 1.0f ? y + emulate::spoiled(2.384e-7f, 1.0f) - 2.384e-7f : emulate::spoiled(y, 2.384e-7f);
}
DEVICE float root_approx(float x) { return x < 1.1754944e-38f ? 0.0f : emulate::spoiled(sqrtf(x), 1.2e-7f); }
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulate::mma<emulate::Bf16>(c, a, b0, b1);
}
DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulate::mma<emulate::Tf32>(c, a, b0, b1);
}
DEVICE void ldmatrix4(uint32_t (&r)[4], const uint32_t *row) { emulate::ldmatrix<4>(r, row); }
DEVICE void ldmatrix2(uint32_t (&r)[4], const uint32_t *row) { emulate::ldmatrix<2>(r, row); }

#endif

} // namespace isopleth
