//! Surfaces that change with time: the kernel is one on places and times, what never changes is remembered
//! and the rest forgotten, both Gaussian processes agree, and fitting tells the two apart.

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Link, Observations, Of, Process, Result, Sites, Stream,
    baseline::{ExactGp, NearestGp},
    geo::displacement::{Displacement, Law},
    kernel::{Displaced, Kernel, Matern, Metric, Smoothness, SpaceTime, displaced::mark, matrix},
    likelihood,
    likelihood::Likelihood,
    linalg::lower,
};

fn kernel(smoothness: [Smoothness; 2], time_scale: f64, static_share: f64) -> SpaceTime {
    let metric = Metric::Euclidean;
    let space = Matern { smoothness: smoothness[0], length_scale: 0.5, sill: 1.4, metric };
    let space: std::sync::Arc<dyn Kernel> = std::sync::Arc::new(space);
    SpaceTime { space, smoothness: smoothness[1], time_scale, static_share }
}

const ROUGH: [Smoothness; 2] = [Smoothness::Half, Smoothness::Half];

/// (x, y, t): villages anywhere, in `rounds` rounds that span −1 to 1.
fn visits(n: usize, rounds: usize, seed: u64) -> Vec<Vec<f64>> {
    let mut rng = Stream::new(seed, "visits", 0);
    let when = |i: usize| 2.0 * (i % rounds) as f64 / (rounds - 1) as f64 - 1.0;
    (0..n).map(|i| vec![rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0), when(i)]).collect()
}

fn sites(places: &[Vec<f64>]) -> Sites {
    let n = places.len();
    let part = |from: usize, to: usize| {
        let values: Vec<f64> = places.iter().flat_map(|p| p[from..to].to_vec()).collect();
        Tensor::from_vec(values, (1, n, to - from), &Device::Cpu).unwrap()
    };
    Sites { s: part(0, 2), t: Some(part(2, 3)), x: None }
}

fn seen(places: &[Vec<f64>], y: &[f64], tested: Option<&[f64]>) -> Observations {
    let n = y.len();
    let trials = tested.map(|t| Tensor::from_vec(t.to_vec(), (1, n), &Device::Cpu).unwrap());
    let y = Tensor::from_vec(y.to_vec(), (1, n, 1), &Device::Cpu).unwrap();
    Observations::new(sites(places), y, trials).unwrap()
}

fn of(name: &str) -> &'static dyn Likelihood {
    likelihood::find(name).unwrap()
}

/// Values of a surface with noise, drawn from a kernel.
fn drawn(kernel: &dyn Kernel, nugget: f64, places: &[Vec<f64>], seed: u64) -> Result<Vec<f64>> {
    let n = places.len();
    let mut covariance = Vec::with_capacity(n * n);
    for (i, a) in places.iter().enumerate() {
        covariance.extend(places.iter().map(|b| kernel.covariance(a, b)));
        covariance[i * n + i] += nugget;
    }
    Ok(lower(covariance, n)?.colour(&Stream::new(seed, "values", 0).normals(n)))
}

/// Mean, and sds of surface and observation.
fn ask(process: &dyn Process, context: &Observations, at: &[Vec<f64>]) -> Result<[Vec<f64>; 3]> {
    told(process, context, &sites(at))
}

fn told(process: &dyn Process, context: &Observations, at: &Sites) -> Result<[Vec<f64>; 3]> {
    let posterior = process.condition(context)?.at(at)?;
    let surface = posterior.marginals(0, Of::Surface)?;
    Ok([surface.mean, surface.sd, posterior.marginals(0, Of::Observation)?.sd])
}

fn near(what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    let gap = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(gap < tolerance, "{what}: {gap} apart");
}

