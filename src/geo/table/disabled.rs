//! A build without GDAL reads CSV and Parquet only. Same shape as `enabled.rs`.

use std::path::Path;

use super::Loaded;
use crate::error::{Error, Result};

pub(super) fn read(path: &Path, _layer: Option<&str>) -> Result<Loaded> {
    Err(Error::input("this build has no GDAL, and so no GeoPackage, GeoJSON or Shapefile")
        .fact("file", path.display())
        .try_this("give the table as CSV or GeoParquet, or rebuild with default features"))
}
