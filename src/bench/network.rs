//! A whole model: encoding a context, and asking it at the pixels of a map.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use candle_core::{DType, Tensor};

use super::{
    Attention, Layout, Plan, Report, Subject, available, machine, no_bf16, pixels, sites, time,
    under_ceiling,
    work::{Kind, Shape},
};
use crate::{
    attention::{Precision, Tally},
    checkpoint::Checkpoint,
    error::{Error, Result},
    likelihood::{self, Likelihood},
    mapping::{self, plan::TILE},
    model::{self, Problem, params::Params, tnp_kr::Config},
    predictive::Of,
    process::{Posterior, Process},
    rng::Stream,
    sites::{Observations, Sites},
};

/// A model that is ready, and what is known about its attention.
pub struct Network {
    /// A trained model's name, or `random`.
    pub name: String,
    /// The model.
    pub process: Box<dyn Process + Send + Sync>,
    /// Its parameters, where it may be trained.
    pub params: Params,
    /// Numbers learned.
    pub count: usize,
    /// How observations arise.
    pub likelihood: &'static dyn Likelihood,
    /// How it computes attention.
    pub attention: Attention,
    /// Sizes of its attention.
    pub shape: Shape,
    /// Its settings.
    pub config: Config,
}

/// The kinds of model, and how each computes attention.
const KINDS: [(&str, Attention); 4] = [
    ("tnp-kr", Attention::Scan),
    ("tnp-kr", Attention::Sparse),
    ("tnp-kr-full", Attention::Full),
    ("tnp-kr-dka", Attention::Dka),
];

impl Network {
    /// A trained model by name or file, with its own attention or another that its weights fit.
    ///
    /// # Errors
    /// [`Error::Unknown`] for no such model; [`Error::Input`] for one without attention, of sites
    /// on a line, or whose weights do not fit.
    pub fn trained(plan: &Plan, name: &str, attention: Option<Attention>) -> Result<Self> {
        let checkpoint = Checkpoint::resolve(name)?;
        let recipe = checkpoint.recipe()?;
        if recipe.tasks()?.dim() != 2 {
            return Err(Error::input(
                "the model was trained on sites along a line, not on a plane",
            )
            .fact("model", name)
            .try_this("`isopleth list models` shows the models for maps"));
        }
        let table = recipe.table("model")?;
        let kind = table.get("kind").and_then(|kind| kind.as_str()).unwrap_or_default();
        let Some((_, own)) = KINDS.iter().find(|(known, _)| *known == kind) else {
            return Err(Error::input("the model has no attention to measure")
                .fact("model", name)
                .fact("kind", kind)
                .try_this("use a model of kind tnp-kr, tnp-kr-full or tnp-kr-dka"));
        };
        let attention = attention.unwrap_or(*own);
        if (attention == Attention::Dka) != (*own == Attention::Dka) {
            return Err(Error::input("the model's weights are made for another attention")
                .fact("model", format!("{name}, {kind}"))
                .try_this("leave --attention out, or use random weights without --model"));
        }
        let params = Params::frozen(checkpoint.tensors.clone(), &plan.device, DType::F32);
        let built = Self::build(name, table, checkpoint.likelihood()?, attention, plan, params)?;
        Ok(Network { count: checkpoint.card.parameters, ..built })
    }

    /// Random weights for a `[model]` table without its kind, and Gaussian values. To be asked: no
    /// gradient is recorded.
    ///
    /// # Errors
    /// [`Error::Input`] for settings that make no network.
    pub fn random(plan: &Plan, table: &toml::Table, attention: Attention) -> Result<Self> {
        let Network { params, count, likelihood, config, .. } =
            Self::trainable(plan, table, attention)?;
        let table = toml::Table::try_from(&config).expect("settings are plain data");
        let tensors =
            params.vars().iter().map(|(path, var)| (path.clone(), var.as_tensor().clone()));
        let params = Params::frozen(tensors.collect(), &plan.device, DType::F32);
        let built = Self::build("random", &table, likelihood, attention, plan, params)?;
        Ok(Network { count, ..built })
    }

    /// The same, to be trained.
    ///
    /// # Errors
    /// As [`Network::random`].
    pub fn trainable(plan: &Plan, table: &toml::Table, attention: Attention) -> Result<Self> {
        let mut table = table.clone();
        if attention == Attention::Dka {
            table.insert("embed_location".into(), true.into());
        }
        let params = Params::new(plan.seed, &plan.device, DType::F32);
        Self::build("random", &table, likelihood::find("gaussian")?, attention, plan, params)
    }

