//! With the feature `cuda`: the kernels, launched. Compiled only; it has never run beside a card.

use std::ops::Deref;

use candle_core::{
    CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType, WrapErr,
        cudarc::driver::{
            CudaFunction, CudaSlice, CudaView, DeviceRepr, LaunchConfig, PushKernelArg,
            sys::CUdevice_attribute,
        },
    },
    op::BackpropOp,
};

use super::{Bias, Chosen, KEYS, Keys, Metric, NEAR, Places, Problem, SIDE, TERMS};
use crate::{
    attention::reader::Envelope,
    device::kernels::{Kernels, kernels},
    fused,
};

/// `scan.cu`, compiled by `build.rs`.
static SCAN: Kernels = kernels!("scan");
/// Threads of a block where each does a thing of its own.
const EACH: usize = 128;

/// Whether the kernels answer this: f32 on a GPU, sizes that they have, and nobody asked for the
/// [`fused::plain`] operations.
pub fn applies(q: &Tensor, sites: &Tensor, keys: &Keys, bias: Option<&Bias>) -> bool {
    let most = super::WIDTHS[super::WIDTHS.len() - 1];
    let fits = |dims: &[usize], at: usize, most: usize| dims.get(at).is_some_and(|n| *n <= most);
    q.device().is_cuda()
        && q.dtype() == DType::F32
        && !fused::is_plain()
        && keys.width.max(keys.value_width()) <= most
        && bias.is_none_or(|b| b.terms.len() <= TERMS)
        && fits(sites.dims(), 2, super::DIM)
        && fits(q.dims(), 0, SIDE)
        && fits(q.dims(), 2, SIDE)
}

/// A contiguous f32 tensor on the device, borrowed.
pub(super) struct Borrowed<'a> {
    pub(super) storage: Box<dyn Deref<Target = Storage> + 'a>,
    layout: &'a Layout,
}

impl<'a> Borrowed<'a> {
    pub(super) fn of(x: &'a Tensor) -> Self {
        let (storage, layout) = x.storage_and_layout();
        Borrowed { storage: Box::new(storage), layout }
    }

    fn storage(&self) -> Result<&CudaStorage> {
        match &**self.storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("scan attention needs all its tensors on one device"),
        }
    }

    pub(super) fn view(&self, len: usize) -> Result<CudaView<'_, f32>> {
        view((self.storage()?, self.layout), len)
    }

    /// All its values, of whatever kind.
    fn values<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        match self.layout.contiguous_offsets() {
            Some((start, end)) => Ok(self.storage()?.as_cuda_slice::<T>()?.slice(start..end)),
            None => bail!("scan attention needs contiguous input"),
        }
    }
}

/// The `len` values of a contiguous tensor.
pub(super) fn view<'a>(
    (storage, layout): (&'a CudaStorage, &Layout),
    len: usize,
) -> Result<CudaView<'a, f32>> {
    match layout.contiguous_offsets() {
        Some((start, end)) if end - start == len => {
            Ok(storage.as_cuda_slice::<f32>()?.slice(start..end))
        }
        Some((start, end)) => bail!("scan attention met {} values for {len}", end - start),
        None => bail!("scan attention needs contiguous input"),
    }
}

/// Whether a tensor begins where 16 bytes do. Storage itself is aligned to more.
fn aligned(layout: &Layout) -> bool {
    layout.start_offset().is_multiple_of(4)
}

/// `Problem` of `bias.h`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Sizes {
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

// SAFETY: plain numbers without padding, in the order of the C struct.
unsafe impl DeviceRepr for Sizes {}

impl Sizes {
    /// `wide`: whether queries (with gradients of answers), and keys, begin where 16 bytes do.
    pub(super) fn of(problem: &Problem, splits: usize, wide: [bool; 2]) -> Result<Sizes> {
        if !problem.fits() {
            let Problem { batch, heads, d, w, dim, terms, .. } = problem;
            bail!(
                "no kernel for keys {d} and values {w} wide, {} terms, {dim} coordinates, {heads} \
                 heads, {batch} rows",
                terms.len()
            );
        }
        let small = |n: usize| i32::try_from(n).map_err(candle_core::Error::wrap);
        // Numbers of queries and keys over the whole batch are counted in 32 bits too.
        small(problem.batch * problem.targets.max(problem.context))?;
        let fours = problem.d.is_multiple_of(4) && problem.w.is_multiple_of(4);
        Ok(Sizes {
            batch: small(problem.batch)?,
            targets: small(problem.targets)?,
            context: small(problem.context)?,
            heads: small(problem.heads)?,
            d: small(problem.d)?,
            w: small(problem.w)?,
            dim: small(problem.dim)?,
            terms: small(problem.terms.len())?,
            globe: i32::from(problem.metric == Metric::GreatCircle),
            splits: small(splits)?,
            wide_q: i32::from(fours && wide[0]),
            wide_kv: i32::from(fours && wide[1]),
            families: problem.families(),
        })
    }
}

