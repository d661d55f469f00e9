//! `isopleth inspect`: what a model is, what it learned from, and how well it does.

use serde_json::json;
use toml::Value;

use super::{
    map::{FITTED, round},
    say,
};
use crate::{
    checkpoint::{Card, Checkpoint},
    error::{Error, Result},
    likelihood::{Kind, Likelihood},
    prior::gp::Gp,
    recipe::Recipe,
    settings,
    task::{Trials, design::Design},
};

/// Show what a model is, what it learned from, and how well it does
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Model by name or file
    #[arg(value_name = "NAME|FILE")]
    model: String,
    /// Print the card whole, as JSON
    #[arg(long)]
    json: bool,
}

/// A heading with named lines under it.
struct Section {
    title: String,
    lines: Vec<(String, String)>,
}

/// Reads the model and prints its card.
///
/// # Errors
/// As [`Checkpoint::resolve`].
pub fn run(args: &Args) -> Result<()> {
    if let Some(name) = FITTED.iter().find(|name| args.model == **name) {
        let error = Error::input(format!("`{name}` has no card: it is fitted to each survey anew"));
        let help = format!("the record of a map made with --model {name} holds what was fitted");
        return Err(error.try_this(help));
    }
    let checkpoint = Checkpoint::resolve(&args.model)?;
    let card = &checkpoint.card;
    if args.json {
        return say(format!("{:#}", json!(card)));
    }
    say(format!("{}: {}", card.name, card.predicts))?;
    for section in sections(&checkpoint)? {
        say(format!("\n{}", section.title))?;
        let width = section.lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, text) in section.lines {
            say(format!("  {name:width$}  {text}"))?;
        }
    }
    Ok(())
}

fn sections(checkpoint: &Checkpoint) -> Result<Vec<Section>> {
    let (card, recipe) = (&checkpoint.card, checkpoint.recipe()?);
    let likelihood = checkpoint.likelihood()?;
    let mut all = vec![
        Section { title: "The model".into(), lines: model(checkpoint, &recipe)? },
        Section { title: "Its training".into(), lines: training(card) },
        Section {
            title: "Surfaces it learned from (lengths: the region's longer half-side is 1)".into(),
            lines: prior(&recipe)?,
        },
        Section { title: "Surveys it learned from".into(), lines: surveys(&recipe, likelihood)? },
    ];
    let mut scores = Vec::new();
    for (name, value) in &card.scores {
        let mut value = value.clone();
        let ranks = value.as_object_mut().and_then(|group| group.remove("ranks"));
        scores.push((name.clone(), score(&value)));
        scores.extend(ranks.iter().flat_map(ranked));
    }
    if !scores.is_empty() {
        all.push(Section { title: "Scores".into(), lines: scores });
    }
    Ok(all)
}

fn named(name: &str, text: impl std::fmt::Display) -> (String, String) {
    (name.to_string(), text.to_string())
}

