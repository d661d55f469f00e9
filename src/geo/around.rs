//! Distances around what cannot be crossed, such as water between two shores.
//!
//! Ways are measured cell by cell over a raster of the region, from a hundred landmarks; then every cell
//! gets coordinates in a few dimensions between which *straight lines* are the ways, as nearly as may be.
//! A covariance among them is positive definite whatever the barrier, which one of the ways themselves
//! need not be (Curriero 2006, doi:10.1007/s11004-006-9055-7); and a network that reads distances alone
//! needs not know. How far straight lines are off the ways is judged at sites that were no landmarks
//! ([`Around::stress`]).
//!
//! Sources: Dijkstra (1959) over 16 neighbours, its lengths off by ±1.4 % (Borgefors 1986,
//! doi:10.1016/S0734-189X(86)80047-0); de Silva & Tenenbaum (2004), "Sparse multidimensional scaling using
//! landmark points". Another way, by a process that is itself cut: Bakka et al. (2019), arXiv:1608.03787.

use std::{
    cmp::Ordering,
    collections::BinaryHeap,
    path::{Path, PathBuf},
    sync::Arc,
};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    covariates::pixel_at,
    crs::Crs,
    geotiff::Polygons,
    grid::{Extent, Grid, Resolution, Window},
};
use crate::error::{Error, Result};

/// Cells of the raster, about.
const CELLS: f64 = 100_000.0;
/// Share of the sites' longer side by which the raster reaches beyond them: no way is found farther out.
const MARGIN: f64 = 0.3;
/// Landmarks, at most, and sites that judge what was made of them.
const LANDMARKS: usize = 100;
const JUDGES: usize = 30;
/// Dimensions, at most.
const MOST: usize = 6;
/// Cells by which a place may stand off passable ground, as a harbour does.
const SNAP: i64 = 3;
/// Parts with sites that may be joined by crossings, at most.
const PARTS: usize = 50;
/// Stress above which straight lines say something else than the ways do.
pub const MOST_STRESS: f64 = 0.2;

/// Which side of some polygons can be passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Passable {
    /// What lies inside, such as land.
    Inside,
    /// What lies outside: the polygons are the barrier.
    Outside,
}

/// Coordinates between which straight lines are ways around a barrier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Around {
    /// Polygons, or a raster whose cells are not 0 inside.
    pub file: PathBuf,
    /// Which side of them can be passed.
    pub passable: Passable,
    /// Side of a cell, metres: what is narrower is not seen.
    pub cell: f64,
    /// Cells that can be reached.
    pub cells: usize,
    /// Places from which ways were measured.
    pub landmarks: usize,
    /// Coordinates of a place.
    pub dim: usize,
    /// Root mean square difference between straight lines and ways, of the ways' own.
    pub stress: f64,
    /// The relative differences that half, and 95 %, of pairs of sites stay below.
    pub off: [f64; 2],
    /// Parts that only a crossing joins are joined by the shortest: metres each.
    pub crossings: Vec<f64>,
    #[serde(skip)]
    raster: Option<Arc<Raster>>,
}

/// The cells.
#[derive(Debug, Clone, PartialEq)]
struct Raster {
    grid: Grid,
    /// `[cell, dim]`, metres; NaN where nobody gets.
    coordinates: Vec<f32>,
}

/// What ways are found on.
struct Ground {
    rows: i64,
    cols: i64,
    open: Vec<bool>,
    /// Metres along a cell.
    side: f64,
    /// Crossings by the cells they join, both ways.
    crossings: Vec<(usize, usize, f64)>,
}

/// A cell to go on from.
#[derive(PartialEq)]
struct Reached(f64, usize);

impl Eq for Reached {}
impl PartialOrd for Reached {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Reached {
    /// The nearest first, and of equally near ones the earlier.
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.total_cmp(&self.0).then(other.1.cmp(&self.1))
    }
}

impl Ground {
    fn at(&self, row: i64, col: i64) -> Option<usize> {
        let inside = (0..self.rows).contains(&row) && (0..self.cols).contains(&col);
        inside.then(|| (row * self.cols + col) as usize)
    }

