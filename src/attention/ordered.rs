//! Attention to keys in an order, of which each query reads the first few: chains of targets.

use candle_core::Tensor;

use super::Keys;
use crate::{error::Result, fused::softmax_first};

/// `Σₖ wₖ vₖ` for each query, `w = softmax(q·k / √d)` over the observed of its first `limits[i]`
/// keys; 0 if there are none. Holds the whole score matrix.
///
/// # Shapes
/// `q` `[batch, query, head, d]`, one limit for each query; returns `[batch, query, head, w]`.
pub fn ordered(q: &Tensor, keys: &Keys, limits: &[usize]) -> Result<Tensor> {
    let (batch, queries, heads, d) = q.dims4()?;
    if keys.is_empty() || queries == 0 {
        let shape = (batch, queries, heads, keys.value_width());
        return Ok(Tensor::zeros(shape, q.dtype(), q.device())?);
    }
    let q = q.transpose(1, 2)?.contiguous()?; // [batch, head, query, d]
    let k = keys.k()?.permute((0, 2, 3, 1))?.contiguous()?; // [batch, head, d, key]
    let v = keys.v()?.transpose(1, 2)?.contiguous()?;
    let weights = softmax_first(&q.matmul(&k)?, &keys.mask, 1.0 / (d as f64).sqrt(), limits)?;
    Ok(weights.matmul(&v)?.transpose(1, 2)?.contiguous()?)
}
