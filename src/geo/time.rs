//! When: years, months, dates and moments as days, the times that maps are asked for, and the clock
//! between days and model units.
//!
//! Days are counted in f64 from the start of 1 January 1970, UTC, in the Gregorian calendar. Source of
//! the count: Richards (2013), "Calendars", in Explanatory Supplement to the Astronomical Almanac, 15.11.

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::table::{Column, number};
use crate::{
    error::{Error, Result},
    sites::unit_time,
};

/// Years that a survey can be of.
const YEARS: [i64; 2] = [1800, 2200];
/// Times of one map at most: a band each.
const MOST: usize = 1_000;
/// How times are written.
const HELP: &str =
    "write years (2015), months (2015-03), dates (2015-03-14) or 2015-03-14T09:30, the year first";

/// A stretch of time, days.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Period {
    /// Its start.
    pub from: f64,
    /// Its end; the start itself for a moment.
    pub to: f64,
}

impl Period {
    /// Its middle, which stands for it: most of a year's surveys lie nearer to it than to any other day.
    pub fn middle(&self) -> f64 {
        0.5 * (self.from + self.to)
    }

    /// Whether a day lies in it; for a moment, whether it is that moment.
    pub fn covers(&self, day: f64) -> bool {
        day == self.from || (self.from..self.to).contains(&day)
    }

    /// How many of some days do.
    pub fn count(&self, days: &[f64]) -> usize {
        days.iter().filter(|day| self.covers(**day)).count()
    }

    /// Reads one: `2015`, `2015.5` (a moment), `2015-03`, `2015-03-14`, `2015-03-14T09:30:00Z`. Slashes
    /// will do for hyphens.
    ///
    /// ```
    /// use isopleth::geo::time::Period;
    /// let day = Period::read("2015-03-14")?;
    /// assert_eq!((day.from, day.to), (16_508.0, 16_509.0)); // since 1970, as `date` counts
    /// assert_eq!(Period::read("2016")?.to - Period::read("2016")?.from, 366.0);
    /// assert_eq!(Period::read("2015.5")?.middle(), Period::read("2015")?.middle());
    /// assert_eq!(Period::read("1970-01-01T12:00-01:00")?.from, 13.0 / 24.0);
    /// assert!(Period::read("14/03/2015").unwrap_err().help().unwrap().contains("year first"));
    /// # Ok::<(), isopleth::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`] for what is no time, days that no month has, and years before 1800 or after 2200.
    pub fn read(text: &str) -> Result<Self> {
        let text = text.trim();
        let refuse = |what: &str| Error::input(what).fact("value", format!("`{text}`"));
        if let Ok(value) = text.parse::<f64>() {
            let year = value.floor() as i64;
            if !value.is_finite() || year < YEARS[0] || year > YEARS[1] {
                return Err(refuse("this is no year between 1800 and 2200")
                    .try_this(format!("{}{HELP}", like_another(value))));
            }
            let whole = Period { from: days(year, 1, 1), to: days(year + 1, 1, 1) };
            // 2015.0 with its point is the start of 2015, and 2015 all of it.
            if !text.contains('.') {
                return Ok(whole);
            }
            let moment = whole.from + value.fract() * (whole.to - whole.from);
            return Ok(Period { from: moment, to: moment });
        }
        let (date, clock) = match text.split_once(['T', 't', ' ']) {
            Some((date, clock)) => (date, Some(clock.trim())),
            None => (text, None),
        };
        let parts: Option<Vec<i64>> = date.split(['-', '/']).map(|p| whole(p, p.len())).collect();
        let wrong = || refuse("this is no time").try_this(HELP);
        let parts = parts.filter(|parts| date.len() >= 6 && parts[0] > 31).ok_or_else(wrong)?;
        let (year, month) = (parts[0], parts.get(1).copied().unwrap_or(0));
        if year < YEARS[0] || year > YEARS[1] {
            return Err(refuse("this is no year between 1800 and 2200").try_this(HELP));
        }
        if !(1..=12).contains(&month) {
            return Err(refuse("a year has 12 months").try_this(HELP));
        }
        let next = if month == 12 { days(year + 1, 1, 1) } else { days(year, month + 1, 1) };
        match (&parts[2..], clock) {
            ([], None) => Ok(Period { from: days(year, month, 1), to: next }),
            ([day], clock) => {
                let from = days(year, month, *day);
                if *day < 1 || from >= next {
                    return Err(refuse("the month has no such day").try_this(HELP));
                }
                match clock {
                    None => Ok(Period { from, to: from + 1.0 }),
                    Some(clock) => {
                        let moment = from + of_day(clock).ok_or_else(wrong)?;
                        Ok(Period { from: moment, to: moment })
                    }
                }
            }
            _ => Err(wrong()),
        }
    }
}

