//! With the feature `cuda`: layers and the optimiser on a card. Compiled only; it has never run on one.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage,
    Tensor, TensorId, Var, backprop::GradStore, bail, op::BackpropOp,
};
use candle_core::{
    backend::BackendStorage,
    cuda_backend::{
        WrapErr,
        cudarc::{
            cublas::{result::gemm_ex, sys},
            driver::{
                CudaFunction, CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr,
                LaunchConfig, PushKernelArg,
            },
        },
    },
};

use super::{Flat, Gemm, NEWS, News, Products, count, products};
use crate::{
    device::kernels::{Kernels, kernels},
    fused::{
        self,
        layers::{Act, Into, Machine},
    },
};

const LAYERS: Kernels = kernels!("layers");
const UPDATE: Kernels = kernels!("update");

/// As in `layers.cu`.
const LANES: usize = 32;
const WARPS: usize = 8;
const SPAN: usize = 64;
/// The widest rows whose normalisation has a gradient: what fits the memory that blocks share.
const WIDEST: usize = 48 * 1024 / (2 * 4 * WARPS);
/// As in `update.cu`.
const THREADS: usize = 256;
const TABLE: usize = 400;

fn small(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(candle_core::Error::wrap)
}

fn grid(x: usize, y: usize, threads: usize, shared: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x.max(1) as u32, y.max(1) as u32, 1),
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    }
}

/// Blocks for `n` numbers, one after another.
fn elements(n: usize) -> LaunchConfig {
    grid(n.div_ceil(THREADS).min(4096), 1, THREADS, 0)
}

/// A contiguous f32 tensor on a card, borrowed.
struct Held<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: (usize, usize),
}

impl<'a> Held<'a> {
    fn of(x: &'a Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let Some(range) = layout.contiguous_offsets() else {
            bail!("layers need contiguous input")
        };
        Ok(Held { storage: Box::new(storage), range })
    }

    fn view(&self) -> Result<CudaView<'_, f32>> {
        match &**self.storage {
            Storage::Cuda(storage) => {
                Ok(storage.as_cuda_slice::<f32>()?.slice(self.range.0..self.range.1))
            }
            _ => bail!("layers need all their tensors on one card"),
        }
    }
}

/// Sums of gradients, on a card.
pub struct Sums(Mutex<CudaSlice<f32>>);

impl Sums {
    fn lock(&self) -> MutexGuard<'_, CudaSlice<f32>> {
        lock(&self.0)
    }
}

fn lock<T>(x: &Mutex<T>) -> MutexGuard<'_, T> {
    x.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A card that computes layers.
pub struct Card {
    device: CudaDevice,
}

impl Card {
    /// The card of `x`: f32 on a GPU, and nobody asked for the [`fused::plain`] operations.
    pub fn of(x: &Tensor) -> Option<Self> {
        match x.device() {
            Device::Cuda(device)
                if x.dtype() == DType::F32
                    && !fused::is_plain()
                    && x.elem_count() > 0
                    && x.dims().last().is_some_and(|n| *n <= WIDEST) =>
            {
                Some(Card { device: device.clone() })
            }
            _ => None,
        }
    }

    /// Where gradients of these go: into the flat buffer that this thread collects in, if it knows
    /// them all.
    pub fn places(params: &[&Tensor]) -> Into<Self> {
        COLLECTING.with_borrow(|resident| {
            let Some(resident) = resident else { return Into::Graph };
            let found: Option<Vec<usize>> =
                params.iter().map(|p| resident.ids.get(&p.id()).copied()).collect();
            let Some(found) = found else { return Into::Graph };
            let mut touched = lock(&resident.touched);
            found.iter().for_each(|i| touched[*i] = true);
            let places = found.iter().map(|i| resident.flat.starts[*i]).collect();
            Into::Buffer(resident.sums.clone(), places)
        })
    }

    fn kernel(&self, name: &str) -> Result<CudaFunction> {
        count();
        LAYERS.get(&self.device, name)
    }

