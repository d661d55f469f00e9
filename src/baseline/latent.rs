//! Counts read by a nearest-neighbour Gaussian process in latent form: Vecchia's approximation of the
//! surface itself, Laplace's of what the counts say of it.
//!
//! Sources: Zilber & Katzfuss (2021), arXiv:1906.07828, for Vecchia–Laplace; Rasmussen & Williams
//! (2006), algorithm 3.1, for Newton's steps; Papandreou & Yuille (2010), "Gaussian sampling by local
//! perturbations", for draws of the posterior.
//!
//! **Prior.** The surface s at the places where counts were made, each place once, in an order in which
//! early ones are far apart: `s = B⁻¹ D^½ ξ`, where a row of B regresses a place on the nearest before
//! it and D holds what is left. Without a nugget near places tell each other nearly everything, so
//! that few neighbours say what there is to say. Counts at one place share their surface, and village
//! effects are integrated out one by one: no two latent values are ever the same one.
//!
//! **Counts.** At the latent `η = mean + s + village effect` of each count, Laplace's approximation is
//! a Gaussian reading of precision w. The village effect of variance τ makes of it a reading of the
//! surface of precision w / (1 + wτ); readings of one place add up to Π. Newton's step solves
//! `(I + Π^½ K Π^½) x = …`, where K = B⁻¹ D B⁻ᵀ is two sparse triangular solves: see `system.rs`.
//!
//! **Many.** Of thousands of places an eighth, evenly spread, is asked first, and what it says is kriged for
//! the others: Newton's steps start near the mode. From there on weights are held fast, so that cells of
//! places (`system.rs`) serve for many steps, and made anew once the mode is in sight; it is the same
//! whatever the weights. For 100,000 counts of a few people each that is 35 steps of conjugate gradients
//! where there were 260.
//!
//! **Spread.** What the nearest readings alone leave open of a place, v, is known exactly. It is what all
//! readings leave open, and what they know beyond the nearest: `v = E e² + E d²`, for the error e of the
//! better estimate and its difference d from the other are independent. Draws of the posterior tell
//! both; each is an estimate of E e², and they are weighed by how sure they are. Where the
//! nearest readings say nearly all there is to say, little is left to the chance of the draws.

use rayon::prelude::*;

use super::{
    columns::{Column, Few},
    elimination::{LEVELS, Lane},
    field::add_row,
    kriging::{Kriging, Levels, Lists, Ordered, Shift, Weights, dot, levels},
    system::{Coarse, Factor, System, faint},
};
use crate::{
    error::{Error, Result},
    likelihood::Likelihood,
    rng::Stream,
};

/// Draws of the posterior that its spread is learned from: a multiple of all widths of columns.
pub(super) const SAMPLES: usize = 128;
/// Least weight of a count: a crowd that is all of one kind says nothing more, but never nothing.
const LEAST: f64 = 1e-12;
/// Variance given to the surface at each place alone, relative to the sill: arithmetic, so that near
/// places never determine each other to rounding.
pub(super) const JITTER: f64 = 1e-10;

/// How far roots of precisions may stray from those of the approximation, relative, root mean square:
/// on the way, and where it is used for long. Of few places, which cost next to nothing, it is always that of
/// the mode.
const STALE: [f64; 2] = [0.25, 0.02];
const FEW: usize = 1_000;
/// Weights are held fast once latents move by less, root mean square.
const HOLD: f64 = 0.25;
/// And again, for the last time, once they move by less than this.
const SIGHT: f64 = 0.03;
/// Places from which on a part of them is asked first, and how many times fewer those are.
const MANY: usize = 8_000;
const FEWER: usize = 8;

/// A row of counts that was absorbed.
pub(super) struct Latent {
    /// The surface's deviation from its mean at each place, at the mode.
    pub surface: Vec<f64>,
    /// Noise of what the counts of each place say together.
    pub noise: Vec<f64>,
    pub shift: Shift,
    /// What is not known of the mean at each place once the counts have had their say: levels of
    /// [`Shift`].
    pub open: Vec<Levels>,
    /// The log marginal likelihood, but for the determinant.
    told: f64,
    prior: Factor,
    near: Factor,
    root: Vec<f64>,
    /// What solutions for drawn surfaces may lack, in nats.
    lack: f64,
    /// For [`Latent::samples`] and what follows.
    coarse: Option<Coarse>,
    sill: f64,
}

