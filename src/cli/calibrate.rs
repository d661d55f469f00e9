//! `isopleth calibrate`: does a model keep, on fresh surveys of its own prior, what it promises?

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use serde_json::{Map, Value, json};

use super::{note, say};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    train::calibration::{self, Figures, Group, Options, Ranks, Report},
};

/// Measure a model's intervals and scores on fresh simulated surveys, where the truth is known
#[derive(clap::Args)]
pub struct Args {
    /// Model by name or file
    model: String,
    /// Surveys to simulate from the model's own recipe
    #[arg(long, default_value_t = 2000, value_name = "N")]
    tasks: usize,
    /// Most sites in a survey: drawing one costs the cube of this
    #[arg(long, default_value_t = 1000, value_name = "N")]
    most_sites: usize,
    /// Seed of the surveys; none of them was met in training, whatever the seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write the report into the card of the model file
    #[arg(long)]
    record: bool,
}

/// Measures and prints.
///
/// # Errors
/// A model that cannot be opened, or too few tasks.
pub fn run(args: &Args) -> Result<()> {
    let file = Path::new(&args.model);
    let mut checkpoint = Checkpoint::resolve(&args.model)?;
    if args.record && !file.is_file() {
        return Err(Error::input("only a model file can keep its report")
            .fact("model", &args.model)
            .try_this("give the .safetensors file instead of the name of a shipped model"));
    }
    let options = Options { tasks: args.tasks, most_sites: args.most_sites, seed: args.seed };
    let (started, finished) = (Instant::now(), AtomicUsize::new(0));
    let report = calibration::measure(&checkpoint, &options, |tasks| {
        let now = finished.fetch_add(tasks, Ordering::Relaxed) + tasks;
        let tenth = |n: usize| 10 * n / args.tasks;
        if tenth(now) > tenth(now - tasks) && now < args.tasks {
            note(format!("{now} of {} tasks", args.tasks));
        }
    })?;
    let seconds = started.elapsed().as_secs_f64();
    if args.record {
        // Where the file lay is no part of what it is.
        let mut scores = object(args, &report, seconds);
        scores["model"] = json!(checkpoint.card.name);
        checkpoint.card.scores.insert("calibration".into(), scores);
        checkpoint.write(file)?;
    }
    if args.json { say(object(args, &report, seconds)) } else { table(args, &report, seconds) }
}

fn object(args: &Args, report: &Report, seconds: f64) -> Value {
    let mut object = json!(report.all);
    object["model"] = json!(args.model);
    object["seed"] = json!(args.seed);
    object["targets"] = json!(report.targets);
    object["thirds"] = json!(report.thirds);
    let rivals = report.rivals.iter().map(|rival| {
        let mut its = json!(rival.its);
        its["model_on_the_same_tasks"] = json!(rival.model);
        (rival.name.to_string(), its)
    });
    object["baselines"] = Value::Object(rivals.collect::<Map<_, _>>());
    object["ranks"] = json!({
        "surface": ranks(&report.surface),
        "observation": ranks(&report.observation),
    });
    if let Some([surface, observation]) = &report.exact {
        object["baselines"]["exact-gp"]["ranks"] =
            json!({ "surface": ranks(surface), "observation": ranks(observation) });
    }
    object["seconds"] = json!(seconds);
    object
}

/// Rounded, since a card is read by people.
fn ranks(ranks: &Ranks) -> Value {
    let three = |v: f64| (1e3 * v).round() / 1e3;
    json!({
        "bins": ranks.bins.map(three),
        "tasks": ranks.tasks,
        "chi_square": ranks.chi_square.map(three),
        "kolmogorov": [(1e5 * ranks.kolmogorov[0]).round() / 1e5, three(ranks.kolmogorov[1])],
    })
}

fn table(args: &Args, report: &Report, seconds: f64) -> Result<()> {
    say(format!(
        "{}: {} fresh tasks of its recipe, {} targets each, seed {}, {seconds:.0} s\n",
        args.model, report.all.tasks, report.targets, args.seed
    ))?;
    let columns = ["tasks", "log density", "50 %", "80 %", "95 %"];
    let [a, b, c, d, e] = columns;
    let head = |name: &str| say(format!("{name:<28}{a:>7}{b:>13}{c:>8}{d:>8}{e:>8}"));
    let line = |name: &str, tasks: usize, f: &Figures| {
        let [x, y, z] = [f.coverage.at_50, f.coverage.at_80, f.coverage.at_95];
        say(format!("{name:<28}{tasks:7}{:13.3}{x:8.3}{y:8.3}{z:8.3}", f.log_density))
    };
    type Part = fn(&Group) -> Option<Figures>;
    let parts: [(&str, Part); 2] =
        [("surface", |g| g.surface), ("new observation", |g| Some(g.observation))];
    for (name, figures) in parts {
        head(name)?;
        for (i, group) in [&report.all].into_iter().chain(&report.thirds).enumerate() {
            let [least, most] = group.context;
            let name = match i {
                0 => "  all".to_string(),
                _ => format!("  {least} to {most} sites"),
            };
            if let Some(figures) = figures(group) {
                line(&name, group.tasks, &figures)?;
            }
        }
        say("")?;
    }
    say(format!(
        "{:<28}{:>7}{:>13}{:>8}{:>17}{:>8}",
        "beside it, on the same tasks", "tasks", "its crps", "model", "its log density", "model"
    ))?;
    for rival in &report.rivals {
        let (its, model) = (&rival.its, &rival.model);
        say(format!(
            "  {:<26}{:7}{:13.4}{:8.4}{:17.3}{:8.3}",
            rival.name,
            its.tasks,
            its.crps,
            model.crps,
            its.observation.log_density,
            model.observation.log_density
        ))?;
        if let (Some(its), Some(model)) = (its.surface, model.surface) {
            let name = format!("  {}, surface", rival.name);
            say(format!("{name:<28}{:45.3}{:8.3}", its.log_density, model.log_density))?;
        }
    }
    say("")?;
    for (name, ranks) in [("surface", &report.surface), ("observation", &report.observation)] {
        say(format!("rank of the true {name} in its law, 1 = as often as promised"))?;
        let bins: Vec<String> = ranks.bins.iter().map(|b| format!("{b:.2}")).collect();
        say(format!("  0   {}", bins[..10].join(" ")))?;
        say(format!("  ½   {}", bins[10..].join(" ")))?;
        say(format!(
            "  one target of each of {} tasks: χ² {:.1}, p {:.3}; Kolmogorov-Smirnov {:.4}, p {:.3}",
            ranks.tasks,
            ranks.chi_square[0],
            ranks.chi_square[1],
            ranks.kolmogorov[0],
            ranks.kolmogorov[1]
        ))?;
    }
    say(format!(
        "\nlog density: nats per target, link scale, higher is better; crps: of a new observation, \
         outcome\nunits, lower is better; exact-gp: told the true hyperparameters, {} sites at most",
        calibration::EXACT_SITES
    ))
}
