//! Surveys whose sites were moved: mapped, predicted and validated with `--displacement`, or refused with
//! what is missing.

use std::{fs, path::Path};

use isopleth::geo::table::Columns;
use serde_json::Value;
use tempfile::TempDir;

use super::{assert_error, ok, refused};

/// The bundled survey with a column as the DHS writes it: every fourth village urban.
fn dhs(folder: &TempDir, spoil: &str) -> String {
    let text = fs::read_to_string("data/survey.csv").unwrap();
    let rows = text.lines().enumerate().map(|(i, line)| match i {
        0 => format!("{line},URBAN_RURA"),
        3 if !spoil.is_empty() => format!("{line},{spoil}"),
        i => format!("{line},{}", if i % 4 == 0 { "U" } else { "R" }),
    });
    let path = folder.path().join("dhs.csv");
    fs::write(&path, rows.collect::<Vec<_>>().join("\n")).unwrap();
    path.to_str().unwrap().into()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_displaced_survey_is_mapped_and_the_map_says_so() {
    let folder = TempDir::new().unwrap();
    let survey = dhs(&folder, "");
    let map = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let mut args = vec!["map", "--surveys", &survey, "--resolution", "20km", "--model", "gp"];
        args.extend(["--no-pictures", "--products", "mean", "--out", out.to_str().unwrap()]);
        args.extend(more);
        (ok(&args), json(&out.join("run.json")))
    };
    let (said, record) = map("dhs", &["--displacement", "dhs"]);
    assert!(said.contains("took `URBAN_RURA` as urban or rural"), "{said}");
    assert!(said.contains("by up to 2 km") && said.contains("integrated over"), "{said}");
    let noted = record["survey"]["displacement"].as_str().unwrap();
    assert!(noted.contains("5 km (99 %) or 10 km (1 %)"), "{noted}");
    assert!(record["model"]["kernel"].as_str().unwrap().contains("Displaced"), "{record}");
    let (_, plain) = map("plain", &[]);
    assert!(plain["survey"]["displacement"].is_null());
    // 40 km: what the plain process must take for village effects, the other knows to be places.
    let (_, far) = map("far", &["--displacement", "40"]);
    let nugget = |record: &Value| record["model"]["nugget"].as_f64().unwrap();
    assert!(nugget(&far) < nugget(&plain), "{} of {}", nugget(&far), nugget(&plain));
    assert_ne!(record["summary"]["average"], plain["summary"]["average"]);
}

/// A trained model has no kernel: places are drawn for it, and the same ones every time.
#[test]
fn a_trained_model_is_asked_about_drawn_places() {
    if !isopleth::checkpoint::shipped().iter().any(|(name, _)| *name == "prevalence") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let targets = folder.path().join("targets.csv");
    fs::write(&targets, "lon,lat\n-3.1,1.2\n-2.2,2.0\n").unwrap();
    let predict = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let mut args = vec!["predict", "--context", "data/survey.csv", "--model", "prevalence"];
        args.extend(["--targets", targets.to_str().unwrap(), "--out", out.to_str().unwrap()]);
        args.extend(more);
        ok(&args);
        let table = Columns::read(&out).unwrap();
        [table.numbers("surface_mean").unwrap()[0], table.numbers("surface_sd").unwrap()[0]]
    };
    let plain = predict("plain.csv", &[]);
    let moved = predict("moved.csv", &["--displacement", "20km"]);
    assert_eq!(moved, predict("again.csv", &["--displacement", "20"]));
    assert_ne!(plain, moved);
    assert!((plain[0] - moved[0]).abs() < 0.2 && moved[1] > 0.0, "{plain:?} {moved:?}");
}

#[test]
fn displaced_sites_that_are_held_out_are_scored() {
    let args =
        ["validate", "--surveys", "data/survey.csv", "--folds", "3", "--model", "gp", "--json"];
    let score = |more: &[&str]| {
        let report: Value = serde_json::from_str(&ok(&[&args, more].concat())).unwrap();
        assert_eq!(report["n"], 138);
        assert!(report["of"].as_str().unwrap().contains("number tested"));
        report["log_score"].as_f64().unwrap()
    };
    // The bundled survey stands where it says: taking it for displaced costs little, and changes something.
    let (plain, moved) = (score(&[]), score(&["--displacement", "5"]));
    assert!(plain != moved && (plain - moved).abs() < 0.1, "{plain} {moved}");
}

#[test]
fn displacements_that_cannot_be_are_refused() {
    let folder = TempDir::new().unwrap();
    let (sound, spoiled) = (dhs(&folder, ""), "data/survey.csv");
    let cases: [(&str, &[&str], &str, &str, &str); 6] = [
        (
            &sound,
            &["--displacement", "5000m"],
            "distance in km, or dhs",
            "5000m",
            "--displacement 5",
        ),
        (&sound, &["--displacement", "-2"], "distance in km, or dhs", "-2", "--displacement 5"),
        (
            spoiled,
            &["--displacement", "dhs"],
            "no column tells them apart",
            "tested",
            "--urban-rural",
        ),
        (
            &sound,
            &["--urban-rural", "URBAN_RURA"],
            "nothing else",
            "URBAN_RURA",
            "--displacement dhs",
        ),
        (
            &sound,
            &["--displacement", "5", "--urban-rural", "URBAN_RURA"],
            "one distance for all sites",
            "URBAN_RURA",
            "--displacement dhs",
        ),
        (
            spoiled,
            &["--displacement", "dhs", "--urban-rural", "district"],
            "neither urban nor rural",
            "district",
            "write U or R",
        ),
    ];
    for (survey, more, what, fact, help) in cases {
        let out = folder.path().join("out");
        let joined: Vec<String> = match more {
            ["--displacement", value] => vec![format!("--displacement={value}")],
            more => more.iter().map(ToString::to_string).collect(),
        };
        let mut args =
            vec!["map", "--surveys", survey, "--model", "gp", "--out", out.to_str().unwrap()];
        args.extend(joined.iter().map(String::as_str));
        assert_error(&refused(&args), what, &[fact], help);
        assert!(!out.exists());
    }
    let spoiled = dhs(&folder, "suburb");
    let out = folder.path().join("out");
    let args = ["map", "--surveys", &spoiled, "--model", "gp", "--out", out.to_str().unwrap()];
    let error = refused(&[&args[..], &["--displacement", "dhs"]].concat());
    assert_error(&error, "neither urban nor rural", &["suburb", "row"], "write U or R");
}
