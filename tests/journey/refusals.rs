//! Bad input: one error that says what, where, and what to try; an exit code; and nothing left behind.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{assert_error, command, refused, text};

const SURVEY: &str = "data/survey.csv";
const GRID: &str = "data/grid.tif";
/// A survey without flaws, four villages of the invented country.
const SOUND: &str = "lon,lat,tested,positive
-3.1,1.2,50,10
-2.9,1.9,60,3
-3.9,2.4,40,12
-2.5,3.1,80,30
";

/// Whether nothing at all was left: no output folder, and nothing half made beside it.
fn is_untouched(out: &Path) -> bool {
    let name = out.file_name().unwrap().to_str().unwrap();
    let beside = out.parent().unwrap().read_dir().unwrap();
    beside
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .all(|file| !file.contains(name) && !file.starts_with('.'))
}

fn file(folder: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

/// What `isopleth map` says when it refuses; whatever it says, no output may be left.
fn map_refused(folder: &TempDir, survey: &Path, grid: &str, more: &[&str]) -> String {
    let out = folder.path().join("out");
    let mut args =
        vec!["map", "--surveys", survey.to_str().unwrap(), "--like", grid, "--model", "gp"];
    args.extend(["--out", out.to_str().unwrap()]);
    args.extend(more);
    let error = refused(&args);
    assert!(
        is_untouched(&out),
        "left behind: {:?}",
        fs::read_dir(&out).unwrap().collect::<Vec<_>>()
    );
    error
}

/// One row of the bad-input table: the survey, the flags, and what must be said.
struct Bad {
    survey: String,
    flags: &'static [&'static str],
    what: &'static str,
    facts: &'static [&'static str],
    help: &'static str,
}

fn bad(
    survey: impl Into<String>,
    what: &'static str,
    facts: &'static [&'static str],
    help: &'static str,
) -> Bad {
    Bad { survey: survey.into(), flags: &[], what, facts, help }
}

#[test]
fn the_table_these_tests_spoil_is_sound() {
    let folder = TempDir::new().unwrap();
    let survey = file(&folder, "survey.csv", SOUND);
    let error = map_refused(&folder, &survey, "no-such-grid.tif", &[]);
    assert!(error.contains("no-such-grid.tif"), "the grid is all that is wrong: {error}");
}

