//! Where tensors live, and the machine in words.

use candle_core::Device;

use crate::error::{Error, Result};

/// The device called `name`: "cpu" or "cuda".
///
/// # Errors
/// [`Error::Input`] for another name, a build without CUDA, or no usable card.
pub fn open(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "cuda" if cfg!(feature = "cuda") => Device::new_cuda(0).map_err(|e| {
            // What follows the first line is where in candle it happened.
            let reason = e.to_string();
            Error::input("no CUDA device can be used")
                .fact("reason", reason.lines().next().unwrap_or_default())
                .try_this("check the driver with nvidia-smi, or use --device cpu")
        }),
        "cuda" => Err(Error::input("this build has no CUDA")
            .try_this("rebuild with --features cuda, or use --device cpu")),
        other => Err(Error::input(format!("there is no device `{other}`"))
            .try_this("use --device cpu or --device cuda")),
    }
}

/// The processor, in the words of the system.
pub fn processor() -> String {
    let model = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split(':').nth(1)?.trim().to_string())
    });
    model.unwrap_or_else(|| std::env::consts::ARCH.into())
}

/// Processor and thread count.
pub fn describe() -> String {
    format!("{}, {} threads", processor(), rayon::current_num_threads())
}
