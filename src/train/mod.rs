//! The training loop, read from top to bottom.
//!
//! recipe → prior draws tasks → condition → at → −log density → optimiser → every so often a
//! validation beside the exact GP on the same tasks → checkpoint.

use std::{
    collections::{BTreeMap, HashMap},
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::{DType, Device, Tensor, backprop::GradStore};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    baseline::ExactGp,
    checkpoint::{self, Card, Checkpoint},
    error::{Error, Result},
    fused::{self, Products, cuda::Choice},
    likelihood::Likelihood,
    model::{self, Problem, params::Params},
    predictive::Predictive,
    process::{Objective, Process, Reward},
    recipe::Recipe,
    rng::Stream,
    sites::{Observations, Task},
    task::{Batch, Tasks},
    whole,
};

pub mod ahead;
pub mod calibration;
pub(crate) mod learner;
pub mod optimiser;
pub mod schedule;
pub mod trust;

use ahead::{Ahead, Closing};
use learner::{Learner, Network, Orders};
use optimiser::{Moments, Rule};

/// The `[train]` table.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Steps in all.
    pub steps: u64,
    /// Peak learning rate.
    pub rate: f64,
    /// Last rate as a fraction of the peak.
    pub last: f64,
    /// Warm-up steps.
    pub warmup: u64,
    /// Global norm that gradients are clipped to.
    pub clip: f64,
    /// Optimiser.
    pub optimiser: Rule,
    /// AdamW's weight decay.
    pub decay: f64,
    /// What is rewarded.
    pub loss: Reward,
    /// Decay of the running average of weights that is validated and kept; 0 keeps the last.
    pub average: f64,
    /// Tasks per step at most.
    pub rows: usize,
    /// Sites per step, context and targets: large surveys come in smaller batches.
    pub sites: usize,
    /// Pairs of sites per step: bounds the cost of attention.
    pub pairs: usize,
    /// Parts that a batch is cut into, computed side by side on the CPU, gradients added in order.
    pub parts: usize,
    /// Steps between validations.
    pub validate_every: u64,
    /// Held-out tasks.
    pub validate_tasks: usize,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// How products are computed on cards; weights, sums and everything else are f32 in any case. On
    /// the CPU f32 alone.
    pub precision: Products,
    /// Only sums of a fixed order: the same numbers in every run on the same machine. On the CPU and on
    /// one card that is so in any case; between cards gradients then go through the host.
    pub deterministic: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            steps: 20_000,
            rate: 1e-3,
            last: 0.01,
            warmup: 500,
            clip: 1.0,
            optimiser: Rule::Adamw,
            decay: 1e-4,
            loss: Reward::Both,
            average: 0.999,
            rows: 32,
            sites: 3072,
            pairs: 600_000,
            parts: 2,
            validate_every: 1000,
            validate_tasks: 192,
            checkpoint_every: 500,
            precision: Products::F32,
            deterministic: false,
        }
    }
}

impl Settings {
    /// # Errors
    /// [`Error::Input`] for numbers that make no training.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("steps", self.steps as f64),
            ("rate", self.rate),
            ("clip", self.clip),
            ("rows", self.rows as f64),
            ("sites", self.sites as f64),
            ("pairs", self.pairs as f64),
            ("parts", self.parts as f64),
            ("validate_every", self.validate_every as f64),
            ("validate_tasks", self.validate_tasks as f64),
            ("checkpoint_every", self.checkpoint_every as f64),
        ];
        for (name, value) in positive {
            if value.is_nan() || value <= 0.0 {
                return Err(Error::input(format!("`{name}` under [train] must be positive"))
                    .fact("written", value)
                    .try_this("compare with the recipes in models/"));
            }
        }
        if self.decay < 0.0 || !(0.0..1.0).contains(&self.average) || self.last < 0.0 {
            return Err(Error::input("`decay`, `last` or `average` under [train] is out of range")
                .try_this("decay ≥ 0, last ≥ 0, 0 ≤ average < 1"));
        }
        Ok(())
    }

    /// Tasks in a batch whose context has `context` sites and that asks `targets`.
    fn batch_rows(&self, context: usize, targets: usize) -> usize {
        let sites = context + targets;
        (self.sites / sites)
            .min(self.pairs / (sites * context.max(1)))
            .clamp(2.min(self.rows), self.rows)
    }
}

