//! Laws over everything in MODELS, for every likelihood, at the size each entry calls tiny.

use std::{collections::BTreeMap, sync::LazyLock};

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Observations, Of, Predictive, Process, Result, Sites, Stream, Task,
    attention::{Reading, Term},
    checkpoint::{Card, Checkpoint, FORMAT},
    likelihood::{Kind, LIKELIHOODS, Likelihood},
    model::{self, Entry, MODELS, Problem, params::Params},
    process::{Objective, Reward},
    registry::Named,
    task::{Batch, Tasks},
    train::objective,
};

const CPU: Device = Device::Cpu;

/// Sums in another order, and other blocks in a matrix product, move f32 results by this much.
const ROUNDING: f64 = 1e-5;

type Model = Box<dyn Process + Send + Sync>;

fn table(entry: &Entry) -> toml::Table {
    entry.tiny.parse().unwrap()
}

fn tiny(entry: &Entry, likelihood: &'static dyn Likelihood, params: &mut Params) -> Model {
    (entry.build)(&table(entry), Problem::new(2, likelihood), params).unwrap()
}

fn fresh(seed: u64) -> Params {
    Params::new(seed, &CPU, DType::F32)
}

/// Each model with each likelihood, under a name for messages: for laws that cost little.
fn every(mut law: impl FnMut(&str, &Entry, &'static dyn Likelihood) -> Result<()>) -> Result<()> {
    for entry in MODELS {
        for likelihood in LIKELIHOODS {
            let name = format!("{} {}", entry.name, likelihood.name());
            law(&name, entry, *likelihood).inspect_err(|_| eprintln!("{name}"))?;
        }
    }
    Ok(())
}

/// Each model with counts, with values, and with one likelihood more, which differs from model to
/// model; the model that has a distance bias with each term alone, and on the globe; and the
/// Gaussian one with each of its parts.
fn each(mut law: impl FnMut(&str, &Entry, &'static dyn Likelihood) -> Result<()>) -> Result<()> {
    let (first, others) = LIKELIHOODS.split_at(2);
    for (i, entry) in MODELS.iter().enumerate() {
        for likelihood in first.iter().chain([&others[i % others.len()]]) {
            let name = format!("{} {}", entry.name, likelihood.name());
            law(&name, entry, *likelihood).inspect_err(|_| eprintln!("{name}"))?;
        }
    }
    for (i, (name, entry)) in BIASED.iter().enumerate() {
        law(name, entry, LIKELIHOODS[i % LIKELIHOODS.len()])?;
    }
    for (i, (name, entry)) in BACKENDS.iter().enumerate() {
        law(name, entry, LIKELIHOODS[i % LIKELIHOODS.len()])?;
    }
    Ok(())
}

/// The Gaussian model with the parts that its tiny settings leave out.
static BACKENDS: LazyLock<Vec<(String, Entry)>> = LazyLock::new(|| {
    let base = MODELS.iter().find(|e| e.name == "gnp").unwrap();
    let with = |backend: &str, covariance: &str| {
        let tiny = format!(
            "width = 8\ndepth = 2\nrank = 3\nbackend = '{backend}'\ncovariance = '{covariance}'\nheads = 2"
        );
        let name = format!("gnp, {backend}, {covariance}");
        (name, Entry { about: "", tiny: tiny.leak(), ..*base })
    };
    let raster = "\nconvcnp = { points_per_unit = 4, width = 4, kernel = 3, network = 'unet', levels = 2, margin = 0.5 }";
    let (name, entry) = with("convcnp", "linear");
    let entry = Entry { tiny: format!("{}{raster}", entry.tiny).leak(), ..entry };
    vec![with("cnp", "linear"), with("attention", "linear"), (name, entry)]
});

/// The biased model at the size it calls tiny, with one term, or great circles.
static BIASED: LazyLock<Vec<(String, Entry)>> = LazyLock::new(|| {
    let base = MODELS.iter().find(|e| e.name == "tnp-kr").unwrap();
    let with = |line: String, instead_of: &str| {
        let kept = base.tiny.lines().filter(|line| !line.starts_with(instead_of));
        let tiny = [line.as_str()].into_iter().chain(kept).collect::<Vec<_>>().join("\n");
        let name = format!("tnp-kr, {line}");
        (name, Entry { about: "", tiny: tiny.leak(), ..*base })
    };
    let terms = Term::ALL.iter().map(|t| with(format!("bias = ['{}']", t.name()), "bias = "));
    terms.chain([with("metric = 'great-circle'".into(), "metric = ")]).collect()
});

/// Three tasks that have nothing in common.
fn batch(likelihood: &dyn Likelihood, context: usize) -> Result<Batch> {
    let recipe = format!(
        "prior = {{ kind = 'gp' }}\ndesign = {{ targets = 10 }}\n\
         task = {{ likelihood = '{}', share = 1 }}",
        likelihood.name()
    );
    Tasks::new(&recipe.parse().unwrap())?.batch(1, context as u64, 3, context)
}

fn ask(model: &Model, context: &Observations, targets: &Sites) -> Result<Predictive> {
    model.condition(context)?.at(targets)
}

fn host(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// Largest difference in any parameter of the predictive, of its size where that is above 1.
fn gap(a: &Predictive, b: &Predictive) -> f64 {
    let parts = |p: &Predictive| {
        let tensors = [&p.log_weight, &p.mean, &p.surface_sd, &p.observation_sd];
        tensors.iter().flat_map(|x| host(x)).collect::<Vec<f64>>()
    };
    let (a, b) = (parts(a), parts(b));
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(&b).all(|v| v.is_finite()), "not finite");
    a.iter().zip(&b).fold(0.0, |most, (a, b)| most.max((a - b).abs() / b.abs().max(1.0)))
}

/// Targets `start … start + len` of a predictive.
fn part(p: &Predictive, start: usize, len: usize) -> Result<Predictive> {
    let cut = |x: &Tensor| x.narrow(1, start, len);
    Ok(Predictive {
        link: p.link,
        log_weight: cut(&p.log_weight)?,
        mean: cut(&p.mean)?,
        surface_sd: cut(&p.surface_sd)?,
        observation_sd: cut(&p.observation_sd)?,
        lift: None,
        law: None,
    })
}

fn assert_sound(name: &str, p: &Predictive) -> Result<()> {
    for row in 0..p.mean.dims()[0] {
        for of in [Of::Surface, Of::Observation] {
            let m = p.marginals(row, of)?;
            assert!(m.sd.iter().all(|sd| *sd > 0.0), "{name}: an sd is not positive");
            for i in 0..m.len() {
                let total: f64 = m.components(i).map(|c| c.0).sum();
                assert!((total - 1.0).abs() < 1e-6, "{name}: the weights add up to {total}");
            }
        }
    }
    let excess = (&p.observation_sd - &p.surface_sd)?;
    assert!(host(&excess).iter().all(|v| *v >= 0.0), "{name}: a nugget below 0");
    Ok(())
}

/// A context is a set: its order says nothing.
#[test]
fn the_order_of_the_context_is_irrelevant() -> Result<()> {
    each(|name, entry, likelihood| {
        let (model, task) = (tiny(entry, likelihood, &mut fresh(1)), batch(likelihood, 12)?.task);
        let order = Stream::new(1, "order", 0).permutation(12);
        let order = Tensor::from_vec(order.iter().map(|i| *i as u32).collect(), 12, &CPU)?;
        let shuffle = |x: &Tensor| x.index_select(&order, 1);
        let shuffled = Observations {
            sites: Sites::new(shuffle(&task.context.sites.s)?),
            y: shuffle(&task.context.y)?,
            mask: task.context.mask.clone(),
            trials: task.context.trials.as_ref().map(shuffle).transpose()?,
        };
        let before = ask(&model, &task.context, &task.target.sites)?;
        let moved = gap(&before, &ask(&model, &shuffled, &task.target.sites)?);
        assert!(moved < ROUNDING, "{name}: another order moved the predictive by {moved:e}");
        Ok(())
    })
}

/// The context behind `extra` sites that were not observed, which hold `site`, `y` and `trials`.
fn padded(context: &Observations, extra: usize, garbage: [f64; 3]) -> Result<Observations> {
    let rows = context.y.dims()[0];
    let fill = |x: &Tensor, value: f64| -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        shape[1] = extra;
        let blank = Tensor::full(value as f32, shape, &CPU)?;
        Ok(Tensor::cat(&[&blank, x], 1)?)
    };
    let [site, y, trials] = garbage;
    Ok(Observations {
        sites: Sites::new(fill(&context.sites.s, site)?),
        y: fill(&context.y, y)?,
        mask: Tensor::cat(&[&Tensor::zeros((rows, extra), DType::F32, &CPU)?, &context.mask], 1)?,
        trials: context.trials.as_ref().map(|n| fill(n, trials)).transpose()?,
    })
}

/// What stands at a site that was not observed is nobody's business: zeros, far sites, wild values.
#[test]
fn padding_is_irrelevant() -> Result<()> {
    each(|name, entry, likelihood| {
        let (model, task) = (tiny(entry, likelihood, &mut fresh(1)), batch(likelihood, 12)?.task);
        let before = ask(&model, &task.context, &task.target.sites)?;
        for garbage in [[0.0, 0.0, 0.0], [0.3, 7.0, 9.0], [-1e4, 1e5, 1e6]] {
            for extra in [1, 5, 70] {
                let context = padded(&task.context, extra, garbage)?;
                let moved = gap(&before, &ask(&model, &context, &task.target.sites)?);
                assert!(
                    moved < ROUNDING,
                    "{name}: {extra} hidden sites with {garbage:?} moved the predictive by {moved:e}"
                );
            }
        }
        Ok(())
    })
}

/// Cutting the grid into tiles is a memory knob: no pixel may notice.
#[test]
fn tiles_never_change_the_map() -> Result<()> {
    each(|name, entry, likelihood| {
        let (model, task) = (tiny(entry, likelihood, &mut fresh(1)), batch(likelihood, 12)?.task);
        let posterior = model.condition(&task.context)?;
        let whole = posterior.at(&task.target.sites)?;
        for tile in [1, 3, 7] {
            for start in (0..10).step_by(tile) {
                let len = tile.min(10 - start);
                let alone = posterior.at(&task.target.sites.narrow(start, len)?)?;
                let moved = gap(&alone, &part(&whole, start, len)?);
                assert!(moved < ROUNDING, "{name}: tile {tile} moved the predictive by {moved:e}");
            }
        }
        Ok(())
    })
}

/// A posterior is asked by several threads at once, in pools of any size: no answer may notice.
#[test]
fn threads_never_change_the_map() -> Result<()> {
    each(|name, entry, likelihood| {
        let (model, task) = (tiny(entry, likelihood, &mut fresh(1)), batch(likelihood, 12)?.task);
        let posterior = model.condition(&task.context)?;
        let (posterior, sites) = (&*posterior, &task.target.sites);
        let whole = posterior.at(sites)?;
        std::thread::scope(|scope| -> Result<()> {
            let asked = [1, 1, 2, 3].map(|threads| {
                scope.spawn(move || {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    pool.unwrap().install(|| (0..3).map(|_| posterior.at(sites)).collect())
                })
            });
            for answers in asked {
                let answers: Result<Vec<Predictive>> = answers.join().unwrap();
                for answer in answers? {
                    let moved = gap(&answer, &whole);
                    assert!(moved < ROUNDING, "{name}: threads moved the predictive by {moved:e}");
                }
            }
            Ok(())
        })
    })
}

/// A long context is read in parts, for memory. One that lies across the end of a part, behind
/// thousands of sites that were not observed, is the one it is alone.
#[test]
fn a_context_across_parts_is_one_context() -> Result<()> {
    // The reference holds its whole score matrix: 4,102 sites squared are too much for a test.
    for entry in MODELS.iter().filter(|e| e.name != "tnp-kr-full") {
        let (name, likelihood) = (entry.name, LIKELIHOODS[0]);
        let task = batch(likelihood, 12)?.rows(0, 1)?.task;
        let model = tiny(entry, likelihood, &mut fresh(1));
        let alone = ask(&model, &task.context, &task.target.sites)?;
        let behind = padded(&task.context, 4090, [0.3, 1.0, 2.0])?;
        let moved = gap(&alone, &ask(&model, &behind, &task.target.sites)?);
        assert!(moved < ROUNDING, "{name}: two parts moved the predictive by {moved:e}");
        // The sites of both parts count: without those of the last, the answer is another.
        let mut cut = behind.clone();
        let first = behind.mask.narrow(1, 0, 4096)?;
        cut.mask = Tensor::cat(&[&first, &Tensor::zeros((1, 6), DType::F32, &CPU)?], 1)?;
        let moved = gap(&alone, &ask(&model, &cut, &task.target.sites)?);
        assert!(moved > ROUNDING, "{name}: the sites of the last part do nothing");
    }
    Ok(())
}

/// What is near in memory is not near on the ground: each row of a batch is a survey of its own.
#[test]
fn a_row_does_not_see_its_neighbours() -> Result<()> {
    every(|name, entry, likelihood| {
        let (model, batch) = (tiny(entry, likelihood, &mut fresh(1)), batch(likelihood, 12)?);
        let whole = ask(&model, &batch.task.context, &batch.task.target.sites)?;
        for row in 0..3 {
            let one = batch.rows(row, 1)?.task;
            let alone = ask(&model, &one.context, &one.target.sites)?;
            let cut = |x: &Tensor| x.narrow(0, row, 1);
            let there = Predictive {
                link: whole.link,
                log_weight: cut(&whole.log_weight)?,
                mean: cut(&whole.mean)?,
                surface_sd: cut(&whole.surface_sd)?,
                observation_sd: cut(&whole.observation_sd)?,
                lift: None,
                law: None,
            };
            let moved = gap(&alone, &there);
            assert!(moved < ROUNDING, "{name}: row {row} alone differs by {moved:e}");
        }
        Ok(())
    })
}

/// Before any survey a model still has an opinion; and one that nobody observed is no survey.
#[test]
fn an_empty_context_gives_the_model_s_prior() -> Result<()> {
    each(|name, entry, likelihood| {
        let (model, task) = (tiny(entry, likelihood, &mut fresh(1)), batch(likelihood, 12)?.task);
        let none = Observations {
            sites: task.context.sites.narrow(0, 0)?,
            y: task.context.y.narrow(1, 0, 0)?,
            mask: task.context.mask.narrow(1, 0, 0)?,
            trials: task.context.trials.as_ref().map(|n| n.narrow(1, 0, 0)).transpose()?,
        };
        let empty = ask(&model, &none, &task.target.sites)?;
        assert_sound(name, &empty)?;
        let mask = task.context.mask.zeros_like()?;
        let hidden = Observations { mask, ..task.context };
        let moved = gap(&empty, &ask(&model, &hidden, &task.target.sites)?);
        assert!(moved < ROUNDING, "{name}: hidden sites moved the predictive by {moved:e}");
        Ok(())
    })
}

/// Training surveys differ in kind; whatever the kind, what comes back is a law.
#[test]
fn predictives_are_laws() -> Result<()> {
    every(|name, entry, likelihood| {
        let model = tiny(entry, likelihood, &mut fresh(1));
        for context in [2, 3, 40] {
            let task = batch(likelihood, context)?.task;
            assert_sound(name, &ask(&model, &task.context, &task.target.sites)?)?;
        }
        Ok(())
    })
}

/// What was seen matters to what is predicted: a law that a model blind to its context would fail.
#[test]
fn the_context_is_read() -> Result<()> {
    every(|name, entry, likelihood| {
        let (model, task) = (tiny(entry, likelihood, &mut fresh(1)), batch(likelihood, 12)?.task);
        let before = ask(&model, &task.context, &task.target.sites)?;
        let y = match &task.context.trials {
            Some(trials) if likelihood.kind() != Kind::Exposure => {
                (trials.unsqueeze(2)? - &task.context.y)?
            }
            _ => (&task.context.y + 1.0)?,
        };
        let other = Observations { y, ..task.context };
        let moved = gap(&before, &ask(&model, &other, &task.target.sites)?);
        assert!(moved > 1e-3, "{name}: other outcomes moved the predictive by only {moved:e}");
        Ok(())
    })
}

/// The loss of a model on a batch, in the precision of its parameters.
fn cost(model: &Model, batch: &Batch, dtype: DType) -> Result<Tensor> {
    Ok(learning(model, batch, dtype)?.loss)
}

/// The objective of a model on a batch, in the precision of its parameters.
fn learning(model: &Model, batch: &Batch, dtype: DType) -> Result<Objective> {
    let cast = |x: &Tensor| x.to_dtype(dtype);
    let context = &batch.task.context;
    let context = Observations {
        sites: Sites::new(cast(&context.sites.s)?),
        y: cast(&context.y)?,
        mask: cast(&context.mask)?,
        trials: context.trials.as_ref().map(cast).transpose()?,
    };
    let target = &batch.task.target;
    let target = Observations {
        sites: Sites::new(cast(&target.sites.s)?),
        y: cast(&target.y)?,
        mask: cast(&target.mask)?,
        trials: target.trials.as_ref().map(cast).transpose()?,
    };
    let (surface, noisy) = (cast(&batch.task.surface)?, cast(&batch.task.noisy)?);
    let hyper = batch.task.hyper.as_ref().map(cast).transpose()?;
    let task = Task { context, target, surface, noisy, hyper };
    objective(&**model, &task, Reward::Both, &mut Stream::new(5, "objective", 0))
}

/// candle has layers that cut the gradient without a word; a parameter that learns nothing is a bug.
#[test]
fn every_parameter_has_a_gradient() -> Result<()> {
    each(|name, entry, likelihood| {
        let mut params = fresh(1);
        let model = tiny(entry, likelihood, &mut params);
        for context in [12, 1] {
            // One observation: a context with a single site that is not hidden.
            let mut batch = batch(likelihood, context.max(2))?;
            if context == 1 {
                let mask = Tensor::new(&[[1f32, 0.0], [1.0, 0.0], [1.0, 0.0]], &CPU)?;
                batch.task.context.mask = mask;
            }
            let grads = cost(&model, &batch, DType::F32)?.backward()?;
            for (path, var) in params.vars() {
                let Some(grad) = grads.get(var.as_tensor()) else {
                    panic!("{name}: `{path}` has no gradient from {context} sites");
                };
                let grad = host(grad);
                assert!(
                    grad.iter().all(|g| g.is_finite()),
                    "{name}: the gradient of `{path}` from {context} sites is not finite"
                );
                assert!(
                    context == 1 || grad.iter().any(|g| *g != 0.0),
                    "{name}: the gradient of `{path}` from {context} sites is zero"
                );
            }
        }
        Ok(())
    })
}

/// A model in f64 is composed of stock operations, in f32 of our own; both must learn the same, and
/// what the f64 one learns must be the slope of its loss.
#[test]
fn gradients_equal_those_of_the_f64_twin_and_finite_differences() -> Result<()> {
    each(|name, entry, likelihood| {
        let batch = batch(likelihood, 12)?;
        let mut single = fresh(1);
        let model = tiny(entry, likelihood, &mut single);
        let weights = single.vars().iter().map(|(p, v)| (p.clone(), v.as_tensor().clone()));
        let mut double = Params::saved(weights.collect(), &CPU, DType::F64);
        let twin = tiny(entry, likelihood, &mut double);
        let (value, truth) = (cost(&model, &batch, DType::F32)?, cost(&twin, &batch, DType::F64)?);
        let apart = (host(&value)[0] - host(&truth)[0]).abs();
        assert!(apart < 1e-4, "{name}: the losses are {apart:e} apart");
        let (grads, exact) = (value.backward()?, truth.backward()?);
        let mut rng = Stream::new(1, "direction", 0);
        for (path, var) in double.vars() {
            let slope = host(exact.get(var.as_tensor()).expect("the law above"));
            let ours = host(grads.get(single.vars()[path].as_tensor()).expect("the law above"));
            let norm = slope.iter().map(|g| g * g).sum::<f64>().sqrt();
            let off = slope.iter().zip(&ours).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            // Digits are lost where large terms of the loss cancel in the gradient.
            assert!(off < 1e-3 * norm + 1e-5, "{name}: d{path} is off by {off:e} of {norm:e}");

            let (start, along) = (host(var.as_tensor()), rng.normals(slope.len()));
            let step = |h: f64| -> Result<f64> {
                let there = start.iter().zip(&along).map(|(x, d)| x + h * d).collect::<Vec<_>>();
                var.set(&Tensor::from_vec(there, var.shape(), &CPU)?)?;
                Ok(host(&cost(&twin, &batch, DType::F64)?)[0])
            };
            if learning(&twin, &batch, DType::F64)?.surrogate {
                continue;
            }
            let analytic: f64 = slope.iter().zip(&along).map(|(g, d)| g * d).sum();
            // A long step may cross a kink of ReLU, where it says nothing of the slope here.
            let mut apart = Vec::new();
            for h in [1e-5, 1e-7] {
                apart.push((step(h)? - step(-h)?) / (2.0 * h) - analytic);
            }
            step(0.0)?;
            assert!(
                apart.iter().any(|d| d.abs() < 1e-4 * (1e-2 + norm)),
                "{name}: along `{path}` the gradient says {analytic}, steps of the loss {apart:?} more"
            );
        }
        Ok(())
    })
}

#[test]
fn a_checkpoint_reopens_to_equal_output() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    each(|name, entry, likelihood| {
        let mut params = fresh(3);
        let (model, task) = (tiny(entry, likelihood, &mut params), batch(likelihood, 12)?.task);
        let recipe = format!(
            "[model]\nkind = '{}'\n{}\n[prior]\nkind = 'gp'\n[task]\nlikelihood = '{}'",
            entry.name,
            entry.tiny,
            likelihood.name()
        );
        let card = Card {
            format: FORMAT,
            isopleth: String::new(),
            name: entry.name.into(),
            predicts: String::new(),
            recipe,
            parameters: params.count(),
            seed: 3,
            steps: 0,
            best_step: 0,
            tasks: 0,
            started_from: None,
            validation: None,
            exact_gp: None,
            seconds: 0.0,
            machine: String::new(),
            date: String::new(),
            covariates: None,
            scores: serde_json::Map::new(),
        };
        let tensors = params.vars().iter().map(|(p, v)| (p.clone(), v.as_tensor().clone()));
        let tensors: BTreeMap<_, _> = tensors.collect();
        let file = folder.path().join("model.safetensors");
        let asked = tiny(entry, likelihood, &mut Params::frozen(tensors.clone(), &CPU, DType::F32));
        Checkpoint { card, tensors }.write(&file)?;
        let opened = Checkpoint::open(&file)?;
        assert_eq!(opened.likelihood()?.name(), likelihood.name());
        let before = ask(&asked, &task.context, &task.target.sites)?;
        let after = ask(&opened.process(&CPU)?, &task.context, &task.target.sites)?;
        // What was trained is read by operations that learn; what is opened, by those that do not.
        let learnt = ask(&model, &task.context, &task.target.sites)?;
        let moved = gap(&learnt, &after);
        assert!(moved < ROUNDING, "{name}: opening moved the predictive by {moved:e}");
        assert_eq!(gap(&before, &after), 0.0, "{name}");
        Ok(())
    })
}

