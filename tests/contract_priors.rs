//! Laws over everything in PRIORS, and of the tasks and designs built on it.

use candle_core::Tensor;
use isopleth::{
    Error, Of, Process, Result, Stream,
    baseline::ExactGp,
    kernel::Kernel,
    likelihood,
    prior::{self, Entry, PRIORS, Prior, Surface},
    task::{Batch, Tasks, design::Design},
};

fn table(text: &str) -> toml::Table {
    text.parse().unwrap()
}

fn tiny(entry: &Entry) -> Box<dyn Prior> {
    (entry.build)(&table(entry.tiny)).unwrap()
}

/// Every entry at its tiny size, and the Gaussian process with everything switched on.
fn priors() -> Vec<(String, Box<dyn Prior>)> {
    let mut all: Vec<_> = PRIORS.iter().map(|e| (e.name.to_string(), tiny(e))).collect();
    for kernel in ["matern-1/2", "matern-5/2", "squared-exponential", "periodic"] {
        let text = format!("kind = 'gp'\nkernels = {{ '{kernel}' = 1 }}\nsum = 0\nproduct = 0");
        all.push((kernel.into(), prior::build(&table(&text)).unwrap()));
    }
    for part in ["sum", "product", "anisotropic", "trend", "zones"] {
        let text = format!("kind = 'gp'\nnugget_relative = true\n{part} = 1.0");
        all.push((part.into(), prior::build(&table(&text)).unwrap()));
    }
    all
}

/// Sites at several lags from the first, in several directions.
const PLACES: [[f64; 2]; 5] = [[0.1, -0.2], [0.13, -0.2], [0.1, 0.0], [0.5, 0.2], [-0.9, -0.4]];

/// A recipe with these tables; the prior is the tiny Gaussian process unless it says otherwise.
fn tasks(text: &str) -> Tasks {
    let mut recipe = table(text);
    if !recipe.contains_key("prior") {
        let mut prior = table(PRIORS[0].tiny);
        prior.insert("kind".into(), PRIORS[0].name.into());
        recipe.insert("prior".into(), prior.into());
    }
    Tasks::new(&recipe).unwrap()
}

#[test]
fn a_seed_is_a_draw() -> Result<()> {
    for (name, prior) in priors() {
        let under = |seed| -> Result<Vec<Surface>> {
            let drawn = prior.surfaces(&PLACES, 2, &mut Stream::new(seed, "law", 0))?;
            Ok(drawn.into_iter().map(|(_, surface)| surface).collect())
        };
        let (a, b) = (under(7)?, under(8)?);
        assert_eq!(a, under(7)?, "{name}: one seed, two draws");
        assert_ne!(a, b, "{name}: two seeds, one draw");
        assert_ne!(a[0], a[1], "{name}: surfaces drawn together are one surface");
        let rule = |seed| format!("{:?}", prior.rule(&mut Stream::new(seed, "law", 0)));
        assert_eq!(rule(7), rule(7), "{name}: one seed, two rules");
        // A rule without a kernel says of the surface no more than its noise.
        if prior.rule(&mut Stream::new(7, "law", 0)).kernel.is_some() {
            assert_ne!(rule(7), rule(8), "{name}: two seeds, one rule");
        }
    }
    Ok(())
}

/// A sum of terms with mean 0 and known variance, judged against its own Monte-Carlo error.
#[derive(Default)]
struct Balance {
    sum: f64,
    variance: f64,
}

impl Balance {
    fn add(&mut self, term: f64, variance: f64) {
        self.sum += term;
        self.variance += variance;
    }
    /// In standard errors. About fifty are tested with a fixed seed, so 4 is far out.
    fn assert(&self, name: &str, what: &str) {
        if self.variance == 0.0 {
            return; // never added to
        }
        let z = self.sum / self.variance.sqrt();
        assert!(z.abs() < 4.0, "{name}: the {what} is {z:.1} standard errors off");
    }
}

