//! Model-agnostic meta-learning: a network whose start is learned so that a few gradient steps on a
//! context make it fit.
//!
//! Source: Finn et al. (2017), arXiv:1703.03400; sizes as in the reference code of CAVIA. Departures:
//! the network ends in a Gaussian and can adapt by its likelihood; weights are LeCun normal.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    adapt::{Inner, Lesson, Loss, Network, outer},
    head::Head,
    params::Params,
    settings,
};
use crate::{
    error::Result,
    predictive::Predictive,
    process::{Memory, Objective, Posterior, Process, Reward},
    rng::Stream,
    sites::{Observations, Sites, Task},
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "maml",
    about: "model-agnostic meta-learning: gradient steps on the context (Finn et al. 2017, arXiv:1703.03400)",
    build,
    joint: false,
    tiny: "widths = [8, 8]\nsteps = 2",
};

/// Settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Hidden widths.
    pub widths: Vec<usize>,
    /// What the steps make small.
    pub loss: Loss,
    /// Gradient steps on a context.
    pub steps: usize,
    /// Length of such a step.
    pub inner_rate: f64,
    /// Whether the outer gradient takes the inner gradients for constants.
    pub first_order: bool,
    /// Predictive family: one Gaussian.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            widths: vec![40, 40],
            loss: Loss::Likelihood,
            steps: 1,
            inner_rate: 0.1,
            first_order: false,
            head: Head::default(),
        }
    }
}

/// MAML.
pub struct Maml {
    network: Network,
    inner: Inner,
    head: Head,
    problem: Problem,
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    problem.reads_exactly("maml")?;
    let Config { loss, steps, inner_rate: rate, first_order, head, widths } = config;
    let inner = Inner { loss, steps, rate, first_order };
    inner.check(&head)?;
    let widths = [&[problem.dim], widths.as_slice(), &[head.outputs()]].concat();
    let network = Network::new(&mut params.scope().at("network"), &widths)?;
    Ok(Box::new(Maml { network, inner, head, problem }))
}

struct Adapted<'a> {
    model: &'a Maml,
    network: Network,
}

impl Maml {
    fn adapted(&self, context: &Observations) -> Result<Adapted<'_>> {
        let lesson = Lesson::of(context, self.problem.likelihood)?;
        let network = self.inner.descend(lesson, self.network.clone(), |network, lesson| {
            let (raw, inputs) = network.forward(&lesson.s)?;
            let slope = self.inner.slope(&self.head, &raw, &lesson.y, &lesson.weight)?;
            let gradients = network.backward(&inputs, &slope)?;
            let each = |xs: &[Tensor], gradients: Vec<Tensor>| -> Result<Vec<Tensor>> {
                let step = |(x, gradient): (&Tensor, Tensor)| {
                    Ok(x.broadcast_sub(&(self.inner.seen(gradient) * self.inner.rate)?)?)
                };
                xs.iter().zip(gradients).map(step).collect()
            };
            Ok(Network {
                weights: each(&network.weights, gradients.weights)?,
                biases: each(&network.biases, gradients.biases)?,
            })
        })?;
        Ok(Adapted { model: self, network })
    }
}

impl Process for Maml {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(self.adapted(context)?))
    }

    fn memory(&self, sites: usize) -> Memory {
        self.network.memory(sites, true)
    }

    fn objective(&self, task: &Task, reward: Reward, _: &mut Stream) -> Result<Option<Objective>> {
        outer(self.inner.loss, &*self.condition(&task.context)?, task, reward)
    }
}

impl Posterior for Adapted<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let (raw, _) = self.network.forward(&targets.s)?;
        self.model.head.predictive(self.model.problem.likelihood.link(), &raw)
    }
}
