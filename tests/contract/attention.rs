//! Laws of attention: the fast version equals the reference, for any chunk, with far keys,
//! extreme scores and hidden sites, in value and in gradient.

use candle_core::{DType, Device, Tensor, Var};
use isopleth::{
    Stream,
    attention::{Bias, Keys, Metric, Start, Term, full, scan},
};

const CPU: Device = Device::Cpu;

fn normal(rng: &mut Stream, shape: &[usize], scale: f64) -> Tensor {
    let n = shape.iter().product();
    let values: Vec<f64> = rng.normals(n).into_iter().map(|v| v * scale).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn cast(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap()
}

struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sq: Tensor,
    sk: Tensor,
    mask: Tensor,
    params: Tensor,
    terms: Vec<Term>,
}

fn case(
    rng: &mut Stream,
    targets: usize,
    context: usize,
    size: f64,
    spread: f64,
    sink: bool,
) -> Case {
    let (b, h, d, w) = (2, 3, 5, 4);
    let mask: Vec<f64> =
        (0..b * context).map(|i| if context > 1 && i % 5 == 1 { 0.0 } else { 1.0 }).collect();
    let terms: Vec<Term> = Term::ALL.into_iter().filter(|t| sink || *t != Term::Sink).collect();
    let mut params = rng.normals(h * terms.len() * 3);
    for (i, p) in params.chunks_mut(3).enumerate() {
        p[1] = p[1].abs();
        // A negative sharpness would pull towards the edge of a support; one below ¼ has a gradient
        // without bound there.
        if terms[i % terms.len()].is_log_kernel() {
            p[0] = 0.5 + p[0].abs();
        }
    }
    Case {
        q: normal(rng, &[b, targets, h, d], size),
        k: normal(rng, &[b, context, h, d], size),
        v: normal(rng, &[b, context, h, w], 1.0),
        sq: normal(rng, &[b, targets, 2], spread),
        sk: normal(rng, &[b, context, 2], spread),
        mask: Tensor::from_vec(mask, (b, context), &CPU).unwrap(),
        params: Tensor::from_vec(params, (h, terms.len(), 3), &CPU).unwrap(),
        terms,
    }
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let a = a.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let b = b.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let top = b.iter().fold(0.0f64, |m, v| m.max(v.abs())).max(0.1);
    a.iter().zip(&b).fold(0.0f64, |m, (x, y)| {
        assert!(x.is_finite(), "not finite");
        m.max((x - y).abs())
    }) / top
}

#[test]
fn scan_equals_full_for_any_chunk_far_keys_and_extreme_scores() {
    let mut rng = Stream::new(1, "attention", 0);
    // (targets, context, size of q and k, spread of sites): ordinary, one key, scores in the
    // hundreds, sites so far that the scalar term drives every score below −1e3.
    for (targets, context, size, spread) in [
        (70, 37, 1.0, 1.0),
        (3, 1, 1.0, 1.0),
        (9, 600, 6.0, 1.0),
        (9, 40, 1.0, 2000.0),
        (5, 0, 1.0, 1.0),
    ] {
        for sink in [false, true] {
            let c = case(&mut rng, targets, context, size, spread, sink);
            let bias = Bias {
                terms: c.terms.clone(),
                params: c.params.clone(),
                metric: Metric::Euclidean,
            };
            let keys = Keys::pack(&c.k, &c.v, &c.sk, &c.mask).unwrap();
            let truth = full(&c.q, &c.sq, &keys, Some(&bias)).unwrap();
            let keys32 =
                Keys::pack(&cast(&c.k), &cast(&c.v), &cast(&c.sk), &cast(&c.mask)).unwrap();
            let bias32 =
                Bias { terms: c.terms.clone(), params: cast(&c.params), metric: Metric::Euclidean };
            for chunk in [1, 7, 64, 512, 4096] {
                let exact = scan(&c.q, &c.sq, &keys, Some(&bias), chunk, Start::Exact).unwrap();
                assert!(relative(&exact, &truth) < 1e-12, "composed scan, chunk {chunk}");
                let fast =
                    scan(&cast(&c.q), &cast(&c.sq), &keys32, Some(&bias32), chunk, Start::Exact)
                        .unwrap();
                let gap = relative(&fast, &truth);
                // Scores of size S lose S·2⁻²⁴ of their digits before the exponential sees them.
                let allowed =
                    4e-6 * (1.0 + size * size * 5.0).max(if spread > 1.0 { 200.0 } else { 1.0 });
                assert!(
                    gap < allowed,
                    "targets {targets}, context {context}, chunk {chunk}: {gap:e}"
                );
            }
        }
    }
}

