//! What a timed run measures: seconds, pairs, the share of what the machine could do, memory.
//!
//! Attention is the work that is counted. Everything else a model does takes time and counts for
//! nothing, so a share is never flattered by it.

use std::time::Instant;

use candle_core::Device;
use serde::Serialize;

use crate::{
    attention::{Precision, Reading, Tally, Term},
    device,
    error::{Error, Result},
    fused::{bf16, ceiling::Rates, simd},
    mapping::{machine, plan::Bytes},
    rng::Stream,
};

pub mod accuracy;
pub mod layer;
pub mod network;
pub mod step;
pub mod work;

use work::Work;

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attention {
    /// Softmax, chunk by chunk.
    Scan,
    /// Softmax, the whole score matrix at once.
    Full,
    /// Softmax, without the blocks of keys that cannot matter.
    Sparse,
    /// Deep kernel attention.
    Dka,
}

/// Where sites lie: model units, the square [−1, 1]².
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Anywhere, each place as likely.
    Uniform,
    /// In 50 Gaussian clumps, of sd 0.04.
    Clustered,
    /// On a square lattice, row by row.
    Lattice,
}

/// How to run, whatever runs.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where tensors live.
    pub device: Device,
    /// Its name.
    pub device_name: String,
    /// Precision of attention.
    pub precision: Precision,
    /// Threads.
    pub threads: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Runs, of which the best counts.
    pub repeat: usize,
    /// The share of its attention that a query may lose, where attention is sparse.
    pub lose: f64,
}

/// The one place that says which ways of computing there are not.
///
/// # Errors
/// [`Error::Input`] for a way that there is not.
pub fn available(attention: Attention, plan: &Plan) -> Result<()> {
    let packed = matches!(attention, Attention::Scan | Attention::Sparse);
    let there_is = match plan.precision {
        Precision::F32 => true,
        Precision::Bf16 if plan.device.is_cpu() => packed,
        Precision::Bf16 | Precision::Tf32 => plan.device.is_cuda() && attention == Attention::Scan,
    };
    if there_is {
        return Ok(());
    }
    Err(no_bf16()
        .fact("attention", format!("{attention:?}").to_lowercase())
        .fact("device", &plan.device_name))
}

/// Refuses fewer bits.
fn no_bf16() -> Error {
    Error::input("bf16 is for contexts that scan or sparse attention reads, on a GPU scan only; tf32 for those that scan reads there")
        .try_this("use --precision f32")
}

impl Plan {
    /// How contexts are read.
    pub fn reading(&self, attention: Attention) -> Reading {
        let lose = if attention == Attention::Sparse { self.lose } else { 0.0 };
        Reading { lose, precision: self.precision }
    }
}

/// Best seconds of several runs, and what the last one answered.
#[derive(Debug, Clone, Copy)]
pub struct Timed {
    /// Wall clock, the best run.
    pub wall_s: f64,
    /// Processor time over all threads, the best run; steps of 10 ms.
    pub cpu_s: Option<f64>,
    /// Average of the answers, so that two ways of computing can be compared.
    pub answer: f64,
}

/// Runs `work` `repeat` times; the best wall and processor time, each for itself.
pub fn time(plan: &Plan, mut work: impl FnMut() -> Result<f64>) -> Result<Timed> {
    let mut best = Timed { wall_s: f64::INFINITY, cpu_s: None, answer: f64::NAN };
    for _ in 0..plan.repeat.max(1) {
        let (start, cpu) = (Instant::now(), machine::cpu_seconds());
        best.answer = work()?;
        plan.device.synchronize()?;
        best.wall_s = best.wall_s.min(start.elapsed().as_secs_f64());
        let used = machine::cpu_seconds().zip(cpu).map(|(after, before)| after - before);
        best.cpu_s = match (best.cpu_s, used) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }
    Ok(best)
}

