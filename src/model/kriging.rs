//! Kriging with covariances that a network reads off the data: amortised Vecchia.
//!
//! Sources: Vecchia (1988), doi:10.1111/j.2517-6161.1988.tb01729.x, for the kriging; Sainsbury-Dale et al.
//! (2025), arXiv:2310.02600, and Lenzi et al. (2023), arXiv:2107.04208, for networks that read covariance
//! parameters; Paciorek & Schervish (2006), doi:10.1002/env.785, for a covariance that varies.
//!
//! **Reading.** Sites are cut into windows of a few hundred, and into windows of ever coarser parts of
//! them, until one holds the whole. What pairs say in a window ([`Window`]) goes through an MLP, which
//! answers with the posterior of the covariance: how likely each smoothness is, and for each a Gaussian
//! for the logarithms of length scale, sill and nugget and for the direction. It learned that from
//! simulated windows whose covariance was known. Windows have no size of their own, so one network serves
//! every density.
//!
//! **Pooling.** Gaussians of many windows are multiplied, their prior divided out: what a thousand windows
//! agree on is known well. Around each window those near it count more, and all of them pull it towards
//! the whole; how hard is chosen, with the smoothness, by how likely a few thousand of the observations
//! are. Where the whole wins the covariance is one Matérn kernel, else one that varies.
//!
//! **Kriging** is that of [`NearestGp`]: time and memory linear in the sites. Small surveys, whose
//! covariance stays in doubt, are kriged under several draws from its posterior, each weighted by how
//! likely it makes the survey.

use std::{cell::RefCell, collections::BTreeSet, sync::Arc};

use candle_core::{D, Tensor};
use faer::{Mat, Side};
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    layer::{Activation, Mlp},
    params::{Init, Params},
    settings,
};
use crate::{
    baseline::{
        NearestGp,
        exact_gp::{Row, rows},
        nearest::{Jury, MANY_COUNTS, PREVIOUS},
        neighbours::{Tree, spread},
        nelder_mead::minimise,
        variogram::{WIDTH, Window, place},
    },
    error::{Error, Result},
    kernel::{Kernel, Local, Matern, Metric, Smoothness, Varying},
    likelihood::{self, Likelihood},
    predictive::{Predictive, log_sum_exp},
    process::{Field, Memory, Objective, Posterior, Process, Reward},
    rng::Stream,
    sites::{HYPER, Observations, Sites, Task},
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "kriging",
    about: "kriging under covariances that a network reads off the data: amortised Vecchia \
            (Vecchia 1988; Sainsbury-Dale et al. 2025, arXiv:2310.02600)",
    build,
    joint: false,
    tiny: "widths = [16]\nwindow = 64\ndraws = 2",
};

/// Smoothnesses told apart.
const ORDERS: [Smoothness; 3] = [Smoothness::Half, Smoothness::ThreeHalves, Smoothness::FiveHalves];
/// What is read beside the smoothness: ln length scale, ln sill, ln nugget, and the direction.
const READ: usize = 5;
/// Numbers above the diagonal of the factor of their precision.
const ABOVE: usize = READ * (READ - 1) / 2;
/// Outputs for each smoothness: its odds, and a Gaussian.
const OUTPUTS: usize = 1 + 2 * READ + ABOVE;
/// The thinned parts of the sites are this much smaller than each other.
const COARSER: usize = 8;
/// Windows from which on the covariance may vary between them.
const SEVERAL: usize = 12;
/// How much local covariances may differ from that of the whole, sd of ln length scale and ln sill.
const STRAY: [f64; 2] = [0.25, 0.7];
/// What a covariance that varies has to be more likely by, nats, to be believed.
const WORTH: f64 = 15.0;
/// Sites whose densities choose between covariances, at most. Of counts, each of which says little, more
/// have the last word.
const JUDGES: usize = 4_000;
/// Covariances that are tried around the one that windows agree on; and of counts, whose mode is another
/// at every step, first and last.
const TRIED: usize = 70;
const COUNTS_TRIED: [usize; 2] = [24, 9];
/// How far draws of the covariance are weighed by how likely they make the values, 1 = as in importance
/// sampling, of which few draws are left. Measured on fresh tasks: 0.5 scores as 1 does, and covers better;
/// for counts, whose likelihood is an approximation, any weight scored worse than none.
const HEED: f64 = 0.5;
/// Draws less likely than this are not kriged under.
const NEGLIGIBLE: f64 = 1e-3;
/// Nodes of the raster on which a varying covariance is held, along its longer side.
const NODES: usize = 96;

/// Settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Hidden widths.
    pub widths: Vec<usize>,
    /// Most sites of a window.
    pub window: usize,
    /// Draws for each smoothness where the covariance stays in doubt, an even number.
    pub draws: usize,
    /// Neighbours that a place is kriged from, at most.
    pub near: usize,
    /// Mean of what is read under the prior: ln length scale (units of a window), ln sill and ln nugget
    /// (relative to the variance of values; link scale for counts), direction.
    pub prior_mean: Option<[f64; READ]>,
    /// Sd of the same.
    pub prior_sd: Option<[f64; READ]>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            widths: vec![256, 256, 128],
            window: 400,
            draws: 6,
            near: 100,
            prior_mean: None,
            prior_sd: None,
        }
    }
}

