//! Prior and design make tasks: what training and calibration are fed with.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    kernel::Kernel,
    likelihood::{self, Likelihood},
    prior::{self, Prior, Rule, hyper::Law},
    rng::Stream,
    settings,
    sites::{Observations, Sites, Task, mean_sd, unit_box},
};

pub mod design;

use design::{Design, Layout};

/// How counts come about: people tested per site.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Trials {
    /// Typical number tested in a survey.
    pub base: Law,
    /// Log-scale sd of the number tested between sites of one survey.
    pub spread: Law,
    /// Chance that every site has the same number tested.
    pub equal: f64,
}

impl Default for Trials {
    fn default() -> Self {
        Trials { base: Law::log_uniform(2.0, 500.0), spread: Law::uniform(0.0, 0.8), equal: 0.15 }
    }
}

/// How a task's coordinates and values reach the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Frame {
    /// As a map does it: the context's box becomes [−1, 1], continuous values are standardised.
    #[default]
    Context,
    /// As drawn: the published benchmarks' convention.
    Raw,
}

/// The law of tasks: the `[prior]`, `[design]`, `[trials]` and `[task]` tables of a recipe.
pub struct Tasks {
    prior: Box<dyn Prior>,
    design: Design,
    trials: Trials,
    settings: Settings,
    likelihood: &'static dyn Likelihood,
}

/// The `[task]` table.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// "binomial" or "gaussian".
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
    /// Sites, context first, region units.
    pub xy: Vec<[f64; 2]>,
    /// How many sites are context.
    pub context: usize,
    /// Index of the first target.
    pub first_target: usize,
    /// Surface, link scale.
    pub latent: Vec<f64>,
    /// Surface plus nugget, link scale.
    pub noisy: Vec<f64>,
    /// Observed value or count.
    pub y: Vec<f64>,
    /// Tested, for counts.
    pub trials: Option<Vec<f64>>,
}

/// A batch of tasks, with what ruled each row expressed in that row's model units.
pub struct Batch {
    /// The tasks.
    pub task: Task,
    /// Kernel, nugget and mean of each row, in model units: what an exact GP needs.
    pub rules: Vec<Rule>,
    /// Centre and size of the frame and (mean, sd) of the outcome, per row.
    pub frames: Vec<([f64; 2], f64, f64, f64)>,
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
            },
            rules: self.rules[start..start + len].to_vec(),
            frames: self.frames[start..start + len].to_vec(),
        })
    }
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
    scale: f64,
}

impl Kernel for Reframed {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        let wide = |p: &[f64]| {
            [0, 1].map(|d| self.centre[d] + self.unit * p.get(d).copied().unwrap_or(0.0))
        };
        self.scale * self.kernel.covariance(&wide(a), &wide(b))
    }
    fn sill(&self) -> f64 {
        self.scale * self.kernel.sill()
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
        let settings: Settings = settings::parse_table("[task]", &table("task")?)?;
        let likelihood = likelihood::find(&settings.likelihood)?;
        let fewest = design.context.iter().map(|s| s.sites[0]).min().unwrap_or(0);
        if settings.frame == Frame::Context && fewest < 2 {
            return Err(Error::input("a context of fewer than two sites has no frame")
                .fact("fewest sites", fewest)
                .try_this("start `sites` under [design] at 2, or set `frame = \"raw\"`"));
        }
        let prior = prior::build(&table("prior")?)?;
        Ok(Tasks { prior, design, trials, settings, likelihood })
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
        let surfaces = self.prior.surfaces(&layout.xy, count, rng)?;
        Ok(surfaces
            .into_iter()
            .map(|(rule, surface)| {
                let trials = self.likelihood.counts().then(|| self.tested(layout.xy.len(), rng));
                let y = match &trials {
                    None => surface.noisy.clone(),
                    Some(trials) => surface
                        .noisy
                        .iter()
                        .zip(trials)
                        .map(|(eta, n)| {
                            rng.binomial(*n as u64, self.likelihood.link().outcome(*eta)) as f64
                        })
                        .collect(),
                };
                Draw {
                    rule,
                    xy: layout.xy.clone(),
                    context: layout.context,
                    first_target: layout.first_target,
                    latent: surface.latent,
                    noisy: surface.noisy,
                    y,
                    trials,
                }
            })
            .collect())
    }

    fn tested(&self, n: usize, rng: &mut Stream) -> Vec<f64> {
        let base = self.trials.base.draw(rng);
        let spread =
            if rng.unit() < self.trials.equal { 0.0 } else { self.trials.spread.draw(rng) };
        (0..n).map(|_| (base * (spread * rng.normal()).exp()).round().clamp(1.0, 1000.0)).collect()
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
        let counts = self.likelihood.counts();
        let (mut s, mut y, mut trials, mut latent, mut noisy) =
            (vec![], vec![], vec![], vec![], vec![]);
        let (mut rules, mut frames) = (vec![], vec![]);
        for draw in draws {
            let (centre, unit) = match self.settings.frame {
                // Coinciding context sites span no box; any unit will do.
                Frame::Context => unit_box(&draw.xy[..context]).unwrap_or((draw.xy[0], 1.0)),
                Frame::Raw => ([0.0; 2], 1.0),
            };
            let (mean, sd) = match (self.settings.frame, counts) {
                (Frame::Context, false) => mean_sd(&draw.y[..context]),
                _ => (0.0, 1.0),
            };
            for p in &draw.xy {
                s.extend((0..dim).map(|d| ((p[d] - centre[d]) / unit) as f32));
            }
            let value = |v: &f64| ((v - mean) / sd) as f32;
            y.extend(draw.y.iter().map(value));
            latent.extend(draw.latent[first..].iter().map(value));
            noisy.extend(draw.noisy[first..].iter().map(value));
            trials.extend(draw.trials.iter().flatten().map(|n| *n as f32));
            rules.push(Rule {
                kernel: draw.rule.kernel.map(|kernel| {
                    let scale = 1.0 / (sd * sd);
                    Arc::new(Reframed { kernel, centre, unit, scale }) as Arc<dyn Kernel>
                }),
                nugget: draw.rule.nugget / (sd * sd),
                mean: (draw.rule.mean - mean) / sd,
                class: draw.rule.class,
            });
            frames.push((centre, unit, mean, sd));
        }
        let n = first + targets;
        let cpu = &Device::Cpu;
        let s = Tensor::from_vec(s, (rows, n, dim), cpu)?;
        let y = Tensor::from_vec(y, (rows, n, 1), cpu)?;
        let trials = if counts { Some(Tensor::from_vec(trials, (rows, n), cpu)?) } else { None };
        let part = |start: usize, len: usize| -> Result<Observations> {
            let trials =
                trials.as_ref().map(|t| t.narrow(1, start, len)?.contiguous()).transpose()?;
            Observations::new(
                Sites::new(s.narrow(1, start, len)?.contiguous()?),
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
            },
            rules,
            frames,
        })
    }
}
