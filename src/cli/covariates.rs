//! Covariates on the command line: the same flags for every subcommand that takes them.

use std::path::Path;

use super::map::round;
use crate::{
    baseline::Coefficients,
    error::{Error, Result},
    geo::{
        covariates::{Covariates, Design, Spec},
        frame::Frame,
        survey::Survey,
    },
    recipe::Recipe,
};

/// Which covariates, and how they act.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct CovariateArgs {
    /// A covariate from a raster of any grid and system: NAME=FILE.tif[:BAND], and behind it what
    /// applies of ,nearest ,bilinear ,mean:5km ,categorical ,log ,log1p ,sqrt ,knot:650; may be repeated
    #[arg(long = "covariate", value_name = "NAME=FILE")]
    rasters: Vec<String>,
    /// A covariate from a column of the survey's table, and of the targets', with the same options; may
    /// be repeated
    #[arg(long = "covariate-column", value_name = "COLUMN")]
    columns: Vec<String>,
}

impl CovariateArgs {
    /// What was asked for, rasters first.
    ///
    /// # Errors
    /// As [`Spec`] is parsed.
    pub fn specs(&self) -> Result<Vec<Spec>> {
        let rasters = self.rasters.iter().map(|text| text.parse());
        rasters.chain(self.columns.iter().map(|text| Spec::column(text))).collect()
    }

    /// The survey with what was asked for: see [`Covariates::attach`].
    ///
    /// # Errors
    /// As [`CovariateArgs::specs`] and [`Covariates::attach`].
    pub fn attach(&self, survey: Survey, layer: Option<&str>) -> Result<Survey> {
        Covariates::attach(survey, &self.specs()?, layer)
    }

    /// Refuses columns where every pixel needs a value.
    ///
    /// # Errors
    /// [`Error::Input`] if a column was named.
    pub fn for_maps(&self) -> Result<()> {
        match self.columns.first() {
            None => Ok(()),
            Some(column) => Err(Error::input(
                "a map needs covariates at every pixel, and a column has them \
                                              at the sites only",
            )
            .fact("--covariate-column", column)
            .try_this(
                "give its raster, --covariate NAME=FILE; columns are for predict and validate",
            )),
        }
    }
}

/// Whether a trained model reads the survey's covariates itself: it does if it was trained with some, and
/// these must be the survey's.
///
/// # Errors
/// [`Error::Input`] if the model was trained with covariates and the survey has none, or others.
pub fn reads(model: &str, trained: &[Spec], survey: &Survey) -> Result<bool> {
    if trained.is_empty() {
        return Ok(false);
    }
    let given = survey.covariates.as_ref().map_or(&[][..], |c| &c.specs);
    let same = given.len() == trained.len() && given.iter().zip(trained).all(|(a, b)| a.is_like(b));
    if same {
        return Ok(true);
    }
    let asked = |specs: &[Spec]| specs.iter().map(Spec::asked).collect::<Vec<_>>().join(" ");
    let what = match given.is_empty() {
        true => "the model was trained with covariates, and the survey has none",
        false => "the survey's covariates are not those that the model was trained with",
    };
    let error = Error::input(what).fact("model", model);
    let error = trained.iter().fold(error, |e, spec| e.fact("trained with", spec));
    let error = given.iter().fold(error, |e, spec| e.fact("given", spec));
    Err(error.try_this(format!(
        "give these, in this order: {}; or another --model, which takes any covariates",
        asked(trained)
    )))
}

/// What was read of a recipe's rasters, and where it is kept, where the recipe has some.
pub fn about_covariates(recipe: &Recipe, file: &Path) -> Option<String> {
    let lattice = recipe.lattice()?;
    let ([all, known], [shorter, longer]) = (lattice.nodes(), lattice.sides_km());
    let names: Vec<&str> = lattice.head.specs.iter().map(|spec| &*spec.name).collect();
    Some(format!(
        "covariates: {} at {known} of {all} places of {} × {} km, {} km apart; kept in {}",
        names.join(", "),
        round(longer),
        round(shorter),
        round(lattice.head.step / 1000.0),
        Recipe::kept(file).display()
    ))
}

/// What a coefficient is in words, in the outcome's link scale: one for each feature.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Effect {
    /// The feature.
    pub of: String,
    /// Posterior mean per feature, link scale.
    pub mean: f64,
    /// Posterior sd.
    pub sd: f64,
    /// What one sd of a numeric covariate is, on the covariate's scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per: Option<f64>,
}

/// Effects of every feature, outcome's link scale.
pub fn effects(frame: &Frame, design: &Design, coefficients: &Coefficients) -> Vec<Effect> {
    // Values were standardised; for logits and logarithms of rates the sd is 1.
    let unit = frame.y_sd;
    let each = design.names().into_iter().zip(design.sds());
    each.zip(coefficients.mean.iter().zip(coefficients.sd()))
        .map(|((of, per), (mean, sd))| Effect { of, mean: unit * mean, sd: unit * sd, per })
        .collect()
}
