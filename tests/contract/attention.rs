//! Laws of attention: the fast version equals the reference, for any chunk, with far keys,
//! extreme scores, compact supports and hidden sites, in value and in gradient, on the plane and on
//! the globe.

use candle_core::{DType, Device, Tensor, Var};
use isopleth::{
    Stream,
    attention::{
        Bias, Keys, Metric, Start, Term,
        bias::{add_term, arcs, geometry, squared_distances},
        full, scan,
    },
    kernel,
    registry::Named,
};

const CPU: Device = Device::Cpu;
/// Relative error of one rounding in f32.
const ROUNDING: f64 = 1.0 / 16_777_216.0;

/// Normal draws that f32 holds exactly, so that both precisions see the same numbers.
fn normals(rng: &mut Stream, n: usize, scale: f64) -> Vec<f64> {
    rng.normals(n).into_iter().map(|v| f64::from((v * scale) as f32)).collect()
}

fn normal(rng: &mut Stream, shape: &[usize], scale: f64) -> Tensor {
    let n = shape.iter().product();
    Tensor::from_vec(normals(rng, n, scale), shape, &CPU).unwrap()
}

fn cast(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap()
}

fn host(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Every family alone, with and without a sink; all together; all that reach everywhere.
fn families() -> Vec<Vec<Term>> {
    let real: Vec<Term> = Term::ALL.into_iter().filter(|t| *t != Term::Sink).collect();
    let alone = real.iter().flat_map(|t| [vec![*t], vec![*t, Term::Sink]]);
    let wide = real.iter().copied().filter(|t| *t != Term::Wendland).collect();
    alone.chain([real.clone(), wide, Term::ALL.to_vec(), vec![Term::Sink]]).collect()
}

fn named(terms: &[Term]) -> String {
    terms.iter().map(|t| t.name()).collect::<Vec<_>>().join(" + ")
}

/// What q · k / √d looks like, before the bias.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scores {
    /// Normal, of this size.
    Plain(f64),
    /// Every one near −10⁴.
    Low,
    /// +80 for every third key, −10⁴ for the others.
    High,
}

/// Batches, heads, key width and value width of every case. √d is 2, so q · k / √d is exact where
/// the product is.
const SHAPE: (usize, usize, usize, usize) = (2, 3, 4, 3);

struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sq: Tensor,
    sk: Tensor,
    mask: Tensor,
    params: Tensor,
    terms: Vec<Term>,
    metric: Metric,
}

impl Case {
    fn new(
        rng: &mut Stream,
        terms: &[Term],
        sites: [usize; 2],
        scores: Scores,
        spread: f64,
    ) -> Self {
        Case::sized(rng, SHAPE, terms, sites, scores, spread)
    }

    fn sized(
        rng: &mut Stream,
        (b, h, d, w): (usize, usize, usize, usize),
        terms: &[Term],
        [targets, context]: [usize; 2],
        scores: Scores,
        spread: f64,
    ) -> Self {
        let mask: Vec<f64> =
            (0..b * context).map(|i| if context > 1 && i % 5 == 1 { 0.0 } else { 1.0 }).collect();
        let mut params = normals(rng, h * terms.len() * 3, 1.0);
        for (p, term) in params.chunks_mut(3).zip(terms.iter().cycle()) {
            p[1] = p[1].abs();
            // A negative sharpness would pull towards the edge of a support; one below ¼ has a
            // gradient without bound there.
            if term.is_log_kernel() {
                p[0] = 0.5 + p[0].abs();
                p[1] += 0.25;
            }
        }
        let size = if let Scores::Plain(size) = scores { size } else { 0.5 };
        let mut q = normals(rng, b * targets * h * d, size);
        let mut k = normals(rng, b * context * h * d, size);
        let (first_q, first_k): (f64, [f64; 3]) = match scores {
            Scores::Plain(_) => (0.0, [0.0; 3]),
            Scores::Low => (200.0, [-100.0; 3]),
            Scores::High => (20.0, [8.0, -1000.0, -1000.0]),
        };
        if scores != Scores::Plain(size) {
            q.iter_mut().step_by(d).for_each(|v| *v = first_q);
            k.iter_mut().step_by(d).enumerate().for_each(|(i, v)| *v = first_k[i / h % 3]);
        }
        let sq = normals(rng, b * targets * 2, spread);
        let mut sk = normals(rng, b * context * 2, spread);
        // Some keys stand where a target stands.
        for row in 0..b {
            for i in (0..context.min(targets)).step_by(4) {
                let (key, site) = ((row * context + i) * 2, (row * targets + i) * 2);
                sk[key..key + 2].copy_from_slice(&sq[site..site + 2]);
            }
        }
        let tensor = |v: Vec<f64>, shape: &[usize]| Tensor::from_vec(v, shape, &CPU).unwrap();
        Case {
            q: tensor(q, &[b, targets, h, d]),
            k: tensor(k, &[b, context, h, d]),
            v: normal(rng, &[b, context, h, w], 1.0),
            sq: tensor(sq, &[b, targets, 2]),
            sk: tensor(sk, &[b, context, 2]),
            mask: tensor(mask, &[b, context]),
            params: tensor(params, &[h, terms.len(), 3]),
            terms: terms.to_vec(),
            metric: Metric::Euclidean,
        }
    }

