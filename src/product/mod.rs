//! What a map shows: one raster per product, made tile by tile. Registry: [`PRODUCTS`].

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::{
    error::{Error, Result},
    geo::{
        geotiff::{Band, Cog},
        grid::{Grid, Window},
    },
    predictive::{Link, Marginals, Of},
    registry::{self, Named},
};

pub mod distance;
pub mod exceedance;
pub mod interval;
pub mod mean;
pub mod prior_share;
pub mod quantile;
pub mod sd;

/// A raster in the making. It may move to another thread, and is on one at a time.
pub trait Product: Send {
    /// The specification it was made from: `quantile:0.025`.
    fn spec(&self) -> Spec;
    /// Takes the values of a window, row-major, NaN where nothing is wanted. Each pixel comes once.
    fn accept(&mut self, window: Window, values: &[f32]) -> Result<()>;
    /// What is taken from now on is of band `band`, counted from 0: of another time.
    fn turn_to(&mut self, _band: usize) {}
    /// Completes the file and says where it is.
    fn finish(self: Box<Self>) -> Result<PathBuf>;
}

/// What values of a product are, for colours and legends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// A level of the outcome.
    Level,
    /// A width in outcome units: sd, interval width.
    Spread,
    /// A probability.
    Probability,
    /// A length on the ground, km.
    Distance,
    /// A part of a whole, 0 to 1.
    Share,
}

/// What the number given to [`Entry::value`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// What stands after the colon of the specification; NaN where nothing does.
    Parameter,
    /// Km from the target to the nearest site.
    Nearest,
    /// Variance of what is mapped over all of the map, link scale: [`prior_share`].
    Spread,
}

/// What is known around targets, beside what is foretold there.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Around {
    /// Km from each target to the nearest site; empty where no product reads it.
    pub km: Vec<f64>,
    /// For [`Reads::Spread`].
    pub spread: f64,
}

/// A kind of product.
pub struct Entry {
    /// The name in `--products`.
    pub name: &'static str,
    /// One line on what it is.
    pub about: &'static str,
    /// What stands after the colon, if anything does.
    pub parameter: Option<Parameter>,
    /// What its values are.
    pub scale: Scale,
    /// What its value is worked out from, beside the marginals.
    pub reads: Reads,
    /// In words, of an outcome such as "prevalence".
    pub title: fn(outcome: &str, parameter: f64) -> String,
    /// The value at target `i`; `number` is what the entry [`Reads`].
    pub value: fn(marginals: &Marginals, i: usize, number: f64) -> f64,
}

/// The number after the colon of a specification.
pub struct Parameter {
    /// Its name, for messages: "level".
    pub name: &'static str,
    /// An example: "0.025".
    pub example: &'static str,
    /// Whether it is a threshold in outcome units; otherwise it lies strictly between 0 and 1.
    pub threshold: bool,
}

/// Every product.
pub const PRODUCTS: &[Entry] = &[
    mean::ENTRY,
    sd::ENTRY,
    quantile::ENTRY,
    interval::ENTRY,
    exceedance::ENTRY,
    distance::ENTRY,
    prior_share::ENTRY,
];

impl Named for Entry {
    fn name(&self) -> &str {
        self.name
    }
    fn about(&self) -> &str {
        self.about
    }
}

/// A product as a user asks for it: `mean`, `quantile:0.025`, `exceedance:0.2`.
#[derive(Clone, Copy)]
pub struct Spec {
    /// Which kind.
    pub entry: &'static Entry,
    /// Its parameter; NaN where the kind has none.
    pub parameter: f64,
}

impl Spec {
    /// P(outcome > `threshold`).
    pub fn exceedance(threshold: f64) -> Self {
        Spec { entry: &exceedance::ENTRY, parameter: threshold }
    }

    /// Name of the file without its ending: `quantile_0.025`.
    pub fn stem(&self) -> String {
        self.to_string().replace(':', "_")
    }

