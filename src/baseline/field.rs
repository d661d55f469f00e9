//! Joint posterior draws of a Gaussian process that can be asked anywhere: Matheron's rule.
//!
//! A draw of the posterior is a draw of the prior, moved by what kriging makes of the difference
//! between the data and what noisy observations of that draw would have been. Its deviation from the
//! posterior mean does not hang on the data: `δ = g − k (K + Σ)⁻¹ (g(X) + ε)`.
//!
//! Sources: Journel & Huijbregts (1978), "Mining geostatistics", VII.A.1, for conditioning by
//! kriging; Wilson et al. (2020), arXiv:2002.09309, for prior draws by waves and an exact correction:
//! what waves lack is lacking in the prior alone. For counts, Σ is the noise of Laplace's
//! pseudo-values. The mean's levels are off by a draw of what is left open of them, which the error of
//! kriging with known levels does not hang on.
//!
//! Covariates have a coefficient in each draw, of one law with its surface: it is drawn from its prior
//! and moved by the sites as the surface is (universal kriging), or, where the process knows the
//! surface given the coefficients alone, it is drawn from its posterior and the surface given it.

use faer::{Accum, Mat, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use super::{
    elimination::{LANES, Lane},
    exact_gp::{self, ExactGp},
    kriging::{Levels, dot},
    nearest::{self, NearestGp},
    regression::Coefficients,
    spectral::Spectral,
};
use crate::{
    error::{Error, Result},
    fused::simd,
    linalg::lower,
    predictive::Of,
    process::{Drawn, Field, Posterior},
    rng::Stream,
    sites::Sites,
};

/// Places whose draws are made at once: memory and speed, and the same for every caller.
const CHUNK: usize = 512;
/// Sites times draws that are held for the nearest-neighbour process: a GiB.
const MOST_HELD: usize = 1 << 28;

/// Refuses fields of no draws.
fn check(draws: usize) -> Result<()> {
    if draws == 0 {
        return Err(Error::input("no surface is asked for").try_this("ask for 100 draws, say"));
    }
    Ok(())
}

/// Longest distance between the sites' corners, or `extent` where that is longer; and of sites whose
/// last coordinate is a time, how long between the first and the last of them.
fn reach(sites: &[Vec<f64>], extent: f64, timed: bool) -> [f64; 2] {
    let side = |d: usize| {
        let axis = sites.iter().map(|s| s[d]);
        let (low, high) =
            axis.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        (high - low).max(0.0)
    };
    let dim = sites.first().map_or(0, Vec::len);
    let of_place = dim.saturating_sub(usize::from(timed));
    let longest = extent.max((0..of_place).map(|d| side(d).powi(2)).sum::<f64>().sqrt());
    [longest, (of_place..dim).map(side).sum()]
}

/// The mean's deviation from the prior's, in each draw.
fn levels(variance: f64, draws: usize, seed: u64) -> Vec<f64> {
    let mut rng = Stream::new(seed, "level of a field", 0);
    rng.normals(draws).iter().map(|z| variance.sqrt() * z).collect()
}

/// Independent coefficients of each draw, of mean 0 and variance 1: `[draw, feature]`.
fn slopes(draws: usize, features: usize, seed: u64) -> Mat<f64> {
    let drawn: Vec<Vec<f64>> = (0..features)
        .map(|j| Stream::new(seed, "coefficients of a field", j as u64).normals(draws))
        .collect();
    Mat::from_fn(draws, features, |d, j| drawn[j][d])
}

/// Covariates of one row of targets: `[feature, target]`.
fn features(targets: &Sites, features: usize) -> Result<Mat<f64>> {
    if features == 0 {
        return Ok(Mat::zeros(0, targets.len()));
    }
    let rows = exact_gp::places(targets, features, false)?;
    let places = rows.first().map_or(&[][..], Vec::as_slice);
    Ok(behind(places, features))
}

/// The last `features` numbers of each site: `[feature, site]`.
pub(super) fn behind(sites: &[Vec<f64>], features: usize) -> Mat<f64> {
    Mat::from_fn(features, sites.len(), |j, i| sites[i][sites[i].len() - features + j])
}

/// The prior draws at places, a column for each: `[draw, place]`.
fn prior_at(prior: &Spectral, draws: usize, places: &[Vec<f64>]) -> Mat<f32> {
    let parts: Vec<Mat<f32>> = places
        .par_chunks(CHUNK)
        .map(|places| {
            let mut out = Mat::zeros(draws, places.len());
            prior.add(places, out.as_mut());
            out
        })
        .collect();
    let mut whole = Mat::zeros(draws, places.len());
    for (i, part) in parts.iter().enumerate() {
        whole.as_mut().subcols_mut(i * CHUNK, part.ncols()).copy_from(part);
    }
    whole
}

/// The one row of targets, of as many numbers for each as sites have.
fn one_row(mut rows: Vec<Vec<Vec<f64>>>, dim: usize) -> Result<Vec<Vec<f64>>> {
    let (rows, places) = (rows.len(), rows.pop().unwrap_or_default());
    if rows != 1 {
        return Err(Error::axis("rows of targets to draw surfaces over", rows, 1));
    }
    if let Some(place) = places.iter().find(|place| place.len() != dim) {
        return Err(Error::axis("dimensions of places to draw surfaces over", place.len(), dim));
    }
    Ok(places)
}

/// Coordinates of sites on a plane, perhaps with a time, or in space; of sites on a line there are no
/// fields.
fn spread(sites: &[Vec<f64>], timed: bool) -> Result<usize> {
    let dim = sites.first().map_or(2 + usize::from(timed), Vec::len);
    match dim {
        2 | 3 => Ok(dim),
        _ => Err(Error::input(
            "joint draws are made on a plane, with times or without, or in space, and not in more dimensions",
        )
        .fact("coordinates of a site", dim)
        .try_this("ways around a barrier may need more: leave the barrier out, or the draws")),
    }
}

/// Draws given every site: of the exact process.
pub(super) struct Dense<'a> {
    posterior: &'a dyn Posterior,
    gp: &'a ExactGp,
    sites: Vec<Vec<f64>>,
    prior: Spectral,
    /// What a draw has everywhere: its mean, and what the sites take off it.
    level: Vec<f64>,
    /// Its coefficients less their posterior mean: `[draw, feature]`.
    slopes: Mat<f64>,
    /// What each site adds to each draw, times its covariance: `[draw, site]`.
    weight: Mat<f64>,
}

