//! The covariance to be expected among sites that were recorded elsewhere than they stand.
//!
//! Where sites i and j were recorded at r and stand at r + d, and t is a place that is known,
//!
//! ```text
//! c(rᵢ, rⱼ) = E C(|rᵢ + dᵢ − rⱼ − dⱼ|)      c(rᵢ, t) = E C(|rᵢ + dᵢ − t|)
//! ```
//!
//! Kriging with these is the best linear prediction of the surface at t: what displacement adds to
//! the scatter of sites is then no nugget, which a new village would have too.
//!
//! Source: Cressie & Kornak (2003), Statistical Science 18, 436–456; Fanshawe & Diggle (2011),
//! Environmetrics 22, 109–122.

use candle_core::Tensor;

use super::{Kernel, Matern};
use crate::{
    error::{Error, Result},
    geo::displacement::{Displacement, Law},
    sites::Sites,
};

/// One step of the third coordinate, which says by which law a site is displaced: too short to be
/// a distance between sites.
const MARK: f64 = 1.0 / (1 << 20) as f64;

/// A Matérn kernel of sites (x, y, mark), where marks tell by which law each is displaced: see
/// [`mark`]. Without a third coordinate a place is known.
///
/// Two observations recorded at one place under one law were displaced together: they share their
/// surface.
pub struct Displaced {
    inner: Matern,
    laws: Vec<Law>,
    /// By the laws of both sites, 0 for none: `[law][law]`.
    tables: Vec<Vec<Table>>,
}

/// Expected over plain covariance by distance, linear between.
#[derive(Clone)]
struct Table {
    /// Spacing up to four reaches.
    step: f64,
    near: Vec<f64>,
    /// From there on by factors of [`GROWTH`].
    far: Vec<f64>,
}

const GROWTH: f64 = 1.1;

impl Table {
    /// Where nothing is displaced.
    fn none() -> Self {
        Table { step: f64::INFINITY, near: vec![1.0, 1.0], far: Vec::new() }
    }

    /// `expected` over `plain`, at distances that suit displacements of up to `reach` together and
    /// this length scale.
    fn of(
        reach: f64,
        length_scale: f64,
        plain: impl Fn(f64) -> f64,
        expected: impl Fn(f64) -> f64,
    ) -> Self {
        // Where the plain covariance is nothing, so is what is made of it.
        let ratio = |h: f64| if plain(h) > 1e-280 { expected(h) / plain(h) } else { 0.0 };
        let fine = (4.0 * reach / 64.0).min(length_scale / 16.0);
        let steps = ((4.0 * reach / fine).ceil() as usize).clamp(1, 1024);
        let step = 4.0 * reach / steps as f64;
        let near = (0..=steps).map(|i| ratio(i as f64 * step)).collect();
        let mut far = Vec::new();
        let mut h = 4.0 * reach;
        // Beyond 20 length scales nothing is left to be shared.
        while h < 20.0 * length_scale {
            far.push(ratio(h));
            h *= GROWTH;
        }
        far.push(ratio(h));
        Table { step, near, far }
    }

    fn at(&self, h: f64) -> f64 {
        let last = self.near.len() - 1;
        let (list, place) = match h / self.step {
            place if place < last as f64 => (&self.near, place),
            place => (&self.far, (place / last as f64).ln() / GROWTH.ln()),
        };
        match list.get(place as usize + 1) {
            Some(next) => {
                let before = list[place as usize];
                before + (next - before) * place.fract()
            }
            None => list.last().copied().unwrap_or(1.0),
        }
    }
}

