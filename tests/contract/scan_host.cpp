// Runs the kernel of src/attention/cuda/scan.cu on the processor, one thread after the other: a
// problem on standard input, answers and marks on standard output, both as they lie in memory.
#include "../../src/attention/cuda/scan.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace isopleth;

constexpr int THREADS = 128;

template <class T> static std::vector<T> read(size_t count) {
    std::vector<T> values(count);
    if (count && std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(3);
    return values;
}

template <int WIDTH>
static void run(const Problem &p, int batch, const float *q, const float *kv, const float *params,
                const float *sites, const float *places, const float *mask, float *out, float *marks) {
    for (int row = 0; row < batch; ++row)
        for (int head = 0; head < p.heads; ++head) {
            Bent terms[TERMS];
            for (int j = 0; j < p.terms; ++j) terms[j] = bent(p, params, head, j);
            std::vector<Query<WIDTH>> queries(p.targets);
            for (int t = 0; t < p.targets; ++t) queries[t].start(p, row, head, t, q, sites, terms);
            for (int first = 0; first < p.context; first += KEYS) {
                static Tile<WIDTH> tile;
                for (int me = 0; me < THREADS; ++me)
                    stage(tile, p, row, head, first, me, THREADS, kv, places, mask);
                for (auto &query : queries) query.meet(p, tile, terms);
            }
            for (int t = 0; t < p.targets; ++t) queries[t].finish(p, row, head, t, out, marks);
        }
}

int main() {
    const auto sizes = read<int32_t>(9);
    const auto families = read<uint64_t>(1);
    const int batch = sizes[0];
    const Problem p = {sizes[1], sizes[2], sizes[3], sizes[4],   sizes[5],
                       sizes[6], sizes[7], families[0], sizes[8]};
    const size_t queries = (size_t)batch * p.targets, keys = (size_t)batch * p.context;
    const auto q = read<float>(queries * p.heads * p.d);
    const auto kv = read<float>(keys * p.heads * (p.d + p.w));
    const auto params = read<float>((size_t)p.heads * p.terms * 3);
    const auto sites = read<float>(queries * p.dim);
    const auto places = read<float>(keys * p.dim);
    const auto mask = read<float>(keys);
    std::vector<float> out(queries * p.heads * p.w), marks(queries * p.heads * 2);
    const int widest = p.d > p.w ? p.d : p.w;
    const auto go = widest <= 16 ? run<16> : widest <= 32 ? run<32> : run<64>;
    go(p, batch, q.data(), kv.data(), params.data(), sites.data(), places.data(), mask.data(), out.data(),
       marks.data());
    std::fwrite(out.data(), sizeof(float), out.size(), stdout);
    std::fwrite(marks.data(), sizeof(float), marks.size(), stdout);
    return std::fflush(stdout);
}
