//! What the CNP, the latent NP and the attentive NP share: paths from the context to a decoder.
//!
//! A path is a pooled vector, attention from each target to the context, or a latent variable that
//! all targets share. Each model file chooses its paths; conditioning, asking and training are
//! here once.

use candle_core::{D, DType, Tensor};

use super::{
    anp_block::{AnpBlock, Cache, Scale},
    decoder::Decoder,
    head::Head,
    latent::{self, Bound, Normal},
    layer::{Activation, Chain, Mlp},
    params::{Init, Scope},
    pool::{self, Pool, at_least_one, features},
};
use crate::{
    error::{Error, Result},
    likelihood::Likelihood,
    predictive::{Draws, Of, Predictive},
    process::{Memory, Objective, Posterior, Process, Reward},
    rng::Stream,
    sites::{Observations, Sites, Task},
};

/// Attention from targets to the context: queries and keys from sites, values from observations.
#[derive(Debug)]
pub struct Cross {
    place: Mlp,
    value: Mlp,
    itself: Option<AnpBlock>,
    attend: AnpBlock,
    activation: Activation,
}

/// What a [`Cross`] is made of.
#[derive(Debug, Clone)]
pub struct CrossPlan {
    /// Coordinates of a site.
    pub dim: usize,
    /// Features of an observation, coordinates included.
    pub inputs: usize,
    /// Features of every layer.
    pub width: usize,
    /// Heads of attention.
    pub heads: usize,
    /// What scores are divided by.
    pub scale: Scale,
    /// Dense layers of values; self-attention stands in for the last two.
    pub values: usize,
    /// Dense layers of queries and keys, which share them.
    pub places: usize,
    /// Whether observations attend to each other first.
    pub itself: bool,
    /// Between layers.
    pub activation: Activation,
}

impl Cross {
    /// From a plan.
    ///
    /// # Errors
    /// [`Error::Input`] if the heads do not divide the width.
    pub fn new(scope: &mut Scope, plan: &CrossPlan) -> Result<Self> {
        let CrossPlan { width, heads, scale, activation, .. } = *plan;
        let values = if plan.itself { plan.values.saturating_sub(2) } else { plan.values };
        let mut mlp = |name: &str, inputs: usize, layers: usize| {
            let widths = pool::widths(inputs, width, layers, width);
            Mlp::new(&mut scope.at(name), &widths, activation, &Init::LeCun)
        };
        let (place, value) =
            (mlp("place", plan.dim, plan.places)?, mlp("value", plan.inputs, values)?);
        let mut block =
            |name: &str| AnpBlock::new(&mut scope.at(name), width, heads, scale, activation);
        let itself = if plan.itself { Some(block("itself")?) } else { None };
        Ok(Cross { place, value, itself, attend: block("attend")?, activation })
    }

    fn cache(&self, features: &Tensor, sites: &Tensor, mask: &Tensor) -> Result<Cache> {
        let values = Chain::new(features).mlp(&self.value);
        let values = match &self.itself {
            None => values.run()?,
            Some(block) => block.itself(&values.activation(self.activation).run()?, sites, mask)?,
        };
        self.attend.cache(&self.place.forward(sites)?, &values, sites, mask)
    }

    fn read(&self, targets: &Tensor, cache: &Cache) -> Result<Tensor> {
        self.attend.read(&self.place.forward(targets)?, targets, cache)
    }
}

/// A latent variable that all targets share.
#[derive(Debug)]
pub struct Latent {
    /// Raw means and sds of z: `[batch, 1, 2 · width]`.
    pub pool: Pool,
    /// How it is trained and asked.
    pub settings: latent::Settings,
}

/// A neural process of paths. The decoder's parts are the site, then attention, pools and latent, of
/// those there are.
pub struct Paths {
    /// Attention to the context.
    pub cross: Option<Cross>,
    /// Pooled vectors, the deterministic paths.
    pub pools: Vec<Pool>,
    /// The latent path.
    pub latent: Option<Latent>,
    /// Ends every path.
    pub decode: Decoder,
    /// Predictive family.
    pub head: Head,
    /// How observations arise.
    pub likelihood: &'static dyn Likelihood,
}

/// Targets that are decoded at once for every draw of a latent: memory, never the answer.
const TARGETS: usize = 256;

/// A context as the decoder will meet it.
struct Known {
    cross: Option<Cache>,
    /// What pools add to the decoder's first layer, `[batch, 1, width]`.
    pooled: Option<Tensor>,
}

impl Paths {
    /// The decoder's part that reads the first of what comes after the site and attention.
    fn first_pool(&self) -> usize {
        1 + usize::from(self.cross.is_some())
    }

