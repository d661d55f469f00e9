//! PROJ, through GDAL. Same shape as `disabled.rs`.

use std::{cell::RefCell, sync::Once};

use gdal::{
    errors::CplErrType,
    spatial_ref::{AxisMappingStrategy, CoordTransform, SpatialRef},
};

use super::{Crs, EARTH_RADIUS, HELP, Kind};
use crate::error::{Error, Result};

thread_local! {
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps GDAL from printing to the terminal: its errors come back as values, and we print them
/// once, in our words. Call it before the first use of GDAL in a module.
pub fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        gdal::config::set_error_handler(|class, _, message| {
            if matches!(class, CplErrType::Failure | CplErrType::Fatal) {
                LAST.set(Some(message.to_string()));
            }
        })
    });
}

/// The last failure GDAL reported on this thread since the last call, where [`quiet`] was called.
pub fn said() -> Option<String> {
    LAST.take()
}

impl Crs {
    /// A GDAL object for this system, in traditional GIS axis order.
    pub fn spatial_ref(&self) -> Result<SpatialRef> {
        quiet();
        open(&self.wkt)
    }

    /// The system a GDAL dataset or layer carries.
    ///
    /// # Errors
    /// [`Error::Input`] if it is neither geographic nor planar.
    pub fn from_spatial_ref(reference: &SpatialRef) -> Result<Self> {
        quiet();
        let name = reference.authority().ok().or_else(|| reference.name());
        let name = name.unwrap_or_else(|| "unnamed".into());
        let (kind, metres_per_unit) = if reference.is_local() {
            (Kind::Local, reference.linear_units())
        } else if reference.is_geographic() {
            (Kind::Geographic, reference.angular_units() * EARTH_RADIUS)
        } else if reference.is_projected() {
            (Kind::Projected, reference.linear_units())
        } else {
            return Err(Error::input(format!(
                "`{name}` is neither a geographic nor a plane system"
            ))
            .try_this("use a system with two axes: longitude and latitude, or a projection"));
        };
        if !(metres_per_unit.is_finite() && metres_per_unit > 0.0) {
            return Err(Error::input(format!("`{name}` has no usable unit"))
                .fact("metres per unit", metres_per_unit)
                .try_this(HELP));
        }
        // WKT seldom carries the area; the code knows it.
        let book = reference.authority().ok().and_then(|a| SpatialRef::from_definition(&a).ok());
        let area_of_use = book.as_ref().unwrap_or(reference).area_of_use().map(|a| {
            [a.west_lon_degree, a.south_lat_degree, a.east_lon_degree, a.north_lat_degree]
        });
        Ok(Crs { name, wkt: reference.to_wkt()?, kind, metres_per_unit, area_of_use })
    }
}

fn open(text: &str) -> Result<SpatialRef> {
    let mut reference = SpatialRef::from_definition(text)?;
    reference.set_axis_mapping_strategy(AxisMappingStrategy::TraditionalGisOrder);
    Ok(reference)
}

pub(super) fn describe(text: &str) -> Result<Crs> {
    quiet();
    // GDAL would fetch any address it is given; only the names that merely look like one pass.
    let address = text.starts_with("http") && !text.contains("opengis.net/def/crs");
    match (!address).then(|| open(text)) {
        Some(Ok(reference)) => Crs::from_spatial_ref(&reference),
        _ => {
            let short: String = text.chars().take(60).collect();
            let error = Error::input(format!(
                "`{short}` is not a coordinate reference system that PROJ knows"
            ));
            Err(match text.parse::<u32>() {
                Ok(code) => error.try_this(format!("did you mean EPSG:{code}?")),
                Err(_) => error.try_this(HELP),
            })
        }
    }
}

pub(super) fn equal_area(lon: f64, lat: f64) -> Result<Crs> {
    describe(&format!(
        "+proj=laea +lat_0={lat} +lon_0={lon} +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs"
    ))
}

pub(super) fn same(a: &str, b: &str) -> bool {
    quiet();
    // Without our axis mapping, or EPSG:4326 and OGC:CRS84 would differ by their books' order.
    let read = SpatialRef::from_definition;
    matches!((read(a), read(b)), (Ok(a), Ok(b)) if a == b)
}

pub(super) fn transform(from: &Crs, to: &Crs, x: &mut [f64], y: &mut [f64]) -> Result<()> {
    let refuse = |count: usize, first: Option<usize>| {
        let error = Error::input(format!("{count} places cannot be moved between these systems"))
            .fact("from", &from.name)
            .fact("to", &to.name);
        match first {
            Some(i) => error.fact("first place", format!("number {}", i + 1)),
            None => error,
        }
        .try_this(
            "check that the coordinates are in the system that is given, with x (longitude) first",
        )
    };
    let (source, target) = (from.spatial_ref()?, to.spatial_ref()?);
    let step = CoordTransform::new(&source, &target).map_err(|e| {
        Error::input("PROJ has no way between two coordinate reference systems")
            .fact("from", &from.name)
            .fact("to", &to.name)
            .fact("PROJ says", e)
            .try_this("check both systems; a custom datum may need its parameters")
    })?;
    // GDAL marks a place it could not move with infinity; do not trust one status for all.
    let status = step.transform_coords(x, y, &mut []);
    let lost = |i: &usize| !(x[*i].is_finite() && y[*i].is_finite());
    let count = (0..x.len()).filter(lost).count();
    match (count, status) {
        (0, Ok(())) => Ok(()),
        (0, Err(_)) => Err(refuse(x.len(), None)),
        (count, _) => Err(refuse(count, (0..x.len()).find(lost))),
    }
}
