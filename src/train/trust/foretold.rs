//! The learned check: the model foretells a fifth of the sites from the others, five times, here and on
//! its own draws, and whoever surprises it more than any of them is unlike them, whatever the reason.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use statrs::function::beta::beta_reg;

use super::{Context, rows, statistics::Statistic};
use crate::{
    error::Result,
    likelihood::Likelihood,
    predictive::{Link, Marginals, Of, gauss_hermite, normal_cdf},
    process::Process,
};

/// Sites that take part at most, and draws beside the survey.
const SITES: usize = 60;
const DRAWS: usize = 99;
const FOLDS: usize = 5;
/// Contexts in one call of the model: memory goes with them, and time hardly does.
const BATCH: usize = 2;

/// How held-out sites of the survey were met by the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Foretold {
    /// Sites held out in turn.
    pub sites: usize,
    /// Share of them inside the central 50, 80 and 95 % interval; of counts, in expectation over a
    /// randomised probability integral transform.
    pub inside: [f64; 3],
    /// Mean surprise: −ln of the two-sided p-value, 1 for a law that is right.
    pub surprise: f64,
    /// Mean probability integral transform, ½ for a law that is right.
    pub middle: f64,
}

/// What is compared with the draws.
pub(super) const FIGURES: &[Statistic] = &[
    Statistic {
        name: "surprise at held-out sites (1 is as foretold)",
        high: "the model is surer than it may be on these sites, and so will its intervals be on the \
               map; believe `isopleth validate`, and compare with --model gp",
        low: "the model is less sure than it could be: its intervals are too wide here; compare with \
              --model gp",
        show: |log, _| super::short(log.exp()),
    },
    Statistic {
        name: "mean place of held-out sites in their laws (50 % is the middle)",
        high: "held-out sites lie above what is foretold, all in all",
        low: "held-out sites lie below what is foretold, all in all",
        show: |middle, _| format!("{} %", super::short(100.0 * middle)),
    },
];

/// Which sites are foretold from which.
pub(super) struct Foretelling {
    own: Context,
    folds: Vec<[Vec<usize>; 2]>,
}

impl Foretelling {
    /// Of sites in an order of chance; nothing with too few of them.
    pub fn new(own: &Context) -> Option<Self> {
        let n = own.len().min(SITES) / FOLDS * FOLDS;
        if n < 3 * FOLDS {
            return None;
        }
        let fold = |f: usize| {
            let (held, seen) = (0..n).partition(|i| i % FOLDS == f);
            [seen, held]
        };
        let own = own.part(&(0..n).collect::<Vec<_>>());
        Some(Foretelling { own, folds: (0..FOLDS).map(fold).collect() })
    }

    /// The figures of the survey and then of each draw, and what they were here.
    pub fn ask<'a>(
        &self,
        process: &(dyn Process + Send + Sync),
        likelihood: &dyn Likelihood,
        draws: impl Iterator<Item = &'a Context>,
    ) -> Result<(Vec<Vec<f64>>, Foretold)> {
        let all: Vec<usize> = (0..self.own.len()).collect();
        let mut members = vec![self.own.clone()];
        members.extend(draws.take(DRAWS).map(|draw| draw.part(&all)));
        let chunks: Vec<&[Context]> = members.chunks(BATCH).collect();
        let link = likelihood.link();
        let met: Vec<Vec<Foretold>> = chunks
            .par_iter()
            .map(|chunk| self.meet(process, link, chunk))
            .collect::<Result<_>>()?;
        let met: Vec<Foretold> = met.into_iter().flatten().collect();
        let pool = met.iter().map(|m| vec![m.surprise.ln(), m.middle]).collect();
        Ok((pool, met[0].clone()))
    }

    /// How each of some contexts is foretold, all of them at once.
    fn meet(
        &self,
        process: &(dyn Process + Send + Sync),
        link: Link,
        contexts: &[Context],
    ) -> Result<Vec<Foretold>> {
        let refs: Vec<&Context> = contexts.iter().collect();
        let mut pits: Vec<Vec<[f64; 2]>> = vec![Vec::new(); contexts.len()];
        for [seen, held] in &self.folds {
            let targets = rows(&refs, held)?.sites;
            let predictive = process.condition(&rows(&refs, seen)?)?.at(&targets)?;
            for (row, (context, pits)) in contexts.iter().zip(&mut pits).enumerate() {
                let marginals = predictive.marginals(row, Of::Observation)?;
                for (at, site) in held.iter().enumerate() {
                    let trials = context.trials.as_ref().map(|t| t[*site]);
                    pits.push(pit(&marginals, at, link, context.y[*site], trials));
                }
            }
        }
        Ok(pits.iter().map(|pits| Foretold::of(pits)).collect())
    }
}

