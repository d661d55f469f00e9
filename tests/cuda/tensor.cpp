// Runs the kernels of src/attention/cuda/tensor.h on the processor (tests/cuda/emulate.h): a problem on
// standard input, answers and marks on standard output, both as they lie in memory. With the argument
// `dka` the problem is one of dka.h; with `products` it checks the emulated tensor cores instead.
#include "../../src/attention/cuda/dka.h"
#include "../../src/attention/cuda/scan.h"

#include <string>

using namespace isopleth;
using namespace isopleth::tensor;

template <class T> static std::vector<T> read(size_t count) {
    std::vector<T> values(count);
    if (count && std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(3);
    return values;
}

template <class N, int WIDTH>
static void run(const Problem &p, const float *kv, const float *places, const float *mask, const float *q,
                const float *params, const float *sites, float *out, float *marks) {
    typedef Plan<N, WIDTH> P;
    const unsigned tiles = (p.context + P::KEYS - 1) / P::KEYS;
    const int targets = 16 * P::TILES * WARPS;
    const unsigned blocks = (p.targets + targets - 1) / targets;
    emulate::Array<typename P::Im> images((size_t)tiles * p.heads * p.batch);
    emulate::launch(dim3(tiles, p.heads, p.batch), THREADS, 0,
                    [&] { pack_block<N, WIDTH>(p, kv, places, mask, images.data); });
    emulate::launch(dim3(blocks * p.splits, p.heads, p.batch), THREADS, P::ROOM,
                    [&] { attend_block<N, WIDTH>(p, images.data, q, params, sites, out, marks); });
}

template <class N> static int check_products() {
    // Every product of a warp beside the plain one: a lane is told what to bring, and where to find the
    // answer, by the formulas of the PTX ISA, written out once more.
    constexpr int DEPTH = 8 * N::PER;
    static double a[16][DEPTH], b[DEPTH][8], c[16][8];
    static float found[16][8];
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < DEPTH; ++k) a[i][k] = (i * 7 + k * 3) % 11 - 5;
    for (int k = 0; k < DEPTH; ++k)
        for (int j = 0; j < 8; ++j) b[k][j] = (k * 5 + j * 2) % 13 - 6;
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) c[i][j] = i - 2 * j;
    emulate::launch(1, 32, 0, [] {
        const int lane = (int)threadIdx.x, group = lane / 4, in_group = lane % 4;
        uint32_t ra[4], rb[2];
        float rc[4];
        if (N::PER == 2) {
            for (int r = 0; r < 4; ++r) {
                const int i = group + (r == 1 || r == 3 ? 8 : 0), k = in_group * 2 + (r >= 2 ? 8 : 0);
                ra[r] = bf16_pair((float)a[i][k], (float)a[i][k + 1]);
            }
            for (int r = 0; r < 2; ++r) {
                const int k = in_group * 2 + (r == 1 ? 8 : 0);
                rb[r] = bf16_pair((float)b[k][group], (float)b[k + 1][group]);
            }
        } else {
            for (int r = 0; r < 4; ++r)
                ra[r] = tf32((float)a[group + (r == 1 || r == 3 ? 8 : 0)][in_group + (r >= 2 ? 4 : 0)]);
            for (int r = 0; r < 2; ++r) rb[r] = tf32((float)b[in_group + (r == 1 ? 4 : 0)][group]);
        }
        for (int r = 0; r < 4; ++r) rc[r] = (float)c[group + (r >= 2 ? 8 : 0)][in_group * 2 + (r & 1)];
        mma(N(), rc, ra, rb[0], rb[1]);
        for (int r = 0; r < 4; ++r) found[group + (r >= 2 ? 8 : 0)][in_group * 2 + (r & 1)] = rc[r];
    });
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
            double sum = c[i][j];
            for (int k = 0; k < DEPTH; ++k) sum += a[i][k] * b[k][j];
            if (found[i][j] != (float)sum)
                return std::fprintf(stderr, "product [%d, %d]: %g for %g\n", i, j, found[i][j], sum), 1;
        }
    return 0;
}

