//! Gaussian observations: value = surface + nugget, on the outcome's own scale.

use candle_core::Tensor;

use super::Likelihood;
use crate::{error::Result, predictive::Link, sites::Observations};

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
    fn counts(&self) -> bool {
        false
    }
    fn width(&self) -> usize {
        1
    }
    fn features(&self, observations: &Observations) -> Result<Tensor> {
        Ok(observations.y.clone())
    }
}