    /// Room for `n` numbers, which the kernel that gets it fills.
    fn room(&self, n: usize) -> Result<CudaSlice<f32>> {
        // SAFETY: every kernel below that is given room writes all of it, and is launched on the same
        // stream before anything reads it.
        unsafe { self.device.alloc::<f32>(n) }
    }

    fn made(&self, slice: CudaSlice<f32>) -> Storage {
        Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, self.device.clone()))
    }

    /// `c = keep · c + a b`, as [`Gemm`] has it.
    fn gemm(
        &self,
        g: Gemm,
        a: &CudaView<f32>,
        b: &CudaView<f32>,
        keep: f32,
        c: &mut impl DevicePtrMut<f32>,
    ) -> Result<()> {
        if g.m * g.n * g.k == 0 {
            return Ok(());
        }
        count();
        let turned = |t: bool| {
            if t {
                sys::cublasOperation_t::CUBLAS_OP_T
            } else {
                sys::cublasOperation_t::CUBLAS_OP_N
            }
        };
        let how = match products() {
            Products::F32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            Products::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            Products::Bf16 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_16BF,
        };
        let (one, f32s) = (1.0f32, sys::cudaDataType_t::CUDA_R_32F);
        let [m, n, k, lda, ldb, ldc] = [g.m, g.n, g.k, g.lda, g.ldb, g.ldc].map(small);
        let (blas, stream) = (self.device.cublas_handle(), self.device.cuda_stream());
        let ((a, _a), (b, _b)) = (a.device_ptr(&stream), b.device_ptr(&stream));
        let (c, _c) = c.device_ptr_mut(&stream);
        // SAFETY: the three matrices live until the call is queued, and on the stream beyond; their
        // sizes are those of the tensors they were borrowed from, checked by the callers.
        unsafe {
            gemm_ex(
                *blas.handle(),
                turned(g.transposed[0]),
                turned(g.transposed[1]),
                m?,
                n?,
                k?,
                (&raw const one).cast(),
                a as *const _,
                f32s,
                lda?,
                b as *const _,
                f32s,
                ldb?,
                (&raw const keep).cast(),
                c as *mut _,
                f32s,
                ldc?,
                how,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .w()
    }

    /// Adds the sums of spans to `to`, from `at[0]` on, and those of columns from `half` on from
    /// `at[1]` on.
    fn fold(
        &self,
        spans: &CudaSlice<f32>,
        [many, width, half]: [usize; 3],
        to: &Sums,
        at: [usize; 2],
    ) -> Result<()> {
        let kernel = self.kernel("fold")?;
        let mut to = to.lock();
        let len = to.len();
        if at[0] + half > len || at[1] + (width - half) > len {
            bail!("sums of {width} columns do not fit");
        }
        let (many_, width_, half_) = (small(many)?, small(width)?, small(half)?);
        // Both destinations are parts of one buffer, which may stand in any order: addresses.
        let stream = self.device.cuda_stream();
        let (start, _guard) = to.device_ptr_mut(&stream);
        let [first, second] = at.map(|at| start + 4 * at as u64);
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(spans).arg(&first).arg(&second).arg(&many_).arg(&width_).arg(&half_);
        // SAFETY: the arguments are those of `fold` in `layers.cu`; `spans` has many × width numbers,
        // and what is written was checked to lie inside the buffer, which stays locked until the launch
        // is queued.
        unsafe { launch.launch(grid(width.div_ceil(LANES), 1, LANES * WARPS, 0)) }.w()?;
        Ok(())
    }
}

fn mode(act: Act) -> i32 {
    match act {
        Act::None => 0,
        Act::Gelu => 1,
        Act::Relu => 2,
    }
}

/// Same sizes, or an error.
fn same(what: &str, a: usize, b: usize) -> Result<()> {
    if a != b {
        bail!("{what}: {a} numbers for {b}");
    }
    Ok(())
}

impl Machine for Card {
    type Sums = Sums;

    fn sums(&self, n: usize) -> Result<Sums> {
        Ok(Sums(Mutex::new(self.device.alloc_zeros::<f32>(n)?)))
    }

    fn taken(&self, sums: Sums) -> Result<Storage> {
        Ok(self.made(sums.0.into_inner().unwrap_or_else(PoisonError::into_inner)))
    }

    fn product(&self, x: &Tensor, w: &Tensor) -> Result<Storage> {
        let ((rows, inputs), (read, outputs)) = (x.dims2()?, w.dims2()?);
        same("a product", inputs, read)?;
        let mut y = self.room(rows * outputs)?;
        let (x, w) = (Held::of(x)?, Held::of(w)?);
        self.gemm(Gemm::forward(rows, inputs, outputs), &w.view()?, &x.view()?, 0.0, &mut y)?;
        Ok(self.made(y))
    }

    fn product_back(&self, g: &Tensor, w: &Tensor) -> Result<Storage> {
        let ((rows, outputs), (inputs, given)) = (g.dims2()?, w.dims2()?);
        same("a product", outputs, given)?;
        let mut dx = self.room(rows * inputs)?;
        let (g, w) = (Held::of(g)?, Held::of(w)?);
        self.gemm(Gemm::back(rows, inputs, outputs), &w.view()?, &g.view()?, 0.0, &mut dx)?;
        Ok(self.made(dx))
    }

    fn product_weights(&self, x: &Tensor, g: &Tensor, to: &Sums, at: usize) -> Result<()> {
        let ((rows, inputs), (given, outputs)) = (x.dims2()?, g.dims2()?);
        same("a product", rows, given)?;
        let (x, g) = (Held::of(x)?, Held::of(g)?);
        let mut to = to.lock();
        let mut part = to.slice_mut(at..at + inputs * outputs);
        self.gemm(Gemm::weights(rows, inputs, outputs), &g.view()?, &x.view()?, 1.0, &mut part)
    }

    fn epilogue(
        &self,
        z: Storage,
        bias: &Tensor,
        residual: Option<&Tensor>,
        act: Act,
    ) -> Result<(Option<Storage>, Storage)> {
        let Storage::Cuda(CudaStorage { slice, .. }) = z else { bail!("a product on a card") };
        let candle_core::cuda_backend::CudaStorageSlice::F32(mut z) = slice else {
            bail!("a product of f32")
        };
        let (n, width) = (z.len(), bias.elem_count());
        let kernel = self.kernel("epilogue")?;
        let mut y = if act == Act::None { None } else { Some(self.room(n)?) };
        let (n_, width_, mode_) = (n as i64, small(width)?, mode(act));
        let bias = Held::of(bias)?;
        let residual = residual.map(Held::of).transpose()?;
        let residual = residual.as_ref().map(Held::view).transpose()?;
        if let Some(residual) = &residual {
            same("what is added", residual.len(), n)?;
        }
        let stream = self.device.cuda_stream();
        {
            // Without an activation the product is overwritten, so that both are the same address.
            let (z_at, _z) = z.device_ptr_mut(&stream);
            let out = y.as_mut().map(|y| y.device_ptr_mut(&stream));
            let y_at = out.as_ref().map_or(z_at, |(at, _)| *at);
            let beside = residual.as_ref().map(|r| r.device_ptr(&stream));
            let beside_at = beside.as_ref().map_or(0u64, |(at, _)| *at);
            let bias = bias.view()?;
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&z_at).arg(&bias).arg(&beside_at).arg(&y_at);
            launch.arg(&n_).arg(&width_).arg(&mode_);
            // SAFETY: the arguments are those of `epilogue`; z, y and the residual have n numbers, the
            // bias as many as a row, and all of them outlive the launch on this stream.
            unsafe { launch.launch(elements(n)) }.w()?;
        }
        Ok(match y {
            Some(y) => (Some(self.made(z)), self.made(y)),
            None => (None, self.made(z)),
        })
    }

    fn activate(&self, x: &Tensor, act: Act) -> Result<Storage> {
        let n = x.elem_count();
        let kernel = self.kernel("activate")?;
        let mut y = self.room(n)?;
        let (n_, mode_) = (n as i64, mode(act));
        let x = Held::of(x)?;
        let (x, stream) = (x.view()?, self.device.cuda_stream());
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&x).arg(&mut y).arg(&n_).arg(&mode_);
        // SAFETY: the arguments are those of `activate`; x and y have n numbers.
        unsafe { launch.launch(elements(n)) }.w()?;
        Ok(self.made(y))
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Storage> {
        let n = a.elem_count();
        same("a sum", n, b.elem_count())?;
        let kernel = self.kernel("add")?;
        let mut y = self.room(n)?;
        let n_ = n as i64;
        let (a, b) = (Held::of(a)?, Held::of(b)?);
        let (a, b, stream) = (a.view()?, b.view()?, self.device.cuda_stream());
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&a).arg(&b).arg(&mut y).arg(&n_);
        // SAFETY: the arguments are those of `add`; all three have n numbers.
        unsafe { launch.launch(elements(n)) }.w()?;
        Ok(self.made(y))
    }

    fn norm(&self, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Storage> {
        let (rows, width) = x.dims2()?;
        same("a scale", scale.elem_count(), width)?;
        same("a shift", shift.elem_count(), width)?;
        let kernel = self.kernel("norm_forward")?;
        let mut y = self.room(rows * width)?;
        let (rows_, width_) = (small(rows)?, small(width)?);
        let (x, scale, shift) = (Held::of(x)?, Held::of(scale)?, Held::of(shift)?);
        let (x, scale, shift) = (x.view()?, scale.view()?, shift.view()?);
        let stream = self.device.cuda_stream();
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&x).arg(&scale).arg(&shift).arg(&mut y).arg(&rows_).arg(&width_);
        // SAFETY: the arguments are those of `norm_forward`; x and y are rows × width.
        unsafe { launch.launch(grid(rows.div_ceil(WARPS), 1, LANES * WARPS, 0)) }.w()?;
        Ok(self.made(y))
    }

    fn norm_back(
        &self,
        x: &Tensor,
        g: &Tensor,
        scale: &Tensor,
        residual: Option<&Tensor>,
        to: &Sums,
        at: [usize; 2],
    ) -> Result<Storage> {
        let (rows, width) = x.dims2()?;
        same("a gradient", g.elem_count(), rows * width)?;
        same("a scale", scale.elem_count(), width)?;
        if width > WIDEST {
            bail!("no kernel for the gradient of a normalisation {width} wide");
        }
        let kernel = self.kernel("norm_backward")?;
        let spans = rows.div_ceil(SPAN);
        let (mut dx, mut sums) = (self.room(rows * width)?, self.room(spans * 2 * width)?);
        let (rows_, width_) = (small(rows)?, small(width)?);
        let (x, g, scale) = (Held::of(x)?, Held::of(g)?, Held::of(scale)?);
        let (x, g, scale) = (x.view()?, g.view()?, scale.view()?);
        let residual = residual.map(Held::of).transpose()?;
        let residual = residual.as_ref().map(Held::view).transpose()?;
        if let Some(residual) = &residual {
            same("what is added", residual.len(), rows * width)?;
        }
        let stream = self.device.cuda_stream();
        {
            let beside = residual.as_ref().map(|r| r.device_ptr(&stream));
            let beside_at = beside.as_ref().map_or(0u64, |(at, _)| *at);
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&x).arg(&g).arg(&scale).arg(&beside_at);
            launch.arg(&mut dx).arg(&mut sums).arg(&rows_).arg(&width_);
            let shared = WARPS * 2 * width * size_of::<f32>();
            // SAFETY: the arguments are those of `norm_backward`; x, g, the residual and dx are
            // rows × width, the sums spans × 2 · width, and the shared memory is what it asks for.
            unsafe { launch.launch(grid(spans, 1, LANES * WARPS, shared)) }.w()?;
        }
        self.fold(&sums, [spans, 2 * width, width], to, at)?;
        Ok(self.made(dx))
    }

    fn slopes(
        &self,
        z: &Tensor,
        g: &Tensor,
        act: Act,
        to: Option<(&Sums, usize)>,
    ) -> Result<Option<Storage>> {
        let (rows, width) = g.dims2()?;
        same("a gradient", z.elem_count(), rows * width)?;
        let kernel = self.kernel("slopes")?;
        let spans = rows.div_ceil(SPAN);
        let mut dz = self.room(if act == Act::None { 1 } else { rows * width })?;
        let mut sums = self.room(spans * width)?;
        let (rows_, width_, mode_) = (small(rows)?, small(width)?, mode(act));
        let (z, g) = (Held::of(z)?, Held::of(g)?);
        let (z, g, stream) = (z.view()?, g.view()?, self.device.cuda_stream());
        {
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&z).arg(&g).arg(&mut dz).arg(&mut sums);
            launch.arg(&rows_).arg(&width_).arg(&mode_);
            // SAFETY: the arguments are those of `slopes`; z and g are rows × width, dz too where it is
            // written, the sums spans × width.
            unsafe { launch.launch(grid(spans, width.div_ceil(LANES), LANES * WARPS, 0)) }.w()?;
        }
        if let Some((to, at)) = to {
            self.fold(&sums, [spans, width, width], to, [at, at])?;
        }
        Ok((act != Act::None).then(|| self.made(dz)))
    }
}