    fn single(&self) -> Case {
        Case {
            q: cast(&self.q),
            k: cast(&self.k),
            v: cast(&self.v),
            sq: cast(&self.sq),
            sk: cast(&self.sk),
            mask: cast(&self.mask),
            params: cast(&self.params),
            terms: self.terms.clone(),
            metric: self.metric,
        }
    }

    fn keys(&self) -> Keys {
        Keys::pack(&self.k, &self.v, &self.sk, &self.mask).unwrap()
    }

    fn bias(&self) -> Bias {
        Bias { terms: self.terms.clone(), params: self.params.clone(), metric: self.metric }
    }

    fn full(&self) -> Tensor {
        full(&self.q, &self.sq, &self.keys(), self.some_bias().as_ref()).unwrap()
    }

    fn scan(&self, chunk: usize) -> Tensor {
        let (keys, bias) = (self.keys(), self.some_bias());
        scan(&self.q, &self.sq, &keys, bias.as_ref(), chunk, Start::Exact).unwrap()
    }

    fn some_bias(&self) -> Option<Bias> {
        (!self.terms.is_empty()).then(|| self.bias())
    }

    /// Values, then gradients by q, k, v and the bias of `Σ weigh · out`; `chunk` 0 is full.
    fn gradients(&self, weigh: &Tensor, chunk: usize) -> [Tensor; 5] {
        let vars = [&self.q, &self.k, &self.v, &self.params].map(|x| Var::from_tensor(x).unwrap());
        let [q, k, v, params] = vars.each_ref().map(|x| x.as_tensor().clone());
        let rest = self.copy();
        let case = Case { q, k, v, params, ..rest };
        let out = if chunk == 0 { case.full() } else { case.scan(chunk) };
        let weigh = weigh.to_dtype(out.dtype()).unwrap();
        let grads = (&out * weigh).unwrap().sum_all().unwrap().backward().unwrap();
        let [q, k, v, params] = vars.each_ref().map(|x| match grads.get(x.as_tensor()) {
            Some(grad) => grad.clone(),
            None => x.zeros_like().unwrap(),
        });
        [out, q, k, v, params]
    }

    fn copy(&self) -> Case {
        Case {
            q: self.q.clone(),
            k: self.k.clone(),
            v: self.v.clone(),
            sq: self.sq.clone(),
            sk: self.sk.clone(),
            mask: self.mask.clone(),
            params: self.params.clone(),
            terms: self.terms.clone(),
            metric: self.metric,
        }
    }

    /// How large the numbers are that add up to a score, and how fast it changes with distance: f32
    /// knows a score to this many roundings. Mean over a row by weight, since that is what an output
    /// feels; then the largest of all rows.
    fn size(&self) -> f64 {
        let (b, targets, h, d) = self.q.dims4().unwrap();
        let context = self.sk.dims()[1];
        let root = (d as f64).sqrt();
        let (q, k, mask) = (host(&self.q), host(&self.k), host(&self.mask));
        let (sq, sk) = (host(&self.sq), host(&self.sk));
        let radial = self.bias().host().unwrap();
        let mut size: f64 = 0.0;
        for row in 0..b * targets * h {
            let (batch, i, head) = (row / (targets * h), row / h, row % h);
            let mut scored = Vec::new();
            for j in (batch * context..(batch + 1) * context).filter(|j| mask[*j] == 1.0) {
                let distance = |a: &[f64], b: &[f64]| match self.metric {
                    Metric::Euclidean => (a[0] - b[0]).hypot(a[1] - b[1]),
                    Metric::GreatCircle => globe(a, b),
                };
                let r = distance(&sq[2 * i..2 * i + 2], &sk[2 * j..2 * j + 2]);
                let products: Vec<f64> =
                    (0..d).map(|c| q[row * d + c] * k[(j * h + head) * d + c] / root).collect();
                let score = products.iter().sum::<f64>() + radial.at(head, r);
                let mut parts = products.iter().map(|p| p.abs()).sum::<f64>();
                for (term, p) in &radial.heads[head] {
                    let (value, step) = (term.value(*p, r), r * 1e-6);
                    // Unit vectors on the globe are rounded as a whole, distances on the plane alone.
                    let unit = if self.metric == Metric::Euclidean { r } else { r.max(1.0) };
                    let slope =
                        if r > 0.0 { (value - term.value(*p, r - step)) / step } else { 0.0 };
                    parts += value.abs() + slope.abs() * unit;
                }
                if score > f64::NEG_INFINITY {
                    scored.push((score, parts));
                }
            }
            let sink = radial.sink(head).unwrap_or(f64::NEG_INFINITY);
            let top = scored.iter().fold(sink, |top, (score, _)| top.max(*score));
            let weigh = |score: f64| (score - top).exp();
            let sum = scored.iter().map(|(score, _)| weigh(*score)).sum::<f64>() + weigh(sink);
            let mean = scored.iter().map(|(score, parts)| weigh(*score) * parts).sum::<f64>() / sum;
            size = size.max(if sum > 0.0 { mean } else { 0.0 });
        }
        size
    }
}

