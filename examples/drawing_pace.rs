//! Processor time of drawing training tasks, beside which a training step must not wait.
//!
//! `cargo run --release --example drawing_pace` for 32 surfaces of 256 + 256 sites a batch, by how many
//! tasks share their sites.

use isopleth::{Result, recipe::Recipe};

/// Processor time of this process so far, seconds, in steps of 10 ms; Linux only.
fn cpu_seconds() -> f64 {
    let said = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = said.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn main() -> Result<()> {
    const BATCHES: u64 = 24;
    for share in [1, 2, 32] {
        let recipe = format!(
            "prior = {{ kind = 'gp' }}\n\
             design = {{ targets = 256, clustered = 0.0, gridded = 0.0, held_block = 0.0 }}\n\
             task = {{ likelihood = 'gaussian', frame = 'raw', share = {share} }}"
        );
        let tasks = Recipe::parse(&recipe)?.tasks()?;
        tasks.batch(1, 0, 32, 256)?;
        let before = cpu_seconds();
        for index in 1..=BATCHES {
            tasks.batch(1, index, 32, 256)?;
        }
        let seconds = cpu_seconds() - before;
        println!(
            "share {share:2}: {:6.1} ms of processor time a batch",
            1e3 * seconds / BATCHES as f64
        );
    }
    Ok(())
}
