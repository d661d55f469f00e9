// Scan attention, exact f32: 8 queries to a team of threads (team.h), keys staged through shared memory.
//
// Source: Milakov & Gimelshein (2018), arXiv:1805.02867; keys split over blocks as in Dao et al. (2023),
// "Flash-Decoding"; rescaling when it matters, as in FlashAttention-4 (2025). Scores are held in
// powers of two. Compiles as CUDA (scan.cu) and, for tests, as C++ (tests/cuda/emulate.h).
//
// The floor, by arithmetic and never measured: keys and values 16 wide, one bump, Hopper. The compiler's
// loop over 4 keys (nvcc 13.0, sm_90, 218 registers, no spill) has about 830 instructions where nothing is
// rescaled or hidden, for 512 pairs of a warp: 510 FFMA of products, 158 other f32, 32 exponentials, 16
// shuffles each way, 23 loads of 16 bytes. One multiprocessor issues 4 a cycle: 0.41 cycles a pair and
// head; its f32 lanes alone would need 0.33, shared memory with shuffles 0.25, exponentials 0.13. At 132
// multiprocessors and 1.8 GHz that is 5.9e11 pairs and heads a second: 4.1 s for 100,000 keys, 1,048,576
// queries, 4 heads and 6 layers. Exponentials are not what holds it up: none is moved to the f32 lanes.
#pragma once
#include "team.h"

