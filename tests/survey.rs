//! Survey tables: every format is read twice, once by us and once by what wrote it, and every
//! kind of bad input is refused or dropped in words that say what, where, and what to try.

use std::path::{Path, PathBuf};

use isopleth::{
    Error,
    geo::{
        crs::Crs,
        table::{Column, Columns, Outcome, Survey, SurveyOptions},
    },
};
use tempfile::TempDir;

/// A folder with one file in it.
fn file(name: &str, contents: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join(name);
    std::fs::write(&path, contents).expect("a small file");
    (folder, path)
}

fn read_as(contents: &str, options: &SurveyOptions) -> isopleth::Result<Survey> {
    let (_folder, path) = file("survey.csv", contents);
    Survey::read(&path, options)
}

fn read(contents: &str) -> isopleth::Result<Survey> {
    read_as(contents, &SurveyOptions::default())
}

/// Everything a user sees of an error, on one line.
fn shown(error: &Error) -> String {
    let facts: Vec<String> = error.facts().iter().map(|(n, v)| format!("{n}: {v}")).collect();
    format!("{error} | {} | help: {}", facts.join(" | "), error.help().unwrap_or_default())
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: isopleth::Result<T>, phrases: &[&str]) {
    let text = shown(&result.expect_err("this should be refused"));
    for phrase in phrases {
        assert!(text.contains(phrase), "`{phrase}` is not in: {text}");
    }
    assert!(!text.ends_with("help: "), "no help: {text}");
}

fn option(text: &str) -> Option<String> {
    Some(text.to_string())
}

const GOOD: &str = "lon,lat,tested,positive\n8.0,5.0,100,10\n8.5,5.5,50,0\n9.0,6.0,20,20\n";

/// `GOOD` with another third row.
fn with(row: &str) -> String {
    format!("{GOOD}{row}\n9.5,6.5,10,1\n")
}

fn counts(survey: &Survey) -> (&[f64], &[f64]) {
    match &survey.outcome {
        Outcome::Counts { positive, tested } => (positive, tested),
        _ => panic!("counts expected"),
    }
}

// What is read

#[test]
fn a_plain_table_is_read_and_every_guess_is_told() {
    let survey = read(GOOD).unwrap();
    assert_eq!(survey.x, [8.0, 8.5, 9.0]);
    assert_eq!(survey.y, [5.0, 5.5, 6.0]);
    assert_eq!(counts(&survey), (&[10.0, 0.0, 20.0][..], &[100.0, 50.0, 20.0][..]));
    assert_eq!(survey.rows, [1, 2, 3]);
    assert!(survey.dropped.is_empty());
    assert_eq!(survey.crs.name(), "EPSG:4326");
    let notes = survey.notes.join("\n");
    for said in ["`lon` and `lat`", "`positive`", "`tested`", "EPSG:4326"] {
        assert!(notes.contains(said), "{said}: {notes}");
    }
    let quiet = SurveyOptions {
        lon: option("lon"),
        lat: option("LAT"), // Without regard to case.
        positive: option("positive"),
        tested: option("tested"),
        crs: option("EPSG:4326"),
        ..Default::default()
    };
    assert_eq!(read_as(GOOD, &quiet).unwrap().notes, Vec::<String>::new());
}

#[test]
fn common_spellings_are_recognised() {
    for header in [
        "Longitude,Latitude,Examined,Positive",
        "LONG,LAT,n,pos",
        "lng,lat,N_tested,n_positive",
        "\"longitude (°)\",LATNUM,number_tested,Number.Positive",
        "decimalLongitude,decimalLatitude,trials,cases",
        "lon,lat,Total,infected",
    ] {
        let header = header.replace("longitude (°)", "GPS longitude");
        let text = GOOD.replace("lon,lat,tested,positive", &header);
        assert_eq!(read(&text).map_err(|e| shown(&e)).unwrap().len(), 3, "{header}");
    }
    let plane = SurveyOptions { crs: option("local:m"), ..Default::default() };
    for header in ["x,y", "Easting,Northing", "utm_x,utm_y", "X_COORD,Y_COORD"] {
        let text =
            format!("{header},n,pos\n350000,1450000,9,1\n360000,1450000,9,1\n360000,1460000,9,1\n");
        assert_eq!(read_as(&text, &plane).map_err(|e| shown(&e)).unwrap().len(), 3, "{header}");
    }
    // Degrees win over a plane when a table has both.
    let both = "x,y,lon,lat,n,pos\n1,2,8,5,9,1\n2,2,9,5,9,1\n3,2,9,6,9,1\n";
    assert_eq!(read(both).unwrap().x, [8.0, 9.0, 9.0]);
}

#[test]
fn separators_marks_and_quotes_are_no_obstacle() {
    for separator in [";", "\t", "|"] {
        let survey = read(&GOOD.replace(',', separator)).unwrap();
        assert_eq!(survey.x, [8.0, 8.5, 9.0], "{separator:?}");
    }
    assert_eq!(read(&format!("\u{feff}{GOOD}")).unwrap().len(), 3);
    assert_eq!(read(&GOOD.replace('\n', "\r\n")).unwrap().len(), 3);
    let quoted =
        "\"lon\", \"lat\" ,n,pos,village\n8,5,9,1,\"A, B\"\n 9 ,5,9,1,\"two\nlines\"\n9,6,9,1,C\n";
    assert_eq!(read(quoted).unwrap().x, [8.0, 9.0, 9.0]);
    // Latin-1 in a column nobody asks for.
    let (_folder, path) =
        file("s.csv", b"lon,lat,n,pos,v\n8,5,9,1,Gu\xe9c\n9,5,9,1,b\n9,6,9,1,c\n");
    let survey = Survey::read(path, &SurveyOptions::default()).unwrap();
    assert!(survey.notes.iter().any(|n| n.contains("UTF-8")));
}