    /// The values of the product at every target, in its own units; `around` holds what the entry
    /// reads.
    pub fn values(&self, marginals: &Marginals, around: &Around) -> Vec<f32> {
        let value = self.entry.value;
        marginals.map(|marginals, i| {
            let number = match self.entry.reads {
                Reads::Parameter => self.parameter,
                Reads::Nearest => around.km.get(i).copied().unwrap_or(f64::NAN),
                Reads::Spread => around.spread,
            };
            value(marginals, i, number) as f32
        })
    }

    /// Refuses thresholds that the outcome cannot cross.
    ///
    /// # Errors
    /// [`Error::Input`] for a proportion outside (0, 1), or a rate that is not positive.
    pub fn check(&self, link: Link) -> Result<()> {
        if !self.entry.parameter.as_ref().is_some_and(|p| p.threshold) {
            return Ok(());
        }
        let t = self.parameter;
        let refuse = |what: &str| Error::input(format!("the threshold {t} {what}"));
        match link {
            Link::Logit if t > 1.0 && t < 100.0 => {
                Err(refuse("is above any prevalence, which lies between 0 and 1")
                    .try_this(format!("for {t} % write {}", short(t / 100.0))))
            }
            Link::Logit if t <= 0.0 || t >= 1.0 => {
                Err(refuse("is not a prevalence between 0 and 1").try_this("for 20 % write 0.2"))
            }
            Link::Log if t <= 0.0 => {
                Err(refuse("is not a rate above 0").try_this("give a positive threshold"))
            }
            _ => Ok(()),
        }
    }
}

impl PartialEq for Spec {
    fn eq(&self, other: &Self) -> bool {
        self.entry.name == other.entry.name
            && (self.parameter == other.parameter || self.entry.parameter.is_none())
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.entry.parameter {
            None => write!(f, "{}", self.entry.name),
            Some(_) => write!(f, "{}:{}", self.entry.name, self.parameter),
        }
    }
}

impl fmt::Debug for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Spec {
    type Err = Error;

    /// ```
    /// use isopleth::product::Spec;
    /// assert_eq!("quantile:0.025".parse::<Spec>()?.stem(), "quantile_0.025");
    /// assert_eq!("exceedance:0.20".parse::<Spec>()?.to_string(), "exceedance:0.2");
    /// assert!("quantile".parse::<Spec>().is_err()); // which?
    /// assert!("interval:95".parse::<Spec>().unwrap_err().help().unwrap().contains("0.95"));
    /// # Ok::<(), isopleth::Error>(())
    /// ```
    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = match text.trim().split_once(':') {
            None => (text.trim(), None),
            Some((name, rest)) => (name.trim(), Some(rest.trim())),
        };
        let entry = registry::find("product", PRODUCTS, name)?;
        let refuse = |what: &str| Error::input(format!("the product `{text}` {what}"));
        let (wanted, given) = match (&entry.parameter, rest) {
            (None, None) => {
                return Ok(Spec { entry, parameter: f64::NAN });
            }
            (None, Some(_)) => {
                return Err(refuse("takes no number").try_this(format!("write {name}")));
            }
            (Some(wanted), None) => {
                return Err(refuse(&format!("needs a {}", wanted.name))
                    .try_this(format!("write for example {name}:{}", wanted.example)));
            }
            (Some(wanted), Some(given)) => (wanted, given),
        };
        let example = format!("write for example {name}:{}", wanted.example);
        let parameter: f64 = given.parse().map_err(|_| {
            refuse(&format!("has a {} that is not a number", wanted.name)).try_this(&example)
        })?;
        if !parameter.is_finite() {
            return Err(
                refuse(&format!("has a {} that is not finite", wanted.name)).try_this(&example)
            );
        }
        let level = parameter > 0.0 && parameter < 1.0;
        if !(wanted.threshold || level) {
            let help = if (1.0..100.0).contains(&parameter) {
                format!("for {parameter} % write {name}:{}", short(parameter / 100.0))
            } else {
                example
            };
            let what = format!("has a {} that is not between 0 and 1", wanted.name);
            return Err(refuse(&what).try_this(help));
        }
        Ok(Spec { entry, parameter })
    }
}