/// The network and what it is used for.
pub struct Kriging {
    network: Mlp,
    config: Config,
    mean: [f64; READ],
    sd: [f64; READ],
    /// How observations are read: without a dispersion of their own.
    likelihood: &'static dyn Likelihood,
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    problem.reads_exactly("kriging")?;
    if config.window < 16 || config.draws < 2 || config.draws % 2 == 1 || config.near == 0 {
        return Err(Error::input("`window`, `draws` or `near` under [model] is out of range")
            .try_this("window ≥ 16, draws even and ≥ 2, near ≥ 1"));
    }
    // Villages that scatter by a law of their own are read as scattering by the nugget.
    let likelihood = match (problem.likelihood.dispersion(), problem.likelihood.counts()) {
        (Some("precision"), _) => likelihood::find("binomial")?,
        (Some(_), true) => likelihood::find("poisson")?,
        _ => problem.likelihood,
    };
    let counts = likelihood.counts();
    let mean = if counts { [-1.4, -1.0, -3.0, 0.0, 0.0] } else { [-1.4, -0.4, -2.6, 0.0, 0.0] };
    let sd = if counts { [1.3, 1.7, 2.0, 0.4, 0.4] } else { [1.3, 0.9, 2.2, 0.4, 0.4] };
    let (mean, sd) = (config.prior_mean.unwrap_or(mean), config.prior_sd.unwrap_or(sd));
    if sd.iter().any(|s| s.is_nan() || *s <= 0.0) {
        return Err(Error::input("`prior_sd` under [model] must be positive"));
    }
    let widths = [&[WIDTH], config.widths.as_slice(), &[ORDERS.len() * OUTPUTS]].concat();
    let scope = &mut params.scope();
    let network = Mlp::new(&mut scope.at("network"), &widths, Activation::Gelu, &Init::LeCun)?;
    Ok(Box::new(Kriging { network, config, mean, sd, likelihood }))
}

/// The posterior of a covariance given one window: for each smoothness its log probability, and the
/// Gaussian of what is read, in units of its prior.
struct Reading {
    order: [f64; ORDERS.len()],
    mean: [[f64; READ]; ORDERS.len()],
    /// Upper factor R of the precision RᵀR.
    factor: [[[f64; READ]; READ]; ORDERS.len()],
}

/// A Gaussian by its precision, and precision times mean: what is multiplied by adding.
#[derive(Clone, Copy)]
struct Information {
    precision: [[f64; READ]; READ],
    pull: [f64; READ],
}

impl Information {
    const NONE: Self = Information { precision: [[0.0; READ]; READ], pull: [0.0; READ] };

    fn add(&mut self, other: &Self, weight: f64) {
        for i in 0..READ {
            self.pull[i] += weight * other.pull[i];
            for j in 0..READ {
                self.precision[i][j] += weight * other.precision[i][j];
            }
        }
    }

    /// The same with independent beliefs around `mean` added.
    fn with(mut self, mean: [f64; READ], sd: [f64; READ]) -> Self {
        for i in 0..READ {
            let precision = sd[i].powi(-2);
            self.precision[i][i] += precision;
            self.pull[i] += precision * mean[i];
        }
        self
    }

    fn matrix(&self) -> Mat<f64> {
        Mat::from_fn(READ, READ, |i, j| self.precision[i][j])
    }

    fn mean(&self) -> Result<[f64; READ]> {
        let factor = crate::linalg::Cholesky::factor(self.matrix())?;
        let mean = factor.solve(&self.pull);
        Ok(std::array::from_fn(|i| mean[i]))
    }
}

impl Reading {
    /// From the network's outputs for one window.
    fn of(raw: &[f64]) -> Self {
        let mut reading = Reading {
            order: [0.0; ORDERS.len()],
            mean: [[0.0; READ]; ORDERS.len()],
            factor: [[[0.0; READ]; READ]; ORDERS.len()],
        };
        for (c, part) in raw.chunks_exact(OUTPUTS).enumerate() {
            reading.order[c] = part[0];
            reading.mean[c].copy_from_slice(&part[1..=READ]);
            let mut above = part[1 + 2 * READ..].iter();
            for i in 0..READ {
                reading.factor[c][i][i] = part[1 + READ + i].clamp(-LOG_MOST, LOG_MOST).exp();
                for j in i + 1..READ {
                    reading.factor[c][i][j] = *above.next().expect("as many as there are");
                }
            }
        }
        let total = log_sum_exp(&reading.order);
        reading.order.iter_mut().for_each(|o| *o -= total);
        reading
    }

