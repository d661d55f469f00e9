//! Distance-informed neural process: a latent for the whole surface, and one for each site whose prior
//! is a weighted mean over the context, near in an embedding that keeps distances.
//!
//! Source: Venkataramanan and Denzler (2025), arXiv:2508.18903. A penalty holds the singular values
//! of every layer from a site to its embedding between two bounds, so that what is far apart stays so.
//! Departures: the temperature of the attention is learned and starts at 0.3 units of embedded
//! distance, because at the published √64 a network within its bounds weighs a context on
//! [−2, 2] all but equally (`temperature = 8.0`, `temperature_learned = false`); log-scales of local
//! latents are kept within ±5; the embedding layer is bounded too; GELU outside of the
//! embedding; LeCun weights. Free bits, which are in the public code only, are left out.

use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    decoder::Decoder,
    head::Head,
    latent::{self, Normal},
    layer::{Activation, Dense, Mlp},
    params::{Init, Params, Scope},
    pool::{By, Plan, Pool, at_least_one, features, widths},
    settings,
};
use crate::{
    error::{Error, Result},
    likelihood::Likelihood,
    linalg,
    predictive::{Draws, Of, Predictive},
    process::{Memory, Objective, Posterior, Process, Reward},
    rng::Stream,
    sites::{Observations, Sites, Task},
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "dnp",
    about: "distance-informed neural process: local latents by bounded distances (Venkataramanan & Denzler 2025, arXiv:2508.18903)",
    build,
    joint: true,
    tiny: "width = 8\nlatent = 5\nembed = 6\nsamples = 2\nask = 4\nhead = { components = 2 }",
};

/// Settings of a [`Dnp`]; the defaults are the published sizes on a line.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Hidden width.
    pub width: usize,
    /// Numbers in the global latent and in each local one.
    pub latent: usize,
    /// Numbers in the embedding that distances are measured in.
    pub embed: usize,
    /// Least singular value of a layer of the embedding.
    pub least: f64,
    /// Largest singular value of a layer of the embedding.
    pub most: f64,
    /// What the penalty for leaving the bounds is multiplied by.
    pub penalty: f64,
    /// Embedded distance over which attention falls by a factor e, where it starts.
    pub temperature: f64,
    /// Whether the temperature is learned.
    pub temperature_learned: bool,
    /// Hidden layers of the decoder.
    pub decode: usize,
    /// Draws of the latents for each task in training.
    pub samples: usize,
    /// Draws of the latents that a posterior is a mixture over.
    pub ask: usize,
    /// Predictive family.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            width: 64,
            latent: 64,
            embed: 64,
            least: 0.1,
            most: 1.0,
            penalty: 1.0,
            temperature: 0.3,
            temperature_learned: true,
            decode: 2,
            samples: 1,
            ask: 32,
            head: Head::default(),
        }
    }
}

impl Config {
    fn check(&self) -> Result<()> {
        self.head.check()?;
        let sizes = [self.width, self.latent, self.embed, self.samples, self.ask];
        if sizes.contains(&0) {
            return Err(Error::input("a size under [model] is 0")
                .try_this("width, latent, embed, samples and ask must be ≥ 1"));
        }
        let bounds = self.least >= 0.0 && self.least < self.most && self.most.is_finite();
        if !(bounds && self.temperature > 0.0 && self.penalty >= 0.0) {
            return Err(Error::input("bounds under [model] that no network meets")
                .fact("least and most", format!("{} and {}", self.least, self.most))
                .fact("temperature", self.temperature)
                .fact("penalty", self.penalty)
                .try_this("0 ≤ least < most, temperature > 0, penalty ≥ 0"));
        }
        Ok(())
    }
}

/// A distance-informed neural process.
pub struct Dnp {
    /// From a site to its embedding, an activation after all but the last.
    layers: Vec<Dense>,
    /// Logarithm of the temperature, `[1]`.
    temperature: Tensor,
    global: Pool,
    /// From the second last layer of the embedding, and an observation, to a local law.
    local: Mlp,
    decode: Decoder,
    config: Config,
    likelihood: &'static dyn Likelihood,
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    problem.reads_exactly("dnp")?;
    Ok(Box::new(Dnp::new(settings(table)?, problem, params)?))
}

