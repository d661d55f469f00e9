//! Poisson counts: cases in a population or over person-time, rate on the log scale.

use candle_core::Tensor;

use super::{Kind, Likelihood, counted, poisson_log_pmf};
use crate::{error::Result, predictive::Link, rng::Stream, sites::Observations};

/// `cases ~ Poisson(exposure · exp(surface + nugget))`, with ln exposure as the offset.
///
/// A frame multiplies the exposure by the overall rate, so that a network reads expected cases, and
/// its surface is the log of a relative rate: nothing depends on the unit of the exposure.
pub struct Poisson;

/// Most cases that are drawn for a site: what f32 still counts one by one.
const MOST: f64 = 16_777_216.0;

/// Empirical log rate ln((k + ½)/(E + ½)) and ln(E + ½)/3, for E cases expected.
pub(super) fn features(observations: &Observations) -> Result<Tensor> {
    let [k, expected] = counted(
        observations,
        "a model of rates needs the population or the person-time at every site",
        "give --population COLUMN or --person-time COLUMN",
    )?;
    let size = (expected + 0.5)?.log()?;
    let rate = ((k + 0.5)?.log()? - &size)?;
    Ok(Tensor::cat(&[rate, (size / 3.0)?], 2)?)
}

/// One Poisson count.
pub(super) fn observe(eta: f64, exposure: f64, rng: &mut Stream) -> f64 {
    rng.poisson((exposure * eta.exp()).min(MOST)).min(MOST)
}

impl Likelihood for Poisson {
    fn name(&self) -> &'static str {
        "poisson"
    }
    fn about(&self) -> &'static str {
        "cases in a population or person-time (offset), log link, nugget"
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
        features(observations)
    }
    fn observe(&self, eta: f64, trials: f64, rng: &mut Stream) -> f64 {
        observe(eta, trials, rng)
    }
    /// With the derivatives k − μ and −μ, for the mean μ.
    fn log_probability(&self, y: f64, trials: f64, eta: f64, _: f64) -> Option<[f64; 3]> {
        let mean = trials * eta.exp();
        Some([poisson_log_pmf(y, trials, eta), y - mean, -mean])
    }
}
