//! Laws of the benchmark of scale: every case is sound, what is drawn is what its file says, and the
//! floor is a floor.

use super::*;
use crate::{process::Process, registry::Named, score::crps};

fn drawn(name: &str, sites: usize, seed: u64) -> (Case, Drawn) {
    let entry = CASES.iter().find(|case| case.name == name).unwrap();
    let case = Case::of(entry).unwrap();
    let drawn = Drawn::new(&case, sites, seed).unwrap();
    (case, drawn)
}

#[test]
fn every_case_is_drawn_as_its_file_says() {
    for entry in CASES {
        let (case, one) = drawn(entry.name, 400, 1);
        assert_eq!(entry.about(), case.about, "{}: its first line is `about`", entry.name);
        let likelihood = case.likelihood().unwrap();
        assert!(!case.contexts.is_empty() && one.truths.len() > 100, "{}", entry.name);
        assert!((one.xy.len() as f64 - 400.0).abs() < 12.0, "{}: {}", entry.name, one.xy.len());
        let targets: Vec<usize> = one.truths.iter().map(|t| t.target).collect();
        assert!(targets.is_sorted() && targets.iter().all(|t| *t < one.asked.len()));
        let whole = |t: &drawn::Truth| t.y.fract() == 0.0 && t.y <= t.trials && t.trials <= 5.0;
        assert_eq!(one.truths.iter().all(whole), likelihood.counts(), "{}", entry.name);
        // Floor::condition takes no trend off counts.
        assert!(!likelihood.counts() || case.surface.trend == [0.0; 2], "{}", entry.name);
        // Again the same; another seed, another surface.
        let (_, again) = drawn(entry.name, 400, 1);
        assert_eq!((&one.xy, &one.truths), (&again.xy, &again.truths), "{}", entry.name);
        assert_ne!(one.truths, drawn(entry.name, 400, 2).1.truths, "{}", entry.name);
    }
    let (_, lattice) = drawn("lattice-exponential", 105_000, 1);
    assert_eq!((lattice.xy.len(), lattice.asked.len()), (105_000, 45_000));
    let (values, size, mask) = lattice.whole.unwrap();
    assert_eq!((values.len(), size, mask.len()), (150_000, [500, 300], 150_000));
}

/// A surface whose range grows five times across the map has rougher steps in the west, by as much as
/// its kernel says; the trend and the nugget are there.
#[test]
fn surfaces_have_the_texture_trend_and_nugget_of_their_case() {
    let (case, lattice) = drawn("lattice-varying", 20_000, 3);
    let (values, [cols, rows], _) = lattice.whole.as_ref().unwrap();
    let step = 2.0 / (cols - 1) as f64;
    let kernel = case.surface.kernel();
    for edge in [0, cols - 12] {
        let (mut seen, mut wanted) = (0.0, 0.0);
        for c in edge..edge + 10 {
            for r in 0..*rows {
                let at = |c: usize| step * c as f64 - 1.0;
                let gap = values[r * cols + c + 1] - values[r * cols + c] - 0.5 * step;
                seen += gap * gap;
                wanted += 2.0 - 2.0 * kernel.covariance(&[at(c + 1), 0.0], &[at(c), 0.0]);
            }
        }
        assert!((seen / wanted - 1.0).abs() < 0.1, "at {edge}: {seen}, the kernel {wanted}");
    }
    let local = |x: f64| kernel.covariance(&[x, 0.0], &[x + 1e-4, 0.0]);
    let roughness = (1.0 - local(-1.0)) / (1.0 - local(0.9999));
    assert!((roughness - 5.0).abs() < 0.05, "{roughness}");

    let slope = |f: &dyn Fn([f64; 2]) -> f64| f([1.0, 0.0]) - f([0.0, 0.0]);
    assert!((slope(&|p| case.surface.mean(p)) - 0.5).abs() < 1e-12);
    let (_, square) = drawn("growing-density", 50, 1);
    let noise = square.truths.iter().map(|t| (t.noisy - t.surface).powi(2)).sum::<f64>() / 2000.0;
    assert!((noise / 0.1 - 1.0).abs() < 0.15, "{noise}");
}

