//! The gradient of softmax attention, by recomputation: the inner loops.
//!
//! A tile of queries meets a block of keys in five register-tiled products that stay in the
//! first-level cache. Lanes run along queries while weights are recomputed (`S = K Qᵀ`,
//! `dP = V dOᵀ`, `dS = P (dP − o·g)`) and along the width of a head where gradients gather
//! (`dV += P dO`, `dK += dS Q`, `dQ += dSᵀ K`).
//!
//! Source: Dao et al. (2022), arXiv:2205.14135, algorithm 4.

// Loops count by index: adaptors and closures may be left out of line, without the instruction set.
#![allow(clippy::needless_range_loop)]

use std::{f32::consts::LOG2_E, f64::consts::LN_2, mem, ops::Range};

use super::{
    lanes::{self, Aligned, Lanes},
    softmax::Shape,
};

/// Keys that meet a tile of queries at once.
const BLOCK: usize = 64;
/// Keys whose distances to a tile of queries are held, for all heads.
const CHUNK: usize = 256;
/// Rows are padded to a multiple of this: no register tile has more.
const PANEL: usize = 8;
/// A key this many powers of two below the heaviest has no weight: 1e-24 is no digit of a sum, and
/// what it is multiplied with must not become denormal, which costs a hundred times as much.
const LEAST: f32 = -80.0;
/// 2 to the power [`LEAST`].
const NOTHING: f32 = 1.0 / (1u128 << 80) as f32;

/// How a score depends on distance.
#[derive(Clone, Copy)]
pub enum Bias<'a> {
    /// Not at all.
    None,
    /// `a 2^(−b d²)`: a and b of every head, powers of two.
    Rbf(&'a [[f32; 2]]),
    /// Term by term, each with three parameters.
    Terms(&'a [Part<'a>], &'a dyn Terms),
}

/// One term.
#[derive(Clone, Copy)]
pub enum Part<'a> {
    /// `a 2^(−b d²)`: a and b of every head, powers of two.
    Rbf(&'a [[f32; 2]]),
    /// `a d`: a of every head (and 0), powers of two.
    Scalar(&'a [[f32; 2]]),
    /// As [`Terms`] say.
    Other,
    /// No matter of distance.
    Nothing,
}

/// Terms of a distance bias, with gradients.
pub trait Terms: Sync {
    /// Adds a term of `head` to `scores`, powers of two, given squared distances.
    fn add(&self, term: usize, head: usize, d2: &[f32], scores: &mut [f32]);
    /// The gradient of its parameters, given that of the scores (as exponents of e).
    fn gradient(&self, term: usize, head: usize, d2: &[f32], ds: &[f32]) -> [f32; 3];
}

/// What all rows of a batch share.
#[derive(Clone)]
pub struct Job<'a> {
    /// Sizes.
    pub shape: Shape,
    /// The heads asked for.
    pub heads: Range<usize>,
    /// How scores depend on distance.
    pub bias: Bias<'a>,
    /// Squared chords to squared distances, in place, where the metric is not Euclidean.
    pub bend: Option<fn(&mut [f32])>,
    /// Score of each head's sink, powers of two.
    pub sink: Option<&'a [f32]>,
}

/// One row of a batch: what went into attention, what came out, and the gradient of that.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    /// `[target, head, d]`
    pub q: &'a [f32],
    /// `[context, head, d + w]`: each head's key, then its value.
    pub kv: &'a [f32],
    /// `[target, dim]`
    pub sites: &'a [f32],
    /// `[dim, context]`
    pub columns: &'a [f32],
    /// `[context]`
    pub hidden: &'a [bool],
    /// `[target, head, w]`
    pub out: &'a [f32],
    /// `[target, 2 · head]`: each head's top and each head's inverse weight, as
    /// [`attend`](super::softmax::attend) wrote them behind the values.
    pub marks: &'a [f32],
    /// `[target, head, w]`
    pub grad: &'a [f32],
}

/// Where the gradients of a row go, for the heads of the job only.
pub struct Gradient<'a> {
    /// `[target, head, d]`, overwritten.
    pub q: &'a mut [f32],
    /// `[context, head, d + w]`, overwritten where a key is observed.
    pub kv: &'a mut [f32],
    /// `[head, parameter]`, added to: 2 parameters for [`Bias::Rbf`], 3 for each of the
    /// [`Bias::Terms`].
    pub bias: &'a mut [f64],
    /// `[head]`, added to.
    pub sink: &'a mut [f64],
}

