//! Scan attention: an online softmax over chunks of keys, so that no score matrix is ever held.
//!
//! Source: Milakov & Gimelshein (2018), arXiv:1805.02867; the biased form is Jenson et al.,
//! arXiv:2506.09163. The backward pass recomputes the scores from the saved log-sum.

use candle_core::{CpuStorage, Layout, Result as CandleResult, Shape, Tensor};
use rayon::prelude::*;

use super::{
    Bias, Keys, Metric, Term,
    backward::Backward,
    bias::{add_term, arcs, distances_to, geometry},
    full::{biased, hide},
};
use crate::{
    error::Result,
    fused::{self, Host, matrix, simd, slice, softmax},
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
    if !fused::applies(q) {
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
        start,
    };
    // The operation returns each head's value and, behind all values, each head's log-sum.
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
    start: Start,
}

simd::vectorised! {
    /// One row of an online softmax step: scores become weights `exp(score − top)`; returns the
    /// new maximum and the sum of the weights.
    pub fn soften(scores: &mut [f32], top: f32) -> (f32, f32) {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let body = scores.len() / 16 * 16;
        for c in scores[..body].chunks_exact(16) {
            for l in 0..16 {
                lanes[l] = if c[l] > lanes[l] { c[l] } else { lanes[l] };
            }
        }
        let mut next = top;
        for v in lanes.iter().chain(&scores[body..]) {
            next = if *v > next { *v } else { next };
        }
        if next == f32::NEG_INFINITY {
            scores.fill(0.0);
            return (next, 0.0);
        }
        let mut sums = [0.0f32; 16];
        for c in scores[..body].chunks_exact_mut(16) {
            for l in 0..16 {
                c[l] = simd::exp(c[l] - next);
                sums[l] += c[l];
            }
        }
        let mut sum: f32 = sums.iter().sum();
        for s in &mut scores[body..] {
            *s = simd::exp(*s - next);
            sum += *s;
        }
        (next, sum)
    }
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

    /// One tile of queries against the whole context.
    fn tile(
        &self,
        row: usize,
        first: usize,
        q: &[f32],
        kv: &[f32],
        params: &[f32],
        out: &mut [f32],
    ) {
        let Dims { context, heads, d, width, .. } = self.shape;
        let rows = q.len() / (heads * d);
        let chunk = self.chunk.min(context);
        let stride = heads * (d + width);
        let wide = heads * (width + 1);
        let (floor, epsilon) = self.start.values();
        let mut d2 = vec![0.0; if self.terms.is_empty() { 0 } else { rows * chunk }];
        let mut scores = vec![0.0; rows * chunk];
        let mut top = vec![floor; rows * heads];
        let mut sum = vec![0.0f32; rows * heads];
        if let Some(sink) = self.sink {
            for (at, (top, sum)) in top.iter_mut().zip(&mut sum).enumerate() {
                let score = self.param(params, at % heads, sink)[0];
                *top = top.max(score);
                *sum = (score - *top).exp();
            }
        }
        out.fill(0.0);
        for key in (0..context).step_by(chunk) {
            let len = chunk.min(context - key);
            if !self.terms.is_empty() {
                self.distances(row, first, rows, key, len, &mut d2);
            }
            for head in 0..heads {
                self.scores(row, head, rows, key, len, q, kv, params, &d2, &mut scores);
                for i in 0..rows {
                    let at = i * heads + head;
                    let (next, part) = soften(&mut scores[i * len..(i + 1) * len], top[at]);
                    let keep = if top[at] == next { 1.0 } else { (top[at] - next).exp() };
                    sum[at] = sum[at] * keep + part + epsilon;
                    top[at] = next;
                    if keep != 1.0 {
                        let o = i * wide + head * width;
                        out[o..o + width].iter_mut().for_each(|v| *v *= keep);
                    }
                }
                let v = matrix::View::new(
                    &kv[key * stride + head * (d + width) + d..],
                    len,
                    width,
                    stride,
                );
                let w = matrix::View::new(&scores, rows, len, len);
                matrix::product(&mut out[head * width..], wide, 1.0, 1.0, w, v, false);
            }
        }
        for i in 0..rows {
            for head in 0..heads {
                let at = i * heads + head;
                let o = i * wide + head * width;
                if sum[at] > 0.0 {
                    out[o..o + width].iter_mut().for_each(|v| *v /= sum[at]);
                }
                // +∞ as log-sum makes every recomputed weight 0 where no key was observed.
                out[i * wide + heads * width + head] =
                    if sum[at] > 0.0 { top[at] + sum[at].ln() } else { f32::INFINITY };
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
        let wide = heads * (width + 1);
        let batch = l1.dims()[0];
        let mut out = vec![0.0; batch * targets * wide];
        out.par_chunks_mut(targets * wide).enumerate().for_each(|(row, out)| {
            let q = &q[row * targets * heads * d..(row + 1) * targets * heads * d];
            let each = context * heads * (d + width);
            let kv = &kv[row * each..(row + 1) * each];
            out.par_chunks_mut(TILE * wide)
                .zip(q.par_chunks(TILE * heads * d))
                .enumerate()
                .for_each(|(t, (out, q))| self.tile(row, t * TILE, q, kv, params, out));
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
        let [dq, dkv, dparams] =
            backward.gradients(self.hidden.len() / self.shape.context, &qs, &kvs, &os, &gs);
        let tensor =
            |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), q.device());
        let dparams = (!self.terms.is_empty()).then(|| tensor(dparams, params)).transpose()?;
        Ok((Some(tensor(dq, q)?), Some(tensor(dkv, kv)?), dparams))
    }
}