/// What the caller decides, beside the recipe.
#[derive(Debug, Clone)]
pub struct Options {
    /// The model file to write; state and journal stand beside it.
    pub out: PathBuf,
    /// Continue from the state beside `out`.
    pub resume: bool,
    /// Overrides the recipe's steps.
    pub steps: Option<u64>,
    /// Stop here for now, with the schedule still aimed at the full number of steps.
    pub stop_at: Option<u64>,
    /// Seed of weights and tasks.
    pub seed: u64,
    /// Where tensors live: the processor, or cards that share each batch.
    pub devices: Vec<Device>,
    /// Threads that draw tasks; 0 for one on the CPU, and all but one beside cards.
    pub drawing: usize,
    /// Words on the machine, for the card.
    pub machine: String,
    /// Weights to start from: every parameter that has the same name and shape.
    pub start: Option<PathBuf>,
    /// Stop for now when this moment has come, as at `stop_at`.
    pub until: Option<Instant>,
    /// Threads for each part of a batch, where several trainings run side by side.
    pub threads: Option<usize>,
}

/// What happened in a training, for the terminal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Progress {
    /// Step just finished.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Mean loss since the last report, nats per target.
    pub loss: f64,
    /// Learning rate.
    pub rate: f64,
    /// Norm of the last gradient.
    pub norm: f64,
    /// Steps per second since the last report.
    pub steps_per_s: f64,
    /// Seconds left at this speed.
    pub seconds_left: f64,
    /// Validation loss, when just measured.
    pub validation: Option<f64>,
    /// Validation loss above the exact GP's.
    pub gap: Option<f64>,
    /// What the process measured since the last report, mean per step: see [`Objective`].
    #[serde(flatten)]
    pub measured: BTreeMap<String, f64>,
}

/// The mean negative log density per target of what a predictive foretold of a task.
///
/// # Shapes
/// Returns a scalar tensor that carries gradients.
pub fn loss(predictive: &Predictive, task: &Task, reward: Reward) -> Result<Tensor> {
    Ok(reward.density(predictive, task)?.mean_all()?.neg()?)
}

/// What a process answers to a task.
fn answer(process: &dyn Process, task: &Task) -> Result<Predictive> {
    process.condition(&task.context)?.at(&task.target.sites)
}

/// What a step of training minimises: the process's own objective, or else the [`loss`].
pub fn objective(
    process: &dyn Process,
    task: &Task,
    reward: Reward,
    rng: &mut Stream,
) -> Result<Objective> {
    if reward != Reward::Outcome
        && let Some(objective) = process.objective(task, reward, rng)?
    {
        return Ok(objective);
    }
    let loss = loss(&answer(process, task)?, task, reward)?;
    Ok(Objective { loss, measured: Vec::new(), surrogate: false })
}

/// A loss with its gradients, and what else was measured.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// Loss of the whole batch, nats per target.
    pub loss: f64,
    /// Each part's gradients of its share of the loss.
    pub grads: Vec<GradStore>,
    /// Mean over the batch of what the process measured.
    pub measured: BTreeMap<&'static str, f64>,
}

/// A batch cut into parts, each on a thread of its own with serial operations inside: at these
/// sizes that keeps every core busy, where threads inside each operation mostly wait.
pub(crate) struct Parts {
    pools: Vec<rayon::ThreadPool>,
}

impl Parts {
    pub(crate) fn new(count: usize, device: &Device) -> Result<Self> {
        let count = if device.is_cpu() { count } else { 1 };
        // With one part the operations may use all threads.
        Self::with_threads(count, if count == 1 { 0 } else { 1 })
    }

