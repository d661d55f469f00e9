//! Gaussians over all targets together: a covariance of few features, and the density in f64.
//!
//! Source: Markou et al. (2022), arXiv:2203.08775, for both covariances; the density of the one of
//! low rank is by Woodbury's identity. Nothing is ever added to a diagonal for arithmetic's sake:
//! a covariance that has no density as it stands is an error.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result as CandleResult, Tensor};
use faer::Mat;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::head::Scale;
use crate::{
    error::{Error, Result},
    linalg::{self, Cholesky},
    predictive::{Draws, Link, Of, Predictive},
    process::Reward,
    rng::Stream,
    sites::Task,
};

/// How two targets covary, from features f of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Covariance {
    /// `fᵢ · fⱼ`.
    Linear,
    /// `exp(−½ ‖fᵢ − fⱼ‖²) vᵢ vⱼ`.
    Kvv,
}

/// A Gaussian over all targets of each row of a batch, link scale.
#[derive(Debug, Clone)]
pub struct Joint {
    /// Link between this scale and the outcome.
    pub link: Link,
    /// How features covary.
    pub covariance: Covariance,
    /// Means `[batch, target]`.
    pub mean: Tensor,
    /// Features `[batch, target, rank]`.
    pub features: Tensor,
    /// The v of [`Covariance::Kvv`] `[batch, target]`; not read otherwise.
    pub scale: Option<Tensor>,
    /// Variance that the surface at each target shares with no other `[batch, target]`, > 0.
    pub own: Tensor,
    /// Variance that a new observation has beyond the surface's `[batch, target]`; 0 if not there.
    pub nugget: Option<Tensor>,
}

/// Outputs of a network that make a [`Joint`].
#[derive(Debug, Clone, Copy)]
pub struct Outputs {
    /// How features covary.
    pub covariance: Covariance,
    /// Features.
    pub rank: usize,
    /// Whether observation and surface differ.
    pub nugget: bool,
}

impl Outputs {
    /// How many there are: mean, features, v, own variance, nugget.
    pub fn count(&self) -> usize {
        let kvv = usize::from(self.covariance == Covariance::Kvv);
        2 + self.rank + kvv + usize::from(self.nugget)
    }

    /// Raw outputs `[batch, target, count]` to a Gaussian. Variances and v are exponentials; features
    /// are divided by the root of their number, so that likeness starts neither at 0 nor at 1.
    pub fn joint(&self, link: Link, raw: &Tensor) -> Result<Joint> {
        let mut at = 1 + self.rank;
        let mut next = || -> Result<Tensor> {
            at += 1;
            Scale::Exp.positive(&raw.narrow(2, at - 1, 1)?.squeeze(2)?)
        };
        let features = (raw.narrow(2, 1, self.rank)? / (self.rank as f64).sqrt())?;
        let scale = match self.covariance {
            Covariance::Linear => None,
            Covariance::Kvv => Some(next()?),
        };
        let own = next()?;
        let nugget = if self.nugget { Some(next()?) } else { None };
        let mean = raw.narrow(2, 0, 1)?.squeeze(2)?;
        Ok(Joint { link, covariance: self.covariance, mean, features, scale, own, nugget })
    }
}

impl Joint {
    /// Variance `[batch, target]` beyond what features share.
    fn diagonal(&self, of: Of) -> Result<Tensor> {
        Ok(match (of, &self.nugget) {
            (Of::Observation, Some(nugget)) => (&self.own + nugget)?,
            _ => self.own.clone(),
        })
    }

    /// Joint log density of `values` `[batch, target, 1]`: `[batch]`, computed in f64.
    ///
    /// # Errors
    /// If the covariance is not positive definite as it stands, or anything is not finite.
    pub fn log_density(&self, of: Of, values: &Tensor) -> Result<Tensor> {
        let values = values.squeeze(2)?.to_dtype(self.mean.dtype())?;
        let column = |x: &Tensor| x.unsqueeze(2);
        let mut parts = vec![column(&(values - &self.mean)?)?, self.features.clone()];
        if let (Covariance::Kvv, Some(scale)) = (self.covariance, &self.scale) {
            parts.push(column(scale)?);
        }
        parts.push(column(&self.diagonal(of)?)?);
        let packed = Tensor::cat(&parts, 2)?;
        let op = Density { covariance: self.covariance, rank: self.features.dim(2)? };
        let density = packed.to_device(&Device::Cpu)?.contiguous()?.apply_op1(op)?;
        Ok(density.to_device(packed.device())?)
    }

