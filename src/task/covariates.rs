//! Covariates in simulated surveys: fields of the user's own rasters, and effects drawn for each survey.
//!
//! A region of training is laid somewhere on the rasters, any way up, and every site has what they say
//! there: covariates have the spatial structure that they have in the world, which a prior would have to
//! guess. What they do is drawn: a line for each, whose slope changes at its knots; a smooth curve
//! on top for some; and for some a smooth surface over all of them together, which is where they interact.
//! Each is absent from some surveys. A network that sees the covariates and not the effects
//! learns to integrate over them.
//!
//! All of it is Gaussian given a survey's sds and lengths: `x·β` with independent β, and squared
//! exponential processes over standardised covariates, drawn by waves (Rahimi & Recht 2007). Its
//! covariance is what the exact Gaussian process of a task is told.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    geo::covariates::{Covariates, Design, Feature, Lattice, Source, Spec},
    kernel::Kernel,
    prior::hyper::{Law, check_share},
    rng::Stream,
};

/// Waves that a curve or surface is made of.
const WAVES: usize = 64;

/// The `[covariates]` table of a recipe.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// As behind `--covariate`: "elevation=elevation.tif,knot:650"; files beside the recipe.
    pub terms: Vec<String>,
    /// West, south, east, north in degrees: where regions are laid; all of the first raster unless said.
    pub window: Option<[f64; 4]>,
    /// Places at which the rasters are read, about.
    pub nodes: usize,
    /// Side of a region, km; a quarter of the window's shorter side to all of it unless said.
    pub side: Option<Law>,
    /// Sd of a survey's coefficients: link scale per sd of a covariate in the region.
    pub effect_sd: Law,
    /// Chance that a covariate does nothing in a survey.
    pub absent: f64,
    /// Chance that one that acts has a curve on top of its line.
    pub bent: f64,
    /// Sd of curves, and of what covariates do together, link scale.
    pub bent_sd: Law,
    /// Length scale of curves in sds of the covariate.
    pub bend: Law,
    /// Chance that covariates interact, where there are several.
    pub interact: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            terms: Vec::new(),
            window: None,
            nodes: 60_000,
            side: None,
            effect_sd: Law::log_uniform(0.1, 1.5),
            absent: 0.25,
            bent: 0.4,
            bent_sd: Law::log_uniform(0.1, 1.0),
            bend: Law::log_uniform(0.5, 2.0),
            interact: 0.2,
        }
    }
}

impl Settings {
    /// The terms, read.
    ///
    /// # Errors
    /// [`Error::Input`] for what no network can be trained on.
    pub fn specs(&self) -> Result<Vec<Spec>> {
        let specs: Vec<Spec> = self.terms.iter().map(|text| text.parse()).collect::<Result<_>>()?;
        let refuse = |what: &str, spec: &Spec, help: &str| {
            Err(Error::input(what).fact("covariate", spec).try_this(help))
        };
        for (i, spec) in specs.iter().enumerate() {
            if spec.categorical {
                return refuse(
                    "a network is not trained on categories: surveys differ in which they have",
                    spec,
                    "give a raster of numbers, such as the share of a class around a place; or use \
                     a model trained without covariates, which takes categories as they are",
                );
            }
            if specs[..i].iter().any(|other| other.name == spec.name) {
                return refuse("two covariates have the same name", spec, "give each its own name");
            }
            if !matches!(spec.source, Source::Raster { .. }) {
                return refuse("training regions are cut from rasters", spec, "name a raster");
            }
        }
        if specs.is_empty() {
            return Err(Error::input("[covariates] of the recipe names no covariate")
                .try_this("write terms = [\"elevation=elevation.tif\"], or leave the table out"));
        }
        Ok(specs)
    }

    fn check(&self) -> Result<()> {
        self.effect_sd.check("effect_sd", true)?;
        self.bent_sd.check("bent_sd", true)?;
        self.bend.check("bend", true)?;
        self.side.iter().try_for_each(|side| side.check("side", true))?;
        for (name, share) in
            [("absent", self.absent), ("bent", self.bent), ("interact", self.interact)]
        {
            check_share(name, share)?;
        }
        if !(100..=1_000_000).contains(&self.nodes) {
            return Err(Error::input("`nodes` under [covariates] is out of range")
                .fact("nodes", self.nodes)
                .try_this("give 100 to 1000000; 60000 is the default"));
        }
        Ok(())
    }
}

/// The law of covariates and of what they do.
pub struct Effects {
    settings: Settings,
    specs: Vec<Spec>,
    lattice: Option<Arc<Lattice>>,
}

