//! Surveys of several years: maps of every year, predictions at a time, forecasts held against what came.

use std::fs;

use isopleth::{
    Link, Stream,
    geo::{
        geotiff::Raster,
        grid::Window,
        table::{Column, Columns},
    },
};
use serde_json::Value;
use tempfile::TempDir;

use super::{assert_error, command, ok, refused, text};

/// Villages of a country where prevalence rises from the west eastwards, and everywhere from year to year;
/// every round visits others.
fn survey(when: impl Fn(usize) -> String) -> String {
    let mut rng = Stream::new(3, "rounds", 0);
    let mut rows = String::from("x,y,tested,positive,year\n");
    for i in 0..60 {
        let (x, y) = (rng.uniform(0.0, 100.0), rng.uniform(0.0, 80.0));
        let level =
            Link::Logit.outcome(-2.5 + 0.02 * x + 0.8 * (i % 3) as f64 + 0.2 * rng.normal());
        let positive = rng.binomial(60, level);
        rows += &format!("{x:.2},{y:.2},60,{positive},{}\n", when(i % 3));
    }
    rows
}

struct Desk {
    folder: TempDir,
    survey: String,
}

impl Desk {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("survey.csv");
        fs::write(&file, survey(|round| (2014 + round).to_string())).unwrap();
        Desk { survey: file.to_str().unwrap().into(), folder }
    }

    fn place(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().into()
    }

    fn map<'a>(&'a self, survey: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let args = ["map", "--surveys", survey, "--crs", "local:km", "--resolution", "10km"];
        let to = ["--products", "mean,sd", "--out", out];
        // The Gaussian process is what surveys with times are mapped by unless something else is said.
        [&args[..], &to, more].concat()
    }
}

/// Every band of a raster with its description.
fn bands(file: &str) -> Vec<(String, Vec<f64>)> {
    let raster = Raster::open(file.as_ref()).unwrap();
    let (rows, cols) = (raster.header.rows, raster.header.cols);
    let whole = Window { row: 0, col: 0, rows, cols };
    let band = |i: usize| (raster.words_of(i)[1].clone(), raster.read(i, whole).unwrap().0);
    (1..=raster.bands()).map(band).collect()
}

