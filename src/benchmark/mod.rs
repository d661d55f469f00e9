//! Benchmarks of the neural process family: train models on a published protocol, and score them
//! beside the process that made the data. Registry: [`TASKS`].
//!
//! task × model × seed is a cell, which [`train::run`] trains; every cell is scored on the same
//! tasks, in f64, and no score may pass that of the true process.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use candle_core::Device;

use crate::{
    baseline::IntegratedGp,
    checkpoint::{Card, Checkpoint},
    error::{Error, Result},
    model::autoregressive::Autoregressive,
    process::Process,
    recipe::Recipe,
    registry::Named,
    rng::Stream,
    task::Tasks,
    train, whole,
};

mod clusters;
mod definition;
mod pictures;
pub mod scale;
mod score;
mod table;

use clusters::Agreement;
pub use definition::{Definition, model, models};
use definition::{Evaluation, Model};
use score::{Fixed, Mean, Scores};

/// Model tables, as a file.
const MODELS: &str = include_str!("models.toml");

/// A registered task.
#[derive(Debug)]
pub struct Task {
    /// The name that the command takes.
    pub name: &'static str,
    /// Its file.
    text: &'static str,
}

macro_rules! task {
    ($name:literal) => {
        Task { name: $name, text: include_str!(concat!("tasks/", $name, ".toml")) }
    };
}

/// Every task.
pub const TASKS: &[Task] = &[
    task!("gp-a"),
    task!("gp-b-eq"),
    task!("gp-b-matern"),
    task!("gp-b-weakly-periodic"),
    task!("gp-b-noisy-mixture"),
    task!("gp-b-sawtooth"),
    task!("gp-c-eq"),
    task!("gp-c-matern"),
    task!("gp-c-weakly-periodic"),
    task!("gp-c-sawtooth"),
    task!("gp-c-mixture"),
    task!("gp-d-rbf"),
    task!("gp-d-matern"),
    task!("gp-d-periodic"),
    task!("gp-h"),
    task!("gp-r-eq"),
    task!("ladder"),
    task!("clusters"),
    task!("tnp-kr-rbf"),
    task!("tnp-kr-matern"),
    task!("tnp-kr-periodic"),
    task!("tnp-kr-rbf-2d"),
    task!("bsa-tnp-1d"),
    task!("bsa-tnp-2d"),
    task!("sine"),
];

impl Named for Task {
    fn name(&self) -> &str {
        self.name
    }
    /// The first line of its file.
    fn about(&self) -> &str {
        self.text.trim_start_matches("about = \"").split('"').next().unwrap_or_default()
    }
}

/// What the caller asks for.
#[derive(Debug)]
pub struct Options {
    /// The task.
    pub task: &'static Task,
    /// Models by name; those of the task when empty.
    pub models: Vec<String>,
    /// Seeds 1 … this, each a training.
    pub seeds: u64,
    /// Steps of each training, instead of the task's.
    pub steps: Option<u64>,
    /// Wall time for all trainings together.
    pub budget: Option<Duration>,
    /// Go on from what `out` holds.
    pub resume: bool,
    /// Folder for cells, scores, tables and pictures.
    pub out: PathBuf,
    /// Evaluation tasks, instead of the task's.
    pub tasks: Option<usize>,
    /// Trainings side by side, each on its share of the threads.
    pub jobs: usize,
    /// Least standard deviation of every head, instead of the task's.
    pub floor: Option<f64>,
    /// Kernels to draw for the exact process that is not told the kernel; none to leave it out.
    pub integrated: Option<usize>,
    /// Words on the machine, for the cards.
    pub machine: String,
}

/// What a name ends in when the model is deployed autoregressively.
const AUTOREGRESSIVE: &str = "+ar";
/// Targets that an autoregressive deployment draws one by one.
const COARSE: usize = 48;

/// A training: one model, one seed. Deployments of one model share it.
struct Cell {
    model: String,
    seed: u64,
    recipe: Recipe,
    steps: u64,
    out: PathBuf,
}

