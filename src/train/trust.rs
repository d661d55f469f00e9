//! Trust: is a survey like those that a model was trained on, and does the model foretell it?
//!
//! A neural process answers any question, and outside its training with as straight a face as inside.
//! So a survey is held against fresh draws from the model's own recipe, in three groups of figures:
//! what was *observed*, given where and among how many; the *design*, where sites lie and how many were
//! tested there; and how the model *foretells* held-out sites from the others. A figure far from all
//! draws is a finding, in words. Beside these stand rules about units that no model is needed for.
//!
//! Each group is one test. Its statistic is the smallest of the figures' two-sided prior-predictive
//! p-values (Box 1980, doi:10.2307/2982063), and it is judged by its rank among the same statistic of
//! every draw, so that a group finds something in a share [`LEVELS`] of the surveys that the model was
//! trained on, and not in more. Which surveys are then recognised is measured, not promised:
//! BENCHMARKS.md, and `examples/trust_power.rs`.

use candle_core::Device;
use rayon::{ThreadPoolBuilder, prelude::*};
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    geo::{
        frame::Frame,
        survey::{Outcome, Survey},
    },
    likelihood::Kind,
    predictive::Link,
    process::Process,
    rng::Stream,
    sites::{Observations, Sites, mean_sd, unit_box},
    task::{Frame as Framing, Tasks, design::Layout},
};

mod foretold;
mod statistics;
mod tails;

use foretold::Foretelling;
use statistics::{Geometry, Statistic};

pub use foretold::Foretold;

/// Sites that are judged at most; larger surveys are thinned to so many at random, and draws have no
/// more.
pub const SITES: usize = 200;

/// Draws from the recipe that a survey is held against.
pub const DRAWS: usize = 450;

/// Share of the surveys like those of the training in which each group finds something: observed,
/// design, foretold. Together at most their sum.
pub const LEVELS: [f64; 3] = [0.02, 0.01, 0.01];

/// Surveys of fewer sites than this are judged by their units alone.
pub const FEWEST: usize = 10;

const SEED: u64 = 0x7157_0000;

/// Threads that a judge takes at most.
const THREADS: usize = 2;

/// What was found about a survey.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// What gives reason to doubt, worst first; nothing for a survey like those of the training.
    pub findings: Vec<Finding>,
    /// Every figure that was looked at.
    pub groups: Vec<Group>,
    /// How held-out sites were foretold.
    pub foretold: Option<Foretold>,
    /// Sites of the survey.
    pub sites: usize,
    /// Sites that were judged.
    pub judged: usize,
    /// Draws that they were held against; 0 where only units were looked at.
    pub draws: usize,
}

/// One reason to doubt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Which figure, or "units".
    pub about: String,
    /// What is seen here, what was seen in training, and what it may mean.
    pub text: String,
}

/// Figures that were judged together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// "observed", "design" or "foretold".
    pub name: String,
    /// Share of the model's own surveys that are at least as odd.
    pub p: f64,
    /// The share below which it is a finding.
    pub level: f64,
    /// Its figures.
    pub lines: Vec<Line>,
}

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// What it is.
    pub name: String,
    /// Here, in words.
    pub here: String,
    /// What 99 % of the draws lie between, in words.
    pub trained: [String; 2],
    /// Two-sided p-value of this figure alone.
    pub p: f64,
    /// Whether it is a finding.
    pub found: bool,
}

/// A context on the host, model units.
#[derive(Debug, Clone, PartialEq)]
pub struct Context {
    /// Sites in their own box [−1, 1].
    pub xy: Vec<[f64; 2]>,
    /// Counts, or standardised values.
    pub y: Vec<f64>,
    /// Tested, for counts.
    pub trials: Option<Vec<f64>>,
}

impl Context {
    /// Row `row` of some observations.
    ///
    /// # Errors
    /// If the tensors cannot be read.
    pub fn of(observations: &Observations, row: usize) -> Result<Self> {
        let one = observations.rows(row, 1)?.to_device(&Device::Cpu)?;
        let host = |x: &candle_core::Tensor| -> Result<Vec<f64>> {
            Ok(x.flatten_all()?.to_dtype(candle_core::DType::F64)?.to_vec1()?)
        };
        Ok(Context {
            xy: one.sites.host()?[0].iter().map(|s| [s[0], s[1]]).collect(),
            y: host(&one.y)?,
            trials: one.trials.as_ref().map(host).transpose()?,
        })
    }