    /// Cells one move away with the length of the move, over any ground or over what is open.
    fn moves(&self, from: usize, any: bool, mut to: impl FnMut(usize, f64)) {
        // Lengths over 16 neighbours are 0 to 2.7 % too long: half of that is taken off all.
        const LESS: f64 = 0.9866;
        let (row, col) = (from as i64 / self.cols, from as i64 % self.cols);
        let open = |r: i64, c: i64| self.at(row + r, col + c).filter(|i| any || self.open[*i]);
        for r in -2i64..=2 {
            for c in -2i64..=2 {
                let step = r * r + c * c;
                if ![1, 2, 5].contains(&step) {
                    continue;
                }
                let Some(next) = open(r, c) else { continue };
                // No move slips through a barrier that is one cell wide.
                let free = match step {
                    1 => true,
                    2 => open(r, 0).or(open(0, c)).is_some(),
                    _ => open(r / 2, c / 2).is_some() && open(r - r / 2, c - c / 2).is_some(),
                };
                if free {
                    to(next, LESS * (step as f64).sqrt() * self.side);
                }
            }
        }
        if !any {
            for (a, b, length) in &self.crossings {
                if *a == from {
                    to(*b, *length);
                } else if *b == from {
                    to(*a, *length);
                }
            }
        }
    }

    /// Ways to every cell from the nearest of `from`, metres; ∞ where there is none. `done` may end it at
    /// a cell, which is then returned.
    fn ways(
        &self,
        from: &[usize],
        any: bool,
        mut done: impl FnMut(usize) -> bool,
    ) -> (Vec<f32>, Option<usize>) {
        let mut ways = vec![f32::INFINITY; self.open.len()];
        let mut heap: BinaryHeap<Reached> = BinaryHeap::new();
        for cell in from {
            ways[*cell] = 0.0;
            heap.push(Reached(0.0, *cell));
        }
        while let Some(Reached(way, cell)) = heap.pop() {
            if way as f32 > ways[cell] {
                continue;
            }
            if done(cell) {
                return (ways, Some(cell));
            }
            self.moves(cell, any, |next, length| {
                let there = way + length;
                if (there as f32) < ways[next] {
                    ways[next] = there as f32;
                    heap.push(Reached(there, next));
                }
            });
        }
        (ways, None)
    }

    /// The nearest open cell to a place, in cells from the grid's corner.
    fn nearest_open(&self, row: f64, col: f64) -> Option<usize> {
        let (r, c) = (row.floor() as i64, col.floor() as i64);
        let around = (-SNAP..=SNAP).flat_map(|i| (-SNAP..=SNAP).map(move |j| (r + i, c + j)));
        let far = |(i, j): (i64, i64)| (i as f64 + 0.5 - row).hypot(j as f64 + 0.5 - col);
        let own = self.at(r, c).filter(|i| self.open[*i]);
        own.or_else(|| {
            let open = around.filter(|(i, j)| self.at(*i, *j).is_some_and(|k| self.open[k]));
            let best = open.min_by(|a, b| far(*a).total_cmp(&far(*b)))?;
            self.at(best.0, best.1).filter(|_| far(best) <= SNAP as f64)
        })
    }
}

impl Around {
    /// The ways between sites `x`, `y` of `crs`, on `plane`, around what `file` says.
    ///
    /// `rows` are the sites' rows in their table.
    ///
    /// # Errors
    /// [`Error::Input`] for a file without polygons or with no ground to pass, and for sites far from any.
    pub fn new(
        (passable, file): (Passable, &Path),
        crs: &Crs,
        plane: &Crs,
        [x, y]: [&[f64]; 2],
        rows: &[usize],
    ) -> Result<Self> {
        let (mut east, mut north) = (x.to_vec(), y.to_vec());
        crs.transform(plane, &mut east, &mut north)?;
        let sites = Extent::of(&east, &north)
            .ok_or_else(|| Error::input("the sites have no finite coordinates"))?;
        let extent = sites.grow(MARGIN);
        let side = (extent.width() * extent.height() / CELLS).sqrt() * plane.metres_per_unit();
        let grid = Grid::cover(extent, plane, Some(Resolution::Metres(side)))?;
        let open = open(passable, file, &grid)?;
        Self::over(grid, open, (passable, file), [&east, &north], rows)
    }

