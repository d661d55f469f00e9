// The target side of deep kernel attention in one go: gelu(x W₁ + b₁) M + b₂, where x is a site beside its
// token and M the second layer of φ times what a context was summed up to. A warp takes 16 sites through
// 32 hidden features at a time, as tensor.h takes queries through keys; no feature goes to memory.
//
// Products are pairs of tf32 (Exact of tensor.h). Source of the attention: Jenson et al.,
// arXiv:2411.12502. Compiles as CUDA (dka.cu) and as C++17, which the tests run.
#pragma once
#include "tensor.h"

namespace isopleth {
namespace dka {

using tensor::Exact;
using tensor::THREADS;
using tensor::TOGETHER;
using tensor::WARPS;

// Coordinates and token together, and what is given, are padded to these.
constexpr int INPUTS = 80, OUTPUTS = 64;
constexpr int TILES = 1, STAGES = 2;
// Sites of a block; dka.rs launches for as many.
constexpr int SITES = 16 * TILES * WARPS;

typedef tensor::Image<Exact, INPUTS, OUTPUTS, TOGETHER> Im;

// Shared memory of a block.
constexpr size_t ROOM = STAGES * sizeof(Im);
static_assert(sizeof(Im) == 40576, "dka.rs makes room for so many");

// Sizes; dka.rs has them too.
struct Sizes {
    int batch, sites, dim, width, hidden, outputs;
};

// Image x of row z: 32 hidden features with their columns of `weight` [dim + width, hidden], their `bias`
// [hidden], and their rows of `matrix` [batch, hidden, outputs].
DEVICE void pack_block(const Sizes &n, const float *weight, const float *bias, const float *matrix, void *images) {
    Im &image = ((Im *)images)[(size_t)blockIdx.z * gridDim.x + blockIdx.x];
    const int first = blockIdx.x * TOGETHER, inputs = n.dim + n.width, me = threadIdx.x;
    uint32_t parts[Exact::PARTS];
    for (int i = me; i < TOGETHER * Im::K_ROW; i += THREADS) {
        const int feature = first + i / Im::K_ROW, x = i % Im::K_ROW;
        const bool there = feature < n.hidden && x < inputs;
        tensor::word(Exact(), there ? weight[(size_t)x * n.hidden + feature] : 0.0f, 0.0f, parts);
        for (int part = 0; part < Exact::PARTS; ++part) image.k[part][i / Im::K_ROW][x] = parts[part];
    }
    for (int i = me; i < OUTPUTS * Im::V_ROW; i += THREADS) {
        const int x = i / Im::V_ROW, at = i % Im::V_ROW, feature = first + tensor::in_place(at, Exact::PER);
        const bool there = at < TOGETHER && feature < n.hidden && x < n.outputs;
        const size_t row = (size_t)blockIdx.z * n.hidden + feature;
        tensor::word(Exact(), there ? matrix[row * n.outputs + x] : 0.0f, 0.0f, parts);
        for (int part = 0; part < Exact::PARTS; ++part) image.v[part][x][at] = parts[part];
    }
    // Nobody reads them, but all of an image is copied.
    for (int i = me; i < DIM * TOGETHER; i += THREADS) image.site[i / TOGETHER][i % TOGETHER] = 0.0f;
    for (int i = me; i < TOGETHER; i += THREADS) image.start[i] = first + i < n.hidden ? bias[first + i] : 0.0f;
}

// The tanh form, as a logistic function.
DEVICE float gelu(float x) {
    const float twice = 2.3022082f * fmaf(0.044715f * x * x, x, x); // 2 log₂ e √(2/π)
    return x / (1.0f + exp2_approx(-twice));
}

// Block (x, 1, z): sites from SITES x on, of row z. `sites` [batch, site, dim], `tokens` [batch, site,
// width], `shift` [batch, outputs]; `out` [batch, site, outputs].
DEVICE void read_block(const Sizes &n, const void *packed, const float *sites, const float *tokens, const float *shift,
                       float *out) {
    DYNAMIC_SHARED(room);
    Im *stages = (Im *)room;
    const int me = threadIdx.x, lane = me & 31, group = lane >> 2, quad = lane & 3, row = blockIdx.z;
    const int first = blockIdx.x * SITES + me / 32 * 16 * TILES;
    const int tiles = (n.hidden + TOGETHER - 1) / TOGETHER;
    const Im *images = (const Im *)packed + (size_t)row * tiles;
    UNROLL
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < tiles) tensor::fetch(stages + s, images + s, me);
        copies_close();
    }
    const auto site = [&](int at) {
        const int t = first + at;
        return (size_t)row * n.sites + (t < n.sites ? t : n.sites - 1);
    };
    tensor::Rows<Exact, INPUTS, OUTPUTS, TILES> rows;
    rows.start(lane, [&](int at, int x) {
        if (x < n.dim) return sites[site(at) * n.dim + x];
        return x < n.dim + n.width ? tokens[site(at) * n.width + x - n.dim] : 0.0f;
    });
    float none[TILES][2] = {};
    const float keep[TILES][2] = {{1.0f, 1.0f}};
    NO_UNROLL
    for (int tile = 0; tile < tiles; ++tile) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        const int next = tile + STAGES - 1;
        if (next < tiles) tensor::fetch(stages + next % STAGES, images + next, me);
        copies_close();
        if (first >= n.sites) continue;
        const Im &image = stages[tile % STAGES];
        float feature[TILES][TOGETHER / 8][4];
        rows.scores(image, 0, lane, feature);
        UNROLL
        for (int m = 0; m < TILES; ++m) {
            UNROLL
            for (int j = 0; j < TOGETHER / 8; ++j) {
                UNROLL
                for (int e = 0; e < 4; ++e) feature[m][j][e] = gelu(feature[m][j][e]);
            }
        }
        rows.gather<false>(image, 0, lane, feature, keep, none);
    }
    copies_wait<0>();
    UNROLL
    for (int m = 0; m < TILES; ++m) {
        UNROLL
        for (int b = 0; b < OUTPUTS / 8; ++b) {
            UNROLL
            for (int e = 0; e < 4; ++e) {
                const int at = 16 * m + group + 8 * (e >> 1), x = 8 * b + 2 * quad + (e & 1);
                if (first + at < n.sites && x < n.outputs)
                    out[site(at) * n.outputs + x] = rows.sum[m][b][e] + shift[(size_t)row * n.outputs + x];
            }
        }
    }
}

} // namespace dka
} // namespace isopleth
