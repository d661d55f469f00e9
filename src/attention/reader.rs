//! A context that many queries will read: packed once per layer, along a Hilbert curve, with the
//! distance bias in a table, so that queries pay for nothing but the pairs they weigh.
//!
//! What need not be read is left out: blocks outside a compact support (exactly), and, where a
//! share ε of the weight may be lost, blocks too faint to matter.

use std::{
    f64::consts::LOG2_E,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    Bias, Metric, Radial, Term,
    bias::{add_term, arcs, geometry},
    cuda,
    table::Table,
};
use crate::{
    error::{Error, Result},
    fused::{
        self, Host, bf16,
        softmax::{self, Fade, Faint, GROUP, Job, Packed, Shape, Skip, attend},
    },
};

/// How a context is read. The defaults lose nothing.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reading {
    /// ε: the share of a query's attention that may be lost by leaving out faint keys. Each output
    /// then moves by less than 2 ε times the largest value. 0 leaves out nothing but what has no
    /// weight at all.
    pub lose: f64,
    /// What keys and values are held in.
    pub precision: Precision,
}

/// Numbers that attention computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits for keys and values, half the memory, and 32 for sums; where the machine is faster
    /// so, 16 for queries and weights too ([`bf16::way`]).
    ///
    /// With u = 2⁻⁸ each value is off by u of itself, each weight by a factor of up to
    /// exp(±2 u Σ|q k| / √d), and by 1 ± u more where weights are rounded: a query's answer by less
    /// than (2 u + 2 u max Σ|q k| / √d) max|v|. Ordinary attention averages most of that away, and
    /// stays within 0.5 % of the largest value; scores of tens do not.
    Bf16,
    /// 19 bits for what tensor cores of an NVIDIA GPU multiply, at twice the time of bf16 and an eighth
    /// of its error; all the rest is f32. There is no such number on the CPU.
    Tf32,
}

impl Precision {
    /// Every precision.
    pub const ALL: [Precision; 3] = [Precision::F32, Precision::Tf32, Precision::Bf16];

    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Tf32 => "tf32",
        }
    }

    /// The precision called `name`.
    pub fn called(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == name)
    }
}

/// How much of a context was read.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Pairs of query and key that were weighed, over all heads.
    pub read: u64,
    /// Pairs there are.
    pub all: u64,
}

impl Tally {
    /// Share of the pairs that was left out.
    pub fn skipped(&self) -> f64 {
        if self.all == 0 { 0.0 } else { 1.0 - self.read.min(self.all) as f64 / self.all as f64 }
    }

    /// What was added since `earlier`.
    pub fn since(self, earlier: Tally) -> Tally {
        Tally { read: self.read - earlier.read, all: self.all - earlier.all }
    }
}

impl std::ops::Add for Tally {
    type Output = Tally;
    fn add(self, other: Tally) -> Tally {
        Tally { read: self.read + other.read, all: self.all + other.all }
    }
}

/// A context of one layer, ready to be read by any number of queries.
pub struct Reader {
    held: Held,
    /// Batch, heads and key width of the context.
    shape: [usize; 3],
}

/// Where a context lies, and so who reads it.
enum Held {
    Host(Box<OnHost>),
    Card(Box<cuda::Context>),
}

impl Reader {
    /// Whether a context of such keys may be read: f32, and nothing is recorded for gradients.
    pub(crate) fn takes(keys: &Tensor) -> bool {
        let on_card = keys.device().is_cuda() && keys.dtype() == DType::F32;
        fused::asked(keys) || (on_card && !keys.track_op() && !fused::is_plain())
    }

