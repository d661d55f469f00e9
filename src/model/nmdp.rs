//! Neural mixture density process: experts shared by all tasks, and a law over their shares that is
//! read off the context.
//!
//! Source: NMDP (CVPR 2026), of which only a secondary note was at hand. A task's shares z have a
//! Dirichlet law with concentrations α(C); the density at a target is Σ zₗ pₗ(y | x, C). What the
//! note leaves open is decided here: experts see the context (blind ones cannot beat the prior),
//! through one TNP-KR that ends in an output for each of them; α is read off the mean of its
//! context tokens. [`Learning`] holds the paper's ladder of objectives.

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem, dirichlet,
    head::softplus,
    layer::{Activation, Mlp},
    params::{Init, Params},
    pool::{at_least_one, masked_mean},
    settings,
    tnp_kr::{self, Caches, Kind, TnpKr},
};
use crate::{
    error::{Error, Result},
    predictive::Predictive,
    process::{Memory, Objective, Posterior, Process, Reward},
    rng::Stream,
    sites::{Observations, Sites, Task},
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "nmdp",
    about: "neural mixture density process: experts with Dirichlet shares per task (NMDP, CVPR 2026)",
    build,
    joint: false,
    tiny: "experts = 3\nparticles = 4\nlearning = \"elbo\"\nsummary = [8]\n\
        backbone = { width = 8, blocks = 2, heads = 2, key_width = 4, value_width = 3, embed = [8], \
        feed_forward = 8, head_widths = [8], bias = [\"rbf\", \"sink\"] }",
};

/// How the shares of the experts are learned: the ladder of the paper's ablation, from A2 to A5. One
/// expert alone is A1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Learning {
    /// All experts weigh the same, always.
    Uniform,
    /// A share for each, read off the context without any doubt.
    Gate,
    /// Dirichlet shares, by the evidence lower bound with the law of context and targets together.
    Elbo,
    /// Dirichlet shares, by expectation–maximisation with importance weights.
    Em,
}

/// Settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Experts.
    pub experts: usize,
    /// How their shares are learned.
    pub learning: Learning,
    /// Draws of the shares per task and step.
    pub particles: usize,
    /// Weighs draws by a root of their likelihood where one alone would take all the weight.
    pub temper: bool,
    /// Hidden widths between the mean context token and the concentrations.
    pub summary: Vec<usize>,
    /// The network; its head says what one expert is.
    pub backbone: tnp_kr::Config,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            experts: 8,
            learning: Learning::Em,
            particles: 16,
            temper: true,
            summary: vec![64],
            backbone: tnp_kr::Config::default(),
        }
    }
}

/// Least and most concentration.
const ALPHA: [f64; 2] = [1e-2, 1e3];
/// An effective sample of fewer particles than this is no sample.
const FEWEST: f64 = 2.0;

/// Neural mixture density process.
pub struct Nmdp {
    network: TnpKr,
    concentrate: Option<Mlp>,
    config: Config,
    problem: Problem,
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    problem.reads_exactly("nmdp")?;
    if config.experts == 0 || config.particles == 0 || config.backbone.head.components != 1 {
        return Err(Error::input(
            "a mixture of experts needs experts, particles, and one component each",
        )
        .fact("experts", config.experts)
        .fact("particles", config.particles)
        .fact("components of the backbone's head", config.backbone.head.components)
        .try_this(
            "set experts = 8, particles = 16 and leave components under [model.backbone] out",
        ));
    }
    let outputs = config.experts * config.backbone.head.outputs();
    let width = config.backbone.width;
    let network =
        TnpKr::with_outputs(config.backbone.clone(), Kind::Scan, problem, params, outputs)?;
    let concentrate = match config.learning {
        Learning::Uniform => None,
        _ => {
            let widths = [&[width], config.summary.as_slice(), &[config.experts]].concat();
            let mut scope = params.scope();
            let mut scope = scope.at("concentrate");
            Some(Mlp::new(&mut scope, &widths, Activation::Gelu, &Init::LeCun)?)
        }
    };
    Ok(Box::new(Nmdp { network, concentrate, config, problem }))
}

struct Conditioned<'a> {
    model: &'a Nmdp,
    caches: Caches,
    /// Log of what each expert weighs in the predictive, `[batch, expert]`.
    log_share: Tensor,
    /// Concentrations `[batch, expert]`, where the shares have a law.
    alpha: Option<Tensor>,
}

