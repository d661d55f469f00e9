//! A shrunk `examples/trust_power.rs`: the model's own surveys pass, and wrong ones do not.

use isopleth::{
    Link, Result, Stream,
    checkpoint::Checkpoint,
    train::trust::{Context, Judge},
};

/// Contexts of 40 sites from the recipe of `model`, each changed by `spoil`; how many were found odd.
fn found(model: &str, surveys: u64, spoil: impl Fn(&mut Context, &mut Stream)) -> Result<usize> {
    let checkpoint = Checkpoint::resolve(model)?;
    let judge = Judge::of(&checkpoint)?.expect("a model of surveys on the plane");
    let tasks = checkpoint.recipe()?.tasks()?;
    let mut odd = 0;
    for i in 0..surveys {
        let batch = tasks.batch(4711, i, 1, 40)?;
        let mut context = Context::of(&batch.task.context, 0)?;
        spoil(&mut context, &mut Stream::new(4711, "spoil", i));
        let verdict = judge.judge(&context)?;
        assert_eq!((verdict.sites, verdict.judged), (40, 40));
        odd += usize::from(!verdict.findings.is_empty());
        // A group finds something if and only if it is as rare as it says.
        for group in &verdict.groups {
            let lines = group.lines.iter().filter(|l| l.found).count();
            assert_eq!(lines > 0, group.p <= group.level, "{group:?}");
        }
    }
    Ok(odd)
}

/// 5 % of thirty is one and a half.
#[test]
fn a_models_own_surveys_are_rarely_found_odd() -> Result<()> {
    for model in ["prevalence", "continuous"] {
        let odd = found(model, 15, |_, _| {})?;
        assert!(odd <= 3, "{odd} of 15 surveys from the prior of `{model}` were found odd");
    }
    Ok(())
}

#[test]
fn wrong_surveys_are_found_odd() -> Result<()> {
    let rate = |context: &mut Context, rng: &mut Stream, eta: f64| {
        let tested = context.trials.clone().expect("counts");
        let p = Link::Logit.outcome(eta);
        context.y = tested.iter().map(|n| rng.binomial(*n as u64, p) as f64).collect();
    };
    let prevalence = [
        // Nobody is positive among many: with a handful tested that would be no wonder.
        found("prevalence", 5, |c, rng| {
            c.trials = Some(vec![300.0; 40]);
            rate(c, rng, -9.0);
        })?,
        found("prevalence", 5, |c, _| {
            c.trials = c.trials.as_ref().map(|t| t.iter().map(|n| 500.0 * n).collect());
            c.y.iter_mut().for_each(|k| *k *= 500.0);
        })?,
        found("prevalence", 5, |c, _| c.xy[3][0] += 30.0)?,
    ];
    assert!(prevalence.iter().all(|odd| *odd >= 4), "{prevalence:?} of 5 each");
    let continuous = [
        found("continuous", 5, |c, _| c.y[7] = 300.0)?,
        found("continuous", 5, |c, _| c.y.iter_mut().for_each(|v| *v = (3.0 * *v).exp()))?,
        found("continuous", 5, |c, _| c.xy[3][1] -= 30.0)?,
    ];
    assert!(continuous.iter().all(|odd| *odd >= 4), "{continuous:?} of 5 each");
    Ok(())
}

/// Published benchmarks have coordinates of their own, and no survey is like them.
#[test]
fn models_that_cannot_be_compared_judge_nobody() -> Result<()> {
    let recipe = "[model]\nkind = \"cnp\"\n[prior]\nkind = \"gp\"\n[task]\nlikelihood = \"gaussian\"\nframe = \"raw\"\n";
    let mut checkpoint = Checkpoint::resolve("continuous")?;
    checkpoint.card.recipe = recipe.into();
    assert!(Judge::of(&checkpoint)?.is_none());
    Ok(())
}
