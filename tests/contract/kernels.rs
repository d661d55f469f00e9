//! What every kernel must do, registered or combined from registered ones.

use isopleth::{
    Stream,
    kernel::{KERNELS, Kernel, Local, Matern, Metric, Product, Smoothness, Sum, Varying, matrix},
    registry::Named,
};

fn sites(n: usize, seed: u64) -> Vec<Vec<f64>> {
    let mut rng = Stream::new(seed, "sites", 0);
    (0..n).map(|_| vec![rng.uniform(-2.0, 2.0), rng.uniform(-2.0, 2.0)]).collect()
}

fn smallest_eigenvalue(kernel: &dyn Kernel, sites: &[Vec<f64>]) -> f64 {
    let k = matrix(kernel, sites, sites);
    let values = k.self_adjoint_eigenvalues(faer::Side::Lower).expect("finite matrix");
    values.into_iter().fold(f64::INFINITY, f64::min)
}

/// Symmetric, bounded by the sill, the sill at zero lag, stationary, positive semi-definite.
fn obeys(name: &str, kernel: &dyn Kernel) {
    let sites = sites(40, 1);
    let sill = kernel.sill();
    for a in &sites {
        assert!((kernel.covariance(a, a) - sill).abs() < 1e-12 * sill, "{name}: sill at zero lag");
        for b in &sites {
            let (ab, ba) = (kernel.covariance(a, b), kernel.covariance(b, a));
            assert!((ab - ba).abs() < 1e-14 * sill, "{name}: {ab} one way, {ba} the other");
            assert!(ab.abs() <= sill * (1.0 + 1e-12), "{name}: {ab} above the sill {sill}");
            let moved = |p: &[f64]| vec![p[0] + 7.5, p[1] - 3.25];
            let gap = (kernel.covariance(&moved(a), &moved(b)) - ab).abs();
            // Coordinates near 10 lose a digit, which the periodic kernel shows at its steepest.
            assert!(gap < 1e-12 * sill, "{name}: moving the map changed a covariance by {gap}");
        }
    }
    let smallest = smallest_eigenvalue(kernel, &sites);
    // Eigenvalues of a 40 × 40 matrix carry rounding of about n · ε · sill.
    assert!(smallest > -1e-12 * sill * 40.0, "{name}: smallest eigenvalue {smallest:e}");
}

#[test]
fn every_kernel_obeys_the_laws() {
    for entry in KERNELS {
        obeys(entry.name(), &*(entry.tiny)());
        assert_eq!((entry.tiny)().sill(), 2.0, "{}: tiny instances have sill 2", entry.name());
    }
}

#[test]
fn sums_and_products_of_kernels_are_kernels() {
    for a in KERNELS {
        for b in KERNELS {
            let pair = || vec![(a.tiny)(), (b.tiny)()];
            obeys(&format!("{} + {}", a.name, b.name), &Sum(pair()));
            obeys(&format!("{} × {}", a.name, b.name), &Product(pair()));
        }
    }
}

/// The word "length scale" means one number in this library (style.md §4).
#[test]
fn one_length_scale_away_the_correlation_is_as_published() {
    for entry in KERNELS {
        if let Some(expected) = entry.at_length_scale {
            let kernel = (entry.tiny)();
            let seen = kernel.covariance(&[0.3, 0.1], &[0.3 + 0.6, 0.1 + 0.8]) / kernel.sill();
            assert!((seen - expected).abs() < 1e-12, "{}: {seen} not {expected}", entry.name);
        }
    }
}

/// scipy 1.17.1: `2^(1−ν)/Γ(ν) (√(2ν) r)^ν K_ν(√(2ν) r)`, which knows nothing of our closed forms.
#[test]
fn closed_forms_equal_the_bessel_function() {
    let golden = include!("../golden/matern.rs");
    for (smoothness, scaled, expected) in golden {
        let seen = smoothness.correlation(scaled);
        assert!(
            (seen - expected).abs() < 1e-12,
            "{smoothness:?} at {scaled}: {seen} not {expected}"
        );
    }
}