    /// Packs keys `[batch, context, head, d]` and values `[batch, context, head, w]` of the sites
    /// where `mask` is 1. Tensors must be f32, on the CPU or on a card; nothing is recorded for
    /// gradients.
    ///
    /// # Shapes
    /// `sites` `[batch, context, dim]`, `mask` `[batch, context]`.
    /// # Errors
    /// [`Error::Axis`] if arguments disagree about an axis they share; [`Error::Input`] for numbers that
    /// the CPU does not have.
    pub fn new(
        k: &Tensor,
        v: &Tensor,
        sites: &Tensor,
        mask: &Tensor,
        bias: Option<&Bias>,
        reading: Reading,
    ) -> Result<Reader> {
        let (batch, _, heads, d) = k.dims4()?;
        if v.dims()[..3] != k.dims()[..3] || sites.dims()[..2] != k.dims()[..2] {
            return Err(Error::axis(
                "keys against values and sites, [batch, context]",
                format!("{:?}", k.dims()),
                format!("{:?} and {:?}", v.dims(), sites.dims()),
            ));
        }
        let held = if k.device().is_cuda() {
            Held::Card(Box::new(cuda::Context::new([k, v, sites, mask], bias, reading)?))
        } else {
            Held::Host(Box::new(OnHost::new([k, v, sites, mask], bias, reading)?))
        };
        Ok(Reader { held, shape: [batch, heads, d] })
    }

    /// `Σₖ wₖ vₖ` for each query, `w = softmax(q·k / √d + bias)`; 0 where nothing is in reach.
    ///
    /// # Shapes
    /// `q` `[batch, target, head, d]`, `sites` `[batch, target, dim]`; returns `[batch, target, head, w]`.
    /// # Errors
    /// [`Error::Axis`] if queries and context disagree about an axis they share.
    pub fn read(&self, q: &Tensor, sites: &Tensor) -> Result<Tensor> {
        let (batch, _, heads, d) = q.dims4()?;
        if [batch, heads, d] != self.shape {
            return Err(Error::axis(
                "queries against the context, [batch, head, d]",
                format!("{:?}", [batch, heads, d]),
                format!("{:?}", self.shape),
            ));
        }
        match &self.held {
            Held::Host(host) => host.read(q, sites),
            Held::Card(context) => context.read(q, sites),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.held {
            Held::Host(host) => host.bytes(),
            Held::Card(context) => context.bytes(),
        }
    }

    /// How much was read so far.
    pub fn tally(&self) -> Tally {
        match &self.held {
            Held::Host(host) => host.tally(),
            Held::Card(context) => context.tally(),
        }
    }
}

/// A context in the memory of the processor.
struct OnHost {
    rows: Box<[Row]>,
    shape: Shape,
    bias: Option<Radial>,
    sink: Option<Box<[f32]>>,
    bumps: Option<Box<[[f32; 2]]>>,
    /// Squared straight line from which on each head reads nothing.
    reach2: Box<[f32]>,
    envelope: Envelope,
    /// Squared straight line from which on each head's bias is 0 to every digit, where all fade.
    beyond2: Option<Box<[f32]>>,
    tables: Mutex<Vec<Arc<Tabled>>>,
    reading: Reading,
    read: AtomicU64,
    all: AtomicU64,
}

/// One row of the batch.
struct Row {
    keys: Packed,
    boxes: Boxes,
    /// Longest key of each head.
    longest: Vec<f32>,
}

/// The bias over some range of straight lines.
struct Tabled {
    reach: f64,
    /// `None` where no table follows it: it is then evaluated term by term.
    table: Option<Table>,
    /// Largest bias of each head within the range, powers of two.
    highest: Vec<f32>,
}

impl OnHost {
    /// Keys, values, sites and mask.
    fn new(
        [k, v, sites, mask]: [&Tensor; 4],
        bias: Option<&Bias>,
        reading: Reading,
    ) -> Result<OnHost> {
        if reading.precision == Precision::Tf32 {
            return Err(Error::input("tf32 is a number of NVIDIA's tensor cores, not of the CPU")
                .fact("precision", reading.precision.name())
                .try_this("use --precision bf16 or f32, or --device cuda"));
        }
        let (batch, context, heads, d) = k.dims4()?;
        let (_, _, _, w) = v.dims4()?;
        let metric = bias.map_or(Metric::Euclidean, |b| b.metric);
        let (k, v, mask) = (k.contiguous()?, v.contiguous()?, mask.contiguous()?);
        let (places, points) = (sites.contiguous()?, geometry(sites, metric)?.contiguous()?);
        let dim = points.dims()[2];
        let shape = Shape { heads, d, w, dim };
        let (k, v, mask) = (Host::of(&k)?, Host::of(&v)?, Host::of(&mask)?);
        let (k, v, mask): (&[f32], &[f32], &[f32]) = (&k, &v, &mask);
        let across = places.dims()[2];
        let (places, points) = (Host::of(&places)?, Host::of(&points)?);
        let (places, points): (&[f32], &[f32]) = (&places, &points);
        let rows = (0..batch)
            .map(|row| {
                let all = row * context..(row + 1) * context;
                let seen: Vec<u32> =
                    (0..context as u32).filter(|j| mask[all.start + *j as usize] != 0.0).collect();
                let seen = along_curve(&places[all.start * across..], across, seen);
                let mut keys = match reading.precision {
                    Precision::F32 | Precision::Tf32 => Packed::new(shape, seen.len()),
                    Precision::Bf16 => Packed::halved(shape, seen.len(), bf16::way()),
                };
                for (at, j) in seen.iter().enumerate() {
                    let j = all.start + *j as usize;
                    keys.set(at, &points[j * dim..], |h| {
                        (&k[(j * heads + h) * d..], &v[(j * heads + h) * w..])
                    });
                }
                let longest = (0..heads)
                    .map(|h| (0..keys.blocks()).map(|b| keys.norm(b, h)).fold(0.0, f32::max))
                    .collect();
                Row { boxes: Boxes::new(&keys), keys, longest }
            })
            .collect();
        let bias = bias.map(Bias::host).transpose()?;
        let of = |f: &dyn Fn(&Radial, usize) -> f64, without: f32| -> Vec<f32> {
            (0..heads).map(|h| bias.as_ref().map_or(without, |b| f(b, h) as f32)).collect()
        };
        // A little farther than the support: rounding may not cut off what still has weight.
        let reach2 = of(&|b, h| (b.support_straight(h) * 1.000_001).powi(2), f32::INFINITY).into();
        let sink = bias.as_ref().and_then(Radial::sinks).map(Vec::into);
        Ok(OnHost {
            rows,
            shape,
            envelope: Envelope::new(heads, bias.as_ref()),
            beyond2: bias.as_ref().and_then(|b| (0..heads).map(|h| faded(b, h)).collect()),
            bumps: bias.as_ref().and_then(bumps).map(Vec::into),
            bias,
            sink,
            reach2,
            tables: Mutex::new(Vec::new()),
            reading,
            read: AtomicU64::new(0),
            all: AtomicU64::new(0),
        })
    }

