//! A context in windows: what may not matter does not, and surveys that are none a network knows are
//! answered honestly.

use std::sync::{Arc, LazyLock};

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Marginals, Observations, Of, Process, Result, Sites, Stream,
    baseline::NearestGp,
    checkpoint::Checkpoint,
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood,
    linalg::lower,
    mapping::windows::{Cut, Windows},
    score::crps,
    sites::mean_sd,
};

const CPU: Device = Device::Cpu;

type Model = Arc<dyn Process + Send + Sync>;

fn shipped(name: &str) -> Model {
    Checkpoint::resolve(name).unwrap().process(&CPU).unwrap().into()
}

static CONTINUOUS: LazyLock<Model> = LazyLock::new(|| shipped("continuous"));
static PREVALENCE: LazyLock<Model> = LazyLock::new(|| shipped("prevalence"));

fn windows(sites: usize) -> Windows {
    let gaussian = likelihood::find("gaussian").unwrap();
    Windows::new(CONTINUOUS.clone(), gaussian, Cut::of(sites)).unwrap()
}

fn counted(sites: usize) -> Windows {
    let binomial = likelihood::find("binomial").unwrap();
    Windows::new(PREVALENCE.clone(), binomial, Cut::of(sites)).unwrap()
}

fn values(places: &[[f64; 2]], y: &[f64]) -> Observations {
    let y: Vec<f32> = y.iter().map(|v| *v as f32).collect();
    let y = Tensor::from_vec(y, (1, places.len(), 1), &CPU).unwrap();
    Observations::new(Sites::plane(places, &CPU).unwrap(), y, None).unwrap()
}

/// A bounded surface with waves long and short.
fn wave([x, y]: [f64; 2]) -> f64 {
    0.7 * (3.0 * x + y).sin() + 0.5 * (11.0 * y - 5.0 * x).cos()
}

fn scattered(n: usize, name: &str) -> Vec<[f64; 2]> {
    let mut rng = Stream::new(3, name, 0);
    (0..n).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect()
}

fn waves(places: &[[f64; 2]]) -> Observations {
    let mut rng = Stream::new(4, "noise", 0);
    let y: Vec<f64> = places.iter().map(|p| wave(*p) + 0.1 * rng.normal()).collect();
    values(places, &y)
}

fn at(process: &dyn Process, context: &Observations, places: &[[f64; 2]]) -> Result<Marginals> {
    process.condition(context)?.at(&Sites::plane(places, &CPU)?)?.marginals(0, Of::Surface)
}

/// Mean and sd of every target, each of which must be a number.
fn told(process: &dyn Process, context: &Observations, places: &[[f64; 2]]) -> Vec<(f64, f64)> {
    let m = at(process, context, places).unwrap();
    let told: Vec<(f64, f64)> = (0..m.len()).map(|i| m.mean_sd(i)).collect();
    for ((mean, sd), place) in told.iter().zip(places) {
        assert!(mean.is_finite() && sd.is_finite() && *sd > 0.0, "{mean} ± {sd} at {place:?}");
    }
    told
}

#[test]
fn neither_order_nor_padding_nor_company_matters() -> Result<()> {
    let mut places = scattered(1_200, "order");
    places.extend_from_within(..40); // some places twice
    let context = waves(&places);
    let targets = scattered(150, "targets");
    let process = windows(128);
    let posterior = process.condition(&context)?;
    let ask = |places: &[[f64; 2]]| -> Result<Vec<(f64, f64)>> {
        let m = posterior.at(&Sites::plane(places, &CPU)?)?.marginals(0, Of::Surface)?;
        Ok((0..m.len()).map(|i| m.mean_sd(i)).collect())
    };
    let gap = |a: &[(f64, f64)], b: &[(f64, f64)]| {
        a.iter().zip(b).map(|(a, b)| (a.0 - b.0).abs().max((a.1 - b.1).abs())).fold(0.0, f64::max)
    };
    let whole = ask(&targets)?;
    // Asked one by one, and by several threads at once.
    let alone: Vec<_> = targets.chunks(7).map(|part| ask(part).unwrap()).collect();
    assert!(gap(&whole, &alone.concat()) < 1e-4, "company: {}", gap(&whole, &alone.concat()));
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            targets.chunks(50).map(|part| scope.spawn(move || ask(part).unwrap())).collect();
        let joined: Vec<_> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
        assert!(gap(&whole, &joined) < 1e-4, "threads: {}", gap(&whole, &joined));
    });
    // Listed in another order, with padding among the rows.
    let turned = Stream::new(5, "turned", 0).permutation(places.len());
    let index: Vec<u32> = turned.iter().map(|i| *i as u32).chain([0, 1, 2]).collect();
    let index = Tensor::new(index, &CPU)?;
    let pick = |x: &Tensor| x.index_select(&index, 1);
    let mut mask = vec![1f32; places.len()];
    mask.extend([0.0; 3]);
    let padded = Observations {
        sites: Sites::new(pick(&context.sites.s)?),
        y: pick(&context.y)?,
        mask: Tensor::from_vec(mask, (1, places.len() + 3), &CPU)?,
        trials: None,
    };
    let again = told(&process, &padded, &targets);
    assert!(gap(&whole, &again) < 1e-4, "order and padding: {}", gap(&whole, &again));
    assert!(whole.iter().any(|(m, _)| *m > 0.3) && whole.iter().any(|(m, _)| *m < -0.3));
    Ok(())
}

