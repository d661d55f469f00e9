//! Online-softmax attention over packed keys: the inner loops.
//!
//! Lanes run along queries. A batch of keys meets a tile of queries in three steps that stay in
//! the first-level cache: scores by a register-tiled product, weights in place of the scores, and
//! weights times values. Scores are held in powers of two, so that e never appears.

// Loops count by index: adaptors and closures may be left out of line, without the instruction set.
#![allow(clippy::needless_range_loop)]

use std::f32::consts::LOG2_E;

use super::{
    bf16::{self, Way},
    lanes::{self, Aligned, Lanes, NoPairs, Pairs},
};

/// Keys in a block: what is skipped or read as one.
pub const BLOCK: usize = 32;
/// Blocks that meet a tile of queries at once.
const BATCH: usize = 3;
/// Keys side by side in a panel.
const PANEL: usize = 8;
/// Queries that share one pass over the keys.
pub const GROUP: usize = 192;
/// Coefficients of a table's polynomials, and its segments.
pub const TABLE: [usize; 2] = [6, 32];
/// Stands for a running maximum of −∞, so that differences stay numbers.
const LOWEST: f32 = -1e30;
/// Less than any key within reach adds to the weight of all.
const NOTHING: f32 = 1e-15;
/// 1.5 · 2²³: adding and subtracting it rounds to an integer.
const WHOLE: f32 = 12_582_912.0;
/// A score may exceed the running maximum by this many powers of two before it is raised.
const HEADROOM: f32 = 60.0;

/// Sizes that keys and queries share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Heads.
    pub heads: usize,
    /// Width of a key.
    pub d: usize,
    /// Width of a value.
    pub w: usize,
    /// Coordinates of a site.
    pub dim: usize,
}

impl Shape {
    /// Width of a value, padded to whole panels.
    fn padded(&self) -> usize {
        self.w.next_multiple_of(PANEL)
    }
    /// Numbers of a block's keys and values in one head, keys first.
    fn head(&self) -> usize {
        BLOCK * (self.d + self.padded())
    }
    /// Width of a key in whole pairs.
    fn pairs(&self) -> usize {
        self.d.div_ceil(2)
    }
}

/// Keys, values and sites of one context, in the order the kernel reads them.
#[derive(Debug, Clone)]
pub struct Packed {
    shape: Shape,
    len: usize,
    /// `[block]`: coordinates, then each head's keys and values, unless those are `half`.
    data: Vec<f32>,
    /// `[block, head]`: keys and values of bf16; for [`Way::Dot`] in pairs, of one key's neighbouring
    /// numbers and of two neighbouring keys' values.
    half: Vec<u16>,
    way: Option<Way>,
    /// `[block, head]`: the longest key.
    norms: Vec<f32>,
}

impl Packed {
    /// Space for `len` keys.
    pub fn new(shape: Shape, len: usize) -> Self {
        Self::held(shape, len, None)
    }

    /// The same for keys and values of bf16, to be read in one way.
    ///
    /// # Panics
    /// If this machine cannot read them so: a bug in this crate.
    pub fn halved(shape: Shape, len: usize, way: Way) -> Self {
        assert!(way == Way::Storage || bf16::has_dot(), "products of pairs");
        Self::held(shape, len, Some(way))
    }

    fn held(shape: Shape, len: usize, way: Option<Way>) -> Self {
        let blocks = len.div_ceil(BLOCK);
        let mut keys = Packed {
            shape,
            len,
            data: vec![],
            half: vec![],
            way,
            norms: vec![0.0; blocks * shape.heads],
        };
        keys.data = vec![0.0; blocks * keys.block()];
        keys.half =
            vec![0; if way.is_some() { blocks * shape.heads * keys.half_head() } else { 0 }];
        keys
    }

    /// Values of f32 in a block.
    fn block(&self) -> usize {
        let heads = if self.way.is_some() { 0 } else { self.shape.heads };
        BLOCK * self.shape.dim + heads * self.shape.head()
    }
    /// Values of bf16 in a block's head.
    fn half_head(&self) -> usize {
        match self.way {
            Some(Way::Dot) => BLOCK * (2 * self.shape.pairs() + self.shape.padded()),
            _ => self.shape.head(),
        }
    }

