//! Laws of benchmarks: every task and model table is sound, the true process scores what others
//! computed for it, and a model that is told the answer is found out.

use candle_core::Tensor;

use super::*;
use crate::{Of, Predictive, Sites, process::Posterior, sites::Observations};

#[test]
fn every_model_trains_on_every_task_by_its_own_name() -> Result<()> {
    let models = models()?;
    for task in TASKS {
        let definition = Definition::of(task)?;
        assert_eq!(task.about(), definition.about, "{}: its first line is `about`", task.name);
        assert!(!definition.evaluation.is_empty(), "{}", task.name);
        for evaluation in &definition.evaluation {
            tasks_of(&definition, evaluation)?;
        }
        for (name, model) in &models {
            let recipe = definition.recipe(task.name, name, model, Some(10))?;
            let settings: train::Settings = recipe.settings("train")?;
            settings.check()?;
            assert_eq!(settings.steps, 10);
        }
    }
    Ok(())
}

#[test]
fn every_model_table_builds_a_model_and_every_model_has_a_table() -> Result<()> {
    let definition = Definition::of(&TASKS[0])?;
    let mut kinds = Vec::new();
    for (name, model) in models()? {
        let recipe = definition.recipe("gp-a", &name, &model, None)?;
        let tasks = recipe.tasks()?;
        let problem = crate::model::Problem::new(tasks.dim(), tasks.likelihood());
        let mut params =
            crate::model::params::Params::new(1, &Device::Cpu, candle_core::DType::F32);
        crate::model::build(recipe.table("model")?, problem, &mut params)
            .unwrap_or_else(|e| panic!("{name}: {e}\n{:?}", e.facts()));
        kinds.push(recipe.table("model")?["kind"].as_str().unwrap_or_default().to_string());
    }
    for entry in crate::model::MODELS {
        // The dense twin of tnp-kr computes the same; pictures on a grid are no task here.
        let apart = ["tnp-kr-full", "convcnp-grid"].contains(&entry.name);
        let known = apart || kinds.iter().any(|k| k == entry.name);
        assert!(known, "{} has no table in models.toml", entry.name);
    }
    Ok(())
}

fn drawn(task: &str, count: usize, floors: &[f64]) -> Result<Vec<(Definition, String, Fixed)>> {
    let task = TASKS.iter().find(|t| t.name == task).expect("a task");
    let definition = Definition::of(task)?;
    let fix = |evaluation: &Evaluation| {
        let tasks = tasks_of(&definition, evaluation)?;
        let fixed = Fixed::new(&tasks, definition.reward()?, count, floors)?;
        Ok((definition.clone(), evaluation.name.clone(), fixed))
    };
    definition.evaluation.iter().map(fix).collect()
}

/// The reference computed these with a program of its own.
#[test]
fn the_true_process_scores_what_the_reference_says() -> Result<()> {
    for task in [
        "gp-a",
        "gp-b-eq",
        "gp-b-noisy-mixture",
        "gp-c-eq",
        "gp-c-weakly-periodic",
        "gp-r-eq",
        "gp-d-periodic",
        "tnp-kr-matern",
    ] {
        for (definition, name, fixed) in drawn(task, 400, &[0.1])? {
            let own = |value: &dyn Fn(usize) -> f64| table::mean(&fixed, &|_| true, value);
            let floored = fixed.ceiling(0.1);
            for ceiling in definition.ceilings.iter().filter(|c| c.evaluation == name) {
                let exact = |i: usize| fixed.exact[i].as_ref().expect("a Gaussian process");
                let found = match ceiling.score.as_str() {
                    "pointwise" => own(&|i| exact(i).pointwise),
                    "joint" => own(&|i| exact(i).joint),
                    "floored" => own(&|i| floored[i]),
                    _ => continue,
                };
                let error = found.error.hypot(ceiling.error);
                let off = (found.mean - ceiling.value) / error;
                assert!(
                    off.abs() < 4.0 && error < 0.2,
                    "{task} {name} {}: {found:?}, the reference {ceiling:?}",
                    ceiling.score
                );
            }
        }
    }
    Ok(())
}

