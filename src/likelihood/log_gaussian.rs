//! Values above 0 whose logarithm is Gaussian: densities, concentrations, titres.

use candle_core::Tensor;

use super::{Kind, Likelihood};
use crate::{error::Result, predictive::Link, rng::Stream, sites::Observations};

/// ln value = surface + nugget. Networks and Gaussian processes read the logarithm.
pub struct LogGaussian;

impl Likelihood for LogGaussian {
    fn name(&self) -> &'static str {
        "log-gaussian"
    }
    fn about(&self) -> &'static str {
        "value above 0, its logarithm = surface + Gaussian nugget"
    }
    fn link(&self) -> Link {
        Link::Log
    }
    fn kind(&self) -> Kind {
        Kind::Positive
    }
    fn width(&self) -> usize {
        1
    }
    fn features(&self, observations: &Observations) -> Result<Tensor> {
        Ok(observations.y.clone())
    }
    fn observe(&self, eta: f64, _: f64, _: &mut Stream) -> f64 {
        eta.exp()
    }
}
