//! Matérn kernels of smoothness 1/2, 3/2, 5/2 and ∞ (the squared exponential).
//!
//! Source: Rasmussen & Williams (2006), eq. 4.14–4.17; Stein (1999) on why smoothness matters.

use statrs::distribution::{ContinuousCDF, StudentsT};

use super::{Entry, Kernel, Metric};
use crate::{
    fused::simd,
    predictive::{normal_cdf, normal_quantile},
};

/// Order ν of a Matérn kernel: surfaces are differentiable ⌈ν⌉ − 1 times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Smoothness {
    /// ν = 1/2, the exponential: continuous and rough.
    #[serde(rename = "1/2")]
    Half,
    /// ν = 3/2: differentiable once.
    #[serde(rename = "3/2")]
    ThreeHalves,
    /// ν = 5/2: differentiable twice.
    #[serde(rename = "5/2")]
    FiveHalves,
    /// ν = ∞, the squared exponential: as smooth as can be.
    #[serde(rename = "inf")]
    Infinite,
}

impl Smoothness {
    /// Every smoothness, roughest first.
    pub const fn all() -> [Smoothness; 4] {
        [Self::Half, Self::ThreeHalves, Self::FiveHalves, Self::Infinite]
    }

    /// The name in recipes: "1/2", "3/2", "5/2", "inf".
    pub const fn name(self) -> &'static str {
        match self {
            Self::Half => "1/2",
            Self::ThreeHalves => "3/2",
            Self::FiveHalves => "5/2",
            Self::Infinite => "inf",
        }
    }

    /// Degrees of freedom of the t that frequencies follow, 2ν; none where it is the normal.
    const fn freedom(self) -> Option<f64> {
        match self {
            Self::Half => Some(1.0),
            Self::ThreeHalves => Some(3.0),
            Self::FiveHalves => Some(5.0),
            Self::Infinite => None,
        }
    }

    /// A frequency on a line, radians per length scale: the quantile of a t with 2ν degrees of freedom
    /// (Rasmussen & Williams 2006, eq. 4.15) at `share` in (0, 1).
    pub fn frequency(self, share: f64) -> Option<f64> {
        match self.freedom() {
            Some(1.0) => Some((std::f64::consts::PI * (share - 0.5)).tan()),
            Some(freedom) => Some(StudentsT::new(0.0, 1.0, freedom).ok()?.inverse_cdf(share)),
            None => Some(normal_quantile(share)),
        }
    }

    /// Correlation at `scaled` = distance / length scale, both in one unit.
    ///
    /// The Matérn argument is √(2ν)·r/ℓ, so that one length scale away every smoothness keeps
    /// about half of the correlation:
    ///
    /// ```
    /// use isopleth::kernel::Smoothness;
    /// let at_one = Smoothness::all().map(|s| (1000.0 * s.correlation(1.0)).round());
    /// assert_eq!(at_one, [368.0, 483.0, 524.0, 607.0]);
    /// ```
    #[inline]
    pub fn correlation(self, scaled: f64) -> f64 {
        const SQRT_3: f64 = 1.732_050_807_568_877_2;
        const SQRT_5: f64 = 2.236_067_977_499_79;
        match self {
            Self::Half => (-scaled).exp(),
            Self::ThreeHalves => {
                let u = SQRT_3 * scaled;
                (1.0 + u) * (-u).exp()
            }
            Self::FiveHalves => {
                let u = SQRT_5 * scaled;
                (1.0 + u + u * u / 3.0) * (-u).exp()
            }
            Self::Infinite => (-0.5 * scaled * scaled).exp(),
        }
    }

    /// Covariances at squared distances in length scales, in place.
    pub(super) fn at_squares(self, sill: f64, out: &mut [f64]) {
        match self {
            Smoothness::Half => half(sill, out),
            Smoothness::ThreeHalves => three_halves(sill, out),
            Smoothness::FiveHalves => five_halves(sill, out),
            Smoothness::Infinite => infinite(sill, out),
        }
    }

    /// Effective range in length scales: where the correlation falls to 0.05.
    ///
    /// ```
    /// use isopleth::kernel::Smoothness;
    /// for s in Smoothness::all() {
    ///     assert!((s.correlation(s.effective_range()) - 0.05).abs() < 1e-12);
    /// }
    /// ```
    pub const fn effective_range(self) -> f64 {
        match self {
            Self::Half => 2.995_732_273_553_991,
            Self::ThreeHalves => 2.738_871_456_691_915,
            Self::FiveHalves => 2.646_900_454_666_854,
            Self::Infinite => 2.447_746_830_680_816_6,
        }
    }
}