    /// What the window says beyond its prior, were the smoothness number `c`; in units of the prior.
    ///
    /// Precisions below the prior's, which are the network's rounding, say nothing.
    fn beyond_prior(&self, c: usize) -> Result<Information> {
        let (r, mean) = (&self.factor[c], &self.mean[c]);
        let precision =
            Mat::from_fn(READ, READ, |i, j| (0..READ).map(|k| r[k][i] * r[k][j]).sum::<f64>());
        let eigen = precision
            .self_adjoint_eigen(Side::Lower)
            .map_err(|_| Error::input("the network's precision has no eigenvalues"))?;
        let mut out = Information::NONE;
        for k in 0..READ {
            let value = eigen.S()[k];
            if value <= 1.0 {
                continue;
            }
            let vector: [f64; READ] = std::array::from_fn(|i| eigen.U()[(i, k)]);
            let along: f64 = vector.iter().zip(mean).map(|(v, m)| v * m).sum();
            let more = value - 1.0;
            // Divided by the prior, a mean moves away from the prior's: exactly so for a Gaussian, and
            // without bound where almost nothing was learned.
            let pull = more * along * (value / more).min(2.0);
            for i in 0..READ {
                out.pull[i] += pull * vector[i];
                for j in 0..READ {
                    out.precision[i][j] += more * vector[i] * vector[j];
                }
            }
        }
        Ok(out)
    }

    /// A draw, were the smoothness number `c`, from standard normals; in units of the prior.
    fn draw(&self, c: usize, normal: &[f64; READ]) -> [f64; READ] {
        let (r, mut x) = (&self.factor[c], *normal);
        for i in (0..READ).rev() {
            let rest: f64 = (i + 1..READ).map(|j| r[i][j] * x[j]).sum();
            x[i] = (x[i] - rest) / r[i][i];
        }
        std::array::from_fn(|i| self.mean[c][i] + x[i])
    }
}

/// Logarithms of factors of precision are held within this: sds from e⁻⁵ to e⁵ of the prior's.
const LOG_MOST: f64 = 5.0;

/// A covariance in the context's units.
struct Read {
    kernel: Box<dyn Kernel>,
    nugget: f64,
}

/// What is read, as a kernel of smoothness number `c` and a nugget.
fn kernel(c: usize, read: &[f64; READ], dim: usize) -> Read {
    let Local { length_scale, ratio, angle, sill } = local(read, dim);
    let metric = match ratio > 1.02 {
        true => Metric::Anisotropic { angle, ratio },
        false => Metric::Euclidean,
    };
    let matern = Matern { smoothness: ORDERS[c], length_scale, sill, metric };
    Read { kernel: Box::new(matern), nugget: read[2].clamp(-60.0, 60.0).exp() }
}

/// What is read, as a local kernel. Directions are those of a plane.
fn local(read: &[f64; READ], dim: usize) -> Local {
    let turned = if dim == 2 { read[3].hypot(read[4]) } else { 0.0 };
    // Ratios beyond those it learned from are not believed.
    let ratio = turned.min(2.0).exp();
    let angle = if turned > 0.0 { 0.5 * read[4].atan2(read[3]) } else { 0.0 };
    let bounded = |x: f64| x.clamp(-60.0, 60.0).exp();
    Local { length_scale: bounded(read[0]) * ratio.sqrt(), ratio, angle, sill: bounded(read[1]) }
}

/// Windows of a row: those of all sites first, then of ever thinner parts of them.
struct Windows {
    all: Vec<Window>,
    /// How many of them are of all sites.
    fine: usize,
}

/// Parts of at most `most` sites each, cut across the longer side.
fn cells(row: &Row, sites: &mut [u32], most: usize, out: &mut Vec<Vec<u32>>) {
    if sites.len() <= most {
        out.push(sites.to_vec());
        return;
    }
    let at = |i: u32| place(&row.sites[i as usize]);
    let side = |d: usize| {
        let (low, high) = sites.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), i| {
            (a.min(at(*i)[d]), b.max(at(*i)[d]))
        });
        high - low
    };
    let d = (0..3).max_by(|a, b| side(*a).total_cmp(&side(*b))).unwrap_or(0);
    let half = sites.len() / 2;
    // Equal places are told apart by what was seen there: the listing must not matter.
    sites.select_nth_unstable_by(half, |a, b| {
        let (p, q, y) = (at(*a), at(*b), |i: u32| row.y[i as usize]);
        let places = p.iter().zip(&q).map(|(a, b)| a.total_cmp(b)).find(|o| o.is_ne());
        p[d].total_cmp(&q[d])
            .then(places.unwrap_or(std::cmp::Ordering::Equal))
            .then_with(|| y(*a).total_cmp(&y(*b)))
    });
    let (left, right) = sites.split_at_mut(half);
    cells(row, left, most, out);
    cells(row, right, most, out);
}

