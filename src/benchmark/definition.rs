//! What a benchmark task is: its tables, its evaluations, what others scored, and what nobody can.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{MODELS, Task};
use crate::{
    error::{Error, Result},
    process::Reward,
    recipe::Recipe,
    registry, settings, train,
};

/// A task as its file says it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// One line on the task.
    pub about: String,
    /// Where its protocol comes from.
    pub source: String,
    /// Models that are trained when none are named.
    pub models: Vec<String>,
    /// Evaluation tasks, unless the caller says otherwise.
    #[serde(default = "usual_tasks")]
    pub tasks: usize,
    /// Least standard deviation of every model's head.
    #[serde(default)]
    pub floor: f64,
    /// The same for models whose authors chose another.
    #[serde(default)]
    pub floors: BTreeMap<String, f64>,
    /// Whether targets include the context's own sites.
    #[serde(default)]
    pub context_asked: bool,
    /// What others report.
    #[serde(default)]
    pub published: Vec<Published>,
    /// Scores of the true process, computed for the reference of this project.
    #[serde(default)]
    pub ceilings: Vec<Ceiling>,
    /// The law of surfaces.
    pub prior: toml::Table,
    /// The survey design.
    pub design: toml::Table,
    /// How tasks reach the model.
    pub task: toml::Table,
    /// How models are trained.
    pub train: toml::Table,
    /// What the trained models are asked.
    pub evaluation: Vec<Evaluation>,
}

fn usual_tasks() -> usize {
    2048
}

/// A set of tasks to score on.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Its name in tables.
    pub name: String,
    /// Settings of the prior that differ from training's.
    #[serde(default)]
    pub prior: toml::Table,
    /// Settings of the design that differ from training's.
    #[serde(default)]
    pub design: toml::Table,
}

/// A number that others report.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// Evaluation, or class of surfaces within it.
    pub evaluation: String,
    /// Name of the model here.
    pub model: String,
    /// pointwise, joint, kl, mse, probe, nmi or ari.
    pub score: String,
    /// The number, with the sign used here: likelihoods upwards.
    pub value: f64,
    /// Its standard error, where one is given.
    pub error: Option<f64>,
    /// P read in the paper, C in the authors' code, S in a note about it, R recalled.
    pub tag: String,
}

/// A score of the true process, from the project's reference.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ceiling {
    /// Evaluation, or class of surfaces within it.
    pub evaluation: String,
    /// pointwise, joint, floored (pointwise with sd ≥ 0.1), bayes (hyperparameters unknown) or probe.
    pub score: String,
    /// The number.
    pub value: f64,
    /// Its standard error.
    pub error: f64,
    /// M computed by this project.
    pub tag: String,
}

/// A model as `models.toml` says it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// One line on it.
    pub about: String,
    /// The `[model]` table of a recipe.
    pub model: toml::Table,
    /// Settings of `[train]` that its authors choose differently.
    #[serde(default)]
    pub train: toml::Table,
    /// Path of the table of its head; none for models that have no such table.
    #[serde(default = "usual_head")]
    pub head: Vec<String>,
}

fn usual_head() -> Vec<String> {
    vec!["head".into()]
}

/// The table at `path` of `table`, made where it is not there.
fn inner<'a>(table: &'a mut toml::Table, path: &[String]) -> &'a mut toml::Table {
    let Some((first, rest)) = path.split_first() else { return table };
    let place = table.entry(first).or_insert_with(|| toml::Table::new().into());
    if !place.is_table() {
        *place = toml::Table::new().into();
    }
    inner(place.as_table_mut().expect("made so"), rest)
}

/// Every model table, by name.
///
/// # Errors
/// [`Error::Input`] if the file compiled in is broken: a test says so first.
pub fn models() -> Result<BTreeMap<String, Model>> {
    let table: toml::Table = MODELS.parse().map_err(|e: toml::de::Error| {
        Error::input("the table of benchmark models is broken").fact("reason", e.message())
    })?;
    let read = |(name, value): (&String, &toml::Value)| {
        let table = value.as_table().cloned().unwrap_or_default();
        Ok((name.clone(), settings::parse_table(&format!("[{name}]"), &table)?))
    };
    table.iter().map(read).collect()
}

