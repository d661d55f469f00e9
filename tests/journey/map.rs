//! The main job: the bundled survey to a map, checked against the truth that made it.
//!
//! The exact Gaussian process and every bundled model of counts are asked the same.

use std::{collections::HashSet, fs, path::Path};

use gdal::Dataset;
use serde_json::Value;
use tempfile::TempDir;

use super::{assert_error, command, ok, text};

const SURVEY: &str = "data/survey.csv";
const GRID: &str = "data/grid.tif";

fn pixels(path: &Path) -> Vec<f64> {
    let raster = Dataset::open(path).unwrap();
    let band = raster.rasterband(1).unwrap();
    let nothing = band.no_data_value();
    let values = band.read_band_as::<f64>().unwrap();
    let missing = |v: f64| v.is_nan() || Some(v) == nothing;
    values.data().iter().map(|&v| if missing(v) { f64::NAN } else { v }).collect()
}

fn truth() -> Vec<f64> {
    pixels(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/truth.tif"))
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let mean = |x: &[f64]| x.iter().sum::<f64>() / n;
    let (ma, mb) = (mean(a), mean(b));
    let sum =
        |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(x, y)| f(x - ma, y - mb)).sum::<f64>();
    sum(&|x, y| x * y) / (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt()
}

fn map(out: &Path, more: &[&str]) -> String {
    let mut args = vec!["map", "--surveys", SURVEY, "--out", out.to_str().unwrap()];
    args.extend(more);
    ok(&args)
}

/// Standard error of a command that is refused once it has said what it read.
fn refused_after_reading(args: &[&str]) -> String {
    let output = command(args).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
    text(&output.stderr)
}

fn record(out: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(out.join("run.json")).unwrap()).unwrap()
}

/// What `make map` does, by the model given: every file is there, and the map agrees with the truth.
fn the_bundled_survey_is_mapped_by(model: &str) {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let said = map(&out, &["--like", GRID, "--model", model, "--threshold", "0.2"]);

    // The summary says what was used, and which rows were not and why.
    for part in ["138 sites used", "2 rows", "rows 37, 102", "prevalence", "time"] {
        assert!(said.contains(part), "no `{part}` in\n{said}");
    }
    let record = record(&out);
    assert_eq!(record["survey"]["used"], 138);
    let rows: Vec<u64> = record["survey"]["dropped"]
        .as_array()
        .unwrap()
        .iter()
        .map(|dropped| dropped["row"].as_u64().unwrap())
        .collect();
    assert_eq!(rows, [37, 102]);

    // Every file of the record is there, and no file besides.
    let mut named: HashSet<String> = ["run.json".to_string()].into();
    for product in record["products"].as_array().unwrap() {
        for file in product["files"].as_array().unwrap() {
            named.insert(file.as_str().unwrap().to_string());
        }
    }
    let there: HashSet<String> = fs::read_dir(&out)
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(there, named);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something beside the output");
    for name in &there {
        if name.ends_with(".png") {
            assert!(fs::read(out.join(name)).unwrap().starts_with(b"\x89PNG"), "{name}");
        }
    }

    // Masked in, masked out; and where there is land, the map knows something of the truth.
    let (truth, mean, sd) = (truth(), pixels(&out.join("mean.tif")), pixels(&out.join("sd.tif")));
    let land: Vec<usize> = (0..truth.len()).filter(|&i| !truth[i].is_nan()).collect();
    assert_eq!(mean.len(), truth.len());
    assert!(
        (0..truth.len())
            .all(|i| truth[i].is_nan() == mean[i].is_nan() && mean[i].is_nan() == sd[i].is_nan())
    );
    let on_land = |values: &[f64]| land.iter().map(|&i| values[i]).collect::<Vec<_>>();
    let (t, m, s) = (on_land(&truth), on_land(&mean), on_land(&sd));
    assert!(m.iter().all(|p| (0.0..=1.0).contains(p)) && s.iter().all(|s| *s > 0.0));
    let r = correlation(&t, &m);
    // A map of pure chance has 0, one of the truth 1. Half of the country is far from any village.
    assert!(r > 0.6, "correlation {r} between map and truth ({model})");
    let inside = |t: &[f64], low: &[f64], high: &[f64]| {
        let held = t.iter().enumerate().filter(|(i, t)| (low[*i]..=high[*i]).contains(*t));
        held.count() as f64 / t.len() as f64
    };
    let quantile = |name: &str| on_land(&pixels(&out.join(name)));
    let held = inside(&t, &quantile("quantile_0.025.tif"), &quantile("quantile_0.975.tif"));
    // One country is one draw: pixels move together, so their share strays from 0.95 more than counting suggests.
    assert!((0.8..=1.0).contains(&held), "{held} of pixels inside their 95 % interval ({model})");
    let over = quantile("exceedance_0.2.tif");
    let brier = t.iter().zip(&over).map(|(t, p)| (f64::from(*t > 0.2) - p).powi(2)).sum::<f64>()
        / t.len() as f64;
    assert!(brier < 0.25, "Brier score {brier}: no better than a coin ({model})");
}

