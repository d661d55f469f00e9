//! A build without GDAL reads CSV and Parquet only. Same shape as `enabled.rs`.

use std::path::Path;

use super::{Column, Loaded};
use crate::{
    error::{Error, Result},
    geo::crs::Crs,
};

pub(super) fn read(path: &Path, _layer: Option<&str>) -> Result<Loaded> {
    Err(Error::input("this build has no GDAL, and so no GeoPackage, GeoJSON or Shapefile")
        .fact("file", path.display())
        .try_this("give the table as CSV or GeoParquet, or rebuild with default features"))
}

pub(super) fn write(
    path: &Path,
    _crs: &Crs,
    _places: [&[f64]; 2],
    _names: &[String],
    _columns: &[Column],
) -> Result<()> {
    Err(Error::input("this build has no GDAL, and writes no GeoPackage")
        .fact("file", path.display())
        .try_this("rebuild with default features"))
}
