//! `isopleth predict`: condition a process on one table and answer at the rows of another.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::Device;
use serde_json::{Value, json};

use super::{
    cards::DeviceArgs,
    covariates::CovariateArgs,
    map::{line, open_models, plural, round, tell_survey},
    reading::ReadingArgs,
    sample::refuse_existing,
    survey::{ColumnArgs, default_model},
    times,
    trust::{self, StrictArgs},
    windows::WindowArgs,
};
use crate::{
    error::{Error, Result},
    geo::{
        frame::Frame,
        survey::{Outcome, Survey, SurveyOptions, Targets},
        table::{Column, Columns},
    },
    mapping::{
        self, Plan, plan,
        record::{Predictions, TargetsNote},
    },
    predictive::{Marginals, Of},
    process::Posterior,
    score::Counts,
    sites::Sites,
};

/// Predict at the rows of a table, from a table of survey sites
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Survey table: CSV, Parquet, GeoParquet, GeoPackage, GeoJSON or Shapefile, one row per site
    #[arg(long, value_name = "FILE")]
    context: PathBuf,
    /// Table of places to predict at, of the same kinds; all its columns are kept
    #[arg(long, value_name = "FILE")]
    targets: PathBuf,
    /// Table to write (.parquet or .csv): the targets with columns surface_… and observation_…, in
    /// outcome units. The surface is what a map shows; an observation is what a survey at that
    /// place would find, were it large (a new village), or one more noisy value. --new-survey adds
    /// count_…, what a survey of so many would count there
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Model by name or file; `gp` fits an exact Gaussian process, `vecchia` one of nearest
    /// neighbours for many sites. `prevalence` for counts and `continuous` for values when left out
    #[arg(long, value_name = "NAME|FILE")]
    model: Option<String>,
    #[command(flatten)]
    reading: ReadingArgs,
    #[command(flatten)]
    windows: WindowArgs,
    #[command(flatten)]
    columns: ColumnArgs,
    #[command(flatten)]
    covariates: CovariateArgs,
    /// Also predict what a new survey of N would count at each place: columns count_…, of positives
    /// among N tested, or of cases in a population or person-time of N
    #[arg(long, value_name = "N")]
    new_survey: Option<f64>,
    /// Column of longitude or easting of the targets; --lon when left out, and then guessed
    #[arg(long, value_name = "COLUMN", requires = "target_lat")]
    target_lon: Option<String>,
    /// Column of latitude or northing of the targets; --lat when left out, and then guessed
    #[arg(long, value_name = "COLUMN", requires = "target_lon")]
    target_lat: Option<String>,
    /// Coordinate reference system of the targets; --crs when left out
    #[arg(long, value_name = "CRS")]
    target_crs: Option<String>,
    /// Column of times of the targets; --time when left out
    #[arg(long, value_name = "COLUMN", requires = "time")]
    target_time: Option<String>,
    /// Quantiles to give, each between 0 and 1
    #[arg(long, value_name = "LEVEL", value_delimiter = ',', default_value = "0.025,0.5,0.975")]
    quantiles: Vec<f64>,
    /// Also give the probability of exceeding this, outcome units (0.2 for 20 %); may be repeated
    #[arg(long, value_name = "VALUE", value_delimiter = ',', allow_negative_numbers = true)]
    threshold: Vec<f64>,
    #[command(flatten)]
    strict: StrictArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
}

/// Rows of the targets in memory at once.
const ROWS: usize = 8_192;
/// Most people in a new survey: its law holds every count up to them.
const MOST_TESTED: f64 = 100_000.0;

/// What is asked of each of surface and observation, beside mean and sd.
struct Asked<'a> {
    quantiles: &'a [f64],
    thresholds: &'a [f64],
    /// Tested, population or person-time of a new survey.
    new_survey: Option<f64>,
}

/// Both kinds of prediction of a level, with the start of their columns' names; the third, of a
/// count, comes after the new village.
const KINDS: [(&str, Of); 2] = [("surface", Of::Surface), ("observation", Of::Observation)];

