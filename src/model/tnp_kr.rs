//! Transformer neural process with kernel regression blocks (TNP-KR).
//!
//! Source: Jenson et al., arXiv:2411.12502 (2025 parameterisation: separate value MLP, LeCun
//! weights, shifted-RBF bias) and arXiv:2506.09163 (2026: dense values, orthogonal weights, RBF
//! network bias, location left out of the tokens). Departures, each a setting: bias terms start
//! with distinct widths (identical ones stay identical for ever), widths are positive, the running
//! maximum starts at −∞, and a head may have a sink so that it can tell how much data is near.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    head::Head,
    layer::{Activation, Chain, Dense, Mlp, Norm, Summary},
    params::{Init, Params, Scope},
    pool::at_least_one,
    settings,
};
use crate::{
    attention::{
        Bias, CHUNK, DeepKernel, InTime, Keys, Metric, Performer, Precision, ROUNDS, Reader,
        Reading, Rounds, Start, Summed, Term, full_in_time, scan, scan_in_time, scan_joined,
    },
    error::{Error, Result},
    fused::{
        self, Host,
        matrix::{self, View},
    },
    likelihood::Likelihood,
    predictive::Predictive,
    process::{Memory, Posterior, Process},
    registry::Named,
    rng::Stream,
    sites::{Observations, Sites},
};

/// Softmax attention, chunk by chunk.
pub const SCAN: Entry = Entry {
    name: "tnp-kr",
    about: "TNP-KR with scan attention and distance bias (Jenson et al., arXiv:2411.12502, 2506.09163)",
    build: build_scan,
    joint: false,
    tiny: TINY,
};
/// Deep kernel attention.
pub const DKA: Entry = Entry {
    name: "tnp-kr-dka",
    about: "TNP-KR with deep kernel attention, linear in the context (Jenson et al., arXiv:2411.12502)",
    build: build_dka,
    joint: false,
    tiny: "width = 8\nblocks = 2\nembed = [8]\nfeed_forward = 8\nfeatures = 6\nembed_location = true\nhead_widths = [8]",
};
/// Softmax attention by random features.
pub const PERFORMER: Entry = Entry {
    name: "tnp-kr-performer",
    about: "TNP-KR with random features for attention, linear in the context (Jenson et al., arXiv:2411.12502)",
    build: build_performer,
    joint: false,
    tiny: "width = 8\nblocks = 2\nheads = 2\nkey_width = 4\nvalue_width = 3\nembed = [8]\nfeed_forward = 8\n\
        features = 6\nembed_location = true\nhead_widths = [8]",
};
/// Softmax attention with the whole score matrix: the reference.
pub const FULL: Entry = Entry {
    name: "tnp-kr-full",
    about: "TNP-KR with dense attention, the reference for `tnp-kr` (arXiv:2411.12502, 2506.09163)",
    build: build_full,
    joint: false,
    tiny: TINY,
};

const TINY: &str = "width = 8\nblocks = 2\nheads = 2\nkey_width = 4\nvalue_width = 3\nembed = [8]\n\
    feed_forward = 8\nhead_widths = [8]\nbias = [\"rbf\", \"scalar\", \"matern-3/2\", \"sink\"]\nhead = { components = 2 }";

/// How bias parameters `b` (and slopes of scalar terms, and sharpness) are kept in range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Constraint {
    /// Not at all, as published in 2026: a negative width grows without bound with distance.
    Free,
    /// Absolute value, as published in 2025; the sharpness of log-kernel terms too.
    Abs,
    /// Learned on the log scale, with the sharpness `a` of log-kernel terms; scalar slopes are
    /// negative, so attention decays.
    Positive,
}

/// Where bias parameters start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Widths {
    /// All equal, as published: a = 1 (scalar −1), b = 1, c = 0. Equal terms then stay equal.
    Equal,
    /// Spread over the scales that matter, a different one for every head and term: length scales
    /// from 1.5 to 0.05 units of distance, supports of compact terms from 3 to 0.3.
    Spread,
}

/// How values are computed from tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Value {
    /// One dense layer (2026).
    Dense,
    /// Dense, ReLU, dense (2025).
    Mlp,
}

/// Law of dense weights at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weights {
    /// Orthogonal (2026).
    Orthogonal,
    /// LeCun normal (2025).
    Lecun,
}

