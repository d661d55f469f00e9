//! A build without GDAL reads and writes no rasters. Same shape as `enabled.rs`.

use std::path::{Path, PathBuf};

use ndarray::Array2;

use super::{Band, Data, Header};
use crate::{
    error::{Error, Result},
    geo::{
        crs::Crs,
        grid::{Extent, Grid, Window},
    },
};

/// This build reads no rasters.
pub const READS: bool = false;

fn refuse(path: &Path) -> Error {
    Error::input("this build has no GDAL, and so no rasters")
        .fact("file", path.display())
        .try_this("rebuild with default features")
}

/// There is no cache to size.
pub fn cache(_mebibytes: usize) -> usize {
    0
}

/// A raster that cannot be opened in this build.
pub struct Raster {
    /// The file.
    pub path: PathBuf,
    /// What it says about itself.
    pub header: Header,
}

impl Raster {
    /// Refuses.
    pub fn open(path: &Path) -> Result<Self> {
        Err(refuse(path))
    }
    /// Refuses.
    pub fn data(&self, _window: Window) -> Result<Data> {
        Err(refuse(&self.path))
    }
    /// None.
    pub fn bands(&self) -> usize {
        0
    }
    /// None.
    pub fn no_data(&self, _band: usize) -> Option<f64> {
        None
    }
    /// Refuses.
    pub fn read(&self, _band: usize, _window: Window) -> Result<(Vec<f64>, Option<f64>)> {
        Err(refuse(&self.path))
    }
    /// Nothing can be said.
    pub fn words(&self) -> [String; 2] {
        Default::default()
    }
    /// Nothing can be said.
    pub fn words_of(&self, _band: usize) -> [String; 2] {
        Default::default()
    }
    /// Refuses.
    pub fn thumbnail(&self, _rows: usize, _cols: usize) -> Result<Array2<f64>> {
        Err(refuse(&self.path))
    }
    /// Refuses.
    pub fn thumbnail_of(&self, _band: usize, _rows: usize, _cols: usize) -> Result<Array2<f64>> {
        Err(refuse(&self.path))
    }
}

/// A writer that cannot be made in this build.
pub struct Cog {
    path: PathBuf,
}

impl Cog {
    /// Refuses.
    pub fn create(
        path: &Path,
        _grid: &Grid,
        _band: &Band,
        _tags: &[(String, String)],
    ) -> Result<Self> {
        Err(refuse(path))
    }
    /// Refuses.
    pub fn of_bands(
        path: &Path,
        _grid: &Grid,
        _bands: &[Band],
        _tags: &[(String, String)],
    ) -> Result<Self> {
        Err(refuse(path))
    }
    /// Refuses.
    pub fn write_band(&mut self, _window: Window, _band: usize, _values: &[f32]) -> Result<()> {
        Err(refuse(&self.path))
    }
    /// Refuses.
    pub fn write(&mut self, _window: Window, _values: &[f32]) -> Result<()> {
        Err(refuse(&self.path))
    }
    /// Refuses.
    pub fn finish(self) -> Result<PathBuf> {
        Err(refuse(&self.path))
    }
}

/// A writer of many bands that cannot be made in this build.
pub struct Stack {
    path: PathBuf,
}

impl Stack {
    /// Refuses.
    pub fn create(
        path: &Path,
        _grid: &Grid,
        _bands: &[Band],
        _tags: &[(String, String)],
        _tile: usize,
    ) -> Result<Self> {
        Err(refuse(path))
    }
    /// Refuses.
    pub fn write(&mut self, _window: Window, _band: usize, _values: &[f32]) -> Result<()> {
        Err(refuse(&self.path))
    }
    /// Refuses.
    pub fn finish(self) -> Result<PathBuf> {
        Err(refuse(&self.path))
    }
}

/// Polygons that cannot be read in this build.
pub struct Polygons {
    /// The file.
    pub path: PathBuf,
    /// Bounding box.
    pub extent: Extent,
}

impl Polygons {
    /// Refuses.
    pub fn read(path: &Path, _crs: &Crs) -> Result<Self> {
        Err(refuse(path))
    }
    /// Refuses.
    pub fn cover(&self, _grid: &Grid, _window: Window) -> Result<Vec<bool>> {
        Err(refuse(&self.path))
    }
}
