//! Holding rows out of the bundled survey.

use serde_json::Value;

use super::{assert_error, ok, refused};

const SURVEY: [&str; 5] = ["validate", "--surveys", "data/survey.csv", "--model", "gp"];

fn validate(folds: &str) -> Value {
    let args = [&SURVEY[..], &["--folds", folds, "--json"]].concat();
    serde_json::from_str(&ok(&args)).unwrap()
}

#[test]
fn random_and_whole_district_folds_score_every_site_once() {
    for folds in ["5", "data/survey.csv:district"] {
        let report = validate(folds);
        assert_eq!(report["n"], 138, "{folds}");
        for score in ["log_score", "crps", "rmse", "seconds"] {
            assert!(report[score].as_f64().unwrap().is_finite(), "{folds}: {score}");
        }
        // The interval is of a new village, so it must hold about 95 % of those held out:
        // 138 sites stray by 2 points (one sd), and one country by some more.
        let held = report["coverage"]["95"].as_f64().unwrap();
        assert!(held > 0.88, "{folds}: {held} of sites inside their 95 % interval");
    }
}

#[test]
fn a_map_predicts_better_near_sites_than_far_from_them() {
    let (near, far) = (validate("10"), validate("data/survey.csv:district"));
    let crps = |report: &Value| report["crps"].as_f64().unwrap();
    assert!(crps(&near) < crps(&far), "{} near, {} far", crps(&near), crps(&far));
}

#[test]
fn folds_that_cannot_be_are_refused() {
    for (folds, what) in [
        ("1", "folds"),
        ("1000", "folds"),
        ("many", "--folds"),
        ("data/survey.csv:distrct", "distrct"),
        ("no-such-folds.csv:fold", "no-such-folds.csv"),
    ] {
        let error = refused(&[&SURVEY[..], &["--folds", folds]].concat());
        assert_error(&error, "", &[], "");
        assert!(error.contains(what), "{folds}: {error}");
    }
}

#[test]
fn both_gaussian_processes_score_alike() {
    let gp = validate("5");
    let how = ["--surveys", "data/survey.csv", "--model", "vecchia", "--folds", "5", "--json"];
    let vecchia: Value = serde_json::from_str(&ok(&[&["validate"], &how[..]].concat())).unwrap();
    assert_eq!(vecchia["model"], "vecchia");
    for (score, close) in [("log_score", 0.02), ("crps", 0.002), ("rmse", 0.003)] {
        let (a, b) = (gp[score].as_f64().unwrap(), vecchia[score].as_f64().unwrap());
        assert!((a - b).abs() < close, "{score}: {a} exact, {b} from neighbours");
    }
}

/// Several models at once: each beside the first, with what separates them and how sure that is.
#[test]
fn models_stand_side_by_side_with_their_differences() {
    let how = ["validate", "--surveys", "data/survey.csv", "--model", "gp,vecchia,nearest-site"];
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("held-out");
    let to = ["--folds", "blocks:6", "--out", out.to_str().unwrap()];
    let said = ok(&[&how[..], &to[..]].concat());
    for words in
        ["gp less each", "intercept-only  log score +", "folds are the units of chance", "PIT"]
    {
        assert!(said.contains(words), "no `{words}` in\n{said}");
    }
    let text = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    let report: Value = serde_json::from_str(&text("report.json")).unwrap();
    let models = report["models"].as_object().unwrap();
    assert_eq!(models.len(), 4, "{:?}", models.keys());
    let number = |path: &str| report.pointer(path).and_then(Value::as_f64).unwrap();
    // What is printed per site adds up to the difference of the means.
    let gap = number("/models/gp/log_score") - number("/models/intercept-only/log_score");
    let said = number("/models/intercept-only/first_model_less_this/log_score/mean");
    assert!((gap - said).abs() < 1e-9, "{gap} {said}");
    assert!(number("/models/intercept-only/first_model_less_this/log_score/standard_error") > 0.0);
    for name in models.keys() {
        let own = &models[name];
        let bins: Vec<f64> = own["pit"]["non_randomised"]
            .as_array()
            .unwrap()
            .iter()
            .map(|b| b.as_f64().unwrap())
            .collect();
        assert!((bins.iter().sum::<f64>() - 10.0).abs() < 1e-6, "{name}: {bins:?}");
        let last = own["coverage_by_level"][20][1].as_f64().unwrap();
        assert!((last - 1.0).abs() < 1e-9, "{name}: {last} inside 100 %");
    }
    let csv = text("sites.csv");
    assert_eq!(csv.lines().count(), 139);
    assert!(
        csv.starts_with("row,x,y,fold,observed,gp_mean,gp_low_95,gp_high_95,gp_log_score"),
        "{csv}"
    );
    // Rows come in the order of the survey, each with its own outcome.
    let first: Vec<&str> = csv.lines().nth(1).unwrap().split(',').collect();
    assert_eq!(first[0], "1");
    assert!((first[4].parse::<f64>().unwrap() - 15.0 / 61.0).abs() < 1e-9, "{first:?}");
    assert!(text("report.md").contains("| vecchia |"));
    for file in ["sites.parquet", "calibration.png"] {
        assert!(out.join(file).metadata().unwrap().len() > 1000, "{file}");
    }
    let again = refused(&[&how[..], &to[..]].concat());
    assert_error(&again, "not empty", &["held-out"], "--force");
}

#[test]
fn whole_areas_are_harder_to_foretell_than_single_sites() {
    let crps = |folds: &str| validate(folds)["crps"].as_f64().unwrap();
    let alone = crps("10");
    for folds in ["blocks:5", "blocks:150km", "clusters:district"] {
        assert!(crps(folds) > alone, "{folds}");
    }
    for folds in ["blocks:1", "clusters:9000km", "blocks:1deg"] {
        assert_error(&refused(&[&SURVEY[..], &["--folds", folds]].concat()), "", &[], "");
    }
}
