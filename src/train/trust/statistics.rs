//! Figures of a survey that are compared with those of training: each one number, its unit of no
//! account, and in words what it may mean when it is far off.

use super::{Context, short};
use crate::predictive::Link;

/// A figure.
pub(super) struct Statistic {
    pub name: &'static str,
    /// What it may mean above, and below, all that was trained on.
    pub high: &'static str,
    pub low: &'static str,
    /// In the user's words; for counts or values.
    pub show: fn(f64, bool) -> String,
}

fn plain(value: f64, _: bool) -> String {
    short((1e4 * value).round() / 1e4)
}
fn percent(value: f64, _: bool) -> String {
    format!("{} %", short(100.0 * value))
}
fn prevalence(logit: f64, _: bool) -> String {
    percent(Link::Logit.outcome(logit), true)
}
fn exp(log: f64, _: bool) -> String {
    short(log.exp())
}
/// −ln(1 − R²) as R².
fn explained(log: f64, _: bool) -> String {
    format!("{} %", short(100.0 * (1.0 - (-log).exp()).max(0.0)))
}

/// Of what was observed, given the sites and the people tested.
pub(super) const OBSERVED: &[Statistic] = &[
    Statistic {
        name: "prevalence over all sites",
        high: "far above what the model knows; are positive and tested the right columns?",
        low: "far below what the model knows: a rate (per 1,000?) rather than a prevalence, or too \
              rare for it; compare with --model gp",
        show: prevalence,
    },
    Statistic {
        name: "spread between sites beyond chance (sd of logits)",
        high: "sites differ more than the model believes villages can: mixed surveys or units?",
        low: "sites differ less than the model believes possible: are they real surveys?",
        show: plain,
    },
    Statistic {
        name: "share of sites with nobody positive",
        high: "more empty sites than so high a prevalence elsewhere allows: two populations, or \
               missing counts written as 0",
        low: "fewer empty sites than the prevalence lets expect",
        show: percent,
    },
    Statistic {
        name: "share of sites with everybody positive",
        high: "more full sites than the prevalence allows: positive and tested mixed up in some rows?",
        low: "fewer full sites than the prevalence lets expect",
        show: percent,
    },
    Statistic {
        name: "correlation of prevalence and number tested",
        high: "the more are tested the more are positive in proportion: do these columns hold what \
               they say?",
        low: "positives do not grow with the number tested: percentages, or a rate, instead of counts?",
        show: plain,
    },
    Statistic {
        name: "difference between neighbouring sites, in units of chance",
        high: "neighbouring sites differ far more than villages do in the model's training",
        low: "neighbouring sites agree better than counts of people can: percentages, smoothed or \
              modelled figures instead of counts?",
        show: exp,
    },
    Statistic {
        name: "skewness",
        high: "a long tail of high values: outliers, a code for missing, or values that want a \
               logarithm",
        low: "a long tail of low values: outliers, or a code for missing",
        show: plain,
    },
    Statistic {
        name: "largest distance from the middle, in units of the usual spread",
        high: "some site is far outside the others: an outlier, another unit, or a code for missing",
        low: "no site stands out at all, as in figures that were cut or ranked",
        show: exp,
    },
    Statistic {
        name: "variance between nearest neighbours over the variance",
        high: "neighbours are less alike than any two sites: coordinates of other rows, or x and y \
               mixed up?",
        low: "neighbours are all but the same: a surface smoother, or of longer range, than any the \
              model knows; or figures that were interpolated",
        show: exp,
    },
    Statistic {
        name: "likeness of the nearest 5 % of pairs",
        high: "surfaces of this range are smoother than any the model knows",
        low: "near sites are less alike than far ones, which the model holds to be impossible",
        show: plain,
    },
    Statistic {
        name: "likeness of pairs at the nearest 5 to 20 %",
        high: "the range is longer than any the model knows",
        low: "near sites are less alike than far ones, as on a chequerboard",
        show: plain,
    },
    Statistic {
        name: "likeness of pairs at the nearest 20 to 50 %",
        high: "the range is longer than any the model knows",
        low: "sites at a middling distance are unlike, as across one sharp border or in waves",
        show: plain,
    },
    Statistic {
        name: "variance explained by a slope",
        high: "all but a plane: a slope, or a range longer than any the model knows",
        low: "no slope at all, where some is to be expected",
        show: explained,
    },
    Statistic {
        name: "most unlike its neighbours, in units of the usual site",
        high: "some site is quite unlike all around it: a wrong place, a wrong count, another unit",
        low: "no site is unlike its neighbours, as in figures that were interpolated",
        show: exp,
    },
];

