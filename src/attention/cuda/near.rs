//! A context on a card that many queries will read: in an order in which neighbours lie together, so that
//! blocks of queries leave out what need not be read.
//!
//! The same two ways as on the host (src/attention/reader.rs): blocks of keys outside a compact support,
//! exactly, and, where a share ε of the weight may be lost, blocks too faint to matter. Which blocks are
//! worth a look is found here, on the host, from boxes around them; which of those are too faint, by the
//! kernel, from what it has read. Where nothing can be left out, scan attention reads it all.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::{Chosen, KEYS, Places, Problem};
use crate::{
    attention::{
        Bias, CHUNK, Keys, Reading, Start, Tally,
        bias::geometry,
        reader::{Boxes, Envelope, along_curve, extent},
        scan,
    },
    error::Result,
};

/// A context of one layer on a card.
pub(in crate::attention) struct Context {
    /// As it was given, or in the order of `parts`.
    keys: Keys,
    bias: Option<Bias>,
    parts: Option<Parts>,
    read: AtomicU64,
    all: AtomicU64,
}

/// What it takes to leave out keys.
struct Parts {
    /// `[batch, context, dim]`: keys as points.
    points: Tensor,
    /// Boxes around tiles of keys, row by row.
    boxes: Vec<Boxes>,
    /// Keys that are observed, row by row.
    seen: Vec<usize>,
    /// `[batch, tile, head]` and `[batch, head]`: longest keys.
    norm: Tensor,
    longest: Tensor,
    /// `[head]`: squared straight line from which on nothing is read; and the largest of them.
    reach2: Tensor,
    farthest: f32,
    /// `[head, cell]`: the largest bias at or beyond a squared straight line.
    envelope: Tensor,
    /// Share of the weight that may be lost.
    lose: f64,
    /// What each question read, on the card until somebody asks.
    tallies: Mutex<Vec<Tensor>>,
}

impl Context {
    /// Keys `[batch, context, head, d]`, values `[batch, context, head, w]`, sites and mask.
    pub fn new(
        [k, v, sites, mask]: [&Tensor; 4],
        bias: Option<&Bias>,
        reading: Reading,
    ) -> Result<Context> {
        let keys = Keys::pack(k, v, sites, mask)?.read_in(reading.precision);
        let bias = bias.cloned();
        let sparse = match &bias {
            Some(bias) => Parts::new(&keys, bias, reading)?,
            None => None,
        };
        let (keys, parts) = match sparse {
            Some((keys, parts)) => (keys, Some(parts)),
            None => (keys, None),
        };
        Ok(Context { keys, bias, parts, read: AtomicU64::new(0), all: AtomicU64::new(0) })
    }

    /// Answers `[batch, target, head, w]` of queries `[batch, target, head, d]`.
    pub fn read(&self, q: &Tensor, sites: &Tensor) -> Result<Tensor> {
        let (batch, targets, heads, d) = q.dims4()?;
        let pairs = |keys: usize| (targets * keys * heads) as u64;
        if let (Some(parts), Some(bias), true) = (&self.parts, &self.bias, targets > 0) {
            let all = parts.seen.iter().map(|seen| pairs(*seen)).sum();
            self.all.fetch_add(all, Ordering::Relaxed);
            let problem = Problem {
                batch,
                targets,
                context: self.keys.len(),
                heads,
                d,
                w: self.keys.value_width(),
                dim: parts.points.dims()[2],
                terms: &bias.terms,
                metric: bias.metric,
            };
            return parts.read(&problem, &self.keys, bias, q, sites);
        }
        let all = batch as u64 * pairs(self.keys.len());
        self.read.fetch_add(all, Ordering::Relaxed);
        self.all.fetch_add(all, Ordering::Relaxed);
        scan(q, sites, &self.keys, self.bias.as_ref(), CHUNK, Start::Exact)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.keys.packed.elem_count() * size_of::<f32>()
    }

    /// How much was read so far. A pair of a tile counts as read, whether there is a key or not.
    pub fn tally(&self) -> Tally {
        if let Some(parts) = &self.parts {
            // A panic elsewhere cannot leave half a list behind.
            let mut tallies = parts.tallies.lock().unwrap_or_else(PoisonError::into_inner);
            for tally in tallies.drain(..) {
                let tiles = tally.to_vec1::<i64>().map_or(0, |n| n[0] as u64);
                self.read.fetch_add(tiles * KEYS as u64, Ordering::Relaxed);
            }
        }
        let load = |x: &AtomicU64| x.load(Ordering::Relaxed);
        Tally { read: load(&self.read).min(load(&self.all)), all: load(&self.all) }
    }
}

