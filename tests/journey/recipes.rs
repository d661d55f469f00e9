//! From a recipe to a model: training, the model file, and recipes that cannot be.

use std::{fs, path::Path, time::Duration};

use tempfile::TempDir;

use super::{assert_error, command, refused, text};

/// A recipe that trains in a second.
pub const TINY: &str = "\
name = \"tiny\"
predicts = \"logit prevalence\"
[model]
kind = \"cnp\"
width = 8
depth = 1
[prior]
kind = \"gp\"
length_scale = { log-uniform = [0.1, 1.0] }
sill_sd = { uniform = [0.5, 1.5] }
nugget_sd = { uniform = [0.1, 0.5] }
[design]
context = [{ sites = [3, 12], weight = 1.0 }]
targets = 8
[task]
likelihood = \"binomial\"
[train]
steps = 12
warmup = 2
rows = 4
validate_every = 6
validate_tasks = 4
checkpoint_every = 3
";

pub fn write(folder: &TempDir, name: &str, content: &str) -> String {
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_string()
}

pub fn train(recipe: &str, out: &Path, more: &[&str]) {
    let args = [&["train", recipe, "--out", out.to_str().unwrap()], more].concat();
    let output = command(&args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
}

#[test]
fn a_killed_training_goes_on_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", TINY);
    let (whole, parts) =
        (folder.path().join("whole.safetensors"), folder.path().join("parts.safetensors"));
    train(&recipe, &whole, &[]);
    train(&recipe, &parts, &["--stop-at", "6"]);
    train(&recipe, &parts, &["--resume"]);
    let weights = |path: &Path| isopleth::checkpoint::Checkpoint::open(path).unwrap().tensors;
    let (whole, parts) = (weights(&whole), weights(&parts));
    assert!(!whole.is_empty() && whole.keys().eq(parts.keys()));
    for (name, tensor) in &whole {
        let bits = |t: &candle_core::Tensor| -> Vec<u32> {
            t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
        };
        assert_eq!(bits(tensor), bits(&parts[name]), "{name}");
    }
}

#[test]
fn the_journal_has_one_json_line_per_validation_also_after_a_resume() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", TINY);
    let model = folder.path().join("tiny.safetensors");
    train(&recipe, &model, &["--stop-at", "3"]);
    train(&recipe, &model, &["--resume"]);
    let journal = fs::read_to_string(folder.path().join("tiny.journal.jsonl")).unwrap();
    let steps: Vec<u64> = journal
        .lines()
        .map(|line| {
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(record["validation"].is_f64() && record["gap"].is_f64(), "{line}");
            record["step"].as_u64().unwrap()
        })
        .collect();
    // Every 6 steps, and where the training stopped.
    assert_eq!(steps, [3, 6, 12]);
}

#[test]
fn a_training_is_resumed_as_it_was_begun_or_not_at_all() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", TINY);
    let model = folder.path().join("tiny.safetensors");
    let out = model.to_str().unwrap();
    let error =
        text(&command(&["train", &recipe, "--out", out, "--resume"]).output().unwrap().stderr);
    assert_error(&error, "nothing to resume?", &[], "check the path");
    train(&recipe, &model, &["--stop-at", "3"]);
    let before = fs::read(&model).unwrap();
    let other = write(&folder, "other.toml", &TINY.replace("width = 8", "width = 9"));
    for (recipe, more) in
        [(&recipe, ["--seed", "2"]), (&recipe, ["--steps", "20"]), (&other, ["--seed", "1"])]
    {
        let args = [&["train", recipe, "--out", out, "--resume"], &more[..]].concat();
        assert_error(&refused(&args), "another recipe, seed or length", &["tiny.state"], "resume");
    }
    let none = refused(&["train", &recipe, "--out", out, "--resume", "--stop-at", "0"]);
    assert_error(&none, "no steps", &[], "--stop-at 1");
    let name = refused(&["train", &recipe, "--out", "model.bin"]);
    assert_error(&name, "must end in .safetensors", &["model.bin"], "--out");
    assert_eq!(fs::read(&model).unwrap(), before);
}

