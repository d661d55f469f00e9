//! Counts read by a nearest-neighbour Gaussian process in latent form: Vecchia's approximation of the
//! surface itself, Laplace's of what the counts say of it.
//!
//! Sources: Zilber & Katzfuss (2021), arXiv:1906.07828, for Vecchia–Laplace; Rasmussen & Williams
//! (2006), algorithm 3.1, for Newton's steps; Kündig & Sigrist (2023), arXiv:2310.12000, for conjugate
//! gradients and stochastic Lanczos quadrature in place of a factor; Papandreou & Yuille (2010),
//! "Gaussian sampling by local perturbations", for draws of the posterior.
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
//! `(I + Π^½ K Π^½) x = …` by conjugate gradients, where K = B⁻¹ D B⁻ᵀ is two sparse triangular solves.
//!
//! **Preconditioner.** The same system, approximated once more: Vecchia's density of the noisy readings,
//! each given the nearest before it, is a sparse factor of `(K + Π⁻¹)⁻¹`. It is exact with as many
//! neighbours as places, and then so is all of this. What it misses is how wide regions hang together,
//! which thousands of faint readings say and 30 of them do not: for the many solutions that draws take, the
//! system is also solved exactly for whole cells of places, and the two take turns (the second variant of
//! adapted deflation, A-DEF2, of Tang et al. 2009, doi:10.1007/s10915-009-9272-6). For 100,000 counts of a
//! few people each that makes 6 steps of 48.
//!
//! **Evidence.** `ln |I + Π^½ K Π^½|` is the preconditioner's, whose is a sum of logarithms, and the trace
//! of the logarithm of what it leaves, by Lanczos's method from a few random vectors, the same ones for
//! all parameters.
//!
//! **Spread.** What the nearest readings alone leave open of a place, v, is known exactly. It is what all
//! readings leave open, and what they know beyond the nearest: `v = E e² + E d²`, for the error e of the
//! better estimate and its difference d from the other are independent. Draws of the posterior tell
//! both; each is an estimate of E e², and they are weighed by how sure they are. Where the
//! nearest readings say nearly all there is to say, little is left to the chance of the draws.

use faer::Mat;
use rayon::prelude::*;

use super::{
    elimination::{LANES, LEVELS, Lane},
    field::add_row,
    kriging::{Heard, Kriging, Levels, Lists, Ordered, Shift, Weights, dot, levels},
    neighbours::Found,
};
use crate::{
    error::{Error, Result},
    fused::simd,
    likelihood::Likelihood,
    linalg::Cholesky,
    rng::Stream,
};

/// Draws of the posterior that its spread is learned from: a multiple of [`LANES`].
pub(super) const SAMPLES: usize = 128;
/// Places of a cell, in which the system is solved exactly as a whole, and the most cells.
const CELL: usize = 64;
const CELLS: usize = 512;
/// Least weight of a count: a crowd that is all of one kind says nothing more, but never nothing.
const LEAST: f64 = 1e-12;
/// Variance given to the surface at each place alone, relative to the sill: arithmetic, so that near
/// places never determine each other to rounding.
pub(super) const JITTER: f64 = 1e-10;

/// Each place regressed on earlier ones: `x = Σ weight · x[before] + noise`.
pub(super) struct Factor {
    starts: Vec<u32>,
    before: Vec<u32>,
    weight: Vec<f64>,
    /// Of the noise.
    pub variance: Vec<f64>,
}

/// A column of numbers, or [`LANES`] side by side.
trait Column: Copy + Default + Send + Sync {
    const WIDTH: usize;
    fn map(f: impl FnMut(usize) -> f64) -> Self;
    fn get(&self, lane: usize) -> f64;
    fn solve(factor: &Factor, x: &mut [Self]);
    fn solve_transposed(factor: &Factor, x: &mut [Self]);
    fn times(factor: &Factor, x: &mut [Self]);
    fn times_transposed(factor: &Factor, x: &mut [Self]);
}

