//! Theorems about kriging, and numbers computed by NumPy and SciPy 1.17.1.

use candle_core::{Device, Tensor};
use isopleth::{
    Observations, Of, Process, Result, Sites, Stream,
    baseline::ExactGp,
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood,
    linalg::lower,
};

const S: [[f64; 2]; 5] = [[-0.8, 0.1], [0.2, 0.5], [0.35, 0.45], [0.9, -0.7], [-0.1, -0.9]];
const T: [[f64; 2]; 3] = [[0.0, 0.0], [0.3, 0.4], [3.0, 3.0]];
const Y: [f64; 5] = [0.4, -1.1, -0.7, 1.6, 0.2];

/// Sites in f64, so that laws hold to the last digits.
fn sites(xy: &[[f64; 2]]) -> Sites {
    let s = Tensor::from_vec(xy.concat(), (1, xy.len(), 2), &Device::Cpu);
    Sites::new(s.expect("n pairs"))
}

fn values(xy: &[[f64; 2]], y: &[f64]) -> Observations {
    let y = Tensor::from_vec(y.to_vec(), (1, y.len(), 1), &Device::Cpu).expect("n values");
    Observations::new(sites(xy), y, None).expect("as many values as sites")
}

fn counts(xy: &[[f64; 2]], positive: &[f64], tested: &[f64]) -> Observations {
    let mut seen = values(xy, positive);
    let trials = Tensor::from_vec(tested.to_vec(), (1, tested.len()), &Device::Cpu);
    seen.trials = Some(trials.expect("n counts"));
    seen
}

fn matern(sill: f64) -> Box<dyn Kernel> {
    let smoothness = Smoothness::ThreeHalves;
    Box::new(Matern { smoothness, length_scale: 0.6, sill, metric: Metric::Euclidean })
}

fn gp(sill: f64, nugget: f64, mean: f64) -> ExactGp {
    let gaussian = likelihood::find("gaussian").expect("registered");
    ExactGp::new(matern(sill), nugget, mean, gaussian).expect("valid")
}

fn binomial_gp(sill: f64, nugget: f64, mean: f64) -> ExactGp {
    let binomial = likelihood::find("binomial").expect("registered");
    ExactGp::new(matern(sill), nugget, mean, binomial).expect("valid")
}

/// Mean, and sds of surface and observation, of the first row.
fn ask(gp: &ExactGp, seen: &Observations, at: &[[f64; 2]]) -> Result<[Vec<f64>; 3]> {
    let posterior = gp.condition(seen)?.at(&sites(at))?;
    let surface = posterior.marginals(0, Of::Surface)?;
    Ok([surface.mean, surface.sd, posterior.marginals(0, Of::Observation)?.sd])
}