/// Where Newton's search may start: the latent deviation of every count, and then where it ended.
#[derive(Default)]
pub(super) struct Start {
    latent: Vec<f64>,
    surface: Vec<f64>,
    level: Vec<Vec<f64>>,
}

/// Weights of counts that are held fast, and the cells made for them.
struct Held {
    weight: Vec<f64>,
    coarse: Option<Coarse>,
}

/// What a process of counts is.
pub(super) struct Model<'a> {
    pub kriging: Kriging<'a>,
    pub likelihood: &'static dyn Likelihood,
    pub nugget: f64,
    pub mean: f64,
    /// Variances of what is believed of the mean, level by level.
    pub doubt: Levels,
}

/// The counts' reading at some latents.
struct Reading {
    /// ln of the probability of all counts.
    log: f64,
    weight: Vec<f64>,
    /// `w f + g` of each count: its weight times its pseudo-value.
    pull: Vec<f64>,
    /// The same of each place, village effects integrated out: Π and its pull.
    precision: Vec<f64>,
    place: Vec<f64>,
    /// `Σ ln(1 + w τ)`.
    villages: f64,
}

impl Model<'_> {
    fn jitter(&self) -> f64 {
        JITTER * self.kriging.kernel.sill()
    }

    /// Variance of a village effect: of all of it but what is already in the surface as jitter, so that
    /// together they are the nugget.
    fn village(&self) -> f64 {
        (self.nugget - self.jitter()).max(0.0)
    }

    /// Of weights that are held fast, where there are some.
    fn read(&self, ordered: &Ordered, f: &[f64], held: Option<&[f64]>) -> Reading {
        let n = ordered.len();
        let mut reading = Reading {
            log: 0.0,
            weight: Vec::with_capacity(f.len()),
            pull: Vec::with_capacity(f.len()),
            precision: vec![0.0; n],
            place: vec![0.0; n],
            villages: 0.0,
        };
        for (i, f) in f.iter().enumerate() {
            let [log, gradient, curve] = self.law(ordered, i, *f);
            let w = held.map_or((-curve).max(LEAST), |held| held[i]);
            let pull = w * f + gradient;
            let share = 1.0 / (1.0 + w * self.village());
            let place = ordered.at[i] as usize;
            reading.log += log;
            reading.weight.push(w);
            reading.pull.push(pull);
            reading.precision[place] += w * share;
            reading.place[place] += pull * share;
            reading.villages -= share.ln();
        }
        reading
    }

    fn law(&self, ordered: &Ordered, i: usize, f: f64) -> [f64; 3] {
        let (y, trials) = (ordered.y[i], ordered.trials[i]);
        let law = self.likelihood.log_probability(y, trials, self.mean + f, f64::INFINITY);
        law.expect("NearestGp::new asks no other likelihoods")
    }

    fn log_likelihood(&self, ordered: &Ordered, f: &[f64]) -> f64 {
        f.iter().enumerate().map(|(i, f)| self.law(ordered, i, *f)[0]).sum()
    }

    /// The mode and all that follows, from a first guess on, until no latent moves by more than
    /// `close`.
    pub fn absorb(
        &self,
        ordered: &Ordered,
        lists: &Lists,
        start: &mut Start,
        close: f64,
    ) -> Result<Latent> {
        let (n, m) = (ordered.len(), ordered.y.len());
        let (jitter, sill) = (self.jitter(), self.kriging.kernel.sill());
        let count = self.doubt.iter().rposition(|v| *v > 0.0).map_or(0, |last| last + 1);
        let known: Vec<Levels> = (0..n).map(|i| levels(ordered.site(i))).collect();
        let mut told = start.latent.len() == m && start.surface.len() == n;
        let guessed = !told && n >= MANY;
        let mut prior = None;
        if guessed {
            let [alone] = Factor::of(self.kriging, ordered, lists, [&vec![jitter; n]]);
            *start = self.guess(ordered, lists, &alone)?;
            (told, prior) = (true, Some(alone));
        }
        let Start { latent: f, surface, level } = start;
        if !told {
            (*f, *surface) = (vec![0.0; m], vec![0.0; n]);
        }
        if level.len() != count || level.iter().any(|column| column.len() != n) {
            *level = vec![vec![0.0; n]; count];
        }
        let mut point = Point::none(n, m);
        // What no step may fall below: see [`ExactGp`](super::ExactGp).
        let mut objective = self.log_likelihood(ordered, &vec![0.0; m]);
        // What the next step may gain, in nats: from nowhere, some part of one for each place.
        let part = |share: f64| share * n as f64;
        let (at_first, then) = match (told, guessed) {
            (true, false) => (1.0, 1.0),
            (true, true) => (part(0.01), part(1e-3)),
            (false, _) => (part(0.1), f64::INFINITY),
        };
        let (mut settled, mut gain, mut last) = (false, at_first, f64::INFINITY);
        // Of many counts a mode is asked for less nearly: still far nearer than anything is known.
        let close = if guessed { 10.0 * close } else { close };
        let energy = 1e-4 * close * close * n as f64;
        let noise_of = |reading: &Reading| -> Vec<f64> {
            reading.precision.iter().map(|p| jitter + 1.0 / p).collect()
        };
        let root_of = |reading: &Reading| -> Vec<f64> {
            reading.precision.iter().map(|p| p.sqrt()).collect()
        };
        let first = self.read(ordered, f, None);
        let root = root_of(&first);
        let noise = noise_of(&first);
        let [prior, near] = match prior {
            Some(prior) => {
                let [near] = Factor::of(self.kriging, ordered, lists, [&noise]);
                [prior, near]
            }
            None => Factor::of(self.kriging, ordered, lists, [&vec![jitter; n], &noise]),
        };
        let mut near = (near.scaled(&root), root);
        // Of many, weights are held fast from near the mode on. The mode is the same, whatever they are; and
        // those that were held from within sight of it are its own, nearly.
        let (mut hold, mut held) = (guessed, None::<Held>);
        for _ in 0..100 {
            let reading = self.read(ordered, f, held.as_ref().map(|held| &held.weight[..]));
            let root = root_of(&reading);
            let anew = held.is_none() && (settled || hold);
            // As long as readings are much as they were, so is the approximation.
            let mut off = root.iter().zip(&near.1).map(|(a, b)| (a / b - 1.0).abs());
            let stale = match n < FEW {
                true => anew || off.any(|off| off > 0.1),
                false => {
                    let square: f64 = off.map(|off| off * off).sum();
                    square > STALE[usize::from(anew)].powi(2) * n as f64
                }
            };
            if guessed && anew {
                let coarse = Coarse::new(ordered, &prior, &root, sill)?;
                held = Some(Held { weight: reading.weight.clone(), coarse });
            }
            if stale {
                let noise = noise_of(&reading);
                let [factor] = Factor::of(self.kriging, ordered, lists, [&noise]);
                near = (factor.scaled(&root), root.clone());
            }
            let coarse = held.as_ref().and_then(|held| held.coarse.as_ref());
            let system = System { prior: &prior, root: &root, near: &near.0, coarse };
            let small = if settled { energy } else { energy.max(1e-3 * gain) };
            // S⁻¹ Π^½ K of each level's readings and, first, of the counts'.
            let mut columns: Vec<(Vec<f64>, &mut Vec<f64>)> = Vec::with_capacity(1 + count);
            columns.push((reading.place.clone(), surface));
            for (l, level) in level.iter_mut().enumerate() {
                let read = (0..n).map(|i| reading.precision[i] * known[i][l]).collect();
                columns.push((read, level));
            }
            let solved: Result<Vec<Vec<f64>>> = columns
                .into_par_iter()
                .map(|(mut b, guess)| {
                    prior.covariance(&mut b);
                    f64::scale(&mut b, &root);
                    let mut x: Vec<f64> = guess.iter().zip(&root).map(|(u, r)| u * r).collect();
                    system.solve(&b, &mut x, small, true)?;
                    for ((guess, x), root) in guess.iter_mut().zip(&x).zip(&root) {
                        *guess = x / root;
                    }
                    Ok(x)
                })
                .collect();
            let solved = solved?;
            let (x, columns) = (&solved[0], &solved[1..]);
            // Xᵀ (K + Π⁻¹)⁻¹ of the pseudo-values and of the levels.
            let mut pulled = Levels::default();
            let mut informed = [Levels::default(); LEVELS];
            for i in 0..n {
                let own = reading.place[i] - root[i] * x[i];
                for l in 0..count {
                    pulled[l] += known[i][l] * own;
                    for (k, column) in columns.iter().enumerate() {
                        let own = reading.precision[i] * known[i][k] - root[i] * column[i];
                        informed[l][k] += known[i][l] * own;
                    }
                }
            }
            let shift = Shift::of(self.doubt, pulled, informed);
            if settled {
                let open = |i: usize| -> Levels {
                    let of =
                        |l: usize| known[i][l] - columns.get(l).map_or(0.0, |c| c[i] / root[i]);
                    std::array::from_fn(of)
                };
                let noise = noise_of(&reading);
                let open = (0..n).map(open).collect();
                let told = objective - 0.5 * (reading.villages + shift.spread);
                let near = near.0;
                let surface =
                    self.aim(ordered, &prior, &reading, &root, x, columns, &known, &shift).surface;
                let lack = 0.0;
                return Ok(Latent {
                    coarse: held.and_then(|held| held.coarse),
                    surface,
                    noise,
                    shift,
                    open,
                    told,
                    prior,
                    near,
                    root,
                    lack,
                    sill,
                });
            }
            let aim = self.aim(ordered, &prior, &reading, &root, x, columns, &known, &shift);
            let mut step = 1.0;
            loop {
                // What a start was the mode of is not known here: the first step is a whole one.
                let tried = if told { aim.clone() } else { point.toward(&aim, step) };
                let latent: Vec<f64> = (0..m)
                    .map(|i| {
                        let place = ordered.at[i] as usize;
                        let u = tried.surface[place] + dot(known[place], tried.level);
                        u + self.village() * tried.village[i]
                    })
                    .collect();
                let value = self.log_likelihood(ordered, &latent) - 0.5 * self.cost(&tried);
                let slack = 1e-9 * (1.0 + objective.abs()) + small;
                if value > objective - slack {
                    let moved = latent.iter().zip(f.iter()).map(|(a, b)| (a - b).abs());
                    let far = (moved.clone().map(|d| d * d).sum::<f64>() / m as f64).sqrt();
                    let moved = moved.fold(0.0, f64::max);
                    settled = step == 1.0 && moved < close;
                    hold = guessed && step == 1.0 && far < HOLD;
                    // Once more where the mode is in sight, and then for good.
                    if !hold || (far < SIGHT && last >= SIGHT) {
                        held = None;
                    }
                    last = far;
                    gain = if told { then } else { (value - objective).abs().min(gain) };
                    (point, *f, objective, told) = (tried, latent, value, false);
                    break;
                }
                step *= 0.5;
                if told || step < 1e-6 {
                    match told {
                        true => {
                            held = None;
                            (*f, *surface) = (vec![0.0; m], vec![0.0; n]);
                            told = false;
                        }
                        false => settled = true,
                    }
                    break;
                }
            }
            if !objective.is_finite() {
                return Err(Error::input("the counts have no finite likelihood"));
            }
        }
        Err(Error::input("Laplace's approximation did not settle in 100 steps")
            .try_this("check the counts for extreme values"))
    }

    /// Near the mode: where a part of the places, evenly spread, has it, what is kriged from there of the
    /// others, and what each count makes of that.
    fn guess(&self, ordered: &Ordered, lists: &Lists, prior: &Factor) -> Result<Start> {
        let few = ordered.first(ordered.len() / FEWER);
        let mut start = Start::default();
        let part = self.absorb(&few, lists, &mut start, 1e-2)?;
        let kriged = |some: &[f64]| prior.kriged(some);
        let surface = kriged(&part.surface);
        let latent = (0..ordered.y.len())
            .map(|i| {
                let place = ordered.at[i] as usize;
                let u = surface[place] + dot(levels(ordered.site(place)), part.shift.mean);
                // Newton's steps for its village alone.
                (0..4).fold(u, |f, _| {
                    let [_, gradient, curve] = self.law(ordered, i, f);
                    let w = (-curve).max(LEAST);
                    let village = (w * (f - u) + gradient) / (1.0 + w * self.village());
                    u + self.village() * village
                })
            })
            .collect();
        let level = start.level.iter().map(|some| kriged(some)).collect();
        Ok(Start { latent, surface: kriged(&start.surface), level })
    }

    /// Where Newton's step leads, given what was solved for.
    #[allow(clippy::too_many_arguments)]
    fn aim(
        &self,
        ordered: &Ordered,
        prior: &Factor,
        reading: &Reading,
        root: &[f64],
        x: &[f64],
        columns: &[Vec<f64>],
        known: &[Levels],
        shift: &Shift,
    ) -> Point {
        let dual: Vec<f64> = (0..x.len())
            .map(|i| {
                let level = dot(known[i], shift.mean);
                let read = columns.iter().zip(shift.mean).map(|(c, mean)| c[i] * mean);
                let left = x[i] - read.sum::<f64>();
                reading.place[i] - reading.precision[i] * level - root[i] * left
            })
            .collect();
        let mut surface = dual.clone();
        prior.covariance(&mut surface);
        let village = (0..ordered.y.len())
            .map(|i| {
                let place = ordered.at[i] as usize;
                let u = surface[place] + dot(known[place], shift.mean);
                let w = reading.weight[i];
                (reading.pull[i] - w * u) / (1.0 + w * self.village())
            })
            .collect();
        Point { dual, surface, level: shift.mean, village }
    }

    /// Twice minus the log prior density of a point, up to a constant.
    fn cost(&self, point: &Point) -> f64 {
        let surface: f64 = point.dual.iter().zip(&point.surface).map(|(a, s)| a * s).sum();
        let village: f64 = point.village.iter().map(|v| v * v).sum();
        let levels = point.level.iter().zip(self.doubt).filter(|(_, v)| *v > 0.0);
        let level: f64 = levels.map(|(level, variance)| level * level / variance).sum();
        surface + self.village() * village + level
    }
}