impl Windows {
    /// The sites' `order` is as [`spread`] has it.
    fn of(row: &Row, order: &[usize], most: usize, likelihood: &dyn Likelihood) -> Self {
        let n = row.y.len();
        let mut levels: Vec<Vec<u32>> = vec![(0..n as u32).collect()];
        if n > most {
            let mut part = n;
            while part > most {
                part /= COARSER;
                levels.push(order[..part.max(most.min(n))].iter().map(|i| *i as u32).collect());
                part = part.max(most.min(n));
                if part == most {
                    break;
                }
            }
        }
        let (mut all, mut fine) = (Vec::new(), 0);
        for (i, mut level) in levels.into_iter().enumerate() {
            let mut parts = Vec::new();
            cells(row, &mut level, most, &mut parts);
            let read = |part: &Vec<u32>| Window::read(row, part, likelihood);
            let read: Vec<Option<Window>> = {
                use rayon::prelude::*;
                parts.par_iter().map(read).collect()
            };
            all.extend(read.into_iter().flatten());
            fine = if i == 0 { all.len() } else { fine };
        }
        Windows { all, fine }
    }
}

/// One row under one or several covariances: log weights and posteriors.
type Members = Vec<(f64, Box<dyn Posterior>)>;

struct Conditioned(Vec<Members>);

impl Kriging {
    fn raw(&self, windows: &[&Window]) -> Result<Tensor> {
        let (device, dtype) = self.network.place();
        let flat: Vec<f64> = windows.iter().flat_map(|w| w.features.iter().copied()).collect();
        let features =
            Tensor::from_vec(flat, (1, windows.len(), WIDTH), device)?.to_dtype(dtype)?;
        Ok(self.network.forward(&features)?.squeeze(0)?)
    }

    fn readings(&self, windows: &[Window]) -> Result<Vec<Reading>> {
        if windows.is_empty() {
            return Ok(Vec::new());
        }
        let raw = self.raw(&windows.iter().collect::<Vec<_>>())?.detach();
        let raw = raw.to_dtype(candle_core::DType::F64)?.to_vec2::<f64>()?;
        Ok(raw.iter().map(|raw| Reading::of(raw)).collect())
    }

    /// From units of the prior in a window to the context's.
    fn outside(&self, read: &[f64; READ], window: &Window) -> [f64; READ] {
        let shift = self.shift(window);
        std::array::from_fn(|i| shift[i] + self.sd[i] * read[i])
    }

    /// Mean of the prior in a window, in the context's units.
    fn shift(&self, window: &Window) -> [f64; READ] {
        let scale = window.scale.ln();
        let add = [window.unit.ln(), scale, scale, 0.0, 0.0];
        std::array::from_fn(|i| self.mean[i] + add[i])
    }

    /// Information in units of the prior, in the context's.
    fn moved(&self, within: &Information, window: &Window) -> Information {
        let shift = self.shift(window);
        let mut out = Information::NONE;
        for i in 0..READ {
            out.pull[i] = within.pull[i] / self.sd[i];
            for (j, shift) in shift.iter().enumerate() {
                out.precision[i][j] = within.precision[i][j] / (self.sd[i] * self.sd[j]);
                out.pull[i] += out.precision[i][j] * shift;
            }
        }
        out
    }

    fn gp(&self, read: Read, row: &Row) -> Result<NearestGp> {
        let (mean, variance) = row.centre(self.likelihood);
        let belief = if self.likelihood.counts() { 25.0 } else { 100.0 * variance };
        let (mean, belief) = if row.y.is_empty() { (0.0, 1.0) } else { (mean, belief) };
        let near = self.config.near;
        let gp = NearestGp::new(read.kernel, read.nugget, mean, self.likelihood)?;
        let gp = gp.uncertain_mean(belief).neighbours(PREVIOUS, near);
        // Few sites do not tell a trend from a surface, nor do counts of few people.
        let sloped = !self.likelihood.counts() && row.y.len() > 2 * self.config.window;
        if sloped { gp.sloped(belief) } else { Ok(gp) }
    }

    /// Several covariances where few sites leave it in doubt.
    fn in_doubt(&self, row: &Row, alone: &Observations, dim: usize) -> Result<Members> {
        let sites: Vec<u32> = (0..row.y.len() as u32).collect();
        let window = Window::read(row, &sites, self.likelihood);
        let (window, reading) = match window {
            Some(window) => {
                let reading = self.readings(std::slice::from_ref(&window))?.remove(0);
                (window, reading)
            }
            // Nothing to be read: the prior.
            None => {
                let features = vec![0.0; WIDTH];
                let window = Window { centre: [0.0; 3], unit: 1.0, scale: 1.0, features };
                (window, Reading::of(&[0.0; ORDERS.len() * OUTPUTS]))
            }
        };
        let mut members: Members = Vec::new();
        for c in 0..ORDERS.len() {
            if reading.order[c] < NEGLIGIBLE.ln() {
                continue;
            }
            let log = reading.order[c] - (self.config.draws as f64).ln();
            for k in 0..self.config.draws {
                let mut rng = Stream::new(1, "covariance", (k / 2) as u64);
                let sign = if k % 2 == 0 { 1.0 } else { -1.0 };
                let normal: [f64; READ] = std::array::from_fn(|_| sign * rng.normal());
                let read = self.outside(&reading.draw(c, &normal), &window);
                let gp = self.gp(kernel(c, &read, dim), row)?;
                if self.likelihood.counts() {
                    members.push((log, gp.conditioned(alone)?));
                    continue;
                }
                // What the survey itself says of each draw tells the better of them.
                let (posterior, evidence) = gp.weighed(alone)?;
                let wide: f64 = (0..READ).map(|i| reading.factor[c][i][i].ln()).sum();
                let drawn = wide - 0.5 * normal.iter().map(|z| z * z).sum::<f64>();
                members.push(((1.0 - HEED) * log + HEED * (evidence[0] - drawn), posterior));
            }
        }
        Ok(members)
    }

