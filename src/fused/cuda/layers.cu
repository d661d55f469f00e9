// What stands between two matrix products: bias, activation, residual, layer normalisation, and their
// gradients. f32, any width. Rust's side is enabled.rs; tests run these very kernels on the processor
// (tests/cuda/layers.cpp).
//
// Every sum has a fixed order that depends on the shape alone: rows are cut into spans of SPAN, the sums
// of spans are written out and folded in their order. No atomics, so the same input gives the same bits.
#include "../../attention/cuda/machine.h"

using namespace isopleth;

namespace {

constexpr int LANES = 32, WARPS = 8;
// Rows whose sums one block makes, as in enabled.rs.
constexpr int SPAN = 64;
constexpr float EPSILON = 1e-6f;
enum Act { NONE, GELU, RELU };

// ½ (1 + tanh(√(2/π) (x + 0.044715 x³))) = 1 / (1 + 2ᵗ), as fused/gelu.rs has it.
DEVICE float gate(float x) {
    const float t = x * fmaf(x * x, -0.10294324f, -2.3022082f);
    if (!(t < 126.0f)) return t != t ? t : 0.0f;
    return 1.0f / (1.0f + exp2f(t > -126.0f ? t : -126.0f));
}

DEVICE float act(int mode, float x) {
    if (mode == GELU) return x * gate(x);
    if (mode == RELU) return x > 0.0f ? x : 0.0f;
    return x;
}

DEVICE float slope(int mode, float x) {
    if (mode == GELU) {
        const float s = gate(x), turn = 1.5957691f * x * fmaf(3.0f * 0.044715f * x, x, 1.0f);
        return fmaf(s * (1.0f - s), turn, s);
    }
    if (mode == RELU) return x > 0.0f ? 1.0f : 0.0f;
    return 1.0f;
}

// The sum over a warp, in every lane, each lane adding in the same order.
DEVICE float warp_sum(float x) {
    UNROLL for (int by = LANES / 2; by > 0; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

// Mean and reciprocal standard deviation of a row, by a warp.
DEVICE float2 moments(const float *x, int width) {
    const int lane = threadIdx.x % LANES;
    float sum = 0.0f;
    for (int i = lane; i < width; i += LANES) sum += x[i];
    const float mean = warp_sum(sum) / width;
    sum = 0.0f;
    for (int i = lane; i < width; i += LANES) sum = fmaf(x[i] - mean, x[i] - mean, sum);
    return make_float2(mean, 1.0f / sqrtf(warp_sum(sum) / width + EPSILON));
}

} // namespace

// After a product z = x W: z += bias, and y = act(z) + residual. Without an activation y may be z, and z
// is then written once. `residual` may be null.
extern "C" __global__ void epilogue(float *z, const float *bias, const float *residual, float *y, long long n,
                                    int width, int mode) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x) {
        const float before = z[i] + bias[i % width];
        if (mode != NONE) z[i] = before;
        y[i] = act(mode, before) + (residual ? residual[i] : 0.0f);
    }
}

// y = act(x), for an activation that follows no product.
extern "C" __global__ void activate(const float *x, float *y, long long n, int mode) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x)
        y[i] = act(mode, x[i]);
}

// y = a + b.
extern "C" __global__ void add(const float *a, const float *b, float *y, long long n) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x)
        y[i] = a[i] + b[i];
}

// dz = g · act′(z) (not written without an activation: it is g), and the sums of its columns over spans
// of rows, [span, width]: the gradient of a bias. Blocks of LANES × WARPS, a grid of spans × columns/LANES.
extern "C" __global__ void slopes(const float *z, const float *g, float *dz, float *sums, int rows, int width, int mode) {
    SHARED(float, part, [WARPS][LANES]);
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int column = blockIdx.y * LANES + lane;
    const int first = blockIdx.x * SPAN, last = min(first + SPAN, rows);
    float sum = 0.0f;
    if (column < width)
        for (int row = first + warp; row < last; row += WARPS) {
            const long long at = (long long)row * width + column;
            float d = g[at];
            if (mode != NONE) dz[at] = d = d * slope(mode, z[at]);
            sum += d;
        }
    part[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < width) {
        for (int w = 1; w < WARPS; ++w) sum += part[w][lane];
        sums[(long long)blockIdx.x * width + column] = sum;
    }
}

