//! Processor time and scores of the nearest-neighbour Gaussian process at many sites, beside those of
//! the parameters that made them.
//!
//! ```text
//! cargo run --release --example vecchia_pace [SITES] [SEED] [values,counts,…] [fit]
//! ```
//!
//! Sites are uniform on a square of side 2; 10,000 more are held out, scattered, and so are those in a
//! tenth of the square that is left empty. The surface is Matérn 3/2 with length scale 0.15 and sill
//! 1, by 4,096 waves of random frequency; the village effect has variance 0.2, and values a nugget of
//! 0.2. Counts are of 1 … 5 tested.

use std::time::Instant;

use candle_core::{Device, Tensor};
use isopleth::{
    Link, Observations, Of, Process, Result, Sites, Stream,
    baseline::NearestGp,
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood,
    score::{Summary, Truth, forecasts},
};
use rayon::prelude::*;

const TARGETS: usize = 10_000;
const NUGGET: f64 = 0.2;
const MEAN: f64 = -1.0;

/// Processor time of this process so far, seconds, in steps of 10 ms; Linux only.
fn cpu_seconds() -> f64 {
    let said = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = said.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// What `work` takes, in seconds of processor time and on the wall, and what it gives.
fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let (cpu, wall) = (cpu_seconds(), Instant::now());
    let out = work();
    let (cpu, wall) = (cpu_seconds() - cpu, wall.elapsed().as_secs_f64());
    println!("  {what:<24} {cpu:7.1} s of processor time, {wall:7.1} s on the wall");
    out
}

fn kernel() -> Matern {
    Matern {
        smoothness: Smoothness::ThreeHalves,
        length_scale: 0.15,
        sill: 1.0,
        metric: Metric::Euclidean,
    }
}

/// A surface at places, without its mean.
fn surface(places: &[[f64; 2]], rng: &mut Stream) -> Vec<f64> {
    const WAVES: usize = 4096;
    let kernel = kernel();
    let waves: Vec<[f64; 3]> = (0..WAVES)
        .map(|_| {
            let at = [rng.unit(), rng.unit()];
            let frequency = kernel.frequency(&at).expect("a Matérn kernel");
            let (x, y) = (frequency[0], frequency[1]);
            [x, y, rng.uniform(0.0, std::f64::consts::TAU)]
        })
        .collect();
    let size = (2.0 * kernel.sill() / WAVES as f64).sqrt();
    let at = |p: &[f64; 2]| -> f64 {
        waves.iter().map(|[x, y, z]| (x * p[0] + y * p[1] + z).cos()).sum()
    };
    places.par_iter().map(|p| size * at(p)).collect()
}

/// In the empty tenth.
fn gap(p: &[f64; 2]) -> bool {
    p[0].hypot(p[1]) < (0.4f64 / std::f64::consts::PI).sqrt()
}

fn sites(places: &[[f64; 2]]) -> Result<Sites> {
    let flat: Vec<f64> = places.iter().flatten().copied().collect();
    Ok(Sites::new(Tensor::from_vec(flat, (1, places.len(), 2), &Device::Cpu)?))
}