impl Displaced {
    /// The covariance to be expected under `laws`, which are in the unit of the kernel's length scale.
    ///
    /// # Errors
    /// [`Error::Input`] for distances that depend on the direction.
    pub fn new(inner: Matern, laws: &[Law]) -> Result<Self> {
        if inner.metric != super::Metric::Euclidean {
            return Err(Error::input("displaced sites need distances that know no direction"));
        }
        let plain = |h: f64| inner.sill * inner.smoothness.correlation(h / inner.length_scale);
        let nodes: Vec<_> = laws.iter().map(Law::nodes).collect();
        let over = |nodes: &[([f64; 2], f64)], h: f64, of: &dyn Fn(f64) -> f64| -> f64 {
            nodes.iter().map(|([x, y], w)| w * of((h + x).hypot(*y))).sum()
        };
        let scale = inner.length_scale;
        let one: Vec<Table> = (0..laws.len())
            .map(|i| Table::of(laws[i].reach(), scale, plain, |h| over(&nodes[i], h, &plain)))
            .collect();
        let n = laws.len() + 1;
        let mut tables = vec![vec![Table::none(); n]; n];
        for i in 0..laws.len() {
            (tables[i + 1][0], tables[0][i + 1]) = (one[i].clone(), one[i].clone());
            for j in 0..=i {
                let once = |h: f64| one[j].at(h) * plain(h);
                let reach = laws[i].reach() + laws[j].reach();
                let both = Table::of(reach, scale, plain, |h| over(&nodes[i], h, &once));
                (tables[i + 1][j + 1], tables[j + 1][i + 1]) = (both.clone(), both);
            }
        }
        Ok(Displaced { inner, laws: laws.to_vec(), tables })
    }
}

/// Which law a site follows, from 1; 0 where its place is known.
fn law(site: &[f64]) -> usize {
    site.get(2).map_or(0, |mark| (mark / MARK).round().max(0.0) as usize)
}

impl Kernel for Displaced {
    fn covariance(&self, a: &[f64], b: &[f64]) -> f64 {
        if a == b {
            return self.inner.sill;
        }
        let h = (a[0] - b[0]).hypot(a[1] - b[1]);
        let plain =
            self.inner.sill * self.inner.smoothness.correlation(h / self.inner.length_scale);
        match (law(a), law(b)) {
            (0, 0) => plain,
            (i, j) => {
                let last = self.laws.len();
                self.tables[i.min(last)][j.min(last)].at(h) * plain
            }
        }
    }
    fn sill(&self) -> f64 {
        self.inner.sill
    }
}

impl std::fmt::Debug for Displaced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Displaced")
            .field("inner", &self.inner)
            .field("laws", &self.laws)
            .finish_non_exhaustive()
    }
}

/// One row of planar sites with a third coordinate that says by which law each is displaced.
///
/// # Errors
/// [`Error::Axis`] if `displacement` has other sites, or there are several rows.
pub fn mark(sites: &Sites, displacement: &Displacement) -> Result<Sites> {
    if sites.batch() != 1 || sites.len() != displacement.of.len() {
        let found = format!("[{}, {}]", sites.batch(), sites.len());
        let wanted = format!("[1, {}]", displacement.of.len());
        return Err(Error::axis("sites and their displacements", found, wanted));
    }
    let marks: Vec<f64> = displacement.of.iter().map(|of| (of + 1) as f64 * MARK).collect();
    let marks = Tensor::from_vec(marks, (1, sites.len(), 1), sites.s.device())?;
    let s = Tensor::cat(&[&sites.s, &marks.to_dtype(sites.s.dtype())?], 2)?;
    Ok(Sites { s, ..sites.clone() })
}