#[test]
fn a_continuous_outcome_is_read_when_named() {
    let options =
        SurveyOptions { value: option("zinc"), crs: option("local:m"), ..Default::default() };
    let survey = read_as("x,y,zinc\n0,0,1.5\n1,0,-2\n0,1,\n1,1,4\n", &options).unwrap();
    assert_eq!(survey.outcome, Outcome::Values(vec![1.5, -2.0, 4.0]));
    assert_eq!(survey.rows, [1, 2, 4]);
    assert_eq!((survey.dropped[0].row, survey.dropped[0].reason.as_str()), (3, "no zinc"));
}

#[test]
fn a_subset_keeps_sites_together() {
    let survey = read(GOOD).unwrap();
    let part = survey.subset(&[2, 0]);
    assert_eq!((part.x, part.rows), (vec![9.0, 8.0], vec![3, 1]));
    assert_eq!(
        part.outcome,
        Outcome::Counts { positive: vec![20.0, 10.0], tested: vec![20.0, 100.0] }
    );
}

// What is dropped

#[test]
fn what_is_missing_is_dropped_counted_and_named() {
    for (row, reason) in [
        (",6.2,30,3", "no lon"),
        ("9.2,NA,30,3", "no lat"),
        ("NaN,nan,30,3", "no coordinates"),
        ("9.2,6.2,30,", "no positive"),
        ("9.2,6.2,null,3", "no tested"),
        ("9.2,6.2,,", "no positive and no tested"),
        ("9.2,6.2,0,0", "nobody tested (tested is 0)"),
        ("0,0,30,3", "at 0, 0"),
        ("8.5,5.5,50,0", "repeats row 2"),
    ] {
        let survey = read(&with(row)).map_err(|e| shown(&e)).unwrap();
        assert_eq!(survey.rows, [1, 2, 3, 5], "{row}");
        assert_eq!(survey.dropped.len(), 1, "{row}");
        assert_eq!(survey.dropped[0].row, 4, "{row}");
        assert!(survey.dropped[0].reason.contains(reason), "{row}: {}", survey.dropped[0].reason);
    }
}

#[test]
fn surveys_that_share_a_place_are_kept_and_noted() {
    let survey = read(&with("8.5,5.5,40,2")).unwrap();
    assert_eq!(survey.len(), 5);
    assert!(
        survey.notes.iter().any(|n| n.starts_with("2 rows share 1 place")),
        "{:?}",
        survey.notes
    );
    // Another year with the same outcome is another survey, not a repeat.
    let years = "lon,lat,n,pos,year\n8,5,9,0,2001\n8,5,9,0,2002\n9,6,9,1,2001\n8,5,9,0,2001\n";
    let survey = read(years).unwrap();
    assert_eq!(survey.rows, [1, 2, 3]);
    assert_eq!(survey.dropped[0].row, 4);
    // People, one per row, are alike without being repeats.
    let people = "lon,lat,n,pos\n8,5,1,0\n8,5,1,0\n9,6,1,1\n9,6,1,1\n";
    assert_eq!(read(people).unwrap().len(), 4);
    // So may households; villages are not.
    let households = "lon,lat,n,pos\n8,5,4,0\n8,5,4,0\n9,6,30,1\n9,6,3,1\n9,6,3,1\n";
    assert_eq!(read(households).unwrap().len(), 5);
    let villages = "lon,lat,n,pos\n8,5,40,0\n8,5,40,0\n9,6,30,1\n9,6,3,1\n9,7,3,1\n";
    assert_eq!(read(villages).unwrap().len(), 4);
}

// What is refused

#[test]
fn wrong_numbers_stop_the_run() {
    for (row, phrases) in [
        (
            "9.2,6.2,30,31",
            &["more people are positive", "row: 4 (line 5", "positive: 31", "tested: 30"][..],
        ),
        ("9.2,6.2,0,1", &["more people are positive", "row: 4"]),
        ("9.2,6.2,30,-1", &["negative", "row: 4", "column: positive", "value: -1"]),
        ("9.2,6.2,-9999,", &["negative", "column: tested", "value: -9999"]),
        ("9.2,6.2,30,2.5", &["not a whole number", "column: positive", "value: 2.5", "--value"]),
        ("9.2,6.2,30,many", &["should hold numbers", "`positive`", "row: 4", "`many`"]),
        ("9.2,6.2,30,10%", &["`10%`", "percent"]),
        ("inf,6.2,30,3", &["infinite", "row: 4", "column: lon"]),
        ("9.2,6.2,30,inf", &["infinite", "column: positive"]),
        ("9.2,6.2,1e400,3", &["infinite", "column: tested"]),
        ("-9999,6.2,30,3", &["code for a missing one", "row: 4", "column: lon", "empty"]),
        (
            "9.2,96.2,30,3",
            &["latitude is out of range", "row: 4", "column: lat", "96.2", "swapped in this row"],
        ),
        ("109.2,96.2,30,3", &["latitude is out of range", "-90 to 90"]),
        ("-189.2,6.2,30,3", &["longitude is out of range", "column: lon"]),
        ("9.2,6.2,30", &["not as many cells", "row: 4 (line 5", "cells: 3"]),
        ("9,2,6.2,30,3", &["not as many cells", "decimal point"]),
        ("\"9,2\",6.2,30,3", &["should hold numbers", "decimal comma", "9.2"]),
        ("8°30'E,6.2,30,3", &["decimal numbers"]),
    ] {
        refused(read(&with(row)), phrases);
    }
    refused(
        read("lon;lat;n;pos\n8,5;5,5;9;1\n8,6;5,5;9;1\n8,7;5,5;9;1\n"),
        &["`lon`", "`8,5`", "decimal comma", "8.5"],
    );
}

#[test]
fn swapped_coordinates_are_recognised() {
    let far = "lon,lat,n,pos\n-8,100,9,1\n-8.5,101,9,1\n-9,102,9,1\n";
    refused(
        read(far),
        &["latitude is out of range in 3 of 3 rows", "swapped", "swap `lon` and `lat`"],
    );
    let named = |lon: &str, lat: &str| SurveyOptions {
        lon: option(lon),
        lat: option(lat),
        ..Default::default()
    };
    refused(read_as(GOOD, &named("lat", "lon")), &["swapped", "--lon lon --lat lat"]);
    refused(read_as(GOOD, &named("lat", "lat")), &["cannot be both"]);
    refused(
        read_as(far, &SurveyOptions { crs: option("EPSG:4326"), ..named("lon", "lat") }),
        &["try --lon lat --lat lon"],
    );
}

