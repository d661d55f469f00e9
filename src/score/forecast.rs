//! A predictive law of one new observation, and what was observed.

use super::counts::{Counts, log_probability};
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
    /// Cases in a population, or over person-time.
    Cases {
        /// Number of cases.
        cases: u64,
        /// Population or person-time, > 0.
        exposure: f64,
    },
}

/// The predictive law of an observation.
#[derive(Debug, Clone)]
pub(super) enum Law {
    /// Mixture of Gaussians of the value or its logarithm; one target.
    Mixture(Marginals),
    /// The law of the count, and the log probability of the observed one.
    Counts { counts: Counts, log_observed: f64 },
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
    /// A count's law is the binomial or Poisson averaged over the law of the village's level.
    ///
    /// # Errors
    /// [`Error::Input`] if the link and the kind of truth do not match, if more are positive than
    /// tested or none was tested, or if a value is not finite.
    pub fn new(marginals: &Marginals, i: usize, truth: Truth) -> Result<Self> {
        let parts: Vec<(f64, f64, f64)> = marginals.components(i).collect();
        let law = match (truth, marginals.link) {
            (Truth::Value(y), Link::Identity | Link::Log)
                if y.is_finite() && (y > 0.0 || marginals.link == Link::Identity) =>
            {
                Law::Mixture(Marginals {
                    components: parts.len(),
                    weight: parts.iter().map(|p| p.0).collect(),
                    mean: parts.iter().map(|p| p.1).collect(),
                    sd: parts.iter().map(|p| p.2).collect(),
                    ..*marginals
                })
            }
            (Truth::Count { positive, tested }, Link::Logit)
                if positive <= tested && tested > 0 =>
            {
                let counts = Counts::new(marginals, i, tested as f64)?;
                let (k, n) = (positive as f64, tested as f64);
                Law::Counts { counts, log_observed: log_probability(Link::Logit, &parts, k, n) }
            }
            (Truth::Cases { cases, exposure }, Link::Log)
                if exposure > 0.0 && exposure.is_finite() =>
            {
                let counts = Counts::new(marginals, i, exposure)?;
                let log = log_probability(Link::Log, &parts, cases as f64, exposure);
                Law::Counts { counts, log_observed: log }
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

    /// What was observed, outcome units: a value, the proportion positive, or the rate.
    pub fn observed(&self) -> f64 {
        match self.truth {
            Truth::Value(y) => y,
            Truth::Count { positive, tested } => positive as f64 / tested as f64,
            Truth::Cases { cases, exposure } => cases as f64 / exposure,
        }
    }

    /// Predictive mean of the observation, outcome units.
    pub fn mean(&self) -> f64 {
        match &self.law {
            Law::Mixture(m) => m.mean_sd(0).0,
            Law::Counts { counts, .. } => counts.mean() / counts.trials(),
        }
    }

    /// The `level` quantile of the observation, outcome units: for counts the smallest proportion
    /// or rate whose cumulative probability reaches `level`.
    pub fn quantile(&self, level: f64) -> f64 {
        match &self.law {
            Law::Mixture(m) => m.quantile(0, level),
            Law::Counts { counts, .. } => counts.quantile(level) / counts.trials(),
        }
    }

    /// The central interval that holds `level` of the predictive probability, outcome units.
    pub fn interval(&self, level: f64) -> (f64, f64) {
        (self.quantile(0.5 - 0.5 * level), self.quantile(0.5 + 0.5 * level))
    }
}
