//! Prior draws of a stationary Gaussian process as sums of waves, which any place can be asked about
//! alone: the same field, whatever is asked with it.
//!
//! Sources: Rahimi & Recht (2007), "Random features for large-scale kernel machines", for cos and sin
//! of frequencies from the kernel's spectral distribution; Vogel (1979),
//! doi:10.1016/0025-5564(79)90080-4, for the spiral on which they lie here in place of random ones: for
//! a Matérn kernel the covariance is then three to ten times nearer to the kernel's.

use faer::{Accum, Mat, MatMut, Par, linalg::matmul::matmul};

use crate::{
    error::{Error, Result},
    fused::simd,
    kernel::Kernel,
    rng::Stream,
};

/// The fewest and the most frequencies; each makes two features.
const FREQUENCIES: [usize; 2] = [512, 2048];
/// Frequencies whose waves are made at once.
const CHUNK: usize = 256;
/// Root mean square error of the correlation, over lags up to the extent, that is good enough.
const ENOUGH: f64 = 0.004;

/// Draws of a surface with mean zero: `Σⱼ aⱼ cos(ωⱼ·s) + bⱼ sin(ωⱼ·s)` with normal a and b. All draws
/// share their frequencies, so that many draws at many places are one matrix product.
pub(super) struct Spectral {
    /// Turns per unit of the sites.
    x: Vec<f64>,
    y: Vec<f64>,
    /// `[draw, feature]`: for each chunk of frequencies those of the cosines, then of the sines.
    weights: Mat<f32>,
    /// Root mean square error of the correlation over lags up to the extent it was made for.
    pub error: f64,
}

simd::vectorised! {
    /// Cosine and sine of `x · fx + y · fy` turns, to 1e-6; whole turns are taken off in f64.
    pub fn waves(x: f64, y: f64, fx: &[f64], fy: &[f64], cos: &mut [f32], sin: &mut [f32]) {
        const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 · 2⁵²: adding and subtracting rounds
        for (((fx, fy), cos), sin) in fx.iter().zip(fy).zip(cos).zip(sin) {
            let turns = fx.mul_add(x, fy * y);
            let part = (turns - ((turns + ROUND) - ROUND)) as f32;
            // Half of the angle lies within a quarter turn, where few terms of Taylor's are enough.
            let h = part * std::f32::consts::PI;
            let q = h * h;
            let s = (-2.505_210_8e-8_f32).mul_add(q, 2.755_731_9e-6);
            let s = s.mul_add(q, -1.984_127e-4).mul_add(q, 8.333_333e-3);
            let s = s.mul_add(q, -0.166_666_67).mul_add(q, 1.0) * h;
            let c = 2.087_675_7e-9_f32.mul_add(q, -2.755_732e-7);
            let c = c.mul_add(q, 2.480_158_7e-5).mul_add(q, -1.388_888_9e-3);
            let c = c.mul_add(q, 4.166_666_7e-2).mul_add(q, -0.5).mul_add(q, 1.0);
            *cos = (-2.0 * s).mul_add(s, 1.0);
            *sin = 2.0 * s * c;
        }
    }
}

impl Spectral {
    /// `draws` draws of a surface with this covariance, for places up to `extent` apart.
    ///
    /// # Errors
    /// [`Error::Input`] for a kernel without a spectral distribution in the plane.
    pub fn new(kernel: &dyn Kernel, draws: usize, seed: u64, extent: f64) -> Result<Self> {
        let mut count = FREQUENCIES[0];
        let (x, y, error) = loop {
            let [x, y] = frequencies(kernel, count).ok_or_else(|| {
                Error::input("surfaces of this kernel cannot be drawn at map scale")
                    .fact("kernel", format!("{kernel:?}"))
                    .try_this("use a Matérn kernel on a plane")
            })?;
            let error = error(kernel, &x, &y, extent);
            if error < ENOUGH || count >= FREQUENCIES[1] {
                break (x, y, error);
            }
            count *= 2;
        };
        let sd = (kernel.sill() / count as f64).sqrt();
        let mut weights = Mat::zeros(draws, 2 * count);
        for j in 0..count {
            let mut rng = Stream::new(seed, "waves of a field", j as u64);
            let at = 2 * CHUNK * (j / CHUNK) + j % CHUNK;
            for d in 0..draws {
                weights[(d, at)] = (sd * rng.normal()) as f32;
                weights[(d, at + CHUNK)] = (sd * rng.normal()) as f32;
            }
        }
        Ok(Spectral { x, y, weights, error })
    }

