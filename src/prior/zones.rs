//! Zones: a surface with one level in each of several neighbouring territories, as forest and
//! savannah, or highland and lowland, have.
//!
//! Real surveys surprise more in unseen territory than any stationary field does: a prior without
//! zones is too sure there.

use crate::{kernel::Kernel, rng::Stream};

/// Independent levels in the Voronoi cells of some centres: `sill` within a cell, 0 between two.
/// Positive semi-definite, since it is the covariance of that surface; not stationary.
#[derive(Debug, Clone, PartialEq)]
pub struct Zones {
    /// Centres of the cells, region units.
    pub centres: Vec<[f64; 2]>,
    /// Variance of the levels, link scale².
    pub sill: f64,
}

impl Zones {
    /// `count` cells with centres anywhere in the region and a little around it.
    pub fn draw(count: usize, sill: f64, rng: &mut Stream) -> Self {
        let centre = |_| [rng.uniform(-1.2, 1.2), rng.uniform(-1.2, 1.2)];
        Zones { centres: (0..count.max(1)).map(centre).collect(), sill }
    }

    /// Which cell a place lies in.
    fn cell(&self, p: &[f64]) -> usize {
        let distance = |c: &[f64; 2]| {
            (c[0] - p[0]).powi(2) + (c[1] - p.get(1).copied().unwrap_or(0.0)).powi(2)
        };
        let nearest = |a: &(usize, &[f64; 2]), b: &(usize, &[f64; 2])| {
            distance(a.1).total_cmp(&distance(b.1))
        };
        self.centres.iter().enumerate().min_by(nearest).map_or(0, |(i, _)| i)
    }
}

impl Kernel for Zones {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        if self.cell(a) == self.cell(b) { self.sill } else { 0.0 }
    }
    fn column(&self, at: [f64; 2], x: &[f64], y: &[f64], out: &mut [f64]) {
        let here = self.cell(&at);
        for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
            *out = if self.cell(&[*x, *y]) == here { self.sill } else { 0.0 };
        }
    }
    fn sill(&self) -> f64 {
        self.sill
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_shared_within_a_cell_only() {
        let zones = Zones { centres: vec![[-1.0, 0.0], [1.0, 0.0]], sill: 2.0 };
        assert_eq!(zones.covariance(&[-0.5, 0.3], &[-0.1, -0.9]), 2.0);
        assert_eq!(zones.covariance(&[-0.1, 0.0], &[0.1, 0.0]), 0.0);
        assert_eq!(zones.covariance(&[0.1, 0.0], &[0.1, 0.0]), zones.sill());
    }
}
