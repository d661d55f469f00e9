//! Continuous ranked probability score: the integral of (F(x) − 1{observed ≤ x})² over x.
//!
//! Source: Grimit et al. (2006), doi:10.1256/qj.05.235, eq. 5, for mixtures of Gaussians; the plain
//! sum for counts, on the scale of the proportion.

use statrs::function::erf::erf;

use super::{Better, Forecast, Score, forecast::Law};

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

fn crps(forecast: &Forecast) -> f64 {
    match &forecast.law {
        Law::Mixture(m) => mixture(&m.components(0).collect::<Vec<_>>(), forecast.observed()),
        Law::Counts { pmf, .. } => {
            let tested = (pmf.len() - 1) as f64;
            let observed = (forecast.observed() * tested).round() as usize;
            let mut below = 0.0;
            let steps = pmf[..pmf.len() - 1].iter().enumerate().map(|(k, p)| {
                below += p;
                let past = if k >= observed { 1.0 } else { 0.0 };
                (below - past) * (below - past)
            });
            steps.sum::<f64>() / tested
        }
    }
}
