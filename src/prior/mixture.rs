//! Several priors, one of which rules each surface: what a model must recognise before it predicts.

use std::sync::Arc;

use super::{Entry, Prior, Rule, Surface};
use crate::{
    error::{Error, Result},
    rng::Stream,
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "mixture",
    about: "one of several priors for each surface; its name is the surface's class",
    build,
    tiny: "parts = [{ name = \"wave\", kind = \"sine\", noise_sd = 0.1 }, { name = \"saw\", weight = 2.0, \
        kind = \"sawtooth\", noise_sd = 0.1 }]",
};

/// One of the priors.
struct Part {
    class: Arc<str>,
    weight: f64,
    prior: Box<dyn Prior>,
}

/// Priors with their relative chances: `parts = [{ name, weight, kind, … }, …]`.
struct Mixture(Vec<Part>);

fn build(table: &toml::Table) -> Result<Box<dyn Prior>> {
    let help = "write e.g. parts = [{ name = \"saw\", weight = 1, kind = \"sawtooth\" }, …]";
    if let Some(key) = table.keys().find(|k| *k != "parts") {
        return Err(Error::input(format!("unknown setting `{key}` in [prior]")).try_this(help));
    }
    let parts = table.get("parts").and_then(|p| p.as_array()).filter(|p| !p.is_empty());
    let parts = parts.ok_or_else(|| Error::input("a mixture needs its parts").try_this(help))?;
    let parts: Vec<Part> = parts.iter().map(part).collect::<Result<_>>()?;
    if parts.iter().map(|p| p.weight).sum::<f64>() <= 0.0 {
        return Err(Error::input("no part of the mixture has a positive weight").try_this(help));
    }
    Ok(Box::new(Mixture(parts)))
}

fn part(value: &toml::Value) -> Result<Part> {
    let bad = |what: &str| {
        Err(Error::input(format!("a part of the mixture {what}"))
            .fact("written", value.to_string())
            .try_this("write e.g. { name = \"saw\", weight = 1, kind = \"sawtooth\" }"))
    };
    let Some(mut table) = value.as_table().cloned() else { return bad("is not a table") };
    let weight = match table.remove("weight") {
        None => 1.0,
        Some(toml::Value::Float(w)) => w,
        Some(toml::Value::Integer(w)) => w as f64,
        Some(_) => return bad("has a weight that is no number"),
    };
    if !(weight >= 0.0 && weight.is_finite()) {
        return bad("has a negative weight");
    }
    let class = match table.remove("name") {
        Some(toml::Value::String(name)) => name,
        Some(_) => return bad("has a name that is no word"),
        None => table.get("kind").and_then(|k| k.as_str()).unwrap_or_default().to_string(),
    };
    Ok(Part { class: class.into(), weight, prior: super::build(&table)? })
}

impl Mixture {
    fn choose(&self, rng: &mut Stream) -> &Part {
        let mut left = rng.unit() * self.0.iter().map(|p| p.weight).sum::<f64>();
        for part in &self.0 {
            if left < part.weight {
                return part;
            }
            left -= part.weight;
        }
        self.0.last().expect("a mixture has parts")
    }
}

impl Prior for Mixture {
    fn rule(&self, rng: &mut Stream) -> Rule {
        let part = self.choose(rng);
        Rule { class: Some(part.class.clone()), ..part.prior.rule(rng) }
    }

    /// Surfaces given together are of one class.
    fn surfaces(
        &self,
        xy: &[[f64; 2]],
        count: usize,
        rng: &mut Stream,
    ) -> Result<Vec<(Rule, Surface)>> {
        let part = self.choose(rng);
        let drawn = part.prior.surfaces(xy, count, rng)?.into_iter();
        Ok(drawn
            .map(|(rule, surface)| (Rule { class: Some(part.class.clone()), ..rule }, surface))
            .collect())
    }
}
