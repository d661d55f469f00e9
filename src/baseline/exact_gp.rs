//! The exact Gaussian process: kriging, in f64, by dense Cholesky. The yardstick of every model.
//!
//! Source: Rasmussen & Williams (2006): algorithm 2.1 for Gaussian observations, algorithms 3.1 and
//! 3.2 (Laplace approximation) for counts of every log-concave likelihood. Ordinary kriging is the
//! limit of a mean with a broad Gaussian prior (their section 2.7), so simple and ordinary kriging
//! are one formula here; and universal kriging is the same formula with a coefficient for every
//! covariate. The variance of the coefficients' prior is found with the other parameters, by what is left
//! of the likelihood once the coefficients are integrated out: ridge regression with its penalty by
//! restricted likelihood.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use faer::{Accum, Mat, Par, linalg::matmul::matmul};
use rayon::prelude::*;

pub use super::likely::FIT_SITES;
use super::{field, likely::Search, nelder_mead::minimise, regression::Coefficients};
pub use crate::likelihood::binomial_log_pmf;
use crate::{
    error::{Error, Result},
    kernel::{Kernel, Matern, Metric, Smoothness, SpaceTime},
    likelihood::{Kind, Likelihood},
    linalg::Cholesky,
    predictive::{Draws, Of, Predictive},
    process::{Field, Memory, Posterior, Process},
    rng::Stream,
    sites::{Observations, Sites},
};

/// Targets predicted together: memory and speed, never the answer.
const CHUNK: usize = 512;

/// Sites that [`ExactGp`] is conditioned on, at most: three square matrices of them are 10 GB.
pub const MOST_SITES: usize = 20_000;

/// A Gaussian process with known covariance.
///
/// The link-scale value of an observation is `mean + surface + nugget`; for counts the nugget is
/// the village effect, beside which negative binomial counts have a dispersion of their own.
pub struct ExactGp {
    /// Covariance of the surface, link scale², sites in model units.
    pub kernel: Box<dyn Kernel>,
    /// Variance of what two observations at one site do not share, link scale².
    pub nugget: f64,
    /// Mean of the surface, link scale.
    pub mean: f64,
    /// Variance of our belief in `mean`: 0 is simple kriging, large is ordinary kriging.
    pub mean_variance: f64,
    /// Variance of our belief in the coefficient of each covariate, whose mean is 0, link scale².
    pub coefficient_variance: f64,
    /// Covariates of every site: 0, and those that sites have are passed over.
    features: usize,
    /// Size of negative binomial counts; ∞ for every other likelihood.
    pub dispersion: f64,
    /// Log marginal likelihood of the context it was fitted to, in nats, where it was fitted.
    pub log_marginal: Option<f64>,
    likelihood: &'static dyn Likelihood,
}

/// What makes the kernel of a process of a Matérn kernel.
pub type MadeOf<'a> = &'a (dyn Fn(Matern) -> Result<Box<dyn Kernel>> + Sync);

/// One row of a context on the host, padding removed.
pub(crate) struct Row {
    /// Coordinates, behind them the time where it is read, and behind that the covariates.
    pub sites: Vec<Vec<f64>>,
    pub y: Vec<f64>,
    /// Number tested, or exposure; empty for values.
    pub trials: Vec<f64>,
}

/// What a row's posterior needs: `mean = m + cᵀ weight`, `variance = c₀ − ‖L⁻¹ (scale · c)‖²` for
/// covariances c between the target's surface and the context's.
pub(super) struct Fitted {
    pub sites: Vec<Vec<f64>>,
    weight: Vec<f64>,
    pub scale: Vec<f64>,
    pub factor: Cholesky,
    pub log_marginal: f64,
    /// Deviation of the latent from the mean, link scale: where the next Newton search may start.
    pub latent: Vec<f64>,
}

struct Conditioned<'a> {
    gp: &'a ExactGp,
    rows: Vec<Fitted>,
}

/// Refuses levels that make no Gaussian process, and counts that the `kind` of one cannot read.
pub(super) fn check_levels(
    kind: &str,
    nugget: f64,
    mean: f64,
    likelihood: &dyn Likelihood,
) -> Result<()> {
    if !(nugget >= 0.0 && nugget.is_finite() && mean.is_finite()) {
        return Err(Error::input("a Gaussian process needs a finite mean and a nugget ≥ 0")
            .fact("mean", mean)
            .fact("nugget", nugget));
    }
    if likelihood.counts() && likelihood.log_probability(0.0, 1.0, 0.0, 1.0).is_none() {
        return Err(Error::input(format!("the {kind} process does not read these counts"))
            .fact("likelihood", likelihood.name())
            .try_this("read them as binomial: the nugget takes up what sets villages apart"));
    }
    Ok(())
}

