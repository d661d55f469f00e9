//! Kriging of places from their nearest neighbours, eight side by side.
//!
//! Sources: Vecchia (1988), doi:10.1111/j.2517-6161.1988.tb01729.x; Guinness (2018),
//! arXiv:1609.05372, for the order of the sites; Rasmussen & Williams (2006), section 2.7, for a mean
//! that is linear in known functions of the place.

use std::collections::HashMap;

use rayon::prelude::*;

use super::{
    elimination::{LANES, LEVELS, Lane, eliminate, row_of, weigh},
    exact_gp::Row,
    neighbours::{Found, Tree, spread},
};
use crate::kernel::Kernel;

/// Places of one piece of work. Sums over pieces run in their order, whatever the threads.
pub(super) const CHUNK: usize = 64 * LANES;

/// How many times fewer sites are in the thinner parts that some neighbours are taken from.
///
/// Measured on four lattices of 105,000 sites under clouds, 60 neighbours: CRPS 0.7 to 2.1 % lower than from
/// as many nearest; on sites without gaps up to 0.1 % higher.
const THIN: usize = 8;
const THINNER: usize = 32;

/// One number for each level of the mean.
pub(super) type Levels = [f64; LEVELS];

/// The sites of one row in their order, with what was seen at each.
pub(super) struct Ordered {
    dim: usize,
    sites: Vec<f64>,
    /// Observations, in the order of the sites they were made at.
    pub y: Vec<f64>,
    pub trials: Vec<f64>,
    /// The site of each observation.
    pub at: Vec<u32>,
    /// The number of each observation in the row.
    pub number: Vec<usize>,
    /// What the plane is mapped by before sites are near: see [`Kernel::unstretch`].
    unstretch: Option<[f64; 4]>,
    /// Sites where they are near.
    flat: Vec<f64>,
    tree: Tree,
}

/// Neighbours of every site, nearest first.
pub(super) struct Lists {
    most: usize,
    flat: Vec<u32>,
    len: Vec<u32>,
}

/// What is asked: a place with its neighbours.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    place: &'a [f64],
    neighbours: &'a [u32],
    /// How far each fades out, where there are others beyond: noise added to its own, relative.
    fade: &'a [f64],
}

/// What neighbours with kriging weights w say of a place: `value = Σ w z` of their deviations,
/// `levels = x − Σ w x` of what the mean is made of, and what is left of the surface's variance.
#[derive(Clone, Copy, Default)]
pub(super) struct Said {
    pub value: f64,
    pub levels: Levels,
    pub variance: f64,
}

/// The most neighbours of any place.
fn most(asked: &[Asked]) -> usize {
    asked.iter().map(|a| a.neighbours.len()).max().unwrap_or(0)
}

/// Values at sites, deviations from the prior mean, and the noise of each.
#[derive(Clone, Copy)]
pub(super) struct Heard<'a> {
    pub value: &'a [f64],
    pub noise: &'a [f64],
}

/// Neighbours and what each weighs.
pub(super) type Weights = Vec<(u32, f64)>;

/// Room for the covariances of one block, used again and again.
#[derive(Default)]
pub(super) struct Room {
    lower: Vec<Lane>,
    kept: Vec<Lane>,
    value: Vec<Lane>,
    level: Vec<Lane>,
    x: Vec<f64>,
    y: Vec<f64>,
    columns: Vec<f64>,
    pub found: Found,
}

/// What kriging needs to know: a covariance, and how many levels the mean has.
#[derive(Clone, Copy)]
pub(super) struct Kriging<'a> {
    pub kernel: &'a dyn Kernel,
    pub levels: usize,
}

/// What the mean is made of at a place: 1, and its coordinates on the plane.
pub(super) fn levels(place: &[f64]) -> Levels {
    [1.0, place.first().copied().unwrap_or(0.0), place.get(1).copied().unwrap_or(0.0)]
}