/// Largest difference, against the largest value.
fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (host(a), host(b));
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(&b).all(|v| v.is_finite()), "not finite");
    let top = b.iter().fold(0.0f64, |m, v| m.max(v.abs())).max(0.1);
    a.iter().zip(&b).fold(0.0f64, |m, (x, y)| m.max((x - y).abs())) / top
}

/// Great-circle distance in radians by an independent formula: geo's haversine, over its radius.
fn globe(a: &[f64], b: &[f64]) -> f64 {
    kernel::Metric::GreatCircle.distance(a, b) / 6371.0088
}

/// log k(u) at u = 0.001, 0.3, 0.7, 0.999, 4, 60, from mpmath with 40 digits: exp(−u²/2); the Matérn
/// family as 2^(1−ν) / Γ(ν) s^ν K_ν(s), s = √(2ν) u; and Wendland's ∫ₜ t (1 − t)³ dt from u to 1 over
/// that from 0 to 1. None is the closed form of the code.
const LOG_KERNELS: [(Term, [f64; 6]); 4] = [
    (Term::SquaredExponential, [-5e-7, -0.045, -0.245, -0.4990005, -8.0, -1800.0]),
    (
        Term::Matern32,
        [
            -1.498270196079233e-06,
            -0.1011580695403956,
            -0.418341590851406,
            -0.7259003936620142,
            -4.8577767990814875,
            -99.26982124452239,
        ],
    ),
    (
        Term::Matern52,
        [
            -8.333326401296071e-07,
            -0.07153322820354749,
            -0.34680568864353034,
            -0.645175053347366,
            -5.343924846029133,
            -125.44228654851378,
        ],
    ),
    (
        Term::Wendland,
        [
            -9.980064796681002e-06,
            -0.6382424153906594,
            -3.480890150571404,
            -26.022383523665216,
            f64::NEG_INFINITY,
            f64::NEG_INFINITY,
        ],
    ),
];

#[test]
fn log_kernels_golden_values() {
    let (a, b) = (1.75, 0.5);
    for (term, golden) in LOG_KERNELS {
        for (u, log_k) in [0.001, 0.3, 0.7, 0.999, 4.0, 60.0].into_iter().zip(golden) {
            let (d, want) = (u / b, a * log_k);
            // `b` is one over a length scale, whatever its sign.
            for b in [b, -b] {
                let name = format!("{} at u = {u}", term.name());
                let value = term.value([a, b, 9.0], d);
                if want == f64::NEG_INFINITY {
                    assert_eq!(value, want, "{name}");
                } else {
                    // log(1 + s) − s loses the digits by which s exceeds s².
                    assert!((value - want).abs() < 1e-14 * (1.0 + want.abs()), "{name}: {value}");
                }
                let mut fast = [0.25f32];
                add_term(term, [a as f32, b as f32, 9.0], &[(d * d) as f32], &mut fast);
                let gap = f64::from(fast[0]) - 0.25 - want;
                // At the edge of a support the rounding of the distance counts 4a / (1 − u)-fold.
                let edge =
                    if term == Term::Wendland && u < 1.0 { 4.0 * a * u / (1.0 - u) } else { 0.0 };
                assert!(
                    f64::from(fast[0]) == want || gap.abs() < 4e-7 * (1.0 + u + want.abs() + edge),
                    "{name}: {fast:?} against {want}"
                );
                let params = Tensor::new(&[[[a, b, 9.0]]], &CPU).unwrap();
                let bias = Bias { terms: vec![term], params, metric: Metric::Euclidean };
                let d2 = Tensor::new(&[[[d * d]]], &CPU).unwrap();
                let composed = host(&bias.composed(&d2).unwrap())[0];
                match bias.reached(&d2).unwrap() {
                    Some(inside) => assert_eq!(host(&inside)[0], f64::from(u < 1.0), "{name}"),
                    None => assert!(term != Term::Wendland, "{name}"),
                }
                assert!(composed.is_finite());
                if want.is_finite() {
                    assert!((composed - want).abs() < 1e-13 * (1.0 + want.abs()), "{name}");
                }
            }
        }
        for d in [0.0, 1e-20] {
            assert!(term.value([a, b, 0.0], d).abs() < 1e-19, "{}: k(0) is 1", term.name());
        }
        let mut fast = [0.25f32];
        add_term(term, [a as f32, b as f32, 0.0], &[0.0], &mut fast);
        assert_eq!(fast, [0.25], "{}: k(0) is 1", term.name());
    }
}