/// A way of reading is followed or refused, never passed over.
#[test]
fn models_that_read_no_sites_refuse_to_leave_some_out() {
    let reading = Reading { lose: 1e-3, ..Reading::default() };
    for entry in MODELS {
        let problem = Problem { reading, ..Problem::new(2, LIKELIHOODS[0]) };
        let built = (entry.build)(&table(entry), problem, &mut fresh(1));
        assert_eq!(built.is_ok(), entry.name == "tnp-kr", "{}", entry.name);
    }
}

#[test]
fn the_seed_makes_the_model() -> Result<()> {
    each(|name, entry, likelihood| {
        let task = batch(likelihood, 12)?.task;
        let under = |seed| {
            ask(&tiny(entry, likelihood, &mut fresh(seed)), &task.context, &task.target.sites)
        };
        assert_eq!(gap(&under(1)?, &under(1)?), 0.0, "{name}: one seed, two models");
        assert!(gap(&under(1)?, &under(2)?) > 1e-3, "{name}: two seeds, one model");
        Ok(())
    })
}

#[test]
fn tnp_kr_equals_its_dense_reference() -> Result<()> {
    let named = |name: &str| MODELS.iter().find(|e| e.name == name).unwrap();
    for likelihood in LIKELIHOODS {
        let mut params = fresh(5);
        let fast = tiny(named("tnp-kr"), *likelihood, &mut params);
        let weights = params.vars().iter().map(|(p, v)| (p.clone(), v.as_tensor().clone()));
        let mut same = Params::saved(weights.collect(), &CPU, DType::F32);
        let full = tiny(named("tnp-kr-full"), *likelihood, &mut same);
        assert!(same.unused().is_empty());
        // More sites than a chunk of keys holds, and fewer.
        for context in [2, 12, 700] {
            let task = batch(*likelihood, context)?.task;
            let a = ask(&fast, &task.context, &task.target.sites)?;
            let moved = gap(&a, &ask(&full, &task.context, &task.target.sites)?);
            assert!(moved < ROUNDING, "{context} sites: {moved:e} apart");
        }
    }
    Ok(())
}

