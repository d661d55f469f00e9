//! How much attention computes: pairs, multiply-adds, exponentials.

use std::ops::{Add, Mul};

use super::Ceiling;

/// The sizes of a network's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Layers.
    pub layers: usize,
    /// Which attention.
    pub kind: Kind,
}

/// The sizes of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Softmax over all pairs.
    Softmax {
        /// Heads.
        heads: usize,
        /// Key width of a head.
        d: usize,
        /// Value width of a head.
        w: usize,
    },
    /// Deep kernel attention: one head, and no pair is ever formed.
    Kernel {
        /// Coordinates.
        dim: usize,
        /// Token width.
        width: usize,
        /// Features of a token.
        features: usize,
    },
}

/// What has to be computed, however it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Query, key and head.
    pub head_pairs: u64,
    /// Multiply-adds of scores and values, d + w per head pair. For deep kernel attention, those of
    /// its dense layers and of its one small matrix.
    pub multiply_adds: u64,
    /// Exponentials: one per head pair. For deep kernel attention, one per activation.
    pub exponentials: u64,
}

impl Add for Work {
    type Output = Work;
    fn add(self, other: Work) -> Work {
        Work {
            head_pairs: self.head_pairs + other.head_pairs,
            multiply_adds: self.multiply_adds + other.multiply_adds,
            exponentials: self.exponentials + other.exponentials,
        }
    }
}

impl Mul<u64> for Work {
    type Output = Work;
    fn mul(self, n: u64) -> Work {
        Work {
            head_pairs: self.head_pairs * n,
            multiply_adds: self.multiply_adds * n,
            exponentials: self.exponentials * n,
        }
    }
}

impl Shape {
    /// Heads; one for deep kernel attention.
    pub fn heads(&self) -> usize {
        match self.kind {
            Kind::Softmax { heads, .. } => heads,
            Kind::Kernel { .. } => 1,
        }
    }

    /// Key width of a head.
    pub fn key_width(&self) -> usize {
        match self.kind {
            Kind::Softmax { d, .. } => d,
            Kind::Kernel { features, .. } => features,
        }
    }

    /// Value width of a head.
    pub fn value_width(&self) -> usize {
        match self.kind {
            Kind::Softmax { w, .. } => w,
            Kind::Kernel { width, .. } => width,
        }
    }

    /// One layer: `queries` read `keys`. The keys' own features are not part of it.
    fn read(&self, queries: usize, keys: usize) -> Work {
        let (q, n) = (queries as u64, keys as u64);
        let pairs = self.heads() as u64 * q * n;
        match self.kind {
            Kind::Softmax { d, w, .. } => Work {
                head_pairs: pairs,
                multiply_adds: pairs * (d + w) as u64,
                exponentials: pairs,
            },
            Kind::Kernel { width, features, .. } => Work {
                head_pairs: pairs,
                multiply_adds: q * (features * width) as u64,
                exponentials: 0,
            },
        }
    }

    /// One layer: what keys cost once, and queries each.
    fn features(&self, queries: usize, keys: usize) -> Work {
        match self.kind {
            Kind::Softmax { .. } => Work::default(),
            Kind::Kernel { dim, width, features } => {
                let phi = (dim + width + features) * features;
                let keep = 2 * width * features + features * width;
                let (q, n) = (queries as u64, keys as u64);
                Work {
                    head_pairs: 0,
                    multiply_adds: (q + n) * phi as u64 + n * keep as u64,
                    exponentials: (q + 2 * n) * features as u64,
                }
            }
        }
    }

    /// One layer's attention of `targets` over `contexts`.
    pub fn layer(&self, contexts: usize, targets: usize) -> Work {
        self.read(targets, contexts) + self.features(targets, contexts)
    }

    /// A context's encoding: it reads itself in every layer but the last, which nobody reads.
    pub fn condition(&self, contexts: usize) -> Work {
        self.read(contexts, contexts) * (self.layers.saturating_sub(1) as u64)
            + self.features(0, contexts) * self.layers as u64
    }