    /// `count` parts of `threads` threads each; 0 for all there are.
    pub(crate) fn with_threads(count: usize, threads: usize) -> Result<Self> {
        let pool = |_| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .map_err(|e| Error::input(format!("no threads for training: {e}")))
        };
        Ok(Parts { pools: (0..count).map(pool).collect::<Result<_>>()? })
    }

    /// The loss of a batch and its gradients. `chance` names the batch: what a process draws to
    /// learn comes from its streams, one for each part.
    pub(crate) fn step(
        &self,
        process: &(dyn Process + Send + Sync),
        batch: &Batch,
        reward: Reward,
        device: &Device,
        chance: (u64, u64),
    ) -> Result<Step> {
        let rows = batch.rules.len();
        let count = self.pools.len().min(rows);
        let part = |i: usize| -> Result<Step> {
            let (start, end) = (i * rows / count, (i + 1) * rows / count);
            let task = batch.rows(start, end - start)?.task.to_device(device)?;
            let share = (end - start) as f64 / rows as f64;
            let mut rng = Stream::new(chance.0, "objective", (chance.1 << 8) + i as u64);
            let Objective { loss, measured, .. } = objective(process, &task, reward, &mut rng)?;
            let loss = (loss * share)?;
            Ok(Step {
                loss: f64::from(loss.to_scalar::<f32>()?),
                grads: vec![loss.backward()?],
                measured: measured.into_iter().map(|(name, x)| (name, x * share)).collect(),
            })
        };
        let plain = fused::is_plain();
        let part = |i: usize| fused::plain(plain, || part(i));
        let parts: Vec<Result<Step>> = std::thread::scope(|scope| {
            let part = &part;
            let running: Vec<_> = self.pools[..count]
                .iter()
                .enumerate()
                .map(|(i, pool)| scope.spawn(move || pool.install(|| part(i))))
                .collect();
            running.into_iter().map(|r| r.join().expect("a part of the batch")).collect()
        });
        let mut whole = Step::default();
        for part in parts {
            let part = part?;
            whole.loss += part.loss;
            whole.grads.extend(part.grads);
            for (name, x) in part.measured {
                *whole.measured.entry(name).or_default() += x;
            }
        }
        Ok(whole)
    }
}

/// Held-out tasks, with the exact GP's loss on them.
struct Validation {
    batches: Vec<Batch>,
    exact_gp: Option<f64>,
}

impl Validation {
    /// Draws tasks that training never sees; sizes above `most` would cost minutes of Cholesky.
    fn new(tasks: &Tasks, settings: &Settings, seed: u64) -> Result<Self> {
        const MOST: usize = 400;
        let mut sizes = Stream::new(seed, "validation size", 0);
        let rows = 8.min(settings.validate_tasks);
        let count = settings.validate_tasks.div_ceil(rows);
        let sizes: Vec<usize> =
            (0..count).map(|_| tasks.design().size(&mut sizes).min(MOST)).collect();
        let batches: Vec<Batch> = sizes
            .par_iter()
            .enumerate()
            .map(|(i, n)| tasks.batch(seed ^ 0x5eed_7a5c, i as u64, rows, *n))
            .collect::<Result<_>>()?;
        let mut exact_gp = None;
        // The exact GP knows the surface; a law of counts it has not.
        let told = settings.loss != Reward::Outcome && known(tasks.likelihood());
        if told && batches.iter().flat_map(|b| &b.rules).all(|rule| rule.kernel.is_some()) {
            let mut total = 0.0;
            for batch in &batches {
                total += exact_loss(tasks, batch, settings.loss)?;
            }
            exact_gp = Some(total / batches.len() as f64);
        }
        Ok(Validation { batches, exact_gp })
    }