/// A place in the space of all that is not known. The surface is K times its dual and village effects
/// are τ times theirs, so that the prior density needs no inverse.
#[derive(Clone)]
struct Point {
    dual: Vec<f64>,
    surface: Vec<f64>,
    level: Levels,
    village: Vec<f64>,
}

impl Point {
    fn none(places: usize, counts: usize) -> Self {
        Point {
            dual: vec![0.0; places],
            surface: vec![0.0; places],
            level: Levels::default(),
            village: vec![0.0; counts],
        }
    }

    fn toward(&self, aim: &Point, step: f64) -> Point {
        let between = |from: &[f64], to: &[f64]| -> Vec<f64> {
            from.iter().zip(to).map(|(from, to)| from + step * (to - from)).collect()
        };
        Point {
            dual: between(&self.dual, &aim.dual),
            surface: between(&self.surface, &aim.surface),
            level: std::array::from_fn(|l| self.level[l] + step * (aim.level[l] - self.level[l])),
            village: between(&self.village, &aim.village),
        }
    }
}

/// Readings of drawn surfaces, what all of them together say of the surface, and how far from it that
/// is: `[place][sample]`.
pub(super) struct Samples {
    read: Vec<[f32; SAMPLES]>,
    smooth: Vec<[f32; SAMPLES]>,
    error: Vec<[f32; SAMPLES]>,
}

