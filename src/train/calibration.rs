//! Calibration: what a trained model promises on fresh tasks of its own recipe, and what it keeps.
//!
//! Here the truth is known, surface and noise apart, so both of a model's laws can be held to it:
//! something that no real survey allows. Beside the model stand the rules of [`crate::baseline`]
//! and the exact Gaussian process that is told the true hyperparameters of every task.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Serialize;
use statrs::function::gamma::gamma_ur;

use crate::{
    baseline::{
        ExactGp,
        rules::{RULES, Seen},
    },
    checkpoint::Checkpoint,
    error::{Error, Result},
    likelihood::{Kind, Likelihood},
    predictive::{Link, Marginals, Of, Predictive},
    prior::Rule,
    process::Process,
    rng::Stream,
    score::{Coverage, crps},
    task::{Batch, Tasks},
};

/// Sites up to which a task is also given to the exact Gaussian process.
pub const EXACT_SITES: usize = 300;

/// Nothing is scored more finely than this part of the surface's sd: surfaces are drawn with the
/// jitter that their Cholesky factor needed and kept in f32, so that a law narrower than this (of a
/// smooth surface without a nugget) would be judged by rounding. Every forecaster's sd is widened by
/// it, and the exact Gaussian process does not believe its observations beyond it.
pub const RESOLUTION: f64 = 1e-3;

/// Tasks drawn together: they share their number of sites.
const ROWS: usize = 4;

/// Keeps these tasks apart from those of a training or validation under the same seed.
const APART: u64 = 0xca11_b8a7_e5ee_d000;

/// What to measure on.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Tasks, at least 3.
    pub tasks: usize,
    /// Most sites in a context; the recipe's larger ones are cut to it.
    pub most_sites: usize,
    /// Seed of the tasks.
    pub seed: u64,
}

/// Agreement of a law with the truths it met.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Figures {
    /// Mean log density of the truth, nats per target, on the link scale.
    pub log_density: f64,
    /// Share of truths inside the central intervals.
    pub coverage: Coverage,
}

/// What a forecaster scored on some tasks.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Group {
    /// Fewest and most sites in a context.
    pub context: [usize; 2],
    /// Tasks in the group.
    pub tasks: usize,
    /// Of the surface, by forecasters that tell it from an observation.
    pub surface: Option<Figures>,
    /// Of a new observation: a new village's prevalence, or a new noisy value.
    pub observation: Figures,
    /// Mean CRPS of a new observation: of a village's prevalence, or a value, outcome units; for
    /// rates and logarithms on the scale of the frame, which is relative to the context.
    pub crps: f64,
}

/// Another forecaster beside the model.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Rival {
    /// Its name.
    pub name: &'static str,
    /// What it scored.
    pub its: Group,
    /// What the model scored on the same tasks.
    pub model: Group,
}

/// Where the truth stands in its posterior: simulation-based calibration (Talts et al. 2018,
/// arXiv:1804.06788). With laws instead of draws a rank among many draws is the law's cumulative
/// probability of the truth, uniform if the law is right.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ranks {
    /// Targets in each twentieth of the law, all targets of all tasks; 1 = as many as there should be.
    pub bins: [f64; BINS],
    /// Tasks, each giving one target to the two tests: those of one task are not independent.
    pub tasks: usize,
    /// χ² of those over the twentieths, and its p-value.
    pub chi_square: [f64; 2],
    /// Kolmogorov and Smirnov's largest gap, and its p-value.
    pub kolmogorov: [f64; 2],
}

/// Bins of a histogram of ranks.
pub const BINS: usize = 20;

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Targets in each task.
    pub targets: usize,
    /// The model over all tasks.
    pub all: Group,
    /// The model over each third of the tasks, by context size.
    pub thirds: Vec<Group>,
    /// The simple rules, then the exact Gaussian process where any task was small enough.
    pub rivals: Vec<Rival>,
    /// Ranks of the true surface.
    pub surface: Ranks,
    /// Ranks of a new observation, before anyone is counted.
    pub observation: Ranks,
    /// The same two of the exact Gaussian process, where any task was small enough: of values they are
    /// uniform, or the measurement is wrong.
    pub exact: Option<[Ranks; 2]>,
}

/// How one law met the truths of one task, averaged over its targets.
#[derive(Debug, Clone, Copy)]
struct Met {
    log_density: f64,
    inside: [f64; 3],
}

/// One forecaster on one task.
#[derive(Debug, Clone, Copy)]
struct Scored {
    sites: usize,
    surface: Option<Met>,
    observation: Met,
    crps: f64,
}

