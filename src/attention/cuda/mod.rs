//! Scan attention on an NVIDIA GPU, with the feature `cuda`; without it nothing here applies.
//!
//! The kernels are those of `scan.cu`, with the gradients of `gradient.h`; `tensor.cu` does the same on
//! tensor cores, where nothing is recorded for gradients. `dka.cu` is the target side of deep kernel
//! attention. Both forms of this module offer the same: whether kernels apply, and what they answer. The
//! tests run them on the processor (tests/contract/cuda.rs); on hardware they have never run.

use candle_core::{Result, Tensor};

use super::{Bias, Keys, Metric, Precision, Term};

#[cfg(not(feature = "cuda"))]
mod disabled;
#[cfg(feature = "cuda")]
mod dka;
#[cfg(feature = "cuda")]
mod enabled;
mod near;
#[cfg(feature = "cuda")]
pub(super) mod tensor;

#[cfg(not(feature = "cuda"))]
pub(crate) use disabled::dka::DeepKernel;
#[cfg(not(feature = "cuda"))]
use disabled::near;
#[cfg(not(feature = "cuda"))]
pub(super) use disabled::{applies, forward, gradients, tensor};
#[cfg(feature = "cuda")]
pub(crate) use dka::DeepKernel;
#[cfg(feature = "cuda")]
use enabled::near;
#[cfg(feature = "cuda")]
pub(super) use enabled::{applies, forward, gradients};
pub(super) use near::Context;

/// What tensor cores multiply; sums and all the rest are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    Bf16,
    Tf32,
    /// f32, each as the sum of two tf32.
    Exact,
}

impl Numbers {
    /// What multiplies in `precision`, if tensor cores are to: in f32 that is so unless `recorded` for
    /// gradients, which want the very weights of `scan.cu`, or `ISOPLETH_EXACT` is `cores`.
    pub fn of(precision: Precision, recorded: bool) -> Option<Self> {
        let cores = || std::env::var_os("ISOPLETH_EXACT").is_some_and(|v| v == "cores");
        match precision {
            Precision::Bf16 => Some(Numbers::Bf16),
            Precision::Tf32 => Some(Numbers::Tf32),
            Precision::F32 if recorded || cores() => None,
            Precision::F32 => Some(Numbers::Exact),
        }
    }

    /// As kernels are called.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    pub fn name(self) -> &'static str {
        match self {
            Numbers::Bf16 => "bf16",
            Numbers::Tf32 => "tf32",
            Numbers::Exact => "exact",
        }
    }
}

/// Where queries and keys are, on the device.
#[cfg_attr(not(feature = "cuda"), expect(dead_code))]
pub(super) struct Places {
    /// `[batch, target, dim]`: queries as points of [`super::bias::geometry`].
    pub points: Tensor,
    /// `[batch, context, dim]`: keys likewise.
    pub key_points: Tensor,
    /// `[batch, context]`, 1 = observed.
    pub mask: Tensor,
}

impl Places {
    /// Points of queries and keys, and which keys are observed.
    pub fn new(points: &Tensor, key_points: &Tensor, mask: &Tensor) -> Result<Self> {
        Ok(Places {
            points: points.contiguous()?,
            key_points: key_points.contiguous()?,
            mask: mask.contiguous()?,
        })
    }
}

/// What blocks of queries read, where that is not all.
#[cfg_attr(not(feature = "cuda"), expect(dead_code))]
struct Chosen<'a> {
    /// `[batch · block + 1]`: where the list of each block begins.
    from: &'a Tensor,
    /// `[entry]`: tiles of keys, and their squared straight line from the block, nearest first.
    tile: &'a Tensor,
    gap2: &'a Tensor,
    /// `[batch, target]`: numbers of the queries, block by block.
    order: &'a Tensor,
    /// `[head]`: squared straight line from which on nothing is read.
    reach2: &'a Tensor,
    /// `[head, cell]`: the largest bias at or beyond a squared straight line.
    envelope: &'a Tensor,
    /// `[batch, tile, head]` and `[batch, head]`: longest keys.
    norm: &'a Tensor,
    longest: &'a Tensor,
    /// One number: queries times tiles that were read, added to.
    tally: &'a Tensor,
    /// Share of a query's weight below which a key is left out.
    share: f32,
}