impl Parts {
    /// The context in an order in which tiles are compact; nothing where all is to be read, or where
    /// no kernel reads less.
    fn new(keys: &Keys, bias: &Bias, reading: Reading) -> Result<Option<(Keys, Parts)>> {
        let (batch, context, heads, _) = keys.packed.dims4()?;
        let radial = bias.host()?;
        let reach2: Vec<f32> = (0..heads)
            // A little farther than the support: rounding may not cut off what still has weight.
            .map(|h| (radial.support_straight(h) * 1.000_001).powi(2) as f32)
            .collect();
        let points = geometry(&keys.sites, bias.metric)?.contiguous()?;
        let dim = points.dims()[2];
        let (terms, metric) = (&bias.terms[..], bias.metric);
        let (d, w) = (keys.width, keys.value_width());
        let problem = Problem { batch, targets: 1, context, heads, d, w, dim, terms, metric };
        let sparse = reading.lose > 0.0 || reach2.iter().any(|r| r.is_finite());
        if !sparse || !problem.has_near() {
            return Ok(None);
        }
        let across = keys.sites.dims()[2];
        let host = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        let (sites, places, mask) = (host(&keys.sites)?, host(&points)?, host(&keys.mask)?);
        let rows: Vec<Vec<u32>> = (0..batch)
            .map(|row| {
                let all = row * context..(row + 1) * context;
                let seen = (0..context as u32).filter(|j| mask[all.start + *j as usize] != 0.0);
                along_curve(&sites[all.start * across..], across, seen.collect())
            })
            .collect();
        let most = rows.iter().map(Vec::len).max().unwrap_or(0);
        if most == 0 {
            return Ok(None);
        }
        let len = most.next_multiple_of(KEYS);
        let (mut ids, mut observed) = (Vec::new(), Vec::new());
        for (row, order) in rows.iter().enumerate() {
            // What fills up a row is hidden.
            let padded = order.iter().copied().chain(std::iter::repeat(0)).take(len);
            ids.extend(padded.map(|j| (row * context) as u32 + j));
            observed.extend((0..len).map(|j| if j < order.len() { 1.0f32 } else { 0.0 }));
        }
        let boxes = rows
            .iter()
            .enumerate()
            .map(|(row, order)| {
                Boxes::around(dim, len / KEYS, |tile, i| {
                    let within = order.iter().skip(tile * KEYS).take(KEYS);
                    let at = |j: &u32| &places[(row * context + *j as usize) * dim + i];
                    extent(within.map(at))
                })
            })
            .collect();
        let device = keys.packed.device();
        let ids = Tensor::from_vec(ids, batch * len, device)?;
        let pick = |x: &Tensor| -> Result<Tensor> {
            let picked = x.contiguous()?.flatten(0, 1)?.index_select(&ids, 0)?;
            Ok(picked.reshape([&[batch, len], &x.dims()[2..]].concat())?)
        };
        let sorted = Keys {
            packed: pick(&keys.packed)?,
            sites: pick(&keys.sites)?,
            mask: Tensor::from_vec(observed, (batch, len), device)?,
            ..keys.clone()
        };
        // A little longer, for the rounding of what is compared with them.
        let norm = (sorted.k()?.sqr()?.sum(D::Minus1)?.sqrt()? * 1.000_01)?
            .reshape((batch, len / KEYS, KEYS, heads))?
            .max(2)?;
        let envelope = Envelope::new(heads, Some(&radial)).cells.into_vec();
        let parts = Parts {
            points: pick(&points)?,
            boxes,
            seen: rows.iter().map(Vec::len).collect(),
            longest: norm.max(1)?.contiguous()?,
            norm: norm.contiguous()?,
            farthest: reach2.iter().fold(0.0f32, |m, r| m.max(*r)),
            reach2: Tensor::from_vec(reach2, heads, device)?,
            envelope: Tensor::from_vec(envelope, (heads, Envelope::CELLS), device)?,
            lose: reading.lose,
            tallies: Mutex::new(Vec::new()),
        };
        Ok(Some((sorted, parts)))
    }