/// The function that tables are made from is the function that the reference composes.
#[test]
fn the_bias_on_the_host_is_the_composed_one() {
    let mut rng = Stream::new(5, "attention", 0);
    for terms in families() {
        let c = Case::new(&mut rng, &terms, [3, 40], Scores::Plain(1.0), 1.0);
        let (bias, radial) = (c.bias(), c.bias().host().unwrap());
        let d: Vec<f64> = (0..60).map(|i| f64::from(i) * 0.11).collect();
        let d2 = Tensor::from_vec(d.iter().map(|d| d * d).collect(), (1, 1, 60), &CPU).unwrap();
        let composed = host(&bias.composed(&d2).unwrap());
        let reached = bias.reached(&d2).unwrap().map_or(vec![1.0; 180], |r| host(&r));
        for (i, (value, reached)) in composed.iter().zip(&reached).enumerate() {
            let (head, d) = (i / 60, d[i % 60]);
            let (want, name) = (radial.at(head, d), named(&terms));
            assert_eq!(*reached == 1.0, d < radial.support(head), "{name}: the support");
            assert_eq!(*reached == 1.0, want > f64::NEG_INFINITY, "{name}: the support");
            let allowed = 1e-13 * (1.0 + want.abs()) * 10.0;
            assert!(*reached == 0.0 || (value - want).abs() < allowed, "{name}: {value} {want}");
        }
        assert_eq!(radial.sink(0).is_some(), terms.contains(&Term::Sink));
    }
}

#[test]
fn names_of_terms_are_those_of_recipes() {
    for term in Term::ALL {
        let written = toml::Value::try_from(term).unwrap();
        assert_eq!(written.as_str(), Some(term.name()));
        assert!(!term.about().is_empty());
    }
}

#[test]
fn scan_equals_full_for_any_chunk_far_keys_and_extreme_scores() {
    let mut rng = Stream::new(1, "attention", 0);
    let far = [Term::Scalar, Term::Rbf, Term::Tisa, Term::Exponential];
    let mut cases = Vec::new();
    for terms in families() {
        for (shape, scores, spread) in [
            ([70, 37], Scores::Plain(1.0), 1.0),
            ([3, 1], Scores::Plain(1.0), 1.0),
            ([5, 0], Scores::Plain(1.0), 1.0),
            ([9, 600], Scores::Plain(6.0), 1.0),
            ([9, 40], Scores::Plain(1.0), 30.0),
            ([9, 40], Scores::Low, 1.0),
            ([9, 40], Scores::High, 1.0),
        ] {
            cases.push(Case::new(&mut rng, &terms, shape, scores, spread));
        }
        // On the globe: all round it, and within a few hundred kilometres.
        for spread in [60.0, 2.0] {
            let mut case = Case::new(&mut rng, &terms, [9, 40], Scores::Plain(1.0), spread);
            case.metric = Metric::GreatCircle;
            cases.push(case);
        }
    }
    // Sites so far that the scalar term drives every score below −1e3.
    cases.push(Case::new(&mut rng, &far, [9, 40], Scores::Plain(1.0), 2000.0));
    for c in cases {
        let (truth, single) = (c.full(), c.single());
        // f32 rounds a score of size S by S · 2⁻²⁴ at each step (products, bias, log-sum), and each
        // moves the weight by as much, whatever is done afterwards: near 10⁴ three digits are left.
        // The steps' errors differ in sign; two of them are allowed. 2e-6 is for exp and the sums.
        let allowed = 2e-6 + 2.0 * c.size() * ROUNDING;
        for chunk in [1, 7, 64, 4096] {
            let name = format!(
                "{}, {:?} × {:?}, chunk {chunk}",
                named(&c.terms),
                c.q.shape(),
                c.k.shape()
            );
            let gap = relative(&c.scan(chunk), &truth);
            assert!(gap < 1e-9, "{name}: the composed scan is off by {gap:e}");
            let gap = relative(&single.scan(chunk), &truth);
            assert!(gap < allowed, "{name}: off by {gap:e}, allowed {allowed:e}");
        }
    }
}

