//! Dense layers, layer normalisation and small MLPs, allocated by name; and runs of them.

use std::sync::OnceLock;

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

use super::params::{Init, Scope};
use crate::{
    error::Result,
    fused::{
        self, Host,
        mlp::{self, Packed, Rows, Step},
    },
};

/// `x W + b`.
#[derive(Debug)]
pub struct Dense {
    weight: Tensor,
    bias: Tensor,
    packed: OnceLock<Packed>,
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

    /// `[…, inputs]` → `[…, outputs]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Chain::new(x).dense(self).run()
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
            let _ = self.packed.set(Packed::new(&Host::of(&weight)?, inputs, outputs, Some(&bias)));
        }
        Ok(self.packed.get())
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

    /// Features that the last layer gives.
    pub fn outputs(&self) -> usize {
        self.layers.last().map_or(0, |l| l.bias.elem_count())
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

/// A matrix for each row of a batch, `[batch, in, out]`, that many sites are multiplied by.
#[derive(Debug)]
pub struct Summary {
    matrix: Tensor,
    packed: Option<Vec<Packed>>,
}

impl Summary {
    /// `matrix` `[batch, in, out]`.
    pub fn new(matrix: Tensor) -> Result<Self> {
        let matrix = matrix.contiguous()?;
        let (_, inputs, outputs) = matrix.dims3()?;
        let packed = match fused::asked(&matrix) {
            true => {
                let pack = |w: &[f32]| Packed::new(w, inputs, outputs, None);
                Some(Host::of(&matrix)?.chunks_exact(inputs * outputs).map(pack).collect())
            }
            false => None,
        };
        Ok(Summary { matrix, packed })
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
    Times(&'a Summary),
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

    /// Normalised.
    pub fn norm(self, norm: &'a Norm) -> Self {
        self.and(Link::Norm(norm))
    }

    /// Times the matrix of their row of the batch; the values are then `[batch, site, in]`.
    pub fn times(self, summary: &'a Summary) -> Self {
        self.and(Link::Times(summary))
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
        match self.fused()? {
            Some(fused) => Ok(fused),
            None => self.composed(),
        }
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
                Link::Times(summary) => match &summary.packed {
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
                Link::Times(summary) => x.matmul(&summary.matrix)?,
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
