//! Rasters through a second pair of eyes: what we write is read again with GDAL itself.
#![cfg(feature = "gdal")]

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use gdal::{Dataset, DriverManager, Metadata, cpl::CslStringList, raster::Buffer};
use isopleth::{
    Error, Link, Marginals, Observations, Of, Posterior, Predictive, Process, Result, Sites,
    geo::{
        crs::Crs,
        frame::Frame,
        geotiff::{Band, Cog, Raster},
        grid::{Extent, Grid, Mask, Resolution, Window},
        people::{self, Measure, People},
        survey::{self, Survey},
    },
    mapping::{self, Plan, record},
    product::{self, Around, Outcome, PRODUCTS, Reads, Scale, Spec},
};

fn utm() -> Crs {
    Crs::from_user("EPSG:32632").unwrap()
}

fn grid(width: f64, height: f64, resolution: f64) -> Grid {
    let (west, south) = (321_000.0, 510_000.0);
    let extent = Extent { west, south, east: west + width, north: south + height };
    Grid::cover(extent, &utm(), Some(Resolution::Metres(resolution))).unwrap()
}

fn band() -> Band {
    Band { description: "Mean prevalence".into(), unit: "1".into() }
}

/// Some value for each pixel, NaN along a diagonal.
fn value(row: usize, col: usize) -> f32 {
    if row == col { f32::NAN } else { ((row * 7 + col * 3) % 101) as f32 / 101.0 }
}

fn write(path: &Path, grid: &Grid, tile: usize) -> Result<PathBuf> {
    let mut cog = Cog::create(path, grid, &band(), &[("MODEL".into(), "a < b & \"c\"".into())])?;
    for w in grid.windows(tile) {
        let pixels: Vec<f32> =
            (0..w.len()).map(|i| value(w.row + i / w.cols, w.col + i % w.cols)).collect();
        cog.write(w, &pixels)?;
    }
    cog.finish()
}

fn pixels(path: &Path) -> Vec<f32> {
    let data = Dataset::open(path).unwrap();
    let band = data.rasterband(1).unwrap();
    band.read_band_as::<f32>().unwrap().into_shape_and_vec().1
}

/// A distance for each wanted pixel of a window, and a variance.
fn around(grid: &Grid, window: isopleth::geo::grid::Window) -> Around {
    let (x, y) = grid.centres(window, &grid.valid(window));
    let km = x.iter().zip(&y).map(|(x, y)| 1e-3 * (x - 3e5) + 1e-5 * y);
    Around { km: km.collect(), spread: 2.0 }
}

/// Equal bit for bit, any NaN equal to any other.
fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || (a.is_nan() && b.is_nan()))
}

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A small GeoTIFF made by GDAL alone.
fn foreign(path: &Path, crs: Option<&str>, transform: [f64; 6], values: &[f32], cols: usize) {
    let rows = values.len() / cols;
    let mut data = DriverManager::get_driver_by_name("GTiff")
        .unwrap()
        .create_with_band_type_with_options::<f32, _>(
            path,
            cols,
            rows,
            1,
            &CslStringList::from_iter(["COMPRESS=DEFLATE"]),
        )
        .unwrap();
    data.set_geo_transform(&transform).unwrap();
    if let Some(crs) = crs {
        data.set_spatial_ref(&Crs::from_user(crs).unwrap().spatial_ref().unwrap()).unwrap();
    }
    let mut band = data.rasterband(1).unwrap();
    band.set_no_data_value(Some(-32768.0)).unwrap();
    band.write((0, 0), (cols, rows), &mut Buffer::new((cols, rows), values.to_vec())).unwrap();
}

const PLACE: [f64; 6] =
    [321_691.339_838_961, 2_769.999_999_999_997, 0.0, 835_744.872_6, 0.0, -2770.0];

#[test]
fn a_map_is_a_cloud_optimised_geotiff_that_says_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mean.tif");
    let grid = grid(700e3, 500e3, 1000.0);
    write(&path, &grid, 256).unwrap();
    assert_eq!(entries(directory.path()), ["mean.tif"], "nothing else is left");

    let data = Dataset::open(&path).unwrap();
    assert_eq!(data.metadata_item("LAYOUT", "IMAGE_STRUCTURE").as_deref(), Some("COG"));
    assert_eq!(data.metadata_item("COMPRESSION", "IMAGE_STRUCTURE").as_deref(), Some("DEFLATE"));
    assert_eq!(data.metadata_item("PREDICTOR", "IMAGE_STRUCTURE").as_deref(), Some("3"));
    assert_eq!(data.metadata_item("MODEL", "").as_deref(), Some("a < b & \"c\""));
    assert_eq!(data.geo_transform().unwrap(), [321e3, 1000.0, 0.0, 1010e3, 0.0, -1000.0]);
    assert_eq!(data.spatial_ref().unwrap().auth_code().unwrap(), 32632);
    let band = data.rasterband(1).unwrap();
    assert_eq!(band.block_size(), (256, 256));
    assert!(band.overview_count().unwrap() >= 1);
    assert!(band.no_data_value().unwrap().is_nan());
    assert_eq!(band.description().unwrap(), "Mean prevalence");
    assert_eq!(band.unit(), "1");

    let expected: Vec<f32> = (0..grid.len()).map(|i| value(i / grid.cols, i % grid.cols)).collect();
    assert!(same(&pixels(&path), &expected));

    let raster = Raster::open(&path).unwrap();
    assert_eq!(raster.layout().unwrap().layout.as_deref(), Some("COG"));
    assert_eq!(raster.header.crs, Some(utm()));
    let small = raster.thumbnail(50, 70).unwrap();
    let mean = small.iter().sum::<f64>() / small.len() as f64;
    assert!((mean - 0.495).abs() < 0.01, "averages, without a hole on the diagonal: {mean}");
}