/// Processors of the card.
pub(super) fn processors(device: &CudaDevice) -> Result<usize> {
    let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let count = device.cuda_stream().context().attribute(count).w()?;
    Ok(usize::try_from(count).unwrap_or(1))
}

/// A grid of blocks `[x, head, row]`.
pub(super) fn grid(problem: &Problem, x: usize, threads: usize, shared: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, problem.heads as u32, problem.batch as u32),
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    }
}

/// A thread for each of `n` things.
fn row(n: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (n.div_ceil(EACH) as u32, 1, 1),
        block_dim: (EACH as u32, 1, 1),
        shared_mem_bytes: 0,
    }
}

fn tensor(values: CudaSlice<f32>, device: &CudaDevice, shape: impl Into<Shape>) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(values, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Room for `n` values that a kernel will write, every one.
pub(super) fn room<T: DeviceRepr>(device: &CudaDevice, n: usize) -> Result<CudaSlice<T>> {
    // SAFETY: the kernels below write all of it before anything reads it.
    unsafe { device.alloc::<T>(n.max(1)) }
}

/// What the kernels read, borrowed on the device.
pub(super) struct Given<'a> {
    points: Borrowed<'a>,
    keys: Borrowed<'a>,
    mask: Borrowed<'a>,
}

impl<'a> Given<'a> {
    pub(super) fn of(places: &'a Places) -> Self {
        Given {
            points: Borrowed::of(&places.points),
            keys: Borrowed::of(&places.key_points),
            mask: Borrowed::of(&places.mask),
        }
    }

    /// Points of queries, points of keys, mask.
    pub(super) fn views(&self, p: &Problem) -> Result<[CudaView<'_, f32>; 3]> {
        Ok([
            self.points.view(p.batch * p.targets * p.dim)?,
            self.keys.view(p.batch * p.context * p.dim)?,
            self.mask.view(p.batch * p.context)?,
        ])
    }
}

/// Attention of the queries q to keys and values kv, with the bias of parameters: the answer
/// `[batch, target, head · w]`, and the marks `[batch, target, 2 · head]` that [`gradients`] needs.
///
/// # Shapes
/// q `[batch, target, head · d]`, kv `[batch, context, head, d + w]`, parameters `[head, term, 3]`.
pub fn forward(
    problem: &Problem,
    places: &Places,
    [q, kv, params]: [(&CudaStorage, &Layout); 3],
) -> Result<(CudaStorage, Shape, Tensor)> {
    let Problem { batch, targets, context, heads, d, w, terms, .. } = *problem;
    let device = q.0.device().clone();
    let launch = problem.forward(processors(&device)?);
    let sizes = Sizes::of(problem, launch.splits, [aligned(q.1), aligned(kv.1)])?;
    let (q, kv) =
        (view(q, batch * targets * heads * d)?, view(kv, batch * context * heads * (d + w))?);
    // Without a bias there is one row of zeros for every head, which nothing reads.
    let params = view(params, heads * terms.len().max(1) * 3)?;
    let given = Given::of(places);
    let [points, key_points, mask] = given.views(problem)?;
    let (answers, marked) = (batch * targets * heads * w, batch * targets * heads * 2);
    let mut out = room::<f32>(&device, launch.splits * answers)?;
    let mut marks = room::<f32>(&device, launch.splits * marked)?;

    let stream = device.cuda_stream();
    let width = problem.width().unwrap_or_default();
    let kernel = scan_kernel(&device, &format!("scan_{}_{width}", problem.kind()))?;
    let mut run = stream.launch_builder(&kernel);
    run.arg(&sizes).arg(&q).arg(&kv).arg(&params);
    run.arg(&points).arg(&key_points).arg(&mask).arg(&mut out).arg(&mut marks);
    // SAFETY: the arguments are those of `scan_KIND_WIDTH` in `scan.cu`, in their order; every tensor
    // has the length that the kernel works out from the sizes, and it writes to the last two only.
    unsafe { run.launch(grid(problem, launch.blocks * launch.splits, launch.threads, 0)) }.w()?;
    drop(run);
    if launch.splits > 1 {
        [out, marks] = combined(&device, &sizes, [&out, &marks], [answers, marked])?;
    }
    let shape = Shape::from((batch, targets, heads * w));
    let marks = tensor(marks, &device, (batch, targets, 2 * heads));
    Ok((CudaStorage::wrap_cuda_slice(out, device), shape, marks))
}