/// Gradients of one row. `scratch` grows as needed and may hold anything.
///
/// # Panics
/// If a slice is too short: a bug in this crate.
pub fn gradient(job: &Job, row: &Row, scratch: &mut Aligned<f32>, to: &mut Gradient) {
    let Shape { heads, d, w, dim } = job.shape;
    let (targets, context) = (row.q.len() / (heads * d), row.hidden.len());
    let wide = heads * w;
    assert!(job.heads.end <= heads, "heads that exist");
    assert!(row.q.len() == targets * heads * d && row.sites.len() >= targets * dim, "queries");
    assert!(row.kv.len() >= context * heads * (d + w), "keys and values");
    assert!(row.columns.len() >= context * dim, "places of keys");
    assert!(row.out.len() >= targets * wide && row.grad.len() >= targets * wide, "outputs");
    assert!(row.marks.len() >= targets * 2 * heads, "tops and inverse weights");
    let heads = job.heads.len();
    assert!(to.q.len() == targets * heads * d, "room for the gradient of the queries");
    assert!(to.kv.len() == context * heads * (d + w), "room for that of keys and values");
    // SAFETY: the slices were checked above.
    lanes::dispatch!(run(job: &Job, row: &Row, scratch: &mut Aligned<f32>, to: &mut Gradient))
}

/// The first `len` values of what is left, from a cache line on.
fn take<'a>(arena: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (taken, rest) = mem::take(arena).split_at_mut(len.next_multiple_of(16));
    *arena = rest;
    &mut taken[..len]
}

/// Squares of distances, then scores and what comes of them, of one tile of queries.
struct Block<'a> {
    /// `[key of the chunk, lane]`
    d2: &'a mut [f32],
    /// `[key, lane]`: scores, then weights.
    p: &'a mut [f32],
    /// `[key, lane]`: gradients of weights, then of scores.
    ds: &'a mut [f32],
}

