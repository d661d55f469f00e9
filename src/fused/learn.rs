//! A run of layers that learns: one operation, whose gradient runs the layers once more.
//!
//! Rows go through all layers some at a time, so that what lies between two layers never leaves
//! the cache and none of it is kept for the gradient (Chen et al. 2016, arXiv:1604.06174).

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{
    Host,
    cuda::Card,
    gelu, layer_norm, layers,
    matrix::{self, View},
    simd, slice,
};

/// Rows that go through all layers together.
const ROWS: usize = 256;
/// Rows whose gradients of parameters are added one after another; sums of spans are added in
/// order, so that threads change nothing.
const SPAN: usize = 8 * ROWS;

/// One layer of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// `x W + b`; parameters W `[inputs, outputs]`, b `[outputs]`.
    Dense {
        /// Features read.
        inputs: usize,
        /// Features given.
        outputs: usize,
    },
    /// Tanh form.
    Gelu,
    /// max(0, x).
    Relu,
    /// Layer normalisation; parameters scale and shift.
    Norm,
    /// Plus the other input.
    Plus,
    /// Plus what layer number `0` read.
    PlusRead(usize),
}

/// Runs `input` `[…, width]` through `layers`, whose parameters follow each other in `params`;
/// `other` is what [`Layer::Plus`] adds, if it is there. f32 on the CPU.
///
/// # Errors
/// Whatever candle says of shapes and devices.
pub fn run(
    input: &Tensor,
    other: Option<&Tensor>,
    params: &[&Tensor],
    layers: Vec<Layer>,
) -> Result<Tensor> {
    let flat = params.iter().map(|p| p.flatten_all()).collect::<Result<Vec<_>>>()?;
    let flat = Tensor::cat(&flat, 0)?;
    let first = *input.dims().last().expect("at least one axis");
    let widths = layers.iter().scan(first, |width, layer| {
        if let Layer::Dense { outputs, .. } = layer {
            *width = *outputs;
        }
        Some(*width)
    });
    let widths = std::iter::once(first).chain(widths).collect();
    let op = Run { layers, widths };
    let input = input.contiguous()?;
    match other {
        Some(other) => input.apply_op3(&other.contiguous()?, &flat, op),
        None => input.apply_op2(&flat, op),
    }
}

/// The same where `input` is f32 on a card; nothing elsewhere, or for rows that the kernels find too
/// wide.
pub(crate) fn on_card(
    input: &Tensor,
    other: Option<&Tensor>,
    params: &[&Tensor],
    layers: impl FnOnce() -> Result<Vec<Layer>>,
) -> Option<Result<Tensor>> {
    let card = Card::of(input)?;
    let run = |layers: Vec<Layer>| {
        let into = Card::places(params);
        layers::run(card, input, other, params, &layers, into)
    };
    Some(layers().and_then(run))
}

struct Run {
    layers: Vec<Layer>,
    /// Features before each layer, and at the end.
    widths: Vec<usize>,
}

simd::vectorised! {
    /// `to += from`, row after row of `from`.
    pub fn add_rows(from: &[f32], to: &mut [f32]) {
        for from in from.chunks_exact(to.len()) {
            for (to, x) in to.iter_mut().zip(from) {
                *to += x;
            }
        }
    }
}

simd::vectorised! {
    /// `out = x` where positive, else 0.
    pub fn relu(x: &[f32], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = if *x > 0.0 { *x } else { 0.0 };
        }
    }
}

simd::vectorised! {
    /// `g = 0` where x is not positive.
    pub fn relu_gradient(x: &[f32], g: &mut [f32]) {
        for (g, x) in g.iter_mut().zip(x) {
            *g = if *x > 0.0 { *g } else { 0.0 };
        }
    }
}

/// Buffers of one thread: what every layer reads, what the last one gives, and gradients.
#[derive(Default)]
struct Tape {
    values: Vec<Vec<f32>>,
    gradient: Vec<f32>,
    next: Vec<f32>,
    spare: Vec<f32>,
    /// Gradients on their way round some layers.
    around: Vec<Vec<f32>>,
}

impl Run {
    fn outputs(&self) -> usize {
        *self.widths.last().expect("a width")
    }

    /// Where the parameters of each layer start.
    fn starts(&self) -> Vec<usize> {
        let mut at = 0;
        let sizes = self.layers.iter().zip(&self.widths).map(|(layer, width)| match layer {
            Layer::Dense { inputs, outputs } => (inputs + 1) * outputs,
            Layer::Norm => 2 * width,
            _ => 0,
        });
        let start = |size| {
            at += size;
            at - size
        };
        sizes.map(start).collect()
    }

