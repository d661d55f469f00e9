//! Distance bias: what is added to an attention score because of how far apart two sites are.
//!
//! Source: tnp-kr families of Jenson et al. (arXiv:2411.12502, arXiv:2506.09163), and log-kernel
//! terms of our own. The value of such a term is `a log k(|b| d)` with k a correlation function, so
//! that attention is a kernel regression (Nadaraya & Watson 1964) with kernel kᵃ, and far sites are
//! suppressed instead of taking a share. Correlations: Rasmussen & Williams (2006), eq. 4.9 and
//! 4.17; Wendland (1995), doi:10.1007/BF02123482, the function φ₃,₁.

use std::f64::consts::TAU;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    fused::{
        log::{ln, ln_1p},
        simd,
    },
    registry::Named,
};

const SQRT_3: f64 = 1.732_050_807_568_877_2;
const SQRT_5: f64 = 2.236_067_977_499_79;

/// One additive term; `a`, `b`, `c` are learned per head, `d` is distance.
///
/// In the log-kernel terms (from [`SquaredExponential`](Term::SquaredExponential) on) `b` is one
/// over a length scale in this library's sense, and `a ≥ 0` a sharpness: k to the power `a`. Only
/// `|b|` counts there. The log kernel of Matérn ½ is [`Scalar`](Term::Scalar).
///
/// # Units
/// `d` in model units, or radians on the globe ([`Metric`]); `b` and `1 / c` in one over that
/// (squared for `b` of Rbf and Tisa); `a` has none, except one over distance for Scalar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Term {
    /// `a d`: with a < 0, the log of an exponential kernel of length scale 1 / |a|.
    Scalar,
    /// `a exp(−b d²)`.
    Rbf,
    /// `a exp(−b (d − c)²)`: the shifted RBF of TISA (Wennberg & Henter 2021).
    Tisa,
    /// `a exp(−b d)`.
    Exponential,
    /// `−a (b d)² / 2`.
    SquaredExponential,
    /// `a (log(1 + s) − s)`, s = √3 b d.
    #[serde(rename = "matern-3/2")]
    Matern32,
    /// `a (log(1 + s + s²/3) − s)`, s = √5 b d.
    #[serde(rename = "matern-5/2")]
    Matern52,
    /// `a log((1 − u)⁴ (4u + 1))` for u = b d < 1, and −∞ from there on: a site at 1 / b or beyond
    /// has weight 0 exactly, whatever `a` is. With a < ¼ the gradient grows without bound towards
    /// the edge of the support.
    Wendland,
    /// Not a distance at all: a key that is always there, with score `a` and value 0. A head then
    /// answers less the fewer sites it has within reach, so a network can tell how much data is
    /// near: softmax alone hides it.
    Sink,
    /// `a cos(2π b d)`: bumps at every multiple of the period 1 / b, the log of a periodic kernel
    /// (MacKay 1998, <https://www.inference.org.uk/mackay/gpB.pdf>) up to a constant. In f32 the rounding of a
    /// distance moves it by up to 4e-7 a b d: meant for periods that are no small part of a region.
    Periodic,
}

impl Term {
    /// Every family.
    pub const ALL: [Term; 10] = [
        Term::Scalar,
        Term::Rbf,
        Term::Tisa,
        Term::Exponential,
        Term::SquaredExponential,
        Term::Matern32,
        Term::Matern52,
        Term::Wendland,
        Term::Sink,
        Term::Periodic,
    ];

    /// Whether the term is the log of a correlation function in `b d`, with `a` its sharpness.
    pub const fn is_log_kernel(self) -> bool {
        matches!(self, Term::SquaredExponential | Term::Matern32 | Term::Matern52 | Term::Wendland)
    }

