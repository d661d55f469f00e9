//! How places move together is learned from a process that is asked about each of them alone.

use candle_core::{Device, Tensor};
use isopleth::{
    Error, Observations, Posterior, Predictive, Process, Result, Sites, Stream,
    baseline::ExactGp,
    kernel::{self, Kernel, Matern, Metric, Smoothness},
    likelihood::{self, Kind},
    linalg::Cholesky,
    mapping::dependence,
};

/// A process that answers for each place alone, as networks do.
struct Alone(ExactGp);
struct Answer<'a>(Box<dyn Posterior + 'a>);

impl Process for Alone {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(Answer(self.0.condition(context)?)))
    }
}

impl Posterior for Answer<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        self.0.at(targets)
    }
}

/// Two parts of a surface: one that changes from village to village, and one across the country.
#[derive(Debug)]
struct Both(Matern, Matern);

impl Kernel for Both {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        self.0.covariance(a, b) + self.1.covariance(a, b)
    }
    fn sill(&self) -> f64 {
        self.0.sill + self.1.sill
    }
}

fn matern(smoothness: Smoothness, length_scale: f64, sill: f64) -> Matern {
    Matern { smoothness, length_scale, sill, metric: Metric::Euclidean }
}

fn spots(n: usize, rng: &mut Stream) -> Vec<[f64; 2]> {
    (0..n).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect()
}

/// What is seen of a surface of `gp` at `at`: outcomes and, for counts, trials.
fn seen(gp: &ExactGp, name: &str, at: &[[f64; 2]], rng: &mut Stream) -> Result<Observations> {
    let (n, likelihood) = (at.len(), likelihood::find(name)?);
    let rows: Vec<Vec<f64>> = at.iter().map(|p| p.to_vec()).collect();
    let factor = Cholesky::factor(kernel::matrix(&*gp.kernel, &rows, &rows))?;
    let surface = factor.colour(&rng.normals(n));
    let level = surface.iter().map(|f| gp.mean + f + gp.nugget.sqrt() * rng.normal());
    let level: Vec<f64> = level.collect();
    let trials: Vec<f64> = (0..n).map(|_| 20.0 + rng.below(60) as f64).collect();
    let y = level.iter().zip(&trials).map(|(eta, n)| likelihood.observe(*eta, *n, rng));
    let y: Vec<f32> = y.map(|y| y as f32).collect();
    let trials: Vec<f32> = trials.iter().map(|n| *n as f32).collect();
    let counted = !matches!(likelihood.kind(), Kind::Value | Kind::Positive);
    let trials = match counted {
        true => Some(Tensor::from_vec(trials, (1, n), &Device::Cpu)?),
        false => None,
    };
    Observations::new(
        Sites::plane(at, &Device::Cpu)?,
        Tensor::from_vec(y, (1, n, 1), &Device::Cpu)?,
        trials,
    )
}

/// Posterior correlations between places, of different places.
fn correlations(gp: &ExactGp, context: &Observations, places: &Sites) -> Result<Vec<f64>> {
    let [_, covariance] = gp.belief(context, places)?;
    let n = places.len();
    let sd = |i: usize| covariance[i * n + i].sqrt();
    let pairs = (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
    Ok(pairs.map(|(i, j)| covariance[i * n + j] / (sd(i) * sd(j))).collect())
}

/// Root mean square of differences.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    (a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.len() as f64).sqrt()
}

/// Whatever is observed, the process learned has the correlations of the one that was asked, although the
/// survey was drawn from another, to which a fit would come.
#[test]
fn correlations_are_those_of_the_process_asked() -> Result<()> {
    for (i, name) in ["gaussian", "binomial", "poisson"].into_iter().enumerate() {
        let likelihood = likelihood::find(name)?;
        let mut rng = Stream::new(3, "dependence", i as u64);
        let process =
            |kernel: Box<dyn Kernel>, nugget| ExactGp::new(kernel, nugget, -0.4, likelihood);
        let drawn = process(Box::new(matern(Smoothness::ThreeHalves, 0.8, 1.0)), 0.05)?;
        let context = seen(&drawn, name, &spots(50, &mut rng), &mut rng)?;
        let (anchors, others) = (spots(dependence::ANCHORS, &mut rng), spots(40, &mut rng));
        let [anchors, others] = [anchors, others].map(|p| Sites::plane(&p, &Device::Cpu));
        let others = others?;
        // Shorter in range than the survey shows, and in two parts, which no Matérn kernel has.
        let parts =
            Both(matern(Smoothness::Half, 0.1, 0.5), matern(Smoothness::ThreeHalves, 0.3, 0.5));
        let asked = Alone(process(Box::new(parts), 0.2)?.uncertain_mean(1.0));
        let learned = dependence::learned(
            (&asked, &*asked.condition(&context)?),
            &context,
            &anchors?,
            likelihood,
        )?;
        let truth = correlations(&asked.0, &context, &others)?;
        let off = apart(&correlations(&learned, &context, &others)?, &truth);
        let fitted = ExactGp::fit(&context, likelihood)?;
        let plain = apart(&correlations(&fitted, &context, &others)?, &truth);
        assert!(off < 0.06, "{name}: {off} off");
        assert!(off < 0.5 * plain, "{name}: {off} off, where a fit is {plain}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_asked_is_refused() -> Result<()> {
    let likelihood = likelihood::find("binomial")?;
    let mut rng = Stream::new(3, "dependence refused", 0);
    let gp = ExactGp::new(Box::new(matern(Smoothness::Half, 0.3, 1.0)), 0.1, 0.0, likelihood)?;
    let mut context = seen(&gp, "binomial", &spots(20, &mut rng), &mut rng)?;
    let places = Sites::plane(&spots(dependence::FEWEST - 1, &mut rng), &Device::Cpu)?;
    let few = dependence::learned((&gp, &*gp.condition(&context)?), &context, &places, likelihood);
    assert!(matches!(few, Err(Error::Input { .. })), "two places have one correlation");
    context.sites.t = Some(Tensor::zeros((1, 20, 1), candle_core::DType::F32, &Device::Cpu)?);
    assert!(!dependence::can_be_asked(&context));
    Ok(())
}
