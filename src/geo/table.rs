//! Tables of named columns: CSV and Parquet in, Parquet out. The only file that knows Parquet.
//!
//! Sources: GeoParquet 1.1 (geoparquet.org/releases/v1.1.0), whose geometries are ISO WKB
//! (OGC 06-103r4, §8). Other vector files come through GDAL, in `table/enabled.rs`.

use std::{
    cell::Cell,
    fs::File,
    panic,
    path::{Path, PathBuf},
    sync::{Arc, Once},
};

use arrow::{
    array::{Array, AsArray, BinaryArray, Float64Array, RecordBatch, StringArray, StructArray},
    compute::cast,
    datatypes::{DataType, Field, Float64Type, Schema},
};
use parquet::arrow::ArrowWriter;

use super::crs::Crs;
use rows::{Csv, Parquet, Rows};

pub use super::survey::{Dropped, Outcome, Survey, SurveyOptions, Targets};
use crate::{
    error::{Error, Result},
    registry::nearest,
    whole,
};

mod rows;
#[cfg(not(feature = "gdal"))]
#[path = "table/disabled.rs"]
mod vector;
#[cfg(feature = "gdal")]
#[path = "table/enabled.rs"]
mod vector;
#[cfg(feature = "gdal")]
pub(in crate::geo) use vector::NewLayer;

/// One column of a table.
#[derive(Debug, Clone, PartialEq)]
pub enum Column {
    /// Numbers; NaN where the file has none.
    Numbers(Vec<f64>),
    /// Text; empty where the file has none.
    Text(Vec<String>),
}

impl Column {
    /// Cells.
    pub fn len(&self) -> usize {
        match self {
            Column::Numbers(values) => values.len(),
            Column::Text(cells) => cells.len(),
        }
    }

    /// No cells at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Cells `start … end`.
    ///
    /// # Panics
    /// If `end` is beyond [`Column::len`].
    pub fn slice(&self, start: usize, end: usize) -> Self {
        match self {
            Column::Numbers(values) => Column::Numbers(values[start..end].to_vec()),
            Column::Text(cells) => Column::Text(cells[start..end].to_vec()),
        }
    }

    /// The same with the cells of another below; those of another kind are cells without a value.
    pub fn extend(&mut self, below: Self) {
        match (self, below) {
            (Column::Numbers(values), Column::Numbers(more)) => values.extend(more),
            (Column::Text(cells), Column::Text(more)) => cells.extend(more),
            (Column::Numbers(values), other) => values.extend(vec![f64::NAN; other.len()]),
            (Column::Text(cells), other) => cells.extend(vec![String::new(); other.len()]),
        }
    }
}

/// Rows of a file that are decoded at once.
const BATCH: usize = 8192;

/// Bytes of a Parquet file that are gathered before they are written as a group of rows.
const ROW_GROUP: usize = 32 << 20;

/// What of a column a reading keeps in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Every cell.
    Cells,
    /// Its numbers; of a column of text only the first cell that is none.
    Numbers,
    /// Whether it holds numbers or text.
    Kind,
}

/// The named columns of a table, one row per site.
#[derive(Debug, Clone, PartialEq)]
pub struct Columns {
    source: PathBuf,
    names: Vec<String>,
    columns: Vec<Column>,
    rows: usize,
    /// Line of the file on which each row starts, where the file has lines.
    lines: Vec<u64>,
    /// Every cell is here; otherwise [`Columns::chunks`] reads the file again.
    whole: bool,
}

/// Parts of a table: rows, and their columns.
type Chunks<'a> = Box<dyn Iterator<Item = Result<(usize, Vec<Column>)>> + 'a>;

/// Columns, with what a geometry column says.
pub(super) struct Loaded {
    pub columns: Columns,
    pub points: Option<Points>,
    pub notes: Vec<String>,
}

/// Point geometries of a table; NaN where a row has none.
pub(super) struct Points {
    pub x: Vec<f64>,
    pub y: Vec<f64>,
    /// The system the file names.
    pub crs: Option<Crs>,
    /// The format leaves no room for another system, so files often carry one without saying so.
    pub crs_is_assumed: bool,
}

/// The kinds of file a table comes in, by extension.
enum Format {
    Csv,
    Parquet,
    Vector,
}