/// The Gambia's northing is no easting of its zone.
#[cfg(feature = "gdal")]
#[test]
fn swapped_coordinates_on_a_plane_are_recognised() {
    let utm = SurveyOptions {
        lon: option("b"),
        lat: option("a"),
        crs: option("EPSG:32628"),
        ..Default::default()
    };
    let text = "a,b,n,pos\n350000,1450000,9,1\n360000,1450000,9,1\n360000,1460000,9,1\n";
    refused(read_as(text, &utm), &["no site lies anywhere near", "EPSG:32628", "swapped"]);
}

#[cfg(feature = "gdal")]
#[test]
fn the_coordinate_system_is_known_or_asked_for() {
    let metres = "x,y,n,pos\n350000,1450000,9,1\n360000,1450000,9,1\n360000,1460000,9,1\n";
    refused(read(metres), &["coordinate reference system is not known", "--crs", "EPSG:"]);
    let local = metres.replace("x,y", "x_km,y_km");
    refused(read(&local), &["local:km"]);
    let with_crs = |text: &str, crs: &str| {
        read_as(text, &SurveyOptions { crs: option(crs), ..Default::default() })
    };
    assert_eq!(with_crs(metres, "EPSG:32628").unwrap().crs.name(), "EPSG:32628");
    assert!(with_crs(metres, "local:m").unwrap().crs.is_local());
    refused(with_crs(metres, "EPSG:4326"), &["out of range", "look like metres"]);
    refused(with_crs(GOOD, "EPSG:32632"), &["look like degrees", "EPSG:32632", "EPSG:4326"]);
    refused(with_crs(GOOD, "EPSG:123456"), &["`EPSG:123456`", "--crs"]);
    refused(with_crs(GOOD, "WGS 48"), &["not a coordinate reference system"]);
    refused(with_crs(GOOD, ""), &["no coordinate reference system"]);
    // Metres under the names of degrees.
    refused(read(&metres.replace("x,y", "lon,lat")), &["out of range", "look like metres"]);
    // A neighbouring zone cannot be told apart, another hemisphere can.
    refused(with_crs(metres, "EPSG:28992"), &["no site lies anywhere near", "EPSG:28992"]);
}

#[test]
fn longitudes_may_run_to_360() {
    let text = "lon,lat,n,pos\n179,-17,9,1\n181,-17,9,1\n182,-18,9,1\n";
    let survey = read(text).unwrap();
    assert_eq!(survey.x, [179.0, -179.0, -178.0]);
    assert!(survey.notes.iter().any(|n| n.contains("180")), "{:?}", survey.notes);
}

#[test]
fn columns_are_found_or_asked_for() {
    let named = |what: &str, name: &str| {
        let mut options = SurveyOptions::default();
        match what {
            "lon" => (options.lon, options.lat) = (option(name), option("lat")),
            "positive" => options.positive = option(name),
            "tested" => options.tested = option(name),
            _ => options.value = option(name),
        }
        read_as(GOOD, &options)
    };
    refused(
        named("lon", "lonn"),
        &["no column `lonn`", "did you mean `lon`", "lon, lat, tested, positive"],
    );
    refused(named("positive", "positve"), &["no column `positve`", "did you mean `positive`"]);
    refused(named("tested", "zzz"), &["no column `zzz`", "columns: lon, lat, tested, positive"]);
    refused(named("value", "prevalence"), &["no column `prevalence`"]);
    refused(named("positive", "tested"), &["cannot be both"]);
    let half = SurveyOptions { lon: option("lon"), ..Default::default() };
    refused(read_as(GOOD, &half), &["nothing for latitude", "--lat"]);
    let half = SurveyOptions { lat: option("lat"), ..Default::default() };
    refused(read_as(GOOD, &half), &["nothing for longitude", "--lon"]);
    let two = SurveyOptions {
        value: option("tested"),
        positive: option("positive"),
        ..Default::default()
    };
    refused(read_as(GOOD, &two), &["one outcome", "--value"]);
    refused(
        read("a,b,c\n1,2,3\n"),
        &["no columns are recognised as coordinates", "a, b, c", "--lon"],
    );
    refused(
        read("lon,lat,n\n1,2,3\n"),
        &["no column is recognised as the number positive", "--value"],
    );
    refused(
        read("lon,lat,pos\n1,2,1\n"),
        &["no column is recognised as the number tested", "one row per site"],
    );
    refused(
        read("lon,lat,pos,cases,n\n1,2,1,1,1\n"),
        &["more than one", "pos, cases", "--positive"],
    );
    refused(read("lon,longitude,lat,n,pos\n1,1,2,1,1\n"), &["more than one pair", "--lon"]);
    refused(read("lon,lat,n,pos,pos\n1,2,3,1,1\n"), &["more than one"]);
    let layered = SurveyOptions { layer: option("sites"), ..Default::default() };
    refused(read_as(GOOD, &layered), &["no layer `sites`"]);
}

#[test]
fn codes_for_missing_values_are_not_mapped() {
    let options =
        SurveyOptions { value: option("v"), crs: option("local:m"), ..Default::default() };
    for code in ["-9999", "-999", "1e20", "-3.4028234663852886e38"] {
        let text = format!("x,y,v\n0,0,1\n1,0,2\n0,1,{code}\n1,1,4\n");
        refused(read_as(&text, &options), &["row: 3", "column: v"]);
    }
}

#[test]
fn too_few_sites_are_no_map() {
    refused(
        read("lon,lat,n,pos\n1,2,3,1\n2,2,3,1\n,2,3,1\n"),
        &["at least 3 usable sites, and there are 2", "row 3: no lon"],
    );
    refused(
        read("lon,lat,n,pos\n1,2,3,1\n1,2,4,1\n1,2,5,1\n"),
        &["all 3 sites are at one place", "place: 1, 2"],
    );
    refused(read("lon,lat,n,pos\n"), &["no rows"]);
    refused(read(""), &["no rows"]);
    refused(read("8.0,5.0,100,10\n8.1,5.0,100,10\n"), &["first line holds values", "column names"]);
}

