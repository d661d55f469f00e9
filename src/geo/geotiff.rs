//! GeoTIFF: the only file that knows TIFF tags. Rasters in, Cloud-Optimised GeoTIFFs out, and
//! polygons burnt onto a grid.
//!
//! Through GDAL (the feature `gdal`); without it every door answers with one clear error.

#[cfg(feature = "gdal")]
#[path = "geotiff/enabled.rs"]
mod door;
#[cfg(not(feature = "gdal"))]
#[path = "geotiff/disabled.rs"]
mod door;

use super::crs::Crs;

#[cfg(feature = "gdal")]
pub use door::Layout;
pub use door::{Cog, Polygons, READS, Raster, Stack, cache};

/// GDAL's block cache unless somebody asks for another, MiB.
pub const CACHE: usize = 64;

/// What a raster file says about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Rows of pixels.
    pub rows: usize,
    /// Columns of pixels.
    pub cols: usize,
    /// Outer corner of the first pixel, CRS units.
    pub origin: [f64; 2],
    /// (dx, dy) of a pixel, CRS units.
    pub pixel: [f64; 2],
    /// What the coordinates mean, where the file says.
    pub crs: Option<Crs>,
}

/// A window of a raster's first band.
#[derive(Debug, Clone, PartialEq)]
pub struct Data {
    /// Values, row-major; NaN where there is no data.
    pub values: Vec<f64>,
    /// Where there is data, row-major.
    pub valid: Vec<bool>,
    /// Pixels that hold a customary no-data value which the file does not declare.
    pub sentinels: usize,
}

/// What a band of a map is.
#[derive(Debug, Clone, PartialEq)]
pub struct Band {
    /// In words: "Mean prevalence".
    pub description: String,
    /// Unit of the values: "1" for proportions and probabilities, "" where unknown.
    pub unit: String,
}
