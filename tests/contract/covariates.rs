//! Covariates in processes: coefficients are integrated out, and what is not known of them is not lost.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use isopleth::{
    Observations, Of, Process, Result, Sites, Stream,
    baseline::{Coefficients, ExactGp, Regressed, regression},
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood::{self, Likelihood},
    linalg::lower,
    score::{Truth, forecasts},
};
use rayon::prelude::*;

fn tensor(values: Vec<f64>, shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn sites(xy: &[[f64; 2]], x: Option<&[Vec<f64>]>) -> Sites {
    let mut sites = Sites::new(tensor(xy.concat(), (1, xy.len(), 2)));
    sites.x = x.map(|x| tensor(x.concat(), (1, xy.len(), x[0].len())));
    sites
}

fn values(xy: &[[f64; 2]], x: Option<&[Vec<f64>]>, y: &[f64]) -> Observations {
    Observations::new(sites(xy, x), tensor(y.to_vec(), (1, y.len(), 1)), None).unwrap()
}

fn counts(xy: &[[f64; 2]], x: Option<&[Vec<f64>]>, k: &[f64], n: &[f64]) -> Observations {
    let trials = Some(tensor(n.to_vec(), (1, n.len())));
    Observations::new(sites(xy, x), tensor(k.to_vec(), (1, k.len(), 1)), trials).unwrap()
}

fn gaussian() -> &'static dyn Likelihood {
    likelihood::find("gaussian").unwrap()
}

fn binomial() -> &'static dyn Likelihood {
    likelihood::find("binomial").unwrap()
}

fn matern(sill: f64) -> Matern {
    let smoothness = Smoothness::ThreeHalves;
    Matern { smoothness, length_scale: 0.5, sill, metric: Metric::Euclidean }
}

const NUGGET: f64 = 0.2;
const MEAN: f64 = 0.3;
const DOUBT: f64 = 4.0;
const TAU: f64 = 0.8;

fn gp(likelihood: &'static dyn Likelihood, features: usize) -> ExactGp {
    let gp = ExactGp::new(Box::new(matern(1.1)), NUGGET, MEAN, likelihood).unwrap();
    gp.uncertain_mean(DOUBT).with_covariates(features, TAU).unwrap()
}

fn square(n: usize, rng: &mut Stream) -> Vec<[f64; 2]> {
    (0..n).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect()
}

/// A surface of the kernel at places.
fn surface(kernel: &dyn Kernel, xy: &[[f64; 2]], rng: &mut Stream) -> Vec<f64> {
    let n = xy.len();
    let mut flat = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            flat[i * n + j] = kernel.covariance(&xy[i], &xy[j]);
        }
    }
    lower(flat, n).unwrap().colour(&rng.normals(n))
}

fn near(what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    let gap = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(gap < tolerance, "{what}: {a:?} is not {b:?}");
}

/// Sites with two covariates and values, and targets with theirs.
struct Case {
    xy: Vec<[f64; 2]>,
    x: Vec<Vec<f64>>,
    y: Vec<f64>,
    to: Vec<[f64; 2]>,
    z: Vec<Vec<f64>>,
}

fn case(n: usize, seed: u64) -> Case {
    let mut rng = Stream::new(seed, "case", 0);
    let (xy, to) = (square(n, &mut rng), square(7, &mut rng));
    let x: Vec<Vec<f64>> = (0..n).map(|_| rng.normals(2)).collect();
    let z: Vec<Vec<f64>> = (0..7).map(|_| rng.normals(2)).collect();
    let rest = surface(&matern(1.1), &xy, &mut rng);
    let noise = rng.normals(n);
    let y = (0..n).map(|i| 0.9 * x[i][0] - 0.4 * x[i][1] + rest[i] + 0.4 * noise[i]).collect();
    Case { xy, x, y, to, z }
}

