//! Survey design: what is promised of a site is what conditioning on it gives, and it beats chance.

use candle_core::{Device, Tensor};
use isopleth::{
    Observations, Of, Process, Result, Sites, Stream,
    baseline::ExactGp,
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood,
    linalg::lower,
    mapping::next::{Aim, Belief, exceedance},
};
use rayon::prelude::*;

const NUGGET: f64 = 0.1;
const LEVEL: f64 = 0.4;

fn matern() -> Matern {
    let smoothness = Smoothness::ThreeHalves;
    Matern { smoothness, length_scale: 0.4, sill: 1.0, metric: Metric::Euclidean }
}

fn gp() -> ExactGp {
    let gaussian = likelihood::find("gaussian").unwrap();
    ExactGp::new(Box::new(matern()), NUGGET, 0.0, gaussian).unwrap()
}

fn sites(xy: &[[f64; 2]]) -> Sites {
    Sites::new(Tensor::from_vec(xy.concat(), (1, xy.len(), 2), &Device::Cpu).unwrap())
}

fn seen(xy: &[[f64; 2]], y: &[f64]) -> Observations {
    let y = Tensor::from_vec(y.to_vec(), (1, y.len(), 1), &Device::Cpu).unwrap();
    Observations::new(sites(xy), y, None).unwrap()
}

fn belief(context: &Observations, at: &[[f64; 2]]) -> Result<Belief> {
    let [mean, covariance] = gp().belief(context, &sites(at))?;
    let n = at.len();
    Ok(Belief { mean, covariance, noise: vec![NUGGET; n], weight: vec![1.0; n] })
}

/// Pixels of the square, and a few sites.
fn square(side: usize, n: usize, rng: &mut Stream) -> [Vec<[f64; 2]>; 2] {
    let at = |i: usize| -1.0 + 2.0 * (i as f64 + 0.5) / side as f64;
    let pixels = (0..side * side).map(|i| [at(i / side), at(i % side)]).collect();
    [pixels, (0..n).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect()]
}

/// The variance that is left after each site is that of a process which saw one there, whatever it read.
#[test]
fn the_variance_promised_is_the_variance_found() -> Result<()> {
    let mut rng = Stream::new(1, "promised", 0);
    let [pixels, mut xy] = square(6, 7, &mut rng);
    let mut y = rng.normals(7);
    let belief = belief(&seen(&xy, &y), &pixels)?;
    let found = belief.propose(Aim::Variance, 3, &[true; 36], &|_, _| true)?;
    for proposal in &found {
        xy.push(pixels[proposal.place]);
        y.push(17.0);
        let after =
            gp().condition(&seen(&xy, &y))?.at(&sites(&pixels))?.marginals(0, Of::Surface)?;
        let left = after.sd.iter().map(|s| s * s).sum::<f64>() / 36.0;
        assert!((left - proposal.left).abs() < 1e-9, "{left} against {}", proposal.left);
    }
    // The first is the best of all single sites.
    let one = |c: usize| {
        let mut free = [false; 36];
        free[c] = true;
        belief.propose(Aim::Variance, 1, &free, &|_, _| true).unwrap()[0].left
    };
    let best = (0..36).map(one).fold(f64::INFINITY, f64::min);
    assert!((found[0].left - best).abs() < 1e-12);
    Ok(())
}

/// What is expected of p(1 − p) after a site: the closed form against readings drawn at that site.
#[test]
fn the_doubt_promised_is_the_doubt_found_on_average() -> Result<()> {
    let mut rng = Stream::new(2, "doubt", 0);
    let [pixels, xy] = square(5, 6, &mut rng);
    let y = rng.normals(6);
    let now = belief(&seen(&xy, &y), &pixels)?;
    let found = now.propose(Aim::Threshold(LEVEL), 1, &[true; 25], &|_, _| true)?;
    let (c, draws) = (found[0].place, 3000);
    let sd = (now.covariance[c * 25 + c] + NUGGET).sqrt();
    let mut total = 0.0;
    for _ in 0..draws {
        let read = now.mean[c] + sd * rng.normal();
        let (mut xy, mut y) = (xy.clone(), y.clone());
        xy.push(pixels[c]);
        y.push(read);
        let p = exceedance(&belief(&seen(&xy, &y), &pixels)?, LEVEL);
        total += p.iter().map(|p| p * (1.0 - p)).sum::<f64>() / 25.0;
    }
    let average = total / draws as f64;
    assert!((average - found[0].left).abs() < 0.001, "{average} against {}", found[0].left);
    assert!(found[0].gain > 0.003, "{:?}", found[0]);
    Ok(())
}

