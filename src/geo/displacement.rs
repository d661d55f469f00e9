//! How far recorded places lie from the true ones: surveys that move their sites to keep people unknown.
//!
//! Source: Burgert et al. (2013), DHS Spatial Analysis Reports 7, for the rule of the Demographic and
//! Health Surveys. What is left out of it: a DHS site never leaves its district.

use std::{fmt, str::FromStr};

use crate::{
    error::{Error, Result},
    rng::Stream,
};

/// A law of displacements: in a direction of equal chances, by a distance of equal chances from 0 up
/// to a reach; or a mixture of such.
#[derive(Debug, Clone, PartialEq)]
pub struct Law(Vec<(f64, f64)>);

impl Law {
    /// Any distance up to `reach`.
    pub fn up_to(reach: f64) -> Self {
        Law(vec![(1.0, reach)])
    }

    /// The DHS rule for an urban site: up to 2 km.
    pub fn dhs_urban() -> Self {
        Law::up_to(2.0)
    }

    /// The DHS rule for a rural site: up to 5 km, and one in a hundred up to 10 km.
    pub fn dhs_rural() -> Self {
        Law(vec![(0.99, 5.0), (0.01, 10.0)])
    }

    /// The same law in another unit of length, of which the old one holds `factor`.
    pub fn scaled(&self, factor: f64) -> Self {
        Law(self.0.iter().map(|(share, reach)| (*share, reach * factor)).collect())
    }

    /// The farthest it moves a site.
    pub fn reach(&self) -> f64 {
        self.0.iter().map(|(_, reach)| *reach).fold(0.0, f64::max)
    }

    /// One displacement.
    pub fn draw(&self, rng: &mut Stream) -> [f64; 2] {
        let mut left = rng.unit();
        let chosen = self.0.iter().find(|(share, _)| {
            left -= share;
            left < 0.0
        });
        let (_, reach) = chosen.or(self.0.last()).copied().unwrap_or((1.0, 0.0));
        let (distance, angle) = (reach * rng.unit(), std::f64::consts::TAU * rng.unit());
        [distance * angle.cos(), distance * angle.sin()]
    }

    /// Displacements ((dx, dy), weight) that stand for all of them in an average of a function that
    /// is the same on both sides of the first axis: dy ≥ 0. The weights add up to 1.
    ///
    /// ```
    /// use isopleth::geo::displacement::Law;
    /// let square: f64 = Law::dhs_rural().nodes().iter().map(|([x, y], w)| w * (x * x + y * y)).sum();
    /// assert!((square - (0.99 * 25.0 + 0.01 * 100.0) / 3.0).abs() < 1e-9);
    /// ```
    pub fn nodes(&self) -> Vec<([f64; 2], f64)> {
        // Gauss–Legendre on (0, 1), exact for polynomials to degree 15.
        const RULE: [(f64, f64); 4] = [
            (0.019_855_071_751_231_884, 0.050_614_268_145_188_13),
            (0.101_666_761_293_186_64, 0.111_190_517_226_687_24),
            (0.237_233_795_041_835_5, 0.156_853_322_938_943_63),
            (0.408_282_678_752_175_1, 0.181_341_891_689_181),
        ];
        const ANGLES: usize = 16;
        let mut nodes = Vec::new();
        for (share, reach) in &self.0 {
            for (at, weight) in RULE.iter().flat_map(|(x, w)| [(*x, *w), (1.0 - x, *w)]) {
                for k in 0..ANGLES {
                    let angle = std::f64::consts::PI * (k as f64 + 0.5) / ANGLES as f64;
                    let place = [reach * at * angle.cos(), reach * at * angle.sin()];
                    nodes.push((place, share * weight / ANGLES as f64));
                }
            }
        }
        nodes
    }
}

/// The displacement of every site of a survey.
#[derive(Debug, Clone, PartialEq)]
pub struct Displacement {
    /// The laws that sites follow, in km; or in model units, once [`Displacement::scaled`].
    pub laws: Vec<Law>,
    /// Which of them each site follows, `[site]`.
    pub of: Vec<usize>,
}

