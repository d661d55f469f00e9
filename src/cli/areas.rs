//! `isopleth areas`: district means with intervals, from joint draws of a map.

use std::{path::PathBuf, time::Instant};

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use super::{
    Cli, Command,
    draws::Joint,
    map::{self, Bar, line, plural, round, shown},
    times,
};
use crate::{
    error::{Error, Result},
    geo::{
        areas::{self, Areas},
        covariates::Cover,
        cover::Shape,
        crs::Crs,
        frame::Frame,
        geotiff,
        grid::{Extent, Grid},
        people::{Measure, People},
        table::Column,
    },
    mapping::{
        Plan, areas as means,
        areas::{Area, Question, Said},
        draws,
        plan::{self, Bytes},
        record::{self, GridNote, Record, SurveyNote},
    },
    process::Posterior,
    product::Spec,
    whole,
};

/// Means over districts with intervals, and the people above a threshold, from joint draws
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Folder of a finished map: the same survey, model and pixels are used
    #[arg(long, value_name = "DIR", required_unless_present = "words", conflicts_with = "words")]
    map: Option<PathBuf>,
    /// Polygons: GeoPackage, GeoJSON, Shapefile, FlatGeobuf; their columns are kept
    #[arg(long, value_name = "FILE")]
    areas: PathBuf,
    /// Layer of the polygons, where there are several
    #[arg(long, value_name = "LAYER")]
    areas_layer: Option<String>,
    /// Raster of people, on any grid: means are of people, and those at risk are counted. Means of
    /// the area itself when left out
    #[arg(long, value_name = "RASTER")]
    population: Option<PathBuf>,
    /// What that raster holds, where the file does not say: counts (people in each cell) or density
    /// (people per km²)
    #[arg(long, value_name = "KIND", requires = "population")]
    population_is: Option<String>,
    /// Also the probability that an area's mean exceeds this, and who lives above it, outcome units
    /// (0.2 for 20 %); may be repeated
    #[arg(long, value_name = "VALUE", value_delimiter = ',', allow_negative_numbers = true)]
    threshold: Vec<f64>,
    /// Level of the intervals
    #[arg(long, value_name = "LEVEL", default_value_t = 0.95)]
    level: f64,
    /// Joint draws of the surface
    #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
    draws: usize,
    /// What the draws' random numbers start from: the same number, the same table
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Table to write: .gpkg or .parquet with the outlines, .csv without
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace the table if it is there
    #[arg(long)]
    force: bool,
    /// In place of --map: what `isopleth map` would be told, such as --surveys survey.csv
    #[arg(last = true, value_name = "MAP FLAGS")]
    words: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  isopleth areas --map out --areas districts.gpkg --population pop.tif --out districts-out.gpkg
  isopleth areas --areas districts.gpkg --out table.csv -- --surveys survey.csv --resolution 5km";

/// What a map was, or would be, told.
fn told(args: &Args) -> Result<(map::Args, Option<Record>)> {
    let parse = |words: Vec<String>| match Cli::try_parse_from(words) {
        Ok(Cli { command: Command::Map(args) }) => Ok(*args),
        Ok(_) => Err("it is of another command".to_string()),
        Err(error) => {
            let said = error.to_string();
            Err(said.lines().next().unwrap_or_default().trim_start_matches("error: ").to_string())
        }
    };
    let Some(folder) = &args.map else {
        let mut words = vec!["isopleth".to_string(), "map".into()];
        words.extend(args.words.iter().cloned());
        // A map is made nowhere.
        words.extend(["--out".into(), "unused".into()]);
        let told = parse(words).map_err(|why| {
            Error::input("what follows -- is not what `isopleth map` can be told")
                .fact("reason", why)
                .try_this(
                    "for example: isopleth areas --areas a.gpkg --out a.csv -- --surveys s.csv",
                )
        })?;
        return Ok((told, None));
    };
    let file = folder.join(record::FILE);
    let text = std::fs::read_to_string(&file).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::input("there is no finished map in that folder")
            .fact("no file", file.display())
            .try_this("make one with `isopleth map`, or give its flags after --"),
        _ => Error::io("read", &file, e),
    })?;
    let refuse = |why: String| {
        Error::input("the record of that map cannot be used")
            .fact("file", file.display())
            .fact("reason", why)
            .try_this("map again with this version, or give the flags of the map after --")
    };
    let record: Record = serde_json::from_str(&text).map_err(|e| refuse(e.to_string()))?;
    Ok((parse(record.command.clone()).map_err(refuse)?, Some(record)))
}

