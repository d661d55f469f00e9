//! Covariates: what is known of a place beside where it lies, from rasters or from columns of a table.
//!
//! The rule of this file is that of the surveys: what is missing is dropped, counted and named, and what
//! is wrong stops the run. "No data" is never a number: not where a raster declares it, and not where
//! it holds −9999 and forgot to.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::{
    crs::Crs,
    grid::Resolution,
    survey::{CODES, Dropped, Survey},
    table::{Column, Columns, Keep, load},
};
use crate::error::{Error, Result};

mod design;
mod lattice;
mod sample;

pub use design::{Cover, Design, Feature};
pub use lattice::{Head, KNOWN, Lattice, Region, VALUES};

/// The most levels that a categorical covariate may have at the sites.
pub const MOST_LEVELS: usize = 50;

/// How a raster is read at a place.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// The pixel that the place lies in.
    Nearest,
    /// Between the centres of the four pixels around the place, those without data left out.
    Bilinear,
    /// The average of the pixels whose centres lie within so many metres, and of the place's own.
    Mean(f64),
}

/// On what scale a covariate acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// As it is.
    Plain,
    /// Its natural logarithm; above 0.
    Log,
    /// ln(1 + value); above −1. For populations and distances that may be 0.
    Log1p,
    /// Its square root; 0 or above.
    Sqrt,
}

/// Where a covariate comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A raster's band, from 1.
    Raster {
        /// Any file that GDAL reads.
        file: PathBuf,
        /// The band, from 1.
        band: usize,
    },
    /// A column of the survey's table, and of the targets'.
    Column(String),
}

/// What a user asked for: `elevation=elevation.tif:1,bilinear,log`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// What to call it.
    pub name: String,
    /// Where it comes from.
    pub source: Source,
    /// How its raster is read.
    pub sampling: Sampling,
    /// Its numbers are names: each level has an effect of its own.
    pub categorical: bool,
    /// On what scale it acts.
    pub scale: Scale,
    /// Where its slope may change, in its unit.
    pub knots: Vec<f64>,
}

const OPTIONS: &str = "nearest, bilinear, mean:5km, categorical, log, log1p, sqrt, knot:650";

impl FromStr for Spec {
    type Err = Error;

    /// `NAME=FILE[:BAND][,nearest|bilinear|mean:RADIUS][,categorical][,log|log1p|sqrt][,knot:VALUE]`.
    ///
    /// ```
    /// use isopleth::geo::covariates::{Sampling, Source, Spec};
    /// let spec: Spec = "cover=lc.tif:2,categorical".parse()?;
    /// assert_eq!(spec.source, Source::Raster { file: "lc.tif".into(), band: 2 });
    /// assert_eq!(spec.sampling, Sampling::Nearest);
    /// assert!("elevation.tif".parse::<Spec>().is_err()); // called what?
    /// # Ok::<(), isopleth::Error>(())
    /// ```
    fn from_str(text: &str) -> Result<Self> {
        let refuse = |what: &str| {
            Error::input(what).fact("--covariate", text).try_this(format!(
                "write NAME=FILE, for example elevation=elevation.tif, and behind it what applies of \
                 :BAND, {OPTIONS}"
            ))
        };
        let mut parts = text.split(',').map(str::trim);
        let Some((name, file)) = parts.next().and_then(|first| first.split_once('=')) else {
            return Err(refuse("a covariate needs a name and a file"));
        };
        let (file, band) = match file.rsplit_once(':') {
            // Not the colon of `C:\elevation.tif`.
            Some((file, band)) if band.chars().all(|c| c.is_ascii_digit()) && !band.is_empty() => {
                match band.parse() {
                    Ok(band) if band >= 1 => (file, band),
                    _ => return Err(refuse("bands of a raster count from 1")),
                }
            }
            _ => (file, 1),
        };
        if name.trim().is_empty() || file.trim().is_empty() {
            return Err(refuse("a covariate needs a name and a file"));
        }
        let source = Source::Raster { file: file.trim().into(), band };
        Spec::new(name.trim(), source).with(parts, text)
    }
}

