//! Layer normalisation (Ba et al. 2016, arXiv:1607.06450) in one pass, with its gradient.

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Host, applies, learn, linear::column_sums, simd, slice};

/// Added to the variance; the value of the reference implementation.
pub const EPSILON: f64 = 1e-6;

/// `(x − mean) / √(var + 1e-6) · scale + shift` over the last axis, biased variance.
///
/// # Shapes
/// `x` `[…, width]`, `scale` and `shift` `[width]`; returns the shape of `x`.
pub fn layer_norm(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    if applies(x) {
        return x.contiguous()?.apply_op3(scale, shift, LayerNorm);
    }
    if let Some(normed) = learn::on_card(x, None, &[scale, shift], || Ok(vec![learn::Layer::Norm]))
    {
        return normed;
    }
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred
        .broadcast_div(&(variance + EPSILON)?.sqrt()?)?
        .broadcast_mul(scale)?
        .broadcast_add(shift)
}

struct LayerNorm;

/// Mean and reciprocal standard deviation of a row.
#[inline(always)]
fn moments(row: &[f32]) -> (f32, f32) {
    // Eight lanes by hand: LLVM keeps the order of float additions otherwise.
    let mut lanes = [0.0f32; 8];
    let body = row.len() / 8 * 8;
    for c in row[..body].chunks_exact(8) {
        for l in 0..8 {
            lanes[l] += c[l];
        }
    }
    let mean = (lanes.iter().sum::<f32>() + row[body..].iter().sum::<f32>()) / row.len() as f32;
    let mut lanes = [0.0f32; 8];
    for c in row[..body].chunks_exact(8) {
        for l in 0..8 {
            lanes[l] = (c[l] - mean).mul_add(c[l] - mean, lanes[l]);
        }
    }
    let rest: f32 = row[body..].iter().map(|v| (v - mean) * (v - mean)).sum();
    let variance = (lanes.iter().sum::<f32>() + rest) / row.len() as f32;
    (mean, 1.0 / (variance + EPSILON as f32).sqrt())
}

simd::vectorised! {
    /// Normalises every row of `x`.
    pub fn forward(x: &[f32], scale: &[f32], shift: &[f32], out: &mut [f32]) {
        let width = scale.len();
        for (x, o) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let (mean, rstd) = moments(x);
            for i in 0..width {
                o[i] = ((x[i] - mean) * rstd).mul_add(scale[i], shift[i]);
            }
        }
    }
}

simd::vectorised! {
    /// Gradient with respect to `x` into `dx`; `g · normalised` into `dscale` (summed by the caller).
    pub fn backward(x: &[f32], g: &[f32], scale: &[f32], dx: &mut [f32], gn: &mut [f32]) {
        let width = scale.len();
        let inverse = 1.0 / width as f32;
        let rows = x.chunks_exact(width).zip(g.chunks_exact(width));
        let outs = dx.chunks_exact_mut(width).zip(gn.chunks_exact_mut(width));
        for ((x, g), (dx, gn)) in rows.zip(outs) {
            let (mean, rstd) = moments(x);
            let mut sums = [[0.0f32; 8]; 2];
            for i in 0..width {
                let normal = (x[i] - mean) * rstd;
                gn[i] = g[i] * normal;
                let gs = g[i] * scale[i];
                sums[0][i % 8] += gs;
                sums[1][i % 8] += gs * normal;
            }
            let a = sums[0].iter().sum::<f32>() * inverse;
            let b = sums[1].iter().sum::<f32>() * inverse;
            for i in 0..width {
                let normal = (x[i] - mean) * rstd;
                dx[i] = rstd * (g[i] * scale[i] - a - normal * b);
            }
        }
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, scale, shift) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let block = scale.len() * 256;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(block)
            .zip(x.par_chunks(block))
            .for_each(|(y, x)| forward(x, scale, shift, y));
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        scale: &Tensor,
        _shift: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x, grad) = (&x.contiguous()?, &grad.contiguous()?);
        let (xs, ss, gs) = (Host::of(x)?, Host::of(scale)?, Host::of(grad)?);
        let (xs, ss, gs): (&[f32], &[f32], &[f32]) = (&xs, &ss, &gs);
        let width = ss.len();
        let block = width * 256;
        let (mut dx, mut gn) = (vec![0.0; xs.len()], vec![0.0; xs.len()]);
        dx.par_chunks_mut(block)
            .zip(gn.par_chunks_mut(block))
            .zip(xs.par_chunks(block).zip(gs.par_chunks(block)))
            .for_each(|((dx, gn), (x, g))| backward(x, g, ss, dx, gn));
        let part = |values: &[f32]| Tensor::from_vec(column_sums(values, width), width, x.device());
        Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), Some(part(&gn)?), Some(part(gs)?)))
    }
}