/// Of the design: sites, and people tested.
pub(super) const DESIGN: &[Statistic] = &[
    Statistic {
        name: "regularity of the sites (Clark & Evans)",
        high: "sites are more evenly spread than on any grid it knows",
        low: "sites are more crowded than any it knows: a few places far apart hold them all, and the \
              model tells little within them; map regions on their own",
        show: exp,
    },
    Statistic {
        name: "shorter side of the region over the longer",
        high: "a region squarer than any",
        low: "the sites lie all but on a line: compare with --model gp",
        show: exp,
    },
    Statistic {
        name: "share of the length that the middle half of the sites spans",
        high: "sites are at the ends, with nothing between",
        low: "a few sites far from all others squeeze the rest together: wrong coordinates, or an \
              island to be mapped on its own",
        show: percent,
    },
    Statistic {
        name: "share of the width that the middle half of the sites spans",
        high: "sites are at the sides, with nothing between",
        low: "a few sites far from all others squeeze the rest together: wrong coordinates, or an \
              island to be mapped on its own",
        show: percent,
    },
    Statistic {
        name: "number tested at the middle site",
        high: "more people at a site than in any survey it knows: populations instead of samples?",
        low: "fewer people at a site than in any survey it knows",
        show: exp,
    },
    Statistic {
        name: "spread of the number tested (sd of logarithms)",
        high: "the number tested differs between sites more than in any survey it knows: samples and \
               whole districts in one table?",
        low: "as equal as can be",
        show: plain,
    },
];

/// What of a layout all observations at it share.
pub(super) struct Geometry {
    /// The three nearest sites of each, nearest first.
    nearest: Vec<[usize; 3]>,
    /// Pairs at the nearest 5 %, 5 to 20 % and 20 to 50 %.
    pairs: [Vec<[usize; 2]>; 3],
    /// Orthonormal directions of a plane over the sites, beside the constant.
    plane: Vec<Vec<f64>>,
}

fn square(a: &[f64; 2], b: &[f64; 2]) -> f64 {
    (a[0] - b[0]).powi(2) + (a[1] - b[1]).powi(2)
}

impl Geometry {
    /// Of at least four sites.
    pub fn new(xy: &[[f64; 2]]) -> Self {
        let n = xy.len();
        let nearest = (0..n).map(|i| {
            let mut others: Vec<usize> = (0..n).filter(|j| *j != i).collect();
            let by =
                |a: &usize, b: &usize| square(&xy[*a], &xy[i]).total_cmp(&square(&xy[*b], &xy[i]));
            if others.len() > 3 {
                others.select_nth_unstable_by(2, by);
            }
            others.truncate(3);
            others.sort_by(by);
            std::array::from_fn(|k| others[k.min(others.len() - 1)])
        });
        let mut pairs: Vec<[usize; 2]> = (0..n).flat_map(|i| (0..i).map(move |j| [i, j])).collect();
        let far = |p: &[usize; 2]| square(&xy[p[0]], &xy[p[1]]);
        pairs.sort_by(|a, b| far(a).total_cmp(&far(b)));
        let cut = |share: f64| ((share * pairs.len() as f64) as usize).max(1);
        let [a, b, c] = [0.05, 0.2, 0.5].map(cut);
        let mut plane: Vec<Vec<f64>> = Vec::new();
        for d in 0..2 {
            let mut v: Vec<f64> = xy.iter().map(|p| p[d]).collect();
            let mean = v.iter().sum::<f64>() / n as f64;
            v.iter_mut().for_each(|x| *x -= mean);
            for u in &plane {
                let along: f64 = u.iter().zip(&v).map(|(a, b)| a * b).sum();
                v.iter_mut().zip(u).for_each(|(x, u)| *x -= along * u);
            }
            let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
            if length > 1e-9 {
                v.iter_mut().for_each(|x| *x /= length);
                plane.push(v);
            }
        }
        Geometry {
            nearest: nearest.collect(),
            pairs: [pairs[..a].to_vec(), pairs[a..b].to_vec(), pairs[b..c].to_vec()],
            plane,
        }
    }
}

