//! How places move together, where a model knows each of them alone.
//!
//! A network that is asked about each place alone still knows how they hang together: told of one more
//! village, it changes what it says of all places. For a Gaussian posterior that change is the
//! covariance with the village's place, up to a factor,
//!
//! ```text
//! E[f(b) | data, y at a] − E[f(b) | data] = cov(f(a), f(b)) / var(y) · (y − E[y])
//! ```
//!
//! so that villages told at some places, one at a time and each of them once high and once low, give the
//! correlations between all of them, whatever the village effect. Draws need a field that can be asked
//! anywhere: that of the Gaussian process whose posterior, given the same sites, has correlations as near
//! to these as any has. So what the network has learned of steps and trends, which no such process knows,
//! is in the strength of the dependence, though not in its shape.
//!
//! Telling a network what it might see is due to Bruinsma et al. (2023), arXiv:2303.14468, who draw so,
//! target after target.

use candle_core::{DType, Device, Tensor};
use faer::{Accum, Mat, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use crate::{
    baseline::{ExactGp, IntegratedGp, NearestGp, Regressed, nelder_mead::minimise},
    error::{Error, Result},
    geo::{
        frame::Frame,
        grid::{Grid, Window},
    },
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood::{Kind, Likelihood},
    linalg::Cholesky,
    predictive::{Of, Predictive},
    process::{Posterior, Process},
    rng::Stream,
    sites::{Observations, Sites},
};

/// Sites up to which the dependence between places is that of an exact Gaussian process.
pub const EXACT_SITES: usize = 1_500;

/// Places between which a network is asked how they move together, at most and at least; and sites that
/// all of them may be told beside, which is what asking costs.
pub const ANCHORS: usize = 48;
const LEAST_ANCHORS: usize = 16;
const BESIDE: usize = 24_000;

/// Places that it takes at least.
pub const FEWEST: usize = 3;

/// Sites, in all of them, that are told at once: memory and speed.
const TOLD: usize = 8_192;

/// People tested in a village that is told of.
const PEOPLE: f64 = 100.0;

/// The Gaussian process whose field stands for the dependence between places, where nothing better is
/// known: fitted to the same context, exact or of nearest neighbours, with its covariates where it has
/// some.
///
/// # Errors
/// As [`ExactGp::fit`].
pub fn fitted(
    context: &Observations,
    likelihood: &'static dyn Likelihood,
) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(match (context.len() <= EXACT_SITES, &context.sites.x) {
        (true, _) => Box::new(IntegratedGp::fit(context, likelihood)?),
        (false, None) => Box::new(NearestGp::fit(context, likelihood)?),
        (false, Some(_)) => Box::new(Regressed::nearest(context, likelihood, false)?.0),
    })
}

/// Whether a network can be asked how places move together: on surveys of places alone, and not too many.
pub fn can_be_asked(context: &Observations) -> bool {
    let sites = &context.sites;
    context.len() <= EXACT_SITES && sites.batch() == 1 && sites.t.is_none() && sites.x.is_none()
}

/// The Gaussian process whose posterior correlations between `places` are nearest to those that `process`
/// has there, given the same `context`, on which `posterior` is already conditioned.
///
/// # Shapes
/// `context` and `places` have one row, on the device of `process`.
/// # Errors
/// [`Error::Input`] for a context that [cannot be asked about](can_be_asked), or for fewer than three places;
/// else as [`ExactGp::fit`] and conditioning.
pub fn learned(
    (process, posterior): (&dyn Process, &dyn Posterior),
    context: &Observations,
    places: &Sites,
    likelihood: &'static dyn Likelihood,
) -> Result<ExactGp> {
    if !can_be_asked(context) || places.batch() != 1 || places.len() < FEWEST {
        return Err(Error::input(
            "dependence is learned between places of one survey, without times",
        )
        .fact("sites", context.len())
        .fact("places", places.len()));
    }
    let places = &places.map(|x| Ok(x.to_dtype(context.sites.s.dtype())?))?;
    let wanted = correlations(process, posterior, context, places, likelihood)?;
    let start = ExactGp::fit(context, likelihood)?;
    let given = Given {
        sites: context.sites.host()?.swap_remove(0),
        noise: noise(posterior, context)?,
        places: places.host()?.swap_remove(0),
        level: start.mean_variance,
    };
    let sill = start.kernel.sill();
    let of = |smoothness, p: &[f64]| {
        let length_scale = p[0].exp();
        (Matern { smoothness, length_scale, sill, metric: Metric::Euclidean }, p[1].exp())
    };
    let miss = |smoothness, p: &[f64]| {
        let (kernel, nugget) = of(smoothness, p);
        given.correlations(&kernel, nugget).map_or(f64::INFINITY, |found| apart(&found, &wanted))
    };
    // Far and wide first, then down from the best of each smoothness.
    let nugget = start.nugget.max(0.02 * sill);
    let lengths = [0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0];
    let each = [Smoothness::Half, Smoothness::ThreeHalves, Smoothness::FiveHalves];
    let tried = each.into_par_iter().map(|smoothness| {
        let grid =
            lengths.into_iter().flat_map(|l| [0.2, 1.0].map(|n| [l, n * nugget].map(f64::ln)));
        let best = grid
            .map(|p| (miss(smoothness, &p), p))
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .expect("there are lengths to try");
        let (p, value) = minimise(|p| miss(smoothness, p), &best.1, 0.4, 1e-4, 30);
        (value, smoothness, p)
    });
    let tried: Vec<_> = tried.collect();
    let best = tried.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("three were tried");
    if !best.0.is_finite() {
        return Err(Error::input("no Gaussian process moves as the model does")
            .try_this("use --model gp, whose draws are its own"));
    }
    let (kernel, nugget) = of(best.1, &best.2);
    let gp = ExactGp::new(Box::new(kernel), nugget, start.mean, likelihood)?;
    gp.uncertain_mean(start.mean_variance).dispersed(start.dispersion)
}

