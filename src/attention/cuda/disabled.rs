//! Without the feature `cuda`: no kernel.

use candle_core::{CudaStorage, Error, Layout, Result, Shape, Tensor};

use super::{Bias, Chosen, Keys, Numbers, Places, Problem};

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

/// An error that says so.
pub(super) fn near(_: &Problem, _: &Places, _: [&Tensor; 3], _: &Chosen) -> Result<Tensor> {
    Err(Error::NotCompiledWithCudaSupport)
}

/// Tensor cores.
pub mod tensor {
    use super::*;

    /// An error that says so.
    pub fn forward(
        _: &Problem,
        _: &Places,
        _: [(&CudaStorage, &Layout); 3],
        _: Numbers,
    ) -> Result<(CudaStorage, Shape)> {
        Err(Error::NotCompiledWithCudaSupport)
    }
}

/// Deep kernel attention.
pub mod dka {
    use super::*;

    /// There is none.
    #[derive(Debug)]
    pub enum DeepKernel {}

    impl DeepKernel {
        /// Nothing.
        pub fn new(_: [[&Tensor; 2]; 2], _: &Tensor) -> Result<Option<Self>> {
            Ok(None)
        }

        /// Never.
        pub fn read(&self, _: &Tensor, _: &Tensor) -> Result<Tensor> {
            match *self {}
        }
    }
}