    /// The ways between sites on the plane of a grid, over its cells that are `open`.
    fn over(
        grid: Grid,
        open: Vec<bool>,
        (passable, file): (Passable, &Path),
        [east, north]: [&[f64]; 2],
        rows: &[usize],
    ) -> Result<Self> {
        let refuse = |what: String| {
            let flag = if passable == Passable::Inside { "--inside" } else { "--barrier" };
            Error::input(what).fact(flag, file.display())
        };
        let sites = Extent::of(east, north)
            .ok_or_else(|| Error::input("the sites have no finite coordinates"))?;
        let side = grid.pixel[0].abs() * grid.crs.metres_per_unit();
        let (tall, wide) = (grid.rows as i64, grid.cols as i64);
        let mut ground = Ground { rows: tall, cols: wide, open, side, crossings: Vec::new() };
        // Where sites stand.
        let place = |x: f64, y: f64| {
            ((y - grid.origin[1]) / grid.pixel[1], (x - grid.origin[0]) / grid.pixel[0])
        };
        let found: Vec<Option<usize>> = east
            .iter()
            .zip(north)
            .map(|(x, y)| {
                let (row, col) = place(*x, *y);
                ground.nearest_open(row, col)
            })
            .collect();
        let lost: Vec<usize> = (0..rows.len()).filter(|i| found[*i].is_none()).collect();
        if !lost.is_empty() {
            let shown: Vec<String> = lost.iter().take(8).map(|i| rows[*i].to_string()).collect();
            let more = if lost.len() > 8 { ", …" } else { "" };
            let far = format!("more than {:.3} km", SNAP as f64 * side / 1000.0);
            return Err(refuse(format!(
                "{} of {} sites stand in the barrier, {far} from passable ground",
                lost.len(),
                rows.len()
            ))
            .fact("rows", shown.join(", ") + more)
            .try_this(
                "--inside says what can be passed, --barrier what cannot: is it the other one? Else \
                 correct the coordinates, or leave the rows out",
            ));
        }
        let mut cells: Vec<usize> = found.into_iter().flatten().collect();
        cells.sort_unstable();
        cells.dedup();
        ground.join(&cells).map_err(|parts| {
            refuse(format!("the barrier cuts the sites into {parts} parts or more"))
                .try_this("no ways join them: leave the barrier out, or map parts on their own")
        })?;

        // Landmarks and judges among the sites and the ground around them: each time what is farthest.
        let candidates = ground.candidates(&cells, &grid, &sites);
        let mut landmarks = vec![cells[0]];
        let mut ways: Vec<Vec<f32>> = Vec::new();
        let mut least = vec![f32::INFINITY; ground.open.len()];
        loop {
            let from = [landmarks[landmarks.len() - 1]];
            let (one, _) = ground.ways(&from, false, |_| false);
            least.iter_mut().zip(&one).for_each(|(least, way)| *least = least.min(*way));
            ways.push(one);
            let far = |i: &usize| if least[*i].is_finite() { least[*i] } else { 0.0 };
            let next = candidates.iter().max_by(|a, b| far(a).total_cmp(&far(b)));
            match next.filter(|i| far(i) > 0.0 && landmarks.len() < LANDMARKS) {
                Some(next) => landmarks.push(*next),
                None => break,
            }
        }
        let (scaling, at_most) = Scaling::of(&landmarks, &ways);
        if at_most == 0 {
            return Err(refuse("the barrier leaves no ground between the sites".into())
                .try_this("is it the other side that can be passed?"));
        }
        let coordinates: Vec<f32> = (0..ground.open.len())
            .into_par_iter()
            .flat_map_iter(|cell| scaling.place(ways.iter().map(|w| w[cell])))
            .collect();
        let most = scaling.vectors.len();
        let mut around = Around {
            file: file.to_path_buf(),
            passable,
            cell: side,
            cells: ways[0].iter().filter(|w| w.is_finite()).count(),
            landmarks: landmarks.len(),
            dim: most,
            stress: f64::INFINITY,
            off: [0.0; 2],
            crossings: ground.crossings.iter().map(|(_, _, length)| *length).collect(),
            raster: None,
        };
        // Judged by ways that had no part in it: the fewest dimensions that are as good as any.
        let others: Vec<usize> = cells.iter().copied().filter(|c| !landmarks.contains(c)).collect();
        let judges: Vec<usize> = match others.len() {
            0 => cells.clone(),
            n => (0..n.min(JUDGES)).map(|i| others[i * n / n.min(JUDGES)]).collect(),
        };
        let truths: Vec<Vec<f32>> = judges
            .par_iter()
            .map(|judge| {
                let (ways, _) = ground.ways(&[*judge], false, |_| false);
                cells.iter().map(|cell| ways[*cell]).collect()
            })
            .collect();
        let mut scale = 1.0;
        for dim in 2.min(most)..=most {
            let line = |a: usize, b: usize| {
                let [a, b] = [a, b].map(|i| &coordinates[i * most..][..dim]);
                let square = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
                square.sum::<f64>().sqrt()
            };
            let pairs: Vec<[f64; 2]> = judges
                .iter()
                .zip(&truths)
                .flat_map(|(judge, ways)| {
                    let each = cells.iter().zip(ways).filter(move |(cell, _)| *cell != judge);
                    each.map(|(cell, way)| [line(*judge, *cell), f64::from(*way)])
                })
                .collect();
            let sum = |f: &dyn Fn(&[f64; 2]) -> f64| pairs.iter().map(f).sum::<f64>();
            let stretch = sum(&|[line, way]| line * way) / sum(&|[line, _]| line * line).max(1e-9);
            let wrong = sum(&|[line, way]| (stretch * line - way).powi(2));
            let stress = (wrong / sum(&|[_, way]| way * way).max(1e-9)).sqrt();
            if stress < 0.98 * around.stress {
                let mut off: Vec<f64> =
                    pairs.iter().map(|[line, way]| (stretch * line / way - 1.0).abs()).collect();
                off.sort_by(f64::total_cmp);
                let share = |p: f64| off.get(((off.len() as f64 * p) as usize).min(off.len() - 1));
                around.off = [0.5, 0.95].map(|p| share(p).copied().unwrap_or(0.0));
                (around.stress, around.dim, scale) = (stress, dim, stretch);
            }
        }
        if around.stress > MOST_STRESS {
            return Err(refuse(format!(
                "ways around the barrier cannot be laid out as straight lines: they are off by {:.0} %",
                100.0 * around.stress
            ))
            .fact("most", format!("{:.0} %", 100.0 * MOST_STRESS))
            .fact("dimensions", around.dim)
            .try_this("simplify the barrier, or map a smaller region"));
        }
        let dim = around.dim;
        let kept =
            |cell: &[f32]| cell[..dim].iter().map(|c| scale as f32 * c).collect::<Vec<f32>>();
        let coordinates = coordinates.chunks(most).flat_map(kept).collect();
        around.raster = Some(Arc::new(Raster { grid, coordinates }));
        Ok(around)
    }