/// Every surface comes with the rule it was drawn under. Standardised by that rule, surfaces have
/// mean 0, variance 1 and the rule's correlation at every lag, and the noise has the rule's nugget.
#[test]
fn moments_match_the_rule() -> Result<()> {
    const DRAWS: u64 = 3000;
    for (name, prior) in priors() {
        let (mut mean, mut variance) = (Balance::default(), Balance::default());
        let (mut nugget, mut apart) = (Balance::default(), Balance::default());
        let mut lags: Vec<Balance> = PLACES.iter().map(|_| Balance::default()).collect();
        for draw in 0..DRAWS {
            // The second of two surfaces that share a factor.
            let mut drawn = prior.surfaces(&PLACES, 2, &mut Stream::new(3, "moments", draw))?;
            let (rule, surface) = drawn.swap_remove(1);
            assert!(rule.nugget >= 0.0 && rule.mean.is_finite());
            // What no Gaussian process rules has no moments to compare with, but for its noise.
            let sill = rule.kernel.as_ref().map_or(1.0, |kernel| kernel.sill());
            assert!(sill > 0.0);
            let z: Vec<f64> =
                surface.latent.iter().map(|v| (v - rule.mean) / sill.sqrt()).collect();
            if let Some(kernel) = &rule.kernel {
                mean.add(z[0], 1.0);
                variance.add(z[0] * z[0] - 1.0, 2.0);
                for (lag, (place, other)) in lags.iter_mut().zip(PLACES.iter().zip(&z)) {
                    let rho = kernel.covariance(&PLACES[0], place) / kernel.sill();
                    lag.add(z[0] * other - rho, 1.0 + rho * rho);
                }
            }
            for (latent, noisy) in surface.latent.iter().zip(&surface.noisy) {
                if rule.nugget == 0.0 {
                    assert_eq!(latent, noisy, "{name}: noise without a nugget");
                    continue;
                }
                let noise = (noisy - latent) / rule.nugget.sqrt();
                nugget.add(noise * noise - 1.0, 2.0);
            }
            if rule.nugget > 0.0 {
                // Independent of the surface and from site to site.
                let noise = |i: usize| (surface.noisy[i] - surface.latent[i]) / rule.nugget.sqrt();
                // The surface as it is: without a kernel nobody knows its variance beforehand.
                apart.add(noise(0) * z[0], if rule.kernel.is_some() { 1.0 } else { z[0] * z[0] });
                apart.add(noise(0) * noise(1), 1.0);
            }
        }
        mean.assert(&name, "mean");
        variance.assert(&name, "variance");
        nugget.assert(&name, "nugget");
        apart.assert(&name, "independence of the noise");
        for (lag, place) in lags.iter().zip(&PLACES) {
            lag.assert(&name, &format!("covariance of {:?} with {place:?}", PLACES[0]));
        }
    }
    Ok(())
}

/// Standard deviations in the recipe are variances in the rule, and a sum or product keeps the sill.
#[test]
fn the_rule_is_the_recipe_s() {
    for more in ["sum = 0.0", "sum = 1.0", "sum = 0.0\nproduct = 1.0", "nugget_relative = true"] {
        let text = format!(
            "kind = 'gp'\nsill_sd = 1.3\nnugget_sd = 0.4\nmean = -0.5\nnugget_absent = 0.0\n{more}"
        );
        let rule = prior::build(&table(&text)).unwrap().rule(&mut Stream::new(1, "rule", 0));
        let nugget = if more.contains("relative") { (0.4f64 * 1.3).powi(2) } else { 0.16 };
        let sill = rule.kernel.as_ref().unwrap().sill();
        for (seen, meant) in [(sill, 1.69), (rule.nugget, nugget), (rule.mean, -0.5)] {
            assert!((seen - meant).abs() < 1e-12, "{more}: {seen} and not {meant}");
        }
    }
}

fn values(x: &Tensor) -> Vec<f64> {
    let x = x.flatten_all().unwrap().to_dtype(candle_core::DType::F64).unwrap();
    x.to_vec1().unwrap()
}

