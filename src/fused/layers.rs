//! A run of layers on a device that is told one operation after another: what [`super::learn`] is on
//! the CPU, for cards. One node of the graph, with as few launches as the layers allow.
//!
//! A product, its bias, its activation and the addition that follows are two launches. What a layer
//! read is kept for the gradient. Gradients of parameters are added where they will be read: in one
//! buffer for all of them, if there is one.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail,
    op::BackpropOp,
};

use super::learn::Layer;

/// What follows a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Nothing.
    None,
    /// Tanh form.
    Gelu,
    /// max(0, x).
    Relu,
}

/// A device: the operations that layers are made of, on contiguous f32 tensors of its own.
///
/// # Shapes
/// `x` `[rows, inputs]`, `w` `[inputs, outputs]`, `g` and `z` `[rows, outputs]`, the others `[width]`.
pub trait Machine: Send + Sync + 'static {
    /// Where sums of gradients are kept.
    type Sums: Send + Sync + 'static;

    /// `n` zeros to add gradients to.
    fn sums(&self, n: usize) -> Result<Self::Sums>;
    /// What was added up, as a tensor's numbers.
    fn taken(&self, sums: Self::Sums) -> Result<Storage>;

    /// `x W`.
    fn product(&self, x: &Tensor, w: &Tensor) -> Result<Storage>;
    /// `g Wᵀ`.
    fn product_back(&self, g: &Tensor, w: &Tensor) -> Result<Storage>;
    /// `xᵀ g`, added to the sums from `at` on.
    fn product_weights(&self, x: &Tensor, g: &Tensor, to: &Self::Sums, at: usize) -> Result<()>;
    /// `z + bias`, if an activation follows, and `act(z + bias) + residual`.
    fn epilogue(
        &self,
        z: Storage,
        bias: &Tensor,
        residual: Option<&Tensor>,
        act: Act,
    ) -> Result<(Option<Storage>, Storage)>;
    /// `act(x)`.
    fn activate(&self, x: &Tensor, act: Act) -> Result<Storage>;
    /// `a + b`.
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Storage>;
    /// Layer normalisation.
    fn norm(&self, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Storage>;
    /// Its gradient plus `residual`; those of scale and shift are added to the sums from `at` on.
    fn norm_back(
        &self,
        x: &Tensor,
        g: &Tensor,
        scale: &Tensor,
        residual: Option<&Tensor>,
        to: &Self::Sums,
        at: [usize; 2],
    ) -> Result<Storage>;
    /// `g · act′(z)`, nothing without an activation; the sums of its columns are added from `at` on,
    /// if that is given.
    fn slopes(
        &self,
        z: &Tensor,
        g: &Tensor,
        act: Act,
        to: Option<(&Self::Sums, usize)>,
    ) -> Result<Option<Storage>>;
}

/// Where the gradients of a run's parameters go.
pub enum Into<M: Machine> {
    /// Into one buffer, from these places on; the parameters are no inputs of the node.
    Buffer(Arc<M::Sums>, Vec<usize>),
    /// Back through the graph.
    Graph,
}

/// What is added after a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extra {
    /// The other input.
    Other,
    /// What this stage read.
    Read(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A product with parameters `p` and `p + 1`.
    Dense(usize, Act),
    Norm(usize),
    Act(Act),
    Add,
}

/// Layers that are told together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stage {
    kind: Kind,
    extra: Option<Extra>,
}

