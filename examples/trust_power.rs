//! How often `isopleth trust` warns: of surveys from a model's own prior, and of wrong ones.
//!
//! ```sh
//! cargo run --release --example trust_power -- prevalence 300 100            # all of it
//! cargo run --release --example trust_power -- prevalence 300 100 "mean"     # rows whose name has this
//! cargo run --release --example trust_power -- prevalence 300 100 worth      # the second table alone
//! ```
//!
//! prints the tables of BENCHMARKS.md: model, surveys from the prior, wrong surveys of each kind; and for those
//! kinds that a model may read without being wrong, how many of its intervals hold the truth. Sites
//! are 15 to 150, log-uniform, in a region 20 to 2,000 km wide. A kind with "(units)" shows in the units
//! alone; the other figures say nothing of it, because coordinates and values are standardised.

use std::time::Instant;

use isopleth::{
    Link, Of, Result, Stream,
    checkpoint::Checkpoint,
    geo::{
        crs::Crs,
        frame::Frame,
        survey::{Outcome, Survey},
    },
    sites::unit_box,
    task::{Draw, Tasks},
    train::trust::{Judge, examine},
};

/// One simulated survey before anything is spoilt: km, link scale, people.
struct Clean {
    km: Vec<[f64; 2]>,
    eta: Vec<f64>,
    tested: Option<Vec<f64>>,
}

/// Places in km, and what was seen there.
type Spoilt = (Vec<[f64; 2]>, Outcome);

/// A way to get a survey wrong: from the survey to what a user would hand in, or nothing where the reader
/// of surveys refuses it.
struct Kind {
    name: &'static str,
    prior: Prior,
    spoil: fn(Clean, &mut Stream) -> Option<Spoilt>,
}

#[derive(Clone, Copy, PartialEq)]
enum Prior {
    Own,
    LongRange,
    Smooth,
    ShortRange,
}

fn observed(clean: &Clean, rng: &mut Stream) -> Outcome {
    match &clean.tested {
        None => Outcome::Values(clean.eta.clone()),
        Some(tested) => {
            let count =
                |(eta, n): (&f64, &f64)| rng.binomial(*n as u64, Link::Logit.outcome(*eta)) as f64;
            let positive = clean.eta.iter().zip(tested).map(count).collect();
            Outcome::Counts { positive, tested: tested.clone() }
        }
    }
}

fn scaled(clean: Clean, by: f64, rng: &mut Stream) -> Option<Spoilt> {
    let outcome = observed(&clean, rng);
    Some((clean.km.iter().map(|p| [by * p[0], by * p[1]]).collect(), outcome))
}

fn moved(mut clean: Clean, to: f64, rng: &mut Stream) -> Option<Spoilt> {
    let mean = clean.eta.iter().sum::<f64>() / clean.eta.len() as f64;
    let to = to * rng.uniform(7.0, 10.0);
    clean.eta.iter_mut().for_each(|eta| *eta += to - mean);
    let outcome = observed(&clean, rng);
    Some((clean.km, outcome))
}

/// The same sites, with 5,000 people tested in all at least.
fn crowded(mut clean: Clean) -> Clean {
    let all: f64 = clean.tested.iter().flatten().sum();
    let more = (5_000.0 / all).max(1.0);
    clean.tested = clean.tested.map(|n| n.iter().map(|n| (more * n).round()).collect());
    clean
}

fn counted(outcome: Outcome) -> (Vec<f64>, Vec<f64>) {
    match outcome {
        Outcome::Counts { positive, tested } => (positive, tested),
        _ => unreachable!("a survey of counts"),
    }
}

fn rates(clean: Clean, per: f64, rng: &mut Stream) -> Option<Spoilt> {
    let (k, n) = counted(observed(&clean, rng));
    let positive = k.iter().zip(&n).map(|(k, n)| (per * k / n).round()).collect();
    Some((clean.km, Outcome::Counts { positive, tested: vec![per; n.len()] }))
}

fn stray(mut clean: Clean, rng: &mut Stream) -> Option<Spoilt> {
    let (_, half) = unit_box(&clean.km)?;
    let at = rng.below(clean.km.len());
    clean.km[at][0] += half * rng.uniform(15.0, 40.0);
    let outcome = observed(&clean, rng);
    Some((clean.km, outcome))
}

