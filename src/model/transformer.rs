//! Multi-head attention between tokens, and the blocks of stock transformers.
//!
//! Source: Vaswani et al. (2017), arXiv:1706.03762: a norm after each addition. Nothing here knows of distance; [`super::tnp_kr`] has the kind that does.

use candle_core::Tensor;

use super::{
    layer::{Activation, Chain, Dense, Mlp, Norm},
    params::{Init, Scope},
};
use crate::{
    attention::{CHUNK, Keys, Start, scan},
    error::Result,
};

/// Multi-head attention: `softmax(q·k / √d) v` for each head of width d = width / heads.
#[derive(Debug)]
pub struct MultiHead {
    query: Dense,
    key: Dense,
    value: Dense,
    out: Dense,
    heads: usize,
}

impl MultiHead {
    /// Over tokens of `width`, which `heads` must divide; `biased` says whether queries, keys and
    /// values have a bias.
    pub fn new(scope: &mut Scope, width: usize, heads: usize, biased: bool) -> Result<Self> {
        let mut dense = |name: &str, biased: bool| {
            let make = if biased { Dense::new } else { Dense::linear };
            make(&mut scope.at(name), width, width, &Init::LeCun)
        };
        Ok(MultiHead {
            query: dense("query", biased)?,
            key: dense("key", biased)?,
            value: dense("value", biased)?,
            out: dense("out", true)?,
            heads,
        })
    }

    /// What `tokens` `[batch, site, width]` are to those who read them; `mask` `[batch, site]`.
    pub fn keys(&self, tokens: &Tensor, mask: &Tensor) -> Result<Keys> {
        // One layer gives keys and values side by side, as they will be read.
        let both = self.key.beside(&self.value, self.heads)?;
        let (batch, len, width) = tokens.dims3()?;
        let packed = both.forward(tokens)?;
        let packed = packed.reshape((batch, len, self.heads, both.outputs() / self.heads))?;
        Keys::joined(packed, width / self.heads, &nowhere(tokens)?, mask)
    }

    /// Queries of `tokens` `[batch, site, width]`: `[batch, site, head, d]`.
    pub fn queries(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, len, width) = tokens.dims3()?;
        let q = self.query.forward(tokens)?;
        Ok(q.reshape((batch, len, self.heads, width / self.heads))?)
    }

    /// What `tokens` `[batch, site, width]` read of `keys`: the values of all heads, before
    /// [`MultiHead::out`].
    pub fn read(&self, tokens: &Tensor, keys: &Keys) -> Result<Tensor> {
        let q = self.queries(tokens)?;
        let read = scan(&q, &nowhere(tokens)?, keys, None, CHUNK, Start::Exact)?;
        Ok(read.flatten_from(2)?)
    }

    /// What each token reads where it reads itself alone: its own values.
    pub fn read_itself(&self, tokens: &Tensor) -> Result<Tensor> {
        self.value.forward(tokens)
    }

    /// The layer that joins the heads.
    pub fn out(&self) -> &Dense {
        &self.out
    }
}

/// Sites for an attention that asks nobody where they are.
fn nowhere(tokens: &Tensor) -> Result<Tensor> {
    let (batch, len, _) = tokens.dims3()?;
    Ok(Tensor::zeros((batch, len, 1), tokens.dtype(), tokens.device())?)
}

/// A block with its norms after each addition.
#[derive(Debug)]
pub struct Block {
    /// The attention of the block.
    pub attention: MultiHead,
    between: Norm,
    feed_forward: Mlp,
    after: Norm,
}

impl Block {
    /// Over tokens of `width`, with `feed_forward` features and `activation` between the last two layers.
    pub fn new(
        scope: &mut Scope,
        width: usize,
        heads: usize,
        feed_forward: usize,
        activation: Activation,
    ) -> Result<Self> {
        Ok(Block {
            attention: MultiHead::new(&mut scope.at("attention"), width, heads, true)?,
            between: Norm::new(&mut scope.at("between"), width)?,
            feed_forward: Mlp::new(
                &mut scope.at("feed_forward"),
                &[width, feed_forward, width],
                activation,
                &Init::LeCun,
            )?,
            after: Norm::new(&mut scope.at("after"), width)?,
        })
    }

    /// `tokens` `[batch, site, width]` after reading `keys`.
    pub fn read(&self, tokens: &Tensor, keys: &Keys) -> Result<Tensor> {
        self.after_reading(tokens, &self.attention.read(tokens, keys)?)
    }

    /// `tokens` that have `read` the values of all heads: what the rest of the block makes of them.
    pub fn after_reading(&self, tokens: &Tensor, read: &Tensor) -> Result<Tensor> {
        Chain::new(read)
            .dense(self.attention.out())
            .plus(tokens)
            .norm(&self.between)
            .keep()
            .mlp(&self.feed_forward)
            .add_kept()
            .norm(&self.after)
            .run()
    }
}