#[test]
fn surveys_that_would_make_a_wrong_map_are_refused() {
    let with = |row: &str| format!("{SOUND}{row}\n");
    let swap = "lat,lon,tested,positive\n-60.1,1.2,50,10\n-112.9,1.9,60,3\n-93.9,2.4,40,12\n";
    let cases = [
        Bad {
            flags: &["--positive", "ill"],
            ..bad(SOUND, "no column `ill`", &["columns", "survey.csv"], "name one of the columns")
        },
        Bad {
            flags: &["--positive", "postive"],
            ..bad(SOUND, "no column `postive`", &[], "did you mean `positive`")
        },
        bad("lon,lat,tested\n1,2,3\n", "number positive", &["columns"], "--positive"),
        bad(with("-2.2,2.2,many,3"), "`tested` should hold numbers", &["row", "many"], ""),
        bad(with("-2.2,2.2,-5,3"), "negative", &["row", "-5"], "correct the cell"),
        bad(with("-2.2,2.2,10.5,3"), "not a whole number", &["row", "10.5"], "--value"),
        bad(with("-2.2,inf,10,3"), "infinite", &["row"], "correct the cell"),
        bad(
            with("-2.2,2.2,10,11"),
            "more people are positive than were tested",
            &["row", "11", "10"],
            "swapped",
        ),
        bad(swap, "out of range", &["row"], "swapped"),
        Bad {
            flags: &["--lon", "lat", "--lat", "lon"],
            ..bad(SOUND, "swapped", &[], "--lon lon --lat lat")
        },
        bad(SOUND.replace("lon,lat", "x,y"), "reference system", &[], "--crs"),
        // Metres read as kilometres, and kilometres as metres.
        Bad {
            flags: &["--crs", "local:km"],
            ..bad(
                "x,y,tested,positive\n350000,1450000,9,1\n360000,1450000,9,1\n390000,1490000,9,2\n",
                "farther apart than any two places on Earth",
                &["span", "40000 km"],
                "--crs local:m",
            )
        },
        Bad {
            flags: &["--crs", "EPSG:32630"],
            ..bad(
                "x,y,tested,positive\n350,1450,9,1\n360,1450,9,1\n390,1490,9,2\n",
                "look like kilometres",
                &["350, 1450"],
                "multiply both columns by 1000",
            )
        },
        // Degrees that are in range either way round: only the grid tells.
        Bad {
            flags: &["--crs", "EPSG:4326", "--lon", "b", "--lat", "a"],
            ..bad(
                SOUND
                    .replace("lon,lat", "b,a")
                    .replace("-3.1,1.2", "1.2,-3.1")
                    .replace("-2.9,1.9", "1.9,-2.9")
                    .replace("-3.9,2.4", "2.4,-3.9")
                    .replace("-2.5,3.1", "3.1,-2.5"),
                "do not overlap",
                &["grid", "sites"],
                "look swapped",
            )
        },
        // Percent for counts: as they are, or rounded.
        bad(with("-2.2,2.2,60,35.5"), "not a whole number", &["row", "35.5"], "percentages"),
        bad(with("-2.2,2.2,30,35"), "more people are positive than were tested", &["35", "30"], ""),
        Bad {
            flags: &["--threshold", "20"],
            ..bad(SOUND, "the threshold 20 is above any prevalence", &[], "for 20 % write 0.2")
        },
        Bad { flags: &["--crs", "EPSG:999999"], ..bad(SOUND, "EPSG:999999", &[], "") },
        Bad {
            flags: &["--crs", "EPSG:32630"],
            ..bad(SOUND, "look like degrees", &[], "--crs EPSG:4326")
        },
        bad(
            "lon,lat,tested,positive\n-3.1,1.2,50,10\n-2.9,1.9,60,3\n",
            "at least 3 usable sites",
            &["survey.csv"],
            "check",
        ),
        bad(
            "lon,lat,tested,positive\n1,2,50,10\n1,2,60,3\n1,2,40,12\n",
            "one place",
            &["1, 2"],
            "coordinates",
        ),
        bad("", "", &["survey.csv"], ""),
        bad("lon,lat,tested,positive\n", "no rows", &["survey.csv"], "check"),
    ];
    let folder = TempDir::new().unwrap();
    for case in cases {
        let survey = file(&folder, "survey.csv", &case.survey);
        let error = map_refused(&folder, &survey, GRID, case.flags);
        assert_error(&error, case.what, case.facts, case.help);
    }
}

#[test]
fn a_missing_or_truncated_survey_is_refused() {
    let folder = TempDir::new().unwrap();
    let error = map_refused(&folder, Path::new("no-such-survey.csv"), GRID, &[]);
    assert_error(&error, "no-such-survey.csv", &[], "check the path");

    let columns = [
        ("lon", vec![-3.1, -2.9, -3.9]),
        ("lat", vec![1.2, 1.9, 2.4]),
        ("tested", vec![50.0; 3]),
        ("positive", vec![5.0; 3]),
    ];
    let whole = folder.path().join("survey.parquet");
    isopleth::geo::table::Columns::write_parquet(&whole, &columns).unwrap();
    let bytes = fs::read(&whole).unwrap();
    let survey = file(&folder, "cut.parquet", &bytes[..bytes.len() / 2]);
    assert_error(
        &map_refused(&folder, &survey, GRID, &[]),
        "not whole Parquet",
        &["cut.parquet"],
        "cut short",
    );
}

#[test]
fn grids_that_cannot_be_mapped_are_refused() {
    let folder = TempDir::new().unwrap();
    let survey = Path::new(SURVEY);
    let bytes = fs::read(GRID).unwrap();
    for keep in [10, 200, bytes.len() / 2, bytes.len() - 20] {
        let cut = file(&folder, "cut.tif", &bytes[..keep]);
        let error = map_refused(&folder, survey, cut.to_str().unwrap(), &[]);
        assert_error(&error, "", &["cut.tif"], "");
    }
    let text = file(&folder, "grid.tif", "this is no raster");
    assert_error(
        &map_refused(&folder, survey, text.to_str().unwrap(), &[]),
        "raster",
        &["grid.tif"],
        "GeoTIFF",
    );
    let nowhere = raster(&folder, "nowhere.tif", None, 260_000.0);
    assert_error(
        &map_refused(&folder, survey, &nowhere, &[]),
        "no coordinate reference system",
        &["nowhere.tif"],
        "gdal_edit",
    );
    let elsewhere = raster(&folder, "elsewhere.tif", Some(32631), 260_000.0);
    assert_error(
        &map_refused(&folder, survey, &elsewhere, &[]),
        "do not overlap",
        &["grid", "sites"],
        "CRS",
    );
}

