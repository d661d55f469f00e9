//! Columns of numbers, alone or side by side, and the loops that solving spends its time in.
//!
//! Side by side, what is said of a place is fetched once for all columns. Of 32-bit numbers twice as many
//! fit; their sums are 64-bit all the same.

use super::elimination::{LANES, Lane};
use crate::fused::simd;

/// The most columns side by side.
pub(super) const MOST: usize = 16;

/// A number for each column; 0 beyond the last.
pub(super) type Sums = [f64; MOST];

/// Others that each place hangs on, and their weights.
#[cfg_attr(test, derive(Clone))]
pub(super) struct Sparse {
    pub starts: Vec<u32>,
    pub others: Vec<u32>,
    pub weight: Vec<f64>,
}

/// Columns of 32-bit numbers.
#[repr(align(64))]
#[derive(Clone, Copy, Default)]
pub(super) struct Few(pub [f32; MOST]);

/// One row of one column or several.
pub(super) trait Column: Copy + Default + Send + Sync {
    const WIDTH: usize;
    fn map(f: impl FnMut(usize) -> f64) -> Self;
    fn get(&self, column: usize) -> f64;
    /// `x[i] += sign · Σ weight · x[others]`, place after place, from the first on or from the last.
    fn sweep(sparse: &Sparse, x: &mut [Self], from_first: bool, sign: f64);
    /// Each row times a number.
    fn scale(x: &mut [Self], by: &[f64]);
    /// `Σ a b` of each column.
    fn inner(a: &[Self], b: &[Self]) -> Sums;
    /// `out = keep · out + by · x`, each column by its own.
    fn blend(out: &mut [Self], keep: &Sums, by: &Sums, x: &[Self]);
}

impl Sparse {
    pub fn none() -> Self {
        Sparse { starts: vec![0], others: Vec::new(), weight: Vec::new() }
    }

    /// Places that each hangs on become those that hang on each.
    pub fn turned(&self) -> Self {
        let n = self.starts.len() - 1;
        let mut starts = vec![0; n + 1];
        self.others.iter().for_each(|j| starts[*j as usize + 1] += 1);
        (0..n).for_each(|j| starts[j + 1] += starts[j]);
        let mut next = starts.clone();
        let (mut others, mut weight) = (vec![0; self.others.len()], vec![0.0; self.others.len()]);
        for i in 0..n {
            for at in self.starts[i] as usize..self.starts[i + 1] as usize {
                let to = &mut next[self.others[at] as usize];
                (others[*to as usize], weight[*to as usize]) = (i as u32, self.weight[at]);
                *to += 1;
            }
        }
        Sparse { starts, others, weight }
    }

    /// Each weight times a number.
    pub fn scale(&mut self, by: impl Fn(usize, usize) -> f64) {
        for i in 0..self.starts.len() - 1 {
            for at in self.starts[i] as usize..self.starts[i + 1] as usize {
                self.weight[at] *= by(i, self.others[at] as usize);
            }
        }
    }
}