impl Dnp {
    /// Builds the network, or reopens it from saved parameters.
    ///
    /// # Errors
    /// [`Error::Input`] for settings that make no network.
    pub fn new(config: Config, problem: Problem, params: &mut Params) -> Result<Self> {
        config.check()?;
        let Config { width, latent, embed, .. } = config;
        let read = problem.likelihood.width();
        let mut scope = params.scope();
        // All singular values 1: within the bounds from the first step on, where the penalty has to
        // hold them and not to bring them there.
        let dense = |scope: &mut Scope, name: &str, inputs, outputs| {
            Dense::new(&mut scope.at(name), inputs, outputs, &Init::Orthogonal)
        };
        let layers = vec![
            dense(&mut scope, "embed.0", problem.dim, width)?,
            dense(&mut scope, "embed.1", width, width)?,
            dense(&mut scope, "embed.2", width, embed)?,
        ];
        let start = config.temperature.ln();
        let temperature = match config.temperature_learned {
            true => scope.get("temperature", &[1], &Init::Constant(start))?,
            false => {
                let weight = layers[0].weight();
                Tensor::full(start, 1, weight.device())?.to_dtype(weight.dtype())?
            }
        };
        let plan = Plan {
            inputs: problem.dim + read,
            width,
            before: 3,
            after: 1,
            outputs: 2 * latent,
            by: By::Mean,
            count: false,
            activation: Activation::Gelu,
        };
        let local = widths(width + read, width, 2, 2 * latent);
        let parts = [("embed", embed), ("global", latent), ("local", latent)];
        Ok(Dnp {
            layers,
            temperature,
            global: Pool::new(&mut scope.at("global"), &plan, None)?,
            local: Mlp::new(&mut scope.at("local"), &local, Activation::Gelu, &Init::LeCun)?,
            decode: Decoder::new(
                &mut scope.at("decode"),
                &parts,
                width,
                config.decode + 1,
                config.head.outputs(),
                Activation::Gelu,
            )?,
            config,
            likelihood: problem.likelihood,
        })
    }

    /// Sites `[batch, site, dim]` before the last layer of the embedding, and embedded.
    fn embed(&self, sites: &Tensor) -> Result<[Tensor; 2]> {
        let (last, first) = self.layers.split_last().expect("three layers");
        let mut x = sites.clone();
        for layer in first {
            x = leaky(&layer.forward(&x)?)?;
        }
        let embedded = last.forward(&x)?;
        Ok([x, embedded])
    }

    /// Raw local laws `[batch, site, 2 · latent]` of observed sites, from their features.
    fn laws(&self, before: &Tensor, seen: &Observations) -> Result<Tensor> {
        self.local.forward(&Tensor::cat(&[before, &self.likelihood.features(seen)?], 2)?)
    }

    fn absorb(&self, context: &Observations) -> Result<Known> {
        let [before, embedded] = self.embed(&context.sites.s)?;
        let laws = self.laws(&before, context)?;
        Ok(Known { embedded, laws, mask: context.mask.clone() })
    }

    /// The prior of local latents at embedded targets `[batch, target, embed]`.
    fn prior(&self, embedded: &Tensor, known: &Known) -> Result<Normal> {
        local(&attend(embedded, &known.embedded, &known.laws, &known.mask, &self.temperature)?)
    }

    /// The predictive given draws: embedded targets `[batch, target, embed]`, global latents
    /// `[batch, n, latent]`, local ones `[batch, n, target, latent]`; draw `k` of row `b` in row `b · n + k`.
    fn given(&self, embedded: &Tensor, global: &Tensor, near: &Tensor) -> Result<Predictive> {
        let (batch, n, targets, _) = near.dims4()?;
        let sum = self.decode.part(0, embedded)?.unsqueeze(1)?; // [batch, 1, target, width]
        let global = self.decode.part(1, global)?.unsqueeze(2)?; // [batch, n, 1, width]
        let sum = sum.broadcast_add(&global)?.add(&self.decode.part(2, near)?)?;
        let sum = sum.reshape((batch * n, targets, self.decode.width()))?;
        self.config.head.predictive(self.likelihood.link(), &self.decode.rest(&sum)?)
    }

    /// How many targets are worked on at once, for a context of so many sites: memory, never the answer.
    fn at_once(sites: usize) -> usize {
        ((1 << 18) / sites.max(1)).clamp(16, 256)
    }
}

/// A context, embedded.
struct Known {
    /// `[batch, context, embed]`
    embedded: Tensor,
    /// Raw, `[batch, context, 2 · latent]`.
    laws: Tensor,
    /// `[batch, context]`
    mask: Tensor,
}