    fn read(
        &self,
        problem: &Problem,
        keys: &Keys,
        bias: &Bias,
        q: &Tensor,
        sites: &Tensor,
    ) -> Result<Tensor> {
        let Problem { batch, targets, heads, w, dim, .. } = *problem;
        let (sites, across) = (sites.contiguous()?, sites.dims()[2]);
        let points = geometry(&sites, bias.metric)?.contiguous()?;
        let host = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        let (given, places) = (host(&sites)?, host(&points)?);
        let mut lists = Lists { from: vec![0], ..Lists::default() };
        let mut order = Vec::with_capacity(batch * targets);
        for (row, boxes) in self.boxes.iter().enumerate() {
            let part = |x: usize| row * targets * x..(row + 1) * targets * x;
            let numbers = along_curve(&given[part(across)], across, (0..targets as u32).collect());
            lists.add(
                boxes,
                &places[part(dim)],
                &numbers,
                problem.queries_of_near(),
                self.farthest,
            );
            order.extend(numbers);
        }
        let device = q.device();
        let whole = |mut values: Vec<u32>| {
            values.resize(values.len().max(1), 0);
            let count = values.len();
            Tensor::from_vec(values, count, device)
        };
        lists.gap2.resize(lists.gap2.len().max(1), 0.0);
        let count = lists.gap2.len();
        let tally = Tensor::zeros(1, DType::I64, device)?;
        let chosen = Chosen {
            from: &whole(lists.from)?,
            tile: &whole(lists.tile)?,
            gap2: &Tensor::from_vec(lists.gap2, count, device)?,
            order: &whole(order)?,
            reach2: &self.reach2,
            envelope: &self.envelope,
            norm: &self.norm,
            longest: &self.longest,
            tally: &tally,
            // Each key left out adds less than its part of ε, so all together less than ε.
            share: (self.lose / *self.seen.iter().max().unwrap_or(&1) as f64) as f32,
        };
        let places = Places::new(&points, &self.points, &keys.mask)?;
        let q = q.contiguous()?;
        let params = bias.params.contiguous()?;
        let out = super::near(problem, &places, [&q, &keys.packed, &params], &chosen)?;
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner).push(tally);
        Ok(out.reshape((batch, targets, heads, w))?)
    }
}

/// Tiles of keys that blocks of queries are to look at.
#[derive(Default)]
struct Lists {
    /// Where the list of each block begins; the last is where all end.
    from: Vec<u32>,
    /// Tiles, nearest first, and their squared straight line from the block.
    tile: Vec<u32>,
    gap2: Vec<f32>,
}

impl Lists {
    /// Adds the lists of all queries of a row, in their `order`, `each` to a block.
    fn add(&mut self, boxes: &Boxes, points: &[f32], order: &[u32], each: usize, farthest: f32) {
        let dim = points.len() / order.len().max(1);
        let lists: Vec<Vec<(f32, u32)>> = order
            .par_chunks(each)
            .map(|block| {
                let sides: Vec<[f32; 2]> = (0..dim)
                    .map(|i| extent(block.iter().map(|q| &points[*q as usize * dim + i])))
                    .collect();
                let mut list = Vec::new();
                boxes.near(&sides, farthest, true, &mut list);
                list
            })
            .collect();
        for list in lists {
            self.tile.extend(list.iter().map(|(_, tile)| *tile));
            self.gap2.extend(list.iter().map(|(gap2, _)| *gap2));
            self.from.push(self.tile.len() as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// No key within reach is missing from the list of its query's block, and lists are sorted.
    #[test]
    fn lists_name_every_tile_within_reach() {
        let mut rng = Stream::new(5, "near", 0);
        let mut places =
            |n: usize| -> Vec<f32> { rng.normals(2 * n).iter().map(|x| *x as f32).collect() };
        let (keys, queries) = (places(300), places(200));
        let sorted = along_curve(&keys, 2, (0..300).collect());
        let boxes = Boxes::around(2, 10, |tile, i| {
            let within = sorted.iter().skip(tile * KEYS).take(KEYS);
            extent(within.map(|j| &keys[*j as usize * 2 + i]))
        });
        let order = along_curve(&queries, 2, (0..200).collect());
        let farthest = 0.25f32;
        let mut lists = Lists { from: vec![0], ..Lists::default() };
        lists.add(&boxes, &queries, &order, 64, farthest);
        assert_eq!(lists.from.len(), 5);
        let mut named = 0;
        for (block, members) in order.chunks(64).enumerate() {
            let list = lists.from[block] as usize..lists.from[block + 1] as usize;
            let (tiles, gaps) = (&lists.tile[list.clone()], &lists.gap2[list]);
            assert!(gaps.is_sorted() && gaps.iter().all(|g| *g < farthest));
            named += tiles.len();
            for q in members {
                for (at, key) in sorted.iter().enumerate() {
                    let gap = |i: usize| queries[*q as usize * 2 + i] - keys[*key as usize * 2 + i];
                    let d2 = gap(0).powi(2) + gap(1).powi(2);
                    let listed = tiles.iter().position(|t| *t as usize == at / KEYS);
                    assert!(d2 >= farthest || listed.is_some_and(|i| gaps[i] <= d2 * 1.0001));
                }
            }
        }
        assert!(named < 40, "nothing is left out");
    }
}
