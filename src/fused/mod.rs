//! Fused operations with their own gradients, for f32 on the CPU; every one has a composed twin.
//!
//! Stock candle composes these from many passes, and some of its layers cut the gradient without
//! a word. Each function here picks the fused operation for f32 tensors on the CPU and the
//! composed one elsewhere (f64, other devices); tests hold the two to each other. All `unsafe`
//! of the crate lives in this folder, save launches on a GPU (attention/cuda) and a
//! setting of its memory (device/enabled.rs).

use std::cell::Cell;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor};

pub mod bf16;
pub mod ceiling;
pub mod conv;
pub(crate) mod cuda;
mod depthwise;
mod gelu;
pub(crate) mod lanes;
mod layer_norm;
pub mod layers;
pub mod learn;
mod linear;
pub mod log;
pub mod matrix;
pub mod mlp;
pub mod set_conv;
pub mod simd;
pub(crate) mod softmax;
mod softmax_first;
pub(crate) mod softmax_gradient;
pub mod special;

pub use conv::conv;
pub(crate) use cuda::constrain;
pub use cuda::{Products, launched};
pub use depthwise::depthwise;
pub use gelu::gelu;
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use softmax_first::softmax_first;

/// Whether the fused operations apply: f32 on the CPU, and nobody asked for the [`plain`] ones.
pub fn applies(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32 && !is_plain()
}

thread_local! {
    static PLAIN: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on the composed twins, if `wanted`: stock candle, for comparison and for tests.
///
/// The choice belongs to this thread and ends with `work`. It is made when an operation runs
/// forward, and its gradient follows, on whatever thread that runs. Work that crosses to other
/// threads hands the choice on with [`is_plain`].
///
/// ```
/// use isopleth::fused;
/// let inside = fused::plain(true, || (fused::is_plain(), fused::plain(false, fused::is_plain)));
/// assert_eq!((inside, fused::is_plain()), ((true, false), false));
/// ```
pub fn plain<T>(wanted: bool, work: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            PLAIN.set(self.0);
        }
    }
    let _restore = Restore(PLAIN.replace(wanted));
    work()
}

/// Whether this thread is inside [`plain`].
pub fn is_plain() -> bool {
    PLAIN.get()
}

/// Whether `x` is only asked: f32 on the CPU, and nothing is recorded for gradients.
pub fn asked(x: &Tensor) -> bool {
    applies(x) && !x.track_op()
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