#[test]
fn tiles_never_change_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let grid = grid(90e3, 37e3, 500.0);
    let whole = write(&directory.path().join("whole.tif"), &grid, 1000).unwrap();
    for tile in [1, 17, 64] {
        let path = write(&directory.path().join(format!("{tile}.tif")), &grid, tile).unwrap();
        assert!(same(&pixels(&path), &pixels(&whole)), "tile {tile}");
    }
}

#[test]
fn an_unfinished_map_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mean.tif");
    let grid = grid(50e3, 50e3, 1000.0);
    let mut cog = Cog::create(&path, &grid, &band(), &[]).unwrap();
    let first = grid.windows(32).next().unwrap();
    cog.write(first, &vec![0.0; first.len()]).unwrap();
    assert!(!path.exists());
    assert!(matches!(cog.finish(), Err(Error::Axis { .. })), "a window is missing");
    assert_eq!(entries(directory.path()), [""; 0]);
}

#[test]
fn a_grid_like_another_has_its_geometry_bit_for_bit() {
    let directory = tempfile::tempdir().unwrap();
    let (like, path) = (directory.path().join("like.tif"), directory.path().join("mean.tif"));
    for crs in ["EPSG:32632", "EPSG:4326", "+proj=laea +lat_0=5 +lon_0=10 +datum=WGS84 +units=m"] {
        let place = if crs == "EPSG:4326" {
            [8.0 + 1.0 / 3.0, 1.0 / 120.0, 0.0, 9.1, 0.0, -1.0 / 120.0]
        } else {
            PLACE
        };
        let values = [1.0, -32768.0, 3.0, f32::NAN, 5.0, -9999.0];
        foreign(&like, Some(crs), place, &values, 3);
        let grid = Grid::read(&like).unwrap();
        assert_eq!((grid.rows, grid.cols, grid.wanted()), (2, 3, 3));
        assert_eq!(grid.notes.len(), 1, "−9999 without a declaration is said: {:?}", grid.notes);
        let whole = grid.windows(10).next().unwrap();
        assert_eq!(grid.valid(whole), [true, false, true, false, true, false]);
        write(&path, &grid, 2).unwrap();
        let (a, b) = (Dataset::open(&like).unwrap(), Dataset::open(&path).unwrap());
        assert_eq!(a.geo_transform().unwrap(), b.geo_transform().unwrap(), "{crs}");
        let own = Crs::from_spatial_ref(&b.spatial_ref().unwrap()).unwrap();
        assert_eq!(own, Crs::from_spatial_ref(&a.spatial_ref().unwrap()).unwrap());
    }
}

#[test]
fn a_local_plane_survives_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let local = Crs::from_user("local:km").unwrap();
    let extent = Extent { west: 0.0, south: -30.0, east: 40.0, north: 0.0 };
    let grid = Grid::cover(extent, &local, Some(Resolution::Metres(500.0))).unwrap();
    let path = write(&directory.path().join("mean.tif"), &grid, 64).unwrap();
    let again = Grid::read_local(&path, &local).unwrap();
    assert_eq!((again.origin, again.pixel), (grid.origin, grid.pixel));
    assert!(again.crs.is_local());
    assert_eq!(again.crs.metres_per_unit(), 1000.0);
}

#[test]
fn clipping_keeps_pixels_whose_centre_is_inside() {
    let directory = tempfile::tempdir().unwrap();
    let area = directory.path().join("area.geojson");
    // Pixel centres at 0.5, 1.5, …: the square holds 3 × 2 of them; the hole takes one away.
    std::fs::write(
        &area,
        r#"{"type":"FeatureCollection","features":[{"type":"Feature","properties":{},"geometry":
        {"type":"Polygon","coordinates":[[[10.4,0.4],[13.4,0.4],[13.4,2.4],[10.4,2.4],[10.4,0.4]],
        [[11.4,0.4],[11.6,0.4],[11.6,0.6],[11.4,0.6],[11.4,0.4]]]}}]}"#,
    )
    .unwrap();
    let lonlat = Crs::from_user("EPSG:4326").unwrap();
    let extent = Extent { west: 8.0, south: -1.0, east: 16.0, north: 4.0 };
    let grid = Grid::cover(extent, &lonlat, Some(Resolution::Degrees(1.0))).unwrap();
    let clipped = grid.clone().clip(&area).unwrap();
    assert_eq!(clipped.wanted(), 5);
    let mask = clipped.valid.as_ref().unwrap();
    assert!(mask.get(2, 2) && mask.get(3, 2) && !mask.get(3, 3) && mask.get(3, 4));

    // In another system the same land is kept: areas agree to the pixel.
    let fine = Grid::cover(
        Extent { west: 600e3, south: 0.0, east: 1_200e3, north: 400e3 },
        &utm(),
        Some(Resolution::Metres(1000.0)),
    );
    let kept = fine.unwrap().clip(&area).unwrap().wanted() as f64;
    // 3° × 2° less the hole, on UTM: 111.32 · 110.57 km² a square degree, scale about 1.0005².
    assert!((kept / (5.96 * 111.32 * 110.57) - 1.0).abs() < 0.01, "{kept} km²");

    let far = Extent { west: 100.0, south: -1.0, east: 110.0, north: 4.0 };
    let far = Grid::cover(far, &lonlat, Some(Resolution::Degrees(1.0))).unwrap();
    assert!(far.clip(&area).unwrap_err().to_string().contains("no pixel"));
}

