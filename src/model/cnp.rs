//! Conditional neural process: encode each observation, pool, decode each target.
//!
//! Source: Garnelo et al. (2018), arXiv:1807.01613; sizes as BNP and TNP have them (Lee et al.
//! 2020, arXiv:2008.02956): two encoders with layers after pooling, 215,682 parameters on a line.
//! The authors' own are `encoders = 1`, `after = 0`. Departures: GELU where the authors use ReLU
//! (`activation`), LeCun weights.

use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    decoder::Decoder,
    head::Head,
    layer::Activation,
    params::Params,
    paths::Paths,
    pool::{By, Plan, Pool},
    settings,
};
use crate::{
    error::{Error, Result},
    process::Process,
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "cnp",
    about: "conditional neural process: pooled context (Garnelo et al. 2018, arXiv:1807.01613)",
    build,
    joint: false,
    tiny: "width = 8\ndepth = 2\nhead = { components = 2 }",
};

/// Settings of a conditional neural process; the defaults are the sizes of BNP and TNP.
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
    /// Encoders side by side.
    pub encoders: usize,
    /// How encodings become one.
    pub pool: By,
    /// Whether ln(1 + number of observations) is told after pooling: a mean forgets it.
    pub count: bool,
    /// Between layers.
    pub activation: Activation,
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
            encoders: 2,
            pool: By::Mean,
            count: false,
            activation: Activation::Gelu,
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
    problem.reads_exactly("cnp")?;
    if config.encoders == 0 {
        return Err(Error::input("a conditional neural process without an encoder sees nothing")
            .try_this("set `encoders` under [model] to 1 or more"));
    }
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
    let mut scope = params.scope();
    let names: Vec<String> = (0..config.encoders).map(|i| format!("pool.{i}")).collect();
    let pools = names.iter().map(|name| Pool::new(&mut scope.at(name), &plan, None));
    let pools = pools.collect::<Result<_>>()?;
    let mut parts = vec![("site", problem.dim)];
    parts.extend(names.iter().map(|name| (name.as_str(), config.width)));
    let (layers, outputs) = (config.decode + 1, config.head.outputs());
    let scope = &mut scope.at("decode");
    Ok(Box::new(Paths {
        cross: None,
        pools,
        latent: None,
        decode: Decoder::new(scope, &parts, config.width, layers, outputs, config.activation)?,
        head: config.head,
        likelihood: problem.likelihood,
    }))
}
