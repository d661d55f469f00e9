//! `isopleth map`: condition a process on a survey and write maps over a grid.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use candle_core::Device;
use serde_json::{Value, json};

use super::{
    cards::DeviceArgs,
    covariates::{self, CovariateArgs, effects},
    draws::Joint,
    output::Output,
    reading::ReadingArgs,
    report::{self, Findings},
    say,
    survey::{SurveyArgs, agree, agree_in_time, at_home, default_model},
    times::{self, TimeArgs},
    trust::{self, StrictArgs},
    windows::{self, WindowArgs},
};
use crate::{
    attention::{Reading, Tally},
    baseline::{Coefficients, IntegratedGp, NearestGp, Regressed},
    checkpoint::Checkpoint,
    error::{Error, Result},
    geo::{
        covariates::Cover,
        crs::Crs,
        displacement::Displacement,
        frame::Frame,
        geotiff::{self, Band, Cog, Polygons, Raster},
        grid::{Extent, Grid, Resolution},
        survey::{self, Survey},
        table::Columns,
        time::Moment,
    },
    kernel::{Displaced, Kernel},
    likelihood::{self, Likelihood},
    mapping::{
        self, Plan,
        displaced::{self, Expected, Placed},
        plan::{self, Bytes, Needs},
        record::{self, ProductNote, Record, TimeNote},
        windows::{Cut, Windows},
    },
    picture::{Palette, Picture, series},
    predictive::{Link, Of},
    process::{Memory, Posterior, Process},
    product::{self, Outcome, Scale, Spec},
    sites::Observations,
    task::design::Design,
    train::trust::{Finding, Verdict},
};

/// Map prevalence and its uncertainty from a table of survey sites
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(super) survey: SurveyArgs,
    #[command(flatten)]
    pub(super) covariates: CovariateArgs,
    #[command(flatten)]
    pub(super) times: TimeArgs,
    /// Any GeoTIFF on the grid to predict over; its pixels without data stay without
    #[arg(long, value_name = "GRID.tif", conflicts_with_all = ["resolution", "crs_out"])]
    pub(super) like: Option<PathBuf>,
    /// Pixel size: 5km, 500m, 0.05deg. About 250,000 pixels when left out
    #[arg(long, value_name = "LENGTH")]
    pub(super) resolution: Option<String>,
    /// Coordinate reference system of the maps; the survey's, or an equal-area plane where that is
    /// longitude and latitude
    #[arg(long, value_name = "CRS")]
    crs_out: Option<String>,
    /// Polygons to map inside of: GeoPackage, GeoJSON, Shapefile
    #[arg(long, value_name = "AREA")]
    pub(super) clip: Option<PathBuf>,
    /// Model by name or file; `gp` fits an exact Gaussian process, `vecchia` one of nearest
    /// neighbours for many sites, `vecchia-trend` that with a trend along the coordinates. `prevalence` for counts and `continuous` for values when left out
    #[arg(long, value_name = "NAME|FILE")]
    pub(super) model: Option<String>,
    /// Also map the probability of exceeding this, outcome units (0.2 for 20 %); may be repeated
    #[arg(long, value_name = "VALUE", value_delimiter = ',', allow_negative_numbers = true)]
    threshold: Vec<f64>,
    /// Products: mean, sd, quantile:0.9, interval:0.95, exceedance:0.2 (`isopleth list products`)
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "mean,sd,quantile:0.025,quantile:0.975,interval:0.95"
    )]
    products: Vec<String>,
    /// What maps are of: the surface, or an observation: a new village's own level, or one more value.
    /// What a survey of so many would count: `isopleth predict --new-survey N`
    #[arg(long, default_value = "surface", value_parser = ["surface", "observation"])]
    of: String,
    /// Also draw so many surfaces from the joint posterior, into one GeoTIFF with a band for each
    #[arg(long, value_name = "NUMBER")]
    draws: Option<usize>,
    /// What the draws' random numbers start from: the same number, the same draws
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Directory for the GeoTIFFs, pictures and the run record
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace the files of an earlier run in that directory
    #[arg(long)]
    force: bool,
    /// Pixels along a tile's side, 256 unless --memory is short; changes memory use, never the map
    #[arg(long, value_name = "PIXELS")]
    pub(super) tile: Option<usize>,
    /// The most memory to take: 2GiB, 512MiB, 4GB. Changes memory use and speed, never the map
    #[arg(long, value_name = "AMOUNT")]
    pub(super) memory: Option<String>,
    #[command(flatten)]
    pub(super) reading: ReadingArgs,
    #[command(flatten)]
    pub(super) windows: WindowArgs,
    /// Write no PNG pictures
    #[arg(long)]
    no_pictures: bool,
    /// Write report.html too, one page to send on: maps, calibration at held-out sites, variogram of
    /// what was missed, data, methods, run record
    #[arg(long, conflicts_with = "no_pictures")]
    report: bool,
    /// Table of districts to show in the report, as `isopleth areas` writes it
    #[arg(long, value_name = "TABLE", requires = "report")]
    districts: Option<PathBuf>,
    #[command(flatten)]
    strict: StrictArgs,
    #[command(flatten)]
    pub(super) device: DeviceArgs,
}

/// Share of the sites' longer side by which a map reaches beyond them, without --like or --clip.
const MARGIN: f64 = 0.05;