/// How a finished or stopped training was scored.
struct Trained {
    card: Card,
    /// Steps it was meant to take.
    steps: u64,
    /// What it measured in its last steps, beside its loss.
    measured: Vec<(String, f64)>,
    /// Scores by evaluation and task.
    scores: Vec<Vec<Scores>>,
    /// By evaluation: how its task embedding tells classes apart, where it has one and they are some.
    agreement: Vec<Option<Agreement>>,
}

/// All seeds of one model.
struct Entrant {
    name: String,
    floor: f64,
    seeds: Vec<Trained>,
}

/// An evaluation, drawn.
struct Drawn {
    name: String,
    fixed: Fixed,
    /// What the exact process scores that is not told the kernel, and how many kernels count where
    /// fewest do.
    integrated: Option<(Vec<Scores>, f64)>,
}

/// Trains and scores what `options` asks for, and writes tables and pictures. Returns the Markdown
/// table. `tell` hears of progress, from any thread.
///
/// # Errors
/// [`Error::Unknown`] for a model that has no table; [`Error::Input`] for a folder that holds another
/// benchmark, or one to go on with when that was not asked; and for a score above what the true
/// process reaches, which can only be a leak: tables are written first.
pub fn run(options: &Options, tell: &(dyn Fn(String) + Sync)) -> Result<String> {
    let mut definition = Definition::of(options.task)?;
    if let Some(floor) = options.floor {
        definition.floor = floor;
        definition.floors.clear();
    }
    let names = if options.models.is_empty() { &definition.models } else { &options.models };
    let cells = cells(options, &definition, names)?;
    train_all(options, &cells, tell)?;

    let count = options.tasks.unwrap_or(definition.tasks).max(2 * score::ROWS);
    let mut floors: Vec<f64> =
        names.iter().map(|n| floor(&definition, n)).collect::<Result<_>>()?;
    floors.retain(|f| *f > 0.0);
    floors.sort_by(f64::total_cmp);
    floors.dedup();
    let mut drawn = Vec::new();
    for evaluation in &definition.evaluation {
        tell(format!("{}: {count} tasks, and the true process on them", evaluation.name));
        let tasks = tasks_of(&definition, evaluation)?;
        let fixed = Fixed::new(&tasks, definition.reward()?, count, &floors)?;
        let integrated = options.integrated.map(|draws| {
            tell(format!("{}: the process integrated over {draws} kernels", evaluation.name));
            let mut rng = Stream::new(score::SEED, "kernels", 0);
            let (prior, likelihood) = (tasks.prior(), tasks.likelihood());
            let process = IntegratedGp::over(prior, draws, likelihood, &mut rng)?;
            Ok::<_, Error>((fixed.meet(&process)?, fixed.effective(&process)?))
        });
        let integrated = integrated.transpose()?;
        drawn.push(Drawn { name: evaluation.name.clone(), fixed, integrated });
    }
    let mut entrants = Vec::<Entrant>::new();
    for cell in &cells {
        let checkpoint = Checkpoint::open(&cell.out)?;
        tell(format!("scoring {} (seed {})", cell.model, cell.seed));
        let (scores, agreement) = cell.ask(&checkpoint, |process| {
            let scores = drawn.iter().map(|d| d.fixed.meet(process)).collect::<Result<_>>()?;
            let told = drawn.iter().map(|d| told_apart(&d.fixed, process));
            Ok((scores, told.collect::<Result<_>>()?))
        })?;
        let measured = train::measured(&cell.out).unwrap_or_default();
        let (card, steps) = (checkpoint.card, cell.steps);
        let trained = Trained { card, steps, measured, scores, agreement };
        match entrants.last_mut().filter(|e| e.name == cell.model) {
            Some(entrant) => entrant.seeds.push(trained),
            None => entrants.push(Entrant {
                name: cell.model.clone(),
                floor: floor(&definition, &cell.model)?,
                seeds: vec![trained],
            }),
        }
    }

    table::write_scores(&options.out.join("scores.parquet"), &drawn, &entrants)?;
    let markdown = table::markdown(options, &definition, &drawn, &entrants)?;
    whole::write_bytes(&options.out.join("table.md"), markdown.as_bytes())?;
    pictures::sizes(&options.out.join("sizes.png"), options.task, &drawn, &entrants)?;
    pictures::clusters(&options.out.join("clusters.png"), options.task, &drawn, &entrants)?;
    let posteriors = options.out.join("posteriors.png");
    pictures::posteriors(&posteriors, options.task, &definition, &cells)?;
    let leaks = leaks(&drawn, &entrants);
    if leaks.is_empty() {
        return Ok(markdown);
    }
    let mut error = Error::input(
        "a model scores more than 3 standard errors above the true process: it was told the answer",
    );
    for (who, gap) in leaks {
        error = error.fact(who, gap);
    }
    Err(error.try_this("look for a leak of targets into the context"))
}

