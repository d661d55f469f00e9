//! A Gaussian process integrated over what is not known equals the closed form where there is one.

use candle_core::{Device, Tensor};
use isopleth::{
    Observations, Of, Process, Result, Sites, Stream,
    baseline::{ExactGp, IntegratedGp},
    kernel::{self, Matern, Metric, Smoothness},
    likelihood,
    linalg::Cholesky,
    prior,
    prior::Prior,
};

const S: [[f64; 2]; 5] = [[-0.8, 0.1], [0.2, 0.5], [0.35, 0.45], [0.9, -0.7], [-0.1, -0.9]];
const T: [[f64; 2]; 3] = [[0.0, 0.0], [0.3, 0.4], [3.0, 3.0]];
const Y: [f64; 5] = [0.4, -1.1, -0.7, 1.6, 0.2];

fn sites(xy: &[[f64; 2]]) -> Sites {
    let s = Tensor::from_vec(xy.concat(), (1, xy.len(), 2), &Device::Cpu);
    Sites::new(s.expect("n pairs"))
}

fn column(y: &[f64]) -> Tensor {
    Tensor::from_vec(y.to_vec(), (1, y.len(), 1), &Device::Cpu).expect("n values")
}

fn seen() -> Observations {
    Observations::new(sites(&S), column(&Y), None).expect("as many values as sites")
}

/// Matérn 3/2 of length scale 0.6, sill 1 and noise 0.3, with what is not known.
fn unknown(what: &str) -> Result<Box<dyn Prior>> {
    let text = format!(
        "kind = \"gp\"\nsill_sd = 1.0\nnugget_sd = 0.3\nnugget_absent = 0.0\nsum = 0.0\nproduct = 0.0\n\
        anisotropic = 0.0\nkernels = {{ \"matern-3/2\" = 1 }}\n{what}"
    );
    prior::build(&text.parse().expect("a table"))
}

fn over(prior: &dyn Prior, draws: usize) -> Result<IntegratedGp> {
    let gaussian = likelihood::find("gaussian")?;
    IntegratedGp::over(prior, draws, gaussian, &mut Stream::new(5, "integrated", 0))
}

fn known(length_scale: f64) -> ExactGp {
    let (smoothness, metric) = (Smoothness::ThreeHalves, Metric::Euclidean);
    let kernel = Matern { smoothness, length_scale, sill: 1.0, metric };
    let gaussian = likelihood::find("gaussian").expect("registered");
    ExactGp::new(Box::new(kernel), 0.09, 0.0, gaussian).expect("valid")
}

/// A mean with a normal prior is a kernel with a constant more: ordinary kriging's own formula.
#[test]
fn an_unknown_mean_is_a_constant_in_the_kernel() -> Result<()> {
    let prior = unknown("length_scale = 0.6\nmean = { normal = [0.0, 0.8] }")?;
    let integrated = over(&*prior, 20_000)?;
    let exact = known(0.6).uncertain_mean(0.64);
    let (a, b) = (integrated.condition(&seen())?, exact.condition(&seen())?);
    for of in [Of::Surface, Of::Observation] {
        let (a, b) = (a.at(&sites(&T))?.marginals(0, of)?, b.at(&sites(&T))?.marginals(0, of)?);
        for i in 0..T.len() {
            let ((mean, sd), (true_mean, true_sd)) = (a.mean_sd(i), b.mean_sd(i));
            assert!((mean - true_mean).abs() < 0.02, "{of:?} {i}: mean {mean}, not {true_mean}");
            assert!((sd - true_sd).abs() < 0.02, "{of:?} {i}: sd {sd}, not {true_sd}");
        }
    }
    let values = column(&[0.1, -0.4, 1.3]);
    let joint = |p: &dyn isopleth::Posterior| -> Result<f64> {
        let found = p.joint(&sites(&T), Of::Observation, &values)?.expect("Gaussian");
        Ok(found.to_vec1::<f64>()?[0])
    };
    let (found, truth) = (joint(&*a)?, joint(&*b)?);
    assert!((found - truth).abs() < 0.03, "joint density {found}, not {truth}");
    let count = integrated.effective(&seen())?[0];
    assert!(count > 1000.0 && count < 20_000.0, "{count} kernels count");
    Ok(())
}

/// Far from the data only the prior of the mean is left, near them the data decide: draws say the same.
#[test]
fn draws_follow_the_mixture() -> Result<()> {
    let prior = unknown("length_scale = { uniform = [0.1, 1.5] }\nmean = { normal = [0.0, 0.8] }")?;
    let integrated = over(&*prior, 300)?;
    let posterior = integrated.condition(&seen())?;
    let marginals = posterior.at(&sites(&T))?.marginals(0, Of::Surface)?;
    let n = 4000;
    let draws = posterior.draws(&sites(&T), n, &mut Stream::new(6, "draws", 0))?;
    let values = draws.values.squeeze(2)?.to_vec2::<f64>()?;
    for i in 0..T.len() {
        let (mean, sd) = marginals.mean_sd(i);
        let found = values.iter().map(|v| v[i]).sum::<f64>() / n as f64;
        let square = values.iter().map(|v| (v[i] - found).powi(2)).sum::<f64>() / n as f64;
        assert!((found - mean).abs() < 5.0 * sd / (n as f64).sqrt(), "{i}: {found}, not {mean}");
        assert!((square.sqrt() / sd - 1.0).abs() < 0.06, "{i}: sd {}, not {sd}", square.sqrt());
    }
    Ok(())
}