/// `sill · correlation(distance / length_scale)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Matern {
    /// Order ν.
    pub smoothness: Smoothness,
    /// Length scale ℓ > 0, in the units of `metric`.
    pub length_scale: f64,
    /// Partial sill ≥ 0, outcome².
    pub sill: f64,
    /// How distance is measured.
    pub metric: Metric,
}

impl Kernel for Matern {
    #[inline]
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        let scaled = self.metric.distance(a, b) / self.length_scale;
        self.sill * self.smoothness.correlation(scaled)
    }
    fn column(&self, at: [f64; 2], x: &[f64], y: &[f64], out: &mut [f64]) {
        // Squared distance in length scales: (a dx + b dy)² + (c dy − d dx)².
        let turn = match self.metric {
            Metric::Euclidean => [1.0, 0.0, 1.0, 0.0],
            Metric::Anisotropic { angle, ratio } => {
                let (sin, cos) = angle.sin_cos();
                [cos, sin, ratio * cos, ratio * sin]
            }
            Metric::GreatCircle => {
                for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
                    *out = self.covariance(&[*x, *y], &at);
                }
                return;
            }
        };
        let turn = turn.map(|v| v / self.length_scale);
        squares(at, turn, x, y, out);
        self.smoothness.at_squares(self.sill, out);
    }
    fn column_of(&self, at: &[f64], places: &[&[f64]], out: &mut [f64]) {
        if self.metric != Metric::Euclidean {
            out.iter_mut().zip(places).for_each(|(out, place)| *out = self.covariance(place, at));
            return;
        }
        let scale = self.length_scale.powi(-2);
        for (out, place) in out.iter_mut().zip(places) {
            *out = scale * place.iter().zip(at).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
        }
        self.smoothness.at_squares(self.sill, out);
    }
    fn sill(&self) -> f64 {
        self.sill
    }
    fn unstretch(&self) -> Option<[f64; 4]> {
        match self.metric {
            Metric::Anisotropic { angle, ratio } => {
                let (sin, cos) = angle.sin_cos();
                Some([cos, sin, -ratio * sin, ratio * cos])
            }
            _ => None,
        }
    }
    /// Rasmussen & Williams (2006), eq. 4.15: on the plane, a bivariate t with 2ν degrees of freedom.
    fn frequency(&self, at: &[f64]) -> Option<Vec<f64>> {
        match (at, self.metric) {
            ([share, turn], Metric::Euclidean) => Some(self.on_a_plane(*share, *turn).to_vec()),
            // Lags are turned and stretched; frequencies by the transpose of that.
            ([share, turn], Metric::Anisotropic { angle, ratio }) => {
                let ([x, y], (sin, cos)) = (self.on_a_plane(*share, *turn), angle.sin_cos());
                Some(vec![cos * x - ratio * sin * y, sin * x + ratio * cos * y])
            }
            ([share, up, turn], Metric::Euclidean) => {
                let across = (1.0 - up * up).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * turn).sin_cos();
                let out = self.out_in_space(*share);
                Some(vec![out * across * cos, out * across * sin, out * up])
            }
            _ => None,
        }
    }
    fn matern(&self) -> Option<Matern> {
        Some(*self)
    }
}

impl Matern {
    /// A frequency of the plane, `share` of the distribution out and `turn` half turns round.
    fn on_a_plane(&self, share: f64, turn: f64) -> [f64; 2] {
        let left = 1.0 - share;
        let out = match self.smoothness {
            Smoothness::Half => (left.powi(-2) - 1.0).sqrt(),
            Smoothness::ThreeHalves => (3.0 * (left.powf(-2.0 / 3.0) - 1.0)).sqrt(),
            Smoothness::FiveHalves => (5.0 * (left.powf(-0.4) - 1.0)).sqrt(),
            Smoothness::Infinite => (-2.0 * left.ln()).sqrt(),
        } / self.length_scale;
        let (sin, cos) = (std::f64::consts::PI * turn).sin_cos();
        [out * cos, out * sin]
    }