/// A model that is told distances only cannot know where on the map it is; one whose tokens hold
/// coordinates can.
#[test]
fn without_locations_only_distances_matter() -> Result<()> {
    for entry in MODELS.iter().filter(|e| ["tnp-kr", "tnp-kr-full"].contains(&e.name)) {
        for likelihood in LIKELIHOODS {
            let task = batch(*likelihood, 12)?.task;
            for embed in [false, true] {
                let mut settings = table(entry);
                settings.insert("embed_location".into(), embed.into());
                let problem = Problem::new(2, *likelihood);
                let model = (entry.build)(&settings, problem, &mut fresh(1))?;
                let shift = Tensor::new(&[[[4f32, -2.0]]], &CPU)?;
                let moved =
                    |s: &Sites| -> Result<Sites> { Ok(Sites::new(s.s.broadcast_add(&shift)?)) };
                let there =
                    Observations { sites: moved(&task.context.sites)?, ..task.context.clone() };
                let here = ask(&model, &task.context, &task.target.sites)?;
                let off = gap(&here, &ask(&model, &there, &moved(&task.target.sites)?)?);
                let name = entry.name;
                assert!(embed || off < ROUNDING, "{name}: a shift moved the predictive by {off:e}");
                assert!(!embed || off > 1e-3, "{name}: locations are embedded and do nothing");
            }
        }
    }
    Ok(())
}