    /// Sizes.
    pub fn shape(&self) -> Shape {
        self.shape
    }
    /// Keys.
    pub fn len(&self) -> usize {
        self.len
    }
    /// No keys at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Blocks of keys.
    pub fn blocks(&self) -> usize {
        self.len.div_ceil(BLOCK)
    }
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * (self.data.len() + self.norms.len()) + 2 * self.half.len()
    }
    /// Keys in block `b`.
    pub fn keys_in(&self, b: usize) -> usize {
        BLOCK.min(self.len - b * BLOCK)
    }
    /// The longest key of a block.
    pub fn norm(&self, block: usize, head: usize) -> f32 {
        self.norms[block * self.shape.heads + head]
    }

    /// Coordinate `dim` of the keys in a block.
    pub fn coordinates(&self, block: usize, dim: usize) -> &[f32] {
        let at = block * self.block() + dim * BLOCK;
        &self.data[at..at + self.keys_in(block)]
    }

    /// Writes key number `at`: its site `[dim]`, and for each head its key `[d]` and value `[w]`.
    ///
    /// # Panics
    /// If a slice is too short: a bug in this crate.
    pub fn set<'k>(
        &mut self,
        at: usize,
        site: &[f32],
        of: impl Fn(usize) -> (&'k [f32], &'k [f32]),
    ) {
        let Shape { heads, d, w, dim } = self.shape;
        let (block, j, wp) = (at / BLOCK, at % BLOCK, self.shape.padded());
        let start = block * self.block();
        for (i, x) in site[..dim].iter().enumerate() {
            self.data[start + i * BLOCK + j] = *x;
        }
        for head in 0..heads {
            let (key, value) = of(head);
            let (key, value) = (&key[..d], &value[..w]);
            // Key number `i` of a panel, and the first of the key's values.
            let panel = (j / PANEL) * PANEL * d + j % PANEL;
            let values = BLOCK * d + j * wp;
            let longest = &mut self.norms[block * heads + head];
            let norm = match self.way {
                None => {
                    let to = &mut self.data[start + BLOCK * dim + head * self.shape.head()..];
                    for (i, x) in key.iter().enumerate() {
                        to[panel + i * PANEL] = *x;
                    }
                    to[values..values + w].copy_from_slice(value);
                    key.iter().map(|x| x * x).sum::<f32>().sqrt()
                }
                Some(way) => {
                    let size = match way {
                        Way::Dot => BLOCK * (2 * self.shape.pairs() + wp),
                        Way::Storage => self.shape.head(),
                    };
                    let to = &mut self.half[(block * heads + head) * size..][..size];
                    let pairs = self.shape.pairs();
                    for (i, x) in key.iter().enumerate() {
                        let at = match way {
                            Way::Storage => panel + i * PANEL,
                            Way::Dot => {
                                2 * (((j / PANEL) * pairs + i / 2) * PANEL + j % PANEL) + i % 2
                            }
                        };
                        to[at] = bf16::round(*x);
                    }
                    for (i, x) in value.iter().enumerate() {
                        let at = match way {
                            Way::Storage => values + i,
                            Way::Dot => 2 * (BLOCK * pairs + (j / 2) * wp + i) + j % 2,
                        };
                        to[at] = bf16::round(*x);
                    }
                    let rounded = key.iter().map(|x| bf16::widen(bf16::round(*x)));
                    rounded.map(|x| x * x).sum::<f32>().sqrt()
                }
            };
            *longest = longest.max(norm);
        }
    }
}

/// Adds the bias of a head: `(head, squared distances, scores)`.
pub type AddBias<'a> = dyn Fn(usize, &[f32], &mut [f32]) + Sync + 'a;
/// Fills a list of blocks near a box.
pub type Near<'a> = dyn Fn(&[[f32; 2]], &mut Vec<(f32, u32)>) + Sync + 'a;

/// How a score depends on distance.
#[derive(Clone, Copy)]
pub enum Bias<'a> {
    /// Not at all.
    None,
    /// Through a table of 32 segments: the octaves of `t = 1 + scale · distance`, four segments
    /// each, or of `t = 1 + scale · distance²`, two each.
    Table {
        /// t for distance 1, less 1.
        scale: f32,
        /// Whether distances are squared.
        squared: bool,
        /// `[head, coefficient, segment]`, powers of two; the constant coefficient first, and
        /// segments counted from that of t = 1 on, modulo 32, as [`Lanes::segment`] counts.
        table: &'a [f32],
    },
    /// `a 2^(−b · squared distance)`: `[head, (a, b)]`, powers of two. One term without a table.
    Bump(&'a [[f32; 2]]),
    /// Added by the caller, powers of two.
    Terms {
        /// Adds it.
        add: &'a AddBias<'a>,
        /// Whether it may be −∞.
        compact: bool,
    },
}

/// A context, and queries to read it.
pub struct Job<'a> {
    /// The context.
    pub keys: &'a Packed,
    /// How scores depend on distance.
    pub bias: Bias<'a>,
    /// The largest bias of each head, powers of two.
    pub highest: &'a [f32],
    /// Squared chords to squared distances, in place, where the metric is not Euclidean.
    pub bend: Option<fn(&mut [f32])>,
    /// Score of each head's sink.
    pub sink: Option<&'a [f32]>,
    /// Which blocks need not be read.
    pub skip: Option<Skip<'a>>,
    /// Where the bias need not be looked at.
    pub fade: Option<Fade<'a>>,
}

/// Where a bias has faded to nothing.
#[derive(Clone, Copy)]
pub struct Fade<'a> {
    /// Squared distance between a box and a block's own.
    pub gap2: &'a (dyn Fn(&[[f32; 2]], usize) -> f32 + Sync),
    /// Squared distance from which on a head's bias is 0 to every digit.
    pub beyond2: &'a [f32],
}

/// What may be left out.
#[derive(Clone, Copy)]
pub struct Skip<'a> {
    /// Blocks worth a look for queries in a box (`[dim]` of least and most), nearest first, each
    /// with the squared distance between the box and its own.
    pub near: &'a Near<'a>,
    /// Squared distance from which on a head reads nothing.
    pub reach2: &'a [f32],
    /// Leaves out blocks whose keys each add less than a share of what was read already.
    pub faint: Option<Faint<'a>>,
}

/// When a key is too faint to be read.
#[derive(Clone, Copy)]
pub struct Faint<'a> {
    /// The largest bias of a head at or beyond a squared distance, powers of two.
    pub envelope: &'a (dyn Fn(usize, f32) -> f32 + Sync),
    /// The longest key of each head.
    pub longest: &'a [f32],
    /// Share of the weight below which a key is left out.
    pub share: f32,
}