/// Predicts, from the tables to the table.
///
/// # Errors
/// Anything that is wrong with the input; nothing is written then.
pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    check(args)?;
    let reading = args.reading.reading()?;
    let cards = args.device.open(args.model.as_deref(), reading)?;
    let said = args.columns.options();
    let survey = Survey::read(&args.context, &said)?;
    let survey = args.covariates.attach(survey, said.layer.as_deref())?;
    let own = SurveyOptions {
        lon: args.target_lon.clone(),
        lat: args.target_lat.clone(),
        crs: args.target_crs.clone(),
        time: args.target_time.clone(),
        ..Default::default()
    };
    if let Some(n) = args.new_survey {
        let wrong = match survey.outcome {
            Outcome::Counts { .. } if !(n >= 1.0 && n.fract() == 0.0 && n <= MOST_TESTED) => {
                Some(("a new survey tests a whole number of people", "give 1 to 100000"))
            }
            Outcome::Cases { .. } if !(n > 0.0 && n.is_finite()) => {
                Some(("a new survey has a population or person-time", "give a number above 0"))
            }
            Outcome::Values(_) | Outcome::Positive(_) => Some((
                "a new survey of values counts nothing",
                "leave --new-survey out: observation_… is one more value",
            )),
            _ => None,
        };
        if let Some((what, help)) = wrong {
            return Err(Error::input(what).fact("--new-survey", n).try_this(help));
        }
    }
    let targets = Targets::read(&args.targets, &own, &said)?;
    let asked = Asked {
        quantiles: &args.quantiles,
        thresholds: &args.threshold,
        new_survey: args.new_survey,
    };
    let names = asked.names(&targets)?;

    let frame = Frame::fit(&survey)?;
    let context = frame.observations(&survey, &Device::Cpu)?;
    let how = (reading, &args.windows);
    let (mut model, others) =
        open_models(args.model.as_deref(), &survey, &frame, &context, &cards.devices, how)?;
    model.note_effects(&frame);
    let processes = model.with(&others);
    let called = args.model.as_deref().unwrap_or(default_model(&survey));
    let verdict = model.suits(trust::examine(called, &survey, &frame)?);
    args.strict.settle(called, &survey, &verdict)?;
    tell_survey(&survey)?;
    let placed = (0..targets.len()).filter(|i| targets.is_placed(*i)).count();
    line("targets", format!("{}: {placed} places", args.targets.display()))?;
    targets.notes.iter().try_for_each(|n| line("note", n))?;
    if placed < targets.len() {
        let without = targets.len() - placed;
        let what = if targets.times.is_some() { "place or time" } else { "place" };
        let text = format!("{without} row{} without a {what}, nothing to predict", plural(without));
        line("note", text)?;
    }
    let about = model.card.get("predicts").and_then(Value::as_str).unwrap_or("");
    line("model", format!("{}: {about}", model.name))?;
    model.tell_windows(survey.len())?;
    model.tell_change()?;
    model.tell_effects()?;

    let mut plan = Plan::on(cards.devices.clone());
    plan.targets = model.targets(&plan);
    if let Some(room) = plan.room() {
        plan = plan.within_cards(room, &model.process.memory(survey.len()));
    }
    let posteriors = plan.condition_each(&processes, &context)?;
    // A card has little to do with a few thousand rows, and windows are conditioned for every chunk.
    let rows = ROWS.max(plan.workers * plan.targets);
    let part = mapping::Part::new(plan.targets);
    let answered =
        names.len() - coordinates(&targets).map_or(0, |c| c.len()) - targets.names().len();
    let (mut from, mut beyond) = (0, 0);
    let mut found = Covered::default();
    let chunks = targets.chunks(rows)?.map(|chunk| {
        let (len, own) = chunk?;
        let (x, y) = (&targets.x[from..from + len], &targets.y[from..from + len]);
        let days = targets.times.as_ref().map(|times| &times.days[from..from + len]);
        let placed: Vec<usize> = (0..len).filter(|i| targets.is_placed(from + i)).collect();
        from += len;
        let placed = found.reach(&frame, &targets, [x, y], placed)?;
        let (rows, values) = found.look(&frame, &targets, [x, y], &placed, &own)?;
        let mut columns = Vec::new();
        if coordinates(&targets).is_some() {
            columns.extend([x, y].map(|values| Column::Numbers(values.to_vec())));
        }
        columns.extend(own);
        let mut answers = vec![vec![f64::NAN; len]; answered];
        if !rows.is_empty() {
            let at = |values: &[f64]| rows.iter().map(|i| values[*i]).collect::<Vec<f64>>();
            let sites = match days {
                None => frame.sites_with(&targets.crs, &at(x), &at(y), &values, &Device::Cpu)?,
                Some(days) => {
                    let (places, days) = ([&at(x)[..], &at(y)], at(days));
                    frame.sites_when(&targets.crs, places, &days, &values, &Device::Cpu)?
                }
            };
            let far = |p: &&Vec<f64>| p.iter().any(|v| v.abs() > 1.0 + mapping::REACH);
            beyond += sites.host()?[0].iter().filter(far).count();
            let given = mapping::in_parts(&plan, &part, &sites, |device, sites| {
                asked.answers(&*posteriors[device], &frame, sites)
            })?;
            for (row, given) in rows.iter().zip(given.into_iter().flatten()) {
                answers.iter_mut().zip(given).for_each(|(cells, v)| cells[*row] = v);
            }
        }
        columns.extend(answers.into_iter().map(Column::Numbers));
        Ok(columns)
    });
    Columns::write(&args.out, &names, chunks)?;

    let mut warnings = cards.warnings(part.less());
    warnings.extend(trust::warnings(&verdict));
    warnings.extend(found.warnings());
    warnings.extend(times::beyond(&survey, &targets));
    if beyond > 0 {
        warnings.push(format!(
            "{beyond} target{} more than {} km outside the box of the sites: there a prediction \
             shows little but the model's prior",
            if beyond == 1 { " lies" } else { "s lie" },
            round(frame.km(mapping::REACH))
        ));
    }
    let kinds = kinds(&survey.outcome, args.new_survey);
    let record = Predictions {
        isopleth: env!("CARGO_PKG_VERSION").into(),
        command: std::env::args().collect(),
        model: model.card.clone(),
        survey: (&survey).into(),
        targets: TargetsNote {
            file: args.targets.display().to_string(),
            crs: targets.crs.name().to_string(),
            rows: targets.len(),
            placed,
            notes: targets.notes.clone(),
        },
        frame,
        file: args.out.file_name().unwrap_or_default().to_string_lossy().into(),
        columns: names,
        trust: Some(json!(verdict)),
        of: kinds.iter().map(|(name, what)| (format!("{name}_"), what.clone())).collect(),
        device: Some(cards.record()),
        warnings,
        peak_memory_mib: plan::usage().map(|usage| usage.peak.mebibytes()),
        seconds: (start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
    };
    record.write(&args.out)?;
    record.warnings.iter().try_for_each(|w| line("warning", w))?;
    let unit = match &survey.outcome {
        Outcome::Counts { .. } => "prevalence".to_string(),
        Outcome::Cases { per, .. } => format!("cases per {per}"),
        Outcome::Values(_) | Outcome::Positive(_) => {
            let value = said.value.as_deref().or(said.log_value.as_deref());
            format!("units of {}", value.unwrap_or("the value"))
        }
    };
    line("written", format!("{}: {} rows, {unit}", args.out.display(), targets.len()))?;
    for (i, (kind, what)) in kinds.iter().enumerate() {
        line(if i == 0 { "columns" } else { "" }, format!("{kind}_…: {what}"))?;
    }
    line("", format!("{}: what was asked and used", Predictions::beside(&args.out).display()))?;
    if let Some(peak) = record.peak_memory_mib {
        line("memory", format!("{peak:.0} MiB at most"))?;
    }
    line("time", format!("{:.1} s", record.seconds))
}