impl Displacement {
    /// The sites at these positions, in this order.
    pub fn subset(&self, sites: &[usize]) -> Self {
        let of = sites.iter().map(|i| self.of[*i]).collect();
        Displacement { laws: self.laws.clone(), of }
    }

    /// In another unit of length, of which the old one holds `factor`.
    pub fn scaled(&self, factor: f64) -> Self {
        let laws = self.laws.iter().map(|law| law.scaled(factor)).collect();
        Displacement { laws, of: self.of.clone() }
    }
}

/// In words, with lengths in km.
impl fmt::Display for Displacement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = self.laws.iter().enumerate().filter_map(|(i, law)| {
            let sites = self.of.iter().filter(|of| **of == i).count();
            let parts = law.0.iter().map(|(share, reach)| match *share < 1.0 {
                true => format!("{reach} km ({} %)", 100.0 * share),
                false => format!("{reach} km"),
            });
            let parts = parts.collect::<Vec<_>>().join(" or ");
            (sites > 0).then(|| format!("{sites} sites by up to {parts}"))
        });
        write!(f, "{}", each.collect::<Vec<_>>().join(", "))
    }
}

/// What `--displacement` says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Every site by up to so many km.
    UpTo(f64),
    /// The rule of the Demographic and Health Surveys, by whether a site is urban.
    Dhs,
}

impl FromStr for Rule {
    type Err = Error;

    /// ```
    /// use isopleth::geo::displacement::Rule;
    /// assert_eq!("5".parse::<Rule>()?, Rule::UpTo(5.0));
    /// assert_eq!("2.5km".parse::<Rule>()?, Rule::UpTo(2.5));
    /// assert_eq!("DHS".parse::<Rule>()?, Rule::Dhs);
    /// assert!("5000m".parse::<Rule>().is_err());
    /// # Ok::<(), isopleth::Error>(())
    /// ```
    fn from_str(text: &str) -> Result<Self> {
        let plain = text.trim().to_lowercase();
        if plain == "dhs" {
            return Ok(Rule::Dhs);
        }
        let number = plain.strip_suffix("km").unwrap_or(&plain).trim_end();
        match number.parse::<f64>() {
            Ok(km) if km > 0.0 && km.is_finite() => Ok(Rule::UpTo(km)),
            _ => Err(Error::input("a displacement is a distance in km, or dhs")
                .fact("--displacement", text)
                .try_this("write --displacement 5 for up to 5 km, or --displacement dhs")),
        }
    }
}

/// Whether a cell of the column of `--urban-rural` says urban; nothing if it says neither.
///
/// ```
/// use isopleth::geo::displacement::urban;
/// assert_eq!(["U", "rural", "1", "2.0", "?"].map(urban), [
///     Some(true), Some(false), Some(true), Some(false), None
/// ]);
/// ```
pub fn urban(cell: &str) -> Option<bool> {
    match cell.trim().to_lowercase().as_str() {
        "u" | "urban" | "1" | "1.0" => Some(true),
        "r" | "rural" | "2" | "2.0" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Draws have the law's own distances and no direction.
    #[test]
    fn draws_follow_the_law() {
        let mut rng = Stream::new(1, "displacement", 0);
        let law = Law::dhs_rural();
        let n = 200_000;
        let draws: Vec<[f64; 2]> = (0..n).map(|_| law.draw(&mut rng)).collect();
        let far: Vec<f64> = draws.iter().map(|[x, y]| x.hypot(*y)).collect();
        let share = |d: f64| far.iter().filter(|far| **far > d).count() as f64 / n as f64;
        assert!(far.iter().all(|far| *far <= 10.0));
        assert!((share(5.0) - 0.005).abs() < 0.001, "{}", share(5.0));
        assert!((share(2.5) - (0.99 * 0.5 + 0.01 * 0.75)).abs() < 0.005, "{}", share(2.5));
        let mean = draws.iter().map(|[x, _]| x).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.03, "{mean}");
    }

    #[test]
    fn a_displacement_says_what_it_does() {
        let laws = vec![Law::dhs_urban(), Law::dhs_rural()];
        let said = Displacement { laws, of: vec![0, 1, 1] }.to_string();
        assert_eq!(said, "1 sites by up to 2 km, 2 sites by up to 5 km (99 %) or 10 km (1 %)");
    }
}