/// Reads the context for the queries numbered `rows` (best no more than [`GROUP`]). Returns how many
/// pairs of query and key were weighed, over all heads.
///
/// # Shapes
/// `q` `[target, head, d]`, `sites` `[target, dim]`; `out` `[row, head · (w + 2)]`: each head's
/// value, then each head's top t, then each head's inverse weight r, so that the share of a key
/// of score s (powers of two) is `r 2^(s − t)`. Apart, they keep their digits when scores are
/// large. r is 0 where there was no key.
/// # Panics
/// If a slice is too short: a bug in this crate.
pub fn attend(job: &Job, q: &[f32], sites: &[f32], rows: &[u32], out: &mut [f32]) -> u64 {
    let Shape { heads, d, w, dim } = job.keys.shape;
    let targets = q.len() / (heads * d);
    assert!(sites.len() >= targets * dim, "queries and sites");
    assert!(rows.iter().all(|r| (*r as usize) < targets), "rows that exist");
    assert!(out.len() >= rows.len() * heads * (w + 2), "room for the answer");
    assert!(job.highest.len() >= heads, "a largest bias for every head");
    if let Bias::Table { table, .. } = job.bias {
        assert!(table.len() >= heads * TABLE[0] * TABLE[1], "a table for every head");
    }
    if let Bias::Bump(bumps) = job.bias {
        assert!(bumps.len() >= heads, "a bump for every head");
    }
    assert!(job.sink.is_none_or(|s| s.len() >= heads), "a sink for every head");
    if let Some(skip) = &job.skip {
        assert!(skip.reach2.len() >= heads, "a reach for every head");
        assert!(skip.faint.is_none_or(|f| f.longest.len() >= heads), "a norm for every head");
    }
    assert!(job.fade.is_none_or(|f| f.beyond2.len() >= heads), "a distance for every head");
    assert!(heads > 0 && dim > 0 && d > 0, "sizes");
    if rows.is_empty() {
        return 0;
    }
    #[cfg(target_arch = "x86_64")]
    if job.keys.way == Some(Way::Dot) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
        unsafe fn dot(job: &Job, q: &[f32], sites: &[f32], rows: &[u32], out: &mut [f32]) -> u64 {
            // SAFETY: as below.
            unsafe { read::<lanes::Avx512, lanes::Bf16, 8, 2, 4>(job, q, sites, rows, out) }
        }
        // SAFETY: as below; `Packed::halved` asked whether the machine has the instruction.
        return unsafe { dot(job, q, sites, rows, out) };
    }
    // SAFETY: the slices were checked above, and `Packed` was sized by its shape.
    lanes::dispatch!(group(job: &Job, q: &[f32], sites: &[f32], rows: &[u32], out: &mut [f32]) -> u64)
}

/// Queries of a group, transposed, with what they have gathered so far.
struct State {
    /// `[tile, head, d, lane]`, scaled to powers of two.
    q: Aligned<f32>,
    /// `[tile, head, pair, lane, 2]`: the same in bf16, where there are products of pairs.
    pairs: Aligned<u16>,
    /// `[tile, dim, lane]`
    sites: Aligned<f32>,
    /// `[tile, head, padded w, lane]`
    sum: Aligned<f32>,
    /// `[tile, head, lane]` each: total weight, running maximum, length of the query.
    weight: Aligned<f32>,
    top: Aligned<f32>,
    norm: Aligned<f32>,
}

/// What one batch of keys needs, reused.
struct Scratch {
    /// `[key, lane]`: scores, then weights.
    scores: Aligned<f32>,
    /// `[key, lane]`: squared distances, or positions within a segment.
    distance: Aligned<f32>,
    /// `[key, lane]`: segments.
    segment: Aligned<i32>,
    /// Which blocks of the batch each head reads, one bit a block.
    reads: Vec<u8>,
    /// Those of them in which the head's bias is not 0.
    bends: Vec<u8>,
    /// `[head, block of the batch]`: keys and values of bf16, widened. One head where skipping.
    wide: Aligned<f32>,
}

/// # Safety
/// As [`attend`] checked, on a machine with the instruction set.
#[inline(always)]
unsafe fn group<L: Lanes, const R: usize, const C: usize, const U: usize>(
    job: &Job,
    q: &[f32],
    sites: &[f32],
    rows: &[u32],
    out: &mut [f32],
) -> u64 {
    // SAFETY: the caller's contract.
    unsafe { read::<L, NoPairs, R, C, U>(job, q, sites, rows, out) }
}

