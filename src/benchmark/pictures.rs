//! Pictures of a benchmark: scores against the size of the context, and posteriors of a few tasks.

use std::path::Path;

use candle_core::{DType, Tensor};

use super::{
    Cell, Definition, Drawn, Entrant, Task,
    table::{bins, mean, over_seeds},
    tasks_of,
};
use crate::{
    baseline::ExactGp,
    checkpoint::Checkpoint,
    error::Result,
    picture::curves::{self, Band, Chart, Curve},
    predictive::{Marginals, Of},
    process::{Posterior, Process, Reward},
    registry::Named,
    rng::Stream,
    task::{Batch, design::Layout},
};

/// Pointwise score against the size of the context: one chart per evaluation.
pub fn sizes(path: &Path, task: &Task, drawn: &[Drawn], entrants: &[Entrant]) -> Result<()> {
    let mut charts = Vec::new();
    for (e, drawn) in drawn.iter().enumerate() {
        let fixed = &drawn.fixed;
        let curve = |number: usize, value: &dyn Fn(usize) -> f64| {
            let at = |[low, high]: [usize; 2]| {
                let inside = |i: usize| (low..=high).contains(&fixed.facts[i].context);
                [0.5 * (low + high) as f64, mean(fixed, &inside, value).mean]
            };
            let points = bins(fixed).into_iter().map(at).collect();
            Curve { points, colour: number, width: 1.1, strength: 1.0, marked: true }
        };
        let ceiling = fixed.ceiling(0.0);
        let mut chart = Chart {
            caption: drawn.name.clone(),
            across: "sites in the context".into(),
            up: "nats per target".into(),
            curves: vec![curve(0, &|i| ceiling[i])],
            ..Chart::default()
        };
        for (k, entrant) in entrants.iter().enumerate() {
            chart.curves.push(curve(k + 1, &|i| over_seeds(entrant, e, i, |s| s.pointwise)));
        }
        charts.push(chart);
    }
    let mut legend = vec![("true process".to_string(), 0)];
    legend.extend(entrants.iter().enumerate().map(|(k, x)| (x.name.clone(), k + 1)));
    let title = format!("{}: pointwise log density by size of the context", task.name);
    curves::save(&title, task.about(), &legend, &charts, (3, [380, 280]), path)
}

/// Task embeddings of the first seed of each model that has one, along their principal components.
pub fn clusters(path: &Path, task: &Task, drawn: &[Drawn], entrants: &[Entrant]) -> Result<()> {
    let (mut charts, mut legend) = (Vec::new(), Vec::new());
    for (e, drawn) in drawn.iter().enumerate() {
        let Some((names, class)) = drawn.fixed.classes() else { continue };
        legend = names.iter().enumerate().map(|(k, name)| (name.to_string(), k + 1)).collect();
        for entrant in entrants {
            let Some(found) = &entrant.seeds[0].agreement[e] else { continue };
            let right = found.right.iter().filter(|r| **r).count() as f64;
            charts.push(Chart {
                caption: entrant.name.clone(),
                across: "first component".into(),
                up: format!("probe {:.2}", right / found.right.len() as f64),
                // Enough to see the shape of a cloud.
                dots: found.plane.iter().zip(&class).take(600).map(|(p, c)| (*p, c + 1)).collect(),
                ..Chart::default()
            });
        }
    }
    if charts.is_empty() {
        return Ok(());
    }
    let title = format!("{}: task embeddings, by class", task.name);
    let line = "Principal components of what the first seed makes of each context";
    curves::save(&title, line, &legend, &charts, (3, [320, 300]), path)
}

/// Contexts shown, as shares of the range of sizes.
const SHARES: [f64; 3] = [0.1, 0.4, 0.9];
/// Places that a posterior is drawn at.
const PLACES: usize = 240;