/// Columns are what draws are made of: as the covariance, site by site, for any number of sites.
#[test]
fn a_column_is_the_covariance_of_each_site() {
    let planar =
        [Metric::Euclidean, Metric::Anisotropic { angle: 0.4, ratio: 2.5 }, Metric::GreatCircle];
    let matern = |metric| {
        Smoothness::all().map(|smoothness| -> Box<dyn isopleth::kernel::Kernel> {
            let length_scale = if metric == Metric::GreatCircle { 90.0 } else { 0.7 };
            Box::new(Matern { smoothness, length_scale, sill: 1.3, metric })
        })
    };
    let kernels =
        KERNELS.iter().map(|entry| (entry.tiny)()).chain(planar.into_iter().flat_map(matern));
    for kernel in kernels {
        for n in [0, 1, 7, 8, 9, 33] {
            let sites = sites(n, 5);
            let [x, y] = [0, 1].map(|d| sites.iter().map(|p| p[d]).collect::<Vec<f64>>());
            let (at, mut out) = ([0.2, -0.4], vec![f64::NAN; n]);
            kernel.column(at, &x, &y, &mut out);
            for (out, site) in out.iter().zip(&sites) {
                let single = kernel.covariance(site, &at);
                assert!((out - single).abs() < 1e-14, "{kernel:?}: {out} and {single}");
            }
            assert_columns(&*kernel, &sites);
        }
        let places: Vec<[f64; 2]> = sites(9, 6).iter().map(|p| [p[0], p[1]]).collect();
        let gram = isopleth::kernel::gram(&*kernel, &places);
        assert!((gram[(7, 3)] - kernel.covariance(&places[7], &places[3])).abs() < 1e-14);
        assert!((gram[(4, 4)] - kernel.sill()).abs() < 1e-14 && gram[(3, 7)] == 0.0);
    }
}

/// All columns at once are each of them.
fn assert_columns(kernel: &dyn isopleth::kernel::Kernel, sites: &[Vec<f64>]) {
    let [x, y] = [0, 1].map(|d| sites.iter().map(|p| p[d]).collect::<Vec<f64>>());
    let mut out = vec![f64::NAN; sites.len() * (sites.len() + 1) / 2];
    kernel.columns(&x, &y, &mut out);
    let mut out = out.iter();
    for (j, at) in sites.iter().enumerate() {
        for site in &sites[j..] {
            let (seen, single) = (out.next().unwrap(), kernel.covariance(site, at));
            assert!((seen - single).abs() < 1e-14, "{kernel:?}: {seen} and {single}");
        }
    }
    assert!(out.next().is_none());
}

#[test]
fn kernels_have_distinct_names() {
    for (i, a) in KERNELS.iter().enumerate() {
        assert!(KERNELS[..i].iter().all(|b| b.name != a.name), "{} is listed twice", a.name);
    }
}

#[test]
fn anisotropy_of_ratio_one_is_no_anisotropy_and_keeps_its_angle() {
    let plain = Metric::Euclidean;
    let round = Metric::Anisotropic { angle: 0.7, ratio: 1.0 };
    for (a, b) in sites(20, 2).iter().zip(&sites(20, 3)) {
        assert!((plain.distance(a, b) - round.distance(a, b)).abs() < 1e-13);
    }
    // Along 30° the length scale is as stated; across, it is three times shorter.
    let angle = 30f64.to_radians();
    let metric = Metric::Anisotropic { angle, ratio: 3.0 };
    let kernel = Matern { smoothness: Smoothness::Half, length_scale: 2.0, sill: 1.0, metric };
    let at =
        |r: f64, angle: f64| kernel.covariance(&[0.0, 0.0], &[r * angle.cos(), r * angle.sin()]);
    assert!((at(2.0, angle) - (-1.0f64).exp()).abs() < 1e-12);
    assert!((at(2.0, angle + std::f64::consts::FRAC_PI_2) - (-3.0f64).exp()).abs() < 1e-12);
    obeys("anisotropic", &kernel);
}