/// One task: the model, then each rival that took part.
struct Row {
    model: Scored,
    rivals: Vec<Option<Scored>>,
    /// Of the surface and of an observation, at every target.
    ranks: [Vec<f64>; 2],
    /// The same of the exact Gaussian process.
    exact: Option<[Vec<f64>; 2]>,
}

/// The true link-scale values at the targets of one task.
struct Truth {
    sites: usize,
    surface: Vec<f64>,
    noisy: Vec<f64>,
    /// Targets that are context sites again: a new observation there is not new.
    seen: usize,
    resolution: f64,
    /// What outcomes were divided by: 1 for counts, and for what is relative to its context's mean.
    outcome_sd: f64,
}

/// Measures a model on fresh tasks of its recipe. `done` hears of finished tasks, from any thread.
///
/// # Errors
/// [`Error::Input`] for fewer than 3 tasks, or a model whose recipe cannot be drawn from.
pub fn measure(
    checkpoint: &Checkpoint,
    options: &Options,
    done: impl Fn(usize) + Sync,
) -> Result<Report> {
    if options.tasks < 3 || options.most_sites < 2 {
        return Err(Error::input("calibration needs 3 tasks and contexts of 2 sites at least")
            .fact("tasks", options.tasks)
            .fact("most sites", options.most_sites)
            .try_this("some 2000 tasks give coverage to about a point"));
    }
    let tasks = checkpoint.recipe()?.tasks()?;
    let process = checkpoint.process(&Device::Cpu)?;
    let mut rng = Stream::new(options.seed ^ APART, "calibration size", 0);
    let sizes: Vec<usize> = (0..options.tasks.div_ceil(ROWS))
        .map(|_| tasks.design().size(&mut rng).min(options.most_sites))
        .collect();
    let rows: Vec<Vec<Row>> = sizes
        .par_iter()
        .enumerate()
        .map(|(i, sites)| {
            let count = ROWS.min(options.tasks - i * ROWS);
            let batch = tasks.batch(options.seed ^ APART, i as u64, count, *sites)?;
            let rows = score(&tasks, &*process, &batch)?;
            done(count);
            Ok(rows)
        })
        .collect::<Result<_>>()?;
    let mut rows: Vec<Row> = rows.into_iter().flatten().collect();
    rows.sort_by_key(|row| row.model.sites);
    let of = |part: &[Row]| Group::of(&part.iter().map(|r| r.model).collect::<Vec<_>>());
    let n = rows.len();
    let rival = |(at, name): (usize, &'static str)| {
        let pairs = rows.iter().filter_map(|r| Some((r.rivals[at]?, r.model)));
        let (its, model): (Vec<Scored>, Vec<Scored>) = pairs.unzip();
        (!its.is_empty()).then(|| Rival { name, its: Group::of(&its), model: Group::of(&model) })
    };
    let names = RULES.iter().map(|(name, _)| *name).chain(["exact-gp"]);
    Ok(Report {
        targets: tasks.batch(options.seed ^ APART, 0, 1, sizes[0])?.task.target.len(),
        all: of(&rows),
        thirds: (0..3).map(|k| of(&rows[k * n / 3..(k + 1) * n / 3])).collect(),
        rivals: names.enumerate().filter_map(rival).collect(),
        surface: Ranks::of(rows.iter().map(|r| &r.ranks[0])),
        observation: Ranks::of(rows.iter().map(|r| &r.ranks[1])),
        exact: rows.iter().any(|r| r.exact.is_some()).then(|| {
            [0, 1].map(|k| Ranks::of(rows.iter().filter_map(|r| Some(&r.exact.as_ref()?[k]))))
        }),
    })
}

