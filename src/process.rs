//! The two verbs: condition a process on a context, then ask the posterior at targets.

use crate::{
    error::{Error, Result},
    predictive::{Draws, Predictive},
    rng::Stream,
    sites::{Observations, Sites},
};

/// A stochastic process we can condition: a neural process, or an exact Gaussian process.
pub trait Process {
    /// Absorbs the context once. The expensive half: self-attention, or a Cholesky factor.
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>>;
}

/// A process that has seen its context. Cheap to ask, tile after tile.
pub trait Posterior {
    /// The posterior predictive at `targets`, each target independent of the others asked for.
    fn at(&self, targets: &Sites) -> Result<Predictive>;

    /// `n` surfaces drawn jointly over `targets`, for processes that can: what areal means need.
    fn draws(&self, _targets: &Sites, _n: usize, _rng: &mut Stream) -> Result<Draws> {
        Err(Error::NoJointDraws)
    }
}
