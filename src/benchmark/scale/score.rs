//! Scores of one process on one drawn case, and what they cost.

use std::time::Instant;

use serde::Serialize;

use super::drawn::{Drawn, Frame, Truth};
use crate::{
    error::Result,
    mapping::machine,
    predictive::{Link, Marginals, Of},
    process::Posterior,
    score::{crps, log_count},
};

/// Levels of the central intervals whose coverage is counted.
pub const LEVELS: [f64; 3] = [0.5, 0.8, 0.95];
/// Targets that are asked at once.
const PART: usize = 8192;

/// Means over the targets that are scored.
///
/// Of values, CRPS and coverage are of a new observation; of counts they are of the surface, since the
/// intervals of a count of five people hold more than they say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Scores {
    /// Continuous ranked probability score, outcome units.
    pub crps: f64,
    /// Log density of the value, or log probability of the count, nats.
    pub log_score: f64,
    /// Share of truths inside each of [`LEVELS`].
    pub inside: [f64; LEVELS.len()],
}

/// What a step took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Cost {
    /// By the clock, seconds.
    pub wall: f64,
    /// Of all processors, seconds; NaN where the system does not say.
    pub cpu: f64,
}

impl Cost {
    /// Does `work` and adds what it took.
    pub fn add<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let (start, before) = (Instant::now(), machine::cpu_seconds());
        let done = work();
        self.wall += start.elapsed().as_secs_f64();
        self.cpu += machine::cpu_seconds().zip(before).map_or(f64::NAN, |(b, a)| b - a);
        done
    }
}

/// Asks a posterior, which sees the case in `frame`, about all targets, or of them only those that are
/// scored.
///
/// # Errors
/// Those of the posterior, and values that are not finite.
pub fn ask(
    posterior: &dyn Posterior,
    drawn: &Drawn,
    frame: &Frame,
    all: bool,
    cost: &mut Cost,
) -> Result<Scores> {
    let which: Vec<usize> = match all {
        true => (0..drawn.asked.len()).collect(),
        false => drawn.truths.iter().map(|t| t.target).collect(),
    };
    let (mut sum, mut truths) = (Scores::default(), &drawn.truths[..]);
    for part in which.chunks(PART) {
        let places: Vec<[f64; 2]> = part.iter().map(|i| drawn.asked[*i]).collect();
        let sites = frame.sites(&places)?;
        let predictive = cost.add(|| posterior.at(&sites))?;
        let end = truths.partition_point(|t| t.target <= part[part.len() - 1]);
        let (here, later) = truths.split_at(end);
        truths = later;
        if here.is_empty() {
            continue;
        }
        let [surface, observation] = [Of::Surface, Of::Observation].map(|of| {
            let marginals = predictive.marginals(0, of)?;
            let [mean, sd] = frame.level;
            Ok::<_, crate::Error>(marginals.rescale(mean, sd))
        });
        let (surface, observation) = (surface?, observation?);
        let each = surface.map(|surface, i| {
            let truth = here.binary_search_by_key(&part[i], |t| t.target).ok()?;
            Some(one(surface, &observation, i, &here[truth]))
        });
        for one in each.into_iter().flatten() {
            sum.crps += one.crps;
            sum.log_score += one.log_score;
            sum.inside.iter_mut().zip(one.inside).for_each(|(sum, one)| *sum += one);
        }
    }
    let n = drawn.truths.len() as f64;
    Ok(Scores {
        crps: sum.crps / n,
        log_score: sum.log_score / n,
        inside: sum.inside.map(|v| v / n),
    })
}

fn one(surface: &Marginals, observation: &Marginals, i: usize, truth: &Truth) -> Scores {
    let (of, at, log_score) = match surface.link {
        Link::Identity => (observation, truth.noisy, observation.link_log_density(i, truth.noisy)),
        _ => (surface, truth.surface, log_count(observation, i, truth.y, truth.trials)),
    };
    let off = (2.0 * of.link_cdf(i, at) - 1.0).abs();
    Scores {
        crps: crps::marginal(of, i, at),
        log_score,
        inside: LEVELS.map(|level| f64::from(u8::from(off <= level))),
    }
}