fn model(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Vec<(String, String)>> {
    let table = recipe.table("model")?;
    let kind = table.get("kind").and_then(Value::as_str).unwrap_or("?");
    let likelihood = checkpoint.likelihood()?;
    let settings: Vec<String> =
        table.iter().filter(|(k, _)| *k != "kind").map(|(k, v)| format!("{k} = {v}")).collect();
    let mut lines = vec![
        named("kind", kind),
        named("reads", format!("{} ({})", likelihood.about(), likelihood.name())),
        named("parameters", thousands(checkpoint.card.parameters as u64)),
    ];
    // Four to a line, or the terminal breaks them anywhere.
    for (i, some) in settings.chunks(4).enumerate() {
        lines.push(named(if i == 0 { "settings" } else { "" }, some.join(", ")));
    }
    Ok(lines)
}

fn training(card: &Card) -> Vec<(String, String)> {
    let mut lines = vec![
        named(
            "steps",
            format!(
                "{}; the weights are those of step {}, the best by validation",
                thousands(card.steps),
                thousands(card.best_step)
            ),
        ),
        named("surveys seen", format!("{}, all simulated", thousands(card.tasks))),
    ];
    if let Some(start) = &card.started_from {
        lines.push(named("started from", start.clone()));
    }
    if let Some(loss) = card.validation {
        lines
            .push(named("validation loss", format!("{loss:.4} nats per target (lower is better)")));
    }
    if let Some(loss) = card.exact_gp {
        let gap = card.validation.map_or(String::new(), |v| format!(": {:+.4} to it", v - loss));
        lines.push(named(
            "exact GP's",
            format!("{loss:.4} on the same surveys, told the true kernel of each{gap}"),
        ));
    }
    lines.extend([
        named("seed", card.seed),
        named("time", format!("{} on {}", duration(card.seconds), card.machine)),
        named("date", format!("{}, by isopleth {}", card.date, card.isopleth)),
    ]);
    lines
}

/// Settings of a prior that are shown first, in this order.
const FIRST: [&str; 6] =
    ["kernels", "length_scale", "sill_sd", "nugget_sd", "nugget_absent", "mean"];

/// Ranges of the prior, the defaults included where it is the Gaussian process.
fn prior(recipe: &Recipe) -> Result<Vec<(String, String)>> {
    let mut table = recipe.table("prior")?.clone();
    let kind = table.remove("kind");
    let kind = kind.as_ref().and_then(Value::as_str).unwrap_or("?");
    let shown = match kind {
        "gp" => whole(&settings::parse_table::<Gp>("[prior]", &table)?)?,
        _ => table,
    };
    let mut lines = vec![named("kind", kind)];
    // What rules most of a surface first; a setting that is off says nothing.
    let place = |key: &str| FIRST.iter().position(|f| *f == key).unwrap_or(FIRST.len());
    let mut settings: Vec<_> =
        shown.iter().filter(|(_, value)| **value != Value::Boolean(false)).collect();
    settings.sort_by_key(|(key, _)| place(key));
    lines.extend(settings.into_iter().map(|(key, value)| {
        let name = words(key);
        let share = value.as_float().filter(|_| name.starts_with("chance"));
        (name, share.map_or_else(|| law(value), percent))
    }));
    Ok(lines)
}

fn surveys(recipe: &Recipe, likelihood: &dyn Likelihood) -> Result<Vec<(String, String)>> {
    let design: Design = recipe.settings("design")?;
    let chances: f64 = design.context.iter().map(|s| s.weight).sum();
    let sizes: Vec<String> = design
        .context
        .iter()
        .map(|s| {
            let share = percent(s.weight / chances);
            format!("{} to {} in {share} of them", s.sites[0], s.sites[1])
        })
        .collect();
    let mut lines = vec![named("sites", sizes.join(", ")), named("targets", design.target_count())];
    if design.displaces() {
        let displaced = whole(&design)?.get("displacement").map_or(String::new(), law);
        lines.push(named("recorded elsewhere, by up to", displaced));
    }
    if design.line {
        lines.push(named("layout", "along a line"));
    }
    let tasks = recipe.tasks()?;
    for (i, spec) in tasks.effects().iter().flat_map(|e| e.specs()).enumerate() {
        lines.push(named(if i == 0 { "covariates" } else { "" }, spec));
    }
    if let Some(lattice) = recipe.lattice() {
        let [shorter, longer] = lattice.sides_km();
        let size = format!("{longer:.0} × {shorter:.0} km, {}", lattice.head.plane.name());
        lines.push(named("cut from rasters of", size));
    }
    if likelihood.counts() {
        let trials: Trials = recipe.settings("trials")?;
        let table = whole(&trials)?;
        let tested = |key: &str| table.get(key).map_or(String::new(), law);
        let what = if likelihood.kind() == Kind::Exposure { "exposure" } else { "tested" };
        if likelihood.kind() != Kind::Single {
            lines.push(named(&format!("{what} at a site"), tested("base")));
            let spread = format!("log-scale sd {}", tested("spread"));
            lines.push(named(&format!("spread of {what}"), spread));
        }
        if let Some(own) = likelihood.dispersion() {
            lines.push(named(&format!("{own} of its counts"), tested(own)));
        }
    }
    let shares = [
        ("clustered surveys", design.clustered),
        ("gridded surveys", design.gridded),
        ("whole areas held out", design.held_block),
    ];
    lines.extend(shares.map(|(name, share)| named(name, percent(share))));
    Ok(lines)
}

/// Settings as a table, defaults included.
fn whole<T: serde::Serialize>(settings: &T) -> Result<toml::Table> {
    toml::Table::try_from(settings)
        .map_err(|e| Error::input("the recipe in the card cannot be shown").fact("reason", e))
}

fn percent(share: f64) -> String {
    format!("{} %", round(100.0 * share))
}

/// A setting's name as words.
fn words(key: &str) -> String {
    let known = match key {
        "sill_sd" => "sd of the surface",
        "nugget_sd" => "nugget sd",
        "nugget_relative" => "nugget sd is relative to the surface's",
        "nugget_absent" => "chance of no nugget",
        "sum" => "chance of two surfaces added",
        "product" => "chance of a periodic factor",
        "anisotropic" => "chance of a direction",
        "anisotropy" => "ratio of length scales then",
        _ => return key.replace('_', " "),
    };
    known.into()
}

/// A law as words: `{ log-uniform = [0.03, 2.0] }` is "0.03 to 2, log-uniform".
fn law(value: &Value) -> String {
    let number = |v: &Value| v.as_float().or_else(|| v.as_integer().map(|i| i as f64));
    match value {
        Value::Table(table) => {
            let pair = table.iter().next().and_then(|(name, numbers)| {
                let numbers: Vec<f64> = numbers.as_array()?.iter().filter_map(number).collect();
                let [a, b] = numbers[..] else { return None };
                Some((name.as_str(), round(a), round(b)))
            });
            match pair {
                Some((name @ ("uniform" | "log-uniform"), a, b)) => format!("{a} to {b}, {name}"),
                Some(("normal", m, s)) => format!("normal with mean {m} and sd {s}"),
                Some((name, a, b)) => format!("{name}({a}, {b})"),
                // Kernels with their relative chances.
                None => {
                    let weights: Vec<(&String, f64)> =
                        table.iter().filter_map(|(k, v)| Some((k, number(v)?))).collect();
                    let total: f64 = weights.iter().map(|(_, w)| w).sum();
                    let shares: Vec<String> = weights
                        .into_iter()
                        .filter(|(_, w)| *w > 0.0)
                        .map(|(k, w)| format!("{k} {}", percent(w / total)))
                        .collect();
                    shares.join(", ")
                }
            }
        }
        Value::Boolean(true) => "yes".into(),
        Value::Boolean(false) => "no".into(),
        other => number(other).map_or_else(|| other.to_string(), round),
    }
}

/// Ranks of the truth in the model's laws: their tests of uniformity, and their histogram.
fn ranked(ranks: &serde_json::Value) -> Vec<(String, String)> {
    let number = |v: &serde_json::Value| v.as_f64().map_or("?".into(), |v| v.to_string());
    let line = |of: &str| {
        let its = ranks.get(of)?;
        let bins: Vec<String> = its["bins"].as_array()?.iter().map(number).collect();
        let text = format!(
            "p of uniformity {} (χ²), {} (Kolmogorov-Smirnov), {} tasks; twentieths {}",
            number(&its["chi_square"][1]),
            number(&its["kolmogorov"][1]),
            its["tasks"],
            bins.join(" ")
        );
        Some((format!("ranks, {of}"), text))
    };
    ["surface", "observation"].into_iter().filter_map(line).collect()
}

/// A score as written, or the numbers of a group of scores.
fn score(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Object(group) => {
            let parts: Vec<String> =
                group.iter().map(|(k, v)| format!("{k} {}", score(v))).collect();
            parts.join(", ")
        }
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// 1234567 is "1,234,567".
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match minutes {
        0..=1 => format!("{} s", round(seconds)),
        2..=119 => format!("{minutes} min"),
        _ => format!("{} h {:02} min", minutes / 60, minutes % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laws_become_words() {
        let table: toml::Table =
            "a = { log-uniform = [0.03, 2.0] }\nb = { normal = [-1.3, 1.7] }\n\
            c = 0.25\nd = { matern-1-2 = 1, rbf = 3 }\ne = true\nf = { beta = [3, 7] }"
                .parse()
                .unwrap();
        let said: Vec<String> = table.values().map(law).collect();
        assert_eq!(
            said,
            [
                "0.03 to 2, log-uniform",
                "normal with mean -1.3 and sd 1.7",
                "0.25",
                "matern-1-2 25 %, rbf 75 %",
                "yes",
                "beta(3, 7)"
            ]
        );
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(
            [7, 1234, 1_234_567].map(thousands),
            ["7", "1,234", "1,234,567"].map(String::from)
        );
        assert_eq!(
            [12.34, 300.0, 8100.0].map(duration),
            ["12.3 s", "5 min", "2 h 15 min"].map(String::from)
        );
    }
}
