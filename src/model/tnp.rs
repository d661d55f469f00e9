//! Transformer neural processes: context and targets as tokens of one transformer.
//!
//! Source: Nguyen & Grover (2022), arXiv:2207.04179; sizes and order of operations are those of the
//! authors' code. Targets read the context and nothing else, so that the context goes through the
//! blocks once and any number of targets follow, layer by layer. Departures: a column of the tokens
//! says what is asked (a setting), for an observed 0 looks like a question otherwise; dense weights
//! start by LeCun's law; raw standard deviations are kept between e⁻¹⁰ and e¹⁰.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    head::{Head, Scale},
    layer::{Activation, Mlp},
    params::{Init, Params},
    settings,
    transformer::Block,
};
use crate::{
    attention::Keys,
    error::{Error, Result},
    likelihood::Likelihood,
    predictive::Predictive,
    process::{Memory, Posterior, Process},
    sites::{Observations, Sites},
};

/// Each target alone.
pub const D: Entry = Entry {
    name: "tnp-d",
    about: "transformer neural process, each target alone (Nguyen & Grover 2022, arXiv:2207.04179)",
    build: build_d,
    joint: false,
    tiny: TINY,
};

const TINY: &str =
    "width = 8\nblocks = 2\nheads = 2\nfeed_forward = 8\nembed = [8]\nhead_widths = [8]";

/// Settings; the defaults are the published sizes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Token width.
    pub width: usize,
    /// Blocks.
    pub blocks: usize,
    /// Attention heads, which divide the width.
    pub heads: usize,
    /// Features between the feed-forward layers of a block.
    pub feed_forward: usize,
    /// Hidden widths of the embedding.
    pub embed: Vec<usize>,
    /// Hidden widths of the head.
    pub head_widths: Vec<usize>,
    /// Whether a column of the tokens tells targets from context; as published it does not.
    pub flag: bool,
    /// Predictive family.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            width: 64,
            blocks: 6,
            heads: 4,
            feed_forward: 128,
            embed: vec![64; 3],
            head_widths: vec![128],
            flag: true,
            head: Head { scale: Scale::Exp, ..Head::default() },
        }
    }
}

fn build_d(t: &toml::Table, p: Problem, v: &mut Params) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(Box::new(Tnp::new(settings(t)?, "tnp-d", p, v)?))
}

/// A transformer neural process.
pub struct Tnp {
    embed: Mlp,
    blocks: Vec<Block>,
    decode: Mlp,
    config: Config,
    likelihood: &'static dyn Likelihood,
}

/// What a token stands for.
#[derive(Debug, Clone, Copy)]
enum Token<'a> {
    /// A site of the context, with what was seen there.
    Seen(&'a Tensor),
    /// A site that is asked.
    Asked,
}

impl Tnp {
    /// Builds the network, or reopens it from saved parameters.
    ///
    /// # Errors
    /// [`Error::Input`] for settings that make no network.
    pub fn new(config: Config, name: &str, problem: Problem, params: &mut Params) -> Result<Self> {
        config.head.check()?;
        problem.reads_exactly(name)?;
        check_sizes(&[
            ("width", config.width),
            ("blocks", config.blocks),
            ("heads", config.heads),
            ("feed_forward", config.feed_forward),
        ])?;
        check_heads(config.width, config.heads)?;
        let token = problem.dim + problem.likelihood.width() + usize::from(config.flag);
        let outputs = config.head.outputs();
        let mut scope = params.scope();
        let mut mlp = |name: &str, first: usize, hidden: &[usize], last: usize| {
            let widths = [&[first], hidden, &[last]].concat();
            Mlp::new(&mut scope.at(name), &widths, Activation::Relu, &Init::LeCun)
        };
        let embed = mlp("embed", token, &config.embed, config.width)?;
        let decode = mlp("head", config.width, &config.head_widths, outputs)?;
        let block = |i: usize| {
            let mut scope = scope.at(&format!("block.{i}"));
            Block::new(&mut scope, config.width, config.heads, config.feed_forward)
        };
        let blocks = (0..config.blocks).map(block).collect::<Result<_>>()?;
        Ok(Tnp { embed, blocks, decode, config, likelihood: problem.likelihood })
    }

    /// Tokens `[batch, site, width]` at coordinates `sites` `[batch, site, dim]`.
    fn tokens(&self, sites: &Tensor, token: Token) -> Result<Tensor> {
        let (batch, len, _) = sites.dims3()?;
        let constant = |value: f64, width: usize| {
            Tensor::full(value, (batch, len, width), sites.device())?.to_dtype(sites.dtype())
        };
        let (seen, flag) = match token {
            Token::Seen(features) => (features.clone(), 0.0),
            Token::Asked => (constant(0.0, self.likelihood.width())?, 1.0),
        };
        let mut parts = vec![sites.clone(), seen];
        if self.config.flag {
            parts.push(constant(flag, 1)?);
        }
        self.embed.forward(&Tensor::cat(&parts, 2)?)
    }

