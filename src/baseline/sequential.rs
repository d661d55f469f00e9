//! Surfaces drawn at many scattered sites, one site after another: each given its nearest among those
//! drawn before it.
//!
//! Sources: Deutsch & Journel (1998), "GSLIB", section V.2, for drawing in sequence; Vecchia (1988),
//! doi:10.1111/j.2517-6161.1988.tb01729.x, for leaving out all but the nearest; Guinness (2018),
//! arXiv:1609.05372, for an order in which early sites are far apart, so that few neighbours carry
//! long ranges too. Any covariance will do, stationary or not.

use rayon::prelude::*;

use super::{
    elimination::{LANES, Lane, eliminate, row_of, weigh},
    neighbours::{Found, Tree, spread},
};
use crate::{kernel::Kernel, rng::Stream};

/// Neighbours that make draws as good as exact: no covariance is then off by 1 % of the sill.
pub const NEIGHBOURS: usize = 60;
/// Sites of one piece of work, and sites whose weights are held at once.
const CHUNK: usize = 32 * LANES;
const HELD: usize = 128 * CHUNK;

/// What a site takes from those before it, and the sd of what it adds.
struct Given {
    weights: Vec<(u32, f64)>,
    sd: f64,
}

/// Sites in the order in which they are drawn.
struct Ordered {
    xy: Vec<[f64; 2]>,
    /// The same where the kernel finds near ones alike.
    mapped: Vec<Vec<f64>>,
    tree: Tree,
}

/// Room for the covariances of one block, used again and again.
#[derive(Default)]
struct Room {
    lower: Vec<Lane>,
    value: Vec<Lane>,
    x: Vec<f64>,
    y: Vec<f64>,
    column: Vec<f64>,
    found: Found,
}

/// A surface with mean zero at planar `sites`, each given at most `neighbours` before it. With as many
/// neighbours as sites the draw is exact.
///
/// # Shapes
/// `sites` `[site][2]`; returns `[site]`.
/// # Units
/// Sites in the units of the kernel's length scale, values in the outcome's.
pub fn draw(
    kernel: &dyn Kernel,
    sites: &[[f64; 2]],
    neighbours: usize,
    rng: &mut Stream,
) -> Vec<f64> {
    coloured(kernel, sites, neighbours, &rng.normals(sites.len()))
}

/// The surface that white noise `[site]` becomes: linear in it.
fn coloured(kernel: &dyn Kernel, sites: &[[f64; 2]], neighbours: usize, noise: &[f64]) -> Vec<f64> {
    // Near is what the kernel finds alike.
    let near = |[x, y]: &[f64; 2]| match kernel.unstretch() {
        Some([a, b, c, d]) => vec![a * x + b * y, c * x + d * y],
        None => vec![*x, *y],
    };
    let mapped: Vec<Vec<f64>> = sites.iter().map(near).collect();
    let order = spread(&mapped, &vec![0.0; sites.len()]);
    let ordered = Ordered {
        xy: order.iter().map(|i| sites[*i]).collect(),
        tree: Tree::new(&order.iter().flat_map(|i| mapped[*i].clone()).collect::<Vec<_>>(), 2),
        mapped: order.iter().map(|i| mapped[*i].clone()).collect(),
    };
    let mut drawn = vec![0.0; sites.len()];
    for start in (0..sites.len()).step_by(HELD) {
        let some: Vec<u32> = (start..(start + HELD).min(sites.len())).map(|i| i as u32).collect();
        let given: Vec<Vec<Given>> = some
            .par_chunks(CHUNK)
            .map_init(Room::default, |room, chunk| {
                let blocks = chunk.chunks(LANES);
                blocks.flat_map(|b| room.given(kernel, &ordered, neighbours, b)).collect()
            })
            .collect();
        for (i, given) in some.iter().zip(given.into_iter().flatten()) {
            let known: f64 = given.weights.iter().map(|(j, w)| w * drawn[*j as usize]).sum();
            drawn[*i as usize] = known + given.sd * noise[order[*i as usize]];
        }
    }
    let mut values = vec![0.0; sites.len()];
    order.iter().zip(drawn).for_each(|(i, value)| values[*i] = value);
    values
}

