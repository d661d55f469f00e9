//! The operations of layers, and the optimiser, on an NVIDIA GPU, with the feature `cuda`; without it
//! nothing here applies.
//!
//! The kernels are `layers.cu` and `update.cu`; products are cuBLAS's. Both forms of this module offer
//! the same. Kernels are tested on the processor (tests/cuda), the order in which they are told to run
//! by a machine of stock operations (tests/contract/layers.rs); together, on a card, they have never run.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

#[cfg(not(feature = "cuda"))]
mod disabled;
#[cfg(feature = "cuda")]
mod enabled;

#[cfg(not(feature = "cuda"))]
pub use disabled::Card;
#[cfg(not(feature = "cuda"))]
pub(crate) use disabled::{Resident, Ring, collecting, constrain};
#[cfg(feature = "cuda")]
pub use enabled::Card;
#[cfg(feature = "cuda")]
pub(crate) use enabled::{Resident, Ring, collecting, constrain};

/// How products of f32 are computed on a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Products {
    /// In f32.
    #[default]
    F32,
    /// Factors rounded to TF32 (10 bits after the point), sums in f32.
    Tf32,
    /// Factors rounded to bf16 (7 bits), sums in f32. Weights stay f32.
    Bf16,
}

impl Products {
    /// As recipes name it.
    pub const fn name(self) -> &'static str {
        match self {
            Products::F32 => "f32",
            Products::Tf32 => "tf32",
            Products::Bf16 => "bf16",
        }
    }

    /// Bits of a factor that count, after the leading one.
    pub const fn bits(self) -> u32 {
        match self {
            Products::F32 => 23,
            Products::Tf32 => 10,
            Products::Bf16 => 7,
        }
    }

    /// A factor as products of this kind see it: rounded to nearest, ties to even.
    ///
    /// ```
    /// use isopleth::fused::Products;
    /// let x = 1.0 + 1.0 / 256.0 + 1.0 / 1024.0;
    /// assert_eq!([Products::Bf16, Products::Tf32, Products::F32].map(|p| p.rounded(x)), [
    ///     1.0 + 1.0 / 128.0, x, x
    /// ]);
    /// ```
    pub fn rounded(self, x: f32) -> f32 {
        let drop = 23 - self.bits();
        if drop == 0 || !x.is_finite() {
            return x;
        }
        let (bits, half) = (x.to_bits(), (1u32 << (drop - 1)) - 1);
        f32::from_bits(bits.wrapping_add(half + (bits >> drop & 1)) & !((1u32 << drop) - 1))
    }
}

static PRODUCTS: AtomicU8 = AtomicU8::new(0);

/// How products on cards are computed now.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) fn products() -> Products {
    [Products::F32, Products::Tf32, Products::Bf16][usize::from(PRODUCTS.load(Ordering::Relaxed))]
}

/// Computes products on every card so, until it is dropped: then as before. candle's own products
/// know f32 and TF32 only, and take TF32 for bf16.
pub(crate) struct Choice(Products, bool);

impl Choice {
    pub fn new(products: Products) -> Self {
        use candle_core::cuda::{gemm_reduced_precision_f32, set_gemm_reduced_precision_f32};
        let before = PRODUCTS.swap(products as u8, Ordering::Relaxed);
        let candle = gemm_reduced_precision_f32();
        set_gemm_reduced_precision_f32(products != Products::F32);
        let before = [Products::F32, Products::Tf32, Products::Bf16][usize::from(before)];
        Choice(before, candle)
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        PRODUCTS.store(self.0 as u8, Ordering::Relaxed);
        candle_core::cuda::set_gemm_reduced_precision_f32(self.1);
    }
}

static LAUNCHED: AtomicU64 = AtomicU64::new(0);

/// Kernels and products of this crate that training has launched so far: layers, scan attention and its
/// gradient, the optimiser. Candle's own are not among them.
pub fn launched() -> u64 {
    LAUNCHED.load(Ordering::Relaxed)
}

#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) fn count() {
    LAUNCHED.fetch_add(1, Ordering::Relaxed);
}

/// A product as cuBLAS wants it: it stores matrices column after column, where ours are row after
/// row, so that it is told of their transposes. `true` transposes a factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct Gemm {
    pub transposed: [bool; 2],
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub lda: usize,
    pub ldb: usize,
    pub ldc: usize,
}

#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
impl Gemm {
    /// `x W`, with factors in the order W, x.
    pub fn forward(rows: usize, inputs: usize, outputs: usize) -> Self {
        let transposed = [false, false];
        Gemm { transposed, m: outputs, n: rows, k: inputs, lda: outputs, ldb: inputs, ldc: outputs }
    }

    /// `g Wᵀ`, with factors in the order W, g.
    pub fn back(rows: usize, inputs: usize, outputs: usize) -> Self {
        let transposed = [true, false];
        Gemm { transposed, m: inputs, n: rows, k: outputs, lda: outputs, ldb: outputs, ldc: inputs }
    }

    /// `xᵀ g`, with factors in the order g, x.
    pub fn weights(rows: usize, inputs: usize, outputs: usize) -> Self {
        let transposed = [false, true];
        Gemm { transposed, m: outputs, n: inputs, k: rows, lda: outputs, ldb: inputs, ldc: outputs }
    }
}

/// Numbers of a parameter that one block of the optimiser takes, and what tensors are padded to: as
/// in `update.cu`.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) const CHUNK: usize = 2048;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) const ALIGN: usize = 32;

/// Where each parameter stands in the flat buffers, in the order of paths.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flat {
    pub starts: Vec<usize>,
    pub lengths: Vec<usize>,
    /// All together, padding included.
    pub total: usize,
}

