//! `isopleth validate`: conditions again for each fold, and scores the sites held out.
//!
//! Nothing is retrained: a model sees the other folds as its context. Beside it stand two rules
//! that anyone could apply, since a score means nothing alone.

use std::{path::PathBuf, sync::Arc, time::Instant};

use candle_core::Device;
use serde_json::{Value, json};

use super::{
    covariates::{self, CovariateArgs},
    map::{TREND, cut_into, exact, nearest, placed},
    note,
    output::Output,
    say,
    survey::{SurveyArgs, agree, agree_in_time, at_home, default_model},
    trust::{self, StrictArgs},
    windows::{self, WindowArgs},
};
use crate::{
    baseline::{
        Coefficients, ExactGp, Regressed,
        rules::{RULES, Seen},
    },
    checkpoint::Checkpoint,
    error::{Error, Result},
    geo::{
        displacement::Displacement,
        frame::Frame,
        survey::{Outcome, Survey},
        table::Columns,
    },
    kernel::displaced::mark,
    likelihood::{self, Likelihood},
    mapping::displaced::Expected,
    predictive::{Of, Predictive},
    process::Process,
    rng::Stream,
    score::{Forecast, Summary, Truth, forecasts},
    sites::{Observations, Sites},
};

mod ahead;
pub(super) mod report;
mod space;

/// The model names of the exact Gaussian process and of that of nearest neighbours.
const GP: &str = "gp";
const VECCHIA: &str = "vecchia";
/// What regression on the covariates alone is called beside the rules.
const REGRESSION: &str = "covariates-only";

/// What is scored.
const SCORED: &str = "new observations, each of its site's own number tested or exposure";

