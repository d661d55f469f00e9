//! The nearest-neighbour Gaussian process (Vecchia's approximation), in f64: kriging whose time and
//! memory are linear in the sites.
//!
//! Sources: Vecchia (1988), doi:10.1111/j.2517-6161.1988.tb01729.x; Guinness (2018),
//! arXiv:1609.05372, for the order of the sites; Zilber & Katzfuss (2021), arXiv:1906.07828, for
//! counts. Two departures from the last: the pseudo-values are read with their noise (their
//! "response" form), and their mode is found by local kriging instead of a sparse factor.
//!
//! **Density.** Sites stand in an order in which early ones are far apart. The joint density of the
//! observations is the product of each one's density given the `previous` nearest before it. It is
//! the *noisy* observation that is conditioned, as in GpGp: sites at one place are then no special
//! case and no sparse matrix is ever made. The price: where the nugget is several times the sill, 30
//! noisy neighbours say less of the surface than the whole neighbourhood would.
//!
//! **Prediction.** Each target is kriged from its `near` nearest observations, however the others are
//! asked for; the mean of the surface is estimated from all sites. The farthest quarter of the
//! neighbours fades out, so that a map has no steps where one replaces another. Fitting chooses `near` by what
//! twice as many would add, which is how a large nugget is paid for.
//!
//! **Counts.** Laplace's approximation replaces the counts by Gaussian pseudo-values
//! `t = f + g/w` with noise `1/w` at the mode `f`, where g and −w are the derivatives of the log
//! likelihood. The mode is where kriging every site from the pseudo-values of its `near` neighbours,
//! its own included, gives `f` again: Newton's step of Rasmussen & Williams (2006), algorithm 3.1, one neighbourhood at a time. The
//! marginal likelihood is theirs, with Vecchia's density for that of the pseudo-values.
//!
//! With as many neighbours as sites, all of it equals [`ExactGp`](super::ExactGp).

use candle_core::Tensor;
use rayon::prelude::*;

use super::{
    elimination::{LANES, Lane, eliminate, row_of, weigh},
    exact_gp::{MadeOf, Row, check_levels, rows},
    field,
    neighbours::{Found, Tree, spread},
    nelder_mead::minimise,
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
pub const NEAR: usize = 40;
/// The most that fitting chooses.
const MOST_NEAR: usize = 160;
/// Densities that the first search looks at, at most; and sites, where they are counts, whose mode
/// is another at every step.
const SOME: usize = 5_000;
const SOME_COUNTS: usize = 1_000;
/// Places of one piece of work. Sums over pieces run in their order, whatever the threads.
const CHUNK: usize = 64 * LANES;

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
    /// Neighbours that each site's density is conditioned on, at most.
    pub previous: usize,
    /// Neighbours that each target is kriged from, at most.
    pub near: usize,
    /// Approximate log marginal likelihood of the context it was fitted to, in nats.
    pub log_marginal: Option<f64>,
    likelihood: &'static dyn Likelihood,
}

/// The sites of one row in their order, with what was seen at each.
struct Ordered {
    /// Number of each among the sites given.
    order: Vec<usize>,
    dim: usize,
    sites: Vec<f64>,
    y: Vec<f64>,
    trials: Vec<f64>,
    tree: Tree,
}

/// Neighbours of every site, nearest first.
struct Lists {
    most: usize,
    flat: Vec<u32>,
    len: Vec<u32>,
}

/// Gaussian values to krige from: deviations from the prior mean, and the noise of each beside the
/// nugget. For counts they are Laplace's pseudo-values.
struct Told {
    value: Vec<f64>,
    noise: Vec<f64>,
}

/// What is asked: a place with its neighbours. A site that is its own neighbour shares its nugget.
#[derive(Clone, Copy)]
struct Asked<'a> {
    place: &'a [f64],
    neighbours: &'a [u32],
    itself: Option<u32>,
    /// Distances between which neighbours fade out, where there are others beyond.
    fade: Option<[f64; 2]>,
}

/// What neighbours with kriging weights w say of a place: `value = Σ w z` of their deviations,
/// `one = Σ w`, and what is left of the surface's variance.
#[derive(Clone, Copy, Default)]
struct Said {
    value: f64,
    one: f64,
    variance: f64,
}

/// Sums over sites from which a density is made. With whitened deviations z and whitened ones o:
/// Σ ln variance, Σ z², Σ z o, Σ o².
#[derive(Clone, Copy, Default)]
struct Density {
    terms: f64,
    log_det: f64,
    zz: f64,
    zo: f64,
    oo: f64,
}

/// A row that was absorbed.
pub(super) struct Fitted {
    ordered: Ordered,
    told: Told,
    shift: Shift,
    log_marginal: f64,
}

