//! Softmax attention by random features, linear in the context: FAVOR+.
//!
//! Source: Choromanski et al. (2021), arXiv:2009.14794, positive orthogonal features; as Jenson et
//! al., arXiv:2411.12502, use them: drawn once and never again. Departures: the largest exponent of
//! each query is taken off, which changes nothing but the range; and a sum of weights below 1e-12,
//! where they have 1e-6, makes what is read fade to 0.

use candle_core::{D, DType, Device, Tensor};

use crate::{error::Result, rng::Stream};

/// Random features whose products are, in expectation, `exp(q · k / √d)`.
#[derive(Debug, Clone)]
pub struct Performer {
    /// `[d, feature]`
    directions: Tensor,
}

/// A context in as many numbers as there are features, whatever its size.
#[derive(Debug, Clone)]
pub struct Summed {
    /// `Σₖ φ(k) [v, 1]`, `[batch, head, feature, w + 1]`.
    pub matrix: Tensor,
}

impl Performer {
    /// `features` directions for queries and keys of width `d`: orthogonal to each other, d at a
    /// time. All are √d long where `equal`, as published; else as long as vectors of d normals are,
    /// without which the expectation holds for short queries and keys only.
    pub fn new(
        d: usize,
        features: usize,
        equal: bool,
        rng: &mut Stream,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let mut rows: Vec<Vec<f64>> = Vec::with_capacity(features);
        while rows.len() < features {
            let first = rows.len() / d * d;
            let mut row = rng.normals(d);
            // Twice, for accuracy.
            for _ in 0..2 {
                for before in &rows[first..] {
                    let dot: f64 = row.iter().zip(before).map(|(x, y)| x * y).sum();
                    row.iter_mut().zip(before).for_each(|(x, y)| *x -= dot * y);
                }
            }
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            row.iter_mut().for_each(|x| *x /= norm);
            rows.push(row);
        }
        for row in &mut rows {
            let length = match equal {
                true => (d as f64).sqrt(),
                false => rng.normals(d).iter().map(|x| x * x).sum::<f64>().sqrt(),
            };
            row.iter_mut().for_each(|x| *x *= length);
        }
        let columns = (0..d).flat_map(|i| rows.iter().map(move |row| row[i])).collect::<Vec<_>>();
        let directions = Tensor::from_vec(columns, (d, features), &Device::Cpu)?;
        Ok(Performer { directions: directions.to_dtype(dtype)?.to_device(device)? })
    }

    /// Features, times a number that is free, of `x` `[batch, site, head, d]`:
    /// `[batch, head, site, feature]`.
    fn features(&self, x: &Tensor, free: bool) -> Result<Tensor> {
        let (batch, len, heads, d) = x.dims4()?;
        let x = (x.transpose(1, 2)?.contiguous()? / (d as f64).powf(0.25))?;
        let along = x.reshape(((), d))?.matmul(&self.directions)?;
        let mut less = (x.sqr()?.sum_keepdim(D::Minus1)? * 0.5)?.reshape(((), 1))?;
        if free {
            less = along.max_keepdim(D::Minus1)?.detach();
        }
        let features = along.broadcast_sub(&less)?.exp()?;
        Ok(features.reshape((batch, heads, len, self.directions.dim(1)?))?)
    }

    /// Sums a context: keys `[batch, site, head, d]`, values `[batch, site, head, w]`, `mask`
    /// `[batch, site]`.
    pub fn sum(&self, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Summed> {
        let (batch, len, heads, _) = v.dims4()?;
        let one = Tensor::ones((batch, len, heads, 1), v.dtype(), v.device())?;
        // A hidden site has neither value nor weight.
        let shown = mask.reshape((batch, len, 1, 1))?;
        let v = Tensor::cat(&[v, &one], 3)?.broadcast_mul(&shown)?;
        let k = self.features(k, false)?.transpose(2, 3)?.contiguous()?;
        Ok(Summed { matrix: k.matmul(&v.transpose(1, 2)?.contiguous()?)? })
    }

    /// What queries `[batch, target, head, d]` read of a context: `[batch, target, head, w]`.
    pub fn read(&self, q: &Tensor, context: &Summed) -> Result<Tensor> {
        let read = self.features(q, true)?.matmul(&context.matrix)?;
        let width = context.matrix.dim(3)? - 1;
        let weight = read.narrow(3, width, 1)?.maximum(1e-12)?;
        let read = read.narrow(3, 0, width)?.broadcast_div(&weight)?;
        Ok(read.transpose(1, 2)?.contiguous()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Keys, full};

    /// With more features the answer comes nearer to that of softmax attention.
    #[test]
    fn many_features_are_softmax_attention() -> Result<()> {
        let mut rng = Stream::new(2, "performer", 0);
        let mut normal = |shape: &[usize], sd: f64| -> Result<Tensor> {
            let values = rng.normals(shape.iter().product());
            Ok((Tensor::from_vec(values, shape, &Device::Cpu)? * sd)?)
        };
        let (q, k) = (normal(&[2, 5, 2, 4], 1.0)?, normal(&[2, 9, 2, 4], 1.0)?);
        let v = normal(&[2, 9, 2, 3], 1.0)?;
        let mask: Vec<f64> = (0..18).map(|j| if j % 4 == 1 { 0.0 } else { 1.0 }).collect();
        let mask = Tensor::from_vec(mask, (2, 9), &Device::Cpu)?;
        let nowhere = |n: usize| Tensor::zeros((2, n, 1), DType::F64, &Device::Cpu);
        let truth = full(&q, &nowhere(5)?, &Keys::pack(&k, &v, &nowhere(9)?, &mask)?, None)?;
        let off = |features: usize| -> Result<f64> {
            let mut rng = Stream::new(2, "features", 0);
            let performer = Performer::new(4, features, false, &mut rng, &Device::Cpu, DType::F64)?;
            let read = performer.read(&q, &performer.sum(&k, &v, &mask)?)?;
            Ok((read - &truth)?.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt())
        };
        let (few, many) = (off(64)?, off(16_384)?);
        assert!(many < 0.02 && many < 0.2 * few, "{few} with 64 features, {many} with 16,384");
        Ok(())
    }
}