/// `raw · (1 − logged − folded) + sign · exp(raw · logged) + |raw| · folded` in one launch, and its
/// gradient in another; nothing off a card.
pub fn constrain(raw: &Tensor, constants: [&Tensor; 3]) -> Option<Result<Tensor>> {
    let card = Card::of(raw)?;
    let each = constants[0].elem_count();
    if constants.iter().any(|c| c.elem_count() != each || !c.is_contiguous()) || each == 0 {
        return None;
    }
    let op = Constrain { card, constants: constants.map(Tensor::detach), each };
    Some(raw.contiguous().and_then(|raw| raw.apply_op1(op)))
}

struct Constrain {
    card: Card,
    constants: [Tensor; 3],
    each: usize,
}

impl Constrain {
    fn launch(&self, raw: &CudaView<f32>, g: Option<&CudaView<f32>>) -> Result<CudaSlice<f32>> {
        let n = raw.len();
        let kernel = self.card.kernel("constrain")?;
        let mut out = self.card.room(n)?;
        let (n_, each_) = (small(n)?, small(self.each)?);
        let [a, b, c] = &self.constants;
        let (a, b, c) = (Held::of(a)?, Held::of(b)?, Held::of(c)?);
        let (a, b, c, stream) = (a.view()?, b.view()?, c.view()?, self.card.device.cuda_stream());
        {
            let g = g.map(|g| g.device_ptr(&stream));
            let g_at = g.as_ref().map_or(0u64, |(at, _)| *at);
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(raw).arg(&a).arg(&b).arg(&c).arg(&g_at).arg(&mut out);
            launch.arg(&n_).arg(&each_);
            // SAFETY: the arguments are those of `constrain`; raw, g and the output have n numbers, the
            // constants `each`.
            unsafe { launch.launch(elements(n)) }.w()?;
        }
        Ok(out)
    }
}

