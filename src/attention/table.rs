//! A table of the distance bias, so that its cost does not depend on its terms.
//!
//! Octaves of `1 + scale · distance`, each in four segments, each with a polynomial of degree 5
//! through Chebyshev points: dense near zero, where kernels bend. Built in f64, checked between
//! its points as the kernel evaluates it; a bias that it cannot follow is evaluated term by term.

use std::f64::consts::{LOG2_E, PI};

use crate::fused::{lanes::Aligned, softmax::TABLE};

/// Largest error that a table may have: powers of two, beside the rounding of the value itself.
const TOLERANCE: f64 = 8e-7;
/// Points of a segment at which the table is checked.
const CHECKS: usize = 13;

/// The bias of every head over a range of distances.
pub struct Table {
    /// Positions per model unit.
    pub scale: f32,
    /// `[head, coefficient, segment]`, powers of two.
    pub coefficients: Aligned<f32>,
    /// Largest error found, powers of two (relative to |bias| where that is above 1).
    pub error: f64,
}

impl Table {
    /// Tabulates `bias(head, distance)` for distances up to `reach`, or says that it cannot.
    pub fn new(heads: usize, reach: f64, bias: impl Fn(usize, f64) -> f64) -> Option<Table> {
        let [order, segments] = TABLE;
        let scale = (254.9 / reach.max(1e-20)) as f32;
        if !scale.is_finite() {
            return None;
        }
        let nodes: Vec<f64> =
            (0..order).map(|i| (PI * (i as f64 + 0.5) / order as f64).cos()).collect();
        let to_powers = monomials(&nodes);
        let mut coefficients = Aligned::new(0.0f32, heads * order * segments);
        let mut error = 0.0f64;
        for head in 0..heads {
            for segment in 0..segments {
                let distance = |within: f64| {
                    let quarter = (segment % 4) as f64 + 0.5 * (within + 1.0);
                    let t = f64::from(1u32 << (segment / 4)) * (1.0 + 0.25 * quarter);
                    (t - 1.0) / f64::from(scale)
                };
                let values: Vec<f64> =
                    nodes.iter().map(|x| bias(head, distance(*x)) * LOG2_E).collect();
                let mut powers = vec![0.0f32; order];
                for (k, power) in powers.iter_mut().enumerate() {
                    let sum: f64 = values.iter().zip(&to_powers).map(|(v, row)| v * row[k]).sum();
                    *power = sum as f32;
                    coefficients[(head * order + k) * segments + segment] = *power;
                }
                for i in 0..CHECKS {
                    let x = 2.0 * i as f64 / (CHECKS - 1) as f64 - 1.0;
                    let truth = bias(head, distance(x)) * LOG2_E;
                    let found = powers.iter().rev().fold(0.0f32, |p, c| p.mul_add(x as f32, *c));
                    error = error.max((f64::from(found) - truth).abs() / truth.abs().max(1.0));
                    if !truth.is_finite() || error > TOLERANCE {
                        return None;
                    }
                }
            }
        }
        Some(Table { scale, coefficients, error })
    }

    /// The largest distance in the table.
    pub fn reach(&self) -> f64 {
        254.9 / f64::from(self.scale)
    }
}

/// For each node, the powers' coefficients of its Lagrange polynomial.
fn monomials(nodes: &[f64]) -> Vec<Vec<f64>> {
    let order = nodes.len();
    nodes
        .iter()
        .enumerate()
        .map(|(i, node)| {
            let mut poly = vec![1.0];
            for (j, other) in nodes.iter().enumerate().filter(|(j, _)| *j != i) {
                debug_assert!(j < order);
                // Multiply by (x − other) / (node − other).
                let mut next = vec![0.0; poly.len() + 1];
                for (k, c) in poly.iter().enumerate() {
                    next[k + 1] += c / (node - other);
                    next[k] -= c * other / (node - other);
                }
                poly = next;
            }
            poly
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smooth_biases_are_followed_and_others_are_declined() {
        let rbf = |_: usize, d: f64| 1.3 * (-d * d / 0.01).exp();
        let table = Table::new(2, 3.0, rbf).expect("an RBF of width 0.1 in a range of 3");
        assert!(table.error < TOLERANCE, "{}", table.error);
        assert!(Table::new(1, 3.0, |_, d| -40.0 * d).is_some());
        assert!(Table::new(1, 3.0, |_, d| -800.0 * d * d).is_some());
        assert!(Table::new(1, 3.0, |_, d| if d < 1.0 { 0.0 } else { 1.0 }).is_none(), "a step");
        assert!(Table::new(1, 3.0, |_, d| (1.0 - d).ln()).is_none(), "−∞ beyond 1");
    }
}
