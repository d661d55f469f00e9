//! How far apart places are: on the plane of a [`Frame`](super::frame::Frame), through the globe, or
//! around a barrier ([`Around`]).
//!
//! Every geometry gives a place coordinates between which the straight line is its distance. A kernel
//! of space is then positive definite among places whatever the geometry, and a network that reads
//! nothing but distances is asked as ever.
//!
//! **Globe.** Places are points of the ellipsoid WGS84 in three dimensions, and distances are chords
//! through it. A chord rises with the great circle, so near stays near; it is 0.1 % short of it at
//! 990 km, 1 % at 3,130 km, 10 % at 10,000 km, and 36 % at the antipode. Great circles themselves make
//! no covariance: of the Matérn family only ν ≤ 1/2 is positive definite in them, and all of it in chords.
//!
//! Sources: Gneiting (2013), doi:10.3150/12-BEJSP06, section 4; Guinness & Fuentes (2016),
//! doi:10.1016/j.spasta.2015.08.001, who find chords as good as any covariance made for spheres.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{
    around::{Around, Passable},
    crs::{Crs, EARTH_RADIUS},
    grid::{Grid, Mask, Window},
    survey::Survey,
};
use crate::{
    error::{Error, Result},
    sites::unit_box,
};

/// Off by more than this share, a plane's distances are not used unless they are asked for.
pub const MOST_OFF: f64 = 0.01;

/// What distances are measured on.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Geometry {
    /// The plane of the frame.
    #[default]
    Plane,
    /// The globe.
    Globe(Globe),
    /// Ways around a barrier.
    Around(Box<Around>),
}

/// The globe in three dimensions, turned so that its axes are east, north and up at one place: near there
/// the first two coordinates are those of a plane.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Globe {
    /// Longitude of that place, degrees.
    pub lon: f64,
    /// Its latitude, degrees.
    pub lat: f64,
}

impl Globe {
    /// Places in metres from the middle of the earth, towards east, north and up at the globe's own place.
    ///
    /// ```
    /// use isopleth::geo::geometry::Globe;
    /// // Across the 180th meridian is no farther than anywhere else.
    /// let [a, b] = [179.9, -179.9].map(|lon| Globe { lon: 12.0, lat: 50.0 }.place(lon, 0.0));
    /// let chord = (0..3).map(|d| (a[d] - b[d]).powi(2)).sum::<f64>().sqrt();
    /// assert!((chord - 22_263.9).abs() < 0.1);
    /// ```
    ///
    /// # Source
    /// Snyder (1987), USGS Professional Paper 1395, eq. 4-20 (radius of curvature in the prime vertical).
    pub fn place(&self, lon: f64, lat: f64) -> [f64; 3] {
        const A: f64 = 6_378_137.0;
        const E2: f64 = 0.006_694_379_990_141_317;
        let (sin_lon, cos_lon) = (lon - self.lon).to_radians().sin_cos();
        let (sin, cos) = lat.to_radians().sin_cos();
        let n = A / (1.0 - E2 * sin * sin).sqrt();
        let (ahead, east, pole) = (n * cos * cos_lon, n * cos * sin_lon, n * (1.0 - E2) * sin);
        let (sin, cos) = self.lat.to_radians().sin_cos();
        [east, cos * pole - sin * ahead, cos * ahead + sin * pole]
    }

    /// The arc of a chord, both in metres, on the mean sphere. Longer than any chord, it goes on in
    /// proportion.
    ///
    /// ```
    /// use isopleth::geo::geometry::Globe;
    /// assert!((Globe::arc(3_095_910.0) / 3_127_200.0 - 1.0).abs() < 1e-4);
    /// ```
    pub fn arc(chord: f64) -> f64 {
        let share = chord / (2.0 * EARTH_RADIUS);
        2.0 * EARTH_RADIUS
            * if share < 1.0 { share.asin() } else { std::f64::consts::FRAC_PI_2 * share }
    }
}

/// What a user says of distances.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// `plane` or `globe` (`--distance`).
    pub distance: Option<String>,
    /// What can be passed (`--inside`).
    pub inside: Option<PathBuf>,
    /// What cannot (`--barrier`).
    pub barrier: Option<PathBuf>,
}