#[test]
fn bad_grids_are_refused_in_words() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let refused = |path: &Path, words: &str| {
        let error = Grid::read(path).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.help().is_some(), "{error}");
    };
    let values: Vec<f32> = (0..90_000).map(|i| ((i * 7919) % 10_007) as f32).collect();

    foreign(&at("naked.tif"), None, PLACE, &values, 300);
    refused(&at("naked.tif"), "no coordinate reference system");

    foreign(&at("whole.tif"), Some("EPSG:32632"), PLACE, &values, 300);
    assert_eq!(Grid::read(&at("whole.tif")).unwrap().wanted(), 90_000);
    let bytes = std::fs::read(at("whole.tif")).unwrap();
    for keep in [0, 4, 100, bytes.len() / 2, bytes.len() - 100] {
        std::fs::write(at("cut.tif"), &bytes[..keep]).unwrap();
        let error = Grid::read(&at("cut.tif")).unwrap_err();
        assert!(error.help().is_some_and(|h| h.contains("again")), "{keep} bytes: {error}");
    }

    let rotated = [0.0, 1.0, 0.5, 0.0, 0.5, -1.0];
    foreign(&at("rotated.tif"), Some("EPSG:32632"), rotated, &values, 300);
    refused(&at("rotated.tif"), "rotated");

    foreign(&at("empty.tif"), Some("EPSG:32632"), PLACE, &[f32::NAN; 12], 3);
    refused(&at("empty.tif"), "no pixel with data");

    std::fs::write(at("words.tif"), "not a raster").unwrap();
    refused(&at("words.tif"), "not a raster");
    refused(&at("missing.tif"), "could not read");
}

#[test]
fn a_grid_elsewhere_than_the_sites_is_refused() {
    let grid = grid(700e3, 500e3, 5000.0);
    let lonlat = Crs::from_user("EPSG:4326").unwrap();
    assert_eq!(grid.overlap(&lonlat, &[9.0, 10.0, 50.0], &[5.5, 6.0, 5.0]).unwrap(), 2);
    for (x, y) in [(-60.0, 5.0), (9.0, -60.0)] {
        let error = grid.overlap(&lonlat, &[x], &[y]).unwrap_err();
        assert!(error.to_string().contains("do not overlap"), "{error}");
        assert!(error.facts().len() >= 2);
    }
}

/// A posterior known at every pixel: mean and sd on the link scale by place.
fn known(grid: &Grid, window: isopleth::geo::grid::Window, link: Link) -> Marginals {
    let (x, y) = grid.centres(window, &grid.valid(window));
    let mean: Vec<f64> = x.iter().zip(&y).map(|(x, y)| (x / 1e5).sin() + (y / 7e4).cos()).collect();
    let sd: Vec<f64> = x.iter().map(|x| 0.1 + (x / 1e6).abs()).collect();
    let weight = vec![1.0; mean.len()];
    Marginals { link, of: Of::Surface, components: 1, weight, mean, sd }
}

/// The laws of every registered product.
#[test]
fn products_are_the_known_raster_masked_as_asked_for_any_tile() {
    let mut grid = grid(60e3, 40e3, 1000.0);
    let mut mask = Mask::none(grid.rows, grid.cols);
    for row in 0..grid.rows {
        for col in 0..grid.cols {
            mask.set(row, col, (row * 5 + col) % 3 > 0);
        }
    }
    grid.valid = Some(mask);
    let specs: Vec<Spec> = PRODUCTS
        .iter()
        .map(|entry| {
            let example = entry.parameter.as_ref().map(|p| format!(":{}", p.example));
            format!("{}{}", entry.name, example.unwrap_or_default()).parse().unwrap()
        })
        .collect();
    let outcome =
        Outcome { name: "prevalence".into(), unit: "1".into(), link: Link::Logit, of: Of::Surface };
    let make = |size: usize| {
        let directory = tempfile::tempdir().unwrap();
        let mut products = product::open(&specs, &outcome, &grid, directory.path(), &[]).unwrap();
        for window in grid.windows(size) {
            let (valid, known) = (grid.valid(window), known(&grid, window, outcome.link));
            for product in &mut products {
                let values = product.spec().values(&known, &around(&grid, window));
                let raster = product::scatter(&valid, &values).unwrap();
                product.accept(window, &raster).unwrap();
            }
        }
        let files: Vec<PathBuf> = products.into_iter().map(|p| p.finish().unwrap()).collect();
        (directory, files)
    };
    let (_kept, whole) = make(1000);
    let everything = grid.windows(1000).next().unwrap();
    let known = known(&grid, everything, outcome.link);
    for (spec, path) in specs.iter().zip(&whole) {
        let around = around(&grid, everything);
        let number = |i: usize| match spec.entry.reads {
            Reads::Parameter => spec.parameter,
            Reads::Nearest => around.km[i],
            Reads::Spread => around.spread,
        };
        let values = known.map(|m, i| (spec.entry.value)(m, i, number(i)) as f32);
        assert!(values.iter().all(|v| v.is_finite()), "{spec}");
        let expected = product::scatter(&grid.valid(everything), &values).unwrap();
        assert!(same(&pixels(path), &expected), "{spec} is not the known raster");
        let data = Dataset::open(path).unwrap();
        assert_eq!(data.metadata_item("PRODUCT", "").unwrap(), spec.to_string());
        assert_eq!(data.metadata_item("OF", "").unwrap(), "surface");
        let description = data.rasterband(1).unwrap().description().unwrap();
        if spec.entry.scale != Scale::Distance {
            assert!(description.ends_with(", surface"), "{description}");
        }
        let unit = if spec.entry.scale == Scale::Distance { "km" } else { "1" };
        assert_eq!(data.rasterband(1).unwrap().unit(), unit);
    }
    for size in [7, 16] {
        let (_kept, parts) = make(size);
        for ((spec, a), b) in specs.iter().zip(&whole).zip(&parts) {
            assert_eq!(a.file_name(), b.file_name());
            assert!(same(&pixels(a), &pixels(b)), "{spec} notices tiles of {size}");
        }
    }
}

