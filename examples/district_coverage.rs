//! Whether intervals of district means hold what they should: many invented countries of 12 districts,
//! whose true means are known.
//!
//! ```text
//! cargo run --release --example district_coverage [COUNTRIES] [DRAWS] [WAY]
//! ```
//!
//! Each country has 60 villages at random places and 24 × 18 pixels. Three ways to its districts: the
//! exact Gaussian process that is told the country's own kernel, one that is fitted to its 60 villages
//! (as a map does it, and with the likeliest kernel alone), and the shipped model of prevalence, on countries of the prior that it was trained on. Beside the
//! interval from joint draws stands what adding up marginal variances would give.
//!
//! Ways whose name begins with `covariate` are countries where a covariate acts, smooth in space and more
//! or less of it than elsewhere in some districts: the exact process told all but the coefficient, and
//! those that a map fits.

use candle_core::{Device, Tensor};
use isopleth::{
    Link, Observations, Of, Posterior, Process, Result, Sites, Stream,
    baseline::{Coefficients, ExactGp, IntegratedGp, Regressed},
    checkpoint::Checkpoint,
    geo::{crs::Crs, frame::Frame},
    kernel::{Matern, Metric, Smoothness, gram},
    likelihood,
    linalg::Cholesky,
    mapping::{areas::Said, dependence, draws::Surfaces},
    task::design::Layout,
};
use rayon::prelude::*;

const VILLAGES: usize = 60;
const PIXELS: [usize; 2] = [18, 24];
const DISTRICTS: [usize; 2] = [3, 4];
const LEVEL: f64 = 0.9;

/// Villages, then the pixels of a country twice as wide as high … nearly.
fn places(rng: &mut Stream) -> Vec<[f64; 2]> {
    let [rows, cols] = PIXELS;
    let mut all: Vec<[f64; 2]> =
        (0..VILLAGES).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-0.75, 0.75)]).collect();
    all.extend((0..rows * cols).map(|i| {
        let along = |i: usize, of: usize| 2.0 * (i as f64 + 0.5) / of as f64 - 1.0;
        [along(i % cols, cols), 0.75 * along(i / cols, rows)]
    }));
    all
}

fn district(pixel: usize) -> usize {
    let [rows, cols] = PIXELS;
    (pixel / cols) * DISTRICTS[0] / rows * DISTRICTS[1] + (pixel % cols) * DISTRICTS[1] / cols
}

/// Means over districts of one number for each pixel.
fn means(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut sums = vec![0.0; DISTRICTS[0] * DISTRICTS[1]];
    for (pixel, value) in values.enumerate() {
        sums[district(pixel)] += value;
    }
    let each = (PIXELS[0] * PIXELS[1] / sums.len()) as f64;
    sums.iter().map(|sum| sum / each).collect()
}

/// How many districts a way held, and how wide its intervals were: jointly, and as if alone.
#[derive(Default, Clone, Copy)]
struct Held {
    joint: f64,
    alone: f64,
    wide: f64,
    narrow: f64,
    districts: f64,
}

impl Held {
    fn and(self, other: Held) -> Held {
        Held {
            joint: self.joint + other.joint,
            alone: self.alone + other.alone,
            wide: self.wide + other.wide,
            narrow: self.narrow + other.narrow,
            districts: self.districts + other.districts,
        }
    }
}