impl Format {
    fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_lowercase();
        match extension.as_str() {
            "csv" | "tsv" | "txt" | "tab" => Ok(Format::Csv),
            "parquet" | "geoparquet" | "pq" => Ok(Format::Parquet),
            "gpkg" | "geojson" | "json" | "geojsonl" | "shp" | "fgb" => Ok(Format::Vector),
            _ => Err(Error::input(match extension.as_str() {
                "" => "a table without an extension cannot be read".to_string(),
                _ => format!("files named .{extension} cannot be read as a table"),
            })
            .fact("file", path.display())
            .try_this(match extension.as_str() {
                "xlsx" | "xls" | "ods" => "save the sheet as CSV (UTF-8) and give that file",
                "dbf" | "shx" | "prj" => "give the .shp file of the shapefile",
                "zip" | "gz" => "unpack it first",
                _ => "tables are .csv, .tsv, .parquet, .gpkg, .geojson, .shp or .fgb files",
            })),
        }
    }
}

/// A table in any format, with its point geometries. `keep` says what to keep of each column; what
/// comes through GDAL is kept whole.
pub(super) fn load(
    path: &Path,
    layer: Option<&str>,
    keep: &dyn Fn(&str) -> Keep,
) -> Result<Loaded> {
    let format = Format::of(path)?;
    let found = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
    if found.is_dir() {
        return Err(Error::input("a table is a file, and this is a folder")
            .fact("path", path.display())
            .try_this("give the file inside it"));
    }
    if found.len() == 0 {
        return Err(empty(path));
    }
    if let (Some(layer), Format::Csv | Format::Parquet) = (layer, &format) {
        return Err(Error::input(format!("this kind of file has no layer `{layer}`"))
            .fact("file", path.display())
            .try_this("leave --layer out: only GeoPackage and its kin have layers"));
    }
    match format {
        Format::Csv => collect(path, Rows::Csv(Csv::open(path, BATCH)?), keep),
        Format::Parquet => collect(path, Rows::Parquet(Parquet::open(path, BATCH)?), keep),
        Format::Vector => vector::read(path, layer),
    }
}

/// Writes points of `crs` (x first) with their columns as a GeoPackage; whole, or not at all.
///
/// # Shapes
/// `places` `[2][row]`, every column `[row]`.
/// # Errors
/// [`Error::Axis`] if lengths differ; [`Error::Input`] or [`Error::Io`] if the disk refuses, and without GDAL.
pub fn write_points(
    path: &Path,
    crs: &Crs,
    places: [&[f64]; 2],
    names: &[String],
    columns: &[Column],
) -> Result<()> {
    let rows = places[0].len();
    let odd = columns.iter().map(Column::len).chain([places[1].len()]).find(|n| *n != rows);
    if let Some(found) = odd {
        return Err(Error::axis("points and their columns", found, rows));
    }
    vector::write(path, crs, places, names, columns)
}

/// Reads every row, and keeps what is to be kept.
fn collect(path: &Path, mut rows: Rows, keep: &dyn Fn(&str) -> Keep) -> Result<Loaded> {
    let names = rows.names().to_vec();
    let mut growing: Vec<Growing> = names.iter().map(|name| Growing::new(keep(name))).collect();
    let whole = growing.iter().all(|column| column.keep == Keep::Cells);
    let (mut count, mut lines) = (0, Vec::new());
    let mut places: Option<[Vec<f64>; 2]> = rows.geometry().map(|_| Default::default());
    while let Some(batch) = rows.next()? {
        growing.iter_mut().zip(batch.columns).for_each(|(column, part)| column.push(count, part));
        count += batch.rows;
        lines.extend(batch.lines);
        if let (Some([x, y]), Some([px, py])) = (&mut places, batch.points) {
            x.extend(px);
            y.extend(py);
        }
    }
    let crs = match rows.geometry() {
        Some(geometry) => geometry.crs.as_deref().map(Crs::from_user).transpose()?,
        None => None,
    };
    let columns = growing.into_iter().map(|column| column.done()).collect();
    let columns = Columns { lines, whole, ..Columns::new(path, names, columns, count)? };
    let points = places.map(|[x, y]| Points { x, y, crs, crs_is_assumed: false });
    Ok(Loaded { columns, points, notes: rows.notes() })
}

/// A column on its way in.
struct Growing {
    keep: Keep,
    values: Vec<f64>,
    cells: Vec<String>,
    /// Every cell so far is a number or missing.
    numbers: bool,
}

