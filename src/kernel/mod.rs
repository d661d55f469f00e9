//! How alike two sites are: the trait [`Kernel`], the matrix of a kernel, and [`KERNELS`].
//!
//! Source: Rasmussen & Williams (2006), chapter 4.

use crate::registry::Named;

pub mod combine;
pub mod displaced;
pub mod matern;
pub mod metric;
pub mod periodic;
pub mod space_time;
pub mod varying;

pub use combine::{Product, Sum};
pub use displaced::Displaced;
pub use matern::{Matern, Smoothness};
pub use metric::Metric;
pub use periodic::Periodic;
pub use space_time::{Change, SpaceTime};
pub use varying::{Local, Varying};

/// A covariance: symmetric, positive semi-definite, largest at zero lag. Registered ones are
/// stationary too.
pub trait Kernel: Send + Sync + std::fmt::Debug {
    /// Covariance between the surface at `a` and at `b`, outcome².
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64;

    /// Covariances between the place `at` and every place (x, y): what a Gram matrix is built of,
    /// a column at a time. As [`Kernel::covariance`], to rounding.
    ///
    /// # Shapes
    /// `x`, `y` and `out` `[site]`.
    fn column(&self, at: [f64; 2], x: &[f64], y: &[f64], out: &mut [f64]) {
        for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
            *out = self.covariance(&[*x, *y], &at);
        }
    }

    /// [`Kernel::column`] of every place and itself and those after it, one column after the other.
    ///
    /// # Shapes
    /// `x` and `y` `[site]`, `out` `[site · (site + 1) / 2]`.
    fn columns(&self, x: &[f64], y: &[f64], out: &mut [f64]) {
        let mut rest = out;
        for j in 0..x.len() {
            let (column, after) = rest.split_at_mut(x.len() - j);
            self.column([x[j], y[j]], &x[j..], &y[j..], column);
            rest = after;
        }
    }

    /// The same as [`Kernel::column`] among places of any number of coordinates.
    fn column_of(&self, at: &[f64], places: &[&[f64]], out: &mut [f64]) {
        out.iter_mut().zip(places).for_each(|(out, place)| *out = self.covariance(place, at));
    }

    /// Variance of the surface anywhere: the covariance at zero lag, outcome². It is the partial
    /// sill of geostatistics, since no kernel here holds a nugget. The largest, where it varies.
    fn sill(&self) -> f64;

    /// A linear map of the plane, row by row, after which sites that are near are alike, whatever the
    /// direction. Nothing where they are as they stand, or nearly.
    fn unstretch(&self) -> Option<[f64; 4]> {
        None
    }

    /// A frequency of the spectral distribution, of which the covariance is the expected cosine:
    /// `covariance(h) = sill · E cos(ω·h)`. `at`, a number in (0, 1) for each coordinate of a site, says
    /// which: even numbers make frequencies of that distribution. The first is how far out it lies in space,
    /// as a value of the distribution function, the others in which direction, half of all directions being
    /// enough; for kernels of a time the last is how far out along time. Nothing for kernels whose spectral
    /// distribution is not known here, in so many dimensions.
    ///
    /// # Units
    /// Radians per unit of the sites.
    fn frequency(&self, _at: &[f64]) -> Option<Vec<f64>> {
        None
    }

    /// The Matérn kernel that this is, if it is one: what networks that read covariances learn from.
    fn matern(&self) -> Option<Matern> {
        None
    }

    /// How the surface changes with time, for kernels of sites with a time; nothing for all others.
    fn change(&self) -> Option<Change> {
        None
    }
}

/// A kernel that several owners hold.
impl Kernel for std::sync::Arc<dyn Kernel> {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        (**self).covariance(a, b)
    }
    fn column(&self, at: [f64; 2], x: &[f64], y: &[f64], out: &mut [f64]) {
        (**self).column(at, x, y, out);
    }
    fn columns(&self, x: &[f64], y: &[f64], out: &mut [f64]) {
        (**self).columns(x, y, out);
    }
    fn column_of(&self, at: &[f64], places: &[&[f64]], out: &mut [f64]) {
        (**self).column_of(at, places, out);
    }
    fn sill(&self) -> f64 {
        (**self).sill()
    }
    fn unstretch(&self) -> Option<[f64; 4]> {
        (**self).unstretch()
    }
    fn frequency(&self, at: &[f64]) -> Option<Vec<f64>> {
        (**self).frequency(at)
    }
    fn matern(&self) -> Option<Matern> {
        (**self).matern()
    }
    fn change(&self) -> Option<Change> {
        (**self).change()
    }
}

/// The lower triangle of the covariances among planar sites; zero above.
///
/// # Shapes
/// Returns `[site, site]`.
/// # Units
/// As [`matrix`].
pub fn gram(kernel: &dyn Kernel, xy: &[[f64; 2]]) -> faer::Mat<f64> {
    let n = xy.len();
    let [x, y] = [0, 1].map(|d| xy.iter().map(|p| p[d]).collect::<Vec<f64>>());
    let mut gram = faer::Mat::zeros(n, n);
    for (j, at) in xy.iter().enumerate() {
        kernel.column(*at, &x[j..], &y[j..], &mut gram.col_as_slice_mut(j)[j..]);
    }
    gram
}

/// Covariances between every site of `a` (rows) and every site of `b` (columns).
///
/// # Shapes
/// `a` `[row][dimension]`, `b` `[column][dimension]`; returns `[row, column]`.
/// # Units
/// Sites in the units of the kernel's length scale; covariance in outcome².
pub fn matrix(kernel: &dyn Kernel, a: &[Vec<f64>], b: &[Vec<f64>]) -> faer::Mat<f64> {
    faer::Mat::from_fn(a.len(), b.len(), |i, j| kernel.covariance(&a[i], &b[j]))
}

/// A registered kernel.
pub struct Entry {
    /// The name in recipes: "matern-3/2".
    pub name: &'static str,
    /// One line on what it is and where it comes from.
    pub about: &'static str,
    /// A small instance with sill 2, and length scale 1 where it has one, for the contract tests.
    pub tiny: fn() -> Box<dyn Kernel>,
    /// Correlation one length scale away, where the kernel has that notion.
    pub at_length_scale: Option<f64>,
}

impl Named for Entry {
    fn name(&self) -> &str {
        self.name
    }
    fn about(&self) -> &str {
        self.about
    }
}

/// Every kernel.
pub const KERNELS: &[Entry] = &[
    matern::HALF,
    matern::THREE_HALVES,
    matern::FIVE_HALVES,
    matern::SQUARED_EXPONENTIAL,
    periodic::ENTRY,
    space_time::ENTRY,
    combine::SUM,
    combine::PRODUCT,
];
