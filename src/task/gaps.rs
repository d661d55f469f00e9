//! What a satellite does not see: clouds over a lattice, and the ground between its swaths.
//!
//! Source: thresholded Gaussian surfaces after Lantuéjoul (2002), "Geostatistical Simulation",
//! chapter 16; swaths as in Heaton et al. (2019), doi:10.1007/s13253-018-00348-w.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    kernel::{Matern, Metric, Smoothness, Sum},
    prior::lattice::Lattice,
    rng::Stream,
};

/// Which nodes of a lattice are hidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gaps {
    /// Large smooth clouds with ragged edges, and small ones between them.
    Clouds,
    /// Slanted bands, wider at one end, as lie between the swaths of an orbit.
    Swaths,
    /// Single nodes, as quality flags leave out.
    Scattered,
}

impl Gaps {
    /// Every kind.
    pub const fn all() -> [Gaps; 3] {
        [Self::Clouds, Self::Swaths, Self::Scattered]
    }

    /// Hides `share` of a lattice of `cols` × `rows` square nodes, to the nearest node.
    ///
    /// # Shapes
    /// Returns `[row][column]`, flat: true = hidden.
    /// # Errors
    /// [`Error::Input`] for a share outside (0, 1) and a lattice of fewer than two nodes.
    pub fn hide(self, [cols, rows]: [usize; 2], share: f64, rng: &mut Stream) -> Result<Vec<bool>> {
        let n = cols * rows;
        if !(share > 0.0 && share < 1.0) || n < 2 {
            return Err(Error::input("gaps need a share of a lattice to hide")
                .fact("share", share)
                .fact("lattice", format!("{cols} × {rows}"))
                .try_this("hide for example 0.3 of a lattice of two nodes or more"));
        }
        // What is hidden is where this is high.
        let height: Vec<f64> = match self {
            Gaps::Clouds => clouds([cols, rows], rng)?,
            Gaps::Swaths => swaths([cols, rows], rng),
            Gaps::Scattered => rng.normals(n),
        };
        let hidden = ((share * n as f64).round() as usize).clamp(1, n - 1);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| height[*b].total_cmp(&height[*a]));
        let mut mask = vec![false; n];
        order[..hidden].iter().for_each(|i| mask[*i] = true);
        Ok(mask)
    }
}

/// A surface whose tops are clouds: an eighth of the longer side across, with ragged edges.
fn clouds([cols, rows]: [usize; 2], rng: &mut Stream) -> Result<Vec<f64>> {
    let step = 1.0 / cols.max(rows) as f64;
    let part = |smoothness, length_scale, sill| -> Box<dyn crate::kernel::Kernel> {
        Box::new(Matern { smoothness, length_scale, sill, metric: Metric::Euclidean })
    };
    let kernel = Sum(vec![
        part(Smoothness::FiveHalves, 0.08, 0.8),
        part(Smoothness::ThreeHalves, 0.02, 0.2),
    ]);
    Ok(Lattice::new(&kernel, [cols, rows], [step, step])?.draw(rng)[0].clone())
}

/// How near a node is to the middle of a gap between swaths, which are a quarter of the longer side
/// apart; gaps widen upwards.
fn swaths([cols, rows]: [usize; 2], rng: &mut Stream) -> Vec<f64> {
    let (slant, phase) = (rng.uniform(0.15, 0.4), rng.unit());
    let side = cols.max(rows) as f64;
    let node = |i: usize| {
        let (x, y) = ((i % cols) as f64 / side, (i / cols) as f64 / side);
        let across = (4.0 * (x + slant * y) + phase).fract() - 0.5;
        -across.abs() / (1.0 + y)
    };
    (0..cols * rows).map(node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Share of neighbours along a row and along a column that are of one kind.
    fn alike(mask: &[bool], cols: usize) -> f64 {
        let rows = mask.len() / cols;
        let across = (0..rows).flat_map(|r| (1..cols).map(move |c| (r * cols + c, 1)));
        let up = (1..rows).flat_map(|r| (0..cols).map(move |c| (r * cols + c, cols)));
        let pairs: Vec<bool> =
            across.chain(up).map(|(i, back)| mask[i] == mask[i - back]).collect();
        pairs.iter().filter(|same| **same).count() as f64 / pairs.len() as f64
    }

    #[test]
    fn the_share_is_met_and_gaps_are_of_one_piece() {
        for gaps in Gaps::all() {
            for share in [0.1, 0.3, 0.5] {
                let hide = |seed| gaps.hide([120, 80], share, &mut Stream::new(seed, "gaps", 0));
                let mask = hide(1).unwrap();
                let hidden = mask.iter().filter(|h| **h).count();
                assert_eq!(hidden, (share * 9600.0) as usize, "{gaps:?}");
                assert_eq!(mask, hide(1).unwrap(), "{gaps:?}");
                assert_ne!(mask, hide(2).unwrap(), "{gaps:?}");
                // Single nodes are alike by chance alone.
                let (found, chance) = (alike(&mask, 120), 1.0 - 2.0 * share * (1.0 - share));
                let whole = gaps == Gaps::Scattered;
                assert_eq!(found < chance + 0.02, whole, "{gaps:?}, {share}: {found}, {chance}");
                assert!(whole || found > 0.9, "{gaps:?}, {share}: {found}");
            }
        }
    }

    #[test]
    fn no_share_at_all_is_refused() {
        for (share, size) in [(0.0, [9, 9]), (1.0, [9, 9]), (f64::NAN, [9, 9]), (0.5, [1, 1])] {
            let error = Gaps::Clouds.hide(size, share, &mut Stream::new(1, "gaps", 0)).unwrap_err();
            assert!(error.to_string().contains("a share of a lattice"), "{error}");
        }
    }
}
