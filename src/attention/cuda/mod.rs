//! Scan attention on an NVIDIA GPU, with the feature `cuda`; without it nothing here applies.
//!
//! The kernel is `scan.cu`, its arithmetic `scan.h`. Both forms of this module offer the same two
//! functions: whether the kernel applies, and what it answers.

use candle_core::{Result, Tensor};

use super::{Bias, Keys, Metric, Term};

#[cfg(not(feature = "cuda"))]
mod disabled;
#[cfg(feature = "cuda")]
mod enabled;

#[cfg(not(feature = "cuda"))]
pub(super) use disabled::{applies, forward};
#[cfg(feature = "cuda")]
pub(super) use enabled::{applies, forward};

/// Where queries and keys are, on the device.
pub(super) struct Places {
    /// `[batch, target, dim]`, as given.
    pub sites: Tensor,
    /// The same as points of [`super::bias::geometry`].
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    pub points: Tensor,
    /// `[batch, context, dim]`, as given.
    pub keys: Tensor,
    /// The same as points of [`super::bias::geometry`].
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    pub key_points: Tensor,
    /// `[batch, context]`, 1 = observed.
    pub mask: Tensor,
}

impl Places {
    /// Sites as given and as points, and the points of the keys.
    pub fn new([sites, points]: [&Tensor; 2], keys: &Keys, key_points: &Tensor) -> Result<Self> {
        Ok(Places {
            sites: sites.clone(),
            points: points.contiguous()?,
            keys: keys.sites.clone(),
            key_points: key_points.contiguous()?,
            mask: keys.mask.contiguous()?,
        })
    }
}

/// What is asked of the kernel, beside tensors.
#[cfg_attr(not(feature = "cuda"), expect(dead_code))]
pub(super) struct Problem<'a> {
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
