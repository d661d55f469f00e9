//! Folds of sites that lie together: what a model is worth away from its sites.
//!
//! Sites near each other are alike, so a site held out at random is foretold from its neighbours. Holding
//! whole areas out asks what the map is worth where nobody went (Roberts et al. 2017,
//! doi:10.1111/ecog.02881).

use candle_core::Device;

use super::Folds;
use crate::{
    error::{Error, Result},
    geo::{frame::Frame, grid::Resolution, survey::Survey},
    rng::Stream,
};

/// Folds that blocks and clusters are dealt to where there are more of them.
const MOST: usize = 10;

/// What `blocks:…` and `clusters:…` mean; nothing for all else.
///
/// # Errors
/// [`Error::Input`] for a number or length that makes no folds.
pub(super) fn parse(text: &str, survey: &Survey, seed: u64) -> Result<Option<Folds>> {
    let length = |given: &str, name: &str| -> Result<f64> {
        match given.parse()? {
            Resolution::Metres(metres) => Ok(metres / 1000.0),
            Resolution::Degrees(_) => {
                Err(Error::input(format!("{name} are laid out on a plane, and have no degrees"))
                    .fact("--folds", text)
                    .try_this(format!("give a length on the ground: {name}:100km")))
            }
        }
    };
    let is_length = |given: &str| given.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if let Some(given) = text.strip_prefix("blocks:") {
        if let Ok(n) = given.parse() {
            return areas(n, survey, seed).map(Some);
        }
        return squares(length(given, "blocks")?, survey, seed, text).map(Some);
    }
    match text.strip_prefix("clusters:") {
        Some(given) if is_length(given) => {
            together(length(given, "clusters")?, survey, text).map(Some)
        }
        // The survey's own table.
        Some(column) => {
            let file = survey.source.display();
            Folds::parse(&format!("{file}:{column}"), survey, seed).map(Some)
        }
        None => Ok(None),
    }
}

/// Sites in the survey's geometry, km.
fn places(survey: &Survey) -> Result<Vec<Vec<f64>>> {
    let frame = Frame::fit(survey)?;
    frame.places_km(&frame.sites_of(survey, &Device::Cpu)?)
}