impl Spec {
    fn new(name: &str, source: Source) -> Self {
        Spec {
            name: name.to_string(),
            source,
            sampling: Sampling::Bilinear,
            categorical: false,
            scale: Scale::Plain,
            knots: Vec::new(),
        }
    }

    /// A column of the tables: `COLUMN[,categorical][,log|log1p|sqrt][,knot:VALUE]`.
    ///
    /// # Errors
    /// [`Error::Input`] for what it cannot mean.
    pub fn column(text: &str) -> Result<Self> {
        let mut parts = text.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        if name.is_empty() {
            return Err(Error::input("a covariate's column has a name")
                .fact("--covariate-column", text)
                .try_this("name a column of the survey's table"));
        }
        let spec = Spec::new(name, Source::Column(name.to_string())).with(parts, text)?;
        match text.split(',').map(str::trim).find(|o| o.parse::<Sampling>().is_ok()) {
            Some(option) => Err(Error::input("only a raster is read in a way of its own")
                .fact("--covariate-column", text)
                .fact("option", option)
                .try_this("leave it out")),
            None => Ok(spec),
        }
    }

    /// The options behind a name.
    fn with<'a>(mut self, options: impl Iterator<Item = &'a str>, text: &str) -> Result<Self> {
        let refuse = |what: &str, option: &str, help: &str| {
            Err(Error::input(what).fact("covariate", text).fact("option", option).try_this(help))
        };
        let mut said = None;
        for option in options {
            match option {
                "categorical" => self.categorical = true,
                "log" => self.scale = Scale::Log,
                "log1p" => self.scale = Scale::Log1p,
                "sqrt" => self.scale = Scale::Sqrt,
                _ if option.parse::<Sampling>().is_ok() => said = option.parse().ok(),
                _ => match option.strip_prefix("knot:").map(str::parse) {
                    Some(Ok(knot)) if f64::is_finite(knot) => self.knots.push(knot),
                    _ => {
                        let help = format!("options are {OPTIONS}");
                        return refuse("this is no option of a covariate", option, &help);
                    }
                },
            }
        }
        if self.categorical && said.is_some_and(|s| s != Sampling::Nearest) {
            let help = "leave the sampling out: a category is read from the pixel a place lies in";
            return refuse("categories have no average", "categorical", help);
        }
        if self.categorical && (self.scale != Scale::Plain || !self.knots.is_empty()) {
            let help = "leave log, log1p, sqrt and knot out: they are of numbers";
            return refuse("categories have no logarithm, root or slope", "categorical", help);
        }
        self.sampling = match (said, self.categorical) {
            (Some(said), _) => said,
            (None, true) => Sampling::Nearest,
            (None, false) => Sampling::Bilinear,
        };
        if let Some(knot) = self.knots.iter().find(|knot| !self.scaled(**knot).is_finite()) {
            return refuse(
                "a knot lies where the logarithm or root is not defined",
                &format!("knot:{knot}"),
                "knots are in the covariate's own unit",
            );
        }
        self.knots.sort_by(f64::total_cmp);
        self.knots.dedup();
        Ok(self)
    }

    /// Whether it is the same number of a place as another: from any file that holds the same, or from a
    /// column of a table, whose numbers were read by somebody else.
    pub fn is_like(&self, other: &Spec) -> bool {
        let column = [self, other].iter().any(|spec| matches!(spec.source, Source::Column(_)));
        (&self.name, self.categorical, self.scale, &self.knots)
            == (&other.name, other.categorical, other.scale, &other.knots)
            && (column || self.sampling == other.sampling)
    }

    /// How it is asked for, with `FILE` for its file.
    pub fn asked(&self) -> String {
        let mut text = format!("--covariate {}=FILE", self.name);
        match self.sampling {
            Sampling::Bilinear => {}
            Sampling::Nearest if self.categorical => {}
            Sampling::Nearest => text += ",nearest",
            Sampling::Mean(radius) => {
                text += &format!(",mean:{}", Resolution::Metres(radius)).replace(' ', "")
            }
        }
        if self.categorical {
            text += ",categorical";
        }
        text += match self.scale {
            Scale::Plain => "",
            Scale::Log => ",log",
            Scale::Log1p => ",log1p",
            Scale::Sqrt => ",sqrt",
        };
        self.knots.iter().for_each(|knot| text += &format!(",knot:{knot}"));
        text
    }

    /// A value on the scale on which it acts; NaN or infinite where it has none.
    fn scaled(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Plain => value,
            Scale::Log => value.ln(),
            Scale::Log1p => value.ln_1p(),
            Scale::Sqrt => value.sqrt(),
        }
    }
}