/// The covariates of one simulated survey.
#[derive(Debug, Clone)]
pub struct Seen {
    /// What they are of.
    pub specs: Vec<Spec>,
    /// `[covariate][site]`, in the covariate's unit.
    pub values: Vec<Vec<f64>>,
    /// What they do.
    pub acting: Acting,
}

/// How much covariates do in one survey: the law of their effect at standardised features.
#[derive(Debug, Clone)]
pub struct Acting {
    /// By the region's places: what a coefficient is per sd of.
    design: Arc<Design>,
    /// Sd of each feature's coefficient; 0 for one that does nothing.
    slopes: Vec<f64>,
    /// Curves and surfaces: over which features, with what sd and length scale.
    bends: Vec<(Vec<usize>, f64, f64)>,
}

impl Effects {
    /// From a recipe's table; rasters come with [`Effects::on`].
    ///
    /// # Errors
    /// [`Error::Input`] for settings that make none.
    pub fn new(settings: Settings) -> Result<Self> {
        settings.check()?;
        let specs = settings.specs()?;
        Ok(Effects { settings, specs, lattice: None })
    }

    /// The same with rasters to lay regions on.
    ///
    /// # Errors
    /// [`Error::Input`] if the lattice is of other covariates.
    pub fn on(self, lattice: Arc<Lattice>) -> Result<Self> {
        if lattice.head.specs != self.specs {
            return Err(Error::input("the kept covariates are not those of the recipe").try_this(
                "make them again: `isopleth sample` on the recipe, where the rasters are",
            ));
        }
        Ok(Effects { lattice: Some(lattice), ..self })
    }

    /// What the covariates are.
    pub fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// The rasters that regions are laid on.
    pub fn lattice(&self) -> Option<&Arc<Lattice>> {
        self.lattice.as_ref()
    }

    /// Features of every site: a line for each covariate and one for each of its knots.
    pub fn features(&self) -> usize {
        self.specs.iter().map(|spec| 1 + spec.knots.len()).sum()
    }

    /// Covariates at the sites of a region, `[covariate][site]`: the region is laid anew.
    ///
    /// # Errors
    /// [`Error::Input`] where the rasters have not been read.
    pub fn values(&self, xy: &[[f64; 2]], rng: &mut Stream) -> Result<Vec<Vec<f64>>> {
        let Some(lattice) = &self.lattice else {
            return Err(Error::input(
                "surveys with covariates are drawn on rasters, and none were read",
            )
            .try_this(
                "read the recipe from its file, beside its rasters or what was kept of them",
            ));
        };
        let [shorter, longer] = lattice.sides_km();
        let side = self.settings.side.unwrap_or(Law::log_uniform(0.25 * shorter, shorter));
        let side = side.draw(rng).min(longer);
        let region = lattice.region(side, rng);
        Ok(lattice.at(&region, xy))
    }

    /// What covariates of these `values` `[covariate][site]` do in one survey.
    pub fn acting(&self, values: &[Vec<f64>], rng: &mut Stream) -> Acting {
        let words = vec![Vec::new(); self.specs.len()];
        let covariates = Covariates { specs: self.specs.clone(), values: values.to_vec(), words };
        let design = Design::fit(&covariates);
        let (mut slopes, mut bends, mut acting) = (Vec::new(), Vec::new(), Vec::new());
        for term in &design.terms {
            let line = slopes.len();
            let acts = rng.unit() >= self.settings.absent;
            let sd = if acts { self.settings.effect_sd.draw(rng) } else { 0.0 };
            slopes.extend(term.features.iter().map(|_| sd));
            if acts {
                acting.push(line);
                if rng.unit() < self.settings.bent {
                    let (sd, length) =
                        (self.settings.bent_sd.draw(rng), self.settings.bend.draw(rng));
                    bends.push((vec![line], sd, length));
                }
            }
        }
        if acting.len() > 1 && rng.unit() < self.settings.interact {
            let length = self.settings.bend.draw(rng) * (acting.len() as f64).sqrt();
            bends.push((acting, self.settings.bent_sd.draw(rng), length));
        }
        Acting { design: Arc::new(design), slopes, bends }
    }
}

impl Acting {
    /// Features of places, standardised in the region: `[place][feature]`.
    fn features(&self, values: &[Vec<f64>]) -> Result<Vec<Vec<f64>>> {
        let tensor = self.design.tensor(values, &Device::Cpu)?.squeeze(0)?;
        Ok(tensor.to_dtype(candle_core::DType::F64)?.to_vec2()?)
    }