impl<'a> Dense<'a> {
    /// `draws` draws of what `posterior` is the posterior of.
    pub fn new(
        posterior: &'a dyn Posterior,
        gp: &'a ExactGp,
        row: &exact_gp::Fitted,
        draws: usize,
        seed: u64,
        extent: f64,
    ) -> Result<Self> {
        check(draws)?;
        let features = gp.features();
        let sites: Vec<Vec<f64>> =
            row.sites.iter().map(|site| site[..site.len() - features].to_vec()).collect();
        let (n, timed) = (sites.len(), gp.reads_time());
        let dim = spread(&sites, timed)?;
        let prior = Spectral::new(&*gp.kernel, dim, draws, seed, reach(&sites, extent, timed))?;
        let z = behind(&row.sites, features);
        let mut slopes = slopes(draws, features, seed);
        let sd = gp.coefficient_variance.sqrt();
        (0..features).for_each(|j| slopes.col_as_slice_mut(j).iter_mut().for_each(|v| *v *= sd));
        let mut level = levels(gp.mean_variance, draws, seed);
        let drawn = prior_at(&prior, draws, &sites);
        // Noise in the factor's own scale, in which that of a count that says nothing is one too.
        let noise: Vec<Vec<f64>> = (0..n)
            .map(|i| {
                let own = row.scale[i].powi(2) * gp.nugget;
                let sd = if gp.reads_counts() { own + 1.0 } else { own }.sqrt();
                let mut rng = Stream::new(seed, "noise of a field", i as u64);
                rng.normals(draws).iter().map(|z| sd * z).collect()
            })
            .collect();
        let columns: Vec<Vec<f64>> = (0..draws)
            .into_par_iter()
            .map(|d| {
                let effect = |i: usize| -> f64 {
                    z.col_as_slice(i).iter().enumerate().map(|(j, z)| z * slopes[(d, j)]).sum()
                };
                let residual: Vec<f64> = (0..n)
                    .map(|i| {
                        let surface = level[d] + effect(i) + f64::from(drawn[(d, i)]);
                        row.scale[i] * surface + noise[i][d]
                    })
                    .collect();
                let solved = row.factor.solve(&residual);
                solved.iter().zip(&row.scale).map(|(v, scale)| -v * scale).collect()
            })
            .collect();
        for (level, column) in level.iter_mut().zip(&columns) {
            *level += gp.mean_variance * column.iter().sum::<f64>();
        }
        let weight = Mat::from_fn(draws, n, |d, i| columns[d][i]);
        let (variance, by, z) = (gp.coefficient_variance, weight.as_ref(), z.as_ref());
        matmul(slopes.as_mut(), Accum::Add, by, z.transpose(), variance, Par::Seq);
        Ok(Dense { posterior, gp, sites, prior, level, slopes, weight })
    }