/// Told kernel, nugget and trend, the floor is calibrated; told another length scale or no trend, it is
/// worse: a floor that were not one would be found out.
#[test]
fn the_floor_is_calibrated_and_nobody_else_is_below_it() {
    let (case, drawn) = drawn("lattice-exponential", 3000, 2);
    let score = |case: &Case| {
        let floor = Floor::new(case, case.likelihood().unwrap()).unwrap();
        let plain = Frame::plain();
        let context = drawn.context(&plain).unwrap();
        let posterior = floor.condition(&context).unwrap();
        score::ask(&*posterior, &drawn, &plain, true, &mut Cost::default()).unwrap()
    };
    let floor = score(&case);
    for (found, level) in floor.inside.iter().zip(score::LEVELS) {
        assert!((found - level).abs() < 0.06, "{floor:?}");
    }
    let spoilt = |change: fn(&mut Case)| {
        let mut case = case.clone();
        change(&mut case);
        score(&case)
    };
    for (what, worse) in [
        ("length scale", spoilt(|c| c.surface.length_scale *= 0.3)),
        ("nugget", spoilt(|c| c.surface.nugget = 0.3)),
        ("trend", spoilt(|c| c.surface.trend = [-6.0, 6.0])),
    ] {
        assert!(worse.crps > 1.01 * floor.crps, "{what}: {worse:?}, {floor:?}");
        assert!(worse.log_score < floor.log_score - 0.01, "{what}: {worse:?}, {floor:?}");
    }
}

/// What a frame does to places and values, scores undo: the same process scores the same seen from
/// model units and from region units.
#[test]
fn scores_are_in_the_units_of_the_outcome() {
    struct Bell([f64; 3]);
    impl Process for Bell {
        fn condition<'a>(&'a self, _: &Observations) -> Result<Box<dyn Posterior + 'a>> {
            Ok(Box::new(Bell(self.0)))
        }
    }
    impl Posterior for Bell {
        fn at(&self, targets: &crate::Sites) -> Result<crate::Predictive> {
            let [mean, surface, observation] = self.0.map(|v| {
                candle_core::Tensor::full(
                    v as f32,
                    (1, targets.len(), 1),
                    &candle_core::Device::Cpu,
                )
            });
            crate::Predictive::gaussian(crate::Link::Identity, mean?, surface?, observation?)
        }
    }
    let (_, drawn) = drawn("continent", 300, 1);
    let frame = drawn.frame().unwrap();
    let [level, spread] = frame.level;
    let ask = |bell: [f64; 3], frame: &Frame, all: bool| {
        score::ask(&Bell(bell), &drawn, frame, all, &mut Cost::default()).unwrap()
    };
    let plain = ask([0.3, 0.5, 0.8], &Frame::plain(), true);
    let model = ask([(0.3 - level) / spread, 0.5 / spread, 0.8 / spread], &frame, true);
    assert!((plain.crps - model.crps).abs() < 1e-5, "{plain:?} {model:?}");
    assert!((plain.log_score - model.log_score).abs() < 1e-5, "{plain:?} {model:?}");
    let direct: f64 =
        drawn.truths.iter().map(|t| crps::mixture(&[(1.0, 0.3, 0.8)], t.noisy)).sum::<f64>();
    assert!((plain.crps - direct / drawn.truths.len() as f64).abs() < 1e-6);
    // Asked only about what is scored, or about everything.
    assert_eq!(plain, ask([0.3, 0.5, 0.8], &Frame::plain(), false));
    // A million pixels are asked in parts, and every one scored is met by its own truth.
    assert!(drawn.asked.len() > 8192 && drawn.truths.len() == 20_000);
}
