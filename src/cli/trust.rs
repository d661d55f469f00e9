//! `isopleth trust`: is a survey like those that a model was trained on?

use serde_json::json;

use super::{
    map::FITTED,
    note, say,
    survey::{SurveyArgs, agree, agree_in_time, default_model},
};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    geo::{frame::Frame, survey::Survey},
    train::trust::{self, Judge, Verdict},
};

pub(super) use trust::SITES_FINDING as SITES;

/// Tell whether a survey is like those a model was trained on, figure by figure
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    survey: SurveyArgs,
    /// Model by name or file: `prevalence` for counts and `continuous` for values when left out. With
    /// `gp`, `vecchia` or `vecchia-trend`, which no training limits, only units are looked at
    #[arg(long, value_name = "NAME|FILE")]
    model: Option<String>,
    #[command(flatten)]
    strict: StrictArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Whether a survey unlike the model's training is refused.
#[derive(Debug, Clone, clap::Args)]
pub struct StrictArgs {
    /// Refuse a survey unlike those the model was trained on, instead of warning (`isopleth trust`)
    #[arg(long)]
    strict: bool,
}

/// Judges and prints.
///
/// # Errors
/// What is wrong with the survey or the model; with `--strict`, any finding.
pub fn run(args: &Args) -> Result<()> {
    let survey = args.survey.read()?;
    survey.notes.iter().for_each(note);
    let model = args.model.as_deref().unwrap_or(default_model(&survey));
    let verdict = examine(model, &survey, &Frame::fit(&survey)?)?;
    if args.json {
        let mut object = json!(verdict);
        object["model"] = json!(model);
        say(object)?;
    } else {
        table(model, &verdict)?;
    }
    args.strict.settle(model, &survey, &verdict)
}

/// What can be said of a survey before `model`, which reads its kind of outcome, is believed.
pub(super) fn examine(model: &str, survey: &Survey, frame: &Frame) -> Result<Verdict> {
    let judge = match FITTED.contains(&model) {
        true => None,
        false => {
            let checkpoint = Checkpoint::resolve(model)?;
            agree(model, checkpoint.likelihood()?, survey)?;
            let timed = checkpoint.recipe()?.tasks()?.design().has_times();
            agree_in_time(model, timed, survey)?;
            // One that reads windows of any survey was trained on no kind of survey.
            if checkpoint.any_size() { None } else { Judge::of(&checkpoint)? }
        }
    };
    trust::examine(judge.as_ref(), survey, frame)
}

impl StrictArgs {
    /// Refuses a survey with findings, if that was asked for.
    ///
    /// # Errors
    /// [`Error::Input`] that names every finding.
    pub(super) fn settle(&self, model: &str, survey: &Survey, verdict: &Verdict) -> Result<()> {
        if !self.strict || verdict.findings.is_empty() {
            return Ok(());
        }
        let error = Error::input(
            "the survey is unlike what the model was trained on, or its units are wrong",
        )
        .fact("survey", survey.source.display())
        .fact("model", model);
        let error = verdict.findings.iter().fold(error, |e, f| e.fact(&f.about, &f.text));
        Err(error.try_this(
            "correct the survey; or leave --strict out, and compare with --model gp before you \
             believe the map",
        ))
    }
}

/// The warnings, as other commands print them: each finding, and where to read more.
pub(super) fn warnings(verdict: &Verdict) -> Vec<String> {
    let mut said: Vec<String> = verdict.findings.iter().map(|f| f.text.clone()).collect();
    if !said.is_empty() && verdict.draws > 0 {
        said.push("the survey is not one to be trusted to this model unseen: see `isopleth trust`, `isopleth \
             validate`, and compare with --model gp".into());
    }
    said
}

fn table(model: &str, verdict: &Verdict) -> Result<()> {
    let Verdict { sites, judged, draws, .. } = verdict;
    match (draws, judged < sites) {
        (0, _) => say(format!("{sites} sites; only units were looked at for `{model}`"))?,
        (_, true) => say(format!(
            "{judged} of {sites} sites, thinned at random, beside {draws} surveys from the training of \
             `{model}`"
        ))?,
        _ => say(format!("{sites} sites beside {draws} surveys from the training of `{model}`"))?,
    }
    let lines = verdict.groups.iter().flat_map(|g| &g.lines);
    let wide = lines.clone().map(|l| l.name.chars().count()).max().unwrap_or(0);
    let cell = |f: &dyn Fn(&trust::Line) -> usize| lines.clone().map(f).max().unwrap_or(0).max(8);
    let (here, low, high) = (
        cell(&|l| l.here.chars().count()),
        cell(&|l| l.trained[0].chars().count()),
        cell(&|l| l.trained[1].chars().count()),
    );
    for group in &verdict.groups {
        say(format!(
            "\n{}: {} % of such surveys are as odd as this one{}",
            group.name,
            percent(group.p),
            if group.p <= group.level { "  <- WARNING" } else { "" }
        ))?;
        say(format!(
            "  {:wide$}  {:>here$}  {:>both$}  {:>7}",
            "",
            "here",
            "99 % of training",
            "p",
            both = low + high + 3
        ))?;
        for line in &group.lines {
            say(format!(
                "  {:wide$}  {:>here$}  {:>low$} … {:>high$}  {:>7}{}",
                line.name,
                line.here,
                line.trained[0],
                line.trained[1],
                if line.p < 1e-4 { "<0.0001".into() } else { format!("{:.4}", line.p) },
                if line.found { "  <-" } else { "" }
            ))?;
        }
    }
    if let Some(f) = &verdict.foretold {
        let [a, b, c] = f.inside.map(|v| format!("{:.0}", 100.0 * v));
        say(format!(
            "\nof {} sites, each foretold from four fifths of the others, {a} % lie inside their 50 % \
             interval, {b} % inside 80 %, {c} % inside 95 %",
            f.sites
        ))?;
    }
    say("")?;
    if verdict.findings.is_empty() {
        return say(match draws {
            0 => "nothing was found wrong with the units",
            _ => "nothing was found: the survey is like those the model was trained on",
        });
    }
    verdict.findings.iter().try_for_each(|f| say(format!("WARNING  {}", f.text)))
}

fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    if percent < 9.95 { format!("{percent:.1}") } else { format!("{percent:.0}") }
}
