//! Folds that follow each other in time: what a map is worth of a year that nobody has surveyed yet.
//!
//! Each period is foretold from those before it alone, as when it lay ahead: a forecast from a rolling
//! origin (Tashman 2000, doi:10.1016/S0169-2070(00)00065-0).

use super::Folds;
use crate::{
    error::{Error, Result},
    geo::{
        survey::Survey,
        time::{date, year},
    },
};

/// Different times up to which each is a period of its own; beyond, calendar years are.
const PERIODS: usize = 30;

/// What `times:N` means; nothing for all else.
///
/// # Errors
/// [`Error::Input`] for a survey without times, and for more periods than leave one to learn from.
pub(super) fn parse(text: &str, survey: &Survey) -> Result<Option<Folds>> {
    let Some(given) = text.strip_prefix("times:") else { return Ok(None) };
    let refuse = |what: &str| Error::input(what).fact("--folds", text);
    let Some(times) = &survey.times else {
        return Err(refuse("the survey has no times to hold out the last of")
            .try_this("name their column with --time COLUMN"));
    };
    let distinct = times.distinct();
    let mut years: Vec<i64> = distinct.iter().map(|day| year(*day)).collect();
    years.dedup();
    let label = |day: &f64| match years.len() < distinct.len() && distinct.len() <= PERIODS {
        true => date(*day),
        false => year(*day).to_string(),
    };
    let mut periods: Vec<String> = distinct.iter().map(label).collect();
    periods.dedup();
    let most = periods.len().saturating_sub(1);
    let last = given.parse::<usize>().ok().filter(|n| (1..=most).contains(n)).ok_or_else(|| {
        let help = match most {
            0 => "a survey of one period says nothing of change: use --folds 10".to_string(),
            most => format!("hold out 1 to {most}: --folds times:1"),
        };
        refuse("the number of periods to hold out leaves none to learn from, or is none")
            .fact("periods", periods.join(", "))
            .try_this(help)
    })?;
    let labels = periods.split_off(periods.len() - last);
    let fold = |day: &f64| labels.iter().position(|l| *l == label(day)).unwrap_or(Folds::NEVER);
    let of = times.days.iter().map(fold).collect();
    Ok(Some(Folds { labels, of, ahead: true }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geo::{crs::Crs, survey::Outcome, time::Times};

    fn survey(days: Vec<f64>) -> Survey {
        let n = days.len();
        Survey {
            source: "rounds.csv".into(),
            crs: Crs::from_user("local:km").unwrap(),
            x: (0..n).map(|i| i as f64).collect(),
            y: vec![0.0; n],
            rows: (1..=n).collect(),
            outcome: Outcome::Values(vec![0.0; n]),
            times: Some(Times { column: "year".into(), days }),
            covariates: None,
            dropped: Vec::new(),
            displacement: None,
            geometry: Default::default(),
            notes: Vec::new(),
        }
    }

    /// A fold never reads its own future, and every site before it.
    #[test]
    fn periods_are_foretold_from_those_before_alone() {
        let survey = survey((0..40).map(|i| 366.0 * f64::from(i % 5)).collect());
        let folds = parse("times:2", &survey).unwrap().unwrap();
        assert_eq!(folds.labels, ["1973", "1974"]);
        for (fold, year) in [(0, 3), (1, 4)] {
            for i in 0..40 {
                assert_eq!(folds.of[i] == fold, i % 5 == year, "site {i} in fold {fold}");
                assert_eq!(folds.reads(fold, i), i % 5 <= year, "site {i} read for fold {fold}");
            }
        }
        assert!(parse("10", &survey).unwrap().is_none());
    }

    #[test]
    fn many_dates_are_held_out_by_years() {
        let survey = survey((0..200).map(|i| 10.0 * f64::from(i)).collect());
        let folds = parse("times:3", &survey).unwrap().unwrap();
        assert_eq!(folds.labels, ["1973", "1974", "1975"]);
    }

    #[test]
    fn numbers_of_periods_that_leave_nothing_are_refused() {
        let two = survey(vec![0.0, 0.0, 400.0]);
        for text in ["times:2", "times:0", "times:many"] {
            let error = parse(text, &two).unwrap_err();
            assert!(error.help().unwrap().contains("times:1"), "{text}: {error}");
        }
        assert!(
            parse("times:1", &survey(vec![5.0; 4])).unwrap_err().help().unwrap().contains("10")
        );
        let without = Survey { times: None, ..two };
        assert!(parse("times:1", &without).unwrap_err().help().unwrap().contains("--time"));
    }
}
