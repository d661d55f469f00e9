//! Surveys that a model knows nothing of: warned about, refused when asked to, and said why.

use std::fs;

use serde_json::Value;
use tempfile::TempDir;

use super::{assert_error, ok, refused};

/// The bundled survey with every row changed: (lon, lat, tested, positive) in, cells out.
fn spoilt(
    folder: &TempDir,
    name: &str,
    head: &str,
    row: impl Fn(usize, [f64; 4]) -> String,
) -> String {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/data/survey.csv")).unwrap();
    let mut out = format!("{head}\n");
    for (i, line) in text.lines().skip(1).enumerate() {
        let cells: Vec<f64> = line.split(',').skip(2).map(|c| c.parse().unwrap()).collect();
        out += &format!("{}\n", row(i, [cells[0], cells[1], cells[2], cells[3]]));
    }
    let path = folder.path().join(name);
    fs::write(&path, out).unwrap();
    path.to_str().unwrap().to_string()
}

fn verdict(args: &[&str]) -> Value {
    serde_json::from_str(&ok(&[&["trust", "--json", "--surveys"], args].concat())).unwrap()
}

fn about(verdict: &Value) -> Vec<String> {
    let found = verdict["findings"].as_array().unwrap().iter();
    found.map(|f| f["about"].as_str().unwrap().to_string()).collect()
}