    fn loss(&self, process: &dyn Process, reward: Reward, device: &Device) -> Result<f64> {
        let mut total = 0.0;
        for batch in &self.batches {
            let task = batch.task.to_device(device)?;
            let value = loss(&answer(process, &task)?, &task, reward)?;
            total += f64::from(value.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        }
        Ok(total / self.batches.len() as f64)
    }
}

/// Whether the exact GP reads what this likelihood counts.
pub(crate) fn known(likelihood: &dyn Likelihood) -> bool {
    !likelihood.counts() || likelihood.log_probability(0.0, 1.0, 0.0, 1.0).is_some()
}

/// A task as the exact Gaussian process reads it: covariates are further coordinates, since what they do
/// is part of the kernel that it is told.
pub(crate) fn known_to_all(task: &Task) -> Result<Task> {
    let joined = |o: &Observations| -> Result<Observations> {
        Ok(Observations { sites: o.sites.joined()?, ..o.clone() })
    };
    Ok(Task { context: joined(&task.context)?, target: joined(&task.target)?, ..task.clone() })
}

/// The loss of the exact GP that is told the true kernel, nugget and mean of every task.
fn exact_loss(tasks: &Tasks, batch: &Batch, reward: Reward) -> Result<f64> {
    let losses: Vec<f64> = batch
        .rules
        .par_iter()
        .enumerate()
        .map(|(row, rule)| {
            let one = batch.rows(row, 1)?;
            let gp = ExactGp::new(
                Box::new(rule.known_kernel()?),
                rule.nugget,
                rule.mean,
                tasks.likelihood(),
            )?
            .dispersed(batch.dispersions[row])?;
            let value = loss(&answer(&gp, &known_to_all(&one.task)?)?, &one.task, reward)?;
            Ok(value.to_dtype(DType::F64)?.to_scalar::<f64>()?)
        })
        .collect::<Result<_>>()?;
    Ok(losses.iter().sum::<f64>() / losses.len() as f64)
}

/// Where a training stands: everything that a resumed one needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    recipe: String,
    seed: u64,
    step: u64,
    steps: u64,
    best: Option<f64>,
    best_step: u64,
    tasks: u64,
    #[serde(default)]
    started_from: Option<String>,
    seconds: f64,
}

/// Files beside the model: `x.safetensors` → `x.state.safetensors`, `x.journal.jsonl`.
fn beside(out: &Path, suffix: &str) -> PathBuf {
    out.with_extension(suffix)
}

