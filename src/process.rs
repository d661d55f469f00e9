//! The two verbs: condition a process on a context, then ask the posterior at targets.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    predictive::{Draws, Of, Predictive},
    rng::Stream,
    sites::{Observations, Sites, Task},
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

    /// Whether it asks nothing of places but how far apart they are, so that they may have any number of
    /// coordinates.
    fn any_dimension(&self) -> bool {
        false
    }

    /// What training minimises on a batch of tasks, for processes that learn otherwise than by the
    /// mean log density at each target alone: those with latent variables, joint densities,
    /// penalties or inner loops. Nothing for all others.
    fn objective(
        &self,
        _task: &Task,
        _reward: Reward,
        _rng: &mut Stream,
    ) -> Result<Option<Objective>> {
        Ok(None)
    }
}

/// A process that several owners hold.
impl Process for std::sync::Arc<dyn Process + Send + Sync> {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        (**self).condition(context)
    }
    fn memory(&self, sites: usize) -> Memory {
        (**self).memory(sites)
    }
    fn any_dimension(&self) -> bool {
        (**self).any_dimension()
    }
    fn objective(
        &self,
        task: &Task,
        reward: Reward,
        rng: &mut Stream,
    ) -> Result<Option<Objective>> {
        (**self).objective(task, reward, rng)
    }
}

/// What of a task a network is rewarded for foretelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reward {
    /// The true surface, and the true noisy value, link scale.
    Both,
    /// The true surface alone: the published benchmarks of TNP-KR.
    Surface,
    /// The true noisy value alone: the published benchmarks of the family.
    Observation,
    /// What was counted, with no truth to be told: for heads that end in a law of counts.
    Outcome,
}

impl Reward {
    /// What is foretold, with the truth `[batch, target, 1]`, link scale.
    ///
    /// # Errors
    /// [`Error::Input`] for outcomes, which are counted and no truths.
    fn truths(self, task: &Task) -> Result<Vec<(Of, &Tensor)>> {
        let (surface, noisy) = ((Of::Surface, &task.surface), (Of::Observation, &task.noisy));
        match self {
            Reward::Both => Ok(vec![surface, noisy]),
            Reward::Surface => Ok(vec![surface]),
            Reward::Observation => Ok(vec![noisy]),
            Reward::Outcome => {
                Err(Error::input("this model learns from surfaces, not from counts")
                    .try_this("use loss = \"both\" under [train]"))
            }
        }
    }

    /// Log density of the truth at each target, summed over what is foretold: `[batch, target]`.
    ///
    /// # Errors
    /// [`Error::Input`] for [`Reward::Outcome`] of a predictive without a law of outcomes.
    pub fn density(self, predictive: &Predictive, task: &Task) -> Result<Tensor> {
        if self == Reward::Outcome {
            let Some(law) = &predictive.law else {
                return Err(Error::input("this model has no law of counts to be rewarded for")
                    .try_this(
                        "set family = \"beta-binomial\" under [model.head], or another loss",
                    ));
            };
            return law.log_prob(&task.target);
        }
        self.sum(task, |of, truth| predictive.log_prob(of, truth))
    }

    /// The sum of `each` over what is foretold and its truth `[batch, target, 1]`, link scale.
    ///
    /// # Errors
    /// [`Error::Input`] for outcomes, which are counted and no truths; or what `each` returns.
    pub fn sum(
        self,
        task: &Task,
        mut each: impl FnMut(Of, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut total: Option<Tensor> = None;
        for (of, truth) in self.truths(task)? {
            let one = each(of, truth)?;
            total = Some(match total {
                Some(before) => (before + one)?,
                None => one,
            });
        }
        Ok(total.expect("something is always foretold"))
    }
}

/// What a training step minimises.
#[derive(Debug)]
pub struct Objective {
    /// A scalar that carries gradients, nats per target.
    pub loss: Tensor,
    /// What else is worth a line in the journal, such as a divergence or an effective sample size.
    pub measured: Vec<(&'static str, f64)>,
    /// Whether the gradient is meant to be another than the loss's own, as where draws and weights
    /// that hang on the parameters are held fixed.
    pub surrogate: bool,
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

    /// Joint log density of `values` `[batch, target, 1]` (link scale) over all `targets`:
    /// `[batch]`. Nothing for processes that know each target only alone.
    fn joint(&self, _targets: &Sites, _of: Of, _values: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// What the posterior is made from, one row per task: `[batch, width]`. Where every number is
    /// positive, they are weights of a whole, up to a factor. Nothing for processes that do not sum
    /// up a context in few numbers.
    fn embedding(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// `n` surfaces drawn jointly over `targets`, for processes that can: what areal means need.
    fn draws(&self, _targets: &Sites, _n: usize, _rng: &mut Stream) -> Result<Draws> {
        Err(Error::NoJointDraws)
    }

    /// `draws` surfaces that can be asked anywhere, tile after tile: joint draws over more targets
    /// than any matrix of them would fit. `extent` is the longest distance between places that will
    /// be asked, model units.
    ///
    /// # Errors
    /// [`Error::NoJointDraws`] for processes that know each target only alone; [`Error::Axis`] for a
    /// context of several rows.
    fn field(&self, _draws: usize, _seed: u64, _extent: f64) -> Result<Box<dyn Field + '_>> {
        Err(Error::NoJointDraws)
    }
}

/// Surfaces that were drawn jointly, once and for all: what one is at a place hangs on that place
/// alone, and never on what is asked with it.
pub trait Field: Send + Sync {
    /// How many surfaces.
    fn draws(&self) -> usize;

    /// All of them at one row of `targets`.
    fn at(&self, targets: &Sites) -> Result<Drawn>;

    /// Root mean square error of the prior draws' correlation, which waves make: no unit.
    fn error(&self) -> f64;
}

/// Surfaces at some targets, link scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Posterior mean at each target.
    pub mean: Vec<f64>,
    /// Posterior sd at each target, > 0.
    pub sd: Vec<f64>,
    /// Each surface less the mean, `[target, draw]`: target `i` owns `i·draws … (i+1)·draws`.
    pub deviations: Vec<f32>,
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