/// # Safety
/// As [`group`]; `D` has products of pairs if, and only if, the keys are made of pairs.
#[inline(always)]
unsafe fn read<L: Lanes, D: Pairs<L>, const R: usize, const C: usize, const U: usize>(
    job: &Job,
    q: &[f32],
    sites: &[f32],
    rows: &[u32],
    out: &mut [f32],
) -> u64 {
    let shape = job.keys.shape;
    let Shape { heads, d, w, dim } = shape;
    let lanes = C * L::N;
    let tiles = rows.len().div_ceil(lanes);
    let wp = shape.padded();
    let mut state = State {
        q: Aligned::new(0.0, if D::HAS { 0 } else { tiles * heads * d * lanes }),
        pairs: Aligned::new(0, if D::HAS { tiles * heads * shape.pairs() * lanes * 2 } else { 0 }),
        sites: Aligned::new(0.0, tiles * dim * lanes),
        sum: Aligned::new(0.0, tiles * heads * wp * lanes),
        weight: Aligned::new(0.0, tiles * heads * lanes),
        top: Aligned::new(LOWEST, tiles * heads * lanes),
        norm: Aligned::new(0.0, tiles * heads * lanes),
    };
    let scale = LOG2_E / (d as f32).sqrt();
    for row in 0..tiles * lanes {
        let (tile, lane) = (row / lanes, row % lanes);
        // Lanes without a query repeat the last one's place, so that they stretch nothing.
        let from = rows[row.min(rows.len() - 1)] as usize;
        for (i, x) in sites[from * dim..(from + 1) * dim].iter().enumerate() {
            state.sites[(tile * dim + i) * lanes + lane] = *x;
        }
        if row >= rows.len() {
            continue;
        }
        for head in 0..heads {
            let query = &q[(from * heads + head) * d..][..d];
            let mut norm = 0.0;
            for (i, x) in query.iter().enumerate() {
                let mut x = x * scale;
                if D::HAS {
                    let half = bf16::round(x);
                    let at = ((tile * heads + head) * shape.pairs() + i / 2) * lanes + lane;
                    state.pairs[2 * at + i % 2] = half;
                    x = bf16::widen(half);
                } else {
                    state.q[((tile * heads + head) * d + i) * lanes + lane] = x;
                }
                norm += x * x;
            }
            state.norm[(tile * heads + head) * lanes + lane] = norm.sqrt();
        }
    }
    if let Some(sink) = job.sink {
        for tile in 0..tiles {
            for head in 0..heads {
                let at = (tile * heads + head) * lanes;
                let score = sink[head] * LOG2_E;
                let top = if D::HAS { score.round() } else { score };
                state.top[at..at + lanes].fill(top);
                state.weight[at..at + lanes].fill((score - top).exp2());
            }
        }
    }
    let batch = BATCH * BLOCK * lanes;
    let has = |x: bool| if x { batch } else { 0 };
    let mut scratch = Scratch {
        scores: Aligned::new(0.0, batch),
        distance: Aligned::new(0.0, has(!matches!(job.bias, Bias::None))),
        segment: Aligned::new(0, has(matches!(job.bias, Bias::Table { .. }))),
        reads: vec![0; heads],
        bends: vec![0; heads],
        wide: Aligned::new(
            0.0,
            match (job.keys.way, &job.skip) {
                (Some(Way::Storage), None) => BATCH * heads * shape.head(),
                (Some(Way::Storage), Some(_)) => BATCH * shape.head(),
                _ => 0,
            },
        ),
    };
    let mut pairs = 0;
    match &job.skip {
        // Batch by batch for all tiles: the keys stay in the second-level cache.
        None => {
            let mut list = [(0.0, 0u32); BATCH];
            let extents: Vec<[f32; 2]> = match job.fade {
                Some(_) => {
                    (0..tiles * dim).map(|i| extent(&state.sites[i * lanes..][..lanes])).collect()
                }
                None => Vec::new(),
            };
            let blocks = job.keys.blocks() as u32;
            for first in (0..blocks).step_by(BATCH) {
                let count = BATCH.min((blocks - first) as usize);
                for (i, b) in list.iter_mut().enumerate() {
                    b.1 = first + i as u32;
                }
                if job.keys.way == Some(Way::Storage) {
                    // Once for all tiles.
                    for head in 0..heads {
                        // SAFETY: the blocks exist.
                        unsafe {
                            widen::<L>(job.keys, &mut scratch, head, head, &list[..count], !0)
                        };
                    }
                }
                for tile in 0..tiles {
                    if let Some(fade) = &job.fade {
                        for (d2, b) in &mut list[..count] {
                            *d2 = (fade.gap2)(&extents[tile * dim..][..dim], *b as usize);
                        }
                    }
                    let list = &list[..count];
                    // SAFETY: the caller's contract; `list` names blocks that exist.
                    pairs +=
                        unsafe { step::<L, D, R, C, U>(job, &mut state, &mut scratch, tile, list) };
                }
            }
        }
        Some(skip) => {
            let (mut list, mut extents) = (Vec::new(), vec![[0.0; 2]; dim]);
            for tile in 0..tiles {
                for (i, e) in extents.iter_mut().enumerate() {
                    *e = extent(&state.sites[(tile * dim + i) * lanes..][..lanes]);
                }
                list.clear();
                (skip.near)(&extents, &mut list);
                let blocks = job.keys.blocks();
                assert!(list.iter().all(|(_, b)| (*b as usize) < blocks), "blocks that exist");
                for batch in list.chunks(BATCH) {
                    // SAFETY: as above.
                    unsafe {
                        let all = state.norm.len() / tiles;
                        if skip.faint.is_some_and(|f| {
                            (0..heads).all(|h| {
                                batch[0].0 >= skip.reach2[h]
                                    || faint::<L, C>(
                                        &f,
                                        &state,
                                        tile * all,
                                        h,
                                        batch[0].0,
                                        f.longest[h],
                                    )
                            })
                        }) {
                            break; // what follows is farther still
                        }
                        pairs += step::<L, D, R, C, U>(job, &mut state, &mut scratch, tile, batch);
                    }
                }
            }
        }
    }
    let wide = heads * (w + 2);
    for row in 0..rows.len() {
        let (tile, lane) = (row / lanes, row % lanes);
        let out = &mut out[row * wide..(row + 1) * wide];
        for head in 0..heads {
            let at = (tile * heads + head) * lanes + lane;
            let weight = state.weight[at];
            // The nearest key weighs 1; far ones, and those out of reach, 2⁻¹⁰⁰.
            let inverse = if weight < NOTHING { 0.0 } else { 1.0 / weight };
            for (i, o) in out[head * w..(head + 1) * w].iter_mut().enumerate() {
                *o = state.sum[((tile * heads + head) * wp + i) * lanes + lane] * inverse;
            }
            out[heads * w + head] = state.top[at];
            out[heads * (w + 1) + head] = inverse;
        }
    }
    pairs
}

/// Least and most.
fn extent(xs: &[f32]) -> [f32; 2] {
    let least = xs.iter().fold(f32::INFINITY, |m, x| m.min(*x));
    let most = xs.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    [least, most]
}

