//! Covariates from rasters and columns: where they are read, what is refused, and what a map makes of them.

use std::{fs, path::Path};

use gdal::{Dataset, DriverManager, raster::Buffer};
use isopleth::{
    Result, Stream,
    geo::{
        covariates::{Covariates, Design, Spec},
        crs::Crs,
        grid::{Extent, Grid, Resolution},
        survey::{Outcome, Survey},
    },
};
use serde_json::Value;
use tempfile::TempDir;

use super::{assert_error, ok, refused};

/// A raster of `of(x, y)` at its pixels' centres.
struct Made<'a> {
    crs: Option<&'a str>,
    /// West, pixel width, north, pixel height (downwards).
    place: [f64; 4],
    size: (usize, usize),
    nodata: Option<f64>,
    of: &'a dyn Fn(f64, f64) -> f64,
}

fn make(path: &Path, made: &Made) {
    let Made { crs, place: [west, dx, north, dy], size: (cols, rows), nodata, of } = *made;
    let driver = DriverManager::get_driver_by_name("GTiff").unwrap();
    let mut data = driver.create_with_band_type::<f32, _>(path, cols, rows, 1).unwrap();
    data.set_geo_transform(&[west, dx, 0.0, north, 0.0, -dy]).unwrap();
    if let Some(crs) = crs {
        data.set_spatial_ref(&Crs::from_user(crs).unwrap().spatial_ref().unwrap()).unwrap();
    }
    let mut band = data.rasterband(1).unwrap();
    band.set_no_data_value(nodata).unwrap();
    let at = |i: usize| {
        let (row, col) = ((i / cols) as f64 + 0.5, (i % cols) as f64 + 0.5);
        of(west + col * dx, north - row * dy) as f32
    };
    let values = (0..rows * cols).map(at).collect();
    band.write((0, 0), (cols, rows), &mut Buffer::new((cols, rows), values)).unwrap();
}

fn survey(crs: &str, x: Vec<f64>, y: Vec<f64>) -> Survey {
    Survey {
        source: "made.csv".into(),
        crs: Crs::from_user(crs).unwrap(),
        rows: (1..=x.len()).collect(),
        outcome: Outcome::Values(x.clone()),
        covariates: None,
        times: None,
        displacement: None,
        geometry: Default::default(),
        x,
        y,
        dropped: Vec::new(),
        notes: Vec::new(),
    }
}

fn spec(path: &Path, options: &str) -> Spec {
    format!("it={}{options}", path.display()).parse().unwrap()
}

/// The covariate at the places of a survey, and the places that were dropped.
fn read(survey: Survey, spec: Spec) -> Result<(Vec<f64>, Vec<usize>)> {
    let survey = Covariates::attach(survey, &[spec], None)?;
    let dropped = survey.dropped.iter().map(|d| d.row).collect();
    Ok((survey.covariates.unwrap().values.remove(0), dropped))
}

fn places(n: usize, [west, east]: [f64; 2], [south, north]: [f64; 2]) -> [Vec<f64>; 2] {
    let mut rng = Stream::new(5, "places", 0);
    let x = (0..n).map(|_| rng.uniform(west, east)).collect();
    [x, (0..n).map(|_| rng.uniform(south, north)).collect()]
}