/// How far the mean lies from the prior's, and the variance that is left.
#[derive(Clone, Copy)]
struct Shift {
    mean: f64,
    variance: f64,
}

struct Conditioned<'a> {
    gp: &'a NearestGp,
    rows: Vec<Fitted>,
}

/// Neighbours and what each weighs.
type Weights = Vec<(u32, f64)>;

/// A kriged place.
pub(super) struct Weighed {
    pub weights: Weights,
    /// What the estimated mean weighs beside them.
    pub unknown: f64,
    pub mean: f64,
    pub variance: f64,
}

impl Fitted {
    /// Sites in their order.
    pub fn sites(&self) -> Vec<Vec<f64>> {
        (0..self.ordered.len()).map(|i| self.ordered.site(i).to_vec()).collect()
    }

    /// Number of each of them among the sites given.
    pub fn order(&self) -> &[usize] {
        &self.ordered.order
    }

    /// Noise variance of site `i` beside the nugget.
    pub fn noise(&self, i: usize) -> f64 {
        self.told.noise[i]
    }
}

/// Room for the covariances of one block, used again and again.
#[derive(Default)]
struct Room {
    lower: Vec<Lane>,
    value: Vec<Lane>,
    one: Vec<Lane>,
    x: Vec<f64>,
    y: Vec<f64>,
    column: Vec<f64>,
    found: Found,
}

impl Ordered {
    fn new(row: &Row) -> Self {
        let order = spread(&row.sites, &twins(row));
        let dim = row.sites.first().map_or(0, Vec::len);
        let sites: Vec<f64> = order.iter().flat_map(|i| row.sites[*i].iter().copied()).collect();
        let pick = |x: &[f64]| order.iter().filter_map(|i| x.get(*i).copied()).collect();
        let (y, trials) = (pick(&row.y), pick(&row.trials));
        let tree = Tree::new(&sites, dim);
        Ordered { order, dim, sites, y, trials, tree }
    }

    fn len(&self) -> usize {
        self.y.len()
    }

    fn site(&self, i: usize) -> &[f64] {
        &self.sites[i * self.dim..][..self.dim]
    }

    /// At most `most` neighbours of every site: among those before it, or among all with itself.
    fn lists(&self, most: usize, before: bool) -> Lists {
        let found: Vec<Vec<u32>> = (0..self.len())
            .into_par_iter()
            .map_init(Found::new, |found, i| {
                let end = if before { i } else { self.len() };
                self.tree.nearest(self.site(i), most, end, found);
                found.iter().map(|(_, j)| *j).collect()
            })
            .collect();
        let len = found.iter().map(|list| list.len() as u32).collect();
        let mut flat = vec![0; most * found.len()];
        for (slot, list) in flat.chunks_exact_mut(most.max(1)).zip(&found) {
            slot[..list.len()].copy_from_slice(list);
        }
        Lists { most, flat, len }
    }

    /// At most `most` sites, evenly spread over the order.
    fn thinned(&self, most: usize) -> Row {
        let kept = spaced(self.len(), most);
        let pick = |x: &[f64]| kept.iter().filter_map(|i| x.get(*i as usize).copied()).collect();
        Row {
            sites: kept.iter().map(|i| self.site(*i as usize).to_vec()).collect(),
            y: pick(&self.y),
            trials: pick(&self.trials),
        }
    }

    /// A length that the sites span, which a few far ones do not stretch.
    fn extent(&self) -> f64 {
        let side = |d: usize| {
            let mut c: Vec<f64> = (0..self.len()).map(|i| self.site(i)[d]).collect();
            c.sort_by(f64::total_cmp);
            let cut = c.len() / 100;
            let whole = c.last().zip(c.first()).map_or(0.0, |(b, a)| b - a);
            let most = c.get(c.len().saturating_sub(1 + cut)).zip(c.get(cut));
            (most.map_or(0.0, |(b, a)| b - a), whole)
        };
        let sides: Vec<(f64, f64)> = (0..self.dim).map(side).collect();
        let most = sides.iter().map(|s| s.0).fold(0.0, f64::max);
        if most > 0.0 { most } else { sides.iter().map(|s| s.1).fold(0.0, f64::max) }
    }
}

/// What tells two sites at one place apart, so that their listing never does.
fn twins(row: &Row) -> Vec<f64> {
    let trials = |i: usize| row.trials.get(i).copied().unwrap_or(0.0);
    (0..row.y.len()).map(|i| row.y[i] + 0.618_033_988_749_894_9 * trials(i)).collect()
}

/// At most `most` of the numbers below n, evenly spread.
fn spaced(n: usize, most: usize) -> Vec<u32> {
    let kept = n.min(most);
    (0..kept).map(|j| (j * n / kept) as u32).collect()
}

