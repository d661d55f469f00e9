//! Surveys larger than those a model was trained on: read in windows, and said so.

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tempfile::TempDir;

use super::{assert_error, command, ok, recipes::write, refused, text};

/// A survey on a plane of km, with one column of counts and one of values; `site` places each row.
fn survey(folder: &TempDir, rows: usize, site: impl Fn(usize) -> [f64; 2]) -> String {
    let mut table = String::from("x,y,tested,positive,level\n");
    for i in 0..rows {
        let [x, y] = site(i);
        let p = 0.5 + 0.3 * (0.05 * x).sin() * (0.07 * y).cos();
        let tested = 5 + i % 40;
        let positive = (p * tested as f64).round();
        let level = 10.0 * p + 0.1 * ((i * 7919) % 13) as f64;
        writeln!(table, "{x},{y},{tested},{positive},{level}").unwrap();
    }
    write(folder, "survey.csv", &table)
}

/// Places that fill a square of 100 km evenly, and repeat nowhere (Roberts' sequence).
fn even(i: usize) -> [f64; 2] {
    let along = |step: f64| (1e5 * (i as f64 * step).fract()).round() / 1e3;
    [along(0.754_877_666_2), along(0.569_840_290_9)]
}

fn map(survey: &str, out: &Path, more: &[&str]) -> String {
    let out = out.to_str().unwrap();
    let how =
        ["--crs", "local:km", "--resolution", "4km", "--no-pictures", "--products", "mean,sd"];
    ok(&[&["map", "--surveys", survey, "--out", out], &how[..], more].concat())
}

fn record(out: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(out.join("run.json")).unwrap()).unwrap()
}

#[test]
fn a_large_survey_is_read_in_windows_and_says_so() {
    let folder = TempDir::new().unwrap();
    let survey = survey(&folder, 4_200, even);
    let place = |name: &str| -> PathBuf { folder.path().join(name) };
    let said = map(&survey, &place("cut"), &["--model", "prevalence"]);
    assert!(said.contains("windows     4200 sites in overlapping windows of up to 500"), "{said}");
    assert!(!said.contains("trained on 3 to 2000 sites"), "{said}");
    let cut = record(&place("cut"));
    assert_eq!(cut["model"]["windows"]["sites"], 500, "{cut}");

    let own =
        map(&survey, &place("own"), &["--model", "prevalence", "--windows", "300", "--tile", "7"]);
    assert!(own.contains("of up to 300 sites"), "{own}");
    let off = map(&survey, &place("off"), &["--model", "prevalence", "--windows", "off"]);
    assert!(!off.contains("windows "), "{off}");
    assert!(off.contains("trained on 3 to 2000 sites"), "{off}");
    assert_eq!(record(&place("off"))["model"]["windows"], Value::Null);

    // What a survey of this size gets by itself, though its counts are rounder than any that chance made.
    let kriged = map(&survey, &place("kriged"), &[]);
    assert!(kriged.contains("model       kriging-counts"), "{kriged}");

    // Four ways to the same surface.
    let mean = |name: &str| record(&place(name))["summary"]["average"].as_f64().unwrap();
    let [cut, own, off, kriged] = ["cut", "own", "off", "kriged"].map(mean);
    assert!((cut - own).abs() < 0.01 && (cut - off).abs() < 0.03, "{cut}, {own}, {off}");
    assert!((kriged - cut).abs() < 0.01, "{kriged}, {cut}");
}

#[test]
fn tables_and_folds_are_cut_too() {
    let folder = TempDir::new().unwrap();
    let survey = survey(&folder, 700, even);
    let targets = write(&folder, "targets.csv", "x,y\n50,50\n20,80\n-30,400\n");
    let out = folder.path().join("p.csv");
    let how = ["--crs", "local:km", "--value", "level", "--windows", "200"];
    let args = ["predict", "--context", &survey, "--targets", &targets];
    let said = ok(&[&args[..], &["--out", out.to_str().unwrap()], &how].concat());
    assert!(said.contains("700 sites in overlapping windows of up to 200"), "{said}");
    let table = fs::read_to_string(out).unwrap();
    for cell in table.lines().skip(1).flat_map(|line| line.split(',')) {
        assert!(cell.parse::<f64>().unwrap().is_finite(), "{table}");
    }

    let args = ["validate", "--surveys", &survey, "--folds", "2", "--json"];
    let output = command(&[&args[..], &how].concat()).output().unwrap();
    assert!(text(&output.stderr).contains("continuous: 700 sites in overlapping windows"));
    let scored: Value = serde_json::from_slice(&output.stdout).unwrap();
    // Levels range over 6; the noise of 0.1 × 0 … 12 has an sd of 0.37, of which a CRPS is 0.6.
    assert!(scored["crps"].as_f64().unwrap() < 0.3, "{scored}");
}

#[test]
fn windows_that_cannot_be_are_refused() {
    let args = ["map", "--surveys", "data/survey.csv", "--like", "data/grid.tif", "--out"];
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let asked = |more: &[&str]| refused(&[&args[..], &[out.to_str().unwrap()], more].concat());
    let small = asked(&["--windows", "3"]);
    assert_error(&small, "knows nothing of a surface", &["3"], "give windows 100 to 1000 sites");
    let gp = asked(&["--windows", "300", "--model", "gp"]);
    assert_error(&gp, "windows are for trained models", &["300", "gp"], "leave --windows out");
    let word = asked(&["--windows", "many"]);
    assert!(word.contains("write a number of sites, such as 500, or off"), "{word}");
}