    /// The one covariance that many windows agree on, or one that varies between them.
    fn pooled(&self, row: &Row, alone: &Observations, dim: usize) -> Result<Members> {
        let spread_out = spread(&row.sites, &row.y);
        let Windows { all, fine } =
            Windows::of(row, &spread_out, self.config.window, self.likelihood);
        let readings = self.readings(&all)?;
        let Some(whole) = all.last() else { return self.in_doubt(row, alone, dim) };
        // Odds of a smoothness multiply over windows, its prior divided out.
        let prior = (1.0 / ORDERS.len() as f64).ln();
        let mut order = [prior; ORDERS.len()];
        for reading in &readings {
            for (c, o) in order.iter_mut().enumerate() {
                *o += reading.order[c].max(-6.0) - prior;
            }
        }
        let counts = self.likelihood.counts();
        // A row has no sites that were not observed.
        let spread_out = match row.y.len() == alone.len() {
            true => spread_out,
            false => spread(&alone.sites.host()?[0], &vec![0.0; alone.len()]),
        };
        let judged = judges(alone, &spread_out, JUDGES)?;
        let jury = |of: &Observations| Jury::new(of, self.likelihood).map(RefCell::new);
        let first_word = if counts { Some(jury(&judged)?) } else { None };
        let last_word = match counts && alone.len() > 2 * JUDGES {
            true => Some(jury(&judges(alone, &spread_out, MANY_COUNTS)?)?),
            false => None,
        };
        let by = |jury: Option<&RefCell<Jury>>, read: Read| -> Result<f64> {
            let gp = self.gp(read, row)?;
            match jury {
                Some(jury) => gp.log_marginal_of(&mut jury.borrow_mut()),
                None => Ok(gp.log_marginals(&judged)?[0]),
            }
        };
        let mut likely: Vec<usize> = (0..ORDERS.len()).collect();
        likely.sort_by(|a, b| order[*b].total_cmp(&order[*a]));
        let mut best: Option<(f64, Read)> = None;
        let mut off_before: Option<[f64; READ]> = None;
        // Windows are not independent and the network is not exact: the second is tried too.
        for c in likely.into_iter().take(2) {
            let mut said: Vec<Information> = readings
                .iter()
                .zip(&all)
                .map(|(reading, window)| Ok(self.moved(&reading.beyond_prior(c)?, window)))
                .collect::<Result<_>>()?;
            let mut total = Information::NONE;
            said.iter().for_each(|one| total.add(one, 1.0));
            let agreed = total.with(self.shift(whole), self.sd).mean()?;
            // What windows have wrong of one smoothness they have of the next, more or less.
            let (start, tried) = match off_before {
                Some(off) => (std::array::from_fn(|i| agreed[i] + off[i]), COUNTS_TRIED[0] / 2),
                None => (agreed, if counts { COUNTS_TRIED[0] } else { TRIED }),
            };
            let free = if dim == 2 && !counts { READ } else { 3 };
            let first = |read: &[f64; READ]| by(first_word.as_ref(), kernel(c, read, dim));
            let (mut read, mut value) = polished(c, &start, free, 0.4, tried, &first);
            let among_few = value;
            if last_word.is_some() {
                let second = |read: &[f64; READ]| by(last_word.as_ref(), kernel(c, read, dim));
                (read, value) = polished(c, &read, free, 0.2, COUNTS_TRIED[1], &second);
            }
            // What all windows have wrong alike, the whole has put right.
            let off: [f64; READ] = std::array::from_fn(|i| read[i] - agreed[i]);
            off_before = counts.then_some(off);
            for one in &mut said {
                for (pull, row) in one.pull.iter_mut().zip(&one.precision) {
                    *pull += row.iter().zip(&off).map(|(p, o)| p * o).sum::<f64>();
                }
            }
            if best.as_ref().is_none_or(|(before, _)| value > *before) {
                best = Some((value, kernel(c, &read, dim)));
            }
            if fine < SEVERAL || dim > 2 {
                continue;
            }
            for stray in STRAY {
                let field = LocalField::of(&all[..fine], &said[..fine], &read, stray)?;
                let varying = || Read {
                    kernel: Box::new(field.kernel(ORDERS[c], dim)),
                    nugget: kernel(c, &read, dim).nugget,
                };
                // Where few of many counts would have none of it, many need not be asked.
                if last_word.is_some() && by(first_word.as_ref(), varying())? < among_few {
                    continue;
                }
                let value = by(last_word.as_ref().or(first_word.as_ref()), varying())? - WORTH;
                if best.as_ref().is_none_or(|(before, _)| value > *before) {
                    best = Some((value, varying()));
                }
            }
        }
        let (_, read) = best.ok_or_else(|| {
            Error::input("the observations have no finite likelihood under any covariance")
                .try_this("check the observations for extreme values")
        })?;
        Ok(vec![(0.0, self.gp(read, row)?.conditioned(alone)?)])
    }
}

