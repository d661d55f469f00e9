//! A survey: sites on the ground, and what was seen at each.
//!
//! The rule of this file: what is missing is dropped, counted and named; what is wrong stops the
//! run. A wrong number must never make a plausible map.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use super::{
    covariates::Covariates,
    crs::{self, Crs},
    displacement::{self, Displacement, Law},
    geometry::{Choice, Geometry},
    table::{Column, Columns, Keep, Loaded, Points, load},
    time::{self, Moment, Times},
};
use crate::error::{Error, Result};

/// What was seen at each site.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Positives among people tested: whole numbers, 0 ≤ positive ≤ tested, tested > 0.
    Counts {
        /// People positive, `[site]`.
        positive: Vec<f64>,
        /// People tested, `[site]`.
        tested: Vec<f64>,
    },
    /// Cases in a population or over person-time: whole numbers ≥ 0, exposure > 0.
    Cases {
        /// Cases, `[site]`.
        cases: Vec<f64>,
        /// Population or person-time, `[site]`, in the unit of its column.
        exposure: Vec<f64>,
        /// What a rate is cases per: "person", or "unit of `COLUMN`" for person-time.
        per: String,
    },
    /// A continuous outcome in its own units, `[site]`, finite.
    Values(Vec<f64>),
    /// A continuous outcome above 0 whose logarithm is mapped, in its own units, `[site]`.
    Positive(Vec<f64>),
}

impl Outcome {
    /// Sites.
    pub fn len(&self) -> usize {
        match self {
            Outcome::Counts { positive: of, .. }
            | Outcome::Cases { cases: of, .. }
            | Outcome::Values(of)
            | Outcome::Positive(of) => of.len(),
        }
    }

    /// No sites at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The likelihood that classical processes read it by, of [`crate::likelihood::LIKELIHOODS`].
    pub fn likelihood(&self) -> &'static str {
        match self {
            Outcome::Counts { .. } => "binomial",
            Outcome::Cases { .. } => "poisson",
            Outcome::Values(_) => "gaussian",
            Outcome::Positive(_) => "log-gaussian",
        }
    }

    /// What it is, in a few words, with the flags that name its columns.
    pub fn about(&self) -> &'static str {
        match self {
            Outcome::Counts { .. } => "positive among tested (--positive, --tested)",
            Outcome::Cases { .. } => "cases with an exposure (--cases, --population)",
            Outcome::Values(_) => "a continuous outcome (--value)",
            Outcome::Positive(_) => "a continuous outcome on the log scale (--log-value)",
        }
    }

    /// One person a row: everywhere one tested.
    pub fn is_single(&self) -> bool {
        matches!(self, Outcome::Counts { tested, .. } if tested.iter().all(|n| *n == 1.0))
    }

    /// What was observed, outcome units: proportions, rates or values, `[site]`.
    pub fn observed(&self) -> Vec<f64> {
        let ratio = |k: &[f64], n: &[f64]| k.iter().zip(n).map(|(k, n)| k / n).collect();
        match self {
            Outcome::Counts { positive, tested } => ratio(positive, tested),
            Outcome::Cases { cases, exposure, .. } => ratio(cases, exposure),
            Outcome::Values(values) | Outcome::Positive(values) => values.clone(),
        }
    }

    fn subset(&self, sites: &[usize]) -> Self {
        let pick = |v: &[f64]| sites.iter().map(|i| v[*i]).collect();
        match self {
            Outcome::Cases { cases, exposure, per } => {
                Outcome::Cases { cases: pick(cases), exposure: pick(exposure), per: per.clone() }
            }
            Outcome::Positive(values) => Outcome::Positive(pick(values)),
            Outcome::Counts { positive, tested } => {
                Outcome::Counts { positive: pick(positive), tested: pick(tested) }
            }
            Outcome::Values(values) => Outcome::Values(pick(values)),
        }
    }

    fn same(&self, a: usize, b: usize) -> bool {
        match self {
            Outcome::Counts { positive, tested } => {
                positive[a] == positive[b] && tested[a] == tested[b]
            }
            Outcome::Cases { cases, exposure, .. } => {
                cases[a] == cases[b] && exposure[a] == exposure[b]
            }
            Outcome::Values(values) | Outcome::Positive(values) => values[a] == values[b],
        }
    }
}

/// A row of the file that was not used.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Dropped {
    /// Data row of the file, from 1.
    pub row: usize,
    /// Why.
    pub reason: String,
}

/// Sites with outcomes, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Survey {
    /// The file they came from.
    pub source: PathBuf,
    /// What the coordinates mean.
    pub crs: Crs,
    /// Easting or longitude, `[site]`, CRS units.
    pub x: Vec<f64>,
    /// Northing or latitude, `[site]`, CRS units.
    pub y: Vec<f64>,
    /// What was seen, `[site]`.
    pub outcome: Outcome,
    /// When each site was visited, where a column of times was named.
    pub times: Option<Times>,
    /// What else is known of each site, where covariates were asked for.
    pub covariates: Option<Covariates>,
    /// Data row of the file, from 1, of each site.
    pub rows: Vec<usize>,
    /// Rows left out, in the order of the file.
    pub dropped: Vec<Dropped>,
    /// How far from where they were recorded the sites may stand; nothing where they are there.
    pub displacement: Option<Displacement>,
    /// What distances between the sites are measured on.
    pub geometry: Geometry,
    /// What was guessed or noticed, to be printed: one sentence each.
    pub notes: Vec<String>,
}