impl Ordered {
    /// Every observation at a site of its own; or, `shared`, those at one place at one.
    pub fn of(row: &Row, kernel: &dyn Kernel, shared: bool) -> Self {
        let unstretch = kernel.unstretch();
        let mapped: Vec<Vec<f64>> = row.sites.iter().map(|site| map(unstretch, site)).collect();
        let order = spread(&mapped, &twins(row));
        let dim = row.sites.first().map_or(0, Vec::len);
        let pick = |x: &[f64]| order.iter().filter_map(|i| x.get(*i).copied()).collect();
        let (y, trials) = (pick(&row.y), pick(&row.trials));
        let mut kept = Vec::with_capacity(order.len());
        let mut at = Vec::with_capacity(order.len());
        let mut places = HashMap::new();
        for i in &order {
            let site = &row.sites[*i];
            let bits: Vec<u64> = site.iter().map(|c| (c + 0.0).to_bits()).collect();
            let next = kept.len() as u32;
            let place = if shared { *places.entry(bits).or_insert(next) } else { next };
            if place == next {
                kept.push(*i);
            }
            at.push(place);
        }
        let sites: Vec<f64> = kept.iter().flat_map(|i| row.sites[*i].iter().copied()).collect();
        let flat: Vec<f64> = kept.iter().flat_map(|i| mapped[*i].iter().copied()).collect();
        let tree = Tree::new(&flat, dim);
        Ordered { dim, sites, y, trials, at, number: order, unstretch, flat, tree }
    }

    /// The first sites alone.
    pub fn first(&self, sites: usize) -> Self {
        let kept: Vec<usize> =
            (0..self.y.len()).filter(|i| (self.at[*i] as usize) < sites).collect();
        let pick = |x: &[f64]| kept.iter().filter_map(|i| x.get(*i).copied()).collect();
        let flat = self.flat[..sites * self.dim].to_vec();
        Ordered {
            dim: self.dim,
            sites: self.sites[..sites * self.dim].to_vec(),
            y: pick(&self.y),
            trials: pick(&self.trials),
            at: kept.iter().map(|i| self.at[*i]).collect(),
            number: kept.iter().map(|i| self.number[*i]).collect(),
            unstretch: self.unstretch,
            tree: Tree::new(&flat, self.dim),
            flat,
        }
    }

    /// Sites.
    pub fn len(&self) -> usize {
        self.sites.len().checked_div(self.dim).unwrap_or(0)
    }

    pub fn dim(&self) -> usize {
        self.dim
    }

    pub fn site(&self, i: usize) -> &[f64] {
        &self.sites[i * self.dim..][..self.dim]
    }

    fn flat(&self, i: usize) -> &[f64] {
        &self.flat[i * self.dim..][..self.dim]
    }

    /// At most `most` neighbours of every site among those before it.
    pub fn lists(&self, most: usize) -> Lists {
        let found: Vec<Vec<u32>> = (0..self.len())
            .into_par_iter()
            .map_init(Found::new, |found, i| {
                self.tree.nearest(self.flat(i), most, i, found);
                found.iter().map(|(_, j)| *j).collect()
            })
            .collect();
        let len = found.iter().map(|list| list.len() as u32).collect();
        let mut flat = vec![0; most * found.len()];
        for (slot, list) in flat.chunks_exact_mut(most.max(1)).zip(&found) {
            slot[..list.len()].copy_from_slice(list);
        }
        Lists { most, flat, len }
    }

    /// The `near` sites before `end` nearest to site `i`, itself first.
    pub fn around_site(&self, i: usize, near: usize, end: usize, found: &mut Found) {
        self.tree.nearest(self.flat(i), near, end, found);
    }

