//! Displaced sites: what integrating over the displacement is worth on simulated surveys whose true places
//! are known, for a kernel and for a process of which nothing is known but its two verbs.

use candle_core::{Device, Tensor};
use isopleth::{
    Marginals, Observations, Of, Process, Result, Sites, Stream,
    baseline::{ExactGp, NearestGp},
    geo::displacement::{Displacement, Law},
    kernel::{Displaced, Kernel, Matern, Metric, Smoothness, displaced::mark},
    likelihood::{self, Likelihood},
    linalg::lower,
    mapping::displaced::{Expected, Placed},
};

const NUGGET: f64 = 0.05;
const REACH: f64 = 0.3;

fn matern() -> Matern {
    Matern {
        smoothness: Smoothness::ThreeHalves,
        length_scale: 0.3,
        sill: 1.0,
        metric: Metric::Euclidean,
    }
}

fn named(name: &str) -> &'static dyn Likelihood {
    likelihood::find(name).expect("registered")
}

/// A survey as it was published, and the surface at known places.
struct World {
    context: Observations,
    moved: Displacement,
    targets: Sites,
    surface: Vec<f64>,
    /// One more observation at other displaced sites, and where they were recorded.
    again: Sites,
    seen_again: Vec<f64>,
}

fn sites(places: &[[f64; 2]]) -> Sites {
    let flat: Vec<f64> = places.concat();
    Sites::new(Tensor::from_vec(flat, (1, places.len(), 2), &Device::Cpu).expect("places"))
}

/// `n` sites, displaced by half as much in town as elsewhere, and as many targets.
fn world(seed: u64, n: usize, tested: Option<f64>) -> Result<World> {
    let mut rng = Stream::new(seed, "world", 0);
    let laws = vec![Law::up_to(0.5 * REACH), Law::up_to(REACH)];
    let places: Vec<[f64; 2]> =
        (0..3 * n).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
    let mut gram = Vec::new();
    for (i, a) in places.iter().enumerate() {
        gram.extend(places.iter().map(|b| matern().covariance(a, b)));
        gram[i * 3 * n + i] += 1e-9;
    }
    let surface = lower(gram, 3 * n)?.colour(&rng.normals(3 * n));
    let noisy: Vec<f64> = surface.iter().map(|f| f + NUGGET.sqrt() * rng.normal()).collect();
    let recorded: Vec<[f64; 2]> = places
        .iter()
        .enumerate()
        .map(|(i, [x, y])| {
            let [dx, dy] = laws[i % 2].draw(&mut rng);
            [x + dx, y + dy]
        })
        .collect();
    let y: Vec<f64> = match tested {
        None => noisy[..n].to_vec(),
        Some(tested) => {
            noisy[..n].iter().map(|eta| named("binomial").observe(*eta, tested, &mut rng)).collect()
        }
    };
    let trials = tested.map(|t| Tensor::from_vec(vec![t; n], (1, n), &Device::Cpu)).transpose()?;
    let y = Tensor::from_vec(y, (1, n, 1), &Device::Cpu)?;
    let of: Vec<usize> = (0..n).map(|i| i % 2).collect();
    let of_again = (2 * n..3 * n).map(|i| i % 2).collect();
    let again = Displacement { laws: laws.clone(), of: of_again };
    Ok(World {
        context: Observations::new(sites(&recorded[..n]), y, trials)?,
        moved: Displacement { laws, of },
        targets: sites(&places[n..2 * n]),
        surface: surface[n..2 * n].to_vec(),
        again: mark(&sites(&recorded[2 * n..]), &again)?,
        seen_again: noisy[2 * n..].to_vec(),
    })
}

fn naive(likelihood: &'static dyn Likelihood) -> Result<ExactGp> {
    ExactGp::new(Box::new(matern()), NUGGET, 0.0, likelihood)
}

fn expected(world: &World, likelihood: &'static dyn Likelihood) -> Result<Expected> {
    let kernel = Displaced::new(matern(), &world.moved.laws)?;
    let gp = ExactGp::new(Box::new(kernel), NUGGET, 0.0, likelihood)?;
    Ok(Expected::new(Box::new(gp), world.moved.clone()))
}

fn placed(world: &World, likelihood: &'static dyn Likelihood) -> Result<Placed> {
    Ok(Placed::new(Box::new(naive(likelihood)?), world.moved.clone(), 1))
}

/// Mean log density of the truth, and how often the central 90 % hold it.
fn score(marginals: &Marginals, truth: &[f64]) -> [f64; 2] {
    let n = truth.len() as f64;
    let log = (0..truth.len()).map(|i| marginals.link_log_density(i, truth[i])).sum::<f64>() / n;
    let held = |i: &usize| (0.05..0.95).contains(&marginals.link_cdf(*i, truth[*i]));
    [log, (0..truth.len()).filter(held).count() as f64 / n]
}

fn surface(process: &dyn Process, world: &World) -> Result<[f64; 2]> {
    let said = process.condition(&world.context)?.at(&world.targets)?.marginals(0, Of::Surface)?;
    Ok(score(&said, &world.surface))
}

