//! Grid: the pixels of a map, which of them are wanted, and windows over them.
//!
//! Geometry is f64 in the units of the grid's own CRS and is never passed through anything that
//! rounds: a map made like another raster lines up with it bit for bit.

use std::{fmt, path::Path, str::FromStr};

use super::{
    crs::Crs,
    geotiff::{self, Raster},
};
use crate::error::{Error, Result};

/// Pixels that a default map has, about.
pub const DEFAULT_PIXELS: f64 = 250_000.0;

/// Pixels beyond which a grid is taken for a slip in the resolution.
pub const MOST_PIXELS: f64 = 4e9;

/// A rectangle of pixels: rows `row … row + rows`, columns `col … col + cols`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    /// First row.
    pub row: usize,
    /// First column.
    pub col: usize,
    /// Rows, ≥ 1.
    pub rows: usize,
    /// Columns, ≥ 1.
    pub cols: usize,
}

impl Window {
    /// Pixels in the window.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// No pixels at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A rectangle of coordinates, in the units of some CRS.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extent {
    /// Smallest x.
    pub west: f64,
    /// Smallest y.
    pub south: f64,
    /// Largest x.
    pub east: f64,
    /// Largest y.
    pub north: f64,
}

impl Extent {
    /// The bounding box of places; `None` without a finite one.
    pub fn of(x: &[f64], y: &[f64]) -> Option<Self> {
        let range = |v: &[f64]| {
            v.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &v| (a.min(v), b.max(v)))
        };
        let ((west, east), (south, north)) = (range(x), range(y));
        let extent = Extent { west, south, east, north };
        [west, south, east, north].iter().all(|v| v.is_finite()).then_some(extent)
    }

    /// West to east.
    pub fn width(&self) -> f64 {
        self.east - self.west
    }

    /// South to north.
    pub fn height(&self) -> f64 {
        self.north - self.south
    }

    /// Grown on every side by `share` of the longer side.
    ///
    /// ```
    /// use isopleth::geo::grid::Extent;
    /// let grown = Extent { west: 0.0, south: 0.0, east: 10.0, north: 4.0 }.grow(0.1);
    /// assert_eq!(grown, Extent { west: -1.0, south: -1.0, east: 11.0, north: 5.0 });
    /// ```
    pub fn grow(&self, share: f64) -> Self {
        let by = share * self.width().max(self.height());
        Extent {
            west: self.west - by,
            south: self.south - by,
            east: self.east + by,
            north: self.north + by,
        }
    }

    /// The part of it, in degrees, that is on the globe.
    pub fn on_globe(self) -> Self {
        Extent {
            west: self.west.max(-180.0),
            south: self.south.max(-90.0),
            east: self.east.min(180.0),
            north: self.north.min(90.0),
        }
    }

    /// Whether a place lies inside or on the edge.
    pub fn contains(&self, x: f64, y: f64) -> bool {
        (self.west..=self.east).contains(&x) && (self.south..=self.north).contains(&y)
    }
}

/// Length of a pixel's side, with its unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Resolution {
    /// Metres on the ground.
    Metres(f64),
    /// Degrees of longitude and latitude.
    Degrees(f64),
}

impl FromStr for Resolution {
    type Err = Error;