#[test]
fn the_bundled_survey_is_mapped_by_the_exact_gaussian_process() {
    the_bundled_survey_is_mapped_by("gp");
}

#[test]
fn the_bundled_survey_is_mapped_by_the_nearest_neighbour_process() {
    the_bundled_survey_is_mapped_by("vecchia");
}

/// 138 sites kriged from 60 or all of them: nobody may see which.
#[test]
fn both_gaussian_processes_map_the_same_country() {
    let folder = TempDir::new().unwrap();
    let maps = ["gp", "vecchia"].map(|model| {
        let out = folder.path().join(model);
        let how = ["--resolution", "20km", "--clip", "data/country.gpkg", "--no-pictures"];
        map(&out, &[&how[..], &["--model", model, "--products", "mean,sd"]].concat());
        let record: serde_json::Value =
            serde_json::from_slice(&fs::read(out.join("run.json")).unwrap()).unwrap();
        assert_eq!(record["model"]["name"], model);
        for told in ["kernel", "nugget", "log_marginal"] {
            assert!(!record["model"][told].is_null(), "{model} does not tell its {told}");
        }
        let likely = record["model"]["log_marginal"].as_f64().unwrap();
        (likely, ["mean.tif", "sd.tif"].map(|name| pixels(&out.join(name))))
    });
    // Both find the same covariance the likeliest; `gp` mixes others in.
    assert!((maps[0].0 - maps[1].0).abs() < 0.3, "{} and {}", maps[0].0, maps[1].0);
    for (what, (a, b)) in ["mean", "sd"].iter().zip(maps[0].1.iter().zip(&maps[1].1)) {
        assert_eq!(a.len(), b.len());
        let pairs = a.iter().zip(b).filter(|(a, _)| !a.is_nan());
        let apart = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(apart < 0.03, "{what} of prevalence is {apart} apart");
    }
}

#[test]
fn the_bundled_survey_is_mapped_by_every_bundled_model_of_counts() {
    for (name, _) in isopleth::checkpoint::shipped() {
        let model = isopleth::checkpoint::Checkpoint::resolve(name).unwrap();
        let timed = model.recipe().unwrap().tasks().unwrap().design().has_times();
        if model.likelihood().unwrap().counts() && !timed {
            the_bundled_survey_is_mapped_by(name);
        }
    }
}

#[test]
fn force_replaces_the_earlier_maps_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let coarse = ["--resolution", "40km", "--model", "gp"];
    map(&out, &[&coarse[..], &["--products", "mean,sd"]].concat());
    fs::write(out.join("notes.txt"), "mine").unwrap();
    map(&out, &[&coarse[..], &["--products", "mean", "--force"]].concat());
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    assert!(
        !out.join("sd.tif").exists(),
        "a map of the earlier run beside the record of the new one"
    );
    assert!(out.join("mean.tif").exists());
}

#[test]
fn the_same_command_gives_the_same_map_for_any_tile() {
    let folder = TempDir::new().unwrap();
    let maps: Vec<Vec<f64>> = ["16", "256", "256"]
        .iter()
        .enumerate()
        .map(|(i, tile)| {
            let out = folder.path().join(format!("out{i}"));
            map(
                &out,
                &[
                    "--resolution",
                    "10km",
                    "--clip",
                    "data/country.gpkg",
                    "--model",
                    "gp",
                    "--products",
                    "mean",
                    "--tile",
                    tile,
                    "--no-pictures",
                ],
            );
            pixels(&out.join("mean.tif"))
        })
        .collect();
    let gap = |a: &[f64], b: &[f64]| {
        assert_eq!(a.len(), b.len());
        a.iter()
            .zip(b)
            .filter(|(a, b)| !(a.is_nan() && b.is_nan()))
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max)
    };
    assert_eq!(gap(&maps[1], &maps[2]), 0.0, "two runs differ");
    // f32 on disk: the sum over a different tile may round its last bit.
    let moved = gap(&maps[0], &maps[1]);
    assert!(moved < 1e-6, "the tile moved the map by {moved}");
    assert!(maps[0].iter().any(|v| v.is_nan()) && maps[0].iter().any(|v| !v.is_nan()));
}

