//! Scan attention: an online softmax over chunks of keys, so that no score matrix is ever held.
//!
//! Source: Milakov & Gimelshein (2018), arXiv:1805.02867; the biased form is Jenson et al.,
//! arXiv:2506.09163. The backward pass recomputes the weights from saved tops and inverse weights.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CudaStorage, Layout, Result as CandleResult, Shape, Tensor};
use rayon::prelude::*;

use super::{
    Bias, InTime, Keys, Metric, Precision, Radial, Term,
    backward::Backward,
    bias::{arcs, geometry},
    cuda,
    full::{biased, hide},
    reader::{bumps, highest, terms},
};
use crate::{
    error::{Error, Result},
    fused::{
        self, Host, slice,
        softmax::{self, GROUP, Job, Packed, attend},
    },
};

/// Keys per chunk; a memory knob, never the answer.
pub const CHUNK: usize = 512;

/// Where the running maximum starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// −∞, and nothing added to the running sum: equal to softmax for any scores.
    #[default]
    Exact,
    /// −1e-6, and 1e-10 added per chunk: as published in 2026, wrong when all scores are far
    /// below zero. For reproduction only.
    Published,
}

impl Start {
    fn values(self) -> (f32, f32) {
        match self {
            Start::Exact => (f32::NEG_INFINITY, 0.0),
            Start::Published => (-1e-6, 1e-10),
        }
    }
}

/// Attention over the context in chunks of keys.
///
/// Returns `Σₖ wₖ vₖ` for each query, `w = softmax(q·k / √d + bias)` over observed sites. `chunk`
/// changes memory use and speed, never the answer. A query with no observed key, or none within the
/// support of the bias, gets 0.
///
/// # Shapes
/// `q` `[batch, target, head, d]`, `sites` `[batch, target, dim]`; returns `[batch, target, head, w]`.
/// # Source
/// Checked against [`super::full`] by `tests/contract/attention.rs`.
pub fn scan(
    q: &Tensor,
    sites: &Tensor,
    keys: &Keys,
    bias: Option<&Bias>,
    chunk: usize,
    start: Start,
) -> Result<Tensor> {
    let (batch, targets, heads, _) = q.dims4()?;
    let shape = (batch, targets, heads, keys.value_width());
    if keys.is_empty() || targets == 0 {
        return Ok(Tensor::zeros(shape, q.dtype(), q.device())?);
    }
    // The published start is for reproduction only, and not worth a kernel.
    let kernel = fused::applies(q) || cuda::applies(q, sites, keys, bias);
    if !kernel || start == Start::Published {
        if keys.precision != Precision::F32 && !fused::is_plain() {
            return Err(Error::input("there is no kernel that reads this context in fewer bits")
                .fact("precision", keys.precision.name())
                .fact("widths of keys and values", format!("{} and {}", keys.width, shape.3))
                .try_this("use --precision f32"));
        }
        return composed(q, sites, keys, bias, chunk, start, None);
    }
    Ok(scan_joined(&q.flatten_from(2)?, sites, keys, bias)?.reshape(shape)?)
}

/// As [`scan`], with a bias on time: of any times, from tensor operations, on any device. A context of few
/// different times is read faster by way of [`Rounds`](super::Rounds).
pub fn scan_in_time(
    q: &Tensor,
    sites: &Tensor,
    keys: &Keys,
    bias: Option<&Bias>,
    chunk: usize,
    time: InTime,
) -> Result<Tensor> {
    let (batch, targets, heads, _) = q.dims4()?;
    if keys.is_empty() || targets == 0 {
        let shape = (batch, targets, heads, keys.value_width());
        return Ok(Tensor::zeros(shape, q.dtype(), q.device())?);
    }
    composed(q, sites, keys, bias, chunk, Start::Exact, Some(time))
}