/// A whole number of `digits` digits.
fn whole(text: &str, digits: usize) -> Option<i64> {
    let plain = text.len() == digits && (1..=4).contains(&digits);
    (plain && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

/// Share of a day: `09:30`, `09:30:15.5`, with `Z` or `+02:00` behind.
fn of_day(text: &str) -> Option<f64> {
    let text = text.trim_end_matches(['Z', 'z']).trim_end();
    let (clock, zone) = match text.rfind(['+', '-']) {
        Some(at) => {
            let (sign, zone) =
                (if text.as_bytes()[at] == b'+' { 1.0 } else { -1.0 }, &text[at + 1..]);
            let (hours, minutes) = match zone.split_once(':') {
                Some((hours, minutes)) => (whole(hours, 2)?, whole(minutes, 2)?),
                None if zone.len() == 4 => (whole(&zone[..2], 2)?, whole(&zone[2..], 2)?),
                None => (whole(zone, 2)?, 0),
            };
            (text[..at].trim_end(), sign * (hours as f64 * 60.0 + minutes as f64))
        }
        None => (text, 0.0),
    };
    let parts: Vec<&str> = clock.split(':').collect();
    let [hours, minutes] = [whole(parts.first()?, 2)?, whole(parts.get(1)?, 2)?];
    let seconds = match parts.get(2) {
        None => 0.0,
        Some(text) if text.starts_with(|c: char| c.is_ascii_digit()) => text.parse::<f64>().ok()?,
        Some(_) => return None,
    };
    let sound = hours < 24 && minutes < 60 && (0.0..61.0).contains(&seconds) && parts.len() <= 3;
    sound.then(|| (hours as f64 * 60.0 + minutes as f64 - zone + seconds / 60.0) / 1440.0)
}

/// What a number that is no year may be, with what to do about it.
fn like_another(value: f64) -> &'static str {
    let days = |v: f64| (18_000_101.0..=22_001_231.0).contains(&v);
    let months = |v: f64| (180_001.0..=220_012.0).contains(&v);
    match value {
        v if v.fract() == 0.0 && days(v) => "20150314 is written 2015-03-14; ",
        v if v.fract() == 0.0 && months(v) => "201503 is written 2015-03; ",
        v if (1000.0..1800.0).contains(&v) => {
            "months counted from 1900, as the DHS do (CMC), are of the year 1900 + (CMC − 1)/12; "
        }
        v if v < 0.0 || v == 9999.0 => "leave cells without a time empty; ",
        v if v.abs() > 1e8 => "seconds since 1970 have to be turned into dates; ",
        _ => "",
    }
}

/// Days to the start of a date, month from 1; days beyond the month run on.
fn days(year: i64, month: i64, day: i64) -> f64 {
    // Years begin in March here, so that the leap day is the last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let before = 365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400);
    (before + (153 * m + 2) / 5 + day - 1 - 719_468) as f64
}

/// The date that a day lies on, `2015-03-14`.
///
/// ```
/// use isopleth::geo::time::date;
/// assert_eq!(date(0.0), "1970-01-01");
/// assert_eq!(date(16_508.9), "2015-03-14");
/// assert_eq!(date(-0.1), "1969-12-31");
/// ```
pub fn date(day: f64) -> String {
    let day = day.floor() as i64 + 719_468;
    // Four centuries have 146,097 days.
    let (cycle, left) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (left - left / 1_460 + left / 36_524 - left / 146_096) / 365;
    let of_year = left - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let of_month = of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = match month < 10 {
        true => (400 * cycle + year, month + 3),
        false => (400 * cycle + year + 1, month - 9),
    };
    format!("{year}-{month:02}-{of_month:02}")
}

/// The year that a day lies in.
pub fn year(day: f64) -> i64 {
    date(day).rsplitn(3, '-').last().and_then(|year| year.parse().ok()).unwrap_or(0)
}

/// When each site of a survey was visited.
#[derive(Debug, Clone, PartialEq)]
pub struct Times {
    /// The column.
    pub column: String,
    /// Days, `[site]`: the middle of the year, month or day that was written, or the moment.
    pub days: Vec<f64>,
}

impl Times {
    /// Those of some sites, by position.
    pub fn subset(&self, sites: &[usize]) -> Self {
        Times { days: sites.iter().map(|i| self.days[*i]).collect(), column: self.column.clone() }
    }

    /// How many different ones.
    pub fn distinct(&self) -> Vec<f64> {
        let mut days = self.days.clone();
        days.sort_by(f64::total_cmp);
        days.dedup();
        days
    }

    /// In words: "2 times, 2014-07-02 to 2015-07-02".
    pub fn about(&self) -> String {
        let days = self.distinct();
        match days[..] {
            [] => "no time".into(),
            [one] => format!("1 time, {}", date(one)),
            [first, .., last] => {
                format!("{} times, {} to {}", days.len(), date(first), date(last))
            }
        }
    }
}

/// The days of a column's cells, NaN where there is none, and what was noticed.
///
/// A column of whole numbers holds calendar years. One with a fraction anywhere holds decimal years, of
/// which 2015.0 is the start of 2015.
///
/// # Errors
/// The row, from 0, of the first cell that is no time, and what is wrong with it.
pub(super) fn read(
    column: &Column,
) -> std::result::Result<(Vec<f64>, Option<String>), (usize, Error)> {
    let Column::Numbers(values) = column else {
        let Column::Text(cells) = column else { unreachable!("numbers or text") };
        let day = |(row, cell): (usize, &String)| match number(cell) {
            Some(v) if v.is_nan() => Ok(f64::NAN),
            _ => Period::read(cell).map(|p| p.middle()).map_err(|e| (row, e)),
        };
        return Ok((
            cells.iter().enumerate().map(day).collect::<std::result::Result<_, _>>()?,
            None,
        ));
    };
    let decimal = values.iter().any(|v| v.is_finite() && v.fract() != 0.0);
    let day = |(row, value): (usize, &f64)| match (value.is_nan(), decimal) {
        (true, _) => Ok(f64::NAN),
        (_, false) => Period::read(&value.to_string()).map(|p| p.middle()).map_err(|e| (row, e)),
        // The point stays where the fraction is none.
        (_, true) => Period::read(&format!("{value:?}")).map(|p| p.from).map_err(|e| (row, e)),
    };
    let days = values.iter().enumerate().map(day).collect::<std::result::Result<_, _>>()?;
    let note = decimal.then(|| "read times as decimal years: 2015.0 is the start of 2015".into());
    Ok((days, note))
}

/// A time that is mapped.
#[derive(Debug, Clone, PartialEq)]
pub struct Moment {
    /// As it was asked for: "2015", "2015-03".
    pub label: String,
    /// What it covers.
    pub period: Period,
}

/// The times that `--at` names, in its order: single ones and ranges, `2015,2017..2019,2020-06`.
///
/// ```
/// let at = |text: &str| -> Vec<String> {
///     let all = isopleth::geo::time::moments(&[text.to_string()]).unwrap();
///     all.into_iter().map(|m| m.label).collect()
/// };
/// assert_eq!(at("2015..2017"), ["2015", "2016", "2017"]);
/// assert_eq!(at("2019-11..2020-01"), ["2019-11", "2019-12", "2020-01"]);
/// assert_eq!(at("2020-02-28..2020-03-01").len(), 3);
/// ```
///
/// # Errors
/// [`Error::Input`] for what is no time, a range that runs backwards or whose ends are of different kinds,
/// a time that is asked for twice, or more than 1,000 of them.
pub fn moments(asked: &[String]) -> Result<Vec<Moment>> {
    let mut all: Vec<Moment> = Vec::new();
    for text in asked.iter().flat_map(|text| text.split(',')) {
        let text = text.trim();
        let more = match text.split_once("..") {
            None => vec![Moment { label: text.replace('/', "-"), period: Period::read(text)? }],
            Some((from, to)) => range(text, from.trim(), to.trim())?,
        };
        for moment in more {
            if all.iter().any(|m| m.period == moment.period) {
                return Err(Error::input("a time is asked for twice")
                    .fact("--at", &moment.label)
                    .try_this("name each time once: it is a band of the map"));
            }
            all.push(moment);
        }
        if all.len() > MOST {
            return Err(too_many(text));
        }
    }
    Ok(all)
}

fn too_many(text: &str) -> Error {
    Error::input(format!("a map has at most {MOST} times, a band each"))
        .fact("--at", text)
        .try_this("ask for months or years, or make several maps")
}

fn range(text: &str, from: &str, to: &str) -> Result<Vec<Moment>> {
    let (first, last) = (Period::read(from)?, Period::read(to)?);
    let refuse = |what: &str| Error::input(what).fact("--at", text);
    // How many parts the date has tells what the steps are.
    let parts = |text: &str| text.split(['-', '/']).count();
    let stepped = |p: &Period| p.to > p.from;
    if !(stepped(&first) && stepped(&last)) || parts(from) != parts(to) {
        return Err(refuse("a range runs over years, months or days")
            .try_this("write both ends alike: 2015..2020, 2019-01..2019-12"));
    }
    if last.from < first.from {
        return Err(refuse("a range runs backwards").try_this(format!("write {to}..{from}")));
    }
    let mut all = Vec::new();
    let mut next = first.from;
    while next <= last.from {
        let day = date(next);
        let label = match parts(from) {
            1 => &day[..4],
            2 => &day[..7],
            _ => &day[..],
        };
        let moment = Moment { label: label.to_string(), period: Period::read(label)? };
        next = moment.period.to;
        all.push(moment);
        if all.len() > MOST {
            return Err(too_many(text));
        }
    }
    Ok(all)
}

/// Days and model units: goes into the run record with the frame.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Clock {
    /// The day that is 0 in model units: half way between the first and the last of the survey.
    pub middle: f64,
    /// Days in one model unit: half the time from the first to the last; a year where that is nothing.
    pub days_per_unit: f64,
    /// The day of every place that has none of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<f64>,
}