    /// Fills the tape for some rows of the input, and of the other one.
    fn forward(&self, tape: &mut Tape, params: &[f32], x: &[f32], other: &[f32]) {
        let rows = x.len() / self.widths[0];
        tape.values.resize_with(self.layers.len() + 1, Vec::new);
        tape.values[0].clear();
        tape.values[0].extend_from_slice(x);
        for (i, (layer, at)) in self.layers.iter().zip(self.starts()).enumerate() {
            let (before, after) = tape.values.split_at_mut(i + 1);
            let (x, y) = (&before[i], &mut after[0]);
            match layer {
                Layer::Dense { inputs, outputs } => {
                    let (w, b) = params[at..].split_at(inputs * outputs);
                    y.clear();
                    for _ in 0..rows {
                        y.extend_from_slice(&b[..*outputs]);
                    }
                    let x = View::new(x, rows, *inputs, *inputs);
                    let w = View::new(w, *inputs, *outputs, *outputs);
                    matrix::product(y, *outputs, 1.0, 1.0, x, w, false);
                }
                Layer::Gelu => {
                    y.resize(x.len(), 0.0);
                    gelu::forward(x, y);
                }
                Layer::Relu => {
                    y.resize(x.len(), 0.0);
                    relu(x, y);
                }
                Layer::Norm => {
                    y.resize(x.len(), 0.0);
                    let width = self.widths[i];
                    let (scale, shift) = params[at..at + 2 * width].split_at(width);
                    layer_norm::forward(x, scale, shift, y);
                }
                Layer::Plus => {
                    y.clone_from(x);
                    add_rows(other, y);
                }
                Layer::PlusRead(from) => {
                    y.clone_from(x);
                    add_rows(&before[*from], y);
                }
            }
        }
    }

    /// Gradients of some rows whose tape is filled: of the input into `tape.gradient`, of the other
    /// one into `other`, of parameters added to `sums`. `whole` says whether the input's is wanted.
    fn backward(
        &self,
        tape: &mut Tape,
        params: &[f32],
        grad: &[f32],
        whole: bool,
        other: &mut [f32],
        sums: &mut [f32],
    ) {
        let Tape { values, gradient, next, spare, around } = tape;
        gradient.clear();
        gradient.extend_from_slice(grad);
        around.resize_with(self.layers.len(), Vec::new);
        around.iter_mut().for_each(Vec::clear);
        let rows = grad.len() / self.outputs();
        for (i, (layer, at)) in self.layers.iter().zip(self.starts()).enumerate().rev() {
            let x = &values[i];
            match layer {
                Layer::Dense { inputs, outputs } => {
                    let (dw, db) = sums[at..].split_at_mut(inputs * outputs);
                    let g = View::new(gradient, rows, *outputs, *outputs);
                    let x = View::new(x, rows, *inputs, *inputs);
                    matrix::product(dw, *outputs, 1.0, 1.0, x.t(), g, false);
                    add_rows(gradient, &mut db[..*outputs]);
                    if i > 0 || whole {
                        next.resize(rows * inputs, 0.0);
                        let w = View::new(&params[at..], *inputs, *outputs, *outputs);
                        matrix::product(next, *inputs, 0.0, 1.0, g, w.t(), false);
                        std::mem::swap(gradient, next);
                    }
                }
                Layer::Gelu => {
                    next.resize(x.len(), 0.0);
                    gelu::backward(x, gradient, next);
                    std::mem::swap(gradient, next);
                }
                Layer::Relu => relu_gradient(x, gradient),
                Layer::Norm => {
                    let width = self.widths[i];
                    next.resize(x.len(), 0.0);
                    spare.resize(x.len(), 0.0);
                    layer_norm::backward(x, gradient, &params[at..at + width], next, spare);
                    add_rows(spare, &mut sums[at..at + width]);
                    add_rows(gradient, &mut sums[at + width..at + 2 * width]);
                    std::mem::swap(gradient, next);
                }
                Layer::Plus => other.copy_from_slice(gradient),
                Layer::PlusRead(from) if around[*from].is_empty() => {
                    around[*from].extend_from_slice(gradient);
                }
                Layer::PlusRead(from) => add_rows(gradient, &mut around[*from]),
            }
            if !around[i].is_empty() {
                add_rows(&around[i], gradient);
            }
        }
    }

    fn answer(&self, x: &[f32], other: Option<&[f32]>, params: &[f32]) -> Vec<f32> {
        let (inputs, outputs) = (self.widths[0], self.outputs());
        let mut y = vec![0.0; x.len() / inputs * outputs];
        y.par_chunks_mut(ROWS * outputs)
            .zip(x.par_chunks(ROWS * inputs))
            .enumerate()
            .for_each_init(Tape::default, |tape, (at, (y, x))| {
                self.forward(
                    tape,
                    params,
                    x,
                    beside(other, x.len(), self.plus_width(), at, inputs),
                );
                y.copy_from_slice(&tape.values[self.layers.len()]);
            });
        y
    }