/// What the machine can do, measured in the same run.
#[derive(Debug, Clone, Serialize)]
pub struct Ceiling {
    /// Instruction set.
    pub simd: String,
    /// Multiply-adds per ns and thread, all threads running.
    pub fma_per_ns: f64,
    /// Exponentials per ns and thread, all threads running.
    pub exp_per_ns: f64,
    /// Multiply-adds per ns of one thread alone.
    pub fma_per_ns_alone: f64,
    /// Exponentials per ns of one thread alone.
    pub exp_per_ns_alone: f64,
    /// GFLOP/s of all threads.
    pub gflops: f64,
}

impl Ceiling {
    /// Of a card, from its multiprocessors and clock: f32 without tensor cores. With them, a run may
    /// be above it.
    fn of_card([fma, exp]: [f64; 2]) -> Self {
        Ceiling {
            simd: "cuda, by its data sheet".into(),
            fma_per_ns: fma,
            exp_per_ns: exp,
            fma_per_ns_alone: fma,
            exp_per_ns_alone: exp,
            gflops: 2.0 * fma,
        }
    }
}

/// Measures the machine before and after `work`, and keeps the better of the two.
pub fn under_ceiling<T>(threads: usize, work: impl FnOnce() -> Result<T>) -> Result<(T, Ceiling)> {
    let measure = || (Rates::single(), Rates::all());
    let before = measure();
    let done = work()?;
    let after = measure();
    let (single, all) = (before.0.best(after.0), before.1.best(after.1));
    let ceiling = Ceiling {
        simd: format!("{:?}", simd::level()).to_lowercase(),
        fma_per_ns: all.fma,
        exp_per_ns: all.exp,
        fma_per_ns_alone: single.fma,
        exp_per_ns_alone: single.exp,
        gflops: 2.0 * all.fma * threads as f64,
    };
    Ok((done, ceiling))
}

/// One run: what ran, what it took, and where.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of the library.
    pub isopleth: &'static str,
    /// `attention`, `condition`, `map` or `train-step`.
    pub command: &'static str,
    /// How attention was computed.
    pub attention: Attention,
    /// Name of the trained model; `random` for random weights; none where a layer ran alone.
    pub model: Option<String>,
    /// Numbers learned.
    pub parameters: Option<usize>,
    /// Tasks in the batch.
    pub batch: usize,
    /// Context sites.
    pub contexts: usize,
    /// Target sites; 0 where only the context was encoded.
    pub targets: usize,
    /// Layers of attention.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Key width of a head; features for deep kernel attention.
    pub key_width: usize,
    /// Value width of a head.
    pub value_width: usize,
    /// Terms of the distance bias.
    pub bias: Vec<Term>,
    /// Where the context lies.
    pub layout: Layout,
    /// Where tensors lived.
    pub device: String,
    /// Precision of attention.
    pub precision: Precision,
    /// How numbers of 16 bits were read, `storage` or `dot`: the faster way here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16: Option<&'static str>,
    /// Threads.
    pub threads: usize,
    /// The processor.
    pub cpu: String,
    /// Seed of everything random.
    pub seed: u64,
    /// Runs, of which the best counts.
    pub repeat: usize,
    /// Seconds, wall clock.
    pub wall_s: f64,
    /// Of these, conditioning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub condition_s: Option<f64>,
    /// Seconds of processor time over all threads.
    pub cpu_s: Option<f64>,
    /// Query, key and head: how often a score stood between the two.
    pub head_pairs: u64,
    /// Wall time for one of these.
    pub ns_per_head_pair: f64,
    /// Useful arithmetic per second: two operations per multiply-add of the attention.
    pub gflops: f64,
    /// The time that the attention's multiply-adds and exponentials would take at the ceiling.
    pub ceiling_ns_per_head_pair: f64,
    /// That time over the measured one.
    pub ceiling_share: f64,
    /// What the machine can do.
    pub ceiling: Ceiling,
    /// Most memory that the process ever held, MiB.
    pub peak_rss_mib: Option<f64>,
    /// The card, where it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub card: Option<String>,
    /// Most memory that the process ever had in tensors on the card, MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_card_mib: Option<f64>,
    /// Share of the head pairs that were left out: of no weight, or too faint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<f64>,
    /// The share of its attention that a query was allowed to lose.
    pub lose: f64,
    /// Average of the answers.
    pub answer: f64,
    /// The training step beside its plain composition.
    #[serde(flatten)]
    pub step: Option<step::Steps>,
}

