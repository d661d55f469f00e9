// CUDA on the processor, for tests: runs the very kernels of src/attention/cuda where there is no GPU.
//
// Every thread of a block is a fiber with a stack of its own; one runs at a time, until it waits for
// others. Who runs next is drawn from a seeded generator, so that a missing barrier shows: as stale
// numbers, or as NaN, which shared memory is filled with before every block. A kernel is run by
// `emulate::launch(grid, block, dynamic shared bytes, [&] { kernel(arguments); })`.
//
// What it is not: a model of speed, of caches, of memory ordering within a phase, or of the compiler.
// Kernels keep to what this header and src/attention/cuda/machine.h offer. Mistakes that CUDA leaves
// undefined (a barrier that some threads never reach, lanes of a warp in different instructions, reads
// of lanes that are not there, writes past shared memory) end the program with status 70 and a word.
#pragma once
#undef _FORTIFY_SOURCE // its longjmp takes a change of stacks for an accident

#include <csetjmp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

// --- words of the language ------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
// Not poisoned between blocks: SHARED of machine.h is.
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#ifndef __restrict__
#define __restrict__ __restrict
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct float3 {
    float x, y, z;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- threads of a block ---------------------------------------------------------------------------

namespace emulate {

constexpr size_t STACK = 256 << 10, SHARED_MOST = 227 << 10, STATIC_MOST = 48 << 10, ZONE = 64;
enum class State { READY, BARRIER, MEETING, DONE };

[[noreturn]] inline void fail(const char *what) {
    std::fprintf(stderr, "emulated kernel: %s (block %u %u %u, thread %u %u %u)\n", what, blockIdx.x, blockIdx.y,
                 blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    std::fflush(nullptr);
    _exit(70);
}

// A copy that was asked for and may arrive at any time until it is waited for.
struct Copy {
    void *to;
    const void *from;
    size_t bytes, filled;
    unsigned group;
};

struct Thread {
    jmp_buf at;
    std::unique_ptr<char[]> stack;
    State state;
    uint3 index;
    bool started;
    // The value it brings to a barrier.
    int brought;
    std::vector<Copy> copies;
    unsigned groups;
};

// Lanes of a warp that meet in one instruction.
struct Meeting {
    const void *site = nullptr;
    unsigned wanted = 0, arrived = 0;
    const void *in[32];
    void *out[32];
};

struct Block {
    std::vector<Thread> threads;
    std::vector<std::vector<Meeting>> meetings; // of each warp
    std::vector<int> ready;
    unsigned count = 0, waiting = 0, done = 0;
    int now = 0;
    int gathered[3]; // sum, all, any of what threads brought to the last barrier
    const void *barrier = nullptr;
    jmp_buf scheduler;
    const std::function<void()> *kernel = nullptr;
    uint64_t serial = 0, random = 0x9e3779b97f4a7c15;
    size_t dynamic = 0, used = 0;
};
inline Block block;
alignas(1024) inline unsigned char arena[SHARED_MOST + 64 * ZONE];
inline std::vector<size_t> zones;

inline uint64_t draw() {
    block.random ^= block.random << 13;
    block.random ^= block.random >> 7;
    block.random ^= block.random << 17;
    return block.random;
}

// Shared memory of a size, poisoned, followed by a zone that nobody may write to.
inline void *take(size_t bytes) {
    size_t at = (block.used + 127) / 128 * 128;
    if (at + bytes + ZONE > sizeof arena) fail("more shared memory than a block has");
    block.used = at + bytes + ZONE;
    std::memset(arena + at, 0xff, bytes + ZONE);
    zones.push_back(at + bytes);
    return arena + at;
}

// The shared variable of one place in the source: SHARED of machine.h.
template <class T, class Place> T &shared(Place) {
    static uint64_t serial = ~0ull;
    static T *variable;
    if (serial != block.serial) {
        static_assert(sizeof(T) <= STATIC_MOST, "more static shared memory than a block has");
        serial = block.serial;
        variable = (T *)take(sizeof(T));
    }
    return *variable;
}

inline void *dynamic_shared() { return arena; }

inline Thread &me() { return block.threads[block.now]; }

// Leaves the processor to others; returns when this thread is ready again and drawn.
inline void wait() {
    const int mine = block.now;
    if (!_setjmp(block.threads[mine].at)) _longjmp(block.scheduler, 1);
}

inline void enter() {
    (*block.kernel)();
    if (!me().copies.empty()) fail("a thread ends before its asynchronous copies");
    me().state = State::DONE;
    ++block.done;
    _longjmp(block.scheduler, 1);
}

inline void resume(int thread) {
    Thread &t = block.threads[thread];
    block.now = thread;
    threadIdx = t.index;
    if (_setjmp(block.scheduler)) return;
    if (t.started) _longjmp(t.at, 1);
    t.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = t.stack.get();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
}

inline void run_block() {
    Block &b = block;
    ++b.serial;
    b.used = 0;
    zones.clear();
    if (b.dynamic) take(b.dynamic);
    b.waiting = b.done = 0;
    b.barrier = nullptr;
    b.ready.clear();
    for (unsigned i = 0; i < b.count; ++i) {
        Thread &t = b.threads[i];
        t.state = State::READY;
        t.started = false;
        t.groups = 0;
        t.copies.clear();
        b.ready.push_back((int)i);
    }
    for (auto &warp : b.meetings) warp.clear();
    while (b.done < b.count) {
        if (b.ready.empty()) {
            if (b.waiting == b.count) {
                b.gathered[0] = 0, b.gathered[1] = 1, b.gathered[2] = 0;
                for (unsigned i = 0; i < b.count; ++i) {
                    Thread &t = b.threads[i];
                    t.state = State::READY;
                    b.gathered[0] += t.brought != 0;
                    b.gathered[1] &= t.brought != 0;
                    b.gathered[2] |= t.brought != 0;
                    b.ready.push_back((int)i);
                }
                b.waiting = 0;
                b.barrier = nullptr;
                continue;
            }
            if (b.waiting && b.done) fail("threads wait at a barrier for others that have ended");
            fail("threads wait for lanes of their warp that went elsewhere");
        }
        const size_t at = draw() % b.ready.size();
        const int next = b.ready[at];
        b.ready[at] = b.ready.back();
        b.ready.pop_back();
        resume(next);
    }
    for (size_t zone : zones)
        for (size_t i = 0; i < ZONE; ++i)
            if (arena[zone + i] != 0xff) fail("a write past the end of shared memory");
}

// Runs `kernel` for every thread of a grid, block after block. `seed` draws the order of threads.
inline void launch(dim3 grid, dim3 threads, size_t dynamic, const std::function<void()> &kernel, uint64_t seed = 1) {
    Block &b = block;
    gridDim = grid;
    blockDim = threads;
    blockIdx = {0, 0, 0};
    b.count = threads.x * threads.y * threads.z;
    if (b.count == 0 || b.count > 1024) fail("a block has 1 to 1024 threads");
    if (grid.y > 65535 || grid.z > 65535) fail("a grid has at most 65535 blocks along y and z");
    if (dynamic > SHARED_MOST) fail("more shared memory than a block has");
    b.dynamic = dynamic;
    b.kernel = &kernel;
    b.random = 0x9e3779b97f4a7c15 ^ (seed * 0xbf58476d1ce4e5b9);
    if (b.threads.size() < b.count) b.threads.resize(b.count);
    b.meetings.resize((b.count + 31) / 32);
    for (unsigned i = 0; i < b.count; ++i) {
        Thread &t = b.threads[i];
        if (!t.stack) t.stack.reset(new char[STACK]);
        t.index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    }
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                run_block();
            }
    b.kernel = nullptr;
}

// What threads bring to a barrier: number of those that are not 0, whether all are, whether any is.
template <class Place> const int *barrier(int brought, Place) {
    static const char site = 0;
    Block &b = block;
    if (b.barrier && b.barrier != &site) fail("threads of a block wait at different kinds of barrier");
    b.barrier = &site;
    me().brought = brought;
    me().state = State::BARRIER;
    ++b.waiting;
    wait();
    return b.gathered;
}

inline int lane() { return block.now & 31; }

// What needs a whole warp: every lane of `mask` brings an operand; when the last one has come,
// `work(in, out, mask)` runs once, with pointers to operands and results by lane (null outside the
// mask); each lane then leaves with its result. Shuffles, votes and matrix products are all this.
template <class In, class Out, class Work> Out collective(unsigned mask, const In &mine, Work work) {
    static const char site = 0;
    auto &meetings = block.meetings[block.now / 32];
    const int lane = emulate::lane();
    const unsigned bit = 1u << lane;
    if (!(mask & bit)) fail("a lane asks for a meeting that it is not part of");
    const unsigned first = block.now & ~31u;
    if (block.count - first < 32 && mask >> (block.count - first)) fail("a mask names lanes that do not exist");
    size_t at = 0;
    while (at < meetings.size() && meetings[at].wanted != mask) ++at;
    if (at == meetings.size()) meetings.emplace_back();
    Out result;
    Meeting &m = meetings[at];
    if (!m.wanted) {
        m.site = &site;
        m.wanted = mask;
        std::memset(m.in, 0, sizeof m.in);
        std::memset(m.out, 0, sizeof m.out);
    }
    if (m.site != &site) fail("lanes of a warp meet in different instructions");
    m.arrived |= bit;
    m.in[lane] = &mine;
    m.out[lane] = &result;
    if (m.arrived != m.wanted) {
        me().state = State::MEETING;
        wait();
        return result;
    }
    Meeting all = m;
    meetings.erase(meetings.begin() + (long)at);
    work((const In *const *)all.in, (Out *const *)all.out, mask);
    for (int i = 0; i < 32; ++i)
        if (all.wanted >> i & 1 && i != lane) {
            block.threads[first + i].state = State::READY;
            block.ready.push_back((int)first + i);
        }
    return result;
}

// --- asynchronous copies: they arrive as late as they may, and the place is poisoned until then -----

inline void copy_async(void *to, const void *from, size_t bytes, size_t filled) {
    if ((uintptr_t)to % bytes || (filled && (uintptr_t)from % bytes)) fail("an asynchronous copy is not aligned");
    if ((unsigned char *)to < arena || (unsigned char *)to + bytes > arena + sizeof arena)
        fail("an asynchronous copy goes to shared memory only");
    std::memset(to, 0xff, bytes);
    me().copies.push_back({to, from, bytes, filled, me().groups});
}
inline void copies_close() { ++me().groups; }
// Until all but the last `left` groups have arrived.
inline void copies_wait(unsigned left) {
    Thread &t = me();
    size_t kept = 0;
    for (Copy &c : t.copies) {
        if (c.group + left < t.groups) {
            std::memset(c.to, 0, c.bytes);
            if (c.filled) std::memcpy(c.to, c.from, c.filled);
        } else {
            t.copies[kept++] = c;
        }
    }
    t.copies.resize(kept);
}

// --- numbers as bad as the documentation allows -----------------------------------------------------

// x off by up to `part` of itself, always the same for the same x.
inline float spoiled(float x, float part) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits ^ bits >> 15) * 0x2c1b3c6du;
    bits = (bits ^ bits >> 12) * 0x297a2d39u;
    const double off = (double)(bits >> 8) / (1 << 23) - 1.0;
    return (float)((double)x * (1.0 + off * part));
}

