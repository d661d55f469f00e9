//! A predictive law of one new observation, and what was observed.

use statrs::function::gamma::ln_gamma;

use crate::{
    error::{Error, Result},
    predictive::{Link, Marginals},
};

/// What was observed at a held-out site.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Truth {
    /// A value, outcome units.
    Value(f64),
    /// Positive out of tested.
    Count {
        /// Number positive.
        positive: u64,
        /// Number tested, ≥ 1.
        tested: u64,
    },
}

/// The predictive law of an observation.
#[derive(Debug, Clone)]
pub(super) enum Law {
    /// Mixture of Gaussians, outcome units; one target.
    Mixture(Marginals),
    /// Probability of each count 0 … tested, and the logarithm of the observed one's.
    Counts { pmf: Vec<f64>, log_observed: f64 },
}

/// A forecast of one observation that has met its truth.
#[derive(Debug, Clone)]
pub struct Forecast {
    pub(super) law: Law,
    pub(super) truth: Truth,
}

impl Forecast {
    /// Target `i` of `marginals` (of a new observation) against `truth`.
    ///
    /// A count's law is the binomial averaged over the law of the village's prevalence.
    ///
    /// # Errors
    /// [`Error::Input`] if the link and the kind of truth do not match, if more are positive than
    /// tested or none was tested, or if a value is not finite.
    pub fn new(marginals: &Marginals, i: usize, truth: Truth) -> Result<Self> {
        let parts: Vec<(f64, f64, f64)> = marginals.components(i).collect();
        let law = match (truth, marginals.link) {
            (Truth::Value(y), Link::Identity) if y.is_finite() => Law::Mixture(Marginals {
                components: parts.len(),
                weight: parts.iter().map(|p| p.0).collect(),
                mean: parts.iter().map(|p| p.1).collect(),
                sd: parts.iter().map(|p| p.2).collect(),
                ..*marginals
            }),
            (Truth::Count { positive, tested }, Link::Logit)
                if positive <= tested && tested > 0 =>
            {
                let pmf = counts(&parts, tested);
                Law::Counts { pmf, log_observed: log_count(&parts, positive, tested) }
            }
            _ => {
                return Err(Error::input("a forecast cannot be scored against this truth")
                    .fact("link", format!("{:?}", marginals.link))
                    .fact("truth", format!("{truth:?}"))
                    .try_this(
                        "score counts with a model of counts, and values with one of values",
                    ));
            }
        };
        Ok(Forecast { law, truth })
    }

    /// What was observed, outcome units: a value, or the proportion positive.
    pub fn observed(&self) -> f64 {
        match self.truth {
            Truth::Value(y) => y,
            Truth::Count { positive, tested } => positive as f64 / tested as f64,
        }
    }

    /// Predictive mean of the observation, outcome units.
    pub fn mean(&self) -> f64 {
        match &self.law {
            Law::Mixture(m) => m.mean_sd(0).0,
            Law::Counts { pmf, .. } => {
                let tested = (pmf.len() - 1) as f64;
                pmf.iter().enumerate().map(|(k, p)| k as f64 * p).sum::<f64>() / tested
            }
        }
    }

    /// The `level` quantile of the observation, outcome units: for counts the smallest proportion
    /// whose cumulative probability reaches `level`.
    pub fn quantile(&self, level: f64) -> f64 {
        match &self.law {
            Law::Mixture(m) => m.quantile(0, level),
            Law::Counts { pmf, .. } => {
                let mut below = 0.0;
                let reached = |p: &f64| {
                    below += p;
                    // Rounding must not push an exactly reached level to the next count.
                    below >= level - 1e-12
                };
                let k = pmf.iter().position(reached).unwrap_or(pmf.len() - 1);
                k as f64 / (pmf.len() - 1) as f64
            }
        }
    }

    /// The central interval that holds `level` of the predictive probability, outcome units.
    pub fn interval(&self, level: f64) -> (f64, f64) {
        (self.quantile(0.5 - 0.5 * level), self.quantile(0.5 + 0.5 * level))
    }
}

/// Nodes (η, weight) at which the trapezoid rule integrates a binomial likelihood of `tested`
/// people over a Gaussian: it converges exponentially once the step is below the width of the
/// product of the two, where Gauss–Hermite with fixed nodes steps over a narrow likelihood.
fn nodes(mean: f64, sd: f64, tested: u64) -> impl Iterator<Item = (f64, f64)> {
    let width = 1.0 / (1.0 / (sd * sd) + 0.25 * tested as f64).sqrt();
    let reach = 10.0_f64;
    let half = (reach * sd / (0.6 * width)).ceil() as i64;
    let step = reach / half as f64;
    (-half..=half).map(move |j| {
        let z = j as f64 * step;
        let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
        (mean + sd * z, step * density)
    })
}

/// ln softmax pair: (ln p, ln(1 − p)) for p = logistic(η), without overflow.
fn log_odds(eta: f64) -> (f64, f64) {
    let softplus = (-eta.abs()).exp().ln_1p();
    (eta.min(0.0) - softplus, (-eta).min(0.0) - softplus)
}

/// Probability of each count 0 … tested under a Gaussian mixture of logits.
fn counts(parts: &[(f64, f64, f64)], tested: u64) -> Vec<f64> {
    let n = tested as f64;
    let choose: Vec<f64> = (0..=tested)
        .map(|k| ln_gamma(n + 1.0) - ln_gamma(k as f64 + 1.0) - ln_gamma(n - k as f64 + 1.0))
        .collect();
    let mut pmf = vec![0.0; choose.len()];
    for &(weight, mean, sd) in parts {
        for (eta, part) in nodes(mean, sd, tested) {
            let (yes, no) = log_odds(eta);
            for (k, p) in pmf.iter_mut().enumerate() {
                let k = k as f64;
                *p += weight * part * (choose[k as usize] + k * yes + (n - k) * no).exp();
            }
        }
    }
    // The mass beyond ten sds is 1e-23; rounding of the sum is larger, and is removed here.
    let total: f64 = pmf.iter().sum();
    pmf.iter_mut().for_each(|p| *p /= total);
    pmf
}

/// Log probability of one count, which cannot underflow: a badly missed count scores −300, not −∞.
fn log_count(parts: &[(f64, f64, f64)], positive: u64, tested: u64) -> f64 {
    let (k, n) = (positive as f64, tested as f64);
    let terms: Vec<f64> = parts
        .iter()
        .flat_map(|&(weight, mean, sd)| {
            nodes(mean, sd, tested).map(move |(eta, part)| {
                let (yes, no) = log_odds(eta);
                (weight * part).ln() + k * yes + (n - k) * no
            })
        })
        .collect();
    let top = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = terms.iter().map(|t| (t - top).exp()).sum();
    ln_gamma(n + 1.0) - ln_gamma(k + 1.0) - ln_gamma(n - k + 1.0) + top + sum.ln()
}