/// Whether keys no longer than `longest`, at squared distance `d2` or beyond, are too faint to be
/// read by any query of a tile whose lanes start at `at`.
///
/// # Safety
/// The state holds that tile.
#[inline(always)]
unsafe fn faint<L: Lanes, const C: usize>(
    f: &Faint,
    state: &State,
    at: usize,
    head: usize,
    d2: f32,
    longest: f32,
) -> bool {
    let bias = (f.envelope)(head, d2) - f.share.log2();
    // SAFETY: the caller's contract.
    unsafe {
        for c in 0..C {
            let at = at + (head * C + c) * L::N;
            let bound =
                L::fma(L::load(state.norm.as_ptr().add(at)), L::splat(longest), L::splat(bias));
            let bound = L::sub(bound, L::load(state.top.as_ptr().add(at)));
            // More than any weight, and not more than a float can hold. (NaN stays.)
            let bound = L::exp2(L::min(L::splat(126.0), bound));
            // Asked this way round, so that NaN is read.
            if !L::none_above(bound, L::load(state.weight.as_ptr().add(at))) {
                return false;
            }
        }
    }
    true
}

/// Keys and values of a head in some blocks, from bf16 to place `slot` of the scratch.
///
/// # Safety
/// The blocks and the place exist.
#[inline(always)]
unsafe fn widen<L: Lanes>(
    keys: &Packed,
    scratch: &mut Scratch,
    slot: usize,
    head: usize,
    blocks: &[(f32, u32)],
    reads: u8,
) {
    let size = keys.shape.head();
    for i in 0..blocks.len() {
        if reads >> i & 1 == 0 {
            continue;
        }
        // SAFETY: the caller's contract.
        unsafe {
            let from = (blocks[i].1 as usize * keys.shape.heads + head) * size;
            let from = keys.half.as_ptr().add(from);
            let to = scratch.wide.as_mut_ptr().add((slot * BATCH + i) * size);
            // A block holds 32 keys: whole vectors.
            for k in (0..size).step_by(L::N) {
                L::widen(from.add(k), to.add(k));
            }
        }
    }
}