    /// ```
    /// use isopleth::geo::grid::Resolution;
    /// assert_eq!("5km".parse::<Resolution>()?, Resolution::Metres(5000.0));
    /// assert_eq!("0.05deg".parse::<Resolution>()?, Resolution::Degrees(0.05));
    /// assert!("5".parse::<Resolution>().is_err()); // 5 what?
    /// # Ok::<(), isopleth::Error>(())
    /// ```
    fn from_str(text: &str) -> Result<Self> {
        let refuse = |what: &str| {
            Error::input(format!("the resolution `{text}` {what}"))
                .try_this("write a length with its unit, such as 5km, 500m or 0.05deg")
        };
        let text = text.trim();
        let digits = text.trim_end_matches(|c: char| c.is_alphabetic() || c == '°');
        let value: f64 =
            digits.trim().parse().map_err(|_| refuse("does not start with a number"))?;
        if !(value.is_finite() && value > 0.0) {
            return Err(refuse("is not above zero"));
        }
        match text[digits.len()..].to_ascii_lowercase().as_str() {
            "m" | "metre" | "metres" | "meter" | "meters" => Ok(Resolution::Metres(value)),
            "km" => Ok(Resolution::Metres(1000.0 * value)),
            "deg" | "degree" | "degrees" | "°" => Ok(Resolution::Degrees(value)),
            "" => Err(refuse("has no unit")),
            _ => Err(refuse("has a unit we do not know")),
        }
    }
}

impl fmt::Display for Resolution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Resolution::Metres(m) if *m >= 1000.0 => write!(f, "{} km", short(m / 1000.0)),
            Resolution::Metres(m) => write!(f, "{} m", short(*m)),
            Resolution::Degrees(d) => write!(f, "{}°", short(*d)),
        }
    }
}

/// A number with at most four decimals and no trailing zeros.
fn short(value: f64) -> String {
    format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_string()
}

/// One bit for each pixel of a grid: a million pixels are 125 kB.
#[derive(Debug, Clone, PartialEq)]
pub struct Mask {
    cols: usize,
    bits: Vec<u64>,
}

impl Mask {
    /// A mask with no pixel wanted.
    pub fn none(rows: usize, cols: usize) -> Self {
        Mask { cols, bits: vec![0; (rows * cols).div_ceil(64)] }
    }

    /// Whether a pixel is wanted.
    pub fn get(&self, row: usize, col: usize) -> bool {
        let i = row * self.cols + col;
        self.bits[i / 64] >> (i % 64) & 1 == 1
    }

    /// Says whether a pixel is wanted.
    pub fn set(&mut self, row: usize, col: usize, wanted: bool) {
        let i = row * self.cols + col;
        let bit = 1 << (i % 64);
        if wanted { self.bits[i / 64] |= bit } else { self.bits[i / 64] &= !bit }
    }

    /// Pixels wanted.
    pub fn count(&self) -> usize {
        self.bits.iter().map(|b| b.count_ones() as usize).sum()
    }
}

/// The pixels of a map.
///
/// Pixel (`row`, `col`) has its centre at `origin + (col + ½, row + ½) · pixel`.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// Rows of pixels.
    pub rows: usize,
    /// Columns of pixels.
    pub cols: usize,
    /// Outer corner of the first pixel, CRS units.
    pub origin: [f64; 2],
    /// (dx, dy) of a pixel, CRS units; dy < 0 where the first row is the northernmost.
    pub pixel: [f64; 2],
    /// What the coordinates mean.
    pub crs: Crs,
    /// Pixels wanted; all of them if `None`.
    pub valid: Option<Mask>,
    /// What had to be guessed about the grid, for the user to read.
    pub notes: Vec<String>,
}

impl Grid {
    /// The grid of a GeoTIFF (or any raster GDAL reads): its geometry bit for bit, and as wanted
    /// pixels those where its first band has data.
    ///
    /// # Errors
    /// [`Error::Input`] if it cannot be read whole, has no CRS, or is rotated or sheared.
    pub fn read(path: &Path) -> Result<Self> {
        let raster = Raster::open(path)?;
        let Some(crs) = raster.header.crs.clone() else {
            return Err(Error::input("the grid has no coordinate reference system")
                .fact("file", path.display())
                .try_this("give it one, for example with gdal_edit.py -a_srs EPSG:32631 FILE"));
        };
        Self::from_raster(&raster, crs)
    }