impl ExactGp {
    /// A Gaussian process with known mean.
    ///
    /// # Units
    /// `kernel` and `mean` on the link scale, `nugget` a variance on the link scale.
    /// # Errors
    /// [`Error::Input`] for a negative nugget, a mean that is not finite, or a likelihood for which
    /// Laplace's approximation is none: that of beta-binomial counts.
    pub fn new(
        kernel: Box<dyn Kernel>,
        nugget: f64,
        mean: f64,
        likelihood: &'static dyn Likelihood,
    ) -> Result<Self> {
        check_levels("exact Gaussian", nugget, mean, likelihood)?;
        Ok(ExactGp {
            kernel,
            nugget,
            mean,
            mean_variance: 0.0,
            coefficient_variance: 0.0,
            features: 0,
            dispersion: f64::INFINITY,
            log_marginal: None,
            likelihood,
        })
    }

    /// The same process with a mean that is linear in `features` covariates of every site
    /// ([`Sites::x`]), whose coefficients have independent priors of mean 0 and this `variance`, link
    /// scale². They are integrated out: what is not known of them widens every prediction.
    ///
    /// # Errors
    /// [`Error::Input`] for a variance that is not finite or below 0.
    pub fn with_covariates(self, features: usize, variance: f64) -> Result<Self> {
        if !(variance >= 0.0 && variance.is_finite()) {
            return Err(
                Error::input("coefficients need a prior variance ≥ 0").fact("variance", variance)
            );
        }
        Ok(ExactGp { features, coefficient_variance: variance, ..self })
    }

    /// The same process with counts of this dispersion.
    ///
    /// # Errors
    /// [`Error::Input`] if it is not above 0, or a likelihood that has one is left without.
    pub fn dispersed(self, dispersion: f64) -> Result<Self> {
        let named = self.likelihood.dispersion();
        if dispersion.is_nan() || dispersion <= 0.0 || named.is_some() != dispersion.is_finite() {
            return Err(Error::input("this dispersion is none of the likelihood's")
                .fact("likelihood", self.likelihood.name())
                .fact(named.unwrap_or("dispersion"), dispersion));
        }
        Ok(ExactGp { dispersion, ..self })
    }

    /// The same process with a mean known only up to `variance`, link scale².
    pub fn uncertain_mean(self, variance: f64) -> Self {
        ExactGp { mean_variance: variance, ..self }
    }

    /// The Matérn process that makes the context most likely: length scale, sill, nugget, and
    /// smoothness among 1/2, 3/2 and 5/2, with the mean integrated out under a broad prior; and the
    /// size of negative binomial counts. Where sites have covariates, their coefficients are integrated
    /// out too, under the prior that makes the context most likely.
    ///
    /// Where sites have times, the surface changes with them ([`SpaceTime`]): a length scale in time and
    /// the share of the sill that never changes are found too, and the smoothness in time, 1/2 or 3/2.
    ///
    /// Weak log-normal penalties keep parameters that the data do not inform in sane ranges. Above
    /// [`FIT_SITES`] sites, the likelihood is that of an evenly spread subset of the rows.
    ///
    /// # Shapes
    /// `context` has one row.
    /// # Errors
    /// [`Error::Axis`] for several rows; [`Error::Input`] for fewer than three sites or sites that
    /// are all in one place.
    pub fn fit(context: &Observations, likelihood: &'static dyn Likelihood) -> Result<Self> {
        Self::fit_as(context, likelihood, &|kernel| Ok(Box::new(kernel)))
    }

    /// As [`ExactGp::fit`], of a kernel that `of` makes of each Matérn kernel tried.
    ///
    /// # Errors
    /// As [`ExactGp::fit`].
    pub fn fit_as(
        context: &Observations,
        likelihood: &'static dyn Likelihood,
        of: MadeOf,
    ) -> Result<Self> {
        Search::new(context, likelihood, of)?.best()
    }

