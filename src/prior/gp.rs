//! Gaussian-process surfaces with random smoothness, length scale, sill, nugget and direction.
//!
//! Rough (exponential) fields are as likely as smooth ones: priors that know only smooth fields
//! lose badly on real surveys. Length scales are in region units, where the region's longer
//! half-side is 1; the Matérn argument is √(2ν)·r/ℓ.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    Entry, Prior, Rule, Surface,
    hyper::{Law, Named, check_share},
    zones::Zones,
};
use crate::{
    error::{Error, Result},
    kernel::{self, Change, Kernel, Matern, Metric, Periodic, Product, Smoothness, SpaceTime, Sum},
    linalg, registry,
    rng::Stream,
    settings,
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "gp",
    about: "Gaussian process: Matérn 1/2…∞, periodic, sums, products, anisotropy, nugget",
    build,
    tiny: "length_scale = { uniform = [0.2, 0.6] }\nsill_sd = 1.3\nnugget_sd = 0.4\nmean = -0.5\n\
        nugget_absent = 0.0\nsum = 0.0\nproduct = 0.0\nanisotropic = 0.0\nkernels = { \"matern-3/2\" = 1 }",
};

/// Settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gp {
    /// Relative chances of the kernels, by registered name.
    pub kernels: BTreeMap<String, f64>,
    /// Length scale, region units.
    pub length_scale: Law,
    /// Period of periodic parts, region units.
    pub period: Law,
    /// Standard deviation of the surface, link scale.
    pub sill_sd: Law,
    /// Standard deviation of the village effect or noise, link scale.
    pub nugget_sd: Law,
    /// Nugget given relative to the surface's sd instead of on its own.
    pub nugget_relative: bool,
    /// Chance that there is no nugget at all.
    pub nugget_absent: f64,
    /// Mean of the surface, link scale.
    pub mean: Law,
    /// Chance of a second, independent surface added.
    pub sum: f64,
    /// Chance of a periodic factor.
    pub product: f64,
    /// Chance of a slow trend across the region: one more squared exponential surface.
    pub trend: f64,
    /// Length scale of the trend, region units.
    pub trend_length: Law,
    /// Sd of the trend relative to the surface's.
    pub trend_sd: Law,
    /// Chance that the region falls into zones, each with a level of its own.
    pub zones: f64,
    /// Number of zones.
    pub zone_count: Law,
    /// Sd of the zones' levels relative to the surface's.
    pub zone_sd: Law,
    /// Chance of a preferred direction.
    pub anisotropic: f64,
    /// Ratio of the longer to the shorter length scale.
    pub anisotropy: Law,
    /// Where the design has times: length scale in time, of which the visits of a survey span 2.
    pub time_scale: Law,
    /// Share of the surface's variance that no time changes.
    pub static_share: Law,
    /// Chance that surfaces change smoothly, as a Matérn process of order 3/2 does, and not of order 1/2.
    pub time_smooth: f64,
}

impl Default for Gp {
    fn default() -> Self {
        let kernels = [
            ("matern-1/2", 4.0),
            ("matern-3/2", 3.0),
            ("matern-5/2", 2.0),
            ("squared-exponential", 1.0),
        ];
        Gp {
            kernels: kernels.map(|(k, w)| (k.to_string(), w)).into(),
            length_scale: Law::log_uniform(0.03, 2.0),
            period: Law::log_uniform(0.3, 2.0),
            sill_sd: Law::log_uniform(0.15, 2.5),
            nugget_sd: Law::log_uniform(0.05, 1.2),
            nugget_relative: false,
            nugget_absent: 0.1,
            mean: Law::Law(Named::Normal([-1.3, 1.7])),
            sum: 0.25,
            product: 0.02,
            trend: 0.0,
            trend_length: Law::log_uniform(2.0, 6.0),
            trend_sd: Law::log_uniform(0.5, 3.0),
            zones: 0.0,
            zone_count: Law::uniform(2.0, 8.0),
            zone_sd: Law::log_uniform(0.3, 2.0),
            anisotropic: 0.3,
            anisotropy: Law::log_uniform(1.0, 4.0),
            time_scale: Law::log_uniform(0.1, 10.0),
            static_share: Law::uniform(0.0, 1.0),
            time_smooth: 0.5,
        }
    }
}

