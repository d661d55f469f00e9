//! What a run writes down: tables, scores one by one, and pictures.

use std::{collections::BTreeSet, fmt::Write as _, path::Path};

use super::{
    FLOOR, Means, Run,
    case::Case,
    drawn::Drawn,
    score::{Cost, LEVELS, Scores},
};
use crate::{
    benchmark::score::Mean,
    error::{Error, Result},
    geo::table::{Column, Columns},
    picture::{
        curves::{self, Chart, Curve},
        panels::{self, Dot, Panel, View},
    },
    whole,
};

/// Sites that a picture shows, at most.
const DOTS: usize = 1500;

/// One line on a run that just ended.
pub fn line(run: &Run) -> String {
    let Run { process, fit, condition, predict, .. } = run;
    match (&run.scores, &run.refused) {
        (Some(s), _) => format!(
            "  {process}: CRPS {:.4}, log score {:.4}, 95 % interval holds {:.3}; processor seconds: \
             fit {:.1}, condition {:.1}, predict {:.1}",
            s.crps, s.log_score, s.inside[2], fit.cpu, condition.cpu, predict.cpu
        ),
        (None, why) => format!("  {process}: refused: {}", why.as_deref().unwrap_or("no reason")),
    }
}

/// Runs of one process on one case and size, over seeds, with the floor's on the same.
struct Group<'a> {
    process: &'a str,
    runs: Vec<(&'a Run, Option<&'a Scores>)>,
}

/// Groups in the order in which they were run.
fn groups<'a>(runs: &'a [Run], case: &str, sites: usize) -> Vec<Group<'a>> {
    let here = || runs.iter().filter(|r| r.case == case && r.sites == sites);
    let floor = |seed: u64| {
        here().find(|r| r.process == FLOOR && r.seed == seed).and_then(|r| r.scores.as_ref())
    };
    let mut groups: Vec<Group> = Vec::new();
    for run in here() {
        let pair = (run, floor(run.seed));
        match groups.iter_mut().find(|g| g.process == run.process) {
            Some(group) => group.runs.push(pair),
            None => groups.push(Group { process: &run.process, runs: vec![pair] }),
        }
    }
    groups
}

/// Cases in order, with their sizes.
fn sections(runs: &[Run]) -> Vec<(&'static str, BTreeSet<usize>)> {
    let mut sections: Vec<(&'static str, BTreeSet<usize>)> = Vec::new();
    for run in runs {
        match sections.iter_mut().find(|(case, _)| *case == run.case) {
            Some((_, sizes)) => drop(sizes.insert(run.sites)),
            None => sections.push((run.case, BTreeSet::from([run.sites]))),
        }
    }
    sections
}

impl Group<'_> {
    /// The mean over seeds of what was scored; NaN where nothing was.
    fn mean(&self, value: impl Fn(&Scores) -> f64) -> Mean {
        self.beside(|scores, _| value(scores))
    }

    /// The mean over seeds of a comparison with the floor on the same seed.
    fn beside(&self, value: impl Fn(&Scores, &Scores) -> f64) -> Mean {
        let each = self
            .runs
            .iter()
            .enumerate()
            .filter_map(|(i, (run, floor))| Some((i, value(run.scores.as_ref()?, (*floor)?))));
        Mean::of(each)
    }

    /// The mean over seeds of what every run has.
    fn took(&self, value: impl Fn(&Run) -> f64) -> f64 {
        self.runs.iter().map(|(run, _)| value(run)).sum::<f64>() / self.runs.len() as f64
    }
}

fn number(mean: Mean, decimals: usize) -> String {
    let text = match (mean.mean.is_finite(), mean.error.is_finite()) {
        (false, _) => return "–".into(),
        (true, true) => format!("{:.decimals$} ± {:.decimals$}", mean.mean, mean.error),
        (true, false) => format!("{:.decimals$}", mean.mean),
    };
    text.replace('-', "−")
}

fn row(out: &mut String, cells: &[String]) {
    let _ = writeln!(out, "| {} |", cells.join(" | "));
}

