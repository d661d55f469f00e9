//! The exact Gaussian process beside GPBoost 1.8 on the same folds of three real surveys.

use isopleth::{
    Process, Result,
    baseline::ExactGp,
    cli::validate::{Folds, Forecaster, cross_validate},
    geo::survey::{Survey, SurveyOptions},
    likelihood,
    score::{Forecast, Summary},
};

/// Log score, 95 % coverage, RMSE, CRPS of GPBoost (coordinates only, exponential, village effect),
/// on random folds and on blocks.
const GPBOOST: [(&str, [[f64; 4]; 2]); 3] = [
    ("loaloa", [[-3.260, 0.964, 0.0725, 0.0372], [-4.118, 0.904, 0.1203, 0.0660]]),
    ("liberia", [[-2.578, 0.967, 0.0607, 0.0357], [-2.723, 0.967, 0.0685, 0.0402]]),
    ("gambia", [[-3.029, 0.938, 0.1727, 0.0971], [-3.173, 0.908, 0.1987, 0.1116]]),
];

#[test]
fn close_to_gpboost_on_real_surveys() -> Result<()> {
    for (name, published) in GPBOOST {
        let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
        let folder = data.join(name);
        if !folder.exists() {
            eprintln!("skipped: no {name} survey beside the repository");
            continue;
        }
        let crs = (name == "gambia").then(|| "EPSG:32628".to_string());
        let options = SurveyOptions { crs, ..Default::default() };
        let survey = Survey::read(folder.join("villages.csv"), &options)?;
        for (column, published) in ["fold_random", "fold_block"].iter().zip(published) {
            let text = format!("{}:{column}", folder.join("folds.csv").display());
            let folds = Folds::parse(&text, &survey, 1)?;
            // As theirs, the likeliest parameters alone; a map integrates over others.
            let ask: Box<Forecaster> = Box::new(|context, targets, _| {
                let gp = ExactGp::fit(context, likelihood::find("binomial")?)?;
                gp.condition(context)?.at(targets)
            });
            let scored = cross_validate(&survey, &folds, &*ask)?;
            let met: Vec<Forecast> = scored.into_iter().flat_map(|fold| fold.met).collect();
            let ours = Summary::of(&met);
            let seen = [ours.log_score, ours.coverage.at_95, ours.rmse, ours.crps];
            // Theirs: exponential, maximum likelihood. Ours: any smoothness, penalised, mean
            // integrated. Two villages of 65 may fall on the other side of an interval.
            for ((seen, theirs), close) in
                seen.iter().zip(published).zip([0.05, 0.035, 0.006, 0.005])
            {
                assert!((seen - theirs).abs() < close, "{name}, {column}: {ours:?} {published:?}");
            }
        }
    }
    Ok(())
}