fn square(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

fn nearest(centres: &[Vec<f64>], to: &[f64]) -> usize {
    let by = |a: &usize, b: &usize| square(&centres[*a], to).total_cmp(&square(&centres[*b], to));
    (0..centres.len()).min_by(by).unwrap_or(0)
}

/// `n` compact areas: k-means (Lloyd 1982) from spread-out starts (Arthur & Vassilvitskii 2007).
fn areas(n: usize, survey: &Survey, seed: u64) -> Result<Folds> {
    let xy = places(survey)?;
    let bits = |p: &Vec<f64>| p.iter().map(|c| c.to_bits()).collect::<Vec<u64>>();
    let mut distinct: Vec<Vec<u64>> = xy.iter().map(bits).collect();
    distinct.sort_unstable();
    distinct.dedup();
    if !(2..=distinct.len()).contains(&n) {
        return Err(Error::input("there must be at least 2 blocks and at most one per place")
            .fact("blocks", n)
            .fact("places", distinct.len())
            .try_this("five to ten are usual: --folds blocks:10"));
    }
    let mut rng = Stream::new(seed, "blocks", 0);
    let mut centres = vec![xy[rng.below(xy.len())].clone()];
    while centres.len() < n {
        let gaps: Vec<f64> = xy.iter().map(|p| square(p, &centres[nearest(&centres, p)])).collect();
        let mut left = rng.unit() * gaps.iter().sum::<f64>();
        let next = gaps.iter().position(|gap| {
            left -= gap;
            left < 0.0 && *gap > 0.0
        });
        // Rounding may leave nobody: then the farthest.
        let farthest = || (0..xy.len()).max_by(|a, b| gaps[*a].total_cmp(&gaps[*b])).unwrap_or(0);
        centres.push(xy[next.unwrap_or_else(farthest)].clone());
    }
    let mut of: Vec<usize> = Vec::new();
    for _ in 0..100 {
        let now: Vec<usize> = xy.iter().map(|p| nearest(&centres, p)).collect();
        if now == of {
            break;
        }
        of = now;
        for (k, centre) in centres.iter_mut().enumerate() {
            let own = || xy.iter().zip(&of).filter(|(_, f)| **f == k).map(|(p, _)| p);
            let count = own().count() as f64;
            if count > 0.0 {
                let mean = |d: usize| own().fold(0.0, |sum, p| sum + p[d]) / count;
                *centre = (0..centre.len()).map(mean).collect();
            }
        }
    }
    Ok(dealt(of, usize::MAX))
}

/// Squares of a side, where chance puts them.
fn squares(side: f64, survey: &Survey, seed: u64, text: &str) -> Result<Folds> {
    let xy = places(survey)?;
    let mut rng = Stream::new(seed, "blocks", 1);
    let from: Vec<f64> = xy[0].iter().map(|_| rng.unit() * side).collect();
    let cell = |p: &Vec<f64>| -> Vec<i64> {
        p.iter().zip(&from).map(|(c, from)| ((c - from) / side).floor() as i64).collect()
    };
    several(numbered(xy.iter().map(cell)), text, "blocks", "a smaller side")
}

/// Sites that are nearer than `gap` to each other, and so on from site to site.
fn together(gap: f64, survey: &Survey, text: &str) -> Result<Folds> {
    let xy = places(survey)?;
    // A lattice of cells as wide as the gap, so that only neighbouring cells are looked at.
    let cell = |p: &[f64]| p.iter().map(|v| (v / gap).floor() as i64).collect::<Vec<_>>();
    let mut cells = std::collections::HashMap::<Vec<i64>, Vec<usize>>::new();
    for (i, p) in xy.iter().enumerate() {
        cells.entry(cell(p)).or_default().push(i);
    }
    let mut of = vec![usize::MAX; xy.len()];
    let mut clusters = 0;
    for start in 0..xy.len() {
        if of[start] != usize::MAX {
            continue;
        }
        let mut open = vec![start];
        of[start] = clusters;
        while let Some(i) = open.pop() {
            let own = cell(&xy[i]);
            let around = (0..3i64.pow(own.len() as u32)).map(|shift| -> Vec<i64> {
                (0..own.len()).map(|d| own[d] + shift / 3i64.pow(d as u32) % 3 - 1).collect()
            });
            for j in around.filter_map(|at| cells.get(&at)).flatten() {
                if of[*j] == usize::MAX && square(&xy[i], &xy[*j]) < gap * gap {
                    of[*j] = clusters;
                    open.push(*j);
                }
            }
        }
        clusters += 1;
    }
    several(of, text, "clusters", "a shorter length")
}

/// Numbers from 0 for labels, in the order in which they come.
fn numbered(labels: impl Iterator<Item = Vec<i64>>) -> Vec<usize> {
    let mut seen = std::collections::HashMap::new();
    labels
        .map(|label| {
            let next = seen.len();
            *seen.entry(label).or_insert(next)
        })
        .collect()
}

fn several(of: Vec<usize>, text: &str, what: &str, help: &str) -> Result<Folds> {
    if of.iter().all(|f| *f == 0) {
        return Err(Error::input(format!("all sites would be in one of the {what}"))
            .fact("--folds", text)
            .try_this(format!("give {help}, or a number of folds")));
    }
    Ok(dealt(of, MOST))
}

/// Groups as folds: each its own up to `most`; beyond that dealt whole, the largest first, each to the
/// fold that has the fewest sites.
fn dealt(of: Vec<usize>, most: usize) -> Folds {
    let groups = of.iter().max().map_or(0, |g| g + 1);
    let size = |g: usize| of.iter().filter(|f| **f == g).count();
    let mut order: Vec<(usize, usize)> = (0..groups).map(|g| (size(g), g)).collect();
    order.retain(|(size, _)| *size > 0);
    order.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    let folds = order.len().min(most);
    let (mut filled, mut fold) = (vec![0; folds], vec![0; groups]);
    for (size, group) in order {
        let to = (0..folds).min_by_key(|f| filled[*f]).unwrap_or(0);
        filled[to] += size;
        fold[group] = to;
    }
    let labels = (0..folds).map(|f| f.to_string()).collect();
    Folds { labels, of: of.iter().map(|g| fold[*g]).collect(), ahead: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geo::{crs::Crs, survey::Outcome};

    /// Four villages at the corners of a square of 100 km, ten sites in each within 3 km.
    fn survey() -> Survey {
        let mut rng = Stream::new(4, "villages", 0);
        let (mut x, mut y) = (Vec::new(), Vec::new());
        for i in 0..40 {
            x.push(100.0 * (i % 2) as f64 + rng.uniform(0.0, 2.0));
            y.push(100.0 * (i / 2 % 2) as f64 + rng.uniform(0.0, 2.0));
        }
        Survey {
            source: "villages.csv".into(),
            crs: Crs::from_user("local:km").unwrap(),
            rows: (1..=40).collect(),
            outcome: Outcome::Values(vec![0.0; 40]),
            covariates: None,
            dropped: Vec::new(),
            times: None,
            displacement: None,
            geometry: Default::default(),
            notes: Vec::new(),
            x,
            y,
        }
    }

    /// However villages are told apart, each is held out whole.
    #[test]
    fn villages_are_held_out_whole() {
        let survey = survey();
        for text in ["blocks:4", "blocks:60km", "clusters:5km", "clusters:5000m"] {
            let folds = parse(text, &survey, 1).unwrap().unwrap();
            for i in 0..40 {
                assert_eq!(folds.of[i], folds.of[i % 4], "{text}: {:?}", folds.of);
            }
            assert_eq!(folds.labels.len(), 4, "{text}");
            assert_eq!(folds.of.iter().filter(|f| **f == 0).count(), 10, "{text}");
        }
        assert!(parse("10", &survey, 1).unwrap().is_none());
    }

    /// Many clusters are dealt to ten folds of about equal size, none of them torn apart.
    #[test]
    fn many_blocks_are_dealt_whole_to_ten_folds() {
        let groups: Vec<usize> = (0..400).map(|i| (i * i) % 37).collect();
        let folds = dealt(groups.clone(), MOST);
        assert_eq!(folds.labels.len(), 10);
        for (i, g) in groups.iter().enumerate() {
            let first = groups.iter().position(|h| h == g).unwrap();
            assert_eq!(folds.of[i], folds.of[first]);
        }
        for f in 0..10 {
            let size = folds.of.iter().filter(|o| **o == f).count();
            assert!((20..=60).contains(&size), "{size} in fold {f}");
        }
    }

    #[test]
    fn lengths_that_make_no_folds_are_refused() {
        let survey = survey();
        for (text, words) in [
            ("blocks:1", "at least 2 blocks"),
            ("blocks:41", "at most one per place"),
            ("clusters:500km", "all sites"),
            ("blocks:1deg", "no degrees"),
            ("blocks:wide", ""),
        ] {
            let error = parse(text, &survey, 1).unwrap_err();
            assert!(error.to_string().contains(words) && error.help().is_some(), "{text}: {error}");
        }
    }
}