/// A globe has no edges and no preferred pole; and a model that would not be at home on it is refused.
#[test]
fn models_on_the_globe_have_no_seam() -> Result<()> {
    let (_, entry) = BIASED.last().unwrap();
    let likelihood = LIKELIHOODS[0];
    let model = tiny(entry, likelihood, &mut fresh(1));
    let mut task = batch(likelihood, 12)?.task;
    // Sites within ±30° of the origin, and the same turned by 180°, over the antimeridian.
    let [context, target] = [&task.context.sites, &task.target.sites].map(|sites| &sites.s * 30.0);
    let turned = |s: &Tensor| -> Result<Sites> {
        let half_turn = Tensor::new(&[[[180f32, 0.0]]], &CPU)?;
        let s = s.broadcast_add(&half_turn)?;
        let beyond = (s.ge(180.0)?.to_dtype(DType::F32)? * 360.0)?;
        let only_longitude = Tensor::new(&[[[1f32, 0.0]]], &CPU)?;
        Ok(Sites::new((s - beyond.broadcast_mul(&only_longitude)?)?))
    };
    let (context, target) = (context?, target?);
    task.context.sites = Sites::new(context.clone());
    let here = ask(&model, &task.context, &Sites::new(target.clone()))?;
    task.context.sites = turned(&context)?;
    let moved = gap(&here, &ask(&model, &task.context, &turned(&target)?)?);
    assert!(moved < ROUNDING, "half a turn moved the predictive by {moved:e}");

    for (kind, setting, why) in [
        ("tnp-kr", "embed_location = true", "seam"),
        ("tnp-kr-dka", "features = 4", "measures no distance"),
    ] {
        let settings = format!("kind = '{kind}'\nmetric = 'great-circle'\n{setting}");
        let problem = Problem::new(2, likelihood);
        let built = model::build(&settings.parse().unwrap(), problem, &mut fresh(1));
        let Err(error) = built else { panic!("{settings}") };
        assert!(error.to_string().contains(why), "{error}");
    }
    Ok(())
}