    /// Regression on the covariates of every site and nothing else: no surface, only coefficients, a
    /// level and a nugget. What a map must beat to be one.
    ///
    /// # Errors
    /// As [`ExactGp::fit`].
    pub fn regression(context: &Observations, likelihood: &'static dyn Likelihood) -> Result<Self> {
        let features = width(&context.sites);
        let rows = rows(context, likelihood, features, false)?;
        let [row] = &rows[..] else {
            return Err(Error::axis("rows to fit one regression to", rows.len(), 1));
        };
        let row = row.thinned(FIT_SITES);
        let (centre, variance) = row.centre(likelihood);
        let mean_variance = if likelihood.counts() { 25.0 } else { 100.0 * variance };
        let process = |p: &[f64]| -> Result<ExactGp> {
            // Next to nothing: a covariance without any surface would be singular without a nugget.
            let kernel = Matern {
                smoothness: Smoothness::Half,
                length_scale: 1.0,
                sill: 1e-6 * variance,
                metric: Metric::Euclidean,
            };
            let gp = ExactGp::new(Box::new(kernel), p[0].exp(), centre, likelihood)?;
            gp.uncertain_mean(mean_variance).with_covariates(features, p[1].exp())
        };
        let belief = [(variance, 2.0), (0.2 * variance, 1.5)];
        let mut latent = vec![0.0; row.sites.len()];
        let cost = |p: &[f64]| {
            let fitted = process(p).and_then(|gp| gp.absorb(&row, &latent));
            fitted.map_or(f64::INFINITY, |fitted| {
                latent = fitted.latent;
                let terms = p.iter().zip(&belief).map(|(x, (c, sd))| ((x - c.ln()) / sd).powi(2));
                0.5 * terms.sum::<f64>() - fitted.log_marginal
            })
        };
        let start = [(0.5 * variance).ln(), (0.2 * variance).ln()];
        let (p, value) = minimise(cost, &start, 0.6, 1e-3, 100);
        match value.is_finite() {
            true => process(&p),
            false => Err(Error::input("no regression could be fitted to the observations")
                .try_this("check the outcomes and covariates for extreme values")),
        }
    }

    /// Log marginal likelihood of each row of `context`, in nats: exact for values, Laplace's
    /// approximation for counts.
    pub fn log_marginals(&self, context: &Observations) -> Result<Vec<f64>> {
        Ok(self.absorb_all(context)?.into_iter().map(|row| row.log_marginal).collect())
    }

    fn absorb_all(&self, context: &Observations) -> Result<Vec<Fitted>> {
        let rows = rows(context, self.likelihood, self.features, self.reads_time())?;
        if let Some(row) = rows.iter().find(|row| row.sites.len() > MOST_SITES) {
            return Err(Error::input("too many sites for an exact Gaussian process")
                .fact("sites", row.sites.len())
                .fact("most", MOST_SITES)
                .try_this("use --model vecchia, which reads each site's neighbours only"));
        }
        rows.par_iter().map(|row| self.absorb(row, &vec![0.0; row.sites.len()])).collect()
    }

    /// Whether sites are told apart by their times; if not, those that sites have are passed over.
    pub(super) fn reads_time(&self) -> bool {
        self.kernel.change().is_some()
    }

    /// `[batch][site][dimension + time + feature]`.
    fn places(&self, sites: &Sites) -> Result<Vec<Vec<Vec<f64>>>> {
        places(sites, self.features, self.reads_time())
    }

    /// Whether observations are counts, whose noise is Laplace's.
    pub(super) fn reads_counts(&self) -> bool {
        self.likelihood.counts()
    }

    /// Covariates that every site has.
    pub(super) fn features(&self) -> usize {
        self.features
    }

    /// Mean of the surface at targets `[target]` and its covariance, row-major `[target, target]`, link
    /// scale, given a context of one row.
    ///
    /// # Errors
    /// [`Error::Axis`] for several rows; else as conditioning.
    pub fn belief(&self, context: &Observations, targets: &Sites) -> Result<[Vec<f64>; 2]> {
        let conditioned = Conditioned { gp: self, rows: self.absorb_all(context)? };
        let ([row], [places]) = (&conditioned.rows[..], &self.places(targets)?[..]) else {
            return Err(Error::axis("rows of a belief", conditioned.rows.len(), 1));
        };
        let (mean, covariance) = conditioned.posterior(row, places);
        let n = mean.len();
        let flat = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
        Ok([mean, flat.map(|(i, j)| covariance[(i, j)]).collect()])
    }