    /// How far out a frequency in three dimensions lies. With r = √(2ν) tan θ the distribution function of
    /// the length is a sum of sines, and is turned round by halving.
    fn out_in_space(&self, share: f64) -> f64 {
        let freedom = self.smoothness.freedom().unwrap_or(1.0);
        let shorter = |a: f64| -> f64 {
            let sum = match self.smoothness {
                Smoothness::Half => a - (2.0 * a).sin() / 2.0,
                Smoothness::ThreeHalves => a - (4.0 * a).sin() / 4.0,
                Smoothness::FiveHalves => {
                    a + (2.0 * a).sin() / 4.0 - (4.0 * a).sin() / 4.0 - (6.0 * a).sin() / 12.0
                }
                // Maxwell's distribution, at the tangent.
                Smoothness::Infinite => {
                    let r = a.tan();
                    let density = (2.0 / std::f64::consts::PI).sqrt() * r * (-0.5 * r * r).exp();
                    return 2.0 * normal_cdf(r) - 1.0 - density;
                }
            };
            sum / std::f64::consts::FRAC_PI_2
        };
        let (mut low, mut high) = (0.0, std::f64::consts::FRAC_PI_2);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if shorter(middle) < share { low = middle } else { high = middle }
        }
        low.tan() * freedom.sqrt() / self.length_scale
    }
}

simd::vectorised! {
    /// Squared distances of (x, y) from `at`, turned and scaled.
    pub fn squares(at: [f64; 2], turn: [f64; 4], x: &[f64], y: &[f64], out: &mut [f64]) {
        for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
            let (dx, dy) = (x - at[0], y - at[1]);
            let along = turn[0] * dx + turn[1] * dy;
            let across = turn[2] * dy - turn[3] * dx;
            *out = along * along + across * across;
        }
    }
}

simd::vectorised! {
    /// Covariances at squared distances `r`, in place: ν = 1/2.
    pub fn half(sill: f64, r: &mut [f64]) {
        for r in r {
            *r = sill * simd::exp_f64(-r.sqrt());
        }
    }
}

simd::vectorised! {
    /// The same for ν = 3/2.
    pub fn three_halves(sill: f64, r: &mut [f64]) {
        for r in r {
            let u = (3.0 * *r).sqrt();
            *r = sill * ((1.0 + u) * simd::exp_f64(-u));
        }
    }
}

simd::vectorised! {
    /// The same for ν = 5/2.
    pub fn five_halves(sill: f64, r: &mut [f64]) {
        for r in r {
            let u = (5.0 * *r).sqrt();
            *r = sill * ((1.0 + u + u * u * (1.0 / 3.0)) * simd::exp_f64(-u));
        }
    }
}

simd::vectorised! {
    /// The same for ν = ∞.
    pub fn infinite(sill: f64, r: &mut [f64]) {
        for r in r {
            *r = sill * simd::exp_f64(-0.5 * *r);
        }
    }
}

fn tiny(smoothness: Smoothness) -> Box<dyn Kernel> {
    Box::new(Matern { smoothness, length_scale: 1.0, sill: 2.0, metric: Metric::Euclidean })
}

/// ν = 1/2.
pub const HALF: Entry = Entry {
    name: "matern-1/2",
    about: "exponential: continuous, rough (Rasmussen & Williams 2006, eq. 4.18)",
    tiny: || tiny(Smoothness::Half),
    at_length_scale: Some(0.367_879_441_171_442_33),
};
/// ν = 3/2.
pub const THREE_HALVES: Entry = Entry {
    name: "matern-3/2",
    about: "differentiable once (Rasmussen & Williams 2006, eq. 4.17)",
    tiny: || tiny(Smoothness::ThreeHalves),
    at_length_scale: Some(0.483_357_724_596_507_7),
};
/// ν = 5/2.
pub const FIVE_HALVES: Entry = Entry {
    name: "matern-5/2",
    about: "differentiable twice (Rasmussen & Williams 2006, eq. 4.17)",
    tiny: || tiny(Smoothness::FiveHalves),
    at_length_scale: Some(0.523_994_108_831_820_5),
};
/// ν = ∞.
pub const SQUARED_EXPONENTIAL: Entry = Entry {
    name: "squared-exponential",
    about: "Gaussian bell, endlessly smooth (Rasmussen & Williams 2006, eq. 4.9)",
    tiny: || tiny(Smoothness::Infinite),
    at_length_scale: Some(0.606_530_659_712_633_4),
};
