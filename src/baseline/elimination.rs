//! Kriging of several places side by side: one Cholesky factor in each lane of the registers.
//!
//! Source: Golub & Van Loan (2013), section 4.2, row by row; places of equal size side by side are
//! the "interleaved batch" of Dongarra et al. (2017), doi:10.1016/j.procs.2017.05.138.

// Loops over lanes are written as the registers run.
#![allow(clippy::needless_range_loop)]

use crate::fused::simd;

/// Places side by side: the lanes of the widest registers.
pub const LANES: usize = 8;

/// One number for each place.
#[repr(align(64))]
#[derive(Clone, Copy, Default)]
pub struct Lane(pub [f64; LANES]);

/// Where row `i` of a packed lower triangle begins.
pub const fn row_of(i: usize) -> usize {
    i * (i + 1) / 2
}

/// Levels that a mean may have: one everywhere, and a slope along each coordinate of the plane.
pub const LEVELS: usize = 3;

simd::vectorised! {
    /// Cholesky's factor of `n` neighbours and, in the last row, of the place, in each lane; the
    /// values and the levels, `n` of one after `n` of another, are whitened on the way. A neighbour
    /// that the nearer ones determine to rounding adds nothing and is passed over. Returns Σ w z,
    /// the variance of the place and Σ w x of each level.
    pub fn eliminate(
        n: usize,
        lower: &mut [Lane],
        value: &mut [Lane],
        level: &mut [Lane],
    ) -> [Lane; 2 + LEVELS] {
        for i in 0..=n {
            let (before, this) = lower.split_at_mut(row_of(i));
            let this = &mut this[..=i];
            let whole = this[i];
            for j in 0..i {
                let other = &before[row_of(j)..][..=j];
                let known = dot(&this[..j], &other[..j]);
                // The diagonal holds the inverse of the pivot.
                for l in 0..LANES {
                    this[j].0[l] = (this[j].0[l] - known.0[l]) * other[j].0[l];
                }
            }
            let known = dot(&this[..i], &this[..i]);
            let values = dot(&this[..i], &value[..i]);
            let mut levels = [Lane::default(); LEVELS];
            for (known, level) in levels.iter_mut().zip(level.chunks_exact(n.max(1))) {
                *known = dot(&this[..i], &level[..i]);
            }
            if i == n {
                let mut left = whole;
                for l in 0..LANES {
                    left.0[l] -= known.0[l];
                }
                let mut said = [values, left, Lane::default(), Lane::default(), Lane::default()];
                said[2..].copy_from_slice(&levels);
                return said;
            }
            let least = f64::EPSILON * (n + 1) as f64;
            let mut inverse = Lane::default();
            for l in 0..LANES {
                let pivot = whole.0[l] - known.0[l];
                inverse.0[l] = if pivot > least * whole.0[l] { 1.0 / pivot.sqrt() } else { 0.0 };
                this[i].0[l] = inverse.0[l];
                value[i].0[l] = (value[i].0[l] - values.0[l]) * inverse.0[l];
            }
            for (known, level) in levels.iter().zip(level.chunks_exact_mut(n)) {
                for l in 0..LANES {
                    level[i].0[l] = (level[i].0[l] - known.0[l]) * inverse.0[l];
                }
            }
        }
        [Lane::default(); 2 + LEVELS]
    }
}

simd::vectorised! {
    /// After [`eliminate`]: what each neighbour weighs in the place, left in the last row.
    pub fn weigh(n: usize, lower: &mut [Lane]) {
        let (factor, last) = lower.split_at_mut(row_of(n));
        for i in (0..n).rev() {
            let row = &factor[row_of(i)..][..=i];
            for l in 0..LANES {
                last[i].0[l] *= row[i].0[l];
            }
            let (before, this) = last.split_at_mut(i);
            for (out, factor) in before.iter_mut().zip(row) {
                for l in 0..LANES {
                    out.0[l] = (-factor.0[l]).mul_add(this[0].0[l], out.0[l]);
                }
            }
        }
    }
}

/// `Σ a b` in each lane, in four chains so that no sum waits for the one before.
#[inline(always)]
fn dot(a: &[Lane], b: &[Lane]) -> Lane {
    let mut sums = [Lane::default(); 4];
    let (a4, b4) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest = (a4.remainder(), b4.remainder());
    for (a, b) in a4.zip(b4) {
        for c in 0..4 {
            for l in 0..LANES {
                sums[c].0[l] = a[c].0[l].mul_add(b[c].0[l], sums[c].0[l]);
            }
        }
    }
    for (a, b) in rest.0.iter().zip(rest.1) {
        for l in 0..LANES {
            sums[0].0[l] = a.0[l].mul_add(b.0[l], sums[0].0[l]);
        }
    }
    let mut total = Lane::default();
    for l in 0..LANES {
        total.0[l] = (sums[0].0[l] + sums[1].0[l]) + (sums[2].0[l] + sums[3].0[l]);
    }
    total
}
