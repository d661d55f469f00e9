//! How far attention on a device is from full attention in f64 on the processor.

use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use super::{Attention, Plan, available};
use crate::{
    attention::{Bias, CHUNK, Keys, Metric, Precision, Reader, Start, Term, full, scan},
    error::{Error, Result},
    fused::applies,
    rng::Stream,
};

/// Sizes that leave tails in every loop.
const TARGETS: usize = 129;
const CONTEXT: usize = 517;
const HEADS: usize = 4;

/// One case.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    /// What it tries.
    pub name: String,
    /// The largest difference, over the largest value (0.1 at least).
    pub error: f64,
    /// What is allowed.
    pub gate: f64,
}

/// Every case.
#[derive(Debug, Clone, Serialize)]
pub struct Accuracy {
    /// Always "accuracy".
    pub command: &'static str,
    /// Where attention was computed.
    pub device: String,
    /// In which numbers.
    pub precision: Precision,
    /// The largest error over the gate of its case.
    pub worst: f64,
    /// Whether every case is within its gate.
    pub passed: bool,
    /// The cases.
    pub cases: Vec<Case>,
}

/// What a precision is allowed, relative to f64.
fn gate(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 2e-6,
        Precision::Tf32 => 1e-3,
        Precision::Bf16 => 5e-3,
    }
}

/// Queries, keys, values and sites, in f64.
struct Problem {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asked: Tensor,
    sites: Tensor,
    mask: Tensor,
}

impl Problem {
    /// Standard normal keys and values of `width`, one site in eight hidden.
    fn random(rng: &mut Stream, heads: usize, width: usize) -> Result<Self> {
        let mut draw = |shape: &[usize], scale: f64| {
            let n = shape.iter().product();
            // Rounded to f32, which every way of computing can hold.
            let values: Vec<f64> =
                (0..n).map(|_| f64::from((scale * rng.normal()) as f32)).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        };
        let of = [1, CONTEXT, heads, width];
        let hidden = |j: usize| if j % 8 == 3 { 0.0 } else { 1.0 };
        let mask: Vec<f64> = (0..CONTEXT).map(hidden).collect();
        Ok(Problem {
            q: draw(&[1, TARGETS, heads, width], 0.5)?,
            k: draw(&of, 0.5)?,
            v: draw(&of, 1.0)?,
            asked: draw(&[1, TARGETS, 2], 0.5)?,
            sites: draw(&[1, CONTEXT, 2], 0.5)?,
            mask: Tensor::from_vec(mask, (1, CONTEXT), &Device::Cpu)?,
        })
    }

    /// One number a key, which is its score.
    fn scored(rng: &mut Stream, score: Score) -> Result<Self> {
        let mut problem = Problem::random(rng, 1, 1)?;
        let scores: Vec<f64> = (0..CONTEXT).map(|j| f64::from(score(j) as f32)).collect();
        problem.k = Tensor::from_vec(scores, (1, CONTEXT, 1, 1), &Device::Cpu)?;
        problem.q = problem.q.ones_like()?;
        Ok(problem)
    }

    fn error(&self, plan: &Plan, bias: Option<&Bias>) -> Result<f64> {
        let to = |x: &Tensor| x.to_dtype(DType::F32)?.to_device(&plan.device);
        let moved = |bias: &Bias, x: Tensor| Bias { params: x, ..bias.clone() };
        let double =
            bias.map(|b| candle_core::Result::Ok(moved(b, b.params.to_dtype(DType::F64)?)));
        let keys = Keys::pack(&self.k, &self.v, &self.sites, &self.mask)?;
        let truth = full(&self.q, &self.asked, &keys, double.transpose()?.as_ref())?;
        let bias = bias.map(|b| candle_core::Result::Ok(moved(b, to(&b.params)?))).transpose()?;
        let (q, k, v) = (to(&self.q)?, to(&self.k)?, to(&self.v)?);
        let (asked, sites, mask) = (to(&self.asked)?, to(&self.sites)?, to(&self.mask)?);
        let found = if applies(&k) {
            let reading = plan.reading(Attention::Scan);
            Reader::new(&k, &v, &sites, &mask, bias.as_ref(), reading)?.read(&q, &asked)?
        } else {
            let keys = Keys::pack(&k, &v, &sites, &mask)?.read_in(plan.precision);
            scan(&q, &asked, &keys, bias.as_ref(), CHUNK, Start::Exact)?
        };
        gap(&found, &truth)
    }
}

