//! What distances through the globe, and around a barrier, are worth: simulated surveys whose surfaces know
//! the earth is round, or that water parts two shores.
//!
//! ```text
//! cargo run --release --example geometries globe 8       # surveys, from seed 1 on
//! cargo run --release --example geometries barrier 8
//! cargo run --release --example geometries write FOLDER  # survey 1 of each as files, for the command line
//! ```
//!
//! *Globe*: Matérn-3/2 surfaces by chord, ℓ = 0.3 radii of the earth (1,900 km), 300 sites anywhere, or
//! north of 45° N. *Barrier*: a country of 50 × 120 km with an inlet 10 km wide from the north: from shore to
//! shore it is 10 km by water and up to 210 km by land. Its surfaces are white noise that spreads by
//! diffusion over land alone (after Bakka et al. 2019, arXiv:1608.03787), which no part of the program does.
//! Each site's positives among 50 to 100 tested are foretold from nine tenths of the other sites, left out at
//! random, or whole stretches of land at a time (`blocks:10`). A third word names the models.

use std::{fmt::Write, fs, path::Path, path::PathBuf};

use candle_core::Device;
use isopleth::{
    Error, Link, Result, Stream,
    checkpoint::Checkpoint,
    cli::validate::{Folds, Forecaster, cross_validate, exact_gp, nearest_gp},
    geo::{
        geometry::{Choice, Geometry},
        survey::{Survey, SurveyOptions},
    },
    kernel::{Kernel, Matern, Metric, Smoothness},
    likelihood,
    linalg::Cholesky,
    score::Summary,
};

/// A table of sites and counts.
fn table(sites: &[[f64; 2]], logits: &[f64], rng: &mut Stream) -> String {
    let mut text = String::from("x,y,tested,positive\n");
    for ([x, y], eta) in sites.iter().zip(logits) {
        let tested = 50 + rng.below(51) as u64;
        let positive = rng.binomial(tested, Link::Logit.outcome(*eta));
        let _ = writeln!(text, "{x:.5},{y:.5},{tested},{positive}");
    }
    text
}

/// 300 sites from a latitude on, up to the north pole.
fn globe(seed: u64, from: f64) -> Result<String> {
    let mut rng = Stream::new(seed, "sites on the globe", 0);
    let low = from.to_radians().sin();
    let sites: Vec<[f64; 2]> = (0..300)
        .map(|_| [rng.uniform(-180.0, 180.0), rng.uniform(low, 1.0).asin().to_degrees()])
        .collect();
    let unit = |[lon, lat]: &[f64; 2]| {
        let (lon, lat) = (lon.to_radians(), lat.to_radians());
        [lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()]
    };
    let (smoothness, metric) = (Smoothness::ThreeHalves, Metric::Euclidean);
    let kernel = Matern { smoothness, length_scale: 0.3, sill: 1.0, metric };
    let places: Vec<[f64; 3]> = sites.iter().map(unit).collect();
    let covariance = faer::Mat::from_fn(300, 300, |i, j| {
        kernel.covariance(&places[i], &places[j]) + if i == j { 0.05 } else { 0.0 }
    });
    let surface = Cholesky::factor(covariance)?.colour(&rng.normals(300));
    let logits: Vec<f64> = surface.iter().map(|f| f - 1.0).collect();
    Ok(table(&sites, &logits, &mut rng))
}

/// Land of the country, km: 50 × 120 but for an inlet.
fn land(x: f64, y: f64) -> bool {
    let inside = (0.0..50.0).contains(&x) && (0.0..120.0).contains(&y);
    inside && !((20.0..30.0).contains(&x) && y > 20.0)
}

/// Eastings and northings of the country's corner, metres (UTM 31 N).
const CORNER: [f64; 2] = [450_000.0, 5_000_000.0];

