//! `isopleth sample`: look at the surfaces and surveys that a recipe's prior believes in.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{covariates::about_covariates, map::round, say};
use crate::{
    error::{Error, Result},
    geo::table::{Column, Columns},
    kernel::Kernel,
    likelihood::Kind,
    picture::panels::{self, Dot, Panel, View},
    predictive::Link,
    recipe::Recipe,
    rng::Stream,
    task::{Draw, Tasks, design::Layout},
};

/// Look at the surfaces and surveys that a recipe's prior believes in
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Recipe (.toml): prior, design, trials
    recipe: PathBuf,
    /// A picture of each draw (.png), or every site of each draw (.parquet, .csv)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Seed of the draws
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many to draw
    #[arg(long, default_value_t = 12)]
    count: usize,
    /// Sites in each survey, instead of the recipe's law
    #[arg(long, value_name = "N")]
    sites: Option<usize>,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
}

/// Nodes along the longer side of a drawn surface.
const LATTICE: usize = 48;
/// Nodes along a drawn curve.
const LINE: usize = 400;
/// Times at which a surface that changes is shown, and nodes then: fewer, for all are drawn together.
const TIMES: [f64; 4] = [-1.0, 0.0, 1.0, 1.5];
const COARSE: usize = 20;
/// Most surfaces on one sheet.
const PANELS: usize = 48;

/// Draws, and writes what was drawn.
///
/// # Errors
/// [`Error::Input`] for a bad recipe, an unknown kind of file, or one that exists without --force.
pub fn run(args: &Args) -> Result<()> {
    let recipe = Recipe::read(&args.recipe)?;
    let tasks = recipe.tasks().map_err(|e| e.fact("recipe", args.recipe.display()))?;
    let picture = match args.out.extension().and_then(|e| e.to_str()) {
        Some("png") => true,
        Some("parquet" | "csv") => false,
        _ => {
            return Err(Error::input("draws are written as .png, .parquet or .csv")
                .fact("out", args.out.display())
                .try_this("for example --out draws.png"));
        }
    };
    refuse_existing(&args.out, args.force)?;
    let most = match (picture, tasks.design().has_times()) {
        (true, true) => PANELS / TIMES.len(),
        (true, false) => PANELS,
        (false, _) => usize::MAX,
    };
    if args.count == 0 || args.count > most {
        return Err(Error::input("that many draws cannot be shown")
            .fact("count", args.count)
            .try_this(format!("a picture holds 1 to {}, a table any number", most.min(PANELS))));
    }
    let pool = tasks.design().pool;
    if args.sites.is_some_and(|n| n < 2 || (pool > 0 && n > pool)) {
        let most = if pool > 0 { format!(" and at most {pool}") } else { String::new() };
        return Err(Error::input("a survey of that many sites cannot be drawn")
            .fact("sites", args.sites.unwrap_or(0))
            .try_this(format!("give at least 2{most}")));
    }
    match picture {
        true => draw_sheet(args, &tasks)?,
        false => write_table(args, &tasks)?,
    }
    about_covariates(&recipe, &args.recipe).into_iter().try_for_each(say)?;
    say(format!("{}: {} draws, seed {}", args.out.display(), args.count, args.seed))
}

/// A file that may not be replaced.
pub(super) fn refuse_existing(out: &Path, force: bool) -> Result<()> {
    match out.exists() && !force {
        false => Ok(()),
        true => Err(Error::input("the output file exists")
            .fact("out", out.display())
            .try_this("choose another --out, or replace the file with --force")),
    }
}

/// The stream of draw `index`, and how many sites its survey has.
fn begin(args: &Args, tasks: &Tasks, index: usize) -> (Stream, usize) {
    let mut rng = Stream::new(args.seed, "sample", index as u64);
    let sites = args.sites.unwrap_or_else(|| tasks.design().size(&mut rng));
    (rng, sites)
}