/// As a map does it: the context's box becomes [−1, 1] and its values are standardised; counts stay.
#[test]
fn a_task_is_framed_by_its_context() -> Result<()> {
    for (likelihood, line) in [("gaussian", false), ("binomial", false), ("gaussian", true)] {
        let tasks = tasks(&format!(
            "task = {{ likelihood = '{likelihood}' }}\ndesign = {{ targets = 9, line = {line} }}"
        ));
        assert_eq!(tasks.dim(), if line { 1 } else { 2 });
        for index in 0..40 {
            let context = 3 + index as usize;
            let batch = tasks.batch(5, index, 3, context)?;
            let task = &batch.task;
            assert_eq!(task.context.sites.s.dims(), [3, context, tasks.dim()]);
            assert_eq!(task.target.sites.s.dims(), [3, 9, tasks.dim()]);
            assert_eq!([task.surface.dims(), task.noisy.dims()], [[3, 9, 1]; 2]);
            for (row, sites) in task.context.sites.host()?.iter().enumerate() {
                let side = |d: usize| {
                    let along = || sites.iter().map(|s| s[d]);
                    let (low, high) = (along().fold(9.0, f64::min), along().fold(-9.0, f64::max));
                    assert!(
                        (low + high).abs() < 1e-5,
                        "{likelihood}: [{low}, {high}] is off centre"
                    );
                    high
                };
                let half = (0..tasks.dim()).map(side).fold(0.0, f64::max);
                assert!((half - 1.0).abs() < 1e-5, "{likelihood}: the box reaches {half}");
                let y = values(&task.context.y.get(row)?);
                let (_, _, mean, sd) = batch.frames[row];
                if likelihood == "gaussian" {
                    let (m, s) = isopleth::sites::mean_sd(&y);
                    assert!(m.abs() < 1e-4 && (s - 1.0).abs() < 1e-4, "mean {m} and sd {s}");
                } else {
                    assert_eq!((mean, sd), (0.0, 1.0));
                    let trials = values(&task.context.trials.as_ref().unwrap().get(row)?);
                    for (k, n) in y.iter().zip(trials) {
                        assert!((1.0..=1000.0).contains(&n) && (0.0..=n).contains(k));
                        assert_eq!([k.fract(), n.fract()], [0.0; 2]);
                    }
                }
            }
        }
    }
    Ok(())
}

/// The published benchmarks' convention: coordinates and values untouched.
#[test]
fn a_raw_task_is_as_drawn() -> Result<()> {
    let raw = tasks("task = { likelihood = 'gaussian', frame = 'raw', share = 1 }");
    let mut rng = Stream::new(4, "task", 6);
    let draw = raw.draws(5, 1, &mut rng)?.swap_remove(0);
    let batch = raw.batch(4, 6, 1, 5)?;
    for (site, xy) in batch.task.context.sites.host()?[0].iter().zip(&draw.xy) {
        assert!((site[0] - xy[0]).abs() + (site[1] - xy[1]).abs() < 1e-6);
    }
    for (seen, drawn) in values(&batch.task.context.y).iter().zip(&draw.y) {
        assert!((seen - drawn).abs() < 1e-6);
    }
    Ok(())
}

/// The exact Gaussian process that is told the truth about row `row` of a batch.
fn told(batch: &Batch, row: usize, likelihood: &str) -> Result<ExactGp> {
    let rule = &batch.rules[row];
    let kernel: Box<dyn Kernel> = Box::new(rule.known_kernel().unwrap());
    ExactGp::new(kernel, rule.nugget, rule.mean, likelihood::find(likelihood)?)
}