/// Maps, from the table to the files.
///
/// # Errors
/// Anything that is wrong with the input; nothing is then left in the output directory.
pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    // What costs nothing to check comes first.
    let specs = specs(args)?;
    args.covariates.for_maps()?;
    if args.draws.is_some() && args.of != "surface" {
        return Err(Error::input(
            "draws are of the surface: new sites have no joint law to draw from",
        )
        .try_this("leave --of observation out, or --draws"));
    }
    let reading = args.reading.reading()?;
    let resolution = args.resolution.as_deref().map(str::parse).transpose()?;
    let budget: Option<Bytes> = args.memory.as_deref().map(str::parse).transpose()?;
    args.districts.as_ref().map(Columns::read).transpose()?;
    let mut output = Output::prepare(&args.out, args.force)?;
    let cards = args.device.open(args.model.as_deref(), reading)?;
    // Before any raster is opened: GDAL takes its cache once and for all.
    let cache = geotiff::cache(plan::cache(budget)) << 20;

    let layer = args.survey.columns.layer.as_deref();
    let survey = args.covariates.attach(args.survey.read()?, layer)?;
    let moments = args.times.of(&survey)?;
    let frame = Frame::fit(&survey)?;
    let context = frame.observations(&survey, &Device::Cpu)?;
    let outcome = outcome(args, &survey);
    specs.iter().try_for_each(|spec| spec.check(outcome.link))?;
    let grid = grid(args, resolution, &survey, &frame)?;
    let inside = overlap(&grid, &survey)?;
    let times = moments.len().max(1);
    args.draws.map_or(Ok(()), |draws| super::draws::check_disk([draws, times], &grid))?;
    let (grid, cover) = cover(grid, &frame, output.scratch())?;
    let how = (reading, &args.windows);
    let (mut model, others) =
        open_models(args.model.as_deref(), &survey, &frame, &context, &cards.devices, how)?;
    model.note_effects(&frame);
    let processes = model.with(&others);
    // What judging takes comes after, and is given back for the map to use.
    let resident = plan::usage().map_or(plan::RESIDENT, |usage| usage.now.0);
    let called = args.model.as_deref().unwrap_or(default_model(&survey));
    let verdict = model.suits(trust::examine(called, &survey, &frame)?);
    args.strict.settle(called, &survey, &verdict)?;
    tell_input(&survey, &grid, &frame, &model)?;
    let labels: Vec<String> = moments.iter().map(|m| m.label.clone()).collect();
    if !labels.is_empty() {
        line("times", shown(&labels))?;
    }

    let mut plan = Plan { of: outcome.of, ..Plan::on(cards.devices.clone()) };
    plan.tile = args.tile.unwrap_or(plan.tile);
    plan.targets = model.targets(&plan);
    if let Some(budget) = budget {
        let needs = Needs {
            resident,
            cache,
            // On cards, the processor only makes products of what comes back.
            process: match plan.is_cpu() {
                true => model.process.memory(survey.len()),
                false => Memory { conditioning: 0, held: 0, target: 1 << 10 },
            },
            sites: survey.len(),
            products: specs.len(),
        };
        plan = plan.within(budget, &needs, args.tile.is_some())?;
    }
    if let Some(room) = plan.room() {
        let room = budget.map_or(room, |budget| budget.min(room));
        plan = plan.within_cards(room, &model.process.memory(survey.len()));
    }
    let tags = [("MODEL".to_string(), model.name.clone())];
    let mut products = product::open_at(&specs, &outcome, &grid, output.scratch(), &tags, &labels)?;
    let posteriors = plan.condition_each(&processes, &context)?;
    let asked: Vec<&dyn Posterior> = posteriors.iter().map(|p| &**p).collect();
    let mut bar = Bar::new();
    // One pass over the grid for each time; a survey without times is one pass.
    let passes: Vec<Option<&Moment>> = match &moments[..] {
        [] => vec![None],
        moments => moments.iter().map(Some).collect(),
    };
    let frames = times::frames(&frame, &moments)?;
    let mut found = Vec::with_capacity(passes.len());
    for (band, now) in frames.iter().enumerate() {
        products.iter_mut().for_each(|product| product.turn_to(band));
        found.push(mapping::run_each(
            &asked,
            &context,
            &grid,
            now,
            &mut products,
            &plan,
            &mut |done, of| bar.show(band * of + done, passes.len() * of),
        )?);
    }
    bar.clear();
    let summary = mapping::Summary::over(&found)?;
    let seen = |m: &Moment| survey.times.as_ref().map_or(0, |t| m.period.count(&t.days));
    let each = moments.iter().zip(&found).map(|(m, s)| TimeNote::new(m, s, seen(m))).collect();
    let tallies = asked.iter().filter_map(|p| p.tally());
    let left_out = tallies.reduce(|a, b| [a[0] + b[0], a[1] + b[1]]);
    let left_out = left_out.map(|[read, all]| Tally { read, all }.skipped());
    let mut made = Vec::new();
    if let Some(draws) = args.draws {
        let map = (&grid, &frames[0], &cards.devices[0]);
        let joint = Joint::prepare(&model, asked[0], (&survey, &context), map, draws)?;
        let conditioned = joint.condition(&context)?;
        let field = joint.field(asked[0], conditioned.as_deref(), args.seed, &grid, &frames[0])?;
        let tags = super::draws::tags(&model.name, &outcome, args.seed, &joint);
        let how = [args.tile.unwrap_or(plan.tile), plan.workers];
        let mut bar = Bar::new();
        let mut files = Vec::new();
        // One surface through all times: draw 5 of one file is draw 5 of every other.
        for (pass, (moment, now)) in passes.iter().zip(&frames).enumerate() {
            let surfaces = joint.surfaces(asked[0], &cards.devices[0], &*field, outcome.link, now);
            let when = moment.map_or(String::new(), |m| format!(" in {}", m.label));
            let title =
                |i: usize| format!("Draw {i} of {}{when}, {}", outcome.name, outcome.whose());
            let bands: Vec<Band> = (1..=draws)
                .map(|i| Band { description: title(i), unit: outcome.unit.clone() })
                .collect();
            let name = super::draws::file(moment.map(|m| &m.label[..]));
            let file = output.scratch().join(&name);
            super::draws::write(&surfaces, &grid, &file, &bands, &tags, how, &mut |done, of| {
                bar.show(pass * of + done, passes.len() * of)
            })?;
            files.push(name);
            if !args.no_pictures {
                let look = (title(1), Scale::Level, true);
                let drawn = picture(&file, look, *moment, &outcome, &survey, &grid, &model.name)?;
                files.extend(drawn.file_name().and_then(|f| f.to_str()).map(String::from));
            }
        }
        bar.clear();
        made.push(ProductNote {
            product: format!("draws:{draws}"),
            description: format!("{draws} joint draws of {}; {}", outcome.name, joint.about),
            unit: outcome.unit.clone(),
            files,
        });
    }
    drop(asked);
    drop(posteriors); // its memory is better spent on finishing the files

    for product in products {
        let spec = product.spec();
        let mut files = vec![product.finish()?];
        if !args.no_pictures {
            let title = match outcome.band(&spec) {
                band if ["", "1"].contains(&band.unit.as_str()) => band.description,
                band => format!("{} ({})", band.description, band.unit),
            };
            // Only a map of levels has the colours of what was observed.
            let look = (title, spec.entry.scale, spec.entry.name == "mean");
            files.push(match &moments[..] {
                [] => picture(&files[0], look, None, &outcome, &survey, &grid, &model.name)?,
                [one] => {
                    picture(&files[0], look, Some(one), &outcome, &survey, &grid, &model.name)?
                }
                times => pictures(&files[0], look, times, &outcome, &survey, &grid, &model.name)?,
            });
        }
        let band = outcome.band(&spec);
        made.push(ProductNote {
            product: spec.to_string(),
            description: band.description,
            unit: band.unit,
            files: files.iter().filter_map(|f| f.file_name()?.to_str().map(String::from)).collect(),
        });
    }
    if cover.is_some() {
        let (description, unit) = (extrapolation().description, String::new());
        let files = vec![EXTRAPOLATION.to_string()];
        made.push(ProductNote { product: "extrapolation".into(), description, unit, files });
    }
    let mut record = Record {
        isopleth: env!("CARGO_PKG_VERSION").into(),
        command: std::env::args().collect(),
        model: model.card.clone(),
        of: outcome.of,
        survey: (&survey).into(),
        frame: frame.clone(),
        grid: (&grid).into(),
        products: made,
        warnings: [
            cards.warnings(summary.cut_to),
            cover.as_ref().map_or_else(Vec::new, Cover::warnings),
            trust::warnings(&verdict),
            warnings(&survey, &grid, &frame, inside, &summary),
            times::warnings(&survey, &moments),
        ]
        .concat(),
        summary,
        times: each,
        covariates: cover,
        trust: Some(json!(verdict)),
        reading,
        left_out,
        report: None,
        device: Some(cards.record()),
        plan: Some((&plan).into()),
        memory_mib: budget.map(Bytes::mebibytes),
        peak_memory_mib: plan::usage().map(|usage| usage.peak.mebibytes()),
        seconds: 0.0,
    };
    record.seconds = (start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
    if args.report {
        record.report = Some(report::FILE.into());
        report::write(&Findings {
            record: &record,
            survey: &survey,
            model: called,
            windows: &args.windows,
            outcome: &outcome.name,
            folder: output.scratch(),
            districts: args.districts.as_deref(),
        })?;
    }
    record.write(output.scratch())?;
    output.publish(&record.files())?;
    tell_output(&args.out, &outcome, &survey, &record)
}

