//! Binomial counts: positive out of tested, probability on the logit scale, with a village effect.

use candle_core::Tensor;

use super::{Kind, Likelihood, binomial_log_pmf, counted};
use crate::{error::Result, predictive::Link, rng::Stream, sites::Observations};

/// `positive ~ Binomial(tested, logistic(surface + village effect))`.
pub struct Binomial;

/// Empirical logit ln((k + ½)/(n − k + ½)) and ln(n)/3 − 1.
pub(super) fn features(observations: &Observations) -> Result<Tensor> {
    let [k, n] = counted(
        observations,
        "a binomial model needs the number tested at every site",
        "give --tested COLUMN, or use a continuous model with --value COLUMN",
    )?;
    let logit = ((&k + 0.5)?.log()? - ((&n - &k)? + 0.5)?.log()?)?;
    // Padded sites may carry zero trials: keep the logarithm finite there.
    let size = ((n.maximum(1.0)?.log()? / 3.0)? - 1.0)?;
    Ok(Tensor::cat(&[logit, size], 2)?)
}

/// One binomial count.
pub(super) fn observe(eta: f64, trials: f64, rng: &mut Stream) -> f64 {
    rng.binomial(trials as u64, Link::Logit.outcome(eta)) as f64
}

/// Log probability with its derivatives k − np and −np(1 − p).
pub(super) fn log_probability(k: f64, n: f64, eta: f64) -> [f64; 3] {
    let p = Link::Logit.outcome(eta);
    [binomial_log_pmf(k, n, eta), k - n * p, -n * p * (1.0 - p)]
}

impl Likelihood for Binomial {
    fn name(&self) -> &'static str {
        "binomial"
    }
    fn about(&self) -> &'static str {
        "positive of tested, logit link, village effect as nugget"
    }
    fn link(&self) -> Link {
        Link::Logit
    }
    fn kind(&self) -> Kind {
        Kind::Tested
    }
    fn width(&self) -> usize {
        2
    }
    fn features(&self, observations: &Observations) -> Result<Tensor> {
        features(observations)
    }
    fn observe(&self, eta: f64, trials: f64, rng: &mut Stream) -> f64 {
        observe(eta, trials, rng)
    }
    fn log_probability(&self, y: f64, trials: f64, eta: f64, _: f64) -> Option<[f64; 3]> {
        Some(log_probability(y, trials, eta))
    }
}
