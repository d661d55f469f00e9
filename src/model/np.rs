//! Latent neural process: one random vector for the whole surface, beside the pooled context.
//!
//! Sources: Garnelo et al. (2018), arXiv:1807.01622; sizes and the two paths as BNP and TNP have
//! them (Lee et al. 2020, arXiv:2008.02956), where it has 232,194 parameters on a line. The
//! original has no deterministic path: `deterministic = false`. Departures: GELU where the authors
//! use ReLU (`activation`), LeCun weights.

use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    decoder::Decoder,
    head::Head,
    latent,
    layer::Activation,
    params::Params,
    paths::{Latent, Paths},
    pool::{By, Plan, Pool},
    settings,
};
use crate::{error::Result, process::Process};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "np",
    about: "latent neural process: coherent samples by one z for all sites (Garnelo et al. 2018, arXiv:1807.01622)",
    build,
    joint: true,
    tiny: "width = 8\ndepth = 2\nhead = { components = 2 }\nlatent = { width = 5, samples = 3, ask = 4 }",
};

/// Settings of a latent neural process; the defaults are the sizes of BNP and TNP.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Hidden width.
    pub width: usize,
    /// Hidden layers before pooling.
    pub depth: usize,
    /// Dense layers after pooling.
    pub after: usize,
    /// Hidden layers of the decoder.
    pub decode: usize,
    /// Whether the decoder reads the pooled context too, or z alone.
    pub deterministic: bool,
    /// How encodings become one.
    pub pool: By,
    /// Whether ln(1 + number of observations) is told after pooling.
    pub count: bool,
    /// Between layers.
    pub activation: Activation,
    /// The latent path.
    pub latent: latent::Settings,
    /// Predictive family.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            width: 128,
            depth: 3,
            after: 2,
            decode: 2,
            deterministic: true,
            pool: By::Mean,
            count: false,
            activation: Activation::Gelu,
            latent: latent::Settings::default(),
            head: Head::default(),
        }
    }
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    config.head.check()?;
    config.latent.check()?;
    problem.reads_exactly("np")?;
    let plan = Plan {
        inputs: problem.dim + problem.likelihood.width(),
        width: config.width,
        before: config.depth + 1,
        after: config.after,
        outputs: config.width,
        by: config.pool,
        count: config.count,
        activation: config.activation,
    };
    // Means and sds of z have a last layer of their own, whatever follows the pool elsewhere.
    let of_z =
        Plan { after: config.after.max(1), outputs: 2 * config.latent.width, ..plan.clone() };
    let mut scope = params.scope();
    let mut pools = Vec::new();
    let mut parts = vec![("site", problem.dim)];
    if config.deterministic {
        pools.push(Pool::new(&mut scope.at("pool"), &plan, None)?);
        parts.push(("pool", config.width));
    }
    parts.push(("latent", config.latent.width));
    let pool = Pool::new(&mut scope.at("latent"), &of_z, None)?;
    let (layers, outputs) = (config.decode + 1, config.head.outputs());
    let scope = &mut scope.at("decode");
    Ok(Box::new(Paths {
        cross: None,
        pools,
        latent: Some(Latent { pool, settings: config.latent }),
        decode: Decoder::new(scope, &parts, config.width, layers, outputs, config.activation)?,
        head: config.head,
        likelihood: problem.likelihood,
    }))
}