/// A survey of 30 sites, and what is asked: places near and far.
fn survey() -> (Observations, Sites) {
    let mut rng = Stream::new(14, "a survey and what it leaves open", 0);
    let xy: Vec<[f64; 2]> =
        (0..35).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
    let factor = Cholesky::factor(kernel::gram(&*known(0.6).kernel, &xy)).expect("a covariance");
    let noisy = factor.colour(&rng.normals(35)).into_iter().map(|f| f + 0.3 * rng.normal());
    let noisy: Vec<f64> = noisy.collect();
    let seen = Observations::new(sites(&xy[..30]), column(&noisy[..30]), None);
    (seen.expect("as many values as sites"), sites(&xy[30..]))
}

/// What a survey leaves open of a kernel's parameters is in the spread of what a fitted process foretells: as
/// a fine grid over all of them has it, where the likeliest kernel alone is too sure.
#[test]
fn a_fit_integrates_what_the_sites_leave_open() -> Result<()> {
    let gaussian = likelihood::find("gaussian")?;
    let (seen, asked) = survey();
    let fitted = IntegratedGp::fit(&seen, gaussian)?;
    assert!((4..=21).contains(&fitted.len()), "{} kernels", fitted.len());
    let best = fitted.likeliest();
    // The beliefs that `ExactGp::fit` documents, and what they weigh.
    let xy = &seen.sites.host()?[0];
    let side = |d: usize| {
        let axis = || xy.iter().map(|p| p[d]);
        axis().fold(f64::MIN, f64::max) - axis().fold(f64::MAX, f64::min)
    };
    let y = seen.y.flatten_all()?.to_vec1::<f64>()?;
    let (centre, sd) = isopleth::sites::mean_sd(&y);
    let variance = sd * sd;
    let belief = [(0.25 * side(0).max(side(1)), 1.25), (variance, 1.5), (0.2 * variance, 2.0)];
    const FINE: usize = 13;
    let steps = || (0..FINE).map(|i| 3.0 * (2.0 * i as f64 / (FINE - 1) as f64 - 1.0));
    let mut all: Vec<(f64, Vec<(f64, f64)>)> = Vec::new();
    let smooth = [Smoothness::Half, Smoothness::ThreeHalves, Smoothness::FiveHalves];
    for (a, b) in steps().flat_map(|a| steps().map(move |b| (a, b))) {
        for (c, smoothness) in steps().flat_map(|c| smooth.map(|s| (c, s))) {
            let p: Vec<f64> =
                belief.iter().zip([a, b, c]).map(|((x, sd), z)| (x.ln() + z * sd).exp()).collect();
            let metric = Metric::Euclidean;
            let kernel = Matern { smoothness, length_scale: p[0], sill: p[1], metric };
            let gp = ExactGp::new(Box::new(kernel), p[2], centre, gaussian)?;
            let gp = gp.uncertain_mean(100.0 * variance);
            let log = gp.log_marginals(&seen)?[0] - 0.5 * (a * a + b * b + c * c);
            if log > best.log_marginal.expect("it was fitted") - 16.0 {
                let at = gp.condition(&seen)?.at(&asked)?.marginals(0, Of::Surface)?;
                all.push((log.exp(), at.map(|m, i| m.mean_sd(i))));
            }
        }
    }
    let total: f64 = all.iter().map(|(w, _)| w).sum();
    let over = |f: &dyn Fn(&(f64, f64)) -> f64, i: usize| -> f64 {
        all.iter().map(|(w, at)| w / total * f(&at[i])).sum()
    };
    let of = |process: &dyn Process| -> Result<Vec<(f64, f64)>> {
        Ok(process
            .condition(&seen)?
            .at(&asked)?
            .marginals(0, Of::Surface)?
            .map(|m, i| m.mean_sd(i)))
    };
    let (open, sure) = (of(&fitted)?, of(best)?);
    let (mut off, mut plain) = (0.0, 0.0);
    for i in 0..asked.len() {
        let mean = over(&|m| m.0, i);
        let sd = (over(&|m| m.0 * m.0 + m.1 * m.1, i) - mean * mean).sqrt();
        assert!((open[i].0 - mean).abs() < 0.15 * sd, "{i}: mean {}, not {mean}", open[i].0);
        assert!((open[i].1 / sd - 1.0).abs() < 0.12, "{i}: sd {}, not {sd}", open[i].1);
        off += (open[i].1 / sd).ln().abs();
        plain += (sure[i].1 / sd).ln().abs();
    }
    assert!(off < 0.4 * plain, "{off} off, and {plain} with one kernel");
    Ok(())
}