const BOTH: &[Kind] = &[
    Kind {
        name: "none: the model's own prior",
        prior: Prior::Own,
        spoil: |c, r| scaled(c, 1.0, r),
    },
    Kind {
        name: "metres read as km (units)",
        prior: Prior::Own,
        spoil: |c, r| scaled(c, 1000.0, r),
    },
    Kind {
        name: "km read as metres (units)",
        prior: Prior::Own,
        spoil: |c, r| scaled(c, 0.001, r),
    },
    Kind { name: "one site 15 to 40 half-sides away", prior: Prior::Own, spoil: stray },
    Kind {
        name: "length scale 8 to 40 half-sides",
        prior: Prior::LongRange,
        spoil: |c, r| scaled(c, 1.0, r),
    },
    Kind {
        name: "the same, smooth and without a nugget",
        prior: Prior::Smooth,
        spoil: |c, r| scaled(c, 1.0, r),
    },
    Kind {
        name: "length scale 0.0005 to 0.003 half-sides",
        prior: Prior::ShortRange,
        spoil: |c, r| scaled(c, 1.0, r),
    },
];

const COUNTS: &[Kind] = &[
    Kind {
        name: "positives in percent, tested 100 (units)",
        prior: Prior::Own,
        spoil: |c, r| rates(c, 100.0, r),
    },
    Kind {
        name: "rates per 1,000, tested 1,000 (units)",
        prior: Prior::Own,
        spoil: |c, r| rates(c, 1000.0, r),
    },
    Kind {
        name: "positives in percent beside people tested",
        prior: Prior::Own,
        spoil: |clean, rng| {
            let (k, n) = counted(observed(&clean, rng));
            let positive: Vec<f64> =
                k.iter().zip(&n).map(|(k, n)| (100.0 * k / n).round()).collect();
            let refused = positive.iter().zip(&n).any(|(k, n)| k > n);
            (!refused).then_some((clean.km, Outcome::Counts { positive, tested: n }))
        },
    },
    Kind { name: "mean logit -7 to -10", prior: Prior::Own, spoil: |c, r| moved(c, -1.0, r) },
    Kind { name: "mean logit 7 to 10", prior: Prior::Own, spoil: |c, r| moved(c, 1.0, r) },
    Kind {
        name: "mean logit -7 to -10, 5,000 people and more",
        prior: Prior::Own,
        spoil: |c, r| moved(crowded(c), -1.0, r),
    },
    Kind {
        name: "mean logit 7 to 10, 5,000 people and more",
        prior: Prior::Own,
        spoil: |c, r| moved(crowded(c), 1.0, r),
    },
    Kind {
        name: "populations instead of samples (100 ×)",
        prior: Prior::Own,
        spoil: |mut clean, rng| {
            clean.tested = clean.tested.map(|n| n.iter().map(|n| 100.0 * n).collect());
            let outcome = observed(&clean, rng);
            Some((clean.km, outcome))
        },
    },
];

const VALUES: &[Kind] = &[
    Kind {
        name: "9999 for missing in 3 % of rows",
        prior: Prior::Own,
        spoil: |mut clean, rng| {
            for _ in 0..(clean.eta.len() as f64 * 0.03).ceil() as usize {
                let at = rng.below(clean.eta.len());
                clean.eta[at] = 9999.0;
            }
            Some((clean.km, Outcome::Values(clean.eta)))
        },
    },
    Kind {
        name: "concentrations, not their logarithm",
        prior: Prior::Own,
        spoil: |mut clean, _| {
            let sd = isopleth::sites::mean_sd(&clean.eta).1;
            clean.eta.iter_mut().for_each(|v| *v = (2.0 * *v / sd).exp());
            Some((clean.km, Outcome::Values(clean.eta)))
        },
    },
    Kind {
        name: "half the values below detection (units)",
        prior: Prior::Own,
        spoil: |mut clean, _| {
            let mut sorted = clean.eta.clone();
            sorted.sort_by(f64::total_cmp);
            let limit = sorted[sorted.len() / 2];
            clean.eta.iter_mut().for_each(|v| *v = v.max(limit));
            Some((clean.km, Outcome::Values(clean.eta)))
        },
    },
];

