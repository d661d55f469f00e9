//! Coordinate reference systems: codes, axis order, and transformation.
//!
//! PROJ, through GDAL; a build without GDAL knows longitude and latitude on WGS84, equal-area
//! planes and planes of their own, which is enough to predict and validate. A [`Crs`] is text and a few facts read from it once, so it is `Send`,
//! `Sync` and cheap to clone; GDAL objects are built where they are used. Coordinates are always
//! in traditional GIS order: x is easting or longitude, y is northing or latitude.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

#[cfg(feature = "gdal")]
#[path = "crs/enabled.rs"]
mod proj;
#[cfg(not(feature = "gdal"))]
#[path = "crs/disabled.rs"]
mod proj;

#[cfg(any(test, not(feature = "gdal")))]
#[path = "crs/laea.rs"]
mod laea;

#[cfg(feature = "gdal")]
pub use proj::{quiet, said};

/// Mean radius of the Earth, metres (IUGG).
pub const EARTH_RADIUS: f64 = 6_371_008.771_4;

/// What coordinates mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// Longitude and latitude.
    Geographic,
    /// A map projection.
    Projected,
    /// A plane that is nowhere in particular.
    Local,
}

/// A coordinate reference system.
///
/// Two are equal if PROJ finds them the same, however they are written.
///
/// ```
/// use isopleth::geo::crs::Crs;
/// let plane = Crs::from_user("local:km")?;
/// assert!(plane.is_local());
/// assert_eq!(plane.metres_per_unit(), 1000.0);
/// # #[cfg(feature = "gdal")] {
/// let lonlat = Crs::from_user("EPSG:4326")?;
/// assert_eq!(lonlat, Crs::from_user("OGC:CRS84")?);
/// let (mut x, mut y) = ([3.0], [0.0]); // the central meridian of UTM 31, at the equator
/// lonlat.transform(&Crs::from_user("EPSG:32631")?, &mut x, &mut y)?;
/// assert!((x[0] - 500_000.0).abs() < 1e-3 && y[0].abs() < 1e-3);
/// # }
/// # Ok::<(), isopleth::Error>(())
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Crs {
    name: String,
    wkt: String,
    kind: Kind,
    metres_per_unit: f64,
    /// West, south, east, north, degrees.
    area_of_use: Option<[f64; 4]>,
}

impl PartialEq for Crs {
    fn eq(&self, other: &Self) -> bool {
        if self.wkt == other.wkt {
            return true;
        }
        if self.is_local() || other.is_local() {
            return self.is_local()
                && other.is_local()
                && self.metres_per_unit == other.metres_per_unit;
        }
        proj::same(&self.wkt, &other.wkt)
    }
}

impl Crs {
    /// A CRS as a user writes it: `EPSG:4326`, `OGC:CRS84`, WKT, PROJJSON, a PROJ string, or a
    /// plane of its own, `local:m` or `local:km`.
    ///
    /// # Errors
    /// [`Error::Input`] if it is empty, unknown to PROJ, or neither geographic nor planar.
    pub fn from_user(text: &str) -> Result<Self> {
        let text = text.trim();
        match text.to_ascii_lowercase().as_str() {
            "" => Err(Error::input("no coordinate reference system is given").try_this(HELP)),
            "local:m" => Ok(Self::local("m", "metre", 1.0)),
            "local:km" => Ok(Self::local("km", "kilometre", 1000.0)),
            lower if lower.starts_with("local:") => {
                Err(Error::input(format!("`{text}` is not a local plane"))
                    .try_this("local planes are `local:m` (metres) and `local:km` (kilometres)"))
            }
            _ => proj::describe(text),
        }
    }

