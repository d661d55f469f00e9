//! What a validation found, for every model beside every other: tables, a picture, each site.

use serde_json::{Map, Value, json};

use super::{Fold, Folds, entrants, report as of_one, short};
use crate::{
    cli::output::Output,
    error::Result,
    geo::{survey::Survey, table::Column, table::Columns},
    picture::curves::{self, Chart, Curve},
    rng::Stream,
    score::{Forecast, Summary, interval, pit},
    whole,
};

/// Levels of the intervals whose scores are reported.
const LEVELS: [f64; 3] = [0.5, 0.8, 0.95];
/// Parts of a histogram of the probability integral transform.
const BINS: usize = 10;

/// One model or rule over all sites.
struct Entrant {
    name: String,
    met: Vec<Forecast>,
    steps: Vec<[f64; 2]>,
    summary: Summary,
    /// Mean score of the intervals of [`LEVELS`], outcome units.
    intervals: [f64; 3],
    seconds: Option<f64>,
}

/// The aggregated non-randomised transform (AnPIT) at every twentieth: place, share at or below.
fn aggregated(steps: &[[f64; 2]]) -> Vec<[f64; 2]> {
    (0..=20).map(|j| f64::from(j) / 20.0).map(|u| [u, pit::aggregated(steps, u)]).collect()
}

/// A difference of mean scores with its standard error.
struct Difference {
    mean: f64,
    error: f64,
}

/// Everything that a validation found.
pub(in crate::cli) struct Report {
    how: String,
    /// Whether sites of one fold hang together, so that folds are the units of chance.
    clustered: bool,
    fold: Vec<usize>,
    labels: Vec<String>,
    /// Sites in the order of their forecasts, positions in the survey.
    order: Vec<usize>,
    rows: Vec<usize>,
    places: [Vec<f64>; 2],
    entrants: Vec<Entrant>,
    warnings: Vec<String>,
}

impl Report {
    pub fn new(
        survey: &Survey,
        folds: &Folds,
        how: &str,
        models: &[String],
        scored: &[Vec<Fold>],
        warnings: Vec<String>,
    ) -> Self {
        let mut all = Vec::new();
        let mut rules = Vec::new();
        for (model, scored) in models.iter().zip(scored) {
            let (met, beside) = entrants(scored);
            let seconds = scored.iter().map(|f| f.seconds).sum();
            all.push(Entrant::new(model, met, Some(seconds)));
            rules = beside;
        }
        all.extend(rules.into_iter().map(|(name, met)| Entrant::new(name, met, None)));
        // Forecasts come fold by fold, within each in the order of the survey.
        let held = |i: &usize| folds.of[*i] != Folds::NEVER;
        let mut order: Vec<usize> = (0..survey.len()).filter(held).collect();
        order.sort_by_key(|i| folds.of[*i]);
        Report {
            how: how.to_string(),
            // Of periods there are too few to be units of chance.
            clustered: how.parse::<usize>().is_err() && !folds.ahead,
            fold: order.iter().map(|i| folds.of[*i]).collect(),
            labels: folds.labels.clone(),
            rows: order.iter().map(|i| survey.rows[*i]).collect(),
            places: [&survey.x, &survey.y].map(|v| order.iter().map(|i| v[*i]).collect()),
            order,
            entrants: all,
            warnings,
        }
    }

    /// The first model's mean score less that of another, per site.
    fn difference(&self, other: &Entrant, score: &str) -> Difference {
        let score = crate::score::SCORES.iter().find(|s| s.name == score).expect("registered");
        let first = &self.entrants[0];
        let gaps = first.met.iter().zip(&other.met).map(|(a, b)| (score.each)(a) - (score.each)(b));
        difference(&gaps.collect::<Vec<_>>(), self.clustered.then_some(&self.fold[..]))
    }

