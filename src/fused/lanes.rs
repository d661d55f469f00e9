//! Vectors of f32: one kernel source, compiled for AVX-512, AVX2, NEON and plain arrays.
//!
//! Loops that LLVM vectorises by itself use [`super::simd::vectorised`]; kernels whose registers
//! must be laid out by hand are generic over [`Lanes`] and entered through [`dispatch`].

// Loops count by index: adaptors and closures may be left out of line, without the instruction set.
#![allow(clippy::needless_range_loop)]

/// A vector unit: `N` values of f32 at once.
///
/// # Safety
/// Every method may only be called on a machine that has the instruction set; pointers must be
/// valid for `N` values (`lookup`: 32), of any alignment.
#[allow(missing_docs)]
pub unsafe trait Lanes: Copy + 'static {
    /// `N` values.
    type F: Copy;
    /// `N` positions in a table.
    type I: Copy;
    /// 32 values to look up.
    type Table: Copy;
    /// Values in a vector.
    const N: usize;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, x: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`, rounded once where the machine can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// √x for x ≥ 0, to 2e-7 relative.
    unsafe fn sqrt(x: Self::F) -> Self::F;
    /// [`Lanes::sqrt`] of several vectors, side by side.
    #[inline(always)]
    unsafe fn sqrt_each<const U: usize>(x: [Self::F; U]) -> [Self::F; U] {
        // SAFETY: the same contract.
        unsafe {
            let mut x = x;
            for x in &mut x {
                *x = Self::sqrt(*x);
            }
            x
        }
    }
    /// 1/x to 2e-7 relative, for 2⁻¹²⁶ ≤ |x| ≤ 2¹²⁶.
    unsafe fn recip(x: Self::F) -> Self::F;
    /// 2ˣ to 2e-7 relative; 0 far below.
    unsafe fn exp2(x: Self::F) -> Self::F;
    /// [`Lanes::exp2`] of several vectors, but never less than 2⁻¹⁰⁰: processors take 150 cycles for
    /// a number too small to be normal. Step by step side by side: one alone would wait for itself
    /// at every step.
    #[inline(always)]
    unsafe fn exp2_each<const U: usize>(x: [Self::F; U]) -> [Self::F; U] {
        // SAFETY: the same contract.
        unsafe {
            let mut x = x;
            for x in &mut x {
                *x = Self::exp2(Self::max(*x, Self::splat(LEAST)));
            }
            x
        }
    }
    /// Turns `N` rows of `N` values, `from_step` apart, into columns: rows `to_step` apart.
    #[inline(always)]
    unsafe fn turn(from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
        // SAFETY: the same contract.
        unsafe {
            for i in 0..Self::N {
                for j in 0..Self::N {
                    *to.add(j * to_step + i) = *from.add(i * from_step + j);
                }
            }
        }
    }
    /// `N` numbers of bf16 as f32.
    #[inline(always)]
    unsafe fn widen(from: *const u16, to: *mut f32) {
        // SAFETY: the same contract.
        unsafe {
            for i in 0..Self::N {
                *to.add(i) = f32::from_bits(u32::from(*from.add(i)) << 16);
            }
        }
    }
    /// Whether any `a > b`.
    unsafe fn any_above(a: Self::F, b: Self::F) -> bool;
    /// For t ≥ 1: in which part of its octave it lies, counted through the octaves, modulo 32; and
    /// where in that part, from −1 to 1. An octave has `2^(23 − SHIFT)` parts: 4 for 21, 2 for 22.
    unsafe fn segment<const SHIFT: u32>(t: Self::F) -> (Self::I, Self::F);
    /// Whether every `a ≤ b`; false where one is NaN.
    unsafe fn none_above(a: Self::F, b: Self::F) -> bool;
    unsafe fn load_index(from: *const i32) -> Self::I;
    unsafe fn store_index(to: *mut i32, x: Self::I);
    /// A table of 32 values, in registers where they can hold it.
    unsafe fn table(from: *const f32) -> Self::Table;
    /// Values number `index` of a table.
    unsafe fn lookup(table: Self::Table, index: Self::I) -> Self::F;
}

/// Numbers that start on a cache line: a vector of 16 that straddles two costs twice.
pub struct Aligned<T> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy> Aligned<T> {
    /// `len` times `value`.
    pub fn new(value: T, len: usize) -> Self {
        let spare = 64 / size_of::<T>().max(1);
        let data = vec![value; len + spare];
        let start = data.as_ptr().align_offset(64).min(spare);
        Aligned { data, start, len }
    }
}

impl<T> std::ops::Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.data[self.start..self.start + self.len]
    }
}

impl<T> std::ops::DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..self.start + self.len]
    }
}

/// Coefficients of 2ᶠ on [0, 1]: minimax in relative error, 7.5e-8.
const EXP2: [f32; 6] =
    [0.999_999_94, 0.693_153_1, 0.240_153_61, 0.055_826_318, 0.008_989_34, 0.001_877_576_7];
/// The same on [−½, ½].
pub(super) const EXP2_CENTRED: [f32; 6] =
    [1.000_000_1, 0.693_146_94, 0.240_221_2, 0.055_507_13, 0.009_675_541, 0.001_327_647_2];
/// Exponents below are raised to it by [`Lanes::exp2_each`].
const LEAST: f32 = -100.0;
/// 1.5 · 2²³: adding and subtracting it rounds to an integer.
const ROUND: f32 = 12_582_912.0;
const ONE: i32 = 0x3f80_0000;

/// Takes what is left of a number in [1, 2) after [`Lanes::segment`] cut off its part to −1 … 1.
const fn stretch(shift: u32) -> [f32; 2] {
    let parts = (1u32 << (23 - shift)) as f32;
    [2.0 * parts, -2.0 * parts - 1.0]
}

/// Plain arrays: what every machine has.
#[derive(Clone, Copy)]
pub struct Portable;

/// Values in a vector of [`Portable`].
const P: usize = 8;

macro_rules! each {
    ($i:ident => $value:expr) => {{
        let mut out = [0.0f32; P];
        for $i in 0..P {
            out[$i] = $value;
        }
        out
    }};
}

// SAFETY: only plain arithmetic and unaligned reads and writes of `N` values.
unsafe impl Lanes for Portable {
    type F = [f32; P];
    type I = [i32; P];
    type Table = *const f32;
    const N: usize = P;

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; P] {
        [x; P]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; P] {
        unsafe { from.cast::<[f32; P]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: [f32; P]) {
        unsafe { to.cast::<[f32; P]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn add(a: [f32; P], b: [f32; P]) -> [f32; P] {
        each!(i => a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; P], b: [f32; P]) -> [f32; P] {
        each!(i => a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; P], b: [f32; P]) -> [f32; P] {
        each!(i => a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; P], b: [f32; P], c: [f32; P]) -> [f32; P] {
        // Rounded twice: a fused multiply-add without the instruction is a slow library call.
        each!(i => a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: [f32; P], b: [f32; P]) -> [f32; P] {
        each!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: [f32; P], b: [f32; P]) -> [f32; P] {
        each!(i => if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn sqrt(x: [f32; P]) -> [f32; P] {
        each!(i => x[i].sqrt())
    }
    #[inline(always)]
    unsafe fn recip(x: [f32; P]) -> [f32; P] {
        each!(i => 1.0 / x[i])
    }
    #[inline(always)]
    unsafe fn exp2(x: [f32; P]) -> [f32; P] {
        each!(i => {
            let near = if x[i] > -126.0 { x[i] } else { -126.0 };
            let shifted = near + ROUND;
            let f = near - (shifted - ROUND);
            let mut p = EXP2_CENTRED[5];
            for c in EXP2_CENTRED[..5].iter().rev() {
                p = p * f + c;
            }
            let p = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
            if x[i] > -126.0 { p } else { 0.0 }
        })
    }
    #[inline(always)]
    unsafe fn any_above(a: [f32; P], b: [f32; P]) -> bool {
        a.iter().zip(b).any(|(a, b)| *a > b)
    }
    #[inline(always)]
    unsafe fn none_above(a: [f32; P], b: [f32; P]) -> bool {
        a.iter().zip(b).all(|(a, b)| *a <= b)
    }
    #[inline(always)]
    unsafe fn segment<const SHIFT: u32>(t: [f32; P]) -> ([i32; P], [f32; P]) {
        let below = (1u32 << SHIFT) - 1;
        let [by, less] = stretch(SHIFT);
        let index = t.map(|t| (t.to_bits() >> SHIFT & 31) as i32);
        (index, each!(i => f32::from_bits(t[i].to_bits() & below | ONE as u32) * by + less))
    }
    #[inline(always)]
    unsafe fn load_index(from: *const i32) -> [i32; P] {
        unsafe { from.cast::<[i32; P]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_index(to: *mut i32, x: [i32; P]) {
        unsafe { to.cast::<[i32; P]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn table(from: *const f32) -> *const f32 {
        from
    }
    #[inline(always)]
    unsafe fn lookup(table: *const f32, index: [i32; P]) -> [f32; P] {
        each!(i => unsafe { *table.add((index[i] & 31) as usize) })
    }
}

/// Products of pairs of bf16, where a vector unit has them. A pair lies in 32 bits, its first number
/// in the lower half.
///
/// # Safety
/// As [`Lanes`]; methods may only be called where `HAS`.
pub unsafe trait Pairs<L: Lanes> {
    /// Whether there are such products.
    const HAS: bool;
    /// `c + a₀ b₀ + a₁ b₁` for one pair `a` and `N` pairs `b`.
    unsafe fn dot(a: *const u32, b: *const u32, c: L::F) -> L::F;
    /// Rounds two vectors of numbers ≥ 0 to bf16, ties upwards, and stores them in pairs.
    unsafe fn pair(to: *mut u32, a: L::F, b: L::F) -> [L::F; 2];
}

/// No products of pairs.
pub struct NoPairs;

// SAFETY: there is nothing to call.
unsafe impl<L: Lanes> Pairs<L> for NoPairs {
    const HAS: bool = false;
    #[inline(always)]
    unsafe fn dot(_: *const u32, _: *const u32, _: L::F) -> L::F {
        unreachable!("only where there are products of pairs")
    }
    #[inline(always)]
    unsafe fn pair(_: *mut u32, _: L::F, _: L::F) -> [L::F; 2] {
        unreachable!("only where there are products of pairs")
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512, Bf16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{EXP2, EXP2_CENTRED, LEAST, Lanes, ONE, ROUND, stretch};

    /// Where 2ˣ is a normal number, NaN included.
    #[inline(always)]
    unsafe fn above(x: __m512) -> __mmask16 {
        // SAFETY: only called by kernels for AVX-512.
        unsafe { _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(x, _mm512_set1_ps(-126.0)) }
    }

    /// 16 values; AVX-512 F, BW, DQ and VL.
    #[derive(Clone, Copy)]
    pub struct Avx512;

    // SAFETY: callers uphold the contract of the trait.
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe impl Lanes for Avx512 {
        type F = __m512;
        type I = __m512i;
        type Table = [__m512; 2];
        const N: usize = 16;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            _mm512_loadu_ps(from)
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, x: __m512) {
            _mm512_storeu_ps(to, x)
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            _mm512_sub_ps(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            _mm512_max_ps(a, b)
        }
        #[inline(always)]
        unsafe fn min(a: __m512, b: __m512) -> __m512 {
            _mm512_min_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sqrt(x: __m512) -> __m512 {
            // The square root instruction takes 19 cycles; an estimate and one Newton step take 4.
            let x = _mm512_max_ps(x, _mm512_set1_ps(1e-30));
            let y = _mm512_rsqrt14_ps(x);
            let d = _mm512_mul_ps(x, y);
            let rest = _mm512_fnmadd_ps(d, d, x);
            _mm512_fmadd_ps(rest, _mm512_mul_ps(y, _mm512_set1_ps(0.5)), d)
        }
        #[inline(always)]
        unsafe fn sqrt_each<const U: usize>(x: [__m512; U]) -> [__m512; U] {
            let (mut y, mut d, mut rest) = (x, x, x);
            for u in 0..U {
                rest[u] = _mm512_max_ps(x[u], _mm512_set1_ps(1e-30));
                y[u] = _mm512_rsqrt14_ps(rest[u]);
            }
            for u in 0..U {
                d[u] = _mm512_mul_ps(rest[u], y[u]);
                y[u] = _mm512_mul_ps(y[u], _mm512_set1_ps(0.5));
            }
            for u in 0..U {
                rest[u] = _mm512_fnmadd_ps(d[u], d[u], rest[u]);
            }
            for u in 0..U {
                d[u] = _mm512_fmadd_ps(rest[u], y[u], d[u]);
            }
            d
        }
        #[inline(always)]
        unsafe fn recip(x: __m512) -> __m512 {
            let y = _mm512_rcp14_ps(x);
            let rest = _mm512_fnmadd_ps(x, y, _mm512_set1_ps(1.0));
            _mm512_fmadd_ps(rest, y, y)
        }
        #[inline(always)]
        unsafe fn exp2(x: __m512) -> __m512 {
            let f = _mm512_reduce_ps::<1>(x); // x − ⌊x⌋
            let mut p = _mm512_set1_ps(EXP2[5]);
            for c in EXP2[..5].iter().rev() {
                p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*c));
            }
            // p · 2^⌊x⌋, and 0 where that would be denormal: the processor takes 150 cycles for those.
            _mm512_maskz_scalef_ps(above(x), p, x)
        }
        #[inline(always)]
        unsafe fn exp2_each<const U: usize>(x: [__m512; U]) -> [__m512; U] {
            let (mut x, mut f) = (x, x);
            for u in 0..U {
                x[u] = _mm512_max_ps(_mm512_set1_ps(LEAST), x[u]); // NaN stays
                f[u] = _mm512_reduce_ps::<1>(x[u]);
            }
            let mut p = [_mm512_set1_ps(EXP2[5]); U];
            for c in EXP2[..5].iter().rev() {
                let c = _mm512_set1_ps(*c);
                for (p, f) in p.iter_mut().zip(&f) {
                    *p = _mm512_fmadd_ps(*p, *f, c);
                }
            }
            for (p, x) in p.iter_mut().zip(&x) {
                *p = _mm512_scalef_ps(*p, *x);
            }
            p
        }
        #[inline(always)]
        unsafe fn turn(from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
            let mut x = [_mm512_setzero_ps(); 16];
            let mut y = x;
            for (i, x) in x.iter_mut().enumerate() {
                *x = _mm512_loadu_ps(from.add(i * from_step));
            }
            for i in 0..8 {
                y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
                y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
            }
            for i in 0..16 {
                // Columns i % 4 + {0, 4, 8, 12} of four rows.
                let first = _mm512_castps_pd(y[i / 4 * 4 + i % 4 / 2]);
                let second = _mm512_castps_pd(y[i / 4 * 4 + i % 4 / 2 + 2]);
                x[i] = _mm512_castpd_ps(match i % 2 {
                    0 => _mm512_unpacklo_pd(first, second),
                    _ => _mm512_unpackhi_pd(first, second),
                });
            }
            for q in 0..4 {
                let even = _mm512_shuffle_f32x4::<0x88>(x[q], x[q + 4]);
                let odd = _mm512_shuffle_f32x4::<0xdd>(x[q], x[q + 4]);
                let even_below = _mm512_shuffle_f32x4::<0x88>(x[q + 8], x[q + 12]);
                let odd_below = _mm512_shuffle_f32x4::<0xdd>(x[q + 8], x[q + 12]);
                y[q] = _mm512_shuffle_f32x4::<0x88>(even, even_below);
                y[q + 4] = _mm512_shuffle_f32x4::<0x88>(odd, odd_below);
                y[q + 8] = _mm512_shuffle_f32x4::<0xdd>(even, even_below);
                y[q + 12] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_below);
            }
            for (i, y) in y.iter().enumerate() {
                _mm512_storeu_ps(to.add(i * to_step), *y);
            }
        }
        #[inline(always)]
        unsafe fn widen(from: *const u16, to: *mut f32) {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_storeu_epi32(to.cast(), _mm512_slli_epi32::<16>(halves));
        }
        #[inline(always)]
        unsafe fn any_above(a: __m512, b: __m512) -> bool {
            _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0
        }
        #[inline(always)]
        unsafe fn none_above(a: __m512, b: __m512) -> bool {
            _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b) == 0xffff
        }
        #[inline(always)]
        unsafe fn segment<const SHIFT: u32>(t: __m512) -> (__m512i, __m512) {
            let bits = _mm512_castps_si512(t);
            // (bits & below) | ONE; a look-up takes its index modulo 32 by itself.
            let within = _mm512_ternarylogic_epi32::<0xea>(
                bits,
                _mm512_set1_epi32((1 << SHIFT) - 1),
                _mm512_set1_epi32(ONE),
            );
            let [by, less] = stretch(SHIFT);
            let within = _mm512_castsi512_ps(within);
            let within = _mm512_fmadd_ps(within, _mm512_set1_ps(by), _mm512_set1_ps(less));
            (_mm512_srli_epi32::<SHIFT>(bits), within)
        }
        #[inline(always)]
        unsafe fn load_index(from: *const i32) -> __m512i {
            _mm512_loadu_epi32(from)
        }
        #[inline(always)]
        unsafe fn store_index(to: *mut i32, x: __m512i) {
            _mm512_storeu_epi32(to, x)
        }
        #[inline(always)]
        unsafe fn table(from: *const f32) -> [__m512; 2] {
            [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))]
        }
        #[inline(always)]
        unsafe fn lookup(table: [__m512; 2], index: __m512i) -> __m512 {
            _mm512_permutex2var_ps(table[0], index, table[1])
        }
    }

    /// AVX512-BF16, beside [`Avx512`].
    pub struct Bf16;

    // SAFETY: callers uphold the contract of the trait.
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe impl super::Pairs<Avx512> for Bf16 {
        const HAS: bool = true;
        #[inline(always)]
        unsafe fn dot(a: *const u32, b: *const u32, c: __m512) -> __m512 {
            let a: __m512bh = std::mem::transmute(_mm512_set1_epi32(a.read() as i32));
            let b: __m512bh = std::mem::transmute(_mm512_loadu_epi32(b.cast()));
            _mm512_dpbf16_ps(c, a, b)
        }
        #[inline(always)]
        unsafe fn pair(to: *mut u32, a: __m512, b: __m512) -> [__m512; 2] {
            let (half, upper) = (_mm512_set1_epi32(0x8000), _mm512_set1_epi32(!0xffff));
            let a = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(a), half), upper);
            let b = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(b), half), upper);
            _mm512_storeu_epi32(to.cast(), _mm512_or_si512(_mm512_srli_epi32::<16>(a), b));
            [_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)]
        }
    }

    /// 8 values; AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub struct Avx2;

    // SAFETY: callers uphold the contract of the trait.
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe impl Lanes for Avx2 {
        type F = __m256;
        type I = __m256i;
        type Table = *const f32;
        const N: usize = 8;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            _mm256_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            _mm256_loadu_ps(from)
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, x: __m256) {
            _mm256_storeu_ps(to, x)
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            _mm256_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            _mm256_sub_ps(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            _mm256_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            _mm256_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            _mm256_max_ps(a, b)
        }
        #[inline(always)]
        unsafe fn min(a: __m256, b: __m256) -> __m256 {
            _mm256_min_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sqrt(x: __m256) -> __m256 {
            _mm256_sqrt_ps(x)
        }
        #[inline(always)]
        unsafe fn recip(x: __m256) -> __m256 {
            _mm256_div_ps(_mm256_set1_ps(1.0), x)
        }
        #[inline(always)]
        unsafe fn exp2(x: __m256) -> __m256 {
            let least = _mm256_set1_ps(-126.0);
            let near = _mm256_max_ps(x, least);
            let shifted = _mm256_add_ps(near, _mm256_set1_ps(ROUND));
            let f = _mm256_sub_ps(near, _mm256_sub_ps(shifted, _mm256_set1_ps(ROUND)));
            let mut p = _mm256_set1_ps(EXP2_CENTRED[5]);
            for c in EXP2_CENTRED[..5].iter().rev() {
                p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(*c));
            }
            let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
            let p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
            _mm256_and_ps(p, _mm256_cmp_ps::<_CMP_GT_OQ>(x, least))
        }
        #[inline(always)]
        unsafe fn turn(from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
            let mut x = [_mm256_setzero_ps(); 8];
            let mut y = x;
            for (i, x) in x.iter_mut().enumerate() {
                *x = _mm256_loadu_ps(from.add(i * from_step));
            }
            for i in 0..4 {
                y[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
                y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
            }
            for i in 0..8 {
                // Columns i % 4 + {0, 4} of four rows.
                let first = _mm256_castps_pd(y[i / 4 * 4 + i % 4 / 2]);
                let second = _mm256_castps_pd(y[i / 4 * 4 + i % 4 / 2 + 2]);
                x[i] = _mm256_castpd_ps(match i % 2 {
                    0 => _mm256_unpacklo_pd(first, second),
                    _ => _mm256_unpackhi_pd(first, second),
                });
            }
            for q in 0..4 {
                let (low, high) = (to.add(q * to_step), to.add((q + 4) * to_step));
                _mm256_storeu_ps(low, _mm256_permute2f128_ps::<0x20>(x[q], x[q + 4]));
                _mm256_storeu_ps(high, _mm256_permute2f128_ps::<0x31>(x[q], x[q + 4]));
            }
        }
        #[inline(always)]
        unsafe fn exp2_each<const U: usize>(x: [__m256; U]) -> [__m256; U] {
            let least = _mm256_set1_ps(LEAST);
            let round = _mm256_set1_ps(ROUND);
            let (mut shifted, mut f) = (x, x);
            for u in 0..U {
                let near = _mm256_max_ps(least, x[u]); // NaN stays
                shifted[u] = _mm256_add_ps(near, round);
                f[u] = _mm256_sub_ps(near, _mm256_sub_ps(shifted[u], round));
            }
            let mut p = [_mm256_set1_ps(EXP2_CENTRED[5]); U];
            for c in EXP2_CENTRED[..5].iter().rev() {
                let c = _mm256_set1_ps(*c);
                for (p, f) in p.iter_mut().zip(&f) {
                    *p = _mm256_fmadd_ps(*p, *f, c);
                }
            }
            for u in 0..U {
                let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted[u]));
                p[u] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p[u]), power));
            }
            p
        }
        #[inline(always)]
        unsafe fn any_above(a: __m256, b: __m256) -> bool {
            _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) != 0
        }
        #[inline(always)]
        unsafe fn none_above(a: __m256, b: __m256) -> bool {
            _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(a, b)) == 0xff
        }
        #[inline(always)]
        unsafe fn segment<const SHIFT: u32>(t: __m256) -> (__m256i, __m256) {
            let bits = _mm256_castps_si256(t);
            let below = _mm256_set1_epi32((1 << SHIFT) - 1);
            let within = _mm256_or_si256(_mm256_and_si256(bits, below), _mm256_set1_epi32(ONE));
            let [by, less] = stretch(SHIFT);
            let within = _mm256_castsi256_ps(within);
            let within = _mm256_fmadd_ps(within, _mm256_set1_ps(by), _mm256_set1_ps(less));
            let index = _mm256_srl_epi32(bits, _mm_cvtsi32_si128(SHIFT as i32));
            (_mm256_and_si256(index, _mm256_set1_epi32(31)), within)
        }
        #[inline(always)]
        unsafe fn load_index(from: *const i32) -> __m256i {
            _mm256_loadu_si256(from.cast())
        }
        #[inline(always)]
        unsafe fn store_index(to: *mut i32, x: __m256i) {
            _mm256_storeu_si256(to.cast(), x)
        }
        #[inline(always)]
        unsafe fn table(from: *const f32) -> *const f32 {
            from
        }
        #[inline(always)]
        unsafe fn lookup(table: *const f32, index: __m256i) -> __m256 {
            _mm256_i32gather_ps::<4>(table, index)
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub use arm::Neon;

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::{EXP2_CENTRED, Lanes, ONE, ROUND, stretch};

    /// 4 values; every 64-bit ARM has them.
    #[derive(Clone, Copy)]
    pub struct Neon;

    // SAFETY: callers uphold the contract of the trait.
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe impl Lanes for Neon {
        type F = float32x4_t;
        type I = int32x4_t;
        type Table = *const f32;
        const N: usize = 4;

        #[inline(always)]
        unsafe fn splat(x: f32) -> float32x4_t {
            vdupq_n_f32(x)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> float32x4_t {
            vld1q_f32(from)
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, x: float32x4_t) {
            vst1q_f32(to, x)
        }
        #[inline(always)]
        unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            vaddq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            vsubq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            vmulq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
            vfmaq_f32(c, a, b)
        }
        #[inline(always)]
        unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            vmaxq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            vminq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn sqrt(x: float32x4_t) -> float32x4_t {
            vsqrtq_f32(x)
        }
        #[inline(always)]
        unsafe fn recip(x: float32x4_t) -> float32x4_t {
            vdivq_f32(vdupq_n_f32(1.0), x)
        }
        #[inline(always)]
        unsafe fn exp2(x: float32x4_t) -> float32x4_t {
            let least = vdupq_n_f32(-126.0);
            let near = vmaxq_f32(x, least);
            let shifted = vaddq_f32(near, vdupq_n_f32(ROUND));
            let f = vsubq_f32(near, vsubq_f32(shifted, vdupq_n_f32(ROUND)));
            let mut p = vdupq_n_f32(EXP2_CENTRED[5]);
            for c in EXP2_CENTRED[..5].iter().rev() {
                p = vfmaq_f32(vdupq_n_f32(*c), p, f);
            }
            let power = vshlq_n_s32::<23>(vreinterpretq_s32_f32(shifted));
            let p = vaddq_s32(vreinterpretq_s32_f32(p), power);
            vreinterpretq_f32_s32(vandq_s32(p, vreinterpretq_s32_u32(vcgtq_f32(x, least))))
        }
        #[inline(always)]
        unsafe fn any_above(a: float32x4_t, b: float32x4_t) -> bool {
            vmaxvq_u32(vcgtq_f32(a, b)) != 0
        }
        #[inline(always)]
        unsafe fn none_above(a: float32x4_t, b: float32x4_t) -> bool {
            vminvq_u32(vcleq_f32(a, b)) != 0
        }
        #[inline(always)]
        unsafe fn segment<const SHIFT: u32>(t: float32x4_t) -> (int32x4_t, float32x4_t) {
            let bits = vreinterpretq_s32_f32(t);
            let below = vdupq_n_s32((1 << SHIFT) - 1);
            let within = vorrq_s32(vandq_s32(bits, below), vdupq_n_s32(ONE));
            let [by, less] = stretch(SHIFT);
            let within = vreinterpretq_f32_s32(within);
            let within = vfmaq_f32(vdupq_n_f32(less), within, vdupq_n_f32(by));
            let index = vshlq_s32(bits, vdupq_n_s32(-(SHIFT as i32)));
            (vandq_s32(index, vdupq_n_s32(31)), within)
        }
        #[inline(always)]
        unsafe fn load_index(from: *const i32) -> int32x4_t {
            vld1q_s32(from)
        }
        #[inline(always)]
        unsafe fn store_index(to: *mut i32, x: int32x4_t) {
            vst1q_s32(to, x)
        }
        #[inline(always)]
        unsafe fn table(from: *const f32) -> *const f32 {
            from
        }
        #[inline(always)]
        unsafe fn lookup(table: *const f32, index: int32x4_t) -> float32x4_t {
            let mut at = [0i32; 4];
            vst1q_s32(at.as_mut_ptr(), index);
            let values = at.map(|i| *table.add((i & 31) as usize));
            vld1q_f32(values.as_ptr())
        }
    }
}

/// Enters a kernel compiled for the instruction set of this machine: generic over [`Lanes`], rows
/// `R` and vectors `C` of its register tile, and vectors `U` (a multiple of `C`) taken side by side
/// through long chains of arithmetic.
macro_rules! dispatch {
    ($kernel:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {{
        use $crate::fused::{lanes, simd::{Level, level}};
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        #[allow(clippy::too_many_arguments)]
        unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
            unsafe { $kernel::<lanes::Avx512, 8, 2, 4>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        #[allow(clippy::too_many_arguments)]
        unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
            unsafe { $kernel::<lanes::Avx2, 4, 2, 4>($($arg),*) }
        }
        // SAFETY: the instruction set was detected on this machine; the rest is the caller's.
        unsafe {
            match level() {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => avx512($($arg),*),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2($($arg),*),
                #[cfg(target_arch = "aarch64")]
                Level::Neon => $kernel::<lanes::Neon, 8, 2, 4>($($arg),*),
                _ => $kernel::<lanes::Portable, 4, 1, 1>($($arg),*),
            }
        }
    }};
}
pub(crate) use dispatch;

/// [`product`] with the values of `a` for one step side by side.
///
/// # Safety
/// `a` is valid for `(depth − 1)·a_step + R` values, `b` for `(depth − 1)·b_step + C·N`.
#[inline(always)]
pub unsafe fn tile<L: Lanes, const R: usize, const C: usize>(
    depth: usize,
    a: *const f32,
    a_step: usize,
    b: *const f32,
    b_step: usize,
    acc: &mut [[L::F; C]; R],
) {
    // SAFETY: the caller's contract.
    unsafe { product::<L, R, C>(depth, a, [1, a_step], b, b_step, acc) }
}

/// `acc[r][c] += Σₖ a[r·row + k·step] · b[k·b_step + c·N …]`: the register tile that all matrix
/// products here are made of. Lanes run along `b`.
///
/// # Safety
/// `a` is valid at every place named, `b` for `(depth − 1)·b_step + C·N` values.
#[inline(always)]
pub unsafe fn product<L: Lanes, const R: usize, const C: usize>(
    depth: usize,
    a: *const f32,
    [row, a_step]: [usize; 2],
    b: *const f32,
    b_step: usize,
    acc: &mut [[L::F; C]; R],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let (mut a, mut b) = (a, b);
        let mut left = depth;
        // Four steps to a turn: a short loop's end is hard to foresee.
        while left >= 4 {
            step::<L, R, C>(a, row, b, acc);
            step::<L, R, C>(a.add(a_step), row, b.add(b_step), acc);
            step::<L, R, C>(a.add(2 * a_step), row, b.add(2 * b_step), acc);
            step::<L, R, C>(a.add(3 * a_step), row, b.add(3 * b_step), acc);
            a = a.wrapping_add(4 * a_step);
            b = b.wrapping_add(4 * b_step);
            left -= 4;
        }
        while left > 0 {
            step::<L, R, C>(a, row, b, acc);
            a = a.wrapping_add(a_step);
            b = b.wrapping_add(b_step);
            left -= 1;
        }
    }
}

/// One step of [`product`].
#[inline(always)]
unsafe fn step<L: Lanes, const R: usize, const C: usize>(
    a: *const f32,
    row: usize,
    b: *const f32,
    acc: &mut [[L::F; C]; R],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut column = [L::splat(0.0); C];
        for (c, value) in column.iter_mut().enumerate() {
            *value = L::load(b.add(c * L::N));
        }
        for (r, sums) in acc.iter_mut().enumerate() {
            let x = L::splat(*a.add(r * row));
            for (value, y) in sums.iter_mut().zip(&column) {
                *value = L::fma(x, *y, *value);
            }
        }
    }
}

/// [`tile`] with a pair of bf16 in place of each number of `a` and `b`: `depth` counts pairs.
///
/// # Safety
/// As there, and where there are products of pairs.
#[inline(always)]
pub unsafe fn pair_tile<L: Lanes, D: Pairs<L>, const R: usize, const C: usize>(
    depth: usize,
    a: *const u32,
    a_step: usize,
    b: *const u32,
    b_step: usize,
    acc: &mut [[L::F; C]; R],
) {
    // SAFETY: the caller's contract.
    unsafe {
        for k in 0..depth {
            let (a, b) = (a.add(k * a_step), b.add(k * b_step));
            for r in 0..R {
                for c in 0..C {
                    acc[r][c] = D::dot(a.add(r), b.add(c * L::N), acc[r][c]);
                }
            }
        }
    }
}
