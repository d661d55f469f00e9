//! Trained models in windows against the Gaussian process that made the data, at thousands of sites.
//!
//! ```text
//! cargo run --release --example large_surveys -- SITES LENGTH NUGGET LAYOUT SEEDS KERNEL CUT …
//! ```
//!
//! Sites are nodes of a lattice, the field exact on it (circulant embedding), LENGTH in spacings of evenly
//! spread sites, NUGGET an sd where the field's is 1. LAYOUT: `even`, `clustered`, `gaps`. KERNEL: `half`,
//! `three`. A CUT is SITES:FAR:CELL:BLEND[:SPAN], of the model `continuous`; `vecchia`; the name of a model,
//! which is shown all sites at once; or `local=FILE`, a model that was trained at [`DENSITY`] sites a unit
//! square and is shown them in that unit.

use std::time::Instant;

use candle_core::{Device, Tensor};
use isopleth::{
    Observations, Of, Predictive, Process, Result, Sites, Stream,
    baseline::NearestGp,
    checkpoint::Checkpoint,
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood,
    mapping::windows::{Cut, Windows},
    score::crps,
    sites::mean_sd,
};

/// Sites a unit square that the model of `local=FILE` was trained at.
const DENSITY: f64 = 125.0;

/// How far to stretch `sites` for [`DENSITY`] where they are: cells of some twenty sites are empty or not.
fn to_density(sites: &[[f64; 2]]) -> f64 {
    let side = (sites.len() as f64 / 20.0).sqrt().max(1.0);
    let mut cells: Vec<[i64; 2]> =
        sites.iter().map(|s| s.map(|x| (0.5 * (x + 1.0) * side).floor() as i64)).collect();
    cells.sort_unstable();
    cells.dedup();
    let area = cells.len() as f64 * (2.0 / side).powi(2);
    (sites.len() as f64 / area / DENSITY).sqrt()
}

/// In-place FFT of a power of two, unscaled; pairs (re, im).
fn fft(x: &mut [[f64; 2]]) {
    let n = x.len();
    let mut j = 0;
    for i in 1..n {
        let mut bit = n >> 1;
        while j & bit != 0 {
            j ^= bit;
            bit >>= 1;
        }
        j |= bit;
        if i < j {
            x.swap(i, j);
        }
    }
    let mut len = 2;
    while len <= n {
        let angle = -std::f64::consts::TAU / len as f64;
        let turn: Vec<[f64; 2]> =
            (0..len / 2).map(|k| [(angle * k as f64).cos(), (angle * k as f64).sin()]).collect();
        for block in x.chunks_mut(len) {
            for k in 0..len / 2 {
                let [c, s] = turn[k];
                let [a, b] = block[k + len / 2];
                let v = [a * c - b * s, a * s + b * c];
                let u = block[k];
                block[k] = [u[0] + v[0], u[1] + v[1]];
                block[k + len / 2] = [u[0] - v[0], u[1] - v[1]];
            }
        }
        len *= 2;
    }
}

fn fft2(x: &mut [[f64; 2]], n: usize) {
    for _ in 0..2 {
        x.chunks_mut(n).for_each(fft);
        for i in 0..n {
            for j in 0..i {
                x.swap(i * n + j, j * n + i);
            }
        }
    }
}

/// A field of sill 1 on `side`² nodes, `step` apart.
fn field(kernel: &dyn Kernel, side: usize, step: f64, rng: &mut Stream) -> Vec<f64> {
    let n = 2 * side;
    let mut c = vec![[0.0; 2]; n * n];
    for i in 0..n {
        for j in 0..n {
            let (a, b) = (i.min(n - i) as f64 * step, j.min(n - j) as f64 * step);
            c[i * n + j][0] = kernel.covariance(&[a, b], &[0.0, 0.0]);
        }
    }
    fft2(&mut c, n);
    let lost: f64 = c.iter().map(|v| v[0].min(0.0)).sum::<f64>() / (n * n) as f64;
    if lost < -1e-6 {
        println!("variance lost to the embedding: {lost:.2e}");
    }
    let scale = ((n * n) as f64).sqrt().recip();
    for v in &mut c {
        let sd = v[0].max(0.0).sqrt() * scale;
        *v = [sd * rng.normal(), sd * rng.normal()];
    }
    fft2(&mut c, n);
    (0..side * side).map(|k| c[k / side * n + k % side][0]).collect()
}

