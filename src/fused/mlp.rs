//! A run of layers over tiles of rows that never leave the cache: what a network does when it is only
//! asked.
//!
//! A tile is held feature by feature with lanes along its rows, so that what one layer writes is
//! what the next one reads, and a norm is vertical arithmetic. No intermediate result of the run
//! is ever as long as the input.

use std::mem::MaybeUninit;

use candle_core::Result;
use rayon::prelude::*;

use super::{
    gelu::{FIRST, MOST, THIRD},
    lanes::{self, Aligned, Lanes},
    layer_norm::EPSILON,
};

/// Outputs side by side in a panel of weights.
const PANEL: usize = 8;
/// Tiles that a thread takes at a time.
const TILES: usize = 8;

/// Weights of a dense layer in the order the kernel reads them: `[panel, input, 8 outputs]`.
pub struct Packed {
    inputs: usize,
    outputs: usize,
    weights: Aligned<f32>,
    bias: Aligned<f32>,
}

impl Packed {
    /// From `weight` `[inputs, outputs]`; without a bias it is 0.
    ///
    /// # Panics
    /// If the lengths disagree: a bug in this crate.
    pub fn new(weight: &[f32], inputs: usize, outputs: usize, bias: Option<&[f32]>) -> Self {
        assert_eq!(weight.len(), inputs * outputs, "weights");
        let panels = outputs.div_ceil(PANEL);
        let mut weights = Aligned::new(0.0, panels * inputs * PANEL);
        for (i, row) in weight.chunks_exact(outputs.max(1)).enumerate() {
            for (o, w) in row.iter().enumerate() {
                weights[((o / PANEL) * inputs + i) * PANEL + o % PANEL] = *w;
            }
        }
        let mut padded = Aligned::new(0.0, panels * PANEL);
        if let Some(bias) = bias {
            padded[..outputs].copy_from_slice(bias);
        }
        Packed { inputs, outputs, weights, bias: padded }
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Packed({} → {})", self.inputs, self.outputs)
    }
}

