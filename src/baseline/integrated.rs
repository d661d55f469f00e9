//! Exact Gaussian processes whose kernel is not known: integrated over a prior.
//!
//! Kernels are drawn from the prior, and each counts by how likely it makes the context (importance
//! sampling, MacKay 2003 §29.2):
//!
//! ```text
//! p(y* | data) = Σ over kernels w p(y* | data, kernel),   w ∝ p(data | kernel)
//! ```
//!
//! No model that is not told the kernel can foretell better on average: this is the ceiling of
//! every network trained on that prior, where the process that is told the kernel lies above it.

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::ExactGp;
use crate::{
    error::{Error, Result},
    likelihood::Likelihood,
    predictive::{Draws, Of, Predictive, log_sum_exp},
    prior::Prior,
    process::{Memory, Posterior, Process},
    rng::Stream,
    sites::{Observations, Sites},
};

/// Share of the posterior that kernels left out may have, together.
const NEGLIGIBLE: f64 = 1e-6;

/// A Gaussian process with as many kernels as were drawn.
pub struct IntegratedGp(Vec<ExactGp>);

struct Conditioned<'a> {
    /// Posteriors of the kernels that count in at least one row.
    members: Vec<Box<dyn Posterior + 'a>>,
    /// Log weight of each `[batch][member]`, normalised over members.
    log_weight: Vec<Vec<f64>>,
}

impl IntegratedGp {
    /// Integrates over `draws` kernels, nuggets and means from `prior`, which `rng` draws.
    ///
    /// # Errors
    /// [`Error::Input`] for no draws, and for a prior whose surfaces no Gaussian process rules.
    pub fn over(
        prior: &dyn Prior,
        draws: usize,
        likelihood: &'static dyn Likelihood,
        rng: &mut Stream,
    ) -> Result<Self> {
        if draws == 0 {
            return Err(Error::input("a prior is integrated over some draws, not over none")
                .try_this("ask for 500 draws or more"));
        }
        let member = |_| {
            let rule = prior.rule(rng);
            ExactGp::new(Box::new(rule.known_kernel()?), rule.nugget, rule.mean, likelihood)
        };
        Ok(IntegratedGp((0..draws).map(member).collect::<Result<_>>()?))
    }

    /// How many of the kernels drawn count, by row of `context`: 1 / Σ w². A few are enough for a
    /// prediction, for those that count are much alike; near 1, draw more.
    ///
    /// # Errors
    /// As [`Process::condition`].
    pub fn effective(&self, context: &Observations) -> Result<Vec<f64>> {
        let weights = self.weights(context)?;
        let count = |row: &Vec<f64>| 1.0 / row.iter().map(|w| (2.0 * w).exp()).sum::<f64>();
        Ok(weights.iter().map(count).collect())
    }

    /// Log weights `[batch][kernel]`, normalised over kernels.
    fn weights(&self, context: &Observations) -> Result<Vec<Vec<f64>>> {
        let evidence: Vec<Vec<f64>> =
            self.0.par_iter().map(|gp| gp.log_marginals(context)).collect::<Result<_>>()?;
        let rows = evidence.first().map_or(0, Vec::len);
        Ok((0..rows).map(|row| normalised(evidence.iter().map(|e| e[row]).collect())).collect())
    }
}

/// Log weights less the log of their sum.
fn normalised(mut log: Vec<f64>) -> Vec<f64> {
    let total = log_sum_exp(&log);
    log.iter_mut().for_each(|l| *l -= total);
    log
}

impl Process for IntegratedGp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let weights = self.weights(context)?;
        let least = (NEGLIGIBLE / self.0.len() as f64).ln();
        let counts = |k: &usize| weights.iter().any(|row| row[*k] > least);
        let kept: Vec<usize> = (0..self.0.len()).filter(counts).collect();
        let members = kept.par_iter().map(|k| self.0[*k].condition(context));
        Ok(Box::new(Conditioned {
            members: members.collect::<Result<_>>()?,
            log_weight: weights
                .iter()
                .map(|row| normalised(kept.iter().map(|k| row[*k]).collect()))
                .collect(),
        }))
    }

    /// As if every kernel counted.
    fn memory(&self, sites: usize) -> Memory {
        let one = self.0[0].memory(sites);
        let all = self.0.len();
        Memory {
            conditioning: one.conditioning + all * one.held,
            held: all * one.held,
            target: all * one.target,
        }
    }
}

impl Conditioned<'_> {
    /// `[batch, 1, member]`.
    fn log_weight(&self, like: &Tensor) -> Result<Tensor> {
        let shape = (self.log_weight.len(), 1, self.members.len());
        Ok(Tensor::from_vec(self.log_weight.concat(), shape, like.device())?
            .to_dtype(like.dtype())?)
    }
}

impl Posterior for Conditioned<'_> {
    /// A mixture with one component for each kernel that counts.
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let parts: Vec<Predictive> =
            self.members.iter().map(|m| m.at(targets)).collect::<Result<_>>()?;
        let [first, ..] = &parts[..] else {
            return Err(Error::input("the context has no finite likelihood under any kernel"));
        };
        let join = |of: fn(&Predictive) -> &Tensor| {
            Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), D::Minus1)
        };
        let mean = join(|p| &p.mean)?;
        let log_weight = self.log_weight(&mean)?.broadcast_as(mean.shape())?.contiguous()?;
        Ok(Predictive {
            log_weight,
            surface_sd: join(|p| &p.surface_sd)?,
            observation_sd: join(|p| &p.observation_sd)?,
            mean,
            ..first.clone()
        })
    }

    fn joint(&self, targets: &Sites, of: Of, values: &Tensor) -> Result<Option<Tensor>> {
        let each: Option<Vec<Tensor>> =
            self.members.iter().map(|m| m.joint(targets, of, values)).collect::<Result<_>>()?;
        let Some(each) = each.filter(|each| !each.is_empty()) else { return Ok(None) };
        let each = Tensor::stack(&each, 1)?.to_dtype(DType::F64)?; // [batch, member]
        let weight = self.log_weight(&each)?.squeeze(1)?;
        Ok(Some((each + weight)?.log_sum_exp(D::Minus1)?))
    }

    /// Each surface under a kernel drawn by its weight, in an order that tells nothing.
    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        let [weight] = &self.log_weight[..] else {
            return Err(Error::axis("rows of targets to draw surfaces over", targets.batch(), 1));
        };
        let mut counts = vec![0; weight.len()];
        for _ in 0..n {
            let mut left = rng.unit();
            let chosen = weight.iter().position(|w| {
                left -= w.exp();
                left < 0.0
            });
            counts[chosen.unwrap_or(weight.len() - 1)] += 1;
        }
        let mut parts = Vec::new();
        for (member, count) in self.members.iter().zip(&counts).filter(|(_, n)| **n > 0) {
            parts.push(member.draws(targets, *count, rng)?);
        }
        let Some(first) = parts.first() else {
            return Err(Error::input("no draws were asked for").try_this("ask for one at least"));
        };
        let link = first.link;
        let values = Tensor::cat(&parts.iter().map(|p| &p.values).collect::<Vec<_>>(), 0)?;
        let order: Vec<u32> = rng.permutation(n).into_iter().map(|i| i as u32).collect();
        let order = Tensor::from_vec(order, n, values.device())?;
        Ok(Draws { link, values: values.index_select(&order, 0)? })
    }
}
