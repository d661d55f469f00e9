//! A training step: forward, backward, optimiser; beside it the same step from stock operations.

use std::time::Instant;

use serde::Serialize;

use super::{
    Attention, Layout, Plan, Report, Subject, Timed, machine, network::Network, no_bf16,
    under_ceiling,
};
use crate::{
    attention::Precision,
    error::{Error, Result},
    fused,
    process::Reward,
    recipe::Recipe,
    task::Batch,
    train::{
        Parts,
        learner::{self, Learner, Orders},
        optimiser::Rule,
    },
};

/// Sizes of the step, and which of the two run.
#[derive(Debug, Clone)]
pub struct Step {
    /// Tasks.
    pub batch: usize,
    /// Context sites of each.
    pub contexts: usize,
    /// Targets of each.
    pub targets: usize,
    /// The step as `isopleth train` does it.
    pub fused: bool,
    /// The step from stock operations.
    pub plain: bool,
}

/// The best and the middle step of one way of computing it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Pace {
    /// The fastest step, ms of wall clock.
    pub best_ms: f64,
    /// The step in the middle.
    pub median_ms: f64,
    /// Processor time of a step, ms, averaged over all.
    pub cpu_ms: Option<f64>,
    /// Steps per second, by the fastest.
    pub steps_per_s: f64,
    /// Mean loss of the last step, nats per target.
    pub loss: f64,
    /// Kernels and products of this crate that a step launched on a card ([`fused::launched`]); those of
    /// candle are not among them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launches: Option<u64>,
    /// The most memory that the process had held when these had run, MiB.
    pub peak_rss_mib: Option<f64>,
}

/// What a training step took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Steps {
    /// As `isopleth train` does it: on the processor fused operations, one part of the batch per thread;
    /// on a card weights, gradients and moments stay there. It is waited for after every step, where a
    /// training asks it every 32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fused: Option<Pace>,
    /// Stock operations and the whole score matrix, one part of the batch per thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain: Option<Pace>,
    /// The same in one piece, with whatever threads the operations start: candle as it comes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_whole: Option<Pace>,
    /// The faster of the plain steps over the fused one, best against best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

/// One way of computing a step, with weights of its own.
struct Way {
    learner: Learner,
    subject: Subject,
    plain: bool,
    steps: u64,
    launched: u64,
    walls: Vec<f64>,
    cpu: f64,
    loss: f64,
    peak: Option<f64>,
}

impl Way {
    fn new(network: Network, plan: &Plan, parts: usize, plain: bool) -> Result<Self> {
        let subject = network.subject("train-step");
        let network = learner::Network { params: network.params, process: network.process };
        Ok(Way {
            learner: learner(network, plan, parts)?,
            subject,
            plain,
            steps: 0,
            launched: 0,
            walls: Vec::new(),
            cpu: 0.0,
            loss: f64::NAN,
            peak: None,
        })
    }

    /// One step.
    fn step(&mut self, plan: &Plan, batch: &Batch) -> Result<()> {
        let orders = orders(self.steps);
        fused::plain(self.plain, || self.learner.step(batch, &orders))?;
        self.steps += 1;
        Ok(plan.device.synchronize()?)
    }

    fn measure(&mut self, plan: &Plan, batch: &Batch) -> Result<()> {
        let (start, cpu) = (Instant::now(), machine::cpu_seconds());
        let launched = fused::launched();
        self.step(plan, batch)?;
        self.walls.push(start.elapsed().as_secs_f64());
        self.cpu += machine::cpu_seconds().zip(cpu).map_or(f64::NAN, |(b, a)| b - a);
        self.launched = fused::launched() - launched;
        self.read()
    }

    /// The loss of the step just taken: on a card it has to be asked for.
    fn read(&mut self) -> Result<()> {
        let said = self.learner.reading()?;
        self.loss = said.loss / said.steps as f64;
        Ok(())
    }

    fn pace(&self) -> Pace {
        let mut walls = self.walls.clone();
        walls.sort_by(f64::total_cmp);
        let cpu = 1e3 * self.cpu / walls.len() as f64;
        Pace {
            best_ms: 1e3 * walls[0],
            median_ms: 1e3 * walls[walls.len() / 2],
            cpu_ms: cpu.is_finite().then_some(cpu),
            steps_per_s: 1.0 / walls[0],
            loss: self.loss,
            launches: self.learner.device().is_cuda().then_some(self.launched),
            peak_rss_mib: self.peak,
        }
    }
}

/// Who takes the steps of a training on the plan's device.
fn learner(network: learner::Network, plan: &Plan, parts: usize) -> Result<Learner> {
    let parts = Parts::with_threads(parts, plan.threads.div_ceil(parts))?;
    let devices = std::slice::from_ref(&plan.device);
    Learner::new(vec![network], devices, (Rule::Adamw, 1e-4), parts, false)
}

/// What every step is told. The rate and the clip are those of arXiv:2506.09163.
fn orders(step: u64) -> Orders {
    let chance = (0, step);
    Orders { reward: Reward::Surface, rate: 1e-4, clip: 0.5, average: 0.999, chance }
}