/// One row per site. Each draw is a chunk.
fn write_table(args: &Args, tasks: &Tasks) -> Result<()> {
    let mut names = vec!["task", "role", "x", "y"];
    names.extend(tasks.design().has_times().then_some("t"));
    names.extend(["surface", "noisy"]);
    names.extend(match tasks.likelihood().kind() {
        Kind::Tested | Kind::Single => vec!["positive", "tested"],
        Kind::Exposure => vec!["cases", "exposure"],
        Kind::Value | Kind::Positive => vec!["value"],
    });
    let mut names: Vec<String> = names.into_iter().map(String::from).collect();
    let specs = tasks.effects().map_or(&[][..], |effects| effects.specs());
    names.extend(specs.iter().map(|spec| spec.name.clone()));
    let chunks = (0..args.count).map(|index| {
        let (mut rng, sites) = begin(args, tasks, index);
        let draw = tasks.draws(sites, 1, &mut rng)?.remove(0);
        let role = |i: usize| match (i < draw.context, i >= draw.first_target) {
            (true, false) => "context",
            (true, true) => "both",
            _ => "target",
        };
        let n = draw.xy.len();
        let mut columns = vec![
            Column::Numbers(vec![index as f64; n]),
            Column::Text((0..n).map(|i| role(i).to_string()).collect()),
            Column::Numbers(draw.xy.iter().map(|p| p[0]).collect()),
            Column::Numbers(draw.xy.iter().map(|p| p[1]).collect()),
        ];
        columns.extend((!draw.t.is_empty()).then_some(Column::Numbers(draw.t)));
        columns.extend([draw.latent, draw.noisy, draw.y].map(Column::Numbers));
        columns.extend(draw.trials.map(Column::Numbers));
        let covariates = draw.covariates.into_iter().flat_map(|seen| seen.values);
        columns.extend(covariates.map(Column::Numbers));
        Ok(columns)
    });
    Columns::write(&args.out, &names, chunks)
}

fn draw_sheet(args: &Args, tasks: &Tasks) -> Result<()> {
    let panels: Vec<Vec<Panel>> =
        (0..args.count).into_par_iter().map(|i| panels(args, tasks, i)).collect::<Result<_>>()?;
    let panels = panels.concat();
    let title = format!("Draws from the prior of {}", args.recipe.display());
    let (kind, outcome, scale, dots) = match tasks.likelihood().link() {
        Link::Logit => {
            ("Prevalence", "prevalence", "logit scale", ", larger where more were tested")
        }
        Link::Log if tasks.likelihood().counts() => {
            ("Rate", "rate", "log scale", ", larger where the exposure is larger")
        }
        Link::Log => ("Positive", "value", "log scale", ""),
        Link::Identity => ("Continuous", "value", "units of the value", ""),
    };
    let how = if tasks.dim() == 1 { "at the height of" } else { "coloured by" };
    let first = format!("{kind} surfaces, and survey sites {how} observed {outcome}{dots}");
    let second = format!(
        "Range: where correlation has fallen to 0.05, the region's longer half-side being {}. \
         Sd of the surface and of the nugget: {scale}. Seed {}",
        round(tasks.design().half_side),
        args.seed
    );
    panels::save(&title, [&first, &second], &panels, &args.out)
}