    /// `near` sites to krige places from: the nearest, and the nearest of thinner and thinner parts of
    /// all, which stand around a gap where the nearest are on one side of it.
    pub fn around(&self, places: &[&[f64]], near: usize, found: &mut Found) -> Around {
        let one = |place: &&[f64]| {
            let place = map(self.unstretch, place);
            let mut kept: Vec<(u32, f64)> = Vec::with_capacity(near);
            let whole = [(1, near)];
            let far = near / 4;
            let parts = [(1, near - 2 * far), (THIN, far), (THINNER, far)];
            for (thin, most) in if near < self.len() { &parts[..] } else { &whole[..] } {
                let end = self.len() / thin;
                self.tree.nearest(&place, *most, end, found);
                let from = |i: usize| found[i].0.sqrt();
                let cut = *most > 3 && *most < end;
                let range = cut.then(|| [from(most / 2), from(most - 1)]);
                let fade = |square: f64| range.map_or(0.0, |range| faded(square.sqrt(), range));
                for (square, i) in found.iter() {
                    match kept.iter_mut().find(|(j, _)| j == i) {
                        Some((_, before)) => *before = before.min(fade(*square)),
                        None => kept.push((*i, fade(*square))),
                    }
                }
            }
            kept.into_iter().unzip()
        };
        Around(places.iter().map(one).collect())
    }

    pub fn asked<'a>(&'a self, lists: &'a Lists, i: u32) -> Asked<'a> {
        let i = i as usize;
        Asked { place: self.site(i), neighbours: lists.of(i), fade: &[] }
    }

    /// A length that the sites span, which a few far ones do not stretch; their `last` numbers are no
    /// coordinates.
    pub fn extent(&self, last: usize) -> f64 {
        let side = |d: usize| {
            let mut c: Vec<f64> = (0..self.len()).map(|i| self.site(i)[d]).collect();
            c.sort_by(f64::total_cmp);
            let cut = c.len() / 100;
            let whole = c.last().zip(c.first()).map_or(0.0, |(b, a)| b - a);
            let most = c.get(c.len().saturating_sub(1 + cut)).zip(c.get(cut));
            (most.map_or(0.0, |(b, a)| b - a), whole)
        };
        let sides: Vec<(f64, f64)> = (0..self.dim.saturating_sub(last)).map(side).collect();
        let most = sides.iter().map(|s| s.0).fold(0.0, f64::max);
        if most > 0.0 { most } else { sides.iter().map(|s| s.1).fold(0.0, f64::max) }
    }
}

/// A place where it is near to others.
fn map(unstretch: Option<[f64; 4]>, place: &[f64]) -> Vec<f64> {
    match (unstretch, place) {
        (Some([xx, xy, yx, yy]), [x, y]) => vec![xx * x + xy * y, yx * x + yy * y],
        // A time stands behind the coordinates.
        (Some([xx, xy, yx, yy]), [x, y, t]) => vec![xx * x + xy * y, yx * x + yy * y, *t],
        _ => place.to_vec(),
    }
}

/// What tells two observations at one place apart, so that their listing never does.
fn twins(row: &Row) -> Vec<f64> {
    let trials = |i: usize| row.trials.get(i).copied().unwrap_or(0.0);
    (0..row.y.len()).map(|i| row.y[i] + 0.618_033_988_749_894_9 * trials(i)).collect()
}

/// At most `most` of the numbers below n, evenly spread.
pub(super) fn spaced(n: usize, most: usize) -> Vec<u32> {
    let kept = n.min(most);
    (0..kept).map(|j| (j * n / kept) as u32).collect()
}

impl Lists {
    pub fn of(&self, i: usize) -> &[u32] {
        &self.flat[i * self.most..][..self.len[i] as usize]
    }
}

/// Neighbours of up to [`LANES`] places, and how far each fades out.
pub(super) struct Around(Vec<(Vec<u32>, Vec<f64>)>);

impl Around {
    pub fn asked<'a>(&'a self, places: &[&'a [f64]]) -> Vec<Asked<'a>> {
        let one = |(place, (neighbours, fade)): (&&'a [f64], &'a (Vec<u32>, Vec<f64>))| Asked {
            place,
            neighbours,
            fade,
        };
        places.iter().zip(&self.0).map(one).collect()
    }
}

impl Room {
    /// Keeps what [`Kriging::meet`] left, to be heard with other noise.
    pub fn keep(&mut self) {
        self.kept.clone_from(&self.lower);
    }

