//! Dense layers, layer normalisation and small MLPs, allocated by name.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::params::{Init, Scope};
use crate::{error::Result, fused};

/// `x W + b`.
#[derive(Debug)]
pub struct Dense {
    weight: Tensor,
    bias: Tensor,
}

impl Dense {
    /// `inputs → outputs`, weights by `init`, bias 0.
    pub fn new(scope: &mut Scope, inputs: usize, outputs: usize, init: &Init) -> Result<Self> {
        Ok(Dense {
            weight: scope.get("weight", &[inputs, outputs], init)?,
            bias: scope.get("bias", &[outputs], &Init::Constant(0.0))?,
        })
    }

    /// `[…, inputs]` → `[…, outputs]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(fused::linear(x, &self.weight, &self.bias)?)
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

    /// The most features that any layer reads or gives.
    pub fn widest(&self) -> usize {
        self.layers.iter().flat_map(|l| l.weight.dims()).max().copied().unwrap_or(0)
    }

    /// `[…, in]` → `[…, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.layers[0].forward(x)?;
        for layer in &self.layers[1..] {
            x = layer.forward(&self.activation.forward(&x)?)?;
        }
        Ok(x)
    }
}
