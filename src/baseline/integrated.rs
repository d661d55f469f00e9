//! Exact Gaussian processes whose kernel is not known: integrated over what it may be.
//!
//! Over a prior: kernels are drawn from it, and each counts by how likely it makes the context (importance
//! sampling, MacKay 2003 §29.2):
//!
//! ```text
//! p(y* | data) = Σ over kernels w p(y* | data, kernel),   w ∝ p(data | kernel)
//! ```
//!
//! No model that is not told the kernel can foretell better on average: this is the ceiling of
//! every network trained on that prior, where the process that is told the kernel lies above it.
//!
//! Over what a survey leaves open, where there is no prior but a belief: a few kernels about the most likely
//! one, weighted once ([`IntegratedGp::fit`]).

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::{ExactGp, exact_gp::MadeOf, likely::Search};
use crate::{
    error::{Error, Result},
    likelihood::Likelihood,
    predictive::{Draws, Of, Predictive, log_sum_exp},
    prior::Prior,
    process::{Drawn, Field, Memory, Posterior, Process},
    rng::Stream,
    sites::{Observations, Sites},
};

/// Share of the posterior that kernels left out may have, together.
const NEGLIGIBLE: f64 = 1e-6;

/// Sites up to which [`IntegratedGp::fit`] looks about the most likely kernel: each costs as much as one, and
/// the more sites there are, the less they leave open.
pub const OPEN_SITES: usize = 500;

/// A Gaussian process of several kernels.
pub struct IntegratedGp {
    gps: Vec<ExactGp>,
    /// Log weight of each; nothing where any context says anew what they weigh.
    log_weight: Option<Vec<f64>>,
}

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
        let gps = (0..draws).map(member).collect::<Result<_>>()?;
        Ok(IntegratedGp { gps, log_weight: None })
    }

    /// The most likely process, as [`ExactGp::fit`] finds it, and up to two about it for every parameter of its
    /// kernel: together they stand for what the context leaves open of them. Above [`OPEN_SITES`] sites it
    /// is the most likely alone.
    ///
    /// # Shapes
    /// `context` has one row.
    /// # Errors
    /// As [`ExactGp::fit`].
    pub fn fit(context: &Observations, likelihood: &'static dyn Likelihood) -> Result<Self> {
        Self::fit_as(context, likelihood, &|kernel| Ok(Box::new(kernel)))
    }

    /// As [`IntegratedGp::fit`], of a kernel that `of` makes of each Matérn kernel tried.
    ///
    /// # Errors
    /// As [`ExactGp::fit`].
    pub fn fit_as(
        context: &Observations,
        likelihood: &'static dyn Likelihood,
        of: MadeOf,
    ) -> Result<Self> {
        let search = Search::new(context, likelihood, of)?;
        let (log_weight, gps) = match context.len() <= OPEN_SITES {
            true => search.all()?.into_iter().unzip(),
            false => (vec![0.0], vec![search.best()?]),
        };
        Ok(IntegratedGp { gps, log_weight: Some(log_weight) })
    }

    /// The most likely of those that were fitted.
    pub fn likeliest(&self) -> &ExactGp {
        &self.gps[0]
    }

    /// How many kernels there are.
    pub fn len(&self) -> usize {
        self.gps.len()
    }

    /// None at all, which there never are.
    pub fn is_empty(&self) -> bool {
        self.gps.is_empty()
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
        if let Some(fixed) = &self.log_weight {
            return Ok(vec![fixed.clone(); context.sites.batch()]);
        }
        let evidence: Vec<Vec<f64>> =
            self.gps.par_iter().map(|gp| gp.log_marginals(context)).collect::<Result<_>>()?;
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
    fn any_dimension(&self) -> bool {
        true
    }

    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let weights = self.weights(context)?;
        let least = (NEGLIGIBLE / self.gps.len() as f64).ln();
        let counts = |k: &usize| weights.iter().any(|row| row[*k] > least);
        let kept: Vec<usize> = (0..self.gps.len()).filter(counts).collect();
        let members = kept.par_iter().map(|k| self.gps[*k].condition(context));
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
        let one = self.gps[0].memory(sites);
        let all = self.gps.len();
        Memory {
            conditioning: one.conditioning + all * one.held,
            held: all * one.held,
            target: all * one.target,
        }
    }
}