// Device memory of exactly this length (up to 16 bytes): what reads or writes beyond it is stopped by
// the system. Filled with NaN.
template <class T> class Array {
    char *base = nullptr;
    size_t bytes = 0;

  public:
    T *data = nullptr;
    size_t size = 0;
    explicit Array(size_t count) : size(count) {
        const size_t page = (size_t)sysconf(_SC_PAGESIZE), held = (count * sizeof(T) + 15) / 16 * 16;
        bytes = (held + page - 1) / page * page + page;
        base = (char *)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED || mprotect(base + bytes - page, page, PROT_NONE)) fail("no memory");
        data = (T *)(base + bytes - page - held);
        std::memset((void *)data, 0xff, held);
    }
    Array(const std::vector<T> &from) : Array(from.size()) {
        if (size) std::memcpy((void *)data, from.data(), size * sizeof(T));
    }
    Array(const Array &) = delete;
    ~Array() { munmap(base, bytes); }
};

struct Shuffled {
    uint64_t bits;
    int from;
};
template <class T> T shuffle(unsigned mask, T value, int from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
    Shuffled mine{0, from};
    std::memcpy(&mine.bits, &value, sizeof(T));
    return collective<Shuffled, T>(mask, mine, [](const Shuffled *const *in, T *const *out, unsigned mask) {
        for (int i = 0; i < 32; ++i) {
            if (!(mask >> i & 1)) continue;
            const int from = in[i]->from;
            if (!(mask >> from & 1)) fail("a shuffle reads a lane that is not there");
            std::memcpy(out[i], &in[from]->bits, sizeof(T));
        }
    });
}

} // namespace emulate

