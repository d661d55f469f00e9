// Scan attention on tensor cores: a warp takes 16 or 32 queries of one head through the keys, 32 at a
// time. Products are mma.sync of bf16 or tf32 with f32 sums; distances, bias and softmax are f32 and
// happen where the accumulators lie.
//
// `Exact` writes each number as the sum of two tf32 and leaves out only the product of the two small
// ones (3xTF32: Markidis et al. 2018, arXiv:1803.04014; Ootomo & Yokota 2022, arXiv:2203.03341). Tensor
// cores cut sums off instead of rounding them, so that long sums would drift: they hold those of 32 keys
// only, which are then added in f32 (same source).
//
// Compiles as CUDA (tensor.cu) and, with tests/cuda/warp.h, as C++17: the tests run this very text.
#pragma once
#include "team.h"
#include "warp.h"

namespace isopleth {
namespace tensor {

// Threads of a block; tensor.rs launches as many.
constexpr int WARPS = 4, THREADS = 32 * WARPS;
// Keys that are weighed together.
constexpr int TOGETHER = 32;
// A score may pass the top by so many powers of two before sums are scaled down.
constexpr float SLACK = 8.0f;

// Numbers that are multiplied: PER of them in a 32-bit word, each the sum of PARTS; those of a query the
// sum of ROW_PARTS. What is rounded off a query bends all its scores the same way, and so does not average
// out over keys: it is kept as a second part.
struct Bf16 {
    static constexpr int PER = 2, PARTS = 1, PASSES = 1, ROW_PARTS = 2, ROW_PASSES = 2;
};
struct Tf32 {
    static constexpr int PER = 1, PARTS = 1, PASSES = 1, ROW_PARTS = 2, ROW_PASSES = 2;
};
struct Exact {
    static constexpr int PER = 1, PARTS = 2, PASSES = 3, ROW_PARTS = 2, ROW_PASSES = 3;
};

// The parts of one word that holds x, or x and y.
DEVICE void word(Bf16, float x, float y, uint32_t (&parts)[1]) { parts[0] = bf16_pair(x, y); }
DEVICE void word(Tf32, float x, float, uint32_t (&parts)[1]) { parts[0] = tf32(x); }
DEVICE void word(Exact, float x, float, uint32_t (&parts)[2]) {
    parts[0] = tf32(x);
    parts[1] = tf32(x - __uint_as_float(parts[0]));
}

// The same of a query's numbers.
template <class N> DEVICE void row_word(N, float x, float y, uint32_t (&parts)[2]) { word(Exact(), x, y, parts); }
DEVICE void row_word(Bf16, float x, float y, uint32_t (&parts)[2]) {
    parts[0] = bf16_pair(x, y);
    const float low = __uint_as_float(parts[0] << 16), high = __uint_as_float(parts[0] & 0xffff0000u);
    parts[1] = bf16_pair(x - low, y - high);
}

// The same of weights, which are finite: in fewer instructions.
DEVICE void weight_word(Bf16 n, float x, float y, uint32_t (&parts)[1]) { word(n, x, y, parts); }
DEVICE void weight_word(Tf32, float x, float, uint32_t (&parts)[1]) {
    parts[0] = (__float_as_uint(x) + 0x1000u) & ~0x1fffu;
}
DEVICE void weight_word(Exact, float x, float, uint32_t (&parts)[2]) {
    parts[0] = __float_as_uint(x) & ~0x1fffu;
    parts[1] = (__float_as_uint(x - __uint_as_float(parts[0])) + 0x1000u) & ~0x1fffu;
}

DEVICE void mma(Bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(c, a, b0, b1);
}
DEVICE void mma(Tf32, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_tf32(c, a, b0, b1);
}
DEVICE void mma(Exact, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_tf32(c, a, b0, b1);
}

// Which parts a pass multiplies: small by large first (and large by small), then large by large.
DEVICE constexpr int part_of_a(int pass, int passes) { return passes > 1 && pass == 0; }
DEVICE constexpr int part_of_b(int pass, int passes) { return passes == 3 && pass == 1; }

// One in every place of a column.
DEVICE uint32_t ones(Bf16) { return 0x3f803f80u; }
DEVICE uint32_t ones(Tf32) { return 0x3f800000u; }

// Keys of one head as a block of threads wants them in shared memory, and as pack() leaves them in
// global memory. Rows are 16 bytes longer than they need, so that 8 of them begin in different banks.
template <class N, int D, int W, int KEYS> struct Image {
    static constexpr int K_ROW = D / N::PER + 4, V_ROW = KEYS / N::PER + 4;
    uint32_t k[N::PARTS][KEYS][K_ROW];
    // Values stand upright, their keys in the order of in_place().
    uint32_t v[N::PARTS][W][V_ROW];
    float site[DIM][KEYS];
    // What a score starts from: 0, −∞ for a key that is not seen, or the bias of a layer.
    float start[KEYS];
};

// The key whose value stands at a place. As weights, a thread holds keys 2 q and 2 q + 1; as a factor
// in tf32 it must give the columns q and q + 4.
DEVICE int in_place(int at, int per) { return per == 2 ? at : (at & ~7) + 2 * (at & 3) + ((at >> 2) & 1); }

// Keys from KEYS · tile on, of one head of one row.
template <class N, int WIDTH, int KEYS>
DEVICE void pack(Image<N, WIDTH, WIDTH, KEYS> &image, const Problem &p, int row, int head, int tile, int me,
                      const float *kv, const float *places, const float *mask) {
    typedef Image<N, WIDTH, WIDTH, KEYS> Im;
    const int wide = p.d + p.w, left = p.context - tile * KEYS;
    const size_t at = (size_t)row * p.context + (size_t)tile * KEYS;
    const auto seen = [&](int key) { return key < left && mask[at + key] != 0.0f; };
    const auto number = [&](int key, int x, int most, int from) {
        return x < most && seen(key) ? kv[((at + key) * p.heads + head) * wide + from + x] : 0.0f;
    };
    uint32_t parts[N::PARTS];
    for (int i = me; i < KEYS * Im::K_ROW; i += THREADS) {
        const int key = i / Im::K_ROW, x = i % Im::K_ROW * N::PER;
        word(N(), number(key, x, p.d, 0), number(key, x + 1, p.d, 0), parts);
        for (int part = 0; part < N::PARTS; ++part) image.k[part][key][i % Im::K_ROW] = parts[part];
    }
    for (int i = me; i < WIDTH * Im::V_ROW; i += THREADS) {
        const int x = i / Im::V_ROW, j = i % Im::V_ROW * N::PER;
        const bool within = j < KEYS;
        const float a = within ? number(in_place(j, N::PER), x, p.w, p.d) : 0.0f;
        const float b = within && N::PER == 2 ? number(in_place(j + 1, N::PER), x, p.w, p.d) : 0.0f;
        word(N(), a, b, parts);
        for (int part = 0; part < N::PARTS; ++part) image.v[part][x][i % Im::V_ROW] = parts[part];
    }
    for (int i = me; i < DIM * KEYS; i += THREADS) {
        const int x = i / KEYS, key = i % KEYS;
        image.site[x][key] = x < p.dim && key < left ? places[(at + key) * p.dim + x] : 0.0f;
    }
    for (int key = me; key < KEYS; key += THREADS) image.start[key] = seen(key) ? 0.0f : -INFINITY;
}

// Sends an image on its way from global to shared memory, by all threads of a block.
template <class Im> DEVICE void fetch(Im *to, const Im *from, int me) {
    static_assert(sizeof(Im) % 16 == 0, "copied 16 bytes at a time");
    for (int i = me; i < (int)(sizeof(Im) / 16); i += THREADS)
        copy_async<16>((char *)to + 16 * i, (const char *)from + 16 * i, true);
}

// Rows of a matrix that a warp multiplies with images, 16 · TILES of them, and what it gathers.
//
// Lane l holds, of each 16 × 8 accumulator, columns 2 (l % 4) and the next, of rows l / 4 and l / 4 + 8.
template <class N, int D, int W, int TILES> struct Rows {
    static constexpr int STEPS = D / (8 * N::PER), BLOCKS = TOGETHER / 8, WIDE = W / 8;
    uint32_t row[TILES][STEPS][N::ROW_PARTS][4];
    float sum[TILES][WIDE][4];

    // The numbers of value(row, column), rows from 0 to 16 · TILES − 1.
    template <class F> MEMBER void start(int lane, F value) {
        const int group = lane >> 2, quad = lane & 3;
        UNROLL
        for (int m = 0; m < TILES; ++m) {
            UNROLL
            for (int s = 0; s < STEPS; ++s) {
                UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int at = 16 * m + group + 8 * (i & 1);
                    const int x = (8 * s + 4 * (i >> 1) + quad) * N::PER;
                    uint32_t parts[N::ROW_PARTS];
                    row_word(N(), value(at, x), N::PER == 2 ? value(at, x + 1) : 0.0f, parts);
                    UNROLL
                    for (int part = 0; part < N::ROW_PARTS; ++part) row[m][s][part][i] = parts[part];
                }
            }
            UNROLL
            for (int n = 0; n < WIDE; ++n) {
                UNROLL
                for (int e = 0; e < 4; ++e) sum[m][n][e] = 0.0f;
            }
        }
    }