/// Settings; the defaults are the 2026 sizes with the defects mended.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Token width.
    pub width: usize,
    /// Kernel regression blocks.
    pub blocks: usize,
    /// Attention heads.
    pub heads: usize,
    /// Key width of a head.
    pub key_width: usize,
    /// Value width of a head.
    pub value_width: usize,
    /// How values are computed.
    pub value: Value,
    /// Hidden widths of the embedding.
    pub embed: Vec<usize>,
    /// Hidden width of the feed-forward layer.
    pub feed_forward: usize,
    /// Hidden widths of the head.
    pub head_widths: Vec<usize>,
    /// Whether coordinates enter the tokens. Without them the model is invariant to translation.
    pub embed_location: bool,
    /// Terms of the distance bias; none for plain attention.
    pub bias: Vec<Term>,
    /// Terms of a bias on how far apart in time two sites are, beside that on distance; with some, the
    /// model reads a time at every site. Neither `sink` nor `wendland`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub time_bias: Vec<Term>,
    /// How the bias measures distance. With `great-circle` sites are (longitude, latitude) in
    /// degrees, and the model must not be told them any other way: longitude has a seam.
    pub metric: Metric,
    /// Where the bias starts.
    pub bias_start: Widths,
    /// Widest and narrowest length scale of a spread start, model units, in place of the usual
    /// 1.5 to 0.05 (supports of compact kernels: 3 to 0.3). Large surveys want narrow ones.
    pub bias_reach: Option<[f64; 2]>,
    /// How widths are kept positive.
    pub bias_constraint: Constraint,
    /// Law of dense weights.
    pub weights: Weights,
    /// Start the running maximum at −1e-6 as published.
    pub published_start: bool,
    /// Features of deep kernel attention, and of the performer.
    pub features: usize,
    /// The performer's features are drawn from this and from nothing else, once for each block.
    pub features_seed: u64,
    /// Whether the performer's directions are equally long, as published.
    pub features_equal: bool,
    /// Predictive family.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            width: 64,
            blocks: 6,
            heads: 4,
            key_width: 32,
            value_width: 32,
            value: Value::Dense,
            embed: vec![256, 128],
            feed_forward: 256,
            head_widths: vec![256, 64],
            embed_location: false,
            bias: vec![Term::Rbf],
            time_bias: Vec::new(),
            metric: Metric::Euclidean,
            bias_start: Widths::Spread,
            bias_reach: None,
            bias_constraint: Constraint::Positive,
            weights: Weights::Orthogonal,
            published_start: false,
            features: 128,
            features_seed: 1,
            features_equal: true,
            head: Head::default(),
        }
    }
}

fn build_scan(
    t: &toml::Table,
    p: Problem,
    v: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(Box::new(TnpKr::new(settings(t)?, Kind::Scan, p, v)?))
}
fn build_dka(
    t: &toml::Table,
    p: Problem,
    v: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(Box::new(TnpKr::new(settings(t)?, Kind::Dka, p, v)?))
}
fn build_performer(
    t: &toml::Table,
    p: Problem,
    v: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(Box::new(TnpKr::new(settings(t)?, Kind::Performer, p, v)?))
}
fn build_full(
    t: &toml::Table,
    p: Problem,
    v: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(Box::new(TnpKr::new(settings(t)?, Kind::Full, p, v)?))
}

/// Which attention the blocks use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Softmax, chunk by chunk.
    Scan,
    /// Softmax, whole score matrix.
    Full,
    /// Deep kernel attention.
    Dka,
    /// Random features.
    Performer,
}

/// A TNP-KR network.
pub struct TnpKr {
    observed: Tensor, // [2, 4]: row 1 = observed, row 0 = asked
    embed: Mlp,
    embed_norm: Norm,
    blocks: Vec<Block>,
    norm: Norm,
    decode: Mlp,
    config: Config,
    likelihood: &'static dyn Likelihood,
    covariates: usize,
}

impl TnpKr {
    /// Builds the network, or reopens it from saved parameters.
    ///
    /// # Errors
    /// [`Error::Input`] for settings that make no network.
    pub fn new(config: Config, kind: Kind, problem: Problem, params: &mut Params) -> Result<Self> {
        let outputs = config.head.outputs();
        Self::with_outputs(config, kind, problem, params, outputs)
    }

    /// [`TnpKr::new`] with any number of outputs, for models that make their own of them.
    pub(super) fn with_outputs(
        config: Config,
        kind: Kind,
        problem: Problem,
        params: &mut Params,
        outputs: usize,
    ) -> Result<Self> {
        config.head.check()?;
        match kind {
            Kind::Dka => problem.reads_exactly("tnp-kr-dka")?,
            Kind::Full => problem.reads_exactly("tnp-kr-full")?,
            Kind::Performer => problem.reads_exactly("tnp-kr-performer")?,
            Kind::Scan if config.published_start => {
                problem.reads_exactly("tnp-kr with published_start")?;
            }
            Kind::Scan => {}
        }
        if let Some([wide, narrow]) = config.bias_reach
            && !(narrow > 0.0 && wide >= narrow && wide.is_finite())
        {
            return Err(Error::input("bias_reach under [model] is no range of length scales")
                .fact("bias_reach", format!("[{wide}, {narrow}]"))
                .try_this("give the widest first, in model units: bias_reach = [1.5, 0.05]"));
        }
        let sizes =
            [config.width, config.blocks, config.heads, config.key_width, config.value_width];
        if sizes.contains(&0) || config.features == 0 {
            return Err(Error::input("a size under [model] is 0").try_this(
                "width, blocks, heads, key_width, value_width and features must be ≥ 1",
            ));
        }
        if !config.time_bias.is_empty() {
            in_time(&config, kind)?;
        }
        if config.metric == Metric::GreatCircle {
            on_the_globe(&config, kind, problem.dim)?;
        }
        let init = match config.weights {
            Weights::Orthogonal => Init::Orthogonal,
            Weights::Lecun => Init::LeCun,
        };
        let location = if config.embed_location { problem.dim } else { 0 };
        // Covariates come last: a model without them has the same weights before.
        let token = 4 + location + problem.likelihood.width() + problem.covariates;
        let mut scope = params.scope();
        let through =
            |first: usize, hidden: &[usize], last: usize| [&[first], hidden, &[last]].concat();
        Ok(TnpKr {
            observed: scope.get("observed", &[2, 4], &Init::Normal(0.5))?,
            embed: Mlp::new(
                &mut scope.at("embed"),
                &through(token, &config.embed, config.width),
                Activation::Gelu,
                &init,
            )?,
            embed_norm: Norm::new(&mut scope.at("embed_norm"), config.width)?,
            blocks: (0..config.blocks)
                .map(|i| {
                    let mut scope = scope.at(&format!("block.{i}"));
                    Block::new(&mut scope, (&config, i), kind, problem, &init)
                })
                .collect::<Result<_>>()?,
            norm: Norm::new(&mut scope.at("norm"), config.width)?,
            decode: Mlp::new(
                &mut scope.at("head"),
                &through(config.width, &config.head_widths, outputs),
                Activation::Gelu,
                &init,
            )?,
            config,
            likelihood: problem.likelihood,
            covariates: problem.covariates,
        })
    }

