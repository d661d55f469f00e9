//! Convolution of rasters whose channels lie together, with its gradient.
//!
//! In a padded row of `[column, channel]` the window of a kernel is a run of values, and the next
//! window starts one column later: the matrix that im2col would write (Chellapilla et al. 2006) is
//! there already, as a view whose rows overlap.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{
    Host, applies, learn, linear,
    matrix::{self, View},
    slice,
};

/// How a kernel moves over a raster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Rows and columns of the kernel, odd.
    pub kernel: [usize; 2],
    /// Rows and columns from one output to the next: 1, or 2 to halve the raster.
    pub stride: [usize; 2],
    /// How often each row and column is read: 2 to double the raster first.
    pub repeat: [usize; 2],
}

impl Window {
    /// A kernel that keeps the size of the raster.
    pub fn new(kernel: [usize; 2]) -> Self {
        Window { kernel, stride: [1; 2], repeat: [1; 2] }
    }

    /// Rows and columns that come out of `size`.
    pub fn outputs(&self, size: [usize; 2]) -> [usize; 2] {
        [0, 1].map(|d| (size[d] * self.repeat[d]).div_ceil(self.stride[d]))
    }

    /// Rows and columns of a raster with zeros around it.
    fn padded(&self, size: [usize; 2]) -> [usize; 2] {
        [0, 1].map(|d| size[d] * self.repeat[d] + self.kernel[d] - 1)
    }
}

/// `relu(kernel ∗ x + bias)`, or without relu, zeros around the raster.
///
/// # Shapes
/// `x` `[batch, row, column, in]`, `weight` `[kernel row · kernel column · in, out]`, `bias` `[out]`;
/// returns `[batch, row, column, out]`, rows and columns as [`Window::outputs`] says.
pub fn conv(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    window: Window,
    relu: bool,
) -> Result<Tensor> {
    if applies(x) {
        return x.contiguous()?.apply_op3(weight, bias, Conv { window, relu });
    }
    let y = composed(x, weight, window)?.broadcast_add(bias)?;
    if relu { y.relu() } else { Ok(y) }
}

/// By candle's convolution, with channels before rows as it wants them.
fn composed(x: &Tensor, weight: &Tensor, window: Window) -> Result<Tensor> {
    let (batch, rows, columns, inputs) = x.dims4()?;
    let [down, right] = window.repeat;
    let x = x
        .reshape((batch, rows, 1, columns, 1, inputs))?
        .broadcast_as((batch, rows, down, columns, right, inputs))?
        .reshape((batch, rows * down, columns * right, inputs))?;
    let [tall, wide] = window.kernel;
    let x = x
        .permute((0, 3, 1, 2))?
        .pad_with_zeros(2, tall / 2, tall / 2)?
        .pad_with_zeros(3, wide / 2, wide / 2)?
        .contiguous()?;
    let outputs = weight.dim(1)?;
    let kernel = weight.reshape((tall, wide, inputs, outputs))?.permute((3, 2, 0, 1))?;
    // candle has one stride for both axes: every output first, then those that are wanted.
    let mut y = x.conv2d(&kernel.contiguous()?, 0, 1, 1, 1)?.permute((0, 2, 3, 1))?.contiguous()?;
    for d in 0..2 {
        if window.stride[d] > 1 {
            let wanted = (0..y.dim(1 + d)? as u32).step_by(window.stride[d]).collect::<Vec<_>>();
            let wanted = Tensor::new(wanted, x.device())?;
            y = y.index_select(&wanted, 1 + d)?;
        }
    }
    Ok(y)
}

struct Conv {
    window: Window,
    relu: bool,
}

/// One raster of a batch, and what comes of it.
struct Raster {
    window: Window,
    size: [usize; 2],
    inputs: usize,
    outputs: usize,
}

impl Raster {
    /// The raster `[row, column, in]` with zeros around it, rows and columns repeated.
    fn pad(&self, x: &[f32]) -> Vec<f32> {
        let ([tall, wide], [down, right]) = (self.window.kernel, self.window.repeat);
        let ([rows, columns], c) = (self.window.padded(self.size), self.inputs);
        let mut padded = vec![0.0; rows * columns * c];
        for row in 0..self.size[0] * down {
            let from = &x[row / down * self.size[1] * c..][..self.size[1] * c];
            let start = ((row + tall / 2) * columns + wide / 2) * c;
            let to = &mut padded[start..][..self.size[1] * right * c];
            if right == 1 {
                to.copy_from_slice(from);
                continue;
            }
            for (from, to) in from.chunks_exact(c).zip(to.chunks_exact_mut(right * c)) {
                to.chunks_exact_mut(c).for_each(|to| to.copy_from_slice(from));
            }
        }
        padded
    }

    /// What [`Raster::pad`] did, undone for a gradient: repeated cells add up.
    fn unpad(&self, padded: &[f32], out: &mut [f32]) {
        let ([tall, wide], [down, right]) = (self.window.kernel, self.window.repeat);
        let ([_, columns], c) = (self.window.padded(self.size), self.inputs);
        for row in 0..self.size[0] * down {
            let start = ((row + tall / 2) * columns + wide / 2) * c;
            let from = &padded[start..][..self.size[1] * right * c];
            let to = &mut out[row / down * self.size[1] * c..][..self.size[1] * c];
            for (from, to) in from.chunks_exact(right * c).zip(to.chunks_exact_mut(c)) {
                for from in from.chunks_exact(c) {
                    to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
                }
            }
        }
    }

