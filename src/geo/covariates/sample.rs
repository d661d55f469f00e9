//! A raster at places of any coordinate system: the same for sites and for the pixels of a map, so that
//! nothing can come between what was learnt and what it is applied to.

use std::{cell::RefCell, path::PathBuf, time::SystemTime};

use super::{Sampling, Source, Spec, same_world};
use crate::{
    error::{Error, Result},
    geo::{crs::Crs, geotiff::Raster, grid::Window},
};

/// Pixels of a raster in memory at once: 8 MB. Places too far apart for that are read in parts.
const WINDOW: usize = 1 << 20;
/// Pixels that one place may be averaged over.
const MOST_AVERAGED: usize = 1 << 22;
/// Rasters that a thread keeps open.
const OPEN: usize = 16;

/// A raster that stays open between the tiles of a map, with when its file was last changed.
struct Kept {
    file: PathBuf,
    changed: Option<SystemTime>,
    raster: Raster,
}

thread_local! {
    static KEPT: RefCell<Vec<Kept>> = const { RefCell::new(Vec::new()) };
}

/// A place on a raster: its number among those asked for, and where it is in pixels from the outer corner.
#[derive(Clone, Copy)]
struct Spot {
    at: usize,
    u: f64,
    v: f64,
    /// Pixels along both axes that the average reaches.
    reach: [f64; 2],
}

/// The covariate's raster at places of `crs`; NaN where there is no data.
///
/// # Errors
/// [`Error::Input`] if the file is no raster with that band, if it holds an undeclared customary no-data
/// value where it is read, or if the places cannot be moved to its system.
pub(super) fn at(spec: &Spec, crs: &Crs, x: &[f64], y: &[f64]) -> Result<Vec<f64>> {
    let Source::Raster { file, band } = &spec.source else {
        return Err(Error::input("a column of the survey says nothing about other places")
            .fact("covariate", spec)
            .try_this("give a raster with --covariate NAME=FILE"));
    };
    let changed = std::fs::metadata(file).and_then(|m| m.modified()).ok();
    let found = KEPT.with_borrow_mut(|kept| {
        let same = |k: &Kept| k.file == *file && k.changed == changed && changed.is_some();
        kept.iter().position(same).map(|i| kept.remove(i).raster)
    });
    let raster = match found {
        Some(raster) => raster,
        None => Raster::open(file)?,
    };
    let values = Reading { spec, raster: &raster, band: *band }.all(crs, x, y);
    KEPT.with_borrow_mut(|kept| {
        kept.truncate(OPEN - 1);
        kept.insert(0, Kept { file: file.clone(), changed, raster });
    });
    values
}

/// One reading of one raster.
struct Reading<'a> {
    spec: &'a Spec,
    raster: &'a Raster,
    band: usize,
}