/// Dense algebra that knows nothing of the code: K + τ² X Xᵀ, inverted column by column.
#[test]
fn coefficients_are_integrated_out_of_the_exact_process() -> Result<()> {
    let Case { xy, x, y, to, z } = case(12, 1);
    let n = xy.len();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let kernel = matern(1.1);
    let mut flat = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            let own = if i == j { NUGGET } else { 0.0 };
            flat[i * n + j] =
                kernel.covariance(&xy[i], &xy[j]) + DOUBT + TAU * dot(&x[i], &x[j]) + own;
        }
    }
    let factor = lower(flat, n)?;
    let residual: Vec<f64> = y.iter().map(|y| y - MEAN).collect();
    let solved = factor.solve(&residual);
    let (mut mean, mut sd) = (Vec::new(), Vec::new());
    for (to, z) in to.iter().zip(&z) {
        let c: Vec<f64> =
            (0..n).map(|i| kernel.covariance(&xy[i], to) + DOUBT + TAU * dot(&x[i], z)).collect();
        mean.push(MEAN + dot(&c, &solved));
        sd.push((1.1 + DOUBT + TAU * dot(z, z) - dot(&c, &factor.solve(&c))).sqrt());
    }
    let (gp, seen) = (gp(gaussian(), 2), values(&xy, Some(&x), &y));
    let found = gp.condition(&seen)?.at(&sites(&to, Some(&z)))?.marginals(0, Of::Surface)?;
    near("mean", &found.mean, &mean, 1e-9);
    near("sd", &found.sd, &sd, 1e-9);
    // β | y: τ² Xᵀ K⁻¹ (y − m), and τ² I − τ⁴ Xᵀ K⁻¹ X.
    let column = |j: usize| x.iter().map(|x| x[j]).collect::<Vec<f64>>();
    let law = gp.coefficients(&seen)?;
    near("β", &law.mean, &[0, 1].map(|j| TAU * dot(&column(j), &solved)), 1e-9);
    let mut covariance = Vec::new();
    for i in 0..2 {
        for j in 0..2 {
            let prior = if i == j { TAU } else { 0.0 };
            covariance.push(prior - TAU * TAU * dot(&column(i), &factor.solve(&column(j))));
        }
    }
    near("covariance of β", &law.covariance, &covariance, 1e-9);
    Ok(())
}

#[test]
fn covariates_that_were_not_asked_for_are_passed_over_and_other_ones_refused() -> Result<()> {
    let Case { xy, x, y, to, z } = case(12, 2);
    let without = gp(gaussian(), 0);
    let ask = |gp: &ExactGp, x: Option<&[Vec<f64>]>, z: Option<&[Vec<f64>]>| {
        gp.condition(&values(&xy, x, &y))?.at(&sites(&to, z))?.marginals(0, Of::Surface)
    };
    let (a, b) = (ask(&without, Some(&x), Some(&z))?, ask(&without, None, None)?);
    assert_eq!(a, b);
    assert!(ask(&gp(gaussian(), 3), Some(&x), Some(&z)).is_err());
    assert!(ask(&gp(gaussian(), 2), Some(&x), None).is_err());
    // A covariate that is 0 everywhere says nothing, at no price.
    let (zeros, none) = (vec![vec![0.0]; 12], vec![vec![0.0]; 7]);
    let c = ask(&gp(gaussian(), 1), Some(&zeros), Some(&none))?;
    near("mean", &c.mean, &b.mean, 1e-12);
    near("sd", &c.sd, &b.sd, 1e-12);
    Ok(())
}