#[test]
fn files_that_are_not_tables_say_so() {
    let options = SurveyOptions::default();
    let absent = Survey::read("/no/such/survey.csv", &options).unwrap_err();
    assert!(absent.to_string().contains("/no/such/survey.csv"), "{absent}");
    assert_eq!(absent.help().unwrap(), "check the path");
    for (name, phrases) in [
        ("survey.xlsx", &[".xlsx", "save the sheet as CSV"][..]),
        ("survey.dat", &[".dat", ".parquet"]),
        ("survey", &["without an extension"]),
        ("survey.zip", &["unpack"]),
    ] {
        let (_folder, path) = file(name, GOOD);
        refused(Survey::read(path, &options), phrases);
    }
    let (folder, path) = file("survey.parquet", "lon,lat\n1,2\n");
    refused(Survey::read(path, &options), &["not whole Parquet", "copy or write it again"]);
    std::fs::create_dir(folder.path().join("dir.csv")).unwrap();
    refused(Survey::read(folder.path().join("dir.csv"), &options), &["folder"]);
    let utf16: Vec<u8> =
        std::iter::once(0xfeff).chain(GOOD.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    let (_folder, path) = file("survey.csv", utf16);
    refused(Survey::read(path, &options), &["UTF-16", "UTF-8"]);
    let (_folder, path) = file("survey.csv", b"PAR1\x00\x01\x02");
    refused(Survey::read(path, &options), &["not text"]);
}

// Parquet

mod parquet_files {
    use std::{fs::File, sync::Arc};

    use arrow::{
        array::{
            ArrayRef, BinaryArray, Float64Array, Int32Array, RecordBatch, StringArray, StructArray,
        },
        datatypes::{DataType, Field},
    };
    use parquet::{
        arrow::ArrowWriter,
        file::{metadata::KeyValue, properties::WriterProperties},
    };

    use super::*;

    fn write(path: &Path, columns: Vec<(&str, ArrayRef)>, geo: Option<&str>) {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let pairs = geo.map(|g| vec![KeyValue::new("geo".to_string(), g.to_string())]);
        let settings = WriterProperties::builder().set_key_value_metadata(pairs).build();
        let file = File::create(path).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(settings)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    fn wkb(x: f64, y: f64) -> Vec<u8> {
        [&[1, 1, 0, 0, 0][..], &x.to_le_bytes(), &y.to_le_bytes()].concat()
    }

    fn outcomes() -> Vec<(&'static str, ArrayRef)> {
        vec![
            ("tested", Arc::new(Int32Array::from(vec![Some(9), Some(8), None, Some(7)]))),
            ("positive", Arc::new(Int32Array::from(vec![1, 2, 3, 4]))),
            ("village", Arc::new(StringArray::from(vec!["a", "b", "c", "d"]))),
        ]
    }

    fn geo(crs: &str, encoding: &str) -> String {
        format!(
            r#"{{"version":"1.1.0","primary_column":"geometry","columns":{{"geometry":
            {{"encoding":"{encoding}","geometry_types":["Point"]{crs}}}}}}}"#
        )
    }

    fn geometries(points: &[Vec<u8>]) -> ArrayRef {
        Arc::new(BinaryArray::from_iter_values(points))
    }

    fn geoparquet(
        points: &[Vec<u8>],
        geo: &str,
        options: &SurveyOptions,
    ) -> isopleth::Result<Survey> {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("s.parquet");
        let mut columns = outcomes();
        columns.push(("geometry", geometries(points)));
        write(&path, columns, Some(geo));
        Survey::read(path, options)
    }

    fn four() -> Vec<Vec<u8>> {
        vec![wkb(8.0, 5.0), wkb(9.0, 5.0), wkb(9.0, 6.0), wkb(8.5, 5.5)]
    }

    #[test]
    fn plain_parquet_is_read_like_csv() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("s.parquet");
        let mut columns = outcomes();
        columns.push(("lon", Arc::new(Float64Array::from(vec![8.0, 9.0, 9.0, 8.5]))));
        columns.push(("lat", Arc::new(Float64Array::from(vec![5.0, 5.0, 6.0, 5.5]))));
        write(&path, columns, None);
        let survey = Survey::read(&path, &SurveyOptions::default()).unwrap();
        assert_eq!(survey.x, [8.0, 9.0, 8.5]);
        assert_eq!(counts(&survey), (&[1.0, 2.0, 4.0][..], &[9.0, 8.0, 7.0][..]));
        assert_eq!((survey.dropped[0].row, survey.dropped[0].reason.as_str()), (3, "no tested"));
        let columns = Columns::read(&path).unwrap();
        assert_eq!(columns.names(), ["tested", "positive", "village", "lon", "lat"]);
        assert_eq!(columns.text("village").unwrap(), ["a", "b", "c", "d"]);
        refused(columns.numbers("village").map(|_| ()), &["should hold numbers", "row: 1", "`a`"]);
    }

    #[test]
    fn geoparquet_carries_points_and_their_system() {
        let none = SurveyOptions::default();
        let survey = geoparquet(&four(), &geo("", "WKB"), &none).unwrap();
        assert_eq!((survey.x, survey.y), (vec![8.0, 9.0, 8.5], vec![5.0, 5.0, 5.5]));
        assert_eq!(survey.crs, Crs::from_user("EPSG:4326").unwrap());
        // PROJJSON of another system.
        #[cfg(feature = "gdal")]
        {
            let utm =
                gdal::spatial_ref::SpatialRef::from_epsg(32628).unwrap().to_projjson().unwrap();
            let points: Vec<_> =
                [(3.5e5, 1.45e6), (3.6e5, 1.45e6), (3.6e5, 1.46e6), (3.5e5, 1.46e6)]
                    .iter()
                    .map(|(x, y)| wkb(*x, *y))
                    .collect();
            let geo = geo(&format!(r#","crs":{utm}"#), "WKB");
            let survey = geoparquet(&points, &geo, &none).unwrap();
            assert_eq!(survey.crs, Crs::from_user("EPSG:32628").unwrap());
            assert_eq!(survey.crs.name(), "EPSG:32628");
            let told = SurveyOptions { crs: option("EPSG:32629"), ..Default::default() };
            refused(
                geoparquet(&points, &geo, &told),
                &["different coordinate systems", "EPSG:32628", "EPSG:32629"],
            );
        }
        let unknown = geo(r#","crs":null"#, "WKB");
        refused(geoparquet(&four(), &unknown, &none), &["does not say", "--crs"]);
        let told = SurveyOptions { crs: option("EPSG:4326"), ..Default::default() };
        assert_eq!(geoparquet(&four(), &unknown, &told).unwrap().len(), 3);
    }

    #[test]
    fn geoparquet_points_as_structs() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("s.parquet");
        let xy = |v: Vec<f64>| Arc::new(Float64Array::from(v)) as ArrayRef;
        let field = |name| Arc::new(Field::new(name, DataType::Float64, false));
        let points = StructArray::from(vec![
            (field("x"), xy(vec![8.0, 9.0, 9.0, 8.5])),
            (field("y"), xy(vec![5.0, 5.0, 6.0, 5.5])),
        ]);
        let mut columns = outcomes();
        columns.push(("geometry", Arc::new(points)));
        write(&path, columns, Some(&geo("", "point")));
        assert_eq!(Survey::read(&path, &SurveyOptions::default()).unwrap().x, [8.0, 9.0, 8.5]);
    }

    #[test]
    fn geometries_that_are_not_points_are_refused() {
        let none = SurveyOptions::default();
        let mut points = four();
        points[3] = [&[1, 3, 0, 0, 0, 0, 0, 0, 0][..]].concat();
        refused(
            geoparquet(&points, &geo("", "WKB"), &none),
            &["must be points", "row: 4", "polygon", "centroid"],
        );
        points[3] = vec![1, 1, 0];
        refused(geoparquet(&points, &geo("", "WKB"), &none), &["row: 4", "cut short"]);
        refused(geoparquet(&four(), &geo("", "polygon"), &none), &["encoded as `polygon`"]);
        refused(geoparquet(&four(), "{}", &none), &["GeoParquet metadata", "primary_column"]);
        let missing = geo("", "WKB").replace("\"geometry\"", "\"geom\"");
        refused(geoparquet(&four(), &missing, &none), &["`geom` is missing"]);
    }

    /// No cut of a good file and no changed byte may panic, and no cut may pass.
    #[test]
    fn damaged_parquet_never_passes_for_whole() {
        let folder = TempDir::new().unwrap();
        let good = folder.path().join("good.parquet");
        let mut columns = outcomes();
        columns.push(("geometry", geometries(&four())));
        write(&good, columns, Some(&geo("", "WKB")));
        let bytes = std::fs::read(&good).unwrap();
        let bad = folder.path().join("bad.parquet");
        for keep in (0..bytes.len()).step_by(7) {
            std::fs::write(&bad, &bytes[..keep]).unwrap();
            let error = Survey::read(&bad, &SurveyOptions::default()).expect_err("cut short");
            assert!(error.help().is_some(), "{error}");
        }
        for at in (0..bytes.len()).step_by(3) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x55;
            std::fs::write(&bad, &changed).unwrap();
            let _ = Survey::read(&bad, &SurveyOptions::default()); // An error or a survey, no panic.
        }
    }

    #[test]
    fn columns_are_written_whole_and_read_back() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("p.parquet");
        let columns = [("mean", vec![0.25, f64::NAN, 1.0 / 3.0]), ("sd", vec![1.0, 2.0, 3.0])];
        Columns::write_parquet(&path, &columns).unwrap();
        let back = Columns::read(&path).unwrap();
        assert_eq!(back.names(), ["mean", "sd"]);
        assert_eq!(back.len(), 3);
        assert_eq!(back.numbers("sd").unwrap(), [1.0, 2.0, 3.0]);
        let mean = back.numbers("mean").unwrap();
        assert_eq!((mean[0], mean[2]), (0.25, 1.0 / 3.0));
        assert!(mean[1].is_nan());
        let uneven = [("a", vec![1.0]), ("b", vec![1.0, 2.0])];
        assert!(matches!(Columns::write_parquet(&path, &uneven), Err(Error::Axis { .. })));
        let after = Columns::read(&path).unwrap();
        assert_eq!(after.names(), back.names(), "a failed write touches nothing");
        let nowhere = folder.path().join("no/such/p.parquet");
        assert!(matches!(Columns::write_parquet(nowhere, &columns), Err(Error::Io { .. })));
        let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing is left behind: {names:?}");
    }

    /// /dev/full refuses every byte as a full disk does.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_told_in_its_own_words() {
        let folder = TempDir::new().unwrap();
        let name = format!("p.parquet.{}.tmp", std::process::id());
        std::os::unix::fs::symlink("/dev/full", folder.path().join(name)).unwrap();
        let error = Columns::write_parquet(folder.path().join("p.parquet"), &[("a", vec![1.0])])
            .unwrap_err();
        assert!(error.help().is_some_and(|h| h.contains("disk is full")), "{error}");
        assert!(!folder.path().join("p.parquet").exists());
    }
}