#[test]
fn a_continuous_outcome_is_mapped_from_a_renamed_column() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let survey = folder.path().join("rain.csv");
    let rows: Vec<String> = (0..40)
        .map(|i| (f64::from(i % 8), f64::from(i / 8)))
        .map(|(i, j)| {
            format!("{},{},{}", i / 10.0 - 3.0, j / 10.0 + 2.0, 30.0 + 2.0 * i - j + (i * j).sin())
        })
        .collect();
    fs::write(&survey, format!("where_x,where_y,rain_mm\n{}\n", rows.join("\n"))).unwrap();
    let args = [
        "map",
        "--surveys",
        survey.to_str().unwrap(),
        "--lon",
        "where_x",
        "--lat",
        "where_y",
        "--crs",
        "EPSG:4326",
    ];
    let more = [
        "--value",
        "rain_mm",
        "--resolution",
        "5km",
        "--model",
        "gp",
        "--out",
        out.to_str().unwrap(),
    ];
    ok(&[&args[..], &more].concat());
    let mean = pixels(&out.join("mean.tif"));
    let (low, high) = mean
        .iter()
        .filter(|v| !v.is_nan())
        .fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(*v), b.max(*v)));
    assert!((20.0..32.0).contains(&low) && (40.0..55.0).contains(&high), "{low} to {high} mm");
}

/// The reader of the summary goes before it is written: the maps are made all the same.
#[test]
fn a_summary_that_nobody_reads_still_leaves_the_maps() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let args = [
        "map",
        "--surveys",
        SURVEY,
        "--resolution",
        "40km",
        "--model",
        "gp",
        "--out",
        out.to_str().unwrap(),
    ];
    let mut child = command(&args)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(out.join("run.json").exists(), "a closed pipe stopped the work");
}

/// Tile, memory and threads are knobs of memory and speed: no pixel may notice more than rounding.
#[test]
fn memory_and_threads_never_change_the_map() {
    let folder = TempDir::new().unwrap();
    let products = ["mean", "sd", "quantile_0.975"];
    let maps = |name: &str, threads: &str, more: &[&str]| -> Vec<Vec<f64>> {
        let out = folder.path().join(name);
        let args = ["--like", GRID, "--no-pictures", "--products", "mean,sd,quantile:0.975"];
        let mut args = [&["map", "--surveys", SURVEY][..], &args, more].concat();
        args.extend(["--out", out.to_str().unwrap()]);
        let output = command(&args).env("RAYON_NUM_THREADS", threads).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        let plan = &record(&out)["plan"];
        assert!(plan["workers"].as_u64().unwrap() <= threads.parse().unwrap(), "{plan}");
        products.iter().map(|p| pixels(&out.join(format!("{p}.tif")))).collect()
    };
    let usual = maps("usual", "2", &[]);
    for (name, threads, more) in [
        ("again", "2", &[][..]),
        ("one-thread", "1", &[]),
        ("three-threads", "3", &[]),
        ("small-tiles", "2", &["--tile", "64"]),
        ("little-memory", "2", &["--tile", "64", "--memory", "200MiB"]),
    ] {
        for ((product, a), b) in products.iter().zip(&usual).zip(maps(name, threads, more)) {
            assert_eq!(a.len(), b.len());
            for (a, b) in a.iter().zip(&b).filter(|(a, b)| !(a.is_nan() && b.is_nan())) {
                // The same command gives the same map to the last bit.
                let allowed = if name == "again" { 0.0 } else { 1e-5 };
                let moved = (a - b).abs() / a.abs();
                assert!(moved <= allowed, "{name} moved {product} from {a} to {b}");
            }
        }
    }
}

