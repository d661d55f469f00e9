//! With the feature `cuda`: cards, opened by number. Compiled only; it has never run beside a card.

use candle_core::{
    Device,
    cuda_backend::cudarc::driver::{CudaContext, result, sys},
};

use super::{Memory, too_old, unusable};
use crate::error::Result;

/// The least compute capability that kernels are compiled for, as build.rs reads it.
const LEAST: Option<&str> = option_env!("CUDA_COMPUTE_CAP");

fn least() -> i32 {
    let digits = LEAST.unwrap_or("80").trim_end_matches(|c: char| !c.is_ascii_digit());
    digits.parse().unwrap_or(80)
}

/// Cards that the driver sees.
pub fn count() -> Result<usize> {
    let count = CudaContext::device_count().map_err(|e| unusable(&format!("{e:?}"), 0, None))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Card `number`, with a stream of its own. candle's usual device has one stream for each thread
/// and nothing that orders them, where here a batch is computed on one thread and its gradient
/// used on another.
pub fn open(number: usize) -> Result<Device> {
    let count = count()?;
    let refused = |reason: String| unusable(&reason, number, Some(count));
    if number >= count {
        return Err(refused("CUDA_ERROR_INVALID_DEVICE".into()));
    }
    let context = CudaContext::new(number).map_err(|e| refused(format!("{e:?}")))?;
    let capability = context.compute_capability().map_err(|e| refused(format!("{e:?}")))?;
    let name = context.name().unwrap_or_else(|_| "a card without a name".into());
    if let Some(error) = too_old(&name, capability, least()) {
        return Err(error);
    }
    let device = Device::new_cuda_with_stream(number).map_err(|e| refused(e.to_string()))?;
    keep_memory(&context);
    Ok(device)
}

/// Lets the card's pool keep what is freed: by default all of it goes back to the driver at every
/// synchronisation, and the next step asks for it again. A wish: without it all still works.
fn keep_memory(context: &CudaContext) {
    if !context.has_async_alloc() {
        return;
    }
    let mut most = u64::MAX;
    // SAFETY: the device is that of a living context, the pool is its default one, and the value of
    // this attribute is a u64 that outlives the call.
    unsafe {
        let _ = result::device::get_default_mem_pool(context.cu_device()).and_then(|pool| {
            result::mem_pool::set_attribute(
                pool,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut most).cast(),
            )
        });
    }
}

/// Memory of a card. Of what it reserves, the pool lends again what it does not use.
pub fn memory(device: &Device) -> Option<Memory> {
    let Device::Cuda(device) = device else { return None };
    let stream = device.cuda_stream();
    let context = stream.context();
    let (free, total) = context.mem_get_info().ok()?;
    let read = |attribute| pool(context, attribute).unwrap_or(0);
    use sys::CUmemPool_attribute::{
        CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
        CU_MEMPOOL_ATTR_USED_MEM_HIGH,
    };
    let idle = read(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)
        .saturating_sub(read(CU_MEMPOOL_ATTR_USED_MEM_CURRENT));
    Some(Memory { free: free + idle, total, peak: read(CU_MEMPOOL_ATTR_USED_MEM_HIGH) })
}

/// What the card's pool says of itself, bytes.
fn pool(context: &CudaContext, attribute: sys::CUmemPool_attribute) -> Option<usize> {
    if !context.has_async_alloc() {
        return None;
    }
    let mut bytes = 0u64;
    // SAFETY: the device is that of a living context, the pool is its default one, and the values of
    // the attributes asked for are u64s.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).ok()?;
        result::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast()).ok()?;
    }
    usize::try_from(bytes).ok()
}

/// Multiprocessors of a card, and their clock in GHz.
pub fn speed(device: &Device) -> Option<(f64, f64)> {
    let Device::Cuda(device) = device else { return None };
    let stream = device.cuda_stream();
    let of = |attribute| stream.context().attribute(attribute).ok().map(f64::from);
    let count = of(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let kilohertz = of(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
    Some((count, kilohertz / 1e6))
}

/// Name, memory and compute capability of a card.
pub fn describe(device: &Device) -> Option<String> {
    let Device::Cuda(device) = device else { return None };
    let stream = device.cuda_stream();
    let context = stream.context();
    let (major, minor) = context.compute_capability().ok()?;
    let memory = context.total_mem().ok()? as f64 / (1u64 << 30) as f64;
    Some(format!("{} ({memory:.0} GiB, compute capability {major}.{minor})", context.name().ok()?))
}