/// Joins each product with the activation and the addition that follow, unless something else reads
/// what stands between.
fn stages(layers: &[Layer]) -> Vec<Stage> {
    let read = |at: usize| layers.contains(&Layer::PlusRead(at));
    let (mut stages, mut begins, mut params) = (Vec::<Stage>::new(), vec![], 0);
    for (i, layer) in layers.iter().enumerate() {
        let open = if read(i) { None } else { stages.last_mut() };
        let stage_of =
            |layer: usize| begins.iter().position(|b| *b == layer).unwrap_or(begins.len());
        let extra = match layer {
            Layer::Plus => Some(Extra::Other),
            Layer::PlusRead(from) => Some(Extra::Read(stage_of(*from))),
            _ => None,
        };
        let act = match layer {
            Layer::Gelu => Some(Act::Gelu),
            Layer::Relu => Some(Act::Relu),
            _ => None,
        };
        match (open, act, extra) {
            (
                Some(Stage { kind: Kind::Dense(_, before @ Act::None), extra: None }),
                Some(act),
                _,
            ) => {
                *before = act;
                continue;
            }
            (Some(Stage { kind: Kind::Dense(..), extra: before @ None }), _, Some(extra)) => {
                *before = Some(extra);
                continue;
            }
            _ => {}
        }
        let kind = match layer {
            Layer::Dense { .. } => Kind::Dense(params, Act::None),
            Layer::Norm => Kind::Norm(params),
            _ => act.map_or(Kind::Add, Kind::Act),
        };
        if matches!(kind, Kind::Dense(..) | Kind::Norm(_)) {
            params += 2;
        }
        begins.push(i);
        stages.push(Stage { kind, extra });
    }
    stages
}

fn tensor(storage: Storage, rows: usize, width: usize) -> Tensor {
    Tensor::from_storage(storage, (rows, width), BackpropOp::none(), false)
}

/// Runs `input` `[…, width]` through `layers`, as [`super::learn::run`] does, on `machine`.
///
/// # Errors
/// Whatever the device says.
pub fn run<M: Machine>(
    machine: M,
    input: &Tensor,
    other: Option<&Tensor>,
    params: &[&Tensor],
    layers: &[Layer],
    into: Into<M>,
) -> Result<Tensor> {
    let mut dims = input.dims().to_vec();
    let width = dims.pop().unwrap_or(1);
    let rows: usize = dims.iter().product();
    let input = &input.contiguous()?;
    let other = other.map(Tensor::contiguous).transpose()?;
    // Inputs of the node, beside the first: parameters that the graph must know, joined where there
    // are too many; else one of them, so that the node is there at all.
    let joined = match (&into, params) {
        (Into::Buffer(..), [first, ..]) => vec![(*first).clone()],
        (Into::Graph, [a, b]) if other.is_none() => vec![a.contiguous()?, b.contiguous()?],
        (Into::Graph, _) => {
            let flat = params.iter().map(|p| p.flatten_all()).collect::<Result<Vec<_>>>()?;
            vec![Tensor::cat(&flat, 0)?]
        }
        (_, []) => bail!("a run that learns has parameters"),
    };
    let mut at = 0;
    let params: Vec<Tensor> = params
        .iter()
        .enumerate()
        .map(|(i, p)| match (&into, joined.len()) {
            (Into::Graph, 1) => {
                at += p.elem_count();
                joined[0]
                    .detach()
                    .narrow(0, at - p.elem_count(), p.elem_count())?
                    .reshape(p.shape())
            }
            (Into::Graph, _) => Ok(joined[i].detach()),
            _ => p.detach().contiguous(),
        })
        .collect::<Result<_>>()?;
    let inputs: Vec<&Tensor> =
        [Some(input), other.as_ref()].into_iter().flatten().chain(&joined).collect();
    let tracked = inputs.iter().any(|x| x.track_op() || x.is_variable());

    let mut op = Run {
        machine,
        stages: stages(layers),
        params,
        beside: other.is_some(),
        into,
        tape: Mutex::new(Tape::default()),
        answer: Mutex::new(None),
    };
    let flat_other =
        other.as_ref().map(|x| x.detach().reshape((rows, x.elem_count() / rows.max(1))));
    let (storage, width) =
        op.forward(input.detach().reshape((rows, width))?, flat_other.transpose()?, tracked)?;
    dims.push(width);
    let shape = Shape::from(dims);
    if !tracked {
        return Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false));
    }
    // Three inputs, always: the last is named twice where there are two.
    let third = inputs.get(2).unwrap_or(&inputs[1]);
    op.beside &= inputs.len() > 2;
    op.answer = Mutex::new(Some((storage, shape)));
    inputs[0].apply_op3(inputs[1], third, op)
}