    /// The grid of a raster on a plane of its own, which may say nothing of its CRS.
    ///
    /// # Errors
    /// As [`Grid::read`], and if the raster does carry a CRS that is not `crs`.
    pub fn read_local(path: &Path, crs: &Crs) -> Result<Self> {
        let raster = Raster::open(path)?;
        match &raster.header.crs {
            Some(own) if !own.is_local() => {
                Err(Error::input("the sites are on a local plane and the grid is not")
                    .fact("file", path.display())
                    .fact("grid", own.name())
                    .fact("sites", crs.name())
                    .try_this("name the CRS of the sites with --crs, or give a local grid"))
            }
            own => Self::from_raster(&raster, own.clone().unwrap_or_else(|| crs.clone())),
        }
    }

    fn from_raster(raster: &Raster, crs: Crs) -> Result<Self> {
        let header = &raster.header;
        let mut grid = Grid {
            rows: header.rows,
            cols: header.cols,
            origin: header.origin,
            pixel: header.pixel,
            crs,
            valid: None,
            notes: Vec::new(),
        };
        let mut mask = Mask::none(grid.rows, grid.cols);
        let (mut wanted, mut sentinels) = (0, 0);
        // Strips of whole rows: what is stored in lines is read once.
        let strip = (1_000_000 / grid.cols).clamp(1, grid.rows);
        for row in (0..grid.rows).step_by(strip) {
            let rows = strip.min(grid.rows - row);
            let window = Window { row, col: 0, rows, cols: grid.cols };
            let data = raster.data(window)?;
            sentinels += data.sentinels;
            for (i, &has) in data.valid.iter().enumerate() {
                if has {
                    mask.set(row + i / grid.cols, i % grid.cols, true);
                    wanted += 1;
                }
            }
        }
        if wanted == 0 {
            return Err(Error::input("the grid has no pixel with data")
                .fact("file", raster.path.display())
                .try_this("its first band says where to map: give a raster with data there"));
        }
        if sentinels > 0 {
            grid.notes.push(format!(
                "{sentinels} pixels of the grid hold −9999 or −3.4e38 although it declares no such \
                 no-data value; taken as no data"
            ));
        }
        grid.valid = (wanted < grid.rows * grid.cols).then_some(mask);
        Ok(grid)
    }