/// The covariance near `start` that makes some of the observations most likely, and how likely.
///
/// Length scale and sill move together first, along the line on which near sites look the same.
fn polished(
    c: usize,
    start: &[f64; READ],
    free: usize,
    span: f64,
    tried: usize,
    evidence: &dyn Fn(&[f64; READ]) -> Result<f64>,
) -> ([f64; READ], f64) {
    let twice_order = [1.0, 3.0, 5.0][c];
    let moved = |x: &[f64]| -> [f64; READ] {
        let step = [x[0], twice_order * x[0] + x[1], x[2], 0.0, 0.0];
        std::array::from_fn(|i| {
            start[i] + step[i] + if i > 2 { x.get(i).copied().unwrap_or(0.0) } else { 0.0 }
        })
    };
    let cost = |x: &[f64]| {
        let away: f64 = x.iter().map(|x| x * x / 8.0).sum();
        evidence(&moved(x)).map_or(f64::INFINITY, |value| away - value)
    };
    let (x, cost) = minimise(cost, &vec![0.0; free], span, 0.05, tried);
    (moved(&x), -cost)
}

/// Sites that judge between covariances, `most` of them: half evenly spread, for how the surface hangs
/// together from afar; half whole neighbourhoods, for how it does from near. All where there are few. Their
/// `order` is as [`spread`] has it.
fn judges(context: &Observations, order: &[usize], most: usize) -> Result<Observations> {
    let n = context.len();
    if n <= most {
        return Ok(context.clone());
    }
    let s = context.sites.host()?.remove(0);
    const BLOCK: usize = 100;
    let flat: Vec<f64> = s.iter().flatten().copied().collect();
    let tree = Tree::new(&flat, s[0].len());
    let mut kept: BTreeSet<u32> = order[..most / 2].iter().map(|i| *i as u32).collect();
    let mut found = Vec::new();
    for i in order {
        tree.nearest(&s[*i], BLOCK, n, &mut found);
        kept.extend(found.iter().map(|(_, j)| *j));
        if kept.len() >= most {
            break;
        }
    }
    let kept: Vec<u32> = kept.into_iter().collect();
    let kept = Tensor::new(kept, context.y.device())?;
    let pick = |x: &Tensor| -> Result<Tensor> { Ok(x.contiguous()?.index_select(&kept, 1)?) };
    Ok(Observations {
        sites: context.sites.map(pick)?,
        y: pick(&context.y)?,
        mask: pick(&context.mask)?,
        trials: context.trials.as_ref().map(pick).transpose()?,
    })
}

/// What is read at the nodes of a raster, between which it is bilinear.
#[derive(Clone)]
struct LocalField {
    low: [f64; 2],
    step: [f64; 2],
    nodes: [usize; 2],
    read: Vec<[f64; READ]>,
}

impl LocalField {
    /// Windows near a node count by distance; all pull towards `whole`, from which a place strays by
    /// `stray`.
    fn of(
        windows: &[Window],
        said: &[Information],
        whole: &[f64; READ],
        stray: f64,
    ) -> Result<Self> {
        let end = |d: usize, sign: f64, by: fn(f64, f64) -> f64| {
            windows.iter().map(|w| w.centre[d] + sign * w.unit).reduce(by).unwrap_or(0.0)
        };
        let low = [0, 1].map(|d| end(d, -1.0, f64::min));
        let high = [0, 1].map(|d| end(d, 1.0, f64::max));
        let longer = (high[0] - low[0]).max(high[1] - low[1]).max(f64::MIN_POSITIVE);
        let nodes = [0, 1]
            .map(|d| (1.0 + (NODES as f64 * (high[d] - low[d]) / longer).ceil()).max(2.0) as usize);
        let step = [0, 1].map(|d| (high[d] - low[d]).max(1e-12) / (nodes[d] - 1) as f64);
        // The nugget is one for all, and directions turn less than lengths change.
        let sd = [stray, stray, 1e-3, 0.5 * stray, 0.5 * stray];
        let at = |k: usize| -> Result<[f64; READ]> {
            let p = [0, 1].map(|d| {
                let i = if d == 0 { k % nodes[0] } else { k / nodes[0] };
                low[d] + i as f64 * step[d]
            });
            let mut here = Information::NONE;
            for (window, said) in windows.iter().zip(said) {
                let reach = 2.0 * window.unit;
                let (dx, dy) = (p[0] - window.centre[0], p[1] - window.centre[1]);
                let square = (dx * dx + dy * dy) / (reach * reach);
                if square < 16.0 {
                    here.add(said, (-0.5 * square).exp());
                }
            }
            here.with(*whole, sd).mean()
        };
        let read = {
            use rayon::prelude::*;
            (0..nodes[0] * nodes[1]).into_par_iter().map(at).collect::<Result<_>>()?
        };
        Ok(LocalField { low, step, nodes, read })
    }