/// Equal terms stay equal for ever: with `spread` no two start alike, and none starts blind.
#[test]
fn terms_start_with_widths_of_their_own() -> Result<()> {
    for term in Term::ALL.into_iter().filter(|t| *t != Term::Sink) {
        for constraint in ["positive", "abs", "free"] {
            let settings = format!(
                "kind = 'tnp-kr'\nblocks = 1\nheads = 3\nbias = ['{0}', '{0}']\nbias_constraint = '{constraint}'",
                term.name()
            );
            let mut params = fresh(1);
            let problem = Problem::new(2, LIKELIHOODS[0]);
            model::build(&settings.parse().unwrap(), problem, &mut params)?;
            let raw = host(params.vars()["block.0.attention.bias"].as_tensor());
            let name = format!("{}, {constraint}", term.name());
            let logged = constraint == "positive";
            let mut widths: Vec<f64> = raw
                .chunks(3)
                .map(|p| match (term, logged) {
                    (Term::Scalar, true) => p[0].exp(),
                    (Term::Scalar, false) => -p[0],
                    (_, true) => p[1].exp(),
                    (_, false) => p[1],
                })
                .collect();
            if term.is_log_kernel() {
                let sharp = |p: &[f64]| if logged { p[0].exp() } else { p[0] };
                assert!(raw.chunks(3).all(|p| sharp(p) == 1.0), "{name}: the kernel itself");
            }
            widths.sort_by(f64::total_cmp);
            assert!(widths[0] > 0.0, "{name}");
            assert!(widths.windows(2).all(|w| w[1] > 1.1 * w[0]), "{name}: {widths:?}");
            if term == Term::Wendland {
                let supports = widths.iter().map(|b| 1.0 / b);
                assert!(supports.into_iter().all(|s| (0.299..3.001).contains(&s)), "{widths:?}");
            }
        }
    }
    Ok(())
}

