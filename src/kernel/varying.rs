//! Matérn kernels whose length scale, direction and sill vary from place to place.
//!
//! Source: Paciorek & Schervish (2006), doi:10.1002/env.785. With `Σ(s)` the square of the local
//! length scales along and across the local direction, `M = ½ (Σ(a) + Σ(b))` and `h = a − b`,
//!
//! ```text
//! C(a, b) = σ(a) σ(b) · |Σ(a)|^¼ |Σ(b)|^¼ |M|^−½ · ρ(√(hᵀ M⁻¹ h))
//! ```
//!
//! is positive definite for every correlation ρ that is one in all dimensions, as Matérn's are.

use std::sync::Arc;

use super::{Kernel, Smoothness};
use crate::fused::simd;

/// What a kernel is around one place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Local {
    /// Length scale along `angle`, > 0, in the units of the sites.
    pub length_scale: f64,
    /// Length scale along ÷ length scale across, > 0; 1 where no direction is preferred.
    pub ratio: f64,
    /// Direction of slowest change, radians anticlockwise from the first axis.
    pub angle: f64,
    /// Partial sill, ≥ 0, outcome².
    pub sill: f64,
}

/// What a kernel is around each place `[2]`.
pub type Locally = Arc<dyn Fn(&[f64]) -> Local + Send + Sync>;

/// A Matérn kernel on the plane that is another around every place. A site of one coordinate lies on
/// the plane's first axis.
#[derive(Clone)]
pub struct Varying {
    /// Order ν, the same everywhere.
    pub smoothness: Smoothness,
    /// The largest sill of any place, outcome².
    pub sill: f64,
    /// The local kernel. It may jump: the surface then changes its texture there, and nothing else.
    pub local: Locally,
}

/// Squared length scales as a symmetric matrix (xx, xy, yy), and `σ |Σ|^¼`.
#[derive(Clone, Copy)]
struct Shape {
    square: [f64; 3],
    weight: f64,
}

impl Local {
    /// As [`Matern`](super::Matern) of that length scale and sill.
    pub fn round(length_scale: f64, sill: f64) -> Self {
        Local { length_scale, ratio: 1.0, angle: 0.0, sill }
    }

    fn shape(&self) -> Shape {
        let Local { length_scale, ratio, angle, sill } = *self;
        // What is not a kernel must not become a map: NaN fails every one of these.
        let sound = length_scale > 0.0 && length_scale < f64::INFINITY && ratio > 0.0;
        assert!(
            sound && ratio < f64::INFINITY && angle.is_finite() && sill >= 0.0,
            "a local kernel needs length scale and ratio > 0 and a sill ≥ 0: {self:?}"
        );
        let along = length_scale * length_scale;
        let weight = (sill * along / ratio).sqrt();
        if ratio == 1.0 {
            return Shape { square: [along, 0.0, along], weight };
        }
        let across = along / (ratio * ratio);
        let (sin, cos) = angle.sin_cos();
        let square = [
            along * cos * cos + across * sin * sin,
            (along - across) * sin * cos,
            along * sin * sin + across * cos * cos,
        ];
        Shape { square, weight }
    }
}

impl Varying {
    /// A kernel of this smoothness whose sill is nowhere above `sill`.
    ///
    /// ```
    /// use isopleth::kernel::{Kernel, Local, Smoothness, Varying};
    /// // Length scale 1 in the west, 3 in the east.
    /// let local = |s: &[f64]| Local::round(if s[0] < 0.0 { 1.0 } else { 3.0 }, 2.0);
    /// let kernel = Varying::new(Smoothness::Half, 2.0, local);
    /// assert!((kernel.covariance(&[-2.0, 0.0], &[-1.0, 0.0]) - 2.0 * (-1f64).exp()).abs() < 1e-12);
    /// // Across: M is (1 + 9) / 2 = 5 times the unit matrix; |Σ|^¼ is 1 in the west and 3 in the east.
    /// let across = 2.0 * 1.0 * 3.0 / 5.0 * (-2.0 / 5f64.sqrt()).exp();
    /// assert!((kernel.covariance(&[-1.0, 0.0], &[1.0, 0.0]) - across).abs() < 1e-12);
    /// ```
    pub fn new(
        smoothness: Smoothness,
        sill: f64,
        local: impl Fn(&[f64]) -> Local + Send + Sync + 'static,
    ) -> Self {
        Varying { smoothness, sill, local: Arc::new(local) }
    }

