//! What makes a context likely: the parameters of an exact Gaussian process, the best of them and those
//! about it.
//!
//! Likelihood leaves room for parameters other than the best, and a survey of a hundred sites leaves much: a
//! process that takes its one kernel for known is too sure, of means over districts above all. So, as
//! R-INLA does, the posterior of the parameters is explored about its mode, on a few points along the
//! axes of its Hessian; of every smoothness, whose share is the mass about its own mode. Their processes are
//! mixed ([`IntegratedGp`](super::IntegratedGp)).
//!
//! Source: Rue, Martino & Chopin (2009), doi:10.1111/j.1467-9868.2008.00700.x, sections 3.1 and 6.5: axes,
//! their lengths to either side, and weights that are right for Gaussian posteriors; without the corners of
//! their design, which say how parameters act on a prediction together.

use faer::{Mat, Side};

use super::{
    exact_gp::{ExactGp, MadeOf, Row, changing, extent, rows, width},
    nelder_mead::minimise,
};
use crate::{
    error::{Error, Result},
    kernel::{Matern, Metric, Smoothness},
    likelihood::Likelihood,
    sites::Observations,
};

/// Sites that [`ExactGp::fit`] looks at, at most: its cost grows with their cube. The posterior is
/// always conditioned on every site.
pub const FIT_SITES: usize = 400;

/// How far from the mode the points lie: so many times the sphere on which a Gaussian of so many dimensions
/// has its mass. Rue, Martino & Chopin's.
const REACH: f64 = 1.1;

/// Points that have less weight than this are left out.
const LEAST: f64 = 0.01;

/// Smoothness in space, and in time.
type Smooth = (Smoothness, Smoothness);

/// Logarithms of parameters: length scale, sill, nugget; the size of negative binomial counts; the time scale
/// and the odds of what stays; the variance of the covariates' coefficients. Those that there are.
type Parameters = Vec<f64>;

/// The best parameters.
struct Peak {
    cost: f64,
    at: Parameters,
    smooth: Smooth,
    /// Where Newton's search may start near it.
    latent: Vec<f64>,
}

/// Parameters sought for one context.
pub(super) struct Search<'a> {
    row: Row,
    likelihood: &'static dyn Likelihood,
    of: MadeOf<'a>,
    features: usize,
    timed: bool,
    sized: bool,
    extent: f64,
    centre: f64,
    variance: f64,
    /// Centre and sd of the log-normal penalty of each parameter.
    belief: Vec<(f64, f64)>,
}

impl<'a> Search<'a> {
    /// # Errors
    /// As [`ExactGp::fit`].
    pub fn new(
        context: &Observations,
        likelihood: &'static dyn Likelihood,
        of: MadeOf<'a>,
    ) -> Result<Self> {
        let (features, timed) = (width(&context.sites), context.sites.t.is_some());
        let rows = rows(context, likelihood, features, timed)?;
        let [row] = &rows[..] else {
            return Err(Error::axis("rows to fit one Gaussian process to", rows.len(), 1));
        };
        let extent = extent(&row.sites, features + usize::from(timed));
        if row.sites.len() < 3 || !(extent > 0.0 && extent.is_finite()) {
            return Err(Error::input("a Gaussian process needs three sites in different places")
                .fact("sites", row.sites.len())
                .try_this("check the coordinates, or add sites"));
        }
        let row = row.thinned(FIT_SITES);
        let (centre, variance) = row.centre(likelihood);
        // Weak, for sd 1.5 allows a factor of 20.
        let mut belief = vec![(0.25 * extent, 1.25), (variance, 1.5), (0.2 * variance, 2.0)];
        let sized = likelihood.dispersion().is_some();
        if sized {
            belief.push((5.0, 2.0));
        }
        if timed {
            // The span of a survey's times is 2 model units; the other are the odds of what stays.
            belief.extend([(1.0, 1.5), (1.0, 1.5)]);
        }
        if features > 0 {
            belief.push((0.2 * variance, 1.5));
        }
        Ok(Search { row, likelihood, of, features, timed, sized, extent, centre, variance, belief })
    }

