//! `x W + b` in one pass, with its gradient.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Host, applies, learn, matrix, slice};

/// The affine map `x W + b` over the last axis.
///
/// # Shapes
/// `x` `[…, in]`, `weight` `[in, out]`, `bias` `[out]`; returns `[…, out]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if let Some(dense) = learn::on_card(x, None, &[weight, bias], || {
        let (inputs, outputs) = weight.dims2()?;
        Ok(vec![learn::Layer::Dense { inputs, outputs }])
    }) {
        return dense;
    }
    let (inputs, outputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / inputs;
    let flat = x.reshape((rows, inputs))?;
    let y = if applies(x) {
        flat.contiguous()?.apply_op3(weight, bias, Linear)?
    } else {
        flat.matmul(weight)?.broadcast_add(bias)?
    };
    *shape.last_mut().expect("at least one axis") = outputs;
    y.reshape(shape)
}

struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
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
        let (x, w, b) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let (rows, inputs) = l1.shape().dims2()?;
        let outputs = b.len();
        let mut y = Vec::with_capacity(rows * outputs);
        for _ in 0..rows {
            y.extend_from_slice(b);
        }
        let (x, w) = (
            matrix::View::new(x, rows, inputs, inputs),
            matrix::View::new(w, inputs, outputs, outputs),
        );
        matrix::product(&mut y, outputs, 1.0, 1.0, x, w, true);
        Ok((CpuStorage::F32(y), Shape::from((rows, outputs))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (rows, inputs) = x.dims2()?;
        let outputs = b.elem_count();
        let (x, grad) = (&x.contiguous()?, &grad.contiguous()?);
        let (xs, ws, gs) = (Host::of(x)?, Host::of(w)?, Host::of(grad)?);
        let g = matrix::View::new(&gs, rows, outputs, outputs);
        let mut dw = vec![0.0; inputs * outputs];
        matrix::product(
            &mut dw,
            outputs,
            0.0,
            1.0,
            matrix::View::new(&xs, rows, inputs, inputs).t(),
            g,
            true,
        );
        let dx = if x.track_op() || x.is_variable() {
            let mut dx = vec![0.0; rows * inputs];
            matrix::product(
                &mut dx,
                inputs,
                0.0,
                1.0,
                g,
                matrix::View::new(&ws, inputs, outputs, outputs).t(),
                true,
            );
            Some(Tensor::from_vec(dx, (rows, inputs), x.device())?)
        } else {
            None
        };
        let db = column_sums(&gs, outputs);
        Ok((
            dx,
            Some(Tensor::from_vec(dw, (inputs, outputs), x.device())?),
            Some(Tensor::from_vec(db, outputs, x.device())?),
        ))
    }
}

/// Sums of the columns, in blocks of rows whose partial sums are added in order.
pub(super) fn column_sums(values: &[f32], columns: usize) -> Vec<f32> {
    let partial: Vec<Vec<f32>> = values
        .par_chunks(columns * 512)
        .map(|block| {
            let mut sum = vec![0.0f32; columns];
            for row in block.chunks_exact(columns) {
                sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
            }
            sum
        })
        .collect();
    partial.into_iter().fold(vec![0.0; columns], |mut total, part| {
        total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
        total
    })
}
