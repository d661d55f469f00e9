//! Full attention, composed from tensor operations: the reference the fast versions must equal.

use candle_core::{D, Tensor};

use super::{Bias, Keys, bias::squared_distances};
use crate::error::Result;

/// `Σₖ wₖ vₖ` for each query, `w = softmax(q·k / √d + bias)` over observed sites. Holds the whole
/// score matrix. A query with no observed key gets 0.
///
/// # Shapes
/// `q` `[batch, target, head, d]`, `sites` `[batch, target, dim]`; returns `[batch, target, head, w]`.
pub fn full(q: &Tensor, sites: &Tensor, keys: &Keys, bias: Option<&Bias>) -> Result<Tensor> {
    let (batch, targets, heads, d) = q.dims4()?;
    let width = keys.value_width();
    if keys.is_empty() {
        return Ok(Tensor::zeros((batch, targets, heads, width), q.dtype(), q.device())?);
    }
    let q = q.transpose(1, 2)?.contiguous()?; // [batch, head, target, d]
    let k = keys.k()?.transpose(1, 2)?.contiguous()?;
    let v = keys.v()?.transpose(1, 2)?.contiguous()?;
    let mut scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (d as f64).sqrt())?;
    if let Some(bias) = bias {
        scores = (scores + bias.composed(&squared_distances(sites, &keys.sites)?)?)?;
    }
    let mask = keys.mask.reshape((batch, 1, 1, keys.len()))?; // 1 = observed
    let scores = scores.broadcast_add(&((&mask - 1.0)? * 1e30)?)?;
    let sink = bias.map(Bias::sink_score).transpose()?.flatten();
    let mut top = scores.max_keepdim(D::Minus1)?.detach();
    if let Some(sink) = &sink {
        top = top.broadcast_maximum(&sink.detach())?;
    }
    let weights = scores.broadcast_sub(&top)?.exp()?;
    let mut sum = weights.sum_keepdim(D::Minus1)?;
    if let Some(sink) = &sink {
        sum = (sum + top.neg()?.broadcast_add(sink)?.exp()?)?;
    }
    let out = weights.matmul(&v)?.broadcast_div(&sum)?;
    // Where every key is hidden, all weigh the same: nothing was seen.
    let out = out.broadcast_mul(&mask.max_keepdim(D::Minus1)?)?;
    Ok(out.transpose(1, 2)?.contiguous()?)
}