    /// What the observations say of the covariates' coefficients, link scale; exact for values, by
    /// Laplace's approximation for counts.
    ///
    /// # Shapes
    /// `context` has one row.
    /// # Errors
    /// [`Error::Axis`] for several rows, or other covariates than the process has.
    pub fn coefficients(&self, context: &Observations) -> Result<Coefficients> {
        let rows = self.absorb_all(context)?;
        let [row] = &rows[..] else {
            return Err(Error::axis("rows to read coefficients from", rows.len(), 1));
        };
        let (n, p) = (row.sites.len(), self.features);
        // Covariance of each coefficient and the latent at each site.
        let mut c = Mat::from_fn(n, p, |i, j| {
            let site = &row.sites[i];
            self.coefficient_variance * site[site.len() - p + j]
        });
        let mean = (0..p)
            .map(|j| c.col_as_slice(j).iter().zip(&row.weight).map(|(c, w)| c * w).sum())
            .collect();
        for j in 0..p {
            c.col_as_slice_mut(j).iter_mut().zip(&row.scale).for_each(|(c, s)| *c *= s);
        }
        row.factor.whiten(&mut c);
        let mut covariance = vec![0.0; p * p];
        for i in 0..p {
            for j in 0..p {
                let known: f64 =
                    c.col_as_slice(i).iter().zip(c.col_as_slice(j)).map(|(a, b)| a * b).sum();
                let prior = if i == j { self.coefficient_variance } else { 0.0 };
                covariance[i * p + j] = prior - known;
            }
        }
        Ok(Coefficients { mean, covariance })
    }

    /// Covariance of the surface, and of our doubt about its mean and its covariates' coefficients.
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        let ((a, x), (b, z)) =
            (a.split_at(a.len() - self.features), b.split_at(b.len() - self.features));
        let alike: f64 = x.iter().zip(z).map(|(x, z)| x * z).sum();
        self.kernel.covariance(a, b) + self.mean_variance + self.coefficient_variance * alike
    }

    /// [`ExactGp::covariance`] of `at` and each of `sites`, whose coordinates and times are `places`: to
    /// rounding, and all at once.
    fn column(&self, at: &[f64], places: &[&[f64]], sites: &[Vec<f64>], out: &mut [f64]) {
        let (place, z) = at.split_at(at.len() - self.features);
        self.kernel.column_of(place, places, out);
        for (out, site) in out.iter_mut().zip(sites) {
            let x = &site[place.len()..];
            let alike: f64 = x.iter().zip(z).map(|(x, z)| x * z).sum();
            *out += self.mean_variance + self.coefficient_variance * alike;
        }
    }

    /// Coordinates and times of sites, without their covariates.
    fn without_covariates<'a>(&self, sites: &'a [Vec<f64>]) -> Vec<&'a [f64]> {
        sites.iter().map(|site| &site[..site.len() - self.features]).collect()
    }

    /// The factor a posterior needs. `start` is a first guess of the latent's deviation.
    pub(super) fn absorb(&self, row: &Row, start: &[f64]) -> Result<Fitted> {
        let n = row.sites.len();
        let mut covariance = Mat::zeros(n, n);
        let places = self.without_covariates(&row.sites);
        for j in 0..n {
            let column = &mut covariance.col_as_slice_mut(j)[j..];
            self.column(&row.sites[j], &places[j..], &row.sites[j..], column);
            for i in j..n {
                covariance[(j, i)] = covariance[(i, j)];
            }
            covariance[(j, j)] += self.nugget;
        }
        if self.likelihood.counts() {
            self.laplace(row, covariance, start)
        } else {
            self.exact(row, covariance)
        }
    }

    /// Rasmussen & Williams (2006), algorithm 2.1.
    fn exact(&self, row: &Row, covariance: Mat<f64>) -> Result<Fitted> {
        let n = row.sites.len();
        let residual: Vec<f64> = row.y.iter().map(|y| y - self.mean).collect();
        let factor = Cholesky::factor(covariance)?;
        let weight = factor.solve(&residual);
        let square: f64 = residual.iter().zip(&weight).map(|(r, w)| r * w).sum();
        let log_tau = (2.0 * std::f64::consts::PI).ln();
        let log_marginal = -0.5 * (square + factor.log_det() + n as f64 * log_tau);
        let sites = row.sites.clone();
        Ok(Fitted { sites, weight, scale: vec![1.0; n], factor, log_marginal, latent: residual })
    }

    /// Rasmussen & Williams (2006), algorithm 3.1: Newton's method for the mode of the latent
    /// `f = surface + village effect − mean`, by way of `B = I + W^½ K W^½`, whose eigenvalues are
    /// never below 1.
    fn laplace(&self, row: &Row, covariance: Mat<f64>, start: &[f64]) -> Result<Fitted> {
        let n = row.sites.len();
        let times = |x: &[f64]| -> Vec<f64> {
            let column = Mat::from_fn(n, 1, |i, _| x[i]);
            let mut out = Mat::zeros(n, 1);
            matmul(
                out.as_mut(),
                Accum::Replace,
                covariance.as_ref(),
                column.as_ref(),
                1.0,
                Par::Seq,
            );
            out.col_as_slice(0).to_vec()
        };
        let law = |i: usize, f: f64| -> [f64; 3] {
            let eta = self.mean + f;
            let law =
                self.likelihood.log_probability(row.y[i], row.trials[i], eta, self.dispersion);
            law.expect("ExactGp::new asks no other likelihoods")
        };
        let log_likelihood = |f: &[f64]| -> f64 { (0..n).map(|i| law(i, f[i])[0]).sum() };
        let mut f = start.to_vec();
        let mut weight = vec![0.0; n];
        // What no step may fall below: a full one from far off a Poisson law's mode overflows. A start
        // that was told need not have the form K · weight; where it leads nowhere, 0 is the start.
        let mut objective = log_likelihood(&vec![0.0; n]);
        let mut told = start.iter().any(|f| *f != 0.0);
        let mut settled = false;
        for _ in 0..100 {
            let laws: Vec<[f64; 3]> = (0..n).map(|i| law(i, f[i])).collect();
            let w: Vec<f64> = laws.iter().map(|[.., curve]| -curve).collect();
            let root: Vec<f64> = w.iter().map(|w| w.sqrt()).collect();
            let factor = Cholesky::factor(Mat::from_fn(n, n, |i, j| {
                root[i] * covariance[(i, j)] * root[j] + if i == j { 1.0 } else { 0.0 }
            }))?;
            if settled {
                let log_marginal = objective - 0.5 * factor.log_det();
                let sites = row.sites.clone();
                return Ok(Fitted { sites, weight, scale: root, factor, log_marginal, latent: f });
            }
            let b: Vec<f64> = (0..n).map(|i| w[i] * f[i] + laws[i][1]).collect();
            let kb = times(&b);
            let inner = factor.solve(&(0..n).map(|i| root[i] * kb[i]).collect::<Vec<_>>());
            let newton: Vec<f64> = (0..n).map(|i| b[i] - root[i] * inner[i]).collect();
            // The full step, halved while it overshoots: the objective is concave, so this ends.
            let mut step = 1.0;
            loop {
                let tried: Vec<f64> =
                    (0..n).map(|i| weight[i] + step * (newton[i] - weight[i])).collect();
                let latent = times(&tried);
                let value = log_likelihood(&latent)
                    - 0.5 * tried.iter().zip(&latent).map(|(a, f)| a * f).sum::<f64>();
                let slack = 1e-9 * (1.0 + objective.abs());
                if value > objective - slack {
                    settled = !told && value - objective < slack;
                    (weight, f, objective) = (tried, latent, value);
                    break;
                }
                step *= 0.5;
                if step < 1e-6 {
                    match told {
                        true => f = vec![0.0; n],
                        false => settled = true,
                    }
                    break;
                }
            }
            told = false;
            if !objective.is_finite() {
                return Err(Error::input("the counts have no finite likelihood"));
            }
        }
        Err(Error::input("Laplace's approximation did not settle in 100 steps")
            .try_this("check the counts for extreme values"))
    }
}