    fn read(&self, q: &Tensor, sites: &Tensor) -> Result<Tensor> {
        let (batch, targets, heads, d) = q.dims4()?;
        let metric = self.bias.as_ref().map_or(Metric::Euclidean, |b| b.metric);
        let (q, places) = (q.contiguous()?, sites.contiguous()?);
        let points = geometry(sites, metric)?.contiguous()?;
        let (w, dim, across) = (self.shape.w, self.shape.dim, places.dims()[2]);
        let (hq, hp, ho) = (Host::of(&q)?, Host::of(&points)?, Host::of(&places)?);
        let (hq, hp, ho): (&[f32], &[f32], &[f32]) = (&hq, &hp, &ho);
        let mut out = vec![0.0; batch * targets * heads * w];
        for (row, part) in out.chunks_mut((targets * heads * w).max(1)).enumerate() {
            let queries = &hq[row * targets * heads * d..][..targets * heads * d];
            let points = &hp[row * targets * dim..][..targets * dim];
            let places = &ho[row * targets * across..][..targets * across];
            self.read_row(&self.rows[row], queries, points, places, part)?;
        }
        Ok(Tensor::from_vec(out, (batch, targets, heads, w), q.device())?)
    }

    fn read_row(
        &self,
        row: &Row,
        q: &[f32],
        points: &[f32],
        places: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        let Shape { heads, d, w, dim } = self.shape;
        let targets = q.len() / (heads * d);
        self.all.fetch_add((targets * row.keys.len() * heads) as u64, Ordering::Relaxed);
        if targets == 0 || row.keys.is_empty() {
            return Ok(());
        }
        let reach = row.boxes.reach(points, dim);
        let tabled = self.tabled(reach)?;
        let compact = self.reach2.iter().any(|r| r.is_finite());
        let add;
        let bias = match (&self.bias, &self.bumps, &tabled.table) {
            (None, ..) => softmax::Bias::None,
            (_, Some(bumps), _) => softmax::Bias::Bump(bumps),
            (_, _, Some(table)) => softmax::Bias::Table {
                scale: table.scale,
                squared: table.squared,
                table: &table.coefficients,
            },
            (Some(radial), ..) => {
                add = terms(radial);
                softmax::Bias::Terms { add: &add, compact }
            }
        };
        let farthest = self.reach2.iter().fold(0.0f32, |m, r| m.max(*r));
        let sparse = compact || self.reading.lose > 0.0;
        let near = |tile: &[[f32; 2]], list: &mut Vec<(f32, u32)>| {
            row.boxes.near(tile, farthest, self.reading.lose > 0.0, list)
        };
        let gap2 = |tile: &[[f32; 2]], b: usize| row.boxes.gap2(tile, b);
        let envelope = |head: usize, d2: f32| self.envelope.beyond(head, d2);
        let faint = (self.reading.lose > 0.0).then(|| Faint {
            envelope: &envelope,
            longest: &row.longest,
            // Each key left out adds less than its part of ε, so all together less than ε.
            share: (self.reading.lose / row.keys.len() as f64) as f32,
        });
        let job = Job {
            keys: &row.keys,
            bias,
            highest: &tabled.highest,
            bend: match self.bias.as_ref().map(|b| b.metric) {
                // A table of the globe is one of chords.
                Some(Metric::GreatCircle) if tabled.table.is_none() => Some(arcs),
                _ => None,
            },
            sink: self.sink.as_deref(),
            skip: sparse.then_some(Skip { near: &near, reach2: &self.reach2, faint }),
            // Not where every bias reaches everywhere.
            fade: (self.beyond2.as_deref())
                .filter(|beyond2| beyond2.iter().any(|b| f64::from(*b) < reach * reach))
                .map(|beyond2| Fade { gap2: &gap2, beyond2 }),
        };
        let order: Vec<u32> = match sparse || job.fade.is_some() {
            // Queries side by side in a tile should be neighbours, so that they skip the same.
            true => along_curve(places, places.len() / targets, (0..targets as u32).collect()),
            false => (0..targets as u32).collect(),
        };
        let answers: Vec<(Vec<f32>, u64)> = order
            .par_chunks(GROUP)
            .map(|rows| {
                let mut answer = vec![0.0; rows.len() * heads * (w + 2)];
                let pairs = attend(&job, q, points, rows, &mut answer);
                (answer, pairs)
            })
            .collect();
        for (rows, (answer, pairs)) in order.chunks(GROUP).zip(&answers) {
            self.read.fetch_add(*pairs, Ordering::Relaxed);
            for (row, answer) in rows.iter().zip(answer.chunks(heads * (w + 2))) {
                let at = *row as usize * heads * w;
                out[at..at + heads * w].copy_from_slice(&answer[..heads * w]);
            }
        }
        Ok(())
    }

