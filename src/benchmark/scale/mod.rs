//! Right at a hundred thousand sites, or only fast? Processes beside the floor on simulated cases,
//! where the truth is known: registry [`CASES`] of cases, registry [`PROCESSES`] of processes.
//!
//! The floor is the nearest-neighbour Gaussian process with the parameters that made the case, which
//! nobody else is told. It is asked only about the targets that are scored.
//!
//! **To add a process:** one line in `process.rs`. Its constructor sees the context in model units
//! (sites in [−1, 1], values standardised) and returns whatever answers `condition` and `at`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{
    error::{Error, Result},
    mapping::machine,
    predictive::Of,
    process::Posterior,
    sites::Observations,
    whole,
};

mod case;
mod drawn;
mod process;
mod report;
mod score;

pub use case::CASES;
use case::Case;
use drawn::{Drawn, Floor, Frame};
pub use process::PROCESSES;
use process::{Contender, Ready};
use score::{Cost, Scores};

/// What the floor is called.
pub const FLOOR: &str = "floor";
/// Nodes along the longer side of what pictures show of a posterior.
const NODES: usize = 120;

/// What the caller asks for.
#[derive(Debug)]
pub struct Options {
    /// Cases by name; all when empty.
    pub cases: Vec<String>,
    /// Processes by name.
    pub models: Vec<String>,
    /// Seeds 1 … this, each a surface of its own.
    pub seeds: u64,
    /// Context sizes, instead of the cases'.
    pub sites: Vec<usize>,
    /// The most sites that any process is asked about, instead of each one's own.
    pub most: Option<usize>,
    /// Folder for scores, table and pictures.
    pub out: PathBuf,
}

/// One process on one drawn case.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// The case.
    pub case: &'static str,
    /// Context sites.
    pub sites: usize,
    /// Targets asked, and those of them that were scored.
    pub targets: usize,
    /// Targets scored.
    pub scored: usize,
    /// The process.
    pub process: String,
    /// Seed of the case.
    pub seed: u64,
    /// Its scores; none where it refused.
    pub scores: Option<Scores>,
    /// Why it refused.
    pub refused: Option<String>,
    /// Learning from the context before it is conditioned on it.
    pub fit: Cost,
    /// Conditioning.
    pub condition: Cost,
    /// Predicting all targets.
    pub predict: Cost,
    /// The most memory held meanwhile, what the case itself takes included, MiB.
    pub peak_mib: Option<f64>,
}

/// Scores what `options` asks for and writes it down. Returns the Markdown tables. `tell` hears of
/// progress.
///
/// # Errors
/// [`Error::Input`] for a case or process that is not listed; [`Error::Io`] for a folder that cannot be
/// written to; and those of drawing cases. A process that refuses a case is in the table.
pub fn run(options: &Options, tell: &dyn Fn(String)) -> Result<String> {
    let named = |name: &String| {
        let case = CASES.iter().find(|case| case.name == name);
        case.ok_or_else(|| process::unknown("case", name, CASES.iter().map(|case| case.name)))
    };
    let cases: Vec<&case::Entry> = match options.cases.is_empty() {
        true => CASES.iter().collect(),
        false => options.cases.iter().map(named).collect::<Result<_>>()?,
    };
    let contenders =
        options.models.iter().map(|m| Contender::resolve(m)).collect::<Result<Vec<_>>>()?;
    let out = &options.out;
    std::fs::create_dir_all(out).map_err(|e| Error::io("make the folder", out, e))?;
    let mut runs = Vec::new();
    for entry in cases {
        let case = Case::of(entry)?;
        let sizes = if options.sites.is_empty() { &case.contexts } else { &options.sites };
        for (i, size) in sizes.iter().enumerate() {
            for seed in 1..=options.seeds.max(1) {
                let drawn = Drawn::new(&case, *size, seed)?;
                let (sites, targets) = (drawn.xy.len(), drawn.asked.len());
                tell(format!("{} (seed {seed}): {sites} sites, {targets} targets", entry.name));
                let round = Round { name: entry.name, case: &case, drawn, seed };
                let pictured = seed == 1 && i + 1 == sizes.len();
                let picture = pictured.then(|| out.join(format!("{}.png", entry.name)));
                runs.extend(round.play(&contenders, options.most, picture.as_deref(), tell)?);
            }
            // What was measured so far survives whatever comes next.
            report::write(out, &runs)?;
        }
    }
    let markdown = report::markdown(&runs);
    whole::write_bytes(&out.join("table.md"), markdown.as_bytes())?;
    report::sizes(&out.join("sizes.png"), &runs)?;
    Ok(markdown)
}

