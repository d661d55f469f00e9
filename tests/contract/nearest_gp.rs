//! The nearest-neighbour process equals the exact one where it sees every site, closed forms on a
//! line where it does not, and stays sane where data are not.

use candle_core::{Device, Tensor};
use isopleth::{
    Link, Observations, Of, Process, Result, Sites, Stream,
    baseline::{ExactGp, NearestGp},
    kernel::{Kernel, Local, Matern, Metric, Smoothness, Varying},
    likelihood,
    likelihood::Likelihood,
    linalg::lower,
    task::continent::Continent,
};

/// Places in any number of dimensions, in f64.
fn sites(places: &[Vec<f64>], dim: usize) -> Sites {
    let s = Tensor::from_vec(places.concat(), (1, places.len(), dim), &Device::Cpu);
    Sites::new(s.expect("n places"))
}

fn seen(places: &[Vec<f64>], y: &[f64], tested: Option<&[f64]>) -> Observations {
    let dim = places.first().map_or(2, Vec::len);
    let shape = (1, y.len());
    let trials = tested.map(|t| Tensor::from_vec(t.to_vec(), shape, &Device::Cpu).expect("n"));
    let y = Tensor::from_vec(y.to_vec(), (1, y.len(), 1), &Device::Cpu).expect("n values");
    Observations::new(sites(places, dim), y, trials).expect("as many values as sites")
}

fn matern(smoothness: Smoothness, length_scale: f64, metric: Metric) -> Matern {
    Matern { smoothness, length_scale, sill: 1.7, metric }
}

fn gaussian() -> &'static dyn Likelihood {
    likelihood::find("gaussian").expect("registered")
}

fn binomial() -> &'static dyn Likelihood {
    likelihood::find("binomial").expect("registered")
}

fn poisson() -> &'static dyn Likelihood {
    likelihood::find("poisson").expect("registered")
}

/// Mean, and sds of surface and observation.
fn ask(process: &dyn Process, context: &Observations, at: &[Vec<f64>]) -> Result<[Vec<f64>; 3]> {
    let posterior = process.condition(context)?.at(&sites(at, at[0].len()))?;
    let surface = posterior.marginals(0, Of::Surface)?;
    Ok([surface.mean, surface.sd, posterior.marginals(0, Of::Observation)?.sd])
}

