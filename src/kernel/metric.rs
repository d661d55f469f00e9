//! How far apart two sites are: on the plane, on the globe, or with a preferred direction.

use geo::{Distance, Haversine, Point};

/// A distance between two sites.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Metric {
    /// Straight line in any number of dimensions.
    Euclidean,
    /// Great circle between (longitude, latitude) in degrees; returns km, on a sphere of the Earth's
    /// mean radius, 6371.0088 km (Moritz 2000, R₁).
    ///
    /// Of the Matérn family only ν = 1/2 is positive definite for this distance on a sphere
    /// (Gneiting 2013, doi:10.3150/12-BEJSP06): project first, or keep to the exponential.
    GreatCircle,
    /// Planar distance that grows `ratio` times faster across `angle` than along it, so that the
    /// length scale holds along `angle` and is `ratio` times shorter across.
    Anisotropic {
        /// Direction of slowest change, radians anticlockwise from the first axis.
        angle: f64,
        /// Length scale along ÷ length scale across, ≥ 1.
        ratio: f64,
    },
}

impl Metric {
    /// Distance between `a` and `b`.
    ///
    /// # Shapes
    /// `a`, `b` `[dimension]`: any dimension for `Euclidean`, two for the others.
    /// # Units
    /// Those of the coordinates; `GreatCircle` takes degrees and returns km.
    ///
    /// ```
    /// use isopleth::kernel::Metric;
    /// // One degree of latitude.
    /// let d = Metric::GreatCircle.distance(&[10.0, 4.0], &[10.0, 5.0]);
    /// assert!((d - 111.195).abs() < 1e-3);
    /// // Slow along the first axis, four times faster across it.
    /// let m = Metric::Anisotropic { angle: 0.0, ratio: 4.0 };
    /// assert_eq!(m.distance(&[0.0, 0.0], &[1.0, 0.0]), 1.0);
    /// assert_eq!(m.distance(&[0.0, 0.0], &[0.0, 1.0]), 4.0);
    /// ```
    #[inline]
    pub fn distance(&self, a: &[f64], b: &[f64]) -> f64 {
        match *self {
            Metric::Euclidean => {
                a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum::<f64>().sqrt()
            }
            Metric::GreatCircle => {
                // Haversine: accurate for near sites, where the arc cosine is not.
                Haversine.distance(Point::new(a[0], a[1]), Point::new(b[0], b[1])) / 1000.0
            }
            Metric::Anisotropic { angle, ratio } => {
                let (sin, cos) = angle.sin_cos();
                let (dx, dy) = (a[0] - b[0], a[1] - b[1]);
                (cos * dx + sin * dy).hypot(ratio * (cos * dy - sin * dx))
            }
        }
    }
}
