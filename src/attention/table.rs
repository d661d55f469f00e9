//! A table of the distance bias, so that its cost does not depend on its terms.
//!
//! Octaves of `1 + scale · distance`, each in four segments, or of `1 + scale · distance²`, each in
//! two; in every segment a polynomial of degree 5 through Chebyshev points. So the table is dense
//! near zero, where kernels bend. Built in f64, checked between
//! its points as the kernel evaluates it; a bias that it cannot follow is evaluated term by term.

use std::f64::consts::{LOG2_E, PI};

use crate::fused::{lanes::Aligned, softmax::TABLE};

/// Largest error that a table may have: powers of two, beside the rounding of the value itself.
const TOLERANCE: f64 = 8e-7;
/// Points of a segment at which the table is checked.
const CHECKS: usize = 13;

/// The bias of every head over a range of distances.
pub struct Table {
    /// t for distance 1, less 1.
    pub scale: f32,
    /// Whether distances are squared: cheaper, where the bias is smooth in them.
    pub squared: bool,
    /// `[head, coefficient, segment]`, powers of two.
    pub coefficients: Aligned<f32>,
}

impl Table {
    /// Tabulates `bias(head, distance)` for distances up to `reach`, or says that it cannot.
    pub fn new(heads: usize, reach: f64, bias: impl Fn(usize, f64) -> f64) -> Option<Table> {
        [true, false].into_iter().find_map(|squared| Table::over(heads, reach, squared, &bias))
    }

    fn over(
        heads: usize,
        reach: f64,
        squared: bool,
        bias: &impl Fn(usize, f64) -> f64,
    ) -> Option<Table> {
        let [order, segments] = TABLE;
        let parts = if squared { 2 } else { 4 };
        // A little less than the octaves hold, for the rounding of t.
        let most = 2f64.powi((segments / parts) as i32) * 0.999 - 1.0;
        let reach = reach.max(1e-15);
        let scale = (most / if squared { reach * reach } else { reach }) as f32;
        if !scale.is_finite() {
            return None;
        }
        // Segments are numbered by the bits of t: that of t = 1 is not the first.
        let start = (1f32.to_bits() >> if squared { 22 } else { 21 }) as usize;
        let nodes: Vec<f64> =
            (0..order).map(|i| (PI * (i as f64 + 0.5) / order as f64).cos()).collect();
        let to_powers = monomials(&nodes);
        let mut coefficients = Aligned::new(0.0f32, heads * order * segments);
        let mut error = 0.0f64;
        for head in 0..heads {
            for segment in 0..segments {
                let value = |within: f64| {
                    let part = (segment % parts) as f64 + 0.5 * (within + 1.0);
                    let octave = 2f64.powi((segment / parts) as i32);
                    let t = octave * (1.0 + part / parts as f64);
                    let x = (t - 1.0) / f64::from(scale);
                    // The last segments reach a little farther than asked.
                    let distance = if squared { x.sqrt() } else { x };
                    bias(head, distance) * LOG2_E
                };
                let values: Vec<f64> = nodes.iter().map(|x| value(*x)).collect();
                let mut powers = vec![0.0f32; order];
                let at = (start + segment) % segments;
                for (k, power) in powers.iter_mut().enumerate() {
                    let sum: f64 = values.iter().zip(&to_powers).map(|(v, row)| v * row[k]).sum();
                    *power = sum as f32;
                    coefficients[(head * order + k) * segments + at] = *power;
                }
                for i in 0..CHECKS {
                    let x = 2.0 * i as f64 / (CHECKS - 1) as f64 - 1.0;
                    let truth = value(x);
                    let found = powers.iter().rev().fold(0.0f32, |p, c| p.mul_add(x as f32, *c));
                    error = error.max((f64::from(found) - truth).abs() / truth.abs().max(1.0));
                    if !truth.is_finite() || error > TOLERANCE {
                        return None;
                    }
                }
            }
        }
        Some(Table { scale, squared, coefficients })
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
        assert!(table.squared, "smooth in the square");
        assert!(!Table::new(1, 3.0, |_, d| -40.0 * d).expect("straight").squared, "a corner at 0");
        assert!(Table::new(1, 3.0, |_, d| -800.0 * d * d).is_some());
        assert!(Table::new(1, 3.0, |_, d| if d < 1.0 { 0.0 } else { 1.0 }).is_none(), "a step");
        assert!(Table::new(1, 3.0, |_, d| (1.0 - d).ln()).is_none(), "−∞ beyond 1");
    }
}