/// As [`forward`], of part of the context: the answer alone.
pub(super) fn near(
    problem: &Problem,
    places: &Places,
    [q, kv, params]: [&Tensor; 3],
    chosen: &Chosen,
) -> Result<Tensor> {
    let Problem { batch, targets, context, heads, d, w, terms, .. } = *problem;
    let [q, kv, params] = [q, kv, params].map(Borrowed::of);
    let device = q.storage()?.device().clone();
    let sizes = Sizes::of(problem, 1, [aligned(q.layout), aligned(kv.layout)])?;
    let q = q.view(batch * targets * heads * d)?;
    let kv = kv.view(batch * context * heads * (d + w))?;
    let params = params.view(heads * terms.len().max(1) * 3)?;
    let given = Given::of(places);
    let [points, key_points, mask] = given.views(problem)?;
    let blocks = targets.div_ceil(problem.queries_of_near());
    let [from, tile, order] = [chosen.from, chosen.tile, chosen.order].map(Borrowed::of);
    let (from, tile, order) =
        (from.values::<u32>()?, tile.values::<u32>()?, order.values::<u32>()?);
    if from.len() != batch * blocks + 1 || order.len() != batch * targets {
        bail!("{} lists and {} queries for {batch} rows", from.len(), order.len());
    }
    let [gap2, reach2, envelope] = [chosen.gap2, chosen.reach2, chosen.envelope].map(Borrowed::of);
    let (gap2, reach2) = (gap2.view(tile.len())?, reach2.view(heads)?);
    let envelope = envelope.view(heads * Envelope::CELLS)?;
    let [norm, longest, tally] = [chosen.norm, chosen.longest, chosen.tally].map(Borrowed::of);
    let norm = norm.view(batch * context.div_ceil(KEYS) * heads)?;
    let (longest, tally) = (longest.view(batch * heads)?, tally.values::<i64>()?);
    let mut out = room::<f32>(&device, batch * targets * heads * w)?;
    let mut marks = room::<f32>(&device, batch * targets * heads * 2)?;

    let stream = device.cuda_stream();
    let width = problem.width().unwrap_or_default();
    let kernel = scan_kernel(&device, &format!("near_{}_{width}", problem.kind()))?;
    let mut run = stream.launch_builder(&kernel);
    run.arg(&sizes).arg(&q).arg(&kv).arg(&params).arg(&points).arg(&key_points).arg(&mask);
    run.arg(&from).arg(&tile).arg(&gap2).arg(&order).arg(&reach2).arg(&envelope);
    run.arg(&norm).arg(&longest).arg(&tally).arg(&chosen.share).arg(&mut out).arg(&mut marks);
    // SAFETY: the arguments are those of `near_KIND_WIDTH` in `scan.cu`, in their order. It writes to the
    // last two, and adds to the tally, which nothing else holds until the answer is made.
    unsafe { run.launch(grid(problem, blocks, NEAR, 0)) }.w()?;
    drop(run);
    Ok(tensor(out, &device, (batch, targets, heads * w)))
}

/// A kernel of `scan.cu`, about to be launched once.
fn scan_kernel(device: &CudaDevice, name: &str) -> Result<CudaFunction> {
    fused::cuda::count();
    SCAN.get(device, name)
}

/// Answers and marks of all parts of the keys, made those of the whole: so many numbers each.
pub(super) fn combined(
    device: &CudaDevice,
    sizes: &Sizes,
    [parts, part_marks]: [&CudaSlice<f32>; 2],
    [answers, marked]: [usize; 2],
) -> Result<[CudaSlice<f32>; 2]> {
    let (mut out, mut marks) = (room::<f32>(device, answers)?, room::<f32>(device, marked)?);
    let stream = device.cuda_stream();
    let kernel = scan_kernel(device, "scan_combine")?;
    let mut run = stream.launch_builder(&kernel);
    run.arg(sizes).arg(parts).arg(part_marks).arg(&mut out).arg(&mut marks);
    // SAFETY: the arguments of `scan_combine`; it writes to the last two only.
    unsafe { run.launch(row(answers)) }.w()?;
    drop(run);
    Ok([out, marks])
}