#[test]
fn columns_hold_numbers_or_text() {
    let (_folder, path) = file("t.csv", "row,fold,name,gap\n0,3,a,\n1,4,,2.5\n");
    let columns = Columns::read(&path).unwrap();
    assert_eq!(columns.column("fold").unwrap(), &Column::Numbers(vec![3.0, 4.0]));
    assert_eq!(columns.column("name").unwrap(), &Column::Text(vec!["a".into(), String::new()]));
    assert_eq!(columns.text("gap").unwrap(), ["", "2.5"]);
    assert!(columns.numbers("gap").unwrap()[0].is_nan());
    refused(columns.numbers("flod").map(|_| ()), &["no column `flod`", "did you mean `fold`"]);
}

// Files that GDAL reads

#[cfg(feature = "gdal")]
mod vector_files {
    use gdal::{
        DriverManager,
        spatial_ref::{AxisMappingStrategy, SpatialRef},
        vector::{
            FieldValue, Geometry, LayerAccess, LayerOptions, OGRFieldType, OGRwkbGeometryType,
        },
    };

    use super::*;

    const POINTS: [&str; 4] = ["POINT (8 5)", "POINT (9 5)", "POINT (9 6)", "POINT (8.5 5.5)"];

    fn system(code: Option<u32>) -> Option<SpatialRef> {
        code.map(|code| {
            let mut system = SpatialRef::from_epsg(code).unwrap();
            system.set_axis_mapping_strategy(AxisMappingStrategy::TraditionalGisOrder);
            system
        })
    }

