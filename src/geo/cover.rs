//! How much of each pixel an area covers: exactly, by signed areas.
//!
//! Every edge of an outline adds what lies east of it, upwards with one sign and downwards with the
//! other; summed along a row, what is left is the covered share of each pixel. No pixel is sampled, and
//! neighbours that share a border share its pixels without gap or overlap.
//!
//! Source: the accumulation buffer of Levien's font-rs (2016); the measure is that of exactextract.

use super::grid::Window;

/// Rows of pixels whose edges are kept together.
const BAND: usize = 32;

/// A closed line: of an area, or of a hole in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Ring {
    /// Corners in order; whether the last repeats the first is irrelevant.
    pub corners: Vec<[f64; 2]>,
    /// Whether it bounds a hole.
    pub hole: bool,
}

impl Ring {
    /// Twice the signed area, about the first corner.
    fn twice(&self) -> f64 {
        let Some(o) = self.corners.first() else { return 0.0 };
        let next = self.corners.iter().cycle().skip(1);
        let cross = |(a, b): (&[f64; 2], &[f64; 2])| {
            (a[0] - o[0]) * (b[1] - o[1]) - (b[0] - o[0]) * (a[1] - o[1])
        };
        self.corners.iter().zip(next).map(cross).sum()
    }
}

/// The outline of an area in pixels of a grid: x along columns, y along rows, from the outer corner of
/// the first pixel.
#[derive(Debug, Clone, Default)]
pub struct Shape {
    /// x and y of both ends, level edges left out: they bound nothing in their row.
    edges: Vec<[f64; 4]>,
    /// Which edges touch each band of rows, from `first` on.
    bands: Vec<Vec<u32>>,
    first: usize,
    /// Smallest x and y, largest x and y.
    bounds: [f64; 4],
}

impl Shape {
    /// The shape of rings that do not cross: holes lie in their areas.
    pub fn new(rings: &[Ring]) -> Self {
        let mut shape = Shape {
            bounds: [f64::INFINITY, f64::INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY],
            ..Default::default()
        };
        for ring in rings {
            // Areas go one way around, holes the other.
            let back = (ring.twice() < 0.0) != ring.hole;
            let next = ring.corners.iter().cycle().skip(1);
            for (a, b) in ring.corners.iter().zip(next) {
                let (a, b) = if back { (b, a) } else { (a, b) };
                let bounds = &mut shape.bounds;
                for d in 0..2 {
                    bounds[d] = bounds[d].min(a[d]);
                    bounds[2 + d] = bounds[2 + d].max(a[d]);
                }
                if a[1] != b[1] {
                    shape.edges.push([a[0], a[1], b[0], b[1]]);
                }
            }
        }
        let band = |y: f64| (y.max(0.0) as usize) / BAND;
        if let Some(last) = shape.edges.iter().map(|e| band(e[1].max(e[3]))).max() {
            shape.first = band(shape.bounds[1]);
            // Far below any grid, bands are of no use.
            shape.bands = vec![Vec::new(); (last - shape.first + 1).min(1 << 20)];
            for (i, e) in shape.edges.iter().enumerate() {
                if e[1].max(e[3]) >= 0.0 {
                    let end = shape.first + shape.bands.len() - 1;
                    for at in band(e[1].min(e[3]))..=band(e[1].max(e[3])).min(end) {
                        shape.bands[at - shape.first].push(i as u32);
                    }
                }
            }
        }
        shape
    }

    /// How many pixels it is as large as, on the grid or beyond.
    pub fn size(&self) -> f64 {
        // Far from the first pixel, sums about it would lose digits.
        let o = self.bounds[0];
        let east = |[ax, ay, bx, by]: &[f64; 4]| (0.5 * (ax + bx) - o) * (by - ay);
        self.edges.iter().map(east).sum::<f64>().max(0.0)
    }

    /// Whether anything of it may lie in a window.
    pub fn meets(&self, window: Window) -> bool {
        let [west, north, east, south] = self.bounds;
        !self.edges.is_empty()
            && east > window.col as f64
            && south > window.row as f64
            && west < (window.col + window.cols) as f64
            && north < (window.row + window.rows) as f64
    }

