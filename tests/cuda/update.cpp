// The kernels of src/fused/cuda/update.cu on the processor, as enabled.rs launches them: numbers of a
// training on standard input, what it leaves on standard output (tests/contract/cuda_train.rs).
#include "../../src/fused/cuda/update.cu"

#include <algorithm>

template <class T> static T read_one() {
    T x;
    if (std::fread(&x, sizeof x, 1, stdin) != 1) std::exit(3);
    return x;
}
static std::vector<float> read_many(size_t n) {
    std::vector<float> x(n);
    if (std::fread(x.data(), 4, n, stdin) != n) std::exit(3);
    return x;
}
template <class T> static void write(const std::vector<T> &x) { std::fwrite(x.data(), sizeof(T), x.size(), stdout); }

int main() {
    const int count = read_one<int>(), steps = read_one<int>(), yogi = read_one<int>(), cards = read_one<int>();
    const double clip = read_one<double>();
    std::vector<int> lengths(count), starts(count);
    std::vector<Chunk> chunks;
    int total = 0;
    for (int p = 0; p < count; ++p) {
        lengths[p] = read_one<int>();
        starts[p] = total;
        for (int at = 0; at < lengths[p]; at += CHUNK) chunks.push_back({p, at});
        total += (lengths[p] + 31) / 32 * 32;
    }
    std::vector<std::vector<float>> weights;
    for (int n : lengths) weights.push_back(read_many(n));
    std::vector<unsigned long long> table;
    for (auto &w : weights) table.push_back((unsigned long long)w.data());
    const float start = yogi ? 1e-6f : 0.0f;
    std::vector<float> first(total, start), second(total, start), average(total, 0.0f);
    for (int p = 0; p < count; ++p) std::copy(weights[p].begin(), weights[p].end(), average.begin() + starts[p]);
    std::vector<std::vector<float>> grads(cards, std::vector<float>(total, 0.0f));
    std::vector<double> sums((total + CHUNK - 1) / CHUNK), news(6, 0.0);
    for (int step = 0; step < steps; ++step) {
        Pace pace;
        pace.rate = read_one<float>(), pace.shrink = read_one<float>(), pace.c1 = read_one<float>();
        pace.c2 = read_one<float>(), pace.keep = read_one<float>(), pace.yogi = yogi;
        const float loss = read_one<float>();
        // The gradients of each card's share: some by address, the last parameter straight into the buffer.
        for (auto &g : grads) {
            std::vector<std::vector<float>> given;
            Table from = {};
            for (int p = 0; p < count; ++p) given.push_back(read_many(lengths[p]));
            for (int p = 0; p + 1 < count; ++p) from.at[p] = (unsigned long long)given[p].data();
            std::copy(given.back().begin(), given.back().end(), g.begin() + starts[count - 1]);
            emulate::launch((unsigned)chunks.size(), THREADS, 0,
                            [&] { gather(from, 0, chunks.data(), starts.data(), lengths.data(), g.data()); });
        }
        for (int card = 1; card < cards; ++card) {
            emulate::launch(2, THREADS, 0, [&] { join(grads[card].data(), grads[0].data(), total); });
            std::fill(grads[card].begin(), grads[card].end(), 0.0f);
        }
        emulate::launch((unsigned)sums.size(), THREADS, 0, [&] { squares(grads[0].data(), sums.data(), total); });
        emulate::launch(1, THREADS, 0, [&] { settle(sums.data(), (int)sums.size(), &loss, clip, step, news.data()); });
        emulate::launch((unsigned)chunks.size(), THREADS, 0, [&] {
            update(pace, news.data(), chunks.data(), starts.data(), lengths.data(), table.data(), grads[0].data(),
                   first.data(), second.data(), average.data());
        });
    }
    for (int p = 0; p < count; ++p) {
        const auto part = [&](const std::vector<float> &x) {
            return std::vector<float>(x.begin() + starts[p], x.begin() + starts[p] + lengths[p]);
        };
        write(weights[p]), write(part(first)), write(part(second)), write(part(average));
    }
    write(news);
}
