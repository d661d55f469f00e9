//! Predictive families other than Gaussians and their mixtures: laws of counts and of classes.
//!
//! A head that ends in one of them gives the law of the observation itself, to be rewarded for what
//! was counted (`loss = "outcome"` under \[train\]), and a Gaussian of the same mean and variance on
//! the link scale, so that maps are made of it as of any other. Joint Gaussians: [`super::joint`].

use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};

use super::head::{logistic, softplus};
use crate::{
    error::{Error, Result},
    fused::special::{digamma, log_gamma, trigamma},
    predictive::{Law, Link, Predictive},
    sites::Observations,
};

/// A family by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Gaussian on the link scale, or a mixture.
    #[default]
    Gaussian,
    /// Positive of tested, where the prevalence of villages has a beta law: raw mean and precision.
    BetaBinomial,
    /// Cases, of which the log rate per trial (person, or person-time) is the one output.
    Poisson,
    /// Cases, where the rate of villages has a gamma law: log of its mean, and raw size.
    NegativeBinomial,
    /// One of so many classes, numbered from 0: raw log shares. It has no surface.
    Categorical(usize),
}

/// Least precision of a beta law, and what keeps its shapes from 0.
const LEAST: f64 = 1e-3;
/// Log rates are held within this of 0, so that rates stay finite in f32.
const RATE: f64 = 30.0;

impl Family {
    /// # Errors
    /// [`Error::Input`] for fewer than two classes.
    pub fn check(self) -> Result<()> {
        match self {
            Family::Categorical(classes) if classes < 2 => {
                Err(Error::input("what has fewer than two classes needs no model")
                    .fact("categorical", classes)
                    .try_this("say how many classes there are: family = { categorical = 3 }"))
            }
            _ => Ok(()),
        }
    }

    /// Outputs that the network must provide; 0 for Gaussians, of which the head itself knows.
    pub fn outputs(self) -> usize {
        match self {
            Family::Gaussian => 0,
            Family::BetaBinomial | Family::NegativeBinomial => 2,
            Family::Poisson => 1,
            Family::Categorical(classes) => classes,
        }
    }

    /// The law with raw outputs `[batch, target, outputs]` for parameters; nothing for Gaussians.
    pub fn law(self, raw: &Tensor) -> Result<Option<Arc<dyn Law>>> {
        let part = |i: usize| raw.narrow(2, i, 1)?.squeeze(2);
        Ok(match self {
            Family::Gaussian => None,
            Family::BetaBinomial => Some(Arc::new(BetaBinomial::of(&part(0)?, &part(1)?)?)),
            Family::Poisson => Some(Arc::new(Poisson { log_rate: part(0)?.clamp(-RATE, RATE)? })),
            Family::NegativeBinomial => Some(Arc::new(NegativeBinomial::of(&part(0)?, &part(1)?)?)),
            Family::Categorical(_) => {
                let total = raw.log_sum_exp(D::Minus1)?.unsqueeze(2)?;
                Some(Arc::new(Categorical { log_share: raw.broadcast_sub(&total)? }))
            }
        })
    }

    /// The law, and its likeness on the link scale.
    ///
    /// # Errors
    /// [`Error::Input`] where the family does not live on the scale of the likelihood's link.
    pub fn predictive(self, link: Link, raw: &Tensor) -> Result<Predictive> {
        let wrong = |what: &str, help: &str| {
            Err(Error::input(what).fact("link", format!("{link:?}")).try_this(help))
        };
        let law = self.law(raw)?;
        let (mean, sd) = match (self, link) {
            (Family::BetaBinomial, Link::Logit) => {
                let part = |i: usize| raw.narrow(2, i, 1)?.squeeze(2);
                let BetaBinomial { a, b } = BetaBinomial::of(&part(0)?, &part(1)?)?;
                // The logit of a beta variable: ln of one gamma variable less that of another.
                let mean = (digamma(&a)? - digamma(&b)?)?;
                (mean, (trigamma(&a)? + trigamma(&b)?)?.sqrt()?)
            }
            (Family::Poisson, Link::Log) => {
                let mean = raw.narrow(2, 0, 1)?.squeeze(2)?.clamp(-RATE, RATE)?;
                // The family holds the rate for known.
                let sd = (mean.zeros_like()? + 1e-6)?;
                (mean, sd)
            }
            (Family::NegativeBinomial, Link::Log) => {
                let part = |i: usize| raw.narrow(2, i, 1)?.squeeze(2);
                let NegativeBinomial { log_rate, size } =
                    NegativeBinomial::of(&part(0)?, &part(1)?)?;
                // The logarithm of a gamma variable of this mean.
                let mean = (log_rate + (digamma(&size)? - size.log()?)?)?;
                (mean, trigamma(&size)?.sqrt()?)
            }
            (Family::BetaBinomial, _) => {
                return wrong(
                    "beta-binomial counts need a logit link",
                    "use it with likelihood = \"binomial\", \"beta-binomial\" or \"bernoulli\"",
                );
            }
            (Family::Poisson | Family::NegativeBinomial, _) => {
                return wrong(
                    "cases need a logarithmic link",
                    "use it with likelihood = \"poisson\" or \"negative-binomial\", and family = \
                     \"beta-binomial\" for positive of tested",
                );
            }
            _ => {
                return wrong(
                    "classes have no surface to be mapped",
                    "use another family under [model.head]",
                );
            }
        };
        let (mean, sd) = (mean.unsqueeze(2)?, sd.unsqueeze(2)?);
        Ok(Predictive { law, ..Predictive::gaussian(link, mean, sd.clone(), sd)? })
    }
}

