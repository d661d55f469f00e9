//! From a posterior to maps: window by window, in memory that does not grow with the map.
//!
//! Each window's wanted pixels go through the [`Frame`] to the model and back, and every product
//! takes the tile. `run` is to mapping what the loop is to training: the one place that does it.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    geo::{frame::Frame, grid::Grid},
    process::Posterior,
    product::{Product, Reads, Spec, prior_share},
    sites::Observations,
};

pub mod areas;
pub mod dependence;
pub mod displaced;
pub mod draws;
pub mod machine;
mod near;
mod nearest;
pub mod next;
mod part;
mod pipeline;
pub mod plan;
pub mod record;
pub mod windows;

pub use part::Part;
pub use pipeline::in_parts;
pub use plan::Plan;

use near::Near;
use nearest::Nearest;
use pipeline::Stage;

/// Pixels farther than this from every site are counted as far: model units, where the sites span
/// 2 along their longer side. A quarter of the survey's longer side.
pub const REACH: f64 = 0.5;

/// What a map turned out to hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Pixels predicted.
    pub pixels: usize,
    /// Smallest posterior mean, outcome units.
    pub lowest: f64,
    /// Average posterior mean over pixels, outcome units.
    pub average: f64,
    /// Largest posterior mean, outcome units.
    pub highest: f64,
    /// Share of pixels farther than `reach_km` from every site.
    pub far: f64,
    /// [`REACH`] on the ground, km.
    pub reach_km: f64,
    /// Targets that were asked about at once, at most, where a card had no memory for as many as
    /// were planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_to: Option<usize>,
}

impl Summary {
    /// Of maps of one grid at several times, taken together.
    ///
    /// # Errors
    /// [`Error::Axis`] for none.
    pub fn over(times: &[Summary]) -> Result<Self> {
        let Some(first) = times.first() else {
            return Err(Error::axis("maps to sum up", 0, "at least one"));
        };
        let all = |of: fn(&Summary) -> f64| times.iter().map(of);
        Ok(Summary {
            lowest: all(|s| s.lowest).fold(f64::INFINITY, f64::min),
            average: all(|s| s.average).sum::<f64>() / times.len() as f64,
            highest: all(|s| s.highest).fold(f64::NEG_INFINITY, f64::max),
            cut_to: times.iter().filter_map(|s| s.cut_to).min(),
            ..first.clone()
        })
    }
}

/// Maps the posterior over the wanted pixels of a grid; every product takes every tile.
///
/// `context` is what the posterior was conditioned on, in the frame's model units. `progress` is
/// told (pixels done, pixels wanted) after each call of the posterior, on the thread that called.
/// Products still have to be finished.
///
/// Reading, asking and writing run beside each other, and the posterior is asked by
/// [`Plan::workers`] threads at once: the map is the same for any plan, up to the rounding of
/// sums whose terms come in another order. A card that has too little memory for a question is asked
/// about half of it, which [`Summary::cut_to`] says.
///
/// # Errors
/// [`Error::Input`] for a tile of no pixels, or if the disk, the projection or the model refuses.
pub fn run(
    posterior: &dyn Posterior,
    context: &Observations,
    grid: &Grid,
    frame: &Frame,
    products: &mut [Box<dyn Product>],
    plan: &Plan,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Summary> {
    run_each(&[posterior], context, grid, frame, products, plan, progress)
}

/// As [`run`], with one posterior for each device of the plan: all conditioned alike, and whoever is
/// free answers.
///
/// # Errors
/// As [`run`], and [`Error::Axis`] if posteriors and devices differ in number.
pub fn run_each(
    posteriors: &[&dyn Posterior],
    context: &Observations,
    grid: &Grid,
    frame: &Frame,
    products: &mut [Box<dyn Product>],
    plan: &Plan,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Summary> {
    if plan.tile == 0 || plan.targets == 0 {
        return Err(Error::input("a tile needs at least one pixel").try_this("give --tile 256"));
    }
    if posteriors.is_empty() || posteriors.len() != plan.devices.len() {
        return Err(Error::axis("posteriors and devices", posteriors.len(), plan.devices.len()));
    }
    // A small map is shared by all threads too.
    let share = grid.wanted().div_ceil(4 * plan.workers.max(1)).max(plan::LEAST_TARGETS);
    let targets = plan.targets.min(share);
    let specs: Vec<Spec> = products.iter().map(|p| p.spec()).collect();
    let read = |what: Reads| specs.iter().any(|spec| spec.entry.reads == what);
    let stage = Stage {
        posteriors,
        grid,
        frame,
        near: Near::new(context)?,
        nearest: if read(Reads::Nearest) { Some(Nearest::new(context)?) } else { None },
        spread: match read(Reads::Spread) {
            true => spread(posteriors, grid, frame, plan)?,
            false => f64::NAN,
        },
        specs,
        plan,
        targets,
        part: Part::new(targets),
    };
    let tally = pipeline::run(&stage, products, progress)?;
    if tally.pixels == 0 {
        return Err(Error::input("the grid has no pixel to map"));
    }
    let pixels = tally.pixels as f64;
    Ok(Summary {
        pixels: tally.pixels,
        lowest: tally.lowest,
        average: tally.total / pixels,
        highest: tally.highest,
        far: tally.far as f64 / pixels,
        reach_km: frame.km(REACH),
        cut_to: stage.part.less(),
    })
}

/// Variance of what is mapped over the whole map, link scale ([`prior_share`]): from pixels at even steps
/// through it, the same ones for any plan.
fn spread(posteriors: &[&dyn Posterior], grid: &Grid, frame: &Frame, plan: &Plan) -> Result<f64> {
    const PIXELS: usize = 2_048;
    const WINDOW: usize = 256;
    let step = grid.wanted().div_ceil(PIXELS).max(1);
    let (mut x, mut y, mut next, mut passed) = (Vec::new(), Vec::new(), step / 2, 0);
    for window in grid.windows(WINDOW) {
        let (east, north) = grid.centres(window, &grid.valid(window));
        while next < passed + east.len() {
            x.push(east[next - passed]);
            y.push(north[next - passed]);
            next += step;
        }
        passed += east.len();
    }
    let sites = frame.sites(&grid.crs, &x, &y, &candle_core::Device::Cpu)?;
    let part = Part::new(plan.targets);
    let parts = in_parts(plan, &part, &sites, |device, sites| {
        let marginals = posteriors[device].at(sites)?.marginals(0, plan.of)?;
        let marginals = frame.outcome(marginals);
        Ok((0..marginals.len()).map(|i| prior_share::moments(&marginals, i)).collect::<Vec<_>>())
    })?;
    Ok(prior_share::spread(&parts.concat()))
}