/// What the targets turn out to have of the covariates.
#[derive(Default)]
struct Covered {
    cut: usize,
    without: usize,
    beyond: usize,
}

impl Covered {
    /// Which of the `placed` rows are in no barrier.
    fn reach(
        &mut self,
        frame: &Frame,
        targets: &Targets,
        [x, y]: [&[f64]; 2],
        placed: Vec<usize>,
    ) -> Result<Vec<usize>> {
        let at = |values: &[f64]| placed.iter().map(|i| values[*i]).collect::<Vec<f64>>();
        let reached = frame.geometry.reached(&targets.crs, &at(x), &at(y))?;
        let kept: Vec<usize> =
            placed.iter().zip(reached).filter(|(_, reached)| *reached).map(|(i, _)| *i).collect();
        self.cut += placed.len() - kept.len();
        Ok(kept)
    }

    /// Which of the `placed` rows have every covariate, and its values there, `[covariate][row]`.
    fn look(
        &mut self,
        frame: &Frame,
        targets: &Targets,
        [x, y]: [&[f64]; 2],
        placed: &[usize],
        own: &[Column],
    ) -> Result<(Vec<usize>, Vec<Vec<f64>>)> {
        let Some(design) = &frame.covariates else { return Ok((placed.to_vec(), Vec::new())) };
        let at = |values: &[f64]| placed.iter().map(|i| values[*i]).collect::<Vec<f64>>();
        let column = |name: &str| {
            let named = |n: &&String| n.eq_ignore_ascii_case(name);
            let found = targets.names().iter().position(|n| named(&n));
            match found.and_then(|i| own.get(i)) {
                Some(Column::Numbers(values)) => Ok(Column::Numbers(at(values))),
                Some(Column::Text(cells)) => {
                    Ok(Column::Text(placed.iter().map(|i| cells[*i].clone()).collect()))
                }
                None => Err(Error::input(
                    "the targets lack a column that the survey has as a covariate",
                )
                .fact("targets", targets.source().display())
                .fact("column", name)
                .fact("columns", targets.names().join(", "))
                .try_this("add the column to the targets, or give a raster with --covariate")),
            }
        };
        let values = design.values(&targets.crs, &at(x), &at(y), &column)?;
        let whole: Vec<usize> =
            (0..placed.len()).filter(|i| values.iter().all(|v| !v[*i].is_nan())).collect();
        self.without += placed.len() - whole.len();
        let values: Vec<Vec<f64>> =
            values.iter().map(|v| whole.iter().map(|i| v[*i]).collect()).collect();
        self.beyond += (0..whole.len()).filter(|i| design.beyond(&values, *i) > 0.0).count();
        Ok((whole.iter().map(|i| placed[*i]).collect(), values))
    }