/// The raster of how far pixels lie outside the covariates seen at sites.
const EXTRAPOLATION: &str = "extrapolation.tif";

fn extrapolation() -> Band {
    Band {
        description:
            "How far covariates lie outside the values seen at sites, in units of their range"
                .into(),
        unit: "1".into(),
    }
}

/// The grid without the pixels that lack a covariate, and what was found; beside the maps, how far each
/// pixel lies outside what was seen at sites.
fn cover(grid: Grid, frame: &Frame, folder: &Path) -> Result<(Grid, Option<Cover>)> {
    let Some(design) = &frame.covariates else { return Ok((grid, None)) };
    let mut raster = Cog::create(&folder.join(EXTRAPOLATION), &grid, &extrapolation(), &[])?;
    let (grid, cover) = design.cover(grid, &mut |window, values| raster.write(window, values))?;
    raster.finish()?;
    Ok((grid, Some(cover)))
}

/// What was asked for, thresholds included, each once.
fn specs(args: &Args) -> Result<Vec<Spec>> {
    let asked = args.products.iter().map(|p| p.parse());
    let thresholds = args.threshold.iter().map(|t| format!("exceedance:{t}").parse());
    let mut specs: Vec<Spec> = Vec::new();
    for spec in asked.chain(thresholds) {
        let spec = spec?;
        if !specs.contains(&spec) {
            specs.push(spec);
        }
    }
    Ok(specs)
}

pub(super) fn outcome(args: &Args, survey: &Survey) -> Outcome {
    let of = if args.of == "surface" { Of::Surface } else { Of::Observation };
    let columns = &args.survey.columns;
    let named = |name: &Option<String>| name.clone().unwrap_or_else(|| "value".into());
    let (name, unit, link) = match &survey.outcome {
        survey::Outcome::Counts { .. } => ("prevalence".into(), "1".into(), Link::Logit),
        survey::Outcome::Cases { per, .. } => {
            ("rate".into(), format!("cases per {per}"), Link::Log)
        }
        survey::Outcome::Values(_) => (named(&columns.value), String::new(), Link::Identity),
        survey::Outcome::Positive(_) => (named(&columns.log_value), String::new(), Link::Log),
    };
    Outcome { name, unit, link, of }
}