    /// Sites.
    pub fn len(&self) -> usize {
        self.xy.len()
    }

    /// No sites at all.
    pub fn is_empty(&self) -> bool {
        self.xy.is_empty()
    }

    /// Some of the sites, in a box of their own.
    fn part(&self, sites: &[usize]) -> Self {
        let pick = |v: &Vec<f64>| sites.iter().map(|i| v[*i]).collect::<Vec<f64>>();
        let xy = sites.iter().map(|i| self.xy[*i]).collect();
        Context { xy, y: pick(&self.y), trials: self.trials.as_ref().map(pick) }.framed()
    }

    /// The same sites in their box, values with mean 0 and sd 1.
    fn framed(mut self) -> Self {
        if let Some((centre, unit)) = unit_box(&self.xy) {
            for p in &mut self.xy {
                *p = [(p[0] - centre[0]) / unit, (p[1] - centre[1]) / unit];
            }
        }
        if self.trials.is_none() {
            let (mean, sd) = mean_sd(&self.y);
            self.y.iter_mut().for_each(|v| *v = (*v - mean) / sd);
        }
        self
    }
}

/// A model, and the law of the surveys that it was trained on.
pub struct Judge {
    tasks: Tasks,
    process: Box<dyn Process + Send + Sync>,
    /// Every group is looked at, whatever others found.
    whole: bool,
}

