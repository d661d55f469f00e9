//! Random streams named by (seed, purpose, index): equal on any machine, for any thread count.
//!
//! There is no global generator. Two streams with different names never share state.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Binomial, Distribution, Gamma, Poisson, StandardNormal};

/// A named random stream.
#[derive(Debug, Clone)]
pub struct Stream(ChaCha8Rng);

/// FNV-1a: a stable hash, since the standard library's may change between releases.
fn fnv(seed: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

impl Stream {
    /// The stream of `purpose`, number `index`, under `seed`.
    ///
    /// ```
    /// use isopleth::Stream;
    /// let mut a = Stream::new(1, "surface", 0);
    /// let mut b = Stream::new(1, "surface", 0);
    /// let mut c = Stream::new(1, "design", 0);
    /// let x = a.normal();
    /// assert_eq!(x, b.normal());
    /// assert_ne!(x, c.normal());
    /// ```
    pub fn new(seed: u64, purpose: &str, index: u64) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&fnv(seed, purpose.as_bytes()).to_le_bytes());
        key[16..24].copy_from_slice(&index.to_le_bytes());
        Stream(ChaCha8Rng::from_seed(key))
    }

    /// Uniform on [0, 1).
    pub fn unit(&mut self) -> f64 {
        self.0.random::<f64>()
    }

    /// Uniform on [low, high).
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Log-uniform on [low, high), both positive.
    pub fn log_uniform(&mut self, low: f64, high: f64) -> f64 {
        self.uniform(low.ln(), high.ln()).exp()
    }

    /// An integer from 0 to `n` − 1.
    pub fn below(&mut self, n: usize) -> usize {
        self.0.random_range(0..n)
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        StandardNormal.sample(&mut self.0)
    }

    /// `n` standard normals.
    pub fn normals(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// Gamma with the given shape and scale 1.
    pub fn gamma(&mut self, shape: f64) -> f64 {
        Gamma::new(shape, 1.0).expect("shape is positive").sample(&mut self.0)
    }

    /// Beta(a, b), from two gammas.
    pub fn beta(&mut self, a: f64, b: f64) -> f64 {
        let (x, y) = (self.gamma(a), self.gamma(b));
        x / (x + y)
    }

    /// Number of successes in `trials` at probability `p`, clamped to [0, 1].
    pub fn binomial(&mut self, trials: u64, p: f64) -> u64 {
        Binomial::new(trials, p.clamp(0.0, 1.0)).expect("p is a probability").sample(&mut self.0)
    }

    /// Poisson with the given mean, a whole number; 0 for a mean of 0.
    pub fn poisson(&mut self, mean: f64) -> f64 {
        if mean <= 0.0 {
            return 0.0;
        }
        Poisson::new(mean).expect("the mean is finite").sample(&mut self.0)
    }

    /// A random permutation of 0 … n − 1.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}
