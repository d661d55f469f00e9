//! Log score: log predictive density of the observed value, or probability of the observed count.
//!
//! Source: Good (1952); Gneiting & Raftery (2007), section 4.1. Higher is better.

use super::{Better, Score, Truth, forecast::Law};
use crate::predictive::Link;

/// Registered as "log-score".
pub const SCORE: Score = Score {
    name: "log-score",
    about: "log predictive density of the observation, nats (Good 1952)",
    better: Better::Higher,
    each: |forecast| match (&forecast.law, forecast.truth) {
        (Law::Counts { log_observed, .. }, _) => *log_observed,
        // The density of a value whose logarithm is Gaussian is 1/y of the logarithm's.
        (Law::Mixture(m), Truth::Value(y)) if m.link == Link::Log => {
            m.link_log_density(0, y.ln()) - y.ln()
        }
        (Law::Mixture(m), Truth::Value(y)) => m.link_log_density(0, y),
        (Law::Mixture(_), _) => unreachable!("Forecast::new pairs law and truth"),
    },
    total: |mean| mean,
};