/// What ran: the words of a [`Report`].
#[derive(Debug, Clone)]
pub struct Subject {
    /// See [`Report::command`].
    pub command: &'static str,
    /// See [`Report::attention`].
    pub attention: Attention,
    /// See [`Report::model`].
    pub model: Option<String>,
    /// See [`Report::parameters`].
    pub parameters: Option<usize>,
    /// See [`Report::batch`].
    pub batch: usize,
    /// See [`Report::contexts`].
    pub contexts: usize,
    /// See [`Report::targets`].
    pub targets: usize,
    /// See [`Report::layout`].
    pub layout: Layout,
    /// Sizes of the attention.
    pub shape: work::Shape,
    /// See [`Report::bias`].
    pub bias: Vec<Term>,
    /// What was computed.
    pub work: Work,
}

impl Report {
    /// Figures of a run that took `timed`.
    pub fn new(
        plan: &Plan,
        subject: Subject,
        timed: Timed,
        ceiling: Ceiling,
        peak_rss_mib: Option<f64>,
    ) -> Self {
        let (work, shape) = (subject.work, subject.shape);
        // A card's ceiling is what it is made for, and no processor thread counts.
        let (ceiling, threads) = match device::rates(&plan.device) {
            Some(rates) => (Ceiling::of_card(rates), 1),
            None => (ceiling, plan.threads),
        };
        let ns = timed.wall_s * 1e9;
        let least = work.least_ns(&ceiling, threads);
        let pairs = work.head_pairs as f64;
        Report {
            isopleth: env!("CARGO_PKG_VERSION"),
            command: subject.command,
            attention: subject.attention,
            model: subject.model,
            parameters: subject.parameters,
            batch: subject.batch,
            contexts: subject.contexts,
            targets: subject.targets,
            layers: shape.layers,
            heads: shape.heads(),
            key_width: shape.key_width(),
            value_width: shape.value_width(),
            bias: subject.bias,
            layout: subject.layout,
            device: plan.device_name.clone(),
            precision: plan.precision,
            bf16: (plan.precision == Precision::Bf16).then(|| bf16::way().name()),
            threads: plan.threads,
            cpu: device::processor(),
            seed: plan.seed,
            repeat: plan.repeat,
            wall_s: timed.wall_s,
            condition_s: None,
            cpu_s: timed.cpu_s,
            head_pairs: work.head_pairs,
            ns_per_head_pair: ns / pairs,
            gflops: 2.0 * work.multiply_adds as f64 / ns,
            ceiling_ns_per_head_pair: least / pairs,
            ceiling_share: least / ns,
            ceiling,
            peak_rss_mib,
            card: device::card(&plan.device),
            peak_card_mib: device::memory(&plan.device).map(|m| Bytes(m.peak).mebibytes()),
            skipped: None,
            lose: plan.reading(subject.attention).lose,
            answer: timed.answer,
            step: None,
        }
    }

    /// Notes how much was left out: what was not computed counts for nothing.
    pub fn skipped(&mut self, tally: Tally) {
        self.skipped = (tally.all > 0).then(|| tally.skipped());
        let read = 1.0 - self.skipped.unwrap_or(0.0);
        self.gflops *= read;
        self.ceiling_share *= read;
    }
}

/// `n` context sites, model units.
pub fn sites(layout: Layout, n: usize, rng: &mut Stream) -> Vec<[f64; 2]> {
    const CLUMPS: usize = 50;
    const SD: f64 = 0.04;
    let anywhere = |rng: &mut Stream| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)];
    match layout {
        Layout::Uniform => (0..n).map(|_| anywhere(rng)).collect(),
        Layout::Clustered => {
            let centres: Vec<[f64; 2]> = (0..CLUMPS).map(|_| anywhere(rng)).collect();
            let place = |rng: &mut Stream| loop {
                let centre = centres[rng.below(CLUMPS)];
                let at = centre.map(|c| c + SD * rng.normal());
                if at.iter().all(|v| v.abs() <= 1.0) {
                    return at;
                }
            };
            (0..n).map(|_| place(rng)).collect()
        }
        Layout::Lattice => {
            let side = side(n);
            (0..n).map(|i| node(i / side, i % side, side)).collect()
        }
    }
}

