//! Convolutional layers and networks over rasters `[batch, row, column, channel]`.
//!
//! Sources: the networks of Gordon et al. (2020), arXiv:1910.13556; a U-Net is that of Ronneberger
//! et al. (2015), arXiv:1505.04597. Two departures: the raster is doubled and then convolved where
//! the authors transpose (Odena et al. 2016, doi:10.23915/distill.00003), and the first layer of
//! a U-Net keeps the raster's size.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::params::{Init, Scope};
use crate::{
    error::Result,
    fused::{self, conv::Window},
};

/// A convolution, with or without relu.
#[derive(Debug)]
pub struct Conv {
    weight: Tensor,
    bias: Tensor,
    window: Window,
    relu: bool,
}

impl Conv {
    /// `inputs → outputs` channels, Glorot normal.
    pub fn new(
        scope: &mut Scope,
        window: Window,
        inputs: usize,
        outputs: usize,
        relu: bool,
    ) -> Result<Self> {
        let cells = window.kernel[0] * window.kernel[1];
        let sd = (2.0 / (cells * (inputs + outputs)) as f64).sqrt();
        Ok(Conv {
            weight: scope.get("weight", &[cells * inputs, outputs], &Init::Normal(sd))?,
            // Away from 0: where nothing was seen, all that relu is given is a bias.
            bias: scope.get("bias", &[outputs], &Init::Normal(0.05))?,
            window,
            relu,
        })
    }

    /// `[batch, row, column, inputs]` → `[batch, row, column, outputs]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(fused::conv(x, &self.weight, &self.bias, self.window, self.relu)?)
    }
}

/// Which network looks at the raster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Four layers of 2, 4, 2 and 1 times the width: the authors' small network.
    Plain,
    /// A U-Net: the authors' XL network.
    Unet,
}

/// A network over rasters that keeps their size.
#[derive(Debug)]
pub enum Network {
    /// Layer after layer.
    Plain(Vec<Conv>),
    /// Down and up again, with what was there on the way down beside it.
    Unet {
        /// From the raster to the coarsest.
        down: Vec<Conv>,
        /// From the coarsest to the raster, last first.
        up: Vec<Conv>,
    },
}

impl Network {
    /// A network that reads `width` channels; `kernel` rows and columns, `levels` of a U-Net.
    /// On a line rasters have one row.
    pub fn new(
        scope: &mut Scope,
        kind: Kind,
        line: bool,
        kernel: usize,
        width: usize,
        levels: usize,
    ) -> Result<Self> {
        let both = |n: usize| [if line { 1 } else { n }, n];
        let same = Window::new(both(kernel));
        if kind == Kind::Plain {
            let widths = [width, 2 * width, 4 * width, 2 * width, width];
            let layers = widths
                .windows(2)
                .enumerate()
                .map(|(i, w)| Conv::new(&mut scope.at(&i.to_string()), same, w[0], w[1], true))
                .collect::<Result<_>>()?;
            return Ok(Network::Plain(layers));
        }
        // Channels of the raster, and after each layer down: 1, 1, 2, 2, 4, 4, 8 times the width.
        let at = |level: usize| width << (level / 2);
        let (mut down, mut up) = (Vec::new(), Vec::new());
        for i in 0..levels {
            let factor = if i == 0 { 1 } else { 2 };
            let halved = Window { stride: both(factor), ..same };
            let doubled = Window { repeat: both(factor), ..same };
            let beside = if i + 1 == levels { 1 } else { 2 };
            let (mut scope_down, into) = (scope.at(&format!("down.{i}")), at(i + 1));
            down.push(Conv::new(&mut scope_down, halved, at(i), into, true)?);
            let mut scope_up = scope.at(&format!("up.{i}"));
            up.push(Conv::new(&mut scope_up, doubled, beside * into, at(i), true)?);
        }
        Ok(Network::Unet { down, up })
    }

    /// What rows and columns must be a multiple of.
    pub fn multiple(&self) -> usize {
        match self {
            Network::Plain(_) => 1,
            Network::Unet { down, .. } => 1 << (down.len() - 1),
        }
    }

    /// Channels that it gives, of `width` that it reads.
    pub fn outputs(&self, width: usize) -> usize {
        match self {
            Network::Plain(_) => width,
            Network::Unet { .. } => 2 * width,
        }
    }

    /// `[batch, row, column, width]` → `[batch, row, column, outputs]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Network::Plain(layers) => layers.iter().try_fold(x.clone(), |x, l| l.forward(&x)),
            Network::Unet { down, up } => {
                let mut left = vec![x.clone()];
                for layer in down {
                    left.push(layer.forward(left.last().expect("the raster"))?);
                }
                let mut y = left.pop().expect("a level");
                for (layer, beside) in up.iter().zip(&left).rev() {
                    y = Tensor::cat(&[&layer.forward(&y)?, beside], 3)?;
                }
                Ok(y)
            }
        }
    }
}