/// The law taken apart at the coefficients and put together again is the law.
#[test]
fn a_mixture_over_coefficients_is_the_exact_process() -> Result<()> {
    let Case { xy, x, y, to, z } = case(25, 3);
    let whole = gp(gaussian(), 2);
    let seen = values(&xy, Some(&x), &y);
    let betas = whole.coefficients(&seen)?.spread()?;
    assert_eq!(betas.len(), 4);
    let taken = Regressed::new(Arc::new(gp(gaussian(), 0)), betas, gaussian(), false);
    let ask = |process: &dyn Process| {
        let marginals = process.condition(&seen)?.at(&sites(&to, Some(&z)))?;
        let marginals = marginals.marginals(0, Of::Surface)?;
        Ok::<_, isopleth::Error>((0..7).map(|i| marginals.mean_sd(i)).unzip())
    };
    let (mean, sd): (Vec<f64>, Vec<f64>) = ask(&taken)?;
    let (exact, exact_sd): (Vec<f64>, Vec<f64>) = ask(&whole)?;
    near("mean", &mean, &exact, 1e-8);
    near("sd", &sd, &exact_sd, 1e-8);
    // And at the mean alone it would be too sure.
    let one = vec![whole.coefficients(&seen)?.mean];
    let (_, sure): (Vec<f64>, Vec<f64>) =
        ask(&Regressed::new(Arc::new(gp(gaussian(), 0)), one, gaussian(), false))?;
    assert!(sure.iter().zip(&exact_sd).all(|(a, b)| a < b), "{sure:?} against {exact_sd:?}");
    // Draws are of the same law.
    let posterior = taken.condition(&seen)?;
    let draws = posterior.draws(&sites(&to, Some(&z)), 4000, &mut Stream::new(1, "draws", 0))?;
    let draws = draws.values.squeeze(2)?.to_vec2::<f64>()?;
    for i in 0..7 {
        let average = draws.iter().map(|d| d[i]).sum::<f64>() / 4000.0;
        let spread = (draws.iter().map(|d| (d[i] - average).powi(2)).sum::<f64>() / 4000.0).sqrt();
        assert!((average - exact[i]).abs() < 5.0 * exact_sd[i] / 4000f64.sqrt(), "{average}");
        assert!((spread / exact_sd[i] - 1.0).abs() < 0.06, "{spread} of {}", exact_sd[i]);
    }
    Ok(())
}

/// Many coefficients are drawn: their mean is met, and their spread in the mean over draws.
#[test]
fn more_coefficients_than_can_be_met_exactly_are_drawn() -> Result<()> {
    let p = 12;
    let mut covariance = vec![0.02; p * p];
    (0..p).for_each(|i| covariance[i * p + i] = 0.3);
    let law = Coefficients { mean: (0..p).map(|i| i as f64).collect(), covariance };
    let betas = law.spread()?;
    let n = betas.len() as f64;
    for j in 0..p {
        let mean = betas.iter().map(|b| b[j]).sum::<f64>() / n;
        assert!((mean - j as f64).abs() < 1e-9, "{mean}");
    }
    let all: f64 = (0..p)
        .map(|j| betas.iter().map(|b| (b[j] - j as f64).powi(2)).sum::<f64>() / n)
        .sum::<f64>()
        / p as f64;
    assert!((all / 0.3 - 1.0).abs() < 0.4, "{all}");
    Ok(())
}

