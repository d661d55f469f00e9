//! GeoPackage, GeoJSON, Shapefile and FlatGeobuf, through GDAL. Same shape as `disabled.rs`.

use std::path::Path;

use gdal::{
    Dataset, DatasetOptions, DriverManager, GdalOpenFlags,
    vector::{
        Defn, Feature, FieldDefn, Geometry, Layer, LayerAccess, LayerOptions, OGRFieldType,
        OGRwkbGeometryType as Kind, sql,
    },
};

use super::{Column, Columns, Loaded, Points, not_a_point};
use crate::{
    error::{Error, Result},
    geo::crs::{Crs, quiet, said},
    registry::nearest,
};

/// Writes points with their columns as a GeoPackage, to a temporary name first.
pub(super) fn write(
    path: &Path,
    crs: &Crs,
    [x, y]: [&[f64]; 2],
    names: &[String],
    columns: &[Column],
) -> Result<()> {
    let point = |row: usize| {
        let mut point = Geometry::empty(Kind::wkbPoint)?;
        point.add_point_2d((x[row], y[row]));
        Ok(Some(point))
    };
    let (name, what, kind) = ("plan", "points", Kind::wkbPoint);
    NewLayer { name, what, kind, crs, names, columns, rows: x.len(), geometry: &point }.write(path)
}

/// A layer to be written as a GeoPackage.
pub(in crate::geo) struct NewLayer<'a> {
    /// What GDAL calls it.
    pub name: &'a str,
    /// What it holds, for an error.
    pub what: &'static str,
    pub kind: gdal::vector::OGRwkbGeometryType::Type,
    pub crs: &'a Crs,
    pub names: &'a [String],
    /// NaN and empty text become null.
    pub columns: &'a [Column],
    pub rows: usize,
    /// The geometry of each row, where it has one.
    pub geometry: &'a dyn Fn(usize) -> Result<Option<Geometry>>,
}

impl NewLayer<'_> {
    /// Writes it, to a temporary name first.
    ///
    /// # Errors
    /// [`Error::Input`] with what GDAL says; [`Error::Io`] if the disk refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        quiet();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // GDAL goes by the ending.
        let temporary = path.with_file_name(format!(".{name}.partial-{}.gpkg", std::process::id()));
        let _ = std::fs::remove_file(&temporary);
        let whole = self
            .fill(&temporary)
            .map_err(|e| {
                Error::input(format!("the {} could not be written", self.what))
                    .fact("file", path.display())
                    .fact("GDAL says", said().unwrap_or_else(|| e.to_string()))
                    .try_this("see whether that disk is full, or write elsewhere with --out")
            })
            .and_then(|()| {
                std::fs::rename(&temporary, path).map_err(|e| Error::io("rename to", path, e))
            });
        whole.inspect_err(|_| {
            let _ = std::fs::remove_file(&temporary);
        })
    }

    fn fill(&self, path: &Path) -> Result<()> {
        let mut data = DriverManager::get_driver_by_name("GPKG")?.create_vector_only(path)?;
        let reference = self.crs.spatial_ref()?;
        {
            let mut all = data.start_transaction()?;
            let layer = all.create_layer(LayerOptions {
                name: self.name,
                srs: Some(&reference),
                ty: self.kind,
                options: None,
            })?;
            for (name, column) in self.names.iter().zip(self.columns) {
                let kind = match column {
                    Column::Numbers(_) => OGRFieldType::OFTReal,
                    Column::Text(_) => OGRFieldType::OFTString,
                };
                FieldDefn::new(name, kind)?.add_to_layer(&layer)?;
            }
            for row in 0..self.rows {
                let mut feature = Feature::new(layer.defn())?;
                for (i, column) in self.columns.iter().enumerate() {
                    match column {
                        Column::Numbers(values) if values[row].is_nan() => {
                            feature.set_field_null(i)?
                        }
                        Column::Numbers(values) => feature.set_field_double(i, values[row])?,
                        Column::Text(cells) if cells[row].is_empty() => {
                            feature.set_field_null(i)?
                        }
                        Column::Text(cells) => feature.set_field_string(i, &cells[row])?,
                    }
                }
                if let Some(geometry) = (self.geometry)(row)? {
                    feature.set_geometry(geometry)?;
                }
                feature.create(&layer)?;
            }
            all.commit()?;
        }
        data.close()?;
        Ok(())
    }
}