impl Growing {
    fn new(keep: Keep) -> Self {
        Growing { keep, values: Vec::new(), cells: Vec::new(), numbers: true }
    }

    /// Takes the next cells; `before` came already.
    fn push(&mut self, before: usize, part: Column) {
        match (self.keep, part) {
            (Keep::Kind, Column::Numbers(_)) => {}
            (Keep::Kind, Column::Text(cells)) => {
                self.numbers = self.numbers && cells.iter().all(|c| number(c).is_some());
            }
            (_, Column::Numbers(values)) => self.values.extend(values),
            (Keep::Cells, Column::Text(cells)) => self.cells.extend(cells),
            (Keep::Numbers, Column::Text(cells)) => {
                for (i, cell) in cells.into_iter().enumerate() {
                    match number(&cell) {
                        _ if !self.numbers => break,
                        Some(value) => self.values.push(value),
                        None => {
                            self.numbers = false;
                            self.cells = vec![String::new(); before + i];
                            self.cells.push(cell);
                        }
                    }
                }
            }
        }
    }

    fn done(self) -> Column {
        match self.keep {
            // A writer of Parquet may have kept numbers as text; the rule is the one of CSV.
            Keep::Cells if self.values.is_empty() => column(self.cells),
            _ if self.numbers => Column::Numbers(self.values),
            _ => Column::Text(self.cells),
        }
    }
}

fn empty(path: &Path) -> Error {
    Error::input("the table has no rows")
        .fact("file", path.display())
        .try_this("check that the export finished, and that the path is right")
}

impl Columns {
    /// Columns of equal length under their names.
    pub(super) fn new(
        source: &Path,
        names: Vec<String>,
        columns: Vec<Column>,
        rows: usize,
    ) -> Result<Self> {
        if rows == 0 {
            return Err(empty(source));
        }
        let source = source.to_path_buf();
        Ok(Columns { source, names, columns, rows, lines: Vec::new(), whole: true })
    }