/// What a few hundred sites say, moved, turned into other units, and lifted, is moved and lifted: every
/// window has a frame of its own. Nearly so: the thinned far sites of a window are chosen by a hash of
/// where they stand, and so are others elsewhere.
#[test]
fn windows_have_no_units_and_no_origin() {
    let places = scattered(1_500, "units");
    let targets = scattered(100, "asked");
    let process = windows(200);
    let here = told(&process, &waves(&places), &targets);
    let elsewhere = |p: &[f64; 2]| [8.0 * p[0] + 16.0, 8.0 * p[1] - 4.0];
    let mut rng = Stream::new(4, "noise", 0);
    let y: Vec<f64> = places.iter().map(|p| 40.0 + 3.0 * (wave(*p) + 0.1 * rng.normal())).collect();
    let moved = values(&places.iter().map(elsewhere).collect::<Vec<_>>(), &y);
    let there = told(&process, &moved, &targets.iter().map(elsewhere).collect::<Vec<_>>());
    for ((m, s), (n, t)) in here.iter().zip(&there) {
        assert!((40.0 + 3.0 * m - n).abs() < 0.6 * s, "{m} and {n}, sd {s}");
        assert!((3.0 * s - t).abs() < 0.6 * s, "{s} and {t}");
    }
}

/// Duplicates by the thousand, a dense block and an empty ocean, one site far from all others, all values
/// equal, outliers: finite answers that know where they know nothing.
#[test]
fn odd_surveys_are_answered_honestly() {
    let mut rng = Stream::new(6, "odd", 0);
    let process = windows(200);

    // Nine sites in ten at one place, and as many values.
    let mut places = scattered(300, "few");
    places.extend(std::iter::repeat_n([0.25, -0.5], 2_700));
    let there = told(&process, &waves(&places), &[[0.25, -0.5], [-0.6, 0.6]]);
    assert!((there[0].0 - wave([0.25, -0.5])).abs() < 4.0 * there[0].1 + 0.1, "{there:?}");

    // A dense block, and an ocean.
    let dense: Vec<[f64; 2]> =
        (0..2_500).map(|_| [rng.uniform(0.70, 0.72), rng.uniform(0.70, 0.72)]).collect();
    let mut places = dense.clone();
    places.extend(scattered(12, "islands"));
    let ocean = told(&process, &waves(&places), &[[0.71, 0.71], [-0.9, -0.9], [-50.0, 30.0]]);
    assert!(ocean[1].1 > 3.0 * ocean[0].1, "an ocean is as sure as a city: {ocean:?}");
    assert!(ocean[2].1 > 3.0 * ocean[0].1, "elsewhere is as sure as a city: {ocean:?}");

    // One site ten thousand times as far as all others span: these are told as without it.
    let near = scattered(1_500, "near");
    let targets = scattered(50, "inside");
    let without = told(&process, &waves(&near), &targets);
    let mut far = near.clone();
    far.push([20_000.0, 0.0]);
    let mut y: Vec<f64> = near.iter().map(|p| wave(*p)).collect();
    y.push(0.3);
    let with = told(&process, &values(&far, &y), &targets);
    let off: f64 = with.iter().zip(&targets).map(|(w, p)| (w.0 - wave(*p)).powi(2)).sum();
    let usual: f64 = without.iter().zip(&targets).map(|(w, p)| (w.0 - wave(*p)).powi(2)).sum();
    assert!(off < 2.0 * usual + 0.1, "one far site costs {off} where {usual} is usual");
    told(&process, &values(&far, &y), &[[20_000.0, 0.0], [10_000.0, 0.0]]);

    // All values equal: that value, and not for certain.
    let places = scattered(1_000, "equal");
    for (mean, sd) in told(&process, &values(&places, &vec![0.7; 1_000]), &scattered(30, "ask")) {
        assert!((mean - 0.7).abs() < 0.3 && sd > 1e-4, "{mean} ± {sd}");
    }

    // One value in a hundred is a thousand times too large; windows without one do not notice.
    let places = scattered(1_500, "tails");
    let mut y: Vec<f64> = places.iter().map(|p| wave(*p)).collect();
    (0..15).for_each(|i| y[100 * i] *= 1_000.0);
    told(&process, &values(&places, &y), &scattered(50, "asked of tails"));

    // What is no number is refused, with its row.
    y[77] = f64::INFINITY;
    let error = process.condition(&values(&places, &y)).err().unwrap();
    assert!(error.to_string().contains("not finite") && error.facts()[0].1 == "78", "{error:?}");
}