/// # Safety
/// As [`gradient`] checked, on a machine with the instruction set.
#[inline(always)]
unsafe fn run<L: Lanes, const R: usize, const C: usize, const U: usize>(
    job: &Job,
    row: &Row,
    scratch: &mut Aligned<f32>,
    to: &mut Gradient,
) {
    let Shape { heads: all, d, w, dim } = job.shape;
    let lanes = C * L::N;
    let (dp, wp) = (d.next_multiple_of(L::N), w.next_multiple_of(L::N));
    let heads = job.heads.len();
    let targets = row.q.len() / (all * d);
    let wide = all * w;
    let observed: Vec<usize> = (0..row.hidden.len()).filter(|j| !row.hidden[*j]).collect();
    let n = observed.len();
    if n == 0 {
        to.q.fill(0.0);
        return;
    }
    let padded = n.next_multiple_of(PANEL);
    let scale = 1.0 / (d as f32).sqrt();
    let biased = !matches!(job.bias, Bias::None);
    let has = |x: bool, len: usize| if x { len } else { 0 };

    // [head, key, d] and [head, key, w], twice; then per head of a tile of queries.
    let sizes = [
        heads * padded * dp,
        heads * padded * wp,
        heads * padded * dp,
        heads * padded * wp,
        heads * d * lanes,
        heads * w * lanes,
        heads * lanes * dp,
        heads * lanes * wp,
        heads * lanes * dp,
        heads * lanes,
        heads * lanes,
        dim * lanes,
        has(biased, CHUNK * lanes),
        BLOCK * lanes,
        BLOCK * lanes,
        heads * lanes,
    ];
    let needed = sizes.iter().map(|s| s.next_multiple_of(16)).sum();
    if scratch.len() < needed {
        *scratch = Aligned::new(0.0, needed);
    }
    let mut arena = &mut scratch[..];
    let [k, v, dk, dv, qt, gt, q, g, dq, tops, inverses, sites, d2, p, ds, means] =
        sizes.map(|size| take(&mut arena, size));
    let mut block = Block { d2, p, ds };
    k.fill(0.0);
    v.fill(0.0);
    dk.fill(0.0);
    dv.fill(0.0);
    for (h, head) in job.heads.clone().enumerate() {
        for (j, key) in observed.iter().enumerate() {
            let from = &row.kv[(key * all + head) * (d + w)..][..d + w];
            k[(h * padded + j) * dp..][..d].copy_from_slice(&from[..d]);
            v[(h * padded + j) * wp..][..w].copy_from_slice(&from[d..]);
        }
    }

    for first in (0..targets).step_by(lanes) {
        let rows = lanes.min(targets - first);
        for x in [&mut *qt, &mut *gt, &mut *q, &mut *g] {
            // What is not a query must not count; what is, is overwritten.
            if rows < lanes || dp != d || wp != w {
                x.fill(0.0);
            }
        }
        dq.fill(0.0);
        // Far above any score: weight 0.
        tops.fill(f32::INFINITY);
        inverses.fill(0.0);
        means.fill(0.0);
        for lane in 0..lanes {
            // Lanes without a query repeat the last one's place.
            let from = first + lane.min(rows - 1);
            for i in 0..dim {
                sites[i * lanes + lane] = row.sites[from * dim + i];
            }
        }
        for (h, head) in job.heads.clone().enumerate() {
            for lane in 0..rows {
                let at = first + lane;
                let query = &row.q[(at * all + head) * d..][..d];
                let grad = &row.grad[at * wide + head * w..][..w];
                let out = &row.out[at * wide + head * w..][..w];
                q[(h * lanes + lane) * dp..][..d].copy_from_slice(query);
                g[(h * lanes + lane) * wp..][..w].copy_from_slice(grad);
                means[h * lanes + lane] = out.iter().zip(grad).map(|(o, g)| o * g).sum();
                let inverse = row.marks[(at * 2 + 1) * all + head];
                if inverse > 0.0 {
                    inverses[h * lanes + lane] = inverse;
                    tops[h * lanes + lane] = row.marks[at * 2 * all + head];
                }
            }
            let (q, g) = (&q[h * lanes * dp..], &g[h * lanes * wp..]);
            for i in 0..d {
                for (lane, x) in qt[(h * d + i) * lanes..][..lanes].iter_mut().enumerate() {
                    *x = q[lane * dp + i] * (scale * LOG2_E);
                }
            }
            for i in 0..w {
                for (lane, x) in gt[(h * w + i) * lanes..][..lanes].iter_mut().enumerate() {
                    *x = g[lane * wp + i];
                }
            }
            if let Some(sink) = job.sink {
                // Value 0 leaves only the softmax term: ds = −w · (o · g).
                for lane in h * lanes..h * lanes + rows {
                    let weight = inverses[lane] * (sink[head] - tops[lane]).exp2();
                    to.sink[h] -= f64::from(weight * means[lane]);
                }
            }
        }
        for from in (0..n).step_by(CHUNK) {
            let len = CHUNK.min(n - from);
            if biased {
                let keys = &observed[from..from + len];
                // SAFETY: the sites of a tile, the places of keys that exist, and room for both.
                unsafe { distances::<L, C>(row, dim, sites, keys, block.d2) };
                if let Some(bend) = job.bend {
                    bend(&mut block.d2[..len * lanes]);
                }
            }
            for (h, head) in job.heads.clone().enumerate() {
                let each = to.bias.len() / heads;
                let sum = &mut to.bias[h * each..(h + 1) * each];
                let (keys, queries) = (h * padded + from, h * lanes);
                let tile = Tile {
                    d,
                    w,
                    rows,
                    k: &k[keys * dp..],
                    v: &v[keys * wp..],
                    qt: &qt[queries * d..],
                    gt: &gt[queries * w..],
                    q: &q[queries * dp..],
                    g: &g[queries * wp..],
                    tops: &tops[queries..],
                    inverses: &inverses[queries..],
                    means: &means[queries..],
                };
                let sums = Sums {
                    dk: &mut dk[keys * dp..],
                    dv: &mut dv[keys * wp..],
                    dq: &mut dq[queries * dp..],
                };
                // SAFETY: every slice reaches as far as `len` keys, or the lanes of a tile, need.
                unsafe {
                    match job.bias {
                        Bias::None => {
                            chunk::<L, R, C, U, NONE>(&tile, head, len, job, &mut block, sums, sum)
                        }
                        Bias::Rbf(_) => {
                            chunk::<L, R, C, U, RBF>(&tile, head, len, job, &mut block, sums, sum)
                        }
                        Bias::Terms(..) => {
                            chunk::<L, R, C, U, TERMS>(&tile, head, len, job, &mut block, sums, sum)
                        }
                    }
                }
            }
        }
        for lane in 0..rows {
            for h in 0..heads {
                let from = &dq[(h * lanes + lane) * dp..][..d];
                let to = &mut to.q[((first + lane) * heads + h) * d..][..d];
                for (to, x) in to.iter_mut().zip(from) {
                    *to = x * scale;
                }
            }
        }
    }
    for (j, key) in observed.iter().enumerate() {
        for h in 0..heads {
            let to = &mut to.kv[(key * heads + h) * (d + w)..][..d + w];
            for (to, x) in to.iter_mut().zip(&dk[(h * padded + j) * dp..][..d]) {
                *to = x * scale;
            }
            to[d..].copy_from_slice(&dv[(h * padded + j) * wp..][..w]);
        }
    }
}

