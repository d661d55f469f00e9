//! Gradients of scan attention: weights are recomputed, never held.
//!
//! One job is one row of the batch, or one head of a row where rows are fewer than threads; a head
//! is always summed in the same order, so threads change nothing.

use std::{f64::consts::LOG2_E, ops::Range};

use rayon::prelude::*;

use super::{
    Metric, Term,
    bias::{add_term, arcs, term_gradient},
};
use crate::fused::{
    lanes::Aligned,
    softmax::Shape,
    softmax_gradient::{self, Bias, Gradient, Job, Part, Row},
};

/// What the forward pass knew.
pub(super) struct Backward<'a> {
    pub shape: Shape,
    pub terms: &'a [Term],
    /// `[head, term, 3]`
    pub params: &'a [f32],
    pub metric: Metric,
    /// `[batch, target, dim]`, points of [`super::bias::geometry`].
    pub sites: &'a [f32],
    /// `[batch, dim, context]`
    pub columns: &'a [f32],
    /// `[batch, context]`
    pub hidden: &'a [bool],
}

/// The bias term by term, as the kernel asks for it.
struct Terms<'a>(&'a Backward<'a>);

impl softmax_gradient::Terms for Terms<'_> {
    fn add(&self, term: usize, head: usize, d2: &[f32], scores: &mut [f32]) {
        let [a, b, c] = self.0.param(head, term);
        add_term(self.0.terms[term], [powers_of_two(a), b, c], d2, scores);
    }
    fn gradient(&self, term: usize, head: usize, d2: &[f32], ds: &[f32]) -> [f32; 3] {
        term_gradient(self.0.terms[term], self.0.param(head, term), d2, ds)
    }
}

/// As the forward pass rounds it.
fn powers_of_two(x: f32) -> f32 {
    (f64::from(x) * LOG2_E) as f32
}