    /// What training minimises: the mean over tasks of the negative joint log density of what is
    /// foretold, per target.
    pub fn loss(&self, task: &Task, reward: Reward) -> Result<Tensor> {
        let total = reward.sum(task, |of, truth| self.log_density(of, truth))?.mean_all()?;
        Ok((total.neg()? / self.mean.dim(1)?.max(1) as f64)?)
    }

    /// Each target alone.
    pub fn predictive(&self) -> Result<Predictive> {
        let shared = match (&self.covariance, &self.scale) {
            (Covariance::Kvv, Some(scale)) => scale.sqr()?,
            _ => self.features.sqr()?.sum(2)?,
        };
        let sd = |of: Of| -> Result<Tensor> {
            Ok((&shared + self.diagonal(of)?)?.sqrt()?.unsqueeze(2)?)
        };
        let (surface, observation) = (sd(Of::Surface)?, sd(Of::Observation)?);
        Predictive::gaussian(self.link, self.mean.unsqueeze(2)?, surface, observation)
    }

    /// `n` surfaces drawn jointly, for one row of targets: `[n, target, 1]`.
    ///
    /// # Errors
    /// [`Error::Axis`] for several rows.
    pub fn draws(&self, n: usize, rng: &mut Stream) -> Result<Draws> {
        let (rows, targets) = self.mean.dims2()?;
        if rows != 1 {
            return Err(Error::axis("rows of targets to draw surfaces over", rows, 1));
        }
        let host = |x: &Tensor| -> Result<Vec<f64>> {
            Ok(x.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?)
        };
        let (mean, own, features) = (host(&self.mean)?, host(&self.own)?, host(&self.features)?);
        let rank = self.features.dim(2)?;
        let mut values = Vec::with_capacity(n * targets);
        if targets > 0 && self.covariance == Covariance::Kvv {
            let scale = match &self.scale {
                Some(scale) => host(scale)?,
                None => vec![1.0; targets],
            };
            let view = View { features: &features, width: rank, rank };
            let covariance = kvv(view, targets, |i| scale[i], |i| own[i]);
            let factor = Cholesky::factor(covariance)?;
            for _ in 0..n {
                let noise = factor.colour(&rng.normals(targets));
                values.extend(mean.iter().zip(noise).map(|(m, z)| m + z));
            }
        } else {
            for _ in 0..n {
                let (z, alone) = (rng.normals(rank), rng.normals(targets));
                values.extend((0..targets).map(|i| {
                    let shared = features[i * rank..].iter().zip(&z).map(|(f, z)| f * z);
                    mean[i] + shared.sum::<f64>() + own[i].sqrt() * alone[i]
                }));
            }
        }
        let values = Tensor::from_vec(values, (n, targets, 1), self.mean.device())?;
        Ok(Draws { link: self.link, values: values.to_dtype(self.mean.dtype())? })
    }
}

/// Features of targets that lie `width` numbers apart.
#[derive(Clone, Copy)]
struct View<'a> {
    features: &'a [f64],
    width: usize,
    rank: usize,
}

impl View<'_> {
    fn of(&self, i: usize) -> &[f64] {
        &self.features[i * self.width..][..self.rank]
    }
}