fn average(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn every_year_is_a_band() {
    let desk = Desk::new();
    let (out, one) = (desk.place("out"), desk.place("one"));
    let asked = ["--time", "year", "--at", "2014..2016,2017-06", "--report"];
    let said = ok(&desk.map(&desk.survey, &out, &asked));
    for part in ["3 times", "2014, 2015, 2016, 2017-06", "2017-06 lies after every visit", "stays"]
    {
        assert!(said.contains(part), "no `{part}` in\n{said}");
    }
    let mean = bands(&format!("{out}/mean.tif"));
    let named: Vec<&str> = mean.iter().map(|(name, _)| &name[..]).collect();
    let of = |time: &str| format!("Mean prevalence, surface, {time}");
    assert_eq!(named, ["2014", "2015", "2016", "2017-06"].map(of));
    let levels: Vec<f64> = mean.iter().map(|(_, values)| average(values)).collect();
    assert!(levels[0] + 0.05 < levels[1] && levels[1] + 0.05 < levels[2], "it rises: {levels:?}");
    let sd = bands(&format!("{out}/sd.tif"));
    assert!(average(&sd[3].1) > average(&sd[2].1), "a year that nobody saw is less sure");
    // A year alone is the same map, whatever is mapped beside it and in whatever tiles.
    ok(&desk.map(&desk.survey, &one, &["--time", "year", "--at", "2015", "--tile", "3"]));
    let alone = bands(&format!("{one}/mean.tif"));
    assert_eq!(alone[0].0, mean[1].0);
    let apart = alone[0].1.iter().zip(&mean[1].1).map(|(a, b)| (a - b).abs());
    assert!(apart.fold(0.0, f64::max) < 1e-6, "what is mapped beside a year moves it");
    // The record, the page and the pictures say which times.
    let record: Value =
        serde_json::from_str(&fs::read_to_string(format!("{out}/run.json")).unwrap()).unwrap();
    let times = record["times"].as_array().unwrap();
    assert_eq!((times[1]["time"].as_str(), times[1]["sites"].as_u64()), (Some("2015"), Some(20)));
    assert_eq!(times[3]["day"].as_str(), Some("2017-06-16"));
    assert!((times[2]["average"].as_f64().unwrap() - levels[2]).abs() < 1e-5);
    assert!(record["frame"]["clock"]["days_per_unit"].as_f64().unwrap() > 360.0);
    assert!(record["model"]["time"]["days"].as_f64().unwrap() > 0.0);
    let page = fs::read_to_string(format!("{out}/report.html")).unwrap();
    assert!(
        page.contains("Maps are of 2014, 2015, 2016, 2017-06") && page.contains("<td>2017-06-16")
    );
    assert!(fs::metadata(format!("{out}/mean.png")).unwrap().len() > 5_000);
}

/// Dates in a column of text, and what is missing; the nearest-neighbour process
/// and the shipped network agree with the exact one.
#[test]
fn dates_are_read_and_rows_without_one_are_dropped() {
    let desk = Desk::new();
    let (dated, out) = (desk.place("dated.csv"), desk.place("out"));
    let mut rows = survey(|round| format!("{}-07-02", 2014 + round));
    rows += "50,40,60,9,\n51,41,60,9,NA\n";
    fs::write(&dated, rows).unwrap();
    let asked = ["--time", "year", "--at", "2014,2016", "--no-pictures"];
    let said = ok(&desk.map(&dated, &out, &asked));
    assert!(said.contains("2 rows, no year: rows 61, 62"), "{said}");
    let years = desk.place("years");
    ok(&desk.map(&desk.survey, &years, &asked));
    let [a, b] = [&out, &years].map(|out| bands(&format!("{out}/mean.tif")));
    for (a, b) in a.iter().zip(&b) {
        let apart = a.1.iter().zip(&b.1).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(apart < 5e-3, "a year and its middle day: {apart}");
    }
    let near = desk.place("near");
    ok(&[&desk.map(&desk.survey, &near, &asked)[..], &["--model", "vecchia"]].concat());
    for (a, b) in bands(&format!("{near}/mean.tif")).iter().zip(&b) {
        assert!((average(&a.1) - average(&b.1)).abs() < 0.03, "exact and nearest neighbours");
    }
    // And the network that reads time, within what 60 villages leave open.
    let network = desk.place("network");
    ok(&[&desk.map(&desk.survey, &network, &asked)[..], &["--model", "prevalence-st"]].concat());
    for (year, (a, b)) in bands(&format!("{network}/mean.tif")).iter().zip(&b).enumerate() {
        let apart =
            a.1.iter().zip(&b.1).map(|(a, b)| (a - b).abs()).sum::<f64>() / b.1.len() as f64;
        assert!(apart < 0.05, "{year}: the network and the exact process are {apart} apart");
    }
}

/// Draws are surfaces through all times: their means and spreads are the maps', and the change from year to
/// year is as sure as the two years together make it, which is surer than two years apart would.
#[test]
fn draws_and_districts_at_several_times() {
    const DRAWS: usize = 400;
    let desk = Desk::new();
    let (file, out) = (desk.place("degrees.csv"), desk.place("out"));
    // On the globe, since outlines are of degrees: 100 km are about one.
    let degrees = |row: &str| -> String {
        let mut cells: Vec<String> = row.split(',').map(String::from).collect();
        cells[..2].iter_mut().for_each(|c| *c = (c.parse::<f64>().unwrap() / 100.0).to_string());
        cells.join(",") + "\n"
    };
    let rows: String =
        survey(|round| (2014 + round).to_string()).lines().skip(1).map(degrees).collect();
    fs::write(&file, format!("lon,lat,tested,positive,year\n{rows}")).unwrap();
    let asked =
        ["map", "--surveys", &file, "--resolution", "10km", "--products", "mean,sd", "--out", &out];
    let more = ["--time", "year", "--at", "2014..2016", "--draws", "400", "--no-pictures"];
    ok(&[&asked[..], &more].concat());
    let [means, sds] = ["mean", "sd"].map(|name| bands(&format!("{out}/{name}.tif")));
    for (band, year) in (2014..=2016).enumerate() {
        let draws = bands(&format!("{out}/draws_{year}.tif"));
        assert_eq!(draws.len(), DRAWS);
        assert!(draws[4].0.starts_with(&format!("Draw 5 of prevalence in {year}")));
        for pixel in 0..means[band].1.len() {
            let at = || draws.iter().map(|d| d.1[pixel]);
            let mean = at().sum::<f64>() / DRAWS as f64;
            let sd = (at().map(|v| (v - mean).powi(2)).sum::<f64>() / DRAWS as f64).sqrt();
            let (own, spread) = (means[band].1[pixel], sds[band].1[pixel]);
            assert!((mean - own).abs() < 5.0 * spread / (DRAWS as f64).sqrt(), "{mean}, not {own}");
            assert!((0.8..1.25).contains(&(sd / spread)), "{sd}, not {spread}");
        }
    }

    let half = |west: usize| {
        format!(
            r#"{{"type":"Feature","properties":{{"name":"{west}"}},"geometry":{{"type":"Polygon","coordinates":
            [[[0.{west},0.05],[0.{e},0.05],[0.{e},0.75],[0.{west},0.75],[0.{west},0.05]]]}}}}"#,
            e = west + 40
        )
    };
    let (districts, table) = (desk.place("halves.geojson"), desk.place("halves.csv"));
    let all = format!(r#"{{"type":"FeatureCollection","features":[{},{}]}}"#, half(10), half(50));
    fs::write(&districts, all).unwrap();
    let said = ok(&["areas", "--map", &out, "--areas", &districts, "--out", &table]);
    assert!(said.contains("times  ") && said.contains("2014, 2015, 2016"), "{said}");
    let table = Columns::read(std::path::Path::new(&table)).unwrap();
    let numbers = |name: &str| table.numbers(name).unwrap().to_vec();
    let years = table.column("time").unwrap();
    let Column::Numbers(years) = years else { panic!("years are {years:?}") };
    assert_eq!(*years, [2014.0, 2014.0, 2015.0, 2015.0, 2016.0, 2016.0]);
    let [mean, sd, change] = ["mean", "sd", "change"].map(numbers);
    let [low, high, grows] = ["change_lower_95", "change_upper_95", "p_increase"].map(numbers);
    // Twenty villages a year, each in one half or the other.
    assert_eq!(numbers("sites").iter().sum::<f64>(), {
        let columns = Columns::read(std::path::Path::new(&file)).unwrap();
        let x = columns.numbers("lon").unwrap();
        let y = columns.numbers("lat").unwrap();
        let inside = |(x, y): &(&f64, &f64)| (0.05..0.75).contains(*y) && (0.1..0.9).contains(*x);
        x.iter().zip(y).filter(inside).count() as f64
    });
    let mut narrower = 0.0;
    for i in 0..6 {
        if i < 2 {
            assert!(change[i].is_nan() && grows[i].is_nan(), "nothing came before");
            continue;
        }
        assert!((change[i] - (mean[i] - mean[i - 2])).abs() < 1e-9);
        assert!(change[i] > 0.05 && grows[i] > 0.95, "prevalence rises by 0.8 on the link scale");
        let apart = 2.0 * 1.96 * sd[i].hypot(sd[i - 2]);
        narrower += (high[i] - low[i]) / apart / 4.0;
    }
    // 0.89; by chance within 0.025 of it. Two surfaces, one for each year, would make it 1.
    assert!(narrower < 0.95, "one surface through both years: {narrower}");
}

