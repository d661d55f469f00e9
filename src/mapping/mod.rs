//! From a posterior to maps: window by window, in memory that does not grow with the map.
//!
//! Each window's wanted pixels go through the [`Frame`] to the model and back, and every product
//! takes the tile. `run` is to mapping what the loop is to training: the one place that does it.

use std::collections::HashMap;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    geo::{frame::Frame, grid::Grid},
    predictive::{Marginals, Of},
    process::Posterior,
    product::{Product, Tile},
    sites::Observations,
};

pub mod record;

/// Pixels along the side of a tile, unless asked otherwise.
pub const TILE: usize = 256;

/// Targets that a posterior is asked about in one call, at most.
pub const TARGETS: usize = 8_192;

/// Pixels farther than this from every site are counted as far: model units, where the sites span
/// 2 along their longer side. A quarter of the survey's longer side.
pub const REACH: f64 = 0.5;

/// How to map. Memory knobs change memory and speed, never the map.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The surface, or a new observation.
    pub of: Of,
    /// Memory knob: pixels along a tile's side.
    pub tile: usize,
    /// Memory knob: targets in one call of the posterior.
    pub targets: usize,
    /// Where the model lives.
    pub device: Device,
}

impl Plan {
    /// Maps of the surface, on `device`, with tiles of [`TILE`].
    pub fn new(device: Device) -> Self {
        Plan { of: Of::Surface, tile: TILE, targets: TARGETS, device }
    }
}

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
}

/// Maps the posterior over the wanted pixels of a grid; every product takes every tile.
///
/// `context` is what the posterior was conditioned on, in the frame's model units. `progress` is
/// told (pixels done, pixels wanted) after each call of the posterior. Products still have to be
/// finished.
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
    if plan.tile == 0 || plan.targets == 0 {
        return Err(Error::input("a tile needs at least one pixel").try_this("give --tile 256"));
    }
    let near = Near::new(context)?;
    let wanted = grid.wanted();
    let (mut done, mut far, mut total) = (0, 0, 0.0);
    let (mut lowest, mut highest) = (f64::INFINITY, f64::NEG_INFINITY);
    for window in grid.windows(plan.tile) {
        let valid = grid.valid(window);
        let (x, y) = grid.centres(window, &valid);
        let mut marginals: Option<Marginals> = None;
        for start in (0..x.len()).step_by(plan.targets) {
            let end = x.len().min(start + plan.targets);
            let sites = frame.sites(&grid.crs, &x[start..end], &y[start..end], &plan.device)?;
            let predictive = posterior.at(&sites)?;
            let part = frame.outcome(predictive.marginals(0, plan.of)?);
            if part.len() != end - start {
                return Err(Error::axis("targets asked and answered", end - start, part.len()));
            }
            far += sites.host()?[0].iter().filter(|s| !near.reaches(s[0], s[1])).count();
            match &mut marginals {
                None => marginals = Some(part),
                Some(whole) => {
                    whole.weight.extend(part.weight);
                    whole.mean.extend(part.mean);
                    whole.sd.extend(part.sd);
                }
            }
            done += end - start;
            progress(done, wanted);
        }
        let Some(marginals) = marginals else {
            products.iter_mut().try_for_each(|p| p.skip(window))?;
            continue;
        };
        for mean in marginals.map(|m, i| m.mean_sd(i).0) {
            lowest = mean.min(lowest);
            highest = mean.max(highest);
            total += mean;
        }
        let tile = Tile { window, valid, marginals };
        products.iter_mut().try_for_each(|p| p.accept(&tile))?;
    }
    if done == 0 {
        return Err(Error::input("the grid has no pixel to map"));
    }
    Ok(Summary {
        pixels: done,
        lowest,
        average: total / done as f64,
        highest,
        far: far as f64 / done as f64,
        reach_km: frame.km(REACH),
    })
}

/// Sites sorted into squares of side [`REACH`], to tell quickly whether one is near.
struct Near(HashMap<[i64; 2], Vec<[f64; 2]>>);

fn square(x: f64, y: f64) -> [i64; 2] {
    [x, y].map(|v| (v / REACH).floor() as i64)
}

impl Near {
    fn new(context: &Observations) -> Result<Self> {
        let mut squares: HashMap<_, Vec<_>> = HashMap::new();
        for site in context.sites.host()?.first().into_iter().flatten() {
            squares.entry(square(site[0], site[1])).or_default().push([site[0], site[1]]);
        }
        Ok(Near(squares))
    }

    fn reaches(&self, x: f64, y: f64) -> bool {
        let [col, row] = square(x, y);
        (-1..=1).any(|i| {
            (-1..=1).any(|j| {
                let sites = self.0.get(&[col + i, row + j]);
                sites.is_some_and(|s| s.iter().any(|s| (s[0] - x).hypot(s[1] - y) <= REACH))
            })
        })
    }
}