    fn warnings(&self) -> Vec<String> {
        let mut said = Vec::new();
        if self.cut > 0 {
            said.push(format!(
                "{} target{} in the barrier, or where no way leads from a site: nothing was predicted there",
                self.cut,
                plural(self.cut)
            ));
        }
        if self.without > 0 {
            said.push(format!(
                "{} target{} without data for a covariate: nothing was predicted there",
                self.without,
                plural(self.without)
            ));
        }
        if self.beyond > 0 {
            said.push(format!(
                "{} target{} with a covariate outside what was seen at sites: there a prediction extends a \
                 line, or has an effect that nobody knows",
                self.beyond,
                plural(self.beyond)
            ));
        }
        said
    }
}

/// What the columns are of, by how their names begin.
fn kinds(outcome: &Outcome, new_survey: Option<f64>) -> Vec<(&'static str, String)> {
    let counts = matches!(outcome, Outcome::Counts { .. } | Outcome::Cases { .. });
    let village = if counts { "a new village" } else { "one more value" };
    let [surface, observation] = KINDS.map(|(kind, _)| kind);
    let mut kinds = vec![(surface, "the surface".to_string()), (observation, village.to_string())];
    if let Some(n) = new_survey {
        let among = match outcome {
            Outcome::Cases { .. } => "cases in a population or person-time of",
            _ => "positives among the tested:",
        };
        kinds.push(("count", format!("a new survey, {among} {n}")));
    }
    kinds
}

/// What can be checked before anything is read.
fn check(args: &Args) -> Result<()> {
    if !args.out.extension().is_some_and(|e| e == "parquet" || e == "csv") {
        return Err(Error::input("predictions are written as .parquet or .csv")
            .fact("out", args.out.display())
            .try_this("for example --out predictions.parquet"));
    }
    refuse_existing(&args.out, args.force)?;
    refuse_existing(&Predictions::beside(&args.out), args.force)?;
    let real = |path: &Path| path.canonicalize().ok();
    for input in [&args.context, &args.targets] {
        if real(&args.out).is_some_and(|out| Some(out) == real(input)) {
            return Err(Error::input("the output would replace an input")
                .fact("out", args.out.display())
                .try_this("choose another --out"));
        }
    }
    if let Some(level) = args.quantiles.iter().find(|q| !(**q > 0.0 && **q < 1.0)) {
        return Err(Error::input("a quantile lies between 0 and 1")
            .fact("quantile", level)
            .try_this("write 0.975 for the 97.5 % quantile"));
    }
    if let Some(threshold) = args.threshold.iter().find(|t| !t.is_finite()) {
        return Err(Error::input("a threshold must be a number")
            .fact("threshold", threshold)
            .try_this("write it in outcome units: 0.2 for a prevalence of 20 %"));
    }
    Ok(())
}

