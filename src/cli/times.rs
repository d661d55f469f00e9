//! Times on the command line: which are asked for, of which survey.

use crate::{
    error::{Error, Result},
    geo::{
        frame::Frame,
        survey::{Survey, Targets},
        time::{self, Moment, date, year},
    },
};

/// Which times.
#[derive(Debug, Clone, clap::Args)]
pub struct TimeArgs {
    /// Times to map, a band each, where --time names a column: years, months, dates, and ranges of them
    /// (2015,2017..2019 or 2019-01..2019-12). A year or month stands for its middle
    #[arg(long, value_name = "TIME,…", value_delimiter = ',', requires = "time")]
    pub at: Vec<String>,
}

impl TimeArgs {
    /// The times asked for; none for a survey without.
    ///
    /// # Errors
    /// [`Error::Input`] for a survey with times of which none is asked for, and as [`time::moments`].
    pub fn of(&self, survey: &Survey) -> Result<Vec<Moment>> {
        let moments = if self.at.is_empty() { Vec::new() } else { time::moments(&self.at)? };
        let Some(times) = &survey.times else { return Ok(moments) };
        if moments.is_empty() {
            let days = times.distinct();
            let years = |i: usize| days.get(i).map_or(0, |day| year(*day));
            let (first, last) = (years(0), years(days.len().saturating_sub(1)));
            let range = if first == last { first.to_string() } else { format!("{first}..{last}") };
            return Err(Error::input(
                "a survey with times is mapped at times, and none is asked for",
            )
            .fact("--time", &times.column)
            .fact("times of the survey", times.about())
            .try_this(format!("say which with --at, for example --at {range}")));
        }
        Ok(moments)
    }
}

/// The frame at each time; a survey without times has one.
///
/// # Errors
/// As [`Frame::on`].
pub(super) fn frames(frame: &Frame, moments: &[Moment]) -> Result<Vec<Frame>> {
    match moments {
        [] => Ok(vec![frame.clone()]),
        all => all.iter().map(|m| frame.on(m.period.middle())).collect(),
    }
}

/// What the user should know of times that lie outside the survey's.
pub(super) fn warnings(survey: &Survey, moments: &[Moment]) -> Vec<String> {
    let Some(times) = &survey.times else { return Vec::new() };
    let days = times.distinct();
    let (Some(first), Some(last)) = (days.first(), days.last()) else { return Vec::new() };
    let label = |keep: &dyn Fn(&Moment) -> bool| -> Vec<String> {
        moments.iter().filter(|m| keep(m)).map(|m| m.label.clone()).collect()
    };
    // A year that a survey fell into is not outside of it.
    let after = label(&|m| m.period.from > *last);
    let before = label(&|m| m.period.to < *first);
    let mut said = Vec::new();
    for (which, day, how) in [(after, last, "after"), (before, first, "before")] {
        if !which.is_empty() {
            said.push(format!(
                "{} lie{} {how} every visit ({}): there the maps foretell a change that nobody has seen, \
                 from what was seen at other times",
                which.join(", "),
                if which.len() == 1 { "s" } else { "" },
                date(*day),
            ));
        }
    }
    said
}

/// What the user should know of targets whose times lie outside the survey's.
pub(super) fn beyond(survey: &Survey, targets: &Targets) -> Option<String> {
    let days = survey.times.as_ref()?.distinct();
    let (first, last) = (*days.first()?, *days.last()?);
    let asked = targets.times.as_ref()?.days.iter().filter(|day| **day < first || **day > last);
    let count = asked.count();
    (count > 0).then(|| {
        format!(
            "{count} target{} of times outside the survey's ({} to {}): there a prediction says little but \
             what never changes",
            if count == 1 { " is" } else { "s are" },
            date(first),
            date(last)
        )
    })
}

/// How fast a surface changes, in words.
pub(super) fn change(days: f64, static_share: f64) -> String {
    let length = match days {
        d if d >= 3.0 * 365.25 => format!("{:.1} years", d / 365.25),
        d if d >= 90.0 => format!("{:.1} months", d / 30.4375),
        d => format!("{d:.0} days"),
    };
    format!(
        "{:.0} % of the surface's variance stays; of the rest, the correlation has a length scale of {length}",
        100.0 * static_share
    )
}
