//! Transformer neural processes: context and targets as tokens of one transformer.
//!
//! Source: Nguyen & Grover (2022), arXiv:2207.04179; sizes and order of operations are those of the
//! authors' code. Targets read the context and nothing else, so that the context goes through the
//! blocks once and any number of targets follow, layer by layer. Departures: a column of the tokens
//! says what is asked (a setting), for an observed 0 looks like a question otherwise; dense weights
//! start by LeCun's law; raw standard deviations are kept between e⁻¹⁰ and e¹⁰.
//!
//! Three ways to answer several targets. `tnp-d`: each alone. `tnp-a`: one after the other, each told
//! what those before it were; one target alone is as in `tnp-d`. `tnp-nd`: a joint Gaussian whose
//! covariance comes from targets that read each other, of low rank, with a variance of each target's
//! own. As published, a target's variance there depends on who else is asked; here one that is asked
//! alone reads itself alone. Training minds targets alone too, in both, which the authors' does not
//! (`alone`): maps are made of them.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    head::{Head, Scale},
    joint::{Covariance, Joint, Outputs},
    layer::{Activation, Mlp},
    params::{Init, Params},
    settings,
    transformer::Block,
};
use crate::{
    attention::{Keys, ordered},
    error::{Error, Result},
    likelihood::Likelihood,
    predictive::{Draws, Of, Predictive},
    process::{Memory, Objective, Posterior, Process, Reward},
    rng::Stream,
    sites::{Observations, Sites, Task},
};

/// Each target alone.
pub const D: Entry = Entry {
    name: "tnp-d",
    about: "transformer neural process, each target alone (Nguyen & Grover 2022, arXiv:2207.04179)",
    build: build_d,
    joint: false,
    tiny: TINY,
};
/// One target after the other.
pub const A: Entry = Entry {
    name: "tnp-a",
    about: "transformer neural process, targets one after the other (Nguyen & Grover 2022, arXiv:2207.04179)",
    build: build_a,
    joint: true,
    tiny: TINY,
};
/// All targets at once.
pub const ND: Entry = Entry {
    name: "tnp-nd",
    about: "transformer neural process with a joint covariance (Nguyen & Grover 2022, arXiv:2207.04179)",
    build: build_nd,
    joint: true,
    tiny: "width = 8\nblocks = 2\nheads = 2\nfeed_forward = 8\nembed = [8]\nhead_widths = [8]\n\
        activation = \"gelu\"\nrank = 3\n\
        covariance_blocks = 1\ncovariance_widths = [8]",
};

const TINY: &str = "width = 8\nblocks = 2\nheads = 2\nfeed_forward = 8\nembed = [8]\n\
    head_widths = [8]\nactivation = \"gelu\"\n\
    head = { components = 2 }";

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
    /// What stands between dense layers.
    pub activation: Activation,
    /// Hidden widths of the embedding.
    pub embed: Vec<usize>,
    /// Hidden widths of the head.
    pub head_widths: Vec<usize>,
    /// Whether a column of the tokens tells targets from context; as published it does not.
    pub flag: bool,
    /// Predictive family.
    pub head: Head,
    /// `tnp-a`: sd of noise on what a target is told in training, link scale.
    pub told_noise: f64,
    /// `tnp-nd`: features that covary.
    pub rank: usize,
    /// `tnp-nd`: blocks in which targets read each other.
    pub covariance_blocks: usize,
    /// `tnp-nd`: hidden widths from there to the features.
    pub covariance_widths: Vec<usize>,
    /// `tnp-a`, `tnp-nd`: weight in training of each target alone, beside all together; as
    /// published 0.
    pub alone: f64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            width: 64,
            blocks: 6,
            heads: 4,
            feed_forward: 128,
            activation: Activation::Relu,
            embed: vec![64; 3],
            head_widths: vec![128],
            flag: true,
            head: Head { scale: Scale::Exp, ..Head::default() },
            told_noise: 0.0,
            rank: 20,
            covariance_blocks: 2,
            covariance_widths: vec![128; 3],
            alone: 0.1,
        }
    }
}

