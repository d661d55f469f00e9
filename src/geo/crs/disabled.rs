//! A build without GDAL: local planes only. Same shape as `enabled.rs`.

use super::Crs;
use crate::error::{Error, Result};

fn refuse() -> Error {
    Error::input("this build has no GDAL, and so no map projections")
        .try_this("rebuild with default features, or use --crs local:m for planar coordinates")
}

pub(super) fn describe(_text: &str) -> Result<Crs> {
    Err(refuse())
}

pub(super) fn same(_a: &str, _b: &str) -> bool {
    false // The texts differ; without PROJ, claim no more.
}

pub(super) fn transform(_from: &Crs, _to: &Crs, _x: &mut [f64], _y: &mut [f64]) -> Result<()> {
    Err(refuse())
}