    /// The table for straight lines up to `reach`, made when first needed. There is one for each
    /// power of two, so that the same question is always answered from the same table, whatever
    /// was asked before.
    fn tabled(&self, reach: f64) -> Result<Arc<Tabled>> {
        if !reach.is_finite() {
            return Err(Error::input("a site has coordinates that are not numbers"));
        }
        let reach = 2f64.powi(reach.max(1e-6).log2().ceil() as i32);
        let reach = match self.bias.as_ref().map(|b| b.metric) {
            // No two points of the globe are farther apart.
            Some(Metric::GreatCircle) => reach.min(2.0),
            _ => reach,
        };
        // A panic elsewhere cannot leave a half-made table behind.
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tabled) = tables.iter().find(|t| t.reach == reach) {
            return Ok(tabled.clone());
        }
        let heads = self.shape.heads;
        let tabled = Arc::new(match &self.bias {
            None => Tabled { reach, table: None, highest: vec![0.0; heads] },
            Some(radial) => {
                let tabulated = || Table::new(heads, reach, |h, x| radial.at_straight(h, x));
                Tabled {
                    reach,
                    table: if self.bumps.is_some() { None } else { tabulated() },
                    highest: highest(radial, reach),
                }
            }
        });
        tables.push(tabled.clone());
        Ok(tabled)
    }