    /// Tokens `[batch, site, width]` of sites with features (observed) or without (asked).
    fn tokens(&self, sites: &Sites, features: Option<&Tensor>) -> Result<Tensor> {
        let (batch, len) = (sites.batch(), sites.len());
        let flag = self.observed.narrow(0, usize::from(features.is_some()), 1)?;
        let flag = flag.unsqueeze(0)?.broadcast_as((batch, len, 4))?;
        let blank = Tensor::zeros(
            (batch, len, self.likelihood.width()),
            sites.s.dtype(),
            sites.s.device(),
        )?;
        let mut parts = vec![flag];
        if self.config.embed_location {
            parts.push(sites.s.clone());
        }
        parts.push(features.cloned().unwrap_or(blank));
        if self.covariates > 0 {
            let found = sites.x.as_ref().map_or(0, |x| x.dims()[2]);
            let Some(x) = sites.x.as_ref().filter(|_| found == self.covariates) else {
                let what = "covariates of sites and of the model";
                return Err(Error::axis(what, found, self.covariates));
            };
            parts.push(squash(&x.to_dtype(sites.s.dtype())?)?);
        }
        Chain::new(&Tensor::cat(&parts, 2)?).mlp(&self.embed).norm(&self.embed_norm).run()
    }
}

/// Inverse hyperbolic sines: what lies far outside the context's values is far, and not out of bounds.
fn squash(x: &Tensor) -> Result<Tensor> {
    let size = x.abs()?;
    Ok(((x.sqr()? + 1.0)?.sqrt()? + size)?.log()?.mul(&x.sign()?)?)
}

/// Refuses a bias on time that makes no model.
fn in_time(config: &Config, kind: Kind) -> Result<()> {
    let refused = |why: &str| {
        let names: Vec<&str> = config.time_bias.iter().map(|t| t.name()).collect();
        Error::input(why).fact("time_bias", names.join(", "))
    };
    if config.time_bias.iter().any(|t| matches!(t, Term::Sink | Term::Wendland)) {
        return Err(refused("a bias on time has no sink and no end").try_this(
            "write for example time_bias = [\"exponential\", \"scalar\"] under [model]",
        ));
    }
    if matches!(kind, Kind::Dka | Kind::Performer) || config.published_start {
        return Err(refused("an attention by features, or as published, reads no time")
            .try_this("use kind = \"tnp-kr\", or leave `time_bias` out"));
    }
    Ok(())
}

/// Refuses a model that would measure great circles and yet not be at home on the globe.
fn on_the_globe(config: &Config, kind: Kind, dim: usize) -> Result<()> {
    let refused = |why: &str| Error::input(why).fact("metric", "great-circle");
    if dim != 2 {
        return Err(refused("great circles join sites of two coordinates, longitude and latitude")
            .fact("coordinates of a site", dim)
            .try_this("leave `metric` out, or ask for tasks in two dimensions"));
    }
    if matches!(kind, Kind::Dka | Kind::Performer) {
        return Err(refused("an attention by features reads coordinates and measures no distance")
            .try_this("use kind = \"tnp-kr\", or leave `metric` out"));
    }
    if config.embed_location {
        return Err(refused("tokens that hold a longitude have a seam where it jumps by 360")
            .try_this("set embed_location = false: the distance bias tells where sites are"));
    }
    Ok(())
}

/// One kernel regression block: the same weights serve targets and context.
struct Block {
    before: Norm,
    attention: Attention,
    between: Norm,
    feed_forward: Mlp,
}

impl Block {
    /// Number `index`.
    fn new(
        scope: &mut Scope,
        (c, index): (&Config, usize),
        kind: Kind,
        p: Problem,
        init: &Init,
    ) -> Result<Self> {
        Ok(Block {
            before: Norm::new(&mut scope.at("before"), c.width)?,
            attention: Attention::new(&mut scope.at("attention"), (c, index), kind, p, init)?,
            between: Norm::new(&mut scope.at("between"), c.width)?,
            feed_forward: Mlp::new(
                &mut scope.at("feed_forward"),
                &[c.width, c.feed_forward, c.width],
                Activation::Gelu,
                init,
            )?,
        })
    }

    /// Tokens `[batch, site, width]` after reading the context.
    fn read(&self, tokens: &Tensor, sites: Places, cache: &Cache) -> Result<Tensor> {
        match (&self.attention, cache) {
            (Attention::Dka { phi, norm, .. }, Cache::Kernel(summary)) => {
                let chain = Chain::new(tokens).keep().norm(&self.before).join(sites.s);
                self.fed(chain.summary(phi, summary).norm(norm).add_kept())
            }
            (Attention::Dka { norm, .. }, Cache::DeepKernel(kernel)) => {
                let read = kernel.read(&self.before.forward(tokens)?, sites.s)?;
                self.fed(Chain::new(&read).norm(norm).plus(tokens))
            }
            _ => {
                let normed = Chain::new(tokens).norm(&self.before);
                let (read, out) = self.attention.read(normed, sites, cache)?;
                self.fed(Chain::new(&read).dense(out).plus(tokens))
            }
        }
    }

