//! Tables in, tables out: the same engine as maps, at places of one's own.

use std::fs;

use isopleth::geo::table::Columns;
use tempfile::TempDir;

use super::{
    assert_error, ok,
    recipes::{TINY, train, write},
    refused,
};

const SURVEY: &str = "\
east,north,tested,positive
0,0,40,2
10,0,35,4
20,5,50,9
0,20,28,11
10,20,44,20
20,25,31,15
30,10,60,18
30,30,25,16
5,12,40,7
15,14,38,10
25,18,52,21
8,28,33,17
";
const TARGETS: &str = "\
village,east,north
Ao,5,5
Bu,15,22

Ce,,
Di,28,28
";

/// A folder with a survey, targets, and a model trained for two steps.
struct Desk {
    folder: TempDir,
    survey: String,
    targets: String,
    model: String,
}

impl Desk {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let recipe = write(&folder, "tiny.toml", TINY);
        let model = folder.path().join("tiny.safetensors");
        train(&recipe, &model, &["--steps", "2"]);
        let survey = write(&folder, "survey.csv", SURVEY);
        let targets = write(&folder, "targets.csv", TARGETS);
        Desk { survey, targets, model: model.to_str().unwrap().into(), folder }
    }

    fn place(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().into()
    }

    /// The command line, `more` last: it may take the place of what came before.
    fn args<'a>(&'a self, targets: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["predict", "--context", &self.survey, "--targets", targets];
        args.extend(["--crs", "local:km", "--out", out]);
        if !more.contains(&"--model") {
            args.extend(["--model", &self.model]);
        }
        args.extend(more);
        args
    }
}

#[test]
fn targets_come_back_with_surface_and_observation() {
    let desk = Desk::new();
    for (model, name) in [(desk.model.as_str(), "tiny.parquet"), ("gp", "gp.csv")] {
        let out = desk.place(name);
        let more = ["--model", model, "--quantiles", "0.05,0.95", "--threshold", "0.2,0.4"];
        let said = ok(&desk.args(&desk.targets, &out, &more));
        for part in ["12 sites used", "3 places", "1 row without a place", "run.json"] {
            assert!(said.contains(part), "no `{part}` in\n{said}");
        }
        let table = Columns::read(&out).unwrap();
        let answers = ["mean", "sd", "quantile_0.05", "quantile_0.95", "exceedance_0.2"];
        let answers = [&answers[..], &["exceedance_0.4"]].concat();
        let mut expected: Vec<String> = ["village", "east", "north"].map(String::from).to_vec();
        for kind in ["surface", "observation"] {
            expected.extend(answers.iter().map(|a| format!("{kind}_{a}")));
        }
        assert_eq!(table.names(), expected);
        assert_eq!(table.text("village").unwrap(), ["Ao", "Bu", "Ce", "Di"]);
        assert_eq!(table.numbers("east").unwrap()[..2], [5.0, 15.0]);
        for kind in ["surface", "observation"] {
            let get = |what: &str| table.numbers(&format!("{kind}_{what}")).unwrap();
            assert!(answers.iter().all(|a| get(a)[2].is_nan()), "no place, no answer");
            for i in [0, 1, 3] {
                assert!((0.0..=1.0).contains(&get("mean")[i]) && get("sd")[i] > 0.0);
                assert!(0.0 < get("quantile_0.05")[i]);
                assert!(get("quantile_0.05")[i] < get("quantile_0.95")[i]);
                assert!(get("exceedance_0.2")[i] >= get("exceedance_0.4")[i]);
            }
        }
    }
    // The fitted Gaussian process sees that the south-west has less.
    let table = Columns::read(desk.place("gp.csv")).unwrap();
    let mean = table.numbers("surface_mean").unwrap();
    assert!(mean[0] < mean[1] && mean[1] < mean[3], "{mean:?}");
}

