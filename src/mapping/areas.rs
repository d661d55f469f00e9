//! Means over areas from joint draws: every pixel counts for the share of it that is covered, and what
//! is kept is a number for each area and draw, never one for each pixel and draw.
//!
//! The interval of an area's mean needs draws that are joint: errors of near pixels are alike, and
//! adding up marginal variances as if they were not makes intervals several times too narrow.

use super::draws::{self, BLOCK, Surfaces};
use crate::{
    error::{Error, Result},
    fused::simd,
    geo::{
        cover::Shape,
        crs::Crs,
        grid::{Grid, Window},
        people,
    },
};

/// Numbers for areas and draws that are held: half a GiB.
const MOST_HELD: usize = 1 << 26;

/// What weighs the pixels, and what is asked of each area.
pub struct Question<'a> {
    /// Outlines in pixels of the grid.
    pub shapes: &'a [Shape],
    /// People in each pixel of the grid, row-major; areas weigh pixels by their size without.
    pub people: Option<&'a [f32]>,
    /// An equal-area plane about the region.
    pub plane: &'a Crs,
    /// Thresholds in outcome units: who lives where the surface is above them.
    pub thresholds: &'a [f64],
}

/// What the draws say of one area.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Area {
    /// Pixels, partly covered ones in part.
    pub pixels: f64,
    /// Of it on the map, km².
    pub km2: f64,
    /// People on the map; 0 where nobody was counted.
    pub people: f64,
    /// What lies on pixels of the grid that the map leaves out: km² and people.
    pub unmapped: [f64; 2],
    /// Share of the outline that lies beyond the grid.
    pub beyond: f64,
    /// Whether pixels weigh by their size: nobody was counted, or nobody lives there.
    pub by_size: bool,
    /// Mean of the surface over the area in each draw, outcome units; nothing for areas off the map.
    pub means: Vec<f64>,
    /// For each threshold and draw, the part of the weight where the surface is above it.
    pub above: Vec<Vec<f64>>,
}

simd::vectorised! {
    /// `sums += weight · values`.
    pub fn add(sums: &mut [f64], weight: f64, values: &[f32]) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum = weight.mul_add(f64::from(*value), *sum);
        }
    }
}

simd::vectorised! {
    /// `sums += weight` where a value is above the threshold.
    pub fn count(sums: &mut [f64], weight: f64, threshold: f32, values: &[f32]) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += if *value > threshold { weight } else { 0.0 };
        }
    }
}

/// What an area takes from one block: sums over its pixels, and those above each threshold.
struct Share {
    area: usize,
    sums: Vec<f64>,
    above: Vec<Vec<f64>>,
}

/// The pixels of a block: km², people, and which are mapped.
struct Block {
    sizes: Vec<f64>,
    people: Option<Vec<f64>>,
    valid: Vec<bool>,
}

/// Sizes and people of every area, and which areas meet each block.
struct Prepared {
    areas: Vec<Area>,
    /// Row-major blocks.
    blocks: Vec<Vec<u32>>,
    across: usize,
}