    /// Reads every column of numbers or text of a CSV, Parquet or vector file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened; [`Error::Input`] if it is not a table.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Ok(load(path.as_ref(), None, &|_| Keep::Cells)?.columns)
    }

    /// Names, in the order of the file.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The file it came from.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// No rows at all.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// The column called `name`: as it is written, or else without regard to case.
    ///
    /// # Errors
    /// [`Error::Input`] with the nearest name if there is none, or if there are two.
    pub fn column(&self, name: &str) -> Result<&Column> {
        Ok(&self.columns[self.find(name)?])
    }

    pub(super) fn find(&self, name: &str) -> Result<usize> {
        let exactly: Vec<usize> = self.matching(|n| n == name);
        let loosely = self.matching(|n| n.eq_ignore_ascii_case(name));
        match (exactly.as_slice(), loosely.as_slice()) {
            ([one], _) | ([], [one]) => Ok(*one),
            ([], []) => {
                let error = Error::input(format!("the table has no column `{name}`"))
                    .fact("file", self.source.display())
                    .fact("columns", self.list());
                Err(match nearest(name, &self.names) {
                    Some(close) => error.try_this(format!("did you mean `{close}`?")),
                    None => error.try_this("name one of the columns above"),
                })
            }
            _ => Err(Error::input(format!("more than one column is called `{name}`"))
                .fact("file", self.source.display())
                .fact("columns", self.list())
                .try_this("rename one of them in the file")),
        }
    }

    fn matching(&self, keep: impl Fn(&str) -> bool) -> Vec<usize> {
        (0..self.names.len()).filter(|i| keep(&self.names[*i])).collect()
    }

    /// The names, for an error.
    pub(super) fn list(&self) -> String {
        match self.names.len() {
            0 => "none".into(),
            _ => self.names.join(", "),
        }
    }

    /// The numbers of column `name`, NaN where there are none.
    ///
    /// # Errors
    /// [`Error::Input`] naming row and value if the column holds text.
    pub fn numbers(&self, name: &str) -> Result<&[f64]> {
        match self.column(name)? {
            Column::Numbers(values) => Ok(values),
            Column::Text(cells) => {
                let row = cells.iter().position(|c| number(c).is_none()).unwrap_or(0);
                let cell = &cells[row];
                Err(Error::input(format!("column `{name}` should hold numbers and holds text"))
                    .fact("file", self.source.display())
                    .fact("row", self.place(row))
                    .fact("value", format!("`{cell}`"))
                    .try_this(advice(cell)))
            }
        }
    }

    /// The cells of column `name` as text, empty where there are none.
    pub fn text(&self, name: &str) -> Result<Vec<String>> {
        Ok(match self.column(name)? {
            Column::Text(cells) => cells.clone(),
            Column::Numbers(values) => values
                .iter()
                .map(|v| if v.is_nan() { String::new() } else { v.to_string() })
                .collect(),
        })
    }

    /// Where row `i` (from 0) is, for a person: the data row from 1, and its line in a text file.
    pub(super) fn place(&self, i: usize) -> String {
        match self.lines.get(i) {
            Some(line) => format!("{} (line {line} of the file)", i + 1),
            None => (i + 1).to_string(),
        }
    }

    /// Every column, about `rows` rows at a time, with how many they are. What is not in memory is
    /// read again from the file.
    ///
    /// # Errors
    /// As the file was read the first time, and [`Error::Input`] if it is another by now.
    pub(super) fn chunks(&self, rows: usize) -> Result<Chunks<'_>> {
        if self.whole {
            return Ok(Box::new((0..self.rows).step_by(rows).map(move |start| {
                let end = self.rows.min(start + rows);
                Ok((end - start, self.columns.iter().map(|c| c.slice(start, end)).collect()))
            })));
        }
        let changed = || {
            Error::input("the table changed while it was read")
                .fact("file", self.source.display())
                .try_this("run again once nothing writes to it")
        };
        let mut file = match Format::of(&self.source)? {
            Format::Csv => Rows::Csv(Csv::open(&self.source, rows)?),
            _ => Rows::Parquet(Parquet::open(&self.source, rows)?),
        };
        if file.names() != self.names {
            return Err(changed());
        }
        let settle = move |pair: (Column, &Column)| match pair {
            (Column::Text(cells), Column::Numbers(_)) => {
                let values = cells.iter().map(|cell| number(cell)).collect::<Option<_>>();
                values.map(Column::Numbers).ok_or_else(changed)
            }
            (column, _) => Ok(column),
        };
        let mut left = self.rows;
        Ok(Box::new(std::iter::from_fn(move || match file.next() {
            Ok(Some(batch)) if batch.rows <= left => {
                left -= batch.rows;
                let columns = batch.columns.into_iter().zip(&self.columns).map(settle);
                Some(columns.collect::<Result<_>>().map(|columns| (batch.rows, columns)))
            }
            Ok(None) if left == 0 => None,
            Ok(_) => Some(Err(changed())),
            Err(error) => Some(Err(error)),
        })))
    }

    /// Rows `a` and `b` agree in every column.
    pub(super) fn same_row(&self, a: usize, b: usize) -> bool {
        self.columns.iter().all(|column| match column {
            Column::Numbers(v) => v[a] == v[b] || (v[a].is_nan() && v[b].is_nan()),
            Column::Text(cells) => cells[a] == cells[b],
        })
    }

    /// Writes columns of numbers as Parquet (zstd): under a temporary name, then renamed, so that
    /// `path` holds the whole file or is untouched. NaN is written as null.
    ///
    /// # Errors
    /// [`Error::Axis`] if two columns differ in length; [`Error::Io`] if the disk refuses.
    pub fn write_parquet(path: impl AsRef<Path>, columns: &[(&str, Vec<f64>)]) -> Result<()> {
        let names: Vec<String> = columns.iter().map(|(name, _)| name.to_string()).collect();
        let whole = columns.iter().map(|(_, values)| Column::Numbers(values.clone())).collect();
        let path = path.as_ref();
        check_chunk(&names, &whole)?;
        write_whole(path, |file| write_as_parquet(file, &names, whole, std::iter::empty()))
    }

    /// Writes columns with a geometry for each row as GeoParquet 1.1 (zstd): well-known binary, empty
    /// where a row has none; `crs` is PROJJSON, nothing for a plane of its own. `path` holds the
    /// whole file or is untouched.
    ///
    /// # Errors
    /// [`Error::Axis`] if columns or geometries differ in length; [`Error::Io`] if the disk refuses.
    pub fn write_geoparquet(
        path: impl AsRef<Path>,
        names: &[String],
        columns: Vec<Column>,
        wkb: &[Vec<u8>],
        crs: Option<String>,
    ) -> Result<()> {
        let path = path.as_ref();
        check_chunk(names, &columns)?;
        if let Some(column) = columns.first().filter(|c| c.len() != wkb.len()) {
            return Err(Error::axis("cells and geometries", column.len(), wkb.len()));
        }
        let crs: serde_json::Value = match crs {
            None => serde_json::Value::Null,
            Some(text) => serde_json::from_str(&text).map_err(|e| {
                Error::input(format!("the coordinate reference system is no PROJJSON: {e}"))
            })?,
        };
        // Types may be left out: an empty list says that they are not known.
        let geometry = serde_json::json!({ "encoding": "WKB", "geometry_types": [], "crs": crs });
        let geo = serde_json::json!({
            "version": "1.1.0",
            "primary_column": GEOMETRY,
            "columns": { GEOMETRY: geometry },
        });
        let mut fields: Vec<Field> = Vec::new();
        let mut arrays: Vec<Arc<dyn Array>> = Vec::new();
        for (name, column) in names.iter().zip(columns) {
            fields.push(field(name, &column));
            arrays.push(array(column));
        }
        fields.push(Field::new(GEOMETRY, DataType::Binary, true));
        let shapes = wkb.iter().map(|wkb| (!wkb.is_empty()).then_some(wkb));
        arrays.push(Arc::new(BinaryArray::from_iter(shapes)));
        let schema = Arc::new(Schema::new(fields));
        let batch = RecordBatch::try_new(schema.clone(), arrays)?;
        let geo = parquet::file::metadata::KeyValue::new("geo".to_string(), geo.to_string());
        let settings = settings().set_key_value_metadata(Some(vec![geo])).build();
        write_whole(path, |file| {
            let mut writer = ArrowWriter::try_new(file, schema, Some(settings))?;
            writer.write(&batch)?;
            writer.close()?;
            Ok(())
        })
    }

    /// Writes a table chunk by chunk, so that it is never held whole: Parquet (zstd), or CSV where
    /// `path` ends in .csv. The first chunk settles which columns are numbers and which are text.
    /// NaN and empty text are written as null. `path` holds the whole file or is untouched.
    ///
    /// # Errors
    /// Whatever a chunk is; [`Error::Axis`] if columns differ in length; [`Error::Io`] if the disk
    /// refuses; [`Error::Input`] for another extension, or no chunk at all.
    pub fn write(
        path: impl AsRef<Path>,
        names: &[String],
        chunks: impl IntoIterator<Item = Result<Vec<Column>>>,
    ) -> Result<()> {
        let path = path.as_ref();
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        if extension != "parquet" && extension != "csv" {
            return Err(Error::input("a table is written as .parquet or .csv")
                .fact("out", path.display())
                .try_this("for example --out table.parquet"));
        }
        let mut chunks = chunks.into_iter().map(|chunk| {
            let chunk = chunk?;
            check_chunk(names, &chunk)?;
            Ok(chunk)
        });
        let first = chunks.next().ok_or_else(|| empty(path))??;
        write_whole(path, |file| match extension == "csv" {
            true => write_as_csv(file, path, names, first, chunks),
            false => write_as_parquet(file, names, first, chunks),
        })
    }
}

