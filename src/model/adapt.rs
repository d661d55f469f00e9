//! Networks that adapt to each task by gradient steps on its context, for MAML and CAVIA.
//!
//! The gradient of the inner loss is written out in tensor operations instead of asked of the
//! tape: what is written out can itself be differentiated, so that the outer gradient is of second
//! order, and no step of it depends on a setting of candle's.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    head::{Head, logistic, softplus},
    params::{Init, Scope},
};
use crate::{
    error::{Error, Result},
    likelihood::Likelihood,
    predictive::Predictive,
    process::{Memory, Objective, Posterior, Reward},
    sites::{Observations, Task},
};

/// What the inner steps, and the outer one with them, make small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// Minus the log density of a Gaussian observation.
    Likelihood,
    /// The squared error of the mean, as in the papers' regression of sine waves. The sds are then
    /// learned beside it, from the errors as they are.
    Squared,
}

/// The inner loop: how far, how fast, and along what.
#[derive(Debug, Clone, Copy)]
pub struct Inner {
    /// What is made small.
    pub loss: Loss,
    /// Gradient steps.
    pub steps: usize,
    /// Length of a step.
    pub rate: f64,
    /// Whether the outer gradient takes the inner gradients for constants.
    pub first_order: bool,
}

impl Inner {
    /// # Errors
    /// [`Error::Input`] for no steps, a rate that is not positive, or a head of many components.
    pub fn check(&self, head: &Head) -> Result<()> {
        head.check()?;
        if self.steps == 0 || !(self.rate > 0.0 && self.rate.is_finite()) {
            return Err(Error::input("adapting needs one step or more, and a positive rate")
                .fact("steps", self.steps)
                .fact("inner_rate", self.rate)
                .try_this("set steps = 1 and inner_rate = 0.1 under [model]"));
        }
        if head.components != 1 {
            return Err(Error::input("a network that adapts ends in one Gaussian")
                .fact("components", head.components)
                .try_this("set components = 1 under [model.head]"));
        }
        Ok(())
    }

    /// `start` after every step on the lesson of a context: as it is where there is none.
    pub fn descend<S>(
        &self,
        lesson: Option<Lesson>,
        start: S,
        step: impl Fn(S, &Lesson) -> Result<S>,
    ) -> Result<S> {
        let Some(lesson) = lesson else { return Ok(start) };
        (0..self.steps).try_fold(start, |state, _| step(state, &lesson))
    }

    /// A gradient as the outer one is to see it.
    pub fn seen(&self, gradient: Tensor) -> Tensor {
        if self.first_order { gradient.detach() } else { gradient }
    }

    /// The gradient of the inner loss, mean over observed sites, with respect to the outputs
    /// `[batch, site, outputs]` of the network; the same shape. `weight` `[batch, site, 1]` holds
    /// 1 / observed sites, and 0 where nothing was observed.
    pub fn slope(&self, head: &Head, raw: &Tensor, y: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean = raw.narrow(2, 0, 1)?;
        let error = (&mean - y)?;
        if self.loss == Loss::Squared {
            let rest = raw.narrow(2, 1, head.outputs() - 1)?.zeros_like()?;
            return Ok(Tensor::cat(&[(error * 2.0)?.mul(weight)?, rest], 2)?);
        }
        // −log density = ln σ + (μ − y)² / 2σ², σ² = surface² + nugget².
        let surface =
            ((softplus(&raw.narrow(2, 1, 1)?)? * (1.0 - head.floor))? + (head.floor + 1e-6))?;
        let nugget = if head.nugget { Some(softplus(&raw.narrow(2, 2, 1)?)?) } else { None };
        let variance = match &nugget {
            Some(nugget) => (surface.sqr()? + nugget.sqr()?)?,
            None => surface.sqr()?,
        };
        let precision = variance.recip()?;
        let along_mean = (&error * &precision)?;
        // d/dσ² = (1 − (μ − y)²/σ²) / 2σ²; dσ² = 2 surface d surface.
        let along_variance = ((&along_mean * &error)?.neg()? + 1.0)?.mul(&precision)?;
        let mut parts = vec![along_mean.mul(weight)?];
        let rises = |i: usize| logistic(&raw.narrow(2, i, 1)?);
        let d = ((&along_variance * &surface)?.mul(&rises(1)?)? * (1.0 - head.floor))?;
        parts.push(d.mul(weight)?);
        if let Some(nugget) = &nugget {
            parts.push((&along_variance * nugget)?.mul(&rises(2)?)?.mul(weight)?);
        }
        Ok(Tensor::cat(&parts, 2)?)
    }
}

