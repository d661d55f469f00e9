//! Autoregressive deployment: a process that knows each target only alone is asked about one after
//! the other, and told what it said.
//!
//! Source: Bruinsma et al. (2023), arXiv:2303.14468. No training is needed, but contexts grow by the
//! targets: the process should know contexts of that size. Draws are told at a few targets only, and
//! conditioning does the rest, so that they serve maps.

use candle_core::{DType, Tensor};

use crate::{
    error::{Error, Result},
    likelihood::Likelihood,
    predictive::{Draws, Of, Predictive},
    process::{Memory, Posterior, Process},
    rng::Stream,
    sites::{Observations, Sites},
};

/// Context rows that are conditioned at once while a joint density is worked out.
const ROWS: usize = 256;

/// A process deployed autoregressively.
pub struct Autoregressive<'p> {
    process: &'p (dyn Process + Sync),
    likelihood: &'static dyn Likelihood,
    coarse: usize,
}

impl<'p> Autoregressive<'p> {
    /// Deploys `process`. Of more than `coarse` targets, draws are told one by one at so many only.
    ///
    /// # Errors
    /// [`Error::Input`] if `coarse` is 0.
    pub fn new(
        process: &'p (dyn Process + Sync),
        likelihood: &'static dyn Likelihood,
        coarse: usize,
    ) -> Result<Self> {
        if coarse == 0 {
            return Err(Error::input("a surface cannot be drawn at no sites")
                .try_this("draw it one by one at 64 sites, say"));
        }
        Ok(Autoregressive { process, likelihood, coarse })
    }
}

struct Conditioned<'a> {
    model: &'a Autoregressive<'a>,
    inner: Box<dyn Posterior + 'a>,
    context: Observations,
}

impl Process for Autoregressive<'_> {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let inner = self.process.condition(context)?;
        Ok(Box::new(Conditioned { model: self, inner, context: context.clone() }))
    }

    fn any_dimension(&self) -> bool {
        self.process.any_dimension()
    }

    fn memory(&self, sites: usize) -> Memory {
        self.process.memory(sites + self.coarse)
    }
}

/// The order in which targets are told: the same for the same number of them.
fn order(targets: usize) -> Vec<usize> {
    Stream::new(0, "autoregressive order", 0).permutation(targets)
}