/// How a process's task embedding tells the classes of an evaluation apart.
fn told_apart(fixed: &Fixed, process: &(dyn Process + Send + Sync)) -> Result<Option<Agreement>> {
    let Some((names, class)) = fixed.classes() else { return Ok(None) };
    let Some(embedding) = fixed.embed(process)? else { return Ok(None) };
    Ok(Some(clusters::agreement(&embedding, &class, names.len())?))
}

/// Least sd that a model can say: 0 for those whose head cannot be told.
fn floor(definition: &Definition, name: &str) -> Result<f64> {
    let base = name.trim_end_matches(AUTOREGRESSIVE);
    Ok(if model(base)?.head.is_empty() { 0.0 } else { definition.floor(base) })
}

/// Tasks are drawn one by one: those that share a kernel would not be independent.
fn tasks_of(definition: &Definition, evaluation: &Evaluation) -> Result<Tasks> {
    let mut tables = definition.tables(evaluation);
    if let Some(task) = tables.get_mut("task").and_then(|t| t.as_table_mut()) {
        task.insert("share".into(), 1.into());
    }
    Tasks::new(&tables)
}

/// Every training that is asked for, checked before any begins.
fn cells(options: &Options, definition: &Definition, names: &[String]) -> Result<Vec<Cell>> {
    let folder = options.out.join("cells");
    let mut cells = Vec::new();
    for name in names {
        let base = name.trim_end_matches(AUTOREGRESSIVE);
        let model: Model = model(base)?;
        let recipe = definition.recipe(options.task.name, base, &model, options.steps)?;
        let settings: train::Settings = recipe.settings("train")?;
        for seed in 1..=options.seeds.max(1) {
            let cell = Cell {
                model: name.clone(),
                seed,
                recipe: recipe.clone(),
                steps: settings.steps,
                out: folder.join(format!("{base}-{seed}.safetensors")),
            };
            let begun = [&cell.out, &cell.out.with_extension("state.safetensors")];
            if begun.iter().any(|file| file.exists()) && !options.resume {
                return Err(Error::input("the folder holds trained cells already")
                    .fact("cell", cell.out.display())
                    .try_this("--resume goes on with them; or name another folder with --out"));
            }
            cells.push(cell);
        }
    }
    std::fs::create_dir_all(&folder).map_err(|e| Error::io("make the folder", &folder, e))?;
    Ok(cells)
}

impl Cell {
    /// Asks the trained process, deployed as the name says.
    fn ask<T>(
        &self,
        checkpoint: &Checkpoint,
        ask: impl FnOnce(&(dyn Process + Send + Sync)) -> Result<T>,
    ) -> Result<T> {
        let process = checkpoint.process(&Device::Cpu)?;
        match self.model.ends_with(AUTOREGRESSIVE) {
            true => ask(&Autoregressive::new(&*process, checkpoint.likelihood()?, COARSE)?),
            false => ask(&*process),
        }
    }

    /// Whether it is trained to the end; an error if another recipe made it.
    fn done(&self) -> Result<bool> {
        if !self.out.exists() {
            return Ok(false);
        }
        let card = Checkpoint::open(&self.out)?.card;
        if card.recipe != self.recipe.text() {
            return Err(Error::input("a cell of this folder was trained by another recipe")
                .fact("cell", self.out.display())
                .try_this("name another folder with --out, or delete the cell"));
        }
        Ok(card.steps == self.steps)
    }