/// A table for each case.
pub fn markdown(runs: &[Run]) -> String {
    let mut out = String::new();
    for (case, sizes) in sections(runs) {
        let seeds = runs.iter().filter(|r| r.case == case).map(|r| r.seed).max().unwrap_or(0);
        let _ = writeln!(out, "**{case}**, {seeds} seed{}\n", if seeds == 1 { "" } else { "s" });
        let head = [
            "sites",
            "targets",
            "process",
            "CRPS",
            "÷ floor",
            "log score",
            "− floor",
            "50 %",
            "80 %",
            "95 %",
            "fit, s",
            "condition, s",
            "predict, s",
            "MiB",
        ];
        row(&mut out, &head.map(String::from));
        let marks = (0..head.len()).map(|i| if i == 2 { "---" } else { "---:" });
        row(&mut out, &marks.map(String::from).collect::<Vec<_>>());
        let mut refused = Vec::new();
        for sites in sizes {
            for group in groups(runs, case, sites) {
                let seconds = |cost: fn(&Run) -> &Cost| {
                    let [cpu, wall] =
                        [group.took(|run| cost(run).cpu), group.took(|run| cost(run).wall)];
                    format!("{cpu:.1} ({wall:.1})")
                };
                let inside = |i: usize| number(group.mean(|s| s.inside[i]), 3);
                let peak = group.took(|run| run.peak_mib.unwrap_or(f64::NAN));
                let (first, floor) = (group.runs[0].0, group.process == FLOOR);
                let gap = |mean: Mean, decimals: usize| match floor {
                    true => String::new(),
                    false => number(mean, decimals),
                };
                row(
                    &mut out,
                    &[
                        sites.to_string(),
                        first.targets.to_string(),
                        group.process.to_string(),
                        number(group.mean(|s| s.crps), 4),
                        gap(group.beside(|s, floor| s.crps / floor.crps), 4),
                        number(group.mean(|s| s.log_score), 4),
                        gap(group.beside(|s, floor| s.log_score - floor.log_score), 4),
                        inside(0),
                        inside(1),
                        inside(2),
                        seconds(|run| &run.fit),
                        seconds(|run| &run.condition),
                        seconds(|run| &run.predict),
                        if peak.is_finite() { format!("{peak:.0}") } else { "–".into() },
                    ],
                );
                for (run, _) in &group.runs {
                    if let Some(why) = &run.refused {
                        refused.push(format!(
                            "{} refused {sites} sites (seed {}): {why}",
                            run.process, run.seed
                        ));
                    }
                }
            }
        }
        out.push('\n');
        for line in refused {
            let _ = writeln!(out, "{line}\n");
        }
    }
    let _ = writeln!(
        out,
        "Seconds are of the processor (by the clock). CRPS and shares inside intervals are of new values, and for \
         counts of the surface. ± is the standard error over seeds."
    );
    out
}

/// Every run as CSV, Parquet and JSON.
///
/// # Errors
/// [`Error::Io`] if the disk refuses.
pub fn write(out: &Path, runs: &[Run]) -> Result<()> {
    let numbers = |f: &dyn Fn(&Run) -> f64| Column::Numbers(runs.iter().map(f).collect());
    let words = |f: &dyn Fn(&Run) -> String| Column::Text(runs.iter().map(f).collect());
    let scored =
        |part: fn(&Scores) -> f64| numbers(&|r: &Run| r.scores.as_ref().map_or(f64::NAN, part));
    let mut columns: Vec<(&str, Column)> = vec![
        ("case", words(&|r| r.case.to_string())),
        ("process", words(&|r| r.process.clone())),
        ("seed", numbers(&|r| r.seed as f64)),
        ("sites", numbers(&|r| r.sites as f64)),
        ("targets", numbers(&|r| r.targets as f64)),
        ("scored", numbers(&|r| r.scored as f64)),
        ("crps", scored(|s| s.crps)),
        ("log_score", scored(|s| s.log_score)),
        ("inside_50", scored(|s| s.inside[0])),
        ("inside_80", scored(|s| s.inside[1])),
        ("inside_95", scored(|s| s.inside[2])),
    ];
    const _: () = assert!(LEVELS.len() == 3);
    type Of = fn(&Run) -> &Cost;
    let costs: [(&str, &str, Of); 3] = [
        ("fit_cpu_s", "fit_wall_s", |r| &r.fit),
        ("condition_cpu_s", "condition_wall_s", |r| &r.condition),
        ("predict_cpu_s", "predict_wall_s", |r| &r.predict),
    ];
    for (cpu, wall, of) in costs {
        columns.push((cpu, numbers(&|r| of(r).cpu)));
        columns.push((wall, numbers(&|r| of(r).wall)));
    }
    columns.push(("peak_mib", numbers(&|r| r.peak_mib.unwrap_or(f64::NAN))));
    columns.push(("refused", words(&|r| r.refused.clone().unwrap_or_default())));
    let (names, columns): (Vec<String>, Vec<Column>) =
        columns.into_iter().map(|(name, column)| (name.to_string(), column)).unzip();
    for file in ["scores.csv", "scores.parquet"] {
        Columns::write(out.join(file), &names, [Ok(columns.clone())])?;
    }
    let json = serde_json::to_vec_pretty(runs)
        .map_err(|e| Error::input("the scores make no JSON").fact("reason", e))?;
    whole::write_bytes(&out.join("scores.json"), &json)
}