/// Positive of tested: `Binomial(tested, p)` with `p` of law `Beta(a, b)`.
#[derive(Debug, Clone)]
pub struct BetaBinomial {
    /// First shape, `[batch, target]`.
    pub a: Tensor,
    /// Second shape, `[batch, target]`.
    pub b: Tensor,
}

impl BetaBinomial {
    /// From the logit of the mean and the raw precision, `[batch, target]` each.
    fn of(logit: &Tensor, precision: &Tensor) -> Result<Self> {
        let mean = logistic(logit)?;
        let precision = (softplus(precision)? + LEAST)?;
        let a = ((&mean * &precision)? + LEAST)?;
        let b = (((mean.neg()? + 1.0)? * &precision)? + LEAST)?;
        Ok(BetaBinomial { a, b })
    }
}

/// Counts: `Poisson(trials · rate)`.
#[derive(Debug, Clone)]
pub struct Poisson {
    /// Log rate per trial, `[batch, target]`.
    pub log_rate: Tensor,
}

/// Cases: `Poisson(trials · rate)` where the rate has a gamma law of this mean, of shape `size`.
#[derive(Debug, Clone)]
pub struct NegativeBinomial {
    /// Log of the mean rate per trial, `[batch, target]`.
    pub log_rate: Tensor,
    /// Size, `[batch, target]`.
    pub size: Tensor,
}

impl NegativeBinomial {
    /// From the log of the mean rate and the raw size, `[batch, target]` each.
    fn of(log_rate: &Tensor, size: &Tensor) -> Result<Self> {
        let log_rate = log_rate.clamp(-RATE, RATE)?;
        Ok(NegativeBinomial { log_rate, size: (softplus(size)? + LEAST)? })
    }
}

/// One of some classes.
#[derive(Debug, Clone)]
pub struct Categorical {
    /// Log probabilities `[batch, target, class]`.
    pub log_share: Tensor,
}

/// Outcome and trials, `[batch, target]` each, in the precision of `like`.
fn counts(seen: &Observations, like: &Tensor) -> Result<[Tensor; 2]> {
    let Some(trials) = &seen.trials else {
        return Err(Error::input("a law of counts needs the number tested at every site")
            .try_this("use a Gaussian family for values"));
    };
    let of = |x: &Tensor| x.to_dtype(like.dtype());
    Ok([of(&seen.y.squeeze(2)?)?, of(trials)?])
}

/// ln of how many ways there are to choose `k` of `n`.
fn log_choose(n: &Tensor, k: &Tensor) -> Result<Tensor> {
    let factorial = |x: &Tensor| log_gamma(&(x + 1.0)?);
    Ok(((factorial(n)? - factorial(k)?)? - factorial(&(n - k)?)?)?)
}

/// ln B(a, b).
fn log_beta(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(((log_gamma(a)? + log_gamma(b)?)? - log_gamma(&(a + b)?)?)?)
}

impl Law for BetaBinomial {
    fn log_prob(&self, seen: &Observations) -> Result<Tensor> {
        let [k, n] = counts(seen, &self.a)?;
        let seen = log_beta(&(&self.a + &k)?, &(&self.b + (&n - &k)?)?)?;
        Ok(((log_choose(&n, &k)? + seen)? - log_beta(&self.a, &self.b)?)?)
    }
}