impl Lists {
    fn of(&self, i: usize) -> &[u32] {
        &self.flat[i * self.most..][..self.len[i] as usize]
    }
}

impl Told {
    /// Values as they are.
    fn values(y: &[f64], mean: f64) -> Self {
        Told { value: y.iter().map(|y| y - mean).collect(), noise: vec![0.0; y.len()] }
    }

    /// Laplace's pseudo-values at the latent deviations `f`, and the log density of the counts over
    /// that of the pseudo-values there.
    fn counts(ordered: &Ordered, likelihood: &dyn Likelihood, mean: f64, f: &[f64]) -> (Self, f64) {
        let n = ordered.len();
        let (mut value, mut noise) = (vec![0.0; n], vec![0.0; n]);
        let mut ratio = 0.0;
        for i in 0..n {
            let (y, trials) = (ordered.y[i], ordered.trials[i]);
            let eta = mean + f[i];
            let law = likelihood.log_probability(y, trials, eta, f64::INFINITY);
            let [log, gradient, curve] = law.expect("NearestGp::new asks no other likelihoods");
            // A crowd that is all of one kind says nothing more: its noise is huge, not infinite.
            let w = (-curve).max(1e-12);
            noise[i] = 1.0 / w;
            value[i] = f[i] + gradient / w;
            let pseudo = 0.5 * (w.ln() - std::f64::consts::TAU.ln() - gradient * gradient / w);
            ratio += log - pseudo;
        }
        (Told { value, noise }, ratio)
    }
}

impl Density {
    fn add(&mut self, other: &Density) {
        self.terms += other.terms;
        self.log_det += other.log_det;
        self.zz += other.zz;
        self.zo += other.zo;
        self.oo += other.oo;
    }

    /// As if there were `factor` times as many sites.
    fn times(&self, factor: f64) -> Density {
        Density {
            terms: factor * self.terms,
            log_det: factor * self.log_det,
            zz: factor * self.zz,
            zo: factor * self.zo,
            oo: factor * self.oo,
        }
    }

    /// The mean's posterior under a prior of this variance around zero.
    fn shift(&self, variance: f64) -> Shift {
        let left = variance / (1.0 + variance * self.oo);
        Shift { mean: left * self.zo, variance: left }
    }