/// Over several surveys: both ways beat ignoring the displacement, and hold the truth as often as they
/// say, where ignoring it does not.
#[test]
fn integrating_over_displacement_beats_ignoring_it() -> Result<()> {
    for (name, tested) in [("gaussian", None), ("binomial", Some(60.0))] {
        let likelihood = named(name);
        let mut sums = [[0.0; 2]; 3];
        let worlds = 8;
        for seed in 0..worlds {
            let world = world(seed, 60, tested)?;
            let each = [
                surface(&naive(likelihood)?, &world)?,
                surface(&expected(&world, likelihood)?, &world)?,
                surface(&placed(&world, likelihood)?, &world)?,
            ];
            for (sum, one) in sums.iter_mut().zip(each) {
                (0..2).for_each(|k| sum[k] += one[k] / worlds as f64);
            }
        }
        let [naive, expected, placed] = sums;
        println!("{name}: ignored {naive:.3?}, expected {expected:.3?}, placed {placed:.3?}");
        for (how, [log, held]) in [("expected", expected), ("placed", placed)] {
            assert!(log > naive[0] + 0.05, "{name}: {how} {log}, ignored {}", naive[0]);
            assert!((0.84..0.96).contains(&held), "{name}: {how} held {held} of 90 %");
        }
        assert!(naive[1] < expected[1] - 0.03, "{name}: ignored held {}", naive[1]);
    }
    Ok(())
}

/// A site held out was displaced too: its forecast at the recorded place is wider, and rightly so.
#[test]
fn displaced_targets_are_foretold_as_such() -> Result<()> {
    let mut sums = [[0.0; 2]; 3];
    let worlds = 8;
    for seed in 0..worlds {
        let world = world(20 + seed, 60, None)?;
        let bare = Sites::new(world.again.s.narrow(2, 0, 2)?);
        let ways: [(Box<dyn Process>, &Sites); 3] = [
            (Box::new(naive(named("gaussian"))?), &bare),
            (Box::new(expected(&world, named("gaussian"))?), &world.again),
            (Box::new(placed(&world, named("gaussian"))?), &world.again),
        ];
        for (sum, (process, targets)) in sums.iter_mut().zip(ways) {
            let said = process.condition(&world.context)?.at(targets)?;
            let one = score(&said.marginals(0, Of::Observation)?, &world.seen_again);
            (0..2).for_each(|k| sum[k] += one[k] / worlds as f64);
        }
    }
    println!("displaced targets: ignored, expected, placed: {sums:.3?}");
    let [naive, expected, placed] = sums;
    for [log, held] in [expected, placed] {
        assert!(log > naive[0] + 0.02, "{log}, ignored {}", naive[0]);
        assert!((0.84..0.96).contains(&held), "{held} of 90 %");
    }
    Ok(())
}

/// By next to nothing is not at all; and the same survey gives the same places.
#[test]
fn no_displacement_changes_nothing() -> Result<()> {
    let mut world = world(3, 30, None)?;
    world.moved.laws = vec![Law::up_to(1e-7); 2];
    let plain = naive(named("gaussian"))?.condition(&world.context)?.at(&world.targets)?;
    let plain = plain.marginals(0, Of::Surface)?;
    let ways: [Box<dyn Process>; 2] = [
        Box::new(expected(&world, named("gaussian"))?),
        Box::new(placed(&world, named("gaussian"))?),
    ];
    for process in ways {
        let said = process.condition(&world.context)?.at(&world.targets)?;
        let said = said.marginals(0, Of::Surface)?;
        for i in 0..plain.len() {
            let ((mean, sd), (truth, its)) = (said.mean_sd(i), plain.mean_sd(i));
            assert!(
                (mean - truth).abs() < 1e-4 && (sd - its).abs() < 1e-4,
                "{mean} {truth} {sd} {its}"
            );
        }
    }
    Ok(())
}

/// Fitting sees through the displacement: the nugget is that of a village, not of its place. The
/// nearest-neighbour process reads the same marks.
#[test]
fn fitting_does_not_take_displacement_for_nugget() -> Result<()> {
    let world = world(7, 150, None)?;
    let likelihood = named("gaussian");
    let of = |kernel| Ok(Box::new(Displaced::new(kernel, &world.moved.laws)?) as Box<dyn Kernel>);
    let marked = isopleth::mapping::displaced::marked(&world.context, &world.moved)?;
    let ignored = ExactGp::fit(&world.context, likelihood)?;
    let fitted = ExactGp::fit_as(&marked, likelihood, &of)?;
    println!("nugget {NUGGET}: ignored {}, fitted {}", ignored.nugget, fitted.nugget);
    assert!(fitted.nugget < 0.6 * ignored.nugget, "{} of {}", fitted.nugget, ignored.nugget);
    let nearest = NearestGp::fit_as(&marked, likelihood, &of, false)?;
    let gap = (nearest.log_marginal.unwrap() - fitted.log_marginal.unwrap()).abs();
    assert!(gap < 2.0, "the nearest-neighbour process is {gap} nats off");
    let surfaces = [
        surface(&Expected::new(Box::new(fitted), world.moved.clone()), &world)?,
        surface(&Expected::new(Box::new(nearest), world.moved.clone()), &world)?,
    ];
    println!("fitted, nearest: {surfaces:.3?}; ignored {:.3?}", surface(&ignored, &world)?);
    assert!((surfaces[0][0] - surfaces[1][0]).abs() < 0.05, "{surfaces:?}");
    Ok(())
}