/// Planar coordinates of one row of sites, and the law of each from 1, 0 where its place is known.
///
/// # Errors
/// [`Error::Axis`] if there are several rows.
pub fn unmark(sites: &Sites) -> Result<(Vec<[f64; 2]>, Vec<usize>)> {
    let [row] = <[_; 1]>::try_from(sites.host()?)
        .map_err(|rows| Error::axis("rows of sites", rows.len(), 1))?;
    let laws = row.iter().map(|site| law(site)).collect();
    Ok((row.iter().map(|site| [site[0], site.get(1).copied().unwrap_or(0.0)]).collect(), laws))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{
        kernel::{Metric, Smoothness},
        linalg::lower,
        rng::Stream,
    };

    fn matern(smoothness: Smoothness, length_scale: f64) -> Matern {
        Matern { smoothness, length_scale, sill: 2.0, metric: Metric::Euclidean }
    }

    fn site(x: f64, law: usize) -> [f64; 3] {
        [x, 0.3, law as f64 * MARK]
    }

    /// Expected covariances are the averages of plain ones over drawn displacements.
    #[test]
    fn it_is_the_average_over_displacements() {
        let laws = [Law::up_to(0.2), Law::dhs_rural().scaled(0.1)];
        let mut rng = Stream::new(3, "average", 0);
        let n = 40_000;
        for (smoothness, length_scale) in [
            (Smoothness::Half, 0.3),
            (Smoothness::ThreeHalves, 1.0),
            (Smoothness::FiveHalves, 0.25),
        ] {
            let plain = matern(smoothness, length_scale);
            let kernel = Displaced::new(plain, &laws).unwrap();
            for (a, b) in [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2)] {
                for h in [0.0, 0.1, 0.33, 0.7, 2.9] {
                    let mut moved = |law: usize, x: f64| match law {
                        0 => [x, 0.3],
                        law => {
                            let d = laws[law - 1].draw(&mut rng);
                            [x + d[0], 0.3 + d[1]]
                        }
                    };
                    let values: Vec<f64> = (0..n)
                        .map(|_| plain.covariance(&moved(a, 1.0), &moved(b, 1.0 + h)))
                        .collect();
                    let mean = values.iter().sum::<f64>() / n as f64;
                    let sd =
                        (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
                    // Recorded at one place but apart in law, or by a hair: displaced on their own.
                    let found = kernel.covariance(&site(1.0, a), &site(1.0 + h.max(1e-9), b));
                    let slack = 5.0 * sd / (n as f64).sqrt() + 2e-3;
                    assert!(
                        (found - mean).abs() < slack,
                        "{smoothness:?} {a} {b} at {h}: {found}, drawn {mean} ± {slack}"
                    );
                }
            }
        }
    }

    /// Where nothing moves, or moves by next to nothing, it is the kernel itself; it never exceeds it at
    /// one place, and one cluster shares its surface.
    #[test]
    fn small_displacements_change_little() {
        let plain = matern(Smoothness::ThreeHalves, 0.5);
        let kernel = Displaced::new(plain, &[Law::up_to(1e-4)]).unwrap();
        for h in [0.0, 1e-5, 0.2, 3.0, 50.0] {
            let truth = plain.covariance(&[0.0, 0.0], &[h, 0.0]);
            for (a, b) in [(0, 0), (1, 0), (1, 1)] {
                let found = kernel.covariance(&site(0.0, a), &site(h, b));
                assert!((found - truth).abs() < 1e-6, "{a} {b} at {h}: {found} of {truth}");
            }
        }
        let kernel = Displaced::new(plain, &[Law::up_to(0.4)]).unwrap();
        assert_eq!(kernel.covariance(&site(1.0, 1), &site(1.0, 1)), 2.0);
        assert!(kernel.covariance(&site(1.0, 1), &site(1.0 + 1e-9, 1)) < 1.9);
    }

    /// Tables are linear between; their covariances stay those of a process.
    #[test]
    fn it_stays_a_covariance() {
        let laws = [Law::up_to(0.05), Law::up_to(0.5)];
        let mut rng = Stream::new(4, "sites", 0);
        for smoothness in [Smoothness::Half, Smoothness::ThreeHalves, Smoothness::FiveHalves] {
            let kernel = Displaced::new(matern(smoothness, 0.6), &laws).unwrap();
            let sites: Vec<[f64; 3]> =
                (0..150).map(|i| [rng.unit(), rng.unit(), (i % 3) as f64 * MARK]).collect();
            let mut gram: Vec<f64> = Vec::new();
            for (i, a) in sites.iter().enumerate() {
                gram.extend(sites.iter().map(|b| kernel.covariance(a, b)));
                gram[i * 150 + i] += 1e-3;
            }
            let factor = lower(gram, 150).unwrap();
            assert_eq!(factor.jitter, 0.0, "{smoothness:?}");
        }
    }

    #[test]
    fn marks_come_back() {
        let sites = Sites::plane(&[[0.5, -1.0], [0.25, 1.0]], &Device::Cpu).unwrap();
        let displacement = Displacement { laws: vec![Law::up_to(1.0); 2], of: vec![1, 0] };
        let (places, laws) = unmark(&mark(&sites, &displacement).unwrap()).unwrap();
        assert_eq!((places, laws), (vec![[0.5, -1.0], [0.25, 1.0]], vec![2, 1]));
        assert_eq!(unmark(&sites).unwrap().1, [0, 0]);
    }
}