    /// Log density in nats, the mean integrated out under that prior.
    fn log(&self, variance: f64) -> f64 {
        let shift = self.shift(variance);
        let spread = (variance * self.oo).ln_1p();
        let square = self.zz - shift.mean * self.zo;
        -0.5 * (square + self.log_det + spread + self.terms * std::f64::consts::TAU.ln())
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

    /// The same process with other numbers of neighbours: `previous` for the density, `near` for
    /// predictions.
    pub fn neighbours(self, previous: usize, near: usize) -> Self {
        NearestGp { previous, near, ..self }
    }

    /// The Matérn process that makes the context most likely: length scale, sill, nugget, and
    /// smoothness among 1/2, 3/2 and 5/2, with the mean integrated out under a broad prior; and as
    /// many neighbours as predictions need.
    ///
    /// The penalties are those of [`ExactGp::fit`](super::ExactGp::fit). A first search looks at an
    /// evenly spread part: 5,000 of the densities, each given its neighbours among all sites, or
    /// 1,000 of the counts. A second begins there and looks at all sites.
    ///
    /// # Shapes
    /// `context` has one row.
    /// # Errors
    /// [`Error::Axis`] for several rows; [`Error::Input`] for fewer than three sites or sites that
    /// are all in one place.
    pub fn fit(context: &Observations, likelihood: &'static dyn Likelihood) -> Result<Self> {
        Self::fit_as(context, likelihood, &|kernel| Ok(Box::new(kernel)))
    }

    /// As [`NearestGp::fit`], of a kernel that `of` makes of each Matérn kernel tried.
    ///
    /// # Errors
    /// As [`NearestGp::fit`].
    pub fn fit_as(
        context: &Observations,
        likelihood: &'static dyn Likelihood,
        of: MadeOf,
    ) -> Result<Self> {
        let rows = rows(context, likelihood, 0)?;
        let [row] = &rows[..] else {
            return Err(Error::axis("rows to fit one Gaussian process to", rows.len(), 1));
        };
        let ordered = Ordered::new(row);
        let extent = ordered.extent();
        if row.sites.len() < 3 || !(extent > 0.0 && extent.is_finite()) {
            return Err(Error::input("a Gaussian process needs three sites in different places")
                .fact("sites", row.sites.len())
                .try_this("check the coordinates, or add sites"));
        }
        let (centre, variance) = row.centre(likelihood);
        let search = Search {
            of,
            likelihood,
            centre,
            mean_variance: if likelihood.counts() { 25.0 } else { 100.0 * variance },
            belief: [(0.25 * extent, 1.25), (variance, 1.5), (0.2 * variance, 2.0)],
        };
        let starts = [0.05, 0.3].map(|part| {
            [(part * extent).ln(), (0.7 * variance).ln(), (0.2 * variance).ln()].to_vec()
        });
        let few = if likelihood.counts() { SOME_COUNTS } else { SOME };
        let found = if ordered.len() <= few {
            search.smoothnesses(&ordered, few, &starts)
        } else if likelihood.counts() {
            let some = Ordered::new(&ordered.thinned(few));
            let first = search.smoothnesses(&some, few, &starts);
            search.polish(&ordered, first, 1.0, 0.3)
        } else {
            let first = search.smoothnesses(&ordered, few, &starts);
            search.polish(&ordered, first, ordered.len() as f64 / few as f64, 0.1)
        };
        let best = found.into_iter().min_by(|a, b| a.cost.total_cmp(&b.cost));
        match best {
            Some(best) if best.cost.is_finite() => {
                let mut gp = search.process(best.smoothness, &best.at)?;
                gp.log_marginal = Some(search.penalty(&best.at) - best.cost);
                gp.near = gp.enough(&ordered)?;
                Ok(gp)
            }
            _ => Err(Error::input("no Gaussian process could be fitted to the observations")
                .try_this("check the outcomes for extreme values")),
        }
    }

    /// How many neighbours a prediction needs: as many as it takes until twice as many would shrink
    /// the sd of the surface, between some sites and their neighbours, by less than half a percent.
    fn enough(&self, ordered: &Ordered) -> Result<usize> {
        let absorbed = self.absorb(ordered, &mut Vec::new(), 1e-4)?;
        let mut room = Room::default();
        // Midway to a neighbour, since at a site there is always one observation.
        let places: Vec<Vec<f64>> = spaced(ordered.len(), 256)
            .iter()
            .map(|i| {
                let site = ordered.site(*i as usize);
                ordered.tree.nearest(site, 2, ordered.len(), &mut room.found);
                let other = room.found.last().map_or(site, |(_, j)| ordered.site(*j as usize));
                site.iter().zip(other).map(|(a, b)| 0.5 * (a + b)).collect()
            })
            .collect();
        let flat: Vec<&[f64]> = places.iter().map(Vec::as_slice).collect();
        let mut sd = |near: usize| -> f64 {
            let said = self.ask_near(ordered, &absorbed.told, &flat, near, &mut room);
            said.iter().map(|s| s.variance.max(0.0).sqrt()).sum::<f64>()
        };
        let (mut near, mut here) = (NEAR, sd(NEAR));
        while near < MOST_NEAR && near < ordered.len() {
            let twice = sd(2 * near);
            if twice > 0.995 * here {
                break;
            }
            (near, here) = (2 * near, twice);
        }
        Ok(near)
    }

    /// Approximate log marginal likelihood of each row of `context`, in nats.
    pub fn log_marginals(&self, context: &Observations) -> Result<Vec<f64>> {
        Ok(self.absorb_all(context)?.into_iter().map(|row| row.log_marginal).collect())
    }

    pub(super) fn absorb_all(&self, context: &Observations) -> Result<Vec<Fitted>> {
        let rows = rows(context, self.likelihood, 0)?;
        rows.iter()
            .map(|row| {
                let ordered = Ordered::new(row);
                let Absorbed { told, shift, log_marginal } =
                    self.absorb(&ordered, &mut Vec::new(), 1e-9)?;
                Ok(Fitted { ordered, told, shift, log_marginal })
            })
            .collect()
    }

    fn absorb(&self, ordered: &Ordered, latent: &mut Vec<f64>, close: f64) -> Result<Absorbed> {
        let before = ordered.lists(self.previous, true);
        let terms: Vec<u32> = (0..ordered.len() as u32).collect();
        if !self.likelihood.counts() {
            return self.settle(ordered, &before, None, &terms, latent, close);
        }
        let around = ordered.lists(self.near, false);
        self.settle(ordered, &before, Some(&around), &terms, latent, close)
    }

    /// Values are read as they are; counts through their mode, from the guess `latent` on, until no
    /// latent moves by more than `close`.
    fn settle(
        &self,
        ordered: &Ordered,
        before: &Lists,
        around: Option<&Lists>,
        terms: &[u32],
        latent: &mut Vec<f64>,
        close: f64,
    ) -> Result<Absorbed> {
        let part = ordered.len() as f64 / terms.len().max(1) as f64;
        let Some(around) = around else {
            let told = Told::values(&ordered.y, self.mean);
            let density = self.density(ordered, before, &told, terms).times(part);
            return Ok(Absorbed {
                told,
                shift: density.shift(self.mean_variance),
                log_marginal: density.log(self.mean_variance),
            });
        };
        latent.resize(ordered.len(), 0.0);
        let mut moved = f64::INFINITY;
        for round in 0..100 {
            let (told, ratio) = Told::counts(ordered, self.likelihood, self.mean, latent);
            let density = self.density(ordered, before, &told, terms).times(part);
            let shift = density.shift(self.mean_variance);
            // Rounding may keep the last digits moving.
            if moved < close || (round >= 60 && moved < 1e-4) {
                let log_marginal = ratio + density.log(self.mean_variance);
                return Ok(Absorbed { told, shift, log_marginal });
            }
            let smooth = self.smooth(ordered, around, &told, shift);
            // Full steps up to a bound that real logits rarely need; shorter ones if they circle.
            let (bound, step) = if round < 30 { (3.0, 1.0) } else { (1.0, 0.5) };
            moved = 0.0;
            for (f, new) in latent.iter_mut().zip(smooth) {
                let change = (step * (new - *f)).clamp(-bound, bound);
                moved = moved.max(change.abs());
                *f += change;
            }
            if !moved.is_finite() {
                return Err(Error::input("the counts have no finite likelihood"));
            }
        }
        Err(Error::input("Laplace's approximation did not settle in 100 steps")
            .try_this("check the counts for extreme values"))
    }

    /// The sums that make the density of `terms`, each given its neighbours before it.
    fn density(&self, ordered: &Ordered, before: &Lists, told: &Told, terms: &[u32]) -> Density {
        let least = self.least();
        let parts: Vec<Density> = terms
            .par_chunks(CHUNK)
            .map_init(Room::default, |room, chunk| {
                let mut sum = Density::default();
                for block in chunk.chunks(LANES) {
                    let asked: Vec<Asked> =
                        block.iter().map(|i| ordered.asked(before, *i)).collect();
                    let said = self.ask(ordered, told, &asked, room);
                    for (i, said) in block.iter().zip(said) {
                        let i = *i as usize;
                        let variance = (said.variance + self.nugget + told.noise[i]).max(least);
                        let (z, one) = (told.value[i] - said.value, 1.0 - said.one);
                        sum.add(&Density {
                            terms: 1.0,
                            log_det: variance.ln(),
                            zz: z * z / variance,
                            zo: z * one / variance,
                            oo: one * one / variance,
                        });
                    }
                }
                sum
            })
            .collect();
        let mut total = Density::default();
        parts.iter().for_each(|part| total.add(part));
        total
    }

    /// Latent deviation at every site (surface and village effect) given its neighbours and itself.
    fn smooth(&self, ordered: &Ordered, around: &Lists, told: &Told, shift: Shift) -> Vec<f64> {
        let all: Vec<u32> = (0..ordered.len() as u32).collect();
        let parts: Vec<Vec<f64>> = all
            .par_chunks(CHUNK)
            .map_init(Room::default, |room, chunk| {
                let mut out = Vec::with_capacity(chunk.len());
                for block in chunk.chunks(LANES) {
                    let asked: Vec<Asked> = block
                        .iter()
                        .map(|i| Asked { itself: Some(*i), ..ordered.asked(around, *i) })
                        .collect();
                    let said = self.ask(ordered, told, &asked, room);
                    out.extend(
                        said[..block.len()].iter().map(|s| s.value + shift.mean * (1.0 - s.one)),
                    );
                }
                out
            })
            .collect();
        parts.concat()
    }

    /// What the `near` nearest observations say of each place.
    fn ask_near(
        &self,
        ordered: &Ordered,
        told: &Told,
        places: &[&[f64]],
        near: usize,
        room: &mut Room,
    ) -> Vec<Said> {
        let mut out = Vec::with_capacity(places.len());
        for block in places.chunks(LANES) {
            let lists = ordered.around(block, near, &mut room.found);
            let asked = lists.asked(block);
            out.extend(&self.ask(ordered, told, &asked, room)[..block.len()]);
        }
        out
    }

    /// Kriging of places, with the weights.
    pub(super) fn weigh(&self, row: &Fitted, places: &[[f64; 2]]) -> Vec<Weighed> {
        let Fitted { ordered, told, shift, .. } = row;
        let least = self.least();
        let mut room = Room::default();
        let mut out = Vec::with_capacity(places.len());
        for block in places.chunks(LANES) {
            let block: Vec<&[f64]> = block.iter().map(|place| &place[..]).collect();
            let lists = ordered.around(&block, self.near, &mut room.found);
            let asked = lists.asked(&block);
            let said = self.ask(ordered, told, &asked, &mut room);
            for ((weights, said), _) in room.weights(&asked).into_iter().zip(said).zip(&block) {
                out.push(Weighed {
                    weights,
                    unknown: 1.0 - said.one,
                    mean: self.mean + said.mean(*shift),
                    variance: said.total(*shift).max(least),
                });
            }
        }
        out
    }

    /// What each observation weighs in the estimate of the mean's shift.
    pub(super) fn mean_weights(&self, row: &Fitted) -> Vec<f64> {
        let Fitted { ordered, told, shift, .. } = row;
        let before = ordered.lists(self.previous, true);
        let least = self.least();
        let terms: Vec<u32> = (0..ordered.len() as u32).collect();
        let parts: Vec<Vec<(Weights, f64)>> = terms
            .par_chunks(CHUNK)
            .map_init(Room::default, |room, chunk| {
                let mut out = Vec::with_capacity(chunk.len());
                for block in chunk.chunks(LANES) {
                    let asked: Vec<Asked> =
                        block.iter().map(|i| ordered.asked(&before, *i)).collect();
                    let said = self.ask(ordered, told, &asked, room);
                    for ((i, weights), said) in block.iter().zip(room.weights(&asked)).zip(said) {
                        let noise = self.nugget + told.noise[*i as usize];
                        let variance = (said.variance + noise).max(least);
                        out.push((weights, (1.0 - said.one) / variance));
                    }
                }
                out
            })
            .collect();
        let mut all = vec![0.0; ordered.len()];
        for (i, (weights, own)) in parts.into_iter().flatten().enumerate() {
            all[i] += own;
            weights.iter().for_each(|(j, weight)| all[*j as usize] -= weight * own);
        }
        all.iter_mut().for_each(|b| *b *= shift.variance);
        all
    }

    /// Far below what any observation could resolve, and above zero, which is no density.
    fn least(&self) -> f64 {
        1e-12 * (self.kernel.sill() + self.nugget).max(f64::MIN_POSITIVE)
    }

    /// Kriging of up to [`LANES`] places side by side.
    fn ask(
        &self,
        ordered: &Ordered,
        told: &Told,
        asked: &[Asked],
        room: &mut Room,
    ) -> [Said; LANES] {
        let n = asked.iter().map(|a| a.neighbours.len()).max().unwrap_or(0);
        let sill = self.kernel.sill();
        room.lower.resize(row_of(n + 1), Lane::default());
        room.value.resize(n, Lane::default());
        room.one.resize(n, Lane::default());
        let Room { lower, value, one, x, y, column, .. } = room;
        for lane in 0..LANES {
            let here = asked.get(lane).map_or(&[][..], |a| a.neighbours);
            let k = here.len();
            // Fewer neighbours than another lane: rows of the identity, which say nothing.
            for i in k..n {
                lower[row_of(i)..][..i].iter_mut().for_each(|cell| cell.0[lane] = 0.0);
                lower[row_of(i) + i].0[lane] = 1.0;
                lower[row_of(n) + i].0[lane] = 0.0;
                value[i].0[lane] = 0.0;
                one[i].0[lane] = 0.0;
            }
            let Some(Asked { place, itself, fade, .. }) = asked.get(lane) else {
                lower[row_of(n) + n].0[lane] = 1.0;
                continue;
            };
            let sites = here.iter().map(|i| ordered.site(*i as usize));
            // A line is a plane's first axis.
            let flat = place.len() <= 2;
            if flat {
                x.clear();
                y.clear();
                for site in sites.chain([*place]) {
                    x.push(site[0]);
                    y.push(site.get(1).copied().unwrap_or(0.0));
                }
            }
            column.resize(k + 1, 0.0);
            for j in 0..=k {
                let column = &mut column[..=k - j];
                if flat {
                    self.kernel.column([x[j], y[j]], &x[j..], &y[j..], column);
                } else {
                    let of = |i: usize| here.get(i).map_or(*place, |i| ordered.site(*i as usize));
                    for (i, out) in column.iter_mut().enumerate() {
                        *out = self.kernel.covariance(of(i + j), of(j));
                    }
                }
                if let Some(i) = here.get(j) {
                    let i = *i as usize;
                    for (at, c) in column[..k - j].iter().enumerate() {
                        lower[row_of(j + at) + j].0[lane] = *c;
                    }
                    let noise = self.nugget + told.noise[i];
                    let more = fade.map_or(0.0, |fade| {
                        let apart =
                            ordered.site(i).iter().zip(*place).map(|(a, b)| (a - b).powi(2));
                        faded(apart.sum::<f64>().sqrt(), fade) * (noise + 0.01 * sill)
                    });
                    lower[row_of(j) + j].0[lane] += noise + more;
                    let own = if *itself == Some(i as u32) { self.nugget } else { 0.0 };
                    lower[row_of(n) + j].0[lane] = column[k - j] + own;
                    value[j].0[lane] = told.value[i];
                    one[j].0[lane] = 1.0;
                } else {
                    lower[row_of(n) + n].0[lane] = column[0];
                }
            }
        }
        let [values, ones, left] = eliminate(n, lower, value, one);
        std::array::from_fn(|l| Said { value: values.0[l], one: ones.0[l], variance: left.0[l] })
    }
}

/// Neighbours of up to [`LANES`] places, and between which distances they fade out.
struct Around(Vec<(Vec<u32>, Option<[f64; 2]>)>);

impl Around {
    fn asked<'a>(&'a self, places: &[&'a [f64]]) -> Vec<Asked<'a>> {
        let one = |(place, (neighbours, fade)): (&&'a [f64], &'a (Vec<u32>, _))| Asked {
            place,
            neighbours,
            itself: None,
            fade: *fade,
        };
        places.iter().zip(&self.0).map(one).collect()
    }
}

impl Room {
    /// The weights behind what was just asked.
    fn weights(&mut self, asked: &[Asked]) -> Vec<Weights> {
        let n = asked.iter().map(|a| a.neighbours.len()).max().unwrap_or(0);
        weigh(n, &mut self.lower);
        let last = &self.lower[row_of(n)..];
        let one = |(lane, asked): (usize, &Asked)| {
            asked.neighbours.iter().zip(last).map(|(i, weight)| (*i, weight.0[lane])).collect()
        };
        asked.iter().enumerate().map(one).collect()
    }
}

impl Said {
    /// Deviation of the surface from the prior's mean.
    fn mean(&self, shift: Shift) -> f64 {
        self.value + shift.mean * (1.0 - self.one)
    }

