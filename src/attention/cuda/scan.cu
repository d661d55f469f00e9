// Scan attention on the GPU: one query of one head per thread, keys and values staged through shared
// memory for all threads of a block. Launched by enabled.rs.
#include "scan.h"

using namespace isopleth;

namespace {

// Threads of a block; enabled.rs launches as many.
constexpr int THREADS = 128;

// Block (x, y, z) answers 128 targets from 128 x on, for head y of row z.
template <int WIDTH>
__device__ __forceinline__ void scan(const Problem &p, const float *q, const float *kv, const float *params,
                                     const float *sites, const float *places, const float *mask, float *out,
                                     float *marks) {
    __shared__ Tile<WIDTH> tile;
    __shared__ Bent terms[TERMS];
    const int me = threadIdx.x, head = blockIdx.y, row = blockIdx.z;
    const int target = blockIdx.x * THREADS + me;
    if (me < p.terms) terms[me] = bent(p, params, head, me);
    __syncthreads();
    Query<WIDTH> query;
    // Threads beyond the last target stage keys with the others, and read the last target's query.
    query.start(p, row, head, min(target, p.targets - 1), q, sites, terms);
    for (int first = 0; first < p.context; first += KEYS) {
        stage(tile, p, row, head, first, me, THREADS, kv, places, mask);
        __syncthreads();
        query.meet(p, tile, terms);
        __syncthreads();
    }
    if (target < p.targets) query.finish(p, row, head, target, out, marks);
}

} // namespace

#define SCAN(WIDTH)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) scan_##WIDTH(                                     \
        int targets, int context, int heads, int d, int w, int dim, int terms, unsigned long long families, \
        int globe, const float *q, const float *kv, const float *params, const float *sites,                \
        const float *places, const float *mask, float *out, float *marks) {                                 \
        const Problem p = {targets, context, heads, d, w, dim, terms, families, globe};                     \
        scan<WIDTH>(p, q, kv, params, sites, places, mask, out, marks);                                     \
    }

// Keys and values are padded to one of these widths.
SCAN(16)
SCAN(32)
SCAN(64)
