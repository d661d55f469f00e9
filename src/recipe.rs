//! A whole recipe: what to build, what to draw, how to train.

use serde::de::DeserializeOwned;

use crate::{
    error::{Error, Result},
    registry, settings,
    task::Tasks,
};

/// A whole recipe: what to build, what to draw, how to train.
#[derive(Debug, Clone)]
pub struct Recipe {
    text: String,
    table: toml::Table,
}

const TABLES: [&str; 8] =
    ["name", "predicts", "model", "prior", "design", "trials", "task", "train"];

impl Recipe {
    /// Reads a recipe file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, otherwise as [`Recipe::parse`].
    pub fn read(path: &std::path::Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|e| Error::io("read the recipe", path, e))?;
        Self::parse(&text).map_err(|e| e.fact("recipe", path.display()))
    }

    /// Parses recipe text.
    ///
    /// # Errors
    /// [`Error::Input`] for TOML that does not parse or a table that is not known.
    pub fn parse(text: &str) -> Result<Self> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            let line = e.span().map_or(1, |s| text[..s.start].lines().count().max(1));
            Error::input("the recipe is not valid TOML")
                .fact("line", line)
                .fact("reason", e.message())
                .try_this("compare with the recipes in models/")
        })?;
        let known = TABLES.map(String::from);
        if let Some(key) = table.keys().find(|k| !known.contains(k)) {
            let help = match registry::nearest(key, &known) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known: {}", known.join(", ")),
            };
            return Err(Error::input(format!("unknown table `{key}` in the recipe")).try_this(help));
        }
        Ok(Recipe { text: text.to_string(), table })
    }

    /// The text it was read from.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The table called `name`.
    ///
    /// # Errors
    /// [`Error::Input`] if the recipe lacks it.
    pub fn table(&self, name: &str) -> Result<&toml::Table> {
        self.table.get(name).and_then(|v| v.as_table()).ok_or_else(|| {
            Error::input(format!("the recipe has no [{name}] table"))
                .try_this("compare with the recipes in models/")
        })
    }

    /// A string at the top of the recipe.
    pub fn word(&self, name: &str) -> Option<&str> {
        self.table.get(name).and_then(|v| v.as_str())
    }

    /// The law of tasks.
    ///
    /// # Errors
    /// [`Error::Input`] for tables that make none, and for a model that reads times where the design has
    /// none, or the other way round.
    pub fn tasks(&self) -> Result<Tasks> {
        let tasks = Tasks::new(&self.table)?;
        let model = self.table.get("model").and_then(|m| m.as_table());
        let terms = model.and_then(|m| m.get("time_bias")).and_then(|t| t.as_array());
        let reads = terms.is_some_and(|terms| !terms.is_empty());
        match (reads, tasks.design().has_times()) {
            (true, false) => Err(Error::input("the model reads times, and the design has none")
                .try_this(
                    "write `times = {}` under [design], or leave `time_bias` under [model] out",
                )),
            (false, true) if model.is_some() => Err(Error::input(
                "the design has times, and the model reads none",
            )
            .try_this(
                "write `time_bias = [\"exponential\", \"scalar\"]` under [model], or leave `times` \
                     under [design] out",
            )),
            _ => Ok(tasks),
        }
    }

    /// Name of the likelihood.
    pub fn likelihood(&self) -> Result<String> {
        Ok(self.tasks()?.likelihood().name().to_string())
    }

    /// The settings under `name`, defaults where the table is absent.
    pub fn settings<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let empty = toml::Table::new();
        let table = self.table.get(name).and_then(|v| v.as_table()).unwrap_or(&empty);
        settings::parse_table(&format!("[{name}]"), table)
    }
}