/// What stages read, and what stood before activations.
#[derive(Default)]
struct Tape {
    read: Vec<Tensor>,
    before: Vec<Option<Tensor>>,
}

struct Run<M: Machine> {
    machine: M,
    stages: Vec<Stage>,
    params: Vec<Tensor>,
    /// Whether the second input is what is added, and the third holds parameters.
    beside: bool,
    into: Into<M>,
    tape: Mutex<Tape>,
    /// What the layers gave, until the node is made of it.
    answer: Mutex<Option<(Storage, Shape)>>,
}

impl<M: Machine> Run<M> {
    fn answer(&self) -> Result<(Storage, Shape)> {
        match self.answer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(answer) => Ok(answer),
            None => bail!("the node of a run is made once, with its answer"),
        }
    }

    /// The last stage's numbers, and how many a row has.
    fn forward(&self, x: Tensor, other: Option<Tensor>, keep: bool) -> Result<(Storage, usize)> {
        let (rows, m) = (x.dim(0)?, &self.machine);
        let mut tape = Tape::default();
        // What is read again, if nothing is kept.
        let needed = |stage: usize| {
            keep || self.stages[stage..].iter().any(|s| s.extra == Some(Extra::Read(stage)))
        };
        let mut now = x;
        for (i, stage) in self.stages.iter().enumerate() {
            let residual = match stage.extra {
                None => None,
                Some(Extra::Read(from)) if from == i => Some(&now),
                Some(Extra::Read(from)) => Some(&tape.read[from]),
                Some(Extra::Other) => match &other {
                    Some(other) => Some(other),
                    None => bail!("a run adds an input that it was not given"),
                },
            };
            let (mut before, width, mut y);
            match stage.kind {
                Kind::Dense(p, act) => {
                    width = self.params[p].dim(1)?;
                    let z = m.product(&now, &self.params[p])?;
                    (before, y) = m.epilogue(z, &self.params[p + 1], residual, act)?;
                }
                Kind::Norm(p) => {
                    (before, width) = (None, now.dim(1)?);
                    y = m.norm(&now, &self.params[p], &self.params[p + 1])?;
                    if let Some(residual) = residual {
                        y = m.add(&tensor(y, rows, width), residual)?;
                    }
                }
                Kind::Act(act) => {
                    (before, width) = (None, now.dim(1)?);
                    y = m.activate(&now, act)?;
                    if let Some(residual) = residual {
                        y = m.add(&tensor(y, rows, width), residual)?;
                    }
                }
                Kind::Add => {
                    (before, width) = (None, now.dim(1)?);
                    let Some(residual) = residual else { bail!("nothing to add") };
                    y = m.add(&now, residual)?;
                }
            }
            if !keep {
                before = None;
            }
            tape.before.push(before.map(|z| tensor(z, rows, width)));
            // What is not read again is not held: some other memory stands for it.
            tape.read.push(if needed(i) { now } else { self.params[0].clone() });
            if i + 1 == self.stages.len() {
                if keep {
                    *self.tape.lock().unwrap_or_else(PoisonError::into_inner) = tape;
                }
                return Ok((y, width));
            }
            now = tensor(y, rows, width);
        }
        bail!("a run has a layer")
    }

    /// Gradients of the input (if wanted) and of the other one; those of parameters are added to
    /// `sums`, from `at` on.
    fn backward(
        &self,
        grad: &Tensor,
        whole: bool,
        sums: &M::Sums,
        at: &[usize],
    ) -> Result<[Option<Tensor>; 2]> {
        let m = &self.machine;
        let tape = std::mem::take(&mut *self.tape.lock().unwrap_or_else(PoisonError::into_inner));
        if tape.read.len() != self.stages.len() {
            bail!("a run gives its gradient once");
        }
        let rows = tape.read[0].dim(0)?;
        let mut g = grad.contiguous()?.reshape((rows, grad.elem_count() / rows.max(1)))?;
        let mut around: Vec<Option<Tensor>> = vec![None; self.stages.len()];
        let mut other = None;
        for (i, stage) in self.stages.iter().enumerate().rev() {
            let x = &tape.read[i];
            match stage.extra {
                None => {}
                Some(Extra::Other) => other = Some(g.clone()),
                Some(Extra::Read(from)) => {
                    let width = g.dim(1)?;
                    around[from] = Some(match around[from].take() {
                        Some(before) => tensor(m.add(&before, &g)?, rows, width),
                        None => g.clone(),
                    });
                }
            }
            let back = around[i].take();
            let wanted = i > 0 || whole;
            match stage.kind {
                Kind::Dense(p, act) => {
                    let (inputs, outputs) = self.params[p].dims2()?;
                    let z = tape.before[i].as_ref().unwrap_or(&g);
                    if let Some(dz) = m.slopes(z, &g, act, Some((sums, at[p + 1])))? {
                        g = tensor(dz, rows, outputs);
                    }
                    m.product_weights(x, &g, sums, at[p])?;
                    if wanted {
                        g = tensor(m.product_back(&g, &self.params[p])?, rows, inputs);
                        if let Some(back) = back {
                            g = tensor(m.add(&g, &back)?, rows, inputs);
                        }
                    }
                }
                Kind::Norm(p) => {
                    let width = x.dim(1)?;
                    let at = [at[p], at[p + 1]];
                    let dx = m.norm_back(x, &g, &self.params[p], back.as_ref(), sums, at)?;
                    g = tensor(dx, rows, width);
                }
                Kind::Act(_) | Kind::Add => {
                    let width = x.dim(1)?;
                    if let Kind::Act(act) = stage.kind
                        && let Some(dx) = m.slopes(x, &g, act, None)?
                    {
                        g = tensor(dx, rows, width);
                    }
                    if let Some(back) = back {
                        g = tensor(m.add(&g, &back)?, rows, width);
                    }
                }
            }
        }
        Ok([whole.then_some(g), other])
    }
}