/// Says the truth of whatever task it is asked, give or take `sd`; `shift` moves it away.
struct Told {
    tasks: Vec<(Tensor, Tensor)>,
    sd: f64,
    shift: f64,
}

impl Process for Told {
    fn condition<'a>(&'a self, _: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(Telling(self)))
    }
}

struct Telling<'a>(&'a Told);

impl Posterior for Telling<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let asked = |s: &Tensor| -> Result<bool> {
            let same = s.dims() == targets.s.dims();
            Ok(same && (s - &targets.s)?.abs()?.max_all()?.to_scalar::<f32>()? == 0.0)
        };
        for (s, y) in &self.0.tasks {
            if asked(s)? {
                let mean = (y + self.0.shift)?;
                let sd = (mean.ones_like()? * self.0.sd)?;
                return Predictive::gaussian(crate::Link::Identity, mean, sd.clone(), sd);
            }
        }
        Err(Error::input("another task"))
    }
}

#[test]
fn a_model_that_is_told_the_answer_is_found_out() -> Result<()> {
    let (_, name, fixed) = drawn("gp-a", 64, &[0.1])?.swap_remove(0);
    let told = |sd: f64, shift: f64| Told { tasks: fixed.answers(), sd, shift };
    let entrant = |model: &Told, floor: f64| -> Result<Entrant> {
        let scores = vec![fixed.meet(model)?];
        let card = checkpoint_card();
        let trained =
            Trained { card, steps: 1, measured: Vec::new(), scores, agreement: vec![None] };
        Ok(Entrant { name: "told".into(), floor, seeds: vec![trained] })
    };
    let found = |model: &Told, floor: f64| -> Result<usize> {
        let again = drawn("gp-a", 64, &[0.1])?.swap_remove(0).2;
        let drawn = Drawn { name: name.clone(), fixed: again, integrated: None };
        Ok(leaks(&[drawn], &[entrant(model, floor)?]).len())
    };
    assert_eq!(found(&told(0.01, 0.0), 0.0)?, 1, "sharp and right");
    // With a floor the true process itself says less, and so must a model with that floor.
    assert_eq!(found(&told(0.1, 0.0), 0.1)?, 1, "right, as sharp as its floor lets it be");
    assert_eq!(found(&told(0.1, 0.3), 0.0)?, 0, "wrong by three of its sds");
    Ok(())
}

fn checkpoint_card() -> Card {
    serde_json::from_value(serde_json::json!({
        "format": 1, "isopleth": "0", "name": "told", "predicts": "", "recipe": "", "parameters": 0,
        "seed": 1, "steps": 1, "best_step": 1, "tasks": 1, "started_from": null,
        "validation": null, "exact_gp": null, "seconds": 0.0, "machine": "", "date": "", "scores": {},
    }))
    .expect("a card")
}

/// Sites and truths of every batch.
impl Fixed {
    fn answers(&self) -> Vec<(Tensor, Tensor)> {
        self.tasks().map(|task| (task.target.sites.s.clone(), task.noisy.clone())).collect()
    }
}

#[test]
fn scores_are_those_of_the_normal_law() {
    let marginals = crate::Marginals {
        link: crate::Link::Identity,
        of: Of::Observation,
        components: 1,
        weight: vec![1.0; 2],
        mean: vec![1.0, 1.0],
        sd: vec![2.0, 2.0],
    };
    // scipy.stats.norm(1, 2).logpdf([2, -4]) = -1.737085713764618, -4.737085713764618
    let scores = score::pointwise(&marginals, &[2.0, -4.0]);
    assert!((scores.pointwise + 3.237_085_713_764_618).abs() < 1e-12);
    assert_eq!(scores.mse, 13.0);
    // Half a sd off is inside the central 40 % (z = 0.524), and 2.5 are outside of 95 % (z = 1.96).
    let inside: Vec<f64> = scores.inside.to_vec();
    assert_eq!((inside[6], inside[7], inside[18]), (0.0, 0.5, 0.5));
    let mean = Mean::of([(0, 1.0), (0, 3.0), (1, 5.0), (1, 7.0)]);
    // Two clusters with sums −4 and 4 about the mean 4: √(2 · 32) / 4.
    assert_eq!((mean.mean, mean.error), (4.0, 2.0));
}