fn check_chunk(names: &[String], chunk: &Vec<Column>) -> Result<()> {
    if names.len() != chunk.len() {
        return Err(Error::axis("names and columns", names.len(), chunk.len()));
    }
    for (name, column) in names.iter().zip(chunk) {
        if column.len() != chunk[0].len() {
            let what = format!("columns `{}` and `{name}`", names[0]);
            return Err(Error::axis(what, chunk[0].len(), column.len()));
        }
    }
    Ok(())
}

/// Name of the geometries that we write.
const GEOMETRY: &str = "geometry";

/// A column as Parquet knows it.
fn field(name: &str, column: &Column) -> Field {
    let kind = match column {
        Column::Numbers(_) => DataType::Float64,
        Column::Text(_) => DataType::Utf8,
    };
    Field::new(name, kind, true)
}

/// NaN and empty text are null.
fn array(column: Column) -> Arc<dyn Array> {
    match column {
        Column::Numbers(values) => {
            Arc::new(Float64Array::from_iter(values.iter().map(|v| (!v.is_nan()).then_some(*v))))
        }
        Column::Text(cells) => {
            Arc::new(StringArray::from_iter(cells.iter().map(|c| (!c.is_empty()).then_some(c))))
        }
    }
}

fn settings() -> parquet::file::properties::WriterPropertiesBuilder {
    let zstd = parquet::basic::Compression::ZSTD(Default::default());
    parquet::file::properties::WriterProperties::builder().set_compression(zstd)
}

