//! Neural processes. Registry: [`MODELS`].

use candle_core::Tensor;

use crate::{
    attention::Reading,
    error::{Error, Result},
    likelihood::Likelihood,
    process::Process,
    registry::{self, Named},
};

pub mod adapt;
pub mod anp;
pub mod anp_block;
pub mod autoregressive;
pub mod cavia;
pub mod cnp;
pub mod conv;
pub mod convcnp;
pub mod convcnp_grid;
pub mod decoder;
pub mod dirichlet;
pub mod dnp;
pub mod family;
pub mod gnp;
pub mod head;
pub mod joint;
pub mod kriging;
pub mod latent;
pub mod layer;
pub mod lbanp;
pub mod maml;
pub mod nmdp;
pub mod np;
pub mod params;
pub mod paths;
pub mod pool;
pub mod tnp;
pub mod tnp_kr;
pub mod transformer;

use params::Params;

/// What a model is built for: the data, not the architecture.
#[derive(Clone, Copy)]
pub struct Problem {
    /// Coordinates per site: 1 or 2.
    pub dim: usize,
    /// How observations arise.
    pub likelihood: &'static dyn Likelihood,
    /// How a context is read by a model that is only asked.
    pub reading: Reading,
    /// Features that covariates give every site; 0 for models that know of none.
    pub covariates: usize,
}

impl Problem {
    /// A problem whose contexts are read without loss.
    pub fn new(dim: usize, likelihood: &'static dyn Likelihood) -> Self {
        Problem { dim, likelihood, reading: Reading::default(), covariates: 0 }
    }

    /// Refuses ways of reading a context that a model would pass over in silence.
    ///
    /// # Errors
    /// [`Error::Input`] if any but the exact way is asked for.
    pub(crate) fn reads_exactly(&self, model: &str) -> Result<()> {
        if self.reading == Reading::default() {
            return Ok(());
        }
        Err(Error::input("this model does not read its sites one by one: there is nothing to leave out or to round")
            .fact("model", model)
            .try_this("leave --lose and --precision out, or use a model of kind tnp-kr"))
    }
}

/// Builds a model from its `[model]` table.
pub type Build = fn(&toml::Table, Problem, &mut Params) -> Result<Box<dyn Process + Send + Sync>>;

/// A registered model.
pub struct Entry {
    /// The name in recipes.
    pub name: &'static str,
    /// What it is, and its paper.
    pub about: &'static str,
    /// Builds it.
    pub build: Build,
    /// Whether its posterior draws surfaces jointly, and knows joint densities.
    pub joint: bool,
    /// A configuration small enough for tests, as TOML.
    pub tiny: &'static str,
}

/// Every model.
pub const MODELS: &[Entry] = &[
    cnp::ENTRY,
    np::ENTRY,
    anp::ANP,
    anp::CANP,
    dnp::ENTRY,
    convcnp::ENTRY,
    convcnp_grid::ENTRY,
    gnp::ENTRY,
    kriging::ENTRY,
    lbanp::ENTRY,
    maml::ENTRY,
    cavia::ENTRY,
    nmdp::ENTRY,
    tnp::D,
    tnp::A,
    tnp::ND,
    tnp_kr::SCAN,
    tnp_kr::DKA,
    tnp_kr::PERFORMER,
    tnp_kr::FULL,
];

impl Named for Entry {
    fn name(&self) -> &str {
        self.name
    }
    fn about(&self) -> &str {
        self.about
    }
}

/// Models that read covariates.
const READ_COVARIATES: [&str; 4] =
    [tnp_kr::SCAN.name, tnp_kr::DKA.name, tnp_kr::PERFORMER.name, tnp_kr::FULL.name];

/// Builds the model that a `[model]` table names with `kind`.
///
/// # Errors
/// [`Error::Unknown`] for a model that is not registered; [`Error::Input`] for a bad setting.
pub fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let mut table = table.clone();
    let kind = table.remove("kind");
    let Some(kind) = kind.as_ref().and_then(|k| k.as_str()) else {
        return Err(Error::input("the recipe does not say which model to build")
            .try_this("add `kind = \"tnp-kr\"` under [model]"));
    };
    let entry = registry::find("model", MODELS, kind)?;
    if problem.covariates > 0 && !READ_COVARIATES.contains(&entry.name) {
        return Err(Error::input("this model does not read covariates")
            .fact("model", entry.name)
            .fact("models that do", READ_COVARIATES.join(", "))
            .try_this("choose one of them, or leave [covariates] out of the recipe"));
    }
    (entry.build)(&table, problem, params)
}

/// Reads a model's settings, with the nearest known key when one is unknown.
pub(crate) fn settings<T: serde::de::DeserializeOwned>(table: &toml::Table) -> Result<T> {
    crate::settings::parse_table("[model]", table)
}

/// `x` with a last axis of `features` repeated for every site: `[batch, 1, w]` → `[batch, n, w]`.
pub fn spread(x: &Tensor, sites: usize) -> Result<Tensor> {
    let (batch, _, width) = x.dims3()?;
    Ok(x.broadcast_as((batch, sites, width))?.contiguous()?)
}