fn build_d(t: &toml::Table, p: Problem, v: &mut Params) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(Box::new(Tnp::new(settings(t)?, Kind::Alone, p, v)?))
}
fn build_a(t: &toml::Table, p: Problem, v: &mut Params) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(Box::new(Tnp::new(settings(t)?, Kind::Chained, p, v)?))
}
fn build_nd(t: &toml::Table, p: Problem, v: &mut Params) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(Box::new(Tnp::new(settings(t)?, Kind::Together, p, v)?))
}

/// How targets are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Each alone: `tnp-d`.
    Alone,
    /// Each told those before it: `tnp-a`.
    Chained,
    /// By one Gaussian: `tnp-nd`.
    Together,
}

/// A transformer neural process.
pub struct Tnp {
    embed: Mlp,
    blocks: Vec<Block>,
    decode: Mlp,
    shared: Option<Shared>,
    kind: Kind,
    config: Config,
    likelihood: &'static dyn Likelihood,
}

/// From targets that read each other to the features that covary.
struct Shared {
    blocks: Vec<Block>,
    decode: Mlp,
}

/// What a token stands for.
#[derive(Debug, Clone, Copy)]
enum Token<'a> {
    /// A site of the context, with what was seen there.
    Seen(&'a Tensor),
    /// A site that is asked.
    Asked,
    /// A target whose value `[batch, site, 1]` on the link scale is told, and what it is a value of.
    Told(&'a Tensor, Of),
}

impl Tnp {
    /// Builds the network, or reopens it from saved parameters.
    ///
    /// # Errors
    /// [`Error::Input`] for settings that make no network.
    pub fn new(config: Config, kind: Kind, problem: Problem, params: &mut Params) -> Result<Self> {
        config.head.check()?;
        problem.reads_exactly(match kind {
            Kind::Alone => "tnp-d",
            Kind::Chained => "tnp-a",
            Kind::Together => "tnp-nd",
        })?;
        if kind == Kind::Together && config.head.components != 1 {
            return Err(Error::input("tnp-nd is one Gaussian over all targets")
                .fact("components", config.head.components)
                .try_this("set `components = 1` under [model.head]"));
        }
        check_sizes(&[
            ("width", config.width),
            ("blocks", config.blocks),
            ("heads", config.heads),
            ("feed_forward", config.feed_forward),
            ("rank", config.rank),
        ])?;
        check_heads(config.width, config.heads)?;
        let token = problem.dim + problem.likelihood.width() + usize::from(config.flag);
        let together = kind == Kind::Together;
        let outputs = if together { 1 } else { config.head.outputs() };
        let mut scope = params.scope();
        let mut mlp = |name: &str, first: usize, hidden: &[usize], last: usize| {
            let widths = [&[first], hidden, &[last]].concat();
            Mlp::new(&mut scope.at(name), &widths, config.activation, &Init::LeCun)
        };
        let embed = mlp("embed", token, &config.embed, config.width)?;
        let decode = mlp("head", config.width, &config.head_widths, outputs)?;
        let hidden = &config.covariance_widths;
        let covariance = Self::outputs(&config).count() - 1;
        let features = together.then(|| mlp("covariance.head", config.width, hidden, covariance));
        let features = features.transpose()?;
        let mut blocks = |name: &str, count: usize| {
            let block = |i: usize| {
                let mut scope = scope.at(&format!("{name}.{i}"));
                Block::new(
                    &mut scope,
                    config.width,
                    config.heads,
                    config.feed_forward,
                    config.activation,
                )
            };
            (0..count).map(block).collect::<Result<Vec<_>>>()
        };
        let mine = blocks("block", config.blocks)?;
        let shared = match features {
            None => None,
            Some(decode) => {
                let blocks = blocks("covariance.block", config.covariance_blocks)?;
                Some(Shared { blocks, decode })
            }
        };
        let likelihood = problem.likelihood;
        Ok(Tnp { embed, blocks: mine, decode, shared, kind, config, likelihood })
    }

    fn outputs(config: &Config) -> Outputs {
        let (rank, nugget) = (config.rank, config.head.nugget);
        Outputs { covariance: Covariance::Linear, rank, nugget }
    }

    /// Tokens `[batch, site, width]` at coordinates `sites` `[batch, site, dim]`.
    fn tokens(&self, sites: &Tensor, token: Token) -> Result<Tensor> {
        let (batch, len, _) = sites.dims3()?;
        let constant = |value: f64, width: usize| {
            Tensor::full(value, (batch, len, width), sites.device())?.to_dtype(sites.dtype())
        };
        let width = self.likelihood.width();
        let (seen, flag) = match token {
            Token::Seen(features) => (features.clone(), 0.0),
            Token::Asked => (constant(0.0, width)?, 1.0),
            Token::Told(values, of) => {
                let values = values.to_dtype(sites.dtype())?;
                let seen = Tensor::cat(&[values, constant(0.0, width - 1)?], 2)?;
                // A new value is one more observation; a surface is known without its noise.
                let like_context = of == Of::Observation && !self.likelihood.counts();
                (seen, if like_context { 0.0 } else { -1.0 })
            }
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

    /// The posterior predictive of each target, told the values of those before it.
    fn chained(
        &self,
        targets: &Sites,
        keys: &[Keys],
        of: Of,
        values: &Tensor,
    ) -> Result<Predictive> {
        let (s, m) = (&targets.s, targets.len());
        let told = self.tokens(s, Token::Told(values, of))?;
        // Both copies of the targets side by side: those that tell, and those that are asked.
        let mut tokens = Tensor::cat(&[told, self.tokens(s, Token::Asked)?], 1)?;
        let shown = Tensor::ones((targets.batch(), m), s.dtype(), s.device())?;
        for (i, (block, context)) in self.blocks.iter().zip(keys).enumerate() {
            let told = block.attention.keys(&tokens.narrow(1, 0, m)?, &shown)?;
            let keys = after(context, &told)?;
            let n = context.len();
            let mut limits: Vec<usize> = (0..m).map(|i| n + i + 1).chain(n..n + m).collect();
            // Nobody reads those that tell after the last block.
            if i + 1 == self.blocks.len() {
                tokens = tokens.narrow(1, m, m)?;
                limits.drain(..m);
            }
            let read = ordered(&block.attention.queries(&tokens)?, &keys, &limits)?;
            tokens = block.after_reading(&tokens, &read.flatten_from(2)?)?;
        }
        self.predictive(&tokens)
    }

    /// The joint Gaussian over targets with `features` `[batch, target, width]`; or each as if it
    /// were asked alone.
    fn together(&self, shared: &Shared, features: &Tensor, alone: bool) -> Result<Joint> {
        let mean = self.decode.forward(features)?;
        let (batch, len, _) = features.dims3()?;
        let shown = Tensor::ones((batch, len), features.dtype(), features.device())?;
        let mut tokens = features.clone();
        for block in &shared.blocks {
            tokens = match alone {
                true => block.after_reading(&tokens, &block.attention.read_itself(&tokens)?)?,
                false => block.read(&tokens, &block.attention.keys(&tokens, &shown)?)?,
            };
        }
        let raw = Tensor::cat(&[mean, shared.decode.forward(&tokens)?], 2)?;
        Self::outputs(&self.config).joint(self.likelihood.link(), &raw)
    }

    fn predictive(&self, features: &Tensor) -> Result<Predictive> {
        let raw = self.decode.forward(features)?;
        self.config.head.predictive(self.likelihood.link(), &raw)
    }
}

/// The keys of `first`, and then those of `second`.
fn after(first: &Keys, second: &Keys) -> Result<Keys> {
    Ok(Keys {
        packed: Tensor::cat(&[&first.packed, &second.packed], 1)?,
        width: first.width,
        sites: Tensor::cat(&[&first.sites, &second.sites], 1)?,
        mask: Tensor::cat(&[&first.mask, &second.mask], 1)?,
        precision: first.precision,
    })
}

/// The same sites in another order.
fn reorder(x: &Tensor, order: &[usize]) -> Result<Tensor> {
    let order = order.iter().map(|i| *i as u32).collect();
    let order = Tensor::from_vec(order, x.dim(1)?, x.device())?;
    Ok(x.contiguous()?.index_select(&order, 1)?)
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
    if width.is_multiple_of(heads) {
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

    fn objective(
        &self,
        task: &Task,
        reward: Reward,
        rng: &mut Stream,
    ) -> Result<Option<Objective>> {
        let sites = &task.target.sites;
        let keys = match self.kind {
            Kind::Alone => return Ok(None),
            _ => self.read(&task.context)?,
        };
        let (mut loss, alone) = match &self.shared {
            None => {
                // Any order is as good; one that the design of the tasks has would be learnt.
                let order = rng.permutation(sites.len());
                let shuffled = Sites::new(reorder(&sites.s, &order)?);
                let total = reward.sum(task, |of, truth| {
                    let truth = reorder(truth, &order)?;
                    let told = match self.config.told_noise {
                        0.0 => truth.clone(),
                        sd => {
                            let noise = rng.normals(truth.elem_count());
                            let noise = Tensor::from_vec(noise, truth.shape(), truth.device())?;
                            (&truth + (noise.to_dtype(truth.dtype())? * sd)?)?
                        }
                    };
                    let chain = self.chained(&shuffled, &keys, of, &told)?;
                    Ok(chain.log_prob(of, &truth)?.mean_all()?)
                })?;
                let alone = || self.predictive(&self.asked(sites, &keys)?);
                (total.neg()?, (self.config.alone > 0.0).then(alone).transpose()?)
            }
            Some(shared) => {
                let features = self.asked(sites, &keys)?;
                let alone = || self.together(shared, &features, true)?.predictive();
                let alone = (self.config.alone > 0.0).then(alone).transpose()?;
                (self.together(shared, &features, false)?.loss(task, reward)?, alone)
            }
        };
        if let Some(alone) = alone {
            let alone = reward.density(&alone, task)?.mean_all()?;
            loss = (loss - (alone * self.config.alone)?)?;
        }
        Ok(Some(Objective { loss, measured: Vec::new(), surrogate: false }))
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
        let features = self.model.asked(targets, &self.keys)?;
        match &self.model.shared {
            Some(shared) => self.model.together(shared, &features, true)?.predictive(),
            None => self.model.predictive(&features),
        }
    }

    /// `tnp-a` tells the values in the order of the targets, which its answer depends on.
    fn joint(&self, targets: &Sites, of: Of, values: &Tensor) -> Result<Option<Tensor>> {
        let model = self.model;
        Ok(match (model.kind, &model.shared) {
            (Kind::Chained, _) => {
                let chained = model.chained(targets, &self.keys, of, values)?;
                Some(chained.log_prob(of, values)?.sum(1)?)
            }
            (Kind::Together, Some(shared)) => {
                let features = model.asked(targets, &self.keys)?;
                Some(model.together(shared, &features, false)?.log_density(of, values)?)
            }
            _ => None,
        })
    }

    /// `tnp-a` draws target after target, in an order that is another for each draw.
    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        let model = self.model;
        match (model.kind, &model.shared) {
            (Kind::Chained, _) => self.drawn(targets, n, rng),
            (Kind::Together, Some(shared)) => {
                let features = model.asked(targets, &self.keys)?;
                model.together(shared, &features, false)?.draws(n, rng)
            }
            _ => Err(Error::NoJointDraws),
        }
    }
}

impl Conditioned<'_> {
    fn drawn(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        let (model, m, link) = (self.model, targets.len(), self.model.likelihood.link());
        if targets.batch() != 1 {
            return Err(Error::axis("rows of targets to draw surfaces over", targets.batch(), 1));
        }
        let (s, device) = (&targets.s, targets.s.device());
        if n == 0 || m == 0 {
            return Ok(Draws { link, values: Tensor::zeros((n, m, 1), s.dtype(), device)? });
        }
        let orders: Vec<Vec<usize>> = (0..n).map(|_| rng.permutation(m)).collect();
        let rows = orders.iter().map(|order| reorder(s, order)).collect::<Result<Vec<_>>>()?;
        let sites = Tensor::cat(&rows, 0)?; // [draw, target, dim], each in its order
        let spread = |x: &Tensor| -> Result<Tensor> {
            let mut shape = x.dims().to_vec();
            shape[0] = n;
            Ok(x.broadcast_as(shape)?.contiguous()?.detach())
        };
        let mut keys = self
            .keys
            .iter()
            .map(|keys| {
                let (sites, mask) = (spread(&keys.sites)?, spread(&keys.mask)?);
                let packed = spread(&keys.packed)?;
                let (width, precision) = (keys.width, keys.precision);
                Ok(Keys { packed, width, sites, mask, precision })
            })
            .collect::<Result<Vec<_>>>()?;
        let shown = Tensor::ones((n, 1), s.dtype(), device)?;
        let mut values = vec![0.0; n * m];
        let mut last: Option<Tensor> = None; // of the targets before, [draw, 1, 1]
        for i in 0..m {
            let asked = model.tokens(&sites.narrow(1, i, 1)?, Token::Asked)?;
            let mut tokens = match &last {
                None => asked,
                Some(last) => {
                    let there = sites.narrow(1, i - 1, 1)?;
                    let told = model.tokens(&there, Token::Told(last, Of::Surface))?;
                    Tensor::cat(&[told, asked], 1)?
                }
            };
            for (block, keys) in model.blocks.iter().zip(&mut keys) {
                if last.is_some() {
                    let told = block.attention.keys(&tokens.narrow(1, 0, 1)?, &shown)?;
                    *keys = after(keys, &told)?;
                }
                tokens = block.read(&tokens, keys)?.detach();
            }
            let len = tokens.dim(1)?;
            let predictive = model.predictive(&tokens.narrow(1, len - 1, 1)?)?;
            let mut drawn = Vec::with_capacity(n);
            for (draw, order) in orders.iter().enumerate() {
                let marginal = predictive.marginals(draw, Of::Surface)?;
                let mut left = rng.unit();
                let (mut mean, mut sd) = (0.0, 0.0);
                for (w, m, s) in marginal.components(0) {
                    (mean, sd) = (m, s);
                    left -= w;
                    if left < 0.0 {
                        break;
                    }
                }
                let value = mean + sd * rng.normal();
                values[draw * m + order[i]] = value;
                drawn.push(value);
            }
            last = Some(Tensor::from_vec(drawn, (n, 1, 1), device)?.to_dtype(s.dtype())?);
        }
        let values = Tensor::from_vec(values, (n, m, 1), device)?.to_dtype(s.dtype())?;
        Ok(Draws { link, values })
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
            Tnp::new(config, Kind::Alone, problem(), &mut params)?;
            assert_eq!(params.count(), count);
        }
        // The published one of all targets at once has no variance of each target's own.
        let mut params = Params::new(1, &Device::Cpu, DType::F32);
        let config = Config { flag: false, head, ..Config::default() };
        Tnp::new(config, Kind::Together, problem(), &mut params)?;
        assert_eq!(params.count(), 332_821 + 129);
        Ok(())
    }

    /// As published context and targets are one sequence, in which all read the context alone.
    #[test]
    fn context_first_equals_one_masked_sequence() -> Result<()> {
        let mut params = Params::new(1, &Device::Cpu, DType::F32);
        let model = Tnp::new(Config::default(), Kind::Alone, problem(), &mut params)?;
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

    /// A task of `n` observations and `m` targets with values.
    fn asked(n: usize, m: usize) -> Result<(Observations, Sites, Tensor)> {
        let y = normal(&[2, n, 1], "y")?;
        let seen = Observations::new(Sites::new(normal(&[2, n, 1], "context")?), y, None)?;
        Ok((seen, Sites::new(normal(&[2, m, 1], "targets")?), normal(&[2, m, 1], "values")?))
    }

    fn small(kind: Kind) -> Result<(Tnp, Params)> {
        let mut params = Params::new(1, &Device::Cpu, DType::F32);
        // One Gaussian, so that a draw says which number it was made of.
        let tiny = TINY.replace("components = 2", "components = 1");
        let model = Tnp::new(settings(&tiny.parse().unwrap())?, kind, problem(), &mut params)?;
        Ok((model, params))
    }

    /// The chain in one pass, with its masks, is the chain rule: each target asked alone of a
    /// context to which those before it were told.
    #[test]
    fn a_chain_in_one_pass_is_a_chain() -> Result<()> {
        let (model, _params) = small(Kind::Chained)?;
        for n in [0, 6] {
            let (seen, targets, values) = asked(n, 4)?;
            let keys = model.read(&seen)?;
            for of in [Of::Surface, Of::Observation] {
                let whole = model.chained(&targets, &keys, of, &values)?;
                for i in 0..4 {
                    let mut tokens = model.tokens(
                        &targets.s.narrow(1, 0, i)?,
                        Token::Told(&values.narrow(1, 0, i)?, of),
                    )?;
                    let mut question = model.tokens(&targets.s.narrow(1, i, 1)?, Token::Asked)?;
                    let shown = Tensor::ones((2, i), DType::F32, &Device::Cpu)?;
                    for (block, context) in model.blocks.iter().zip(&keys) {
                        let told = after(context, &block.attention.keys(&tokens, &shown)?)?;
                        question = block.read(&question, &told)?;
                        // Those told read each other in their order: one at a time.
                        let rows = (0..i).map(|j| {
                            let mask = Tensor::ones((2, j + 1), DType::F32, &Device::Cpu)?;
                            let before =
                                block.attention.keys(&tokens.narrow(1, 0, j + 1)?, &mask)?;
                            block.read(&tokens.narrow(1, j, 1)?, &after(context, &before)?)
                        });
                        let rows = rows.collect::<Result<Vec<_>>>()?;
                        if i > 0 {
                            tokens = Tensor::cat(&rows, 1)?;
                        }
                    }
                    let alone = model.predictive(&question)?;
                    for (a, b) in
                        [(&whole.mean, &alone.mean), (&whole.surface_sd, &alone.surface_sd)]
                    {
                        let apart = (a.narrow(1, i, 1)? - b)?.abs()?.max_all()?;
                        let apart = apart.to_scalar::<f32>()?;
                        assert!(apart < 1e-5, "target {i} of {n} sites is {apart:e} off");
                    }
                }
            }
        }
        Ok(())
    }

    /// Draws come from the chain that gives the density: standardised by it, what was drawn is the
    /// noise that was put in.
    #[test]
    fn draws_follow_the_chain() -> Result<()> {
        let (model, _params) = small(Kind::Chained)?;
        let (seen, targets, _) = asked(6, 3)?;
        let (seen, targets) = (seen.rows(0, 1)?, targets.rows(0, 1)?);
        let posterior = model.condition(&seen)?;
        let draws = posterior.draws(&targets, 4, &mut Stream::new(1, "draws", 0))?.values;
        let mut rng = Stream::new(1, "draws", 0);
        let orders: Vec<_> = (0..4).map(|_| rng.permutation(3)).collect();
        let noise: Vec<f64> = (0..12)
            .map(|_| {
                rng.unit();
                rng.normal()
            })
            .collect();
        assert!(orders.iter().any(|order| *order != orders[0]));
        let keys = model.read(&seen)?;
        for (draw, order) in orders.iter().enumerate() {
            let sites = Sites::new(reorder(&targets.s, order)?);
            let values = reorder(&draws.narrow(0, draw, 1)?, order)?;
            let chain = model.chained(&sites, &keys, Of::Surface, &values)?;
            let z =
                ((values - &chain.mean)? / &chain.surface_sd)?.flatten_all()?.to_vec1::<f32>()?;
            for (i, z) in z.into_iter().enumerate() {
                let put = noise[i * 4 + draw];
                assert!((f64::from(z) - put).abs() < 1e-4, "draw {draw}, step {i}: {z}, not {put}");
            }
        }
        Ok(())
    }
}
