//! `isopleth plan`: where to survey next, to know better where a threshold is exceeded.

use std::path::{Path, PathBuf};

use candle_core::Device;
use ndarray::Array2;
use serde_json::json;

use super::{
    covariates::CovariateArgs,
    map::{grid_of, line, plural, round, tell_survey},
    output::Output,
    survey::SurveyArgs,
    times::TimeArgs,
};
use crate::{
    baseline::ExactGp,
    error::{Error, Result},
    geo::{
        covariates::pixel_at,
        frame::Frame,
        geotiff::Polygons,
        grid::{Grid, Mask, Window},
        survey::{Outcome, Survey},
        table::{Column, Columns, write_points},
    },
    kernel::Metric,
    likelihood,
    mapping::next::{Aim, Belief, MOST_PLACES, Proposal, exceedance},
    picture::{Mark, Palette, Picture},
    predictive::Link,
};

/// Propose the next sites to survey: those that most reduce what is not known about a threshold
///
/// A Gaussian process is fitted to the survey. Each site in turn is the one that, beside those before
/// it, leaves the least of p(1 − p) on average over the map, p being the probability that the surface exceeds
/// the threshold; without a threshold, the least variance. No outcome of the new surveys is made up: what
/// they would read is averaged over.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    survey: SurveyArgs,
    #[command(flatten)]
    covariates: CovariateArgs,
    #[command(flatten)]
    times: TimeArgs,
    /// How many sites to propose
    #[arg(long, value_name = "NUMBER", default_value_t = 10)]
    sites: usize,
    /// The level that matters, outcome units (0.2 for 20 %); without it, variance is reduced
    #[arg(long, value_name = "VALUE", allow_negative_numbers = true)]
    threshold: Option<f64>,
    /// How many a new survey would test, or its population; the median of the survey when left out
    #[arg(long, value_name = "NUMBER")]
    new_tested: Option<f64>,
    /// Only sites in here: polygons (GeoPackage, GeoJSON, Shapefile), or a raster whose pixels with data
    /// other than 0 can be reached
    #[arg(long, value_name = "FILE")]
    reachable: Option<PathBuf>,
    /// Least distance between proposed sites, and to those of the survey: 5km, 500m
    #[arg(long, value_name = "LENGTH", default_value = "0m")]
    min_distance: String,
    /// Any GeoTIFF on the grid that the map would have
    #[arg(long, value_name = "GRID.tif", conflicts_with_all = ["resolution", "crs_out"])]
    like: Option<PathBuf>,
    /// Pixel size: 5km, 500m, 0.05deg. The map is judged at 2,000 pixels at most, evenly spread
    #[arg(long, value_name = "LENGTH")]
    resolution: Option<String>,
    /// Coordinate reference system of that grid
    #[arg(long, value_name = "CRS")]
    crs_out: Option<String>,
    /// Polygons that the map would be cut to
    #[arg(long, value_name = "AREA")]
    clip: Option<PathBuf>,
    /// Directory for plan.csv, plan.gpkg, plan.png and run.json
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace the files of an earlier run in that directory
    #[arg(long)]
    force: bool,
}

const FILES: [&str; 4] = ["plan.csv", "plan.gpkg", "plan.png", crate::mapping::record::FILE];