/// The model table called `name`.
///
/// # Errors
/// [`Error::Unknown`] with the nearest name.
pub fn model(name: &str) -> Result<Model> {
    let mut models = models()?;
    models.remove(name).ok_or_else(|| {
        let known: Vec<String> = models.keys().cloned().collect();
        Error::Unknown {
            kind: "benchmark model",
            name: name.to_string(),
            nearest: registry::nearest(name, &known),
            known,
        }
    })
}

fn merged(base: &toml::Table, over: &toml::Table) -> toml::Table {
    let mut out = base.clone();
    out.extend(over.iter().map(|(k, v)| (k.clone(), v.clone())));
    out
}

impl Definition {
    /// Reads a registered task.
    ///
    /// # Errors
    /// [`Error::Input`] if its file is broken: a test says so first.
    pub fn of(task: &Task) -> Result<Self> {
        let table: toml::Table = task.text.parse().map_err(|e: toml::de::Error| {
            Error::input("a benchmark task is broken")
                .fact("task", task.name)
                .fact("reason", e.message())
        })?;
        settings::parse_table(task.name, &table)
    }

    /// What is foretold.
    ///
    /// # Errors
    /// [`Error::Input`] for broken settings of training.
    pub fn reward(&self) -> Result<Reward> {
        Ok(settings::parse_table::<train::Settings>("[train]", &self.train)?.loss)
    }

    /// Least standard deviation of `model`'s head.
    pub fn floor(&self, model: &str) -> f64 {
        self.floors.get(model).copied().unwrap_or(self.floor)
    }

    /// The recipe that trains `name`, whose table is `model`, on this task.
    ///
    /// # Errors
    /// [`Error::Input`] for tables that make no recipe.
    pub fn recipe(
        &self,
        task: &str,
        name: &str,
        model: &Model,
        steps: Option<u64>,
    ) -> Result<Recipe> {
        let mut tables = self.tables(&Evaluation {
            name: String::new(),
            prior: toml::Table::new(),
            design: toml::Table::new(),
        });
        let mut table = model.model.clone();
        if !model.head.is_empty() {
            let nugget = self.reward()? == Reward::Both;
            let head = inner(&mut table, &model.head);
            head.entry("components").or_insert(1.into());
            head.entry("nugget").or_insert(nugget.into());
            // The protocol's, whatever the model's table says: scores compare models, not floors.
            head.insert("floor".into(), self.floor(name).into());
        }
        let mut train = merged(&self.train, &model.train);
        // Cells run side by side, one part each, so that their number never changes a result.
        train.insert("parts".into(), 1.into());
        let protocol = settings::parse_table::<train::Settings>("[train]", &train)?.steps;
        let steps = steps.unwrap_or(protocol);
        let every = (steps / 10).clamp(1, 500);
        for (key, value) in
            [("steps", steps), ("validate_every", every), ("checkpoint_every", every)]
        {
            train.insert(key.into(), (value as i64).into());
        }
        tables.insert("name".into(), format!("{task}: {name}").into());
        let what = match self.reward()? {
            Reward::Surface => "the surface",
            Reward::Observation => "a new observation",
            Reward::Both => "surface and new observation",
            Reward::Outcome => "a new count",
        };
        tables.insert("predicts".into(), format!("{what} of the benchmark {task}").into());
        tables.insert("model".into(), table.into());
        tables.insert("train".into(), train.into());
        let text = toml::to_string(&tables).map_err(|e| {
            Error::input("the tables make no recipe").fact("reason", e).fact("model", name)
        })?;
        Recipe::parse(&text)
    }

    /// The tables that tasks are drawn from for `evaluation`.
    pub fn tables(&self, evaluation: &Evaluation) -> toml::Table {
        let mut tables = toml::Table::new();
        tables.insert("prior".into(), merged(&self.prior, &evaluation.prior).into());
        tables.insert("design".into(), merged(&self.design, &evaluation.design).into());
        tables.insert("task".into(), self.task.clone().into());
        tables
    }

    /// What others report of `model`.
    pub fn published<'a>(&'a self, evaluation: &'a str, model: &'a str) -> Vec<&'a Published> {
        let fits = |p: &&Published| p.evaluation == evaluation && p.model == model;
        self.published.iter().filter(fits).collect()
    }
}