fn write_as_parquet(
    file: &mut File,
    names: &[String],
    first: Vec<Column>,
    rest: impl Iterator<Item = Result<Vec<Column>>>,
) -> Result<()> {
    let fields = names.iter().zip(&first).map(|(name, column)| field(name, column));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let mut writer = ArrowWriter::try_new(file, schema.clone(), Some(settings().build()))?;
    for chunk in std::iter::once(Ok(first)).chain(rest) {
        let arrays = chunk?.into_iter().map(array).collect();
        writer.write(&RecordBatch::try_new(schema.clone(), arrays)?)?;
        if writer.memory_size() > ROW_GROUP {
            writer.flush()?;
        }
    }
    writer.close()?;
    Ok(())
}

fn write_as_csv(
    file: &mut File,
    path: &Path,
    names: &[String],
    first: Vec<Column>,
    rest: impl Iterator<Item = Result<Vec<Column>>>,
) -> Result<()> {
    let refused = |e: csv::Error| match e.into_kind() {
        csv::ErrorKind::Io(source) => Error::io("write", path, source),
        other => Error::input(format!("the table cannot be written as CSV: {other:?}")),
    };
    let mut writer = csv::Writer::from_writer(file);
    writer.write_record(names).map_err(refused)?;
    for chunk in std::iter::once(Ok(first)).chain(rest) {
        let chunk = chunk?;
        for row in 0..chunk[0].len() {
            let cell = |column: &Column| match column {
                Column::Numbers(values) if values[row].is_nan() => String::new(),
                Column::Numbers(values) => values[row].to_string(),
                Column::Text(cells) => cells[row].clone(),
            };
            writer.write_record(chunk.iter().map(cell)).map_err(refused)?;
        }
    }
    writer.flush().map_err(|e| Error::io("write", path, e))
}

/// Writes a table whole, or not at all, with the disk's own words where it refuses.
pub(super) fn write_whole(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    whole::write(path, |file| {
        write(file).map_err(|e| match e {
            // The writer hides the disk's reason; ask the disk again, in its own words.
            Error::Parquet(parquet::errors::ParquetError::External(source)) => {
                match source.downcast::<std::io::Error>() {
                    Ok(source) => Error::io("write", path, *source),
                    Err(source) => parquet::errors::ParquetError::External(source).into(),
                }
            }
            other => other,
        })
    })
}

/// A cell as a number: NaN if it says that there is none, `None` if it is text.
pub(super) fn number(cell: &str) -> Option<f64> {
    const MISSING: [&str; 9] = ["", "na", "n/a", "#n/a", "nan", "null", "none", "-", "."];
    let cell = cell.trim();
    if MISSING.iter().any(|m| cell.eq_ignore_ascii_case(m)) {
        return Some(f64::NAN);
    }
    cell.parse().ok()
}

/// What to try about a cell that should be a number.
fn advice(cell: &str) -> String {
    let cell = cell.trim();
    if number(&cell.replace(',', ".")).is_some() {
        let point = cell.replace(',', ".");
        format!("decimal commas are not read: write {point}, or export with decimal points")
    } else if cell.contains('°') || cell.contains('\'') {
        "write degrees as decimal numbers: 8°30'S is -8.5".into()
    } else if cell.ends_with('%') {
        "write the number without a percent sign".into()
    } else {
        "correct the cell, leave it empty if the value is unknown, or name another column".into()
    }
}

/// Text cells as numbers if every one is a number or missing.
pub(super) fn column(cells: Vec<String>) -> Column {
    match cells.iter().map(|c| number(c)).collect::<Option<Vec<f64>>>() {
        Some(values) => Column::Numbers(values),
        None => Column::Text(cells),
    }
}