/// The grid of the raster asked for; `crs` is the sites'.
pub(super) fn like(args: &Args, crs: &Crs) -> Result<Grid> {
    match &args.like {
        Some(like) if crs.is_local() => Grid::read_local(like, crs),
        Some(like) => Grid::read(like),
        None => Err(Error::input("no raster was given whose pixels could be used")),
    }
}

/// The grid asked for: that of a raster, or one that covers the area or the sites.
pub(super) fn grid(
    args: &Args,
    resolution: Option<Resolution>,
    survey: &Survey,
    frame: &Frame,
) -> Result<Grid> {
    let Args { like, clip, crs_out, .. } = args;
    grid_of(like.as_deref(), clip.as_deref(), crs_out.as_deref(), resolution, survey, frame)
}

/// The same from what it is made of.
pub(super) fn grid_of(
    like: Option<&Path>,
    clip: Option<&Path>,
    crs_out: Option<&str>,
    resolution: Option<Resolution>,
    survey: &Survey,
    frame: &Frame,
) -> Result<Grid> {
    frame.geometry.cut(whole_grid(like, clip, crs_out, resolution, survey, frame)?)
}

fn whole_grid(
    like: Option<&Path>,
    clip: Option<&Path>,
    crs_out: Option<&str>,
    resolution: Option<Resolution>,
    survey: &Survey,
    frame: &Frame,
) -> Result<Grid> {
    if let Some(like) = like {
        let grid = if survey.crs.is_local() {
            Grid::read_local(like, &survey.crs)?
        } else {
            Grid::read(like)?
        };
        return match clip {
            Some(area) => grid.clip(area),
            None => Ok(grid),
        };
    }
    let crs = match (crs_out, resolution) {
        (Some(crs), _) => Crs::from_user(crs)?,
        (None, Some(Resolution::Degrees(_))) if survey.crs.is_geographic() => survey.crs.clone(),
        (None, Some(Resolution::Degrees(_))) if !survey.crs.is_local() => {
            Crs::from_user("EPSG:4326")?
        }
        // Of a plane about sites more than 60° from their middle, little would be seen at the edges.
        _ if survey.crs.is_geographic() && frame.is_worldwide() => survey.crs.clone(),
        _ if survey.crs.is_geographic() => frame.plane.clone(),
        _ => survey.crs.clone(),
    };
    if let Some(area) = clip {
        let polygons = Polygons::read(area, &crs)?;
        return Grid::cover(polygons.extent, &crs, resolution)?.clip_to(&polygons);
    }
    let (mut x, mut y) = (survey.x.clone(), survey.y.clone());
    survey.crs.transform(&crs, &mut x, &mut y)?;
    let extent =
        Extent::of(&x, &y).ok_or_else(|| Error::input("the sites have no finite coordinates"))?;
    let extent = extent.grow(MARGIN);
    let extent = if crs.is_geographic() { extent.on_globe() } else { extent };
    Grid::cover(extent, &crs, resolution)
}

/// How many sites lie on the grid.
///
/// # Errors
/// [`Error::Input`] if none does; with the remedy, where they would if x and y changed places.
fn overlap(grid: &Grid, survey: &Survey) -> Result<usize> {
    grid.overlap(&survey.crs, &survey.x, &survey.y).map_err(|error| {
        let degrees = !survey.crs.is_geographic() || survey.x.iter().all(|x| x.abs() <= 90.0);
        match degrees && grid.overlap(&survey.crs, &survey.y, &survey.x).is_ok() {
            true => error.try_this(
                "the two coordinates look swapped: with x and y exchanged the sites lie on the grid; \
                 name the columns with --lon and --lat",
            ),
            false => error,
        }
    })
}

/// A process that is ready, with what is known about it.
pub(super) struct Model {
    pub name: String,
    pub process: Box<dyn Process + Send + Sync>,
    /// For the run record.
    pub card: Value,
    /// What covariates do, where the survey has some.
    pub coefficients: Option<Coefficients>,
    /// How it reads the survey.
    pub likelihood: &'static dyn Likelihood,
    /// How the survey is cut, where it is not read at once.
    pub windows: Option<Cut>,
}

impl Model {
    /// Writes into the card what the covariates do.
    pub fn note_effects(&mut self, frame: &Frame) {
        if let (Some(design), Some(coefficients)) = (&frame.covariates, &self.coefficients) {
            self.card["coefficients"] = json!(effects(frame, design, coefficients));
        }
    }

    /// How many targets it is best asked about at once.
    pub fn targets(&self, plan: &Plan) -> usize {
        match self.windows {
            Some(_) => plan.targets.max(mapping::windows::TARGETS_AT_ONCE),
            None => plan.targets,
        }
    }

    /// A verdict without what windows put right: that there are too many sites.
    pub fn suits(&self, verdict: Verdict) -> Verdict {
        let right = |f: &Finding| self.windows.is_none() || f.about != trust::SITES;
        Verdict { findings: verdict.findings.into_iter().filter(right).collect(), ..verdict }
    }

    /// Writes into the card how fast the surface changes, in days.
    fn note_change(&mut self, frame: &Frame) {
        if let (Some(clock), Some(scale)) = (&frame.clock, self.card["time"]["scale"].as_f64()) {
            self.card["time"]["days"] = json!(scale * clock.days_per_unit);
        }
    }

    /// How fast the surface changes, where that was fitted.
    pub fn tell_change(&self) -> Result<()> {
        let number = |key: &str| self.card.get("time").and_then(|time| time[key].as_f64());
        let (Some(days), Some(share)) = (number("days"), number("static_share")) else {
            return Ok(());
        };
        line("change", times::change(days, share))
    }