/// Refuses inputs that are no longer those of a finished map.
fn unchanged(record: Option<&Record>, sites: usize, grid: &Grid) -> Result<()> {
    let Some(record) = record else { return Ok(()) };
    if record.survey.used == sites && record.grid == GridNote::from(grid) {
        return Ok(());
    }
    let pixels =
        |rows: usize, cols: usize, wanted: usize| format!("{rows} × {cols}, {wanted} mapped");
    Err(Error::input("the inputs of that map have changed since it was made")
        .fact("sites then and now", format!("{} and {sites}", record.survey.used))
        .fact("pixels then", pixels(record.grid.rows, record.grid.cols, record.grid.wanted))
        .fact("pixels now", pixels(grid.rows, grid.cols, grid.wanted()))
        .try_this("map again, or bring the files back"))
}

/// The pixels to ask about: the map's own, or without any said those around the areas. What was
/// clipped is not left out: pixels count by the share of them that is covered.
fn pixels(told: &map::Args, mapped: Grid, areas: &Areas) -> Result<Grid> {
    if told.like.is_some() {
        return match told.clip {
            Some(_) => map::like(told, &mapped.crs),
            None => Ok(mapped),
        };
    }
    if told.clip.is_some() {
        return Ok(Grid { valid: None, ..mapped });
    }
    let (x, y) = areas.corners(&mapped.crs)?;
    let Some(extent) = Extent::of(&x, &y) else { return Ok(mapped) };
    let asked = told.resolution.as_deref().map(str::parse).transpose()?;
    let (held, near) = (mapped.extent(), mapped.extent().grow(0.5));
    let inside = |of: Extent| {
        of.contains(extent.west, extent.south) && of.contains(extent.east, extent.north)
    };
    // Of a layer that goes on far beyond, only what the map holds is about the survey.
    if inside(held) || !inside(near) {
        return Ok(mapped);
    }
    Grid::cover(extent, &mapped.crs, Some(asked.unwrap_or(mapped.resolution())))
}