impl Room {
    /// Up to [`LANES`] sites side by side.
    fn given(
        &mut self,
        kernel: &dyn Kernel,
        ordered: &Ordered,
        most: usize,
        block: &[u32],
    ) -> Vec<Given> {
        let lists: Vec<Vec<u32>> = block
            .iter()
            .map(|i| {
                let (i, found) = (*i as usize, &mut self.found);
                ordered.tree.nearest(&ordered.mapped[i], most, i, found);
                self.found.iter().map(|(_, j)| *j).collect()
            })
            .collect();
        let n = lists.iter().map(Vec::len).max().unwrap_or(0);
        // Rows of the identity where a lane has fewer neighbours, or no site: they say nothing.
        self.lower.clear();
        self.lower.resize(row_of(n + 1), Lane::default());
        for i in 0..=n {
            self.lower[row_of(i) + i] = Lane([1.0; LANES]);
        }
        self.value.clear();
        self.value.resize(n, Lane::default());
        for (lane, (site, list)) in block.iter().zip(&lists).enumerate() {
            let k = list.len();
            let places = list.iter().chain([site]).map(|i| ordered.xy[*i as usize]);
            (self.x, self.y) = places.map(|p| (p[0], p[1])).unzip();
            self.column.resize(k + 1, 0.0);
            for j in 0..=k {
                let (from, column) = ([self.x[j], self.y[j]], &mut self.column[..=k - j]);
                kernel.column(from, &self.x[j..], &self.y[j..], column);
                for (i, c) in (j..).zip(column.iter()) {
                    // The site itself stands in the last row of all lanes.
                    let row = if i == k { n } else { i };
                    self.lower[row_of(row) + if j == k { n } else { j }].0[lane] = *c;
                }
            }
        }
        let [_, left, ..] = eliminate(n, &mut self.lower, &mut self.value, &mut []);
        weigh(n, &mut self.lower);
        let last = &self.lower[row_of(n)..];
        let one = |(lane, list): (usize, &Vec<u32>)| Given {
            weights: list.iter().zip(last).map(|(j, weight)| (*j, weight.0[lane])).collect(),
            // Twins leave nothing, or a little less.
            sd: left.0[lane].max(0.0).sqrt(),
        };
        lists.iter().enumerate().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Matern, Metric, Smoothness};

    /// Two towns, a country, and a site surveyed twice.
    fn sites(n: usize) -> Vec<[f64; 2]> {
        let mut rng = Stream::new(3, "sites", 0);
        let mut sites: Vec<[f64; 2]> = (0..n - 1)
            .map(|i| match i % 3 {
                0 => [0.3 + 0.02 * rng.normal(), -0.5 + 0.02 * rng.normal()],
                1 => [-0.6 + 0.1 * rng.normal(), 0.4 + 0.1 * rng.normal()],
                _ => [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)],
            })
            .collect();
        sites.push(sites[7]);
        sites
    }

    /// The farthest that any covariance of draws is from the kernel's: draws are linear in their noise,
    /// so that unit noise tells the whole matrix.
    fn off(kernel: &Matern, n: usize, neighbours: usize) -> f64 {
        let sites = sites(n);
        let columns: Vec<Vec<f64>> = (0..n)
            .into_par_iter()
            .map(|i| {
                let unit: Vec<f64> = (0..n).map(|j| f64::from(u8::from(i == j))).collect();
                coloured(kernel, &sites, neighbours, &unit)
            })
            .collect();
        let pairs = (0..n).flat_map(|i| (0..=i).map(move |j| (i, j)));
        let gap = |(i, j): (usize, usize)| {
            let found: f64 = columns.iter().map(|c| c[i] * c[j]).sum();
            (found - kernel.covariance(&sites[i], &sites[j])).abs() / kernel.sill
        };
        pairs.map(gap).fold(0.0, f64::max)
    }

    #[test]
    fn draws_have_the_covariance_of_the_kernel() {
        let turned = Metric::Anisotropic { angle: 0.5, ratio: 3.0 };
        for (smoothness, length_scale, metric) in
            [(Smoothness::Half, 0.7, turned), (Smoothness::ThreeHalves, 0.1, Metric::Euclidean)]
        {
            let kernel = Matern { smoothness, length_scale, sill: 2.0, metric };
            let (exact, near) = (off(&kernel, 100, 100), off(&kernel, 240, NEIGHBOURS));
            assert!(exact < 1e-9, "{kernel:?}: {exact}");
            assert!(near < 0.01, "{kernel:?}: {near}");
        }
    }

    #[test]
    fn the_same_stream_draws_the_same_surface_and_twins_are_alike() {
        let kernel = Matern {
            smoothness: Smoothness::Half,
            length_scale: 0.2,
            sill: 1.0,
            metric: Metric::Euclidean,
        };
        let sites = sites(1000);
        let drawn = |seed: u64| draw(&kernel, &sites, 20, &mut Stream::new(seed, "sequence", 0));
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
        let first = drawn(1);
        assert!((first[999] - first[7]).abs() < 1e-6, "{} {}", first[999], first[7]);
    }
}
