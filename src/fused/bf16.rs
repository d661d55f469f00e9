//! Numbers of 16 bits: f32 without its last 16, rounded to nearest, ties to even.
//!
//! Each is within 2⁻⁸ of what it stands for, relative. A context held in them takes half the
//! memory. It is read in one of two ways, [`Way`]; which is faster depends on the machine.

use std::{sync::OnceLock, time::Instant};

use super::{
    simd,
    softmax::{Bias, GROUP, Job, Packed, Shape, attend},
};

/// The largest relative error of a rounded number.
pub const ROUNDING: f64 = 1.0 / 256.0;

/// How a context of bf16 is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Keys and values are widened to f32, block by block; what follows is arithmetic of f32.
    Storage,
    /// Queries and weights are rounded too, and pairs of products added by one instruction
    /// (AVX512-BF16), in f32.
    Dot,
}

impl Way {
    /// As `ISOPLETH_BF16` names it.
    pub fn name(self) -> &'static str {
        match self {
            Way::Storage => "storage",
            Way::Dot => "dot",
        }
    }
}

/// Nearest bf16; NaN stays.
#[inline(always)]
pub fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The number that 16 bits stand for.
#[inline(always)]
pub fn widen(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// Whether this machine multiplies pairs of bf16, and may.
pub fn has_dot() -> bool {
    #[cfg(target_arch = "x86_64")]
    return simd::level() == simd::Level::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// The faster way here, measured once, in about a millisecond. Two machines, or two runs on a busy
/// one, may choose differently: their answers differ by what the rounding allows.
/// `ISOPLETH_BF16=storage|dot` chooses, for tests.
pub fn way() -> Way {
    static WAY: OnceLock<Way> = OnceLock::new();
    *WAY.get_or_init(|| match std::env::var("ISOPLETH_BF16").as_deref() {
        _ if !has_dot() => Way::Storage,
        Ok("storage") => Way::Storage,
        Ok("dot") => Way::Dot,
        _ => faster(),
    })
}

/// The way that reads a few keys in less time.
fn faster() -> Way {
    const KEYS: usize = 96;
    const TURNS: usize = 20;
    let shape = Shape { heads: 1, d: 32, w: 32, dim: 1 };
    let number = |i: usize| (i % 17) as f32 * 0.05 - 0.4;
    let q: Vec<f32> = (0..GROUP * shape.d).map(number).collect();
    let row: Vec<f32> = (0..KEYS + shape.d + shape.w).map(number).collect();
    let (sites, rows): (Vec<f32>, Vec<u32>) = (vec![0.0; GROUP], (0..GROUP as u32).collect());
    let mut out = vec![0.0; GROUP * (shape.w + 2)];
    let contexts = [Way::Storage, Way::Dot].map(|way| {
        let mut keys = Packed::halved(shape, KEYS, way);
        for j in 0..KEYS {
            keys.set(j, &[0.0], |_| (&row[j..], &row[j + shape.d..]));
        }
        keys
    });
    let mut best = [f64::INFINITY; 2];
    for _ in 0..TURNS {
        for (keys, best) in contexts.iter().zip(&mut best) {
            let job = Job {
                keys,
                bias: Bias::None,
                highest: &[0.0],
                bend: None,
                sink: None,
                skip: None,
                fade: None,
            };
            let start = Instant::now();
            attend(&job, &q, &sites, &rows, &mut out);
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    if best[1] < best[0] { Way::Dot } else { Way::Storage }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_to_the_nearest_even() {
        for (x, rounded) in [
            (0.0, 0.0),
            (1.0, 1.0),
            (1.0 + 1.0 / 256.0, 1.0), // halfway: even
            (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0),
            (1.0 + 1.1 / 256.0, 1.0 + 2.0 / 256.0),
            (-3.07, -3.0625),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
        ] {
            assert_eq!(widen(round(x)), rounded, "{x}");
        }
        assert!(widen(round(f32::NAN)).is_nan());
        assert!(widen(round(f32::from_bits(0x7f80_0001))).is_nan(), "not infinite");
        for i in 1..10_000 {
            let x = i as f32 * 0.37;
            let off = f64::from((widen(round(x)) - x).abs() / x);
            assert!(off <= ROUNDING, "{x}: {off}");
        }
    }
}
