// The kernels of src/fused/cuda/layers.cu on the processor, beside the same formulas in f64.
#include "../../src/fused/cuda/layers.cu"

#include <algorithm>
#include <cstdlib>

static uint64_t seed = 7;
static float number() {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return (float)((double)(seed >> 11) / (double)(1ull << 53) * 4.0 - 2.0);
}
typedef std::vector<float> V;
static V numbers(size_t n) {
    V x(n);
    for (float &v : x) v = number();
    return x;
}
static void near(const char *what, int rows, int width, const V &seen, const std::vector<double> &truth) {
    double top = 0.1, worst = 0.0;
    for (double v : truth) top = std::max(top, std::fabs(v));
    for (size_t i = 0; i < truth.size(); ++i) worst = std::max(worst, std::fabs(seen[i] - truth[i]));
    if (!(worst < 2e-6 * top)) {
        std::fprintf(stderr, "%s, %d rows of %d: off by %g of %g\n", what, rows, width, worst, top);
        std::exit(1);
    }
}
static double gelu(double x) { return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x))); }
static double act64(int mode, double x) { return mode == GELU ? gelu(x) : mode == RELU ? (x > 0 ? x : 0) : x; }
static double slope64(int mode, double x) {
    if (mode == GELU) return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5;
    return mode == RELU ? (x > 0) : 1;
}

int main() {
    const int shapes[][2] = {{1, 1}, {1, 64}, {3, 7}, {64, 32}, {65, 33}, {200, 64}, {131, 256}, {9, 300}};
    for (auto [rows, width] : shapes) {
        const long long n = (long long)rows * width;
        const int spans = (rows + SPAN - 1) / SPAN, tiles = (width + LANES - 1) / LANES;
        const V x = numbers(n), g = numbers(n), scale = numbers(width), shift = numbers(width), other = numbers(n);
        for (int mode : {NONE, GELU, RELU}) {
            // Forward, with and without a residual.
            for (bool residual : {false, true}) {
                V z = x, y(n, NAN);
                emulate::launch(3, 64, 0, [&] {
                    epilogue(z.data(), scale.data(), residual ? other.data() : nullptr, y.data(), n, width, mode);
                });
                std::vector<double> truth(n);
                for (int i = 0; i < n; ++i)
                    truth[i] = act64(mode, (float)(x[i] + scale[i % width])) + (residual ? other[i] : 0.0);
                near("epilogue", rows, width, y, truth);
                for (int i = 0; i < n; ++i)
                    if (mode != NONE && z[i] != x[i] + scale[i % width]) std::exit(2);
            }
            V y(n, NAN);
            emulate::launch(2, 64, 0, [&] { activate(x.data(), y.data(), n, mode); });
            std::vector<double> truth(n);
            for (int i = 0; i < n; ++i) truth[i] = act64(mode, x[i]);
            near("activate", rows, width, y, truth);
            // Backward: slopes and the sums of columns, set and added.
            V dz(n, NAN), sums(spans * width, NAN), to(width, 0.5f);
            emulate::launch(dim3(spans, tiles), WARPS * LANES, 0,
                            [&] { slopes(x.data(), g.data(), dz.data(), sums.data(), rows, width, mode); });
            std::vector<double> slope(n), column(width, 0.0);
            for (int i = 0; i < n; ++i) slope[i] = g[i] * slope64(mode, x[i]), column[i % width] += slope[i];
            if (mode != NONE) near("slopes", rows, width, dz, slope);
            emulate::launch(tiles, WARPS * LANES, 0, [&] { fold(sums.data(), to.data(), nullptr, spans, width, width); });
            for (double &v : column) v += 0.5;
            near("columns", rows, width, to, column);
        }
        // Layer normalisation: one number in a row has no spread, only rounding is left of its slope.
        V y(n, NAN), dx(n, NAN), sums(spans * 2 * width, NAN), both(2 * width, NAN);
        emulate::launch((rows + WARPS - 1) / WARPS, WARPS * LANES, 0,
                        [&] { norm_forward(x.data(), scale.data(), shift.data(), y.data(), rows, width); });
        for (bool residual : {false, true}) {
            std::fill(both.begin(), both.end(), 0.0f);
            emulate::launch(spans, WARPS * LANES, WARPS * 2 * width * sizeof(float), [&] {
                norm_backward(x.data(), g.data(), scale.data(), residual ? other.data() : nullptr, dx.data(),
                              sums.data(), rows, width);
            });
            emulate::launch((2 * width + LANES - 1) / LANES, WARPS * LANES, 0,
                            [&] { fold(sums.data(), both.data(), both.data() + width, spans, 2 * width, width); });
            std::vector<double> ty(n), tdx(n), tboth(2 * width, 0.0);
            for (int r = 0; r < rows; ++r) {
                double mean = 0, var = 0, a = 0, b = 0;
                for (int i = 0; i < width; ++i) mean += x[r * width + i] / (double)width;
                for (int i = 0; i < width; ++i) var += std::pow(x[r * width + i] - mean, 2) / width;
                const double rstd = 1 / std::sqrt(var + 1e-6);
                for (int i = 0; i < width; ++i) {
                    const double normal = (x[r * width + i] - mean) * rstd, d = g[r * width + i];
                    ty[r * width + i] = normal * scale[i] + shift[i];
                    tboth[i] += d * normal, tboth[width + i] += d;
                    a += d * scale[i] / width, b += d * scale[i] * normal / width;
                }
                for (int i = 0; i < width; ++i) {
                    const double normal = (x[r * width + i] - mean) * rstd;
                    tdx[r * width + i] = rstd * (g[r * width + i] * scale[i] - a - normal * b) + (residual ? other[r * width + i] : 0);
                }
            }
            if (width == 1) continue;
            near("norm", rows, width, y, ty);
            near("norm, slope", rows, width, dx, tdx);
            near("norm, sums", rows, width, both, tboth);
        }
    }
    // Constraints, and their slopes by differences.
    const int each = 6, n = 4 * each;
    const V raw = numbers(n), g = numbers(n), logged = {1, 0, 0, 1, 0, 0}, sign = {-1, 0, 0, 1, 0, 0}, folded = {0, 1, 0, 0, 0, 1};
    V out(n, NAN), slope(n, NAN);
    const auto run = [&](const V &raw, const float *g, V &out) {
        emulate::launch(1, 32, 0, [&] { constrain(raw.data(), logged.data(), sign.data(), folded.data(), g, out.data(), n, each); });
    };
    run(raw, nullptr, out);
    run(raw, g.data(), slope);
    const auto at = [&](int i, double x) {
        const int j = i % each;
        return x * (1 - logged[j] - folded[j]) + std::exp(x * logged[j]) * sign[j] + std::fabs(x) * folded[j];
    };
    std::vector<double> value(n), steep(n);
    for (int i = 0; i < n; ++i) value[i] = at(i, raw[i]), steep[i] = g[i] * (at(i, raw[i] + 1e-6) - at(i, raw[i] - 1e-6)) / 2e-6;
    near("constrain", n, each, out, value);
    near("constrain, slope", n, each, slope, steep);
    // What is not a number stays none.
    if (!(gate(NAN) != gate(NAN)) || act(GELU, -1e30f) != 0.0f || act(GELU, 1e30f) != 1e30f) return 3;
    return 0;
}