    fn write(driver: &str, path: &Path, layers: &[&str], code: Option<u32>, wkt: &[&str]) {
        isopleth::geo::crs::quiet();
        let mut dataset =
            DriverManager::get_driver_by_name(driver).unwrap().create_vector_only(path).unwrap();
        for name in layers {
            let layer = dataset
                .create_layer(LayerOptions {
                    name,
                    srs: system(code).as_ref(),
                    ty: match driver {
                        "ESRI Shapefile" | "FlatGeobuf" => OGRwkbGeometryType::wkbPoint,
                        _ => OGRwkbGeometryType::wkbUnknown,
                    },
                    options: None,
                })
                .unwrap();
            layer
                .create_defn_fields(&[
                    ("tested", OGRFieldType::OFTInteger),
                    ("positive", OGRFieldType::OFTReal),
                    ("village", OGRFieldType::OFTString),
                ])
                .unwrap();
            for (i, wkt) in wkt.iter().enumerate() {
                let mut feature = gdal::vector::Feature::new(layer.defn()).unwrap();
                feature.set_field(0, &FieldValue::IntegerValue(9 - i as i32)).unwrap();
                feature.set_field(1, &FieldValue::RealValue(i as f64)).unwrap();
                feature.set_field(2, &FieldValue::StringValue(format!("v{i}"))).unwrap();
                if !wkt.is_empty() {
                    feature.set_geometry(Geometry::from_wkt(wkt).unwrap()).unwrap();
                }
                feature.create(&layer).unwrap();
            }
        }
        dataset.close().unwrap();
    }

