//! Surfaces that change with time: a spatial kernel times one of time, and a part that stays.
//!
//! Source: the separable model of Cressie & Wikle (2011), "Statistics for Spatio-Temporal Data", 6.1,
//! with a share that no time takes away: `C(h, u) = C(h) (s + (1 − s) ρ(u))`, which is the sum of a
//! surface that stays and one that changes, both with the spatial kernel's length scale.

use std::sync::Arc;

use super::{Entry, Kernel, Matern, Metric, Smoothness};

/// A kernel of sites whose last coordinate is a time, behind those of the spatial kernel: (x, y, time), or (x, y,
/// mark, time) over one of [displaced](super::displaced) sites. Sites of two coordinates are all of one time.
#[derive(Debug, Clone)]
pub struct SpaceTime {
    /// Covariance at one time; its sill is that of the whole.
    pub space: Arc<dyn Kernel>,
    /// Smoothness in time.
    pub smoothness: Smoothness,
    /// Length scale in time, in the units of the sites' times.
    pub time_scale: f64,
    /// Share of the variance that never changes, 0 to 1.
    pub static_share: f64,
}

/// How a kernel changes with time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// Length scale in time, in the units of the sites' times.
    pub time_scale: f64,
    /// Share of the variance that never changes.
    pub static_share: f64,
}

impl SpaceTime {
    /// Correlation of a place with itself, `apart` in time.
    ///
    /// ```
    /// use isopleth::kernel::{Kernel, Matern, Metric, Smoothness, SpaceTime};
    /// let space = Matern { smoothness: Smoothness::Half, length_scale: 2.0, sill: 1.5, metric: Metric::Euclidean };
    /// let k = SpaceTime {
    ///     space: std::sync::Arc::new(space), smoothness: Smoothness::Half, time_scale: 3.0, static_share: 0.2,
    /// };
    /// // One length scale away in both: e⁻¹ of 1.5, of which a fifth stays and the rest falls by e⁻¹.
    /// let (a, b) = ([0.0, 0.0, 5.0], [0.0, 2.0, 8.0]);
    /// let e = (-1.0f64).exp();
    /// assert!((k.covariance(&a, &b) - 1.5 * e * (0.2 + 0.8 * e)).abs() < 1e-12);
    /// ```
    pub fn over(&self, apart: f64) -> f64 {
        let left = self.smoothness.correlation(apart.abs() / self.time_scale);
        self.static_share + (1.0 - self.static_share) * left
    }
}

impl Kernel for SpaceTime {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        match (a, b) {
            ([a @ .., from], [b @ .., to]) if a.len() > 1 && b.len() > 1 => {
                self.space.covariance(a, b) * self.over(from - to)
            }
            _ => self.space.covariance(&a[..a.len().min(2)], &b[..b.len().min(2)]),
        }
    }
    fn column(&self, at: [f64; 2], x: &[f64], y: &[f64], out: &mut [f64]) {
        self.space.column(at, x, y, out);
    }
    fn sill(&self) -> f64 {
        self.space.sill()
    }
    fn unstretch(&self) -> Option<[f64; 4]> {
        self.space.unstretch()
    }
    /// A share of the waves stands still in time; the others' frequencies are those of the correlation in
    /// time, a t with 2ν degrees of freedom.
    fn frequency(&self, at: &[f64]) -> Option<Vec<f64>> {
        let ([in_space @ .., along], 3) = (at, at.len()) else { return None };
        let mut frequency = self.space.frequency(in_space)?;
        let changes = (along - self.static_share) / (1.0 - self.static_share);
        frequency.push(match changes > 0.0 {
            true => self.smoothness.frequency(changes)? / self.time_scale,
            false => 0.0,
        });
        Some(frequency)
    }
    fn change(&self) -> Option<Change> {
        Some(Change { time_scale: self.time_scale, static_share: self.static_share })
    }
}

/// Registered as "space-time".
pub const ENTRY: Entry = Entry {
    name: "space-time",
    about: "a spatial kernel times one of time, and a part that stays (Cressie & Wikle 2011, 6.1)",
    tiny: || {
        Box::new(SpaceTime {
            space: Arc::new(Matern {
                smoothness: Smoothness::ThreeHalves,
                length_scale: 1.0,
                sill: 2.0,
                metric: Metric::Euclidean,
            }),
            smoothness: Smoothness::Half,
            time_scale: 0.7,
            static_share: 0.3,
        })
    },
    at_length_scale: Some(0.483_357_724_596_507_7),
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{geo::displacement::Law, kernel::Displaced};

    /// Marks of displaced sites stand between place and time.
    #[test]
    fn displaced_sites_have_times() {
        let (smoothness, metric) = (Smoothness::ThreeHalves, Metric::Euclidean);
        let inner = Matern { smoothness, length_scale: 1.0, sill: 2.0, metric };
        let law = || vec![Law::up_to(0.3)];
        let moved = || Displaced::new(inner, &law()).unwrap();
        let mark = 1.0 / f64::from(1 << 20);
        let [a, b] = [[0.1, 0.2, mark], [0.4, -0.3, 0.0]];
        let space = moved().covariance(&a, &b);
        assert!((space - inner.covariance(&a[..2], &b[..2])).abs() > 1e-3, "it is displaced");
        let (smoothness, time_scale, static_share) = (Smoothness::Half, 0.5, 0.25);
        let both = SpaceTime { space: Arc::new(moved()), smoothness, time_scale, static_share };
        let [a, b] = [[0.1, 0.2, mark, 0.3], [0.4, -0.3, 0.0, -0.4]];
        assert!((both.covariance(&a, &b) - space * both.over(0.7)).abs() < 1e-14);
    }
}
