//! Latent bottlenecked attentive neural process: a context of any size in a few latent tokens.
//!
//! Source: Feng et al. (2023), arXiv:2211.08458; sizes and order of operations are those of the
//! authors' code: a norm before each layer, GEGLU between the feed-forward layers, and queries, keys
//! and values without bias. Departures: dense weights start by LeCun's law, and raw standard
//! deviations are kept between e⁻¹⁰ and e¹⁰.

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    head::{Head, Scale},
    layer::{Activation, Chain, Dense, Mlp, Norm},
    params::{Init, Params, Scope},
    settings,
    tnp::{check_heads, check_sizes},
    transformer::MultiHead,
};
use crate::{
    attention::Keys,
    error::Result,
    fused,
    likelihood::Likelihood,
    predictive::Predictive,
    process::{Memory, Posterior, Process},
    sites::{Observations, Sites},
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "lbanp",
    about: "latent bottlenecked attentive NP: targets read a few latents (Feng et al. 2023, arXiv:2211.08458)",
    build,
    joint: false,
    tiny: "width = 8\nlatents = 3\nblocks = 2\nheads = 2\nfeed_forward = 8\nembed = [8]\nhead_widths = [8]\nactivation = \"gelu\"",
};

/// Settings; the defaults are the published sizes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Token width.
    pub width: usize,
    /// Latent tokens: 8 or 128 as published.
    pub latents: usize,
    /// Blocks.
    pub blocks: usize,
    /// Attention heads, which divide the width.
    pub heads: usize,
    /// Features between the feed-forward layers, and as many gates.
    pub feed_forward: usize,
    /// What stands between the dense layers of embeddings and head.
    pub activation: Activation,
    /// Hidden widths of the embeddings of context and targets.
    pub embed: Vec<usize>,
    /// Hidden widths of the head.
    pub head_widths: Vec<usize>,
    /// Predictive family.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            width: 64,
            latents: 8,
            blocks: 6,
            heads: 4,
            feed_forward: 128,
            activation: Activation::Relu,
            embed: vec![64; 3],
            head_widths: vec![128],
            head: Head { scale: Scale::Exp, ..Head::default() },
        }
    }
}

/// Latent bottlenecked attentive neural process.
pub struct Lbanp {
    embed: Mlp,
    embed_target: Mlp,
    /// `[1, latent, width]`
    latents: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    decode: Mlp,
    config: Config,
    likelihood: &'static dyn Likelihood,
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    config.head.check()?;
    problem.reads_exactly("lbanp")?;
    check_sizes(&[
        ("width", config.width),
        ("latents", config.latents),
        ("blocks", config.blocks),
        ("heads", config.heads),
        ("feed_forward", config.feed_forward),
    ])?;
    check_heads(config.width, config.heads)?;
    let mut scope = params.scope();
    let mut mlp = |name: &str, first: usize, hidden: &[usize], last: usize| {
        let widths = [&[first], hidden, &[last]].concat();
        Mlp::new(&mut scope.at(name), &widths, config.activation, &Init::LeCun)
    };
    let observation = problem.dim + problem.likelihood.width();
    let embed = mlp("embed", observation, &config.embed, config.width)?;
    let embed_target = mlp("embed_target", problem.dim, &config.embed, config.width)?;
    let decode = mlp("head", config.width, &config.head_widths, config.head.outputs())?;
    let latents = scope.get("latents", &[1, config.latents, config.width], &Init::Normal(1.0))?;
    let block = |i: usize| Block::new(&mut scope.at(&format!("block.{i}")), &config);
    let blocks = (0..config.blocks).map(block).collect::<Result<_>>()?;
    let norm = Norm::new(&mut scope.at("norm"), config.width)?;
    let likelihood = problem.likelihood;
    Ok(Box::new(Lbanp { embed, embed_target, latents, blocks, norm, decode, config, likelihood }))
}

/// One tokens' attention to others, both normed before, and added to the first.
struct Reading {
    before: Norm,
    of: Norm,
    attention: MultiHead,
}

impl Reading {
    fn new(scope: &mut Scope, c: &Config) -> Result<Self> {
        Ok(Reading {
            before: Norm::new(&mut scope.at("before"), c.width)?,
            of: Norm::new(&mut scope.at("of"), c.width)?,
            attention: MultiHead::new(&mut scope.at("attention"), c.width, c.heads, false)?,
        })
    }

    fn keys(&self, tokens: &Tensor, mask: &Tensor) -> Result<Keys> {
        self.attention.keys(&self.of.forward(tokens)?, mask)
    }

    fn read(&self, tokens: &Tensor, keys: &Keys) -> Result<Tensor> {
        let read = self.attention.read(&self.before.forward(tokens)?, keys)?;
        Chain::new(&read).dense(self.attention.out()).plus(tokens).run()
    }
}

/// `x + W (a · gelu(b))`, a and b from `x` normed.
///
/// Source: Shazeer (2020), arXiv:2002.05202.
struct Gated {
    before: Norm,
    open: Dense,
    close: Dense,
}

