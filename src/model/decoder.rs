//! From what is known of the context, and a site, to the raw outputs of a head.
//!
//! An MLP over several inputs side by side. Its first layer is a sum of one product for each, so
//! that what all targets share, or all samples of a latent, is multiplied once and not once each.

use candle_core::Tensor;

use super::{
    layer::{Activation, Chain, Dense, Mlp},
    params::{Init, Scope},
    pool::widths,
};
use crate::error::{Error, Result};

/// An MLP whose input comes in parts.
#[derive(Debug)]
pub struct Decoder {
    parts: Vec<Dense>,
    rest: Mlp,
    activation: Activation,
}

impl Decoder {
    /// Reads `parts` of so many features each, named for their weights; the first has the bias.
    /// `layers` dense layers of `width` in all, at least two.
    ///
    /// # Errors
    /// [`Error::Input`] for fewer layers than two.
    pub fn new(
        scope: &mut Scope,
        parts: &[(&str, usize)],
        width: usize,
        layers: usize,
        outputs: usize,
        activation: Activation,
    ) -> Result<Self> {
        if layers < 2 || width == 0 {
            return Err(Error::input("a decoder needs a hidden layer of some width")
                .fact("width", width)
                .fact("hidden layers", layers.saturating_sub(1))
                .try_this("give `width` and `decode` under [model] at least 1"));
        }
        // All parts together are the layer's input.
        let inputs: usize = parts.iter().map(|(_, width)| width).sum();
        let init = Init::Normal((1.0 / inputs as f64).sqrt());
        let mut first = Vec::with_capacity(parts.len());
        for (i, (name, inputs)) in parts.iter().enumerate() {
            let mut scope = scope.at(name);
            first.push(match i {
                0 => Dense::new(&mut scope, *inputs, width, &init)?,
                _ => Dense::linear(&mut scope, *inputs, width, &init)?,
            });
        }
        let rest = widths(width, width, layers - 1, outputs);
        Ok(Decoder {
            parts: first,
            rest: Mlp::new(&mut scope.at("rest"), &rest, activation, &Init::LeCun)?,
            activation,
        })
    }

    /// What part number `part` adds to the first layer: `[…, features]` → `[…, width]`.
    pub fn part(&self, part: usize, x: &Tensor) -> Result<Tensor> {
        self.parts[part].forward(x)
    }

    /// The layers after the first, from the sum of its parts: `[…, width]` → `[…, outputs]`.
    pub fn rest(&self, sum: &Tensor) -> Result<Tensor> {
        Chain::new(sum).activation(self.activation).mlp(&self.rest).run()
    }

    /// Features of its layers.
    pub fn width(&self) -> usize {
        self.parts[0].outputs()
    }
}