    /// The object of `--json`: what one model's has always held, and every model beside it.
    pub fn json(&self, model: &str, folds: &[Fold]) -> Value {
        let mut object = of_one(model, folds);
        object["how"] = json!(self.how);
        object["warnings"] = json!(self.warnings);
        let each = self.entrants.iter().map(|e| {
            let mut its = json!(e.summary);
            let levels = LEVELS.iter().zip(e.intervals);
            its["interval_score"] = levels
                .map(|(l, s)| ((100.0 * l).to_string(), json!(s)))
                .collect::<Map<_, _>>()
                .into();
            its["coverage_by_level"] = curve(&e.steps).iter().map(|[l, c]| json!([l, c])).collect();
            its["pit"] = json!({
                "non_randomised": pit::histogram(&e.steps, BINS),
                "randomised": self.randomised(e),
                "aggregated": aggregated(&e.steps),
            });
            if let Some(seconds) = e.seconds {
                its["seconds"] = json!(seconds);
            }
            if e.name != self.entrants[0].name {
                let less = |score: &str| {
                    let d = self.difference(e, score);
                    json!({ "mean": d.mean, "standard_error": d.error })
                };
                its["first_model_less_this"] =
                    json!({ "log_score": less("log-score"), "crps": less("crps") });
            }
            (e.name.clone(), its)
        });
        object["models"] = Value::Object(each.collect());
        object
    }

    /// Histogram of one draw from each site's step.
    fn randomised(&self, e: &Entrant) -> Vec<f64> {
        let drawn = pit::randomised(&e.steps, &mut Stream::new(1, "pit", 0));
        let points: Vec<[f64; 2]> = drawn.iter().map(|u| [*u; 2]).collect();
        pit::histogram(&points, BINS)
    }

    fn wide(&self) -> usize {
        self.entrants.iter().map(|e| e.name.chars().count()).max().unwrap_or(0)
    }