    fn made(driver: &str, name: &str, code: Option<u32>, wkt: &[&str]) -> (TempDir, PathBuf) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join(name);
        write(driver, &path, &["sites"], code, wkt);
        (folder, path)
    }

    fn none() -> SurveyOptions {
        SurveyOptions::default()
    }

    #[test]
    fn every_format_gives_the_same_survey() {
        for (driver, name) in [
            ("GPKG", "s.gpkg"),
            ("GeoJSON", "s.geojson"),
            ("ESRI Shapefile", "s.shp"),
            ("FlatGeobuf", "s.fgb"),
        ] {
            let (_folder, path) = made(driver, name, Some(4326), &POINTS);
            let survey = Survey::read(&path, &none()).map_err(|e| shown(&e)).unwrap();
            let mut sites: Vec<_> = (0..4)
                .map(|i| (survey.x[i], survey.y[i], counts(&survey).0[i], counts(&survey).1[i]))
                .collect();
            sites.sort_by(|a, b| a.2.total_cmp(&b.2)); // FlatGeobuf stores along a curve.
            let truth = [
                (8.0, 5.0, 0.0, 9.0),
                (9.0, 5.0, 1.0, 8.0),
                (9.0, 6.0, 2.0, 7.0),
                (8.5, 5.5, 3.0, 6.0),
            ];
            assert_eq!(sites, truth, "{driver}");
            assert_eq!(survey.crs, Crs::from_user("EPSG:4326").unwrap(), "{driver}");
            assert_eq!(Columns::read(&path).unwrap().names(), ["tested", "positive", "village"]);
        }
        let utm = ["POINT (350000 1450000)", "POINT (360000 1450000)", "POINT (360000 1460000)"];
        for (driver, name) in [("GPKG", "s.gpkg"), ("ESRI Shapefile", "s.shp")] {
            let (_folder, path) = made(driver, name, Some(32628), &utm);
            let survey = Survey::read(&path, &none()).map_err(|e| shown(&e)).unwrap();
            assert_eq!(survey.crs, Crs::from_user("EPSG:32628").unwrap(), "{driver}");
            assert_eq!(survey.y, [1.45e6, 1.45e6, 1.46e6], "{driver}");
        }
    }

    #[test]
    fn a_file_without_a_system_is_asked_about() {
        for (driver, name) in [("GPKG", "s.gpkg"), ("ESRI Shapefile", "s.shp")] {
            let (_folder, path) = made(driver, name, None, &POINTS);
            refused(Survey::read(&path, &none()), &["does not say", "--crs", "EPSG:4326"]);
            let told = SurveyOptions { crs: option("EPSG:4326"), ..none() };
            assert_eq!(Survey::read(&path, &told).unwrap().len(), 4, "{driver}");
        }
    }

    #[test]
    fn a_file_and_a_flag_that_disagree_are_not_reconciled() {
        let (_folder, path) = made("GPKG", "s.gpkg", Some(4326), &POINTS);
        let told = SurveyOptions { crs: option("EPSG:32632"), ..none() };
        refused(
            Survey::read(&path, &told),
            &["different coordinate systems", "EPSG:4326", "EPSG:32632"],
        );
        let told = SurveyOptions { crs: option("OGC:CRS84"), ..none() };
        assert_eq!(Survey::read(&path, &told).unwrap().len(), 4);
    }

    /// GeoJSON can only say WGS84, so a file in metres is common; --crs settles it.
    #[test]
    fn geojson_in_metres_needs_to_be_told() {
        let (_folder, path) = file(
            "s.geojson",
            r#"{"type":"FeatureCollection","features":[
            {"type":"Feature","properties":{"n":9,"pos":1},"geometry":{"type":"Point","coordinates":[350000,1450000]}},
            {"type":"Feature","properties":{"n":9,"pos":1},"geometry":{"type":"Point","coordinates":[360000,1450000]}},
            {"type":"Feature","properties":{"n":9,"pos":1},"geometry":{"type":"Point","coordinates":[360000,1460000]}}]}"#,
        );
        refused(Survey::read(&path, &none()), &["out of range", "metres", "--crs"]);
        let told = SurveyOptions { crs: option("EPSG:32628"), ..none() };
        let survey = Survey::read(&path, &told).unwrap();
        assert_eq!(survey.crs.name(), "EPSG:32628");
        assert!(survey.notes.iter().any(|n| n.contains("as told")), "{:?}", survey.notes);
    }

    #[test]
    fn rows_without_a_point_are_dropped_and_other_shapes_refused() {
        let mut points = POINTS.to_vec();
        points[1] = "";
        let (_folder, path) = made("GPKG", "s.gpkg", Some(4326), &points);
        let survey = Survey::read(&path, &none()).unwrap();
        assert_eq!((survey.rows, survey.dropped[0].row), (vec![1, 3, 4], 2));
        points[1] = "POINT EMPTY";
        let (_folder, path) = made("GPKG", "s.gpkg", Some(4326), &points);
        assert_eq!(Survey::read(&path, &none()).unwrap().dropped[0].reason, "no coordinates");
        points[1] = "MULTIPOINT (9 5)";
        let (_folder, path) = made("GPKG", "s.gpkg", Some(4326), &points);
        assert_eq!(Survey::read(&path, &none()).unwrap().x, [8.0, 9.0, 9.0, 8.5]);
        for (shape, word) in [
            ("POLYGON ((8 5, 9 5, 9 6, 8 5))", "polygon"),
            ("GEOMETRYCOLLECTION (POINT (8 5))", "geometrycollection"),
            ("MULTIPOINT (9 5, 8 5)", "multipoint of 2"),
            ("LINESTRING (9 5, 8 5)", "linestring"),
        ] {
            points[1] = shape;
            let (_folder, path) = made("GPKG", "s.gpkg", Some(4326), &points);
            refused(Survey::read(&path, &none()), &["must be points", "row: 2", word, "centroids"]);
        }
    }

    #[test]
    fn the_layer_is_chosen_or_asked_for() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("s.gpkg");
        write("GPKG", &path, &["old", "new"], Some(4326), &POINTS);
        refused(Survey::read(&path, &none()), &["more than one layer", "old, new", "--layer"]);
        let named = |name| SurveyOptions { layer: option(name), ..none() };
        assert_eq!(Survey::read(&path, &named("new")).unwrap().len(), 4);
        refused(Survey::read(&path, &named("newer")), &["no layer `newer`", "--layer new"]);
    }

    /// GDAL reports the layer's system for every geometry; the geometries may say otherwise.
    #[test]
    fn mixed_systems_in_a_layer_are_refused() {
        let (_folder, path) = made("GPKG", "s.gpkg", Some(4326), &POINTS);
        let mut bytes = std::fs::read(&path).unwrap();
        // A GeoPackage point: "GP", version 0, flags 1 (little-endian), then its system.
        let mark = [b'G', b'P', 0, 1, 0xe6, 0x10, 0, 0, 1, 1, 0, 0, 0];
        let at = bytes.windows(mark.len()).position(|w| w == mark).expect("a stored point");
        bytes[at + 4..at + 8].copy_from_slice(&32632u32.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        refused(
            Survey::read(&path, &none()),
            &["mixes coordinate reference systems", "4326, 32632"],
        );
    }

    #[test]
    fn broken_vector_files_say_so() {
        for name in ["s.gpkg", "s.geojson", "s.shp", "s.fgb"] {
            let (_folder, path) = file(name, "this is not a map");
            refused(
                Survey::read(path, &none()),
                &["cannot be read as a vector layer", "GDAL says"],
            );
        }
        for (driver, name) in
            [("GPKG", "s.gpkg"), ("FlatGeobuf", "s.fgb"), ("ESRI Shapefile", "s.shp")]
        {
            let (_folder, path) = made(driver, name, Some(4326), &POINTS);
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            let result = Survey::read(&path, &none());
            refused(result, &[name]);
        }
        let (_folder, path) = made("ESRI Shapefile", "s.shp", Some(4326), &POINTS);
        let table = path.with_extension("dbf");
        let bytes = std::fs::read(&table).unwrap();
        std::fs::write(&table, &bytes[..bytes.len() - 100]).unwrap();
        refused(Survey::read(&path, &none()), &["s.shp"]);
    }
}

// Real surveys

/// The folder of real data beside the repository, or `None` with a message.
fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(name);
    if !path.exists() {
        println!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn loaloa_is_read_whole() {
    let Some(path) = shared("loaloa/villages.csv") else {
        return;
    };
    let survey = Survey::read(&path, &SurveyOptions::default()).map_err(|e| shown(&e)).unwrap();
    assert_eq!(survey.len(), 197);
    assert!(survey.dropped.is_empty());
    assert_eq!((survey.x[0], survey.y[0]), (8.04186, 5.73675));
    assert_eq!((counts(&survey).0[0], counts(&survey).1[0]), (0.0, 162.0));
    let frame = isopleth::geo::frame::Frame::fit(&survey).unwrap();
    assert!((500.0..1500.0).contains(&frame.extent_km()), "{}", frame.extent_km());
    let folds = Columns::read(shared("loaloa/folds.csv").expect("beside the villages")).unwrap();
    assert_eq!(folds.numbers("fold_random").unwrap().len(), 197);
}

#[cfg(feature = "gdal")]
#[test]
fn gambia_needs_its_zone_and_then_is_read() {
    let Some(path) = shared("gambia/villages.csv") else {
        return;
    };
    refused(Survey::read(&path, &SurveyOptions::default()), &["not known", "--crs"]);
    let told = SurveyOptions { crs: option("EPSG:32628"), ..Default::default() };
    let survey = Survey::read(&path, &told).map_err(|e| shown(&e)).unwrap();
    assert_eq!((survey.len(), survey.dropped.len()), (65, 0));
    // One row per child, with 0 or 1: not a survey of counts.
    let children = path.with_file_name("children.csv");
    refused(Survey::read(children, &told), &["tested", "one row per site"]);
}

#[test]
fn the_bundled_example_is_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/survey.csv");
    let survey = Survey::read(path, &SurveyOptions::default()).map_err(|e| shown(&e)).unwrap();
    assert!(survey.len() > 100);
    assert!(survey.crs.is_geographic());
}

