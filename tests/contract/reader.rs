//! Laws of reading a packed context: it equals the reference, through the table and term by term,
//! and what it leaves out is no more than it promises.

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Stream,
    attention::{Bias, Keys, Metric, Reader, Reading, Term, full},
};

const CPU: Device = Device::Cpu;

/// Sizes and kinds of a case.
#[derive(Debug, Clone)]
pub struct Shape {
    pub batch: usize,
    pub targets: usize,
    pub context: usize,
    pub heads: usize,
    pub d: usize,
    pub w: usize,
    /// Size of queries and keys: scores are about its square.
    pub size: f64,
    /// Sites are normal with this sd, around a few centres if `clumps`.
    pub spread: f64,
    pub clumps: bool,
}

pub const USUAL: Shape = Shape {
    batch: 2,
    targets: 70,
    context: 150,
    heads: 3,
    d: 5,
    w: 4,
    size: 1.0,
    spread: 0.5,
    clumps: false,
};

pub struct Case {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub asked: Tensor,
    pub sites: Tensor,
    pub mask: Tensor,
    pub bias: Option<Bias>,
}

pub fn case(rng: &mut Stream, shape: &Shape, terms: &[(Term, [f64; 3])], metric: Metric) -> Case {
    let s = shape.clone();
    let normal = |rng: &mut Stream, shape: &[usize], scale: f64| {
        let values: Vec<f64> =
            rng.normals(shape.iter().product()).iter().map(|v| v * scale).collect();
        // Through f32 first: reference and reader are then given the same numbers.
        let exact = Tensor::from_vec(values, shape, &CPU).unwrap().to_dtype(DType::F32).unwrap();
        exact.to_dtype(DType::F64).unwrap()
    };
    let places = |rng: &mut Stream, n: usize| {
        let mut at = rng.normals(s.batch * n * 2);
        for (i, pair) in at.chunks_mut(2).enumerate() {
            let centre =
                if s.clumps { [(i % 5) as f64 - 2.0, (i % 3) as f64 - 1.0] } else { [0.0; 2] };
            pair[0] = f64::from((pair[0] * s.spread + centre[0]) as f32);
            pair[1] = f64::from((pair[1] * s.spread + centre[1]) as f32);
            if metric == Metric::GreatCircle {
                pair[0] = f64::from((pair[0] * 60.0) as f32);
                pair[1] = f64::from((pair[1] * 30.0).clamp(-89.0, 89.0) as f32);
            }
        }
        Tensor::from_vec(at, (s.batch, n, 2), &CPU).unwrap()
    };
    let mask: Vec<f64> =
        (0..s.batch * s.context).map(|i| f64::from(s.context == 1 || i % 5 != 1)).collect();
    let params: Vec<f64> = (0..s.heads)
        .flat_map(|h| {
            terms.iter().flat_map(move |(_, [a, b, c])| {
                let factor = 1.0 + 0.4 * h as f64;
                [*a, f64::from((b * factor) as f32), *c]
            })
        })
        .collect();
    let bias = (!terms.is_empty()).then(|| Bias {
        terms: terms.iter().map(|t| t.0).collect(),
        params: Tensor::from_vec(params, (s.heads, terms.len(), 3), &CPU).unwrap(),
        metric,
    });
    Case {
        q: normal(rng, &[s.batch, s.targets, s.heads, s.d], s.size),
        k: normal(rng, &[s.batch, s.context, s.heads, s.d], s.size),
        v: normal(rng, &[s.batch, s.context, s.heads, s.w], 1.0),
        asked: places(rng, s.targets),
        sites: places(rng, s.context),
        mask: Tensor::from_vec(mask, (s.batch, s.context), &CPU).unwrap(),
        bias,
    }
}

pub fn single(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap()
}

impl Case {
    pub fn reference(&self) -> Tensor {
        let keys = Keys::pack(&self.k, &self.v, &self.sites, &self.mask).unwrap();
        full(&self.q, &self.asked, &keys, self.bias.as_ref()).unwrap()
    }