    /// Lines for several models: scores, differences, calibration.
    pub fn table(&self) -> impl Iterator<Item = String> + '_ {
        let wide = self.wide();
        let mut lines = vec![format!(
            "{:wide$}{:>7}{:>11}{:>10}{:>10}{:>7}{:>6}{:>6}{:>9}",
            "", "sites", "log score", "crps", "rmse", "50 %", "80 %", "95 %", "seconds"
        )];
        for e in &self.entrants {
            let (s, time) = (&e.summary, e.seconds.map_or(String::new(), |t| format!("{t:9.2}")));
            lines.push(format!(
                "{:wide$}{:7}{:11.3}{:>10}{:>10}{:7.2}{:6.2}{:6.2}{time}",
                e.name,
                s.n,
                s.log_score,
                short(s.crps),
                short(s.rmse),
                s.coverage.at_50,
                s.coverage.at_80,
                s.coverage.at_95
            ));
        }
        lines.push(
            "log score: nats per site, higher is better; crps, rmse: outcome units, lower is better"
                .into(),
        );
        lines.push(String::new());
        lines.push(format!("{} less each, per site, ± one standard error", self.entrants[0].name));
        for e in &self.entrants[1..] {
            let [log, crps] = ["log-score", "crps"].map(|score| self.difference(e, score));
            lines.push(format!(
                "{:wide$}  log score {:+.4} ± {:.4}   crps {:+.5} ± {:.5}",
                e.name, log.mean, log.error, crps.mean, crps.error
            ));
        }
        lines.push(match self.clustered {
            true => "standard errors: folds are the units of chance, for sites of one lie together"
                .into(),
            false => "standard errors: sites are the units of chance".into(),
        });
        lines.into_iter().chain(self.calibration())
    }

    /// Lines on intervals and the probability integral transform.
    pub fn calibration(&self) -> impl Iterator<Item = String> + '_ {
        let wide = self.wide();
        let head = [
            String::new(),
            format!(
                "{:wide$}   score of interval           PIT, tenths, 1 = as many as there should be",
                ""
            ),
            format!("{:wide$}{:>9}{:>9}{:>9}", "", "50 %", "80 %", "95 %"),
        ];
        let each = self.entrants.iter().map(move |e| {
            let [a, b, c] = e.intervals.map(short);
            let bins: Vec<String> =
                pit::histogram(&e.steps, BINS).iter().map(|b| format!("{b:.2}")).collect();
            format!("{:wide$}{a:>9}{b:>9}{c:>9}   {}", e.name, bins.join(" "))
        });
        head.into_iter().chain(each)
    }

    fn markdown(&self) -> String {
        let mut text = format!(
            "# Validation\n\n{} sites, {} folds (`{}`).\n\n| | log score | CRPS | RMSE | 50 % | 80 % | 95 % | \
             interval score 95 % | log score, first less this |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
            self.order.len(),
            self.labels.len(),
            self.how
        );
        for (k, e) in self.entrants.iter().enumerate() {
            let s = &e.summary;
            let less = match k {
                0 => String::new(),
                _ => {
                    let d = self.difference(e, "log-score");
                    format!("{:+.4} ± {:.4}", d.mean, d.error)
                }
            };
            text.push_str(&format!(
                "| {} | {:.3} | {} | {} | {:.2} | {:.2} | {:.2} | {} | {less} |\n",
                e.name,
                s.log_score,
                short(s.crps),
                short(s.rmse),
                s.coverage.at_50,
                s.coverage.at_80,
                s.coverage.at_95,
                short(e.intervals[2])
            ));
        }
        text.push_str(
            "\nLog score: nats per site, higher is better. CRPS, RMSE, interval score: outcome units, lower \
             is better. Coverage: share of held-out observations inside their central interval; near 50, \
             80 and 95 % if the intervals can be believed. Differences: ± one standard error.\n\n\
             ![Calibration](calibration.png)\n",
        );
        for warning in &self.warnings {
            text.push_str(&format!("\n**Warning.** {warning}\n"));
        }
        text
    }

    /// Writes everything into a directory, the JSON last.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses; nothing is in the directory then that was not there.
    pub fn write(&self, output: &mut Output) -> Result<()> {
        let folder = output.scratch();
        let (names, columns) = self.sites();
        for file in ["sites.csv", "sites.parquet"] {
            Columns::write(folder.join(file), &names, [Ok(columns.clone())])?;
        }
        self.picture(&folder.join("calibration.png"))?;
        let text =
            |name: &str, text: String| whole::write_bytes(&folder.join(name), text.as_bytes());
        text("report.md", self.markdown())?;
        text("report.json", format!("{:#}\n", self.object()))?;
        let files = ["sites.csv", "sites.parquet", "calibration.png", "report.md", "report.json"];
        output.publish(&files.map(String::from))
    }

    fn object(&self) -> Value {
        let mut whole = self.json("", &[]);
        let models = whole["models"].take();
        json!({
            "isopleth": env!("CARGO_PKG_VERSION"),
            "command": std::env::args().collect::<Vec<_>>(),
            "folds": { "how": self.how, "labels": self.labels },
            "sites": self.order.len(),
            "models": models,
            "warnings": self.warnings,
        })
    }

    /// One row a site, in the order of the survey: its fold, what was observed, what each model said.
    fn sites(&self) -> (Vec<String>, Vec<Column>) {
        let mut back = vec![0; self.order.len()];
        self.order.iter().enumerate().for_each(|(at, i)| back[*i] = at);
        let numbers =
            |f: &dyn Fn(usize) -> f64| Column::Numbers(back.iter().map(|at| f(*at)).collect());
        let mut names: Vec<String> = ["row", "x", "y", "fold", "observed"].map(String::from).into();
        let observed = &self.entrants[0].met;
        let mut columns = vec![
            numbers(&|i| self.rows[i] as f64),
            numbers(&|i| self.places[0][i]),
            numbers(&|i| self.places[1][i]),
            Column::Text(back.iter().map(|at| self.labels[self.fold[*at]].clone()).collect()),
            numbers(&|i| observed[i].observed()),
        ];
        let score = |name: &str| {
            crate::score::SCORES.iter().find(|s| s.name == name).expect("registered").each
        };
        let (log, crps) = (score("log-score"), score("crps"));
        for e in &self.entrants {
            let mut add = |what: &str, f: &dyn Fn(usize) -> f64| {
                names.push(format!("{}_{what}", e.name));
                columns.push(numbers(f));
            };
            add("mean", &|i| e.met[i].mean());
            add("low_95", &|i| e.met[i].interval(0.95).0);
            add("high_95", &|i| e.met[i].interval(0.95).1);
            add("log_score", &|i| log(&e.met[i]));
            add("crps", &|i| crps(&e.met[i]));
            add("pit_low", &|i| e.steps[i][0]);
            add("pit_high", &|i| e.steps[i][1]);
        }
        (names, columns)
    }

    /// Every model and rule by name, with its scores.
    pub fn summaries(&self) -> impl Iterator<Item = (&str, &Summary)> {
        self.entrants.iter().map(|e| (e.name.as_str(), &e.summary))
    }

    /// Sites in the order of their forecasts, positions in the survey, with the step of each in the
    /// law of the first model.
    pub fn first(&self) -> (&[usize], &[[f64; 2]]) {
        (&self.order, &self.entrants[0].steps)
    }

    /// Coverage by level and the probability integral transform, of all, as PNG.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn picture(&self, path: &std::path::Path) -> Result<()> {
        let line = |points: Vec<[f64; 2]>, colour: usize, width: f64| Curve {
            points,
            colour,
            width,
            strength: 1.0,
            marked: false,
        };
        let mut coverage = Chart {
            caption: "Coverage by level".into(),
            across: "level of the central interval".into(),
            up: "share of held-out sites inside".into(),
            curves: vec![line(vec![[0.0, 0.0], [1.0, 1.0]], 0, 0.6)],
            ends: Some([0.0, 1.0]),
            ..Chart::default()
        };
        let mut ranks = Chart {
            caption: "Probability integral transform".into(),
            across: "place in the predictive law".into(),
            up: "1 = as many as there should be".into(),
            curves: vec![line(vec![[0.0, 1.0], [1.0, 1.0]], 0, 0.6)],
            ..Chart::default()
        };
        let mut below = Chart {
            caption: "Aggregated transform (AnPIT)".into(),
            across: "quantile of the predictive law".into(),
            up: "share of held-out sites below".into(),
            curves: vec![line(vec![[0.0, 0.0], [1.0, 1.0]], 0, 0.6)],
            ends: Some([0.0, 1.0]),
            ..Chart::default()
        };
        let mut top = 2.0_f64;
        for (k, e) in self.entrants.iter().enumerate() {
            coverage.curves.push(line(curve(&e.steps), k + 1, 1.1));
            below.curves.push(line(aggregated(&e.steps), k + 1, 1.1));
            let bins = pit::histogram(&e.steps, BINS);
            top = bins.iter().copied().fold(top, f64::max);
            let edge = |j: usize| j as f64 / BINS as f64;
            let steps =
                bins.iter().enumerate().flat_map(|(j, b)| [[edge(j), *b], [edge(j + 1), *b]]);
            ranks.curves.push(line(steps.collect(), k + 1, 1.1));
        }
        ranks.ends = Some([0.0, 1.05 * top]);
        let legend: Vec<(String, usize)> =
            self.entrants.iter().enumerate().map(|(k, e)| (e.name.clone(), k + 1)).collect();
        let title = format!("Calibration at {} held-out sites", self.order.len());
        let line = format!(
            "Folds: {}. Black: forecasts that are exactly as sure as they may be",
            self.how
        );
        curves::save(&title, &line, &legend, &[coverage, below, ranks], (3, [380, 330]), path)
    }
}

