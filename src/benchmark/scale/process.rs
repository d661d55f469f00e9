//! Processes that are asked. Registry: [`PROCESSES`]. To add one: a line there.

use candle_core::Device;

use crate::{
    baseline::{ExactGp, NearestGp},
    checkpoint::{self, Checkpoint},
    error::{Error, Result},
    likelihood::Likelihood,
    process::Process,
    registry::{self, Named},
    sites::Observations,
};

/// A process that has been made ready for a context.
pub type Ready = Box<dyn Process + Send + Sync>;

/// A registered process.
pub struct Entry {
    /// The name that the command takes.
    pub name: &'static str,
    /// One line on it.
    pub about: &'static str,
    /// The most sites that it is asked about, unless the caller says otherwise.
    pub most: usize,
    /// Makes it ready: whatever it learns from the context before it is conditioned on it. Sites are in
    /// model units, values standardised.
    pub fit: fn(&Observations, &'static dyn Likelihood) -> Result<Ready>,
}

impl Named for Entry {
    fn name(&self) -> &str {
        self.name
    }
    fn about(&self) -> &str {
        self.about
    }
}

/// Every process but trained ones, which are named as elsewhere.
pub const PROCESSES: &[Entry] = &[
    Entry {
        name: "vecchia",
        about: "Gaussian process from nearest neighbours, fitted to the context",
        most: usize::MAX,
        fit: |context, likelihood| Ok(Box::new(NearestGp::fit(context, likelihood)?)),
    },
    Entry {
        name: "gp",
        about: "exact Gaussian process, fitted to the context",
        most: 1_000,
        fit: |context, likelihood| Ok(Box::new(ExactGp::fit(context, likelihood)?)),
    },
    Entry {
        name: SHIPPED,
        about: "the model that comes inside the binary for the case's kind of outcome",
        most: TRAINED,
        fit: |_, likelihood| {
            let name = if likelihood.counts() { "prevalence" } else { "continuous" };
            Checkpoint::resolve(name)?.process(&Device::Cpu)
        },
    },
];

/// What stands for the shipped model that suits a case.
pub const SHIPPED: &str = "shipped";
/// Sites that a trained model is asked about: attention takes time by their square.
const TRAINED: usize = 10_000;

/// There is no such case or process.
pub fn unknown<'a>(kind: &str, name: &str, known: impl Iterator<Item = &'a str>) -> Error {
    let known: Vec<String> = known.map(String::from).collect();
    let help = match registry::nearest(name, &known) {
        Some(near) => format!("did you mean `{near}`?"),
        None => "`isopleth benchmark scale --list` says what there is".into(),
    };
    Error::input(format!("there is no {kind} named `{name}`"))
        .fact("known", known.join(", "))
        .try_this(help)
}

/// A process that was asked for by name.
pub enum Contender {
    /// A registered one.
    Listed(&'static Entry),
    /// A trained model, shipped or a file.
    Trained(String, Box<Checkpoint>),
}

impl Contender {
    /// The process called `name`: registered, shipped, or a file.
    ///
    /// # Errors
    /// [`Error::Input`] with the nearest name if it is none of these; else as [`Checkpoint::resolve`].
    pub fn resolve(name: &str) -> Result<Self> {
        if let Some(entry) = PROCESSES.iter().find(|e| e.name == name) {
            return Ok(Contender::Listed(entry));
        }
        match Checkpoint::resolve(name) {
            Ok(checkpoint) => Ok(Contender::Trained(name.into(), Box::new(checkpoint))),
            Err(Error::Unknown { .. }) => {
                let listed = PROCESSES.iter().map(|e| e.name);
                let shipped = checkpoint::shipped().into_iter().map(|(name, _)| name);
                Err(unknown("process", name, listed.chain(shipped)))
            }
            Err(error) => Err(error),
        }
    }

    /// What it is called in tables.
    pub fn name(&self) -> &str {
        match self {
            Contender::Listed(entry) => entry.name,
            Contender::Trained(name, _) => name,
        }
    }

    /// The most sites that it is asked about.
    pub fn most(&self) -> usize {
        match self {
            Contender::Listed(entry) => entry.most,
            Contender::Trained(_, checkpoint) if checkpoint.any_size() => usize::MAX,
            Contender::Trained(..) => TRAINED,
        }
    }

    /// Whether it reads what is observed.
    ///
    /// # Errors
    /// [`Error::Input`] for a model without a known likelihood.
    pub fn reads(&self, likelihood: &'static dyn Likelihood) -> Result<bool> {
        match self {
            Contender::Listed(_) => Ok(true),
            Contender::Trained(_, checkpoint) => {
                Ok(checkpoint.likelihood()?.kind() == likelihood.kind())
            }
        }
    }

    /// Makes it ready for a context.
    ///
    /// # Errors
    /// Those of fitting.
    pub fn fit(
        &self,
        context: &Observations,
        likelihood: &'static dyn Likelihood,
    ) -> Result<Ready> {
        match self {
            Contender::Listed(entry) => (entry.fit)(context, likelihood),
            Contender::Trained(_, checkpoint) => checkpoint.process(&Device::Cpu),
        }
    }
}