/// Between pixels a plane is read exactly, whatever the grid and system of the raster: nothing is moved by
/// half a pixel, mirrored, or taken from another place.
#[test]
fn a_plane_is_read_back_from_any_grid_and_system() {
    let folder = TempDir::new().unwrap();
    let plane = |x: f64, y: f64| 3.0 + 2.0 * x - 5.0 * y;
    for (west, dx, north, dy) in [(9.0, 0.1, 6.0, 0.1), (8.93, 0.037, 6.21, 0.061)] {
        let path = folder.path().join(format!("plane-{dx}.tif"));
        let place = [west, dx, north, dy];
        let size = ((3.2 / dx) as usize, (3.4 / dy) as usize);
        make(&path, &Made { crs: Some("EPSG:4326"), place, size, nodata: None, of: &plane });
        let [lon, lat] = places(60, [9.3, 11.5], [3.4, 5.8]);
        let truth: Vec<f64> = lon.iter().zip(&lat).map(|(x, y)| plane(*x, *y)).collect();
        let (mut east, mut up) = (lon.clone(), lat.clone());
        let (globe, utm) = ("EPSG:4326", "EPSG:32632");
        let to = Crs::from_user(utm).unwrap();
        Crs::from_user(globe).unwrap().transform(&to, &mut east, &mut up).unwrap();
        for survey in [survey(globe, lon, lat), survey(utm, east, up)] {
            let (found, dropped) = read(survey, spec(&path, "")).unwrap();
            assert!(dropped.is_empty());
            for (found, truth) in found.iter().zip(&truth) {
                assert!((found - truth).abs() < 1e-5 * 30.0, "{found} for {truth}");
            }
        }
    }
}

#[test]
fn the_nearest_pixel_and_the_average_are_what_they_say() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("pixels.tif");
    // The number of its pixel, in a row.
    let number = |x: f64, y: f64| (x.floor()) + 10.0 * (10.0 - y).floor();
    let place = [0.0, 1.0, 10.0, 1.0];
    make(&path, &Made { crs: None, place, size: (10, 10), nodata: None, of: &number });
    let at = |x: &[f64], y: &[f64], options: &str| {
        read(survey("local:km", x.to_vec(), y.to_vec()), spec(&path, options)).unwrap().0
    };
    // Inside, on an edge between pixels, and in the corners.
    let (x, y) = ([3.9, 4.0, 0.0, 10.0], [7.2, 7.2, 10.0, 0.0]);
    assert_eq!(at(&x, &y, ",nearest"), [23.0, 24.0, 0.0, 99.0]);
    // 1.2 km around the centre of pixel 44: itself and its four neighbours.
    let (x, y) = ([4.5, 0.5, 9.5], [5.5, 9.5, 5.5]);
    assert_eq!(at(&x, &y, ",mean:1.2km"), [44.0, 11.0 / 3.0, (49.0 + 39.0 + 59.0 + 48.0) / 4.0]);
    // Less than a pixel: its own.
    assert_eq!(at(&x, &y, ",mean:100m"), [44.0, 0.0, 49.0]);
}

/// A raster larger than what is held at once, its places far apart: read in parts, and the same.
#[test]
fn rasters_larger_than_memory_allows_are_read_in_parts() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("large.tif");
    let number = |x: f64, y: f64| 1000.0 * x.floor() + y.floor();
    let place = [0.0, 1.0, 2200.0, 1.0];
    make(&path, &Made { crs: None, place, size: (2300, 2200), nodata: None, of: &number });
    let [x, y] = places(500, [0.0, 2300.0], [0.0, 2200.0]);
    let truth: Vec<f64> = x.iter().zip(&y).map(|(x, y)| number(*x, *y) as f32 as f64).collect();
    let (found, _) = read(survey("local:km", x, y), spec(&path, ",nearest")).unwrap();
    assert_eq!(found, truth);
}