    fn absorb(&self, features: &Tensor, context: &Observations) -> Result<Known> {
        let (sites, mask) = (&context.sites.s, &context.mask);
        let cross = match &self.cross {
            Some(cross) => Some(cross.cache(features, sites, mask)?),
            None => None,
        };
        let mut pooled: Option<Tensor> = None;
        for (i, pool) in self.pools.iter().enumerate() {
            let part = self.decode.part(self.first_pool() + i, &pool.of(features, sites, mask)?)?;
            pooled = Some(match pooled {
                Some(before) => (before + part)?,
                None => part,
            });
        }
        Ok(Known { cross, pooled })
    }

    /// What draws of z `[batch, n, width]` add to the decoder's first layer.
    fn drawn(&self, z: &Tensor) -> Result<Tensor> {
        self.decode.part(self.first_pool() + self.pools.len(), z)
    }

    /// The predictive at `targets` `[batch, target, dim]` given each draw, of which `drawn` tells
    /// `[batch, n, width]`: draw `k` of row `b` in row `b · n + k`.
    fn given(&self, known: &Known, targets: &Tensor, drawn: Option<&Tensor>) -> Result<Predictive> {
        let (batch, len, _) = targets.dims3()?;
        let mut sum = self.decode.part(0, targets)?; // [batch, target, width]
        if let (Some(cross), Some(cache)) = (&self.cross, &known.cross) {
            sum = (sum + self.decode.part(1, &cross.read(targets, cache)?)?)?;
        }
        if let Some(pooled) = &known.pooled {
            sum = sum.broadcast_add(pooled)?;
        }
        if let Some(drawn) = drawn {
            let each = sum.unsqueeze(1)?.broadcast_add(&drawn.unsqueeze(2)?)?;
            sum = each.reshape((batch * drawn.dim(1)?, len, self.decode.width()))?;
        }
        self.head.predictive(self.likelihood.link(), &self.decode.rest(&sum)?)
    }

    /// q(z | context), and with `targets` also q(z | context and targets).
    fn laws(
        latent: &Latent,
        likelihood: &dyn Likelihood,
        seen: (&Tensor, &Observations),
        targets: Option<&Observations>,
    ) -> Result<(Normal, Option<Normal>)> {
        let (features_seen, context) = seen;
        let (sites, mask) = (&context.sites.s, &context.mask);
        let Some(targets) = targets else {
            return Ok((Normal::from_raw(&latent.pool.of(features_seen, sites, mask)?)?, None));
        };
        let all = context.and(targets)?;
        let of_all = Tensor::cat(&[features_seen, &features(likelihood, targets)?], 1)?;
        let hidden = Tensor::cat(&[mask, &targets.mask.zeros_like()?], 1)?;
        let [prior, posterior] = match latent.pool.of_each(&of_all, &[&hidden, &all.mask])? {
            Some(both) => [both[0].clone(), both[1].clone()],
            None => [
                latent.pool.of(features_seen, sites, mask)?,
                latent.pool.of(&of_all, &all.sites.s, &all.mask)?,
            ],
        };
        Ok((Normal::from_raw(&prior)?, Some(Normal::from_raw(&posterior)?)))
    }
}

impl Process for Paths {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let context = at_least_one(context)?;
        let seen = features(self.likelihood, &context)?;
        let known = self.absorb(&seen, &context)?;
        let (mut prior, mut drawn) = (None, None);
        if let Some(latent) = &self.latent {
            let law = Self::laws(latent, self.likelihood, (&seen, &context), None)?.0;
            let noise = latent::fixed_noise(latent.settings.ask, latent.settings.width, &law.mean)?;
            drawn = Some(self.drawn(&law.at(&noise)?)?);
            prior = Some(law);
        }
        Ok(Box::new(Conditioned { model: self, known, prior, drawn }))
    }

    fn memory(&self, sites: usize) -> Memory {
        let width = self.decode.width();
        let cross = usize::from(self.cross.is_some());
        // Numbers of a site: what enters, and a few encodings side by side in a block of attention.
        let token = 16 + width * (2 + 9 * cross);
        let held = cross * sites * (2 * width + 16) + 8 * width;
        let (draws, widths) = match &self.latent {
            None => (1, 3 + 4 * cross),
            Some(latent) => (latent.settings.ask, 1),
        };
        // Some targets at a time meet all draws; their share of that is here each target's own.
        let part = if self.latent.is_some() { draws * (width + 8) / 3 } else { 0 };
        Memory {
            conditioning: 4 * (held + sites * token),
            held: 4 * (held + draws * width),
            target: 4 * (16 + widths * width + part + 8 * draws * self.head.outputs()),
        }
    }

    fn objective(
        &self,
        task: &Task,
        reward: Reward,
        rng: &mut Stream,
    ) -> Result<Option<Objective>> {
        let Some(latent) = &self.latent else { return Ok(None) };
        let latent::Settings { width, objective, samples, .. } = latent.settings;
        let context = at_least_one(&task.context)?;
        let seen = features(self.likelihood, &context)?;
        let known = self.absorb(&seen, &context)?;
        let told = (objective != Bound::MaximumLikelihood).then_some(&task.target);
        let (prior, posterior) = Self::laws(latent, self.likelihood, (&seen, &context), told)?;
        let from = posterior.as_ref().unwrap_or(&prior);
        let batch = from.mean.dim(0)?;
        let z = from.at(&latent::noise(rng, (batch, samples, width), &from.mean)?)?;
        let given = self.given(&known, &task.target.sites.s, Some(&self.drawn(&z)?))?;
        let density = reward.density(&given, &latent::repeated(task, samples)?)?;
        let targets = density.dim(1)?;
        let fit = density.sum(D::Minus1)?.reshape((batch, samples))?;
        latent::objective(objective, &fit, &z, &prior, posterior.as_ref(), targets).map(Some)
    }
}