/// A target's answer is its own: who else is asked does not matter.
#[test]
fn targets_do_not_see_each_other() {
    let desk = Desk::new();
    let (all, alone) = (desk.place("all.parquet"), desk.place("alone.parquet"));
    ok(&desk.args(&desk.targets, &all, &[]));
    let one = write(&desk.folder, "one.csv", "east,north\n28,28\n");
    ok(&desk.args(&one, &alone, &[]));
    let (all, alone) = (Columns::read(all).unwrap(), Columns::read(alone).unwrap());
    for name in alone.names() {
        let (a, b) = (all.numbers(name).unwrap()[3], alone.numbers(name).unwrap()[0]);
        assert!((a - b).abs() < 1e-5, "{name}: {a} {b}");
    }
}

#[test]
fn a_continuous_outcome_comes_back_in_its_units() {
    let desk = Desk::new();
    let mut survey = String::from("east,north,iron\n");
    for i in 0..20 {
        let (x, y) = (i % 5, i / 5);
        survey += &format!("{x},{y},{}\n", 900 + 40 * x + 7 * (i % 3));
    }
    fs::write(&desk.survey, survey).unwrap();
    let targets = write(&desk.folder, "places.csv", "X,Y,crs\n2.5,1.5,plane\n");
    let out = desk.place("iron.csv");
    let said = ok(&desk.args(
        &targets,
        &out,
        &[
            "--model",
            "gp",
            "--value",
            "iron",
            "--threshold",
            "-3",
            "--lon",
            "east",
            "--lat",
            "north",
            "--target-lon",
            "x",
            "--target-lat",
            "y",
        ],
    ));
    assert!(said.contains("units of iron"), "{said}");
    let table = Columns::read(&out).unwrap();
    let mean = table.numbers("surface_mean").unwrap()[0];
    assert!((mean - 1000.0).abs() < 40.0, "{mean}");
    let sd = |kind: &str| table.numbers(&format!("{kind}_sd")).unwrap()[0];
    assert!(sd("observation") >= sd("surface"));
    assert!(table.numbers("surface_exceedance_-3").unwrap()[0] > 0.999);
}

#[test]
fn what_cannot_be_predicted_is_refused_and_nothing_is_lost() {
    let desk = Desk::new();
    let out = desk.place("out.parquet");
    let no_north = write(&desk.folder, "no-north.csv", "east,village\n1,Ao\n");
    let nowhere = write(&desk.folder, "nowhere.csv", "east,north\n,\n");
    let again = write(&desk.folder, "again.csv", "east,north,surface_mean\n1,1,0.2\n");
    let not_a_model = write(&desk.folder, "not.safetensors", "a survey by mistake, and long");
    let wrong = desk.place("out.xlsx");
    type Case<'a> = (&'a str, &'a str, &'a [&'a str], &'a str, &'a str, &'a str);
    let targets = desk.targets.as_str();
    let cases: &[Case] = &[
        (
            &no_north,
            &out,
            &["--lon", "east", "--lat", "north"],
            "no column `north`",
            "no-north",
            "",
        ),
        (&no_north, &out, &[], "no columns are recognised", "no-north", "--lat"),
        (&nowhere, &out, &[], "no row has coordinates", "nowhere", "longitude"),
        (&again, &out, &[], "two columns would be called `surface_mean`", "again", "rename"),
        (targets, &out, &["--model", &not_a_model], "not a model", "not.safetensors", ""),
        (targets, &out, &["--model", "no-such"], "no model named `no-such`", "", ""),
        (targets, &wrong, &[], ".parquet or .csv", "out.xlsx", "--out"),
        (targets, &out, &["--quantiles", "0.5,1.5"], "between 0 and 1", "1.5", "0.975"),
        (targets, &out, &["--threshold", "nan"], "threshold", "NaN", "0.2"),
        (targets, targets, &["--force"], "would replace an input", "targets.csv", "--out"),
        (
            targets,
            &out,
            &["--value", "tested"],
            "different kinds",
            "positive of tested",
            "--positive",
        ),
        (targets, &out, &["--positive", "cases"], "no column `cases`", "survey.csv", ""),
        (&out, &out, &[], "could not read", "", "check the path"),
    ];
    let before = fs::read_dir(desk.folder.path()).unwrap().count();
    for (targets, out, more, what, fact, help) in cases {
        let error = refused(&desk.args(targets, out, more));
        let facts = if fact.is_empty() { vec![] } else { vec![*fact] };
        assert_error(&error, what, &facts, help);
        assert_eq!(fs::read_dir(desk.folder.path()).unwrap().count(), before, "{what}");
    }
    fs::write(&out, "mine").unwrap();
    assert_error(&refused(&desk.args(targets, &out, &[])), "exists", &["out.parquet"], "--force");
    assert_eq!(fs::read(&out).unwrap(), b"mine");
    ok(&desk.args(targets, &out, &["--force"]));
    assert_eq!(Columns::read(&out).unwrap().len(), 4);
}

