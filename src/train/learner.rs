//! Who takes the steps: the processor, or one card or several, each with a copy of the network.
//!
//! On the processor a batch is cut into parts, and gradients are added in their order. On cards the
//! rows of a batch are shared out, gradients are added in the order of cards, and every card takes
//! the same step on its own copy. Weights, moments and the running average stay on the card; the host
//! asks how it goes every [`PATIENCE`] steps at the latest. Nothing of this has run on a card.
//!
//! Launches of a step, by arithmetic from the sources (TNP-KR, six blocks, published sizes): some 6,000
//! from stock operations, of which each layer's gradient is the larger part (candle begins every
//! gradient with zeros and adds to them: two launches for each edge of the graph); about 1,000 here, of
//! which some 500 are layers, 150 the likelihood and its gradient, 5 the optimiser. A block's feed-forward
//! half is 7 forward and 14 backward, where it was about 140 (counted by tests/contract/layers.rs).
//!
//! A step is not captured as a CUDA graph. It could be: cudarc begins and ends captures, and candle keeps
//! what its strided kernels upload. But a graph holds one shape, and recipes draw another context size
//! at every step; it holds the arguments of its launches, so that rates and corrections would have to
//! move into memory of the card; and tasks would have to be copied into tensors that stay. What goes
//! wrong in a capture shows when it runs, on a card: none was there when this was written.
//!
//! The same numbers in every run: our sums have a fixed order, candle's reductions use no atomics, and
//! cuBLAS repeats itself on one stream of one card. NCCL orders its sums as it likes: with
//! `deterministic` gradients of several cards go through the host.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::{
    Parts, Step, Weights, answer, blend, host, kept_share, loss,
    optimiser::{Moments, Optimiser, Rule, Scalars},
    set,
};
use crate::{
    error::{Error, Result},
    fused::cuda::{News, Resident, Ring, collecting},
    model::params::Params,
    process::{Process, Reward},
    rng::Stream,
    task::Batch,
};

/// Steps that cards may take before the host asks.
pub(crate) const PATIENCE: u64 = 32;

/// A network with its parameters, on one device.
pub(crate) struct Network {
    pub params: Params,
    pub process: Box<dyn Process + Send + Sync>,
}

/// What one step is told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Orders {
    pub reward: Reward,
    pub rate: f64,
    pub clip: f64,
    /// Decay of the running average.
    pub average: f64,
    /// Names the streams of what a process draws to learn: seed and step.
    pub chance: (u64, u64),
}

/// What happened since the last reading.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reading {
    /// Sum of losses over `steps`.
    pub loss: f64,
    pub steps: u64,
    /// Norm of the last gradient.
    pub norm: f64,
    /// Sums of what the process measured.
    pub measured: BTreeMap<String, f64>,
}

/// Networks that learn, the same on every device.
pub(crate) struct Learner {
    devices: Vec<Device>,
    networks: Vec<Network>,
    optimiser: Optimiser,
    average: Weights,
    work: Work,
    reading: Reading,
    /// Steps since the host last knew that all is finite.
    unread: u64,
}

enum Work {
    Host(Parts),
    Cards { residents: Vec<Arc<Resident>>, ring: Option<Ring> },
}

impl Learner {
    /// Networks on their devices, with fresh moments. `fixed` adds gradients of several cards in the
    /// order of cards, through the host, where NCCL would choose its own.
    ///
    /// # Errors
    /// Whatever a card says.
    pub fn new(
        networks: Vec<Network>,
        devices: &[Device],
        (rule, decay): (Rule, f64),
        parts: Parts,
        fixed: bool,
    ) -> Result<Self> {
        let vars = networks[0].params.vars();
        let optimiser = Optimiser::new(rule, decay, vars);
        let average = host(&networks[0].params)?;
        let work = if devices[0].is_cpu() {
            Work::Host(parts)
        } else {
            let residents = networks
                .iter()
                .zip(devices)
                .map(|(n, d)| Ok(Arc::new(Resident::new(d, n.params.vars(), rule == Rule::Yogi)?)))
                .collect::<Result<Vec<_>>>()?;
            let ring = if fixed { None } else { Ring::new(&residents) };
            Work::Cards { residents, ring }
        };
        let (devices, reading) = (devices.to_vec(), Reading::default());
        let mut learner =
            Learner { devices, networks, optimiser, average, work, reading, unread: 0 };
        learner.upload()?;
        Ok(learner)
    }

