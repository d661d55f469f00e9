//! The nearest-neighbour Gaussian process (Vecchia's approximation), in f64: kriging whose time and
//! memory are linear in the sites.
//!
//! Sources: Vecchia (1988), doi:10.1111/j.2517-6161.1988.tb01729.x; Guinness (2018),
//! arXiv:1609.05372, for the order of the sites; Zilber & Katzfuss (2021), arXiv:1906.07828, for
//! counts.
//!
//! **Density.** Sites stand in an order in which early ones are far apart. The joint density of the
//! observations is the product of each one's density given the `previous` nearest before it. It is
//! the *noisy* observation that is conditioned, as in GpGp: sites at one place are then no special
//! case and no sparse matrix is ever made. The price: where the nugget is several times the sill, 30
//! noisy neighbours say less of the surface than the whole neighbourhood would.
//!
//! **Prediction.** Each target is kriged from `near` observations, however the others are asked for: half
//! of them the nearest, the others the nearest among ever fewer sites that are spread over everything, so
//! that a place in a gap hears all of its sides. The mean of the surface is estimated from all sites. The
//! farthest half of each part fades out, so that a map has no steps where one neighbour replaces another.
//! Fitting chooses `near` by what twice as many would add, which is how a large nugget is paid for.
//!
//! **Counts.** A count of few trials says little, and 30 of them say little more: here the surface itself
//! is what each place has in common with its neighbours, and Laplace's approximation, at the mode of all
//! counts together, is what they say of it: see `latent.rs`. A target is kriged from the
//! surface at `near` sites.
//!
//! **Direction and trend.** Neighbours are those that the kernel finds near ([`Kernel::unstretch`]). A
//! mean may be linear in the coordinates ([`NearestGp::sloped`]): its slopes are integrated out, which is
//! universal kriging.
//!
//! **Time.** Where the kernel changes with time, sites have a third coordinate: their time, stretched so
//! that one length scale in time is as long as one in space (Datta et al. 2016, doi:10.1214/16-AOAS931).
//! The mean's slopes are along the plane alone.
//!
//! With as many neighbours as sites, all of it equals [`ExactGp`](super::ExactGp).

use candle_core::Tensor;
use faer::Mat;
use rayon::prelude::*;

use super::{
    elimination::{LANES, LEVELS, Lane, row_of},
    exact_gp::{MadeOf, Row, changing, check_levels, places, rows},
    field,
    kriging::{
        CHUNK, Heard, Kriging, Levels, Lists, Ordered, Room, Shift, Weights, dot, levels, spaced,
    },
    latent::{JITTER, Latent, Model, SAMPLES, Samples, Start},
    neighbours::Tree,
    nelder_mead::minimise,
    system::Coarse,
};
use crate::{
    error::{Error, Result},
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood::Likelihood,
    predictive::Predictive,
    process::{Field, Memory, Posterior, Process},
    sites::{Observations, Sites},
};

/// Neighbours before a site that its density is conditioned on: twice the least that Guinness (2018)
/// finds good.
pub const PREVIOUS: usize = 30;
/// Neighbours a target is kriged from, unless fitting finds that more are worth it.
pub const NEAR: usize = 60;
/// The most that fitting chooses.
const MOST_NEAR: usize = 120;
/// Densities that the first search looks at, at most; and sites, where they are counts, whose mode
/// is another at every step.
const SOME: usize = 5_000;
const SOME_COUNTS: usize = 4_000;
/// Counts that have the last word on parameters, at most.
pub(crate) const MANY_COUNTS: usize = 16_000;
/// How far a latent may move in the last step where a likelihood is all that is asked: what is left is that
/// squared, and in the density squared again.
const CLOSE: f64 = 0.03;
/// Observations on which it is found how far times are stretched, at most.
const SOME_TIMES: usize = 1_000;
/// Smoothnesses that fitting chooses from.
const ALL: &[Smoothness] = &[Smoothness::Half, Smoothness::ThreeHalves, Smoothness::FiveHalves];
/// Places far apart around which half of these sites stand together, so that short distances are seen too.
const CLUSTERS: usize = 12;
/// Noise that places of counts are kriged from as if they had it, relative to what is left open of them: the
/// sums of many neighbours' small differences are then no better known than each.
const DOUBT: f64 = 0.01;
/// Sd of a trend's rise over the sites' extent, in sds of what is seen: broad.
const RISE: f64 = 10.0;

/// A Gaussian process in which everything hangs on its nearest neighbours only.
///
/// The link-scale value of an observation is `mean + surface + nugget`, as for
/// [`ExactGp`](super::ExactGp); for counts the nugget is the village effect.
pub struct NearestGp {
    /// Covariance of the surface, link scale², sites in model units.
    pub kernel: Box<dyn Kernel>,
    /// Variance of what two observations at one site do not share, link scale².
    pub nugget: f64,
    /// Mean of the surface, link scale.
    pub mean: f64,
    /// Variance of our belief in `mean`: 0 is simple kriging, large is ordinary kriging.
    pub mean_variance: f64,
    /// Variance of our belief in a slope along each coordinate of the plane, whose mean is 0, link
    /// scale² per model unit²: 0 is a level mean, large is universal kriging.
    pub slope_variance: f64,
    /// What times are multiplied by, so that they count as distances.
    pub stretch: f64,
    /// Neighbours that each site's density is conditioned on, at most.
    pub previous: usize,
    /// Neighbours that each target is kriged from, at most.
    pub near: usize,
    /// Approximate log marginal likelihood of the context it was fitted to, in nats.
    pub log_marginal: Option<f64>,
    likelihood: &'static dyn Likelihood,
}