impl Question<'_> {
    /// People in the pixels of a window, row-major; nothing where nobody was counted.
    fn people(&self, grid: &Grid, window: Window) -> Option<Vec<f64>> {
        let people = self.people?;
        let row =
            |row: usize| &people[(window.row + row) * grid.cols + window.col..][..window.cols];
        Some((0..window.rows).flat_map(row).map(|v| f64::from(*v)).collect())
    }

    fn prepare(&self, grid: &Grid) -> Result<Prepared> {
        let across = grid.cols.div_ceil(BLOCK);
        let mut areas = vec![Area::default(); self.shapes.len()];
        // Pixels of each area on the grid, mapped or not.
        let mut held = vec![0.0; self.shapes.len()];
        let mut blocks = vec![Vec::new(); across * grid.rows.div_ceil(BLOCK)];
        for window in grid.windows(BLOCK) {
            let block = (window.row / BLOCK) * across + window.col / BLOCK;
            let mut known: Option<Block> = None;
            for (i, shape) in self.shapes.iter().enumerate() {
                let Some(cover) = shape.cover(window) else { continue };
                if known.is_none() {
                    let sizes = people::areas(grid, window, self.plane)?;
                    let people = self.people(grid, window);
                    known = Some(Block { sizes, people, valid: grid.valid(window) });
                }
                let Some(Block { sizes, people, valid }) = &known else { continue };
                blocks[block].push(i as u32);
                for (k, share) in cover.iter().enumerate().filter(|(_, share)| **share > 0.0) {
                    let km2 = share * sizes[k];
                    let living = people.as_ref().map_or(0.0, |people| share * people[k]);
                    let area = &mut areas[i];
                    held[i] += share;
                    if valid[k] {
                        area.pixels += share;
                        area.km2 += km2;
                        area.people += living;
                    } else {
                        area.unmapped[0] += km2;
                        area.unmapped[1] += living;
                    }
                }
            }
        }
        for ((area, shape), held) in areas.iter_mut().zip(self.shapes).zip(held) {
            area.by_size = area.people <= 0.0;
            area.beyond = (1.0 - held / shape.size().max(f64::MIN_POSITIVE)).max(0.0);
        }
        Ok(Prepared { areas, blocks, across })
    }

    /// What each pixel of a block weighs in each area that it meets.
    fn weights(
        &self,
        grid: &Grid,
        prepared: &Prepared,
        window: Window,
    ) -> Result<Vec<(usize, Vec<f64>)>> {
        let block = (window.row / BLOCK) * prepared.across + window.col / BLOCK;
        let met = &prepared.blocks[block];
        if met.is_empty() {
            return Ok(Vec::new());
        }
        let sized = met.iter().any(|i| prepared.areas[*i as usize].by_size);
        let sizes = sized.then(|| people::areas(grid, window, self.plane)).transpose()?;
        let people = self.people(grid, window);
        let valid = grid.valid(window);
        let weigh = |i: &u32| {
            let i = *i as usize;
            let mut weights = self.shapes[i].cover(window)?;
            let by = if prepared.areas[i].by_size { sizes.as_ref() } else { people.as_ref() }?;
            for (k, weight) in weights.iter_mut().enumerate() {
                *weight = if valid[k] { *weight * by[k] } else { 0.0 };
            }
            Some((i, weights))
        };
        Ok(met.iter().filter_map(weigh).collect())
    }
}