    fn bytes(&self) -> usize {
        self.rows.iter().map(|r| r.keys.bytes() + 4 * r.boxes.sides.len()).sum()
    }

    fn tally(&self) -> Tally {
        let load = |x: &AtomicU64| x.load(Ordering::Relaxed);
        Tally { read: load(&self.read), all: load(&self.all) }
    }
}

/// Adds the bias of a head term by term, in powers of two.
pub(super) fn terms(radial: &Radial) -> impl Fn(usize, &[f32], &mut [f32]) + Sync + '_ {
    move |head, d2, scores| {
        for (term, [a, b, c]) in &radial.heads[head] {
            add_term(*term, [(a * LOG2_E) as f32, *b as f32, *c as f32], d2, scores);
        }
    }
}

/// Amplitude and width of every head, powers of two, if its bias is one bump and nothing else.
pub(super) fn bumps(radial: &Radial) -> Option<Vec<[f32; 2]>> {
    let one = |head: &Vec<(Term, [f64; 3])>| {
        let mut terms = head.iter().filter(|(term, _)| *term != Term::Sink);
        match (terms.next(), terms.next()) {
            // A bump turned inside out grows without bound: left to the careful way.
            (Some((Term::Rbf, [a, b, _])), None) if *b >= 0.0 => {
                Some([(a * LOG2_E) as f32, (b * LOG2_E) as f32])
            }
            _ => None,
        }
    };
    radial.heads.iter().map(one).collect()
}

/// Squared straight line from which on the bias of `head` is less than 2⁻³⁰; none where it does not
/// fade to 0.
fn faded(radial: &Radial, head: usize) -> Option<f32> {
    const NOTHING: f64 = 1.0 / (1u64 << 30) as f64;
    let (mut size, mut centre) = (vec![], 0.0f64);
    for (term, p) in &radial.heads[head] {
        match term {
            Term::Sink => {}
            Term::Rbf | Term::Tisa | Term::Exponential if p[1] > 0.0 => {
                centre = if *term == Term::Tisa { centre.max(p[2]) } else { centre };
                size.push((*term, *p));
            }
            _ => return None,
        }
    }
    // Beyond the last centre every term falls all the way.
    let at = |line: f64| -> f64 {
        let distance = radial.metric.distance(line).max(centre);
        let sum: f64 = size.iter().map(|(term, p)| term.value(*p, distance).abs()).sum();
        if radial.metric.distance(line) < centre { f64::INFINITY } else { sum }
    };
    let far = if radial.metric == Metric::GreatCircle { 2.0 } else { 2f64.powi(20) };
    if at(far).is_nan() || at(far) >= NOTHING {
        return Some(f32::INFINITY);
    }
    let (mut near, mut far) = (0.0, far);
    for _ in 0..80 {
        let middle = 0.5 * (near + far);
        if at(middle) < NOTHING { far = middle } else { near = middle }
    }
    Some((far * far * 1.000_001) as f32)
}

/// No less than the bias of each head on straight lines up to `reach`, powers of two.
pub(super) fn highest(radial: &Radial, reach: f64) -> Vec<f32> {
    let to = radial.metric.distance(reach);
    (0..radial.heads.len()).map(|head| rounded_up(highest_from(radial, head, 0.0, to))).collect()
}

/// A bias in powers of two, with room for the rounding of those that it bounds.
fn rounded_up(bias: f64) -> f32 {
    (bias * LOG2_E) as f32 + 1e-3
}