/// A process whose posterior is known everywhere, on any link: mean and sd are plain functions of
/// the place in model units.
struct Known {
    link: Link,
    asked: std::sync::Mutex<Vec<usize>>,
}

fn known_mean(x: f64, y: f64) -> f64 {
    (2.0 * x).sin() - 0.7 * y
}

impl Process for Known {
    fn condition<'a>(&'a self, _context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(At(self)))
    }
}

struct At<'a>(&'a Known);

impl Posterior for At<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let places = &targets.host()?[0];
        self.0.asked.lock().unwrap().push(places.len());
        let tensor = |f: &dyn Fn(f64, f64) -> f64| {
            let values: Vec<f32> = places.iter().map(|p| f(p[0], p[1]) as f32).collect();
            Tensor::from_vec(values, (1, places.len(), 1), &Device::Cpu)
        };
        let sd = tensor(&|x, y| 0.3 + 0.1 * x * x + 0.1 * y * y)?;
        let wide = (&sd + 0.5)?;
        Predictive::gaussian(self.0.link, tensor(&known_mean)?, sd, wide)
    }
}

fn survey(outcome: survey::Outcome) -> Survey {
    let x = vec![0.0, 40.0, 10.0, 25.0];
    Survey {
        source: "known.csv".into(),
        crs: Crs::from_user("local:km").unwrap(),
        y: vec![0.0, 10.0, 20.0, 5.0],
        rows: (1..=x.len()).collect(),
        x,
        outcome,
        covariates: None,
        dropped: Vec::new(),
        times: None,
        displacement: None,
        geometry: Default::default(),
        notes: Vec::new(),
    }
}

/// Maps a known posterior; returns pixels of mean, sd and exceedance:0.2, and the summary.
fn map(
    outcome: survey::Outcome,
    link: Link,
    grid: &Grid,
    plan: &Plan,
) -> (Vec<Vec<f32>>, mapping::Summary, Frame, Vec<usize>) {
    let survey = survey(outcome);
    let frame = Frame::fit(&survey).unwrap();
    let context = frame.observations(&survey, &Device::Cpu).unwrap();
    let process = Known { link, asked: Default::default() };
    let posterior = process.condition(&context).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let specs: Vec<Spec> =
        ["mean", "sd", "exceedance:0.2"].iter().map(|s| s.parse().unwrap()).collect();
    let what = Outcome { name: "outcome".into(), unit: "".into(), link, of: plan.of };
    let mut products = product::open(&specs, &what, grid, directory.path(), &[]).unwrap();
    let mut last = (0, 0);
    let summary =
        mapping::run(&*posterior, &context, grid, &frame, &mut products, plan, &mut |done, of| {
            assert!(done > last.0 && done <= of);
            last = (done, of);
        })
        .unwrap();
    assert_eq!(last, (grid.wanted(), grid.wanted()));
    let maps = products.into_iter().map(|p| pixels(&p.finish().unwrap())).collect();
    drop(posterior);
    (maps, summary, frame, process.asked.into_inner().unwrap())
}

fn counts() -> survey::Outcome {
    survey::Outcome::Counts { positive: vec![1.0, 2.0, 0.0, 3.0], tested: vec![9.0; 4] }
}

fn square() -> Grid {
    let extent = Extent { west: -5.0, south: -5.0, east: 45.0, north: 25.0 };
    let local = Crs::from_user("local:km").unwrap();
    let mut grid = Grid::cover(extent, &local, Some(Resolution::Metres(500.0))).unwrap();
    let mut mask = Mask::none(grid.rows, grid.cols);
    for row in 0..grid.rows {
        for col in 0..grid.cols {
            mask.set(row, col, row > 25 && (row + col) % 4 > 0); // windows without any, too
        }
    }
    grid.valid = Some(mask);
    grid
}

#[test]
fn a_mapped_value_is_the_posterior_there_in_outcome_units() {
    let values = survey::Outcome::Values(vec![100.0, 140.0, 90.0, 110.0]);
    let grid = square();
    let plan = Plan::new(Device::Cpu);
    let (maps, summary, frame, _) = map(values, Link::Identity, &grid, &plan);
    assert!((frame.y_mean - 110.0).abs() < 1e-12);
    let (mut lowest, mut total) = (f64::INFINITY, 0.0);
    for row in 0..grid.rows {
        for col in 0..grid.cols {
            let i = row * grid.cols + col;
            if !grid.valid.as_ref().unwrap().get(row, col) {
                assert!(maps.iter().all(|m| m[i].is_nan()), "masked in, masked out");
                continue;
            }
            // Sites span 0 … 40 km by 0 … 20 km: one unit is 20 km, centred on (20, 10).
            let (x, y) = grid.centre(row, col);
            let (x, y) = ((x - 20.0) / 20.0, (y - 10.0) / 20.0);
            let mean = 110.0 + frame.y_sd * known_mean(x, y);
            let sd = frame.y_sd * (0.3 + 0.1 * x * x + 0.1 * y * y);
            assert!((f64::from(maps[0][i]) - mean).abs() < 1e-3, "{} {mean}", maps[0][i]);
            assert!((f64::from(maps[1][i]) - sd).abs() < 1e-4, "{} {sd}", maps[1][i]);
            lowest = mean.min(lowest);
            total += mean;
        }
    }
    assert_eq!(summary.pixels, grid.wanted());
    assert!((summary.lowest - lowest).abs() < 1e-3);
    assert!((summary.average - total / grid.wanted() as f64).abs() < 1e-3);
    assert_eq!(summary.reach_km, 10.0);
    // Beyond 10 km of all four sites lies a known share of the wanted pixels.
    let sites = [(0.0, 0.0), (40.0, 10.0), (10.0, 20.0), (25.0, 5.0)];
    let wanted = (0..grid.len()).filter(|i| !maps[0][*i].is_nan());
    let far = wanted.filter(|i| {
        let (x, y) = grid.centre(i / grid.cols, i % grid.cols);
        sites.iter().all(|s| (s.0 - x).hypot(s.1 - y) > 10.0)
    });
    let share = far.count() as f64 / grid.wanted() as f64;
    assert!(share > 0.1 && (summary.far - share).abs() < 1e-3, "{} {share}", summary.far);
}

