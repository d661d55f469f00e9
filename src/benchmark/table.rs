//! Scores as a table for people (Markdown) and one for programs (Parquet).

use std::{fmt::Write, path::Path};

use super::{
    Definition, Drawn, Entrant, Options, Trained,
    definition::Ceiling,
    score::{Fixed, Mean, Scores, calibration_error},
};
use crate::{
    error::Result,
    geo::table::{Column, Columns},
    process::Reward,
};

/// Kernels of an integrated process that must count, everywhere but in a tenth of the tasks, for its score
/// to be a ceiling and not the luck of the draws.
const FEWEST: f64 = 3.0;
/// Ranges of context sizes that are told apart.
const BINS: usize = 4;

/// Fewest and most context sites of each of up to [`BINS`] ranges of equal width.
pub fn bins(fixed: &Fixed) -> Vec<[usize; 2]> {
    let sizes = || fixed.facts.iter().map(|f| f.context);
    let (low, high) = (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0));
    let count = BINS.min(high - low + 1);
    let edge = |i: usize| low + (high - low + 1) * i / count;
    (0..count).map(|i| [edge(i), edge(i + 1) - 1]).collect()
}

/// The mean of `value` over tasks that `chosen` lets through.
pub fn mean(fixed: &Fixed, chosen: &dyn Fn(usize) -> bool, value: &dyn Fn(usize) -> f64) -> Mean {
    let tasks = (0..fixed.facts.len()).filter(|i| chosen(*i));
    Mean::of(tasks.map(|i| (fixed.facts[i].cluster, value(i))))
}

/// The mean over an entrant's seeds of `part` of the scores of task `task`.
pub fn over_seeds(
    entrant: &Entrant,
    evaluation: usize,
    task: usize,
    part: impl Fn(&Scores) -> f64,
) -> f64 {
    let sum: f64 = entrant.seeds.iter().map(|t| part(&t.scores[evaluation][task])).sum();
    sum / entrant.seeds.len() as f64
}

fn sd(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()
}

fn number(value: f64) -> String {
    match value.is_finite() {
        true => format!("{value:.3}").replace('-', "−"),
        false => "–".to_string(),
    }
}

fn with_error(m: Mean) -> String {
    match m.mean.is_finite() {
        true => format!("{} ± {:.3}", number(m.mean), m.error),
        false => "–".to_string(),
    }
}

fn row(out: &mut String, cells: &[String]) {
    let _ = writeln!(out, "| {} |", cells.join(" | "));
}

fn head(out: &mut String, cells: &[&str]) {
    row(out, &cells.iter().map(|c| c.to_string()).collect::<Vec<_>>());
    let marks = cells.iter().enumerate().map(|(i, _)| if i == 0 { "---" } else { "---:" });
    row(out, &marks.map(String::from).collect::<Vec<_>>());
}

/// The whole report.
pub fn markdown(
    options: &Options,
    definition: &Definition,
    drawn: &[Drawn],
    entrants: &[Entrant],
) -> Result<String> {
    let mut out = String::new();
    let w = &mut out;
    let reward = match definition.reward()? {
        Reward::Surface => "the surface without noise",
        _ => "a new noisy value",
    };
    let asked = match definition.context_asked {
        true => "the context's own sites are among the targets",
        false => "targets are apart from the context",
    };
    let _ = writeln!(
        w,
        "# Benchmark {}\n\n{}. Protocol: {}.\n",
        options.task.name, definition.about, definition.source
    );
    let _ = writeln!(
        w,
        "Foretold is {reward}; {asked}. *Pointwise* is the log density at each target alone, *joint* that of all targets \
         together, both in nats per target, higher is better, in f64. ± is a standard error over tasks; those drawn with the \
         same sizes count as one, and sizes are spread evenly, so it is rather too large. The *true process* is told the kernel of every task; no model is. *Floor* is the least sd \
         that a head can say; the ceiling that applies to it is the true process with its sd raised to that floor.\n"
    );
    for (e, drawn) in drawn.iter().enumerate() {
        let fixed = &drawn.fixed;
        let _ = writeln!(w, "## {}, {} tasks\n", drawn.name, fixed.facts.len());
        scores(w, definition, drawn, e, entrants);
        breakdown(w, definition, drawn, e, entrants);
        told_apart(w, definition, drawn, e, entrants);
    }
    let _ = writeln!(w, "## Trainings\n");
    head(
        w,
        &[
            "model",
            "seed",
            "parameters",
            "steps",
            "best at step",
            "seconds",
            "tasks seen",
            "validation",
            "measured last",
        ],
    );
    for entrant in entrants {
        for Trained { card, steps, measured, .. } in &entrant.seeds {
            let said = measured.iter().map(|(name, x)| format!("{name} {}", number(*x)));
            let said: Vec<String> = said.collect();
            let cells = [
                entrant.name.clone(),
                card.seed.to_string(),
                card.parameters.to_string(),
                if card.steps < *steps {
                    format!("{} of {steps}", card.steps)
                } else {
                    card.steps.to_string()
                },
                card.best_step.to_string(),
                format!("{:.0}", card.seconds),
                card.tasks.to_string(),
                card.validation.map_or("–".into(), number),
                if said.is_empty() { "–".into() } else { said.join(", ") },
            ];
            row(w, &cells);
        }
    }
    let _ = writeln!(
        w,
        "\nThe steps are those of the best validation or of the last checkpoint within the budget; published models \
         were trained for 50 000 to 200 000 steps. Tags of published numbers: P read in the paper, C in the authors' code, \
         S in a note about it, R recalled; M computed by this project."
    );
    Ok(out)
}

