//! A large context in overlapping windows, each as many sites as a network was trained on.
//!
//! A network knows regions of a few hundred sites between −1 and 1. Here a context of any size is cut into
//! such regions: cells of a k-d tree, each with the sites around it (its halo) and, beyond those, a few that
//! stand far apart, so that a window also knows what lies further off. A window has a frame of its own, whose
//! unit follows the density of its sites, and values are standardised anew in each. Coarser windows over
//! evenly thinned sites lie above, four times fewer each time, up to one over everything: places that no
//! fine window reaches, such as an ocean between surveys, are theirs.
//!
//! **Blending.** Every place ranks the windows by `r² (1 + (d / 0.7 r)⁸)`, where d is how far away a window's
//! centre is and r how far its sites reach: the finest that covers a place comes first, and where none does
//! the one that has to stretch least. The first few answer, each with weight `(1 − s/s′)²` where s is its
//! score and s′ that of the first that is not asked, and the posterior is their mixture. A window whose turn
//! is over has weight 0 by then, so that the map has no seams.
//!
//! Sources: Franke & Nielson (1980), doi:10.1002/nme.1620151110, for weights that fade to 0; Gramacy & Apley
//! (2015), arXiv:1303.0383, for local designs of near sites and a few far ones; Rullière et al. (2018),
//! arXiv:1607.05432, on what aggregated local experts lose.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::plan::TARGETS;
use crate::{
    baseline::neighbours::{Found, Tree, mix, spread},
    error::{Error, Result},
    likelihood::Likelihood,
    predictive::{Link, Predictive},
    process::{Memory, Posterior, Process},
    sites::{Observations, Sites, log_rate, mean_sd, unit_box},
    task::design::Design,
};

/// Each level of coarser windows has one site in so many of the level below.
const THINNED: usize = 4;
/// Rows of one place that a window holds, at most: chance chooses them, never their values.
const SAME: usize = 8;
/// Share of a window's reach that it answers for before another may be better.
const COVERS: f64 = 0.7;
/// Far sites of a window are at most so many times as far as its near ones reach.
const FARTHEST: f64 = 3.0;
/// Bytes of conditioned windows that are kept for the next question.
const KEPT: usize = 384 << 20;
/// The least sd that values of a window are divided by, in sds of the whole context: f32 resolves no less.
const LEAST_SD: f64 = 1e-5;
/// Targets that windows are best asked about at once: each window that answers is then asked but once.
pub const TARGETS_AT_ONCE: usize = 65_536;
/// The least sites in a window.
pub const LEAST: usize = 16;
/// Log weight of nothing.
const NONE: f32 = -1e4;

/// How a context is cut into windows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cut {
    /// Sites in a window.
    pub sites: usize,
    /// Share of them that stand far apart, around the near ones.
    pub far: f64,
    /// Share of the near ones that make the cell in the middle.
    pub cell: f64,
    /// Windows that answer for a place, at most.
    pub blend: usize,
    /// Half the longer side of the near ones' box, in the units of the window's frame: 1 in training.
    pub span: f64,
}

impl Cut {
    /// Windows of `sites`, cut as measured best.
    pub fn of(sites: usize) -> Self {
        Cut { sites, far: 0.2, cell: 0.25, blend: 3, span: 1.0 }
    }

    /// Windows for a network that learned from `design`.
    pub fn learned(design: &Design) -> Self {
        Cut::of((most(design) / 4).clamp(64, 1024))
    }
}

/// The most sites that a network which learned from `design` has seen at once.
pub fn most(design: &Design) -> usize {
    design.context.iter().map(|size| size.sites[1]).max().unwrap_or(0)
}

/// What is wrong with windows of `sites`.
pub fn small(sites: usize) -> Error {
    Error::input("a window of so few sites knows nothing of a surface")
        .fact("sites in a window", sites)
        .try_this("give windows 100 to 1000 sites")
}

/// A process conditioned window by window.
pub struct Windows {
    inner: Arc<dyn Process + Send + Sync>,
    likelihood: &'static dyn Likelihood,
    cut: Cut,
}

impl Windows {
    /// `inner`, which reads observations of `likelihood`, in windows.
    ///
    /// # Errors
    /// [`Error::Input`] for windows of fewer than 16 sites, or shares that are none.
    pub fn new(
        inner: Arc<dyn Process + Send + Sync>,
        likelihood: &'static dyn Likelihood,
        cut: Cut,
    ) -> Result<Self> {
        if cut.sites < LEAST {
            return Err(small(cut.sites));
        }
        let shares = (0.0..=0.5).contains(&cut.far) && cut.cell > 0.0 && cut.cell <= 1.0;
        if !shares || cut.blend == 0 || !(cut.span > 0.0 && cut.span.is_finite()) {
            return Err(Error::input("no windows can be cut like this")
                .fact("cut", format!("{cut:?}"))
                .try_this("take the cut of `Cut::of`, and change one number of it"));
        }
        Ok(Windows { inner, likelihood, cut })
    }
}