impl Reading<'_> {
    fn all(&self, crs: &Crs, x: &[f64], y: &[f64]) -> Result<Vec<f64>> {
        let header = &self.raster.header;
        if self.band > self.raster.bands() {
            return Err(Error::input("a covariate's raster has no such band")
                .fact("covariate", &self.spec.name)
                .fact("file", self.raster.path.display())
                .fact("band", self.band)
                .fact("bands", self.raster.bands())
                .try_this("bands count from 1: NAME=FILE:1"));
        }
        let own = same_world(self.spec, &self.raster.path, header.crs.as_ref(), crs)?;
        let (mut x, mut y) = (x.to_vec(), y.to_vec());
        crs.transform(&own, &mut x, &mut y)?;
        let ([west, north], [dx, dy]) = (header.origin, header.pixel);
        let (cols, rows) = (header.cols as f64, header.rows as f64);
        let mut spots = Vec::with_capacity(x.len());
        for at in 0..x.len() {
            let (mut u, v) = ((x[at] - west) / dx, (y[at] - north) / dy);
            if own.is_geographic() {
                // Rasters may run from 0 to 360, or a map across the antimeridian.
                let turn = 360.0 / dx;
                let inside = |u: &f64| (0.0..=cols).contains(u);
                u = [u, u + turn, u - turn].into_iter().find(inside).unwrap_or(u);
            }
            if !((0.0..=cols).contains(&u) && (0.0..=rows).contains(&v)) {
                continue;
            }
            // On the far edge is still inside.
            let (u, v) = (u.min(cols - 1e-9), v.min(rows - 1e-9));
            spots.push(Spot { at, u, v, reach: self.reach(&own, y[at]) });
        }
        let mut values = vec![f64::NAN; x.len()];
        self.visit(&mut spots, &mut values)?;
        Ok(values)
    }

    /// How many pixels an average reaches along both axes, at ordinate `y`.
    fn reach(&self, own: &Crs, y: f64) -> [f64; 2] {
        let Sampling::Mean(radius) = self.spec.sampling else { return [1.0, 1.0] };
        let unit = own.metres_per_unit();
        let shrink =
            if own.is_geographic() { y.clamp(-89.0, 89.0).to_radians().cos() } else { 1.0 };
        let [dx, dy] = self.raster.header.pixel;
        [radius / (dx.abs() * unit * shrink), radius / (dy.abs() * unit)]
    }

    /// The pixels that spots may look at: at least one more on every side than they lie in.
    fn window(&self, spots: &[Spot]) -> Window {
        let header = &self.raster.header;
        let side = |of: &dyn Fn(&Spot) -> (f64, f64), most: usize| {
            let (low, high) = spots
                .iter()
                .map(of)
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (at, reach)| {
                    (low.min(at - reach), high.max(at + reach))
                });
            let first = (low.floor().max(0.0) as usize).min(most - 1);
            (first, (high.floor().max(0.0) as usize).min(most - 1) + 1 - first)
        };
        let (col, cols) = side(&|s| (s.u, s.reach[0].max(1.0)), header.cols);
        let (row, rows) = side(&|s| (s.v, s.reach[1].max(1.0)), header.rows);
        Window { row, col, rows, cols }
    }

    /// Reads all spots, in parts that fit into memory.
    fn visit(&self, spots: &mut [Spot], values: &mut [f64]) -> Result<()> {
        if spots.is_empty() {
            return Ok(());
        }
        let window = self.window(spots);
        if window.len() > WINDOW && spots.len() > 1 {
            let wide = window.cols >= window.rows;
            let key = |s: &Spot| if wide { s.u } else { s.v };
            let middle = spots.len() / 2;
            spots.select_nth_unstable_by(middle, |a, b| key(a).total_cmp(&key(b)));
            let (near, far) = spots.split_at_mut(middle);
            self.visit(near, values)?;
            return self.visit(far, values);
        }
        if window.len() > MOST_AVERAGED {
            return Err(Error::input("a covariate would be averaged over too many pixels")
                .fact("covariate", self.spec)
                .fact("pixels", window.len())
                .try_this(
                    "choose a smaller radius, or average the raster first (gdalwarp -r average)",
                ));
        }
        let (pixels, suspect) = self.raster.read(self.band, window)?;
        if let Some(value) = suspect {
            let shown = if value.abs() < 1e15 { value.to_string() } else { format!("{value:e}") };
            let declared = match self.raster.no_data(self.band) {
                Some(value) => value.to_string(),
                None => "none".into(),
            };
            return Err(Error::input(
                "a covariate's raster holds a value that can only mean \"no data\", and does not say so",
            )
            .fact("covariate", &self.spec.name)
            .fact("file", self.raster.path.display())
            .fact("band", self.band)
            .fact("value", &shown)
            .fact("no-data value it declares", declared)
            .try_this(format!("declare it: gdal_edit.py -a_nodata {shown} FILE")));
        }
        for spot in spots.iter() {
            values[spot.at] = self.value(spot, window, &pixels);
        }
        Ok(())
    }

    fn value(&self, spot: &Spot, window: Window, pixels: &[f64]) -> f64 {
        let here = |col: i64, row: i64| -> f64 {
            let (col, row) = (col - window.col as i64, row - window.row as i64);
            let inside =
                (0..window.cols as i64).contains(&col) && (0..window.rows as i64).contains(&row);
            match inside {
                true => pixels[row as usize * window.cols + col as usize],
                false => f64::NAN,
            }
        };
        let (col, row) = (spot.u.floor() as i64, spot.v.floor() as i64);
        let own = here(col, row);
        let average = |parts: &mut dyn Iterator<Item = (f64, f64)>| {
            let (sum, weight) = parts
                .filter(|(value, _)| !value.is_nan())
                .fold((0.0, 0.0), |(sum, all), (value, weight)| {
                    (sum + weight * value, all + weight)
                });
            if weight > 0.0 { sum / weight } else { f64::NAN }
        };
        match self.spec.sampling {
            Sampling::Nearest => own,
            Sampling::Bilinear if own.is_nan() => own,
            Sampling::Bilinear => {
                let (left, top) = ((spot.u - 0.5).floor(), (spot.v - 0.5).floor());
                let (fu, fv) = (spot.u - 0.5 - left, spot.v - 0.5 - top);
                let mut corners = [(0, 0), (1, 0), (0, 1), (1, 1)].into_iter().map(|(i, j)| {
                    let along = if i == 1 { fu } else { 1.0 - fu };
                    let down = if j == 1 { fv } else { 1.0 - fv };
                    (here(left as i64 + i, top as i64 + j), along * down)
                });
                average(&mut corners)
            }
            Sampling::Mean(_) => {
                let [a, b] = spot.reach;
                let (a, b) = (a.ceil() as i64, b.ceil() as i64);
                let mut around = (row - b..=row + b).flat_map(|j| {
                    (col - a..=col + a).filter_map(move |i| {
                        let across = (i as f64 + 0.5 - spot.u) / spot.reach[0];
                        let down = (j as f64 + 0.5 - spot.v) / spot.reach[1];
                        let near = across * across + down * down <= 1.0;
                        (near || (i, j) == (col, row)).then_some((i, j))
                    })
                });
                average(&mut around.by_ref().map(|(i, j)| (here(i, j), 1.0)))
            }
        }
    }
}