#[test]
fn memory_knobs_never_change_a_map() {
    let grid = square();
    let whole = map(counts(), Link::Logit, &grid, &Plan::new(Device::Cpu));
    for (tile, targets) in [(7, 16), (64, 1000), (13, 1), (1000, 100_000)] {
        let plan = Plan { tile, targets, workers: 1 + targets % 4, ..Plan::new(Device::Cpu) };
        let parts = map(counts(), Link::Logit, &grid, &plan);
        assert!(parts.3.iter().all(|n| *n <= targets), "no call asks about more than {targets}");
        for (a, b) in whole.0.iter().zip(&parts.0) {
            assert!(same(a, b), "tiles of {tile}, {targets} targets at once");
        }
        assert!((parts.1.average - whole.1.average).abs() < 1e-12);
    }
    assert!(
        mapping::run(
            &At(&Known { link: Link::Logit, asked: Default::default() }),
            &whole.2.observations(&survey(counts()), &Device::Cpu).unwrap(),
            &grid,
            &whole.2,
            &mut [],
            &Plan { tile: 0, ..Plan::new(Device::Cpu) },
            &mut |_, _| {},
        )
        .is_err()
    );
}

/// A posterior on a card with room for so many targets at once, and no memory for more.
struct Cramped<'a> {
    known: &'a Known,
    room: usize,
    error: &'static str,
}

impl Posterior for Cramped<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        if targets.len() > self.room {
            self.known.asked.lock().unwrap().push(targets.len());
            return Err(candle_core::Error::Cuda(self.error.into()).into());
        }
        At(self.known).at(targets)
    }
}

/// As `map`, by several posteriors; the map, what it holds, and how many targets each was asked about.
fn map_by(posteriors: &[&dyn Posterior], plan: &Plan) -> Result<(Vec<Vec<f32>>, mapping::Summary)> {
    let (grid, survey) = (square(), survey(counts()));
    let frame = Frame::fit(&survey).unwrap();
    let context = frame.observations(&survey, &Device::Cpu).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let specs: Vec<Spec> =
        ["mean", "sd", "exceedance:0.2"].iter().map(|s| s.parse().unwrap()).collect();
    let what = Outcome { name: "outcome".into(), unit: "".into(), link: Link::Logit, of: plan.of };
    let mut products = product::open(&specs, &what, &grid, directory.path(), &[]).unwrap();
    let mut progress = |_, _| {};
    let summary =
        mapping::run_each(posteriors, &context, &grid, &frame, &mut products, plan, &mut progress)?;
    Ok((products.into_iter().map(|p| pixels(&p.finish().unwrap())).collect(), summary))
}

const FULL: &str = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";

/// A card without memory for a question is asked about parts of it, from then on; the map is the same.
#[test]
fn a_card_without_memory_is_asked_less_and_the_map_stays() {
    let whole = map(counts(), Link::Logit, &square(), &Plan::new(Device::Cpu));
    for (targets, workers, room, cut) in [
        (448, 1, 425, None), // 2550 pixels in six questions of 425
        (448, 1, 424, Some(212)),
        (1000, 1, 130, Some(79)),  // 638, 319, 159
        (1000, 3, 200, Some(106)), // 213 for each of four questions a thread
    ] {
        let known = Known { link: Link::Logit, asked: Default::default() };
        let posterior = Cramped { known: &known, room, error: FULL };
        let plan = Plan { targets, workers, ..Plan::new(Device::Cpu) };
        let (maps, summary) = map_by(&[&posterior], &plan).unwrap();
        for (a, b) in whole.0.iter().zip(&maps) {
            assert!(same(a, b), "{targets} targets where {room} fit");
        }
        assert_eq!(summary.cut_to, cut);
        assert!((summary.average - whole.1.average).abs() < 1e-12);
        // Each call that was running may find out for itself, once for each halving.
        let asked = known.asked.into_inner().unwrap();
        let refused = asked.iter().filter(|n| **n > room).count();
        assert!(refused <= 3 * workers, "{refused} refusals for {workers} workers");
    }
}

/// Where not even the smallest part fits, and for any other error, nothing is tried again.
#[test]
fn what_is_no_lack_of_memory_is_asked_once() {
    let plan = Plan { targets: 448, workers: 1, ..Plan::new(Device::Cpu) };
    for (room, error, words, calls) in [
        (0, "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"…\")", "ILLEGAL_ADDRESS", 1),
        (10, FULL, "no memory left", 4), // 448, 224, 112, 64
    ] {
        let known = Known { link: Link::Logit, asked: Default::default() };
        let posterior = Cramped { known: &known, room, error };
        let error = map_by(&[&posterior], &plan).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(known.asked.into_inner().unwrap().len(), calls, "{words}");
    }
}