/// Points that a file holds as geometries need no columns, and come back as numbers.
#[cfg(feature = "gdal")]
#[test]
fn geometries_are_places_too() {
    let desk = Desk::new();
    let survey: String = SURVEY
        .lines()
        .enumerate()
        .map(|(i, line)| {
            let mut cells: Vec<String> = line.split(',').map(String::from).collect();
            if i > 0 {
                let degrees = |cell: &String| (cell.parse::<f64>().unwrap() / 100.0).to_string();
                (cells[0], cells[1]) = (degrees(&cells[0]), degrees(&cells[1]));
            } else {
                (cells[0], cells[1]) = ("lon".into(), "lat".into());
            }
            cells.join(",") + "\n"
        })
        .collect();
    fs::write(&desk.survey, survey).unwrap();
    let targets = write(
        &desk.folder,
        "places.geojson",
        r#"{"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {"name": "Ao"},
        "geometry": {"type": "Point", "coordinates": [0.15, 0.22]}}]}"#,
    );
    let out = desk.place("out.parquet");
    let args = desk.args(&targets, &out, &["--lon", "lon", "--lat", "lat"]);
    let args: Vec<&str> =
        args.into_iter().map(|a| if a == "local:km" { "EPSG:4326" } else { a }).collect();
    ok(&args);
    let table = Columns::read(&out).unwrap();
    assert_eq!(table.names()[..3], ["lon", "lat", "name"]);
    assert_eq!(table.numbers("lat").unwrap(), [0.22]);
}