#[test]
fn the_exponential_is_positive_definite_on_the_globe() {
    let kernel = Matern {
        smoothness: Smoothness::Half,
        length_scale: 5000.0,
        sill: 1.0,
        metric: Metric::GreatCircle,
    };
    let mut rng = Stream::new(4, "globe", 0);
    let globe: Vec<Vec<f64>> = (0..60)
        .map(|_| vec![rng.uniform(-180.0, 180.0), rng.uniform(-1.0, 1.0).asin().to_degrees()])
        .collect();
    let smallest = smallest_eigenvalue(&kernel, &globe);
    assert!(smallest > 0.0, "smallest eigenvalue {smallest:e}");
    // London to Paris, by the angle between unit vectors (numpy), R = 6371.0088 km.
    let d = Metric::GreatCircle.distance(&[-0.1278, 51.5074], &[2.3522, 48.8566]);
    assert!((d - 343.556_534_880_883_36).abs() < 1e-6, "{d}");
}

/// Length scale over a factor of 50, direction all around, a sill of 0 to 2, and a jump.
fn varied(smoothness: Smoothness) -> Varying {
    Varying::new(smoothness, 2.0, |s: &[f64]| Local {
        length_scale: 0.1 * (1.0 + s[0].abs()).powi(3) * if s[1] > 0.7 { 2.0 } else { 1.0 },
        ratio: 1.0 + 3.0 * (0.5 + 0.5 * s[1].sin()),
        angle: 2.0 * s[0] - s[1],
        sill: 1.0 + (3.0 * s[0]).cos(),
    })
}

#[test]
fn a_varying_kernel_is_a_kernel() {
    for smoothness in Smoothness::all() {
        let kernel = varied(smoothness);
        // Sites that stand close, where a kernel that is none shows first.
        let mut sites = sites(60, 7);
        sites.iter_mut().take(30).flatten().for_each(|c| *c *= 0.1);
        for a in &sites {
            let sill = 1.0 + (3.0 * a[0]).cos();
            assert!((kernel.covariance(a, a) - sill).abs() < 1e-12, "sill at zero lag");
            for b in &sites {
                assert!((kernel.covariance(a, b) - kernel.covariance(b, a)).abs() < 1e-13);
                let bound = (sill * kernel.covariance(b, b)).sqrt() * (1.0 + 1e-12);
                assert!(kernel.covariance(a, b).abs() <= bound, "{smoothness:?}: {a:?} {b:?}");
            }
        }
        let smallest = smallest_eigenvalue(&kernel, &sites);
        assert!(smallest > -1e-12 * 2.0 * 60.0, "{smoothness:?}: smallest eigenvalue {smallest:e}");
        let [x, y] = [0, 1].map(|d| sites.iter().map(|p| p[d]).collect::<Vec<f64>>());
        let mut out = vec![f64::NAN; 60];
        kernel.column([0.2, -0.4], &x, &y, &mut out);
        for (out, site) in out.iter().zip(&sites) {
            assert!((out - kernel.covariance(site, &[0.2, -0.4])).abs() < 1e-14);
        }
        assert_columns(&kernel, &sites);
    }
}

/// What is the same everywhere is the plain kernel, in any direction.
#[test]
fn a_varying_kernel_that_does_not_vary_is_the_plain_one() {
    for smoothness in Smoothness::all() {
        for (ratio, angle) in [(1.0, 0.0), (1.0, 0.9), (3.5, 0.9), (2.0, -1.2)] {
            let metric = Metric::Anisotropic { angle, ratio };
            let plain = Matern { smoothness, length_scale: 0.7, sill: 1.3, metric };
            let varying = Varying::new(smoothness, 1.3, move |_: &[f64]| Local {
                length_scale: 0.7,
                ratio,
                angle,
                sill: 1.3,
            });
            for (a, b) in sites(20, 8).iter().zip(&sites(20, 9)) {
                let (one, other) = (plain.covariance(a, b), varying.covariance(a, b));
                assert!((one - other).abs() < 1e-13, "{smoothness:?} {ratio} {angle}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "a local kernel needs")]
fn a_local_kernel_that_is_none_makes_no_map() {
    let kernel = Varying::new(Smoothness::Half, 1.0, |s: &[f64]| Local::round(s[0].sqrt(), 1.0));
    kernel.covariance(&[-1.0, 0.0], &[1.0, 0.0]);
}
