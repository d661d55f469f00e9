//! Covariates for a process that knows none: a linear mean on the link scale, and the process on what is
//! left.
//!
//! The posterior is that of a sum, `surface = x·β + rest(s)`, taken apart at the coefficients:
//! `p(surface | y) = ∫ p(rest | y, β) p(β | y) dβ`. The second factor comes from the exact Gaussian
//! process with covariates ([`ExactGp`]), which reads the same sites and so does not take a trend in space
//! for an effect; the first from any process, shown the observations less `x·β`. The integral is a
//! mixture over a few β: two for each coefficient, at ± √p columns of the Cholesky factor of their
//! covariance, whose mean and covariance are right exactly (Julier & Uhlmann 2004,
//! doi:10.1109/JPROC.2003.823141, without the central point); or, for more than eight coefficients,
//! sixteen draws in pairs. What is not known of the coefficients is so passed on, and no
//! residual is ever taken for cleaner than it is, as those of a plugged-in regression would be.
//!
//! **Less x·β.** Values: subtracted, exactly. Rates: the exposure is multiplied by exp(x·β), exactly.
//! Positives among tested: the counts k′ of n′ whose empirical logit ln((k + ½)/(n − k + ½)) is less by
//! x·β at the same sampling variance 1/(k + ½) + 1/(n − k + ½). With p = (k + ½)/(n + 1) and p′ its like
//! after the shift, `k′ + ½ = (k + ½)(1 − p)/(1 − p′)` and `n′ − k′ + ½ = (n − k + ½) p/p′`. That keeps the
//! place and the width of the likelihood of the rest, which is what a model of counts reads of it; its
//! skewness is lost, which shows where one or two people were tested and the effects are large.

use std::sync::{Arc, OnceLock};

use candle_core::{D, Tensor};
use faer::Mat;

use super::{
    exact_gp::{ExactGp, rows, width},
    field,
    nearest::{Fitted, NearestGp},
};
use crate::{
    error::{Error, Result},
    kernel::Kernel,
    likelihood::Likelihood,
    linalg::lower,
    predictive::{Draws, Link, Predictive},
    process::{Field, Memory, Posterior, Process},
    rng::Stream,
    sites::{Observations, Sites},
};

/// Sites that coefficients are read from, at most, evenly spread: the cost grows with their cube.
pub const MOST_SITES: usize = 2_000;
/// Coefficients whose covariance is met exactly; beyond, half as many pairs of draws are taken.
const EXACT: usize = 8;

/// What is known of the covariates' coefficients, link scale per feature: a Gaussian law.
#[derive(Debug, Clone, PartialEq)]
pub struct Coefficients {
    /// `[feature]`.
    pub mean: Vec<f64>,
    /// Row-major `[feature, feature]`.
    pub covariance: Vec<f64>,
}

impl Coefficients {
    /// The law of the coefficients given a context of one row, and the Gaussian process it comes from.
    ///
    /// # Errors
    /// As [`ExactGp::fit`] and [`ExactGp::coefficients`].
    pub fn of(
        context: &Observations,
        likelihood: &'static dyn Likelihood,
    ) -> Result<(Self, ExactGp)> {
        let gp = ExactGp::fit(context, likelihood)?;
        Ok((Self::given(&gp, context)?, gp))
    }

    /// The law of the coefficients of a process fitted to a context of one row, of which many sites are thinned.
    ///
    /// # Errors
    /// As [`ExactGp::coefficients`].
    pub fn given(gp: &ExactGp, context: &Observations) -> Result<Self> {
        let n = context.len();
        if n <= MOST_SITES {
            return gp.coefficients(context);
        }
        let kept: Vec<u32> = (0..MOST_SITES).map(|j| (j * n / MOST_SITES) as u32).collect();
        gp.coefficients(&pick(context, &kept)?)
    }

    /// Standard deviations, `[feature]`.
    pub fn sd(&self) -> Vec<f64> {
        let p = self.mean.len();
        (0..p).map(|j| self.covariance[j * p + j].max(0.0).sqrt()).collect()
    }

    /// Coefficients of equal weight that stand for the law.
    ///
    /// # Errors
    /// [`Error::NotPositiveDefinite`] if the covariance is none.
    pub fn spread(&self) -> Result<Vec<Vec<f64>>> {
        let p = self.mean.len();
        if p == 0 {
            return Ok(vec![Vec::new()]);
        }
        let factor = lower(self.covariance.clone(), p)?;
        let mut rng = Stream::new(1, "coefficients", 0);
        let unit =
            |j: usize| (0..p).map(|i| if i == j { (p as f64).sqrt() } else { 0.0 }).collect();
        let steps: Vec<Vec<f64>> = match p <= EXACT {
            true => (0..p).map(unit).collect(),
            false => (0..EXACT).map(|_| rng.normals(p)).collect(),
        };
        let mut all = Vec::with_capacity(2 * steps.len());
        for step in steps {
            let away = factor.colour(&step);
            for sign in [1.0, -1.0] {
                all.push(self.mean.iter().zip(&away).map(|(m, a)| m + sign * a).collect());
            }
        }
        Ok(all)
    }
}

