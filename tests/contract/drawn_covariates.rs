//! Joint draws with covariates: coefficients are drawn together with the surface.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use isopleth::{
    Link, Observations, Of, Process, Result, Sites, Stream,
    baseline::{Coefficients, ExactGp, NearestGp, Regressed},
    geo::{crs::Crs, frame::Frame},
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood,
    linalg::{Cholesky, lower},
    mapping::{areas::Said, dependence, draws::Surfaces},
    process::{Drawn, Field},
};
use rayon::prelude::*;

const CPU: Device = Device::Cpu;
const NUGGET: f64 = 0.15;
const MEAN: f64 = -0.4;
const DOUBT: f64 = 4.0;
/// Variance of the coefficients' prior.
const TAU: f64 = 0.9;
const DRAWS: usize = 3000;

fn kernel(sill: f64) -> Matern {
    let smoothness = Smoothness::ThreeHalves;
    Matern { smoothness, length_scale: 0.4, sill, metric: Metric::Euclidean }
}

fn tensor(values: Vec<f64>, shape: &[usize]) -> Tensor {
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

/// Places with their covariates.
#[derive(Clone)]
struct Places {
    xy: Vec<[f64; 2]>,
    z: Vec<Vec<f64>>,
}

impl Places {
    fn new(n: usize, rng: &mut Stream) -> Self {
        let xy = (0..n).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
        Places { xy, z: (0..n).map(|_| rng.normals(2)).collect() }
    }

    fn sites(&self) -> Sites {
        let n = self.xy.len();
        let mut sites = Sites::new(tensor(self.xy.concat(), &[1, n, 2]));
        sites.x = Some(tensor(self.z.concat(), &[1, n, self.z[0].len()]));
        sites
    }

    fn and(&self, other: &Places) -> Self {
        let xy = [&self.xy[..], &other.xy[..]].concat();
        Places { xy, z: [&self.z[..], &other.z[..]].concat() }
    }

    /// Covariance of the surface with its level and coefficients, by the book.
    fn covariance(&self, kernel: &dyn Kernel) -> Vec<Vec<f64>> {
        let alike = |i: usize, j: usize| -> f64 {
            self.z[i].iter().zip(&self.z[j]).map(|(a, b)| a * b).sum()
        };
        let one = |i: usize, j: usize| {
            kernel.covariance(&self.xy[i], &self.xy[j]) + DOUBT + TAU * alike(i, j)
        };
        let n = self.xy.len();
        (0..n).map(|i| (0..n).map(|j| one(i, j)).collect()).collect()
    }
}

fn process(counts: bool) -> ExactGp {
    let likelihood = likelihood::find(if counts { "binomial" } else { "gaussian" }).unwrap();
    let gp = ExactGp::new(Box::new(kernel(1.1)), NUGGET, MEAN, likelihood).unwrap();
    gp.uncertain_mean(DOUBT).with_covariates(2, TAU).unwrap()
}

/// What is seen at places of a surface with effects of 1 and −0.6.
fn seen(at: &Places, counts: bool, rng: &mut Stream) -> Observations {
    let n = at.xy.len();
    let gram = isopleth::kernel::gram(&kernel(1.1), &at.xy);
    let surface = Cholesky::factor(gram).unwrap().colour(&rng.normals(n));
    let noisy: Vec<f64> = (0..n)
        .map(|i| MEAN + surface[i] + at.z[i][0] - 0.6 * at.z[i][1] + NUGGET.sqrt() * rng.normal())
        .collect();
    if !counts {
        return Observations::new(at.sites(), tensor(noisy, &[1, n, 1]), None).unwrap();
    }
    let k = noisy.iter().map(|f| rng.binomial(40, Link::Logit.outcome(*f)) as f64).collect();
    let trials = Some(tensor(vec![40.0; n], &[1, n]));
    Observations::new(at.sites(), tensor(k, &[1, n, 1]), trials).unwrap()
}

/// The field's means and sds are those given, and over draws so are means, sds and correlations.
fn has_the_law(what: &str, drawn: &Drawn, mean: &[f64], covariance: &[Vec<f64>], close: f64) {
    let n = mean.len();
    assert_eq!(covariance.len(), n);
    let of: Vec<Vec<f64>> = drawn
        .deviations
        .chunks_exact(DRAWS)
        .map(|d| d.iter().map(|v| f64::from(*v)).collect())
        .collect();
    assert_eq!(of.len(), n);
    let [mut apart, mut noise] = [0.0; 2];
    for (i, mean) in mean.iter().enumerate() {
        let sd = covariance[i][i].sqrt();
        let (off, wide) = ((drawn.mean[i] - mean) / sd, drawn.sd[i] / sd);
        assert!(off.abs() < close, "{what}: mean {} for {mean}", drawn.mean[i]);
        assert!((wide - 1.0).abs() < close, "{what}: sd {} for {sd}", drawn.sd[i]);
        let own = of[i].iter().sum::<f64>() / DRAWS as f64;
        // Five standard errors of the mean; six of the sd, and what waves add to it.
        assert!(own.abs() < 5.0 * sd / (DRAWS as f64).sqrt(), "{what}: draws are off by {own}");
        let spread = (of[i].iter().map(|v| v * v).sum::<f64>() / DRAWS as f64).sqrt() / sd;
        assert!((spread - 1.0).abs() < 0.1, "{what}: draws have {spread} of the sd at {i}");
        for j in 0..i {
            let scale = sd * covariance[j][j].sqrt();
            let found = of[i].iter().zip(&of[j]).map(|(a, b)| a * b).sum::<f64>() / DRAWS as f64;
            let rho = covariance[i][j] / scale;
            apart += (found / scale - rho).powi(2);
            noise += (1.0 + rho * rho) / DRAWS as f64;
        }
    }
    assert!(apart < 2.0 * noise, "{what}: correlations {apart} apart where sampling makes {noise}");
}

/// Targets with covariates like the sites', with ones of ten sds, and twins that differ in them alone.
fn targets(rng: &mut Stream) -> Places {
    let mut to = Places::new(14, rng);
    to.z[0] = vec![10.0, 0.0];
    to.z[1] = vec![-3.0, 10.0];
    to.xy[3] = to.xy[2];
    to
}

/// Dense algebra that knows nothing of the code: values' joint posterior of surface and coefficients.
#[test]
fn coefficients_are_drawn_with_the_surface() -> Result<()> {
    let mut rng = Stream::new(31, "drawn covariates", 0);
    let (at, to) = (Places::new(40, &mut rng), targets(&mut rng));
    let context = seen(&at, false, &mut rng);
    let (n, m) = (at.xy.len(), to.xy.len());
    let all = at.and(&to).covariance(&kernel(1.1));
    let noisy = |i: usize, j: usize| all[i][j] + if i == j { NUGGET } else { 0.0 };
    let factor = lower((0..n * n).map(|k| noisy(k / n, k % n)).collect(), n)?;
    let y = context.y.flatten_all()?.to_vec1::<f64>()?;
    let solved = factor.solve(&y.iter().map(|y| y - MEAN).collect::<Vec<_>>());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mean: Vec<f64> = (0..m).map(|t| MEAN + dot(&all[n + t][..n], &solved)).collect();
    let told: Vec<Vec<f64>> = (0..m).map(|t| factor.solve(&all[n + t][..n])).collect();
    let one = |t: usize, u: usize| all[n + t][n + u] - dot(&all[n + t][..n], &told[u]);
    let covariance: Vec<Vec<f64>> = (0..m).map(|t| (0..m).map(|u| one(t, u)).collect()).collect();
    let gp = process(false);
    let posterior = gp.condition(&context)?;
    let field = posterior.field(DRAWS, 1, 3.0)?;
    has_the_law("exact", &field.at(&to.sites())?, &mean, &covariance, 1e-6);

    // The nearest-neighbour process given coefficients of the exact law, with every site for a neighbour.
    let law = gp.coefficients(&context)?;
    let near = NearestGp::new(Box::new(kernel(1.1)), NUGGET, MEAN, likelihood::find("gaussian")?)?;
    let near = near.uncertain_mean(DOUBT).neighbours(n, n);
    let taken = Regressed::near(Arc::new(near), law, likelihood::find("gaussian")?)?;
    let posterior = taken.condition(&context)?;
    let field = posterior.field(DRAWS, 2, 3.0)?;
    has_the_law("nearest", &field.at(&to.sites())?, &mean, &covariance, 1e-4);
    // It has the mean and sd of its own mixture too.
    let own = posterior.at(&to.sites())?.marginals(0, Of::Surface)?;
    for (t, mean) in mean.iter().enumerate() {
        let (a, s) = own.mean_sd(t);
        assert!((a - mean).abs() < 1e-6 && (s * s / covariance[t][t] - 1.0).abs() < 1e-6);
    }
    Ok(())
}

/// Counts: Laplace's approximation of the same, and of the nearest-neighbour process nearly so.
#[test]
fn coefficients_of_counts_are_drawn_with_the_surface() -> Result<()> {
    let mut rng = Stream::new(32, "drawn covariates", 1);
    let (at, to) = (Places::new(45, &mut rng), targets(&mut rng));
    let context = seen(&at, true, &mut rng);
    let gp = process(true);
    let m = to.xy.len();
    let [mean, flat] = gp.belief(&context, &to.sites())?;
    let covariance: Vec<Vec<f64>> = flat.chunks(m).map(<[f64]>::to_vec).collect();
    let posterior = gp.condition(&context)?;
    has_the_law(
        "exact",
        &posterior.field(DRAWS, 3, 3.0)?.at(&to.sites())?,
        &mean,
        &covariance,
        1e-6,
    );
    let near = NearestGp::new(Box::new(kernel(1.1)), NUGGET, MEAN, likelihood::find("binomial")?)?;
    let near = near.uncertain_mean(DOUBT).neighbours(45, 45);
    let law = gp.coefficients(&context)?;
    let taken = Regressed::near(Arc::new(near), law, likelihood::find("binomial")?)?;
    let drawn = taken.condition(&context)?;
    let drawn = drawn.field(DRAWS, 4, 3.0)?.at(&to.sites())?;
    for (t, mean) in mean.iter().enumerate() {
        let sd = covariance[t][t].sqrt();
        let (off, wide) = ((drawn.mean[t] - mean) / sd, drawn.sd[t] / sd);
        assert!(off.abs() < 0.2 && (wide - 1.0).abs() < 0.1, "{t}: {off} sds, {wide} as wide");
    }
    Ok(())
}

/// What is asked with a place changes no draw at it; more draws change none of the first; sites without
/// covariates are refused; and a posterior of several rows has no field.
#[test]
fn draws_with_covariates_hang_on_the_place_alone() -> Result<()> {
    let mut rng = Stream::new(33, "drawn covariates", 2);
    let (at, to) = (Places::new(30, &mut rng), Places::new(20, &mut rng));
    let context = seen(&at, false, &mut rng);
    let gp = process(false);
    let near = NearestGp::new(Box::new(kernel(1.1)), NUGGET, MEAN, likelihood::find("gaussian")?)?;
    let near = Arc::new(near.uncertain_mean(DOUBT).neighbours(20, 12));
    let law = gp.coefficients(&context)?;
    let taken = Regressed::near(near, law, likelihood::find("gaussian")?)?;
    for process in [&gp as &dyn Process, &taken] {
        let posterior = process.condition(&context)?;
        let (field, more) = (posterior.field(8, 5, 3.0)?, posterior.field(40, 5, 3.0)?);
        let whole = field.at(&to.sites())?;
        for i in 0..20 {
            let alone = Places { xy: vec![to.xy[i]], z: vec![to.z[i].clone()] };
            let one = field.at(&alone.sites())?;
            let all = &whole.deviations[8 * i..8 * i + 8];
            for (a, b) in one.deviations.iter().zip(all) {
                assert!((a - b).abs() < 1e-5, "{a} alone, {b} among others");
            }
            for (a, b) in more.at(&alone.sites())?.deviations.iter().zip(all) {
                assert!((a - b).abs() < 1e-4, "{a} of many draws, {b} of few");
            }
        }
        let bare = Sites { x: None, ..to.sites() };
        let error = field.at(&bare).unwrap_err().to_string();
        assert!(error.contains("covariates"), "{error}");
    }
    Ok(())
}

/// A country with a covariate that acts: villages, then the pixels of a district; the truth of the
/// district's mean.
fn country(index: u64) -> Result<(Observations, Places, f64)> {
    let mut rng = Stream::new(34, "country with a covariate", index);
    let mut at = Places::new(45, &mut rng);
    let pixel = |i: usize| [-0.3 + 0.09 * (i % 8) as f64, 0.1 + 0.09 * (i / 8) as f64];
    let pixels = Places { xy: (0..64).map(pixel).collect(), z: vec![Vec::new(); 64] };
    let mut all = Places { xy: [&at.xy[..], &pixels.xy[..]].concat(), z: Vec::new() };
    // Smooth in space, as covariates are, and more than elsewhere in the district.
    let smooth = Matern { length_scale: 0.7, ..kernel(1.0) };
    let draw = |kernel: &Matern, rng: &mut Stream| -> Result<Vec<f64>> {
        let n = all.xy.len();
        let gram = isopleth::kernel::gram(kernel, &all.xy);
        Ok(Cholesky::factor(gram)?.colour(&rng.normals(n)))
    };
    let (one, rest) = (draw(&smooth, &mut rng)?, draw(&kernel(0.5), &mut rng)?);
    let beta = TAU.sqrt() * rng.normal();
    all.z = one.iter().enumerate().map(|(i, z)| vec![z + f64::from(i >= 45)]).collect();
    at.z = all.z[..45].to_vec();
    let eta: Vec<f64> = (0..all.xy.len()).map(|i| -1.0 + beta * all.z[i][0] + rest[i]).collect();
    let seen = eta[..45].iter().map(|f| f + NUGGET.sqrt() * rng.normal());
    let seen: Vec<f64> = seen.collect();
    let k = seen.iter().map(|f| rng.binomial(50, Link::Logit.outcome(*f)) as f64).collect();
    let trials = Some(tensor(vec![50.0; 45], &[1, 45]));
    let context = Observations::new(at.sites(), tensor(k, &[1, 45, 1]), trials)?;
    let truth = eta[45..].iter().map(|f| Link::Logit.outcome(*f)).sum::<f64>() / 64.0;
    Ok((context, Places { xy: all.xy[45..].to_vec(), z: all.z[45..].to_vec() }, truth))
}

/// Ninety in a hundred intervals of a district's mean hold the truth where its covariates are unlike those
/// of the sites; with coefficients that are taken for known, fewer do. The whole of it is
/// `examples/district_coverage.rs`.
#[test]
fn intervals_of_districts_with_a_covariate_hold_what_they_should() -> Result<()> {
    const COUNTRIES: u64 = 160;
    const DRAWS: usize = 150;
    let frame = Frame {
        plane: Crs::from_user("local:m")?,
        geometry: Default::default(),
        centre: vec![0.0, 0.0],
        metres_per_unit: 1000.0,
        y_mean: 0.0,
        y_sd: 1.0,
        clock: None,
        covariates: None,
    };
    let binomial = likelihood::find("binomial")?;
    let gp =
        ExactGp::new(Box::new(kernel(0.5)), NUGGET, -1.0, binomial)?.with_covariates(1, TAU)?;
    let one = |index: u64| -> Result<[bool; 2]> {
        let (context, pixels, truth) = country(index)?;
        let held = |field: &dyn Field| -> Result<bool> {
            let values = Surfaces::own(field, Link::Logit, &frame).at(&pixels.sites())?;
            let draw = |d: usize| {
                values.iter().skip(d).step_by(DRAWS).map(|v| f64::from(*v)).sum::<f64>() / 64.0
            };
            let said = Said::of(&(0..DRAWS).map(draw).collect::<Vec<_>>(), 0.9).unwrap();
            Ok((said.lower..=said.upper).contains(&truth))
        };
        let drawn = held(&*gp.condition(&context)?.field(DRAWS, index, 3.0)?)?;
        // The same with coefficients at their mean.
        let law = gp.coefficients(&context)?;
        let sure = Coefficients { covariance: vec![1e-12], ..law };
        let near = NearestGp::new(Box::new(kernel(0.5)), NUGGET, -1.0, binomial)?;
        let near = Arc::new(near.neighbours(45, 45));
        let taken = Regressed::near(near, sure, binomial)?;
        let known = held(&*taken.condition(&context)?.field(DRAWS, index, 3.0)?)?;
        Ok([drawn, known])
    };
    let all = (0..COUNTRIES).into_par_iter().map(one).collect::<Result<Vec<_>>>()?;
    let share = |k: usize| all.iter().filter(|h| h[k]).count() as f64 / COUNTRIES as f64;
    // 160 intervals: a standard error of 0.024.
    assert!((0.83..=0.96).contains(&share(0)), "{} of intervals hold", share(0));
    assert!(share(1) < share(0) - 0.03, "coefficients taken for known: {}", share(1));
    Ok(())
}

/// The dependence of a network's places: with covariates for few sites and for many.
#[test]
fn a_fitted_dependence_knows_the_covariates() -> Result<()> {
    let mut rng = Stream::new(35, "drawn covariates", 3);
    let (at, to) = (Places::new(60, &mut rng), targets(&mut rng));
    let context = seen(&at, false, &mut rng);
    let fitted = dependence::fitted(&context, likelihood::find("gaussian")?)?;
    let (few, near) = (fitted.condition(&context)?, {
        Regressed::nearest(&context, likelihood::find("gaussian")?, false)?.0
    });
    let many = near.condition(&context)?;
    for posterior in [&few, &many] {
        let drawn = posterior.field(400, 1, 3.0)?.at(&to.sites())?;
        // Twins in space part by what their covariates say.
        let apart = (drawn.mean[2] - drawn.mean[3]).abs();
        let said = (to.z[2][0] - to.z[3][0]) - 0.6 * (to.z[2][1] - to.z[3][1]);
        assert!((apart - said.abs()).abs() < 0.5, "{apart} for {said}");
        // Far from every site's covariates little is known.
        assert!(drawn.sd[0] > 1.2 * drawn.sd[4] && drawn.sd[1] > 1.2 * drawn.sd[4]);
    }
    Ok(())
}