#[test]
fn hidden_and_absent_keys_give_zero_and_no_nan() {
    let mut rng = Stream::new(2, "attention", 0);
    for terms in families().into_iter().filter(|t| !t.contains(&Term::Sink)) {
        let mut c = Case::new(&mut rng, &terms, [6, 9], Scores::Plain(1.0), 1.0);
        c.mask = c.mask.zeros_like().unwrap();
        for (case, chunk) in [(c.single(), 4), (c.copy(), 4), (c, 0)] {
            let weigh = case.q.ones_like().unwrap().narrow(3, 0, SHAPE.3).unwrap();
            for x in case.gradients(&weigh, chunk) {
                assert!(host(&x).iter().all(|v| *v == 0.0), "{}", named(&terms));
            }
        }
    }
}

/// A site at the edge of the support, or beyond, is no site at all.
#[test]
fn outside_the_support_there_is_nothing() {
    let sites = |xy: &[[f64; 2]]| {
        let flat: Vec<f64> = xy.iter().flatten().copied().collect();
        Tensor::from_vec(flat, (1, xy.len(), 2), &CPU).unwrap()
    };
    let mut rng = Stream::new(6, "attention", 0);
    // Support 4 in both heads. From target 0, the origin: keys 0 and 1 are inside, 2 to 4 on the
    // edge, 5 outside. Target 1 coincides with key 0 and has key 4 on its edge. Target 2 is far from
    // all; target 3 has key 4 on its edge and the others outside.
    let sk = sites(&[[0.0, 0.0], [1.0, -1.0], [4.0, 0.0], [0.0, -4.0], [-4.0, 0.0], [5.0, 0.5]]);
    let sq = sites(&[[0.0, 0.0], [0.0, 0.0], [100.0, 0.0], [-8.0, 0.0]]);
    for sink in [false, true] {
        for sharpness in [0.1, 0.25, 1.0, 20.0] {
            let mut params = vec![sharpness, 0.25, 0.0, 0.3, 0.0, 0.0];
            params.extend([sharpness, -0.25, 0.0, -0.4, 0.0, 0.0]);
            let params = Tensor::from_vec(params, (2, 2, 3), &CPU).unwrap();
            let count = if sink { 2 } else { 1 };
            let c = Case {
                q: normal(&mut rng, &[1, 4, 2, 4], 1.0),
                k: normal(&mut rng, &[1, 6, 2, 4], 1.0),
                v: normal(&mut rng, &[1, 6, 2, 3], 1.0),
                sq: sq.clone(),
                sk: sk.clone(),
                mask: Tensor::ones((1, 6), DType::F64, &CPU).unwrap(),
                params: params.narrow(1, 0, count).unwrap().contiguous().unwrap(),
                terms: [Term::Wendland, Term::Sink][..count].to_vec(),
                metric: Metric::Euclidean,
            };
            // By hand: keys 0 and 1 only, with their weights, for targets 0 and 1.
            let near = Case {
                k: c.k.narrow(1, 0, 2).unwrap(),
                v: c.v.narrow(1, 0, 2).unwrap(),
                sk: sk.narrow(1, 0, 2).unwrap(),
                mask: c.mask.narrow(1, 0, 2).unwrap(),
                ..c.copy()
            };
            let want = near.full().narrow(1, 0, 2).unwrap();
            let weigh = normal(&mut rng, &[1, 4, 2, 3], 1.0);
            let truth = c.gradients(&weigh, 0);
            for (case, chunk, allowed) in
                [(c.copy(), 0, 1e-14), (c.copy(), 2, 1e-14), (c.single(), 2, 2e-6)]
            {
                let grads = case.gradients(&weigh, chunk);
                assert!(relative(&grads[0].narrow(1, 0, 2).unwrap(), &want) < allowed);
                let rest = grads[0].narrow(1, 2, 2).unwrap();
                assert!(host(&rest).iter().all(|v| *v == 0.0), "a site outside was read");
                // Nor does anything flow back to the queries that read nothing, or to keys and
                // values that nobody read.
                let idle =
                    [grads[1].narrow(1, 2, 2), grads[2].narrow(1, 2, 4), grads[3].narrow(1, 2, 4)];
                for x in idle {
                    assert!(host(&x.unwrap()).iter().all(|v| *v == 0.0));
                }
                for (ours, theirs) in grads.iter().zip(&truth) {
                    let gap = relative(ours, theirs);
                    assert!(gap < 20.0 * allowed, "a = {sharpness}, chunk {chunk}: {gap:e}");
                }
            }
        }
    }
}

