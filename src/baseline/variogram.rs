//! What pairs of observations say of a covariance: the empirical variogram of a window of sites, by
//! distance and direction, and what is left of each observation once its neighbours have spoken.
//!
//! Sources: Matheron (1963), doi:10.2113/gsecongeo.58.8.1246, for the variogram; Gerber & Nychka (2021),
//! arXiv:2012.15339, and Sainsbury-Dale et al. (2025), arXiv:2310.02600, for networks that read
//! covariance parameters.
//!
//! Values: half the mean squared difference of pairs, over the window's variance. Counts: with residuals
//! `r = k − n p̄` and n tried, `Σ rᵢrⱼ / Σ nᵢnⱼ` over pairs is unbiased for the covariance of the two rates
//! whatever was tried, for the noise of two sites is independent; divided by the squared slope of the
//! link at p̄ it is one on the link scale. A plane is taken off first, so that a trend across the window
//! is no texture. Everything hangs on distances and on the sites as a set: shifting the window changes
//! nothing, and lengths come out in units of the window, half its longer side.

use super::exact_gp::Row;
use crate::{likelihood::Likelihood, linalg, predictive::Link};

/// Distance bins: half an octave each, the first from nothing to [`FIRST`].
const BINS: usize = 18;
/// Upper end of the first bin, units of the window.
const FIRST: f64 = 0.01;
/// Coarser bins, of an octave, that are kept by direction.
const OCTAVES: usize = 9;
/// Directions of a half circle.
const SECTORS: usize = 4;
/// Neighbours of the mean squared residuals.
const AROUND: [usize; 3] = [1, 3, 8];
/// Numbers beside those of pairs.
const OTHERS: usize = 12;
/// Numbers that [`Window::features`] holds.
pub const WIDTH: usize = 2 * BINS + 2 * SECTORS * OCTAVES + 2 * AROUND.len() + OTHERS;

/// A window of sites and what their pairs say.
#[derive(Debug, Clone)]
pub struct Window {
    /// Middle of the window's box, on as many axes as sites have; 0 on others.
    pub centre: Place,
    /// Half its longer side.
    pub unit: f64,
    /// Variance of values about their plane, > 0; 1 for counts.
    pub scale: f64,
    /// What a network reads, each of order 1.
    pub features: Vec<f64>,
}

/// A place on three axes; sites on a line or a plane have 0 on the others.
pub type Place = [f64; 3];

/// Pairs of one bin.
#[derive(Clone, Copy, Default)]
struct Bin {
    pairs: f64,
    weight: f64,
    sum: f64,
}

/// Site in units of the window, what was seen there less the plane, and what it weighs.
struct Seen {
    at: Place,
    rest: f64,
    tried: f64,
}

/// The least variance of values, in units of the square of their size: below, they are all one value.
const LEAST: f64 = 1e-12;

