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

    /// What conditioning on one row of `sites` sites will take, to be known before it is tried.
    ///
    /// Without a better answer, a guess on the high side for networks of a usual size.
    fn memory(&self, sites: usize) -> Memory {
        Memory { conditioning: sites << 15, held: sites << 14, target: 1 << 15 }
    }
}

/// A process that has seen its context. Cheap to ask, tile after tile, by several threads at once.
pub trait Posterior: Send + Sync {
    /// The posterior predictive at `targets`, each target independent of the others asked for.
    fn at(&self, targets: &Sites) -> Result<Predictive>;

    /// How much of the context was read so far, of how much there is: pairs of query and key. Nothing
    /// for posteriors that always read all of it.
    fn tally(&self) -> Option<[u64; 2]> {
        None
    }

    /// `n` surfaces drawn jointly over `targets`, for processes that can: what areal means need.
    fn draws(&self, _targets: &Sites, _n: usize, _rng: &mut Stream) -> Result<Draws> {
        Err(Error::NoJointDraws)
    }
}

/// Memory that a process takes beside its weights, bytes: upper bounds, not measurements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// The most at any time while it is conditioned, what is then held included.
    pub conditioning: usize,
    /// What its posterior holds.
    pub held: usize,
    /// What each target adds while the posterior is asked about it.
    pub target: usize,
}