/// District means, from the inputs of a map to the table.
///
/// # Errors
/// Anything that is wrong with the input; nothing is then left where the table would be.
pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    // What costs nothing to check comes first.
    check(args)?;
    let measure: Option<Measure> = args.population_is.as_deref().map(str::parse).transpose()?;
    let (told, record) = told(args)?;
    let resolution = told.resolution.as_deref().map(str::parse).transpose()?;
    let reading = told.reading.reading()?;
    let cards = told.device.open(told.model.as_deref(), reading)?;
    let budget: Option<Bytes> = told.memory.as_deref().map(str::parse).transpose()?;
    geotiff::cache(plan::cache(budget));

    told.covariates.for_maps()?;
    let layer = told.survey.columns.layer.as_deref();
    let survey = told.covariates.attach(told.survey.read()?, layer)?;
    let moments = told.times.of(&survey)?;
    let frame = Frame::fit(&survey)?;
    let frames = times::frames(&frame, &moments)?;
    let context = frame.observations(&survey, &Device::Cpu)?;
    let outcome = map::outcome(&told, &survey);
    args.threshold.iter().try_for_each(|t| Spec::exceedance(*t).check(outcome.link))?;
    // A map leaves out the pixels that lack a covariate, and so do means: of other pixels too.
    let covered = |grid: Grid| match &frame.covariates {
        Some(design) => design.cover(grid, &mut |_, _| Ok(())).map(|(g, c)| (g, Some(c))),
        None => Ok((grid, None)),
    };
    let mapped = map::grid(&told, resolution, &survey, &frame)?;
    let mapped = if record.is_some() { covered(mapped)?.0 } else { mapped };
    unchanged(record.as_ref(), survey.len(), &mapped)?;
    let local = survey.crs.is_local().then_some(&survey.crs);
    let areas = Areas::read(&args.areas, args.areas_layer.as_deref(), local)?;
    let (grid, cover) = covered(frame.geometry.cut(pixels(&told, mapped, &areas)?)?)?;
    let shapes = areas.shapes(&grid)?;
    let population = args.population.as_deref();
    // No plane about a place holds the whole world: there, an equal-area cylinder.
    let plane = match frame.is_worldwide() && grid.crs.is_geographic() {
        true => Crs::from_user("EPSG:6933")?,
        false => frame.plane.clone(),
    };
    let people = population.map(|file| People::read(file, &grid, measure, &plane)).transpose()?;

    let (mut model, others) = map::open_models(
        told.model.as_deref(),
        &survey,
        &frame,
        &context,
        &cards.devices,
        (reading, &told.windows),
    )?;
    model.note_effects(&frame);
    map::tell_input(&survey, &grid, &frame, &model)?;
    let plan = Plan::on(cards.devices.clone());
    let posteriors = plan.condition_each(&model.with(&others), &context)?;
    let asked: &dyn Posterior = &*posteriors[0];
    let map = (&grid, &frames[0], &cards.devices[0]);
    let joint = Joint::prepare(&model, asked, (&survey, &context), map, args.draws)?;
    let conditioned = joint.condition(&context)?;
    let field = joint.field(asked, conditioned.as_deref(), args.seed, &grid, &frames[0])?;
    let question = Question {
        shapes: &shapes,
        people: people.as_ref().map(|people| &people.pixels[..]),
        plane: &plane,
        thresholds: &args.threshold,
    };
    let tile = draws::tile(told.tile.unwrap_or(plan::TILE), args.draws);
    let mut bar = Bar::new();
    let (mut x, mut y) = (survey.x.clone(), survey.y.clone());
    survey.crs.transform(&grid.crs, &mut x, &mut y)?;
    let place = |(x, y): (&f64, &f64)| {
        [(x - grid.origin[0]) / grid.pixel[0], (y - grid.origin[1]) / grid.pixel[1]]
    };
    let sites: Vec<[f64; 2]> = x.iter().zip(&y).map(place).collect();
    let (mut found, mut notes): (Vec<Area>, Vec<String>) = Default::default();
    let mut columns: Vec<(String, Column)> = Vec::new();
    for (pass, now) in frames.iter().enumerate() {
        let surfaces = joint.surfaces(asked, &cards.devices[0], &*field, outcome.link, now);
        let how = [tile, plan.workers];
        let here = means::run(&surfaces, &grid, &question, how, &mut |done, of| {
            bar.show(pass * of + done, frames.len() * of)
        })?;
        if here.iter().all(|area| area.means.is_empty()) {
            bar.clear();
            return Err(Error::input("none of the areas lies on the map")
                .fact("areas", format!("{} in {}", areas.len(), areas.source.display()))
                .fact("map", format!("{:?} ({})", grid.extent(), grid.crs.name()))
                .try_this("check that both are about the same place"));
        }
        let moment = moments.get(pass);
        let visited = survey.visited(moment);
        let count = |shape: &Shape| {
            let inside = |i: &&usize| shape.contains(sites[**i][0], sites[**i][1]);
            visited.iter().filter(inside).count() as f64
        };
        notes = here
            .iter()
            .zip(&areas.notes)
            .map(|(area, read)| note(area, read, people.is_some()))
            .collect();
        let table = Table {
            args,
            now: &here,
            before: (moments.len() > 1).then_some(&found),
            time: moment.map(|m| &m.label[..]),
            sites: shapes.iter().map(count).collect(),
            notes: &notes,
            counted: people.is_some(),
            outcome: &outcome.name,
        };
        let more = table.columns();
        match columns.is_empty() {
            true => columns = more,
            false => {
                columns.iter_mut().zip(more).for_each(|((_, all), (_, more))| all.extend(more));
            }
        }
        found = here;
    }
    bar.clear();
    areas.repeated(frames.len()).write(&args.out, &columns)?;

    let covered = cover.as_ref().map_or_else(Vec::new, Cover::warnings);
    let warnings = [
        covered,
        warnings(&areas, &found, &notes, people.as_ref()),
        times::warnings(&survey, &moments),
    ]
    .concat();
    let note = json!({
        "isopleth": env!("CARGO_PKG_VERSION"),
        "command": std::env::args().collect::<Vec<_>>(),
        "model": model.card,
        "dependence": joint.about,
        "correlation_error": field.error(),
        "survey": SurveyNote::from(&survey),
        "grid": GridNote::from(&grid),
        "covariates": cover,
        "areas": {
            "file": areas.source.display().to_string(),
            "layer": areas.layer,
            "crs": areas.crs.name(),
            "rows": areas.len(),
            "on_the_map": found.iter().filter(|area| !area.means.is_empty()).count(),
        },
        "population": people.as_ref().map(|people| json!({
            "file": people.source.display().to_string(),
            "measure": people.measure,
            "asked": people.asked,
            "people": found.iter().map(|area| area.people).sum::<f64>(),
        })),
        "times": moments.iter().map(|m| &m.label[..]).collect::<Vec<_>>(),
        "draws": args.draws,
        "seed": args.seed,
        "level": args.level,
        "thresholds": args.threshold,
        "columns": columns.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(),
        "warnings": warnings,
        "peak_memory_mib": plan::usage().map(|usage| usage.peak.mebibytes()),
        "seconds": (start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
    });
    let mut beside = args.out.file_name().unwrap_or_default().to_os_string();
    beside.push(format!(".{}", record::FILE));
    let text = serde_json::to_string_pretty(&note)
        .map_err(|e| Error::io("write", &args.out, std::io::Error::other(e)))?;
    whole::write_bytes(&args.out.with_file_name(beside), (text + "\n").as_bytes())?;
    if !moments.is_empty() {
        let labels: Vec<String> = moments.iter().map(|m| m.label.clone()).collect();
        line("times", shown(&labels))?;
    }
    tell(args, &areas, &found, people.as_ref(), &joint, &warnings, start)
}