impl Window {
    /// Reads sites by number; nothing for sites that do not span a box.
    pub(crate) fn read(row: &Row, sites: &[u32], likelihood: &dyn Likelihood) -> Option<Self> {
        let places: Vec<Place> = sites.iter().map(|i| place(&row.sites[*i as usize])).collect();
        let (centre, unit) = box_of(&places)?;
        let at = |p: &Place| [0, 1, 2].map(|d| (p[d] - centre[d]) / unit);
        let at: Vec<Place> = places.iter().map(at).collect();
        let y: Vec<f64> = sites.iter().map(|i| row.y[*i as usize]).collect();
        let counts = likelihood.counts();
        let tried: Vec<f64> = match counts {
            true => sites.iter().map(|i| row.trials[*i as usize]).collect(),
            false => vec![1.0; y.len()],
        };
        let level = Level::of(&at, &y, &tried);
        let seen: Vec<Seen> = (0..y.len())
            .map(|i| Seen { at: at[i], rest: y[i] - tried[i] * level.at(at[i]), tried: tried[i] })
            .collect();
        let total: f64 = tried.iter().sum();
        let mut features = Vec::with_capacity(WIDTH);
        let (scale, noise) = if counts {
            // A rate that nobody had is not 0: half a case more, and half a one without.
            let open = likelihood.link() == Link::Log;
            let cases: f64 = y.iter().sum();
            let rate = (cases + 0.5) / (total + if open { 0.0 } else { 1.0 });
            let slope = if open { rate } else { rate * (1.0 - rate) };
            (slope, Some((rate, slope)))
        } else {
            let square: f64 = seen.iter().map(|s| s.rest * s.rest).sum::<f64>() / y.len() as f64;
            let size = y.iter().map(|v| v * v).sum::<f64>() / y.len() as f64;
            (square.max(LEAST * size).max(f64::MIN_POSITIVE), None)
        };
        pairs(&seen, scale, noise.is_some(), &mut features);
        match noise {
            None => leftover(&seen, scale, &mut features),
            Some(_) => features.extend([0.0; 2 * AROUND.len()]),
        }
        others(&seen, &level, scale, noise, &mut features);
        debug_assert_eq!(features.len(), WIDTH);
        features.iter_mut().for_each(|f| *f = if f.is_finite() { f.clamp(-8.0, 8.0) } else { 0.0 });
        let scale = if counts { 1.0 } else { scale };
        Some(Window { centre, unit, scale, features })
    }
}

/// A site on three axes.
pub(crate) fn place(site: &[f64]) -> Place {
    [0, 1, 2].map(|d| site.get(d).copied().unwrap_or(0.0))
}

/// Centre of the box of places and half its longest side; nothing for places that span none.
fn box_of(places: &[Place]) -> Option<(Place, f64)> {
    let end = |d: usize, by: fn(f64, f64) -> f64| places.iter().map(|p| p[d]).reduce(by);
    let mut centre = [0.0; 3];
    let mut unit: f64 = 0.0;
    for (d, centre) in centre.iter_mut().enumerate() {
        let (low, high) = (end(d, f64::min)?, end(d, f64::max)?);
        *centre = 0.5 * (low + high);
        unit = unit.max(0.5 * (high - low));
    }
    (unit > 0.0 && unit.is_finite()).then_some((centre, unit))
}

/// A plane through what was seen, weighted by what was tried: `mean + slope·(s − middle)`.
struct Level {
    mean: f64,
    slope: Place,
    middle: Place,
}

impl Level {
    fn of(at: &[Place], y: &[f64], tried: &[f64]) -> Self {
        let total: f64 = tried.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let mean = y.iter().sum::<f64>() / total;
        let middle =
            [0, 1, 2].map(|d| at.iter().zip(tried).map(|(p, n)| n * p[d]).sum::<f64>() / total);
        let mut level = Level { mean, slope: [0.0; 3], middle };
        // Three numbers are not read off a handful of sites.
        if y.len() < 8 {
            return level;
        }
        let (mut a, mut b) = ([0.0; 9], [0.0; 3]);
        for ((p, y), n) in at.iter().zip(y).zip(tried) {
            let d = [0, 1, 2].map(|d| p[d] - middle[d]);
            for i in 0..3 {
                b[i] += d[i] * (y - n * mean);
                for j in 0..3 {
                    a[3 * i + j] += n * d[i] * d[j];
                }
            }
        }
        // Along an axis that sites do not span, nothing is known of the slope.
        let ridge = 1e-6 * (a[0] + a[4] + a[8]) + f64::MIN_POSITIVE;
        [0, 4, 8].iter().for_each(|i| a[*i] += ridge);
        if let Ok(factor) = linalg::lower(a.to_vec(), 3) {
            level.slope.copy_from_slice(&factor.solve(&b));
        }
        level
    }

    fn at(&self, p: Place) -> f64 {
        self.mean + (0..3).map(|d| self.slope[d] * (p[d] - self.middle[d])).sum::<f64>()
    }

    /// Its steepness, per unit of the window.
    fn steepness(&self) -> f64 {
        self.slope.iter().map(|s| s * s).sum::<f64>().sqrt()
    }
}