    /// `x + feed_forward(between(x))`.
    fn fed(&self, x: Chain) -> Result<Tensor> {
        x.keep().norm(&self.between).mlp(&self.feed_forward).add_kept().run()
    }
}

/// Where sites are, and when where that is read.
#[derive(Clone, Copy)]
struct Places<'a> {
    s: &'a Tensor,
    t: Option<&'a Tensor>,
}

impl<'a> Places<'a> {
    fn of(sites: &'a Sites) -> Self {
        Places { s: &sites.s, t: sites.t.as_ref() }
    }
}

/// Times of a context: few, which keys are marked with, or many.
enum Times {
    Rounds(Rounds),
    Each(Tensor),
}

impl Times {
    fn of(t: &Tensor, key_width: usize) -> Result<Self> {
        // On a card keys are no wider than 64.
        let most = if t.device().is_cpu() { ROUNDS } else { ROUNDS.min(64 - key_width.min(64)) };
        Ok(match Rounds::of(t, most)? {
            Some(rounds) => Times::Rounds(rounds),
            None => Times::Each(t.clone()),
        })
    }
}

/// A layer's context, ready to be read by any number of targets.
enum Cache {
    /// With the times of its keys.
    Timed(Arc<Times>, Box<Cache>),
    Keys(Keys),
    /// Packed to be read and not to be learnt from.
    Reader(Box<Reader>),
    /// `Σ φ(k) ψ(k)ᵀ / (n √d)`, `[batch, features, width]`
    Kernel(Summary),
    Summed(Summed),
    /// The same on a GPU, where nothing is recorded for gradients.
    DeepKernel(Box<DeepKernel>),
}

enum Attention {
    Softmax {
        query: Dense,
        key: Dense,
        value: Mlp,
        out: Dense,
        /// `[head, term, 3]` before constraints, with the mask of what is on the log scale.
        bias: Option<RawBias>,
        /// The same on time.
        time: Option<RawBias>,
        heads: usize,
        whole: bool,
        start: Start,
        reading: Reading,
    },
    Dka {
        phi: Mlp,
        psi: Mlp,
        norm: Norm,
        width: usize,
    },
    Performer {
        query: Dense,
        key: Dense,
        value: Dense,
        out: Dense,
        performer: Performer,
        heads: usize,
    },
}

struct RawBias {
    terms: Vec<Term>,
    metric: Metric,
    raw: Tensor,
    /// 1 where the parameter is `sign · exp(raw)`, `[1, term, 3]`.
    logged: Tensor,
    /// Sign of logged parameters.
    sign: Tensor,
    /// 1 where the parameter is `|raw|`.
    folded: Tensor,
}

impl RawBias {
    /// The bias on distance, or that on time.
    fn new(scope: &mut Scope, c: &Config, in_time: bool) -> Result<Self> {
        let families = if in_time { &c.time_bias } else { &c.bias };
        let (heads, terms) = (c.heads, families.len());
        let (mut values, mut logged, mut sign, mut folded) = (vec![], vec![], vec![], vec![]);
        for head in 0..heads {
            for (j, term) in families.iter().enumerate() {
                // Position of this head and term on the ladder of scales, 0 = widest.
                let rank = (head * terms + j) as f64 / (heads * terms).max(2) as f64;
                let ladder = |widest: f64, finest: f64| widest * (finest / widest).powf(rank);
                let [wide, narrow] = c.bias_reach.unwrap_or([1.5, 0.05]);
                let scale = ladder(wide, narrow);
                let [wide, narrow] = c.bias_reach.unwrap_or([3.0, 0.3]);
                let support = ladder(wide, narrow);
                let [wide, narrow] = c.bias_reach.unwrap_or([2.0, 0.5]);
                let period = ladder(wide, narrow);
                let [mut a, mut b, shift] = match (c.bias_start, term) {
                    (_, Term::Sink) => [0.0, 0.0, 0.0],
                    // Time starts with next to no say: a network that never met it may be gone on with.
                    (_, Term::Scalar) if in_time => [-0.02 / scale, 0.0, 0.0],
                    (_, t) if in_time && t.is_log_kernel() => [0.02, 1.0 / scale, 0.0],
                    (_, Term::Exponential) if in_time => [0.02, 1.0 / scale, 0.0],
                    (_, Term::Periodic) if in_time => [0.02, 1.0 / period, 0.0],
                    (_, _) if in_time => [0.02, 1.0 / (scale * scale), 0.0],
                    (Widths::Equal, Term::Scalar) => [-1.0, 0.0, 0.0],
                    (Widths::Equal, _) => [1.0, 1.0, 0.0],
                    (Widths::Spread, Term::Scalar) => [-0.5 / scale, 0.0, 0.0],
                    // A head that sees no site learns nothing: a support is wider than a length scale.
                    (Widths::Spread, Term::Wendland) => [1.0, 1.0 / support, 0.0],
                    // Periods from two units of distance to a half.
                    (Widths::Spread, Term::Periodic) => [1.0, 1.0 / period, 0.0],
                    (Widths::Spread, Term::Exponential) => [1.0, 1.0 / scale, 0.0],
                    (Widths::Spread, t) if t.is_log_kernel() => [1.0, 1.0 / scale, 0.0],
                    (Widths::Spread, _) => [1.0, 1.0 / (scale * scale), 0.0],
                };
                let positive = c.bias_constraint == Constraint::Positive;
                let slope = positive && *term == Term::Scalar;
                let sharpness = positive && term.is_log_kernel();
                let width = positive && !matches!(term, Term::Scalar | Term::Sink);
                if slope {
                    a = (-a).ln();
                }
                if sharpness {
                    a = a.ln();
                }
                if width {
                    b = b.ln();
                }
                values.extend([a, b, shift]);
                if head == 0 {
                    logged.extend([f64::from(slope || sharpness), f64::from(width), 0.0]);
                    let direction = f64::from(sharpness) - f64::from(slope);
                    sign.extend([direction, f64::from(width), 0.0]);
                    let fold = c.bias_constraint == Constraint::Abs;
                    let (a, b) = (term.is_log_kernel(), !matches!(term, Term::Scalar | Term::Sink));
                    folded.extend([f64::from(fold && a), f64::from(fold && b), 0.0]);
                }
            }
        }
        let name = if in_time { "time_bias" } else { "bias" };
        let raw = scope.get(name, &[heads, terms, 3], &Init::Values(values))?;
        let constant = |v: Vec<f64>| -> Result<Tensor> {
            Ok(Tensor::from_vec(v, (1, terms, 3), raw.device())?.to_dtype(raw.dtype())?)
        };
        let (logged, sign, folded) = (constant(logged)?, constant(sign)?, constant(folded)?);
        let metric = if in_time { Metric::Euclidean } else { c.metric };
        Ok(RawBias { terms: families.clone(), metric, raw, logged, sign, folded })
    }

