// Small kernels, right and wrong, that show what emulate.h notices: `self NAME` ends with status 0, or
// with 70 and a word.
#include "../../src/attention/cuda/machine.h"

#include <string>

using namespace isopleth;

static void check(bool right, const char *what) {
    if (!right) std::fprintf(stderr, "wrong: %s\n", what), std::exit(1);
}

// Each thread writes its number and reads its neighbour's, with or without a barrier between.
static void neighbours(bool barrier, float *out) {
    SHARED(float, numbers, [64]);
    const int me = (int)threadIdx.x;
    numbers[me] = (float)me;
    if (barrier) __syncthreads();
    out[blockIdx.x * 64 + me] = numbers[(me + 1) % 64];
}

static bool neighbours_right(bool barrier) {
    emulate::Array<float> out(2 * 64);
    emulate::launch(2, 64, 0, [&] { neighbours(barrier, out.data); });
    bool right = true;
    for (int i = 0; i < 128; ++i) right = right && out.data[i] == (float)((i + 1) % 64);
    return right;
}

static void collectives() {
    const int lane = (int)threadIdx.x % 32;
    check(__shfl_xor_sync(~0u, lane, 5) == (lane ^ 5), "xor");
    check(__shfl_sync(~0u, 1.5f * lane, 7) == 10.5f, "from one lane");
    check(__shfl_down_sync(~0u, lane, 3) == (lane + 3 < 32 ? lane + 3 : lane), "down");
    check(__shfl_up_sync(~0u, lane, 2, 8) == (lane % 8 >= 2 ? lane - 2 : lane), "up, by eights");
    check(__ballot_sync(~0u, lane % 2) == 0xaaaaaaaau, "ballot");
    check(__any_sync(~0u, lane == 3) && !__all_sync(~0u, lane == 3), "any and all");
    // Halves of a warp may meet apart.
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    check(__shfl_xor_sync(half, lane, 1) == (lane ^ 1), "half a warp");
    if (lane < 16) check(__ballot_sync(half, 1) == half, "a branch");
    __syncwarp();
    check(__syncthreads_count(threadIdx.x < 40) == 40, "count");
    check(__syncthreads_or(threadIdx.x == 63) && !__syncthreads_and(threadIdx.x == 63), "or, and");
    struct Sum {
        float all;
    };
    const Sum sum = emulate::collective<float, Sum>(~0u, (float)lane, [](auto in, auto out, unsigned) {
        float all = 0;
        for (int i = 0; i < 32; ++i) all += *in[i];
        for (int i = 0; i < 32; ++i) out[i]->all = all;
    });
    check(sum.all == 496.0f, "a collective of one's own");
}

static void copies(bool wait, const float *from, float *to) {
    SHARED(float4, held, [32]);
    const int me = (int)threadIdx.x;
    copy_async<16>(&held[me], from + 4 * me, me != 3);
    copies_close();
    copy_async<16>(&held[16 + me], from + 4 * me, false);
    copies_close();
    if (wait) copies_wait<1>();
    to[me] = held[me].y;
    copies_wait<0>();
}

static bool copies_right(bool wait) {
    std::vector<float> values(64);
    for (int i = 0; i < 64; ++i) values[i] = (float)i;
    emulate::Array<float> from(values), to(16);
    emulate::launch(1, 16, 0, [&] { copies(wait, from.data, to.data); });
    bool right = true;
    for (int i = 0; i < 16; ++i) right = right && to.data[i] == (i == 3 ? 0.0f : 4.0f * i + 1.0f);
    return right;
}

int main(int, char **arguments) {
    const std::string name = arguments[1];
    if (name == "right") {
        check(neighbours_right(true), "neighbours");
        check(copies_right(true), "copies");
        emulate::launch(dim3(2, 3), 64, 0, [] { collectives(); });
        emulate::launch(1, 32, 256, [] {
            DYNAMIC_SHARED(held);
            check(held[threadIdx.x] == 0xff, "poison");
            held[threadIdx.x] = 0;
        });
        check(std::fabs(exp2_approx(0.3f) - std::exp2(0.3)) < 5e-7, "2ˣ");
    } else if (name == "no barrier") {
        if (!neighbours_right(false)) emulate::fail("stale numbers were read");
    } else if (name == "no wait") {
        if (!copies_right(false)) emulate::fail("a copy was read too early");
    } else if (name == "half a barrier") {
        emulate::launch(1, 64, 0, [] {
            if (threadIdx.x < 32) __syncthreads();
        });
    } else if (name == "half a warp") {
        emulate::launch(1, 32, 0, [] {
            if (threadIdx.x < 16) __ballot_sync(~0u, 1);
        });
    } else if (name == "two instructions") {
        emulate::launch(1, 32, 0, [] {
            if (threadIdx.x < 16)
                __ballot_sync(~0u, 1);
            else
                __syncwarp();
        });
    } else if (name == "past shared memory") {
        emulate::launch(1, 32, 128, [] {
            DYNAMIC_SHARED(held);
            ((float *)held)[threadIdx.x + 1] = 0.0f;
        });
    } else {
        return 2;
    }
}