/// Surfaces that can be asked anywhere are drawn from the mixture too, whole ones from one kernel each.
#[test]
fn fields_follow_the_mixture() -> Result<()> {
    let (seen, asked) = survey();
    let fitted = IntegratedGp::fit(&seen, likelihood::find("gaussian")?)?;
    let posterior = fitted.condition(&seen)?;
    let marginals = posterior.at(&asked)?.marginals(0, Of::Surface)?;
    let n = 6000;
    let field = posterior.field(n, 3, 3.0)?;
    assert_eq!(field.draws(), n);
    let drawn = field.at(&asked)?;
    for i in 0..asked.len() {
        let (mean, sd) = marginals.mean_sd(i);
        assert!((drawn.mean[i] - mean).abs() < 1e-5 && (drawn.sd[i] / sd - 1.0).abs() < 1e-4);
        let own = &drawn.deviations[i * n..(i + 1) * n];
        let moment = |k: i32| own.iter().map(|d| f64::from(*d).powi(k)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 5.0 * sd / (n as f64).sqrt(), "{i}: {} off", moment(1));
        assert!((moment(2).sqrt() / sd - 1.0).abs() < 0.05, "{i}: {}, not {sd}", moment(2).sqrt());
        // No kernel's draws stand together.
        let halves = own[..n / 2].iter().map(|d| f64::from(*d).powi(2)).sum::<f64>();
        assert!((halves / (0.5 * n as f64 * sd * sd) - 1.0).abs() < 0.1);
    }
    // What is drawn at a place does not hang on what is asked with it.
    let alone = field.at(&asked.narrow(2, 1)?)?;
    let off = alone.deviations.iter().zip(&drawn.deviations[2 * n..3 * n]);
    assert!(off.clone().count() == n && off.into_iter().all(|(a, b)| (a - b).abs() < 1e-4));
    Ok(())
}

/// Rows weigh kernels by their own data: each answers as if it were alone.
#[test]
fn rows_are_independent() -> Result<()> {
    let prior = unknown("length_scale = { uniform = [0.1, 1.5] }\nmean = 0.0")?;
    let integrated = over(&*prior, 50)?;
    let other: Vec<f64> = Y.iter().map(|y| 3.0 - 2.0 * y).collect();
    let two = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 0);
    let both = Observations::new(
        Sites::new(two(&sites(&S).s, &sites(&S).s)?),
        two(&column(&Y), &column(&other))?,
        None,
    )?;
    let at = Sites::new(two(&sites(&T).s, &sites(&T).s)?);
    let together = integrated.condition(&both)?.at(&at)?;
    let alone = Observations::new(sites(&S), column(&other), None)?;
    let alone = integrated.condition(&alone)?.at(&sites(&T))?.marginals(0, Of::Surface)?;
    let together = together.marginals(1, Of::Surface)?;
    for i in 0..T.len() {
        let (a, b) = (alone.mean_sd(i), together.mean_sd(i));
        assert!((a.0 - b.0).abs() < 1e-5 && (a.1 - b.1).abs() < 1e-5, "{i}: {a:?}, {b:?}");
    }
    Ok(())
}

/// The one that knows the kernel is better on average, the one that integrates is better than one
/// that is told a wrong kernel.
#[test]
fn knowing_less_costs_and_knowing_wrongly_costs_more() -> Result<()> {
    let prior = unknown("length_scale = { uniform = [0.1, 1.0] }\nmean = 0.0")?;
    let integrated = over(&*prior, 300)?;
    let wrong = known(0.1);
    let (mut told, mut asked, mut misled) = (0.0, 0.0, 0.0);
    let mut rng = Stream::new(8, "surfaces", 0);
    for _ in 0..60 {
        let xy: Vec<[f64; 2]> =
            (0..40).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
        let (rule, surface) = prior.surfaces(&xy, 1, &mut rng)?.swap_remove(0);
        let seen = Observations::new(sites(&xy[..20]), column(&surface.noisy[..20]), None)?;
        let gaussian = likelihood::find("gaussian")?;
        let truth = ExactGp::new(Box::new(rule.known_kernel()?), rule.nugget, rule.mean, gaussian)?;
        let score = |process: &dyn Process| -> Result<f64> {
            let posterior = process.condition(&seen)?;
            let marginals = posterior.at(&sites(&xy[20..]))?.marginals(0, Of::Observation)?;
            let y = &surface.noisy[20..];
            Ok((0..y.len()).map(|i| marginals.link_log_density(i, y[i])).sum::<f64>())
        };
        told += score(&truth)? / 1200.0;
        asked += score(&integrated)? / 1200.0;
        misled += score(&wrong)? / 1200.0;
    }
    assert!(told > asked && asked > misled + 0.05, "{told} {asked} {misled}");
    assert!(told - asked < 0.1, "integration loses {}", told - asked);
    Ok(())
}

#[test]
fn refuses_no_draws_and_surfaces_without_a_kernel() -> Result<()> {
    let prior = unknown("length_scale = 0.6\nmean = 0.0")?;
    assert!(over(&*prior, 0).is_err());
    let saw: toml::Table = "kind = \"sawtooth\"".parse().expect("a table");
    assert!(over(&*prior::build(&saw)?, 10).is_err());
    Ok(())
}