    /// Features that [`Layer::Plus`] adds.
    fn plus_width(&self) -> usize {
        let at = self.layers.iter().position(|l| *l == Layer::Plus);
        at.map_or(0, |at| self.widths[at])
    }

    /// Gradients of input, other input and parameters.
    fn gradients(
        &self,
        x: &[f32],
        other: Option<&[f32]>,
        params: &[f32],
        grad: &[f32],
        whole: bool,
    ) -> [Vec<f32>; 3] {
        let (inputs, outputs, plus) = (self.widths[0], self.outputs(), self.plus_width());
        let rows = x.len() / inputs;
        let mut dx = vec![0.0; if whole { x.len() } else { 0 }];
        let mut dother = vec![0.0; rows * plus];
        // One span each: gradients that nobody wants have none, and are given empty ones.
        let spans = rows.div_ceil(SPAN);
        let mut dxs: Vec<&mut [f32]> = dx.chunks_mut(SPAN * inputs).collect();
        dxs.resize_with(spans, Default::default);
        let mut dothers: Vec<&mut [f32]> = dother.chunks_mut((SPAN * plus).max(1)).collect();
        dothers.resize_with(spans, Default::default);
        let sums: Vec<Vec<f32>> = dxs
            .into_par_iter()
            .zip(dothers)
            .enumerate()
            .map_init(Tape::default, |tape, (span, (dx, dother))| {
                let mut sums = vec![0.0; params.len()];
                for first in (span * SPAN..rows.min((span + 1) * SPAN)).step_by(ROWS) {
                    let last = rows.min(first + ROWS);
                    let part = |width: usize| first * width..last * width;
                    let within =
                        |width: usize| (first - span * SPAN) * width..(last - span * SPAN) * width;
                    let beside = other.map_or(&[][..], |other| &other[part(plus)]);
                    self.forward(tape, params, &x[part(inputs)], beside);
                    let dother = &mut dother[within(plus)];
                    self.backward(tape, params, &grad[part(outputs)], whole, dother, &mut sums);
                    if whole {
                        dx[within(inputs)].copy_from_slice(&tape.gradient);
                    }
                }
                sums
            })
            .collect();
        let mut sums = sums.into_iter();
        let mut total = sums.next().unwrap_or_else(|| vec![0.0; params.len()]);
        for part in sums {
            add_rows(&part, &mut total);
        }
        [dx, dother, total]
    }

    fn shape(&self, layout: &Layout) -> Shape {
        let mut dims = layout.dims().to_vec();
        *dims.last_mut().expect("at least one axis") = self.outputs();
        Shape::from(dims)
    }
}

/// The rows of the other input that stand beside chunk number `at` of the input.
fn beside(other: Option<&[f32]>, len: usize, plus: usize, at: usize, inputs: usize) -> &[f32] {
    other.map_or(&[], |other| &other[at * ROWS * plus..][..len / inputs * plus])
}

impl CustomOp2 for Run {
    fn name(&self) -> &'static str {
        "layers"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.answer(slice(s1, l1)?, None, slice(s2, l2)?);
        Ok((CpuStorage::F32(y), self.shape(l1)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        params: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (whole, grad) = (x.track_op() || x.is_variable(), &grad.contiguous()?);
        let [dx, _, dparams] =
            self.gradients(&Host::of(x)?, None, &Host::of(params)?, &Host::of(grad)?, whole);
        let dx = whole.then(|| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        Ok((dx, Some(Tensor::from_vec(dparams, params.shape(), x.device())?)))
    }
}

impl CustomOp3 for Run {
    fn name(&self) -> &'static str {
        "layers"
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
        let y = self.answer(slice(s1, l1)?, Some(slice(s2, l2)?), slice(s3, l3)?);
        Ok((CpuStorage::F32(y), self.shape(l1)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        other: &Tensor,
        params: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (whole, grad) = (x.track_op() || x.is_variable(), &grad.contiguous()?);
        let (xs, others) = (Host::of(x)?, Host::of(other)?);
        let [dx, dother, dparams] =
            self.gradients(&xs, Some(&others), &Host::of(params)?, &Host::of(grad)?, whole);
        let dx = whole.then(|| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        Ok((
            dx,
            Some(Tensor::from_vec(dother, other.shape(), x.device())?),
            Some(Tensor::from_vec(dparams, params.shape(), x.device())?),
        ))
    }
}
