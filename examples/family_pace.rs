//! Training steps per second of the models of the family on a line, as `isopleth train` takes them:
//! one part of the batch per thread. The same step in PyTorch is benches/peers/family.py.
//!
//! ```sh
//! cargo run --release --example family_pace -- 60 cnp convcnp convcnp-xl
//! ```

use std::time::Instant;

use candle_core::{DType, Device};
use isopleth::{
    Error, Result, Stream, fused, likelihood,
    model::{self, Problem, params::Params},
    process::Reward,
    task::Tasks,
    train::{
        objective,
        optimiser::{Optimiser, Rule},
    },
};

/// Batch, context and targets, as the peer has them.
const SIZES: [usize; 3] = [16, 25, 50];
const THREADS: usize = 2;

/// The table that benchmarks train, with a plain Gaussian head as the peer has it.
fn table(name: &str) -> Result<toml::Table> {
    let known: toml::Table =
        include_str!("../src/benchmark/models.toml").parse().expect("a table of tables");
    let table = known.get(name).and_then(|m| m.get("model")).and_then(|m| m.as_table());
    let mut table = table.cloned().ok_or_else(|| {
        Error::input(format!("no table for `{name}`")).try_this("see src/benchmark/models.toml")
    })?;
    let head = table.entry("head").or_insert_with(|| toml::Table::new().into());
    if let Some(head) = head.as_table_mut() {
        head.insert("components".into(), 1.into());
        head.insert("nugget".into(), false.into());
    }
    Ok(table)
}

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let steps: usize = words.next().and_then(|n| n.parse().ok()).unwrap_or(60);
    let mut names: Vec<String> = words.collect();
    let plain = names.iter().any(|name| name == "plain");
    names.retain(|name| name != "plain");
    if names.is_empty() {
        names = ["cnp", "tnp-d", "convcnp", "convcnp-xl"].map(String::from).to_vec();
    }
    let [rows, contexts, targets] = SIZES;
    let recipe = format!(
        "prior = {{ kind = 'gp' }}\n\
         design = {{ targets = {targets}, line = true, half_side = 2.0 }}\n\
         task = {{ likelihood = 'gaussian', frame = 'raw', share = {rows} }}"
    );
    let tasks = Tasks::new(&recipe.parse().expect("TOML"))?;
    let batch = tasks.batch(1, 0, rows, contexts)?;
    let threads = |_| rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let pools: Vec<_> = (0..THREADS).map(threads).collect();
    for name in names {
        let mut params = Params::new(1, &Device::Cpu, DType::F32);
        let problem = Problem::new(1, likelihood::find("gaussian")?);
        let process = model::build(&table(&name)?, problem, &mut params)?;
        let mut optimiser = Optimiser::new(Rule::Adamw, 0.0, params.vars());
        let part = |i: usize| -> Result<_> {
            let (start, end) = (i * rows / THREADS, (i + 1) * rows / THREADS);
            let task = batch.rows(start, end - start)?.task;
            let mut rng = Stream::new(1, "objective", i as u64);
            let loss = objective(&*process, &task, Reward::Observation, &mut rng)?.loss;
            let loss = (loss / THREADS as f64)?;
            Ok((loss.to_scalar::<f32>()?, loss.backward()?))
        };
        let part = |i| fused::plain(plain, || part(i));
        let (mut walls, mut last) = (Vec::new(), 0.0);
        for step in 0..steps {
            let start = Instant::now();
            let parts: Vec<_> = std::thread::scope(|scope| {
                let part = &part;
                let running: Vec<_> = pools
                    .iter()
                    .enumerate()
                    .map(|(i, pool)| scope.spawn(move || pool.install(|| part(i))))
                    .collect();
                running.into_iter().map(|r| r.join().expect("a part")).collect::<Result<_>>()
            })?;
            let (losses, grads): (Vec<f32>, Vec<_>) = parts.into_iter().unzip();
            optimiser.update(params.vars(), &grads, 5e-4, 1.0)?;
            if step >= 5 {
                walls.push(1e3 * start.elapsed().as_secs_f64());
            }
            last = losses.iter().sum();
        }
        walls.sort_by(f64::total_cmp);
        println!(
            "{{\"model\": \"{name}\", \"parameters\": {}, \"best_ms\": {:.3}, \"median_ms\": {:.3}, \"loss\": {last:.4}}}",
            params.count(),
            walls[0],
            walls[walls.len() / 2],
        );
    }
    Ok(())
}