fn kvv(
    f: View,
    targets: usize,
    scale: impl Fn(usize) -> f64,
    own: impl Fn(usize) -> f64,
) -> Mat<f64> {
    Mat::from_fn(targets, targets, |i, j| {
        let far: f64 = f.of(i).iter().zip(f.of(j)).map(|(a, b)| (a - b).powi(2)).sum();
        let alone = if i == j { own(i) } else { 0.0 };
        (-0.5 * far).exp() * scale(i) * scale(j) + alone
    })
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The log density of `[batch, target, columns]`: residual, features, v (kvv), diagonal.
struct Density {
    covariance: Covariance,
    rank: usize,
}

impl Density {
    fn columns(&self) -> usize {
        2 + self.rank + usize::from(self.covariance == Covariance::Kvv)
    }

    /// The density of one row `x`; and its gradient into `slope`, where that is wanted.
    fn row(&self, x: &[f64], slope: Option<&mut [f64]>) -> Result<f64> {
        if x.is_empty() {
            return Ok(0.0);
        }
        match self.covariance {
            Covariance::Linear => self.linear(x, slope),
            Covariance::Kvv => self.kvv(x, slope),
        }
    }

    /// With A = I + Fᵀ D⁻¹ F: |Σ| = |D| |A| and Σ⁻¹ = D⁻¹ − D⁻¹ F A⁻¹ Fᵀ D⁻¹.
    fn linear(&self, x: &[f64], slope: Option<&mut [f64]>) -> Result<f64> {
        let (columns, rank) = (self.columns(), self.rank);
        let n = x.len() / columns;
        let f = View { features: &x[1..], width: columns, rank };
        let (r, d) = (|i: usize| x[i * columns], |i: usize| x[(i + 1) * columns - 1]);
        let (mut a, mut b) = (vec![0.0; rank * rank], vec![0.0; rank]);
        for i in 0..n {
            let (row, by) = (f.of(i), 1.0 / d(i));
            for (p, fp) in row.iter().enumerate() {
                let by = by * fp;
                b[p] += by * r(i);
                a[p * rank..][..p + 1].iter_mut().zip(row).for_each(|(a, fq)| *a += by * fq);
            }
        }
        (0..rank).for_each(|p| a[p * rank + p] += 1.0);
        let factor = exact(linalg::lower(a, rank)?)?;
        let u = factor.solve(&b);
        let square = (0..n).map(|i| r(i) * r(i) / d(i)).sum::<f64>() - dot(&b, &u);
        let log_det = (0..n).map(|i| d(i).ln()).sum::<f64>() + factor.log_det();
        let Some(slope) = slope else { return finite(normal(n, square, log_det)) };
        let w: Vec<f64> = (0..n).map(|i| (r(i) - dot(f.of(i), &u)) / d(i)).collect();
        let mut wf = vec![0.0; rank];
        for (i, w) in w.iter().enumerate() {
            wf.iter_mut().zip(f.of(i)).for_each(|(sum, f)| *sum += w * f);
        }
        for (i, slope) in slope.chunks_exact_mut(columns).enumerate() {
            let s = factor.solve(f.of(i));
            let s_ii = (1.0 - dot(f.of(i), &s) / d(i)) / d(i);
            slope[0] = -w[i];
            for p in 0..rank {
                slope[1 + p] = w[i] * wf[p] - s[p] / d(i);
            }
            slope[columns - 1] = 0.5 * (w[i] * w[i] - s_ii);
        }
        finite(normal(n, square, log_det))
    }

    fn kvv(&self, x: &[f64], slope: Option<&mut [f64]>) -> Result<f64> {
        let (columns, rank) = (self.columns(), self.rank);
        let n = x.len() / columns;
        let f = View { features: &x[1..], width: columns, rank };
        let (v, d) = (|i: usize| x[(i + 1) * columns - 2], |i: usize| x[(i + 1) * columns - 1]);
        let r: Vec<f64> = (0..n).map(|i| x[i * columns]).collect();
        let sigma = kvv(f, n, v, d);
        let factor = exact(Cholesky::factor(sigma.clone())?)?;
        let w = factor.solve(&r);
        let value = normal(n, dot(&r, &w), factor.log_det());
        let Some(slope) = slope else { return finite(value) };
        let mut unit = vec![0.0; n];
        for (i, slope) in slope.chunks_exact_mut(columns).enumerate() {
            unit[i] = 1.0;
            let s = factor.solve(&unit); // row i of Σ⁻¹
            unit[i] = 0.0;
            slope.fill(0.0);
            slope[0] = -w[i];
            for j in 0..n {
                // The slope along Σᵢⱼ and Σⱼᵢ together, times the covariance that features give.
                let g = (w[i] * w[j] - s[j]) * if i == j { v(i) * v(i) } else { sigma[(i, j)] };
                slope[columns - 2] += g / v(i);
                for (p, slope) in slope[1..=rank].iter_mut().enumerate() {
                    *slope -= g * (f.of(i)[p] - f.of(j)[p]);
                }
            }
            slope[columns - 1] = 0.5 * (w[i] * w[i] - s[i]);
        }
        finite(value)
    }
}

fn normal(n: usize, square: f64, log_det: f64) -> f64 {
    -0.5 * (square + log_det + n as f64 * (2.0 * std::f64::consts::PI).ln())
}

/// A factor that needed help is the factor of another covariance.
fn exact(factor: Cholesky) -> Result<Cholesky> {
    match factor.jitter == 0.0 {
        true => Ok(factor),
        false => Err(Error::NotPositiveDefinite { size: factor.len(), jitter: 0.0 }),
    }
}

fn finite(density: f64) -> Result<f64> {
    match density.is_finite() {
        true => Ok(density),
        false => Err(Error::input("a joint density is not finite")
            .fact("log density", density)
            .try_this("check the observations for extreme values")),
    }
}

impl CustomOp1 for Density {
    fn name(&self) -> &'static str {
        "joint-gaussian"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> CandleResult<(CpuStorage, candle_core::Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a joint density needs contiguous input")
        };
        let x: Vec<f64> = match storage {
            CpuStorage::F32(x) => x[start..end].iter().map(|x| f64::from(*x)).collect(),
            CpuStorage::F64(x) => x[start..end].to_vec(),
            _ => candle_core::bail!("a joint density is one of floats"),
        };
        let (batch, targets, columns) = layout.shape().dims3()?;
        let size = targets * columns;
        let density: Vec<f64> = (0..batch)
            .into_par_iter()
            .map(|i| self.row(&x[i * size..(i + 1) * size], None))
            .collect::<Result<_>>()
            .map_err(candle_core::Error::wrap)?;
        let density = match storage {
            CpuStorage::F32(_) => CpuStorage::F32(density.iter().map(|x| *x as f32).collect()),
            _ => CpuStorage::F64(density),
        };
        Ok((density, batch.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let (_, targets, columns) = x.dims3()?;
        let host = |x: &Tensor| x.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        let (values, grad) = (host(x)?, host(grad)?);
        let size = (targets * columns).max(1);
        let mut slopes = vec![0.0; values.len()];
        slopes
            .par_chunks_mut(size)
            .zip(values.par_chunks(size))
            .zip(&grad)
            .try_for_each(|((slope, x), grad)| {
                self.row(x, Some(slope))?;
                slope.iter_mut().for_each(|s| *s *= grad);
                Ok(())
            })
            .map_err(|e: Error| candle_core::Error::wrap(e))?;
        Ok(Some(Tensor::from_vec(slopes, x.shape(), x.device())?.to_dtype(x.dtype())?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn normals(shape: &[usize], name: &str) -> Tensor {
        let values = Stream::new(5, name, 0).normals(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn some(covariance: Covariance, raw: &Tensor) -> Joint {
        let outputs = Outputs { covariance, rank: 3, nugget: true };
        assert_eq!(raw.dim(2).unwrap(), outputs.count());
        outputs.joint(Link::Identity, raw).unwrap()
    }

    fn raw(covariance: Covariance, targets: usize) -> Tensor {
        let count = Outputs { covariance, rank: 3, nugget: true }.count();
        normals(&[2, targets, count], "raw")
    }

    fn host(x: &Tensor) -> Vec<f64> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The covariance of one row, entry by entry.
    fn dense(joint: &Joint, row: usize, of: Of) -> Mat<f64> {
        let f = joint.features.to_vec3::<f64>().unwrap().swap_remove(row);
        let own = joint.diagonal(of).unwrap().to_vec2::<f64>().unwrap().swap_remove(row);
        let v = joint.scale.as_ref().map(|v| v.to_vec2::<f64>().unwrap().swap_remove(row));
        Mat::from_fn(own.len(), own.len(), |i, j| {
            let shared = match &v {
                None => dot(&f[i], &f[j]),
                Some(v) => {
                    let far: f64 = f[i].iter().zip(&f[j]).map(|(a, b)| (a - b).powi(2)).sum();
                    v[i] * v[j] * (-0.5 * far).exp()
                }
            };
            shared + if i == j { own[i] } else { 0.0 }
        })
    }

    /// Fewer targets than features, and more; surface and observation; and marginals are those of
    /// the same covariance.
    #[test]
    fn the_density_is_that_of_the_dense_gaussian() {
        for covariance in [Covariance::Linear, Covariance::Kvv] {
            for targets in [1, 2, 9] {
                let joint = some(covariance, &raw(covariance, targets));
                let values = normals(&[2, targets, 1], "values");
                for of in [Of::Surface, Of::Observation] {
                    let ours = host(&joint.log_density(of, &values).unwrap());
                    let marginals = joint.predictive().unwrap();
                    for (row, ours) in ours.into_iter().enumerate() {
                        let sigma = dense(&joint, row, of);
                        let r: Vec<f64> = (0..targets)
                            .map(|i| {
                                host(&values)[row * targets + i]
                                    - host(&joint.mean)[row * targets + i]
                            })
                            .collect();
                        for i in 0..targets {
                            let sd = host(marginals.sd(of))[row * targets + i];
                            assert!((sd * sd - sigma[(i, i)]).abs() < 1e-9 * sd * sd);
                        }
                        let factor = Cholesky::factor(sigma).unwrap();
                        let truth = normal(targets, dot(&r, &factor.solve(&r)), factor.log_det());
                        assert!((ours - truth).abs() < 1e-9 * truth.abs(), "{ours} and {truth}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_density() {
        for covariance in [Covariance::Linear, Covariance::Kvv] {
            let start = raw(covariance, 5);
            let values = normals(&[2, 5, 1], "values");
            let sum = |raw: &Tensor| {
                let weights = Tensor::new(&[1.0, -0.7], &Device::Cpu).unwrap();
                let density = some(covariance, raw).log_density(Of::Observation, &values).unwrap();
                (density * weights).unwrap().sum_all().unwrap()
            };
            let var = Var::from_tensor(&start).unwrap();
            let slope = host(sum(var.as_tensor()).backward().unwrap().get(&var).unwrap());
            let numbers = host(&start);
            for (i, slope) in slope.iter().enumerate() {
                let moved = |h: f64| {
                    let mut there = numbers.clone();
                    there[i] += h;
                    host(&sum(&Tensor::from_vec(there, start.shape(), &Device::Cpu).unwrap()))[0]
                };
                let numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!(
                    (slope - numeric).abs() < 1e-6 * (1.0 + numeric.abs()),
                    "{covariance:?}: number {i} has slope {slope}, measured {numeric}"
                );
            }
        }
    }

    /// Draws have the mean and the covariance that the density has.
    #[test]
    fn draws_are_of_the_surface() {
        for covariance in [Covariance::Linear, Covariance::Kvv] {
            let joint = some(covariance, &raw(covariance, 3).narrow(0, 0, 1).unwrap());
            let n = 20_000;
            let draws = joint.draws(n, &mut Stream::new(1, "draws", 0)).unwrap();
            let values = host(&draws.values);
            let (mean, sigma) = (host(&joint.mean), dense(&joint, 0, Of::Surface));
            for i in 0..3 {
                for j in 0..=i {
                    let products =
                        values.chunks_exact(3).map(|y| (y[i] - mean[i]) * (y[j] - mean[j]));
                    let found = products.sum::<f64>() / n as f64;
                    let spread = (sigma[(i, i)] * sigma[(j, j)] + sigma[(i, j)].powi(2)).sqrt();
                    let off = (found - sigma[(i, j)]).abs();
                    assert!(
                        off < 5.0 * spread / (n as f64).sqrt(),
                        "{covariance:?} ({i}, {j}): {off}"
                    );
                }
            }
        }
    }

    /// A target twice, with nothing of its own: no density, and none is made up.
    #[test]
    fn a_covariance_without_density_is_refused() {
        let mut joint = some(Covariance::Kvv, &raw(Covariance::Kvv, 2));
        joint.features = joint.features.zeros_like().unwrap();
        joint.scale = Some(joint.own.ones_like().unwrap());
        joint.own = joint.own.zeros_like().unwrap();
        assert!(joint.log_density(Of::Surface, &normals(&[2, 2, 1], "values")).is_err());
    }
}
