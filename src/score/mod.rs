//! How good a forecast was: proper scores and coverage. Registry: [`SCORES`].
//!
//! Source: Gneiting & Raftery (2007), doi:10.1198/016214506000001437; for counts Czado, Gneiting &
//! Held (2009), doi:10.1111/j.1541-0420.2009.01191.x.

use rayon::prelude::*;

use crate::{
    error::{Error, Result},
    predictive::Marginals,
    registry::Named,
};

pub mod calibration;
mod counts;
pub mod crps;
mod forecast;
pub mod interval;
pub mod log_score;
pub mod pit;
pub mod rmse;

pub use counts::{Counts, log_count};
pub use forecast::{Forecast, Truth};

/// Which way a score improves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
    /// This much is right: the level of an interval.
    Near(f64),
}

/// A registered score: a number per site, and how numbers become one.
pub struct Score {
    /// The name: "crps".
    pub name: &'static str,
    /// One line on what it is, with its unit.
    pub about: &'static str,
    /// Which way it improves.
    pub better: Better,
    /// The score of one forecast that met its truth.
    pub each: fn(&Forecast) -> f64,
    /// From the mean over sites to the figure reported.
    pub total: fn(f64) -> f64,
}

impl Named for Score {
    fn name(&self) -> &str {
        self.name
    }
    fn about(&self) -> &str {
        self.about
    }
}

/// Every score.
pub const SCORES: &[Score] = &[
    log_score::SCORE,
    crps::SCORE,
    rmse::SCORE,
    interval::SCORE,
    calibration::COVERAGE_50,
    calibration::COVERAGE_80,
    calibration::COVERAGE_95,
];

impl Score {
    /// The figure reported for these forecasts.
    pub fn over(&self, forecasts: &[Forecast]) -> f64 {
        let each: Vec<f64> = forecasts.par_iter().map(|f| (self.each)(f)).collect();
        (self.total)(each.iter().sum::<f64>() / each.len().max(1) as f64)
    }
}

/// Pairs the predictive marginals of new observations with what was seen there.
///
/// # Errors
/// [`Error::Axis`] if the lengths differ; [`Error::Input`] as [`Forecast::new`].
pub fn forecasts(marginals: &Marginals, truths: &[Truth]) -> Result<Vec<Forecast>> {
    if marginals.len() != truths.len() {
        return Err(Error::axis("forecasts and truths", marginals.len(), truths.len()));
    }
    let each = truths.par_iter().enumerate();
    each.map(|(i, truth)| Forecast::new(marginals, i, *truth)).collect()
}

/// Share of truths inside the central 50, 80 and 95 % predictive intervals.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Coverage {
    /// Of the 50 % interval.
    #[serde(rename = "50")]
    pub at_50: f64,
    /// Of the 80 % interval.
    #[serde(rename = "80")]
    pub at_80: f64,
    /// Of the 95 % interval.
    #[serde(rename = "95")]
    pub at_95: f64,
}

/// The figures that `validate` reports.
///
/// # Units
/// `log_score` in nats per site, higher is better; `crps` and `rmse` in outcome units (for counts,
/// of the proportion observed), lower is better.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// Sites scored.
    pub n: usize,
    /// Mean log predictive density (counts: probability) of what was observed.
    pub log_score: f64,
    /// Mean continuous ranked probability score.
    pub crps: f64,
    /// Root mean squared error of the predictive mean.
    pub rmse: f64,
    /// Coverage of central intervals.
    pub coverage: Coverage,
}

impl Summary {
    /// Scores forecasts that met their truths.
    pub fn of(forecasts: &[Forecast]) -> Self {
        Summary {
            n: forecasts.len(),
            log_score: log_score::SCORE.over(forecasts),
            crps: crps::SCORE.over(forecasts),
            rmse: rmse::SCORE.over(forecasts),
            coverage: Coverage {
                at_50: calibration::COVERAGE_50.over(forecasts),
                at_80: calibration::COVERAGE_80.over(forecasts),
                at_95: calibration::COVERAGE_95.over(forecasts),
            },
        }
    }
}
