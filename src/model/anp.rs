//! Attentive neural process: every target attends to the context; with or without a latent path.
//!
//! Sources: Kim et al. (2019), arXiv:1901.05761; blocks and sizes as BNP and TNP have them (Lee et
//! al. 2020, arXiv:2008.02956): 348,418 parameters on a line, and 331,906 for `canp`, whose second
//! path is a pooled vector in the place of z. Departures: GELU where the authors use ReLU
//! (`activation`), LeCun weights, scores over √ of a head's width (`scale = "width"` for theirs).

use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    anp_block::{AnpBlock, Scale},
    decoder::Decoder,
    head::Head,
    latent,
    layer::Activation,
    params::Params,
    paths::{Cross, CrossPlan, Latent, Paths},
    pool::{By, Plan, Pool},
    settings,
};
use crate::{
    error::{Error, Result},
    process::Process,
};

/// With a latent path.
pub const ANP: Entry = Entry {
    name: "anp",
    about: "attentive neural process: cross-attention and a latent z (Kim et al. 2019, arXiv:1901.05761)",
    build: build_anp,
    joint: true,
    tiny: "width = 8\nheads = 2\nhead = { components = 2 }\nlatent = { width = 5, samples = 3, ask = 4 }",
};
/// Without one.
pub const CANP: Entry = Entry {
    name: "canp",
    about: "conditional attentive neural process: `anp` without a latent (Lee et al. 2020, arXiv:2008.02956)",
    build: build_canp,
    joint: false,
    tiny: "width = 8\nheads = 2\nhead = { components = 2 }",
};

/// Settings of an attentive neural process; the defaults are the sizes of BNP and TNP.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Hidden width.
    pub width: usize,
    /// Heads of attention.
    pub heads: usize,
    /// Dense layers of values and before pooling, of which self-attention replaces the last two.
    pub layers: usize,
    /// Dense layers of queries and keys.
    pub places: usize,
    /// Dense layers after pooling.
    pub after: usize,
    /// Hidden layers of the decoder.
    pub decode: usize,
    /// Whether observations attend to each other before they are read or pooled.
    pub self_attention: bool,
    /// What scores are divided by.
    pub scale: Scale,
    /// How encodings become one.
    pub pool: By,
    /// Whether ln(1 + number of observations) is told after pooling.
    pub count: bool,
    /// Between layers.
    pub activation: Activation,
    /// The latent path, which `canp` has not.
    pub latent: Option<latent::Settings>,
    /// Predictive family.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            width: 128,
            heads: 8,
            layers: 4,
            places: 2,
            after: 2,
            decode: 2,
            self_attention: true,
            scale: Scale::Head,
            pool: By::Mean,
            count: false,
            activation: Activation::Gelu,
            latent: None,
            head: Head::default(),
        }
    }
}

fn build_anp(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    problem.reads_exactly("anp")?;
    let latent = config.latent.clone().unwrap_or_default();
    latent.check()?;
    build(config, Some(latent), problem, params)
}

fn build_canp(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    problem.reads_exactly("canp")?;
    if config.latent.is_some() {
        return Err(Error::input("a conditional attentive neural process has no latent path")
            .try_this("leave `latent` out, or use kind = \"anp\""));
    }
    build(config, None, problem, params)
}

fn build(
    config: Config,
    latent: Option<latent::Settings>,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    config.head.check()?;
    let Config { width, heads, scale, activation, .. } = config;
    let inputs = problem.dim + problem.likelihood.width();
    let mut scope = params.scope();
    let cross = CrossPlan {
        dim: problem.dim,
        inputs,
        width,
        heads,
        scale,
        values: config.layers,
        places: config.places,
        itself: config.self_attention,
        activation,
    };
    let cross = Cross::new(&mut scope.at("cross"), &cross)?;
    let plan = Plan {
        inputs,
        width,
        before: config.layers,
        after: config.after,
        outputs: width,
        by: config.pool,
        count: config.count,
        activation,
    };
    let second = if latent.is_some() { "latent" } else { "pool" };
    let block = match config.self_attention {
        true => {
            let scope = &mut scope.at(second);
            Some(AnpBlock::new(&mut scope.at("itself"), width, heads, scale, activation)?)
        }
        false => None,
    };
    let plan = match &latent {
        Some(latent) => Plan { after: plan.after.max(1), outputs: 2 * latent.width, ..plan },
        None => plan,
    };
    let pool = Pool::new(&mut scope.at(second), &plan, block)?;
    let parts = [
        ("site", problem.dim),
        ("cross", width),
        (second, latent.as_ref().map_or(width, |l| l.width)),
    ];
    let (layers, outputs) = (config.decode + 1, config.head.outputs());
    let decode = Decoder::new(&mut scope.at("decode"), &parts, width, layers, outputs, activation)?;
    let (pools, latent) = match latent {
        Some(settings) => (Vec::new(), Some(Latent { pool, settings })),
        None => (vec![pool], None),
    };
    let (head, likelihood) = (config.head, problem.likelihood);
    Ok(Box::new(Paths { cross: Some(cross), pools, latent, decode, head, likelihood }))
}