/// The table of targets is read in chunks, twice: what a column holds is settled by all its rows,
/// and rows keep their order and their answers.
#[test]
fn long_tables_are_streamed() {
    let desk = Desk::new();
    let rows = 40_000;
    let place = |i: usize| ((i % 31) as f64, (i % 29) as f64);
    let (mut text, mut east, mut north) = (String::from("id,east,north,code\n"), vec![], vec![]);
    for i in 0..rows {
        let (x, y) = place(i);
        // The first chunks hold numbers only; one late cell makes the column text.
        let code = if i == rows - 3 { "n°7".to_string() } else { format!("0{}", i % 7) };
        let lost = i % 1000 == 5;
        text += &format!("{i},{},{y},{code}\n", if lost { String::new() } else { x.to_string() });
        east.push(if lost { f64::NAN } else { x });
        north.push(y);
    }
    let (csv, parquet) = (write(&desk.folder, "long.csv", &text), desk.place("long.parquet"));
    Columns::write_parquet(&parquet, &[("east", east), ("north", north)]).unwrap();
    let out = |targets: &str, name: &str| {
        let out = desk.place(name);
        ok(&desk.args(targets, &out, &[]));
        Columns::read(&out).unwrap()
    };
    let (table, twin) = (out(&csv, "a.parquet"), out(&parquet, "b.parquet"));
    assert_eq!((table.len(), twin.len()), (rows, rows));
    assert!(table.numbers("id").unwrap().iter().enumerate().all(|(i, id)| *id == i as f64));
    let code = table.text("code").unwrap();
    assert_eq!([&code[6][..], &code[20_000][..], &code[rows - 3][..]], ["06", "01", "n°7"]);
    let one = write(&desk.folder, "one.csv", "east,north\n7,11\n");
    let alone = out(&one, "one.parquet");
    for name in ["surface_mean", "observation_quantile_0.975"] {
        let (a, b) = (table.numbers(name).unwrap(), twin.numbers(name).unwrap());
        for i in 0..rows {
            assert_eq!(a[i].is_nan(), i % 1000 == 5, "{name} of row {i}");
            assert!(a[i] == b[i] || a[i].is_nan() && b[i].is_nan(), "{name} of row {i}");
            let apart = (a[i] - alone.numbers(name).unwrap()[0]).abs();
            assert!(
                place(i) != (7.0, 11.0) || apart <= 1e-5 || apart.is_nan(),
                "{name} of row {i}: {apart}"
            );
        }
    }
    let record = fs::read_to_string(desk.place("a.parquet.run.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert_eq!(
        (&record["targets"]["rows"], &record["targets"]["placed"]),
        (&40_000.into(), &39_960.into())
    );
    assert_eq!(record["columns"].as_array().unwrap().len(), table.names().len());
    assert_eq!(record["of"]["surface_"], "the surface");
    assert_eq!(record["of"]["observation_"], "a new village");
}

/// What targets carry along is never held whole.
#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_the_table_of_targets() {
    let desk = Desk::new();
    let peak = |rows: usize| {
        let note = "long ".repeat(400);
        let text: String = (0..rows).map(|i| format!("{},{},{note}\n", i % 31, i % 29)).collect();
        let targets = write(&desk.folder, "carried.csv", &format!("east,north,note\n{text}"));
        let out = desk.place("carried.parquet");
        ok(&desk.args(&targets, &out, &["--force"]));
        let record = fs::read_to_string(desk.place("carried.parquet.run.json")).unwrap();
        let record: serde_json::Value = serde_json::from_str(&record).unwrap();
        record["peak_memory_mib"].as_f64().unwrap()
    };
    let (few, many) = (peak(20_000), peak(90_000));
    // 140 MB more in the file. What grows are places, and what the allocator keeps for later.
    assert!(many < few + 60.0, "{few} MiB for 20,000 rows, {many} MiB for 90,000");
}

/// "cuda" where there is no card is the processor, which is said at once, in the output and on the
/// record; a card by number is an error. The answers are those of the processor.
#[test]
fn without_a_card_the_processor_answers_and_says_so() {
    if isopleth::device::find("cuda").is_ok_and(|found| found.without.is_none()) {
        return; // there is a card
    }
    let desk = Desk::new();
    let predict = |device: &str, out: &str| {
        let out = desk.place(out);
        let args = ["predict", "--context", &desk.survey, "--targets", &desk.targets];
        let more = ["--model", &desk.model, "--crs", "local:km", "--device", device, "--out", &out];
        (super::command(&[&args[..], &more[..]].concat()).output().unwrap(), out)
    };
    let (output, out) = predict("cuda", "card.csv");
    let error = super::text(&output.stderr);
    assert!(output.status.success(), "{error}");
    assert_eq!(error.matches("the processor computes instead").count(), 1, "{error}");
    assert!(super::text(&output.stdout).contains("used cpu"), "{output:?}");
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(format!("{out}.run.json")).unwrap()).unwrap();
    assert_eq!(record["device"]["asked"], "cuda");
    assert!(record["device"]["fallback"].is_string(), "{record:#}");
    let (plain, same) = predict("cpu", "plain.csv");
    assert!(plain.status.success() && plain.stderr.is_empty(), "{plain:?}");
    assert_eq!(fs::read(&out).unwrap(), fs::read(&same).unwrap());
    for device in ["cuda:0", "cuda:all", "cuda:x", "gpu"] {
        let (output, out) = predict(device, "none.csv");
        assert_eq!(output.status.code(), Some(2), "{device}");
        assert!(super::text(&output.stderr).contains("help: "), "{device}");
        assert!(!std::path::Path::new(&out).exists());
    }
}