    /// What there is to say about it.
    pub fn about(&self) -> Vec<String> {
        let side = match self.passable {
            Passable::Inside => "within",
            Passable::Outside => "around",
        };
        let mut said = vec![format!(
            "distances are ways {side} {}, cell by cell of {:.3} km (what is narrower is not seen), laid out \
             in {} dimensions: straight lines there are off the ways by {:.1} % (half of the pairs by less \
             than {:.1} %, 95 % by less than {:.0} %)",
            self.file.display(),
            self.cell / 1000.0,
            self.dim,
            100.0 * self.stress,
            100.0 * self.off[0],
            100.0 * self.off[1],
        )];
        if !self.crossings.is_empty() {
            let each = self.crossings.iter().take(8).map(|m| format!("{:.0} km", m / 1000.0));
            let more = if self.crossings.len() > 8 { ", …" } else { "" };
            said.push(format!(
                "{} parts of the passable ground that hold sites are joined by their shortest crossings: {}{more}",
                self.crossings.len() + 1,
                each.collect::<Vec<_>>().join(", ")
            ));
        }
        said
    }

    /// Coordinates of places in `crs`, `[place, dim]`, metres: NaN for those in the barrier or beyond the
    /// raster.
    ///
    /// # Errors
    /// [`Error::Input`] where it was read from a run record, which holds no cells.
    pub fn places(&self, crs: &Crs, x: &[f64], y: &[f64]) -> Result<Vec<f64>> {
        self.near(crs, x, y, SNAP)
    }

    /// Which places are on ground that sites can be reached from, or within a cell of it: what a map shows.
    ///
    /// # Errors
    /// As [`Around::places`].
    pub fn reached(&self, crs: &Crs, x: &[f64], y: &[f64]) -> Result<Vec<bool>> {
        let places = self.near(crs, x, y, 1)?;
        Ok(places.chunks(self.dim).map(|place| !place[0].is_nan()).collect())
    }

