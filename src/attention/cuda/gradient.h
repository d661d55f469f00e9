// Gradients of scan attention, exact f32 and without atomics: the same sums in the same order, always.
//
// Weights are recomputed from the marks that the forward pass left. One kernel gives the gradient of
// queries, reading keys as the forward pass does; the other that of keys, values and the bias, with the
// parts exchanged: a team holds 4 keys, and queries are staged. Source: Dao et al. (2022),
// arXiv:2205.14135, algorithm 4. Laws as those of src/fused/softmax_gradient.rs.
#pragma once
#include "scan.h"

namespace isopleth {

// Rows of a team: queries of one kernel, keys of the other; and rows that meet them at once, as many as
// registers hold.
constexpr int HELD = 4;
template <int WIDTH, int NUMBERS> constexpr int MEET = WIDTH == 8 || (WIDTH == 16 && NUMBERS == 4) ? 2 : 4;

struct Learnt {
    // [batch, target, head, w]: the gradient of the answer.
    const float *grad;
    // [batch, target, 2 · head]: tops and inverse weights.
    const float *marks;
    // [batch, target, head]: o · g.
    const float *means;
};

// Each thread: o · g of one query and head.
DEVICE void means(const Problem &p, const float *out, const float *grad, float *to) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)p.batch * p.targets * p.heads) return;
    float sum = 0.0f;
    for (int i = 0; i < p.w; ++i) sum = fmaf(out[at * p.w + i], grad[at * p.w + i], sum);
    to[at] = sum;
}