/// Kinds of bias, for the compiler.
const NONE: usize = 0;
const RBF: usize = 1;
const TERMS: usize = 2;
const SCALAR: usize = 3;

/// A tile of queries and the keys of a chunk, for one head.
struct Tile<'a> {
    d: usize,
    w: usize,
    /// Queries; the lanes beyond hold none.
    rows: usize,
    /// `[key, padded d]`
    k: &'a [f32],
    /// `[key, padded w]`
    v: &'a [f32],
    /// `[d, lane]`, scaled to powers of two.
    qt: &'a [f32],
    /// `[w, lane]`
    gt: &'a [f32],
    /// `[lane, padded d]`
    q: &'a [f32],
    /// `[lane, padded w]`
    g: &'a [f32],
    /// `[lane]`, powers of two.
    tops: &'a [f32],
    /// `[lane]`
    inverses: &'a [f32],
    /// `[lane]`: o · g.
    means: &'a [f32],
}

/// Where the gradients of a [`Tile`] gather, in its layouts.
struct Sums<'a> {
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    dq: &'a mut [f32],
}

/// `len` keys of a chunk against a tile of queries, for one head.
///
/// # Safety
/// The slices reach as far as `len` keys, rounded up to [`PANEL`], and the lanes need.
#[inline(always)]
unsafe fn chunk<L: Lanes, const R: usize, const C: usize, const U: usize, const KIND: usize>(
    tile: &Tile,
    head: usize,
    len: usize,
    job: &Job,
    block: &mut Block,
    sums: Sums,
    sum: &mut [f64],
) {
    let lanes = C * L::N;
    let (dp, wp) = (tile.d.next_multiple_of(L::N), tile.w.next_multiple_of(L::N));
    let [a, b] = match job.bias {
        Bias::Rbf(params) => params[head],
        _ => [0.0; 2],
    };
    // SAFETY: the caller's contract.
    unsafe {
        let mut lane = [[L::splat(0.0); C]; 3];
        for (to, from) in lane.iter_mut().zip([tile.tops, tile.inverses, tile.means]) {
            for (c, to) in to.iter_mut().enumerate() {
                *to = L::load(from.as_ptr().add(c * L::N));
            }
        }
        let mut slopes = [[L::splat(0.0); U]; 2];
        for from in (0..len).step_by(BLOCK) {
            let count = BLOCK.min(len - from);
            let d2 = block.d2.get_unchecked_mut(has(KIND, from * lanes)..);
            let (p, ds) = (block.p.as_mut_ptr(), block.ds.as_mut_ptr());
            let (k, v) = (tile.k.as_ptr().add(from * dp), tile.v.as_ptr().add(from * wp));
            for r in (0..count).step_by(R) {
                let mut acc = [[L::splat(0.0); C]; R];
                lanes::product::<L, R, C>(
                    tile.d,
                    k.add(r * dp),
                    [dp, 1],
                    tile.qt.as_ptr(),
                    lanes,
                    &mut acc,
                );
                store::<L, R, C>(&acc, p.add(r * lanes), lanes);
                let mut acc = [[L::splat(0.0); C]; R];
                lanes::product::<L, R, C>(
                    tile.w,
                    v.add(r * wp),
                    [wp, 1],
                    tile.gt.as_ptr(),
                    lanes,
                    &mut acc,
                );
                store::<L, R, C>(&acc, ds.add(r * lanes), lanes);
            }
            let vectors = count * C;
            if let Bias::Terms(parts, terms) = job.bias {
                for (term, part) in parts.iter().enumerate() {
                    let p = block.p.as_mut_ptr();
                    match part {
                        Part::Rbf(at) => add::<L, U, RBF>(d2.as_ptr(), p, vectors, at[head]),
                        Part::Scalar(at) => add::<L, U, SCALAR>(d2.as_ptr(), p, vectors, at[head]),
                        Part::Other => {
                            let p = block.p.get_unchecked_mut(..count * lanes);
                            terms.add(term, head, &d2[..count * lanes], p);
                        }
                        Part::Nothing => {}
                    }
                }
            }
            let p = block.p.as_mut_ptr();
            let whole = count - count % (U / C);
            for j in (0..whole).step_by(U / C) {
                let at = [d2.as_ptr(), p, ds];
                weigh::<L, C, U, U, KIND>(at, j * lanes, [a, b], &lane, &mut slopes);
            }
            for j in whole..count {
                let at = [d2.as_ptr(), p, ds];
                weigh::<L, C, C, U, KIND>(at, j * lanes, [a, b], &lane, &mut slopes);
            }
            if let Bias::Terms(parts, terms) = job.bias {
                let ds = block.ds.get_unchecked(..count * lanes);
                for (term, part) in parts.iter().enumerate() {
                    let d2 = &d2[..count * lanes];
                    let part = match part {
                        Part::Rbf(at) => {
                            let [a, b] = at[head];
                            let [e, ed2] = slope::<L, U, RBF>(d2, ds, b);
                            [e, -f64::from(a) * LN_2 * ed2, 0.0]
                        }
                        Part::Scalar(_) => [slope::<L, U, SCALAR>(d2, ds, 0.0)[0], 0.0, 0.0],
                        Part::Other => terms.gradient(term, head, d2, ds).map(f64::from),
                        Part::Nothing => continue,
                    };
                    for (sum, x) in sum[3 * term..].iter_mut().zip(part) {
                        *sum += x;
                    }
                }
            }
            let (p, ds) = (block.p.as_ptr(), block.ds.as_ptr());
            let (dk, dv) =
                (sums.dk.as_mut_ptr().add(from * dp), sums.dv.as_mut_ptr().add(from * wp));
            for r in (0..count).step_by(R) {
                let (q, g, p, ds) =
                    (tile.q.as_ptr(), tile.g.as_ptr(), p.add(r * lanes), ds.add(r * lanes));
                along::<L, R, true>(tile.rows, p, lanes, g, wp, dv.add(r * wp));
                along::<L, R, true>(tile.rows, ds, lanes, q, dp, dk.add(r * dp));
            }
            for r in (0..tile.rows).step_by(R) {
                let dq = sums.dq.as_mut_ptr().add(r * dp);
                along::<L, R, false>(count, ds.add(r), lanes, k, dp, dq);
            }
        }
        if KIND == RBF {
            sum[0] += total::<L, U>(&slopes[0]);
            sum[1] -= f64::from(a) * LN_2 * total::<L, U>(&slopes[1]);
        }
    }
}