/// The loops of [`Factor`] for one kind of column.
macro_rules! columns {
    ($type:ty, $add:ident, $solve:ident, $solve_transposed:ident, $times:ident, $times_transposed:ident) => {
        simd::vectorised! {
            /// `x = B⁻¹ x`.
            pub fn $solve(starts: &[u32], before: &[u32], weight: &[f64], x: &mut [$type]) {
                for i in 0..x.len() {
                    let row = starts[i] as usize..starts[i + 1] as usize;
                    let (done, this) = x.split_at_mut(i);
                    for (j, w) in before[row.clone()].iter().zip(&weight[row]) {
                        $add(&mut this[0], *w, &done[*j as usize]);
                    }
                }
            }
        }
        simd::vectorised! {
            /// `x = B⁻ᵀ x`.
            pub fn $solve_transposed(starts: &[u32], before: &[u32], weight: &[f64], x: &mut [$type]) {
                for i in (0..x.len()).rev() {
                    let row = starts[i] as usize..starts[i + 1] as usize;
                    let (open, this) = x.split_at_mut(i);
                    for (j, w) in before[row.clone()].iter().zip(&weight[row]) {
                        $add(&mut open[*j as usize], *w, &this[0]);
                    }
                }
            }
        }
        simd::vectorised! {
            /// `x = B x`, the last first, since it is nobody's neighbour.
            pub fn $times(starts: &[u32], before: &[u32], weight: &[f64], x: &mut [$type]) {
                for i in (0..x.len()).rev() {
                    let row = starts[i] as usize..starts[i + 1] as usize;
                    let (open, this) = x.split_at_mut(i);
                    for (j, w) in before[row.clone()].iter().zip(&weight[row]) {
                        $add(&mut this[0], -*w, &open[*j as usize]);
                    }
                }
            }
        }
        simd::vectorised! {
            /// `x = Bᵀ x`, the first first.
            pub fn $times_transposed(starts: &[u32], before: &[u32], weight: &[f64], x: &mut [$type]) {
                for i in 0..x.len() {
                    let row = starts[i] as usize..starts[i + 1] as usize;
                    let (done, this) = x.split_at_mut(i);
                    for (j, w) in before[row.clone()].iter().zip(&weight[row]) {
                        $add(&mut done[*j as usize], -*w, &this[0]);
                    }
                }
            }
        }
    };
}

#[inline(always)]
fn add_one(out: &mut f64, w: f64, x: &f64) {
    *out = w.mul_add(*x, *out);
}

#[inline(always)]
fn add_lane(out: &mut Lane, w: f64, x: &Lane) {
    for (out, x) in out.0.iter_mut().zip(&x.0) {
        *out = w.mul_add(*x, *out);
    }
}

columns!(f64, add_one, solve_one, solve_transposed_one, times_one, times_transposed_one);
columns!(Lane, add_lane, solve_lanes, solve_transposed_lanes, times_lanes, times_transposed_lanes);

impl Column for f64 {
    const WIDTH: usize = 1;
    fn map(mut f: impl FnMut(usize) -> f64) -> Self {
        f(0)
    }
    fn get(&self, _: usize) -> f64 {
        *self
    }
    fn solve(factor: &Factor, x: &mut [Self]) {
        solve_one(&factor.starts, &factor.before, &factor.weight, x);
    }
    fn solve_transposed(factor: &Factor, x: &mut [Self]) {
        solve_transposed_one(&factor.starts, &factor.before, &factor.weight, x);
    }
    fn times(factor: &Factor, x: &mut [Self]) {
        times_one(&factor.starts, &factor.before, &factor.weight, x);
    }
    fn times_transposed(factor: &Factor, x: &mut [Self]) {
        times_transposed_one(&factor.starts, &factor.before, &factor.weight, x);
    }
}

impl Column for Lane {
    const WIDTH: usize = LANES;
    fn map(f: impl FnMut(usize) -> f64) -> Self {
        Lane(std::array::from_fn(f))
    }
    fn get(&self, lane: usize) -> f64 {
        self.0[lane]
    }
    fn solve(factor: &Factor, x: &mut [Self]) {
        solve_lanes(&factor.starts, &factor.before, &factor.weight, x);
    }
    fn solve_transposed(factor: &Factor, x: &mut [Self]) {
        solve_transposed_lanes(&factor.starts, &factor.before, &factor.weight, x);
    }
    fn times(factor: &Factor, x: &mut [Self]) {
        times_lanes(&factor.starts, &factor.before, &factor.weight, x);
    }
    fn times_transposed(factor: &Factor, x: &mut [Self]) {
        times_transposed_lanes(&factor.starts, &factor.before, &factor.weight, x);
    }
}

impl Factor {
    /// Of a surface with this noise, each place given its neighbours of the lists.
    fn new(kriging: Kriging, ordered: &Ordered, lists: &Lists, noise: &[f64]) -> Self {
        let n = ordered.len();
        let terms: Vec<u32> = (0..n as u32).collect();
        let zero = vec![0.0; n];
        let kriging = Kriging { levels: 0, ..kriging };
        let heard = Heard { value: &zero, noise };
        let least = f64::EPSILON * kriging.kernel.sill();
        let rows = kriging.sweep(ordered, heard, lists, &terms, true, |out, i, said, weights| {
            let variance = (said.variance + noise[i as usize]).max(least);
            out.push((variance, weights));
        });
        let entries = rows.iter().flatten().map(|(_, weights)| weights.len()).sum();
        let mut factor = Factor {
            starts: Vec::with_capacity(n + 1),
            before: Vec::with_capacity(entries),
            weight: Vec::with_capacity(entries),
            variance: Vec::with_capacity(n),
        };
        factor.starts.push(0);
        for (variance, weights) in rows.into_iter().flatten() {
            factor.variance.push(variance);
            factor.before.extend(weights.iter().map(|(j, _)| *j));
            factor.weight.extend(weights.iter().map(|(_, w)| *w));
            factor.starts.push(factor.before.len() as u32);
        }
        factor
    }

