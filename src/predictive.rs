//! Posterior predictive marginals, and joint draws.
//!
//! On the link scale every target has a mixture of Gaussians (one component is the plain
//! Gaussian). [`Predictive`] is the differentiable form, in tensors; [`Marginals`] is the host
//! form in f64, which answers in outcome units by quadrature.

use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;
use statrs::function::erf::{erfc, erfc_inv};

use crate::{
    error::{Error, Result},
    sites::Observations,
};

/// How the link scale, on which surfaces live, relates to the outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// The outcome itself.
    Identity,
    /// Outcome = 1 / (1 + exp(−link)): prevalence.
    Logit,
    /// Outcome = exp(link): rates.
    Log,
}

impl Link {
    /// Link scale → outcome.
    pub fn outcome(self, link: f64) -> f64 {
        match self {
            Link::Identity => link,
            Link::Logit => 1.0 / (1.0 + (-link).exp()),
            Link::Log => link.exp(),
        }
    }

    /// How fast the outcome grows with the link, at `link` on the link scale.
    ///
    /// ```
    /// use isopleth::Link;
    /// let numeric = (Link::Logit.outcome(1.3 + 1e-6) - Link::Logit.outcome(1.3 - 1e-6)) / 2e-6;
    /// assert!((Link::Logit.slope(1.3) - numeric).abs() < 1e-9);
    /// ```
    pub fn slope(self, link: f64) -> f64 {
        match self {
            Link::Identity => 1.0,
            Link::Logit => self.outcome(link) * self.outcome(-link),
            Link::Log => link.exp(),
        }
    }

    /// Outcome → link scale; ±∞ at and beyond the ends of the outcome's range.
    pub fn link(self, outcome: f64) -> f64 {
        match self {
            Link::Identity => outcome,
            Link::Logit if outcome <= 0.0 => f64::NEG_INFINITY,
            Link::Logit if outcome >= 1.0 => f64::INFINITY,
            Link::Logit => (outcome / (1.0 - outcome)).ln(),
            Link::Log if outcome <= 0.0 => f64::NEG_INFINITY,
            Link::Log => outcome.ln(),
        }
    }
}

/// What a predictive distribution is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Of {
    /// The latent surface: what a map shows.
    Surface,
    /// The surface plus all that sets villages apart: a new village's prevalence or rate, or a new
    /// noisy value. What is counted there varies once more: [`crate::score::Counts`].
    Observation,
}

/// The posterior predictive at targets, on the link scale, as tensors that carry gradients.
///
/// Surface and observation share weights and means; the observation's sd includes the nugget.
#[derive(Debug, Clone)]
pub struct Predictive {
    /// Link between this scale and the outcome.
    pub link: Link,
    /// Log mixture weights `[batch, target, component]`, normalised over components.
    pub log_weight: Tensor,
    /// Component means `[batch, target, component]`.
    pub mean: Tensor,
    /// Component sds of the surface `[batch, target, component]`.
    pub surface_sd: Tensor,
    /// Component sds of a new observation `[batch, target, component]`, ≥ `surface_sd`.
    pub observation_sd: Tensor,
    /// How far the means of a new observation lie above those of the surface `[batch, target,
    /// component]`, from processes whose villages scatter unevenly; nothing where they do not.
    pub lift: Option<Tensor>,
    /// The law of the observation itself, from heads that end in counts or classes; what stands
    /// above is then its likeness on the link scale.
    pub law: Option<Arc<dyn Law>>,
}

/// The law of an observation itself, rather than of what it reads.
pub trait Law: std::fmt::Debug + Send + Sync {
    /// Log probability of what was seen at each target: `[batch, target]`.
    ///
    /// # Errors
    /// [`Error::Input`] if what was seen is not of the law's kind.
    fn log_prob(&self, seen: &Observations) -> Result<Tensor>;
}

/// ½ ln 2π.
const HALF_LOG_TAU: f64 = 0.918_938_533_204_672_7;

impl Predictive {
    /// One Gaussian per target: `mean`, `surface_sd`, `observation_sd` `[batch, target, 1]`.
    pub fn gaussian(
        link: Link,
        mean: Tensor,
        surface_sd: Tensor,
        observation_sd: Tensor,
    ) -> Result<Self> {
        let log_weight = mean.zeros_like()?;
        Ok(Predictive { link, log_weight, mean, surface_sd, observation_sd, lift: None, law: None })
    }

