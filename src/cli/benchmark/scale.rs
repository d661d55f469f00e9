//! `isopleth benchmark scale`: processes on up to 100,000 simulated sites, beside the floor.

use std::path::PathBuf;

use crate::{
    benchmark::scale::{self, CASES, Options, PROCESSES},
    cli::{note, say},
    error::{Error, Result},
    registry::Named,
};

/// Score processes on 100 to 100,000 simulated sites beside the process that made them
///
/// Nothing is trained here. Every case is a simulated surface with its sites, and the truth at its targets;
/// the floor is the nearest-neighbour Gaussian process that is told kernel, nugget and trend.
#[derive(clap::Args)]
pub struct Args {
    /// Cases, by the names that --list gives; all of them when left out
    #[arg(long = "case", value_name = "NAME,…", value_delimiter = ',')]
    cases: Vec<String>,
    /// Processes: `vecchia`, `gp`, `shipped` (the shipped model for the outcome), others that --list gives, a
    /// shipped model by name, or a model file
    #[arg(
        long,
        value_name = "NAME|FILE,…",
        value_delimiter = ',',
        default_value = "vecchia,gp,shipped"
    )]
    models: Vec<String>,
    /// Surfaces of each case and size, with seeds 1, 2, …
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Context sizes instead of the cases' own, such as 1000,10000
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    sites: Vec<usize>,
    /// Ask every process about up to so many sites; left out, each up to what it is meant for
    #[arg(long, value_name = "SITES")]
    most: Option<usize>,
    /// Folder for table.md, scores (.csv, .parquet, .json) and pictures [default: out/benchmark/scale]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Say which cases and processes there are
    #[arg(long)]
    list: bool,
}

/// Runs the command.
///
/// # Errors
/// Those of [`scale::run`].
pub fn run(args: &Args) -> Result<()> {
    if args.list {
        return list();
    }
    if let Some(few) = args.sites.iter().find(|n| **n < 20) {
        return Err(Error::input("a case needs twenty sites at the least")
            .fact("--sites", few)
            .try_this("for example --sites 1000,10000"));
    }
    let out = args.out.clone().unwrap_or_else(scale::usual_folder);
    let options = Options {
        cases: args.cases.clone(),
        models: args.models.clone(),
        seeds: args.seeds,
        sites: args.sites.clone(),
        most: args.most,
        out: out.clone(),
    };
    let table = scale::run(&options, &note)?;
    say(table.trim_end())?;
    note(format!("table, scores and pictures: {}", out.display()));
    Ok(())
}

fn list() -> Result<()> {
    let lines = |title: &str, entries: Vec<[&str; 2]>| -> Result<()> {
        let wide = entries.iter().map(|e| e[0].len()).max().unwrap_or(0);
        say(title)?;
        entries.iter().try_for_each(|[name, about]| say(format!("  {name:wide$}  {about}")))
    };
    lines("Cases:", CASES.iter().map(|e| [e.name(), e.about()]).collect())?;
    lines("\nProcesses:", PROCESSES.iter().map(|e| [e.name(), e.about()]).collect())
}