/// No less than the bias of `head` anywhere from distance `from` to `to`.
fn highest_from(radial: &Radial, head: usize, from: f64, to: f64) -> f64 {
    // Every family rises or falls all the way, save waves, and a bump at a distance of its own.
    let most = |(term, p): &(Term, [f64; 3])| {
        if *term == Term::Periodic {
            return p[0].abs();
        }
        let ends = term.value(*p, from).max(term.value(*p, to));
        let bump = *term == Term::Tisa && (from..to).contains(&p[2]);
        if bump { ends.max(p[0]) } else { ends }
    };
    radial.heads[head].iter().map(most).sum()
}

/// The largest bias at or beyond a squared straight line, by quarters of octaves.
pub(super) struct Envelope {
    /// `[head, cell]`, powers of two.
    pub(super) cells: Box<[f32]>,
}

impl Envelope {
    /// Bits of 2⁻⁴⁰, where the first cell ends, and cells in all: up to 2⁴⁰.
    const FIRST: i32 = (127 - 40) << 23;
    pub(super) const CELLS: usize = 4 * 80;

    pub(super) fn new(heads: usize, bias: Option<&Radial>) -> Envelope {
        let mut cells = vec![0.0; heads * Self::CELLS].into_boxed_slice();
        if let Some(bias) = bias {
            for (i, cell) in cells.iter_mut().enumerate() {
                let (head, at) = (i / Self::CELLS, i % Self::CELLS);
                let least = match at {
                    0 => 0.0,
                    at => f32::from_bits((Self::FIRST + ((at as i32) << 21)) as u32).sqrt(),
                };
                let (metric, far) = (bias.metric, 2f64.powi(20));
                let far = if metric == Metric::GreatCircle { 2.0 } else { far };
                let (from, to) = (metric.distance(f64::from(least)), metric.distance(far));
                *cell = rounded_up(highest_from(bias, head, from.min(to), to));
            }
        }
        Envelope { cells }
    }

    fn beyond(&self, head: usize, d2: f32) -> f32 {
        let cell = ((d2.to_bits() as i32 - Self::FIRST) >> 21).clamp(0, Self::CELLS as i32 - 1);
        self.cells[head * Self::CELLS + cell as usize]
    }
}

/// Least and most; ∞ and −∞ of nothing.
pub(super) fn extent<'a>(xs: impl Iterator<Item = &'a f32>) -> [f32; 2] {
    xs.fold([f32::INFINITY, f32::NEG_INFINITY], |[a, b], x| [a.min(*x), b.max(*x)])
}

/// Boxes around blocks of keys, and around runs of such boxes.
pub(super) struct Boxes {
    dim: usize,
    blocks: usize,
    /// `[block, dim, (least, most)]`, then the same for runs of [`Boxes::RUN`] blocks, then for all.
    sides: Vec<f32>,
}

impl Boxes {
    /// Blocks in a run.
    const RUN: usize = 32;

    fn new(keys: &Packed) -> Boxes {
        Boxes::around(keys.shape().dim, keys.blocks(), |b, i| extent(keys.coordinates(b, i).iter()))
    }

    /// From the least and most of every block along every dimension.
    pub(super) fn around(
        dim: usize,
        blocks: usize,
        extent: impl Fn(usize, usize) -> [f32; 2],
    ) -> Boxes {
        let mut sides = Vec::with_capacity((blocks + blocks.div_ceil(Self::RUN) + 1) * 2 * dim);
        for b in 0..blocks {
            (0..dim).for_each(|i| sides.extend(extent(b, i)));
        }
        let around = |boxes: &[f32]| -> Vec<f32> {
            let mut sides = [f32::INFINITY, f32::NEG_INFINITY].repeat(dim);
            for one in boxes.chunks(2 * dim) {
                for i in 0..dim {
                    sides[2 * i] = sides[2 * i].min(one[2 * i]);
                    sides[2 * i + 1] = sides[2 * i + 1].max(one[2 * i + 1]);
                }
            }
            sides
        };
        let runs: Vec<f32> = sides.chunks(Self::RUN * 2 * dim).flat_map(around).collect();
        let all = around(&runs);
        sides.extend(runs);
        sides.extend(all);
        Boxes { dim, blocks, sides }
    }

    fn side(&self, at: usize) -> &[f32] {
        &self.sides[at * 2 * self.dim..(at + 1) * 2 * self.dim]
    }