/// What the first seed of each model says of three tasks, and the true process beside it. Nothing
/// for tasks in the plane.
pub fn posteriors(path: &Path, task: &Task, definition: &Definition, cells: &[Cell]) -> Result<()> {
    let tasks = tasks_of(definition, &definition.evaluation[0])?;
    if tasks.dim() != 1 {
        return Ok(());
    }
    let (low, high) = tasks
        .design()
        .context
        .iter()
        .fold((usize::MAX, 0), |(a, b), size| (a.min(size.sites[0]), b.max(size.sites[1])));
    let of = match definition.reward()? {
        Reward::Observation => Of::Observation,
        _ => Of::Surface,
    };
    let half = tasks.design().half_side;
    let at = |i: usize| half * (2.0 * i as f64 / (PLACES - 1) as f64 - 1.0);
    let batches: Vec<Batch> = SHARES
        .iter()
        .enumerate()
        .map(|(i, share)| {
            let mut rng = Stream::new(0, "benchmark picture", i as u64);
            let context = (low as f64 + share * (high - low) as f64).round() as usize;
            let mut xy = tasks.design().layout(context, &mut rng).xy[..context].to_vec();
            xy.extend((0..PLACES).map(|i| [at(i), 0.0]));
            let layout = Layout { xy, t: Vec::new(), context, first_target: context };
            tasks.pack(tasks.draws_at(&layout, 1, &mut rng)?)
        })
        .collect::<Result<_>>()?;
    let mut charts = Vec::new();
    let mut row = |name: &str, ask: &dyn Fn(&Batch) -> Result<Option<Chart>>| -> Result<()> {
        for batch in &batches {
            if let Some(chart) = ask(batch)? {
                charts.push(Chart { caption: name.to_string(), ..chart });
            }
        }
        Ok(())
    };
    row("true process", &|batch| {
        let rule = &batch.rules[0];
        let Some(kernel) = &rule.kernel else { return Ok(None) };
        let gp =
            ExactGp::new(Box::new(kernel.clone()), rule.nugget, rule.mean, tasks.likelihood())?;
        Ok(Some(chart(&*gp.condition(&batch.task.context)?, batch, of, &at)?))
    })?;
    for cell in cells.iter().filter(|c| c.seed == 1) {
        cell.ask(&Checkpoint::open(&cell.out)?, |process| {
            row(&cell.model, &|batch| {
                Ok(Some(chart(&*process.condition(&batch.task.context)?, batch, of, &at)?))
            })
        })?;
    }
    let title = format!("{}: posteriors of the first seed", task.name);
    let line = "Black: the true surface. Blue: mean and central 95 % interval. Thin: joint draws, where a model has them. Dots: context";
    curves::save(&title, line, &[], &charts, (SHARES.len(), [360, 190]), path)
}

fn chart(
    posterior: &dyn Posterior,
    batch: &Batch,
    of: Of,
    at: &(dyn Fn(usize) -> f64 + Sync),
) -> Result<Chart> {
    let sites = &batch.task.target.sites;
    let marginals: Marginals = posterior.at(sites)?.marginals(0, of)?;
    let host = |x: &Tensor| -> Result<Vec<f64>> {
        Ok(x.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?)
    };
    let line = |values: &[f64], colour: usize, width: f64, strength: f64| Curve {
        points: values.iter().enumerate().map(|(i, y)| [at(i), *y]).collect(),
        colour,
        width,
        strength,
        marked: false,
    };
    let truth = host(&batch.task.surface)?;
    let mean: Vec<f64> = (0..PLACES).map(|i| marginals.mean_sd(i).0).collect();
    let edges = marginals.map(|m, i| [at(i), m.quantile(i, 0.025), m.quantile(i, 0.975)]);
    let mut lines = Vec::new();
    // Those that refuse know each target only alone.
    if let Ok(draws) = posterior.draws(sites, 3, &mut Stream::new(0, "benchmark draws", 0)) {
        for values in host(&draws.values)?.chunks(PLACES) {
            lines.push(line(values, 2, 0.6, 0.7));
        }
    }
    lines.push(line(&truth, 0, 0.9, 1.0));
    lines.push(line(&mean, 1, 1.2, 1.0));
    let context = &batch.task.context;
    let (x, y, seen) = (host(&context.sites.s)?, host(&context.y)?, host(&context.mask)?);
    let dots = (0..x.len()).filter(|i| seen[*i] > 0.5).map(|i| ([x[i], y[i]], 2)).collect();
    // The scale of the truth, not that of a model that is far off.
    let all = truth.iter().chain(&y).copied();
    let (low, high) =
        all.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let room = 0.35 * (high - low).max(0.1);
    Ok(Chart {
        bands: vec![Band { edges, colour: 1 }],
        curves: lines,
        dots,
        ends: Some([low - room, high + room]),
        up: format!("{} sites", seen.iter().filter(|s| **s > 0.5).count()),
        ..Chart::default()
    })
}
