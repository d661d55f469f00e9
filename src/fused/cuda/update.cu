// The optimiser on the card: gradients of all parameters in one flat buffer, and with them moments and the
// running average of weights; the weights stay in their tensors, which a table of addresses names.
//
// gather → squares → settle → update, whatever the number of parameters. Nothing is asked of the host: what
// it wants to know adds up in `news`, which it reads when it likes. With the same gradients the weights,
// moments and averages are those of train/optimiser.rs, bit by bit: every operation is rounded on its own.
// Tests run these very kernels on the processor (tests/cuda/update.cpp).
#include "../../attention/cuda/machine.h"

using namespace isopleth;

namespace {

constexpr int THREADS = 256;
// Numbers of a parameter that one block takes; tensors start at multiples of ALIGN. As in enabled.rs.
constexpr int CHUNK = 2048;
// Tensors that one launch can name.
constexpr int TABLE = 400;

// What adds up between two readings, as in enabled.rs.
enum News { LOSS, STEPS, NORM, BAD_STEP, BAD_KIND, SCALE };

// Rounded one by one: a compiler that joins a product and a sum would give other bits than the host.
#ifdef __CUDACC__
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
DEVICE float minus(float a, float b) { return __fsub_rn(a, b); }
DEVICE float over(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float root(float a) { return __fsqrt_rn(a); }
#else
DEVICE float times(float a, float b) { return a * b; }
DEVICE float plus(float a, float b) { return a + b; }
DEVICE float minus(float a, float b) { return a - b; }
DEVICE float over(float a, float b) { return a / b; }
DEVICE float root(float a) { return sqrtf(a); }
#endif

// The sum over a block, in thread 0, in a fixed order.
DEVICE double block_sum(double x) {
    SHARED(double, part, [THREADS]);
    part[threadIdx.x] = x;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
        __syncthreads();
    }
    return part[0];
}

} // namespace

// Addresses of tensors, handed over with the launch itself.
struct Table {
    unsigned long long at[TABLE];
};

// Where a block works: parameter, and the first of its numbers.
struct Chunk {
    int parameter, start;
};

// grads += the tensors that `from` names for parameters first, first + 1, …; 0 where there is none.
extern "C" __global__ void gather(Table from, int first, const Chunk *chunks, const int *starts, const int *lengths,
                                  float *grads) {
    const Chunk chunk = chunks[blockIdx.x];
    const float *const x = (const float *)from.at[chunk.parameter - first];
    if (!x) return;
    float *const to = grads + starts[chunk.parameter];
    const int last = min(chunk.start + CHUNK, lengths[chunk.parameter]);
    for (int i = chunk.start + (int)threadIdx.x; i < last; i += THREADS) to[i] += x[i];
}

// Sums of squares of CHUNK gradients each, f64. What pads the buffer is 0.
extern "C" __global__ void squares(const float *grads, double *sums, int n) {
    const int first = blockIdx.x * CHUNK, last = min(first + CHUNK, n);
    double sum = 0.0;
    for (int i = first + (int)threadIdx.x; i < last; i += THREADS) sum += (double)grads[i] * (double)grads[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One block: the norm, whether all is finite, and what gradients are multiplied with. A loss or a norm
// that is not finite is remembered with its step, and no update follows it.
extern "C" __global__ void settle(const double *sums, int count, const float *loss, double clip, double step,
                                  double *news) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += sums[i];
    sum = block_sum(sum);
    if (threadIdx.x != 0 || news[BAD_KIND] != 0.0) return;
    const double norm = sqrt(sum), value = *loss;
    const bool sound = value - value == 0.0, finite = norm - norm == 0.0;
    if (!sound || !finite) {
        news[BAD_STEP] = step;
        news[BAD_KIND] = sound ? 2.0 : 1.0;
        return;
    }
    news[LOSS] += value;
    news[STEPS] += 1.0;
    news[NORM] = norm;
    news[SCALE] = norm > clip ? (double)(float)(clip / norm) : 1.0;
}

// Numbers of one step, as train/optimiser.rs has them.
struct Pace {
    float rate, shrink, c1, c2, keep;
    int yogi;
};

// One step of AdamW or Yogi, the running average of weights, and gradients back to 0.
extern "C" __global__ void update(Pace pace, const double *news, const Chunk *chunks, const int *starts,
                                  const int *lengths, const unsigned long long *weights, float *grads, float *first,
                                  float *second, float *average) {
    if (news[BAD_KIND] != 0.0) return;
    const float b1 = (float)0.9, b2 = (float)0.999, scale = (float)news[SCALE];
    const Chunk chunk = chunks[blockIdx.x];
    float *const weight = (float *)weights[chunk.parameter];
    const int at = starts[chunk.parameter], last = min(chunk.start + CHUNK, lengths[chunk.parameter]);
    for (int i = chunk.start + (int)threadIdx.x; i < last; i += THREADS) {
        const float g = times(grads[at + i], scale);
        const float m = plus(times(b1, first[at + i]), times(minus(1.0f, b1), g));
        float v = second[at + i], w = weight[i];
        if (pace.yogi) {
            const float g2 = times(g, g), d = minus(v, g2);
            // Rust's signum: of 0 it is 1, of −0 it is −1.
            const float sign = __float_as_int(d) < 0 ? -1.0f : 1.0f;
            v = minus(v, times(times(minus(1.0f, b2), sign), g2));
            const float u = over(v, pace.c2);
            w = minus(w, over(times(pace.rate, over(m, pace.c1)), plus(root(u > 0.0f ? u : 0.0f), 1e-3f)));
        } else {
            v = plus(times(b2, v), times(times(minus(1.0f, b2), g), g));
            w = minus(times(pace.shrink, w),
                      over(times(pace.rate, over(m, pace.c1)), plus(root(over(v, pace.c2)), 1e-8f)));
        }
        first[at + i] = m;
        second[at + i] = v;
        weight[i] = w;
        average[at + i] = plus(times(pace.keep, average[at + i]), times(minus(1.0f, pace.keep), w));
        grads[at + i] = 0.0f;
    }
}

// to += from: the gradients of another card, brought here, in the order of cards.
extern "C" __global__ void join(const float *from, float *to, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) to[i] += from[i];
}