/// [`scan`] from the exact start, where there is a kernel for it, with heads joined: `q` `[batch, target,
/// head · d]`, answer `[batch, target, head · w]`.
pub(crate) fn scan_joined(
    q: &Tensor,
    sites: &Tensor,
    keys: &Keys,
    bias: Option<&Bias>,
) -> Result<Tensor> {
    let (_, targets, wide) = q.dims3()?;
    let (d, width) = (keys.width, keys.value_width());
    let heads = wide / d;
    // Coordinates dimension by dimension, so that distances to one target are a streaming pass.
    let metric = bias.map_or(Metric::Euclidean, |b| b.metric);
    let (points, places) = (geometry(sites, metric)?, geometry(&keys.sites, metric)?);
    let dim = points.dims()[2];
    let (mut on_host, mut on_device) = (Default::default(), None);
    if q.device().is_cpu() {
        let columns = places.transpose(1, 2)?.contiguous()?; // [batch, dim, context]
        let flat = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        on_host = (flat(&points)?, flat(&columns)?, flat(&keys.mask)?);
    } else {
        on_device = Some(cuda::Places::new(&points, &places, &keys.mask)?);
    }
    let (points, columns, mask) = on_host;
    let (terms, params) = match bias {
        Some(bias) => (bias.terms.clone(), bias.params.contiguous()?),
        None => (Vec::new(), Tensor::zeros((heads, 1, 3), q.dtype(), q.device())?),
    };
    let op = Scan {
        shape: Dims { targets, context: keys.len(), heads, d, width, dim },
        terms,
        sites: points,
        columns,
        hidden: mask.iter().map(|m| *m == 0.0).collect(),
        metric,
        marks: OnceLock::new(),
        on_device,
        marks_on_device: OnceLock::new(),
        numbers: cuda::Numbers::of(
            keys.precision,
            q.track_op() || keys.packed.track_op() || params.track_op(),
        ),
    };
    Ok(q.contiguous()?.apply_op3(&keys.packed.contiguous()?, &params, op)?)
}

/// The same recurrence from tensor operations: any device, any precision, with gradients.
fn composed(
    q: &Tensor,
    sites: &Tensor,
    keys: &Keys,
    bias: Option<&Bias>,
    chunk: usize,
    start: Start,
    time: Option<InTime>,
) -> Result<Tensor> {
    let (batch, targets, heads, d) = q.dims4()?;
    let (floor, epsilon) = start.values();
    let metric = bias.map_or(Metric::Euclidean, |b| b.metric);
    let (sites, places) = (geometry(sites, metric)?, geometry(&keys.sites, metric)?);
    let q = (q.transpose(1, 2)?.contiguous()? / (d as f64).sqrt())?; // [batch, head, target, d]
    let k = keys.k()?.transpose(1, 2)?.contiguous()?;
    let v = keys.v()?.transpose(1, 2)?.contiguous()?;
    let mut top = Tensor::full(floor.max(-1e30), (batch, heads, targets, 1), q.device())?
        .to_dtype(q.dtype())?;
    let mut sum = top.zeros_like()?;
    if let Some(sink) = bias.map(Bias::sink_score).transpose()?.flatten() {
        // The sink is the first key: it opens the running maximum (a constant) and the sum.
        top = top.broadcast_maximum(&sink.detach())?;
        sum = top.neg()?.broadcast_add(&sink)?.exp()?;
    }
    let mut out =
        Tensor::zeros((batch, heads, targets, keys.value_width()), q.dtype(), q.device())?;
    for first in (0..keys.len()).step_by(chunk.max(1)) {
        let len = chunk.max(1).min(keys.len() - first);
        let part = k.narrow(2, first, len)?.transpose(2, 3)?.contiguous()?;
        let mut scores = q.matmul(&part)?;
        if let Some(time) = &time {
            scores = (scores + time.scores(first, len)?)?;
        }
        let mask = keys.mask.narrow(1, first, len)?.reshape((batch, 1, 1, len))?;
        let (scores, mask) = match bias {
            Some(bias) => biased(&scores, &mask, bias, &sites, &places.narrow(1, first, len)?)?,
            None => (hide(&scores, &mask)?, mask),
        };
        let next = top.maximum(&scores.max_keepdim(3)?.detach())?;
        let weights = scores.broadcast_sub(&next)?.exp()?.broadcast_mul(&mask)?;
        let keep = (&top - &next)?.exp()?;
        sum = ((sum * &keep)? + (weights.sum_keepdim(3)? + f64::from(epsilon))?)?;
        out = (out.broadcast_mul(&keep)?
            + weights.matmul(&v.narrow(2, first, len)?.contiguous()?)?)?;
        top = next;
    }
    let empty = sum.eq(0.0)?.to_dtype(sum.dtype())?;
    Ok(out.broadcast_div(&(sum + empty)?)?.transpose(1, 2)?.contiguous()?)
}

