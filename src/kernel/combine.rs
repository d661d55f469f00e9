//! Sums and products of kernels, which are kernels again.
//!
//! Source: Rasmussen & Williams (2006), section 4.2.4.

use super::{Entry, Kernel, Matern, Metric, Periodic, Smoothness};

/// Independent surfaces added: covariances and sills add.
#[derive(Debug)]
pub struct Sum(pub Vec<Box<dyn Kernel>>);

impl Kernel for Sum {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        self.0.iter().map(|k| k.covariance(a, b)).sum()
    }
    fn column(&self, at: [f64; 2], x: &[f64], y: &[f64], out: &mut [f64]) {
        gather(&self.0, at, x, y, out, 0.0, |a, b| a + b);
    }
    fn sill(&self) -> f64 {
        self.0.iter().map(|k| k.sill()).sum()
    }
}

/// Independent zero-mean surfaces multiplied: covariances and sills multiply.
#[derive(Debug)]
pub struct Product(pub Vec<Box<dyn Kernel>>);

impl Kernel for Product {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        self.0.iter().map(|k| k.covariance(a, b)).product()
    }
    fn column(&self, at: [f64; 2], x: &[f64], y: &[f64], out: &mut [f64]) {
        gather(&self.0, at, x, y, out, 1.0, |a, b| a * b);
    }
    fn sill(&self) -> f64 {
        self.0.iter().map(|k| k.sill()).product()
    }
}

/// Columns of some kernels, joined entry by entry.
fn gather(
    kernels: &[Box<dyn Kernel>],
    at: [f64; 2],
    x: &[f64],
    y: &[f64],
    out: &mut [f64],
    none: f64,
    join: fn(f64, f64) -> f64,
) {
    out.fill(none);
    let mut part = vec![0.0; out.len()];
    for kernel in kernels {
        kernel.column(at, x, y, &mut part);
        out.iter_mut().zip(&part).for_each(|(out, part)| *out = join(*out, *part));
    }
}

fn matern(smoothness: Smoothness, length_scale: f64, sill: f64) -> Box<dyn Kernel> {
    Box::new(Matern { smoothness, length_scale, sill, metric: Metric::Euclidean })
}

/// Registered as "sum".
pub const SUM: Entry = Entry {
    name: "sum",
    about: "independent surfaces added (Rasmussen & Williams 2006, 4.2.4)",
    tiny: || {
        Box::new(Sum(vec![
            matern(Smoothness::Half, 0.5, 0.7),
            matern(Smoothness::FiveHalves, 2.0, 1.3),
        ]))
    },
    at_length_scale: None,
};

/// Registered as "product".
pub const PRODUCT: Entry = Entry {
    name: "product",
    about: "independent surfaces multiplied (Rasmussen & Williams 2006, 4.2.4)",
    tiny: || {
        Box::new(Product(vec![
            matern(Smoothness::Infinite, 2.0, 2.0),
            Box::new(Periodic { period: 1.5, length_scale: 1.0, sill: 1.0 }),
        ]))
    },
    at_length_scale: None,
};