    // Products with the keys from `first` on, added to what each starts from.
    template <class Im>
    MEMBER void scores(const Im &image, int first, int lane, float (&score)[TILES][BLOCKS][4]) const {
        const int quad = lane & 3;
        UNROLL
        for (int j = 0; j < BLOCKS; ++j) {
            const int key = first + 8 * j;
            const float even = image.start[key + 2 * quad], odd = image.start[key + 2 * quad + 1];
            UNROLL
            for (int m = 0; m < TILES; ++m) {
                score[m][j][0] = score[m][j][2] = even;
                score[m][j][1] = score[m][j][3] = odd;
            }
            // Two steps in each fourth of 16 words.
            uint32_t b[N::PARTS][(STEPS + 1) / 2][4];
            UNROLL
            for (int part = 0; part < N::PARTS; ++part) {
                UNROLL
                for (int s = 0; s < STEPS; s += 2) {
                    const uint32_t *at = &image.k[part][key + (lane & 7)][8 * s];
                    if (s + 1 < STEPS) ldmatrix4(b[part][s / 2], at + 4 * (lane >> 3));
                    else ldmatrix2(b[part][s / 2], at + 4 * ((lane >> 3) & 1));
                }
            }
            UNROLL
            for (int pass = 0; pass < N::ROW_PASSES; ++pass) {
                const int of_a = part_of_a(pass, N::ROW_PASSES), of_b = part_of_b(pass, N::ROW_PASSES);
                UNROLL
                for (int s = 0; s < STEPS; ++s) {
                    const uint32_t(&two)[4] = b[of_b][s / 2];
                    UNROLL
                    for (int m = 0; m < TILES; ++m)
                        mma(N(), score[m][j], row[m][s][of_a], two[2 * (s & 1)], two[2 * (s & 1) + 1]);
                }
            }
        }
    }

