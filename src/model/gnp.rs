//! Gaussian neural process: features of each target, whose likeness is the covariance of all.
//!
//! Source: Markou et al. (2022), arXiv:2203.08775; back ends as in Bruinsma et al. (2021),
//! arXiv:2101.03606, and the `neuralprocesses` package. Departures: mean in place of sum pooling,
//! so that contexts larger than any in training are read; variances are exponentials;
//! features are divided by the root of their number; GELU where they have ReLU.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem, convcnp,
    joint::{Covariance, Joint, Outputs},
    layer::{Activation, Chain, Dense, Mlp, Norm},
    params::{Init, Params, Scope},
    pool::masked_mean,
    settings, spread,
    tnp::{check_heads, check_sizes},
};
use crate::{
    attention::{CHUNK, Keys, Start, scan},
    error::Result,
    likelihood::Likelihood,
    predictive::{Draws, Of, Predictive},
    process::{Memory, Objective, Posterior, Process, Reward},
    rng::Stream,
    sites::{Observations, Sites, Task},
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "gnp",
    about: "Gaussian neural process: a joint covariance over targets (Markou et al. 2022, arXiv:2203.08775)",
    build,
    joint: true,
    tiny: "width = 8\ndepth = 2\nrank = 3\nheads = 2\nbackend = \"attention\"\ncovariance = \"kvv\"",
};

/// How a context becomes features at a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The mean over the context, as in a conditional neural process.
    Cnp,
    /// Attention of each target to the context.
    Attention,
    /// A convolutional network over a raster, as in a [`convcnp`].
    Convcnp,
}

/// Settings of a [`Gnp`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How a context becomes features at a target.
    pub backend: Kind,
    /// How features covary.
    pub covariance: Covariance,
    /// Features that covary: no more than the width.
    pub rank: usize,
    /// Hidden width.
    pub width: usize,
    /// Hidden layers of encoder and decoder; without any, a decoder is one linear layer.
    pub depth: usize,
    /// Attention heads, which divide the width.
    pub heads: usize,
    /// Whether observation and surface differ.
    pub nugget: bool,
    /// The raster and its network, for that back end; the head in there plays no part.
    pub convcnp: convcnp::Config,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            backend: Kind::Cnp,
            covariance: Covariance::Linear,
            rank: 64,
            width: 256,
            depth: 3,
            heads: 8,
            nugget: true,
            convcnp: convcnp::Config::default(),
        }
    }
}

/// Gaussian neural process.
pub struct Gnp {
    backend: Backend,
    decode: Mlp,
    outputs: Outputs,
    likelihood: &'static dyn Likelihood,
    width: usize,
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    problem.reads_exactly("gnp")?;
    let Config { width, depth, rank, heads, covariance, nugget, .. } = config;
    check_sizes(&[("width", width), ("rank", rank), ("heads", heads)])?;
    if config.backend == Kind::Attention {
        check_heads(width, heads)?;
    }
    let outputs = Outputs { covariance, rank, nugget };
    let mut scope = params.scope();
    let backend = Backend::new(&mut scope.at("backend"), &config, problem)?;
    let widths = [vec![backend.features()], vec![width; depth], vec![outputs.count()]].concat();
    let decode = Mlp::new(&mut scope.at("decode"), &widths, Activation::Gelu, &Init::LeCun)?;
    Ok(Box::new(Gnp { backend, decode, outputs, likelihood: problem.likelihood, width }))
}

/// From a context to features at targets.
enum Backend {
    Cnp { encode: Mlp, dim: usize },
    Attention(Box<Attention>),
    Convcnp(Box<convcnp::Backbone>),
}

/// A context, ready to give features at any target.
enum Encoded {
    /// `[batch, 1, width]`
    Mean(Tensor),
    Keys(Keys),
    Raster(convcnp::Encoded),
}

struct Attention {
    place: Mlp,
    observation: Mlp,
    query: Dense,
    key: Dense,
    value: Dense,
    out: Dense,
    residual: Dense,
    between: Norm,
    feed_forward: Mlp,
    after: Norm,
    heads: usize,
}

impl Backend {
    fn new(scope: &mut Scope, c: &Config, problem: Problem) -> Result<Self> {
        if c.backend == Kind::Convcnp {
            let backbone = convcnp::Backbone::new(scope, &c.convcnp, &problem)?;
            return Ok(Backend::Convcnp(Box::new(backbone)));
        }
        let seen = problem.dim + problem.likelihood.width();
        let mlp = |scope: &mut Scope, name: &str, first: usize| {
            let widths = [vec![first], vec![c.width; c.depth + 1]].concat();
            Mlp::new(&mut scope.at(name), &widths, Activation::Gelu, &Init::LeCun)
        };
        if c.backend == Kind::Cnp {
            return Ok(Backend::Cnp { encode: mlp(scope, "encode", seen)?, dim: problem.dim });
        }
        let (place, observation) =
            (mlp(scope, "place", problem.dim)?, mlp(scope, "observation", seen)?);
        let dense = |scope: &mut Scope, name: &str| {
            Dense::new(&mut scope.at(name), c.width, c.width, &Init::LeCun)
        };
        Ok(Backend::Attention(Box::new(Attention {
            place,
            observation,
            query: dense(scope, "query")?,
            key: dense(scope, "key")?,
            value: dense(scope, "value")?,
            out: dense(scope, "out")?,
            residual: dense(scope, "residual")?,
            between: Norm::new(&mut scope.at("between"), c.width)?,
            feed_forward: Mlp::new(
                &mut scope.at("feed_forward"),
                &[c.width; 3],
                Activation::Gelu,
                &Init::LeCun,
            )?,
            after: Norm::new(&mut scope.at("after"), c.width)?,
            heads: c.heads,
        })))
    }