/// One batch of blocks against one tile of queries, all heads.
///
/// # Safety
/// `blocks` name at most [`BATCH`] blocks of the context; `tile` is a tile of the state.
#[inline(always)]
unsafe fn step<L: Lanes, D: Pairs<L>, const R: usize, const C: usize, const U: usize>(
    job: &Job,
    state: &mut State,
    scratch: &mut Scratch,
    tile: usize,
    blocks: &[(f32, u32)],
) -> u64 {
    let keys = job.keys;
    let shape = keys.shape;
    let Shape { heads, d, w: _, dim } = shape;
    let (lanes, wp) = (C * L::N, shape.padded());
    let mut pairs = 0;
    let (mut any, mut bent) = (0u8, 0u8);
    for head in 0..heads {
        let mut reads = 0u8;
        for (i, (d2, b)) in blocks.iter().enumerate() {
            let left_out = job.skip.is_some_and(|skip| {
                let norm = keys.norm(*b as usize, head);
                // SAFETY: the caller's contract.
                *d2 >= skip.reach2[head]
                    || skip.faint.is_some_and(|f| unsafe {
                        faint::<L, C>(&f, state, tile * heads * lanes, head, *d2, norm)
                    })
            });
            if !left_out {
                reads |= 1 << i;
                pairs += (keys.keys_in(*b as usize) * lanes) as u64;
            }
        }
        let mut bends = reads;
        if let Some(fade) = &job.fade {
            for i in 0..blocks.len() {
                if blocks[i].0 >= fade.beyond2[head] {
                    bends &= !(1 << i);
                }
            }
        }
        scratch.reads[head] = reads;
        scratch.bends[head] = bends;
        any |= reads;
        bent |= bends;
    }
    if any == 0 {
        return 0;
    }
    // SAFETY: every offset below stays inside what `group` and `Packed::new` allocated.
    unsafe {
        if !matches!(job.bias, Bias::None) && bent != 0 {
            distances::<L, C, U>(job, &state.sites[tile * dim * lanes..], scratch, blocks, bent);
        }
        for head in 0..heads {
            let (reads, bends) = (scratch.reads[head], scratch.bends[head]);
            if reads == 0 {
                continue;
            }
            // Where the head's keys and values begin: those of the first block, and a block's step.
            let (base, stride) = match keys.way {
                None => (keys.data.as_ptr().add(BLOCK * dim + head * shape.head()), keys.block()),
                Some(_) => (scratch.wide.as_ptr(), shape.head()),
            };
            let slot = match (keys.way, &job.skip) {
                (Some(Way::Storage), Some(_)) => {
                    widen::<L>(keys, scratch, 0, head, blocks, reads);
                    0
                }
                _ => head * BATCH,
            };
            let at = tile * heads + head;
            let q = state.q.as_ptr().add(if D::HAS { 0 } else { at * d * lanes });
            let top = state.top.as_mut_ptr().add(at * lanes);
            let weight = state.weight.as_mut_ptr().add(at * lanes);
            let norm = state.norm.as_ptr().add(at * lanes);
            let sum = state.sum.as_mut_ptr().add(at * wp * lanes);
            let scores = scratch.scores.as_mut_ptr();

            // Could any score overflow against the running maximum? Usually a bound says no.
            let mut longest = 0.0f32;
            for (_, b) in blocks.iter().enumerate().filter(|(i, _)| reads >> i & 1 == 1) {
                longest = longest.max(keys.norm(b.1 as usize, head));
            }
            let mut raise = false;
            for c in 0..C {
                let bound = L::fma(
                    L::load(norm.add(c * L::N)),
                    L::splat(longest),
                    L::splat(job.highest[head] - HEADROOM),
                );
                raise |= L::any_above(bound, L::load(top.add(c * L::N)));
            }

            for i in 0..blocks.len() {
                if reads >> i & 1 == 0 {
                    continue;
                }
                let b = blocks[i].1 as usize;
                let len = keys.keys_in(b);
                for r in (0..len).step_by(R) {
                    let mut acc = [[L::splat(0.0); C]; R];
                    if D::HAS {
                        let k = keys.half.as_ptr().add((b * heads + head) * keys.half_head());
                        let panel = ((r / PANEL) * PANEL * shape.pairs() + r % PANEL) * 2;
                        let q = state.pairs.as_ptr().add(at * shape.pairs() * lanes * 2);
                        lanes::pair_tile::<L, D, R, C>(
                            shape.pairs(),
                            k.add(panel).cast(),
                            PANEL,
                            q.cast(),
                            lanes,
                            &mut acc,
                        );
                    } else {
                        let k = match keys.way {
                            None => base.add(b * stride),
                            Some(_) => base.add((slot + i) * stride),
                        };
                        let panel = k.add((r / PANEL) * PANEL * d + r % PANEL);
                        lanes::tile::<L, R, C>(d, panel, PANEL, q, lanes, &mut acc);
                    }
                    let to = scores.add((i * BLOCK + r) * lanes);
                    for (r, row) in acc.iter().enumerate() {
                        for (c, x) in row.iter().enumerate() {
                            L::store(to.add(r * lanes + c * L::N), *x);
                        }
                    }
                }
                if let Bias::Terms { add, .. } = job.bias
                    && bends >> i & 1 == 1
                {
                    let rows = i * BLOCK * lanes..(i * BLOCK + len) * lanes;
                    add(head, &scratch.distance[rows.clone()], &mut scratch.scores[rows]);
                }
            }
            let scores = scratch.scores.as_mut_ptr();
            let curve = match job.bias {
                Bias::Table { table, .. } => {
                    Curve::Table(table.as_ptr().add(head * TABLE[0] * TABLE[1]))
                }
                Bias::Bump(bumps) => Curve::Bump(bumps[head]),
                Bias::None | Bias::Terms { .. } => Curve::Flat,
            };
            let mut tops = [L::splat(0.0); C];
            for (c, t) in tops.iter_mut().enumerate() {
                *t = L::load(top.add(c * L::N));
            }
            if raise {
                // Two passes: complete the scores and find their maximum, then weigh.
                let mut next = tops;
                for i in 0..blocks.len() {
                    if reads >> i & 1 == 0 {
                        continue;
                    }
                    let curve = if bends >> i & 1 == 1 { curve } else { Curve::Flat };
                    for j in i * BLOCK..i * BLOCK + keys.keys_in(blocks[i].1 as usize) {
                        let s = gather::<L, C>(scores, j * lanes);
                        let s = match curve {
                            Curve::Flat => s,
                            Curve::Table(table) => radial::<L, C>(table, scratch, j * lanes, s),
                            Curve::Bump(bump) => bumped::<L, C>(bump, scratch, j * lanes, s),
                        };
                        for (c, s) in s.iter().enumerate() {
                            L::store(scores.add(j * lanes + c * L::N), *s);
                            next[c] = L::max(*s, next[c]);
                        }
                    }
                }
                for c in 0..C {
                    if D::HAS {
                        // Whole powers of two: how a weight is rounded then hangs on its score, and
                        // not on what else was read.
                        let whole = L::splat(WHOLE);
                        next[c] = L::sub(L::add(next[c], whole), whole);
                    }
                    let keep = L::exp2(L::sub(tops[c], next[c]));
                    let at = c * L::N;
                    L::store(weight.add(at), L::mul(L::load(weight.add(at)), keep));
                    for i in 0..wp {
                        let at = i * lanes + c * L::N;
                        L::store(sum.add(at), L::mul(L::load(sum.add(at)), keep));
                    }
                    L::store(top.add(at), next[c]);
                }
                tops = next;
            }
            let curve = if raise { Curve::Flat } else { curve };
            let compact = matches!(job.bias, Bias::Terms { compact: true, .. });
            let mut weights = [L::splat(0.0); C];
            for i in 0..blocks.len() {
                if reads >> i & 1 == 0 {
                    continue;
                }
                let (first, len) = (i * BLOCK, keys.keys_in(blocks[i].1 as usize));
                let weights0 = weights;
                let curve = if bends >> i & 1 == 1 { curve } else { Curve::Flat };
                let whole = len - len % (U / C);
                // One loop for each kind of curve: a choice inside would be made for every vector.
                // (A macro, since closures do not inherit the instruction set.)
                macro_rules! weigh {
                    (|$at:ident, $s:ident| $four:expr, $one:expr) => {{
                        for j in (first..first + whole).step_by(U / C) {
                            let $at = j * lanes;
                            let $s = shifted::<L, C, U>(scores, $at, &tops);
                            if D::HAS {
                                let to = (first + (j - first) / 2) * lanes;
                                weigh_pairs::<L, D, C, U>($four, scores, to, &mut weights);
                            } else {
                                weigh::<L, C, U>($four, scores, $at, &mut weights);
                            }
                        }
                        for j in first + whole..first + len {
                            let $at = j * lanes;
                            let $s = shifted::<L, C, C>(scores, $at, &tops);
                            if D::HAS {
                                let to = (first + (j - first) / 2) * lanes;
                                weigh_pairs::<L, D, C, C>($one, scores, to, &mut weights);
                            } else {
                                weigh::<L, C, C>($one, scores, $at, &mut weights);
                            }
                        }
                    }};
                }
                match curve {
                    Curve::Flat if compact => {
                        for j in first..first + len {
                            let s = shifted::<L, C, C>(scores, j * lanes, &tops);
                            weigh_or_not::<L, C>(s, scores, j * lanes, &mut weights);
                        }
                        if D::HAS {
                            weights = pair_up::<L, D, C>(scores, first * lanes, len, weights0);
                        }
                    }
                    Curve::Flat => weigh!(|at, s| s, s),
                    Curve::Table(table) => weigh!(
                        |at, s| radial::<L, U>(table, scratch, at, s),
                        radial::<L, C>(table, scratch, at, s)
                    ),
                    Curve::Bump(bump) => weigh!(
                        |at, s| bumped::<L, U>(bump, scratch, at, s),
                        bumped::<L, C>(bump, scratch, at, s)
                    ),
                }
            }
            for (c, p) in weights.iter().enumerate() {
                let at = weight.add(c * L::N);
                L::store(at, L::add(L::load(at), *p));
            }
            for panel in (0..wp).step_by(R) {
                let mut acc = [[L::splat(0.0); C]; R];
                for (r, row) in acc.iter_mut().enumerate() {
                    for (c, x) in row.iter_mut().enumerate() {
                        *x = L::load(sum.add((panel + r) * lanes + c * L::N));
                    }
                }
                for i in 0..blocks.len() {
                    if reads >> i & 1 == 0 {
                        continue;
                    }
                    let b = blocks[i].1 as usize;
                    let p = scores.add(i * BLOCK * lanes);
                    let depth = keys.keys_in(b);
                    if D::HAS {
                        let v = (b * heads + head) * keys.half_head();
                        let v = v + 2 * (BLOCK * shape.pairs() + panel);
                        let v = keys.half.as_ptr().add(v).cast();
                        let depth = depth.div_ceil(2);
                        lanes::pair_tile::<L, D, R, C>(depth, v, wp, p.cast(), lanes, &mut acc);
                    } else {
                        let k = match keys.way {
                            None => base.add(b * stride),
                            Some(_) => base.add((slot + i) * stride),
                        };
                        let v = k.add(BLOCK * d + panel);
                        lanes::tile::<L, R, C>(depth, v, wp, p, lanes, &mut acc);
                    }
                }
                for (r, row) in acc.iter().enumerate() {
                    for (c, x) in row.iter().enumerate() {
                        L::store(sum.add((panel + r) * lanes + c * L::N), *x);
                    }
                }
            }
        }
    }
    pairs
}

