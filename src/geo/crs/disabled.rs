//! A build without GDAL: longitude and latitude on WGS84, equal-area planes about a centre, and
//! planes of their own. Same shape as `enabled.rs`.

use super::{Crs, EARTH_RADIUS, Kind, laea::Laea};
use crate::error::{Error, Result};

/// WGS84, as GDAL writes it.
const WGS84: &str = "GEOGCS[\"WGS 84\",DATUM[\"WGS_1984\",SPHEROID[\"WGS 84\",6378137,298.257223563,\
     AUTHORITY[\"EPSG\",\"7030\"]],AUTHORITY[\"EPSG\",\"6326\"]],PRIMEM[\"Greenwich\",0,\
     AUTHORITY[\"EPSG\",\"8901\"]],UNIT[\"degree\",0.0174532925199433,\
     AUTHORITY[\"EPSG\",\"9122\"]],AXIS[\"Latitude\",NORTH],AXIS[\"Longitude\",EAST],\
     AUTHORITY[\"EPSG\",\"4326\"]]";

fn refuse(what: &str) -> Error {
    Error::input("this build has no GDAL, and knows only longitude and latitude on WGS84")
        .fact("asked for", what.chars().take(60).collect::<String>())
        .try_this("use EPSG:4326 or local:m, or rebuild with default features")
}

pub(super) fn describe(text: &str) -> Result<Crs> {
    let known = ["epsg:4326", "ogc:crs84", "wgs84"].iter().any(|k| text.eq_ignore_ascii_case(k));
    if !known && text != WGS84 {
        return Err(refuse(text));
    }
    Ok(Crs {
        name: "EPSG:4326".into(),
        wkt: WGS84.into(),
        kind: Kind::Geographic,
        metres_per_unit: EARTH_RADIUS.to_radians(),
        area_of_use: Some([-180.0, -90.0, 180.0, 90.0]),
    })
}

pub(super) fn equal_area(lon: f64, lat: f64) -> Result<Crs> {
    let wkt = format!(
        "PROJCS[\"unknown\",{WGS84},PROJECTION[\"Lambert_Azimuthal_Equal_Area\"],\
         PARAMETER[\"latitude_of_center\",{lat}],PARAMETER[\"longitude_of_center\",{lon}],\
         PARAMETER[\"false_easting\",0],PARAMETER[\"false_northing\",0],UNIT[\"metre\",1],\
         AXIS[\"Easting\",EAST],AXIS[\"Northing\",NORTH]]"
    );
    let name = format!("LAEA {lon} {lat}");
    Ok(Crs { name, wkt, kind: Kind::Projected, metres_per_unit: 1.0, area_of_use: None })
}

/// The equal-area plane in a text of [`equal_area`]'s, or of GDAL's for the same plane.
fn plane(crs: &Crs) -> Result<Laea> {
    let parameter = |name: &str| -> Option<f64> {
        let (_, rest) = crs.wkt.split_once(&format!("PARAMETER[\"{name}\","))?;
        rest.split_once(']')?.0.parse().ok()
    };
    let laea = crs.wkt.contains("Lambert_Azimuthal_Equal_Area") && crs.wkt.contains("WGS_1984");
    match (laea, parameter("longitude_of_center"), parameter("latitude_of_center")) {
        (true, Some(lon), Some(lat)) => Ok(Laea::new(lon, lat)),
        _ => Err(refuse(&crs.name)),
    }
}

pub(super) fn same(_a: &str, _b: &str) -> bool {
    false // The texts differ; without PROJ, claim no more.
}

pub(super) fn transform(from: &Crs, to: &Crs, x: &mut [f64], y: &mut [f64]) -> Result<()> {
    let source = (!from.is_geographic()).then(|| plane(from)).transpose()?;
    let target = (!to.is_geographic()).then(|| plane(to)).transpose()?;
    for (i, (x, y)) in x.iter_mut().zip(y).enumerate() {
        let (lon, lat) = source.as_ref().map_or((*x, *y), |plane| plane.inverse(*x, *y));
        (*x, *y) = target.as_ref().map_or((lon, lat), |plane| plane.forward(lon, lat));
        if !(x.is_finite() && y.is_finite()) {
            return Err(Error::input("a place cannot be moved between these systems")
                .fact("from", &from.name)
                .fact("to", &to.name)
                .fact("place", format!("number {}", i + 1))
                .try_this("check that the coordinates are in the system that is given"));
        }
    }
    Ok(())
}