    fn at(&self, p: &[f64]) -> [f64; READ] {
        let (mut node, mut share) = ([0; 2], [0.0; 2]);
        for d in 0..2 {
            let last = (self.nodes[d] - 1) as f64;
            let x = p.get(d).copied().unwrap_or(0.0);
            let x = ((x - self.low[d]) / self.step[d]).clamp(0.0, last);
            node[d] = (x as usize).min(self.nodes[d] - 2);
            share[d] = x - node[d] as f64;
        }
        let at = |i: usize, j: usize| &self.read[node[0] + i + (node[1] + j) * self.nodes[0]];
        let [x, y] = share;
        std::array::from_fn(|k| {
            (1.0 - y) * ((1.0 - x) * at(0, 0)[k] + x * at(1, 0)[k])
                + y * ((1.0 - x) * at(0, 1)[k] + x * at(1, 1)[k])
        })
    }

    fn kernel(&self, smoothness: Smoothness, dim: usize) -> Varying {
        let field = self.clone();
        let sill = self.read.iter().map(|read| local(read, dim).sill).fold(0.0, f64::max);
        Varying { smoothness, sill, local: Arc::new(move |p| local(&field.at(p), dim)) }
    }
}

/// Refuses sites with times.
fn timeless(context: &Observations) -> Result<()> {
    match &context.sites.t {
        None => Ok(()),
        Some(_) => Err(Error::input("models of kind kriging do not read times yet")
            .fact("sites with times", context.sites.len())
            .try_this("leave the times out, or use --model gp, which is fitted to them")),
    }
}

impl Process for Kriging {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        timeless(context)?;
        let each = rows(context, self.likelihood, 0, false)?;
        let dim = context.sites.s.dims()[2];
        let members = each.iter().enumerate().map(|(b, row)| {
            let alone = context.rows(b, 1)?;
            let alone = Observations { sites: Sites::new(alone.sites.s), ..alone };
            match row.y.len() <= 2 * self.config.window {
                true => self.in_doubt(row, &alone, dim),
                false => self.pooled(row, &alone, dim),
            }
        });
        Ok(Box::new(Conditioned(members.collect::<Result<_>>()?)))
    }

    /// Distances are all it knows of a site; directions are those of a plane.
    fn any_dimension(&self) -> bool {
        true
    }

    fn memory(&self, sites: usize) -> Memory {
        // As the nearest-neighbour process, and the features of windows at all levels.
        let held = sites * 200;
        let windows = 2 * sites.div_ceil(self.config.window / 2) * WIDTH * 8;
        if self.likelihood.counts() {
            // Where the covariance stays in doubt every draw of it has a posterior.
            let few = sites <= 2 * self.config.window;
            let members = if few { ORDERS.len() * self.config.draws } else { 1 };
            let one = NearestGp::memory_for(sites, [PREVIOUS, self.config.near], true);
            return Memory {
                conditioning: (members - 1) * one.held + one.conditioning + windows + (3 << 20),
                held: members * one.held,
                target: 2816,
            };
        }
        // Covariances among neighbours stand in the room that targets are given.
        Memory { conditioning: 4 * held + windows + (3 << 20), held, target: 1536 }
    }

    /// The log density of the true covariance under what is read of each row's context.
    fn objective(&self, task: &Task, _: Reward, _: &mut Stream) -> Result<Option<Objective>> {
        let Some(hyper) = &task.hyper else {
            return Err(Error::input("this model learns from covariances, and no kernel is known")
                .try_this("draw from a prior of kind gp"));
        };
        let hyper = hyper.to_dtype(candle_core::DType::F64)?.to_vec2::<f64>()?;
        timeless(&task.context)?;
        let each = rows(&task.context, self.likelihood, 0, false)?;
        let mut windows = Vec::new();
        for row in &each {
            let sites: Vec<u32> = (0..row.y.len() as u32).collect();
            windows.push(Window::read(row, &sites, self.likelihood));
        }
        let nothing =
            Window { centre: [0.0; 3], unit: 1.0, scale: 1.0, features: vec![0.0; WIDTH] };
        let (mut truth, mut known) = (Vec::new(), Vec::new());
        for (hyper, window) in hyper.iter().zip(&windows) {
            let hyper: &[f64; HYPER] = hyper.as_slice().try_into().expect("as sites.rs has it");
            let order = hyper[1] as usize;
            let sound = hyper[0] > 0.5 && order < ORDERS.len() && window.is_some();
            let shift = self.shift(window.as_ref().unwrap_or(&nothing));
            truth.extend((0..READ).map(|i| (hyper[2 + i] - shift[i]) / self.sd[i]));
            known.extend((0..ORDERS.len()).map(|c| if sound && c == order { 1.0 } else { 0.0 }));
        }
        let count: f64 = known.iter().sum();
        let windows: Vec<&Window> =
            windows.iter().map(|w| w.as_ref().unwrap_or(&nothing)).collect();
        let raw = self.raw(&windows)?; // [row, order · output]
        let like = |values: Vec<f64>, width: usize| -> Result<Tensor> {
            let shape = (windows.len(), width);
            Ok(Tensor::from_vec(values, shape, raw.device())?.to_dtype(raw.dtype())?)
        };
        let (truth, known) = (like(truth, READ)?, like(known, ORDERS.len())?);
        let mut odds = Vec::new();
        let mut densities = Vec::new();
        for c in 0..ORDERS.len() {
            let part = |start: usize, len: usize| raw.narrow(1, c * OUTPUTS + start, len);
            odds.push(part(0, 1)?);
            let off = (&truth - part(1, READ)?)?;
            let log_diagonal = part(1 + READ, READ)?.clamp(-LOG_MOST, LOG_MOST)?;
            let mut square = None;
            let mut above = 1 + 2 * READ;
            for i in 0..READ {
                let mut w = (log_diagonal.narrow(1, i, 1)?.exp()? * off.narrow(1, i, 1)?)?;
                let rest = READ - 1 - i;
                if rest > 0 {
                    let row = (part(above, rest)? * off.narrow(1, i + 1, rest)?)?;
                    w = (w + row.sum_keepdim(1)?)?;
                }
                above += rest;
                let w = w.sqr()?;
                square = Some(match square {
                    Some(before) => (before + w)?,
                    None => w,
                });
            }
            let square = square.expect("something is read");
            densities.push((log_diagonal.sum_keepdim(1)? - (square * 0.5)?)?);
        }
        let odds = Tensor::cat(&odds, 1)?;
        let odds = odds.broadcast_sub(&odds.log_sum_exp(D::Minus1)?.unsqueeze(1)?)?;
        let density = (Tensor::cat(&densities, 1)? + &odds)?;
        let loss = ((density * &known)?.sum_all()? * (-1.0 / count.max(1.0)))?;
        let odds = (odds * known)?.sum_all()?.to_dtype(candle_core::DType::F64)?;
        let measured = vec![("smoothness", -odds.to_scalar::<f64>()? / count.max(1.0))];
        Ok(Some(Objective { loss, measured, surrogate: false }))
    }
}