// --- what kernels call ------------------------------------------------------------------------------

static inline void __syncthreads() {
    emulate::barrier(0, [] {});
}
static inline int __syncthreads_count(int x) {
    return emulate::barrier(x, [] {})[0];
}
static inline int __syncthreads_and(int x) {
    return emulate::barrier(x, [] {})[1];
}
static inline int __syncthreads_or(int x) {
    return emulate::barrier(x, [] {})[2];
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <class T> static inline T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
    const int lane = emulate::lane();
    return emulate::shuffle(mask, x, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32) {
    const int lane = emulate::lane(), from = lane ^ with;
    return emulate::shuffle(mask, x, from < (lane & ~(width - 1)) + width ? from : lane);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
    const int lane = emulate::lane(), from = lane + by;
    return emulate::shuffle(mask, x, from < (lane & ~(width - 1)) + width ? from : lane);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
    const int lane = emulate::lane(), from = lane - by;
    return emulate::shuffle(mask, x, from >= (lane & ~(width - 1)) ? from : lane);
}
static inline unsigned __ballot_sync(unsigned mask, int x) {
    return emulate::collective<int, unsigned>(
        mask, x, [](const int *const *in, unsigned *const *out, unsigned mask) {
            unsigned votes = 0;
            for (int i = 0; i < 32; ++i)
                if (mask >> i & 1 && *in[i]) votes |= 1u << i;
            for (int i = 0; i < 32; ++i)
                if (mask >> i & 1) *out[i] = votes;
        });
}
static inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
static inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == mask; }
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulate::collective<char, char>(mask, 0, [](const char *const *, char *const *, unsigned) {});
}