    /// Coordinates of places up to so many cells off passable ground.
    fn near(&self, crs: &Crs, x: &[f64], y: &[f64], snap: i64) -> Result<Vec<f64>> {
        let Some(Raster { grid, coordinates }) = self.raster.as_deref() else {
            return Err(Error::input("a run record does not hold the cells of a barrier")
                .fact("barrier", self.file.display())
                .try_this("run the command again"));
        };
        let (mut x, mut y) = (x.to_vec(), y.to_vec());
        crs.transform(&grid.crs, &mut x, &mut y)?;
        let dim = self.dim;
        let (rows, cols) = (grid.rows as i64, grid.cols as i64);
        let cell = |row: i64, col: i64| -> Option<&[f32]> {
            let inside = (0..rows).contains(&row) && (0..cols).contains(&col);
            let at = &coordinates
                [if inside { (row * cols + col) as usize * dim } else { return None }..];
            Some(&at[..dim]).filter(|c| c[0].is_finite())
        };
        let place = |(x, y): (f64, f64)| -> Vec<f64> {
            let row = (y - grid.origin[1]) / grid.pixel[1] - 0.5;
            let col = (x - grid.origin[0]) / grid.pixel[0] - 0.5;
            let (near_row, near_col) = (row.round() as i64, col.round() as i64);
            if !(row.is_finite() && col.is_finite()) {
                return vec![f64::NAN; dim];
            }
            if cell(near_row, near_col).is_none() {
                // Off the ground, as a harbour may be: the nearest cell of it.
                let around = (-snap..=snap)
                    .flat_map(|i| (-snap..=snap).map(move |j| (near_row + i, near_col + j)));
                let far = |(i, j): &(i64, i64)| (*i as f64 - row).hypot(*j as f64 - col);
                let found = around.filter(|(i, j)| cell(*i, *j).is_some());
                let best = found.min_by(|a, b| far(a).total_cmp(&far(b)));
                let best = best.filter(|at| far(at) <= snap as f64).and_then(|(i, j)| cell(i, j));
                return best
                    .map_or(vec![f64::NAN; dim], |c| c.iter().map(|v| f64::from(*v)).collect());
            }
            // Between the four cells around, those of them that its own one touches.
            let (r, c) = (row.floor() as i64, col.floor() as i64);
            let (down, right) = (row - r as f64, col - c as f64);
            let beside =
                [cell(2 * r + 1 - near_row, near_col), cell(near_row, 2 * c + 1 - near_col)];
            let (mut sum, mut all) = (vec![0.0; dim], 0.0);
            for (i, j) in [(r, c), (r, c + 1), (r + 1, c), (r + 1, c + 1)] {
                let across = i != near_row && j != near_col;
                if across && beside.iter().all(Option::is_none) {
                    continue;
                }
                let Some(corner) = cell(i, j) else { continue };
                let weight = (if i == r { 1.0 - down } else { down })
                    * (if j == c { 1.0 - right } else { right });
                all += weight;
                sum.iter_mut().zip(corner).for_each(|(s, v)| *s += weight * f64::from(*v));
            }
            sum.iter().map(|s| s / all).collect()
        };
        Ok(x.into_iter().zip(y).flat_map(place).collect())
    }
}

/// Which cells of a grid can be passed.
fn open(passable: Passable, file: &Path, grid: &Grid) -> Result<Vec<bool>> {
    let whole = Window { row: 0, col: 0, rows: grid.rows, cols: grid.cols };
    let extension = file.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    let inside = if ["tif", "tiff", "vrt", "img", "asc", "nc"].contains(&extension.as_str()) {
        let (x, y) = grid.centres(whole, &vec![true; grid.len()]);
        let values = pixel_at(file, &grid.crs, &x, &y)?;
        values.iter().map(|v| !v.is_nan() && *v != 0.0).collect()
    } else {
        Polygons::read(file, &grid.crs)?.cover(grid, whole)?
    };
    Ok(inside.into_iter().map(|inside| inside == (passable == Passable::Inside)).collect())
}