    // sum = keep · sum + Σ weight · value over the keys from `first` on. If TOTAL, the weights alone are
    // added up likewise: by the tensor cores, as they have been rounded, so that shares add up to 1;
    // Exact ones by each lane for itself, since its tensor cores have enough to do.
    template <bool TOTAL, class Im>
    MEMBER void gather(const Im &image, int first, int lane, const float (&weight)[TILES][BLOCKS][4],
                                const float (&keep)[TILES][2], float (&total)[TILES][2]) {
        constexpr int KEY_STEPS = TOGETHER / (8 * N::PER);
        float part[TILES][WIDE][4], all[TILES][4];
        UNROLL
        for (int m = 0; m < TILES; ++m) {
            UNROLL
            for (int e = 0; e < 4; ++e) {
                all[m][e] = 0.0f;
                UNROLL
                for (int n = 0; n < WIDE; ++n) part[m][n][e] = 0.0f;
            }
        }
        UNROLL
        for (int pair = 0; pair < KEY_STEPS; pair += 2) {
            uint32_t a[2][TILES][N::PARTS][4];
            UNROLL
            for (int s = 0; s < 2; ++s) {
                UNROLL
                for (int m = 0; m < TILES; ++m) {
                    UNROLL
                    for (int i = 0; i < 4; ++i) {
                        // Rows are those of the accumulator; see in_place() for the columns.
                        const int half = 2 * (i & 1), step = pair + s;
                        uint32_t parts[N::PARTS];
                        if (N::PER == 2) {
                            const float(&pairs)[4] = weight[m][2 * step + (i >> 1)];
                            weight_word(N(), pairs[half], pairs[half + 1], parts);
                        } else {
                            weight_word(N(), weight[m][step][half + (i >> 1)], 0.0f, parts);
                        }
                        UNROLL
                        for (int of = 0; of < N::PARTS; ++of) a[s][m][of][i] = parts[of];
                    }
                    if constexpr (TOTAL && N::PARTS == 1) mma(N(), all[m], a[s][m][0], ones(N()), ones(N()));
                }
            }
            UNROLL
            for (int n = 0; n < WIDE; ++n) {
                uint32_t b[N::PARTS][4];
                UNROLL
                for (int of = 0; of < N::PARTS; ++of)
                    ldmatrix4(b[of], &image.v[of][8 * n + (lane & 7)][first / N::PER + 8 * pair + 4 * (lane >> 3)]);
                UNROLL
                for (int pass = 0; pass < N::PASSES; ++pass) {
                    const int of_a = part_of_a(pass, N::PASSES), of_b = part_of_b(pass, N::PASSES);
                    UNROLL
                    for (int s = 0; s < 2; ++s) {
                        UNROLL
                        for (int m = 0; m < TILES; ++m)
                            mma(N(), part[m][n], a[s][m][of_a], b[of_b][2 * s], b[of_b][2 * s + 1]);
                    }
                }
            }
        }
        UNROLL
        for (int m = 0; m < TILES; ++m) {
            UNROLL
            for (int e = 0; e < 4; ++e) {
                UNROLL
                for (int n = 0; n < WIDE; ++n) sum[m][n][e] = fmaf(sum[m][n][e], keep[m][e >> 1], part[m][n][e]);
            }
            if (TOTAL) {
                if (N::PARTS == 2) {
                    UNROLL
                    for (int j = 0; j < BLOCKS; ++j) {
                        UNROLL
                        for (int e = 0; e < 4; ++e) all[m][e & 2] += weight[m][j][e];
                    }
                }
                // Else every column holds the same.
                UNROLL
                for (int half = 0; half < 2; ++half)
                    total[m][half] = fmaf(total[m][half], keep[m][half], all[m][2 * half]);
            }
        }
    }
};

// add_term() of bias.h, where products are rounded to bf16 or tf32: roots and logarithms need then be no
// better than the hardware's own.
template <int COUNT> DEVICE void quick_term(const Bent &t, const float (&d2)[COUNT], float (&score)[COUNT]) {
    const auto each = [&](auto value) {
        UNROLL
        for (int i = 0; i < COUNT; ++i) score[i] = value(d2[i], score[i]);
    };
    const auto root = [](float x) { return root_approx(x); };
    const auto lost = [](float s, float x) { return 0.69314718f * log2_approx(1.0f + x) - s; };
    switch (t.family) {
    case SCALAR: each([&](float d2, float s) { return fmaf(root(d2), t.a, s); }); break;
    case TISA:
        each([&](float d2, float s) {
            const float u = root(d2) - t.c;
            return fmaf(exp2_approx(fminf(t.b * u * u, 96.0f)), t.a, s);
        });
        break;
    case EXPONENTIAL:
        each([&](float d2, float s) { return fmaf(exp2_approx(fminf(t.b * root(d2), 96.0f)), t.a, s); });
        break;
    case SQUARED_EXPONENTIAL: each([&](float d2, float s) { return fmaf(d2, t.a, s); }); break;
    case MATERN_32:
        each([&](float d2, float s) {
            const float x = fminf(t.b * root(d2), 1e18f);
            return fmaf(lost(x, x), t.a, s);
        });
        break;
    case MATERN_52:
        each([&](float d2, float s) {
            const float x = fminf(t.b * root(d2), 1e18f);
            return fmaf(lost(x, fmaf(x, x * (1.0f / 3.0f), x)), t.a, s);
        });
        break;
    default: isopleth::add_term(t, d2, score); break;
    }
}

template <class N, int COUNT> DEVICE void bias_term(const Bent &t, const float (&d2)[COUNT], float (&score)[COUNT]) {
    if (t.family == RBF && t.b <= 0.0f) {
        // The usual one, which does not grow and so need not be held below a largest exponent.
        UNROLL
        for (int i = 0; i < COUNT; ++i) score[i] = fmaf(exp2_approx(t.b * d2[i]), t.a, score[i]);
    } else if (N::PARTS == 2) {
        add_term(t, d2, score);
    } else {
        quick_term(t, d2, score);
    }
}

// What a block of threads is to do: targets from number `block` · 16 · TILES · WARPS on, of one head of
// one row, against the keys of part `part` of p.splits.
struct Place {
    int me, block, head, row, part;
};

// Attention of one block. `out` `[part, batch, target, head, w]` and `marks` `[part, batch, target,
// 2 · head]` are those of scan.h; the sink belongs to part 0.
template <class N, int WIDTH, int TILES, int KEYS, int STAGES>
DEVICE void attend(const Problem &p, const Place &at, Image<N, WIDTH, WIDTH, KEYS> *stages, Bent *terms,
                        const Image<N, WIDTH, WIDTH, KEYS> *images, const float *q, const float *params,
                        const float *sites, float *out, float *marks) {
    typedef Rows<N, WIDTH, WIDTH, TILES> R;
    const int lane = at.me & 31, group = lane >> 2, quad = lane & 3;
    const int first = (at.block * WARPS + at.me / 32) * 16 * TILES;
    const int tiles = (p.context + KEYS - 1) / KEYS;
    const int begin = (int)((long long)tiles * at.part / p.splits);
    const int end = (int)((long long)tiles * (at.part + 1) / p.splits);
    images += ((size_t)at.row * p.heads + at.head) * tiles;

    UNROLL
    for (int s = 0; s < STAGES - 1; ++s) {
        if (begin + s < end) fetch(stages + s, images + begin + s, at.me);
        copies_close();
    }
    if (at.me < p.terms) terms[at.me] = bent(p, params, at.head, at.me);

    const auto target = [&](int row) {
        const int t = first + row;
        return (size_t)at.row * p.targets + (t < p.targets ? t : p.targets - 1);
    };
    R rows;
    const float scale = (float)LOG2_E / sqrtf((float)p.d);
    rows.start(lane, [&](int row, int x) {
        return x < p.d ? q[(target(row) * p.heads + at.head) * p.d + x] * scale : 0.0f;
    });
    float asked[TILES][2][DIM], top[TILES][2], weight[TILES][2];
    UNROLL
    for (int m = 0; m < TILES; ++m) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
            UNROLL
            for (int i = 0; i < DIM; ++i)
                asked[m][half][i] = i < p.dim ? sites[target(16 * m + group + 8 * half) * p.dim + i] : 0.0f;
            top[m][half] = LOWEST;
            weight[m][half] = 0.0f;
        }
    }

    for (int tile = begin; tile < end; ++tile) {
        copies_wait<STAGES - 2>();
        // The image is here for all, and nobody reads the one before any more.
        __syncthreads();
        const int next = tile + STAGES - 1;
        if (next < end) fetch(stages + (next - begin) % STAGES, images + next, at.me);
        copies_close();
        if (tile == begin && at.part == 0) {
            // Terms are there now. The first sink counts: it is a key that was met before all others.
            for (int j = p.terms - 1; j >= 0; --j) {
                if (terms[j].family != SINK) continue;
                UNROLL
                for (int m = 0; m < TILES; ++m) top[m][0] = top[m][1] = terms[j].a, weight[m][0] = weight[m][1] = N::PARTS == 1 || quad == 0;
            }
        }
        if (first >= p.targets) continue;
        const Image<N, WIDTH, WIDTH, KEYS> &image = stages[(tile - begin) % STAGES];
        // Not unrolled: registers hold one set of scores.
        NO_UNROLL
        for (int key = 0; key < KEYS; key += TOGETHER) {
            float score[TILES][R::BLOCKS][4];
            rows.scores(image, key, lane, score);
            if (p.terms > 0) {
                UNROLL
                for (int j = 0; j < R::BLOCKS; j += 2) {
                    float d2[TILES * 8], some[TILES * 8];
                    UNROLL
                    for (int i = 0; i < TILES * 8; ++i) d2[i] = 0.0f, some[i] = score[i / 8][j + i / 4 % 2][i % 4];
                    UNROLL
                    for (int x = 0; x < DIM; ++x) {
                        if (x >= p.dim) break;
                        UNROLL
                        for (int i = 0; i < TILES * 8; ++i) {
                            const int here = key + 8 * (j + i / 4 % 2) + 2 * quad + (i & 1);
                            const float gap = asked[i / 8][i / 2 % 2][x] - image.site[x][here];
                            d2[i] = fmaf(gap, gap, d2[i]);
                        }
                    }
                    if (p.globe) {
                        UNROLL
                        for (int i = 0; i < TILES * 8; ++i) d2[i] = arc2(d2[i]);
                    }
                    for (int term = 0; term < p.terms; ++term) bias_term<N>(terms[term], d2, some);
                    UNROLL
                    for (int i = 0; i < TILES * 8; ++i) score[i / 8][j + i / 4 % 2][i % 4] = some[i];
                }
            }
            float high[TILES][2], keep[TILES][2];
            bool above = false;
            UNROLL
            for (int m = 0; m < TILES; ++m) {
                UNROLL
                for (int half = 0; half < 2; ++half) {
                    high[m][half] = -INFINITY;
                    keep[m][half] = 1.0f;
                    UNROLL
                    for (int j = 0; j < R::BLOCKS; ++j)
                        high[m][half] = fmaxf(high[m][half], fmaxf(score[m][j][2 * half], score[m][j][2 * half + 1]));
                    above |= high[m][half] > top[m][half] + SLACK;
                }
            }
            // Rare after the first keys. A row's four lanes must agree on its top.
            if (__any_sync(WARP, above)) {
                UNROLL
                for (int m = 0; m < TILES; ++m) {
                    UNROLL
                    for (int half = 0; half < 2; ++half) {
                        float most = fmaxf(high[m][half], __shfl_xor_sync(WARP, high[m][half], 1));
                        most = fmaxf(fmaxf(most, __shfl_xor_sync(WARP, most, 2)), top[m][half]);
                        keep[m][half] = exp2_approx(top[m][half] - most);
                        top[m][half] = most;
                    }
                }
            }
            UNROLL
            for (int m = 0; m < TILES; ++m) {
                UNROLL
                for (int j = 0; j < R::BLOCKS; ++j) {
                    UNROLL
                    for (int e = 0; e < 4; ++e) score[m][j][e] = exp2_approx(score[m][j][e] - top[m][e >> 1]);
                }
            }
            rows.template gather<true>(image, key, lane, score, keep, weight);
        }
    }
    copies_wait<0>();
    if (N::PARTS == 2) {
        UNROLL
        for (int m = 0; m < TILES; ++m) {
            UNROLL
            for (int half = 0; half < 2; ++half) {
                weight[m][half] += __shfl_xor_sync(WARP, weight[m][half], 1);
                weight[m][half] += __shfl_xor_sync(WARP, weight[m][half], 2);
            }
        }
    }

    const size_t before = (size_t)at.part * p.batch * p.targets;
    UNROLL
    for (int m = 0; m < TILES; ++m) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * m + group + 8 * half;
            if (first + row >= p.targets) continue;
            const size_t here = before + target(row);
            // Parts leave sums and weights as they are: combine() of scan.h divides.
            const float inverse = weight[m][half] > 0.0f ? 1.0f / weight[m][half] : 0.0f;
            const float by = p.splits > 1 ? 1.0f : inverse;
            UNROLL
            for (int n = 0; n < R::WIDE; ++n) {
                UNROLL
                for (int e = 0; e < 2; ++e) {
                    const int x = 8 * n + 2 * quad + e;
                    if (x < p.w) out[(here * p.heads + at.head) * p.w + x] = rows.sum[m][n][2 * half + e] * by;
                }
            }
            if (quad == 0) {
                marks[here * 2 * p.heads + at.head] = top[m][half];
                marks[(here * 2 + 1) * p.heads + at.head] = p.splits > 1 ? weight[m][half] : inverse;
            }
        }
    }
}

