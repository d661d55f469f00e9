//! The exact Gaussian process beside GPBoost 1.8 on the same folds of three real surveys.

use candle_core::{Device, Tensor};
use isopleth::{
    Observations, Of, Process, Sites,
    baseline::ExactGp,
    likelihood,
    score::{Forecast, Summary, Truth, forecasts},
    sites::unit_box,
};

struct Survey {
    plane: Vec<[f64; 2]>,
    positive: Vec<f64>,
    tested: Vec<f64>,
    /// `[random, block]`.
    folds: [Vec<usize>; 2],
}

fn columns(path: &std::path::Path, names: &[&str]) -> Vec<Vec<f64>> {
    let text = std::fs::read_to_string(path).expect("readable table");
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().expect("a header").split(',').collect();
    let at = |name: &&str| {
        header
            .iter()
            .position(|h| h == name)
            .expect("a known column")
    };
    let at: Vec<usize> = names.iter().map(at).collect();
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    at.iter()
        .map(|c| {
            rows.iter()
                .map(|r| r[*c].parse().expect("a number"))
                .collect()
        })
        .collect()
}

/// None, with a word about it, where the data are not beside the repository.
fn survey(name: &str) -> Option<Survey> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../shared/data")
        .join(name);
    if !root.exists() {
        eprintln!("skipped: no {name} survey beside the repository");
        return None;
    }
    let axes = if name == "gambia" {
        ["x", "y"]
    } else {
        ["lon", "lat"]
    };
    let table = columns(
        &root.join("villages.csv"),
        &[axes[0], axes[1], "positive", "n"],
    );
    let folds = columns(&root.join("folds.csv"), &["fold_random", "fold_block"]);
    let middle = table[1].iter().sum::<f64>() / table[1].len() as f64;
    // Degrees to km, near enough for a GP that fits its own length scale.
    let (kx, ky) = match name {
        "gambia" => (1e-3, 1e-3),
        _ => (111.2 * middle.to_radians().cos(), 111.2),
    };
    let whole = |x: &[f64]| x.iter().map(|v| *v as usize).collect();
    Some(Survey {
        plane: table[0]
            .iter()
            .zip(&table[1])
            .map(|(x, y)| [kx * x, ky * y])
            .collect(),
        positive: table[2].clone(),
        tested: table[3].clone(),
        folds: [whole(&folds[0]), whole(&folds[1])],
    })
}

fn held_out(survey: &Survey, fold: usize, folds: &[usize]) -> isopleth::Result<Vec<Forecast>> {
    let device = Device::Cpu;
    let rows = |keep: &dyn Fn(usize) -> bool| -> Vec<usize> {
        (0..folds.len()).filter(|i| keep(folds[*i])).collect()
    };
    let (seen, held) = (rows(&|f| f != fold), rows(&|f| f == fold));
    let places =
        |rows: &[usize]| -> Vec<[f64; 2]> { rows.iter().map(|i| survey.plane[*i]).collect() };
    let (centre, unit) = unit_box(&places(&seen)).expect("sites span a box");
    let model = |rows: &[usize]| {
        let at = |p: [f64; 2]| [(p[0] - centre[0]) / unit, (p[1] - centre[1]) / unit];
        Sites::plane(
            &places(rows).into_iter().map(at).collect::<Vec<_>>(),
            &device,
        )
    };
    let pick = |x: &[f64]| seen.iter().map(|i| x[*i] as f32).collect::<Vec<_>>();
    let y = Tensor::from_vec(pick(&survey.positive), (1, seen.len(), 1), &device)?;
    let trials = Tensor::from_vec(pick(&survey.tested), (1, seen.len()), &device)?;
    let context = Observations::new(model(&seen)?, y, Some(trials))?;
    let gp = ExactGp::fit(&context, likelihood::find("binomial")?)?;
    let marginals = gp
        .condition(&context)?
        .at(&model(&held)?)?
        .marginals(0, Of::Observation)?;
    let truth = |i: &usize| Truth::Count {
        positive: survey.positive[*i] as u64,
        tested: survey.tested[*i] as u64,
    };
    forecasts(&marginals, &held.iter().map(truth).collect::<Vec<_>>())
}

/// Log score, 95 % coverage, RMSE, CRPS of GPBoost (coordinates only, exponential, village effect).
const GPBOOST: [(&str, [[f64; 4]; 2]); 3] = [
    (
        "loaloa",
        [
            [-3.260, 0.964, 0.0725, 0.0372],
            [-4.118, 0.904, 0.1203, 0.0660],
        ],
    ),
    (
        "liberia",
        [
            [-2.578, 0.967, 0.0607, 0.0357],
            [-2.723, 0.967, 0.0685, 0.0402],
        ],
    ),
    (
        "gambia",
        [
            [-3.029, 0.938, 0.1727, 0.0971],
            [-3.173, 0.908, 0.1987, 0.1116],
        ],
    ),
];

#[test]
fn close_to_gpboost_on_real_surveys() -> isopleth::Result<()> {
    for (name, published) in GPBOOST {
        let Some(survey) = survey(name) else {
            return Ok(());
        };
        for (which, published) in published.iter().enumerate() {
            let folds = &survey.folds[which];
            let mut met = Vec::new();
            for fold in 0..=*folds.iter().max().expect("folds") {
                met.extend(held_out(&survey, fold, folds)?);
            }
            let ours = Summary::of(&met);
            let seen = [ours.log_score, ours.coverage.at_95, ours.rmse, ours.crps];
            // Theirs: exponential, maximum likelihood. Ours: any smoothness, penalised, mean
            // integrated. Two villages of 65 may fall on the other side of an interval.
            for ((seen, theirs), tolerance) in
                seen.iter().zip(published).zip([0.05, 0.035, 0.006, 0.005])
            {
                let gap = (seen - theirs).abs();
                assert!(
                    gap < tolerance,
                    "{name}, folds {which}: {ours:?} beside {published:?}"
                );
            }
        }
    }
    Ok(())
}
