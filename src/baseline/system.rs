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
    columns::{Column, Few, MOST, Sparse, Sums, all},
    elimination::{LANES, Lane},
    kriging::{Asked, Heard, Kriging, Lists, Ordered, Room, blocks},
    neighbours::Found,
};
use crate::{
    error::{Error, Result},
    linalg::Cholesky,
    rng::Stream,
};

/// Places of a cell, in which the system is solved exactly as a whole, and the most cells.
const CELL: usize = 64;
const CELLS: usize = 512;

/// Systems of smaller eigenvalues are set up for cells, and solved for draws, in 32 bits. Rounding, 6e-8 of the
/// largest eigenvalue, is then far below a hundredth, which is as near as draws are solved for.
const FAINT: f64 = 1e5;

/// Whether 32 bits will do for the system of a surface of this sill: no eigenvalue is above what is summed.
pub(super) fn faint(sill: f64, root: &[f64]) -> bool {
    sill * root.iter().map(|r| r * r).sum::<f64>() < FAINT
}

/// Each place regressed on earlier ones: `x = Σ weight · x[before] + noise`.
#[cfg_attr(test, derive(Clone))]
pub(super) struct Factor {
    /// What each place is regressed on.
    rows: Sparse,
    /// The places that are regressed on each.
    columns: Sparse,
    /// Of the noise.
    pub variance: Vec<f64>,
}

impl Factor {
    /// Of the surface with each of these noises, each place given its neighbours of the lists.
    pub fn of<const K: usize>(
        kriging: Kriging,
        ordered: &Ordered,
        lists: &Lists,
        noises: [&[f64]; K],
    ) -> [Self; K] {
        let n = ordered.len();
        let zero = vec![0.0; n];
        let kriging = Kriging { levels: 0, ..kriging };
        let least = f64::EPSILON * kriging.kernel.sill();
        let terms: Vec<u32> = (0..n as u32).collect();
        let none = || std::array::from_fn(|_| (Sparse::none(), Vec::new()));
        let add = |parts: &mut [(Sparse, Vec<f64>); K],
                   room: &mut Room,
                   block: &[u32],
                   asked: &[Asked]| {
            kriging.meet(ordered, asked, room);
            if K > 1 {
                room.keep();
            }
            for (k, ((rows, variance), noise)) in parts.iter_mut().zip(noises).enumerate() {
                if k > 0 {
                    room.again();
                }
                let said = kriging.hear(ordered, Heard { value: &zero, noise }, asked, room);
                for ((i, said), weights) in block.iter().zip(said).zip(room.weights(asked)) {
                    variance.push((said.variance + noise[*i as usize]).max(least));
                    rows.others.extend(weights.iter().map(|(j, _)| *j));
                    rows.weight.extend(weights.iter().map(|(_, w)| *w));
                    rows.starts.push(rows.others.len() as u32);
                }
            }
        };
        let parts = blocks(ordered, lists, &terms, none, add);
        let mut whole = none();
        let entries: usize = parts.iter().map(|parts| parts[0].0.others.len()).sum();
        for (rows, variance) in &mut whole {
            rows.starts.reserve_exact(n);
            rows.others.reserve_exact(entries);
            rows.weight.reserve_exact(entries);
            variance.reserve_exact(n);
        }
        for parts in parts {
            for ((rows, variance), part) in whole.iter_mut().zip(parts) {
                let before = rows.others.len() as u32;
                rows.starts.extend(part.0.starts[1..].iter().map(|start| before + start));
                rows.others.extend(part.0.others);
                rows.weight.extend(part.0.weight);
                variance.extend(part.1);
            }
        }
        whole.map(|(rows, variance)| Factor { columns: rows.turned(), rows, variance })
    }

    /// Of the same in units of `1 / root` at each place.
    pub fn scaled(mut self, root: &[f64]) -> Self {
        self.variance.iter_mut().zip(root).for_each(|(variance, root)| *variance *= root * root);
        self.rows.scale(|i, j| root[i] / root[j]);
        self.columns.scale(|j, i| root[i] / root[j]);
        self
    }

    /// `x = B⁻¹ x`.
    pub fn solve<C: Column>(&self, x: &mut [C]) {
        C::sweep(&self.rows, x, true, 1.0);
    }