/// Sums over sites from which a density is made. With whitened deviations z and whitened levels x:
/// Σ ln variance, Σ z², Σ z x, Σ x xᵀ.
#[derive(Clone, Copy, Default)]
struct Density {
    terms: f64,
    log_det: f64,
    zz: f64,
    zx: Levels,
    xx: [Levels; LEVELS],
}

/// A row that was absorbed.
pub(super) struct Fitted {
    ordered: Ordered,
    form: Form,
}

/// What a row says.
enum Form {
    /// Deviations from the prior mean, with their noise.
    Values { value: Vec<f64>, noise: Vec<f64>, shift: Shift, log_marginal: f64 },
    /// The surface at every place that was counted at, drawn readings of it, and arithmetic's noise.
    Counts { latent: Box<Latent>, samples: Samples, doubt: Vec<f64> },
}

/// One row, laid out once: see [`NearestGp::log_marginal_of`].
pub(crate) struct Jury {
    ordered: Ordered,
    lists: Lists,
    start: Start,
}

impl Jury {
    /// # Errors
    /// Those of reading a context of one row without times.
    pub fn new(context: &Observations, likelihood: &'static dyn Likelihood) -> Result<Self> {
        let mut rows = rows(context, likelihood, 0, false)?;
        if rows.len() != 1 {
            return Err(Error::axis("rows that are asked together", rows.len(), 1));
        }
        let ordered = Ordered::of(&rows.swap_remove(0), &ROUND, likelihood.counts());
        let lists = ordered.lists(PREVIOUS);
        Ok(Jury { ordered, lists, start: Start::default() })
    }
}

impl Fitted {
    fn log_marginal(&self) -> f64 {
        match &self.form {
            Form::Values { log_marginal, .. } => *log_marginal,
            Form::Counts { latent, .. } => latent.log_marginal(),
        }
    }
}

struct Conditioned<G> {
    gp: G,
    rows: Vec<Fitted>,
}

/// A kriged place.
pub(super) struct Weighed {
    /// Of values, or of the surface where counts were seen.
    pub weights: Weights,
    /// What a mean's levels weigh beside them.
    pub levels: Levels,
    pub mean: f64,
    pub variance: f64,
}

impl Fitted {
    /// Sites in their order.
    pub fn sites(&self) -> Vec<Vec<f64>> {
        (0..self.ordered.len()).map(|i| self.ordered.site(i).to_vec()).collect()
    }

    /// Noise variance of the value at site `i`.
    pub fn noise(&self, i: usize) -> f64 {
        match &self.form {
            Form::Values { noise, .. } => noise[i],
            Form::Counts { latent, .. } => latent.noise[i],
        }
    }

    /// What is known of the mean.
    pub fn shift(&self) -> &Shift {
        match &self.form {
            Form::Values { shift, .. } => shift,
            Form::Counts { latent, .. } => &latent.shift,
        }
    }

    /// The surface behind counts.
    pub fn latent(&self) -> Option<&Latent> {
        match &self.form {
            Form::Values { .. } => None,
            Form::Counts { latent, .. } => Some(latent),
        }
    }
}

impl Density {
    fn add(&mut self, other: &Density) {
        self.terms += other.terms;
        self.log_det += other.log_det;
        self.zz += other.zz;
        for i in 0..LEVELS {
            self.zx[i] += other.zx[i];
            (0..LEVELS).for_each(|j| self.xx[i][j] += other.xx[i][j]);
        }
    }

    /// As if there were `factor` times as many sites.
    fn times(&self, factor: f64) -> Density {
        Density {
            terms: factor * self.terms,
            log_det: factor * self.log_det,
            zz: factor * self.zz,
            zx: self.zx.map(|v| factor * v),
            xx: self.xx.map(|row| row.map(|v| factor * v)),
        }
    }

    /// Log density in nats, the mean integrated out under priors of these variances; and what is
    /// then known of the mean.
    fn log(&self, doubt: Levels) -> (f64, Shift) {
        let shift = Shift::of(doubt, self.zx, self.xx);
        let square = self.zz - dot(shift.mean, self.zx);
        let tau = self.terms * std::f64::consts::TAU.ln();
        (-0.5 * (square + self.log_det + shift.spread + tau), shift)
    }
}

impl NearestGp {
    /// A nearest-neighbour Gaussian process with known mean and [`PREVIOUS`] and [`NEAR`] neighbours.
    ///
    /// # Units
    /// `kernel` and `mean` on the link scale, `nugget` a variance on the link scale.
    /// # Errors
    /// [`Error::Input`] for a negative nugget, a mean that is not finite, or counts with a dispersion
    /// of their own.
    pub fn new(
        kernel: Box<dyn Kernel>,
        nugget: f64,
        mean: f64,
        likelihood: &'static dyn Likelihood,
    ) -> Result<Self> {
        check_levels("nearest-neighbour", nugget, mean, likelihood)?;
        if let Some(dispersion) = likelihood.dispersion() {
            return Err(Error::input("the nearest-neighbour process does not read these counts")
                .fact("likelihood", format!("{}, with its {dispersion}", likelihood.name()))
                .try_this("read them as poisson: the nugget takes up what sets villages apart"));
        }
        Ok(NearestGp {
            kernel,
            nugget,
            mean,
            mean_variance: 0.0,
            slope_variance: 0.0,
            stretch: 1.0,
            previous: PREVIOUS,
            near: NEAR,
            log_marginal: None,
            likelihood,
        })
    }