impl Latent {
    /// What all readings say of the surface, for surfaces `s` side by side, read with noise: `s` becomes
    /// what is read, and what is said is returned.
    pub fn reread<C: Column>(&self, s: &mut [C], noise: impl Fn(usize) -> C) -> Result<Vec<C>> {
        for (i, s) in s.iter_mut().enumerate() {
            let (surface, noise) = (*s, noise(i));
            *s = C::map(|l| surface.get(l) + noise.get(l) / self.root[i]);
        }
        let said = self.said(s, self.lack)?;
        Ok(said.iter().zip(&self.root).map(|(x, r)| C::map(|l| x.get(l) / r)).collect())
    }

    /// What all readings `z` say of the surface, over the noise of each place's own, to within `energy`
    /// nats. Kriging from the solution as a dual would multiply what it lacks by the covariance's largest
    /// eigenvalue.
    fn said<C: Column>(&self, z: &[C], energy: f64) -> Result<Vec<C>> {
        let mut b: Vec<C> =
            z.iter().zip(&self.root).map(|(z, r)| C::map(|l| z.get(l) * r * r)).collect();
        self.prior.covariance(&mut b);
        C::scale(&mut b, &self.root);
        let mut x = vec![C::default(); z.len()];
        self.system().solve(&b, &mut x, energy, false)?;
        Ok(x)
    }

