//! `isopleth list`: what the registries hold, and where each thing comes from.

use serde_json::json;

use super::say;
use crate::{
    error::{Error, Result},
    kernel::KERNELS,
    likelihood::LIKELIHOODS,
    model::MODELS,
    registry::{self, Named},
    score::SCORES,
};

/// Show what there is to choose from, and where each comes from
#[derive(clap::Args)]
pub struct Args {
    /// models, priors, kernels, likelihoods, products or scores; all of them when left out
    registry: Option<String>,
    /// Print JSON: one array of {name, about} per registry
    #[arg(long)]
    json: bool,
}

/// A registry as a user sees it.
struct Shelf {
    name: &'static str,
    about: &'static str,
    entries: fn() -> Vec<Entry>,
}

struct Entry {
    name: String,
    about: String,
}

/// Every registry. A new one is one entry here.
const SHELVES: &[Shelf] = &[
    Shelf {
        name: "models",
        about: "neural processes that can be trained",
        entries: || entries(MODELS),
    },
    Shelf {
        name: "kernels",
        about: "how alike two sites are",
        entries: || entries(KERNELS),
    },
    Shelf {
        name: "likelihoods",
        about: "how an observation reads the surface",
        entries: || entries(LIKELIHOODS),
    },
    Shelf {
        name: "scores",
        about: "how good a forecast was",
        entries: || entries(SCORES),
    },
];

impl Named for Shelf {
    fn name(&self) -> &str {
        self.name
    }
    fn about(&self) -> &str {
        self.about
    }
}

fn entries<T: Named>(registry: &[T]) -> Vec<Entry> {
    registry
        .iter()
        .map(|e| Entry {
            name: e.name().to_string(),
            about: e.about().to_string(),
        })
        .collect()
}

/// Prints one registry, or all of them.
///
/// # Errors
/// A name that is no registry.
pub fn run(args: &Args) -> Result<()> {
    let shelves = match &args.registry {
        Some(name) => std::slice::from_ref(shelf(name)?),
        None => SHELVES,
    };
    if args.json {
        let all: serde_json::Map<_, _> = shelves
            .iter()
            .map(|shelf| (shelf.name.to_string(), as_json(shelf)))
            .collect();
        return say(format!("{:#}", json!(all)));
    }
    for (i, shelf) in shelves.iter().enumerate() {
        let gap = if i == 0 { "" } else { "\n" };
        say(format!("{gap}{}: {}", shelf.name, shelf.about))?;
        let rows = (shelf.entries)();
        let width = rows
            .iter()
            .map(|row| row.name.chars().count())
            .max()
            .unwrap_or(0);
        for row in rows {
            say(format!("  {:width$}  {}", row.name, row.about))?;
        }
    }
    Ok(())
}

/// The registry called `name`; `kernel` will do for `kernels`.
fn shelf(name: &str) -> Result<&'static Shelf> {
    if let Some(shelf) = SHELVES
        .iter()
        .find(|shelf| shelf.name.strip_suffix('s') == Some(name))
    {
        return Ok(shelf);
    }
    registry::find("registry", SHELVES, name).map_err(|error| match error {
        Error::Unknown {
            nearest: None,
            known,
            ..
        } => Error::input(format!("there is no registry named `{name}`"))
            .fact("known", known.join(", "))
            .try_this("`isopleth list` shows them all"),
        near => near,
    })
}

fn as_json(shelf: &Shelf) -> serde_json::Value {
    (shelf.entries)()
        .iter()
        .map(|e| json!({ "name": e.name, "about": e.about }))
        .collect()
}
