//! Surfaces that repeat along every axis.
//!
//! Source: MacKay (1998), "Introduction to Gaussian processes", eq. 47. In the plane it is the
//! product over axes: applied to Euclidean distance the formula would not be positive definite.

use super::{Entry, Kernel};

/// `sill · exp(−2 Σ_axis sin²(π (a − b) / period) / length_scale²)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Periodic {
    /// Distance after which the surface repeats, in the units of the sites.
    pub period: f64,
    /// Smoothness within one period; no unit, for it is compared with a sine.
    pub length_scale: f64,
    /// Partial sill ≥ 0, outcome².
    pub sill: f64,
}

impl Kernel for Periodic {
    /// ```
    /// use isopleth::kernel::{Kernel, Periodic};
    /// let k = Periodic { period: 3.0, length_scale: 2.0, sill: 1.5 };
    /// // Half a period away the sine is one: 1.5 · exp(−2 / 4).
    /// assert!((k.covariance(&[0.0], &[1.5]) - 1.5 * (-0.5f64).exp()).abs() < 1e-12);
    /// assert!((k.covariance(&[0.0], &[6.0]) - 1.5).abs() < 1e-12);
    /// ```
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        let turn = std::f64::consts::PI / self.period;
        let sines: f64 = a.iter().zip(b).map(|(x, y)| (turn * (x - y)).sin().powi(2)).sum();
        self.sill * (-2.0 * sines / (self.length_scale * self.length_scale)).exp()
    }
    fn sill(&self) -> f64 {
        self.sill
    }
}

/// Registered as "periodic".
pub const ENTRY: Entry = Entry {
    name: "periodic",
    about: "repeats along every axis (MacKay 1998, eq. 47)",
    tiny: || Box::new(Periodic { period: 3.0, length_scale: 1.0, sill: 2.0 }),
    at_length_scale: None,
};
