//! The distance from a place to the nearest site, exactly.

use crate::{error::Result, kernel::Metric, sites::Observations};

/// Sites in square cells of their first two coordinates, about one to a cell, searched in rings around
/// a place's own. Further coordinates only make sites farther.
pub(super) struct Nearest {
    first: [f64; 2],
    side: f64,
    size: [i64; 2],
    /// Row-major: coordinates of the sites of each, one after the other.
    cells: Vec<Vec<f64>>,
}

impl Nearest {
    /// Of the first row of a context, of at least one site.
    pub fn new(context: &Observations) -> Result<Self> {
        let sites: Vec<Vec<f64>> = context.sites.host()?.into_iter().next().unwrap_or_default();
        let end = |d: usize, pick: fn(f64, f64) -> f64, from: f64| {
            sites.iter().map(|s| s[d]).fold(from, pick)
        };
        let first = [0, 1].map(|d| end(d, f64::min, f64::INFINITY));
        let span = [0, 1].map(|d| end(d, f64::max, f64::NEG_INFINITY) - first[d]);
        // At most a thousand cells along an axis, however sites lie.
        let longest = span[0].max(span[1]).max(1e-9);
        let side = ((span[0] * span[1] / sites.len().max(1) as f64).sqrt()).max(1e-3 * longest);
        let size = span.map(|s| (s / side) as i64 + 1);
        let mut nearest = Nearest { first, side, size, cells: Vec::new() };
        nearest.cells.resize((size[0] * size[1]) as usize, Vec::new());
        for site in sites {
            let [col, row] = nearest.cell(&site);
            let at = (row.clamp(0, size[1] - 1) * size[0] + col.clamp(0, size[0] - 1)) as usize;
            nearest.cells[at].extend(site);
        }
        Ok(nearest)
    }

    fn cell(&self, place: &[f64]) -> [i64; 2] {
        [0, 1].map(|d| ((place[d] - self.first[d]) / self.side).floor() as i64)
    }

    /// Distance from a place to the nearest site, in units of the sites; infinite without sites.
    pub fn distance(&self, place: &[f64]) -> f64 {
        let [col, row] = self.cell(place);
        // Rings that miss the box of the sites are empty.
        let gap = |at: i64, size: i64| (-at).max(at - size + 1).max(0);
        let reach = |at: i64, size: i64| at.abs().max((size - 1 - at).abs());
        let from = gap(col, self.size[0]).max(gap(row, self.size[1]));
        let to = reach(col, self.size[0]).max(reach(row, self.size[1]));
        let mut best = f64::INFINITY;
        for ring in from..=to {
            // Cells of this ring and all beyond are farther than this.
            if best <= (ring - 1) as f64 * self.side {
                break;
            }
            let rows = (row - ring).max(0)..=(row + ring).min(self.size[1] - 1);
            for j in rows {
                let whole = (j - row).abs() == ring;
                let step = if whole { 1 } else { (2 * ring).max(1) };
                let mut i = col - ring;
                while i <= col + ring {
                    if (0..self.size[0]).contains(&i) {
                        let here = &self.cells[(j * self.size[0] + i) as usize];
                        let each = here.chunks_exact(place.len());
                        best =
                            each.map(|s| Metric::Euclidean.distance(s, place)).fold(best, f64::min);
                    } else if whole && i < 0 {
                        i = -1; // the next is the first of the row
                    } else if whole {
                        break;
                    }
                    i += step;
                }
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::{rng::Stream, sites::Sites};

    /// Rings are a short cut, and never change the answer: clusters, lines, and places far away.
    #[test]
    fn rings_find_the_nearest_site() {
        let mut rng = Stream::new(3, "nearest", 0);
        for (shape, dim) in (0..4).flat_map(|shape| [(shape, 2), (shape, 3)]) {
            let sites: Vec<f64> = (0..90)
                .flat_map(|i| {
                    let [x, y] = match shape {
                        0 => [rng.uniform(-1.0, 1.0), rng.uniform(-0.4, 0.4)],
                        1 => [(i % 3) as f64 + 0.01 * rng.normal(), 0.01 * rng.normal()],
                        2 => [rng.uniform(-1.0, 1.0), 0.25],
                        _ => [0.5, -0.5],
                    };
                    [x, y, rng.normal()].into_iter().take(dim)
                })
                .collect();
            let sites = Sites::flat(&sites, dim, &Device::Cpu).unwrap();
            let y = Tensor::zeros((1, 90, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
            let context = Observations::new(sites, y, None).unwrap();
            let nearest = Nearest::new(&context).unwrap();
            let held = &context.sites.host().unwrap()[0];
            for _ in 0..500 {
                let far = if rng.unit() < 0.3 { 30.0 } else { 1.3 };
                let place: Vec<f64> = (0..dim).map(|_| rng.uniform(-far, far)).collect();
                let square =
                    |s: &Vec<f64>| s.iter().zip(&place).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
                let plain = held.iter().map(square).fold(f64::INFINITY, f64::min).sqrt();
                assert_eq!(nearest.distance(&place), plain, "shape {shape} at {place:?}");
            }
        }
    }
}
