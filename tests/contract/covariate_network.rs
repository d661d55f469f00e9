//! Covariates as inputs of a network: what it is trained on, what it reads, and from where it may start.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Observations, Of, Process, Result, Sites, Stream,
    checkpoint::Checkpoint,
    geo::{
        covariates::{Head, KNOWN, Lattice, VALUES},
        crs::Crs,
    },
    model::{self, MODELS, Problem, params::Params},
    recipe::Recipe,
    train::{self, Options},
};

const CPU: Device = Device::Cpu;
const TERMS: [&str; 2] = ["height=height.tif,knot:300", "green=green.tif"];

/// Hills and a slope at 60 × 80 places, 5 km apart; a tenth of them at sea.
fn lattice() -> Result<Arc<Lattice>> {
    let (rows, cols) = (60, 80);
    let place = |i: usize| (i / cols, i % cols);
    let height = |i: usize| {
        let (row, col) = place(i);
        (300.0 + 200.0 * (0.2 * row as f64).sin() * (0.15 * col as f64).cos()) as f32
    };
    let green = |i: usize| (0.01 * (place(i).0 + place(i).1) as f64).sqrt() as f32;
    let values: Vec<f32> =
        (0..rows * cols).map(height).chain((0..rows * cols).map(green)).collect();
    let known: Vec<f32> = (0..rows * cols).map(|i| f32::from(u8::from(place(i).1 >= 8))).collect();
    let head = Head {
        specs: TERMS.iter().map(|term| term.parse()).collect::<Result<_>>()?,
        window: None,
        nodes: rows * cols,
        plane: Crs::from_user("local:m")?,
        origin: [0.0; 2],
        step: 5000.0,
    };
    let tensors = BTreeMap::from([
        (VALUES.to_string(), Tensor::from_vec(values, (2, rows, cols), &CPU)?),
        (KNOWN.to_string(), Tensor::from_vec(known, (rows, cols), &CPU)?),
    ]);
    Ok(Arc::new(Lattice::of(head, &tensors)?))
}

fn text(model: &str, covariates: &str) -> String {
    format!(
        "name = \"covered\"\nmodel = {{ {model} }}\nprior = {{ kind = \"gp\" }}\n\
         design = {{ targets = 6, context = [{{ sites = [5, 30], weight = 1 }}] }}\n{covariates}\n\
         [train]\nsteps = 4\nwarmup = 2\nrows = 4\nvalidate_tasks = 8\nvalidate_every = 2\n\
         checkpoint_every = 2\n"
    )
}

const TINY: &str = "kind = \"tnp-kr\", width = 8, blocks = 2, heads = 2, key_width = 4, value_width = 3, \
     embed = [8], feed_forward = 8, head_widths = [8]";

fn recipe(covariates: &str) -> Result<Recipe> {
    let table = format!("[covariates]\nterms = {TERMS:?}\n{covariates}");
    Ok(Recipe::parse(&text(TINY, &table))?.on(lattice()?))
}

fn host(x: &Tensor) -> Vec<Vec<Vec<f64>>> {
    x.to_dtype(DType::F64).unwrap().to_vec3().unwrap()
}