// to += the sums of spans in their order, [count, width] → [width]; columns from `half` on go to `more`.
// One block for LANES columns; its warps take neighbouring spans.
extern "C" __global__ void fold(const float *sums, float *to, float *more, int count, int width, int half) {
    SHARED(float, part, [WARPS][LANES]);
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int column = blockIdx.x * LANES + lane;
    const int each = (count + WARPS - 1) / WARPS, last = min((warp + 1) * each, count);
    float sum = 0.0f;
    if (column < width)
        for (int i = warp * each; i < last; ++i) sum += sums[(long long)i * width + column];
    part[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < width) {
        for (int w = 1; w < WARPS; ++w) sum += part[w][lane];
        float *const there = column < half ? to + column : more + (column - half);
        *there += sum;
    }
}

// y = (x − mean) / √(var + 1e-6) · scale + shift, a warp for each row.
extern "C" __global__ void norm_forward(const float *x, const float *scale, const float *shift, float *y, int rows,
                                        int width) {
    const int lane = threadIdx.x % LANES, row = blockIdx.x * WARPS + threadIdx.x / LANES;
    if (row >= rows) return;
    x += (long long)row * width;
    y += (long long)row * width;
    const float2 m = moments(x, width);
    for (int i = lane; i < width; i += LANES) y[i] = fmaf((x[i] - m.x) * m.y, scale[i], shift[i]);
}

// The gradient of norm_forward: dx (+ residual, which may be null), and sums over spans of rows of
// g · normalised and of g, [span, 2 · width]. Dynamic shared memory: WARPS · 2 · width floats.
extern "C" __global__ void norm_backward(const float *x, const float *g, const float *scale, const float *residual,
                                         float *dx, float *sums, int rows, int width) {
    DYNAMIC_SHARED(held);
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    float *const mine = (float *)held + warp * 2 * width;
    for (int i = lane; i < 2 * width; i += LANES) mine[i] = 0.0f;
    const int first = blockIdx.x * SPAN, last = min(first + SPAN, rows);
    for (int row = first + warp; row < last; row += WARPS) {
        const long long at = (long long)row * width;
        const float2 m = moments(x + at, width);
        float a = 0.0f, b = 0.0f;
        for (int i = lane; i < width; i += LANES) {
            const float normal = (x[at + i] - m.x) * m.y, d = g[at + i];
            mine[i] += d * normal;
            mine[width + i] += d;
            a += d * scale[i];
            b = fmaf(d * scale[i], normal, b);
        }
        a = warp_sum(a) / width;
        b = warp_sum(b) / width;
        for (int i = lane; i < width; i += LANES) {
            const float normal = (x[at + i] - m.x) * m.y;
            const float d = m.y * (g[at + i] * scale[i] - a - normal * b);
            dx[at + i] = residual ? d + residual[at + i] : d;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * width; i += WARPS * LANES) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; ++w) sum += ((float *)held)[w * 2 * width + i];
        sums[(long long)blockIdx.x * 2 * width + i] = sum;
    }
}

// Parameters of a bias kept in their range: raw · (1 − logged − folded) + sign · exp(raw · logged)
// + |raw| · folded; or, with a gradient g, g times the slope of that. `each` numbers of the last three.
extern "C" __global__ void constrain(const float *raw, const float *logged, const float *sign, const float *folded,
                                     const float *g, float *out, int n, int each) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const float l = logged[i % each], s = sign[i % each], f = folded[i % each];
        const float grown = expf(raw[i] * l) * s, plain = 1.0f - l - f;
        if (g)
            out[i] = g[i] * (plain + l * grown + (raw[i] < 0.0f ? -f : f));
        else
            out[i] = raw[i] * plain + grown + fabsf(raw[i]) * f;
    }
}