/// The country as a file.
fn outline(folder: &Path) -> Result<PathBuf> {
    let corners =
        [[0, 0], [50, 0], [50, 120], [30, 120], [30, 20], [20, 20], [20, 120], [0, 120], [0, 0]];
    let at = |[x, y]: &[i32; 2]| {
        format!("[{},{}]", CORNER[0] + 1e3 * f64::from(*x), CORNER[1] + 1e3 * f64::from(*y))
    };
    let ring: Vec<String> = corners.iter().map(at).collect();
    let text = format!(
        "{{\"type\":\"FeatureCollection\",\"crs\":{{\"type\":\"name\",\"properties\":{{\"name\":\
         \"urn:ogc:def:crs:EPSG::32631\"}}}},\"features\":[{{\"type\":\"Feature\",\"properties\":{{}},\
         \"geometry\":{{\"type\":\"Polygon\",\"coordinates\":[[{}]]}}}}]}}",
        ring.join(",")
    );
    let file = folder.join("land.geojson");
    fs::write(&file, text).map_err(|e| Error::io("write", &file, e))?;
    Ok(file)
}

/// 100 sites of the country, on the surface that diffusion over land makes of white noise.
fn country(seed: u64) -> String {
    const SIDE: [usize; 2] = [50, 120];
    let mut rng = Stream::new(seed, "country with an inlet", 0);
    let open: Vec<bool> = (0..SIDE[0] * SIDE[1])
        .map(|i| land((i % SIDE[0]) as f64 + 0.5, (i / SIDE[0]) as f64 + 0.5))
        .collect();
    let mut heat: Vec<f64> =
        open.iter().map(|open| if *open { rng.normal() } else { 0.0 }).collect();
    // 700 steps of 0.2 spread a point by √280 = 17 km along each axis.
    for _ in 0..700 {
        let before = heat.clone();
        for i in (0..before.len()).filter(|i| open[*i]) {
            let (x, y) = (i % SIDE[0], i / SIDE[0]);
            let beside = [
                (x > 0).then(|| i - 1),
                (x + 1 < SIDE[0]).then(|| i + 1),
                (y > 0).then(|| i - SIDE[0]),
                (y + 1 < SIDE[1]).then(|| i + SIDE[0]),
            ];
            for j in beside.into_iter().flatten().filter(|j| open[*j]) {
                heat[i] += 0.2 * (before[j] - before[i]);
            }
        }
    }
    let inside = || open.iter().zip(&heat).filter(|(open, _)| **open).map(|(_, h)| *h);
    let n = inside().count() as f64;
    let mean = inside().sum::<f64>() / n;
    let sd = (inside().map(|h| (h - mean).powi(2)).sum::<f64>() / n).sqrt();
    let (mut sites, mut logits) = (Vec::new(), Vec::new());
    while sites.len() < 100 {
        let (x, y) = (rng.uniform(0.0, 50.0), rng.uniform(0.0, 120.0));
        if land(x, y) {
            let cell = y as usize * SIDE[0] + x as usize;
            sites.push([CORNER[0] + 1e3 * x, CORNER[1] + 1e3 * y]);
            logits.push(1.2 * (heat[cell] - mean) / sd - 1.0 + 0.2 * rng.normal());
        }
    }
    table(&sites, &logits, &mut rng)
}

fn read(text: &str, crs: &str, distance: Choice, folder: &Path) -> Result<Survey> {
    let file = folder.join("survey.csv");
    fs::write(&file, text).map_err(|e| Error::io("write", &file, e))?;
    Survey::read(&file, &SurveyOptions { crs: Some(crs.into()), distance, ..Default::default() })
}

/// Log score of each site, in nats.
fn scores(survey: &Survey, folds: &Folds, ask: &Forecaster) -> Result<Vec<f64>> {
    let scored = cross_validate(survey, folds, ask)?;
    let one = |f: &isopleth::score::Forecast| Summary::of(std::slice::from_ref(f)).log_score;
    Ok(scored.iter().flat_map(|fold| fold.met.iter().map(one)).collect())
}