    /// A plane that is nowhere in particular, in units of `metres`.
    fn local(short: &str, unit: &str, metres: f64) -> Self {
        Crs {
            name: format!("local:{short}"),
            wkt: format!(
                "LOCAL_CS[\"local plane ({short})\",UNIT[\"{unit}\",{metres}],\
                 AXIS[\"Easting\",EAST],AXIS[\"Northing\",NORTH]]"
            ),
            kind: Kind::Local,
            metres_per_unit: metres,
            area_of_use: None,
        }
    }

    /// The Lambert azimuthal equal-area plane on WGS84, metres, centred on `lon`, `lat` degrees.
    ///
    /// # Source
    /// Snyder (1987), Map Projections: A Working Manual, USGS Professional Paper 1395, ch. 24.
    pub fn local_equal_area(lon: f64, lat: f64) -> Result<Self> {
        if !(lon.abs() <= 180.0 && lat.abs() <= 90.0) {
            return Err(Error::input("an equal-area plane cannot be centred outside the globe")
                .fact("longitude", lon)
                .fact("latitude", lat));
        }
        let mut crs = proj::equal_area(lon, lat)?;
        crs.name = format!("equal-area plane (LAEA) centred on {lon}, {lat}");
        Ok(crs)
    }

    /// Well-known text, as GDAL writes it.
    pub fn wkt(&self) -> &str {
        &self.wkt
    }

    /// The short name: `EPSG:32631` where there is a code, `local:m`, or a title.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Longitude and latitude, not a plane.
    pub fn is_geographic(&self) -> bool {
        self.kind == Kind::Geographic
    }

    /// A plane that is nowhere in particular: distances mean something, places do not.
    pub fn is_local(&self) -> bool {
        self.kind == Kind::Local
    }

    /// Metres in one unit of the coordinates. For longitude and latitude: metres in a degree of
    /// latitude on the mean sphere, 111 195.
    pub fn metres_per_unit(&self) -> f64 {
        self.metres_per_unit
    }

    /// West, south, east and north of the area the system is meant for, in degrees, where PROJ
    /// knows it. West exceeds east where it crosses the antimeridian.
    pub fn area_of_use(&self) -> Option<[f64; 4]> {
        self.area_of_use
    }

    /// Moves coordinates from this system `to` another, in place, all in one call.
    ///
    /// # Errors
    /// [`Error::Input`] if one of the two is a local plane and they differ, if PROJ has no way
    /// between them, or if a coordinate lies where the transformation is not defined. The
    /// slices then hold no meaningful values.
    pub fn transform(&self, to: &Crs, x: &mut [f64], y: &mut [f64]) -> Result<()> {
        if x.len() != y.len() {
            return Err(Error::axis("x and y coordinates", x.len(), y.len()));
        }
        if x.is_empty() || self == to {
            return Ok(());
        }
        if self.is_local() && to.is_local() {
            let factor = self.metres_per_unit / to.metres_per_unit;
            x.iter_mut().chain(y.iter_mut()).for_each(|v| *v *= factor);
            return Ok(());
        }
        if self.is_local() || to.is_local() {
            return Err(Error::input("a local plane has no place on the globe")
                .fact("from", &self.name)
                .fact("to", &to.name)
                .try_this("give the sites and the grid the same coordinate reference system"));
        }
        proj::transform(self, to, x, y)
    }
}

/// What a user can type for a CRS.
pub(crate) const HELP: &str = "name it with --crs: a code such as EPSG:4326 (longitude, latitude) \
     or EPSG:32631 (UTM), WKT, a PROJ string, or local:m, local:km for a plane of its own";

