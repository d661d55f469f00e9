//! Areas: polygons with their attributes in, and tables of them out.
//!
//! GeoPackage and its kin come and go through GDAL (`areas/enabled.rs`); GeoParquet and CSV are
//! written by [`super::table`].

use std::path::{Path, PathBuf};

use super::{
    cover::{Ring, Shape},
    crs::Crs,
    grid::Grid,
    table::{Column, Columns},
};
use crate::error::{Error, Result};

#[cfg(feature = "gdal")]
#[path = "areas/enabled.rs"]
mod door;
#[cfg(not(feature = "gdal"))]
#[path = "areas/disabled.rs"]
mod door;

/// Longest piece of an edge that is moved to another system as one, as a share of its area's
/// longer side: a straight line on one plane is none on another.
const PIECE: f64 = 0.01;

/// Polygons of a layer, each with its attributes.
#[derive(Debug, Clone)]
pub struct Areas {
    /// The file.
    pub source: PathBuf,
    /// The layer.
    pub layer: String,
    /// What the coordinates mean.
    pub crs: Crs,
    /// Names of the attributes, in the order of the file.
    pub names: Vec<String>,
    /// Attributes, one row for each area.
    pub columns: Vec<Column>,
    /// Outlines, units of `crs`; no rings where a row has none that encloses something.
    pub rings: Vec<Vec<Ring>>,
    /// Outlines as they were read, well-known binary; empty where a row has none.
    pub wkb: Vec<Vec<u8>>,
    /// What was wrong with an area, or done to it; empty where nothing was.
    pub notes: Vec<String>,
}

impl Areas {
    /// Reads the polygons of a vector file (GeoPackage, GeoJSON, Shapefile, FlatGeobuf): of `layer`,
    /// or of the only layer that has some. Outlines that cross themselves are repaired, and the row
    /// says so; `local` is the system of a layer that names none.
    ///
    /// # Errors
    /// [`Error::Io`] without the file; [`Error::Input`] if it has no polygons, several layers of
    /// them, no CRS, or coordinates that are not finite.
    pub fn read(path: &Path, layer: Option<&str>, local: Option<&Crs>) -> Result<Self> {
        std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
        door::read(path, layer, local)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.rings.len()
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Smallest x and y, largest x and y of all outlines, moved to `crs`: x and y of their corners.
    ///
    /// # Errors
    /// [`Error::Input`] if they cannot be moved there.
    pub fn corners(&self, crs: &Crs) -> Result<(Vec<f64>, Vec<f64>)> {
        let rings = self.rings.iter().flatten();
        let (mut x, mut y): (Vec<f64>, Vec<f64>) =
            rings.flat_map(|ring| ring.corners.iter().map(|c| (c[0], c[1]))).unzip();
        self.crs.transform(crs, &mut x, &mut y).map_err(|e| self.unmoved(crs, &e))?;
        Ok((x, y))
    }

    /// Outlines in pixels of a grid.
    ///
    /// # Errors
    /// [`Error::Input`] if they cannot be moved to its system.
    pub fn shapes(&self, grid: &Grid) -> Result<Vec<Shape>> {
        let same = self.crs == grid.crs;
        self.rings
            .iter()
            .map(|rings| {
                let longest = PIECE * side(rings);
                let rings = rings.iter().map(|ring| {
                    let corners = match same {
                        true => ring.corners.clone(),
                        false => pieces(&ring.corners, longest),
                    };
                    let (mut x, mut y): (Vec<f64>, Vec<f64>) =
                        corners.iter().map(|c| (c[0], c[1])).unzip();
                    self.crs
                        .transform(&grid.crs, &mut x, &mut y)
                        .map_err(|e| self.unmoved(&grid.crs, &e))?;
                    let pixel = |(x, y): (&f64, &f64)| {
                        [(x - grid.origin[0]) / grid.pixel[0], (y - grid.origin[1]) / grid.pixel[1]]
                    };
                    let corners = x.iter().zip(&y).map(pixel).collect();
                    Ok(Ring { corners, hole: ring.hole })
                });
                Ok(Shape::new(&rings.collect::<Result<Vec<_>>>()?))
            })
            .collect()
    }

    fn unmoved(&self, to: &Crs, why: &Error) -> Error {
        Error::input("the areas cannot be moved to the map's system")
            .fact("file", self.source.display())
            .fact("areas", self.crs.name())
            .fact("map", to.name())
            .fact("reason", why)
            .try_this("cut the layer down to the region of the map first")
    }

    /// Every area so many times, all of them once and then again: a table with a row for each area and
    /// time.
    pub fn repeated(&self, times: usize) -> Self {
        let mut all = self.clone();
        for _ in 1..times {
            all.columns.iter_mut().zip(&self.columns).for_each(|(a, b)| a.extend(b.clone()));
            all.rings.extend_from_slice(&self.rings);
            all.wkb.extend_from_slice(&self.wkb);
            all.notes.extend_from_slice(&self.notes);
        }
        all
    }

    /// Writes the areas with more columns: GeoPackage, GeoParquet (.parquet), or CSV without outlines.
    /// `path` holds the whole file or is untouched. A name that is there already gets a number.
    ///
    /// # Errors
    /// [`Error::Input`] for another extension; [`Error::Axis`] if a column has not one cell for each
    /// area; [`Error::Io`] if the disk refuses.
    pub fn write(&self, path: &Path, more: &[(String, Column)]) -> Result<()> {
        let kind = Kind::of(path)?;
        let (mut names, mut columns) = (self.names.clone(), self.columns.clone());
        for (name, column) in more {
            if column.len() != self.len() {
                return Err(Error::axis("cells and areas", column.len(), self.len()));
            }
            names.push(unused(&names, name));
            columns.push(column.clone());
        }
        match kind {
            Kind::Csv => Columns::write(path, &names, [Ok(columns)]),
            Kind::Parquet => {
                let crs = door::projjson(&self.crs)?;
                Columns::write_geoparquet(path, &names, columns, &self.wkb, crs)
            }
            Kind::GeoPackage => {
                // Names that a GeoPackage keeps for itself.
                let own = |name: &String| match name.to_lowercase().as_str() {
                    "fid" | "geom" => format!("{name}_"),
                    _ => name.clone(),
                };
                let names: Vec<String> = names.iter().map(own).collect();
                door::write(path, self, &names, &columns)
            }
        }
    }
}

/// What a table of areas is written as.
enum Kind {
    Csv,
    Parquet,
    GeoPackage,
}

impl Kind {
    fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        match extension.to_str() {
            Some("csv") => Ok(Kind::Csv),
            Some("parquet" | "geoparquet") => Ok(Kind::Parquet),
            Some("gpkg") => Ok(Kind::GeoPackage),
            _ => Err(Error::input("a table of areas is written as .gpkg, .parquet or .csv")
                .fact("out", path.display())
                .try_this("for example --out districts.gpkg")),
        }
    }
}