    /// The effects, a line each, and how they came in.
    pub fn tell_effects(&self) -> Result<()> {
        let each = self.card.get("coefficients").and_then(Value::as_array);
        for (i, effect) in each.into_iter().flatten().enumerate() {
            let number = |key: &str| effect[key].as_f64().unwrap_or(f64::NAN);
            let per = effect.get("per").and_then(Value::as_f64);
            let per = per.map_or(String::new(), |per| format!(" per sd ({})", round(per)));
            let name = effect["of"].as_str().unwrap_or_default();
            let text = format!("{name}: {:+.3} ± {:.3}{per}", number("mean"), number("sd"));
            line(if i == 0 { "effects" } else { "" }, text)?;
        }
        Ok(())
    }

    /// That the survey is read in windows, where it is.
    pub fn tell_windows(&self, sites: usize) -> Result<()> {
        self.windows.iter().try_for_each(|cut| line("windows", windows::about(cut, sites)))
    }

    /// Its process and those of the other devices, in their order.
    pub fn with<'a>(&'a self, others: &'a [Model]) -> Vec<&'a (dyn Process + Send + Sync)> {
        std::iter::once(self).chain(others).map(|model| &*model.process).collect()
    }
}

/// The same model on every device, as [`open_model`]: the first, and the others.
pub(super) fn open_models(
    name: Option<&str>,
    survey: &Survey,
    frame: &Frame,
    context: &Observations,
    devices: &[Device],
    how: (Reading, &WindowArgs),
) -> Result<(Model, Vec<Model>)> {
    let open = |device: &Device| open_model(name, survey, frame, context, device, how);
    let (first, others) = devices.split_first().unwrap_or((&Device::Cpu, &[]));
    Ok((open(first)?, others.iter().map(open).collect::<Result<_>>()?))
}

/// A trained model by name or file, or a Gaussian process fitted to the context; either integrated over
/// where the survey's sites may stand.
pub(super) fn open_model(
    name: Option<&str>,
    survey: &Survey,
    frame: &Frame,
    context: &Observations,
    device: &Device,
    (reading, windows): (Reading, &WindowArgs),
) -> Result<Model> {
    let likelihood = survey.outcome.likelihood();
    let name = name.unwrap_or(default_model(survey));
    let wanted: &'static dyn Likelihood = likelihood::find(likelihood)?;
    let moved = survey.displacement.as_ref().map(|moved| frame.displacement(moved));
    if let Some(mut classical) = classical(name, context, wanted, reading, moved.as_ref())? {
        windows.refused(name)?;
        classical.note_change(frame);
        return Ok(classical);
    }
    let checkpoint = Checkpoint::resolve(name)?;
    agree(name, checkpoint.likelihood()?, survey)?;
    let tasks = checkpoint.recipe()?.tasks()?;
    agree_in_time(name, tasks.design().has_times(), survey)?;
    if tasks.dim() != 2 {
        return Err(Error::input("the model was trained on sites along a line, not on a plane")
            .fact("model", name)
            .try_this("`isopleth list models` shows the models for maps"));
    }
    let reads = covariates::reads(name, checkpoint.covariates(), survey)?;
    let process = checkpoint.process_reading(device, reading)?;
    at_home(name, &*process, survey)?;
    let cut = windows.of(&checkpoint, context.len())?;
    let process = cut_into(process, wanted, cut)?;
    let (process, coefficients): (Box<dyn Process + Send + Sync>, _) =
        match (moved, &context.sites.x) {
            (Some(moved), _) => (Box::new(placed(process, tasks.design(), moved)), None),
            (None, None) => (process, None),
            (None, Some(_)) if reads => (process, None),
            (None, Some(_)) => {
                let (coefficients, _) = Coefficients::of(context, wanted)?;
                let betas = coefficients.spread()?;
                (Box::new(Regressed::new(process.into(), betas, wanted, true)), Some(coefficients))
            }
        };
    let mut card = serde_json::to_value(&checkpoint.card)
        .map_err(|e| Error::input(format!("the model's card cannot be written: {e}")))?;
    if let Some(cut) = cut {
        card["windows"] = json!(cut);
    }
    let name = checkpoint.card.name.clone();
    Ok(Model { name, process, card, coefficients, likelihood: wanted, windows: cut })
}

/// A trained process, read in windows where it is to be.
pub(super) fn cut_into(
    process: Box<dyn Process + Send + Sync>,
    likelihood: &'static dyn Likelihood,
    cut: Option<Cut>,
) -> Result<Box<dyn Process + Send + Sync>> {
    Ok(match cut {
        Some(cut) => Box::new(Windows::new(process.into(), likelihood, cut)?),
        None => process,
    })
}

/// A classical process fitted to the context, where `name` is one.
fn classical(
    name: &str,
    context: &Observations,
    likelihood: &'static dyn Likelihood,
    reading: Reading,
    moved: Option<&Displacement>,
) -> Result<Option<Model>> {
    if !FITTED.contains(&name) {
        return Ok(None);
    }
    if reading != Reading::default() {
        return Err(Error::input("a Gaussian process is read in full and in double precision")
            .try_this("leave --lose and --precision out, or use a trained model"));
    }
    let mut card = json!({ "name": name, "predicts": "", "likelihood": likelihood.name() });
    let Fitted { process, about, coefficients } = fit(name, context, likelihood, moved)?;
    card["predicts"] = json!(format!("{}, fitted to this survey by maximum likelihood", about.0));
    about.1.into_iter().for_each(|(key, value)| card[key] = value);
    let process: Box<dyn Process + Send + Sync> = match moved {
        Some(moved) => Box::new(Expected::new(process, moved.clone())),
        None => process,
    };
    let name = name.to_string();
    Ok(Some(Model { name, process, card, coefficients, likelihood, windows: None }))
}