    /// A grid that covers an extent, all its pixels wanted. Edges fall on multiples of the pixel,
    /// so that maps of one resolution line up. Without a resolution, a round one that gives about
    /// [`DEFAULT_PIXELS`].
    ///
    /// # Units
    /// `extent` in units of `crs`.
    /// # Errors
    /// [`Error::Input`] if the resolution is in degrees and `crs` is not (or the reverse), is
    /// coarser than the extent, or asks for more than [`MOST_PIXELS`].
    pub fn cover(extent: Extent, crs: &Crs, resolution: Option<Resolution>) -> Result<Self> {
        let longer = extent.width().max(extent.height());
        if !(longer.is_finite() && longer > 0.0) {
            return Err(Error::input("there is no area to map: the sites are all at one place")
                .try_this("give the grid with --like GRID.tif"));
        }
        let step = match resolution {
            None => {
                // A strip one site wide still gets some height.
                let side = |length: f64| length.max(0.05 * longer);
                round_step((side(extent.width()) * side(extent.height()) / DEFAULT_PIXELS).sqrt())
            }
            Some(Resolution::Degrees(degrees)) if crs.is_geographic() => degrees,
            Some(Resolution::Metres(metres)) if !crs.is_geographic() => {
                metres / crs.metres_per_unit()
            }
            Some(resolution) => {
                let help = if crs.is_geographic() {
                    "the grid is in degrees: write the resolution as 0.05deg, or choose a plane \
                     with --crs-out"
                } else {
                    "the grid is on a plane: write the resolution as 5km or 500m, or ask for a \
                     grid in degrees with --crs-out EPSG:4326"
                };
                return Err(Error::input("the resolution and the grid have different units")
                    .fact("resolution", resolution)
                    .fact("grid", crs.name())
                    .try_this(help));
            }
        };
        let cells = |low: f64, high: f64| {
            let first = (low / step + 1e-9).floor();
            (first, ((high / step - 1e-9).ceil() - first).max(1.0))
        };
        let ((left, mut cols), (mut bottom, mut rows)) =
            (cells(extent.west, extent.east), cells(extent.south, extent.north));
        if crs.is_geographic() {
            // No place is beyond a pole, and none is twice on a map.
            let centre = |row: f64| (bottom + row + 0.5) * step;
            let beyond = |row: &f64| centre(*row).abs() > 90.0;
            let (under, over) = (beyond(&0.0), rows > 1.0 && beyond(&(rows - 1.0)));
            bottom += f64::from(u8::from(under));
            rows -= f64::from(u8::from(under) + u8::from(over));
            cols = cols.min((360.0 / step + 1e-9).floor().max(1.0));
        }
        let facts = |error: Error| {
            let size = |v: f64| format!("{:.4}", v / step);
            error
                .fact(
                    "extent in pixels",
                    format!("{} × {}", size(extent.width()), size(extent.height())),
                )
                .fact("pixel", format!("{step} (units of {})", crs.name()))
        };
        let pixels = rows * cols;
        if pixels.is_nan() || pixels > MOST_PIXELS {
            return Err(facts(Error::input(format!("the grid would have {pixels:.1e} pixels")))
                .try_this("choose a coarser --resolution, and check its unit"));
        }
        if step > longer {
            return Err(facts(Error::input("the resolution is coarser than the area to map"))
                .try_this("choose a finer --resolution, and check its unit"));
        }
        Ok(Grid {
            rows: rows as usize,
            cols: cols as usize,
            origin: [left * step, (bottom + rows) * step],
            pixel: [step, -step],
            crs: crs.clone(),
            valid: None,
            notes: Vec::new(),
        })
    }

    /// Keeps as wanted only pixels whose centre lies inside the polygons of a vector file.
    ///
    /// # Errors
    /// [`Error::Input`] if the file has no polygon or no CRS, or none of it lies on the grid.
    pub fn clip(self, area: &Path) -> Result<Self> {
        let polygons = geotiff::Polygons::read(area, &self.crs)?;
        self.clip_to(&polygons)
    }

    /// [`Grid::clip`] with polygons already read.
    pub fn clip_to(mut self, polygons: &geotiff::Polygons) -> Result<Self> {
        let mut mask = Mask::none(self.rows, self.cols);
        // Full-width strips: each polygon is burnt once per strip.
        let strip = (4_000_000 / self.cols).clamp(1, self.rows);
        let mut wanted = 0;
        for row in (0..self.rows).step_by(strip) {
            let window = Window { row, col: 0, rows: strip.min(self.rows - row), cols: self.cols };
            for (i, inside) in polygons.cover(&self, window)?.into_iter().enumerate() {
                let (row, col) = (row + i / self.cols, i % self.cols);
                if inside && self.valid.as_ref().is_none_or(|old| old.get(row, col)) {
                    mask.set(row, col, true);
                    wanted += 1;
                }
            }
        }
        if wanted == 0 {
            return Err(Error::input("no pixel of the grid lies inside the area to clip to")
                .fact("area", polygons.path.display())
                .fact("grid", self.crs.name())
                .try_this(
                    "check that both are about the same place, or choose a finer resolution",
                ));
        }
        self.valid = (wanted < self.rows * self.cols).then_some(mask);
        Ok(self)
    }

    /// Pixels, wanted or not.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// No pixels at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pixels wanted.
    pub fn wanted(&self) -> usize {
        self.valid.as_ref().map_or(self.len(), Mask::count)
    }