/// Sites of a context by number.
fn pick(context: &Observations, kept: &[u32]) -> Result<Observations> {
    let kept = Tensor::new(kept, context.y.device())?;
    let pick = |x: &Tensor| -> Result<Tensor> { Ok(x.contiguous()?.index_select(&kept, 1)?) };
    Ok(Observations {
        sites: context.sites.map(pick)?,
        y: pick(&context.y)?,
        mask: pick(&context.mask)?,
        trials: context.trials.as_ref().map(pick).transpose()?,
    })
}

/// `x·β` at every site, `[batch, site, 1]`.
///
/// # Errors
/// [`Error::Axis`] if sites have other covariates than there are coefficients.
fn shift(sites: &Sites, beta: &[f64]) -> Result<Tensor> {
    let found = width(sites);
    let Some(x) = sites.x.as_ref().filter(|_| found == beta.len()) else {
        return Err(Error::axis("covariates of sites and coefficients", found, beta.len()));
    };
    let beta = Tensor::from_vec(beta.to_vec(), (1, 1, beta.len()), x.device())?;
    Ok(x.broadcast_mul(&beta.to_dtype(x.dtype())?)?.sum_keepdim(D::Minus1)?)
}

/// The observations less `shift` `[batch, site, 1]` on the link scale: see the head of this file.
///
/// # Errors
/// [`Error::Input`] for counts without trials.
pub fn less(
    context: &Observations,
    shift: &Tensor,
    likelihood: &dyn Likelihood,
) -> Result<Observations> {
    let sites = Sites { x: None, ..context.sites.clone() };
    let shift = shift.to_dtype(context.y.dtype())?;
    if !likelihood.counts() {
        return Ok(Observations { sites, y: (&context.y - shift)?, ..context.clone() });
    }
    let Some(trials) = &context.trials else {
        return Err(Error::input("counts need the number tested at every site"));
    };
    if likelihood.link() == Link::Log {
        let trials = (trials * shift.squeeze(2)?.exp()?)?;
        return Ok(Observations { sites, trials: Some(trials), ..context.clone() });
    }
    let n = trials.to_dtype(context.y.dtype())?.unsqueeze(2)?;
    let (yes, no) = ((&context.y + 0.5)?, ((&n - &context.y)? + 0.5)?);
    let all = (&yes + &no)?;
    let moved = ((&yes / &no)?.log()? - shift)?;
    // p′ and 1 − p′, neither of which is ever 0.
    let p = ((moved.neg()?.exp()? + 1.0)?.recip()?, (moved.exp()? + 1.0)?.recip()?);
    let k = (((&yes * &no)? / (&all * p.1)?)? - 0.5)?.maximum(0.0)?;
    let rest = (((&yes * &no)? / (&all * p.0)?)? - 0.5)?.maximum(0.0)?;
    let trials = (&k + rest)?.squeeze(2)?;
    Ok(Observations { sites, y: k, trials: Some(trials), ..context.clone() })
}

/// A process on what covariates leave, for each of a few coefficients.
pub struct Regressed {
    inner: Arc<dyn Process + Send + Sync>,
    betas: Vec<Vec<f64>>,
    likelihood: &'static dyn Likelihood,
    standardised: bool,
    /// The same process and the law of the coefficients, where joint draws can be made of them.
    joint: Option<(Arc<NearestGp>, Coefficients)>,
}

/// Mean and sd of what was left, by which values were standardised again: `[batch, 1, 1]`.
type Level = Option<[Tensor; 2]>;

struct Conditioned<'a> {
    whole: &'a Regressed,
    parts: Vec<(Box<dyn Posterior + 'a>, Level)>,
    context: Observations,
    /// What the coefficients' mean leaves of the context, absorbed where draws are asked for, and the
    /// observations' covariates.
    middle: OnceLock<(Fitted, Mat<f64>)>,
}