/// Plans, from the table to the files.
///
/// # Errors
/// Anything that is wrong with the input; nothing is then left in the output directory.
pub fn run(args: &Args) -> Result<()> {
    args.covariates.for_maps()?;
    let apart = metres(&args.min_distance)?;
    if args.sites == 0 {
        return Err(Error::input("a plan of no sites is none").try_this("ask for --sites 10"));
    }
    let resolution = args.resolution.as_deref().map(str::parse).transpose()?;
    let mut output = Output::prepare(&args.out, args.force)?;
    let layer = args.survey.columns.layer.as_deref();
    let survey = args.covariates.attach(args.survey.read()?, layer)?;
    let frame = match &args.times.of(&survey)?[..] {
        [] => Frame::fit(&survey)?,
        [one] => Frame::fit(&survey)?.on(one.period.middle())?,
        several => {
            return Err(Error::input("a plan is of one time: when the new sites will be visited")
                .fact("--at", several.iter().map(|m| &m.label[..]).collect::<Vec<_>>().join(", "))
                .try_this("name one with --at"));
        }
    };
    let likelihood = likelihood::find(survey.outcome.likelihood())?;
    let link = likelihood.link();
    let aim = aim(args, link, &frame)?;
    let context = frame.observations(&survey, &Device::Cpu)?;
    let fine = grid_of(
        args.like.as_deref(),
        args.clip.as_deref(),
        args.crs_out.as_deref(),
        resolution,
        &survey,
        &frame,
    )?;
    fine.overlap(&survey.crs, &survey.x, &survey.y)?;
    let grid = coarse(&fine);
    let grid = match &frame.covariates {
        Some(design) => design.cover(grid, &mut |_, _| Ok(()))?.0,
        None => grid,
    };
    tell_survey(&survey)?;
    let gp = ExactGp::fit(&context, likelihood)?;

    let pixels: Vec<usize> = wanted(&grid);
    let (x, y): (Vec<f64>, Vec<f64>) =
        pixels.iter().map(|p| grid.centre(p / grid.cols, p % grid.cols)).unzip();
    line("grid", format!("{} pixels of {} to judge it by", pixels.len(), grid.resolution()))?;
    let places = frame.sites(&grid.crs, &x, &y, &Device::Cpu)?;
    let [mean, covariance] = gp.belief(&context, &places)?;
    let tested = tested(args, &survey, &frame);
    let noise = mean.iter().map(|m| gp.nugget + reading(*m, link, tested)).collect();
    let weight = vec![1.0; mean.len()];
    let belief = Belief { mean, covariance, noise, weight };

    let [spots, seen] = [frame.places_km(&places)?, frame.places_km(&context.sites)?];
    let far = |a: &[f64], b: &[f64]| {
        frame.geometry.ground(1000.0 * Metric::Euclidean.distance(a, b)) >= apart
    };
    let reachable = reachable(args, &grid, &x, &y)?;
    let free: Vec<bool> =
        (0..spots.len()).map(|i| reachable[i] && seen.iter().all(|s| far(s, &spots[i]))).collect();
    if !free.contains(&true) {
        return Err(Error::input("there is no place left to survey")
            .fact("pixels", spots.len())
            .fact("reachable", reachable.iter().filter(|r| **r).count())
            .fact("--min-distance", &args.min_distance)
            .try_this("choose a smaller --min-distance, a wider --reachable, or a finer grid"));
    }
    let found = belief.propose(aim, args.sites, &free, &|a, b| far(&spots[a], &spots[b]))?;
    let before = found.first().map_or(0.0, |p| p.left + p.gain);
    let unit = if aim == Aim::Variance { frame.y_sd * frame.y_sd } else { 1.0 };

    let (mut px, mut py): (Vec<f64>, Vec<f64>) =
        found.iter().map(|p| (x[p.place], y[p.place])).unzip();
    grid.crs.transform(&survey.crs, &mut px, &mut py)?;
    let outcome = |link_value: f64| link.outcome(frame.y_mean + frame.y_sd * link_value);
    let exceeds = match aim {
        Aim::Threshold(t) => exceedance(&belief, t),
        Aim::Variance => Vec::new(),
    };
    let names = if survey.crs.is_geographic() { ["lon", "lat"] } else { ["x", "y"] };
    let numbers = |of: &dyn Fn(&Proposal) -> f64| Column::Numbers(found.iter().map(of).collect());
    let mut columns = vec![
        ("order", Column::Numbers((1..=found.len()).map(|i| i as f64).collect())),
        (names[0], Column::Numbers(px.clone())),
        (names[1], Column::Numbers(py.clone())),
        ("gain", numbers(&|p| unit * p.gain)),
        ("left", numbers(&|p| unit * p.left)),
        ("predicted", numbers(&|p| outcome(belief.mean[p.place]))),
    ];
    if !exceeds.is_empty() {
        columns.push(("exceedance", numbers(&|p| exceeds[p.place])));
    }
    let (heads, cells): (Vec<String>, Vec<Column>) =
        columns.into_iter().map(|(name, column)| (name.to_string(), column)).unzip();
    let at = |i: usize| output.scratch().join(FILES[i]);
    Columns::write(at(0), &heads, [Ok(cells.clone())])?;
    write_points(&at(1), &survey.crs, [&px, &py], &heads, &cells)?;
    let what = match args.threshold {
        Some(t) => format!("p(1 − p), p = P(surface > {t})"),
        None => "variance of the surface, link scale".to_string(),
    };
    picture(&at(2), &grid, &pixels, &belief, aim, &what, [&px, &py], &survey)?;
    let effects = match &frame.covariates {
        Some(design) => {
            json!(super::covariates::effects(&frame, design, &gp.coefficients(&context)?))
        }
        None => json!(null),
    };
    let record = json!({
        "isopleth": env!("CARGO_PKG_VERSION"),
        "command": std::env::args().collect::<Vec<_>>(),
        "aim": what,
        "survey": crate::mapping::record::SurveyNote::from(&survey),
        "frame": frame,
        "process": format!("{gp:?}"),
        "coefficients": effects,
        "new_survey_tests": tested,
        "min_distance_m": apart,
        "pixels": pixels.len(),
        "before": unit * before,
        "after": found.last().map(|p| unit * p.left),
        "sites": found.len(),
        "files": FILES,
    });
    let text = serde_json::to_string_pretty(&record)
        .map_err(|e| Error::input(format!("the run record cannot be written: {e}")))?;
    std::fs::write(at(3), text + "\n").map_err(|e| Error::io("write", &args.out, e))?;
    output.publish(&FILES.map(String::from))?;

    line("aim", format!("less {what}, on average over the pixels"))?;
    if let Some(n) = tested {
        let what = if link == Link::Log { "cases expected in each" } else { "tested each" };
        line("surveys", format!("of {} {what}", round(n)))?;
    }
    for (i, p) in found.iter().enumerate() {
        let share = 100.0 * (1.0 - p.left / before.max(f64::MIN_POSITIVE));
        let text =
            format!("{:.5}, {:.5}: {share:.1} % less with it and those before", px[i], py[i]);
        line(&format!("site {}", i + 1), text)?;
    }
    if found.len() < args.sites {
        let text = format!("only {} site{} fit", found.len(), plural(found.len()));
        line("warning", format!("{text}: --min-distance and --reachable leave no more"))?;
    }
    line("files", format!("in {}: {}", args.out.display(), FILES.join(", ")))
}