    /// `x = B⁻ᵀ x`.
    fn solve_transposed<C: Column>(&self, x: &mut [C]) {
        C::sweep(&self.columns, x, false, 1.0);
    }

    /// `x = B x`, the last first, since it is nobody's neighbour.
    fn times<C: Column>(&self, x: &mut [C]) {
        C::sweep(&self.rows, x, false, -1.0);
    }

    /// `x = Bᵀ x`, the first first.
    fn times_transposed<C: Column>(&self, x: &mut [C]) {
        C::sweep(&self.columns, x, true, -1.0);
    }

    /// What is to be expected of all places, given the first of them.
    pub fn kriged(&self, first: &[f64]) -> Vec<f64> {
        let mut x = vec![0.0; self.variance.len()];
        x[..first.len()].copy_from_slice(first);
        self.times(&mut x);
        x[first.len()..].fill(0.0);
        self.solve(&mut x);
        x
    }

    /// `x = B⁻¹ D B⁻ᵀ x`: the covariance.
    pub fn covariance<C: Column>(&self, x: &mut [C]) {
        self.solve_transposed(x);
        C::scale(x, &self.variance);
        self.solve(x);
    }

    /// `x = Bᵀ D⁻¹ B x`: its inverse.
    fn precision<C: Column>(&self, x: &mut [C]) {
        self.times(x);
        let inverse: Vec<f64> = self.variance.iter().map(|v| v.recip()).collect();
        C::scale(x, &inverse);
        self.times_transposed(x);
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
    C::scale(&mut out, root);
    prior.covariance(&mut out);
    C::scale(&mut out, root);
    C::blend(&mut out, &all(1.0), &all(1.0), x);
    out
}

/// `a − b`.
fn minus<C: Column>(a: &[C], mut b: Vec<C>) -> Vec<C> {
    C::blend(&mut b, &all(-1.0), &all(1.0), a);
    b
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
    pub fn new(ordered: &Ordered, prior: &Factor, root: &[f64], sill: f64) -> Result<Option<Self>> {
        let n = root.len();
        let cells = Self::cells(n);
        if cells == 0 {
            return Ok(None);
        }
        let cell: Vec<u32> = (0..n)
            .into_par_iter()
            .map_init(Found::new, |found, i| {
                ordered.around_site(i, 1, cells, found);
                found.first().map_or(0, |(_, j)| *j)
            })
            .collect();
        let whole = match faint(sill, root) {
            true => Self::whole::<Few>(&cell, cells, prior, root),
            false => Self::whole::<Lane>(&cell, cells, prior, root),
        };
        Ok(Some(Coarse { factor: Cholesky::factor(whole)?, cell }))
    }

    /// `Pᵀ S P`.
    fn whole<C: Column>(cell: &[u32], cells: usize, prior: &Factor, root: &[f64]) -> Mat<f64> {
        let n = root.len();
        let columns: Vec<Vec<Sums>> = (0..cells.div_ceil(C::WIDTH))
            .into_par_iter()
            .map(|group| {
                let one = |i: usize, lane: usize| {
                    let mine = cell[i] as usize == group * C::WIDTH + lane;
                    if mine { root[i] } else { 0.0 }
                };
                let column: Vec<C> = (0..n).map(|i| C::map(|lane| one(i, lane))).collect();
                let applied = applied(prior, root, &column);
                let mut sums = vec![Sums::default(); cells];
                for (i, a) in applied.iter().enumerate() {
                    let sum = &mut sums[cell[i] as usize];
                    for (l, sum) in sum.iter_mut().enumerate().take(C::WIDTH) {
                        *sum = root[i].mul_add(a.get(l), *sum);
                    }
                }
                sums
            })
            .collect();
        // Symmetric but for rounding.
        Mat::from_fn(cells, cells, |i, j| {
            let at = |i: usize, j: usize| columns[j / C::WIDTH][i][j % C::WIDTH];
            0.5 * (at(i, j) + at(j, i))
        })
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
            let left = minus(r, self.apply(z));
            coarse.add(self.root, &left, z);
        }
    }

