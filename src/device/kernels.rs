//! The project's own CUDA kernels, as the driver wants them.
//!
//! `build.rs` compiles each `.cu` file to a fat binary: machine code for the cards it names, and PTX for
//! those to come. The driver picks what fits the card when the binary is loaded, which happens once for
//! each card and file.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CudaDevice, Result,
    cuda_backend::{
        WrapErr,
        cudarc::{
            driver::{CudaFunction, CudaModule},
            nvrtc::Ptx,
        },
    },
};

/// The kernels of one file.
pub(crate) struct Kernels {
    /// The file's name, without `.cu`.
    pub name: &'static str,
    /// The fat binary.
    pub binary: &'static [u8],
}

/// The kernels of `NAME.cu`, compiled by `build.rs`.
macro_rules! kernels {
    ($name:literal) => {
        $crate::device::kernels::Kernels {
            name: $name,
            binary: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")),
        }
    };
}
pub(crate) use kernels;

/// A module with the card and the file it is of.
type Loaded = (usize, &'static str, Arc<CudaModule>);

/// What was loaded so far. It keeps a card's context alive, as long as the program runs.
static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

impl Kernels {
    /// The kernel called `kernel`, ready for `device`.
    ///
    /// # Errors
    /// If the driver takes neither the machine code nor the PTX, or there is no such kernel.
    pub fn get(&self, device: &CudaDevice, kernel: &str) -> Result<CudaFunction> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let card = context.ordinal();
        // A panic elsewhere cannot leave half a module behind.
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match loaded.iter().find(|l| l.0 == card && l.1 == self.name) {
            Some((.., module)) => module.clone(),
            None => {
                let module = context.load_module(Ptx::from_binary(self.binary.to_vec())).w()?;
                loaded.push((card, self.name, module.clone()));
                module
            }
        };
        drop(loaded);
        module.load_function(kernel).w()
    }
}