/// One row per model, under those of the true process.
fn scores(w: &mut String, definition: &Definition, drawn: &Drawn, e: usize, entrants: &[Entrant]) {
    let fixed = &drawn.fixed;
    let n = fixed.facts.len();
    let all = |value: &dyn Fn(usize) -> f64| mean(fixed, &|_| true, value);
    head(
        w,
        &[
            "model",
            "pointwise",
            "between seeds",
            "to its ceiling",
            "joint",
            "KL to the truth",
            "CRPS",
            "RMSE",
            "MSE",
            "ECE",
            "in 95 %",
            "floor",
            "published",
        ],
    );
    let exact =
        |part: &dyn Fn(&Scores) -> f64| all(&|i| fixed.exact[i].as_ref().map_or(f64::NAN, part));
    let truth = all(&|i| fixed.ceiling(0.0)[i]);
    let joint = exact(&|s| s.joint);
    let mut known: Vec<Scores> = fixed.exact.iter().flatten().cloned().collect();
    if known.len() < n {
        known.clear();
    }
    if !known.is_empty() {
        let mse = exact(&|s| s.mse).mean;
        let cells = [
            "*true process*".into(),
            with_error(truth),
            "–".into(),
            "–".into(),
            with_error(joint),
            "–".into(),
            number(exact(&|s| s.crps).mean),
            number(mse.sqrt()),
            number(mse),
            number(calibration_error(&known)),
            number(known.iter().map(|s| s.inside[18]).sum::<f64>() / n as f64),
            "0".into(),
            reference(definition, &drawn.name, &["pointwise", "joint", "bayes"]),
        ];
        row(w, &cells);
        if let Some((scores, counting)) = &drawn.integrated {
            let own = |part: fn(&Scores) -> f64| all(&|i| part(&scores[i]));
            let gap = all(&|i| scores[i].pointwise - fixed.ceiling(0.0)[i]);
            let kl =
                all(&|i| fixed.exact[i].as_ref().map_or(f64::NAN, |x| x.joint) - scores[i].joint);
            let mse = own(|s| s.mse).mean;
            row(
                w,
                &[
                    "*true prior, kernel not told*".into(),
                    with_error(own(|s| s.pointwise)),
                    match *counting < FEWEST {
                        true => format!("too few draws: {counting:.1} count"),
                        false => format!("{counting:.0} draws count"),
                    },
                    with_error(gap),
                    with_error(own(|s| s.joint)),
                    with_error(kl),
                    number(own(|s| s.crps).mean),
                    number(mse.sqrt()),
                    number(mse),
                    number(calibration_error(scores)),
                    number(own(|s| s.inside[18]).mean),
                    "0".into(),
                    reference(definition, &drawn.name, &["bayes"]),
                ],
            );
        }
        let mut floors: Vec<f64> = entrants.iter().map(|x| x.floor).filter(|f| *f > 0.0).collect();
        floors.sort_by(f64::total_cmp);
        floors.dedup();
        for floor in floors {
            let ceiling = fixed.ceiling(floor);
            let mut cells = vec!["–".to_string(); 13];
            cells[0] = format!("*true process, sd ≥ {floor}*");
            cells[1] = with_error(all(&|i| ceiling[i]));
            cells[11] = floor.to_string();
            if floor == 0.1 {
                cells[12] = reference(definition, &drawn.name, &["floored"]);
            }
            row(w, &cells);
        }
    }
    for entrant in entrants {
        let ceiling = fixed.ceiling(entrant.floor);
        let own = |part: fn(&Scores) -> f64| all(&|i| over_seeds(entrant, e, i, part));
        let gap = all(&|i| over_seeds(entrant, e, i, |s| s.pointwise) - ceiling[i]);
        let own_joint = own(|s| s.joint);
        let best = |i: usize| {
            over_seeds(entrant, e, i, |s| if s.joint.is_finite() { s.joint } else { s.pointwise })
        };
        let kl = all(&|i| fixed.exact[i].as_ref().map_or(f64::NAN, |x| x.joint - best(i)));
        let by_seed: Vec<f64> = entrant
            .seeds
            .iter()
            .map(|t| t.scores[e].iter().map(|s| s.pointwise).sum::<f64>() / n as f64)
            .collect();
        let pooled: Vec<Scores> =
            entrant.seeds.iter().flat_map(|t| t.scores[e].iter().cloned()).collect();
        let mse = own(|s| s.mse).mean;
        let cells = [
            entrant.name.clone(),
            with_error(own(|s| s.pointwise)),
            if by_seed.len() > 1 {
                format!("{:.3} ({})", sd(&by_seed), by_seed.len())
            } else {
                "– (1)".into()
            },
            with_error(gap),
            with_error(own_joint),
            with_error(kl),
            number(own(|s| s.crps).mean),
            number(mse.sqrt()),
            number(mse),
            number(calibration_error(&pooled)),
            number(pooled.iter().map(|s| s.inside[18]).sum::<f64>() / pooled.len() as f64),
            entrant.floor.to_string(),
            published(definition, &drawn.name, &entrant.name, false),
        ];
        row(w, &cells);
    }
    let others: Vec<String> = definition
        .published
        .iter()
        .filter(|p| p.evaluation == drawn.name && !entrants.iter().any(|x| x.name == p.model))
        .map(|p| format!("{} {}", p.model, said(&p.score, p.value, p.error, &p.tag)))
        .collect();
    if !others.is_empty() {
        let _ = writeln!(w, "\nPublished of models not trained here: {}.", others.join("; "));
    }
    let _ = writeln!(w);
}