/// A classical process with what its card says.
pub(super) struct Fitted {
    pub process: Box<dyn Process + Send + Sync>,
    about: (&'static str, Vec<(&'static str, Value)>),
    coefficients: Option<Coefficients>,
}

/// Models that are fitted to the survey they are given: no file, no training.
pub(super) const FITTED: [&str; 3] = ["gp", "vecchia", TREND];
/// The nearest-neighbour Gaussian process whose mean is linear in the coordinates.
pub(super) const TREND: &str = "vecchia-trend";

/// Fits one of [`FITTED`] to a context, with its covariates where it has some.
pub(super) fn fit(
    name: &str,
    context: &Observations,
    likelihood: &'static dyn Likelihood,
    moved: Option<&Displacement>,
) -> Result<Fitted> {
    let covariates = context.sites.x.is_some();
    if name == "gp" {
        let all = exact(context, likelihood, moved.filter(|_| !covariates))?;
        let gp = all.likeliest();
        let coefficients = if covariates { Some(Coefficients::given(gp, context)?) } else { None };
        let mut facts = vec![
            ("kernels", json!(all.len())),
            ("kernel", json!(format!("{:?}", gp.kernel))),
            ("nugget", json!(gp.nugget)),
            ("log_marginal", json!(gp.log_marginal)),
        ];
        facts.extend(in_time(&*gp.kernel, 1.0));
        if covariates {
            facts.push(("coefficient_variance", json!(gp.coefficient_variance)));
        }
        let about = ("exact Gaussian process", facts);
        return Ok(Fitted { process: Box::new(all), about, coefficients });
    }
    let facts = |gp: &NearestGp| {
        let mut facts = vec![
            ("kernel", json!(format!("{:?}", gp.kernel))),
            ("nugget", json!(gp.nugget)),
            ("log_marginal", json!(gp.log_marginal)),
            ("neighbours", json!({ "fitting": gp.previous, "predicting": gp.near })),
        ];
        facts.extend(in_time(&*gp.kernel, gp.stretch));
        facts
    };
    let trend = name == TREND;
    let what = match trend {
        true => "nearest-neighbour Gaussian process with a linear trend",
        false => "nearest-neighbour Gaussian process",
    };
    Ok(if covariates {
        let (all, coefficients, gp) = Regressed::nearest(context, likelihood, trend)?;
        let about = (what, facts(&gp));
        Fitted { process: Box::new(all), about, coefficients: Some(coefficients) }
    } else {
        let gp = nearest(context, likelihood, moved, trend)?;
        let about = (what, facts(&gp));
        Fitted { process: Box::new(gp), about, coefficients: None }
    })
}

/// How a fitted kernel changes with time, in model units of time that were stretched by a factor.
fn in_time(kernel: &dyn Kernel, stretch: f64) -> Option<(&'static str, Value)> {
    let change = kernel.change()?;
    let scale = change.time_scale / stretch;
    Some(("time", json!({ "scale": scale, "static_share": change.static_share })))
}

/// A trained process whose context is displaced: it has learned to read it, or is asked about places.
pub(super) fn placed(
    process: Box<dyn Process + Send + Sync>,
    design: &Design,
    moved: Displacement,
) -> Placed {
    match design.displaces() {
        true => Placed::learned(process, moved),
        false => Placed::new(process, moved, 1),
    }
}

/// The exact Gaussian process fitted to a context, whose sites may be displaced: the most likely, and what
/// else the context leaves open.
pub(super) fn exact(
    context: &Observations,
    likelihood: &'static dyn Likelihood,
    moved: Option<&Displacement>,
) -> Result<IntegratedGp> {
    let Some(moved) = moved else { return IntegratedGp::fit(context, likelihood) };
    let of = |kernel| Ok(Box::new(Displaced::new(kernel, &moved.laws)?) as Box<dyn Kernel>);
    IntegratedGp::fit_as(&displaced::marked(context, moved)?, likelihood, &of)
}

/// The nearest-neighbour Gaussian process fitted to a context, whose sites may be displaced, with or
/// without a trend.
pub(super) fn nearest(
    context: &Observations,
    likelihood: &'static dyn Likelihood,
    moved: Option<&Displacement>,
    trend: bool,
) -> Result<NearestGp> {
    let Some(moved) = moved else {
        return NearestGp::fit_as(context, likelihood, &|kernel| Ok(Box::new(kernel)), trend);
    };
    let of = |kernel| Ok(Box::new(Displaced::new(kernel, &moved.laws)?) as Box<dyn Kernel>);
    NearestGp::fit_as(&displaced::marked(context, moved)?, likelihood, &of, trend)
}

/// What the user should know before believing the map.
fn warnings(
    survey: &Survey,
    grid: &Grid,
    frame: &Frame,
    inside: usize,
    summary: &mapping::Summary,
) -> Vec<String> {
    let sites = survey.x.len();
    let mut warnings = grid.notes.clone();
    // On an equal-area plane the scale at angle c from the centre is off by up to 1/cos(c/2) − 1.
    let angle = 0.5 * frame.extent_km() / 6371.0;
    let off = 1.0 / (0.5 * angle.min(3.0)).cos() - 1.0;
    if off > 0.01 && frame.geometry.is_plane() && !survey.crs.is_local() {
        warnings.push(format!(
            "the survey spans {:.0} km, wider than a plane can hold: on it distances are off by up \
             to {:.0} %; leave --distance plane or --displacement out, or map regions on their own",
            frame.extent_km(),
            (100.0 * off).ceil(),
        ));
    }
    if inside < sites {
        warnings.push(format!(
            "{} of {sites} sites lie outside the grid; they inform the map all the same",
            sites - inside
        ));
    }
    if summary.far > 0.05 {
        warnings.push(format!(
            "{:.0} % of the pixels are more than {} km from every site: there the map shows \
             little but the model's prior",
            100.0 * summary.far,
            round(summary.reach_km),
        ));
    }
    warnings
}