    fn process(&self, (smoothness, in_time): Smooth, p: &[f64]) -> Result<ExactGp> {
        let (length_scale, sill) = (p[0].exp(), p[1].exp());
        let kernel = Matern { smoothness, length_scale, sill, metric: Metric::Euclidean };
        let kernel = match self.timed {
            true => changing((self.of)(kernel)?, in_time, &p[3 + usize::from(self.sized)..]),
            false => (self.of)(kernel)?,
        };
        let gp = ExactGp::new(kernel, p[2].exp(), self.centre, self.likelihood)?;
        // Broad for a logit as for standardised values: the data move it at no visible price.
        let doubt = if self.likelihood.counts() { 25.0 } else { 100.0 * self.variance };
        let coefficients = if self.features > 0 { p[p.len() - 1].exp() } else { 0.0 };
        let gp = gp.uncertain_mean(doubt).with_covariates(self.features, coefficients)?;
        if self.sized { gp.dispersed(p[3].exp()) } else { Ok(gp) }
    }

    fn penalty(&self, p: &[f64]) -> f64 {
        let terms = p.iter().zip(&self.belief).map(|(x, (c, sd))| ((x - c.ln()) / sd).powi(2));
        0.5 * terms.sum::<f64>()
    }

    /// Minus the log posterior of parameters, up to a constant; ∞ where the arithmetic fails, which is no
    /// candidate. Newton's search starts at `latent`, and leaves there where it ended: neighbouring
    /// parameters have neighbouring modes.
    fn cost(&self, smooth: Smooth, p: &[f64], latent: &mut Vec<f64>) -> f64 {
        let fitted = self.process(smooth, p).and_then(|gp| gp.absorb(&self.row, latent));
        let Ok(fitted) = fitted else { return f64::INFINITY };
        let cost = self.penalty(p) - fitted.log_marginal;
        *latent = fitted.latent;
        if cost.is_finite() { cost } else { f64::INFINITY }
    }

    fn no_latent(&self) -> Vec<f64> {
        vec![0.0; self.row.sites.len()]
    }

    /// The best parameters of each smoothness, the best of all first.
    fn peaks(&self) -> Result<Vec<Peak>> {
        let mut peaks: Vec<Peak> = Vec::new();
        // Two parameters more, and no need to know the peak to the last digit.
        let close = if self.timed { 1e-2 } else { 1e-4 };
        // At last, a smoother change with time for the best.
        let spaces = [Smoothness::Half, Smoothness::ThreeHalves, Smoothness::FiveHalves];
        for space in spaces.map(Some).into_iter().chain([None]) {
            let smooth = match (space, peaks.first()) {
                (Some(space), _) => (space, Smoothness::Half),
                (None, Some(best)) if self.timed => (best.smooth.0, Smoothness::ThreeHalves),
                (None, _) => continue,
            };
            let mut latent = self.no_latent();
            let mut cost = |p: &[f64]| self.cost(smooth, p, &mut latent);
            let starts = match peaks.first() {
                // Rougher kernels have explored: begin at their answer, and where they did not.
                Some(best) => vec![best.at.clone()],
                None => [0.05, 0.3].map(|part| self.start(part)).to_vec(),
            };
            let found = starts.iter().map(|start| minimise(&mut cost, start, 0.6, close, 200));
            if let Some((at, cost)) = found.min_by(|a, b| a.1.total_cmp(&b.1)) {
                peaks.push(Peak { cost, at, smooth, latent });
            }
            peaks.sort_by(|a, b| a.cost.total_cmp(&b.cost));
        }
        match peaks.first() {
            Some(best) if best.cost.is_finite() => Ok(peaks),
            _ => Err(Error::input("no Gaussian process could be fitted to the observations")
                .try_this("check the outcomes for extreme values")),
        }
    }

    /// Where to begin, with a length scale of this part of the sites' extent.
    fn start(&self, part: f64) -> Parameters {
        let size = if self.sized { &[5.0][..] } else { &[] };
        let time = if self.timed { &[1.0, 1.0][..] } else { &[] };
        let last = if self.features > 0 { Some(0.1 * self.variance) } else { None };
        let start = [part * self.extent, 0.7 * self.variance, 0.2 * self.variance];
        start.iter().chain(size).chain(time).copied().chain(last).map(f64::ln).collect()
    }

    /// The most likely process.
    pub fn best(&self) -> Result<ExactGp> {
        self.told(&self.peaks()?[0])
    }

    fn told(&self, peak: &Peak) -> Result<ExactGp> {
        let mut gp = self.process(peak.smooth, &peak.at)?;
        gp.log_marginal = Some(self.penalty(&peak.at) - peak.cost);
        Ok(gp)
    }

