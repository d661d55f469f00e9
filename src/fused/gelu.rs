//! GELU in its tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415), with its gradient.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Host, applies, simd, slice};

const ROOT: f32 = 0.797_884_6; // √(2/π)
const CUBIC: f32 = 0.044_715;

/// `½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))`, elementwise.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[1.0f32, -2.0], &Device::Cpu).unwrap();
/// let y = isopleth::fused::gelu(&x).unwrap().to_vec1::<f32>().unwrap();
/// assert!((y[0] - 0.841192).abs() < 1e-6 && (y[1] + 0.045402).abs() < 1e-6);
/// ```
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if applies(x) { x.contiguous()?.apply_op1(Gelu) } else { x.gelu() }
}

struct Gelu;

simd::vectorised! {
    /// `out = gelu(x)`.
    pub fn forward(x: &[f32], out: &mut [f32]) {
        for (o, &x) in out.iter_mut().zip(x) {
            let t = simd::tanh(ROOT * x * (CUBIC * x).mul_add(x, 1.0));
            *o = 0.5 * x * (1.0 + t);
        }
    }
}

simd::vectorised! {
    /// `out = g · gelu′(x)`.
    pub fn backward(x: &[f32], g: &[f32], out: &mut [f32]) {
        for ((o, &x), &g) in out.iter_mut().zip(x).zip(g) {
            let t = simd::tanh(ROOT * x * (CUBIC * x).mul_add(x, 1.0));
            let inner = ROOT * (3.0 * CUBIC * x).mul_add(x, 1.0);
            *o = g * 0.5 * (1.0 + t + x * (1.0 - t * t) * inner);
        }
    }
}

const BLOCK: usize = 1 << 14;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| forward(x, y));
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (x, grad) = (&x.contiguous()?, &grad.contiguous()?);
        let (xs, gs) = (Host::of(x)?, Host::of(grad)?);
        let mut out = vec![0.0; xs.len()];
        out.par_chunks_mut(BLOCK)
            .zip(xs.par_chunks(BLOCK).zip(gs.par_chunks(BLOCK)))
            .for_each(|(o, (x, g))| backward(x, g, o));
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}