    /// The term's value at distance `d` with parameters a, b, c: −∞ outside the support. A sink is
    /// not a matter of distance: 0.
    ///
    /// ```
    /// use isopleth::attention::Term;
    /// // One length scale away, to the power a = 1: the Matérn correlations of the glossary.
    /// let at_one = |t: Term| (1000.0 * t.value([1.0, 0.5, 0.0], 2.0).exp()).round();
    /// assert_eq!(at_one(Term::Matern32), 483.0);
    /// assert_eq!(at_one(Term::Matern52), 524.0);
    /// assert_eq!(at_one(Term::SquaredExponential), 607.0);
    /// assert_eq!(at_one(Term::Wendland), 0.0);
    /// // Half way to the edge of a Wendland kernel: (1/2)⁴ · 3.
    /// assert_eq!(Term::Wendland.value([1.0, 0.5, 0.0], 1.0), 0.1875f64.ln());
    /// ```
    pub fn value(self, [a, b, c]: [f64; 3], d: f64) -> f64 {
        let u = b.abs() * d;
        match self {
            Term::Scalar => a * d,
            Term::Rbf => a * (-b * d * d).exp(),
            Term::Tisa => a * (-b * (d - c) * (d - c)).exp(),
            Term::Exponential => a * (-b * d).exp(),
            Term::SquaredExponential => -0.5 * a * u * u,
            Term::Matern32 => a * ((SQRT_3 * u).ln_1p() - SQRT_3 * u),
            Term::Matern52 => {
                let s = SQRT_5 * u;
                a * ((s + s * s / 3.0).ln_1p() - s)
            }
            Term::Wendland if u < 1.0 => a * (4.0 * (-u).ln_1p() + (4.0 * u).ln_1p()),
            Term::Wendland => f64::NEG_INFINITY,
            Term::Sink => 0.0,
            Term::Periodic => a * (TAU * u).cos(),
        }
    }

    /// The distance from which on the term is −∞: ∞ unless the kernel is compact.
    pub fn support(self, [_, b, _]: [f64; 3]) -> f64 {
        if self == Term::Wendland { 1.0 / b.abs() } else { f64::INFINITY }
    }
}

impl Named for Term {
    /// As in recipes.
    fn name(&self) -> &str {
        match self {
            Term::Scalar => "scalar",
            Term::Rbf => "rbf",
            Term::Tisa => "tisa",
            Term::Exponential => "exponential",
            Term::SquaredExponential => "squared-exponential",
            Term::Matern32 => "matern-3/2",
            Term::Matern52 => "matern-5/2",
            Term::Wendland => "wendland",
            Term::Sink => "sink",
            Term::Periodic => "periodic",
        }
    }
    fn about(&self) -> &str {
        match self {
            Term::Scalar => "a d: log of an exponential kernel (Jenson et al., arXiv:2506.09163)",
            Term::Rbf => "a exp(-b d²): a bump at distance 0 (Jenson et al., arXiv:2506.09163)",
            Term::Tisa => "a exp(-b (d - c)²): a bump at distance c (Wennberg & Henter 2021)",
            Term::Exponential => {
                "a exp(-b d): a peak at distance 0 (Jenson et al., arXiv:2506.09163)"
            }
            Term::SquaredExponential => {
                "a log k: k squared exponential, 1/b its length scale (Rasmussen & Williams 2006, eq. 4.9)"
            }
            Term::Matern32 => {
                "a log k: k Matérn 3/2, 1/b its length scale (Rasmussen & Williams 2006, eq. 4.17)"
            }
            Term::Matern52 => {
                "a log k: k Matérn 5/2, 1/b its length scale (Rasmussen & Williams 2006, eq. 4.17)"
            }
            Term::Wendland => {
                "a log k: k of compact support 1/b, no site beyond is read (Wendland 1995)"
            }
            Term::Sink => {
                "a key with score a and value 0 at no distance: shows how few sites are near"
            }
            Term::Periodic => "a cos(2π b d): bumps at every multiple of 1/b (MacKay 1998)",
        }
    }
}