/// Covariates of every site.
pub(super) fn width(sites: &Sites) -> usize {
    sites.x.as_ref().map_or(0, |x| x.dims().last().copied().unwrap_or(0))
}

/// The kernel after which a surface changes with time: `p` are logarithms of the time scale and of the
/// odds of what stays.
pub(super) fn changing(
    space: Box<dyn Kernel>,
    smoothness: Smoothness,
    p: &[f64],
) -> Box<dyn Kernel> {
    let static_share = 1.0 / (1.0 + (-p[1]).exp());
    let space: Arc<dyn Kernel> = space.into();
    Box::new(SpaceTime { space, smoothness, time_scale: p[0].exp(), static_share })
}

/// Coordinates and, behind them, times and covariates, on the host:
/// `[batch][site][dimension + time + feature]`.
pub(super) fn places(sites: &Sites, features: usize, timed: bool) -> Result<Vec<Vec<Vec<f64>>>> {
    let mut places = sites.host()?;
    if timed {
        let Some(t) = &sites.t else {
            return Err(Error::axis("times of sites and of the process", "without", "with"));
        };
        for (row, t) in places.iter_mut().zip(t.to_dtype(DType::F64)?.to_vec3::<f64>()?) {
            row.iter_mut().zip(t).for_each(|(place, t)| place.extend(t));
        }
    }
    if features == 0 {
        return Ok(places);
    }
    let found = width(sites);
    let Some(x) = sites.x.as_ref().filter(|_| found == features) else {
        return Err(Error::axis("covariates of sites and of the process", found, features));
    };
    for (row, x) in places.iter_mut().zip(x.to_dtype(DType::F64)?.to_vec3::<f64>()?) {
        row.iter_mut().zip(x).for_each(|(place, x)| place.extend(x));
    }
    Ok(places)
}