/// A country's districts by joint draws over its pixels, against the truth on the link scale.
fn judge(
    surfaces: &Surfaces,
    posterior: &dyn Posterior,
    pixels: &Sites,
    truth: &[f64],
) -> Result<Held> {
    let draws = surfaces.draws();
    let values = surfaces.at(pixels)?;
    let truth = means(truth.iter().map(|f| Link::Logit.outcome(*f)));
    let marginals = posterior.at(pixels)?.marginals(0, Of::Surface)?;
    let alone: Vec<(f64, f64)> = marginals.map(|m, i| m.mean_sd(i));
    let centre = means(alone.iter().map(|(mean, _)| *mean));
    let pixels = (PIXELS[0] * PIXELS[1] / truth.len()) as f64;
    let variance = means(alone.iter().map(|(_, sd)| sd * sd / pixels));
    let by_draw: Vec<Vec<f64>> = (0..draws)
        .map(|d| means(values.iter().skip(d).step_by(draws).map(|v| f64::from(*v))))
        .collect();
    let mut held = Held::default();
    for (i, truth) in truth.iter().enumerate() {
        let own: Vec<f64> = by_draw.iter().map(|means| means[i]).collect();
        let said = Said::of(&own, LEVEL).expect("there are draws");
        let half = isopleth::predictive::normal_quantile(0.5 + 0.5 * LEVEL) * variance[i].sqrt();
        held.joint += f64::from((said.lower..=said.upper).contains(truth));
        held.alone += f64::from((truth - centre[i]).abs() <= half);
        held.wide += said.upper - said.lower;
        held.narrow += 2.0 * half;
        held.districts += 1.0;
    }
    Ok(held)
}

fn frame() -> Result<Frame> {
    let plane = Crs::from_user("local:km")?;
    Ok(Frame {
        plane,
        geometry: Default::default(),
        centre: vec![0.0; 2],
        metres_per_unit: 1000.0,
        y_mean: 0.0,
        y_sd: 1.0,
        clock: None,
        covariates: None,
    })
}

/// What a Gaussian process knows of the country's.
#[derive(Clone, Copy)]
enum By {
    Told,
    Likeliest,
    All,
}

/// A country of a known Gaussian process.
fn by_gp(index: u64, draws: usize, how: By) -> Result<Held> {
    let mut rng = Stream::new(1, "country of a known process", index);
    let all = places(&mut rng);
    let smoothness = [Smoothness::Half, Smoothness::ThreeHalves][rng.below(2)];
    let kernel = Matern {
        smoothness,
        length_scale: rng.log_uniform(0.15, 0.9),
        sill: rng.uniform(0.4, 1.6),
        metric: Metric::Euclidean,
    };
    let (mean, nugget) = (rng.uniform(-2.0, 0.0), rng.uniform(0.05, 0.4));
    let surface = Cholesky::factor(gram(&kernel, &all))?.colour(&rng.normals(all.len()));
    let surface: Vec<f64> = surface.iter().map(|f| mean + f).collect();
    let tested = 50.0;
    let positive: Vec<f32> = surface[..VILLAGES]
        .iter()
        .map(|f| {
            let p = Link::Logit.outcome(f + nugget.sqrt() * rng.normal());
            rng.binomial(tested as u64, p) as f32
        })
        .collect();
    let cpu = &Device::Cpu;
    let context = Observations::new(
        Sites::plane(&all[..VILLAGES], cpu)?,
        Tensor::from_vec(positive, (1, VILLAGES, 1), cpu)?,
        Some((Tensor::ones((1, VILLAGES), candle_core::DType::F32, cpu)? * tested)?),
    )?;
    let likelihood = likelihood::find("binomial")?;
    let gp: Box<dyn Process> = match how {
        By::Told => Box::new(ExactGp::new(Box::new(kernel), nugget, mean, likelihood)?),
        By::Likeliest => Box::new(ExactGp::fit(&context, likelihood)?),
        By::All => Box::new(IntegratedGp::fit(&context, likelihood)?),
    };
    let posterior = gp.condition(&context)?;
    let field = posterior.field(draws, index, 2.5)?;
    let frame = frame()?;
    let surfaces = Surfaces::own(&*field, Link::Logit, &frame);
    judge(&surfaces, &*posterior, &Sites::plane(&all[VILLAGES..], cpu)?, &surface[VILLAGES..])
}