impl CustomOp1 for Constrain {
    fn name(&self) -> &'static str {
        "constrain"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("for cards only")
    }

    fn cuda_fwd(&self, raw: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("contiguous") };
        let out = self.launch(&raw.as_cuda_slice::<f32>()?.slice(start..end), None)?;
        let out = CudaStorage::wrap_cuda_slice(out, raw.device().clone());
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, raw: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (x, g) = (Held::of(raw)?, Held::of(&grad)?);
        let out = self.launch(&x.view()?, Some(&g.view()?))?;
        let out = self.card.made(out);
        Ok(Some(Tensor::from_storage(out, raw.shape(), BackpropOp::none(), false)))
    }
}

thread_local! {
    /// Where gradients of parameters go that layers on this thread make.
    static COLLECTING: RefCell<Option<Arc<Resident>>> = const { RefCell::new(None) };
}

/// Does `work`, forward and backward, while gradients of the parameters that `resident` knows are
/// added in its buffer.
pub fn collecting<T>(resident: Option<&Arc<Resident>>, work: impl FnOnce() -> T) -> T {
    struct Restore(Option<Arc<Resident>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            COLLECTING.set(self.0.take());
        }
    }
    let _restore = Restore(COLLECTING.replace(resident.cloned()));
    work()
}

/// Cards that add up among themselves, through NCCL: with the feature `nccl`, and its library.
#[cfg(feature = "nccl")]
pub struct Ring(Vec<candle_core::cuda_backend::cudarc::nccl::Comm>);