    /// The same process with a mean known only up to `variance`, link scale².
    pub fn uncertain_mean(self, variance: f64) -> Self {
        NearestGp { mean_variance: variance, ..self }
    }

    /// The same process with a mean that is linear in the coordinates of the plane, whose slopes are
    /// known only up to `variance`, link scale² per model unit². They are integrated out: far beyond the
    /// sites the surface is as open as they are.
    ///
    /// # Errors
    /// [`Error::Input`] for a variance that is not finite or below 0.
    pub fn sloped(self, variance: f64) -> Result<Self> {
        if !(variance >= 0.0 && variance.is_finite()) {
            return Err(Error::input("slopes need a prior variance ≥ 0").fact("variance", variance));
        }
        Ok(NearestGp { slope_variance: variance, ..self })
    }

    /// The same process with times stretched by this factor: its kernel takes them so.
    ///
    /// # Errors
    /// [`Error::Input`] for what is no factor.
    pub fn stretched(self, stretch: f64) -> Result<Self> {
        match stretch > 0.0 && stretch.is_finite() {
            true => Ok(NearestGp { stretch, ..self }),
            false => {
                Err(Error::input("times are stretched by a factor above 0")
                    .fact("stretch", stretch))
            }
        }
    }

    /// Whether sites are told apart by their times; if not, those that sites have are passed over.
    pub(super) fn reads_time(&self) -> bool {
        self.kernel.change().is_some()
    }

    /// Targets, `[batch][site][dimension + time]`, their times stretched.
    pub(super) fn places(&self, targets: &Sites) -> Result<Vec<Vec<Vec<f64>>>> {
        let timed = self.reads_time();
        let mut places = places(targets, 0, timed)?;
        if timed {
            places.iter_mut().flatten().for_each(|place| stretch_time(place, self.stretch));
        }
        Ok(places)
    }

    /// Rows of a context, their times stretched.
    fn rows(&self, context: &Observations) -> Result<Vec<Row>> {
        let timed = self.reads_time();
        let rows = rows(context, self.likelihood, 0, timed)?.into_iter();
        Ok(rows.map(|row| if timed { stretched(row, self.stretch) } else { row }).collect())
    }

    /// The same process with other numbers of neighbours: `previous` for the density, `near` for
    /// predictions.
    pub fn neighbours(self, previous: usize, near: usize) -> Self {
        NearestGp { previous, near, ..self }
    }

    /// The Matérn process that makes the context most likely: length scale, sill, nugget, and
    /// smoothness among 1/2, 3/2 and 5/2, with the mean integrated out under a broad prior; and as
    /// many neighbours as predictions need.
    ///
    /// Where sites have times, the surface changes with them as that of
    /// [`ExactGp::fit`](super::ExactGp::fit) does, roughly in time. How far times are stretched is found by
    /// a search of its own, on a thousand sites.
    ///
    /// The penalties are those of [`ExactGp::fit`](super::ExactGp::fit). A first search looks at a part:
    /// 5,000 of the densities, evenly spread, each given its neighbours among all sites; or 4,000 of the
    /// counts, half of them evenly spread and half in clusters. A second begins there and looks at all
    /// sites.
    ///
    /// # Shapes
    /// `context` has one row.
    /// # Errors
    /// [`Error::Axis`] for several rows; [`Error::Input`] for fewer than three sites or sites that
    /// are all in one place.
    pub fn fit(context: &Observations, likelihood: &'static dyn Likelihood) -> Result<Self> {
        Self::fit_as(context, likelihood, &|kernel| Ok(Box::new(kernel)), false)
    }