/// `x`, where there are distances.
#[inline(always)]
fn has(kind: usize, x: usize) -> usize {
    if kind == NONE { 0 } else { x }
}

/// What a term is before its amplitude, for `V` squared distances: `2^(−b d²)` or d.
///
/// # Safety
/// On a machine with the instruction set.
#[inline(always)]
unsafe fn shape<L: Lanes, const V: usize, const KIND: usize>(
    square: [L::F; V],
    b: f32,
) -> [L::F; V] {
    // SAFETY: the caller's contract.
    unsafe {
        if KIND == SCALAR {
            return L::sqrt_each::<V>(square);
        }
        let mut e = square;
        for u in 0..V {
            // Bounded below: denormal numbers cost a hundred times others.
            e[u] = L::max(L::mul(square[u], L::splat(-b)), L::splat(-64.0));
            e[u] = L::min(e[u], L::splat(126.0));
        }
        L::exp2_each::<V>(e)
    }
}

/// Adds a term to `count` vectors of scores.
///
/// # Safety
/// They exist, and as many of squared distances.
#[inline(always)]
unsafe fn add<L: Lanes, const U: usize, const KIND: usize>(
    d2: *const f32,
    scores: *mut f32,
    count: usize,
    [a, b]: [f32; 2],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let whole = count - count % U;
        for at in (0..whole).step_by(U) {
            add_some::<L, U, KIND>(d2.add(at * L::N), scores.add(at * L::N), [a, b]);
        }
        for at in whole..count {
            add_some::<L, 1, KIND>(d2.add(at * L::N), scores.add(at * L::N), [a, b]);
        }
    }
}