    /// Of the same in units of `1 / root` at each place.
    fn scaled(mut self, root: &[f64]) -> Self {
        for i in 0..self.variance.len() {
            self.variance[i] *= root[i] * root[i];
            for at in self.starts[i] as usize..self.starts[i + 1] as usize {
                self.weight[at] *= root[i] / root[self.before[at] as usize];
            }
        }
        self
    }

    /// `x = B⁻¹ D B⁻ᵀ x`: the covariance.
    fn covariance<C: Column>(&self, x: &mut [C]) {
        C::solve_transposed(self, x);
        scale(x, &self.variance);
        C::solve(self, x);
    }

    /// `x = Bᵀ D⁻¹ B x`: its inverse.
    fn precision<C: Column>(&self, x: &mut [C]) {
        C::times(self, x);
        for (x, variance) in x.iter_mut().zip(&self.variance) {
            let before = *x;
            *x = C::map(|lane| before.get(lane) / variance);
        }
        C::times_transposed(self, x);
    }
}

/// Each row times a number.
fn scale<C: Column>(x: &mut [C], by: &[f64]) {
    for (x, by) in x.iter_mut().zip(by) {
        let before = *x;
        *x = C::map(|lane| before.get(lane) * by);
    }
}

/// `Σ a b` of each lane.
fn inner<C: Column>(a: &[C], b: &[C]) -> C {
    let mut sum = C::default();
    for (a, b) in a.iter().zip(b) {
        let before = sum;
        sum = C::map(|lane| before.get(lane) + a.get(lane) * b.get(lane));
    }
    sum
}

/// `out += by · x`, each lane by its own.
fn add<C: Column>(out: &mut [C], by: C, x: &[C]) {
    for (out, x) in out.iter_mut().zip(x) {
        let before = *out;
        *out = C::map(|lane| before.get(lane) + by.get(lane) * x.get(lane));
    }
}

/// The system `S = I + Π^½ K Π^½`, and a sparse approximation of its inverse.
struct System<'a> {
    prior: &'a Factor,
    root: &'a [f64],
    near: &'a Factor,
    coarse: Option<&'a Coarse>,
}

/// What near readings miss of the system: how whole cells hang together.
pub(super) struct Coarse {
    /// The cell of each place.
    cell: Vec<u32>,
    /// Of `Pᵀ S P`, where a column of P is Π^½ in its cell.
    factor: Cholesky,
}

impl Coarse {
    /// Cells around the first of the order, which are far apart; nothing where there are few places.
    fn new(ordered: &Ordered, prior: &Factor, root: &[f64]) -> Result<Option<Self>> {
        let n = root.len();
        let cells = (n / CELL).min(CELLS);
        if cells < LANES {
            return Ok(None);
        }
        let mut found = Found::new();
        let cell: Vec<u32> = (0..n)
            .map(|i| {
                ordered.around_site(i, 1, cells, &mut found);
                found.first().map_or(0, |(_, j)| *j)
            })
            .collect();
        let system = System { prior, root, near: prior, coarse: None };
        let columns: Vec<Vec<Lane>> = (0..cells.div_ceil(LANES))
            .into_par_iter()
            .map(|group| {
                let one = |i: usize, lane: usize| {
                    let mine = cell[i] as usize == group * LANES + lane;
                    if mine { root[i] } else { 0.0 }
                };
                let column: Vec<Lane> = (0..n).map(|i| Lane::map(|lane| one(i, lane))).collect();
                let applied = system.apply(&column);
                let mut sums = vec![Lane::default(); cells];
                for (i, a) in applied.iter().enumerate() {
                    add_lane(&mut sums[cell[i] as usize], root[i], a);
                }
                sums
            })
            .collect();
        let whole = Mat::from_fn(cells, cells, |i, j| columns[j / LANES][i].0[j % LANES]);
        Ok(Some(Coarse { factor: Cholesky::factor(whole)?, cell }))
    }

    /// Bytes that it holds and is made in.
    pub const fn bytes(places: usize) -> usize {
        4 * places + 24 * CELLS * CELLS
    }