/// Posteriors that know the same make the same map, whoever answers what, and each answers some.
#[test]
fn cards_share_a_map_that_none_of_them_changes() {
    let whole = map(counts(), Link::Logit, &square(), &Plan::new(Device::Cpu));
    let cards: Vec<Known> =
        (0..3).map(|_| Known { link: Link::Logit, asked: Default::default() }).collect();
    let cramped = Cramped { known: &cards[2], room: 100, error: FULL };
    let posteriors: [&dyn Posterior; 3] = [&At(&cards[0]), &At(&cards[1]), &cramped];
    let devices = vec![Device::Cpu; 3];
    let plan = Plan { tile: 32, targets: 128, workers: 6, ..Plan::on(devices) };
    let (maps, summary) = map_by(&posteriors, &plan).unwrap();
    assert!(whole.0.iter().zip(&maps).all(|(a, b)| same(a, b)));
    assert!((summary.average - whole.1.average).abs() < 1e-12);
    let answered = cards.iter().map(|card| card.asked.lock().unwrap().iter().sum::<usize>());
    assert!(answered.clone().sum::<usize>() >= square().wanted());
    let error = map_by(&posteriors[..2], &plan).unwrap_err();
    assert!(error.to_string().contains("posteriors and devices"), "{error}");
}

/// Where a stage of the pipeline breaks.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Broken {
    Nothing,
    Asking,
    Panicking,
    Writing,
}

struct Fragile(Broken, std::sync::atomic::AtomicUsize);

impl Posterior for Fragile {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let asked = self.1.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        match self.0 {
            Broken::Asking if asked == 5 => return Err(isopleth::Error::input("asked too much")),
            Broken::Panicking if asked == 5 => panic!("a bug in the model"),
            _ => {}
        }
        At(&Known { link: Link::Logit, asked: Default::default() }).at(targets)
    }
}

struct Disk(Broken, usize);

impl product::Product for Disk {
    fn spec(&self) -> Spec {
        "mean".parse().unwrap()
    }
    fn accept(&mut self, _: isopleth::geo::grid::Window, _: &[f32]) -> Result<()> {
        self.1 += 1;
        match self.0 == Broken::Writing && self.1 == 3 {
            true => Err(isopleth::Error::input("the disk is full")),
            false => Ok(()),
        }
    }
    fn finish(self: Box<Self>) -> Result<PathBuf> {
        Ok("nowhere".into())
    }
}

/// Whatever stage fails, all stop, the first error is told, and nobody waits for ever.
#[test]
fn a_stage_that_breaks_stops_the_others() {
    let (survey, grid) = (survey(counts()), square());
    let frame = Frame::fit(&survey).unwrap();
    let context = frame.observations(&survey, &Device::Cpu).unwrap();
    let here = std::thread::current().id();
    let run = |broken, workers| {
        let mut products: Vec<Box<dyn product::Product>> = vec![Box::new(Disk(broken, 0))];
        let plan = Plan { tile: 16, targets: 64, workers, ..Plan::new(Device::Cpu) };
        let mut progress = |_, _| assert_eq!(std::thread::current().id(), here);
        let posterior = Fragile(broken, Default::default());
        mapping::run(&posterior, &context, &grid, &frame, &mut products, &plan, &mut progress)
    };
    for workers in [1, 3] {
        assert_eq!(run(Broken::Nothing, workers).unwrap().pixels, grid.wanted());
        let said = |broken| run(broken, workers).unwrap_err().to_string();
        assert_eq!(said(Broken::Asking), "asked too much");
        assert_eq!(said(Broken::Writing), "the disk is full");
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(Broken::Panicking, workers).map(|_| ())
        }));
        let panic = panic.expect_err("a panic is not an error");
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"a bug in the model"));
    }
}

#[test]
fn observations_are_less_certain_than_the_surface() {
    let grid = square();
    let surface = map(counts(), Link::Logit, &grid, &Plan::new(Device::Cpu));
    let plan = Plan { of: Of::Observation, ..Plan::new(Device::Cpu) };
    let observation = map(counts(), Link::Logit, &grid, &plan);
    let wider = |i: usize| surface.0[1][i].is_nan() || observation.0[1][i] > surface.0[1][i];
    assert!((0..grid.len()).all(wider));
}

/// The command.
mod command {
    use std::process::{Command, Output};

    use super::*;