#[test]
fn gradients_equal_autograd_of_the_reference() {
    let mut rng = Stream::new(3, "attention", 0);
    for terms in families() {
        for ([targets, context], scores, chunk) in [
            ([70, 33], Scores::Plain(1.0), 10),
            ([5, 130], Scores::Plain(1.0), 512),
            ([2, 1], Scores::Plain(1.0), 3),
            ([9, 40], Scores::Low, 16),
            ([9, 40], Scores::High, 16),
        ] {
            for metric in [Metric::Euclidean, Metric::GreatCircle] {
                let spread = if metric == Metric::Euclidean { 0.7 } else { 40.0 };
                let mut c = Case::new(&mut rng, &terms, [targets, context], scores, spread);
                c.metric = metric;
                let weigh = normal(&mut rng, &[2, targets, 3, 3], 1.0);
                let truth = c.gradients(&weigh, 0);
                // As for values, with the sums over targets on top.
                let allowed = 1e-5 + 4.0 * c.size() * ROUNDING;
                let composed = c.gradients(&weigh, chunk);
                let fused = c.single().gradients(&weigh, chunk);
                for (i, name) in ["value", "dq", "dk", "dv", "dbias"].iter().enumerate() {
                    let name = format!("{name} of {}, {targets} × {context}", named(&terms));
                    let gap = relative(&composed[i], &truth[i]);
                    assert!(gap < 1e-9, "{name}, {scores:?} composed: {gap:e}");
                    let gap = relative(&fused[i], &truth[i]);
                    // The slope by b or c can be four times that by the logarithm of distance; and
                    // with a single key the truth is 0, what remains is rounding.
                    let allowed = if i == 4 { 4.0 * allowed } else { allowed };
                    assert!(
                        gap < allowed,
                        "{name}, {metric:?}, {scores:?}: {gap:e}, allowed {allowed:e}"
                    );
                }
            }
        }
    }
}

/// Batches, heads, key width and value width, then targets and context: around the vectors, tiles,
/// panels, blocks and chunks of the kernel.
const SIZES: [((usize, usize, usize, usize), [usize; 2]); 8] = [
    ((1, 1, 1, 1), [1, 1]),
    ((2, 3, 5, 7), [1, 40]),
    ((1, 2, 32, 32), [33, 65]),
    ((1, 2, 17, 9), [31, 300]),
    ((3, 2, 8, 24), [70, 7]),
    ((1, 4, 16, 16), [50, 257]),
    ((1, 1, 40, 33), [5, 13]),
    ((1, 2, 3, 48), [97, 128]),
];

#[test]
fn gradients_fit_every_size() {
    let mut rng = Stream::new(9, "attention", 0);
    let rows = |n: usize| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let (one, many) = (rows(1), rows(5));
    for (shape, [targets, context]) in SIZES {
        for terms in [
            vec![],
            vec![Term::Rbf],
            vec![Term::Sink, Term::Rbf],
            vec![Term::Sink],
            vec![Term::Rbf, Term::Scalar, Term::Sink],
        ] {
            let spread = if context % 2 == 0 { 0.7 } else { 30.0 };
            let mut c = Case::sized(
                &mut rng,
                shape,
                &terms,
                [targets, context],
                Scores::Plain(1.0),
                spread,
            );
            if context % 2 == 1 {
                c.metric = Metric::GreatCircle;
            }
            let weigh = normal(&mut rng, &[shape.0, targets, shape.1, shape.3], 1.0);
            let truth = c.gradients(&weigh, 0);
            let fused = one.install(|| c.single().gradients(&weigh, 64));
            let allowed = 1e-5 + 4.0 * c.size() * ROUNDING;
            for (i, name) in ["value", "dq", "dk", "dv", "dbias"].iter().enumerate() {
                let name = format!("{name} of {}, {shape:?}, {targets} × {context}", named(&terms));
                let gap = relative(&fused[i], &truth[i]);
                let allowed = if i == 4 { 4.0 * allowed } else { allowed };
                assert!(gap < allowed, "{name}: {gap:e}, allowed {allowed:e}");
            }
            // With more threads than rows, each head is a job of its own: to the last bit the same.
            let spread = many.install(|| c.single().gradients(&weigh, 64));
            for (a, b) in fused.iter().zip(&spread) {
                assert_eq!(host(a), host(b), "{shape:?}: threads change the gradient");
            }
        }
    }
}