#[test]
fn hidden_and_absent_keys_give_zero_and_no_nan() {
    let mut rng = Stream::new(2, "attention", 0);
    let mut c = case(&mut rng, 6, 9, 1.0, 1.0, false);
    c.mask = c.mask.zeros_like().unwrap();
    let keys = Keys::pack(&cast(&c.k), &cast(&c.v), &cast(&c.sk), &cast(&c.mask)).unwrap();
    let q = Var::from_tensor(&cast(&c.q)).unwrap();
    let bias = Bias { terms: c.terms.clone(), params: cast(&c.params), metric: Metric::Euclidean };
    let out = scan(q.as_tensor(), &cast(&c.sq), &keys, Some(&bias), 4, Start::Exact).unwrap();
    let total = out.abs().unwrap().sum_all().unwrap();
    assert_eq!(total.to_scalar::<f32>().unwrap(), 0.0);
    let grads = total.backward().unwrap();
    let g = grads.get(q.as_tensor()).unwrap().abs().unwrap().sum_all().unwrap();
    assert_eq!(g.to_scalar::<f32>().unwrap(), 0.0);
}

#[test]
fn gradients_equal_autograd_of_the_reference() {
    let mut rng = Stream::new(3, "attention", 0);
    for (targets, context, chunk) in [(70, 33, 10), (5, 130, 512), (2, 1, 3)] {
        let c = case(&mut rng, targets, context, 1.0, 0.7, context != 33);
        let weigh = normal(&mut rng, &[2, targets, 3, 4], 1.0);
        let mut results: Vec<Vec<Tensor>> = Vec::new();
        for fast in [false, true] {
            let move_to = |x: &Tensor| if fast { cast(x) } else { x.clone() };
            let vars: Vec<Var> = [&c.q, &c.k, &c.v, &c.params]
                .iter()
                .map(|x| Var::from_tensor(&move_to(x)).unwrap())
                .collect();
            let keys = Keys::pack(&vars[1], &vars[2], &move_to(&c.sk), &move_to(&c.mask)).unwrap();
            let bias = Bias {
                terms: c.terms.clone(),
                params: vars[3].as_tensor().clone(),
                metric: Metric::Euclidean,
            };
            let sq = move_to(&c.sq);
            let out = if fast {
                scan(&vars[0], &sq, &keys, Some(&bias), chunk, Start::Exact).unwrap()
            } else {
                full(&vars[0], &sq, &keys, Some(&bias)).unwrap()
            };
            let grads = (out * move_to(&weigh)).unwrap().sum_all().unwrap().backward().unwrap();
            results.push(vars.iter().map(|v| grads.get(v.as_tensor()).unwrap().clone()).collect());
        }
        for (name, i) in [("q", 0), ("k", 1), ("v", 2), ("bias", 3)] {
            let gap = relative(&results[1][i], &results[0][i]);
            assert!(gap < 2e-5, "d{name}, {targets} × {context}: {gap:e}");
        }
    }
}