/// How distance between two sites is measured. Attention has its own, since it needs angles in f32
/// where [`kernel::Metric`](crate::kernel::Metric) needs kilometres in f64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Straight line, in the units of the coordinates.
    #[default]
    Euclidean,
    /// Great circle between sites given as (longitude, latitude) in degrees. The distance is the
    /// angle in radians, so its unit is the radius of the Earth: 0.01 is 63.7 km, and no two sites
    /// are more than π apart.
    GreatCircle,
}

impl Metric {
    /// Distance from the straight line between two points of [`geometry`].
    pub fn distance(self, straight: f64) -> f64 {
        match self {
            Metric::Euclidean => straight,
            Metric::GreatCircle => 2.0 * (0.5 * straight).min(1.0).asin(),
        }
    }

    /// The straight line behind a distance, ∞ for more than half way round the globe: the inverse
    /// of [`Metric::distance`].
    pub fn straight(self, distance: f64) -> f64 {
        match self {
            Metric::Euclidean => distance,
            Metric::GreatCircle if distance > std::f64::consts::PI => f64::INFINITY,
            Metric::GreatCircle => 2.0 * (0.5 * distance).sin(),
        }
    }

    /// Squared distances from squared straight lines between points of [`geometry`], any shape.
    ///
    /// In f32 great circles are right to 1e-6 of their length, save near the antipode, where a chord
    /// hardly changes with the angle: 1e-3 there.
    pub fn squared(self, straight2: &Tensor) -> Result<Tensor> {
        match self {
            Metric::Euclidean => Ok(straight2.clone()),
            Metric::GreatCircle => {
                // A quarter of the angle has the tangent t = c / (2 + √(4 − c²)) ≤ 1.
                let root = (4.0 - straight2)?.maximum(1e-30)?.sqrt()?;
                let t = (distance(straight2)? / (root + 2.0)?)?;
                // Within 0.005; each correction is −tan(y − atan t), so an error e leaves e³ / 3.
                let mut y = (&t / ((t.sqr()? * 0.28)? + 1.0)?)?;
                for _ in 0..2 {
                    let (sin, cos) = (y.sin()?, y.cos()?);
                    y = (y - ((&sin - (&t * &cos)?)? / (cos + (&t * &sin)?)?)?)?;
                }
                Ok((y.sqr()? * 16.0)?)
            }
        }
    }
}

/// Sites as points between which straight lines tell distances: themselves on the plane, unit
/// vectors on the globe. Found once per set of sites.
///
/// # Shapes
/// `sites` `[batch, site, dim]`; returns the same, or `[batch, site, 3]` on the globe.
/// # Errors
/// [`Error::Axis`] for sites on the globe that are not (longitude, latitude).
pub fn geometry(sites: &Tensor, metric: Metric) -> Result<Tensor> {
    if metric == Metric::Euclidean {
        return Ok(sites.clone());
    }
    let (_, _, dim) = sites.dims3()?;
    if dim != 2 {
        return Err(Error::axis("sites on the globe, (longitude, latitude)", 2, dim));
    }
    // In f64: the sine of an angle in f32 degrees would lose metres.
    let radians = (sites.to_dtype(DType::F64)? * (std::f64::consts::PI / 180.0))?;
    let (lon, lat) = (radians.narrow(2, 0, 1)?, radians.narrow(2, 1, 1)?);
    let across = lat.cos()?;
    let points = Tensor::cat(&[(&across * lon.cos()?)?, (&across * lon.sin()?)?, lat.sin()?], 2)?;
    Ok(points.to_dtype(sites.dtype())?)
}

/// A sum of terms, with parameters for every head.
#[derive(Debug, Clone)]
pub struct Bias {
    /// Families of the terms, in order.
    pub terms: Vec<Term>,
    /// `[head, term, 3]`: a, b, c. Families that lack `b` or `c` ignore it.
    pub params: Tensor,
    /// How distance is measured.
    pub metric: Metric,
}