    /// Log density of `value` `[batch, target, 1]` on the link scale; returns `[batch, target]`.
    pub fn log_prob(&self, of: Of, value: &Tensor) -> Result<Tensor> {
        Ok((self.terms(of, value)?.log_sum_exp(D::Minus1)? - HALF_LOG_TAU)?)
    }

    /// What each component adds to the density of `value`, log: `[batch, target, component]`.
    pub fn log_parts(&self, of: Of, value: &Tensor) -> Result<Tensor> {
        Ok((self.terms(of, value)? - HALF_LOG_TAU)?)
    }

    /// [`Predictive::log_parts`] without the constant that all share.
    fn terms(&self, of: Of, value: &Tensor) -> Result<Tensor> {
        let sd = self.sd(of);
        let value = value.to_dtype(self.mean.dtype())?;
        let z = self.mean_of(of)?.broadcast_sub(&value)?.div(sd)?;
        Ok(((&self.log_weight - sd.log()?)? - (z.sqr()? * 0.5)?)?)
    }

    /// Component means of the surface or of a new observation.
    pub fn mean_of(&self, of: Of) -> Result<Tensor> {
        Ok(match (of, &self.lift) {
            (Of::Observation, Some(lift)) => (&self.mean + lift)?,
            _ => self.mean.clone(),
        })
    }

    /// Component sds of the surface or of a new observation.
    pub fn sd(&self, of: Of) -> &Tensor {
        match of {
            Of::Surface => &self.surface_sd,
            Of::Observation => &self.observation_sd,
        }
    }

    /// Targets in each row.
    pub fn len(&self) -> usize {
        self.mean.dims()[1]
    }

    /// No targets at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The marginals of row `row` on the host.
    ///
    /// # Errors
    /// [`Error::Input`] if a parameter is not finite: a silent NaN must never reach a map.
    pub fn marginals(&self, row: usize, of: Of) -> Result<Marginals> {
        let host = |x: &Tensor| -> Result<Vec<f64>> {
            Ok(x.narrow(0, row, 1)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?)
        };
        let weight: Vec<f64> = host(&self.log_weight)?.iter().map(|w| w.exp()).collect();
        let (mean, sd) = (host(&self.mean_of(of)?)?, host(self.sd(of))?);
        let sound = |x: &[f64]| x.iter().all(|v| v.is_finite());
        if !(sound(&weight) && sound(&mean) && sound(&sd)) {
            return Err(Error::input("the process returned values that are not finite").try_this(
                "check the observations for extreme values, and the model with `isopleth inspect`",
            ));
        }
        Ok(Marginals {
            link: self.link,
            of,
            components: *self.mean.dims().last().expect("three axes"),
            weight,
            mean,
            sd,
        })
    }
}

/// Mixture-of-Gaussians marginals on the link scale, in f64 on the host; answers in outcome units.
#[derive(Debug, Clone, PartialEq)]
pub struct Marginals {
    /// Link between this scale and the outcome.
    pub link: Link,
    /// What these are the marginals of.
    pub of: Of,
    /// Components per target.
    pub components: usize,
    /// Weights, target-major: target `i` owns `i·components … (i+1)·components`.
    pub weight: Vec<f64>,
    /// Means, link scale.
    pub mean: Vec<f64>,
    /// Standard deviations, link scale, > 0.
    pub sd: Vec<f64>,
}

/// `ln Σ exp(terms)`, without overflow.
pub fn log_sum_exp(terms: &[f64]) -> f64 {
    let top = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top + terms.iter().map(|t| (t - top).exp()).sum::<f64>().ln()
}

/// Φ: the standard normal distribution function.
pub fn normal_cdf(z: f64) -> f64 {
    0.5 * erfc(-z / std::f64::consts::SQRT_2)
}

/// Φ⁻¹: the standard normal quantile, for p in (0, 1).
pub fn normal_quantile(p: f64) -> f64 {
    -std::f64::consts::SQRT_2 * erfc_inv(2.0 * p)
}