fn gap(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn near(what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert!(gap(a, b) < tolerance, "{what}: {} apart", gap(a, b));
}

fn scattered(n: usize, name: &str) -> Vec<Vec<f64>> {
    let mut rng = Stream::new(7, name, 0);
    (0..n).map(|_| vec![rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect()
}

/// Values of a surface with noise, drawn from a kernel.
fn drawn(kernel: &dyn Kernel, nugget: f64, places: &[Vec<f64>]) -> Result<Vec<f64>> {
    let n = places.len();
    let mut covariance = Vec::with_capacity(n * n);
    for (i, a) in places.iter().enumerate() {
        covariance.extend(places.iter().map(|b| kernel.covariance(a, b)));
        covariance[i * n + i] += nugget;
    }
    Ok(lower(covariance, n)?.colour(&Stream::new(5, "values", 0).normals(n)))
}

fn counted(latent: &[f64], tested: &[f64]) -> Vec<f64> {
    let mut rng = Stream::new(2, "counts", 0);
    let draw = |(eta, n): (&f64, &f64)| rng.binomial(*n as u64, Link::Logit.outcome(*eta)) as f64;
    latent.iter().zip(tested).map(draw).collect()
}

/// Both processes with the same numbers.
fn both(
    kernel: Matern,
    nugget: f64,
    mean: f64,
    doubt: f64,
    likelihood: &'static dyn Likelihood,
) -> Result<(ExactGp, NearestGp)> {
    let exact = ExactGp::new(Box::new(kernel), nugget, mean, likelihood)?.uncertain_mean(doubt);
    let nearest = NearestGp::new(Box::new(kernel), nugget, mean, likelihood)?;
    Ok((exact, nearest.uncertain_mean(doubt)))
}

#[test]
fn with_every_site_a_neighbour_it_is_the_exact_process() -> Result<()> {
    let mut places = scattered(61, "sites");
    places[60] = places[4].clone(); // two observations at one place
    let at = scattered(23, "targets");
    let metrics = [Metric::Euclidean, Metric::Anisotropic { angle: 0.5, ratio: 3.0 }];
    for (smoothness, metric) in
        Smoothness::all()[..3].iter().zip([metrics[0], metrics[1], metrics[0]])
    {
        let kernel = matern(*smoothness, 0.4, metric);
        let latent = drawn(&kernel, 0.3, &places)?;
        let tested: Vec<f64> = (0..61).map(|i| [1.0, 5.0, 80.0][i % 3]).collect();
        let values = seen(&places, &latent, None);
        let counts = seen(&places, &counted(&latent, &tested), Some(&tested));
        for doubt in [0.0, 25.0] {
            for (context, likelihood) in
                [(&values, gaussian()), (&counts, binomial()), (&counts, poisson())]
            {
                let (exact, nearest) = both(kernel, 0.3, 0.25, doubt, likelihood)?;
                let nearest = nearest.neighbours(60, 61);
                // Newton stops at 1e-5 of the latent where only the density is asked for.
                let close = if likelihood.counts() { 1e-5 } else { 1e-8 };
                near(
                    "log marginal",
                    &nearest.log_marginals(context)?,
                    &exact.log_marginals(context)?,
                    close,
                );
                let (a, b) = (ask(&nearest, context, &at)?, ask(&exact, context, &at)?);
                for (what, i) in [("mean", 0), ("surface", 1), ("observation", 2)] {
                    // Newton stops at 1e-9 of the latent here, at 1e-9 of the objective there.
                    let close = if likelihood.counts() { 1e-6 } else { 1e-8 };
                    near(what, &a[i], &b[i], close);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn more_neighbours_come_closer_to_the_exact_process() -> Result<()> {
    let places = scattered(400, "sites");
    let at = scattered(100, "targets");
    let kernel = matern(Smoothness::ThreeHalves, 0.3, Metric::Euclidean);
    let context = seen(&places, &drawn(&kernel, 0.1, &places)?, None);
    let (exact, nearest) = both(kernel, 0.1, 0.0, 10.0, gaussian())?;
    let truth = ask(&exact, &context, &at)?;
    let log = exact.log_marginals(&context)?;
    let (mut nearest, mut gaps) = (nearest, Vec::new());
    for k in [5, 15, 45, 135] {
        nearest = nearest.neighbours(k, k);
        let here = ask(&nearest, &context, &at)?;
        gaps.push([
            gap(&nearest.log_marginals(&context)?, &log),
            gap(&here[0], &truth[0]),
            gap(&here[1], &truth[1]),
        ]);
    }
    for (i, last) in [0.05, 0.01, 0.001].iter().enumerate() {
        assert!(gaps[0][i] > 3.0 * gaps[2][i] && gaps[3][i] < *last, "{gaps:?}");
    }
    Ok(())
}

/// A line of uneven steps, and an Ornstein-Uhlenbeck process of variance 1.7 on it.
fn line(n: usize, length_scale: f64) -> (Vec<Vec<f64>>, Vec<f64>) {
    let mut rng = Stream::new(3, "line", 0);
    let (mut at, mut last) = (0.0, 1.7f64.sqrt() * rng.normal());
    let (mut places, mut values) = (vec![vec![at]], vec![last]);
    for _ in 1..n {
        let step = rng.uniform(0.5, 1.5);
        let rho = (-step / length_scale).exp();
        at += step;
        last = rho * last + (1.7 * (1.0 - rho * rho)).sqrt() * rng.normal();
        places.push(vec![at]);
        values.push(last);
    }
    (places, values)
}

/// On a line the exponential is Markov: each value hangs on the one before, and a place between two
/// sites on these two (a bridge). Nothing of that is known to the code, and 4,000 sites have 8
/// neighbours each.
#[test]
fn on_a_line_it_is_the_autoregression() -> Result<()> {
    let (places, values) = line(4000, 20.0);
    let kernel = matern(Smoothness::Half, 20.0, Metric::Euclidean);
    let process = NearestGp::new(Box::new(kernel), 0.0, 0.0, gaussian())?.neighbours(8, 8);
    let context = seen(&places, &values, None);
    let normal = |x: f64, variance: f64| {
        -0.5 * (x * x / variance + variance.ln() + std::f64::consts::TAU.ln())
    };
    let mut log = normal(values[0], 1.7);
    for i in 1..4000 {
        let rho = (-(places[i][0] - places[i - 1][0]) / 20.0).exp();
        log += normal(values[i] - rho * values[i - 1], 1.7 * (1.0 - rho * rho));
    }
    near("log density of 4,000", &process.log_marginals(&context)?, &[log], 1e-6);
    let between: Vec<usize> = (0..3999).step_by(97).collect();
    let (mut at, mut means, mut sds) = (Vec::new(), Vec::new(), Vec::new());
    for i in between {
        let (left, right) = (places[i][0], places[i + 1][0]);
        let place = left + 0.3 * (right - left);
        let rho = |d: f64| (-d / 20.0).exp();
        let (a, b, c) = (rho(place - left), rho(right - place), rho(right - left));
        let (wa, wb) = ((a - b * c) / (1.0 - c * c), (b - a * c) / (1.0 - c * c));
        at.push(vec![place]);
        means.push(wa * values[i] + wb * values[i + 1]);
        sds.push((1.7 * (1.0 - wa * a - wb * b)).sqrt());
    }
    let [mean, sd, _] = ask(&process, &context, &at)?;
    near("bridge", &mean, &means, 1e-9);
    near("sd of the bridge", &sd, &sds, 1e-9);
    Ok(())
}

/// 8,000 values: more than the first search looks at.
#[test]
fn fitting_finds_the_process_that_made_many_values() -> Result<()> {
    let (places, values) = line(8000, 20.0);
    let mut rng = Stream::new(4, "noise", 0);
    let noisy: Vec<f64> = values.iter().map(|v| 5.0 + v + 0.2f64.sqrt() * rng.normal()).collect();
    let fitted = NearestGp::fit(&seen(&places, &noisy, None), gaussian())?;
    assert!((0.17..0.23).contains(&fitted.nugget), "{fitted:?}");
    assert!((1.2..2.3).contains(&fitted.kernel.sill()), "{fitted:?}");
    let half = fitted.kernel.covariance(&[0.0], &[20.0]) / fitted.kernel.sill();
    assert!((half - (-1f64).exp()).abs() < 0.08, "correlation {half} at 20: {fitted:?}");
    assert!(format!("{:?}", fitted.kernel).contains("Half"), "{fitted:?}");
    Ok(())
}

/// 1,200 counts: more than the first search looks at.
#[test]
fn fitting_finds_the_process_that_made_many_counts() -> Result<()> {
    let (places, surface) = line(1200, 20.0);
    let mut rng = Stream::new(4, "villages", 0);
    let latent: Vec<f64> = surface.iter().map(|v| v - 1.0 + 0.5f64.sqrt() * rng.normal()).collect();
    let tested = vec![40.0; 1200];
    let context = seen(&places, &counted(&latent, &tested), Some(&tested));
    let fitted = NearestGp::fit(&context, binomial())?;
    assert!((0.35..0.65).contains(&fitted.nugget), "{fitted:?}");
    assert!((1.1..2.6).contains(&fitted.kernel.sill()), "{fitted:?}");
    let [mean, sd, _] = ask(&fitted, &context, &places)?;
    let inside = (0..1200).filter(|i| (surface[*i] - 1.0 - mean[*i]).abs() < 1.96 * sd[*i]);
    let held = inside.count() as f64 / 1200.0;
    assert!((0.91..0.985).contains(&held), "{held} of the surface inside 95 % intervals");
    Ok(())
}

#[test]
fn it_fits_as_the_exact_process_does() -> Result<()> {
    let places = scattered(150, "sites");
    let kernel = matern(Smoothness::ThreeHalves, 0.3, Metric::Euclidean);
    let latent = drawn(&kernel, 0.2, &places)?;
    let tested = vec![60.0; 150];
    let at = scattered(50, "targets");
    for (context, likelihood) in [
        (seen(&places, &latent, None), gaussian()),
        (seen(&places, &counted(&latent, &tested), Some(&tested)), binomial()),
    ] {
        let exact = ExactGp::fit(&context, likelihood)?;
        let nearest = NearestGp::fit(&context, likelihood)?;
        let (a, b) = (ask(&exact, &context, &at)?, ask(&nearest, &context, &at)?);
        near("mean", &a[0], &b[0], 0.1);
        near("sd", &a[1], &b[1], 0.05);
        let [log_a, log_b] = [exact.log_marginal, nearest.log_marginal].map(|l| l.expect("fitted"));
        assert!((log_a - log_b).abs() < 1.0, "{log_a} {log_b}");
    }
    Ok(())
}

#[test]
fn the_order_of_the_sites_is_irrelevant() -> Result<()> {
    let mut places = scattered(300, "sites");
    for twin in 0..9 {
        places[290 + twin] = places[twin % 3].clone();
    }
    let kernel = matern(Smoothness::Half, 0.3, Metric::Euclidean);
    let latent = drawn(&kernel, 0.2, &places)?;
    let tested: Vec<f64> = (0..300).map(|i| (1 + i % 30) as f64).collect();
    let positive = counted(&latent, &tested);
    let order = Stream::new(1, "order", 0).permutation(300);
    let turned = |x: &[f64]| order.iter().map(|i| x[*i]).collect::<Vec<f64>>();
    let moved: Vec<Vec<f64>> = order.iter().map(|i| places[*i].clone()).collect();
    let at = scattered(40, "targets");
    for (a, b, likelihood) in [
        (seen(&places, &latent, None), seen(&moved, &turned(&latent), None), gaussian()),
        (
            seen(&places, &positive, Some(&tested)),
            seen(&moved, &turned(&positive), Some(&turned(&tested))),
            binomial(),
        ),
    ] {
        let (_, process) = both(kernel, 0.2, 0.1, 4.0, likelihood)?;
        assert_eq!(process.log_marginals(&a)?, process.log_marginals(&b)?);
        assert_eq!(ask(&process, &a, &at)?, ask(&process, &b, &at)?, "to the last digit");
    }
    Ok(())
}

/// Laws of kriging that hold whatever the neighbours are.
#[test]
fn the_laws_of_kriging_hold() -> Result<()> {
    let places = scattered(200, "sites");
    let kernel = matern(Smoothness::ThreeHalves, 0.3, Metric::Euclidean);
    let y = drawn(&kernel, 0.3, &places)?;
    let at = scattered(30, "targets");
    let (_, process) = both(kernel, 0.3, 0.25, 0.0, gaussian())?;
    let [mean, surface, observation] = ask(&process, &seen(&places, &y, None), &at)?;
    let others: Vec<f64> = y.iter().map(|y| 9.0 - y * y).collect();
    let [_, same, _] = ask(&process, &seen(&places, &others, None), &at)?;
    assert_eq!(surface, same, "the variance ignores the values");
    let sum: Vec<f64> = surface.iter().map(|s| (s * s + 0.3).sqrt()).collect();
    near("an observation is the surface plus the nugget", &observation, &sum, 1e-12);
    let bigger = Matern { sill: 16.0 * kernel.sill, ..kernel };
    let (_, bigger) = both(bigger, 16.0 * 0.3, 0.25, 0.0, gaussian())?;
    let [alike, four, _] = ask(&bigger, &seen(&places, &y, None), &at)?;
    near("scaling leaves the mean", &alike, &mean, 1e-12);
    near("and scales the sd", &four, &surface.iter().map(|s| 4.0 * s).collect::<Vec<_>>(), 1e-12);
    let [far_mean, far, _] = ask(&process, &seen(&places, &y, None), &[vec![1e4, -1e4]])?;
    near("far away is the prior", &[far_mean[0], far[0]], &[0.25, 1.7f64.sqrt()], 1e-12);
    let (_, ordinary) = both(kernel, 0.3, 0.0, 1e6, gaussian())?;
    let [a, wide, _] = ask(&ordinary, &seen(&places, &y, None), &at)?;
    let risen: Vec<f64> = y.iter().map(|y| y + 40.0).collect();
    let [b, same, _] = ask(&ordinary, &seen(&places, &risen, None), &at)?;
    near("a constant moves the mean", &b, &a.iter().map(|a| a + 40.0).collect::<Vec<_>>(), 1e-3);
    assert_eq!(wide, same);
    assert!(surface.iter().zip(&wide).all(|(s, o)| s <= o), "ordinary is never surer than simple");
    let (_, noiseless) = both(kernel, 0.0, 0.25, 0.0, gaussian())?;
    let [mean, sd, _] = ask(&noiseless, &seen(&places, &y, None), &places)?;
    near("data are reproduced without a nugget", &mean, &y, 1e-9);
    assert!(sd.iter().all(|sd| *sd < 1e-5), "{sd:?}");
    Ok(())
}

#[test]
fn tiles_never_change_the_answer_and_there_are_no_steps() -> Result<()> {
    let places = scattered(2000, "sites");
    let mut rng = Stream::new(8, "values", 0);
    let y: Vec<f64> =
        places.iter().map(|p| (5.0 * p[0]).sin() + p[1] + 0.3 * rng.normal()).collect();
    let context = seen(&places, &y, None);
    let kernel = matern(Smoothness::ThreeHalves, 0.3, Metric::Euclidean);
    let (_, process) = both(kernel, 0.09, 0.0, 4.0, gaussian())?;
    let at: Vec<Vec<f64>> = (0..1301).map(|i| vec![-0.9 + 0.0014 * f64::from(i), 0.123]).collect();
    let whole = ask(&process, &context, &at)?;
    for range in [0..1, 511..514, 1000..1301] {
        let part = ask(&process, &context, &at[range.clone()])?;
        for (part, whole) in part.iter().zip(&whole) {
            assert_eq!(*part, whole[range.clone()], "a tile is bit for bit its part of the map");
        }
    }
    // Where one neighbour replaces another the map steps, by less than a twentieth of its sd.
    let curved = |i: usize| whole[0][i + 1] - 2.0 * whole[0][i] + whole[0][i - 1];
    let step = (1..1300).map(|i| curved(i).abs()).fold(0.0, f64::max);
    let sd = whole[1].iter().sum::<f64>() / 1301.0;
    assert!(step < 0.05 * sd, "a step of {step}, sd {sd}");
    Ok(())
}

#[test]
fn odd_contexts_get_finite_answers_or_a_refusal() -> Result<()> {
    let at = scattered(5, "targets");
    let kernel = matern(Smoothness::ThreeHalves, 0.3, Metric::Euclidean);
    let (exact, process) = both(kernel, 0.2, 0.4, 2.0, gaussian())?;
    let (exact_counts, counts) = both(kernel, 0.2, 0.4, 2.0, binomial())?;
    // None, one and two sites.
    for n in [1, 2] {
        let some = seen(&at[..n], &vec![1.0; n], Some(&vec![3.0; n]));
        for (a, b) in [
            (ask(&process, &some, &at)?, ask(&exact, &some, &at)?),
            (ask(&counts, &some, &at)?, ask(&exact_counts, &some, &at)?),
        ] {
            near("a site or two", &a[0], &b[0], 1e-6);
            near("a site or two", &a[1], &b[1], 1e-6);
        }
    }
    let mut none = seen(&at[..1], &[1.0], Some(&[2.0]));
    none.mask = none.mask.zeros_like()?;
    for process in [&process, &counts] {
        let [mean, sd, _] = ask(process, &none, &at)?;
        near("prior", &[mean[0], sd[0]], &[0.4, 3.7f64.sqrt()], 1e-12);
    }
    // Many observations at one place, with and without noise.
    let heap = seen(&vec![vec![0.1, 0.2]; 100], &vec![1.5; 100], None);
    for nugget in [0.0, 0.2] {
        let (_, process) = both(kernel, nugget, 0.0, 2.0, gaussian())?;
        let [mean, sd, _] = ask(&process, &heap, &[vec![0.1, 0.2], vec![0.5, 0.5]])?;
        assert!((mean[0] - 1.5).abs() < 0.02 && sd[1] > sd[0], "{mean:?} {sd:?}");
    }
    // A heap, a continent and one site in another world.
    let mut places = scattered(400, "sites");
    let mut values = drawn(&kernel, 0.2, &places)?;
    (300..350).for_each(|i| places[i] = places[0].clone());
    places.push(vec![1e4, 1e4]);
    values.push(3.0);
    let fitted = NearestGp::fit(&seen(&places, &values, None), gaussian())?;
    let [mean, sd, _] = ask(&fitted, &seen(&places, &values, None), &at)?;
    assert!(mean.iter().chain(&sd).all(|v| v.is_finite()), "{fitted:?}");
    let alike = fitted.kernel.covariance(&[0.0, 0.0], &[0.3, 0.0]) / fitted.kernel.sill();
    assert!((0.25..0.7).contains(&alike), "the far site does not stretch the range: {fitted:?}");
    // One extreme value, and nothing but one value.
    values[7] = 1e6;
    for values in [values, vec![-1e6; 401]] {
        let context = seen(&places, &values, None);
        let fitted = NearestGp::fit(&context, gaussian())?;
        let [mean, sd, _] = ask(&fitted, &context, &at)?;
        assert!(mean.iter().chain(&sd).all(|v| v.is_finite()) && sd.iter().all(|s| *s > 0.0));
    }
    for positive in [0.0, 50.0] {
        let some = &places[281..];
        let context = seen(some, &vec![positive; some.len()], Some(&vec![50.0; some.len()]));
        let fitted = NearestGp::fit(&context, binomial())?;
        let [mean, sd, _] = ask(&fitted, &context, &at)?;
        assert!(mean.iter().chain(&sd).all(|v| v.is_finite()), "{fitted:?}");
    }
    // Crowds that contradict each other, under weak and strong priors; and individuals.
    for (sill, mean) in [(0.01, 0.0), (1.0, -6.0), (100.0, 4.0), (1e4, 0.0)] {
        for crowd in [1.0, 1000.0] {
            let positive: Vec<f64> = (0..401).map(|i| crowd * f64::from(i % 2)).collect();
            let context = seen(&places, &positive, Some(&vec![crowd; 401]));
            let wild = Matern { sill, ..kernel };
            let (_, process) = both(wild, 0.1 * sill, mean, 0.0, binomial())?;
            let [mean, sd, _] = ask(&process, &context, &at)?;
            assert!(mean.iter().chain(&sd).all(|v| v.is_finite()), "sill {sill}, {crowd}");
        }
    }
    for (context, likelihood) in [
        (seen(&at[..2], &[0.0, 1.0], None), gaussian()),
        (seen(&vec![vec![0.5, 0.5]; 4], &[0.0, 1.0, 2.0, 3.0], None), gaussian()),
        (seen(&at[..3], &[0.0, 1.0, f64::NAN], None), gaussian()),
        (seen(&at[..3], &[0.0, 1.0, 1.0], None), binomial()),
        (seen(&at[..3], &[0.0, 1.0, 9.0], Some(&[5.0, 5.0, 5.0])), binomial()),
    ] {
        assert!(NearestGp::fit(&context, likelihood).is_err());
    }
    Ok(())
}

#[test]
fn memory_is_linear_and_the_exact_process_points_here() -> Result<()> {
    let kernel = matern(Smoothness::Half, 0.3, Metric::Euclidean);
    let (exact, process) = both(kernel, 0.2, 0.0, 0.0, gaussian())?;
    let (a, b) = (process.memory(100_000), process.memory(1_000_000));
    assert!(b.conditioning < 11 * a.conditioning && a.conditioning < 200 << 20, "{a:?} {b:?}");
    let n = 20_001;
    let many = seen(&scattered(n, "many"), &vec![0.0; n], None);
    let error = exact.condition(&many).err().expect("too many").to_string();
    assert!(error.contains("too many sites"), "{error}");
    Ok(())
}

/// Counts that say little, or nothing, or too much, and places that are one, read by all of them: what the
/// exact process makes of the same.
#[test]
fn odd_counts_are_read_as_the_exact_process_reads_them() -> Result<()> {
    let mut places = scattered(80, "sites");
    (60..70).for_each(|i| places[i] = places[3].clone()); // a crowd of places that are one
    (70..75).for_each(|i| places[i] = vec![places[i - 50][0] + 1e-9, places[i - 50][1]]);
    places[79] = vec![4e3, -7e3];
    let at: Vec<Vec<f64>> = scattered(12, "targets")
        .into_iter()
        .chain([places[3].clone(), places[79].clone()])
        .collect();
    let one = vec![1.0; 80];
    let mixed: Vec<f64> = (0..80).map(|i| (1 + i % 5) as f64).collect();
    let crowds: Vec<f64> = (0..80).map(|i| if i % 7 == 0 { 5000.0 } else { 1.0 }).collect();
    for smoothness in [Smoothness::Half, Smoothness::FiveHalves] {
        let kernel = matern(smoothness, 0.4, Metric::Euclidean);
        let latent = drawn(&kernel, 0.3, &scattered(80, "sites"))?;
        for tested in [&one, &mixed, &crowds] {
            let positive = counted(&latent, tested);
            let none = vec![0.0; 80];
            for y in [&positive, &none, tested] {
                let context = seen(&places, y, Some(tested));
                for (nugget, doubt) in [(0.3, 25.0), (0.0, 25.0), (40.0, 0.0)] {
                    let (exact, nearest) = both(kernel, nugget, -0.5, doubt, binomial())?;
                    let nearest = nearest.neighbours(80, 80);
                    let (a, b) = (ask(&nearest, &context, &at)?, ask(&exact, &context, &at)?);
                    let what = format!("{smoothness:?}, nugget {nugget}, first of {:?}", &y[..3]);
                    for i in 0..3 {
                        near(&what, &a[i], &b[i], 1e-5);
                    }
                    let logs = [nearest.log_marginals(&context)?, exact.log_marginals(&context)?];
                    near(&what, &logs[0], &logs[1], 1e-4);
                }
            }
        }
    }
    Ok(())
}

/// Few of many neighbours, one to five tested: the surface of the exact process, its spread and its
/// evidence.
#[test]
fn few_neighbours_of_small_counts_come_close_to_the_exact_process() -> Result<()> {
    let places = scattered(900, "sites");
    let at = scattered(200, "targets");
    let tested: Vec<f64> = (0..900).map(|i| (1 + i % 5) as f64).collect();
    for (smoothness, nugget) in [(Smoothness::Half, 0.2), (Smoothness::ThreeHalves, 2.0)] {
        let kernel = matern(smoothness, 0.5, Metric::Euclidean);
        let latent = drawn(&kernel, nugget, &places)?;
        let context = seen(&places, &counted(&latent, &tested), Some(&tested));
        let (exact, nearest) = both(kernel, nugget, -0.5, 25.0, binomial())?;
        let (a, b) = (ask(&nearest, &context, &at)?, ask(&exact, &context, &at)?);
        let off: Vec<f64> = (0..200).map(|i| (a[0][i] - b[0][i]) / b[1][i]).collect();
        let off = (off.iter().map(|v| v * v).sum::<f64>() / 200.0).sqrt();
        let wide: Vec<f64> = (0..200).map(|i| (a[1][i] / b[1][i]).ln()).collect();
        let wide = (wide.iter().map(|v| v * v).sum::<f64>() / 200.0).sqrt();
        let logs = [nearest.log_marginals(&context)?[0], exact.log_marginals(&context)?[0]];
        assert!(off < 0.03, "{smoothness:?}: the mean is {off} sds off");
        // An sd found from 128 draws alone is off by one sixteenth; what the nearest say sharpens it.
        assert!(wide < 1.0 / 16.0, "{smoothness:?}: the sd is off by {wide}");
        assert!((logs[0] - logs[1]).abs() < 0.5, "{smoothness:?}: {logs:?}");
    }
    Ok(())
}

/// Slopes along the coordinates are the exact process's covariates.
/// Hundreds of people in each of a few cities, under a smooth surface: what is open between them is known
/// as the exact process knows it, though the equations are nearly singular.
#[test]
fn crowded_counts_leave_as_much_open_as_to_the_exact_process() -> Result<()> {
    let continent = Continent::draw(&mut Stream::new(1, "coast", 0))?;
    let mut rng = Stream::new(1, "people", 0);
    let places: Vec<Vec<f64>> =
        continent.survey(2000, &mut rng).iter().map(|p| p.to_vec()).collect();
    let at: Vec<Vec<f64>> = (0..300).map(|_| continent.anywhere(&mut rng).to_vec()).collect();
    let (kernel, nugget) = (matern(Smoothness::ThreeHalves, 0.15, Metric::Euclidean), 0.05);
    let tested: Vec<f64> = (0..2000).map(|i| f64::from(1 + i % 5)).collect();
    let latent: Vec<f64> = drawn(&kernel, nugget, &places)?.iter().map(|v| v - 1.0).collect();
    let context = seen(&places, &counted(&latent, &tested), Some(&tested));
    let exact = ExactGp::new(Box::new(kernel), nugget, -1.0, binomial())?;
    let exact = ask(&exact, &context, &at)?;
    for [previous, few] in [[30, 80], [60, 120]] {
        let gp = NearestGp::new(Box::new(kernel), nugget, -1.0, binomial())?;
        let found = ask(&gp.neighbours(previous, few), &context, &at)?;
        near("means", &found[0], &exact[0], 0.15);
        let ratios: Vec<f64> = found[1].iter().zip(&exact[1]).map(|(a, b)| (a / b).ln()).collect();
        let worst = ratios.iter().map(|r| r.abs()).fold(0.0, f64::max);
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        println!("{few} neighbours: ln of sds {worst} apart at most, {mean} on the mean");
        assert!(worst < 0.06, "{few} neighbours: ln of sds {worst} apart");
        assert!(mean.abs() < 0.005, "{few} neighbours: ln of sds {mean} apart on the mean");
    }
    Ok(())
}

#[test]
fn a_trend_is_universal_kriging() -> Result<()> {
    let places = scattered(60, "sites");
    let at: Vec<Vec<f64>> =
        scattered(9, "targets").into_iter().chain([vec![5.0, -3.0], vec![-40.0, 0.0]]).collect();
    let kernel = matern(Smoothness::ThreeHalves, 0.4, Metric::Euclidean);
    let surface = drawn(&kernel, 0.3, &places)?;
    let latent: Vec<f64> =
        surface.iter().zip(&places).map(|(v, p)| v + 1.5 * p[0] - 0.7 * p[1]).collect();
    let tested: Vec<f64> = (0..60).map(|i| [1.0, 5.0, 80.0][i % 3]).collect();
    let with = |mut sites: Sites| {
        sites.x = Some(sites.s.clone());
        sites
    };
    for (context, likelihood) in [
        (seen(&places, &latent, None), gaussian()),
        (seen(&places, &counted(&latent, &tested), Some(&tested)), binomial()),
    ] {
        let (exact, nearest) = both(kernel, 0.3, 0.25, 9.0, likelihood)?;
        let (exact, nearest) = (exact.with_covariates(2, 4.0)?, nearest.sloped(4.0)?);
        let nearest = nearest.neighbours(60, 60);
        let mut told = context.clone();
        told.sites = with(told.sites);
        let posterior = exact.condition(&told)?.at(&with(sites(&at, 2)))?;
        let surface = posterior.marginals(0, Of::Surface)?;
        let [mean, sd, _] = ask(&nearest, &context, &at)?;
        near("mean", &mean, &surface.mean, 1e-6);
        near("sd", &sd, &surface.sd, 1e-6);
        near("evidence", &nearest.log_marginals(&context)?, &exact.log_marginals(&told)?, 1e-7);
        // Far beyond the sites nobody knows where a slope leads.
        assert!(sd[10] > 3.0 * sd[9] && sd[9] > sd[0], "{sd:?}");
    }
    // Fitted, it goes on where a level mean comes back, and says how sure it is of that.
    let (places, surface) = line(1500, 20.0);
    let rising: Vec<f64> = places.iter().zip(&surface).map(|(p, v)| 0.02 * p[0] + v).collect();
    let context = seen(&places, &rising, None);
    let beyond = [vec![2000.0]];
    let plain = |kernel| Ok(Box::new(kernel) as Box<dyn Kernel>);
    let fitted = NearestGp::fit_as(&context, gaussian(), &plain, true)?;
    let [mean, sd, _] = ask(&fitted, &context, &beyond)?;
    assert!((mean[0] - 40.0).abs() < 3.0 * sd[0] && sd[0] < 3.0, "{mean:?} ± {sd:?}, not 40");
    assert!(NearestGp::fit(&context, gaussian())?.sloped(f64::NAN).is_err());
    Ok(())
}

/// A kernel that is another everywhere, and one with a direction: as the exact process has them.
#[test]
fn any_kernel_is_conditioned_as_the_exact_process_does() -> Result<()> {
    let places = scattered(500, "sites");
    let at = scattered(60, "targets");
    let varying = || {
        Box::new(Varying::new(Smoothness::ThreeHalves, 1.7, |s: &[f64]| Local {
            length_scale: 0.15 * (1.0 + s[0]).exp(),
            ratio: 2.0,
            angle: s[1],
            sill: 1.2 + 0.5 * s[1],
        }))
    };
    let turned = Metric::Anisotropic { angle: 0.6, ratio: 8.0 };
    let stretched = || Box::new(matern(Smoothness::Half, 1.5, turned));
    let tested: Vec<f64> = (0..500).map(|i| (1 + i % 5) as f64).collect();
    let kernels: [&dyn Fn() -> Box<dyn Kernel>; 2] = [&|| varying(), &|| stretched()];
    for (which, kernel) in kernels.iter().enumerate() {
        let latent = drawn(&*kernel(), 0.1, &places)?;
        for (context, likelihood) in [
            (seen(&places, &latent, None), gaussian()),
            (seen(&places, &counted(&latent, &tested), Some(&tested)), binomial()),
        ] {
            let exact = ExactGp::new(kernel(), 0.1, 0.2, likelihood)?;
            let nearest = NearestGp::new(kernel(), 0.1, 0.2, likelihood)?.neighbours(40, 120);
            let (a, b) = (ask(&nearest, &context, &at)?, ask(&exact, &context, &at)?);
            let off: Vec<f64> = (0..60).map(|i| (a[0][i] - b[0][i]) / b[1][i]).collect();
            let off = (off.iter().map(|v| v * v).sum::<f64>() / 60.0).sqrt();
            let logs = [nearest.log_marginals(&context)?[0], exact.log_marginals(&context)?[0]];
            assert!(off < 0.06, "kernel {which}: {off} sds off");
            assert!((logs[0] - logs[1]).abs() < 1.5, "kernel {which}: {logs:?}");
        }
    }
    Ok(())
}

#[test]
fn threads_change_no_digit() -> Result<()> {
    let places = scattered(700, "sites");
    let at = scattered(50, "targets");
    let kernel = matern(Smoothness::ThreeHalves, 0.3, Metric::Euclidean);
    let latent = drawn(&kernel, 0.2, &places)?;
    let tested: Vec<f64> = (0..700).map(|i| (1 + i % 5) as f64).collect();
    let context = seen(&places, &counted(&latent, &tested), Some(&tested));
    let (_, process) = both(kernel, 0.2, 0.1, 4.0, binomial())?;
    let answer = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| -> Result<_> {
            let posterior = process.condition(&context)?;
            let drawn = posterior.field(9, 1, 3.0)?.at(&sites(&at, 2))?;
            Ok((ask(&process, &context, &at)?, process.log_marginals(&context)?, drawn))
        })
    };
    let one = answer(1)?;
    assert_eq!(one, answer(3)?);
    Ok(())
}