/// A recipe on a line builds every model in one dimension.
#[test]
fn models_work_on_a_line() -> Result<()> {
    each(|name, entry, likelihood| {
        let recipe = format!(
            "prior = {{ kind = 'gp' }}\ndesign = {{ targets = 6, line = true }}\n\
             task = {{ likelihood = '{}' }}",
            likelihood.name()
        );
        let tasks = Tasks::new(&recipe.parse().unwrap())?;
        let task = tasks.batch(1, 0, 2, 9)?.task;
        let problem = Problem::new(tasks.dim(), likelihood);
        let built = (entry.build)(&table(entry), problem, &mut fresh(1));
        if table(entry).contains_key("metric") {
            let Err(error) = built else { panic!("{name}: a great circle on a line") };
            assert!(error.to_string().contains("longitude and latitude"), "{error}");
            return Ok(());
        }
        let model = built?;
        assert_sound(name, &ask(&model, &task.context, &task.target.sites)?)
    })
}

/// A misspelt setting is named with the one that was meant, and never ignored.
#[test]
fn unknown_settings_are_refused() -> Result<()> {
    each(|name, entry, likelihood| {
        let known = table(entry).keys().next().unwrap().clone();
        let mut settings = table(entry);
        settings.insert(format!("{known}x"), 1.into());
        let built = (entry.build)(&settings, Problem::new(2, likelihood), &mut fresh(1));
        let Err(error) = built else { panic!("{name}: an unknown setting was swallowed") };
        assert!(error.help().unwrap().contains(&format!("`{known}`")), "{name}: {error}");
        Ok(())
    })?;
    let known: Vec<&str> = MODELS.iter().map(|e| e.name).collect();
    let problem = Problem::new(2, LIKELIHOODS[0]);
    let misspelt = "kind = 'tnp-kar'".parse().unwrap();
    let Err(error) = model::build(&misspelt, problem, &mut fresh(1)) else { panic!("{known:?}") };
    assert_eq!(error.help().unwrap(), "did you mean `tnp-kr`?");
    Ok(())
}

