//! Joint draws over millions of pixels: block after block, in memory that grows with neither.
//!
//! A draw at a pixel is the quantile of the model's own predictive there at Φ(z), where z is a
//! standardised joint field ([`Field`]): the model says what is likely at each place, the field says
//! how places move together. For a Gaussian process both are its own, and draws are its joint
//! posterior. For a network that is asked about each place alone, the field is that of a Gaussian process
//! whose places move together as the network's do ([`dependence`](super::dependence)): a Gaussian copula.
//!
//! Work is cut into blocks of [`BLOCK`] × [`BLOCK`] pixels of the grid, always the same ones: a tile
//! is a number of them, so that neither tiles nor threads can change a bit.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use candle_core::Device;

use super::plan;
use crate::{
    error::{Error, Result},
    fused::simd,
    geo::{
        frame::Frame,
        grid::{Grid, Window},
    },
    kernel::Metric,
    predictive::{Link, Marginals, Of, normal_cdf},
    process::{Field, Posterior},
    sites::Sites,
};

/// Pixels along the side of a block.
pub const BLOCK: usize = 32;

/// Bytes of draws that a tile may hold.
const TILE_BYTES: usize = 64 << 20;

/// Knots of a mixture's quantile function: from −[`EDGE`] to [`EDGE`] normal sds.
const KNOTS: usize = 61;
const EDGE: f64 = 5.0;

/// Surfaces drawn jointly, in outcome units.
pub struct Surfaces<'a> {
    field: &'a dyn Field,
    /// The predictive at each place, and where it is computed; nothing where it is the field's own.
    marginals: Option<(&'a dyn Posterior, Device)>,
    link: Link,
    frame: &'a Frame,
}

/// Link scale → outcome, in place.
fn outcomes(link: Link, values: &mut [f32]) {
    match link {
        Link::Identity => {}
        Link::Logit => logistic(values),
        Link::Log => exponential(values),
    }
}

simd::vectorised! {
    /// `1 / (1 + e⁻ˣ)`.
    pub fn logistic(values: &mut [f32]) {
        for x in values {
            *x = 1.0 / (1.0 + simd::exp(-*x));
        }
    }
}

simd::vectorised! {
    /// `eˣ`.
    pub fn exponential(values: &mut [f32]) {
        for x in values {
            *x = simd::exp(*x);
        }
    }
}

simd::vectorised! {
    /// `out = mean + scale · x`.
    pub fn stretch(mean: f32, scale: f32, x: &[f32], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = scale.mul_add(*x, mean);
        }
    }
}

impl<'a> Surfaces<'a> {
    /// The field's own surfaces: those of a Gaussian process.
    pub fn own(field: &'a dyn Field, link: Link, frame: &'a Frame) -> Self {
        Surfaces { field, marginals: None, link, frame }
    }

    /// Surfaces with the marginals of `posterior`, which computes on `device`, and the dependence of
    /// `field`.
    pub fn joined(
        posterior: &'a dyn Posterior,
        device: Device,
        field: &'a dyn Field,
        link: Link,
        frame: &'a Frame,
    ) -> Self {
        Surfaces { field, marginals: Some((posterior, device)), link, frame }
    }

    /// How many surfaces.
    pub fn draws(&self) -> usize {
        self.field.draws()
    }