// How the kernel of each kind and width goes about it: see plan.inc.
template <class N, int WIDTH> struct Plan;
#define PLAN(NUMBERS, WIDTH, OF_WARP, OF_IMAGE, ON_THEIR_WAY, BYTES)                                        \
    template <> struct Plan<NUMBERS, WIDTH> {                                                               \
        static constexpr int TILES = OF_WARP, KEYS = OF_IMAGE, STAGES = ON_THEIR_WAY;                       \
        typedef Image<NUMBERS, WIDTH, WIDTH, KEYS> Im;                                                      \
        static_assert(sizeof(Im) == BYTES, "tensor.rs makes room for so many");                             \
        /* Shared memory of a block. */                                                                     \
        static constexpr size_t ROOM = STAGES * sizeof(Im) + TERMS * sizeof(Bent);                          \
    };
#include "plan.inc"
#undef PLAN

// Block (x, y, z) packs image x of head y of row z.
template <class N, int WIDTH>
DEVICE void pack_block(const Problem &p, const float *kv, const float *places, const float *mask, void *images) {
    typedef Plan<N, WIDTH> P;
    const size_t at = ((size_t)blockIdx.z * p.heads + blockIdx.y) * gridDim.x + blockIdx.x;
    pack<N, WIDTH, P::KEYS>(((typename P::Im *)images)[at], p, blockIdx.z, blockIdx.y, blockIdx.x, threadIdx.x, kv, places,
                            mask);
}

// Block (x, y, z) answers head y of row z; along x are blocks of targets, for each part of the keys.
template <class N, int WIDTH>
DEVICE void attend_block(const Problem &p, const void *images, const float *q, const float *params, const float *sites,
                         float *out, float *marks) {
    DYNAMIC_SHARED(room);
    typedef Plan<N, WIDTH> P;
    typename P::Im *stages = (typename P::Im *)room;
    const int blocks = gridDim.x / p.splits;
    const Place at = {(int)threadIdx.x, (int)blockIdx.x % blocks, (int)blockIdx.y, (int)blockIdx.z,
                      (int)blockIdx.x / blocks};
    attend<N, WIDTH, P::TILES, P::KEYS, P::STAGES>(p, at, stages, (Bent *)(stages + P::STAGES),
                                                   (const typename P::Im *)images, q, params, sites, out, marks);
}

} // namespace tensor
} // namespace isopleth