struct Line {
    surface: f64,
    observation: f64,
    covered: f64,
    observed: f64,
    seconds: f64,
}

fn score(p: &Predictive, surface: &[f64], seen: &[f64], seconds: f64) -> Result<Line> {
    let s = p.marginals(0, Of::Surface)?;
    let o = p.marginals(0, Of::Observation)?;
    let n = surface.len() as f64;
    let mean = |m: &isopleth::Marginals, t: &[f64]| {
        m.map(|m, i| crps::marginal(m, i, t[i])).iter().sum::<f64>() / n
    };
    let inside = |m: &isopleth::Marginals, t: &[f64]| {
        m.map(|m, i| {
            let q = m.cdf(i, t[i]);
            f64::from((0.025..=0.975).contains(&q))
        })
        .iter()
        .sum::<f64>()
            / n
    };
    Ok(Line {
        surface: mean(&s, surface),
        observation: mean(&o, seen),
        covered: inside(&s, surface),
        observed: inside(&o, seen),
        seconds,
    })
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize| args[i].parse::<f64>().expect("a number");
    let (n, length, nugget) = (number(0) as usize, number(1), number(2));
    let (layout, seeds, kernel) = (args[3].as_str(), number(4) as u64, args[5].as_str());
    let asked = 2_000;
    let gaussian = likelihood::find("gaussian")?;
    let model = Checkpoint::resolve("continuous")?.process(&Device::Cpu)?;
    let model: std::sync::Arc<dyn Process + Send + Sync> = model.into();
    let mut table: Vec<Vec<Line>> = args[6..].iter().map(|_| Vec::new()).collect();
    let mut floors = Vec::new();
    for seed in 1..=seeds {
        let mut rng = Stream::new(seed, "large surveys", n as u64);
        // Clusters need room to be cut out of.
        let wide = if layout == "clustered" { 8.0 } else { 2.0 };
        let side = ((wide * (n as f64).sqrt()).ceil() as usize).next_power_of_two();
        let step = 2.0 / side as f64;
        let spacing = 2.0 / (n as f64).sqrt();
        let smoothness = if kernel == "half" { Smoothness::Half } else { Smoothness::ThreeHalves };
        let truth = Matern {
            smoothness,
            length_scale: length * spacing,
            sill: 1.0,
            metric: Metric::Euclidean,
        };
        let z = field(&truth, side, step, &mut rng);
        let order = rng.permutation(side * side);
        let at = |k: usize| [(k % side) as f64 * step - 1.0, (k / side) as f64 * step - 1.0];
        // Clusters: a few hot spots hold most sites.
        let spots: Vec<[f64; 3]> = (0..12)
            .map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0), rng.log_uniform(0.02, 0.2)])
            .collect();
        let keep = |k: usize, u: f64| match layout {
            "clustered" => {
                let p = at(k);
                let near = spots
                    .iter()
                    .map(|s| (-((p[0] - s[0]).hypot(p[1] - s[1]) / s[2]).powi(2)).exp())
                    .fold(0.0, f64::max);
                u < 0.03 + 0.97 * near
            }
            "gaps" => {
                let p = at(k);
                !spots.iter().any(|s| (p[0] - s[0]).hypot(p[1] - s[1]) < s[2])
            }
            _ => true,
        };
        let chances: Vec<f64> = (0..order.len()).map(|_| rng.unit()).collect();
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for (k, u) in order.iter().zip(chances) {
            if keep(*k, u) && here.len() < n { here.push(*k) } else { there.push(*k) }
        }
        if layout == "clustered" {
            // Half of the targets like the sites, half anywhere.
            let like = here.split_off(here.len() - asked / 2);
            there.truncate(asked / 2);
            there.extend(like);
        } else {
            there.truncate(asked);
        }
        let noisy = |k: &usize, rng: &mut Stream| z[*k] + nugget * rng.normal();
        let y: Vec<f64> = here.iter().map(|k| noisy(k, &mut rng)).collect();
        let (mean, sd) = mean_sd(&y);
        let surface: Vec<f64> = there.iter().map(|k| (z[*k] - mean) / sd).collect();
        let seen: Vec<f64> = there.iter().map(|k| (noisy(k, &mut rng) - mean) / sd).collect();
        let y: Vec<f32> = y.iter().map(|v| ((v - mean) / sd) as f32).collect();
        let sites: Vec<[f64; 2]> = here.iter().map(|k| at(*k)).collect();
        let places: Vec<[f64; 2]> = there.iter().map(|k| at(*k)).collect();
        let count = sites.len();
        let y = Tensor::from_vec(y, (1, count, 1), &Device::Cpu)?;
        let context = Observations::new(Sites::plane(&sites, &Device::Cpu)?, y, None)?;
        let targets = Sites::plane(&places, &Device::Cpu)?;
        let kernel = Matern { sill: 1.0 / (sd * sd), ..truth };
        let gp = NearestGp::new(Box::new(kernel), (nugget / sd).powi(2), -mean / sd, gaussian)?
            .neighbours(30, 80);
        let floor = score(&gp.condition(&context)?.at(&targets)?, &surface, &seen, 0.0)?;
        for (cut, lines) in args[6..].iter().zip(&mut table) {
            let start = Instant::now();
            let said = match cut.as_str() {
                "vecchia" => {
                    NearestGp::fit(&context, gaussian)?.condition(&context)?.at(&targets)?
                }
                cut if cut.starts_with("local=") => {
                    let local = Checkpoint::resolve(&cut[6..])?.process(&Device::Cpu)?;
                    let by = to_density(&sites);
                    let far = |s: &[[f64; 2]]| -> Vec<[f64; 2]> {
                        s.iter().map(|s| s.map(|x| x * by)).collect()
                    };
                    let sites = Sites::plane(&far(&sites), &Device::Cpu)?;
                    let context = Observations { sites, ..context.clone() };
                    local.condition(&context)?.at(&Sites::plane(&far(&places), &Device::Cpu)?)?
                }
                cut if cut.starts_with(char::is_alphabetic) => {
                    let model = Checkpoint::resolve(cut)?.process(&Device::Cpu)?;
                    model.condition(&context)?.at(&targets)?
                }
                cut => {
                    let v: Vec<f64> =
                        cut.split(':').map(|v| v.parse().expect("a number")).collect();
                    let cut = Cut {
                        sites: v[0] as usize,
                        far: v[1],
                        cell: v[2],
                        blend: v[3] as usize,
                        span: v.get(4).copied().unwrap_or(1.0),
                    };
                    let windows = Windows::new(model.clone(), gaussian, cut)?;
                    windows.condition(&context)?.at(&targets)?
                }
            };
            let line = score(&said, &surface, &seen, start.elapsed().as_secs_f64())?;
            lines.push(Line {
                surface: line.surface / floor.surface,
                observation: line.observation / floor.observation,
                ..line
            });
        }
        floors.push(floor);
    }
    let mean = |lines: &[Line], of: fn(&Line) -> f64| {
        lines.iter().map(of).sum::<f64>() / lines.len() as f64
    };
    println!("{}", args[..6].join(" "));
    println!("{:<28} surface  inside  observed  inside  seconds", "");
    let row = |name: &str, lines: &[Line]| {
        println!(
            "{name:<28} {:7.4} {:7.4} {:9.4} {:7.4} {:8.1}",
            mean(lines, |l| l.surface),
            mean(lines, |l| l.covered),
            mean(lines, |l| l.observation),
            mean(lines, |l| l.observed),
            mean(lines, |l| l.seconds)
        );
    };
    row("floor (CRPS)", &floors);
    for (cut, lines) in args[6..].iter().zip(&table) {
        row(cut, lines);
    }
    Ok(())
}