    /// `S⁻¹ b` from the guess `x` on, until the error is below `energy` in `½ eᵀ S e`, which is nats.
    /// What is kriged from the solution as a `dual` then lacks no more either: the residual, which is the
    /// error times up to the largest eigenvalue, is as small. Returns how many steps it took.
    pub fn solve<C: Column>(&self, b: &[C], x: &mut [C], energy: f64, dual: bool) -> Result<usize> {
        let residual = |x: &[C]| minus(b, self.apply(x));
        let nowhere = x.iter().all(|x| (0..C::WIDTH).all(|lane| x.get(lane) == 0.0));
        let mut r = if nowhere { b.to_vec() } else { residual(x) };
        if let Some(coarse) = self.coarse {
            coarse.add(self.root, &r, x);
            r = residual(x);
        }
        let mut whole = b.to_vec();
        self.near.precision(&mut whole);
        let (whole, size) = (C::inner(b, &whole), C::inner(b, b));
        let enough = whole.map(|whole| energy.max(1e-28 * whole));
        let rest = size.map(|size| energy.max(1e-26 * size));
        let mut z = Vec::with_capacity(r.len());
        self.improve(&r, &mut z);
        let mut p = z.clone();
        let mut left = C::inner(&r, &z);
        for steps in 0..500 {
            let square = if dual { C::inner(&r, &r) } else { Sums::default() };
            let open: [bool; MOST] =
                std::array::from_fn(|l| left[l] > enough[l] || square[l] > rest[l]);
            if !open.contains(&true) {
                return match left.iter().all(|left| left.is_finite()) {
                    true => Ok(steps),
                    false => Err(Error::input("the counts have no finite likelihood")),
                };
            }
            let ap = self.apply(&p);
            let bent = C::inner(&p, &ap);
            // A column that has arrived stays where it is.
            let step: Sums = std::array::from_fn(|l| if open[l] { left[l] / bent[l] } else { 0.0 });
            C::blend(x, &all(1.0), &step, &p);
            C::blend(&mut r, &all(1.0), &step.map(|step| -step), &ap);
            self.improve(&r, &mut z);
            let now = C::inner(&r, &z);
            let turn: Sums = std::array::from_fn(|l| if open[l] { now[l] / left[l] } else { 0.0 });
            C::blend(&mut p, &turn, &all(1.0), &z);
            left = std::array::from_fn(|l| if open[l] { now[l] } else { left[l] });
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
        let mut beta = Sums::default();
        // Diagonals and what stands beside them, of each lane.
        let mut tri: Vec<(Sums, Sums)> = Vec::new();
        let mut told = f64::NAN;
        for step in 0..60.min(n) {
            let mut w = v.clone();
            Lane::scale(&mut w, &root);
            self.near.times_transposed(&mut w);
            let mut w = self.apply(&w);
            self.near.times(&mut w);
            Lane::scale(&mut w, &root);
            let alpha = Lane::inner(&w, &v);
            Lane::blend(&mut w, &all(1.0), &alpha.map(|a| -a), &v);
            Lane::blend(&mut w, &all(1.0), &beta.map(|b| -b), &last);
            beta = Lane::inner(&w, &w).map(f64::sqrt);
            tri.push((alpha, beta));
            if step % 3 == 2 || step + 1 == n || beta.iter().all(|b| *b < 1e-9) {
                let now = n as f64 * quadrature(&tri);
                if (now - told).abs() < 1e-3 * now.abs() + 1e-3 || beta.iter().all(|b| *b < 1e-9) {
                    return now;
                }
                told = now;
            }
            // Nothing is left in a lane: it stays at zero, and its matrix falls apart there.
            let by = beta.map(|b| if b > 1e-9 { b.recip() } else { 0.0 });
            beta = beta.map(|b| if b > 1e-9 { b } else { 0.0 });
            Lane::blend(&mut w, &by, &Sums::default(), &v);
            last = std::mem::replace(&mut v, w);
        }
        told
    }
}

/// `e₁ᵀ ln(T) e₁` of tridiagonal matrices, averaged over the lanes of [`Lane`].
fn quadrature(tri: &[(Sums, Sums)]) -> f64 {
    let one = |lane: usize| -> f64 {
        // A lane that ended early is what it was then.
        let ended = tri.iter().position(|(_, beta)| beta[lane] < 1e-9);
        let k = ended.map_or(tri.len(), |at| at + 1);
        let diagonal: Vec<f64> = tri[..k].iter().map(|(alpha, _)| alpha[lane]).collect();
        let beside: Vec<f64> = tri[..k - 1].iter().map(|(_, beta)| beta[lane]).collect();
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
pub(super) mod tests {
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

    /// Half of the sites in a tenth of the country's width.
    pub fn town_in_a_country(n: usize, rng: &mut Stream) -> Vec<Vec<f64>> {
        (0..n)
            .map(|i| if i % 2 == 0 { 1.0 } else { 0.1 })
            .map(|half| vec![rng.uniform(-half, half), rng.uniform(-half, half)])
            .collect()
    }

    /// A smooth surface that 2,000 faint readings tell, of one column and of eight: cells change no solution,
    /// and are near it in half of the steps.
    #[test]
    fn cells_find_the_same_sooner() -> Result<()> {
        let mut rng = Stream::new(3, "cells", 0);
        let n = 2000;
        let sites = town_in_a_country(n, &mut rng);
        let row = Row { sites, y: vec![0.0; n], trials: vec![1.0; n] };
        let kernel = Matern {
            smoothness: Smoothness::ThreeHalves,
            length_scale: 0.8,
            sill: 1.0,
            metric: Metric::Euclidean,
        };
        let ordered = Ordered::of(&row, &kernel, true);
        let (lists, kriging) = (ordered.lists(30), Kriging { kernel: &kernel, levels: 1 });
        // From readings that say next to nothing to such as say a lot.
        let root: Vec<f64> = (0..n).map(|i| [0.02, 0.5, 0.5, 1.0][i % 4]).collect();
        let noise: Vec<f64> = root.iter().map(|r| 1e-10 + 1.0 / (r * r)).collect();
        let [prior, near] = Factor::of(kriging, &ordered, &lists, [&vec![1e-10; n], &noise]);
        let near = near.scaled(&root);
        let coarse = Coarse::new(&ordered, &prior, &root, 1.0)?;
        assert!(coarse.is_some());
        let alone = System { prior: &prior, root: &root, near: &near, coarse: None };
        let both = System { coarse: coarse.as_ref(), ..alone };
        // Surfaces of the prior, read with noise, as draws are.
        let mut b: Vec<Lane> =
            (0..n).map(|i| Lane::map(|_| prior.variance[i].sqrt() * rng.normal())).collect();
        prior.solve(&mut b);
        for (b, r) in b.iter_mut().zip(&root) {
            let surface = *b;
            *b = Lane::map(|l| r * (r * surface.0[l] + rng.normal()));
        }
        prior.covariance(&mut b);
        Lane::scale(&mut b, &root);
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
        let (mut rows, mut variance) = (Sparse::none(), Vec::new());
        for i in 0..40usize {
            for _ in 0..i.min(7) {
                rows.others.push(rng.below(i) as u32);
                rows.weight.push(rng.uniform(-0.5, 0.5));
            }
            rows.starts.push(rows.others.len() as u32);
            variance.push(rng.uniform(0.5, 2.0));
        }
        let factor = Factor { columns: rows.turned(), rows, variance };
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
        // Transposed is what stands on the other side of an inner product, scaled or not.
        let root: Vec<f64> = (0..40).map(|_| rng.uniform(0.5, 2.0)).collect();
        for factor in [&factor, &factor.clone().scaled(&root)] {
            let (mut a, mut b) = (lanes.clone(), lanes.clone());
            factor.solve(&mut a);
            factor.solve_transposed(&mut b);
            let (one, other) = (Lane::inner(&a, &lanes), Lane::inner(&lanes, &b));
            assert!((0..LANES).all(|l| (one[l] - other[l]).abs() < 1e-11));
            let (mut a, mut b) = (lanes.clone(), lanes.clone());
            factor.times(&mut a);
            factor.times_transposed(&mut b);
            let (one, other) = (Lane::inner(&a, &lanes), Lane::inner(&lanes, &b));
            assert!((0..LANES).all(|l| (one[l] - other[l]).abs() < 1e-11));
        }
        factor.precision(&mut back);
        assert!(back.iter().zip(&lanes).all(|(a, b)| (a.0[3] - b.0[3]).abs() < 1e-11));
    }
}