/// `U` vectors from `at` on.
///
/// # Safety
/// They exist.
#[inline(always)]
unsafe fn gather<L: Lanes, const U: usize>(from: *const f32, at: usize) -> [L::F; U] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut out = [L::splat(0.0); U];
        for (u, x) in out.iter_mut().enumerate() {
            *x = L::load(from.add(at + u * L::N));
        }
        out
    }
}

/// How a head's scores depend on distance.
#[derive(Clone, Copy)]
enum Curve {
    Flat,
    Table(*const f32),
    Bump([f32; 2]),
}

/// `U` vectors of scores less their tops.
///
/// # Safety
/// They exist.
#[inline(always)]
unsafe fn shifted<L: Lanes, const C: usize, const U: usize>(
    scores: *const f32,
    at: usize,
    tops: &[L::F; C],
) -> [L::F; U] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut s = gather::<L, U>(scores, at);
        for (u, s) in s.iter_mut().enumerate() {
            *s = L::sub(*s, tops[u % C]);
        }
        s
    }
}

/// Scores become weights, powers of two of them, `U` vectors at once, and are added up.
///
/// # Safety
/// `at` and the following are in the scratch.
#[inline(always)]
unsafe fn weigh<L: Lanes, const C: usize, const U: usize>(
    s: [L::F; U],
    scores: *mut f32,
    at: usize,
    weights: &mut [L::F; C],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let p = L::exp2_each::<U>(s);
        for u in 0..U {
            weights[u % C] = L::add(weights[u % C], p[u]);
            L::store(scores.add(at + u * L::N), p[u]);
        }
    }
}

/// [`weigh`] for products of pairs: weights are rounded, added up as such, and stored in pairs of
/// keys from `to` on. One key (`U` = `C`) makes a pair with nothing.
///
/// # Safety
/// As there, `U` being `C` or `2 C`.
#[inline(always)]
unsafe fn weigh_pairs<L: Lanes, D: Pairs<L>, const C: usize, const U: usize>(
    s: [L::F; U],
    scores: *mut f32,
    to: usize,
    weights: &mut [L::F; C],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let p = L::exp2_each::<U>(s);
        for c in 0..C {
            let other = if U > C { p[(C + c) % U] } else { L::splat(0.0) };
            let [a, b] = D::pair(scores.add(to + c * L::N).cast(), p[c], other);
            weights[c] = L::add(weights[c], L::add(a, b));
        }
    }
}

/// Weights of a block's `len` keys from `at` on, rounded and stored in pairs in their own place; adds
/// them to `weights`.
///
/// # Safety
/// They are in the scratch.
#[inline(always)]
unsafe fn pair_up<L: Lanes, D: Pairs<L>, const C: usize>(
    scores: *mut f32,
    at: usize,
    len: usize,
    mut weights: [L::F; C],
) -> [L::F; C] {
    // SAFETY: the caller's contract.
    unsafe {
        for j in (0..len).step_by(2) {
            for c in 0..C {
                let from = at + (j * C + c) * L::N;
                let a = L::load(scores.add(from));
                let b =
                    if j + 1 < len { L::load(scores.add(from + C * L::N)) } else { L::splat(0.0) };
                let to = at + (j / 2 * C + c) * L::N;
                let [a, b] = D::pair(scores.add(to).cast(), a, b);
                weights[c] = L::add(weights[c], L::add(a, b));
            }
        }
        weights
    }
}

/// [`weigh`] where a score of −∞ must weigh nothing at all, one vector after the other.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn weigh_or_not<L: Lanes, const C: usize>(
    s: [L::F; C],
    scores: *mut f32,
    at: usize,
    weights: &mut [L::F; C],
) {
    // SAFETY: the caller's contract.
    unsafe {
        for c in 0..C {
            let p = L::exp2(s[c]);
            weights[c] = L::add(weights[c], p);
            L::store(scores.add(at + c * L::N), p);
        }
    }
}