/// Trains a recipe and writes the best weights by validation.
///
/// `report` is called about once a second and at every validation.
///
/// # Errors
/// [`Error::Input`] for a bad recipe, or a loss that is no longer finite.
pub fn run(recipe: &Recipe, options: &Options, mut report: impl FnMut(&Progress)) -> Result<Card> {
    let mut settings: Settings = recipe.settings("train")?;
    if let Some(steps) = options.steps {
        settings.steps = steps;
    }
    settings.check()?;
    let tasks = recipe.tasks()?;
    let covariates = tasks.features();
    let problem = Problem { covariates, ..Problem::new(tasks.dim(), tasks.likelihood()) };
    let device = options.devices.first().unwrap_or(&Device::Cpu);
    if settings.precision != Products::F32 && device.is_cpu() {
        return Err(Error::input("products in reduced precision are for GPUs")
            .fact("precision under [train]", settings.precision.name())
            .try_this("train with --device cuda, or set precision = \"f32\""));
    }
    let _choice = Choice::new(settings.precision);
    let network = |device: &Device| -> Result<Network> {
        let mut params = Params::new(options.seed, device, DType::F32);
        let process = model::build(recipe.table("model")?, problem, &mut params)?;
        Ok(Network { params, process })
    };
    let networks = options.devices.iter().map(network).collect::<Result<Vec<_>>>()?;
    let mut state = State {
        recipe: recipe.text().to_string(),
        seed: options.seed,
        step: 0,
        steps: settings.steps,
        best: None,
        best_step: 0,
        tasks: 0,
        started_from: None,
        seconds: 0.0,
    };
    if let Some(start) = &options.start {
        state.started_from = Some(warm_start(&networks[0].params, start, covariates)?);
    }
    let mut best = host(&networks[0].params)?;
    let parts = match options.threads {
        Some(threads) => Parts::with_threads(settings.parts, threads)?,
        None => Parts::new(settings.parts, device)?,
    };
    let rule = (settings.optimiser, settings.decay);
    let fixed = settings.deterministic;
    let mut learner = Learner::new(networks, &options.devices, rule, parts, fixed)?;
    let state_file = beside(&options.out, "state.safetensors");
    let journal = beside(&options.out, "journal.jsonl");
    if options.resume {
        (state, best) = restore(&state_file, &journal, &state, &mut learner)?;
    } else {
        write_line(&journal, None)?;
    }

    let validation = Validation::new(&tasks, &settings, options.seed)?;
    let mut last = options.stop_at.unwrap_or(settings.steps).min(settings.steps);
    let began = Instant::now();
    let before = state.seconds;
    // Draws run ahead on other threads; batch `i` is the same whoever draws it and when.
    let workers = drawers(options.drawing, device);
    let ahead = Ahead::new(state.step..last, workers + 2);
    let draw = |index: u64| -> Result<Batch> {
        let context = tasks.design().size(&mut Stream::new(options.seed, "size", index));
        let rows = settings.batch_rows(context, tasks.design().target_count());
        tasks.batch(options.seed, index, rows, context)
    };
    std::thread::scope(|scope| -> Result<()> {
        ahead.start(scope, workers, &draw);
        let _closing = Closing(&ahead);
        let mut shown = Instant::now();
        while state.step < last {
            let batch = ahead.take().expect("a batch for every step")?;
            let rate = schedule::rate(
                state.step,
                settings.steps,
                settings.warmup,
                settings.rate,
                settings.last,
            );
            let orders = Orders {
                reward: settings.loss,
                rate,
                clip: settings.clip,
                average: settings.average,
                chance: (options.seed, state.step),
            };
            learner.step(&batch, &orders)?;
            state.step += 1;
            state.tasks += batch.rules.len() as u64;
            if options.until.is_some_and(|moment| Instant::now() >= moment) {
                last = state.step;
            }

            let validate = state.step.is_multiple_of(settings.validate_every) || state.step == last;
            let elapsed = shown.elapsed().as_secs_f64();
            if validate || elapsed > 1.0 {
                // Losses that are not finite end the training here, on cards too.
                let reading = learner.reading()?;
                let mut scored = None;
                if validate {
                    let average = learner.fetch()?.1.clone();
                    let Network { params, process } = learner.network();
                    let current = host(params)?;
                    set(params, &average)?;
                    let score = validation.loss(&**process, settings.loss, learner.device())?;
                    set(params, &current)?;
                    if state.best.is_none_or(|b| score < b) {
                        state.best = Some(score);
                        state.best_step = state.step;
                        best = average;
                    }
                    scored = Some(score);
                }
                let count = reading.steps as f64;
                let speed = count / elapsed.max(1e-9);
                let progress = Progress {
                    step: state.step,
                    steps: settings.steps,
                    loss: reading.loss / count,
                    rate,
                    norm: reading.norm,
                    steps_per_s: speed,
                    seconds_left: (last - state.step) as f64 / speed,
                    validation: scored,
                    gap: scored.zip(validation.exact_gp).map(|(m, exact)| m - exact),
                    measured: reading.measured.into_iter().map(|(n, x)| (n, x / count)).collect(),
                };
                report(&progress);
                if validate {
                    write_line(&journal, Some(&progress))?;
                }
                shown = Instant::now();
            }
            if state.step.is_multiple_of(settings.checkpoint_every) || state.step == last {
                state.seconds = before + began.elapsed().as_secs_f64();
                save(&state_file, &state, &mut learner, &best)?;
                finish(recipe, options, &state, &learner.network().params, &best, &validation)?
                    .write(&options.out)?;
            }
        }
        Ok(())
    })?;
    Ok(finish(recipe, options, &state, &learner.network().params, &best, &validation)?.card)
}

/// Threads that draw tasks: as many as are asked for, or one beside a training on the CPU, which has
/// its own work for the others, or all but one beside cards, which wait for nothing else.
fn drawers(asked: usize, device: &Device) -> usize {
    match (asked, device) {
        (0, Device::Cpu) => 1,
        (0, _) => std::thread::available_parallelism().map_or(1, |n| n.get().max(2) - 1),
        (asked, _) => asked,
    }
}

type Weights = BTreeMap<String, Vec<f32>>;

fn host(params: &Params) -> Result<Weights> {
    params
        .vars()
        .iter()
        .map(|(path, var)| Ok((path.clone(), var.flatten_all()?.to_vec1::<f32>()?)))
        .collect()
}

fn set(params: &Params, weights: &Weights) -> Result<()> {
    for (path, var) in params.vars() {
        var.set(&Tensor::from_vec(weights[path].clone(), var.shape(), var.device())?)?;
    }
    Ok(())
}

/// What is kept of the running average at step number `step`: less early, so that the start is soon
/// forgotten.
fn kept_share(decay: f64, step: u64) -> f32 {
    let keep = decay.min((1.0 + step as f64) / (10.0 + step as f64)) as f32;
    if decay == 0.0 { 0.0 } else { keep }
}