fn column(values: Vec<f64>) -> Result<Tensor> {
    let n = values.len();
    Ok(Tensor::from_vec(values, (1, n, 1), &Device::Cpu)?)
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let n: usize = args.next().and_then(|a| a.parse().ok()).unwrap_or(100_000);
    let seed: u64 = args.next().and_then(|a| a.parse().ok()).unwrap_or(1);
    let kinds = args.next().unwrap_or_else(|| "values,counts".into());
    let fit = args.next().is_none_or(|a| a == "fit");

    let mut rng = Stream::new(seed, "places", 0);
    let mut place = |empty: bool| loop {
        let p = [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)];
        if !(empty && gap(&p)) {
            return p;
        }
    };
    let mut places: Vec<[f64; 2]> = (0..n).map(|_| place(true)).collect();
    places.extend((0..TARGETS).map(|_| place(false)));
    let truth = surface(&places, &mut Stream::new(seed, "surface", 0));
    let mut rng = Stream::new(seed, "villages", 0);
    let latent: Vec<f64> = truth.iter().map(|s| MEAN + s + NUGGET.sqrt() * rng.normal()).collect();
    let tested: Vec<f64> = latent.iter().map(|_| (1 + rng.below(5)) as f64).collect();
    let positive: Vec<f64> = (latent.iter().zip(&tested))
        .map(|(eta, n)| rng.binomial(*n as u64, Link::Logit.outcome(*eta)) as f64)
        .collect();
    let (context, targets) = (sites(&places[..n])?, sites(&places[n..])?);

    for kind in kinds.split(',') {
        let counts = kind == "counts";
        let likelihood = likelihood::find(if counts { "binomial" } else { "gaussian" })?;
        let (y, truths): (&[f64], Vec<Truth>) = if counts {
            let of =
                |i: usize| Truth::Count { positive: positive[i] as u64, tested: tested[i] as u64 };
            (&positive, (n..n + TARGETS).map(of).collect())
        } else {
            (&latent, latent[n..].iter().map(|v| Truth::Value(*v)).collect())
        };
        let trials = Tensor::from_vec(tested[..n].to_vec(), (1, n), &Device::Cpu)?;
        let trials = counts.then_some(trials);
        let seen = Observations::new(context.clone(), column(y[..n].to_vec())?, trials)?;
        println!("{n} {kind}, seed {seed}");
        let known = NearestGp::new(Box::new(kernel()), NUGGET, MEAN, likelihood)?;
        let mut processes = vec![("true parameters", known.uncertain_mean(25.0))];
        if fit {
            let fitted = timed("fit", || NearestGp::fit(&seen, likelihood))?;
            println!("  {fitted:?}, log marginal {:?}", fitted.log_marginal);
            processes.push(("fitted", fitted));
        }
        for (name, process) in &processes {
            println!("  {name}");
            let posterior = timed("condition", || process.condition(&seen))?;
            let said = timed("predict 10,000", || posterior.at(&targets))?;
            let observation = said.marginals(0, Of::Observation)?;
            let scored = forecasts(&observation, &truths)?;
            let surface = said.marginals(0, Of::Surface)?;
            let inside: Vec<usize> = (0..TARGETS).filter(|i| gap(&places[n + i])).collect();
            let outside: Vec<usize> = (0..TARGETS).filter(|i| !gap(&places[n + i])).collect();
            for (part, of) in [("among the sites", &outside), ("in the gap", &inside)] {
                let part_of =
                    |of: &[usize]| of.iter().map(|i| scored[*i].clone()).collect::<Vec<_>>();
                let summary = Summary::of(&part_of(of));
                let z = |i: &usize| (MEAN + truth[n + i] - surface.mean[*i]) / surface.sd[*i];
                let mean =
                    |f: &dyn Fn(&usize) -> f64| of.iter().map(f).sum::<f64>() / of.len() as f64;
                let log = mean(&|i| {
                    -0.5 * (z(i).powi(2) + std::f64::consts::TAU.ln()) - surface.sd[*i].ln()
                });
                let covered = mean(&|i| if z(i).abs() < 1.959_964 { 1.0 } else { 0.0 });
                let rmse = mean(&|i| (z(i) * surface.sd[*i]).powi(2)).sqrt();
                let sd = mean(&|i| surface.sd[*i].powi(2)).sqrt();
                let low = mean(&|i| z(i) * surface.sd[*i]);
                println!(
                    "    {part:<16} observation: log score {:.4}, CRPS {:.5}; surface: log score \
                     {log:.4}, RMSE {rmse:.4} where sd is {sd:.4}, too low by {low:.4}, \
                     {covered:.3} inside 95 %",
                    summary.log_score, summary.crps
                );
            }
        }
    }
    Ok(())
}