/// A country of the prior that a model was trained on.
fn by_model(checkpoint: &Checkpoint, index: u64, draws: usize) -> Result<Held> {
    let mut rng = Stream::new(1, "country of a prior", index);
    let layout =
        Layout { xy: places(&mut rng), t: Vec::new(), context: VILLAGES, first_target: VILLAGES };
    let tasks = checkpoint.recipe()?.tasks()?;
    let task = tasks.pack(tasks.draws_at(&layout, 1, &mut rng)?)?.task;
    let process = checkpoint.process(&Device::Cpu)?;
    let posterior = process.condition(&task.context)?;
    let mut some = Stream::new(1, "anchors", index).permutation(PIXELS[0] * PIXELS[1]);
    some.truncate(dependence::ANCHORS);
    let some: Vec<[f64; 2]> = some.iter().map(|pixel| layout.xy[VILLAGES + pixel]).collect();
    let anchors = Sites::plane(&some, &Device::Cpu)?;
    let moving = dependence::learned(
        (&*process, &*posterior),
        &task.context,
        &anchors,
        checkpoint.likelihood()?,
    )?;
    let conditioned = moving.condition(&task.context)?;
    let field = conditioned.field(draws, index, 2.5)?;
    let frame = frame()?;
    let surfaces = Surfaces::joined(&*posterior, Device::Cpu, &*field, Link::Logit, &frame);
    let truth: Vec<f32> = task.surface.flatten_all()?.to_vec1()?;
    let truth: Vec<f64> = truth.iter().map(|f| f64::from(*f)).collect();
    judge(&surfaces, &*posterior, &task.target.sites, &truth)
}

/// How a country with a covariate is mapped.
#[derive(Clone, Copy)]
enum Mapped<'a> {
    Told,
    Fitted,
    Vecchia,
    Model(&'a Checkpoint),
}

/// Sd of the coefficient's prior: per sd of the covariate, link scale.
const EFFECT: f64 = 0.8;

/// A country of a known Gaussian process where a covariate acts.
fn by_covariate(index: u64, draws: usize, mapped: Mapped) -> Result<Held> {
    let mut rng = Stream::new(1, "country with a covariate", index);
    let all = places(&mut rng);
    let matern = |smoothness, length_scale, sill| Matern {
        smoothness,
        length_scale,
        sill,
        metric: Metric::Euclidean,
    };
    let length_scale = rng.log_uniform(0.15, 0.9);
    let kernel = matern(Smoothness::ThreeHalves, length_scale, rng.uniform(0.3, 1.0));
    let (mean, nugget) = (rng.uniform(-2.0, 0.0), rng.uniform(0.05, 0.4));
    let terrain = matern(Smoothness::Half, rng.log_uniform(0.2, 1.0), 1.0);
    let draw = |kernel: &Matern, rng: &mut Stream| -> Result<Vec<f64>> {
        Ok(Cholesky::factor(gram(kernel, &all))?.colour(&rng.normals(all.len())))
    };
    let (rest, mut x) = (draw(&kernel, &mut rng)?, draw(&terrain, &mut rng)?);
    // As a frame does it: mean 0 and sd 1 at the villages.
    let (level, sd) = isopleth::sites::mean_sd(&x[..VILLAGES]);
    x.iter_mut().for_each(|x| *x = (*x - level) / sd);
    let beta = EFFECT * rng.normal();
    let surface: Vec<f64> = (0..all.len()).map(|i| mean + beta * x[i] + rest[i]).collect();
    let tested = 50.0;
    let positive: Vec<f32> = surface[..VILLAGES]
        .iter()
        .map(|f| {
            let p = Link::Logit.outcome(f + nugget.sqrt() * rng.normal());
            rng.binomial(50, p) as f32
        })
        .collect();
    let cpu = &Device::Cpu;
    let sites = |from: usize, to: usize| -> Result<Sites> {
        let mut sites = Sites::plane(&all[from..to], cpu)?;
        let x: Vec<f32> = x[from..to].iter().map(|x| *x as f32).collect();
        sites.x = Some(Tensor::from_vec(x, (1, to - from, 1), cpu)?);
        Ok(sites)
    };
    let context = Observations::new(
        sites(0, VILLAGES)?,
        Tensor::from_vec(positive, (1, VILLAGES, 1), cpu)?,
        Some((Tensor::ones((1, VILLAGES), candle_core::DType::F32, cpu)? * tested)?),
    )?;
    let (pixels, truth) = (sites(VILLAGES, all.len())?, &surface[VILLAGES..]);
    let (likelihood, frame) = (likelihood::find("binomial")?, frame()?);
    let own = |process: &dyn Process| -> Result<Held> {
        let posterior = process.condition(&context)?;
        let field = posterior.field(draws, index, 2.5)?;
        let surfaces = Surfaces::own(&*field, Link::Logit, &frame);
        judge(&surfaces, &*posterior, &pixels, truth)
    };
    match mapped {
        Mapped::Told => {
            let gp = ExactGp::new(Box::new(kernel), nugget, mean, likelihood)?;
            own(&gp.with_covariates(1, EFFECT * EFFECT)?)
        }
        Mapped::Fitted => own(&IntegratedGp::fit(&context, likelihood)?),
        Mapped::Vecchia => own(&Regressed::nearest(&context, likelihood, false)?.0),
        Mapped::Model(checkpoint) => {
            let (coefficients, _) = Coefficients::of(&context, likelihood)?;
            let process = checkpoint.process(cpu)?.into();
            let process = Regressed::new(process, coefficients.spread()?, likelihood, true);
            let posterior = process.condition(&context)?;
            let fitted = dependence::fitted(&context, likelihood)?;
            let conditioned = fitted.condition(&context)?;
            let field = conditioned.field(draws, index, 2.5)?;
            let surfaces = Surfaces::joined(&*posterior, Device::Cpu, &*field, Link::Logit, &frame);
            judge(&surfaces, &*posterior, &pixels, truth)
        }
    }
}

