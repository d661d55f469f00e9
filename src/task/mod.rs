//! Prior and design make tasks: what training and calibration are fed with.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    geo::{covariates::Lattice, displacement},
    kernel::{Change, Kernel, Matern, Metric, Smoothness},
    likelihood::{self, Kind, Likelihood},
    prior::{self, Prior, Rule, hyper::Law},
    rng::Stream,
    settings,
    sites::{HYPER, Observations, Sites, Task, log_rate, mean_sd, unit_box, unit_time},
};

pub mod continent;
pub mod covariates;
pub mod design;
pub mod gaps;

use covariates::{Both, Effects, Seen};
use design::{Design, Layout};

/// How counts come about: people tested per site, or cases expected there at a rate of 1, and what
/// likelihoods with a dispersion of their own add to a village.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Trials {
    /// Typical number tested, population or person-time in a survey.
    pub base: Law,
    /// Log-scale sd of it between sites of one survey.
    pub spread: Law,
    /// Chance that every site has the same.
    pub equal: f64,
    /// Precision of beta-binomial counts, one for each survey.
    pub precision: Law,
    /// Size of negative binomial counts, one for each survey.
    pub size: Law,
}

impl Default for Trials {
    fn default() -> Self {
        Trials {
            base: Law::log_uniform(2.0, 500.0),
            spread: Law::uniform(0.0, 0.8),
            equal: 0.15,
            precision: Law::log_uniform(2.0, 100.0),
            size: Law::log_uniform(0.5, 50.0),
        }
    }
}

/// How a task's coordinates and values reach the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Frame {
    /// As a map does it: the context's box becomes [−1, 1], continuous values (or their logarithms)
    /// are standardised, and rates are relative to the context's overall rate.
    #[default]
    Context,
    /// As drawn: the published benchmarks' convention.
    Raw,
}

/// The law of tasks: the `[prior]`, `[design]`, `[trials]`, `[task]` and `[covariates]` tables of a recipe.
pub struct Tasks {
    prior: Box<dyn Prior>,
    design: Design,
    trials: Trials,
    settings: Settings,
    likelihood: &'static dyn Likelihood,
    effects: Option<Effects>,
}

/// The `[task]` table.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// One of [`likelihood::LIKELIHOODS`]: "binomial", "gaussian", "poisson", …
    pub likelihood: String,
    /// Frame of the tasks.
    pub frame: Frame,
    /// Tasks that share sites and correlation, differing in levels and draws. Factoring is the
    /// cost of a draw, so sharing halves it.
    pub share: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { likelihood: "binomial".into(), frame: Frame::Context, share: 2 }
    }
}

/// One simulated survey with its truth, in region units on the host.
#[derive(Debug)]
pub struct Draw {
    /// What ruled it.
    pub rule: Rule,
    /// Sites as recorded, context first, region units.
    pub xy: Vec<[f64; 2]>,
    /// Their times, as of [`Layout`]; empty where there are none.
    pub t: Vec<f64>,
    /// How many sites are context.
    pub context: usize,
    /// Index of the first target.
    pub first_target: usize,
    /// Surface, link scale.
    pub latent: Vec<f64>,
    /// Surface plus nugget and the likelihood's own dispersion, link scale: the level of a village.
    pub noisy: Vec<f64>,
    /// Observed value, in its own units, or count.
    pub y: Vec<f64>,
    /// Tested, population or person-time, for counts.
    pub trials: Option<Vec<f64>>,
    /// Precision or size, for likelihoods that have one; else ∞.
    pub dispersion: f64,
    /// Covariates of every site, where the recipe has some: their effect is part of the surface.
    pub covariates: Option<Seen>,
}

/// A batch of tasks, with what ruled each row expressed in that row's model units.
pub struct Batch {
    /// The tasks.
    pub task: Task,
    /// Kernel, nugget and mean of each row, in model units: what an exact GP needs. Where sites have
    /// covariates, the kernel takes them behind the coordinates ([`Sites::joined`]).
    pub rules: Vec<Rule>,
    /// Centre and size of the frame and (mean, sd) of the outcome, link scale, per row.
    pub frames: Vec<([f64; 2], f64, f64, f64)>,
    /// [`Draw::dispersion`] of each row.
    pub dispersions: Vec<f64>,
}

