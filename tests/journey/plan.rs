//! Where to survey next, through the binary.

use std::fs;

use isopleth::geo::{
    crs::Crs,
    survey::{Survey, SurveyOptions},
    table::Columns,
};
use serde_json::Value;
use tempfile::TempDir;

use super::{assert_error, ok, refused};

const SURVEY: &str = "data/survey.csv";
const GRID: &str = "data/grid.tif";

#[test]
fn sites_are_proposed_where_they_can_be_reached() {
    let folder = TempDir::new().unwrap();
    let place = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let west = r#"{"type":"FeatureCollection","features":[{"type":"Feature","properties":{},"geometry":
        {"type":"Polygon","coordinates":[[[-5,0],[-2.5,0],[-2.5,5],[-5,5],[-5,0]]]}}]}"#;
    fs::write(place("west.geojson"), west).unwrap();
    let (out, west) = (place("out"), place("west.geojson"));
    let said = ok(&[
        "plan",
        "--surveys",
        SURVEY,
        "--like",
        GRID,
        "--threshold",
        "0.2",
        "--sites",
        "4",
        "--min-distance",
        "15km",
        "--reachable",
        &west,
        "--out",
        &out,
    ]);
    for part in ["pixels of", "site 4", "% less", "tested each"] {
        assert!(said.contains(part), "no `{part}` in\n{said}");
    }
    let table = Columns::read(place("out/plan.csv")).unwrap();
    let column = |name: &str| table.numbers(name).unwrap().to_vec();
    let (mut x, mut y, gain) = (column("lon"), column("lat"), column("gain"));
    assert_eq!(column("order"), [1.0, 2.0, 3.0, 4.0]);
    assert!(x.iter().all(|x| *x < -2.5 + 0.1), "{x:?}");
    assert!(gain.iter().all(|g| *g > 0.0));
    assert!(column("exceedance").iter().all(|p| (0.0..=1.0).contains(p)));
    // In a GIS: the same points, in the same system.
    let points = Columns::read(place("out/plan.gpkg")).unwrap();
    assert_eq!(points.numbers("lat").unwrap(), y);
    assert!(fs::read(place("out/plan.png")).unwrap().starts_with(b"\x89PNG"));
    let record: Value = serde_json::from_slice(&fs::read(place("out/run.json")).unwrap()).unwrap();
    assert!(record["after"].as_f64().unwrap() < record["before"].as_f64().unwrap());
    assert_eq!(record["sites"], 4);
    // Far enough from one another and from the survey's sites.
    let survey = Survey::read(SURVEY, &SurveyOptions::default()).unwrap();
    let utm = Crs::from_user("EPSG:32630").unwrap();
    let (mut sx, mut sy) = (survey.x.clone(), survey.y.clone());
    survey.crs.transform(&utm, &mut sx, &mut sy).unwrap();
    survey.crs.transform(&utm, &mut x, &mut y).unwrap();
    for i in 0..4 {
        let others = (0..i).map(|j| (x[j], y[j])).chain(sx.iter().copied().zip(sy.iter().copied()));
        for (a, b) in others {
            let gap = (x[i] - a).hypot(y[i] - b);
            assert!(gap > 0.99 * 15e3, "site {} lies {gap} m from another", i + 1);
        }
    }
}

#[test]
fn plans_that_cannot_be_are_refused_in_words() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_string();
    let plan = |more: &[&str]| {
        let how = ["plan", "--surveys", SURVEY, "--like", GRID, "--out", &out];
        [&how[..], more].concat().into_iter().map(String::from).collect::<Vec<_>>()
    };
    for (more, what, help) in [
        (["--threshold", "20"], "no surface can be at this threshold", "0.2 for 20 %"),
        (["--sites", "0"], "plan of no sites", "--sites 10"),
        (["--min-distance", "0.1deg"], "on the ground is a length", "5km"),
    ] {
        let args = plan(&more);
        let error = refused(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert_error(&error, what, &[], help);
    }
    assert!(!std::path::Path::new(&out).exists());
}
