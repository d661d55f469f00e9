//! The survey on the command line: the same flags for every subcommand that reads one.

use std::path::PathBuf;

use crate::{
    error::Result,
    geo::survey::{Survey, SurveyOptions},
};

/// Which table, and which of its columns.
#[derive(Debug, Clone, clap::Args)]
pub struct SurveyArgs {
    /// Survey table: CSV, Parquet, GeoParquet, GeoPackage, GeoJSON or Shapefile, one row per site
    #[arg(long, value_name = "FILE")]
    pub surveys: PathBuf,
    /// Its columns
    #[command(flatten)]
    pub columns: ColumnArgs,
}

/// Which columns of a table.
#[derive(Debug, Clone, clap::Args)]
pub struct ColumnArgs {
    /// Column of longitude or easting; guessed when left out, like the next three
    #[arg(long, value_name = "COLUMN")]
    pub lon: Option<String>,
    /// Column of latitude or northing
    #[arg(long, value_name = "COLUMN")]
    pub lat: Option<String>,
    /// Column of the number positive
    #[arg(long, value_name = "COLUMN")]
    pub positive: Option<String>,
    /// Column of the number tested
    #[arg(long, value_name = "COLUMN")]
    pub tested: Option<String>,
    /// Column of a continuous outcome, in place of --positive and --tested
    #[arg(long, value_name = "COLUMN", conflicts_with_all = ["positive", "tested"])]
    pub value: Option<String>,
    /// Coordinate reference system of the columns: EPSG:4326, WKT, a PROJ string, local:m, local:km
    #[arg(long)]
    pub crs: Option<String>,
    /// Layer of a GeoPackage
    #[arg(long)]
    pub layer: Option<String>,
}

impl ColumnArgs {
    /// What was said of the columns.
    pub fn options(&self) -> SurveyOptions {
        SurveyOptions {
            lon: self.lon.clone(),
            lat: self.lat.clone(),
            positive: self.positive.clone(),
            tested: self.tested.clone(),
            value: self.value.clone(),
            crs: self.crs.clone(),
            layer: self.layer.clone(),
        }
    }
}

impl SurveyArgs {
    /// Reads the survey.
    ///
    /// # Errors
    /// As [`Survey::read`].
    pub fn read(&self) -> Result<Survey> {
        Survey::read(&self.surveys, &self.columns.options())
    }
}
