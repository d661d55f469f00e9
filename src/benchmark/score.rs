//! Scores of a process on fixed tasks, in f64, beside those of the process that made them.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::{
    baseline::{ExactGp, IntegratedGp},
    error::Result,
    likelihood::Likelihood,
    predictive::{Marginals, Of},
    process::{Process, Reward},
    rng::Stream,
    score::crps,
    task::{Batch, Tasks},
};

/// Levels of the central intervals whose coverage is counted.
pub const LEVELS: [f64; 19] = [
    0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85,
    0.9, 0.95,
];
/// Tasks that are drawn with the same sizes.
pub const ROWS: usize = 4;
/// Evaluation tasks are the same for every model and seed, and training sees none of them.
pub const SEED: u64 = 0xbe9c_4a11;

/// Scores of one task, means over its targets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    /// Log density at each target alone, nats per target.
    pub pointwise: f64,
    /// Log density of all targets together, nats per target; NaN for processes without one.
    pub joint: f64,
    /// Continuous ranked probability score, units of the outcome.
    pub crps: f64,
    /// Squared error of the mean, units of the outcome, squared.
    pub mse: f64,
    /// Share of targets inside the central interval of each of [`LEVELS`].
    pub inside: [f64; LEVELS.len()],
}

/// Scores of marginals against `truth`.
pub fn pointwise(marginals: &Marginals, truth: &[f64]) -> Scores {
    let mut scores = Scores { joint: f64::NAN, ..Scores::default() };
    let each = 1.0 / truth.len().max(1) as f64;
    for (i, y) in truth.iter().enumerate() {
        scores.pointwise += each * marginals.link_log_density(i, *y);
        scores.crps += each * crps::marginal(marginals, i, *y);
        scores.mse += each * (marginals.mean_sd(i).0 - y).powi(2);
        let off = (2.0 * marginals.link_cdf(i, *y) - 1.0).abs();
        for (inside, level) in scores.inside.iter_mut().zip(LEVELS) {
            *inside += if off <= level { each } else { 0.0 };
        }
    }
    scores
}

/// One task, as a model is scored on it.
#[derive(Debug, Clone)]
pub struct Fact {
    /// Context sites.
    pub context: usize,
    /// Targets.
    pub targets: usize,
    /// Class of the surface.
    pub class: Option<Arc<str>>,
    /// Tasks of the same sizes share this number.
    pub cluster: usize,
}

/// Tasks to score on, with the scores of the process that made them.
pub struct Fixed {
    batches: Vec<Batch>,
    of: Of,
    /// What each task is.
    pub facts: Vec<Fact>,
    /// The true process on each task; nothing where no Gaussian process made one of them.
    pub exact: Vec<Option<Scores>>,
    /// Pointwise log density of the true process with its sd raised to a floor, by the floor's bits.
    floored: BTreeMap<u64, Vec<f64>>,
}

/// Context sites of batch `i`: spread evenly over the range of the design, where it is one range with
/// equal chances, for much of a score depends on the size; otherwise drawn.
fn size(tasks: &Tasks, i: usize) -> usize {
    // Multiples of the golden section fill [0, 1) evenly at any time.
    const GOLDEN: f64 = 0.618_033_988_749_894_9;
    match &tasks.design().context[..] {
        [one] if one.uniform => {
            let span = (one.sites[1] - one.sites[0] + 1) as f64;
            one.sites[0] + (((i as f64 + 0.5) * GOLDEN).fract() * span) as usize
        }
        _ => tasks.design().size(&mut Stream::new(SEED, "size", i as u64)),
    }
}

