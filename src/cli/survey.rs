//! The survey on the command line: the same flags for every subcommand that reads one.

use std::path::PathBuf;

use crate::{
    error::{Error, Result},
    geo::{
        geometry::Choice,
        survey::{Outcome, Survey, SurveyOptions},
        table::Columns,
    },
    likelihood::{Kind, Likelihood},
    process::Process,
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
    /// Column of 0 or 1, one person a row, instead of numbers positive and tested
    #[arg(long, value_name = "COLUMN", group = "outcome")]
    pub binary: Option<String>,
    /// Column of cases in a population or over person-time, for rates; with one of the next two
    #[arg(long, value_name = "COLUMN", group = "outcome")]
    pub cases: Option<String>,
    /// Column of the population: rates are cases per person (0.001 for 1 in 1,000)
    #[arg(long, value_name = "COLUMN", conflicts_with = "person_time")]
    pub population: Option<String>,
    /// Column of the person-time: rates are cases per its unit (per year if it counts person-years)
    #[arg(long, value_name = "COLUMN")]
    pub person_time: Option<String>,
    /// Column of a continuous outcome
    #[arg(long, value_name = "COLUMN", group = "outcome",
        conflicts_with_all = ["positive", "tested"])]
    pub value: Option<String>,
    /// Column of a continuous outcome above 0, modelled by its logarithm
    #[arg(long, value_name = "COLUMN", group = "outcome")]
    pub log_value: Option<String>,
    /// Coordinate reference system of the columns: EPSG:4326, WKT, a PROJ string, local:m, local:km
    #[arg(long)]
    pub crs: Option<String>,
    /// Layer of a GeoPackage
    #[arg(long)]
    pub layer: Option<String>,
    /// How far sites were moved before the table was made public: a number of km, any distance up to
    /// which is as likely, or `dhs` (urban 2 km, rural 5 km, 1 % of those 10 km). Integrated over
    #[arg(long, value_name = "KM|dhs")]
    pub displacement: Option<String>,
    /// Column of urban or rural, for --displacement dhs; guessed when left out
    #[arg(long, value_name = "COLUMN")]
    pub urban_rural: Option<String>,
    /// What distances are measured on: a plane, or the globe (chords through it). When left out, the
    /// globe where a plane would be off by more than 1 %, from about 3,600 km on
    #[arg(long, value_name = "plane|globe")]
    pub distance: Option<String>,
    /// Polygons, or a raster that is not 0 there, within which distances are measured, such as land: ways
    /// around what lies outside
    #[arg(long, value_name = "AREA", conflicts_with = "barrier")]
    pub inside: Option<PathBuf>,
    /// Polygons, or a raster that is not 0 there, which cannot be crossed, such as water: distances are ways
    /// around them
    #[arg(long, value_name = "AREA")]
    pub barrier: Option<PathBuf>,
    /// Column of times: years, months (2015-03), dates or moments. The model then tells times apart
    #[arg(long, value_name = "COLUMN")]
    pub time: Option<String>,
}

impl ColumnArgs {
    /// What was said of the columns.
    pub fn options(&self) -> SurveyOptions {
        SurveyOptions {
            lon: self.lon.clone(),
            lat: self.lat.clone(),
            positive: self.positive.clone(),
            tested: self.tested.clone(),
            binary: self.binary.clone(),
            cases: self.cases.clone(),
            population: self.population.clone(),
            person_time: self.person_time.clone(),
            value: self.value.clone(),
            log_value: self.log_value.clone(),
            crs: self.crs.clone(),
            layer: self.layer.clone(),
            displacement: self.displacement.clone(),
            urban_rural: self.urban_rural.clone(),
            distance: Choice {
                distance: self.distance.clone(),
                inside: self.inside.clone(),
                barrier: self.barrier.clone(),
            },
            time: self.time.clone(),
        }
    }
}

/// Sites beyond which values are kriged under covariances that a network reads, for then it scores better
/// than windows of the other model (docs/large-surveys.md): twice its largest training survey.
const LARGE: usize = 4_000;

/// The model that is used when none is named: a shipped one where there is one for the outcome, by
/// the number of sites; else a Gaussian process fitted to the survey.
pub fn default_model(survey: &Survey) -> &'static str {
    match &survey.outcome {
        _ if survey.times.is_some() => "gp",
        Outcome::Counts { .. } if survey.len() > LARGE => "kriging-counts",
        Outcome::Counts { .. } => "prevalence",
        Outcome::Values(_) if survey.len() > LARGE => "kriging-values",
        Outcome::Values(_) => "continuous",
        Outcome::Cases { .. } | Outcome::Positive(_) => "gp",
    }
}

/// Refuses a model that was trained on another kind of outcome than the survey's.
///
/// # Errors
/// [`Error::Input`] with the flags that would suit the model.
pub fn agree(model: &str, reads: &dyn Likelihood, survey: &Survey) -> Result<()> {
    let single = survey.outcome.is_single();
    let fits = match (reads.kind(), &survey.outcome) {
        (Kind::Tested, Outcome::Counts { .. })
        | (Kind::Exposure, Outcome::Cases { .. })
        | (Kind::Value, Outcome::Values(_))
        | (Kind::Positive, Outcome::Positive(_)) => true,
        (Kind::Single, Outcome::Counts { .. }) => single,
        _ => false,
    };
    if fits {
        return Ok(());
    }
    let help = match reads.kind() {
        Kind::Tested => "name the columns with --positive and --tested",
        Kind::Single => "name a column of 0 or 1 with --binary, one person a row",
        Kind::Exposure => "name the columns with --cases and --population or --person-time",
        Kind::Value => "name the column with --value",
        Kind::Positive => "name the column with --log-value",
    };
    Err(Error::input("the model and the survey are of different kinds")
        .fact("model", format!("{model} reads {}", reads.about()))
        .fact("survey", survey.outcome.about())
        .try_this(format!(
            "{help}; or leave --model out, or use --model gp, which is fitted to the survey"
        )))
}

/// Refuses a model that reads coordinates of a plane where the survey's distances are on no plane.
///
/// # Errors
/// [`Error::Input`] with what to do instead.
pub fn at_home(model: &str, process: &dyn Process, survey: &Survey) -> Result<()> {
    if survey.geometry.is_plane() || process.any_dimension() {
        return Ok(());
    }
    Err(Error::input("the model reads coordinates on a plane, and distances are not on one")
        .fact("model", model)
        .fact("survey", survey.source.display())
        .fact("distances", survey.geometry.about())
        .try_this(
            "use a model that reads distances alone (prevalence, continuous, gp, vecchia), or \
             --distance plane",
        ))
}

/// Refuses a model that reads time where the survey has none, or the other way round.
///
/// # Errors
/// [`Error::MissingTime`], or [`Error::Input`] with what would do.
pub fn agree_in_time(model: &str, reads_time: bool, survey: &Survey) -> Result<()> {
    match (reads_time, &survey.times) {
        (true, None) => Err(Error::MissingTime {
            checkpoint: model.to_string(),
            observations: survey.source.clone(),
            columns: Columns::read(&survey.source).map_or("?".into(), |c| c.names().join(", ")),
        }),
        (false, Some(times)) => Err(Error::input(
            "the model was trained without time, and the survey has times",
        )
        .fact("model", model)
        .fact("--time", &times.column)
        .fact("times of the survey", times.about())
        .try_this(
            "use --model gp, which is fitted to the survey and its times, or for positives of tested \
             --model prevalence-st; or leave --time out, and all times are read as one",
        )),
        _ => Ok(()),
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
