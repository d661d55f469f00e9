//! Distance bias: what is added to an attention score because of how far apart two sites are.
//!
//! Source: tnp-kr families of Jenson et al. (arXiv:2411.12502, arXiv:2506.09163), and decaying
//! terms of our own. With a term that falls without bound, attention is a true kernel regression.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::{error::Result, fused::simd};

/// One additive term; `a`, `b`, `c` are learned per head, `d` is distance in model units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Term {
    /// `a d`: with a < 0, the log of an exponential kernel.
    Scalar,
    /// `a exp(−b d²)`.
    Rbf,
    /// `a exp(−b (d − c)²)`: the shifted RBF of TISA (Wennberg & Henter 2021).
    Tisa,
    /// `a exp(−b d)`.
    Exponential,
    /// Not a distance at all: a key that is always there, with score `a` and value 0. A head then
    /// answers less the fewer sites it has within reach, so a network can tell how much data is
    /// near: softmax alone hides it.
    Sink,
}

impl Term {
    /// Every family.
    pub const ALL: [Term; 5] = [Term::Scalar, Term::Rbf, Term::Tisa, Term::Exponential, Term::Sink];
}

/// A sum of terms, with parameters for every head.
#[derive(Debug, Clone)]
pub struct Bias {
    /// Families of the terms, in order.
    pub terms: Vec<Term>,
    /// `[head, term, 3]`: a, b, c. Families that lack `b` or `c` ignore it.
    pub params: Tensor,
}

impl Bias {
    /// The bias for squared distances, composed from tensor operations: the reference.
    ///
    /// # Shapes
    /// `d2` `[batch, target, context]`, squared model units; returns `[batch, head, target, context]`.
    pub fn composed(&self, d2: &Tensor) -> Result<Tensor> {
        let heads = self.params.dims()[0];
        let d2 = d2.unsqueeze(1)?; // [batch, 1, target, context]
        let d = distance(&d2)?;
        let mut total: Option<Tensor> = None;
        for (j, term) in self.terms.iter().enumerate() {
            let param = |i: usize| -> Result<Tensor> {
                Ok(self.params.narrow(1, j, 1)?.narrow(2, i, 1)?.reshape((1, heads, 1, 1))?)
            };
            let (a, b, c) = (param(0)?, param(1)?, param(2)?);
            let value = match term {
                Term::Scalar => d.broadcast_mul(&a)?,
                Term::Rbf => d2.broadcast_mul(&b.neg()?)?.exp()?.broadcast_mul(&a)?,
                Term::Tisa => {
                    let u2 = d.broadcast_sub(&c)?.sqr()?;
                    u2.broadcast_mul(&b.neg()?)?.exp()?.broadcast_mul(&a)?
                }
                Term::Exponential => d.broadcast_mul(&b.neg()?)?.exp()?.broadcast_mul(&a)?,
                Term::Sink => continue,
            };
            total = Some(match total {
                Some(sum) => (sum + value)?,
                None => value,
            });
        }
        match total {
            Some(total) => Ok(total),
            None => Ok(d2.broadcast_mul(
                &self
                    .params
                    .zeros_like()?
                    .narrow(1, 0, 1)?
                    .narrow(2, 0, 1)?
                    .reshape((1, heads, 1, 1))?,
            )?),
        }
    }

    /// Which term is the sink, if any.
    pub fn sink(&self) -> Option<usize> {
        self.terms.iter().position(|t| *t == Term::Sink)
    }

    /// Score of the sink `[1, head, 1, 1]`, if there is one.
    pub fn sink_score(&self) -> Result<Option<Tensor>> {
        let heads = self.params.dims()[0];
        let Some(j) = self.sink() else {
            return Ok(None);
        };
        Ok(Some(self.params.narrow(1, j, 1)?.narrow(2, 0, 1)?.reshape((1, heads, 1, 1))?))
    }
}

/// √d², with zero gradient at zero distance instead of NaN.
fn distance(d2: &Tensor) -> Result<Tensor> {
    Ok(d2.maximum(1e-30)?.sqrt()?)
}