#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
impl Flat {
    /// Places for parameters of these lengths.
    pub fn new(lengths: Vec<usize>) -> Self {
        let mut total = 0;
        let starts = lengths
            .iter()
            .map(|n| {
                total += n.next_multiple_of(ALIGN);
                total - n.next_multiple_of(ALIGN)
            })
            .collect();
        Flat { starts, lengths, total }
    }

    /// What each block of the optimiser works on: parameter, and its first number there.
    pub fn chunks(&self) -> Vec<[i32; 2]> {
        let each = |(p, n): (usize, &usize)| {
            (0..*n).step_by(CHUNK).map(move |at| [p as i32, at as i32]).collect::<Vec<_>>()
        };
        self.lengths.iter().enumerate().flat_map(each).collect()
    }

    /// Spread over the flat buffer, padding 0.
    pub fn spread<'a>(&self, parts: impl Iterator<Item = &'a [f32]>) -> Vec<f32> {
        let mut all = vec![0.0; self.total];
        for (start, part) in self.starts.iter().zip(parts) {
            all[*start..start + part.len()].copy_from_slice(part);
        }
        all
    }

    /// The parts again.
    pub fn parts<'a>(&'a self, all: &'a [f32]) -> impl Iterator<Item = &'a [f32]> {
        self.starts.iter().zip(&self.lengths).map(|(start, n)| &all[*start..start + n])
    }
}

/// What adds up on the card between two readings.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct News {
    /// Sum of losses, and steps taken.
    pub loss: f64,
    pub steps: f64,
    /// Norm of the last gradient.
    pub norm: f64,
    /// The step that was refused, and whether its loss (not only its gradient) was to blame.
    pub refused: Option<(u64, bool)>,
}

/// Numbers of `news` in `update.cu`.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) const NEWS: usize = 6;

#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
impl News {
    /// From the numbers that `settle` writes.
    pub fn read(x: [f64; NEWS]) -> Self {
        let refused = (x[4] != 0.0).then_some((x[3] as u64, x[4] == 1.0));
        News { loss: x[0], steps: x[1], norm: x[2], refused }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// cuBLAS in a few lines: column after column.
    fn gemm(g: Gemm, a: &[f32], b: &[f32]) -> Vec<f32> {
        let mut c = vec![0.0; g.ldc * g.n];
        for j in 0..g.n {
            for i in 0..g.m {
                let at = |x: &[f32], t: bool, ld: usize, r: usize, c: usize| {
                    if t { x[r * ld + c] } else { x[c * ld + r] }
                };
                c[j * g.ldc + i] = (0..g.k)
                    .map(|k| {
                        at(a, g.transposed[0], g.lda, i, k) * at(b, g.transposed[1], g.ldb, k, j)
                    })
                    .sum();
            }
        }
        c
    }

    #[test]
    fn products_are_told_the_right_way_round() {
        let (rows, inputs, outputs) = (4, 3, 2);
        let some = |n: usize, by: f32| (0..n).map(|i| (i as f32 * by).sin()).collect::<Vec<_>>();
        let (x, w, g) =
            (some(rows * inputs, 0.7), some(inputs * outputs, 1.3), some(rows * outputs, 2.1));
        let sum = |n: usize, f: &dyn Fn(usize) -> f32| (0..n).map(f).sum::<f32>();
        let y = gemm(Gemm::forward(rows, inputs, outputs), &w, &x);
        let dx = gemm(Gemm::back(rows, inputs, outputs), &w, &g);
        let dw = gemm(Gemm::weights(rows, inputs, outputs), &g, &x);
        for r in 0..rows {
            for o in 0..outputs {
                let truth = sum(inputs, &|i| x[r * inputs + i] * w[i * outputs + o]);
                assert!((y[r * outputs + o] - truth).abs() < 1e-6);
            }
            for i in 0..inputs {
                let truth = sum(outputs, &|o| g[r * outputs + o] * w[i * outputs + o]);
                assert!((dx[r * inputs + i] - truth).abs() < 1e-6);
            }
        }
        for i in 0..inputs {
            for o in 0..outputs {
                let truth = sum(rows, &|r| x[r * inputs + i] * g[r * outputs + o]);
                assert!((dw[i * outputs + o] - truth).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn what_is_spread_over_the_flat_buffer_comes_back() {
        let flat = Flat::new(vec![3, 0, 4097, 32]);
        assert_eq!((flat.starts.clone(), flat.total), (vec![0, 32, 32, 4160], 4192));
        assert_eq!(flat.chunks(), [[0, 0], [2, 0], [2, 2048], [2, 4096], [3, 0]]);
        let parts: Vec<Vec<f32>> =
            flat.lengths.iter().map(|n| (0..*n).map(|i| i as f32 + 1.0).collect()).collect();
        let all = flat.spread(parts.iter().map(Vec::as_slice));
        let back: Vec<Vec<f32>> = flat.parts(&all).map(<[f32]>::to_vec).collect();
        assert_eq!(back, parts);
        assert_eq!(all.iter().filter(|x| **x == 0.0).count(), flat.total - 4132);
    }

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_what_fits() {
        for x in [0.0, -0.0, 1.0, -3.5, f32::INFINITY, f32::MIN_POSITIVE, 1e30] {
            for p in [Products::F32, Products::Tf32] {
                let apart = (p.rounded(x) - x).abs() / x.abs().max(f32::MIN_POSITIVE);
                assert!(p.rounded(x) == x || apart <= 1.0 / 2048.0, "{x}");
            }
        }
        for i in 0..10_000 {
            let x = (i as f32 * 0.37).sin() * 3.0;
            let half = crate::fused::bf16::widen(crate::fused::bf16::round(x));
            assert_eq!(Products::Bf16.rounded(x), half, "{x}");
        }
        assert!(Products::Bf16.rounded(f32::NAN).is_nan());
    }
}