    /// `[place, draw]`, at places with covariates `z` `[feature, place]`.
    fn deviations(&self, places: &[Vec<f64>], z: MatRef<f64>) -> Vec<f32> {
        let draws = self.level.len();
        let axis = |d: usize| self.sites.iter().map(|s| s[d]).collect::<Vec<f64>>();
        let plane = self.sites.iter().all(|s| s.len() == 2);
        let (x, y) = if plane { (axis(0), axis(1)) } else { Default::default() };
        let mut known = Mat::<f64>::zeros(self.sites.len(), places.len());
        for (i, place) in places.iter().enumerate() {
            let known = known.col_as_slice_mut(i);
            match plane {
                true => self.gp.kernel.column([place[0], place[1]], &x, &y, known),
                false => known
                    .iter_mut()
                    .zip(&self.sites)
                    .for_each(|(out, site)| *out = self.gp.kernel.covariance(site, place)),
            }
        }
        let mut moved = Mat::<f64>::zeros(draws, places.len());
        let (weight, known) = (self.weight.as_ref(), known.as_ref());
        matmul(moved.as_mut(), Accum::Replace, weight, known, 1.0, Par::Seq);
        matmul(moved.as_mut(), Accum::Add, self.slopes.as_ref(), z, 1.0, Par::Seq);
        let mut out = Mat::<f32>::zeros(draws, places.len());
        self.prior.add(places, out.as_mut());
        let mut all = Vec::with_capacity(draws * places.len());
        for i in 0..places.len() {
            let (out, moved) = (out.col_as_slice(i), moved.col_as_slice(i));
            all.extend((0..draws).map(|d| out[d] + (moved[d] + self.level[d]) as f32));
        }
        all
    }
}

impl Field for Dense<'_> {
    fn draws(&self) -> usize {
        self.level.len()
    }

    fn at(&self, targets: &Sites) -> Result<Drawn> {
        let dim = self.sites.first().map_or(2, Vec::len);
        let places = one_row(exact_gp::places(targets, 0, self.gp.reads_time())?, dim)?;
        let z = features(targets, self.gp.features())?;
        let parts: Vec<Vec<f32>> = places
            .par_chunks(CHUNK)
            .enumerate()
            .map(|(i, places)| self.deviations(places, z.subcols(i * CHUNK, places.len())))
            .collect();
        let marginals = self.posterior.at(targets)?.marginals(0, Of::Surface)?;
        // The surface is the same Gaussian in every component.
        let first = |values: &[f64]| values.iter().step_by(marginals.components).copied().collect();
        let (mean, sd) = (first(&marginals.mean), first(&marginals.sd));
        Ok(Drawn { mean, sd, deviations: parts.concat() })
    }

    fn error(&self) -> f64 {
        self.prior.error
    }
}

/// Draws given each place's nearest sites: of the nearest-neighbour process. Conditioning is by the
/// weights that krige the place, so that means and sds are those of its posterior.
pub(super) struct Local<'a> {
    gp: &'a NearestGp,
    row: &'a nearest::Fitted,
    dim: usize,
    prior: Spectral,
    /// How far off the mean's levels are found in each draw.
    off: Vec<Levels>,
    /// What noisy observations of each draw would be, or what counts would say of its surface:
    /// `[draw, site]`.
    told: Mat<f32>,
    effects: Option<Effects>,
}

