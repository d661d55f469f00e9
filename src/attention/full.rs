//! Full attention, composed from tensor operations: the reference the fast versions must equal.

use candle_core::{D, Tensor};

use super::{
    Bias, InTime, Keys,
    bias::{geometry, squared_distances},
};
use crate::error::Result;

/// `Σₖ wₖ vₖ` for each query, `w = softmax(q·k / √d + bias)` over observed sites. Holds the whole
/// score matrix. A query with no observed key, or none within the support of
/// the bias, gets 0.
///
/// # Shapes
/// `q` `[batch, target, head, d]`, `sites` `[batch, target, dim]`; returns `[batch, target, head, w]`.
/// # Units
/// Sites of both sides in model units, or degrees where the bias measures great circles.
pub fn full(q: &Tensor, sites: &Tensor, keys: &Keys, bias: Option<&Bias>) -> Result<Tensor> {
    full_in_time(q, sites, keys, bias, None)
}

/// As [`full`], with a bias on time beside that on distance.
pub fn full_in_time(
    q: &Tensor,
    sites: &Tensor,
    keys: &Keys,
    bias: Option<&Bias>,
    time: Option<InTime>,
) -> Result<Tensor> {
    let (batch, targets, heads, d) = q.dims4()?;
    let width = keys.value_width();
    if keys.is_empty() {
        return Ok(Tensor::zeros((batch, targets, heads, width), q.dtype(), q.device())?);
    }
    let q = q.transpose(1, 2)?.contiguous()?; // [batch, head, target, d]
    let k = keys.k()?.transpose(1, 2)?.contiguous()?;
    let v = keys.v()?.transpose(1, 2)?.contiguous()?;
    let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (d as f64).sqrt())?;
    let scores = match time {
        Some(time) => (scores + time.scores(0, keys.len())?)?,
        None => scores,
    };
    let mask = keys.mask.reshape((batch, 1, 1, keys.len()))?; // 1 = observed
    let (scores, mask) = match bias {
        Some(bias) => {
            let points = geometry(&keys.sites, bias.metric)?;
            biased(&scores, &mask, bias, &geometry(sites, bias.metric)?, &points)?
        }
        None => (hide(&scores, &mask)?, mask),
    };
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
    // Where no key may be read they all weigh the same, and nothing was seen.
    let out = out.broadcast_mul(&mask.max_keepdim(D::Minus1)?)?;
    Ok(out.transpose(1, 2)?.contiguous()?)
}

/// Scores with the bias added, and what may be read: observed sites within the support.
///
/// # Shapes
/// `scores` `[batch, head, target, context]`, `mask` `[batch, 1, 1, context]` with 1 = observed,
/// `targets` and `context` as [`geometry`] returns them. Returns scores, and a mask that broadcasts to them.
pub(super) fn biased(
    scores: &Tensor,
    mask: &Tensor,
    bias: &Bias,
    targets: &Tensor,
    context: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let d2 = bias.metric.squared(&squared_distances(targets, context)?)?;
    let scores = (scores + bias.composed(&d2)?)?;
    let mask = match bias.reached(&d2)? {
        Some(reached) => reached.broadcast_mul(mask)?,
        None => mask.clone(),
    };
    Ok((hide(&scores, &mask)?, mask))
}

/// Finite scores, far below all others where `mask` is 0.
pub(super) fn hide(scores: &Tensor, mask: &Tensor) -> Result<Tensor> {
    Ok(scores.broadcast_add(&((mask - 1.0)? * 1e30)?)?)
}
