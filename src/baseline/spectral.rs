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
    /// Turns per unit of the sites, along each of their two or three axes, the last of which may be time.
    turns: Vec<Vec<f64>>,
    /// `[draw, feature]`: for each chunk of frequencies those of the cosines, then of the sines.
    weights: Mat<f32>,
    /// Root mean square error of the correlation over lags up to the extent it was made for.
    pub error: f64,
}

/// Cosine and sine of so many turns, to 1e-6; whole turns are taken off in f64.
#[inline(always)]
fn wave(turns: f64) -> [f32; 2] {
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 · 2⁵²: adding and subtracting rounds
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
    [(-2.0 * s).mul_add(s, 1.0), 2.0 * s * c]
}

simd::vectorised! {
    /// Cosine and sine of `x · fx + y · fy` turns.
    pub fn waves(x: f64, y: f64, fx: &[f64], fy: &[f64], cos: &mut [f32], sin: &mut [f32]) {
        for (((fx, fy), cos), sin) in fx.iter().zip(fy).zip(cos).zip(sin) {
            [*cos, *sin] = wave(fx.mul_add(x, fy * y));
        }
    }
}

simd::vectorised! {
    /// The same in space.
    pub fn waves_in_space(at: [f64; 3], f: [&[f64]; 3], cos: &mut [f32], sin: &mut [f32]) {
        let [fx, fy, fz] = f;
        for ((((fx, fy), fz), cos), sin) in fx.iter().zip(fy).zip(fz).zip(cos).zip(sin) {
            [*cos, *sin] = wave(fx.mul_add(at[0], fy.mul_add(at[1], fz * at[2])));
        }
    }
}

/// Waves of frequencies `of` at a place of as many axes.
fn waves_at(place: &[f64], of: &[&[f64]], cos: &mut [f32], sin: &mut [f32]) {
    match (place, of) {
        ([x, y], [fx, fy]) => waves(*x, *y, fx, fy, cos, sin),
        ([x, y, z], [fx, fy, fz]) => waves_in_space([*x, *y, *z], [fx, fy, fz], cos, sin),
        _ => unreachable!("Spectral::new makes no others"),
    }
}