impl Judge {
    /// For a model of surveys on the plane. Nothing for one whose training cannot be compared: sites
    /// on a line, coordinates that have units of their own, or cases without an upper end.
    ///
    /// # Errors
    /// As [`Checkpoint::process`].
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let recipe = checkpoint.recipe()?;
        let (tasks, settings) =
            (recipe.tasks()?, recipe.settings::<crate::task::Settings>("task")?);
        if tasks.dim() != 2 || settings.frame != Framing::Context {
            return Ok(None);
        }
        // Cases without an upper end want figures of their own.
        if tasks.likelihood().kind() == Kind::Exposure {
            return Ok(None);
        }
        // And so do surveys that change with time.
        if tasks.design().has_times() {
            return Ok(None);
        }
        Ok(Some(Judge { tasks, process: checkpoint.process(&Device::Cpu)?, whole: true }))
    }

    /// The same judge, who asks the model only about surveys that nothing else is found about.
    pub fn brief(self) -> Self {
        Judge { whole: false, ..self }
    }

    /// Holds a context against fresh draws of the recipe; findings in the order of the groups.
    ///
    /// # Errors
    /// Those of the prior and of the model.
    pub fn judge(&self, context: &Context) -> Result<Verdict> {
        // More threads would take more memory, of which a map is made within a budget.
        let pool = ThreadPoolBuilder::new().num_threads(rayon::current_num_threads().min(THREADS));
        let pool = pool
            .build()
            .map_err(|e| Error::input("no threads could be started").fact("reason", e))?;
        pool.install(|| self.judge_here(context))
    }

    fn judge_here(&self, context: &Context) -> Result<Verdict> {
        let all = context.len();
        let mut verdict = Verdict {
            findings: Vec::new(),
            groups: Vec::new(),
            foretold: None,
            sites: all,
            judged: all.min(SITES),
            draws: 0,
        };
        if all < FEWEST {
            return Ok(verdict);
        }
        // In an order of chance: a part of it is a sample, and so are its folds.
        let mut order = Stream::new(SEED, "trust thinning", 0).permutation(all);
        order.truncate(SITES);
        let own = context.part(&order);
        let geometry = Geometry::new(&own.xy);
        let drawn = self.draws(&own)?;
        let counts = own.trials.is_some();
        verdict.draws = drawn.len();

        let observed: Vec<Vec<f64>> = std::iter::once(&own)
            .chain(drawn.iter().map(|(like, _)| like))
            .collect::<Vec<_>>()
            .par_iter()
            .map(|c| statistics::observed(c, &geometry))
            .collect();
        let design: Vec<Vec<f64>> = std::iter::once(&own)
            .chain(drawn.iter().map(|(_, other)| other))
            .collect::<Vec<_>>()
            .par_iter()
            .map(|c| statistics::design(c))
            .collect();
        let group = |verdict: &mut Verdict,
                     (name, level): (&str, f64),
                     figures: &[Statistic],
                     pool: &[Vec<f64>]| {
            let judged = tails::judge(pool, level);
            let lines = figures.iter().enumerate().filter(|(k, _)| pool[0][*k].is_finite());
            let lines = lines.map(|(k, figure)| {
                let [low, high] = judged.range[k];
                let line = Line {
                    name: figure.name.into(),
                    here: figure.show(pool[0][k], counts),
                    trained: [figure.show(low, counts), figure.show(high, counts)],
                    p: judged.p[k],
                    found: judged.found[k],
                };
                if line.found {
                    verdict.findings.push(figure.finding(&line, judged.above[k]));
                }
                line
            });
            let lines: Vec<Line> = lines.collect();
            verdict.groups.push(Group { name: name.into(), p: judged.overall, level, lines });
        };
        group(&mut verdict, ("observed", LEVELS[0]), statistics::OBSERVED, &observed);
        group(&mut verdict, ("design", LEVELS[1]), statistics::DESIGN, &design);
        if !self.whole && !verdict.findings.is_empty() {
            return Ok(verdict);
        }
        // A model that reads covariates is not asked without them.
        let asked = self.tasks.features() == 0;
        if let Some(foretelling) = Foretelling::new(&own).filter(|_| asked) {
            let likes = drawn.iter().map(|(like, _)| like);
            let (pool, mine) = foretelling.ask(&*self.process, self.tasks.likelihood(), likes)?;
            group(&mut verdict, ("foretold", LEVELS[2]), foretold::FIGURES, &pool);
            verdict.foretold = Some(mine);
        }
        Ok(verdict)
    }

    /// Surveys of the recipe: one observed at the sites of `own` among as many people, and one of a
    /// design of its own.
    fn draws(&self, own: &Context) -> Result<Vec<(Context, Context)>> {
        const ALIKE: usize = 3; // share a correlation, whose factor is the cost of a draw
        let n = own.len();
        let design = self.tasks.design();
        let some = |i: usize| -> Result<Vec<(Context, Context)>> {
            let mut rng = Stream::new(SEED, "trust", i as u64);
            let elsewhere = design.layout(n, &mut rng).xy;
            // Surfaces live in a region, of which sites cover some part: as large a one as there.
            let (centre, unit) = unit_box(&elsewhere[..n]).unwrap_or(([0.0; 2], 1.0));
            let place = |p: &[f64; 2]| [centre[0] + unit * p[0], centre[1] + unit * p[1]];
            let xy = own.xy.iter().map(place).collect();
            let layout = Layout { xy, t: Vec::new(), context: n, first_target: n };
            let mut found = Vec::with_capacity(ALIKE);
            let draws = match self.tasks.draws_at(&layout, ALIKE, &mut rng) {
                // Sites all but at one place, and a surface too smooth for them: one draw less.
                Err(Error::NotPositiveDefinite { .. }) => return Ok(found),
                draws => draws?,
            };
            for draw in draws {
                let y = match &own.trials {
                    // What a frame makes of values: the scale of the surface.
                    None => draw.noisy,
                    Some(tested) => {
                        let link: Link = self.tasks.likelihood().link();
                        let count = |(eta, n): (&f64, &f64)| {
                            rng.binomial(*n as u64, link.outcome(*eta)) as f64
                        };
                        draw.noisy.iter().zip(tested).map(count).collect()
                    }
                };
                let like = Context { xy: own.xy.clone(), y, trials: own.trials.clone() };
                let xy = design.layout(n, &mut rng).xy[..n].to_vec();
                let other = Context { xy, y: vec![0.0; n], trials: draw.trials };
                found.push((like.framed(), other.framed()));
            }
            Ok(found)
        };
        let all: Vec<_> =
            (0..DRAWS / ALIKE).into_par_iter().map(some).collect::<Result<Vec<_>>>()?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Fewest and most sites of a context in training.
    pub fn trained_sites(&self) -> Option<[usize; 2]> {
        trained_sites(&self.tasks)
    }
}

/// Fewest and most sites of a context that tasks have.
pub fn trained_sites(tasks: &Tasks) -> Option<[usize; 2]> {
    let sizes = &tasks.design().context;
    let least = sizes.iter().map(|s| s.sites[0]).min()?;
    Some([least, sizes.iter().map(|s| s.sites[1]).max()?])
}