fn gap(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn near(what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert!(gap(a, b) < tolerance, "{what}: {a:?} is not {b:?}");
}

#[test]
fn reproduces_its_data_without_a_nugget() -> Result<()> {
    let [mean, sd, _] = ask(&gp(1.7, 0.0, 0.25), &values(&S, &Y), &S)?;
    near("mean at the data", &mean, &Y, 1e-9);
    // The variance is a difference of numbers near 1.7: rounding 1e-15 and the floor 1e-12 · sill.
    assert!(sd.iter().all(|sd| *sd < 1e-5), "{sd:?}");
    Ok(())
}

#[test]
fn moves_with_the_map() -> Result<()> {
    let (sin, cos) = 0.8f64.sin_cos();
    let moved = |p: &[f64; 2]| [cos * p[0] - sin * p[1] + 5.0, sin * p[0] + cos * p[1] - 3.0];
    let gp = gp(1.7, 0.3, 0.25);
    let here = ask(&gp, &values(&S, &Y), &T)?;
    let there = ask(&gp, &values(&S.map(|p| moved(&p)), &Y), &T.map(|p| moved(&p)))?;
    for (a, b) in here.iter().zip(&there) {
        near("after a rotation and a shift", a, b, 1e-12);
    }
    Ok(())
}

#[test]
fn variance_ignores_the_values_observed() -> Result<()> {
    let gp = gp(1.7, 0.3, 0.25);
    let [_, a, b] = ask(&gp, &values(&S, &Y), &T)?;
    let [_, c, d] = ask(&gp, &values(&S, &[9.0, -4.0, 2.0, 0.0, 31.0]), &T)?;
    assert_eq!((a, b), (c, d));
    Ok(())
}

#[test]
fn scaling_sill_and_nugget_scales_only_the_variance() -> Result<()> {
    let [mean, surface, observation] = ask(&gp(1.7, 0.3, 0.25), &values(&S, &Y), &T)?;
    let [same, four, four_too] = ask(&gp(16.0 * 1.7, 16.0 * 0.3, 0.25), &values(&S, &Y), &T)?;
    near("mean", &same, &mean, 1e-12);
    near("surface", &four, &surface.iter().map(|s| 4.0 * s).collect::<Vec<_>>(), 1e-12);
    near("observation", &four_too, &observation.iter().map(|s| 4.0 * s).collect::<Vec<_>>(), 1e-12);
    Ok(())
}

#[test]
fn an_observation_is_the_surface_plus_the_nugget() -> Result<()> {
    for gp in [gp(1.7, 0.3, 0.25), binomial_gp(1.7, 0.3, 0.25)] {
        let seen = counts(&S, &[11.0, 5.0, 60.0, 2.0, 0.0], &[40.0, 12.0, 90.0, 25.0, 7.0]);
        let [_, surface, observation] = ask(&gp, &seen, &T)?;
        let sum: Vec<f64> = surface.iter().map(|s| (s * s + 0.3).sqrt()).collect();
        near("observation", &observation, &sum, 1e-12);
    }
    Ok(())
}

#[test]
fn far_away_only_the_prior_is_left() -> Result<()> {
    let far = [[1e4, -1e4]];
    let [mean, surface, observation] = ask(&gp(1.7, 0.3, 0.25), &values(&S, &Y), &far)?;
    near(
        "prior",
        &[mean[0], surface[0], observation[0]],
        &[0.25, 1.7f64.sqrt(), 2f64.sqrt()],
        1e-12,
    );
    Ok(())
}

#[test]
fn ordinary_kriging_ignores_a_constant_and_is_never_surer_than_simple() -> Result<()> {
    let ordinary = gp(1.7, 0.3, 0.0).uncertain_mean(1e5);
    let [mean, sd, _] = ask(&ordinary, &values(&S, &Y), &T)?;
    let [moved, same, _] = ask(&ordinary, &values(&S, &Y.map(|y| y + 40.0)), &T)?;
    // The prior of the mean is broad, not flat: 40 / 1e5 of the constant is disbelieved.
    near("mean", &moved, &mean.iter().map(|m| m + 40.0).collect::<Vec<_>>(), 1e-3);
    near("sd", &same, &sd, 1e-12);
    let [_, simple, _] = ask(&gp(1.7, 0.3, 0.0), &values(&S, &Y), &T)?;
    assert!(simple.iter().zip(&sd).all(|(s, o)| s <= o), "{simple:?} above {sd:?}");
    Ok(())
}

/// NumPy: `inv` of the dense covariance; `scipy.stats.multivariate_normal`; the ordinary kriging
/// system with its Lagrange multiplier. The Matérn comes from `scipy.special.kv`.
#[test]
fn equals_the_dense_formulas() -> Result<()> {
    let simple = gp(1.7, 0.3, 0.25);
    let seen = values(&S, &Y);
    near("log marginal", &simple.log_marginals(&seen)?, &[-6.84445445290078], 1e-10);
    let [mean, sd, _] = ask(&simple, &seen, &T)?;
    near("mean", &mean, &[-0.18040602131545103, -0.7308748004684387, 0.24979535476736656], 1e-10);
    near("sd", &sd, &[1.0483705316305907, 0.44912405672229044, 1.3038404349937025], 1e-10);
    let [mean, sd, _] = ask(&simple.uncertain_mean(1e6), &seen, &T)?;
    near(
        "ordinary mean",
        &mean,
        &[-0.174323077126691, -0.7287800934763565, 0.2958715349130884],
        1e-6,
    );
    near("ordinary sd", &sd, &[1.0536494003176735, 0.4505865495661194, 1.5286115038832786], 1e-6);
    Ok(())
}

/// SciPy: the mode by BFGS polished by Newton on K⁻¹ + W, the evidence by two log-determinants, the
/// predictions by (K + W⁻¹)⁻¹: none of it by way of B = I + W^½ K W^½.
#[test]
fn laplace_equals_the_dense_formulas() -> Result<()> {
    let gp = binomial_gp(1.7, 0.3, 0.25);
    let seen = counts(&S, &[11.0, 5.0, 60.0, 2.0, 0.0], &[40.0, 12.0, 90.0, 25.0, 7.0]);
    near("log marginal", &gp.log_marginals(&seen)?, &[-16.342160365472214], 1e-7);
    let [mean, sd, _] = ask(&gp, &seen, &T)?;
    near("mean", &mean, &[-0.4869698903755093, 0.2527253973118018, 0.25005925666288964], 1e-6);
    near("sd", &sd, &[1.0702862068964651, 0.5015268899917736, 1.3038404361624651], 1e-6);
    Ok(())
}

/// One village, 9 of 30: the integral itself (`scipy.integrate.quad`), which Laplace approximates.
#[test]
fn laplace_is_close_to_quadrature_at_one_site() -> Result<()> {
    let gp = binomial_gp(1.2, 0.4, 0.25);
    let seen = counts(&[[0.4, -0.2]], &[9.0], &[30.0]);
    near("log marginal", &gp.log_marginals(&seen)?, &[-3.403796483270278], 0.01);
    let [mean, sd, _] = ask(&gp, &seen, &[[0.4, -0.2]])?;
    near("mean", &mean, &[-0.5173272878117575], 0.02);
    near("sd", &sd, &[0.6174861852639114], 0.005);
    Ok(())
}

/// Extreme counts: nobody or everybody positive, in crowds, under a strong and a weak prior.
#[test]
fn laplace_settles_on_extreme_counts() -> Result<()> {
    for (sill, mean) in [(0.01, 0.0), (1.0, -6.0), (100.0, 4.0), (1e4, 0.0)] {
        let seen =
            counts(&S, &[0.0, 1000.0, 0.0, 1000.0, 1.0], &[1000.0, 1000.0, 1.0, 1000.0, 1.0]);
        let [mean, sd, _] = ask(&binomial_gp(sill, 0.1 * sill, mean), &seen, &T)?;
        assert!(mean.iter().chain(&sd).all(|v| v.is_finite()), "sill {sill}: {mean:?} {sd:?}");
    }
    Ok(())
}

#[test]
fn order_padding_and_other_rows_are_irrelevant() -> Result<()> {
    let gp = gp(1.7, 0.3, 0.25);
    let alone = ask(&gp, &values(&S, &Y), &T)?;
    let shuffled = [3, 0, 4, 2, 1];
    let again = ask(&gp, &values(&shuffled.map(|i| S[i]), &shuffled.map(|i| Y[i])), &T)?;
    near("after shuffling", &again[0], &alone[0], 1e-12);

    let padded = |mut xy: Vec<[f64; 2]>, mut y: Vec<f64>| {
        xy.resize(6, [0.0, 0.0]);
        y.resize(6, 77.0);
        (xy.concat(), y)
    };
    let (a, y_a) = padded(S.to_vec(), Y.to_vec());
    let (b, y_b) = padded(S[..2].to_vec(), vec![5.0, 6.0]);
    let device = Device::Cpu;
    let mut both = Observations::new(
        Sites::new(Tensor::from_vec([b, a].concat(), (2, 6, 2), &device)?),
        Tensor::from_vec([y_b, y_a].concat(), (2, 6, 1), &device)?,
        None,
    )?;
    let mask = vec![1., 1., 0., 0., 0., 0., 1., 1., 1., 1., 1., 0f64];
    both.mask = Tensor::from_vec(mask, (2, 6), &device)?;
    let targets =
        Sites::new(Tensor::from_vec([T.concat(), T.concat()].concat(), (2, 3, 2), &device)?);
    let posterior = gp.condition(&both)?.at(&targets)?;
    near("as the second row", &posterior.marginals(1, Of::Surface)?.mean, &alone[0], 1e-12);
    near("as the second row", &posterior.marginals(1, Of::Surface)?.sd, &alone[1], 1e-12);
    Ok(())
}

#[test]
fn an_empty_context_leaves_the_prior() -> Result<()> {
    for gp in [gp(1.7, 0.3, 0.25), binomial_gp(1.7, 0.3, 0.25)] {
        let mut seen = counts(&S[..1], &[1.0], &[2.0]);
        seen.mask = seen.mask.zeros_like()?;
        let [mean, sd, _] = ask(&gp, &seen, &T)?;
        near("prior", &[mean[0], sd[0]], &[0.25, 1.7f64.sqrt()], 1e-12);
    }
    Ok(())
}

/// Targets are asked in chunks; no target may notice.
#[test]
fn tiles_never_change_the_answer() -> Result<()> {
    let mut rng = Stream::new(1, "targets", 0);
    let at: Vec<[f64; 2]> =
        (0..1300).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
    let gp = gp(1.7, 0.3, 0.25);
    let whole = ask(&gp, &values(&S, &Y), &at)?;
    for range in [0..1, 511..514, 1000..1300] {
        let part = ask(&gp, &values(&S, &Y), &at[range.clone()])?;
        near("mean of a tile", &part[0], &whole[0][range.clone()], 1e-13);
        near("sd of a tile", &part[1], &whole[1][range], 1e-12);
    }
    Ok(())
}

#[test]
fn joint_draws_have_the_marginals_and_the_covariance() -> Result<()> {
    let gp = gp(1.7, 0.3, 0.25);
    let posterior = gp.condition(&values(&S, &Y))?;
    let n = 20_000;
    let draws = posterior.draws(&sites(&T[..2]), n, &mut Stream::new(3, "draws", 0))?;
    assert_eq!(draws.values.dims(), [n, 2, 1]);
    let draws = draws.values.squeeze(2)?.to_vec2::<f64>()?;
    let mean = |f: &dyn Fn(&[f64]) -> f64| draws.iter().map(|d| f(d)).sum::<f64>() / n as f64;
    let (a, b) = (mean(&|d| d[0]), mean(&|d| d[1]));
    let moments = [a, b, mean(&|d| (d[0] - a) * (d[1] - b)), mean(&|d| (d[0] - a).powi(2))];
    // NumPy, as above; 0.03 is four standard errors of the widest.
    let expected = [-0.18040602, -0.7308748, 0.15593044, 1.0483705316305907f64.powi(2)];
    near("moments", &moments, &expected, 0.045);
    let again = posterior.draws(&sites(&T[..2]), 1, &mut Stream::new(3, "draws", 0))?;
    assert_eq!(again.values.flatten_all()?.to_vec1::<f64>()?, draws[0], "same seed, same draw");
    Ok(())
}

#[test]
fn the_joint_density_is_that_of_one_value_after_the_other() -> Result<()> {
    let y = [0.3, -0.9, 1.4];
    for of in [Of::Surface, Of::Observation] {
        // Told values have no noise where surfaces are asked.
        let gp = gp(1.7, if of == Of::Surface { 0.0 } else { 0.3 }, 0.25);
        let told = Tensor::from_vec(y.to_vec(), (1, 3, 1), &Device::Cpu)?;
        let joint = gp.condition(&values(&S, &Y))?.joint(&sites(&T), of, &told)?;
        let (mut seen, mut known, mut chain) = (S.to_vec(), Y.to_vec(), 0.0);
        for (at, y) in T.iter().zip(y) {
            let posterior = gp.condition(&values(&seen, &known))?;
            let one = posterior.at(&sites(&[*at]))?.marginals(0, of)?;
            chain += one.link_log_density(0, y);
            seen.push(*at);
            known.push(y);
        }
        let joint = joint.expect("a joint density").to_vec1::<f64>()?;
        near("joint density", &joint, &[chain], 1e-6);
    }
    let twice = gp(1.7, 0.3, 0.0);
    let told = Tensor::from_vec(vec![0.1, 0.2], (1, 2, 1), &Device::Cpu)?;
    let posterior = twice.condition(&values(&S, &Y))?;
    let singular = posterior.joint(&sites(&[T[0], T[0]]), Of::Surface, &told);
    assert!(singular.is_err(), "one place has one surface, and two values have no density");
    Ok(())
}

/// A surface with noise over the square, drawn from a known process.
fn simulate(
    n: usize,
    length_scale: f64,
    sill: f64,
    nugget: f64,
) -> Result<(Vec<[f64; 2]>, Vec<f64>)> {
    let mut rng = Stream::new(11, "simulate", 0);
    let xy: Vec<[f64; 2]> =
        (0..n).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
    let smoothness = Smoothness::ThreeHalves;
    let kernel = Matern { smoothness, length_scale, sill, metric: Metric::Euclidean };
    let mut covariance = Vec::with_capacity(n * n);
    for (i, a) in xy.iter().enumerate() {
        covariance.extend(xy.iter().map(|b| kernel.covariance(a, b)));
        covariance[i * n + i] += nugget;
    }
    let surface = lower(covariance, n)?.colour(&rng.normals(n));
    Ok((xy, surface))
}

#[test]
fn fitting_finds_the_process_that_made_the_values() -> Result<()> {
    let (xy, y) = simulate(300, 0.3, 2.0, 0.1)?;
    let seen = values(&xy, &y.iter().map(|y| y + 5.0).collect::<Vec<_>>());
    let gaussian = likelihood::find("gaussian")?;
    let fitted = ExactGp::fit(&seen, gaussian)?;
    assert!((0.05..0.2).contains(&fitted.nugget), "{fitted:?}");
    // One realisation in a square of 7 length scales: sill to a factor of 2, practical range too.
    let half = fitted.kernel.covariance(&[0.0, 0.0], &[0.3, 0.0]) / fitted.kernel.sill();
    assert!((0.3..0.65).contains(&half), "correlation {half} at 0.3: {fitted:?}");
    assert!((1.0..4.0).contains(&fitted.kernel.sill()), "{fitted:?}");
    // At least as likely as the truth, up to the weak penalties.
    let kernel = Matern {
        smoothness: Smoothness::ThreeHalves,
        length_scale: 0.3,
        sill: 2.0,
        metric: Metric::Euclidean,
    };
    let truth = ExactGp::new(Box::new(kernel), 0.1, fitted.mean, gaussian)?
        .uncertain_mean(fitted.mean_variance)
        .log_marginals(&seen)?[0];
    let fit = fitted.log_marginals(&seen)?[0];
    assert!(fit > truth - 0.5, "{fit} fitted, {truth} true");
    assert!((fitted.log_marginal.expect("fitted") - fit).abs() < 1e-6);
    Ok(())
}

#[test]
fn fitting_knows_no_units_of_distance() -> Result<()> {
    let (xy, y) = simulate(80, 0.4, 1.0, 0.2)?;
    let gaussian = likelihood::find("gaussian")?;
    let near_by = ExactGp::fit(&values(&xy, &y), gaussian)?;
    let in_metres: Vec<[f64; 2]> = xy.iter().map(|p| p.map(|c| 2e5 * c)).collect();
    let far = ExactGp::fit(&values(&in_metres, &y), gaussian)?;
    let [a, ..] = ask(&near_by, &values(&xy, &y), &T)?;
    let [b, ..] = ask(&far, &values(&in_metres, &y), &T.map(|p| p.map(|c| 2e5 * c)))?;
    near("means in metres", &b, &a, 1e-3);
    Ok(())
}

#[test]
fn fitting_counts_finds_the_village_effect() -> Result<()> {
    let (xy, latent) = simulate(200, 0.4, 1.0, 0.5)?;
    let mut rng = Stream::new(2, "counts", 0);
    let tested: Vec<f64> = (0..200).map(|i| [60.0, 150.0][i % 2]).collect();
    let positive: Vec<f64> = latent
        .iter()
        .zip(&tested)
        .map(|(eta, n)| rng.binomial(*n as u64, 1.0 / (1.0 + (1.5 - eta).exp())) as f64)
        .collect();
    let fitted = ExactGp::fit(&counts(&xy, &positive, &tested), likelihood::find("binomial")?)?;
    assert!((0.3..0.85).contains(&fitted.nugget), "{fitted:?}");
    assert!((0.3..3.0).contains(&fitted.kernel.sill()), "{fitted:?}");
    Ok(())
}

/// Outcomes that say nothing about space still give a process, and forecasts that are finite.
#[test]
fn fitting_survives_constant_outcomes() -> Result<()> {
    let (xy, _) = simulate(30, 0.4, 1.0, 0.1)?;
    let all = |value: f64| vec![value; 30];
    for (seen, likelihood) in [
        (values(&xy, &all(-1e6)), "gaussian"),
        (counts(&xy, &all(0.0), &all(50.0)), "binomial"),
        (counts(&xy, &all(1000.0), &all(1000.0)), "binomial"),
    ] {
        let fitted = ExactGp::fit(&seen, likelihood::find(likelihood)?)?;
        let [mean, surface, observation] = ask(&fitted, &seen, &T)?;
        let numbers = mean.iter().chain(&surface).chain(&observation);
        assert!(numbers.into_iter().all(|v| v.is_finite()), "{fitted:?}");
        assert!(surface.iter().all(|sd| *sd > 0.0), "{surface:?}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_conditioned_on_is_refused() -> Result<()> {
    let (gaussian, binomial) = (likelihood::find("gaussian")?, likelihood::find("binomial")?);
    assert!(ExactGp::new(matern(1.0), -0.1, 0.0, gaussian).is_err());
    assert!(ExactGp::new(matern(1.0), 0.1, f64::NAN, gaussian).is_err());
    let no_trials = values(&S, &Y);
    assert!(binomial_gp(1.0, 0.1, 0.0).condition(&no_trials).is_err());
    let too_many = counts(&S[..1], &[3.0], &[2.0]);
    assert!(binomial_gp(1.0, 0.1, 0.0).condition(&too_many).is_err());
    let missing = values(&S[..2], &[0.0, f64::NAN]);
    assert!(gp(1.0, 0.1, 0.0).condition(&missing).is_err());
    assert!(ExactGp::fit(&values(&S[..2], &Y[..2]), gaussian).is_err());
    assert!(ExactGp::fit(&values(&[[0.5, 0.5]; 4], &Y[..4]), gaussian).is_err());
    assert!(ExactGp::fit(&no_trials, binomial).is_err());
    let gp = gp(1.0, 0.1, 0.0);
    let two_rows = Sites::new(Tensor::zeros((2, 3, 2), candle_core::DType::F64, &Device::Cpu)?);
    assert!(gp.condition(&no_trials)?.at(&two_rows).is_err());
    Ok(())
}

/// Two identical sites make a singular covariance: jitter is added and said.
#[test]
fn jitter_is_added_only_where_needed_and_is_reported() -> Result<()> {
    assert_eq!(lower(vec![2.0, 1.0, 1.0, 2.0], 2)?.jitter, 0.0);
    let singular = lower(vec![2.0; 4], 2)?;
    assert!(singular.jitter > 0.0 && singular.jitter <= 1e-9, "{}", singular.jitter);
    assert!(lower(vec![1.0, 2.0, 2.0, 1.0], 2).is_err());
    assert!(lower(vec![f64::NAN; 4], 2).is_err());
    assert!(lower(vec![1.0; 3], 2).is_err());
    let doubled = values(&[S[0], S[0], S[1]], &[0.4, 0.4, -1.1]);
    let [mean, ..] = ask(&gp(1.7, 0.0, 0.0), &doubled, &S[..1])?;
    near("between duplicates", &mean, &[0.4], 1e-6);
    Ok(())
}

#[test]
fn colour_whiten_and_solve_undo_each_other() -> Result<()> {
    let covariance = vec![4.0, 2.0, 0.6, 2.0, 3.0, 0.5, 0.6, 0.5, 1.0];
    let factor = lower(covariance.clone(), 3)?;
    let z = [0.3, -1.2, 2.0];
    let x = factor.colour(&z);
    let mut back = faer::Mat::from_fn(3, 1, |i, _| x[i]);
    factor.whiten(&mut back);
    near("whitened", back.col_as_slice(0), &z, 1e-14);
    let solved = factor.solve(&z);
    let product: Vec<f64> =
        (0..3).map(|i| (0..3).map(|j| covariance[3 * i + j] * solved[j]).sum()).collect();
    near("solved", &product, &z, 1e-14);
    Ok(())
}

/// One village: the mode of its level solves f = (sill + nugget) · slope of the log probability, and
/// the surface moves by the sill's share of it. Found here by bisection.
#[test]
fn one_village_of_any_count_has_its_mode() -> Result<()> {
    for (name, k, n, size) in [
        ("poisson", 9.0, 120.0, f64::INFINITY),
        ("poisson", 0.0, 0.4, f64::INFINITY),
        // Newton's first step from the mean would overflow.
        ("poisson", 90_000.0, 30.0, f64::INFINITY),
        ("negative-binomial", 9.0, 120.0, 1.7),
        ("bernoulli", 1.0, 1.0, f64::INFINITY),
    ] {
        let law = likelihood::find(name)?;
        let (sill, nugget, mean) = (0.8, 0.3, -1.1);
        let gp = ExactGp::new(matern(sill), nugget, mean, law)?.dispersed(size)?;
        let seen = counts(&S[..1], &[k], &[n]);
        let [found, surface, observation] = ask(&gp, &seen, &S[..1])?;
        let slope = |f: f64| {
            let p = 1.0 / (1.0 + (-(mean + f)).exp());
            let mu = n * (mean + f).exp();
            match name {
                "poisson" => (k - mu, mu),
                "bernoulli" => (k - p, p * (1.0 - p)),
                _ => ((k - mu) * size / (size + mu), (k + size) * size * mu / (size + mu).powi(2)),
            }
        };
        let (mut low, mut high) = (-20.0, 20.0);
        for _ in 0..200 {
            let f = 0.5 * (low + high);
            if f < (sill + nugget) * slope(f).0 { low = f } else { high = f }
        }
        let weight = slope(low).0;
        assert!((found[0] - (mean + sill * weight)).abs() < 1e-4, "{name}: {}", found[0]);
        let variance = sill - sill * sill / (sill + nugget + 1.0 / slope(low).1);
        assert!((surface[0] - variance.sqrt()).abs() < 1e-4, "{name}: {}", surface[0]);
        // A new village varies by the nugget, and by a gamma factor of its own, which has mean 1.
        let posterior = gp.condition(&seen)?.at(&sites(&S[..1]))?;
        let [s, o] = [Of::Surface, Of::Observation].map(|of| posterior.marginals(0, of).unwrap());
        let rate = |variance: f64| (found[0] + 0.5 * variance).exp();
        if name == "negative-binomial" {
            assert!((s.mean_sd(0).0 / rate(variance) - 1.0).abs() < 1e-6);
            assert!((o.mean_sd(0).0 / rate(variance + nugget) - 1.0).abs() < 1e-6);
        } else {
            assert!((observation[0] - (variance + nugget).sqrt()).abs() < 1e-4, "{name}");
        }
    }
    let refused = ExactGp::new(matern(1.0), 0.1, 0.0, likelihood::find("beta-binomial")?);
    assert!(refused.unwrap_err().help().unwrap().contains("binomial"));
    Ok(())
}

/// Rates drawn from the process's own law are foretold better by its fit than by their mean, and the
/// offset is one: populations in thousands change the level and nothing else.
#[test]
fn rates_are_fitted_with_their_offset() -> Result<()> {
    let mut rng = Stream::new(4, "rates", 0);
    let xy: Vec<[f64; 2]> =
        (0..60).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
    let level = |p: &[f64; 2]| -5.0 + 1.2 * (3.0 * p[0]).sin() * (2.0 * p[1]).cos();
    let people: Vec<f64> = xy.iter().map(|_| rng.log_uniform(300.0, 5000.0)).collect();
    for name in ["poisson", "negative-binomial"] {
        let law = likelihood::find(name)?;
        let cases: Vec<f64> = xy
            .iter()
            .zip(&people)
            .map(|(p, n)| law.observe(law.village(level(p), 4.0, &mut rng), *n, &mut rng))
            .collect();
        let here: Vec<[f64; 2]> =
            (0..40).map(|_| [rng.uniform(-0.9, 0.9), rng.uniform(-0.9, 0.9)]).collect();
        let answer = |scale: f64| -> Result<Vec<f64>> {
            let scaled: Vec<f64> = people.iter().map(|n| n / scale).collect();
            let seen = counts(&xy, &cases, &scaled);
            let gp = ExactGp::fit(&seen, law)?;
            assert_eq!(gp.dispersion.is_finite(), name == "negative-binomial");
            // The surface is the same in every component.
            let found = ask(&gp, &seen, &here)?[0].clone();
            Ok(found.chunks(found.len() / here.len()).map(|parts| parts[0]).collect())
        };
        let (each, thousands) = (answer(1.0)?, answer(1000.0)?);
        let moved: Vec<f64> = thousands.iter().map(|m| m - 1000f64.ln()).collect();
        assert!(gap(&each[..40], &moved[..40]) < 1e-2, "{name}: the unit moved the surface");
        let off = |found: &dyn Fn(usize) -> f64| -> f64 {
            (0..40).map(|i| (found(i) - level(&here[i])).powi(2)).sum::<f64>() / 40.0
        };
        let flat = (cases.iter().sum::<f64>() / people.iter().sum::<f64>()).ln();
        let (model, intercept) = (off(&|i| each[i]), off(&|_| flat));
        assert!(model < 0.5 * intercept, "{name}: {model} of {intercept}");
    }
    Ok(())
}
