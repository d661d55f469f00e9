//! What a case is: its surface, where its sites lie, how many of them, and what is counted there.
//! Registry: [`CASES`].

use serde::Deserialize;

use crate::{
    error::{Error, Result},
    kernel::{Kernel, Local, Matern, Metric, Smoothness, Varying},
    likelihood::{self, Likelihood},
    registry::Named,
    settings,
    task::gaps::Gaps,
};

/// A registered case.
#[derive(Debug)]
pub struct Entry {
    /// The name that the command takes.
    pub name: &'static str,
    /// Its file.
    text: &'static str,
}

macro_rules! case {
    ($name:literal) => {
        Entry { name: $name, text: include_str!(concat!("cases/", $name, ".toml")) }
    };
}

/// Every case.
pub const CASES: &[Entry] = &[
    case!("lattice-exponential"),
    case!("lattice-matern"),
    case!("lattice-swaths"),
    case!("lattice-anisotropic"),
    case!("lattice-varying"),
    case!("continent"),
    case!("individuals"),
    case!("growing-region"),
    case!("growing-density"),
];

impl Named for Entry {
    fn name(&self) -> &str {
        self.name
    }
    /// The first line of its file.
    fn about(&self) -> &str {
        self.text.trim_start_matches("about = \"").split('"').next().unwrap_or_default()
    }
}

/// A case as its file says it. Lengths are in region units: half the longer side is 1, unless the
/// region grows.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// One line on it.
    pub about: String,
    /// How observations read the surface, by registered name.
    #[serde(default = "usual_likelihood")]
    pub likelihood: String,
    /// Context sizes.
    pub contexts: Vec<usize>,
    /// Fewest and most people tested at a site, where people are.
    pub trials: Option<[u64; 2]>,
    /// Neighbours that the floor kriges from.
    #[serde(default = "usual_near")]
    pub near: usize,
    /// The law of the surface.
    pub surface: Surface,
    /// Where sites and targets lie.
    pub sites: Layout,
}

fn usual_likelihood() -> String {
    "gaussian".into()
}

fn usual_near() -> usize {
    160
}

/// The law of a surface, link scale.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Surface {
    /// Order ν of its Matérn kernel.
    pub smoothness: Smoothness,
    /// Length scale ℓ, region units; along `angle` where it has a direction.
    pub length_scale: f64,
    /// Partial sill.
    pub sill: f64,
    /// Nugget.
    pub nugget: f64,
    /// Mean in the middle of the region.
    #[serde(default)]
    pub mean: f64,
    /// How much the mean rises per region unit eastwards and northwards.
    #[serde(default)]
    pub trend: [f64; 2],
    /// Length scale along ÷ across.
    #[serde(default = "one")]
    pub ratio: f64,
    /// Direction of slowest change, degrees anticlockwise from east.
    #[serde(default)]
    pub angle: f64,
    /// Length scale at the eastern edge ÷ at the western one; `length_scale` is that in the middle.
    #[serde(default = "one")]
    pub varies: f64,
}

fn one() -> f64 {
    1.0
}

/// Where sites and targets lie.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Layout {
    /// The nodes of a lattice; targets are those under the gaps.
    Lattice {
        /// Rows ÷ columns.
        aspect: f64,
        /// What hides nodes.
        gaps: Gaps,
        /// Share of the nodes that is hidden.
        hidden: f64,
    },
    /// Clustered sites on a continent; targets are the pixels of a square raster over all of it.
    Continent {
        /// Pixels, to the nearest square number.
        pixels: usize,
        /// Pixels on land that are scored, at most.
        scored: usize,
    },
    /// Sites and targets anywhere in a square.
    Square {
        /// Targets.
        targets: usize,
        /// Sites in the square [−1, 1]²: with more of them the region grows. Left out, the region stays
        /// that square.
        per_square: Option<usize>,
    },
}

impl Case {
    /// Reads a registered case.
    ///
    /// # Errors
    /// [`Error::Input`] if its file is broken: a test says so first.
    pub fn of(entry: &Entry) -> Result<Self> {
        let table: toml::Table = entry.text.parse().map_err(|e: toml::de::Error| {
            Error::input("a case of the benchmark of scale is broken")
                .fact("case", entry.name)
                .fact("reason", e.message())
        })?;
        settings::parse_table(entry.name, &table)
    }

    /// How observations read the surface.
    ///
    /// # Errors
    /// [`Error::Unknown`] if its file is broken.
    pub fn likelihood(&self) -> Result<&'static dyn Likelihood> {
        likelihood::find(&self.likelihood)
    }
}

impl Surface {
    /// The covariance, in region units.
    pub fn kernel(&self) -> Box<dyn Kernel> {
        let Surface { smoothness, length_scale, sill, ratio, varies, .. } = *self;
        let angle = self.angle.to_radians();
        if varies == 1.0 {
            let metric = match ratio == 1.0 {
                true => Metric::Euclidean,
                false => Metric::Anisotropic { angle, ratio },
            };
            return Box::new(Matern { smoothness, length_scale, sill, metric });
        }
        let rise = 0.5 * varies.ln();
        Box::new(Varying::new(smoothness, sill, move |s| Local {
            length_scale: length_scale * (rise * s[0]).exp(),
            ratio,
            angle,
            sill,
        }))
    }

    /// The mean at a place.
    pub fn mean(&self, [x, y]: [f64; 2]) -> f64 {
        self.mean + self.trend[0] * x + self.trend[1] * y
    }
}
