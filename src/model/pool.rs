//! A set of observations as one vector: encode each, pool, encode the whole.
//!
//! Source: Zaheer et al. (2017), arXiv:1703.06114; with self-attention before pooling, Kim et al.
//! (2019), arXiv:1901.05761. What was observed is the same in any order.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    anp_block::AnpBlock,
    layer::{Activation, Chain, Mlp},
    params::{Init, Scope},
};
use crate::{error::Result, likelihood::Likelihood, sites::Observations};

/// How encodings become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// Their mean: says nothing of how many there were.
    Mean,
    /// Their sum: unlike any seen in training where there are more than ever were.
    Sum,
}

/// What a [`Pool`] is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Features of an observation.
    pub inputs: usize,
    /// Features of every layer.
    pub width: usize,
    /// Dense layers before pooling.
    pub before: usize,
    /// Dense layers after pooling; without any the pooled vector is the answer.
    pub after: usize,
    /// Features of the answer; those of the pooled vector where no layer follows.
    pub outputs: usize,
    /// How encodings become one.
    pub by: By,
    /// Whether ln(1 + number of observations) is told after pooling; needs a layer that reads it.
    pub count: bool,
    /// Between layers.
    pub activation: Activation,
}

/// One vector for each row of observations.
#[derive(Debug)]
pub struct Pool {
    before: Mlp,
    attend: Option<AnpBlock>,
    after: Option<Mlp>,
    by: By,
    count: bool,
    activation: Activation,
}

/// `[inputs, width, …, outputs]` for `layers` dense layers.
pub(crate) fn widths(inputs: usize, width: usize, layers: usize, outputs: usize) -> Vec<usize> {
    let mut widths = vec![inputs];
    widths.resize(layers.max(1), width);
    widths.push(outputs);
    widths
}

impl Pool {
    /// From a plan; `attend` makes the block of self-attention, which stands in for the last two
    /// layers before pooling.
    pub fn new(scope: &mut Scope, plan: &Plan, attend: Option<AnpBlock>) -> Result<Self> {
        let Plan { inputs, width, outputs, activation, .. } = *plan;
        let layers = if attend.is_some() { plan.before.saturating_sub(2) } else { plan.before };
        let mut mlp = |name: &str, widths: &[usize]| {
            Mlp::new(&mut scope.at(name), widths, activation, &Init::LeCun)
        };
        let after = match plan.after {
            0 => None,
            layers => {
                let inputs = width + usize::from(plan.count);
                Some(mlp("after", &widths(inputs, width, layers, outputs))?)
            }
        };
        Ok(Pool {
            before: mlp("before", &widths(inputs, width, layers, width))?,
            attend,
            after,
            by: plan.by,
            count: plan.count,
            activation,
        })
    }

    /// Observed features `[batch, site, inputs]` at `sites` `[batch, site, dim]`, of which those
    /// count whose `mask` `[batch, site]` is 1, as one vector `[batch, 1, outputs]`.
    pub fn of(&self, features: &Tensor, sites: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let tokens = Chain::new(features).mlp(&self.before);
        let tokens = match &self.attend {
            None => tokens.run()?,
            Some(attend) => {
                attend.itself(&tokens.activation(self.activation).run()?, sites, mask)?
            }
        };
        self.pooled(&tokens, mask)
    }

    /// Encodings `[batch, site, width]` as one vector `[batch, 1, outputs]`.
    fn pooled(&self, tokens: &Tensor, mask: &Tensor) -> Result<Tensor> {
        // A product of matrices: the mask weighs and sums in one pass.
        let mut pooled = mask.unsqueeze(1)?.matmul(tokens)?; // [batch, 1, width]
        let n = mask.sum_keepdim(1)?.unsqueeze(2)?; // [batch, 1, 1]
        if self.by == By::Mean {
            pooled = pooled.broadcast_div(&n.maximum(1.0)?)?;
        }
        if self.count {
            pooled = Tensor::cat(&[pooled, (n + 1.0)?.log()?], 2)?;
        }
        match &self.after {
            Some(after) => after.forward(&pooled),
            None => Ok(pooled),
        }
    }

    /// The same for several sets that share encodings: `masks` are of the same `features`. Nothing
    /// where observations attend to each other, since then no encoding is shared.
    pub fn of_each(&self, features: &Tensor, masks: &[&Tensor]) -> Result<Option<Vec<Tensor>>> {
        if self.attend.is_some() {
            return Ok(None);
        }
        let tokens = self.before.forward(features)?;
        Ok(Some(masks.iter().map(|mask| self.pooled(&tokens, mask)).collect::<Result<_>>()?))
    }
}

/// What a network reads of each observation, where it stands first: `[batch, site, dim + features]`.
pub(crate) fn features(likelihood: &dyn Likelihood, seen: &Observations) -> Result<Tensor> {
    Ok(Tensor::cat(&[&seen.sites.s, &likelihood.features(seen)?], 2)?)
}

/// The observations, or one site that nobody observed where there are none: no operation then
/// meets an empty tensor, and every parameter keeps its gradient.
pub(crate) fn at_least_one(seen: &Observations) -> Result<Observations> {
    if !seen.is_empty() {
        return Ok(seen.clone());
    }
    let one = |x: &Tensor| {
        let mut shape = x.dims().to_vec();
        shape[1] = 1;
        Tensor::zeros(shape, x.dtype(), x.device())
    };
    let mut some = seen.clone();
    (some.y, some.mask) = (one(&seen.y)?, one(&seen.mask)?);
    some.trials = seen.trials.as_ref().map(one).transpose()?;
    some.sites.s = one(&seen.sites.s)?;
    some.sites.t = seen.sites.t.as_ref().map(one).transpose()?;
    some.sites.x = seen.sites.x.as_ref().map(one).transpose()?;
    Ok(some)
}

/// The mean over observed sites: `x` `[batch, site, w]`, `mask` `[batch, site]` → `[batch, 1, w]`,
/// 0 where nothing was observed.
pub(crate) fn masked_mean(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mask = mask.unsqueeze(2)?;
    let sum = x.broadcast_mul(&mask)?.sum_keepdim(1)?;
    Ok(sum.broadcast_div(&mask.sum_keepdim(1)?.maximum(1.0)?)?)
}
