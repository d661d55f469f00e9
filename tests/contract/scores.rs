//! What every score must do, and numbers computed by SciPy 1.17.1 (`quad`, `brentq`, `binom`).

use isopleth::{
    Link, Marginals, Of, Stream,
    score::{Better, Counts, Forecast, SCORES, Score, Summary, Truth, forecasts},
};

fn law(link: Link, parts: &[(f64, f64, f64)]) -> Marginals {
    let each = |f: fn(&(f64, f64, f64)) -> f64| parts.iter().map(f).collect();
    let (weight, mean, sd) = (each(|p| p.0), each(|p| p.1), each(|p| p.2));
    Marginals { link, of: Of::Observation, components: parts.len(), weight, mean, sd }
}

fn score(name: &str) -> &'static Score {
    SCORES.iter().find(|s| s.name == name).expect("registered")
}

fn forecast(law: &Marginals, truth: Truth) -> Forecast {
    Forecast::new(law, 0, truth).expect("law and truth match")
}

const MIXTURE: [(f64, f64, f64); 2] = [(0.3, 1.0, 0.4), (0.7, -0.5, 1.3)];

/// A value of a mixture drawn at random.
fn draw(rng: &mut Stream, parts: &[(f64, f64, f64)]) -> f64 {
    let u = rng.unit();
    let mut below = 0.0;
    let hit = parts.iter().find(|p| {
        below += p.0;
        u < below
    });
    let (_, mean, sd) = hit.unwrap_or(&parts[parts.len() - 1]);
    mean + sd * rng.normal()
}

/// How a forecaster can be wrong, and what that does to a mean and an sd.
type Distortion = (&'static str, fn(f64, f64) -> (f64, f64));

fn distortions() -> [Distortion; 4] {
    [
        ("biased up", |m, s| (m + 0.5, s)),
        ("biased down", |m, s| (m - 0.5, s)),
        ("too sure", |m, s| (m, 0.6 * s)),
        ("too vague", |m, s| (m, 1.7 * s)),
    ]
}

#[test]
fn the_true_law_wins_on_average() {
    let mut rng = Stream::new(5, "truths", 0);
    let values: Vec<Truth> = (0..6000).map(|_| Truth::Value(draw(&mut rng, &MIXTURE))).collect();
    let counts: Vec<Truth> = (0..6000)
        .map(|i| {
            let tested = [5, 30, 60][i % 3];
            let p = Link::Logit.outcome(draw(&mut rng, &MIXTURE));
            Truth::Count { positive: rng.binomial(tested, p), tested }
        })
        .collect();
    let cases: Vec<Truth> = (0..1500)
        .map(|i| {
            let exposure = [5.0, 30.0, 60.0][i % 3];
            let rate = draw(&mut rng, &MIXTURE).exp();
            Truth::Cases { cases: rng.poisson(exposure * rate) as u64, exposure }
        })
        .collect();
    let laws = [(Link::Identity, values), (Link::Logit, counts), (Link::Log, cases)];
    for (link, truths) in laws {
        let meet = |parts: &[(f64, f64, f64)]| -> Vec<Forecast> {
            truths.iter().map(|t| forecast(&law(link, parts), *t)).collect()
        };
        let right = meet(&MIXTURE);
        for (how, distort) in distortions() {
            let wrong = meet(&MIXTURE.map(|(w, m, s)| {
                let (m, s) = distort(m, s);
                (w, m, s)
            }));
            for score in SCORES {
                let (truth, other) = (score.over(&right), score.over(&wrong));
                // A score that reads the mean only ties when the mean is kept: 1e-3 is a tie.
                let wins = match score.better {
                    Better::Higher => truth > other,
                    Better::Lower => truth < other + 1e-3,
                    Better::Near(_) => true,
                };
                assert!(wins, "{}, {link:?}: {truth} for the truth, {other} {how}", score.name);
            }
        }
        for score in SCORES {
            if let Better::Near(level) = score.better {
                let seen = score.over(&right);
                // 6000 truths: a standard error of 0.6 points. Counts cover more, never less.
                let above = if link == Link::Identity { 0.02 } else { 0.15 };
                let fair = seen > level - 0.02 && seen < level + above;
                assert!(fair, "{}, {link:?}: {seen} of {level}", score.name);
            }
        }
    }
}

/// Nothing may hide at zero: the answer depends on forecast minus truth, not on where they are.
#[test]
fn shifting_forecast_and_truth_together_changes_nothing() {
    for by in [7.3, -250.0] {
        for y in [0.8, -3.0, 6.0] {
            let here = forecast(&law(Link::Identity, &MIXTURE), Truth::Value(y));
            let moved = law(Link::Identity, &MIXTURE.map(|(w, m, s)| (w, m + by, s)));
            let there = forecast(&moved, Truth::Value(y + by));
            for score in SCORES {
                let (a, b) = ((score.each)(&here), (score.each)(&there));
                // Quantiles are bisected to 1e-10 and fined 40-fold outside.
                assert!((a - b).abs() < 1e-7 * (1.0 + a.abs()), "{}: {a} became {b}", score.name);
            }
        }
    }
}

#[test]
fn relabelling_positive_as_negative_mirrors_a_count() {
    let mirrored = MIXTURE.map(|(w, m, s)| (w, -m, s));
    for (positive, tested) in [(3, 12), (0, 12), (55, 60)] {
        let a = forecast(&law(Link::Logit, &MIXTURE), Truth::Count { positive, tested });
        let other = Truth::Count { positive: tested - positive, tested };
        let b = forecast(&law(Link::Logit, &mirrored), other);
        for name in ["log-score", "crps", "rmse"] {
            let (a, b) = ((score(name).each)(&a), (score(name).each)(&b));
            assert!((a - b).abs() < 1e-9, "{name}: {a} became {b}");
        }
    }
}

#[test]
fn values_score_as_scipy_says() {
    let golden = [
        (0.8, -0.9305394553521507, 0.43542424553868747, 4.766126847458908),
        (-3.0, -3.3870901676463987, 2.2352630761891445, 11.02348612902101),
        (6.0, -14.037977741610897, 5.316319012592999, 167.86369366754047),
    ];
    for (y, log_score, crps, interval) in golden {
        let met = forecast(&law(Link::Identity, &MIXTURE), Truth::Value(y));
        for (name, expected) in
            [("log-score", log_score), ("crps", crps), ("interval-95", interval)]
        {
            let seen = (score(name).each)(&met);
            assert!((seen - expected).abs() < 1e-7, "{name} at {y}: {seen} not {expected}");
        }
        assert!((met.mean() + 0.05).abs() < 1e-12);
    }
    let met = forecast(&law(Link::Identity, &MIXTURE), Truth::Value(0.8));
    let quantiles =
        [(0.025, -2.8435660179609474), (0.25, -0.9759388476199928), (0.9, 1.3920381462856317)];
    for (level, expected) in quantiles {
        assert!((met.quantile(level) - expected).abs() < 1e-8, "{level}");
    }
}

/// (tested, positive, law, log score, CRPS, mean, counts at quantiles .025 .1 .25 .75 .9 .975)
type Count<'a> = (u64, u64, &'a [(f64, f64, f64)], f64, f64, f64, [u64; 6]);

