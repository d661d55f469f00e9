//! Natural logarithms of f32 that vectorise, for loop bodies under `simd::vectorised`.
//!
//! Source: the polynomial of `logf` in Cephes (Moshier 1992).

/// `ln x` to 2e-7 relative (absolute below 1) for normal x > 0; some finite number elsewhere.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    const ROOT_HALF: u32 = 0x3f35_04f3; // √½
    // x = m · 2ᵉ with m from √½ to √2.
    let e = (x.to_bits().wrapping_sub(ROOT_HALF) as i32) >> 23;
    let f = f32::from_bits(x.to_bits().wrapping_sub((e as u32) << 23)) - 1.0;
    let e = e as f32;
    let p = 7.037_683_6e-2_f32;
    let p = p.mul_add(f, -1.151_461e-1);
    let p = p.mul_add(f, 1.167_699_9e-1);
    let p = p.mul_add(f, -1.242_014_1e-1);
    let p = p.mul_add(f, 1.424_932_3e-1);
    let p = p.mul_add(f, -1.666_805_8e-1);
    let p = p.mul_add(f, 2.000_071_5e-1);
    let p = p.mul_add(f, -2.499_999_4e-1);
    let p = p.mul_add(f, 3.333_333e-1);
    // ln 2 in two parts keeps full precision for large |e|.
    let y = e.mul_add(-2.121_944_4e-4, f * f * f * p);
    let y = (-0.5 * f).mul_add(f, y);
    e.mul_add(0.693_359_4, f + y)
}

/// `ln(1 + x)` to 2e-7 relative for x > −½, however small.
#[inline(always)]
pub fn ln_1p(x: f32) -> f32 {
    let whole = 1.0 + x;
    // What the addition rounded away, to first order.
    ln(whole) + (x - (whole - 1.0)) / whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_right_everywhere() {
        for i in -3700..3700 {
            let x = (f64::from(i) * 0.01).exp() as f32;
            let truth = f64::from(x).ln();
            let gap = (f64::from(ln(x)) - truth).abs();
            assert!(gap < 2e-7 * truth.abs().max(1.0), "ln({x:e}) is off by {gap:e}");
            for x in [x, (-x).max(-0.5)] {
                let truth = f64::from(x).ln_1p();
                let gap = (f64::from(ln_1p(x)) - truth).abs();
                assert!(gap < 2e-7 * truth.abs(), "ln_1p({x:e}) is off by {gap:e}");
            }
        }
        assert_eq!(ln(1.0), 0.0);
        assert_eq!(ln_1p(0.0), 0.0);
        assert!(ln(0.0).is_finite());
    }
}
