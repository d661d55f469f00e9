//! Maps whose distances are on no plane: of the world, and around a barrier.

use std::{fmt::Write, fs, path::Path};

use gdal::Dataset;
use isopleth::{Link, Stream, geo::table::Columns};
use serde_json::Value;
use tempfile::TempDir;

use super::{
    assert_error, ok,
    recipes::{train, write},
    refused,
};

fn pixels(path: &Path) -> Vec<f64> {
    let raster = Dataset::open(path).unwrap();
    let band = raster.rasterband(1).unwrap();
    let nothing = band.no_data_value();
    let values = band.read_band_as::<f64>().unwrap();
    let missing = |v: f64| v.is_nan() || Some(v) == nothing;
    values.data().iter().map(|&v| if missing(v) { f64::NAN } else { v }).collect()
}

fn record(out: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(out.join("run.json")).unwrap()).unwrap()
}

fn written(folder: &TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().into()
}

/// 60 sites all over the world, where it is worse towards 180°.
fn world(folder: &TempDir) -> (String, Vec<[f64; 2]>) {
    let mut rng = Stream::new(2, "world", 0);
    let mut text = String::from("lon,lat,tested,positive\n");
    let mut sites = Vec::new();
    for _ in 0..60 {
        let place = [rng.uniform(-180.0, 180.0), rng.uniform(-1.0, 1.0).asin().to_degrees()];
        let eta = -1.0 - 1.5 * place[0].to_radians().cos() * place[1].to_radians().cos();
        let positive = rng.binomial(80, Link::Logit.outcome(eta));
        let _ = writeln!(text, "{},{},80,{positive}", place[0], place[1]);
        sites.push(place);
    }
    (written(folder, "world.csv", &text), sites)
}

/// Great circle on the mean sphere, km.
fn apart(a: [f64; 2], b: [f64; 2]) -> f64 {
    let [a, b] = [a, b].map(|p| p.map(f64::to_radians));
    let h = (0.5 * (b[1] - a[1])).sin().powi(2)
        + a[1].cos() * b[1].cos() * (0.5 * (b[0] - a[0])).sin().powi(2);
    2.0 * 6371.0088 * h.sqrt().asin()
}

/// By every model that reads distances alone, on pixels that close around the date line.
#[test]
fn the_world_is_mapped_without_a_seam() {
    let folder = TempDir::new().unwrap();
    let (survey, sites) = world(&folder);
    let mut models = vec!["gp", "vecchia"];
    if isopleth::checkpoint::shipped().iter().any(|(name, _)| *name == "prevalence") {
        models.push("prevalence");
    }
    for model in models {
        let out = folder.path().join(model);
        let said = ok(&[
            "map",
            "--surveys",
            &survey,
            "--resolution",
            "6deg",
            "--model",
            model,
            "--out",
            out.to_str().unwrap(),
            "--no-pictures",
            "--products",
            "mean,distance",
        ]);
        assert!(said.contains("measured through the globe"), "{said}");
        assert!(said.contains("distances through the globe"), "{said}");
        assert!(!said.contains("wider than a plane"), "{said}");
        let record = record(&out);
        assert_eq!([&record["grid"]["rows"], &record["grid"]["cols"]], [30, 60], "{record}");
        assert_eq!(record["grid"]["origin"], serde_json::json!([-180.0, 90.0]));
        assert!(record["frame"]["geometry"]["globe"]["lon"].is_number(), "{}", record["frame"]);

        // West and east end are neighbours, as alike as columns inside the map are.
        let mean = pixels(&out.join("mean.tif"));
        let step = |a: usize, b: usize| {
            let off = (0..30).map(|row| (mean[row * 60 + a] - mean[row * 60 + b]).abs());
            off.fold(0.0, f64::max)
        };
        let inside = (0..59).map(|col| step(col, col + 1)).fold(0.0, f64::max);
        assert!(step(59, 0) <= inside, "{model}: {} across, {inside} inside", step(59, 0));
        let high = mean[15 * 60] - mean[15 * 60 + 30];
        assert!(high > 0.2, "{model}: at 180° more by {high} only");

        let km = pixels(&out.join("distance.tif"));
        for (i, km) in km.iter().enumerate() {
            let here = [-177.0 + 6.0 * (i % 60) as f64, 87.0 - 6.0 * (i / 60) as f64];
            let near = sites.iter().map(|s| apart(*s, here)).fold(f64::INFINITY, f64::min);
            // The ellipsoid is no sphere: 0.6 % at most.
            assert!((km - near).abs() < 0.007 * near + 1.0, "{here:?}: {km} of {near} km");
        }
    }
}