impl<M: Machine> CustomOp3 for Run<M> {
    fn name(&self) -> &'static str {
        "layers"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.answer()? {
            (Storage::Cpu(answer), shape) => Ok((answer, shape)),
            _ => bail!("a run is on one device"),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        match self.answer()? {
            (Storage::Cuda(answer), shape) => Ok((answer, shape)),
            _ => bail!("a run is on one device"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        second: &Tensor,
        third: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let whole = x.track_op() || x.is_variable();
        let shaped = |g: Tensor, like: &Tensor| g.reshape(like.shape());
        let (mut at, mut starts) = (0, Vec::with_capacity(self.params.len()));
        let (sums, places) = match &self.into {
            Into::Buffer(sums, places) => {
                let [dx, other] = self.backward(grad, whole, sums, places)?;
                let dx = dx.map(|g| shaped(g, x)).transpose()?;
                // What is not added is a parameter, whose gradient is in the buffer.
                let other = if self.beside { other } else { None };
                return Ok((dx, other.map(|g| shaped(g, second)).transpose()?, None));
            }
            Into::Graph => {
                for p in &self.params {
                    starts.push(at);
                    at += p.elem_count();
                }
                (self.machine.sums(at)?, starts)
            }
        };
        let [dx, other] = self.backward(grad, whole, &sums, &places)?;
        let dx = dx.map(|g| shaped(g, x)).transpose()?;
        let flat = self.machine.taken(sums)?;
        let flat = Tensor::from_storage(flat, at, BackpropOp::none(), false);
        if self.beside {
            return Ok((dx, other.map(|g| shaped(g, second)).transpose()?, Some(flat)));
        }
        if self.params.len() == 2 && second.id() != third.id() {
            let first = self.params[0].elem_count();
            let [a, b] = [flat.narrow(0, 0, first)?, flat.narrow(0, first, at - first)?];
            return Ok((dx, Some(shaped(a, second)?), Some(shaped(b, third)?)));
        }
        Ok((dx, Some(flat), None))
    }
}