    /// Has it again.
    pub fn again(&mut self) {
        self.lower.clone_from(&self.kept);
    }

    /// The weights behind what was just asked.
    pub fn weights(&mut self, asked: &[Asked]) -> Vec<Weights> {
        let n = most(asked);
        weigh(n, &mut self.lower);
        let last = &self.lower[row_of(n)..];
        let one = |(lane, asked): (usize, &Asked)| {
            asked.neighbours.iter().zip(last).map(|(i, weight)| (*i, weight.0[lane])).collect()
        };
        asked.iter().enumerate().map(one).collect()
    }
}

/// Noise added to a neighbour at distance `d`, relative: none up to the first distance, without bound
/// at the second. Where one neighbour replaces another, neither then has a say, and a map has no
/// steps.
fn faded(d: f64, [from, to]: [f64; 2]) -> f64 {
    if d <= from || to <= from {
        return 0.0;
    }
    let part = (d - from) / (to - from);
    (part / (1.0 - part).max(1e-6)).powi(2)
}

impl Kriging<'_> {
    /// Kriging of up to [`LANES`] places side by side.
    pub fn ask(
        &self,
        ordered: &Ordered,
        heard: Heard,
        asked: &[Asked],
        room: &mut Room,
    ) -> [Said; LANES] {
        self.meet(ordered, asked, room);
        self.hear(ordered, heard, asked, room)
    }

    /// Covariances of places and neighbours, for [`Kriging::hear`], which uses them up.
    pub fn meet(&self, ordered: &Ordered, asked: &[Asked], room: &mut Room) {
        let n = most(asked);
        room.lower.resize(row_of(n + 1), Lane::default());
        let Room { lower, x, y, columns, .. } = room;
        for lane in 0..LANES {
            let here = asked.get(lane).map_or(&[][..], |a| a.neighbours);
            let k = here.len();
            // Fewer neighbours than another lane: rows of the identity, which say nothing.
            for i in k..n {
                lower[row_of(i)..][..i].iter_mut().for_each(|cell| cell.0[lane] = 0.0);
                lower[row_of(i) + i].0[lane] = 1.0;
                lower[row_of(n) + i].0[lane] = 0.0;
            }
            let Some(Asked { place, .. }) = asked.get(lane) else {
                lower[row_of(n) + n].0[lane] = 1.0;
                continue;
            };
            let sites = here.iter().map(|i| ordered.site(*i as usize));
            // A line is a plane's first axis.
            let flat = place.len() <= 2;
            let mut all: Vec<&[f64]> = Vec::new();
            if !flat {
                all.extend(sites.chain([*place]));
            } else {
                x.clear();
                y.clear();
                for site in sites.chain([*place]) {
                    x.push(site[0]);
                    y.push(site.get(1).copied().unwrap_or(0.0));
                }
            }
            columns.resize(row_of(k + 1), 0.0);
            if flat {
                self.kernel.columns(x, y, columns);
            }
            let mut rest = &mut columns[..];
            for j in 0..=k {
                let (column, after) = rest.split_at_mut(k + 1 - j);
                rest = after;
                if !flat {
                    self.kernel.column_of(all[j], &all[j..], column);
                }
                if j < k {
                    for (at, c) in column[..k - j].iter().enumerate() {
                        lower[row_of(j + at) + j].0[lane] = *c;
                    }
                    lower[row_of(n) + j].0[lane] = column[k - j];
                } else {
                    lower[row_of(n) + n].0[lane] = column[0];
                }
            }
        }
    }

