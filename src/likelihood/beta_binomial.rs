//! Beta-binomial counts: positive out of tested, where the prevalence of villages has a beta law.

use candle_core::Tensor;

use super::{Kind, Likelihood, binomial, log_gamma_draw};
use crate::{error::Result, predictive::Link, rng::Stream, sites::Observations};

/// `positive ~ Binomial(tested, p)` with `p ~ Beta(φμ, φ(1 − μ))` and `μ = logistic(surface +
/// nugget)`. Its precision φ > 0: villages vary by μ(1 − μ)/(φ + 1), so that ∞ is the binomial.
pub struct BetaBinomial;

/// Levels are held within this of 0, for f32 and for logistic functions.
const MOST: f64 = 30.0;

impl Likelihood for BetaBinomial {
    fn name(&self) -> &'static str {
        "beta-binomial"
    }
    fn about(&self) -> &'static str {
        "positive of tested, logit link, villages vary by a beta law"
    }
    fn link(&self) -> Link {
        Link::Logit
    }
    fn kind(&self) -> Kind {
        Kind::Tested
    }
    fn width(&self) -> usize {
        2
    }
    fn features(&self, observations: &Observations) -> Result<Tensor> {
        binomial::features(observations)
    }
    fn dispersion(&self) -> Option<&'static str> {
        Some("precision")
    }
    /// The logit of a beta variable: ln of one gamma variable less that of another.
    fn village(&self, eta: f64, precision: f64, rng: &mut Stream) -> f64 {
        // Shapes of 0 have no law.
        let shape = |eta: f64| (precision * Link::Logit.outcome(eta)).max(1e-9);
        let level = log_gamma_draw(shape(eta), rng) - log_gamma_draw(shape(-eta), rng);
        level.clamp(-MOST, MOST)
    }
    fn observe(&self, eta: f64, trials: f64, rng: &mut Stream) -> f64 {
        binomial::observe(eta, trials, rng)
    }
}