impl Backward<'_> {
    fn param(&self, head: usize, term: usize) -> [f32; 3] {
        let at = (head * self.terms.len() + term) * 3;
        [self.params[at], self.params[at + 1], self.params[at + 2]]
    }

    /// Gradients of queries, of keys with values, and of the bias, in the layouts of `q`, `kv` and
    /// the parameters.
    ///
    /// # Shapes
    /// `q` `[batch, target, head, d]`, `kv` `[batch, context, head, d + w]`, `out` and `grad`
    /// `[batch, target, head, w]`, `marks` `[batch, target, 2 · head]`: tops and inverse weights.
    pub fn gradients(
        &self,
        batch: usize,
        q: &[f32],
        kv: &[f32],
        [out, marks]: [&[f32]; 2],
        grad: &[f32],
    ) -> [Vec<f32>; 3] {
        let Shape { heads, d, w, dim } = self.shape;
        let (targets, context) = (q.len() / (batch * heads * d), self.hidden.len() / batch);
        let (nq, nkv) = (targets * heads * d, context * heads * (d + w));
        let no = targets * heads * w;
        let row = |row: usize| {
            let part = |n: usize| row * n..(row + 1) * n;
            Row {
                q: &q[part(nq)],
                kv: &kv[part(nkv)],
                sites: &self.sites[part(targets * dim)],
                columns: &self.columns[part(dim * context)],
                hidden: &self.hidden[part(context)],
                out: &out[part(no)],
                marks: &marks[part(targets * 2 * heads)],
                grad: &grad[part(no)],
            }
        };
        let place = self.terms.iter().position(|t| *t == Term::Sink);
        let sink: Option<Vec<f32>> =
            place.map(|j| (0..heads).map(|head| powers_of_two(self.param(head, j)[0])).collect());
        let terms = Terms(self);
        // Terms that the kernel knows, as it wants their parameters.
        let known: Vec<Vec<[f32; 2]>> = (0..self.terms.len())
            .map(|j| {
                let pair = |head| {
                    let [a, b, _] = self.param(head, j);
                    [powers_of_two(a), powers_of_two(b)]
                };
                (0..heads).map(pair).collect()
            })
            .collect();
        let all = self.terms.iter().all(|t| matches!(t, Term::Rbf | Term::Scalar | Term::Sink));
        let part = |(term, known): (&Term, _)| match term {
            Term::Sink => Part::Nothing,
            Term::Rbf if all => Part::Rbf(known),
            Term::Scalar if all => Part::Scalar(known),
            // Beside others, added up exactly as the forward pass did.
            _ => Part::Other,
        };
        let parts: Vec<Part> =
            self.terms.iter().zip(known.iter().map(|k| &k[..])).map(part).collect();
        let real: Vec<usize> =
            (0..parts.len()).filter(|j| !matches!(parts[*j], Part::Nothing)).collect();
        let (kind, each) = match real[..] {
            [] => (Bias::None, 0),
            [j] if self.terms[j] == Term::Rbf => (Bias::Rbf(&known[j]), 2),
            _ => (Bias::Terms(&parts, &terms), 3 * self.terms.len()),
        };
        let work = |scratch: &mut Aligned<f32>,
                    at: usize,
                    heads: Range<usize>,
                    q: &mut [f32],
                    kv: &mut [f32]| {
            let mut bias = vec![0.0; heads.len() * each];
            let mut sinks = vec![0.0; heads.len()];
            let job = Job {
                shape: self.shape,
                heads,
                bias: kind,
                bend: (self.metric == Metric::GreatCircle).then_some(arcs as fn(&mut [f32])),
                sink: sink.as_deref(),
            };
            let mut to = Gradient { q, kv, bias: &mut bias, sink: &mut sinks };
            softmax_gradient::gradient(&job, &row(at), scratch, &mut to);
            (bias, sinks)
        };
        let empty = || Aligned::new(0.0f32, 0);
        let (mut dq, mut dkv) = (vec![0.0; q.len()], vec![0.0; kv.len()]);
        let rows = dq.par_chunks_mut(nq).zip(dkv.par_chunks_mut(nkv)).enumerate();
        let parts: Vec<_> = if batch >= rayon::current_num_threads() {
            rows.map_init(empty, |scratch, (at, (q, kv))| work(scratch, at, 0..heads, q, kv))
                .collect()
        } else {
            rows.flat_map_iter(|(at, (dq, dkv))| {
                let alone: Vec<_> = (0..heads)
                    .into_par_iter()
                    .map_init(empty, |scratch, head| {
                        let (mut q, mut kv) = (vec![0.0; nq / heads], vec![0.0; nkv / heads]);
                        let part = work(scratch, at, head..head + 1, &mut q, &mut kv);
                        (part, q, kv)
                    })
                    .collect();
                alone.into_iter().enumerate().map(|(head, (part, q, kv))| {
                    spread(&q, d, head, heads, dq);
                    spread(&kv, d + w, head, heads, dkv);
                    part
                })
            })
            .collect()
        };
        let mut total = vec![0.0f64; self.params.len()];
        // One part holds all heads of a row, or one head: either way heads follow each other.
        let heads_of = |part: usize, len: usize| (0..len).map(move |h| (part * len + h) % heads);
        for (at, (bias, sinks)) in parts.iter().enumerate() {
            for (h, head) in heads_of(at, sinks.len()).enumerate() {
                let total = &mut total[head * 3 * self.terms.len()..];
                let bias = &bias[h * each..(h + 1) * each];
                let from = if each == 2 { 3 * real[0] } else { 0 };
                total[from..].iter_mut().zip(bias).for_each(|(t, x)| *t += x);
                if let Some(j) = place {
                    total[3 * j] += sinks[h];
                }
            }
        }
        [dq, dkv, total.into_iter().map(|x| x as f32).collect()]
    }
}

/// Rows of one head, `width` wide, to their place beside those of the other heads.
fn spread(from: &[f32], width: usize, head: usize, heads: usize, to: &mut [f32]) {
    for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(heads * width)) {
        to[head * width..(head + 1) * width].copy_from_slice(from);
    }
}
