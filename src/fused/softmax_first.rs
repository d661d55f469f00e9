//! Softmax over the first few of some keys, as many for each query as it may read.

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Host, applies, simd, slice};

/// `softmax(scale · scores)` of query i over the first `limits[i]` keys that `mask` shows; 0 for all
/// others, and everywhere if there are none.
///
/// # Shapes
/// `scores` `[batch, head, query, key]`, `mask` `[batch, key]` with 1 = shown, one limit for each
/// query; returns the shape of `scores`.
pub fn softmax_first(
    scores: &Tensor,
    mask: &Tensor,
    scale: f64,
    limits: &[usize],
) -> Result<Tensor> {
    let (batch, _, queries, keys) = scores.dims4()?;
    if applies(scores) {
        let op = SoftmaxFirst { scale: scale as f32, limits: limits.to_vec() };
        return scores.contiguous()?.apply_op2(&mask.contiguous()?, op);
    }
    let first: Vec<f64> =
        limits.iter().flat_map(|n| (0..keys).map(move |j| f64::from(j < *n))).collect();
    let first = Tensor::from_vec(first, (1, 1, queries, keys), scores.device())?;
    let mask = mask.reshape((batch, 1, 1, keys))?.to_dtype(scores.dtype())?;
    let shown = mask.broadcast_mul(&first.to_dtype(scores.dtype())?)?;
    let hidden = ((&shown - 1.0)? * 1e30)?;
    let scores = (scores * scale)?.broadcast_add(&hidden)?;
    let top = scores.max_keepdim(D::Minus1)?.detach();
    let weights = scores.broadcast_sub(&top)?.exp()?.broadcast_mul(&shown)?;
    let sum = weights.sum_keepdim(D::Minus1)?;
    let none = sum.eq(0.0)?.to_dtype(sum.dtype())?;
    weights.broadcast_div(&(sum + none)?)
}

struct SoftmaxFirst {
    scale: f32,
    limits: Vec<usize>,
}

simd::vectorised! {
    /// `out = softmax(scale · scores)` over the shown of the first `out.len()` keys.
    pub fn forward(scores: &[f32], mask: &[f32], scale: f32, out: &mut [f32]) {
        let mut top = f32::NEG_INFINITY;
        for ((o, s), m) in out.iter_mut().zip(scores).zip(mask) {
            *o = if *m > 0.0 { scale * s } else { f32::NEG_INFINITY };
            top = if *o > top { *o } else { top };
        }
        if top == f32::NEG_INFINITY {
            out.fill(0.0);
            return;
        }
        let mut sum = 0.0;
        for o in out.iter_mut() {
            *o = simd::exp(*o - top);
        }
        for o in out.iter() {
            sum += *o;
        }
        let by = 1.0 / sum;
        for o in out.iter_mut() {
            *o *= by;
        }
    }
}

simd::vectorised! {
    /// `out = scale · y (g − Σ y g)`.
    pub fn backward(y: &[f32], g: &[f32], scale: f32, out: &mut [f32]) {
        let mut mean = 0.0;
        for (y, g) in y.iter().zip(g) {
            mean += y * g;
        }
        for ((o, y), g) in out.iter_mut().zip(y).zip(g) {
            *o = scale * y * (g - mean);
        }
    }
}

impl CustomOp2 for SoftmaxFirst {
    fn name(&self) -> &'static str {
        "softmax-first"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (scores, mask) = (slice(s1, l1)?, slice(s2, l2)?);
        let (_, heads, queries, keys) = l1.shape().dims4()?;
        let mut out = vec![0.0; scores.len()];
        let part = (queries * keys).max(1);
        out.par_chunks_mut(part).zip(scores.par_chunks(part)).enumerate().for_each(
            |(at, (out, scores))| {
                let mask = &mask[at / heads * keys..][..keys];
                let rows = out.chunks_exact_mut(keys).zip(scores.chunks_exact(keys));
                for ((out, scores), limit) in rows.zip(&self.limits) {
                    forward(scores, mask, self.scale, &mut out[..*limit]);
                }
            },
        );
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        scores: &Tensor,
        _mask: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let keys = scores.dim(D::Minus1)?.max(1);
        let grad = grad.contiguous()?.to_dtype(DType::F32)?;
        let (ys, gs) = (Host::of(y)?, Host::of(&grad)?);
        let mut out = vec![0.0; ys.len()];
        out.par_chunks_mut(64 * keys)
            .zip(ys.par_chunks(64 * keys).zip(gs.par_chunks(64 * keys)))
            .for_each(|(out, (y, g))| {
                let rows = y.chunks_exact(keys).zip(g.chunks_exact(keys));
                for (out, (y, g)) in out.chunks_exact_mut(keys).zip(rows) {
                    backward(y, g, self.scale, out);
                }
            });
        Ok((Some(Tensor::from_vec(out, scores.shape(), scores.device())?), None))
    }
}