impl FromStr for Sampling {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "nearest" => Ok(Sampling::Nearest),
            "bilinear" => Ok(Sampling::Bilinear),
            _ => match text.strip_prefix("mean:").map(str::parse) {
                Some(Ok(Resolution::Metres(radius))) => Ok(Sampling::Mean(radius)),
                _ => Err(Error::input(format!("`{text}` is no way to read a raster"))
                    .try_this("write nearest, bilinear or mean:5km")),
            },
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Raster { file, band: 1 } => write!(f, "{}", file.display()),
            Source::Raster { file, band } => write!(f, "{} band {band}", file.display()),
            Source::Column(name) => write!(f, "column `{name}`"),
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {}", self.name, self.source)?;
        if let Source::Raster { .. } = self.source {
            match self.sampling {
                Sampling::Nearest => write!(f, ", nearest pixel")?,
                Sampling::Bilinear => write!(f, ", bilinear")?,
                Sampling::Mean(r) => write!(f, ", mean within {}", Resolution::Metres(r))?,
            }
        }
        if self.categorical {
            write!(f, ", categorical")?;
        }
        match self.scale {
            Scale::Plain => Ok(()),
            Scale::Log => write!(f, ", logarithm"),
            Scale::Log1p => write!(f, ", ln(1 + value)"),
            Scale::Sqrt => write!(f, ", square root"),
        }?;
        self.knots.iter().try_for_each(|knot| write!(f, ", slope may change at {knot}"))
    }
}

/// What covariates are at the sites of a survey.
#[derive(Debug, Clone, PartialEq)]
pub struct Covariates {
    /// What was asked for.
    pub specs: Vec<Spec>,
    /// `[covariate][site]`, in the covariate's unit, finite; categories as codes.
    pub values: Vec<Vec<f64>>,
    /// `[covariate][code]`: names of categories that the table spells out; empty for numbers.
    pub words: Vec<Vec<String>>,
}

impl Covariates {
    /// Those of the sites at these positions, in this order.
    pub fn subset(&self, sites: &[usize]) -> Self {
        let pick = |v: &Vec<f64>| sites.iter().map(|i| v[*i]).collect();
        Covariates { values: self.values.iter().map(pick).collect(), ..self.clone() }
    }

