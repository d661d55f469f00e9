//! Scan attention: an online softmax over chunks of keys, so that no score matrix is ever held.
//!
//! Source: Milakov & Gimelshein (2018), arXiv:1805.02867; the biased form is Jenson et al.,
//! arXiv:2506.09163. The backward pass recomputes the scores from the saved log-sum.

use std::f64::consts::LOG2_E;

use candle_core::{CpuStorage, Layout, Result as CandleResult, Shape, Tensor};
use rayon::prelude::*;

use super::{
    Bias, Keys, Metric, Radial, Term,
    bias::{add_term, arcs, distances_to, geometry, term_gradient},
    full::{biased, hide},
    reader::{bumps, highest_from, terms},
};
use crate::{
    error::Result,
    fused::{
        self, Host, matrix, simd, slice,
        softmax::{self, GROUP, Job, Packed, attend},
    },
};

/// Keys per chunk; a memory knob, never the answer.
pub const CHUNK: usize = 512;
/// Queries per tile.
const TILE: usize = 64;

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
    let (batch, targets, heads, d) = q.dims4()?;
    let width = keys.value_width();
    if keys.is_empty() || targets == 0 {
        return Ok(Tensor::zeros((batch, targets, heads, width), q.dtype(), q.device())?);
    }
    // The published start is for reproduction only, and not worth a kernel.
    if !fused::applies(q) || start == Start::Published {
        return composed(q, sites, keys, bias, chunk, start);
    }
    // Coordinates dimension by dimension, so that distances to one target are a streaming pass.
    let metric = bias.map_or(Metric::Euclidean, |b| b.metric);
    let (sites, places) = (geometry(sites, metric)?, geometry(&keys.sites, metric)?);
    let columns = places.transpose(1, 2)?.contiguous()?; // [batch, dim, context]
    let (terms, params) = match bias {
        Some(bias) => (bias.terms.clone(), bias.params.contiguous()?),
        None => (Vec::new(), Tensor::zeros((heads, 1, 3), q.dtype(), q.device())?),
    };
    let op = Scan {
        shape: Dims { targets, context: keys.len(), heads, d, width, dim: sites.dims()[2] },
        terms,
        sites: sites.flatten_all()?.to_vec1::<f32>()?,
        columns: columns.flatten_all()?.to_vec1::<f32>()?,
        hidden: keys.mask.flatten_all()?.to_vec1::<f32>()?.iter().map(|m| *m == 0.0).collect(),
        sink: bias.and_then(Bias::sink),
        metric,
        chunk: chunk.max(1),
    };
    // The operation returns each head's value and, behind all values, each head's top and inverse
    // weight.
    let out = q.contiguous()?.apply_op3(&keys.packed.contiguous()?, &params, op)?;
    Ok(out.narrow(2, 0, heads * width)?.reshape((batch, targets, heads, width))?)
}

/// The same recurrence from tensor operations: any device, any precision, with gradients.
fn composed(
    q: &Tensor,
    sites: &Tensor,
    keys: &Keys,
    bias: Option<&Bias>,
    chunk: usize,
    start: Start,
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
        let scores = q.matmul(&part)?;
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
    /// Which term is the sink.
    sink: Option<usize>,
    metric: Metric,
    chunk: usize,
}

simd::vectorised! {
    /// `weights = inverse · exp(score − top)` in place, `top` in powers of two.
    pub fn resoften(scores: &mut [f32], top: f32, inverse: f32) {
        let top = top * std::f32::consts::LN_2;
        for s in scores {
            *s = inverse * simd::exp(*s - top);
        }
    }
}

simd::vectorised! {
    /// `Σ a b`.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0f32; 16];
        let body = a.len().min(b.len()) / 16 * 16;
        for (a, b) in a[..body].chunks_exact(16).zip(b[..body].chunks_exact(16)) {
            for l in 0..16 {
                lanes[l] = a[l].mul_add(b[l], lanes[l]);
            }
        }
        lanes.iter().sum::<f32>() + a[body..].iter().zip(&b[body..]).map(|(x, y)| x * y).sum::<f32>()
    }
}