impl Batch {
    /// Rows `start … start + len`.
    pub fn rows(&self, start: usize, len: usize) -> Result<Self> {
        let part = |x: &Tensor| x.narrow(0, start, len)?.contiguous();
        Ok(Batch {
            task: Task {
                context: self.task.context.rows(start, len)?,
                target: self.task.target.rows(start, len)?,
                surface: part(&self.task.surface)?,
                noisy: part(&self.task.noisy)?,
                hyper: self.task.hyper.as_ref().map(part).transpose()?,
            },
            rules: self.rules[start..start + len].to_vec(),
            frames: self.frames[start..start + len].to_vec(),
            dispersions: self.dispersions[start..start + len].to_vec(),
        })
    }
}

/// What ruled a row, as [`Task::hyper`] has it.
fn hyper(rule: &Rule) -> [f32; HYPER] {
    let matern = rule.kernel.as_ref().and_then(|kernel| kernel.matern());
    let Some(Matern { smoothness, length_scale, sill, metric }) = matern else {
        return [0.0; HYPER];
    };
    let (angle, ratio) = match metric {
        Metric::Euclidean => (0.0, 1.0f64),
        Metric::Anisotropic { angle, ratio } => (angle, ratio),
        Metric::GreatCircle => return [0.0; HYPER],
    };
    let order = Smoothness::all().iter().position(|s| *s == smoothness).unwrap_or(0);
    // A nugget that is none is one too small to matter.
    let nugget = rule.nugget.max(1e-6 * sill);
    let (sin, cos) = (2.0 * angle).sin_cos();
    let length = length_scale / ratio.sqrt();
    let all = [1.0, order as f64, length.ln(), sill.ln(), nugget.ln()];
    let turned = [ratio.ln() * cos, ratio.ln() * sin];
    let mut out = [0.0; HYPER];
    all.iter().chain(&turned).zip(&mut out).for_each(|(v, out)| *out = *v as f32);
    out
}

/// The same sites with nothing seen at them.
fn hidden(seen: Observations) -> Result<Observations> {
    Ok(Observations { y: seen.y.zeros_like()?, mask: seen.mask.zeros_like()?, ..seen })
}

/// A kernel seen from another frame: coordinates and values rescaled.
#[derive(Debug)]
struct Reframed {
    kernel: Arc<dyn Kernel>,
    /// Not every kernel is stationary: zones stand somewhere.
    centre: [f64; 2],
    unit: f64,
    /// Time that is 0, and of which one unit is made.
    clock: [f64; 2],
    scale: f64,
}

impl Kernel for Reframed {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        let at = |p: &[f64], d: usize| p.get(d).copied().unwrap_or(0.0);
        let wide = |p: &[f64]| -> [f64; 3] {
            let [x, y] = [0, 1].map(|d| self.centre[d] + self.unit * at(p, d));
            [x, y, self.clock[0] + self.clock[1] * at(p, 2)]
        };
        // A kernel that knows no time is asked about places alone.
        let known = if self.kernel.change().is_some() { 3 } else { 2 };
        self.scale * self.kernel.covariance(&wide(a)[..known], &wide(b)[..known])
    }
    fn sill(&self) -> f64 {
        self.scale * self.kernel.sill()
    }
    fn matern(&self) -> Option<Matern> {
        let wide = self.kernel.matern()?;
        let length_scale = wide.length_scale / self.unit;
        Some(Matern { length_scale, sill: self.scale * wide.sill, ..wide })
    }
    fn change(&self) -> Option<Change> {
        let change = self.kernel.change()?;
        Some(Change { time_scale: change.time_scale / self.clock[1], ..change })
    }
}

