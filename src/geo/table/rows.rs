//! CSV and Parquet files batch by batch, so that a table need not be held whole.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use arrow::{
    array::{AsArray, RecordBatch},
    compute::cast,
    datatypes::{DataType, Float64Type, Schema},
};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::{Column, GeoColumn, guarded, number, sniff};
use crate::error::{Error, Result};

/// Some rows of a table, as the file gives them: in CSV every cell is text.
pub(super) struct Batch {
    pub rows: usize,
    pub columns: Vec<Column>,
    /// Line of the file on which each row starts, where the file has lines.
    pub lines: Vec<u64>,
    /// Places of the rows, where the file has geometries.
    pub points: Option<[Vec<f64>; 2]>,
}

/// A file that is being read.
pub(super) enum Rows {
    Csv(Csv),
    Parquet(Parquet),
}

impl Rows {
    /// Names of the columns of numbers or text, in the order of the file.
    pub fn names(&self) -> &[String] {
        match self {
            Rows::Csv(csv) => &csv.names,
            Rows::Parquet(parquet) => &parquet.names,
        }
    }

    /// The next rows; none after the last.
    pub fn next(&mut self) -> Result<Option<Batch>> {
        match self {
            Rows::Csv(csv) => csv.next(),
            Rows::Parquet(parquet) => parquet.next(),
        }
    }

    /// The file's geometry column.
    pub fn geometry(&self) -> Option<&GeoColumn> {
        match self {
            Rows::Csv(_) => None,
            Rows::Parquet(parquet) => parquet.geometry.as_ref(),
        }
    }

    /// What was noticed so far.
    pub fn notes(&self) -> Vec<String> {
        match self {
            Rows::Csv(csv) if csv.lossy => {
                vec!["the file is not UTF-8: letters with accents may show as �".into()]
            }
            _ => Vec::new(),
        }
    }
}

pub(super) struct Csv {
    path: PathBuf,
    reader: csv::Reader<BufReader<File>>,
    names: Vec<String>,
    delimiter: u8,
    /// Rows read, and rows in a batch.
    done: usize,
    rows: usize,
    /// Some bytes were not UTF-8.
    lossy: bool,
}

/// The text of a cell or name.
fn text(bytes: &[u8], lossy: &mut bool) -> String {
    let text = String::from_utf8_lossy(bytes);
    *lossy |= matches!(text, std::borrow::Cow::Owned(_));
    text.trim().to_string()
}

impl Csv {
    pub fn open(path: &Path, rows: usize) -> Result<Self> {
        let failed = |e| Error::io("read", path, e);
        let refuse = |what: &str| Error::input(what).fact("file", path.display());
        let mut file = BufReader::with_capacity(1 << 16, File::open(path).map_err(failed)?);
        let start = file.fill_buf().map_err(failed)?;
        if start.starts_with(&[0xff, 0xfe]) || start.starts_with(&[0xfe, 0xff]) {
            return Err(refuse("the file is UTF-16 text").try_this("save it as CSV UTF-8"));
        }
        if start.contains(&0) {
            return Err(not_text(path));
        }
        let mark = if start.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        let delimiter = sniff(&String::from_utf8_lossy(&start[mark..]));
        file.consume(mark);
        let mut reader =
            csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(file);
        let mut lossy = false;
        let header = reader.byte_headers().map_err(|e| broken(path, &e))?;
        let names: Vec<String> = header.iter().map(|name| text(name, &mut lossy)).collect();
        if names.iter().all(|n| number(n).is_some()) {
            return Err(refuse("the first line holds values, not the names of columns")
                .fact("first line", names.join(", "))
                .try_this("add a line of column names, such as lon,lat,tested,positive"));
        }
        Ok(Csv { path: path.to_path_buf(), reader, names, delimiter, done: 0, rows, lossy })
    }

    fn next(&mut self) -> Result<Option<Batch>> {
        let mut cells = vec![Vec::new(); self.names.len()];
        let mut lines = Vec::new();
        let mut record = csv::ByteRecord::new();
        while lines.len() < self.rows
            && self.reader.read_byte_record(&mut record).map_err(|e| broken(&self.path, &e))?
        {
            let line = record.position().map_or(0, |p| p.line());
            self.done += 1;
            if record.as_slice().contains(&0) {
                return Err(not_text(&self.path));
            }
            if record.len() != self.names.len() {
                return Err(self.ragged(record.len(), line));
            }
            for (column, cell) in cells.iter_mut().zip(&record) {
                column.push(text(cell, &mut self.lossy));
            }
            lines.push(line);
        }
        let columns = cells.into_iter().map(Column::Text).collect();
        let rows = lines.len();
        Ok((rows > 0).then_some(Batch { rows, columns, lines, points: None }))
    }