/// A joint density knows as little of hidden sites as that of each target alone does; and of one
/// target alone it is the same, where nothing is drawn to find it.
#[test]
fn joint_densities_agree_with_those_of_single_targets() -> Result<()> {
    each(|name, entry, likelihood| {
        if !["gnp", "tnp-a", "tnp-nd"].contains(&entry.name) {
            return Ok(());
        }
        let (model, task) = (tiny(entry, likelihood, &mut fresh(1)), batch(likelihood, 12)?.task);
        let behind = padded(&task.context, 5, [0.3, 7.0, 9.0])?;
        for of in [Of::Surface, Of::Observation] {
            let joint = |context: &Observations, n: usize| -> Result<Vec<f64>> {
                let (sites, values) =
                    (task.target.sites.narrow(0, n)?, task.surface.narrow(1, 0, n)?);
                let density = model.condition(context)?.joint(&sites, of, &values)?;
                Ok(host(&density.expect("a joint model")))
            };
            let alone = ask(&model, &task.context, &task.target.sites.narrow(0, 1)?)?;
            let alone = host(&alone.log_prob(of, &task.surface.narrow(1, 0, 1)?)?);
            for (a, b) in alone.iter().zip(joint(&task.context, 1)?) {
                assert!((a - b).abs() < 1e-4 * (1.0 + a.abs()), "{name}: {a} alone, {b} jointly");
            }
            for (a, b) in joint(&task.context, 10)?.iter().zip(joint(&behind, 10)?) {
                assert!((a - b).abs() < 1e-4 * (1.0 + a.abs()), "{name}: {a}, with padding {b}");
            }
        }
        Ok(())
    })
}

