//! Prior share: how much of a pixel's variance no data has taken away.
//!
//! ```text
//! variance of the posterior there / (variance of posterior means over the map + mean posterior variance)
//! ```
//!
//! on the link scale. The denominator is, by the law of total variance, that of a pixel about which one
//! knows only that it is on this map. Near 0 the survey decides; near 1 the prior does, and the map says
//! no more than its own average. This holds for every process, whether or not it has a sill to name:
//! what a Gaussian process has far from all data is its sill, which this approaches where a map reaches
//! far beyond the sites. Cut at 1.

use super::{Entry, Reads, Scale};
use crate::predictive::Marginals;

/// `prior-share`.
pub const ENTRY: Entry = Entry {
    name: "prior-share",
    about: "share of the variance over the map that is left at a pixel, link scale: 0 data, 1 prior",
    parameter: None,
    scale: Scale::Share,
    reads: Reads::Spread,
    title: |outcome, _| format!("Share of the variance of {outcome} that the survey leaves open"),
    value: |marginals, i, spread| (moments(marginals, i)[1] / spread).min(1.0),
};

/// Mean and variance of target `i` on the link scale.
///
/// ```
/// use isopleth::{Link, Marginals, Of, product::prior_share::moments};
/// let (weight, mean, sd) = (vec![0.25, 0.75], vec![3.0, -1.0], vec![1.0, 2.0]);
/// let m = Marginals { link: Link::Logit, of: Of::Surface, components: 2, weight, mean, sd };
/// assert_eq!(moments(&m, 0), [0.0, 0.25 * (9.0 + 1.0) + 0.75 * (1.0 + 4.0)]);
/// ```
pub fn moments(marginals: &Marginals, i: usize) -> [f64; 2] {
    let (mean, square) = marginals
        .components(i)
        .fold((0.0, 0.0), |(a, b), (w, m, s)| (a + w * m, b + w * (m * m + s * s)));
    [mean, (square - mean * mean).max(0.0)]
}

/// Variance of a place on the map about which nothing else is known, from [`moments`] of some of its
/// pixels.
///
/// ```
/// use isopleth::product::prior_share::spread;
/// assert_eq!(spread(&[[1.0, 2.0], [3.0, 4.0]]), 1.0 + 3.0);
/// ```
pub fn spread(moments: &[[f64; 2]]) -> f64 {
    let n = moments.len() as f64;
    let over = |f: &dyn Fn(&[f64; 2]) -> f64| moments.iter().map(f).sum::<f64>() / n;
    let mean = over(&|m| m[0]);
    over(&|m| (m[0] - mean).powi(2)) + over(&|m| m[1])
}
