//! Where to survey next: the sites that most reduce what a map gets wrong about a threshold.
//!
//! A map gives each pixel a probability p of lying above a threshold t. Taking the likelier side is wrong
//! with a probability between p(1 − p) and twice that; p(1 − p) is the variance of the answer, and what is to become
//! small here. Surveys not made yet move the link-scale surface's mean by an unknown amount of known
//! variance, and shrink its variance by as much: with h = (mean − t)/sd and ρ the share of the variance
//! that they take away, what is expected of p(1 − p) after them is `Φ(h) − Φ₂(h, h; ρ) = 2 T(h, √((1 − ρ)/(1 + ρ)))`, T being Owen's function. No
//! outcome has to be made up, and a batch of sites is judged as the batch it is. Sites are taken one by one,
//! each the best beside those before it: greedily, which for such criteria is near the best batch.
//!
//! Sources: Owen (1956), doi:10.1214/aoms/1177728074; Chevalier et al. (2014),
//! doi:10.1080/00401706.2013.860918, for the criterion; Krause, Singh & Guestrin (2008), JMLR 9, for greed.

use rayon::prelude::*;

use crate::{
    error::{Error, Result},
    predictive::normal_cdf,
};

/// Places a map is judged at, at most: their covariance is held whole.
pub const MOST_PLACES: usize = 2_000;

/// What is to become small.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Aim {
    /// p(1 − p) for the probability p that the surface exceeds this level, link scale.
    Threshold(f64),
    /// The variance of the surface, link scale.
    Variance,
}

/// The map as it is: what is believed of the surface at the places it is judged at.
#[derive(Debug, Clone)]
pub struct Belief {
    /// Mean, link scale, `[place]`.
    pub mean: Vec<f64>,
    /// Covariance, link scale², row-major `[place, place]`.
    pub covariance: Vec<f64>,
    /// Variance of what one survey at a place would read beside the surface, link scale², `[place]`.
    pub noise: Vec<f64>,
    /// How much each place counts, `[place]`.
    pub weight: Vec<f64>,
}

/// A site to survey.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Proposal {
    /// Which place.
    pub place: usize,
    /// By how much the aim falls, on average over places, in its unit: a probability, or link scale².
    pub gain: f64,
    /// What is left of the aim after this site and those before it, on average over places.
    pub left: f64,
}

/// Owen's T: `1/2π ∫₀ᵃ exp(−h²(1 + x²)/2)/(1 + x²) dx`, for 0 ≤ a ≤ 1, by Gauss–Legendre.
///
/// ```
/// let t = isopleth::mapping::next::owen(0.5, 1.0); // Φ(h)Φ(−h)/2
/// assert!((t - 0.5 * 0.691_462_461_274 * 0.308_537_538_726).abs() < 1e-10);
/// assert!((isopleth::mapping::next::owen(0.0, 0.3) - 0.3f64.atan() / std::f64::consts::TAU).abs() < 1e-12);
/// ```
pub fn owen(h: f64, a: f64) -> f64 {
    // Ten points on (−1, 1): Abramowitz & Stegun (1964), table 25.4.
    const NODES: [(f64, f64); 5] = [
        (0.148_874_338_981_631_22, 0.295_524_224_714_752_87),
        (0.433_395_394_129_247_2, 0.269_266_719_309_996_35),
        (0.679_409_568_299_024_4, 0.219_086_362_515_982_04),
        (0.865_063_366_688_984_5, 0.149_451_349_150_580_6),
        (0.973_906_528_517_171_7, 0.066_671_344_308_688_14),
    ];
    let half = 0.5 * a;
    let f = |x: f64| {
        let s = 1.0 + x * x;
        (-0.5 * h * h * s).exp() / s
    };
    let sum: f64 = NODES.iter().map(|(x, w)| w * (f(half * (1.0 + x)) + f(half * (1.0 - x)))).sum();
    half * sum / std::f64::consts::TAU
}

impl Aim {
    /// The aim at a place whose surface had this mean and variance, of which `left` is left.
    fn at(self, mean: f64, variance: f64, left: f64) -> f64 {
        match self {
            Aim::Variance => left,
            Aim::Threshold(t) => {
                let h = (mean - t) / variance.sqrt();
                let rho = (1.0 - left / variance).clamp(0.0, 1.0);
                2.0 * owen(h, ((1.0 - rho) / (1.0 + rho)).sqrt())
            }
        }
    }
}

impl Belief {
    fn check(&self) -> Result<()> {
        let n = self.mean.len();
        let lengths = [self.noise.len(), self.weight.len()];
        if self.covariance.len() != n * n || lengths != [n, n] {
            return Err(Error::axis("places of a belief", format!("{lengths:?}"), n));
        }
        Ok(())
    }

    /// The aim on average over places, with `left` of each variance.
    fn aim(&self, aim: Aim, left: impl Fn(usize) -> f64 + Sync) -> f64 {
        let n = self.mean.len();
        let total: f64 = self.weight.iter().sum();
        let each = (0..n)
            .filter(|e| self.weight[*e] > 0.0)
            .map(|e| self.weight[e] * aim.at(self.mean[e], self.covariance[e * n + e], left(e)));
        each.sum::<f64>() / total.max(f64::MIN_POSITIVE)
    }

    /// At most `k` of the places where `free` says so, in the order of their worth; fewer where no place
    /// is left. `apart` says whether a place may be surveyed beside one that was chosen.
    ///
    /// # Errors
    /// [`Error::Axis`] if lengths disagree.
    pub fn propose(
        &self,
        aim: Aim,
        k: usize,
        free: &[bool],
        apart: &(dyn Fn(usize, usize) -> bool + Sync),
    ) -> Result<Vec<Proposal>> {
        self.check()?;
        let n = self.mean.len();
        if free.len() != n {
            return Err(Error::axis("places and those free to survey", free.len(), n));
        }
        let mut free = free.to_vec();
        let mut covariance = self.covariance.clone();
        let mut now = self.aim(aim, |e| self.covariance[e * n + e]);
        let mut chosen = Vec::new();
        while chosen.len() < k {
            let worth = |c: usize| {
                let row = &covariance[c * n..][..n];
                let whole = row[c] + self.noise[c];
                self.aim(aim, |e| covariance[e * n + e] - row[e] * row[e] / whole)
            };
            let best = (0..n)
                .into_par_iter()
                .filter(|c| free[*c])
                .map(|c| (worth(c), c))
                .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let Some((left, place)) = best else { break };
            let row = covariance[place * n..][..n].to_vec();
            let whole = row[place] + self.noise[place];
            covariance.par_chunks_mut(n).zip(&row).for_each(|(line, r)| {
                line.iter_mut().zip(&row).for_each(|(v, s)| *v -= r * s / whole);
            });
            free[place] = false;
            (0..n).for_each(|c| free[c] = free[c] && apart(place, c));
            chosen.push(Proposal { place, gain: now - left, left });
            now = left;
        }
        Ok(chosen)
    }
}

/// P(surface > t) of each place as it is.
pub fn exceedance(belief: &Belief, t: f64) -> Vec<f64> {
    let n = belief.mean.len();
    let one = |e: usize| normal_cdf((belief.mean[e] - t) / belief.covariance[e * n + e].sqrt());
    (0..n).map(one).collect()
}
