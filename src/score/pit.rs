//! Probability integral transform: where what was observed stands in its law, uniform over [0, 1] if the
//! forecasts are calibrated.
//!
//! A count has no one place but a step, from the probability of fewer to that of as many. It is spread
//! evenly over its step, either by a draw (randomised) or in expectation (non-randomised; Czado, Gneiting
//! & Held 2009, doi:10.1111/j.1541-0420.2009.01191.x, eq. 2). The mean of the latter over sites is the
//! aggregated curve (AnPIT) of RiskMap.

use super::{Forecast, Truth, forecast::Law};
use crate::rng::Stream;

impl Forecast {
    /// P(less than observed) and P(at most as observed): equal for values.
    pub fn pit(&self) -> [f64; 2] {
        match (&self.law, self.truth) {
            (Law::Mixture(m), _) => [m.cdf(0, self.observed()); 2],
            (Law::Counts { counts, .. }, Truth::Count { positive: k, .. })
            | (Law::Counts { counts, .. }, Truth::Cases { cases: k, .. }) => {
                let k = k as f64;
                [if k > 0.0 { counts.cdf(k - 1.0) } else { 0.0 }, counts.cdf(k)]
            }
            (Law::Counts { .. }, Truth::Value(_)) => {
                unreachable!("Forecast::new pairs law and truth")
            }
        }
    }
}

/// Mean over forecasts of the non-randomised transform at `u`: the share of observations at or below
/// their law's `u` quantile, `u` itself if all are calibrated.
///
/// ```
/// use isopleth::score::pit;
/// // Steps of a fair coin that fell heads, and of one that fell tails.
/// assert_eq!(pit::aggregated(&[[0.5, 1.0], [0.0, 0.5]], 0.25), 0.25);
/// assert_eq!(pit::aggregated(&[[0.5, 1.0], [0.5, 1.0]], 0.75), 0.5);
/// ```
pub fn aggregated(steps: &[[f64; 2]], u: f64) -> f64 {
    let below = |&[a, b]: &[f64; 2]| match b - a > 1e-12 {
        true => ((u - a) / (b - a)).clamp(0.0, 1.0),
        false => f64::from(a <= u),
    };
    steps.iter().map(below).sum::<f64>() / steps.len().max(1) as f64
}

/// Non-randomised histogram over `bins` equal parts of [0, 1]: 1 = as many as there should be.
pub fn histogram(steps: &[[f64; 2]], bins: usize) -> Vec<f64> {
    let at = |j: usize| match j {
        0 => 0.0, // what never could be fewer lies in the first part
        j if j == bins => 1.0,
        j => aggregated(steps, j as f64 / bins as f64),
    };
    (0..bins).map(|j| bins as f64 * (at(j + 1) - at(j))).collect()
}

/// One draw from each step.
pub fn randomised(steps: &[[f64; 2]], rng: &mut Stream) -> Vec<f64> {
    steps.iter().map(|[a, b]| a + (b - a) * rng.unit()).collect()
}

/// Share of observations inside the central interval of `level`, in expectation over the randomised
/// transform: `level` itself if all are calibrated, of counts too.
pub fn inside(steps: &[[f64; 2]], level: f64) -> f64 {
    aggregated(steps, 0.5 + 0.5 * level) - aggregated(steps, 0.5 - 0.5 * level)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictive::{Link, Marginals, Of};

    fn at(link: Link, mean: f64, sd: f64, truth: Truth) -> [f64; 2] {
        let (weight, mean, sd) = (vec![1.0], vec![mean], vec![sd]);
        let m = Marginals { link, of: Of::Observation, components: 1, weight, mean, sd };
        Forecast::new(&m, 0, truth).unwrap().pit()
    }

    /// A village known to have a prevalence of one half: coins.
    #[test]
    fn a_count_stands_on_the_step_of_its_law() {
        for (positive, step) in [(0, [0.0, 1.0]), (1, [1.0, 5.0]), (4, [15.0, 16.0])] {
            let [low, high] = at(Link::Logit, 0.0, 1e-6, Truth::Count { positive, tested: 4 });
            let [a, b] = step.map(|s| s / 16.0);
            assert!((low - a).abs() < 1e-9 && (high - b).abs() < 1e-9, "{positive}: {low} {high}");
        }
        let [low, high] = at(Link::Identity, 3.0, 2.0, Truth::Value(3.0));
        assert!(low == high && (low - 0.5).abs() < 1e-12);
        // Cases at a rate of 1 over 2 years: e⁻² and 3 e⁻².
        let [low, high] = at(Link::Log, 0.0, 1e-6, Truth::Cases { cases: 1, exposure: 2.0 });
        let e = (-2.0_f64).exp();
        assert!((low - e).abs() < 1e-5 && (high - 3.0 * e).abs() < 1e-5, "{low} {high}");
    }

    /// However counts are spread over their steps, those of the law itself are uniform.
    #[test]
    fn counts_of_their_own_law_are_uniform() {
        let mut rng = Stream::new(1, "pit", 0);
        let steps: Vec<[f64; 2]> = (0..4000)
            .map(|_| {
                let (mean, sd) = (rng.normal(), rng.uniform(0.3, 1.0));
                let tested = 1 + rng.below(9) as u64;
                let p = Link::Logit.outcome(mean + sd * rng.normal());
                let positive = rng.binomial(tested, p);
                at(Link::Logit, mean, sd, Truth::Count { positive, tested })
            })
            .collect();
        let drawn = randomised(&steps, &mut rng);
        let drawn: Vec<[f64; 2]> = drawn.into_iter().map(|u| [u; 2]).collect();
        for (name, steps, within) in [("in expectation", &steps, 0.1), ("drawn", &drawn, 0.2)] {
            let bins = histogram(steps, 10);
            assert!(bins.iter().all(|b| (b - 1.0).abs() < within), "{name}: {bins:?}");
            assert!((inside(steps, 0.8) - 0.8).abs() < 0.02, "{name}");
        }
    }
}
