//! Scan attention on tensor cores: packs the context for them and launches the kernels of `tensor.cu`.

use candle_core::{
    CudaStorage, Layout, Result, Shape,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{PushKernelArg, sys::CUfunction_attribute_enum},
    },
};

use super::{
    Numbers, Places, Problem,
    enabled::{Given, Sizes, combined, grid, processors, room, view},
};
use crate::device::kernels::{Kernels, kernels};

static KERNELS: Kernels = kernels!("tensor");
/// Threads of a block and warps among them, as in `tensor.h`.
const THREADS: usize = 128;
const WARPS: usize = 4;
/// Bytes of the bias in shared memory.
const BIAS: usize = 256;
/// Images that a block reads at least where keys are split into parts.
const FEWEST: usize = 8;

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

/// Attention of the queries q to keys and values kv, as [`super::forward`] says, in `numbers`. Nothing
/// is kept for a gradient.
pub fn forward(
    problem: &Problem,
    places: &Places,
    [q, kv, params]: [(&CudaStorage, &Layout); 3],
    numbers: Numbers,
) -> Result<(CudaStorage, Shape)> {
    let Problem { batch, targets, context, heads, d, w, terms, .. } = *problem;
    let Some(plan) = plan(numbers, d.max(w)) else {
        bail!("no kernel for keys {d} and values {w} wide")
    };
    let device = q.0.device().clone();
    let (images, blocks) = (context.div_ceil(plan.keys), targets.div_ceil(plan.targets));
    let splits = splits(blocks * heads * batch, images, processors(&device)?);
    let sizes = Sizes::of(problem, splits, [false; 2])?;
    let (q, kv) =
        (view(q, batch * targets * heads * d)?, view(kv, batch * context * heads * (d + w))?);
    // Without a bias there is one row of zeros for every head, which nothing reads.
    let params = view(params, heads * terms.len().max(1) * 3)?;
    let given = Given::of(places);
    let [points, key_points, mask] = given.views(problem)?;
    let mut packed = room::<u8>(&device, images * heads * batch * plan.image)?;
    let (answers, marked) = (batch * targets * heads * w, batch * targets * heads * 2);
    let mut out = room::<f32>(&device, splits * answers)?;
    let mut marks = room::<f32>(&device, splits * marked)?;
    let stream = device.cuda_stream();
    let kernel =
        |what: &str| KERNELS.get(&device, &format!("{what}_{}_{}", numbers.name(), plan.width));

    let pack = kernel("pack")?;
    let mut run = stream.launch_builder(&pack);
    run.arg(&sizes).arg(&kv).arg(&key_points).arg(&mask).arg(&mut packed);
    // SAFETY: the arguments are those of `pack_NUMBERS_WIDTH` in `tensor.cu`, in their order; every
    // tensor has the length that the kernel works out from the sizes, and it writes to the last only.
    unsafe { run.launch(grid(problem, images, THREADS, 0)) }.w()?;
    drop(run);

    let attend = kernel("tensor")?;
    let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    attend.set_attribute(most, plan.room as i32).w()?;
    let mut run = stream.launch_builder(&attend);
    run.arg(&sizes).arg(&packed).arg(&q).arg(&params).arg(&points).arg(&mut out).arg(&mut marks);
    // SAFETY: likewise, of `tensor_NUMBERS_WIDTH`, which writes to the last two only.
    unsafe { run.launch(grid(problem, blocks * splits, THREADS, plan.room)) }.w()?;
    drop(run);
    if splits > 1 {
        [out, _] = combined(&device, &sizes, [&out, &marks], [answers, marked])?;
    }
    let shape = Shape::from((batch, targets, heads * w));
    Ok((CudaStorage::wrap_cuda_slice(out, device), shape))
}

/// Into how many parts to split the keys, so that few targets still give every processor two blocks.
fn splits(blocks: usize, images: usize, processors: usize) -> usize {
    (2 * processors / blocks.max(1)).min(images / FEWEST).clamp(1, 64)
}
