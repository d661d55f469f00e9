//! From covariates to the numbers that a model reads: standardised at the sites, and the same everywhere.
//!
//! A coefficient's prior is the same for every column, so that columns must be alike: a numeric one has
//! mean 0 and sd 1 over the sites, a level of a category is 1 or 0 less its share of the sites.
//! Nothing says what a level does that no site has: it has a column of its own, 0 at every site,
//! whose coefficient therefore stays as unknown as the prior leaves it.

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{Covariates, Source, Spec, code, sample};
use crate::{
    error::{Error, Result},
    geo::{
        crs::Crs,
        grid::{Grid, Mask, Window},
        table::Column,
    },
    sites::mean_sd,
};

/// Places whose covariates are looked at together.
const PLACES: usize = 65_536;

/// How covariates become features; goes into the run record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Design {
    /// One for each covariate.
    pub terms: Vec<Term>,
}

/// One covariate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Term {
    /// What was asked for.
    pub spec: Spec,
    /// Smallest and largest value at the sites, in its unit; codes for categories.
    pub range: [f64; 2],
    /// Names of codes, where the table spells categories out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub words: Vec<String>,
    /// What it becomes.
    pub features: Vec<Feature>,
}

/// One number that a model reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// `(value − mean) / sd`, on the covariate's scale.
    Line {
        /// Over the sites.
        mean: f64,
        /// Over the sites.
        sd: f64,
    },
    /// `(max(value − knot, 0) − mean) / sd`, on the covariate's scale.
    Knot {
        /// In the covariate's unit.
        knot: f64,
        /// Over the sites.
        mean: f64,
        /// Over the sites.
        sd: f64,
    },
    /// 1 where the category is this one, else 0, less its share of the sites.
    Level {
        /// Its code.
        code: f64,
        /// Share of the sites.
        share: f64,
    },
    /// 1 where the category is one that no site has.
    Unseen,
}

/// What a grid's pixels have of the covariates.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cover {
    /// Pixels that were wanted.
    pub wanted: usize,
    /// Pixels without data for some covariate: they are not mapped.
    pub without: usize,
    /// Pixels where some covariate lies outside the values seen at sites.
    pub beyond: usize,
    /// For each covariate: its name, and its pixels outside what was seen at sites.
    pub each: Vec<(String, usize)>,
    /// Levels on the grid that no site has: the covariate's name, and at most ten codes.
    pub unseen: Vec<(String, Vec<f64>)>,
}

impl Term {
    fn fit(spec: &Spec, values: &[f64], words: &[String]) -> Self {
        let mut features = Vec::new();
        if spec.categorical {
            let mut levels = values.to_vec();
            levels.sort_by(f64::total_cmp);
            levels.dedup();
            let share = |code: f64| {
                values.iter().filter(|v| **v == code).count() as f64 / values.len().max(1) as f64
            };
            features
                .extend(levels.into_iter().map(|code| Feature::Level { code, share: share(code) }));
            features.push(Feature::Unseen);
        } else {
            let scaled: Vec<f64> = values.iter().map(|v| spec.scaled(*v)).collect();
            let (mean, sd) = mean_sd(&scaled);
            features.push(Feature::Line { mean, sd });
            for &knot in &spec.knots {
                let from = spec.scaled(knot);
                let over: Vec<f64> = scaled.iter().map(|v| (v - from).max(0.0)).collect();
                let (mean, sd) = mean_sd(&over);
                features.push(Feature::Knot { knot, mean, sd });
            }
        }
        let range = values
            .iter()
            .fold([f64::INFINITY, f64::NEG_INFINITY], |[a, b], v| [a.min(*v), b.max(*v)]);
        Term { spec: spec.clone(), range, words: words.to_vec(), features }
    }

    /// The value that a place has; NaN where it is none that the covariate's scale knows.
    fn known(&self, value: f64) -> f64 {
        match self.spec.categorical || self.spec.scaled(value).is_finite() {
            true => value,
            false => f64::NAN,
        }
    }

    fn has(&self, level: f64) -> bool {
        self.features.iter().any(|f| matches!(f, Feature::Level { code, .. } if *code == level))
    }