    /// The windows of one row of outputs under one row of the kernel: one window a row.
    fn windows<'a>(&self, padded: &'a [f32], row: usize, kernel_row: usize) -> View<'a> {
        let [_, columns] = self.window.padded(self.size);
        let start = (row * self.window.stride[0] + kernel_row) * columns * self.inputs;
        let [_, count] = self.window.outputs(self.size);
        let long = self.window.kernel[1] * self.inputs;
        View::new(&padded[start..], count, long, self.window.stride[1] * self.inputs)
    }

    /// The weights under one row of the kernel: `[kernel column · in, out]`.
    fn weight<'a>(&self, weight: &'a [f32], kernel_row: usize) -> View<'a> {
        let long = self.window.kernel[1] * self.inputs;
        View::new(&weight[kernel_row * long * self.outputs..], long, self.outputs, self.outputs)
    }

    fn forward(&self, x: &[f32], weight: &[f32], bias: &[f32], relu: bool, y: &mut [f32]) {
        let padded = self.pad(x);
        let [rows, columns] = self.window.outputs(self.size);
        y.chunks_exact_mut(bias.len()).for_each(|y| y.copy_from_slice(bias));
        for (row, y) in y.chunks_exact_mut(columns * self.outputs).enumerate().take(rows) {
            for k in 0..self.window.kernel[0] {
                let (windows, weight) = (self.windows(&padded, row, k), self.weight(weight, k));
                matrix::product(y, self.outputs, 1.0, 1.0, windows, weight, false);
            }
        }
        if relu {
            y.iter_mut().for_each(|y| *y = if *y > 0.0 { *y } else { 0.0 });
        }
    }

    /// Gradients of the weights, and of `x` into `dx` if that is asked for. `g` is the gradient
    /// of what comes out before relu.
    fn backward(&self, x: &[f32], weight: &[f32], g: &[f32], dx: Option<&mut [f32]>) -> Vec<f32> {
        let padded = self.pad(x);
        let [_, columns] = self.window.outputs(self.size);
        let long = self.window.kernel[1] * self.inputs;
        let mut dweight = vec![0.0; weight.len()];
        let mut dpadded = vec![0.0; if dx.is_some() { padded.len() } else { 0 }];
        let mut dwindows = vec![0.0; if dx.is_some() { columns * long } else { 0 }];
        let [_, wide] = self.window.padded(self.size);
        for (row, g) in g.chunks_exact(columns * self.outputs).enumerate() {
            let g = View::new(g, columns, self.outputs, self.outputs);
            for k in 0..self.window.kernel[0] {
                let part = &mut dweight[k * long * self.outputs..][..long * self.outputs];
                let windows = self.windows(&padded, row, k);
                matrix::product(part, self.outputs, 1.0, 1.0, windows.t(), g, false);
                if dx.is_none() {
                    continue;
                }
                let weight = self.weight(weight, k).t();
                matrix::product(&mut dwindows, long, 0.0, 1.0, g, weight, false);
                let start = (row * self.window.stride[0] + k) * wide * self.inputs;
                let step = self.window.stride[1] * self.inputs;
                for (i, from) in dwindows.chunks_exact(long).enumerate() {
                    let to = &mut dpadded[start + i * step..][..long];
                    to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
                }
            }
        }
        if let Some(dx) = dx {
            self.unpad(&dpadded, dx);
        }
        dweight
    }
}

impl Conv {
    fn raster(&self, x: &Shape, outputs: usize) -> Result<(usize, Raster)> {
        let (batch, rows, columns, inputs) = x.dims4()?;
        Ok((batch, Raster { window: self.window, size: [rows, columns], inputs, outputs }))
    }
}

impl CustomOp3 for Conv {
    fn name(&self) -> &'static str {
        "conv"
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
        let (x, weight, bias) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let (batch, raster) = self.raster(l1.shape(), bias.len())?;
        let [rows, columns] = self.window.outputs(raster.size);
        let (from, to) = (x.len() / batch.max(1), rows * columns * bias.len());
        let mut y = vec![0.0; batch * to];
        y.par_chunks_mut(to.max(1))
            .zip(x.par_chunks(from.max(1)))
            .for_each(|(y, x)| raster.forward(x, weight, bias, self.relu, y));
        Ok((CpuStorage::F32(y), Shape::from((batch, rows, columns, bias.len()))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x, grad) = (&x.contiguous()?, &grad.contiguous()?);
        let (xs, ws, ys, gs) = (Host::of(x)?, Host::of(weight)?, Host::of(y)?, Host::of(grad)?);
        let (xs, ws): (&[f32], &[f32]) = (&xs, &ws);
        let mut g = gs.to_vec();
        if self.relu {
            learn::relu_gradient(&ys, &mut g);
        }
        let outputs = bias.elem_count();
        let (batch, raster) = self.raster(x.shape(), outputs)?;
        let (from, to) = ((xs.len() / batch.max(1)).max(1), (g.len() / batch.max(1)).max(1));
        let asked = x.track_op() || x.is_variable();
        let mut dx = vec![0.0; if asked { xs.len() } else { 0 }];
        let parts: Vec<Vec<f32>> = match asked {
            true => dx
                .par_chunks_mut(from)
                .zip(xs.par_chunks(from).zip(g.par_chunks(to)))
                .map(|(dx, (x, g))| raster.backward(x, ws, g, Some(dx)))
                .collect(),
            false => xs
                .par_chunks(from)
                .zip(g.par_chunks(to))
                .map(|(x, g)| raster.backward(x, ws, g, None))
                .collect(),
        };
        // In the order of the batch, so that threads change nothing.
        let dweight = parts.into_iter().fold(vec![0.0; ws.len()], |mut sum, part| {
            learn::add_rows(&part, &mut sum);
            sum
        });
        let dbias = linear::column_sums(&g, outputs);
        let dx = asked.then(|| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        Ok((
            dx,
            Some(Tensor::from_vec(dweight, weight.shape(), x.device())?),
            Some(Tensor::from_vec(dbias, outputs, x.device())?),
        ))
    }
}