impl Regressed {
    /// `inner` on what is left of the observations at each of `betas`, `[mixture][feature]`, of equal
    /// weight. `standardised` says that `inner` expects values of mean 0 and sd 1, as trained
    /// models do.
    pub fn new(
        inner: Arc<dyn Process + Send + Sync>,
        betas: Vec<Vec<f64>>,
        likelihood: &'static dyn Likelihood,
        standardised: bool,
    ) -> Self {
        Regressed { inner, betas, likelihood, standardised, joint: None }
    }

    /// The nearest-neighbour Gaussian process of what is left of the context at the coefficients' mean,
    /// with or without a `trend`, and the law of the coefficients.
    ///
    /// # Errors
    /// As [`Coefficients::of`] and [`NearestGp::fit`].
    pub fn nearest(
        context: &Observations,
        likelihood: &'static dyn Likelihood,
        trend: bool,
    ) -> Result<(Self, Coefficients, Arc<NearestGp>)> {
        let (coefficients, _) = Coefficients::of(context, likelihood)?;
        let left = less(context, &shift(&context.sites, &coefficients.mean)?, likelihood)?;
        let plain = |kernel| Ok(Box::new(kernel) as Box<dyn Kernel>);
        let inner = Arc::new(NearestGp::fit_as(&left, likelihood, &plain, trend)?);
        let all = Regressed::near(inner.clone(), coefficients.clone(), likelihood)?;
        Ok((all, coefficients, inner))
    }

    /// A nearest-neighbour process on what coefficients of a law leave. It has joint draws: of the
    /// coefficients from the law, and of the surface given them.
    ///
    /// # Errors
    /// As [`Coefficients::spread`].
    pub fn near(
        inner: Arc<NearestGp>,
        coefficients: Coefficients,
        likelihood: &'static dyn Likelihood,
    ) -> Result<Self> {
        let all = Regressed::new(inner.clone(), coefficients.spread()?, likelihood, false);
        Ok(Regressed { joint: Some((inner, coefficients)), ..all })
    }

    /// What is left of values, standardised again, and how.
    fn level(&self, left: Observations) -> Result<(Observations, Level)> {
        if self.likelihood.counts() || !self.standardised {
            return Ok((left, None));
        }
        let mask = left.mask.unsqueeze(2)?.to_dtype(left.y.dtype())?;
        let n = mask.sum_keepdim(1)?.maximum(1.0)?;
        let mean = ((&left.y * &mask)?.sum_keepdim(1)? / &n)?;
        let away = left.y.broadcast_sub(&mean)?;
        let sd = ((away.sqr()? * &mask)?.sum_keepdim(1)? / &n)?.sqrt()?.maximum(1e-6)?;
        let y = away.broadcast_div(&sd)?;
        Ok((Observations { y, ..left }, Some([mean, sd])))
    }
}

impl Process for Regressed {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let part = |beta: &Vec<f64>| -> Result<(Box<dyn Posterior + 'a>, Level)> {
            let left = less(context, &shift(&context.sites, beta)?, self.likelihood)?;
            let (left, level) = self.level(left)?;
            Ok((self.inner.condition(&left)?, level))
        };
        let parts = self.betas.iter().map(part).collect::<Result<_>>()?;
        let (context, middle) = (context.clone(), OnceLock::new());
        Ok(Box::new(Conditioned { whole: self, parts, context, middle }))
    }

    fn any_dimension(&self) -> bool {
        self.inner.any_dimension()
    }

    fn memory(&self, sites: usize) -> Memory {
        let one = self.inner.memory(sites);
        let held = self.betas.len() * one.held;
        Memory { conditioning: one.conditioning + held, held, target: 2 * one.target }
    }
}

impl Conditioned<'_> {
    /// What the coefficients' mean leaves of the context, and the observations' covariates.
    fn middle(&self, gp: &NearestGp, law: &Coefficients) -> Result<&(Fitted, Mat<f64>)> {
        if let Some(middle) = self.middle.get() {
            return Ok(middle);
        }
        let (context, likelihood) = (&self.context, self.whole.likelihood);
        let left = less(context, &shift(&context.sites, &law.mean)?, likelihood)?;
        let (mut absorbed, given) =
            (gp.absorb_all(&left)?, rows(context, likelihood, law.mean.len(), false)?);
        let (Some(row), [given]) = (absorbed.pop(), &given[..]) else {
            return Err(Error::axis("rows of the context to draw surfaces of", given.len(), 1));
        };
        let x = field::behind(&given.sites, law.mean.len());
        Ok(self.middle.get_or_init(|| (row, x)))
    }

    /// Each part's answer in the units of the whole: `of` the part, moved by `x·β`.
    fn each<T>(
        &self,
        targets: &Sites,
        of: impl Fn(&dyn Posterior, &Sites, &Move) -> Result<T>,
    ) -> Result<Vec<T>> {
        let bare = Sites { x: None, ..targets.clone() };
        let parts = self.whole.betas.iter().zip(&self.parts);
        parts
            .map(|(beta, (posterior, level))| {
                of(&**posterior, &bare, &Move { shift: shift(targets, beta)?, level })
            })
            .collect()
    }
}

