//! The target side of deep kernel attention in one kernel, `dka.cu`.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Storage, Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaSlice, DeviceRepr, LaunchConfig, PushKernelArg, sys},
    },
};

use super::enabled::{Borrowed, view};
use crate::{
    device::kernels::{Kernels, kernels},
    fused,
};

static KERNELS: Kernels = kernels!("dka");
/// As in `dka.h`: threads and sites of a block, hidden features of an image, the most inputs and
/// outputs, bytes of an image, images on their way.
const THREADS: usize = 128;
const SITES: usize = 64;
const TOGETHER: usize = 32;
const INPUTS: usize = 80;
const OUTPUTS: usize = 64;
const IMAGE: usize = 40_576;
const STAGES: usize = 2;
/// Blocks along the third side of a grid.
const SIDE: usize = 65_535;

/// `Sizes` of `dka.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: i32,
    sites: i32,
    dim: i32,
    width: i32,
    hidden: i32,
    outputs: i32,
}

// SAFETY: plain numbers, laid out as the kernels have them.
unsafe impl DeviceRepr for Sizes {}

/// `gelu(x W₁ + b₁) M + b₂` for any number of sites, M of their row of the batch.
#[derive(Debug)]
pub struct DeepKernel {
    inputs: usize,
    hidden: usize,
    outputs: usize,
    batch: usize,
    /// Packed for the kernel.
    images: CudaSlice<u8>,
    /// `[batch, outputs]`
    shift: Tensor,
}

impl DeepKernel {
    /// The layers `[weight, bias]` of φ, the second made one with the `summary` `[batch, features,
    /// width]`; nothing where there is no kernel for them, or gradients may be asked for.
    pub fn new([first, second]: [[&Tensor; 2]; 2], summary: &Tensor) -> Result<Option<Self>> {
        let all = [first[0], first[1], second[0], second[1], summary];
        let mut read = all.iter();
        let kernel = |x: &&Tensor| {
            x.device().is_cuda() && x.dtype() == DType::F32 && !x.track_op() && !fused::is_plain()
        };
        let (inputs, hidden) = first[0].dims2()?;
        let (batch, _, outputs) = summary.dims3()?;
        if !read.all(kernel) || inputs > INPUTS || outputs > OUTPUTS || batch > SIDE {
            return Ok(None);
        }
        let matrix = second[0].unsqueeze(0)?.broadcast_matmul(summary)?.contiguous()?;
        let shift = second[1].unsqueeze(0)?.unsqueeze(0)?.broadcast_matmul(summary)?;
        let shift = shift.squeeze(1)?.contiguous()?;
        let (weight, bias) = (first[0].contiguous()?, first[1].contiguous()?);
        let [weight, bias, matrix] = [&weight, &bias, &matrix].map(Borrowed::of);
        let device = match &**weight.storage {
            Storage::Cuda(storage) => storage.device().clone(),
            _ => bail!("deep kernel attention needs all its tensors on one device"),
        };
        let stream = device.cuda_stream();
        let tiles = hidden.div_ceil(TOGETHER);
        let sizes = sizes([batch, 0, 0, inputs, hidden, outputs])?;
        // SAFETY: the kernel writes all of it.
        let mut images = unsafe { device.alloc::<u8>(batch * tiles * IMAGE)? };
        let pack = KERNELS.get(&device, "dka_pack")?;
        let (weight, bias) = (weight.view(inputs * hidden)?, bias.view(hidden)?);
        let matrix = matrix.view(batch * hidden * outputs)?;
        let mut launch = stream.launch_builder(&pack);
        launch.arg(&sizes).arg(&weight).arg(&bias).arg(&matrix).arg(&mut images);
        // SAFETY: the arguments are those of `dka_pack` in `dka.cu`, in their order; every tensor has
        // the length that the kernel works out from the sizes, and it writes to the last only.
        unsafe { launch.launch(grid(tiles, batch, 0)) }.w()?;
        Ok(Some(DeepKernel { inputs, hidden, outputs, batch, images, shift }))
    }

    /// What is read for `tokens` `[batch, site, width]` at `sites` `[batch, site, dim]`.
    pub fn read(&self, tokens: &Tensor, sites: &Tensor) -> Result<Tensor> {
        sites.contiguous()?.apply_op2_no_bwd(&tokens.contiguous()?, self)
    }
}

fn sizes(of: [usize; 6]) -> Result<Sizes> {
    let small = |n: usize| i32::try_from(n).map_err(candle_core::Error::wrap);
    let [batch, sites, dim, width, hidden, outputs] = of;
    Ok(Sizes {
        batch: small(batch)?,
        sites: small(sites)?,
        dim: small(dim)?,
        width: small(width)?,
        hidden: small(hidden)?,
        outputs: small(outputs)?,
    })
}

fn grid(x: usize, batch: usize, shared: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, 1, batch as u32),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    }
}

impl CustomOp2 for DeepKernel {
    fn name(&self) -> &'static str {
        "deep-kernel-attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("deep kernel attention was prepared for a GPU")
    }

    fn cuda_fwd(
        &self,
        sites: &CudaStorage,
        ls: &Layout,
        tokens: &CudaStorage,
        lt: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (batch, count, dim) = ls.shape().dims3()?;
        let width = lt.shape().dims3()?.2;
        if batch != self.batch || dim + width != self.inputs {
            bail!("{batch} rows of {dim} + {width} where {} of {}", self.batch, self.inputs);
        }
        let device = tokens.device().clone();
        let stream = device.cuda_stream();
        let sizes = sizes([batch, count, dim, width, self.hidden, self.outputs])?;
        let (sites, tokens) =
            (view((sites, ls), batch * count * dim)?, view((tokens, lt), batch * count * width)?);
        let shift = Borrowed::of(&self.shift);
        let shift = shift.view(batch * self.outputs)?;
        if count == 0 {
            let none = device.alloc_zeros::<f32>(0)?;
            let shape = Shape::from((batch, 0, self.outputs));
            return Ok((CudaStorage::wrap_cuda_slice(none, device), shape));
        }
        // SAFETY: the kernel writes every number.
        let mut out = unsafe { device.alloc::<f32>(batch * count * self.outputs)? };
        let read = KERNELS.get(&device, "dka_read")?;
        let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        read.set_attribute(most, (STAGES * IMAGE) as i32).w()?;
        let mut launch = stream.launch_builder(&read);
        launch.arg(&sizes).arg(&self.images).arg(&sites).arg(&tokens).arg(&shift).arg(&mut out);
        // SAFETY: the arguments are those of `dka_read` in `dka.cu`, in their order; every tensor has
        // the length that the kernel works out from the sizes, and it writes to the last only.
        unsafe { launch.launch(grid(count.div_ceil(SITES), batch, STAGES * IMAGE)) }.w()?;
        let shape = Shape::from((batch, count, self.outputs));
        Ok((CudaStorage::wrap_cuda_slice(out, device), shape))
    }
}