impl Ground {
    /// Joins the parts of the open ground that hold sites by their shortest crossings.
    ///
    /// # Errors
    /// How many parts there are, if too many.
    fn join(&mut self, cells: &[usize]) -> std::result::Result<(), usize> {
        let mut part = vec![usize::MAX; self.open.len()];
        let mut parts: Vec<usize> = Vec::new();
        for cell in cells {
            if part[*cell] == usize::MAX {
                let (ways, _) = self.ways(&[*cell], false, |_| false);
                ways.iter().zip(&mut part).filter(|(way, _)| way.is_finite()).for_each(
                    |(_, part)| {
                        *part = parts.len();
                    },
                );
                parts.push(*cell);
            }
            if parts.len() > PARTS {
                return Err(parts.len());
            }
        }
        // One after another, the nearest to what is joined already.
        let mut joined = vec![true];
        joined.resize(parts.len(), false);
        while joined.contains(&false) {
            let inside = |i: usize| part[i] != usize::MAX && joined[part[i]];
            let from: Vec<usize> = (0..part.len()).filter(|i| inside(*i)).collect();
            let other = |i: usize| part[i] != usize::MAX && !joined[part[i]];
            let (ways, end) = self.ways(&from, true, other);
            let Some(end) = end else { return Err(parts.len()) };
            // The cell it came from: the nearest of the joined ones to the end.
            let (row, col) = (end as i64 / self.cols, end as i64 % self.cols);
            let far = |i: &usize| {
                let (r, c) = (*i as i64 / self.cols - row, *i as i64 % self.cols - col);
                r * r + c * c
            };
            let start = from.iter().copied().min_by_key(far).unwrap_or(end);
            self.crossings.push((start, end, f64::from(ways[end])));
            joined[part[end]] = true;
        }
        Ok(())
    }

