//! How far one survey stands out from a pool of others, figure by figure and all in all.

/// Share of a pool in each tail.
const TAIL: f64 = 0.05;

/// The first member of a pool, judged by all.
pub(super) struct Judged {
    /// Two-sided p-value of each figure.
    pub p: Vec<f64>,
    /// Whether it lies above the middle.
    pub above: Vec<bool>,
    /// What 99 % of the others lie between.
    pub range: Vec<[f64; 2]>,
    /// Which figures are findings.
    pub found: Vec<bool>,
    /// Share of the pool whose oddest figure is as odd as the oddest here.
    pub overall: f64,
}

/// One figure over the pool. Within it a p-value is a rank; beyond its 5 % and 95 % points the tails are
/// taken as exponential (peaks over a threshold, Pickands 1975, with shape 0), so that a survey far
/// outside is told from one at the edge.
struct Tails {
    sorted: Vec<f64>,
    /// Threshold and mean excess below and above.
    low: [f64; 2],
    high: [f64; 2],
}

impl Tails {
    /// Nothing where too few members have the figure, or all have the same.
    fn new(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.filter(|v| v.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        if n < 20 || sorted[0] == sorted[n - 1] {
            return None;
        }
        let cut = ((TAIL * n as f64) as usize).max(1);
        let excess = |part: &[f64], from: f64| {
            let mean = part.iter().map(|v| (v - from).abs()).sum::<f64>() / part.len() as f64;
            // Where a tail is one heap, anything beyond it is far out.
            mean.max(1e-9 * (1.0 + from.abs()))
        };
        let (low, high) = (sorted[cut], sorted[n - 1 - cut]);
        let low = [low, excess(&sorted[..cut], low)];
        let high = [high, excess(&sorted[n - cut..], high)];
        Some(Tails { sorted, low, high })
    }

    /// Two-sided p-value, and whether the value is above the middle.
    fn p(&self, value: f64) -> (f64, bool) {
        if !value.is_finite() {
            return (1.0, false);
        }
        let n = self.sorted.len() as f64;
        let below = self.sorted.partition_point(|v| *v <= value) as f64 / n;
        let above = 1.0 - self.sorted.partition_point(|v| *v < value) as f64 / n;
        let tail = |[from, mean]: [f64; 2], over: f64, rank: f64| match over > 0.0 {
            true => TAIL * (-(value - from).abs() / mean).exp(),
            false => rank,
        };
        let low = tail(self.low, self.low[0] - value, below);
        let high = tail(self.high, value - self.high[0], above);
        ((2.0 * low.min(high)).min(1.0), high < low)
    }

    fn quantile(&self, level: f64) -> f64 {
        self.sorted[((self.sorted.len() - 1) as f64 * level).round() as usize]
    }
}

/// Judges the first member of `pool`, `[member][figure]`, NaN where a member lacks a figure. If all
/// members are alike, something is found with a chance of at most `level`.
pub(super) fn judge(pool: &[Vec<f64>], level: f64) -> Judged {
    let figures = pool[0].len();
    let tails: Vec<Option<Tails>> =
        (0..figures).map(|k| Tails::new(pool.iter().map(|m| m[k]))).collect();
    let p_of =
        |member: &[f64], k: usize| tails[k].as_ref().map_or((1.0, false), |t| t.p(member[k]));
    // A figure that this survey lacks is no figure of the test.
    let counted: Vec<usize> = (0..figures).filter(|k| pool[0][*k].is_finite()).collect();
    let oddest = |member: &Vec<f64>| counted.iter().map(|k| p_of(member, *k).0).fold(1.0, f64::min);
    let mut all: Vec<f64> = pool.iter().map(oddest).collect();
    let own = all[0];
    let overall = all.iter().filter(|p| **p <= own).count() as f64 / all.len() as f64;
    all.sort_by(f64::total_cmp);
    let cut = all[((level * all.len() as f64) as usize).saturating_sub(1)].max(own);
    let (p, above): (Vec<f64>, Vec<bool>) = (0..figures).map(|k| p_of(&pool[0], k)).unzip();
    let range = |k: usize| {
        let others = Tails::new(pool[1..].iter().map(|m| m[k]));
        let same = pool.get(1).map_or(f64::NAN, |m| m[k]);
        others.map_or([same; 2], |t| [t.quantile(0.005), t.quantile(0.995)])
    };
    Judged {
        found: (0..figures)
            .map(|k| overall <= level && counted.contains(&k) && p[k] <= cut)
            .collect(),
        range: (0..figures).map(range).collect(),
        p,
        above,
        overall,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn pool(rng: &mut Stream, members: usize) -> Vec<Vec<f64>> {
        // A normal, a lognormal, a count with many zeros, and their sum: not independent.
        (0..members)
            .map(|_| {
                let (a, b) = (rng.normal(), rng.normal().exp());
                let c = rng.binomial(4, 0.05) as f64;
                vec![a, b, c, a + b + c]
            })
            .collect()
    }

    /// The promise of the level, for figures that hang together and have heavy tails.
    #[test]
    fn one_of_the_pool_is_found_as_rarely_as_promised() {
        let mut rng = Stream::new(1, "tails", 0);
        let trials = 1500;
        let level = 0.04;
        let found = (0..trials)
            .filter(|_| judge(&pool(&mut rng, 101), level).found.iter().any(|f| *f))
            .count() as f64
            / trials as f64;
        // Three binomial sds about the level, less the step of a rank.
        assert!(found < level + 0.016 && found > level - 0.026, "{found}");
    }

    #[test]
    fn what_stands_out_is_found_and_named_and_nothing_else() {
        let mut rng = Stream::new(2, "tails", 0);
        for (member, figure, above) in
            [(vec![8.0, 1.0, 0.0, f64::NAN], 0, true), (vec![0.0, 1.0, 4.5, f64::NAN], 2, true)]
        {
            let mut all = pool(&mut rng, 400);
            all.insert(0, member);
            let judged = judge(&all, 0.02);
            let found: Vec<usize> = (0..4).filter(|k| judged.found[*k]).collect();
            assert_eq!((found, judged.above[figure]), (vec![figure], above), "{:?}", judged.p);
            assert_eq!(judged.p[3], 1.0);
        }
    }
}