impl Tasks {
    /// Reads the tables of a recipe; absent tables take their defaults.
    ///
    /// # Errors
    /// [`Error::Input`] for unknown keys, empty ranges, negative variances.
    pub fn new(recipe: &toml::Table) -> Result<Self> {
        let table = |name: &str| -> Result<toml::Table> {
            match recipe.get(name) {
                None => Ok(toml::Table::new()),
                Some(toml::Value::Table(t)) => Ok(t.clone()),
                Some(_) => Err(Error::input(format!("`{name}` is not a table"))
                    .try_this(format!("write [{name}] on a line of its own"))),
            }
        };
        let design: Design = settings::parse_table("[design]", &table("design")?)?;
        design.check()?;
        let trials: Trials = settings::parse_table("[trials]", &table("trials")?)?;
        trials.base.check("base", true)?;
        trials.spread.check("spread", true)?;
        prior::hyper::check_share("equal", trials.equal)?;
        trials.precision.check("precision", true)?;
        trials.size.check("size", true)?;
        let settings: Settings = settings::parse_table("[task]", &table("task")?)?;
        let likelihood = likelihood::find(&settings.likelihood)?;
        let fewest = design.context.iter().map(|s| s.sites[0]).min().unwrap_or(0);
        if settings.frame == Frame::Context && fewest < 2 {
            return Err(Error::input("a context of fewer than two sites has no frame")
                .fact("fewest sites", fewest)
                .try_this("start `sites` under [design] at 2, or set `frame = \"raw\"`"));
        }
        let prior = prior::build(&table("prior")?)?;
        let effects = match recipe.contains_key("covariates") {
            true => {
                Some(Effects::new(settings::parse_table("[covariates]", &table("covariates")?)?)?)
            }
            false => None,
        };
        if effects.is_some() && (design.line || settings.frame != Frame::Context) {
            return Err(Error::input(
                "covariates belong to surveys on the plane, in their own frame",
            )
            .try_this("leave `line` under [design] and `frame` under [task] out"));
        }
        if effects.is_some() && (design.displaces() || design.pool > 0) {
            return Err(Error::input("this design does not go together with covariates")
                .try_this("leave `displacement` and `pool` under [design] out"));
        }
        Ok(Tasks { prior, design, trials, settings, likelihood, effects })
    }

    /// The same with rasters for its covariates.
    ///
    /// # Errors
    /// [`Error::Input`] if they are not those of the recipe.
    pub fn on(self, lattice: Arc<Lattice>) -> Result<Self> {
        let effects = self.effects.map(|effects| effects.on(lattice)).transpose()?;
        Ok(Tasks { effects, ..self })
    }

    /// The law of covariates, where the recipe has some.
    pub fn effects(&self) -> Option<&Effects> {
        self.effects.as_ref()
    }

    /// Features that covariates give every site: 0 without any.
    pub fn features(&self) -> usize {
        self.effects.as_ref().map_or(0, Effects::features)
    }