/// A bias on the host in f64, a function of distance for every head: what tables are made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Radial {
    /// How distance is measured.
    pub metric: Metric,
    /// Terms of every head with their a, b, c.
    pub heads: Vec<Vec<(Term, [f64; 3])>>,
}

impl Radial {
    /// The bias of `head` at distance `d`: −∞ outside its support. Without the sink.
    pub fn at(&self, head: usize, d: f64) -> f64 {
        if self.heads[head].iter().any(|(t, p)| t.value(*p, d) == f64::NEG_INFINITY) {
            return f64::NEG_INFINITY; // no other term brings a site back
        }
        self.heads[head].iter().map(|(term, p)| term.value(*p, d)).sum()
    }

    /// [`Radial::at`] from the straight line between two points of [`geometry`].
    pub fn at_straight(&self, head: usize, straight: f64) -> f64 {
        self.at(head, self.metric.distance(straight))
    }

    /// The distance from which on `head` reads no site, ∞ if it reads them all.
    pub fn support(&self, head: usize) -> f64 {
        self.heads[head].iter().fold(f64::INFINITY, |least, (t, p)| least.min(t.support(*p)))
    }

    /// [`Radial::support`] as a straight line between two points of [`geometry`].
    pub fn support_straight(&self, head: usize) -> f64 {
        self.metric.straight(self.support(head))
    }

    /// Score of the sink of `head`, if there is one.
    pub fn sink(&self, head: usize) -> Option<f64> {
        self.heads[head].iter().find(|(term, _)| *term == Term::Sink).map(|(_, p)| p[0])
    }

    /// Score of every head's sink, if heads have one.
    pub(super) fn sinks(&self) -> Option<Vec<f32>> {
        (0..self.heads.len()).map(|head| Some(self.sink(head)? as f32)).collect()
    }
}

impl Bias {
    /// The bias as a function of distance in f64, on the host.
    pub fn host(&self) -> Result<Radial> {
        let params = self.params.to_dtype(DType::F64)?.to_device(&Device::Cpu)?.to_vec3::<f64>()?;
        let with_term = |(term, p): (&Term, &Vec<f64>)| (*term, [p[0], p[1], p[2]]);
        Ok(Radial {
            metric: self.metric,
            heads: params
                .iter()
                .map(|h| self.terms.iter().zip(h).map(with_term).collect())
                .collect(),
        })
    }

    /// The same bias with equal terms made one: those of one family whose `b` and `c` agree in
    /// every head. Their amplitudes add up, so that the equal terms of published networks, which
    /// training never tells apart, cost no more than one. To be asked, not trained: its parameters
    /// are constants.
    pub fn collapse(&self) -> Result<Bias> {
        let heads = self.host()?.heads;
        let one = |i: usize, j: usize| {
            self.terms[i] == self.terms[j]
                && heads.iter().all(|head| match head[i].0 {
                    Term::Scalar | Term::Sink => true,
                    Term::Tisa => head[i].1[1..] == head[j].1[1..],
                    _ => head[i].1[1] == head[j].1[1],
                })
        };
        // The first of its kind stands for each term.
        let first: Vec<usize> =
            (0..self.terms.len()).map(|j| (0..j).find(|i| one(*i, j)).unwrap_or(j)).collect();
        let kept: Vec<usize> = (0..first.len()).filter(|j| first[*j] == *j).collect();
        let mut params = Vec::with_capacity(heads.len() * kept.len() * 3);
        for head in &heads {
            for &i in &kept {
                let [a, b, c] = head[i].1;
                let alike = head.iter().zip(&first).filter(|(_, to)| **to == i);
                // Only the first sink counts.
                let sum = alike.map(|(term, _)| term.1[0]).sum();
                params.extend([if self.terms[i] == Term::Sink { a } else { sum }, b, c]);
            }
        }
        let params = Tensor::from_vec(params, (heads.len(), kept.len(), 3), self.params.device())?;
        Ok(Bias {
            terms: kept.iter().map(|i| self.terms[*i]).collect(),
            params: params.to_dtype(self.params.dtype())?,
            metric: self.metric,
        })
    }