/// Slope 0.1 below 0: an activation that keeps distances up to a factor.
fn leaky(x: &Tensor) -> Result<Tensor> {
    Ok(((x.relu()? * 0.9)? + (x * 0.1)?)?)
}

/// Local laws from raw ones: log-scales within ±5.
fn local(raw: &Tensor) -> Result<Normal> {
    let width = raw.dim(2)? / 2;
    let scale = ((raw.narrow(2, width, width)? / 5.0)?.tanh()? * 5.0)?;
    Ok(Normal { mean: raw.narrow(2, 0, width)?.contiguous()?, sd: scale.exp()? })
}

/// `Σₖ wₖ vₖ`, `w = softmax(−‖q − k‖ / exp(temperature))` over observed sites; 0 where there are none.
///
/// # Shapes
/// `q` `[batch, target, d]`, `k` `[batch, context, d]`, `v` `[batch, context, w]`, `mask` `[batch, context]`.
fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Tensor,
    temperature: &Tensor,
) -> Result<Tensor> {
    let mask = mask.unsqueeze(1)?; // [batch, 1, context]
    let squares = |x: &Tensor| x.sqr()?.sum_keepdim(2);
    let apart = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * -2.0)?
        .broadcast_add(&squares(q)?)?
        .broadcast_add(&squares(k)?.transpose(1, 2)?)?;
    // A root has no slope at 0, where a target is a site of the context.
    let distance = (apart.relu()? + 1e-6)?.sqrt()?;
    let scores = distance.broadcast_mul(&temperature.neg()?.exp()?.neg()?)?;
    let scores = scores.broadcast_add(&((&mask - 1.0)? * 1e30)?)?;
    let top = scores.max_keepdim(D::Minus1)?.detach();
    let weights = scores.broadcast_sub(&top)?.exp()?.broadcast_mul(&mask)?;
    let sum = weights.sum_keepdim(D::Minus1)?;
    let empty = sum.eq(0.0)?.to_dtype(sum.dtype())?;
    Ok(weights.matmul(v)?.broadcast_div(&(sum + empty)?)?)
}

/// The largest and the smallest singular value of `weight` `[inputs, outputs]`, as scalars that carry
/// the exact gradient `u vᵀ`: the vectors are constants, by SVD on the host in f64.
///
/// # Errors
/// [`Error::Input`] if a weight is not finite.
pub fn stretch(weight: &Tensor) -> Result<[Tensor; 2]> {
    let (rows, columns) = weight.dims2()?;
    let values = weight.detach().flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let [most, least] = linalg::extremes(&values, rows, columns)?;
    let scalar = |of: linalg::Singular| -> Result<Tensor> {
        let outer: Vec<f64> =
            of.left.iter().flat_map(|u| of.right.iter().map(move |v| u * v)).collect();
        let outer = Tensor::from_vec(outer, (rows, columns), &candle_core::Device::Cpu)?;
        let outer = outer.to_dtype(weight.dtype())?.to_device(weight.device())?;
        Ok((weight * outer)?.sum_all()?)
    };
    Ok([scalar(most)?, scalar(least)?])
}

/// The mean over `weights` of `max(0, σ_max − most)² + max(0, least − σ_min)²`, a scalar; with the extreme
/// singular values of all, smallest first.
pub fn penalty(weights: &[&Tensor], least: f64, most: f64) -> Result<(Tensor, [f64; 2])> {
    let (mut total, mut extremes) = (None::<Tensor>, [f64::INFINITY, f64::NEG_INFINITY]);
    for weight in weights {
        let [high, low] = stretch(weight)?;
        let number = |x: &Tensor| x.to_dtype(DType::F64)?.to_scalar::<f64>();
        extremes = [extremes[0].min(number(&low)?), extremes[1].max(number(&high)?)];
        let over = (high - most)?.relu()?.sqr()?;
        let under = (low.neg()? + least)?.relu()?.sqr()?;
        let each = (over + under)?;
        total = Some(match total {
            Some(before) => (before + each)?,
            None => each,
        });
    }
    let total = total.ok_or_else(|| Error::input("no layer to bound"))?;
    Ok(((total / weights.len() as f64)?, extremes))
}