fn said(score: &str, value: f64, error: Option<f64>, tag: &str) -> String {
    let error = error.map_or(String::new(), |e| format!(" ± {e:.3}"));
    let kind = if score == "pointwise" { String::new() } else { format!("{score} ") };
    format!("{kind}{}{error} [{tag}]", number(value))
}

/// Scores of task embeddings: a table of their own.
const APART: [&str; 3] = ["probe", "nmi", "ari"];

fn published(definition: &Definition, evaluation: &str, model: &str, apart: bool) -> String {
    let mut found = definition.published(evaluation, model);
    found.retain(|p| APART.contains(&p.score.as_str()) == apart);
    match found.is_empty() {
        true => "–".into(),
        false => {
            let words = found.iter().map(|p| said(&p.score, p.value, p.error, &p.tag));
            words.collect::<Vec<_>>().join(", ")
        }
    }
}

fn reference(definition: &Definition, evaluation: &str, kinds: &[&str]) -> String {
    let fits = |c: &&Ceiling| c.evaluation == evaluation && kinds.contains(&c.score.as_str());
    let found = definition.ceilings.iter().filter(fits);
    let words: Vec<String> =
        found.map(|c| said(&c.score, c.value, Some(c.error), &c.tag)).collect();
    if words.is_empty() { "–".into() } else { words.join(", ") }
}

/// A part of the tasks, by name.
type Part<'a> = (String, Box<dyn Fn(usize) -> bool + 'a>);

/// Pointwise scores by context size and by class.
fn breakdown(
    w: &mut String,
    definition: &Definition,
    drawn: &Drawn,
    e: usize,
    entrants: &[Entrant],
) {
    let fixed = &drawn.fixed;
    let bins = bins(fixed);
    let mut columns: Vec<Part> = Vec::new();
    for [low, high] in bins {
        let label =
            if low == high { format!("{low} sites") } else { format!("{low}–{high} sites") };
        columns.push((label, Box::new(move |i| (low..=high).contains(&fixed.facts[i].context))));
    }
    let mut classes: Vec<_> = fixed.facts.iter().filter_map(|f| f.class.clone()).collect();
    classes.sort();
    classes.dedup();
    for class in classes {
        let label = class.to_string();
        columns.push((label, Box::new(move |i| fixed.facts[i].class.as_ref() == Some(&class))));
    }
    let labels: Vec<&str> = columns.iter().map(|c| c.0.as_str()).collect();
    head(w, &[&["pointwise"], labels.as_slice()].concat());
    let mut line = |name: String, told: &dyn Fn(&str) -> String, value: &dyn Fn(usize) -> f64| {
        let cells = columns.iter().map(|(label, chosen)| {
            let found = with_error(mean(fixed, &**chosen, value));
            let told = told(label);
            if told == "–" { found } else { format!("{found} ({told})") }
        });
        row(w, &std::iter::once(name).chain(cells).collect::<Vec<_>>());
    };
    let mut floors: Vec<f64> = entrants.iter().map(|x| x.floor).chain([0.0]).collect();
    floors.sort_by(f64::total_cmp);
    floors.dedup();
    for floor in floors {
        let ceiling = fixed.ceiling(floor);
        if ceiling.iter().all(|c| c.is_nan()) {
            continue;
        }
        let (name, kind) = match floor {
            0.0 => ("*true process*".to_string(), "pointwise"),
            _ => (format!("*true process, sd ≥ {floor}*"), "floored"),
        };
        line(name, &|label| reference(definition, label, &[kind]), &|i| ceiling[i]);
    }
    for entrant in entrants {
        let told = |label: &str| published(definition, label, &entrant.name, false);
        line(entrant.name.clone(), &told, &|i| over_seeds(entrant, e, i, |s| s.pointwise));
    }
    let _ = writeln!(w);
}