#[test]
fn reference_gradient_agrees_with_finite_differences() {
    let mut rng = Stream::new(4, "attention", 0);
    let c = case(&mut rng, 4, 6, 1.0, 0.7, true);
    let loss = |params: &Tensor| -> Tensor {
        let keys = Keys::pack(&c.k, &c.v, &c.sk, &c.mask).unwrap();
        let bias =
            Bias { terms: c.terms.clone(), params: params.clone(), metric: Metric::Euclidean };
        full(&c.q, &c.sq, &keys, Some(&bias)).unwrap().sqr().unwrap().sum_all().unwrap()
    };
    let var = Var::from_tensor(&c.params).unwrap();
    let grads = loss(var.as_tensor()).backward().unwrap();
    let g = grads.get(var.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let base = c.params.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    for i in 0..base.len() {
        let step = |h: f64| {
            let mut p = base.clone();
            p[i] += h;
            let p = Tensor::from_vec(p, c.params.shape(), &CPU).unwrap();
            loss(&p).to_scalar::<f64>().unwrap()
        };
        let numeric = (step(1e-5) - step(-1e-5)) / 2e-5;
        assert!((numeric - g[i]).abs() < 1e-6 * (1.0 + numeric.abs()), "{i}: {numeric} {}", g[i]);
    }
}

/// Golden values of an independent program: biased attention, H = 2, d = 3, 4 queries, 5 keys.
#[test]
fn biased_attention_golden_values() {
    let flat = |h: usize, l: usize, d: usize, f: &dyn Fn(f64) -> f64| -> Tensor {
        let n = h * l * d;
        let x =
            Tensor::from_vec((0..n).map(|i| f(i as f64)).collect::<Vec<f64>>(), (1, h, l, d), &CPU);
        cast(&x.unwrap().transpose(1, 2).unwrap().contiguous().unwrap())
    };
    let q = flat(2, 4, 3, &|n| (0.7 * n + 0.1).sin());
    let k = flat(2, 5, 3, &|n| (0.9 * n + 0.2).cos());
    let v = flat(2, 5, 3, &|n| (1.3 * n + 0.3).sin());
    let place = |n: usize, f: &dyn Fn(f64) -> [f64; 2]| {
        let xy: Vec<f64> = (0..n).flat_map(|i| f(i as f64)).collect();
        cast(&Tensor::from_vec(xy, (1, n, 2), &CPU).unwrap())
    };
    let sq = place(4, &|i| [(1.1 * i).sin(), (0.6 * i).cos()]);
    let sk = place(5, &|j| [(0.8 * j).cos(), (1.4 * j).sin()]);
    let mask = Tensor::new(&[[1f32, 1., 1., 1., 0.]], &CPU).unwrap();
    let params = Tensor::new(
        &[[[1f32, 0.5, 0.0], [-0.5, 2.0, 0.0]], [[0.7, 1.5, 0.0], [0.3, 0.1, 0.0]]],
        &CPU,
    )
    .unwrap();
    let bias = Bias { terms: vec![Term::Rbf, Term::Rbf], params, metric: Metric::Euclidean };
    let keys = Keys::pack(&k, &v, &sk, &mask).unwrap();
    let golden = [
        [
            0.3897337, 0.1442068, -0.3125834, 0.2655687, 0.4330591, -0.0338831, -0.5259977,
            -0.0265850, 0.5117748, 0.4105944, 0.2226217, -0.2914923,
        ],
        [
            0.3879826, -0.0007597, -0.3883890, -0.0286141, 0.4270869, 0.2571046, -0.1368962,
            0.0514399, 0.1644164, 0.4517530, 0.0369414, -0.4319895,
        ],
    ];
    let reference = full(&q, &sq, &keys, Some(&bias)).unwrap();
    let fast = scan(&q, &sq, &keys, Some(&bias), 2, Start::Exact).unwrap();
    for out in [reference, fast] {
        let out = out.squeeze(0).unwrap().transpose(0, 1).unwrap().contiguous().unwrap();
        let out = out.flatten(1, 2).unwrap().to_vec2::<f32>().unwrap();
        for (row, want) in out.iter().zip(&golden) {
            for (a, b) in row.iter().zip(want) {
                assert!((f64::from(*a) - b).abs() < 1e-6, "{a} against {b}");
            }
        }
    }
}

/// The published start of the running maximum is wrong when every score is far below zero; ours
/// is not. Reproducing the defect shows that the setting works.
#[test]
fn published_start_underflows_and_ours_does_not() {
    let one = |x: f32| Tensor::full(x, (1, 8, 1, 1), &CPU).unwrap();
    let (q, k, v) = (one(-30.0), one(1.0), one(2.0));
    let sites = Tensor::zeros((1, 8, 2), DType::F32, &CPU).unwrap();
    let keys =
        Keys::pack(&k, &v, &sites, &Tensor::ones((1, 8), DType::F32, &CPU).unwrap()).unwrap();
    let value = |start: Start, chunk: usize| -> f32 {
        let out = scan(&q, &sites, &keys, None, chunk, start).unwrap();
        out.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]
    };
    assert!((value(Start::Exact, 1) - 2.0).abs() < 1e-6);
    // 8 e⁻³⁰ / (8 e⁻³⁰ + 1e-10) = 0.743 % of the right answer.
    assert!((value(Start::Published, 512) / 2.0 - 0.00743).abs() < 1e-4);
    assert!((value(Start::Published, 1) / 2.0 - 0.00094).abs() < 2e-5);
}
