//! `isopleth list`: what the registries hold, and where each thing comes from.

use serde_json::json;

use super::{map::TREND, say};
use crate::{
    attention::Term,
    benchmark::TASKS,
    checkpoint::shipped,
    error::{Error, Result},
    kernel::KERNELS,
    likelihood::LIKELIHOODS,
    model::MODELS,
    prior::PRIORS,
    product::PRODUCTS,
    registry::{self, Named},
    score::SCORES,
};

/// Show what there is to choose from, and where each comes from
#[derive(clap::Args)]
pub struct Args {
    /// models, terms, priors, kernels, likelihoods, products, scores or benchmarks; all when left out
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
        about: "what --model takes, and the kinds that a recipe can train",
        entries: models,
    },
    Shelf {
        name: "terms",
        about: "what `bias` in a recipe of tnp-kr adds up, at distance d; a, b and c are learned",
        entries: || entries(&Term::ALL),
    },
    Shelf {
        name: "priors",
        about: "laws that training surfaces are drawn from",
        entries: || entries(PRIORS),
    },
    Shelf { name: "kernels", about: "how alike two sites are", entries: || entries(KERNELS) },
    Shelf {
        name: "likelihoods",
        about: "how an observation reads the surface",
        entries: || entries(LIKELIHOODS),
    },
    Shelf { name: "products", about: "what a map shows", entries: || entries(PRODUCTS) },
    Shelf { name: "scores", about: "how good a forecast was", entries: || entries(SCORES) },
    Shelf {
        name: "benchmarks",
        about: "published protocols that `isopleth benchmark` trains and scores by",
        entries: || entries(TASKS),
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
        .map(|e| Entry { name: e.name().to_string(), about: e.about().to_string() })
        .collect()
}

/// Trained models first, since they are what a user can name at once.
fn models() -> Vec<Entry> {
    let entry = |name: &str, use_, about: &str| Entry {
        name: name.to_string(),
        about: format!("{use_}: {about}"),
    };
    let gp = "Gaussian process fitted to the survey, over what it leaves open of the covariance; the yardstick";
    let nearest = "the same from nearest neighbours (Vecchia), for thousands of sites and more";
    let trained = shipped().into_iter().map(|(name, about)| entry(name, "trained", about));
    let kinds = MODELS.iter().map(|kind| entry(kind.name(), "to train", kind.about()));
    let trend = "vecchia with a mean that is linear in the coordinates (universal kriging)";
    let fitted = [
        entry("gp", "exact", gp),
        entry("vecchia", "linear", nearest),
        entry(TREND, "linear", trend),
    ];
    trained.chain(fitted).chain(kinds).collect()
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
        let all: serde_json::Map<_, _> =
            shelves.iter().map(|shelf| (shelf.name.to_string(), as_json(shelf))).collect();
        return say(format!("{:#}", json!(all)));
    }
    for (i, shelf) in shelves.iter().enumerate() {
        let gap = if i == 0 { "" } else { "\n" };
        say(format!("{gap}{}: {}", shelf.name, shelf.about))?;
        let rows = (shelf.entries)();
        let width = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for row in rows {
            say(format!("  {:width$}  {}", row.name, row.about))?;
        }
    }
    Ok(())
}

/// The registry called `name`; `kernel` will do for `kernels`.
fn shelf(name: &str) -> Result<&'static Shelf> {
    if let Some(shelf) = SHELVES.iter().find(|shelf| shelf.name.strip_suffix('s') == Some(name)) {
        return Ok(shelf);
    }
    registry::find("registry", SHELVES, name).map_err(|error| match error {
        Error::Unknown { nearest: None, known, .. } => {
            Error::input(format!("there is no registry named `{name}`"))
                .fact("known", known.join(", "))
                .try_this("`isopleth list` shows them all")
        }
        near => near,
    })
}

fn as_json(shelf: &Shelf) -> serde_json::Value {
    (shelf.entries)().iter().map(|e| json!({ "name": e.name, "about": e.about })).collect()
}
