//! Joint draws and district tables, through the binary and read again with GDAL.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::OnceLock,
};

use gdal::{
    Dataset, Metadata,
    vector::{LayerAccess, field_type_to_name},
};
use isopleth::geo::table::Columns;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{assert_error, command, ok, refused, text};

const SURVEY: &str = "data/survey.csv";

fn pixels(path: impl AsRef<Path>, band: usize) -> Vec<f64> {
    let raster = Dataset::open(path).unwrap();
    let band = raster.rasterband(band).unwrap();
    let nothing = band.no_data_value();
    let values = band.read_band_as::<f64>().unwrap();
    let missing = |v: f64| v.is_nan() || Some(v) == nothing;
    values.data().iter().map(|&v| if missing(v) { f64::NAN } else { v }).collect()
}

/// The bundled survey mapped once, with draws, for every test here to ask.
fn mapped() -> &'static Path {
    static MAP: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, out) = MAP.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        let out = folder.path().join("out");
        ok(&[
            "map",
            "--surveys",
            SURVEY,
            "--like",
            "data/grid.tif",
            "--model",
            "gp",
            "--products",
            "mean,sd",
            "--draws",
            "40",
            "--out",
            out.to_str().unwrap(),
        ]);
        (folder, out)
    });
    out
}

fn square(west: f64, south: f64, east: f64, north: f64) -> Value {
    json!([[west, south], [east, south], [east, north], [west, north], [west, south]])
}

/// A layer on the plane of the bundled grid: GeoJSON of named polygons.
fn layer(folder: &TempDir, areas: &[(&str, Value)]) -> String {
    let features: Vec<Value> = areas
        .iter()
        .enumerate()
        .map(|(i, (name, geometry))| {
            let properties = json!({ "name": name, "code": i });
            json!({ "type": "Feature", "properties": properties, "geometry": geometry })
        })
        .collect();
    let crs = json!({ "type": "name", "properties": { "name": "urn:ogc:def:crs:EPSG::32630" } });
    let all = json!({ "type": "FeatureCollection", "crs": crs, "features": features });
    let path = folder.path().join("areas.geojson");
    fs::write(&path, all.to_string()).unwrap();
    path.to_str().unwrap().to_string()
}

fn polygon(rings: &[Value]) -> Value {
    json!({ "type": "Polygon", "coordinates": rings })
}

/// The grid's origin is 260 km east, 500 km north; its pixels are 2 km.
fn districts(folder: &TempDir) -> String {
    let land = square(400_000.0, 200_000.0, 440_000.0, 260_000.0);
    let hole = square(410_000.0, 210_000.0, 420_000.0, 230_000.0);
    let half = square(401_000.0, 201_000.0, 407_000.0, 202_500.0);
    let parts = json!({ "type": "MultiPolygon", "coordinates": [
        [square(440_000.0, 200_000.0, 460_000.0, 220_000.0)],
        [square(480_000.0, 200_000.0, 500_000.0, 220_000.0)],
    ] });
    let bow = json!([
        [400_000.0, 140_000.0],
        [440_000.0, 180_000.0],
        [440_000.0, 140_000.0],
        [400_000.0, 180_000.0],
        [400_000.0, 140_000.0]
    ]);
    let tiny = square(430_100.0, 230_100.0, 430_200.0, 230_200.0);
    let far = square(5_000_000.0, 5_000_000.0, 5_100_000.0, 5_100_000.0);
    layer(
        folder,
        &[
            ("whole", polygon(std::slice::from_ref(&land))),
            ("holed", polygon(&[land, hole.clone()])),
            ("hole", polygon(&[hole])),
            ("parts", parts),
            ("bow", polygon(&[bow])),
            ("tiny", polygon(&[tiny])),
            ("thin", polygon(&[half])),
            ("far", polygon(&[far])),
            ("none", Value::Null),
            ("point", json!({ "type": "Point", "coordinates": [410_000.0, 210_000.0] })),
        ],
    )
}

fn areas(args: &[&str], out: &Path) -> String {
    let mut all =
        vec!["areas", "--map", mapped().to_str().unwrap(), "--out", out.to_str().unwrap()];
    all.extend(args);
    ok(&all)
}

