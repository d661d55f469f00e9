//! Exact draws of stationary surfaces on lattices of a million nodes, by circulant embedding.
//!
//! The covariances of a lattice are a corner of those of a torus, whose matrix the Fourier transform
//! makes diagonal: a draw costs one transform, and is exact where no eigenvalue is negative.
//!
//! Sources: Dietrich & Newsam (1997), doi:10.1137/S1064827592240555; Wood & Chan (1994),
//! doi:10.1080/10618600.1994.10474655, for tori that grow until nothing is negative.

use rayon::prelude::*;
use rustfft::{Fft, FftPlanner, num_complex::Complex64};

use crate::{
    error::{Error, Result},
    kernel::Kernel,
    rng::Stream,
};

/// Nodes of the largest torus: 16 bytes each, and as many again while it is transformed.
const LARGEST: usize = 1 << 24;
/// Negative mass that rounding makes.
const ROUNDING: f64 = 1e-9;
/// The most negative mass that is let pass, and reported, once the torus is as large as may be.
const TOLERANCE: f64 = 1e-5;

/// A lattice on which surfaces of one covariance are drawn.
#[derive(Debug)]
pub struct Lattice {
    cols: usize,
    rows: usize,
    /// Columns and rows of the torus.
    torus: [usize; 2],
    /// √(eigenvalue / nodes) of each frequency, laid out as the transform leaves them.
    scale: Vec<f64>,
    negative: f64,
}

impl Lattice {
    /// A lattice of `cols` × `rows` nodes `step` apart.
    ///
    /// The torus is at least twice as long and wide, and grows until its covariance has no negative
    /// eigenvalue.
    ///
    /// # Units
    /// `step` in the units of the kernel's length scale.
    /// # Errors
    /// [`Error::Input`] for a lattice without nodes, a step that is not positive, a kernel that is not
    /// stationary, and one whose range is so long that no torus of 2²⁴ nodes will do.
    /// # Source
    /// Wood & Chan (1994), section 4.
    pub fn new(kernel: &dyn Kernel, [cols, rows]: [usize; 2], step: [f64; 2]) -> Result<Self> {
        let refuse = |what: &str| {
            Error::input(what)
                .fact("lattice", format!("{cols} × {rows}"))
                .fact("step", format!("{} × {}", step[0], step[1]))
        };
        if cols == 0 || rows == 0 || step.iter().any(|s| !(*s > 0.0 && s.is_finite())) {
            return Err(refuse("a lattice needs nodes, some way apart")
                .try_this("give at least one column and row, and a step above 0"));
        }
        if !stationary(kernel, [cols, rows], step) {
            return Err(refuse("the covariance is not that of a stationary surface")
                .fact("kernel", format!("{kernel:?}"))
                .try_this("draw the surface site after site instead"));
        }
        // Every lag there and back, and the lag of none.
        let mut least = [cols, rows].map(|n| 2 * n - 1);
        loop {
            let torus = least.map(fast);
            if torus[0] * torus[1] > LARGEST {
                return Err(refuse("the surface is too long in range for this lattice")
                    .fact("kernel", format!("{kernel:?}"))
                    .try_this("draw a shorter length scale, or fewer nodes"));
            }
            let mut values = transform(&covariances(kernel, torus, step), torus);
            let sum: f64 = values.iter().map(|v| v.re).sum();
            let below: f64 = values.iter().map(|v| (-v.re).max(0.0)).sum();
            let negative = below / sum;
            let last = 4 * torus[0] * torus[1] > LARGEST;
            if negative <= ROUNDING || (last && negative <= TOLERANCE) {
                let nodes = values.len() as f64;
                let scale = values.drain(..).map(|v| (v.re.max(0.0) / nodes).sqrt()).collect();
                return Ok(Lattice { cols, rows, torus, scale, negative });
            }
            // A lattice of one column needs no width.
            least = torus.map(|n| if n > 1 { 2 * n } else { n });
        }
    }

    /// Sum of the negative eigenvalues over that of all, which were set to 0: no covariance of a draw
    /// is further from the kernel's than this times the sill. 0 or rounding, as a rule.
    pub fn negative(&self) -> f64 {
        self.negative
    }

    /// Two independent surfaces with mean zero, from one transform.
    ///
    /// # Shapes
    /// `[row][column]`, flat, the first row first.
    pub fn draw(&self, rng: &mut Stream) -> [Vec<f64>; 2] {
        let noise: Vec<Complex64> =
            self.scale.iter().map(|s| Complex64::new(s * rng.normal(), s * rng.normal())).collect();
        // The frequencies lie transposed, and so the transform brings the nodes back in order.
        let [width, height] = self.torus;
        let values = transform(&noise, [height, width]);
        let pick = |part: fn(&Complex64) -> f64| {
            let row = |r: usize| values[r * width..][..self.cols].iter().map(part);
            (0..self.rows).flat_map(row).collect()
        };
        [pick(|v| v.re), pick(|v| v.im)]
    }
}