/// Counts less an effect: the empirical logit moves by as much, and its variance not at all.
#[test]
fn counts_less_an_effect_say_as_much_as_before() -> Result<()> {
    let (k, n) = ([0.0, 3.0, 50.0, 17.0], [40.0, 9.0, 50.0, 90.0]);
    let xy = [[0.0, 0.0], [0.1, 0.0], [0.3, 0.2], [0.4, -0.1]];
    let seen = counts(&xy, None, &k, &n);
    let shift = [-0.7, 0.4, 0.9, 0.0];
    let left = regression::less(&seen, &tensor(shift.to_vec(), (1, 4, 1)), binomial())?;
    let (y, m) = (left.y.flatten_all()?.to_vec1::<f64>()?, left.trials.unwrap().to_vec2::<f64>()?);
    for i in 0..4 {
        let logit = |k: f64, n: f64| ((k + 0.5) / (n - k + 0.5)).ln();
        let variance = |k: f64, n: f64| 1.0 / (k + 0.5) + 1.0 / (n - k + 0.5);
        let (before, after) = (logit(k[i], n[i]), logit(y[i], m[0][i]));
        // Nobody, or everybody, cannot become less than nobody: such counts are held at 0.
        let held = if k[i] > 0.0 && k[i] < n[i] { 1e-9 } else { 0.75 };
        assert!((before - shift[i] - after).abs() < held, "{i}: {before} {after}");
        assert!((variance(y[i], m[0][i]) / variance(k[i], n[i]) - 1.0).abs() < held, "{i}");
        assert!(y[i] >= 0.0 && y[i] <= m[0][i]);
    }
    let same = regression::less(&seen, &tensor(vec![0.0; 4], (1, 4, 1)), binomial())?;
    near("counts", &same.y.flatten_all()?.to_vec1::<f64>()?, &k, 1e-9);
    near("trials", &same.trials.unwrap().flatten_all()?.to_vec1::<f64>()?, &n, 1e-9);
    Ok(())
}

/// Taken apart by pseudo-counts, the law of counts is nearly the one that integrates in one go.
#[test]
fn counts_taken_apart_are_nearly_the_exact_law() -> Result<()> {
    let Case { xy, x, y, to, z } = case(40, 4);
    let mut rng = Stream::new(4, "counts", 0);
    let n: Vec<f64> = (0..40).map(|_| rng.uniform(20.0, 120.0).round()).collect();
    let share = |y: f64| 1.0 / (1.0 + (-y).exp());
    let k: Vec<f64> =
        (0..40).map(|i| rng.binomial(n[i] as u64, share(y[i] - 1.0)) as f64).collect();
    let seen = counts(&xy, Some(&x), &k, &n);
    let whole = gp(binomial(), 2);
    let betas = whole.coefficients(&seen)?.spread()?;
    let taken = Regressed::new(Arc::new(gp(binomial(), 0)), betas, binomial(), false);
    let at = sites(&to, Some(&z));
    let exact = whole.condition(&seen)?.at(&at)?.marginals(0, Of::Surface)?;
    let apart = taken.condition(&seen)?.at(&at)?.marginals(0, Of::Surface)?;
    for i in 0..7 {
        let ((a, s), (b, t)) = (exact.mean_sd(i), apart.mean_sd(i));
        assert!((a - b).abs() < 0.12 * s, "{i}: mean {a} ± {s} against {b} ± {t}");
        assert!((t / s - 1.0).abs() < 0.06, "{i}: sd {s} against {t}");
    }
    Ok(())
}