    /// As [`NearestGp::fit`], of a kernel that `of` makes of each Matérn kernel tried; and, with a
    /// `trend`, of a mean that is linear in the coordinates.
    ///
    /// # Errors
    /// As [`NearestGp::fit`].
    pub fn fit_as(
        context: &Observations,
        likelihood: &'static dyn Likelihood,
        of: MadeOf,
        trend: bool,
    ) -> Result<Self> {
        let timed = context.sites.t.is_some();
        let mut rows = rows(context, likelihood, 0, timed)?;
        if rows.len() != 1 {
            return Err(Error::axis("rows to fit one Gaussian process to", rows.len(), 1));
        }
        let row = rows.swap_remove(0);
        let mut ordered = Ordered::of(&row, &ROUND, likelihood.counts());
        let extent = ordered.extent(usize::from(timed));
        if row.sites.len() < 3 || !(extent > 0.0 && extent.is_finite()) {
            return Err(Error::input("a Gaussian process needs three sites in different places")
                .fact("sites", row.sites.len())
                .try_this("check the coordinates, or add sites"));
        }
        let (centre, variance) = row.centre(likelihood);
        let mean_variance = if likelihood.counts() { 25.0 } else { 100.0 * variance };
        let mut search = Search {
            of,
            likelihood,
            centre,
            mean_variance,
            slope_variance: if trend { (RISE / extent).powi(2) * variance } else { 0.0 },
            belief: vec![(0.25 * extent, 1.25), (variance, 1.5), (0.2 * variance, 2.0)],
            stretch: timed.then_some(1.0),
        };
        let mut starts = [0.05, 0.3].map(|part| {
            [(part * extent).ln(), (0.7 * variance).ln(), (0.2 * variance).ln()].to_vec()
        });
        if timed {
            // The span of a survey's times is 2 model units; the other are the odds of what stays.
            search.belief.extend([(1.0, 1.5), (1.0, 1.5)]);
            starts.iter_mut().for_each(|start| start.extend([0.0, 0.0]));
            let some = Ordered::of(&thinned(&ordered, SOME_TIMES), &ROUND, likelihood.counts());
            let rough = search.smoothnesses(&some, SOME_TIMES, &starts, &ALL[..1]);
            let at = rough[0].at.clone();
            let stretch = (at[0] - at[3]).exp().clamp(0.01, 100.0);
            search.stretch = Some(stretch);
            search.belief[3].0 = stretch;
            ordered = Ordered::of(&stretched(row, stretch), &ROUND, likelihood.counts());
            starts = starts.map(|_| [&at[..3], &[at[3] + stretch.ln(), at[4]]].concat());
        }
        let starts = if timed { &starts[..1] } else { &starts[..] };
        let few = if likelihood.counts() { SOME_COUNTS } else { SOME };
        let found = if ordered.len() <= few {
            search.smoothnesses(&ordered, few, starts, ALL)
        } else if likelihood.counts() {
            let some = Ordered::of(&clustered(&ordered, few), &ROUND, true);
            let first = search.smoothnesses(&some, few, starts, ALL);
            if ordered.len() > MANY_COUNTS {
                ordered = Ordered::of(&clustered(&ordered, MANY_COUNTS), &ROUND, true);
            }
            search.polish(&ordered, first, 1.0, 0.15)
        } else {
            let first = search.smoothnesses(&ordered, few, starts, ALL);
            search.polish(&ordered, first, ordered.len() as f64 / few as f64, 0.1)
        };
        let best = found.into_iter().min_by(|a, b| a.cost.total_cmp(&b.cost));
        match best {
            Some(best) if best.cost.is_finite() => {
                let mut gp = search.process(best.smoothness, &best.at)?;
                gp.log_marginal = Some(search.penalty(&best.at) - best.cost);
                if !likelihood.counts() {
                    gp.near = gp.enough(&ordered);
                }
                Ok(gp)
            }
            _ => Err(Error::input("no Gaussian process could be fitted to the observations")
                .try_this("check the outcomes for extreme values")),
        }
    }

    /// How many neighbours a prediction needs: as many as it takes until twice as many would shrink
    /// the sd of the surface, between sites and their neighbours and in gaps, by less than half a percent.
    fn enough(&self, ordered: &Ordered) -> usize {
        let n = ordered.len();
        let (value, noise) = (vec![0.0; n], vec![self.nugget; n]);
        let heard = Heard { value: &value, noise: &noise };
        let mut room = Room::default();
        // Midway to a neighbour, since at a site there is always one observation; and to the nearest of
        // a few sites far apart, which is where gaps are.
        let ends = [n, (n / 64).max(2)]
            .into_iter()
            .flat_map(|end| spaced(end.min(n), 256).into_iter().map(move |i| (i as usize, end)));
        let places: Vec<Vec<f64>> = ends
            .map(|(i, end)| {
                let site = ordered.site(i);
                ordered.around_site(i, 2, end, &mut room.found);
                let other = room.found.last().map_or(site, |(_, j)| ordered.site(*j as usize));
                site.iter().zip(other).map(|(a, b)| 0.5 * (a + b)).collect()
            })
            .collect();
        let mut sd = |near: usize| -> f64 {
            let mut sum = 0.0;
            for block in places.chunks(LANES) {
                let block: Vec<&[f64]> = block.iter().map(Vec::as_slice).collect();
                let lists = ordered.around(&block, near, &mut room.found);
                let said = self.kriging().ask(ordered, heard, &lists.asked(&block), &mut room);
                sum += said[..block.len()].iter().map(|s| s.variance.max(0.0).sqrt()).sum::<f64>();
            }
            sum
        };
        let (mut near, mut here) = (NEAR, sd(NEAR));
        while near < MOST_NEAR && near < ordered.len() {
            let twice = sd(2 * near);
            if twice > 0.995 * here {
                break;
            }
            (near, here) = (2 * near, twice);
        }
        near
    }

    /// Approximate log marginal likelihood of each row of `context`, in nats.
    pub fn log_marginals(&self, context: &Observations) -> Result<Vec<f64>> {
        let rows = self.rows(context)?;
        let log = |row: &Row| {
            let ordered = self.ordered(row);
            self.settle(&ordered, &ordered.lists(self.previous), None, &mut Start::default(), 1e-5)
                .map(|settled| settled.log_marginal())
        };
        rows.iter().map(log).collect()
    }

    /// [`Process::memory`] of a process with so many neighbours.
    pub(crate) fn memory_for(sites: usize, [previous, near]: [usize; 2], counts: bool) -> Memory {
        // Coordinates, outcomes, trials, value and noise; the tree; and for a while two lists of
        // neighbours, each held twice while it is made, and what the order is made with.
        let held = sites * (16 + 4 * 8 + Tree::bytes(2));
        let lists = sites * 2 * (4 * (previous + near) + 48);
        let threads = rayon::current_num_threads();
        let block = 8 * LANES * row_of(near + 2) * threads;
        if !counts {
            let conditioning = held + lists + block + 256 * sites;
            return Memory { conditioning, held: held + block, target: 512 };
        }
        // Two sparse factors, each by rows and by columns, and their parts while they are made; drawn
        // readings, held twice while they are made; columns of as many draws as each thread works at; and
        // covariances, which are heard twice.
        let factors = sites * 4 * 12 * previous + Coarse::bytes(sites);
        let parts = sites * 2 * 12 * previous;
        let drawn = sites * 3 * 4 * SAMPLES;
        let columns = sites * 10 * 8 * LANES * threads;
        let held = held + factors + drawn + 128 * sites + 2 * block;
        let conditioning = held + lists + drawn.max(parts) + columns + 256 * sites;
        Memory { conditioning, held, target: 512 }
    }