    /// Encoding the context, then reading it at the targets in every layer.
    pub fn map(&self, contexts: usize, targets: usize) -> Work {
        let asked = self.read(targets, contexts) + self.features(targets, 0);
        self.condition(contexts) + asked * self.layers as u64
    }

    /// A training step on `batch` tasks. Every multiply-add comes back twice in the gradient, and
    /// every exponential once, since weights are not kept. Head pairs count once.
    pub fn step(&self, batch: usize, contexts: usize, targets: usize) -> Work {
        let forward = self.map(contexts, targets) * batch as u64;
        Work {
            head_pairs: forward.head_pairs,
            multiply_adds: 3 * forward.multiply_adds,
            exponentials: 2 * forward.exponentials,
        }
    }
}

impl Work {
    /// Nanoseconds on `threads` threads that do nothing else, at the measured ceiling.
    pub fn least_ns(&self, ceiling: &Ceiling, threads: usize) -> f64 {
        let multiply_adds = self.multiply_adds as f64 / ceiling.fma_per_ns;
        let exponentials = self.exponentials as f64 / ceiling.exp_per_ns;
        (multiply_adds + exponentials) / threads as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIX: Shape = Shape { layers: 6, kind: Kind::Softmax { heads: 4, d: 32, w: 32 } };

    /// The headline run of arXiv:2411.12502 without the part that nobody reads: 4 heads, five times
    /// 100,000² and six times 100,000 × 1,048,576.
    #[test]
    fn a_map_counts_every_pair_that_somebody_reads() {
        let work = SIX.map(100_000, 1_048_576);
        assert_eq!(work.head_pairs, 4 * (5 * 10_000_000_000 + 6 * 104_857_600_000));
        assert_eq!(work.multiply_adds, 64 * work.head_pairs);
        assert_eq!(work.exponentials, work.head_pairs);
        assert_eq!(SIX.condition(7).head_pairs, 4 * 5 * 49);
        assert_eq!(SIX.layer(5, 3).head_pairs, 4 * 15);
    }

    #[test]
    fn a_step_is_three_times_its_forward_pass() {
        let (forward, step) = (SIX.map(256, 200), SIX.step(16, 256, 200));
        assert_eq!(step.head_pairs, 16 * forward.head_pairs);
        assert_eq!(step.multiply_adds, 48 * forward.multiply_adds);
        assert_eq!(step.exponentials, 32 * forward.exponentials);
    }

    /// By hand, for one layer: φ is (2 + 3 + 5) × 5 = 50, ψ 2 × 3 × 5 = 30, its matrix 15, a read 15.
    #[test]
    fn deep_kernel_attention_counts_what_it_computes() {
        let kernel = Kind::Kernel { dim: 2, width: 3, features: 5 };
        let one = Shape { layers: 1, kind: kernel };
        assert_eq!(one.layer(10, 7).multiply_adds, 10 * (50 + 30 + 15) + 7 * (50 + 15));
        assert_eq!(one.layer(10, 7).exponentials, 10 * 10 + 7 * 5);
        assert_eq!(one.layer(10, 7).head_pairs, 70);
        assert_eq!(one.map(10, 7), one.layer(10, 7));
        // The context reads itself once, with features that it has.
        let two = Shape { layers: 2, kind: kernel };
        assert_eq!(two.map(10, 7).multiply_adds, 2 * one.map(10, 7).multiply_adds + 10 * 15);
    }

    #[test]
    fn the_ceiling_adds_what_cannot_overlap() {
        let ceiling = Ceiling {
            simd: String::new(),
            fma_per_ns: 32.0,
            exp_per_ns: 2.0,
            fma_per_ns_alone: 0.0,
            exp_per_ns_alone: 0.0,
            gflops: 0.0,
        };
        let work = SIX.layer(10, 10);
        assert_eq!(work.least_ns(&ceiling, 2) / work.head_pairs as f64, (64.0 / 32.0 + 0.5) / 2.0);
    }
}