/// What the user said about the file; what is `None` is guessed, and the guess is noted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SurveyOptions {
    /// Column of longitude or easting (`--lon`).
    pub lon: Option<String>,
    /// Column of latitude or northing (`--lat`).
    pub lat: Option<String>,
    /// Column of people positive (`--positive`).
    pub positive: Option<String>,
    /// Column of people tested (`--tested`).
    pub tested: Option<String>,
    /// Column of 0 or 1, one person a row (`--binary`), never guessed.
    pub binary: Option<String>,
    /// Column of cases (`--cases`), never guessed.
    pub cases: Option<String>,
    /// Column of the population the cases are among (`--population`).
    pub population: Option<String>,
    /// Column of the person-time the cases arose over (`--person-time`).
    pub person_time: Option<String>,
    /// Column of a continuous outcome (`--value`), never guessed.
    pub value: Option<String>,
    /// Column of a continuous outcome above 0, read on the log scale (`--log-value`), never guessed.
    pub log_value: Option<String>,
    /// The coordinates' system (`--crs`), as [`Crs::from_user`] reads it.
    pub crs: Option<String>,
    /// The layer of a GeoPackage (`--layer`).
    pub layer: Option<String>,
    /// How sites were moved (`--displacement`), as [`displacement::Rule`] reads it.
    pub displacement: Option<String>,
    /// Column of urban or rural (`--urban-rural`), for the rule of the DHS.
    pub urban_rural: Option<String>,
    /// What distances are measured on.
    pub distance: Choice,
    /// Column of times (`--time`), never guessed: years, months, dates or moments.
    pub time: Option<String>,
}

/// Spellings of columns, compared without case and without anything but letters and digits.
const LONGITUDE: &str = "lon long longitude lng longnum londd longdd longitudedd lonwgs84 \
     longitudewgs84 decimallongitude gpslon gpslong gpslongitude longitudex xlon xlongitude";
const LATITUDE: &str = "lat latitude latnum latdd latitudedd latwgs84 latitudewgs84 \
     decimallatitude gpslat gpslatitude latitudey ylat ylatitude";
/// Pairs, in order: the n-th easting goes with the n-th northing.
const EASTING: &str = "x easting eastings east xcoord coordx coordsx xcoordinate xm xkm utmx \
     utme utmeasting pointx";
const NORTHING: &str = "y northing northings north ycoord coordy coordsy ycoordinate ym ykm \
     utmy utmn utmnorthing pointy";
const POSITIVE: &str = "positive positives pos npos npositive npositives numpos numpositive \
     nopositive numberpositive positivecount positiven cases ncases numcases numbercases infected \
     numberpos ninfected numinfected numberinfected totalpositive";
const TESTED: &str = "tested ntested numtested notested numbertested numbertes testedn examined nexamined \
     examinedn numexamined noexamined numberexamined numberexa screened nscreened trials ntrials n ntot \
     total totaltested totalexamined sampled nsampled samplesize";

/// Tested in a household, at most: of so few, two at one place are often alike by chance.
const HOUSEHOLD: f64 = 5.0;
const URBAN_RURAL: &str = "urbanrura urbanrural urbanicity typeofresidence hv025 v025";

/// `name` is one of `spellings`.
fn spelled(name: &str, spellings: &str) -> bool {
    let plain: String =
        name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect();
    spellings.split_whitespace().any(|s| s == plain)
}

/// Values that stand for "none" in so many tables that a map of them is a mistake.
pub(super) const CODES: &[f64] = &[-999.0, -9999.0, -99999.0, -999999.0, 1e20, 9.96921e36];

impl Survey {
    /// Rows that were visited at a time; all of them where none is named, or of a survey without times.
    pub fn visited(&self, moment: Option<&Moment>) -> Vec<usize> {
        let days = self.times.as_ref().map(|times| &times.days);
        let then = |i: &usize| match (moment, days) {
            (Some(moment), Some(days)) => moment.period.covers(days[*i]),
            _ => true,
        };
        (0..self.len()).filter(then).collect()
    }

    /// Reads and checks a survey table: CSV, Parquet, GeoParquet, GeoPackage, GeoJSON, Shapefile.
    ///
    /// Rows without coordinates or outcome, rows at 0, 0 (unless the plane is local), rows with
    /// nobody tested, and repeats of a whole row are dropped and listed in [`Survey::dropped`].
    /// Surveys that share a place are kept.
    ///
    /// # Errors
    /// [`Error::Input`] for anything that could make a wrong map: text in a number column, more
    /// positive than tested, negative or fractional counts, infinite values, coordinates out of
    /// range or swapped, exposures that are not above 0, no CRS, geometries that are not points, fewer than 3 usable sites or
    /// all at one place. [`Error::Io`] if the file cannot be read.
    pub fn read(path: impl AsRef<Path>, options: &SurveyOptions) -> Result<Self> {
        let path = path.as_ref();
        let loaded = load(path, options.layer.as_deref(), &|_| Keep::Cells)?;
        let mut reading = Reading { path, options, table: &loaded.columns, notes: Vec::new() };
        reading.notes.extend(loaded.notes.iter().cloned());
        let places = reading.places(&loaded)?;
        let outcome = reading.outcome()?;
        reading.check(places, outcome)
    }

    /// Sites.
    pub fn len(&self) -> usize {
        self.x.len()
    }

    /// No sites at all.
    pub fn is_empty(&self) -> bool {
        self.x.is_empty()
    }

    /// The sites at these positions (from 0), in this order: a fold, or a sample.
    ///
    /// # Panics
    /// If a position is not below [`Survey::len`].
    pub fn subset(&self, sites: &[usize]) -> Self {
        let pick = |v: &[f64]| sites.iter().map(|i| v[*i]).collect();
        Survey {
            source: self.source.clone(),
            crs: self.crs.clone(),
            x: pick(&self.x),
            y: pick(&self.y),
            outcome: self.outcome.subset(sites),
            times: self.times.as_ref().map(|times| times.subset(sites)),
            covariates: self.covariates.as_ref().map(|c| c.subset(sites)),
            rows: sites.iter().map(|i| self.rows[*i]).collect(),
            dropped: self.dropped.clone(),
            displacement: self.displacement.as_ref().map(|moved| moved.subset(sites)),
            geometry: self.geometry.clone(),
            notes: self.notes.clone(),
        }
    }
}

/// Places to ask about: a table without outcomes.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// The file's columns, of which only coordinates are held: see [`Targets::chunks`].
    table: Columns,
    /// What the coordinates mean.
    pub crs: Crs,
    /// Easting or longitude, `[row]`, CRS units; NaN where a row has no place.
    pub x: Vec<f64>,
    /// Northing or latitude, `[row]`, CRS units; NaN where a row has no place.
    pub y: Vec<f64>,
    /// Days, `[row]`, NaN where a row has none, where a column of times was named.
    pub times: Option<Times>,
    /// The places are geometries, which no column of `table` holds.
    pub geometries: bool,
    /// What was guessed or noticed, to be printed: one sentence each.
    pub notes: Vec<String>,
}