/// One survey, with its surface drawn jointly on a lattice over the places that it asks about; at several
/// times, each with the sites visited nearest to it, where it changes.
fn panels(args: &Args, tasks: &Tasks, index: usize) -> Result<Vec<Panel>> {
    let (mut rng, sites) = begin(args, tasks, index);
    let layout = tasks.design().layout(sites, &mut rng);
    let (low, high) = bounds(&layout.xy, tasks.dim());
    let mut xy = layout.xy[..layout.context].to_vec();
    let timed = tasks.design().has_times();
    let (view, lattice) = lattice(low, high, tasks.dim(), if timed { COARSE } else { LATTICE });
    let nodes = lattice.len();
    let mut t = Vec::new();
    if timed {
        t.extend(&layout.t[..layout.context]);
        for time in TIMES {
            xy.extend(&lattice);
            t.extend(vec![time; nodes]);
        }
    } else {
        xy.extend(lattice);
    }
    let joint = Layout { xy, t, context: sites, first_target: sites };
    let draw = tasks.draws_at(&joint, 1, &mut rng)?.remove(0);
    let link = tasks.likelihood().link();
    let dot = |i: usize| {
        let tested = draw.trials.as_ref().map(|n| n[i]);
        Dot {
            at: draw.xy[i],
            value: draw.y[i] / tested.unwrap_or(1.0),
            weight: tested.map_or(0.3, |n| (n.ln() / 1000f64.ln()).clamp(0.0, 1.0)),
        }
    };
    let shown = if timed { TIMES.len() } else { 1 };
    let nearest = |t: f64| {
        let gap = |k: &usize| (TIMES[*k] - t).abs();
        (0..TIMES.len()).min_by(|a, b| gap(a).total_cmp(&gap(b)))
    };
    let one = |k: usize| {
        let own = |i: &usize| !timed || nearest(draw.t[*i]) == Some(k);
        let surface = &draw.latent[draw.context + k * nodes..][..nodes];
        let [first, second] = caption(&draw, link, tasks.dim());
        // What rules a draw stands above its maps, one thing above each.
        let change = draw.rule.kernel.as_ref().and_then(|kernel| kernel.change());
        let caption = match (timed, k, change) {
            (false, ..) => [first, second],
            (true, 0, _) => [format!("t = {}: {first}", TIMES[k]), second],
            (true, 1, Some(c)) => {
                let scale = format!("length scale in time {}", round(c.time_scale));
                [format!("t = {}", TIMES[k]), scale]
            }
            (true, 2, Some(c)) => {
                let share = format!("{:.0} % of the variance stays", 100.0 * c.static_share);
                [format!("t = {}", TIMES[k]), share]
            }
            (true, ..) => [format!("t = {}", TIMES[k]), String::new()],
        };
        Panel {
            caption,
            view: view.clone(),
            values: surface.iter().map(|v| link.outcome(*v)).collect(),
            low,
            high,
            dots: (0..draw.context).filter(own).map(dot).collect(),
        }
    };
    Ok((0..shown).map(one).collect())
}

/// The box of all sites, a little wider, and never so thin that nothing can be seen.
fn bounds(xy: &[[f64; 2]], dim: usize) -> ([f64; 2], [f64; 2]) {
    let mut low = [f64::INFINITY; 2];
    let mut high = [f64::NEG_INFINITY; 2];
    for p in xy {
        for d in 0..2 {
            low[d] = low[d].min(p[d]);
            high[d] = high[d].max(p[d]);
        }
    }
    let side = (high[0] - low[0]).max(high[1] - low[1]).max(f64::MIN_POSITIVE);
    for d in 0..dim {
        let missing = (0.2 * side - (high[d] - low[d])).max(0.0);
        let room = 0.5 * missing + 0.02 * side;
        (low[d], high[d]) = (low[d] - room, high[d] + room);
    }
    (low, high)
}

/// Nodes over a box, row by row from its lower left corner.
fn lattice(low: [f64; 2], high: [f64; 2], dim: usize, side: usize) -> (View, Vec<[f64; 2]>) {
    let along =
        |d: usize, i: usize, n: usize| low[d] + (high[d] - low[d]) * i as f64 / (n - 1) as f64;
    if dim == 1 {
        return (View::Curve, (0..LINE).map(|i| [along(0, i, LINE), 0.0]).collect());
    }
    let extent = [high[0] - low[0], high[1] - low[1]];
    let longer = extent[0].max(extent[1]);
    let [cols, rows] = extent.map(|v| ((side as f64 * v / longer).round() as usize).max(2));
    let nodes =
        (0..rows * cols).map(|i| [along(0, i % cols, cols), along(1, i / cols, rows)]).collect();
    (View::Surface { rows, cols }, nodes)
}