impl Geometry {
    /// The geometry of a survey's sites, and what there is to say about it: the globe where a plane's
    /// distances would be off by more than [`MOST_OFF`], unless `choice` says which.
    ///
    /// Displaced sites are integrated over on a plane, and stay there. So do sites with times.
    ///
    /// # Errors
    /// [`Error::Input`] for sites with times that are to be on the globe or beside a barrier;
    /// [`Error::Input`] for sites on a local plane, or displaced ones, that are to be on the globe; for
    /// displaced ones beside a barrier; else as [`Around::new`].
    pub fn of(choice: &Choice, survey: &Survey) -> Result<(Self, Vec<String>)> {
        let Survey { crs, x, y, .. } = survey;
        let displaced = survey.displacement.is_some();
        let when = survey.times.as_ref().map(|times| times.column.as_str());
        let asked = match choice.distance.as_deref() {
            None | Some("plane") => false,
            Some("globe") => true,
            Some(text) => {
                return Err(Error::input("distances are measured on a plane or on the globe")
                    .fact("--distance", text)
                    .try_this("write --distance plane or --distance globe, or leave it out"));
            }
        };
        let barrier = match (&choice.inside, &choice.barrier) {
            (Some(file), None) => Some((Passable::Inside, &**file)),
            (None, Some(file)) => Some((Passable::Outside, &**file)),
            (None, None) => None,
            (Some(_), Some(_)) => {
                return Err(Error::input("what can be passed is said once")
                    .try_this("give --inside, or --barrier for all that is not inside"));
            }
        };
        if let Some(column) = when
            && (asked || barrier.is_some())
        {
            let flags = [
                ("--distance", choice.distance.as_deref().map(str::to_string)),
                ("--inside", choice.inside.as_ref().map(|file| file.display().to_string())),
                ("--barrier", choice.barrier.as_ref().map(|file| file.display().to_string())),
            ];
            let error = Error::input("sites with times are known on a plane only yet")
                .fact("survey", survey.source.display())
                .fact("--time", column);
            let told = flags.into_iter().filter_map(|(flag, said)| Some((flag, said?)));
            return Err(told.fold(error, |error, (flag, said)| error.fact(flag, said)).try_this(
                "leave --time out, or measure on a plane: --distance plane, no barrier",
            ));
        }
        if let Some(barrier) = barrier {
            if displaced || asked {
                let flag = if asked { "--distance globe" } else { "--displacement" };
                return Err(Error::input(
                    "ways around a barrier are found on a plane, from known places",
                )
                .fact("given too", flag)
                .try_this(format!("leave {flag} out, or the barrier")));
            }
            let around = Around::new(barrier, crs, &plane(survey)?, [x, y], &survey.rows)?;
            let said = around.about();
            return Ok((Geometry::Around(Box::new(around)), said));
        }
        if asked && crs.is_local() {
            return Err(Error::input("sites on a local plane have no place on the globe")
                .fact("sites", crs.name())
                .try_this(
                    "leave --distance globe out, or name the system of the sites with --crs",
                ));
        }
        if asked && displaced {
            return Err(Error::input("displaced sites are integrated over on a plane only")
                .fact("--distance", "globe")
                .try_this(
                    "leave --distance globe out; or --displacement: on a map of a continent, a few \
                     kilometres are less than a pixel",
                ));
        }
        if crs.is_local() || choice.distance.as_deref() == Some("plane") || displaced {
            return Ok((Geometry::Plane, Vec::new()));
        }
        let [lon, lat] = degrees(crs, x, y)?;
        let Middle { lon, lat, farthest } = Middle::of(&lon, &lat)?;
        let off = off(farthest);
        if !asked && off <= MOST_OFF {
            return Ok((Geometry::Plane, Vec::new()));
        }
        if !asked && when.is_some() {
            let off =
                if farthest < 2.0 { format!("{:.1}", 100.0 * off) } else { "100 and more".into() };
            let said = format!(
                "distances are measured on a plane, off by up to {off} %: sites with times are not known \
                 on the globe yet"
            );
            return Ok((Geometry::Plane, vec![said]));
        }
        let said = format!(
            "distances are measured through the globe: on a plane they would be off by up to {} %{}",
            if farthest < 2.0 { format!("{:.1}", 100.0 * off) } else { "100 and more".into() },
            if asked { "" } else { " (--distance plane: on a plane all the same)" },
        );
        Ok((Geometry::Globe(Globe { lon, lat }), vec![said]))
    }

