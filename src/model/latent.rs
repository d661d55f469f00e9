//! A latent variable that all targets share: its law, what training makes of it, and the mixture
//! over its draws.
//!
//! Sources: Garnelo et al. (2018), arXiv:1807.01622 (evidence lower bound); Burda et al. (2016),
//! arXiv:1509.00519, as Lee et al. (2020), arXiv:2008.02956, train NP and ANP (importance-weighted
//! bound); Foong et al. (2020), arXiv:2007.01332 (maximum likelihood).

use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};

use super::head::logistic;
use crate::{
    error::{Error, Result},
    predictive::Predictive,
    process::Objective,
    rng::Stream,
    sites::Task,
};

/// What training maximises, per target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// `E ln p(y | z) − KL(q(z | C ∪ T) ‖ q(z | C))`, z from q(z | C ∪ T).
    Elbo,
    /// `ln mean p(y | zₖ) q(zₖ | C) / q(zₖ | C ∪ T)`, z from q(z | C ∪ T).
    Importance,
    /// `ln mean p(y | zₖ)`, z from q(z | C).
    MaximumLikelihood,
}

/// The `latent` table of a model; the defaults train as BNP and TNP do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Numbers in z.
    pub width: usize,
    /// What training maximises.
    pub objective: Bound,
    /// Draws of z for each task in training.
    pub samples: usize,
    /// Draws of z that a posterior is a mixture over.
    pub ask: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { width: 128, objective: Bound::Importance, samples: 4, ask: 32 }
    }
}

impl Settings {
    /// # Errors
    /// [`Error::Input`] for a size that is 0.
    pub fn check(&self) -> Result<()> {
        if [self.width, self.samples, self.ask].contains(&0) {
            return Err(Error::input("a size under [model.latent] is 0")
                .try_this("width, samples and ask must be ≥ 1"));
        }
        Ok(())
    }
}

/// Independent normals.
#[derive(Debug, Clone)]
pub struct Normal {
    /// `[batch, n, width]`.
    pub mean: Tensor,
    /// `[batch, n, width]`, > 0.
    pub sd: Tensor,
}

impl Normal {
    /// From raw means and sds side by side, `[batch, n, 2 · width]`: `sd = 0.1 + 0.9 sigmoid(raw)`.
    /// The floor keeps draws apart.
    pub fn from_raw(raw: &Tensor) -> Result<Self> {
        let width = raw.dim(2)? / 2;
        // The sigmoid by way of tanh: no overflow, in either direction.
        let sigmoid = logistic(&raw.narrow(2, width, width)?)?;
        Ok(Normal { mean: raw.narrow(2, 0, width)?.contiguous()?, sd: ((sigmoid * 0.9)? + 0.1)? })
    }

    /// `mean + sd · noise`, shapes that broadcast.
    pub fn at(&self, noise: &Tensor) -> Result<Tensor> {
        Ok(noise.broadcast_mul(&self.sd)?.broadcast_add(&self.mean)?)
    }

    /// `KL(self ‖ other)`, nats, summed over all but the batch: `[batch]`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use isopleth::model::latent::Normal;
    /// let normal = |mean: f64, sd: f64| -> isopleth::Result<Normal> {
    ///     let one = |x: f64| Tensor::full(x, (1, 1, 1), &Device::Cpu);
    ///     Ok(Normal { mean: one(mean)?, sd: one(sd)? })
    /// };
    /// let kl = normal(0.3, 0.5)?.divergence(&normal(-0.2, 2.0)?)?;
    /// // ln(2/0.5) + (0.5² + 0.5²)/(2 · 2²) − ½
    /// assert!((kl.to_vec1::<f64>()?[0] - 0.948_794_361_119_890_6).abs() < 1e-12);
    /// # Ok::<(), isopleth::Error>(())
    /// ```
    pub fn divergence(&self, other: &Normal) -> Result<Tensor> {
        let gap = (&self.mean - &other.mean)?;
        let spread = ((self.sd.sqr()? + gap.sqr()?)? / (other.sd.sqr()? * 2.0)?)?;
        let each = (((other.sd.log()? - self.sd.log()?)? + spread)? - 0.5)?;
        Ok(each.sum((1, 2))?)
    }

    /// Log density at `z` `[batch, n, width]` up to `½ ln 2π` per number: `[batch, n]`.
    fn log_density(&self, z: &Tensor) -> Result<Tensor> {
        let off = z.broadcast_sub(&self.mean)?.broadcast_div(&self.sd)?;
        Ok((off.sqr()? * 0.5)?.broadcast_add(&self.sd.log()?)?.sum(D::Minus1)?.neg()?)
    }
}

/// Standard normals `[rows, n, width]` from a stream, as `like` is.
pub fn noise(rng: &mut Stream, shape: (usize, usize, usize), like: &Tensor) -> Result<Tensor> {
    let values = rng.normals(shape.0 * shape.1 * shape.2);
    Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?
        .to_dtype(like.dtype())?
        .to_device(like.device())?)
}