impl Clock {
    /// The clock of a survey.
    pub fn fit(times: &Times) -> Self {
        let [middle, half] = unit_time(&times.days);
        // Of one time nothing says how long a unit should be.
        let days_per_unit = if times.distinct().len() > 1 { half } else { 365.25 };
        Clock { middle, days_per_unit, now: None }
    }

    /// A day in model units.
    pub fn units(&self, day: f64) -> f64 {
        (day - self.middle) / self.days_per_unit
    }

    /// Days in model units, `[1, site, 1]`; worked out in f64, then cast.
    ///
    /// # Errors
    /// If the tensor cannot be made.
    pub fn tensor(&self, days: &[f64], device: &Device) -> Result<Tensor> {
        let units: Vec<f32> = days.iter().map(|day| self.units(*day) as f32).collect();
        Ok(Tensor::from_vec(units, (1, days.len(), 1), device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every day of eight centuries comes back, and is one after the last.
    #[test]
    fn dates_and_days_agree() {
        let (mut day, mut before) = (days(1800, 1, 1), String::new());
        while day < days(2201, 1, 1) {
            let text = date(day);
            assert!(text > before, "{before} and then {text}");
            assert_eq!(Period::read(&text).unwrap(), Period { from: day, to: day + 1.0 }, "{text}");
            before = text;
            day += 1.0;
        }
        // `date -u -d 2000-02-29 +%s` / 86400.
        assert_eq!(days(2000, 2, 29), 11_016.0);
        assert_eq!((year(days(1999, 12, 31)), year(days(2000, 1, 1))), (1999, 2000));
    }

    #[test]
    fn columns_of_every_kind_are_read() {
        let numbers = |v: &[f64]| read(&Column::Numbers(v.to_vec())).unwrap();
        let (years, note) = numbers(&[2015.0, f64::NAN, 2016.0]);
        assert_eq!(years[0], days(2015, 1, 1) + 182.5);
        assert!(years[1].is_nan() && years[2] == days(2016, 7, 2) && note.is_none());
        // A fraction anywhere makes all of them decimal: 2015.0 is no longer the whole year.
        let (decimal, note) = numbers(&[2015.0, 2015.5]);
        assert_eq!(decimal, [days(2015, 1, 1), days(2015, 1, 1) + 182.5]);
        assert!(note.unwrap().contains("decimal"));
        let text =
            ["2015-03", "NA", "2015/03/14", "2015-03-14 06:00:00+00", "2015-03-14T12:00Z", "2015"];
        let (found, _) = read(&Column::Text(text.map(String::from).to_vec())).unwrap();
        let day = days(2015, 3, 14);
        assert_eq!(found[0], days(2015, 3, 1) + 15.5);
        assert!(found[1].is_nan());
        assert_eq!(found[2..], [day + 0.5, day + 0.25, day + 0.5, years[0]]);
    }

    #[test]
    fn what_is_no_time_is_refused_with_a_reason() {
        for (text, words, help) in [
            ("14/03/2015", "no time", "year first"),
            ("March 2015", "no time", "2015-03"),
            ("2015-13", "12 months", "2015-03"),
            ("2015-02-29", "no such day", ""),
            ("2015-3-0", "no such day", ""),
            ("2015-03-14T25:00", "no time", ""),
            ("20150314", "no year", "2015-03-14"),
            ("201503", "no year", "2015-03"),
            ("1381", "no year", "1900 + (CMC"),
            ("15", "no year", "2015"),
            ("-999", "no year", "empty"),
            ("1426291200", "no year", "seconds"),
            ("0215-03-14", "no year", ""),
            ("2015-03-14-02", "no time", ""),
            ("inf", "no year", ""),
        ] {
            let error = Period::read(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
            assert!(error.help().unwrap().contains(help), "{text}: {:?}", error.help());
        }
        let (row, _) = read(&Column::Numbers(vec![2015.0, f64::NAN, 3.0])).unwrap_err();
        assert_eq!(row, 2);
    }

    #[test]
    fn ranges_that_mislead_are_refused() {
        for (text, words) in [
            ("2017..2015", "backwards"),
            ("2015..2016-03", "both"),
            ("2015.5..2016.5", "runs over"),
            ("2015,2015", "twice"),
            ("2015,2014..2016", "twice"),
            ("1900-01-01..2000-01-01", "at most 1000"),
            ("2015..", "no time"),
            ("", "no time"),
        ] {
            let error = moments(&[text.to_string()]).unwrap_err();
            let all = format!("{error} {}", error.help().unwrap());
            assert!(all.contains(words), "{text}: {all}");
        }
    }

    #[test]
    fn the_clock_spans_the_survey() {
        let times = Times { column: "year".into(), days: vec![100.0, 500.0, 300.0] };
        let clock = Clock::fit(&times);
        assert_eq!([100.0, 300.0, 500.0, 600.0].map(|d| clock.units(d)), [-1.0, 0.0, 1.0, 1.5]);
        let one = Clock::fit(&Times { days: vec![7.0; 3], ..times });
        assert_eq!((one.middle, one.days_per_unit), (7.0, 365.25));
    }
}