/// Hold sites out fold by fold, predict them from the others, and score the predictions
#[derive(clap::Args)]
pub struct Args {
    /// The survey
    #[command(flatten)]
    survey: SurveyArgs,
    #[command(flatten)]
    covariates: CovariateArgs,
    /// How sites are held out: a number of random folds (10); whole areas, as many as you say
    /// (blocks:10) or squares of a size (blocks:100km); whole clusters, sites nearer to each other than
    /// a length (clusters:5km) or alike in a column (clusters:district); the last periods of a survey with
    /// --time, each foretold from what came before it alone (times:3); or a table with a column of fold
    /// labels (FILE:COLUMN), whose rows are those of the survey file, in order or named by a
    /// column `row` that counts from 0
    #[arg(long, value_name = "N|blocks:…|clusters:…|times:N|FILE:COLUMN")]
    folds: String,
    /// Models by name or file, the first compared with all others: `prevalence` for counts and
    /// `continuous` for values when left out; `gp` fits an exact Gaussian process to every fold's
    /// context, `vecchia` one of nearest neighbours, `vecchia-trend` that with a trend. `intercept-only` and `nearest-site` always stand
    /// beside them
    #[arg(long, value_name = "NAME|FILE,…", value_delimiter = ',')]
    model: Vec<String>,
    /// Seed of folds that chance has a part in
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Directory for the predictions of every site (sites.csv, sites.parquet), the tables (report.md,
    /// report.json) and a picture of the calibration (calibration.png)
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Replace the files of an earlier run in that directory
    #[arg(long, requires = "out")]
    force: bool,
    #[command(flatten)]
    windows: WindowArgs,
    #[command(flatten)]
    strict: StrictArgs,
}

/// Which fold each site belongs to.
#[derive(Debug, Clone, PartialEq)]
pub struct Folds {
    /// Label of each fold, in order.
    pub labels: Vec<String>,
    /// Fold of each site, `[site]`, a position in `labels`; [`Folds::NEVER`] for sites that no fold holds out.
    pub of: Vec<usize>,
    /// Folds follow each other in time, and each is foretold from those before it and from the sites that
    /// are never held out.
    pub ahead: bool,
}

/// What predicts the held-out sites: context in, predictive at targets out.
///
/// Where the survey's sites are displaced, it is told by which law each of the context's is, in model
/// units; and the targets are marked ([`crate::kernel::displaced::mark`]).
pub type Forecaster<'a> =
    dyn Fn(&Observations, &Sites, Option<&Displacement>) -> Result<Predictive> + 'a;

/// One fold, scored.
pub struct Fold {
    /// Its label.
    pub label: String,
    /// Each held-out site with its forecast, in the order of the survey.
    pub met: Vec<Forecast>,
    /// The same sites, forecast by each of [`RULES`], and by regression where there are covariates.
    pub rules: Vec<(&'static str, Vec<Forecast>)>,
    /// Time to condition and predict, seconds.
    pub seconds: f64,
}

/// Validates and prints.
///
/// # Errors
/// What is wrong with the survey, the folds, or the model.
pub fn run(args: &Args) -> Result<()> {
    let layer = args.survey.columns.layer.as_deref();
    let survey = args.covariates.attach(args.survey.read()?, layer)?;
    survey.notes.iter().for_each(note);
    for dropped in &survey.dropped {
        note(format!("row {} left out: {}", dropped.row, dropped.reason));
    }
    if let Some(moved) = &survey.displacement {
        note(format!("displaced: {moved}: integrated over, for sites held out too"));
    }
    let folds = Folds::parse(&args.folds, &survey, args.seed)?;
    let mut output = args.out.as_deref().map(|out| Output::prepare(out, args.force)).transpose()?;
    let models = models(&args.model, &survey)?;
    let forecasters =
        models.iter().map(|m| forecaster(m, &survey, &args.windows)).collect::<Result<Vec<_>>>()?;
    let (frame, mut warnings) = (Frame::fit(&survey)?, Vec::new());
    for model in &models {
        let verdict = trust::examine(model, &survey, &frame)?;
        args.strict.settle(model, &survey, &verdict)?;
        warnings.extend(trust::warnings(&verdict).into_iter().map(|w| format!("{model}: {w}")));
    }
    warnings.iter().for_each(|w| note(format!("warning: {w}")));
    let each = forecasters.iter().map(|ask| cross_validate(&survey, &folds, &**ask));
    let scored = each.collect::<Result<Vec<_>>>()?;
    let whole = report::Report::new(&survey, &folds, &args.folds, &models, &scored, warnings);
    if let Some(output) = &mut output {
        whole.write(output)?;
    }
    match (args.json, &models[..], &scored[..]) {
        (true, ..) => say(whole.json(&models[0], &scored[0])),
        (false, [model], [folds]) => {
            table(model, folds)?;
            whole.calibration().try_for_each(say)
        }
        _ => whole.table().try_for_each(say),
    }
}

/// `model` validated on `count` random folds of a survey, read in windows where it is large.
///
/// # Errors
/// As [`cross_validate`].
pub(super) fn hold_out(
    model: &str,
    survey: &Survey,
    count: usize,
    windows: &WindowArgs,
) -> Result<report::Report> {
    let folds = Folds::random(count, survey.len(), 1)?;
    let ask = forecaster(model, survey, windows)?;
    let scored = cross_validate(survey, &folds, &*ask)?;
    let (how, models) = (count.to_string(), [model.to_string()]);
    Ok(report::Report::new(survey, &folds, &how, &models, &[scored], Vec::new()))
}

/// The models asked for, each once; rules stand beside every model, and need no asking for.
fn models(asked: &[String], survey: &Survey) -> Result<Vec<String>> {
    let mut models: Vec<String> = Vec::new();
    for model in asked.iter().map(|m| m.trim()) {
        if model.is_empty() {
            return Err(Error::input("a model has no name")
                .fact("--model", asked.join(","))
                .try_this("write for example --model prevalence,gp"));
        }
        if !models.iter().any(|m| m == model) && !RULES.iter().any(|(name, _)| *name == model) {
            models.push(model.to_string());
        }
    }
    if models.is_empty() {
        models.push(default_model(survey).into());
    }
    Ok(models)
}

/// What stands beside each other: the model's forecasts of every site, then each rule's.
fn entrants(folds: &[Fold]) -> (Vec<Forecast>, Vec<(&'static str, Vec<Forecast>)>) {
    let names =
        folds.first().map_or(Vec::new(), |f| f.rules.iter().map(|(name, _)| *name).collect());
    let rule = |(r, name): (usize, &'static str)| {
        (name, folds.iter().flat_map(|f| f.rules[r].1.clone()).collect())
    };
    let rules = names.into_iter().enumerate().map(rule).collect();
    (folds.iter().flat_map(|f| f.met.clone()).collect(), rules)
}

/// The forecaster that `--model` names.
fn forecaster(
    model: &str,
    survey: &Survey,
    windows: &WindowArgs,
) -> Result<Box<Forecaster<'static>>> {
    let wanted = likelihood::find(survey.outcome.likelihood())?;
    if model == GP {
        return Ok(exact_gp(wanted));
    }
    if [VECCHIA, TREND].contains(&model) {
        return Ok(nearest_gp(wanted, model == TREND));
    }
    let checkpoint = Checkpoint::resolve(model)?;
    agree(model, checkpoint.likelihood()?, survey)?;
    let reads = covariates::reads(model, checkpoint.covariates(), survey)?;
    let design = checkpoint.recipe()?.tasks()?.design().clone();
    agree_in_time(model, design.has_times(), survey)?;
    let process = checkpoint.process(&Device::Cpu)?;
    at_home(model, &*process, survey)?;
    let cut = windows.of(&checkpoint, survey.len())?;
    cut.iter().for_each(|cut| note(format!("{model}: {}", windows::about(cut, survey.len()))));
    let process = cut_into(process, wanted, cut)?;
    let process: Arc<dyn Process + Send + Sync> = process.into();
    Ok(Box::new(move |context, targets, moved| match (moved, &context.sites.x) {
        (None, None) => process.condition(context)?.at(targets),
        (None, Some(_)) if reads => process.condition(context)?.at(targets),
        (None, Some(_)) => {
            let (coefficients, _) = Coefficients::of(context, wanted)?;
            let all = Regressed::new(process.clone(), coefficients.spread()?, wanted, true);
            all.condition(context)?.at(targets)
        }
        (Some(moved), _) => {
            let process = placed(Box::new(process.clone()), &design, moved.clone());
            process.condition(context)?.at(targets)
        }
    }))
}

/// Fits an exact Gaussian process to each context, then conditions it on that context.
pub fn exact_gp(likelihood: &'static dyn Likelihood) -> Box<Forecaster<'static>> {
    Box::new(move |context, targets, moved| {
        fitted(Box::new(exact(context, likelihood, moved)?), context, targets, moved)
    })
}

/// Fits a nearest-neighbour Gaussian process to each context, with or without a trend, then conditions it
/// on that context.
pub fn nearest_gp(likelihood: &'static dyn Likelihood, trend: bool) -> Box<Forecaster<'static>> {
    Box::new(move |context, targets, moved| {
        if context.sites.x.is_some() {
            let (process, ..) = Regressed::nearest(context, likelihood, trend)?;
            return process.condition(context)?.at(targets);
        }
        fitted(Box::new(nearest(context, likelihood, moved, trend)?), context, targets, moved)
    })
}

/// What a process fitted to a context says of targets.
fn fitted(
    process: Box<dyn Process + Send + Sync>,
    context: &Observations,
    targets: &Sites,
    moved: Option<&Displacement>,
) -> Result<Predictive> {
    match moved {
        None => process.condition(context)?.at(targets),
        Some(moved) => Expected::new(process, moved.clone()).condition(context)?.at(targets),
    }
}

/// Predicts every fold from the others.
///
/// # Errors
/// [`Error::Input`] if a fold leaves fewer than three sites to learn from; else as the forecaster.
pub fn cross_validate(survey: &Survey, folds: &Folds, ask: &Forecaster) -> Result<Vec<Fold>> {
    let device = Device::Cpu;
    let fold = |(fold, label): (usize, &String)| {
        let (held, seen): (Vec<usize>, Vec<usize>) =
            (0..survey.len()).filter(|i| folds.reads(fold, *i)).partition(|i| folds.of[*i] == fold);
        if seen.len() < 3 {
            return Err(Error::input("a fold leaves fewer than 3 sites to learn from")
                .fact("fold", label)
                .fact("sites left", seen.len())
                .try_this("use more folds"));
        }
        let (seen, held) = (survey.subset(&seen), survey.subset(&held));
        let truths = truths(&held.outcome);
        let started = Instant::now();
        let frame = Frame::fit(&seen)?;
        let context = frame.observations(&seen, &device)?;
        let targets = frame.sites_of(&held, &device)?;
        let (moved, asked) = match (&seen.displacement, &held.displacement) {
            (Some(seen), Some(held)) => {
                let asked = mark(&targets, &frame.displacement(held))?;
                (Some(frame.displacement(seen)), asked)
            }
            _ => (None, targets.clone()),
        };
        let marginals = ask(&context, &asked, moved.as_ref())?.marginals(0, Of::Observation)?;
        let seconds = started.elapsed().as_secs_f64();
        let met = forecasts(&frame.outcome(marginals), &truths)?;
        let (here, there) = (context.sites.host()?.swap_remove(0), targets.host()?.swap_remove(0));
        let by_rules = seen_by_rules(&seen, here);
        let each = RULES
            .iter()
            .map(|(name, rule)| Ok((*name, forecasts(&rule(&by_rules, &there), &truths)?)));
        let mut rules = each.collect::<Result<Vec<_>>>()?;
        if context.sites.x.is_some() {
            let likelihood = likelihood::find(seen.outcome.likelihood())?;
            let gp = ExactGp::regression(&context, likelihood)?;
            let marginals = gp.condition(&context)?.at(&targets)?.marginals(0, Of::Observation)?;
            rules.push((REGRESSION, forecasts(&frame.outcome(marginals), &truths)?));
        }
        Ok(Fold { label: label.clone(), met, rules, seconds })
    };
    folds.labels.iter().enumerate().map(fold).collect()
}

fn truths(outcome: &Outcome) -> Vec<Truth> {
    match outcome {
        Outcome::Values(values) | Outcome::Positive(values) => {
            values.iter().map(|v| Truth::Value(*v)).collect()
        }
        Outcome::Cases { cases, exposure, .. } => cases
            .iter()
            .zip(exposure)
            .map(|(k, n)| Truth::Cases { cases: *k as u64, exposure: *n })
            .collect(),
        Outcome::Counts { positive, tested } => positive
            .iter()
            .zip(tested)
            .map(|(k, n)| Truth::Count { positive: *k as u64, tested: *n as u64 })
            .collect(),
    }
}

impl Folds {
    /// The fold of sites that are never held out.
    pub const NEVER: usize = usize::MAX;

    /// Whether site `i` is looked at where `fold` is held out: to be foretold, or to foretell from.
    fn reads(&self, fold: usize, i: usize) -> bool {
        !self.ahead || self.of[i] == Self::NEVER || self.of[i] <= fold
    }

    /// What `--folds` means: a number, or FILE:COLUMN.
    ///
    /// # Errors
    /// [`Error::Input`] for fewer than two folds or more than sites; a file whose rows are not the
    /// survey's; a site without a fold. As [`Columns::read`] for the file.
    pub fn parse(text: &str, survey: &Survey, seed: u64) -> Result<Self> {
        if let Ok(n) = text.parse() {
            return Self::random(n, survey.len(), seed);
        }
        if let Some(folds) = space::parse(text, survey, seed)? {
            return Ok(folds);
        }
        if let Some(folds) = ahead::parse(text, survey)? {
            return Ok(folds);
        }
        let Some((file, column)) = text.rsplit_once(':') else {
            return Err(Error::input("--folds is no number, blocks:…, clusters:…, times:… or FILE:COLUMN")
                .fact("--folds", text)
                .try_this(
                    "write --folds 10, blocks:10, blocks:100km, clusters:5km, clusters:COLUMN, times:3 or \
                     folds.csv:fold",
                ));
        };
        let table = Columns::read(file)?;
        let labels = table.text(column)?;
        let rows: Vec<usize> = match table.names().iter().any(|name| name == "row") {
            true => table
                .numbers("row")?
                .iter()
                .map(|row| counted(*row, file))
                .collect::<Result<_>>()?,
            false => (1..=table.len()).collect(),
        };
        let label = |row: &usize| {
            let at = rows.iter().position(|r| r == row);
            at.map(|i| labels[i].clone()).filter(|label| !label.is_empty()).ok_or_else(|| {
                Error::input("a site of the survey has no fold")
                    .fact("survey", survey.source.display())
                    .fact("row", row)
                    .fact("folds", file)
                    .try_this("the rows of the folds are those of the survey file, all of them")
            })
        };
        Self::named(&survey.rows.iter().map(label).collect::<Result<Vec<_>>>()?)
    }

    /// `n` folds of as equal size as can be, at random.
    ///
    /// # Errors
    /// [`Error::Input`] unless 2 ≤ n ≤ sites.
    pub fn random(n: usize, sites: usize, seed: u64) -> Result<Self> {
        if !(2..=sites).contains(&n) {
            return Err(Error::input("there must be at least 2 folds and at most one per site")
                .fact("folds", n)
                .fact("sites", sites)
                .try_this("ten are usual: --folds 10"));
        }
        let mut of = vec![0; sites];
        let order = Stream::new(seed, "folds", 0).permutation(sites);
        order.iter().enumerate().for_each(|(i, site)| of[*site] = i % n);
        Ok(Folds { labels: (0..n).map(|i| i.to_string()).collect(), of, ahead: false })
    }

    /// Folds from each site's label, in the order of numbers where the labels are numbers.
    fn named(each: &[String]) -> Result<Self> {
        let mut labels = each.to_vec();
        labels.sort_by(|a, b| match (a.parse::<f64>(), b.parse::<f64>()) {
            (Ok(a), Ok(b)) => a.total_cmp(&b),
            _ => a.cmp(b),
        });
        labels.dedup();
        if labels.len() < 2 {
            return Err(Error::input("every site is in the same fold")
                .fact("fold", labels.join(""))
                .try_this("name a column with at least two different labels"));
        }
        let place = |label| labels.iter().position(|l| l == label).expect("collected above");
        let of = each.iter().map(place).collect();
        Ok(Folds { labels, of, ahead: false })
    }
}

/// A row of the survey as the surveys count them, from 1; folds name them from 0.
fn counted(row: f64, file: &str) -> Result<usize> {
    if row >= 0.0 && row.fract() == 0.0 && row < 1e12 {
        return Ok(row as usize + 1);
    }
    Err(Error::input("column `row` of the folds must count the survey's rows from 0")
        .fact("folds", file)
        .fact("row", row))
}

/// The context as the rules read it, at planar `sites`.
fn seen_by_rules(survey: &Survey, sites: Vec<Vec<f64>>) -> Seen {
    match &survey.outcome {
        Outcome::Values(values) => Seen::values(sites, values.clone()),
        Outcome::Positive(values) => {
            Seen::logarithms(sites, values.iter().map(|v| v.ln()).collect())
        }
        Outcome::Cases { cases, exposure, .. } => Seen::rates(sites, cases, exposure),
        Outcome::Counts { positive, tested } => Seen::counts(sites, positive, tested),
    }
}

/// Every site of every fold: the model's forecasts, then each rule's.
fn pooled(folds: &[Fold]) -> (Summary, Vec<(&'static str, Summary)>) {
    let (all, rules) = entrants(folds);
    let rules = rules.into_iter().map(|(name, met)| (name, Summary::of(&met)));
    (Summary::of(&all), rules.collect())
}

/// The JSON object of `--json`: the scores over all sites, then what they are made of.
pub fn report(model: &str, folds: &[Fold]) -> Value {
    let (all, rules) = pooled(folds);
    let timed = |summary: &Summary, seconds: f64| {
        let mut object = json!(summary);
        object["seconds"] = json!(seconds);
        object
    };
    let mut object = timed(&all, folds.iter().map(|f| f.seconds).sum());
    object["model"] = json!(model);
    object["of"] = json!(SCORED);
    object["folds"] = folds
        .iter()
        .map(|fold| {
            let mut object = timed(&Summary::of(&fold.met), fold.seconds);
            object["fold"] = json!(fold.label);
            object
        })
        .collect();
    let rules = rules.iter().map(|(name, s)| (name.to_string(), json!(s)));
    object["baselines"] = Value::Object(rules.collect());
    object
}

fn table(model: &str, folds: &[Fold]) -> Result<()> {
    let (all, rules) = pooled(folds);
    let mut lines: Vec<(String, Summary, Option<f64>)> = Vec::new();
    for fold in folds {
        lines.push((format!("fold {}", fold.label), Summary::of(&fold.met), Some(fold.seconds)));
    }
    lines.push((model.to_string(), all, Some(folds.iter().map(|f| f.seconds).sum())));
    lines.extend(rules.into_iter().map(|(name, s)| (name.to_string(), s, None)));
    let wide = lines.iter().map(|(name, ..)| name.chars().count()).max().unwrap_or(0);
    say(format!(
        "{:<wide$}{:>7}{:>11}{:>10}{:>10}{:>7}{:>6}{:>6}{:>9}",
        "", "sites", "log score", "crps", "rmse", "50 %", "80 %", "95 %", "seconds"
    ))?;
    for (name, s, seconds) in &lines {
        let [a, b, c] = [s.coverage.at_50, s.coverage.at_80, s.coverage.at_95];
        let time = seconds.map_or(String::new(), |t| format!("{t:9.2}"));
        say(format!(
            "{name:<wide$}{:7}{:11.3}{:>10}{:>10}{a:7.2}{b:6.2}{c:6.2}{time}",
            s.n,
            s.log_score,
            short(s.crps),
            short(s.rmse)
        ))?;
    }
    say(format!("scored: {SCORED}"))?;
    say("log score: nats per site, higher is better; crps, rmse: outcome units, lower is better")
}

/// A positive number in at most eight characters: proportions to four decimals, the rest to about
/// four digits.
fn short(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.4}"),
        v if v < 1000.0 => format!("{v:.2}"),
        v if v < 1e7 => format!("{v:.0}"),
        v => format!("{v:.2e}"),
    }
}