/// What was seen, places in an order in which early ones are far apart.
struct Seen {
    /// Coordinates of each place, flat.
    places: Vec<f64>,
    /// Rows of place `i`: `rows[first[i]..first[i + 1]]`.
    first: Vec<u32>,
    y: Vec<f32>,
    trials: Option<Vec<f32>>,
    tree: Tree,
}

impl Seen {
    fn of(context: &Observations) -> Result<Self> {
        let host = |x: &Tensor| -> Result<Vec<f32>> {
            Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        };
        let (y, mask) = (host(&context.y)?, host(&context.mask)?);
        let trials = context.trials.as_ref().map(host).transpose()?;
        let mut sites = context.sites.host()?.pop().unwrap_or_default();
        let kept: Vec<usize> = (0..sites.len()).filter(|i| mask[*i] != 0.0).collect();
        sites = kept.iter().map(|i| sites[*i].clone()).collect();
        let bad = |i: &&usize| {
            let trials = trials.as_ref().map_or(1.0, |t| t[**i]);
            !(y[**i].is_finite() && trials.is_finite())
        };
        if let Some(i) = kept.iter().find(bad) {
            return Err(Error::input("an observation is not finite")
                .fact("site", i + 1)
                .try_this("leave rows without a number out"));
        }
        if let Some(i) = sites.iter().position(|s| s.iter().any(|c| !c.is_finite())) {
            return Err(Error::input("a site has no finite coordinates")
                .fact("site", kept[i] + 1)
                .try_this("leave sites without coordinates out"));
        }
        if sites.is_empty() {
            return Err(Error::input("there are no sites to cut into windows")
                .try_this("condition the process itself, which knows its prior"));
        }
        // Rows of one place come in an order that hangs neither on the listing nor on which is larger.
        let also: Vec<f64> = kept
            .iter()
            .map(|i| {
                let trials = trials.as_ref().map_or(0, |t| t[*i].to_bits());
                let word = u64::from(y[*i].to_bits()) << 32 | u64::from(trials);
                (mix(word) >> 11) as f64
            })
            .collect();
        let mut known: HashMap<[u64; 2], usize> = HashMap::new();
        let mut places: Vec<f64> = Vec::new();
        let mut rows: Vec<Vec<u32>> = Vec::new();
        for i in spread(&sites, &also) {
            let site = &sites[i];
            let at = *known.entry([0, 1].map(|d| (site[d] + 0.0).to_bits())).or_insert(rows.len());
            if at == rows.len() {
                places.extend(site);
                rows.push(Vec::new());
            }
            rows[at].push(kept[i] as u32);
        }
        let mut first = vec![0u32];
        let mut order = Vec::with_capacity(kept.len());
        for rows in &rows {
            order.extend(rows.iter().map(|i| *i as usize));
            first.push(order.len() as u32);
        }
        let tree = Tree::new(&places, 2);
        let by_place = |x: &[f32]| order.iter().map(|i| x[*i]).collect::<Vec<f32>>();
        let trials = trials.as_deref().map(by_place);
        Ok(Seen { places, first, y: by_place(&y), trials, tree })
    }

    fn len(&self) -> usize {
        self.first.len() - 1
    }

    fn place(&self, i: usize) -> [f64; 2] {
        [self.places[2 * i], self.places[2 * i + 1]]
    }

    /// Rows that windows would hold of so many places.
    fn held(&self, places: impl Iterator<Item = u32>) -> usize {
        places.map(|i| self.rows(i).len()).sum()
    }

    /// The rows of place `i` that a window holds.
    fn rows(&self, i: u32) -> std::ops::Range<u32> {
        let (start, end) = (self.first[i as usize], self.first[i as usize + 1]);
        start..end.min(start + SAME as u32)
    }
}

/// A window before it is conditioned.
struct Window {
    centre: [f64; 2],
    /// How far its near sites reach.
    reach: f64,
    /// What becomes the middle, and what one unit, of its frame.
    middle: [f64; 2],
    unit: f64,
    /// Places, near ones first.
    places: Vec<u32>,
}

/// Cuts places `which` into cells of neighbours, each of at most `most` rows or one place; their centres.
fn cells(seen: &Seen, which: &mut [u32], most: usize, out: &mut Vec<[f64; 2]>) {
    let axis = |d: usize, i: u32| seen.places[2 * i as usize + d];
    let span = [0, 1].map(|d| {
        let ends = which.iter().fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], i| {
            [low.min(axis(d, *i)), high.max(axis(d, *i))]
        });
        ends[1] - ends[0]
    });
    let half = which.len() / 2;
    let by = |d: usize| move |a: &u32, b: &u32| axis(d, *a).total_cmp(&axis(d, *b)).then(a.cmp(b));
    if which.len() < 2 || seen.held(which.iter().copied()) <= most {
        // A median stays where most sites are, however far one of them is.
        out.push([0, 1].map(|d| {
            which.select_nth_unstable_by(half, by(d));
            axis(d, which[half])
        }));
        return;
    }
    let widest = usize::from(span[1] > span[0]);
    which.select_nth_unstable_by(half, by(widest));
    let (left, right) = which.split_at_mut(half);
    cells(seen, left, most, out);
    cells(seen, right, most, out);
}