    fn bias(&self) -> Result<Bias> {
        let constants = [&self.logged, &self.sign, &self.folded];
        if let Some(params) = fused::constrain(&self.raw, constants) {
            return Ok(Bias { terms: self.terms.clone(), params: params?, metric: self.metric });
        }
        let exponential = self.raw.broadcast_mul(&self.logged)?.exp()?.broadcast_mul(&self.sign)?;
        let absolute = self.raw.abs()?.broadcast_mul(&self.folded)?;
        let plain = ((&self.logged + &self.folded)?.neg()? + 1.0)?;
        let params = ((self.raw.broadcast_mul(&plain)? + exponential)? + absolute)?;
        Ok(Bias { terms: self.terms.clone(), params, metric: self.metric })
    }
}

impl Attention {
    fn new(
        scope: &mut Scope,
        (c, index): (&Config, usize),
        kind: Kind,
        p: Problem,
        init: &Init,
    ) -> Result<Self> {
        if kind == Kind::Dka {
            let phi = [p.dim + c.width, c.features, c.features];
            return Ok(Attention::Dka {
                phi: Mlp::new(&mut scope.at("phi"), &phi, Activation::Gelu, init)?,
                psi: Mlp::new(
                    &mut scope.at("psi"),
                    &[c.width, c.features, c.width],
                    Activation::Gelu,
                    init,
                )?,
                norm: Norm::new(&mut scope.at("norm"), c.width)?,
                width: c.width,
            });
        }
        let (keys, values) = (c.heads * c.key_width, c.heads * c.value_width);
        if kind == Kind::Performer {
            let out = Dense::new(&mut scope.at("out"), values, c.width, init)?;
            let (device, dtype) = out.place();
            let mut rng = Stream::new(c.features_seed, "performer", index as u64);
            let (d, equal) = (c.key_width, c.features_equal);
            return Ok(Attention::Performer {
                query: Dense::new(&mut scope.at("query"), c.width, keys, init)?,
                key: Dense::new(&mut scope.at("key"), c.width, keys, init)?,
                value: Dense::new(&mut scope.at("value"), c.width, values, init)?,
                performer: Performer::new(d, c.features, equal, &mut rng, device, dtype)?,
                out,
                heads: c.heads,
            });
        }
        let through = match c.value {
            Value::Dense => vec![c.width, values],
            Value::Mlp => vec![c.width, 2 * c.width, values],
        };
        Ok(Attention::Softmax {
            query: Dense::new(&mut scope.at("query"), c.width, keys, init)?,
            key: Dense::new(&mut scope.at("key"), c.width, keys, init)?,
            value: Mlp::new(&mut scope.at("value"), &through, Activation::Relu, init)?,
            out: Dense::new(&mut scope.at("out"), values, c.width, init)?,
            bias: if c.bias.is_empty() { None } else { Some(RawBias::new(scope, c, false)?) },
            time: if c.time_bias.is_empty() { None } else { Some(RawBias::new(scope, c, true)?) },
            heads: c.heads,
            whole: kind == Kind::Full,
            start: if c.published_start { Start::Published } else { Start::Exact },
            reading: p.reading,
        })
    }

    /// What targets will read: from the context's normalised tokens `[batch, context, width]`.
    fn cache(
        &self,
        normed: &Tensor,
        sites: &Tensor,
        mask: &Tensor,
        times: Option<&Arc<Times>>,
    ) -> Result<Cache> {
        let Some(times) = times else { return self.cache_of(normed, sites, mask, None) };
        let cache = self.cache_of(normed, sites, mask, Some(times))?;
        Ok(Cache::Timed(times.clone(), Box::new(cache)))
    }