impl Nmdp {
    fn conditioned(&self, context: &Observations) -> Result<Conditioned<'_>> {
        let context = &at_least_one(context)?;
        let (caches, tokens) = self.network.encode(context, self.concentrate.is_some())?;
        let batch = context.y.dims()[0];
        let (log_share, alpha) = match (&self.concentrate, tokens) {
            (Some(concentrate), Some(tokens)) => {
                let mean = masked_mean(&tokens, &context.mask)?.squeeze(1)?; // [batch, width]
                let raw = concentrate.forward(&mean)?;
                if self.config.learning == Learning::Gate {
                    let total = raw.log_sum_exp(D::Minus1)?.unsqueeze(1)?;
                    (raw.broadcast_sub(&total)?, None)
                } else {
                    let alpha = (softplus(&raw)? + ALPHA[0])?.minimum(ALPHA[1])?;
                    let total = alpha.sum_keepdim(D::Minus1)?;
                    (alpha.broadcast_div(&total)?.log()?, Some(alpha))
                }
            }
            _ => {
                let (dtype, device) = (context.y.dtype(), context.y.device());
                let share = -(self.config.experts as f64).ln();
                (Tensor::full(share, (batch, self.config.experts), device)?.to_dtype(dtype)?, None)
            }
        };
        Ok(Conditioned { model: self, caches, log_share, alpha })
    }

    /// The experts at targets, one component each, with no shares yet: log weights 0.
    fn experts(&self, caches: &Caches, targets: &Sites) -> Result<Predictive> {
        let raw = self.network.decode(caches, targets)?;
        let (batch, len, _) = raw.dims3()?;
        let (experts, head) = (self.config.experts, &self.config.backbone.head);
        // Every expert as a target of its own, and back.
        let each = raw.reshape((batch, len * experts, head.outputs()))?;
        let each = head.predictive(self.problem.likelihood.link(), &each)?;
        let back = |x: &Tensor| x.reshape((batch, len, experts));
        Ok(Predictive {
            log_weight: back(&each.log_weight)?,
            mean: back(&each.mean)?,
            surface_sd: back(&each.surface_sd)?,
            observation_sd: back(&each.observation_sd)?,
            ..each
        })
    }
}

impl Process for Nmdp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(self.conditioned(context)?))
    }

    fn memory(&self, sites: usize) -> Memory {
        self.network.memory(sites)
    }

    fn objective(
        &self,
        task: &Task,
        reward: Reward,
        rng: &mut Stream,
    ) -> Result<Option<Objective>> {
        let posterior = self.conditioned(&task.context)?;
        let Some(prior) = &posterior.alpha else { return Ok(None) };
        let experts = self.experts(&posterior.caches, &task.target.sites)?;
        let (batch, targets, _) = experts.mean.dims3()?;
        // Log likelihood of all targets of a task under log shares [draw, batch, expert]: [draw, batch].
        let likelihood = |log_shares: &Tensor| -> Result<Tensor> {
            let shares = log_shares.unsqueeze(2)?; // [draw, batch, 1, expert]
            reward.sum(task, |of, truth| {
                let alone = experts.log_parts(of, truth)?.unsqueeze(0)?;
                Ok(shares.broadcast_add(&alone)?.log_sum_exp(D::Minus1)?.sum(2)?)
            })
        };
        let per_target = |x: Tensor| -> Result<Tensor> { Ok((x.mean_all()? / targets as f64)?) };
        let host = |x: &Tensor| -> Result<f64> {
            Ok(x.detach().to_dtype(candle_core::DType::F64)?.mean_all()?.to_scalar::<f64>()?)
        };
        let concentration = host(&prior.sum(D::Minus1)?)?;
        let particles = self.config.particles;
        if self.config.learning == Learning::Elbo {
            let seen = task.context.and(&task.target)?;
            let posterior = self.conditioned(&seen)?.alpha.expect("as above");
            let log = dirichlet::log_shares(&posterior, particles, rng)?;
            let divergence = dirichlet::divergence(&posterior, prior)?;
            let measured = vec![("concentration", concentration), ("kl", host(&divergence)?)];
            let loss = (per_target(divergence)? - per_target(likelihood(&log)?)?)?;
            return Ok(Some(Objective { loss, measured, surrogate: false }));
        }
        // Draws and their weights are constants of the step.
        let log = dirichlet::log_shares(&prior.detach(), particles, rng)?.detach();
        let found = likelihood(&log)?; // [draw, batch]
        let weigh = |root: &Tensor| -> Result<Tensor> {
            let log = found.detach().broadcast_mul(root)?;
            Ok(log.broadcast_sub(&log.log_sum_exp(0)?.unsqueeze(0)?)?.exp()?)
        };
        let one = Tensor::ones((1, batch), found.dtype(), found.device())?;
        let mut weight = weigh(&one)?;
        let effective = weight.sqr()?.sum_keepdim(0)?.recip()?; // [1, batch]
        if self.config.temper {
            // 1 where the sample holds, 1/√targets where one particle took it all.
            let few = effective.lt(FEWEST)?.to_dtype(found.dtype())?;
            let root = 1.0 / (targets as f64).sqrt();
            weight = weigh(&((few * (root - 1.0))? + 1.0)?)?;
        }
        let explained = (&weight * &found)?.sum(0)?;
        let believed = (&weight * dirichlet::log_density(&log, prior)?)?.sum(0)?;
        let measured = vec![("concentration", concentration), ("ess", host(&effective)?)];
        let loss = per_target((explained + believed)?)?.neg()?;
        Ok(Some(Objective { loss, measured, surrogate: true }))
    }
}

impl Posterior for Conditioned<'_> {
    /// The concentrations, or the shares where they have no law.
    fn embedding(&self) -> Result<Option<Tensor>> {
        Ok(Some(match &self.alpha {
            Some(alpha) => alpha.clone(),
            None => self.log_share.exp()?,
        }))
    }

    /// The mixture with every expert's expected share: exact, with nothing drawn.
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let experts = self.model.experts(&self.caches, targets)?;
        let log_weight = self.log_share.unsqueeze(1)?.broadcast_as(experts.mean.shape())?;
        Ok(Predictive { log_weight: log_weight.contiguous()?, ..experts })
    }
}