/// Three significant digits.
pub(super) fn round(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let decimals = (2.0 - value.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.decimals$}");
    let text =
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    text.to_string()
}

/// One line of the summary, its name in a column.
pub(super) fn line(name: &str, text: impl std::fmt::Display) -> Result<()> {
    say(format!("{name:<11} {text}"))
}

/// What of the survey is used, what is not and why, and what was guessed.
pub(super) fn tell_survey(survey: &Survey) -> Result<()> {
    let used = survey.x.len();
    line("survey", format!("{}: {used} sites used", survey.source.display()))?;
    for (i, spec) in survey.covariates.iter().flat_map(|c| &c.specs).enumerate() {
        line(if i == 0 { "covariates" } else { "" }, spec)?;
    }
    if !survey.dropped.is_empty() {
        // Which row a row repeats is worth a line where they are few.
        let repeats = |reason: &str| reason.starts_with("repeats row");
        let many = survey.dropped.iter().filter(|d| repeats(&d.reason)).count() > 3;
        let mut reasons: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for dropped in &survey.dropped {
            let reason = match many && repeats(&dropped.reason) {
                true => "repeat an earlier row: same place, same outcome",
                false => &dropped.reason,
            };
            reasons.entry(reason).or_default().push(dropped.row);
        }
        for (reason, rows) in reasons {
            let shown: Vec<String> = rows.iter().take(8).map(usize::to_string).collect();
            let more = if rows.len() > 8 { ", …" } else { "" };
            let text = format!("{reason}: row{} {}{more}", plural(rows.len()), shown.join(", "));
            line("dropped", format!("{} row{}, {text}", rows.len(), plural(rows.len())))?;
        }
    }
    survey.notes.iter().try_for_each(|n| line("note", n))?;
    if let Some(times) = &survey.times {
        line("visited", format!("{} ({})", times.about(), times.column))?;
    }
    match &survey.displacement {
        None => Ok(()),
        Some(moved) => line("displaced", format!("{moved}: integrated over")),
    }
}

pub(super) fn tell_input(survey: &Survey, grid: &Grid, frame: &Frame, model: &Model) -> Result<()> {
    tell_survey(survey)?;
    let (mut x, mut y) = (survey.x.clone(), survey.y.clone());
    if !frame.geometry.is_plane() {
        let (wide, about) = (round(frame.extent_km()), frame.geometry.about());
        line("region", format!("{wide} km, sites in {}, distances {about}", survey.crs.name()))?;
    } else {
        survey.crs.transform(&frame.plane, &mut x, &mut y)?;
    }
    if let Some(extent) = Extent::of(&x, &y).filter(|_| frame.geometry.is_plane()) {
        let km = |length: f64| round(length * frame.plane.metres_per_unit() / 1000.0);
        let (wide, high) = (km(extent.width()), km(extent.height()));
        line("region", format!("{wide} × {high} km, sites in {}", survey.crs.name()))?;
    }
    line(
        "grid",
        format!(
            "{} × {} pixels of {}, {} to map, {}",
            grid.cols,
            grid.rows,
            grid.resolution(),
            grid.wanted(),
            grid.crs.name()
        ),
    )?;
    let what = model.card.get("predicts").and_then(Value::as_str).unwrap_or("");
    line("model", format!("{}: {what}", model.name))?;
    model.tell_windows(survey.len())?;
    model.tell_change()?;
    model.tell_effects()
}

/// Times of which a line is printed.
const LISTED: usize = 12;

fn tell_output(out: &Path, outcome: &Outcome, survey: &Survey, record: &Record) -> Result<()> {
    let s = &record.summary;
    let range = |low: f64, high: f64| format!("{} … {}", round(low), round(high));
    let seen = survey.outcome.observed();
    let low = seen.iter().copied().fold(f64::INFINITY, f64::min);
    let high = seen.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    line(
        &outcome.name,
        format!(
            "{}: {}, on average {}; observed {}",
            outcome.whose(),
            range(s.lowest, s.highest),
            round(s.average),
            range(low, high)
        ),
    )?;
    for time in record.times.iter().take(LISTED) {
        let average = format!("on average {}", round(time.average));
        let sites = format!("{} site{} visited then", time.sites, plural(time.sites));
        line(
            "",
            format!("{}: {average}, {}; {sites}", time.time, range(time.lowest, time.highest)),
        )?;
    }
    if record.times.len() > LISTED {
        line("", format!("and {} more times, in {}", record.times.len() - LISTED, record::FILE))?;
    }
    record.warnings.iter().try_for_each(|w| line("warning", w))?;
    line("files", format!("in {}", out.display()))?;
    // A picture lies beside its raster and differs in the ending only.
    let names = |p: &ProductNote| {
        let (pictures, rasters): (Vec<&String>, Vec<&String>) =
            p.files.iter().partition(|file| file.ends_with(".png"));
        let ending = if pictures.is_empty() { "" } else { ", .png" };
        match &rasters[..] {
            [first, .., last] => format!("{first} … {last}{ending}"),
            one => one.iter().map(|raster| format!("{raster}{ending}")).collect(),
        }
    };
    let rows = record.products.iter().map(|p| (names(p), p.description.clone()));
    let page =
        record.report.clone().map(|file| (file, "Maps, calibration, methods: to send on".into()));
    let whole = (record::FILE.to_string(), "What was asked, used and found".to_string());
    let rows: Vec<_> = rows.chain(page).chain([whole]).collect();
    let width = rows.iter().map(|(files, _)| files.len()).max().unwrap_or(0);
    rows.iter().try_for_each(|(files, what)| line("", format!("{files:width$}  {what}")))?;
    if let Some(device) = record.device.as_ref().filter(|d| d.card_memory_mib.is_some()) {
        let peak = device.card_memory_mib.map(|mib| format!("; {mib:.0} MiB at most"));
        line("device", format!("{}{}", device.used.join(", "), peak.unwrap_or_default()))?;
    }
    if let Some(peak) = record.peak_memory_mib {
        let allowed = record.memory_mib.map(|mib| format!(" of the {mib:.0} MiB allowed"));
        line("memory", format!("{peak:.0} MiB at most{}", allowed.unwrap_or_default()))?;
    }
    line("time", format!("{:.1} s", record.seconds))
}