#[test]
fn reference_gradient_agrees_with_finite_differences() {
    let mut rng = Stream::new(4, "attention", 0);
    for terms in families() {
        for metric in [Metric::Euclidean, Metric::GreatCircle] {
            let spread = if metric == Metric::Euclidean { 0.7 } else { 40.0 };
            let mut c = Case::new(&mut rng, &terms, [4, 6], Scores::Plain(1.0), spread);
            c.metric = metric;
            let weigh = normal(&mut rng, &[2, 4, 3, 3], 1.0);
            let grads = c.gradients(&weigh, 0);
            let loss = |case: &Case| host(&(case.full() * &weigh).unwrap().sum_all().unwrap())[0];
            for (which, grad) in ["q", "k", "v", "bias"].iter().zip(&grads[1..]) {
                let mut moved = c.copy();
                let x = match *which {
                    "q" => &mut moved.q,
                    "k" => &mut moved.k,
                    "v" => &mut moved.v,
                    _ => &mut moved.params,
                };
                let (base, shape) = (host(x), x.shape().clone());
                let mut at = |i: usize, h: f64| {
                    let mut values = base.clone();
                    values[i] += h;
                    let values = Tensor::from_vec(values, &shape, &CPU).unwrap();
                    match *which {
                        "q" => moved.q = values,
                        "k" => moved.k = values,
                        "v" => moved.v = values,
                        _ => moved.params = values,
                    }
                    loss(&moved)
                };
                for (i, g) in host(grad).iter().enumerate() {
                    // h² and the rounding of the loss over h: both below 1e-9 of the values here.
                    let numeric = (at(i, 1e-5) - at(i, -1e-5)) / 2e-5;
                    assert!(
                        (numeric - g).abs() < 1e-6 * (1.0 + numeric.abs()),
                        "d{which}[{i}] of {}: {numeric} against {g}",
                        named(&terms)
                    );
                }
            }
        }
    }
}

/// Terms that training never told apart are one term: the same attention, for less.
#[test]
fn equal_terms_collapse_to_one() {
    let mut rng = Stream::new(7, "attention", 0);
    for term in Term::ALL {
        let terms = [term, Term::Rbf, term, term, Term::Sink];
        let mut c = Case::new(&mut rng, &terms, [7, 30], Scores::Plain(1.0), 0.5);
        let mut params = c.params.to_vec3::<f64>().unwrap();
        for head in &mut params {
            (head[2], head[3]) = (head[0].clone(), head[0].clone());
            head[2][0] *= 1.5;
            head[4] = head[if term == Term::Sink { 0 } else { 4 }].clone();
        }
        c.params = Tensor::new(params.clone(), &CPU).unwrap();
        let one = c.bias().collapse().unwrap();
        let kept: &[Term] = match term {
            Term::Rbf => &[Term::Rbf, Term::Rbf, Term::Sink],
            Term::Sink => &[Term::Sink, Term::Rbf],
            _ => &[term, Term::Rbf, Term::Sink],
        };
        assert_eq!(one.terms, kept);
        let out = full(&c.q, &c.sq, &c.keys(), Some(&one)).unwrap();
        assert!(relative(&out, &c.full()) < 1e-13, "{}", term.name());
        // A difference in one head keeps two terms apart, where the family has a width.
        params[2][2][1] *= 1.25;
        c.params = Tensor::new(params, &CPU).unwrap();
        let two = c.bias().collapse().unwrap();
        let more = usize::from(!matches!(term, Term::Scalar | Term::Sink));
        assert_eq!(two.terms.len(), kept.len() + more, "{}", term.name());
        let out = full(&c.q, &c.sq, &c.keys(), Some(&two)).unwrap();
        assert!(relative(&out, &c.full()) < 1e-13, "{}", term.name());
    }
}

/// (longitude, latitude): near, far, over the antimeridian and the poles, to the antipode.
const PLACES: [[f64; 2]; 10] = [
    [0.0, 0.0],
    [0.001, 0.0005],
    [36.8, -1.3],
    [179.9, 10.0],
    [-179.9, 10.0],
    [0.0, 89.9],
    [180.0, 89.9],
    [75.0, -90.0],
    [-143.0, -90.0],
    [-143.2, 1.3],
];