/// Names for the coordinates, where only geometries hold them.
fn coordinates(targets: &Targets) -> Option<[&'static str; 2]> {
    let names = if targets.crs.is_geographic() { ["lon", "lat"] } else { ["x", "y"] };
    let held = |name: &String| names.iter().any(|n| name.eq_ignore_ascii_case(n));
    (targets.geometries && !targets.names().iter().any(held)).then_some(names)
}

impl Asked<'_> {
    /// Names of the columns of one kind.
    fn labels(&self, kind: &str) -> Vec<String> {
        let mut names = vec![format!("{kind}_mean"), format!("{kind}_sd")];
        names.extend(self.quantiles.iter().map(|q| format!("{kind}_quantile_{q}")));
        names.extend(self.thresholds.iter().map(|t| format!("{kind}_exceedance_{t}")));
        names
    }

    /// Names of every column to write.
    ///
    /// # Errors
    /// [`Error::Input`] if two would have the same name.
    fn names(&self, targets: &Targets) -> Result<Vec<String>> {
        let mut names: Vec<String> = Vec::new();
        names.extend(coordinates(targets).into_iter().flatten().map(String::from));
        names.extend(targets.names().iter().cloned());
        names.extend(KINDS.iter().flat_map(|(kind, _)| self.labels(kind)));
        if self.new_survey.is_some() {
            names.extend(["count_mean".to_string(), "count_sd".to_string()]);
            names.extend(self.quantiles.iter().map(|q| format!("count_quantile_{q}")));
        }
        for (i, name) in names.iter().enumerate() {
            if names[..i].contains(name) {
                return Err(Error::input(format!("two columns would be called `{name}`"))
                    .fact("targets", targets.source().display())
                    .try_this(
                        "rename the column in the table of targets, or ask for each quantile and \
                         threshold once",
                    ));
            }
        }
        Ok(names)
    }

    /// What the posterior says at each of `sites`, in the order of the names.
    fn answers(
        &self,
        posterior: &dyn Posterior,
        frame: &Frame,
        sites: &Sites,
    ) -> Result<Vec<Vec<f64>>> {
        let predictive = posterior.at(sites)?;
        let mut answers = vec![Vec::new(); sites.len()];
        for (_, of) in KINDS {
            let marginals = frame.outcome(predictive.marginals(0, of)?);
            if marginals.len() != sites.len() {
                return Err(Error::axis(
                    "targets asked and answered",
                    sites.len(),
                    marginals.len(),
                ));
            }
            let rows = marginals.map(|m, i| self.row(m, i));
            answers.iter_mut().zip(rows).for_each(|(answer, row)| answer.extend(row));
            if let (Of::Observation, Some(trials)) = (of, self.new_survey) {
                let rows = marginals.map(|m, i| self.count(m, i, trials));
                for (answer, row) in answers.iter_mut().zip(rows) {
                    answer.extend(row?);
                }
            }
        }
        Ok(answers)
    }

    /// What a new survey of `trials` would count.
    fn count(&self, marginals: &Marginals, i: usize, trials: f64) -> Result<Vec<f64>> {
        let counts = Counts::new(marginals, i, trials)?;
        let mut row = vec![counts.mean(), counts.sd()];
        row.extend(self.quantiles.iter().map(|q| counts.quantile(*q)));
        Ok(row)
    }

    fn row(&self, marginals: &Marginals, i: usize) -> Vec<f64> {
        let (mean, sd) = marginals.mean_sd(i);
        let mut row = vec![mean, sd];
        row.extend(self.quantiles.iter().map(|q| marginals.quantile(i, *q)));
        row.extend(self.thresholds.iter().map(|t| marginals.exceedance(i, *t)));
        row
    }
}