/// Nodes along the side of the smallest square lattice with `n` of them.
fn side(n: usize) -> usize {
    let side = n.isqrt();
    if side * side < n { side + 1 } else { side }
}

fn node(row: usize, col: usize, side: usize) -> [f64; 2] {
    let along = |i: usize| (2 * i + 1) as f64 / side as f64 - 1.0;
    [along(col), along(row)]
}

/// `n` pixels of a square map, model units, window by window as maps are made.
pub fn pixels(n: usize, window: usize) -> Vec<[f64; 2]> {
    let side = side(n);
    let starts = || (0..side).step_by(window);
    let windows = starts().flat_map(|row| starts().map(move |col| (row, col)));
    let end = |start: usize| side.min(start + window);
    windows
        .flat_map(|(row, col)| {
            (row..end(row)).flat_map(move |r| (col..end(col)).map(move |c| (r, c)))
        })
        .filter(|(row, col)| row * side + col < n)
        .map(|(row, col)| node(row, col, side))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_lie_in_the_square_and_differ() {
        let spread = |layout| {
            let found = sites(layout, 500, &mut Stream::new(1, "test", 0));
            assert_eq!(found.len(), 500);
            assert!(found.iter().flatten().all(|v| v.abs() <= 1.0), "{layout:?}");
            // Mean distance to the nearest other site.
            let gap = |i: usize, j: usize| {
                let (a, b) = (found[i], found[j]);
                (a[0] - b[0]).hypot(a[1] - b[1])
            };
            let nearest = |i: usize| {
                (0..500).filter(|j| *j != i).map(|j| gap(i, j)).fold(f64::INFINITY, f64::min)
            };
            (0..500).map(nearest).sum::<f64>() / 500.0
        };
        let (clustered, uniform) = (spread(Layout::Clustered), spread(Layout::Uniform));
        let lattice = spread(Layout::Lattice);
        assert!(clustered < 0.7 * uniform && uniform < 0.7 * lattice, "{clustered} {uniform}");
    }

    #[test]
    fn pixels_are_those_of_the_lattice_in_another_order() {
        let sorted = |mut places: Vec<[f64; 2]>| {
            places.sort_by(|a, b| a[1].total_cmp(&b[1]).then(a[0].total_cmp(&b[0])));
            places
        };
        for n in [1, 2, 9, 10, 95, 100] {
            let lattice = sites(Layout::Lattice, n, &mut Stream::new(1, "test", 0));
            assert_eq!(sorted(pixels(n, 4)), lattice, "{n}");
        }
        // The first window is whole before the second begins.
        assert!(pixels(100, 4)[..16].iter().flatten().all(|v| *v < -0.2));
    }

    #[test]
    fn the_best_run_counts() {
        let plan = Plan {
            device: Device::Cpu,
            device_name: "cpu".into(),
            precision: Precision::F32,
            threads: 1,
            seed: 1,
            repeat: 3,
            lose: 0.0,
        };
        let (mut runs, start) = (0, Instant::now());
        let timed = time(&plan, || {
            runs += 1;
            // The second is the best.
            let pause = if runs == 2 { 5 } else { 20 };
            std::thread::sleep(std::time::Duration::from_millis(pause));
            Ok(f64::from(runs))
        });
        let (timed, all) = (timed.unwrap(), start.elapsed().as_secs_f64());
        assert_eq!((runs, timed.answer), (3, 3.0));
        assert!(timed.wall_s >= 0.005 && timed.wall_s <= all - 0.04, "{} of {all}", timed.wall_s);
    }
}
