// Tensor cores on the processor, for tests: where each lane of a warp holds what of a matrix, as the
// PTX ISA says (sections "Matrix Fragments for mma.m16n8k16" and "… mma.m16n8k8", and ldmatrix), and
// sums as bad as published measurements of the hardware.
//
// Rounding, from Fasi et al. (2021), "Numerical behavior of NVIDIA tensor cores", for the A100: products
// are exact; a few at a time (8 in bf16, 4 in tf32) they and the accumulator are cut off at one bit below
// the last of the largest, added exactly, and the sum is cut off to f32. Later cards keep more bits.
#pragma once
#include "emulate.h"

#include <cmath>
#include <cstdint>

namespace emulate {

// To the nearest bf16, ties to even; its bits.
inline uint32_t bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// To the nearest tf32, ties away from zero; its bits as f32.
inline uint32_t tf32(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}
inline double number(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Of every kind: depth, products that are added at a time, and where element i of a and b of a lane is.
// `element` reads number i of a lane's registers.
struct Bf16 {
    static constexpr int DEPTH = 16, AT_A_TIME = 8, OF_A = 8, OF_B = 4;
    static int row_of_a(int lane, int i) { return i < 2 || (4 <= i && i < 6) ? lane >> 2 : (lane >> 2) + 8; }
    static int column_of_a(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8); }
    static int row_of_b(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8); }
    static double element(const uint32_t *registers, int i) {
        return number(i & 1 ? registers[i / 2] & 0xffff0000u : registers[i / 2] << 16);
    }
};
struct Tf32 {
    static constexpr int DEPTH = 8, AT_A_TIME = 4, OF_A = 4, OF_B = 2;
    static int row_of_a(int lane, int i) { return i == 0 || i == 2 ? lane >> 2 : (lane >> 2) + 8; }
    static int column_of_a(int lane, int i) { return lane % 4 + (i < 2 ? 0 : 4); }
    static int row_of_b(int lane, int i) { return lane % 4 + (i == 0 ? 0 : 4); }
    // The hardware reads no bit beyond those of tf32.
    static double element(const uint32_t *registers, int i) { return number(registers[i] & ~0x1fffu); }
};
inline int column_of_b(int lane) { return lane >> 2; }
inline int row_of_c(int lane, int i) { return i < 2 ? lane >> 2 : (lane >> 2) + 8; }
inline int column_of_c(int lane, int i) { return lane % 4 * 2 + (i & 1); }

// c + Σ x, cut off as described above.
inline float cut_sum(double c, const double *x, int count) {
    double largest = std::fabs(c), plain = c;
    for (int i = 0; i < count; ++i) largest = std::fmax(largest, std::fabs(x[i])), plain += x[i];
    if (!std::isfinite(plain) || largest == 0.0) return (float)plain;
    // 24 bits, and one more.
    uint64_t bits;
    std::memcpy(&bits, &largest, 8);
    const int exponent = (int)(bits >> 52) - 1023;
    const auto power = [](int e) {
        const uint64_t bits = (uint64_t)(e + 1023) << 52;
        double x;
        std::memcpy(&x, &bits, 8);
        return x;
    };
    const double unit = power(24 - exponent);
    int64_t sum = (int64_t)(c * unit);
    for (int i = 0; i < count; ++i) sum += (int64_t)(x[i] * unit);
    int64_t step = 1;
    while ((sum < 0 ? -sum : sum) / step >= 1 << 24) step *= 2;
    return (float)((double)(sum / step * step) * power(exponent - 24));
}

struct Operands {
    float c[4];
    uint32_t a[4], b[2];
};
struct Result {
    float d[4];
};

template <class Kind> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Operands mine;
    std::memcpy(mine.c, c, sizeof c);
    std::memcpy(mine.a, a, sizeof a);
    mine.b[0] = b0, mine.b[1] = b1;
    const Result result = collective<Operands, Result>(
        ~0u, mine, [](const Operands *const *in, Result *const *out, unsigned) {
            double a[16][Kind::DEPTH], b[8][Kind::DEPTH];
            for (int lane = 0; lane < 32; ++lane) {
                for (int i = 0; i < Kind::OF_A; ++i)
                    a[Kind::row_of_a(lane, i)][Kind::column_of_a(lane, i)] = Kind::element(in[lane]->a, i);
                for (int i = 0; i < Kind::OF_B; ++i)
                    b[column_of_b(lane)][Kind::row_of_b(lane, i)] = Kind::element(in[lane]->b, i);
            }
            for (int lane = 0; lane < 32; ++lane)
                for (int i = 0; i < 4; ++i) {
                    const double *row = a[row_of_c(lane, i)], *column = b[column_of_c(lane, i)];
                    float sum = in[lane]->c[i];
                    for (int from = 0; from < Kind::DEPTH; from += Kind::AT_A_TIME) {
                        double products[Kind::AT_A_TIME];
                        for (int k = 0; k < Kind::AT_A_TIME; ++k) products[k] = row[from + k] * column[from + k];
                        sum = cut_sum(sum, products, Kind::AT_A_TIME);
                    }
                    out[lane]->d[i] = sum;
                }
        });
    std::memcpy(c, result.d, sizeof c);
}

struct Words {
    uint32_t of[4];
};

template <int COUNT> void ldmatrix(uint32_t (&r)[4], const uint32_t *row) {
    if ((uintptr_t)row % 16) fail("ldmatrix reads rows of 16 bytes, aligned to as much");
    if ((const unsigned char *)row < arena || (const unsigned char *)row + 16 > arena + sizeof arena)
        fail("ldmatrix reads shared memory only");
    const Words words = collective<const uint32_t *, Words>(
        ~0u, row, [](const uint32_t *const *const *in, Words *const *out, unsigned) {
            for (int i = 0; i < COUNT; ++i)
                for (int lane = 0; lane < 32; ++lane) out[lane]->of[i] = (*in[8 * i + lane / 4])[lane % 4];
        });
    for (int i = 0; i < COUNT; ++i) r[i] = words.of[i];
}

} // namespace emulate