/// One simulated survey: half of the sites to learn from, half held out, with one covariate that acts and
/// one that does not, both smooth in space as covariates are.
fn simulated(seed: u64, counted: bool) -> Result<[f64; 3]> {
    let n = 80;
    let mut rng = Stream::new(seed, "simulated", u64::from(counted));
    let xy = square(n, &mut rng);
    let smooth = Matern { length_scale: 0.4, ..matern(1.0) };
    let (acts, idle) = (surface(&smooth, &xy, &mut rng), surface(&smooth, &xy, &mut rng));
    let rest = surface(&matern(0.4), &xy, &mut rng);
    let beta = rng.normal();
    let eta: Vec<f64> =
        (0..n).map(|i| -1.0 + beta * acts[i] + rest[i] + 0.3 * rng.normal()).collect();
    let likelihood = if counted { binomial() } else { gaussian() };
    let tested = 60.0;
    let y: Vec<f64> = match counted {
        true => eta.iter().map(|e| rng.binomial(60, 1.0 / (1.0 + (-e).exp())) as f64).collect(),
        false => eta,
    };
    let half = n / 2;
    let part = |x: &[Vec<f64>], from: usize| x[from..from + half].to_vec();
    let truths: Vec<Truth> = y[half..]
        .iter()
        .map(|y| match counted {
            true => Truth::Count { positive: *y as u64, tested: tested as u64 },
            false => Truth::Value(*y),
        })
        .collect();
    let score = |x: Option<Vec<Vec<f64>>>| -> Result<(f64, Option<Coefficients>)> {
        let (here, there) = (x.as_ref().map(|x| part(x, 0)), x.as_ref().map(|x| part(x, half)));
        let seen = match counted {
            true => counts(&xy[..half], here.as_deref(), &y[..half], &vec![tested; half]),
            false => values(&xy[..half], here.as_deref(), &y[..half]),
        };
        let gp = ExactGp::fit(&seen, likelihood)?;
        let at = gp.condition(&seen)?.at(&sites(&xy[half..], there.as_deref()))?;
        let met = forecasts(&at.marginals(0, Of::Observation)?, &truths)?;
        let each = isopleth::score::Summary::of(&met).log_score;
        Ok((each, x.map(|_| gp.coefficients(&seen)).transpose()?))
    };
    let columns = |of: &[&Vec<f64>]| -> Vec<Vec<f64>> {
        (0..n).map(|i| of.iter().map(|c| c[i]).collect()).collect()
    };
    let (without, _) = score(None)?;
    let (with, law) = score(Some(columns(&[&acts])))?;
    let (vain, _) = score(Some(columns(&[&idle])))?;
    let law = law.expect("there is a covariate");
    let z = (law.mean[0] - beta) / law.sd()[0];
    Ok([with - without, vain - without, z])
}

/// A strong covariate pays, one that does nothing costs little, and intervals of the coefficient hold.
#[test]
fn a_covariate_that_acts_pays_and_one_that_does_not_costs_little() -> Result<()> {
    for (counted, surveys) in [(false, 60), (true, 12)] {
        let found: Vec<[f64; 3]> =
            (0..surveys).into_par_iter().map(|s| simulated(s, counted)).collect::<Result<_>>()?;
        let mean = |i: usize| found.iter().map(|f| f[i]).sum::<f64>() / surveys as f64;
        let error = |i: usize| {
            let m = mean(i);
            (found.iter().map(|f| (f[i] - m).powi(2)).sum::<f64>()).sqrt() / surveys as f64
        };
        let held = found.iter().filter(|f| f[2].abs() < 1.96).count() as f64 / surveys as f64;
        eprintln!(
            "counts {counted}: gain {:.3} ± {:.3}, idle {:.4} ± {:.4}, held {held:.3}",
            mean(0),
            error(0),
            mean(1),
            error(1)
        );
        assert!(mean(0) > 2.0 * error(0) && mean(0) > 0.05, "gain {} ± {}", mean(0), error(0));
        assert!(mean(1) > -0.03, "an idle covariate: {} ± {}", mean(1), error(1));
        // Parameters are plugged in, which costs a point or two; counting 60 errs by 3.
        assert!(counted || (0.85..=1.0).contains(&held), "{held} of β in their 95 % intervals");
    }
    Ok(())
}

/// Regression alone finds effects, and knows no place.
#[test]
fn regression_alone_finds_effects() -> Result<()> {
    let Case { xy, x, y, .. } = case(60, 6);
    let seen = values(&xy, Some(&x), &y);
    let gp = ExactGp::regression(&seen, gaussian())?;
    let law = gp.coefficients(&seen)?;
    for (found, truth) in law.mean.iter().zip([0.9, -0.4]) {
        assert!((found - truth).abs() < 0.5, "{found} for {truth}");
    }
    let two = sites(&[[0.0, 0.0], [0.9, -0.8]], Some(&[vec![0.3, 0.1], vec![0.3, 0.1]]));
    let at = gp.condition(&seen)?.at(&two)?.marginals(0, Of::Surface)?;
    assert!((at.mean[0] - at.mean[1]).abs() < 1e-3, "{:?}", at.mean);
    Ok(())
}