/// Whether the covariance of two nodes hangs on their lag alone, on a few of them.
fn stationary(kernel: &dyn Kernel, size: [usize; 2], step: [f64; 2]) -> bool {
    let side = [0, 1].map(|d| size[d] as f64 * step[d]);
    let slack = 1e-9 * kernel.sill();
    (1..=16).all(|i| {
        // Powers of the plastic number fill the square evenly (Roberts 2018).
        let at = |k: f64| [0.754_877_666_2, 0.569_840_291].map(|g| (k * g).fract());
        let (lag, from) = (at(f64::from(i)), at(f64::from(i) + 0.5));
        let lag = [0, 1].map(|d| 0.3 * side[d] * lag[d]);
        let from = [0, 1].map(|d| 0.7 * side[d] * from[d]);
        let to = [0, 1].map(|d| from[d] + lag[d]);
        (kernel.covariance(&to, &from) - kernel.covariance(&lag, &[0.0; 2])).abs() <= slack
    })
}

/// The covariance of every node of a torus with its first, `[row][column]`.
fn covariances(kernel: &dyn Kernel, [cols, rows]: [usize; 2], step: [f64; 2]) -> Vec<Complex64> {
    let lag = |i: usize, n: usize| if 2 * i <= n { i as f64 } else { i as f64 - n as f64 };
    let x: Vec<f64> = (0..cols).map(|i| step[0] * lag(i, cols)).collect();
    let mut all = vec![Complex64::default(); cols * rows];
    all.par_chunks_mut(cols).enumerate().for_each(|(j, out)| {
        let up = step[1] * lag(j, rows);
        let (mut here, mut other) = (vec![0.0; cols], vec![0.0; cols]);
        kernel.column([0.0; 2], &x, &vec![up; cols], &mut here);
        // Half way round, a lag is as long forwards as backwards, and belongs to both.
        if 2 * j == rows {
            kernel.column([0.0; 2], &x, &vec![-up; cols], &mut other);
            here.iter_mut().zip(&other).for_each(|(a, b)| *a = 0.5 * (*a + b));
        }
        if cols % 2 == 0 {
            let across = x[cols / 2];
            let both = [across, -across].map(|x| kernel.covariance(&[x, up], &[0.0; 2]));
            here[cols / 2] = 0.5 * (both[0] + both[1]);
        }
        out.iter_mut().zip(here).for_each(|(out, c)| out.re = c);
    });
    all
}

/// The Fourier transform in the plane, of `[row][column]`, which leaves it as `[column][row]`.
fn transform(values: &[Complex64], [cols, rows]: [usize; 2]) -> Vec<Complex64> {
    let mut planner = FftPlanner::new();
    let along = |fft: &dyn Fft<f64>, values: &mut [Complex64]| {
        let room = fft.get_inplace_scratch_len();
        values.par_chunks_mut(fft.len()).for_each_init(
            || vec![Complex64::default(); room],
            |scratch, line| fft.process_with_scratch(line, scratch),
        );
    };
    let mut lines = values.to_vec();
    along(&*planner.plan_fft_forward(cols), &mut lines);
    let mut turned = vec![Complex64::default(); lines.len()];
    // Eight columns at once, so that what a line of memory brings is used.
    turned.par_chunks_mut(8 * rows).enumerate().for_each(|(block, out)| {
        for row in 0..rows {
            for (k, column) in out.chunks_mut(rows).enumerate() {
                column[row] = lines[row * cols + 8 * block + k];
            }
        }
    });
    along(&*planner.plan_fft_forward(rows), &mut turned);
    turned
}