impl Process for Dnp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let context = at_least_one(context)?;
        let seen = features(self.likelihood, &context)?;
        let pooled = self.global.of(&seen, &context.sites.s, &context.mask)?;
        let prior = Normal::from_raw(&pooled)?;
        let Config { ask, latent, .. } = self.config;
        let noise = latent::fixed_noise(ask, latent, &prior.mean)?;
        let global = prior.at(&noise)?;
        let mut rng = Stream::new(0, "local latent", 0);
        let near = latent::noise(&mut rng, (1, ask, latent), &prior.mean)?.unsqueeze(2)?;
        Ok(Box::new(Conditioned {
            model: self,
            known: self.absorb(&context)?,
            prior,
            global,
            near,
        }))
    }

    fn memory(&self, sites: usize) -> Memory {
        let Config { width, latent, embed, ask, .. } = self.config;
        let held = sites * (embed + 2 * latent + 1) + 2 * ask * latent;
        let once = Self::at_once(sites);
        // Some targets at a time meet the context and all draws; their share of that is each
        // target's own.
        let part = once * (6 * sites + ask * (3 * width + 3 * latent)) / 1000;
        Memory {
            conditioning: 4 * (held + sites * (4 * width + 2 * latent + 16)),
            held: 4 * held,
            target: 4 * (16 + part + 8 * ask * self.config.head.outputs()),
        }
    }

    fn objective(
        &self,
        task: &Task,
        reward: Reward,
        rng: &mut Stream,
    ) -> Result<Option<Objective>> {
        let Config { samples, latent, .. } = self.config;
        let context = at_least_one(&task.context)?;
        let all = context.and(&task.target)?;
        let seen = features(self.likelihood, &all)?;
        let hidden = Tensor::cat(&[&context.mask, &task.target.mask.zeros_like()?], 1)?;
        let masks = [&hidden, &all.mask];
        let both = self.global.of_each(&seen, &masks)?.expect("no attention in this pool");
        let (prior, posterior) = (Normal::from_raw(&both[0])?, Normal::from_raw(&both[1])?);
        // Context and targets go through the embedding together.
        let [before, embedded] = self.embed(&all.sites.s)?;
        let laws = self.laws(&before, &all)?;
        let (n, targets) = (context.len(), task.target.len());
        let part = |x: &Tensor, start, len| x.narrow(1, start, len)?.contiguous();
        let known = Known {
            embedded: part(&embedded, 0, n)?,
            laws: part(&laws, 0, n)?,
            mask: context.mask.clone(),
        };
        let embedded = part(&embedded, n, targets)?;
        let near_prior = self.prior(&embedded, &known)?;
        let near_posterior = local(&part(&laws, n, targets)?)?;
        let batch = prior.mean.dim(0)?;
        let global = posterior.at(&latent::noise(rng, (batch, samples, latent), &prior.mean)?)?;
        let noise = latent::noise(rng, (batch, samples, targets * latent), &prior.mean)?;
        let noise = noise.reshape((batch, samples, targets, latent))?;
        let near = spread_by(&near_posterior, &noise)?;
        let given = self.given(&embedded, &global, &near)?;
        let density = reward.density(&given, &latent::repeated(task, samples)?)?;
        let fit = (density.sum(D::Minus1)?.sum_all()? / (batch * samples) as f64)?;
        let of_global = posterior.divergence(&prior)?.mean_all()?;
        let of_local = near_posterior.divergence(&near_prior)?.mean_all()?;
        let weights: Vec<&Tensor> = self.layers.iter().map(Dense::weight).collect();
        let (penalty, [least, most]) = penalty(&weights, self.config.least, self.config.most)?;
        let number = |x: &Tensor| x.to_dtype(DType::F64)?.to_scalar::<f64>();
        let measured = vec![
            ("kl_global", number(&of_global)?),
            ("kl_local", number(&of_local)?),
            ("penalty", number(&penalty)?),
            ("sigma_min", least),
            ("sigma_max", most),
            ("temperature", number(&self.temperature.exp()?.squeeze(0)?)?),
        ];
        let bound = ((fit - of_global)? - of_local)?;
        let loss = ((bound / -(targets.max(1) as f64))? + (penalty * self.config.penalty)?)?;
        Ok(Some(Objective { loss, measured, surrogate: false }))
    }
}

/// `mean + sd · noise` of local laws `[batch, target, latent]`, noise `[…, n, …, latent]` with four axes.
fn spread_by(law: &Normal, noise: &Tensor) -> Result<Tensor> {
    let (mean, sd) = (law.mean.unsqueeze(1)?, law.sd.unsqueeze(1)?);
    Ok(noise.broadcast_mul(&sd)?.broadcast_add(&mean)?)
}