    fn build(
        name: &str,
        table: &toml::Table,
        likelihood: &'static dyn Likelihood,
        attention: Attention,
        plan: &Plan,
        mut params: Params,
    ) -> Result<Self> {
        available(attention, plan)?;
        let mut table = table.clone();
        table.remove("kind");
        let config: Config = model::settings(&table)?;
        if plan.precision != Precision::F32 && config.published_start {
            // Such a model does not read packed contexts.
            return Err(no_bf16().fact("published_start", true));
        }
        let (kind, _) = KINDS.iter().find(|(_, does)| *does == attention).expect("is available");
        table.insert("kind".into(), (*kind).into());
        let reading = plan.reading(attention);
        let problem = Problem { reading, ..Problem::new(2, likelihood) };
        let process = model::build(&table, problem, &mut params)?;
        let kind = match attention {
            Attention::Dka => {
                Kind::Kernel { dim: 2, width: config.width, features: config.features }
            }
            _ => Kind::Softmax { heads: config.heads, d: config.key_width, w: config.value_width },
        };
        let shape = Shape { layers: config.blocks, kind };
        let name = name.to_string();
        let count = params.count();
        Ok(Network { name, process, params, count, likelihood, attention, shape, config })
    }

    /// Observations at random sites.
    fn context(&self, plan: &Plan, layout: Layout, n: usize) -> Result<Observations> {
        const TRIALS: usize = 50;
        let rng = &mut Stream::new(plan.seed, "sites", 0);
        let places = Sites::plane(&sites(layout, n, rng), &plan.device)?;
        let counts = self.likelihood.counts();
        let mut value = || if counts { rng.below(TRIALS + 1) as f32 } else { rng.normal() as f32 };
        let y: Vec<f32> = (0..n).map(|_| value()).collect();
        let y = Tensor::from_vec(y, (1, n, 1), &plan.device)?;
        let trials = match counts {
            true => Some(Tensor::full(TRIALS as f32, (1, n), &plan.device)?),
            false => None,
        };
        Observations::new(places, y, trials)
    }

    pub(super) fn subject(&self, command: &'static str) -> Subject {
        let bias = if self.attention == Attention::Dka { vec![] } else { self.config.bias.clone() };
        Subject {
            command,
            attention: self.attention,
            model: Some(self.name.clone()),
            parameters: Some(self.count),
            batch: 1,
            contexts: 0,
            targets: 0,
            layout: Layout::Uniform,
            shape: self.shape,
            bias,
            work: Default::default(),
        }
    }
}

/// Times the encoding of a context.
///
/// # Errors
/// Whatever the model returns.
pub fn condition(
    plan: &Plan,
    network: &Network,
    layout: Layout,
    contexts: usize,
) -> Result<Report> {
    let context = network.context(plan, layout, contexts)?;
    let one = Sites::plane(&[[0.0, 0.0]], &plan.device)?;
    let (timed, ceiling) = under_ceiling(plan.threads, || {
        time(plan, || {
            let posterior = network.process.condition(&context)?;
            Ok(posterior.at(&one)?.marginals(0, Of::Surface)?.mean[0])
        })
    })?;
    let work = network.shape.condition(contexts);
    let subject = Subject { contexts, layout, work, ..network.subject("condition") };
    Ok(Report::new(plan, subject, timed, ceiling, machine::peak_rss_mib()))
}

/// Times a map without its files: encoding, then every pixel, tile by tile.
///
/// # Errors
/// Whatever the model returns.
pub fn map(
    plan: &Plan,
    network: &Network,
    layout: Layout,
    contexts: usize,
    targets: usize,
) -> Result<Report> {
    let context = network.context(plan, layout, contexts)?;
    let asked = pixels(targets, TILE);
    let (mut condition_s, mut tally) = (f64::INFINITY, Tally::default());
    let (timed, ceiling) = under_ceiling(plan.threads, || {
        time(plan, || {
            let start = Instant::now();
            let posterior = network.process.condition(&context)?;
            plan.device.synchronize()?;
            condition_s = condition_s.min(start.elapsed().as_secs_f64());
            let answer = ask(plan, &*posterior, &asked)? / targets as f64;
            if let Some([read, all]) = posterior.tally() {
                tally = Tally { read, all };
            }
            Ok(answer)
        })
    })?;
    let work = network.shape.map(contexts, targets);
    let subject = Subject { contexts, targets, layout, work, ..network.subject("map") };
    let mut report = Report::new(plan, subject, timed, ceiling, machine::peak_rss_mib());
    report.condition_s = Some(condition_s);
    report.skipped(tally);
    Ok(report)
}

/// Asks about all pixels as a map does: in questions of the same size, by as many threads at once,
/// each with a pool of its own. Returns the sum of the means.
fn ask(plan: &Plan, posterior: &dyn Posterior, asked: &[[f64; 2]]) -> Result<f64> {
    let map = mapping::Plan::new(plan.device.clone());
    let threads = (plan.threads / map.workers).max(1);
    let parts: Vec<&[[f64; 2]]> = asked.chunks(map.targets).collect();
    let next = AtomicUsize::new(0);
    let answer = |part: &[[f64; 2]]| -> Result<f64> {
        let predictive = posterior.at(&Sites::plane(part, &plan.device)?)?;
        let marginals = predictive.marginals(0, Of::Surface)?;
        let components = (0..marginals.len()).flat_map(|i| marginals.components(i));
        Ok(components.map(|(weight, mean, _)| weight * mean).sum())
    };
    let work = || -> Result<f64> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(|e| Error::input(format!("no more threads: {e}")))?;
        let mut total = 0.0;
        while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            total += pool.install(|| answer(part))?;
        }
        Ok(total)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..map.workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("a share of the map")).sum()
    })
}