/// Counts of one to five people, most of them none, at places shared by many.
#[test]
fn counts_of_few_people_at_few_places_are_answered() -> Result<()> {
    let mut rng = Stream::new(8, "counts", 0);
    let villages = scattered(60, "villages");
    let places: Vec<[f64; 2]> = (0..3_000).map(|i| villages[i % 60]).collect();
    let tested: Vec<f32> = (0..3_000).map(|_| 1.0 + rng.below(5) as f32).collect();
    let level = |p: [f64; 2]| 1.0 / (1.0 + (1.5 - p[0]).exp());
    let positive: Vec<f32> = places
        .iter()
        .zip(&tested)
        .map(|(p, n)| rng.binomial(*n as u64, level(*p)) as f32)
        .collect();
    let tensor = |x: Vec<f32>| Tensor::from_vec(x, (1, 3_000), &CPU);
    let y = tensor(positive)?.unsqueeze(2)?;
    let context = Observations::new(Sites::plane(&places, &CPU)?, y, Some(tensor(tested)?))?;
    let targets = [[-0.8, 0.0], [0.0, 0.0], [0.8, 0.0]];
    for ((mean, sd), p) in told(&counted(256), &context, &targets).iter().zip(targets) {
        assert!((mean - level(p)).abs() < 0.05 + 2.0 * sd, "{mean} ± {sd} at {p:?}");
        assert!(*sd < 0.25, "{sd} at {p:?}");
    }
    Ok(())
}

/// A thousand sites of a known field, in windows of 250: nearly as good as its own Gaussian process.
#[test]
fn a_known_field_is_met_nearly_as_well_as_by_its_own_process() -> Result<()> {
    let kernel = |sill| Matern {
        smoothness: Smoothness::ThreeHalves,
        length_scale: 0.2,
        sill,
        metric: Metric::Euclidean,
    };
    let (mut found, mut floor, mut inside, mut asked) = (0.0, 0.0, 0, 0);
    for seed in 0..3 {
        let mut rng = Stream::new(seed, "known", 0);
        let all: Vec<[f64; 2]> =
            (0..1_300).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
        let covariance = all.iter().flat_map(|a| all.iter().map(move |b| (a, b)));
        let covariance = covariance.map(|(a, b)| kernel(1.0).covariance(a, b)).collect();
        let z = lower(covariance, all.len())?.colour(&rng.normals(all.len()));
        let y: Vec<f64> = z[..1_000].iter().map(|z| z + 0.3 * rng.normal()).collect();
        let (mean, sd) = mean_sd(&y);
        let y: Vec<f64> = y.iter().map(|y| (y - mean) / sd).collect();
        let truth: Vec<f64> = z[1_000..].iter().map(|z| (z - mean) / sd).collect();
        let context = values(&all[..1_000], &y);
        let gaussian = likelihood::find("gaussian")?;
        let true_kernel = Box::new(kernel(1.0 / (sd * sd)));
        let gp = NearestGp::new(true_kernel, (0.3 / sd).powi(2), -mean / sd, gaussian)?;
        let own = at(&gp, &context, &all[1_000..])?;
        let said = at(&windows(250), &context, &all[1_000..])?;
        for (i, t) in truth.iter().enumerate() {
            found += crps::marginal(&said, i, *t);
            floor += crps::marginal(&own, i, *t);
            inside += usize::from((0.025..=0.975).contains(&said.cdf(i, *t)));
            asked += 1;
        }
    }
    let (ratio, covered) = (found / floor, inside as f64 / asked as f64);
    println!("CRPS {ratio:.4} times the floor, {covered:.3} inside 95 %");
    assert!(ratio < 1.1, "CRPS is {ratio} times the floor");
    // The network is a little too wide on surfaces as smooth as these: 0.984 seen.
    assert!((0.92..=0.99).contains(&covered), "{covered} inside 95 % intervals");
    Ok(())
}

#[test]
fn contexts_that_windows_do_not_know_are_refused() -> Result<()> {
    let process = windows(100);
    let line = Sites::new(Tensor::zeros((1, 5, 1), DType::F32, &CPU)?);
    let y = Tensor::zeros((1, 5, 1), DType::F32, &CPU)?;
    assert!(process.condition(&Observations::new(line, y.clone(), None)?).is_err());
    let mut context = values(&scattered(5, "five"), &[0.0; 5]);
    context.sites.x = Some(y);
    assert!(process.condition(&context).is_err());
    Ok(())
}