/// A small raster in kilometre pixels, somewhere.
fn raster(folder: &TempDir, name: &str, epsg: Option<u32>, west: f64) -> String {
    let path = folder.path().join(name).to_str().unwrap().to_string();
    let driver = gdal::DriverManager::get_driver_by_name("GTiff").unwrap();
    let mut raster = driver.create_with_band_type::<u8, _>(&path, 20, 20, 1).unwrap();
    raster.set_geo_transform(&[west, 1000.0, 0.0, 300_000.0, 0.0, -1000.0]).unwrap();
    if let Some(epsg) = epsg {
        raster.set_spatial_ref(&gdal::spatial_ref::SpatialRef::from_epsg(epsg).unwrap()).unwrap();
    }
    raster.rasterband(1).unwrap().fill(1.0, None).unwrap();
    path
}

#[test]
fn an_output_folder_that_exists_is_never_overwritten_unasked() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mean.tif"), "a month of work").unwrap();
    let args = [
        "map",
        "--surveys",
        SURVEY,
        "--like",
        GRID,
        "--model",
        "gp",
        "--out",
        out.to_str().unwrap(),
    ];
    assert_error(&refused(&args), "not empty", &["out"], "--force");
    assert_eq!(fs::read_to_string(out.join("mean.tif")).unwrap(), "a month of work");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
}

#[test]
fn models_that_are_none_are_refused() {
    let folder = TempDir::new().unwrap();
    let run = |model: &str| {
        let out = folder.path().join("out");
        let error = refused(&[
            "map",
            "--surveys",
            SURVEY,
            "--like",
            GRID,
            "--model",
            model,
            "--out",
            out.to_str().unwrap(),
        ]);
        assert!(is_untouched(&out), "{error}");
        error
    };
    let trained = isopleth::checkpoint::shipped().iter().any(|(name, _)| *name == "prevalence");
    let nearest = if trained { "did you mean `prevalence`?" } else { "isopleth list models" };
    assert_error(&run("prevalnce"), "prevalnce", &[], nearest);
    let text = file(&folder, "text.safetensors", "this is no model");
    assert_error(&run(text.to_str().unwrap()), "", &["text.safetensors"], "");
    assert_error(&run("no-such-model.safetensors"), "no-such-model.safetensors", &[], "");
}

#[test]
fn slips_in_flags_and_products_name_the_nearest() {
    let folder = TempDir::new().unwrap();
    let survey = Path::new(SURVEY);
    let error = map_refused(&folder, survey, GRID, &["--products", "maen"]);
    assert_error(&error, "`maen`", &["mean"], "did you mean `mean`?");
    for products in ["quantile:1.5", "quantile:", "exceedance:x", "interval:0"] {
        assert_error(&map_refused(&folder, survey, GRID, &["--products", products]), "", &[], "");
    }
    for resolution in ["0km", "-5km", "5parsecs", "five"] {
        let out = folder.path().join("out");
        let flag = format!("--resolution={resolution}");
        let error = refused(&[
            "map",
            "--surveys",
            SURVEY,
            &flag,
            "--model",
            "gp",
            "--out",
            out.to_str().unwrap(),
        ]);
        assert_error(&error, resolution, &[], "5km");
        assert!(is_untouched(&out));
    }
    assert!(refused(&["map", "--survey", SURVEY]).contains("--surveys"));
}

/// A disk of 64 kB: the maps do not fit, and what is there afterwards must not look whole.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing_that_looks_whole() {
    let folder = TempDir::new().unwrap();
    let disk = folder.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
        .arg(&disk)
        .output();
    if !mount.is_ok_and(|mount| mount.status.success()) {
        eprintln!("skipped: mounting a small disk needs root");
        return;
    }
    let out = disk.join("out");
    let output = command(&[
        "map",
        "--surveys",
        SURVEY,
        "--like",
        GRID,
        "--model",
        "gp",
        "--out",
        out.to_str().unwrap(),
    ])
    .output()
    .unwrap();
    let left: Vec<String> = fs::read_dir(&out)
        .map(|files| files.map(|f| f.unwrap().file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    let unmounted = std::process::Command::new("umount").arg(&disk).status().unwrap();
    assert!(unmounted.success());
    let error = text(&output.stderr);
    assert_ne!(output.status.code(), Some(0), "{error}");
    assert_error(&error, "", &[], "disk");
    assert!(
        left.iter()
            .all(|name| name != "run.json" && !name.ends_with(".part") && !name.ends_with(".tmp")),
        "{left:?}"
    );
}
