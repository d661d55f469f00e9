//! Scan attention on tensor cores: packs the context for them and launches the kernels of `tensor.cu`.

use candle_core::{
    CudaStorage, Layout, Result, Shape,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg, sys},
    },
};

use super::{
    Metric, Numbers, Places, Problem,
    enabled::{Borrowed, view},
};
use crate::device::kernels::{Kernels, kernels};

static KERNELS: Kernels = kernels!("tensor");
/// Threads of a block and warps among them, as in `tensor.h`.
const THREADS: usize = 128;
const WARPS: usize = 4;
/// Bytes of the bias in shared memory.
const BIAS: usize = 256;
/// Blocks along the second and third side of a grid.
const SIDE: usize = 65_535;
/// Images that a block reads at least where keys are split into parts.
const FEWEST: usize = 8;

/// `Problem` of `bias.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: i32,
    targets: i32,
    context: i32,
    heads: i32,
    d: i32,
    w: i32,
    dim: i32,
    terms: i32,
    globe: i32,
    splits: i32,
    wide_q: i32,
    wide_kv: i32,
    families: u64,
}

// SAFETY: plain numbers, laid out as the kernels have them.
unsafe impl DeviceRepr for Sizes {}

/// A line of `plan.inc`.
struct Plan {
    width: usize,
    /// Targets of a block.
    targets: usize,
    /// Keys of an image.
    keys: usize,
    /// Bytes of an image.
    image: usize,
    /// Bytes of shared memory.
    room: usize,
}

/// The narrowest kernel that takes keys and values `widest` wide.
fn plan(numbers: Numbers, widest: usize) -> Option<Plan> {
    let name = match numbers {
        Numbers::Bf16 => "Bf16",
        Numbers::Tf32 => "Tf32",
        Numbers::Exact => "Exact",
    };
    let lines = include_str!("plan.inc").lines();
    lines.filter_map(|line| line.strip_prefix("PLAN(")?.strip_suffix(')')).find_map(|line| {
        let mut words = line.split(", ");
        if words.next() != Some(name) {
            return None;
        }
        let mut next = || words.next()?.parse::<usize>().ok();
        let [width, tiles, keys, stages, image] = [next()?, next()?, next()?, next()?, next()?];
        let (targets, room) = (16 * tiles * WARPS, stages * image + BIAS);
        (width >= widest).then_some(Plan { width, targets, keys, image, room })
    })
}

/// Attention of the queries q to keys and values kv, as `forward` for f32 says, in `numbers`: the
/// answer, and tops and inverse weights `[batch, target, 2 · head]`.
pub fn forward(
    problem: &Problem,
    places: &Places,
    [q, kv, params]: [(&CudaStorage, &Layout); 3],
    numbers: Numbers,
) -> Result<(CudaStorage, Shape)> {
    let Problem { batch, targets, context, heads, d, w, dim, terms, metric } = *problem;
    let Some(plan) = plan(numbers, d.max(w)) else {
        bail!("no kernel for keys {d} and values {w} wide")
    };
    if batch > SIDE || heads > SIDE {
        bail!("no kernel for {batch} rows of {heads} heads");
    }
    let device = q.0.device().clone();
    let stream = device.cuda_stream();
    let (points, key_points) = (Borrowed::of(&places.points), Borrowed::of(&places.key_points));
    let mask = Borrowed::of(&places.mask);
    let (q, kv) =
        (view(q, batch * targets * heads * d)?, view(kv, batch * context * heads * (d + w))?);
    let params = view(params, heads * terms.len().max(1) * 3)?;
    let (points, key_points) =
        (points.view(batch * targets * dim)?, key_points.view(batch * context * dim)?);
    let mask = mask.view(batch * context)?;

    let (images, blocks) = (context.div_ceil(plan.keys), targets.div_ceil(plan.targets));
    let processors = stream
        .context()
        .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        .w()? as usize;
    let splits = splits(blocks * heads * batch, images, processors);
    let small = |n: usize| i32::try_from(n).map_err(candle_core::Error::wrap);
    let sizes = Sizes {
        batch: small(batch)?,
        targets: small(targets)?,
        context: small(context)?,
        heads: small(heads)?,
        d: small(d)?,
        w: small(w)?,
        dim: small(dim)?,
        terms: small(terms.len())?,
        globe: i32::from(metric == Metric::GreatCircle),
        splits: small(splits)?,
        wide_q: 0,
        wide_kv: 0,
        families: terms.iter().enumerate().map(|(j, term)| (*term as u64) << (4 * j)).sum(),
    };
    let kernel = |what: &str| {
        let name = format!("{what}_{}_{}", numbers.name(), plan.width);
        KERNELS.get(&device, &name)
    };
    let grid = |x: usize, shared: usize| {
        Ok::<_, candle_core::Error>(LaunchConfig {
            grid_dim: (small(x)? as u32, heads as u32, batch as u32),
            block_dim: (THREADS as u32, 1, 1),
            shared_mem_bytes: shared as u32,
        })
    };
    let answers = batch * targets * heads;
    // SAFETY: all of it is written before it is read: images by the first kernel, the others by those
    // that answer.
    let (mut packed, mut some, mut of) = unsafe {
        (
            device.alloc::<u8>(images * heads * batch * plan.image)?,
            device.alloc::<f32>(splits * answers * w)?,
            device.alloc::<f32>(splits * answers * 2)?,
        )
    };

    let pack = kernel("pack")?;
    let mut launch = stream.launch_builder(&pack);
    launch.arg(&sizes).arg(&kv).arg(&key_points).arg(&mask).arg(&mut packed);
    // SAFETY: the arguments are those of `pack_NUMBERS_WIDTH` in `tensor.cu`, in their order; every
    // tensor has the length that the kernel works out from the sizes, and it writes to the last only.
    unsafe { launch.launch(grid(images, 0)?) }.w()?;

    let attend = kernel("tensor")?;
    let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    attend.set_attribute(most, small(plan.room)?).w()?;
    let mut launch = stream.launch_builder(&attend);
    launch.arg(&sizes).arg(&packed).arg(&q).arg(&params).arg(&points).arg(&mut some).arg(&mut of);
    // SAFETY: as above, of `tensor_NUMBERS_WIDTH`, which writes to the last two only.
    unsafe { launch.launch(grid(blocks * splits, plan.room)?) }.w()?;

    let out = if splits == 1 {
        some
    } else {
        let (mut out, mut marks) =
            // SAFETY: the kernel writes every number.
            unsafe { (device.alloc::<f32>(answers * w)?, device.alloc::<f32>(answers * 2)?) };
        let combine = KERNELS.get(&device, "tensor_combine")?;
        let mut launch = stream.launch_builder(&combine);
        launch.arg(&sizes).arg(&some).arg(&of).arg(&mut out).arg(&mut marks);
        let all = LaunchConfig {
            grid_dim: (small((answers * w).div_ceil(256))? as u32, 1, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: as above, of `tensor_combine`.
        unsafe { launch.launch(all) }.w()?;
        out
    };
    let shape = Shape::from((batch, targets, heads * w));
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), shape))
}

/// Into how many parts to split the keys, so that few targets still give every processor two blocks.
fn splits(blocks: usize, images: usize, processors: usize) -> usize {
    (2 * processors / blocks.max(1)).min(images / FEWEST).clamp(1, 64)
}