// Block (x, y, z): gradients of queries of head y in row z.
template <int WIDTH, int KIND>
DEVICE void gradient_queries(const Problem &p, const Given &in, const Learnt &learnt, float *to) {
    using Us = Team<WIDTH, HELD>;
    using Staged = Tile<WIDTH, KEYS, 1>;
    constexpr int OWN = Us::OWN;
    constexpr int STEP = MEET<WIDTH, 3>;
    using Pair = Staged[2];
    SHARED(Pair, tiles, );
    SHARED(Bents, bends, );
    const int me = (int)threadIdx.x, all = (int)blockDim.x, rank = Us::rank(), turn = Us::permutation();
    const int head = (int)blockIdx.y, row = (int)blockIdx.z;
    const int first = ((int)blockIdx.x * (all / Us::SIZE) + me / Us::SIZE) * HELD;
    bend(p, bends, in.params, head);
    clear(tiles, 2, me, all);
    __syncthreads();
    const Bent *terms = KIND == BUMP ? bends + bump_of(p) : bends;

    float q[HELD][PART], grad[HELD][PART], sum[HELD][PART];
    float4 sites[OWN];
    float top[OWN], inverse[OWN], mean[OWN];
    const float scale = 1.0f / sqrtf((float)p.d);
    UNROLL
    for (int i = 0; i < HELD; ++i) {
        const int number = first + (i ^ turn);
        const bool there = number < p.targets;
        const size_t at = (size_t)row * p.targets + (there ? number : p.targets - 1);
        load(q[i], in.q + (at * p.heads + head) * p.d, rank, p.d, there, (float)LOG2_E * scale);
        load(grad[i], learnt.grad + (at * p.heads + head) * p.w, rank, p.w, there, 1.0f);
        UNROLL
        for (int f = 0; f < PART; ++f) sum[i][f] = 0.0f;
        if (i < OWN) {
            sites[i] = place(in.sites, at, p.dim);
            inverse[i] = there ? learnt.marks[(at * 2 + 1) * p.heads + head] : 0.0f;
            // Far above any score where there was no key: weight 0.
            top[i] = inverse[i] > 0.0f ? learnt.marks[at * 2 * p.heads + head] : INFINITY;
            mean[i] = learnt.means[at * p.heads + head];
        }
    }
    const int count = (p.context + KEYS - 1) / KEYS, wide = p.d + p.w;
    auto stage = [&](Staged &tile, int number) {
        const int from = number * KEYS, left = p.context - from;
        const size_t at = (size_t)row * p.context + from;
        const float *kv = in.kv + (at * p.heads + head) * wide;
        fetch<WIDTH, KEYS>(tile.one, kv, (size_t)p.heads * wide, p.d, left, p.wide_kv, me, all);
        fetch<WIDTH, KEYS>(tile.two, kv + p.d, (size_t)p.heads * wide, p.w, left, p.wide_kv, me, all);
        if constexpr (KIND != NONE) fetch<KEYS>(tile.site, in.places + at * p.dim, p.dim, left, me, all);
        fetch<KEYS>(tile.more[0], in.mask + at, 1, left, me, all);
    };
    stage(tiles[0], 0);
    copies_close();
    for (int now = 0; now < count; ++now) {
        if (now + 1 < count) stage(tiles[(now + 1) & 1], now + 1);
        copies_close();
        copies_wait<1>();
        __syncthreads();
        const Staged &tile = tiles[now & 1];
        NO_UNROLL
        for (int from = 0; from < KEYS; from += STEP) {
            float score[STEP * OWN], slope[STEP * OWN], d2[STEP * OWN];
            UNROLL
            for (int j = 0; j < STEP; ++j) {
                float part[PART], x[HELD], y[HELD];
                UNROLL
                for (int i = 0; i < HELD; ++i) x[i] = y[i] = 0.0f;
                take(part, tile.one[from + j], rank);
                multiply<HELD>(x, q, part);
                take(part, tile.two[from + j], rank);
                multiply<HELD>(y, grad, part);
                Us::add_up(x);
                Us::add_up(y);
                UNROLL
                for (int i = 0; i < OWN; ++i) score[j * OWN + i] = x[i], slope[j * OWN + i] = y[i];
            }
            add_bias<KIND, STEP * OWN, OWN>(p, terms, sites, tile.site + from, d2, score);
            UNROLL
            for (int j = 0; j < STEP; ++j) {
                const bool seen = tile.more[0][from + j] != 0.0f;
                float part[PART], x[HELD];
                UNROLL
                for (int i = 0; i < OWN; ++i) {
                    const float weight = exp2_approx(score[j * OWN + i] - top[i]) * inverse[i];
                    x[i] = seen ? weight * (slope[j * OWN + i] - mean[i]) : 0.0f;
                }
                Us::hand_out(x);
                take(part, tile.one[from + j], rank);
                gather<HELD>(sum, x, part);
            }
        }
        __syncthreads();
    }
    copies_wait<0>();
    UNROLL
    for (int i = 0; i < HELD; ++i) {
        const int number = first + (i ^ turn);
        if (number >= p.targets) continue;
        const size_t at = (size_t)row * p.targets + number;
        store(to + (at * p.heads + head) * p.d, sum[i], rank, p.d, scale);
    }
}

