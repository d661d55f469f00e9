//! The command line: one subcommand, one file. Each says what was typed (`Args`) and what it means (`run`).

use std::{fmt::Display, io::Write};

use crate::error::{Error, Result};

pub mod list;
pub mod map;
pub mod survey;
pub mod train;

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
  isopleth validate --surveys survey.csv --folds 10
  isopleth list models";

/// Every subcommand, in the order of a first week. To add one: its file, and three lines here.
#[derive(clap::Subcommand)]
enum Command {
    Map(Box<map::Args>),
    Train(train::Args),
    List(list::Args),
}

/// Runs what was typed.
///
/// # Errors
/// Whatever the subcommand returns; a closed standard output comes back as
/// [`std::io::ErrorKind::BrokenPipe`] in [`Error::Io`].
pub fn run(cli: Cli) -> Result<()> {
    match &cli.command {
        Command::Map(args) => map::run(args),
        Command::Train(args) => train::run(args),
        Command::List(args) => list::run(args),
    }
}

/// One line to standard output. Commands use this and not `println!`, which panics when the reader
/// has gone (`| head`) and when the disk behind a redirect is full.
///
/// # Errors
/// [`Error::Io`] if standard output is closed or full.
pub fn say(line: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|source| Error::io("write to", "standard output".as_ref(), source))
}

/// One line of news (progress, guesses, warnings) to standard error. News that nobody hears stops no work.
pub fn note(line: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