/// The quantile of sorted values, between neighbours by proportion.
fn quantile(sorted: &[f64], level: f64) -> f64 {
    let at = level * (sorted.len() - 1) as f64;
    let below = at as usize;
    let next = sorted[(below + 1).min(sorted.len() - 1)];
    sorted[below] + (at - below as f64) * (next - sorted[below])
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Ranks, ties sharing their mean rank.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    while start < order.len() {
        let same = |i: &usize| values[*i] == values[order[start]];
        let len = order[start..].iter().take_while(|i| same(i)).count();
        let rank = start as f64 + 0.5 * (len - 1) as f64;
        order[start..start + len].iter().for_each(|i| ranks[*i] = rank);
        start += len;
    }
    ranks
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let (ma, mb) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        ab += (x - ma) * (y - mb);
        aa += (x - ma).powi(2);
        bb += (y - mb).powi(2);
    }
    ab / (aa * bb).sqrt() // NaN where one never varies: there is no such figure
}

/// The figures of [`OBSERVED`], NaN where there is none.
pub(super) fn observed(context: &Context, geometry: &Geometry) -> Vec<f64> {
    let n = context.len() as f64;
    let (z, noise): (Vec<f64>, Vec<f64>) = match &context.trials {
        None => (context.y.clone(), vec![0.0; context.len()]),
        Some(tested) => context
            .y
            .iter()
            .zip(tested)
            .map(|(k, n)| {
                let (yes, no) = (k + 0.5, n - k + 0.5);
                ((yes / no).ln(), 1.0 / yes + 1.0 / no)
            })
            .unzip(),
    };
    let mean = z.iter().sum::<f64>() / n;
    let off: Vec<f64> = z.iter().map(|v| v - mean).collect();
    let variance = off.iter().map(|v| v * v).sum::<f64>() / n;
    let chance = noise.iter().sum::<f64>() / n;

    let mut figures = vec![f64::NAN; OBSERVED.len()];
    if let Some(tested) = &context.trials {
        let (k, all) = (context.y.iter().sum::<f64>(), tested.iter().sum::<f64>());
        figures[0] = ((k + 0.5) / (all - k + 0.5)).ln();
        figures[1] = (variance - chance).max(0.0).sqrt();
        let share = |f: &dyn Fn(f64, f64) -> bool| {
            context.y.iter().zip(tested).filter(|(k, n)| f(**k, **n)).count() as f64 / n
        };
        figures[2] = share(&|k, _| k == 0.0);
        figures[3] = share(&|k, n| k == n);
        let rates: Vec<f64> = context.y.iter().zip(tested).map(|(k, n)| k / n).collect();
        figures[4] = correlation(&ranks(&rates), &ranks(tested));
        let apart = geometry
            .nearest
            .iter()
            .enumerate()
            .map(|(i, near)| (z[i] - z[near[0]]).powi(2) / (noise[i] + noise[near[0]]));
        figures[5] = (apart.sum::<f64>() / n).max(1e-6).ln();
    }
    if variance <= 1e-12 {
        return figures; // one value everywhere has no shape
    }
    figures[6] = off.iter().map(|v| v.powi(3)).sum::<f64>() / n / variance.powf(1.5);
    let order = sorted(z.iter().copied());
    let spread = (quantile(&order, 0.75) - quantile(&order, 0.25)) / 1.349;
    if spread > 0.0 {
        let middle = quantile(&order, 0.5);
        let most = z.iter().map(|v| (v - middle).abs()).fold(0.0, f64::max);
        figures[7] = (most / spread).ln();
    }
    let half = |i: usize, j: usize| 0.5 * (z[i] - z[j]).powi(2);
    let near = geometry.nearest.iter().enumerate().map(|(i, near)| half(i, near[0]));
    figures[8] = (near.sum::<f64>() / n / variance).max(1e-8).ln();
    for (figure, pairs) in figures[9..12].iter_mut().zip(&geometry.pairs) {
        let mean = pairs.iter().map(|[i, j]| half(*i, *j)).sum::<f64>() / pairs.len() as f64;
        *figure = 1.0 - mean / variance;
    }
    let along =
        geometry.plane.iter().map(|u| u.iter().zip(&off).map(|(u, v)| u * v).sum::<f64>().powi(2));
    figures[12] = -(1.0 - along.sum::<f64>() / (n * variance)).max(1e-8).ln();
    let unlike = sorted(
        geometry
            .nearest
            .iter()
            .enumerate()
            .map(|(i, near)| (z[i] - near.iter().map(|j| z[*j]).sum::<f64>() / 3.0).abs()),
    );
    let usual = quantile(&unlike, 0.5);
    if usual > 0.0 {
        figures[13] = (unlike[unlike.len() - 1] / usual).ln();
    }
    figures
}