    /// Whether places are on a plane.
    pub fn is_plane(&self) -> bool {
        *self == Geometry::Plane
    }

    /// What it is, in a few words.
    pub fn about(&self) -> &'static str {
        match self {
            Geometry::Plane => "on a plane",
            Geometry::Globe(_) => "through the globe",
            Geometry::Around(_) => "around a barrier",
        }
    }

    /// Coordinates of a place.
    pub fn dim(&self) -> usize {
        match self {
            Geometry::Plane => 2,
            Geometry::Globe(_) => 3,
            Geometry::Around(around) => around.dim,
        }
    }

    /// A distance in metres as it is along the ground.
    pub fn ground(&self, metres: f64) -> f64 {
        match self {
            Geometry::Plane | Geometry::Around(_) => metres,
            Geometry::Globe(_) => Globe::arc(metres),
        }
    }

    /// Coordinates of places in `crs` `[place, dimension]`, in metres; on the plane in units of `plane`.
    ///
    /// # Errors
    /// [`Error::Input`] if a place is not finite, or cannot be moved there, or lies in a barrier.
    pub fn places(&self, crs: &Crs, plane: &Crs, x: &[f64], y: &[f64]) -> Result<Vec<f64>> {
        match self {
            Geometry::Plane => Ok(moved(crs, plane, x, y)?.into_iter().flatten().collect()),
            Geometry::Globe(globe) => {
                let [lon, lat] = degrees(crs, x, y)?;
                Ok(lon.iter().zip(&lat).flat_map(|(lon, lat)| globe.place(*lon, *lat)).collect())
            }
            Geometry::Around(around) => {
                let places = around.places(crs, x, y)?;
                match places.chunks(around.dim).position(|place| place[0].is_nan()) {
                    None => Ok(places),
                    Some(i) => {
                        Err(Error::input("a place lies in the barrier, or no way leads there")
                            .fact("place", format!("number {}", i + 1))
                            .fact("barrier", around.file.display())
                            .try_this("leave places in the barrier out"))
                    }
                }
            }
        }
    }

    /// Which places have coordinates at all: all but those in a barrier.
    ///
    /// # Errors
    /// As [`Geometry::places`], but for those.
    pub fn reached(&self, crs: &Crs, x: &[f64], y: &[f64]) -> Result<Vec<bool>> {
        match self {
            Geometry::Around(around) => around.reached(crs, x, y),
            _ => Ok(vec![true; x.len()]),
        }
    }

    /// A grid without the pixels in a barrier.
    ///
    /// # Errors
    /// [`Error::Input`] if none is left.
    pub fn cut(&self, mut grid: Grid) -> Result<Grid> {
        let Geometry::Around(around) = self else { return Ok(grid) };
        let (mut mask, before) = (Mask::none(grid.rows, grid.cols), grid.wanted());
        for row in 0..grid.rows {
            let line = Window { row, col: 0, rows: 1, cols: grid.cols };
            let valid = grid.valid(line);
            let (x, y) = grid.centres(line, &valid);
            let mut reached = self.reached(&grid.crs, &x, &y)?.into_iter();
            for col in (0..grid.cols).filter(|col| valid[*col]) {
                mask.set(row, col, reached.next().unwrap_or(false));
            }
        }
        let left = mask.count();
        if left == 0 {
            return Err(Error::input("no pixel of the grid can be reached from the sites")
                .fact("barrier", around.file.display())
                .try_this("check that both are about the same place"));
        }
        if left < before {
            grid.notes.push(format!(
                "{} of {before} pixels lie in the barrier, or no way leads there from a site: they are left \
                 empty",
                before - left
            ));
        }
        grid.valid = (left < grid.rows * grid.cols).then_some(mask);
        Ok(grid)
    }
}

/// The plane for a survey: its own if that is local, else equal-area about the sites' middle.
///
/// # Errors
/// If sites cannot be moved there.
pub fn plane(survey: &Survey) -> Result<Crs> {
    if survey.crs.is_local() {
        return Ok(survey.crs.clone());
    }
    let [lon, lat] = degrees(&survey.crs, &survey.x, &survey.y)?;
    let Middle { lon, lat, .. } = Middle::of(&lon, &lat)?;
    Crs::local_equal_area(lon, lat)
}