/// The cumulative probability just below what was seen, and up to it: one number for values.
fn pit(m: &Marginals, i: usize, link: Link, y: f64, trials: Option<f64>) -> [f64; 2] {
    let Some(n) = trials else {
        let u = m.link_cdf(i, y);
        return [u, u];
    };
    let below = |k: f64| {
        if k < 0.0 {
            return 0.0;
        }
        if k >= n {
            return 1.0;
        }
        let at = |eta: f64| {
            let p = link.outcome(eta).clamp(1e-12, 1.0 - 1e-12);
            let variance = n * p * (1.0 - p);
            match variance > 9.0 {
                true => normal_cdf((k + 0.5 - n * p) / variance.sqrt()),
                false => beta_reg(n - k, k + 1.0, 1.0 - p),
            }
        };
        m.components(i)
            .filter(|(weight, ..)| *weight > 1e-3)
            .map(|(weight, mean, sd)| {
                let inner: f64 = gauss_hermite().iter().map(|(x, u)| u * at(mean + sd * x)).sum();
                weight * inner
            })
            .sum::<f64>()
            .min(1.0)
    };
    let (low, high) = (below(y - 1.0), below(y));
    [low, high.max(low)]
}

/// Mean over u in [a, b] of f, given its integral from 0.
fn mean_over([a, b]: [f64; 2], f: impl Fn(f64) -> f64, integral: impl Fn(f64) -> f64) -> f64 {
    if b - a < 1e-9 { f(0.5 * (a + b)) } else { (integral(b) - integral(a)) / (b - a) }
}

impl Foretold {
    fn of(pits: &[[f64; 2]]) -> Self {
        let n = pits.len().max(1) as f64;
        let mean = |f: &dyn Fn([f64; 2]) -> f64| pits.iter().map(|p| f(*p)).sum::<f64>() / n;
        // −ln(2 min(u, 1 − u)), and its integral from 0: u (1 − ln 2u) up to ½, symmetric beyond.
        let surprise = |u: f64| -(2.0 * u.min(1.0 - u)).max(1e-16).ln();
        let half = |u: f64| if u > 0.0 { u * (1.0 - (2.0 * u).ln()) } else { 0.0 };
        let up_to = |u: f64| if u <= 0.5 { half(u) } else { 1.0 - half(1.0 - u) };
        let inside = |level: f64| {
            let (low, high) = (0.5 - 0.5 * level, 0.5 + 0.5 * level);
            mean(&|p| {
                mean_over(
                    p,
                    |u| if (low..=high).contains(&u) { 1.0 } else { 0.0 },
                    |u| u.clamp(low, high) - low,
                )
            })
        };
        Foretold {
            sites: pits.len(),
            inside: [0.5, 0.8, 0.95].map(inside),
            surprise: mean(&|p| mean_over(p, surprise, up_to)).max(1e-6),
            middle: mean(&|[a, b]| 0.5 * (a + b)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn a_law_that_is_right_surprises_by_one() {
        let mut rng = Stream::new(1, "surprise", 0);
        let values: Vec<[f64; 2]> = (0..20_000).map(|_| [rng.unit(); 2]).collect();
        let met = Foretold::of(&values);
        assert!((met.surprise - 1.0).abs() < 0.03, "{met:?}");
        assert!((met.inside[1] - 0.8).abs() < 0.01 && (met.middle - 0.5).abs() < 0.01, "{met:?}");
        // The whole unit interval at once: nothing was seen, so nothing can surprise.
        let blank = Foretold::of(&[[0.0, 1.0]]);
        assert!((blank.surprise - 1.0).abs() < 1e-12 && (blank.inside[0] - 0.5).abs() < 1e-12);
        assert!(Foretold::of(&[[0.001; 2], [0.999; 2]]).surprise > 6.0);
    }

    /// Counts against the plain sum over a law of logits with two components.
    #[test]
    fn the_law_of_a_count_is_that_of_the_village_integrated() {
        let m = Marginals {
            link: Link::Logit,
            of: Of::Observation,
            components: 2,
            weight: vec![0.4, 0.6],
            mean: vec![-1.5, 0.2],
            sd: vec![0.3, 0.5],
        };
        let (n, steps) = (12.0_f64, 20_000);
        let exact = |k: f64| -> f64 {
            (0..steps)
                .map(|j| {
                    let u = (j as f64 + 0.5) / steps as f64;
                    let p = Link::Logit.outcome(m.link_quantile(0, u));
                    beta_reg(n - k, k + 1.0, 1.0 - p) / steps as f64
                })
                .sum()
        };
        let [low, high] = pit(&m, 0, Link::Logit, 4.0, Some(n));
        assert!(
            (low - exact(3.0)).abs() < 1e-3 && (high - exact(4.0)).abs() < 1e-3,
            "{low} {high}"
        );
        assert_eq!(pit(&m, 0, Link::Logit, n, Some(n))[1], 1.0);
        assert_eq!(pit(&m, 0, Link::Logit, 0.0, Some(n))[0], 0.0);
    }
}