/// At most six decimals, no trailing zeros.
fn short(value: f64) -> String {
    format!("{value:.6}").trim_end_matches('0').trim_end_matches('.').to_string()
}

/// What is mapped, in the words that titles and tags use.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// "prevalence", or the name of the mapped column.
    pub name: String,
    /// Its unit: "1" for proportions, "" where unknown.
    pub unit: String,
    /// Link to the scale on which surfaces live.
    pub link: Link,
    /// Whether maps are of the surface, or of a new observation.
    pub of: Of,
}

impl Outcome {
    /// What maps are of, in words: the surface, a new village, or one more value.
    pub fn whose(&self) -> &'static str {
        match self.of {
            Of::Surface => "surface",
            // Of values the unit is not known.
            Of::Observation if self.unit.is_empty() => "new value",
            Of::Observation => "new village",
        }
    }

    /// Title and unit of a product.
    pub fn band(&self, spec: &Spec) -> Band {
        let unit = match spec.entry.scale {
            Scale::Probability | Scale::Share => "1".into(),
            Scale::Distance => "km".into(),
            Scale::Level | Scale::Spread => self.unit.clone(),
        };
        let title = (spec.entry.title)(&self.name, spec.parameter);
        let description = match spec.entry.scale {
            Scale::Distance => title,
            _ => format!("{title}, {}", self.whose()),
        };
        Band { description, unit }
    }
}

/// A product that is one GeoTIFF, of a band for each time.
struct Single {
    spec: Spec,
    raster: Cog,
    band: usize,
}

impl Product for Single {
    fn spec(&self) -> Spec {
        self.spec
    }

    fn accept(&mut self, window: Window, values: &[f32]) -> Result<()> {
        self.raster.write_band(window, self.band, values)
    }

    fn turn_to(&mut self, band: usize) {
        self.band = band;
    }

    fn finish(self: Box<Self>) -> Result<PathBuf> {
        self.raster.finish()
    }
}

/// Puts the values of wanted pixels in their places, NaN elsewhere.
///
/// ```
/// let map = isopleth::product::scatter(&[true, false, true], &[1.0, 2.0])?;
/// assert!(map[0] == 1.0 && map[1].is_nan() && map[2] == 2.0);
/// # Ok::<(), isopleth::Error>(())
/// ```
/// # Errors
/// [`Error::Axis`] if there is not one value for each wanted pixel.
pub fn scatter(valid: &[bool], values: &[f32]) -> Result<Vec<f32>> {
    let wanted = valid.iter().filter(|&&v| v).count();
    if wanted != values.len() {
        return Err(Error::axis("values and wanted pixels", values.len(), wanted));
    }
    let mut values = values.iter();
    let place = |&v: &bool| {
        if v { *values.next().unwrap_or(&f32::NAN) } else { f32::NAN }
    };
    Ok(valid.iter().map(place).collect())
}

/// Starts a raster for each specification, in `directory`. Repeated ones are made once.
///
/// `tags` go into every file, beside what the product is and what it is of.
///
/// # Errors
/// [`Error::Input`] for a threshold that the outcome cannot cross, or if the disk refuses.
pub fn open(
    specs: &[Spec],
    outcome: &Outcome,
    grid: &Grid,
    directory: &Path,
    tags: &[(String, String)],
) -> Result<Vec<Box<dyn Product>>> {
    open_at(specs, outcome, grid, directory, tags, &[])
}

