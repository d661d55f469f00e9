use isopleth::{Stream, attention::table::Table, fused::softmax::*};
use std::arch::x86_64::*;
use std::time::Instant;
#[target_feature(enable = "avx512f")]
fn fma(n: usize) -> f32 {
    let mut a = [_mm512_set1_ps(1.0); 16];
    let b = std::hint::black_box(_mm512_set1_ps(0.999));
    let c = std::hint::black_box(_mm512_set1_ps(0.001));
    for _ in 0..n {
        for x in a.iter_mut() {
            *x = _mm512_fmadd_ps(*x, b, c);
        }
    }
    let mut s = a[0];
    for x in &a {
        s = _mm512_add_ps(s, *x);
    }
    _mm512_reduce_add_ps(s)
}

fn main() {
    let a: Vec<usize> = std::env::args().skip(1).map(|x| x.parse().unwrap()).collect();
    let (n, m, d, w, mode) = (a[0], a[1], a[2], a[3], a[4]);
    let heads = 4;
    let dim = 2;
    let mut rng = Stream::new(1, "x", 0);
    let mut f = |k: usize, s: f64| -> Vec<f32> {
        rng.normals(k).into_iter().map(|v| (v * s) as f32).collect()
    };
    let kv = f(n * heads * (d + w), 1.0);
    let sites = f(n * dim, 0.5);
    let q = f(m * heads * d, 1.0);
    let sq = f(m * dim, 0.5);
    let shape = Shape { heads, d, w, dim };
    let mut keys = Packed::new(shape, n);
    for j in 0..n {
        keys.set(
            j,
            &sites[j * dim..],
            |h| {
                let b = (j * heads + h) * (d + w);
                (b, b + d)
            },
            &kv,
        );
    }
    let bias = |h: usize, x: f64| (-(x * x) / (0.3 + h as f64 * 0.2) / 0.5).exp();
    let table = Table::new(heads, 8.0, bias).unwrap();
    let highest = vec![1.5f32; heads];
    let add = |h: usize, d2: &[f32], s: &mut [f32]| {
        isopleth::attention::bias::add_term(
            isopleth::attention::Term::Rbf,
            [std::f32::consts::LOG2_E, 2.0 / (0.3 + h as f32 * 0.2), 0.0],
            d2,
            s,
        )
    };
    let b = match mode {
        0 => Bias::None,
        1 => Bias::Table { scale: table.scale, table: &table.coefficients },
        _ => Bias::Terms(&add),
    };
    let job = Job { keys: &keys, bias: b, highest: &highest, bend: None, sink: None };
    let mut out = vec![0.0; m * heads * (w + 1)];
    let mut best = 1e9f64;
    let mut ratio = 0.0f64;
    let mut rf = 1e9f64;
    for _ in 0..15 {
        let t = Instant::now();
        std::hint::black_box(unsafe { fma(1_000_000) });
        let f1 = t.elapsed().as_secs_f64() / 16e6;
        let t = Instant::now();
        for g in (0..m).step_by(GROUP) {
            let e = m.min(g + GROUP);
            attend(
                &job,
                &q[g * heads * d..e * heads * d],
                &sq[g * dim..e * dim],
                &mut out[g * heads * (w + 1)..e * heads * (w + 1)],
            );
        }
        let e = t.elapsed().as_secs_f64();
        best = best.min(e);
        let t = Instant::now();
        std::hint::black_box(unsafe { fma(1_000_000) });
        let f = f1.max(t.elapsed().as_secs_f64() / 16e6).max(0.0);
        let f2 = f1.min(f);
        rf = rf.min(f2);
        if f / f2 < 1.03 {
            ratio = ratio.max(f2 * ((d + w) as f64 + 7.0) / 16.0 / (e / (n * m * heads) as f64));
        }
    }
    // reference for a few rows in f64
    let mut worst = 0.0f64;
    for i in (0..m).step_by(m / 7 + 1) {
        for h in 0..heads {
            let mut s: Vec<f64> = (0..n)
                .map(|j| {
                    let mut x = 0.0;
                    for c in 0..d {
                        x += q[(i * heads + h) * d + c] as f64
                            * kv[(j * heads + h) * (d + w) + c] as f64;
                    }
                    x /= (d as f64).sqrt();
                    let d2: f64 = (0..dim)
                        .map(|c| (sq[i * dim + c] as f64 - sites[j * dim + c] as f64).powi(2))
                        .sum();
                    if mode > 0 {
                        x += bias(h, d2.sqrt());
                    }
                    x
                })
                .collect();
            let top = s.iter().cloned().fold(f64::MIN, f64::max);
            let mut l = 0.0;
            for x in &mut s {
                *x = (*x - top).exp();
                l += *x;
            }
            for c in 0..w {
                let v: f64 = (0..n)
                    .map(|j| s[j] * kv[(j * heads + h) * (d + w) + d + c] as f64)
                    .sum::<f64>()
                    / l;
                worst = worst.max((v - out[i * heads * (w + 1) + h * w + c] as f64).abs());
            }
        }
    }
    let ns = best * 1e9 / (n * m * heads) as f64;
    println!(
        "n {n} m {m} d {d} w {w} mode {mode}: {ns:.3} ns/head-pair (1 thread), {:.1} GFLOP/s, ceiling share {:.1}%, fma {:.4} ns, worst abs err {worst:.2e}, table err {:.1e}",
        2.0 * (d + w) as f64 / ns,
        100.0 * ratio,
        rf * 1e9,
        table.error
    );
}