/// The separator that splits the first line into the most cells.
fn sniff(text: &str) -> u8 {
    let first = text.lines().find(|l| !l.trim().is_empty()).unwrap_or("");
    let mut quoted = false;
    let mut counts = [(b',', 0), (b';', 0), (b'\t', 0), (b'|', 0)];
    for byte in first.bytes() {
        quoted ^= byte == b'"';
        for (separator, count) in counts.iter_mut() {
            *count += usize::from(byte == *separator && !quoted);
        }
    }
    // The first wins a tie, so that a line without any separator is one comma-separated column.
    counts.iter().rev().max_by_key(|(_, count)| *count).map_or(b',', |(separator, _)| *separator)
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a decoder that panics on some damaged files (parquet 59 asserts on bit widths), and
/// gives the panic back as an error instead of printing it. Other panics print as ever.
fn guarded<T>(
    decode: impl FnOnce() -> std::result::Result<T, String>,
) -> std::result::Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                usual(info);
            }
        }));
    });
    GUARDED.set(true);
    let outcome = panic::catch_unwind(panic::AssertUnwindSafe(decode));
    GUARDED.set(false);
    outcome.unwrap_or_else(|_| Err("the decoder met impossible bytes".into()))
}

/// What GeoParquet metadata say about the primary geometry.
struct GeoColumn {
    name: String,
    encoding: String,
    /// As [`Crs::from_user`] reads it; `None` where the file says that it is unknown.
    crs: Option<String>,
}

impl GeoColumn {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let geo: serde_json::Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let name = geo["primary_column"].as_str().ok_or("no `primary_column`")?;
        let column = geo["columns"].get(name).ok_or(format!("no column `{name}`"))?;
        let encoding = column["encoding"].as_str().ok_or("no `encoding`")?;
        let crs = match column.get("crs") {
            None => Some("OGC:CRS84".to_string()), // What the format says absence means.
            Some(serde_json::Value::Null) => None,
            Some(serde_json::Value::String(text)) => Some(text.clone()), // GeoParquet 0.3
            Some(projjson) => Some(projjson.to_string()),
        };
        Ok(GeoColumn { name: name.into(), encoding: encoding.into(), crs })
    }

    /// The places in a batch whose first row is the file's row `first` (from 0): (x, y).
    fn points(&self, path: &Path, batch: &RecordBatch, first: usize) -> Result<[Vec<f64>; 2]> {
        let refuse = |what: String| Error::input(what).fact("file", path.display());
        let array = batch.column_by_name(&self.name).ok_or_else(|| {
            refuse(format!("the geometry column `{}` is missing", self.name))
                .try_this("write the file again, or name coordinate columns with --lon and --lat")
        })?;
        let (mut x, mut y) = (vec![f64::NAN; batch.num_rows()], vec![f64::NAN; batch.num_rows()]);
        let bytes = cast(array, &DataType::LargeBinary);
        match (self.encoding.as_str(), bytes, array.as_any().downcast_ref::<StructArray>()) {
            ("WKB", Ok(bytes), _) => {
                for (row, wkb) in bytes.as_binary::<i64>().iter().enumerate() {
                    let Some(wkb) = wkb else { continue };
                    let Some(point) =
                        wkb_point(wkb).map_err(|kind| not_a_point(path, first + row, &kind))?
                    else {
                        continue;
                    };
                    (x[row], y[row]) = (point[0], point[1]);
                }
            }
            ("point", _, Some(parts)) => {
                for (name, values) in [("x", &mut x), ("y", &mut y)] {
                    let part = parts.column_by_name(name).ok_or_else(|| {
                        refuse(format!("the geometry column `{}` has no `{name}`", self.name))
                    })?;
                    let part = cast(part, &DataType::Float64)?;
                    let part = part.as_primitive::<Float64Type>();
                    for row in (0..values.len()).filter(|r| !parts.is_null(*r) && !part.is_null(*r))
                    {
                        values[row] = part.value(row);
                    }
                }
            }
            (encoding, ..) => {
                return Err(refuse(format!("geometries encoded as `{encoding}` cannot be read"))
                    .fact("column", &self.name)
                    .try_this(
                        "write points as WKB, or name coordinate columns with --lon and --lat",
                    ));
            }
        }
        Ok([x, y])
    }
}

/// The error for a geometry of another kind than a point, in row `row` (from 0).
pub(super) fn not_a_point(path: &Path, row: usize, kind: &str) -> Error {
    Error::input("sites must be points, and a row holds another geometry")
        .fact("file", path.display())
        .fact("row", row + 1)
        .fact("geometry", kind)
        .try_this("replace areas and lines by one point per survey, for example their centroids")
}