/// The noise behind the draws of z that a posterior is a mixture over: the same for every context,
/// so that neither tiles nor the company of a row change an answer.
pub fn fixed_noise(ask: usize, width: usize, like: &Tensor) -> Result<Tensor> {
    noise(&mut Stream::new(0, "latent", 0), (1, ask, width), like)
}

/// A task whose truths are repeated for `n` draws of every row: row `b · n + k` is draw `k` of `b`.
pub fn repeated(task: &Task, n: usize) -> Result<Task> {
    let wide = |x: &Tensor| -> Result<Tensor> {
        let (batch, targets, outcomes) = x.dims3()?;
        let x = x.unsqueeze(1)?.broadcast_as((batch, n, targets, outcomes))?;
        Ok(x.reshape((batch * n, targets, outcomes))?)
    };
    Ok(Task { surface: wide(&task.surface)?, noisy: wide(&task.noisy)?, ..task.clone() })
}

/// Log of the mean of the exponentials over the last axis.
pub fn log_mean_exp(x: &Tensor) -> Result<Tensor> {
    let n = x.dim(D::Minus1)?;
    Ok((x.log_sum_exp(D::Minus1)? - (n as f64).ln())?)
}

/// What training minimises, from the log density `fit` `[batch, sample]` of all targets given each
/// draw `z` `[batch, sample, width]`, nats.
///
/// `posterior` is q(z | C ∪ T), from which `z` came, or nothing where it came from the prior. Measured are its
/// divergence from the prior (`kl`, nats per task) and the effective number of draws (`ess`) where
/// draws are weighed.
///
/// # Errors
/// Shapes that do not fit.
pub fn objective(
    bound: Bound,
    fit: &Tensor,
    z: &Tensor,
    prior: &Normal,
    posterior: Option<&Normal>,
    targets: usize,
) -> Result<Objective> {
    let mut measured = Vec::new();
    let number = |x: Tensor| -> Result<f64> {
        Ok(x.detach().to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?)
    };
    let divergence = posterior.map(|q| q.divergence(prior)).transpose()?;
    if let Some(divergence) = &divergence {
        measured.push(("kl", number(divergence.clone())?));
    }
    let weighed = match (bound, posterior) {
        (Bound::Importance, Some(q)) => Some(((fit + prior.log_density(z)?)? - q.log_density(z)?)?),
        (Bound::MaximumLikelihood, _) => Some(fit.clone()),
        _ => None,
    };
    let value = match (&weighed, divergence) {
        (Some(weighed), _) => {
            let weight = softmax(&weighed.detach())?;
            measured.push(("ess", number(weight.sqr()?.sum(D::Minus1)?.recip()?)?));
            log_mean_exp(weighed)?
        }
        (None, Some(divergence)) => (fit.mean(D::Minus1)? - divergence)?,
        (None, None) => fit.mean(D::Minus1)?,
    };
    let loss = (value.mean_all()? / -(targets.max(1) as f64))?;
    Ok(Objective { loss, measured, surrogate: false })
}

/// Weights that add up to 1 over the last axis.
fn softmax(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_sub(&x.log_sum_exp(D::Minus1)?.unsqueeze(D::Minus1)?)?.exp()?)
}

/// One mixture over draws: `each` holds draw `k` of row `b` in row `b · n + k`.
pub fn mixture(each: Predictive, n: usize) -> Result<Predictive> {
    if n == 1 {
        return Ok(each);
    }
    let merge = |x: &Tensor| -> Result<Tensor> {
        let (rows, targets, k) = x.dims3()?;
        let x = x.reshape((rows / n, n, targets, k))?.transpose(1, 2)?;
        Ok(x.reshape((rows / n, targets, n * k))?)
    };
    Ok(Predictive {
        link: each.link,
        log_weight: (merge(&each.log_weight)? - (n as f64).ln())?,
        mean: merge(&each.mean)?,
        surface_sd: merge(&each.surface_sd)?,
        observation_sd: merge(&each.observation_sd)?,
        lift: None,
        law: None,
    })
}

/// Predictives of parts of the targets as one.
pub fn side_by_side(parts: &[Predictive]) -> Result<Predictive> {
    if let [alone] = parts {
        return Ok(alone.clone());
    }
    let join = |of: fn(&Predictive) -> &Tensor| -> Result<Tensor> {
        Ok(Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 1)?)
    };
    Ok(Predictive {
        link: parts[0].link,
        log_weight: join(|p| &p.log_weight)?,
        mean: join(|p| &p.mean)?,
        surface_sd: join(|p| &p.surface_sd)?,
        observation_sd: join(|p| &p.observation_sd)?,
        lift: None,
        law: None,
    })
}