/// `V` vectors of [`add`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn add_some<L: Lanes, const V: usize, const KIND: usize>(
    d2: *const f32,
    scores: *mut f32,
    [a, b]: [f32; 2],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut square = [L::splat(0.0); V];
        for u in 0..V {
            square[u] = L::load(d2.add(u * L::N));
        }
        let value = shape::<L, V, KIND>(square, b);
        for u in 0..V {
            let to = scores.add(u * L::N);
            L::store(to, L::fma(value[u], L::splat(a), L::load(to)));
        }
    }
}

/// `Σ ds · x` and `Σ ds · x · d²`, x as [`shape`] says.
///
/// # Safety
/// Both are whole vectors.
#[inline(always)]
unsafe fn slope<L: Lanes, const U: usize, const KIND: usize>(
    d2: &[f32],
    ds: &[f32],
    b: f32,
) -> [f64; 2] {
    // SAFETY: the caller's contract.
    unsafe {
        let count = d2.len() / L::N;
        let whole = count - count % U;
        let mut sums = [[L::splat(0.0); U]; 2];
        for at in (0..whole).step_by(U) {
            slope_some::<L, U, U, KIND>(d2.as_ptr(), ds.as_ptr(), at * L::N, b, &mut sums);
        }
        for at in whole..count {
            slope_some::<L, 1, U, KIND>(d2.as_ptr(), ds.as_ptr(), at * L::N, b, &mut sums);
        }
        [total::<L, U>(&sums[0]), total::<L, U>(&sums[1])]
    }
}

/// `V` vectors of [`slope`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn slope_some<L: Lanes, const V: usize, const U: usize, const KIND: usize>(
    d2: *const f32,
    ds: *const f32,
    at: usize,
    b: f32,
    sums: &mut [[L::F; U]; 2],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut square = [L::splat(0.0); V];
        for u in 0..V {
            square[u] = L::load(d2.add(at + u * L::N));
        }
        let value = shape::<L, V, KIND>(square, b);
        for u in 0..V {
            let d = L::load(ds.add(at + u * L::N));
            sums[0][u] = L::fma(d, value[u], sums[0][u]);
            if KIND == RBF {
                sums[1][u] = L::fma(d, L::mul(value[u], square[u]), sums[1][u]);
            }
        }
    }
}

/// The sum of all values.
///
/// # Safety
/// On a machine with the instruction set.
#[inline(always)]
unsafe fn total<L: Lanes, const U: usize>(sums: &[L::F; U]) -> f64 {
    let mut host = [0.0f32; 64];
    for u in 0..U {
        // SAFETY: no machine has more than 4 vectors of 16 side by side.
        unsafe { L::store(host.as_mut_ptr().add(u * L::N), sums[u]) };
    }
    host[..U * L::N].iter().map(|x| f64::from(*x)).sum()
}

