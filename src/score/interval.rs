//! Interval score: width of the central 95 % interval, plus a fine for what falls outside.
//!
//! Source: Gneiting & Raftery (2007), eq. 43.

use super::{Better, Forecast, Score};

/// Registered as "interval-95".
pub const SCORE: Score = Score {
    name: "interval-95",
    about: "width of the 95 % interval plus 40 × what falls outside, outcome units (G. & R. 2007)",
    better: Better::Lower,
    each: |forecast| score(forecast, 0.95),
    total: |mean| mean,
};

/// Interval score at `level`.
///
/// ```
/// use isopleth::{Link, Marginals, Of, score::{Forecast, Truth, interval}};
/// let (weight, mean, sd) = (vec![1.0], vec![5.0], vec![1.0]);
/// let m = Marginals { link: Link::Identity, of: Of::Observation, components: 1, weight, mean, sd };
/// let f = Forecast::new(&m, 0, Truth::Value(8.0))?;
/// // 2 · 1.959964 wide, missed by 3 − 1.959964, fined 2 / 0.05.
/// assert!((interval::score(&f, 0.95) - 45.521_368_587).abs() < 1e-8);
/// # Ok::<(), isopleth::Error>(())
/// ```
pub fn score(forecast: &Forecast, level: f64) -> f64 {
    let (low, high) = forecast.interval(level);
    let y = forecast.observed();
    high - low + 2.0 / (1.0 - level) * ((low - y).max(0.0) + (y - high).max(0.0))
}