impl Gated {
    fn new(scope: &mut Scope, c: &Config) -> Result<Self> {
        Ok(Gated {
            before: Norm::new(&mut scope.at("before"), c.width)?,
            open: Dense::new(&mut scope.at("open"), c.width, 2 * c.feed_forward, &Init::LeCun)?,
            close: Dense::new(&mut scope.at("close"), c.feed_forward, c.width, &Init::LeCun)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let open = Chain::new(x).norm(&self.before).dense(&self.open).run()?;
        let half = self.open.outputs() / 2;
        let gate = fused::gelu(&open.narrow(D::Minus1, half, half)?.contiguous()?)?;
        let passed = (open.narrow(D::Minus1, 0, half)? * gate)?;
        Chain::new(&passed).dense(&self.close).plus(x).run()
    }
}

struct Block {
    /// Latents read the context, …
    context: Reading,
    context_feed: Gated,
    /// … and each other: keys are normed as queries are.
    own_norm: Norm,
    own: MultiHead,
    own_feed: Gated,
    /// Targets read latents.
    target: Reading,
    target_feed: Gated,
}

impl Block {
    fn new(scope: &mut Scope, c: &Config) -> Result<Self> {
        Ok(Block {
            context: Reading::new(&mut scope.at("context"), c)?,
            context_feed: Gated::new(&mut scope.at("context_feed"), c)?,
            own_norm: Norm::new(&mut scope.at("own_norm"), c.width)?,
            own: MultiHead::new(&mut scope.at("own"), c.width, c.heads, false)?,
            own_feed: Gated::new(&mut scope.at("own_feed"), c)?,
            target: Reading::new(&mut scope.at("target"), c)?,
            target_feed: Gated::new(&mut scope.at("target_feed"), c)?,
        })
    }

    /// Latents `[batch, latent, width]` after they read the context and each other.
    fn absorb(&self, latents: &Tensor, context: &Keys, shown: &Tensor) -> Result<Tensor> {
        let latents = self.context_feed.forward(&self.context.read(latents, context)?)?;
        let normed = self.own_norm.forward(&latents)?;
        let read = self.own.read(&normed, &self.own.keys(&normed, shown)?)?;
        let latents = Chain::new(&read).dense(self.own.out()).plus(&latents).run()?;
        self.own_feed.forward(&latents)
    }
}

struct Conditioned<'a> {
    model: &'a Lbanp,
    /// The latents after each block, as targets read them: all that is left of the context.
    keys: Vec<Keys>,
}

impl Process for Lbanp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let features = self.likelihood.features(context)?;
        let tokens = self.embed.forward(&Tensor::cat(&[&context.sites.s, &features], 2)?)?;
        let (batch, count, width) = (tokens.dim(0)?, self.config.latents, self.config.width);
        let shown = Tensor::ones((batch, count), tokens.dtype(), tokens.device())?;
        let mut latents = self.latents.broadcast_as((batch, count, width))?.contiguous()?;
        let mut keys = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let context = block.context.keys(&tokens, &context.mask)?;
            latents = block.absorb(&latents, &context, &shown)?;
            keys.push(block.target.keys(&latents, &shown)?);
        }
        Ok(Box::new(Conditioned { model: self, keys }))
    }

    fn memory(&self, sites: usize) -> Memory {
        let c = &self.config;
        let token = 4 * c.width + 16;
        // Targets hold their gates; latents are tokens too, and keys once a block.
        let fed = token + 3 * c.feed_forward;
        let held = 4 * c.blocks * c.latents * (2 * c.width + 2);
        Memory {
            conditioning: held + 4 * (sites * (token + 4 * c.width) + c.latents * fed),
            held,
            target: 4 * (fed + 12 * c.head.outputs()),
        }
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let model = self.model;
        let mut tokens = model.embed_target.forward(&targets.s)?;
        for (block, keys) in model.blocks.iter().zip(&self.keys) {
            tokens = block.target_feed.forward(&block.target.read(&tokens, keys)?)?;
        }
        let raw = Chain::new(&tokens).norm(&model.norm).mlp(&model.decode).run()?;
        model.config.head.predictive(model.likelihood.link(), &raw)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::{Stream, likelihood};

    /// As the authors' code counts them.
    #[test]
    fn parameters_are_those_of_the_paper() -> Result<()> {
        let problem = Problem::new(1, likelihood::find("gaussian")?);
        let table = "head = { nugget = false }".parse().unwrap();
        let mut params = Params::new(1, &Device::Cpu, DType::F32);
        build(&table, problem, &mut params)?;
        assert_eq!(params.count(), 784_834);
        Ok(())
    }

    /// What a posterior holds, and so what a target costs, knows nothing of the size of the context.
    #[test]
    fn what_is_held_is_as_large_for_any_context() -> Result<()> {
        let problem = Problem::new(1, likelihood::find("gaussian")?);
        let mut params = Params::new(1, &Device::Cpu, DType::F32);
        let config: Config = settings(&ENTRY.tiny.parse().unwrap())?;
        let model = build(&ENTRY.tiny.parse().unwrap(), problem, &mut params)?;
        let normals = |n: usize, name: &str| -> Result<Tensor> {
            let values = Stream::new(1, name, 0).normals(n);
            let values = values.into_iter().map(|x| x as f32).collect::<Vec<_>>();
            Ok(Tensor::from_vec(values, (1, n, 1), &Device::Cpu)?)
        };
        let targets = Sites::new(normals(4, "targets")?);
        let mut answers = Vec::new();
        for n in [0, 3, 500] {
            let sites = Sites::new(normals(n, "context")?);
            let context = Observations::new(sites, normals(n, "y")?, None)?;
            assert_eq!(model.memory(n).held, model.memory(0).held);
            assert_eq!(model.memory(n).target, model.memory(0).target);
            let posterior = model.condition(&context)?;
            answers.push(posterior.at(&targets)?.mean.flatten_all()?.to_vec1::<f32>()?);
        }
        assert!(answers[0] != answers[1] && answers[1] != answers[2]);
        assert_eq!(config.latents, 3);
        Ok(())
    }
}