    /// Every surface at one row of `sites`, outcome units: `[target, draw]`.
    ///
    /// # Errors
    /// What the field or the posterior returns, and [`Error::Axis`] if they disagree on how many
    /// targets there are.
    pub fn at(&self, sites: &Sites) -> Result<Vec<f32>> {
        let mut drawn = self.field.at(sites)?;
        let draws = self.draws();
        let (targets, whole) = (sites.len(), draws * sites.len());
        if drawn.mean.len() != targets || drawn.deviations.len() != whole {
            return Err(Error::axis("targets asked and drawn", targets, drawn.mean.len()));
        }
        let mut values = vec![0f32; whole];
        match &self.marginals {
            None => {
                let own = Marginals {
                    link: self.link,
                    of: Of::Surface,
                    components: 1,
                    weight: vec![1.0; targets],
                    mean: drawn.mean,
                    sd: vec![1.0; targets],
                };
                // In outcome units a deviation of one is as long as the frame says.
                let own = self.frame.outcome(own);
                let rows = values.chunks_exact_mut(draws).zip(drawn.deviations.chunks_exact(draws));
                for (i, (out, deviations)) in rows.enumerate() {
                    stretch(own.mean[i] as f32, own.sd[i] as f32, deviations, out);
                }
            }
            Some((posterior, device)) => {
                let there = sites.map(|x| Ok(x.force_contiguous()?.to_device(device)?))?;
                let marginals = posterior.at(&there)?.marginals(0, Of::Surface)?;
                let marginals = self.frame.outcome(marginals);
                if marginals.len() != targets {
                    return Err(Error::axis(
                        "targets asked and answered",
                        targets,
                        marginals.len(),
                    ));
                }
                let rows =
                    values.chunks_exact_mut(draws).zip(drawn.deviations.chunks_exact_mut(draws));
                for (i, (out, deviations)) in rows.enumerate() {
                    let scale = 1.0 / drawn.sd[i];
                    if marginals.components == 1 {
                        let sd = marginals.sd[i] * scale;
                        stretch(marginals.mean[i] as f32, sd as f32, deviations, out);
                    } else {
                        bend(&knots(&marginals, i), scale as f32, deviations, out);
                    }
                }
            }
        }
        outcomes(self.link, &mut values);
        Ok(values)
    }
}

/// Quantiles of a mixture at evenly spaced normal deviates.
fn knots(marginals: &Marginals, i: usize) -> [f32; KNOTS] {
    let step = 2.0 * EDGE / (KNOTS - 1) as f64;
    std::array::from_fn(|k| {
        let z = step * k as f64 - EDGE;
        marginals.link_quantile(i, normal_cdf(z)) as f32
    })
}

/// The quantile function through `knots` at normal deviates `scale · x`; straight beyond its ends.
fn bend(knots: &[f32; KNOTS], scale: f32, x: &[f32], out: &mut [f32]) {
    let steps = (KNOTS - 1) as f32 / (2.0 * EDGE as f32);
    for (out, x) in out.iter_mut().zip(x) {
        let at = (scale * x + EDGE as f32) * steps;
        let k = (at.max(0.0) as usize).min(KNOTS - 2);
        *out = knots[k] + (at - k as f32) * (knots[k + 1] - knots[k]);
    }
}

/// The longest distance between places of a grid, model units; never less than that of the sites.
pub fn extent(grid: &Grid, frame: &Frame) -> f64 {
    let edge = grid.extent();
    let (mid_x, mid_y) = (0.5 * (edge.west + edge.east), 0.5 * (edge.south + edge.north));
    let x = [edge.west, mid_x, edge.east, edge.west, edge.east, edge.west, mid_x, edge.east];
    let y = [edge.south, edge.south, edge.south, mid_y, mid_y, edge.north, edge.north, edge.north];
    let apart = frame.sites(&grid.crs, &x, &y, &Device::Cpu).and_then(|sites| sites.host());
    let longest = apart.map_or(0.0, |sites| {
        let sites = &sites[0];
        let from = |a: &Vec<f64>| {
            sites.iter().map(|b| Metric::Euclidean.distance(a, b)).fold(0.0, f64::max)
        };
        sites.iter().map(from).fold(0.0, f64::max)
    });
    longest.clamp(2.0, 1e3)
}

/// The side of a tile that holds `draws` draws: a multiple of [`BLOCK`], `wanted` where that is less
/// than memory allows.
pub fn tile(wanted: usize, draws: usize) -> usize {
    let most = ((TILE_BYTES / (4 * draws.max(1))) as f64).sqrt() as usize;
    (wanted.min(most) / BLOCK).max(1) * BLOCK
}

/// Blocks of a window whose first row and column are multiples of [`BLOCK`], row by row.
fn blocks(window: Window) -> impl Iterator<Item = Window> {
    let ends = (window.row + window.rows, window.col + window.cols);
    (window.row..ends.0).step_by(BLOCK).flat_map(move |row| {
        (window.col..ends.1).step_by(BLOCK).map(move |col| Window {
            row,
            col,
            rows: BLOCK.min(ends.0 - row),
            cols: BLOCK.min(ends.1 - col),
        })
    })
}