/// As [`open`], with a band for each of these times.
///
/// # Errors
/// As [`open`].
pub fn open_at(
    specs: &[Spec],
    outcome: &Outcome,
    grid: &Grid,
    directory: &Path,
    tags: &[(String, String)],
    times: &[String],
) -> Result<Vec<Box<dyn Product>>> {
    let mut products: Vec<Box<dyn Product>> = Vec::new();
    for spec in specs {
        spec.check(outcome.link)?;
    }
    for (i, &spec) in specs.iter().enumerate() {
        if specs[..i].contains(&spec) {
            continue;
        }
        let mut tags = tags.to_vec();
        let mut tag = |key: &str, value: String| tags.push((key.into(), value));
        tag("ISOPLETH_VERSION", env!("CARGO_PKG_VERSION").into());
        tag("PRODUCT", spec.to_string());
        tag("OUTCOME", outcome.name.clone());
        tag("OF", outcome.whose().into());
        if let Some(parameter) = &spec.entry.parameter {
            tag(&parameter.name.to_uppercase(), spec.parameter.to_string());
        }
        let path = directory.join(format!("{}.tif", spec.stem()));
        let whole = outcome.band(&spec);
        let of = |time: &String| Band {
            description: format!("{}, {time}", whole.description),
            unit: whole.unit.clone(),
        };
        let bands: Vec<Band> = match times {
            [] => vec![whole],
            times => {
                tags.push(("TIMES".into(), times.join(",")));
                times.iter().map(of).collect()
            }
        };
        let raster = Cog::of_bands(&path, grid, &bands, &tags)?;
        products.push(Box::new(Single { spec, raster, band: 0 }));
    }
    Ok(products)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictive::{normal_cdf, normal_quantile};

    fn known(link: Link) -> Marginals {
        Marginals {
            link,
            of: Of::Surface,
            components: 1,
            weight: vec![1.0; 2],
            mean: vec![0.3, -1.2],
            sd: vec![0.5, 0.8],
        }
    }

    fn value(spec: &str, marginals: &Marginals, i: usize) -> f64 {
        let spec: Spec = spec.parse().unwrap();
        (spec.entry.value)(marginals, i, spec.parameter)
    }

    #[test]
    fn a_known_posterior_gives_known_values() {
        let gaussian = known(Link::Identity);
        let z = normal_quantile(0.9);
        for (i, (m, s)) in [(0.3, 0.5), (-1.2, 0.8)].into_iter().enumerate() {
            for (spec, expected) in [
                ("mean", m),
                ("sd", s),
                ("quantile:0.9", m + z * s),
                ("interval:0.8", 2.0 * z * s),
                ("exceedance:-0.4", normal_cdf((m + 0.4) / s)),
            ] {
                let got = value(spec, &gaussian, i);
                assert!((got - expected).abs() < 1e-9, "{spec} at {i}: {got}, not {expected}");
            }
        }
    }

    #[test]
    fn products_of_prevalence_agree_with_each_other() {
        let logit = known(Link::Logit);
        for i in 0..2 {
            let quantile = value("quantile:0.7", &logit, i);
            let spec = Spec::exceedance(quantile);
            let above = (spec.entry.value)(&logit, i, spec.parameter);
            assert!((above - 0.3).abs() < 1e-9, "{above}");
            let width = value("quantile:0.975", &logit, i) - value("quantile:0.025", &logit, i);
            assert!((value("interval:0.95", &logit, i) - width).abs() < 1e-12);
        }
    }

    #[test]
    fn thresholds_in_percent_are_refused_for_prevalence() {
        let percent = Spec::exceedance(20.0);
        let help = percent.check(Link::Logit).unwrap_err().help().unwrap();
        assert!(help.contains("0.2"), "{help}");
        assert!(percent.check(Link::Identity).is_ok());
        assert!(Spec::exceedance(0.0).check(Link::Logit).is_err());
        assert!(Spec::exceedance(-1.0).check(Link::Log).is_err());
    }

    #[test]
    fn slips_in_a_specification_are_named() {
        for (text, words) in [
            ("quantle:0.5", "no product"),
            ("quantile:1.5", "not between 0 and 1"),
            ("quantile:high", "not a number"),
            ("exceedance:NaN", "not finite"),
            ("mean:3", "takes no number"),
            ("interval", "needs a level"),
        ] {
            let error = text.parse::<Spec>().unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
            assert!(error.help().is_some(), "{text}");
        }
    }
}
