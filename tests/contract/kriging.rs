//! Kriging under covariances that a network reads: what the shipped networks make of simulated surfaces.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use isopleth::{
    Marginals, Observations, Of, Process, Result, Sites, Stream,
    baseline::NearestGp,
    checkpoint::Checkpoint,
    kernel::{Kernel, Local, Matern, Metric, Smoothness, Varying},
    likelihood,
    linalg::lower,
    score::crps,
};

const CPU: Device = Device::Cpu;
const SITES: usize = 1_800;
const ASKED: usize = 300;

fn read(name: &str) -> Result<Box<dyn Process + Send + Sync>> {
    Checkpoint::resolve(name)?.process(&CPU)
}

fn observed(xy: &[[f64; 2]], y: &[f64]) -> Result<Observations> {
    let y = Tensor::from_vec(y.iter().map(|v| *v as f32).collect(), (1, y.len(), 1), &CPU)?;
    Observations::new(Sites::plane(xy, &CPU)?, y, None)
}

fn asked(process: &dyn Process, context: &Observations, at: &[[f64; 2]]) -> Result<Marginals> {
    process.condition(context)?.at(&Sites::plane(at, &CPU)?)?.marginals(0, Of::Surface)
}

/// Sites and then targets, values at the first, truths at the others.
type Drawn = (Vec<[f64; 2]>, Vec<f64>, Vec<f64>);

/// A surface of this kernel at scattered sites, seen with noise of sd 0.2 there, and true at others.
fn drawn(kernel: &dyn Kernel, seed: u64) -> Result<Drawn> {
    let mut rng = Stream::new(seed, "kriging", 0);
    let n = SITES + ASKED;
    let xy: Vec<[f64; 2]> =
        (0..n).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-0.6, 0.6)]).collect();
    let covariance = xy.iter().flat_map(|a| xy.iter().map(|b| kernel.covariance(a, b))).collect();
    let z = lower(covariance, n)?.colour(&rng.normals(n));
    let y = z[..SITES].iter().map(|z| z + 0.2 * rng.normal()).collect();
    Ok((xy, y, z[SITES..].to_vec()))
}

/// Mean CRPS of the surface, and the share of truths inside 95 % intervals.
fn judged(said: &Marginals, truth: &[f64]) -> (f64, f64) {
    let n = truth.len() as f64;
    let crps = truth.iter().enumerate().map(|(i, t)| crps::marginal(said, i, *t)).sum::<f64>();
    let inside = truth.iter().enumerate();
    let inside = inside.filter(|(i, t)| (0.025..=0.975).contains(&said.cdf(*i, **t))).count();
    (crps / n, inside as f64 / n)
}

/// Nothing is told it, and it is nearly as good as the process that is told everything.
#[test]
fn one_covariance_is_read_off_the_data() -> Result<()> {
    let process = read("kriging-values")?;
    for (smoothness, length_scale, metric) in [
        (Smoothness::Half, 0.3, Metric::Euclidean),
        (Smoothness::ThreeHalves, 0.2, Metric::Anisotropic { angle: 0.7, ratio: 3.0 }),
    ] {
        let kernel = Matern { smoothness, length_scale, sill: 1.0, metric };
        let (xy, y, truth) = drawn(&kernel, 1)?;
        let context = observed(&xy[..SITES], &y)?;
        let gaussian = likelihood::find("gaussian")?;
        let floor = NearestGp::new(Box::new(kernel), 0.04, 0.0, gaussian)?;
        let (least, _) = judged(&asked(&floor, &context, &xy[SITES..])?, &truth);
        let (found, inside) = judged(&asked(&*process, &context, &xy[SITES..])?, &truth);
        println!("{smoothness:?}: CRPS {:.4} times the floor, {inside:.3} inside", found / least);
        assert!(found < 1.05 * least, "{smoothness:?}: CRPS {found}, floor {least}");
        assert!((0.91..=0.985).contains(&inside), "{smoothness:?}: {inside} inside 95 %");
    }
    Ok(())
}

/// Where length scales grow eight times across the map it does no worse than one kernel fitted to all of it.
#[test]
fn a_covariance_that_varies_is_met_no_worse_than_by_a_fit() -> Result<()> {
    let local = |p: &[f64]| Local::round(0.05 * 8f64.powf(0.5 * (p[0] + 1.0)), 1.0);
    let kernel = Varying::new(Smoothness::ThreeHalves, 1.0, local);
    let (xy, y, truth) = drawn(&kernel, 2)?;
    let context = observed(&xy[..SITES], &y)?;
    let gaussian = likelihood::find("gaussian")?;
    let floor = NearestGp::new(Box::new(kernel), 0.04, 0.0, gaussian)?;
    let fitted = NearestGp::fit(&context, gaussian)?;
    let (least, _) = judged(&asked(&floor, &context, &xy[SITES..])?, &truth);
    let (one, _) = judged(&asked(&fitted, &context, &xy[SITES..])?, &truth);
    let (found, inside) =
        judged(&asked(&*read("kriging-values")?, &context, &xy[SITES..])?, &truth);
    // Too few windows for it to vary between them at this size; `benchmark scale` has the real one.
    println!("CRPS: floor {least:.4}, read {found:.4}, one kernel {one:.4}; {inside:.3} inside");
    assert!(found < 1.02 * one && found < 1.12 * least, "{found}, one kernel {one}, floor {least}");
    Ok(())
}

/// Duplicates, one value, a site far away, wild outliers: finite, and wide where nothing is known.
#[test]
fn odd_surveys_get_finite_answers() -> Result<()> {
    let process: Arc<dyn Process + Send + Sync> = read("kriging-values")?.into();
    let mut rng = Stream::new(3, "odd", 0);
    let usual: Vec<[f64; 2]> =
        (0..700).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
    let wave = |p: &[f64; 2]| (4.0 * p[0]).sin() + 0.1 * (9.0 * p[1]).cos();
    let at = [[0.1, 0.2], [0.9, -0.9], [40.0, 40.0]];
    let twice: Vec<[f64; 2]> = usual[..350].iter().chain(&usual[..350]).copied().collect();
    let mut far = usual.clone();
    far[0] = [1e4, 1e4];
    let block: Vec<[f64; 2]> = usual.iter().map(|p| [1e-3 * p[0], 1e-3 * p[1]]).collect();
    for (name, sites) in [("usual", &usual), ("twice", &twice), ("far", &far), ("block", &block)] {
        let mut values: Vec<f64> = sites.iter().map(wave).collect();
        let kinds = ["values", "equal", "outliers"];
        for kind in &kinds[..if name == "usual" { 3 } else { 1 }] {
            match *kind {
                "equal" => values.fill(0.3),
                "outliers" => values.iter_mut().step_by(50).for_each(|v| *v *= 1e4),
                _ => {}
            }
            let said = asked(&*process, &observed(sites, &values)?, &at)?;
            for i in 0..at.len() {
                let (mean, sd) = said.mean_sd(i);
                assert!(
                    mean.is_finite() && sd.is_finite() && sd >= 0.0,
                    "{name}, {kind}: {mean} {sd}"
                );
            }
            let near = said.mean_sd(0).1;
            assert!(said.mean_sd(2).1 >= 0.99 * near, "{name}, {kind}: sure where nobody was");
        }
    }
    Ok(())
}
