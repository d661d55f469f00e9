//! Whether a task embedding tells kinds of surfaces apart: k-means, how its clusters agree with the
//! classes, and what a linear probe reads off.
//!
//! Source: Hubert & Arabie (1985) for the adjusted Rand index; Böhning (1992) for the probe's bound;
//! Aitchison (1986) for the centred log-ratio.

use faer::Mat;

use crate::{error::Result, linalg::Cholesky, rng::Stream};

/// Restarts of k-means; the tightest clusters count.
const RESTARTS: u64 = 10;
/// Folds of the probe.
const FOLDS: usize = 5;
/// Smallest part of a composition.
const LEAST: f64 = 1e-6;

/// How well an embedding tells classes apart.
#[derive(Debug, Clone, PartialEq)]
pub struct Agreement {
    /// Normalised mutual information of clusters and classes.
    pub nmi: f64,
    /// Adjusted Rand index of clusters and classes.
    pub ari: f64,
    /// Whether the probe was right about each task, held out.
    pub right: Vec<bool>,
    /// The two directions along which tasks differ most.
    pub plane: Vec<[f64; 2]>,
}

/// Measures an embedding `[task][width]` against the class of each task, of `classes`.
///
/// An embedding whose numbers are all positive is taken for weights that add up to a whole, and
/// becomes its centred log-ratio.
///
/// # Errors
/// Those of factoring, for numbers that are not finite.
pub fn agreement(embedding: &[Vec<f64>], class: &[usize], classes: usize) -> Result<Agreement> {
    let points: Vec<Vec<f64>> = match embedding.iter().flatten().all(|v| *v > 0.0) {
        true => embedding.iter().map(|row| log_ratio(row)).collect(),
        false => embedding.to_vec(),
    };
    let found = k_means(&points, classes, RESTARTS);
    Ok(Agreement {
        nmi: nmi(&found, class),
        ari: ari(&found, class),
        right: probe(&points, class, classes)?,
        plane: plane(&points),
    })
}

/// `ln pₗ − mean ln p` of positive weights, normalised to add up to 1 and no smaller than 1e-6.
fn log_ratio(weights: &[f64]) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    let logs: Vec<f64> = weights.iter().map(|w| (w / sum).max(LEAST).ln()).collect();
    let mean = logs.iter().sum::<f64>() / logs.len() as f64;
    logs.iter().map(|l| l - mean).collect()
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

/// Lloyd's k-means from k-means++ starts (Arthur & Vassilvitskii 2007): the cluster of each point.
fn k_means(points: &[Vec<f64>], k: usize, restarts: u64) -> Vec<usize> {
    let mut best: Option<(f64, Vec<usize>)> = None;
    for restart in 0..restarts {
        let mut rng = Stream::new(0, "k-means", restart);
        let mut centres = vec![points[rng.below(points.len())].clone()];
        while centres.len() < k {
            let far =
                |p: &Vec<f64>| centres.iter().map(|c| apart(p, c)).fold(f64::INFINITY, f64::min);
            let weight: Vec<f64> = points.iter().map(far).collect();
            let mut left = rng.unit() * weight.iter().sum::<f64>();
            let chosen = weight.iter().position(|w| {
                left -= w;
                left < 0.0
            });
            centres.push(points[chosen.unwrap_or(points.len() - 1)].clone());
        }
        let nearest = |centres: &[Vec<f64>], p: &Vec<f64>| {
            (0..k)
                .map(|c| (apart(p, &centres[c]), c))
                .min_by(|a, b| a.0.total_cmp(&b.0))
                .expect("at least one centre")
        };
        let mut cluster = vec![usize::MAX; points.len()];
        let mut spread = f64::INFINITY;
        for _ in 0..300 {
            let found: Vec<(f64, usize)> = points.iter().map(|p| nearest(&centres, p)).collect();
            spread = found.iter().map(|f| f.0).sum();
            let now: Vec<usize> = found.into_iter().map(|f| f.1).collect();
            if now == cluster {
                break;
            }
            cluster = now;
            for (c, centre) in centres.iter_mut().enumerate() {
                let own: Vec<&Vec<f64>> =
                    points.iter().zip(&cluster).filter(|(_, k)| **k == c).map(|p| p.0).collect();
                // A centre that lost all its points stays where it was.
                if !own.is_empty() {
                    for (d, value) in centre.iter_mut().enumerate() {
                        *value = own.iter().map(|p| p[d]).sum::<f64>() / own.len() as f64;
                    }
                }
            }
        }
        if best.as_ref().is_none_or(|(least, _)| spread < *least) {
            best = Some((spread, cluster));
        }
    }
    best.expect("at least one restart").1
}

