//! Vector maths without intrinsics: one loop body, compiled for each instruction set, chosen at
//! run time. LLVM vectorises the bodies; the portable version is the same source.

/// Instruction sets we compile for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Whatever the build target guarantees.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// NEON, on every 64-bit ARM.
    Neon,
}

/// The best level this machine has; `ISOPLETH_SIMD=portable|avx2|avx512` lowers it, for tests.
pub fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| {
        let best = detect();
        match std::env::var("ISOPLETH_SIMD").as_deref() {
            Ok("portable") => Level::Portable,
            Ok("avx2") if best != Level::Portable => Level::Avx2,
            _ => best,
        }
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let wide = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    match (wide && fma, fma) {
        (true, _) => Level::Avx512,
        (_, true) => Level::Avx2,
        _ => Level::Portable,
    }
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Level {
    Level::Neon
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Level {
    Level::Portable
}

/// Compiles one loop body for every instruction set and picks at run time.
macro_rules! vectorised {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match $crate::fused::simd::level() {
                    // SAFETY: the features were detected on this machine.
                    $crate::fused::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::fused::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// `eˣ` to 2e-7 relative, 0 below −87.3, saturating above 88.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding and subtracting rounds to an integer
    // Clamping first keeps every later step in range; the last line restores 0 far below.
    let x0 = if x > -87.3 { x } else { -87.3 };
    let x0 = if x0 < 88.0 { x0 } else { 88.0 };
    let shifted = x0.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts keeps full precision for large |x|.
    let r = n.mul_add(-0.693_359_4, x0);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.984_127e-4_f32;
    let p = p.mul_add(r, 1.388_888_9e-3);
    let p = p.mul_add(r, 8.333_333e-3);
    let p = p.mul_add(r, 4.166_666_6e-2);
    let p = p.mul_add(r, 1.666_666_7e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    // The low bits of `shifted` are the integer n: moved into the exponent they are 2ⁿ.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.3 { 0.0 } else { p * scale }
}

/// `eˣ` to 2e-16 relative, 0 below −708, saturating above 709.
#[inline(always)]
pub fn exp_f64(x: f64) -> f64 {
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 · 2⁵²: as in [`exp`]
    // 1/k! from k = 13 down: what is left out is below 1e-17 for |r| ≤ ½ ln 2.
    const TAYLOR: [f64; 14] = [
        1.605_904_383_682_161_3e-10,
        2.087_675_698_786_81e-9,
        2.505_210_838_544_172e-8,
        2.755_731_922_398_589_3e-7,
        2.755_731_922_398_589e-6,
        2.480_158_730_158_73e-5,
        1.984_126_984_126_984e-4,
        1.388_888_888_888_889e-3,
        8.333_333_333_333_333e-3,
        4.166_666_666_666_666_4e-2,
        1.666_666_666_666_666_6e-1,
        0.5,
        1.0,
        1.0,
    ];
    let x0 = if x > -708.0 { x } else { -708.0 };
    let x0 = if x0 < 709.0 { x0 } else { 709.0 };
    let shifted = x0.mul_add(std::f64::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts; the first has zeros at its end, so that n times it is exact.
    let r = n.mul_add(-0.693_147_180_369_123_8, x0);
    let r = n.mul_add(-1.908_214_929_270_587_7e-10, r);
    let mut p = TAYLOR[0];
    for c in &TAYLOR[1..] {
        p = p.mul_add(r, *c);
    }
    let scale = f64::from_bits((shifted.to_bits() << 52).wrapping_add(0x3ff0_0000_0000_0000));
    if x < -708.0 { 0.0 } else { p * scale }
}

/// 2ˣ to 3e-7 relative, for |x| ≤ 126.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    use super::lanes::EXP2_CENTRED;
    const ROUND: f32 = 12_582_912.0; // as in [`exp`]
    let shifted = x + ROUND;
    let f = x - (shifted - ROUND);
    let mut p = EXP2_CENTRED[5];
    for c in EXP2_CENTRED[..5].iter().rev() {
        p = p.mul_add(f, *c);
    }
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// `tanh x`, from [`exp`].
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let e = exp(-2.0 * x.abs());
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_everywhere() {
        let mut worst: f64 = 0.0;
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let truth = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / truth - 1.0).abs());
        }
        assert!(worst < 2e-7, "worst relative error {worst:e}");
        assert_eq!(exp(-1e4), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan() || exp(f32::NAN).is_finite());
        assert!(exp(200.0).is_finite());
    }

    #[test]
    fn exp_of_f64_is_right_everywhere() {
        let mut worst: f64 = 0.0;
        for i in -70_800..70_900 {
            let x = f64::from(i) * 0.01;
            worst = worst.max((exp_f64(x) / x.exp() - 1.0).abs());
        }
        assert!(worst < 4.5e-16, "worst relative error {worst:e}");
        assert_eq!((exp_f64(0.0), exp_f64(-0.0)), (1.0, 1.0));
        assert_eq!((exp_f64(-709.0), exp_f64(f64::NEG_INFINITY)), (0.0, 0.0));
        assert!(exp_f64(1e9).is_finite());
    }

    #[test]
    fn exp2_is_right_in_its_range() {
        for i in -12600..=12600 {
            let x = i as f32 * 0.01;
            let apart = (f64::from(exp2(x)) / f64::from(x).exp2() - 1.0).abs();
            assert!(apart < 3e-7, "2^{x} is off by {apart:e}");
        }
    }

    #[test]
    fn tanh_is_right_everywhere() {
        for i in -3000..3000 {
            let x = i as f32 * 0.01;
            let gap = (f64::from(tanh(x)) - f64::from(x).tanh()).abs();
            assert!(gap < 3e-7, "tanh({x}) is off by {gap:e}");
        }
    }
}