/// Rows of a context on the host, padding removed, with times, where `timed`, and `features` covariates
/// behind coordinates.
pub(crate) fn rows(
    context: &Observations,
    likelihood: &dyn Likelihood,
    features: usize,
    timed: bool,
) -> Result<Vec<Row>> {
    let sites = places(&context.sites, features, timed)?;
    let host = |x: &Tensor| -> Result<Vec<Vec<f64>>> { Ok(x.to_dtype(DType::F64)?.to_vec2()?) };
    if context.y.dims().last() != Some(&1) {
        return Err(Error::axis("outcomes per site", format!("{:?}", context.y.dims()), 1));
    }
    let (y, mask) = (host(&context.y.squeeze(2)?)?, host(&context.mask)?);
    let trials = match (&context.trials, likelihood.counts()) {
        (Some(trials), true) => host(trials)?,
        (None, true) => {
            let help = match likelihood.kind() {
                Kind::Exposure => "give --population COLUMN or --person-time COLUMN",
                _ => "give --tested COLUMN, or map a value with --value COLUMN",
            };
            return Err(Error::input(
                "counts need the number tested, or the exposure, at every site",
            )
            .try_this(help));
        }
        (_, false) => vec![Vec::new(); sites.len()],
    };
    (0..sites.len())
        .map(|b| {
            let seen: Vec<usize> = (0..sites[b].len()).filter(|i| mask[b][*i] > 0.5).collect();
            let pick = |x: &[f64]| seen.iter().filter_map(|i| x.get(*i).copied()).collect();
            let row = Row {
                sites: seen.iter().map(|i| sites[b][*i].clone()).collect(),
                y: pick(&y[b]),
                trials: pick(&trials[b]),
            };
            let open = likelihood.kind() == Kind::Exposure;
            let fits = |i: usize| {
                let (k, n) = (row.y[i], row.trials[i]);
                k >= 0.0 && if open { n > 0.0 } else { k <= n }
            };
            if likelihood.counts() && !(0..row.y.len()).all(fits) {
                return Err(Error::input(match open {
                    true => "a count is negative, or its population or person-time is not above 0",
                    false => "a count is negative or above the number tested",
                }));
            }
            let finite = row.y.iter().chain(row.sites.iter().flatten()).all(|v| v.is_finite());
            if !finite {
                return Err(Error::input("an observation or its site is not finite"));
            }
            Ok(row)
        })
        .collect()
}

impl Row {
    /// At most `most` sites, evenly spread over the row's order.
    pub(super) fn thinned(&self, most: usize) -> Row {
        let n = self.sites.len();
        let kept = n.min(most);
        let at = |j: usize| j * n / kept;
        Row {
            sites: (0..kept).map(|j| self.sites[at(j)].clone()).collect(),
            y: (0..kept).map(|j| self.y[at(j)]).collect(),
            trials: (0..kept).filter_map(|j| self.trials.get(at(j)).copied()).collect(),
        }
    }

    /// Rough mean and variance of what was seen, link scale; the variance is never zero.
    pub fn centre(&self, likelihood: &dyn Likelihood) -> (f64, f64) {
        if !likelihood.counts() {
            let (mean, sd) = crate::sites::mean_sd(&self.y);
            return (mean, sd * sd);
        }
        let open = likelihood.kind() == Kind::Exposure;
        let one = |(k, n): (&f64, &f64)| match open {
            true => ((k + 0.5) / n).ln(),
            false => ((k + 0.5) / (n - k + 0.5)).ln(),
        };
        let levels: Vec<f64> = self.y.iter().zip(&self.trials).map(one).collect();
        let (mean, sd) = crate::sites::mean_sd(&levels);
        // Part of the spread is the count's own; a village never varies by less than a little.
        (mean, (0.7 * sd * sd).max(0.05))
    }
}

/// Longest side of the box around the sites, whose last numbers are no coordinates.
pub(super) fn extent(sites: &[Vec<f64>], last: usize) -> f64 {
    let dimensions = sites.first().map_or(0, |site| site.len() - last);
    (0..dimensions)
        .map(|d| {
            let (low, high) = sites
                .iter()
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), s| (a.min(s[d]), b.max(s[d])));
            high - low
        })
        .fold(0.0, f64::max)
}

