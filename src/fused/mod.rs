//! Fused operations with their own gradients, for f32 on the CPU; every one has a composed twin.
//!
//! Stock candle composes these from many passes, and some of its layers cut the gradient without
//! a word. Each function here picks the fused operation for f32 tensors on the CPU and the
//! composed one elsewhere (f64, other devices); tests hold the two to each other. All `unsafe`
//! of the crate lives in this folder.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor};

mod gelu;
pub mod lanes;
mod layer_norm;
mod linear;
pub mod log;
pub mod matrix;
pub mod simd;
pub mod softmax;
pub mod softmax_gradient;

pub use gelu::gelu;
pub use layer_norm::layer_norm;
pub use linear::linear;

/// Whether the fused operations apply: f32 on the CPU.
pub fn applies(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// The values of a contiguous f32 tensor inside an operation.
pub(crate) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => candle_core::bail!("a fused operation needs contiguous input"),
    }
}

/// A borrowed view of a contiguous f32 tensor on the host, for backward passes.
pub(crate) struct Host<'a> {
    storage: Box<dyn std::ops::Deref<Target = Storage> + 'a>,
    start: usize,
    end: usize,
}

impl<'a> Host<'a> {
    /// Borrows `x`; a bug in this crate if it is not contiguous f32 on the CPU.
    pub fn of(x: &'a Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a fused gradient needs contiguous input")
        };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Host { storage: Box::new(storage), start, end }),
            _ => candle_core::bail!("a fused gradient needs f32 on the CPU"),
        }
    }
}

impl std::ops::Deref for Host<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.end],
            _ => unreachable!("checked when borrowed"),
        }
    }
}