static int check_numbers() {
    const auto same = [](uint32_t found, uint32_t truth, const char *what) {
        if (found != truth) std::fprintf(stderr, "%s: %08x for %08x\n", what, found, truth), std::exit(1);
    };
    same(bf16_pair(1.0f, -2.0f), 0xc0003f80, "the first number lies lower");
    same(bf16_pair(1.00390625f, 1.01171875f), 0x3f823f80, "bf16 rounds ties to even");
    same(tf32(__uint_as_float(0x3f801000)), 0x3f802000, "tf32 rounds ties away from zero");
    same(tf32(__uint_as_float(0xbf800fff)), 0xbf800000, "tf32 rounds to nearest");
    // 2²⁴ and 16 halves of its last place: each is cut off alone.
    const double ones[4] = {0.5, 0.5, 0.5, 0.5};
    same(__float_as_uint(emulate::cut_sum(16777216.0, ones, 4)), 0x4b800000, "small addends are cut off");
    const double carry[4] = {3.0, -1.0, 0.25, -0.25};
    same(__float_as_uint(emulate::cut_sum(1.0, carry, 4)), 0x40400000, "a sum");
    same(__float_as_uint(emulate::cut_sum(-INFINITY, carry, 4)), 0xff800000, "−∞ stays");
    return 0;
}

static int deep_kernel() {
    const auto sizes = read<int32_t>(6);
    const dka::Sizes n = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
    const auto get = [](size_t count) { return std::make_unique<emulate::Array<float>>(read<float>(count)); };
    const size_t sites = (size_t)n.batch * n.sites;
    const auto weight = get((size_t)(n.dim + n.width) * n.hidden), bias = get(n.hidden);
    const auto matrix = get((size_t)n.batch * n.hidden * n.outputs), shift = get((size_t)n.batch * n.outputs);
    const auto places = get(sites * n.dim), tokens = get(sites * n.width);
    const unsigned tiles = (n.hidden + dka::TOGETHER - 1) / dka::TOGETHER;
    emulate::Array<dka::Im> images((size_t)tiles * n.batch);
    emulate::Array<float> out(sites * n.outputs);
    emulate::launch(dim3(tiles, 1, n.batch), dka::THREADS, 0,
                    [&] { dka::pack_block(n, weight->data, bias->data, matrix->data, images.data); });
    emulate::launch(dim3((n.sites + dka::SITES - 1) / dka::SITES, 1, n.batch), dka::THREADS, dka::ROOM, [&] {
        dka::read_block(n, images.data, places->data, tokens->data, shift->data, out.data);
    });
    std::fwrite(out.data, sizeof(float), out.size, stdout);
    return std::fflush(stdout);
}

int main(int count, char **arguments) {
    const std::string what = count > 1 ? arguments[1] : "";
    if (what == "products") return check_products<Bf16>() | check_products<Tf32>() | check_numbers();
    if (what == "dka") return deep_kernel();
    const auto sizes = read<int32_t>(11);
    const auto families = read<uint64_t>(1);
    Problem p = {};
    p.batch = sizes[0], p.targets = sizes[1], p.context = sizes[2], p.heads = sizes[3], p.d = sizes[4];
    p.w = sizes[5], p.dim = sizes[6], p.terms = sizes[7], p.globe = sizes[8], p.splits = sizes[10];
    p.families = families[0];
    const size_t queries = (size_t)p.batch * p.targets, keys = (size_t)p.batch * p.context;
    const auto get = [](size_t count) { return std::make_unique<emulate::Array<float>>(read<float>(count)); };
    const auto q = get(queries * p.heads * p.d), kv = get(keys * p.heads * (p.d + p.w));
    const auto params = get((size_t)p.heads * p.terms * 3);
    const auto sites = get(queries * p.dim), places = get(keys * p.dim), mask = get(keys);
    const size_t answers = queries * p.heads * p.w, each = queries * p.heads * 2;
    emulate::Array<float> some(answers * p.splits), of(each * p.splits), out(answers), marks(each);
    const int widest = p.d > p.w ? p.d : p.w;
    const auto of_width = [&](auto n) {
        typedef decltype(n) N;
        const auto go = widest <= 16 ? run<N, 16> : widest <= 32 ? run<N, 32> : run<N, 64>;
        float *to = p.splits > 1 ? some.data : out.data, *to_marks = p.splits > 1 ? of.data : marks.data;
        go(p, kv->data, places->data, mask->data, q->data, params->data, sites->data, to, to_marks);
    };
    if (sizes[9] == 0) of_width(Bf16());
    if (sizes[9] == 1) of_width(Tf32());
    if (sizes[9] == 2) of_width(Exact());
    if (p.splits > 1)
        emulate::launch((unsigned)((answers + 255) / 256), 256, 0,
                        [&] { combine(p, some.data, of.data, out.data, marks.data); });
    std::fwrite(out.data, sizeof(float), out.size, stdout);
    std::fwrite(marks.data, sizeof(float), marks.size, stdout);
    return std::fflush(stdout);
}