simd::vectorised! {
    /// `ds = w (dw − mean)`, in place of `dw`.
    pub fn softmax_gradient(w: &[f32], mean: f32, dw: &mut [f32]) {
        for (d, &w) in dw.iter_mut().zip(w) {
            *d = w * (*d - mean);
        }
    }
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
    /// Squared distances from a tile of targets to a chunk of keys, row by row.
    fn distances(
        &self,
        row: usize,
        first: usize,
        rows: usize,
        key: usize,
        len: usize,
        d2: &mut [f32],
    ) {
        let Dims { targets, context, dim, .. } = self.shape;
        let columns = &self.columns[row * dim * context..(row + 1) * dim * context];
        for i in 0..rows {
            let at = (row * targets + first + i) * dim;
            let s = &self.sites[at..at + dim];
            distances_to(s, &columns[key..], context, &mut d2[i * len..(i + 1) * len]);
        }
        if self.metric == Metric::GreatCircle {
            arcs(&mut d2[..rows * len]);
        }
    }

    fn param(&self, params: &[f32], head: usize, term: usize) -> [f32; 3] {
        let at = (head * self.terms.len() + term) * 3;
        [params[at], params[at + 1], params[at + 2]]
    }

    /// Scores of a tile of queries against a chunk of keys for one head, hidden keys at −∞.
    #[allow(clippy::too_many_arguments)]
    fn scores(
        &self,
        row: usize,
        head: usize,
        rows: usize,
        key: usize,
        len: usize,
        q: &[f32],
        kv: &[f32],
        params: &[f32],
        d2: &[f32],
        scores: &mut [f32],
    ) {
        let Dims { context, heads, d, width, .. } = self.shape;
        let stride = heads * (d + width);
        let k = matrix::View::new(&kv[key * stride + head * (d + width)..], len, d, stride);
        let q = matrix::View::new(&q[head * d..], rows, d, heads * d);
        matrix::product(scores, len, 0.0, 1.0 / (d as f32).sqrt(), q, k.t(), false);
        for (j, term) in self.terms.iter().enumerate() {
            add_term(
                *term,
                self.param(params, head, j),
                &d2[..rows * len],
                &mut scores[..rows * len],
            );
        }
        let hidden = &self.hidden[row * context + key..row * context + key + len];
        if hidden.iter().any(|h| *h) {
            for scores in scores[..rows * len].chunks_exact_mut(len) {
                for (s, h) in scores.iter_mut().zip(hidden) {
                    if *h {
                        *s = f32::NEG_INFINITY;
                    }
                }
            }
        }
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
    fn row(&self, row: usize, q: &[f32], kv: &[f32], radial: &Radial, out: &mut [f32]) {
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
        let reach = extent(columns.chunks(context.max(1)), sites, dim);
        let reach = self.metric.distance(reach);
        let highest: Vec<f32> = (0..heads)
            .map(|h| (highest_from(radial, h, 0.0, reach) * LOG2_E) as f32 + 1e-3)
            .collect();
        let sink: Option<Vec<f32>> =
            self.sink.map(|_| (0..heads).filter_map(|h| Some(radial.sink(h)? as f32)).collect());
        let job = Job {
            keys: &keys,
            bias: match &bumps {
                _ if self.terms.iter().all(|t| *t == Term::Sink) => softmax::Bias::None,
                Some(bumps) => softmax::Bias::Bump(bumps),
                None => softmax::Bias::Terms(&terms),
            },
            highest: &highest,
            bend: (self.metric == Metric::GreatCircle).then_some(arcs as fn(&mut [f32])),
            sink: sink.as_deref(),
            skip: None,
        };
        let order: Vec<u32> = (0..targets as u32).collect();
        out.par_chunks_mut(GROUP * heads * (width + 2)).zip(order.par_chunks(GROUP)).for_each(
            |(out, rows)| {
                attend(&job, q, sites, rows, out);
            },
        );
    }

    /// Gradients of one batch row.
    #[allow(clippy::too_many_arguments)]
    fn row_gradient(
        &self,
        row: usize,
        q: &[f32],
        kv: &[f32],
        params: &[f32],
        out: &[f32],
        grad: &[f32],
        dq: &mut [f32],
        dkv: &mut [f32],
        dparams: &mut [f32],
    ) {
        let Dims { targets, context, heads, d, width, .. } = self.shape;
        let chunk = self.chunk.min(context);
        let (stride, wide) = (heads * (d + width), heads * (width + 2));
        let scale = 1.0 / (d as f32).sqrt();
        let tile = TILE.min(targets);
        let mut d2 = vec![0.0; if self.terms.is_empty() { 0 } else { tile * chunk }];
        let (mut w, mut dw) = (vec![0.0; tile * chunk], vec![0.0; tile * chunk]);
        for first in (0..targets).step_by(tile) {
            let rows = tile.min(targets - first);
            let q = &q[first * heads * d..(first + rows) * heads * d];
            let grad = &grad[first * wide..(first + rows) * wide];
            let out = &out[first * wide..(first + rows) * wide];
            let dq = &mut dq[first * heads * d..(first + rows) * heads * d];
            if let Some(sink) = self.sink {
                // Value 0 leaves only the softmax term: ds = −w · (o · g).
                for i in 0..rows {
                    for head in 0..heads {
                        let o = i * wide + head * width;
                        let top = out[i * wide + heads * width + head] * std::f32::consts::LN_2;
                        let inverse = out[i * wide + heads * (width + 1) + head];
                        let weight = inverse * (self.param(params, head, sink)[0] - top).exp();
                        let mean = dot(&out[o..o + width], &grad[o..o + width]);
                        dparams[(head * self.terms.len() + sink) * 3] -= weight * mean;
                    }
                }
            }
            for key in (0..context).step_by(chunk) {
                let len = chunk.min(context - key);
                if !self.terms.is_empty() {
                    self.distances(row, first, rows, key, len, &mut d2);
                }
                for head in 0..heads {
                    self.scores(row, head, rows, key, len, q, kv, params, &d2, &mut w);
                    for i in 0..rows {
                        let top = out[i * wide + heads * width + head];
                        let inverse = out[i * wide + heads * (width + 1) + head];
                        resoften(&mut w[i * len..(i + 1) * len], top, inverse);
                    }
                    let at = key * stride + head * (d + width);
                    let g = matrix::View::new(&grad[head * width..], rows, width, wide);
                    let weights = matrix::View::new(&w, rows, len, len);
                    matrix::product(&mut dkv[at + d..], stride, 1.0, 1.0, weights.t(), g, false);
                    let v = matrix::View::new(&kv[at + d..], len, width, stride);
                    matrix::product(&mut dw, len, 0.0, 1.0, g, v.t(), false);
                    for i in 0..rows {
                        let o = i * wide + head * width;
                        let mean = dot(&out[o..o + width], &grad[o..o + width]);
                        let range = i * len..(i + 1) * len;
                        softmax_gradient(&w[range.clone()], mean, &mut dw[range]);
                    }
                    for (j, term) in self.terms.iter().enumerate() {
                        let part = term_gradient(
                            *term,
                            self.param(params, head, j),
                            &d2[..rows * len],
                            &dw[..rows * len],
                        );
                        let p = (head * self.terms.len() + j) * 3;
                        dparams[p..p + 3].iter_mut().zip(part).for_each(|(t, v)| *t += v);
                    }
                    let ds = matrix::View::new(&dw, rows, len, len);
                    let k = matrix::View::new(&kv[at..], len, d, stride);
                    matrix::product(&mut dq[head * d..], heads * d, 1.0, scale, ds, k, false);
                    let q = matrix::View::new(&q[head * d..], rows, d, heads * d);
                    matrix::product(&mut dkv[at..], stride, 1.0, scale, ds.t(), q, false);
                }
            }
        }
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
        let wide = heads * (width + 2);
        let batch = l1.dims()[0];
        let mut out = vec![0.0; batch * targets * wide];
        let radial = self.radial(params);
        out.par_chunks_mut(targets * wide).enumerate().for_each(|(row, out)| {
            let q = &q[row * targets * heads * d..(row + 1) * targets * heads * d];
            let each = context * heads * (d + width);
            self.row(row, q, &kv[row * each..(row + 1) * each], &radial, out);
        });
        Ok((CpuStorage::F32(out), Shape::from((batch, targets, wide))))
    }

    fn bwd(
        &self,
        q: &Tensor,
        kv: &Tensor,
        params: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Dims { targets, context, heads, d, width, .. } = self.shape;
        let grad = grad.contiguous()?;
        let (qs, kvs, ps) = (Host::of(q)?, Host::of(kv)?, Host::of(params)?);
        let (os, gs) = (Host::of(out)?, Host::of(&grad)?);
        // Plain slices cross threads; the guards behind them stay here.
        let (qs, kvs, ps): (&[f32], &[f32], &[f32]) = (&qs, &kvs, &ps);
        let (os, gs): (&[f32], &[f32]) = (&os, &gs);
        let (nq, nkv, no) =
            (targets * heads * d, context * heads * (d + width), targets * heads * (width + 2));
        let (mut dq, mut dkv) = (vec![0.0; qs.len()], vec![0.0; kvs.len()]);
        let parts: Vec<Vec<f32>> = dq
            .par_chunks_mut(nq)
            .zip(dkv.par_chunks_mut(nkv))
            .enumerate()
            .map(|(row, (dq, dkv))| {
                let mut dparams = vec![0.0; ps.len()];
                let part = |n: usize| row * n..(row + 1) * n;
                self.row_gradient(
                    row,
                    &qs[part(nq)],
                    &kvs[part(nkv)],
                    ps,
                    &os[part(no)],
                    &gs[part(no)],
                    dq,
                    dkv,
                    &mut dparams,
                );
                dparams
            })
            .collect();
        let mut dparams = vec![0.0f32; ps.len()];
        for part in parts {
            dparams.iter_mut().zip(part).for_each(|(t, v)| *t += v);
        }
        let tensor =
            |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), q.device());
        let dparams = (!self.terms.is_empty()).then(|| tensor(dparams, params)).transpose()?;
        Ok((Some(tensor(dq, q)?), Some(tensor(dkv, kv)?), dparams))
    }
}