    /// What each block has targets read.
    fn read(&self, context: &Observations) -> Result<Vec<Keys>> {
        let features = self.likelihood.features(context)?;
        let mut tokens = self.tokens(&context.sites.s, Token::Seen(&features))?;
        let mut keys = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            let these = block.attention.keys(&tokens, &context.mask)?;
            // Nobody reads the context's tokens after the last block.
            if i + 1 < self.blocks.len() {
                tokens = block.read(&tokens, &these)?;
            }
            keys.push(these);
        }
        Ok(keys)
    }

    /// Features `[batch, target, width]` of targets that read `keys`, before the head.
    fn asked(&self, targets: &Sites, keys: &[Keys]) -> Result<Tensor> {
        let mut tokens = self.tokens(&targets.s, Token::Asked)?;
        for (block, keys) in self.blocks.iter().zip(keys) {
            tokens = block.read(&tokens, keys)?;
        }
        Ok(tokens)
    }

    fn predictive(&self, features: &Tensor) -> Result<Predictive> {
        let raw = self.decode.forward(features)?;
        self.config.head.predictive(self.likelihood.link(), &raw)
    }
}

/// Refuses sizes of 0.
pub(crate) fn check_sizes(sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        None => Ok(()),
        Some((name, _)) => Err(Error::input(format!("`{name}` under [model] is 0"))
            .try_this("sizes are at least 1; leave it out for the usual one")),
    }
}

/// Refuses heads that do not divide the width.
pub(crate) fn check_heads(width: usize, heads: usize) -> Result<()> {
    if width % heads == 0 {
        return Ok(());
    }
    Err(Error::input("attention heads do not divide the width of the tokens")
        .fact("width", width)
        .fact("heads", heads)
        .try_this("choose a width that is a multiple of `heads`"))
}

struct Conditioned<'a> {
    model: &'a Tnp,
    keys: Vec<Keys>,
}

impl Process for Tnp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(Conditioned { model: self, keys: self.read(context)? }))
    }

    fn memory(&self, sites: usize) -> Memory {
        let c = &self.config;
        // f32s of a token on its way through a block: before and after, queries, read; what is kept
        // of it, and keys as the kernel cuts them.
        let token = 4 * c.width + 16;
        let kept = 2 * c.width + 2;
        let held = 4 * c.blocks * sites * kept;
        Memory {
            conditioning: held + 4 * sites * (token + 4 * c.width),
            held,
            target: 4 * (token + 2 * c.width + 12 * c.head.outputs()) + 4 * 2 * c.width,
        }
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        self.model.predictive(&self.model.asked(targets, &self.keys)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::{Stream, likelihood};

    fn problem() -> Problem {
        Problem::new(1, likelihood::find("gaussian").unwrap())
    }

    fn normal(shape: &[usize], name: &str) -> Result<Tensor> {
        let values = Stream::new(3, name, 0).normals(shape.iter().product());
        let values = values.into_iter().map(|x| x as f32).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// The published count, and the column that says what is asked.
    #[test]
    fn parameters_are_those_of_the_paper() -> Result<()> {
        let head = Head { nugget: false, ..Head::default() };
        for (flag, count) in [(false, 222_082), (true, 222_082 + 64)] {
            let mut params = Params::new(1, &Device::Cpu, DType::F32);
            let config = Config { flag, head: head.clone(), ..Config::default() };
            Tnp::new(config, "tnp-d", problem(), &mut params)?;
            assert_eq!(params.count(), count);
        }
        Ok(())
    }

    /// As published context and targets are one sequence, in which all read the context alone.
    #[test]
    fn context_first_equals_one_masked_sequence() -> Result<()> {
        let mut params = Params::new(1, &Device::Cpu, DType::F32);
        let model = Tnp::new(Config::default(), "tnp-d", problem(), &mut params)?;
        let (n, m) = (9, 5);
        let context = Sites::new(normal(&[2, n, 1], "context")?);
        let targets = Sites::new(normal(&[2, m, 1], "targets")?);
        let y = normal(&[2, n, 1], "y")?;
        let mut seen = Observations::new(context.clone(), y.clone(), None)?;
        let hidden: Vec<f32> = (0..2 * n).map(|i| if i % 5 == 3 { 0.0 } else { 1.0 }).collect();
        seen.mask = Tensor::from_vec(hidden, (2, n), &Device::Cpu)?;
        let fast = model.condition(&seen)?.at(&targets)?;
        let mut tokens = Tensor::cat(
            &[model.tokens(&context.s, Token::Seen(&y))?, model.tokens(&targets.s, Token::Asked)?],
            1,
        )?;
        let mask =
            Tensor::cat(&[&seen.mask, &Tensor::zeros((2, m), DType::F32, &Device::Cpu)?], 1)?;
        for block in &model.blocks {
            let keys = block.attention.keys(&tokens, &mask)?;
            tokens = block.read(&tokens, &keys)?;
        }
        let whole = model.predictive(&tokens.narrow(1, n, m)?)?;
        for (a, b) in [(&fast.mean, &whole.mean), (&fast.surface_sd, &whole.surface_sd)] {
            let apart = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(apart < 1e-5, "{apart:e}");
        }
        Ok(())
    }
}