    /// The outer edges of the grid.
    pub fn extent(&self) -> Extent {
        let far = [
            self.origin[0] + self.cols as f64 * self.pixel[0],
            self.origin[1] + self.rows as f64 * self.pixel[1],
        ];
        Extent {
            west: self.origin[0].min(far[0]),
            south: self.origin[1].min(far[1]),
            east: self.origin[0].max(far[0]),
            north: self.origin[1].max(far[1]),
        }
    }

    /// The side of a pixel, with its unit.
    pub fn resolution(&self) -> Resolution {
        let side = (self.pixel[0] * self.pixel[1]).abs().sqrt();
        if self.crs.is_geographic() {
            Resolution::Degrees(side)
        } else {
            Resolution::Metres(side * self.crs.metres_per_unit())
        }
    }

    /// Metres on the ground along (width, height) of one pixel; in degrees, at the middle row.
    pub fn pixel_metres(&self) -> [f64; 2] {
        let unit = self.crs.metres_per_unit();
        let shrink = if self.crs.is_geographic() {
            let extent = self.extent();
            (0.5 * (extent.south + extent.north)).to_radians().cos()
        } else {
            1.0
        };
        [self.pixel[0].abs() * unit * shrink, self.pixel[1].abs() * unit]
    }

    /// Windows of `tile` × `tile` pixels, less at the edges, in row-major order.
    ///
    /// # Panics
    /// If `tile` is zero.
    pub fn windows(&self, tile: usize) -> impl Iterator<Item = Window> + use<> {
        let (rows, cols) = (self.rows, self.cols);
        (0..rows).step_by(tile).flat_map(move |row| {
            (0..cols).step_by(tile).map(move |col| Window {
                row,
                col,
                rows: tile.min(rows - row),
                cols: tile.min(cols - col),
            })
        })
    }

    /// Which pixels of a window are wanted, row-major.
    pub fn valid(&self, window: Window) -> Vec<bool> {
        match &self.valid {
            None => vec![true; window.len()],
            Some(mask) => (0..window.len())
                .map(|i| mask.get(window.row + i / window.cols, window.col + i % window.cols))
                .collect(),
        }
    }

    /// Centres of the wanted pixels of a window, row-major, CRS units: (x, y).
    pub fn centres(&self, window: Window, valid: &[bool]) -> (Vec<f64>, Vec<f64>) {
        let wanted = (0..window.len()).filter(|&i| valid[i]);
        wanted
            .map(|i| self.centre(window.row + i / window.cols, window.col + i % window.cols))
            .unzip()
    }

    /// Centre of a pixel, CRS units: (x, y).
    pub fn centre(&self, row: usize, col: usize) -> (f64, f64) {
        (
            self.origin[0] + (col as f64 + 0.5) * self.pixel[0],
            self.origin[1] + (row as f64 + 0.5) * self.pixel[1],
        )
    }

    /// How many sites lie inside the grid's edges.
    ///
    /// # Units
    /// `x`, `y` in units of `crs`.
    /// # Errors
    /// [`Error::Input`] if none lies inside, or within half the grid's longer side of it: such a
    /// map would say nothing about the survey.
    pub fn overlap(&self, crs: &Crs, x: &[f64], y: &[f64]) -> Result<usize> {
        let (mut gx, mut gy) = (x.to_vec(), y.to_vec());
        let moved = crs.transform(&self.crs, &mut gx, &mut gy);
        let inside = |e: Extent| (0..gx.len()).filter(|&i| e.contains(gx[i], gy[i])).count();
        if moved.is_ok() && inside(self.extent().grow(0.5)) > 0 {
            return Ok(inside(self.extent()));
        }
        let show = |e: Extent| {
            format!("x {:.6} … {:.6}, y {:.6} … {:.6}", e.west, e.east, e.south, e.north)
        };
        let mut error = Error::input("the grid and the sites do not overlap")
            .fact("grid", format!("{} ({})", show(self.extent()), self.crs.name()));
        if let Some(sites) = Extent::of(x, y) {
            error = error.fact("sites", format!("{} ({})", show(sites), crs.name()));
        }
        if let (Ok(()), Some(sites)) = (&moved, Extent::of(&gx, &gy))
            && *crs != self.crs
        {
            error = error.fact("sites, in the grid's system", show(sites));
        }
        Err(error.try_this(
            "check the CRS of both (--crs for the sites), and that longitude and latitude are not \
             swapped",
        ))
    }
}

