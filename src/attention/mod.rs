//! Attention over a context: one signature, several ways to compute it.

use candle_core::Tensor;

use crate::error::{Error, Result};

mod backward;
pub mod bias;
mod cuda;
mod full;
mod ordered;
mod performer;
mod reader;
mod scan;
mod table;
pub mod time;

pub use bias::{Bias, Metric, Radial, Term};
pub(crate) use cuda::DeepKernel;
pub use full::{full, full_in_time};
pub use ordered::ordered;
pub use performer::{Performer, Summed};
pub use reader::{Precision, Reader, Reading, Tally};
pub(crate) use scan::scan_joined;
pub use scan::{CHUNK, Start, scan, scan_in_time};
pub use time::{InTime, ROUNDS, Rounds};

/// The context as attention sees it: keys and values packed side by side, sites and mask.
#[derive(Debug, Clone)]
pub struct Keys {
    /// `[batch, context, head, d + w]`: each head's key, then its value.
    pub packed: Tensor,
    /// Key width d.
    pub width: usize,
    /// `[batch, context, dim]`, model units.
    pub sites: Tensor,
    /// `[batch, context]`, 1 = observed.
    pub mask: Tensor,
    /// What the kernels of a GPU multiply; every other way of computing is f32.
    pub(crate) precision: Precision,
}

impl Keys {
    /// Packs keys `[batch, context, head, d]` with values `[batch, context, head, w]`.
    ///
    /// # Errors
    /// [`Error::Axis`] if two arguments disagree about an axis they share.
    pub fn pack(k: &Tensor, v: &Tensor, sites: &Tensor, mask: &Tensor) -> Result<Self> {
        let (kd, vd) = (k.dims(), v.dims());
        if kd[..3] != vd[..3] {
            return Err(Error::axis("keys and values", format!("{kd:?}"), format!("{vd:?}")));
        }
        if sites.dims()[..2] != kd[..2] || mask.dims() != &kd[..2] {
            return Err(Error::axis(
                "keys against sites and mask, [batch, context]",
                format!("{:?}", &kd[..2]),
                format!("{:?} and {:?}", sites.dims(), mask.dims()),
            ));
        }
        Ok(Keys {
            packed: Tensor::cat(&[k, v], 3)?,
            width: kd[3],
            sites: sites.contiguous()?,
            mask: mask.contiguous()?,
            precision: Precision::F32,
        })
    }

    /// The same, for the kernels of a GPU to read in `precision`. Only where gradients are not asked for.
    pub fn read_in(self, precision: Precision) -> Self {
        Keys { precision, ..self }
    }

    /// The same from what is packed already: `[batch, context, head, d + w]`, keys `width` wide.
    pub(crate) fn joined(
        packed: Tensor,
        width: usize,
        sites: &Tensor,
        mask: &Tensor,
    ) -> Result<Self> {
        let (sites, mask) = (sites.contiguous()?, mask.contiguous()?);
        Ok(Keys { packed, width, sites, mask, precision: Precision::F32 })
    }

    /// Keys `[batch, context, head, d]`.
    pub fn k(&self) -> Result<Tensor> {
        Ok(self.packed.narrow(3, 0, self.width)?)
    }

    /// Values `[batch, context, head, w]`.
    pub fn v(&self) -> Result<Tensor> {
        Ok(self.packed.narrow(3, self.width, self.value_width())?)
    }

    /// Value width w.
    pub fn value_width(&self) -> usize {
        self.packed.dims()[3] - self.width
    }

    /// Sites in each row, padding included.
    pub fn len(&self) -> usize {
        self.packed.dims()[1]
    }

    /// No context at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