fn build(table: &toml::Table) -> Result<Box<dyn Prior>> {
    let gp: Gp = settings::parse_table("[prior]", table)?;
    gp.length_scale.check("length_scale", true)?;
    gp.period.check("period", true)?;
    gp.sill_sd.check("sill_sd", true)?;
    if gp.nugget_sd != Law::Fixed(0.0) {
        gp.nugget_sd.check("nugget_sd", true)?;
    }
    gp.mean.check("mean", false)?;
    gp.anisotropy.check("anisotropy", true)?;
    gp.time_scale.check("time_scale", true)?;
    gp.static_share.check_share("static_share")?;
    gp.trend_length.check("trend_length", true)?;
    gp.trend_sd.check("trend_sd", true)?;
    gp.zone_count.check("zone_count", true)?;
    gp.zone_sd.check("zone_sd", true)?;
    for (name, share) in [
        ("nugget_absent", gp.nugget_absent),
        ("sum", gp.sum),
        ("product", gp.product),
        ("trend", gp.trend),
        ("zones", gp.zones),
        ("anisotropic", gp.anisotropic),
        ("time_smooth", gp.time_smooth),
    ] {
        check_share(name, share)?;
    }
    let known: Vec<String> = BASES.iter().map(|(name, _)| name.to_string()).collect();
    for (name, weight) in &gp.kernels {
        if !known.contains(name) {
            return Err(Error::Unknown {
                kind: "kernel",
                name: name.clone(),
                nearest: registry::nearest(name, &known),
                known,
            });
        }
        if *weight < 0.0 || !weight.is_finite() {
            return Err(Error::input(format!("the weight of kernel `{name}` is negative"))
                .fact("written", weight)
                .try_this("weights are relative chances, 0 or more"));
        }
    }
    if gp.kernels.values().sum::<f64>() <= 0.0 {
        return Err(Error::input("no kernel has a positive weight")
            .try_this("write e.g. kernels = { \"matern-1/2\" = 1 }"));
    }
    Ok(Box::new(gp))
}

/// Kernels that can be drawn on their own; `None` is the periodic one.
const BASES: [(&str, Option<Smoothness>); 5] = [
    ("matern-1/2", Some(Smoothness::Half)),
    ("matern-3/2", Some(Smoothness::ThreeHalves)),
    ("matern-5/2", Some(Smoothness::FiveHalves)),
    ("squared-exponential", Some(Smoothness::Infinite)),
    ("periodic", None),
];

impl Gp {
    fn base(&self, sill: f64, rng: &mut Stream) -> Box<dyn Kernel> {
        let mut left = rng.unit() * self.kernels.values().sum::<f64>();
        let mut chosen = self.kernels.keys().next_back().expect("checked");
        for (name, weight) in &self.kernels {
            if left < *weight {
                chosen = name;
                break;
            }
            left -= weight;
        }
        let length_scale = self.length_scale.draw(rng);
        let smoothness = BASES.iter().find(|(n, _)| n == chosen).and_then(|(_, s)| *s);
        let Some(smoothness) = smoothness else {
            return Box::new(Periodic { period: self.period.draw(rng), length_scale, sill });
        };
        let metric = if rng.unit() < self.anisotropic {
            let angle = rng.uniform(0.0, std::f64::consts::PI);
            Metric::Anisotropic { angle, ratio: self.anisotropy.draw(rng) }
        } else {
            Metric::Euclidean
        };
        Box::new(Matern { smoothness, length_scale, sill, metric })
    }

    /// A kernel whose stationary part has sill 1; trend and zones come on top.
    fn shape(&self, rng: &mut Stream) -> Box<dyn Kernel> {
        let mut parts = vec![self.texture(rng)];
        // No draw where there is no chance, so that older recipes keep their streams.
        if self.trend > 0.0 && rng.unit() < self.trend {
            parts.push(Box::new(Matern {
                smoothness: Smoothness::Infinite,
                length_scale: self.trend_length.draw(rng),
                sill: self.trend_sd.draw(rng).powi(2),
                metric: Metric::Euclidean,
            }));
        }
        if self.zones > 0.0 && rng.unit() < self.zones {
            let count = self.zone_count.draw(rng).round() as usize;
            let sill = self.zone_sd.draw(rng).powi(2);
            parts.push(Box::new(Zones::draw(count, sill, rng)));
        }
        match parts.len() {
            1 => parts.remove(0),
            _ => Box::new(Sum(parts)),
        }
    }