fn tasks(recipe: &str, prior: Prior) -> Result<Tasks> {
    let mut table: toml::Table = recipe.parse().expect("a recipe");
    let range = match prior {
        Prior::Own => return Tasks::new(&table),
        Prior::LongRange | Prior::Smooth => [8.0, 40.0],
        Prior::ShortRange => [0.0005, 0.003],
    };
    let laws = table["prior"].as_table_mut().expect("a table");
    let mut law = toml::Table::new();
    law.insert("log-uniform".into(), toml::Value::try_from(range.to_vec()).expect("numbers"));
    laws.insert("length_scale".into(), law.into());
    // A trend, zones or a sum would bring another range back in.
    for other in ["trend", "zones", "sum", "product"] {
        laws.insert(other.into(), toml::Value::Float(0.0));
    }
    if prior == Prior::Smooth {
        let mut kernels = toml::Table::new();
        kernels.insert("squared-exponential".into(), toml::Value::Float(1.0));
        laws.insert("kernels".into(), kernels.into());
        laws.insert("sill_sd".into(), toml::Value::Float(10.0));
        laws.insert("nugget_sd".into(), toml::Value::Float(1e-6));
    }
    Tasks::new(&table)
}

fn clean(tasks: &Tasks, rng: &mut Stream) -> Result<Clean> {
    let n = rng.log_uniform(15.0, 151.0) as usize;
    let layout = tasks.design().layout(n, rng);
    let only = isopleth::task::design::Layout {
        xy: layout.xy[..n].to_vec(),
        t: Vec::new(),
        context: n,
        first_target: n,
    };
    let Draw { xy, noisy, trials, .. } = tasks.draws_at(&only, 1, rng)?.swap_remove(0);
    let half = rng.log_uniform(10.0, 1000.0);
    let km = xy.iter().map(|p| [half * p[0], half * p[1]]).collect();
    Ok(Clean { km, eta: noisy, tested: trials })
}

/// How a map of some surfaces fares that no warning is sure of: whether intervals hold them.
struct Outside {
    name: &'static str,
    prior: Prior,
    /// Where the mean of the link scale is moved to.
    mean: Option<[f64; 2]>,
}

const OUTSIDE: &[Outside] = &[
    Outside { name: "none: the model's own prior", prior: Prior::Own, mean: None },
    Outside { name: "length scale 8 to 40 half-sides", prior: Prior::LongRange, mean: None },
    Outside { name: "the same, smooth and without a nugget", prior: Prior::Smooth, mean: None },
    Outside {
        name: "length scale 0.0005 to 0.003 half-sides",
        prior: Prior::ShortRange,
        mean: None,
    },
    Outside { name: "mean logit -7 to -10", prior: Prior::Own, mean: Some([-10.0, -7.0]) },
    Outside { name: "mean logit 7 to 10", prior: Prior::Own, mean: Some([7.0, 10.0]) },
];