#[test]
fn counts_score_as_scipy_says() {
    let golden: [Count; 3] = [
        (
            12,
            3,
            &[(1.0, -1.2, 0.7)],
            -1.7201549977499468,
            0.04071285497140848,
            0.25202399510776896,
            [0, 1, 1, 4, 6, 8],
        ),
        // Many tested: the likelihood is far narrower than the law of the prevalence.
        (
            400,
            3,
            &[(1.0, -1.2, 1.4)],
            -5.65495973027015,
            0.15878895711613425,
            0.29237916426882055,
            [7, 19, 42, 175, 258, 330],
        ),
        (
            60,
            55,
            &MIXTURE,
            -5.066861994280931,
            0.2668253299083932,
            0.502020091861323,
            [3, 7, 16, 44, 49, 54],
        ),
    ];
    for (tested, positive, parts, log_score, crps, mean, counts) in golden {
        let met = forecast(&law(Link::Logit, parts), Truth::Count { positive, tested });
        let seen = (score("log-score").each)(&met);
        assert!((seen - log_score).abs() < 1e-8, "log score of {positive}/{tested}: {seen}");
        let seen = (score("crps").each)(&met);
        assert!((seen - crps).abs() < 1e-8, "CRPS of {positive}/{tested}: {seen}");
        assert!((met.mean() - mean).abs() < 1e-8, "mean of {tested}: {}", met.mean());
        for (level, count) in [0.025, 0.1, 0.25, 0.75, 0.9, 0.975].iter().zip(counts) {
            assert_eq!(met.quantile(*level), count as f64 / tested as f64, "quantile {level}");
        }
    }
}