/// What happens next to the values of a row, all `width` of them.
#[derive(Debug, Clone, Copy)]
pub enum Step<'a> {
    /// `x W + b`.
    Dense(&'a Packed),
    /// The same with weights of each item's own.
    Each(&'a [Packed]),
    /// GELU in its tanh form.
    Gelu,
    /// max(0, x).
    Relu,
    /// Layer normalisation: scale, shift.
    Norm(&'a [f32], &'a [f32]),
    /// Values of another input before those there are.
    Join(Rows<'a>),
    /// Plus values of another input.
    Plus(Rows<'a>),
    /// Times one value of another input for each row.
    Scale(Rows<'a>),
    /// Remembered for [`Step::AddKept`].
    Keep,
    /// Plus what was kept last.
    AddKept,
}

impl<'a> Step<'a> {
    /// Of a dense layer, for rows of this item.
    fn weights(&self, item: usize) -> Option<&'a Packed> {
        match self {
            Step::Dense(packed) => Some(packed),
            Step::Each(packed) => Some(&packed[item]),
            _ => None,
        }
    }
}

/// Rows of values, `[row, width]`.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Row-major.
    pub values: &'a [f32],
    /// Values of a row.
    pub width: usize,
}

/// The widths a run goes through.
struct Widths {
    /// Values joined at the front of one tile, at most.
    joined: usize,
    widest: usize,
    kept: usize,
    last: usize,
}

/// Follows the widths through the steps, and checks every length the kernel relies on.
fn follow(input: Rows, items: usize, rows: usize, steps: &[Step]) -> Result<Widths> {
    let fits = |what, a: usize, b: usize| match a == b {
        true => Ok(()),
        false => candle_core::bail!("{what}: {a} values meet {b}"),
    };
    let whole = |x: &Rows| fits("rows side by side", x.values.len(), rows * x.width);
    whole(&input)?;
    fits("rows of each item", rows, rows / items.max(1) * items)?;
    let mut w = Widths { joined: 0, widest: input.width, kept: 0, last: input.width };
    let (mut kept, mut joined) = (0, 0);
    for step in steps {
        match step {
            Step::Dense(p) => {
                fits("a dense layer", w.last, p.inputs)?;
                (w.last, joined) = (p.outputs, 0);
            }
            Step::Each(each) => {
                fits("a matrix for each item", each.len(), items)?;
                let outputs = each.first().map_or(0, |p| p.outputs);
                for p in *each {
                    fits("a matrix of an item", w.last, p.inputs)?;
                    fits("matrices of two items", p.outputs, outputs)?;
                }
                (w.last, joined) = (outputs, 0);
            }
            Step::Norm(scale, shift) => {
                fits("the scale of a norm", w.last, scale.len())?;
                fits("the shift of a norm", w.last, shift.len())?;
            }
            Step::Join(x) => {
                whole(x)?;
                w.last += x.width;
                joined += x.width;
                w.joined = w.joined.max(joined);
            }
            Step::Plus(x) => {
                whole(x)?;
                fits("a sum", w.last, x.width)?;
            }
            Step::Scale(x) => {
                whole(x)?;
                fits("a factor", x.width, 1)?;
            }
            Step::Keep => {
                kept = w.last;
                w.kept = w.kept.max(kept);
            }
            Step::AddKept => fits("a sum with what was kept", w.last, kept)?,
            Step::Gelu | Step::Relu => {}
        }
        w.widest = w.widest.max(w.last);
    }
    Ok(w)
}

/// Takes `rows` rows of `input`, as many of each item as of the next, through the steps; returns
/// them with their width.
///
/// Which thread takes which rows changes nothing, nor does the company a row is in.
///
/// # Errors
/// Widths or lengths that disagree.
pub fn run(input: Rows, items: usize, rows: usize, steps: &[Step]) -> Result<(Vec<f32>, usize)> {
    let widths = follow(input, items, rows, steps)?;
    let len = rows * widths.last;
    let mut out = Vec::with_capacity(len);
    if len == 0 {
        return Ok((out, widths.last));
    }
    let rows = rows / items;
    let lanes = lanes::dispatch!(lanes_of_a_tile() -> usize);
    let group = lanes * TILES;
    let size = lanes * room(&widths);
    out.spare_capacity_mut()[..len]
        .par_chunks_mut(rows * widths.last)
        .enumerate()
        .flat_map(|(item, out)| {
            let groups = out.par_chunks_mut(group * widths.last).enumerate();
            groups.map(move |(i, out)| (item, item * rows + i * group, out))
        })
        .for_each_init(
            || Aligned::new(0.0, size),
            |scratch, (item, row, out)| {
                let job = Job { input, steps, widths: &widths, item, row };
                through(&job, scratch, out);
            },
        );
    // SAFETY: every group wrote all its rows, and the groups are all of `len`.
    unsafe { out.set_len(len) };
    Ok((out, widths.last))
}

unsafe fn lanes_of_a_tile<L: Lanes, const R: usize, const C: usize, const U: usize>() -> usize {
    C * L::N
}

/// Features of a buffer, with what is joined in front and whole panels.
fn span(w: &Widths) -> usize {
    (w.joined + w.widest).next_multiple_of(PANEL) + PANEL
}

/// Features of all buffers together: two by turns, and what is kept.
fn room(w: &Widths) -> usize {
    2 * span(w) + w.kept
}

/// Some rows of one item.
struct Job<'a> {
    input: Rows<'a>,
    steps: &'a [Step<'a>],
    widths: &'a Widths,
    item: usize,
    /// Of the first, among the rows of all items.
    row: usize,
}

/// Takes as many rows through the steps as `out` has.
fn through(job: &Job, scratch: &mut [f32], out: &mut [MaybeUninit<f32>]) {
    lanes::dispatch!(tiles(job: &Job, scratch: &mut [f32], out: &mut [MaybeUninit<f32>]))
}