    fn cache_of(
        &self,
        normed: &Tensor,
        sites: &Tensor,
        mask: &Tensor,
        times: Option<&Times>,
    ) -> Result<Cache> {
        match self {
            Attention::Softmax { key, value, heads, bias, whole, start, reading, .. } => {
                let split = |x: Tensor| -> Result<Tensor> {
                    let (batch, len, width) = x.dims3()?;
                    Ok(x.reshape((batch, len, *heads, width / heads))?)
                };
                if fused::applies(normed)
                    && normed.track_op()
                    && let Some(value) = value.alone()
                {
                    // One layer gives keys and values side by side, as they will be read.
                    let both = key.beside(value, *heads)?;
                    let (batch, len, _) = normed.dims3()?;
                    let wide = both.outputs() / heads;
                    let packed = both.forward(normed)?.reshape((batch, len, *heads, wide))?;
                    let d = key.outputs() / heads;
                    let (packed, d) = match times {
                        Some(Times::Rounds(rounds)) => {
                            let [k, v] =
                                [(0, d), (d, wide - d)].map(|(i, n)| packed.narrow(3, i, n));
                            (Tensor::cat(&[rounds.mark(&k?)?, v?], 3)?, d + rounds.len())
                        }
                        _ => (packed, d),
                    };
                    return Ok(Cache::Keys(Keys::joined(packed, d, sites, mask)?));
                }
                let (mut k, v) = (split(key.forward(normed)?)?, split(value.forward(normed)?)?);
                if let Some(Times::Rounds(rounds)) = times {
                    k = rounds.mark(&k)?;
                }
                let each = matches!(times, Some(Times::Each(_)));
                if !each && Reader::takes(&k) && !v.track_op() && !whole && *start == Start::Exact {
                    let bias = bias.as_ref().map(|b| b.bias()?.collapse()).transpose()?;
                    let reader = Reader::new(&k, &v, sites, mask, bias.as_ref(), *reading)?;
                    return Ok(Cache::Reader(Box::new(reader)));
                }
                let keys = Keys::pack(&k, &v, sites, mask)?;
                // Without a gradient: what is learned is learned in f32.
                let asked = !k.track_op() && !v.track_op();
                let precision = if asked { reading.precision } else { Precision::F32 };
                Ok(Cache::Keys(if *whole || each { keys } else { keys.read_in(precision) }))
            }
            Attention::Performer { key, value, performer, heads, .. } => {
                let mut total: Option<Tensor> = None;
                // Memory, and sums of f32 over few sites; a sum that is learnt from is one.
                let most = if fused::asked(normed) { SITES } else { normed.dim(1)?.max(1) };
                for start in (0..normed.dim(1)?.max(1)).step_by(most) {
                    let len = most.min(normed.dim(1)? - start);
                    let (part, mask) = (normed.narrow(1, start, len)?, mask.narrow(1, start, len)?);
                    let (k, v) = (key.forward(&part)?, value.forward(&part)?);
                    let sum = performer.sum(&cut(&k, *heads)?, &cut(&v, *heads)?, &mask)?.matrix;
                    total = Some(match total {
                        Some(before) => (before + sum)?,
                        None => sum,
                    });
                }
                Ok(Cache::Summed(Summed { matrix: total.expect("one part at least") }))
            }
            Attention::Dka { phi, psi, width, .. } => {
                let matrix = summarise(phi, psi, normed, sites, mask, *width)?;
                let kernel = phi.gelu_pair().map(|layers| DeepKernel::new(layers, &matrix));
                Ok(match kernel.transpose()?.flatten() {
                    Some(kernel) => Cache::DeepKernel(Box::new(kernel)),
                    None => Cache::Kernel(Summary::new(matrix, phi)?),
                })
            }
        }
    }

    /// Reads the context for normalised tokens `[batch, site, width]` at `sites`: the values of all
    /// heads `[batch, site, head · w]`, and the layer that is to turn them into tokens.
    fn read(&self, normed: Chain, places: Places, cache: &Cache) -> Result<(Tensor, &Dense)> {
        let sites = places.s;
        if let (Attention::Performer { query, out, performer, heads, .. }, Cache::Summed(summed)) =
            (self, cache)
        {
            let q = normed.dense(query).run()?;
            let read = performer.read(&cut(&q, *heads)?, summed)?;
            return Ok((read.flatten_from(2)?, out));
        }
        let Attention::Softmax { query, out, bias, time, heads, whole, start, .. } = self else {
            unreachable!("a cache is read by the attention that made it")
        };
        let mut q = normed.dense(query).run()?;
        let in_time = time.as_ref().map(RawBias::bias).transpose()?;
        let (mut each, mut cache) = (None, cache);
        if let (Cache::Timed(times, inner), Some(in_time), Some(t)) = (cache, &in_time, places.t) {
            cache = inner;
            match &**times {
                Times::Rounds(rounds) => {
                    q = rounds.ask(&cut(&q, *heads)?, t, in_time)?.flatten_from(2)?;
                }
                Times::Each(context) => {
                    each = Some(InTime { bias: in_time, targets: t, context });
                }
            }
        }
        let split = || cut(&q, *heads);
        let read = match cache {
            Cache::Timed(..) => {
                return Err(Error::axis("times of targets and of the context", "without", "with"));
            }
            Cache::Keys(keys) => {
                let bias = bias.as_ref().map(RawBias::bias).transpose()?;
                let bias = bias.as_ref();
                let fused = fused::applies(&q) && *start == Start::Exact && !keys.is_empty();
                match whole {
                    true => full_in_time(&split()?, sites, keys, bias, each)?.flatten_from(2)?,
                    false if each.is_some() => {
                        let each = each.expect("just asked");
                        scan_in_time(&split()?, sites, keys, bias, CHUNK, each)?.flatten_from(2)?
                    }
                    false if fused => scan_joined(&q, sites, keys, bias)?,
                    false => scan(&split()?, sites, keys, bias, CHUNK, *start)?.flatten_from(2)?,
                }
            }
            Cache::Reader(reader) => reader.read(&split()?, sites)?.flatten_from(2)?,
            Cache::Kernel(_) | Cache::Summed(_) | Cache::DeepKernel(_) => {
                unreachable!("a cache is read by the attention that made it")
            }
        };
        Ok((read, out))
    }
}