/// The 1, 2, 2.5 or 5 × 10ⁿ nearest to `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .min_by(|a, b| (a / step).ln().abs().total_cmp(&(b / step).ln().abs()))
        .expect("five candidates")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plane() -> Crs {
        Crs::from_user("local:km").unwrap()
    }

    #[test]
    fn a_cover_holds_the_extent_on_round_edges() {
        let extent = Extent { west: -3.2, south: 10.1, east: 96.0, north: 51.0 };
        let grid = Grid::cover(extent, &plane(), Some(Resolution::Metres(5000.0))).unwrap();
        assert_eq!((grid.cols, grid.rows), (21, 9));
        assert_eq!((grid.origin, grid.pixel), ([-5.0, 55.0], [5.0, -5.0]));
        assert_eq!(grid.centre(0, 0), (-2.5, 52.5));
        assert_eq!(grid.centre(8, 2), (7.5, 12.5));
        let own = grid.extent();
        assert!(own.contains(extent.west, extent.south) && own.contains(extent.east, extent.north));
        // Covering a grid's own extent gives the grid.
        assert_eq!(Grid::cover(own, &plane(), Some(Resolution::Metres(5000.0))).unwrap(), grid);
    }

    #[test]
    fn the_default_resolution_gives_a_readable_map() {
        for (width, height) in [(1.0, 1.0), (3e6, 2e6), (0.02, 5.0), (700.0, 0.0)] {
            let extent = Extent { west: 0.0, south: 0.0, east: width, north: height };
            let pixels = Grid::cover(extent, &plane(), None).unwrap().len() as f64;
            assert!((2e3..1e6).contains(&pixels), "{width} × {height}: {pixels} pixels");
        }
    }

    #[test]
    fn windows_tile_the_grid_once() {
        let extent = Extent { west: 0.0, south: 0.0, east: 23.0, north: 17.0 };
        let grid = Grid::cover(extent, &plane(), Some(Resolution::Metres(1000.0))).unwrap();
        for tile in [1, 5, 16, 100] {
            let mut seen = vec![0; grid.len()];
            for w in grid.windows(tile) {
                for i in 0..w.len() {
                    seen[(w.row + i / w.cols) * grid.cols + w.col + i % w.cols] += 1;
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "tile {tile}");
        }
    }

    #[test]
    fn slips_in_the_resolution_are_refused() {
        let extent = Extent { west: 0.0, south: 0.0, east: 100.0, north: 50.0 };
        let cover = |r: &str| Grid::cover(extent, &plane(), Some(r.parse().unwrap()));
        assert!(cover("0.1deg").unwrap_err().to_string().contains("different units"));
        assert!(cover("0.1m").unwrap_err().to_string().contains("pixels"));
        assert!(cover("500km").unwrap_err().to_string().contains("coarser"));
        for text in ["5", "km", "-3km", "NaNkm", "5 miles"] {
            assert!(text.parse::<Resolution>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_grid_elsewhere_is_refused() {
        let extent = Extent { west: 0.0, south: 0.0, east: 100.0, north: 50.0 };
        let grid = Grid::cover(extent, &plane(), None).unwrap();
        assert_eq!(grid.overlap(&plane(), &[10.0, -20.0], &[10.0, 10.0]).unwrap(), 1);
        let error = grid.overlap(&plane(), &[1000.0], &[10.0]).unwrap_err();
        assert!(error.to_string().contains("do not overlap"));
    }
}