/// Villages displaced by up to 40 km, visited in three years: another map than of places that are known, and
/// much the same by both processes.
#[test]
fn displaced_villages_are_mapped_year_by_year() {
    let desk = Desk::new();
    let asked = ["--time", "year", "--at", "2014,2016", "--no-pictures"];
    let map = |name: &str, more: &[&str]| {
        let out = desk.place(name);
        let said = ok(&[&desk.map(&desk.survey, &out, &asked)[..], more].concat());
        assert_eq!(said.contains("integrated over"), !more.is_empty(), "{said}");
        bands(&format!("{out}/mean.tif"))
    };
    let known = map("known", &[]);
    let moved = map("moved", &["--displacement", "40"]);
    let near = map("near", &["--displacement", "40", "--model", "vecchia"]);
    let apart = |a: &[f64], b: &[f64]| {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64
    };
    for year in 0..2 {
        let [other, same] = [&known, &near].map(|of| apart(&moved[year].1, &of[year].1));
        assert!(other > 1e-3, "{other} from known places");
        assert!(same < 0.01, "{same} between processes");
    }
    assert!(average(&moved[1].1) > average(&moved[0].1) + 0.1, "prevalence rises");
}

#[test]
fn times_that_make_no_map_are_refused() {
    let desk = Desk::new();
    let out = desk.place("out");
    let with = |more: &[&str]| refused(&desk.map(&desk.survey, &out, more));
    let none = with(&["--time", "year"]);
    assert_error(
        &none,
        "none is asked for",
        &["3 times, 2014-07-02 to 2016-07-02"],
        "--at 2014..2016",
    );
    assert_error(&with(&["--time", "yaer", "--at", "2015"]), "no column", &["year"], "year");
    let wrong = with(&["--time", "tested", "--at", "2015"]);
    assert_error(&wrong, "column `tested` cannot be read", &["row  ", "60"], "years (2015)");
    let backwards = with(&["--time", "year", "--at", "2016..2014"]);
    assert_error(&backwards, "backwards", &["2016..2014"], "2014..2016");
    assert!(
        text(&command(&desk.map(&desk.survey, &out, &["--at", "2015"])).output().unwrap().stderr)
            .contains("--time")
    );
    // A shipped model that knows no time.
    let args = ["map", "--surveys", &desk.survey, "--crs", "local:km", "--resolution", "10km"];
    let more = ["--time", "year", "--at", "2015", "--model", "prevalence", "--out", &out];
    let error = refused(&[&args[..], &more].concat());
    assert_error(&error, "trained without time", &["year", "prevalence"], "--model gp");
    assert!(!std::path::Path::new(&out).exists(), "nothing is left");
}