impl Cut {
    /// The windows of every level, fine ones first.
    fn windows(&self, seen: &Seen) -> Vec<Window> {
        let far = (self.far * self.sites as f64).round() as usize;
        let near = self.sites - far;
        let most = ((self.cell * near as f64) as usize).max(1);
        let mut ends = vec![seen.len()];
        loop {
            let end = ends[ends.len() - 1];
            if end < 2 || seen.held(0..end as u32) <= near {
                break;
            }
            ends.push(end.div_ceil(THINNED));
        }
        let mut all = Vec::new();
        for (level, end) in ends.iter().enumerate() {
            let mut which: Vec<u32> = (0..*end as u32).collect();
            let mut centres = Vec::new();
            let last = level + 1 == ends.len();
            cells(seen, &mut which, if last { near } else { most }, &mut centres);
            let made = centres.par_iter().map(|c| self.window(seen, *c, &ends[level..], near, far));
            all.extend(made.collect::<Vec<_>>());
            if level == 0 {
                // A place on the edge of a cell, with a town between it and the middle, gets its own.
                let mut held = vec![false; seen.len()];
                all.iter().flat_map(|w| &w.places).for_each(|i| held[*i as usize] = true);
                let alone = (0..seen.len()).filter(|i| !held[*i]);
                let own = alone.map(|i| self.window(seen, seen.place(i), &ends, near, far));
                all.extend(own.collect::<Vec<_>>());
            }
        }
        all
    }

    /// The window around `centre`: near places of the first `ends[0]`, far ones of the fewer after.
    fn window(
        &self,
        seen: &Seen,
        centre: [f64; 2],
        ends: &[usize],
        near: usize,
        far: usize,
    ) -> Window {
        let mut found = Found::new();
        seen.tree.nearest(&centre, near, ends[0], &mut found);
        let mut held = 0;
        let fits = |(_, i): &&(f64, u32)| {
            held += seen.rows(*i).len();
            held <= near
        };
        let taken = found.iter().take_while(fits).count().max(1);
        found.truncate(taken);
        let reach = found.last().map_or(0.0, |(square, _)| square.sqrt());
        let mut places: Vec<u32> = found.iter().map(|(_, i)| *i).collect();
        let spots: Vec<[f64; 2]> = places.iter().map(|i| seen.place(*i as usize)).collect();
        let mut edge = reach;
        let coarser = &ends[1..ends.len().min(3)];
        let mut beyond = Found::new();
        for (done, end) in coarser.iter().enumerate() {
            let mut left = far / coarser.len();
            // As many as fit in so much more room, and what of the near ones is among them.
            seen.tree.nearest(&centre, left + places.len(), *end, &mut beyond);
            for (square, i) in &beyond {
                let rows = seen.rows(*i).len();
                let distance = square.sqrt();
                let there = distance > edge && (distance <= FARTHEST * reach || reach == 0.0);
                if there && rows <= left {
                    places.push(*i);
                    left -= rows;
                }
            }
            if done == 0 {
                let last = places.last().map(|i| seen.place(*i as usize));
                edge = last.map_or(edge, |p| (p[0] - centre[0]).hypot(p[1] - centre[1]).max(edge));
            }
        }
        let (middle, unit) = unit_box(&spots)
            .or_else(|| {
                let all: Vec<_> = places.iter().map(|i| seen.place(*i as usize)).collect();
                unit_box(&all)
            })
            .unwrap_or((centre, 1.0));
        let reach = if reach > 0.0 { reach } else { unit };
        Window { centre, reach, middle, unit: unit / self.span, places }
    }
}

/// Windows by where they are and how far they reach: which come first for a place.
struct Ranking {
    /// Centre and reach.
    windows: Vec<([f64; 2], f64)>,
    order: Vec<u32>,
    nodes: Vec<Node>,
}

struct Node {
    low: [f64; 2],
    high: [f64; 2],
    reach: [f64; 2],
    start: u32,
    end: u32,
    second: Option<u32>,
}

/// How far down the list a window stands: by its reach and the square of how far its centre is.
fn score(square: f64, reach: f64) -> f64 {
    let ratio = square / (COVERS * COVERS * reach * reach);
    let fourth = ratio * ratio * ratio * ratio;
    reach * reach * (1.0 + fourth)
}

impl Ranking {
    fn new(windows: Vec<([f64; 2], f64)>) -> Self {
        let mut order: Vec<u32> = (0..windows.len() as u32).collect();
        let mut ranking = Ranking { windows, order: Vec::new(), nodes: Vec::new() };
        if !order.is_empty() {
            ranking.split(&mut order, 0);
        }
        ranking.order = order;
        ranking
    }

