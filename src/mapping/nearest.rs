//! The distance from a place to the nearest site, exactly.

use crate::{error::Result, sites::Observations};

/// Sites in square cells, about one to a cell, searched in rings around a place's own.
pub(super) struct Nearest {
    first: [f64; 2],
    side: f64,
    size: [i64; 2],
    /// Row-major.
    cells: Vec<Vec<[f64; 2]>>,
}

impl Nearest {
    /// Of the first row of a context, of at least one site.
    pub fn new(context: &Observations) -> Result<Self> {
        let sites: Vec<[f64; 2]> =
            context.sites.host()?.first().into_iter().flatten().map(|s| [s[0], s[1]]).collect();
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
            let [col, row] = nearest.cell(site);
            let at = (row.clamp(0, size[1] - 1) * size[0] + col.clamp(0, size[0] - 1)) as usize;
            nearest.cells[at].push(site);
        }
        Ok(nearest)
    }

    fn cell(&self, place: [f64; 2]) -> [i64; 2] {
        [0, 1].map(|d| ((place[d] - self.first[d]) / self.side).floor() as i64)
    }

    /// Distance from a place to the nearest site, in units of the sites; infinite without sites.
    pub fn distance(&self, x: f64, y: f64) -> f64 {
        let [col, row] = self.cell([x, y]);
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
                        best = here.iter().map(|s| (s[0] - x).hypot(s[1] - y)).fold(best, f64::min);
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
        for shape in 0..4 {
            let sites: Vec<[f64; 2]> = (0..90)
                .map(|i| match shape {
                    0 => [rng.uniform(-1.0, 1.0), rng.uniform(-0.4, 0.4)],
                    1 => [(i % 3) as f64 + 0.01 * rng.normal(), 0.01 * rng.normal()],
                    2 => [rng.uniform(-1.0, 1.0), 0.25],
                    _ => [0.5, -0.5],
                })
                .collect();
            let plane = Sites::plane(&sites, &Device::Cpu).unwrap();
            let y = Tensor::zeros((1, 90, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
            let context = Observations::new(plane, y, None).unwrap();
            let nearest = Nearest::new(&context).unwrap();
            let held = &context.sites.host().unwrap()[0];
            for _ in 0..500 {
                let far = if rng.unit() < 0.3 { 30.0 } else { 1.3 };
                let [x, y] = [rng.uniform(-far, far), rng.uniform(-far, far)];
                let plain =
                    held.iter().map(|s| (s[0] - x).hypot(s[1] - y)).fold(f64::INFINITY, f64::min);
                assert_eq!(nearest.distance(x, y), plain, "shape {shape} at {x}, {y}");
            }
        }
    }
}