    /// Its variance, our doubt about the mean included.
    fn total(&self, shift: Shift) -> f64 {
        self.variance + shift.variance * (1.0 - self.one).powi(2)
    }
}

impl Ordered {
    /// The `near` nearest sites of places.
    fn around(&self, places: &[&[f64]], near: usize, found: &mut Found) -> Around {
        let one = |place: &&[f64]| {
            self.tree.nearest(place, near, self.len(), found);
            let from = |i: usize| found[i].0.sqrt();
            let cut = near > 3 && found.len() == near && near < self.len();
            let fade = cut.then(|| [from(near - 1 - near / 4), from(near - 1)]);
            (found.iter().map(|(_, i)| *i).collect(), fade)
        };
        Around(places.iter().map(one).collect())
    }

    fn asked<'a>(&'a self, lists: &'a Lists, i: u32) -> Asked<'a> {
        let i = i as usize;
        Asked { place: self.site(i), neighbours: lists.of(i), itself: None, fade: None }
    }
}

/// Noise added to a neighbour at distance `d`, relative: none up to the first distance, without bound
/// at the second. Where one neighbour replaces another, neither then has a say, and a map has no
/// steps.
fn faded(d: f64, [from, to]: [f64; 2]) -> f64 {
    if d <= from || to <= from {
        return 0.0;
    }
    let part = (d - from) / (to - from);
    (part / (1.0 - part).max(1e-6)).powi(2)
}

/// What absorbing a row gives.
struct Absorbed {
    told: Told,
    shift: Shift,
    log_marginal: f64,
}

/// What a search for parameters is told.
struct Search<'f> {
    of: MadeOf<'f>,
    likelihood: &'static dyn Likelihood,
    centre: f64,
    mean_variance: f64,
    /// Centre and sd of the log-normal penalties on length scale, sill and nugget.
    belief: [(f64, f64); 3],
}

/// Where a search ended: logarithms of length scale, sill and nugget.
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
        let gp = NearestGp::new((self.of)(kernel)?, p[2].exp(), self.centre, self.likelihood)?;
        Ok(gp.uncertain_mean(self.mean_variance))
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
        lists: &'a (Lists, Option<Lists>),
        terms: &'a [u32],
        smoothness: Smoothness,
    ) -> impl FnMut(&[f64]) -> f64 + 'a {
        let mut latent = Vec::new();
        move |p: &[f64]| {
            // A corner where the arithmetic fails is no candidate; the search walks away.
            let absorbed = self.process(smoothness, p).and_then(|gp| {
                // Newton's last step is squared in what is left, and that again in the density.
                gp.settle(ordered, &lists.0, lists.1.as_ref(), terms, &mut latent, 1e-3)
            });
            match absorbed.map(|a| self.penalty(p) - a.log_marginal) {
                Ok(cost) if cost.is_finite() => cost,
                _ => {
                    latent.clear();
                    f64::INFINITY
                }
            }
        }
    }

    fn lists(&self, ordered: &Ordered) -> (Lists, Option<Lists>) {
        let around = self.likelihood.counts().then(|| ordered.lists(NEAR, false));
        (ordered.lists(PREVIOUS, true), around)
    }

    /// The best of every smoothness by at most `most` densities, from `starts` and from one another.
    fn smoothnesses(&self, ordered: &Ordered, most: usize, starts: &[Vec<f64>]) -> Vec<Ended> {
        let lists = self.lists(ordered);
        let terms = spaced(ordered.len(), most);
        let part = ordered.len() as f64 / terms.len() as f64;
        let mut found: Vec<Ended> = Vec::new();
        for smoothness in [Smoothness::Half, Smoothness::ThreeHalves, Smoothness::FiveHalves] {
            let mut cost = self.cost(ordered, &lists, &terms, smoothness);
            // Rougher kernels have explored: begin at the best answer so far.
            let best = found.iter().min_by(|a, b| a.cost.total_cmp(&b.cost));
            let starts = best.map_or(starts.to_vec(), |best| vec![best.at.clone()]);
            let ends = starts.iter().map(|start| minimise(&mut cost, start, 0.6, 1e-3 * part, 200));
            let end = ends.min_by(|a, b| a.1.total_cmp(&b.1));
            found.extend(end.map(|(at, cost)| Ended { smoothness, at, cost }));
        }
        found
    }

    /// The same on all sites, for those that a part of the sites did not rule out by 20
    /// nats, of which it told one in `part`. `step` is of the size of what it left open.
    fn polish(&self, ordered: &Ordered, mut first: Vec<Ended>, part: f64, step: f64) -> Vec<Ended> {
        let best = first.iter().map(|ended| ended.cost).fold(f64::INFINITY, f64::min);
        first.retain(|ended| ended.cost < best + 20.0 * part);
        let lists = self.lists(ordered);
        let terms: Vec<u32> = (0..ordered.len() as u32).collect();
        let run = |ended: &Ended, limit: usize| {
            let mut cost = self.cost(ordered, &lists, &terms, ended.smoothness);
            // A twentieth of a nat of 100,000 observations is no evidence.
            let (at, cost) = minimise(&mut cost, &ended.at, step, 0.05, limit);
            Ended { smoothness: ended.smoothness, at, cost }
        };
        // One look at each, then the best for as long as it takes; and for values, where a look is
        // cheap, the second best too.
        let (look, kept, limit) = if self.likelihood.counts() { (8, 1, 40) } else { (12, 2, 80) };
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

    fn memory(&self, sites: usize) -> Memory {
        // Coordinates, order, outcomes, trials, value and noise; the tree; and for a while two lists of
        // neighbours, each held twice while it is made, and what the order is made with.
        let held = sites * (16 + 5 * 8 + Tree::bytes(2));
        let lists = sites * 2 * (4 * (self.previous + self.near) + 48);
        let block = 8 * LANES * row_of(self.near + 2) * rayon::current_num_threads();
        Memory { conditioning: held + lists + block + 256 * sites, held: held + block, target: 512 }
    }
}

