//! Is a model as sure as it may be? From a recipe to the figures that say so.

use std::{fs, process::Output};

use serde_json::Value;
use tempfile::TempDir;

use super::{assert_error, command, ok, refused, text};

/// A model of values that has hardly trained; the exact Gaussian process beside it needs no training.
const RECIPE: &str = "\
[model]
kind = \"cnp\"
width = 8
depth = 1
[prior]
kind = \"gp\"
length_scale = { log-uniform = [0.2, 1.0] }
sill_sd = { uniform = [0.5, 1.5] }
nugget_sd = { uniform = [0.1, 0.5] }
nugget_absent = 0.0
[design]
context = [{ sites = [5, 40], weight = 1.0 }]
targets = 16
[task]
likelihood = \"gaussian\"
[train]
steps = 3
warmup = 1
rows = 4
validate_every = 3
validate_tasks = 4
checkpoint_every = 3
";

fn model(folder: &TempDir, likelihood: &str) -> String {
    let recipe = folder.path().join("recipe.toml");
    fs::write(&recipe, RECIPE.replace("gaussian", likelihood)).unwrap();
    let model = folder.path().join(format!("{likelihood}.safetensors"));
    let (recipe, model) = (recipe.to_str().unwrap(), model.to_str().unwrap());
    ok(&["train", recipe, "--out", model]);
    model.to_string()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("no number at {path} in {value:#}"))
}

/// The Gaussian process that is told the truth is calibrated and beats every rule: if it did not, it
/// would be the measurement that is wrong.
#[test]
fn the_truth_is_calibrated_and_wins() {
    let folder = TempDir::new().unwrap();
    let model = model(&folder, "gaussian");
    let report =
        json(&command(&["calibrate", &model, "--tasks", "400", "--json"]).output().unwrap());
    assert_eq!(report["tasks"], 400);
    assert_eq!(report["targets"], 16);
    let truth = &report["baselines"]["exact-gp"];
    assert_eq!(truth["tasks"], 400);
    for of in ["surface", "observation"] {
        // 400 tasks, pairs of which share sites: worth some 1,500 independent targets.
        for (level, within) in [("50", 0.05), ("80", 0.04), ("95", 0.025)] {
            let seen = number(truth, &format!("/{of}/coverage/{level}"));
            let meant = level.parse::<f64>().unwrap() / 100.0;
            assert!((seen - meant).abs() < within, "{of}: the {level} % interval holds {seen}");
        }
        let path = format!("/{of}/log_density");
        let ours = number(truth, &format!("/model_on_the_same_tasks{path}"));
        assert!(number(truth, &path) > ours, "{of}: an untrained model beats the truth");
        assert_eq!(ours, number(&report, &path), "every task is small enough for the truth");
    }
    // Ranks of the truth in a law that is right are uniform, and in one that is not they are not.
    for of in ["surface", "observation"] {
        for test in ["chi_square", "kolmogorov"] {
            let right = number(truth, &format!("/ranks/{of}/{test}/1"));
            let wrong = number(&report, &format!("/ranks/{of}/{test}/1"));
            assert!(right > 0.005, "{of}, {test}: {right} exact, {wrong} untrained");
            // Which test sees best what is wrong depends on how it is wrong.
            assert!(test == "kolmogorov" || wrong < 0.005, "{of}: {wrong} untrained");
        }
        let bins = report["ranks"][of]["bins"].as_array().unwrap();
        let sum: f64 = bins.iter().map(|b| b.as_f64().unwrap()).sum();
        assert!((sum - 20.0).abs() < 0.02 && bins.len() == 20, "{bins:?}");
    }
    for rule in ["intercept-only", "nearest-site"] {
        let its = &report["baselines"][rule];
        assert!(its["surface"].is_null(), "a rule knows observations only");
        assert!(number(its, "/crps") > number(truth, "/crps"), "{rule} beats the truth");
        assert!(
            number(its, "/observation/log_density") < number(truth, "/observation/log_density"),
            "{rule} beats the truth"
        );
    }
}

#[test]
fn figures_are_of_these_tasks_and_no_others() {
    let folder = TempDir::new().unwrap();
    let model = model(&folder, "binomial");
    let run = |more: &[&str], threads: &str| {
        let args = [&["calibrate", &model, "--tasks", "30", "--json"], more].concat();
        json(&command(&args).env("RAYON_NUM_THREADS", threads).output().unwrap())
    };
    let (one, two, other) = (run(&[], "1"), run(&[], "3"), run(&["--seed", "2"], "1"));
    for path in ["/surface/log_density", "/crps", "/baselines/exact-gp/surface/log_density"] {
        let apart = (number(&one, path) - number(&two, path)).abs();
        assert!(apart < 1e-5, "{path}: {apart:e} apart with other threads");
        assert_ne!(number(&one, path), number(&other, path), "{path}: two seeds, one answer");
    }
    // The thirds are the whole, and in order of size.
    let thirds = one["thirds"].as_array().unwrap();
    let mean: f64 = thirds.iter().map(|t| number(t, "/crps")).sum::<f64>() / 3.0;
    assert!((mean - number(&one, "/crps")).abs() < 1e-12);
    assert!(thirds.iter().all(|t| t["tasks"] == 10));
    let edges: Vec<f64> =
        thirds.iter().flat_map(|t| [number(t, "/context/0"), number(t, "/context/1")]).collect();
    assert!(edges.is_sorted(), "{edges:?}");
    // A prevalence is missed by less than 1, and by more than nothing.
    assert!((0.0..0.5).contains(&number(&one, "/crps")));

    let cut = run(&["--most-sites", "7"], "2");
    assert!(number(&cut, "/context/1") <= 7.0);

    let said = ok(&["calibrate", &model, "--tasks", "12"]);
    for word in ["surface", "new observation", "95 %", "nearest-site", "exact-gp", "crps"] {
        assert!(said.contains(word), "no `{word}` in\n{said}");
    }
    ok(&["calibrate", &model, "--tasks", "12", "--record"]);
    let kept = fs::read(&model).unwrap();
    let kept = String::from_utf8_lossy(&kept);
    assert!(kept.contains("calibration"), "the card keeps the report");
    assert!(!kept.contains(folder.path().to_str().unwrap()), "and not where the file lay");
}

#[test]
fn what_cannot_be_calibrated_is_said() {
    let folder = TempDir::new().unwrap();
    let model = model(&folder, "gaussian");
    let error = refused(&["calibrate", &model, "--tasks", "2"]);
    assert_error(&error, "3 tasks", &["2"], "2000");
    let error = refused(&["calibrate", "nosuch.safetensors"]);
    assert_error(&error, "nosuch.safetensors", &[], "check the path");
}