/// Every draw is there and is a draw: their mean and sd are the map's, masked in and masked out.
#[test]
fn draws_are_written_beside_the_maps() {
    let out = mapped();
    let record: Value =
        serde_json::from_str(&fs::read_to_string(out.join("run.json")).unwrap()).unwrap();
    let note = &record["products"][0];
    assert_eq!((&note["product"], &note["files"][0]), (&json!("draws:40"), &json!("draws.tif")));
    assert!(out.join("draws.png").is_file());
    let draws = Dataset::open(out.join("draws.tif")).unwrap();
    assert_eq!(draws.raster_count(), 40);
    assert_eq!(
        draws.rasterband(3).unwrap().description().unwrap(),
        "Draw 3 of prevalence, surface"
    );
    assert_eq!(draws.metadata_item("OF", "").unwrap(), "surface");
    let like = Dataset::open("data/grid.tif").unwrap();
    assert_eq!(draws.geo_transform().unwrap(), like.geo_transform().unwrap());
    let bands: Vec<Vec<f64>> = (1..=40).map(|b| pixels(out.join("draws.tif"), b)).collect();
    let (mean, sd) = (pixels(out.join("mean.tif"), 1), pixels(out.join("sd.tif"), 1));
    let (mut off, mut count, mut spread) = (0.0, 0.0, 0.0);
    for i in 0..mean.len() {
        assert!(bands.iter().all(|b| b[i].is_nan() == mean[i].is_nan()));
        if mean[i].is_nan() {
            continue;
        }
        let own: f64 = bands.iter().map(|b| b[i]).sum::<f64>() / 40.0;
        let square: f64 = bands.iter().map(|b| (b[i] - own).powi(2)).sum::<f64>() / 39.0;
        off += ((own - mean[i]) / sd[i]).powi(2);
        spread += square / (sd[i] * sd[i]);
        count += 1.0;
    }
    // Forty draws: means stray by an sd over √40, on average over a map that moves together.
    assert!((off / count * 40.0 - 1.0).abs() < 0.8, "{}", off / count * 40.0);
    assert!((spread / count - 1.0).abs() < 0.2, "{}", spread / count);
}

#[test]
fn tiles_and_threads_change_no_draw() {
    let folder = TempDir::new().unwrap();
    let draw = |name: &str, tile: &str, threads: &str, model: &str| {
        let out = folder.path().join(name);
        let output = command(&[
            "map",
            "--surveys",
            SURVEY,
            "--resolution",
            "12km",
            "--model",
            model,
            "--products",
            "mean",
            "--no-pictures",
            "--draws",
            "6",
            "--tile",
            tile,
            "--out",
            out.to_str().unwrap(),
        ])
        .env("RAYON_NUM_THREADS", threads)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
        assert!(output.status.success());
        let all: Vec<u64> = (1..=6)
            .flat_map(|b| pixels(out.join("draws.tif"), b))
            .map(|v| if v.is_nan() { 0 } else { v.to_bits() })
            .collect();
        all
    };
    for model in ["gp", "vecchia", "prevalence"] {
        let one = draw(&format!("{model}-one"), "32", "1", model);
        assert!(one.iter().filter(|v| **v != 0).count() > 1000);
        assert!(one == draw(&format!("{model}-other"), "96", "2", model), "{model}");
    }
}

