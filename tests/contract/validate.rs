//! Validation holds out what it says, and its scores are those of the forecasts it made.

use std::{fmt::Write, fs, path::PathBuf};

use assert_cmd::Command;
use isopleth::{
    Link, Predictive, Result, Stream,
    cli::validate::{Folds, cross_validate, exact_gp},
    geo::survey::{Survey, SurveyOptions},
    likelihood,
    score::{Forecast, Summary},
};

const SITES: usize = 40;

/// A survey of a plane that rises to the east: columns x, y, positive, tested, value, fold.
fn written(folder: &tempfile::TempDir) -> PathBuf {
    let mut rng = Stream::new(8, "survey", 0);
    let mut text = String::from("x,y,positive,tested,rain,fold\n");
    for i in 0..SITES {
        let (x, y) = (rng.uniform(0.0, 100.0), rng.uniform(0.0, 60.0));
        let eta = 0.04 * x - 3.0 + 0.2 * rng.normal();
        let positive = rng.binomial(50, Link::Logit.outcome(eta));
        let _ = writeln!(text, "{x},{y},{positive},50,{eta},{}", ["west", "east"][i % 2]);
    }
    let path = folder.path().join("survey.csv");
    fs::write(&path, text).expect("a writable folder");
    path
}

fn survey(path: &PathBuf, value: Option<&str>) -> Result<Survey> {
    let crs = Some("local:km".into());
    Survey::read(path, &SurveyOptions { crs, value: value.map(String::from), ..Default::default() })
}

fn summary(survey: &Survey, folds: &Folds, likelihood: &str) -> Result<[Summary; 3]> {
    let scored = cross_validate(survey, folds, &*exact_gp(likelihood::find(likelihood)?))?;
    let pool = |f: &dyn Fn(&isopleth::cli::validate::Fold) -> Vec<Forecast>| {
        Summary::of(&scored.iter().flat_map(f).collect::<Vec<_>>())
    };
    Ok([pool(&|f| f.met.clone()), pool(&|f| f.rules[0].1.clone()), pool(&|f| f.rules[1].1.clone())])
}

#[test]
fn a_gaussian_process_beats_both_rules_on_a_slope() -> Result<()> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = written(&folder);
    for (value, likelihood) in [(None, "binomial"), (Some("rain"), "gaussian")] {
        let survey = survey(&path, value)?;
        let folds = Folds::random(5, survey.len(), 1)?;
        let [gp, intercept, nearest] = summary(&survey, &folds, likelihood)?;
        assert_eq!([gp.n, intercept.n, nearest.n], [SITES; 3]);
        for rule in [intercept, nearest] {
            assert!(gp.log_score > rule.log_score, "{likelihood}: {gp:?} not above {rule:?}");
            assert!(gp.crps < rule.crps, "{likelihood}: {gp:?} not below {rule:?}");
        }
    }
    Ok(())
}

/// What is held out is not seen: a forecaster that counts its context and its targets.
#[test]
fn every_site_is_held_out_once_and_never_seen_then() -> Result<()> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let survey = survey(&written(&folder), Some("rain"))?;
    for n in [2, 7, SITES] {
        let folds = Folds::random(n, SITES, 3)?;
        let scored = cross_validate(&survey, &folds, &|context, targets, _| {
            assert_eq!(context.len() + targets.len(), SITES);
            let seen = context.sites.host()?.swap_remove(0);
            let asked = targets.host()?.swap_remove(0);
            assert!(asked.iter().all(|a| !seen.contains(a)), "a held-out site was seen");
            let zero = targets.s.narrow(2, 0, 1)?.zeros_like()?;
            let one = zero.ones_like()?;
            Predictive::gaussian(Link::Identity, zero, one.clone(), one)
        })?;
        assert_eq!(scored.iter().map(|fold| fold.met.len()).sum::<usize>(), SITES);
        let sizes: Vec<usize> = scored.iter().map(|fold| fold.met.len()).collect();
        assert!(sizes.iter().max().unwrap_or(&0) - sizes.iter().min().unwrap_or(&0) <= 1);
    }
    Ok(())
}