    fn feature(&self, feature: &Feature, value: f64) -> f64 {
        match feature {
            Feature::Line { mean, sd } => (self.spec.scaled(value) - mean) / sd,
            Feature::Knot { knot, mean, sd } => {
                ((self.spec.scaled(value) - self.spec.scaled(*knot)).max(0.0) - mean) / sd
            }
            Feature::Level { code, share } => f64::from(value == *code) - share,
            Feature::Unseen => f64::from(!self.has(value)),
        }
    }

    /// How far outside the values at sites a value lies, in units of their range; 1 for a level that no
    /// site has.
    fn beyond(&self, value: f64) -> f64 {
        if self.spec.categorical {
            return f64::from(!self.has(value));
        }
        let [low, high] = self.range;
        ((low - value).max(value - high) / (high - low)).max(0.0)
    }

    fn label(&self, feature: &Feature) -> String {
        let name = &self.spec.name;
        match feature {
            Feature::Line { .. } => name.clone(),
            Feature::Knot { knot, .. } => format!("{name} above {knot}"),
            Feature::Level { code, .. } => match self.words.get(*code as usize) {
                Some(word) => format!("{name} = {word}"),
                None => format!("{name} = {code}"),
            },
            Feature::Unseen => format!("{name} = another level"),
        }
    }
}

impl Design {
    /// The design of the covariates at the sites of a survey, or of a fold of one.
    pub fn fit(covariates: &Covariates) -> Self {
        let each = covariates.specs.iter().zip(&covariates.values).zip(&covariates.words);
        Design {
            terms: each.map(|((spec, values), words)| Term::fit(spec, values, words)).collect(),
        }
    }

    /// What each feature is called.
    pub fn names(&self) -> Vec<String> {
        let labels = |term: &Term| term.features.iter().map(|f| term.label(f)).collect::<Vec<_>>();
        self.terms.iter().flat_map(labels).collect()
    }

    /// What one sd of each numeric feature is, in the covariate's unit on its scale; nothing for levels.
    pub fn sds(&self) -> Vec<Option<f64>> {
        let sd = |feature: &Feature| match feature {
            Feature::Line { sd, .. } | Feature::Knot { sd, .. } => Some(*sd),
            Feature::Level { .. } | Feature::Unseen => None,
        };
        self.terms.iter().flat_map(|term| term.features.iter().map(sd)).collect()
    }

    /// Features of places, `[1, place, feature]`, from `values` `[covariate][place]`.
    ///
    /// # Errors
    /// [`Error::Input`] if a place lacks a value: no data is never a number.
    pub fn tensor(&self, values: &[Vec<f64>], device: &Device) -> Result<Tensor> {
        let places = values.first().map_or(0, Vec::len);
        let width = self.terms.iter().map(|term| term.features.len()).sum::<usize>();
        for (term, values) in self.terms.iter().zip(values) {
            let without = values.iter().filter(|v| v.is_nan()).count();
            if without > 0 {
                return Err(Error::input(
                    "places were asked about that have no data for a covariate",
                )
                .fact("covariate", &term.spec)
                .fact("places without", format!("{without} of {places}"))
                .try_this("leave them out"));
            }
        }
        let mut flat = Vec::with_capacity(places * width);
        for i in 0..places {
            for (term, values) in self.terms.iter().zip(values) {
                flat.extend(term.features.iter().map(|f| term.feature(f, values[i]) as f32));
            }
        }
        Ok(Tensor::from_vec(flat, (1, places, width), device)?)
    }