/// One drawn case.
struct Round<'a> {
    name: &'static str,
    case: &'a Case,
    drawn: Drawn,
    seed: u64,
}

impl Round<'_> {
    /// Everybody on it, the floor first.
    fn play(
        &self,
        contenders: &[Contender],
        most: Option<usize>,
        picture: Option<&Path>,
        tell: &dyn Fn(String),
    ) -> Result<Vec<Run>> {
        let (drawn, likelihood) = (&self.drawn, self.case.likelihood()?);
        let mut shown = Vec::new();
        let mut one = |name: &str,
                       frame: &Frame,
                       context: &Observations,
                       fit: &dyn Fn() -> Result<Ready>|
         -> Result<Run> {
            let (run, means) = self.ask(name, frame, context, fit, picture.is_some());
            shown.extend(means.map(|means| (name.to_string(), means)));
            tell(report::line(&run));
            Ok(run)
        };
        let plain = Frame::plain();
        let floor = || Ok(Box::new(Floor::new(self.case, likelihood)?) as Ready);
        let mut runs = vec![one(FLOOR, &plain, &drawn.context(&plain)?, &floor)?];
        let frame = drawn.frame()?;
        let context = drawn.context(&frame)?;
        for contender in contenders {
            let (name, most) = (contender.name(), most.unwrap_or_else(|| contender.most()));
            if drawn.xy.len() > most {
                tell(format!("  {name}: left out beyond {most} sites (--most)"));
            } else if !contender.reads(likelihood)? {
                tell(format!("  {name}: left out, it does not read this outcome"));
            } else {
                let fit = || contender.fit(&context, likelihood);
                runs.push(one(name, &frame, &context, &fit)?);
            }
        }
        if let Some(path) = picture {
            report::case(path, self.name, self.case, drawn, &shown)?;
        }
        Ok(runs)
    }

    /// One process on it: fitted, conditioned, asked; and what it says of the whole region, if wanted.
    fn ask(
        &self,
        name: &str,
        frame: &Frame,
        context: &Observations,
        fit: &dyn Fn() -> Result<Ready>,
        pictured: bool,
    ) -> (Run, Option<Means>) {
        let drawn = &self.drawn;
        let mut run = Run {
            case: self.name,
            sites: drawn.xy.len(),
            targets: drawn.asked.len(),
            scored: drawn.truths.len(),
            process: name.to_string(),
            seed: self.seed,
            scores: None,
            refused: None,
            fit: Cost::default(),
            condition: Cost::default(),
            predict: Cost::default(),
            peak_mib: None,
        };
        machine::forget_peak();
        let mut whole = || -> Result<(Scores, Option<Means>)> {
            let process = run.fit.add(fit)?;
            let posterior = run.condition.add(|| process.condition(context))?;
            let scores = score::ask(&*posterior, drawn, frame, name != FLOOR, &mut run.predict)?;
            run.peak_mib = machine::peak_rss_mib();
            let means = pictured.then(|| means(&*posterior, drawn, frame)).transpose()?;
            Ok((scores, means))
        };
        let met = whole();
        match met {
            Ok((scores, means)) => {
                run.scores = Some(scores);
                (run, means)
            }
            Err(error) => {
                run.refused = Some(error.to_string());
                (run, None)
            }
        }
    }
}

/// What a posterior says of the surface over the region, outcome units: values `[row][column]`, and
/// columns and rows.
type Means = (Vec<f64>, [usize; 2]);

fn means(posterior: &dyn Posterior, drawn: &Drawn, frame: &Frame) -> Result<Means> {
    let longer = drawn.half[0].max(drawn.half[1]);
    let [cols, rows] =
        drawn.half.map(|half| ((half / longer * NODES as f64).round() as usize).max(2));
    let at = |i: usize, n: usize| 2.0 * i as f64 / (n - 1) as f64 - 1.0;
    let places: Vec<[f64; 2]> = (0..cols * rows)
        .map(|i| [drawn.half[0] * at(i % cols, cols), drawn.half[1] * at(i / cols, rows)])
        .collect();
    let [mean, sd] = frame.level;
    let marginals = posterior.at(&frame.sites(&places)?)?.marginals(0, Of::Surface)?;
    Ok((marginals.rescale(mean, sd).map(|m, i| m.mean_sd(i).0), [cols, rows]))
}

/// The folder that is written to unless told otherwise.
pub fn usual_folder() -> PathBuf {
    Path::new("out").join("benchmark").join("scale")
}

#[cfg(test)]
mod tests;
