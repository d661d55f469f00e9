//! Scan attention on an NVIDIA GPU, with the feature `cuda`; without it nothing here applies.
//!
//! The kernel is `scan.cu`, its arithmetic `scan.h`; `tensor.cu` does the same on tensor cores, where
//! nothing is recorded for gradients. `dka.cu` is the target side of deep kernel attention. Both forms of
//! this module offer the same: whether the kernel applies, and what it answers.

use candle_core::{Result, Tensor};

use super::{Bias, Keys, Metric, Precision, Term};

#[cfg(not(feature = "cuda"))]
mod disabled;
#[cfg(feature = "cuda")]
mod dka;
#[cfg(feature = "cuda")]
mod enabled;
#[cfg(feature = "cuda")]
pub(super) mod tensor;

#[cfg(not(feature = "cuda"))]
pub(crate) use disabled::dka::DeepKernel;
#[cfg(not(feature = "cuda"))]
pub(super) use disabled::{applies, forward, tensor};
#[cfg(feature = "cuda")]
pub(crate) use dka::DeepKernel;
#[cfg(feature = "cuda")]
pub(super) use enabled::{applies, forward};

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