impl Posterior for Conditioned<'_> {
    /// In the precision of the targets' coordinates, computed in f64.
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        if targets.batch() != self.rows.len() {
            let (asked, held) = (targets.batch(), self.rows.len());
            return Err(Error::axis("rows of targets and of the context", asked, held));
        }
        let gp = self.gp;
        let shape = (targets.batch(), targets.len(), 1);
        let (mut mean, mut surface, mut observation) = (Vec::new(), Vec::new(), Vec::new());
        let least = gp.least();
        for (row, sites) in self.rows.iter().zip(targets.host()?) {
            let wide = sites.first().map_or(row.ordered.dim, Vec::len);
            if row.ordered.len() > 0 && wide != row.ordered.dim {
                return Err(Error::axis("dimensions of targets and sites", wide, row.ordered.dim));
            }
            let chunks: Vec<Vec<Said>> = sites
                .par_chunks(CHUNK)
                .map_init(Room::default, |room, chunk| {
                    let places: Vec<&[f64]> = chunk.iter().map(Vec::as_slice).collect();
                    gp.ask_near(&row.ordered, &row.told, &places, gp.near, room)
                })
                .collect();
            for said in chunks.concat() {
                let variance = said.total(row.shift).max(least);
                mean.push(gp.mean + said.mean(row.shift));
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
        Ok(Box::new(field::Local::new(self.gp, row, None, [draws as u64, seed], extent)?))
    }
}