/// A kind of columns: its type, the type of its numbers, how many there are, how they are reached, and the
/// names of its loops.
macro_rules! columns {
    ($type:ty, $number:ty, $width:expr, $make:expr, $of:ident, $in:ident, $add:ident, $sweep:ident, $scale:ident, $inner:ident, $blend:ident) => {
        #[inline(always)]
        fn $add(out: &mut $type, w: $number, x: &$type) {
            for (out, x) in $in(out).iter_mut().zip($of(x)) {
                *out = w.mul_add(*x, *out);
            }
        }
        simd::vectorised! {
            /// See [`Column::sweep`].
            pub fn $sweep(starts: &[u32], others: &[u32], weight: &[f64], x: &mut [$type], from_first: bool, sign: f64) {
                let n = x.len();
                for step in 0..n {
                    let i = if from_first { step } else { n - 1 - step };
                    let row = starts[i] as usize..starts[i + 1] as usize;
                    // Four sums: in one, each addition would wait for the last.
                    let mut sums = [<$type>::default(); 4];
                    let (others, rest) = others[row.clone()].as_chunks::<4>();
                    let (weight, last) = weight[row].as_chunks::<4>();
                    for (others, weight) in others.iter().zip(weight) {
                        for ((sum, j), w) in sums.iter_mut().zip(others).zip(weight) {
                            $add(sum, *w as $number, &x[*j as usize]);
                        }
                    }
                    for ((sum, j), w) in sums.iter_mut().zip(rest).zip(last) {
                        $add(sum, *w as $number, &x[*j as usize]);
                    }
                    let [mut sum, others @ ..] = sums;
                    others.iter().for_each(|other| $add(&mut sum, 1.0, other));
                    $add(&mut x[i], sign as $number, &sum);
                }
            }
        }
        simd::vectorised! {
            /// See [`Column::scale`].
            pub fn $scale(x: &mut [$type], by: &[f64]) {
                for (x, by) in x.iter_mut().zip(by) {
                    $in(x).iter_mut().for_each(|x| *x *= *by as $number);
                }
            }
        }
        simd::vectorised! {
            /// See [`Column::inner`].
            pub fn $inner(a: &[$type], b: &[$type]) -> Sums {
                let mut sums = Sums::default();
                for (a, b) in a.iter().zip(b) {
                    for ((sum, a), b) in sums.iter_mut().zip($of(a)).zip($of(b)) {
                        *sum = f64::from(*a).mul_add(f64::from(*b), *sum);
                    }
                }
                sums
            }
        }
        simd::vectorised! {
            /// See [`Column::blend`].
            pub fn $blend(out: &mut [$type], keep: &Sums, by: &Sums, x: &[$type]) {
                let keep: [$number; $width] = std::array::from_fn(|l| keep[l] as $number);
                let by: [$number; $width] = std::array::from_fn(|l| by[l] as $number);
                for (out, x) in out.iter_mut().zip(x) {
                    for (((out, x), keep), by) in $in(out).iter_mut().zip($of(x)).zip(&keep).zip(&by) {
                        *out = by.mul_add(*x, keep * *out);
                    }
                }
            }
        }
        impl Column for $type {
            const WIDTH: usize = $width;
            fn map(mut f: impl FnMut(usize) -> f64) -> Self {
                $make(std::array::from_fn(|l| f(l) as $number))
            }
            fn get(&self, column: usize) -> f64 {
                f64::from($of(self)[column])
            }
            fn sweep(sparse: &Sparse, x: &mut [Self], from_first: bool, sign: f64) {
                $sweep(&sparse.starts, &sparse.others, &sparse.weight, x, from_first, sign);
            }
            fn scale(x: &mut [Self], by: &[f64]) {
                $scale(x, by);
            }
            fn inner(a: &[Self], b: &[Self]) -> Sums {
                $inner(a, b)
            }
            fn blend(out: &mut [Self], keep: &Sums, by: &Sums, x: &[Self]) {
                $blend(out, keep, by, x);
            }
        }
    };
}

#[inline(always)]
fn of_one(x: &f64) -> &[f64; 1] {
    std::array::from_ref(x)
}
#[inline(always)]
fn in_one(x: &mut f64) -> &mut [f64; 1] {
    std::array::from_mut(x)
}
#[inline(always)]
fn of_lane(x: &Lane) -> &[f64; LANES] {
    &x.0
}
#[inline(always)]
fn in_lane(x: &mut Lane) -> &mut [f64; LANES] {
    &mut x.0
}
#[inline(always)]
fn of_few(x: &Few) -> &[f32; MOST] {
    &x.0
}
#[inline(always)]
fn in_few(x: &mut Few) -> &mut [f32; MOST] {
    &mut x.0
}

columns!(
    f64,
    f64,
    1,
    |[x]: [f64; 1]| x,
    of_one,
    in_one,
    add_one,
    sweep_one,
    scale_one,
    inner_one,
    blend_one
);
columns!(
    Lane,
    f64,
    LANES,
    Lane,
    of_lane,
    in_lane,
    add_lane,
    sweep_lanes,
    scale_lanes,
    inner_lanes,
    blend_lanes
);
columns!(Few, f32, MOST, Few, of_few, in_few, add_few, sweep_few, scale_few, inner_few, blend_few);

/// The same number for every column.
pub(super) const fn all(number: f64) -> Sums {
    [number; MOST]
}
