//! `isopleth benchmark`: train models on a published protocol, and score them beside the truth.

use std::{path::PathBuf, time::Duration};

use super::{environment::for_training, note, say};
use crate::{
    benchmark::{self, Options, TASKS},
    device,
    error::{Error, Result},
    registry::{self, Named},
};

mod scale;

/// Train models on a published protocol and score them by the truth (for speed: `bench`)
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    of: Option<Of>,
    /// Task; the list of them when left out
    task: Option<String>,
    /// Models, by the names in the list; those of the task when left out
    #[arg(long, value_delimiter = ',')]
    models: Vec<String>,
    /// Trainings of each model, with seeds 1, 2, …
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Steps of each training, instead of the protocol's
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Wall time for all trainings together: 90s, 10m, 2h
    #[arg(long, value_parser = duration)]
    budget: Option<Duration>,
    /// Go on with what the folder holds: finished trainings are kept, unfinished ones go on
    #[arg(long)]
    resume: bool,
    /// Folder for weights, scores, tables and pictures [default: out/benchmark/TASK]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Evaluation tasks, instead of the protocol's
    #[arg(long)]
    tasks: Option<usize>,
    /// Trainings side by side; never changes a result
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    jobs: u64,
    /// Least standard deviation of every head, instead of the protocol's
    #[arg(long)]
    floor: Option<f64>,
    /// Also score the exact process that is not told the kernel, integrated over so many draws from
    /// the prior: what a model could reach at best. Try 1000; minutes, by cubes of the context
    #[arg(long, value_name = "DRAWS", value_parser = clap::value_parser!(u32).range(1..))]
    integrated: Option<u32>,
}

/// Benchmarks that train nothing.
#[derive(clap::Subcommand)]
enum Of {
    Scale(scale::Args),
}

/// `90s`, `10m`, `1.5h`.
fn duration(text: &str) -> std::result::Result<Duration, String> {
    let wrong = || "write a number and s, m or h: 10m".to_string();
    let (number, unit) = text.split_at(text.len().saturating_sub(1));
    let unit = match unit {
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * unit).map_err(|_| wrong())
}

/// Runs the command.
///
/// # Errors
/// [`Error::Unknown`] for a task or model that is not listed, and those of [`benchmark::run`].
pub fn run(args: &Args) -> Result<()> {
    if let Some(Of::Scale(args)) = &args.of {
        return scale::run(args);
    }
    let Some(name) = &args.task else { return list() };
    let task = registry::find("benchmark", TASKS, name)?;
    if args.floor.is_some_and(|f| !(0.0..1.0).contains(&f)) {
        return Err(Error::input("--floor must lie in [0, 1)").try_this("for example --floor 0.1"));
    }
    for_training()?;
    let options = Options {
        task,
        models: args.models.clone(),
        seeds: args.seeds,
        steps: args.steps,
        budget: args.budget,
        resume: args.resume,
        out: args.out.clone().unwrap_or_else(|| benchmark::usual_folder(task)),
        tasks: args.tasks,
        jobs: args.jobs as usize,
        floor: args.floor,
        integrated: args.integrated.map(|n| n as usize),
        machine: device::describe(),
    };
    let table = benchmark::run(&options, &note)?;
    say(table.trim_end())?;
    note(format!("table, scores and pictures: {}", options.out.display()));
    Ok(())
}

fn list() -> Result<()> {
    let width = |names: &mut dyn Iterator<Item = usize>| names.max().unwrap_or(0);
    let wide = width(&mut TASKS.iter().map(|t| t.name.len()));
    say("Tasks:")?;
    for task in TASKS {
        say(format!("  {:wide$}  {}", task.name, task.about()))?;
    }
    let models = benchmark::models()?;
    let wide = width(&mut models.keys().map(String::len));
    say("\nModels:")?;
    for (name, model) in &models {
        say(format!("  {name:wide$}  {}", model.about))?;
    }
    say("\nUp to 100,000 sites, with nothing trained: isopleth benchmark scale --list")
}