#[derive(Debug, Clone, Copy)]
struct Dims {
    targets: usize,
    context: usize,
    heads: usize,
    d: usize,
    width: usize,
    dim: usize,
}

struct Scan {
    shape: Dims,
    terms: Vec<Term>,
    /// `[batch, target, dim]`, points of [`geometry`].
    sites: Vec<f32>,
    /// `[batch, dim, context]`
    columns: Vec<f32>,
    /// `[batch, context]`
    hidden: Vec<bool>,
    metric: Metric,
    /// `[batch, target, 2 · head]`: tops and inverse weights, for the gradient.
    marks: OnceLock<Vec<f32>>,
    /// What takes the place of sites, columns and hidden keys where tensors are not on the host.
    on_device: Option<cuda::Places>,
    /// The marks, there.
    marks_on_device: OnceLock<Tensor>,
    /// What tensor cores multiply there, if they do.
    numbers: Option<cuda::Numbers>,
}

/// No less than any straight line between a column of coordinates and `sites`.
fn extent<'a>(columns: impl Iterator<Item = &'a [f32]>, sites: &[f32], dim: usize) -> f64 {
    let side = |(i, column): (usize, &[f32])| {
        let xs = column.iter().chain(sites.iter().skip(i).step_by(dim));
        let ends = (f32::INFINITY, f32::NEG_INFINITY);
        let (a, b) = xs.fold(ends, |(a, b), x| (a.min(*x), b.max(*x)));
        f64::from(b - a).powi(2)
    };
    columns.enumerate().map(side).sum::<f64>().sqrt()
}

impl Scan {
    fn param(&self, params: &[f32], head: usize, term: usize) -> [f32; 3] {
        let at = (head * self.terms.len() + term) * 3;
        [params[at], params[at + 1], params[at + 2]]
    }

    /// The bias as the kernel of the forward pass wants it.
    fn radial(&self, params: &[f32]) -> Radial {
        let head = |head: usize| {
            let with =
                |(j, term): (usize, &Term)| (*term, self.param(params, head, j).map(f64::from));
            self.terms.iter().enumerate().map(with).collect()
        };
        Radial { metric: self.metric, heads: (0..self.shape.heads).map(head).collect() }
    }

    /// One batch row: every query against the whole context.
    fn row(
        &self,
        row: usize,
        q: &[f32],
        kv: &[f32],
        radial: &Radial,
        out: &mut [f32],
        marks: &mut [f32],
    ) {
        let Dims { targets, context, heads, d, width, dim } = self.shape;
        let shape = softmax::Shape { heads, d, w: width, dim };
        let columns = &self.columns[row * dim * context..(row + 1) * dim * context];
        let hidden = &self.hidden[row * context..(row + 1) * context];
        let sites = &self.sites[row * targets * dim..(row + 1) * targets * dim];
        let seen: Vec<usize> = (0..context).filter(|j| !hidden[*j]).collect();
        let mut keys = Packed::new(shape, seen.len());
        let mut place = vec![0.0; dim];
        for (at, j) in seen.into_iter().enumerate() {
            place.iter_mut().enumerate().for_each(|(i, x)| *x = columns[i * context + j]);
            keys.set(at, &place, |head| {
                kv[(j * heads + head) * (d + width)..][..d + width].split_at(d)
            });
        }
        let (bumps, terms) = (bumps(radial), terms(radial));
        let compact = self.terms.contains(&Term::Wendland);
        let reach = extent(columns.chunks(context.max(1)), sites, dim);
        let (highest, sink) = (highest(radial, reach), radial.sinks());
        let job = Job {
            keys: &keys,
            bias: match &bumps {
                _ if self.terms.iter().all(|t| *t == Term::Sink) => softmax::Bias::None,
                Some(bumps) => softmax::Bias::Bump(bumps),
                None => softmax::Bias::Terms { add: &terms, compact },
            },
            highest: &highest,
            bend: (self.metric == Metric::GreatCircle).then_some(arcs as fn(&mut [f32])),
            sink: sink.as_deref(),
            skip: None,
            fade: None,
        };
        let order: Vec<u32> = (0..targets as u32).collect();
        let (wide, all) = (heads * width, heads * (width + 2));
        out.par_chunks_mut(GROUP * wide)
            .zip(marks.par_chunks_mut(GROUP * 2 * heads))
            .zip(order.par_chunks(GROUP))
            .for_each_init(Vec::new, |both: &mut Vec<f32>, ((out, marks), rows)| {
                both.resize(rows.len() * all, 0.0);
                attend(&job, q, sites, rows, both);
                let rows = out.chunks_exact_mut(wide).zip(marks.chunks_exact_mut(2 * heads));
                for (both, (out, marks)) in both.chunks_exact(all).zip(rows) {
                    out.copy_from_slice(&both[..wide]);
                    marks.copy_from_slice(&both[wide..]);
                }
            });
    }