/// Share of the truths that intervals hold, of the surface and of new villages, ± over surveys.
fn worth(checkpoint: &Checkpoint, surveys: usize) -> Result<()> {
    let counts = checkpoint.likelihood()?.counts();
    let process = checkpoint.process(&candle_core::Device::Cpu)?;
    println!(
        "\n| of {surveys} surveys | surface: 50 / 80 / 95 % | new village or value: 50 / 80 / 95 % |"
    );
    println!("| --- | --- | --- |");
    for (k, kind) in OUTSIDE.iter().enumerate().filter(|(_, kind)| counts || kind.mean.is_none()) {
        let tasks = tasks(&checkpoint.card.recipe, kind.prior)?;
        let likelihood = tasks.likelihood();
        let mut shares: Vec<[f64; 6]> = Vec::new();
        for i in 0..surveys {
            let mut rng = Stream::new(78, "worth of a map", (1000 * k + i) as u64);
            let n = rng.log_uniform(15.0, 151.0) as usize;
            let mut draw = tasks.draws(n, 1, &mut rng)?.swap_remove(0);
            if let Some([low, high]) = kind.mean {
                let mean = draw.latent.iter().sum::<f64>() / draw.latent.len() as f64;
                let by = rng.uniform(low, high) - mean;
                draw.latent.iter_mut().chain(&mut draw.noisy).for_each(|eta| *eta += by);
                let trials = draw.trials.as_ref().expect("a model of counts");
                let seen = |(eta, n): (&f64, &f64)| likelihood.observe(*eta, *n, &mut rng);
                draw.y = draw.noisy.iter().zip(trials).map(seen).collect();
            }
            let task = tasks.pack(vec![draw])?.task;
            let answer = process.condition(&task.context)?.at(&task.target.sites)?;
            let mut held = [0.0; 6];
            for (j, (of, truth)) in [(Of::Surface, &task.surface), (Of::Observation, &task.noisy)]
                .into_iter()
                .enumerate()
            {
                let truth: Vec<f32> = truth.flatten_all()?.to_vec1()?;
                let marginals = answer.marginals(0, of)?;
                for (i, truth) in truth.iter().enumerate() {
                    let off = (marginals.link_cdf(i, f64::from(*truth)) - 0.5).abs();
                    for (l, level) in [0.5, 0.8, 0.95].into_iter().enumerate() {
                        held[3 * j + l] += f64::from(off <= 0.5 * level) / marginals.len() as f64;
                    }
                }
            }
            shares.push(held);
        }
        let mean = |c: usize| shares.iter().map(|s| s[c]).sum::<f64>() / surveys as f64;
        let error = |c: usize| {
            let square = shares.iter().map(|s| (s[c] - mean(c)).powi(2)).sum::<f64>();
            (square / (surveys * (surveys - 1)) as f64).sqrt()
        };
        let cell = |at: usize| {
            let [a, b, c] = [0, 1, 2].map(|l| mean(at + l));
            format!("{a:.3} / {b:.3} / {c:.3} ± {:.3}", error(at + 2))
        };
        println!("| {} | {} | {} |", kind.name, cell(0), cell(3));
    }
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let model = args.first().map_or("prevalence", String::as_str);
    let number =
        |i: usize, default: usize| args.get(i).map_or(default, |a| a.parse().expect("a number"));
    let (own, wrong) = (number(1, 300), number(2, 100));
    let checkpoint = Checkpoint::resolve(model)?;
    let counts = checkpoint.likelihood()?.counts();
    let judge = Judge::of(&checkpoint)?.map(Judge::brief);
    println!(
        "| {model}: what is wrong | surveys | refused by the reader | warned | of those read |"
    );
    println!("| --- | ---: | ---: | ---: | ---: |");
    let only = args.get(3).map_or("", String::as_str);
    let kinds = BOTH.iter().chain(if counts { COUNTS } else { VALUES }).enumerate();
    for (k, kind) in kinds.filter(|(_, kind)| kind.name.contains(only)) {
        let tasks = tasks(&checkpoint.card.recipe, kind.prior)?;
        let surveys = if k == 0 { own } else { wrong };
        let (mut refused, mut warned, start) = (0, 0, Instant::now());
        let mut about = std::collections::BTreeMap::<String, usize>::new();
        for i in 0..surveys {
            let mut rng = Stream::new(77, "trust power", (1000 * k + i) as u64);
            let clean = clean(&tasks, &mut rng)?;
            let Some((km, outcome)) = (kind.spoil)(clean, &mut rng) else {
                refused += 1;
                continue;
            };
            let survey = Survey {
                source: "simulated".into(),
                crs: Crs::from_user("local:km")?,
                x: km.iter().map(|p| p[0]).collect(),
                y: km.iter().map(|p| p[1]).collect(),
                rows: (1..=km.len()).collect(),
                outcome,
                dropped: Vec::new(),
                covariates: None,
                times: None,
                displacement: None,
                geometry: Default::default(),
                notes: Vec::new(),
            };
            let frame = Frame::fit(&survey)?;
            // What the units say needs no model.
            let units = examine(None, &survey, &frame)?;
            let verdict = match units.findings.is_empty() {
                true => examine(judge.as_ref(), &survey, &frame)?,
                false => units,
            };
            warned += usize::from(!verdict.findings.is_empty());
            for finding in verdict.findings {
                *about.entry(finding.about).or_default() += 1;
            }
        }
        let read = surveys - refused;
        println!(
            "| {} | {surveys} | {refused} | {warned} | {:.1} % |",
            kind.name,
            100.0 * warned as f64 / read.max(1) as f64
        );
        eprintln!("  {:.0} s: {about:?}", start.elapsed().as_secs_f64());
    }
    if ["", "worth"].contains(&only) { worth(&checkpoint, own) } else { Ok(()) }
}
