//! `isopleth map --report`: one HTML page that can be sent on alone: maps, calibration, methods.
//!
//! Pictures are inside the page, and it asks nothing of any network.

use std::{
    fmt::{Display, Write},
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use candle_core::Device;

use super::{
    map::{TREND, round},
    validate::{self, report::Report},
    windows::WindowArgs,
};
use crate::{
    error::{Error, Result},
    geo::{
        survey::Survey,
        table::{Column, Columns},
    },
    kernel::Metric,
    mapping::record::{ProductNote, Record},
    picture::curves::{self, Band, Chart, Curve},
    predictive::{Of, normal_quantile},
    rng::Stream,
    score::pit,
    whole,
};

/// Name of the page in an output directory.
pub(super) const FILE: &str = "report.html";

/// Random folds that the page validates by.
const FOLDS: usize = 5;
/// Fewest sites that are held out at all.
const FEWEST: usize = 20;
/// Distance classes of the variogram.
const CLASSES: usize = 12;
/// Permutations behind the variogram's band.
const SHUFFLES: usize = 199;
/// Most rows of a table of districts.
const ROWS: usize = 500;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;color:#26262c;max-width:1080px;margin:2em auto;padding:0 1em}\
    h1{font-size:1.7em;margin-bottom:.1em}h2{margin-top:2em;border-bottom:1px solid #ddd}\
    .warn{background:#fff3e0;border-left:5px solid #d55e00;padding:.6em 1em;margin:.6em 0}\
    .maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(430px,1fr));gap:14px}\
    figure{margin:0}figcaption{color:#666;font-size:.9em}img{max-width:100%;height:auto}\
    table{border-collapse:collapse;font-size:.92em}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #eee}\
    td:first-child,th:first-child{text-align:left}.scroll{max-height:32em;overflow:auto}\
    pre{background:#f6f6f7;padding:1em;overflow:auto;font-size:.8em}.small{color:#666;font-size:.9em}";

/// What a page is made from.
pub(super) struct Findings<'a> {
    /// The run.
    pub record: &'a Record,
    /// Its survey.
    pub survey: &'a Survey,
    /// Model by name or file.
    pub model: &'a str,
    /// How a large survey is read.
    pub windows: &'a WindowArgs,
    /// What is mapped: "prevalence".
    pub outcome: &'a str,
    /// Where the record's files lie.
    pub folder: &'a Path,
    /// A table of districts, as `isopleth areas` writes it.
    pub districts: Option<&'a Path>,
}

/// Writes the page into the folder.
///
/// # Errors
/// Those of validating the model on the survey's sites; [`Error::Io`] if the disk refuses.
pub(super) fn write(found: &Findings) -> Result<()> {
    let page = page(found)?;
    whole::write_bytes(&found.folder.join(FILE), page.as_bytes())
}

/// Text as HTML shows it.
fn escape(text: impl Display) -> String {
    let text = text.to_string();
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A PNG inside the page.
fn image(file: &Path, about: &str) -> Result<String> {
    let bytes = std::fs::read(file).map_err(|e| Error::io("read", file, e))?;
    let about = escape(about);
    Ok(format!(
        "<figure><img alt=\"{about}\" src=\"data:image/png;base64,{}\"><figcaption>{about}</figcaption></figure>\n",
        STANDARD.encode(bytes)
    ))
}

fn row(out: &mut String, tag: &str, cells: &[String]) {
    let cells = cells.iter().map(|c| format!("<{tag}>{}</{tag}>", escape(c)));
    let _ = writeln!(out, "<tr>{}</tr>", cells.collect::<String>());
}

fn page(found: &Findings) -> Result<String> {
    let Findings { record, survey, outcome, .. } = found;
    let mut out = String::new();
    let w = &mut out;
    let whose = match record.of {
        Of::Surface => "the surface",
        Of::Observation => "what a survey at a new site would find",
    };
    let _ = writeln!(
        w,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}: {1}</title><style>{STYLE}</style></head><body>\n\
         <h1>{0}, mapped from {2} sites</h1>\n<p class=\"small\">{1} · maps of {whose} · Isopleth {3}</p>",
        escape(capital(outcome)),
        escape(survey.source.file_name().map_or_else(String::new, |n| n.to_string_lossy().into())),
        survey.len(),
        escape(&record.isopleth),
    );
    for warning in &record.warnings {
        let _ = writeln!(w, "<p class=\"warn\"><b>Warning.</b> {}</p>", escape(warning));
    }
    let _ = writeln!(w, "<h2>Maps</h2>\n<div class=\"maps\">");
    for ProductNote { description, files, .. } in &record.products {
        for file in files.iter().filter(|f| f.ends_with(".png")) {
            w.push_str(&image(&found.folder.join(file), description)?);
        }
    }
    let _ = writeln!(
        w,
        "</div>\n<p>Circles are the sites, in the colour of what was observed there. On average {} is {} over the map, \
         from {} to {}; {:.0} % of the map lies more than {} km from every site.</p>",
        escape(outcome),
        round(record.summary.average),
        round(record.summary.lowest),
        round(record.summary.highest),
        100.0 * record.summary.far,
        round(record.summary.reach_km),
    );
    times(w, found);
    held_out(w, found)?;
    if let Some(file) = found.districts {
        districts(w, file)?;
    }
    data(w, found);
    let _ =
        writeln!(w, "<h2>Methods</h2>\n<p>{}</p>\n<ol class=\"small\">", escape(methods(found)));
    for source in SOURCES {
        let _ = writeln!(w, "<li>{}</li>", escape(source));
    }
    let text = serde_json::to_string_pretty(record)
        .map_err(|e| Error::input(format!("the run record cannot be written: {e}")))?;
    let _ = writeln!(
        w,
        "</ol>\n<h2>Run record</h2>\n<details><summary>Everything that was asked, used and found</summary>\
         <pre>{}</pre></details>\n</body></html>",
        escape(text)
    );
    Ok(out)
}

/// What the maps hold time by time.
fn times(w: &mut String, found: &Findings) {
    let times = &found.record.times;
    if times.is_empty() {
        return;
    }
    let _ = writeln!(
        w,
        "<p>Each map is of several times, a band of its GeoTIFF each; pictures show the sites visited in each.</p>\n\
         <div class=\"scroll\"><table>"
    );
    row(w, "th", &["", "stands for it", "sites", "average", "lowest", "highest"].map(String::from));
    for time in times {
        let values = [time.average, time.lowest, time.highest].map(round);
        let cells = [time.time.clone(), time.day.clone(), time.sites.to_string()];
        row(w, "td", &[&cells[..], &values[..]].concat());
    }
    let _ = writeln!(w, "</table></div>");
}

/// The first letter large.
fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |c| c.to_uppercase().chain(letters).collect())
}

