//! Near sites: a k-d tree that can leave out what comes later in an order, and that order.
//!
//! Source: Friedman, Bentley & Finkel (1977), doi:10.1145/355744.355745, for the tree; Guinness
//! (2018), arXiv:1609.05372, for why sites are ordered far apart first ("maximin").

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

/// Sites in a leaf of the tree.
const LEAF: usize = 12;
/// Halvings of the distance kept in [`spread`]: beyond a billionth of the extent, sites are one place.
const HALVINGS: usize = 32;

/// Sites `[site][dimension]`, flat, in a tree that answers which are nearest.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    dim: usize,
    /// Coordinates in the order of the leaves.
    flat: Vec<f64>,
    /// Which site stands at each place of `flat`.
    which: Vec<u32>,
    nodes: Vec<Node>,
    /// Lower corner then upper corner of each node.
    boxes: Vec<f64>,
}

#[derive(Debug, Clone)]
struct Node {
    start: u32,
    end: u32,
    /// The second child; the first stands next to its parent. Nothing for a leaf.
    second: Option<u32>,
    /// The first site of the order that is inside.
    first: u32,
}

/// The nearest sites found so far, nearest first: (squared distance, site).
pub(crate) type Found = Vec<(f64, u32)>;

impl Tree {
    /// A tree over sites in their order.
    pub fn new(sites: &[f64], dim: usize) -> Self {
        let n = sites.len().checked_div(dim).unwrap_or(0);
        let mut which: Vec<u32> = (0..n as u32).collect();
        let mut tree =
            Tree { dim, flat: Vec::new(), which: Vec::new(), nodes: Vec::new(), boxes: Vec::new() };
        if n > 0 {
            tree.split(sites, &mut which, 0);
        }
        tree.flat =
            which.iter().flat_map(|i| &sites[*i as usize * dim..][..dim]).copied().collect();
        tree.which = which;
        tree
    }

    fn split(&mut self, sites: &[f64], which: &mut [u32], start: usize) {
        let dim = self.dim;
        let at = |i: u32, d: usize| sites[i as usize * dim + d];
        let mut low = vec![f64::INFINITY; dim];
        let mut high = vec![f64::NEG_INFINITY; dim];
        for i in which.iter() {
            for d in 0..dim {
                low[d] = low[d].min(at(*i, d));
                high[d] = high[d].max(at(*i, d));
            }
        }
        let widest = (0..dim).max_by(|a, b| (high[*a] - low[*a]).total_cmp(&(high[*b] - low[*b])));
        let here = self.nodes.len();
        let first = which.iter().copied().min().unwrap_or(0);
        let end = start + which.len();
        self.nodes.push(Node { start: start as u32, end: end as u32, second: None, first });
        self.boxes.extend(low);
        self.boxes.extend(high);
        if let (true, Some(d)) = (which.len() > LEAF, widest) {
            let half = which.len() / 2;
            which.select_nth_unstable_by(half, |a, b| at(*a, d).total_cmp(&at(*b, d)));
            let (left, right) = which.split_at_mut(half);
            self.split(sites, left, start);
            self.nodes[here].second = Some(self.nodes.len() as u32);
            self.split(sites, right, start + half);
        }
    }

    /// Squared distance from `to` to the box of a node.
    fn away(&self, node: usize, to: &[f64]) -> f64 {
        let corners = &self.boxes[2 * self.dim * node..][..2 * self.dim];
        let outside = |d: usize| (corners[d] - to[d]).max(to[d] - corners[self.dim + d]).max(0.0);
        (0..self.dim).map(|d| outside(d).powi(2)).sum()
    }

    /// The `k` sites nearest to `to` among those before `end` in the order, nearest first; of
    /// equally near ones the earlier.
    pub fn nearest(&self, to: &[f64], k: usize, end: usize, found: &mut Found) {
        found.clear();
        if !self.nodes.is_empty() && k > 0 {
            self.search(0, self.away(0, to), to, k, end as u32, found);
        }
    }

    fn search(&self, at: usize, away: f64, to: &[f64], k: usize, end: u32, found: &mut Found) {
        let node = &self.nodes[at];
        if node.first >= end || (found.len() == k && away > found[k - 1].0) {
            return;
        }
        let Some(second) = node.second else {
            for place in node.start as usize..node.end as usize {
                let site = self.which[place];
                if site >= end {
                    continue;
                }
                let here = &self.flat[place * self.dim..][..self.dim];
                let square: f64 = here.iter().zip(to).map(|(a, b)| (a - b) * (a - b)).sum();
                if found.len() == k {
                    let (worst, last) = found[k - 1];
                    if square > worst || (square == worst && site > last) {
                        continue;
                    }
                    found.pop();
                }
                let nearer = |(d, s): &(f64, u32)| *d < square || (*d == square && *s < site);
                found.insert(found.partition_point(nearer), (square, site));
            }
            return;
        };
        let second = second as usize;
        let (a, b) = (self.away(at + 1, to), self.away(second, to));
        let order = if a <= b { [(at + 1, a), (second, b)] } else { [(second, b), (at + 1, a)] };
        for (child, away) in order {
            self.search(child, away, to, k, end, found);
        }
    }

    /// Bytes for each site, on the high side.
    pub const fn bytes(dim: usize) -> usize {
        // Leaves are at least half full, and there are twice as many nodes as leaves.
        8 * dim + 4 + 4 * (16 * dim + 24) / LEAF
    }
}

/// A hash that mixes whole words: cells are met by the million.
#[derive(Default)]
struct Words(u64);

impl Hasher for Words {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }
    fn write_u64(&mut self, word: u64) {
        self.0 = mix(self.0 ^ word);
    }
}