    /// [`NearestGp::log_marginals`] of one row that is asked of process after process, each much like the one
    /// before: so near that rounding in what asks for it does not turn a search elsewhere.
    pub(crate) fn log_marginal_of(&self, asked: &mut Jury) -> Result<f64> {
        let Jury { ordered, lists, start } = asked;
        let settled = self.settle(ordered, lists, None, start, 1e-3);
        if settled.is_err() {
            *start = Start::default();
        }
        Ok(settled?.log_marginal())
    }

    fn ordered(&self, row: &Row) -> Ordered {
        Ordered::of(row, &*self.kernel, self.likelihood.counts())
    }

    fn kriging(&self) -> Kriging<'_> {
        let levels = if self.slope_variance > 0.0 { LEVELS } else { 1 };
        Kriging { kernel: &*self.kernel, levels }
    }

    fn doubt(&self) -> Levels {
        [self.mean_variance, self.slope_variance, self.slope_variance]
    }

    /// The posterior given `context`, which takes this process along.
    ///
    /// # Errors
    /// As [`Process::condition`].
    pub fn conditioned(self, context: &Observations) -> Result<Box<dyn Posterior>> {
        let rows = self.absorb_all(context)?;
        Ok(Box::new(Conditioned { gp: Box::new(self), rows }))
    }

    /// The same, and the approximate log marginal likelihood of each row, in nats.
    ///
    /// # Errors
    /// As [`Process::condition`].
    pub fn weighed(self, context: &Observations) -> Result<(Box<dyn Posterior>, Vec<f64>)> {
        let rows = self.absorb_all(context)?;
        let log_marginals = rows.iter().map(Fitted::log_marginal).collect();
        Ok((Box::new(Conditioned { gp: Box::new(self), rows }), log_marginals))
    }

    pub(super) fn absorb_all(&self, context: &Observations) -> Result<Vec<Fitted>> {
        let rows = self.rows(context)?;
        rows.iter().map(|row| self.absorb(self.ordered(row))).collect()
    }

    fn absorb(&self, ordered: Ordered) -> Result<Fitted> {
        let lists = ordered.lists(self.previous);
        let settled = self.settle(&ordered, &lists, None, &mut Start::default(), 1e-5)?;
        let form = match settled {
            Settled::Values { shift, log_marginal } => {
                let value = ordered.y.iter().map(|y| y - self.mean).collect();
                Form::Values { value, noise: vec![self.nugget; ordered.len()], shift, log_marginal }
            }
            Settled::Counts(mut latent) => {
                let samples = latent.samples(&ordered)?;
                let jitter = JITTER * self.kernel.sill();
                let whole = self.near.min(self.previous + 1) >= ordered.len();
                let doubt = (0..ordered.len())
                    .map(|i| if whole { jitter } else { jitter.max(DOUBT * samples.left(i)) })
                    .collect();
                Form::Counts { latent, samples, doubt }
            }
        };
        Ok(Fitted { ordered, form })
    }

    /// Values are read as they are, `terms` of them or all; counts through their mode, from the guess
    /// `start` on, until no latent moves by more than `close`.
    fn settle(
        &self,
        ordered: &Ordered,
        lists: &Lists,
        terms: Option<&[u32]>,
        start: &mut Start,
        close: f64,
    ) -> Result<Settled> {
        if self.likelihood.counts() {
            let model = Model {
                kriging: self.kriging(),
                likelihood: self.likelihood,
                nugget: self.nugget,
                mean: self.mean,
                doubt: self.doubt(),
            };
            return Ok(Settled::Counts(Box::new(model.absorb(ordered, lists, start, close)?)));
        }
        let all: Vec<u32>;
        let terms = match terms {
            Some(terms) => terms,
            None => {
                all = (0..ordered.len() as u32).collect();
                &all
            }
        };
        let part = ordered.len() as f64 / terms.len().max(1) as f64;
        let value: Vec<f64> = ordered.y.iter().map(|y| y - self.mean).collect();
        let noise = vec![self.nugget; ordered.len()];
        let heard = Heard { value: &value, noise: &noise };
        let density = self.density(ordered, lists, terms, heard).times(part);
        let (log_marginal, shift) = density.log(self.doubt());
        Ok(Settled::Values { shift, log_marginal })
    }

    /// The sums that make the density of `terms` of what is heard, each given its neighbours before it.
    fn density(&self, ordered: &Ordered, before: &Lists, terms: &[u32], heard: Heard) -> Density {
        let least = self.least();
        let each = |out: &mut Vec<Density>, i: u32, said: super::kriging::Said| {
            let variance = (said.variance + heard.noise[i as usize]).max(least);
            let z = heard.value[i as usize] - said.value;
            let x = said.levels;
            let one = Density {
                terms: 1.0,
                log_det: variance.ln(),
                zz: z * z / variance,
                zx: x.map(|x| z * x / variance),
                xx: x.map(|a| x.map(|b| a * b / variance)),
            };
            match out.first_mut() {
                Some(sum) => sum.add(&one),
                None => out.push(one),
            }
        };
        let parts = self.kriging().sweep(ordered, heard, before, terms, each);
        let mut total = Density::default();
        parts.iter().flatten().for_each(|part| total.add(part));
        total
    }

    /// What a row would tell of other numbers of its observations, `[column, observation]`, as it tells of
    /// its own: of the surface at every site, `[column, site]`, and of the mean's levels.
    pub(super) fn told(&self, row: &Fitted, columns: &Mat<f64>) -> Result<(Mat<f64>, Vec<Levels>)> {
        let (ordered, p) = (&row.ordered, columns.nrows());
        if ordered.number.iter().any(|i| *i >= columns.ncols()) {
            let found = columns.ncols();
            return Err(Error::axis("observations and their numbers", ordered.number.len(), found));
        }
        // Of several observations at one site their average.
        let mut here = Mat::<f64>::zeros(p, ordered.len());
        let mut count = vec![0.0; ordered.len()];
        ordered.at.iter().for_each(|at| count[*at as usize] += 1.0);
        for (at, number) in ordered.at.iter().zip(&ordered.number) {
            for j in 0..p {
                here[(j, *at as usize)] += columns[(j, *number)] / count[*at as usize];
            }
        }
        let lists = ordered.lists(self.previous);
        let terms: Vec<u32> = (0..ordered.len() as u32).collect();
        let noise: Vec<f64> = (0..ordered.len()).map(|i| row.noise(i)).collect();
        let found = (0..p).map(|j| {
            let value: Vec<f64> = (0..ordered.len()).map(|i| here[(j, i)]).collect();
            let heard = Heard { value: &value, noise: &noise };
            let density = self.density(ordered, &lists, &terms, heard);
            Shift::of(self.doubt(), density.zx, density.xx).mean
        });
        let found = found.collect();
        let Some(latent) = row.latent() else { return Ok((here, found)) };
        let mut told = Mat::<f64>::zeros(p, ordered.len());
        for first in (0..p).step_by(LANES) {
            let of = |j: usize, i: usize| if j < p { here[(j, i)] } else { 0.0 };
            let mut some: Vec<Lane> = (0..ordered.len())
                .map(|i| Lane(std::array::from_fn(|lane| of(first + lane, i))))
                .collect();
            let said = latent.reread(&mut some, |_| Lane::default())?;
            for (i, said) in said.iter().enumerate() {
                (first..p.min(first + LANES)).for_each(|j| told[(j, i)] = said.0[j - first]);
            }
        }
        Ok((told, found))
    }

    /// Kriging of places from what a row says, with the weights.
    pub(super) fn weigh(&self, row: &Fitted, places: &[&[f64]]) -> Vec<Weighed> {
        let Fitted { ordered, form, .. } = row;
        let least = self.least();
        let kriging = self.kriging();
        let mut room = Room::default();
        let mut out = Vec::with_capacity(places.len());
        for block in places.chunks(LANES) {
            let lists = ordered.around(block, self.near, &mut room.found);
            let asked = lists.asked(block);
            match form {
                Form::Values { value, noise, shift, .. } => {
                    let heard = Heard { value, noise };
                    let said = kriging.ask(ordered, heard, &asked, &mut room);
                    for (said, weights) in said.into_iter().zip(room.weights(&asked)) {
                        out.push(Weighed {
                            weights,
                            levels: said.levels,
                            mean: self.mean + said.value + dot(said.levels, shift.mean),
                            variance: (said.variance + shift.variance(said.levels)).max(least),
                        });
                    }
                }
                Form::Counts { latent, samples, doubt } => {
                    let bare = Kriging { levels: 0, ..kriging };
                    let heard = Heard { value: &latent.surface, noise: &latent.noise };
                    bare.meet(ordered, &asked, &mut room);
                    room.keep();
                    let read = bare.hear(ordered, heard, &asked, &mut room);
                    let readings = room.weights(&asked);
                    room.again();
                    let heard = Heard { noise: doubt, ..heard };
                    let said = bare.hear(ordered, heard, &asked, &mut room);
                    for (lane, weights) in room.weights(&asked).into_iter().enumerate() {
                        let whole = levels(block[lane]);
                        let mut open = whole;
                        for (j, w) in &weights {
                            let (j, known) = (*j as usize, levels(ordered.site(*j as usize)));
                            (0..LEVELS).for_each(|l| open[l] += w * (latent.open[j][l] - known[l]));
                        }
                        let (own, near) = (said[lane].variance, read[lane].variance);
                        // Where the nearest readings are all there are, nothing is left to draws.
                        let left = match self.near >= ordered.len() {
                            true => near,
                            false => samples.variance(&weights, own, &readings[lane], near),
                        };
                        out.push(Weighed {
                            weights,
                            levels: open,
                            mean: self.mean + said[lane].value + dot(whole, latent.shift.mean),
                            variance: (left + latent.shift.variance(open)).max(least),
                        });
                    }
                }
            }
        }
        out
    }

    /// Far below what any observation could resolve, and above zero, which is no density.
    fn least(&self) -> f64 {
        1e-12 * (self.kernel.sill() + self.nugget).max(f64::MIN_POSITIVE)
    }
}