/// What is asked of the kernels, beside tensors.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub batch: usize,
    pub targets: usize,
    pub context: usize,
    pub heads: usize,
    /// Widths of a key and of a value.
    pub d: usize,
    pub w: usize,
    /// Coordinates of a point.
    pub dim: usize,
    pub terms: &'a [Term],
    pub metric: Metric,
}

/// Widths of keys and values that kernels are compiled for.
const WIDTHS: [usize; 4] = [8, 16, 32, 64];
/// Coordinates and terms they can take, as in `bias.h`.
const DIM: usize = 4;
const TERMS: usize = 16;
/// Blocks along the second and third side of a grid.
const SIDE: usize = 65_535;
/// Threads of a warp, and of a block at most, as in `scan.cu`.
const WARP: usize = 32;
const THREADS: usize = 128;
/// Threads of a block that reads part of the context.
const NEAR: usize = 64;
/// Numbers of a key that one thread holds, and keys that are staged together: `team.h`, `scan.h`.
const PART: usize = 8;
const KEYS: usize = 32;
/// Rows of a team in the kernels of the gradient: `gradient.h`.
const HELD: usize = 4;
/// Warps that a processor of the card holds at a time: registers allow no more.
const RESIDENT: usize = 8;

/// How a kernel is launched. Nothing of it shows in an answer, save in the last digit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Launch {
    threads: usize,
    /// Blocks of queries, or of keys.
    blocks: usize,
    /// Parts into which keys are split.
    splits: usize,
}