// Block (x, y, z): gradients of keys and values of head y in row z, and the block's part of those of the
// bias: [batch, head, block, term, 3]. Dynamic shared memory: 3 doubles for every term and thread.
template <int WIDTH, int KIND>
DEVICE void gradient_keys(const Problem &p, const Given &in, const Learnt &learnt, float *to, double *parts) {
    using Us = Team<WIDTH, HELD>;
    using Staged = Tile<WIDTH, KEYS, 3>;
    constexpr int OWN = Us::OWN;
    constexpr int STEP = MEET<WIDTH, 4>;
    using Pair = Staged[2];
    SHARED(Pair, tiles, );
    SHARED(Bents, bends, );
    DYNAMIC_SHARED(dynamic);
    double *const sums = (double *)dynamic; // [term, 3, thread]
    const int me = (int)threadIdx.x, all = (int)blockDim.x, rank = Us::rank(), turn = Us::permutation();
    const int head = (int)blockIdx.y, row = (int)blockIdx.z;
    const int first = ((int)blockIdx.x * (all / Us::SIZE) + me / Us::SIZE) * HELD;
    bend(p, bends, in.params, head);
    clear(tiles, 2, me, all);
    for (int i = 0; i < 3 * p.terms; ++i) sums[i * all + me] = 0.0;
    __syncthreads();
    const int only = KIND == BUMP ? bump_of(p) : 0;
    const Bent *terms = bends + only;

    float key[HELD][PART], value[HELD][PART], key_sum[HELD][PART], value_sum[HELD][PART];
    float4 sites[OWN];
    bool seen[OWN];
    const int wide = p.d + p.w;
    const float scale = 1.0f / sqrtf((float)p.d);
    UNROLL
    for (int i = 0; i < HELD; ++i) {
        const int number = first + (i ^ turn);
        const bool there = number < p.context;
        const size_t at = (size_t)row * p.context + (there ? number : p.context - 1);
        const float *kv = in.kv + (at * p.heads + head) * wide;
        load(key[i], kv, rank, p.d, there, (float)LOG2_E * scale);
        load(value[i], kv + p.d, rank, p.w, there, 1.0f);
        UNROLL
        for (int f = 0; f < PART; ++f) key_sum[i][f] = value_sum[i][f] = 0.0f;
        if (i < OWN) {
            sites[i] = place(in.places, at, p.dim);
            seen[i] = there && in.mask[at] != 0.0f;
        }
    }
    const int count = (p.targets + KEYS - 1) / KEYS;
    auto stage = [&](Staged &tile, int number) {
        const int from = number * KEYS, left = p.targets - from;
        const size_t at = (size_t)row * p.targets + from, each = at * p.heads + head;
        fetch<WIDTH, KEYS>(tile.one, in.q + each * p.d, (size_t)p.heads * p.d, p.d, left, p.wide_q, me, all);
        fetch<WIDTH, KEYS>(tile.two, learnt.grad + each * p.w, (size_t)p.heads * p.w, p.w, left, p.wide_q, me, all);
        if constexpr (KIND != NONE) fetch<KEYS>(tile.site, in.sites + at * p.dim, p.dim, left, me, all);
        const float *marks = learnt.marks + at * 2 * p.heads + head;
        fetch<KEYS>(tile.more[0], marks, 2 * p.heads, left, me, all);
        fetch<KEYS>(tile.more[1], marks + p.heads, 2 * p.heads, left, me, all);
        fetch<KEYS>(tile.more[2], learnt.means + each, p.heads, left, me, all);
    };
    stage(tiles[0], 0);
    copies_close();
    for (int now = 0; now < count; ++now) {
        if (now + 1 < count) stage(tiles[(now + 1) & 1], now + 1);
        copies_close();
        copies_wait<1>();
        __syncthreads();
        const Staged &tile = tiles[now & 1];
        [[maybe_unused]] float bump_slopes[3] = {0.0f, 0.0f, 0.0f};
        NO_UNROLL
        for (int from = 0; from < KEYS; from += STEP) {
            float score[STEP * OWN], slope[STEP * OWN], d2[STEP * OWN];
            UNROLL
            for (int j = 0; j < STEP; ++j) {
                float part[PART], x[HELD], y[HELD];
                UNROLL
                for (int i = 0; i < HELD; ++i) x[i] = y[i] = 0.0f;
                take(part, tile.one[from + j], rank);
                multiply<HELD>(x, key, part);
                take(part, tile.two[from + j], rank);
                multiply<HELD>(y, value, part);
                Us::add_up(x);
                Us::add_up(y);
                UNROLL
                for (int i = 0; i < OWN; ++i) score[j * OWN + i] = x[i], slope[j * OWN + i] = y[i];
            }
            add_bias<KIND, STEP * OWN, OWN>(p, terms, sites, tile.site + from, d2, score);
            UNROLL
            for (int j = 0; j < STEP; ++j) {
                const float top = tile.more[0][from + j], inverse = tile.more[1][from + j];
                const float mean = tile.more[2][from + j];
                float part[PART], x[HELD];
                UNROLL
                for (int i = 0; i < OWN; ++i) {
                    const float weight = exp2_approx(score[j * OWN + i] - top) * inverse;
                    x[i] = seen[i] && inverse > 0.0f ? weight : 0.0f;
                    slope[j * OWN + i] = x[i] * (slope[j * OWN + i] - mean);
                }
                Us::hand_out(x);
                take(part, tile.two[from + j], rank);
                gather<HELD>(value_sum, x, part);
                UNROLL
                for (int i = 0; i < OWN; ++i) x[i] = slope[j * OWN + i];
                Us::hand_out(x);
                take(part, tile.one[from + j], rank);
                gather<HELD>(key_sum, x, part);
            }
            if constexpr (KIND == BUMP) {
                const float *abc = in.params + ((size_t)head * p.terms + only) * 3;
                const float learned[3] = {abc[0], abc[1], abc[2]};
                // Named, so that no choice is left to run time.
                Bent bump = terms[0];
                bump.family = RBF;
                add_slopes<STEP * OWN>(bump, learned, d2, slope, bump_slopes);
            }
            if constexpr (KIND == ANY) {
                NO_UNROLL
                for (int j = 0; j < p.terms; ++j) {
                    const float *abc = in.params + ((size_t)head * p.terms + j) * 3;
                    const float learned[3] = {abc[0], abc[1], abc[2]};
                    float slopes[3] = {0.0f, 0.0f, 0.0f};
                    add_slopes<STEP * OWN>(terms[j], learned, d2, slope, slopes);
                    UNROLL
                    for (int i = 0; i < 3; ++i) sums[(3 * j + i) * all + me] += (double)slopes[i];
                }
            }
        }
        if constexpr (KIND == BUMP) {
            sums[3 * only * all + me] += (double)bump_slopes[0];
            sums[(3 * only + 1) * all + me] += (double)bump_slopes[1];
        }
        __syncthreads();
    }
    copies_wait<0>();
    UNROLL
    for (int i = 0; i < HELD; ++i) {
        const int number = first + (i ^ turn);
        if (number >= p.context) continue;
        float *at = to + (((size_t)row * p.context + number) * p.heads + head) * wide;
        store(at, key_sum[i], rank, p.d, scale);
        store(at + p.d, value_sum[i], rank, p.w, 1.0f);
    }
    // Several threads of a large team have the same sums: the first counts.
    const int step = Us::SIZE, counted = Us::SIZE / Us::DOUBLED;
    for (int i = me; i < 3 * p.terms; i += all) {
        double sum = 0.0;
        for (int j = 0; j < all; ++j)
            if (j % step < counted) sum += sums[i * all + j];
        parts[((size_t)(row * p.heads + head) * gridDim.x + blockIdx.x) * 3 * p.terms + i] = sum;
    }
}