    /// `x += Q t`, where `Q = P (Pᵀ S P)⁻¹ Pᵀ`.
    fn add<C: Column>(&self, root: &[f64], t: &[C], x: &mut [C]) {
        let cells = self.factor.len();
        let mut sums = vec![vec![0.0; cells]; C::WIDTH];
        for ((cell, root), t) in self.cell.iter().zip(root).zip(t) {
            for (lane, sums) in sums.iter_mut().enumerate() {
                sums[*cell as usize] += root * t.get(lane);
            }
        }
        let solved: Vec<Vec<f64>> = sums.iter().map(|sums| self.factor.solve(sums)).collect();
        for ((cell, root), x) in self.cell.iter().zip(root).zip(x) {
            let before = *x;
            *x = C::map(|lane| before.get(lane) + root * solved[lane][*cell as usize]);
        }
    }
}

impl System<'_> {
    fn apply<C: Column>(&self, x: &[C]) -> Vec<C> {
        let mut out = x.to_vec();
        scale(&mut out, self.root);
        self.prior.covariance(&mut out);
        scale(&mut out, self.root);
        for (out, x) in out.iter_mut().zip(x) {
            let before = *out;
            *out = C::map(|lane| before.get(lane) + x.get(lane));
        }
        out
    }

    /// `z = M r` for the residual r: the near readings' word, and then the cells'.
    fn improve<C: Column>(&self, r: &[C], z: &mut Vec<C>) {
        z.clear();
        z.extend_from_slice(r);
        self.near.precision(z);
        if let Some(coarse) = self.coarse {
            let applied = self.apply(z);
            let left: Vec<C> =
                r.iter().zip(&applied).map(|(r, a)| C::map(|l| r.get(l) - a.get(l))).collect();
            coarse.add(self.root, &left, z);
        }
    }

    /// `S⁻¹ b` from the guess `x` on, until the error is below `energy` in `½ eᵀ S e`, which is nats.
    /// What is kriged from the solution as a `dual` then lacks no more either: the residual, which is the
    /// error times up to the largest eigenvalue, is as small. Returns how many steps it took.
    fn solve<C: Column>(&self, b: &[C], x: &mut [C], energy: f64, dual: bool) -> Result<usize> {
        let residual = |x: &[C]| -> Vec<C> {
            let applied = self.apply(x);
            b.iter().zip(&applied).map(|(b, a)| C::map(|lane| b.get(lane) - a.get(lane))).collect()
        };
        let mut r = residual(x);
        if let Some(coarse) = self.coarse {
            coarse.add(self.root, &r, x);
            r = residual(x);
        }
        let mut whole = b.to_vec();
        self.near.precision(&mut whole);
        let whole = inner(b, &whole);
        let enough = C::map(|lane| energy.max(1e-28 * whole.get(lane)));
        let size = inner(b, b);
        let rest = C::map(|lane| energy.max(1e-26 * size.get(lane)));
        let mut z = Vec::with_capacity(r.len());
        self.improve(&r, &mut z);
        let mut p = z.clone();
        let mut left = inner(&r, &z);
        for steps in 0..500 {
            let square = if dual { inner(&r, &r) } else { C::default() };
            let open = |lane: usize| {
                left.get(lane) > enough.get(lane) || square.get(lane) > rest.get(lane)
            };
            if (0..C::WIDTH).all(|lane| !open(lane)) {
                return match (0..C::WIDTH).all(|lane| left.get(lane).is_finite()) {
                    true => Ok(steps),
                    false => Err(Error::input("the counts have no finite likelihood")),
                };
            }
            let ap = self.apply(&p);
            let bent = inner(&p, &ap);
            // A lane that has arrived stays where it is.
            let step = C::map(|l| if open(l) { left.get(l) / bent.get(l) } else { 0.0 });
            add(x, step, &p);
            add(&mut r, C::map(|lane| -step.get(lane)), &ap);
            self.improve(&r, &mut z);
            let now = inner(&r, &z);
            let turn = C::map(|l| if open(l) { now.get(l) / left.get(l) } else { 0.0 });
            for (p, z) in p.iter_mut().zip(&z) {
                let before = *p;
                *p = C::map(|lane| z.get(lane) + turn.get(lane) * before.get(lane));
            }
            left = C::map(|l| if open(l) { now.get(l) } else { left.get(l) });
        }
        Err(Error::input("the equations of the nearest neighbours did not settle in 500 steps")
            .try_this("check the counts for extreme values"))
    }

    /// `ln |S|`: see the head of this file.
    fn log_det(&self) -> f64 {
        let n = self.root.len();
        let own: f64 = self.near.variance.iter().map(|v| v.ln()).sum();
        if n == 0 {
            return 0.0;
        }
        // The error of one vector falls with the root of the places: few places, more vectors.
        let groups = (32_768 / n).clamp(1, 8);
        let rest: Vec<f64> = (0..groups).into_par_iter().map(|g| self.left(g as u64)).collect();
        own + rest.iter().sum::<f64>() / groups as f64
    }

    /// The trace of the logarithm of `F S Fᵀ`, where `Fᵀ F` is the approximation of `S⁻¹`, from
    /// [`LANES`] random vectors.
    fn left(&self, group: u64) -> f64 {
        let n = self.root.len();
        let mut rng = Stream::new(1, "probes", group);
        let sign = |rng: &mut Stream| if rng.unit() < 0.5 { -1.0 } else { 1.0 };
        let unit = (n as f64).sqrt().recip();
        let mut v: Vec<Lane> = (0..n).map(|_| Lane::map(|_| unit * sign(&mut rng))).collect();
        let root: Vec<f64> = self.near.variance.iter().map(|v| v.sqrt().recip()).collect();
        let mut last = vec![Lane::default(); n];
        let mut beta = Lane::default();
        // Diagonals and what stands beside them, of each lane.
        let mut tri: Vec<(Lane, Lane)> = Vec::new();
        let mut told = f64::NAN;
        for step in 0..60.min(n) {
            let mut w = v.clone();
            scale(&mut w, &root);
            Lane::times_transposed(self.near, &mut w);
            let mut w = self.apply(&w);
            Lane::times(self.near, &mut w);
            scale(&mut w, &root);
            let alpha = inner(&w, &v);
            add(&mut w, Lane::map(|l| -alpha.0[l]), &v);
            add(&mut w, Lane::map(|l| -beta.0[l]), &last);
            beta = inner(&w, &w);
            beta = Lane::map(|l| beta.0[l].sqrt());
            tri.push((alpha, beta));
            if step % 3 == 2 || step + 1 == n || (0..LANES).all(|l| beta.0[l] < 1e-9) {
                let now = n as f64 * quadrature(&tri);
                if (now - told).abs() < 1e-3 * now.abs() + 1e-3 || beta.0.iter().all(|b| *b < 1e-9)
                {
                    return now;
                }
                told = now;
            }
            last = v;
            // Nothing is left in a lane: it stays at zero, and its matrix falls apart there.
            let by = Lane::map(|l| if beta.0[l] > 1e-9 { beta.0[l].recip() } else { 0.0 });
            beta = Lane::map(|l| if beta.0[l] > 1e-9 { beta.0[l] } else { 0.0 });
            v = w.iter().map(|w| Lane::map(|l| w.0[l] * by.0[l])).collect();
        }
        told
    }
}