    fn problem(&self, batch: usize) -> cuda::Problem<'_> {
        let Dims { targets, context, heads, d, width: w, dim } = self.shape;
        let (terms, metric) = (&self.terms[..], self.metric);
        cuda::Problem { batch, targets, context, heads, d, w, dim, terms, metric }
    }
}

impl candle_core::CustomOp3 for Scan {
    fn name(&self) -> &'static str {
        "scan-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let (q, kv, params) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let Dims { targets, context, heads, d, width, .. } = self.shape;
        let (nq, nkv) = (targets * heads * d, context * heads * (d + width));
        let (no, nm) = (targets * heads * width, targets * heads * 2);
        let batch = l1.dims()[0];
        let (mut out, mut marks) = (vec![0.0; batch * no], vec![0.0; batch * nm]);
        let radial = self.radial(params);
        out.par_chunks_mut(no).zip(marks.par_chunks_mut(nm)).enumerate().for_each(
            |(row, (out, marks))| {
                let (q, kv) = (&q[row * nq..(row + 1) * nq], &kv[row * nkv..(row + 1) * nkv]);
                self.row(row, q, kv, &radial, out, marks);
            },
        );
        // Asked again, it would find the same.
        let _ = self.marks.set(marks);
        let shape = Shape::from((batch, targets, heads * width));
        Ok((CpuStorage::F32(out), shape))
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        lq: &Layout,
        kv: &CudaStorage,
        lkv: &Layout,
        params: &CudaStorage,
        lp: &Layout,
    ) -> CandleResult<(CudaStorage, Shape)> {
        let Some(places) = &self.on_device else { candle_core::bail!("sites are on the host") };
        let problem = self.problem(lq.dims()[0]);
        let tensors = [(q, lq), (kv, lkv), (params, lp)];
        if let Some(numbers) = self.numbers {
            return cuda::tensor::forward(&problem, places, tensors, numbers);
        }
        let (out, shape, marks) = cuda::forward(&problem, places, tensors)?;
        // Asked again, it would find the same.
        let _ = self.marks_on_device.set(marks);
        Ok((out, shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        kv: &Tensor,
        params: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        if let Some(places) = &self.on_device {
            let Some(marks) = self.marks_on_device.get() else {
                candle_core::bail!("a gradient follows its forward pass")
            };
            let (problem, grad) = (self.problem(q.dims()[0]), grad.contiguous()?);
            let [dq, dkv, dparams] =
                cuda::gradients(&problem, places, [q, kv, params, out, &grad, marks])?;
            return Ok((Some(dq), Some(dkv), (!self.terms.is_empty()).then_some(dparams)));
        }
        let Dims { heads, d, width, dim, .. } = self.shape;
        let (qs, kvs, ps) = (Host::of(q)?, Host::of(kv)?, Host::of(params)?);
        let grad = grad.contiguous()?;
        let (os, gs) = (Host::of(out)?, Host::of(&grad)?);
        let backward = Backward {
            shape: softmax::Shape { heads, d, w: width, dim },
            terms: &self.terms,
            params: &ps,
            metric: self.metric,
            sites: &self.sites,
            columns: &self.columns,
            hidden: &self.hidden,
        };
        let Some(marks) = self.marks.get() else {
            candle_core::bail!("a gradient follows its forward pass")
        };
        let batch = q.dims()[0];
        let [dq, dkv, dparams] = backward.gradients(batch, &qs, &kvs, [&os, marks], &gs);
        let tensor =
            |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), q.device());
        let dparams = (!self.terms.is_empty()).then(|| tensor(dparams, params)).transpose()?;
        Ok((Some(tensor(dq, q)?), Some(tensor(dkv, kv)?), dparams))
    }
}
