//! The run record: what was asked, what was used, what came out. Written last, so that a directory
//! with a record is whole.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Plan, Summary};
use crate::{
    attention::Reading,
    error::{Error, Result},
    geo::{
        covariates::Cover,
        frame::Frame,
        grid::Grid,
        survey::{Dropped, Outcome, Survey},
        time::{Moment, date},
    },
    predictive::Of,
    whole,
};

/// Name of the record in an output directory.
pub const FILE: &str = "run.json";

/// A mapping run. Field names are those of the JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this crate.
    pub isopleth: String,
    /// The command as it was typed, word by word.
    pub command: Vec<String>,
    /// The model's card.
    pub model: Value,
    /// Whether maps are of the surface or of a new observation.
    pub of: Of,
    /// The survey.
    pub survey: SurveyNote,
    /// World ↔ model units.
    pub frame: Frame,
    /// The grid.
    pub grid: GridNote,
    /// What was made.
    pub products: Vec<ProductNote>,
    /// What the map holds, over all its times.
    pub summary: Summary,
    /// The times it is of, band by band; nothing for a survey without times.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub times: Vec<TimeNote>,
    /// What the pixels have of the covariates, where there are some; how they are standardised stands
    /// in the frame, and what they do in the model's card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub covariates: Option<Cover>,
    /// How far the survey is like those of the model's training: a [`crate::train::trust::Verdict`].
    #[serde(default)]
    pub trust: Option<Value>,
    /// What the user should know before believing the map.
    pub warnings: Vec<String>,
    /// How the survey was read.
    #[serde(default)]
    pub reading: Reading,
    /// Share of the pairs of site and pixel that were left out: of no weight, or too faint.
    #[serde(default)]
    pub left_out: Option<f64>,
    /// The page that tells it all, where one was asked for.
    #[serde(default)]
    pub report: Option<String>,
    /// Where the model computed.
    #[serde(default)]
    pub device: Option<DeviceNote>,
    /// How the map was cut up, which changes nothing in it.
    pub plan: Option<PlanNote>,
    /// Memory that was allowed with `--memory`, MiB.
    pub memory_mib: Option<f64>,
    /// The most memory that the run took, MiB; null where the system does not say.
    pub peak_memory_mib: Option<f64>,
    /// Wall time of the run, seconds.
    pub seconds: f64,
}

/// What was read from the survey.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SurveyNote {
    /// The file.
    pub file: String,
    /// Its coordinate reference system.
    pub crs: String,
    /// Sites used.
    pub used: usize,
    /// Rows left out, each with its reason.
    pub dropped: Vec<Dropped>,
    /// What was guessed.
    pub notes: Vec<String>,
    /// How far from where they were recorded the sites were taken to stand.
    #[serde(default)]
    pub displacement: Option<String>,
    /// Column of times and what it holds, where one was named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<String>,
    /// People positive and tested, or cases and their exposure, over all sites; for counts.
    pub people: Option<[f64; 2]>,
}

impl From<&Survey> for SurveyNote {
    fn from(survey: &Survey) -> Self {
        SurveyNote {
            file: survey.source.display().to_string(),
            crs: survey.crs.name().to_string(),
            used: survey.x.len(),
            dropped: survey.dropped.clone(),
            notes: survey.notes.clone(),
            displacement: survey.displacement.as_ref().map(ToString::to_string),
            times: survey.times.as_ref().map(|t| format!("{}: {}", t.column, t.about())),
            people: match &survey.outcome {
                Outcome::Counts { positive, tested } => {
                    Some([positive.iter().sum(), tested.iter().sum()])
                }
                Outcome::Cases { cases, exposure, .. } => {
                    Some([cases.iter().sum(), exposure.iter().sum()])
                }
                Outcome::Values(_) | Outcome::Positive(_) => None,
            },
        }
    }
}

/// The grid of the map.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GridNote {
    /// Rows of pixels.
    pub rows: usize,
    /// Columns of pixels.
    pub cols: usize,
    /// Outer corner of the first pixel, CRS units.
    pub origin: [f64; 2],
    /// (dx, dy) of a pixel, CRS units.
    pub pixel: [f64; 2],
    /// Coordinate reference system, well-known text.
    pub crs: String,
    /// Pixels wanted.
    pub wanted: usize,
}

impl From<&Grid> for GridNote {
    fn from(grid: &Grid) -> Self {
        GridNote {
            rows: grid.rows,
            cols: grid.cols,
            origin: grid.origin,
            pixel: grid.pixel,
            crs: grid.crs.wkt().to_string(),
            wanted: grid.wanted(),
        }
    }
}