/// Nodes and weights of 20-point Gauss–Hermite quadrature for a standard normal (Golub & Welsch
/// 1969), from the three-term recurrence by Newton's method. Exact for polynomials to degree 39.
pub fn gauss_hermite() -> &'static [(f64, f64)] {
    static RULE: std::sync::OnceLock<Vec<(f64, f64)>> = std::sync::OnceLock::new();
    RULE.get_or_init(|| {
        const N: usize = 20;
        // Orthonormal probabilists' Hermite polynomials: √(k+1) h(k+1) = x h(k) − √k h(k−1).
        let hermite = |x: f64| {
            let (mut previous, mut current) = (0.0, 1.0);
            for k in 0..N {
                let next = (x * current - (k as f64).sqrt() * previous) / ((k + 1) as f64).sqrt();
                (previous, current) = (current, next);
            }
            (current, previous)
        };
        // Roots are simple and separated by more than 0.2: bracket on a grid, then bisect.
        let mut roots = Vec::with_capacity(N);
        let (steps, limit) = (4000, 10.0);
        for i in 0..steps {
            let mut low = -limit + 2.0 * limit * i as f64 / steps as f64;
            let mut high = -limit + 2.0 * limit * (i + 1) as f64 / steps as f64;
            if hermite(low).0.signum() == hermite(high).0.signum() {
                continue;
            }
            for _ in 0..80 {
                let middle = 0.5 * (low + high);
                if hermite(middle).0.signum() == hermite(low).0.signum() {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            roots.push(0.5 * (low + high));
        }
        roots
            .into_iter()
            .map(|x| {
                let below = hermite(x).1;
                (x, 1.0 / (N as f64 * below * below))
            })
            .collect()
    })
}

impl Marginals {
    /// Number of targets.
    pub fn len(&self) -> usize {
        self.mean.len() / self.components.max(1)
    }

    /// No targets at all.
    pub fn is_empty(&self) -> bool {
        self.mean.is_empty()
    }

    /// Components of target `i`: (weight, mean, sd) on the link scale.
    pub fn components(&self, i: usize) -> impl Iterator<Item = (f64, f64, f64)> + '_ {
        let range = i * self.components..(i + 1) * self.components;
        range.map(|j| (self.weight[j], self.mean[j], self.sd[j]))
    }

    /// Undoes standardisation on the link scale: link values become `mean + sd · value`.
    pub fn rescale(mut self, mean: f64, sd: f64) -> Self {
        self.mean.iter_mut().for_each(|m| *m = mean + sd * *m);
        self.sd.iter_mut().for_each(|s| *s *= sd);
        self
    }

    /// `E[g(link)]` of target `i`, by quadrature within each component.
    pub fn expect(&self, i: usize, g: impl Fn(f64) -> f64) -> f64 {
        self.components(i)
            .map(|(w, m, s)| w * gauss_hermite().iter().map(|(x, u)| u * g(m + s * x)).sum::<f64>())
            .sum()
    }

    /// Mean and sd of target `i`, outcome units.
    pub fn mean_sd(&self, i: usize) -> (f64, f64) {
        let (first, second) = match self.link {
            Link::Identity => self
                .components(i)
                .fold((0.0, 0.0), |(a, b), (w, m, s)| (a + w * m, b + w * (m * m + s * s))),
            Link::Log => self.components(i).fold((0.0, 0.0), |(a, b), (w, m, s)| {
                (a + w * (m + 0.5 * s * s).exp(), b + w * (2.0 * m + 2.0 * s * s).exp())
            }),
            Link::Logit => {
                let mut sums = (0.0, 0.0);
                for (w, m, s) in self.components(i) {
                    for (x, u) in gauss_hermite() {
                        let p = self.link.outcome(m + s * x);
                        sums.0 += w * u * p;
                        sums.1 += w * u * p * p;
                    }
                }
                sums
            }
        };
        (first, (second - first * first).max(0.0).sqrt())
    }

    /// P(outcome ≤ `value`) of target `i`, `value` in outcome units.
    pub fn cdf(&self, i: usize, value: f64) -> f64 {
        self.link_cdf(i, self.link.link(value))
    }

    /// P(outcome > `threshold`) of target `i`, `threshold` in outcome units.
    pub fn exceedance(&self, i: usize, threshold: f64) -> f64 {
        let t = self.link.link(threshold);
        self.components(i).map(|(w, m, s)| w * normal_cdf((m - t) / s)).sum()
    }

    /// P(link ≤ `value`) of target `i`, link scale.
    pub fn link_cdf(&self, i: usize, value: f64) -> f64 {
        self.components(i).map(|(w, m, s)| w * normal_cdf((value - m) / s)).sum()
    }

    /// Log density of target `i` at `value`, both on the link scale.
    pub fn link_log_density(&self, i: usize, value: f64) -> f64 {
        let terms: Vec<f64> = self
            .components(i)
            .map(|(w, m, s)| w.ln() - s.ln() - 0.5 * ((value - m) / s).powi(2))
            .collect();
        log_sum_exp(&terms) - 0.5 * (2.0 * std::f64::consts::PI).ln()
    }

    /// The `level` quantile of target `i`, outcome units; `level` in (0, 1).
    pub fn quantile(&self, i: usize, level: f64) -> f64 {
        self.link.outcome(self.link_quantile(i, level))
    }

    /// The `level` quantile of target `i`, link scale, to 1e-10 of the components' range: Newton's
    /// steps, and halves of the bracket where those leave it.
    pub fn link_quantile(&self, i: usize, level: f64) -> f64 {
        let z = normal_quantile(level);
        if self.components == 1 {
            return self.mean[i] + z * self.sd[i];
        }
        // The mixture's quantile lies between the smallest and the largest component quantile.
        let (mut low, mut high) = self
            .components(i)
            .map(|(_, m, s)| m + z * s)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), q| (a.min(q), b.max(q)));
        let tolerance = 1e-10 * (1.0 + high - low);
        let mut x = 0.5 * (low + high);
        let mut steps = 0;
        while high - low > tolerance {
            steps += 1;
            let over = self.link_cdf(i, x) - level;
            if over < 0.0 {
                low = x
            } else {
                high = x
            }
            let next = x - over / self.link_density(i, x);
            // Also where the density is 0 and `next` not a number.
            let inside = next > low && next < high && steps < 30;
            if inside && (next - x).abs() < 0.5 * tolerance {
                return next;
            }
            x = if inside { next } else { 0.5 * (low + high) };
        }
        0.5 * (low + high)
    }

    /// Density of target `i` at `x`, link scale.
    fn link_density(&self, i: usize, x: f64) -> f64 {
        let root = (2.0 * std::f64::consts::PI).sqrt();
        let one =
            |(w, m, s): (f64, f64, f64)| w * (-0.5 * ((x - m) / s).powi(2)).exp() / (s * root);
        self.components(i).map(one).sum()
    }

    /// `f(self, i)` for every target, in parallel, in target order.
    pub fn map<T: Send>(&self, f: impl Fn(&Self, usize) -> T + Sync) -> Vec<T> {
        (0..self.len()).into_par_iter().map(|i| f(self, i)).collect()
    }
}