#[test]
fn a_model_killed_in_training_is_whole_or_absent() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", &TINY.replace("steps = 12", "steps = 100000"));
    let out = folder.path().join("model.safetensors");
    for wait in [20, 150, 400] {
        let args = ["train", &recipe, "--out", out.to_str().unwrap(), "--resume"];
        let fresh = &args[..4];
        let mut child = command(if wait == 20 { fresh } else { &args })
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() {
            isopleth::checkpoint::Checkpoint::open(&out).unwrap();
        }
    }
}

#[test]
fn a_trained_model_maps_and_a_damaged_one_is_refused() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", TINY);
    let model = folder.path().join("tiny.safetensors");
    train(&recipe, &model, &[]);
    // Training again over it must be asked for.
    let error = refused(&["train", &recipe, "--out", model.to_str().unwrap()]);
    assert_error(&error, "exists", &["tiny.safetensors"], "--force");

    let bytes = fs::read(&model).unwrap();
    let map = |model: &Path, out: &str| {
        let out = folder.path().join(out);
        command(&[
            "map",
            "--surveys",
            "data/survey.csv",
            "--resolution",
            "40km",
            "--model",
            model.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ])
        .output()
        .unwrap()
    };
    #[cfg(feature = "gdal")]
    assert!(map(&model, "whole").status.success());

    let damaged = folder.path().join("damaged.safetensors");
    let format = b"\\\"format\\\":1";
    let card =
        bytes.windows(format.len()).position(|part| part == format).expect("the card's version");
    let mut newer = bytes.clone();
    newer[card + format.len() - 1] = b'7';
    for (bytes, what) in [
        (&bytes[..bytes.len() / 2], "truncated"),
        (&bytes[..7], "truncated"),
        (b"", "truncated"),
        (b"no model at all, but long enough to have a header", "not a model"),
        (&newer, "another version"),
    ] {
        fs::write(&damaged, bytes).unwrap();
        let output = map(&damaged, "out");
        assert_eq!(output.status.code(), Some(2), "{what}");
        assert_error(&text(&output.stderr), what, &["damaged.safetensors"], "");
    }
}

#[test]
fn recipes_that_cannot_be_are_refused_before_anything_is_written() {
    let folder = TempDir::new().unwrap();
    let cases = [
        ("width = 8", "widht = 8", "widht", "width"),
        ("[prior]", "[proir]", "proir", "prior"),
        ("nugget_sd", "nuget_sd", "nuget_sd", "nugget_sd"),
        ("kind = \"cnp\"", "kind = \"cnpp\"", "cnpp", "cnp"),
        ("\"binomial\"", "\"binomal\"", "binomal", "binomial"),
        ("{ log-uniform = [0.1, 1.0] }", "{ log-uniform = [1.0, 0.1] }", "length_scale", ""),
        ("{ log-uniform = [0.1, 1.0] }", "{ log-uniform = [-1.0, 0.1] }", "length_scale", ""),
        ("{ uniform = [0.5, 1.5] }", "{ uniform = [-0.5, 1.5] }", "sill_sd", ""),
        ("{ uniform = [0.1, 0.5] }", "{ unifrom = [0.1, 0.5] }", "unifrom", "uniform"),
        ("sites = [3, 12]", "sites = [12, 3]", "sites", ""),
        ("steps = 12", "steps = -12", "steps", ""),
        ("steps = 12", "steps = ", "TOML", ""),
        ("width = 8", "width = \"eight\"", "width", ""),
    ];
    for (sound, spoiled, what, help) in cases {
        assert!(TINY.contains(sound), "{sound}");
        let recipe = write(&folder, "bad.toml", &TINY.replace(sound, spoiled));
        let out = folder.path().join("bad.safetensors");
        let error = refused(&["train", &recipe, "--out", out.to_str().unwrap()]);
        assert!(error.contains(what), "{spoiled}: no `{what}` in\n{error}");
        assert_error(&error, "", &[], help);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "{spoiled}: something was written"
        );
    }
    let error = refused(&["train", "no-such-recipe.toml", "--out", "x.safetensors"]);
    assert_error(&error, "no-such-recipe.toml", &[], "check the path");
}
