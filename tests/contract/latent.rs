//! Laws of latent variables, and the published sizes of the family.

use candle_core::{DType, Device, Tensor, Var};
use isopleth::{
    Observations, Of, Process, Result, Sites, Stream, Task, likelihood,
    model::{
        self, Problem, dnp,
        latent::{self, Bound, Normal},
        params::Params,
    },
    process::Reward,
    task::Tasks,
    train::optimiser::{Optimiser, Rule},
};

const CPU: Device = Device::Cpu;

fn host(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

fn normal(seed: u64, width: usize) -> Result<Normal> {
    let mut rng = Stream::new(seed, "law", 0);
    let raw = latent::noise(&mut rng, (2, 1, 2 * width), &Tensor::zeros(1, DType::F64, &CPU)?)?;
    Normal::from_raw(&(raw * 2.0)?)
}

fn built(table: &str, dim: usize, params: &mut Params) -> Result<Box<dyn Process + Send + Sync>> {
    let problem = Problem::new(dim, likelihood::find("gaussian")?);
    model::build(&table.parse().unwrap(), problem, params)
}

/// A public implementation of this divergence was wrong for years. This one is the mean of
/// ln q − ln p over draws from q.
#[test]
fn the_divergence_is_what_draws_say() -> Result<()> {
    let (width, n) = (3, 40_000);
    let (q, p) = (normal(1, width)?, normal(2, width)?);
    let z = q.at(&latent::noise(&mut Stream::new(3, "draws", 0), (2, n, width), &q.mean)?)?;
    let density = |law: &Normal| -> Result<Tensor> {
        let off = z.broadcast_sub(&law.mean)?.broadcast_div(&law.sd)?;
        Ok((off.sqr()? * -0.5)?.broadcast_sub(&law.sd.log()?)?.sum(2)?)
    };
    let gaps = (density(&q)? - density(&p)?)?; // [2, n]
    for row in 0..2 {
        let gaps = host(&gaps.narrow(0, row, 1)?);
        let mean = gaps.iter().sum::<f64>() / n as f64;
        let error = (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>()).sqrt() / n as f64;
        let closed = host(&q.divergence(&p)?)[row];
        assert!((closed - mean).abs() < 4.0 * error, "{closed} and {mean} ± {error}");
        assert!(closed > 10.0 * error, "too close to say");
    }
    assert_eq!(host(&q.divergence(&q)?), [0.0, 0.0]);
    Ok(())
}

/// Where posterior and prior are one law, weights say nothing and all three bounds are of the
/// likelihood alone; with one draw importance weighting is the evidence lower bound on average.
#[test]
fn bounds_agree_where_they_must() -> Result<()> {
    let (width, k, targets) = (3, 6, 5);
    let (q, p) = (normal(1, width)?, normal(2, width)?);
    let mut rng = Stream::new(4, "draws", 0);
    let z = q.at(&latent::noise(&mut rng, (2, k, width), &q.mean)?)?;
    let fit = (latent::noise(&mut rng, (2, k, 1), &q.mean)?.squeeze(2)? * 2.0)?;
    let loss = |bound, prior: &Normal, posterior: Option<&Normal>| -> Result<(f64, Vec<_>)> {
        let found = latent::objective(bound, &fit, &z, prior, posterior, targets)?;
        Ok((host(&found.loss)[0], found.measured))
    };
    let (importance, measured) = loss(Bound::Importance, &q, Some(&q))?;
    let (likelihood, _) = loss(Bound::MaximumLikelihood, &q, None)?;
    assert!((importance - likelihood).abs() < 1e-12, "{importance} and {likelihood}");
    assert_eq!(measured[0], ("kl", 0.0));
    assert!(measured[1].0 == "ess" && (1.0..k as f64).contains(&measured[1].1), "{measured:?}");
    let rows: Vec<Vec<f64>> = fit.to_vec2()?;
    let by_hand = rows
        .iter()
        .map(|row| (row.iter().map(|x| x.exp()).sum::<f64>() / k as f64).ln() / targets as f64);
    assert!((likelihood + by_hand.sum::<f64>() / 2.0).abs() < 1e-12);
    let (elbo, measured) = loss(Bound::Elbo, &p, Some(&q))?;
    let divergence = host(&q.divergence(&p)?).iter().sum::<f64>() / 2.0;
    assert_eq!(measured, [("kl", divergence)]);
    let by_hand = (divergence - host(&fit).iter().sum::<f64>() / (2 * k) as f64) / targets as f64;
    assert!((elbo - by_hand).abs() < 1e-12);
    // Where the fit does not depend on z the evidence lower bound is −KL; the importance-weighted one
    // is the log of a mean of weights that average 1.
    let near = Normal { mean: (&q.mean + 0.2)?, sd: q.sd.clone() };
    let divergence = host(&q.divergence(&near)?).iter().sum::<f64>() / 2.0;
    let n = 20_000;
    let z = q.at(&latent::noise(&mut rng, (2, n, width), &q.mean)?)?;
    let flat = Tensor::zeros((2, n), DType::F64, &CPU)?;
    let many = latent::objective(Bound::Importance, &flat, &z, &near, Some(&q), 1)?;
    let bound = -host(&many.loss)[0];
    assert!(divergence > 0.1 && bound.abs() < 0.05, "{bound} where the divergence is {divergence}");
    Ok(())
}

/// Counted from the published code of BNP and TNP for one coordinate and one outcome.
#[test]
fn the_defaults_have_the_published_numbers_of_parameters() -> Result<()> {
    for (kind, published) in
        [("cnp", 215_682), ("np", 232_194), ("anp", 348_418), ("canp", 331_906)]
    {
        let mut params = Params::new(1, &CPU, DType::F32);
        built(&format!("kind = '{kind}'\nhead = {{ nugget = false }}"), 1, &mut params)?;
        assert_eq!(params.count(), published, "{kind}");
    }
    Ok(())
}

fn task(rows: usize, context: usize, targets: usize) -> Result<Task> {
    let mut rng = Stream::new(9, "task", 0);
    let like = Tensor::zeros(1, DType::F32, &CPU)?;
    let mut some = |n| latent::noise(&mut rng, (rows, n, 1), &like);
    let observed = |s: Tensor, y: &Tensor| Observations::new(Sites::new(s), y.clone(), None);
    let (y, truth) = (some(context)?, some(targets)?);
    Ok(Task {
        context: observed(some(context)?, &y)?,
        target: observed(some(targets)?, &truth)?,
        surface: truth.clone(),
        noisy: truth,
        hyper: None,
    })
}

const LATENT: [&str; 2] = ["kind = 'np'\nwidth = 8", "kind = 'anp'\nwidth = 8\nheads = 2"];

/// What training weighs by hand: the maximum likelihood objective with many draws is the joint
/// density that a posterior with many draws knows.
#[test]
fn maximum_likelihood_is_the_joint_density() -> Result<()> {
    for table in LATENT {
        let table = format!(
            "{table}\nlatent = {{ objective = 'maximum-likelihood', samples = 4000, ask = 4000 }}"
        );
        let model = built(&table, 1, &mut Params::new(2, &CPU, DType::F64))?;
        let mut task = task(2, 4, 3)?;
        let double = |x: &Tensor| x.to_dtype(DType::F64);
        for seen in [&mut task.context, &mut task.target] {
            (seen.sites.s, seen.y) = (double(&seen.sites.s)?, double(&seen.y)?);
            seen.mask = double(&seen.mask)?;
        }
        (task.surface, task.noisy) = (double(&task.surface)?, double(&task.noisy)?);
        let mut rng = Stream::new(1, "objective", 0);
        let learnt = model.objective(&task, Reward::Observation, &mut rng)?.unwrap();
        let posterior = model.condition(&task.context)?;
        let joint = posterior.joint(&task.target.sites, Of::Observation, &task.noisy)?.unwrap();
        let joint = host(&joint).iter().sum::<f64>() / 6.0;
        assert!((joint + host(&learnt.loss)[0]).abs() < 2e-2, "{table}: {joint}, {learnt:?}");
        // One target's joint density is its marginal one: the same draws are behind both.
        let one = task.target.sites.narrow(0, 1)?;
        let value = task.noisy.narrow(1, 0, 1)?;
        let joint = posterior.joint(&one, Of::Observation, &value)?.unwrap();
        let alone = posterior.at(&one)?.log_prob(Of::Observation, &value)?.squeeze(1)?;
        for (joint, alone) in host(&joint).iter().zip(host(&alone)) {
            assert!((joint - alone).abs() < 1e-10, "{table}: {joint} and {alone}");
        }
    }
    Ok(())
}

/// A draw is one surface: asked in parts under the same stream it is the same, and over many draws
/// its mean is the predictive's.
#[test]
fn draws_are_surfaces() -> Result<()> {
    for table in LATENT {
        let model = built(table, 1, &mut Params::new(2, &CPU, DType::F32))?;
        let task = task(1, 4, 300)?;
        let posterior = model.condition(&task.context)?;
        let draw = |sites: &Sites, n| -> Result<Tensor> {
            Ok(posterior.draws(sites, n, &mut Stream::new(5, "draws", 0))?.values)
        };
        let whole = draw(&task.target.sites, 40)?;
        let part = draw(&task.target.sites.narrow(270, 20)?, 40)?;
        let apart = (whole.narrow(1, 270, 20)? - part)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(apart < 1e-5, "{table}: parts are {apart:e} apart");
        let many = draw(&task.target.sites, 4000)?.mean(0)?;
        let law = posterior.at(&task.target.sites)?;
        let mean = (law.log_weight.exp()? * &law.mean)?.sum(2)?.squeeze(0)?;
        let spread = law.mean.squeeze(0)?;
        let spread = spread.broadcast_sub(&spread.mean_keepdim(1)?)?.sqr()?.mean(1)?.sqrt()?;
        // The predictive's own mean is over 32 draws: four standard errors of that.
        let off = (many.squeeze(1)? - mean)?.abs()?;
        let slack = ((spread * (4.0 / 32f64.sqrt()))? + 1e-3)?;
        assert!(host(&(off - slack)?).iter().all(|x| *x < 0.0), "{table}");
    }
    Ok(())
}

/// The penalty's gradient holds singular vectors fixed, and is exact all the same.
#[test]
fn the_penalty_has_the_slope_of_its_value() -> Result<()> {
    let mut rng = Stream::new(6, "weights", 0);
    for (shape, scale) in
        [((5, 7), 0.6), ((7, 5), 0.6), ((6, 6), 0.1), ((1, 6), 1.5), ((2, 4), 0.02)]
    {
        let values: Vec<f64> = rng.normals(shape.0 * shape.1).iter().map(|x| scale * x).collect();
        let along = rng.normals(values.len());
        let at = |h: f64| -> Result<(f64, Vec<f64>, [f64; 2])> {
            let there: Vec<f64> = values.iter().zip(&along).map(|(x, d)| x + h * d).collect();
            let weight = Var::from_vec(there, shape, &CPU)?;
            let (penalty, extremes) = dnp::penalty(&[weight.as_tensor()], 0.1, 1.0)?;
            let slope = host(penalty.backward()?.get(weight.as_tensor()).unwrap());
            Ok((host(&penalty)[0], slope, extremes))
        };
        let (value, slope, [least, most]) = at(0.0)?;
        let by_hand = (most - 1.0).max(0.0).powi(2) + (0.1 - least).max(0.0).powi(2);
        assert!((value - by_hand).abs() < 1e-12 && value > 1e-4, "{shape:?}: {value}, {by_hand}");
        let h = 1e-6;
        let numeric = (at(h)?.0 - at(-h)?.0) / (2.0 * h);
        let analytic: f64 = slope.iter().zip(&along).map(|(g, d)| g * d).sum();
        assert!(
            (numeric - analytic).abs() < 1e-6 * (1.0 + numeric.abs()),
            "{shape:?}: {numeric}, {analytic}"
        );
    }
    Ok(())
}

/// A short training takes the layers of the embedding into their bounds, and keeps them there. They start
/// at 1, where the usual bounds would leave nothing to do.
#[test]
fn the_bounds_of_distances_hold_after_a_short_training() -> Result<()> {
    let recipe = "prior = { kind = 'gp' }\ndesign = { targets = 10, line = true }\n\
                  task = { likelihood = 'gaussian', share = 8 }";
    let tasks = Tasks::new(&recipe.parse().unwrap())?;
    let mut params = Params::new(3, &CPU, DType::F32);
    let model =
        built("kind = 'dnp'\nwidth = 12\nlatent = 6\nembed = 12\nmost = 0.5", 1, &mut params)?;
    let mut optimiser = Optimiser::new(Rule::Adamw, 0.0, params.vars());
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for step in 0..500 {
        let task = tasks.batch(1, step, 8, 12)?.task;
        let mut rng = Stream::new(1, "objective", step);
        let found = model.objective(&task, Reward::Observation, &mut rng)?.unwrap();
        if step == 0 {
            first = found.measured.clone();
        }
        last = found.measured;
        optimiser.update(params.vars(), &[found.loss.backward()?], 1e-2, 1.0)?;
    }
    let of = |measured: &[(&str, f64)], name| measured.iter().find(|m| m.0 == name).unwrap().1;
    assert!(of(&first, "penalty") > 0.1, "{first:?}: nothing to learn");
    let (least, most) = (of(&last, "sigma_min"), of(&last, "sigma_max"));
    assert!(least > 0.1 - 0.02 && most < 0.5 + 0.05, "{last:?}");
    Ok(())
}

/// A context that nobody filled trains as well as another: every parameter keeps its gradient.
#[test]
fn an_empty_context_trains() -> Result<()> {
    for table in LATENT.into_iter().chain([
        "kind = 'cnp'\nwidth = 8",
        "kind = 'canp'\nwidth = 8",
        "kind = 'dnp'\nwidth = 8",
    ]) {
        let mut params = Params::new(2, &CPU, DType::F32);
        let model = built(table, 1, &mut params)?;
        let mut task = task(2, 4, 3)?;
        task.context = Observations::new(
            task.context.sites.narrow(0, 0)?,
            task.context.y.narrow(1, 0, 0)?,
            None,
        )?;
        let mut rng = Stream::new(1, "objective", 0);
        let found = isopleth::train::objective(&*model, &task, Reward::Both, &mut rng)?;
        let grads = found.loss.backward()?;
        for (path, var) in params.vars() {
            let Some(grad) = grads.get(var.as_tensor()) else { panic!("{table}: {path}") };
            assert!(host(grad).iter().all(|g| g.is_finite()), "{table}: {path}");
        }
    }
    Ok(())
}