/// # Safety
/// The instruction set is there; lengths were checked by [`follow`], and `scratch` is as long as [`room`] says.
#[inline(always)]
unsafe fn tiles<L: Lanes, const R: usize, const C: usize, const U: usize>(
    job: &Job,
    scratch: &mut [f32],
    out: &mut [MaybeUninit<f32>],
) {
    let lanes = C * L::N;
    let (last, joined) = (job.widths.last, job.widths.joined);
    let rows = out.len() / last;
    // SAFETY: the caller's contract; every pointer below stays in its slice.
    unsafe {
        let first = scratch.as_mut_ptr().add(joined * lanes);
        let second = first.add(span(job.widths) * lanes);
        let kept = scratch.as_mut_ptr().add(2 * span(job.widths) * lanes);
        for start in (0..rows).step_by(lanes) {
            let (row, count) = (job.row + start, lanes.min(rows - start));
            let (mut here, mut spare) = (first, second);
            // Where the values start: in front of `here` once something was joined.
            let (mut x, mut width) = (here, job.input.width);
            turn_in::<L>(job.input, row, count, lanes, x);
            for step in job.steps {
                if let Some(packed) = step.weights(job.item) {
                    dense::<L, R, C>(packed, x, spare);
                    (here, spare) = (spare, here);
                    (x, width) = (here, packed.outputs);
                }
                match step {
                    Step::Dense(_) | Step::Each(_) => {}
                    Step::Gelu => gelu::<L, U>(x, width.next_multiple_of(PANEL) * C),
                    Step::Relu => {
                        for i in 0..width * C {
                            let at = x.add(i * L::N);
                            L::store(at, L::max(L::splat(0.0), L::load(at)));
                        }
                    }
                    Step::Norm(scale, shift) => norm::<L, C>(x, scale, shift),
                    Step::Join(other) => {
                        x = x.sub(other.width * lanes);
                        width += other.width;
                        turn_in::<L>(*other, row, count, lanes, x);
                    }
                    Step::Plus(other) => {
                        turn_in::<L>(*other, row, count, lanes, spare);
                        add::<L>(x, spare, width * C);
                    }
                    Step::Scale(other) => {
                        turn_in::<L>(*other, row, count, lanes, spare);
                        for i in 0..width * C {
                            let (at, by) = (x.add(i * L::N), L::load(spare.add(i % C * L::N)));
                            L::store(at, L::mul(L::load(at), by));
                        }
                    }
                    Step::Keep => kept.copy_from_nonoverlapping(x, width * lanes),
                    Step::AddKept => add::<L>(x, kept, width * C),
                }
            }
            let to = out.as_mut_ptr().cast::<f32>().add(start * last);
            turn::<L>(x, [last, count], lanes, to, last);
        }
    }
}

/// Rows `row … row + count` turned into features of a tile. Lanes without a row keep what they
/// had: lanes do not meet.
///
/// # Safety
/// `to` is valid for `lanes` values of every feature, `x` for the rows.
#[inline(always)]
unsafe fn turn_in<L: Lanes>(x: Rows, row: usize, count: usize, lanes: usize, to: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe { turn::<L>(x.values.as_ptr().add(row * x.width), [count, x.width], x.width, to, lanes) }
}

/// Rows become columns: `shape` is rows and columns before; steps are from row to row.
///
/// # Safety
/// `from` is valid for the rows, `to` for the columns.
#[inline(always)]
unsafe fn turn<L: Lanes>(
    from: *const f32,
    shape: [usize; 2],
    from_step: usize,
    to: *mut f32,
    to_step: usize,
) {
    let [rows, columns] = shape;
    let whole = columns - columns % L::N;
    // SAFETY: the caller's contract.
    unsafe {
        for i in (0..rows).step_by(L::N) {
            let mut alone = 0;
            if i + L::N <= rows {
                for j in (0..whole).step_by(L::N) {
                    let (from, to) = (from.add(i * from_step + j), to.add(j * to_step + i));
                    L::turn(from, from_step, to, to_step);
                }
                alone = whole;
            }
            for i in i..rows.min(i + L::N) {
                for j in alone..columns {
                    *to.add(j * to_step + i) = *from.add(i * from_step + j);
                }
            }
        }
    }
}

/// `y = x W + b` for a tile, panel by panel.
///
/// # Safety
/// `x` holds the layer's inputs, and `y` has room for its panels.
#[inline(always)]
unsafe fn dense<L: Lanes, const R: usize, const C: usize>(p: &Packed, x: *const f32, y: *mut f32) {
    let lanes = C * L::N;
    // SAFETY: the caller's contract.
    unsafe {
        for panel in 0..p.outputs.div_ceil(PANEL) {
            let weights = p.weights.as_ptr().add(panel * p.inputs * PANEL);
            for half in (0..PANEL).step_by(R) {
                let first = panel * PANEL + half;
                let mut acc = [[L::splat(0.0); C]; R];
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = [L::splat(*p.bias.as_ptr().add(first + r)); C];
                }
                lanes::tile::<L, R, C>(p.inputs, weights.add(half), PANEL, x, lanes, &mut acc);
                for (r, acc) in acc.iter().enumerate() {
                    for (c, acc) in acc.iter().enumerate() {
                        L::store(y.add((first + r) * lanes + c * L::N), *acc);
                    }
                }
            }
        }
    }
}