template <class T> static inline T atomicAdd(T *to, T x) {
    const T old = *to;
    *to = old + x;
    return old;
}
template <class T> static inline T atomicMax(T *to, T x) {
    const T old = *to;
    if (x > old) *to = x;
    return old;
}
template <class T> static inline T atomicMin(T *to, T x) {
    const T old = *to;
    if (x < old) *to = x;
    return old;
}
template <class T> static inline T atomicExch(T *to, T x) {
    const T old = *to;
    *to = x;
    return old;
}
template <class T> static inline T __ldg(const T *from) { return *from; }

template <class To, class From> static inline To emulate_bits(From x) {
    To to;
    static_assert(sizeof to == sizeof x, "as many bits");
    std::memcpy(&to, &x, sizeof to);
    return to;
}
static inline int __float_as_int(float x) { return emulate_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return emulate_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return emulate_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return emulate_bits<float>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __float2int_rn(float x) { return (int)std::nearbyintf(x); }
static inline float __int2float_rn(int x) { return (float)x; }

template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

// Relative errors from the CUDA C++ programming guide and the PTX manual.
static inline float emulate_exp(float x) { return emulate::spoiled(expf(x), 2.4e-7f * (2.0f + fabsf(1.16f * x) / 4)); }
#define __expf emulate_exp // the system's library has functions of this name
static inline float emulate_log(float x) { return emulate::spoiled(logf(x), 3e-7f); }
#define __logf emulate_log // the system's library has functions of this name
static inline float emulate_log2(float x) { return emulate::spoiled(log2f(x), 3e-7f); }
#define __log2f emulate_log2 // the system's library has functions of this name
static inline float __fdividef(float x, float y) { return emulate::spoiled(x / y, 2.4e-7f); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float rsqrtf(float x) { return emulate::spoiled(1.0f / sqrtf(x), 2.4e-7f); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