/// The point in a WKB geometry: `None` if it is empty, the kind of geometry if it is no point.
/// A multipoint of one point is a point, since some programs write nothing else.
fn wkb_point(wkb: &[u8]) -> std::result::Result<Option<[f64; 2]>, String> {
    let cut = || "WKB that is cut short".to_string();
    let little = match wkb.first() {
        Some(0) => false,
        Some(1) => true,
        _ => return Err("WKB without a byte order".into()),
    };
    let word = |at: usize| -> std::result::Result<u32, String> {
        let bytes = wkb.get(at..at + 4).ok_or_else(cut)?.try_into().map_err(|_| cut())?;
        Ok(if little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    };
    let double = |at: usize| -> std::result::Result<f64, String> {
        let bytes = wkb.get(at..at + 8).ok_or_else(cut)?.try_into().map_err(|_| cut())?;
        Ok(if little { f64::from_le_bytes(bytes) } else { f64::from_be_bytes(bytes) })
    };
    // ISO adds 1000 for Z and 2000 for M; EWKB sets high bits, one of which adds an SRID.
    let code = word(1)?;
    let start = if code & 0x2000_0000 == 0 { 5 } else { 9 };
    match (code & 0x0fff_ffff) % 1000 {
        1 => {
            let point = [double(start)?, double(start + 8)?];
            Ok((!point.iter().all(|v| v.is_nan())).then_some(point))
        }
        4 => match word(start)? {
            0 => Ok(None),
            1 => wkb_point(&wkb[start + 4..]),
            n => Err(format!("a multipoint of {n} points")),
        },
        2 => Err("a line string".into()),
        3 => Err("a polygon".into()),
        5 => Err("a multi line string".into()),
        6 => Err("a multipolygon".into()),
        7 => Err("a geometry collection".into()),
        other => Err(format!("WKB geometry type {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_numbers_missing_or_text() {
        assert_eq!(number(" -1.5e2 "), Some(-150.0));
        assert_eq!(number("inf"), Some(f64::INFINITY));
        for missing in ["", " ", "NA", "n/a", "NaN", "null", "-"] {
            assert!(number(missing).is_some_and(f64::is_nan), "{missing}");
        }
        for text in ["8,04", "12%", "8°30'", "1 234", "x"] {
            assert_eq!(number(text), None, "{text}");
        }
    }

    #[test]
    fn the_separator_is_the_commonest_outside_quotes() {
        assert_eq!(sniff("a,b,c\n"), b',');
        assert_eq!(sniff("a;b;\"c,d,e,f\"\n"), b';');
        assert_eq!(sniff("\na\tb\n"), b'\t');
        assert_eq!(sniff("alone\n"), b',');
    }

    #[test]
    fn wkb_points_in_every_dress() {
        // POINT(2 3), little-endian and big-endian, from the examples in OGC 06-103r4 §8.2.
        let little = [vec![1, 1, 0, 0, 0], 2f64.to_le_bytes().into(), 3f64.to_le_bytes().into()];
        let big = [vec![0, 0, 0, 0, 1], 2f64.to_be_bytes().into(), 3f64.to_be_bytes().into()];
        assert_eq!(wkb_point(&little.concat()), Ok(Some([2.0, 3.0])));
        assert_eq!(wkb_point(&big.concat()), Ok(Some([2.0, 3.0])));
        // ISO Z (1001) and EWKB with SRID and Z.
        let z = [&1001u32.to_le_bytes()[..], &2f64.to_le_bytes(), &3f64.to_le_bytes(), &[0; 8]];
        assert_eq!(wkb_point(&[&[1][..], &z.concat()].concat()), Ok(Some([2.0, 3.0])));
        let ewkb = [
            &[1][..],
            &0xa000_0001u32.to_le_bytes(),
            &4326u32.to_le_bytes(),
            &2f64.to_le_bytes(),
            &3f64.to_le_bytes(),
            &[0; 8],
        ];
        assert_eq!(wkb_point(&ewkb.concat()), Ok(Some([2.0, 3.0])));
        let one = [&[1, 4, 0, 0, 0, 1, 0, 0, 0][..], &little.concat()].concat();
        assert_eq!(wkb_point(&one), Ok(Some([2.0, 3.0])));
        let nan = f64::NAN.to_le_bytes();
        assert_eq!(wkb_point(&[&[1, 1, 0, 0, 0][..], &nan, &nan].concat()), Ok(None));
        assert!(wkb_point(&little.concat()[..20]).unwrap_err().contains("cut short"));
        assert!(wkb_point(&[1, 3, 0, 0, 0, 0, 0, 0, 0]).unwrap_err().contains("polygon"));
        assert!(wkb_point(&[]).is_err());
    }
}
