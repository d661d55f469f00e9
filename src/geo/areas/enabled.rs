//! Areas through GDAL. Same shape as `disabled.rs`.

use std::path::Path;

use gdal::{
    Dataset, DatasetOptions, GdalOpenFlags,
    cpl::CslStringList,
    vector::{
        Geometry, LayerAccess, OGRFieldType, OGRwkbGeometryType as Kind, geometry_type_flatten,
    },
};

use super::{Areas, Column};
use crate::{
    error::{Error, Result},
    geo::{
        cover::Ring,
        crs::{Crs, quiet, said},
        table::NewLayer,
    },
    registry::nearest,
};

fn refuse(path: &Path, what: &str) -> Error {
    Error::input(what).fact("areas", path.display())
}

pub(super) fn read(path: &Path, layer: Option<&str>, local: Option<&Crs>) -> Result<Areas> {
    quiet();
    let flags = GdalOpenFlags::GDAL_OF_VECTOR | GdalOpenFlags::GDAL_OF_READONLY;
    let options = DatasetOptions { open_flags: flags, ..Default::default() };
    let data = Dataset::open_ex(path, options).map_err(|e| {
        refuse(path, "the areas cannot be read")
            .fact("GDAL says", said().unwrap_or_else(|| e.to_string()))
            .try_this("give polygons as GeoPackage, GeoJSON, Shapefile or FlatGeobuf")
    })?;
    let mut found = Vec::new();
    for mut one in data.layers() {
        let name = one.name();
        if layer.is_some_and(|wanted| wanted != name) {
            continue;
        }
        let mut polygons = false;
        for feature in one.features() {
            polygons |= feature.geometry().is_some_and(|g| !g.is_empty() && encloses(g));
            if polygons {
                break;
            }
        }
        said(); // The binding hands out null for a row without geometry, and GDAL objects to it.
        if polygons {
            found.push(name);
        }
    }
    let names: Vec<String> = data.layers().map(|one| one.name()).collect();
    let name = match (&found[..], layer) {
        ([one], _) => one.clone(),
        ([], Some(wanted)) if !names.iter().any(|n| n == wanted) => {
            let error = refuse(path, &format!("there is no layer `{wanted}`"))
                .fact("layers", names.join(", "));
            return Err(match nearest(wanted, &names) {
                Some(close) => error.try_this(format!("did you mean --areas-layer {close}?")),
                None => error.try_this("name one of the layers above with --areas-layer"),
            });
        }
        ([], _) => {
            return Err(refuse(path, "the areas have no polygons")
                .try_this("give polygons; lines and points enclose nothing"));
        }
        (several, _) => {
            return Err(refuse(path, "more than one layer has polygons")
                .fact("layers", several.join(", "))
                .try_this("name one with --areas-layer; each level of areas is a run of its own"));
        }
    };
    let mut layer = data.layer_by_name(&name)?;
    let crs = match (layer.spatial_ref(), local) {
        (Some(reference), _) => Crs::from_spatial_ref(&reference)?,
        (None, Some(local)) => local.clone(),
        (None, None) => {
            return Err(refuse(path, "the areas have no coordinate reference system")
                .fact("layer", &name)
                .try_this("give them one, for example with ogr2ogr -a_srs EPSG:4326"));
        }
    };
    let fields: Vec<(String, OGRFieldType::Type)> =
        layer.defn().fields().map(|f| (f.name(), f.field_type())).collect();
    let numeric = |kind| {
        [OGRFieldType::OFTInteger, OGRFieldType::OFTInteger64, OGRFieldType::OFTReal]
            .contains(&kind)
    };
    let empty = |(_, kind): &(String, OGRFieldType::Type)| match numeric(*kind) {
        true => Column::Numbers(Vec::new()),
        false => Column::Text(Vec::new()),
    };
    let mut areas = Areas {
        source: path.to_path_buf(),
        layer: name,
        crs,
        columns: fields.iter().map(empty).collect(),
        names: fields.into_iter().map(|(name, _)| name).collect(),
        rings: Vec::new(),
        wkb: Vec::new(),
        notes: Vec::new(),
    };
    let expected = layer.feature_count();
    for feature in layer.features() {
        for (i, column) in areas.columns.iter_mut().enumerate() {
            match column {
                Column::Numbers(values) => {
                    values.push(feature.field_as_double(i)?.unwrap_or(f64::NAN));
                }
                Column::Text(cells) => cells.push(feature.field_as_string(i)?.unwrap_or_default()),
            }
        }
        let row = areas.rings.len() + 1;
        let (rings, wkb, note) = match feature.geometry().filter(|g| !g.is_empty()) {
            None => (Vec::new(), Vec::new(), "no outline"),
            Some(geometry) if !encloses(geometry) => (Vec::new(), geometry.wkb()?, "not a polygon"),
            Some(geometry) => {
                let wkb = geometry.wkb()?;
                let mut rings = Vec::new();
                collect(geometry, &mut rings);
                if !rings.iter().flat_map(|r| &r.corners).flatten().all(|v| v.is_finite()) {
                    return Err(refuse(path, "an outline has coordinates that are not finite")
                        .fact("area", format!("number {row}")));
                }
                match geometry.is_valid() {
                    true => (rings, wkb, ""),
                    false => (mended(geometry), wkb, "its outline crossed itself and was repaired"),
                }
            }
        };
        said();
        let lost = rings.is_empty() && note.starts_with("its");
        areas.notes.push(if lost { "its outline encloses nothing".into() } else { note.into() });
        areas.rings.push(rings);
        areas.wkb.push(wkb);
    }
    if (areas.len() as u64) < expected {
        return Err(refuse(path, "the areas cannot be read to their end")
            .fact("rows", format!("{} of {expected}", areas.len()))
            .try_this("fetch or make the file again"));
    }
    Ok(areas)
}