    /// Adds the draws at each place to a column of `out` `[draw, place]`.
    pub fn add(&self, x: &[f64], y: &[f64], mut out: MatMut<f32>) {
        let mut features = Mat::<f32>::zeros(2 * CHUNK, x.len());
        for start in (0..self.x.len()).step_by(CHUNK) {
            let (fx, fy) = (&self.x[start..start + CHUNK], &self.y[start..start + CHUNK]);
            for (i, (x, y)) in x.iter().zip(y).enumerate() {
                let (cos, sin) = features.col_as_slice_mut(i).split_at_mut(CHUNK);
                waves(*x, *y, fx, fy, cos, sin);
            }
            let weights = self.weights.as_ref().subcols(2 * start, 2 * CHUNK);
            matmul(out.as_mut(), Accum::Add, weights, features.as_ref(), 1.0f32, Par::Seq);
        }
    }
}

/// `count` frequencies, turns per unit, each of one share of the spectral distribution: equal steps
/// of its distribution function outwards, the golden section of a half turn from one to the next.
fn frequencies(kernel: &dyn Kernel, count: usize) -> Option<[Vec<f64>; 2]> {
    let golden = 0.5 * (5f64.sqrt() - 1.0);
    let (mut x, mut y) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for j in 0..count {
        let share = (j as f64 + 0.5) / count as f64;
        let [fx, fy] = kernel.frequency(share, 0.5 * (j as f64 * golden).fract())?;
        x.push(fx / std::f64::consts::TAU);
        y.push(fy / std::f64::consts::TAU);
    }
    Some([x, y])
}

/// Root mean square difference between the waves' correlation and the kernel's, over lags spread on
/// a disc of radius `extent`.
fn error(kernel: &dyn Kernel, x: &[f64], y: &[f64], extent: f64) -> f64 {
    const LAGS: usize = 400;
    let golden = std::f64::consts::TAU * 0.5 * (5f64.sqrt() - 1.0);
    let (mut cos, mut sin) = (vec![0f32; x.len()], vec![0f32; x.len()]);
    let squares = (0..LAGS).map(|i| {
        let r = extent * (i as f64 + 0.5) / LAGS as f64;
        let (u, v) = (r * (golden * i as f64).cos(), r * (golden * i as f64).sin());
        waves(u, v, x, y, &mut cos, &mut sin);
        let waved = cos.iter().map(|c| f64::from(*c)).sum::<f64>() / x.len() as f64;
        (waved - kernel.covariance(&[u, v], &[0.0, 0.0]) / kernel.sill()).powi(2)
    });
    (squares.sum::<f64>() / LAGS as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Matern, Metric, Smoothness};

    #[test]
    fn waves_are_cosines_and_sines() {
        let fx: Vec<f64> = (0..4000).map(|i| f64::from(i) * 0.137 - 200.0).collect();
        let fy: Vec<f64> = (0..4000).map(|i| 50.0 - f64::from(i) * 0.031).collect();
        let (mut cos, mut sin) = (vec![0f32; 4000], vec![0f32; 4000]);
        waves(0.7, -1.3, &fx, &fy, &mut cos, &mut sin);
        for i in 0..4000 {
            let (s, c) = (std::f64::consts::TAU * (0.7 * fx[i] - 1.3 * fy[i])).sin_cos();
            let off = (f64::from(cos[i]) - c).abs().max((f64::from(sin[i]) - s).abs());
            assert!(off < 1e-6, "{off} at {i}");
        }
    }

    /// Every smoothness, short and long; and a kernel that is longer one way than the other.
    #[test]
    fn the_covariance_of_the_waves_is_the_kernels() {
        for smoothness in Smoothness::all() {
            for (length_scale, most) in [(0.1, 0.01), (0.4, 0.006), (1.5, 0.005)] {
                let turned = Metric::Anisotropic { angle: 0.7, ratio: 2.5 };
                for metric in [Metric::Euclidean, turned] {
                    let kernel = Matern { smoothness, length_scale, sill: 2.0, metric };
                    let spectral = Spectral::new(&kernel, 1, 0, 2.5).unwrap();
                    assert!(spectral.error < most, "{kernel:?}: {}", spectral.error);
                }
            }
        }
    }

    /// The d-th draw is the same however many are drawn.
    #[test]
    fn more_draws_change_none() {
        let kernel = Matern {
            smoothness: Smoothness::Half,
            length_scale: 0.5,
            sill: 1.0,
            metric: Metric::Euclidean,
        };
        let [few, many] = [3, 40].map(|draws| {
            let spectral = Spectral::new(&kernel, draws, 9, 2.0).unwrap();
            let mut out = Mat::zeros(draws, 2);
            spectral.add(&[0.1, 0.4], &[-0.3, 0.9], out.as_mut());
            out
        });
        for d in 0..3 {
            assert!((few[(d, 1)] - many[(d, 1)]).abs() < 1e-5);
        }
    }
}