/// Surfaces drawn jointly over targets, link scale.
#[derive(Debug, Clone)]
pub struct Draws {
    /// Link between this scale and the outcome.
    pub link: Link,
    /// `[draw, target, outcome]`.
    pub values: Tensor,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wide and narrow components, near and far, heavy and all but absent; levels far in the tails.
    #[test]
    fn quantiles_of_mixtures_are_where_the_cdf_says() {
        let mut rng = crate::Stream::new(3, "quantiles", 0);
        for _ in 0..400 {
            let k = 1 + rng.below(4);
            let raw: Vec<f64> = (0..k).map(|_| (6.0 * rng.normal()).exp()).collect();
            let total: f64 = raw.iter().sum();
            let marginals = Marginals {
                link: Link::Identity,
                of: Of::Surface,
                components: k,
                weight: raw.iter().map(|w| w / total).collect(),
                mean: (0..k).map(|_| 20.0 * rng.normal()).collect(),
                sd: (0..k).map(|_| (3.0 * rng.normal()).exp()).collect(),
            };
            for level in [1e-9, 0.025, 0.3, 0.5, 0.975, 1.0 - 1e-9] {
                let x = marginals.link_quantile(0, level);
                let found = marginals.link_cdf(0, x);
                // Where the cdf is steep, the last digits of x are all one can ask for.
                let near = |d: f64| marginals.link_cdf(0, x + d);
                let slack = 1e-8 * (1.0 + x.abs());
                assert!(
                    (found - level).abs() < 1e-9 * level.min(1.0 - level)
                        || (near(-slack) <= level && near(slack) >= level),
                    "{marginals:?}: {level} gave {x}, where the cdf is {found}"
                );
            }
        }
    }
}
