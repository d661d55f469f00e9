//! Multi-head attention with a residual and two norms: the block of the attentive neural process.
//!
//! Source: the `MultiHeadAttn` of Lee et al. (2020), arXiv:2008.02956, used by TNP for (C)ANP too:
//! queries, keys and values without biases; `x = norm(q + attention)`, then
//! `norm(x + activation(x W + b))`. The projected query is what is added, not what came in.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    layer::{Activation, Chain, Dense, Norm},
    params::{Init, Scope},
};
use crate::{
    attention::{CHUNK, Keys, Reader, Reading, Start, scan},
    error::{Error, Result},
    fused,
};

/// What the products of queries and keys are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// √ of a head's width, as nearly everybody has it.
    Head,
    /// √ of the whole width, as the code of BNP and TNP has it for (C)ANP.
    Width,
}

/// A block of attention from some sites to others.
#[derive(Debug)]
pub struct AnpBlock {
    query: Dense,
    key: Dense,
    value: Dense,
    out: Dense,
    norms: [Norm; 2],
    heads: usize,
    /// What queries are multiplied by so that the usual √ of a head's width gives the wanted one.
    factor: f64,
    activation: Activation,
}

/// A context ready to be attended to.
pub enum Cache {
    /// To learn from, in any precision.
    Keys(Keys),
    /// Packed to be read and not to be learnt from.
    Reader(Box<Reader>),
}

impl AnpBlock {
    /// All of `width` features: queries, keys, values and answer.
    ///
    /// # Errors
    /// [`Error::Input`] if `heads` does not divide `width`.
    pub fn new(
        scope: &mut Scope,
        width: usize,
        heads: usize,
        scale: Scale,
        activation: Activation,
    ) -> Result<Self> {
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(Error::input("the heads do not divide the width")
                .fact("width", width)
                .fact("heads", heads)
                .try_this("set `heads` under [model] to a divisor of `width`"));
        }
        let mut dense = |name: &str| Dense::linear(&mut scope.at(name), width, width, &Init::LeCun);
        let [query, key, value] = [dense("query")?, dense("key")?, dense("value")?];
        Ok(AnpBlock {
            query,
            key,
            value,
            out: Dense::new(&mut scope.at("out"), width, width, &Init::LeCun)?,
            norms: [
                Norm::new(&mut scope.at("norm.0"), width)?,
                Norm::new(&mut scope.at("norm.1"), width)?,
            ],
            heads,
            factor: match scale {
                Scale::Head => 1.0,
                Scale::Width => 1.0 / (heads as f64).sqrt(),
            },
            activation,
        })
    }

    /// What will be attended to: `keys` and `values` `[batch, context, width]`, at `sites`
    /// `[batch, context, dim]`, where `mask` `[batch, context]` is 1.
    pub fn cache(
        &self,
        keys: &Tensor,
        values: &Tensor,
        sites: &Tensor,
        mask: &Tensor,
    ) -> Result<Cache> {
        let (k, v) =
            (self.split(&self.key.forward(keys)?)?, self.split(&self.value.forward(values)?)?);
        if fused::asked(&k) && fused::asked(&v) {
            let reader = Reader::new(&k, &v, sites, mask, None, Reading::default())?;
            return Ok(Cache::Reader(Box::new(reader)));
        }
        Ok(Cache::Keys(Keys::pack(&k, &v, sites, mask)?))
    }

    /// The answer `[batch, target, width]` to `queries` `[batch, target, width]` at `sites`
    /// `[batch, target, dim]`. Where nothing was observed the attention is 0.
    pub fn read(&self, queries: &Tensor, sites: &Tensor, cache: &Cache) -> Result<Tensor> {
        let q = self.query.forward(queries)?;
        let split = self.split(&q)?;
        let split = if self.factor == 1.0 { split } else { (split * self.factor)? };
        let read = match cache {
            Cache::Keys(keys) => scan(&split, sites, keys, None, CHUNK, Start::Exact)?,
            Cache::Reader(reader) => reader.read(&split, sites)?,
        };
        let read = read.flatten_from(2)?;
        Chain::new(&read)
            .plus(&q)
            .norm(&self.norms[0])
            .keep()
            .dense(&self.out)
            .activation(self.activation)
            .add_kept()
            .norm(&self.norms[1])
            .run()
    }

    /// `[batch, site, width]` attending to itself where `mask` is 1.
    pub fn itself(&self, tokens: &Tensor, sites: &Tensor, mask: &Tensor) -> Result<Tensor> {
        self.read(tokens, sites, &self.cache(tokens, tokens, sites, mask)?)
    }

    /// `[batch, site, width]` → `[batch, site, head, width / heads]`.
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, sites, width) = x.dims3()?;
        Ok(x.reshape((batch, sites, self.heads, width / self.heads))?)
    }
}