/// Running average of weights.
fn blend(average: &mut Weights, params: &Params, decay: f64, step: u64) -> Result<()> {
    let keep = kept_share(decay, step);
    for (path, var) in params.vars() {
        let now = var.flatten_all()?.to_vec1::<f32>()?;
        let old = average.get_mut(path).expect("same parameters");
        old.iter_mut().zip(now).for_each(|(o, n)| *o = keep * *o + (1.0 - keep) * n);
    }
    Ok(())
}

/// The parameter that reads a token, whose last rows are of covariates.
const READS_TOKENS: &str = "embed.0.weight";

/// Copies every parameter of the same name and shape from a checkpoint; says what it was. A model that
/// knew no covariates gets weights of 0 for them, and answers at first as it did.
fn warm_start(params: &Params, file: &Path, covariates: usize) -> Result<String> {
    let Checkpoint { card, tensors } = Checkpoint::open(file)?;
    let (mut taken, mut widened) = (0, String::new());
    for (path, var) in params.vars() {
        let Some(tensor) = tensors.get(path) else { continue };
        let mut tensor = tensor.to_device(var.device())?;
        if let (READS_TOKENS, [rows, columns]) = (path.as_str(), var.dims())
            && covariates > 0
            && card.covariates.is_none()
            && tensor.dims() == [rows - covariates, *columns]
        {
            let none = Tensor::zeros((covariates, *columns), tensor.dtype(), tensor.device())?;
            tensor = Tensor::cat(&[&tensor, &none], 0)?;
            widened = format!(", `{path}` with {covariates} rows of 0 for covariates");
        }
        if tensor.dims() == var.dims() {
            var.set(&tensor)?;
            taken += 1;
        }
    }
    if taken == 0 {
        return Err(Error::input("the model to start from shares no parameter with the recipe's")
            .fact("start", file.display())
            .try_this("start from a model of the same kind and sizes, or leave --start out"));
    }
    let before = card.started_from.map_or(String::new(), |s| format!(" (itself from {s})"));
    Ok(format!(
        "{taken} of {} parameters of `{}`{widened}: {} steps on {} tasks, seed {}{before}",
        params.vars().len(),
        card.name,
        card.steps,
        card.tasks,
        card.seed
    ))
}

/// What the process measured last, by its journal: see [`Progress::measured`]. Nothing without one.
pub fn measured(out: &Path) -> Option<Vec<(String, f64)>> {
    let text = std::fs::read_to_string(beside(out, "journal.jsonl")).ok()?;
    let last: Progress = serde_json::from_str(text.lines().next_back()?).ok()?;
    Some(last.measured.into_iter().collect())
}

/// Appends a line to the journal; `None` starts an empty one.
fn write_line(journal: &Path, progress: Option<&Progress>) -> Result<()> {
    let result = match progress {
        None => std::fs::write(journal, ""),
        Some(progress) => {
            let line = serde_json::to_string(progress).expect("plain data");
            std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(journal)
                .and_then(|mut f| writeln!(f, "{line}"))
        }
    };
    result.map_err(|e| Error::io("write", journal, e))
}

fn save(file: &Path, state: &State, learner: &mut Learner, best: &Weights) -> Result<()> {
    learner.fetch()?;
    let (moments, average) = learner.held();
    let mut tensors = BTreeMap::new();
    for (path, var) in learner.network().params.vars() {
        tensors.insert(format!("weight:{path}"), var.as_tensor().clone());
        let (m, v) = &moments[path];
        let parts =
            [("first", m), ("second", v), ("average", &average[path]), ("best", &best[path])];
        for (kind, values) in parts {
            let tensor = Tensor::from_vec(values.clone(), var.shape(), &Device::Cpu)?;
            tensors.insert(format!("{kind}:{path}"), tensor);
        }
    }
    let state = serde_json::to_string(state).expect("plain data");
    checkpoint::write_tensors(file, &tensors, HashMap::from([("state".to_string(), state)]))
}

