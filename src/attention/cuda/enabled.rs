//! With the feature `cuda`: the kernel, and when it applies.

use std::ops::Deref;

use candle_core::{
    CudaStorage, DType, Layout, Result, Shape, Storage, Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaView, LaunchConfig, PushKernelArg},
    },
};

use super::{Bias, Keys, Metric, Places, Problem};
use crate::{attention::Term, fused};

/// The kernels of `scan.cu`, compiled by `build.rs`.
const SCAN: crate::device::kernels::Kernels = crate::device::kernels::kernels!("scan");
/// Threads of a block, as in `scan.cu`.
const THREADS: usize = 128;
/// Widths of keys and values that kernels are compiled for.
const WIDTHS: [usize; 3] = [16, 32, 64];
/// Coordinates and terms they can take, as in `scan.h`.
const DIM: usize = 4;
const TERMS: usize = 16;
/// Blocks along the second and third side of a grid.
const SIDE: usize = 65_535;

/// Whether the kernel answers this: f32 on a GPU, sizes that it has, and nobody asked for the
/// [`fused::plain`] operations.
pub fn applies(q: &Tensor, sites: &Tensor, keys: &Keys, bias: Option<&Bias>) -> bool {
    let widest = keys.width.max(keys.value_width());
    let fits = |dims: &[usize], at: usize, most: usize| dims.get(at).is_some_and(|n| *n <= most);
    q.device().is_cuda()
        && q.dtype() == DType::F32
        && !fused::is_plain()
        && widest <= WIDTHS[WIDTHS.len() - 1]
        && bias.is_none_or(|b| b.terms.len() <= TERMS)
        && fits(sites.dims(), 2, DIM)
        && fits(q.dims(), 0, SIDE)
        && fits(q.dims(), 2, SIDE)
}

/// A contiguous f32 tensor on the device, borrowed.
struct Borrowed<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    layout: &'a Layout,
}

impl<'a> Borrowed<'a> {
    fn of(x: &'a Tensor) -> Self {
        let (storage, layout) = x.storage_and_layout();
        Borrowed { storage: Box::new(storage), layout }
    }

    fn view(&self, len: usize) -> Result<CudaView<'_, f32>> {
        match &**self.storage {
            Storage::Cuda(storage) => view((storage, self.layout), len),
            _ => bail!("scan attention needs all its tensors on one device"),
        }
    }
}

/// The `len` values of a contiguous tensor.
fn view<'a>(
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

/// Attention of the queries q to keys and values kv, with the bias of parameters: the answer
/// `[batch, target, head · w]`.
///
/// # Shapes
/// q `[batch, target, head · d]`, kv `[batch, context, head, d + w]`, parameters `[head, term, 3]`.
pub fn forward(
    problem: &Problem,
    places: &Places,
    [q, kv, params]: [(&CudaStorage, &Layout); 3],
) -> Result<(CudaStorage, Shape)> {
    let Problem { targets, context, heads, d, w, dim, terms, metric } = *problem;
    let batch = q.1.dims()[0];
    let widest = d.max(w);
    let Some(width) = WIDTHS.into_iter().find(|width| *width >= widest) else {
        bail!("no kernel for keys {d} and values {w} wide")
    };
    if terms.len() > TERMS || dim > DIM || batch > SIDE || heads > SIDE {
        bail!("no kernel for {} terms, {dim} coordinates, {batch} rows", terms.len());
    }
    let device = q.0.device().clone();
    let (points, key_points) = (Borrowed::of(&places.points), Borrowed::of(&places.key_points));
    let mask = Borrowed::of(&places.mask);
    let (q, kv) =
        (view(q, batch * targets * heads * d)?, view(kv, batch * context * heads * (d + w))?);
    // Without a bias there is one row of zeros for every head, which nothing reads.
    let params = view(params, heads * terms.len().max(1) * 3)?;
    let (points, key_points) =
        (points.view(batch * targets * dim)?, key_points.view(batch * context * dim)?);
    let mask = mask.view(batch * context)?;
    let mut out = device.alloc_zeros::<f32>(batch * targets * heads * w)?;
    // Tops and inverse weights, for the kernel of the gradient to come.
    let mut marks = device.alloc_zeros::<f32>(batch * targets * heads * 2)?;

    let small = |n: usize| i32::try_from(n).map_err(candle_core::Error::wrap);
    let sizes = [targets, context, heads, d, w, dim, terms.len()].map(small);
    let family = |(j, term): (usize, &Term)| (*term as u64) << (4 * j);
    let families: u64 = terms.iter().enumerate().map(family).sum();
    let globe = i32::from(metric == Metric::GreatCircle);
    let [targets_, context_, heads_, d_, w_, dim_, terms_] = sizes;
    let (targets_, context_, heads_) = (targets_?, context_?, heads_?);
    let (d_, w_, dim_, terms_) = (d_?, w_?, dim_?, terms_?);

    let kernel = SCAN.get(&device, &format!("scan_{width}"))?;
    let stream = device.cuda_stream();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&targets_).arg(&context_).arg(&heads_).arg(&d_).arg(&w_).arg(&dim_).arg(&terms_);
    launch.arg(&families).arg(&globe);
    launch.arg(&q).arg(&kv).arg(&params).arg(&points).arg(&key_points).arg(&mask);
    launch.arg(&mut out).arg(&mut marks);
    let grid = LaunchConfig {
        grid_dim: (targets.div_ceil(THREADS) as u32, heads as u32, batch as u32),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the arguments are those of `scan_WIDTH` in `scan.cu`, in their order; every tensor has
    // the length that the kernel works out from the sizes, and it writes to the last two only.
    unsafe { launch.launch(grid) }.w()?;
    drop(launch);
    let shape = Shape::from((batch, targets, heads * w));
    Ok((CudaStorage::wrap_cuda_slice(out, device), shape))
}
