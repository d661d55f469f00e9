//! Laws of autoregressive deployment.

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Observations, Of, Process, Result, Sites, Stream,
    baseline::ExactGp,
    kernel::{Matern, Metric, Smoothness},
    likelihood,
    linalg::Cholesky,
    model::autoregressive::Autoregressive,
};

const CPU: Device = Device::Cpu;

fn gp() -> Result<ExactGp> {
    let kernel = Matern {
        smoothness: Smoothness::ThreeHalves,
        length_scale: 0.4,
        sill: 1.3,
        metric: Metric::Euclidean,
    };
    ExactGp::new(Box::new(kernel), 0.05, 0.2, likelihood::find("gaussian")?)
}

fn plane(n: usize, rng: &mut Stream) -> Sites {
    let xy: Vec<f64> = (0..2 * n).map(|_| rng.uniform(-1.0, 1.0)).collect();
    Sites::new(Tensor::from_vec(xy, (1, n, 2), &CPU).unwrap())
}

fn values(n: usize, rng: &mut Stream) -> Tensor {
    Tensor::from_vec(rng.normals(n), (1, n, 1), &CPU).unwrap()
}

/// Joint log density of noisy values under the GP, from the covariance of context and targets.
fn truth(gp: &ExactGp, context: &Observations, targets: &Sites, value: &Tensor) -> Result<f64> {
    let (known, asked) = (context.sites.host()?.remove(0), targets.host()?.remove(0));
    let all: Vec<Vec<f64>> = known.iter().chain(&asked).cloned().collect();
    let y: Vec<f64> = Tensor::cat(&[&context.y, value], 1)?.flatten_all()?.to_vec1()?;
    let density = |n: usize| -> Result<f64> {
        let covariance = faer::Mat::from_fn(n, n, |i, j| {
            gp.kernel.covariance(&all[i], &all[j]) + if i == j { gp.nugget } else { 0.0 }
        });
        let factor = Cholesky::factor(covariance)?;
        let centred: Vec<f64> = y[..n].iter().map(|y| y - gp.mean).collect();
        let solved = factor.solve(&centred);
        let quad: f64 = centred.iter().zip(&solved).map(|(a, b)| a * b).sum();
        Ok(-0.5 * (quad + factor.log_det() + n as f64 * (2.0 * std::f64::consts::PI).ln()))
    };
    Ok(density(all.len())? - density(known.len())?)
}

/// The chain rule over a process whose conditionals are exact is its joint density.
#[test]
fn the_chain_rule_gives_the_joint_density_of_a_gp() -> Result<()> {
    let gp = gp()?;
    let deployed = Autoregressive::new(&gp, likelihood::find("gaussian")?, 64)?;
    let mut rng = Stream::new(1, "autoregressive", 0);
    for (known, asked) in [(0, 1), (0, 4), (7, 9), (3, 300)] {
        let context = Observations::new(plane(known, &mut rng), values(known, &mut rng), None)?;
        let (targets, value) = (plane(asked, &mut rng), values(asked, &mut rng));
        let found = deployed.condition(&context)?.joint(&targets, Of::Observation, &value)?;
        let found = found.expect("values have a density").to_vec1::<f64>()?[0];
        let exact = truth(&gp, &context, &targets, &value)?;
        assert!((found - exact).abs() < 1e-6 * (1.0 + exact.abs()), "{found} of {exact}");
    }
    Ok(())
}

/// Draws that are told everywhere have the GP's joint law: its means, and its covariances.
#[test]
fn draws_have_the_moments_of_the_gp() -> Result<()> {
    let gp = gp()?;
    let deployed = Autoregressive::new(&gp, likelihood::find("gaussian")?, 8)?;
    let mut rng = Stream::new(2, "autoregressive", 0);
    let context = Observations::new(plane(5, &mut rng), values(5, &mut rng), None)?;
    let targets = plane(3, &mut rng);
    let n = 1500;
    let moments = |values: &Tensor| -> Result<Vec<f64>> {
        let rows = values.squeeze(2)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let mean: Vec<f64> =
            (0..3).map(|j| rows.iter().map(|r| r[j]).sum::<f64>() / n as f64).collect();
        let mut all = mean.clone();
        for i in 0..3 {
            for j in 0..=i {
                let products = rows.iter().map(|r| (r[i] - mean[i]) * (r[j] - mean[j]));
                all.push(products.sum::<f64>() / n as f64);
            }
        }
        Ok(all)
    };
    let posterior = deployed.condition(&context)?;
    let ours = moments(&posterior.draws(&targets, n, &mut rng)?.values)?;
    let exact = moments(&gp.condition(&context)?.draws(&targets, n, &mut rng)?.values)?;
    // A surface is drawn as the mean given noisy values at the targets: its variance is short of the
    // surface's by no more than what one noisy look leaves open, the nugget.
    for (i, (ours, exact)) in ours.iter().zip(&exact).enumerate() {
        let allowed = if i < 3 { 0.12 } else { 0.05 + 0.12 };
        assert!((ours - exact).abs() < allowed, "moment {i}: {ours} of {exact}");
    }
    Ok(())
}

/// What is not drawn at a site is not told either: marginals are those of the process itself.
#[test]
fn marginals_are_those_of_the_process() -> Result<()> {
    let gp = gp()?;
    let deployed = Autoregressive::new(&gp, likelihood::find("gaussian")?, 8)?;
    let mut rng = Stream::new(3, "autoregressive", 0);
    let context = Observations::new(plane(5, &mut rng), values(5, &mut rng), None)?;
    let targets = plane(4, &mut rng);
    let (a, b) =
        (deployed.condition(&context)?.at(&targets)?, gp.condition(&context)?.at(&targets)?);
    let same = |a: &Tensor, b: &Tensor| {
        a.flatten_all()?
            .to_vec1::<f64>()
            .map(|a| a == b.flatten_all().unwrap().to_vec1::<f64>().unwrap())
    };
    assert!(same(&a.mean, &b.mean)? && same(&a.surface_sd, &b.surface_sd)?);
    assert!(Autoregressive::new(&gp, likelihood::find("gaussian")?, 0).is_err());
    Ok(())
}