    /// The most likely process, and those about it and about the best of other smoothnesses, each with the
    /// logarithm of its weight, which sum to 1.
    pub fn all(&self) -> Result<Vec<(f64, ExactGp)>> {
        let peaks = self.peaks()?;
        let mut all = Vec::new();
        for peak in peaks.iter().filter(|peak| peak.cost < peaks[0].cost - LEAST.ln()) {
            self.about(peak, peaks[0].cost, &mut all)?;
        }
        let total = |all: &[(f64, ExactGp)]| all.iter().map(|(log, _)| log.exp()).sum::<f64>();
        let whole = total(&all);
        let mut best = true;
        all.retain(|(log, _)| std::mem::take(&mut best) || log.exp() > LEAST * whole);
        let whole = total(&all).ln();
        all.iter_mut().for_each(|(log, _)| *log -= whole);
        Ok(all)
    }

    /// A peak and the points about it, each with the logarithm of its mass, the density of `lowest` being 1.
    fn about(&self, peak: &Peak, lowest: f64, all: &mut Vec<(f64, ExactGp)>) -> Result<()> {
        let axes = self.axes(peak);
        let m = peak.at.len() as f64;
        let (reach, points) = (m.sqrt() * REACH, 2.0 * m);
        // A Gaussian's mass, but for what all of as many parameters share.
        let volume: f64 = axes.iter().map(|(_, sds)| (0.5 * (sds[0] + sds[1])).ln()).sum();
        let mass = volume + lowest - peak.cost;
        all.push((mass + (1.0 - REACH.powi(-2)).ln(), self.told(peak)?));
        for (axis, sds) in axes {
            for (sign, sd) in [1.0, -1.0].into_iter().zip(sds) {
                let p: Parameters =
                    peak.at.iter().zip(&axis).map(|(x, v)| x + sign * reach * sd * v).collect();
                let fallen = self.cost(peak.smooth, &p, &mut peak.latent.clone()) - peak.cost;
                // A Gaussian's density there, and its longer side has more of its mass.
                let share = 2.0 * sd / (sds[0] + sds[1]) / (points * REACH * REACH);
                let log = mass + share.ln() + 0.5 * reach * reach - fallen;
                if log.is_finite() {
                    all.push((log, self.process(peak.smooth, &p)?));
                }
            }
        }
        Ok(())
    }

    /// Axes of the Hessian at the peak, and the posterior's sd to either side of each.
    fn axes(&self, peak: &Peak) -> Vec<(Parameters, [f64; 2])> {
        const STEP: f64 = 0.25;
        let m = peak.at.len();
        let cost = |moves: &[(usize, f64)]| {
            let mut p = peak.at.clone();
            moves.iter().for_each(|(i, by)| p[*i] += by);
            self.cost(peak.smooth, &p, &mut peak.latent.clone())
        };
        let at = |moves: &[(usize, f64)]| cost(moves) - peak.cost;
        let mut hessian = Mat::zeros(m, m);
        for i in 0..m {
            hessian[(i, i)] = (at(&[(i, STEP)]) + at(&[(i, -STEP)])) / (STEP * STEP);
            for j in 0..i {
                let corner = |a: f64, b: f64| at(&[(i, a * STEP), (j, b * STEP)]);
                let mixed =
                    corner(1.0, 1.0) - corner(1.0, -1.0) - corner(-1.0, 1.0) + corner(-1.0, -1.0);
                hessian[(i, j)] = mixed / (4.0 * STEP * STEP);
                hessian[(j, i)] = hessian[(i, j)];
            }
        }
        let finite = (0..m).all(|i| (0..m).all(|j| hessian[(i, j)].is_finite()));
        let eigen = match finite {
            true => hessian.self_adjoint_eigen(Side::Lower).ok(),
            false => None,
        };
        let Some(eigen) = eigen else { return Vec::new() };
        let axis = |k: usize| -> Vec<f64> { (0..m).map(|i| eigen.U()[(i, k)]).collect() };
        (0..m)
            .map(|k| {
                let axis = axis(k);
                // No flatter than what is believed without data.
                let flattest = self.belief.iter().map(|(_, sd)| *sd).fold(0.0, f64::max);
                let sd = 1.0 / eigen.S()[k].max(flattest.powi(-2)).sqrt();
                // The length at which the density has fallen as a Gaussian's has at √2 sds.
                let side = |sign: f64| {
                    let by = |by: f64| -> Vec<(usize, f64)> {
                        axis.iter().enumerate().map(|(i, v)| (i, sign * by * v)).collect()
                    };
                    let fallen = at(&by(std::f64::consts::SQRT_2 * sd));
                    match fallen.is_finite() && fallen > 0.0 {
                        true => sd * fallen.powf(-0.5).clamp(1.0 / 3.0, 2.0),
                        false => sd / 3.0,
                    }
                };
                (axis.clone(), [side(1.0), side(-1.0)])
            })
            .collect()
    }
}
