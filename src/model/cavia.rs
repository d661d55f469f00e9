//! Fast context adaptation via meta-learning: one network for all tasks, and a few inputs beside the
//! site that are found for each task by gradient steps on its context.
//!
//! Source: Zintgraf et al. (2019), arXiv:1810.03642, and its reference code: the context parameters
//! start at 0 and are no weights. Departures: the network ends in a Gaussian and can adapt by its
//! likelihood; the outer gradient is clipped by its norm, as everywhere here, not number by number.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    adapt::{Inner, Lesson, Loss, Network, outer},
    head::Head,
    params::Params,
    settings, spread,
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
    name: "cavia",
    about: "fast context adaptation: inputs found per task by gradient (Zintgraf et al. 2019, arXiv:1810.03642)",
    build,
    joint: false,
    tiny: "widths = [8, 8]\nsteps = 2\ncontext = 3",
};

/// Settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Hidden widths.
    pub widths: Vec<usize>,
    /// Context parameters.
    pub context: usize,
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
            context: 5,
            loss: Loss::Likelihood,
            steps: 1,
            inner_rate: 1.0,
            first_order: false,
            head: Head::default(),
        }
    }
}

/// CAVIA.
pub struct Cavia {
    network: Network,
    context: usize,
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
    problem.reads_exactly("cavia")?;
    let Config { loss, steps, inner_rate: rate, first_order, head, widths, context } = config;
    let inner = Inner { loss, steps, rate, first_order };
    inner.check(&head)?;
    if context == 0 {
        return Err(Error::input("without context parameters nothing can adapt")
            .try_this("set context = 5 under [model]"));
    }
    let widths = [&[problem.dim + context], widths.as_slice(), &[head.outputs()]].concat();
    let network = Network::new(&mut params.scope().at("network"), &widths)?;
    Ok(Box::new(Cavia { network, context, inner, head, problem }))
}

struct Adapted<'a> {
    model: &'a Cavia,
    /// `[batch, 1, context]`
    found: Tensor,
}

impl Cavia {
    fn outputs(&self, s: &Tensor, found: &Tensor) -> Result<(Tensor, Vec<Tensor>)> {
        self.network.forward(&Tensor::cat(&[s, &spread(found, s.dim(1)?)?], 2)?)
    }

    fn adapted(&self, context: &Observations) -> Result<Adapted<'_>> {
        let batch = context.y.dims()[0];
        let (dtype, device) = (context.y.dtype(), context.y.device());
        let start = Tensor::zeros((batch, 1, self.context), dtype, device)?;
        let lesson = Lesson::of(context, self.problem.likelihood)?;
        let found = self.inner.descend(lesson, start, |found, lesson| {
            let (raw, inputs) = self.outputs(&lesson.s, &found)?;
            let slope = self.inner.slope(&self.head, &raw, &lesson.y, &lesson.weight)?;
            let gradients = self.network.backward(&inputs, &slope)?;
            let along =
                gradients.input.narrow(2, self.problem.dim, self.context)?.sum_keepdim(1)?;
            Ok((found - (self.inner.seen(along) * self.inner.rate)?)?)
        })?;
        Ok(Adapted { model: self, found })
    }
}

impl Process for Cavia {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(self.adapted(context)?))
    }

    fn memory(&self, sites: usize) -> Memory {
        self.network.memory(sites, false)
    }

    fn objective(&self, task: &Task, reward: Reward, _: &mut Stream) -> Result<Option<Objective>> {
        outer(self.inner.loss, &*self.condition(&task.context)?, task, reward)
    }
}

impl Posterior for Adapted<'_> {
    fn embedding(&self) -> Result<Option<Tensor>> {
        Ok(Some(self.found.squeeze(1)?))
    }

    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let (raw, _) = self.model.outputs(&targets.s, &self.found)?;
        self.model.head.predictive(self.model.problem.likelihood.link(), &raw)
    }
}