/// What can be refused before anything is read.
fn check(args: &Args) -> Result<()> {
    areas::check_name(&args.out)?;
    if args.draws < 2 {
        return Err(Error::input("an interval needs several draws")
            .fact("--draws", args.draws)
            .try_this("ask for 1000"));
    }
    if !(args.level > 0.0 && args.level < 1.0) {
        return Err(Error::input("the level of an interval lies between 0 and 1")
            .fact("--level", args.level)
            .try_this("for 95 % write 0.95"));
    }
    // What lies outside is told by a few draws.
    let outside = args.draws as f64 * (0.5 - 0.5 * args.level);
    if outside < 2.0 {
        return Err(Error::input("so few draws say little of so wide an interval")
            .fact("draws outside, on each side", round(outside))
            .try_this(format!(
                "ask for --draws {:.0} or more",
                (4.0 / (1.0 - args.level)).ceil()
            )));
    }
    if args.out.exists() && !args.force {
        return Err(Error::input("the table is there already")
            .fact("out", args.out.display())
            .try_this("choose another --out, or replace it with --force"));
    }
    Ok(())
}

/// What the user should know of one area.
fn note(area: &Area, read: &str, counted: bool) -> String {
    let mut notes: Vec<String> = Vec::new();
    if !read.is_empty() {
        notes.push(read.into());
    }
    let here = if counted && !area.by_size {
        [area.unmapped[1], area.people]
    } else {
        [area.unmapped[0], area.km2]
    };
    let left_out = here[0] / (here[0] + here[1]);
    if area.means.is_empty() {
        notes.push("no pixel on the map".into());
        return notes.join("; ");
    }
    if left_out > 0.01 {
        let of = if counted && !area.by_size { "its people" } else { "it" };
        notes.push(format!("{:.0} % of {of} on pixels without data", 100.0 * left_out));
    }
    if area.beyond > 0.01 {
        notes.push(format!("{:.0} % of it beyond the map", 100.0 * area.beyond));
    }
    if counted && area.by_size {
        notes.push("nobody lives there: the mean is of the area".into());
    }
    notes.join("; ")
}

/// What the table says of every area, at one time where there are times.
struct Table<'a> {
    args: &'a Args,
    now: &'a [Area],
    /// The same areas at the time before; nobody for the first of several times.
    before: Option<&'a Vec<Area>>,
    time: Option<&'a str>,
    sites: Vec<f64>,
    notes: &'a [String],
    counted: bool,
    outcome: &'a str,
}