/// Everything that can be said of a survey before a map of it is believed: units, and where `judge` is
/// given, the model.
///
/// # Errors
/// As [`Judge::judge`].
pub fn examine(judge: Option<&Judge>, survey: &Survey, frame: &Frame) -> Result<Verdict> {
    // Figures of training are of a plane: on a wide one they are off as its distances are.
    let observations = match frame.geometry.is_plane() {
        true => frame.observations(survey, &Device::Cpu)?,
        false => {
            let flat = Survey { geometry: Default::default(), ..survey.clone() };
            Frame::fit(&flat)?.observations(&flat, &Device::Cpu)?
        }
    };
    let mut verdict = match judge {
        Some(judge) => judge.judge(&Context::of(&observations, 0)?)?,
        None => Verdict {
            findings: Vec::new(),
            groups: Vec::new(),
            foretold: None,
            sites: survey.len(),
            judged: 0,
            draws: 0,
        },
    };
    let mut findings = units(survey, frame);
    if let Some([least, most]) = judge.and_then(Judge::trained_sites)
        && !(least..=most).contains(&survey.len())
    {
        findings.push(Finding {
            about: SITES_FINDING.into(),
            text: format!(
                "the model was trained on {least} to {most} sites and the survey has {}: compare with \
                 --model {}",
                survey.len(),
                if survey.len() > 5_000 { "vecchia" } else { "gp" }
            ),
        });
    }
    findings.append(&mut verdict.findings);
    Ok(Verdict { findings, ..verdict })
}

/// What a finding is about that speaks of too few or too many sites.
pub const SITES_FINDING: &str = "number of sites";

/// Farther apart than any two places on earth, km.
const IMPOSSIBLE_KM: f64 = 20_038.0;
/// Wider than this, a plane of the user's own says little of a round earth, km.
const PLANE_KM: f64 = 3_000.0;

/// Values farther from the median than so many distances between the quartiles are named: of a normal law
/// one in 10¹⁵ is, of an exponential one in 1,500.
const FAR_OUT: f64 = 6.0;