#[test]
fn places_that_are_not_free_or_too_near_are_left_alone() -> Result<()> {
    let mut rng = Stream::new(3, "free", 0);
    let [pixels, xy] = square(8, 5, &mut rng);
    let belief = belief(&seen(&xy, &[0.0; 5]), &pixels)?;
    let free: Vec<bool> = (0..64).map(|i| i % 3 != 0).collect();
    let gap = |a: usize, b: usize| (pixels[a][0] - pixels[b][0]).hypot(pixels[a][1] - pixels[b][1]);
    let found = belief.propose(Aim::Variance, 40, &free, &|a, b| gap(a, b) >= 0.6)?;
    assert!((4..30).contains(&found.len()), "{}", found.len());
    for (i, a) in found.iter().enumerate() {
        assert!(free[a.place] && a.gain >= 0.0);
        assert!(found[..i].iter().all(|b| gap(a.place, b.place) >= 0.6));
    }
    assert!(found.windows(2).all(|w| w[1].left <= w[0].left));
    Ok(())
}

/// Truth, map, plan, survey, map again: how often the second map is on the wrong side of the level, after
/// planned sites and after as many sites by chance.
fn paired(seed: u64) -> Result<[f64; 2]> {
    let mut rng = Stream::new(seed, "paired", 0);
    let (side, n, k) = (13, 15, 8);
    let [pixels, xy] = square(side, n, &mut rng);
    let all: Vec<[f64; 2]> = xy.iter().chain(&pixels).copied().collect();
    let kernel = matern();
    let flat = all.iter().flat_map(|a| all.iter().map(|b| kernel.covariance(a, b))).collect();
    let truth = lower(flat, all.len())?.colour(&rng.normals(all.len()));
    let y: Vec<f64> = truth[..n].iter().map(|t| t + NUGGET.sqrt() * rng.normal()).collect();
    let truth = &truth[n..];
    let free = vec![true; pixels.len()];
    let belief = belief(&seen(&xy, &y), &pixels)?;
    let planned = belief.propose(Aim::Threshold(LEVEL), k, &free, &|_, _| true)?;
    let planned: Vec<usize> = planned.iter().map(|p| p.place).collect();
    let mut wrong = |places: &[usize]| -> Result<f64> {
        let (mut xy, mut y) = (xy.clone(), y.clone());
        for place in places {
            xy.push(pixels[*place]);
            y.push(truth[*place] + NUGGET.sqrt() * rng.normal());
        }
        let after = gp().condition(&seen(&xy, &y))?.at(&sites(&pixels))?;
        let mean = after.marginals(0, Of::Surface)?.mean;
        let off = (0..pixels.len()).filter(|i| (mean[*i] > LEVEL) != (truth[*i] > LEVEL)).count();
        Ok(off as f64 / pixels.len() as f64)
    };
    let ours = wrong(&planned)?;
    let mut chance = 0.0;
    for draw in 0..4 {
        let order = Stream::new(seed, "chance", draw).permutation(pixels.len());
        chance += 0.25 * wrong(&order[..k])?;
    }
    Ok([ours, chance])
}

#[test]
fn a_plan_beats_chance_on_simulated_surfaces() -> Result<()> {
    let surfaces = 40;
    let found: Vec<[f64; 2]> = (0..surfaces).into_par_iter().map(paired).collect::<Result<_>>()?;
    let n = surfaces as f64;
    let gains: Vec<f64> = found.iter().map(|[ours, chance]| chance - ours).collect();
    let gain = gains.iter().sum::<f64>() / n;
    let error = (gains.iter().map(|g| (g - gain).powi(2)).sum::<f64>()).sqrt() / n;
    let chance = found.iter().map(|f| f[1]).sum::<f64>() / n;
    eprintln!("wrong side: {chance:.4} by chance, {gain:.4} ± {error:.4} less as planned");
    assert!(gain > 3.0 * error, "{gain} ± {error}, of {chance} by chance");
    Ok(())
}