    /// Features that it gives at a target.
    fn features(&self) -> usize {
        match self {
            Backend::Cnp { encode, dim } => encode.outputs() + dim,
            Backend::Attention(a) => a.residual.outputs(),
            Backend::Convcnp(backbone) => backbone.width(),
        }
    }

    /// Absorbs a context whose observations read `seen` `[batch, site, w]`.
    fn encode(&self, context: &Observations, seen: &Tensor) -> Result<Encoded> {
        let tokens = Tensor::cat(&[&context.sites.s, seen], 2)?;
        match self {
            Backend::Cnp { encode, .. } => {
                Ok(Encoded::Mean(masked_mean(&encode.forward(&tokens)?, &context.mask)?))
            }
            Backend::Attention(a) => Ok(Encoded::Keys(a.keys(context, &tokens)?)),
            Backend::Convcnp(backbone) => Ok(Encoded::Raster(backbone.encode(context)?)),
        }
    }

    /// Features `[batch, target, features]`.
    fn at(&self, encoded: &Encoded, targets: &Sites) -> Result<Tensor> {
        match (self, encoded) {
            (Backend::Attention(a), Encoded::Keys(keys)) => a.read(&targets.s, keys),
            (Backend::Convcnp(backbone), Encoded::Raster(field)) => {
                backbone.features(field, targets)
            }
            (_, Encoded::Mean(mean)) => {
                Ok(Tensor::cat(&[&spread(mean, targets.len())?, &targets.s], 2)?)
            }
            _ => unreachable!("a context is read by the back end that encoded it"),
        }
    }
}

impl Attention {
    fn split(&self, x: Tensor) -> Result<Tensor> {
        let (batch, len, width) = x.dims3()?;
        Ok(x.reshape((batch, len, self.heads, width / self.heads))?)
    }

    /// Keys are places, values what was seen there.
    fn keys(&self, context: &Observations, tokens: &Tensor) -> Result<Keys> {
        let s = &context.sites.s;
        let k = Chain::new(s).mlp(&self.place).dense(&self.key).run()?;
        let v = Chain::new(tokens).mlp(&self.observation).dense(&self.value).run()?;
        Keys::pack(&self.split(k)?, &self.split(v)?, s, &context.mask)
    }

    fn read(&self, sites: &Tensor, keys: &Keys) -> Result<Tensor> {
        let place = self.place.forward(sites)?;
        let q = self.split(self.query.forward(&place)?)?;
        let read = scan(&q, sites, keys, None, CHUNK, Start::Exact)?.flatten_from(2)?;
        let residual = self.residual.forward(&place)?;
        Chain::new(&read)
            .dense(&self.out)
            .plus(&residual)
            .norm(&self.between)
            .keep()
            .mlp(&self.feed_forward)
            .add_kept()
            .norm(&self.after)
            .run()
    }
}

struct Conditioned<'a> {
    model: &'a Gnp,
    encoded: Encoded,
}

impl Conditioned<'_> {
    fn gaussian(&self, targets: &Sites) -> Result<Joint> {
        let model = self.model;
        let features = model.backend.at(&self.encoded, targets)?;
        model.outputs.joint(model.likelihood.link(), &model.decode.forward(&features)?)
    }
}

impl Gnp {
    fn absorb(&self, context: &Observations) -> Result<Conditioned<'_>> {
        let seen = self.likelihood.features(context)?;
        Ok(Conditioned { model: self, encoded: self.backend.encode(context, &seen)? })
    }
}

impl Process for Gnp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(self.absorb(context)?))
    }

    fn objective(
        &self,
        task: &Task,
        reward: Reward,
        _rng: &mut Stream,
    ) -> Result<Option<Objective>> {
        let joint = self.absorb(&task.context)?.gaussian(&task.target.sites)?;
        Ok(Some(Objective {
            loss: joint.loss(task, reward)?,
            measured: Vec::new(),
            surrogate: false,
        }))
    }

    fn memory(&self, sites: usize) -> Memory {
        let each = 4 * (5 * self.width + 3 * self.outputs.count() + 16);
        let held = match &self.backend {
            Backend::Cnp { .. } => 4 * self.width,
            Backend::Attention(_) => 4 * sites * (2 * self.width + 4),
            Backend::Convcnp(backbone) => {
                let memory = backbone.memory(sites);
                return Memory { target: memory.target + each, ..memory };
            }
        };
        Memory { conditioning: held + sites * each, held, target: each + 256 }
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        self.gaussian(targets)?.predictive()
    }

    fn joint(&self, targets: &Sites, of: Of, values: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gaussian(targets)?.log_density(of, values)?))
    }

    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        self.gaussian(targets)?.draws(n, rng)
    }
}