/// Survey with cases that grow to the north-east among a thousand and more.
const CASES: &str = "\
east,north,cases,people
0,0,2,1000
10,0,4,1500
20,5,9,1100
0,20,11,1400
10,20,20,1300
20,25,35,1500
30,10,18,1000
30,30,46,1200
5,12,7,1250
15,14,12,1100
25,18,21,1050
8,28,17,1000
";

/// Surface, new village, and a new survey of so many: three laws, each wider than the one before.
#[test]
fn counts_of_a_new_survey_are_foretold() {
    let desk = Desk::new();
    let rates = write(&desk.folder, "rates.csv", CASES);
    let surveys = [
        (desk.survey.clone(), vec!["--new-survey", "50", "--model", "gp"], 50.0),
        (desk.survey.clone(), vec!["--new-survey", "50"], 50.0),
        // No model is shipped for rates: a Gaussian process is fitted.
        (rates, vec!["--cases", "cases", "--population", "people", "--new-survey", "2000"], 2000.0),
    ];
    for (i, (survey, more, n)) in surveys.iter().enumerate() {
        let out = desk.place(&format!("new{i}.csv"));
        let mut args = vec!["predict", "--context", survey, "--targets", &desk.targets];
        args.extend(["--crs", "local:km", "--out", &out, "--quantiles", "0.025,0.975"]);
        args.extend(more);
        if i == 1 {
            args.extend(["--model", &desk.model]);
        }
        let said = ok(&args);
        assert!(i != 2 || said.contains("cases per person"), "{said}");
        let table = Columns::read(&out).unwrap();
        let get = |what: &str| table.numbers(what).unwrap();
        for row in [0, 1, 3] {
            let [mean, low, high] =
                ["count_mean", "count_quantile_0.025", "count_quantile_0.975"].map(|c| get(c)[row]);
            assert!((mean / (n * get("observation_mean")[row]) - 1.0).abs() < 1e-6, "{mean}");
            assert!(low.fract() == 0.0 && high.fract() == 0.0 && low < mean && mean < high);
            // Wider than the village by what is counted there.
            let (own, village) = (get("count_sd")[row], n * get("observation_sd")[row]);
            assert!(own > village, "{own} and {village}");
            assert!(get("observation_sd")[row] >= get("surface_sd")[row]);
        }
        assert!(get("count_mean")[2].is_nan());
        if i == 2 {
            let rate = get("surface_mean");
            assert!(rate[0] < rate[3] && (0.001..0.01).contains(&rate[0]), "{rate:?}");
        }
    }
    let out = desk.place("not.csv");
    let error = refused(&desk.args(&desk.targets, &out, &["--new-survey", "2.5"]));
    assert_error(&error, "whole number of people", &["2.5"], "give 1 to");
}

/// A model that reads one kind of outcome says which flags would suit it.
#[test]
fn outcomes_and_models_must_agree() {
    let desk = Desk::new();
    let rates = write(&desk.folder, "rates.csv", CASES);
    let out = desk.place("not.csv");
    let mut args = vec!["predict", "--context", &rates, "--targets", &desk.targets, "--out", &out];
    args.extend(["--crs", "local:km", "--cases", "cases", "--population", "people"]);
    args.extend(["--model", &desk.model]);
    let error = refused(&args);
    assert_error(&error, "different kinds", &["positive of tested", "--cases"], "--positive");
}