#[test]
fn folds_are_read_by_row_and_by_name() -> Result<()> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = written(&folder);
    let survey = survey(&path, Some("rain"))?;
    let own = Folds::parse(&format!("{}:fold", path.display()), &survey, 1)?;
    assert_eq!(own.labels, ["east", "west"]);
    assert_eq!(own.of[..4], [1, 0, 1, 0]);
    // Another file, its rows named from 0 and in the opposite order; numbers sort as numbers.
    let other = folder.path().join("folds.csv");
    let mut text = String::from("row,block\n");
    (0..SITES).rev().for_each(|row| {
        let _ = writeln!(text, "{row},{}", row % 11);
    });
    fs::write(&other, text).expect("a writable folder");
    let named = Folds::parse(&format!("{}:block", other.display()), &survey, 1)?;
    assert_eq!(named.labels.last().map(String::as_str), Some("10"));
    assert_eq!(named.of, (0..SITES).map(|row| row % 11).collect::<Vec<_>>());
    assert_ne!(Folds::parse("5", &survey, 1)?, Folds::parse("5", &survey, 2)?, "seeds matter");
    Ok(())
}

fn isopleth(arguments: &[&str]) -> std::process::Output {
    Command::cargo_bin("isopleth").expect("the binary").args(arguments).output().expect("it ran")
}

#[test]
fn the_command_prints_the_promised_json() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = written(&folder);
    let path = path.to_str().expect("plain path");
    let common = ["validate", "--surveys", path, "--crs", "local:km", "--folds", "4"];
    let json = isopleth(&[&common[..], &["--model", "gp", "--json"]].concat());
    assert!(json.status.success(), "{}", String::from_utf8_lossy(&json.stderr));
    let seen: serde_json::Value = serde_json::from_slice(&json.stdout).expect("only JSON");
    assert_eq!(seen["n"], SITES);
    for name in ["log_score", "crps", "rmse", "seconds"] {
        assert!(seen[name].is_f64(), "{name} in {seen}");
    }
    for level in ["50", "80", "95"] {
        assert!(seen["coverage"][level].is_f64(), "{level} in {seen}");
    }
    assert_eq!(seen["folds"].as_array().map(Vec::len), Some(4));
    assert!(seen["baselines"]["nearest-site"]["crps"].is_f64());
    let text = isopleth(&[&common[..], &["--model", "gp"]].concat());
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    for line in ["fold 3", "intercept-only", "nearest-site", "log score"] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
}

/// Each bad request ends with its reason, a hint, and exit code 2.
#[test]
fn bad_folds_are_explained() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = written(&folder);
    let path = path.to_str().expect("plain path");
    let short = folder.path().join("short.csv");
    fs::write(&short, "fold\na\nb\n").expect("a writable folder");
    let same = folder.path().join("same.csv");
    fs::write(&same, format!("fold\n{}", "a\n".repeat(SITES))).expect("a writable folder");
    let negative = folder.path().join("negative.csv");
    fs::write(&negative, "row,fold\n-1,a\n0.5,b\n").expect("a writable folder");
    let of = |file: &PathBuf, column: &str| format!("{}:{column}", file.display());
    for (folds, reason) in [
        ("1".to_string(), "at least 2 folds"),
        ("41".to_string(), "at most one per site"),
        ("ten".to_string(), "no number, blocks:…, clusters:…, times:… or FILE:COLUMN"),
        ("no-such-file.csv:fold".to_string(), "no-such-file.csv"),
        (format!("{path}:fald"), "fald"),
        (of(&short, "fold"), "a site of the survey has no fold"),
        (of(&same, "fold"), "every site is in the same fold"),
        (of(&negative, "fold"), "column `row`"),
    ] {
        let arguments = ["validate", "--surveys", path, "--crs", "local:km", "--folds", &folds];
        let out = isopleth(&arguments);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "--folds {folds}: {said}");
        assert!(said.contains(reason), "--folds {folds}: no `{reason}` in {said}");
    }
}