impl Spectral {
    /// `draws` draws of a surface with this covariance, for places of `dim` coordinates up to `extent`
    /// apart, in space and, where the kernel has a time, in time.
    ///
    /// # Errors
    /// [`Error::Input`] for a kernel without a spectral distribution in so many dimensions.
    pub fn new(
        kernel: &dyn Kernel,
        dim: usize,
        draws: usize,
        seed: u64,
        extent: [f64; 2],
    ) -> Result<Self> {
        let mut count = FREQUENCIES[0];
        let (turns, error) = loop {
            let turns = frequencies(kernel, dim, count).ok_or_else(|| {
                Error::input("surfaces of this kernel cannot be drawn at map scale")
                    .fact("kernel", format!("{kernel:?}"))
                    .fact("coordinates of a place", dim)
                    .try_this("use a Matérn kernel on a plane or the globe, or one on a plane and in time")
            })?;
            let error = error(kernel, &turns, extent);
            if error < ENOUGH || count >= FREQUENCIES[1] {
                break (turns, error);
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
        Ok(Spectral { turns, weights, error })
    }

    /// Adds the draws at each place to a column of `out` `[draw, place]`.
    pub fn add(&self, places: &[Vec<f64>], mut out: MatMut<f32>) {
        let mut features = Mat::<f32>::zeros(2 * CHUNK, places.len());
        for start in (0..self.turns[0].len()).step_by(CHUNK) {
            let of: Vec<&[f64]> = self.turns.iter().map(|f| &f[start..start + CHUNK]).collect();
            for (i, place) in places.iter().enumerate() {
                let (cos, sin) = features.col_as_slice_mut(i).split_at_mut(CHUNK);
                waves_at(place, &of, cos, sin);
            }
            let weights = self.weights.as_ref().subcols(2 * start, 2 * CHUNK);
            matmul(out.as_mut(), Accum::Add, weights, features.as_ref(), 1.0f32, Par::Seq);
        }
    }
}

/// `count` frequencies, turns per unit, each of one share of the spectral distribution: equal steps
/// of its distribution function outwards, the golden section of all directions from one to the next; in
/// three dimensions, by the two numbers that are golden for pairs (those of the plastic number).
fn frequencies(kernel: &dyn Kernel, dim: usize, count: usize) -> Option<Vec<Vec<f64>>> {
    const PLASTIC: f64 = 1.324_717_957_244_746;
    let golden = 0.5 * (5f64.sqrt() - 1.0);
    let mut turns = vec![Vec::with_capacity(count); dim];
    for j in 0..count {
        let (share, j) = ((j as f64 + 0.5) / count as f64, j as f64);
        let found = match dim {
            2 => kernel.frequency(&[share, (j * golden).fract()])?,
            3 => {
                let pair = [(0.5 + j / PLASTIC).fract(), (j / PLASTIC / PLASTIC).fract()];
                kernel.frequency(&[share, pair[0], pair[1]])?
            }
            _ => return None,
        };
        let each = turns.iter_mut().zip(found);
        each.for_each(|(turns, f)| turns.push(f / std::f64::consts::TAU));
    }
    Some(turns)
}

/// Root mean square difference between the waves' correlation and the kernel's, over lags spread on
/// a disc or ball of radius `extent`; of a kernel of time, on the disc and over `time` as well.
fn error(kernel: &dyn Kernel, turns: &[Vec<f64>], [extent, time]: [f64; 2]) -> f64 {
    const LAGS: usize = 400;
    let golden = std::f64::consts::TAU * 0.5 * (5f64.sqrt() - 1.0);
    let (dim, count) = (turns.len(), turns[0].len());
    let turns: Vec<&[f64]> = turns.iter().map(Vec::as_slice).collect();
    let (mut cos, mut sin) = (vec![0f32; count], vec![0f32; count]);
    let timed = kernel.change().is_some();
    let squares = (0..LAGS).map(|i| {
        let r = extent * (i as f64 + 0.5) / LAGS as f64;
        let up = if dim == 3 { 2.0 * (i as f64 * 2f64.sqrt()).fract() - 1.0 } else { 0.0 };
        let across = if timed { r } else { r * (1.0 - up * up).sqrt() };
        let turn = golden * i as f64;
        let last = if timed { time * up } else { r * up };
        let lag = [across * turn.cos(), across * turn.sin(), last];
        waves_at(&lag[..dim], &turns, &mut cos, &mut sin);
        let waved = cos.iter().map(|c| f64::from(*c)).sum::<f64>() / count as f64;
        (waved - kernel.covariance(&lag[..dim], &[0.0; 3][..dim]) / kernel.sill()).powi(2)
    });
    (squares.sum::<f64>() / LAGS as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kernel::{Matern, Metric, Smoothness, SpaceTime};

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
        let fz: Vec<f64> = (0..4000).map(|i| f64::from(i) * 0.01 - 3.0).collect();
        waves_in_space([0.7, -1.3, 0.4], [&fx, &fy, &fz], &mut cos, &mut sin);
        for i in 0..4000 {
            let turns = 0.7 * fx[i] - 1.3 * fy[i] + 0.4 * fz[i];
            let (s, c) = (std::f64::consts::TAU * turns).sin_cos();
            let off = (f64::from(cos[i]) - c).abs().max((f64::from(sin[i]) - s).abs());
            assert!(off < 1e-6, "{off} at {i} in space");
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
                    let spectral = Spectral::new(&kernel, 2, 1, 0, [2.5, 0.0]).unwrap();
                    assert!(spectral.error < most, "{kernel:?}: {}", spectral.error);
                }
            }
        }
    }

    /// In space too, where directions fill half a sphere.
    #[test]
    fn so_it_is_in_space() {
        for smoothness in Smoothness::all() {
            for (length_scale, most) in [(0.1, 0.02), (0.4, 0.02), (1.5, 0.01)] {
                let metric = Metric::Euclidean;
                let kernel = Matern { smoothness, length_scale, sill: 2.0, metric };
                let spectral = Spectral::new(&kernel, 3, 1, 0, [2.5, 0.0]).unwrap();
                assert!(spectral.error < most, "{kernel:?}: {}", spectral.error);
            }
        }
    }

    /// And in time, for every part that may stay.
    #[test]
    fn so_it_is_in_time() {
        for (space, time, time_scale, static_share, most) in [
            (Smoothness::Half, Smoothness::Half, 0.3, 0.0, 0.02),
            (Smoothness::ThreeHalves, Smoothness::Half, 1.0, 0.4, 0.01),
            (Smoothness::FiveHalves, Smoothness::ThreeHalves, 0.5, 0.9, 0.01),
            (Smoothness::ThreeHalves, Smoothness::Infinite, 4.0, 0.1, 0.01),
        ] {
            let metric = Metric::Anisotropic { angle: 0.4, ratio: 2.0 };
            let space = Matern { smoothness: space, length_scale: 0.4, sill: 2.0, metric };
            let kernel =
                SpaceTime { space: Arc::new(space), smoothness: time, time_scale, static_share };
            let spectral = Spectral::new(&kernel, 3, 1, 0, [2.5, 2.0]).unwrap();
            assert!(spectral.error < most, "{kernel:?}: {}", spectral.error);
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
            let spectral = Spectral::new(&kernel, 2, draws, 9, [2.0, 0.0]).unwrap();
            let mut out = Mat::zeros(draws, 2);
            spectral.add(&[vec![0.1, -0.3], vec![0.4, 0.9]], out.as_mut());
            out
        });
        for d in 0..3 {
            assert!((few[(d, 1)] - many[(d, 1)]).abs() < 1e-5);
        }
    }
}
