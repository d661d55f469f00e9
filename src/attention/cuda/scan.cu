// Scan attention on the GPU and its gradients: the kernels that enabled.rs launches, by width of keys
// and values (padded) and by kind of bias.
#include "gradient.h"

using namespace isopleth;

// Threads of a block at most; enabled.rs launches no more.
constexpr int THREADS = 128;

#define SCAN(WIDTH, NAME, KIND)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) scan_##NAME##_##WIDTH(                         \
        Problem p, const float *q, const float *kv, const float *params, const float *sites,                \
        const float *places, const float *mask, float *out, float *marks) {                                 \
        scan<WIDTH, KIND, false>(p, {q, kv, params, sites, places, mask}, {}, out, marks);                  \
    }
#define NEAR(WIDTH, NAME, KIND)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) near_##NAME##_##WIDTH(                         \
        Problem p, const float *q, const float *kv, const float *params, const float *sites,                \
        const float *places, const float *mask, const int *from, const int *tile, const float *gap2,        \
        const int *order, const float *reach2, const float *envelope, const float *norm,                    \
        const float *longest, unsigned long long *tally, float share, float *out, float *marks) {           \
        const Near near = {from, tile, gap2, order, reach2, envelope, norm, longest, tally, share};         \
        scan<WIDTH, KIND, true>(p, {q, kv, params, sites, places, mask}, near, out, marks);                 \
    }
#define GRADIENT(WIDTH, NAME, KIND)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) gradient_queries_##NAME##_##WIDTH(             \
        Problem p, const float *q, const float *kv, const float *params, const float *sites,                \
        const float *places, const float *mask, const float *grad, const float *marks, const float *means,  \
        float *to) {                                                                                        \
        gradient_queries<WIDTH, KIND>(p, {q, kv, params, sites, places, mask}, {grad, marks, means}, to);   \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) gradient_keys_##NAME##_##WIDTH(                \
        Problem p, const float *q, const float *kv, const float *params, const float *sites,                \
        const float *places, const float *mask, const float *grad, const float *marks, const float *means,  \
        float *to, double *parts) {                                                                         \
        gradient_keys<WIDTH, KIND>(p, {q, kv, params, sites, places, mask}, {grad, marks, means}, to,       \
                                   parts);                                                                  \
    }
#define EVERY_WIDTH(OF, NAME, KIND) OF(8, NAME, KIND) OF(16, NAME, KIND) OF(32, NAME, KIND) OF(64, NAME, KIND)

EVERY_WIDTH(SCAN, none, NONE)
EVERY_WIDTH(SCAN, bump, BUMP)
EVERY_WIDTH(SCAN, any, ANY)
EVERY_WIDTH(NEAR, bump, BUMP)
EVERY_WIDTH(NEAR, any, ANY)
EVERY_WIDTH(GRADIENT, none, NONE)
EVERY_WIDTH(GRADIENT, bump, BUMP)
EVERY_WIDTH(GRADIENT, any, ANY)

extern "C" __global__ void scan_combine(Problem p, const float *parts, const float *part_marks, float *out,
                                        float *marks) {
    combine(p, parts, part_marks, out, marks);
}
extern "C" __global__ void gradient_means(Problem p, const float *out, const float *grad, float *to) {
    means(p, out, grad, to);
}
extern "C" __global__ void gradient_bias(Problem p, const float *params, const float *grad, const float *marks,
                                         const float *means, const double *parts, int blocks, float *to) {
    isopleth::gradient_bias(p, params, Learnt{grad, marks, means}, parts, blocks, to);
}