impl Conditioned<'_> {
    /// `sites` of one told target each, repeated as rows of the batch: `x` `[1, n, …]` → `[rows, n, …]`.
    fn repeat(x: &Tensor, rows: usize) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        shape[0] = rows;
        Ok(x.broadcast_as(shape)?.contiguous()?)
    }

    /// Row `row` of the context, `rows` times.
    fn context(&self, row: usize, rows: usize) -> Result<Observations> {
        let one = self.context.rows(row, 1)?;
        Ok(Observations {
            sites: one.sites.map(|x| Self::repeat(x, rows))?,
            y: Self::repeat(&one.y, rows)?,
            mask: Self::repeat(&one.mask, rows)?,
            trials: one.trials.as_ref().map(|n| Self::repeat(n, rows)).transpose()?,
        })
    }

    /// People tested at a drawn village: the median of the context's, or 100 where there is none.
    fn trials(&self) -> Result<f64> {
        let Some(trials) = &self.context.trials else { return Ok(0.0) };
        let host = |x: &Tensor| x.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        let (trials, mask) = (host(trials)?, host(&self.context.mask)?);
        let mut seen: Vec<f64> =
            trials.iter().zip(&mask).filter(|(_, m)| **m != 0.0).map(|(n, _)| *n).collect();
        seen.sort_by(f64::total_cmp);
        Ok(seen.get(seen.len() / 2).copied().unwrap_or(100.0))
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        self.inner.at(targets)
    }

    fn tally(&self) -> Option<[u64; 2]> {
        self.inner.tally()
    }

    /// The chain rule along one order of the targets. Values are told as if they were observed, so
    /// that a surface is a little less well known than its noise-free values would make it. Nothing
    /// for counts: a count does not follow from a value.
    fn joint(&self, targets: &Sites, of: Of, values: &Tensor) -> Result<Option<Tensor>> {
        if self.model.likelihood.counts() {
            return Ok(None);
        }
        let (batch, m) = (targets.batch(), targets.len());
        let order = order(m);
        let index: Vec<u32> = order.iter().map(|i| *i as u32).collect();
        let index = Tensor::from_vec(index, m, targets.s.device())?;
        let told = |x: &Tensor| -> Result<Tensor> { Ok(x.index_select(&index, 1)?) };
        let sites = targets.map(told)?;
        let values = told(&values.to_dtype(self.context.y.dtype())?)?;
        let mut totals = Vec::with_capacity(batch);
        for row in 0..batch {
            let one = sites.rows(row, 1)?;
            let value = values.narrow(0, row, 1)?;
            let mut total: Option<Tensor> = None;
            for start in (0..m).step_by(ROWS) {
                // Row i of this batch knows the context and the targets before number start + i.
                let rows = ROWS.min(m - start);
                let known = start + rows - 1;
                let seen: Vec<f32> = (0..rows)
                    .flat_map(|i| (0..known).map(move |j| f32::from(u8::from(j < start + i))))
                    .collect();
                let mask = Tensor::from_vec(seen, (rows, known), values.device())?;
                let before = one.narrow(0, known)?;
                let before = Observations {
                    sites: before.map(|x| Self::repeat(x, rows))?,
                    y: Self::repeat(&value.narrow(1, 0, known)?, rows)?,
                    mask: mask.to_dtype(values.dtype())?,
                    trials: None,
                };
                let context = self.context(row, rows)?.and(&before)?;
                // Each row is asked about the next target alone.
                let next = |x: &Tensor| -> Result<Tensor> {
                    Ok(x.narrow(1, start, rows)?.transpose(0, 1)?.contiguous()?)
                };
                let ask = one.map(next)?;
                let predictive = self.model.process.condition(&context)?.at(&ask)?;
                let density = predictive.log_prob(of, &next(&value)?)?.sum_all()?;
                total = Some(match total {
                    Some(before) => (before + density)?,
                    None => density,
                });
            }
            totals.push(match total {
                Some(total) => total.reshape(1)?,
                None => Tensor::zeros(1, values.dtype(), values.device())?,
            });
        }
        Ok(Some(Tensor::cat(&totals, 0)?))
    }

    /// Noisy values are drawn one after the other at a few of the targets, each told to the next;
    /// a surface is then the posterior mean given all of them. What a mean leaves out between sites
    /// that are told is not drawn: with few of them for the length scale, surfaces are too smooth.
    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        if targets.batch() != 1 || self.context.y.dims()[0] != 1 {
            return Err(Error::axis("rows of targets to draw surfaces over", targets.batch(), 1));
        }
        let (m, likelihood) = (targets.len(), self.model.likelihood);
        let (device, dtype) = (targets.s.device().clone(), self.context.y.dtype());
        let link = likelihood.link();
        let trials = self.trials()?;
        let mut context = self.context(0, n)?;
        for i in order(m).into_iter().take(self.model.coarse) {
            let ask = targets.narrow(i, 1)?.map(|x| Self::repeat(x, n))?;
            let predictive = self.model.process.condition(&context)?.at(&ask)?;
            let mut values = Vec::with_capacity(n);
            for row in 0..n {
                let marginals = predictive.marginals(row, Of::Observation)?;
                let mut left = rng.unit();
                let (_, mean, sd) = marginals
                    .components(0)
                    .find(|(weight, ..)| {
                        left -= weight;
                        left < 0.0
                    })
                    .or_else(|| marginals.components(0).last())
                    .expect("a component");
                let value = mean + sd * rng.normal();
                values.push(match likelihood.counts() {
                    true => likelihood.observe(value, trials, rng),
                    false => value,
                });
            }
            let y = Tensor::from_vec(values, (n, 1, 1), &device)?.to_dtype(dtype)?;
            let trials = match &context.trials {
                Some(all) => Some((Tensor::ones((n, 1), all.dtype(), &device)? * trials)?),
                None => None,
            };
            context = context.and(&Observations::new(ask, y, trials)?)?;
        }
        let whole = targets.map(|x| Self::repeat(x, n))?;
        let predictive = self.model.process.condition(&context)?.at(&whole)?;
        let values = (predictive.log_weight.exp()? * &predictive.mean)?.sum_keepdim(2)?;
        Ok(Draws { link, values })
    }
}
