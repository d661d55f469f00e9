//! Priors: laws of surfaces, from which training draws. Registry: [`PRIORS`].

use std::sync::Arc;

use crate::{
    error::{Error, Result},
    kernel::Kernel,
    registry::{self, Named},
    rng::Stream,
};

pub mod gp;
pub mod hyper;
pub mod lattice;
pub mod mixture;
pub mod sawtooth;
pub mod sine;
pub mod zones;

/// What rules one drawn surface.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Covariance of the surface, link scale², sites in region units; nothing for surfaces that no
    /// Gaussian process rules.
    pub kernel: Option<Arc<dyn Kernel>>,
    /// Variance of the village effect, or of the noise, link scale².
    pub nugget: f64,
    /// Mean of the surface, link scale.
    pub mean: f64,
    /// Which kind of surface it is, where the prior knows several.
    pub class: Option<Arc<str>>,
}

impl Rule {
    /// The covariance, for those who cannot do without: the exact Gaussian process.
    ///
    /// # Errors
    /// [`Error::Input`] if no Gaussian process rules the surface.
    pub fn known_kernel(&self) -> Result<Arc<dyn Kernel>> {
        self.kernel.clone().ok_or_else(|| {
            Error::input("no Gaussian process rules these surfaces, so none knows them exactly")
                .try_this("draw from a prior of kind gp")
        })
    }
}

/// A surface at some sites, link scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Surface {
    /// The surface itself.
    pub latent: Vec<f64>,
    /// Surface plus nugget.
    pub noisy: Vec<f64>,
}

/// A law of surfaces.
pub trait Prior: Send + Sync {
    /// Draws what rules a surface: kernel, nugget, mean.
    fn rule(&self, rng: &mut Stream) -> Rule;

    /// Draws one surface under each rule at sites in region units. Rules given together share
    /// their kernel's factor only if they are the same rule up to mean, sill and nugget.
    fn surfaces(
        &self,
        xy: &[[f64; 2]],
        count: usize,
        rng: &mut Stream,
    ) -> Result<Vec<(Rule, Surface)>>;

    /// The same of surfaces that change with time: sites in region units, each at a time of `t`, in units
    /// of which the visits of a survey span 2.
    ///
    /// # Errors
    /// [`Error::Input`] for priors that know no time.
    fn surfaces_in_time(
        &self,
        _xy: &[[f64; 2]],
        _t: &[f64],
        _count: usize,
        _rng: &mut Stream,
    ) -> Result<Vec<(Rule, Surface)>> {
        Err(Error::input("this prior knows no time, and the design has times")
            .try_this("use a prior of kind gp, or leave `times` under [design] out"))
    }
}

/// A registered prior.
pub struct Entry {
    /// The name in recipes.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    /// Builds it from its `[prior]` table.
    pub build: fn(&toml::Table) -> Result<Box<dyn Prior>>,
    /// A small configuration for tests, as TOML.
    pub tiny: &'static str,
}

impl Named for Entry {
    fn name(&self) -> &str {
        self.name
    }
    fn about(&self) -> &str {
        self.about
    }
}

/// Every prior.
pub const PRIORS: &[Entry] = &[gp::ENTRY, sawtooth::ENTRY, sine::ENTRY, mixture::ENTRY];

/// Builds the prior that a `[prior]` table names with `kind`.
///
/// # Errors
/// [`Error::Unknown`] for a prior that is not registered; [`Error::Input`] for a bad setting.
pub fn build(table: &toml::Table) -> Result<Box<dyn Prior>> {
    let mut table = table.clone();
    let kind = table.remove("kind");
    let Some(kind) = kind.as_ref().and_then(|k| k.as_str()) else {
        return Err(Error::input("the recipe does not say which prior to draw from")
            .try_this("add `kind = \"gp\"` under [prior]"));
    };
    (registry::find("prior", PRIORS, kind)?.build)(&table)
}
