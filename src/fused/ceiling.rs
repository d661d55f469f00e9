//! What this machine can do at most: multiply-adds and exponentials per nanosecond and thread.
//!
//! Both are measured on values that never leave the first cache, with the instructions that the
//! fused operations use ([`simd::level`]). Every thread of the current rayon pool runs at once,
//! so that a clock that falls under load, or a core that is shared, counts.

// Loops count by index: adaptors and closures may be left out of line, without the instruction set.
#![allow(clippy::needless_range_loop)]

use std::{hint::black_box, time::Instant};

use super::{
    lanes::{self, Lanes},
    simd,
};

/// Rates of one thread while all threads run, in single numbers (a vector of 16 counts as 16).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Multiply-adds per nanosecond: half of GFLOP/s.
    pub fma: f64,
    /// Exponentials per nanosecond, each accurate to 1e-6 relative or better.
    pub exp: f64,
}

impl Rates {
    /// The rates of one thread alone.
    pub fn single() -> Self {
        Self::of(rate)
    }

    /// The mean rates of the threads of the current rayon pool, all running.
    pub fn all() -> Self {
        Self::of(|work, rounds| {
            let rates = rayon::broadcast(|_| rate(work, rounds));
            rates.iter().sum::<f64>() / rates.len() as f64
        })
    }

    fn of(measure: impl Fn(Work, usize) -> f64) -> Self {
        let rate = |work: Work| {
            let rounds = rounds(work);
            (0..TURNS).map(|_| measure(work, rounds)).fold(0.0, f64::max)
        };
        let exp = rate(exponentials).max(rate(scaled_exponentials));
        Rates { fma: rate(multiply_adds), exp }
    }

    /// The better of two measurements: whatever else ran on the machine only takes away.
    pub fn best(self, other: Self) -> Self {
        Rates { fma: self.fma.max(other.fma), exp: self.exp.max(other.exp) }
    }
}

/// Does `rounds` rounds and says how many operations those were.
type Work = fn(rounds: usize) -> usize;

/// Measurements of each rate, of which the best counts: short ones, so that some fall between the
/// turns that other programs take on a shared machine.
const TURNS: usize = 10;
/// Least length of one, in seconds.
const SECONDS: f64 = 0.001;

/// As many rounds as take [`SECONDS`].
fn rounds(work: Work) -> usize {
    let mut rounds = 64;
    loop {
        let start = Instant::now();
        work(rounds);
        if start.elapsed().as_secs_f64() > SECONDS {
            return rounds;
        }
        rounds *= 2;
    }
}

/// Operations per nanosecond.
fn rate(work: Work, rounds: usize) -> f64 {
    let start = Instant::now();
    work(rounds) as f64 / (start.elapsed().as_secs_f64() * 1e9)
}

fn multiply_adds(rounds: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    match simd::level() {
        // SAFETY: the features were detected on this machine.
        simd::Level::Avx512 => return unsafe { x86::fma_512(rounds) },
        // SAFETY: as above.
        simd::Level::Avx2 => return unsafe { x86::fma_256(rounds) },
        _ => {}
    }
    const LANES: usize = 64;
    let (x, y) = (black_box(0.999f32), black_box(0.001f32));
    let mut lanes = [1f32; LANES];
    for _ in 0..rounds {
        for lane in &mut lanes {
            // Without the instruction `mul_add` is a slow call, and two instructions are the peak.
            *lane = if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
                lane.mul_add(x, y)
            } else {
                *lane * x + y
            };
        }
    }
    black_box(lanes);
    rounds * LANES
}

/// Numbers that exponentials are taken of: in the first cache, and as far apart as scores are.
const NUMBERS: usize = 1024;

fn numbers() -> [f32; NUMBERS] {
    std::array::from_fn(|i| -0.02 * i as f32)
}

/// [`simd::exp`], which any finite number may be given to.
fn exponentials(rounds: usize) -> usize {
    simd::vectorised! {
        /// Σ exp(x), in 64 sums.
        pub fn add_exponentials(x: &[f32], sums: &mut [f32; 64]) {
            for x in x.as_chunks::<64>().0 {
                for l in 0..64 {
                    sums[l] += simd::exp(x[l]);
                }
            }
        }
    }
    let x = numbers();
    let mut sums = [0.0; 64];
    for _ in 0..rounds {
        add_exponentials(black_box(&x), &mut sums);
    }
    black_box(sums);
    rounds * NUMBERS
}

/// The exponential that attention takes: [`Lanes::exp2_each`].
fn scaled_exponentials(rounds: usize) -> usize {
    let x = &numbers();
    // SAFETY: the kernel reads and writes whole vectors of `numbers` alone.
    let sum = lanes::dispatch!(powers(rounds: usize, x: &[f32; NUMBERS]) -> f32);
    black_box(sum);
    rounds * NUMBERS
}

/// Σ 2ˣ, `rounds` times.
///
/// # Safety
/// On a machine with the instruction set.
#[inline(always)]
unsafe fn powers<L: Lanes, const R: usize, const C: usize, const U: usize>(
    rounds: usize,
    x: &[f32; NUMBERS],
) -> f32 {
    // SAFETY: NUMBERS is a multiple of every number of values in U vectors, U ≤ 8 of 16.
    unsafe {
        let mut sums = [L::splat(0.0); U];
        for _ in 0..rounds {
            let x = black_box(x).as_ptr();
            for at in (0..NUMBERS / (U * L::N)).map(|i| i * U * L::N) {
                let mut v = [L::splat(0.0); U];
                for u in 0..U {
                    v[u] = L::load(x.add(at + u * L::N));
                }
                let p = L::exp2_each::<U>(v);
                for u in 0..U {
                    sums[u] = L::add(sums[u], p[u]);
                }
            }
        }
        // Every sum is asked for, or the compiler leaves it out.
        let mut sum = L::splat(0.0);
        for u in 0..U {
            sum = L::add(sum, sums[u]);
        }
        let mut lanes = [0.0f32; 16];
        L::store(lanes.as_mut_ptr(), sum);
        lanes.iter().sum()
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    /// Independent chains: more than latency times instructions per cycle, and they fit the registers.
    const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f")]
    pub fn fma_512(rounds: usize) -> usize {
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut chains = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ps(*chain, x, y);
            }
        }
        black_box(chains);
        rounds * CHAINS * 16
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn fma_256(rounds: usize) -> usize {
        let (x, y) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut chains = [_mm256_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for chain in &mut chains {
                *chain = _mm256_fmadd_ps(*chain, x, y);
            }
        }
        black_box(chains);
        rounds * CHAINS * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares of what this machine can do mean nothing if that is 0, or endless.
    #[test]
    fn every_rate_is_a_rate() {
        for rates in [Rates::single(), Rates::all()] {
            assert!(rates.fma > 0.01 && rates.fma < 1e4, "{rates:?}");
            assert!(rates.exp > 0.001 && rates.exp < rates.fma, "{rates:?}");
        }
        let (a, b) = (Rates { fma: 1.0, exp: 4.0 }, Rates { fma: 2.0, exp: 3.0 });
        assert_eq!(a.best(b), Rates { fma: 2.0, exp: 4.0 });
    }
}
