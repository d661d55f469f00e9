//! How an observation reads the surface, and how it becomes a token. Registry: [`LIKELIHOODS`].

use candle_core::Tensor;

use crate::{
    error::Result,
    predictive::Link,
    registry::{self, Named},
    sites::Observations,
};

pub mod binomial;
pub mod gaussian;

/// How observations arise from the surface.
pub trait Likelihood: Sync {
    /// The name in recipes: "binomial".
    fn name(&self) -> &'static str;
    /// One line on what it is.
    fn about(&self) -> &'static str;
    /// Link between the surface's scale and the outcome.
    fn link(&self) -> Link;
    /// Whether observations are counts out of `trials`.
    fn counts(&self) -> bool;
    /// Features per observation in a token.
    fn width(&self) -> usize;
    /// What a network reads of each observation: `[batch, site, width]`.
    fn features(&self, observations: &Observations) -> Result<Tensor>;
}

/// Every likelihood.
pub const LIKELIHOODS: &[&dyn Likelihood] = &[&binomial::Binomial, &gaussian::Gaussian];

impl Named for &dyn Likelihood {
    fn name(&self) -> &str {
        Likelihood::name(*self)
    }
    fn about(&self) -> &str {
        Likelihood::about(*self)
    }
}

/// The likelihood called `name`.
pub fn find(name: &str) -> Result<&'static dyn Likelihood> {
    Ok(*registry::find("likelihood", LIKELIHOODS, name)?)
}