    fn map(out: &Path, args: &[&str]) -> Output {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("isopleth"));
        command.current_dir(env!("CARGO_MANIFEST_DIR"));
        command.args(["map", "--surveys", "data/survey.csv", "--out"]).arg(out).args(args);
        if !args.contains(&"--model") {
            command.args(["--model", "gp"]);
        }
        command.output().unwrap()
    }

    fn words(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    fn works(out: &Path, args: &[&str]) -> String {
        let output = map(out, args);
        assert!(output.status.success(), "{args:?}: {}", words(&output.stderr));
        words(&output.stdout)
    }

    #[track_caller]
    fn refused(out: &Path, args: &[&str], what: &str) {
        let output = map(out, args);
        let text = words(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        assert!(text.starts_with("error: ") && text.contains(what), "{args:?}: {text}");
        assert!(text.contains("\nhelp: "), "{args:?}: {text}");
    }

    #[test]
    fn a_survey_becomes_maps_on_the_grid_it_is_asked_for() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("new/out");
        let text = works(&out, &["--like", "data/grid.tif", "--threshold", "0.2,0.5"]);
        for word in ["138 sites used", "rows 37, 102", "km", "on average", "exceedance_0.5.tif"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!(entries(&home.path().join("new")), ["out"], "no scratch is left");
        let names = ["exceedance_0.2", "exceedance_0.5", "interval_0.95", "mean"]
            .into_iter()
            .chain(["quantile_0.025", "quantile_0.975", "sd"]);
        let mut expected: Vec<String> =
            names.flat_map(|n| [format!("{n}.png"), format!("{n}.tif")]).collect();
        expected.push("run.json".into());
        expected.sort();
        assert_eq!(entries(&out), expected);

        let like = Dataset::open("data/grid.tif").unwrap();
        let read = |name: &str| pixels(&out.join(name));
        let (mean, low, high) =
            (read("mean.tif"), read("quantile_0.025.tif"), read("quantile_0.975.tif"));
        let mask = pixels(Path::new("data/grid.tif"));
        let data = Dataset::open(out.join("mean.tif")).unwrap();
        assert_eq!(data.geo_transform().unwrap(), like.geo_transform().unwrap());
        assert_eq!(data.raster_size(), like.raster_size());
        for i in 0..mean.len() {
            assert_eq!(mean[i].is_nan(), mask[i].is_nan() || mask[i] == 0.0, "pixel {i}");
            assert!(mean[i].is_nan() || (low[i] < mean[i] && mean[i] < high[i]), "pixel {i}");
        }
        // The truth is known: the interval should hold it about as often as it says.
        let truth = pixels(Path::new("data/truth.tif"));
        let wanted: Vec<usize> = (0..mean.len()).filter(|i| !mean[*i].is_nan()).collect();
        let held = wanted.iter().filter(|i| low[**i] <= truth[**i] && truth[**i] <= high[**i]);
        let share = held.count() as f64 / wanted.len() as f64;
        assert!(share > 0.8, "95 % intervals hold {share} of the truth");

        let record: record::Record =
            serde_json::from_slice(&std::fs::read(out.join("run.json")).unwrap()).unwrap();
        assert_eq!(record.survey.used, 138);
        assert_eq!(record.survey.dropped.iter().map(|d| d.row).collect::<Vec<_>>(), [37, 102]);
        assert_eq!(record.summary.pixels, wanted.len());
        let mut listed = record.files();
        listed.sort();
        assert_eq!(listed, expected, "the record names every file");
    }

    #[test]
    fn tiles_and_pictures_change_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let (a, b) = (home.path().join("a"), home.path().join("b"));
        let args = ["--resolution", "8km", "--clip", "data/country.gpkg", "--products", "mean,sd"];
        works(&a, &args);
        let mut tiled = args.to_vec();
        tiled.extend(["--tile", "19", "--no-pictures"]);
        works(&b, &tiled);
        assert_eq!(entries(&b), ["mean.tif", "run.json", "sd.tif"]);
        for name in ["mean.tif", "sd.tif"] {
            let (a, b) = (pixels(&a.join(name)), pixels(&b.join(name)));
            assert_eq!(a.len(), b.len());
            assert!(a.iter().any(|v| v.is_nan()) && a.iter().any(|v| !v.is_nan()));
            // Sums in another order: the last bit of a float may differ.
            let close = |a: f32, b: f32| (a.is_nan() && b.is_nan()) || (a - b).abs() < 1e-6;
            assert!(a.iter().zip(&b).all(|(a, b)| close(*a, *b)), "{name}");
        }
        let data = Dataset::open(a.join("mean.tif")).unwrap();
        assert_eq!(data.geo_transform().unwrap()[1], 8000.0);
        assert!(data.spatial_ref().unwrap().is_projected(), "a plane for longitude and latitude");
    }

    #[test]
    fn an_earlier_run_is_replaced_only_when_asked_and_nothing_else_with_it() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("out");
        let quick = ["--resolution", "20km", "--no-pictures", "--products"];
        let with = |products: &'static str| {
            let mut args = quick.to_vec();
            args.push(products);
            args
        };
        std::fs::create_dir(&out).unwrap();
        works(&out, &with("mean,sd")); // empty is free
        std::fs::write(out.join("notes.txt"), "mine").unwrap();
        let before = std::fs::read(out.join("mean.tif")).unwrap();
        refused(&out, &with("mean"), "not empty");
        assert_eq!(std::fs::read(out.join("mean.tif")).unwrap(), before);
        let mut force = with("mean,quantile:0.9");
        force.push("--force");
        works(&out, &force);
        assert_eq!(entries(&out), ["mean.tif", "notes.txt", "quantile_0.9.tif", "run.json"]);
        assert_eq!(entries(home.path()), ["out"]);
        // What a killed run leaves is in nobody's way.
        let empty = home.path().join("empty");
        std::fs::create_dir_all(empty.join(".isopleth-partial-1")).unwrap();
        works(&empty, &with("mean"));
        std::fs::write(home.path().join("file"), "").unwrap();
        refused(&home.path().join("file"), &with("mean"), "cannot be used");
    }

    #[test]
    fn bad_input_is_one_error_and_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("out");
        let whole = std::fs::read("data/grid.tif").unwrap();
        let cut = home.path().join("cut.tif");
        std::fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
        let far = home.path().join("far.tif");
        foreign(&far, Some("EPSG:4326"), [100.0, 0.1, 0.0, 50.0, 0.0, -0.1], &[1.0; 6], 3);
        let naked = home.path().join("naked.tif");
        foreign(&naked, None, PLACE, &[1.0; 6], 3);
        for (args, what) in [
            (vec!["--threshold", "20"], "above any prevalence"),
            (vec!["--threshold", "-0.1"], "not a prevalence"),
            (vec!["--products", "mean,medan"], "no product named `medan`"),
            (vec!["--products", "quantile:97.5"], "not between 0 and 1"),
            (vec!["--resolution", "5"], "has no unit"),
            (vec!["--resolution", "1m"], "pixels"),
            (vec!["--resolution", "9000km"], "coarser"),
            (vec!["--like", "nowhere.tif"], "could not read"),
            (vec!["--like", cut.to_str().unwrap()], "truncated"),
            (vec!["--like", far.to_str().unwrap()], "do not overlap"),
            (vec!["--like", naked.to_str().unwrap()], "no coordinate reference system"),
            (vec!["--clip", "data/survey.csv"], "area to clip to"),
            (vec!["--lat", "latitud"], "latitud"),
            (vec!["--model", "prevalense.safetensors"], "could not read the model"),
            (vec!["--tile", "0"], "at least one pixel"),
        ] {
            refused(&out, &args, what);
            assert_eq!(entries(home.path()), ["cut.tif", "far.tif", "naked.tif"], "{args:?}");
        }
    }

    /// A disk that is full after some kilobytes: here, a limit on the size of any one file.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_an_error_and_nothing_looks_whole() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("out");
        for blocks in [0, 20, 300] {
            let script = format!(
                "trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" map --surveys data/survey.csv --model gp \
                 --resolution 500m --products mean --out \"$1\""
            );
            let output = Command::new("bash")
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .args(["-c", &script])
                .arg(assert_cmd::cargo::cargo_bin!("isopleth"))
                .arg(&out)
                .output()
                .unwrap();
            let text = words(&output.stderr);
            assert!(!output.status.success(), "{blocks}: {}", words(&output.stdout));
            // Where the system tells us itself, it speaks of this limit and not of the disk.
            let told = text.contains("disk is full") || text.contains("File too large");
            assert!(text.starts_with("error: ") && told, "{blocks}: {text}");
            assert_eq!(entries(home.path()), [""; 0], "{blocks} blocks");
        }
    }
}