/// Poisson counts of a rate whose logarithm is a mixture: quad and sums over scipy.stats.poisson.
/// Small counts are summed one by one, large ones through a law that keeps every twentieth width.
#[test]
fn rates_have_known_scores() {
    let village: [(f64, f64, f64); 1] = [(1.0, -6.0, 0.3)];
    type Golden<'a> = (&'a [(f64, f64, f64)], f64, u64, [f64; 3], [f64; 4], f64);
    let golden: [Golden; 3] = [
        (
            &MIXTURE,
            3.0,
            4,
            [-2.722728214049249, 0.4153601231634192, 1.8717968090870185],
            [0.0, 1.0, 3.0, 22.0],
            0.0,
        ),
        (
            &village,
            1e4,
            0,
            [-14.900186577316841, 0.002072397904841363, 0.0025928438346023847],
            [11.0, 19.0, 25.0, 48.0],
            0.0,
        ),
        (
            &village,
            2e5,
            700,
            [-6.922196336396189, 0.00061984490306139, 0.0025928438346023847],
            [272.0, 404.0, 496.0, 896.0],
            1.0,
        ),
    ];
    for (parts, exposure, cases, [log_score, crps, mean], counts, slack) in golden {
        let met = forecast(&law(Link::Log, parts), Truth::Cases { cases, exposure });
        let seen = (score("log-score").each)(&met);
        assert!((seen - log_score).abs() < 1e-7, "log score of {cases}/{exposure}: {seen}");
        let seen = (score("crps").each)(&met);
        assert!((seen / crps - 1.0).abs() < 2e-4, "CRPS of {cases}/{exposure}: {seen} of {crps}");
        assert!((met.mean() - mean).abs() < 1e-9 * mean, "mean of {exposure}: {}", met.mean());
        for (level, count) in [0.025, 0.25, 0.5, 0.975].iter().zip(counts) {
            let seen = met.quantile(*level) * exposure;
            assert!((seen - count).abs() < slack + 1e-6, "quantile {level}: {seen} of {count}");
        }
    }
}

/// A value above 0: densities and distances of the value, not of its logarithm (scipy.stats.lognorm).
#[test]
fn positive_values_have_known_scores() {
    let parts = [(0.6, 0.3, 0.4), (0.4, 1.2, 1.1)];
    let met = forecast(&law(Link::Log, &parts), Truth::Value(2.5));
    let seen = (score("log-score").each)(&met);
    assert!((seen - -2.046592179818227).abs() < 1e-10, "{seen}");
    let seen = (score("crps").each)(&met);
    assert!((seen - 0.6102202097105625).abs() < 1e-5, "{seen}");
    assert!(Forecast::new(&law(Link::Log, &parts), 0, Truth::Value(-1.0)).is_err());
}

/// A count that was all but impossible has a finite, correct score.
#[test]
fn a_far_miss_is_finite() {
    let sure = law(Link::Logit, &[(1.0, -6.0, 0.1)]);
    let met = forecast(&sure, Truth::Count { positive: 50, tested: 50 });
    let seen = (score("log-score").each)(&met);
    assert!((seen - -287.7047282912677).abs() < 1e-6, "{seen}");
}

#[test]
fn a_summary_holds_what_the_registry_says() {
    let two = Marginals {
        weight: vec![1.0; 2],
        mean: vec![0.3, 2.0],
        sd: vec![1.0, 0.5],
        components: 1,
        ..law(Link::Identity, &MIXTURE)
    };
    let met = forecasts(&two, &[Truth::Value(0.1), Truth::Value(4.0)]).expect("two and two");
    let seen = Summary::of(&met);
    assert_eq!(seen.n, 2);
    assert!((seen.rmse - (0.5 * (0.04f64 + 4.0)).sqrt()).abs() < 1e-12);
    assert_eq!((seen.coverage.at_50, seen.coverage.at_95), (0.5, 0.5));
    let json = serde_json::to_string(&seen).expect("plain numbers");
    assert!(json.contains(r#""coverage":{"50":0.5,"80":0.5,"95":0.5}"#), "{json}");
}

#[test]
fn a_truth_of_the_wrong_kind_is_refused() {
    let values = law(Link::Identity, &MIXTURE);
    assert!(Forecast::new(&values, 0, Truth::Count { positive: 1, tested: 2 }).is_err());
    assert!(Forecast::new(&values, 0, Truth::Value(f64::NAN)).is_err());
    let counts = law(Link::Logit, &MIXTURE);
    assert!(Forecast::new(&counts, 0, Truth::Value(0.2)).is_err());
    assert!(Forecast::new(&counts, 0, Truth::Count { positive: 3, tested: 2 }).is_err());
    assert!(Forecast::new(&counts, 0, Truth::Count { positive: 0, tested: 0 }).is_err());
    assert!(Forecast::new(&counts, 0, Truth::Cases { cases: 1, exposure: 9.0 }).is_err());
    assert!(Counts::new(&values, 0, 10.0).is_err());
    assert!(Counts::new(&counts, 0, 2.5).is_err());
    assert!(forecasts(&values, &[]).is_err());
}