    /// The network on the first device.
    pub fn network(&self) -> &Network {
        &self.networks[0]
    }

    /// The first device.
    pub fn device(&self) -> &Device {
        &self.devices[0]
    }

    /// Takes one step.
    ///
    /// # Errors
    /// [`Error::Input`] for a loss or a gradient that is not finite; on cards up to [`PATIENCE`]
    /// steps later, while nothing more is learned.
    pub fn step(&mut self, batch: &Batch, orders: &Orders) -> Result<()> {
        let step = match &self.work {
            Work::Host(parts) => {
                let process = &*self.networks[0].process;
                let (reward, chance) = (orders.reward, orders.chance);
                let step = parts.step(process, batch, reward, &self.devices[0], chance)?;
                if !step.loss.is_finite() {
                    return Err(not_finite("the loss", orders.chance.1));
                }
                let params = &self.networks[0].params;
                let norm =
                    self.optimiser.update(params.vars(), &step.grads, orders.rate, orders.clip)?;
                blend(&mut self.average, params, orders.average, self.optimiser.step)?;
                self.reading.loss += step.loss;
                self.reading.steps += 1;
                self.reading.norm = norm;
                step
            }
            Work::Cards { residents, ring } => {
                let step = self.share(residents, batch, orders)?;
                match ring {
                    _ if residents.len() == 1 => {}
                    Some(ring) => ring.sum(residents)?,
                    None => sum(residents)?,
                }
                self.optimiser.step += 1;
                let keep = kept_share(orders.average, self.optimiser.step);
                let Scalars { rate, shrink, c1, c2 } = self.optimiser.scalars(orders.rate);
                for resident in residents {
                    let numbers = [rate, shrink, c1, c2, keep];
                    resident.update(orders.chance.1, orders.clip, numbers)?;
                }
                self.unread += 1;
                step
            }
        };
        for (name, x) in step.measured {
            *self.reading.measured.entry(name.to_string()).or_default() += x;
        }
        if self.unread >= PATIENCE {
            self.ask()?;
        }
        Ok(())
    }