#[cfg(all(test, feature = "gdal"))]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_one_system() {
        let code = Crs::from_user("EPSG:4326").unwrap();
        assert_eq!(code.name(), "EPSG:4326");
        assert!(code.is_geographic() && !code.is_local());
        for spelling in
            ["epsg:4326", "OGC:CRS84", "WGS84", "+proj=longlat +datum=WGS84", code.wkt()]
        {
            assert_eq!(Crs::from_user(spelling).unwrap(), code, "{spelling}");
        }
        assert_ne!(Crs::from_user("EPSG:32631").unwrap(), code);
        assert_ne!(Crs::from_user("local:m").unwrap(), Crs::from_user("local:km").unwrap());
    }

    #[test]
    fn x_is_always_easting_or_longitude() {
        // EPSG:4326 is latitude first by its book, EPSG:2393 (Finland, KKJ zone 3) northing first.
        let lonlat = Crs::from_user("EPSG:4326").unwrap();
        let finland = Crs::from_user("EPSG:2393").unwrap();
        let (mut x, mut y) = ([27.0], [62.0]);
        lonlat.transform(&finland, &mut x, &mut y).unwrap();
        assert!((x[0] - 3.5e6).abs() < 1e3, "easting {}", x[0]);
        assert!((6.8e6..6.95e6).contains(&y[0]), "northing {}", y[0]);
        finland.transform(&lonlat, &mut x, &mut y).unwrap();
        assert!((x[0] - 27.0).abs() < 1e-6 && (y[0] - 62.0).abs() < 1e-6, "{x:?} {y:?}");
    }

    #[test]
    fn units_are_read() {
        let metres = |text: &str| Crs::from_user(text).unwrap().metres_per_unit();
        assert_eq!(metres("EPSG:32631"), 1.0);
        assert!((metres("EPSG:2263") - 0.304_800_6).abs() < 1e-6); // New York, US survey feet
        assert_eq!(metres("+proj=utm +zone=31 +datum=WGS84 +units=km"), 1000.0);
        assert!((metres("EPSG:4326") - 111_195.08).abs() < 0.01);
        assert_eq!(metres("local:m"), 1.0);
    }

    #[test]
    fn nonsense_is_refused_in_words() {
        for (text, words) in [
            ("", "no coordinate reference system"),
            ("EPSG:99999", "not a coordinate reference system"),
            ("lonlat please", "not a coordinate reference system"),
            ("local:miles", "not a local plane"),
            ("EPSG:4978", "neither"),
            ("EPSG:5773", "neither"),
        ] {
            let error = Crs::from_user(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
            assert!(error.help().is_some(), "{text}");
        }
        let help = Crs::from_user("32631").unwrap_err().help().unwrap();
        assert!(help.contains("EPSG:32631"), "{help}");
    }

    #[test]
    fn a_local_plane_meets_only_local_planes() {
        let (m, km) = (Crs::from_user("local:m").unwrap(), Crs::from_user("local:km").unwrap());
        let (mut x, mut y) = ([1.5], [-2.0]);
        km.transform(&m, &mut x, &mut y).unwrap();
        assert_eq!((x, y), ([1500.0], [-2000.0]));
        let error = m.transform(&Crs::from_user("EPSG:4326").unwrap(), &mut x, &mut y).unwrap_err();
        assert!(error.to_string().contains("no place on the globe"));
    }

    #[test]
    fn places_outside_a_projection_are_an_error() {
        let lonlat = Crs::from_user("EPSG:4326").unwrap();
        let utm = Crs::from_user("EPSG:32631").unwrap();
        let (mut x, mut y) = ([3.0, f64::INFINITY], [0.0, 0.0]);
        assert!(lonlat.transform(&utm, &mut x, &mut y).is_err());
    }

    #[test]
    fn systems_go_through_json_and_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Crs>();
        let crs = Crs::local_equal_area(12.5, -3.0).unwrap();
        let back: Crs = serde_json::from_str(&serde_json::to_string(&crs).unwrap()).unwrap();
        assert_eq!(back, crs);
        assert!(!crs.is_geographic());
        let (mut x, mut y) = ([12.5], [-3.0]);
        Crs::from_user("EPSG:4326").unwrap().transform(&back, &mut x, &mut y).unwrap();
        assert!(x[0].abs() < 1e-6 && y[0].abs() < 1e-6);
    }
}