/// What faint sites are worth: less than was allowed, and the record says how much was left out.
#[test]
fn a_map_may_lose_a_stated_share() {
    let folder = TempDir::new().unwrap();
    let mean = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let args = ["map", "--surveys", SURVEY, "--like", GRID, "--no-pictures", "--products"];
        let args = [&args[..], &["mean", "--out", out.to_str().unwrap()], more].concat();
        ok(&args);
        (pixels(&out.join("mean.tif")), record(&out))
    };
    let (exact, whole) = mean("exact", &[]);
    assert_eq!(whole["reading"]["lose"], 0.0);
    assert_eq!(whole["left_out"], 0.0);
    let (faint, record) = mean("faint", &["--lose", "0.001"]);
    assert_eq!(record["reading"]["lose"], 0.001);
    assert!(record["left_out"].as_f64().is_some_and(|share| (0.0..1.0).contains(&share)));
    let moved = exact.iter().zip(&faint).filter(|(a, _)| !a.is_nan()).map(|(a, b)| (a - b).abs());
    let most = moved.fold(0.0, f64::max);
    assert!(most < 0.01, "prevalence moved by {most}");
    let (halved, record) = mean("halved", &["--precision", "bf16"]);
    assert_eq!(record["reading"]["precision"], "bf16");
    let moved = exact.iter().zip(&halved).filter(|(a, _)| !a.is_nan()).map(|(a, b)| (a - b).abs());
    let most = moved.fold(0.0, f64::max);
    assert!(most > 0.0 && most < 0.02, "prevalence moved by {most}");
    for (lose, model) in [("0.5", "prevalence"), ("-1", "prevalence"), ("0.001", "gp")] {
        let lose = format!("--lose={lose}");
        let args = ["map", "--surveys", SURVEY, "--out", "nowhere", &lose, "--model", model];
        assert!(crate::refused(&args).contains("--lose"), "{lose} {model}");
    }
}

/// The most that was ever resident is the system's word. Sixteen threads would take more than is
/// allowed; the plan makes do with fewer.
#[cfg(target_os = "linux")]
#[test]
fn the_memory_allowed_is_kept() {
    let folder = TempDir::new().unwrap();
    for (model, allowed) in [("prevalence", 200.0), ("gp", 210.0)] {
        let out = folder.path().join(model);
        let memory = format!("{allowed}MiB");
        let args = ["map", "--surveys", SURVEY, "--like", GRID, "--model", model];
        let more = ["--memory", &memory, "--threshold", "0.2", "--out", out.to_str().unwrap()];
        let args = [&args[..], &more].concat();
        let output = command(&args).env("RAYON_NUM_THREADS", "16").output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let (said, record) = (text(&output.stdout), record(&out));
        assert_eq!(record["memory_mib"], allowed);
        let peak = record["peak_memory_mib"].as_f64().unwrap();
        assert!(said.contains(&format!("{peak:.0} MiB at most of the {allowed} MiB")), "{said}");
        assert!(peak > 20.0 && peak <= allowed, "{peak} MiB of {allowed} ({model})");
    }
    // Nothing is tried that cannot fit.
    let none = folder.path().join("none");
    let args = ["map", "--surveys", SURVEY, "--memory", "60MiB", "--out", none.to_str().unwrap()];
    let error = refused_after_reading(&args);
    assert_error(&error, "memory allowed is too small", &["60MiB", "138 sites"], "--memory");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "a refused map left something");
}

/// A run that was killed leaves a hidden folder. The next into the same place clears it away, and
/// leaves alone one that another run still holds.
#[test]
fn what_a_killed_run_left_is_cleared_away() {
    let folder = TempDir::new().unwrap();
    let scratch = |pid: &str| {
        let scratch = folder.path().join(format!(".isopleth-partial-{pid}"));
        fs::create_dir(&scratch).unwrap();
        fs::write(scratch.join("raw.tif"), "half a map").unwrap();
        (fs::File::create(scratch.join(".lock")).unwrap(), scratch)
    };
    let ((_, dead), (held, live)) = (scratch("1000001"), scratch("1000002"));
    held.try_lock().unwrap();
    let out = folder.path().join("out");
    let args = ["--resolution", "40km", "--model", "gp", "--no-pictures"];
    let args = [&["map", "--surveys", SURVEY, "--out", out.to_str().unwrap()][..], &args].concat();
    let output = command(&args).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("1000001, left by a run that was stopped"));
    assert!(!dead.exists() && live.exists() && out.join("run.json").exists());
    assert!(!out.join(".lock").exists());
}