    /// Cells that may be landmarks: those with sites, and some of the open ones in their box.
    fn candidates(&self, cells: &[usize], grid: &Grid, sites: &Extent) -> Vec<usize> {
        let step = ((self.rows * self.cols) as f64 / 10_000.0).sqrt().ceil().max(1.0) as usize;
        let mut all = cells.to_vec();
        for row in (0..grid.rows).step_by(step) {
            for col in (0..grid.cols).step_by(step) {
                let (x, y) = grid.centre(row, col);
                let cell = row * grid.cols + col;
                if self.open[cell] && sites.contains(x, y) {
                    all.push(cell);
                }
            }
        }
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// Landmark multidimensional scaling.
struct Scaling {
    /// Mean squared way to each landmark.
    mean: Vec<f64>,
    /// Eigenvectors over √eigenvalue, `[dimension][landmark]`.
    vectors: Vec<Vec<f64>>,
}

impl Scaling {
    /// From ways `[landmark][cell]`; and how many dimensions it has.
    fn of(landmarks: &[usize], ways: &[Vec<f32>]) -> (Self, usize) {
        let n = landmarks.len();
        let square = |i: usize, j: usize| {
            // Ways there and back differ by rounding.
            let [a, b] = [ways[i][landmarks[j]], ways[j][landmarks[i]]].map(f64::from);
            (0.5 * (a + b)).powi(2)
        };
        let mean: Vec<f64> =
            (0..n).map(|i| (0..n).map(|j| square(i, j)).sum::<f64>() / n as f64).collect();
        let all = mean.iter().sum::<f64>() / n as f64;
        let inner: Vec<f64> = (0..n * n)
            .map(|k| -0.5 * (square(k / n, k % n) - mean[k / n] - mean[k % n] + all))
            .collect();
        let mut found = eigen(inner, n);
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        let largest = found.first().map_or(0.0, |(value, _)| *value);
        found.retain(|(value, _)| *value > 1e-4 * largest && *value > 0.0);
        found.truncate(MOST);
        let vectors: Vec<Vec<f64>> = found
            .into_iter()
            .map(|(value, vector)| vector.iter().map(|v| v / value.sqrt()).collect())
            .collect();
        let (dim, mut vectors) = (vectors.len(), vectors);
        // Sites have two coordinates, even where all ground is one line.
        if dim == 1 {
            vectors.push(vec![0.0; n]);
        }
        (Scaling { mean, vectors }, dim)
    }

    /// Coordinates of a cell from its ways to the landmarks; NaN where there are none.
    fn place(&self, ways: impl Iterator<Item = f32>) -> Vec<f32> {
        let off: Vec<f64> =
            ways.zip(&self.mean).map(|(w, mean)| f64::from(w).powi(2) - mean).collect();
        let along = |vector: &Vec<f64>| {
            let sum: f64 = vector.iter().zip(&off).map(|(v, o)| v * o).sum();
            if sum.is_finite() { (-0.5 * sum) as f32 } else { f32::NAN }
        };
        self.vectors.iter().map(along).collect()
    }
}

/// Eigenvalues of a symmetric matrix, row-major `[n, n]`, each with its vector: Jacobi's rotations
/// (Golub & Van Loan 2013, section 8.5).
fn eigen(mut a: Vec<f64>, n: usize) -> Vec<(f64, Vec<f64>)> {
    let mut v: Vec<f64> = (0..n * n).map(|k| f64::from(u8::from(k / n == k % n))).collect();
    let scale: f64 = a.iter().map(|x| x * x).sum();
    for _ in 0..60 {
        let off: f64 = (0..n * n).filter(|k| k / n != k % n).map(|k| a[k] * a[k]).sum();
        if off <= 1e-22 * scale {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[p * n + q] == 0.0 {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * a[p * n + q]);
                let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / t.hypot(1.0);
                let s = t * c;
                for k in 0..n {
                    let (x, y) = (a[k * n + p], a[k * n + q]);
                    (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (a[p * n + k], a[q * n + k]);
                    (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (v[k * n + p], v[k * n + q]);
                    (v[k * n + p], v[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    (0..n).map(|j| (a[j * n + j], (0..n).map(|k| v[k * n + j]).collect())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// A plane of 100 × 100 km, cells of 1 km.
    fn grid() -> Grid {
        let extent = Extent { west: 0.0, south: 0.0, east: 100.0, north: 100.0 };
        let plane = Crs::from_user("local:km").unwrap();
        Grid::cover(extent, &plane, Some(Resolution::Metres(1000.0))).unwrap()
    }

    fn over(n: usize, land: impl Fn(f64, f64) -> bool) -> Result<(Around, Vec<[f64; 2]>)> {
        let grid = grid();
        let centre = |i: usize| grid.centre(i / grid.cols, i % grid.cols);
        let open: Vec<bool> = (0..grid.len()).map(|i| land(centre(i).0, centre(i).1)).collect();
        let mut rng = Stream::new(3, "sites", 0);
        let mut sites = Vec::new();
        while sites.len() < n {
            let place = [rng.uniform(0.0, 100.0), rng.uniform(0.0, 100.0)];
            if land(place[0], place[1]) {
                sites.push(place);
            }
        }
        let [x, y] = [0, 1].map(|d| sites.iter().map(|s| s[d]).collect::<Vec<f64>>());
        let rows: Vec<usize> = (1..=n).collect();
        let made = Around::over(grid, open, (Passable::Inside, Path::new("land")), [&x, &y], &rows);
        Ok((made?, sites))
    }

    /// Straight lines between two places, km.
    fn apart(around: &Around, a: [f64; 2], b: [f64; 2]) -> f64 {
        let plane = Crs::from_user("local:km").unwrap();
        let places = around.places(&plane, &[a[0], b[0]], &[a[1], b[1]]).unwrap();
        let (a, b) = places.split_at(around.dim);
        a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt() / 1000.0
    }

    /// Land to the west and east of a strait from the north, 10 km wide and 70 km long.
    fn strait(x: f64, y: f64) -> bool {
        !((45.0..55.0).contains(&x) && y > 30.0)
    }

    /// Without a barrier ways are straight lines, to what 16 neighbours allow.
    #[test]
    fn open_ground_is_a_plane() {
        let (around, sites) = over(60, |_, _| true).unwrap();
        // A third dimension may take up that ways of 16 directions are no circles.
        let (stress, dim) = (around.stress, around.dim);
        assert!(stress < 0.02 && dim <= 3, "{stress}, {dim} dimensions");
        for pair in sites.windows(2).take(40) {
            let straight = (pair[0][0] - pair[1][0]).hypot(pair[0][1] - pair[1][1]);
            let found = apart(&around, pair[0], pair[1]);
            assert!((found - straight).abs() < 0.03 * straight + 0.5, "{found} of {straight}");
        }
    }

    /// Ten kilometres by water are as far as the way round by land, and neighbours stay neighbours.
    #[test]
    fn shores_of_a_strait_are_far_apart() {
        let (around, _) = over(120, strait).unwrap();
        assert!(around.stress < 0.15, "{around:?}");
        for (y, way) in [(90.0, 122.0), (60.0, 62.5)] {
            let found = apart(&around, [44.0, y], [56.0, y]);
            assert!((found / way - 1.0).abs() < 0.25, "at {y}: {found} of about {way}");
        }
        let beside = apart(&around, [20.0, 80.0], [25.0, 80.0]);
        assert!((2.5..7.5).contains(&beside), "{beside} of 5");
        let below = apart(&around, [40.0, 10.0], [60.0, 10.0]);
        assert!((below / 20.0 - 1.0).abs() < 0.3, "{below} of 20");
    }

    /// A barrier one cell wide, however it runs, is not slipped through; a gap in it is.
    #[test]
    fn thin_barriers_hold() {
        for slope in [0.0, 0.5, 1.0] {
            let wall = |x: f64, y: f64| ((x - 50.5) - slope * (y - 50.5)).abs() > 0.5 + 0.5 * slope;
            let open: Vec<bool> =
                (0..10_000).map(|i| wall((i % 100) as f64 + 0.5, (i / 100) as f64 + 0.5)).collect();
            let mut ground =
                Ground { rows: 100, cols: 100, open, side: 1.0, crossings: Vec::new() };
            let (ways, _) = ground.ways(&[50 * 100 + 2], false, |_| false);
            assert!(ways[50 * 100 + 98].is_infinite(), "slope {slope}");
            ground.open[50 * 100 + 50] = true;
            ground.open[50 * 100 + 49] = true;
            ground.open[50 * 100 + 51] = true;
            let (ways, _) = ground.ways(&[50 * 100 + 2], false, |_| false);
            assert!((ways[50 * 100 + 98] / 96.0 - 1.0).abs() < 0.03, "slope {slope}");
        }
    }

    /// Islands are joined by their shortest crossing, which is told.
    #[test]
    fn islands_are_joined() {
        let (around, _) = over(60, |x, _| !(45.0..55.0).contains(&x)).unwrap();
        assert_eq!(around.crossings.len(), 1);
        assert!((around.crossings[0] / 1000.0 - 11.0).abs() < 0.5, "{:?}", around.crossings);
        assert!(around.about()[1].contains("2 parts"), "{:?}", around.about());
    }

    /// Places near the shore are put on it, those out at sea have no coordinates, and sites there are
    /// named by row.
    #[test]
    fn places_at_sea_are_nowhere() {
        let land = |x: f64, _: f64| x < 60.0;
        let (around, _) = over(40, land).unwrap();
        let plane = Crs::from_user("local:km").unwrap();
        let places = around.places(&plane, &[61.0, 80.0, 500.0], &[50.0, 50.0, 50.0]).unwrap();
        let known: Vec<bool> = places.chunks(around.dim).map(|p| !p[0].is_nan()).collect();
        assert_eq!(known, [true, false, false]);
        let (x, y) = ([10.0, 20.0, 90.0], [10.0, 80.0, 50.0]);
        let open = (0..10_000).map(|i| land((i % 100) as f64, 0.0)).collect();
        let from = (Passable::Inside, Path::new("land"));
        let error = Around::over(grid(), open, from, [&x, &y], &[4, 5, 9]).unwrap_err();
        let said = format!("{error:?}");
        assert!(
            said.contains("1 of 3 sites stand in the barrier") && said.contains("\"9\""),
            "{said}"
        );
        let text = serde_json::to_string(&around).unwrap();
        let read: Around = serde_json::from_str(&text).unwrap();
        assert!(read.places(&plane, &[1.0], &[1.0]).is_err());
    }

    #[test]
    fn eigenvalues_of_a_small_matrix() {
        let mut found = eigen(vec![2.0, 1.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, -5.0], 3);
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        let values: Vec<f64> = found.iter().map(|f| f.0).collect();
        for (value, truth) in values.iter().zip([3.0, 1.0, -5.0]) {
            assert!((value - truth).abs() < 1e-12, "{values:?}");
        }
        assert!((found[0].1[0] - found[0].1[1]).abs() < 1e-12);
    }
}