/// Folds, joint draws, districts' draws, predictions and plans go around the globe too.
#[test]
fn what_else_there_is_works_on_the_globe() {
    let folder = TempDir::new().unwrap();
    let (survey, _) = world(&folder);
    let said = ok(&["validate", "--surveys", &survey, "--folds", "blocks:4", "--model", "gp"]);
    assert!(said.contains("intercept-only"), "{said}");
    let said =
        ok(&["validate", "--surveys", &survey, "--folds", "clusters:900km", "--model", "gp"]);
    assert!(said.contains("nearest-site"), "{said}");

    let out = folder.path().join("drawn");
    ok(&[
        "map",
        "--surveys",
        &survey,
        "--resolution",
        "10deg",
        "--model",
        "gp",
        "--draws",
        "8",
        "--out",
        out.to_str().unwrap(),
        "--products",
        "mean",
        "--no-pictures",
    ]);
    let draw = pixels(&out.join("draws.tif"));
    assert!(
        draw.len() == 18 * 36 && draw.iter().all(|v| (0.0..=1.0).contains(v)),
        "{}",
        draw.len()
    );

    let targets = written(&folder, "targets.csv", "lon,lat\n179.99999,10\n-179.99999,10\n");
    let answers = folder.path().join("answers.csv");
    ok(&[
        "predict",
        "--context",
        &survey,
        "--targets",
        &targets,
        "--model",
        "gp",
        "--out",
        answers.to_str().unwrap(),
    ]);
    let table = Columns::read(&answers).unwrap();
    for column in ["surface_mean", "surface_sd", "observation_quantile_0.975"] {
        let values = table.numbers(column).unwrap();
        assert!((values[0] - values[1]).abs() < 1e-5, "{column}: {values:?}");
    }

    let out = folder.path().join("plan");
    ok(&[
        "plan",
        "--surveys",
        &survey,
        "--resolution",
        "20deg",
        "--sites",
        "2",
        "--min-distance",
        "500km",
        "--out",
        out.to_str().unwrap(),
    ]);
}

#[test]
fn what_the_globe_cannot_do_is_refused() {
    let folder = TempDir::new().unwrap();
    let (survey, _) = world(&folder);
    let out = folder.path().join("out");
    let map = |more: &[&str]| {
        let mut args = vec!["map", "--surveys", &survey, "--out", out.to_str().unwrap()];
        args.extend(more);
        refused(&args)
    };
    assert_error(
        &map(&["--distance", "globe", "--displacement", "5"]),
        "displaced sites are integrated over on a plane only",
        &["--distance", "globe"],
        "leave --distance globe out",
    );
    assert_error(
        &map(&["--distance", "sphere"]),
        "on a plane or on the globe",
        &["sphere"],
        "--distance plane or --distance globe",
    );
    // A model that reads coordinates has a seam where they have one.
    let recipe = "name = 'tiny cnp'\n[model]\nkind = 'cnp'\nwidth = 8\ndepth = 2\n[prior]\nkind = 'gp'\n\
                  [design]\ncontext = [{ sites = [10, 20], weight = 1.0 }]\ntargets = 8\n\
                  [task]\nlikelihood = 'binomial'\n[train]\nsteps = 2\nrows = 2\nvalidate_tasks = 2\n";
    let (recipe, model) =
        (write(&folder, "cnp.toml", recipe), folder.path().join("cnp.safetensors"));
    train(&recipe, &model, &[]);
    assert_error(
        &map(&["--model", model.to_str().unwrap()]),
        "the model reads coordinates on a plane",
        &["distances", "through the globe"],
        "--distance plane",
    );
    assert!(!out.exists());
}