/// Mean log scores in both geometries, and what one is better by, over the surveys.
fn compare(name: &str, surveys: &[[Survey; 2]], how: &str) -> Result<()> {
    let counts = likelihood::find("binomial")?;
    let network = Checkpoint::resolve("prevalence")?.process(&Device::Cpu)?;
    let models: [(&str, Box<Forecaster>); 3] = [
        ("gp", exact_gp(counts)),
        ("vecchia", nearest_gp(counts, false)),
        ("prevalence", Box::new(|context, targets, _| network.condition(context)?.at(targets))),
    ];
    let asked = std::env::args().nth(3);
    for (model, ask) in models.iter().filter(|m| asked.as_ref().is_none_or(|a| a.contains(m.0))) {
        let mut means = Vec::new();
        for pair in surveys {
            let (folds, mut mean) = (Folds::parse(how, &pair[0], 1)?, [0.0; 2]);
            for (mean, survey) in mean.iter_mut().zip(pair) {
                let each = scores(survey, &folds, ask)?;
                *mean = each.iter().sum::<f64>() / each.len() as f64;
            }
            means.push(mean);
        }
        let n = means.len() as f64;
        let of = |f: &dyn Fn(&[f64; 2]) -> f64| means.iter().map(f).sum::<f64>() / n;
        let gain = of(&|m| m[1] - m[0]);
        let sd = of(&|m| (m[1] - m[0] - gain).powi(2)).sqrt();
        println!(
            "{name:24} {model:11} plane {:8.3}   other {:8.3}   gain {gain:+.3} ± {:.3}",
            of(&|m| m[0]),
            of(&|m| m[1]),
            sd / (n - 1.0).max(1.0).sqrt()
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (what, more) = (words.first().map_or("", |w| w), words.get(1).map_or("", |w| w));
    let folder = std::env::temp_dir().join(format!("geometries-{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(|e| Error::io("make", &folder, e))?;
    let count: u64 = more.parse().unwrap_or(4);
    let on = |distance: &str| Choice { distance: Some(distance.into()), ..Default::default() };
    match what {
        "globe" => {
            for (name, from) in [("anywhere", -90.0), ("north of 45° N", 45.0)] {
                let mut surveys = Vec::new();
                for seed in 1..=count {
                    let text = globe(seed, from)?;
                    surveys.push([
                        read(&text, "EPSG:4326", on("plane"), &folder)?,
                        read(&text, "EPSG:4326", on("globe"), &folder)?,
                    ]);
                }
                compare(name, &surveys, "10")?;
            }
        }
        "barrier" => {
            let inside = Some(outline(&folder)?);
            let mut surveys = Vec::new();
            for seed in 1..=count {
                let text = country(seed);
                let around = Choice { inside: inside.clone(), ..Default::default() };
                let around = read(&text, "EPSG:32631", around, &folder)?;
                if let (1, Geometry::Around(around)) = (seed, &around.geometry) {
                    around.about().iter().for_each(|line| println!("{line}"));
                }
                surveys.push([read(&text, "EPSG:32631", on("plane"), &folder)?, around]);
            }
            for how in ["10", "blocks:10"] {
                compare(&format!("inlet, folds {how}"), &surveys, how)?;
            }
        }
        "write" => {
            let to = Path::new(more);
            fs::create_dir_all(to).map_err(|e| Error::io("make", to, e))?;
            outline(to)?;
            for (name, text) in [
                ("world.csv", globe(1, -90.0)?),
                ("north.csv", globe(1, 45.0)?),
                ("country.csv", country(1)),
            ] {
                let file = to.join(name);
                fs::write(&file, text).map_err(|e| Error::io("write", &file, e))?;
            }
        }
        _ => {
            return Err(Error::input("say globe, barrier or write")
                .try_this("for example: cargo run --release --example geometries globe 8"));
        }
    }
    let _ = fs::remove_dir_all(&folder);
    Ok(())
}