/// `[batch, site, width]` → `[batch, site, head, width / head]`.
fn cut(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, len, width) = x.dims3()?;
    Ok(x.reshape((batch, len, heads, width / heads))?)
}

/// `Σ φ(k, s) ψ(k)ᵀ / (n √d)` over observed sites, `[batch, features, width]`. The published
/// features are divided by d^¼, those of context and targets alike: hence the √d.
fn summarise(
    phi: &Mlp,
    psi: &Mlp,
    normed: &Tensor,
    sites: &Tensor,
    mask: &Tensor,
    width: usize,
) -> Result<Tensor> {
    let n = mask.sum_keepdim(1)?.maximum(1.0)?.unsqueeze(2)?; // [batch, 1, 1]
    let scale = (n * (width as f64).sqrt())?;
    let part = |start: usize, len: usize| -> Result<[Tensor; 2]> {
        let part = |x: &Tensor| x.narrow(1, start, len);
        let (normed, mask) = (part(normed)?, part(mask)?.unsqueeze(2)?);
        let k = Chain::new(&normed).join(&part(sites)?).mlp(phi).run()?;
        // A site that is hidden has no value: its features do not matter then.
        Ok([k, Chain::new(&normed).mlp(psi).scale(&mask).run()?])
    };
    let (batch, len, _) = normed.dims3()?;
    if !fused::asked(normed) {
        let [k, v] = part(0, len)?;
        return Ok(k.transpose(1, 2)?.contiguous()?.matmul(&v)?.broadcast_div(&scale)?);
    }
    // Sums of f32 over few sites, and sums of those in f64 and in a fixed order.
    let spans: Vec<Vec<f64>> = (0..len.div_ceil(SITES))
        .into_par_iter()
        .map(|span| {
            let mut sum = Vec::new();
            for start in (span * SITES..len.min((span + 1) * SITES)).step_by(SUMMED) {
                let [k, v] = part(start, SUMMED.min(len - start))?;
                let (rows, features, width) = (k.dim(1)?, k.dim(2)?, v.dim(2)?);
                sum.resize(batch * features * width, 0.0);
                let (k, v) = (Host::of(&k)?, Host::of(&v)?);
                let mut some = vec![0.0; features * width];
                for (item, sum) in sum.chunks_exact_mut(features * width).enumerate() {
                    let k = View::new(&k[item * rows * features..], rows, features, features);
                    let v = View::new(&v[item * rows * width..], rows, width, width);
                    matrix::product(&mut some, width, 0.0, 1.0, k.t(), v, false);
                    sum.iter_mut().zip(&some).for_each(|(sum, x)| *sum += f64::from(*x));
                }
            }
            Ok(sum)
        })
        .collect::<Result<_>>()?;
    let (features, width) = (phi.outputs(), psi.outputs());
    let mut total = vec![0.0; batch * features * width];
    for span in spans {
        total.iter_mut().zip(span).for_each(|(total, x)| *total += x);
    }
    let total = Tensor::from_vec(total, (batch, features, width), normed.device())?;
    Ok(total.broadcast_div(&scale.to_dtype(DType::F64)?)?.to_dtype(normed.dtype())?)
}

/// Sites whose products are summed in f32.
const SUMMED: usize = 512;

/// A context as each block's targets read it.
pub(super) struct Caches(Vec<Cache>);

struct Conditioned<'a> {
    model: &'a TnpKr,
    caches: Caches,
}

/// Context sites whose intermediate results are held at once: memory, never the answer.
const SITES: usize = 4096;
/// The same for targets.
const TARGETS: usize = 16_384;

/// `f(start, len)` for parts of `sites` sites, `most` at a time, joined along the axis of sites.
fn in_parts(
    sites: usize,
    most: usize,
    f: impl Fn(usize, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    if sites <= most {
        return f(0, sites);
    }
    let parts = (0..sites).step_by(most).map(|start| f(start, most.min(sites - start)));
    Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?)
}

impl TnpKr {
    /// The times of a context, for a model that reads them; those that others have are passed over.
    fn times(&self, sites: &Sites) -> Result<Option<Arc<Times>>> {
        if self.config.time_bias.is_empty() {
            return Ok(None);
        }
        let Some(t) = &sites.t else {
            return Err(Error::axis("times of sites and of the model", "without", "with"));
        };
        Ok(Some(Arc::new(Times::of(t, self.config.key_width)?)))
    }

