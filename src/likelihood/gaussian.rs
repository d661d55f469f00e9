//! Gaussian observations: value = surface + nugget, on the outcome's own scale.

use candle_core::Tensor;

use super::{Kind, Likelihood};
use crate::{error::Result, predictive::Link, rng::Stream, sites::Observations};

/// Continuous values with Gaussian noise.
pub struct Gaussian;

impl Likelihood for Gaussian {
    fn name(&self) -> &'static str {
        "gaussian"
    }
    fn about(&self) -> &'static str {
        "continuous value = surface + Gaussian nugget"
    }
    fn link(&self) -> Link {
        Link::Identity
    }
    fn kind(&self) -> Kind {
        Kind::Value
    }
    fn width(&self) -> usize {
        1
    }
    fn features(&self, observations: &Observations) -> Result<Tensor> {
        Ok(observations.y.clone())
    }
    fn observe(&self, eta: f64, _: f64, _: &mut Stream) -> f64 {
        eta
    }
}