#[cfg_attr(not(any(test, feature = "cuda")), expect(dead_code))]
impl Problem<'_> {
    /// Whether there is a kernel for these sizes.
    fn fits(&self) -> bool {
        self.width().is_some()
            && self.terms.len() <= TERMS
            && self.dim <= DIM
            && self.batch <= SIDE
            && self.heads <= SIDE
    }

    /// The padded width of keys and values.
    fn width(&self) -> Option<usize> {
        WIDTHS.into_iter().find(|width| *width >= self.d.max(self.w))
    }

    /// The kind of bias, as kernels are named.
    fn kind(&self) -> &'static str {
        let mut near = self.terms.iter().filter(|t| **t != Term::Sink);
        let on_a_plane = self.metric == Metric::Euclidean && self.dim <= 2;
        match (near.next(), near.next()) {
            (None, _) => "none",
            (Some(Term::Rbf), None) if on_a_plane => "bump",
            _ => "any",
        }
    }

    /// Families of the terms in 4 bits each, the first lowest: numbers of `Term::ALL`.
    fn families(&self) -> u64 {
        self.terms.iter().enumerate().map(|(j, term)| (*term as u64) << (4 * j)).sum()
    }

    /// The forward pass on a card of so many processors: small blocks where queries are few, and keys
    /// split where there would still be too few blocks to keep the card busy.
    fn forward(&self, processors: usize) -> Launch {
        let width = self.width().unwrap_or(PART);
        let queries = if width == 8 { 4 } else { 8 };
        let each = queries * WARP / (width / PART); // queries of a warp
        let warps = match self.targets.div_ceil(each) {
            0..=1 => 1,
            2 => 2,
            _ => THREADS / WARP,
        };
        let blocks = self.targets.div_ceil(each * warps);
        let all = (blocks * self.heads * self.batch * warps).max(1);
        // Four tiles of keys at least, so that what a part costs is little beside what it reads.
        let most = self.context.div_ceil(4 * KEYS).clamp(1, 32);
        Launch {
            threads: warps * WARP,
            blocks,
            splits: (processors * RESIDENT / all).clamp(1, most),
        }
    }

    /// Whether there is a kernel that reads part of the context.
    fn has_near(&self) -> bool {
        self.fits() && self.kind() != "none"
    }

    /// Queries of a block that reads part of the context: few, so that they are near each other.
    fn queries_of_near(&self) -> usize {
        let width = self.width().unwrap_or(PART);
        (if width == 8 { 4 } else { 8 }) * NEAR / (width / PART)
    }

    /// A kernel of the gradient, over so many rows: queries, or keys.
    fn backward(&self, rows: usize) -> Launch {
        let width = self.width().unwrap_or(PART);
        // Sums of many terms are held for every thread: two warps of them fit beside narrow rows only.
        let warps = if width == 64 && self.terms.len() > 4 { 1 } else { 2 };
        let blocks = rows.div_ceil(HELD * warps * WARP / (width / PART));
        Launch { threads: warps * WARP, blocks, splits: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USUAL: Problem = Problem {
        batch: 32,
        targets: 256,
        context: 256,
        heads: 4,
        d: 16,
        w: 16,
        dim: 2,
        terms: &[Term::Rbf, Term::Sink],
        metric: Metric::Euclidean,
    };

    #[test]
    fn kinds_are_those_that_kernels_are_compiled_for() {
        let kind = |terms: &[Term], metric, dim| Problem { terms, metric, dim, ..USUAL }.kind();
        let plane = Metric::Euclidean;
        assert_eq!(kind(&[], plane, 2), "none");
        assert_eq!(kind(&[Term::Sink], plane, 2), "none");
        assert_eq!(kind(&[Term::Sink, Term::Rbf], plane, 2), "bump");
        assert_eq!(kind(&[Term::Rbf, Term::Rbf], plane, 2), "any");
        assert_eq!(kind(&[Term::Rbf], plane, 3), "any");
        assert_eq!(kind(&[Term::Rbf], Metric::GreatCircle, 3), "any");
        assert_eq!(kind(&[Term::Scalar], plane, 2), "any");
        assert_eq!(Problem { terms: &[Term::Rbf, Term::Sink], ..USUAL }.families(), 0x81);
    }

    /// Every query and every key has its block, and a block is no larger than the card allows.
    #[test]
    fn launches_cover_all_and_fit() {
        for width in WIDTHS {
            for targets in [1, 31, 32, 33, 256, 5000, 1 << 20] {
                for batch in [1, 32] {
                    let problem = Problem { targets, batch, d: width, w: width, ..USUAL };
                    let launch = problem.forward(132);
                    let each = if width == 8 { 4 } else { 8 } * launch.threads * PART / width;
                    assert!(
                        launch.blocks * each >= targets && (launch.blocks - 1) * each < targets
                    );
                    assert!(launch.threads <= THREADS && launch.threads.is_multiple_of(WARP));
                    // No part of the keys is empty.
                    assert!((1..=problem.context.div_ceil(KEYS)).contains(&launch.splits));
                    let back = problem.backward(targets);
                    let each = HELD * back.threads * PART / width;
                    assert!(back.blocks * each >= targets && (back.blocks - 1) * each < targets);
                }
            }
        }
        // A million targets need no help; one does.
        assert_eq!(Problem { targets: 1 << 20, ..USUAL }.forward(132).splits, 1);
        let few = Problem { batch: 1, targets: 1, context: 100_000, ..USUAL }.forward(132);
        assert_eq!((few.threads, few.splits), (32, 32));
    }

    /// The sums of the bias's gradient beside staged rows, in the 48 KiB that need no asking.
    #[test]
    fn the_gradient_fits_shared_memory() {
        for width in WIDTHS {
            for count in 0..=TERMS {
                let terms = vec![Term::Tisa; count];
                let problem = Problem { d: width, w: width, terms: &terms, ..USUAL };
                let staged = 2 * 4 * KEYS * (2 * width + 4 + 3) + 16 * TERMS;
                let sums = 8 * 3 * count * problem.backward(100).threads;
                assert!(staged + sums <= 48 << 10, "{width} wide, {count} terms");
            }
        }
    }
}