fn values(x: &Tensor, row: usize) -> Result<Vec<f64>> {
    Ok(x.narrow(0, row, 1)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

impl Fixed {
    /// Draws `count` tasks, and asks the true process about them. `floors` are those of the models.
    ///
    /// # Errors
    /// Those of drawing, and of the exact Gaussian process.
    pub fn new(tasks: &Tasks, reward: Reward, count: usize, floors: &[f64]) -> Result<Self> {
        let of = if reward == Reward::Observation { Of::Observation } else { Of::Surface };
        let batches: Vec<Batch> = (0..count.div_ceil(ROWS))
            .into_par_iter()
            .map(|i| {
                let context = size(tasks, i);
                tasks.batch(SEED, i as u64, ROWS.min(count - i * ROWS), context)
            })
            .collect::<Result<_>>()?;
        let mut facts = Vec::new();
        for (cluster, batch) in batches.iter().enumerate() {
            let seen = batch.task.context.mask.sum_all()?.to_scalar::<f32>()? as usize;
            facts.extend(batch.rules.iter().map(|rule| Fact {
                context: seen / batch.rules.len(),
                targets: batch.task.target.len(),
                class: rule.class.clone(),
                cluster,
            }));
        }
        let mut fixed =
            Fixed { batches, of, facts, exact: Vec::new(), floored: BTreeMap::default() };
        let told: Vec<_> = fixed
            .rows()
            .into_par_iter()
            .map(|(batch, row)| fixed.ask_exact(batch, row, tasks.likelihood(), floors))
            .collect::<Result<_>>()?;
        for (i, floor) in floors.iter().enumerate() {
            let column = told.iter().map(|t| t.as_ref().map_or(f64::NAN, |(_, f)| f[i])).collect();
            fixed.floored.insert(floor.to_bits(), column);
        }
        fixed.exact = told.into_iter().map(|t| t.map(|(scores, _)| scores)).collect();
        Ok(fixed)
    }

    /// Batch and row of every task.
    fn rows(&self) -> Vec<(&Batch, usize)> {
        self.batches.iter().flat_map(|b| (0..b.rules.len()).map(move |row| (b, row))).collect()
    }

    /// The tasks, batch by batch.
    #[cfg(test)]
    pub fn tasks(&self) -> impl Iterator<Item = &crate::sites::Task> {
        self.batches.iter().map(|b| &b.task)
    }

    fn truth<'a>(&self, batch: &'a Batch) -> &'a Tensor {
        match self.of {
            Of::Surface => &batch.task.surface,
            Of::Observation => &batch.task.noisy,
        }
    }

    /// The true process on one task, and its pointwise score under each floor.
    fn ask_exact(
        &self,
        batch: &Batch,
        row: usize,
        likelihood: &'static dyn Likelihood,
        floors: &[f64],
    ) -> Result<Option<(Scores, Vec<f64>)>> {
        let rule = &batch.rules[row];
        let Some(kernel) = &rule.kernel else { return Ok(None) };
        let one = batch.rows(row, 1)?.task;
        let gp = ExactGp::new(Box::new(kernel.clone()), rule.nugget, rule.mean, likelihood)?;
        let posterior = gp.condition(&one.context)?;
        let sites = one.target.sites.map(|x| Ok(x.to_dtype(DType::F64)?))?;
        let marginals = posterior.at(&sites)?.marginals(0, self.of)?;
        let truth = values(self.truth(batch), row)?;
        let mut scores = pointwise(&marginals, &truth);
        // A surface without noise has no joint density that arithmetic could find.
        if self.of == Of::Observation && rule.nugget > 0.0 {
            let values = Tensor::from_vec(truth.clone(), (1, truth.len(), 1), sites.s.device())?;
            if let Some(joint) = posterior.joint(&sites, self.of, &values)? {
                scores.joint = joint.to_vec1::<f64>()?[0] / truth.len() as f64;
            }
        }
        let raised = |floor: &f64| {
            let sd = marginals.sd.iter().map(|sd| sd.max(*floor)).collect();
            let raised = Marginals { sd, ..marginals.clone() };
            let sum: f64 =
                truth.iter().enumerate().map(|(i, y)| raised.link_log_density(i, *y)).sum();
            sum / truth.len() as f64
        };
        let floored = floors.iter().map(raised).collect();
        Ok(Some((scores, floored)))
    }

    /// How many of an integrated process's kernels count on the tasks where fewest do: the lowest
    /// tenth of the first few.
    ///
    /// # Errors
    /// Those of the process.
    pub fn effective(&self, process: &IntegratedGp) -> Result<f64> {
        const SOME: usize = 25;
        let some = self.batches.iter().take(SOME).map(|b| process.effective(&b.task.context));
        let mut counts = some.collect::<Result<Vec<_>>>()?.concat();
        counts.sort_by(f64::total_cmp);
        Ok(counts[counts.len() / 10])
    }

    /// The best pointwise score there is for a head whose sd is never below `floor`, by task; NaN
    /// where the true process is not known.
    pub fn ceiling(&self, floor: f64) -> Vec<f64> {
        match self.floored.get(&floor.to_bits()) {
            Some(floored) => floored.clone(),
            None => {
                self.exact.iter().map(|e| e.as_ref().map_or(f64::NAN, |e| e.pointwise)).collect()
            }
        }
    }

    /// Scores of a process on every task, the same for any number of threads.
    ///
    /// # Errors
    /// Those of the process, and values that are not finite.
    pub fn meet(&self, process: &(dyn Process + Send + Sync)) -> Result<Vec<Scores>> {
        let parts: Vec<Vec<Scores>> = self
            .batches
            .par_iter()
            .map(|batch| {
                let posterior = process.condition(&batch.task.context)?;
                let sites = &batch.task.target.sites;
                let (truth, n) = (self.truth(batch), sites.len() as f64);
                let predictive = posterior.at(sites)?;
                let joint = posterior.joint(sites, self.of, truth)?;
                let joint = joint.map(|j| j.to_dtype(DType::F64)?.to_vec1::<f64>()).transpose()?;
                (0..batch.rules.len())
                    .map(|row| {
                        let marginals = predictive.marginals(row, self.of)?;
                        let mut scores = pointwise(&marginals, &values(truth, row)?);
                        scores.joint = joint.as_ref().map_or(f64::NAN, |joint| joint[row] / n);
                        Ok(scores)
                    })
                    .collect()
            })
            .collect::<Result<_>>()?;
        Ok(parts.into_iter().flatten().collect())
    }
}