    fn shape(&self, x: f64, y: f64) -> Shape {
        (self.local)(&[x, y]).shape()
    }

    fn between(&self, a: &Shape, b: &Shape, dx: f64, dy: f64) -> f64 {
        let [xx, xy, yy] = std::array::from_fn(|i| 0.5 * (a.square[i] + b.square[i]));
        let size = xx * yy - xy * xy;
        let apart = (yy * dx * dx - 2.0 * xy * dx * dy + xx * dy * dy).max(0.0) / size;
        a.weight * b.weight / size.sqrt() * self.smoothness.correlation(apart.sqrt())
    }
}

simd::vectorised! {
    /// `hᵀ M⁻¹ h` between the first place and each, and what correlations there are multiplied by.
    pub fn apart(x: &[f64], y: &[f64], xx: &[f64], xy: &[f64], yy: &[f64], weight: &[f64], square: &mut [f64], factor: &mut [f64]) {
        let n = square.len();
        let (x, y, xx, xy, yy, weight) = (&x[..n], &y[..n], &xx[..n], &xy[..n], &yy[..n], &weight[..n]);
        let factor = &mut factor[..n];
        for i in 0..n {
            let [a, b, c] = [0.5 * (xx[0] + xx[i]), 0.5 * (xy[0] + xy[i]), 0.5 * (yy[0] + yy[i])];
            let size = a * c - b * b;
            let (dx, dy) = (x[i] - x[0], y[i] - y[0]);
            square[i] = (c * dx * dx - 2.0 * b * dx * dy + a * dy * dy).max(0.0) / size;
            factor[i] = weight[0] * weight[i] / size.sqrt();
        }
    }
}

fn place(site: &[f64]) -> [f64; 2] {
    [site[0], site.get(1).copied().unwrap_or(0.0)]
}

impl Kernel for Varying {
    /// # Panics
    /// If the local kernel at a site is none: see [`Local`].
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        let ([ax, ay], [bx, by]) = (place(a), place(b));
        self.between(&self.shape(ax, ay), &self.shape(bx, by), ax - bx, ay - by)
    }
    fn column(&self, at: [f64; 2], x: &[f64], y: &[f64], out: &mut [f64]) {
        let here = self.shape(at[0], at[1]);
        for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
            *out = self.between(&self.shape(*x, *y), &here, x - at[0], y - at[1]);
        }
    }
    /// Asks for the local kernel of every place once.
    fn columns(&self, x: &[f64], y: &[f64], out: &mut [f64]) {
        let n = x.len();
        let mut shapes = vec![0.0; 4 * n];
        let mut factor = vec![0.0; n];
        for i in 0..n {
            let Shape { square, weight } = self.shape(x[i], y[i]);
            (0..3).for_each(|k| shapes[k * n + i] = square[k]);
            shapes[3 * n + i] = weight;
        }
        let mut rest = out;
        for j in 0..n {
            let (column, after) = rest.split_at_mut(n - j);
            let [xx, xy, yy, weight] = std::array::from_fn(|k| &shapes[k * n + j..(k + 1) * n]);
            let factor = &mut factor[..n - j];
            apart(&x[j..], &y[j..], xx, xy, yy, weight, column, factor);
            self.smoothness.at_squares(1.0, column);
            column.iter_mut().zip(factor).for_each(|(c, factor)| *c *= *factor);
            rest = after;
        }
    }
    fn sill(&self) -> f64 {
        self.sill
    }
}

impl std::fmt::Debug for Varying {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Varying")
            .field("smoothness", &self.smoothness)
            .field("sill", &self.sill)
            .finish_non_exhaustive()
    }
}