/// What can be wrong with a survey whatever the model: kilometres and metres, percentages as counts,
/// nobody positive or everybody, heaps of one value, values far from all others, many surveys of one place.
pub fn units(survey: &Survey, frame: &Frame) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |about: &str, text: String| {
        findings.push(Finding { about: about.into(), text });
    };
    let km = frame.extent_km();
    let local = survey.crs.is_local();
    if km > IMPOSSIBLE_KM || (local && km > PLANE_KM) {
        let how = match km > IMPOSSIBLE_KM {
            true => "farther apart than any two places on earth".to_string(),
            false => format!("more than a plane can hold ({PLANE_KM} km)"),
        };
        find(
            "extent",
            format!(
                "the sites span {} km, {how}: metres read as kilometres? Check --crs ({})",
                short(km),
                survey.crs.name()
            ),
        );
    } else if km < 1.0 {
        find(
            "extent",
            format!(
                "the sites span {} m: kilometres read as metres? Check --crs ({})",
                short(1000.0 * km),
                survey.crs.name()
            ),
        );
    }
    let sites = survey.len();
    let share = |count: usize| 100.0 * count as f64 / sites as f64;
    if let Outcome::Counts { positive, tested } = &survey.outcome
        && sites >= 5
    {
        let [found, people] = [positive, tested].map(|n| n.iter().sum::<f64>());
        // What a count of 0 leaves open: the rule of three.
        let open = 100.0 * (1.0 - 0.05f64.powf(1.0 / people.max(1.0)));
        let told = match (found == 0.0, found == people) {
            (true, _) => Some(("nobody", "prevalence", "higher")),
            (_, true) => Some(("everybody", "the share of those who are not", "lower")),
            _ => None,
        };
        if let Some((who, what, other)) = told {
            find(
                "positives",
                format!(
                    "{who} is positive of {people} people at {sites} sites: {what} is below {} % on the \
                     whole (95 %), and where prevalence is {other} was not seen, so that the pattern of \
                     the map is the model's belief; are positive and tested the right columns?",
                    short(open)
                ),
            );
        }
    }
    match &survey.outcome {
        Outcome::Counts { tested, .. } if sites >= 5 => {
            let round = [100.0, 1000.0, 10_000.0, 100_000.0];
            if let Some(n) = round.iter().find(|n| tested.iter().all(|t| t == *n)) {
                find(
                    "number tested",
                    format!(
                        "exactly {n} people are tested at every site: if the positives are {}, the \
                         intervals are wrong, for the model believes that so many were counted; give \
                         the people who were tested",
                        if *n == 100.0 { "percentages".into() } else { format!("rates per {n}") }
                    ),
                );
            }
        }
        Outcome::Values(values) | Outcome::Positive(values) if sites >= FEWEST => {
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            let at = |share: f64| sorted[(share * (sites - 1) as f64).round() as usize];
            let [low, middle, high] = [0.25, 0.5, 0.75].map(at);
            let out = FAR_OUT * (high - low);
            let beyond = sorted.iter().filter(|v| (**v - middle).abs() > out).count();
            if beyond > 0 && out > 0.0 && matches!(survey.outcome, Outcome::Values(_)) {
                find(
                    "outliers",
                    format!(
                        "{beyond} of {sites} values lie more than {FAR_OUT} times the quartiles' distance from \
                         the median (from {} to {}; half of all lie between {} and {}): the model takes \
                         them for the surface or its noise, and bends or widens the map; check them{}",
                        short(sorted[0]),
                        short(sorted[sites - 1]),
                        short(low),
                        short(high),
                        if sorted[0] > 0.0 {
                            ", or map their logarithm with --log-value"
                        } else {
                            ""
                        }
                    ),
                );
            }
            let runs = sorted.chunk_by(|a, b| a == b);
            if let Some(run) = runs.max_by_key(|run| run.len()).filter(|r| share(r.len()) > 20.0) {
                find(
                    "ties",
                    format!(
                        "{} of {sites} sites have the value {}: a heap such as a limit of detection, \
                         a rounding or a code, that a model of continuous values does not know",
                        run.len(),
                        short(run[0])
                    ),
                );
            }
        }
        _ => {}
    }
    let mut places: Vec<[u64; 2]> =
        survey.x.iter().zip(&survey.y).map(|(x, y)| [x.to_bits(), y.to_bits()]).collect();
    places.sort_unstable();
    places.dedup();
    if share(sites - places.len()) > 20.0 {
        find(
            "repeats",
            format!(
                "{sites} surveys lie at {} places: the model was trained on places apart, and takes \
                 what differs between surveys of one place (years, seasons) for chance",
                places.len()
            ),
        );
    }
    findings
}

/// A number in three significant digits, without an exponent.
fn short(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let decimals = (2.0 - value.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

impl Statistic {
    /// A value of this figure in the user's units.
    fn show(&self, value: f64, counts: bool) -> String {
        (self.show)(value, counts)
    }

    fn finding(&self, line: &Line, above: bool) -> Finding {
        let [low, high] = &line.trained;
        let may = if above { self.high } else { self.low };
        Finding {
            about: line.name.clone(),
            text: format!(
                "{} is {}, and between {low} and {high} in surveys like those the model was trained \
                 on: {may}",
                line.name, line.here
            ),
        }
    }
}

/// Observations `[row, site]` of contexts that share their sites.
fn rows(contexts: &[&Context], sites: &[usize]) -> Result<Observations> {
    let (n, cpu) = (sites.len(), &Device::Cpu);
    let of = |f: &dyn Fn(&Context, usize) -> f64| -> Vec<f32> {
        contexts.iter().flat_map(|c| sites.iter().map(|i| f(c, *i) as f32)).collect()
    };
    let xy: Vec<f32> = contexts
        .iter()
        .flat_map(|c| sites.iter().flat_map(|i| c.xy[*i].map(|v| v as f32)))
        .collect();
    let tensor = |v: Vec<f32>| candle_core::Tensor::from_vec(v, (contexts.len(), n), cpu);
    let counts = contexts.iter().all(|c| c.trials.is_some());
    let trials = match counts {
        true => Some(tensor(of(&|c, i| c.trials.as_ref().map_or(0.0, |t| t[i])))?),
        false => None,
    };
    let s = candle_core::Tensor::from_vec(xy, (contexts.len(), n, 2), cpu)?;
    Observations::new(Sites::new(s), tensor(of(&|c, i| c.y[i]))?.unsqueeze(2)?, trials)
}
