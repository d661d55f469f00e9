//! Yes or no, one person a row, probability on the logit scale.

use candle_core::Tensor;

use super::{Kind, Likelihood, binomial};
use crate::{error::Result, predictive::Link, rng::Stream, sites::Observations};

/// `positive ~ Bernoulli(logistic(surface + nugget))`, `trials` being 1 everywhere.
pub struct Bernoulli;

impl Likelihood for Bernoulli {
    fn name(&self) -> &'static str {
        "bernoulli"
    }
    fn about(&self) -> &'static str {
        "0 or 1, one person a row, logit link"
    }
    fn link(&self) -> Link {
        Link::Logit
    }
    fn kind(&self) -> Kind {
        Kind::Single
    }
    fn width(&self) -> usize {
        1
    }
    /// −1 or 1.
    fn features(&self, observations: &Observations) -> Result<Tensor> {
        Ok(((&observations.y * 2.0)? - 1.0)?)
    }
    fn observe(&self, eta: f64, _: f64, rng: &mut Stream) -> f64 {
        binomial::observe(eta, 1.0, rng)
    }
    fn log_probability(&self, y: f64, _: f64, eta: f64, _: f64) -> Option<[f64; 3]> {
        Some(binomial::log_probability(y, 1.0, eta))
    }
}