impl Conditioned<'_> {
    /// Log weight of each member, for a context of one row.
    fn one_row(&self) -> Result<&[f64]> {
        let [weight] = &self.log_weight[..] else {
            let rows = self.log_weight.len();
            return Err(Error::axis("rows of the context to draw surfaces of", rows, 1));
        };
        Ok(weight)
    }

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
        let counts = shares(self.one_row()?, n, rng);
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

    /// As [`Posterior::draws`], each kernel's of its own field.
    fn field(&self, draws: usize, seed: u64, extent: f64) -> Result<Box<dyn Field + '_>> {
        let weight = self.one_row()?;
        let mut rng = Stream::new(seed, "kernels of a field", 0);
        let counts = shares(weight, draws, &mut rng);
        let mut members = Vec::new();
        for (k, (member, count)) in self.members.iter().zip(&counts).enumerate() {
            // Draws of two kernels must not be one another's.
            let seed = seed ^ (k as u64) << 48;
            if *count > 0 {
                members.push((weight[k].exp(), member.field(*count, seed, extent)?));
            }
        }
        if members.is_empty() {
            return Err(Error::input("no surface is asked for").try_this("ask for 100 draws, say"));
        }
        Ok(Box::new(Mixed { members, order: rng.permutation(draws) }))
    }
}

/// How many of `n` draws each kernel has: as many as its weight says, but for a fraction of one that
/// chance decides.
fn shares(log_weight: &[f64], n: usize, rng: &mut Stream) -> Vec<usize> {
    let (mut sum, mut dealt, start) = (0.0, 0, rng.unit());
    let last = log_weight.len().saturating_sub(1);
    let share = |(k, log): (usize, &f64)| {
        sum += log.exp();
        let up_to = if k == last { n } else { ((n as f64 * sum + start) as usize).min(n) };
        let own = up_to - dealt;
        dealt = up_to;
        own
    };
    log_weight.iter().enumerate().map(share).collect()
}

/// Surfaces of several kernels.
struct Mixed<'a> {
    /// Weight of each, and its surfaces.
    members: Vec<(f64, Box<dyn Field + 'a>)>,
    /// Where each surface stands among all, one kernel's after another's.
    order: Vec<usize>,
}

impl Field for Mixed<'_> {
    fn draws(&self) -> usize {
        self.order.len()
    }

    /// Deviations are from the mean over all kernels.
    fn at(&self, targets: &Sites) -> Result<Drawn> {
        let parts: Vec<(f64, Drawn)> = self
            .members
            .iter()
            .map(|(weight, field)| Ok((*weight, field.at(targets)?)))
            .collect::<Result<_>>()?;
        let (n, draws) = (targets.len(), self.order.len());
        let total: f64 = parts.iter().map(|(weight, _)| weight).sum();
        let over = |of: &dyn Fn(&Drawn) -> f64| -> f64 {
            parts.iter().map(|(weight, part)| weight / total * of(part)).sum()
        };
        let mean: Vec<f64> = (0..n).map(|i| over(&|part| part.mean[i])).collect();
        let spread = |i: usize| over(&|p| p.sd[i].powi(2) + (p.mean[i] - mean[i]).powi(2)).sqrt();
        let sd = (0..n).map(spread).collect();
        let mut deviations = vec![0f32; n * draws];
        let mut first = 0;
        for (_, part) in &parts {
            let own = part.deviations.len() / n.max(1);
            let order = &self.order[first..first + own];
            let rows = deviations.chunks_exact_mut(draws).zip(part.deviations.chunks_exact(own));
            for (i, (all, own)) in rows.enumerate() {
                let off = (part.mean[i] - mean[i]) as f32;
                order.iter().zip(own).for_each(|(to, own)| all[*to] = own + off);
            }
            first += own;
        }
        Ok(Drawn { mean, sd, deviations })
    }

    /// The worst of them.
    fn error(&self) -> f64 {
        self.members.iter().map(|(_, field)| field.error()).fold(0.0, f64::max)
    }
}