/// A model that reads time, trained for two steps: it wants times, maps them, and is looked at like any.
#[test]
fn a_model_of_times_is_trained_and_mapped() {
    let desk = Desk::new();
    let recipe = desk.place("st.toml");
    fs::write(
        &recipe,
        "name = \"st\"\npredicts = \"logit prevalence\"\n[model]\nkind = \"tnp-kr\"\nwidth = 8\nblocks = 1\n\
         heads = 2\nkey_width = 4\nvalue_width = 4\nembed = [8]\nfeed_forward = 8\nhead_widths = [8]\n\
         bias = [\"rbf\", \"sink\"]\ntime_bias = [\"exponential\", \"scalar\"]\n[prior]\nkind = \"gp\"\n\
         time_scale = { log-uniform = [0.2, 3.0] }\nstatic_share = { uniform = [0.0, 1.0] }\n[design]\n\
         context = [{ sites = [3, 30], weight = 1.0 }]\ntargets = 8\ntimes = {}\n[task]\n\
         likelihood = \"binomial\"\n[train]\nsteps = 2\nrows = 2\nwarmup = 1\nvalidate_tasks = 4\n\
         validate_every = 2\ncheckpoint_every = 2\n",
    )
    .unwrap();
    let (model, sheet) = (desk.place("st.safetensors"), desk.place("st.png"));
    ok(&["sample", &recipe, "--out", &sheet, "--count", "2", "--sites", "20"]);
    let table = desk.place("draws.csv");
    ok(&["sample", &recipe, "--out", &table, "--count", "2"]);
    assert!(Columns::read(&table).unwrap().names().contains(&"t".to_string()));
    ok(&["train", &recipe, "--out", &model]);
    let args = ["map", "--surveys", &desk.survey, "--crs", "local:km", "--resolution", "10km"];
    let out = desk.place("out");
    let to = ["--model", &model, "--no-pictures", "--out", &out];
    let without = refused(&[&args[..], &to].concat());
    let columns = "columns: x, y, tested, positive, year";
    assert_error(
        &without,
        "expects time at every site",
        &["st.safetensors", columns],
        "--time <COLUMN>",
    );
    let said = ok(&[&args[..], &to, &["--time", "year", "--at", "2014,2016"]].concat());
    assert!(said.contains("2 times") || said.contains("2014, 2016"), "{said}");
    assert_eq!(bands(&format!("{out}/mean.tif")).len(), 2);
    // Villages that stand elsewhere than they were recorded are placed in each of their years.
    let (moved, more) =
        (desk.place("moved"), ["--time", "year", "--at", "2014", "--displacement", "9"]);
    let to = ["--model", &model, "--no-pictures", "--products", "mean", "--out", &moved];
    ok(&[&args[..], &to, &more].concat());
    let apart =
        bands(&format!("{moved}/mean.tif"))[0].1[0] - bands(&format!("{out}/mean.tif"))[0].1[0];
    assert!(apart.abs() > 1e-6, "places were drawn");
    let mismatched = fs::read_to_string(&recipe).unwrap().replace("times = {}\n", "");
    let bad = desk.place("bad.toml");
    fs::write(&bad, mismatched).unwrap();
    let error = refused(&["train", &bad, "--out", &desk.place("bad.safetensors")]);
    assert_error(&error, "the model reads times, and the design has none", &[], "times = {}");
}