#[cfg(feature = "nccl")]
impl Ring {
    /// For the cards of these; nothing for one card, or where the library does not answer.
    pub fn new(residents: &[Arc<Resident>]) -> Option<Self> {
        use candle_core::cuda_backend::cudarc::nccl::Comm;
        let streams: Vec<_> = residents.iter().map(|r| r.device.cuda_stream()).collect();
        if streams.len() < 2 {
            return None;
        }
        Comm::from_devices(streams).ok().map(Ring)
    }

    /// The sum over all cards, on every one.
    pub fn sum(&self, residents: &[Arc<Resident>]) -> Result<()> {
        use candle_core::cuda_backend::cudarc::nccl::{
            ReduceOp,
            result::{group_end, group_start},
        };
        let failed = |e| candle_core::Error::Msg(format!("NCCL: {e:?}"));
        group_start().map_err(failed)?;
        for (comm, resident) in self.0.iter().zip(residents) {
            let mut sums = resident.sums.lock();
            comm.all_reduce_in_place(&mut *sums, &ReduceOp::Sum).map_err(failed)?;
        }
        group_end().map(|_| ()).map_err(failed)
    }
}

/// Without the feature `nccl`: gradients of several cards go through the host.
#[cfg(not(feature = "nccl"))]
pub struct Ring(std::convert::Infallible);

