// The distance bias of a score, from squared distances in registers, and the gradient of its terms.
//
// The families are those of src/attention/bias.rs, where their sources stand. Scores are held in powers
// of two, as in src/fused/softmax.rs. Everything is f32.
#pragma once
#include "machine.h"

namespace isopleth {

// Coordinates of a site, padded with zeros.
constexpr int DIM = 4;
// Terms of a bias; their families in 4 bits each.
constexpr int TERMS = 16;
constexpr double LOG2_E = 1.4426950408889634;

// In the order of `Term::ALL`.
enum Term { SCALAR, RBF, TISA, EXPONENTIAL, SQUARED_EXPONENTIAL, MATERN_32, MATERN_52, WENDLAND, SINK, PERIODIC };

// Sizes and kinds, the same for every query; enabled.rs has it too.
struct Problem {
    int batch, targets, context, heads, d, w, dim, terms;
    // Whether straight lines are chords of the unit sphere.
    int globe;
    // Into how many parts the keys are split, each a block's.
    int splits;
    // Whether rows of queries, and of keys with values, may be read 16 bytes at once.
    int wide_q, wide_kv;
    // Families of the terms, the first in the lowest 4 bits.
    unsigned long long families;
};

// One term with its parameters: a in powers of two, −b so for bumps (which are powers of two then).
struct Bent {
    int family;
    float a, b, c;
};

DEVICE int family_of(const Problem &p, int term) { return (int)(p.families >> (4 * term)) & 15; }

DEVICE Bent bent(const Problem &p, const float *params, int head, int term) {
    const float *abc = params + ((size_t)head * p.terms + term) * 3;
    Bent t;
    t.family = family_of(p, term);
    t.a = (float)(abc[0] * LOG2_E);
    t.b = abc[1];
    t.c = abc[2];
    switch (t.family) {
    case RBF:
    case TISA:
    case EXPONENTIAL: t.b = (float)(-abc[1] * LOG2_E); break;
    case SQUARED_EXPONENTIAL: t.a = (float)(-0.5 * LOG2_E * abc[0] * abc[1] * abc[1]); break;
    case MATERN_32: t.b = sqrtf(3.0f) * fabsf(abc[1]); break;
    case MATERN_52: t.b = sqrtf(5.0f) * fabsf(abc[1]); break;
    case WENDLAND: t.b = fabsf(abc[1]); break;
    }
    return t;
}

// Squared great-circle distance from the squared chord: half the angle is asin x, x = c / 2; from
// x = ½ on it is π/2 − 2 asin √((1 − x) / 2). The polynomial is that of Cephes, right to 2e-7.
DEVICE float arc2(float chord2) {
    float x2 = fminf(0.25f * chord2, 1.0f);
    bool far = x2 > 0.25f;
    float z = far ? 0.5f - 0.5f * sqrtf(x2) : x2;
    float p = 4.21632e-2f;
    p = fmaf(p, z, 2.418131e-2f);
    p = fmaf(p, z, 4.5470026e-2f);
    p = fmaf(p, z, 7.4953e-2f);
    p = fmaf(p, z, 1.6666752e-1f);
    p = fmaf(p, z, 1.0f);
    float angle = fmaf(-4.0f * sqrtf(z), p, 3.14159265f);
    return far ? angle * angle : chord2 * p * p;
}

// Log of the Wendland correlation at u < 1, u the distance over the support.
DEVICE float log_wendland(float u) {
    // Near 0 the correlation is 1 − u² (10 − 20u + 15u² − 4u³): no digit of u² is lost.
    if (u < 0.25f) return log1pf(-fmaf(fmaf(fmaf(-4.0f, u, 15.0f), u, -20.0f), u, 10.0f) * u * u);
    float v = 1.0f - u, v2 = v * v;
    return logf(v2 * v2 * fmaf(4.0f, u, 1.0f));
}

DEVICE float log_matern_32(float s) { return log1pf(s) - s; }
DEVICE float log_matern_52(float s) { return log1pf(fmaf(s, s * (1.0f / 3.0f), s)) - s; }

// √(2ν) |b| d, held below what its square can take in f32.
DEVICE float root(float b, float d2) { return fminf(b * sqrtf(d2), 1e18f); }

// 2ˣ, held where a bump that grows (b < 0) would leave f32.
DEVICE float bump(float x) { return exp2_approx(fminf(x, 96.0f)); }

// cos and sin of t turns, by Taylor's polynomials of half the angle, right to 6e-8.
DEVICE void turn(float t, float &cosine, float &sine) {
    t -= rintf(t);
    const float x = 3.14159265f * t, x2 = x * x;
    float s = -2.5052108e-8f;
    s = fmaf(s, x2, 2.7557319e-6f);
    s = fmaf(s, x2, -1.984127e-4f);
    s = fmaf(s, x2, 8.333333e-3f);
    s = fmaf(s, x2, -1.6666667e-1f);
    s = fmaf(s * x2, x, x);
    float c = 2.0876757e-9f;
    c = fmaf(c, x2, -2.7557319e-7f);
    c = fmaf(c, x2, 2.4801587e-5f);
    c = fmaf(c, x2, -1.3888889e-3f);
    c = fmaf(c, x2, 4.1666667e-2f);
    c = fmaf(c, x2, -0.5f);
    c = fmaf(c, x2, 1.0f);
    cosine = fmaf(-2.0f * s, s, 1.0f);
    sine = 2.0f * s * c;
}

// Adds one term to N scores at squared distances d2: −∞ outside a compact support.
template <int N> DEVICE void add_term(const Bent &t, const float (&d2)[N], float (&score)[N]) {
    switch (t.family) {
    case SCALAR:
        UNROLL
        for (int i = 0; i < N; ++i) score[i] = fmaf(sqrtf(d2[i]), t.a, score[i]);
        break;
    case RBF:
        UNROLL
        for (int i = 0; i < N; ++i) score[i] = fmaf(bump(t.b * d2[i]), t.a, score[i]);
        break;
    case TISA:
        UNROLL
        for (int i = 0; i < N; ++i) {
            const float u = sqrtf(d2[i]) - t.c;
            score[i] = fmaf(bump(t.b * u * u), t.a, score[i]);
        }
        break;
    case EXPONENTIAL:
        UNROLL
        for (int i = 0; i < N; ++i) score[i] = fmaf(bump(t.b * sqrtf(d2[i])), t.a, score[i]);
        break;
    case SQUARED_EXPONENTIAL:
        UNROLL
        for (int i = 0; i < N; ++i) score[i] = fmaf(d2[i], t.a, score[i]);
        break;
    case MATERN_32:
        UNROLL
        for (int i = 0; i < N; ++i) score[i] = fmaf(log_matern_32(root(t.b, d2[i])), t.a, score[i]);
        break;
    case MATERN_52:
        UNROLL
        for (int i = 0; i < N; ++i) score[i] = fmaf(log_matern_52(root(t.b, d2[i])), t.a, score[i]);
        break;
    case WENDLAND:
        UNROLL
        for (int i = 0; i < N; ++i) {
            const float u = t.b * sqrtf(d2[i]);
            score[i] = u < 1.0f ? fmaf(log_wendland(u), t.a, score[i]) : -INFINITY;
        }
        break;
    case PERIODIC:
        UNROLL
        for (int i = 0; i < N; ++i) {
            float cosine, sine;
            turn(t.b * sqrtf(d2[i]), cosine, sine);
            score[i] = fmaf(cosine, t.a, score[i]);
        }
        break;
    }
}

// The score with one term added, at squared distance d2.
DEVICE float with_term(const Bent &t, float d2, float score) {
    const float at[1] = {d2};
    float one[1] = {score};
    add_term<1>(t, at, one);
    return one[0];
}

// Adds Σ ds ∂term/∂(a, b, c) to `sums`: N pairs at squared distances d2, of which ds are gradients of
// scores (exponents of e). `abc` as learned, `t` the same bent.
template <int N>
DEVICE void add_slopes(const Bent &t, const float (&abc)[3], const float (&d2)[N], const float (&ds)[N],
                       float (&sums)[3]) {
    const float a = abc[0], b = abc[1], size = fabsf(abc[1]);
    float one = 0.0f, two = 0.0f, three = 0.0f;
    switch (t.family) {
    case SCALAR:
        UNROLL
        for (int i = 0; i < N; ++i) one = fmaf(ds[i], sqrtf(d2[i]), one);
        break;
    case RBF:
        UNROLL
        for (int i = 0; i < N; ++i) {
            const float e = ds[i] * bump(t.b * d2[i]);
            one += e;
            two = fmaf(-d2[i], e, two);
        }
        two *= a;
        break;
    case TISA:
        UNROLL
        for (int i = 0; i < N; ++i) {
            const float u = sqrtf(d2[i]) - t.c;
            const float e = ds[i] * bump(t.b * u * u);
            one += e;
            two = fmaf(-u * u, e, two);
            three = fmaf(2.0f * u, e, three);
        }
        two *= a;
        three *= a * b;
        break;
    case EXPONENTIAL:
        UNROLL
        for (int i = 0; i < N; ++i) {
            const float d = sqrtf(d2[i]), e = ds[i] * bump(t.b * d);
            one += e;
            two = fmaf(-d, e, two);
        }
        two *= a;
        break;
    // Below, b counts as |b|: its sign returns at the end.
    case SQUARED_EXPONENTIAL:
        UNROLL
        for (int i = 0; i < N; ++i) one = fmaf(ds[i], d2[i], one);
        two = -a * size * one;
        one *= -0.5f * b * b;
        break;
    case MATERN_32:
        UNROLL
        for (int i = 0; i < N; ++i) {
            const float s = root(t.b, d2[i]);
            one = fmaf(ds[i], log_matern_32(s), one);
            two -= ds[i] * d2[i] / (1.0f + s);
        }
        two *= 3.0f * a * size;
        break;
    case MATERN_52:
        UNROLL
        for (int i = 0; i < N; ++i) {
            const float s = root(t.b, d2[i]);
            one = fmaf(ds[i], log_matern_52(s), one);
            two -= ds[i] * d2[i] * ((1.0f + s) / fmaf(1.0f + s, 3.0f, s * s));
        }
        two *= 5.0f * a * size;
        break;
    case WENDLAND:
        UNROLL
        for (int i = 0; i < N; ++i) {
            // The weight in ds is 0 outside, and falls like (1 − u)⁴ᵃ towards the edge, where 1 − u
            // is never less than 2⁻²⁴: every product is finite.
            const float u = t.b * sqrtf(d2[i]);
            if (u < 1.0f) {
                one = fmaf(ds[i], log_wendland(u), one);
                two -= ds[i] * d2[i] / ((1.0f - u) * fmaf(4.0f, u, 1.0f));
            }
        }
        two *= 20.0f * a * size;
        break;
    case PERIODIC:
        UNROLL
        for (int i = 0; i < N; ++i) {
            const float d = sqrtf(d2[i]);
            float cosine, sine;
            turn(b * d, cosine, sine);
            one = fmaf(ds[i], cosine, one);
            two -= ds[i] * d * sine;
        }
        two *= 6.28318531f * a;
        break;
    }
    if (t.family >= SQUARED_EXPONENTIAL && t.family <= WENDLAND && b < 0.0f) two = -two;
    sums[0] += one;
    sums[1] += two;
    sums[2] += three;
}

} // namespace isopleth