    fn system(&self) -> System<'_> {
        let Latent { prior, near, root, coarse, .. } = self;
        System { prior, root, near, coarse: coarse.as_ref() }
    }

    /// Of the counts, in nats, by Laplace's approximation.
    pub fn log_marginal(&self) -> f64 {
        self.told - 0.5 * self.system().log_det()
    }

    /// A hundredth of what readings leave open of all places, in units of their noise.
    fn hundredth(&self) -> Result<f64> {
        let mut rng = Stream::new(1, "what is left open", 0);
        let mut s: Vec<f64> = self.prior.variance.iter().map(|v| v.sqrt() * rng.normal()).collect();
        self.prior.solve(&mut s);
        let read: Vec<f64> = s.iter().zip(&self.root).map(|(s, r)| s + rng.normal() / r).collect();
        let said = self.said(&read, 1e-4 * s.len() as f64)?;
        let off = said.iter().zip(&s).zip(&self.root).map(|((x, s), r)| (x - s * r).powi(2));
        Ok(0.01 * off.sum::<f64>())
    }

    /// [`SAMPLES`] surfaces of the prior, read as the counts of these places read theirs.
    pub fn samples(&mut self, ordered: &Ordered) -> Result<Samples> {
        if self.coarse.is_none() {
            self.coarse = Coarse::new(ordered, &self.prior, &self.root, self.sill)?;
        }
        self.lack = self.hundredth()?;
        match faint(self.sill, &self.root) {
            true => self.drawn::<Few>(),
            false => self.drawn::<Lane>(),
        }
    }

    fn drawn<C: Column>(&self) -> Result<Samples> {
        let n = self.root.len();
        let flat = |x: &[C]| -> Vec<f32> {
            x.iter().flat_map(|x| (0..C::WIDTH).map(|l| x.get(l) as f32)).collect()
        };
        let parts: Result<Vec<[Vec<f32>; 3]>> = (0..SAMPLES / C::WIDTH)
            .into_par_iter()
            .map(|group| {
                let mut noise = Vec::with_capacity(n);
                let mut s: Vec<C> = (0..n)
                    .map(|i| {
                        let mut rng = Stream::new(group as u64, "spread of a surface", i as u64);
                        let sd = self.prior.variance[i].sqrt();
                        let s = C::map(|_| sd * rng.normal());
                        noise.push(C::map(|_| rng.normal()));
                        s
                    })
                    .collect();
                self.prior.solve(&mut s);
                let mut error = flat(&s);
                let smooth = flat(&self.reread(&mut s, |i| noise[i])?);
                error.iter_mut().zip(&smooth).for_each(|(error, smooth)| *error -= smooth);
                Ok([flat(&s), smooth, error])
            })
            .collect();
        let parts = parts?;
        let gather = |which: usize| -> Vec<[f32; SAMPLES]> {
            let of = |i: usize, k: usize| parts[k / C::WIDTH][which][i * C::WIDTH + k % C::WIDTH];
            (0..n).map(|i| std::array::from_fn(|k| of(i, k))).collect()
        };
        Ok(Samples { read: gather(0), smooth: gather(1), error: gather(2) })
    }
}