/// The smallest length from `n` on that has no prime factor above 5: those transform fast.
fn fast(n: usize) -> usize {
    let smooth = |mut n: usize| {
        for p in [2, 3, 5] {
            while n.is_multiple_of(p) {
                n /= p;
            }
        }
        n == 1
    };
    (n.max(1)..).find(|n| smooth(*n)).expect("powers of 2 are without end")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernel::{Matern, Metric, Smoothness},
        prior::zones::Zones,
    };

    fn matern(smoothness: Smoothness, length_scale: f64, metric: Metric) -> Matern {
        Matern { smoothness, length_scale, sill: 2.0, metric }
    }

    const TURNED: Metric = Metric::Anisotropic { angle: 0.6, ratio: 3.0 };

    /// The covariance that draws have, node by node: that of the eigenvalues, transformed back.
    fn implied(lattice: &Lattice) -> Vec<f64> {
        let squares: Vec<Complex64> =
            lattice.scale.iter().map(|s| Complex64::new(s * s, 0.0)).collect();
        let [width, height] = lattice.torus;
        transform(&squares, [height, width]).iter().map(|v| v.re).collect()
    }

    /// Every lag of the lattice, forwards and backwards, has the kernel's covariance to rounding.
    #[test]
    fn draws_have_the_covariance_of_the_kernel_at_every_lag() {
        for smoothness in [Smoothness::Half, Smoothness::ThreeHalves, Smoothness::Infinite] {
            for (metric, length_scale) in
                [(Metric::Euclidean, 0.1), (Metric::Euclidean, 0.9), (TURNED, 0.3)]
            {
                let kernel = matern(smoothness, length_scale, metric);
                let (cols, rows, step) = (23usize, 14usize, [0.07, 0.05]);
                let lattice = Lattice::new(&kernel, [cols, rows], step).unwrap();
                assert!(lattice.negative() < 1e-9, "{kernel:?}: {}", lattice.negative());
                let (found, [width, height]) = (implied(&lattice), lattice.torus);
                for across in 1 - cols as i64..cols as i64 {
                    for up in 0..rows as i64 {
                        let at = |i: i64, n: usize| i.rem_euclid(n as i64) as usize;
                        let (c, r) = (at(across, width), at(up, height));
                        let lag = [across as f64 * step[0], up as f64 * step[1]];
                        let off = found[r * width + c] - kernel.covariance(&lag, &[0.0; 2]);
                        assert!(off.abs() < 1e-8, "{kernel:?} at {lag:?}: {off}");
                    }
                }
            }
        }
    }

    /// Moments of many draws, of both surfaces of a transform and between the two: what the algebra
    /// above does not see is whether draws use the eigenvalues they should.
    #[test]
    fn many_draws_have_the_moments_of_the_kernel() {
        let kernel = matern(Smoothness::Half, 0.3, TURNED);
        let (cols, rows, step) = (40usize, 25usize, [0.05, 0.08]);
        let lattice = Lattice::new(&kernel, [cols, rows], step).unwrap();
        let lags = [(0i64, 0i64), (1, 0), (0, 1), (3, 2), (-3, 2), (6, 0)];
        let (mut sums, mut squares, mut crossed) = ([0.0; 6], [0.0; 6], 0.0);
        const DRAWS: usize = 300;
        for draw in 0..DRAWS {
            let [a, b] = lattice.draw(&mut Stream::new(5, "lattice", draw as u64));
            crossed += a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>() / a.len() as f64;
            for (k, (across, up)) in lags.iter().enumerate() {
                let (mut sum, mut n) = (0.0, 0.0);
                for r in 0..rows as i64 - up {
                    for c in 0.max(-across)..(cols as i64).min(cols as i64 - across) {
                        let at = |r: i64, c: i64| r as usize * cols + c as usize;
                        let (here, there) = (at(r, c), at(r + up, c + across));
                        sum += a[here] * a[there] + b[here] * b[there];
                        n += 2.0;
                    }
                }
                sums[k] += sum / n;
                squares[k] += (sum / n).powi(2);
            }
        }
        let n = DRAWS as f64;
        for (k, (across, up)) in lags.iter().enumerate() {
            let lag = [*across as f64 * step[0], *up as f64 * step[1]];
            let (mean, wanted) = (sums[k] / n, kernel.covariance(&lag, &[0.0; 2]));
            let error = ((squares[k] / n - mean * mean) / n).sqrt();
            assert!(error < 0.03, "too few draws to tell: {error}");
            assert!((mean - wanted).abs() < 4.0 * error, "{lag:?}: {mean} ± {error}, not {wanted}");
        }
        assert!((crossed / n).abs() < 0.05, "the two are independent: {}", crossed / n);
    }

    #[test]
    fn the_same_stream_draws_the_same_surface() {
        let kernel = matern(Smoothness::ThreeHalves, 0.2, Metric::Euclidean);
        let lattice = Lattice::new(&kernel, [31, 1], [0.1, 0.1]).unwrap();
        let draw = |seed: u64| lattice.draw(&mut Stream::new(seed, "lattice", 0));
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1)[0], draw(2)[0]);
        assert_ne!(draw(1)[0], draw(1)[1]);
        assert_eq!(draw(1)[0].len(), 31);
    }

    #[test]
    fn what_no_torus_holds_is_refused() {
        let long = matern(Smoothness::Infinite, 100.0, Metric::Euclidean);
        let error = Lattice::new(&long, [400, 400], [0.01, 0.01]).unwrap_err();
        assert!(error.to_string().contains("too long in range"), "{error}");
        let zones = Zones { centres: vec![[0.2, 0.2], [1.5, 1.0]], sill: 2.0 };
        let error = Lattice::new(&zones, [20, 20], [0.1, 0.1]).unwrap_err();
        assert!(error.to_string().contains("not that of a stationary surface"), "{error}");
        let short = matern(Smoothness::Half, 0.1, Metric::Euclidean);
        for (size, step) in [([0, 4], [0.1, 0.1]), ([4, 4], [0.0, 0.1]), ([4, 4], [f64::NAN, 0.1])]
        {
            assert!(Lattice::new(&short, size, step).is_err(), "{size:?} {step:?}");
        }
    }

    #[test]
    fn fast_lengths_have_small_factors() {
        assert_eq!([0, 1, 7, 11, 998, 1000].map(fast), [1, 1, 8, 12, 1000, 1000]);
    }
}