    /// Squared distance between a box and box number `at`.
    fn gap2(&self, tile: &[[f32; 2]], at: usize) -> f32 {
        let gap = |(t, b): (&[f32; 2], &[f32])| (b[0] - t[1]).max(t[0] - b[1]).max(0.0).powi(2);
        tile.iter().zip(self.side(at).chunks_exact(2)).map(gap).sum()
    }

    /// Blocks nearer than `farthest`, with their squared distance; nearest first if asked.
    pub(super) fn near(
        &self,
        tile: &[[f32; 2]],
        farthest: f32,
        sorted: bool,
        list: &mut Vec<(f32, u32)>,
    ) {
        for run in 0..self.blocks.div_ceil(Self::RUN) {
            if self.gap2(tile, self.blocks + run) >= farthest {
                continue;
            }
            for b in run * Self::RUN..self.blocks.min((run + 1) * Self::RUN) {
                let gap2 = self.gap2(tile, b);
                if gap2 < farthest {
                    list.push((gap2, b as u32));
                }
            }
        }
        if sorted {
            list.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        }
    }

    /// No less than any straight line from a key to one of `points`.
    fn reach(&self, points: &[f32], dim: usize) -> f64 {
        let all = self.side(self.blocks + self.blocks.div_ceil(Self::RUN));
        let mut sum = 0.0;
        for i in 0..dim {
            let (mut least, mut most) = (f64::from(all[2 * i]), f64::from(all[2 * i + 1]));
            for x in points.iter().skip(i).step_by(dim) {
                if x.is_nan() {
                    return f64::NAN;
                }
                least = least.min(f64::from(*x));
                most = most.max(f64::from(*x));
            }
            sum += (most - least).powi(2);
        }
        sum.sqrt()
    }
}

/// Numbers of sites, sorted along a Hilbert curve through their bounding square (Skilling 2004 for
/// two dimensions; one dimension is sorted as it is).
pub(super) fn along_curve(sites: &[f32], dim: usize, mut order: Vec<u32>) -> Vec<u32> {
    const SIDE: u32 = 1 << 16;
    let extent = |i: usize| {
        let xs = order.iter().map(|j| sites[*j as usize * dim + i]);
        xs.fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)))
    };
    let extents: Vec<(f32, f32)> = (0..dim.min(2)).map(extent).collect();
    let longest = extents.iter().map(|(a, b)| b - a).fold(0.0, f32::max).max(f32::MIN_POSITIVE);
    let cell = |j: u32, i: usize| {
        let share = (sites[j as usize * dim + i] - extents[i].0) / longest;
        (share * (SIDE - 1) as f32) as u32
    };
    order.sort_by_cached_key(|j| match dim {
        1 => u64::from(cell(*j, 0)),
        _ => hilbert(SIDE, cell(*j, 0), cell(*j, 1)),
    });
    order
}

/// Position of a cell of a square of `side` (a power of two) along the Hilbert curve.
fn hilbert(side: u32, mut x: u32, mut y: u32) -> u64 {
    let mut at = 0u64;
    let mut s = side / 2;
    while s > 0 {
        let (rx, ry) = (u32::from(x & s > 0), u32::from(y & s > 0));
        at += u64::from(s) * u64::from(s) * u64::from((3 * rx) ^ ry);
        if ry == 0 {
            if rx == 1 {
                x = (side - 1).wrapping_sub(x);
                y = (side - 1).wrapping_sub(y);
            }
            std::mem::swap(&mut x, &mut y);
        }
        s /= 2;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_visits_every_cell_by_single_steps() {
        let side = 16;
        let mut cells: Vec<(u64, u32, u32)> = Vec::new();
        for x in 0..side {
            for y in 0..side {
                cells.push((hilbert(side, x, y), x, y));
            }
        }
        cells.sort_unstable();
        for (i, pair) in cells.windows(2).enumerate() {
            assert_eq!(pair[0].0, i as u64);
            assert_eq!(pair[0].1.abs_diff(pair[1].1) + pair[0].2.abs_diff(pair[1].2), 1);
        }
    }
}
