//! The law of a count that is not made yet: so many tested, or so much person-time, at a village of
//! which only a predictive is known.
//!
//! Given the level of the village a count is binomial (logit link) or Poisson (log link); the level
//! has the predictive's mixture of Gaussians, which is integrated out by quadrature.

use statrs::function::gamma::ln_gamma;

use crate::{
    error::{Error, Result},
    predictive::{Link, Marginals, log_sum_exp, normal_cdf},
};

/// The predictive law of one count.
#[derive(Debug, Clone)]
pub struct Counts {
    trials: f64,
    mean: f64,
    sd: f64,
    /// Counts, ascending whole numbers: all of them, or for large Poisson counts some.
    at: Vec<f64>,
    /// P(count ≤ `at`).
    below: Vec<f64>,
}

impl Counts {
    /// The count among `trials` people tested (logit link), or in a population or person-time of
    /// `trials` (log link), at target `i` of `marginals` of a new observation.
    ///
    /// Probabilities are right to 1e-6; from a few hundred cases on, cumulative ones are kept for
    /// some counts only, a twentieth of the law's width apart, and linear between.
    ///
    /// # Errors
    /// [`Error::Input`] for values, which nobody counts, and for nobody tested.
    pub fn new(marginals: &Marginals, i: usize, trials: f64) -> Result<Self> {
        let parts: Vec<(f64, f64, f64)> = marginals.components(i).collect();
        match marginals.link {
            Link::Logit if trials >= 1.0 && trials.fract() == 0.0 && trials < 1e7 => {
                Ok(Self::binomial(&parts, trials as u64))
            }
            Link::Log if trials > 0.0 && trials.is_finite() => {
                let (mean, sd) = marginals.mean_sd(i);
                let (at, below) = poisson(&parts, trials);
                // The Poisson law's own variance is its mean.
                let (mean, own) = (trials * mean, trials * mean);
                Ok(Counts { trials, mean, sd: (own + (trials * sd).powi(2)).sqrt(), at, below })
            }
            Link::Identity => Err(Error::input("a model of values predicts no counts")
                .try_this("leave the number tested out: observation_… is one more noisy value")),
            _ => Err(Error::input("this is no number of people to count among")
                .fact("number", trials)
                .try_this("give a whole number tested, or a population or person-time above 0")),
        }
    }

    fn binomial(parts: &[(f64, f64, f64)], tested: u64) -> Self {
        let pmf = binomial(parts, tested);
        let at: Vec<f64> = (0..=tested).map(|k| k as f64).collect();
        let mean: f64 = pmf.iter().zip(&at).map(|(p, k)| p * k).sum();
        let square: f64 = pmf.iter().zip(&at).map(|(p, k)| p * (k - mean).powi(2)).sum();
        let mut total = 0.0;
        let below = pmf.iter().map(|p| {
            total += p;
            total
        });
        Counts { trials: tested as f64, mean, sd: square.sqrt(), below: below.collect(), at }
    }

    /// Number tested, population or person-time.
    pub fn trials(&self) -> f64 {
        self.trials
    }

    /// Mean of the count.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Sd of the count.
    pub fn sd(&self) -> f64 {
        self.sd
    }

    /// P(count ≤ `k`).
    pub fn cdf(&self, k: f64) -> f64 {
        let k = k.floor();
        match self.at.partition_point(|at| *at <= k) {
            0 => 0.0,
            j if j == self.at.len() || self.at[j - 1] == k => self.below[j - 1],
            j => {
                let part = (k - self.at[j - 1]) / (self.at[j] - self.at[j - 1]);
                self.below[j - 1] + part * (self.below[j] - self.below[j - 1])
            }
        }
    }

    /// The smallest count whose cumulative probability reaches `level`.
    pub fn quantile(&self, level: f64) -> f64 {
        // Rounding must not push an exactly reached level to the next count.
        let level = level - 1e-12;
        match self.below.iter().position(|p| *p >= level) {
            None => *self.at.last().expect("a law has counts"),
            Some(0) => self.at[0],
            Some(j) => {
                let (from, to) = (self.at[j - 1], self.at[j]);
                let rise = self.below[j] - self.below[j - 1];
                let part = ((level - self.below[j - 1]) / rise).clamp(0.0, 1.0);
                from + ((to - from) * part).ceil().clamp(1.0, to - from)
            }
        }
    }

