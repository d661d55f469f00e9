//! Dirichlet laws over a few experts: log density, divergence, and draws that carry gradients.
//!
//! A draw is a set of gamma variables divided by their sum. Gamma variables come from Marsaglia &
//! Tsang (2000) at a shape raised by [`RAISED`], brought down by Γ(a) = Γ(a + 1) U^{1/a}: accepted
//! there almost always, so that what is left out of the gradient by differentiating through the
//! accepted draw is small (Naesseth et al. 2017, arXiv:1610.05683).

use candle_core::{D, Tensor};

use crate::{
    error::Result,
    fused::special::{digamma, log_gamma},
    rng::Stream,
};

/// By how much shapes are raised before a draw.
const RAISED: usize = 4;
/// No share is taken to be less than e to this.
const LEAST: f64 = -30.0;

/// `draws` draws under concentrations `alpha` `[batch, expert]`: log shares `[draw, batch, expert]`,
/// at least −30, with gradients with respect to `alpha`.
pub fn log_shares(alpha: &Tensor, draws: usize, rng: &mut Stream) -> Result<Tensor> {
    let (batch, experts) = alpha.dims2()?;
    let host = alpha.detach().to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let (mut normals, mut falls) = (Vec::new(), Vec::new());
    for _ in 0..draws {
        for a in &host {
            normals.push(accepted(a + RAISED as f64, rng));
            falls.extend((0..RAISED).map(|_| rng.unit().max(1e-300).ln()));
        }
    }
    let of = |values: Vec<f64>, shape: &[usize]| -> Result<Tensor> {
        Ok(Tensor::from_vec(values, shape, alpha.device())?.to_dtype(alpha.dtype())?)
    };
    let normals = of(normals, &[draws, batch, experts])?;
    let falls = of(falls, &[draws, batch, experts, RAISED])?;
    let d = (alpha + (RAISED as f64 - 1.0 / 3.0))?; // shape − 1/3
    let root = ((&d * 9.0)?.sqrt()?.recip())?;
    let cube = (normals.broadcast_mul(&root)? + 1.0)?;
    let mut log = (cube.log()? * 3.0)?.broadcast_add(&d.log()?)?;
    for i in 0..RAISED {
        let fall = falls.narrow(3, i, 1)?.squeeze(3)?;
        log = (log + fall.broadcast_div(&(alpha + i as f64)?)?)?;
    }
    let total = log.log_sum_exp(D::Minus1)?.unsqueeze(2)?;
    Ok(log.broadcast_sub(&total)?.maximum(LEAST)?)
}

/// The normal variable of an accepted draw at `shape` ≥ 1.
fn accepted(shape: f64, rng: &mut Stream) -> f64 {
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = rng.normal();
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && rng.unit().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return x;
        }
    }
}

/// Log density of log shares `[…, batch, expert]` under `alpha` `[batch, expert]`: `[…, batch]`.
pub fn log_density(log_shares: &Tensor, alpha: &Tensor) -> Result<Tensor> {
    let level = (log_gamma(&alpha.sum(D::Minus1)?)? - log_gamma(alpha)?.sum(D::Minus1)?)?;
    let shape = log_shares.broadcast_mul(&(alpha - 1.0)?)?.sum(D::Minus1)?;
    Ok(shape.broadcast_add(&level)?)
}

