//! Binomial counts: positive out of tested, probability on the logit scale, with a village effect.

use candle_core::Tensor;

use super::Likelihood;
use crate::{
    error::{Error, Result},
    predictive::Link,
    sites::Observations,
};

/// `positive ~ Binomial(tested, logistic(surface + village effect))`.
pub struct Binomial;

impl Likelihood for Binomial {
    fn name(&self) -> &'static str {
        "binomial"
    }
    fn about(&self) -> &'static str {
        "positive of tested, logit link, village effect as nugget"
    }
    fn link(&self) -> Link {
        Link::Logit
    }
    fn counts(&self) -> bool {
        true
    }
    fn width(&self) -> usize {
        2
    }
    /// Empirical logit ln((k + ½)/(n − k + ½)) and ln(n)/3 − 1.
    fn features(&self, observations: &Observations) -> Result<Tensor> {
        let Some(trials) = &observations.trials else {
            return Err(Error::input("a binomial model needs the number tested at every site")
                .try_this("give --tested COLUMN, or use a continuous model with --value COLUMN"));
        };
        let n = trials.unsqueeze(2)?; // [batch, site, 1]
        let k = &observations.y;
        let logit = ((k + 0.5)?.log()? - ((&n - k)? + 0.5)?.log()?)?;
        // Padded sites may carry zero trials: keep the logarithm finite there.
        let size = ((n.maximum(1.0)?.log()? / 3.0)? - 1.0)?;
        Ok(Tensor::cat(&[logit, size], 2)?)
    }
}