    /// Values of every covariate at places of `crs`, `[covariate][place]`, NaN where there is none.
    /// `column` gives the cells of a column of the places' own table.
    ///
    /// # Errors
    /// As rasters are read; whatever `column` returns.
    pub fn values(
        &self,
        crs: &Crs,
        x: &[f64],
        y: &[f64],
        column: &dyn Fn(&str) -> Result<Column>,
    ) -> Result<Vec<Vec<f64>>> {
        let values = |term: &Term| {
            let values = match &term.spec.source {
                Source::Raster { .. } => sample::at(&term.spec, crs, x, y)?,
                Source::Column(name) => match column(name)? {
                    Column::Numbers(values) => values,
                    Column::Text(cells) if term.spec.categorical && !term.words.is_empty() => {
                        cells.iter().map(|cell| code(&term.words, cell)).collect()
                    }
                    Column::Text(cells) => {
                        return Err(Error::input(
                            "a covariate is a number in the survey and text here",
                        )
                        .fact("column", name)
                        .fact("first cell", cells.first().map_or("", String::as_str))
                        .try_this("give the targets the same kind of column"));
                    }
                },
            };
            if values.len() != x.len() {
                return Err(Error::axis("values of a covariate and places", values.len(), x.len()));
            }
            Ok(values.into_iter().map(|v| term.known(v)).collect())
        };
        self.terms.iter().map(values).collect()
    }

    /// Values at places that have no table: every covariate must come from a raster.
    ///
    /// # Errors
    /// As [`Design::values`], and [`Error::Input`] for a covariate that is a column.
    pub fn rasters(&self, crs: &Crs, x: &[f64], y: &[f64]) -> Result<Vec<Vec<f64>>> {
        self.values(crs, x, y, &|name| {
            Err(Error::input(
                "a covariate is known at the sites only, and a map needs it everywhere",
            )
            .fact("covariate", format!("column `{name}`"))
            .try_this("give its raster: --covariate NAME=FILE"))
        })
    }

    /// How far place `i` of `values` `[covariate][place]` lies outside the values at sites, in units of
    /// their range, by the covariate that is worst; 1 for a level that no site has.
    pub fn beyond(&self, values: &[Vec<f64>], i: usize) -> f64 {
        let each = self.terms.iter().zip(values).map(|(term, v)| term.beyond(v[i]));
        each.fold(0.0, f64::max)
    }

    /// A grid with only those pixels wanted that have every covariate, and what was found on the way.
    ///
    /// `each` is told, window by window and row-major, how far outside the values at sites the pixels
    /// lie, in units of their range, by the covariate that is worst: 0 inside, 1 for a level that no site
    /// has, NaN without data. That is the part below zero of the multivariate environmental similarity
    /// surface, its sign turned.
    ///
    /// # Errors
    /// As [`Design::rasters`], those of `each`, and [`Error::Input`] if no pixel has every covariate.
    /// # Source
    /// Elith, Kearney & Phillips (2010), doi:10.1111/j.2041-210X.2010.00036.x.
    pub fn cover(
        &self,
        grid: Grid,
        each: &mut dyn FnMut(Window, &[f32]) -> Result<()>,
    ) -> Result<(Grid, Cover)> {
        let mut mask = Mask::none(grid.rows, grid.cols);
        let mut cover = Cover {
            each: self.terms.iter().map(|t| (t.spec.name.clone(), 0)).collect(),
            ..Cover::default()
        };
        let mut levels: Vec<Vec<f64>> = vec![Vec::new(); self.terms.len()];
        let side = PLACES.isqrt();
        for window in grid.windows(side) {
            let wanted = grid.valid(window);
            let (x, y) = grid.centres(window, &wanted);
            let mut found = vec![f32::NAN; window.len()];
            if !x.is_empty() {
                let values = self.rasters(&grid.crs, &x, &y)?;
                let pixels = (0..window.len()).filter(|i| wanted[*i]);
                for (i, pixel) in pixels.enumerate() {
                    cover.wanted += 1;
                    if values.iter().any(|v| v[i].is_nan()) {
                        cover.without += 1;
                        continue;
                    }
                    mask.set(
                        window.row + pixel / window.cols,
                        window.col + pixel % window.cols,
                        true,
                    );
                    let mut worst = 0.0f64;
                    for (t, term) in self.terms.iter().enumerate() {
                        let beyond = term.beyond(values[t][i]);
                        worst = worst.max(beyond);
                        cover.each[t].1 += usize::from(beyond > 0.0);
                        if beyond > 0.0 && term.spec.categorical {
                            let (known, level) = (&mut levels[t], values[t][i]);
                            if known.len() < 10 && !known.contains(&level) {
                                known.push(level);
                            }
                        }
                    }
                    cover.beyond += usize::from(worst > 0.0);
                    found[pixel] = worst as f32;
                }
            }
            each(window, &found)?;
        }
        if cover.without == cover.wanted {
            let error = Error::input("no pixel of the grid has every covariate")
                .fact("grid", grid.crs.name());
            let error = self.terms.iter().fold(error, |e, t| e.fact("covariate", &t.spec));
            return Err(error.try_this("check that the rasters cover the map"));
        }
        for (term, mut levels) in self.terms.iter().zip(levels) {
            if !levels.is_empty() {
                levels.sort_by(f64::total_cmp);
                cover.unseen.push((term.spec.name.clone(), levels));
            }
        }
        let valid = (cover.without > 0 || grid.valid.is_some()).then_some(mask);
        Ok((Grid { valid, ..grid }, cover))
    }
}