    fn split(&mut self, which: &mut [u32], start: usize) {
        let mut node = Node {
            low: [f64::INFINITY; 2],
            high: [f64::NEG_INFINITY; 2],
            reach: [f64::INFINITY, 0.0],
            start: start as u32,
            end: (start + which.len()) as u32,
            second: None,
        };
        for i in which.iter() {
            let (centre, reach) = self.windows[*i as usize];
            for (d, centre) in centre.iter().enumerate() {
                node.low[d] = node.low[d].min(*centre);
                node.high[d] = node.high[d].max(*centre);
            }
            node.reach = [node.reach[0].min(reach), node.reach[1].max(reach)];
        }
        let spans = [node.high[0] - node.low[0], node.high[1] - node.low[1]];
        let here = self.nodes.len();
        self.nodes.push(node);
        if which.len() > 4 {
            let half = which.len() / 2;
            let d = usize::from(spans[1] > spans[0]);
            let windows = &self.windows;
            which.select_nth_unstable_by(half, |a, b| {
                windows[*a as usize].0[d].total_cmp(&windows[*b as usize].0[d]).then(a.cmp(b))
            });
            let (left, right) = which.split_at_mut(half);
            self.split(left, start);
            self.nodes[here].second = Some(self.nodes.len() as u32);
            self.split(right, start + half);
        }
    }

    /// No window of a node stands higher than this.
    fn bound(&self, node: &Node, place: [f64; 2]) -> f64 {
        let out = |d: usize| (node.low[d] - place[d]).max(place[d] - node.high[d]).max(0.0);
        let square = out(0).powi(2) + out(1).powi(2);
        // The reach at which the score is least, for this distance.
        let best = (3.0f64).powf(0.125) * square.sqrt() / COVERS;
        score(square, best.clamp(node.reach[0], node.reach[1]))
    }

    /// The first `count` windows for a place, with their scores.
    fn first(&self, place: [f64; 2], count: usize, found: &mut Found) {
        found.clear();
        if !self.nodes.is_empty() {
            self.search(0, self.bound(&self.nodes[0], place), place, count, found);
        }
    }

    fn search(&self, at: usize, bound: f64, place: [f64; 2], count: usize, found: &mut Found) {
        if found.len() == count && bound > found[count - 1].0 {
            return;
        }
        let node = &self.nodes[at];
        let Some(second) = node.second else {
            for i in &self.order[node.start as usize..node.end as usize] {
                let (centre, reach) = self.windows[*i as usize];
                let square = (centre[0] - place[0]).powi(2) + (centre[1] - place[1]).powi(2);
                let one = (score(square, reach), *i);
                let before = |o: &(f64, u32)| o.0 < one.0 || (o.0 == one.0 && o.1 < one.1);
                let rank = found.partition_point(before);
                if rank < count {
                    found.truncate(count - 1);
                    found.insert(rank, one);
                }
            }
            return;
        };
        let second = second as usize;
        let bounds = [at + 1, second].map(|n| self.bound(&self.nodes[n], place));
        let children = [(at + 1, bounds[0]), (second, bounds[1])];
        let order = if bounds[0] <= bounds[1] { [0, 1] } else { [1, 0] };
        for c in order {
            self.search(children[c].0, children[c].1, place, count, found);
        }
    }

    /// The windows that answer for a place, with weights that sum to 1.
    fn weights(&self, place: [f64; 2], blend: usize, found: &mut Found) {
        self.first(place, blend + 1, found);
        let last = match found.len() > blend {
            true => found.pop().map(|(score, _)| score),
            false => None,
        };
        let weigh = |score: f64| match last {
            Some(last) => (1.0 - score / last).powi(2).max(1e-12),
            None => (found[0].0 / score).powi(2),
        };
        let weights: Vec<f64> = found.iter().map(|(score, _)| weigh(*score)).collect();
        let total: f64 = weights.iter().sum();
        // What is of little weight is of none, and was on its way there.
        let less: Vec<f64> = weights.iter().map(|w| (w / total - 0.02).max(0.0)).collect();
        let total: f64 = less.iter().sum();
        for (one, weight) in found.iter_mut().zip(less) {
            one.0 = weight / total;
        }
        found.retain(|(weight, _)| *weight > 0.0);
    }
}

/// A window that has seen its sites.
struct Ready<'a> {
    posterior: Box<dyn Posterior + 'a>,
    /// Its link scale is `shift + scale · link` of the whole.
    shift: f64,
    scale: f64,
}

/// Conditioned windows, least recently asked first to go.
struct Kept<'a> {
    most: usize,
    clock: u64,
    windows: HashMap<u32, (u64, Arc<Ready<'a>>)>,
}

struct Conditioned<'a> {
    owner: &'a Windows,
    device: Device,
    dtype: DType,
    seen: Seen,
    windows: Vec<Window>,
    ranking: Ranking,
    kept: Mutex<Kept<'a>>,
}