    /// Kriging of places that have met their neighbours, who heard values with noise.
    pub fn hear(
        &self,
        ordered: &Ordered,
        heard: Heard,
        asked: &[Asked],
        room: &mut Room,
    ) -> [Said; LANES] {
        let n = most(asked);
        let sill = self.kernel.sill();
        room.value.clear();
        room.value.resize(n, Lane::default());
        room.level.clear();
        room.level.resize(self.levels * n, Lane::default());
        let Room { lower, value, level, .. } = room;
        for (lane, Asked { neighbours, fade, .. }) in asked.iter().enumerate() {
            for (j, i) in neighbours.iter().enumerate() {
                let i = *i as usize;
                let noise = heard.noise[i];
                let more = fade.get(j).map_or(0.0, |fade| fade * (noise + 0.01 * sill));
                lower[row_of(j) + j].0[lane] += noise + more;
                value[j].0[lane] = heard.value[i];
                let levels = levels(ordered.site(i));
                (0..self.levels).for_each(|l| level[l * n + j].0[lane] = levels[l]);
            }
        }
        let [values, left, known @ ..] = eliminate(n, lower, value, level);
        std::array::from_fn(|lane| {
            let whole = asked.get(lane).map_or(Levels::default(), |asked| levels(asked.place));
            let of = |l: usize| if l < self.levels { whole[l] - known[l].0[lane] } else { 0.0 };
            Said { value: values.0[lane], levels: std::array::from_fn(of), variance: left.0[lane] }
        })
    }

    /// What is said of every site of `terms` by its neighbours of the lists, in the order of the
    /// terms: `each` is given the term and the answer.
    pub fn sweep<T: Send>(
        &self,
        ordered: &Ordered,
        heard: Heard,
        lists: &Lists,
        terms: &[u32],
        each: impl Fn(&mut Vec<T>, u32, Said) + Sync,
    ) -> Vec<Vec<T>> {
        blocks(ordered, lists, terms, Vec::new, |out, room, block, asked| {
            let said = self.ask(ordered, heard, asked, room);
            for (i, said) in block.iter().zip(said) {
                each(out, *i, said);
            }
        })
    }
}

/// What comes of `terms`, a chunk of them at a time: of each block of up to [`LANES`] sites with their
/// neighbours of the lists, added to what came of those before it, in the order of the terms.
pub(super) fn blocks<T: Send>(
    ordered: &Ordered,
    lists: &Lists,
    terms: &[u32],
    none: impl Fn() -> T + Sync,
    add: impl Fn(&mut T, &mut Room, &[u32], &[Asked]) + Sync,
) -> Vec<T> {
    terms
        .par_chunks(CHUNK)
        .map_init(Room::default, |room, chunk| {
            let mut out = none();
            for block in chunk.chunks(LANES) {
                let asked: Vec<Asked> = block.iter().map(|i| ordered.asked(lists, *i)).collect();
                add(&mut out, room, block, &asked);
            }
            out
        })
        .collect()
}

/// How far the mean lies from the prior's, level by level, and what is left open of that.
#[derive(Clone, Copy, Default)]
pub(super) struct Shift {
    pub mean: Levels,
    pub covariance: [Levels; LEVELS],
    /// ln of the prior's over the posterior's volume, squared.
    pub spread: f64,
    /// `covariance = rootᵀ root`.
    root: [Levels; LEVELS],
}

