//! Continuous ranked probability score: the integral of (F(x) − 1{observed ≤ x})² over x.
//!
//! Source: Grimit et al. (2006), doi:10.1256/qj.05.235, eq. 5, for mixtures of Gaussians; the plain
//! sum for counts, on the scale of the proportion or rate.

use statrs::function::erf::erf;

use super::{Better, Forecast, Score, forecast::Law};
use crate::predictive::{Link, Marginals};

/// Registered as "crps".
pub const SCORE: Score = Score {
    name: "crps",
    about: "continuous ranked probability score, outcome units (Gneiting & Raftery 2007)",
    better: Better::Lower,
    each: crps,
    total: |mean| mean,
};

/// `E|X − y| − ½ E|X − X'|` of a mixture of Gaussians `(weight, mean, sd)`.
///
/// ```
/// // A standard normal met by its own mean: (√2 − 1)/√π.
/// let seen = isopleth::score::crps::mixture(&[(1.0, 3.0, 1.0)], 3.0);
/// assert!((seen - 0.233_694_977_255_109_1).abs() < 1e-12);
/// ```
pub fn mixture(parts: &[(f64, f64, f64)], y: f64) -> f64 {
    // E|Z| for Z ~ N(m, s²).
    let fold = |m: f64, s: f64| {
        let z = m / s;
        let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
        2.0 * s * density + m * erf(z / std::f64::consts::SQRT_2)
    };
    let to_y: f64 = parts.iter().map(|&(w, m, s)| w * fold(y - m, s)).sum();
    let spread: f64 = parts
        .iter()
        .flat_map(|&(v, m, s)| parts.iter().map(move |&(w, n, t)| v * w * fold(m - n, s.hypot(t))))
        .sum();
    to_y - 0.5 * spread
}

/// CRPS of target `i` in outcome units, met by `truth` on the link scale: closed for the identity,
/// else ∫ F(η)² dp below the truth and ∫ (1 − F(η))² dp above it, by Simpson's rule in η.
///
/// ```
/// use isopleth::{Link, Marginals, Of, score::crps};
/// let (weight, mean, sd) = (vec![0.3, 0.7], vec![-1.0, 0.5], vec![0.2, 1.5]);
/// let m = Marginals { link: Link::Logit, of: Of::Surface, components: 2, weight, mean, sd };
/// // scipy.integrate.quad over p, to 1e-12
/// assert!((crps::marginal(&m, 0, -3.0) - 0.294_801_386_965).abs() < 1e-6);
/// ```
pub fn marginal(m: &Marginals, i: usize, truth: f64) -> f64 {
    if m.link == Link::Identity {
        return mixture(&m.components(i).collect::<Vec<_>>(), truth);
    }
    const REACH: f64 = 8.0; // sds: what lies beyond has probability 1e-15
    let bounds = m.components(i).fold(
        (f64::INFINITY, f64::NEG_INFINITY, f64::INFINITY),
        |(low, high, least), (_, mean, sd)| {
            (low.min(mean - REACH * sd), high.max(mean + REACH * sd), least.min(sd))
        },
    );
    let (low, high, least) = bounds;
    let simpson = |from: f64, to: f64, missed: &dyn Fn(f64) -> f64| -> f64 {
        if from >= to {
            return 0.0;
        }
        // A quarter of the narrowest sd; the cap is met by components of weight near 0.
        let steps = 2 * (((to - from) / (0.5 * least)).ceil() as usize).clamp(4, 400);
        let h = (to - from) / steps as f64;
        let at = |j: usize| {
            let eta = from + j as f64 * h;
            missed(m.link_cdf(i, eta)).powi(2) * m.link.slope(eta)
        };
        let inner: f64 = (1..steps).map(|j| if j % 2 == 1 { 4.0 } else { 2.0 } * at(j)).sum();
        (at(0) + inner + at(steps)) * h / 3.0
    };
    // Between the law and a truth that lies outside it, F is 0 or 1.
    let gap = |from: f64, to: f64| (m.link.outcome(to) - m.link.outcome(from)).max(0.0);
    let split = truth.clamp(low, high);
    gap(truth, low)
        + simpson(low, split, &|f| f)
        + simpson(split, high, &|f| 1.0 - f)
        + gap(high, truth)
}

fn crps(forecast: &Forecast) -> f64 {
    let y = forecast.observed();
    match &forecast.law {
        Law::Mixture(m) => marginal(m, 0, m.link.link(y)),
        Law::Counts { counts, .. } => counts.crps((y * counts.trials()).round()) / counts.trials(),
    }
}