    /// Every card's share of a batch: forward, backward, and gradients gathered in its buffer.
    fn share(&self, residents: &[Arc<Resident>], batch: &Batch, orders: &Orders) -> Result<Step> {
        let rows = batch.rules.len();
        let cards = residents.len();
        // Not all of `self`: what NCCL holds stays on this thread.
        let (networks, devices) = (&self.networks, &self.devices);
        let part = |card: usize| -> Result<BTreeMap<&'static str, f64>> {
            let (start, end) = (card * rows / cards, (card + 1) * rows / cards);
            let resident = &residents[card];
            if start == end {
                // A batch of fewer rows than cards: nothing to add, and no loss.
                let nothing = Tensor::zeros((), DType::F32, &devices[card])?;
                resident.gather(None, &nothing)?;
                return Ok(BTreeMap::new());
            }
            let task = batch.rows(start, end - start)?.task.to_device(&devices[card])?;
            let share = (end - start) as f64 / rows as f64;
            let mut rng =
                Stream::new(orders.chance.0, "objective", (orders.chance.1 << 8) + card as u64);
            let process = &*networks[card].process;
            // An objective of its own may take gradients on its way: those must not be collected.
            let (loss, measured) = match process.objective(&task, orders.reward, &mut rng)? {
                Some(own) => (own.loss, own.measured),
                None => {
                    let usual = || loss(&answer(process, &task)?, &task, orders.reward);
                    (collecting(Some(resident), usual)?, Vec::new())
                }
            };
            let loss = (loss * share)?;
            let grads = loss.backward()?;
            let missing = resident.gather(Some(&grads), &loss.detach())?;
            if let Some(first) = missing.first() {
                let path = networks[card].params.vars().keys().nth(*first);
                let path = path.map_or("?", String::as_str);
                return Err(Error::input(format!("parameter `{path}` received no gradient"))
                    .try_this("this is a bug in the model: please report it"));
            }
            Ok(measured.into_iter().map(|(name, x)| (name, x * share)).collect())
        };
        let parts: Vec<Result<BTreeMap<&'static str, f64>>> = if cards == 1 {
            vec![part(0)]
        } else {
            std::thread::scope(|scope| {
                let part = &part;
                let running: Vec<_> =
                    (0..cards).map(|card| scope.spawn(move || part(card))).collect();
                running.into_iter().map(|r| r.join().expect("a card's share")).collect()
            })
        };
        let mut whole = Step::default();
        for part in parts {
            for (name, x) in part? {
                *whole.measured.entry(name).or_default() += x;
            }
        }
        Ok(whole)
    }

    /// Asks the first card how it went; all cards know the same.
    fn ask(&mut self) -> Result<()> {
        let Work::Cards { residents, .. } = &self.work else { return Ok(()) };
        let news = residents[0].news()?;
        self.unread = 0;
        absorb(&mut self.reading, news)
    }

    /// What happened since the last reading.
    ///
    /// # Errors
    /// As [`Learner::step`].
    pub fn reading(&mut self) -> Result<Reading> {
        self.ask()?;
        Ok(std::mem::take(&mut self.reading))
    }

    /// Weights, moments and average as they stand on the host, after bringing them there.
    pub fn fetch(&mut self) -> Result<(&Moments, &Weights)> {
        if let Work::Cards { residents, .. } = &self.work {
            let [first, second, average] = residents[0].kept()?;
            let moments = self.optimiser.moments.values_mut().zip(first.into_iter().zip(second));
            moments.for_each(|(to, from)| *to = from);
            self.average.values_mut().zip(average).for_each(|(to, from)| *to = from);
        }
        Ok((&self.optimiser.moments, &self.average))
    }

    /// Moments and average as [`Learner::fetch`] left them.
    pub fn held(&self) -> (&Moments, &Weights) {
        (&self.optimiser.moments, &self.average)
    }

    /// Takes up a training where it stood.
    pub fn restore(
        &mut self,
        weights: &Weights,
        moments: Moments,
        average: Weights,
        step: u64,
    ) -> Result<()> {
        self.networks.iter().try_for_each(|n| set(&n.params, weights))?;
        (self.optimiser.moments, self.optimiser.step, self.average) = (moments, step, average);
        self.upload()
    }

    /// Weights of the first network on every other, and what the host holds on every card.
    pub fn upload(&mut self) -> Result<()> {
        if self.networks.len() > 1 {
            let weights = host(&self.networks[0].params)?;
            self.networks[1..].iter().try_for_each(|n| set(&n.params, &weights))?;
        }
        if let Work::Cards { residents, .. } = &self.work {
            let moments = &self.optimiser.moments;
            for resident in residents {
                resident.set([
                    moments.values().map(|(m, _)| m.as_slice()).collect(),
                    moments.values().map(|(_, v)| v.as_slice()).collect(),
                    self.average.values().map(Vec::as_slice).collect(),
                ])?;
            }
        }
        Ok(())
    }
}

/// Gradients of all cards, added in their order on the host and handed back.
fn sum(residents: &[Arc<Resident>]) -> Result<()> {
    let mut total = residents[0].gradients()?;
    for resident in &residents[1..] {
        super::optimiser::add(&mut total, &resident.gradients()?);
    }
    Ok(residents.iter().try_for_each(|resident| resident.replace(&total))?)
}

fn not_finite(what: &str, step: u64) -> Error {
    Error::input(format!("{what} is not finite"))
        .fact("step", step)
        .try_this("lower the learning rate, or resume from the last checkpoint")
}

/// Adds what a card says to what is known, unless it refused a step.
fn absorb(reading: &mut Reading, news: News) -> Result<()> {
    if let Some((step, loss)) = news.refused {
        return Err(not_finite(if loss { "the loss" } else { "the gradient" }, step));
    }
    reading.loss += news.loss;
    reading.steps += news.steps as u64;
    reading.norm = news.norm;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_s_refusal_is_the_host_s_error() {
        let mut reading = Reading::default();
        let numbers = [3.0, 2.0, 0.5, 0.0, 0.0, 1.0];
        absorb(&mut reading, News::read(numbers)).unwrap();
        absorb(&mut reading, News::read(numbers)).unwrap();
        assert_eq!((reading.loss, reading.steps, reading.norm), (6.0, 4, 0.5));
        for (kind, what) in [(1.0, "the loss is not finite"), (2.0, "the gradient is not finite")] {
            let refused = absorb(&mut reading, News::read([3.0, 2.0, 0.5, 17.0, kind, 1.0]));
            let error = refused.unwrap_err();
            assert_eq!(error.to_string(), what);
            assert_eq!(error.facts(), [("step".to_string(), "17".to_string())]);
        }
    }
}