#[cfg(not(feature = "nccl"))]
impl Ring {
    /// Nothing.
    pub fn new(_: &[Arc<Resident>]) -> Option<Self> {
        None
    }

    /// As the form with the feature.
    pub fn sum(&self, _: &[Arc<Resident>]) -> Result<()> {
        match self.0 {}
    }
}

/// Addresses handed over with a launch, as in `update.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Table([u64; TABLE]);
// SAFETY: plain numbers, laid out as C has them.
unsafe impl DeviceRepr for Table {}

/// Numbers of a step, as in `update.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Pace {
    numbers: [f32; 5],
    yogi: i32,
}
// SAFETY: as above.
unsafe impl DeviceRepr for Pace {}

/// The optimiser on a card: gradients, moments and the running average of all parameters, flat.
pub struct Resident {
    device: CudaDevice,
    /// Kept so that the addresses stay good.
    weights: Vec<Var>,
    ids: HashMap<TensorId, usize>,
    flat: Flat,
    /// As long as the flat buffer, and the loss behind it.
    sums: Arc<Sums>,
    touched: Mutex<Vec<bool>>,
    chunks: CudaSlice<i32>,
    /// Blocks before those of each parameter, and all of them.
    blocks: Vec<usize>,
    starts: CudaSlice<i32>,
    lengths: CudaSlice<i32>,
    table: CudaSlice<u64>,
    state: Mutex<State>,
    yogi: bool,
}

struct State {
    first: CudaSlice<f32>,
    second: CudaSlice<f32>,
    average: CudaSlice<f32>,
    squares: CudaSlice<f64>,
    news: CudaSlice<f64>,
}