/// What makes something of a block: the block, which of its pixels are wanted, and their draws.
pub type Make<'a, T> = dyn Fn(Window, &[bool], Vec<f32>) -> Result<T> + Sync + 'a;

/// Draws over a grid, tile by tile: `make` turns the draws of a block into what is kept of them, on
/// `workers` threads, and `take` gets the blocks of each tile in order of place.
///
/// `wanted` says which pixels of a block, row-major; `make` gets these and the draws
/// `[wanted pixel, draw]`, outcome units. What comes out is the same for any tile and any number of
/// workers, to the last bit.
///
/// # Errors
/// Those of [`Surfaces::at`], of `make` and of `take`; [`Error::Input`] for a tile that is no multiple
/// of [`BLOCK`].
pub fn run<T: Send>(
    surfaces: &Surfaces,
    grid: &Grid,
    [tile, workers]: [usize; 2],
    wanted: &(dyn Fn(Window) -> Vec<bool> + Sync),
    make: &Make<T>,
    take: &mut dyn FnMut(Window, Vec<(Window, T)>) -> Result<()>,
) -> Result<()> {
    if tile == 0 || !tile.is_multiple_of(BLOCK) {
        return Err(Error::input("a tile of draws holds whole blocks of pixels")
            .fact("tile", tile)
            .try_this(format!("give a multiple of {BLOCK}")));
    }
    // One thread each: what a block needs does not grow with the machine, and neither does a sum.
    let pools = (0..workers.max(1)).map(|_| plan::pool(1)).collect::<Result<Vec<_>>>()?;
    let block = |window: Window| -> Result<T> {
        let valid = wanted(window);
        let (x, y) = grid.centres(window, &valid);
        let draws = match x.is_empty() {
            true => Vec::new(),
            false => surfaces.at(&surfaces.frame.sites(&grid.crs, &x, &y, &Device::Cpu)?)?,
        };
        make(window, &valid, draws)
    };
    for window in grid.windows(tile) {
        let all: Vec<Window> = blocks(window).collect();
        let slots: Vec<Mutex<Option<Result<T>>>> = all.iter().map(|_| Mutex::new(None)).collect();
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = || {
            while !failed.load(Ordering::Relaxed) {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(window) = all.get(i) else { return };
                let made = block(*window);
                failed.fetch_or(made.is_err(), Ordering::Relaxed);
                *slots[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
            }
        };
        std::thread::scope(|scope| {
            pools.iter().for_each(|pool| {
                scope.spawn(|| pool.install(work));
            });
        });
        // Blocks begin in order: whatever is missing comes after a failure, which is returned first.
        let made = slots
            .into_iter()
            .filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner));
        let made = made.collect::<Result<Vec<T>>>()?;
        take(window, all.into_iter().zip(made).collect())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_bends_as_its_quantiles_do() {
        let mixture = Marginals {
            link: Link::Identity,
            of: Of::Surface,
            components: 2,
            weight: vec![0.3, 0.7],
            mean: vec![-1.0, 0.5],
            sd: vec![0.4, 0.6],
        };
        let knots = knots(&mixture, 0);
        let x: Vec<f32> = (-900..900).map(|i| i as f32 * 0.01).collect();
        let mut out = vec![0f32; x.len()];
        bend(&knots, 0.5, &x, &mut out);
        for (x, out) in x.iter().zip(&out) {
            let exact = mixture.link_quantile(0, normal_cdf(0.5 * f64::from(*x)));
            // Less than a hundredth of its sd, where the two hills meet.
            assert!((f64::from(*out) - exact).abs() < 0.008, "{x}: {out}, not {exact}");
        }
        assert!(out.is_sorted());
    }

    #[test]
    fn blocks_cover_a_window_once() {
        let window = Window { row: 64, col: 32, rows: 70, cols: 33 };
        let all: Vec<Window> = blocks(window).collect();
        assert_eq!(all.iter().map(Window::len).sum::<usize>(), window.len());
        assert_eq!(all[0], Window { row: 64, col: 32, rows: 32, cols: 32 });
        assert_eq!(all.last(), Some(&Window { row: 128, col: 64, rows: 6, cols: 1 }));
        assert_eq!(
            [tile(256, 10), tile(256, 1000), tile(40, 1), tile(1, 1 << 30)],
            [256, 128, 32, 32]
        );
    }
}