/// Scores become weights `2^(score + bias − top) / sum`, and gradients of weights those of scores,
/// `V` vectors at once. Pointers: squared distances, scores, gradients. Of every lane: top, inverse
/// weight and mean.
///
/// # Safety
/// All hold vectors from `at` on.
#[inline(always)]
unsafe fn weigh<L: Lanes, const C: usize, const V: usize, const U: usize, const KIND: usize>(
    [d2, p, ds]: [*const f32; 3],
    at: usize,
    [a, b]: [f32; 2],
    [tops, inverses, means]: &[[L::F; C]; 3],
    slopes: &mut [[L::F; U]; 2],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut s = [L::splat(0.0); V];
        let (mut square, mut e) = (s, s);
        for u in 0..V {
            s[u] = L::load(p.add(at + u * L::N));
        }
        if KIND == RBF {
            for u in 0..V {
                square[u] = L::load(d2.add(at + u * L::N));
            }
            e = shape::<L, V, RBF>(square, b);
            for u in 0..V {
                s[u] = L::fma(e[u], L::splat(a), s[u]);
            }
        }
        for u in 0..V {
            s[u] = L::max(L::sub(s[u], tops[u % C]), L::splat(LEAST - 2.0));
        }
        let mut weights = L::exp2_each::<V>(s);
        for u in 0..V {
            let at = at + u * L::N;
            weights[u] = L::max(L::sub(weights[u], L::splat(NOTHING)), L::splat(0.0));
            weights[u] = L::mul(weights[u], inverses[u % C]);
            let d = L::mul(weights[u], L::sub(L::load(ds.add(at)), means[u % C]));
            L::store(p.cast_mut().add(at), weights[u]);
            L::store(ds.cast_mut().add(at), d);
            if KIND == RBF {
                slopes[0][u] = L::fma(d, e[u], slopes[0][u]);
                slopes[1][u] = L::fma(d, L::mul(e[u], square[u]), slopes[1][u]);
            }
        }
    }
}

/// Squared distances from a tile of queries to keys.
///
/// # Safety
/// `sites` `[dim, lane]`, `d2` `[key, lane]`.
#[inline(always)]
unsafe fn distances<L: Lanes, const C: usize>(
    row: &Row,
    dim: usize,
    sites: &[f32],
    keys: &[usize],
    d2: &mut [f32],
) {
    // SAFETY: the caller's contract.
    unsafe {
        for (j, key) in keys.iter().enumerate() {
            let mut sum = [L::splat(0.0); C];
            for i in 0..dim {
                let at = i * row.hidden.len() + key;
                let place = L::splat(*row.columns.get_unchecked(at));
                for (c, sum) in sum.iter_mut().enumerate() {
                    let site = L::load(sites.as_ptr().add((i * C + c) * L::N));
                    let gap = L::sub(site, place);
                    *sum = L::fma(gap, gap, *sum);
                }
            }
            for (c, sum) in sum.iter().enumerate() {
                L::store(d2.as_mut_ptr().add((j * C + c) * L::N), *sum);
            }
        }
    }
}

/// `out[r] += Σₖ a[r, k] b[k]` over whole rows of `b`, `b_step` wide as those of `out`. `a` is
/// `[r, k]` with rows `a_step` apart if `ACROSS`, `[k, r]` if not.
///
/// # Safety
/// All of it exists.
#[inline(always)]
unsafe fn along<L: Lanes, const R: usize, const ACROSS: bool>(
    depth: usize,
    a: *const f32,
    a_step: usize,
    b: *const f32,
    b_step: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let vectors = b_step / L::N;
        let pairs = vectors / 2;
        for c in 0..pairs {
            let at = 2 * c * L::N;
            part::<L, R, 2, ACROSS>(depth, a, a_step, b.add(at), b_step, out.add(at));
        }
        if vectors % 2 == 1 {
            let at = 2 * pairs * L::N;
            part::<L, R, 1, ACROSS>(depth, a, a_step, b.add(at), b_step, out.add(at));
        }
    }
}

/// `C` vectors of [`along`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn part<L: Lanes, const R: usize, const C: usize, const ACROSS: bool>(
    depth: usize,
    a: *const f32,
    a_step: usize,
    b: *const f32,
    b_step: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[L::splat(0.0); C]; R];
        for (r, row) in acc.iter_mut().enumerate() {
            for (c, x) in row.iter_mut().enumerate() {
                *x = L::load(out.add(r * b_step + c * L::N));
            }
        }
        if ACROSS {
            lanes::product::<L, R, C>(depth, a, [a_step, 1], b, b_step, &mut acc);
        } else {
            lanes::tile::<L, R, C>(depth, a, a_step, b, b_step, &mut acc);
        }
        store::<L, R, C>(&acc, out, b_step);
    }
}

/// Writes a register tile, rows `step` apart.
///
/// # Safety
/// There is room.
#[inline(always)]
unsafe fn store<L: Lanes, const R: usize, const C: usize>(
    acc: &[[L::F; C]; R],
    to: *mut f32,
    step: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        for (r, row) in acc.iter().enumerate() {
            for (c, x) in row.iter().enumerate() {
                L::store(to.add(r * step + c * L::N), *x);
            }
        }
    }
}