/// The most by which an equal-area plane's scale is off at an angle from its centre (radians), of itself:
/// Snyder (1987), ch. 24.
pub fn off(angle: f64) -> f64 {
    1.0 / (0.5 * angle.min(3.0)).cos() - 1.0
}

/// The middle of some places on the globe.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Middle {
    /// Longitude, degrees.
    pub lon: f64,
    /// Latitude, degrees.
    pub lat: f64,
    /// The largest angle between it and a place, radians.
    pub farthest: f64,
}

impl Middle {
    /// Of places in degrees: the centre of their box on an equal-area plane about their mean direction.
    ///
    /// # Errors
    /// If there is no such plane.
    pub fn of(lon: &[f64], lat: &[f64]) -> Result<Self> {
        // A millionth of a degree is 11 cm: a tidy centre for the run record.
        let tidy = |v: f64| (v * 1e6).round() / 1e6;
        let unit = |lon: f64, lat: f64| {
            let (lon, lat) = (lon.to_radians(), lat.to_radians());
            [lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()]
        };
        let angle = |a: [f64; 3], lon: f64, lat: f64| {
            let b = unit(lon, lat);
            2.0 * (0.5 * (0..3).map(|d| (a[d] - b[d]).powi(2)).sum::<f64>().sqrt()).min(1.0).asin()
        };
        let farthest = |at: [f64; 2]| {
            let at = unit(at[0], at[1]);
            lon.iter().zip(lat).map(|(lon, lat)| angle(at, *lon, *lat)).fold(0.0, f64::max)
        };
        // The mean direction is safe across the antimeridian and at the poles; sites that cancel out
        // have none, and any centre is as good.
        let mut sum = [0.0; 3];
        for (lon, lat) in lon.iter().zip(lat) {
            sum.iter_mut().zip(unit(*lon, *lat)).for_each(|(sum, v)| *sum += v);
        }
        let length = sum.iter().map(|v| v * v).sum::<f64>().sqrt();
        let mut at = [
            tidy(sum[1].atan2(sum[0]).to_degrees()),
            tidy((sum[2] / length.max(f64::MIN_POSITIVE)).asin().to_degrees()),
        ];
        // Clustered sites pull the mean to one side; distortion is least about the box's centre. Where
        // places are all around the globe there is no such box.
        if farthest(at) < 3.0 {
            let (globe, about) =
                (Crs::from_user("EPSG:4326")?, Crs::local_equal_area(at[0], at[1])?);
            if let Some((centre, _)) = unit_box(&moved(&globe, &about, lon, lat)?) {
                let (mut lon, mut lat) = ([centre[0]], [centre[1]]);
                about.transform(&globe, &mut lon, &mut lat)?;
                at = [tidy(lon[0]), tidy(lat[0])];
            }
        }
        Ok(Middle { lon: at[0], lat: at[1], farthest: farthest(at) })
    }
}

/// Longitudes and latitudes of places in `crs`.
///
/// # Errors
/// As [`Geometry::places`].
pub fn degrees(crs: &Crs, x: &[f64], y: &[f64]) -> Result<[Vec<f64>; 2]> {
    let places = moved(crs, &Crs::from_user("EPSG:4326")?, x, y)?;
    Ok([0, 1].map(|d| places.iter().map(|place| place[d]).collect()))
}

/// Coordinates of `from` on `to`.
fn moved(from: &Crs, to: &Crs, x: &[f64], y: &[f64]) -> Result<Vec<[f64; 2]>> {
    let (mut x, mut y) = (x.to_vec(), y.to_vec());
    from.transform(to, &mut x, &mut y)?;
    if let Some(i) = (0..x.len()).find(|i| !(x[*i].is_finite() && y[*i].is_finite())) {
        return Err(Error::input("a place has no finite coordinates")
            .fact("place", format!("number {}", i + 1))
            .try_this("leave places without coordinates out"));
    }
    Ok(x.into_iter().zip(y).map(|(x, y)| [x, y]).collect())
}