impl Process for Windows {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        if context.sites.batch() != 1 || context.sites.s.dims()[2] != 2 {
            return Err(Error::input("windows are cut from one survey on a plane")
                .fact("surveys", context.sites.batch())
                .fact("coordinates of a site", context.sites.s.dims()[2])
                .try_this(
                    "leave --model out, use --model kriging-counts, kriging-values or vecchia, which need no \
                     windows, or measure on the plane with --distance plane",
                ));
        }
        if context.sites.x.is_some() || context.sites.t.is_some() {
            return Err(Error::input("windows know places, and neither times nor covariates")
                .try_this("leave windows out, or take covariates off first (`Regressed`)"));
        }
        let seen = Seen::of(context)?;
        let windows = self.cut.windows(&seen);
        let ranking = Ranking::new(windows.iter().map(|w| (w.centre, w.reach)).collect());
        let each = self.inner.memory(self.cut.sites).held.max(1);
        let most = (KEPT / each).max(4);
        Ok(Box::new(Conditioned {
            owner: self,
            device: context.y.device().clone(),
            dtype: context.y.dtype(),
            seen,
            windows,
            ranking,
            kept: Mutex::new(Kept { most, clock: 0, windows: HashMap::new() }),
        }))
    }

    fn memory(&self, sites: usize) -> Memory {
        let one = self.inner.memory(self.cut.sites.min(sites));
        let cut = &self.cut;
        let near = (1.0 - cut.far) * cut.sites as f64;
        // Leaves of a k-d tree are more than half full; coarser levels add a third.
        let windows = 1 + (1.34 * 2.0 * sites as f64 / (cut.cell * near).max(1.0)) as usize;
        let index = sites * (Tree::bytes(2) + 96) + windows * (4 * cut.sites + 128);
        let kept = (KEPT / one.held.max(1)).max(4).min(windows) * one.held;
        let threads = rayon::current_num_threads();
        let asking = threads * (TARGETS * one.target + one.conditioning);
        let held = index + kept + asking;
        Memory { conditioning: 2 * index + one.conditioning, held, target: 1 << 10 }
    }
}

/// What one window says of the places that ask it, `[place, component]`.
struct Said {
    components: usize,
    link: Link,
    log_weight: Vec<f32>,
    mean: Vec<f32>,
    surface_sd: Vec<f32>,
    observation_sd: Vec<f32>,
    lift: Option<Vec<f32>>,
}

/// A place that asks, with the weight of the answer and where it goes.
#[derive(Clone, Copy)]
struct Asks {
    window: u32,
    place: u32,
    slot: u32,
    weight: f32,
}

impl<'a> Conditioned<'a> {
    /// The window, conditioned now or before.
    fn ready(&self, at: u32) -> Result<Arc<Ready<'a>>> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut kept = kept();
            kept.clock += 1;
            let now = kept.clock;
            if let Some((last, ready)) = kept.windows.get_mut(&at) {
                *last = now;
                return Ok(ready.clone());
            }
        }
        // No lock is held meanwhile: a thread that waits inside may be given another question.
        let ready = Arc::new(self.condition(&self.windows[at as usize])?);
        let mut kept = kept();
        kept.clock += 1;
        let now = kept.clock;
        kept.windows.insert(at, (now, ready.clone()));
        while kept.windows.len() > kept.most {
            let oldest = kept.windows.iter().min_by_key(|(_, (last, _))| *last);
            let Some(oldest) = oldest.map(|(at, _)| *at) else { break };
            kept.windows.remove(&oldest);
        }
        Ok(ready)
    }

    fn condition(&self, window: &Window) -> Result<Ready<'a>> {
        let seen = &self.seen;
        let rows: Vec<(u32, u32)> =
            window.places.iter().flat_map(|i| seen.rows(*i).map(move |row| (*i, row))).collect();
        let xy: Vec<[f64; 2]> =
            rows.iter().map(|(i, _)| window.framed(seen.place(*i as usize))).collect();
        let of = |x: &[f32]| rows.iter().map(|(_, row)| x[*row as usize]).collect::<Vec<f32>>();
        let (mut y, mut trials) = (of(&seen.y), seen.trials.as_deref().map(of));
        let (mut shift, mut scale) = (0.0, 1.0);
        let wide = |x: &[f32]| x.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
        let likelihood = self.owner.likelihood;
        if !likelihood.counts() {
            let (mean, sd) = mean_sd(&wide(&y));
            (shift, scale) = (mean, if sd == 1.0 { sd } else { sd.max(LEAST_SD) });
            y.iter_mut().for_each(|v| *v = ((f64::from(*v) - shift) / scale) as f32);
        } else if let (Link::Log, Some(trials)) = (likelihood.link(), &mut trials) {
            // Rates are relative to the window's own.
            shift = log_rate(&wide(&y), &wide(trials));
            let rate = shift.exp();
            trials.iter_mut().for_each(|t| *t = (f64::from(*t) * rate) as f32);
        }
        let n = rows.len();
        let tensor = |x: Vec<f32>| -> Result<Tensor> {
            Ok(Tensor::from_vec(x, (1, n), &self.device)?.to_dtype(self.dtype)?)
        };
        let sites = Sites::plane(&xy, &self.device)?.map(|s| Ok(s.to_dtype(self.dtype)?))?;
        let trials = trials.map(&tensor).transpose()?;
        let context = Observations::new(sites, tensor(y)?.unsqueeze(2)?, trials)?;
        Ok(Ready { posterior: self.owner.inner.condition(&context)?, shift, scale })
    }

    /// What window `at` says of `places`.
    fn ask(&self, at: u32, places: &[[f64; 2]]) -> Result<Said> {
        let ready = self.ready(at)?;
        let window = &self.windows[at as usize];
        let mut said: Option<Said> = None;
        for part in places.chunks(TARGETS) {
            let xy: Vec<[f64; 2]> = part.iter().map(|p| window.framed(*p)).collect();
            let sites = Sites::plane(&xy, &self.device)?.map(|s| Ok(s.to_dtype(self.dtype)?))?;
            let p = ready.posterior.at(&sites)?;
            let host = |x: &Tensor| -> Result<Vec<f32>> {
                Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
            };
            let scaled = |x: &Tensor| -> Result<Vec<f32>> {
                let scale = |v: f32| (f64::from(v) * ready.scale) as f32;
                Ok(host(x)?.into_iter().map(scale).collect())
            };
            let lift = p.lift.as_ref().map(&scaled).transpose()?;
            let mean = host(&p.mean)?;
            let level = |v: f32| (ready.shift + ready.scale * f64::from(v)) as f32;
            let mean: Vec<f32> = mean.into_iter().map(level).collect();
            let said = said.get_or_insert_with(|| Said {
                components: p.mean.dims()[2],
                link: p.link,
                log_weight: Vec::new(),
                mean: Vec::new(),
                surface_sd: Vec::new(),
                observation_sd: Vec::new(),
                lift: lift.is_some().then(Vec::new),
            });
            said.log_weight.extend(host(&p.log_weight)?);
            said.mean.extend(mean);
            said.surface_sd.extend(scaled(&p.surface_sd)?);
            said.observation_sd.extend(scaled(&p.observation_sd)?);
            if let (Some(all), Some(lift)) = (&mut said.lift, lift) {
                all.extend(lift);
            }
        }
        said.ok_or_else(|| Error::input("a window was asked nothing"))
    }
}