/// How task embeddings tell classes apart, where models have one.
fn told_apart(
    w: &mut String,
    definition: &Definition,
    drawn: &Drawn,
    e: usize,
    entrants: &[Entrant],
) {
    let fixed = &drawn.fixed;
    let told: Vec<&Entrant> =
        entrants.iter().filter(|x| x.seeds.iter().any(|t| t.agreement[e].is_some())).collect();
    let Some((names, _)) = fixed.classes().filter(|_| !told.is_empty()) else { return };
    let bins = bins(fixed);
    let _ = writeln!(
        w,
        "Task embeddings: k-means with {} clusters against the classes, and the share of held-out tasks that a linear \
         probe puts right; chance {}, told by the true law: {}.\n",
        names.len(),
        number(1.0 / names.len() as f64),
        reference(definition, &drawn.name, &["probe"]),
    );
    let labels: Vec<String> = bins.iter().map(|[a, b]| format!("probe, {a}–{b} sites")).collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    head(
        w,
        &[&["model", "seed", "NMI", "ARI", "probe"], labels.as_slice(), &["published"]].concat(),
    );
    for entrant in told {
        for trained in &entrant.seeds {
            let Some(found) = &trained.agreement[e] else { continue };
            let right = |chosen: &dyn Fn(usize) -> bool| {
                with_error(mean(fixed, chosen, &|i| f64::from(found.right[i])))
            };
            let inside = bins
                .iter()
                .map(|[low, high]| right(&|i| (*low..=*high).contains(&fixed.facts[i].context)));
            let mut cells = vec![
                entrant.name.clone(),
                trained.card.seed.to_string(),
                number(found.nmi),
                number(found.ari),
                right(&|_| true),
            ];
            cells.extend(inside);
            cells.push(published(definition, &drawn.name, &entrant.name, true));
            row(w, &cells);
        }
    }
    let _ = writeln!(w);
}

/// One row per model, seed, evaluation and task.
pub fn write_scores(path: &Path, drawn: &[Drawn], entrants: &[Entrant]) -> Result<()> {
    let names = [
        "model",
        "evaluation",
        "class",
        "seed",
        "task",
        "context",
        "targets",
        "pointwise",
        "joint",
        "crps",
        "mse",
        "inside_95",
        "true_pointwise",
        "true_pointwise_floored",
        "true_joint",
        "floor",
    ];
    let names: Vec<String> = names.map(String::from).into();
    let mut chunks = Vec::new();
    for entrant in entrants {
        for trained in &entrant.seeds {
            for (drawn, scores) in drawn.iter().zip(&trained.scores) {
                let fixed = &drawn.fixed;
                let n = scores.len();
                let words = |word: &str| Column::Text(vec![word.to_string(); n]);
                let numbers = |f: &dyn Fn(usize) -> f64| Column::Numbers((0..n).map(f).collect());
                let class = |i: usize| {
                    fixed.facts[i].class.as_ref().map_or(String::new(), |c| c.to_string())
                };
                let exact = |part: fn(&Scores) -> f64| {
                    numbers(&|i| fixed.exact[i].as_ref().map_or(f64::NAN, part))
                };
                let ceiling = fixed.ceiling(entrant.floor);
                chunks.push(Ok(vec![
                    words(&entrant.name),
                    words(&drawn.name),
                    Column::Text((0..n).map(class).collect()),
                    numbers(&|_| trained.card.seed as f64),
                    numbers(&|i| i as f64),
                    numbers(&|i| fixed.facts[i].context as f64),
                    numbers(&|i| fixed.facts[i].targets as f64),
                    numbers(&|i| scores[i].pointwise),
                    numbers(&|i| scores[i].joint),
                    numbers(&|i| scores[i].crps),
                    numbers(&|i| scores[i].mse),
                    numbers(&|i| scores[i].inside[18]),
                    exact(|s| s.pointwise),
                    numbers(&|i| ceiling[i]),
                    exact(|s| s.joint),
                    numbers(&|_| entrant.floor),
                ]));
            }
        }
    }
    Columns::write(path, &names, chunks)
}
