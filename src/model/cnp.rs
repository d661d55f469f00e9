//! Conditional neural process: encode each observation, average, decode each target.
//!
//! Source: Garnelo et al. (2018), arXiv:1807.01613. One departure: GELU where the authors use ReLU.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    head::Head,
    layer::{Activation, Mlp},
    params::{Init, Params},
    settings, spread,
};
use crate::{
    error::Result,
    likelihood::Likelihood,
    predictive::Predictive,
    process::{Memory, Posterior, Process},
    sites::{Observations, Sites},
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "cnp",
    about: "conditional neural process: mean-pooled context (Garnelo et al. 2018, arXiv:1807.01613)",
    build,
    joint: false,
    tiny: "width = 8\ndepth = 2\nhead = { components = 2 }",
};

/// Settings of a [`Cnp`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Hidden width.
    pub width: usize,
    /// Hidden layers of encoder and decoder.
    pub depth: usize,
    /// Predictive family.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config { width: 128, depth: 3, head: Head::default() }
    }
}

/// Conditional neural process.
pub struct Cnp {
    encode: Mlp,
    decode: Mlp,
    head: Head,
    likelihood: &'static dyn Likelihood,
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    config.head.check()?;
    problem.reads_exactly("cnp")?;
    let hidden = vec![config.width; config.depth];
    let widths = |first: usize, last: usize| [&[first], hidden.as_slice(), &[last]].concat();
    let mut scope = params.scope();
    let mlp = |scope: &mut super::params::Scope, widths: &[usize]| {
        Mlp::new(scope, widths, Activation::Gelu, &Init::LeCun)
    };
    let observation = problem.dim + problem.likelihood.width();
    Ok(Box::new(Cnp {
        encode: mlp(&mut scope.at("encode"), &widths(observation, config.width))?,
        decode: mlp(
            &mut scope.at("decode"),
            &widths(config.width + problem.dim, config.head.outputs()),
        )?,
        head: config.head,
        likelihood: problem.likelihood,
    }))
}

/// The mean over observed sites: `x` `[batch, site, w]`, `mask` `[batch, site]` → `[batch, 1, w]`,
/// 0 where nothing was observed.
fn masked_mean(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mask = mask.unsqueeze(2)?;
    let sum = x.broadcast_mul(&mask)?.sum_keepdim(1)?;
    Ok(sum.broadcast_div(&mask.sum_keepdim(1)?.maximum(1.0)?)?)
}

struct Conditioned<'a> {
    model: &'a Cnp,
    summary: Tensor, // [batch, 1, width]
}

impl Process for Cnp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let features = self.likelihood.features(context)?;
        let tokens = self.encode.forward(&Tensor::cat(&[&context.sites.s, &features], 2)?)?;
        let summary = masked_mean(&tokens, &context.mask)?;
        Ok(Box::new(Conditioned { model: self, summary }))
    }

    fn memory(&self, sites: usize) -> Memory {
        // What enters, its parts and what comes out; nothing between is held by a model that is
        // only asked.
        let each = 4 * (3 * self.encode.widest().max(self.decode.widest()) + 16);
        Memory { conditioning: sites * each, held: 4 * self.encode.widest(), target: each + 256 }
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let summary = spread(&self.summary, targets.len())?; // [batch, target, width]
        let raw = self.model.decode.forward(&Tensor::cat(&[&summary, &targets.s], 2)?)?;
        self.model.head.predictive(self.model.likelihood.link(), &raw)
    }
}