/// Coefficients of a process that knows the surface given them: their law, and its draws.
struct Effects {
    law: Coefficients,
    /// What is told of covariates at the sites as if they were surfaces, and of the mean's levels:
    /// `[feature, site]`, `[feature]`.
    told: Mat<f64>,
    found: Vec<Levels>,
    /// The coefficients of each draw less their mean: `[feature][draw]`.
    slopes: Vec<Vec<f32>>,
}

impl Effects {
    fn new(
        law: &Coefficients,
        (told, found): (Mat<f64>, Vec<Levels>),
        draws: usize,
        seed: u64,
    ) -> Result<Self> {
        let p = law.mean.len();
        if told.nrows() != p {
            return Err(Error::axis("covariates of sites and coefficients", told.nrows(), p));
        }
        let factor = lower(law.covariance.clone(), p)?;
        let unit = slopes(draws, p, seed);
        let mut slopes = vec![Vec::with_capacity(draws); p];
        for d in 0..draws {
            let one: Vec<f64> = (0..p).map(|j| unit[(d, j)]).collect();
            let drawn = factor.colour(&one);
            slopes.iter_mut().zip(drawn).for_each(|(all, one)| all.push(one as f32));
        }
        Ok(Effects { law: law.clone(), told, found, slopes })
    }

    /// Adds what each draw's coefficients make of covariates `z` to `out` `[draw]`.
    fn add(&self, z: &[f64], out: &mut [f32]) {
        for (z, slopes) in z.iter().zip(&self.slopes) {
            add_row(out, *z as f32, slopes);
        }
    }

    /// The mean that coefficients add at covariates `z`, and the variance where sites tell so much.
    fn at(&self, z: &[f64], weighed: &nearest::Weighed) -> [f64; 2] {
        let p = z.len();
        let left: Vec<f64> = (0..p)
            .map(|j| {
                let told = weighed.weights.iter().map(|(i, w)| w * self.told[(j, *i as usize)]);
                z[j] - told.sum::<f64>() - dot(weighed.levels, self.found[j])
            })
            .collect();
        let row = |i: usize| {
            let row = &self.law.covariance[i * p..][..p];
            row.iter().zip(&left).map(|(c, l)| c * l).sum::<f64>()
        };
        let mean = self.law.mean.iter().zip(z).map(|(b, z)| b * z).sum();
        [mean, (0..p).map(|i| left[i] * row(i)).sum()]
    }
}

simd::vectorised! {
    /// `out += weight · row`.
    pub fn add_row(out: &mut [f32], weight: f32, row: &[f32]) {
        for (out, x) in out.iter_mut().zip(row) {
            *out = weight.mul_add(*x, *out);
        }
    }
}

