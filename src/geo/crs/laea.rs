//! The Lambert azimuthal equal-area projection of WGS84, in plain Rust.
//!
//! For builds without GDAL, and to check PROJ in builds with it. Source: Snyder (1987), Map
//! Projections: A Working Manual, USGS Professional Paper 1395, eqs 24-13 to 24-27 and 3-11 to
//! 3-16.

/// Semi-major axis of WGS84, metres, and its squared eccentricity.
const A: f64 = 6_378_137.0;
const E2: f64 = 0.006_694_379_990_141_317;

/// One projection, about one centre.
pub(super) struct Laea {
    /// Longitude of the centre, radians.
    lon: f64,
    /// Sine and cosine of the centre's authalic latitude.
    sin: f64,
    cos: f64,
    /// Radius of the sphere of equal area, metres.
    radius: f64,
    /// Stretch that makes the scale true at the centre in every direction.
    d: f64,
}

/// Snyder's q, eq. 3-12: twice the sine of the authalic latitude, nearly.
fn q(lat: f64) -> f64 {
    let (e, s) = (E2.sqrt(), lat.sin());
    (1.0 - E2) * (s / (1.0 - E2 * s * s) - ((1.0 - e * s) / (1.0 + e * s)).ln() / (2.0 * e))
}

fn q_pole() -> f64 {
    q(std::f64::consts::FRAC_PI_2)
}

impl Laea {
    /// Centred on `lon`, `lat`, degrees.
    pub fn new(lon: f64, lat: f64) -> Self {
        let lat = lat.to_radians();
        let beta = (q(lat) / q_pole()).clamp(-1.0, 1.0).asin();
        let radius = A * (q_pole() / 2.0).sqrt();
        let m = lat.cos() / (1.0 - E2 * lat.sin().powi(2)).sqrt();
        let (sin, cos) = beta.sin_cos();
        // At a pole both m and cos β vanish and the stretch is 1.
        let d = if cos > 1e-9 { A * m / (radius * cos) } else { 1.0 };
        Laea { lon: lon.to_radians(), sin, cos, radius, d }
    }

    /// Longitude and latitude, degrees → metres; not finite at the antipode.
    pub fn forward(&self, lon: f64, lat: f64) -> (f64, f64) {
        let (sin_lon, cos_lon) = (lon.to_radians() - self.lon).sin_cos();
        let (sin, cos) = (q(lat.to_radians()) / q_pole()).clamp(-1.0, 1.0).asin().sin_cos();
        let b = self.radius * (2.0 / (1.0 + self.sin * sin + self.cos * cos * cos_lon)).sqrt();
        let y = self.cos * sin - self.sin * cos * cos_lon;
        (b * self.d * cos * sin_lon, b / self.d * y)
    }

    /// Metres → longitude and latitude, degrees; NaN beyond the edge of the map.
    pub fn inverse(&self, x: f64, y: f64) -> (f64, f64) {
        let (x, y) = (x / self.d, y * self.d);
        let rho = x.hypot(y);
        if rho < 1e-9 {
            return (self.lon.to_degrees(), latitude(self.sin).to_degrees());
        }
        let (sin_c, cos_c) = (2.0 * (rho / (2.0 * self.radius)).asin()).sin_cos();
        let sin_beta = cos_c * self.sin + y * sin_c * self.cos / rho;
        let lon = self.lon + (x * sin_c).atan2(rho * self.cos * cos_c - y * self.sin * sin_c);
        let turn = std::f64::consts::TAU;
        let lon = lon - turn * (lon / turn).round(); // −180 to 180
        (lon.to_degrees(), latitude(sin_beta).to_degrees())
    }
}

/// Geodetic latitude of an authalic latitude given by its sine, by Newton's method (eq. 3-16).
fn latitude(sin_beta: f64) -> f64 {
    let target = sin_beta.clamp(-1.0, 1.0) * q_pole();
    let mut lat = sin_beta.clamp(-1.0, 1.0).asin();
    for _ in 0..20 {
        let s = lat.sin();
        let slope = 2.0 * (1.0 - E2) * lat.cos() / (1.0 - E2 * s * s).powi(2);
        let step = (target - q(lat)) / slope.max(1e-12);
        lat += step;
        if step.abs() < 1e-14 || sin_beta.is_nan() {
            break;
        }
    }
    if sin_beta.is_nan() { f64::NAN } else { lat }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Places out to 3,000 km, there and back, from the equator to the poles.
    #[test]
    fn there_and_back() {
        for (lon, lat) in [(0.0, 0.0), (25.0, 60.0), (179.9, -17.0), (10.0, 90.0), (10.0, -89.5)] {
            let plane = Laea::new(lon, lat);
            for k in 0..12 {
                let (x, y) =
                    (250e3 * k as f64 * (k as f64).cos(), 250e3 * k as f64 * (k as f64).sin());
                let (a, b) = plane.inverse(x, y);
                let (p, r) = plane.forward(a, b);
                assert!(
                    (p - x).abs() < 1e-5 && (r - y).abs() < 1e-5,
                    "{lon} {lat}: {x} {y} {p} {r}"
                );
            }
        }
    }

    /// Two programs from one book: PROJ and this file, to a tenth of a millimetre.
    #[cfg(feature = "gdal")]
    #[test]
    fn agrees_with_proj() {
        use crate::geo::crs::Crs;
        let globe = Crs::from_user("EPSG:4326").unwrap();
        for (lon, lat) in [(0.0, 0.0), (25.0, 60.0), (-60.0, -17.0), (10.0, 89.0)] {
            let (plane, proj) = (Laea::new(lon, lat), Crs::local_equal_area(lon, lat).unwrap());
            for k in 0..40 {
                let at = (
                    lon + 3.0 * (k % 7) as f64 - 9.0,
                    (lat + 1.7 * (k % 5) as f64 - 3.0).min(90.0),
                );
                let (mut x, mut y) = ([at.0], [at.1]);
                globe.transform(&proj, &mut x, &mut y).unwrap();
                let (p, r) = plane.forward(at.0, at.1);
                assert!(
                    (p - x[0]).abs() < 1e-4 && (r - y[0]).abs() < 1e-4,
                    "{at:?}: {p} {r} {x:?} {y:?}"
                );
                let (mut a, mut b) = ([p], [r]);
                proj.transform(&globe, &mut a, &mut b).unwrap();
                // PROJ's inverse is a series, good to some millimetres.
                let (c, d) = plane.inverse(p, r);
                assert!(
                    (a[0] - c).abs() * b[0].to_radians().cos() < 1e-7 && (b[0] - d).abs() < 1e-7,
                    "{a:?} {b:?} {c} {d}"
                );
            }
        }
    }
}