/// The outer objective: nothing of its own where the likelihood is what counts. Otherwise the squared
/// error of the mean, and the log density of the truth about a mean that is held where it is.
pub fn outer(
    loss: Loss,
    posterior: &dyn Posterior,
    task: &Task,
    reward: Reward,
) -> Result<Option<Objective>> {
    if loss == Loss::Likelihood {
        return Ok(None);
    }
    let predictive = posterior.at(&task.target.sites)?;
    let squared = reward.sum(task, |_, truth| {
        let truth = truth.to_dtype(predictive.mean.dtype())?;
        Ok((&predictive.mean - truth)?.sqr()?.mean_all()?)
    })?;
    let held = Predictive { mean: predictive.mean.detach(), ..predictive };
    let density = reward.density(&held, task)?.mean_all()?;
    let measured = vec![(
        "squared-error",
        f64::from(squared.detach().to_dtype(DType::F32)?.to_scalar::<f32>()?),
    )];
    Ok(Some(Objective { loss: (squared - density)?, measured, surrogate: true }))
}

/// What a context offers to adapt to: sites, values, weights. The value of a count is its
/// empirical logit, the first of its features.
pub struct Lesson {
    /// Sites, 0 where nothing was observed: `[batch, site, dim]`.
    pub s: Tensor,
    /// Values, link scale, 0 likewise: `[batch, site, 1]`.
    pub y: Tensor,
    /// 1 / observed sites, 0 likewise: `[batch, site, 1]`.
    pub weight: Tensor,
}

impl Lesson {
    /// Of a context; nothing if it holds no sites at all.
    pub fn of(context: &Observations, likelihood: &dyn Likelihood) -> Result<Option<Self>> {
        if context.is_empty() {
            return Ok(None);
        }
        let mask = context.mask.unsqueeze(2)?;
        let seen = mask.ne(0.0)?;
        let clean = |x: &Tensor| seen.broadcast_as(x.shape())?.where_cond(x, &x.zeros_like()?);
        let value = likelihood.features(context)?.narrow(2, 0, 1)?.contiguous()?;
        let weight = mask.broadcast_div(&mask.sum_keepdim(1)?.maximum(1.0)?)?;
        Ok(Some(Lesson { s: clean(&context.sites.s)?, y: clean(&value)?, weight }))
    }
}

/// A small MLP with ReLU between its layers, whose weights may differ from task to task.
#[derive(Debug, Clone)]
pub struct Network {
    /// `[1 or batch, in, out]`, layer by layer.
    pub weights: Vec<Tensor>,
    /// `[1 or batch, 1, out]`
    pub biases: Vec<Tensor>,
}

/// Gradients of a [`Network`], in its shapes, and of what went in.
pub struct Gradients {
    /// Of weights, `[batch, in, out]`.
    pub weights: Vec<Tensor>,
    /// Of biases, `[batch, 1, out]`.
    pub biases: Vec<Tensor>,
    /// Of the input, `[batch, site, in]`.
    pub input: Tensor,
}

impl Network {
    /// Through `widths`, weights LeCun normal.
    pub fn new(scope: &mut Scope, widths: &[usize]) -> Result<Self> {
        let (mut weights, mut biases) = (vec![], vec![]);
        for (i, pair) in widths.windows(2).enumerate() {
            let mut scope = scope.at(&i.to_string());
            weights.push(scope.get("weight", &[pair[0], pair[1]], &Init::LeCun)?.unsqueeze(0)?);
            let bias = scope.get("bias", &[pair[1]], &Init::Constant(0.0))?;
            biases.push(bias.reshape((1, 1, pair[1]))?);
        }
        Ok(Network { weights, biases })
    }

    /// Features that the layers read and give, all together.
    fn features(&self) -> usize {
        self.weights.iter().map(|w| w.dims()[1] + w.dims()[2]).sum()
    }

    /// What adapting to `sites` takes, with weights of its own for a task or without.
    pub fn memory(&self, sites: usize, own: bool) -> Memory {
        let weights: usize = self.weights.iter().chain(&self.biases).map(Tensor::elem_count).sum();
        let held = if own { 4 * weights } else { 256 };
        let each = 4 * 2 * self.features();
        Memory { conditioning: sites * each + 4 * held, held, target: each + 64 }
    }

    /// `[batch, site, in]` → `[batch, site, out]`, and what went into each layer.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Vec<Tensor>)> {
        let (mut x, mut inputs) = (x.clone(), vec![]);
        for (i, (weight, bias)) in self.weights.iter().zip(&self.biases).enumerate() {
            if i > 0 {
                x = x.relu()?;
            }
            inputs.push(x.clone());
            x = x.broadcast_matmul(weight)?.broadcast_add(bias)?;
        }
        Ok((x, inputs))
    }

    /// Gradients from that of the output, `[batch, site, out]`.
    pub fn backward(&self, inputs: &[Tensor], slope: &Tensor) -> Result<Gradients> {
        let (mut weights, mut biases) = (vec![], vec![]);
        let mut d = slope.clone();
        for (i, (input, weight)) in inputs.iter().zip(&self.weights).enumerate().rev() {
            weights.push(input.transpose(1, 2)?.matmul(&d)?);
            biases.push(d.sum_keepdim(1)?);
            d = d.broadcast_matmul(&weight.transpose(1, 2)?)?;
            if i > 0 {
                // An input is what ReLU gave: it let through what is positive.
                d = (d * input.gt(0.0)?.to_dtype(slope.dtype())?)?;
            }
        }
        weights.reverse();
        biases.reverse();
        Ok(Gradients { weights, biases, input: d })
    }
}
