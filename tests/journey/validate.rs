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
