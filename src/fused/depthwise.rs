//! Convolution of each channel of a raster by a kernel of its own, with its gradient.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Host, applies, learn, simd, slice};

/// Each channel by its kernel, zeros around the raster.
///
/// # Shapes
/// `x` `[batch, row, column, channel]`, `weight` `[side, side, channel]`, side odd; returns the
/// shape of `x`.
pub fn depthwise(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if applies(x) {
        return x.contiguous()?.apply_op2(&weight.contiguous()?, Depthwise);
    }
    let (side, _, channels) = weight.dims3()?;
    let kernel = weight.permute((2, 0, 1))?.unsqueeze(1)?.contiguous()?;
    let x = x.permute((0, 3, 1, 2))?.contiguous()?;
    x.conv2d(&kernel, side / 2, 1, 1, channels)?.permute((0, 2, 3, 1))?.contiguous()
}

struct Depthwise;

simd::vectorised! {
    /// `y[i, j] = Σ x[i + a, j + b] w[a, b]`, channel by channel, of a raster `x` with a border.
    pub fn forward(x: &[f32], wide: usize, w: &[f32], side: usize, columns: usize, y: &mut [f32]) {
        let c = w.len() / (side * side);
        for (i, y) in y.chunks_exact_mut(columns * c).enumerate() {
            for (j, y) in y.chunks_exact_mut(c).enumerate() {
                for a in 0..side {
                    let x = &x[((i + a) * wide + j) * c..][..side * c];
                    let w = &w[a * side * c..][..side * c];
                    for (x, w) in x.chunks_exact(c).zip(w.chunks_exact(c)) {
                        for k in 0..c {
                            y[k] = x[k].mul_add(w[k], y[k]);
                        }
                    }
                }
            }
        }
    }
}

simd::vectorised! {
    /// `dw[a, b] += Σ x[i + a, j + b] g[i, j]`, as above.
    pub fn weigh(x: &[f32], wide: usize, g: &[f32], side: usize, columns: usize, dw: &mut [f32]) {
        let c = dw.len() / (side * side);
        for (i, g) in g.chunks_exact(columns * c).enumerate() {
            for (j, g) in g.chunks_exact(c).enumerate() {
                for a in 0..side {
                    let x = &x[((i + a) * wide + j) * c..][..side * c];
                    let dw = &mut dw[a * side * c..][..side * c];
                    for (x, dw) in x.chunks_exact(c).zip(dw.chunks_exact_mut(c)) {
                        for k in 0..c {
                            dw[k] = x[k].mul_add(g[k], dw[k]);
                        }
                    }
                }
            }
        }
    }
}

/// Sizes of one raster.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    columns: usize,
    channels: usize,
    side: usize,
}

impl Sizes {
    fn of(x: &Shape, weight: &Shape) -> Result<(usize, Self)> {
        let (batch, rows, columns, channels) = x.dims4()?;
        let (side, _, _) = weight.dims3()?;
        Ok((batch, Sizes { rows, columns, channels, side }))
    }

    fn len(&self) -> usize {
        self.rows * self.columns * self.channels
    }

    /// Columns with the border.
    fn wide(&self) -> usize {
        self.columns + self.side - 1
    }

    fn pad(&self, x: &[f32]) -> Vec<f32> {
        let (c, border) = (self.channels, self.side / 2);
        let mut out = vec![0.0; (self.rows + self.side - 1) * self.wide() * c];
        for (i, x) in x.chunks_exact(self.columns * c).enumerate() {
            out[((i + border) * self.wide() + border) * c..][..x.len()].copy_from_slice(x);
        }
        out
    }

    fn run(&self, x: &[f32], w: &[f32], y: &mut [f32]) {
        forward(&self.pad(x), self.wide(), w, self.side, self.columns, y);
    }
}

impl CustomOp2 for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice(s1, l1)?, slice(s2, l2)?);
        let (_, sizes) = Sizes::of(l1.shape(), l2.shape())?;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(sizes.len())
            .zip(x.par_chunks(sizes.len()))
            .for_each(|(y, x)| sizes.run(x, w, y));
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, weight, grad) = (&x.contiguous()?, &weight.contiguous()?, &grad.contiguous()?);
        let (xs, ws, gs) = (Host::of(x)?, Host::of(weight)?, Host::of(grad)?);
        let (_, sizes) = Sizes::of(x.shape(), weight.shape())?;
        let n = sizes.len();
        // The transpose of a convolution is one by the kernel turned around.
        let turned: Vec<f32> = ws.chunks_exact(sizes.channels).rev().flatten().copied().collect();
        let mut dx = vec![0.0; xs.len()];
        let parts: Vec<Vec<f32>> = dx
            .par_chunks_mut(n)
            .zip(xs.par_chunks(n).zip(gs.par_chunks(n)))
            .map(|(dx, (x, g))| {
                sizes.run(g, &turned, dx);
                let mut dw = vec![0.0; turned.len()];
                weigh(&sizes.pad(x), sizes.wide(), g, sizes.side, sizes.columns, &mut dw);
                dw
            })
            .collect();
        let dw = parts.into_iter().fold(vec![0.0; turned.len()], |mut sum, part| {
            learn::add_rows(&part, &mut sum);
            sum
        });
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(dw, weight.shape(), x.device())?),
        ))
    }
}