/// KL(Dir(`a`) ‖ Dir(`b`)), both `[batch, expert]`: `[batch]`.
pub fn divergence(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a0, b0) = (a.sum(D::Minus1)?, b.sum(D::Minus1)?);
    let level = ((log_gamma(&a0)? - log_gamma(&b0)?)?
        - (log_gamma(a)? - log_gamma(b)?)?.sum(D::Minus1)?)?;
    let slopes = digamma(a)?.broadcast_sub(&digamma(&a0)?.unsqueeze(D::Minus1)?)?;
    Ok((level + ((a - b)? * slopes)?.sum(D::Minus1)?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn alpha() -> Tensor {
        Tensor::new(&[[0.3f64, 1.0, 2.5], [4.0, 0.05, 0.7]], &Device::Cpu).unwrap()
    }

    /// Means α/Σα and variances m(1 − m)/(Σα + 1).
    #[test]
    fn draws_have_the_moments_of_the_law() {
        let alpha = alpha();
        let n = 40_000;
        let log = log_shares(&alpha, n, &mut Stream::new(1, "dirichlet", 0)).unwrap();
        let z = log.exp().unwrap();
        let total = z.sum(2).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert!(total.iter().all(|t| (t - 1.0).abs() < 1e-9));
        let mean = z.mean(0).unwrap().to_vec2::<f64>().unwrap();
        let square = z.sqr().unwrap().mean(0).unwrap().to_vec2::<f64>().unwrap();
        for (row, a) in alpha.to_vec2::<f64>().unwrap().iter().enumerate() {
            let a0: f64 = a.iter().sum();
            for (l, a) in a.iter().enumerate() {
                let m = a / a0;
                let v = m * (1.0 - m) / (a0 + 1.0);
                let error = (v / n as f64).sqrt();
                assert!((mean[row][l] - m).abs() < 5.0 * error, "mean {} of {m}", mean[row][l]);
                let found = square[row][l] - mean[row][l].powi(2);
                assert!((found - v).abs() < 0.05 * v + 1e-4, "variance {found} of {v}");
            }
        }
    }

    /// Density and divergence against each other: KL is the mean of the difference of log densities.
    #[test]
    fn divergence_is_what_draws_say() {
        let a = Tensor::new(&[[1.3f64, 2.0, 3.5]], &Device::Cpu).unwrap();
        let b = Tensor::new(&[[2.0f64, 1.1, 0.6]], &Device::Cpu).unwrap();
        let n = 60_000;
        let log = log_shares(&a, n, &mut Stream::new(2, "dirichlet", 0)).unwrap();
        let apart = (log_density(&log, &a).unwrap() - log_density(&log, &b).unwrap()).unwrap();
        let apart = apart.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let mean = apart.iter().sum::<f64>() / n as f64;
        let sd = (apart.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
        let exact = divergence(&a, &b).unwrap().to_vec1::<f64>().unwrap()[0];
        assert!((mean - exact).abs() < 5.0 * sd / (n as f64).sqrt(), "{mean} of {exact}");
        assert!(divergence(&a, &a).unwrap().to_vec1::<f64>().unwrap()[0].abs() < 1e-12);
        // From Python's math.lgamma.
        let at = Tensor::new(&[[0.2f64, 0.3, 0.5]], &Device::Cpu).unwrap().log().unwrap();
        let density = log_density(&at, &a).unwrap().to_vec1::<f64>().unwrap()[0];
        assert!((density - 1.695_326_189_072_221_5).abs() < 1e-9, "{density}");
    }

    /// The mean of a share grows with its concentration as α/Σα does: draws carry that gradient.
    #[test]
    fn draws_carry_the_gradient_of_their_mean() {
        let alpha = Var::from_tensor(&alpha()).unwrap();
        let n = 40_000;
        let log = log_shares(&alpha, n, &mut Stream::new(3, "dirichlet", 0)).unwrap();
        let mean = log.exp().unwrap().mean(0).unwrap().narrow(1, 0, 1).unwrap();
        let grad = mean.sum_all().unwrap().backward().unwrap();
        let grad = grad.get(&alpha).unwrap().to_vec2::<f64>().unwrap();
        for (row, a) in alpha.to_vec2::<f64>().unwrap().iter().enumerate() {
            let a0: f64 = a.iter().sum();
            for (l, found) in grad[row].iter().enumerate() {
                let exact = (f64::from(u8::from(l == 0)) - a[0] / a0) / a0;
                assert!((found - exact).abs() < 0.01, "{} of {exact}", found);
            }
        }
    }
}