pub(super) fn read(path: &Path, layer: Option<&str>) -> Result<Loaded> {
    quiet();
    let broken = |e: &dyn std::fmt::Display| {
        Error::input("the file cannot be read as a vector layer")
            .fact("file", path.display())
            .fact("GDAL says", e)
            .try_this("it may be cut short or of another kind: copy or write it again")
    };
    let flags = GdalOpenFlags::GDAL_OF_VECTOR
        | GdalOpenFlags::GDAL_OF_READONLY
        | GdalOpenFlags::GDAL_OF_VERBOSE_ERROR;
    let options = DatasetOptions { open_flags: flags, ..Default::default() };
    said();
    let dataset = Dataset::open_ex(path, options)
        .map_err(|e| broken(&said().unwrap_or_else(|| e.to_string())))?;
    if dataset.layer_count() == 0 {
        return Err(broken(&said().unwrap_or_else(|| "it holds no layer".into())));
    }
    let driver = dataset.driver().short_name();
    let (mut layer, notes) = choose(&dataset, path, layer)?;
    if driver == "GPKG" {
        one_system(&dataset, &layer, path)?;
    }

    let fields: Vec<(String, OGRFieldType::Type)> =
        layer.defn().fields().map(|f| (f.name(), f.field_type())).collect();
    let numeric = |kind| {
        [OGRFieldType::OFTInteger, OGRFieldType::OFTInteger64, OGRFieldType::OFTReal]
            .contains(&kind)
    };
    let mut columns: Vec<Column> = fields
        .iter()
        .map(|(_, kind)| match numeric(*kind) {
            true => Column::Numbers(Vec::new()),
            false => Column::Text(Vec::new()),
        })
        .collect();
    let (mut x, mut y, mut others) = (Vec::new(), Vec::new(), Vec::new());
    let expected = layer.feature_count();
    let mut failure = None;
    said();
    for (row, feature) in layer.features().enumerate() {
        for (i, column) in columns.iter_mut().enumerate() {
            match column {
                Column::Numbers(values) => {
                    values.push(feature.field_as_double(i)?.unwrap_or(f64::NAN))
                }
                Column::Text(cells) => cells.push(feature.field_as_string(i)?.unwrap_or_default()),
            }
        }
        failure = failure.or_else(said);
        let point = match feature.geometry() {
            Some(geometry) => point(geometry).map_err(|kind| others.push((row, kind))).ok(),
            None => None,
        };
        said(); // The binding hands out null for a row without geometry, and GDAL objects to it.
        let [px, py] = point.flatten().unwrap_or([f64::NAN; 2]);
        x.push(px);
        y.push(py);
    }
    // GDAL ends a layer early and quietly when the file does: only its log and the count tell.
    if let Some(message) = failure.or_else(said) {
        return Err(broken(&message));
    }
    if (x.len() as u64) < expected {
        return Err(broken(&format!("{} of {expected} rows could be read", x.len())));
    }
    let names = fields.into_iter().map(|(name, _)| name).collect();
    let columns = columns
        .into_iter()
        .map(|column| match column {
            Column::Text(cells) => super::column(cells),
            numbers => numbers,
        })
        .collect();
    let columns = Columns::new(path, names, columns, x.len())?;
    if let Some((row, kind)) = others.first() {
        return Err(not_a_point(path, *row, kind));
    }
    let crs = match layer.spatial_ref() {
        // GeoPackage's "undefined" systems are its way to have none.
        Some(s) if !s.name().is_some_and(|n| n.to_lowercase().starts_with("undefined")) => {
            Some(Crs::from_spatial_ref(&s)?)
        }
        _ => None,
    };
    let crs_is_assumed = driver.starts_with("GeoJSON");
    Ok(Loaded { columns, points: Some(Points { x, y, crs, crs_is_assumed }), notes })
}

