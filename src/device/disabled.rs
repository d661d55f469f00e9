//! Without the feature `cuda`: no card can be opened.

use candle_core::Device;

use super::Memory;
use crate::error::{Error, Result};

fn none<T>() -> Result<T> {
    Err(Error::input("this build has no CUDA")
        .try_this("rebuild with --features cuda (scripts/build-cuda.sh), or use --device cpu"))
}

/// An error that says so.
pub fn count() -> Result<usize> {
    none()
}

/// An error that says so.
pub fn open(_: usize) -> Result<Device> {
    none()
}

/// Nothing.
pub fn describe(_: &Device) -> Option<String> {
    None
}

/// Nothing.
pub fn memory(_: &Device) -> Option<Memory> {
    None
}

/// Nothing.
pub fn speed(_: &Device) -> Option<(f64, f64)> {
    None
}
