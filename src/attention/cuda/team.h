// How threads share queries and keys: a team of WIDTH / 8 neighbouring threads holds SLOTS rows of a
// head, each thread 8 of their numbers.
//
// A thread then reads 8 numbers of a key for 8 · SLOTS products, as a register tile of a matrix product
// would. What products leave in every thread is added up over the team so that each ends with the sums
// of its OWN = SLOTS / team slots; what it makes of them goes back to all. The slots of a thread are numbered so
// that neither direction needs a choice: slot i is row i ^ `permutation`.
#pragma once
#include "bias.h"

namespace isopleth {

// Numbers of a row that one thread holds.
constexpr int PART = 8;
constexpr unsigned WARP = 0xffffffffu;
// Stands for a running maximum of −∞, so that differences stay numbers.
constexpr float LOWEST = -1e30f;

template <int WIDTH, int SLOTS> struct Team {
    static constexpr int SIZE = WIDTH / PART;
    // Slots whose sums a thread ends with: in a team larger than SLOTS several threads have the same.
    static constexpr int OWN = SLOTS > SIZE ? SLOTS / SIZE : 1;
    static constexpr int DOUBLED = SIZE > SLOTS ? SIZE / SLOTS : 1;

    MEMBER static int rank() { return (int)threadIdx.x % SIZE; }
    MEMBER static int permutation() {
        int all = 0, n = SLOTS;
        for (int bit = 1; bit < SIZE && n > 1; bit *= 2) {
            n /= 2;
            if (rank() & bit) all ^= n;
        }
        return all;
    }
    // Whether this thread is the first of those that own the same slots.
    MEMBER static bool first() { return rank() < (SIZE < SLOTS ? SIZE : SLOTS); }

    // Sums over the team, of which slots 0 … OWN − 1 are right afterwards.
    MEMBER static void add_up(float (&x)[SLOTS]) {
        int n = SLOTS;
        UNROLL
        for (int bit = 1; bit < SIZE; bit *= 2) {
            if (n > 1) {
                n /= 2;
                UNROLL
                for (int i = 0; i < SLOTS; ++i)
                    if (i < n) x[i] += __shfl_xor_sync(WARP, x[i + n], bit);
            } else {
                x[0] += __shfl_xor_sync(WARP, x[0], bit);
            }
        }
    }
    // From slots 0 … OWN − 1 of every thread to all slots of each.
    MEMBER static void hand_out(float (&x)[SLOTS]) {
        int n = OWN;
        UNROLL
        for (int bit = (SIZE < SLOTS ? SIZE : SLOTS) / 2; bit >= 1; bit /= 2) {
            UNROLL
            for (int i = 0; i < SLOTS; ++i)
                if (i < n) x[i + n] = __shfl_xor_sync(WARP, x[i], bit);
            n *= 2;
        }
    }
};

// Rows of keys, or of queries, side by side: ROWS of each of two kinds (WIDTH numbers a row), where
// they are, and up to three more numbers each.
template <int WIDTH, int ROWS, int MORE> struct Tile {
    float4 one[ROWS][WIDTH / 4], two[ROWS][WIDTH / 4], site[ROWS];
    float more[MORE][ROWS];
};

// Thread `me` of `all` zeroes what `fetch` never writes.
template <int WIDTH, int ROWS, int MORE>
DEVICE void clear(Tile<WIDTH, ROWS, MORE> *tiles, int count, int me, int all) {
    const int words = (int)sizeof(*tiles) / 16 * count;
    for (int i = me; i < words; i += all) ((float4 *)tiles)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// ROWS rows of `width` numbers, `step` apart, from `from` on: those from `left` on are zeros. `wide`
// where all of it is a matter of 16 bytes.
template <int WIDTH, int ROWS>
DEVICE void fetch(float4 (&to)[ROWS][WIDTH / 4], const float *from, size_t step, int width, int left, bool wide,
                  int me, int all) {
    if (wide) {
        const int pieces = width / 4;
        for (int i = me; i < ROWS * pieces; i += all) {
            const int j = i / pieces, x = i % pieces;
            const bool there = j < left;
            copy_async<16>(&to[j][x], there ? from + j * step + 4 * x : from, there);
        }
    } else {
        for (int i = me; i < ROWS * width; i += all) {
            const int j = i / width, x = i % width;
            const bool there = j < left;
            copy_async<4>((float *)to[j] + x, there ? from + j * step + x : from, there);
        }
    }
}

// ROWS numbers.
template <int ROWS> DEVICE void fetch(float (&to)[ROWS], const float *from, size_t step, int left, int me, int all) {
    for (int j = me; j < ROWS; j += all) copy_async<4>(&to[j], j < left ? from + j * step : from, j < left);
}

// Places of `dim` coordinates.
template <int ROWS>
DEVICE void fetch(float4 (&to)[ROWS], const float *from, int dim, int left, int me, int all) {
    for (int i = me; i < ROWS * dim; i += all) {
        const int j = i / dim, x = i % dim;
        copy_async<4>((float *)&to[j] + x, j < left ? from + (size_t)j * dim + x : from, j < left);
    }
}

// 8 numbers of a row of shared memory.
DEVICE void take(float (&to)[PART], const float4 *row, int rank) {
    const float4 a = row[2 * rank], b = row[2 * rank + 1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// 8 numbers of a row of global memory, times `scale`; 0 beyond its `width`, and if it is not `there`.
DEVICE void load(float (&to)[PART], const float *row, int rank, int width, bool there, float scale) {
    UNROLL
    for (int i = 0; i < PART; ++i) {
        const int x = rank * PART + i;
        to[i] = there && x < width ? row[x] * scale : 0.0f;
    }
}

DEVICE void store(float *row, const float (&from)[PART], int rank, int width, float scale) {
    UNROLL
    for (int i = 0; i < PART; ++i) {
        const int x = rank * PART + i;
        if (x < width) row[x] = from[i] * scale;
    }
}

// Products of every slot with one row: x[i] += slots[i] · row.
template <int SLOTS> DEVICE void multiply(float (&x)[SLOTS], const float (&slots)[SLOTS][PART], const float (&row)[PART]) {
    UNROLL
    for (int f = 0; f < PART; ++f) {
        UNROLL
        for (int i = 0; i < SLOTS; ++i) x[i] = fmaf(slots[i][f], row[f], x[i]);
    }
}
// sums[i] += x[i] · row.
template <int SLOTS> DEVICE void gather(float (&sums)[SLOTS][PART], const float (&x)[SLOTS], const float (&row)[PART]) {
    UNROLL
    for (int i = 0; i < SLOTS; ++i) {
        UNROLL
        for (int f = 0; f < PART; ++f) sums[i][f] = fmaf(x[i], row[f], sums[i][f]);
    }
}

DEVICE float4 place(const float *sites, size_t at, int dim) {
    const float *x = sites + at * dim;
    return make_float4(dim > 0 ? x[0] : 0.0f, dim > 1 ? x[1] : 0.0f, dim > 2 ? x[2] : 0.0f, dim > 3 ? x[3] : 0.0f);
}

// How scores depend on distance, for the compiler: not at all, one bump between sites of one or two
// coordinates on the plane, or any terms. A sink may be beside them.
enum Kind { NONE, BUMP, ANY };

template <int KIND> DEVICE float square(const float4 &a, const float4 &b) {
    const float x = a.x - b.x, y = a.y - b.y;
    const float two = fmaf(y, y, x * x);
    if constexpr (KIND == BUMP) return two;
    const float z = a.z - b.z, w = a.w - b.w;
    return fmaf(w, w, fmaf(z, z, two));
}

// Adds the bias between OWN slots at `sites` and N / OWN rows at `at`, and leaves squared distances in d2.
template <int KIND, int N, int OWN>
DEVICE void add_bias(const Problem &p, const Bent *terms, const float4 (&sites)[OWN], const float4 *at, float (&d2)[N],
                     float (&score)[N]) {
    if constexpr (KIND != NONE) {
        UNROLL
        for (int j = 0; j < N / OWN; ++j) {
            const float4 there = at[j];
            UNROLL
            for (int i = 0; i < OWN; ++i) d2[j * OWN + i] = square<KIND>(sites[i], there);
        }
    }
    if constexpr (KIND == BUMP) {
        const Bent t = terms[0];
        UNROLL
        for (int i = 0; i < N; ++i) score[i] = fmaf(bump(t.b * d2[i]), t.a, score[i]);
    }
    if constexpr (KIND == ANY) {
        if (p.globe) {
            UNROLL
            for (int i = 0; i < N; ++i) d2[i] = arc2(d2[i]);
        }
        NO_UNROLL
        for (int j = 0; j < p.terms; ++j) add_term<N>(terms[j], d2, score);
    }
}

// Score of the sink in powers of two, LOWEST without one. The first one counts.
DEVICE float sink_of(const Problem &p, const Bent *terms) {
    float top = LOWEST;
    for (int j = p.terms - 1; j >= 0; --j)
        if (terms[j].family == SINK) top = terms[j].a;
    return top;
}

} // namespace isopleth