/// The layer asked for, or the only one that can hold points.
fn choose<'a>(
    dataset: &'a Dataset,
    path: &Path,
    layer: Option<&str>,
) -> Result<(Layer<'a>, Vec<String>)> {
    let names: Vec<String> = dataset.layers().map(|l| l.name()).collect();
    let refuse = |what: String| {
        Error::input(what).fact("file", path.display()).fact("layers", names.join(", "))
    };
    if let Some(name) = layer {
        return match dataset.layer_by_name(name) {
            Ok(layer) => Ok((layer, Vec::new())),
            Err(_) => Err(refuse(format!("the file has no layer `{name}`")).try_this(
                match nearest(name, &names) {
                    Some(close) => format!("did you mean --layer {close}?"),
                    None => "name one of the layers above with --layer".into(),
                },
            )),
        };
    }
    let mut able: Vec<Layer> = dataset.layers().filter(|l| may_hold_points(l.defn())).collect();
    match (able.len(), names.len()) {
        (1, total) => {
            let layer = able.remove(0);
            let note =
                format!("read layer `{}`, the only one of {total} with points", layer.name());
            Ok((layer, if total > 1 { vec![note] } else { Vec::new() }))
        }
        (0, _) => Err(refuse("the file has no layer of points".into())
            .try_this("sites must be points: replace areas by one point per survey")),
        _ => Err(refuse("the file has more than one layer of points".into())
            .try_this("choose one with --layer NAME")),
    }
}

fn may_hold_points(defn: &Defn) -> bool {
    let mut kinds = defn.geom_fields().map(|g| gdal::vector::geometry_type_flatten(g.field_type()));
    kinds.any(|k| [Kind::wkbPoint, Kind::wkbMultiPoint, Kind::wkbUnknown].contains(&k))
}

/// Refuses a GeoPackage layer whose geometries carry different systems: GDAL reads only the
/// layer's. Bytes 4 … 8 of a GeoPackage geometry are its system (OGC 12-128r18 §2.1.3).
fn one_system(dataset: &Dataset, layer: &Layer, path: &Path) -> Result<()> {
    let Some(geometry) = layer.defn().geom_fields().next().map(|g| g.name()) else {
        return Ok(());
    };
    let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let query = format!(
        "SELECT DISTINCT hex(substr({0}, 4, 1)) || hex(substr({0}, 5, 4)) AS code FROM {1} \
         WHERE {0} IS NOT NULL",
        quote(&geometry),
        quote(&layer.name())
    );
    let Some(mut answer) = dataset.execute_sql(query, None, sql::Dialect::DEFAULT)? else {
        return Ok(());
    };
    let mut codes: Vec<i32> = answer
        .features()
        .filter_map(|f| f.field_as_string(0).ok().flatten())
        .filter_map(|hex| {
            let flags = u8::from_str_radix(hex.get(..2)?, 16).ok()?;
            let code = u32::from_str_radix(hex.get(2..)?, 16).ok()?;
            Some(if flags & 1 == 1 { code.swap_bytes() } else { code } as i32)
        })
        .collect();
    codes.sort_unstable();
    codes.dedup();
    if codes.len() > 1 {
        let list: Vec<String> = codes.iter().map(i32::to_string).collect();
        return Err(Error::input("the layer mixes coordinate reference systems")
            .fact("file", path.display())
            .fact("layer", layer.name())
            .fact("systems (srs_id)", list.join(", "))
            .try_this("reproject every row to one system, for example with ogr2ogr -t_srs"));
    }
    Ok(())
}

/// The point in a geometry: `None` if it is empty, its kind if it is no point.
fn point(geometry: &gdal::vector::Geometry) -> std::result::Result<Option<[f64; 2]>, String> {
    if geometry.is_empty() {
        return Ok(None);
    }
    match gdal::vector::geometry_type_flatten(geometry.geometry_type()) {
        Kind::wkbPoint => {
            let (x, y, _) = geometry.get_point(0);
            Ok(Some([x, y]))
        }
        // Some programs write nothing else.
        Kind::wkbMultiPoint if geometry.geometry_count() == 1 => {
            let (x, y, _) = geometry.get_geometry(0).get_point(0);
            Ok(Some([x, y]))
        }
        Kind::wkbMultiPoint => Err(format!("a multipoint of {} points", geometry.geometry_count())),
        _ => Err(geometry.geometry_name().to_lowercase()),
    }
}
