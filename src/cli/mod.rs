//! The command line: one subcommand, one file. Each says what was typed (`Args`) and what it means (`run`).

use std::{
    fmt::Display,
    io::{ErrorKind, Write},
};

use crate::error::{Error, Result};

pub mod areas;
pub mod bench;
pub mod benchmark;
pub mod calibrate;
pub mod cards;
pub mod covariates;
mod draws;
mod environment;
pub mod inspect;
pub mod list;
pub mod map;
mod output;
pub mod plan;
pub mod predict;
pub mod reading;
mod report;
pub mod sample;
pub mod survey;
pub mod times;
pub mod train;
pub mod trust;
pub mod validate;
pub mod windows;

/// Map prevalence, and how sure to be of it, from a table of survey sites
#[derive(clap::Parser)]
#[command(name = "isopleth", version, about, after_help = FIRST_STEPS, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const FIRST_STEPS: &str = "\
First steps:
  isopleth map --surveys survey.csv --resolution 5km --out out
  isopleth areas --map out --areas districts.gpkg --population pop.tif --out districts.csv
  isopleth validate --surveys survey.csv --folds 10
  isopleth list models";

/// Every subcommand, in the order of a first week. To add one: its file, and three lines here.
#[derive(clap::Subcommand)]
enum Command {
    Map(Box<map::Args>),
    Areas(Box<areas::Args>),
    Predict(Box<predict::Args>),
    Validate(Box<validate::Args>),
    Plan(Box<plan::Args>),
    Trust(Box<trust::Args>),
    Sample(sample::Args),
    Train(train::Args),
    Calibrate(calibrate::Args),
    Inspect(inspect::Args),
    Bench(Box<bench::Args>),
    Benchmark(benchmark::Args),
    List(list::Args),
}

/// Runs what was typed.
///
/// # Errors
/// Whatever the subcommand returns.
pub fn run(cli: Cli) -> Result<()> {
    match &cli.command {
        Command::Map(args) => map::run(args),
        Command::Areas(args) => areas::run(args),
        Command::Predict(args) => predict::run(args),
        Command::Validate(args) => validate::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Trust(args) => trust::run(args),
        Command::Sample(args) => sample::run(args),
        Command::Train(args) => train::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Benchmark(args) => benchmark::run(args),
        Command::List(args) => list::run(args),
    }
}

/// One line to standard output. Commands use this and not `println!`, which panics when the reader
/// has gone (`| head`): nobody listens then, and the work goes on.
///
/// # Errors
/// [`Error::Io`] if the line could not be written for another reason: the disk behind a redirect
/// is full.
pub fn say(line: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(source) if source.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io("write to", "standard output".as_ref(), source))
        }
        _ => Ok(()),
    }
}

/// One line of news (progress, guesses, warnings) to standard error. News that nobody hears stops no work.
pub fn note(line: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