/// `x += y`, `count` vectors.
///
/// # Safety
/// Both are valid for them.
#[inline(always)]
unsafe fn add<L: Lanes>(x: *mut f32, y: *const f32, count: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        for i in 0..count {
            let at = x.add(i * L::N);
            L::store(at, L::add(L::load(at), L::load(y.add(i * L::N))));
        }
    }
}

/// GELU in place: `½ x (1 + tanh u) = x / (1 + e⁻²ᵘ)` with `u = √(2/π) (x + 0.044715 x³)`.
///
/// # Safety
/// `x` is valid for `count` vectors, a multiple of `U`.
#[inline(always)]
unsafe fn gelu<L: Lanes, const U: usize>(x: *mut f32, count: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let (first, third, one) = (L::splat(FIRST), L::splat(THIRD), L::splat(1.0));
        // Beyond, the reciprocal would not be a number.
        let most = L::splat(MOST);
        for i in (0..count).step_by(U) {
            let at = x.add(i * L::N);
            let mut x = [one; U];
            let mut t = [one; U];
            for u in 0..U {
                x[u] = L::load(at.add(u * L::N));
                t[u] = L::mul(x[u], x[u]);
            }
            for t in &mut t {
                *t = L::fma(*t, third, first);
            }
            for u in 0..U {
                t[u] = L::min(most, L::mul(t[u], x[u]));
            }
            t = L::exp2_each::<U>(t);
            for t in &mut t {
                *t = L::recip(L::add(*t, one));
            }
            for u in 0..U {
                L::store(at.add(u * L::N), L::mul(t[u], x[u]));
            }
        }
    }
}

/// Layer normalisation in place.
///
/// # Safety
/// `x` is valid for a tile as wide as `scale`, which is as long as `shift`.
#[inline(always)]
unsafe fn norm<L: Lanes, const C: usize>(x: *mut f32, scale: &[f32], shift: &[f32]) {
    /// Partial sums: one alone would wait for itself.
    const S: usize = 4;
    let (lanes, width) = (C * L::N, scale.len());
    // SAFETY: the caller's contract.
    unsafe {
        let zero = L::splat(0.0);
        let inverse = L::splat(1.0 / width as f32);
        let mut mean = [zero; C];
        for round in 0..2 {
            let mut sums = [[zero; C]; S];
            let whole = width - width % S;
            for i in (0..whole).step_by(S) {
                for (s, sums) in sums.iter_mut().enumerate() {
                    for c in 0..C {
                        let x = L::sub(L::load(x.add((i + s) * lanes + c * L::N)), mean[c]);
                        sums[c] = match round {
                            0 => L::add(sums[c], x),
                            _ => L::fma(x, x, sums[c]),
                        };
                    }
                }
            }
            for i in whole..width {
                for c in 0..C {
                    let x = L::sub(L::load(x.add(i * lanes + c * L::N)), mean[c]);
                    sums[0][c] = match round {
                        0 => L::add(sums[0][c], x),
                        _ => L::fma(x, x, sums[0][c]),
                    };
                }
            }
            let [a, b, c, d] = sums;
            let mut moment = a;
            for k in 0..C {
                let sum = L::add(L::add(a[k], b[k]), L::add(c[k], d[k]));
                moment[k] = L::mul(sum, inverse);
            }
            if round == 0 {
                mean = moment;
                continue;
            }
            let mut rate = moment;
            for rate in &mut rate {
                *rate = L::recip(L::sqrt(L::add(*rate, L::splat(EPSILON as f32))));
            }
            for i in 0..width {
                let (scale, shift) =
                    (L::splat(*scale.get_unchecked(i)), L::splat(*shift.get_unchecked(i)));
                for c in 0..C {
                    let at = x.add(i * lanes + c * L::N);
                    let normal = L::mul(L::sub(L::load(at), mean[c]), rate[c]);
                    L::store(at, L::fma(normal, scale, shift));
                }
            }
        }
    }
}