impl Window {
    fn framed(&self, place: [f64; 2]) -> [f64; 2] {
        [0, 1].map(|d| (place[d] - self.middle[d]) / self.unit)
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        if targets.batch() != 1 || targets.s.dims()[2] != 2 {
            return Err(Error::axis(
                "targets of windows, [row, coordinate]",
                format!("[{}, {}]", targets.batch(), targets.s.dims()[2]),
                "[1, 2]",
            ));
        }
        let places: Vec<[f64; 2]> =
            targets.host()?.iter().flatten().map(|s| [s[0], s[1]]).collect();
        let slots = self.owner.cut.blend.min(self.windows.len());
        let mut asks: Vec<Asks> = places
            .par_chunks(1024)
            .enumerate()
            .flat_map_iter(|(chunk, places)| {
                let mut found = Found::new();
                let mut asks = Vec::with_capacity(places.len() * slots);
                for (i, place) in places.iter().enumerate() {
                    self.ranking.weights(*place, slots, &mut found);
                    found.sort_by_key(|(_, window)| *window);
                    let place = (1024 * chunk + i) as u32;
                    asks.extend(found.iter().enumerate().map(|(slot, (weight, window))| Asks {
                        window: *window,
                        place,
                        slot: slot as u32,
                        weight: *weight as f32,
                    }));
                }
                asks
            })
            .collect();
        asks.sort_unstable_by_key(|a| (a.window, a.place));
        let groups: Vec<&[Asks]> = asks.chunk_by(|a, b| a.window == b.window).collect();
        let said: Vec<Said> = groups
            .par_iter()
            .map(|group| {
                let there: Vec<[f64; 2]> = group.iter().map(|a| places[a.place as usize]).collect();
                self.ask(group[0].window, &there)
            })
            .collect::<Result<_>>()?;
        self.blend(places.len(), slots, &groups, &said, targets)
    }
}