/// How often each pair of labels meets, `[a][b]`.
fn table(a: &[usize], b: &[usize]) -> Vec<Vec<f64>> {
    let most = |x: &[usize]| x.iter().max().map_or(0, |m| m + 1);
    let mut counts = vec![vec![0.0; most(b)]; most(a)];
    a.iter().zip(b).for_each(|(a, b)| counts[*a][*b] += 1.0);
    counts
}

fn margins(counts: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let rows = counts.iter().map(|row| row.iter().sum()).collect();
    let columns = (0..counts.first().map_or(0, Vec::len))
        .map(|j| counts.iter().map(|row| row[j]).sum())
        .collect();
    (rows, columns)
}

/// `2 I(a; b) / (H(a) + H(b))`; 0 where neither has two labels.
fn nmi(a: &[usize], b: &[usize]) -> f64 {
    let (counts, n) = (table(a, b), a.len() as f64);
    let (rows, columns) = margins(&counts);
    let entropy =
        |m: &[f64]| -> f64 { m.iter().filter(|c| **c > 0.0).map(|c| -c / n * (c / n).ln()).sum() };
    let mut shared = 0.0;
    for (i, row) in counts.iter().enumerate() {
        for (j, count) in row.iter().enumerate().filter(|(_, c)| **c > 0.0) {
            shared += count / n * (n * count / (rows[i] * columns[j])).ln();
        }
    }
    let both = entropy(&rows) + entropy(&columns);
    if both > 0.0 { 2.0 * shared / both } else { 0.0 }
}

/// The Rand index, moved and scaled so that chance scores 0 and agreement 1.
fn ari(a: &[usize], b: &[usize]) -> f64 {
    let counts = table(a, b);
    let (rows, columns) = margins(&counts);
    let pairs = |m: &[f64]| -> f64 { m.iter().map(|c| 0.5 * c * (c - 1.0)).sum() };
    let both: f64 = counts.iter().map(|row| pairs(row)).sum();
    let (p, q) = (pairs(&rows), pairs(&columns));
    let expected = p * q / pairs(&[a.len() as f64]);
    let most = 0.5 * (p + q);
    if most == expected { 0.0 } else { (both - expected) / (most - expected) }
}

/// Whether logistic regression on the other folds is right about each point. Features are
/// standardised; the penalty is half a squared weight.
///
/// Each step solves with a bound of the Hessian, `½ XᵀX + I` for every class (Böhning 1992), so that
/// one factor serves all steps and no step overshoots.
fn probe(points: &[Vec<f64>], class: &[usize], classes: usize) -> Result<Vec<bool>> {
    let (n, width) = (points.len(), points[0].len());
    let fold: Vec<usize> = {
        let order = Stream::new(0, "probe", 0).permutation(n);
        let mut fold = vec![0; n];
        order.iter().enumerate().for_each(|(place, i)| fold[*i] = place % FOLDS);
        fold
    };
    let mut right = vec![false; n];
    for held in 0..FOLDS {
        let seen: Vec<usize> = (0..n).filter(|i| fold[*i] != held).collect();
        let column = |d: usize| seen.iter().map(|i| points[*i][d]).collect::<Vec<f64>>();
        let scale: Vec<(f64, f64)> =
            (0..width).map(|d| crate::sites::mean_sd(&column(d))).collect();
        let features = |i: usize| -> Vec<f64> {
            let x = points[i].iter().zip(&scale).map(|(x, (mean, sd))| (x - mean) / sd);
            x.chain([1.0]).collect()
        };
        let x: Vec<Vec<f64>> = seen.iter().map(|i| features(*i)).collect();
        let mut bound = Mat::zeros(width + 1, width + 1);
        for row in &x {
            for j in 0..=width {
                for i in j..=width {
                    bound[(i, j)] += 0.5 * row[i] * row[j];
                }
            }
        }
        (0..=width).for_each(|i| bound[(i, i)] += 1.0);
        let factor = Cholesky::factor(bound)?;
        let mut weights = vec![vec![0.0; width + 1]; classes];
        let scores = |weights: &[Vec<f64>], x: &[f64]| -> Vec<f64> {
            weights.iter().map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
        };
        for _ in 0..300 {
            let mut slope: Vec<Vec<f64>> =
                weights.iter().map(|w| w.iter().map(|w| -w).collect()).collect();
            for (row, i) in x.iter().zip(&seen) {
                let scores = scores(&weights, row);
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                for (k, slope) in slope.iter_mut().enumerate() {
                    let p = (scores[k] - top).exp() / total;
                    let off = f64::from(class[*i] == k) - p;
                    slope.iter_mut().zip(row).for_each(|(s, x)| *s += off * x);
                }
            }
            let mut moved = 0.0f64;
            for (weights, slope) in weights.iter_mut().zip(&slope) {
                for (w, step) in weights.iter_mut().zip(factor.solve(slope)) {
                    *w += step;
                    moved = moved.max(step.abs());
                }
            }
            if moved < 1e-5 {
                break;
            }
        }
        for i in (0..n).filter(|i| fold[*i] == held) {
            let scores = scores(&weights, &features(i));
            let said = (0..classes).max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
            right[i] = said == Some(class[i]);
        }
    }
    Ok(right)
}