fn host(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

/// Scores every forecaster on every task of a batch.
fn score(tasks: &Tasks, process: &dyn Process, batch: &Batch) -> Result<Vec<Row>> {
    let (context, targets) = (&batch.task.context, &batch.task.target.sites);
    let predictive = process.condition(context)?.at(targets)?;
    (0..batch.rules.len())
        .map(|row| {
            let one = batch.rows(row, 1)?;
            let sites = one.task.context.len();
            let truth = Truth {
                sites,
                surface: host(&one.task.surface)?,
                noisy: host(&one.task.noisy)?,
                seen: if tasks.design().pool > 0 { sites } else { 0 },
                resolution: resolution(&one.rules[0])?,
                outcome_sd: match tasks.likelihood().link() {
                    Link::Log => 1.0,
                    _ => batch.frames[row].3,
                },
            };
            let asked = one.task.target.sites.host()?.swap_remove(0);
            let seen = seen(&one, tasks.likelihood())?;
            let mut rivals: Vec<Option<Scored>> = RULES
                .iter()
                .map(|(_, rule)| Some(truth.meet(None, &rule(&seen, &asked))))
                .collect();
            let gp = match sites <= EXACT_SITES && super::known(tasks.likelihood()) {
                true => Some(exact(&one, tasks.likelihood())?),
                false => None,
            };
            rivals.push(gp.as_ref().map(|gp| truth.meet_both(gp, 0)).transpose()?);
            let exact = gp.as_ref().map(|gp| truth.ranks(gp, 0)).transpose()?;
            let ranks = truth.ranks(&predictive, row)?;
            Ok(Row { model: truth.meet_both(&predictive, row)?, rivals, ranks, exact })
        })
        .collect()
}

/// What the rules read of a task.
fn seen(one: &Batch, likelihood: &dyn Likelihood) -> Result<Seen> {
    let context = &one.task.context;
    let (sites, y) = (context.sites.host()?.swap_remove(0), host(&context.y)?);
    Ok(match (&context.trials, likelihood.kind()) {
        (Some(trials), Kind::Tested | Kind::Single) => Seen::counts(sites, &y, &host(trials)?),
        (Some(trials), Kind::Exposure) => Seen::rates(sites, &y, &host(trials)?),
        (_, Kind::Positive) => Seen::logarithms(sites, y),
        _ => Seen::values(sites, y),
    })
}

/// The predictive of the Gaussian process that ruled the task.
fn exact(one: &Batch, likelihood: &'static dyn Likelihood) -> Result<Predictive> {
    let rule = &one.rules[0];
    let nugget = rule.nugget.max(resolution(rule)?.powi(2));
    let gp = ExactGp::new(Box::new(rule.known_kernel()?), nugget, rule.mean, likelihood)?;
    let gp = gp.dispersed(one.dispersions[0])?;
    let task = super::known_to_all(&one.task)?;
    gp.condition(&task.context)?.at(&task.target.sites)
}

impl Truth {
    fn meet_both(&self, predictive: &Predictive, row: usize) -> Result<Scored> {
        let surface = predictive.marginals(row, Of::Surface)?;
        Ok(self.meet(Some(&surface), &predictive.marginals(row, Of::Observation)?))
    }

    /// Cumulative probabilities of the true surface and of the true noisy values.
    fn ranks(&self, predictive: &Predictive, row: usize) -> Result<[Vec<f64>; 2]> {
        let of = |of: Of, truth: &[f64], first: usize| -> Result<Vec<f64>> {
            let law = self.widened(&predictive.marginals(row, of)?);
            Ok((first..truth.len()).map(|i| law.link_cdf(i, truth[i])).collect())
        };
        Ok([of(Of::Surface, &self.surface, 0)?, of(Of::Observation, &self.noisy, self.seen)?])
    }

    fn widened(&self, m: &Marginals) -> Marginals {
        let sd = m.sd.iter().map(|sd| sd.hypot(self.resolution)).collect();
        Marginals { sd, ..m.clone() }
    }

    fn meet(&self, surface: Option<&Marginals>, observation: &Marginals) -> Scored {
        let widened = |m: &Marginals| self.widened(m);
        let (surface, observation) = (surface.map(widened), &widened(observation));
        let new = self.seen..self.noisy.len();
        let count = new.len().max(1) as f64;
        let crps = new.clone().map(|i| crps::marginal(observation, i, self.noisy[i])).sum::<f64>();
        Scored {
            sites: self.sites,
            surface: surface.map(|m| Met::of(&m, &self.surface, 0)),
            observation: Met::of(observation, &self.noisy, self.seen),
            crps: self.outcome_sd * crps / count,
        }
    }
}

/// [`RESOLUTION`] of one task, link scale in model units.
fn resolution(rule: &Rule) -> Result<f64> {
    Ok(RESOLUTION * rule.known_kernel()?.sill().sqrt())
}

impl Met {
    /// Targets from `first` on.
    fn of(m: &Marginals, truth: &[f64], first: usize) -> Self {
        let mut met = Met { log_density: 0.0, inside: [0.0; 3] };
        for (i, y) in truth.iter().enumerate().skip(first) {
            met.log_density += m.link_log_density(i, *y);
            // Inside the central interval of a level: no farther from the median than half of it.
            let off = (2.0 * m.link_cdf(i, *y) - 1.0).abs();
            for (inside, level) in met.inside.iter_mut().zip([0.5, 0.8, 0.95]) {
                *inside += f64::from(off <= level);
            }
        }
        let n = truth.len().saturating_sub(first).max(1) as f64;
        Met { log_density: met.log_density / n, inside: met.inside.map(|v| v / n) }
    }
}

impl Figures {
    fn of(met: &[Met]) -> Self {
        let mean = |f: &dyn Fn(&Met) -> f64| met.iter().map(f).sum::<f64>() / met.len() as f64;
        Figures {
            log_density: mean(&|m| m.log_density),
            coverage: Coverage {
                at_50: mean(&|m| m.inside[0]),
                at_80: mean(&|m| m.inside[1]),
                at_95: mean(&|m| m.inside[2]),
            },
        }
    }
}

impl Group {
    /// Tasks in the order of their context sizes, at least one.
    fn of(scored: &[Scored]) -> Self {
        let surface: Vec<Met> = scored.iter().filter_map(|s| s.surface).collect();
        Group {
            context: [scored[0].sites, scored[scored.len() - 1].sites],
            tasks: scored.len(),
            surface: (!surface.is_empty()).then(|| Figures::of(&surface)),
            observation: Figures::of(&scored.iter().map(|s| s.observation).collect::<Vec<_>>()),
            crps: scored.iter().map(|s| s.crps).sum::<f64>() / scored.len() as f64,
        }
    }
}

impl Ranks {
    /// Of the ranks at the targets of every task.
    fn of<'a>(rows: impl Iterator<Item = &'a Vec<f64>>) -> Self {
        let (mut all, mut alone) = (Vec::new(), Vec::new());
        for (i, ranks) in rows.enumerate() {
            let at = Stream::new(APART, "calibration rank", i as u64).below(ranks.len().max(1));
            alone.extend(ranks.get(at));
            all.extend(ranks);
        }
        Ranks::from(&all, &alone)
    }

    /// A histogram of `all`, and tests of those that are independent.
    ///
    /// ```
    /// use isopleth::train::calibration::Ranks;
    /// let even: Vec<f64> = (0..100).map(|i| (i as f64 + 0.5) / 100.0).collect();
    /// let ranks = Ranks::from(&even, &even);
    /// assert!(ranks.bins.iter().all(|b| (b - 1.0).abs() < 1e-12));
    /// assert!(ranks.chi_square[1] > 0.999 && ranks.kolmogorov[0] < 0.0051);
    /// // Too wide a law leaves the ends empty. SciPy: chisquare([0] * 5 + [10] * 10 + [0] * 5).
    /// let narrow: Vec<f64> = even.iter().map(|u| 0.25 + 0.5 * u).collect();
    /// let ranks = Ranks::from(&narrow, &narrow);
    /// assert_eq!(ranks.bins[0], 0.0);
    /// assert!((ranks.chi_square[0] - 100.0).abs() < 1e-9 && ranks.chi_square[1] < 1e-12);
    /// assert!((ranks.kolmogorov[0] - 0.2525).abs() < 0.01 && ranks.kolmogorov[1] < 1e-4);
    /// ```
    pub fn from(all: &[f64], independent: &[f64]) -> Self {
        let count = |ranks: &[f64]| {
            let mut bins = [0.0; BINS];
            for u in ranks {
                bins[((u * BINS as f64) as usize).min(BINS - 1)] += 1.0;
            }
            bins
        };
        let each = (all.len() as f64 / BINS as f64).max(f64::MIN_POSITIVE);
        let n = independent.len() as f64;
        let expected = (n / BINS as f64).max(f64::MIN_POSITIVE);
        let chi: f64 = count(independent).iter().map(|c| (c - expected).powi(2) / expected).sum();
        let mut sorted = independent.to_vec();
        sorted.sort_by(f64::total_cmp);
        let gap = |(i, u): (usize, &f64)| (u - i as f64 / n).max((i + 1) as f64 / n - u);
        let largest = sorted.iter().enumerate().map(gap).fold(0.0, f64::max);
        Ranks {
            bins: count(all).map(|c| c / each),
            tasks: independent.len(),
            chi_square: [chi, gamma_ur(0.5 * (BINS - 1) as f64, (0.5 * chi).max(1e-300))],
            kolmogorov: [largest, kolmogorov(largest, n)],
        }
    }
}

/// P(largest gap of `n` ranks > `gap`): Kolmogorov's series with Stephens' correction (1970).
fn kolmogorov(gap: f64, n: f64) -> f64 {
    let x = (n.sqrt() + 0.12 + 0.11 / n.sqrt()) * gap;
    if x < 0.2 {
        return 1.0; // the series needs many terms there, and is 1 to 1e-12
    }
    let term = |k: i32| {
        let sign = if k % 2 == 1 { 1.0 } else { -1.0 };
        sign * (-2.0 * f64::from(k * k) * x * x).exp()
    };
    (2.0 * (1..=100).map(term).sum::<f64>()).clamp(0.0, 1.0)
}