pub(super) fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// Labels in one line, the middle ones left out where there are many.
pub(super) fn shown(labels: &[String]) -> String {
    match labels {
        [first, second, .., last] if labels.len() > 8 => {
            format!("{}: {first}, {second} … {last}", labels.len())
        }
        _ => labels.join(", "),
    }
}

/// A picture of a grid with the sites of a time, or all of them, and colours of a scale; sites are coloured
/// by what was observed of `outcome` where so asked.
fn with_survey(
    picture: Picture,
    (scale, coloured): (Scale, bool),
    moment: Option<&Moment>,
    outcome: &str,
    survey: &Survey,
    grid: &Grid,
) -> Result<Picture> {
    let here = survey.visited(moment);
    let pick = |v: &[f64]| here.iter().map(|i| v[*i]).collect::<Vec<f64>>();
    let (mut x, mut y, seen) = (pick(&survey.x), pick(&survey.y), pick(&survey.outcome.observed()));
    survey.crs.transform(&grid.crs, &mut x, &mut y)?;
    let mut picture = picture.on(grid).with_sites(grid, &x, &y, coloured.then_some(&seen));
    let which = if moment.is_some() { "survey site of that time" } else { "survey site" };
    picture.legend = match coloured {
        true => format!("{which}, coloured by observed {outcome}"),
        false => which.into(),
    };
    (picture.palette, picture.range) = colours(scale);
    Ok(picture)
}

/// Draws every band of a product, each with the sites of its time, side by side.
fn pictures(
    file: &Path,
    (title, scale, coloured): (String, Scale, bool),
    times: &[Moment],
    outcome: &Outcome,
    survey: &Survey,
    grid: &Grid,
    model: &str,
) -> Result<PathBuf> {
    let shrink = (grid.rows.max(grid.cols) as f64 / 450.0).max(1.0);
    let [rows, cols] = [grid.rows, grid.cols].map(|n| ((n as f64 / shrink) as usize).max(1));
    let raster = Raster::open(file)?;
    let one = |(band, moment): (usize, &Moment)| -> Result<Picture> {
        let picture = Picture::new(&moment.label, raster.thumbnail_of(band, rows, cols)?);
        with_survey(picture, (scale, coloured), Some(moment), &outcome.name, survey, grid)
    };
    let all = (1..).zip(times).map(one).collect::<Result<Vec<_>>>()?;
    let subtitle =
        format!("{} sites · pixels of {} · model {model}", survey.len(), grid.resolution());
    let path = file.with_extension("png");
    series::save(&title, &subtitle, &all, &path)?;
    Ok(path)
}

/// Palette of a scale, and its ends where they are fixed.
fn colours(scale: Scale) -> (Palette, Option<[f64; 2]>) {
    match scale {
        Scale::Level => (Palette::Level, None),
        Scale::Spread | Scale::Distance => (Palette::Spread, None),
        Scale::Share => (Palette::Spread, Some([0.0, 1.0])),
        Scale::Probability => (Palette::Diverging, Some([0.0, 1.0])),
    }
}

/// Draws a product beside its GeoTIFF: its title, what its values are, and whether sites are coloured
/// by what was observed.
fn picture(
    file: &Path,
    (title, scale, coloured): (String, Scale, bool),
    moment: Option<&Moment>,
    outcome: &Outcome,
    survey: &Survey,
    grid: &Grid,
    model: &str,
) -> Result<PathBuf> {
    let shrink = (grid.rows.max(grid.cols) as f64 / 900.0).max(1.0);
    let [rows, cols] = [grid.rows, grid.cols].map(|n| ((n as f64 / shrink) as usize).max(1));
    let values = Raster::open(file)?.thumbnail(rows, cols)?;
    let (look, picture) = ((scale, coloured), Picture::new(title, values));
    let mut picture = with_survey(picture, look, moment, &outcome.name, survey, grid)?;
    let when = moment.map_or(String::new(), |m| format!("{} · ", m.label));
    picture.subtitle =
        format!("{when}{} sites · pixels of {} · model {model}", survey.len(), grid.resolution());
    let path = file.with_extension("png");
    picture.save(&path)?;
    Ok(path)
}

/// Progress on a terminal, in place; nothing where nobody watches.
pub(super) struct Bar {
    shown: Option<Instant>,
    watched: bool,
}

impl Bar {
    pub fn new() -> Self {
        Bar { shown: None, watched: std::io::stderr().is_terminal() }
    }

    pub fn show(&mut self, done: usize, of: usize) {
        let due = self.shown.is_none_or(|t| t.elapsed() > Duration::from_millis(200));
        if self.watched && due {
            self.shown = Some(Instant::now());
            let percent = 100.0 * done as f64 / of.max(1) as f64;
            let _ =
                write!(std::io::stderr().lock(), "\rmapping     {percent:3.0} % of {of} pixels ");
        }
    }

    pub fn clear(&self) {
        if self.watched && self.shown.is_some() {
            let _ = write!(std::io::stderr().lock(), "\r{:60}\r", "");
        }
    }
}