/// The finaliser of SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// An order of sites in which early ones are far apart and cover everything: those taken while the
/// distance to keep is r are at least r from all before, and r is halved when no site is left that
/// far away. Within one r the order is that of a hash of the coordinates, so that it hangs on where
/// the sites are and never on how they were listed.
///
/// # Shapes
/// `sites` `[site][dimension]`, `also` `[site]` tells sites at one place apart; returns the sites in
/// their order.
pub(crate) fn spread(sites: &[Vec<f64>], also: &[f64]) -> Vec<usize> {
    let hash = |i: &usize| sites[*i].iter().fold(0, |h, c| mix(h ^ (c + 0.0).to_bits()));
    let mut keyed: Vec<(u64, usize)> = (0..sites.len()).map(|i| (hash(&i), i)).collect();
    keyed.sort_by(|(a, i), (b, j)| {
        let places = || sites[*i].iter().zip(&sites[*j]).map(|(a, b)| a.total_cmp(b));
        a.cmp(b)
            .then_with(|| places().find(|o| o.is_ne()).unwrap_or(std::cmp::Ordering::Equal))
            .then_with(|| also[*i].total_cmp(&also[*j]))
    });
    // Another site at a place comes last: no distance would ever part the two.
    let (mut left, mut twins): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    for (_, i) in keyed {
        let twin = left.last().is_some_and(|before| sites[*before] == sites[i]);
        if twin { twins.push(i) } else { left.push(i) }
    }
    let dim = sites.first().map_or(0, Vec::len);
    let low: Vec<f64> =
        (0..dim).map(|d| sites.iter().map(|s| s[d]).fold(f64::INFINITY, f64::min)).collect();
    let extent = (0..dim)
        .map(|d| sites.iter().map(|s| s[d] - low[d]).fold(0.0, f64::max))
        .fold(0.0, f64::max);
    let mut order: Vec<usize> = Vec::with_capacity(sites.len());
    let mut keep = extent;
    for _ in 0..HALVINGS {
        if left.is_empty() || keep <= 0.0 {
            break;
        }
        let mut cells: HashMap<u64, Vec<u32>, BuildHasherDefault<Words>> = HashMap::default();
        let cell = |site: &[f64], shift: usize| {
            let mut shift = shift;
            site.iter().zip(&low).fold(0u64, |h, (c, low)| {
                let step = (shift % 3) as i64 - 1;
                shift /= 3;
                mix(h ^ (((c - low) / keep).floor() as i64 + step) as u64)
            })
        };
        let here = 3usize.pow(dim as u32) / 2; // the shift that is none
        for i in &order {
            cells.entry(cell(&sites[*i], here)).or_default().push(*i as u32);
        }
        left.retain(|i| {
            let site = &sites[*i];
            let close = |j: &u32| {
                let other = &sites[*j as usize];
                site.iter().zip(other).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() < keep * keep
            };
            // Its own cell first: most sites that are too close are there.
            let taken = (0..3usize.pow(dim as u32)).any(|shift| {
                let shift = (shift + here) % 3usize.pow(dim as u32);
                cells.get(&cell(site, shift)).is_some_and(|others| others.iter().any(close))
            });
            if !taken {
                cells.entry(cell(site, here)).or_default().push(*i as u32);
                order.push(*i);
            }
            taken
        });
        keep *= 0.5;
    }
    order.extend(left);
    order.extend(twins);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn square(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
    }

    #[test]
    fn the_tree_finds_what_looking_at_every_site_finds() {
        let mut rng = Stream::new(1, "tree", 0);
        for dim in [1, 2, 3] {
            // On a lattice, so that there are ties and duplicates.
            let sites: Vec<f64> = (0..400 * dim).map(|_| rng.below(17) as f64).collect();
            let tree = Tree::new(&sites, dim);
            let mut found = Found::new();
            for (k, end) in [(1, 400), (7, 400), (30, 25), (5, 200), (500, 400), (3, 0)] {
                let to: Vec<f64> = (0..dim).map(|_| rng.uniform(-3.0, 20.0).round()).collect();
                tree.nearest(&to, k, end, &mut found);
                let mut all: Found =
                    (0..end).map(|i| (square(&sites[i * dim..][..dim], &to), i as u32)).collect();
                all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                all.truncate(k);
                assert_eq!(found, all, "{dim} dimensions, {k} before {end}");
            }
        }
    }

    #[test]
    fn early_sites_are_far_apart_and_the_listing_is_irrelevant() {
        let mut rng = Stream::new(2, "spread", 0);
        let mut sites: Vec<Vec<f64>> = (0..500).map(|_| vec![rng.unit(), rng.unit()]).collect();
        sites.push(sites[3].clone());
        let also: Vec<f64> = (0..501).map(f64::from).collect();
        let order = spread(&sites, &also);
        let mut whole = order.clone();
        whole.sort_unstable();
        assert_eq!(whole, (0..501).collect::<Vec<_>>());
        let least = |n: usize| {
            let pairs = (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
            let squares = pairs.map(|(i, j)| square(&sites[order[i]], &sites[order[j]]));
            squares.fold(f64::INFINITY, f64::min).sqrt()
        };
        // The best 40 of a square are 0.17 apart; 40 at random are 0.01 apart.
        assert!(least(40) > 0.1, "{}", least(40));
        let turned = rng.permutation(501);
        let (moved, with): (Vec<_>, Vec<_>) =
            turned.iter().map(|i| (sites[*i].clone(), also[*i])).unzip();
        let again: Vec<usize> = spread(&moved, &with).iter().map(|i| turned[*i]).collect();
        assert_eq!(again, order);
    }
}
