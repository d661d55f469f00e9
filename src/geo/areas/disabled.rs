//! A build without GDAL reads and writes no areas. Same shape as `enabled.rs`.

use std::path::Path;

use super::{Areas, Column};
use crate::{
    error::{Error, Result},
    geo::crs::Crs,
};

fn refuse(path: &Path) -> Error {
    Error::input("this build has no GDAL, and so no areas")
        .fact("file", path.display())
        .try_this("rebuild with default features")
}

pub(super) fn read(path: &Path, _layer: Option<&str>, _local: Option<&Crs>) -> Result<Areas> {
    Err(refuse(path))
}

pub(super) fn write(
    path: &Path,
    _areas: &Areas,
    _names: &[String],
    _columns: &[Column],
) -> Result<()> {
    Err(refuse(path))
}

pub(super) fn projjson(crs: &Crs) -> Result<Option<String>> {
    Err(refuse(Path::new(crs.name())))
}