/// What a row says, and how likely that was.
enum Settled {
    Values { shift: Shift, log_marginal: f64 },
    Counts(Box<Latent>),
}

impl Settled {
    fn log_marginal(&self) -> f64 {
        match self {
            Settled::Values { log_marginal, .. } => *log_marginal,
            Settled::Counts(latent) => latent.log_marginal(),
        }
    }
}

/// Knows no direction.
const ROUND: Matern = Matern {
    smoothness: Smoothness::Half,
    length_scale: 1.0,
    sill: 1.0,
    metric: Metric::Euclidean,
};

/// The last coordinate of a site with a time.
fn stretch_time(site: &mut [f64], stretch: f64) {
    if let Some(time) = site.last_mut() {
        *time *= stretch;
    }
}

/// A row with times multiplied by a factor.
fn stretched(mut row: Row, stretch: f64) -> Row {
    row.sites.iter_mut().for_each(|site| stretch_time(site, stretch));
    row
}

/// At most `most` of the observations, evenly spread.
fn thinned(ordered: &Ordered, most: usize) -> Row {
    let kept: Vec<usize> = spaced(ordered.y.len(), most).into_iter().map(|i| i as usize).collect();
    picked(ordered, &kept)
}

/// At most `most` of the observations: half of them evenly spread, half around a few places.
fn clustered(ordered: &Ordered, most: usize) -> Row {
    let mut kept = vec![false; ordered.len()];
    spaced(ordered.len(), most / 2).iter().for_each(|i| kept[*i as usize] = true);
    let mut found = Vec::new();
    for centre in 0..CLUSTERS.min(ordered.len()) {
        ordered.around_site(centre, most / 2 / CLUSTERS, ordered.len(), &mut found);
        found.iter().for_each(|(_, i)| kept[*i as usize] = true);
    }
    let seen = |i: &usize| kept[ordered.at[*i] as usize];
    let kept: Vec<usize> = (0..ordered.y.len()).filter(seen).collect();
    picked(ordered, &kept)
}

