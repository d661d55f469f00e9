//! People: a raster of population on another raster's grid, with nobody lost and nobody made.
//!
//! Counts are shared out by area and never interpolated: on one plane exactly, by the overlap of
//! rectangles; between planes by cutting each cell into small squares. Densities become counts by the
//! area of their cell on an equal-area plane, and go the same way.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    crs::Crs,
    geotiff::Raster,
    grid::{Grid, Window},
};
use crate::error::{Error, Result};

/// Cells of a raster that are looked at together, about.
const STRIP: usize = 500_000;
/// Squares along a cell that is shared out between planes: at least three to a pixel of the target.
const SQUARES: [f64; 2] = [1.0, 24.0];

/// What a raster of population says of each cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// People in the cell.
    Counts,
    /// People per square kilometre.
    Density,
}

impl Measure {
    /// What the words about a raster say: of its unit, its description, its file. Nothing where they
    /// do not say, or say both.
    ///
    /// ```
    /// use isopleth::geo::people::Measure;
    /// assert_eq!(Measure::told("people", "", "pop.tif"), Some(Measure::Counts));
    /// assert_eq!(Measure::told("people/km2", "", "pop.tif"), Some(Measure::Density));
    /// assert_eq!(Measure::told("", "", "gha_ppp_2020.tif"), Some(Measure::Counts));
    /// assert_eq!(Measure::told("", "Population density", "a.tif"), Some(Measure::Density));
    /// assert_eq!(Measure::told("", "", "pop.tif"), None);
    /// ```
    pub fn told(unit: &str, description: &str, file: &str) -> Option<Self> {
        let all = format!("{unit} {description} {file}").to_lowercase();
        let any = |words: &[&str]| words.iter().any(|word| all.contains(word));
        let density = any(&["densit", "/km", "/ km", "per km", "per sq", "km-2", "km^-2", "_pd_"]);
        let heads = ["people", "persons", "inhabitants", "person", "count"];
        let said = |text: &str| heads.contains(&text.trim().to_lowercase().as_str());
        let counts = any(&["count", "ppp", "per pixel", "per cell", "/pixel", "/cell"])
            || said(unit)
            || said(description);
        match (counts, density) {
            (true, false) => Some(Measure::Counts),
            (false, true) => Some(Measure::Density),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Measure::Counts => "counts",
            Measure::Density => "density",
        }
    }
}

impl std::str::FromStr for Measure {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Measure::Counts, Measure::Density].into_iter().find(|m| m.name() == text).ok_or_else(
            || {
                Error::input(format!("`{text}` is nothing that a raster of population holds"))
                    .try_this("write counts (people in each cell) or density (people per km²)")
            },
        )
    }
}

