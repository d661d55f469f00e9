//! Looking at a prior: pictures and tables of draws.

use std::fs;

use isopleth::geo::table::Columns;
use tempfile::TempDir;

use super::{
    assert_error, ok,
    recipes::{TINY, write},
    refused,
};

#[test]
fn a_sheet_of_surfaces_is_a_picture_that_its_seed_decides() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", TINY);
    let draw = |name: &str, seed: &str| {
        let out = folder.path().join(name);
        let said = ok(&[
            "sample",
            &recipe,
            "--out",
            out.to_str().unwrap(),
            "--count",
            "2",
            "--seed",
            seed,
        ]);
        assert!(said.contains(&format!("2 draws, seed {seed}")), "{said}");
        fs::read(out).unwrap()
    };
    let first = draw("a.png", "1");
    assert!(first.starts_with(b"\x89PNG"));
    assert_eq!(first, draw("b.png", "1"));
    assert_ne!(first, draw("c.png", "2"));
}

#[test]
fn surveys_along_a_line_are_curves() {
    let folder = TempDir::new().unwrap();
    let line = TINY
        .replace("targets = 8", "targets = 8\nline = true")
        .replace("\"binomial\"", "\"gaussian\"");
    let recipe = write(&folder, "line.toml", &line);
    let out = folder.path().join("line.png");
    ok(&["sample", &recipe, "--out", out.to_str().unwrap(), "--count", "1"]);
    assert!(fs::read(out).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn a_table_of_draws_has_a_row_per_site() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", TINY);
    for name in ["draws.parquet", "draws.csv"] {
        let out = folder.path().join(name);
        let out = out.to_str().unwrap();
        ok(&["sample", &recipe, "--out", out, "--count", "3", "--sites", "5"]);
        let table = Columns::read(out).unwrap();
        let expected = ["task", "role", "x", "y", "surface", "noisy", "positive", "tested"];
        assert_eq!(table.names(), expected);
        assert_eq!(table.len(), 3 * (5 + 8));
        let column = |name: &str| table.numbers(name).unwrap();
        let roles = table.text("role").unwrap();
        for task in 0..3 {
            let context = (0..table.len())
                .filter(|i| column("task")[*i] == task as f64 && roles[*i] == "context");
            assert_eq!(context.count(), 5);
        }
        for i in 0..table.len() {
            assert!(column("positive")[i] <= column("tested")[i] && column("tested")[i] >= 1.0);
            assert!(column("surface")[i].is_finite() && column("noisy")[i].is_finite());
        }
    }
    // A continuous outcome is the noisy value itself.
    let values = write(&folder, "values.toml", &TINY.replace("\"binomial\"", "\"gaussian\""));
    let out = folder.path().join("values.parquet");
    ok(&["sample", &values, "--out", out.to_str().unwrap(), "--count", "1"]);
    let table = Columns::read(out).unwrap();
    assert_eq!(table.numbers("value").unwrap(), table.numbers("noisy").unwrap());
}

#[test]
fn what_cannot_be_drawn_is_refused_before_anything_is_written() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", TINY);
    let bad = write(&folder, "bad.toml", &TINY.replace("nugget_sd", "nuget_sd"));
    let place = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (png, gif) = (place("draws.png"), place("draws.gif"));
    let error = refused(&["sample", &bad, "--out", &png]);
    assert_error(&error, "nuget_sd", &["bad.toml"], "did you mean `nugget_sd`?");
    let error = refused(&["sample", &recipe, "--out", &gif]);
    assert_error(&error, ".png, .parquet or .csv", &["draws.gif"], "--out");
    let error = refused(&["sample", &recipe, "--out", &png, "--count", "0"]);
    assert_error(&error, "cannot be shown", &["0"], "1 to 48");
    let error = refused(&["sample", &recipe, "--out", &png, "--sites", "1"]);
    assert_error(&error, "cannot be drawn", &["1"], "at least 2");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);

    fs::write(&png, "mine").unwrap();
    let error = refused(&["sample", &recipe, "--out", &png]);
    assert_error(&error, "exists", &["draws.png"], "--force");
    assert_eq!(fs::read(&png).unwrap(), b"mine");
    ok(&["sample", &recipe, "--out", &png, "--count", "1", "--force"]);
    assert!(fs::read(&png).unwrap().starts_with(b"\x89PNG"));
}