/// A model that draws jointly says so, and any other refuses: areal means from marginals are wrong.
#[test]
fn joint_draws_are_offered_or_refused() -> Result<()> {
    each(|name, entry, likelihood| {
        let (model, task) = (tiny(entry, likelihood, &mut fresh(1)), batch(likelihood, 12)?.task);
        let (context, target) = (task.context.rows(0, 1)?, task.target.rows(0, 1)?);
        let posterior = model.condition(&context)?;
        let value = task.surface.narrow(0, 0, 1)?;
        let density = posterior.joint(&target.sites, Of::Surface, &value)?;
        let draws = posterior.draws(&target.sites, 5, &mut Stream::new(1, "draws", 0));
        assert_eq!(density.is_some(), entry.joint, "{name}: joint density");
        assert_eq!(draws.is_ok(), entry.joint, "{name}: joint draws");
        if let (Some(density), Ok(draws)) = (density, draws) {
            assert_eq!(density.dims(), [1], "{name}");
            assert_eq!(draws.values.dims(), [5, 10, 1], "{name}");
            assert!(
                host(&density).iter().chain(&host(&draws.values)).all(|x| x.is_finite()),
                "{name}"
            );
        }
        Ok(())
    })
}

/// What is trained on one device is asked on another. Laws for a card have `on_a_gpu` in their names:
/// scripts/gpu-check.py asks for those.
#[cfg(feature = "cuda")]
#[test]
fn answers_on_a_gpu_are_those_of_the_cpu() -> Result<()> {
    let Some(device) = super::cuda::on_a_gpu::gpu() else { return Ok(()) };
    each(|name, entry, likelihood| {
        let task = batch(likelihood, 50)?.task;
        let mut params = fresh(4);
        tiny(entry, likelihood, &mut params);
        let tensors = params.vars().iter().map(|(p, v)| (p.clone(), v.as_tensor().clone()));
        let tensors: BTreeMap<_, _> = tensors.collect();
        let here = tiny(entry, likelihood, &mut Params::frozen(tensors.clone(), &CPU, DType::F32));
        let there = tiny(entry, likelihood, &mut Params::frozen(tensors, &device, DType::F32));
        let moved = task.to_device(&device)?;
        let (truth, found) = (
            ask(&here, &task.context, &task.target.sites)?,
            ask(&there, &moved.context, &moved.target.sites)?,
        );
        let moved = gap(&found, &truth);
        assert!(moved < 10.0 * ROUNDING, "{name}: the GPU moved the predictive by {moved:e}");
        Ok(())
    })
}