/// Score, coverage, time and memory against the number of sites: a row of charts for each case.
///
/// # Errors
/// If the disk refuses.
pub fn sizes(path: &Path, runs: &[Run]) -> Result<()> {
    let mut names: Vec<&str> = vec![FLOOR];
    for run in runs {
        if !names.contains(&run.process.as_str()) {
            names.push(&run.process);
        }
    }
    let mut charts = Vec::new();
    for (case, sizes) in sections(runs) {
        let chart = |up: &str, value: &dyn Fn(&Group) -> f64| {
            let curve = |(colour, name): (usize, &&str)| {
                let at = |sites: &usize| {
                    let groups = groups(runs, case, *sites);
                    let group = groups.iter().find(|g| g.process == *name)?;
                    Some([(*sites as f64).log10(), value(group)])
                };
                let points = sizes.iter().filter_map(at).filter(|p| p[1].is_finite()).collect();
                Curve { points, colour, width: 1.1, strength: 1.0, marked: true }
            };
            Chart {
                caption: case.to_string(),
                across: "sites, powers of ten".into(),
                up: up.into(),
                curves: names.iter().enumerate().map(curve).collect(),
                ..Chart::default()
            }
        };
        let log10 = |v: f64| if v > 0.0 { v.log10() } else { f64::NAN };
        charts.push(chart("CRPS ÷ floor's", &|g| g.beside(|s, f| s.crps / f.crps).mean));
        charts.push(Chart {
            ends: Some([0.8, 1.0]),
            ..chart("95 % interval holds", &|g| g.mean(|s| s.inside[2]).mean)
        });
        charts.push(chart("processor seconds, powers of ten", &|g| {
            log10(g.took(|r| r.fit.cpu + r.condition.cpu + r.predict.cpu))
        }));
        charts.push(chart("MiB, powers of ten", &|g| {
            log10(g.took(|r| r.peak_mib.unwrap_or(f64::NAN)))
        }));
    }
    let legend: Vec<(String, usize)> =
        names.iter().enumerate().map(|(i, name)| (name.to_string(), i)).collect();
    let line =
        "The floor is told the parameters that made the case. Time: fit, condition and predict";
    curves::save("Benchmark of scale", line, &legend, &charts, (4, [300, 220]), path)
}

/// A case as it was drawn, and what each process makes of it.
///
/// # Errors
/// If the disk refuses.
pub fn case(
    path: &Path,
    name: &str,
    case: &Case,
    drawn: &Drawn,
    shown: &[(String, Means)],
) -> Result<()> {
    let panel = |caption: [String; 2], values: Vec<f64>, [cols, rows]: [usize; 2], dots| Panel {
        caption,
        view: View::Surface { rows, cols },
        values,
        low: drawn.half.map(|half| -half),
        high: drawn.half,
        dots,
    };
    let sites = format!("{} sites", drawn.xy.len());
    let mut panels = Vec::new();
    if let Some((values, size, mask)) = &drawn.whole {
        panels.push(panel(["the surface".into(), String::new()], values.clone(), *size, vec![]));
        let seen = values.iter().zip(mask).map(|(v, hidden)| if *hidden { f64::NAN } else { *v });
        panels.push(panel(["what is seen".into(), sites.clone()], seen.collect(), *size, vec![]));
    }
    for (i, (who, (values, size))) in shown.iter().enumerate() {
        // Where no lattice shows what was seen, dots on the first panel do.
        let first = i == 0 && drawn.whole.is_none();
        let dots = if first { dots(drawn) } else { Vec::new() };
        let second = if first { format!("with some of {sites}") } else { String::new() };
        panels.push(panel([format!("mean, {who}"), second], values.clone(), *size, dots));
    }
    panels::save(&format!("Benchmark of scale: {name}"), [&case.about, ""], &panels, path)
}

fn dots(drawn: &Drawn) -> Vec<Dot> {
    let step = drawn.xy.len().div_ceil(DOTS);
    let some = drawn.xy.iter().zip(drawn.shares()).step_by(step);
    some.map(|(at, value)| Dot { at: *at, value, weight: 0.0 }).collect()
}