/// The figures of [`DESIGN`], NaN where there is none.
pub(super) fn design(context: &Context) -> Vec<f64> {
    let (xy, n) = (&context.xy, context.len() as f64);
    let axis = |d: usize| sorted(xy.iter().map(|p| p[d]));
    let axes = [axis(0), axis(1)];
    let side = |d: usize| axes[d][axes[d].len() - 1] - axes[d][0];
    let [long, short] = if side(0) >= side(1) { [0, 1] } else { [1, 0] };
    let middle = |d: usize| quantile(&axes[d], 0.75) - quantile(&axes[d], 0.25);
    let near = (0..xy.len()).map(|i| {
        let others = (0..xy.len()).filter(|j| *j != i).map(|j| square(&xy[i], &xy[j]));
        others.fold(f64::INFINITY, f64::min).sqrt()
    });
    let apart = near.sum::<f64>() / n;
    let chance = 0.5 * (side(long) * side(short) / n).sqrt();
    let mut figures = vec![
        (apart / chance.max(1e-9)).max(1e-6).ln(),
        (side(short) / side(long)).max(1e-6).ln(),
        middle(long) / side(long),
        middle(short) / side(short).max(1e-9),
        f64::NAN,
        f64::NAN,
    ];
    if let Some(tested) = &context.trials {
        let logs = sorted(tested.iter().map(|n| n.max(1.0).ln()));
        figures[4] = quantile(&logs, 0.5);
        let mean = logs.iter().sum::<f64>() / n;
        figures[5] = (logs.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// 16 sites on a lattice, so that distances and slopes can be done by hand.
    fn lattice(y: impl Fn(f64, f64) -> f64, trials: Option<f64>) -> Context {
        let xy: Vec<[f64; 2]> = (0..16).map(|i| [(i % 4) as f64, (i / 4) as f64]).collect();
        let y = xy.iter().map(|p| y(p[0], p[1])).collect();
        Context { y, trials: trials.map(|n| vec![n; 16]), xy }
    }

    fn figure(context: &Context, name: &str) -> f64 {
        let at = OBSERVED.iter().position(|s| s.name.contains(name)).unwrap();
        observed(context, &Geometry::new(&context.xy))[at]
    }

    #[test]
    fn a_slope_is_all_slope_and_a_chequerboard_none() {
        let slope = lattice(|x, y| 2.0 * x - y, None);
        assert!(figure(&slope, "slope") > 15.0);
        // Variance 1.25 · (4 + 1), nearest neighbours 1 apart along one axis: half of 4 or of 1.
        let gap = figure(&slope, "nearest neighbours over").exp();
        assert!((0.5 / 6.25..=2.0 / 6.25).contains(&gap), "{gap}");
        let board = lattice(|x, y| ((x + y) % 2.0) * 2.0 - 1.0, None);
        assert!(figure(&board, "slope").abs() < 0.2);
        assert!((figure(&board, "nearest neighbours over") - 2.0_f64.ln()).abs() < 1e-9);
        assert!((figure(&board, "nearest 5 %") + 1.0).abs() < 1e-9);
    }

    #[test]
    fn counts_have_their_own_figures() {
        let counts = lattice(|x, _| if x == 0.0 { 0.0 } else { 20.0 }, Some(20.0));
        assert!((figure(&counts, "prevalence over") - (240.5_f64 / 80.5).ln()).abs() < 1e-12);
        assert_eq!(figure(&counts, "nobody positive"), 0.25);
        assert_eq!(figure(&counts, "everybody positive"), 0.75);
        assert!(figure(&counts, "number tested").is_nan()); // it never varies
        assert!(figure(&lattice(|x, _| x, None), "nobody positive").is_nan());
    }

    #[test]
    fn one_site_far_away_squeezes_the_rest() {
        let mut rng = Stream::new(1, "sites", 0);
        let mut xy: Vec<[f64; 2]> = (0..50).map(|_| [rng.unit(), rng.unit()]).collect();
        let even = design(&Context { xy: xy.clone(), y: vec![0.0; 50], trials: None });
        xy[7] = [40.0, 0.5];
        let far = design(&Context { xy, y: vec![0.0; 50], trials: None });
        assert!((even[2] - 0.5).abs() < 0.15 && far[2] < 0.02, "{} {}", even[2], far[2]);
        // Sites by chance have an index of 1, a little above for the edge.
        assert!((even[0].exp() - 1.05).abs() < 0.15, "{}", even[0].exp());
    }

    #[test]
    fn ranks_share_ties() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [2.5, 0.0, 2.5, 1.0]);
        assert!((correlation(&[1.0, 2.0, 4.0], &[-2.0, -4.0, -8.0]) + 1.0).abs() < 1e-12);
    }
}