impl Targets {
    /// Reads places from a table in any format. What `said` leaves open is taken from `otherwise`
    /// if the table holds no geometries, and guessed after that.
    ///
    /// # Errors
    /// [`Error::Input`] for coordinates that are missing, out of range or swapped, for no CRS, and
    /// if no row has a place. [`Error::Io`] if the file cannot be read.
    pub fn read(
        path: impl AsRef<Path>,
        said: &SurveyOptions,
        otherwise: &SurveyOptions,
    ) -> Result<Self> {
        let path = path.as_ref();
        let named = |name: &str| {
            let said = [&said.lon, &said.lat, &otherwise.lon, &otherwise.lat];
            said.into_iter().flatten().any(|said| said.eq_ignore_ascii_case(name))
        };
        let coordinate =
            |name: &str| [LONGITUDE, LATITUDE, EASTING, NORTHING].iter().any(|s| spelled(name, s));
        let time = said.time.as_ref().or(otherwise.time.as_ref());
        let keep = |name: &str| match named(name) || coordinate(name) {
            _ if time.is_some_and(|time| time.eq_ignore_ascii_case(name)) => Keep::Cells,
            true => Keep::Numbers,
            false => Keep::Kind,
        };
        let loaded = load(path, said.layer.as_deref(), &keep)?;
        let mut options = SurveyOptions { time: time.cloned(), ..said.clone() };
        if loaded.points.is_none() {
            if options.lon.is_none() && options.lat.is_none() {
                (options.lon, options.lat) = (otherwise.lon.clone(), otherwise.lat.clone());
            }
            options.crs = options.crs.or_else(|| otherwise.crs.clone());
        }
        let notes = loaded.notes.clone();
        let mut reading = Reading { path, options: &options, table: &loaded.columns, notes };
        let places = reading.places(&loaded)?;
        let (mut x, mut y) = reading.in_range(&places)?;
        let times = reading.times()?;
        let notes = reading.notes;
        let mut placed = false;
        for (x, y) in x.iter_mut().zip(&mut y) {
            match x.is_nan() || y.is_nan() {
                true => (*x, *y) = (f64::NAN, f64::NAN),
                false => placed = true,
            }
        }
        if !placed {
            return Err(Error::input("no row has coordinates")
                .fact("file", path.display())
                .fact("columns", loaded.columns.list())
                .try_this("check the columns of longitude and latitude"));
        }
        let geometries = loaded.points.is_some() && options.lon.is_none();
        Ok(Targets { crs: places.crs, x, y, times, geometries, notes, table: loaded.columns })
    }

    /// Names of the file's columns of numbers or text.
    pub fn names(&self) -> &[String] {
        self.table.names()
    }

    /// The file.
    pub fn source(&self) -> &Path {
        self.table.source()
    }

    /// The file's columns, about `rows` rows at a time, with how many they are; read again so that
    /// they need not be held.
    ///
    /// # Errors
    /// [`Error::Input`] if the file is another by now, or damaged.
    pub fn chunks(
        &self,
        rows: usize,
    ) -> Result<impl Iterator<Item = Result<(usize, Vec<Column>)>> + use<'_>> {
        self.table.chunks(rows)
    }

    /// Whether row `i` (from 0) has a place, and a time where times were named.
    pub fn is_placed(&self, i: usize) -> bool {
        !self.x[i].is_nan() && self.times.as_ref().is_none_or(|times| !times.days[i].is_nan())
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.x.len()
    }

    /// No rows at all.
    pub fn is_empty(&self) -> bool {
        self.x.is_empty()
    }
}

/// Which columns hold the coordinates, and what they mean.
struct Places {
    x: Vec<f64>,
    y: Vec<f64>,
    crs: Crs,
    /// What to call the two coordinates in messages.
    names: [String; 2],
    /// The user did not say, and the file leaves no room to.
    crs_is_assumed: bool,
}

/// One reading of one table.
struct Reading<'a> {
    path: &'a Path,
    options: &'a SurveyOptions,
    table: &'a Columns,
    notes: Vec<String>,
}