/// Whether the intervals can be believed: sites foretold from the others.
fn held_out(w: &mut String, found: &Findings) -> Result<()> {
    let _ = writeln!(w, "<h2>Can the intervals be believed?</h2>");
    if found.survey.len() < FEWEST {
        let _ = writeln!(
            w,
            "<p>With fewer than {FEWEST} sites nothing was held out: nothing here says so.</p>"
        );
        return Ok(());
    }
    let report = validate::hold_out(found.model, found.survey, FOLDS, found.windows)?;
    let picture = found.folder.join("report-calibration.png");
    report.picture(&picture)?;
    let calibration = image(
        &picture,
        "Left: how many held-out sites lie inside intervals of each level. Right: where \
        observations fall in their predictive law; flat at 1 if calibrated.",
    );
    let drawn = variogram(&report, found, &found.folder.join("report-variogram.png"));
    let _ = std::fs::remove_file(&picture);
    let _ = writeln!(
        w,
        "<p>Each of {FOLDS} random parts of the sites was foretold from the others. Coverage should be near its level; the \
         log score is in nats per site, higher is better, and means something beside those of the simple rules below.</p>\n<table>"
    );
    row(
        w,
        "th",
        &["", "log score", "CRPS", "RMSE", "in 50 %", "in 80 %", "in 95 %"].map(String::from),
    );
    for (name, s) in report.summaries() {
        let c = s.coverage;
        let shares = [c.at_50, c.at_80, c.at_95].map(|v| format!("{v:.2}"));
        let cells = [name.to_string(), format!("{:.3}", s.log_score), round(s.crps), round(s.rmse)];
        row(w, "td", &[&cells[..], &shares[..]].concat());
    }
    let _ = writeln!(w, "</table>\n{}{}", calibration?, drawn?);
    Ok(())
}