    /// A survey with its covariates. Sites without one of them are dropped and listed in
    /// [`Survey::dropped`].
    ///
    /// # Errors
    /// [`Error::Input`] if two covariates have one name, a raster holds an undeclared −9999 or its like
    /// where it is read, has no CRS or does not lie where the sites do; for text among numbers, values
    /// outside a logarithm's domain, more than [`MOST_LEVELS`] levels, or a covariate that is the same
    /// at every site.
    pub fn attach(survey: Survey, specs: &[Spec], layer: Option<&str>) -> Result<Survey> {
        if specs.is_empty() {
            return Ok(survey);
        }
        if let Some(i) =
            (1..specs.len()).find(|i| specs[..*i].iter().any(|s| s.name == specs[*i].name))
        {
            return Err(Error::input("two covariates have the same name")
                .fact("name", &specs[i].name)
                .try_this("give each a name of its own: NAME=FILE"));
        }
        if survey.displacement.is_some() {
            return Err(Error::input(
                "covariates are read where sites are, and these were displaced",
            )
            .fact("covariate", &specs[0])
            .try_this(
                "leave out --displacement or the covariates: the two do not go together yet",
            ));
        }
        let named = specs.iter().any(|spec| matches!(spec.source, Source::Column(_)));
        let table = match named {
            true => Some(load(&survey.source, layer, &|_| Keep::Cells)?.columns),
            false => None,
        };
        let (mut values, mut words) = (Vec::new(), Vec::new());
        for spec in specs {
            let (found, names) = match (&spec.source, &table) {
                (Source::Column(column), Some(table)) => {
                    from_table(spec, table, column, &survey.rows)?
                }
                _ => (sample::at(spec, &survey.crs, &survey.x, &survey.y)?, Vec::new()),
            };
            check(spec, &survey, &found)?;
            values.push(found);
            words.push(names);
        }
        let missing = |i: usize| specs.iter().zip(&values).find(|(_, v)| v[i].is_nan());
        let (kept, lost): (Vec<usize>, Vec<usize>) =
            (0..survey.len()).partition(|i| missing(*i).is_none());
        let mut dropped = survey.dropped.clone();
        for i in &lost {
            let Some((spec, _)) = missing(*i) else { continue };
            let reason = match &spec.source {
                Source::Raster { .. } => format!("no data for {} in {}", spec.name, spec.source),
                Source::Column(name) => format!("no {name}"),
            };
            dropped.push(Dropped { row: survey.rows[*i], reason });
        }
        dropped.sort_by_key(|d| d.row);
        if kept.len() < 3 {
            return Err(Error::input(format!(
                "a map needs at least 3 sites with every covariate, and there are {}",
                kept.len()
            ))
            .fact("sites", survey.len())
            .fact("first without", dropped.first().map_or("", |d| &d.reason))
            .try_this("leave out a covariate that is missing in most rows"));
        }
        let all = Covariates { specs: specs.to_vec(), values, words };
        let covariates = all.subset(&kept);
        for (spec, values) in specs.iter().zip(&covariates.values) {
            let [low, high] = values
                .iter()
                .fold([f64::INFINITY, f64::NEG_INFINITY], |[a, b], v| [a.min(*v), b.max(*v)]);
            // Averages of equal pixels differ in their last digits.
            if high - low <= 1e-9 * high.abs().max(low.abs()) {
                return Err(Error::input("a covariate is the same at every site")
                    .fact("covariate", spec)
                    .fact("value", values[0])
                    .try_this("leave it out: nothing can be learnt of its effect"));
            }
        }
        Ok(Survey { dropped, covariates: Some(covariates), ..survey.subset(&kept) })
    }
}

/// The nearest pixel of a raster's first band at places of `crs`; NaN without data.
///
/// # Errors
/// As covariates are read.
pub fn pixel_at(file: &Path, crs: &Crs, x: &[f64], y: &[f64]) -> Result<Vec<f64>> {
    let source = Source::Raster { file: file.to_path_buf(), band: 1 };
    let spec = Spec { sampling: Sampling::Nearest, ..Spec::new("mask", source) };
    sample::at(&spec, crs, x, y)
}