#[test]
fn rongelap_and_rain_on_planes_of_their_own() {
    if let Some(path) = shared("sic97/rain.csv") {
        let options = SurveyOptions { value: option("rain_tenth_mm"), ..Default::default() };
        refused(Survey::read(&path, &options), &["local:km"]);
        let options = SurveyOptions { crs: option("local:km"), ..options };
        assert_eq!(Survey::read(&path, &options).unwrap().len(), 467);
    }
    if let Some(path) = shared("rongelap/counts.csv") {
        let options =
            SurveyOptions { value: option("count"), crs: option("local:m"), ..Default::default() };
        assert_eq!(Survey::read(&path, &options).map_err(|e| shown(&e)).unwrap().len(), 157);
    }
}

// Rates, yes or no, and values above 0

const RATES: &str = "lon,lat,cases,population,py\n8,5,3,1200,600.5\n8.5,5.5,0,800,410\n9,6,12,2500,0\n9.5,6,4,900,350\n";

fn rates(cases: &str, population: Option<&str>, person_time: Option<&str>) -> SurveyOptions {
    SurveyOptions {
        cases: option(cases),
        population: population.and_then(option),
        person_time: person_time.and_then(option),
        ..Default::default()
    }
}

#[test]
fn cases_have_a_population_or_person_time() {
    let survey = read_as(RATES, &rates("cases", Some("population"), None)).unwrap();
    let Outcome::Cases { cases, exposure, per } = &survey.outcome else { panic!("cases expected") };
    assert_eq!((cases[2], exposure[2], per.as_str()), (12.0, 2500.0, "person"));
    assert_eq!(survey.outcome.observed()[0], 3.0 / 1200.0);
    assert_eq!(survey.outcome.likelihood(), "poisson");
    // Nobody at risk and twelve cases: one of the two is wrong.
    let error = read_as(RATES, &rates("cases", None, Some("py"))).unwrap_err();
    assert!(shown(&error).contains("cases where nobody is"), "{}", shown(&error));
    let right = RATES.replace("12,2500,0", "0,2500,0");
    let survey = read_as(&right, &rates("cases", None, Some("py"))).unwrap();
    assert!(survey.dropped[0].reason.contains("nobody at risk (py is 0)"), "{:?}", survey.dropped);
    let Outcome::Cases { exposure, per, .. } = &survey.outcome else { panic!("cases expected") };
    assert_eq!((exposure[0], per.as_str()), (600.5, "unit of py"));
}

#[test]
fn half_a_rate_is_refused_with_what_is_missing() {
    for (options, what, help) in [
        (
            rates("cases", None, None),
            "without those they are among",
            "--population or --person-time",
        ),
        (
            SurveyOptions { population: option("population"), ..Default::default() },
            "needs the cases",
            "--cases",
        ),
        (
            rates("cases", Some("population"), Some("py")),
            "two are named",
            "--person-time for incidence",
        ),
        (rates("cases", Some("cases"), None), "cannot be both", "two columns"),
        (
            SurveyOptions { value: option("py"), ..rates("cases", Some("population"), None) },
            "one outcome, and two are named",
            "name one",
        ),
    ] {
        let error = read_as(RATES, &options).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert!(error.help().unwrap().contains(help), "{:?}", error.help());
    }
    for (from, to, what) in [
        ("3,1200", "3.5,1200", "whole number"),
        ("3,1200", "-3,1200", "whole number"),
        ("3,1200", "3,-1200", "not above 0"),
    ] {
        let text = RATES.replace(from, to);
        let error = read_as(&text, &rates("cases", Some("population"), None)).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[test]
fn single_people_and_logarithms_are_read() {
    let text = "lon,lat,sick,density\n8,5,1,120\n8,5,0,3.5\n9,6,0,800\n9.5,6,1,40\n";
    let binary = SurveyOptions { binary: option("sick"), ..Default::default() };
    let survey = read_as(text, &binary).unwrap();
    assert_eq!(counts(&survey), (&[1.0, 0.0, 0.0, 1.0][..], &[1.0; 4][..]));
    assert!(survey.outcome.is_single());
    let error = read_as(&text.replace("9,6,0", "9,6,2"), &binary).unwrap_err();
    assert!(error.to_string().contains("0 or 1"), "{error}");
    let logged = SurveyOptions { log_value: option("density"), ..Default::default() };
    let survey = read_as(text, &logged).unwrap();
    assert_eq!(survey.outcome, Outcome::Positive(vec![120.0, 3.5, 800.0, 40.0]));
    let error = read_as(&text.replace("800", "0"), &logged).unwrap_err();
    assert!(error.to_string().contains("above 0"), "{error}");
    assert!(error.help().unwrap().contains("detection"), "{:?}", error.help());
}

/// A unit that may be wrong is named; more cases than people may be right, and are counted.
#[test]
fn spans_and_rates_that_surprise_are_noted() {
    let text = "x,y,cases,people\n0,0,3,10\n9000,0,12,10\n0,4000,1,10\n";
    let options = SurveyOptions { crs: option("local:km"), ..rates("cases", Some("people"), None) };
    let notes = read_as(text, &options).unwrap().notes.join("\n");
    assert!(notes.contains("span 9000 km") && notes.contains("local:m"), "{notes}");
    assert!(notes.contains("1 of 3 rows have more cases than people"), "{notes}");
    let time = SurveyOptions { crs: option("local:m"), ..rates("cases", None, Some("people")) };
    let notes = read_as(text, &time).unwrap().notes.join("\n");
    assert!(!notes.contains("span") && !notes.contains("more cases"), "{notes}");
}