/// Covariates are standardised at the context, as a survey's are; tasks of one index are the same; and
/// where effects are all there is, places with equal covariates have equal surfaces.
#[test]
fn tasks_have_covariates_that_act() -> Result<()> {
    let tasks = recipe("absent = 0.0\neffect_sd = 1.0")?.tasks()?;
    assert_eq!(tasks.features(), 3);
    let batch = tasks.batch(1, 0, 3, 20)?;
    let x = host(batch.task.context.sites.x.as_ref().unwrap());
    assert_eq!((x.len(), x[0].len(), x[0][0].len()), (3, 20, 3));
    for row in &x {
        for feature in 0..3 {
            let of: Vec<f64> = row.iter().map(|x| x[feature]).collect();
            let mean = of.iter().sum::<f64>() / 20.0;
            let sd = (of.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 20.0).sqrt();
            assert!(mean.abs() < 1e-5, "feature {feature} has mean {mean}");
            // No site beyond the knot: nothing to standardise.
            assert!((sd - 1.0).abs() < 1e-4 || (feature == 1 && sd == 0.0), "sd {sd}");
        }
    }
    let again = tasks.batch(1, 0, 3, 20)?;
    assert_eq!(host(again.task.target.sites.x.as_ref().unwrap()).len(), 3);
    assert_eq!(host(&again.task.surface), host(&batch.task.surface));

    // Effects alone: where surfaces have next to no variance, prevalence follows the covariates.
    let table = format!(
        "[covariates]\nterms = [{:?}]\nabsent = 0.0\nbent = 0.0\neffect_sd = 2.0\n",
        "height=height.tif"
    );
    let flat = text(TINY, &table).replace(
        "prior = { kind = \"gp\" }",
        "prior = { kind = \"gp\", sill_sd = 1e-6, nugget_sd = 1e-6, nugget_absent = 1.0 }",
    );
    let one = Lattice::of(
        Head { specs: vec!["height=height.tif".parse()?], ..lattice()?.head.clone() },
        &lattice()?
            .tensors()?
            .into_iter()
            .map(|(name, t)| {
                Ok((name.clone(), if name == VALUES { t.narrow(0, 0, 1)? } else { t }))
            })
            .collect::<Result<_>>()?,
    )?;
    let tasks = Recipe::parse(&flat)?.on(Arc::new(one)).tasks()?;
    let batch = tasks.batch(2, 0, 2, 15)?;
    let (x, y) = (host(batch.task.target.sites.x.as_ref().unwrap()), host(&batch.task.surface));
    for (x, y) in x.iter().zip(&y) {
        // A straight line through every target.
        let (n, mut sums) = (x.len() as f64, [0.0; 5]);
        for (x, y) in x.iter().zip(y) {
            let (x, y) = (x[0], y[0]);
            [x, y, x * x, x * y, y * y].iter().zip(&mut sums).for_each(|(v, s)| *s += v / n);
        }
        let [mx, my, xx, xy, yy] = sums;
        let r = (xy - mx * my).powi(2) / ((xx - mx * mx) * (yy - my * my));
        assert!(r > 0.999, "surfaces follow the covariate with r² = {r}");
    }
    // A recipe without rasters cannot draw.
    let bare = Recipe::parse(&text(TINY, &format!("[covariates]\nterms = {TERMS:?}")))?.tasks()?;
    assert!(bare.batch(1, 0, 2, 10).is_err());
    Ok(())
}

/// Where surveys have rounds too, the kernel that the exact process is told takes time before covariates, and
/// a network learns from both.
#[test]
fn covariates_and_times_go_together() -> Result<()> {
    let table = format!("[covariates]\nterms = {TERMS:?}\nabsent = 0.0");
    let text = text(&format!("{TINY}, time_bias = [\"exponential\", \"scalar\"]"), &table)
        .replace("kind = \"gp\"", "kind = \"gp\", time_scale = 0.5, static_share = 0.2")
        .replace("targets = 6", "targets = 6, times = { continuous = 1.0 }");
    let recipe = Recipe::parse(&text)?.on(lattice()?);
    let batch = recipe.tasks()?.batch(3, 0, 2, 20)?;
    let sites = batch.task.context.sites.rows(0, 1)?;
    let places = host(&sites.joined()?.s).remove(0);
    let (s, t) = (host(&sites.s).remove(0), host(sites.t.as_ref().unwrap()).remove(0));
    let x = host(sites.x.as_ref().unwrap()).remove(0);
    let kernel = batch.rules[0].kernel.as_ref().unwrap();
    let moved = |place: &[f64], d: usize| {
        let mut place = place.to_vec();
        place[d] += 0.5;
        place
    };
    for (i, place) in places.iter().enumerate() {
        assert_eq!(place, &[&s[i][..], &t[i], &x[i]].concat());
        let here = kernel.covariance(place, place);
        // Half a unit of time away, all but the share that stays has faded; what covariates do has not.
        let later = here - kernel.covariance(place, &moved(place, 2));
        assert!(0.05 * kernel.sill() < later && later < 0.8 * kernel.sill(), "{later}");
        assert_ne!(here, kernel.covariance(place, &moved(place, 3)));
    }
    let folder = tempfile::tempdir().unwrap();
    let card =
        train::run(&recipe, &options(&folder.path().join("both.safetensors"), None), |_| {})?;
    assert!(card.exact_gp.is_some_and(|loss| loss.is_finite()));
    Ok(())
}

/// Sites with three covariates, and counts.
fn context(n: usize, rng: &mut Stream) -> Observations {
    let tensor = |v: Vec<f64>, shape: &[usize]| {
        Tensor::from_vec(v, shape, &CPU).unwrap().to_dtype(DType::F32).unwrap()
    };
    let sites = sites(n, rng);
    let k = (0..n).map(|_| rng.below(30) as f64).collect();
    let trials = Some(tensor(vec![30.0; n], &[1, n]));
    Observations::new(sites, tensor(k, &[1, n, 1]), trials).unwrap()
}

