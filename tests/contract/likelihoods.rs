//! Laws over everything in LIKELIHOODS, and numbers computed by SciPy 1.17.1 (`nbinom`, `poisson`).

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Link, Marginals, Observations, Of, Sites, Stream,
    likelihood::{self, Kind, LIKELIHOODS, Likelihood},
    score::Counts,
    task::Tasks,
};

fn named(name: &str) -> &'static dyn Likelihood {
    likelihood::find(name).expect("registered")
}

/// A dispersion that shows, for likelihoods that have one.
fn dispersion(likelihood: &dyn Likelihood) -> f64 {
    if likelihood.dispersion().is_some() { 2.5 } else { f64::INFINITY }
}

/// Trials that a likelihood of this kind can have.
fn trials(likelihood: &dyn Likelihood) -> f64 {
    match likelihood.kind() {
        Kind::Single => 1.0,
        Kind::Tested => 17.0,
        _ => 17.3,
    }
}

/// What Laplace's approximation reads is a law of mean `trials · outcome`, and its slopes are right.
#[test]
fn probabilities_add_up_and_slopes_are_slopes() {
    let mut asked = 0;
    for likelihood in LIKELIHOODS {
        let (name, r, n) = (likelihood.name(), dispersion(*likelihood), trials(*likelihood));
        for eta in [-3.1, -0.4, 0.9] {
            let law = |k: f64, eta: f64| likelihood.log_probability(k, n, eta, r);
            let Some(_) = law(0.0, eta) else { continue };
            asked += 1;
            let most = if likelihood.kind() == Kind::Exposure { 4000 } else { n as usize };
            let p: Vec<f64> = (0..=most).map(|k| law(k as f64, eta).unwrap()[0].exp()).collect();
            assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{name} at {eta}");
            let mean: f64 = p.iter().enumerate().map(|(k, p)| k as f64 * p).sum();
            let truth = n * likelihood.link().outcome(eta);
            assert!((mean - truth).abs() < 1e-8 * (1.0 + truth), "{name}: {mean} of {truth}");
            for k in [0.0, 1.0, n.floor()] {
                let [_, slope, curve] = law(k, eta).unwrap();
                let at = |h: f64| law(k, eta + h).unwrap();
                let numeric = (at(1e-5)[0] - at(-1e-5)[0]) / 2e-5;
                assert!((slope - numeric).abs() < 1e-7 * (1.0 + slope.abs()), "{name}: {numeric}");
                let numeric = (at(1e-5)[1] - at(-1e-5)[1]) / 2e-5;
                assert!((curve - numeric).abs() < 1e-7 * (1.0 + curve.abs()), "{name}: {numeric}");
                assert!(curve <= 0.0, "{name} is not log-concave");
            }
        }
    }
    assert_eq!(asked, 12, "binomial, Bernoulli, Poisson and negative binomial");
}

/// scipy.stats.nbinom.logpmf(k, r, r / (r + mu)).
#[test]
fn negative_binomial_counts_have_known_probabilities() {
    let law = named("negative-binomial");
    for (r, mean, k, golden) in [
        (0.5, 2.0, 0.0, -0.8047189562170501),
        (0.5, 2.0, 7.0, -3.9298858826478997),
        (2.5, 40.0, 25.0, -3.981946170128341),
        (30.0, 40.0, 60.0, -5.22826552870211),
    ] {
        let found = law.log_probability(k, 100.0, (mean / 100.0f64).ln(), r).unwrap()[0];
        assert!((found - golden).abs() < 1e-10, "{found} of {golden}");
        // The same count through its village: Poisson averaged over a mixture for the gamma factor.
        let parts = law.scatter(r);
        let of = |f: fn(&(f64, f64, f64)) -> f64| parts.iter().map(f).collect::<Vec<f64>>();
        let village = Marginals {
            link: Link::Log,
            of: Of::Observation,
            components: parts.len(),
            weight: of(|p| p.0),
            mean: of(|p| p.1),
            sd: of(|p| p.2),
        };
        let (factor, sd) = village.mean_sd(0);
        assert!((factor - 1.0).abs() < 1e-9, "size {r}: the factor's mean is {factor}");
        assert!((sd * sd * r - 1.0).abs() < 1e-6, "size {r}: the factor's variance is {}", sd * sd);
        let counts = Counts::new(&village, 0, mean).unwrap();
        let found = counts.cdf(k) - if k > 0.0 { counts.cdf(k - 1.0) } else { 0.0 };
        let off = found.ln() - golden;
        assert!(off.abs() < 3e-3, "size {r}: {k} of {mean} is off by {off} through the village");
    }
}