/// Root mean square difference of two correlations, between different places.
fn apart(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let n = a.nrows();
    let pairs = (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
    let square: f64 = pairs.map(|p| (a[p] - b[p]).powi(2)).sum();
    (2.0 * square / (n * (n - 1)) as f64).sqrt()
}

/// Mean of the surface at each target, link scale: `[batch, target]`.
fn means(predictive: &Predictive) -> Result<Tensor> {
    Ok((predictive.log_weight.exp()? * predictive.mean_of(Of::Surface)?)?.sum(2)?)
}

/// Mean and sd of the surface at each target of one row, link scale.
fn moments(posterior: &dyn Posterior, targets: &Sites) -> Result<Vec<(f64, f64)>> {
    let marginals = posterior.at(targets)?.marginals(0, Of::Surface)?;
    let one = |i: usize| {
        let of = |f: fn(f64, f64) -> f64| -> f64 {
            marginals.components(i).map(|(weight, mean, sd)| weight * f(mean, sd)).sum()
        };
        let mean = of(|mean, _| mean);
        (mean, (of(|mean, sd| mean * mean + sd * sd) - mean * mean).max(f64::MIN_POSITIVE).sqrt())
    };
    Ok((0..marginals.len()).map(one).collect())
}

/// What counting adds to the variance of each observation, link scale²: nothing for values.
fn noise(posterior: &dyn Posterior, context: &Observations) -> Result<Vec<f64>> {
    let Some(trials) = &context.trials else { return Ok(vec![0.0; context.len()]) };
    let predictive = posterior.at(&context.sites)?;
    let mean: Vec<f64> = means(&predictive)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
    let trials: Vec<f64> = trials.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
    let one = |(n, mean): (&f64, &f64)| 1.0 / (n * predictive.link.slope(*mean)).max(1e-6);
    Ok(trials.iter().zip(&mean).map(one).collect())
}

/// One village each at some places, with surfaces `levels`: `y` and `trials`.
fn villages(levels: &[f64], middles: &[f64], likelihood: &dyn Likelihood) -> [Vec<f64>; 2] {
    let link = likelihood.link();
    let one = |(level, middle): (&f64, &f64)| match likelihood.kind() {
        Kind::Value | Kind::Positive => [*level, 1.0],
        Kind::Tested => [PEOPLE * link.outcome(*level), PEOPLE],
        Kind::Single => [f64::from(level > middle), 1.0],
        Kind::Exposure => {
            let exposure = PEOPLE / link.outcome(*middle);
            [exposure * link.outcome(*level), exposure]
        }
    };
    let both: Vec<[f64; 2]> = levels.iter().zip(middles).map(one).collect();
    [0, 1].map(|k| both.iter().map(|v| v[k]).collect())
}

/// Correlations of the surface between places, as the process itself has them.
fn correlations(
    process: &dyn Process,
    posterior: &dyn Posterior,
    context: &Observations,
    places: &Sites,
    likelihood: &dyn Likelihood,
) -> Result<Mat<f64>> {
    let n = places.len();
    let moments = moments(posterior, places)?;
    let (middles, sds): (Vec<f64>, Vec<f64>) = moments.into_iter().unzip();
    let (dtype, device) = (context.y.dtype(), context.y.device());
    let mut moved = Mat::zeros(n, n); // of place i when one is told of village j
    let at_once = (TOLD / (context.len() + 1)).clamp(1, n);
    for start in (0..n).step_by(at_once) {
        let rows = at_once.min(n - start);
        let here = start..start + rows;
        let again = |x: &Tensor| -> Result<Tensor> { Ok(x.repeat((rows, 1, 1))?.contiguous()?) };
        let own = places.s.narrow(1, start, rows)?.transpose(0, 1)?.contiguous()?;
        let sites = Sites::new(Tensor::cat(&[&again(&context.sites.s)?, &own], 1)?);
        let everywhere = Sites::new(again(&places.s)?);
        let told = |sign: f64| -> Result<Tensor> {
            let levels: Vec<f64> = here.clone().map(|i| middles[i] + sign * sds[i]).collect();
            let [y, trials] = villages(&levels, &middles[here.clone()], likelihood);
            let village = |v: Vec<f64>| -> Result<Tensor> {
                Ok(Tensor::from_vec(v, (rows, 1, 1), device)?.to_dtype(dtype)?)
            };
            let with = |x: &Tensor, more: &Tensor| Tensor::cat(&[x, more], 1);
            let trials = match &context.trials {
                Some(own) => {
                    let own = again(&own.unsqueeze(2)?)?;
                    Some(with(&own, &village(trials)?)?.squeeze(2)?)
                }
                None => None,
            };
            let y = with(&again(&context.y)?, &village(y)?)?;
            let mut seen = Observations::new(sites.clone(), y, trials)?;
            let mask = again(&context.mask.unsqueeze(2)?)?;
            seen.mask = with(&mask, &village(vec![1.0; rows])?)?.squeeze(2)?;
            means(&process.condition(&seen)?.at(&everywhere)?)
        };
        let change = (told(1.0)? - told(-1.0)?)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        for (change, j) in change.iter().zip(here) {
            // A village that moves nothing where it lies says nothing of anywhere.
            let own = change[j] / sds[j];
            let most = change.iter().zip(&sds).map(|(c, sd)| (c / sd).abs()).fold(0.0, f64::max);
            for i in 0..n {
                let share = change[i] / sds[i] / own;
                moved[(i, j)] = if own > 0.01 * most { share.clamp(-1.0, 1.0) } else { 0.0 };
            }
        }
    }
    Ok(Mat::from_fn(n, n, |i, j| if i == j { 1.0 } else { 0.5 * (moved[(i, j)] + moved[(j, i)]) }))
}

/// What posterior correlations hang on beside the covariance.
struct Given {
    sites: Vec<Vec<f64>>,
    noise: Vec<f64>,
    places: Vec<Vec<f64>>,
    /// Variance of the mean.
    level: f64,
}

impl Given {
    /// Correlations of the surface between the places, given observations at the sites.
    fn correlations(&self, kernel: &dyn Kernel, nugget: f64) -> Result<Mat<f64>> {
        let (n, m) = (self.sites.len(), self.places.len());
        let with = |a: &[f64], b: &[f64]| kernel.covariance(a, b) + self.level;
        let sites: Vec<&[f64]> = self.sites.iter().map(Vec::as_slice).collect();
        let column = |at: &[f64], sites: &[&[f64]], out: &mut [f64]| {
            kernel.column_of(at, sites, out);
            out.iter_mut().for_each(|c| *c += self.level);
        };
        let mut own = Mat::zeros(n, n); // whose lower triangle is read
        for j in 0..n {
            column(sites[j], &sites[j..], &mut own.col_as_slice_mut(j)[j..]);
            own[(j, j)] += self.noise[j] + nugget;
        }
        let factor = Cholesky::factor(own)?;
        let mut between = Mat::zeros(n, m);
        for (j, place) in self.places.iter().enumerate() {
            column(place, &sites, between.col_as_slice_mut(j));
        }
        factor.whiten(&mut between);
        let mut covariance = Mat::from_fn(m, m, |i, j| with(&self.places[i], &self.places[j]));
        let known = between.as_ref();
        matmul(covariance.as_mut(), Accum::Add, known.transpose(), known, -1.0, Par::Seq);
        let sd = |i: usize| covariance[(i, i)].max(f64::MIN_POSITIVE).sqrt();
        Ok(Mat::from_fn(m, m, |i, j| covariance[(i, j)] / (sd(i) * sd(j))))
    }
}

/// Places of a map between which a network is asked that has seen so many sites: centres of pixels that chance
/// picks, and always the same. Fewer where few pixels are wanted.
///
/// # Errors
/// As [`Frame::sites`].
pub fn anchors(grid: &Grid, frame: &Frame, sites: usize, device: &Device) -> Result<Sites> {
    let wanted = (BESIDE / sites.max(1)).clamp(LEAST_ANCHORS, ANCHORS);
    let mut rng = Stream::new(0, "anchors of a dependence", 0);
    let (mut x, mut y) = (Vec::new(), Vec::new());
    for _ in 0..100 * ANCHORS {
        let (row, col) = (rng.below(grid.rows), rng.below(grid.cols));
        if grid.valid(Window { row, col, rows: 1, cols: 1 })[0] {
            let centre = grid.centre(row, col);
            x.push(centre.0);
            y.push(centre.1);
        }
        if x.len() == wanted {
            break;
        }
    }
    frame.sites(&grid.crs, &x, &y, device)
}