/// A raster of population with its words, row-major.
fn population(path: &Path, cells: &Grid, values: &[f32], unit: &str) {
    let band = Band { description: String::new(), unit: unit.into() };
    let mut cog = Cog::create(path, cells, &band, &[]).unwrap();
    cog.write(Window { row: 0, col: 0, rows: cells.rows, cols: cells.cols }, values).unwrap();
    cog.finish().unwrap();
}

/// Nobody is lost and nobody is made: on other pixels of one plane, and between the globe and a plane.
#[test]
fn people_are_shared_out_whole() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pop.tif");
    let target = grid(60_000.0, 40_000.0, 1500.0);
    let plane = Crs::local_equal_area(8.0, 4.8)?;
    // Finer and coarser cells, half a cell off.
    for (resolution, tolerance) in [(700.0, 1e-5), (1500.0, 1e-6), (4100.0, 1e-5)] {
        let cells = grid(60_000.0, 40_000.0, resolution);
        let values: Vec<f32> = (0..cells.len()).map(|i| ((i * 37) % 11) as f32).collect();
        population(&path, &cells, &values, "people");
        let all = People::read(&path, &target, None, &plane)?;
        assert_eq!((all.measure, all.asked), (Measure::Counts, false));
        let (sum, held): (f64, f64) = (
            values.iter().map(|v| f64::from(*v)).sum(),
            all.pixels.iter().map(|v| f64::from(*v)).sum(),
        );
        // Cells reach beyond the target by less than one of them.
        let [cells, pixels] = [cells.extent(), target.extent()];
        if cells.west >= pixels.west && cells.east <= pixels.east && cells.north <= pixels.north {
            assert!((held / sum - 1.0).abs() < tolerance, "{resolution}: {held} of {sum}");
        } else {
            assert!(held <= sum * 1.000_01 && held > 0.8 * sum, "{resolution}: {held} of {sum}");
        }
    }
    // A globe of a thousand in each cell, in the middle of the target, and empty around.
    let globe = Crs::from_user("EPSG:4326")?;
    let step = 0.008;
    let cells = Grid {
        rows: 30,
        cols: 40,
        origin: [7.45, 4.90],
        pixel: [step, -step],
        crs: globe,
        valid: None,
        notes: Vec::new(),
    };
    let inside = |i: usize| (8..22).contains(&(i / 40)) && (8..32).contains(&(i % 40));
    let values: Vec<f32> = (0..1200).map(|i| if inside(i) { 1000.0 } else { 0.0 }).collect();
    population(&path, &cells, &values, "persons per square km");
    let density = People::read(&path, &target, None, &plane)?;
    assert_eq!(density.measure, Measure::Density);
    let window = Window { row: 0, col: 0, rows: 30, cols: 40 };
    let km2: f64 = people::areas(&cells, window, &plane)?
        .iter()
        .enumerate()
        .filter(|(i, _)| inside(*i))
        .map(|(_, area)| area)
        .sum();
    // On a sphere, a cell of 0.008° at 4.8° north.
    let side = 0.008f64.to_radians() * 6371.0;
    assert!((km2 / (336.0 * side * side * 4.8f64.to_radians().cos()) - 1.0).abs() < 0.01, "{km2}");
    let held: f64 = density.pixels.iter().map(|v| f64::from(*v)).sum();
    assert!((held / (1000.0 * km2) - 1.0).abs() < 1e-5, "{held} of {}", 1000.0 * km2);
    // Read as counts, because one says so.
    let counts = People::read(&path, &target, Some(Measure::Counts), &plane)?;
    let held: f64 = counts.pixels.iter().map(|v| f64::from(*v)).sum();
    assert!((held / 336_000.0 - 1.0).abs() < 1e-5, "{held}");
    // Elsewhere, and nowhere.
    let away = Grid { origin: [107.45, 4.9], ..cells };
    population(&path, &away, &values, "people");
    let error = People::read(&path, &target, None, &plane).unwrap_err();
    assert!(error.to_string().contains("lies elsewhere"), "{error}");
    Ok(())
}