    /// The covered share of each pixel of a window, row-major; nothing if none is covered.
    ///
    /// ```
    /// use isopleth::geo::{cover::{Ring, Shape}, grid::Window};
    /// let corners = vec![[0.5, 0.0], [2.0, 0.0], [2.0, 1.0], [0.5, 1.0]];
    /// let shape = Shape::new(&[Ring { corners, hole: false }]);
    /// let window = Window { row: 0, col: 0, rows: 1, cols: 3 };
    /// assert_eq!(shape.cover(window), Some(vec![0.5, 1.0, 0.0]));
    /// ```
    pub fn cover(&self, window: Window) -> Option<Vec<f64>> {
        if !self.meets(window) {
            return None;
        }
        let (rows, cols) = (window.rows, window.cols);
        // One more column takes what lies beyond the last.
        let mut sums = vec![0.0; rows * (cols + 1)];
        let bands = window.row / BAND..=(window.row + rows - 1) / BAND;
        for band in bands {
            let Some(edges) = band.checked_sub(self.first).and_then(|i| self.bands.get(i)) else {
                continue;
            };
            let low = (band * BAND).max(window.row);
            let high = ((band + 1) * BAND).min(window.row + rows);
            for i in edges {
                add(&mut sums, window, [low, high], self.edges[*i as usize]);
            }
        }
        let mut covered = false;
        let mut shares = Vec::with_capacity(rows * cols);
        for row in sums.chunks_exact(cols + 1) {
            let mut sum = 0.0;
            for s in &row[..cols] {
                sum += s;
                // What rounding leaves is nothing.
                let share = if sum < 1e-9 { 0.0 } else { f64::min(sum, 1.0) };
                covered |= share > 0.0;
                shares.push(share);
            }
        }
        covered.then_some(shares)
    }

    /// Whether a place lies inside.
    pub fn contains(&self, x: f64, y: f64) -> bool {
        let mut winding = 0;
        for [ax, ay, bx, by] in &self.edges {
            if (*ay <= y) != (*by <= y) && x < ax + (y - ay) / (by - ay) * (bx - ax) {
                winding += if by > ay { 1 } else { -1 };
            }
        }
        winding != 0
    }
}

/// Adds what lies east of an edge in rows `low … high` of a window.
fn add(sums: &mut [f64], window: Window, [low, high]: [usize; 2], [ax, ay, bx, by]: [f64; 4]) {
    let slope = (bx - ax) / (by - ay);
    let (top, bottom) = (ay.min(by), ay.max(by));
    // East of an edge that goes down the rows lies outside, of one that goes up inside: with y
    // along rows, areas are gone around so that the western border goes up.
    let sign = if by > ay { -1.0 } else { 1.0 };
    let first = (top.max(low as f64).floor() as usize).max(low);
    for row in first..high {
        let (y0, y1) = (top.max(row as f64), bottom.min(row as f64 + 1.0));
        if y1 <= y0 {
            if row as f64 >= bottom {
                break;
            }
            continue;
        }
        let line = &mut sums[(row - window.row) * (window.cols + 1)..][..window.cols + 1];
        let at = |y: f64| ax + (y - ay) * slope;
        let (x0, x1) = (at(y0) - window.col as f64, at(y1) - window.col as f64);
        across(line, [x0.min(x1), x0.max(x1)], sign * (y1 - y0));
    }
}