    /// One effect at every place of `values` `[covariate][place]`, link scale.
    ///
    /// # Errors
    /// As [`Design::tensor`].
    pub fn draw(&self, values: &[Vec<f64>], rng: &mut Stream) -> Result<Vec<f64>> {
        let features = self.features(values)?;
        let beta: Vec<f64> = self.slopes.iter().map(|sd| sd * rng.normal()).collect();
        let mut effect: Vec<f64> =
            features.iter().map(|z| z.iter().zip(&beta).map(|(z, beta)| z * beta).sum()).collect();
        for (over, sd, length) in &self.bends {
            for _ in 0..WAVES {
                let wave: Vec<f64> = over.iter().map(|_| rng.normal() / length).collect();
                let (a, b) = (rng.normal(), rng.normal());
                for (effect, z) in effect.iter_mut().zip(&features) {
                    let angle: f64 = over.iter().zip(&wave).map(|(i, w)| z[*i] * w).sum();
                    *effect += sd * (a * angle.cos() + b * angle.sin()) / (WAVES as f64).sqrt();
                }
            }
        }
        Ok(effect)
    }

    /// Covariance of the effect between two places by their features in the region.
    fn covariance(&self, x: &[f64], z: &[f64]) -> f64 {
        let lines: f64 =
            self.slopes.iter().zip(x.iter().zip(z)).map(|(sd, (x, z))| sd * sd * x * z).sum();
        let bends = self.bends.iter().map(|(over, sd, length)| {
            let apart: f64 = over.iter().map(|i| (x[*i] - z[*i]).powi(2)).sum();
            sd * sd * (-0.5 * apart / (length * length)).exp()
        });
        lines + bends.sum::<f64>()
    }

    /// Sd of all effects together where every feature is one sd from its mean: 0 where nothing acts.
    pub fn sd(&self) -> f64 {
        let slopes = self.slopes.iter().map(|sd| sd * sd).sum::<f64>();
        (slopes + self.bends.iter().map(|(_, sd, _)| sd * sd).sum::<f64>()).sqrt()
    }
}

impl Seen {
    /// Features as a frame makes them, standardised at the `context` first sites: `[1, site, feature]`;
    /// and the kernel of a survey's surface with its effects, whose sites are coordinates of
    /// `surface`'s, in its frame, with such features behind them; `scale` is one link unit² there.
    ///
    /// # Errors
    /// As [`Design::tensor`].
    pub fn framed(&self, context: usize, scale: f64) -> Result<(Tensor, Framed)> {
        let first = self.values.iter().map(|v| v[..context.min(v.len())].to_vec()).collect();
        let words = vec![Vec::new(); self.specs.len()];
        let here = Covariates { specs: self.specs.clone(), values: first, words };
        let design = Design::fit(&here);
        let features = |design: &Design| -> Vec<[f64; 2]> {
            let of = |feature: &Feature| match feature {
                Feature::Line { mean, sd } | Feature::Knot { mean, sd, .. } => [*mean, *sd],
                Feature::Level { .. } | Feature::Unseen => [0.0, 1.0],
            };
            design.terms.iter().flat_map(|term| term.features.iter().map(of)).collect()
        };
        let pairs = features(&design).into_iter().zip(features(&self.acting.design));
        let back = pairs.map(|([m, s], [mean, sd])| [(m - mean) / sd, s / sd]).collect();
        let x = design.tensor(&self.values, &Device::Cpu)?;
        Ok((x, Framed { acting: self.acting.clone(), back, scale }))
    }
}

/// What covariates do, seen from a survey's frame.
#[derive(Debug, Clone)]
pub struct Framed {
    acting: Acting,
    /// From features of the frame to those of the region: `[a, b]` of a + b z.
    back: Vec<[f64; 2]>,
    scale: f64,
}

/// A surface and what covariates do: sites are coordinates, the time where the surface changes with it, and
/// features behind them.
#[derive(Debug)]
pub struct Both {
    /// The surface's.
    pub surface: Arc<dyn Kernel>,
    /// The effects'.
    pub effects: Framed,
}