/// Squared Euclidean distances by explicit differences, so that nearby sites lose no digits.
///
/// # Shapes
/// `a` `[batch, target, dim]`, `b` `[batch, context, dim]`; returns `[batch, target, context]`.
pub fn squared_distances(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(a.unsqueeze(2)?.broadcast_sub(&b.unsqueeze(1)?)?.sqr()?.sum(3)?)
}

simd::vectorised! {
    /// `out[j] = |s − keys[j]|²` for one target `s` and keys stored dimension by dimension.
    pub fn distances_to(s: &[f32], keys: &[f32], stride: usize, out: &mut [f32]) {
        let n = out.len();
        let first = &keys[..n];
        for (o, &k) in out.iter_mut().zip(first) {
            *o = (s[0] - k) * (s[0] - k);
        }
        for (dim, &s) in s.iter().enumerate().skip(1) {
            let column = &keys[dim * stride..dim * stride + n];
            for (o, &k) in out.iter_mut().zip(column) {
                *o = (s - k).mul_add(s - k, *o);
            }
        }
    }
}

simd::vectorised! {
    /// Adds one term to scores, given squared distances.
    pub fn add_term(term: Term, p: [f32; 3], d2: &[f32], scores: &mut [f32]) {
        let [a, b, c] = p;
        match term {
            Term::Scalar => {
                for (s, &d2) in scores.iter_mut().zip(d2) {
                    *s = d2.sqrt().mul_add(a, *s);
                }
            }
            Term::Rbf => {
                for (s, &d2) in scores.iter_mut().zip(d2) {
                    *s = simd::exp(-b * d2).mul_add(a, *s);
                }
            }
            Term::Tisa => {
                for (s, &d2) in scores.iter_mut().zip(d2) {
                    let u = d2.sqrt() - c;
                    *s = simd::exp(-b * u * u).mul_add(a, *s);
                }
            }
            Term::Exponential => {
                for (s, &d2) in scores.iter_mut().zip(d2) {
                    *s = simd::exp(-b * d2.sqrt()).mul_add(a, *s);
                }
            }
            Term::Sink => {}
        }
    }
}

simd::vectorised! {
    /// Gradient of one term's parameters: `Σ ds · ∂term/∂(a, b, c)`.
    pub fn term_gradient(term: Term, p: [f32; 3], d2: &[f32], ds: &[f32]) -> [f32; 3] {
        let [a, b, c] = p;
        let mut sums = [[0.0f32; 16]; 3];
        // One loop per family: a choice inside the loop would keep it from being vectorised.
        macro_rules! lanes {
            (|$lane:ident, $d2:ident, $g:ident| $step:expr) => {{
                let body = d2.len() / 16 * 16;
                for (d2, ds) in d2[..body].chunks_exact(16).zip(ds[..body].chunks_exact(16)) {
                    for $lane in 0..16 {
                        let ($d2, $g) = (d2[$lane], ds[$lane]);
                        $step
                    }
                }
                for i in body..d2.len() {
                    let ($lane, $d2, $g) = (i - body, d2[i], ds[i]);
                    $step
                }
            }};
        }
        match term {
            Term::Scalar => lanes!(|l, d2, g| sums[0][l] = g.mul_add(d2.sqrt(), sums[0][l])),
            Term::Rbf => lanes!(|l, d2, g| {
                let e = g * simd::exp(-b * d2);
                sums[0][l] += e;
                sums[1][l] -= a * d2 * e;
            }),
            Term::Tisa => lanes!(|l, d2, g| {
                let u = d2.sqrt() - c;
                let e = g * simd::exp(-b * u * u);
                sums[0][l] += e;
                sums[1][l] -= a * u * u * e;
                sums[2][l] += 2.0 * a * b * u * e;
            }),
            Term::Exponential => lanes!(|l, d2, g| {
                let d = d2.sqrt();
                let e = g * simd::exp(-b * d);
                sums[0][l] += e;
                sums[1][l] -= a * d * e;
            }),
            Term::Sink => {}
        }
        sums.map(|s| s.iter().sum())
    }
}