impl<'a> Local<'a> {
    /// `draws` draws of the posterior of `gp` given `row`; or, where that is what coefficients of
    /// `law` leave of a survey whose observations have covariates `[feature, observation]`, of the two
    /// together.
    pub fn new(
        gp: &'a NearestGp,
        row: &'a nearest::Fitted,
        law: Option<(&Coefficients, &Mat<f64>)>,
        (draws, seed): (usize, u64),
        extent: f64,
    ) -> Result<Self> {
        check(draws)?;
        let sites = row.sites();
        let n = sites.len();
        if n.saturating_mul(draws) > MOST_HELD {
            return Err(Error::input("so many draws given so many sites do not fit into memory")
                .fact("sites", n)
                .fact("draws", draws)
                .fact("memory", format!("{:.1} GiB", (4 * n * draws) as f64 / f64::from(1 << 30)))
                .try_this(format!("ask for {} draws at the most", (MOST_HELD / n.max(1)).max(1))));
        }
        let timed = gp.reads_time();
        let dim = spread(&sites, timed)?;
        let prior = Spectral::new(&*gp.kernel, dim, draws, seed, reach(&sites, extent, timed))?;
        let mut told = prior_at(&prior, draws, &sites);
        match row.latent() {
            None => {
                for i in 0..n {
                    let sd = row.noise(i).sqrt();
                    let mut rng = Stream::new(seed, "noise of a field", i as u64);
                    let column = told.col_as_slice_mut(i).iter_mut();
                    column.for_each(|told| *told += (sd * rng.normal()) as f32);
                }
            }
            Some(latent) => {
                let groups: Vec<Vec<Lane>> = (0..draws.div_ceil(LANES))
                    .into_par_iter()
                    .map(|group| {
                        let of = |i: usize, l: usize| {
                            let draw = group * LANES + l;
                            if draw < draws { f64::from(told[(draw, i)]) } else { 0.0 }
                        };
                        let mut surface: Vec<Lane> =
                            (0..n).map(|i| Lane(std::array::from_fn(|l| of(i, l)))).collect();
                        let purpose = format!("noise of draws {group}");
                        latent.reread(&mut surface, |i| {
                            let mut rng = Stream::new(seed, &purpose, i as u64);
                            Lane(std::array::from_fn(|_| rng.normal()))
                        })
                    })
                    .collect::<Result<_>>()?;
                for (group, said) in groups.iter().enumerate() {
                    for (i, said) in said.iter().enumerate() {
                        let column = &mut told.col_as_slice_mut(i)[group * LANES..];
                        column.iter_mut().zip(said.0).for_each(|(told, said)| *told = said as f32);
                    }
                }
            }
        }
        let mut rng = Stream::new(seed, "level of a field", 0);
        let shift = row.shift();
        let mut off: Vec<Levels> =
            (0..draws).map(|_| shift.drawn(std::array::from_fn(|_| rng.normal()))).collect();
        let mut effects = None;
        if let Some((law, x)) = law {
            let own = Effects::new(law, gp.told(row, x)?, draws, seed)?;
            for i in 0..n {
                own.add(own.told.col_as_slice(i), told.col_as_slice_mut(i));
            }
            for (found, slopes) in own.found.iter().zip(&own.slopes) {
                for (off, slope) in off.iter_mut().zip(slopes) {
                    off.iter_mut().zip(found).for_each(|(o, f)| *o -= f64::from(*slope) * f);
                }
            }
            effects = Some(own);
        }
        Ok(Local { gp, row, dim, prior, off, told, effects })
    }
}

impl Field for Local<'_> {
    fn draws(&self) -> usize {
        self.off.len()
    }

    fn at(&self, targets: &Sites) -> Result<Drawn> {
        let places = one_row(self.gp.places(targets)?, self.dim)?;
        let z = features(targets, self.effects.as_ref().map_or(0, |e| e.law.mean.len()))?;
        let draws = self.draws();
        let parts: Vec<Drawn> = places
            .par_chunks(CHUNK)
            .enumerate()
            .map(|(chunk, places)| {
                let mut out = Mat::<f32>::zeros(draws, places.len());
                self.prior.add(places, out.as_mut());
                let mut part = Drawn { mean: Vec::new(), sd: Vec::new(), deviations: Vec::new() };
                part.deviations.reserve(draws * places.len());
                let places: Vec<&[f64]> = places.iter().map(|place| &place[..]).collect();
                for (i, weighed) in self.gp.weigh(self.row, &places).iter().enumerate() {
                    let out = out.col_as_slice_mut(i);
                    for (site, weight) in &weighed.weights {
                        let told = self.told.col_as_slice(*site as usize);
                        add_row(out, -*weight as f32, told);
                    }
                    for (out, off) in out.iter_mut().zip(&self.off) {
                        *out += dot(weighed.levels, *off) as f32;
                    }
                    let mut more = [0.0; 2];
                    if let Some(effects) = &self.effects {
                        let z = z.col_as_slice(chunk * CHUNK + i);
                        effects.add(z, out);
                        more = effects.at(z, weighed);
                    }
                    part.deviations.extend_from_slice(out);
                    part.mean.push(weighed.mean + more[0]);
                    part.sd.push((weighed.variance + more[1]).sqrt());
                }
                part
            })
            .collect();
        let mut whole = Drawn { mean: Vec::new(), sd: Vec::new(), deviations: Vec::new() };
        for part in parts {
            whole.mean.extend(part.mean);
            whole.sd.extend(part.sd);
            whole.deviations.extend(part.deviations);
        }
        Ok(whole)
    }

    fn error(&self) -> f64 {
        self.prior.error
    }
}
