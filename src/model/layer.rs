//! Dense layers, layer normalisation and small MLPs, allocated by name; and runs of them.

use std::sync::OnceLock;

use candle_core::{D, DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::params::{Init, Scope};
use crate::{
    error::Result,
    fused::{
        self, Host, learn,
        matrix::{self, View},
        mlp::{self, Packed, Rows, Step},
    },
};

/// `x W + b`.
#[derive(Debug)]
pub struct Dense {
    weight: Tensor,
    bias: Tensor,
    packed: OnceLock<Box<Packed>>,
}

impl Dense {
    /// `inputs → outputs`, weights by `init`, bias 0.
    pub fn new(scope: &mut Scope, inputs: usize, outputs: usize, init: &Init) -> Result<Self> {
        Ok(Dense {
            weight: scope.get("weight", &[inputs, outputs], init)?,
            bias: scope.get("bias", &[outputs], &Init::Constant(0.0))?,
            packed: OnceLock::new(),
        })
    }

    /// `inputs → outputs` without a bias: `x W`.
    pub fn linear(scope: &mut Scope, inputs: usize, outputs: usize, init: &Init) -> Result<Self> {
        let weight = scope.get("weight", &[inputs, outputs], init)?;
        let bias = Tensor::zeros(outputs, weight.dtype(), weight.device())?;
        Ok(Dense { weight, bias, packed: OnceLock::new() })
    }

    /// `[…, inputs]` → `[…, outputs]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Chain::new(x).dense(self).run()
    }

    /// W, `[inputs, outputs]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Features that it gives.
    pub fn outputs(&self) -> usize {
        self.bias.elem_count()
    }

    /// Where its weights are, and in what precision.
    pub fn place(&self) -> (&Device, DType) {
        (self.weight.device(), self.weight.dtype())
    }

    /// This layer and another of the same input as one, that gives what the two give in `parts`
    /// parts each, part beside part.
    pub fn beside(&self, other: &Dense, parts: usize) -> Result<Dense> {
        let join = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
            let (a, b) = (
                a.reshape(((), parts, self.outputs() / parts))?,
                b.reshape(((), parts, other.outputs() / parts))?,
            );
            Ok(Tensor::cat(&[a, b], 2)?)
        };
        Ok(Dense {
            weight: join(&self.weight, &other.weight)?.flatten_from(1)?,
            bias: join(&self.bias, &other.bias)?.flatten_all()?,
            packed: OnceLock::new(),
        })
    }

    /// The weights as the fused run reads them, kept; nothing if they may still change.
    fn packed(&self) -> Result<Option<&Packed>> {
        if !fused::asked(&self.weight) || !fused::asked(&self.bias) {
            return Ok(None);
        }
        if self.packed.get().is_none() {
            let (weight, bias) = (self.weight.contiguous()?, self.bias.contiguous()?);
            let (inputs, outputs) = weight.dims2()?;
            let bias = Host::of(&bias)?;
            let packed = Packed::new(&Host::of(&weight)?, inputs, outputs, Some(&bias));
            let _ = self.packed.set(Box::new(packed));
        }
        Ok(self.packed.get().map(Box::as_ref))
    }
}

/// Layer normalisation with learned scale and shift.
#[derive(Debug)]
pub struct Norm {
    scale: Tensor,
    shift: Tensor,
}

impl Norm {
    /// Over a last axis of `width`.
    pub fn new(scope: &mut Scope, width: usize) -> Result<Self> {
        Ok(Norm {
            scale: scope.get("scale", &[width], &Init::Constant(1.0))?,
            shift: scope.get("bias", &[width], &Init::Constant(0.0))?,
        })
    }

    /// `[…, width]` → the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(fused::layer_norm(x, &self.scale, &self.shift)?)
    }
}

/// What stands between the layers of an [`Mlp`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// Tanh form.
    Gelu,
    /// max(0, x).
    Relu,
}

impl Activation {
    fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Activation::Gelu => fused::gelu(x)?,
            Activation::Relu => x.relu()?,
        })
    }
}

/// Dense layers with an activation between, none after the last.
#[derive(Debug)]
pub struct Mlp {
    layers: Vec<Dense>,
    activation: Activation,
}

impl Mlp {
    /// Through `widths`: `[in, hidden, …, out]`.
    pub fn new(
        scope: &mut Scope,
        widths: &[usize],
        activation: Activation,
        init: &Init,
    ) -> Result<Self> {
        let layers = widths
            .windows(2)
            .enumerate()
            .map(|(i, w)| Dense::new(&mut scope.at(&i.to_string()), w[0], w[1], init))
            .collect::<Result<_>>()?;
        Ok(Mlp { layers, activation })
    }

    /// Its layer, if it has only one.
    pub fn alone(&self) -> Option<&Dense> {
        match &self.layers[..] {
            [layer] => Some(layer),
            _ => None,
        }
    }

    /// Weights and biases of both layers, if there are two and GELU is between.
    pub fn gelu_pair(&self) -> Option<[[&Tensor; 2]; 2]> {
        match (&self.layers[..], self.activation) {
            ([a, b], Activation::Gelu) => Some([[&a.weight, &a.bias], [&b.weight, &b.bias]]),
            _ => None,
        }
    }