namespace isopleth {

// Keys that are staged together, and keys whose scores are held at once.
constexpr int KEYS = 32, STEP = 4;
// Queries of a team: as many as registers hold.
template <int WIDTH> constexpr int QUERIES_OF = WIDTH == 8 ? 4 : 8;
// A weight may exceed 1 by this many powers of two before sums are rescaled.
constexpr float HEADROOM = 8.0f;

// Which keys a block reads, where not all: lists of tiles of KEYS keys, one for every block of queries,
// nearest first, each with the squared distance between queries and keys. Keys are in an order in
// which tiles are compact.
struct Near {
    // [batch · block + 1]: where each list begins.
    const int *from;
    const int *tile;
    const float *gap2;
    // Numbers of the queries, block by block, [batch, target].
    const int *order;
    // [head]: squared straight line from which on nothing is read.
    const float *reach2;
    // [head, CELLS]: the largest bias at or beyond a squared straight line, powers of two.
    const float *envelope;
    // [batch, tile, head] and [batch, head]: longest keys.
    const float *norm, *longest;
    // [1]: tiles times queries that were read, over all blocks and heads.
    unsigned long long *tally;
    // Share of the weight below which a key is left out; 0 where none is.
    float share;
};

// As `Envelope` of src/attention/reader.rs: quarters of octaves from 2⁻⁴⁰ on.
constexpr int CELLS = 4 * 80;
DEVICE float beyond(const float *envelope, int head, float d2) {
    const int cell = (__float_as_int(d2) - ((127 - 40) << 23)) >> 21;
    return envelope[head * CELLS + (cell < 0 ? 0 : cell < CELLS ? cell : CELLS - 1)];
}

struct Given {
    const float *q, *kv, *params, *sites, *places, *mask;
};

using Bents = Bent[TERMS];

// The terms of a head, by the first threads of a block; a barrier is to follow.
DEVICE void bend(const Problem &p, Bent *terms, const float *params, int head) {
    if ((int)threadIdx.x < p.terms) terms[threadIdx.x] = bent(p, params, head, (int)threadIdx.x);
}
// The term that a kernel for one bump looks at.
DEVICE int bump_of(const Problem &p) {
    int at = 0;
    while (at + 1 < p.terms && family_of(p, at) != RBF) ++at;
    return at;
}

// Block (x, y, z): queries of head y in row z. Without `Near`, x is the block of queries times p.splits,
// and a part of the keys; answers of one part are `out` [batch, target, head, w] and `marks` [batch,
// target, 2 · head]: tops t and inverse weights r, so that the share of a key of score s is r 2^(s − t),
// r = 0 without a key. Answers of several parts are one behind the other, sums as they are, and weights
// in place of their inverses: for `combine`.
template <int WIDTH, int KIND, bool SPARSE>
DEVICE void scan(const Problem &p, const Given &in, const Near &near, float *out, float *marks) {
    constexpr int QUERIES = QUERIES_OF<WIDTH>;
    using Us = Team<WIDTH, QUERIES>;
    using Staged = Tile<WIDTH, KEYS, 1>;
    constexpr int OWN = Us::OWN;
    using Pair = Staged[2];
    SHARED(Pair, tiles, );
    SHARED(Bents, bends, );
    const int me = (int)threadIdx.x, all = (int)blockDim.x, rank = Us::rank(), turn = Us::permutation();
    const int head = (int)blockIdx.y, row = (int)blockIdx.z;
    const int here = SPARSE ? (int)blockIdx.x : (int)blockIdx.x / p.splits;
    const int part = SPARSE ? 0 : (int)blockIdx.x % p.splits;
    const int first = (here * (all / Us::SIZE) + me / Us::SIZE) * QUERIES;
    bend(p, bends, in.params, head);
    clear(tiles, 2, me, all);
    __syncthreads();
    const Bent *terms = KIND == BUMP ? bends + bump_of(p) : bends;

    // The team's queries; each thread has 8 numbers of all, and looks after OWN of them.
    float q[QUERIES][PART], sum[QUERIES][PART];
    float4 sites[OWN];
    float top[OWN], weight[OWN];
    [[maybe_unused]] float norm[OWN];
    const float scale = (float)LOG2_E / sqrtf((float)p.d);
    UNROLL
    for (int i = 0; i < QUERIES; ++i) {
        int number = first + (i ^ turn);
        const bool there = number < p.targets;
        number = there ? number : p.targets - 1;
        if (SPARSE) number = near.order[(size_t)row * p.targets + number];
        const size_t at = (size_t)row * p.targets + number;
        load(q[i], in.q + (at * p.heads + head) * p.d, rank, p.d, there, scale);
        UNROLL
        for (int f = 0; f < PART; ++f) sum[i][f] = 0.0f;
        if (i < OWN) sites[i] = place(in.sites, at, p.dim);
    }
    const float sink = part == 0 ? sink_of(p, bends) : LOWEST;
    UNROLL
    for (int i = 0; i < OWN; ++i) {
        top[i] = sink;
        weight[i] = sink > LOWEST ? 1.0f : 0.0f;
    }
    if constexpr (SPARSE) {
        float squares[QUERIES];
        UNROLL
        for (int i = 0; i < QUERIES; ++i) {
            squares[i] = 0.0f;
            UNROLL
            for (int f = 0; f < PART; ++f) squares[i] = fmaf(q[i][f], q[i][f], squares[i]);
        }
        Us::add_up(squares);
        UNROLL
        for (int i = 0; i < OWN; ++i) norm[i] = sqrtf(squares[i]) * 1.00001f;
    }

    const int count = (p.context + KEYS - 1) / KEYS;
    const int list = SPARSE ? row * ((int)gridDim.x) + here : 0;
    int next = SPARSE ? near.from[list] : (int)((long long)count * part / p.splits);
    const int end = SPARSE ? near.from[list + 1] : (int)((long long)count * (part + 1) / p.splits);

    // Whether keys no longer than `longest`, `gap2` or farther away, are too faint for every query.
    [[maybe_unused]] auto faint = [&](float longest, float gap2) {
        const float bias = beyond(near.envelope, head, gap2);
        bool each = true;
        UNROLL
        for (int i = 0; i < OWN; ++i) {
            // Asked this way round, so that NaN is read.
            const float most = exp2f(fminf(fmaf(norm[i], longest, bias) - top[i], 126.0f));
            each = each && (most <= weight[i] * near.share || first + (i ^ turn) >= p.targets);
        }
        return each;
    };
    // The next tile worth reading, −1 if there is none.
    auto seek = [&]() {
        if constexpr (!SPARSE) {
            return next < end ? next++ : -1;
        } else {
            while (next < end) {
                const int tile = near.tile[next];
                const float gap2 = near.gap2[next];
                if (gap2 >= near.reach2[head]) break; // what follows is farther still
                ++next;
                if (near.share == 0.0f) return tile;
                if (__syncthreads_and(faint(near.longest[row * p.heads + head], gap2))) break;
                if (!__syncthreads_and(faint(near.norm[((size_t)row * count + tile) * p.heads + head], gap2))) return tile;
            }
            next = end;
            return -1;
        }
    };
    auto stage = [&](Staged &to, int tile) {
        const int from = tile * KEYS, left = p.context - from, wide = p.d + p.w;
        const size_t at = (size_t)row * p.context + from;
        const float *kv = in.kv + (at * p.heads + head) * wide;
        fetch<WIDTH, KEYS>(to.one, kv, (size_t)p.heads * wide, p.d, left, p.wide_kv, me, all);
        fetch<WIDTH, KEYS>(to.two, kv + p.d, (size_t)p.heads * wide, p.w, left, p.wide_kv, me, all);
        if constexpr (KIND != NONE) fetch<KEYS>(to.site, in.places + at * p.dim, p.dim, left, me, all);
        fetch<KEYS>(to.more[0], in.mask + at, 1, left, me, all);
    };

    int now = seek();
    [[maybe_unused]] int read = 0;
    if (now >= 0) stage(tiles[0], now);
    copies_close();
    for (int turn = 0; now >= 0; turn ^= 1) {
        const int then = seek();
        if (then >= 0) stage(tiles[turn ^ 1], then);
        copies_close();
        copies_wait<1>();
        __syncthreads();
        const Staged &tile = tiles[turn];
        ++read;
        NO_UNROLL
        for (int from = 0; from < KEYS; from += STEP) {
            float score[STEP * OWN], d2[STEP * OWN];
            UNROLL
            for (int j = 0; j < STEP; ++j) {
                float key[PART], x[QUERIES];
                take(key, tile.one[from + j], rank);
                UNROLL
                for (int i = 0; i < QUERIES; ++i) x[i] = 0.0f;
                multiply<QUERIES>(x, q, key);
                Us::add_up(x);
                UNROLL
                for (int i = 0; i < OWN; ++i) score[j * OWN + i] = x[i];
            }
            add_bias<KIND, STEP * OWN, OWN>(p, terms, sites, tile.site + from, d2, score);
            const float4 mask = *(const float4 *)&tile.more[0][from];
            if (mask.x == 0.0f || mask.y == 0.0f || mask.z == 0.0f || mask.w == 0.0f) {
                UNROLL
                for (int i = 0; i < OWN; ++i) {
                    score[i] = mask.x != 0.0f ? score[i] : -INFINITY;
                    score[OWN + i] = mask.y != 0.0f ? score[OWN + i] : -INFINITY;
                    score[2 * OWN + i] = mask.z != 0.0f ? score[2 * OWN + i] : -INFINITY;
                    score[3 * OWN + i] = mask.w != 0.0f ? score[3 * OWN + i] : -INFINITY;
                }
            }
            float most[OWN];
            bool rise = false;
            UNROLL
            for (int i = 0; i < OWN; ++i) {
                most[i] = fmaxf(fmaxf(score[i], score[OWN + i]), fmaxf(score[2 * OWN + i], score[3 * OWN + i]));
                rise = rise || most[i] > top[i] + HEADROOM;
            }
            if (__any_sync(WARP, rise)) {
                float keep[QUERIES];
                UNROLL
                for (int i = 0; i < OWN; ++i) {
                    const float higher = fmaxf(most[i], top[i]);
                    keep[i] = exp2_approx(top[i] - higher);
                    top[i] = higher;
                    weight[i] *= keep[i];
                }
                Us::hand_out(keep);
                UNROLL
                for (int i = 0; i < QUERIES; ++i) {
                    UNROLL
                    for (int f = 0; f < PART; ++f) sum[i][f] *= keep[i];
                }
            }
            UNROLL
            for (int j = 0; j < STEP; ++j) {
                float value[PART], x[QUERIES];
                UNROLL
                for (int i = 0; i < OWN; ++i) {
                    // Exactly 0 for a key that is hidden or out of reach.
                    x[i] = exp2_approx(score[j * OWN + i] - top[i]);
                    weight[i] += x[i];
                }
                Us::hand_out(x);
                take(value, tile.two[from + j], rank);
                gather<QUERIES>(sum, x, value);
            }
        }
        __syncthreads();
        now = then;
    }
    copies_wait<0>();
    if constexpr (SPARSE) {
        const int each = all / Us::SIZE * QUERIES, queries = min(each, p.targets - here * each);
        if (me == 0) atomicAdd(near.tally, (unsigned long long)read * queries);
    }

    const bool whole = SPARSE || p.splits == 1;
    const size_t queries = (size_t)p.batch * p.targets;
    float inverse[QUERIES];
    UNROLL
    for (int i = 0; i < OWN; ++i) inverse[i] = !whole ? 1.0f : weight[i] > 0.0f ? 1.0f / weight[i] : 0.0f;
    Us::hand_out(inverse);
    UNROLL
    for (int i = 0; i < QUERIES; ++i) {
        int number = first + (i ^ turn);
        if (number >= p.targets) continue;
        if (SPARSE) number = near.order[(size_t)row * p.targets + number];
        const size_t at = part * queries + (size_t)row * p.targets + number;
        store(out + (at * p.heads + head) * p.w, sum[i], rank, p.w, inverse[i]);
        if (i < OWN) {
            marks[at * 2 * p.heads + head] = top[i];
            marks[(at * 2 + 1) * p.heads + head] = whole ? inverse[i] : weight[i];
        }
    }
}

// Parts of a split scan to one: each thread joins one number of one query and head.
DEVICE void combine(const Problem &p, const float *parts, const float *part_marks, float *out, float *marks) {
    const size_t queries = (size_t)p.batch * p.targets, numbers = queries * p.heads * p.w;
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= numbers) return;
    const size_t query = at / p.w / p.heads;
    const int head = (int)(at / p.w % p.heads);
    const size_t here = query * 2 * p.heads + head, step = queries * 2 * p.heads;
    float top = LOWEST;
    for (int i = 0; i < p.splits; ++i) top = fmaxf(top, part_marks[i * step + here]);
    float weight = 0.0f, sum = 0.0f;
    for (int i = 0; i < p.splits; ++i) {
        const float share = exp2_approx(part_marks[i * step + here] - top);
        weight = fmaf(part_marks[i * step + here + p.heads], share, weight);
        sum = fmaf(parts[i * numbers + at], share, sum);
    }
    const float inverse = weight > 0.0f ? 1.0f / weight : 0.0f;
    out[at] = sum * inverse;
    if (at % p.w == 0) {
        marks[here] = top;
        marks[here + p.heads] = inverse;
    }
}

} // namespace isopleth