/// Symmetric, positive semi-definite and stationary on (x, y, t), also where villages are visited again.
#[test]
fn in_space_and_time_it_is_a_kernel() {
    let mut places = visits(40, 5, 1);
    (0..10).for_each(|i| places[i + 20] = vec![places[i][0], places[i][1], 0.37]);
    for space in [Smoothness::Half, Smoothness::FiveHalves] {
        for time in [Smoothness::Half, Smoothness::ThreeHalves] {
            for share in [0.0, 0.4, 1.0] {
                let kernel = kernel([space, time], 0.6, share);
                let k = matrix(&kernel, &places, &places);
                for (i, a) in places.iter().enumerate() {
                    assert!((k[(i, i)] - kernel.sill()).abs() < 1e-13);
                    for (j, b) in places.iter().enumerate() {
                        assert!((k[(i, j)] - k[(j, i)]).abs() < 1e-14);
                        let later = |p: &[f64]| vec![p[0], p[1], p[2] + 32.0];
                        let moved = kernel.covariance(&later(a), &later(b));
                        assert!((moved - k[(i, j)]).abs() < 1e-12, "stationary in time");
                        let alone = kernel.space.covariance(&a[..2], &b[..2]);
                        match share {
                            1.0 => assert_eq!(k[(i, j)], alone, "nothing changes"),
                            _ => assert!(k[(i, j)] <= alone + 1e-14),
                        }
                    }
                }
                let values = k.self_adjoint_eigenvalues(faer::Side::Lower).unwrap();
                let least = values.into_iter().fold(f64::INFINITY, f64::min);
                assert!(
                    least > -1e-12 * kernel.sill() * 40.0,
                    "{space:?} {time:?} {share}: {least}"
                );
            }
        }
    }
}

/// One village, once visited: closed forms for any later time.
#[test]
fn what_never_changes_is_remembered_and_the_rest_forgotten() -> Result<()> {
    let (sill, nugget) = (1.4, 0.2);
    let known = kernel(ROUGH, 0.5, 0.3);
    let context = seen(&[vec![0.2, 0.1, -1.0]], &[2.0], None);
    for (later, left) in [(0.0, 1.0), (0.5, 0.3 + 0.7 * (-1.0f64).exp()), (1e6, 0.3)] {
        let at = [vec![0.2, 0.1, -1.0 + later]];
        let gain = left * sill / (sill + nugget);
        let expected = [gain * 2.0, (sill - gain * left * sill).sqrt()];
        let exact = ExactGp::new(Box::new(known.clone()), nugget, 0.0, of("gaussian"))?;
        let [mean, sd, _] = ask(&exact, &context, &at)?;
        near("mean", &mean, &expected[..1], 1e-12);
        near("sd", &sd, &expected[1..], 1e-12);
    }
    Ok(())
}

/// Time stretched or not, with every site a neighbour both processes are one; where sites were displaced by
/// one of two laws too.
#[test]
fn with_every_visit_a_neighbour_it_is_the_exact_process() -> Result<()> {
    let (places, at) = (visits(61, 4, 3), visits(23, 7, 4));
    // Marks stand behind the coordinates: of targets, that nothing is known to move them.
    let moved = Displacement {
        laws: vec![Law::up_to(0.2), Law::up_to(0.05)],
        of: (0..61).map(|i| i % 2).collect(),
    };
    let none = Tensor::zeros((1, 23, 1), DType::F64, &Device::Cpu)?;
    let targets = sites(&at);
    let unmoved = Sites { s: Tensor::cat(&[&targets.s, &none], 2)?, ..targets.clone() };
    let known = kernel([Smoothness::ThreeHalves, Smoothness::Half], 0.8, 0.35);
    let latent = drawn(&known, 0.3, &places, 5)?;
    let tested: Vec<f64> = (0..61).map(|i| [1.0, 5.0, 80.0][i % 3]).collect();
    let mut rng = Stream::new(2, "counts", 0);
    let count = |(eta, n): (&f64, &f64)| rng.binomial(*n as u64, Link::Logit.outcome(*eta)) as f64;
    let counts: Vec<f64> = latent.iter().zip(&tested).map(count).collect();
    for (context, likelihood, close) in [
        (seen(&places, &latent, None), of("gaussian"), 1e-8),
        (seen(&places, &counts, Some(&tested)), of("binomial"), 1e-6),
    ] {
        for (stretch, displaced) in [(1.0, false), (0.05, false), (3.0, false), (0.3, true)] {
            let (mut context, mut known) = (context.clone(), known.clone());
            let targets = if displaced { &unmoved } else { &targets };
            if displaced {
                context.sites = mark(&context.sites, &moved)?;
                let space = known.space.matern().expect("made of one");
                known.space = std::sync::Arc::new(Displaced::new(space, &moved.laws)?);
            }
            let exact = ExactGp::new(Box::new(known.clone()), 0.3, 0.25, likelihood)?;
            let exact = exact.uncertain_mean(4.0);
            let slow = SpaceTime { time_scale: 0.8 * stretch, ..known };
            let nearest = NearestGp::new(Box::new(slow), 0.3, 0.25, likelihood)?;
            let nearest = nearest.uncertain_mean(4.0).neighbours(60, 61).stretched(stretch)?;
            let (a, b) = (nearest.log_marginals(&context)?, exact.log_marginals(&context)?);
            // Newton stops at 1e-5 of the latent where only the density is asked for.
            near("log marginal", &a, &b, if likelihood.counts() { 1e-5 } else { 1e-8 });
            let (a, b) = (told(&nearest, &context, targets)?, told(&exact, &context, targets)?);
            (0..3).for_each(|i| near("prediction", &a[i], &b[i], close));
        }
    }
    Ok(())
}