    fn train(
        &self,
        options: &Options,
        until: Option<Instant>,
        threads: usize,
        tell: &(dyn Fn(String) + Sync),
    ) -> Result<()> {
        if self.done()? {
            return Ok(());
        }
        let how = train::Options {
            out: self.out.clone(),
            resume: self.out.with_extension("state.safetensors").exists(),
            steps: Some(self.steps),
            stop_at: None,
            seed: self.seed,
            devices: vec![Device::Cpu],
            drawing: 0,
            machine: options.machine.clone(),
            start: None,
            until,
            threads: Some(threads),
        };
        let who = format!("{} (seed {})", self.model, self.seed);
        train::run(&self.recipe, &how, |p| {
            if let Some(validation) = p.validation {
                let (step, steps, speed) = (p.step, p.steps, p.steps_per_s);
                let gap =
                    p.gap.map_or(String::new(), |gap| format!(", {gap:+.4} to the true process"));
                tell(format!("{who}: step {step}/{steps}, {speed:.1} steps/s, validation {validation:.4}{gap}"));
            }
        })
        .map_err(|e| e.fact("cell", &who))?;
        Ok(())
    }
}

/// Trains the cells, `jobs` side by side. What a cell leaves of its share of the budget, the
/// later ones get.
fn train_all(options: &Options, cells: &[Cell], tell: &(dyn Fn(String) + Sync)) -> Result<()> {
    let mut open = VecDeque::new();
    for cell in cells {
        let known = open.iter().any(|other: &&Cell| other.out == cell.out);
        if !known && !cell.done()? {
            open.push_back(cell);
        }
    }
    let jobs = options.jobs.clamp(1, open.len().max(1));
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = (cores / jobs).max(1);
    let deadline = options.budget.map(|budget| Instant::now() + budget);
    let (open, failed) = (Mutex::new(open), Mutex::new(None));
    let work = || {
        loop {
            let (cell, left) = {
                let mut open = open.lock().expect("no worker panics");
                let left = open.len();
                match open.pop_front() {
                    Some(cell) => (cell, left),
                    None => return,
                }
            };
            // The last cells, one for each worker, have all the time that is left.
            let rounds = left.div_ceil(jobs) as u32;
            let until = deadline.map(|end| {
                let now = Instant::now();
                now + end.saturating_duration_since(now) / rounds
            });
            if let Err(error) = cell.train(options, until, threads, tell) {
                open.lock().expect("no worker panics").clear();
                failed.lock().expect("no worker panics").get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| (0..jobs).for_each(|_| drop(scope.spawn(work))));
    match failed.into_inner().expect("no worker panics") {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Scores that pass the true process's by more than 3 standard errors of the difference.
fn leaks(drawn: &[Drawn], entrants: &[Entrant]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entrant in entrants {
        for (i, drawn) in drawn.iter().enumerate() {
            for trained in &entrant.seeds {
                for (what, gap) in gaps(&drawn.fixed, &trained.scores[i], entrant.floor) {
                    if gap.mean > 3.0 * gap.error + 1e-6 {
                        let who = format!("{}, {}, {what}", entrant.name, drawn.name);
                        found.push((who, format!("{:+.4} ± {:.4}", gap.mean, gap.error)));
                    }
                }
            }
        }
    }
    found
}

/// How far scores lie above the ceilings that apply, on tasks where those are known.
fn gaps(fixed: &Fixed, scores: &[Scores], floor: f64) -> Vec<(&'static str, Mean)> {
    let ceiling = fixed.ceiling(floor);
    let over = |gap: &dyn Fn(usize) -> f64| {
        let known = (0..scores.len()).map(|i| (fixed.facts[i].cluster, gap(i)));
        Mean::of(known.filter(|(_, gap)| gap.is_finite()))
    };
    let joint =
        |i: usize| fixed.exact[i].as_ref().map_or(f64::NAN, |exact| scores[i].joint - exact.joint);
    vec![("pointwise", over(&|i| scores[i].pointwise - ceiling[i])), ("joint", over(&joint))]
}

/// The folder that a task writes to unless told otherwise.
pub fn usual_folder(task: &Task) -> PathBuf {
    Path::new("out").join("benchmark").join(task.name)
}

#[cfg(test)]
mod tests;
