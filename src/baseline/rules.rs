//! Rules that anyone could apply without a model: what a model must beat to be worth its trouble.

use crate::{
    predictive::{Link, Marginals, Of},
    sites::mean_sd,
};

/// What was seen at some sites, on the link scale.
#[derive(Debug, Clone)]
pub struct Seen {
    link: Link,
    sites: Vec<Vec<f64>>,
    values: Vec<f64>,
}

/// Forecasts of new observations at the sites given, `[site][dimension]`.
pub type Rule = fn(&Seen, &[Vec<f64>]) -> Marginals;

/// Every rule, by name.
pub const RULES: &[(&str, Rule)] =
    &[("intercept-only", intercept_only), ("nearest-site", nearest_site)];

impl Seen {
    /// Values as they are.
    ///
    /// # Shapes
    /// `sites` `[site][dimension]`, any plane; `values` `[site]`.
    pub fn values(sites: Vec<Vec<f64>>, values: Vec<f64>) -> Self {
        Seen { link: Link::Identity, sites, values }
    }

    /// Counts as empirical logits ln((k + ½)/(n − k + ½)).
    pub fn counts(sites: Vec<Vec<f64>>, positive: &[f64], tested: &[f64]) -> Self {
        let logit = |(k, n): (&f64, &f64)| ((k + 0.5) / (n - k + 0.5)).ln();
        let values = positive.iter().zip(tested).map(logit).collect();
        Seen { link: Link::Logit, sites, values }
    }

    /// Cases in their exposures as empirical log rates ln((k + ½)/n).
    pub fn rates(sites: Vec<Vec<f64>>, cases: &[f64], exposure: &[f64]) -> Self {
        let rate = |(k, n): (&f64, &f64)| ((k + 0.5) / n).ln();
        let values = cases.iter().zip(exposure).map(rate).collect();
        Seen { link: Link::Log, sites, values }
    }

    /// Logarithms of values above 0.
    pub fn logarithms(sites: Vec<Vec<f64>>, values: Vec<f64>) -> Self {
        Seen { link: Link::Log, sites, values }
    }
}

fn marginals(link: Link, mean: Vec<f64>, sd: f64) -> Marginals {
    let n = mean.len();
    let of = Of::Observation;
    Marginals { link, of, components: 1, weight: vec![1.0; n], mean, sd: vec![sd; n] }
}

/// Every site is one draw from the law of all sites: no map at all.
fn intercept_only(seen: &Seen, asked: &[Vec<f64>]) -> Marginals {
    let (mean, sd) = mean_sd(&seen.values);
    marginals(seen.link, vec![mean; asked.len()], sd)
}

/// Every site is like its nearest neighbour, as nearly as the neighbours seen are alike.
fn nearest_site(seen: &Seen, asked: &[Vec<f64>]) -> Marginals {
    let Seen { link, sites: here, values } = seen;
    let square = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
    let nearest = |to: &[f64], but: Option<usize>| {
        let others = (0..here.len()).filter(|i| Some(*i) != but);
        others.min_by(|a, b| square(&here[*a], to).total_cmp(&square(&here[*b], to))).unwrap_or(0)
    };
    let apart = (0..here.len()).map(|i| values[nearest(&here[i], Some(i))] - values[i]);
    let sd = (apart.map(|d| d * d).sum::<f64>() / here.len() as f64).sqrt();
    // Identical values everywhere: any small sd will do, but none at all is no law.
    let sd = if sd > 0.0 { sd } else { mean_sd(values).1 };
    marginals(*link, asked.iter().map(|to| values[nearest(to, None)]).collect(), sd)
}