/// Adds an edge from `west` to `east` that is `height` high, all within one row, to its line of sums.
fn across(line: &mut [f64], [west, east]: [f64; 2], height: f64) {
    let cols = line.len() - 1;
    let end = cols as f64;
    if west >= end {
        return;
    }
    if east <= 0.0 {
        line[0] += height;
        return;
    }
    let first = west.max(0.0).floor() as usize;
    if east <= first as f64 + 1.0 && west >= 0.0 {
        let share = 0.5 * (west + east) - first as f64;
        line[first] += height * (1.0 - share);
        line[first + 1] += height * share;
        return;
    }
    let each = height / (east - west);
    if west < 0.0 {
        line[0] += each * -west;
    }
    for col in first..cols {
        let (a, b) = (west.max(col as f64), east.min(col as f64 + 1.0));
        if b <= a {
            break;
        }
        let (part, share) = (each * (b - a), 0.5 * (a + b) - col as f64);
        line[col] += part * (1.0 - share);
        line[col + 1] += part * share;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn ring(corners: &[[f64; 2]], hole: bool) -> Ring {
        Ring { corners: corners.to_vec(), hole }
    }

    fn window(row: usize, col: usize, rows: usize, cols: usize) -> Window {
        Window { row, col, rows, cols }
    }

    /// A star around a centre: corners at random distances.
    fn star(rng: &mut Stream, centre: [f64; 2], reach: f64) -> Vec<[f64; 2]> {
        let n = 5 + rng.below(30);
        (0..n)
            .map(|i| {
                let (sin, cos) = (std::f64::consts::TAU * i as f64 / n as f64).sin_cos();
                let r = reach * rng.uniform(0.3, 1.0);
                [centre[0] + r * cos, centre[1] + r * sin]
            })
            .collect()
    }

    /// Whichever way rings are written, the shares are those that many points find, the whole is the
    /// area, and windows change nothing.
    #[test]
    fn shares_are_what_points_find_and_sum_to_the_area() {
        let mut rng = Stream::new(3, "cover", 0);
        for case in 0..30 {
            let outer = star(&mut rng, [40.0, 45.0], 35.0);
            let mut inner = star(&mut rng, [40.0, 45.0], 9.0);
            if case % 2 == 0 {
                inner.reverse();
            }
            let rings = [ring(&outer, false), ring(&inner, true)];
            let shape = Shape::new(&rings);
            let all = shape.cover(window(0, 0, 90, 80)).unwrap();
            let area = 0.5 * (rings[0].twice().abs() - rings[1].twice().abs());
            assert!((all.iter().sum::<f64>() - area).abs() < 1e-6, "{case}");
            assert!((shape.size() - area).abs() < 1e-6, "{case}");
            for _ in 0..20 {
                let (row, col) = (rng.below(90), rng.below(80));
                let inside = (0..400).filter(|i| {
                    let (u, v) = ((i % 20) as f64 + 0.5, (i / 20) as f64 + 0.5);
                    shape.contains(col as f64 + u / 20.0, row as f64 + v / 20.0)
                });
                let found = inside.count() as f64 / 400.0;
                assert!((all[row * 80 + col] - found).abs() < 0.06, "{case}: {row} {col}");
            }
            for part in [window(32, 17, 40, 21), window(5, 0, 1, 80), window(77, 60, 13, 20)] {
                let cut = shape.cover(part).unwrap_or(vec![0.0; part.len()]);
                for (i, share) in cut.iter().enumerate() {
                    let (row, col) = (part.row + i / part.cols, part.col + i % part.cols);
                    assert!((share - all[row * 80 + col]).abs() < 1e-9, "{case}: {part:?}");
                }
            }
        }
    }

    /// Two areas that share a crooked border share its pixels.
    #[test]
    fn neighbours_leave_no_gap() {
        let mut rng = Stream::new(4, "border", 0);
        let border: Vec<[f64; 2]> =
            (0..=40).map(|i| [10.0 + rng.uniform(-3.0, 3.0), 0.5 * i as f64]).collect();
        let mut west = border.clone();
        west.extend([[0.0, 20.0], [0.0, 0.0]]);
        let mut east = border;
        east.extend([[20.0, 20.0], [20.0, 0.0]]);
        let both = [west, east].map(|c| Shape::new(&[ring(&c, false)]).cover(window(0, 0, 20, 20)));
        for (a, b) in both[0].as_ref().unwrap().iter().zip(both[1].as_ref().unwrap()) {
            assert!((a + b - 1.0).abs() < 1e-9);
        }
    }

    /// Beyond the grid on every side, far smaller than a pixel, and nothing at all.
    #[test]
    fn areas_may_reach_beyond_or_be_tiny() {
        let wide = ring(&[[-50.0, -60.0], [70.0, -60.0], [70.0, 80.0], [-50.0, 80.0]], false);
        let all = Shape::new(&[wide]).cover(window(0, 0, 10, 7)).unwrap();
        assert!(all.iter().all(|share| (share - 1.0).abs() < 1e-12), "{all:?}");
        let slant = ring(&[[-30.0, -2.0], [3.0, 5.0], [-30.0, 12.0]], false);
        let slant = Shape::new(&[slant]);
        let cut = slant.cover(window(0, 0, 10, 7)).unwrap();
        // A triangle that ends at column 3: its part east of column 0.
        let (depth, height) = (3.0, 14.0 * 3.0 / 33.0);
        assert!((cut.iter().sum::<f64>() - 0.5 * depth * height).abs() < 1e-9);
        let tiny = ring(&[[4.1, 4.1], [4.11, 4.1], [4.11, 4.11], [4.1, 4.11]], false);
        let tiny = Shape::new(&[tiny]).cover(window(0, 0, 10, 7)).unwrap();
        assert!((tiny[4 * 7 + 4] - 1e-4).abs() < 1e-12);
        assert_eq!(Shape::new(&[]).cover(window(0, 0, 10, 7)), None);
        assert_eq!(slant.cover(window(0, 4, 10, 3)), None);
    }
}
