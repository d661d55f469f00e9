// Runs the kernels of src/attention/cuda/scan.cu on the processor (emulate.h), as enabled.rs would launch
// them: a problem on standard input, answers on standard output, all as it lies in memory.
#include "../../src/attention/cuda/scan.cu"

using emulate::Array;

template <class T> static std::vector<T> read(size_t count) {
    std::vector<T> values(count);
    if (count && std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(3);
    return values;
}
template <class T> static void write(const Array<T> &values) {
    std::fwrite(values.data, sizeof(T), values.size, stdout);
}
static unsigned up(size_t a, size_t b) { return (unsigned)((a + b - 1) / b); }

// The kernels for one width and one kind of bias.
struct Kernels {
    int queries, team;
    decltype(&scan_any_8) scan;
    decltype(&near_any_8) near;
    decltype(&gradient_queries_any_8) by_query;
    decltype(&gradient_keys_any_8) by_key;
};
#define KERNELS(WIDTH, NAME, NEAR)                                                                          \
    {QUERIES_OF<WIDTH>, WIDTH / PART, scan_##NAME##_##WIDTH, near_##NEAR##_##WIDTH,                         \
     gradient_queries_##NAME##_##WIDTH, gradient_keys_##NAME##_##WIDTH},
static const Kernels KERNELS[3][4] = {
    {EVERY_WIDTH(KERNELS, none, any)}, {EVERY_WIDTH(KERNELS, bump, bump)}, {EVERY_WIDTH(KERNELS, any, any)}};

enum Operation { FORWARD, GRADIENT, NEARBY };

static void run(const Kernels &kernels, int operation, const Problem &p, unsigned threads, uint64_t seed) {
    const size_t queries = (size_t)p.batch * p.targets, keys = (size_t)p.batch * p.context;
    const Array<float> q(read<float>(queries * p.heads * p.d)), kv(read<float>(keys * p.heads * (p.d + p.w)));
    const Array<float> params(read<float>((size_t)p.heads * p.terms * 3));
    const Array<float> sites(read<float>(queries * p.dim)), places(read<float>(keys * p.dim));
    const Array<float> mask(read<float>(keys));
    Array<float> out(queries * p.heads * p.w), marks(queries * p.heads * 2);
    const unsigned teams = threads / kernels.team, blocks = up(p.targets, kernels.queries * teams);
    const dim3 grid(blocks * p.splits, p.heads, p.batch);
    const auto launch = [&](dim3 grid, unsigned threads, size_t shared, const std::function<void()> &kernel) {
        emulate::launch(grid, threads, shared, kernel, seed);
    };

    if (operation == NEARBY) {
        const size_t tiles = up(p.context, KEYS);
        const auto lists = read<int>((size_t)p.batch * blocks + 1);
        const Array<int> from(lists), tile(read<int>(lists.back()));
        const Array<float> gap2(read<float>(lists.back()));
        const Array<int> order(read<int>(queries));
        const Array<float> reach2(read<float>(p.heads)), envelope(read<float>((size_t)p.heads * CELLS));
        const Array<float> norm(read<float>(p.batch * tiles * p.heads)), longest(read<float>((size_t)p.batch * p.heads));
        const float share = read<float>(1)[0];
        const Array<unsigned long long> tally(std::vector<unsigned long long>(1, 0));
        launch(grid, threads, 0, [&] {
            kernels.near(p, q.data, kv.data, params.data, sites.data, places.data, mask.data, from.data, tile.data,
                         gap2.data, order.data, reach2.data, envelope.data, norm.data, longest.data, tally.data, share,
                         out.data, marks.data);
        });
        write(out), write(marks);
        const float read = (float)tally.data[0];
        std::fwrite(&read, sizeof(float), 1, stdout);
        return;
    }
    Array<float> parts(p.splits * out.size), part_marks(p.splits * marks.size);
    const bool whole = p.splits == 1;
    launch(grid, threads, 0, [&] {
        kernels.scan(p, q.data, kv.data, params.data, sites.data, places.data, mask.data, whole ? out.data : parts.data,
                     whole ? marks.data : part_marks.data);
    });
    if (!whole)
        launch(up(out.size, 128), 128, 0,
               [&] { scan_combine(p, parts.data, part_marks.data, out.data, marks.data); });
    write(out), write(marks);
    if (operation != GRADIENT) return;

    const Array<float> grad(read<float>(out.size));
    Array<float> means(queries * p.heads), dq(q.size), dkv(kv.size), dparams(params.size);
    const dim3 by_query(up(p.targets, HELD * teams), p.heads, p.batch);
    const dim3 by_key(up(p.context, HELD * teams), p.heads, p.batch);
    Array<double> sums((size_t)p.batch * p.heads * by_key.x * p.terms * 3);
    launch(up(means.size, 128), 128, 0, [&] { gradient_means(p, out.data, grad.data, means.data); });
    launch(by_query, threads, 0, [&] {
        kernels.by_query(p, q.data, kv.data, params.data, sites.data, places.data, mask.data, grad.data, marks.data,
                         means.data, dq.data);
    });
    launch(by_key, threads, sizeof(double) * 3 * p.terms * threads, [&] {
        kernels.by_key(p, q.data, kv.data, params.data, sites.data, places.data, mask.data, grad.data, marks.data,
                       means.data, dkv.data, sums.data);
    });
    if (p.terms)
        launch(p.heads, 128, sizeof(double) * 128, [&] {
            gradient_bias(p, params.data, grad.data, marks.data, means.data, sums.data, (int)by_key.x, dparams.data);
        });
    write(dq), write(dkv), write(dparams);
}

int main() {
    const auto sizes = read<int32_t>(15);
    const auto families = read<unsigned long long>(1)[0];
    const int operation = sizes[0], width = sizes[1], kind = sizes[2], threads = sizes[3];
    Problem p = {sizes[5], sizes[6], sizes[7],  sizes[8],  sizes[9], sizes[10], sizes[11],
                 sizes[12], sizes[13], sizes[4], 0,        0,        families};
    p.wide_q = p.wide_kv = p.d % 4 == 0 && p.w % 4 == 0;
    const int wide = width == 8 ? 0 : width == 16 ? 1 : width == 32 ? 2 : 3;
    run(KERNELS[kind][wide], operation, p, (unsigned)threads, (uint64_t)sizes[14]);
    return std::fflush(stdout);
}