impl Resident {
    /// For the parameters `vars`, on the card where they are; everything is 0 until [`Resident::set`].
    pub fn new(device: &Device, vars: &BTreeMap<String, Var>, yogi: bool) -> Result<Self> {
        let Device::Cuda(device) = device else { bail!("an optimiser for cards") };
        // SAFETY: a training queues all its work on the one stream of its card, in the order in which
        // the host gives it, so that nothing needs to wait for an event.
        unsafe { device.disable_event_tracking() };
        let flat = Flat::new(vars.values().map(|v| v.elem_count()).collect());
        let (mut ids, mut addresses) = (HashMap::new(), Vec::with_capacity(vars.len()));
        let stream = device.cuda_stream();
        for (i, var) in vars.values().enumerate() {
            if var.dtype() != DType::F32 {
                bail!("weights that learn on a card are f32");
            }
            ids.insert(var.as_tensor().id(), i);
            let held = Held::of(var.as_tensor())?;
            addresses.push(held.view()?.device_ptr(&stream).0);
        }
        let chunks = flat.chunks();
        let blocks = (0..=flat.lengths.len())
            .map(|p| chunks.partition_point(|c| (c[0] as usize) < p))
            .collect();
        let ints = |x: &[usize]| x.iter().map(|n| small(*n)).collect::<Result<Vec<i32>>>();
        let total = flat.total.max(1);
        let zeros = || device.alloc_zeros::<f32>(total);
        let state = State {
            first: zeros()?,
            second: zeros()?,
            average: zeros()?,
            squares: device.alloc_zeros::<f64>(total.div_ceil(super::CHUNK))?,
            news: device.alloc_zeros::<f64>(NEWS)?,
        };
        Ok(Resident {
            weights: vars.values().cloned().collect(),
            ids,
            sums: Arc::new(Sums(Mutex::new(device.alloc_zeros::<f32>(total + super::ALIGN)?))),
            touched: Mutex::new(vec![false; flat.lengths.len()]),
            chunks: device.clone_htod(&chunks.as_flattened().to_vec())?,
            blocks,
            starts: device.clone_htod(&ints(&flat.starts)?)?,
            lengths: device.clone_htod(&ints(&flat.lengths)?)?,
            table: device.clone_htod(&addresses)?,
            state: Mutex::new(state),
            yogi,
            device: device.clone(),
            flat,
        })
    }