/// What is simulated has the mean and variance that textbooks give.
#[test]
fn simulated_counts_have_their_moments() {
    let mut rng = Stream::new(1, "observe", 0);
    let draws = 60_000;
    for likelihood in LIKELIHOODS.iter().filter(|l| l.counts()) {
        let (name, r, n) = (likelihood.name(), dispersion(*likelihood), trials(*likelihood));
        for eta in [-2.0, 0.3] {
            let y: Vec<f64> = (0..draws)
                .map(|_| likelihood.observe(likelihood.village(eta, r, &mut rng), n, &mut rng))
                .collect();
            assert!(y.iter().all(|y| y.fract() == 0.0 && *y >= 0.0), "{name} counts no fractions");
            let mean = y.iter().sum::<f64>() / draws as f64;
            let variance = y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / draws as f64;
            let p = likelihood.link().outcome(eta);
            let truth = match name {
                "poisson" => n * p,
                "negative-binomial" => n * p + (n * p).powi(2) / r,
                // Skellam (1948): precision φ inflates by 1 + (n − 1)/(φ + 1).
                "beta-binomial" => n * p * (1.0 - p) * (1.0 + (n - 1.0) / (r + 1.0)),
                _ => n * p * (1.0 - p),
            };
            let error = (truth / draws as f64).sqrt();
            assert!((mean - n * p).abs() < 5.0 * error, "{name}: mean {mean} of {}", n * p);
            assert!(
                (variance / truth - 1.0).abs() < 0.06,
                "{name}: variance {variance} of {truth}"
            );
        }
    }
    let value = named("log-gaussian").observe(0.7, 0.0, &mut rng);
    assert!((value.ln() - 0.7).abs() < 1e-12);
    // Small shapes: neither 0 / 0 nor infinite.
    let wild = (0..2000).map(|_| named("beta-binomial").village(-9.0, 1e-3, &mut rng));
    assert!(wild.into_iter().all(f64::is_finite));
}

/// The unit in which a population is written changes no task: rates are relative to the context's.
#[test]
fn the_unit_of_exposure_does_not_matter() {
    let batch = |scale: f64| {
        let recipe = format!(
            "design = {{ targets = 5 }}\ntask = {{ likelihood = 'poisson' }}\n\
             trials = {{ base = {}, spread = 0.4 }}\n\
             prior = {{ kind = 'gp', mean = {} }}",
            50.0 * scale,
            -1.0 - scale.ln()
        );
        Tasks::new(&recipe.parse().unwrap()).unwrap().batch(3, 0, 2, 20).unwrap()
    };
    let host = |x: &Tensor| -> Vec<f64> {
        x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
    };
    let (a, b) = (batch(1.0), batch(1000.0));
    for (a, b) in [
        (&a.task.context.y, &b.task.context.y),
        (a.task.context.trials.as_ref().unwrap(), b.task.context.trials.as_ref().unwrap()),
        (&a.task.surface, &b.task.surface),
    ] {
        for (a, b) in host(a).iter().zip(host(b)) {
            assert!((a - b).abs() < 1e-4 * (1.0 + a.abs()), "{a} and {b}");
        }
    }
    let [seen, expected] = [&a.task.context.y, a.task.context.trials.as_ref().unwrap()].map(host);
    let (seen, expected): (f64, f64) = (seen[..20].iter().sum(), expected[..20].iter().sum());
    assert!((seen + 0.5 - expected).abs() < 1e-3, "{seen} seen, {expected} expected");
}

/// Recipes of counts and values draw what they drew when binomial sampling stood in the task.
#[test]
fn recipes_keep_their_streams() {
    let first = |file: &str| {
        let text = std::fs::read_to_string(format!("{}/models/{file}", env!("CARGO_MANIFEST_DIR")));
        let tasks = Tasks::new(&text.unwrap().parse().unwrap()).unwrap();
        tasks.draws(6, 1, &mut Stream::new(1, "sample", 0)).unwrap().remove(0)
    };
    let counts = first("prevalence.toml");
    assert_eq!(counts.y[..8], [11.0, 14.0, 18.0, 10.0, 11.0, 7.0, 19.0, 15.0]);
    assert_eq!(counts.trials.unwrap()[..8], [18.0, 20.0, 22.0, 16.0, 16.0, 17.0, 27.0, 22.0]);
    let values = first("continuous.toml").y;
    for (found, golden) in values.iter().zip([-0.356221379453421, -0.9592082017291691]) {
        assert!((found - golden).abs() < 1e-9, "{found} of {golden}");
    }
}

/// Whatever can be written down has finite features, and missing trials are asked for by name.
#[test]
fn features_are_finite() {
    for likelihood in LIKELIHOODS {
        let name = likelihood.name();
        let y: Vec<f32> = if likelihood.counts() { vec![0.0, 1.0] } else { vec![-4.0, 2.0] };
        let tensor = |x: Vec<f32>, shape: &[usize]| Tensor::from_vec(x, shape, &Device::Cpu);
        let sites = || Sites::plane(&[[0.0, 0.1], [0.3, 0.2]], &Device::Cpu).unwrap();
        let y = tensor(y, &[1, 2, 1]).unwrap();
        let trials = likelihood.counts().then(|| tensor(vec![1.0, 1.0], &[1, 2]).unwrap());
        let seen = Observations::new(sites(), y.clone(), trials).unwrap();
        let features = likelihood.features(&seen).unwrap();
        assert_eq!(features.dims(), [1, 2, likelihood.width()], "{name}");
        let found: Vec<f32> = features.flatten_all().unwrap().to_vec1().unwrap();
        assert!(found.iter().all(|v| v.is_finite()), "{name}: {found:?}");
        assert!(found[0] != found[likelihood.width()], "{name} does not tell outcomes apart");
        if matches!(likelihood.kind(), Kind::Tested | Kind::Exposure) {
            let none = Observations::new(sites(), y, None).unwrap();
            let error = likelihood.features(&none).unwrap_err();
            assert!(error.help().unwrap().contains("COLUMN"), "{name}: {error}");
        }
    }
}