impl Reading<'_> {
    fn refuse(&self, what: impl Into<String>) -> Error {
        Error::input(what).fact("file", self.path.display())
    }

    /// Refuses for what stands in one cell of row `i` (from 0).
    fn refuse_cell(&self, what: impl Into<String>, i: usize, column: &str, value: f64) -> Error {
        let shown = if value.abs() < 1e15 { value.to_string() } else { format!("{value:e}") };
        self.refuse(what)
            .fact("row", self.table.place(i))
            .fact("column", column)
            .fact("value", shown)
    }

    // Coordinates

    fn places(&mut self, loaded: &Loaded) -> Result<Places> {
        match (&loaded.points, &self.options.lon, &self.options.lat) {
            (Some(points), None, None) => self.geometry(points),
            (_, Some(lon), Some(lat)) => self.named(lon.clone(), lat.clone()),
            (_, None, None) => {
                let (lon, lat) = self.guess_coordinates()?;
                self.notes.push(format!("took `{lon}` and `{lat}` as the coordinates"));
                self.named(lon, lat)
            }
            (_, Some(lon), None) => Err(self
                .refuse(format!("`{lon}` is named for longitude, and nothing for latitude"))
                .fact("columns", self.table.list())
                .try_this("name the other column with --lat COLUMN")),
            (_, None, Some(lat)) => Err(self
                .refuse(format!("`{lat}` is named for latitude, and nothing for longitude"))
                .fact("columns", self.table.list())
                .try_this("name the other column with --lon COLUMN")),
        }
    }

    fn geometry(&mut self, points: &Points) -> Result<Places> {
        let asked = self.options.crs.as_deref().map(Crs::from_user).transpose()?;
        let crs = match (asked, &points.crs) {
            (None, Some(crs)) => crs.clone(),
            (None, None) => {
                return Err(self
                    .refuse("the file does not say what its coordinates mean")
                    .try_this(crs::HELP));
            }
            (Some(asked), Some(stated)) if asked != *stated => {
                if !points.crs_is_assumed {
                    return Err(self
                        .refuse("the file and --crs name different coordinate systems")
                        .fact("file says", stated.name())
                        .fact("--crs says", asked.name())
                        .try_this(
                            "leave --crs out; if the file is wrong, correct it (ogr2ogr -a_srs)",
                        ));
                }
                self.notes.push(format!(
                    "read the coordinates as {}, as told, not as {}",
                    asked.name(),
                    stated.name()
                ));
                asked
            }
            (Some(asked), _) => asked,
        };
        let names = match crs.is_geographic() {
            true => ["longitude".to_string(), "latitude".to_string()],
            false => ["x".to_string(), "y".to_string()],
        };
        Ok(Places {
            x: points.x.clone(),
            y: points.y.clone(),
            crs,
            names,
            crs_is_assumed: points.crs_is_assumed && self.options.crs.is_none(),
        })
    }

    fn named(&mut self, lon: String, lat: String) -> Result<Places> {
        if self.table.find(&lon)? == self.table.find(&lat)? {
            return Err(self
                .refuse(format!("`{lon}` cannot be both longitude and latitude"))
                .fact("columns", self.table.list())
                .try_this("name two columns with --lon and --lat"));
        }
        // Not x and y: where x points north, as in Gauss-Krüger systems, these are rightly crossed.
        if (spelled(&lon, LATITUDE) && spelled(&lat, LONGITUDE))
            || (spelled(&lon, "northing northings") && spelled(&lat, "easting eastings"))
        {
            return Err(self
                .refuse("longitude and latitude are swapped")
                .fact("--lon", &lon)
                .fact("--lat", &lat)
                .try_this(format!("swap them: --lon {lat} --lat {lon}")));
        }
        let (x, y) = (self.table.numbers(&lon)?.to_vec(), self.table.numbers(&lat)?.to_vec());
        let crs = match &self.options.crs {
            Some(text) => Crs::from_user(text)?,
            None if spelled(&lon, LONGITUDE) && spelled(&lat, LATITUDE) => {
                self.notes.push(
                    "took the coordinates as longitude and latitude on WGS84 (EPSG:4326)".into(),
                );
                Crs::from_user("EPSG:4326")?
            }
            None => {
                let plane = if spelled(&lon, "xm") && spelled(&lat, "ym") {
                    "; these names suggest --crs local:m"
                } else if spelled(&lon, "xkm") && spelled(&lat, "ykm") {
                    "; these names suggest --crs local:km"
                } else {
                    ""
                };
                return Err(self
                    .refuse("the coordinate reference system is not known")
                    .fact("columns", format!("{lon}, {lat}"))
                    .try_this(format!("{}{plane}", crs::HELP)));
            }
        };
        Ok(Places { x, y, crs, names: [lon, lat], crs_is_assumed: false })
    }

    /// The pair of columns spelled like coordinates: degrees before planes.
    fn guess_coordinates(&self) -> Result<(String, String)> {
        let lon = self.candidates(LONGITUDE);
        let lat = self.candidates(LATITUDE);
        let one = |found: &[String]| found.len() == 1;
        if one(&lon) && one(&lat) {
            return Ok((lon[0].clone(), lat[0].clone()));
        }
        if lon.len() > 1 || lat.len() > 1 {
            let list = [lon, lat].concat().join(", ");
            return Err(self
                .refuse("more than one pair of columns could be the coordinates")
                .fact("candidates", list)
                .try_this("name them with --lon COLUMN --lat COLUMN"));
        }
        let mut pairs = EASTING.split_whitespace().zip(NORTHING.split_whitespace()).filter_map(
            |(east, north)| {
                let (east, north) = (self.candidates(east), self.candidates(north));
                (one(&east) && one(&north)).then(|| (east[0].clone(), north[0].clone()))
            },
        );
        match (pairs.next(), pairs.next()) {
            (Some(pair), None) => Ok(pair),
            (Some(a), Some(b)) => Err(self
                .refuse("more than one pair of columns could be the coordinates")
                .fact("candidates", format!("{}, {}; {}, {}", a.0, a.1, b.0, b.1))
                .try_this("name them with --lon COLUMN --lat COLUMN")),
            (None, _) => Err(self
                .refuse("no columns are recognised as coordinates")
                .fact("columns", self.table.list())
                .try_this("name them with --lon COLUMN --lat COLUMN")),
        }
    }

    fn candidates(&self, spellings: &str) -> Vec<String> {
        self.table.names().iter().filter(|name| spelled(name, spellings)).cloned().collect()
    }

    // Outcomes

    fn outcome(&mut self) -> Result<Raw> {
        let SurveyOptions { positive, tested, .. } = self.options;
        let named: Vec<(&str, &String)> = [
            ("--positive or --tested", positive.as_ref().or(tested.as_ref())),
            ("--binary", self.options.binary.as_ref()),
            ("--cases", self.options.cases.as_ref()),
            ("--value", self.options.value.as_ref()),
            ("--log-value", self.options.log_value.as_ref()),
        ]
        .into_iter()
        .filter_map(|(flag, column)| Some((flag, column?)))
        .collect();
        if let [(a, one), (b, two), ..] = named[..] {
            return Err(self
                .refuse("a survey has one outcome, and two are named")
                .fact(a, one)
                .fact(b, two)
                .try_this(
                    "name one: --positive and --tested, --binary, --cases, --value or --log-value",
                ));
        }
        let exposure = match (&self.options.population, &self.options.person_time) {
            (Some(population), Some(time)) => {
                return Err(self
                    .refuse("cases have one exposure, and two are named")
                    .fact("--population", population)
                    .fact("--person-time", time)
                    .try_this(
                        "use --population for cases at one time, --person-time for incidence",
                    ));
            }
            (Some(people), None) => Some((people, "person".to_string())),
            (None, Some(time)) => Some((time, format!("unit of {time}"))),
            (None, None) => None,
        };
        let numbers =
            |name: &String| -> Result<Vec<f64>> { Ok(self.table.numbers(name)?.to_vec()) };
        match (&self.options.cases, exposure) {
            (Some(cases), Some((exposure, per))) => {
                if self.table.find(cases)? == self.table.find(exposure)? {
                    return Err(self
                        .refuse(format!("`{cases}` cannot be both cases and their exposure"))
                        .fact("columns", self.table.list())
                        .try_this(
                            "name two columns with --cases and --population or --person-time",
                        ));
                }
                let numbers = [numbers(cases)?, numbers(exposure)?];
                let names = [cases.clone(), exposure.clone()];
                return Ok(Raw::Cases { names, numbers, per });
            }
            (Some(cases), None) => {
                return Err(self
                    .refuse("cases say nothing of a rate without those they are among")
                    .fact("--cases", cases)
                    .fact("columns", self.table.list())
                    .try_this(
                        "name the column with --population or --person-time; for cases among people \
                         tested use --positive and --tested",
                    ));
            }
            (None, Some((exposure, _))) => {
                return Err(self
                    .refuse("a population or person-time needs the cases that arose in it")
                    .fact("--population or --person-time", exposure)
                    .fact("columns", self.table.list())
                    .try_this("name their column with --cases"));
            }
            (None, None) => {}
        }
        if let Some(name) = &self.options.binary {
            return Ok(Raw::Single { name: name.clone(), values: numbers(name)? });
        }
        if let Some(name) = &self.options.log_value {
            return Ok(Raw::Positive { name: name.clone(), values: numbers(name)? });
        }
        if let Some(name) = &self.options.value {
            return Ok(Raw::Values { name: name.clone(), values: numbers(name)? });
        }
        let (positive, guessed_positive) = self.counts("positive", positive, POSITIVE)?;
        let (tested, guessed_tested) = self.counts("tested", tested, TESTED)?;
        for (what, column, guessed) in
            [("positive", &positive, guessed_positive), ("tested", &tested, guessed_tested)]
        {
            if guessed {
                self.notes.push(format!("took `{column}` as the number {what}"));
            }
        }
        if self.table.find(&positive)? == self.table.find(&tested)? {
            return Err(self
                .refuse(format!("`{positive}` cannot be both positive and tested"))
                .fact("columns", self.table.list())
                .try_this("name two columns with --positive and --tested"));
        }
        Ok(Raw::Counts {
            numbers: [
                self.table.numbers(&positive)?.to_vec(),
                self.table.numbers(&tested)?.to_vec(),
            ],
            names: [positive, tested],
        })
    }

    fn counts(
        &self,
        what: &str,
        given: &Option<String>,
        spellings: &str,
    ) -> Result<(String, bool)> {
        if let Some(name) = given {
            return Ok((name.clone(), false));
        }
        let found = self.candidates(spellings);
        match found.as_slice() {
            [one] => Ok((one.clone(), true)),
            [] => Err(self
                .refuse(format!("no column is recognised as the number {what}"))
                .fact("columns", self.table.list())
                .try_this(format!(
                    "name it with --{what} COLUMN, or a continuous outcome with --value COLUMN; \
                     tables of single people need adding up to one row per site, or --binary COLUMN"
                ))),
            _ => Err(self
                .refuse(format!("more than one column could be the number {what}"))
                .fact("candidates", found.join(", "))
                .try_this(format!("name the right one with --{what} COLUMN"))),
        }
    }

    // Rows

    fn check(mut self, places: Places, outcome: Raw) -> Result<Survey> {
        let (x, y) = self.in_range(&places)?;
        outcome.check(&self)?;
        let times = self.times()?;
        let (mut rows, mut dropped) = (Vec::new(), Vec::new());
        let [east, north] = &places.names;
        for i in 0..self.table.len() {
            let absent = match (x[i].is_nan(), y[i].is_nan()) {
                (true, true) => Some("no coordinates".to_string()),
                (true, false) => Some(format!("no {east}")),
                (false, true) => Some(format!("no {north}")),
                _ if !places.crs.is_local() && x[i] == 0.0 && y[i] == 0.0 => {
                    Some("at 0, 0, as places without coordinates often are".into())
                }
                _ => None,
            };
            let untimed = || {
                times.as_ref().filter(|t| t.days[i].is_nan()).map(|t| format!("no {}", t.column))
            };
            match absent.or_else(|| outcome.absent(i)).or_else(untimed) {
                Some(reason) => dropped.push(Dropped { row: i + 1, reason }),
                None => rows.push(i),
            }
        }
        let all = outcome.outcome();
        self.without_repeats(&x, &y, &all, &mut rows, &mut dropped);
        let survey = Survey {
            source: self.path.to_path_buf(),
            crs: places.crs.clone(),
            x: rows.iter().map(|i| x[*i]).collect(),
            y: rows.iter().map(|i| y[*i]).collect(),
            outcome: all.subset(&rows),
            times: times.map(|times| times.subset(&rows)),
            covariates: None,
            rows: rows.iter().map(|i| i + 1).collect(),
            dropped,
            displacement: self.displacement(&rows)?,
            geometry: Geometry::Plane,
            notes: Vec::new(),
        };
        self.enough(&survey)?;
        self.in_unit(&survey)?;
        self.in_area(&survey)?;
        let (geometry, said) = Geometry::of(&self.options.distance, &survey)?;
        self.notes.extend(said);
        if let Outcome::Cases { cases, exposure, per } = &survey.outcome
            && per == "person"
        {
            let more = cases.iter().zip(exposure).filter(|(k, n)| k > n).count();
            if more > 0 {
                self.notes.push(format!(
                    "{more} of {} rows have more cases than people: right for repeated episodes, \
                     wrong if the columns are swapped or the population is in thousands",
                    survey.len()
                ));
            }
        }
        Ok(Survey { geometry, notes: self.notes, ..survey })
    }

    /// The days of every row, NaN where there is none.
    fn times(&mut self) -> Result<Option<Times>> {
        let Some(named) = &self.options.time else { return Ok(None) };
        let column = self.table.names()[self.table.find(named)?].clone();
        let cells = self.table.column(named)?;
        match time::read(cells) {
            Ok((days, note)) => {
                self.notes.extend(note);
                Ok(Some(Times { column, days }))
            }
            Err((row, error)) => {
                let told = self
                    .refuse(format!("a time in column `{column}` cannot be read: {error}"))
                    .fact("row", self.table.place(row));
                let told = error.facts().into_iter().fold(told, |told, (k, v)| told.fact(k, v));
                Err(told.try_this(error.help().unwrap_or_default()))
            }
        }
    }

    /// How the sites in `rows` (from 0) were moved.
    fn displacement(&mut self, rows: &[usize]) -> Result<Option<Displacement>> {
        let Some(said) = &self.options.displacement else {
            return match &self.options.urban_rural {
                None => Ok(None),
                Some(column) => Err(self
                    .refuse(
                        "urban or rural says how far sites were moved by the DHS, and nothing else",
                    )
                    .fact("--urban-rural", column)
                    .try_this("add --displacement dhs, or leave --urban-rural out")),
            };
        };
        let law = match (said.parse()?, &self.options.urban_rural) {
            (displacement::Rule::UpTo(km), None) => Law::up_to(km),
            (displacement::Rule::UpTo(km), Some(column)) => {
                return Err(self
                    .refuse("one distance for all sites needs no column of urban or rural")
                    .fact("--displacement", km)
                    .fact("--urban-rural", column)
                    .try_this("write --displacement dhs, or leave --urban-rural out"));
            }
            (displacement::Rule::Dhs, _) => return self.by_dhs(rows).map(Some),
        };
        Ok(Some(Displacement { laws: vec![law], of: vec![0; rows.len()] }))
    }

    fn by_dhs(&mut self, rows: &[usize]) -> Result<Displacement> {
        let named = self.options.urban_rural.clone();
        let column = match (named, &self.candidates(URBAN_RURAL)[..]) {
            (Some(named), _) => named,
            (None, [one]) => {
                self.notes.push(format!("took `{one}` as urban or rural"));
                one.clone()
            }
            (None, _) => {
                return Err(self
                    .refuse("the DHS moves urban sites by less than rural ones, and no column tells them apart")
                    .fact("columns", self.table.list())
                    .try_this("name it with --urban-rural COLUMN, or give one distance: --displacement 5"));
            }
        };
        let cells = self.table.text(&column)?;
        let of = rows
            .iter()
            .map(|i| match displacement::urban(&cells[*i]) {
                Some(urban) => Ok(usize::from(!urban)),
                None => Err(self
                    .refuse("a site is neither urban nor rural")
                    .fact("row", self.table.place(*i))
                    .fact("column", &column)
                    .fact("value", &cells[*i])
                    .try_this("write U or R (or urban, rural; or 1, 2 as in DHS recodes)")),
            })
            .collect::<Result<_>>()?;
        Ok(Displacement { laws: vec![Law::dhs_urban(), Law::dhs_rural()], of })
    }

    /// Coordinates that can be what the CRS says; longitudes from 0 to 360 become −180 to 180.
    fn in_range(&mut self, places: &Places) -> Result<(Vec<f64>, Vec<f64>)> {
        let (mut x, y) = (places.x.clone(), places.y.clone());
        for (values, name) in [(&x, &places.names[0]), (&y, &places.names[1])] {
            if let Some(i) = values.iter().position(|v| v.is_infinite()) {
                return Err(self
                    .refuse_cell("a coordinate is infinite", i, name, values[i])
                    .try_this("correct the cell, or leave it empty if the place is unknown"));
            }
        }
        // On a plane of its own −999 can be a place; as both coordinates it is none.
        let code = |i: &usize| match places.crs.is_local() {
            true => x[*i] == y[*i] && CODES.contains(&x[*i]),
            false => CODES.contains(&x[*i]) || CODES.contains(&y[*i]),
        };
        if let Some(i) = (0..x.len()).find(code) {
            let which = usize::from(!CODES.contains(&x[i]));
            return Err(self
                .refuse_cell(
                    "a coordinate looks like a code for a missing one",
                    i,
                    &places.names[which],
                    [x[i], y[i]][which],
                )
                .try_this("leave cells without a value empty"));
        }
        let sound = |i: &usize| x[*i].is_finite() && y[*i].is_finite();
        if places.crs.is_geographic() {
            let lon = |v: f64| (-180.0..=360.0).contains(&v);
            let lat = |v: f64| v.abs() <= 90.0;
            let wrong = |i: &usize| sound(i) && !(lon(x[*i]) && lat(y[*i]));
            let all = || (0..x.len()).filter(sound);
            if let Some(i) = all().find(wrong) {
                let count = all().filter(wrong).count();
                let (at, name) = if lat(y[i]) { (x[i], 0) } else { (y[i], 1) };
                let what = if name == 0 { "longitude" } else { "latitude" };
                let error = self
                    .refuse_cell(
                        format!("a {what} is out of range in {count} of {} rows", all().count()),
                        i,
                        &places.names[name],
                        at,
                    )
                    .fact("the row's x and y", format!("{}, {}", x[i], y[i]))
                    .fact("coordinate system", places.crs.name());
                let swapped = lat(x[i]) && lon(y[i]);
                let always = all().all(|i| lat(x[i]) && lon(y[i]));
                let [east, north] = &places.names;
                return Err(if swapped && always && 2 * count >= all().count() {
                    let how = match self.options.lon {
                        Some(_) => format!("try --lon {north} --lat {east}"),
                        None => format!("swap `{east}` and `{north}`"),
                    };
                    error.try_this(format!("longitude and latitude look swapped: {how}"))
                } else if swapped {
                    error.try_this(format!(
                        "longitude and latitude look swapped in this row: correct it, or if all \
                         rows are like this, swap `{east}` and `{north}`"
                    ))
                } else if x[i].abs() > 400.0 || y[i].abs() > 400.0 {
                    error.try_this(format!(
                        "these look like metres, not degrees; {}{}",
                        if places.crs_is_assumed { "the format says degrees; " } else { "" },
                        crs::HELP
                    ))
                } else {
                    error.try_this("correct the cell: degrees run from -180 to 180 and -90 to 90")
                });
            }
            if x.iter().any(|v| *v > 180.0) {
                self.notes.push("read longitudes above 180 as west of Greenwich".into());
                x.iter_mut().filter(|v| **v > 180.0).for_each(|v| *v -= 360.0);
            }
        } else if !places.crs.is_local() {
            let degrees = |i: usize| x[i].abs() <= 180.0 && y[i].abs() <= 90.0;
            let mut all = (0..x.len()).filter(sound).peekable();
            if all.peek().is_some() && all.all(degrees) {
                let first = (0..x.len()).find(sound).unwrap_or(0);
                return Err(self
                    .refuse(format!(
                        "the coordinates look like degrees, and {} is a plane",
                        places.crs.name()
                    ))
                    .fact("columns", places.names.join(", "))
                    .fact("first row's x and y", format!("{}, {}", x[first], y[first]))
                    .try_this("try --crs EPSG:4326 for longitude and latitude"));
            }
        }
        Ok((x, y))
    }

    /// Takes out repeats of a whole row, and notes surveys that share a place.
    fn without_repeats(
        &mut self,
        x: &[f64],
        y: &[f64],
        outcome: &Outcome,
        rows: &mut Vec<usize>,
        dropped: &mut Vec<Dropped>,
    ) {
        // Single people and households, one per row, may truly be alike: a repeat says nothing.
        let people = match outcome {
            Outcome::Counts { tested, .. } => {
                let few = rows.iter().filter(|i| tested[**i] <= HOUSEHOLD).count();
                2 * few > rows.len()
            }
            _ => false,
        };
        let mut seen: HashMap<[u64; 2], Vec<usize>> = HashMap::new();
        let mut kept = Vec::with_capacity(rows.len());
        for &i in rows.iter() {
            // Adding zero makes −0 and 0 one place.
            let here = seen.entry([(x[i] + 0.0).to_bits(), (y[i] + 0.0).to_bits()]).or_default();
            let repeat = here.iter().find(|j| outcome.same(i, **j) && self.table.same_row(i, **j));
            match repeat {
                Some(j) if !people => dropped.push(Dropped {
                    row: i + 1,
                    reason: format!("repeats row {}: same place, same outcome", j + 1),
                }),
                _ => {
                    here.push(i);
                    kept.push(i);
                }
            }
        }
        let (places, shared) = seen
            .values()
            .filter(|here| here.len() > 1)
            .fold((0, 0), |(places, sites), here| (places + 1, sites + here.len()));
        if shared > 0 {
            self.notes.push(format!(
                "{shared} rows share {places} place{} and are kept as separate surveys",
                if places == 1 { "" } else { "s" }
            ));
        }
        dropped.sort_by_key(|d| d.row);
        *rows = kept;
    }

    fn enough(&self, survey: &Survey) -> Result<()> {
        const LISTED: usize = 5;
        let left_out = || {
            let mut reasons: Vec<String> = survey
                .dropped
                .iter()
                .take(LISTED)
                .map(|d| format!("row {}: {}", d.row, d.reason))
                .collect();
            if survey.dropped.len() > LISTED {
                reasons.push(format!("and {} more", survey.dropped.len() - LISTED));
            }
            reasons.join("; ")
        };
        let error = if survey.len() < 3 {
            self.refuse(format!(
                "a map needs at least 3 usable sites, and there are {}",
                survey.len()
            ))
            .fact("rows", self.table.len())
            .try_this("check the columns and the rows that were dropped")
        } else if (1..survey.len())
            .all(|i| survey.x[i] == survey.x[0] && survey.y[i] == survey.y[0])
        {
            self.refuse(format!("all {} sites are at one place", survey.len()))
                .fact("place", format!("{}, {}", survey.x[0], survey.y[0]))
                .try_this("check the columns of the coordinates: a map needs sites apart")
        } else {
            return Ok(());
        };
        Err(if survey.dropped.is_empty() { error } else { error.fact("dropped", left_out()) })
    }

    /// Metres read as kilometres make a map of nowhere: sites farther apart than the Earth allows.
    fn in_unit(&mut self, survey: &Survey) -> Result<()> {
        if survey.crs.is_geographic() {
            return Ok(());
        }
        let side = |v: &[f64]| {
            let ends = v
                .iter()
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)));
            (ends.1 - ends.0) * survey.crs.metres_per_unit() / 1000.0
        };
        let km = side(&survey.x).max(side(&survey.y));
        let shown =
            |km: f64| if km < 10.0 { format!("{:.3} km", km) } else { format!("{km:.0} km") };
        if km > 20_004.0 {
            let help = match survey.crs.is_local() {
                true => {
                    "if the coordinates are metres, say --crs local:m; if they are of a projection, its EPSG code"
                }
                false => "check --crs and the columns of the coordinates",
            };
            return Err(self
                .refuse("the sites lie farther apart than any two places on Earth")
                .fact("span", shown(km))
                .fact("coordinate system", survey.crs.name())
                .try_this(help));
        }
        // No system of a country or zone has its origin among the country's people.
        let small = |v: &[f64]| v.iter().all(|v| v.abs() * survey.crs.metres_per_unit() < 12_000.0);
        if survey.crs.area_of_use().is_some() && small(&survey.x) && small(&survey.y) {
            return Err(self
                .refuse(format!(
                    "the coordinates look like kilometres, and {} is in metres",
                    survey.crs.name()
                ))
                .fact("first site's x and y", format!("{}, {}", survey.x[0], survey.y[0]))
                .try_this("multiply both columns by 1000, or say --crs local:km"));
        }
        if survey.crs.is_local() && !(1.0..=5000.0).contains(&km) {
            let other = if survey.crs.metres_per_unit() > 1.0 { "local:m" } else { "local:km" };
            self.notes.push(format!(
                "the sites span {}: if that is wrong, the unit is another (--crs {other})",
                shown(km)
            ));
        }
        Ok(())
    }

    /// Places far outside the area a projection is meant for are in another projection.
    fn in_area(&mut self, survey: &Survey) -> Result<()> {
        let Some([west, south, east, north]) = survey.crs.area_of_use() else {
            return Ok(());
        };
        if survey.crs.is_geographic() || west > east {
            return Ok(());
        }
        let (mut lon, mut lat) = (survey.x.clone(), survey.y.clone());
        let moved = survey.crs.transform(&Crs::from_user("EPSG:4326")?, &mut lon, &mut lat);
        let away = |i: usize| {
            let lon = (west - lon[i]).max(lon[i] - east).max(0.0);
            lon.max((south - lat[i]).max(lat[i] - north).max(0.0))
        };
        let area = || format!("{west}° to {east}° east, {south}° to {north}° north");
        let nearest = (0..survey.len()).map(away).fold(f64::INFINITY, f64::min);
        if moved.is_err() || nearest > 5.0 {
            let place = match moved {
                Ok(()) => format!("{:.2}, {:.2}", lon[0], lat[0]),
                Err(_) => "nowhere".into(),
            };
            return Err(self
                .refuse(format!("no site lies anywhere near where {} is used", survey.crs.name()))
                .fact("used for", area())
                .fact("first site's longitude, latitude", place)
                .try_this("check --crs, and that x (easting) and y (northing) are not swapped"));
        }
        let outside = (0..survey.len()).filter(|i| away(*i) > 1.0).count();
        if outside > 0 {
            self.notes.push(format!(
                "{outside} sites lie more than a degree outside the area {} is meant for ({})",
                survey.crs.name(),
                area()
            ));
        }
        Ok(())
    }
}

