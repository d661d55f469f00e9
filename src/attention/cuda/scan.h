// Scan attention for one query at a time: what the kernel computes, without the machine it runs on.
//
// Compiles as CUDA (scan.cu) and as C++17 (tests/contract/scan_host.cpp), so that its arithmetic is
// tested where there is no GPU. Source: Milakov & Gimelshein (2018), arXiv:1805.02867; the bias
// families are those of src/attention/bias.rs, where their sources stand.
//
// Scores are held in powers of two, as in src/fused/softmax.rs. Everything is f32.
#pragma once

#ifdef __CUDACC__
#define ISOPLETH_FN static __device__ __forceinline__
#define ISOPLETH_MEMBER __device__ __forceinline__
#define ISOPLETH_UNROLL _Pragma("unroll")
#else
#include <cmath>
#include <cstddef>
#define ISOPLETH_FN static inline
#define ISOPLETH_MEMBER inline
#define ISOPLETH_UNROLL
#endif

namespace isopleth {

// Keys that are staged together, and keys whose scores are held before they are weighed.
constexpr int KEYS = 32, STEP = 8;
// Coordinates of a site, padded with zeros.
constexpr int DIM = 4;
// Terms of a bias; their families in 4 bits each.
constexpr int TERMS = 16;
// Stands for a running maximum of −∞, so that differences stay numbers.
constexpr float LOWEST = -1e30f;
constexpr double LOG2_E = 1.4426950408889634;

// In the order of `Term::ALL`.
enum Term { SCALAR, RBF, TISA, EXPONENTIAL, SQUARED_EXPONENTIAL, MATERN_32, MATERN_52, WENDLAND, SINK };

// Sizes and kinds, the same for every query.
struct Problem {
    int targets, context, heads, d, w, dim, terms;
    // Families of the terms, the first in the lowest 4 bits.
    unsigned long long families;
    // Whether straight lines are chords of the unit sphere.
    int globe;
};

// One term with its parameters: a in powers of two, −b so for bumps (which are powers of two then).
struct Bent {
    int family;
    float a, b, c;
};

ISOPLETH_FN Bent bent(const Problem &p, const float *params, int head, int term) {
    const float *abc = params + ((size_t)head * p.terms + term) * 3;
    Bent t;
    t.family = (int)(p.families >> (4 * term)) & 15;
    t.a = (float)(abc[0] * LOG2_E);
    t.b = abc[1];
    t.c = abc[2];
    switch (t.family) {
    case RBF:
    case TISA:
    case EXPONENTIAL: t.b = (float)(-abc[1] * LOG2_E); break;
    case SQUARED_EXPONENTIAL: t.a = (float)(-0.5 * LOG2_E * abc[0] * abc[1] * abc[1]); break;
    case MATERN_32: t.b = sqrtf(3.0f) * fabsf(abc[1]); break;
    case MATERN_52: t.b = sqrtf(5.0f) * fabsf(abc[1]); break;
    case WENDLAND: t.b = fabsf(abc[1]); break;
    }
    return t;
}

// Squared great-circle distance from the squared chord: half the angle is asin x, x = c / 2; from
// x = ½ on it is π/2 − 2 asin √((1 − x) / 2). The polynomial is that of Cephes, right to 2e-7.
ISOPLETH_FN float arc2(float chord2) {
    float x2 = fminf(0.25f * chord2, 1.0f);
    bool far = x2 > 0.25f;
    float z = far ? 0.5f - 0.5f * sqrtf(x2) : x2;
    float p = 4.21632e-2f;
    p = fmaf(p, z, 2.418131e-2f);
    p = fmaf(p, z, 4.5470026e-2f);
    p = fmaf(p, z, 7.4953e-2f);
    p = fmaf(p, z, 1.6666752e-1f);
    p = fmaf(p, z, 1.0f);
    float angle = fmaf(-4.0f * sqrtf(z), p, 3.14159265f);
    return far ? angle * angle : chord2 * p * p;
}

// Log of the Wendland correlation at u < 1, u the distance over the support.
ISOPLETH_FN float log_wendland(float u) {
    // Near 0 the correlation is 1 − u² (10 − 20u + 15u² − 4u³): no digit of u² is lost.
    if (u < 0.25f) return log1pf(-fmaf(fmaf(fmaf(-4.0f, u, 15.0f), u, -20.0f), u, 10.0f) * u * u);
    float v = 1.0f - u, v2 = v * v;
    return logf(v2 * v2 * fmaf(4.0f, u, 1.0f));
}

// 2ˣ, held where a bump that grows (b < 0) would leave f32.
ISOPLETH_FN float bump(float x) { return exp2f(fminf(x, 96.0f)); }

// The score with one term added, at squared distance d2; −∞ outside a compact support.
ISOPLETH_FN float with_term(const Bent &t, float d2, float score) {
    switch (t.family) {
    case SCALAR: return fmaf(sqrtf(d2), t.a, score);
    case RBF: return fmaf(bump(t.b * d2), t.a, score);
    case TISA: {
        float u = sqrtf(d2) - t.c;
        return fmaf(bump(t.b * u * u), t.a, score);
    }
    case EXPONENTIAL: return fmaf(bump(t.b * sqrtf(d2)), t.a, score);
    case SQUARED_EXPONENTIAL: return fmaf(d2, t.a, score);
    case MATERN_32: {
        float s = fminf(t.b * sqrtf(d2), 1e18f);
        return fmaf(log1pf(s) - s, t.a, score);
    }
    case MATERN_52: {
        float s = fminf(t.b * sqrtf(d2), 1e18f);
        return fmaf(log1pf(fmaf(s, s * (1.0f / 3.0f), s)) - s, t.a, score);
    }
    case WENDLAND: {
        float u = t.b * sqrtf(d2);
        return u < 1.0f ? fmaf(log_wendland(u), t.a, score) : -INFINITY;
    }
    default: return score;
    }
}

// Keys of one head side by side: what a block of threads stages in shared memory.
template <int WIDTH> struct Tile {
    float k[KEYS][WIDTH], v[KEYS][WIDTH], site[KEYS][DIM];
    bool seen[KEYS];
};

// Thread `me` of `all` loads its part of the keys from number `first` on; padding is 0, and keys
// beyond the last are not seen.
template <int WIDTH>
ISOPLETH_FN void stage(Tile<WIDTH> &tile, const Problem &p, int row, int head, int first, int me, int all,
                       const float *kv, const float *places, const float *mask) {
    const int wide = p.d + p.w, left = p.context - first;
    const size_t at = (size_t)row * p.context + first;
    for (int i = me; i < KEYS * WIDTH; i += all) {
        int j = i / WIDTH, x = i % WIDTH;
        tile.k[j][x] = j < left && x < p.d ? kv[((at + j) * p.heads + head) * wide + x] : 0.0f;
    }
    for (int i = me; i < KEYS * WIDTH; i += all) {
        int j = i / WIDTH, x = i % WIDTH;
        tile.v[j][x] = j < left && x < p.w ? kv[((at + j) * p.heads + head) * wide + p.d + x] : 0.0f;
    }
    for (int i = me; i < KEYS * DIM; i += all) {
        int j = i / DIM, x = i % DIM;
        tile.site[j][x] = j < left && x < p.dim ? places[(at + j) * p.dim + x] : 0.0f;
    }
    for (int j = me; j < KEYS; j += all) tile.seen[j] = j < left && mask[at + j] != 0.0f;
}

// One query of one head, with what it has gathered.
template <int WIDTH> struct Query {
    float q[WIDTH], sum[WIDTH], site[DIM], top, weight;

    // Number `target` of `row`; no key has been met, save the sink where there is one.
    ISOPLETH_MEMBER void start(const Problem &p, int row, int head, int target, const float *queries,
                               const float *sites, const Bent *terms) {
        const size_t at = (size_t)row * p.targets + target;
        const float scale = (float)LOG2_E / sqrtf((float)p.d);
        ISOPLETH_UNROLL
        for (int i = 0; i < WIDTH; ++i) q[i] = i < p.d ? queries[(at * p.heads + head) * p.d + i] * scale : 0.0f;
        ISOPLETH_UNROLL
        for (int i = 0; i < WIDTH; ++i) sum[i] = 0.0f;
        ISOPLETH_UNROLL
        for (int i = 0; i < DIM; ++i) site[i] = i < p.dim ? sites[at * p.dim + i] : 0.0f;
        top = LOWEST;
        weight = 0.0f;
        for (int j = p.terms - 1; j >= 0; --j)
            if (terms[j].family == SINK) top = terms[j].a, weight = 1.0f; // the first one counts
    }

    // Meets the keys of a tile.
    ISOPLETH_MEMBER void meet(const Problem &p, const Tile<WIDTH> &tile, const Bent *terms) {
        for (int first = 0; first < KEYS; first += STEP) {
            float score[STEP], next = top;
            ISOPLETH_UNROLL
            for (int j = 0; j < STEP; ++j) {
                score[j] = tile.seen[first + j] ? scored(p, tile, first + j, terms) : -INFINITY;
                next = fmaxf(next, score[j]);
            }
            if (next > top) {
                const float keep = exp2f(top - next);
                top = next;
                weight *= keep;
                ISOPLETH_UNROLL
                for (int i = 0; i < WIDTH; ++i) sum[i] *= keep;
            }
            ISOPLETH_UNROLL
            for (int j = 0; j < STEP; ++j) {
                // Exactly 0 for a key that is hidden or out of reach.
                const float share = exp2f(score[j] - top);
                weight += share;
                ISOPLETH_UNROLL
                for (int i = 0; i < WIDTH; ++i) sum[i] = fmaf(share, tile.v[first + j][i], sum[i]);
            }
        }
    }

    // The score of one key, powers of two.
    ISOPLETH_MEMBER float scored(const Problem &p, const Tile<WIDTH> &tile, int key, const Bent *terms) const {
        float score = 0.0f;
        ISOPLETH_UNROLL
        for (int i = 0; i < WIDTH; ++i) score = fmaf(q[i], tile.k[key][i], score);
        if (p.terms > 0) {
            float d2 = 0.0f;
            ISOPLETH_UNROLL
            for (int i = 0; i < DIM; ++i) {
                const float gap = site[i] - tile.site[key][i];
                d2 = fmaf(gap, gap, d2);
            }
            if (p.globe) d2 = arc2(d2);
            for (int j = 0; j < p.terms; ++j) score = with_term(terms[j], d2, score);
        }
        return score;
    }

    // Writes the answer `[batch, target, head, w]`, and `[batch, target, 2 · head]`: tops, then
    // inverse weights, so that the share of a key of score s is r 2^(s − t). r is 0 without a key.
    ISOPLETH_MEMBER void finish(const Problem &p, int row, int head, int target, float *out, float *marks) const {
        const size_t at = (size_t)row * p.targets + target;
        const float inverse = weight > 0.0f ? 1.0f / weight : 0.0f;
        ISOPLETH_UNROLL
        for (int i = 0; i < WIDTH; ++i)
            if (i < p.w) out[(at * p.heads + head) * p.w + i] = sum[i] * inverse;
        marks[at * 2 * p.heads + head] = top;
        marks[(at * 2 + 1) * p.heads + head] = inverse;
    }
};

} // namespace isopleth