impl Posterior for Conditioned {
    /// A mixture with one component for each covariance.
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        if targets.batch() != self.0.len() {
            return Err(Error::axis(
                "rows of targets and of the context",
                targets.batch(),
                self.0.len(),
            ));
        }
        let most = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let mut rows = Vec::new();
        for (b, members) in self.0.iter().enumerate() {
            let asked = targets.rows(b, 1)?;
            let mut parts: Vec<(f64, Predictive)> = members
                .iter()
                .map(|(log, posterior)| Ok((*log, posterior.at(&asked)?)))
                .collect::<Result<_>>()?;
            // Rows of one batch have as many components: the first is split among those that lack.
            let lacking = most - parts.len();
            parts[0].0 -= ((1 + lacking) as f64).ln();
            parts.extend(vec![parts[0].clone(); lacking]);
            let total = log_sum_exp(&parts.iter().map(|p| p.0).collect::<Vec<_>>());
            let join = |of: &dyn Fn(&(f64, Predictive)) -> Result<Tensor>| -> Result<Tensor> {
                let all = parts.iter().map(of).collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&all, D::Minus1)?)
            };
            rows.push(Predictive {
                log_weight: join(&|p| Ok((&p.1.log_weight + (p.0 - total))?))?,
                mean: join(&|p| Ok(p.1.mean.clone()))?,
                surface_sd: join(&|p| Ok(p.1.surface_sd.clone()))?,
                observation_sd: join(&|p| Ok(p.1.observation_sd.clone()))?,
                ..parts[0].1.clone()
            });
        }
        let [first, ..] = &rows[..] else {
            return Err(Error::input("a batch of no rows was asked about"));
        };
        let stack = |of: fn(&Predictive) -> &Tensor| {
            Tensor::cat(&rows.iter().map(of).collect::<Vec<_>>(), 0)
        };
        Ok(Predictive {
            log_weight: stack(|p| &p.log_weight)?,
            mean: stack(|p| &p.mean)?,
            surface_sd: stack(|p| &p.surface_sd)?,
            observation_sd: stack(|p| &p.observation_sd)?,
            ..first.clone()
        })
    }

    /// Of the one covariance of a large survey; under several, of the likeliest.
    fn field(&self, draws: usize, seed: u64, extent: f64) -> Result<Box<dyn Field + '_>> {
        let [members] = &self.0[..] else {
            return Err(Error::axis("rows of the context to draw surfaces of", self.0.len(), 1));
        };
        let best = members.iter().max_by(|a, b| a.0.total_cmp(&b.0));
        best.ok_or(Error::NoJointDraws)?.1.field(draws, seed, extent)
    }
}