    /// How observations arise.
    pub fn likelihood(&self) -> &'static dyn Likelihood {
        self.likelihood
    }

    /// Coordinates per site.
    pub fn dim(&self) -> usize {
        if self.design.line { 1 } else { 2 }
    }

    /// The law of surfaces.
    pub fn prior(&self) -> &dyn Prior {
        &*self.prior
    }

    /// The survey design.
    pub fn design(&self) -> &Design {
        &self.design
    }

    /// Draws surveys that share sites and correlation, up to `count` of them.
    pub fn draws(&self, context: usize, count: usize, rng: &mut Stream) -> Result<Vec<Draw>> {
        let layout = self.design.layout(context, rng);
        self.draws_at(&layout, count, rng)
    }

    /// As [`Tasks::draws`], with the number of targets given.
    fn draws_of(
        &self,
        context: usize,
        targets: usize,
        count: usize,
        rng: &mut Stream,
    ) -> Result<Vec<Draw>> {
        let layout = self.design.layout_of(context, targets, rng);
        self.draws_at(&layout, count, rng)
    }

    /// Draws surveys of sites that are laid out already; otherwise as [`Tasks::draws`].
    pub fn draws_at(&self, layout: &Layout, count: usize, rng: &mut Stream) -> Result<Vec<Draw>> {
        let surfaces = match layout.t.is_empty() {
            true => self.prior.surfaces(&layout.xy, count, rng)?,
            false => self.prior.surfaces_in_time(&layout.xy, &layout.t, count, rng)?,
        };
        // One place on the rasters for surveys that share their sites, and effects for each.
        let values = self.effects.as_ref().map(|e| e.values(&layout.xy, rng)).transpose()?;
        surfaces
            .into_iter()
            .map(|(rule, mut surface)| {
                let covariates = match (&self.effects, &values) {
                    (Some(effects), Some(values)) => {
                        let acting = effects.acting(values, rng);
                        let effect = acting.draw(values, rng)?;
                        for level in [&mut surface.latent, &mut surface.noisy] {
                            level.iter_mut().zip(&effect).for_each(|(level, e)| *level += e);
                        }
                        let specs = effects.specs().to_vec();
                        Some(Seen { specs, values: values.clone(), acting })
                    }
                    _ => None,
                };
                let trials = self.trials(layout.xy.len(), rng);
                let dispersion = match self.likelihood.dispersion() {
                    None => f64::INFINITY,
                    Some("precision") => self.trials.precision.draw(rng),
                    Some(_) => self.trials.size.draw(rng),
                };
                let level = |eta: &f64| self.likelihood.village(*eta, dispersion, rng);
                let noisy: Vec<f64> = surface.noisy.iter().map(level).collect();
                let of = |i: usize| trials.as_ref().map_or(0.0, |n| n[i]);
                let y = (0..noisy.len())
                    .map(|i| self.likelihood.observe(noisy[i], of(i), rng))
                    .collect();
                // Last of all: recipes without displacement draw what they drew before there was any.
                let mut xy = layout.xy.clone();
                if self.design.displaces() {
                    let law = displacement::Law::up_to(self.design.displacement.draw(rng));
                    for [x, y] in &mut xy[..layout.context] {
                        let [dx, dy] = law.draw(rng);
                        (*x, *y) = (*x + dx, if self.design.line { *y } else { *y + dy });
                    }
                }
                Ok(Draw {
                    rule,
                    xy,
                    t: layout.t.clone(),
                    context: layout.context,
                    first_target: layout.first_target,
                    latent: surface.latent,
                    noisy,
                    y,
                    trials,
                    dispersion,
                    covariates,
                })
            })
            .collect()
    }

    /// Tested, population or person-time of `n` sites.
    fn trials(&self, n: usize, rng: &mut Stream) -> Option<Vec<f64>> {
        match self.likelihood.kind() {
            Kind::Value | Kind::Positive => None,
            Kind::Single => Some(vec![1.0; n]),
            Kind::Tested => {
                let people = |n: f64| n.round().clamp(1.0, 1000.0);
                Some(self.efforts(n, rng).into_iter().map(people).collect())
            }
            Kind::Exposure => Some(self.efforts(n, rng)),
        }
    }

    fn efforts(&self, n: usize, rng: &mut Stream) -> Vec<f64> {
        let base = self.trials.base.draw(rng);
        let spread =
            if rng.unit() < self.trials.equal { 0.0 } else { self.trials.spread.draw(rng) };
        (0..n).map(|_| base * (spread * rng.normal()).exp()).collect()
    }

    /// Batch number `index` under `seed`: `rows` tasks with `context` sites each.
    ///
    /// # Errors
    /// [`Error::NotPositiveDefinite`] if a drawn covariance cannot be factored.
    pub fn batch(&self, seed: u64, index: u64, rows: usize, context: usize) -> Result<Batch> {
        let mut rng = Stream::new(seed, "task", index);
        let mut draws = Vec::with_capacity(rows);
        let targets = self.design.asked(context, &mut rng);
        while draws.len() < rows {
            let count = self.settings.share.max(1).min(rows - draws.len());
            draws.extend(self.draws_of(context, targets, count, &mut rng)?);
        }
        self.pack(draws)
    }

    /// Packs surveys of equal sizes into tensors, each in its own frame. An empty context becomes
    /// one hidden site, for no tensor is empty.
    pub fn pack(&self, draws: Vec<Draw>) -> Result<Batch> {
        let (rows, context, first) = (draws.len(), draws[0].context, draws[0].first_target);
        let targets = draws[0].xy.len() - first;
        let dim = self.dim();
        let (counts, kind) = (self.likelihood.counts(), self.likelihood.kind());
        let (mut s, mut t, mut y, mut trials, mut latent, mut noisy) =
            (vec![], vec![], vec![], vec![], vec![], vec![]);
        let (mut rules, mut frames, mut dispersions, mut x) = (vec![], vec![], vec![], vec![]);
        for mut draw in draws {
            if kind == Kind::Positive {
                draw.y.iter_mut().for_each(|y| *y = y.ln());
            }
            let (centre, unit) = match self.settings.frame {
                // Coinciding context sites span no box; any unit will do.
                Frame::Context => unit_box(&draw.xy[..context]).unwrap_or((draw.xy[0], 1.0)),
                Frame::Raw => ([0.0; 2], 1.0),
            };
            let (mean, sd) = match (self.settings.frame, kind, &draw.trials) {
                (Frame::Context, Kind::Value | Kind::Positive, _) => mean_sd(&draw.y[..context]),
                (Frame::Context, Kind::Exposure, Some(n)) => {
                    (log_rate(&draw.y[..context], &n[..context]), 1.0)
                }
                _ => (0.0, 1.0),
            };
            for p in &draw.xy {
                s.extend((0..dim).map(|d| ((p[d] - centre[d]) / unit) as f32));
            }
            let clock = match self.settings.frame {
                Frame::Context => unit_time(draw.t.get(..context).unwrap_or_default()),
                Frame::Raw => [0.0, 1.0],
            };
            t.extend(draw.t.iter().map(|t| ((t - clock[0]) / clock[1]) as f32));
            let value = |v: &f64| ((v - mean) / sd) as f32;
            match counts {
                true => y.extend(draw.y.iter().map(|k| *k as f32)),
                false => y.extend(draw.y.iter().map(value)),
            }
            latent.extend(draw.latent[first..].iter().map(value));
            noisy.extend(draw.noisy[first..].iter().map(value));
            // Rates of the frame are relative: their offset is what the overall rate expects.
            let offset = if kind == Kind::Exposure { mean.exp() } else { 1.0 };
            trials.extend(draw.trials.iter().flatten().map(|n| (n * offset) as f32));
            let scale = 1.0 / (sd * sd);
            let mut effects = None;
            if let Some(seen) = &draw.covariates {
                let (features, framed) = seen.framed(context, scale)?;
                x.push(features);
                effects = Some(framed);
            }
            rules.push(Rule {
                kernel: draw.rule.kernel.map(|kernel| {
                    let surface = Arc::new(Reframed { kernel, centre, unit, clock, scale });
                    match effects {
                        Some(effects) => Arc::new(Both { surface, effects }) as Arc<dyn Kernel>,
                        None => surface,
                    }
                }),
                nugget: draw.rule.nugget / (sd * sd),
                mean: (draw.rule.mean - mean) / sd,
                class: draw.rule.class,
            });
            frames.push((centre, unit, mean, sd));
            dispersions.push(draw.dispersion);
        }
        let n = first + targets;
        let cpu = &Device::Cpu;
        let hyper: Vec<f32> = rules.iter().flat_map(hyper).collect();
        let s = Tensor::from_vec(s, (rows, n, dim), cpu)?;
        let t = match t.is_empty() {
            true => None,
            false => Some(Tensor::from_vec(t, (rows, n, 1), cpu)?),
        };
        let y = Tensor::from_vec(y, (rows, n, 1), cpu)?;
        let trials = if counts { Some(Tensor::from_vec(trials, (rows, n), cpu)?) } else { None };
        let x = if x.is_empty() { None } else { Some(Tensor::cat(&x, 0)?) };
        let part = |start: usize, len: usize| -> Result<Observations> {
            let x = x.as_ref().map(|x| x.narrow(1, start, len)?.contiguous()).transpose()?;
            let trials =
                trials.as_ref().map(|t| t.narrow(1, start, len)?.contiguous()).transpose()?;
            let t = t.as_ref().map(|t| t.narrow(1, start, len)?.contiguous()).transpose()?;
            Observations::new(
                Sites { t, x, ..Sites::new(s.narrow(1, start, len)?.contiguous()?) },
                y.narrow(1, start, len)?.contiguous()?,
                trials,
            )
        };
        Ok(Batch {
            task: Task {
                context: if context == 0 { hidden(part(0, 1)?)? } else { part(0, context)? },
                target: part(first, targets)?,
                surface: Tensor::from_vec(latent, (rows, targets, 1), cpu)?,
                noisy: Tensor::from_vec(noisy, (rows, targets, 1), cpu)?,
                hyper: Some(Tensor::from_vec(hyper, (rows, HYPER), cpu)?),
            },
            rules,
            frames,
            dispersions,
        })
    }
}