/// Scores with one bump added, `U` vectors side by side.
///
/// # Safety
/// `at` and the following are in the scratch.
#[inline(always)]
unsafe fn bumped<L: Lanes, const U: usize>(
    [a, b]: [f32; 2],
    scratch: &Scratch,
    at: usize,
    scores: [L::F; U],
) -> [L::F; U] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut x = gather::<L, U>(scratch.distance.as_ptr(), at);
        for x in &mut x {
            *x = L::mul(*x, L::splat(-b));
        }
        let mut x = L::exp2_each::<U>(x);
        for (x, s) in x.iter_mut().zip(&scores) {
            *x = L::fma(*x, L::splat(a), *s);
        }
        x
    }
}

/// Scores with the bias of a head's table added, `U` vectors side by side.
///
/// # Safety
/// `table` holds a head's coefficients; `at` and the following are in the scratch.
#[inline(always)]
unsafe fn radial<L: Lanes, const U: usize>(
    table: *const f32,
    scratch: &Scratch,
    at: usize,
    scores: [L::F; U],
) -> [L::F; U] {
    // SAFETY: the caller's contract.
    unsafe {
        let segments = scratch.segment.as_ptr().add(at);
        let within = gather::<L, U>(scratch.distance.as_ptr(), at);
        let top = L::table(table.add((TABLE[0] - 1) * TABLE[1]));
        let mut value = [L::splat(0.0); U];
        for (u, value) in value.iter_mut().enumerate() {
            *value = L::lookup(top, L::load_index(segments.add(u * L::N)));
        }
        for i in (0..TABLE[0] - 1).rev() {
            let table = L::table(table.add(i * TABLE[1]));
            for u in 0..U {
                let segment = L::load_index(segments.add(u * L::N));
                value[u] = L::fma(value[u], within[u], L::lookup(table, segment));
            }
        }
        for (value, s) in value.iter_mut().zip(&scores) {
            *value = L::add(*value, *s);
        }
        value
    }
}

/// Squared distances from a tile of queries to a batch of keys, or where they fall in the table.
///
/// # Safety
/// As [`step`].
#[inline(always)]
unsafe fn distances<L: Lanes, const C: usize, const U: usize>(
    job: &Job,
    sites: &[f32],
    scratch: &mut Scratch,
    blocks: &[(f32, u32)],
    reads: u8,
) {
    let (keys, lanes) = (job.keys, C * L::N);
    let shape = keys.shape;
    // SAFETY: offsets stay inside the block, the tile's sites and the scratch.
    unsafe {
        for i in 0..blocks.len() {
            if reads >> i & 1 == 0 {
                continue;
            }
            let b = blocks[i].1 as usize;
            let len = keys.keys_in(b);
            let columns = keys.data.as_ptr().add(b * keys.block());
            let steps = U / C;
            let whole = len - len % steps;
            let to = scratch.distance.as_mut_ptr().add(i * BLOCK * lanes);
            for j in (0..whole).step_by(steps) {
                chords::<L, C, U>(shape.dim, sites.as_ptr(), columns, j, to);
            }
            for j in whole..len {
                chords::<L, C, C>(shape.dim, sites.as_ptr(), columns, j, to);
            }
            let rows = i * BLOCK * lanes..(i * BLOCK + len) * lanes;
            if let Some(bend) = job.bend {
                bend(&mut scratch.distance[rows.clone()]);
            }
            if let Bias::Table { scale, squared, .. } = job.bias {
                let whole = rows.len() - rows.len() % (U * L::N);
                let (body, tail) = (rows.start..rows.start + whole, rows.start + whole..rows.end);
                if squared {
                    for at in body.step_by(U * L::N) {
                        place::<L, U, 22>(scratch, scale, at);
                    }
                    for at in tail.step_by(L::N) {
                        place::<L, 1, 22>(scratch, scale, at);
                    }
                } else {
                    for at in body.step_by(U * L::N) {
                        place::<L, U, 21>(scratch, scale, at);
                    }
                    for at in tail.step_by(L::N) {
                        place::<L, 1, 21>(scratch, scale, at);
                    }
                }
            }
        }
    }
}

/// Squared distances from a tile of queries to `U / C` keys from number `j` on.
///
/// # Safety
/// As [`step`].
#[inline(always)]
unsafe fn chords<L: Lanes, const C: usize, const U: usize>(
    dim: usize,
    sites: *const f32,
    keys: *const f32,
    j: usize,
    to: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut d2 = [L::splat(0.0); U];
        for i in 0..dim {
            let s = gather::<L, C>(sites, i * C * L::N);
            for (u, d2) in d2.iter_mut().enumerate() {
                let gap = L::sub(s[u % C], L::splat(*keys.add(i * BLOCK + j + u / C)));
                *d2 = L::fma(gap, gap, *d2);
            }
        }
        for (u, d2) in d2.iter().enumerate() {
            L::store(to.add((j * C + u) * L::N), *d2);
        }
    }
}

/// Squared distances become segments of the table and places within them, `U` vectors at once.
///
/// # Safety
/// As [`step`].
#[inline(always)]
unsafe fn place<L: Lanes, const U: usize, const SHIFT: u32>(
    scratch: &mut Scratch,
    scale: f32,
    at: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let to = scratch.distance.as_mut_ptr().add(at);
        let mut d = gather::<L, U>(to, 0);
        if SHIFT == 21 {
            d = L::sqrt_each::<U>(d);
        }
        let (one, scale) = (L::splat(1.0), L::splat(scale));
        for (u, d) in d.iter().enumerate() {
            let (segment, within) = L::segment::<SHIFT>(L::fma(*d, scale, one));
            L::store(to.add(u * L::N), within);
            L::store_index(scratch.segment.as_mut_ptr().add(at + u * L::N), segment);
        }
    }
}