/// Some of the observations, where they were made.
fn picked(ordered: &Ordered, kept: &[usize]) -> Row {
    let pick = |x: &[f64]| kept.iter().filter_map(|i| x.get(*i).copied()).collect();
    Row {
        sites: kept.iter().map(|i| ordered.site(ordered.at[*i] as usize).to_vec()).collect(),
        y: pick(&ordered.y),
        trials: pick(&ordered.trials),
    }
}

/// What a search for parameters is told.
struct Search<'f> {
    of: MadeOf<'f>,
    likelihood: &'static dyn Likelihood,
    centre: f64,
    mean_variance: f64,
    slope_variance: f64,
    /// Centre and sd of the log-normal penalties on length scale, sill and nugget, and then on the time
    /// scale and the odds of what stays.
    belief: Vec<(f64, f64)>,
    /// What times are multiplied by, where sites have some; then the last two parameters are of time.
    stretch: Option<f64>,
}

/// Where a search ended: logarithms of length scale, sill and nugget, time scale and odds.
#[derive(Clone)]
struct Ended {
    smoothness: Smoothness,
    at: Vec<f64>,
    cost: f64,
}

impl Search<'_> {
    fn process(&self, smoothness: Smoothness, p: &[f64]) -> Result<NearestGp> {
        let (length_scale, sill) = (p[0].exp(), p[1].exp());
        let kernel = Matern { smoothness, length_scale, sill, metric: Metric::Euclidean };
        let mut kernel = (self.of)(kernel)?;
        if self.stretch.is_some() {
            kernel = changing(kernel, Smoothness::Half, &p[3..]);
        }
        let gp = NearestGp::new(kernel, p[2].exp(), self.centre, self.likelihood)?;
        let gp = gp.uncertain_mean(self.mean_variance).sloped(self.slope_variance)?;
        gp.stretched(self.stretch.unwrap_or(1.0))
    }

    fn penalty(&self, p: &[f64]) -> f64 {
        let terms = p.iter().zip(&self.belief).map(|(x, (c, sd))| ((x - c.ln()) / sd).powi(2));
        0.5 * terms.sum::<f64>()
    }

    /// Penalised minus log marginal likelihood, from the densities of `terms`; starts Newton where it
    /// last ended.
    fn cost<'a>(
        &'a self,
        ordered: &'a Ordered,
        lists: &'a Lists,
        terms: &'a [u32],
        smoothness: Smoothness,
    ) -> impl FnMut(&[f64]) -> f64 + 'a {
        let mut start = Start::default();
        move |p: &[f64]| {
            // A corner where the arithmetic fails is no candidate; the search walks away.
            let settled = self
                .process(smoothness, p)
                .and_then(|gp| gp.settle(ordered, lists, Some(terms), &mut start, CLOSE));
            match settled.map(|settled| self.penalty(p) - settled.log_marginal()) {
                Ok(cost) if cost.is_finite() => cost,
                _ => {
                    start = Start::default();
                    f64::INFINITY
                }
            }
        }
    }

    /// The best of each smoothness by at most `most` densities, from `starts` and from one another.
    fn smoothnesses(
        &self,
        ordered: &Ordered,
        most: usize,
        starts: &[Vec<f64>],
        which: &[Smoothness],
    ) -> Vec<Ended> {
        let lists = ordered.lists(PREVIOUS);
        let terms = spaced(ordered.len(), most);
        let part = ordered.len() as f64 / terms.len() as f64;
        let mut found: Vec<Ended> = Vec::new();
        // Two parameters more, and no need to know the peak to the last digit.
        let close = if self.stretch.is_some() { 1e-2 } else { 1e-3 };
        for &smoothness in which {
            let mut cost = self.cost(ordered, &lists, &terms, smoothness);
            // Rougher kernels have explored: begin at the best answer so far.
            let best = found.iter().min_by(|a, b| a.cost.total_cmp(&b.cost));
            let starts = best.map_or(starts.to_vec(), |best| vec![best.at.clone()]);
            let ends =
                starts.iter().map(|start| minimise(&mut cost, start, 0.6, close * part, 200));
            let end = ends.min_by(|a, b| a.1.total_cmp(&b.1));
            found.extend(end.map(|(at, cost)| Ended { smoothness, at, cost }));
        }
        found
    }

    /// The same on all sites, for those that a part of the sites did not rule out by 20
    /// nats, of which it told one in `part`. `step` is of the size of what it left open.
    fn polish(&self, ordered: &Ordered, mut first: Vec<Ended>, part: f64, step: f64) -> Vec<Ended> {
        let best = first.iter().map(|ended| ended.cost).fold(f64::INFINITY, f64::min);
        let counts = self.likelihood.counts();
        // Nats that one smoothness is behind by where a part was looked at grow with the sites.
        let behind = if counts { 4.0 } else { 20.0 * part };
        first.retain(|ended| ended.cost < best + behind);
        let lists = ordered.lists(PREVIOUS);
        let terms: Vec<u32> = (0..ordered.len() as u32).collect();
        let run = |ended: &Ended, limit: usize| {
            let mut cost = self.cost(ordered, &lists, &terms, ended.smoothness);
            // A twentieth of a nat of 100,000 observations is no evidence.
            let (at, cost) = minimise(&mut cost, &ended.at, step, 0.05, limit);
            Ended { smoothness: ended.smoothness, at, cost }
        };
        // One look at each, then the best for as long as it takes; and for values, where a look is
        // cheap, the second best too.
        let (look, kept, limit) = match (counts, self.stretch) {
            (true, None) => (6, 1, 20),
            // A simplex of two parameters more.
            (true, Some(_)) => (9, 1, 30),
            (false, _) => (12, 2, 80),
        };
        if first.len() == 1 {
            return vec![run(&first[0], limit)];
        }
        let mut looked: Vec<Ended> = first.iter().map(|ended| run(ended, look)).collect();
        looked.sort_by(|a, b| a.cost.total_cmp(&b.cost));
        looked.iter().take(kept).map(|ended| run(ended, limit)).collect()
    }
}

