//! Root mean squared error of the predictive mean.

use super::{Better, Score};

/// Registered as "rmse".
pub const SCORE: Score = Score {
    name: "rmse",
    about: "root mean squared error of the predictive mean, outcome units",
    better: Better::Lower,
    each: |forecast| (forecast.mean() - forecast.observed()).powi(2),
    total: f64::sqrt,
};