    /// Continuous ranked probability score of what was counted, counts.
    pub fn crps(&self, counted: f64) -> f64 {
        // Sum of (F(k) − step)² over from ≤ k < to, F being linear from a to b: its integral, less half
        // of what the ends differ by.
        let sum = |from: f64, to: f64, a: f64, b: f64| -> f64 {
            let past = if from >= counted { 1.0 } else { 0.0 };
            let (a, b) = (a - past, b - past);
            match to - from {
                one if one <= 1.0 => one * a * a,
                many => many * (a * a + a * b + b * b) / 3.0 - 0.5 * (b * b - a * a),
            }
        };
        let mut total = (self.at[0] - counted).max(0.0);
        total += (counted - self.at.last().expect("a law has counts")).max(0.0);
        for j in 1..self.at.len() {
            let ([from, to], [a, b]) =
                ([self.at[j - 1], self.at[j]], [self.below[j - 1], self.below[j]]);
            if from < counted && counted < to {
                let split = a + (b - a) * (counted - from) / (to - from);
                total += sum(from, counted, a, split) + sum(counted, to, split, b);
            } else {
                total += sum(from, to, a, b);
            }
        }
        total
    }
}

/// Log probability of `count` of `trials`, at target `i` of `marginals` of a new observation.
pub fn log_count(marginals: &Marginals, i: usize, count: f64, trials: f64) -> f64 {
    let parts: Vec<(f64, f64, f64)> = marginals.components(i).collect();
    log_probability(marginals.link, &parts, count, trials)
}

/// Log probability of `count` of `trials` at a village of which the `parts` (weight, mean, sd) of
/// its level are known: it cannot underflow, so that a badly missed count scores −300, not −∞.
pub(super) fn log_probability(
    link: Link,
    parts: &[(f64, f64, f64)],
    count: f64,
    trials: f64,
) -> f64 {
    let (k, n) = (count, trials);
    let (constant, curvature) = match link {
        Link::Logit => (ln_gamma(n + 1.0) - ln_gamma(k + 1.0) - ln_gamma(n - k + 1.0), 0.25 * n),
        // Steeper than at its mode only where the likelihood is falling to nothing.
        _ => (k * n.ln() - ln_gamma(k + 1.0), 4.0 * (k + 1.0)),
    };
    let terms: Vec<f64> = parts
        .iter()
        .flat_map(|&(weight, mean, sd)| {
            nodes(mean, sd, curvature).map(move |(eta, part)| {
                let seen = match link {
                    Link::Logit => {
                        let (yes, no) = log_odds(eta);
                        k * yes + (n - k) * no
                    }
                    _ => k * eta - n * eta.exp(),
                };
                (weight * part).ln() + seen
            })
        })
        .collect();
    constant + log_sum_exp(&terms)
}

/// Nodes (η, weight) at which the trapezoid rule integrates a likelihood of this `curvature` (that
/// of a binomial one is a quarter of the tested at most) over a Gaussian: it converges exponentially
/// once the step is below the width of the product of the two, where Gauss–Hermite with fixed nodes
/// steps over a narrow likelihood.
fn nodes(mean: f64, sd: f64, curvature: f64) -> impl Iterator<Item = (f64, f64)> {
    let width = 1.0 / (1.0 / (sd * sd) + curvature).sqrt();
    let reach = 10.0_f64;
    let half = (reach * sd / (0.6 * width)).ceil() as i64;
    let step = reach / half as f64;
    (-half..=half).map(move |j| {
        let z = j as f64 * step;
        let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
        (mean + sd * z, step * density)
    })
}

/// ln softmax pair: (ln p, ln(1 − p)) for p = logistic(η), without overflow.
fn log_odds(eta: f64) -> (f64, f64) {
    let softplus = (-eta.abs()).exp().ln_1p();
    (eta.min(0.0) - softplus, (-eta).min(0.0) - softplus)
}