/// Where a model computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceNote {
    /// What `--device` said.
    pub asked: String,
    /// The cards, each with its name, or the processor.
    pub used: Vec<String>,
    /// Version of NVIDIA's driver, where a card was used and the system says.
    pub driver: Option<String>,
    /// Why it is not what was asked for.
    pub fallback: Option<String>,
    /// The most that any card held in tensors, MiB, where the driver says.
    pub card_memory_mib: Option<f64>,
}

/// How a map was cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanNote {
    /// Pixels along a tile's side.
    pub tile: usize,
    /// Targets in one call of the posterior, at most.
    pub targets: usize,
    /// Calls of the posterior at once.
    pub workers: usize,
}

impl From<&Plan> for PlanNote {
    fn from(plan: &Plan) -> Self {
        PlanNote { tile: plan.tile, targets: plan.targets, workers: plan.workers }
    }
}

/// One time of a map.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TimeNote {
    /// As it was asked for, and as the band's description says.
    pub time: String,
    /// The day that stands for it.
    pub day: String,
    /// Sites visited in it.
    pub sites: usize,
    /// Smallest posterior mean, outcome units.
    pub lowest: f64,
    /// Average posterior mean over pixels, outcome units.
    pub average: f64,
    /// Largest posterior mean, outcome units.
    pub highest: f64,
}

impl TimeNote {
    /// What a map at `moment` holds, in which `sites` sites were visited.
    pub fn new(moment: &Moment, found: &Summary, sites: usize) -> Self {
        TimeNote {
            time: moment.label.clone(),
            day: date(moment.period.middle()),
            sites,
            lowest: found.lowest,
            average: found.average,
            highest: found.highest,
        }
    }
}

/// One product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProductNote {
    /// Its specification: `quantile:0.025`.
    pub product: String,
    /// In words.
    pub description: String,
    /// Unit of its values.
    pub unit: String,
    /// Its files in the output directory.
    pub files: Vec<String>,
}

/// A run that predicted at the rows of a table. Field names are those of the JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Predictions {
    /// Version of this crate.
    pub isopleth: String,
    /// The command as it was typed, word by word.
    pub command: Vec<String>,
    /// The model's card.
    pub model: Value,
    /// The survey.
    pub survey: SurveyNote,
    /// World ↔ model units.
    pub frame: Frame,
    /// The table of places.
    pub targets: TargetsNote,
    /// The table that was written.
    pub file: String,
    /// Its columns, in order.
    pub columns: Vec<String>,
    /// What its columns are of, by how their names begin: surface, observation, count.
    #[serde(default)]
    pub of: BTreeMap<String, String>,
    /// Where the model computed.
    #[serde(default)]
    pub device: Option<DeviceNote>,
    /// As [`Record::trust`].
    #[serde(default)]
    pub trust: Option<Value>,
    /// What the user should know before believing the predictions.
    pub warnings: Vec<String>,
    /// The most memory that the run took, MiB; null where the system does not say.
    pub peak_memory_mib: Option<f64>,
    /// Wall time of the run, seconds.
    pub seconds: f64,
}

/// What was read from a table of places.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetsNote {
    /// The file.
    pub file: String,
    /// Its coordinate reference system.
    pub crs: String,
    /// Its rows.
    pub rows: usize,
    /// Rows that have a place.
    pub placed: usize,
    /// What was guessed.
    pub notes: Vec<String>,
}

impl Predictions {
    /// Where the record of a table lies: `predictions.parquet.run.json` beside it.
    pub fn beside(table: &Path) -> PathBuf {
        let mut name = table.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{FILE}"));
        table.with_file_name(name)
    }

    /// Writes the record beside its table, under a temporary name first.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn write(&self, table: &Path) -> Result<()> {
        write(self, &Self::beside(table))
    }
}

fn write(record: &impl Serialize, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(record)
        .map_err(|e| Error::io("write", path, std::io::Error::other(e)))?;
    whole::write_bytes(path, (text + "\n").as_bytes())
}

impl Record {
    /// Writes `run.json` in `directory`, under a temporary name first.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn write(&self, directory: &Path) -> Result<()> {
        write(self, &directory.join(FILE))
    }

    /// Every file that the run wrote, the record last.
    pub fn files(&self) -> Vec<String> {
        let products = self.products.iter().flat_map(|p| p.files.iter().cloned());
        products.chain(self.report.clone()).chain([FILE.to_string()]).collect()
    }
}
