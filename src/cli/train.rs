//! `isopleth train`: train a recipe and write the best weights by validation.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
};

use super::{covariates::about_covariates, environment::for_training, note};
use crate::{
    device,
    error::{Error, Result},
    recipe::Recipe,
    train::{self, Options, Progress},
};

/// Train a model on surfaces drawn from a recipe's prior
#[derive(clap::Args)]
pub struct Args {
    /// Recipe (.toml): model, prior, design, training
    recipe: PathBuf,
    /// Model file to write (.safetensors); state and journal stand beside it
    #[arg(long)]
    out: PathBuf,
    /// Continue from the state beside --out
    #[arg(long)]
    resume: bool,
    /// Steps in all, instead of the recipe's
    #[arg(long)]
    steps: Option<u64>,
    /// Stop at this step for now; --resume goes on from there
    #[arg(long)]
    stop_at: Option<u64>,
    /// Start from the weights of this model where names and shapes agree. One that knew no covariates
    /// gets weights of 0 for those of the recipe
    #[arg(long)]
    start: Option<PathBuf>,
    /// cpu, cuda, cuda:N, or several cards that share each batch: cuda:0,1 or cuda:all
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Threads that draw tasks; 0 for one on the CPU, all but one beside GPUs. Changes no result
    #[arg(long, default_value_t = 0)]
    drawing: usize,
    /// Seed of weights and tasks
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Replace a model file that exists
    #[arg(long)]
    force: bool,
}

/// Runs the command.
///
/// # Errors
/// [`Error::Input`] for a bad recipe, or an existing model without --force or --resume.
pub fn run(args: &Args) -> Result<()> {
    let recipe = Recipe::read(&args.recipe)?;
    if args.out.extension().is_none_or(|e| e != "safetensors") {
        return Err(Error::input("the model file must end in .safetensors")
            .fact("out", args.out.display())
            .try_this("for example --out models/mine.safetensors"));
    }
    if args.out.exists() && !args.resume && !args.force {
        return Err(Error::input("the model file exists")
            .fact("out", args.out.display())
            .try_this("--resume goes on training it, --force replaces it"));
    }
    if args.stop_at == Some(0) || args.steps == Some(0) {
        return Err(Error::input("a training of no steps writes no model")
            .try_this("give --steps and --stop-at 1 or more"));
    }
    if args.device == "cpu" {
        for_training()?;
    }
    about_covariates(&recipe, &args.recipe).into_iter().for_each(note);
    if std::io::stderr().is_terminal() {
        note("drawing held-out surveys, and asking the exact GP about them");
    }
    let devices = device::open_all(&args.device)?;
    let options = Options {
        out: args.out.clone(),
        resume: args.resume,
        steps: args.steps,
        stop_at: args.stop_at,
        seed: args.seed,
        drawing: args.drawing,
        machine: device::describe_all(&devices),
        devices,
        start: args.start.clone(),
        until: None,
        threads: None,
    };
    let card = train::run(&recipe, &options, show)?;
    note(format!(
        "{}: {} parameters, {} steps, best at {} with validation loss {:.4} (exact GP {:.4})",
        args.out.display(),
        card.parameters,
        card.steps,
        card.best_step,
        card.validation.unwrap_or(f64::NAN),
        card.exact_gp.unwrap_or(f64::NAN),
    ));
    Ok(())
}

fn show(p: &Progress) {
    let left = p.seconds_left as u64;
    let mut line = format!(
        "step {:>7}/{}  loss {:.4}  {:.1} steps/s  {}:{:02}:{:02} left",
        p.step,
        p.steps,
        p.loss,
        p.steps_per_s,
        left / 3600,
        left / 60 % 60,
        left % 60
    );
    let watched = std::io::stderr().is_terminal();
    let erase = if watched { "\r\x1b[K" } else { "" };
    // Milestones stay; between them one line changes in place, and only where somebody watches.
    if let (Some(validation), Some(gap)) = (p.validation, p.gap) {
        line += &format!("  validation {validation:.4}, {gap:+.4} to the exact GP");
        note(format!("{erase}{line}"));
    } else if watched {
        // News that nobody hears stops no work.
        let _ = write!(std::io::stderr().lock(), "{erase}{line}");
    }
}