fn main() -> Result<()> {
    let number = |i: usize, default: usize| {
        std::env::args().nth(i).and_then(|n| n.parse().ok()).unwrap_or(default)
    };
    let (countries, draws) = (number(1, 500) as u64, number(2, 400));
    let checkpoint = Checkpoint::resolve("prevalence")?;
    type Way<'a> = Box<dyn Fn(u64) -> Result<Held> + Sync + 'a>;
    let with = |mapped| -> Way { Box::new(move |i| by_covariate(i, draws, mapped)) };
    let ways: [(&str, Way); 8] = [
        ("gp, told the kernel", Box::new(|i| by_gp(i, draws, By::Told))),
        ("prevalence", Box::new(|i| by_model(&checkpoint, i, draws))),
        ("gp, fitted", Box::new(|i| by_gp(i, draws, By::All))),
        ("gp, likeliest alone", Box::new(|i| by_gp(i, draws, By::Likeliest))),
        ("covariate: gp, told", with(Mapped::Told)),
        ("covariate: gp, fitted", with(Mapped::Fitted)),
        ("covariate: vecchia", with(Mapped::Vecchia)),
        ("covariate: prevalence", with(Mapped::Model(&checkpoint))),
    ];
    println!(
        "{countries} countries of 12 districts, {draws} draws: how many 90 % intervals hold the truth"
    );
    println!(
        "{:<22} {:>8} {:>8} {:>12} {:>12}",
        "", "joint", "alone", "joint width", "alone width"
    );
    let only = std::env::args().nth(3).unwrap_or_default();
    for (name, way) in ways.iter().filter(|(name, _)| name.contains(&only)) {
        let each: Vec<Held> = (0..countries).into_par_iter().map(way).collect::<Result<_>>()?;
        // Districts of a country move together: the standard error is over countries.
        let shares: Vec<f64> = each.iter().map(|h| h.joint / h.districts).collect();
        let n = shares.len() as f64;
        let share = shares.iter().sum::<f64>() / n;
        let se = (shares.iter().map(|s| (s - share).powi(2)).sum::<f64>() / n / (n - 1.0)).sqrt();
        let all = each.into_iter().fold(Held::default(), Held::and);
        let of = |v: f64| v / all.districts;
        println!(
            "{name:<22} {:>8.3} {:>8.3} {:>12.4} {:>12.4}   joint ± {se:.3}",
            of(all.joint),
            of(all.alone),
            of(all.wide),
            of(all.narrow)
        );
    }
    Ok(())
}