    /// Where its weights are, and in what precision.
    pub fn place(&self) -> (&Device, DType) {
        self.last().place()
    }

    /// Features that the last layer gives.
    pub fn outputs(&self) -> usize {
        self.last().bias.elem_count()
    }

    fn last(&self) -> &Dense {
        self.layers.last().expect("an MLP has a layer")
    }

    /// The most features that any layer reads or gives.
    pub fn widest(&self) -> usize {
        self.layers.iter().flat_map(|l| l.weight.dims()).max().copied().unwrap_or(0)
    }

    /// `[…, in]` → `[…, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Chain::new(x).mlp(self).run()
    }
}

/// A matrix for each row of a batch, `[batch, features, width]`, that the output of an MLP is
/// multiplied by.
#[derive(Debug)]
pub struct Summary {
    matrix: Tensor,
    packed: Option<Vec<Packed>>,
}

impl Summary {
    /// `matrix` for what `mlp` will give. Nothing stands between the two products, so that they
    /// are made one here, once for any number of sites.
    pub fn new(matrix: Tensor, mlp: &Mlp) -> Result<Self> {
        let matrix = matrix.contiguous()?;
        let (_, features, width) = matrix.dims3()?;
        let last = mlp.last();
        let asked = [&matrix, &last.weight, &last.bias].into_iter().all(fused::asked);
        if !asked || mlp.outputs() != features {
            return Ok(Summary { matrix, packed: None });
        }
        let inputs = last.weight.dim(0)?;
        let [weight, bias] = [last.weight.contiguous()?, last.bias.contiguous()?];
        let (weight, bias, each) = (Host::of(&weight)?, Host::of(&bias)?, Host::of(&matrix)?);
        let pack = |matrix: &[f32]| {
            let times = |x: &[f32], rows: usize| {
                let mut out = vec![0.0; rows * width];
                let x = View::new(x, rows, features, features);
                let matrix = View::new(matrix, features, width, width);
                matrix::product(&mut out, width, 0.0, 1.0, x, matrix, false);
                out
            };
            Packed::new(&times(&weight, inputs), inputs, width, Some(&times(&bias, 1)))
        };
        let packed = each.chunks_exact((features * width).max(1)).map(pack).collect();
        drop(each);
        Ok(Summary { matrix, packed: Some(packed) })
    }
}

/// Layers one after another, said once: fused where nothing is learned, so that no intermediate
/// result is ever held whole; tensor by tensor elsewhere.
#[derive(Debug)]
pub struct Chain<'a> {
    input: &'a Tensor,
    links: Vec<Link<'a>>,
}