/// Refuses a name that no table of areas can be written under.
///
/// # Errors
/// [`Error::Input`] for another extension.
pub fn check_name(path: &Path) -> Result<()> {
    Kind::of(path).map(|_| ())
}

/// `name`, or with a number where it is taken, without regard to case as in a GeoPackage.
fn unused(names: &[String], name: &str) -> String {
    let taken = |name: &str| names.iter().any(|n| n.eq_ignore_ascii_case(name));
    let numbered = (2..).map(|i| format!("{name}_{i}"));
    std::iter::once(name.to_string()).chain(numbered).find(|n| !taken(n)).unwrap_or_default()
}

/// The longer side of the box around rings.
fn side(rings: &[Ring]) -> f64 {
    let corners = || rings.iter().flat_map(|ring| &ring.corners);
    let length = |d: usize| {
        let (low, high) = corners()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), c| (a.min(c[d]), b.max(c[d])));
        high - low
    };
    length(0).max(length(1))
}

/// A closed line with corners added, so that none is farther than `longest` from the next.
fn pieces(corners: &[[f64; 2]], longest: f64) -> Vec<[f64; 2]> {
    let next = corners.iter().cycle().skip(1);
    let mut all = Vec::with_capacity(corners.len());
    for (a, b) in corners.iter().zip(next) {
        let apart = (b[0] - a[0]).hypot(b[1] - a[1]);
        let n = if longest > 0.0 { (apart / longest).ceil().clamp(1.0, 1000.0) } else { 1.0 };
        all.extend((0..n as usize).map(|i| {
            let part = i as f64 / n;
            [a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])]
        }));
    }
    all
}