impl Cover {
    /// What a user should know, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let percent = |n: usize| match 100.0 * n as f64 / self.wanted.max(1) as f64 {
            p if p > 0.0 && p < 1.0 => "less than 1 %".to_string(),
            p => format!("{p:.0} %"),
        };
        let mut said = Vec::new();
        if self.without > 0 {
            said.push(format!(
                "{} pixel{} ({}) lack data for a covariate and are left empty",
                self.without,
                if self.without == 1 { "" } else { "s" },
                percent(self.without)
            ));
        }
        for (name, beyond) in self.each.iter().filter(|(_, n)| *n > 0) {
            match self.unseen.iter().find(|(unseen, _)| unseen == name) {
                Some((_, levels)) => {
                    let shown: Vec<String> = levels.iter().map(f64::to_string).collect();
                    said.push(format!(
                        "{} of the pixels have a level of {name} that no site has ({}): what it does \
                         there is not known, and the maps are the wider for it",
                        percent(*beyond),
                        shown.join(", ")
                    ));
                }
                None => said.push(format!(
                    "{name} lies outside the values seen at sites in {} of the pixels: there the map \
                     extends a line (extrapolation.tif)",
                    percent(*beyond)
                )),
            }
        }
        said
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn design(spec: &str, values: &[f64]) -> Design {
        let specs = vec![spec.parse().unwrap()];
        Design::fit(&Covariates { specs, values: vec![values.to_vec()], words: vec![Vec::new()] })
    }

    fn features(design: &Design, values: &[f64]) -> Vec<Vec<f32>> {
        design
            .tensor(&[values.to_vec()], &Device::Cpu)
            .unwrap()
            .squeeze(0)
            .unwrap()
            .to_vec2()
            .unwrap()
    }

    #[test]
    fn numbers_are_standardised_at_the_sites_and_the_same_elsewhere() {
        let design = design("e=e.tif,knot:2", &[1.0, 2.0, 6.0]);
        assert_eq!(design.names(), ["e", "e above 2"]);
        let sd = (14.0f64 / 3.0).sqrt();
        for (row, value) in features(&design, &[1.0, 3.0, 100.0]).iter().zip([1.0, 3.0, 100.0f64]) {
            assert!((f64::from(row[0]) - (value - 3.0) / sd).abs() < 1e-5, "{row:?}");
            let over = ((value - 2.0).max(0.0) - 4.0 / 3.0) / (32.0f64 / 9.0).sqrt();
            assert!((f64::from(row[1]) - over).abs() < 1e-4, "{row:?}");
        }
        let log = super::tests::design("e=e.tif,log", &[1.0, std::f64::consts::E]);
        assert!((features(&log, &[1.0])[0][0] + 1.0).abs() < 1e-6);
        assert!(log.tensor(&[vec![f64::NAN]], &Device::Cpu).is_err(), "no data is no number");
    }

    #[test]
    fn levels_have_a_column_each_and_so_has_one_that_no_site_has() {
        let design = design("c=c.tif,categorical", &[7.0, 2.0, 7.0, 7.0]);
        assert_eq!(design.names(), ["c = 2", "c = 7", "c = another level"]);
        let rows = features(&design, &[7.0, 2.0, 5.0]);
        assert_eq!(rows, [[-0.25, 0.25, 0.0], [0.75, -0.75, 0.0], [-0.25, -0.75, 1.0]]);
    }
}