// One block for each head: parts of the bias's gradient added up, always in the same order, and the
// sink's beside them: `to` [head, term, 3]. Dynamic shared memory: a double for every thread.
DEVICE void gradient_bias(const Problem &p, const float *params, const Learnt &learnt, const double *parts, int blocks,
                          float *to) {
    DYNAMIC_SHARED(dynamic);
    double *const shares = (double *)dynamic;
    const int me = (int)threadIdx.x, all = (int)blockDim.x, head = (int)blockIdx.x;
    int sink = -1;
    for (int j = p.terms - 1; j >= 0; --j)
        if (family_of(p, j) == SINK) sink = j;
    for (int i = 0; i < 3 * p.terms; ++i) {
        double sum = 0.0;
        if (i == 3 * sink) {
            // Value 0 leaves only the softmax term: ds = −w (o · g).
            const float score = bent(p, params, head, sink).a;
            for (int at = me; at < p.batch * p.targets; at += all) {
                const float *marks = learnt.marks + (size_t)at * 2 * p.heads + head;
                const float weight = marks[p.heads] * exp2_approx(score - marks[0]);
                sum -= (double)(weight * learnt.means[(size_t)at * p.heads + head]);
            }
        } else if (family_of(p, i / 3) != SINK) {
            for (int at = me; at < p.batch * blocks; at += all) {
                const size_t part = ((size_t)(at / blocks) * p.heads + head) * blocks + at % blocks;
                sum += parts[part * 3 * p.terms + i];
            }
        }
        shares[me] = sum;
        __syncthreads();
        if (me == 0) {
            sum = 0.0;
            for (int j = 0; j < all; ++j) sum += shares[j];
            to[(size_t)head * 3 * p.terms + i] = (float)sum;
        }
        __syncthreads();
    }
}

} // namespace isopleth