/// Means over pairs, by distance; and by direction, beside those of all directions.
fn pairs(seen: &[Seen], scale: f64, counts: bool, out: &mut Vec<f64>) {
    let mut bins = [Bin::default(); BINS];
    let mut turned = [[Bin::default(); SECTORS]; OCTAVES];
    let first = 2.0 * FIRST.log2();
    for (i, a) in seen.iter().enumerate() {
        for b in &seen[..i] {
            let [dx, dy, dz] = [0, 1, 2].map(|d| a.at[d] - b.at[d]);
            let square = dx * dx + dy * dy + dz * dz;
            let half = (square.log2() - first).ceil().clamp(0.0, (BINS - 1) as f64) as usize;
            let (weight, sum) = if counts {
                (a.tried * b.tried, a.rest * b.rest)
            } else {
                (1.0, 0.5 * (a.rest - b.rest) * (a.rest - b.rest))
            };
            let bin = &mut bins[half];
            bin.pairs += 1.0;
            bin.weight += weight;
            bin.sum += sum;
            // In space there is no half circle of directions.
            if square > 0.0 && dz == 0.0 {
                // Sectors about the axes and the diagonals.
                let slope = 2.414_213_562_373_095 * dy.abs().min(dx.abs());
                let sector = if slope < dx.abs().max(dy.abs()) {
                    usize::from(dy.abs() > dx.abs()) * 2
                } else {
                    if dx * dy > 0.0 { 1 } else { 3 }
                };
                let bin = &mut turned[half / 2][sector];
                bin.pairs += 1.0;
                bin.weight += weight;
                bin.sum += sum;
            }
        }
    }
    let mean = |bin: &Bin| bin.sum / bin.weight.max(f64::MIN_POSITIVE);
    // How well a bin is known: its pairs; for counts what their noise leaves.
    let known = |bin: &Bin| match counts {
        true => (1.0 + scale * bin.weight.sqrt()).ln() / 4.0,
        false => (1.0 + bin.pairs).ln() / 6.0,
    };
    let shape = |value: f64| match counts {
        true => (value / (scale * scale)).asinh(),
        false => (1e-4 + value / scale).ln() / 2.0,
    };
    let empty = |bin: &Bin| bin.pairs == 0.0;
    for bin in &bins {
        out.extend([if empty(bin) { 0.0 } else { shape(mean(bin)) }, known(bin)]);
    }
    for octave in &turned {
        let mut all = Bin::default();
        for bin in octave {
            all.pairs += bin.pairs;
            all.weight += bin.weight;
            all.sum += bin.sum;
        }
        for bin in octave {
            let beside = shape(mean(bin)) - shape(mean(&all));
            let share = bin.pairs / all.pairs.max(1.0);
            out.extend([if empty(bin) { 0.0 } else { beside }, share]);
        }
    }
}

/// Mean squared difference of each value from what its nearest neighbours say: their mean, and of eight
/// the plane through them. Smooth surfaces leave less to the plane than to the mean.
fn leftover(seen: &[Seen], scale: f64, out: &mut Vec<f64>) {
    let n = seen.len();
    let mut sums = [[0.0; 3]; AROUND.len()];
    let mut near: Vec<(f64, u32)> = Vec::with_capacity(n);
    for (i, a) in seen.iter().enumerate() {
        near.clear();
        near.extend(
            seen.iter().enumerate().filter(|(j, _)| *j != i).map(|(j, b)| {
                (a.at.iter().zip(b.at).map(|(a, b)| (a - b) * (a - b)).sum(), j as u32)
            }),
        );
        // Equally far ones by what they hold: their listing must not matter.
        let order = |a: &(f64, u32), b: &(f64, u32)| {
            let value = |j: u32| seen[j as usize].rest;
            a.0.total_cmp(&b.0).then_with(|| value(a.1).total_cmp(&value(b.1)))
        };
        let most = AROUND[AROUND.len() - 1];
        if near.len() > most {
            near.select_nth_unstable_by(most - 1, order);
            near.truncate(most);
        }
        near.sort_unstable_by(order);
        for (k, sum) in AROUND.iter().zip(&mut sums) {
            if near.len() < *k {
                continue;
            }
            let around = &near[..*k];
            let said = if *k < 8 {
                around.iter().map(|(_, j)| seen[*j as usize].rest).sum::<f64>() / *k as f64
            } else {
                let at: Vec<Place> = around.iter().map(|(_, j)| seen[*j as usize].at).collect();
                let y: Vec<f64> = around.iter().map(|(_, j)| seen[*j as usize].rest).collect();
                Level::of(&at, &y, &vec![1.0; *k]).at(a.at)
            };
            let off = a.rest - said;
            sum[0] += 1.0;
            sum[1] += off * off;
            sum[2] += near[*k - 1].0.sqrt();
        }
    }
    for [count, square, distance] in sums {
        let mean = |x: f64| x / f64::max(count, 1.0);
        let known = count > 0.0;
        out.push(if known { (1e-4 + mean(square) / scale).ln() / 2.0 } else { 0.0 });
        out.push(if known { (1e-4 + mean(distance)).ln() / 2.0 } else { 0.0 });
    }
}