fn sites(n: usize, rng: &mut Stream) -> Sites {
    let tensor = |width: usize, rng: &mut Stream| {
        let v = Tensor::from_vec(rng.normals(n * width), (1, n, width), &CPU).unwrap();
        v.to_dtype(DType::F32).unwrap()
    };
    let mut sites = Sites::new((tensor(2, rng) * 0.4).unwrap());
    sites.x = Some(tensor(3, rng));
    sites
}

/// Means at every target, and behind them sds.
fn ask(process: &dyn Process, context: &Observations, targets: &Sites) -> Result<Vec<f64>> {
    let marginals = process.condition(context)?.at(targets)?.marginals(0, Of::Surface)?;
    let (mean, sd): (Vec<f64>, Vec<f64>) = (0..targets.len()).map(|i| marginals.mean_sd(i)).unzip();
    Ok([mean, sd].concat())
}

fn gap(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn picked(x: &Sites, order: &[u32]) -> Sites {
    let index = Tensor::new(order, &CPU).unwrap();
    x.map(|x| Ok(x.index_select(&index, 1)?)).unwrap()
}

/// Every model that reads covariates: they matter, at sites and at targets; the order of sites and what
/// else is asked do not; far values are finite; and other covariates, or none, are refused. Models that
/// read none refuse to be built with some.
#[test]
fn networks_read_covariates_or_refuse_them() -> Result<()> {
    let likelihood = isopleth::likelihood::find("binomial")?;
    let mut readers = 0;
    for entry in MODELS {
        let table: toml::Table =
            format!("kind = '{}'\n{}", entry.name, entry.tiny).parse().unwrap();
        let problem = Problem { covariates: 3, ..Problem::new(2, likelihood) };
        let mut params = Params::new(4, &CPU, DType::F32);
        let built = model::build(&table, problem, &mut params);
        if !entry.name.starts_with("tnp-kr") {
            let error = built.err().expect("no covariates").to_string();
            assert!(error.contains("does not read covariates"), "{}: {error}", entry.name);
            continue;
        }
        readers += 1;
        let model = built?;
        let mut rng = Stream::new(6, "network", 0);
        let (seen, asked) = (context(12, &mut rng), sites(9, &mut rng));
        let whole = ask(&*model, &seen, &asked)?;
        let order: Vec<u32> = rng.permutation(12).into_iter().map(|i| i as u32).collect();
        let index = Tensor::new(&order[..], &CPU)?;
        let turned = Observations {
            sites: picked(&seen.sites, &order),
            y: seen.y.index_select(&index, 1)?,
            ..seen.clone()
        };
        assert!(gap(&whole, &ask(&*model, &turned, &asked)?) < 1e-4, "{}: order", entry.name);
        for (i, mean) in whole[..9].iter().enumerate() {
            let alone = ask(&*model, &seen, &asked.narrow(i, 1)?)?;
            assert!((alone[0] - mean).abs() < 1e-5, "{}: asked alone", entry.name);
        }
        let other = |sites: &Sites, by: f64| -> Result<Sites> {
            let x = (sites.x.as_ref().unwrap() + by)?;
            Ok(Sites { x: Some(x), ..sites.clone() })
        };
        let there = ask(&*model, &seen, &other(&asked, 0.7)?)?;
        let moved = Observations { sites: other(&seen.sites, 0.7)?, ..seen.clone() };
        let here = ask(&*model, &moved, &asked)?;
        assert!(gap(&whole, &there) > 1e-4, "{}: targets' covariates pass unread", entry.name);
        assert!(gap(&whole, &here) > 1e-4, "{}: sites' covariates pass unread", entry.name);
        for far in [1e6, -1e6] {
            let far = ask(&*model, &seen, &other(&asked, far)?)?;
            assert!(far.iter().all(|v| v.is_finite()), "{}: far off", entry.name);
        }
        let none = Sites { x: None, ..asked.clone() };
        let two = Sites { x: Some(asked.x.as_ref().unwrap().narrow(2, 0, 2)?), ..asked.clone() };
        for wrong in [none, two] {
            let error = model.condition(&seen)?.at(&wrong).unwrap_err().to_string();
            assert!(error.contains("covariates of sites and of the model"), "{error}");
        }
    }
    assert_eq!(readers, 4);
    Ok(())
}

fn options(out: &Path, start: Option<&Path>) -> Options {
    Options {
        out: out.to_path_buf(),
        resume: false,
        steps: None,
        stop_at: None,
        seed: 3,
        devices: vec![Device::Cpu],
        drawing: 0,
        machine: "a test".into(),
        start: start.map(Path::to_path_buf),
        until: None,
        threads: None,
    }
}

/// A model that knew no covariates is widened: it begins where it stood, and its card says so. The file
/// holds the rasters, so that the recipe in it draws; a model with covariates is not widened again.
#[test]
fn a_network_starts_from_one_without_covariates() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (bare, wide) = (path("bare.safetensors"), path("wide.safetensors"));
    train::run(&Recipe::parse(&text(TINY, ""))?, &options(&bare, None), |_| {})?;
    // A step of next to no length.
    let still = |recipe: Recipe| -> Result<Recipe> {
        let text = recipe.text().replace("warmup = 2", "warmup = 0\nrate = 1e-12\ndecay = 0.0");
        Ok(Recipe::parse(&text)?.on(lattice()?))
    };
    let card = train::run(&still(recipe("")?)?, &options(&wide, Some(&bare)), |_| {})?;
    let said = card.started_from.unwrap();
    assert!(said.contains("`embed.0.weight` with 3 rows of 0 for covariates"), "{said}");
    assert!(card.exact_gp.is_some(), "the exact process is told what covariates do");
    let (before, after) = (Checkpoint::open(&bare)?, Checkpoint::open(&wide)?);
    let mut rng = Stream::new(7, "widened", 0);
    let (seen, asked) = (context(15, &mut rng), sites(6, &mut rng));
    let one = ask(&*before.process(&CPU)?, &seen, &asked)?;
    let other = ask(&*after.process(&CPU)?, &seen, &asked)?;
    assert!(gap(&one, &other) < 1e-5, "{one:?} became {other:?}");
    assert_eq!(after.covariates().len(), 2);
    assert_eq!(**after.recipe()?.lattice().as_ref().unwrap(), *lattice()?);
    assert!(after.recipe()?.tasks()?.batch(5, 0, 2, 10).is_ok());
    let again =
        train::run(&recipe("")?, &options(&path("again.safetensors"), Some(&wide)), |_| {})?;
    let said = again.started_from.unwrap();
    assert!(!said.starts_with("0 of") && !said[..60].contains("rows of 0"), "{said}");
    Ok(())
}