struct Conditioned<'a> {
    model: &'a Dnp,
    known: Known,
    prior: Normal,
    /// Draws of the global latent, `[batch, n, latent]`.
    global: Tensor,
    /// Noise of the local ones, `[1, n, 1, latent]`: one for all targets, which marginals never notice.
    near: Tensor,
}

impl Conditioned<'_> {
    /// `f(start, len, embedded, prior)` for parts of the targets.
    fn parts<T>(
        &self,
        targets: &Sites,
        mut f: impl FnMut(usize, usize, &Tensor, &Normal) -> Result<T>,
    ) -> Result<Vec<T>> {
        let most = Dnp::at_once(self.known.mask.dim(1)?);
        let starts = (0..targets.len().max(1)).step_by(most);
        starts
            .map(|start| {
                let len = most.min(targets.len() - start);
                let [_, embedded] =
                    self.model.embed(&targets.s.narrow(1, start, len)?.contiguous()?)?;
                let prior = self.model.prior(&embedded, &self.known)?;
                f(start, len, &embedded, &prior)
            })
            .collect()
    }
}

/// Draws of each target's local latent for every draw of the global one, in [`Posterior::joint`].
const NEAR: usize = 8;

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let n = self.global.dim(1)?;
        let parts = self.parts(targets, |_, _, embedded, prior| {
            let near = spread_by(prior, &self.near)?;
            latent::mixture(self.model.given(embedded, &self.global, &near)?, n)
        })?;
        latent::side_by_side(&parts)
    }

    /// Log mean over draws of the global latent of the product over targets of their densities, each a
    /// mean over draws of its own local latent.
    fn joint(&self, targets: &Sites, of: Of, values: &Tensor) -> Result<Option<Tensor>> {
        let (batch, n, latent) = self.global.dims3()?;
        let (_, len, outcomes) = values.dims3()?;
        let values = values.unsqueeze(1)?.broadcast_as((batch, n, len, outcomes))?;
        let values = values.reshape((batch * n, len, outcomes))?;
        let mut rng = Stream::new(0, "joint latent", 0);
        let sums = self.parts(targets, |start, len, embedded, prior| {
            let each = (0..NEAR).map(|_| {
                let noise = latent::noise(&mut rng, (n, len, latent), &prior.mean)?.unsqueeze(0)?;
                let near = spread_by(prior, &noise)?;
                let given = self.model.given(embedded, &self.global, &near)?;
                Ok(given.log_prob(of, &values.narrow(1, start, len)?)?.to_dtype(DType::F64)?)
            });
            let each = Tensor::stack(&each.collect::<Result<Vec<_>>>()?, 2)?;
            Ok(latent::log_mean_exp(&each)?.sum(D::Minus1)?.reshape((batch, n))?)
        })?;
        let sum = sums.into_iter().reduce(|a, b| (a + b).expect("one shape")).expect("a part");
        Ok(Some(latent::log_mean_exp(&sum)?))
    }

    /// The global latent's mean.
    fn embedding(&self) -> Result<Option<Tensor>> {
        Ok(Some(self.prior.mean.squeeze(1)?))
    }

    /// Each draw is the decoder's mean given one global latent and a local one for every target. Local latents
    /// are independent given the context, so that a draw is as rough as they are wide.
    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        let (rows, _, latent) = self.global.dims3()?;
        if rows != 1 {
            return Err(Error::axis("rows of targets to draw surfaces over", rows, 1));
        }
        let most = self.global.dim(1)?;
        let mut values = Vec::new();
        for first in (0..n).step_by(most) {
            let count = most.min(n - first);
            let noise = latent::noise(rng, (1, count, latent), &self.prior.mean)?;
            let global = self.prior.at(&noise)?;
            let parts = self.parts(targets, |_, len, embedded, prior| {
                let noise = latent::noise(rng, (count, len, latent), &prior.mean)?.unsqueeze(0)?;
                let near = spread_by(prior, &noise)?;
                let given = self.model.given(embedded, &global, &near)?;
                Ok((given.log_weight.exp()? * given.mean)?.sum_keepdim(2)?)
            })?;
            values.push(Tensor::cat(&parts, 1)?);
        }
        Ok(Draws { link: self.model.likelihood.link(), values: Tensor::cat(&values, 0)? })
    }
}