    /// Parameter `i` of term `j`, `[1, head, 1, 1]`.
    fn param(&self, j: usize, i: usize) -> Result<Tensor> {
        let heads = self.params.dims()[0];
        Ok(self.params.narrow(1, j, 1)?.narrow(2, i, 1)?.reshape((1, heads, 1, 1))?)
    }

    /// The bias for squared distances, composed from tensor operations: the reference. Finite
    /// everywhere: what lies outside a compact support is told by [`Bias::reached`].
    ///
    /// # Shapes
    /// `d2` `[batch, target, context]`, squared; returns `[batch, head, target, context]`.
    pub fn composed(&self, d2: &Tensor) -> Result<Tensor> {
        let d2 = d2.unsqueeze(1)?; // [batch, 1, target, context]
        let squares = |t: &Term| matches!(t, Term::Rbf | Term::SquaredExponential | Term::Sink);
        let d = if self.terms.iter().all(squares) { d2.clone() } else { distance(&d2)? };
        let mut total: Option<Tensor> = None;
        for (j, term) in self.terms.iter().enumerate() {
            let (a, b, c) = (self.param(j, 0)?, self.param(j, 1)?, self.param(j, 2)?);
            let scaled = |by: f64| -> Result<Tensor> { Ok(d.broadcast_mul(&(b.abs()? * by)?)?) };
            let value = match term {
                Term::Scalar => d.clone(),
                Term::Rbf => d2.broadcast_mul(&b.neg()?)?.exp()?,
                Term::Tisa => {
                    let u2 = d.broadcast_sub(&c)?.sqr()?;
                    u2.broadcast_mul(&b.neg()?)?.exp()?
                }
                Term::Exponential => d.broadcast_mul(&b.neg()?)?.exp()?,
                Term::SquaredExponential => d2.broadcast_mul(&(b.sqr()? * -0.5)?)?,
                Term::Matern32 => {
                    let s = scaled(SQRT_3)?;
                    ((&s + 1.0)?.log()? - s)?
                }
                Term::Matern52 => {
                    let s = scaled(SQRT_5)?;
                    (((s.sqr()? / 3.0)? + &s)?.affine(1.0, 1.0)?.log()? - s)?
                }
                Term::Wendland => {
                    let u = scaled(1.0)?;
                    // Only sites outside the support meet the floor, and they are not read.
                    let near = (1.0 - &u)?.maximum(1e-30)?.log()?;
                    ((near * 4.0)? + ((u * 4.0)? + 1.0)?.log()?)?
                }
                Term::Sink => continue,
                Term::Periodic => scaled(TAU)?.cos()?,
            };
            let value = value.broadcast_mul(&a)?;
            total = Some(match total {
                Some(sum) => (sum + value)?,
                None => value,
            });
        }
        match total {
            Some(total) => Ok(total),
            None => {
                let heads = self.params.dims()[0];
                let (batch, _, targets, context) = d2.dims4()?;
                let shape = (batch, heads, targets, context);
                Ok(Tensor::zeros(shape, d2.dtype(), d2.device())?)
            }
        }
    }

    /// 1 where a site is within the support of every term, 0 elsewhere; nothing if no term of the
    /// bias is compact.
    ///
    /// # Shapes
    /// As [`Bias::composed`].
    pub fn reached(&self, d2: &Tensor) -> Result<Option<Tensor>> {
        let mut all: Option<Tensor> = None;
        for (j, _) in self.terms.iter().enumerate().filter(|(_, t)| **t == Term::Wendland) {
            let u = distance(&d2.unsqueeze(1)?)?.broadcast_mul(&self.param(j, 1)?.abs()?)?;
            let inside = u.lt(1.0)?.to_dtype(d2.dtype())?;
            all = Some(match all {
                Some(all) => (all * inside)?,
                None => inside,
            });
        }
        Ok(all)
    }

