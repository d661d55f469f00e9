//! `isopleth benchmark scale`, scaled down: the table, the files, and slips.

use std::fs;

use super::{assert_error, ok, refused};

#[test]
fn a_small_run_prints_a_table_and_writes_scores_and_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("scale");
    let run = |models: &str| {
        let cases = "lattice-exponential,individuals,growing-region";
        let sizes = ["--sites", "200,400", "--seeds", "1", "--models", models];
        let out = out.to_str().unwrap();
        ok(&[&["benchmark", "scale", "--case", cases, "--out", out][..], &sizes].concat())
    };
    let printed = run("vecchia,gp,shipped,prevalence");
    for case in ["lattice-exponential", "individuals", "growing-region"] {
        assert!(printed.contains(&format!("**{case}**, 1 seed")), "{case} in {printed}");
        assert!(fs::metadata(out.join(format!("{case}.png"))).unwrap().len() > 5000, "{case}");
    }
    for file in ["scores.csv", "scores.parquet", "scores.json", "sizes.png", "table.md"] {
        assert!(fs::metadata(out.join(file)).unwrap().len() > 500, "{file}");
    }

    // The fitted processes come near the floor, and no process is left out where it could answer.
    let scores: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("scores.json")).unwrap()).unwrap();
    let runs = scores.as_array().unwrap();
    let of = |case: &str, process: &str| -> Vec<[f64; 2]> {
        let fits = |run: &&serde_json::Value| run["case"] == case && run["process"] == process;
        let score = |run: &serde_json::Value| {
            [&run["scores"]["crps"], &run["scores"]["inside"][2]].map(|v| v.as_f64().unwrap())
        };
        runs.iter().filter(fits).map(score).collect()
    };
    for (case, processes) in [
        ("lattice-exponential", &["vecchia", "gp", "shipped"][..]),
        ("individuals", &["vecchia", "gp", "shipped", "prevalence"]),
        ("growing-region", &["vecchia", "gp", "shipped"]),
    ] {
        let floor = of(case, "floor");
        assert_eq!(floor.len(), 2, "two sizes, one seed");
        for process in processes {
            let met = of(case, process);
            assert_eq!(met.len(), 2, "{case}, {process}");
            for (met, floor) in met.iter().zip(&floor) {
                let ratio = met[0] / floor[0];
                assert!(ratio > 0.97 && ratio < 1.5, "{case}, {process}: {met:?}, floor {floor:?}");
                assert!(met[1] > 0.8, "{case}, {process}: {met:?}");
            }
        }
    }
    // A model of counts reads no values.
    assert!(of("growing-region", "prevalence").is_empty());
    // Named or meant, it is one model.
    assert_eq!(of("individuals", "shipped"), of("individuals", "prevalence"));
}

#[test]
fn cases_are_listed_and_slips_are_named() {
    let listed = ok(&["benchmark", "scale", "--list"]);
    assert!(listed.contains("  growing-density") && listed.contains("  vecchia"), "{listed}");
    let slip = |more: &[&str]| refused(&[&["benchmark", "scale"][..], more].concat());
    assert_error(&slip(&["--case", "continant"]), "no case named", &["individuals"], "`continent`");
    assert_error(&slip(&["--models", "vechia"]), "no process named", &["gp"], "`vecchia`");
    assert_error(&slip(&["--models", "qqq"]), "no process named", &["gp"], "--list");
    assert_error(&slip(&["--sites", "7"]), "twenty sites", &["7"], "--sites 1000");
}