impl Law for Poisson {
    fn log_prob(&self, seen: &Observations) -> Result<Tensor> {
        let [k, n] = counts(seen, &self.log_rate)?;
        let log_mean = (&self.log_rate + n.maximum(1e-30)?.log()?)?;
        Ok((((&k * &log_mean)? - log_mean.exp()?)? - log_gamma(&(k + 1.0)?)?)?)
    }
}

impl Law for NegativeBinomial {
    fn log_prob(&self, seen: &Observations) -> Result<Tensor> {
        let [k, n] = counts(seen, &self.log_rate)?;
        let r = &self.size;
        let mean = (&self.log_rate.exp()? * n.maximum(1e-30)?)?;
        let ways = ((log_gamma(&(&k + r)?)? - log_gamma(r)?)? - log_gamma(&(&k + 1.0)?)?)?;
        let whole = (r + &mean)?.log()?;
        let none = (r * (r.log()? - &whole)?)?;
        Ok(((ways + none)? + (k * (mean.log()? - whole)?)?)?)
    }
}

impl Law for Categorical {
    fn log_prob(&self, seen: &Observations) -> Result<Tensor> {
        let classes = self.log_share.dim(2)?;
        let class = seen.y.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        if let Some(wrong) =
            class.iter().find(|c| c.fract() != 0.0 || !(0.0..classes as f64).contains(*c))
        {
            return Err(Error::input("an outcome is none of the classes")
                .fact("outcome", wrong)
                .fact("classes", format!("0 to {}", classes - 1))
                .try_this("number the classes from 0"));
        }
        let index = seen.y.to_dtype(DType::U32)?;
        Ok(self.log_share.gather(&index, 2)?.squeeze(2)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::sites::Sites;

    fn seen(y: &[f64], trials: Option<&[f64]>) -> Observations {
        let n = y.len();
        let of =
            |x: &[f64], shape: &[usize]| Tensor::from_vec(x.to_vec(), shape, &Device::Cpu).unwrap();
        let sites = Sites::new(Tensor::zeros((1, n, 2), DType::F64, &Device::Cpu).unwrap());
        Observations::new(sites, of(y, &[1, n, 1]), trials.map(|t| of(t, &[1, n]))).unwrap()
    }

    fn raw(values: &[f64], outputs: usize) -> Tensor {
        Tensor::from_vec(values.to_vec(), (1, values.len() / outputs, outputs), &Device::Cpu)
            .unwrap()
    }

    fn host(x: &Tensor) -> Vec<f64> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Probabilities of everything that can be seen add up to 1, and the mean is what was said.
    #[test]
    fn laws_of_counts_add_up() {
        for outputs in [[-1.3, 0.4], [2.0, 5.0], [0.0, -8.0]] {
            let n = 40.0;
            let all: Vec<f64> = (0..=40).map(f64::from).collect();
            let trials = vec![n; all.len()];
            let raw = raw(&outputs.repeat(all.len()), 2);
            let law = Family::BetaBinomial.law(&raw).unwrap().unwrap();
            let p: Vec<f64> = host(&law.log_prob(&seen(&all, Some(&trials))).unwrap())
                .iter()
                .map(|l| l.exp())
                .collect();
            assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-10);
            let mean: f64 = p.iter().zip(&all).map(|(p, k)| p * k).sum();
            let part = |i: usize| raw.narrow(2, i, 1).unwrap().squeeze(2).unwrap();
            let shapes = BetaBinomial::of(&part(0), &part(1)).unwrap();
            let (a, b) = (host(&shapes.a)[0], host(&shapes.b)[0]);
            assert!((mean - n * a / (a + b)).abs() < 1e-9);
        }
        let all: Vec<f64> = (0..200).map(f64::from).collect();
        let trials = vec![7.0; all.len()];
        let law = Family::Poisson.law(&raw(&vec![0.9; all.len()], 1)).unwrap().unwrap();
        let p: Vec<f64> = host(&law.log_prob(&seen(&all, Some(&trials))).unwrap());
        let mean: f64 = p.iter().zip(&all).map(|(p, k)| p.exp() * k).sum();
        assert!((p.iter().map(|l| l.exp()).sum::<f64>() - 1.0).abs() < 1e-10);
        assert!((mean - 7.0 * 0.9f64.exp()).abs() < 1e-9);
        let all: Vec<f64> = (0..3000).map(f64::from).collect();
        let raw_of_all = raw(&[0.9, 0.4].repeat(all.len()), 2);
        let law = Family::NegativeBinomial.law(&raw_of_all).unwrap().unwrap();
        let p = host(&law.log_prob(&seen(&all, Some(&vec![7.0; all.len()]))).unwrap());
        let mean: f64 = p.iter().zip(&all).map(|(p, k)| p.exp() * k).sum();
        assert!((p.iter().map(|l| l.exp()).sum::<f64>() - 1.0).abs() < 1e-9);
        assert!((mean - 7.0 * 0.9f64.exp()).abs() < 1e-6);
        let law =
            Family::Categorical(3).law(&raw(&[0.3, -2.0, 5.0].repeat(3), 3)).unwrap().unwrap();
        let p = host(&law.log_prob(&seen(&[0.0, 1.0, 2.0], None)).unwrap());
        assert!((p.iter().map(|l| l.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((p[2] - p[0] - 4.7).abs() < 1e-12);
        assert!(law.log_prob(&seen(&[0.0, 1.0, 3.0], None)).is_err());
    }

    /// Golden values from Python's math.lgamma.
    #[test]
    fn laws_give_known_values() {
        let (a, b) = (2.5, 4.0);
        let law = BetaBinomial {
            a: raw(&[a], 1).squeeze(2).unwrap(),
            b: raw(&[b], 1).squeeze(2).unwrap(),
        };
        let found = host(&law.log_prob(&seen(&[3.0], Some(&[10.0]))).unwrap())[0];
        assert!((found - -1.84191651140838).abs() < 1e-10, "{found}");
        let law = Poisson { log_rate: raw(&[-0.4], 1).squeeze(2).unwrap() };
        let found = host(&law.log_prob(&seen(&[5.0], Some(&[6.0]))).unwrap())[0];
        assert!((found - -1.8506146728556079).abs() < 1e-10, "{found}");
        let (log_rate, size) = (raw(&[-1.0], 1).squeeze(2).unwrap(), raw(&[2.5], 1));
        let law = NegativeBinomial { log_rate, size: size.squeeze(2).unwrap() };
        let found = host(&law.log_prob(&seen(&[3.0], Some(&[10.0]))).unwrap())[0];
        assert!((found - -1.9363237172720).abs() < 1e-10, "{found}");
    }

    /// The gradient of what training minimises is its slope.
    #[test]
    fn laws_can_be_learned() {
        let start = [-0.7, 0.4, 1.2, -0.3];
        let counts = seen(&[3.0, 9.0], Some(&[10.0, 12.0]));
        for (family, link) in
            [(Family::BetaBinomial, Link::Logit), (Family::NegativeBinomial, Link::Log)]
        {
            let loss = |raw: &Tensor| -> Tensor {
                let predictive = family.predictive(link, raw).unwrap();
                let density = predictive.law.as_ref().unwrap().log_prob(&counts).unwrap();
                let spread = predictive.surface_sd.log().unwrap().sum_all().unwrap();
                ((density.sum_all().unwrap() + spread).unwrap()
                    + predictive.mean.sum_all().unwrap())
                .unwrap()
            };
            let var = Var::from_tensor(&raw(&start, 2)).unwrap();
            let grads = loss(&var).backward().unwrap();
            let grad = host(grads.get(&var).unwrap());
            for i in 0..start.len() {
                let at = |h: f64| {
                    let mut moved = start;
                    moved[i] += h;
                    loss(&raw(&moved, 2)).to_scalar::<f64>().unwrap()
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                let found = grad[i];
                assert!((found - numeric).abs() < 1e-6, "{family:?} {i}: {found} of {numeric}");
            }
        }
    }

    /// A family asked on a scale that is not its own, or for a surface it has not, says so.
    #[test]
    fn families_keep_to_their_link() {
        let raw = raw(&[0.1, 0.2], 2);
        assert!(Family::BetaBinomial.predictive(Link::Identity, &raw).is_err());
        assert!(Family::Poisson.predictive(Link::Logit, &raw).is_err());
        assert!(Family::NegativeBinomial.predictive(Link::Identity, &raw).is_err());
        assert!(Family::Categorical(2).predictive(Link::Logit, &raw).is_err());
        assert!(Family::Categorical(1).check().is_err());
    }
}