impl std::fmt::Debug for ExactGp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExactGp")
            .field("kernel", &self.kernel)
            .field("nugget", &self.nugget)
            .field("mean", &self.mean)
            .field("mean_variance", &self.mean_variance)
            .field("coefficient_variance", &self.coefficient_variance)
            .field("dispersion", &self.dispersion)
            .field("likelihood", &self.likelihood.name())
            .finish()
    }
}

impl Process for ExactGp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(Conditioned { gp: self, rows: self.absorb_all(context)? }))
    }

    fn any_dimension(&self) -> bool {
        true
    }

    fn memory(&self, sites: usize) -> Memory {
        let square = 8 * sites * sites;
        // The covariance, what is factored and the factor; a posterior keeps the factor alone.
        Memory { conditioning: 3 * square, held: square + 256 * sites, target: 8 * sites + 512 }
    }
}

impl Conditioned<'_> {
    /// Posterior mean, and `L⁻¹ (scale · c)` `[context, target]` whose columns shrink the variance.
    fn project(&self, row: &Fitted, targets: &[Vec<f64>]) -> (Vec<f64>, Mat<f64>) {
        let n = row.sites.len();
        let mut c = Mat::zeros(n, targets.len());
        let places = self.gp.without_covariates(&row.sites);
        for (j, target) in targets.iter().enumerate() {
            self.gp.column(target, &places, &row.sites, c.col_as_slice_mut(j));
        }
        let mean = (0..targets.len())
            .map(|j| self.gp.mean + (0..n).map(|i| c[(i, j)] * row.weight[i]).sum::<f64>())
            .collect();
        for j in 0..targets.len() {
            for i in 0..n {
                c[(i, j)] *= row.scale[i];
            }
        }
        row.factor.whiten(&mut c);
        (mean, c)
    }

    /// Mean of the surface at `targets`, and its covariance there.
    fn posterior(&self, row: &Fitted, targets: &[Vec<f64>]) -> (Vec<f64>, Mat<f64>) {
        let (mean, shrink) = self.project(row, targets);
        let n = targets.len();
        let mut covariance =
            Mat::from_fn(n, n, |i, j| self.gp.covariance(&targets[i], &targets[j]));
        let known = shrink.as_ref();
        matmul(covariance.as_mut(), Accum::Add, known.transpose(), known, -1.0, Par::Seq);
        (mean, covariance)
    }

    fn rows_agree(&self, targets: &Sites) -> Result<()> {
        if targets.batch() == self.rows.len() {
            return Ok(());
        }
        Err(Error::axis("rows of targets and of the context", targets.batch(), self.rows.len()))
    }
}

