//! From the network's last features to a posterior predictive on the link scale.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::family::Family;
use crate::{
    error::{Error, Result},
    predictive::{Link, Predictive},
};

/// Which predictive family the network ends in.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Head {
    /// Gaussian components: 1 is the plain Gaussian.
    pub components: usize,
    /// Whether the nugget has its own output, so that surface and observation differ.
    pub nugget: bool,
    /// Smallest standard deviation, link scale: `sd = floor + (1 − floor) scale(raw)`.
    pub floor: f64,
    /// How a raw output becomes a standard deviation.
    pub scale: Scale,
    /// What law the outputs are the parameters of.
    pub family: Family,
}

/// How a raw output becomes a standard deviation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// `ln(1 + eʳᵃʷ)`.
    #[default]
    Softplus,
    /// `eʳᵃʷ`, raw between −10 and 10: as published for transformer neural processes.
    Exp,
}

impl Scale {
    /// `raw` → no less than 0, elementwise.
    pub fn positive(self, raw: &Tensor) -> Result<Tensor> {
        match self {
            Scale::Softplus => softplus(raw),
            Scale::Exp => Ok(raw.clamp(-10.0, 10.0)?.exp()?),
        }
    }
}

impl Default for Head {
    fn default() -> Self {
        Head {
            components: 1,
            nugget: true,
            floor: 0.0,
            scale: Scale::Softplus,
            family: Family::Gaussian,
        }
    }
}

/// `ln(1 + eˣ)`, without overflow.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    Ok((x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?)
}

/// `1 / (1 + e⁻ˣ)`, without overflow.
pub fn logistic(x: &Tensor) -> Result<Tensor> {
    Ok((((x * 0.5)?.tanh()? + 1.0)? * 0.5)?)
}

impl Head {
    /// # Errors
    /// [`Error::Input`] for no components or a floor outside [0, 1).
    pub fn check(&self) -> Result<()> {
        if self.components == 0 || !(0.0..1.0).contains(&self.floor) {
            return Err(Error::input(
                "the head needs at least one component and a floor in [0, 1)",
            )
            .fact("components", self.components)
            .fact("floor", self.floor)
            .try_this("set `components = 1` and `floor = 0.0` under [model.head]"));
        }
        if self.family != Family::Gaussian && self.components != 1 {
            return Err(Error::input("only Gaussians are mixed in a head")
                .fact("family", format!("{:?}", self.family))
                .fact("components", self.components)
                .try_this("leave `components` under [model.head] out"));
        }
        self.family.check()
    }

    /// Outputs that the network must provide: means, raw sds, raw nuggets, weights; or the parameters
    /// of another family.
    pub fn outputs(&self) -> usize {
        if self.family != Family::Gaussian {
            return self.family.outputs();
        }
        let mixture = if self.components > 1 { self.components } else { 0 };
        self.components * (2 + usize::from(self.nugget)) + mixture
    }

    /// Raw outputs `[batch, target, outputs]` to a predictive.
    ///
    /// Without a nugget output the observation is given the surface's sd: such a head does not
    /// tell the two apart.
    pub fn predictive(&self, link: Link, raw: &Tensor) -> Result<Predictive> {
        if self.family != Family::Gaussian {
            return self.family.predictive(link, raw);
        }
        let k = self.components;
        let part = |i: usize| raw.narrow(2, i * k, k);
        let mean = part(0)?.contiguous()?;
        // A tiny constant keeps log(sd) finite in f32 where softplus underflows.
        let surface_sd = self.scale.positive(&part(1)?)?;
        let surface_sd = ((surface_sd * (1.0 - self.floor))? + (self.floor + 1e-6))?;
        let observation_sd = match self.nugget {
            true => (surface_sd.sqr()? + self.scale.positive(&part(2)?)?.sqr()?)?.sqrt()?,
            false => surface_sd.clone(),
        };
        let log_weight = if k > 1 {
            let logits = part(2 + usize::from(self.nugget))?;
            logits.broadcast_sub(&logits.log_sum_exp(2)?.unsqueeze(2)?)?
        } else {
            mean.zeros_like()?
        };
        Ok(Predictive { link, log_weight, mean, surface_sd, observation_sd, lift: None, law: None })
    }
}