/// Semivariance of what the model did not foretell, against distance.
fn variogram(report: &Report, found: &Findings, file: &Path) -> Result<String> {
    let (order, steps) = report.first();
    let frame = &found.record.frame;
    let places = frame.places_km(&frame.sites_of(found.survey, &Device::Cpu)?)?;
    let places: Vec<&[f64]> = order.iter().map(|i| &places[*i][..]).collect();
    let mut rng = Stream::new(1, "variogram", 0);
    let score: Vec<f64> = pit::randomised(steps, &mut rng)
        .into_iter()
        .map(|u| normal_quantile(u.clamp(1e-6, 1.0 - 1e-6)))
        .collect();
    let far = |a: &[f64], b: &[f64]| {
        frame.geometry.ground(1000.0 * Metric::Euclidean.distance(a, b)) / 1000.0
    };
    let Some(classes) = Classes::of(&places, far) else { return Ok(String::new()) };
    let seen = classes.semivariance(&score);
    let shuffled: Vec<Vec<f64>> = (0..SHUFFLES)
        .map(|_| {
            let order = rng.permutation(score.len());
            classes.semivariance(&order.iter().map(|i| score[*i]).collect::<Vec<_>>())
        })
        .collect();
    let edge = |c: usize, share: f64| {
        let mut each: Vec<f64> = shuffled.iter().map(|s| s[c]).collect();
        each.sort_by(f64::total_cmp);
        each[((each.len() - 1) as f64 * share).round() as usize]
    };
    let edges = (0..seen.len()).map(|c| [classes.km[c], edge(c, 0.025), edge(c, 0.975)]).collect();
    let chart = Chart {
        caption: "Variogram of held-out residuals".into(),
        across: "distance, km".into(),
        up: "semivariance of normal scores".into(),
        bands: vec![Band { edges, colour: 0 }],
        curves: vec![Curve {
            points: classes.km.iter().zip(&seen).map(|(d, s)| [*d, *s]).collect(),
            colour: 1,
            width: 1.1,
            strength: 1.0,
            marked: true,
        }],
        ..Chart::default()
    };
    let line = "Band: what residuals without any spatial order would show, 95 % at each distance";
    curves::save("Residuals against distance", line, &[], &[chart], (1, [640, 360]), file)?;
    let below = (0..seen.len().min(3)).filter(|c| seen[*c] < edge(*c, 0.025)).count();
    let said = match below {
        0 => {
            "Nearby sites are no more alike in what the model missed than distant ones: no sign of structure left out."
        }
        _ => {
            "Nearby sites are alike in what the model missed: some structure finer than the map is left, or a covariate is missing."
        }
    };
    let image = image(file, said);
    let _ = std::fs::remove_file(file);
    image
}

/// Pairs of sites by distance, classes of equal numbers of pairs up to half of the largest distance.
struct Classes {
    /// Mean distance of each, km.
    km: Vec<f64>,
    /// Pairs of each.
    pairs: Vec<Vec<[usize; 2]>>,
}

impl Classes {
    /// Nothing where there are too few pairs.
    fn of(places: &[&[f64]], far: impl Fn(&[f64], &[f64]) -> f64) -> Option<Self> {
        // Pairs grow with the square: a few hundred sites show as much.
        let step = places.len().div_ceil(600).max(1);
        let kept: Vec<usize> = (0..places.len()).step_by(step).collect();
        let mut all = Vec::new();
        for (k, i) in kept.iter().enumerate() {
            for j in &kept[..k] {
                all.push((far(places[*i], places[*j]), [*i, *j]));
            }
        }
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let half = 0.5 * all.last()?.0;
        let near = all.partition_point(|pair| pair.0 <= half);
        let size = near / CLASSES;
        if size < 10 {
            return None;
        }
        let parts: Vec<_> = all[..CLASSES * size].chunks(size).collect();
        Some(Classes {
            km: parts.iter().map(|p| p.iter().map(|x| x.0).sum::<f64>() / size as f64).collect(),
            pairs: parts.iter().map(|p| p.iter().map(|x| x.1).collect()).collect(),
        })
    }

    fn semivariance(&self, score: &[f64]) -> Vec<f64> {
        let half = |p: &Vec<[usize; 2]>| {
            let sum: f64 = p.iter().map(|[i, j]| (score[*i] - score[*j]).powi(2)).sum();
            0.5 * sum / p.len() as f64
        };
        self.pairs.iter().map(half).collect()
    }
}

/// The table of districts, its numbers shortened.
fn districts(w: &mut String, file: &Path) -> Result<()> {
    let table = Columns::read(file)?;
    let cell = |name: &str, i: usize| -> Result<String> {
        Ok(match table.column(name)? {
            Column::Numbers(values) if values[i].is_nan() => "–".into(),
            Column::Numbers(values) => round(values[i]),
            Column::Text(cells) => cells[i].clone(),
        })
    };
    let _ = writeln!(
        w,
        "<h2>Districts</h2>\n<p>Means over the people of each district, with intervals from joint draws of the surface: \
         summing the pixels' own variances would make them far too narrow.</p>\n<div class=\"scroll\"><table>"
    );
    row(w, "th", table.names());
    for i in 0..table.len().min(ROWS) {
        let cells = table.names().iter().map(|name| cell(name, i)).collect::<Result<Vec<_>>>()?;
        row(w, "td", &cells);
    }
    let more = if table.len() > ROWS {
        format!("<p class=\"small\">The first {ROWS} rows.</p>")
    } else {
        String::new()
    };
    let _ = writeln!(w, "</table></div>{more}");
    Ok(())
}