/// Both tables have a time: the same place in two years has two answers, and none without a time.
#[test]
fn predictions_are_of_a_place_and_a_time() {
    let desk = Desk::new();
    let (targets, out) = (desk.place("targets.csv"), desk.place("p.csv"));
    fs::write(&targets, "x,y,when\n50,40,2014\n50,40,2016\n50,40,\n50,40,2019-03\n").unwrap();
    let args = ["predict", "--context", &desk.survey, "--targets", &targets, "--crs", "local:km"];
    let more = ["--model", "gp", "--time", "year", "--target-time", "when", "--out", &out];
    let said = ok(&[&args[..], &more].concat());
    for part in ["1 row without a place or time", "1 target is of times outside the survey's"] {
        assert!(said.contains(part), "no `{part}` in\n{said}");
    }
    let table = Columns::read(&out).unwrap();
    let (mean, sd) = (table.numbers("surface_mean").unwrap(), table.numbers("surface_sd").unwrap());
    assert!(mean[0] + 0.1 < mean[1] && mean[2].is_nan() && sd[3] > sd[1], "{mean:?} {sd:?}");
    let error = refused(&[&args[..], &more[..4], &more[6..], &["--force"]].concat());
    assert_error(&error, "no column `year`", &["targets.csv", "when"], "");
}

/// The last periods are foretold from those before, and a rising trend is not seen without time.
#[test]
fn the_last_periods_are_foretold_from_those_before() {
    let desk = Desk::new();
    let args =
        ["validate", "--surveys", &desk.survey, "--crs", "local:km", "--model", "gp", "--json"];
    let held = |more: &[&str]| -> Value {
        serde_json::from_str(&ok(&[&args[..], more].concat())).unwrap()
    };
    let found = held(&["--time", "year", "--folds", "times:2"]);
    let folds = found["folds"].as_array().unwrap();
    let said: Vec<_> =
        folds.iter().map(|f| (f["fold"].as_str().unwrap(), f["n"].as_u64())).collect();
    assert_eq!(said, [("2015", Some(20)), ("2016", Some(20))]);
    let score = |v: &Value| v["log_score"].as_f64().unwrap();
    let inside = held(&["--time", "year", "--folds", "5"]);
    let pooled = held(&["--folds", "5"]);
    assert!(score(&inside) > score(&pooled), "time is worth something: {inside} {pooled}");
    let error = refused(&[&args[..], &["--folds", "times:2"]].concat());
    assert_error(&error, "no times", &["times:2"], "--time");
}