/// Gradients of q, kv and parameters, given q, kv, parameters, the answer, its gradient, and the marks
/// of [`forward`]; each in the shape of what it is the gradient of. Sums are taken in the same order,
/// always.
pub fn gradients(
    problem: &Problem,
    places: &Places,
    [q, kv, params, out, grad, marks]: [&Tensor; 6],
) -> Result<[Tensor; 3]> {
    let Problem { batch, targets, context, heads, d, w, terms, .. } = *problem;
    let shapes = [q, kv, params].map(Tensor::shape);
    let [q, kv, params, out, grad, marks] = [q, kv, params, out, grad, marks].map(Borrowed::of);
    let device = q.storage()?.device().clone();
    let wide_q = aligned(q.layout) && aligned(grad.layout);
    let sizes = Sizes::of(problem, 1, [wide_q, aligned(kv.layout)])?;
    let (queries, answers) = (batch * targets * heads, batch * targets * heads * w);
    let (q, kv) = (q.view(queries * d)?, kv.view(batch * context * heads * (d + w))?);
    let params = params.view(heads * terms.len().max(1) * 3)?;
    let (out, grad, marks) = (out.view(answers)?, grad.view(answers)?, marks.view(queries * 2)?);
    let given = Given::of(places);
    let [points, key_points, mask] = given.views(problem)?;

    let stream = device.cuda_stream();
    let mut means = room::<f32>(&device, queries)?;
    let kernel = scan_kernel(&device, "gradient_means")?;
    let mut run = stream.launch_builder(&kernel);
    run.arg(&sizes).arg(&out).arg(&grad).arg(&mut means);
    // SAFETY: the arguments of `gradient_means` in `scan.cu`; it writes to the last one only.
    unsafe { run.launch(row(queries)) }.w()?;
    drop(run);

    let (kind, width) = (problem.kind(), problem.width().unwrap_or_default());
    let mut dq = room::<f32>(&device, q.len())?;
    let by_query = problem.backward(targets);
    let kernel = scan_kernel(&device, &format!("gradient_queries_{kind}_{width}"))?;
    let mut run = stream.launch_builder(&kernel);
    run.arg(&sizes).arg(&q).arg(&kv).arg(&params).arg(&points).arg(&key_points).arg(&mask);
    run.arg(&grad).arg(&marks).arg(&means).arg(&mut dq);
    // SAFETY: the arguments of `gradient_queries_KIND_WIDTH`; it writes to the last one only.
    unsafe { run.launch(grid(problem, by_query.blocks, by_query.threads, 0)) }.w()?;
    drop(run);

    let mut dkv = room::<f32>(&device, kv.len())?;
    let by_key = problem.backward(context);
    let mut sums = room::<f64>(&device, batch * heads * by_key.blocks * terms.len() * 3)?;
    let shared = size_of::<f64>() * 3 * terms.len() * by_key.threads;
    let kernel = scan_kernel(&device, &format!("gradient_keys_{kind}_{width}"))?;
    let mut run = stream.launch_builder(&kernel);
    run.arg(&sizes).arg(&q).arg(&kv).arg(&params).arg(&points).arg(&key_points).arg(&mask);
    run.arg(&grad).arg(&marks).arg(&means).arg(&mut dkv).arg(&mut sums);
    // SAFETY: the arguments of `gradient_keys_KIND_WIDTH`; it writes to the last two only.
    unsafe { run.launch(grid(problem, by_key.blocks, by_key.threads, shared)) }.w()?;
    drop(run);

    let mut dparams = device.alloc_zeros::<f32>(params.len())?;
    if !terms.is_empty() {
        let kernel = scan_kernel(&device, "gradient_bias")?;
        let blocks = by_key.blocks as i32;
        let mut run = stream.launch_builder(&kernel);
        run.arg(&sizes).arg(&params).arg(&grad).arg(&marks).arg(&means);
        run.arg(&sums).arg(&blocks).arg(&mut dparams);
        let config = LaunchConfig {
            grid_dim: (heads as u32, 1, 1),
            block_dim: (EACH as u32, 1, 1),
            shared_mem_bytes: (size_of::<f64>() * EACH) as u32,
        };
        // SAFETY: the arguments of `gradient_bias`; it writes to the last one only.
        unsafe { run.launch(config) }.w()?;
    }
    let [like_q, like_kv, like_params] = shapes;
    Ok([
        tensor(dq, &device, like_q),
        tensor(dkv, &device, like_kv),
        tensor(dparams, &device, like_params),
    ])
}