/// A length in metres.
fn metres(text: &str) -> Result<f64> {
    use crate::geo::grid::Resolution;
    if text.trim_end_matches(|c: char| c.is_alphabetic()).trim() == "0" {
        return Ok(0.0);
    }
    match text.parse()? {
        Resolution::Metres(metres) => Ok(metres),
        Resolution::Degrees(_) => Err(Error::input("a distance on the ground is a length")
            .fact("--min-distance", text)
            .try_this("write 5km or 500m")),
    }
}

/// What is to become small, in model units.
fn aim(args: &Args, link: Link, frame: &Frame) -> Result<Aim> {
    let Some(threshold) = args.threshold else { return Ok(Aim::Variance) };
    let level = (link.link(threshold) - frame.y_mean) / frame.y_sd;
    match level.is_finite() {
        true => Ok(Aim::Threshold(level)),
        false => Err(Error::input("no surface can be at this threshold")
            .fact("--threshold", threshold)
            .try_this("write a prevalence between 0 and 1 (0.2 for 20 %), or a rate above 0")),
    }
}

/// What counting adds to the variance of what one survey reads, link scale²: nothing for values.
fn reading(mean: f64, link: Link, tested: Option<f64>) -> f64 {
    tested.map_or(0.0, |n| 1.0 / (n * link.slope(mean)).max(1e-6))
}

/// The size of a new survey as the model counts it: people tested, or cases expected at the overall rate.
fn tested(args: &Args, survey: &Survey, frame: &Frame) -> Option<f64> {
    let (sizes, unit) = match &survey.outcome {
        Outcome::Counts { tested, .. } => (tested, 1.0),
        Outcome::Cases { exposure, .. } => (exposure, frame.y_mean.exp()),
        Outcome::Values(_) | Outcome::Positive(_) => return None,
    };
    let mut sorted = sizes.clone();
    sorted.sort_by(f64::total_cmp);
    let size = args.new_tested.or(sorted.get(sorted.len() / 2).copied());
    size.map(|size| unit * size.max(f64::MIN_POSITIVE))
}

