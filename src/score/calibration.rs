//! Coverage: the share of observations inside their central predictive interval.
//!
//! For counts the interval is of the observed proportion, ends included: with few people tested a
//! calibrated forecast covers more than the stated level, never less.

use super::{Better, Forecast, Score};

/// Registered as "coverage-50".
pub const COVERAGE_50: Score = Score {
    name: "coverage-50",
    about: "share of observations inside their central 50 % interval",
    better: Better::Near(0.5),
    each: |forecast| inside(forecast, 0.5),
    total: |mean| mean,
};
/// Registered as "coverage-80".
pub const COVERAGE_80: Score = Score {
    name: "coverage-80",
    about: "share of observations inside their central 80 % interval",
    better: Better::Near(0.8),
    each: |forecast| inside(forecast, 0.8),
    total: |mean| mean,
};
/// Registered as "coverage-95".
pub const COVERAGE_95: Score = Score {
    name: "coverage-95",
    about: "share of observations inside their central 95 % interval",
    better: Better::Near(0.95),
    each: |forecast| inside(forecast, 0.95),
    total: |mean| mean,
};

/// 1 if the observation lies in the central interval of `level`, else 0.
pub fn inside(forecast: &Forecast, level: f64) -> f64 {
    let (low, high) = forecast.interval(level);
    let y = forecast.observed();
    if (low..=high).contains(&y) { 1.0 } else { 0.0 }
}