impl Posterior for Conditioned<'_> {
    /// In the precision of the targets' coordinates, computed in f64.
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        self.rows_agree(targets)?;
        let scatter = self.gp.likelihood.scatter(self.gp.dispersion);
        let shape = (targets.batch(), targets.len(), 1);
        let (mut mean, mut surface, mut observation) = (Vec::new(), Vec::new(), Vec::new());
        // Far below what any observation could resolve, and above zero, which is no density.
        let least = 1e-12 * (self.gp.kernel.sill() + self.gp.nugget).max(f64::MIN_POSITIVE);
        for (row, sites) in self.rows.iter().zip(self.gp.places(targets)?) {
            let chunks: Vec<_> = sites
                .par_chunks(CHUNK)
                .map(|chunk| {
                    let (mean, shrink) = self.project(row, chunk);
                    let variance: Vec<f64> = (0..chunk.len())
                        .map(|j| {
                            let known: f64 = shrink.col_as_slice(j).iter().map(|v| v * v).sum();
                            (self.gp.covariance(&chunk[j], &chunk[j]) - known).max(least)
                        })
                        .collect();
                    (mean, variance)
                })
                .collect();
            for (m, v) in chunks {
                mean.extend(m);
                surface.extend(v.iter().map(|v| v.sqrt()));
                observation.extend(v.iter().map(|v| (v + self.gp.nugget).sqrt()));
            }
        }
        let tensor = |values: Vec<f64>| {
            Tensor::from_vec(values, shape, targets.s.device())?.to_dtype(targets.s.dtype())
        };
        let link = self.gp.likelihood.link();
        let (mean, surface, observation) = (tensor(mean)?, tensor(surface)?, tensor(observation)?);
        if let [_] = scatter[..] {
            return Predictive::gaussian(link, mean, surface, observation);
        }
        // One component for each part of a village's scatter; the surface is the same in all.
        let wide = (targets.batch(), targets.len(), scatter.len());
        let each = |part: fn(&(f64, f64, f64)) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = scatter.iter().map(part).collect();
            let values = Tensor::from_vec(values, (1, 1, scatter.len()), targets.s.device())?;
            Ok(values.to_dtype(targets.s.dtype())?.broadcast_as(wide)?.contiguous()?)
        };
        let again = |x: &Tensor| x.broadcast_as(wide)?.contiguous();
        let own = each(|(_, _, sd)| sd * sd)?;
        Ok(Predictive {
            link,
            log_weight: each(|(weight, ..)| weight.ln())?,
            mean: again(&mean)?,
            surface_sd: again(&surface)?,
            observation_sd: (again(&observation)?.sqr()? + own)?.sqrt()?,
            lift: Some(each(|(_, mean, _)| *mean)?),
            law: None,
        })
    }

    /// Exact, in f64. Nothing for counts, whose joint density is no Gaussian.
    ///
    /// # Errors
    /// [`Error::Input`] where the targets' covariance is singular to rounding, as that of a smooth
    /// surface without noise is: such values have no density.
    fn joint(&self, targets: &Sites, of: Of, values: &Tensor) -> Result<Option<Tensor>> {
        self.rows_agree(targets)?;
        if self.gp.likelihood.counts() {
            return Ok(None);
        }
        let shape = [targets.batch(), targets.len(), 1];
        if values.dims() != shape {
            let found = format!("{:?}", values.dims());
            return Err(Error::axis("values and targets", found, format!("{shape:?}")));
        }
        let values = values.squeeze(2)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let noise = if of == Of::Observation { self.gp.nugget } else { 0.0 };
        let density = |((row, sites), values): ((&Fitted, Vec<Vec<f64>>), Vec<f64>)| {
            let (mean, mut covariance) = self.posterior(row, &sites);
            (0..sites.len()).for_each(|i| covariance[(i, i)] += noise);
            let factor = Cholesky::factor(covariance)?;
            if factor.jitter > 0.0 {
                return Err(Error::input(
                    "these values have no joint density: their covariance is singular",
                )
                .fact("targets", sites.len())
                .fact("noise variance", noise)
                .try_this("ask about observations, which have noise"));
            }
            let n = sites.len();
            let mut residual = Mat::from_fn(n, 1, |i, _| values[i] - mean[i]);
            factor.whiten(&mut residual);
            let square: f64 = residual.col_as_slice(0).iter().map(|v| v * v).sum();
            let log_tau = (2.0 * std::f64::consts::PI).ln();
            Ok(-0.5 * (square + factor.log_det() + n as f64 * log_tau))
        };
        let rows = self.rows.iter().zip(self.gp.places(targets)?).zip(values);
        let densities = rows.map(density).collect::<Result<Vec<f64>>>()?;
        Ok(Some(Tensor::from_vec(densities, targets.batch(), targets.s.device())?))
    }

    /// Surfaces on the link scale, for one row of targets. Laplace's approximation where counts
    /// were seen.
    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        self.rows_agree(targets)?;
        let [row] = &self.rows[..] else {
            return Err(Error::axis("rows of targets to draw surfaces over", self.rows.len(), 1));
        };
        let sites = self.gp.places(targets)?.swap_remove(0);
        let (mean, covariance) = self.posterior(row, &sites);
        let factor = Cholesky::factor(covariance)?;
        let mut values = Vec::with_capacity(n * sites.len());
        for _ in 0..n {
            let noise = factor.colour(&rng.normals(sites.len()));
            values.extend(noise.iter().zip(&mean).map(|(z, m)| m + z));
        }
        let values = Tensor::from_vec(values, (n, sites.len(), 1), targets.s.device())?;
        Ok(Draws { link: self.gp.likelihood.link(), values: values.to_dtype(targets.s.dtype())? })
    }

    /// Exact but for the waves of its prior draws, for one row of targets. Laplace's approximation
    /// where counts were seen.
    fn field(&self, draws: usize, seed: u64, extent: f64) -> Result<Box<dyn Field + '_>> {
        let [row] = &self.rows[..] else {
            return Err(Error::axis("rows of the context to draw surfaces of", self.rows.len(), 1));
        };
        Ok(Box::new(field::Dense::new(self, self.gp, row, draws, seed, extent)?))
    }
}