/// A batch carries its rules in model units. The process they describe must predict what the process
/// in region units and raw values predicts, to f32 and after undoing the frame. Zones have a place of
/// their own: for them the frame's centre matters too.
#[test]
fn the_frame_moves_no_prediction() -> Result<()> {
    for (likelihood, line, zones, times) in [
        ("gaussian", false, 0.0, ""),
        ("binomial", false, 0.0, ""),
        ("gaussian", true, 0.0, ""),
        ("gaussian", false, 1.0, ""),
        ("gaussian", true, 1.0, ""),
        ("gaussian", false, 1.0, ", times = {}"),
        ("binomial", false, 0.0, ", times = { continuous = 1.0 }"),
    ] {
        let task = |frame: &str| {
            tasks(&format!(
                "design = {{ targets = 12, line = {line}{times} }}\n\
                 task = {{ likelihood = '{likelihood}', frame = '{frame}' }}\n\
                 prior = {{ kind = 'gp', nugget_sd = 0.4, nugget_absent = 0.0, zones = {zones} }}"
            ))
        };
        for index in 0..5 {
            let (framed, raw) =
                (task("context").batch(2, index, 2, 15)?, task("raw").batch(2, index, 2, 15)?);
            for row in 0..2 {
                let ask = |batch: &Batch, of: Of| {
                    let one = batch.rows(row, 1)?.task;
                    let gp = told(batch, row, likelihood)?;
                    gp.condition(&one.context)?.at(&one.target.sites)?.marginals(0, of)
                };
                let (_, _, mean, sd) = framed.frames[row];
                for of in [Of::Surface, Of::Observation] {
                    let (a, b) = (ask(&framed, of)?.rescale(mean, sd), ask(&raw, of)?);
                    for (x, y) in a.mean.iter().chain(&a.sd).zip(b.mean.iter().chain(&b.sd)) {
                        let off = (x - y).abs();
                        assert!(
                            off < 1e-4 * (1.0 + y.abs()),
                            "{likelihood}, zones {zones}: {x} and not {y}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

/// Told the truth, the exact Gaussian process is calibrated by definition: on tasks as the network
/// meets them its 95 % intervals hold 95 % of the surfaces and of the noisy values. A unit that is
/// wrong anywhere between prior and batch shows here.
#[test]
fn the_yardstick_is_calibrated_on_tasks() -> Result<()> {
    const TASKS: usize = 300;
    const TARGETS: usize = 16;
    for times in ["", ", times = {}"] {
        let tasks = tasks(&format!(
            "task = {{ likelihood = 'gaussian', share = 1 }}\ndesign = {{ targets = {TARGETS}{times} }}"
        ));
        let mut inside = [[0.0; 2]; 2];
        let mut squares = [0.0; 2];
        for index in 0..TASKS {
            let batch = tasks.batch(9, index as u64, 1, 5 + index % 40)?;
            let at = told(&batch, 0, "gaussian")?;
            let predictive = at.condition(&batch.task.context)?.at(&batch.task.target.sites)?;
            for (o, of) in [Of::Surface, Of::Observation].into_iter().enumerate() {
                let truth = values(if o == 0 { &batch.task.surface } else { &batch.task.noisy });
                let m = predictive.marginals(0, of)?;
                for (i, y) in truth.iter().enumerate() {
                    let z = ((y - m.mean[i]) / m.sd[i]).abs();
                    squares[o] += z * z;
                    inside[o][0] += f64::from(z < 0.674_490);
                    inside[o][1] += f64::from(z < 1.959_964);
                }
            }
        }
        let n = (TASKS * TARGETS) as f64;
        // Targets of one task err together, so 4,800 of them are worth some 1,000.
        for (what, [half, most], square) in
            [("surface", inside[0], squares[0]), ("observation", inside[1], squares[1])]
        {
            let (half, most, square) = (half / n, most / n, square / n);
            assert!((most - 0.95).abs() < 0.02, "{what}: the 95 % interval holds {most}");
            assert!((half - 0.5).abs() < 0.05, "{what}: the 50 % interval holds {half}");
            assert!((square - 1.0).abs() < 0.1, "{what}: mean squared z is {square}");
        }
    }
    Ok(())
}

#[test]
fn layouts_hold_what_was_asked_for() {
    let mut rng = Stream::new(6, "layout", 0);
    for _ in 0..400 {
        let (near, anywhere) = (0.1 * rng.below(6) as f64, 0.1 * rng.below(6) as f64);
        let design = Design {
            targets: 1 + rng.below(30),
            near,
            anywhere,
            line: rng.unit() < 0.3,
            gridded: 0.4,
            ..Design::default()
        };
        design.check().unwrap();
        let context = 2 + rng.below(60);
        let layout = design.layout(context, &mut rng);
        assert_eq!(layout.context, context);
        assert_eq!(layout.xy.len(), context + design.targets, "near {near}, anywhere {anywhere}");
        for [x, y] in &layout.xy {
            assert!(x.is_finite() && y.is_finite());
            // Clusters have tails, but the region is [−1, 1].
            assert!(x.abs() < 4.0 && y.abs() < 4.0, "({x}, {y}) is far outside");
            assert!(!design.line || *y == 0.0, "({x}, {y}) is off the line");
        }
    }
}

/// The benchmarks' design: a pool of which the context is a part, asked again as a whole, and a grid.
#[test]
fn a_pool_is_asked_whole_and_then_a_grid() -> Result<()> {
    for (line, grid, asked) in [(true, 7, 7), (false, 4, 16), (true, 0, 0)] {
        let text = format!(
            "design = {{ line = {line}, pool = 20, grid = {grid}, half_side = 2.0, aspect = 1.0, clustered = 0.0, \
             context = [{{ sites = [3, 19], uniform = true, weight = 1 }}] }}\n\
             task = {{ likelihood = 'gaussian', frame = 'raw' }}"
        );
        let tasks = tasks(&text);
        let layout = tasks.design().layout(6, &mut Stream::new(1, "pool", 0));
        assert_eq!((layout.context, layout.first_target, layout.xy.len()), (6, 0, 20 + asked));
        assert!(layout.xy.iter().flatten().all(|v| v.abs() <= 2.0), "outside half_side");
        assert!(!line || layout.xy.iter().all(|s| s[1] == 0.0), "off the line");
        if grid > 0 {
            assert_eq!(layout.xy[20][0], -2.0, "the grid starts at the edge");
            assert!((layout.xy[20 + asked - 1][0] - 2.0).abs() < 1e-12, "and ends at the other");
        }
        let task = tasks.batch(1, 1, 2, 6)?.task;
        assert_eq!(task.target.sites.len(), 20 + asked);
        let again = task.target.sites.narrow(0, 6)?;
        assert_eq!(task.context.sites.host()?, again.host()?, "the context is asked too");
        assert_eq!(values(&task.context.y), values(&task.noisy.narrow(1, 0, 6)?));
    }
    let small = table("prior = { kind = 'gp' }\ndesign = { pool = 20 }");
    assert!(Tasks::new(&small).is_err(), "a context larger than its pool");
    Ok(())
}

#[test]
fn the_same_seed_lays_the_same_sites() {
    let design = Design::default();
    let under = |seed| design.layout(20, &mut Stream::new(seed, "layout", 0));
    assert_eq!(under(1), under(1));
    assert_ne!(under(1), under(2));
}

/// Held-out blocks leave a hole: targets are farther from the context than when held out at random.
#[test]
fn a_held_block_is_a_hole() {
    let apart = |held_block: f64| {
        let design =
            Design { held_block, near: 0.0, anywhere: 0.0, targets: 20, ..Design::default() };
        let mut total = 0.0;
        for index in 0..60 {
            let layout = design.layout(60, &mut Stream::new(1, "hole", index));
            let (seen, asked) = layout.xy.split_at(60);
            for a in asked {
                let to = |b: &[f64; 2]| (a[0] - b[0]).hypot(a[1] - b[1]);
                total += seen.iter().map(to).fold(f64::INFINITY, f64::min);
            }
        }
        total
    };
    assert!(apart(1.0) > 1.5 * apart(0.0), "{} and {}", apart(1.0), apart(0.0));
}

#[test]
fn context_sizes_lie_in_their_ranges() {
    let text =
        "design = { context = [{ sites = [3, 9], weight = 1 }, { sites = [40, 40], weight = 3 }] }";
    let tasks = tasks(text);
    let mut rng = Stream::new(2, "size", 0);
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..8000 {
        *counts.entry(tasks.design().size(&mut rng)).or_insert(0) += 1;
    }
    let seen: Vec<usize> = counts.keys().copied().collect();
    assert_eq!(seen, [3, 4, 5, 6, 7, 8, 9, 40], "both ends are drawn, and nothing beyond");
    // 8000 × ¾, with a standard deviation of 39.
    assert!((counts[&40] - 6000i32).abs() < 160, "{} of 8000 and not 6000", counts[&40]);
    // Log-uniform over [3, 10): 3 has ln(4/3)/ln(10/3) of the rest, 478 with an sd of 20.
    assert!((counts[&3] - 478i32).abs() < 90, "{} of 2000 and not 478", counts[&3]);
}

/// A law that makes no sense is refused where it is read, and the error names it.
#[test]
fn bad_laws_are_refused() {
    let refused = |recipe: String, name: &str| {
        let mut recipe = recipe;
        if !recipe.contains("prior") {
            recipe += "\nprior = { kind = 'gp' }";
        }
        let Err(error) = Tasks::new(&table(&recipe)) else { panic!("accepted: {recipe}") };
        let Error::Input(_) = error else { panic!("{recipe}: {error:?}") };
        let said = format!("{error} {:?}", error.facts());
        assert!(said.contains(name), "`{name}` is not named in: {said}");
        assert!(error.help().is_some(), "no help: {said}");
    };
    for law in [
        "0.0",
        "-1",
        "inf",
        "nan",
        "{ uniform = [0.5, 0.1] }",
        "{ uniform = [0.5, 0.5] }",
        "{ uniform = [-0.1, 0.1] }",
        "{ log-uniform = [0.0, 1.0] }",
        "{ log-uniform = [2.0, 1.0] }",
        "{ normal = [1.0, 0.1] }",
        "{ beta = [0.0, 1.0] }",
        "{ uniform = [0.1, inf] }",
        "{ uniforn = [0.1, 0.2] }",
        "{ uniform = [0.1] }",
        "'wide'",
    ] {
        for name in ["length_scale", "period", "sill_sd", "nugget_sd", "anisotropy"] {
            if (name, law) == ("nugget_sd", "0.0") {
                continue; // no nugget at all is a fair law
            }
            refused(format!("prior = {{ kind = 'gp', {name} = {law} }}"), name);
        }
        refused(format!("design = {{ cluster_radius = {law} }}"), "cluster_radius");
        refused(format!("trials = {{ base = {law} }}"), "base");
    }
    for law in ["{ normal = [0.0, -1.0] }", "{ uniform = [1.0, -1.0] }", "nan"] {
        refused(format!("prior = {{ kind = 'gp', mean = {law} }}"), "mean");
    }
    for share in ["-0.1", "1.1", "nan"] {
        for name in ["nugget_absent", "sum", "product", "anisotropic"] {
            refused(format!("prior = {{ kind = 'gp', {name} = {share} }}"), name);
        }
        for name in ["clustered", "gridded", "held_block", "near", "anywhere"] {
            refused(format!("design = {{ {name} = {share} }}"), name);
        }
    }
    for kernels in ["{}", "{ 'matern-1/2' = 0 }", "{ 'matern-1/2' = -1 }", "{ 'matern-1/2' = nan }"]
    {
        refused(format!("prior = {{ kind = 'gp', kernels = {kernels} }}"), "kernel");
    }
    for design in [
        "context = []",
        "context = [{ sites = [9, 3], weight = 1 }]",
        "context = [{ sites = [0, 3], weight = 1 }]",
        "context = [{ sites = [3, 9], weight = 0 }]",
        "context = [{ sites = [3, 9], weight = -1 }]",
        "targets = 0",
    ] {
        refused(format!("design = {{ {design} }}"), "context");
    }
    refused("design = { clustered = 0.7, gridded = 0.7 }".into(), "clustered + gridded");
    refused("design = { near = 0.7, anywhere = 0.7 }".into(), "near + anywhere");
    refused("design = { neer = 0.1 }".into(), "neer");
    refused("prior = { kind = 'gp', sill = 1.0 }".into(), "sill");
    refused("prior = { sum = 0.1 }".into(), "prior");
    let unknown = Tasks::new(&table("prior = { kind = 'gp', kernels = { 'matern-3/4' = 1 } }"));
    assert!(matches!(unknown.err(), Some(Error::Unknown { kind: "kernel", .. })));
}

/// A recipe may move the context before it is recorded: same surveys, other places; never the targets.
#[test]
fn a_displaced_design_moves_the_context_alone() {
    let tasks = |more: &str| {
        let recipe = format!(
            "prior = {{ kind = 'gp' }}\n[design]\ntargets = 9\n{more}\n[task]\nlikelihood = \"binomial\""
        );
        Tasks::new(&recipe.parse().unwrap())
    };
    let draw = |more: &str| {
        let mut rng = Stream::new(2, "sample", 0);
        tasks(more).unwrap().draws(20, 1, &mut rng).unwrap().remove(0)
    };
    let (plain, moved) = (draw(""), draw("displacement = 0.1"));
    assert_eq!((&plain.y, &plain.latent), (&moved.y, &moved.latent));
    assert_eq!(plain.xy[20..], moved.xy[20..]);
    let far: Vec<f64> = (0..20)
        .map(|i| (plain.xy[i][0] - moved.xy[i][0]).hypot(plain.xy[i][1] - moved.xy[i][1]))
        .collect();
    assert!(far.iter().all(|far| (1e-9..=0.1).contains(far)), "{far:?}");
    assert!(far.iter().any(|far| *far > 0.05), "{far:?}");
    assert!(tasks("displacement = -1.0").is_err());
    assert!(tasks("displacement = 0.1\npool = 30\ngrid = 0").is_err());
}

/// Surfaces that change have the rule's correlation over places and times, and the rule's sill.
#[test]
fn moments_in_time_match_the_rule() -> Result<()> {
    let text =
        "kind = 'gp'\nstatic_share = { uniform = [0, 1] }\ntime_scale = { log-uniform = [0.2, 3] }";
    let prior = prior::build(&table(text))?;
    let times = [-1.0, -0.5, 0.0, 1.0, 3.0];
    let mut lags: Vec<Balance> = PLACES.iter().map(|_| Balance::default()).collect();
    for draw in 0..3000 {
        let mut rng = Stream::new(3, "moments in time", draw);
        let (rule, surface) = prior.surfaces_in_time(&PLACES, &times, 1, &mut rng)?.swap_remove(0);
        let kernel = rule.kernel.unwrap();
        assert!(kernel.change().is_some());
        let z: Vec<f64> =
            surface.latent.iter().map(|v| (v - rule.mean) / kernel.sill().sqrt()).collect();
        let at = |i: usize| [PLACES[i][0], PLACES[i][1], times[i]];
        for (i, lag) in lags.iter_mut().enumerate() {
            let rho = kernel.covariance(&at(0), &at(i)) / kernel.sill();
            lag.add(z[0] * z[i] - rho, 1.0 + rho * rho);
        }
    }
    lags.iter().for_each(|lag| lag.assert("gp", "correlation in space and time"));
    Ok(())
}

/// Visits come in rounds that span −1 to 1; forecasts are asked about what lies after all visits, and
/// places that are visited again are the same in every round.
#[test]
fn visits_are_in_rounds() -> Result<()> {
    let design = |times: &str| {
        let text = format!("design = {{ targets = 20, times = {{ {times} }} }}");
        tasks(&text).design().clone()
    };
    let draw = |of: &Design, i: u64| of.layout(40, &mut Stream::new(4, "visits", i));
    let even = design("rounds = 5, continuous = 0.0, uneven = 0.0, ahead = 0.0, revisited = 0.0");
    let ahead = design("rounds = 5, continuous = 0.0, ahead = 1.0, revisited = 1.0");
    let spread = design("continuous = 1.0");
    for i in 0..50 {
        let layout = draw(&even, i);
        assert_eq!(layout.t.len(), layout.xy.len());
        let seen = &layout.t[..layout.context];
        assert!(seen.iter().all(|t| [-1.0, -0.5, 0.0, 0.5, 1.0].contains(t)), "{seen:?}");
        let layout = draw(&ahead, i);
        let (seen, asked) = layout.t.split_at(layout.context);
        let last = seen.iter().copied().fold(f64::MIN, f64::max);
        assert!(asked.iter().all(|t| *t > last && *t == asked[0]), "{last} {asked:?}");
        // 40 sites over four rounds: ten places, each visited in all of them.
        for k in 10..40 {
            assert_eq!(layout.xy[k], layout.xy[k % 10]);
            assert_ne!(layout.t[k], layout.t[k % 10]);
        }
        let layout = draw(&spread, i);
        let mut times = layout.t[..layout.context].to_vec();
        times.sort_by(f64::total_cmp);
        times.dedup();
        assert_eq!(times.len(), 40, "a time of its own each");
    }
    Ok(())
}

/// What does not go together is said, with what to do.
#[test]
fn times_and_priors_that_know_none_are_refused() {
    let error = |text: &str| Tasks::new(&table(text)).map(|t| t.batch(1, 0, 1, 5).map(|_| ()));
    let sawtooth = error("design = { times = {} }\nprior = { kind = 'sawtooth' }").unwrap();
    assert!(sawtooth.unwrap_err().help().unwrap().contains("gp"));
    for (text, words) in [
        ("design = { times = {}, line = true }\nprior = { kind = 'gp' }", "line"),
        ("prior = { kind = 'gp', static_share = 1.5 }", "share"),
        ("prior = { kind = 'gp', static_share = { normal = [0.5, 1] } }", "share"),
        ("design = { times = { ahead = 2.0 } }\nprior = { kind = 'gp' }", "ahead"),
    ] {
        let Err(error) = error(text) else { panic!("{text}") };
        let all = format!("{error} {}", error.help().unwrap());
        assert!(all.contains(words), "{text}: {all}");
    }
}