impl Table<'_> {
    fn columns(self) -> Vec<(String, Column)> {
        let Table { args, now: found, before, time, sites, notes, counted, outcome } = self;
        let level = format!("{:.6}", 100.0 * args.level);
        let level = level.trim_end_matches('0').trim_end_matches('.');
        let numbers = |f: &dyn Fn(&Area) -> f64| Column::Numbers(found.iter().map(f).collect());
        let mut all: Vec<(String, Column)> = Vec::new();
        if let Some(time) = time {
            all.push(("time".into(), Column::Text(vec![time.to_string(); found.len()])));
        }
        let interval = |stem: &str, sd: bool, draws: &dyn Fn(usize) -> Vec<f64>| {
            let said: Vec<Option<Said>> =
                (0..found.len()).map(|i| Said::of(&draws(i), args.level)).collect();
            let part = |f: fn(&Said) -> f64| {
                Column::Numbers(said.iter().map(|s| s.as_ref().map_or(f64::NAN, f)).collect())
            };
            let (first, next) = match stem {
                "" => ("mean".to_string(), String::new()),
                stem => (stem.to_string(), format!("{stem}_")),
            };
            let mut columns = vec![(first, part(|s| s.mean))];
            if sd {
                columns.push((format!("{next}sd"), part(|s| s.sd)));
            }
            columns.push((format!("{next}lower_{level}"), part(|s| s.lower)));
            columns.push((format!("{next}upper_{level}"), part(|s| s.upper)));
            columns
        };
        all.extend(interval("", true, &|i| found[i].means.clone()));
        for t in &args.threshold {
            let exceeds = numbers(&|area| means::exceedance(&area.means, *t));
            all.push((format!("exceedance_{t}"), exceeds));
        }
        if let Some(before) = before {
            // Of each draw, which is one surface through all times.
            let changes: Vec<Vec<f64>> = (0..found.len())
                .map(|i| match before.get(i) {
                    Some(before) => found[i]
                        .means
                        .iter()
                        .zip(&before.means)
                        .map(|(now, then)| now - then)
                        .collect(),
                    None => Vec::new(),
                })
                .collect();
            all.extend(interval("change", false, &|i| changes[i].clone()));
            let grows = changes.iter().map(|change| means::exceedance(change, 0.0)).collect();
            all.push(("p_increase".into(), Column::Numbers(grows)));
        }
        if counted {
            let on_map = |area: &Area| if area.means.is_empty() { f64::NAN } else { area.people };
            all.push(("population".into(), numbers(&on_map)));
            let total = match outcome {
                "prevalence" => Some("positive"),
                "rate" => Some("cases"),
                _ => None,
            };
            if let Some(total) = total {
                let of_all = |i: usize| -> Vec<f64> {
                    found[i].means.iter().map(|mean| mean * found[i].people).collect()
                };
                all.extend(interval(total, false, &of_all));
            }
            for (i, t) in args.threshold.iter().enumerate() {
                // Of an area in which nobody lives, weights are sizes and no people.
                let at_risk = |k: usize| match found[k].above.get(i) {
                    Some(above) if found[k].by_size => vec![0.0; above.len()],
                    Some(above) => above.clone(),
                    None => Vec::new(),
                };
                all.extend(interval(&format!("at_risk_{t}"), false, &at_risk));
            }
        }
        all.push(("sites".into(), Column::Numbers(sites)));
        all.push(("pixels".into(), numbers(&|area| area.pixels)));
        all.push(("km2".into(), numbers(&|area| area.km2)));
        all.push(("note".into(), Column::Text(notes.to_vec())));
        all
    }
}

/// What the user should know before believing the table.
fn warnings(
    areas: &Areas,
    found: &[Area],
    notes: &[String],
    people: Option<&People>,
) -> Vec<String> {
    let mut warnings = people.map_or(Vec::new(), |people| people.notes.clone());
    let off = found.iter().filter(|area| area.means.is_empty()).count();
    if off > 0 {
        warnings.push(format!(
            "{off} of {} areas have no pixel on the map: their rows are empty",
            areas.len()
        ));
    }
    let other =
        notes.iter().zip(found).filter(|(n, a)| !n.is_empty() && !a.means.is_empty()).count();
    if other > 0 {
        warnings.push(format!("the column note says more of {other} area{}", plural(other)));
    }
    warnings
}

fn tell(
    args: &Args,
    areas: &Areas,
    found: &[Area],
    people: Option<&People>,
    joint: &Joint,
    warnings: &[String],
    start: Instant,
) -> Result<()> {
    let on = found.iter().filter(|area| !area.means.is_empty()).count();
    line("areas", format!("{}: {on} of {} on the map", areas.source.display(), areas.len()))?;
    if let Some(people) = people {
        let kind = match people.measure {
            Measure::Counts => "people in each cell",
            Measure::Density => "people per km²",
        };
        let how = if people.asked { "as you say" } else { "as the file says" };
        let total: f64 = found.iter().map(|area| area.people).sum();
        line(
            "population",
            format!("{}: {kind}, {how}; {total:.0} people in the areas", people.source.display()),
        )?;
    }
    line("draws", format!("{} of the surface, {}", args.draws, joint.about))?;
    warnings.iter().try_for_each(|w| line("warning", w))?;
    line("table", args.out.display())?;
    if let Some(usage) = plan::usage() {
        line("memory", format!("{:.0} MiB at most", usage.peak.mebibytes()))?;
    }
    line("time", format!("{:.1} s", start.elapsed().as_secs_f64()))
}