impl Fixed {
    /// The embedding of every task, `[task][width]`; nothing if the process has none.
    ///
    /// # Errors
    /// Those of the process.
    pub fn embed(&self, process: &(dyn Process + Send + Sync)) -> Result<Option<Vec<Vec<f64>>>> {
        let parts: Vec<Option<Vec<Vec<f64>>>> = self
            .batches
            .par_iter()
            .map(|batch| {
                let embedding = process.condition(&batch.task.context)?.embedding()?;
                Ok(embedding.map(|e| e.to_dtype(DType::F64)?.to_vec2::<f64>()).transpose()?)
            })
            .collect::<Result<_>>()?;
        Ok(parts.into_iter().collect::<Option<Vec<_>>>().map(|parts| parts.concat()))
    }

    /// The classes there are, and the one of each task; nothing with fewer than two.
    pub fn classes(&self) -> Option<(Vec<Arc<str>>, Vec<usize>)> {
        let own: Vec<Arc<str>> =
            self.facts.iter().map(|f| f.class.clone()).collect::<Option<_>>()?;
        let mut names = own.clone();
        names.sort();
        names.dedup();
        let place = |c: &Arc<str>| names.binary_search(c).expect("one of them");
        let class = own.iter().map(place).collect();
        (names.len() > 1).then_some((names, class))
    }
}

/// A mean with its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Its standard error.
    pub error: f64,
}

impl Mean {
    /// Of numbers with the cluster each belongs to. Tasks drawn with the same sizes are one cluster,
    /// for they are not independent.
    ///
    /// ```text
    /// error² = C / (C − 1) · Σ over C clusters (Σ in it (value − mean))² / n²
    /// ```
    pub fn of(values: impl IntoIterator<Item = (usize, f64)>) -> Self {
        let mut clusters = BTreeMap::<usize, (f64, f64)>::new();
        for (cluster, value) in values {
            let (count, sum) = clusters.entry(cluster).or_default();
            (*count, *sum) = (*count + 1.0, *sum + value);
        }
        let (n, total) = clusters.values().fold((0.0, 0.0), |(n, t), (c, s)| (n + c, t + s));
        let mean = total / n;
        let square: f64 = clusters.values().map(|(count, sum)| (sum - count * mean).powi(2)).sum();
        let count = clusters.len() as f64;
        Mean { mean, error: (count / (count - 1.0) * square).sqrt() / n }
    }
}

/// Mean gap between the levels and the shares of targets inside their intervals.
pub fn calibration_error(scores: &[Scores]) -> f64 {
    let n = scores.len() as f64;
    let gap = |(i, level): (usize, &f64)| {
        (scores.iter().map(|s| s.inside[i]).sum::<f64>() / n - level).abs()
    };
    LEVELS.iter().enumerate().map(gap).sum::<f64>() / LEVELS.len() as f64
}
