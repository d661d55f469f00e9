//! How an observation reads the surface, and how it becomes a token. Registry: [`LIKELIHOODS`].
//!
//! Three steps lead from a surface to what is written down, each with a name in every output: the
//! *surface* on the link scale, to which a prior adds its Gaussian nugget; the level of a *new
//! village*, which likelihoods with a dispersion of their own scatter once more
//! ([`Likelihood::village`]); and a *new observation* of so many tested or so much person-time
//! ([`Likelihood::observe`]). Given the level of the village, a count is binomial where the link is
//! logit and Poisson where it is a logarithm, whatever its likelihood.

use candle_core::Tensor;
use statrs::function::gamma::ln_gamma;

use crate::{
    error::{Error, Result},
    predictive::Link,
    registry::{self, Named},
    rng::Stream,
    sites::Observations,
};

pub mod bernoulli;
pub mod beta_binomial;
pub mod binomial;
pub mod gaussian;
pub mod log_gaussian;
pub mod negative_binomial;
pub mod poisson;

/// What stands in a table of observations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A number on the scale of the surface.
    Value,
    /// A number above 0, whose logarithm is on the scale of the surface. `y` of [`Observations`]
    /// holds the logarithm.
    Positive,
    /// A count among so many tested: `trials` is the number tested.
    Tested,
    /// 0 or 1, one person a row: `trials` is 1.
    Single,
    /// A count of cases, with no upper end: `trials` is the population, or the person-time.
    Exposure,
}

/// How observations arise from the surface.
pub trait Likelihood: Sync {
    /// The name in recipes: "binomial".
    fn name(&self) -> &'static str;
    /// One line on what it is.
    fn about(&self) -> &'static str;
    /// Link between the surface's scale and the outcome.
    fn link(&self) -> Link;
    /// What is written down, and what `trials` means.
    fn kind(&self) -> Kind;
    /// Whether observations are counts, with `trials`.
    fn counts(&self) -> bool {
        !matches!(self.kind(), Kind::Value | Kind::Positive)
    }
    /// Features per observation in a token.
    fn width(&self) -> usize;
    /// What a network reads of each observation: `[batch, site, width]`.
    fn features(&self, observations: &Observations) -> Result<Tensor>;
    /// What its own dispersion is called under \[trials\] of a recipe, where it has one.
    fn dispersion(&self) -> Option<&'static str> {
        None
    }
    /// The level of a village, link scale, where surface and nugget together stand at `eta`.
    fn village(&self, eta: f64, _dispersion: f64, _rng: &mut Stream) -> f64 {
        eta
    }
    /// What is written down at a village of level `eta`, link scale: a count of `trials`, or a value
    /// in its own units.
    fn observe(&self, eta: f64, trials: f64, rng: &mut Stream) -> f64;
    /// Log probability of the count `y` of `trials` where surface and nugget stand at `eta`, with its
    /// first and second derivatives in `eta`, the second ≤ 0: what Laplace's approximation needs.
    /// Nothing for values, and for laws that are not log-concave.
    fn log_probability(
        &self,
        _y: f64,
        _trials: f64,
        _eta: f64,
        _dispersion: f64,
    ) -> Option<[f64; 3]> {
        None
    }
    /// What [`Likelihood::village`] adds to `eta`, as a mixture of Gaussians (weight, mean, sd).
    fn scatter(&self, _dispersion: f64) -> Vec<(f64, f64, f64)> {
        vec![(1.0, 0.0, 0.0)]
    }
}

/// Every likelihood.
pub const LIKELIHOODS: &[&dyn Likelihood] = &[
    &binomial::Binomial,
    &gaussian::Gaussian,
    &beta_binomial::BetaBinomial,
    &bernoulli::Bernoulli,
    &poisson::Poisson,
    &negative_binomial::NegativeBinomial,
    &log_gaussian::LogGaussian,
];

impl Named for &dyn Likelihood {
    fn name(&self) -> &str {
        Likelihood::name(*self)
    }
    fn about(&self) -> &str {
        Likelihood::about(*self)
    }
}

/// The likelihood called `name`.
pub fn find(name: &str) -> Result<&'static dyn Likelihood> {
    Ok(*registry::find("likelihood", LIKELIHOODS, name)?)
}

/// Counts and trials `[batch, site, 1]` each.
fn counted(observations: &Observations, missing: &str, help: &str) -> Result<[Tensor; 2]> {
    let Some(trials) = &observations.trials else {
        return Err(Error::input(missing).try_this(help));
    };
    Ok([observations.y.clone(), trials.unsqueeze(2)?])
}

/// `ln Binomial(k | n, logistic η)`, finite for any finite η.
///
/// ```
/// let seen = isopleth::likelihood::binomial_log_pmf(3.0, 10.0, -1.0);
/// assert!((seen - -1.345_125_132_400).abs() < 1e-9); // scipy.stats.binom.logpmf(3, 10, expit(-1))
/// ```
pub fn binomial_log_pmf(k: f64, n: f64, eta: f64) -> f64 {
    // softplus without overflow
    let softplus = eta.max(0.0) + (-eta.abs()).exp().ln_1p();
    ln_gamma(n + 1.0) - ln_gamma(k + 1.0) - ln_gamma(n - k + 1.0) + k * eta - n * softplus
}

/// `ln Poisson(k | exposure · exp η)`.
///
/// ```
/// let seen = isopleth::likelihood::poisson_log_pmf(5.0, 6.0, -0.4);
/// assert!((seen - -1.850_614_672_855_608).abs() < 1e-10); // math.lgamma
/// ```
pub fn poisson_log_pmf(k: f64, exposure: f64, eta: f64) -> f64 {
    let log_mean = exposure.ln() + eta;
    k * log_mean - log_mean.exp() - ln_gamma(k + 1.0)
}

/// ln of a gamma variable of scale 1, which does not underflow for small shapes: a variable of shape
/// a + 1 times the a-th root of a uniform one.
fn log_gamma_draw(shape: f64, rng: &mut Stream) -> f64 {
    rng.gamma(shape + 1.0).ln() + (1.0 - rng.unit()).ln() / shape
}
