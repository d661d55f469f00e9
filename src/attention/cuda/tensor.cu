// Scan attention on tensor cores: the kernels of tensor.h for every width and precision. Launched by
// tensor.rs.
#include "tensor.h"

using namespace isopleth;
using namespace isopleth::tensor;

#define TENSOR(NAME, N, WIDTH)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) pack_##NAME##_##WIDTH(                            \
        const Problem p, const float *kv, const float *places, const float *mask, void *images) {           \
        pack_block<N, WIDTH>(p, kv, places, mask, images);                                                  \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) tensor_##NAME##_##WIDTH(                       \
        const Problem p, const void *images, const float *q, const float *params, const float *sites,       \
        float *out, float *marks) {                                                                         \
        attend_block<N, WIDTH>(p, images, q, params, sites, out, marks);                                    \
    }

#define WIDTHS(NAME, N) TENSOR(NAME, N, 16) TENSOR(NAME, N, 32) TENSOR(NAME, N, 64)
WIDTHS(bf16, Bf16)
WIDTHS(tf32, Tf32)
WIDTHS(exact, Exact)