    /// The stationary part, sill 1.
    fn texture(&self, rng: &mut Stream) -> Box<dyn Kernel> {
        if rng.unit() < self.sum {
            let share = rng.uniform(0.1, 0.9);
            return Box::new(Sum(vec![self.base(share, rng), self.base(1.0 - share, rng)]));
        }
        if rng.unit() < self.product {
            let periodic = Periodic { period: self.period.draw(rng), length_scale: 1.0, sill: 1.0 };
            return Box::new(Product(vec![self.base(1.0, rng), Box::new(periodic)]));
        }
        self.base(1.0, rng)
    }

    /// Sill, nugget and mean for a shape.
    fn levels(&self, rng: &mut Stream) -> (f64, f64, f64) {
        let sd = self.sill_sd.draw(rng);
        let mut nugget = self.nugget_sd.draw(rng) * if self.nugget_relative { sd } else { 1.0 };
        if rng.unit() < self.nugget_absent {
            nugget = 0.0;
        }
        (sd * sd, nugget * nugget, self.mean.draw(rng))
    }
}

/// A kernel of sill 1 shared by several rules, times a sill.
#[derive(Debug, Clone)]
struct Scaled {
    shape: Arc<dyn Kernel>,
    sill: f64,
}

impl Kernel for Scaled {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        self.sill * self.shape.covariance(a, b)
    }
    fn sill(&self) -> f64 {
        self.sill * self.shape.sill()
    }
    fn matern(&self) -> Option<Matern> {
        let shape = self.shape.matern()?;
        Some(Matern { sill: self.sill * shape.sill, ..shape })
    }
    fn unstretch(&self) -> Option<[f64; 4]> {
        self.shape.unstretch()
    }
    fn change(&self) -> Option<Change> {
        self.shape.change()
    }
}

impl Prior for Gp {
    fn rule(&self, rng: &mut Stream) -> Rule {
        let shape: Arc<dyn Kernel> = self.shape(rng).into();
        let (sill, nugget, mean) = self.levels(rng);
        Rule { kernel: Some(Arc::new(Scaled { shape, sill })), nugget, mean, class: None }
    }

    /// The rules share one kernel up to the sill, so one factorisation serves them all.
    fn surfaces(
        &self,
        xy: &[[f64; 2]],
        count: usize,
        rng: &mut Stream,
    ) -> Result<Vec<(Rule, Surface)>> {
        let shape: Arc<dyn Kernel> = self.shape(rng).into();
        self.drawn(&shape, kernel::gram(&shape, xy), count, rng)
    }

    fn surfaces_in_time(
        &self,
        xy: &[[f64; 2]],
        t: &[f64],
        count: usize,
        rng: &mut Stream,
    ) -> Result<Vec<(Rule, Surface)>> {
        let space: Arc<dyn Kernel> = self.shape(rng).into();
        let smooth = rng.unit() < self.time_smooth;
        let over = SpaceTime {
            space,
            smoothness: if smooth { Smoothness::ThreeHalves } else { Smoothness::Half },
            time_scale: self.time_scale.draw(rng),
            static_share: self.static_share.draw(rng).clamp(0.0, 1.0),
        };
        let mut gram = kernel::gram(&over.space, xy);
        for j in 0..xy.len() {
            for (c, t_i) in gram.col_as_slice_mut(j)[j..].iter_mut().zip(&t[j..]) {
                *c *= over.over(t_i - t[j]);
            }
        }
        let shape: Arc<dyn Kernel> = Arc::new(over);
        self.drawn(&shape, gram, count, rng)
    }
}

impl Gp {
    /// Surfaces of one shape, whose covariances are the lower triangle of `gram`.
    fn drawn(
        &self,
        shape: &Arc<dyn Kernel>,
        gram: faer::Mat<f64>,
        count: usize,
        rng: &mut Stream,
    ) -> Result<Vec<(Rule, Surface)>> {
        let n = gram.nrows();
        let factor = linalg::Cholesky::factor(gram)?;
        let draw = |rng: &mut Stream| {
            let (sill, nugget, mean) = self.levels(rng);
            let sd = sill.sqrt();
            let latent: Vec<f64> =
                factor.colour(&rng.normals(n)).iter().map(|v| mean + sd * v).collect();
            let noisy = latent.iter().map(|v| v + nugget.sqrt() * rng.normal()).collect();
            let kernel: Arc<dyn Kernel> = Arc::new(Scaled { shape: shape.clone(), sill });
            let rule = Rule { kernel: Some(kernel), nugget, mean, class: None };
            (rule, Surface { latent, noisy })
        };
        Ok((0..count).map(|_| draw(rng)).collect())
    }
}