/// A surface that stays and one that is another in every round are told apart, by both processes, and
/// nothing simulated beats the likelihood of what was fitted.
#[test]
fn fitting_tells_what_stays_from_what_changes() -> Result<()> {
    let places = visits(150, 5, 6);
    let mut shares = Vec::new();
    for (share, scale) in [(0.95, 1.0), (0.02, 0.1)] {
        let truth = kernel(ROUGH, scale, share);
        let context = seen(&places, &drawn(&truth, 0.1, &places, 7)?, None);
        let exact = ExactGp::fit(&context, of("gaussian"))?;
        let nearest = NearestGp::fit(&context, of("gaussian"))?;
        let known = ExactGp::new(Box::new(truth), 0.1, 0.0, of("gaussian"))?;
        let [fitted, true_one] =
            [exact.log_marginal.unwrap(), known.uncertain_mean(100.0).log_marginals(&context)?[0]];
        // The penalties may cost a little of it.
        assert!(fitted > true_one - 3.0, "{fitted} fitted, {true_one} of the truth");
        let (a, b) = (exact.kernel.change().unwrap(), nearest.kernel.change().unwrap());
        // What is left of the correlation from one round to the next.
        let next = |k: &dyn Kernel, step: f64| {
            k.covariance(&[0.0, 0.0, 0.0], &[0.0, 0.0, step]) / k.sill()
        };
        let step = 0.5;
        shares.push([next(&*exact.kernel, step), next(&*nearest.kernel, step * nearest.stretch)]);
        assert!(a.time_scale > 0.0 && b.time_scale > 0.0);
    }
    let [stays, changes] = &shares[..] else { unreachable!("two surfaces") };
    assert!(stays.iter().all(|c| *c > 0.8), "a surface that stays: {stays:?}");
    assert!(changes.iter().all(|c| *c < 0.4), "a surface that changes: {changes:?}");
    Ok(())
}

/// A process that knows times wants them, and one that does not passes them over.
#[test]
fn times_that_are_missing_are_told() -> Result<()> {
    let places = visits(10, 2, 8);
    let context = seen(&places, &[0.5; 10], None);
    let without = Sites { t: None, ..context.sites.clone() };
    let process = ExactGp::new(Box::new(kernel(ROUGH, 1.0, 0.5)), 0.1, 0.0, of("gaussian"))?;
    let error = process.condition(&context)?.at(&without).unwrap_err().to_string();
    assert!(error.contains("times of sites and of the process"), "{error}");
    let plain = kernel(ROUGH, 1.0, 0.5).space;
    let plain = ExactGp::new(Box::new(plain), 0.1, 0.0, of("gaussian"))?;
    let bare = Observations { sites: without.clone(), ..context.clone() };
    let (a, b) = (plain.condition(&context)?, plain.condition(&bare)?);
    let mean = |of: &Sites, p: &dyn isopleth::Posterior| p.at(of)?.marginals(0, Of::Surface);
    assert_eq!(mean(&context.sites, &*a)?.mean, mean(&without, &*b)?.mean);
    Ok(())
}