impl Kernel for Both {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        let Framed { acting, back, scale } = &self.effects;
        let own = if self.surface.change().is_some() { 3 } else { 2 };
        let ((a, x), (b, z)) = (a.split_at(a.len().min(own)), b.split_at(b.len().min(own)));
        let surface = self.surface.covariance(a, b);
        if x.len() != back.len() || z.len() != back.len() {
            return surface;
        }
        let region =
            |x: &[f64]| -> Vec<f64> { x.iter().zip(back).map(|(x, [a, b])| a + b * x).collect() };
        surface + scale * acting.covariance(&region(x), &region(z))
    }

    /// Of the surface alone: what covariates do is nowhere the same.
    fn sill(&self) -> f64 {
        self.surface.sill()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acting(slopes: &[f64], bends: Vec<(Vec<usize>, f64, f64)>, values: &[Vec<f64>]) -> Acting {
        let specs: Vec<Spec> =
            ["a=a.tif,knot:0.3", "b=b.tif"].iter().map(|s| s.parse().unwrap()).collect();
        let words = vec![Vec::new(); 2];
        let design = Design::fit(&Covariates { specs, values: values.to_vec(), words });
        Acting { design: Arc::new(design), slopes: slopes.to_vec(), bends }
    }

    /// Over many draws an effect has the covariance that the exact process of a task is told, seen from
    /// the frame of some of the sites.
    #[test]
    fn effects_have_the_covariance_that_is_told() {
        let mut rng = Stream::new(3, "values", 0);
        let values: Vec<Vec<f64>> = (0..2).map(|_| rng.normals(9)).collect();
        let bends = vec![(vec![0], 0.8, 0.7), (vec![0, 2], 0.5, 1.4)];
        let acting = acting(&[0.9, 0.9, 0.0], bends, &values);
        let specs = vec!["a=a.tif,knot:0.3".parse().unwrap(), "b=b.tif".parse().unwrap()];
        let seen = Seen { specs, values: values.clone(), acting };
        let (x, framed) = seen.framed(5, 4.0).unwrap();
        assert_eq!(x.dims(), [1, 9, 3]);
        let x = x.squeeze(0).unwrap().to_dtype(candle_core::DType::F64).unwrap();
        let x = x.to_vec2::<f64>().unwrap();
        let surface = crate::kernel::Matern {
            smoothness: crate::kernel::Smoothness::Half,
            length_scale: 0.3,
            sill: 2.0,
            metric: crate::kernel::Metric::Euclidean,
        };
        let both = Both { surface: Arc::new(surface), effects: framed };
        const DRAWS: usize = 6000;
        let draws: Vec<Vec<f64>> =
            (0..DRAWS).map(|_| seen.acting.draw(&values, &mut rng).unwrap()).collect();
        for i in 0..9 {
            for j in 0..=i {
                let found = draws.iter().map(|d| d[i] * d[j]).sum::<f64>() / DRAWS as f64;
                let site = |i: usize| [&[0.1, 0.2][..], &x[i]].concat();
                // At one place the surface is as good as known: its sill is taken off.
                let told = (both.covariance(&site(i), &site(j)) - 2.0) / 4.0;
                let own = |i: usize| (both.covariance(&site(i), &site(i)) - 2.0) / 4.0;
                let error = ((own(i) * own(j) + told * told) / DRAWS as f64).sqrt();
                assert!((found - told).abs() < 5.5 * error, "{i} {j}: {found}, told {told}");
            }
        }
        // Sites without features: the surface alone.
        assert_eq!(both.covariance(&[0.1, 0.2], &[0.1, 0.2]), 2.0);
    }

    #[test]
    fn recipes_that_cannot_be_trained_on_are_refused() {
        let of = |text: &str| {
            let table: toml::Table = text.parse().unwrap();
            let settings: Settings =
                crate::settings::parse_table("[covariates]", &table).map_err(|e| e.to_string())?;
            Effects::new(settings).map(|e| e.features()).map_err(|e| e.to_string())
        };
        assert_eq!(of("terms = [\"a=a.tif,knot:1,knot:2\", \"b=b.tif\"]"), Ok(4));
        for (text, part) in [
            ("", "names no covariate"),
            ("terms = [\"a=a.tif,categorical\"]", "not trained on categories"),
            ("terms = [\"a=a.tif\", \"a=b.tif\"]", "same name"),
            ("terms = [\"a\"]", "needs a name and a file"),
            ("terms = [\"a=a.tif\"]\nabsent = 1.5", "absent"),
            ("terms = [\"a=a.tif\"]\nbend = -1", "bend"),
            ("terms = [\"a=a.tif\"]\nnodes = 3", "nodes"),
            ("terms = [\"a=a.tif\"]\nabsnet = 0.5", "absnet"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
    }

    #[test]
    fn surveys_are_not_drawn_without_rasters() {
        let settings = Settings { terms: vec!["a=a.tif".into()], ..Settings::default() };
        let effects = Effects::new(settings).unwrap();
        let error = effects.values(&[[0.0, 0.0]], &mut Stream::new(1, "none", 0)).unwrap_err();
        assert!(error.to_string().contains("none were read"), "{error}");
    }
}