/// The largest difference over the largest value, or over 0.1; infinite where one is not finite.
fn gap(found: &Tensor, truth: &Tensor) -> Result<f64> {
    let host = |x: &Tensor| -> Result<Vec<f64>> {
        Ok(x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
    };
    let (found, truth) = (host(found)?, host(truth)?);
    if found.len() != truth.len() {
        return Err(Error::axis("values found and true", found.len(), truth.len()));
    }
    let top = truth.iter().fold(0.1f64, |m, v| m.max(v.abs()));
    let differences = found.iter().zip(&truth).map(|(a, b)| (a - b).abs());
    Ok(differences.fold(0.0f64, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) }) / top)
}

/// The score of a key, by its number.
type Score = fn(usize) -> f64;

/// Scores that move a running maximum late, by much, often, or not at all.
const SCORES: [(&str, Score); 6] = [
    ("rising scores", |j| -10_000.0 + 25.2 * j as f64),
    ("falling scores", |j| 80.0 - 25.2 * j as f64),
    ("one high score", |j| if j == 378 { 80.0 } else { -10_000.0 }),
    ("all scores low", |_| -10_000.0),
    ("high and low in turns", |j| if j % 2 == 0 { 80.0 } else { -80.0 }),
    ("a bit higher block by block", |j| (j / 32) as f64 * 30.0),
];

/// Every term of a bias on the plane and on the globe, no bias, and extreme scores.
///
/// # Errors
/// As [`available`].
pub fn run(plan: &Plan) -> Result<Accuracy> {
    available(Attention::Scan, plan)?;
    let usual = gate(plan.precision);
    let mut rng = Stream::new(plan.seed, "accuracy", 0);
    let mut cases = Vec::new();
    let mut add = |name: String, error: f64, gate: f64| cases.push(Case { name, error, gate });
    let plain = Problem::random(&mut rng, HEADS, 32)?.error(plan, None)?;
    add("no bias".into(), plain, usual);
    for term in Term::ALL {
        for metric in [Metric::Euclidean, Metric::GreatCircle] {
            let problem = Problem::random(&mut rng, HEADS, 32)?;
            let params: Vec<f32> = (0..HEADS)
                .flat_map(|head| match term {
                    Term::Scalar => [-1.5 - head as f32, 0.0, 0.0],
                    Term::Sink => [0.5, 0.0, 0.0],
                    _ => [1.0, 1.0 + head as f32, 0.3],
                })
                .collect();
            let params = Tensor::from_vec(params, (HEADS, 1, 3), &Device::Cpu)?;
            let bias = Bias { terms: vec![term], params, metric };
            // Near the edge of a compact support weights hang on the last digits of 1 − u.
            let gate = if term == Term::Wendland { usual.max(2e-5) } else { usual };
            add(format!("{term:?}, {metric:?}"), problem.error(plan, Some(&bias))?, gate);
        }
    }
    // In fewer bits, scores of tens are off by whole units: only f32 is held to these.
    if plan.precision == Precision::F32 {
        for (name, score) in SCORES {
            let error = Problem::scored(&mut rng, score)?.error(plan, None)?;
            add(name.into(), error, usual);
        }
    }
    let worst = cases.iter().map(|case| case.error / case.gate).fold(0.0, f64::max);
    Ok(Accuracy {
        command: "accuracy",
        device: plan.device_name.clone(),
        precision: plan.precision,
        worst,
        passed: worst <= 1.0,
        cases,
    })
}