impl Shift {
    /// Of independent priors of these variances around zero, given `told[l] = Σ x z` and
    /// `informed[l][m] = Σ x x`, whitened.
    pub fn of(prior: Levels, told: Levels, informed: [Levels; LEVELS]) -> Self {
        let root = prior.map(f64::sqrt);
        // I + V^½ M V^½ and its factor: never singular.
        let mut factor = [Levels::default(); LEVELS];
        for i in 0..LEVELS {
            for j in 0..=i {
                let whole = root[i] * informed[i][j] * root[j] + if i == j { 1.0 } else { 0.0 };
                let known: f64 = (0..j).map(|k| factor[i][k] * factor[j][k]).sum();
                factor[i][j] = match i == j {
                    true => (whole - known).max(f64::MIN_POSITIVE).sqrt(),
                    false => (whole - known) / factor[j][j],
                };
            }
        }
        // Columns of the inverse factor, times V^½.
        let mut inverse = [Levels::default(); LEVELS];
        for i in 0..LEVELS {
            let (before, rest) = inverse.split_at_mut(i);
            for (j, out) in rest[0][..=i].iter_mut().enumerate() {
                let one = if i == j { 1.0 } else { 0.0 };
                let known: f64 = (j..i).map(|k| factor[i][k] * before[k][j]).sum();
                *out = (one - known) / factor[i][i];
            }
        }
        let root = inverse.map(|row| std::array::from_fn(|i| row[i] * root[i]));
        let mut covariance = [Levels::default(); LEVELS];
        for i in 0..LEVELS {
            for j in 0..LEVELS {
                covariance[i][j] = root.iter().map(|row| row[i] * row[j]).sum();
            }
        }
        let mean = std::array::from_fn(|i| dot(covariance[i], told));
        let spread = (0..LEVELS).map(|i| 2.0 * factor[i][i].ln()).sum();
        Shift { mean, covariance, spread, root }
    }

    /// What is not known of the mean, made of normal numbers.
    pub fn drawn(&self, normals: Levels) -> Levels {
        std::array::from_fn(|i| (0..LEVELS).map(|k| normals[k] * self.root[k][i]).sum())
    }

    /// What is not known of the mean at a place of these levels.
    pub fn variance(&self, levels: Levels) -> f64 {
        (0..LEVELS).map(|i| levels[i] * dot(self.covariance[i], levels)).sum::<f64>().max(0.0)
    }
}

/// Σ a b.
pub(super) fn dot(a: Levels, b: Levels) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Matern, Metric, Smoothness};

    /// A lattice of sites around a gap, and a place in the gap nearer to its western rim: some neighbours are
    /// on the other side, where none of as many nearest are, and kriging leaves a twentieth less open at least.
    /// Neighbours that are to be all sites are all of them.
    #[test]
    fn a_place_in_a_gap_hears_all_of_its_sides() {
        let at = |i: usize| [(i % 60) as f64, (i / 60) as f64];
        let gap = |[x, y]: [f64; 2]| (x - 29.5).hypot(y - 29.5) < 12.0;
        let sites: Vec<Vec<f64>> =
            (0..3600).map(at).filter(|s| !gap(*s)).map(|s| s.to_vec()).collect();
        let n = sites.len();
        let row = Row { sites, y: vec![0.0; n], trials: Vec::new() };
        let (smoothness, metric) = (Smoothness::ThreeHalves, Metric::Euclidean);
        let kernel = Matern { smoothness, length_scale: 20.0, sill: 1.0, metric };
        let ordered = Ordered::of(&row, &kernel, false);
        let (value, noise) = (vec![0.0; n], vec![0.01; n]);
        let heard = Heard { value: &value, noise: &noise };
        let (mut room, place) = (Room::default(), [27.0, 29.2]);
        let near = ordered.around(&[&place[..]], 40, &mut room.found);
        let east = |near: &Around| {
            near.0[0].0.iter().filter(|i| ordered.site(**i as usize)[0] > 30.0).count()
        };
        let mut left = |near: &Around| {
            Kriging { kernel: &kernel, levels: 0 }.ask(
                &ordered,
                heard,
                &near.asked(&[&place[..]]),
                &mut room,
            )[0]
            .variance
        };
        let spread = left(&near);
        let mut found = Found::new();
        ordered.tree.nearest(&place, 40, n, &mut found);
        let nearest = Around(vec![(found.iter().map(|(_, i)| *i).collect(), Vec::new())]);
        assert!(east(&near) > 0 && east(&nearest) == 0, "{} in the east", east(&near));
        let alone = left(&nearest);
        assert!(spread < 0.95 * alone, "{spread} is left open, and by the nearest {alone}");
        let all = ordered.around(&[&place[..]], n, &mut found);
        assert_eq!(all.0[0].0.len(), n);
    }
}