struct Conditioned<'a> {
    model: &'a Paths,
    known: Known,
    prior: Option<Normal>,
    /// What the draws behind [`Posterior::at`] add to the decoder's first layer.
    drawn: Option<Tensor>,
}

/// `f(start, len)` for parts of `sites` sites.
fn parts<T>(sites: usize, f: impl Fn(usize, usize) -> Result<T>) -> Result<Vec<T>> {
    let starts = (0..sites.max(1)).step_by(TARGETS);
    starts.map(|start| f(start, TARGETS.min(sites - start))).collect()
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let Some(drawn) = &self.drawn else {
            return self.model.given(&self.known, &targets.s, None);
        };
        let n = drawn.dim(1)?;
        let parts = parts(targets.len(), |start, len| {
            let part = targets.s.narrow(1, start, len)?.contiguous()?;
            latent::mixture(self.model.given(&self.known, &part, Some(drawn))?, n)
        })?;
        latent::side_by_side(&parts)
    }

    /// Log mean over the draws of z of the density of all targets given one.
    fn joint(&self, targets: &Sites, of: Of, values: &Tensor) -> Result<Option<Tensor>> {
        let Some(drawn) = &self.drawn else { return Ok(None) };
        let (batch, n) = (drawn.dim(0)?, drawn.dim(1)?);
        let (_, len, outcomes) = values.dims3()?;
        let values = values.unsqueeze(1)?.broadcast_as((batch, n, len, outcomes))?;
        let values = values.reshape((batch * n, len, outcomes))?;
        let sums = parts(targets.len(), |start, len| {
            let part = targets.s.narrow(1, start, len)?.contiguous()?;
            let given = self.model.given(&self.known, &part, Some(drawn))?;
            // Sums over many targets want more digits than one of them.
            let density = given.log_prob(of, &values.narrow(1, start, len)?)?;
            Ok(density.to_dtype(DType::F64)?.sum(D::Minus1)?.reshape((batch, n))?)
        })?;
        let sum = sums.into_iter().reduce(|a, b| (a + b).expect("one shape")).expect("a part");
        Ok(Some(latent::log_mean_exp(&sum)?))
    }

    /// The latent's mean; or what pooled vectors add to the decoder's first layer.
    fn embedding(&self) -> Result<Option<Tensor>> {
        let vector = self.prior.as_ref().map(|law| &law.mean).or(self.known.pooled.as_ref());
        Ok(vector.map(|x| x.squeeze(1)).transpose()?)
    }

    /// Each draw is the decoder's mean given one z: coherent, and without the surface's own sd at each
    /// target, which is independent between targets and no part of a surface.
    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        let Some(prior) = &self.prior else { return Err(Error::NoJointDraws) };
        let rows = prior.mean.dim(0)?;
        if rows != 1 {
            return Err(Error::axis("rows of targets to draw surfaces over", rows, 1));
        }
        // As many draws at a time as are otherwise asked.
        let most = self.drawn.as_ref().map_or(1, |d| d.dim(1).unwrap_or(1));
        let mut values = Vec::new();
        for first in (0..n).step_by(most) {
            let shape = (1, most.min(n - first), prior.mean.dim(2)?);
            let drawn = self.model.drawn(&prior.at(&latent::noise(rng, shape, &prior.mean)?)?)?;
            let parts = parts(targets.len(), |start, len| {
                let part = targets.s.narrow(1, start, len)?.contiguous()?;
                let given = self.model.given(&self.known, &part, Some(&drawn))?;
                Ok((given.log_weight.exp()? * given.mean)?.sum_keepdim(2)?)
            })?;
            values.push(Tensor::cat(&parts, 1)?);
        }
        Ok(Draws { link: self.model.likelihood.link(), values: Tensor::cat(&values, 0)? })
    }
}