/// Outcomes as they stand in the file, missing ones included.
enum Raw {
    Counts { names: [String; 2], numbers: [Vec<f64>; 2] },
    Single { name: String, values: Vec<f64> },
    Cases { names: [String; 2], numbers: [Vec<f64>; 2], per: String },
    Values { name: String, values: Vec<f64> },
    Positive { name: String, values: Vec<f64> },
}

impl Raw {
    /// Refuses what is wrong, in the order of the file.
    fn check(&self, reading: &Reading) -> Result<()> {
        match self {
            Raw::Single { name, values } => {
                if let Some(i) = values.iter().position(|v| !(v.is_nan() || *v == 0.0 || *v == 1.0))
                {
                    return Err(reading
                        .refuse_cell("a binary outcome is 0 or 1", i, name, values[i])
                        .try_this(
                            "write 0 for no and 1 for yes; for counts use --positive and --tested, \
                             for a measurement --value",
                        ));
                }
            }
            Raw::Values { name, values } | Raw::Positive { name, values } => {
                let logged = matches!(self, Raw::Positive { .. });
                for (i, &v) in values.iter().enumerate() {
                    if logged && v <= 0.0 && !CODES.contains(&v) {
                        return Err(reading
                            .refuse_cell("a value on the log scale is above 0", i, name, v)
                            .try_this(
                                "write what is below the limit of detection as half that limit, or \
                                 use --value",
                            ));
                    }
                    if v.is_infinite() || v.abs() > 1e30 {
                        return Err(reading
                            .refuse_cell("a value is too large to be one", i, name, v)
                            .try_this("correct the cell, or leave it empty if it is unknown"));
                    }
                    if CODES.contains(&v) {
                        return Err(reading
                            .refuse_cell("a value looks like a code for a missing one", i, name, v)
                            .try_this("leave cells without a value empty"));
                    }
                }
            }
            Raw::Cases { names, numbers: [cases, exposure], .. } => {
                for i in 0..cases.len() {
                    let (k, n) = (cases[i], exposure[i]);
                    if k < 0.0 || k.is_infinite() || (k.is_finite() && k.fract() != 0.0) {
                        return Err(reading
                            .refuse_cell("cases are a whole number", i, &names[0], k)
                            .try_this(
                                "correct the cell; map a rate that is worked out with --log-value",
                            ));
                    }
                    if n < 0.0 || n.is_infinite() {
                        let what = "a population or person-time is not above 0";
                        return Err(reading
                            .refuse_cell(what, i, &names[1], n)
                            .try_this("correct the cell, or leave it empty if it is unknown"));
                    }
                    if n == 0.0 && k > 0.0 {
                        return Err(reading
                            .refuse("cases where nobody is")
                            .fact("row", reading.table.place(i))
                            .fact(&names[0], k)
                            .fact(&names[1], n)
                            .try_this("correct the population or the person-time of the row"));
                    }
                }
            }
            Raw::Counts { names, numbers: [positive, tested] } => {
                for i in 0..positive.len() {
                    for (name, v) in names.iter().zip([positive[i], tested[i]]) {
                        let wrong = if v.is_infinite() {
                            "a count is infinite"
                        } else if v < 0.0 {
                            "a count is negative"
                        } else if v.fract() != 0.0 && !v.is_nan() {
                            "a count is not a whole number"
                        } else {
                            continue;
                        };
                        let help = match v.is_finite() && v.fract() != 0.0 {
                            true => {
                                "counts are of people: turn percentages back into how many were \
                                 positive, or map a rate or a prevalence with --value"
                            }
                            false => "correct the cell, or leave it empty if it is unknown",
                        };
                        return Err(reading.refuse_cell(wrong, i, name, v).try_this(help));
                    }
                    if positive[i] > tested[i] {
                        return Err(reading
                            .refuse("more people are positive than were tested")
                            .fact("row", reading.table.place(i))
                            .fact(&names[0], positive[i])
                            .fact(&names[1], tested[i])
                            .try_this(
                                "correct the row, and check that the two columns are not swapped",
                            ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Why row `i` has no outcome.
    fn absent(&self, i: usize) -> Option<String> {
        match self {
            Raw::Values { name, values }
            | Raw::Positive { name, values }
            | Raw::Single { name, values } => values[i].is_nan().then(|| format!("no {name}")),
            Raw::Counts { names, numbers: [positive, tested] }
            | Raw::Cases { names, numbers: [positive, tested], .. } => {
                let nobody = match self {
                    Raw::Cases { .. } => "nobody at risk",
                    _ => "nobody tested",
                };
                if positive[i].is_nan() && tested[i].is_nan() {
                    Some(format!("no {} and no {}", names[0], names[1]))
                } else if positive[i].is_nan() {
                    Some(format!("no {}", names[0]))
                } else if tested[i].is_nan() {
                    Some(format!("no {}", names[1]))
                } else {
                    (tested[i] == 0.0).then(|| format!("{nobody} ({} is 0)", names[1]))
                }
            }
        }
    }

    fn outcome(self) -> Outcome {
        match self {
            Raw::Values { values, .. } => Outcome::Values(values),
            Raw::Positive { values, .. } => Outcome::Positive(values),
            Raw::Single { values, .. } => {
                Outcome::Counts { tested: vec![1.0; values.len()], positive: values }
            }
            Raw::Cases { numbers: [cases, exposure], per, .. } => {
                Outcome::Cases { cases, exposure, per }
            }
            Raw::Counts { numbers: [positive, tested], .. } => Outcome::Counts { positive, tested },
        }
    }
}