    /// Which term is the sink, if any.
    pub fn sink(&self) -> Option<usize> {
        self.terms.iter().position(|t| *t == Term::Sink)
    }

    /// Score of the sink `[1, head, 1, 1]`, if there is one.
    pub fn sink_score(&self) -> Result<Option<Tensor>> {
        self.sink().map(|j| self.param(j, 0)).transpose()
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
    /// Squared great-circle distances from squared chords of the unit sphere, in place.
    pub fn arcs(d2: &mut [f32]) {
        for d2 in d2 {
            // Half the angle is asin x, x = c / 2; from x = ½ on it is π/2 − 2 asin √((1 − x) / 2).
            let x2 = 0.25 * *d2;
            let x2 = if x2 < 1.0 { x2 } else { 1.0 };
            let far = x2 > 0.25;
            let z = if far { 0.5 - 0.5 * x2.sqrt() } else { x2 };
            let p = 4.216_32e-2_f32; // asin √z = √z (1 + z p(z)) to 2e-7 for z ≤ ¼ (Cephes)
            let p = p.mul_add(z, 2.418_131e-2);
            let p = p.mul_add(z, 4.547_002_6e-2);
            let p = p.mul_add(z, 7.495_3e-2);
            let p = p.mul_add(z, 1.666_675_2e-1);
            let p = p.mul_add(z, 1.0);
            let angle = (-4.0 * z.sqrt()).mul_add(p, std::f32::consts::PI);
            *d2 = if far { angle * angle } else { *d2 * p * p };
        }
    }
}

/// √(2ν) |b| d, held below what its square can take in f32.
#[inline(always)]
fn root(twice_order: f32, b: f32, d2: f32) -> f32 {
    let s = twice_order.sqrt() * b.abs() * d2.sqrt();
    if s < 1e18 { s } else { 1e18 }
}

/// Log of the Matérn 3/2 correlation at s = √3 d / ℓ.
#[inline(always)]
fn log_matern32(s: f32) -> f32 {
    ln_1p(s) - s
}

/// Log of the Matérn 5/2 correlation at s = √5 d / ℓ.
#[inline(always)]
fn log_matern52(s: f32) -> f32 {
    ln_1p(s.mul_add(s * (1.0 / 3.0), s)) - s
}

/// Log of the Wendland correlation at u = d / support: finite, and of no use from 1 on.
#[inline(always)]
fn log_wendland(u: f32) -> f32 {
    // Near 0 the correlation is 1 − u² (10 − 20u + 15u² − 4u³): no digit of u² is lost.
    let fall = (-4.0f32).mul_add(u, 15.0).mul_add(u, -20.0).mul_add(u, 10.0) * u * u;
    let v = if u < 1.0 { 1.0 - u } else { 1.0 };
    let (v2, near) = (v * v, u < 0.25);
    let whole = if near { 1.0 - fall } else { v2 * v2 * 4.0f32.mul_add(u, 1.0) };
    let lost = if near { ((1.0 - whole) - fall) / whole } else { 0.0 };
    ln(whole) + lost
}

/// cos and sin of `t` turns.
#[inline(always)]
fn turn(t: f32) -> (f32, f32) {
    let t = t - t.round_ties_even();
    // Half the angle, |πt| ≤ π/2, by Taylor's polynomials, right to 6e-8.
    let (x, x2) = (std::f32::consts::PI * t, std::f32::consts::PI * std::f32::consts::PI * t * t);
    let s = -2.505_210_8e-8_f32;
    let s = s.mul_add(x2, 2.755_731_9e-6);
    let s = s.mul_add(x2, -1.984_127e-4);
    let s = s.mul_add(x2, 8.333_333e-3);
    let s = s.mul_add(x2, -1.666_666_7e-1);
    let s = (s * x2).mul_add(x, x);
    let c = 2.087_675_7e-9_f32;
    let c = c.mul_add(x2, -2.755_732e-7);
    let c = c.mul_add(x2, 2.480_158_7e-5);
    let c = c.mul_add(x2, -1.388_888_9e-3);
    let c = c.mul_add(x2, 4.166_666_7e-2);
    let c = c.mul_add(x2, -0.5);
    let c = c.mul_add(x2, 1.0);
    ((-2.0 * s).mul_add(s, 1.0), 2.0 * s * c)
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
            Term::SquaredExponential => {
                for (s, &d2) in scores.iter_mut().zip(d2) {
                    *s = d2.mul_add(-0.5 * a * b * b, *s);
                }
            }
            Term::Matern32 => {
                for (s, &d2) in scores.iter_mut().zip(d2) {
                    *s = log_matern32(root(3.0, b, d2)).mul_add(a, *s);
                }
            }
            Term::Matern52 => {
                for (s, &d2) in scores.iter_mut().zip(d2) {
                    *s = log_matern52(root(5.0, b, d2)).mul_add(a, *s);
                }
            }
            Term::Wendland => {
                for (s, &d2) in scores.iter_mut().zip(d2) {
                    let u = b.abs() * d2.sqrt();
                    let inside = log_wendland(u).mul_add(a, *s);
                    *s = if u < 1.0 { inside } else { f32::NEG_INFINITY };
                }
            }
            Term::Periodic => {
                for (s, &d2) in scores.iter_mut().zip(d2) {
                    *s = turn(b * d2.sqrt()).0.mul_add(a, *s);
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
            // Below, b counts as |b|: its sign returns at the end.
            Term::SquaredExponential => lanes!(|l, d2, g| {
                sums[0][l] -= 0.5 * b * b * d2 * g;
                sums[1][l] -= a * b.abs() * d2 * g;
            }),
            Term::Matern32 => lanes!(|l, d2, g| {
                let s = root(3.0, b, d2);
                sums[0][l] = g.mul_add(log_matern32(s), sums[0][l]);
                sums[1][l] -= a * g * (3.0 * b.abs()) * d2 / (1.0 + s);
            }),
            Term::Matern52 => lanes!(|l, d2, g| {
                let s = root(5.0, b, d2);
                sums[0][l] = g.mul_add(log_matern52(s), sums[0][l]);
                let slope = (1.0 + s) / (1.0 + s).mul_add(3.0, s * s);
                sums[1][l] -= a * g * (5.0 * b.abs()) * d2 * slope;
            }),
            Term::Wendland => lanes!(|l, d2, g| {
                let u = b.abs() * d2.sqrt();
                // The weight in g is 0 outside, and falls like (1 − u)⁴ᵃ towards the edge, where
                // 1 − u is never less than 2⁻²⁴: every product is finite.
                let g = if u < 1.0 { g } else { 0.0 };
                let v = if u < 1.0 { 1.0 - u } else { 1.0 };
                sums[0][l] = g.mul_add(log_wendland(u), sums[0][l]);
                sums[1][l] -= a * g * (20.0 * b.abs()) * d2 / (v * 4.0f32.mul_add(u, 1.0));
            }),
            Term::Periodic => lanes!(|l, d2, g| {
                let d = d2.sqrt();
                let (cos, sin) = turn(b * d);
                sums[0][l] = g.mul_add(cos, sums[0][l]);
                sums[1][l] -= a * g * (std::f32::consts::TAU * d) * sin;
            }),
            Term::Sink => {}
        }
        if term.is_log_kernel() && b < 0.0 {
            sums[1].iter_mut().for_each(|s| *s = -*s);
        }
        sums.map(|s| s.iter().sum())
    }
}