impl Entrant {
    fn new(name: &str, met: Vec<Forecast>, seconds: Option<f64>) -> Self {
        let over = |level: f64| {
            met.iter().map(|f| interval::score(f, level)).sum::<f64>() / met.len().max(1) as f64
        };
        Entrant {
            name: name.to_string(),
            steps: met.iter().map(Forecast::pit).collect(),
            summary: Summary::of(&met),
            intervals: LEVELS.map(over),
            met,
            seconds,
        }
    }
}

/// Level and coverage, every five percent.
fn curve(steps: &[[f64; 2]]) -> Vec<[f64; 2]> {
    (0..=20).map(|j| f64::from(j) / 20.0).map(|l| [l, pit::inside(steps, l)]).collect()
}

/// Mean of `gaps` with its standard error: of independent sites, or of sites in folds that are.
fn difference(gaps: &[f64], folds: Option<&[usize]>) -> Difference {
    let n = gaps.len() as f64;
    let mean = gaps.iter().sum::<f64>() / n;
    let mut sums = std::collections::BTreeMap::<usize, f64>::new();
    for (i, gap) in gaps.iter().enumerate() {
        *sums.entry(folds.map_or(i, |f| f[i])).or_default() += gap - mean;
    }
    let c = sums.len() as f64;
    let square: f64 = sums.values().map(|s| s * s).sum();
    Difference { mean, error: (c / (c - 1.0) * square).sqrt() / n }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_errors_by_hand() {
        let gaps = [1.0, 3.0, 2.0, 6.0];
        let alone = difference(&gaps, None);
        // sd with divisor 3 is √(14 / 3), over √4.
        assert_eq!(alone.mean, 3.0);
        assert!((alone.error - (14.0_f64 / 3.0).sqrt() / 2.0).abs() < 1e-12);
        // Two folds whose sums stray by −2 and 2: √(2 · 8) / 4.
        let folds = difference(&gaps, Some(&[0, 0, 1, 1]));
        assert!((folds.error - 1.0).abs() < 1e-12, "{}", folds.error);
    }
}