/// Times training steps of the network that `build` makes, the two ways in turn.
///
/// The batch is drawn beforehand: in a training, that happens on another thread.
///
/// # Errors
/// Whatever the model returns.
pub fn run(
    plan: &Plan,
    step: &Step,
    attention: Attention,
    build: impl Fn(Attention) -> Result<Network>,
) -> Result<Report> {
    if plan.precision != Precision::F32 {
        return Err(no_bf16().fact("command", "train-step"));
    }
    let batch = batch(plan, step)?;
    // A card takes a batch whole.
    let parts = if plan.device.is_cpu() { plan.threads.min(step.batch) } else { 1 };
    let mut ways = Vec::new();
    if step.fused {
        ways.push(Way::new(build(attention)?, plan, parts, false)?);
    }
    if step.plain {
        let stock = if attention == Attention::Dka { Attention::Dka } else { Attention::Full };
        ways.push(Way::new(build(stock)?, plan, parts, true)?);
        if parts > 1 {
            ways.push(Way::new(build(stock)?, plan, 1, true)?);
        }
    }
    let ((), ceiling) = under_ceiling(plan.threads, || {
        // Warm up one after the other, fused first: each way's peak memory is then its own, as long
        // as it needs more than those before.
        for way in &mut ways {
            way.step(plan, &batch)?;
            way.read()?;
            way.peak = machine::peak_rss_mib();
        }
        for _ in 0..plan.repeat.max(1) {
            ways.iter_mut().try_for_each(|way| way.measure(plan, &batch))?;
        }
        Ok(())
    })?;
    let paces: Vec<(bool, Pace)> = ways.iter().map(|way| (way.plain, way.pace())).collect();
    let plain: Vec<Pace> = paces.iter().filter(|(plain, _)| *plain).map(|(_, p)| *p).collect();
    let fused = paces.iter().find(|(plain, _)| !plain).map(|(_, pace)| *pace);
    let fastest = plain.iter().map(|pace| pace.best_ms).fold(f64::INFINITY, f64::min);
    let steps = Steps {
        fused,
        plain: plain.first().copied(),
        plain_whole: plain.get(1).copied(),
        ratio: fused.filter(|_| step.plain).map(|fused| fastest / fused.best_ms),
    };
    // The headline is the fused step, where there is one.
    let (way, pace) = (&ways[0], paces[0].1);
    let timed = Timed {
        wall_s: pace.best_ms / 1e3,
        cpu_s: pace.cpu_ms.map(|ms| ms / 1e3),
        answer: pace.loss,
    };
    let subject = Subject {
        batch: step.batch,
        contexts: step.contexts,
        targets: step.targets,
        layout: Layout::Uniform,
        work: way.subject.shape.step(step.batch, step.contexts, step.targets),
        ..way.subject.clone()
    };
    let mut report = Report::new(plan, subject, timed, ceiling, pace.peak_rss_mib);
    report.step = Some(steps);
    Ok(report)
}

/// Surfaces of a GP with Matérn or squared exponential kernels, all tasks on the same sites.
fn batch(plan: &Plan, step: &Step) -> Result<Batch> {
    /// A surface over more sites than this takes minutes to draw.
    const MOST: usize = 8192;
    if step.contexts + step.targets > MOST {
        return Err(Error::input("a task of that many sites cannot be drawn")
            .fact("sites", step.contexts + step.targets)
            .try_this(format!("keep --contexts and --targets together below {MOST}")));
    }
    let recipe = format!(
        "prior = {{ kind = 'gp' }}\n\
         design = {{ targets = {}, clustered = 0.0, gridded = 0.0, held_block = 0.0 }}\n\
         task = {{ likelihood = 'gaussian', frame = 'raw', share = {} }}",
        step.targets, step.batch
    );
    let tasks = Recipe::parse(&recipe)?.tasks()?;
    tasks.batch(plan.seed, 0, step.batch, step.contexts)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::{
        model::params::Params,
        process::{Posterior, Process},
        sites::Observations,
    };

    /// Says whether it was asked for stock operations, as an error.
    struct Witness;
    impl Process for Witness {
        fn condition<'a>(&'a self, _: &Observations) -> Result<Box<dyn Posterior + 'a>> {
            Err(Error::input(fused::is_plain().to_string()))
        }
    }

    #[test]
    fn the_choice_of_plain_operations_reaches_the_threads_that_compute() -> Result<()> {
        let step = Step { batch: 4, contexts: 3, targets: 2, fused: true, plain: true };
        let batch = batch(&plan(), &step)?;
        for (count, wanted) in [(1, true), (1, false), (2, true), (2, false)] {
            let params = Params::new(1, &Device::Cpu, DType::F32);
            let network = learner::Network { params, process: Box::new(Witness) };
            let mut learner = learner(network, &plan(), count)?;
            let said = fused::plain(wanted, || learner.step(&batch, &orders(0)));
            assert_eq!(said.unwrap_err().to_string(), wanted.to_string(), "{count} parts");
        }
        Ok(())
    }

    fn plan() -> Plan {
        Plan {
            device: Device::Cpu,
            device_name: "cpu".into(),
            precision: Precision::F32,
            threads: 2,
            seed: 3,
            repeat: 2,
            lose: 0.0,
        }
    }

    #[test]
    fn plain_and_fused_steps_learn_the_same() -> Result<()> {
        let plan = plan();
        let step = Step { batch: 3, contexts: 20, targets: 9, fused: true, plain: true };
        let table: toml::Table = "width = 16\nblocks = 2\nheads = 2\nkey_width = 8\n\
             value_width = 8\nembed = [16]\nfeed_forward = 16\nhead_widths = [16]"
            .parse()
            .unwrap();
        let build = |attention| Network::trainable(&plan, &table, attention);
        let report = run(&plan, &step, Attention::Scan, build)?;
        let steps = report.step.unwrap();
        let losses = [steps.fused, steps.plain, steps.plain_whole].map(|pace| pace.unwrap().loss);
        for plain in &losses[1..] {
            assert!((plain - losses[0]).abs() < 1e-4, "{losses:?}");
        }
        assert!(steps.ratio.unwrap() > 0.0);
        assert_eq!(report.head_pairs, 3 * 2 * (20 * 20 + 2 * 20 * 9));
        Ok(())
    }
}