/// `e₁ᵀ ln(T) e₁` of tridiagonal matrices, averaged over lanes.
fn quadrature(tri: &[(Lane, Lane)]) -> f64 {
    let one = |lane: usize| -> f64 {
        // A lane that ended early is what it was then.
        let ended = tri.iter().position(|(_, beta)| beta.0[lane] < 1e-9);
        let k = ended.map_or(tri.len(), |at| at + 1);
        let diagonal: Vec<f64> = tri[..k].iter().map(|(alpha, _)| alpha.0[lane]).collect();
        let beside: Vec<f64> = tri[..k - 1].iter().map(|(_, beta)| beta.0[lane]).collect();
        let nodes = nodes(diagonal, beside);
        nodes.iter().map(|(value, weight)| weight * value.max(f64::MIN_POSITIVE).ln()).sum()
    };
    (0..LANES).map(one).sum::<f64>() / LANES as f64
}

/// Eigenvalues of a tridiagonal matrix, each with the square of its vector's first number: the nodes
/// and weights of a quadrature (Golub & Welsch 1969, doi:10.1090/S0025-5718-69-99647-1), by implicit
/// QL steps.
fn nodes(mut d: Vec<f64>, mut e: Vec<f64>) -> Vec<(f64, f64)> {
    let k = d.len();
    e.push(0.0);
    let mut first = vec![0.0; k];
    first[0] = 1.0;
    for l in 0..k {
        for _ in 0..60 {
            let small = |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[m + 1].abs());
            let m = (l..k - 1).find(small).unwrap_or(k - 1);
            if m == l {
                break;
            }
            let g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let mut g = d[m] - d[l] + e[l] / (g + g.hypot(1.0).copysign(g));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                let r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = d[i + 1] - p;
                let r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                let (low, high) = (first[i], first[i + 1]);
                first[i + 1] = s * low + c * high;
                first[i] = c * low - s * high;
            }
            d[l] -= p;
            e[l] = g;
            e[m] = 0.0;
        }
    }
    d.into_iter().zip(first).map(|(value, first)| (value, first * first)).collect()
}

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
    pub log_marginal: f64,
    prior: Factor,
    near: Factor,
    root: Vec<f64>,
    /// What solutions for drawn surfaces may lack, in nats.
    lack: f64,
    /// For [`Latent::samples`] and what follows.
    coarse: Option<Coarse>,
}

