//! The scripts for a GPU machine, tried on the processor: every step answers, and windows add up.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use isopleth::checkpoint::Checkpoint;
use serde_json::Value;
use tempfile::TempDir;

use super::{
    recipes::{TINY, train, write},
    text,
};

/// A script of this repository with a program that computes on the processor; nothing where the
/// system lacks what it is written in.
fn script(name: &str, out: &Path) -> Option<Command> {
    let there = |tool: &str| {
        let ran = Command::new(tool).arg("--version").stdout(Stdio::null()).status();
        ran.is_ok_and(|status| status.success())
    };
    if !["bash", "python3", "tar", "timeout"].into_iter().all(there) {
        eprintln!("skipped: there is no bash, python3, tar or timeout here");
        return None;
    }
    let mut command = Command::new("bash");
    command.arg(format!("scripts/{name}")).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.env("ISOPLETH", assert_cmd::cargo::cargo_bin!("isopleth"));
    command.env("DEVICE", "cpu").env("PEERS", "no").env("OUT", out).stdin(Stdio::null());
    Some(command)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A program that ends like a Rust test program.
fn tests_that(pass: bool, folder: &TempDir) -> std::path::PathBuf {
    let (word, counts) = if pass { ("ok", "3 passed; 0") } else { ("FAILED", "2 passed; 1") };
    let said = format!("test result: {word}. {counts} failed; 0 ignored; 0 measured");
    let code = i32::from(!pass);
    let path = write(folder, "contract", &format!("#!/bin/sh\necho '{said}'\nexit {code}\n"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.into()
}

#[test]
fn every_step_of_the_check_answers() {
    let folder = TempDir::new().unwrap();
    let Some(mut check) = script("gpu-check.sh", folder.path()) else { return };
    let output = check.env("CONTRACT", tests_that(true, &folder)).output().unwrap();
    let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}");
    let report = json(&folder.path().join("gpu-check.json"));
    assert_eq!((&report["finished"], &report["device"]), (&true.into(), &"cpu".into()));
    assert_eq!(report["failed"], Value::Array(Vec::new()), "{report:#}");
    let steps = report["steps"].as_array().unwrap();
    let step = |name: &str| &steps.iter().find(|s| s["name"] == name).unwrap()["report"];
    assert_eq!(step("contract tests, contract")["passed"], 3);
    assert_eq!(step("accuracy f32")["passed"], true);
    assert!(step("scan 100K × 1,048,576")["wall_s"].is_f64());
    assert!(step("training")["steps_per_s"].is_f64());
    assert_eq!(step("table to table, 100K × 1,048,576")["device"]["asked"], "cpu");
}

/// A law for a card is carried there and asked: its path says `on_a_gpu`, its program is in the bundle.
#[test]
fn every_law_for_a_card_is_carried_to_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let packed = read(&root.join("scripts/gpu-check.sh"));
    let packed = packed.split_once("\nlaws=(").unwrap().1.split_once(')').unwrap().0;
    let packed: Vec<&str> = packed.split(' ').collect();
    let mut with_laws = 0;
    for entry in fs::read_dir(root.join("tests")).unwrap() {
        let path = entry.unwrap().path();
        let target = path.file_stem().unwrap().to_str().unwrap().to_string();
        if path.extension().is_none_or(|e| e != "rs") {
            continue;
        }
        let parts = read(&path);
        let parts =
            parts.lines().filter_map(|l| l.strip_prefix("#[path = \"")?.strip_suffix("\"]"));
        let parts = parts.map(|part| read(&root.join("tests").join(part)));
        let laws =
            parts.filter(|text| text.contains("mod on_a_gpu") || text.contains("fn on_a_gpu"));
        let laws = laws.count();
        with_laws += laws;
        assert!(laws == 0 || packed.contains(&target.as_str()), "{target} is not packed");
    }
    assert!(with_laws > 2, "{with_laws}");
}

/// Out of time, a failed law, and a device that is not there: all on the record, which stays whole.
#[test]
fn a_check_that_fails_says_where() {
    let folder = TempDir::new().unwrap();
    let Some(mut check) = script("gpu-check.sh", folder.path()) else { return };
    check.env("CONTRACT", tests_that(false, &folder)).env("DEVICE", "cuda:77");
    let output = check.env("SECONDS_ALLOWED", "20").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report = json(&folder.path().join("gpu-check.json"));
    assert_eq!(report["finished"], true);
    let failed = report["failed"].as_array().unwrap();
    for name in ["contract tests, contract", "accuracy f32", "training step", "training"] {
        assert!(failed.contains(&name.into()), "{name}: {report:#}");
    }
    let steps = report["steps"].as_array().unwrap();
    let said = |name: &str| {
        let step = steps.iter().find(|s| s["name"] == name).unwrap();
        step["said"].as_str().or(step["skipped"].as_str()).unwrap_or_default().to_string()
    };
    assert!(said("accuracy f32").contains("error: "), "{report:#}");
}

/// A training in windows, carried from machine to machine, is the training in one go, bit for bit.
#[test]
fn windows_of_training_add_up_to_one_run() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", TINY);
    let whole = folder.path().join("whole.safetensors");
    train(&recipe, &whole, &[]);
    for (window, code, finished) in [(1, 3, false), (2, 0, true)] {
        let out = folder.path().join(format!("out{window}"));
        let Some(mut windowed) = script("gpu-train.sh", &out) else { return };
        let carried = folder.path().join(format!("out{}", window - 1));
        windowed.arg(&recipe).env("CARRIED", carried).env("WINDOW_STEPS", "6");
        let output = windowed.output().unwrap();
        let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{said}");
        let report = json(&out.join("gpu-train.json"));
        assert_eq!(report["finished"], finished, "{report:#}");
        assert_eq!(report["trainings"][0]["last"]["step"], 6 * window, "{report:#}");
        assert_eq!(fs::read_dir(&out).unwrap().count(), 2, "an archive and the report");
    }
    let archive = folder.path().join("out2/tiny.tar.gz");
    let unpack = Command::new("tar").arg("-xzf").arg(archive).current_dir(folder.path()).status();
    assert!(unpack.unwrap().success());
    let weights = |path: &Path| Checkpoint::open(path).unwrap().tensors;
    let (whole, parts) = (weights(&whole), weights(&folder.path().join("tiny.safetensors")));
    assert!(!whole.is_empty() && whole.keys().eq(parts.keys()));
    for (name, tensor) in &whole {
        let bits = |t: &candle_core::Tensor| -> Vec<u32> {
            t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
        };
        assert_eq!(bits(tensor), bits(&parts[name]), "{name}");
    }
    let journal = fs::read_to_string(folder.path().join("tiny.journal.jsonl")).unwrap();
    assert_eq!(journal.lines().count(), 2, "{journal}");
}