#[test]
fn the_bundled_survey_is_like_those_of_the_training() {
    let found = verdict(&["data/survey.csv"]);
    assert_eq!(about(&found), Vec::<String>::new(), "{found:#}");
    assert_eq!((&found["sites"], &found["judged"]), (&138.into(), &138.into()));
    let names: Vec<&str> =
        found["groups"].as_array().unwrap().iter().map(|g| g["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["observed", "design", "foretold"]);
    let said = ok(&["trust", "--surveys", "data/survey.csv", "--strict"]);
    assert!(said.contains("99 % of training") && said.contains("nothing was found"), "{said}");
}

#[test]
fn wrong_surveys_are_named_for_what_is_wrong() {
    let folder = TempDir::new().unwrap();
    let km = 111.0;
    let plain = "x,y,tested,positive";
    let metres = spoilt(&folder, "metres.csv", plain, |_, [x, y, n, k]| {
        format!("{},{},{n},{k}", 1000.0 * km * x, 1000.0 * km * y)
    });
    let percent = spoilt(&folder, "percent.csv", "lon,lat,tested,positive", |_, [x, y, n, k]| {
        format!("{x},{y},100,{}", (100.0 * k / n).round())
    });
    let rare = spoilt(&folder, "rare.csv", "lon,lat,tested,positive", |i, [x, y, n, _]| {
        format!("{x},{y},{},{}", 10.0 * n, usize::from(i % 50 == 7))
    });
    let stray = spoilt(&folder, "stray.csv", plain, |i, [x, y, n, k]| {
        let away = if i == 11 { 9000.0 } else { 0.0 };
        format!("{},{},{n},{k}", 50.0 * x + away, 50.0 * y)
    });
    let none = spoilt(&folder, "none.csv", "lon,lat,tested,positive", |_, [x, y, n, _]| {
        format!("{x},{y},{n},0")
    });
    let all = spoilt(&folder, "all.csv", "lon,lat,tested,positive", |_, [x, y, n, _]| {
        format!("{x},{y},{n},{n}")
    });
    let local = ["--crs", "local:km"];
    for (file, more, what, words) in [
        (&none, &[][..], "positives", "nobody is positive of"),
        (&all, &[], "positives", "the share of those who are not is below 0.0"),
        (&percent, &[][..], "number tested", "percentages"),
        (&rare, &[], "prevalence over all sites", "rather than a prevalence"),
        (&stray, &local[..], "share of the length", "squeeze the rest"),
    ] {
        let found = verdict(&[&[file.as_str()], more].concat());
        assert!(about(&found).iter().any(|a| a.contains(what)), "{file}: {found:#}");
        assert!(found["findings"].to_string().contains(words), "{file}: {found:#}");
        let error = refused_after_text(&[&["trust", "--surveys", file, "--strict"], more].concat());
        assert_error(&error, "unlike what the model was trained on", &[what], "--model gp");
    }
    // Metres for kilometres are refused before anything is asked of a model.
    let error = refused(&[&["trust", "--surveys", metres.as_str()], &local[..]].concat());
    assert_error(&error, "farther apart than any two places on Earth", &["span"], "local:m");
}

/// Values far from all others bend a Gaussian process: they are named, and a logarithm where there is one.
#[test]
fn values_far_from_all_others_are_named() {
    let folder = TempDir::new().unwrap();
    let values = |name: &str, far: f64, low: f64| {
        spoilt(&folder, name, "lon,lat,level", |i, [x, y, n, k]| {
            format!("{x},{y},{}", if i == 11 { far } else { low + k / n })
        })
    };
    let asked = |file: &str| verdict(&[file, "--value", "level"]);
    let near = asked(&values("near.csv", 1.5, 1.0));
    assert!(!about(&near).contains(&"outliers".to_string()), "{near:#}");
    for (file, log) in
        [(values("above.csv", 90.0, 1.0), true), (values("below.csv", -90.0, 0.0), false)]
    {
        let found = asked(&file);
        let finding =
            found["findings"].as_array().unwrap().iter().find(|f| f["about"] == "outliers");
        let text = finding.unwrap_or_else(|| panic!("{found:#}"))["text"].as_str().unwrap();
        assert!(text.starts_with("1 of 138 values lie more than 6 times"), "{text}");
        assert_eq!(text.contains("--log-value"), log, "{text}");
    }
}

/// Standard error of a command that is refused after it printed its table.
fn refused_after_text(args: &[&str]) -> String {
    let output = super::command(args).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    assert!(super::text(&output.stdout).contains("WARNING"));
    super::text(&output.stderr)
}

#[test]
fn maps_and_predictions_warn_and_refuse() {
    let folder = TempDir::new().unwrap();
    let file = spoilt(&folder, "percent.csv", "lon,lat,tested,positive", |_, [x, y, n, k]| {
        format!("{x},{y},100,{}", (100.0 * k / n).round())
    });
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let map = ["map", "--surveys", &file, "--resolution", "60km", "--no-pictures", "--out", out];
    let error = refused(&[&map[..], &["--strict"]].concat());
    assert_error(&error, "unlike", &["percentages"], "--strict");
    assert!(!folder.path().join("out").exists());
    let said = ok(&map);
    assert!(said.contains("warning     exactly 100 people are tested"), "{said}");
    let record = fs::read_to_string(folder.path().join("out/run.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["trust"]["findings"][0]["about"], "number tested");
    assert_eq!(record["trust"]["groups"].as_array().unwrap().len(), 3);

    let table = folder.path().join("at.csv");
    let table = table.to_str().unwrap();
    let predict = ["predict", "--context", &file, "--targets", &file, "--out", table];
    let error = refused(&[&predict[..], &["--strict"]].concat());
    assert_error(&error, "unlike", &["percentages"], "--strict");
    assert!(!folder.path().join("at.csv").exists());

    let validate = ["validate", "--surveys", &file, "--folds", "3", "--strict"];
    assert_error(&refused(&validate), "unlike", &["percentages"], "--strict");
}

/// The pixels say how far they are from data, and how much the prior decides there.
#[test]
fn maps_of_distance_and_of_the_priors_share() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let said = ok(&[
        "map",
        "--surveys",
        "data/survey.csv",
        "--resolution",
        "40km",
        "--products",
        "distance,prior-share,sd",
        "--model",
        "gp",
        "--tile",
        "16",
        "--out",
        out,
    ]);
    assert!(said.contains("distance.tif") && said.contains("prior-share.tif"), "{said}");
    let read = |name: &str| {
        let data = gdal::Dataset::open(folder.path().join("out").join(name)).unwrap();
        let band = data.rasterband(1).unwrap();
        let values = band.read_band_as::<f32>().unwrap().into_shape_and_vec().1;
        (
            band.unit(),
            values.into_iter().filter(|v| v.is_finite()).map(f64::from).collect::<Vec<_>>(),
        )
    };
    let ((km, far), (_, share)) = (read("distance.tif"), read("prior-share.tif"));
    assert_eq!((km.as_str(), far.len()), ("km", share.len()));
    assert!(
        far.iter().all(|v| (0.0..600.0).contains(v)) && share.iter().all(|v| *v > 0.0 && *v <= 1.0)
    );
    // Far from sites the prior decides: ranks of the two go together.
    let mean = |near: bool| {
        let mut sorted = far.clone();
        sorted.sort_by(f64::total_cmp);
        let cut = sorted[sorted.len() / 2];
        let own: Vec<f64> =
            (0..far.len()).filter(|i| (far[*i] < cut) == near).map(|i| share[i]).collect();
        own.iter().sum::<f64>() / own.len() as f64
    };
    assert!(mean(false) > mean(true) + 0.05, "{} far, {} near", mean(false), mean(true));
}
