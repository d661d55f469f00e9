//! The equations of counts that a nearest-neighbour Gaussian process reads: `S = I + Π^½ K Π^½`, for the sparse
//! prior covariance K of the surface and the precision Π of its readings.
//!
//! Sources: Kündig & Sigrist (2023), arXiv:2310.12000, for conjugate gradients and stochastic Lanczos
//! quadrature in place of a factor.
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

use faer::Mat;
use rayon::prelude::*;

use super::{
    elimination::{LANES, Lane},
    kriging::{Heard, Kriging, Lists, Ordered},
    neighbours::Found,
};
use crate::{
    error::{Error, Result},
    fused::simd,
    linalg::Cholesky,
    rng::Stream,
};

/// Places of a cell, in which the system is solved exactly as a whole, and the most cells.
const CELL: usize = 64;
const CELLS: usize = 512;

/// Each place regressed on earlier ones: `x = Σ weight · x[before] + noise`.
pub(super) struct Factor {
    starts: Vec<u32>,
    before: Vec<u32>,
    weight: Vec<f64>,
    /// Of the noise.
    pub variance: Vec<f64>,
}

/// A column of numbers, or [`LANES`] side by side.
pub(super) trait Column: Copy + Default + Send + Sync {
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
    pub fn new(kriging: Kriging, ordered: &Ordered, lists: &Lists, noise: &[f64]) -> Self {
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
    pub fn scaled(mut self, root: &[f64]) -> Self {
        for i in 0..self.variance.len() {
            self.variance[i] *= root[i] * root[i];
            for at in self.starts[i] as usize..self.starts[i + 1] as usize {
                self.weight[at] *= root[i] / root[self.before[at] as usize];
            }
        }
        self
    }

    /// `x = B⁻¹ D B⁻ᵀ x`: the covariance.
    pub fn covariance<C: Column>(&self, x: &mut [C]) {
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
pub(super) fn scale<C: Column>(x: &mut [C], by: &[f64]) {
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
pub(super) struct System<'a> {
    pub prior: &'a Factor,
    pub root: &'a [f64],
    pub near: &'a Factor,
    pub coarse: Option<&'a Coarse>,
}

/// `S x`.
fn applied<C: Column>(prior: &Factor, root: &[f64], x: &[C]) -> Vec<C> {
    let mut out = x.to_vec();
    scale(&mut out, root);
    prior.covariance(&mut out);
    scale(&mut out, root);
    for (out, x) in out.iter_mut().zip(x) {
        let before = *out;
        *out = C::map(|lane| before.get(lane) + x.get(lane));
    }
    out
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
    pub fn new(ordered: &Ordered, prior: &Factor, root: &[f64]) -> Result<Option<Self>> {
        let n = root.len();
        let cells = Self::cells(n);
        if cells == 0 {
            return Ok(None);
        }
        let mut found = Found::new();
        let cell: Vec<u32> = (0..n)
            .map(|i| {
                ordered.around_site(i, 1, cells, &mut found);
                found.first().map_or(0, |(_, j)| *j)
            })
            .collect();
        let columns: Vec<Vec<Lane>> = (0..cells.div_ceil(LANES))
            .into_par_iter()
            .map(|group| {
                let one = |i: usize, lane: usize| {
                    let mine = cell[i] as usize == group * LANES + lane;
                    if mine { root[i] } else { 0.0 }
                };
                let column: Vec<Lane> = (0..n).map(|i| Lane::map(|lane| one(i, lane))).collect();
                let applied = applied(prior, root, &column);
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
        let cells = Self::cells(places);
        if cells == 0 { 0 } else { 4 * places + 24 * cells * cells }
    }

    /// How many cells; none where there are few places.
    const fn cells(places: usize) -> usize {
        match places / CELL {
            few if few < LANES => 0,
            many if many > CELLS => CELLS,
            cells => cells,
        }
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
        applied(self.prior, self.root, x)
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
    pub fn solve<C: Column>(&self, b: &[C], x: &mut [C], energy: f64, dual: bool) -> Result<usize> {
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
    pub fn log_det(&self) -> f64 {
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
        let prior = Factor::new(kriging, &ordered, &lists, &vec![1e-10; n]);
        // From readings that say next to nothing to such as say a lot.
        let root: Vec<f64> = (0..n).map(|i| [0.02, 0.5, 0.5, 1.0][i % 4]).collect();
        let noise: Vec<f64> = root.iter().map(|r| 1e-10 + 1.0 / (r * r)).collect();
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