    fn ragged(&self, cells: usize, line: u64) -> Error {
        let separator = match self.delimiter {
            b'\t' => "tab".to_string(),
            byte => format!("`{}`", char::from(byte)),
        };
        Error::input("a row has not as many cells as there are columns")
            .fact("file", self.path.display())
            .fact("row", format!("{} (line {line} of the file)", self.done))
            .fact("cells", cells)
            .fact("columns", format!("{} ({})", self.names.len(), self.names.join(", ")))
            .fact("separator", separator)
            .try_this(
                "put quotes around cells that hold the separator; numbers need a decimal point, \
                 not a comma",
            )
    }
}

fn broken(path: &Path, error: &csv::Error) -> Error {
    Error::input("the file is not CSV").fact("file", path.display()).fact("reader says", error)
}

fn not_text(path: &Path) -> Error {
    Error::input("the file is not text")
        .fact("file", path.display())
        .try_this("give it the extension of what it is, or export it as CSV")
}

pub(super) struct Parquet {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    names: Vec<String>,
    geometry: Option<GeoColumn>,
    done: usize,
}

/// The values of a type: dictionaries are looked up.
fn plain(kind: &DataType) -> &DataType {
    match kind {
        DataType::Dictionary(_, value) => value,
        kind => kind,
    }
}

fn numeric(kind: &DataType) -> bool {
    kind.is_numeric() || *kind == DataType::Boolean
}

/// Geometries, lists and structs are not columns of a table of sites.
fn readable(kind: &DataType) -> bool {
    numeric(kind) || kind.is_string() || kind.is_temporal() || kind.is_null()
}

impl Parquet {
    pub fn open(path: &Path, rows: usize) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
        let opened = guarded(|| {
            let builder =
                ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| e.to_string())?;
            let pairs = builder.metadata().file_metadata().key_value_metadata();
            let geo = pairs
                .and_then(|pairs| pairs.iter().find(|pair| pair.key == "geo"))
                .and_then(|pair| pair.value.clone());
            let schema = builder.schema().clone();
            let reader = builder.with_batch_size(rows).build().map_err(|e| e.to_string())?;
            Ok((geo, schema, reader))
        });
        let (geo, schema, reader) = opened.map_err(|e| damaged(path, &e))?;
        let geometry = geo.as_deref().map(GeoColumn::parse).transpose().map_err(|reason| {
            Error::input("the GeoParquet metadata cannot be understood")
                .fact("file", path.display())
                .fact("reason", reason)
                .try_this("write the file again, or name coordinate columns with --lon and --lat")
        })?;
        let names = names(&schema);
        Ok(Parquet { path: path.to_path_buf(), reader, names, geometry, done: 0 })
    }

    fn next(&mut self) -> Result<Option<Batch>> {
        let batch = guarded(|| self.reader.next().transpose().map_err(|e| e.to_string()));
        let Some(batch) = batch.map_err(|e| damaged(&self.path, &e))? else { return Ok(None) };
        let columns = columns(&batch)?;
        let points = match &self.geometry {
            Some(geometry) => Some(geometry.points(&self.path, &batch, self.done)?),
            None => None,
        };
        let rows = batch.num_rows();
        self.done += rows;
        Ok(Some(Batch { rows, columns, lines: Vec::new(), points }))
    }
}

fn damaged(path: &Path, reason: &str) -> Error {
    Error::input("the file is not whole Parquet")
        .fact("file", path.display())
        .fact("reader says", reason)
        .try_this("it may be cut short or of another kind: copy or write it again")
}

fn names(schema: &Schema) -> Vec<String> {
    let readable = schema.fields().iter().filter(|field| readable(plain(field.data_type())));
    readable.map(|field| field.name().clone()).collect()
}

fn columns(batch: &RecordBatch) -> Result<Vec<Column>> {
    let schema = batch.schema();
    let fields = schema.fields().iter().zip(batch.columns());
    fields
        .map(|(field, array)| (plain(field.data_type()), array))
        .filter(|(kind, _)| readable(kind))
        .map(|(kind, array)| {
            if numeric(kind) {
                let array = cast(array, &DataType::Float64)?;
                let values = array.as_primitive::<Float64Type>();
                return Ok(Column::Numbers(values.iter().map(|v| v.unwrap_or(f64::NAN)).collect()));
            }
            let array = cast(array, &DataType::Utf8)?;
            let cells = array.as_string::<i32>();
            Ok(Column::Text(cells.iter().map(|c| c.unwrap_or("").to_string()).collect()))
        })
        .collect()
}