/// Means of every draw over every area. `how` is the tile, a multiple of [`BLOCK`], and how many threads
/// work; neither changes a bit. `progress` is told (pixels done, pixels of the grid).
///
/// # Errors
/// Those of [`draws::run`]; [`Error::Axis`] if people and pixels differ in number; [`Error::Input`] if
/// areas times draws do not fit into memory.
pub fn run(
    surfaces: &Surfaces,
    grid: &Grid,
    question: &Question,
    how: [usize; 2],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Area>> {
    let draws = surfaces.draws();
    let held = question.shapes.len().saturating_mul(draws * (1 + question.thresholds.len()));
    if held > MOST_HELD {
        return Err(Error::input("so many draws of so many areas do not fit into memory")
            .fact("areas", question.shapes.len())
            .fact("draws", draws)
            .fact("thresholds", question.thresholds.len())
            .try_this(format!(
                "ask for {} draws at the most",
                (MOST_HELD / (held / draws)).max(1)
            )));
    }
    if let Some(people) = question.people.filter(|people| people.len() != grid.len()) {
        return Err(Error::axis("people and pixels", people.len(), grid.len()));
    }
    let mut prepared = question.prepare(grid)?;
    let mut areas = std::mem::take(&mut prepared.areas);
    prepared.areas = areas.clone();
    for area in &mut areas {
        if area.pixels > 0.0 {
            area.means = vec![0.0; draws];
            area.above = vec![vec![0.0; draws]; question.thresholds.len()];
        }
    }
    // An error in here comes back from `make`, which asks for the same.
    let wanted = |window: Window| -> Vec<bool> {
        let weights = question.weights(grid, &prepared, window).unwrap_or_default();
        let any = |k: usize| weights.iter().any(|(_, weights)| weights[k] > 0.0);
        (0..window.len()).map(any).collect()
    };
    let make = |window: Window, wanted: &[bool], values: Vec<f32>| -> Result<Vec<Share>> {
        let weights = question.weights(grid, &prepared, window)?;
        let pixels: Vec<usize> = (0..wanted.len()).filter(|k| wanted[*k]).collect();
        let share = |(area, weights): (usize, Vec<f64>)| {
            let mut sums = vec![0.0; draws];
            let mut above = vec![vec![0.0; draws]; question.thresholds.len()];
            for (k, values) in pixels.iter().zip(values.chunks_exact(draws)) {
                let weight = weights[*k];
                if weight > 0.0 {
                    add(&mut sums, weight, values);
                    for (above, threshold) in above.iter_mut().zip(question.thresholds) {
                        count(above, weight, *threshold as f32, values);
                    }
                }
            }
            Share { area, sums, above }
        };
        Ok(weights.into_iter().map(share).collect())
    };
    let mut done = 0;
    // Blocks of a tile come in order of place, and so do tiles; but which blocks are a tile hangs on
    // its size. Sums over blocks are therefore kept by row of blocks until that row is whole.
    let mut waiting: Vec<(usize, usize, Share)> = Vec::new();
    let mut settle = |waiting: &mut Vec<(usize, usize, Share)>| {
        waiting.sort_by_key(|(row, col, share)| (*row, *col, share.area));
        for (_, _, share) in waiting.drain(..) {
            let area = &mut areas[share.area];
            area.means.iter_mut().zip(&share.sums).for_each(|(a, b)| *a += b);
            for (above, more) in area.above.iter_mut().zip(&share.above) {
                above.iter_mut().zip(more).for_each(|(a, b)| *a += b);
            }
        }
    };
    draws::run(surfaces, grid, how, &wanted, &make, &mut |tile, blocks| {
        for (window, shares) in blocks {
            waiting.extend(shares.into_iter().map(|share| (window.row, window.col, share)));
        }
        if tile.col + tile.cols == grid.cols {
            settle(&mut waiting);
        }
        done += tile.len();
        progress(done, grid.len());
        Ok(())
    })?;
    for area in &mut areas {
        let weight = if area.by_size { area.km2 } else { area.people };
        area.means.iter_mut().for_each(|sum| *sum /= weight);
    }
    Ok(areas)
}

/// What draws of a number say of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Said {
    /// Mean of the draws.
    pub mean: f64,
    /// Their sd, divisor n − 1; 0 for a single draw.
    pub sd: f64,
    /// The lower end of the equal-tailed interval.
    pub lower: f64,
    /// The upper end.
    pub upper: f64,
}

impl Said {
    /// The interval holds one draw more with probability `level`, however few draws there are, down to
    /// 2 / (1 − level); between them by straight lines (Hyndman & Fan 1996,
    /// doi:10.1080/00031305.1996.10473566, definition 6). Nothing without draws.
    ///
    /// ```
    /// use isopleth::mapping::areas::Said;
    /// let said = Said::of(&[4.0, 0.0, 1.0, 3.0, 2.0], 0.5).unwrap();
    /// assert_eq!((said.mean, said.lower, said.upper), (2.0, 0.5, 3.5));
    /// assert!((said.sd - 2.5f64.sqrt()).abs() < 1e-12);
    /// ```
    pub fn of(draws: &[f64], level: f64) -> Option<Self> {
        let mut sorted = draws.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (n, last) = (sorted.len() as f64, *sorted.last()?);
        let mean = sorted.iter().sum::<f64>() / n;
        let square: f64 = sorted.iter().map(|v| (v - mean).powi(2)).sum();
        let quantile = |p: f64| {
            let at = (p * (n + 1.0) - 1.0).clamp(0.0, n - 1.0);
            let low = sorted[at as usize];
            low + (at - at.floor()) * (sorted.get(at as usize + 1).unwrap_or(&last) - low)
        };
        Some(Said {
            mean,
            sd: (square / (n - 1.0).max(1.0)).sqrt(),
            lower: quantile(0.5 - 0.5 * level),
            upper: quantile(0.5 + 0.5 * level),
        })
    }
}

/// Share of draws above a threshold; NaN without draws.
pub fn exceedance(draws: &[f64], threshold: f64) -> f64 {
    draws.iter().filter(|v| **v > threshold).count() as f64 / draws.len() as f64
}