/// People in each pixel of a grid.
#[derive(Debug, Clone)]
pub struct People {
    /// The raster they come from.
    pub source: PathBuf,
    /// What it was taken to hold.
    pub measure: Measure,
    /// Whether somebody said so, rather than the file.
    pub asked: bool,
    /// `[rows × cols]` of the grid, row-major.
    pub pixels: Vec<f32>,
    /// People in those cells of the raster that reach the grid's neighbourhood.
    pub near: f64,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl People {
    /// Reads a raster of population onto `grid`, wanted pixels or not. `plane` is an equal-area plane
    /// about the region, on which the cells of densities are measured.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Input`] if the raster cannot be read, has no CRS, holds numbers below
    /// zero, lies elsewhere, or says neither counts nor density while nobody was `asked`.
    pub fn read(path: &Path, grid: &Grid, asked: Option<Measure>, plane: &Crs) -> Result<Self> {
        let raster = Raster::open(path)?;
        let refuse = |what: &str| Error::input(what).fact("population", path.display());
        let header = &raster.header;
        let own = match &header.crs {
            Some(own) => own.clone(),
            None if grid.crs.is_local() => grid.crs.clone(),
            None => {
                return Err(refuse("the population has no coordinate reference system")
                    .try_this("give it one, for example with gdal_edit.py -a_srs EPSG:4326 FILE"));
            }
        };
        let [unit, description] = raster.words();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let measure = match asked.or(Measure::told(&unit, &description, &file)) {
            Some(measure) => measure,
            None => {
                let or = |text: String| if text.is_empty() { "none".into() } else { text };
                return Err(refuse(
                    "the population may be counts or densities: the file does not say",
                )
                .fact("unit", or(unit))
                .fact("description", or(description))
                .try_this(
                    "say --population-is counts (people in each cell) or --population-is \
                         density (people per km²)",
                ));
            }
        };
        let cells = Grid {
            rows: header.rows,
            cols: header.cols,
            origin: header.origin,
            pixel: header.pixel,
            crs: own,
            valid: None,
            notes: Vec::new(),
        };
        let Some(part) = neighbourhood(&cells, grid)? else {
            return Err(refuse("the population lies elsewhere than the map")
                .fact("population", format!("{:?} ({})", cells.extent(), cells.crs.name()))
                .fact("map", format!("{:?} ({})", grid.extent(), grid.crs.name()))
                .try_this("check that both are about the same place"));
        };
        let mut people = People {
            source: path.to_path_buf(),
            measure,
            asked: asked.is_some(),
            pixels: vec![0.0; grid.len()],
            near: 0.0,
            notes: Vec::new(),
        };
        let mut sentinels = 0;
        let strip = (STRIP / part.cols).clamp(1, part.rows);
        for row in (part.row..part.row + part.rows).step_by(strip) {
            let rows = strip.min(part.row + part.rows - row);
            let window = Window { row, rows, ..part };
            let mut data = raster.data(window)?;
            sentinels += data.sentinels;
            if let Some(i) = data.values.iter().position(|v| *v < 0.0) {
                return Err(refuse("the population is below zero somewhere")
                    .fact("value", data.values[i])
                    .fact(
                        "row and column",
                        format!(
                            "{}, {}",
                            window.row + i / window.cols + 1,
                            window.col + i % window.cols + 1
                        ),
                    )
                    .try_this(
                        "declare its no-data value, for example with gdal_edit.py -a_nodata",
                    ));
            }
            if measure == Measure::Density {
                let areas = areas(&cells, window, plane)?;
                data.values.iter_mut().zip(areas).for_each(|(v, area)| *v *= area);
            }
            people.near += data.values.iter().filter(|v| v.is_finite()).sum::<f64>();
            people.share(&cells, window, &data.values, grid)?;
        }
        if sentinels > 0 {
            people.notes.push(format!(
                "{sentinels} cells of the population hold −9999 or −3.4e38 although it declares no \
                 such no-data value; taken as nobody"
            ));
        }
        if people.near <= 0.0 {
            return Err(refuse("nobody lives on the map, by this population")
                .try_this("check its first band, and that both are about the same place"));
        }
        Ok(people)
    }

    /// Shares the people of a window of cells out to the grid's pixels.
    fn share(&mut self, cells: &Grid, window: Window, values: &[f64], grid: &Grid) -> Result<()> {
        if cells.crs == grid.crs || (cells.crs.is_local() && grid.crs.is_local()) {
            let unit = cells.crs.metres_per_unit() / grid.crs.metres_per_unit();
            let spans =
                |d: usize, first: usize, count: usize, most: usize| -> Vec<Vec<(usize, f64)>> {
                    let edge = |i: usize| {
                        let place = (cells.origin[d] + i as f64 * cells.pixel[d]) * unit;
                        let at = (place - grid.origin[d]) / grid.pixel[d];
                        // Rounding is no overlap.
                        if (at - at.round()).abs() < 1e-7 { at.round() } else { at }
                    };
                    (first..first + count).map(|i| overlaps(edge(i), edge(i + 1), most)).collect()
                };
            let cols = spans(0, window.col, window.cols, grid.cols);
            let rows = spans(1, window.row, window.rows, grid.rows);
            for (i, value) in values.iter().enumerate().filter(|(_, v)| **v > 0.0) {
                for (row, down) in &rows[i / window.cols] {
                    for (col, along) in &cols[i % window.cols] {
                        self.pixels[row * grid.cols + col] += (value * down * along) as f32;
                    }
                }
            }
            return Ok(());
        }
        let side = squares(cells, window, grid)?;
        let (mut x, mut y, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        let each = 1.0 / (side * side) as f64;
        for (i, value) in values.iter().enumerate().filter(|(_, v)| **v > 0.0) {
            let (row, col) = (window.row + i / window.cols, window.col + i % window.cols);
            for square in 0..side * side {
                let part = |k: usize| (k as f64 + 0.5) / side as f64;
                x.push(cells.origin[0] + (col as f64 + part(square % side)) * cells.pixel[0]);
                y.push(cells.origin[1] + (row as f64 + part(square / side)) * cells.pixel[1]);
            }
            parts.push(value * each);
        }
        cells.crs.transform(&grid.crs, &mut x, &mut y)?;
        for (i, (x, y)) in x.iter().zip(&y).enumerate() {
            let col = ((x - grid.origin[0]) / grid.pixel[0]).floor();
            let row = ((y - grid.origin[1]) / grid.pixel[1]).floor();
            if col >= 0.0 && row >= 0.0 && (col as usize) < grid.cols && (row as usize) < grid.rows
            {
                let at = row as usize * grid.cols + col as usize;
                self.pixels[at] += parts[i / (side * side)] as f32;
            }
        }
        Ok(())
    }
}

/// Which of `most` unit intervals from 0 on a span meets, each with the share of the span in it.
fn overlaps(a: f64, b: f64, most: usize) -> Vec<(usize, f64)> {
    let (low, high) = (a.min(b), a.max(b));
    let first = low.floor().max(0.0) as usize;
    let end = (high.ceil().max(0.0) as usize).min(most);
    (first..end)
        .map(|i| (i, (high.min(i as f64 + 1.0) - low.max(i as f64)) / (high - low)))
        .filter(|(_, share)| *share > 0.0)
        .collect()
}

/// Squares along the side of a cell, so that there are three to the grid's pixel.
fn squares(cells: &Grid, window: Window, grid: &Grid) -> Result<usize> {
    let (row, col) = (window.row + window.rows / 2, window.col + window.cols / 2);
    let corner = |i: usize, d: usize| cells.origin[d] + i as f64 * cells.pixel[d];
    let mut x = [corner(col, 0), corner(col + 1, 0), corner(col, 0)];
    let mut y = [corner(row, 1), corner(row, 1), corner(row + 1, 1)];
    cells.crs.transform(&grid.crs, &mut x, &mut y)?;
    let side = |i: usize| (x[i] - x[0]).hypot(y[i] - y[0]);
    let pixel = grid.pixel[0].abs().min(grid.pixel[1].abs());
    Ok((3.0 * side(1).max(side(2)) / pixel).ceil().clamp(SQUARES[0], SQUARES[1]) as usize)
}

/// The cells that may reach the grid: those in the box around its border, a cell more on each side.
fn neighbourhood(cells: &Grid, grid: &Grid) -> Result<Option<Window>> {
    const STEPS: usize = 64;
    let edge = grid.extent();
    let (mut x, mut y) = (Vec::new(), Vec::new());
    for i in 0..=STEPS {
        let part = i as f64 / STEPS as f64;
        let (u, v) = (edge.west + part * edge.width(), edge.south + part * edge.height());
        x.extend([u, u, edge.west, edge.east]);
        y.extend([edge.south, edge.north, v, v]);
    }
    grid.crs.transform(&cells.crs, &mut x, &mut y)?;
    let span = |v: &[f64], d: usize, most: usize| -> Option<[usize; 2]> {
        let at = v.iter().map(|v| (v - cells.origin[d]) / cells.pixel[d]);
        let (low, high) =
            at.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        if high <= 0.0 || low >= most as f64 {
            return None;
        }
        let first = (low.floor() - 1.0).max(0.0) as usize;
        Some([first, ((high.ceil() + 1.0) as usize).min(most)])
    };
    let (cols, rows) = (span(&x, 0, cells.cols), span(&y, 1, cells.rows));
    Ok(cols.zip(rows).map(|([west, east], [north, south])| Window {
        row: north,
        col: west,
        rows: south - north,
        cols: east - west,
    }))
}

/// Areas of the cells of a window, km², row-major: of the quadrilaterals of their corners on an
/// equal-area plane.
///
/// # Errors
/// [`Error::Input`] if they cannot be moved there.
pub fn areas(grid: &Grid, window: Window, plane: &Crs) -> Result<Vec<f64>> {
    let square = (plane.metres_per_unit() / 1000.0).powi(2);
    let line = |row: usize| -> Result<[Vec<f64>; 2]> {
        let corners = window.col..=window.col + window.cols;
        let mut x: Vec<f64> = corners.map(|i| grid.origin[0] + i as f64 * grid.pixel[0]).collect();
        let mut y = vec![grid.origin[1] + row as f64 * grid.pixel[1]; x.len()];
        grid.crs.transform(plane, &mut x, &mut y)?;
        Ok([x, y])
    };
    let mut all = Vec::with_capacity(window.len());
    let mut north = line(window.row)?;
    for row in window.row..window.row + window.rows {
        let south = line(row + 1)?;
        for i in 0..window.cols {
            // Half the cross product of the diagonals.
            let across = [south[0][i + 1] - north[0][i], south[1][i + 1] - north[1][i]];
            let back = [south[0][i] - north[0][i + 1], south[1][i] - north[1][i + 1]];
            all.push(0.5 * (across[0] * back[1] - across[1] * back[0]).abs() * square);
        }
        north = south;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_shared_out_whole() {
        assert_eq!(overlaps(0.5, 2.0, 5), [(0, 1.0 / 3.0), (1, 2.0 / 3.0)]);
        assert_eq!(overlaps(3.0, 2.0, 5), [(2, 1.0)]);
        assert_eq!(overlaps(-1.0, 1.0, 5), [(0, 0.5)]);
        assert_eq!(overlaps(4.5, 6.5, 5), [(4, 0.25)]);
        assert!(overlaps(7.0, 8.0, 5).is_empty() && overlaps(-3.0, -2.0, 5).is_empty());
    }
}