/// What was read, and what was left out.
fn data(w: &mut String, found: &Findings) {
    let note = &found.record.survey;
    let _ = writeln!(w, "<h2>Data</h2>\n<table>");
    let mut line = |name: &str, text: String| row(w, "td", &[name.into(), text]);
    line("Survey", note.file.clone());
    line("Sites used", note.used.to_string());
    if let Some([positive, tested]) = note.people {
        line("Counted, of", format!("{positive} of {tested}"));
    }
    line("Coordinates", note.crs.clone());
    if let Some(times) = &note.times {
        line("Times", times.clone());
    }
    line("Extent", format!("{} km", round(found.record.frame.extent_km())));
    line("Rows left out", note.dropped.len().to_string());
    let _ = writeln!(w, "</table>");
    if !note.dropped.is_empty() || !note.notes.is_empty() {
        let _ = writeln!(w, "<ul class=\"small\">");
        for dropped in note.dropped.iter().take(50) {
            let _ = writeln!(w, "<li>row {}: {}</li>", dropped.row, escape(&dropped.reason));
        }
        for said in &note.notes {
            let _ = writeln!(w, "<li>{}</li>", escape(said));
        }
        let _ = writeln!(w, "</ul>");
    }
}

/// A paragraph for a paper.
fn methods(found: &Findings) -> String {
    let Findings { record, survey, outcome, .. } = found;
    let card =
        |key: &str| record.model.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_string();
    let people = record
        .survey
        .people
        .map_or(String::new(), |[positive, tested]| format!(" ({positive} of {tested} in all)"));
    let process = match card("name").as_str() {
        "gp" => "a Gaussian process with a Matérn covariance, a nugget and an unknown mean, fitted by maximum marginal \
                 likelihood (Laplace's approximation for counts) [3] and, up to 500 sites, integrated over covariances \
                 about the likeliest"
            .to_string(),
        "vecchia" => "a nearest-neighbour (Vecchia) Gaussian process with a Matérn covariance, fitted by maximum likelihood [3]".into(),
        TREND => "a nearest-neighbour (Vecchia) Gaussian process with a Matérn covariance and a mean that is linear in the \
                  coordinates (universal kriging), fitted by maximum likelihood [3]"
            .into(),
        name => format!(
            "the neural process `{name}` ({}), which was trained on surfaces simulated from a Gaussian-process prior with \
             rough and smooth kernels, a village-level nugget and trends, so that conditioning on the survey is amortised \
             Bayesian inference under that prior [1, 2]",
            card("predicts")
        ),
    };
    let time = |key: &str| record.model.get("time").and_then(|time| time[key].as_f64());
    let change = match (&record.survey.times, time("days"), time("static_share")) {
        (None, ..) => String::new(),
        (Some(_), Some(days), Some(share)) => format!(
            " Sites were visited at different times, and the covariance is separable in space and time, with a part \
             that no time changes: {}.",
            super::times::change(days, share)
        ),
        (Some(_), ..) => {
            " Sites were visited at different times, which the model reads beside their places."
                .into()
        }
    };
    let mapped: Vec<&str> = record.times.iter().map(|t| t.time.as_str()).collect();
    let mapped = match mapped[..] {
        [] => String::new(),
        _ => format!(" Maps are of {}.", mapped.join(", ")),
    };
    let products: Vec<&str> = record.products.iter().map(|p| p.product.as_str()).collect();
    format!(
        "{} was mapped from {} sites{people} by {process}.{change}{mapped} Distances were measured on {}, on which the sites span {} km. \
         The map has {} × {} pixels, {} of them inside the area; mapped were {}. Intervals are equal-tailed; \
         exceedance is the posterior probability that the {} lies above the threshold. Calibration was checked by {FOLDS}-fold \
         cross-validation with proper scores [4] and the probability integral transform for counts [5]. Software: Isopleth {}.",
        capital(outcome),
        survey.len(),
        if survey.crs.is_local() { "the survey's own plane" } else { "a local equal-area plane" },
        round(found.record.frame.extent_km()),
        record.grid.cols,
        record.grid.rows,
        record.grid.wanted,
        products.join(", "),
        if record.of == Of::Surface { "surface" } else { "observation" },
        record.isopleth,
    )
}

const SOURCES: [&str; 5] = [
    "Jenson, Navott, Zhang, Sharma, Semenova, Flaxman. Transformer Neural Processes: Kernel Regression. arXiv:2411.12502; and Jenson et al., Biased Scan Attention, arXiv:2506.09163.",
    "Garnelo M, Rosenbaum D, Maddison CJ, et al. Conditional neural processes. arXiv:1807.01613.",
    "Rasmussen CE, Williams CKI. Gaussian Processes for Machine Learning. MIT Press, 2006.",
    "Gneiting T, Raftery AE. Strictly proper scoring rules, prediction, and estimation. JASA 2007. doi:10.1198/016214506000001437.",
    "Czado C, Gneiting T, Held L. Predictive model assessment for count data. Biometrics 2009. doi:10.1111/j.1541-0420.2009.01191.x.",
];