/// Points along their first two principal components, by power iteration.
fn plane(points: &[Vec<f64>]) -> Vec<[f64; 2]> {
    let (n, width) = (points.len() as f64, points[0].len());
    let mean: Vec<f64> = (0..width).map(|d| points.iter().map(|p| p[d]).sum::<f64>() / n).collect();
    let mut rest: Vec<Vec<f64>> =
        points.iter().map(|p| p.iter().zip(&mean).map(|(x, m)| x - m).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let mut out = vec![[0.0; 2]; points.len()];
    for axis in 0..2 {
        let mut direction = Stream::new(0, "principal component", axis as u64).normals(width);
        for _ in 0..100 {
            let mut next = vec![0.0; width];
            for row in &rest {
                let along = dot(row, &direction);
                next.iter_mut().zip(row).for_each(|(v, x)| *v += along * x);
            }
            let length = dot(&next, &next).sqrt().max(f64::MIN_POSITIVE);
            direction = next.into_iter().map(|v| v / length).collect();
        }
        for (out, row) in out.iter_mut().zip(&mut rest) {
            out[axis] = dot(row, &direction);
            row.iter_mut().zip(&direction).for_each(|(x, d)| *x -= out[axis] * d);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// sklearn 1.x: `adjusted_rand_score`, `normalized_mutual_info_score`.
    #[test]
    fn agreement_of_labels_is_the_library_s() {
        let (a, b) = ([0, 0, 1, 2], [0, 0, 1, 1]);
        assert!((ari(&a, &b) - 0.571_428_571_428_571_5).abs() < 1e-12);
        assert!((nmi(&a, &b) - 0.8).abs() < 1e-12);
        assert_eq!(ari(&[0, 0, 0, 0], &[0, 1, 2, 3]), 0.0);
        assert!((nmi(&[1, 1, 0, 0], &[0, 0, 1, 1]) - 1.0).abs() < 1e-12, "labels are only names");
        let (a, b) = ([0, 0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 2, 2, 0, 2]);
        assert!((ari(&a, &b) - 0.431_818_181_818_181_77).abs() < 1e-12, "{}", ari(&a, &b));
        assert!((nmi(&a, &b) - 0.618_065_646_292_154_1).abs() < 1e-12, "{}", nmi(&a, &b));
    }

    #[test]
    fn clusters_far_apart_are_found_and_noise_is_not() -> Result<()> {
        let mut rng = Stream::new(1, "clouds", 0);
        let class: Vec<usize> = (0..300).map(|i| i % 3).collect();
        let cloud = |far: f64, rng: &mut Stream| -> Vec<Vec<f64>> {
            let one = |c: &usize| (0..4).map(|d| far * f64::from(d == *c) + rng.normal()).collect();
            class.iter().map(one).collect()
        };
        let clear = agreement(&cloud(12.0, &mut rng), &class, 3)?;
        assert!(clear.ari > 0.999 && clear.nmi > 0.999 && clear.right.iter().all(|r| *r));
        let noise = agreement(&cloud(0.0, &mut rng), &class, 3)?;
        let share = noise.right.iter().filter(|r| **r).count() as f64 / 300.0;
        assert!(noise.ari.abs() < 0.05 && (share - 1.0 / 3.0).abs() < 0.12, "{share}");
        Ok(())
    }

    #[test]
    fn weights_of_a_whole_become_their_log_ratio() {
        let found = log_ratio(&[2.0, 2.0, 4.0]);
        assert!((found[2] - found[0] - 2f64.ln()).abs() < 1e-12);
        assert!(found.iter().sum::<f64>().abs() < 1e-12);
    }

    #[test]
    fn the_plane_holds_what_differs_most() {
        let points: Vec<Vec<f64>> =
            (0..50).map(|i| vec![0.1, 3.0 * f64::from(i), f64::from(i % 2)]).collect();
        let plane = plane(&points);
        let spread = |axis: usize| {
            let (low, high) = plane.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), p| {
                (a.min(p[axis]), b.max(p[axis]))
            });
            high - low
        };
        assert!((spread(0) - 147.0).abs() < 0.5 && (spread(1) - 1.0).abs() < 0.1);
    }
}