/// What a raster declares as no data reaches nobody: not from the pixel, nor from a neighbour's.
#[test]
fn no_data_leaks_nowhere_and_sites_on_it_are_listed() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("lake.tif");
    let lake = |x: f64, y: f64| match (x - 5.0).hypot(y - 5.0) < 2.0 {
        true => -9999.0,
        false => 1.0 + x / 10.0,
    };
    let place = [0.0, 0.5, 10.0, 0.5];
    let nodata = Some(-9999.0);
    make(&path, &Made { crs: None, place, size: (20, 20), nodata, of: &lake });
    let [x, y] = places(400, [0.0, 10.0], [0.0, 10.0]);
    for options in ["", ",nearest", ",mean:900m"] {
        let survey = survey("local:km", x.clone(), y.clone());
        let (found, dropped) = read(survey, spec(&path, options)).unwrap();
        assert!(found.iter().all(|v| (1.0..=2.0).contains(v)), "{options}: {found:?}");
        let inside = |i: &&usize| lake(x[**i - 1], y[**i - 1]) < 0.0;
        assert!(!dropped.is_empty(), "{options}");
        let off = dropped.iter().filter(|i| !inside(i)).count();
        // The lake's edge runs through pixels.
        assert!(off < dropped.len() / 3, "{options}: {off} of {}", dropped.len());
    }
    // On the lake's own grid: exactly those.
    let survey = survey("local:km", vec![0.25, 5.25, 9.75, 4.75], vec![0.25, 5.25, 9.75, 4.75]);
    let attached = Covariates::attach(survey.clone(), &[spec(&path, "")], None);
    assert!(attached.is_err(), "two sites are no survey");
    let more = Survey { x: vec![0.25, 5.25, 9.75, 2.25], ..survey };
    let attached = Covariates::attach(more, &[spec(&path, "")], None).unwrap();
    assert_eq!(attached.dropped.len(), 1);
    assert_eq!(attached.dropped[0].row, 2);
    assert!(attached.dropped[0].reason.contains("lake.tif"), "{:?}", attached.dropped);
}

/// −9999, −3.4e38 and the like that nobody declared are never a number.
#[test]
fn customary_no_data_that_is_not_declared_is_refused() {
    let folder = TempDir::new().unwrap();
    let place = [0.0, 1.0, 10.0, 1.0];
    let [x, y] = places(50, [0.0, 10.0], [0.0, 10.0]);
    for value in [-9999.0, -3.4e38, -32768.0, 3.4e38, f64::INFINITY] {
        let of = |x: f64, _: f64| if x > 8.0 { value } else { x };
        for nodata in [None, Some(0.123)] {
            let path = folder.path().join(format!("undeclared-{value}-{nodata:?}.tif"));
            make(&path, &Made { crs: None, place, size: (10, 10), nodata, of: &of });
            let survey = survey("local:km", x.clone(), y.clone());
            let error = read(survey, spec(&path, "")).unwrap_err();
            assert!(error.to_string().contains("can only mean \"no data\""), "{value}: {error}");
            assert!(error.help().unwrap().contains("a_nodata"), "{error:?}");
        }
    }
}

