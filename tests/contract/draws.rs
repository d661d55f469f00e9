//! Laws of joint draws at map scale.

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Link, Observations, Of, Posterior, Process, Result, Sites, Stream,
    baseline::{ExactGp, NearestGp},
    geo::{crs::Crs, frame::Frame, grid::Grid},
    kernel::{Kernel, Matern, Metric, Smoothness, SpaceTime},
    likelihood,
    linalg::Cholesky,
    mapping::draws::{self, BLOCK, Surfaces},
};

const CPU: Device = Device::Cpu;

fn matern(smoothness: Smoothness, length_scale: f64, sill: f64) -> Matern {
    Matern { smoothness, length_scale, sill, metric: Metric::Euclidean }
}

/// A kernel of places; with a `time_scale`, two fifths of it stay and the others change with time.
fn kernel(smoothness: Smoothness, time_scale: Option<f64>) -> Box<dyn Kernel> {
    let space = matern(smoothness, 0.35, 1.4);
    let Some(time_scale) = time_scale else { return Box::new(space) };
    let (space, smoothness) = (std::sync::Arc::new(space), Smoothness::Half);
    Box::new(SpaceTime { space, smoothness, time_scale, static_share: 0.4 })
}

fn places(n: usize, rng: &mut Stream) -> Vec<Vec<f64>> {
    (0..n).map(|_| vec![rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect()
}

/// Places with, where `timed`, a time.
fn visits(n: usize, timed: bool, rng: &mut Stream) -> Vec<Vec<f64>> {
    let mut all = places(n, rng);
    all.iter_mut().for_each(|p| p.extend(timed.then(|| rng.uniform(-1.0, 1.0))));
    all
}

/// Coordinates in f64, so that every process sees the same places to the last digit; a third is a time.
fn sites(places: &[Vec<f64>]) -> Sites {
    let n = places.len();
    let axes = |axes: std::ops::Range<usize>| {
        let flat: Vec<f64> = places.iter().flat_map(|p| p[axes.clone()].iter().copied()).collect();
        Tensor::from_vec(flat, (1, n, axes.len()), &CPU).unwrap()
    };
    let t = (places[0].len() == 3).then(|| axes(2..3));
    Sites { t, ..Sites::new(axes(0..2)) }
}

/// A surface seen at `n` places: counts out of 40, or noisy values.
fn seen(gp: &ExactGp, counts: bool, n: usize, rng: &mut Stream) -> Observations {
    let at = visits(n, gp.kernel.change().is_some(), rng);
    let factor = Cholesky::factor(isopleth::kernel::matrix(&*gp.kernel, &at, &at)).unwrap();
    let latent = factor.colour(&rng.normals(n));
    let noisy = latent.iter().map(|f| gp.mean + f + gp.nugget.sqrt() * rng.normal());
    let noisy: Vec<f64> = noisy.collect();
    let tensor = |v: Vec<f64>, shape: &[usize]| Tensor::from_vec(v, shape, &CPU).unwrap();
    if !counts {
        return Observations::new(sites(&at), tensor(noisy, &[1, n, 1]), None).unwrap();
    }
    let k = noisy.iter().map(|f| rng.binomial(40, Link::Logit.outcome(*f)) as f64).collect();
    let trials = tensor(vec![40.0; n], &[1, n]);
    Observations::new(sites(&at), tensor(k, &[1, n, 1]), Some(trials)).unwrap()
}

fn exact(kernel: Box<dyn Kernel>, counts: bool) -> ExactGp {
    let likelihood = likelihood::find(if counts { "binomial" } else { "gaussian" }).unwrap();
    ExactGp::new(kernel, 0.15, -0.4, likelihood).unwrap().uncertain_mean(4.0)
}

/// Row-major `[draw][target]` on the host.
fn dense(posterior: &dyn Posterior, targets: &Sites, n: usize) -> Vec<Vec<f64>> {
    let drawn = posterior.draws(targets, n, &mut Stream::new(5, "dense", 0)).unwrap();
    drawn.values.squeeze(2).unwrap().to_dtype(DType::F64).unwrap().to_vec2().unwrap()
}

/// The law of the field: its mean and covariance over some targets are those of the exact joint
/// posterior, whose own draws by Cholesky stand beside it, and so is the variogram.
#[test]
fn fields_have_the_exact_joint_posterior() -> Result<()> {
    const DRAWS: usize = 3000;
    for (smoothness, counts, timed) in [
        (Smoothness::Half, false, false),
        (Smoothness::ThreeHalves, true, false),
        (Smoothness::FiveHalves, false, false),
        (Smoothness::ThreeHalves, true, true),
    ] {
        let mut rng = Stream::new(11, "field", u64::from(counts));
        let gp = exact(kernel(smoothness, timed.then_some(0.8)), counts);
        let context = seen(&gp, counts, 40, &mut rng);
        let posterior = gp.condition(&context)?;
        let at = visits(30, timed, &mut rng);
        let targets = sites(&at);
        let field = posterior.field(DRAWS, 1, 3.0)?;
        assert!(field.error() < 0.012, "{smoothness:?}: waves are off by {}", field.error());
        let drawn = field.at(&targets)?;
        let marginals = posterior.at(&targets)?.marginals(0, Of::Surface)?;
        let other = dense(&*posterior, &targets, DRAWS);
        // Covariances over draws, of ours about zero and of theirs about their mean.
        let ours: Vec<Vec<f64>> = (0..30)
            .map(|i| drawn.deviations[i * DRAWS..][..DRAWS].iter().map(|v| f64::from(*v)).collect())
            .collect();
        let theirs: Vec<Vec<f64>> = (0..30)
            .map(|i| {
                let mean = other.iter().map(|d| d[i]).sum::<f64>() / DRAWS as f64;
                other.iter().map(|d| d[i] - mean).collect()
            })
            .collect();
        let covariance = |x: &[Vec<f64>], i: usize, j: usize| {
            x[i].iter().zip(&x[j]).map(|(a, b)| a * b).sum::<f64>() / DRAWS as f64
        };
        let [mut apart, mut noise] = [0.0f64; 2];
        let mut variograms = [[[0.0; 2]; 6]; 2];
        for i in 0..30 {
            assert!((drawn.mean[i] - marginals.mean[i]).abs() < 1e-12);
            let sd = marginals.sd[i];
            assert!((drawn.sd[i] - sd).abs() < 1e-12);
            let off = ours[i].iter().sum::<f64>() / DRAWS as f64;
            // Five standard errors of the mean, six of the sd and two percent for the waves.
            assert!(off.abs() < 5.0 * sd / (DRAWS as f64).sqrt(), "{smoothness:?} mean {off}");
            let spread = covariance(&ours, i, i).sqrt() / sd;
            assert!(
                (spread - 1.0).abs() < 0.10,
                "{smoothness:?}: sd {spread} of what it should be"
            );
            for j in 0..i {
                let scale = sd * marginals.sd[j];
                let gap = covariance(&ours, i, j) - covariance(&theirs, i, j);
                apart += (gap / scale).powi(2);
                noise += 2.0 / DRAWS as f64;
                // Half squared differences by lag: the variogram of the posterior.
                let lag = (at[i][0] - at[j][0]).hypot(at[i][1] - at[j][1]);
                let bin = ((lag / 0.3) as usize).min(5);
                for (variogram, x) in variograms.iter_mut().zip([&ours, &theirs]) {
                    let both = covariance(x, i, i) + covariance(x, j, j);
                    variogram[bin][0] += 0.5 * both - covariance(x, i, j);
                    variogram[bin][1] += 1.0;
                }
            }
        }
        // Two sampled correlation matrices differ by their sampling; waves may add half of that.
        assert!(apart < 2.0 * noise, "{smoothness:?}: {apart} where sampling makes {noise}");
        let [ours, theirs] = variograms;
        for (bin, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            if ours[1] > 5.0 {
                let ratio = ours[0] / theirs[0];
                assert!(
                    (ratio - 1.0).abs() < 0.06,
                    "{smoothness:?}: variogram {ratio} in bin {bin}"
                );
            }
        }
    }
    Ok(())
}

/// With as many neighbours as sites, the nearest-neighbour process draws what the exact one does.
#[test]
fn both_processes_draw_alike() -> Result<()> {
    for (counts, timed) in [(false, false), (true, false), (false, true)] {
        let mut rng = Stream::new(12, "alike", 0);
        let gp = exact(kernel(Smoothness::ThreeHalves, timed.then_some(0.8)), counts);
        let context = seen(&gp, counts, 35, &mut rng);
        let likelihood = likelihood::find(if counts { "binomial" } else { "gaussian" })?;
        // Times stretched by a half, and the kernel's with them.
        let stretched = kernel(Smoothness::ThreeHalves, timed.then_some(0.4));
        let near = NearestGp::new(stretched, 0.15, -0.4, likelihood)?
            .stretched(if timed { 0.5 } else { 1.0 })?
            .uncertain_mean(4.0)
            .neighbours(35, 35);
        let targets = sites(&visits(25, timed, &mut rng));
        let (one, other) = (gp.condition(&context)?, near.condition(&context)?);
        const DRAWS: usize = 2000;
        let [one, other] =
            [&one, &other].map(|p| p.field(DRAWS, 3, 3.0).unwrap().at(&targets).unwrap());
        for i in 0..25 {
            assert!((one.mean[i] - other.mean[i]).abs() < 1e-4);
            assert!((one.sd[i] / other.sd[i] - 1.0).abs() < 1e-4);
            let sd = |d: &[f32]| {
                (d.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / DRAWS as f64).sqrt()
            };
            let row =
                |drawn: &isopleth::process::Drawn| sd(&drawn.deviations[i * DRAWS..][..DRAWS]);
            assert!((row(&one) / row(&other) - 1.0).abs() < 0.1, "{} {}", row(&one), row(&other));
            assert!(
                (row(&other) / other.sd[i] - 1.0).abs() < 0.08,
                "{}",
                row(&other) / other.sd[i]
            );
        }
    }
    Ok(())
}

/// Many neighbours of more: the marginals stay those of `at`, far from sites and near them.
#[test]
fn nearest_neighbours_draw_their_own_marginals() -> Result<()> {
    let mut rng = Stream::new(13, "near", 0);
    let gp = exact(kernel(Smoothness::Half, None), false);
    let context = seen(&gp, false, 600, &mut rng);
    let near = NearestGp::new(
        Box::new(matern(Smoothness::Half, 0.35, 1.4)),
        0.15,
        -0.4,
        likelihood::find("gaussian")?,
    )?
    .uncertain_mean(4.0);
    let posterior = near.condition(&context)?;
    let mut at = places(40, &mut rng);
    at.push(vec![2.5, 2.0]);
    let targets = sites(&at);
    const DRAWS: usize = 3000;
    let drawn = posterior.field(DRAWS, 4, 5.0)?.at(&targets)?;
    let marginals = posterior.at(&targets)?.marginals(0, Of::Surface)?;
    for i in 0..at.len() {
        assert!((drawn.mean[i] - marginals.mean[i]).abs() < 1e-6);
        let own = drawn.deviations[i * DRAWS..][..DRAWS].iter().map(|v| f64::from(*v));
        let sd = (own.map(|v| v * v).sum::<f64>() / DRAWS as f64).sqrt();
        assert!((sd / marginals.sd[i] - 1.0).abs() < 0.08, "{i}: {sd} {}", marginals.sd[i]);
    }
    Ok(())
}

fn grid(rows: usize, cols: usize) -> Grid {
    Grid {
        rows,
        cols,
        origin: [-1000.0, 1000.0],
        pixel: [2000.0 / cols as f64, -2000.0 / rows as f64],
        crs: Crs::from_user("local:m").unwrap(),
        valid: None,
        notes: Vec::new(),
    }
}

fn frame() -> Frame {
    Frame {
        plane: Crs::from_user("local:m").unwrap(),
        geometry: Default::default(),
        centre: vec![0.0, 0.0],
        metres_per_unit: 1000.0,
        y_mean: 0.0,
        y_sd: 1.0,
        clock: None,
        covariates: None,
    }
}

/// Every draw over a grid: `[pixel][draw]`, row-major pixels.
fn over(surfaces: &Surfaces, grid: &Grid, how: [usize; 2]) -> Vec<Vec<f32>> {
    let draws = surfaces.draws();
    let mut all = vec![Vec::new(); grid.len()];
    draws::run(
        surfaces,
        grid,
        how,
        &|window| grid.valid(window),
        &|_, _, values| Ok(values),
        &mut |_, blocks| {
            for (window, values) in blocks {
                for (i, values) in values.chunks(draws).enumerate() {
                    let row = window.row + i / window.cols;
                    all[row * grid.cols + window.col + i % window.cols] = values.to_vec();
                }
            }
            Ok(())
        },
    )
    .unwrap();
    all
}

/// Tiles and threads change no bit, and nobody can see where a block ends: steps across edges are no
/// larger than steps inside.
#[test]
fn seams_are_invisible() -> Result<()> {
    let mut rng = Stream::new(14, "seams", 0);
    let (grid, frame) = (grid(70, 100), frame());
    let gp = exact(kernel(Smoothness::ThreeHalves, None), true);
    let context = seen(&gp, true, 50, &mut rng);
    let near = NearestGp::new(
        Box::new(matern(Smoothness::ThreeHalves, 0.35, 1.4)),
        0.15,
        -0.4,
        likelihood::find("binomial")?,
    )?
    .neighbours(30, 12);
    let (own, other) = (gp.condition(&context)?, near.condition(&context)?);
    let extent = draws::extent(&grid, &frame);
    let (first, second) = (own.field(20, 1, extent)?, other.field(20, 1, extent)?);
    let all = [
        Surfaces::own(&*first, Link::Logit, &frame),
        Surfaces::own(&*second, Link::Logit, &frame),
        // Marginals of one process, dependence of the other.
        Surfaces::joined(&*other, CPU, &*first, Link::Logit, &frame),
    ];
    for (which, surfaces) in all.iter().enumerate() {
        let whole = over(surfaces, &grid, [4 * BLOCK, 1]);
        for how in [[BLOCK, 3], [2 * BLOCK, 2]] {
            let cut = over(surfaces, &grid, how);
            let same = whole.iter().flatten().zip(cut.iter().flatten());
            assert!(same.into_iter().all(|(a, b)| a.to_bits() == b.to_bits()), "{which}: {how:?}");
        }
        let [mut across, mut inside] = [[0.0f64; 2]; 2];
        for row in 0..70 {
            for col in 1..100 {
                let (a, b) = (&whole[row * 100 + col - 1], &whole[row * 100 + col]);
                let step = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                let here = if col % BLOCK == 0 { &mut across } else { &mut inside };
                *here = [here[0] + step, here[1] + 1.0];
            }
        }
        let ratio = ((across[0] / across[1]) / (inside[0] / inside[1])).sqrt();
        // Steps of few columns against those of many: they differ by chance.
        assert!(
            (0.8..1.2).contains(&ratio),
            "{which}: steps across edges are {ratio} of those inside"
        );
    }
    let refused = draws::run(
        &all[0],
        &grid,
        [BLOCK + 1, 1],
        &|w| grid.valid(w),
        &|_, _, v| Ok(v),
        &mut |_, _| Ok(()),
    );
    assert!(refused.unwrap_err().to_string().contains("whole blocks"));
    Ok(())
}

/// A frequency's share says how far out it lies: half of the spectral mass is within the half's, by
/// the variance of what a disc average keeps.
#[test]
fn frequencies_make_the_covariance() {
    for smoothness in Smoothness::all() {
        let kernel = matern(smoothness, 0.7, 2.0);
        const N: usize = 20_000;
        for lag in [[0.1, 0.0], [0.5, -0.4], [0.0, 1.6]] {
            let waved = (0..N).map(|j| {
                let turn = (j as f64 * 0.618_033_988_749_894_9).fract();
                let at = [(j as f64 + 0.5) / N as f64, turn];
                let frequency = kernel.frequency(&at).unwrap();
                (frequency[0] * lag[0] + frequency[1] * lag[1]).cos()
            });
            let waved = 2.0 * waved.sum::<f64>() / N as f64;
            let exact = kernel.covariance(&lag, &[0.0, 0.0]);
            assert!(
                (waved - exact).abs() < 0.01,
                "{smoothness:?} at {lag:?}: {waved}, not {exact}"
            );
        }
    }
    let globe = Matern { metric: Metric::GreatCircle, ..matern(Smoothness::Half, 1.0, 1.0) };
    assert!(globe.frequency(&[0.5, 0.1]).is_none());
}

/// Ninety in a hundred intervals of district means hold the truth, over many small countries whose
/// kernel is known; as if pixels strayed each for itself, far fewer would. `examples/district_coverage.rs`
/// is the whole of it.
#[test]
fn intervals_of_district_means_hold_what_they_should() -> Result<()> {
    use isopleth::{mapping::areas::Said, predictive::normal_quantile};
    const COUNTRIES: u64 = 120;
    let gp = exact(kernel(Smoothness::ThreeHalves, None), true);
    let gp = ExactGp::new(gp.kernel, 0.15, -0.4, likelihood::find("binomial")?)?;
    let frame = frame();
    let (mut joint, mut alone) = (0, 0);
    for country in 0..COUNTRIES {
        let mut rng = Stream::new(21, "country", country);
        let mut all = places(40, &mut rng);
        // A district of 8 × 8 pixels in the middle, and one in a corner.
        let pixel =
            |i: usize, at: f64| vec![at + 0.06 * (i % 8) as f64, at + 0.06 * (i / 8) as f64];
        all.extend((0..64).map(|i| pixel(i, -0.2)).chain((0..64).map(|i| pixel(i, 0.5))));
        let factor = Cholesky::factor(isopleth::kernel::matrix(&*gp.kernel, &all, &all))?;
        let surface = factor.colour(&rng.normals(all.len()));
        let noisy = surface[..40].iter().map(|f| gp.mean + f + gp.nugget.sqrt() * rng.normal());
        let noisy: Vec<f64> = noisy.collect();
        let seen: Vec<f64> =
            noisy.iter().map(|f| rng.binomial(40, Link::Logit.outcome(*f)) as f64).collect();
        let context = Observations::new(
            sites(&all[..40]),
            Tensor::from_vec(seen, (1, 40, 1), &CPU)?,
            Some(Tensor::from_vec(vec![40.0; 40], (1, 40), &CPU)?),
        )?;
        let posterior = gp.condition(&context)?;
        let field = posterior.field(200, country, 3.0)?;
        let surfaces = Surfaces::own(&*field, Link::Logit, &frame);
        for part in [40, 104] {
            let pixels = sites(&all[part..part + 64]);
            let truth = surface[part..part + 64].iter().map(|f| Link::Logit.outcome(gp.mean + f));
            let truth = truth.sum::<f64>() / 64.0;
            let values = surfaces.at(&pixels)?;
            let draw = |d: usize| {
                values.iter().skip(d).step_by(200).map(|v| f64::from(*v)).sum::<f64>() / 64.0
            };
            let said = Said::of(&(0..200).map(draw).collect::<Vec<_>>(), 0.9).unwrap();
            joint += usize::from((said.lower..=said.upper).contains(&truth));
            let marginals = posterior.at(&pixels)?.marginals(0, Of::Surface)?;
            let own = marginals.map(|m, i| m.mean_sd(i));
            let mean = own.iter().map(|m| m.0).sum::<f64>() / 64.0;
            let sd = own.iter().map(|m| m.1 * m.1).sum::<f64>().sqrt() / 64.0;
            alone += usize::from((truth - mean).abs() < normal_quantile(0.95) * sd);
        }
    }
    let share = |n: usize| n as f64 / (2 * COUNTRIES) as f64;
    // 240 intervals: a standard error of 0.019.
    assert!((0.84..=0.96).contains(&share(joint)), "{} of intervals hold", share(joint));
    assert!(share(alone) < 0.5, "pixels each for itself: {}", share(alone));
    Ok(())
}