/// Land 100 × 100 km with an inlet 10 km wide from the north, and 80 sites: worse on the western shore.
fn country(folder: &TempDir) -> (String, String) {
    let ring = "[[0,0],[100,0],[100,100],[55,100],[55,20],[45,20],[45,100],[0,100],[0,0]]";
    let ring = ring.replace("],[", "];[").replace(['[', ']'], "");
    let metres: Vec<String> = ring
        .split(';')
        .map(|pair| {
            let at: Vec<f64> = pair.split(',').map(|v| v.parse().unwrap()).collect();
            format!("[{},{}]", 450_000.0 + 1e3 * at[0], 5_000_000.0 + 1e3 * at[1])
        })
        .collect();
    let land = format!(
        "{{\"type\":\"FeatureCollection\",\"crs\":{{\"type\":\"name\",\"properties\":{{\"name\":\
         \"urn:ogc:def:crs:EPSG::32631\"}}}},\"features\":[{{\"type\":\"Feature\",\"properties\":{{}},\
         \"geometry\":{{\"type\":\"Polygon\",\"coordinates\":[[{}]]}}}}]}}",
        metres.join(",")
    );
    let mut rng = Stream::new(5, "country", 0);
    let mut text = String::from("x,y,tested,positive\n");
    let mut sites = 0;
    while sites < 80 {
        let (x, y) = (rng.uniform(1.0, 99.0), rng.uniform(1.0, 99.0));
        if (44.0..56.0).contains(&x) && y > 19.0 {
            continue;
        }
        sites += 1;
        let eta = if x < 50.0 { 0.02 * (y - 10.0) } else { -0.02 * (y - 10.0) } - 0.5;
        let positive = rng.binomial(60, Link::Logit.outcome(eta));
        let _ = writeln!(text, "{},{},60,{positive}", 450_000.0 + 1e3 * x, 5_000_000.0 + 1e3 * y);
    }
    (written(folder, "country.csv", &text), written(folder, "land.geojson", &land))
}

#[test]
fn shores_apart_by_land_are_mapped_apart() {
    let folder = TempDir::new().unwrap();
    let (survey, land) = country(&folder);
    let out = folder.path().join("out");
    let said = ok(&[
        "map",
        "--surveys",
        &survey,
        "--crs",
        "EPSG:32631",
        "--inside",
        &land,
        "--resolution",
        "2km",
        "--model",
        "gp",
        "--products",
        "mean",
        "--no-pictures",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert!(said.contains("distances are ways within"), "{said}");
    assert!(said.contains("lie in the barrier"), "{said}");
    let record = record(&out);
    let around = &record["frame"]["geometry"]["around"];
    assert!(around["stress"].as_f64().unwrap() < 0.15, "{around}");
    assert_eq!(around["passable"], "inside");
    let (cols, origin) = (record["grid"]["cols"].as_u64().unwrap(), &record["grid"]["origin"]);
    let mean = pixels(&out.join("mean.tif"));
    let at = |x: f64, y: f64| {
        let col = ((450_000.0 + 1e3 * x - origin[0].as_f64().unwrap()) / 2000.0) as u64;
        let row = ((origin[1].as_f64().unwrap() - 5_000_000.0 - 1e3 * y) / 2000.0) as u64;
        mean[(row * cols + col) as usize]
    };
    assert!(at(50.0, 70.0).is_nan(), "water is mapped");
    let step = at(43.0, 90.0) - at(57.0, 90.0);
    assert!(step > 0.4, "from shore to shore by {step} only");

    // Places at sea have no answer, and are counted.
    let targets = "x,y\n460000,5050000\n500000,5080000\n";
    let targets = written(&folder, "targets.csv", targets);
    let answers = folder.path().join("answers.csv");
    let said = ok(&[
        "predict",
        "--context",
        &survey,
        "--crs",
        "EPSG:32631",
        "--inside",
        &land,
        "--targets",
        &targets,
        "--model",
        "gp",
        "--out",
        answers.to_str().unwrap(),
    ]);
    assert!(said.contains("1 target in the barrier"), "{said}");
    let table = Columns::read(&answers).unwrap();
    let values = table.numbers("surface_mean").unwrap();
    assert!(values[0].is_finite() && values[1].is_nan(), "{values:?}");
}

#[test]
fn barriers_that_cannot_be_are_refused() {
    let folder = TempDir::new().unwrap();
    let (survey, land) = country(&folder);
    let out = folder.path().join("out");
    let map = |more: &[&str]| {
        let mut args = vec!["map", "--surveys", &survey, "--crs", "EPSG:32631", "--out"];
        args.push(out.to_str().unwrap());
        args.extend(more);
        refused(&args)
    };
    // The land as a barrier.
    assert_error(
        &map(&["--barrier", &land]),
        "sites stand in the barrier",
        &["rows", "--barrier"],
        "is it the other one?",
    );
    assert_error(
        &map(&["--inside", &land, "--distance", "globe"]),
        "found on a plane",
        &["--distance globe"],
        "leave --distance globe out",
    );
    assert_error(
        &map(&["--inside", &land, "--displacement", "5"]),
        "from known places",
        &["--displacement"],
        "leave --displacement out",
    );
    assert!(!out.exists());
}