/// Pixels of a map: those without data are not wanted, and those outside what was seen are counted.
#[test]
fn a_grid_keeps_the_pixels_that_have_every_covariate() {
    let folder = TempDir::new().unwrap();
    let (slope, class) = (folder.path().join("slope.tif"), folder.path().join("class.tif"));
    let place = [0.0, 0.7, 10.5, 0.7];
    let size = (15, 15);
    let of = |x: f64, y: f64| if y > 8.4 { -1.0 } else { x };
    make(&slope, &Made { crs: None, place, size, nodata: Some(-1.0), of: &of });
    let of = |x: f64, _: f64| {
        if x < 4.9 {
            2.0
        } else if x < 7.0 {
            5.0
        } else {
            7.0
        }
    };
    make(&class, &Made { crs: None, place, size, nodata: None, of: &of });
    let [x, y] = places(40, [1.0, 6.9], [0.5, 8.0]);
    let specs = [spec(&slope, ",nearest"), {
        let text = format!("class={},categorical", class.display());
        text.parse().unwrap()
    }];
    let survey = Covariates::attach(survey("local:km", x, y), &specs, None).unwrap();
    let design = Design::fit(survey.covariates.as_ref().unwrap());
    assert_eq!(design.names(), ["it", "class = 2", "class = 5", "class = another level"]);
    let extent = Extent { west: 0.0, south: 0.0, east: 10.0, north: 10.0 };
    let km = Resolution::Metres(1000.0);
    let grid = Grid::cover(extent, &Crs::from_user("local:km").unwrap(), Some(km)).unwrap();
    let mut seen = 0;
    let (grid, cover) = design
        .cover(grid, &mut |window, values| {
            for (i, v) in values.iter().enumerate() {
                let (row, col) = (window.row + i / window.cols, window.col + i % window.cols);
                // Row 1 has its centres at 8.5, beyond 8.4.
                assert_eq!(v.is_nan(), row < 2, "row {row}");
                assert!(row < 2 || (col >= 7) == (*v >= 1.0), "{row} {col}: {v}");
                seen += 1;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!((seen, cover.wanted, cover.without), (100, 100, 20));
    assert_eq!(grid.wanted(), 80);
    assert_eq!(cover.unseen, [("class".to_string(), vec![7.0])]);
    assert_eq!(cover.each[1].1, 24);
    let said = cover.warnings().join("\n");
    assert!(said.contains("20 pixels (20 %) lack data"), "{said}");
    assert!(said.contains("level of class that no site has (7)"), "{said}");
    assert!(said.contains("it lies outside"), "{said}");
}

const GRID: &str = "data/grid.tif";

/// A folder with a survey of 90 villages whose prevalence hangs on a raster, the raster with a hole, and
/// a class that is drawn by lot.
struct Country {
    folder: TempDir,
}

impl Country {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let height = |lon: f64, lat: f64| (5.0 * lon).sin() + (4.0 * lat + lon).cos();
        let [west, south, east, north] = [-5.0, 0.0, 0.0, 4.5];
        let of = |lon: f64, lat: f64| match (lon + 2.0).hypot(lat - 2.0) < 0.12 {
            true => -1e4,
            false => 100.0 * height(lon, lat) + 300.0,
        };
        let place = [west - 0.013, 0.02, north + 0.007, 0.02];
        let size =
            ((250.0 * (east - west) / 5.0) as usize + 5, (50.0 * (north - south)) as usize + 5);
        let crs = Some("EPSG:4326");
        let nodata = Some(-1e4);
        make(&folder.path().join("height.tif"), &Made { crs, place, size, nodata, of: &of });
        let mut rng = Stream::new(7, "country", 0);
        let mut table = String::from("lon,lat,tested,positive,height,class\n");
        for i in 0..90 {
            let (lon, lat) = (rng.uniform(-4.2, -1.0), rng.uniform(0.8, 3.8));
            let eta = -1.0 + 1.3 * height(lon, lat) + 0.2 * rng.normal();
            let k = rng.binomial(60, 1.0 / (1.0 + (-eta).exp()));
            let class = ["a", "b", "c"][rng.below(3)];
            // The first village lies in the hole.
            let (lon, lat) = if i == 0 { (-2.0, 2.0) } else { (lon, lat) };
            table += &format!("{lon},{lat},60,{k},{},{class}\n", height(lon, lat));
        }
        fs::write(folder.path().join("survey.csv"), table).unwrap();
        Country { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().into()
    }
}

#[test]
fn a_map_with_a_covariate_is_better_and_says_what_it_did() {
    let country = Country::new();
    let (survey, out) = (country.path("survey.csv"), country.path("out"));
    let height = format!("height={}", country.path("height.tif"));
    let how = ["--surveys", &survey, "--like", GRID, "--model", "gp", "--out", &out];
    let said = ok(&[&["map", "--covariate", &height, "--no-pictures"], &how[..]].concat());
    for part in
        ["89 sites used", "no data for height", "covariates", "effects", "height: +", "per sd"]
    {
        assert!(said.contains(part), "no `{part}` in\n{said}");
    }
    let record = fs::read_to_string(country.folder.path().join("out/run.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    let line = &record["frame"]["covariates"]["terms"][0]["features"][0]["line"];
    assert!(
        line["mean"].as_f64().unwrap() > 200.0 && line["sd"].as_f64().unwrap() > 50.0,
        "{line}"
    );
    let effect = &record["model"]["coefficients"][0];
    let (mean, sd) = (effect["mean"].as_f64().unwrap(), effect["sd"].as_f64().unwrap());
    let per = effect["per"].as_f64().unwrap();
    // 1.3 for each 100 of it.
    assert!((100.0 * mean / per - 1.3).abs() < 300.0 * sd / per, "{effect}");
    assert!(sd < 0.2 && mean > 0.5, "{effect}");
    let without = record["covariates"]["without"].as_u64().unwrap();
    assert!(without > 0, "{}", record["covariates"]);
    // No number where there is no covariate, and one everywhere else on land.
    let pixels = |name: &str| {
        let raster = Dataset::open(country.folder.path().join("out").join(name)).unwrap();
        let band = raster.rasterband(1).unwrap();
        band.read_band_as::<f64>().unwrap().data().to_vec()
    };
    let (mapped, beyond) = (pixels("mean.tif"), pixels("extrapolation.tif"));
    assert!(mapped.iter().zip(&beyond).all(|(a, b)| a.is_nan() == b.is_nan()));
    let empty = beyond.iter().filter(|b| b.is_nan()).count() as u64;
    let sea = {
        let data = Dataset::open(Path::new(env!("CARGO_MANIFEST_DIR")).join(GRID)).unwrap();
        let band = data.rasterband(1).unwrap();
        let nothing = band.no_data_value();
        let values = band.read_band_as::<f64>().unwrap();
        values.data().iter().filter(|v| v.is_nan() || Some(**v) == nothing).count() as u64
    };
    assert_eq!(empty, sea + without);
}

/// Draws and districts with a covariate, of every kind of model: one field whatever the tile, no number
/// where there is no covariate, and a district whose mean is that of the map.
#[test]
fn draws_and_districts_take_covariates() {
    let country = Country::new();
    let survey = country.path("survey.csv");
    let height = format!("height={}", country.path("height.tif"));
    let square =
        serde_json::json!([[[-3.0, 1.5], [-1.5, 1.5], [-1.5, 2.6], [-3.0, 2.6], [-3.0, 1.5]]]);
    let geometry = serde_json::json!({ "type": "Polygon", "coordinates": square });
    let feature = serde_json::json!({ "type": "Feature", "properties": { "name": "a" }, "geometry": geometry });
    let layer = serde_json::json!({ "type": "FeatureCollection", "features": [feature] });
    let districts = country.path("districts.geojson");
    fs::write(&districts, layer.to_string()).unwrap();
    let pixels = |out: &str, name: &str, band: usize| {
        let raster = Dataset::open(Path::new(out).join(name)).unwrap();
        raster.rasterband(band).unwrap().read_band_as::<f64>().unwrap().data().to_vec()
    };
    for model in ["gp", "vecchia", "prevalence"] {
        let how =
            ["--surveys", &survey, "--resolution", "8km", "--model", model, "--covariate", &height];
        let quick = ["--no-pictures", "--products", "mean,sd", "--draws", "60"];
        let outs = [country.path(&format!("{model}-1")), country.path(&format!("{model}-2"))];
        for (out, tile) in outs.iter().zip(["32", "96"]) {
            let tile = ["--tile", tile, "--out", out];
            ok(&[&["map"], &how[..], &quick[..], &tile[..]].concat());
        }
        let (mean, sd) = (pixels(&outs[0], "mean.tif", 1), pixels(&outs[0], "sd.tif", 1));
        let (mut off, mut wide, mut n) = (0.0, 0.0, 0.0);
        let draws: Vec<Vec<f64>> = (1..=60).map(|b| pixels(&outs[0], "draws.tif", b)).collect();
        for (band, draw) in draws.iter().enumerate() {
            let other = pixels(&outs[1], "draws.tif", band + 1);
            let same = draw.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{model}: draw {} hangs on the tile", band + 1);
            assert!(draw.iter().zip(&mean).all(|(a, b)| a.is_nan() == b.is_nan()));
        }
        for i in (0..mean.len()).filter(|i| !mean[*i].is_nan()) {
            let of: Vec<f64> = draws.iter().map(|d| d[i]).collect();
            let m = of.iter().sum::<f64>() / 60.0;
            off += (m - mean[i]) / sd[i];
            wide += of.iter().map(|v| (v - m).powi(2)).sum::<f64>() / 59.0 / sd[i].powi(2);
            n += 1.0;
        }
        // All pixels of a draw move together: a standard error of an eighth of an sd.
        assert!((off / n).abs() < 0.6, "{model}: draws are {} sds off", off / n);
        assert!((0.6..1.5).contains(&(wide / n)), "{model}: variance {} of the map's", wide / n);
        // The same district from the finished map, and from its flags.
        let table =
            [country.path(&format!("{model}-a.csv")), country.path(&format!("{model}-b.csv"))];
        let ask = ["areas", "--areas", &districts, "--draws", "80", "--out"];
        let said = ok(&[&ask[..], &[&table[0], "--map", &outs[0]]].concat());
        assert!(said.contains("height lies outside the values seen at sites"), "{said}");
        ok(&[&ask[..], &[&table[1], "--"], &how[..]].concat());
        let [one, other] =
            table.map(|t| isopleth::geo::table::Columns::read(Path::new(&t)).unwrap());
        assert_eq!(one.numbers("mean").unwrap(), other.numbers("mean").unwrap());
        let (said, low) = (one.numbers("mean").unwrap()[0], one.numbers("lower_95").unwrap()[0]);
        assert!(low < said && said - low < 0.2 && said > 0.05, "{model}: {low} {said}");
    }
}

fn score(args: &[&str]) -> Value {
    serde_json::from_str(&ok(&[&["validate", "--folds", "5", "--json"], args].concat())).unwrap()
}

#[test]
fn validation_shows_what_a_covariate_is_worth() {
    let country = Country::new();
    let survey = country.path("survey.csv");
    let height = format!("height={}", country.path("height.tif"));
    for model in ["gp", "vecchia", "prevalence"] {
        let how = ["--surveys", &survey, "--model", model];
        let bare = score(&how);
        let with = score(&[&how[..], &["--covariate", &height]].concat());
        let worth = |report: &Value| report["log_score"].as_f64().unwrap();
        assert!(worth(&with) > worth(&bare) + 0.1, "{model}: {} {}", worth(&bare), worth(&with));
        let held = with["coverage"]["95"].as_f64().unwrap();
        assert!(held > 0.85, "{model}: {held}");
        assert_eq!(with["n"], 89, "the village in the hole is left out");
        assert!(with["baselines"]["covariates-only"]["log_score"].is_number());
        assert!(bare["baselines"]["covariates-only"].is_null());
    }
    // The same from a column, and a class by lot that does no harm.
    let how = ["--surveys", &survey, "--model", "gp", "--covariate-column", "height"];
    let column = score(&how);
    let idle = score(&[&how[..], &["--covariate-column", "class,categorical"]].concat());
    let worth = |report: &Value| report["log_score"].as_f64().unwrap();
    assert!(worth(&idle) > worth(&column) - 0.08, "{} {}", worth(&column), worth(&idle));
}

#[test]
fn predictions_read_covariates_from_columns_and_rasters() {
    let country = Country::new();
    let (survey, targets) = (country.path("survey.csv"), country.path("targets.csv"));
    let out = country.path("out.csv");
    let table =
        "name,lon,lat,height,class\nlow,-3,2,-1.5,a\nhigh,-3,2,1.5,a\nnone,-3,2,,a\nnew,-3,2,0,z\n";
    fs::write(&targets, table).unwrap();
    let how =
        ["predict", "--context", &survey, "--targets", &targets, "--model", "gp", "--out", &out];
    let columns = ["--covariate-column", "height", "--covariate-column", "class,categorical"];
    let said = ok(&[&how[..], &columns[..]].concat());
    assert!(said.contains("1 target without data for a covariate"), "{said}");
    assert!(said.contains("1 target with a covariate outside"), "{said}");
    let table = isopleth::geo::table::Columns::read(&out).unwrap();
    let mean = table.numbers("surface_mean").unwrap();
    assert!(mean[1] > mean[0] + 0.3, "{mean:?}");
    assert!(mean[2].is_nan(), "no data is never a number: {mean:?}");
    assert!(mean[3].is_finite());
    fs::write(&targets, "name,lon,lat\nhere,-3,2\nhole,-2,2\n").unwrap();
    let error = super::command(&[&how[..], &columns[..], &["--force"]].concat()).output().unwrap();
    let error = super::text(&error.stderr);
    assert_error(&error, "targets lack a column", &["height"], "--covariate");
    let height = format!("height={}", country.path("height.tif"));
    ok(&[&how[..], &["--covariate", &height, "--force"]].concat());
    let table = isopleth::geo::table::Columns::read(&out).unwrap();
    let mean = table.numbers("surface_mean").unwrap();
    assert!(mean[0].is_finite() && mean[1].is_nan(), "{mean:?}");
}

/// A network trained on a country's own raster: from the recipe to the map, without the raster once it
/// was read, and with the covariates that it was trained with or none at all.
#[test]
fn a_network_is_trained_on_rasters_and_maps_with_them() {
    let country = Country::new();
    let (survey, height) = (country.path("survey.csv"), country.path("height.tif"));
    let tiny = "[model]\nkind = \"tnp-kr\"\nwidth = 8\nblocks = 1\nheads = 2\nkey_width = 4\n\
        value_width = 4\nembed = [8]\nfeed_forward = 8\nhead_widths = [8]\n[prior]\nkind = \"gp\"\n\
        [design]\ncontext = [{ sites = [5, 40], weight = 1 }]\ntargets = 8\n\
        [covariates]\nterms = [\"height=height.tif,knot:300\"]\nnodes = 4000\n\
        [train]\nsteps = 3\nrows = 2\nvalidate_tasks = 2\n";
    let recipe = country.path("mine.toml");
    fs::write(&recipe, tiny).unwrap();
    let (picture, table) = (country.path("draws.png"), country.path("draws.csv"));
    let said = ok(&["sample", &recipe, "--out", &picture, "--count", "2"]);
    let kept = country.path("mine.covariates.safetensors");
    assert!(said.contains("covariates: height at") && said.contains(&kept), "{said}");
    ok(&["sample", &recipe, "--out", &table, "--count", "2", "--sites", "30"]);
    let drawn = isopleth::geo::table::Columns::read(&table).unwrap();
    let values = drawn.numbers("height").unwrap();
    // 100 · (sin + cos) + 300, in the raster's own unit.
    assert!(values.iter().all(|v| (99.0..501.0).contains(v)), "{values:?}");
    let model = country.path("mine.safetensors");
    // Where the raster is not, what was kept is enough.
    fs::rename(&height, country.path("away.tif")).unwrap();
    ok(&["train", &recipe, "--out", &model]);
    let other = country.path("other.toml");
    fs::write(&other, tiny.replace("knot:300", "knot:310")).unwrap();
    fs::copy(&kept, country.path("other.covariates.safetensors")).unwrap();
    let error = refused(&["train", &other, "--out", &country.path("no.safetensors")]);
    assert_error(&error, "are of another recipe", &["other.covariates"], "isopleth sample");
    fs::rename(country.path("away.tif"), &height).unwrap();
    let out = country.path("out");
    let how = ["--surveys", &survey, "--like", GRID, "--model", &model, "--out", &out];
    let covariate = format!("height={height},knot:300");
    let said = ok(&[&["map", "--no-pictures", "--covariate", &covariate], &how[..]].concat());
    assert!(
        !said.contains("effects"),
        "a network that reads covariates has no coefficients: {said}"
    );
    ok(&[
        "validate",
        "--surveys",
        &survey,
        "--folds",
        "4",
        "--model",
        &model,
        "--covariate",
        &covariate,
    ]);
    let record = fs::read_to_string(country.folder.path().join("out/run.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["model"]["covariates"]["specs"][0]["name"], "height");
    let said = ok(&["inspect", &model]);
    assert!(said.contains("height from height.tif"), "{said}");
    // A window has no covariates of its own.
    let force = ["--force"];
    let windows = ["--windows", "200", "--covariate", &covariate];
    let error = refused(&[&["map"], &windows[..], &how[..], &force].concat());
    assert_error(&error, "windows do not hold sites with covariates", &["200"], "--windows out");
    // Without them, or with others: refused, with what to type.
    let help = "--covariate height=FILE,knot:300";
    let error = refused(&[&["map"], &how[..], &force].concat());
    assert_error(&error, "and the survey has none", &["height from"], help);
    for (name, options) in [("height", ""), ("hill", ",knot:300"), ("height", ",log,knot:300")] {
        let given = format!("{name}={height}{options}");
        let error = refused(&[&["map", "--covariate", &given], &how[..], &force].concat());
        assert_error(&error, "are not those that the model was trained with", &["given"], help);
    }
}

#[test]
fn covariates_that_cannot_be_are_refused_in_words() {
    let country = Country::new();
    let (survey, height) = (country.path("survey.csv"), country.path("height.tif"));
    let nowhere = country.path("nowhere.tif");
    let place = [0.0, 1.0, 10.0, 1.0];
    let of = |x: f64, _: f64| x;
    make(Path::new(&nowhere), &Made { crs: None, place, size: (10, 10), nodata: None, of: &of });
    let far = country.path("far.tif");
    let crs = Some("EPSG:4326");
    let place = [100.0, 1.0, 10.0, 1.0];
    make(Path::new(&far), &Made { crs, place, size: (10, 10), nodata: None, of: &of });
    let flat = country.path("flat.tif");
    let place = [-10.0, 1.0, 10.0, 1.0];
    make(Path::new(&flat), &Made { crs, place, size: (20, 20), nodata: None, of: &|_, _| 7.0 });
    for (covariate, what, help) in [
        (height.clone(), "needs a name", "NAME=FILE"),
        (format!("h={height},cubic"), "no option", "bilinear"),
        (format!("h={height},categorical,bilinear"), "no average", "pixel"),
        (format!("h={height},categorical"), "not a whole number", "leave `categorical` out"),
        (format!("h={height}:3"), "no such band", "count from 1"),
        (format!("h={height}:0"), "count from 1", "NAME=FILE"),
        (format!("h={nowhere}"), "no coordinate reference system", "a_srs"),
        (format!("h={far}"), "no data at most of the sites", "CRS"),
        (format!("h={flat}"), "same at every site", "leave it out"),
        (format!("h={flat},knot:x"), "no option", "knot:650"),
        ("h=no-such.tif".into(), "could not read", ""),
    ] {
        let folds = ["--folds", "5", "--model", "gp"];
        let args = ["validate", "--surveys", &survey, "--covariate", &covariate];
        let error = refused(&[&args[..], &folds[..]].concat());
        assert_error(&error, what, &[], help);
    }
    let out = country.path("out");
    let args = ["map", "--surveys", &survey, "--like", GRID, "--model", "gp", "--out", &out];
    let error = refused(&[&args[..], &["--covariate-column", "height"]].concat());
    assert_error(&error, "at every pixel", &["height"], "--covariate NAME=FILE");
    let twice = format!("h={height}");
    let error = refused(&[&args[..], &["--covariate", &twice, "--covariate", &twice]].concat());
    assert_error(&error, "same name", &["h"], "of its own");
}