/// Whether a geometry is of a kind that has an inside.
fn encloses(geometry: &Geometry) -> bool {
    let kind = geometry_type_flatten(geometry.geometry_type());
    matches!(kind, Kind::wkbPolygon | Kind::wkbMultiPolygon)
        || (kind == Kind::wkbGeometryCollection
            && (0..geometry.geometry_count()).any(|i| encloses(&geometry.get_geometry(i))))
}

/// The rings of every polygon inside.
fn collect(geometry: &Geometry, rings: &mut Vec<Ring>) {
    let kind = geometry_type_flatten(geometry.geometry_type());
    for i in 0..geometry.geometry_count() {
        let part = geometry.get_geometry(i);
        if kind != Kind::wkbPolygon {
            collect(&part, rings);
            continue;
        }
        let mut points = Vec::new();
        part.get_points(&mut points);
        let mut corners: Vec<[f64; 2]> = points.iter().map(|p| [p.0, p.1]).collect();
        if corners.len() > 1 && corners.first() == corners.last() {
            corners.pop();
        }
        if corners.len() > 2 {
            rings.push(Ring { corners, hole: i > 0 });
        }
    }
}

/// The rings of what a crossed outline encloses; none if it encloses nothing.
fn mended(geometry: &Geometry) -> Vec<Ring> {
    let mut rings = Vec::new();
    if let Ok(valid) = geometry.make_valid(&CslStringList::new()) {
        collect(&valid, &mut rings);
    }
    rings
}

pub(super) fn projjson(crs: &Crs) -> Result<Option<String>> {
    if crs.is_local() {
        return Ok(None);
    }
    Ok(Some(crs.spatial_ref()?.to_projjson()?))
}

pub(super) fn write(
    path: &Path,
    areas: &Areas,
    names: &[String],
    columns: &[Column],
) -> Result<()> {
    let geometry = |row: usize| match areas.wkb[row].is_empty() {
        true => Ok(None),
        false => Ok(Some(Geometry::from_wkb(&areas.wkb[row])?)),
    };
    let layer = NewLayer {
        name: &areas.layer,
        what: "areas",
        kind: Kind::wkbUnknown,
        crs: &areas.crs,
        names,
        columns,
        rows: areas.len(),
        geometry: &geometry,
    };
    layer.write(path)
}