/// From what is left back to the whole.
struct Move<'a> {
    /// `[batch, target, 1]`.
    shift: Tensor,
    level: &'a Level,
}

impl Move<'_> {
    /// A level on the link scale, `[batch, target, component]`.
    fn level(&self, of: &Tensor) -> Result<Tensor> {
        let shift = self.shift.to_dtype(of.dtype())?;
        Ok(match self.level {
            Some([mean, sd]) => of.broadcast_mul(sd)?.broadcast_add(mean)?.broadcast_add(&shift)?,
            None => of.broadcast_add(&shift)?,
        })
    }

    /// An sd.
    fn sd(&self, of: &Tensor) -> Result<Tensor> {
        Ok(match self.level {
            Some([_, sd]) => of.broadcast_mul(sd)?,
            None => of.clone(),
        })
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let share = (self.parts.len() as f64).ln();
        let parts = self.each(targets, |posterior, bare, back| {
            let part = posterior.at(bare)?;
            let lift = part.lift.as_ref().map(|lift| back.sd(lift)).transpose()?;
            Ok(Predictive {
                log_weight: (&part.log_weight - share)?,
                mean: back.level(&part.mean)?,
                surface_sd: back.sd(&part.surface_sd)?,
                observation_sd: back.sd(&part.observation_sd)?,
                lift,
                law: None,
                ..part
            })
        })?;
        let join = |of: &dyn Fn(&Predictive) -> &Tensor| -> Result<Tensor> {
            let each: Vec<&Tensor> = parts.iter().map(of).collect();
            Ok(Tensor::cat(&each, D::Minus1)?)
        };
        let Some(first) = parts.first() else {
            return Err(Error::input("a regression needs coefficients"));
        };
        // Of one process: all have one, or none.
        let lifts: Vec<&Tensor> = parts.iter().filter_map(|p| p.lift.as_ref()).collect();
        Ok(Predictive {
            link: first.link,
            log_weight: join(&|p| &p.log_weight)?,
            mean: join(&|p| &p.mean)?,
            surface_sd: join(&|p| &p.surface_sd)?,
            observation_sd: join(&|p| &p.observation_sd)?,
            lift: match lifts.len() {
                n if n == parts.len() => Some(Tensor::cat(&lifts, D::Minus1)?),
                _ => None,
            },
            law: None,
        })
    }

    fn tally(&self) -> Option<[u64; 2]> {
        let each = self.parts.iter().filter_map(|(posterior, _)| posterior.tally());
        each.reduce(|a, b| [a[0] + b[0], a[1] + b[1]])
    }

    /// As many of each part as of every other, to one.
    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        if targets.batch() != 1 {
            return Err(Error::axis("rows of targets to draw surfaces over", targets.batch(), 1));
        }
        let bare = Sites { x: None, ..targets.clone() };
        let count = self.parts.len();
        let mut all = Vec::new();
        let mut link = self.parts.first().map(|_| Link::Identity);
        for (i, (beta, (posterior, level))) in self.whole.betas.iter().zip(&self.parts).enumerate()
        {
            let each = n / count + usize::from(i < n % count);
            if each == 0 {
                continue;
            }
            let drawn = posterior.draws(&bare, each, rng)?;
            let back = Move { shift: shift(targets, beta)?, level };
            link = Some(drawn.link);
            all.push(back.level(&drawn.values)?);
        }
        let Some(link) = link.filter(|_| !all.is_empty()) else {
            return Err(Error::input("no surface was asked for"));
        };
        Ok(Draws { link, values: Tensor::cat(&all, 0)? })
    }

    /// Of each draw, coefficients from their law and the surface given them. For counts the noise of
    /// Laplace's pseudo-values is that at the coefficients' mean.
    fn field(&self, draws: usize, seed: u64, extent: f64) -> Result<Box<dyn Field + '_>> {
        let Some((gp, law)) = &self.whole.joint else { return Err(Error::NoJointDraws) };
        let (row, x) = self.middle(gp, law)?;
        Ok(Box::new(field::Local::new(gp, row, Some((law, x)), (draws, seed), extent)?))
    }
}

impl std::fmt::Debug for Regressed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Regressed")
            .field("betas", &self.betas)
            .field("likelihood", &self.likelihood.name())
            .finish()
    }
}