/// Probability of each count 0 … tested under a Gaussian mixture of logits.
fn binomial(parts: &[(f64, f64, f64)], tested: u64) -> Vec<f64> {
    let n = tested as f64;
    let choose: Vec<f64> = (0..=tested)
        .map(|k| ln_gamma(n + 1.0) - ln_gamma(k as f64 + 1.0) - ln_gamma(n - k as f64 + 1.0))
        .collect();
    let mut pmf = vec![0.0; choose.len()];
    for &(weight, mean, sd) in parts {
        for (eta, part) in nodes(mean, sd, 0.25 * n) {
            let (yes, no) = log_odds(eta);
            for (k, p) in pmf.iter_mut().enumerate() {
                let k = k as f64;
                *p += weight * part * (choose[k as usize] + k * yes + (n - k) * no).exp();
            }
        }
    }
    // The mass beyond ten sds is 1e-23; rounding of the sum is larger, and is removed here.
    let total: f64 = pmf.iter().sum();
    pmf.iter_mut().for_each(|p| *p /= total);
    pmf
}

/// Counts and their cumulative probabilities under a Gaussian mixture of log rates.
///
/// A Poisson count is at most k where a gamma variable of shape k + 1 is above its mean, so that the
/// cumulative probability is the mixture's own, averaged over the logarithm of that variable.
fn poisson(parts: &[(f64, f64, f64)], exposure: f64) -> (Vec<f64>, Vec<f64>) {
    const REACH: f64 = 7.0; // sds: what lies beyond has probability 1e-12
    let offset = exposure.ln();
    let parts: Vec<(f64, f64, f64)> = parts.iter().map(|&(w, m, s)| (w, m + offset, s)).collect();
    let (mut low, mut high, mut narrow) = (f64::INFINITY, 0.0f64, f64::INFINITY);
    for &(_, mean, sd) in parts.iter().filter(|p| p.0 > 1e-12) {
        let [least, most] = [mean - REACH * sd, mean + REACH * sd].map(|x| x.min(60.0).exp());
        low = low.min((least - REACH * least.sqrt()).floor().max(0.0));
        high = high.max((most + REACH * most.sqrt() + 20.0).ceil());
        narrow = narrow.min((sd * sd + (-mean).exp().min(1.0)).sqrt());
    }
    let apart = (0.05 * narrow).clamp(0.004, 0.05);
    let sd = parts.iter().map(|p| p.2).fold(f64::INFINITY, f64::min);
    let (mut at, mut below) = (Vec::new(), Vec::new());
    let (mut k, mut reached) = (low, 0.0f64);
    while k <= high && reached < 1.0 - 1e-13 {
        reached = reached.max(cumulative(&parts, sd, k)).min(1.0);
        at.push(k);
        below.push(reached);
        k += (apart * k).floor().max(1.0);
    }
    (at, below)
}

/// P(count ≤ k) under a mixture of log means, whose narrowest sd is `sd`.
fn cumulative(parts: &[(f64, f64, f64)], sd: f64, k: f64) -> f64 {
    let shape = k + 1.0;
    // Sd of the gamma variable's logarithm, nearly; a mixture far narrower is as good as a point.
    let own = 1.0 / shape.sqrt();
    let step = 0.5 / (1.0 / (own * own) + 1.0 / sd.max(0.002 * own).powi(2)).sqrt();
    let reach = (72.0 / shape).sqrt();
    let (low, high) = (-(36.0 / shape + reach), reach);
    let n = ((high - low) / step).ceil() as usize;
    let (mut total, mut mass) = (0.0, 0.0);
    for j in 0..=n {
        let x = low + j as f64 * step; // ln variable − ln shape
        let density = (shape * (x - x.exp_m1())).exp();
        if density < 1e-16 {
            continue;
        }
        let level = x + shape.ln();
        let inner: f64 =
            parts.iter().map(|&(w, m, s)| w * normal_cdf((level - m) / s.max(0.002 * own))).sum();
        total += density * inner;
        mass += density;
    }
    total / mass
}