#[test]
fn great_circles_are_those_of_the_haversine() {
    let flat: Vec<f64> = PLACES.iter().flatten().copied().collect();
    let sites = Tensor::from_vec(flat, (1, PLACES.len(), 2), &CPU).unwrap();
    let points = geometry(&sites, Metric::GreatCircle).unwrap();
    let straight2 = squared_distances(&points, &points).unwrap();
    let composed = host(&Metric::GreatCircle.squared(&straight2).unwrap().sqrt().unwrap());
    let single = host(&Metric::GreatCircle.squared(&cast(&straight2)).unwrap().sqrt().unwrap());
    let straight2 = host(&straight2);
    let mut fast: Vec<f32> = straight2.iter().map(|s| *s as f32).collect();
    arcs(&mut fast);
    for (i, a) in PLACES.iter().enumerate() {
        for (j, b) in PLACES.iter().enumerate() {
            let at = i * PLACES.len() + j;
            let want = globe(a, b);
            let name = format!("{a:?} to {b:?}");
            // A chord knows the angle to 1e-16 / cos(angle / 2), the haversine likewise; √ of the
            // squared chord's own rounding is what two equal sites leave.
            let slack = 1e-15 + 2e-15 / (0.5 * want).cos().max(1e-8);
            let value = Metric::GreatCircle.distance(straight2[at].sqrt());
            assert!((value - want).abs() < slack, "{name}: {value} against {want}");
            assert!((composed[at] - value).abs() < slack, "{name}: composed {}", composed[at]);
            // In f32: 5e-7 of the angle, and near the antipode √(2⁻²⁴) of it.
            let slack = 5e-7 * want + 1e-15 + 3e-7 / (0.5 * want).cos().max(3e-4);
            let slack = if want < 3.0 { 5e-7 * want + 2e-15 } else { slack };
            let arc = f64::from(fast[at]).sqrt();
            assert!((arc - want).abs() < slack, "{name}: {arc} against {want}");
            assert!((single[at] - want).abs() < slack, "{name}: f32 {}", single[at]);
            let back = Metric::GreatCircle.straight(value);
            assert!((back * back - straight2[at]).abs() < 1e-14, "{name}: back {back}");
        }
    }
    // 0.2° over the antimeridian at 10° north, 0.2° over the pole, and one pole for all longitudes.
    let degrees = |i: usize, j: usize| composed[i * PLACES.len() + j].to_degrees();
    assert!((degrees(3, 4) - 0.2 * 10f64.to_radians().cos()).abs() < 1e-6);
    assert!((degrees(5, 6) - 0.2).abs() < 1e-9);
    assert!(degrees(7, 8) < 1e-9);
    assert!((degrees(2, 9) - 180.0).abs() < 1e-3);
    assert_eq!(Metric::GreatCircle.straight(3.2), f64::INFINITY);
    let wrong = Tensor::zeros((1, 4, 3), DType::F32, &CPU).unwrap();
    assert!(geometry(&wrong, Metric::GreatCircle).is_err());
}

/// Turns the globe: by 50° about the axis through the poles, 70° about another, and 20° again.
fn turned(sites: &Tensor) -> Tensor {
    let points = geometry(sites, Metric::GreatCircle).unwrap().to_vec3::<f64>().unwrap();
    let about_pole = |[x, y, z]: [f64; 3], angle: f64| {
        let (sin, cos) = angle.to_radians().sin_cos();
        [cos * x - sin * y, sin * x + cos * y, z]
    };
    let places: Vec<f64> = points
        .iter()
        .flatten()
        .flat_map(|p| {
            let [x, y, z] = about_pole([p[0], p[1], p[2]], 50.0);
            let [y, z, x] = about_pole([y, z, x], 70.0);
            let [x, y, z] = about_pole([x, y, z], 20.0);
            [y.atan2(x).to_degrees(), z.atan2(x.hypot(y)).to_degrees()]
        })
        .collect();
    Tensor::from_vec(places, sites.shape(), &CPU).unwrap()
}

/// Where the poles and the antimeridian lie is a convention: attention on the globe cannot tell.
#[test]
fn turning_the_globe_changes_nothing() {
    let mut rng = Stream::new(8, "attention", 0);
    for terms in families() {
        let mut c = Case::new(&mut rng, &terms, [12, 50], Scores::Plain(1.0), 50.0);
        c.metric = Metric::GreatCircle;
        let there = Case { sq: turned(&c.sq), sk: turned(&c.sk), ..c.copy() };
        let gap = relative(&there.full(), &c.full());
        assert!(gap < 1e-9, "{}: moved by {gap:e}", named(&terms));
        // The plane is another matter: the law is not empty.
        if terms == [Term::Scalar] {
            let flat = |c: &Case| Case { metric: Metric::Euclidean, ..c.copy() }.full();
            assert!(relative(&flat(&there), &flat(&c)) > 0.1);
        }
        // f32 holds a longitude to 2⁻¹⁷ of a degree, 1.3e-7 of a radian.
        let gap = relative(&there.single().scan(16), &c.full());
        let allowed = 2e-6 + 8.0 * c.size() * ROUNDING;
        assert!(gap < allowed, "{}: moved by {gap:e}, allowed {allowed:e}", named(&terms));
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