/// Trained for a moment on surveys in which only a covariate acts, a network has learnt to read it: it does
/// better than the same network that is shown another place's covariates.
#[test]
fn a_network_learns_what_a_covariate_does() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let table =
        format!("[covariates]\nterms = {TERMS:?}\nabsent = 0.0\neffect_sd = 1.5\nbent = 0.0");
    let text = text(&TINY.replace("width = 8,", "width = 16,"), &table)
        .replace(
            "prior = { kind = \"gp\" }",
            "prior = { kind = \"gp\", sill_sd = 0.1, nugget_sd = 0.1 }",
        )
        .replace("steps = 4", "steps = 600\nrate = 6e-3")
        .replace("rows = 4", "rows = 12")
        .replace("validate_every = 2", "validate_every = 600");
    let recipe = Recipe::parse(&text)?.on(lattice()?);
    let out = folder.path().join("learnt.safetensors");
    train::run(&recipe, &options(&out, None), |_| {})?;
    let (model, tasks) = (Checkpoint::open(&out)?.process(&CPU)?, recipe.tasks()?);
    let batch = tasks.batch(99, 0, 40, 25)?;
    let loss = |targets: &Sites| -> Result<f64> {
        let said = model.condition(&batch.task.context)?.at(targets)?;
        let density = said.log_prob(Of::Surface, &batch.task.surface)?.mean_all()?;
        Ok(-f64::from(density.to_scalar::<f32>()?))
    };
    let own = &batch.task.target.sites;
    let x = own.x.as_ref().unwrap();
    let n = x.dims()[0] - 1;
    let other = Tensor::cat(&[&x.narrow(0, 1, n)?, &x.narrow(0, 0, 1)?], 0)?;
    let (right, wrong) = (loss(own)?, loss(&Sites { x: Some(other), ..own.clone() })?);
    assert!(right < wrong - 0.2, "{right} with its own covariates, {wrong} with others'");
    Ok(())
}
