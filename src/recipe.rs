//! A whole recipe: what to build, what to draw, how to train.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::de::DeserializeOwned;

use crate::{
    error::{Error, Result},
    geo::{
        covariates::{Lattice, Source},
        geotiff,
    },
    registry, settings,
    task::{Tasks, covariates},
};

/// A whole recipe: what to build, what to draw, how to train.
#[derive(Debug, Clone)]
pub struct Recipe {
    text: String,
    table: toml::Table,
    /// Rasters of its covariates.
    lattice: Option<Arc<Lattice>>,
}

const TABLES: [&str; 9] =
    ["name", "predicts", "model", "prior", "design", "trials", "task", "covariates", "train"];

impl Recipe {
    /// Reads a recipe file, and the rasters of its covariates, which are kept beside it
    /// ([`Recipe::kept`]): where they cannot be read again, what was kept is taken.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, otherwise as [`Recipe::parse`]; as covariates are read.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|e| Error::io("read the recipe", path, e))?;
        let of = |e: Error| e.fact("recipe", path.display());
        let recipe = Self::parse(&text).map_err(of)?;
        if !recipe.table.contains_key("covariates") {
            return Ok(recipe);
        }
        let lattice = recipe.rasters(path).map_err(of)?;
        Ok(recipe.on(Arc::new(lattice)))
    }

    /// Where what was read of a recipe's rasters is kept: beside it, .covariates.safetensors.
    pub fn kept(path: &Path) -> PathBuf {
        path.with_extension("covariates.safetensors")
    }

    /// The rasters of the covariates, read or as they were kept.
    fn rasters(&self, path: &Path) -> Result<Lattice> {
        let wanted: covariates::Settings = self.settings("covariates")?;
        let specs = wanted.specs()?;
        let files = |file: &Path| path.parent().unwrap_or(Path::new("")).join(file);
        let there = specs.iter().all(|spec| match &spec.source {
            Source::Raster { file, .. } => files(file).exists(),
            Source::Column(_) => false,
        });
        let kept = Self::kept(path);
        if geotiff::READS && (there || !kept.exists()) {
            let lattice = Lattice::read(&specs, wanted.window, wanted.nodes, &files)?;
            if Lattice::open(&kept).ok().as_ref() != Some(&lattice) {
                lattice.write(&kept)?;
            }
            return Ok(lattice);
        }
        if !kept.exists() {
            return Err(Error::input(
                "the recipe has covariates, and this build has no GDAL to read them",
            )
            .fact("covariates", wanted.terms.join("; "))
            .fact("kept covariates would be in", kept.display())
            .try_this(
                "run `isopleth sample RECIPE --out draws.png` where rasters and GDAL are, and copy \
                     the file that it keeps beside the recipe",
            ));
        }
        let lattice = Lattice::open(&kept)?;
        let head = &lattice.head;
        if head.specs != specs || head.window != wanted.window || head.nodes != wanted.nodes {
            return Err(Error::input("the covariates that were kept are of another recipe")
                .fact("kept", kept.display())
                .try_this(
                    "make them again where the rasters are: `isopleth sample` on the recipe",
                ));
        }
        Ok(lattice)
    }

    /// The same recipe with rasters for its covariates.
    pub fn on(self, lattice: Arc<Lattice>) -> Self {
        Recipe { lattice: Some(lattice), ..self }
    }

    /// The rasters of its covariates, where it has some and they were read.
    pub fn lattice(&self) -> Option<&Lattice> {
        self.lattice.as_deref()
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
        Ok(Recipe { text: text.to_string(), table, lattice: None })
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
            _ => match &self.lattice {
                Some(lattice) => tasks.on(lattice.clone()),
                None => Ok(tasks),
            },
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