/// The table agrees with the rasters it is made from, area by area.
#[test]
fn districts_add_up() {
    let folder = TempDir::new().unwrap();
    let file = districts(&folder);
    let out = folder.path().join("table.csv");
    let said = areas(
        &[
            "--areas",
            &file,
            "--population",
            "data/population.tif",
            "--threshold",
            "0.1,0.3",
            "--level",
            "0.9",
            "--draws",
            "400",
        ],
        &out,
    );
    for part in ["7 of 10 on the map", "as the file says", "people in each cell", "3 of 10 areas"] {
        assert!(said.contains(part), "no `{part}` in\n{said}");
    }
    let table = Columns::read(&out).unwrap();
    let expected = [
        "name",
        "code",
        "mean",
        "sd",
        "lower_90",
        "upper_90",
        "exceedance_0.1",
        "exceedance_0.3",
        "population",
        "positive",
        "positive_lower_90",
        "positive_upper_90",
        "at_risk_0.1",
        "at_risk_0.1_lower_90",
        "at_risk_0.1_upper_90",
        "at_risk_0.3",
        "at_risk_0.3_lower_90",
        "at_risk_0.3_upper_90",
        "sites",
        "pixels",
        "km2",
        "note",
    ];
    assert_eq!(table.names(), expected);
    let names = table.text("name").unwrap();
    let at = |name: &str| names.iter().position(|n| n == name).unwrap();
    let get = |column: &str, name: &str| table.numbers(column).unwrap()[at(name)];
    let notes = table.text("note").unwrap();

    // People and means of a rectangle of whole pixels, from the rasters.
    let (people, mean) = (pixels("data/population.tif", 1), pixels(mapped().join("mean.tif"), 1));
    let over = |west: f64, south: f64, east: f64, north: f64| {
        let (mut living, mut sum) = (0.0, 0.0);
        for row in ((500_000.0 - north) / 2000.0) as usize..((500_000.0 - south) / 2000.0) as usize
        {
            let cols =
                ((west - 260_000.0) / 2000.0) as usize..((east - 260_000.0) / 2000.0) as usize;
            for i in cols.map(|col| row * 230 + col) {
                if !mean[i].is_nan() && !people[i].is_nan() {
                    living += people[i];
                    sum += people[i] * mean[i];
                }
            }
        }
        (living, sum / living)
    };
    let (living, level) = over(400_000.0, 200_000.0, 440_000.0, 260_000.0);
    assert!(living > 1000.0, "the test has people to count: {living}");
    assert!((get("population", "whole") / living - 1.0).abs() < 1e-5);
    let slack = 5.0 * get("sd", "whole") / 400f64.sqrt();
    assert!((get("mean", "whole") - level).abs() < slack, "{} {level}", get("mean", "whole"));
    let (inside, _) = over(410_000.0, 210_000.0, 420_000.0, 230_000.0);
    assert!((get("population", "hole") / inside - 1.0).abs() < 1e-5);
    assert!((get("population", "holed") / (living - inside) - 1.0).abs() < 1e-5);
    assert_eq!(get("pixels", "holed"), 600.0 - 50.0);
    assert_eq!(get("pixels", "parts"), 200.0);
    // Two triangles of a crossed square are half of it.
    assert!((get("pixels", "bow") - 200.0).abs() < 1e-6);
    assert!((get("pixels", "tiny") - 0.0025).abs() < 1e-6 && get("mean", "tiny") > 0.0);
    // Half a pixel on three sides: 3 pixels long, three quarters of one high.
    assert!((get("pixels", "thin") - 2.25).abs() < 1e-6);
    assert!((get("km2", "whole") / 2400.0 - 1.0).abs() < 2e-3);

    for name in ["whole", "holed", "hole", "parts", "bow"] {
        let (low, mid, high) = (get("lower_90", name), get("mean", name), get("upper_90", name));
        assert!(0.0 < low && low < mid && mid < high && high < 1.0, "{name}: {low} {mid} {high}");
        let (some, few) = (get("exceedance_0.1", name), get("exceedance_0.3", name));
        assert!((0.0..=1.0).contains(&few) && few <= some && some <= 1.0, "{name}");
        let risk = [get("at_risk_0.3", name), get("at_risk_0.1", name), get("population", name)];
        assert!(risk[0] <= risk[1] && risk[1] <= risk[2] * 1.000_001, "{name}: {risk:?}");
        let ill = get("positive", name) / get("population", name);
        assert!((ill - mid).abs() < 1e-6, "{name}");
    }
    // What is whole is less sure of nothing than its parts are.
    assert!(get("sd", "whole") < get("sd", "hole"));
    assert!(notes[at("bow")].contains("repaired"), "{notes:?}");
    for (name, why) in [("far", "no pixel"), ("none", "no outline"), ("point", "not a polygon")] {
        assert!(notes[at(name)].contains(why), "{notes:?}");
        assert!(get("mean", name).is_nan() && get("population", name).is_nan());
    }
    let survey = Columns::read(SURVEY).unwrap();
    assert!(table.numbers("sites").unwrap().iter().sum::<f64>() < survey.len() as f64);
    let record = fs::read_to_string(folder.path().join("table.csv.run.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(
        (&record["draws"], &record["population"]["measure"]),
        (&json!(400), &json!("counts"))
    );
    assert!(record["correlation_error"].as_f64().unwrap() < 0.02);
}

/// Every format holds the same numbers, and outlines come back as they went in; tiles and threads
/// change no digit.
#[test]
fn tables_of_areas_are_the_same_in_every_format() {
    let folder = TempDir::new().unwrap();
    let file = districts(&folder);
    let mut seen: Vec<Vec<f64>> = Vec::new();
    for name in ["table.csv", "table.parquet", "table.gpkg"] {
        let out = folder.path().join(name);
        areas(&["--areas", &file, "--draws", "100"], &out);
        if name.ends_with("gpkg") {
            let data = Dataset::open(&out).unwrap();
            let mut layer = data.layer(0).unwrap();
            assert_eq!(layer.feature_count(), 10);
            assert_eq!(layer.spatial_ref().unwrap().auth_code().unwrap(), 32630);
            let kinds: Vec<String> =
                layer.defn().fields().map(|f| field_type_to_name(f.field_type())).collect();
            assert_eq!(kinds[..3], ["String", "Real", "Real"]);
            let mut all = Vec::new();
            for feature in layer.features() {
                let mean = feature.field_index("mean").unwrap();
                all.push(feature.field_as_double(mean).unwrap().unwrap_or(f64::NAN));
                if all.len() == 2 {
                    let outline = feature.geometry().unwrap();
                    assert_eq!(outline.geometry_count(), 2, "the hole is kept");
                    assert!((outline.area() - 2.2e9).abs() < 1.0);
                }
            }
            seen.push(all);
        } else {
            let table = Columns::read(&out);
            // A table of outlines is none of points; its columns are read by name all the same.
            match table {
                Ok(table) => seen.push(table.numbers("mean").unwrap().to_vec()),
                Err(error) => assert!(name.ends_with("parquet"), "{error}"),
            }
        }
        assert!(out.with_file_name(format!("{name}.run.json")).is_file());
    }
    for other in &seen[1..] {
        let same = seen[0].iter().zip(other).all(|(a, b)| a == b || (a.is_nan() && b.is_nan()));
        assert!(same, "{seen:?}");
    }
    // The words after -- are a map's: the same numbers, cut up otherwise.
    let out = folder.path().join("again.csv");
    let output = command(&[
        "areas",
        "--areas",
        &file,
        "--draws",
        "100",
        "--out",
        out.to_str().unwrap(),
        "--",
        "--surveys",
        SURVEY,
        "--like",
        "data/grid.tif",
        "--model",
        "gp",
        "--tile",
        "64",
    ])
    .env("RAYON_NUM_THREADS", "3")
    .output()
    .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let first = fs::read_to_string(folder.path().join("table.csv")).unwrap();
    assert!(fs::read_to_string(&out).unwrap() == first);
}

/// What a GeoParquet file says of its geometries.
#[test]
fn geoparquet_says_where_it_is() {
    let folder = TempDir::new().unwrap();
    let file = districts(&folder);
    let out = folder.path().join("table.parquet");
    areas(&["--areas", &file, "--draws", "80"], &out);
    let bytes = fs::read(&out).unwrap();
    let found = bytes.windows(16).any(|w| w == b"\"primary_column\"");
    assert!(found, "no GeoParquet metadata");
    assert!(bytes.windows(6).any(|w| w == b"\"EPSG\""), "no coordinate reference system");
}

/// One wrong thing at a time.
#[test]
fn what_would_make_a_wrong_table_is_refused() {
    let folder = TempDir::new().unwrap();
    let file = districts(&folder);
    let map = mapped().to_str().unwrap().to_string();
    let out = folder.path().join("table.csv");
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (lines, plain) = (path("lines.geojson"), path("plain.tif"));
    let line = json!({ "type": "LineString", "coordinates": [[0.0, 0.0], [1.0, 1.0]] });
    fs::write(&lines, line.to_string()).unwrap();
    // The bundled population without its words.
    let bare = Dataset::open("data/population.tif").unwrap();
    let driver = gdal::DriverManager::get_driver_by_name("GTiff").unwrap();
    let options = gdal::cpl::CslStringList::new();
    let mut copy = bare.create_copy(&driver, &plain, &options).unwrap();
    copy.rasterband(1).unwrap().set_description("").unwrap();
    copy.flush_cache().unwrap();
    copy.close().unwrap();
    let negative = path("negative_count.tif");
    let copy = bare.create_copy(&driver, &negative, &options).unwrap();
    let mut band = copy.rasterband(1).unwrap();
    band.set_no_data_value(None).unwrap();
    let mut one = gdal::raster::Buffer::new((1, 1), vec![-7i32]);
    band.write((100, 120), (1, 1), &mut one).unwrap();
    copy.close().unwrap();

    let sound = ["--map", &map, "--areas", &file, "--out", out.to_str().unwrap()];
    let with = |more: &[&str], what: &str, facts: &[&str], help: &str| {
        let args = [&["areas"], &sound[..], more].concat();
        // Whatever was read is told before a refusal; only standard error is judged.
        let output = command(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert_error(&text(&output.stderr), what, facts, help);
        assert!(!out.exists(), "{args:?} left a table");
    };
    with(&["--level", "95"], "level of an interval", &["95"], "0.95");
    with(&["--draws", "1"], "several draws", &["1"], "1000");
    with(&["--draws", "20"], "so few draws", &["draws outside"], "--draws 80");
    with(&["--threshold", "20"], "threshold 20", &[], "0.2");
    with(&["--areas-layer", "areaz"], "no layer `areaz`", &["areas"], "--areas-layer areas");
    with(&["--population", &plain], "counts or densities", &["none"], "--population-is counts");
    let people = ["--population", plain.as_str(), "--population-is", "heads"];
    with(&people, "`heads`", &[], "density (people per km²)");
    with(&["--population", &negative], "below zero", &["value", "row and column"], "no-data");
    with(&["--population", "data/none.tif"], "could not read data/none.tif", &[], "check the path");

    let instead = |pair: [&str; 2], what: &str, facts: &[&str], help: &str| {
        let mut args = vec!["areas"];
        args.extend(
            sound.chunks(2).flat_map(|s| if s[0] == pair[0] { pair } else { [s[0], s[1]] }),
        );
        let output = command(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert_error(&text(&output.stderr), what, facts, help);
    };
    instead(["--areas", &lines], "no polygons", &["lines.geojson"], "enclose nothing");
    instead(["--areas", SURVEY], "no polygons", &["survey.csv"], "polygons");
    instead(["--out", "table.xlsx"], ".gpkg, .parquet or .csv", &["table.xlsx"], "districts.gpkg");
    instead(["--map", "data"], "no finished map", &["run.json"], "isopleth map");
    let far = layer(&folder, &[("far", polygon(&[square(5e6, 5e6, 5.1e6, 5.1e6)]))]);
    instead(["--areas", &far], "none of the areas lies on the map", &["1 in"], "same place");

    // The inputs have changed since.
    let moved = folder.path().join("moved");
    fs::create_dir(&moved).unwrap();
    let record = fs::read_to_string(mapped().join("run.json")).unwrap();
    fs::write(moved.join("run.json"), record.replace("\"used\": 138", "\"used\": 137")).unwrap();
    instead(["--map", moved.to_str().unwrap()], "have changed", &["137 and 138"], "map again");
    // A table that is there.
    fs::write(&out, "mine").unwrap();
    let args = [&["areas"], &sound[..]].concat();
    assert_error(&refused(&args), "there already", &["table.csv"], "--force");
    assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
    // After --, only what a map knows.
    let args = ["areas", "--areas", &file, "--out", "t.csv", "--", "--surveyz", "x.csv"];
    assert_error(&refused(&args), "what follows --", &["surveyz"], "--surveys");
    let args = ["areas", "--areas", &file, "--out", "t.csv"];
    assert!(refused(&args).contains("--map"));
}

#[test]
fn draws_that_no_disk_is_meant_for_are_refused() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let map = |more: &[&str]| {
        let args = ["map", "--surveys", SURVEY, "--model", "gp", "--out", out.to_str().unwrap()];
        let error = refused(&[&args[..], more].concat());
        assert!(!out.exists());
        error
    };
    let error = map(&["--resolution", "100m", "--draws", "20000"]);
    assert_error(&error, "do not belong on a disk", &["20000", "disk needed"], "isopleth areas");
    let error = map(&["--draws", "0"]);
    assert_error(&error, "no surface is asked for", &[], "--draws 100");
    let error = map(&["--draws", "5", "--of", "observation"]);
    assert_error(&error, "draws are of the surface", &[], "--of observation");
    let column = ["--covariate-column", "elevation_m"];
    let error = map(&[&["--draws", "5"], &column[..]].concat());
    assert_error(&error, "covariates at every pixel", &["elevation_m"], "NAME=FILE");
}