/// What was drawn: sites and tested, then what ruled the surface.
fn caption(draw: &Draw, link: Link, dim: usize) -> [String; 2] {
    let mut first = format!("{} sites", draw.context);
    if let Some(trials) = &draw.trials {
        let tested = &trials[..draw.context];
        let low = tested.iter().copied().fold(f64::INFINITY, f64::min);
        let high = tested.iter().copied().fold(0.0, f64::max);
        let what = if link == Link::Log { "exposure" } else { "tested" };
        let (low, high) = match link {
            Link::Log => (round(low), round(high)),
            _ => (low.to_string(), high.to_string()),
        };
        first += &match low == high {
            true => format!(", {low} {what} at each"),
            false => format!(", {low} to {high} {what}"),
        };
    }
    let rule = &draw.rule;
    let mean = match link {
        Link::Logit => format!("{} %", round(100.0 * link.outcome(rule.mean))),
        _ => round(link.outcome(rule.mean)),
    };
    first += &format!(", mean {mean}");
    if let Some(seen) = &draw.covariates {
        first += &format!(", effects' sd {}", round(seen.acting.sd()));
    }
    let nugget = round(rule.nugget.sqrt());
    let second = match &rule.kernel {
        Some(kernel) => format!(
            "range {}, sd {}, nugget sd {nugget}",
            ranges(&**kernel, dim),
            round(kernel.sill().sqrt()),
        ),
        None => format!("nugget sd {nugget}"),
    };
    [first, second]
}

/// The effective range, region units; shortest and longest where it depends on the direction.
fn ranges(kernel: &dyn Kernel, dim: usize) -> String {
    const DIRECTIONS: usize = 18;
    let directions = if dim == 1 { 1 } else { DIRECTIONS };
    let (mut shortest, mut longest) = (f64::INFINITY, 0f64);
    for i in 0..directions {
        let turn = std::f64::consts::PI * i as f64 / DIRECTIONS as f64;
        let found = effective_range(kernel, [turn.cos(), turn.sin()]);
        (shortest, longest) = (shortest.min(found), longest.max(found));
    }
    let word = |v: f64| match v < LONGEST {
        true => format!("{v:.2}"),
        false => format!("over {LONGEST}"),
    };
    match longest > 1.1 * shortest {
        true => format!("{} to {}", word(shortest), word(longest)),
        false => word(shortest),
    }
}

/// Ranges beyond this are not told apart: region units.
const LONGEST: f64 = 10.0;

/// The first distance along a direction at which the correlation is at most 0.05, within 1 %.
fn effective_range(kernel: &dyn Kernel, along: [f64; 2]) -> f64 {
    let mut r = 1e-3;
    while r < LONGEST {
        let correlation = kernel.covariance(&[0.0, 0.0], &[r * along[0], r * along[1]]);
        if correlation <= 0.05 * kernel.sill() {
            return r;
        }
        r *= 1.01;
    }
    LONGEST
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Matern, Metric, Smoothness};

    /// 3.00 length scales for the exponential, and 2.45 for the squared exponential, as in the
    /// project's vocabulary.
    #[test]
    fn ranges_are_where_correlation_is_a_twentieth() {
        for (smoothness, ratio) in [(Smoothness::Half, 3.0), (Smoothness::Infinite, 2.45)] {
            let kernel =
                Matern { smoothness, length_scale: 0.2, sill: 4.0, metric: Metric::Euclidean };
            let found = effective_range(&kernel, [0.6, 0.8]) / 0.2;
            assert!((found / ratio - 1.0).abs() < 0.011, "{found}");
            assert!(!ranges(&kernel, 2).contains("to"));
        }
        let metric = Metric::Anisotropic { angle: 0.5, ratio: 3.0 };
        let smoothness = Smoothness::Half;
        let stretched = Matern { smoothness, length_scale: 0.2, sill: 1.0, metric };
        assert!(ranges(&stretched, 2).contains(" to "));
    }

    #[test]
    fn a_lattice_spans_its_box() {
        let (low, high) = bounds(&[[-1.0, 0.0], [1.0, 0.5]], 2);
        let (view, nodes) = lattice(low, high, 2, LATTICE);
        let View::Surface { rows, cols } = view else { panic!("a plane has surfaces") };
        assert_eq!(cols, LATTICE);
        assert_eq!(nodes.len(), rows * cols);
        assert_eq!((nodes[0], nodes[rows * cols - 1]), (low, high));
    }
}
