//! Time in attention: a bias of its own on how long ago, beside the one on distance.
//!
//! The terms are those of [`Bias`], of |t − t′| in place of a distance. Surveys come in rounds, and for a
//! context of few different times a time bias is an inner product: each key is marked with its round, one
//! number 1 among zeros beside its own, and each query brings what the bias says of every round. So every
//! kernel that multiplies queries and keys knows time, exactly, at the price of wider keys. Where there are
//! many times, scores are made chunk by chunk from tensor operations.

use candle_core::{D, Tensor};

use super::{Bias, bias::squared_distances};
use crate::error::{Error, Result};

/// Different times that are marked on keys, at most.
pub const ROUNDS: usize = 48;

/// The bias on time of some scores: what times of queries and keys are told apart by.
#[derive(Debug, Clone, Copy)]
pub struct InTime<'a> {
    /// Terms of |t − t′|; neither a sink nor compact.
    pub bias: &'a Bias,
    /// Times of queries, `[batch, target, 1]`, model units.
    pub targets: &'a Tensor,
    /// Times of keys, `[batch, context, 1]`, model units.
    pub context: &'a Tensor,
}

impl InTime<'_> {
    /// What is added to the scores of keys `first … first + len`, `[batch, head, target, len]`.
    pub(super) fn scores(&self, first: usize, len: usize) -> Result<Tensor> {
        self.bias.composed(&squared_distances(self.targets, &self.context.narrow(1, first, len)?)?)
    }
}

/// The different times of a context, and which of them each key has.
#[derive(Debug, Clone)]
pub struct Rounds {
    /// `[batch, round]`, model units; rows with fewer repeat their last.
    times: Tensor,
    /// `[batch, context, round]`: 1 at the round of the key, 0 elsewhere.
    marks: Tensor,
}

impl Rounds {
    /// The rounds of a context, or nothing where there are more than `most` in a row.
    ///
    /// # Shapes
    /// `times` `[batch, context, 1]`.
    /// # Errors
    /// [`Error::Input`] for times that are not finite.
    pub fn of(times: &Tensor, most: usize) -> Result<Option<Rounds>> {
        let (batch, context, _) = times.dims3()?;
        let host = times.squeeze(2)?.to_dtype(candle_core::DType::F64)?.to_vec2::<f64>()?;
        let mut rows: Vec<Vec<f64>> = Vec::with_capacity(batch);
        for row in &host {
            if row.iter().any(|t| !t.is_finite()) {
                return Err(Error::input("a site has a time that is not a number"));
            }
            let mut times = row.clone();
            times.sort_by(f64::total_cmp);
            times.dedup();
            if times.len() > most {
                return Ok(None);
            }
            rows.push(times);
        }
        let wide = rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let (mut all, mut marks) = (Vec::new(), vec![0f64; batch * context * wide]);
        for (b, (row, own)) in host.iter().zip(&rows).enumerate() {
            let last = own.last().copied().unwrap_or(0.0);
            all.extend((0..wide).map(|r| own.get(r).copied().unwrap_or(last)));
            for (i, t) in row.iter().enumerate() {
                let at = own.partition_point(|o| o < t);
                marks[(b * context + i) * wide + at] = 1.0;
            }
        }
        let tensor = |values: Vec<f64>, shape: &[usize]| -> Result<Tensor> {
            Ok(Tensor::from_vec(values, shape, times.device())?.to_dtype(times.dtype())?)
        };
        Ok(Some(Rounds {
            times: tensor(all, &[batch, wide])?,
            marks: tensor(marks, &[batch, context, wide])?,
        }))
    }

    /// How many there are in a row, at most.
    pub fn len(&self) -> usize {
        self.times.dims()[1]
    }

    /// Always false: a context without sites has one round that no key is of.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Keys `[batch, context, head, d]` with their marks, `[batch, context, head, d + round]`.
    pub fn mark(&self, k: &Tensor) -> Result<Tensor> {
        let (batch, context, heads, _) = k.dims4()?;
        let marks = self.marks.unsqueeze(2)?.broadcast_as((batch, context, heads, self.len()))?;
        Ok(Tensor::cat(&[k, &marks.contiguous()?], D::Minus1)?)
    }

    /// Queries `[batch, target, head, d]` at times `[batch, target, 1]` with what `bias` says of every
    /// round, `[batch, target, head, d + round]`: their product with marked keys, over the root of the new
    /// width, is the old score and the bias.
    pub fn ask(&self, q: &Tensor, times: &Tensor, bias: &Bias) -> Result<Tensor> {
        let (d, wide) = (q.dim(3)?, q.dim(3)? + self.len());
        let apart2 = times.broadcast_sub(&self.times.unsqueeze(1)?)?.sqr()?; // [batch, target, round]
        let said = bias.composed(&apart2)?.transpose(1, 2)?; // [batch, target, head, round]
        let (own, said) = ((q * (wide as f64 / d as f64).sqrt())?, (said * (wide as f64).sqrt())?);
        Ok(Tensor::cat(&[own, said.contiguous()?], D::Minus1)?)
    }
}