/// A column of the survey's table at the rows that are used: numbers, or codes and their names.
fn from_table(
    spec: &Spec,
    table: &Columns,
    column: &str,
    rows: &[usize],
) -> Result<(Vec<f64>, Vec<String>)> {
    if let (true, Column::Text(cells)) = (spec.categorical, table.column(column)?) {
        let mut words: Vec<String> = rows.iter().map(|row| cells[row - 1].clone()).collect();
        words.sort();
        words.dedup();
        words.retain(|word| !word.is_empty());
        return Ok((rows.iter().map(|row| code(&words, &cells[row - 1])).collect(), words));
    }
    let numbers = table.numbers(column)?;
    if let Some(row) = rows.iter().find(|row| CODES.contains(&numbers[**row - 1])) {
        return Err(Error::input("a covariate looks like a code for a missing one")
            .fact("file", table.source().display())
            .fact("row", table.place(row - 1))
            .fact("column", column)
            .fact("value", numbers[row - 1])
            .try_this("leave cells without a value empty"));
    }
    Ok((rows.iter().map(|row| numbers[row - 1]).collect(), Vec::new()))
}

/// The number of a word; NaN for none, and one of its own for a word that no site has.
fn code(words: &[String], word: &str) -> f64 {
    match words.iter().position(|w| w == word) {
        _ if word.is_empty() => f64::NAN,
        Some(i) => i as f64,
        None => words.len() as f64,
    }
}

/// Refuses values at sites that no design can be made of.
fn check(spec: &Spec, survey: &Survey, values: &[f64]) -> Result<()> {
    let seen = values.iter().filter(|v| !v.is_nan()).count();
    if 2 * seen < values.len() && matches!(spec.source, Source::Raster { .. }) {
        return Err(Error::input("a covariate's raster has no data at most of the sites")
            .fact("covariate", spec)
            .fact("sites with data", format!("{seen} of {}", values.len()))
            .fact("sites are in", survey.crs.name())
            .try_this(
                "check that the raster covers the survey and that both carry the right CRS; \
                 mean:5km reads around a place",
            ));
    }
    let place = |i: usize| format!("row {}", survey.rows[i]);
    if spec.categorical {
        if let Some(i) = values.iter().position(|v| v.fract() != 0.0 && !v.is_nan()) {
            return Err(Error::input("a category is not a whole number")
                .fact("covariate", spec)
                .fact("site", place(i))
                .fact("value", values[i])
                .try_this("leave `categorical` out for a covariate of numbers"));
        }
        let mut levels: Vec<f64> = values.iter().copied().filter(|v| !v.is_nan()).collect();
        levels.sort_by(f64::total_cmp);
        levels.dedup();
        if levels.len() > MOST_LEVELS {
            return Err(Error::input("a categorical covariate has too many levels at the sites")
                .fact("covariate", spec)
                .fact("levels", levels.len())
                .fact("most", MOST_LEVELS)
                .try_this("leave `categorical` out, or merge levels"));
        }
        return Ok(());
    }
    let lost = |v: &f64| !v.is_nan() && !spec.scaled(*v).is_finite();
    if let Some(i) = values.iter().position(lost) {
        return Err(Error::input("a covariate has no logarithm or root at a site")
            .fact("covariate", spec)
            .fact("site", place(i))
            .fact("value", values[i])
            .try_this("use log1p, ln(1 + value), where it may be 0; leave log out where it may be negative"));
    }
    Ok(())
}

/// Whether a raster of this system can be read at places of that one.
fn same_world(spec: &Spec, file: &Path, raster: Option<&Crs>, places: &Crs) -> Result<Crs> {
    match raster {
        None if places.is_local() => Ok(places.clone()),
        None => Err(Error::input("a covariate's raster has no coordinate reference system")
            .fact("covariate", &spec.name)
            .fact("file", file.display())
            .try_this("give it one, for example with gdal_edit.py -a_srs EPSG:32631 FILE")),
        Some(crs) if crs.is_local() != places.is_local() => {
            Err(Error::input("a covariate's raster and the sites do not lie on one globe")
                .fact("covariate", &spec.name)
                .fact("raster", crs.name())
                .fact("sites", places.name())
                .try_this("name the CRS of the sites with --crs, or give the raster its own"))
        }
        Some(crs) => Ok(crs.clone()),
    }
}
