//! Negative binomial counts: cases in a population or over person-time, overdispersed.
//!
//! Source: Lawless (1987), doi:10.2307/3314912: the Poisson law whose rate varies by a gamma factor.

use candle_core::Tensor;
use statrs::function::gamma::ln_gamma;

use super::{Kind, Likelihood, log_gamma_draw, poisson};
use crate::{error::Result, predictive::Link, rng::Stream, sites::Observations};

/// `cases ~ Poisson(exposure · g · exp(surface + nugget))` with `g ~ Gamma(r, 1/r)`, of mean 1. Its
/// size r > 0: the variance of a count of mean μ is μ + μ²/r, so that ∞ is the Poisson law.
pub struct NegativeBinomial;

/// Villages are held within this of their surface, link scale.
const MOST: f64 = 30.0;
/// Gaussians that a village's factor is made of.
const PARTS: usize = 24;

/// Log probability of `k` where the mean is `mean`.
fn log_pmf(k: f64, mean: f64, size: f64) -> f64 {
    // ln(r/(r + μ)) in a form that keeps its digits for large r.
    ln_gamma(k + size) - ln_gamma(size) - ln_gamma(k + 1.0) - size * (mean / size).ln_1p()
        + k * (mean.ln() - (size + mean).ln())
}

impl Likelihood for NegativeBinomial {
    fn name(&self) -> &'static str {
        "negative-binomial"
    }
    fn about(&self) -> &'static str {
        "cases in a population or person-time (offset), log link, gamma villages"
    }
    fn link(&self) -> Link {
        Link::Log
    }
    fn kind(&self) -> Kind {
        Kind::Exposure
    }
    fn width(&self) -> usize {
        2
    }
    fn features(&self, observations: &Observations) -> Result<Tensor> {
        poisson::features(observations)
    }
    fn dispersion(&self) -> Option<&'static str> {
        Some("size")
    }
    fn village(&self, eta: f64, size: f64, rng: &mut Stream) -> f64 {
        eta + (log_gamma_draw(size, rng) - size.ln()).clamp(-MOST, MOST)
    }
    fn observe(&self, eta: f64, trials: f64, rng: &mut Stream) -> f64 {
        poisson::observe(eta, trials, rng)
    }
    /// With the derivatives (k − μ) r/(r + μ) and −(k + r) r μ/(r + μ)², for the mean μ.
    ///
    /// ```
    /// let law = isopleth::likelihood::find("negative-binomial")?;
    /// let found = law.log_probability(3.0, 10.0, -1.0, 2.5).unwrap();
    /// // scipy.stats.nbinom.logpmf(3, r, r / (r + mu)) for r = 2.5 and mu = 10 exp(-1)
    /// assert!((found[0] - -1.9363237172720).abs() < 1e-10, "{found:?}");
    /// # Ok::<(), isopleth::Error>(())
    /// ```
    fn log_probability(&self, y: f64, trials: f64, eta: f64, size: f64) -> Option<[f64; 3]> {
        if size.is_infinite() {
            return poisson::Poisson.log_probability(y, trials, eta, size);
        }
        let mean = trials * eta.exp();
        let whole = size + mean;
        let curve = -(y + size) * size * mean / (whole * whole);
        Some([log_pmf(y, mean, size), (y - mean) * size / whole, curve])
    }
    /// The law of ln g is cut by overlapping bumps that add up to 1, and each part is replaced by the
    /// Gaussian that gives g its mean and variance there: so g has mean 1 and variance 1/r exactly, and
    /// counts their probabilities to 0.3 % for r ≥ ½.
    fn scatter(&self, size: f64) -> Vec<(f64, f64, f64)> {
        if size.is_infinite() {
            return vec![(1.0, 0.0, 0.0)];
        }
        const FINE: usize = 4000;
        // Of x = ln(g), up to a factor; its mode is 0.
        let log_density = |x: f64| size * (x - x.exp_m1());
        // Where it has fallen by so much from its mode, in the direction of `towards`.
        let fallen = |towards: f64, by: f64| {
            let (mut near, mut far) = (0.0, towards);
            while log_density(far) > -by {
                far *= 2.0;
            }
            for _ in 0..60 {
                let middle = 0.5 * (near + far);
                if log_density(middle) > -by { near = middle } else { far = middle }
            }
            far
        };
        let (low, high) = (fallen(-1.0, 30.0), fallen(1.0, 30.0));
        let at = (0..FINE).map(|i| low + (high - low) * (i as f64 + 0.5) / FINE as f64);
        let fine: Vec<(f64, f64)> = at.map(|x| (x, log_density(x).exp())).collect();
        let total: f64 = fine.iter().map(|(_, w)| w).sum();
        let factor: f64 = fine.iter().map(|(x, w)| w / total * x.exp()).sum();
        // Below e⁻¹⁴ a village has no cases, however far below.
        let (first, last) = (fallen(-1.0, 9.0).max(-14.0), fallen(1.0, 9.0));
        let apart = (last - first) / (PARTS - 1) as f64;
        let mut sums = [[0.0f64; 3]; PARTS];
        for (x, w) in fine {
            let logs: [f64; PARTS] = std::array::from_fn(|k| {
                -0.5 * ((x - first - k as f64 * apart) / (0.6 * apart)).powi(2)
            });
            let top = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let bumps = logs.map(|l| (l - top).exp());
            let whole: f64 = bumps.iter().sum();
            let g = x.exp() / factor;
            for (sum, bump) in sums.iter_mut().zip(bumps) {
                let part = w / total * bump / whole;
                [part, part * g, part * g * g].iter().zip(sum).for_each(|(p, s)| *s += p);
            }
        }
        let gaussian = |[mass, first, second]: [f64; 3]| {
            let (mean, square) = (first / mass, second / mass);
            let variance = (square / (mean * mean)).ln().max(1e-18);
            (mass, mean.ln() - 0.5 * variance, variance.sqrt())
        };
        sums.map(gaussian).to_vec()
    }
}