    /// What targets will read of a context; with `tokens`, also the context's own tokens after the
    /// last block, normalised: `[batch, context, width]`.
    pub(super) fn encode(
        &self,
        context: &Observations,
        tokens: bool,
    ) -> Result<(Caches, Option<Tensor>)> {
        let context = &at_least_one(context)?;
        let features = self.likelihood.features(context)?;
        let mut x = in_parts(context.len(), SITES, |start, len| {
            let part = features.narrow(1, start, len)?;
            self.tokens(&context.sites.narrow(start, len)?, Some(&part))
        })?;
        let sites = &context.sites.s;
        let times = self.times(&context.sites)?;
        let mut caches = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            let normed = block.before.forward(&x)?;
            let cache = block.attention.cache(&normed, sites, &context.mask, times.as_ref())?;
            // Targets do not read the context's tokens after the last block.
            if tokens || i + 1 < self.blocks.len() {
                x = in_parts(context.len(), SITES, |start, len| {
                    let part = context.sites.narrow(start, len)?;
                    block.read(&x.narrow(1, start, len)?, Places::of(&part), &cache)
                })?;
            }
            caches.push(cache);
        }
        let tokens = if tokens { Some(self.norm.forward(&x)?) } else { None };
        Ok((Caches(caches), tokens))
    }

    /// The network's outputs at targets, `[batch, target, outputs]`.
    pub(super) fn decode(&self, caches: &Caches, targets: &Sites) -> Result<Tensor> {
        in_parts(targets.len(), TARGETS, |start, len| {
            let targets = targets.narrow(start, len)?;
            let mut tokens = self.tokens(&targets, None)?;
            for (block, cache) in self.blocks.iter().zip(&caches.0) {
                tokens = block.read(&tokens, Places::of(&targets), cache)?;
            }
            Chain::new(&tokens).norm(&self.norm).mlp(&self.decode).run()
        })
    }
}

impl Process for TnpKr {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let (caches, _) = self.encode(context, false)?;
        Ok(Box::new(Conditioned { model: self, caches }))
    }

    fn any_dimension(&self) -> bool {
        let softmax = |b: &Block| matches!(b.attention, Attention::Softmax { .. });
        let plane = self.config.metric == Metric::Euclidean;
        plane && !self.config.embed_location && self.blocks.iter().all(softmax)
    }

    fn memory(&self, sites: usize) -> Memory {
        let c = &self.config;
        let performer = matches!(self.blocks[0].attention, Attention::Performer { .. });
        let dka = matches!(self.blocks[0].attention, Attention::Dka { .. });
        let whole = matches!(self.blocks[0].attention, Attention::Softmax { whole: true, .. });
        let marks = if c.time_bias.is_empty() { 0 } else { ROUNDS };
        let (keys, values) = (c.heads * (c.key_width + marks), c.heads * c.value_width);
        // f32s of one token on its way through a block of a model that is only asked: the stream
        // before and after, normed, and read; queries, and values as read and as cut. What the
        // layers have between is never held.
        let scores = if whole { 5 * c.heads * sites } else { 0 };
        let exponents = if performer { 3 * c.heads * c.features + keys } else { 0 };
        let read = if dka { 0 } else { 2 * keys + 3 * values + scores + exponents };
        let token = 4 * c.width + read + 16;
        // What a block keeps of a site, and what it takes on the way there. Hidden values of an
        // MLP are twice a token wide.
        let halved = self.observed.device().is_cpu()
            && matches!(self.blocks[0].attention,
            Attention::Softmax { reading, .. } if reading.precision == Precision::Bf16);
        let kept = match (dka || performer, halved) {
            (true, _) => 0,
            (_, true) => (keys + values).div_ceil(2) + 4,
            (_, false) => keys + values + 4,
        };
        let packing = if dka { 0 } else { keys + 3 * values + 2 * c.width + 16 };
        // A block's context may be one matrix, kept as it is and as it is read. On the way there
        // are sums in f64, and for each thread the features of some sites.
        let matrix = match (dka, performer) {
            (true, _) => c.features * c.width,
            (_, true) => c.heads * c.features * (c.value_width + 1),
            _ => 0,
        };
        let features = if dka { SUMMED.min(sites) * (c.features + 3 * c.width) } else { 0 };
        let threads = rayon::current_num_threads();
        let summing = threads * (features + 3 * matrix) + 2 * matrix * sites.div_ceil(SITES);
        let held = 4 * self.blocks.len() * (sites * kept + 2 * matrix);
        let streams = sites * (4 * c.width + 8);
        let part = SITES.min(sites) * token;
        Memory {
            conditioning: held + 4 * (streams + part.max(sites * packing + summing)),
            held,
            target: 4 * (token + 12 * c.head.outputs()),
        }
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let model = self.model;
        let raw = model.decode(&self.caches, targets)?;
        model.config.head.predictive(model.likelihood.link(), &raw)
    }

    fn tally(&self) -> Option<[u64; 2]> {
        let one = |cache: &Cache| match cache {
            Cache::Timed(_, inner) => match &**inner {
                Cache::Reader(reader) => Some(reader.tally()),
                _ => None,
            },
            Cache::Reader(reader) => Some(reader.tally()),
            _ => None,
        };
        let tally = self.caches.0.iter().filter_map(one).reduce(|a, b| a + b)?;
        Some([tally.read, tally.all])
    }
}