/// What is not about pairs: how many, how far, how skewed; for counts the rate and what was tried.
fn others(seen: &[Seen], level: &Level, scale: f64, noise: Option<(f64, f64)>, out: &mut Vec<f64>) {
    let n = seen.len() as f64;
    let size = n.ln() / 4.0;
    let reach = |d: usize| {
        let side = seen.iter().map(|s| s.at[d]);
        side.clone().fold(f64::NEG_INFINITY, f64::max) - side.fold(f64::INFINITY, f64::min)
    };
    let mut all = vec![size, 0.5 * reach(0), 0.5 * reach(1)];
    match noise {
        None => {
            let sd = scale.sqrt();
            let moment = |p: i32| seen.iter().map(|s| (s.rest / sd).powi(p)).sum::<f64>() / n;
            let slope = level.steepness() / sd;
            all.extend([moment(3).asinh(), moment(4).asinh() - 1.8, slope.asinh()]);
        }
        Some((rate, slope)) => {
            let tried: f64 = seen.iter().map(|s| s.tried).sum::<f64>() / n;
            let square: f64 = seen.iter().map(|s| s.tried * s.tried).sum::<f64>() / n;
            // Σ (r² − n·slope) / Σ n(n − 1): the whole variance, surface and nugget.
            let over = seen.iter().map(|s| s.rest * s.rest - s.tried * slope).sum::<f64>();
            let open = slope == rate;
            let pairs: f64 = match open {
                true => seen.iter().map(|s| s.tried * s.tried).sum(),
                false => seen.iter().map(|s| s.tried * (s.tried - 1.0)).sum(),
            };
            let known = pairs > 0.0;
            all.extend([
                if open { rate.ln() / 3.0 } else { (rate / (1.0 - rate)).ln() / 3.0 },
                (tried * slope).ln() / 3.0,
                tried.max(1e-6).ln() / 3.0,
                (square / (tried * tried).max(f64::MIN_POSITIVE)).ln(),
                if known { (over / (pairs * slope * slope)).asinh() } else { 0.0 },
                if known { (1.0 + slope * pairs.sqrt()).ln() / 4.0 } else { 0.0 },
                (level.steepness() / slope).asinh(),
            ]);
        }
    }
    all.resize(OTHERS, 0.0);
    out.extend(all);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{likelihood, rng::Stream};

    fn row(n: usize, trials: bool, rng: &mut Stream) -> Row {
        let sites: Vec<Vec<f64>> = (0..n).map(|_| vec![rng.unit(), 0.7 * rng.unit()]).collect();
        let trials: Vec<f64> =
            (0..if trials { n } else { 0 }).map(|_| 1.0 + rng.below(5) as f64).collect();
        let y = match trials.is_empty() {
            true => rng.normals(n),
            false => trials.iter().map(|t| rng.binomial(*t as u64, 0.3) as f64).collect(),
        };
        Row { sites, y, trials }
    }

    fn read(row: &Row, likelihood: &str) -> Window {
        let all: Vec<u32> = (0..row.y.len() as u32).collect();
        Window::read(row, &all, likelihood::find(likelihood).unwrap()).unwrap()
    }

    /// Moving and stretching the map, or listing the sites otherwise, changes no feature.
    #[test]
    fn a_window_has_no_place_no_size_and_no_order() {
        for name in ["gaussian", "binomial"] {
            let mut rng = Stream::new(1, name, 0);
            let one = row(60, name == "binomial", &mut rng);
            let order = rng.permutation(60);
            let pick = |x: &[f64]| order.iter().filter_map(|i| x.get(*i).copied()).collect();
            let other = Row {
                sites: order
                    .iter()
                    .map(|i| one.sites[*i].iter().map(|c| 7.0 * c - 100.0).collect())
                    .collect(),
                y: pick(&one.y),
                trials: pick(&one.trials),
            };
            let (a, b) = (read(&one, name), read(&other, name));
            assert!((b.unit / a.unit - 7.0).abs() < 1e-9);
            let apart = a.features.iter().zip(&b.features).map(|(a, b)| (a - b).abs());
            let apart = apart.fold(0.0, f64::max);
            assert!(apart < 1e-6, "{name}: a feature moved by {apart:e}");
        }
    }

    /// Values: a tenfold outcome is the same window with a hundredfold variance.
    #[test]
    fn values_have_no_unit() {
        let mut one = row(60, false, &mut Stream::new(2, "values", 0));
        let a = read(&one, "gaussian");
        one.y.iter_mut().for_each(|y| *y = 10.0 * *y + 3.0);
        let b = read(&one, "gaussian");
        assert!((b.scale / a.scale - 100.0).abs() < 1e-8);
        let apart = a.features.iter().zip(&b.features).map(|(a, b)| (a - b).abs());
        assert!(apart.fold(0.0, f64::max) < 1e-8);
    }

    /// A window of noise is a flat variogram: every bin is at the variance, ln 1 / 2 = 0.
    #[test]
    fn noise_is_a_flat_variogram() {
        let window = read(&row(400, false, &mut Stream::new(3, "noise", 0)), "gaussian");
        for bin in window.features[..2 * BINS].chunks(2).filter(|bin| bin[1] > 1.2) {
            assert!(bin[0].abs() < 0.05, "{bin:?}");
        }
    }

    /// Of counts that share nothing but their rate nothing is left, however few were tried.
    #[test]
    fn binomial_noise_is_no_covariance() {
        let mut sums = [0.0; 2];
        for i in 0..40 {
            let window = read(&row(300, true, &mut Stream::new(4, "counts", i)), "binomial");
            // The bin around 0.45 of a window, and the whole variance.
            sums[0] += window.features[2 * 11].sinh() / 40.0;
            sums[1] += window.features[2 * BINS + 2 * SECTORS * OCTAVES + 6 + 7].sinh() / 40.0;
        }
        // sds of the two means by simulation: 0.003 and 0.01; a logit variance worth mapping is 0.05.
        assert!(sums[0].abs() < 0.02 && sums[1].abs() < 0.05, "{sums:?}");
    }

    /// One place, or one site, is no window.
    #[test]
    fn what_spans_no_box_is_no_window() {
        let gaussian = likelihood::find("gaussian").unwrap();
        let one = Row { sites: vec![vec![1.0, 2.0]; 3], y: vec![1.0; 3], trials: Vec::new() };
        assert!(Window::read(&one, &[0, 1, 2], gaussian).is_none());
        assert!(Window::read(&one, &[], gaussian).is_none());
        // All equal: finite.
        let sites = (0..9).map(|i| vec![f64::from(i), f64::from(i % 3)]).collect();
        let equal = Row { sites, y: vec![4.0; 9], trials: Vec::new() };
        let window = Window::read(&equal, &[0, 1, 2, 3, 4, 5, 6, 7, 8], gaussian).unwrap();
        assert!(window.scale > 0.0 && window.features.iter().all(|f| f.is_finite()));
    }
}