impl Samples {
    /// What all readings leave open of site `i`.
    pub fn left(&self, i: usize) -> f64 {
        self.error[i].iter().map(|e| f64::from(*e).powi(2)).sum::<f64>() / SAMPLES as f64
    }

    /// What all readings leave open of a place: `smooth` are its weights of the surface at its neighbours,
    /// beside which `own` is left open, and `read` those of their readings, which leave `near` open.
    pub fn variance(&self, smooth: &Weights, own: f64, read: &Weights, near: f64) -> f64 {
        let [mut error, mut apart] = [[0f32; SAMPLES]; 2];
        for ((i, smooth), (_, read)) in smooth.iter().zip(read) {
            let (i, smooth, read) = (*i as usize, *smooth as f32, *read as f32);
            add_row(&mut error, smooth, &self.error[i]);
            add_row(&mut apart, smooth, &self.smooth[i]);
            add_row(&mut apart, -read, &self.read[i]);
        }
        let square = |x: &[f32]| x.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>();
        let [left, more] = [square(&error), square(&apart)].map(|sum| sum / SAMPLES as f64);
        let left = own + left;
        // An estimate of a variance is as unsure as it is large: each is weighed by the other's square.
        let [by_left, by_more] = [more, left].map(|v| v * v);
        let whole = (by_left + by_more).max(f64::MIN_POSITIVE);
        ((by_left * left + by_more * (near - more)) / whole).max(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        baseline::{exact_gp::Row, system::tests::town_in_a_country},
        kernel::{Matern, Metric, Smoothness},
        likelihood,
    };

    /// Nine thousand faint counts, asked by way of an eighth of them and cells, and asked without: the same
    /// mode, readings within a fiftieth, and as likely.
    #[test]
    fn the_way_to_the_mode_does_not_matter() -> Result<()> {
        let mut rng = Stream::new(8, "many counts", 0);
        let n = 9_000;
        // Some places are visited twice.
        let mut sites = town_in_a_country(n, &mut rng);
        (0..50).for_each(|i| sites[n - 1 - i] = sites[i].clone());
        let risk =
            |s: &[f64]| (1.0 + (-1.0 + 1.5 * (4.0 * s[0]).sin() * s[1]).exp().recip()).recip();
        let trials: Vec<f64> = (0..n).map(|i| (1 + i % 5) as f64).collect();
        let y = sites.iter().zip(&trials).map(|(s, trials)| {
            let people = 0..*trials as usize;
            people.filter(|_| rng.unit() < risk(s)).count() as f64
        });
        let y = y.collect();
        let row = Row { sites, y, trials };
        let kernel = Matern {
            smoothness: Smoothness::ThreeHalves,
            length_scale: 0.6,
            sill: 1.0,
            metric: Metric::Euclidean,
        };
        let ordered = Ordered::of(&row, &kernel, true);
        let lists = ordered.lists(20);
        let model = Model {
            kriging: Kriging { kernel: &kernel, levels: 1 },
            likelihood: likelihood::find("binomial")?,
            nugget: 0.05,
            mean: -0.7,
            doubt: [25.0, 0.0, 0.0],
        };
        let many = model.absorb(&ordered, &lists, &mut Start::default(), 1e-5)?;
        assert!(many.coarse.is_some(), "cells were made");
        // From a start that says nothing.
        let (latent, surface) = (vec![0.0; ordered.y.len()], vec![0.0; ordered.len()]);
        let mut start = Start { latent, surface, level: Vec::new() };
        let plain = model.absorb(&ordered, &lists, &mut start, 1e-5)?;
        assert!(ordered.len() < n && ordered.len() >= MANY);
        let most = |a: &[f64], b: &[f64], of: fn(f64, f64) -> f64| {
            a.iter().zip(b).map(|(a, b)| of(*a, *b)).fold(0.0, f64::max)
        };
        let apart = most(&many.surface, &plain.surface, |a, b| (a - b).abs());
        let [a, b] = [&many, &plain].map(|latent| latent.shift.mean[0]);
        assert!(apart < 1e-3 && (a - b).abs() < 1e-3, "{apart}, mean {a} and {b}");
        let noise = most(&many.noise, &plain.noise, |a, b| (a / b - 1.0).abs());
        assert!(noise < 0.02, "{noise}");
        let [a, b] = [&many, &plain].map(Latent::log_marginal);
        assert!((a - b).abs() < 0.1, "{a} and {b}");
        Ok(())
    }
}