    fn reader(&self, reading: Reading) -> Reader {
        let bias = self.bias.as_ref().map(|b| Bias { params: single(&b.params), ..b.clone() });
        let (k, v) = (single(&self.k), single(&self.v));
        Reader::new(&k, &v, &single(&self.sites), &single(&self.mask), bias.as_ref(), reading)
            .unwrap()
    }

    fn read(&self, reader: &Reader) -> Tensor {
        reader.read(&single(&self.q), &single(&self.asked)).unwrap()
    }
}

/// Largest difference, as a share of the largest value.
pub fn gap(a: &Tensor, b: &Tensor) -> f64 {
    let host = |x: &Tensor| {
        x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    let (a, b) = (host(a), host(b));
    assert_eq!(a.len(), b.len());
    let top = b.iter().fold(0.1f64, |m, v| m.max(v.abs()));
    a.iter().zip(&b).fold(0.0f64, |m, (x, y)| {
        assert!(x.is_finite(), "not finite");
        m.max((x - y).abs())
    }) / top
}

pub const BIASES: &[&[(Term, [f64; 3])]] = &[
    &[],
    &[(Term::Rbf, [1.0, 2.0, 0.0])],
    &[(Term::Rbf, [3.0, 30.0, 0.0]), (Term::Sink, [0.5, 0.0, 0.0])],
    &[(Term::Tisa, [1.0, 4.0, 0.7]), (Term::Exponential, [2.0, 3.0, 0.0])],
    &[(Term::Scalar, [-3.0, 0.0, 0.0]), (Term::Rbf, [1.0, 9.0, 0.0])],
    &[(Term::SquaredExponential, [1.0, 2.0, 0.0])],
    &[(Term::Matern32, [1.0, 3.0, 0.0])],
    &[(Term::Matern52, [1.5, 3.0, 0.0]), (Term::Sink, [-2.0, 0.0, 0.0])],
    &[(Term::Periodic, [1.5, 0.8, 0.0])],
    &[(Term::Periodic, [-0.8, -1.1, 0.0]), (Term::Rbf, [1.0, 2.0, 0.0])],
    &[(Term::Wendland, [1.0, 0.8, 0.0])],
    &[(Term::Wendland, [1.0, 3.0, 0.0]), (Term::Sink, [0.0, 0.0, 0.0])],
];

/// What f32 can do: 2e-6, and where weights hang on the last digits of a distance, less. So they do near
/// the edge of a compact support; and a wave's phase 2πbd moves by the 2e-7 of d that an arc loses.
pub fn of_f32(terms: &[(Term, [f64; 3])]) -> f64 {
    let least = |(term, _): &(Term, [f64; 3])| match term {
        Term::Wendland => 2e-5,
        Term::Periodic => 6e-6,
        _ => 2e-6,
    };
    terms.iter().map(least).fold(2e-6, f64::max)
}

/// Sizes that leave tails in every loop, one key, no key.
fn shapes() -> [Shape; 6] {
    [
        USUAL,
        Shape { targets: 1, context: 1, ..USUAL },
        Shape { targets: 3, context: 0, ..USUAL },
        Shape { batch: 1, targets: 33, context: 97, heads: 1, d: 1, w: 1, ..USUAL },
        Shape { batch: 1, targets: 250, context: 300, heads: 4, d: 32, w: 32, size: 0.5, ..USUAL },
        Shape { batch: 1, targets: 40, context: 200, d: 16, w: 17, clumps: true, ..USUAL },
    ]
}

/// Against f64 full attention: every bias, every size.
#[test]
fn reading_equals_full_attention() {
    let mut rng = Stream::new(11, "reader", 0);
    for shape in &shapes() {
        for terms in BIASES {
            for metric in [Metric::Euclidean, Metric::GreatCircle] {
                let case = case(&mut rng, shape, terms, metric);
                let found = gap(&case.read(&case.reader(Reading::default())), &case.reference());
                assert!(found < of_f32(terms), "{shape:?}, {terms:?}, {metric:?}: {found:e}");
            }
        }
    }
}

/// Places of the globe in three dimensions are read like any others: straight lines are chords. With them
/// antipodes, places met twice, and those either side of the date line.
#[test]
fn places_in_space_are_read_as_full_attention_reads_them() {
    let mut rng = Stream::new(12, "space", 0);
    for terms in BIASES {
        let mut case = case(&mut rng, &USUAL, terms, Metric::Euclidean);
        let mut places = |n: usize| {
            let mut all: Vec<f64> = Vec::new();
            for i in 0..USUAL.batch * n {
                let place = match i % 7 {
                    5 if i > 5 => [0, 1, 2].map(|d| -all[3 * (i - 5) + d]),
                    6 => [-1.0, if i % 2 == 0 { 1e-3 } else { -1e-3 }, 0.0],
                    _ => {
                        let p = rng.normals(3);
                        let length = p.iter().map(|c| c * c).sum::<f64>().sqrt();
                        [0, 1, 2].map(|d| p[d] / length)
                    }
                };
                all.extend(place.map(|c| f64::from(c as f32)));
            }
            Tensor::from_vec(all, (USUAL.batch, n, 3), &CPU).unwrap()
        };
        (case.asked, case.sites) = (places(USUAL.targets), places(USUAL.context));
        for lose in [0.0, 1e-3] {
            let reading = Reading { lose, ..Default::default() };
            let found = gap(&case.read(&case.reader(reading)), &case.reference());
            // 2 ε of the largest value may be lost.
            let most = of_f32(terms) + 2.0 * lose;
            assert!(found < most, "{terms:?}, lose {lose}: {found:e}");
        }
    }
}

/// The score of a key, by its number.
type Scores = fn(usize) -> f64;

/// Scores from −10,000 to 80.
const EXTREMES: [(&str, Scores); 8] = [
    ("rising", |j| -10_000.0 + 25.2 * j as f64),
    ("falling", |j| 80.0 - 25.2 * j as f64),
    ("one high", |j| if j == 377 { 80.0 } else { -10_000.0 }),
    ("one low", |j| if j == 5 { -10_000.0 } else { 80.0 }),
    ("all high", |_| 80.0),
    ("all low", |_| -10_000.0),
    ("in turns", |j| if j % 2 == 0 { 80.0 } else { -80.0 }),
    ("a bit higher block by block", |j| (j / 32) as f64 * 30.0),
];

/// Scores as high as 80 and as low as −10,000, side by side and one after the other: the running
/// maximum must be raised late, by much, and often.
pub fn extreme() -> Vec<(&'static str, Case)> {
    let mut rng = Stream::new(12, "reader", 0);
    let shape = Shape { batch: 1, heads: 1, d: 1, w: 3, targets: 40, context: 400, ..USUAL };
    let of = |(name, score): (&'static str, Scores)| {
        let mut case = case(&mut rng, &shape, &[], Metric::Euclidean);
        // d = 1 and queries of 1: the score of key j is the key itself.
        let k: Vec<f64> = (0..400).map(|j| f64::from(score(j) as f32)).collect();
        case.k = Tensor::from_vec(k, (1, 400, 1, 1), &CPU).unwrap();
        case.q = case.q.ones_like().unwrap();
        (name, case)
    };
    EXTREMES.map(of).into()
}

#[test]
fn extreme_scores_are_read_like_any_other() {
    for (name, case) in extreme() {
        let found = gap(&case.read(&case.reader(Reading::default())), &case.reference());
        assert!(found < 2e-6, "{name}: {found:e}");
    }
}

/// A compact support leaves out what has no weight, and nothing else.
#[test]
fn a_compact_support_skips_and_stays_exact() {
    let mut rng = Stream::new(13, "reader", 0);
    let shape = Shape {
        batch: 1,
        targets: 300,
        context: 3000,
        spread: 0.3,
        clumps: true,
        heads: 2,
        ..USUAL
    };
    for metric in [Metric::Euclidean, Metric::GreatCircle] {
        let case = case(&mut rng, &shape, &[(Term::Wendland, [1.0, 5.0, 0.0])], metric);
        let reader = case.reader(Reading::default());
        let found = gap(&case.read(&reader), &case.reference());
        assert!(found < 5e-5, "{metric:?}: {found:e}");
        let skipped = reader.tally().skipped();
        assert!(skipped > 0.6, "{metric:?}: only {skipped} of the pairs were left out");
    }
}

/// A bias that fades is left out only where it is 0 to every digit.
#[test]
fn a_faded_bias_is_not_missed() {
    let mut rng = Stream::new(17, "reader", 0);
    let shape = Shape {
        batch: 1,
        targets: 600,
        context: 1500,
        spread: 0.1,
        clumps: true,
        heads: 2,
        ..USUAL
    };
    for terms in [
        &[(Term::Rbf, [3.0, 10.0, 0.0])][..],
        &[(Term::Tisa, [2.0, 20.0, 0.7]), (Term::Rbf, [-2.0, 30.0, 0.0])],
        &[(Term::Exponential, [4.0, 15.0, 0.0]), (Term::Sink, [1.0, 0.0, 0.0])],
    ] {
        for metric in [Metric::Euclidean, Metric::GreatCircle] {
            let case = case(&mut rng, &shape, terms, metric);
            let found = gap(&case.read(&case.reader(Reading::default())), &case.reference());
            assert!(found < 2e-6, "{terms:?}, {metric:?}: {found:e}");
        }
    }
}

/// |sparse − full| ≤ 2 ε max|v|, for decaying and fading biases, ordinary and adversarial keys.
#[test]
fn faint_keys_cost_no_more_than_was_allowed() {
    let mut rng = Stream::new(14, "reader", 0);
    let shape = Shape {
        batch: 1,
        targets: 600,
        context: 2500,
        spread: 0.3,
        clumps: true,
        heads: 2,
        ..USUAL
    };
    let mut most = 0.0f64;
    for terms in [
        &[(Term::Scalar, [-25.0, 0.0, 0.0])][..],
        &[(Term::SquaredExponential, [1.0, 8.0, 0.0])],
        &[(Term::Matern32, [1.0, 6.0, 0.0]), (Term::Sink, [-3.0, 0.0, 0.0])],
        &[(Term::Rbf, [12.0, 4.0, 0.0])],
        &[(Term::Tisa, [6.0, 4.0, 2.0])],
    ] {
        for size in [0.3, 2.0] {
            for trap in [false, true] {
                let mut case =
                    case(&mut rng, &Shape { size, ..shape.clone() }, terms, Metric::Euclidean);
                if trap {
                    // One far key outshines all others.
                    let mut k = case.k.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                    k[2 * 5 * 1234..2 * 5 * 1235].iter_mut().for_each(|x| *x *= 12.0);
                    case.k = Tensor::from_vec(k, case.k.shape(), &CPU).unwrap();
                }
                let truth = case.reference();
                let top = case.v.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
                for lose in [1e-2, 1e-4, 1e-6] {
                    let reader = case.reader(Reading { lose, ..Reading::default() });
                    let out = single(&case.read(&reader)).to_dtype(DType::F64).unwrap();
                    let off = (out - &truth).unwrap().abs().unwrap().max_all().unwrap();
                    let off = off.to_scalar::<f64>().unwrap();
                    assert!(
                        off <= 2.0 * lose * top + 4e-6 * top,
                        "{terms:?}, size {size}, trap {trap}, ε {lose}: off by {off:e}"
                    );
                    most = most.max(reader.tally().skipped());
                }
            }
        }
    }
    assert!(most > 0.5, "nothing is ever left out: {most}");
}

/// Tiles, threads and the order of queries are not to be seen in the answer.
#[test]
fn queries_do_not_notice_each_other() {
    let mut rng = Stream::new(15, "reader", 0);
    let shape = Shape { targets: 90, context: 260, ..USUAL };
    for terms in [&[(Term::Rbf, [1.0, 2.0, 0.0])][..], &[(Term::Wendland, [1.0, 2.0, 0.0])]] {
        let case = case(&mut rng, &shape, terms, Metric::Euclidean);
        let reader = case.reader(Reading::default());
        let whole = case.read(&reader);
        for tile in [1, 7, 64] {
            for start in (0..90).step_by(tile) {
                let len = tile.min(90 - start);
                let part = |x: &Tensor| single(&x.narrow(1, start, len).unwrap());
                let alone = reader.read(&part(&case.q), &part(&case.asked)).unwrap();
                let moved = gap(&alone, &whole.narrow(1, start, len).unwrap());
                assert!(moved < 1e-6, "{terms:?}, tile {tile} at {start} moved by {moved:e}");
            }
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(gap(&pool.install(|| case.read(&reader)), &whole), 0.0);
    }
}

/// Coordinates that are not numbers are refused, not mapped.
#[test]
fn sites_that_are_not_numbers_are_refused() {
    let mut rng = Stream::new(16, "reader", 0);
    let case = case(&mut rng, &USUAL, BIASES[1], Metric::Euclidean);
    let reader = case.reader(Reading::default());
    let nowhere = single(&(&case.asked * f64::NAN).unwrap());
    assert!(reader.read(&single(&case.q), &nowhere).is_err());
}

/// Both ways of reading numbers of 16 bits obey the laws below, where the machine has both.
#[test]
fn both_ways_of_half_precision_obey_the_same_laws() {
    if std::env::var_os("ISOPLETH_SIMD").is_some() {
        return; // the laws themselves are asked at every instruction set
    }
    let ways = ["storage", "dot"];
    for way in &ways[..if half::bf16::has_dot() { 2 } else { 1 }] {
        let this = std::env::current_exe().unwrap();
        let child = std::process::Command::new(this)
            .args(["reader::half::", "--nocapture"])
            .env("ISOPLETH_BF16", way)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success(), "{way}: {said}");
        assert!(!said.contains(" 0 passed"), "no law was asked\n{said}");
        print!("{way}: {said}");
    }
}

/// Laws of bf16, whichever way it is read.
mod half {
    pub use isopleth::fused::bf16;
    use isopleth::{attention::Precision, fused::bf16::Way};

    use super::*;

    const HALF: Reading = Reading { lose: 0.0, precision: Precision::Bf16 };

    fn host(x: &Tensor) -> Vec<f64> {
        x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        host(x).iter().fold(0.0, |m, x| x.abs().max(m))
    }

    /// Each number as bf16, after a factor that is taken away again.
    fn rounded(x: &Tensor, factor: f32) -> Tensor {
        let round = |x: &f64| f64::from(bf16::widen(bf16::round(*x as f32 * factor)));
        let values: Vec<f64> = host(x).iter().map(|x| round(x) / f64::from(factor)).collect();
        Tensor::from_vec(values, x.shape(), &CPU).unwrap()
    }

    /// f64 full attention of the rounded numbers: what is left is arithmetic, and rounded weights.
    fn reference(case: &Case) -> Tensor {
        let (k, v) = (rounded(&case.k, 1.0), rounded(&case.v, 1.0));
        let d = case.q.dims()[3];
        // Queries are scaled first, so that weights are powers of two.
        let scale = std::f32::consts::LOG2_E / (d as f32).sqrt();
        let q = if bf16::way() == Way::Dot { rounded(&case.q, scale) } else { case.q.clone() };
        let keys = Keys::pack(&k, &v, &case.sites, &case.mask).unwrap();
        full(&q, &case.asked, &keys, case.bias.as_ref()).unwrap()
    }

    /// The largest Σ |q k| / √d.
    fn heaviest(case: &Case) -> f64 {
        if case.k.dims()[1] == 0 {
            return 0.0;
        }
        let by_head = |x: &Tensor| x.abs().unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
        let (q, k) = (by_head(&case.q), by_head(&case.k));
        let sums = q.matmul(&k.transpose(2, 3).unwrap().contiguous().unwrap()).unwrap();
        largest(&sums) / (case.q.dims()[3] as f64).sqrt()
    }

    fn off(a: &Tensor, b: &Tensor) -> f64 {
        host(a).iter().zip(host(b)).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
    }

    /// What rounded weights cost: the rest is arithmetic of f32.
    fn of_weights() -> f64 {
        if bf16::way() == Way::Dot { bf16::ROUNDING } else { 0.0 }
    }

    /// A weight that lies halfway between two of bf16 may be rounded either way, as the last digit of
    /// its score falls, which hangs on the order of the keys. Seen: 2e-5.
    fn of_order() -> f64 {
        if bf16::way() == Way::Dot { 5e-5 } else { 0.0 }
    }

    /// Against f64: closely on the same rounded numbers, within the bound that
    /// [`Precision::Bf16`] states on any, and within 0.5 % of the largest value as a rule.
    #[test]
    fn reading_equals_full_attention() {
        let mut rng = Stream::new(21, "reader", 0);
        let (mut worst, mut of_answer, mut squares, mut count) = (0.0f64, 0.0f64, 0.0, 0.0);
        for shape in &shapes() {
            for terms in BIASES {
                for metric in [Metric::Euclidean, Metric::GreatCircle] {
                    let case = case(&mut rng, shape, terms, metric);
                    let found = case.read(&case.reader(HALF));
                    let top = largest(&case.v).max(0.1);
                    let arithmetic = of_f32(terms);
                    let apart = off(&found, &reference(&case)) / top;
                    let what = format!("{shape:?}, {terms:?}, {metric:?}");
                    assert!(apart < arithmetic + of_weights(), "{what}: {apart:e} from rounded");
                    let apart = off(&found, &case.reference()) / top;
                    let bound = 2.0 * bf16::ROUNDING * (1.0 + heaviest(&case)) + arithmetic;
                    assert!(apart < bound, "{what}: {apart:e} of {bound:e}");
                    assert!(apart < 5e-3, "{what}: {apart:e}");
                    worst = worst.max(apart);
                    of_answer = of_answer.max(gap(&found, &case.reference()));
                    // Beside f32, number by number.
                    let single = case.read(&case.reader(Reading::default()));
                    for (a, b) in host(&found).iter().zip(host(&single)) {
                        squares += ((a - b) / top).powi(2);
                        count += 1.0;
                    }
                }
            }
        }
        let rms = (squares / count).sqrt();
        println!(
            "{:?}: at most {worst:e} of the largest value, {of_answer:e} of the largest answer; \
             rms from f32 {rms:e} of the largest value",
            bf16::way()
        );
    }

    /// Scores of ±80 and −10,000 are rounded like any number, and that is all that happens to them.
    #[test]
    fn extreme_scores_are_read_like_any_other() {
        let mut rng = Stream::new(22, "reader", 0);
        let shape = Shape { batch: 1, heads: 1, d: 1, w: 3, targets: 40, context: 400, ..USUAL };
        for (name, score) in EXTREMES {
            let mut case = case(&mut rng, &shape, &[], Metric::Euclidean);
            let k: Vec<f64> = (0..400).map(|j| f64::from(score(j) as f32)).collect();
            case.k = Tensor::from_vec(k, (1, 400, 1, 1), &CPU).unwrap();
            case.q = case.q.ones_like().unwrap();
            let found = off(&case.read(&case.reader(HALF)), &reference(&case));
            let top = largest(&case.v);
            assert!(found < (2e-6 + of_weights()) * top, "{name}: {found:e} of {top}");
        }
    }

    /// Weights sum to 1: rounded or not, an average of equal numbers is that number.
    #[test]
    fn what_is_the_same_everywhere_stays_so() {
        let mut rng = Stream::new(23, "reader", 0);
        for terms in BIASES.iter().filter(|b| b.iter().all(|t| t.0 != Term::Sink)) {
            // 121 keys that are seen: the last one has no neighbour to be paired with.
            let shape = Shape { context: 151, ..USUAL };
            let mut case = case(&mut rng, &shape, terms, Metric::Euclidean);
            case.v = (case.v.ones_like().unwrap() * 0.75).unwrap();
            let (found, truth) = (case.read(&case.reader(HALF)), case.reference());
            let apart = off(&found, &truth);
            assert!(apart < 1e-6, "{terms:?}: off by {apart:e}");
        }
    }

    /// Beyond a compact support there is nothing at all.
    #[test]
    fn beyond_a_support_all_is_zero() {
        let mut rng = Stream::new(24, "reader", 0);
        let mut case =
            case(&mut rng, &USUAL, &[(Term::Wendland, [1.0, 2.0, 0.0])], Metric::Euclidean);
        case.asked = (case.asked + 100.0).unwrap();
        let reader = case.reader(HALF);
        assert_eq!(largest(&case.read(&reader)), 0.0);
        assert_eq!(reader.tally().skipped(), 1.0);
    }

    /// Leaving out faint keys costs no more than was allowed, beside the same keys read in full.
    #[test]
    fn faint_keys_cost_no_more_than_was_allowed() {
        let mut rng = Stream::new(25, "reader", 0);
        let shape = Shape {
            batch: 1,
            targets: 300,
            context: 2500,
            spread: 0.3,
            clumps: true,
            heads: 2,
            ..USUAL
        };
        let mut skipped = 0.0f64;
        for terms in [
            &[(Term::SquaredExponential, [1.0, 8.0, 0.0])][..],
            &[(Term::Matern32, [1.0, 6.0, 0.0]), (Term::Sink, [-3.0, 0.0, 0.0])],
            &[(Term::Rbf, [12.0, 4.0, 0.0])],
        ] {
            let case = case(&mut rng, &shape, terms, Metric::Euclidean);
            let (truth, top) = (case.read(&case.reader(HALF)), largest(&case.v));
            for lose in [1e-2, 1e-4] {
                let reader = case.reader(Reading { lose, ..HALF });
                let apart = off(&case.read(&reader), &truth);
                let allowed = 2.0 * lose + 4e-6 + of_order();
                assert!(apart <= allowed * top, "{terms:?}, ε {lose}: {apart:e}");
                skipped = skipped.max(reader.tally().skipped());
            }
        }
        assert!(skipped > 0.5, "nothing is ever left out: {skipped}");
    }

    /// Tiles, threads and the order of queries are not to be seen; the memory is halved.
    #[test]
    fn queries_do_not_notice_each_other() {
        let mut rng = Stream::new(26, "reader", 0);
        let shape = Shape { targets: 230, context: 260, d: 32, w: 32, ..USUAL };
        for terms in [&[(Term::Rbf, [1.0, 2.0, 0.0])][..], &[(Term::Wendland, [1.0, 2.0, 0.0])]] {
            let case = case(&mut rng, &shape, terms, Metric::Euclidean);
            let reader = case.reader(HALF);
            let whole = case.read(&reader);
            for tile in [7, 64] {
                for start in (0..230).step_by(tile) {
                    let len = tile.min(230 - start);
                    let part = |x: &Tensor| single(&x.narrow(1, start, len).unwrap());
                    let alone = reader.read(&part(&case.q), &part(&case.asked)).unwrap();
                    let moved = gap(&alone, &whole.narrow(1, start, len).unwrap());
                    let allowed = 1e-6 + of_order();
                    assert!(
                        moved < allowed,
                        "{terms:?}, tile {tile} at {start} moved by {moved:e}"
                    );
                }
            }
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            assert_eq!(gap(&pool.install(|| case.read(&reader)), &whole), 0.0);
            let share = reader.bytes() as f64 / case.reader(Reading::default()).bytes() as f64;
            assert!(share < 0.52, "{share} of the memory of f32");
        }
    }
}