    /// Adds to the buffer what candle's graph has of gradients, and puts the loss behind them. The
    /// parameters that neither it nor a run of layers has a gradient of.
    pub fn gather(&self, grads: Option<&GradStore>, loss: &Tensor) -> Result<Vec<usize>> {
        let mut touched = lock(&self.touched);
        let mut sums = self.sums.lock();
        let total = self.flat.total;
        let loss = loss.contiguous()?;
        let held = Held::of(&loss)?;
        count();
        self.device.memcpy_dtod(&held.view()?, &mut sums.slice_mut(total..total + 1))?;
        let stream = self.device.cuda_stream();
        for first in (0..self.weights.len()).step_by(TABLE) {
            let last = (first + TABLE).min(self.weights.len());
            let mut given = Vec::new();
            for (i, var) in self.weights.iter().enumerate().take(last).skip(first) {
                if let Some(grad) = grads.and_then(|grads| grads.get(var.as_tensor())) {
                    touched[i] = true;
                    given.push((i, grad.contiguous()?));
                }
            }
            if given.is_empty() {
                continue;
            }
            let mut table = Table([0; TABLE]);
            for (i, grad) in &given {
                same("a gradient", grad.elem_count(), self.flat.lengths[*i])?;
                table.0[i - first] = Held::of(grad)?.view()?.device_ptr(&stream).0;
            }
            let (from, to) = (self.blocks[first], self.blocks[last]);
            if from == to {
                continue;
            }
            count();
            let kernel = UPDATE.get(&self.device, "gather")?;
            let (chunks, first) = (self.chunks.slice(2 * from..2 * to), small(first)?);
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&table).arg(&first).arg(&chunks).arg(&self.starts).arg(&self.lengths);
            launch.arg(&mut *sums);
            // SAFETY: the arguments are those of `gather`; the tensors of the table have as many numbers
            // as their parameters. They are freed, at the earliest, after this on the same stream.
            unsafe { launch.launch(grid(to - from, 1, THREADS, 0)) }.w()?;
        }
        let missing = touched.iter().enumerate().filter(|(_, t)| !**t).map(|(i, _)| i).collect();
        touched.fill(false);
        Ok(missing)
    }

    /// Gradients, padding, and the loss behind them.
    pub fn gradients(&self) -> Result<Vec<f32>> {
        self.device.clone_dtoh(&*self.sums.lock())
    }

    /// The same, put back.
    pub fn replace(&self, all: &[f32]) -> Result<()> {
        self.device.memcpy_htod(all, &mut *self.sums.lock())
    }

    /// One step: `numbers` are rate, shrink, both corrections and how much of the average is kept.
    pub fn update(&self, step: u64, clip: f64, numbers: [f32; 5]) -> Result<()> {
        let mut state = lock(&self.state);
        let State { first, second, average, squares, news } = &mut *state;
        let mut sums = self.sums.lock();
        let (total, stream) = (self.flat.total, self.device.cuda_stream());
        let blocks = total.div_ceil(super::CHUNK);
        let (total_, blocks_, step_) = (small(total)?, small(blocks)?, step as f64);
        let pace = Pace { numbers, yogi: i32::from(self.yogi) };
        {
            count();
            let kernel = UPDATE.get(&self.device, "squares")?;
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&*sums).arg(&mut *squares).arg(&total_);
            // SAFETY: the arguments are those of `squares`; a sum for every block.
            unsafe { launch.launch(grid(blocks, 1, THREADS, 0)) }.w()?;
        }
        {
            count();
            let kernel = UPDATE.get(&self.device, "settle")?;
            let loss = sums.slice(total..total + 1);
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&*squares).arg(&blocks_).arg(&loss).arg(&clip).arg(&step_).arg(&mut *news);
            // SAFETY: the arguments are those of `settle`, which is one block.
            unsafe { launch.launch(grid(1, 1, THREADS, 0)) }.w()?;
        }
        count();
        let kernel = UPDATE.get(&self.device, "update")?;
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&pace).arg(&*news).arg(&self.chunks).arg(&self.starts).arg(&self.lengths);
        launch.arg(&self.table).arg(&mut *sums).arg(first).arg(second).arg(average);
        let blocks = *self.blocks.last().expect("a count of all");
        // SAFETY: the arguments are those of `update`; the table holds the addresses of weights that this
        // keeps, as long as `lengths` says, and nothing else writes to them meanwhile.
        unsafe { launch.launch(grid(blocks, 1, THREADS, 0)) }.w()?;
        Ok(())
    }

    /// What happened since the last call. Waits for the card.
    pub fn news(&self) -> Result<News> {
        let mut state = lock(&self.state);
        let seen = self.device.clone_dtoh(&state.news)?;
        let mut numbers = [0.0; NEWS];
        numbers.copy_from_slice(&seen);
        let mut kept = numbers;
        (kept[0], kept[1]) = (0.0, 0.0);
        self.device.memcpy_htod(&kept[..], &mut state.news)?;
        Ok(News::read(numbers))
    }

    /// First and second moments and the average, parameter by parameter.
    pub fn kept(&self) -> Result<[Vec<Vec<f32>>; 3]> {
        let state = lock(&self.state);
        let read = |x: &CudaSlice<f32>| -> Result<Vec<Vec<f32>>> {
            let all = self.device.clone_dtoh(x)?;
            Ok(self.flat.parts(&all).map(<[f32]>::to_vec).collect())
        };
        Ok([read(&state.first)?, read(&state.second)?, read(&state.average)?])
    }

    /// Sets them.
    pub fn set(&self, [first, second, average]: [Vec<&[f32]>; 3]) -> Result<()> {
        let mut state = lock(&self.state);
        let spread = |x: Vec<&[f32]>| {
            let mut all = self.flat.spread(x.into_iter());
            all.resize(all.len().max(1), 0.0);
            all
        };
        self.device.memcpy_htod(&spread(first), &mut state.first)?;
        self.device.memcpy_htod(&spread(second), &mut state.second)?;
        self.device.memcpy_htod(&spread(average), &mut state.average)
    }
}