impl std::fmt::Debug for NearestGp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NearestGp")
            .field("kernel", &self.kernel)
            .field("nugget", &self.nugget)
            .field("mean", &self.mean)
            .field("mean_variance", &self.mean_variance)
            .field("slope_variance", &self.slope_variance)
            .field("stretch", &self.stretch)
            .field("previous", &self.previous)
            .field("near", &self.near)
            .field("likelihood", &self.likelihood.name())
            .finish()
    }
}

impl Process for NearestGp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(Conditioned { gp: self, rows: self.absorb_all(context)? }))
    }

    fn any_dimension(&self) -> bool {
        true
    }

    fn memory(&self, sites: usize) -> Memory {
        Self::memory_for(sites, [self.previous, self.near], self.likelihood.counts())
    }
}

impl<G: std::ops::Deref<Target = NearestGp> + Send + Sync> Posterior for Conditioned<G> {
    /// In the precision of the targets' coordinates, computed in f64.
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        if targets.batch() != self.rows.len() {
            let (asked, held) = (targets.batch(), self.rows.len());
            return Err(Error::axis("rows of targets and of the context", asked, held));
        }
        let gp: &NearestGp = &self.gp;
        let shape = (targets.batch(), targets.len(), 1);
        let (mut mean, mut surface, mut observation) = (Vec::new(), Vec::new(), Vec::new());
        for (row, sites) in self.rows.iter().zip(gp.places(targets)?) {
            let wide = sites.first().map_or(row.ordered.dim(), Vec::len);
            if row.ordered.len() > 0 && wide != row.ordered.dim() {
                return Err(Error::axis(
                    "dimensions of targets and sites",
                    wide,
                    row.ordered.dim(),
                ));
            }
            let chunks: Vec<Vec<[f64; 2]>> = sites
                .par_chunks(CHUNK)
                .map(|chunk| {
                    let places: Vec<&[f64]> = chunk.iter().map(Vec::as_slice).collect();
                    // Weights are many: a few blocks at a time.
                    let parts = places.chunks(8 * LANES).flat_map(|part| gp.weigh(row, part));
                    parts.map(|w| [w.mean, w.variance]).collect()
                })
                .collect();
            for [m, variance] in chunks.concat() {
                mean.push(m);
                surface.push(variance.sqrt());
                observation.push((variance + gp.nugget).sqrt());
            }
        }
        let tensor = |values: Vec<f64>| {
            Tensor::from_vec(values, shape, targets.s.device())?.to_dtype(targets.s.dtype())
        };
        Predictive::gaussian(
            gp.likelihood.link(),
            tensor(mean)?,
            tensor(surface)?,
            tensor(observation)?,
        )
    }

    /// Prior draws by waves, conditioned as each place is kriged. Laplace's approximation where
    /// counts were seen.
    fn field(&self, draws: usize, seed: u64, extent: f64) -> Result<Box<dyn Field + '_>> {
        let [row] = &self.rows[..] else {
            return Err(Error::axis("rows of the context to draw surfaces of", self.rows.len(), 1));
        };
        Ok(Box::new(field::Local::new(&self.gp, row, None, (draws, seed), extent)?))
    }
}