/// Pixels that are wanted, row-major.
fn wanted(grid: &Grid) -> Vec<usize> {
    let whole = Window { row: 0, col: 0, rows: grid.rows, cols: grid.cols };
    let valid = grid.valid(whole);
    (0..whole.len()).filter(|i| valid[*i]).collect()
}

/// A grid of larger pixels, few enough to hold their covariance; one is wanted where its centre was.
fn coarse(fine: &Grid) -> Grid {
    let least = (fine.wanted() as f64 / MOST_PLACES as f64).sqrt().ceil().max(1.0) as usize;
    let side = |f: usize| {
        let (rows, cols) = (fine.rows.div_ceil(f), fine.cols.div_ceil(f));
        let mut mask = Mask::none(rows, cols);
        for row in 0..rows {
            for col in 0..cols {
                let at =
                    [(row * f + f / 2).min(fine.rows - 1), (col * f + f / 2).min(fine.cols - 1)];
                let has = fine.valid.as_ref().is_none_or(|mask| mask.get(at[0], at[1]));
                mask.set(row, col, has);
            }
        }
        let pixel = fine.pixel.map(|p| p * f as f64);
        Grid { rows, cols, pixel, valid: Some(mask), ..fine.clone() }
    };
    (least..).map(side).find(|grid| grid.wanted() <= MOST_PLACES).unwrap_or_else(|| fine.clone())
}

/// Which pixels may be surveyed.
fn reachable(args: &Args, grid: &Grid, x: &[f64], y: &[f64]) -> Result<Vec<bool>> {
    let Some(file) = &args.reachable else { return Ok(vec![true; x.len()]) };
    let extension = file.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    if ["gpkg", "geojson", "json", "shp", "fgb"].contains(&extension.as_str()) {
        let polygons = Polygons::read(file, &grid.crs)?;
        let whole = Window { row: 0, col: 0, rows: grid.rows, cols: grid.cols };
        let inside = polygons.cover(grid, whole)?;
        return Ok(wanted(grid).into_iter().map(|i| inside[i]).collect());
    }
    let values = pixel_at(file, &grid.crs, x, y)?;
    Ok(values.iter().map(|v| !v.is_nan() && *v != 0.0).collect())
}

/// What is not known now, with the survey's sites as rings and the proposed ones filled.
#[allow(clippy::too_many_arguments)]
fn picture(
    path: &Path,
    grid: &Grid,
    pixels: &[usize],
    belief: &Belief,
    aim: Aim,
    what: &str,
    [px, py]: [&[f64]; 2],
    survey: &Survey,
) -> Result<()> {
    let n = pixels.len();
    let mut values = Array2::from_elem((grid.rows, grid.cols), f64::NAN);
    let exceeds = match aim {
        Aim::Threshold(t) => Some(exceedance(belief, t)),
        Aim::Variance => None,
    };
    for (i, pixel) in pixels.iter().enumerate() {
        values[(pixel / grid.cols, pixel % grid.cols)] = match &exceeds {
            Some(p) => p[i] * (1.0 - p[i]),
            None => belief.covariance[i * n + i],
        };
    }
    let to_grid = |x: &[f64], y: &[f64]| -> Result<[Vec<f64>; 2]> {
        let (mut x, mut y) = (x.to_vec(), y.to_vec());
        survey.crs.transform(&grid.crs, &mut x, &mut y)?;
        Ok([x, y])
    };
    let ([sx, sy], [px, py]) = (to_grid(&survey.x, &survey.y)?, to_grid(px, py)?);
    let highest = values.iter().copied().filter(|v| !v.is_nan()).fold(0.0, f64::max);
    let mut picture =
        Picture::new(format!("Now: {what}"), values).on(grid).with_sites(grid, &sx, &sy, None);
    let proposed =
        Picture::new("", Array2::from_elem((1, 1), 0.0)).with_sites(grid, &px, &py, None);
    // On top of the others, in the colour of the highest value.
    let filled = proposed.marks.into_iter().map(|m| Mark { value: Some(highest), ..m });
    picture.marks.extend(filled);
    picture.palette = Palette::Spread;
    picture.range = Some([0.0, highest]);
    picture.subtitle = format!("{} survey sites, {} proposed (filled)", survey.len(), px.len());
    picture.legend = "survey site; filled: proposed".into();
    picture.save(path)
}