impl Conditioned<'_> {
    /// The mixture of what the windows say.
    fn blend(
        &self,
        places: usize,
        slots: usize,
        groups: &[&[Asks]],
        said: &[Said],
        targets: &Sites,
    ) -> Result<Predictive> {
        let Some(any) = said.first() else {
            return Err(Error::input("windows were asked about no place"));
        };
        let c = any.components;
        let width = slots * c;
        let parts = 4 + usize::from(any.lift.is_some());
        let mut out: Vec<Vec<f32>> = vec![vec![f32::NAN; places * width]; parts];
        out[0] = vec![NONE; places * width];
        for (group, said) in groups.iter().zip(said) {
            for (i, ask) in group.iter().enumerate() {
                let from = i * c..(i + 1) * c;
                let at = ask.place as usize * width + ask.slot as usize * c;
                let log = ask.weight.ln();
                for (to, v) in out[0][at..at + c].iter_mut().zip(&said.log_weight[from.clone()]) {
                    *to = v + log;
                }
                let rest = [&said.mean, &said.surface_sd, &said.observation_sd];
                for (out, values) in out[1..].iter_mut().zip(rest.into_iter().chain(&said.lift)) {
                    out[at..at + c].copy_from_slice(&values[from.clone()]);
                }
            }
        }
        // Slots that no window takes have no weight, and some law all the same: the first's.
        let (weights, rest) = out.split_at_mut(1);
        for out in rest {
            for (row, weight) in out.chunks_mut(width).zip(weights[0].chunks(width)) {
                for i in c..width {
                    if weight[i] == NONE {
                        row[i] = row[i - c];
                    }
                }
            }
        }
        let tensor = |x: Vec<f32>| -> Result<Tensor> {
            let x = Tensor::from_vec(x, (1, places, width), targets.s.device())?;
            Ok(x.to_dtype(targets.s.dtype())?)
        };
        let mut out = out.into_iter().map(tensor);
        let mut next = || out.next().expect("made above");
        Ok(Predictive {
            link: any.link,
            log_weight: next()?,
            mean: next()?,
            surface_sd: next()?,
            observation_sd: next()?,
            lift: if parts > 4 { Some(next()?) } else { None },
            law: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::Checkpoint, likelihood, predictive::Of, rng::Stream};

    /// Sites of every sort that surveys have, `[site]`.
    fn layout(kind: usize, n: usize, rng: &mut Stream) -> Vec<[f64; 2]> {
        (0..n)
            .map(|i| match (kind, i % 10) {
                // Evenly; a city and the land around it; one place over and over; a line; one far away;
                // villages.
                (1, 0..7) => [0.3 + 0.01 * rng.normal(), -0.2 + 0.01 * rng.normal()],
                (2, 0..9) => [0.25, 0.5],
                (3, _) => [rng.uniform(-1.0, 1.0), 0.125],
                (4, _) if i == 17 => [1000.0, -300.0],
                (5, _) => [0.1 * (i % 7) as f64, 0.1 * (i % 11) as f64],
                _ => [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)],
            })
            .collect()
    }

    fn seen(sites: &[[f64; 2]]) -> Seen {
        let mut rng = Stream::new(5, "values", 0);
        let y: Vec<f32> = (0..sites.len()).map(|_| rng.normal() as f32).collect();
        let y = Tensor::from_vec(y, (1, sites.len(), 1), &Device::Cpu).unwrap();
        let sites = Sites::plane(sites, &Device::Cpu).unwrap();
        Seen::of(&Observations::new(sites, y, None).unwrap()).unwrap()
    }

    /// No window is larger than was asked for, and no place is in none.
    #[test]
    fn windows_hold_what_they_may_and_leave_nobody_out() {
        let mut rng = Stream::new(1, "cut", 0);
        for kind in 0..6 {
            for (n, sites) in [(10, 64), (900, 64), (5_000, 200)] {
                let seen = seen(&layout(kind, n, &mut rng));
                let cut = Cut::of(sites);
                let windows = cut.windows(&seen);
                let mut held = vec![false; seen.len()];
                for w in &windows {
                    let rows: usize = w.places.iter().map(|i| seen.rows(*i).len()).sum();
                    assert!(rows <= sites, "layout {kind}: {rows} rows in a window of {sites}");
                    assert!(w.unit > 0.0 && w.reach > 0.0, "layout {kind}: {} {}", w.unit, w.reach);
                    w.places.iter().for_each(|i| held[*i as usize] = true);
                    let mut twice = w.places.clone();
                    twice.sort_unstable();
                    twice.dedup();
                    assert_eq!(twice.len(), w.places.len(), "layout {kind}: a place twice");
                }
                let out = held.iter().filter(|h| !**h).count();
                assert_eq!(out, 0, "layout {kind}, {n} sites: {out} of {} places", seen.len());
                // As many as a constant share of the sites: time and memory are linear.
                assert!(windows.len() <= 2 + n / 4, "{} windows of {n} sites", windows.len());
            }
        }
    }

    /// The tree is a short cut, and never changes who answers.
    #[test]
    fn the_ranking_finds_what_looking_at_every_window_finds() {
        let mut rng = Stream::new(2, "ranking", 0);
        let windows: Vec<([f64; 2], f64)> = (0..700)
            .map(|_| {
                let reach = rng.log_uniform(0.003, 2.0);
                ([rng.uniform(-1.0, 1.0), rng.uniform(-0.3, 0.3)], reach)
            })
            .collect();
        let ranking = Ranking::new(windows.clone());
        let mut found = Found::new();
        for i in 0..2_000 {
            let far = if i % 5 == 0 { 1e4 } else { 1.2 };
            let place = [rng.uniform(-far, far), rng.uniform(-far, far)];
            ranking.first(place, 4, &mut found);
            let mut all: Found = windows
                .iter()
                .enumerate()
                .map(|(i, (c, reach))| {
                    let square = (c[0] - place[0]).powi(2) + (c[1] - place[1]).powi(2);
                    (score(square, *reach), i as u32)
                })
                .collect();
            all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            all.truncate(4);
            assert_eq!(found, all, "at {place:?}");
        }
    }

    /// Weights sum to one and change by less than the place does, whoever comes and goes.
    #[test]
    fn weights_fade_and_never_jump() {
        let mut rng = Stream::new(3, "weights", 0);
        let mut handed = 0;
        for kind in [0, 1, 4] {
            let seen = seen(&layout(kind, 3_000, &mut rng));
            let windows = Cut::of(100).windows(&seen);
            let least = windows.iter().map(|w| w.reach).fold(f64::INFINITY, f64::min);
            let ranking = Ranking::new(windows.iter().map(|w| (w.centre, w.reach)).collect());
            let mut found = Found::new();
            let mut at = |place: [f64; 2]| -> HashMap<u32, f64> {
                ranking.weights(place, 3, &mut found);
                found.iter().map(|(weight, window)| (*window, *weight)).collect()
            };
            let step = 1e-3 * least;
            let mut most = 0f64;
            for _ in 0..3_000 {
                let from = [rng.uniform(-1.1, 1.1), rng.uniform(-1.1, 1.1)];
                let (a, b) = (at(from), at([from[0] + step, from[1]]));
                let total: f64 = a.values().sum();
                assert!((total - 1.0).abs() < 1e-12 && a.len() <= 3, "{a:?}");
                handed += usize::from(a.keys().any(|w| !b.contains_key(w)));
                for window in a.keys().chain(b.keys()) {
                    let of = |x: &HashMap<u32, f64>| x.get(window).copied().unwrap_or(0.0);
                    most = most.max((of(&a) - of(&b)).abs());
                }
            }
            // A thousandth of the smallest reach at a time: the steepest weight takes 1/20 of a reach.
            // Weights are divided by their sum, which adds a little.
            assert!(most < 0.03, "layout {kind}: a weight jumps by {most}");
        }
        assert!(handed > 5, "windows come and go {handed} times only");
    }

    /// Along a line in steps far finer than any window the map moves in small steps, whoever comes and goes;
    /// where each place asks one window alone, it jumps.
    #[test]
    fn a_map_has_no_seams() -> Result<()> {
        let mut rng = Stream::new(4, "seams", 0);
        let sites = layout(1, 2_500, &mut rng);
        let wave = |p: &[f64; 2]| ((3.0 * p[0]).sin() + (4.0 * p[1]).cos()) as f32;
        let y: Vec<f32> = sites.iter().map(|p| wave(p) + 0.3 * rng.normal() as f32).collect();
        let y = Tensor::from_vec(y, (1, sites.len(), 1), &Device::Cpu)?;
        let context = Observations::new(Sites::plane(&sites, &Device::Cpu)?, y, None)?;
        let network: Arc<dyn Process + Send + Sync> =
            Checkpoint::resolve("continuous")?.process(&Device::Cpu)?.into();
        let gaussian = likelihood::find("gaussian")?;
        const STEPS: usize = 6_000;
        let place = |k: usize| [0.9 * k as f64 / STEPS as f64 - 0.4, 0.07];
        let line: Vec<[f64; 2]> = (0..STEPS).map(place).collect();
        // The largest steps of mean and sd.
        let steps = |blend: usize| -> Result<[f64; 2]> {
            let cut = Cut { blend, ..Cut::of(150) };
            let process = Windows::new(network.clone(), gaussian, cut)?;
            let posterior = process.condition(&context)?;
            let m = posterior.at(&Sites::plane(&line, &Device::Cpu)?)?;
            let m = m.marginals(0, Of::Surface)?;
            let told: Vec<(f64, f64)> = (0..m.len()).map(|i| m.mean_sd(i)).collect();
            Ok(told.windows(2).fold([0.0; 2], |[mean, sd], pair| {
                let (a, b) = (pair[0], pair[1]);
                [f64::max(mean, (a.0 - b.0).abs()), f64::max(sd, (a.1 - b.1).abs())]
            }))
        };
        let (blended, alone) = (steps(3)?, steps(1)?);
        for (what, blended, alone) in
            [("means", blended[0], alone[0]), ("sds", blended[1], alone[1])]
        {
            assert!(blended < 0.25 * alone, "{what}: {blended} blended, {alone} alone");
        }
        Ok(())
    }

    #[test]
    fn a_cut_that_is_none_is_refused() {
        struct Any;
        impl Process for Any {
            fn condition<'a>(&'a self, _: &Observations) -> Result<Box<dyn Posterior + 'a>> {
                unreachable!("never conditioned")
            }
        }
        let gaussian = likelihood::find("gaussian").unwrap();
        let ok = Cut::of(100);
        for cut in
            [Cut::of(3), Cut { cell: 0.0, ..ok }, Cut { blend: 0, ..ok }, Cut { span: 0.0, ..ok }]
        {
            assert!(Windows::new(Arc::new(Any), gaussian, cut).is_err(), "{cut:?}");
        }
        assert!(Windows::new(Arc::new(Any), gaussian, Cut::of(100)).is_ok());
    }
}
