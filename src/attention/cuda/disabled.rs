//! Without the feature `cuda`: no kernel.

use candle_core::{CudaStorage, Error, Layout, Result, Shape, Tensor};

use super::{Bias, Keys, Places, Problem};

/// Never.
pub fn applies(_: &Tensor, _: &Tensor, _: &Keys, _: Option<&Bias>) -> bool {
    false
}

/// An error that says so.
pub fn forward(
    _: &Problem,
    _: &Places,
    _: [(&CudaStorage, &Layout); 3],
) -> Result<(CudaStorage, Shape, Tensor)> {
    Err(Error::NotCompiledWithCudaSupport)
}

/// An error that says so.
pub fn gradients(_: &Problem, _: &Places, _: [&Tensor; 6]) -> Result<[Tensor; 3]> {
    Err(Error::NotCompiledWithCudaSupport)
}