/// Where Newton's search may start: the latent deviation of every count, and then where it ended.
#[derive(Default)]
pub(super) struct Start {
    latent: Vec<f64>,
    surface: Vec<f64>,
    level: Vec<Vec<f64>>,
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

    fn read(&self, ordered: &Ordered, f: &[f64]) -> Reading {
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
            let w = (-curve).max(LEAST);
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
        let jitter = self.jitter();
        let prior = Factor::new(self.kriging, ordered, lists, &vec![jitter; n]);
        let count = self.doubt.iter().rposition(|v| *v > 0.0).map_or(0, |last| last + 1);
        let known: Vec<Levels> = (0..n).map(|i| levels(ordered.site(i))).collect();
        let Start { latent: f, surface, level } = start;
        let mut told = f.len() == m && surface.len() == n;
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
        let (mut settled, mut gain) = (false, if told { 1.0 } else { 0.1 * n as f64 });
        let energy = 1e-4 * close * close * n as f64;
        let mut near: Option<(Factor, Vec<f64>)> = None;
        for _ in 0..100 {
            let reading = self.read(ordered, f);
            let root: Vec<f64> = reading.precision.iter().map(|p| p.sqrt()).collect();
            // As long as readings are much as they were, so is the approximation.
            let stale = near.as_ref().is_none_or(|(_, old)| {
                settled || root.iter().zip(old).any(|(a, b)| (a / b - 1.0).abs() > 0.1)
            });
            if stale {
                let noise: Vec<f64> = reading.precision.iter().map(|p| jitter + 1.0 / p).collect();
                let factor = Factor::new(self.kriging, ordered, lists, &noise).scaled(&root);
                near = Some((factor, root.clone()));
            }
            let Some((factor, _)) = &near else { unreachable!("made above") };
            let system = System { prior: &prior, root: &root, near: factor, coarse: None };
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
                    scale(&mut b, &root);
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
                let log_det = system.log_det() + reading.villages + shift.spread;
                let open = |i: usize| -> Levels {
                    let of =
                        |l: usize| known[i][l] - columns.get(l).map_or(0.0, |c| c[i] / root[i]);
                    std::array::from_fn(of)
                };
                let noise = reading.precision.iter().map(|p| jitter + 1.0 / p).collect();
                let open = (0..n).map(open).collect();
                let log_marginal = objective - 0.5 * log_det;
                let Some((near, _)) = near else { unreachable!("made above") };
                let surface =
                    self.aim(ordered, &prior, &reading, &root, x, columns, &known, &shift).surface;
                let (lack, coarse) = (0.0, None);
                return Ok(Latent {
                    coarse,
                    surface,
                    noise,
                    shift,
                    open,
                    log_marginal,
                    prior,
                    near,
                    root,
                    lack,
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
                    let moved = moved.fold(0.0, f64::max);
                    settled = step == 1.0 && moved < close;
                    gain = if told { 1.0 } else { (value - objective).abs().min(gain) };
                    (point, *f, objective, told) = (tried, latent, value, false);
                    break;
                }
                step *= 0.5;
                if told || step < 1e-6 {
                    match told {
                        true => {
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
    /// What all readings say of the surface, for [`LANES`] surfaces `s` read with noise: `s` becomes
    /// what is read, and what is said is returned.
    pub fn reread(&self, s: &mut [Lane], noise: impl Fn(usize) -> Lane) -> Result<Vec<Lane>> {
        for (i, s) in s.iter_mut().enumerate() {
            let (surface, noise) = (*s, noise(i));
            *s = Lane::map(|l| surface.0[l] + noise.0[l] / self.root[i]);
        }
        let said = self.said(s, self.lack)?;
        Ok(said.iter().zip(&self.root).map(|(x, r)| Lane::map(|l| x.0[l] / r)).collect())
    }

    /// What all readings `z` say of the surface, over the noise of each place's own, to within `energy`
    /// nats. Kriging from the solution as a dual would multiply what it lacks by the covariance's largest
    /// eigenvalue.
    fn said<C: Column>(&self, z: &[C], energy: f64) -> Result<Vec<C>> {
        let mut b: Vec<C> =
            z.iter().zip(&self.root).map(|(z, r)| C::map(|l| z.get(l) * r * r)).collect();
        self.prior.covariance(&mut b);
        scale(&mut b, &self.root);
        let mut x = vec![C::default(); z.len()];
        System {
            prior: &self.prior,
            root: &self.root,
            near: &self.near,
            coarse: self.coarse.as_ref(),
        }
        .solve(&b, &mut x, energy, false)?;
        Ok(x)
    }

    /// A hundredth of what readings leave open of all places, in units of their noise.
    fn hundredth(&self) -> Result<f64> {
        let mut rng = Stream::new(1, "what is left open", 0);
        let mut s: Vec<f64> = self.prior.variance.iter().map(|v| v.sqrt() * rng.normal()).collect();
        f64::solve(&self.prior, &mut s);
        let read: Vec<f64> = s.iter().zip(&self.root).map(|(s, r)| s + rng.normal() / r).collect();
        let said = self.said(&read, 1e-4 * s.len() as f64)?;
        let off = said.iter().zip(&s).zip(&self.root).map(|((x, s), r)| (x - s * r).powi(2));
        Ok(0.01 * off.sum::<f64>())
    }

    /// [`SAMPLES`] surfaces of the prior, read as the counts of these places read theirs.
    pub fn samples(&mut self, ordered: &Ordered) -> Result<Samples> {
        self.coarse = Coarse::new(ordered, &self.prior, &self.root)?;
        self.lack = self.hundredth()?;
        let this = &*self;
        type Few = [f32; LANES];
        let n = self.root.len();
        let few = |lane: &Lane| -> Few { lane.0.map(|v| v as f32) };
        let parts: Result<Vec<[Vec<Few>; 3]>> = (0..SAMPLES / LANES)
            .into_par_iter()
            .map(|group| {
                let mut noise = Vec::with_capacity(n);
                let mut s: Vec<Lane> = (0..n)
                    .map(|i| {
                        let mut rng = Stream::new(group as u64, "spread of a surface", i as u64);
                        let sd = this.prior.variance[i].sqrt();
                        let s = Lane::map(|_| sd * rng.normal());
                        noise.push(Lane::map(|_| rng.normal()));
                        s
                    })
                    .collect();
                Lane::solve(&this.prior, &mut s);
                let mut error: Vec<Few> = s.iter().map(few).collect();
                let smooth = this.reread(&mut s, |i| noise[i])?;
                for (error, smooth) in error.iter_mut().zip(&smooth) {
                    error.iter_mut().zip(smooth.0).for_each(|(e, smooth)| *e -= smooth as f32);
                }
                let [read, smooth] = [s, smooth].map(|lanes| lanes.iter().map(few).collect());
                Ok([read, smooth, error])
            })
            .collect();
        let parts = parts?;
        let gather = |which: usize| -> Vec<[f32; SAMPLES]> {
            let of = |i: usize, k: usize| parts[k / LANES][which][i][k % LANES];
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
        baseline::exact_gp::Row,
        kernel::{Matern, Metric, Smoothness},
    };

    /// The two-by-two matrix by hand; and the sums of powers that every quadrature of a matrix keeps.
    #[test]
    fn nodes_are_eigenvalues() {
        let mut two = nodes(vec![2.0, 5.0], vec![2.0]);
        two.sort_by(|a, b| a.0.total_cmp(&b.0));
        // (1, 6), with the vectors (2, −1) and (1, 2) over √5.
        let hand = [(1.0, 0.8), (6.0, 0.2)];
        for (seen, hand) in two.iter().zip(hand) {
            assert!((seen.0 - hand.0).abs() + (seen.1 - hand.1).abs() < 1e-14, "{two:?}");
        }
        let mut rng = Stream::new(1, "tridiagonal", 0);
        for k in [1, 3, 30] {
            let diagonal: Vec<f64> = (0..k).map(|_| 3.0 + rng.unit()).collect();
            let beside: Vec<f64> = (1..k).map(|_| rng.unit()).collect();
            let mut power = vec![0.0; k];
            power[0] = 1.0;
            for degree in 0..2 * k {
                let found = nodes(diagonal.clone(), beside.clone());
                let sum: f64 = found.iter().map(|(v, w)| w * v.powi(degree as i32)).sum();
                assert!((sum / power[0] - 1.0).abs() < 1e-11, "degree {degree} of {k}: {sum}");
                power = (0..k)
                    .map(|i| {
                        let below = if i > 0 { beside[i - 1] * power[i - 1] } else { 0.0 };
                        let above = if i + 1 < k { beside[i] * power[i + 1] } else { 0.0 };
                        below + diagonal[i] * power[i] + above
                    })
                    .collect();
            }
        }
    }

    /// A smooth surface that 2,000 faint readings tell, of one column and of eight: cells change no solution,
    /// and are near it in half of the steps.
    #[test]
    fn cells_find_the_same_sooner() -> Result<()> {
        let mut rng = Stream::new(3, "cells", 0);
        let n = 2000;
        let sites: Vec<Vec<f64>> = (0..n)
            // A town in the middle of a country.
            .map(|i| if i % 2 == 0 { 1.0 } else { 0.1 })
            .map(|half| vec![rng.uniform(-half, half), rng.uniform(-half, half)])
            .collect();
        let row = Row { sites, y: vec![0.0; n], trials: vec![1.0; n] };
        let kernel = Matern {
            smoothness: Smoothness::ThreeHalves,
            length_scale: 0.8,
            sill: 1.0,
            metric: Metric::Euclidean,
        };
        let ordered = Ordered::of(&row, &kernel, true);
        let (lists, kriging) = (ordered.lists(30), Kriging { kernel: &kernel, levels: 1 });
        let prior = Factor::new(kriging, &ordered, &lists, &vec![JITTER; n]);
        // From readings that say next to nothing to such as say a lot.
        let root: Vec<f64> = (0..n).map(|i| [0.02, 0.5, 0.5, 1.0][i % 4]).collect();
        let noise: Vec<f64> = root.iter().map(|r| JITTER + 1.0 / (r * r)).collect();
        let near = Factor::new(kriging, &ordered, &lists, &noise).scaled(&root);
        let coarse = Coarse::new(&ordered, &prior, &root)?;
        assert!(coarse.is_some());
        let alone = System { prior: &prior, root: &root, near: &near, coarse: None };
        let both = System { coarse: coarse.as_ref(), ..alone };
        // Surfaces of the prior, read with noise, as draws are.
        let mut b: Vec<Lane> =
            (0..n).map(|i| Lane::map(|_| prior.variance[i].sqrt() * rng.normal())).collect();
        Lane::solve(&prior, &mut b);
        for (b, r) in b.iter_mut().zip(&root) {
            let surface = *b;
            *b = Lane::map(|l| r * (r * surface.0[l] + rng.normal()));
        }
        prior.covariance(&mut b);
        scale(&mut b, &root);
        let one: Vec<f64> = b.iter().map(|b| b.0[2]).collect();
        let (mut x, mut y, mut z) =
            (vec![Lane::default(); n], vec![Lane::default(); n], one.clone());
        alone.solve(&b, &mut x, 1e-16, true)?;
        both.solve(&b, &mut y, 1e-16, true)?;
        both.solve(&one, &mut z, 1e-16, true)?;
        for ((x, y), z) in x.iter().zip(&y).zip(&z) {
            assert!(x.0.iter().zip(&y.0).all(|(a, b)| (a - b).abs() < 1e-7));
            assert!((z - x.0[2]).abs() < 1e-7);
        }
        // As near as draws are solved for.
        let steps = |system: &System| system.solve(&b, &mut vec![Lane::default(); n], 0.2, false);
        let (slow, fast) = (steps(&alone)?, steps(&both)?);
        assert!(2 * fast < slow, "{fast} steps with cells, {slow} without");
        Ok(())
    }

    /// Loops over one column and over eight, there and back.
    #[test]
    fn a_factor_undoes_itself() {
        let mut rng = Stream::new(2, "factor", 0);
        let mut factor = Factor {
            starts: vec![0],
            before: Vec::new(),
            weight: Vec::new(),
            variance: Vec::new(),
        };
        for i in 0..40 {
            for _ in 0..i.min(4) {
                factor.before.push(rng.below(i) as u32);
                factor.weight.push(rng.uniform(-0.5, 0.5));
            }
            factor.starts.push(factor.before.len() as u32);
            factor.variance.push(rng.uniform(0.5, 2.0));
        }
        let lanes: Vec<Lane> = (0..40).map(|_| Lane::map(|_| rng.normal())).collect();
        let mut back = lanes.clone();
        factor.covariance(&mut back);
        for lane in [0, 7] {
            let mut one: Vec<f64> = lanes.iter().map(|l| l.0[lane]).collect();
            factor.covariance(&mut one);
            assert!(one.iter().zip(&back).all(|(a, b)| (a - b.0[lane]).abs() < 1e-12));
            factor.precision(&mut one);
            let off = one.iter().zip(&lanes).map(|(a, b)| (a - b.0[lane]).abs());
            assert!(off.fold(0.0, f64::max) < 1e-11);
        }
        factor.precision(&mut back);
        assert!(back.iter().zip(&lanes).all(|(a, b)| (a.0[3] - b.0[3]).abs() < 1e-11));
    }
}