/// Reads the state back into parameters, moments and average; returns it with the best weights.
fn restore(
    file: &Path,
    journal: &Path,
    fresh: &State,
    learner: &mut Learner,
) -> Result<(State, Weights)> {
    let bytes = std::fs::read(file)
        .map_err(|e| Error::io("read the training state (nothing to resume?)", file, e))?;
    let broken = |reason: String| {
        Error::input("the training state cannot be read")
            .fact("file", file.display())
            .fact("reason", reason)
            .try_this("start again without --resume")
    };
    let (_, header) =
        safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| broken(format!("{e:?}")))?;
    let text = header.metadata().as_ref().and_then(|m| m.get("state").cloned());
    let state: State = serde_json::from_str(&text.ok_or_else(|| broken("no state in it".into()))?)
        .map_err(|e| broken(e.to_string()))?;
    if state.recipe != fresh.recipe || state.seed != fresh.seed || state.steps != fresh.steps {
        return Err(Error::input("the training state belongs to another recipe, seed or length")
            .fact("file", file.display())
            .fact("its seed and steps", format!("{}, {}", state.seed, state.steps))
            .fact("asked for", format!("{}, {}", fresh.seed, fresh.steps))
            .try_this(
                "resume with the same recipe, --seed and --steps, or start without --resume",
            ));
    }
    let tensors =
        safetensors::SafeTensors::deserialize(&bytes).map_err(|e| broken(format!("{e:?}")))?;
    let read = |name: String| -> Result<Vec<f32>> {
        let view = tensors.tensor(&name).map_err(|e| broken(format!("{name}: {e:?}")))?;
        Ok(view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect())
    };
    let (mut weights, mut best, mut average) = (Weights::new(), Weights::new(), Weights::new());
    let mut moments = Moments::new();
    for path in learner.network().params.vars().keys() {
        weights.insert(path.clone(), read(format!("weight:{path}"))?);
        best.insert(path.clone(), read(format!("best:{path}"))?);
        average.insert(path.clone(), read(format!("average:{path}"))?);
        let pair = (read(format!("first:{path}"))?, read(format!("second:{path}"))?);
        moments.insert(path.clone(), pair);
    }
    learner.restore(&weights, moments, average, state.step)?;
    // Lines written after the state was saved will be written again.
    if let Ok(text) = std::fs::read_to_string(journal) {
        let known = |line: &&str| {
            serde_json::from_str::<serde_json::Value>(line)
                .ok()
                .and_then(|v| v["step"].as_u64())
                .is_some_and(|s| s <= state.step)
        };
        let kept: String = text.lines().filter(known).map(|l| format!("{l}\n")).collect();
        whole::write_bytes(journal, kept.as_bytes())?;
    }
    Ok((state, best))
}

fn finish(
    recipe: &Recipe,
    options: &Options,
    state: &State,
    params: &Params,
    best: &Weights,
    validation: &Validation,
) -> Result<Checkpoint> {
    let mut tensors: BTreeMap<String, Tensor> = params
        .vars()
        .iter()
        .map(|(path, var)| {
            let tensor = Tensor::from_vec(best[path].clone(), var.shape(), &Device::Cpu)?;
            Ok((path.clone(), tensor))
        })
        .collect::<Result<_>>()?;
    if let Some(lattice) = recipe.lattice() {
        tensors.extend(lattice.tensors()?);
    }
    let fallback = options.out.file_stem().map_or("model".into(), |s| s.to_string_lossy());
    let card = Card {
        format: checkpoint::FORMAT,
        isopleth: env!("CARGO_PKG_VERSION").into(),
        name: recipe.word("name").unwrap_or(&fallback).into(),
        predicts: recipe.word("predicts").unwrap_or("surface and new observation").into(),
        recipe: recipe.text().into(),
        parameters: params.count(),
        seed: state.seed,
        steps: state.step,
        best_step: state.best_step,
        tasks: state.tasks,
        started_from: state.started_from.clone(),
        validation: state.best,
        exact_gp: validation.exact_gp,
        seconds: state.seconds,
        machine: options.machine.clone(),
        date: checkpoint::today(),
        covariates: recipe.lattice().map(|lattice| lattice.head.clone()),
        scores: serde_json::Map::new(),
    };
    Ok(Checkpoint { card, tensors })
}