#[derive(Debug)]
enum Link<'a> {
    Dense(&'a Dense),
    Activation(Activation),
    Norm(&'a Norm),
    /// The last layer of an MLP, and the product with what it gives.
    Times(&'a Dense, &'a Summary),
    Join(&'a Tensor),
    Plus(&'a Tensor),
    Scale(&'a Tensor),
    Keep,
    AddKept,
}

impl<'a> Chain<'a> {
    /// Starts with `input` `[…, width]`.
    pub fn new(input: &'a Tensor) -> Self {
        Chain { input, links: Vec::new() }
    }

    fn and(mut self, link: Link<'a>) -> Self {
        self.links.push(link);
        self
    }

    /// Through a dense layer.
    pub fn dense(self, layer: &'a Dense) -> Self {
        self.and(Link::Dense(layer))
    }

    /// Through an MLP.
    pub fn mlp(mut self, mlp: &'a Mlp) -> Self {
        for (i, layer) in mlp.layers.iter().enumerate() {
            if i > 0 {
                self.links.push(Link::Activation(mlp.activation));
            }
            self.links.push(Link::Dense(layer));
        }
        self
    }

    /// Through an activation.
    pub fn activation(self, activation: Activation) -> Self {
        self.and(Link::Activation(activation))
    }

    /// Normalised.
    pub fn norm(self, norm: &'a Norm) -> Self {
        self.and(Link::Norm(norm))
    }

    /// Through the MLP that `summary` was made for, and times the matrix of their row of the
    /// batch; the values are then `[batch, site, width]`.
    pub fn summary(self, mlp: &'a Mlp, summary: &'a Summary) -> Self {
        let mut chain = self.mlp(mlp);
        chain.links.pop();
        chain.and(Link::Times(mlp.last(), summary))
    }

    /// With the values of `other` before them.
    pub fn join(self, other: &'a Tensor) -> Self {
        self.and(Link::Join(other))
    }

    /// Plus `other`.
    pub fn plus(self, other: &'a Tensor) -> Self {
        self.and(Link::Plus(other))
    }

    /// Each site times a number of its own: `factors` `[…, 1]`.
    pub fn scale(self, factors: &'a Tensor) -> Self {
        self.and(Link::Scale(factors))
    }

    /// Remembers the values for [`Chain::add_kept`].
    pub fn keep(self) -> Self {
        self.and(Link::Keep)
    }

    /// Plus what was kept last.
    pub fn add_kept(self) -> Self {
        self.and(Link::AddKept)
    }

    /// The values at the end, `[…, width]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn run(&self) -> Result<Tensor> {
        if let Some(fused) = self.fused()? {
            return Ok(fused);
        }
        match self.learning()? {
            Some(fused) => Ok(fused),
            None => self.composed(),
        }
    }

    /// The run as one operation with a gradient; nothing where it does not apply.
    fn learning(&self) -> Result<Option<Tensor>> {
        let host = fused::applies(self.input);
        let (mut layers, mut params, mut other, mut kept) = (vec![], vec![], None, 0);
        for link in &self.links {
            layers.push(match link {
                Link::Dense(dense) => {
                    params.extend([&dense.weight, &dense.bias]);
                    let (inputs, outputs) = dense.weight.dims2()?;
                    learn::Layer::Dense { inputs, outputs }
                }
                Link::Activation(Activation::Gelu) => learn::Layer::Gelu,
                Link::Activation(Activation::Relu) => learn::Layer::Relu,
                Link::Norm(norm) => {
                    params.extend([&norm.scale, &norm.shift]);
                    learn::Layer::Norm
                }
                Link::Plus(x) if other.is_none() => {
                    other = Some(*x);
                    learn::Layer::Plus
                }
                Link::Keep => {
                    kept = layers.len();
                    continue;
                }
                Link::AddKept => learn::Layer::PlusRead(kept),
                _ => return Ok(None),
            });
        }
        if params.is_empty() {
            return Ok(None);
        }
        if !host {
            return Ok(learn::on_card(self.input, other, &params, || Ok(layers)).transpose()?);
        }
        if !params.iter().chain(&other).all(|x| fused::applies(x)) {
            return Ok(None);
        }
        Ok(Some(learn::run(self.input, other, &params, layers)?))
    }

    /// The fused run; nothing where it does not apply.
    fn fused(&self) -> Result<Option<Tensor>> {
        // What the kernel reads beside packed weights, whole and in the order of the links.
        let mut read = vec![self.input.contiguous()?];
        for link in &self.links {
            match link {
                Link::Join(x) | Link::Plus(x) | Link::Scale(x) => read.push(x.contiguous()?),
                Link::Norm(norm) => {
                    read.extend([norm.scale.contiguous()?, norm.shift.contiguous()?])
                }
                _ => {}
            }
        }
        if !read.iter().all(fused::asked) {
            return Ok(None);
        }
        let read: Vec<(Host, usize)> =
            read.iter().map(|x| Ok((Host::of(x)?, x.dim(D::Minus1)?))).collect::<Result<_>>()?;
        let mut read = read.iter().map(|(values, width)| Rows { values, width: *width });
        let mut next = || read.next().expect("one for every link that reads");
        let (input, mut items) = (next(), 1);
        let mut steps = Vec::with_capacity(self.links.len());
        for link in &self.links {
            steps.push(match link {
                Link::Dense(layer) => match layer.packed()? {
                    Some(packed) => Step::Dense(packed),
                    None => return Ok(None),
                },
                Link::Times(_, summary) => match &summary.packed {
                    Some(packed) => {
                        items = packed.len();
                        Step::Each(packed)
                    }
                    None => return Ok(None),
                },
                Link::Activation(Activation::Gelu) => Step::Gelu,
                Link::Activation(Activation::Relu) => Step::Relu,
                Link::Norm(_) => Step::Norm(next().values, next().values),
                Link::Join(_) => Step::Join(next()),
                Link::Plus(_) => Step::Plus(next()),
                Link::Scale(_) => Step::Scale(next()),
                Link::Keep => Step::Keep,
                Link::AddKept => Step::AddKept,
            });
        }
        let mut shape = self.input.dims().to_vec();
        let rows = shape[..shape.len() - 1].iter().product::<usize>();
        let (values, width) = mlp::run(input, items, rows, &steps)?;
        *shape.last_mut().expect("a width") = width;
        Ok(Some(Tensor::from_vec(values, shape, self.input.device())?))
    }

    /// Tensor by tensor, with gradients: the reference for the fused run.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn composed(&self) -> Result<Tensor> {
        let mut x = self.input.clone();
        let mut kept = x.clone();
        for link in &self.links {
            x = match link {
                Link::Dense(layer) => fused::linear(&x, &layer.weight, &layer.bias)?,
                Link::Activation(activation) => activation.forward(&x)?,
                Link::Norm(norm) => norm.forward(&x)?,
                Link::Times(layer, summary) => {
                    fused::linear(&x, &layer.weight, &layer.bias)?.matmul(&summary.matrix)?
                }
                Link::Join(other) => Tensor::cat(&[*other, &x], D::Minus1)?,
                Link::Plus(other) => (x + *other)?,
                Link::Scale(factors) => x.broadcast_mul(factors)?,
                Link::Keep => {
                    kept = x.clone();
                    x
                }
                Link::AddKept => (&kept + x)?,
            };
        }
        Ok(x)
    }
}
