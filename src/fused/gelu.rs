//! GELU in its tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415), with its gradient.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Host, applies, simd, slice};

const ROOT: f32 = 0.797_884_6; // √(2/π)
const CUBIC: f32 = 0.044_715;
/// e⁻²ᵘ is 2 to the power of `x (FIRST + THIRD x²)`: −2 √(2/π) log₂e, and that times 0.044715.
pub(super) const FIRST: f32 = -2.302_208_2;
pub(super) const THIRD: f32 = -0.102_943_24;
/// From this power of two on GELU is 0 to any purpose.
pub(super) const MOST: f32 = 126.0;

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

/// `½ (1 + tanh u) = 1 / (1 + e⁻²ᵘ)`, `u = √(2/π) (x + 0.044715 x³)`: one exponential, no sign.
#[inline(always)]
fn gate(x: f32) -> f32 {
    let t = x * (x * x).mul_add(THIRD, FIRST);
    let near = if t < MOST { t } else { MOST };
    let near = if near > -MOST { near } else { -MOST };
    let gate = 1.0 / (1.0 + simd::exp2(near));
    if t < MOST { gate } else { 0.0 }
}

simd::vectorised! {
    /// `out = gelu(x)`.
    pub fn forward(x: &[f32], out: &mut [f32]) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o = x * gate(x);
        }
    }
}

simd::vectorised! {
    /// `out = g · gelu′(x)`.
    pub fn backward(x: &[f32], g: &[f32], out: &mut [f32]) {
        for ((o, &x), &g) in out.iter_mut().zip(x).zip(g) {
            let gate = gate(x);
            let slope = 2.0 * ROOT * x * (3.0 * CUBIC * x).mul_add(x, 1.0); // 2 x u′
            *o = g * (gate * (1.0 - gate)).mul_add(slope, gate);
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
