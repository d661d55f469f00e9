//! Whether any site is within [`REACH`] of a place.

use super::{REACH, nearest::Nearest};
use crate::{error::Result, sites::Observations};

/// Cells along [`REACH`].
const FINE: i64 = 8;
/// Side of a cell, model units.
const SIDE: f64 = REACH / FINE as f64;

/// Sites sorted into small cells: those wholly inside a place's reach answer by being occupied,
/// and sites are looked at one by one only in cells that its circle cuts. In model units sites
/// span 2, so the cells are few.
pub(super) struct Near {
    /// First cell, and cells along each axis.
    first: [i64; 2],
    size: [i64; 2],
    /// Row-major.
    cells: Vec<Vec<[f64; 2]>>,
    /// Cells that may hold a site within reach, seen from a place's own: nearest first.
    around: Vec<[i64; 2]>,
    /// Where sites are on no plane, and cells say less.
    space: Option<Nearest>,
}

fn cell(site: [f64; 2]) -> [i64; 2] {
    site.map(|v| (v / SIDE).floor() as i64)
}

impl Near {
    pub fn new(context: &Observations) -> Result<Self> {
        let plane = context.sites.s.dims().last().is_none_or(|dim| *dim <= 2);
        let space = if plane { None } else { Some(Nearest::new(context)?) };
        let sites: Vec<[f64; 2]> = match plane {
            true => context.sites.host()?.iter().flatten().map(|s| [s[0], s[1]]).collect(),
            false => Vec::new(),
        };
        let axis = |d: usize| sites.iter().map(move |s| cell(*s)[d]);
        let first = [0, 1].map(|d| axis(d).min().unwrap_or(0));
        let size = [0, 1].map(|d| axis(d).max().unwrap_or(-1) - first[d] + 1);
        let mut near = Near { first, size, cells: Vec::new(), around: Vec::new(), space };
        near.cells.resize((size[0] * size[1]) as usize, Vec::new());
        for site in sites {
            if let Some(at) = near.place(cell(site)) {
                near.cells[at].push(site);
            }
        }
        let span = -FINE - 1..=FINE + 1;
        let gap = |k: i64| (k.abs() - 1).max(0);
        near.around = span.clone().flat_map(|i| span.clone().map(move |j| [i, j])).collect();
        near.around.retain(|[i, j]| gap(*i).pow(2) + gap(*j).pow(2) <= FINE.pow(2));
        near.around.sort_by_key(|[i, j]| i * i + j * j);
        Ok(near)
    }

    /// Where a cell is kept, if it is inside the box of the sites.
    fn place(&self, [col, row]: [i64; 2]) -> Option<usize> {
        let (col, row) = (col - self.first[0], row - self.first[1]);
        let inside = (0..self.size[0]).contains(&col) && (0..self.size[1]).contains(&row);
        inside.then(|| (row * self.size[0] + col) as usize)
    }

    pub fn reaches(&self, place: &[f64]) -> bool {
        if let Some(space) = &self.space {
            return space.distance(place) <= REACH;
        }
        let [x, y] = [place[0], place[1]];
        let [col, row] = cell([x, y]);
        self.around.iter().any(|[i, j]| {
            let at = [col + i, row + j];
            let Some(sites) = self.place(at).map(|at| &self.cells[at]) else { return false };
            let farthest = |v: f64, k: i64| {
                let low = k as f64 * SIDE - v;
                low.abs().max((low + SIDE).abs())
            };
            !sites.is_empty()
                && (farthest(x, at[0]).hypot(farthest(y, at[1])) <= REACH
                    || sites.iter().any(|s| (s[0] - x).hypot(s[1] - y) <= REACH))
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::{rng::Stream, sites::Sites};

    /// The cells are a short cut, and never change the answer.
    #[test]
    fn reach_is_the_distance_to_the_nearest_site() {
        let mut rng = Stream::new(1, "near", 0);
        let mut place = || [2.0 * rng.normals(1)[0], 2.0 * rng.normals(1)[0]];
        let sites: Vec<[f64; 2]> = (0..60).map(|_| place()).collect();
        let plane = Sites::plane(&sites, &Device::Cpu).unwrap();
        let y = Tensor::zeros((1, 60, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let near = Near::new(&Observations::new(plane, y, None).unwrap()).unwrap();
        let mut counts = [0; 2];
        for _ in 0..2000 {
            let [x, y] = place();
            let nearest =
                sites.iter().map(|s| (s[0] - x).hypot(s[1] - y)).fold(f64::INFINITY, f64::min);
            if (nearest - REACH).abs() > 1e-6 {
                assert_eq!(near.reaches(&[x, y]), nearest < REACH, "{x} {y}: {nearest}");
                counts[usize::from(nearest < REACH)] += 1;
            }
        }
        assert!(counts.iter().all(|n| *n > 200), "{counts:?}");
    }
}
